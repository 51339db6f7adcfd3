"""Solvers: exact where they should be, of their order, and with the calls that they say."""
import functools
import math

import pytest
import torch

import pfgm
from pfgm import ExactField
from support.solvers import (SOLVERS, ancestral, deciding_z, last_plane, rk45_each,
                             unipc_order)
from support.tests.common import F64, Linear, close, randn, seeded
from support.tests.test_methods import gaussian_flow

FIXED = [name for name in SOLVERS if name != 'rk45']  # solvers of exactly nfe calls


@pytest.mark.parametrize('solver', FIXED)
@pytest.mark.parametrize('nfe', [1, 2, 7, 10])
@pytest.mark.parametrize('to_data', [False, True])
def test_solvers__follow_the_straight_lines_of_one_charge_in_nfe_calls(solver, nfe, to_data):
    y, x, calls, seen = randn(1, 12), 30 * randn(3, 12, seed=1), [], []

    def net(x, z):
        calls.append(z)
        return ExactField(y)(x, z)

    solve = SOLVERS[solver]
    if solver == 'unipc':  # as Flow follows a network from far away
        solve = functools.partial(solve, free_first_step=to_data)
    end, spent = pfgm.sample_ode(net, x, 40.0, 0.01, solve, nfe, to_data=to_data,
                                 callback=lambda *at: seen.append(at))
    assert len(calls) == spent == nfe and (seen[-1][0] == 0).all() == to_data
    close(end, y + (x - y) * (not to_data) * 0.01 / 40, atol=1e-9)
    if nfe > 1 or not to_data:  # unipc's first step without a call is by now forgotten
        z, x_there = seen[-1 - to_data]
        close(x_there, y + (x - y) * 0.01 / 40, atol=1e-9)
        close(torch.stack([z, calls[-1] if to_data else z]), torch.full((2, 3), 0.01), rtol=1e-6)


@pytest.mark.parametrize('solver, order', [('euler', 1), ('heun', 2), ('dpm3m', 2),
                                           ('unipc', 3)])  # limited by their first steps
def test_solvers__halving_the_steps_divides_the_error_by_2_to_the_order(solver, order):
    flow, x, errors = gaussian_flow('pfgmpp', 2.0, 0.0), randn(3, 8), []
    for steps in (200, 400):
        nfe = 2 * steps if solver == 'heun' else steps
        end, _ = pfgm.sample_ode(flow, x, 8.0, 0.5, SOLVERS[solver], nfe, z_exp=0)
        errors.append((end - x * math.hypot(2, 0.5) / math.hypot(2, 8)).abs().max())
    assert order - 0.5 < math.log2(errors[0] / errors[1]) < order + 0.7


@pytest.mark.parametrize('z_from, z_to', [(40.0, 0.01), (0.01, 40.0)])
def test_rk45_each__takes_the_steps_of_scipy_on_each_image_alone_with_its_label(z_from, z_to):
    labels, net, seen, calls = torch.tensor([0, 2, 1, 1]), pfgm.Denoiser(Linear()), [], []
    x = randn(4, 1, 4, 4, seed=2) * torch.tensor([1e3, 1, 1e2, 10]).view(4, 1, 1, 1)
    options = dict(z_exp=0, z_from=z_from, z_to=z_to)
    _, nfe = pfgm.sample_ode(net, x, **options, labels=labels, solver=rk45_each,
                             callback=lambda *at: seen.append(at))
    z, states = map(torch.stack, zip(*seen))                       # (steps, B), (steps, B, ...)
    taken = z.diff(dim=0, prepend=torch.full_like(z[:1], z_from)) != 0  # not rejected, nor over
    for i in range(4):
        alone = []
        calls.append(pfgm.sample_ode(net, x[[i]], **options, labels=labels[[i]],
                                     callback=lambda *at: alone.append(at))[1])
        want_z, want = map(torch.cat, zip(*alone))
        close(z[taken[:, i], i], want_z, rtol=1e-6)
        close(states[taken[:, i], i], want, rtol=1e-6, atol=1e-6)
    assert nfe == max(calls) and (~taken[:-1] & taken[1:]).any()  # some were rejected


@pytest.mark.parametrize('v_x, z_to, message', [
    (lambda x, z: torch.sin(1e5 * z.log())[:, None] * 1e3 + 0 * x, 40, r'[.0-9]+: its steps'),
    (lambda x, z: torch.where(z[:, None] < 1, math.nan, x), 0.1, r'(0\.9|1)')],
    ids=['leads nowhere', 'nan'])
def test_rk45_each__that_cannot_go_on_says_where(v_x, z_to, message, monkeypatch):
    monkeypatch.setattr('support.solvers.CALL_LIMIT', 200)
    with pytest.raises(pfgm.SolverError, match='RK45 stopped at z = ' + message):
        pfgm.sample_ode(lambda x, z: (v_x(x, z), -torch.ones(len(x))), torch.ones(3, 2), 10.0, z_to,
                        rk45_each, z_exp=0)


def test_rk45_each__works_in_full_float32_and_outside_no_grad():
    seen, layer = [], torch.nn.Linear(6, 6)

    def net(x, z):
        seen.append(torch.get_float32_matmul_precision())
        return 0.1 * layer(x) - x, -z

    torch.set_float32_matmul_precision('high')
    try:
        x, _ = pfgm.sample_ode(net, randn(3, 6, dtype=torch.float32), 4.0, 0.1, rk45_each, z_exp=0)
        assert set(seen) == {'highest'} and not x.requires_grad
        assert torch.get_float32_matmul_precision() == 'high'
    finally:
        torch.set_float32_matmul_precision('highest')


@pytest.mark.parametrize('method, eta', [
    ('vp', 0.0), ('vp', 1.0), ('ddpm', 1.0), ('subvp', 0.5), ('pfgmpp', 0.5)])
def test_ancestral__has_the_mean_and_variance_of_a_gaussian(method, eta):
    """--solver ddim --eta, and VP-SDE and sub-VP-SDE of the tables, in 999 steps."""
    m, s, n, noise, flow = -0.3, 0.6, 4000, seeded(1), gaussian_flow(method, 0.6, -0.3)
    x = pfgm.sample_prior((n, 1), flow.high, D=math.inf, generator=seeded(), dtype=F64)
    solver = ancestral(eta, lambda i: torch.randn(n, 1, generator=noise, dtype=F64))
    x, _ = pfgm.sample_ode(flow, x, flow.high, flow.low, solver, 999, z_exp=0,
                           schedule_name='rho7' if method == 'pfgmpp' else flow.planes)
    close(x.mean(), m, atol=4 * s / n ** 0.5)
    close(x.var() / (s ** 2 + flow.low ** 2), 1, atol=4 * (2 / n) ** 0.5)


@pytest.mark.parametrize('eta, fresh', [(0.0, 0.0), (0.5, 0.5 * 3 * 7 ** 0.5 / 4), (None, 3.0)])
def test_ancestral__a_step_renews_what_eta_says_of_the_noise(eta, fresh):
    solver = ancestral(eta, lambda i: torch.ones(1, 2, dtype=F64))
    x = torch.full((1, 2), 5.0, dtype=F64)
    (_, end), = solver(lambda x, z: x, x, 4.0, 3.0, nfe=1)  # data at 0: all of x is noise
    close(end, [[5 / 4 * (9 - fresh ** 2) ** 0.5 + fresh] * 2], rtol=1e-12)


@pytest.mark.parametrize('D, nfe, expected', [
    (1, 1, 5.0), (1, 4, 5 / 16), (1, 5, 0.2), (1, 10, 0.025), (1, 20, 0.003125),
    (4, 10, 0.1), (100, 5, 2.0), (math.inf, 10, 0.05)])
def test_last_plane__is_5_sqrt_D_over_nfe_squared_and_for_pfgm_25_over_nfe_cubed(D, nfe, expected):
    close(last_plane(1e-3, nfe, D), expected, rtol=1e-12)
    assert last_plane(9.0, nfe, D) == 9.0  # never below z_min


@pytest.mark.parametrize('D, unit', [(1, 1.0), (100, 10.0), (math.inf, 1.0)])
def test_last_plane__after_a_free_first_step_lies_lower_for_few_calls_of_small_images(D, unit):
    small = [last_plane(1e-3, nfe, D, N=256) for nfe in range(1, 101)]
    close(small[:5], [5 * unit, 0.4 * unit, 0.2 * unit, 0.4 / 3 * unit, 0.1 * unit], rtol=1e-12)
    assert all(lower <= higher for lower, higher in zip(small[1:], small))
    anywhere = [last_plane(1e-3, nfe, D) for nfe in range(1, 101)]
    assert small[19:] == anywhere[19:]  # many calls
    assert [last_plane(1e-3, nfe, D, N=3072) for nfe in range(1, 101)] == anywhere
    assert last_plane(0.5 * unit, 3, D, N=256) == 0.5 * unit  # never below z_min


def test_unipc_order__is_2_up_to_10_calls():
    assert [unipc_order(nfe) for nfe in (1, 5, 10, 11, 20, 100)] == [2, 2, 2, 3, 3, 3]


def test_deciding_z__is_where_the_weights_of_two_charges_separate():
    """Below it a point that is z away from one of two charges belongs to it, far above to both."""
    charges = torch.tensor([[-1.0] * 8, [1.0] * 8], dtype=F64)
    z = deciding_z(charges)
    x = charges[:1] + z * randn(64, 8)
    near = pfgm.charge_weights(x, torch.full((64,), z / 3, dtype=F64), charges)[:, 0]
    far = pfgm.charge_weights(x, torch.full((64,), 100 * z, dtype=F64), charges)[:, 0]
    assert 0.1 < z < 2 and near.mean() > 0.99 and (far - 0.5).abs().max() < 0.1
