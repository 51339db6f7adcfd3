"""The method in closed forms and against the authors' numbers, the network, and each script once.

    python -m pytest -q               # this file and support/tests: minutes on two cores, no network
    python -m pytest -q test_pfgm.py  # this file alone
"""
import functools
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

import evaluate
import pfgm
import sample
import train
import unet
from pfgm import ExactField
from support.tests.common import (F64, HERE, SHARED, TINY, Linear, close, joined, network, randn,
                                  script, seeded)

DATA = HERE / 'support' / 'tests' / 'data'  # reference numbers of the authors' code


# ---------------------------------------------------------------- hyperparameters, perturbation

def test_hyperparameters__follow_the_rule_of_appendix_b():
    M, z_max, upper_norm = pfgm.hyperparameters(30, 3072, 0.01, 0.03)
    assert M == int(0.75 * math.log(900 / (2 * math.sqrt(3072) * 1e-4), 1.03)) + 1
    close(z_max, math.sqrt(2 / math.pi) * 0.01 * 1.03 ** M, rtol=1e-12)
    close(upper_norm, math.sqrt(3072) * 0.01 * 1.03 ** M, rtol=1e-12)
    with pytest.raises(ValueError, match='data_norm'):
        pfgm.hyperparameters(1e-4, 3072, 0.01, 0.03)


@pytest.mark.parametrize('key', ['restrict_on', 'restrict_off'])
def test_perturb__has_the_quantiles_of_the_authors(key):
    ref, n = np.load(DATA / 'perturb_stats.npz'), 20_000
    moved, z = pfgm.perturb(torch.zeros(n, 3072), 291, limit_norm=key == 'restrict_on',
                            generator=seeded())
    assert z.shape == (n,) and (z > 0).all() and moved.dtype == z.dtype == torch.float32
    for name, ours in dict(r=moved.norm(dim=1), z=z).items():
        error = np.percentile(ours, ref['q_percent']) - ref[f'{name}_q_{key}']
        spread = ref[f'{name}_q_se_{key}'] * math.sqrt(1 + float(ref['n_draws']) / n)
        assert (abs(error) < 4 * spread).all(), (name, error / spread)


def test_perturb__limits_the_norm_below_half_a_sigma_to_seven_tenths_of_M():
    """|moved| tells m, and z / growth tells |eps_z|, to the rounding of the norm of 40,000 draws."""
    N, M, sigma, tau = 40_000, 100, 0.01, 0.03
    moved, z = pfgm.perturb(torch.zeros(400, N), M, sigma, tau, generator=seeded())
    growth = moved.norm(dim=1) / (sigma * math.sqrt(N))
    m = growth.log() / math.log(1 + tau)
    eps_z = z / growth
    # the norm of so many draws is known to 0.35 %, which is 0.12 of m
    far = m > 70 + 1
    assert eps_z[far].min() > 0.98 * sigma / 2 and far.sum() > 50
    near_the_threshold = (eps_z > 0.5 * sigma) & (eps_z < 0.6 * sigma)
    assert m[near_the_threshold].max() > 80  # just above sigma / 2 nothing is limited
    assert 64 < m[eps_z < 0.49 * sigma].max() < 71  # below it m reaches 70, and not more


@pytest.mark.parametrize('k, options', [(1, {}), (3, dict(m_draws=3))])
def test_perturb__m_is_the_mean_of_m_draws_uniform_draws(k, options):
    moved, _ = pfgm.perturb(torch.zeros(4000, 64), 200, limit_norm=False, generator=seeded(),
                            **options)
    m = (moved.norm(dim=1) / 0.08).log() / math.log(1.03) / 200
    assert abs(m.mean() - 1 / 2) < 0.02 and abs(m.var() * 12 * k - 1) < 0.1


# ---------------------------------------------------------------- the field

def plain_field(x, z, charges, gamma):
    """The definition in float64, one (B, K, N) difference at a time."""
    rows = []
    y = charges.flatten(1).double()
    for point, height in zip(x.flatten(1).double(), z.double()):
        d2 = (point - y).square().sum(1) + height ** 2
        w = torch.softmax(-(len(point) + 1) / 2 * d2.log(), 0)
        E = torch.cat([point - w @ y, height[None]])
        rows.append(-math.sqrt(len(point)) * E / (E.norm() + gamma))
    return torch.stack(rows)


@pytest.mark.parametrize('folder, size', [(DATA, 'N192'), (SHARED / 'golden', 'N3072')])
def test_poisson_field__equals_the_authors(folder, size):
    if not folder.is_dir():
        pytest.skip('the larger reference numbers are not here')
    ref = np.load(folder / 'field_target.npz')
    charges, points = (torch.from_numpy(ref[f'{key}_{size}']) for key in ('x_data', 'perturbed'))
    x = points[:, :-1].reshape(-1, *charges.shape[1:])
    v_x, v_z = pfgm.poisson_field(x, points[:, -1], charges, 5.0)
    assert v_x.shape == x.shape and v_x.dtype == v_z.dtype == x.dtype == torch.float32
    for key in ('target_f32', 'target_f64', 'target_exact_f64'):
        want = torch.from_numpy(ref[f'{key}_{size}']).double()
        error = (joined((v_x, v_z)) - want).norm(dim=1)
        assert (error <= 1e-5 * want.norm(dim=1) + 1e-7).all(), (key, error)


def test_poisson_field__is_exact_to_1e_6_wherever_perturbation_reaches():
    N, K, B = 3072, 4096, 10
    charges = torch.rand(K, 3, 32, 32, generator=seeded()).mul(255).round() / 127.5 - 1
    charges[7] = charges[3]                                    # a duplicated image
    x, z = pfgm.perturb(charges[:B], 291, generator=seeded(1))
    x[3], x[5], z[5] = charges[3], charges[5], 1e-4            # on top of charges
    v, want = joined(pfgm.poisson_field(x, z, charges)).double(), plain_field(x, z, charges, 5.0)
    assert ((v - want).norm(dim=1) <= 1e-6 * want.norm(dim=1)).all()
    close(joined(pfgm.poisson_field(charges[:2], torch.zeros(2), charges)), torch.zeros(2, N + 1))


def test_posterior_mean__gives_a_field_whose_flux_counts_the_charges():
    # N = 1: in the (x, z) plane E = sum (p - y) / |p - y|^2, along p - (xhat, 0)
    charges, angle = torch.tensor([[-0.7], [0.1], [0.4]], dtype=F64), torch.arange(2000, dtype=F64)
    x, z = 2 * (angle * math.pi / 1000).cos()[:, None], 2 * (angle * math.pi / 1000).sin()
    E = joined((x - pfgm.posterior_mean(x, z, charges), z))
    E *= (1 / ((x - charges.T) ** 2 + z[:, None] ** 2)).sum(1, keepdim=True)
    flux = (E * joined((x, z)) / 2).sum(1).mean() * 2 * 2 * math.pi
    close(flux, 3 * 2 * math.pi, rtol=1e-10)


def test_poisson_field__of_no_charges_is_refused():
    with pytest.raises(ValueError, match='charges: there are none'):
        pfgm.poisson_field(torch.zeros(2, 3), torch.ones(2), torch.zeros(0, 3))


def test_poisson_field__of_a_class_is_that_of_its_charges():
    charges, classes, labels = randn(12, 5), torch.arange(12) % 3, torch.tensor([0, 2, 1, 1])
    x, z = randn(4, 5, seed=1), torch.tensor([0.1, 0.5, 1, 9], dtype=F64)
    mixed = joined(pfgm.poisson_field(x, z, charges, among=labels[:, None] == classes))
    for i, label in enumerate(labels):
        alone = pfgm.poisson_field(x[[i]], z[[i]], charges[classes == label])
        close(mixed[[i]], joined(alone), atol=1e-12)


def test_poisson_field__on_a_charge_is_0_and_heavy_tailed_starts_lead_back_to_the_data():
    charges = torch.rand(20, 3, 4, 4, generator=seeded()) * 2 - 1
    close(joined(pfgm.poisson_field(charges[:2], torch.zeros(2), charges)), torch.zeros(2, 49))
    x = pfgm.sample_prior((8, 3, 4, 4), 40.0, generator=seeded())
    x *= pfgm.column(1e6 / x.flatten(1).norm(dim=1), x)
    for solver, small_z in itertools.product(('rk45', 'euler', 'heun'), ('exact', 'official')):
        end, _ = pfgm.sample_ode(ExactField(charges), x, 40.0, 1e-3, solver, 20, small_z=small_z)
        assert end.abs().max() < 100  # and not nan


# ---------------------------------------------------------------- the prior

def test_sample_prior__clipped_has_the_radii_of_the_authors():
    ref, n = np.load(DATA / 'prior_stats.npz'), 20_000
    upper = float(ref['upper_norm'])
    r = pfgm.sample_prior((n, 3072), 40.0, upper, generator=seeded()).norm(dim=1).double()
    below = [radii.clip(max=upper - 1) for radii in (r.numpy(), ref['draws_r'])]
    assert stats.ks_2samp(*below).pvalue > 1e-3
    share = float((r > upper - 1e-2).double().mean())
    assert abs(share - ref['analytic_prob_r_gt_upper']) < 4 * math.sqrt(0.25 / n)


@pytest.mark.parametrize('D', [1, 2, 128, math.inf])
def test_prior_logp__is_the_density_of_sample_prior_which_has_no_infinite_draw(D):
    def shell(r):  # N = 3: 4 pi r^2 p(r)
        x = torch.tensor([[r, 0, 0]], dtype=F64)
        return 4 * math.pi * r * r * math.exp(pfgm.prior_logp(x, 2.0, D))
    close(integrate.quad(shell, 0, np.inf)[0], 1.0, rtol=1e-8)
    x = pfgm.sample_prior((20000, 48), 3.0, D=D, generator=seeded())
    law = stats.chi2(48) if D == math.inf else stats.betaprime(48 / 2, D / 2)
    assert stats.kstest(x.double().square().sum(1).numpy() / 9, law.cdf).pvalue > 0.01
    assert x.isfinite().all() and x.dtype == torch.float32


# ---------------------------------------------------------------- the flow

@pytest.mark.parametrize('z_exp', [5, 0])
@pytest.mark.parametrize('solver, key, nfe, atol', [
    ('rk45', 'rk45', 98, 2e-5), ('euler', 'forward_euler', 100, 1e-6),
    ('heun', 'improved_euler', 199, 1e-6)])
def test_sample_ode__equals_the_authors(z_exp, solver, key, nfe, atol):
    ref = np.load(DATA / 'ode.npz')
    net = ExactField(torch.from_numpy(ref['data_points']).float())
    x, spent = pfgm.sample_ode(net, torch.from_numpy(ref['x_init']), 40.0, 1e-3, solver, nfe,
                               z_exp=z_exp, small_z='official')
    assert spent == nfe == ref[f'nfe_{key}_zexp{z_exp}']
    close(x, ref[f'x_{key}_zexp{z_exp}'], atol=atol)


def test_drift__with_exact_small_z_follows_the_true_flow():
    ref = np.load(DATA / 'ode.npz')
    charges, x = (torch.from_numpy(ref[key]).double() for key in ('data_points', 'x_init'))
    x, _ = pfgm.sample_ode(ExactField(charges), x, 40.0, 1e-3, rtol=1e-10, atol=1e-10)
    close(x, ref['ref64_true_flow'], atol=1e-7)


def test_drift__adds_the_published_1e_5_to_an_official_v_z():
    """It decides where v_z is tiny: v_z = -1e-5 would make it infinite, -3e-5 makes it -2e-5."""
    net = lambda x, z: (torch.ones(1, 2, dtype=F64), torch.tensor([-3e-5], dtype=F64))
    x, z = torch.zeros(1, 2, dtype=F64), torch.tensor([7.0], dtype=F64)
    official = pfgm.drift(net, x, z, z_exp=5.0, small_z='official')  # z > z_exp: v_z is the net's
    close(official, [[7.0 / -2e-5] * 2], rtol=1e-12)
    close(pfgm.drift(net, x, z, z_exp=5.0), [[7.0 / -3e-5] * 2], rtol=1e-12)


def test_drift__guidance_mixes_the_fields_with_and_without_the_label():
    z = torch.tensor([0.1, 0.5, 1, 9], dtype=F64)
    labels = torch.tensor([0, 2, 1, 1])
    drift = functools.partial(pfgm.drift, pfgm.Denoiser(Linear()), randn(4, 1, 4, 4, seed=2), z,
                              z_exp=0)
    without = drift(labels=torch.full((4,), -1))
    for w in (0.0, 2.5):
        want = without + w * (drift(labels=labels) - without)
        close(drift(labels=labels, guidance=w), want, atol=1e-12)


@pytest.mark.parametrize('D', [1, 3, 128, math.inf])
def test_log_likelihood__of_charges_is_the_mixture_of_their_kernels(D):
    y, z_min, z_max = randn(6, 1, 5, 1), 0.5 * pfgm.unit(D), 20 * pfgm.unit(D)
    x, flow = y[:4] + 0.3 * randn(4, 1, 5, 1, seed=1), ExactField(y, D=D)

    def mixture(x, z):
        return torch.stack([pfgm.prior_logp(x - k, z, D) for k in y]).logsumexp(0) - math.log(6)

    tight = dict(rtol=1e-8, atol=1e-8)
    exact = pfgm.log_likelihood(flow, x, z_min, z_max, 'exact', D=D, z_exp=0, **tight)
    # the lines lead to the mixture on z_max, which is not quite the prior yet
    gap = mixture(exact.latent, z_max) - pfgm.prior_logp(exact.latent, z_max, D)
    close(exact.logp + gap, mixture(x, z_min), atol=1e-6)
    close(exact.bpd, -exact.logp / math.log(2) / 5 + 7)
    back, _ = pfgm.sample_ode(flow, exact.latent, z_max, z_min, z_exp=0, **tight)
    close(back, x, atol=1e-6)
    many = pfgm.log_likelihood(flow, x[:1].expand(1000, -1, -1, -1), z_min, z_max, D=D, z_exp=0,
                               generator=seeded(2)).logp  # by Hutchinson's estimate
    assert abs(many.mean() - exact.logp[0]) < 4 * many.std() / math.sqrt(1000)


def test_log_likelihood__in_the_field_of_many_chunks_of_charges(monkeypatch):
    y, x = torch.randn(20, 6, generator=seeded(), dtype=F64), torch.zeros(2, 6, dtype=F64)
    want = pfgm.log_likelihood(ExactField(y), x, 0.5, 40.0, 'exact').logp
    monkeypatch.setattr(pfgm, 'chunk', lambda x: 3)  # each backward needs all chunks
    close(pfgm.log_likelihood(ExactField(y), x, 0.5, 40.0, 'exact').logp, want, rtol=1e-9)


@pytest.mark.parametrize('N', [2, 64])
def test_sample_ode__reaches_equal_charges_equally(N):
    generator = seeded()
    charges = torch.randn(5, N, generator=generator)
    x = pfgm.sample_prior((4000, N), 1000.0, generator=generator)
    x, _ = pfgm.sample_ode(ExactField(charges), x, 1000.0, 1e-3)
    reached = torch.cdist(x, charges).argmin(1).bincount(minlength=5)
    assert stats.chisquare(reached.numpy()).pvalue > 0.01, reached


def test_schedule__ends_where_it_says():
    x = pfgm.sample_prior((50, 3, 8, 8), 40.0, 400.0, generator=seeded(), dtype=F64)
    # a point at the last plane's distance from a charge it is bound for: d^2 = (N + 1) 0.5^2
    distance = torch.hypot(x.flatten(1).norm(dim=1), torch.tensor(40.0, dtype=F64))
    for name, end in dict(log=0.5, rho7=0.5, radius=0.5 * 193 ** 0.5 * 40 / distance).items():
        grid = pfgm.schedule(name, x, 40.0, 0.5, 9)
        assert grid.shape == (10, 50) and (grid[1:] < grid[:-1]).all()
        close(grid[[0, -1]], torch.stack([torch.full((50,), 40.0), end + 0 * distance]), 1e-12)
    radius, log = (pfgm.schedule(name, x, 40.0, 0.5, 9, D=math.inf) for name in ('radius', 'log'))
    close(radius, log)
    with pytest.raises(ValueError, match='linear'):
        pfgm.schedule('linear', x, 40.0, 0.5, 9)


# ---------------------------------------------------------------- what a solver may be

def midpoint(f, x, z_from, z_to, steps=10):
    """A solver of one's own: two calls a step, even in log z."""
    h = math.log(z_to / z_from) / steps
    for k in range(steps):
        z = torch.full((len(x),), z_from * math.exp(k * h), dtype=F64)
        half = x + h / 2 * f(x, pfgm.like(z, x))
        x = x + h * f(half, pfgm.like(z * math.exp(h / 2), x))
        yield z * math.exp(h), x


def one_charge(calls):
    """The field of one charge, with straight lines, that notes its calls."""
    y = randn(1, 12)

    def net(x, z):
        calls.append(z)
        return ExactField(y)(x, z)
    return y, net


@pytest.mark.parametrize('solver, nfe, expected', [
    (midpoint, None, 20), (functools.partial(midpoint, steps=3), None, 6), (pfgm.heun, 10, 10),
    (pfgm.euler, 7, 7), ('heun', 7, 7), ('euler', None, 100),
    (functools.partial(pfgm.heun, nfe=4), None, 4)])
def test_sample_ode__reports_the_calls_that_a_solver_really_makes(solver, nfe, expected):
    calls = []
    y, net = one_charge(calls)
    x, spent = pfgm.sample_ode(net, 30 * randn(3, 12, seed=1), 40.0, 0.01, solver, nfe)
    assert spent == len(calls) == expected
    assert x.isfinite().all()


def test_sample_ode__guidance_counts_both_calls():
    labels = torch.zeros(2, dtype=torch.long)
    _, spent = pfgm.sample_ode(pfgm.Denoiser(Linear()), randn(2, 1, 4, 4), 80.0, 1.0, 'euler', 5,
                               D=math.inf, z_exp=0, labels=labels, guidance=2.0)
    assert spent == 10


@pytest.mark.parametrize('options, message', [
    (dict(solver='linear'), "solver 'linear': rk45, euler, heun, or a function"),
    (dict(solver='euler', nfe=0), 'nfe 0: must be 1 or more'),
    (dict(solver=midpoint, nfe=10), 'nfe 10: this solver, a function, does not take it'),
    (dict(solver=midpoint, schedule_name='log'), 'planes .*: this solver, a function, does not'),
    (dict(z_to=0), 'z_from 40.0, z_to 0: .* both must be above 0'),
    (dict(z_to=-1.0), 'z_to -1.0')])
def test_sample_ode__refuses_what_it_cannot_do(options, message):
    _, net = one_charge([])
    with pytest.raises(ValueError, match=message):
        pfgm.sample_ode(net, randn(3, 12), 40.0, **{'z_to': 0.01, **options})


def test_log_likelihood__refuses_a_plane_at_0():
    with pytest.raises(ValueError, match='z_min 0'):
        pfgm.log_likelihood(ExactField(randn(3, 4)), randn(2, 4), 0, 40.0)


@pytest.mark.parametrize('solver', ['rk45', 'euler', 'heun'])
def test_sample_ode__works_outside_no_grad(solver):
    layer = torch.nn.Linear(6, 6)
    net = network(lambda x, z: (0.1 * layer(x) - x, -z))
    x, _ = pfgm.sample_ode(net, randn(3, 6, dtype=torch.float32), 4.0, 0.1, solver, 10, z_exp=0)
    assert x.shape == (3, 6) and x.isfinite().all()
    assert x.requires_grad == (solver != 'rk45')  # gradients pass through the others


@pytest.mark.parametrize('v_x, z_to, message', [
    (lambda x, z: torch.sin(1e5 * z.log())[:, None] * 1e3 + 0 * x, 40, r'[.0-9]+: its steps'),
    (lambda x, z: torch.where(z[:, None] < 1, math.nan, x), 0.1, r'(0\.9|1)')],
    ids=['leads nowhere', 'nan'])
def test_rk45__that_cannot_go_on_says_where(v_x, z_to, message, monkeypatch):
    monkeypatch.setattr(pfgm, 'CALL_LIMIT', 200)
    with pytest.raises(pfgm.SolverError, match='RK45 stopped at z = ' + message):
        pfgm.sample_ode(lambda x, z: (v_x(x, z), -torch.ones(3)), torch.ones(3, 2), 10.0, z_to,
                        z_exp=0)


def test_full_float32__holds_in_the_field_rk45_and_likelihood():
    """No TF32 and no autocast there, though it is set elsewhere, as setup() does on a GPU."""
    seen, x, z = [], torch.ones(2, 3), torch.ones(2)

    def watch(part=None):
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return part

    class Watched:  # the field's products are made as the chunks of its charges come
        def __len__(self):
            return 4

        def split(self, size):
            return map(watch, torch.zeros(4, 3).split(size))

    def net(x, z):
        return watch(-x), -z

    torch.set_float32_matmul_precision('high')
    try:
        pfgm.sample_ode(net, x, 2.0, 1.0, 'euler', 1, z_exp=0)
        assert seen == [('high', True)]
        pfgm.sample_ode(net, x, 2.0, 1.0, z_exp=0)
        pfgm.log_likelihood(net, x, 1.0, 2.0, z_exp=0)
        pfgm.posterior_mean(x, z, Watched())
        assert set(seen[1:-2]) == {('highest', False)} == {seen[-1]}, seen  # [-2]: in float64
        watch()
        assert seen[-1] == ('high', True)
        with torch.autocast('cpu', torch.bfloat16):  # a caller's autocast ends there too
            within = pfgm.poisson_field(x, z, torch.eye(3))
        close(within[0], pfgm.poisson_field(x, z, torch.eye(3))[0])
    finally:
        torch.set_float32_matmul_precision('highest')


# ---------------------------------------------------------------- networks that stand for the field

@pytest.mark.parametrize('pixel, z', [(0.5, 0.01), (16.0, 40.0), (1600.0, 4000.0)])
def test_PFGM__with_skip_is_the_network_near_the_data_and_a_charge_at_0_far_away(pixel, z):
    x, z = torch.full((3, 1, 8, 8), pixel), torch.full((3,), z)
    own = torch.full_like(x, 0.25), torch.full_like(z, -0.5)
    v = pfgm.PFGM(network(lambda x, z: own), gamma=5.0, skip=True).train()(x, z)
    s2 = ((64 * pixel ** 2 + z[0] ** 2) / 65 - 1 / 4).clamp_min(0)  # noise on data of spread 1/2
    near, at_0 = 1 / (1 + s2), joined(pfgm.poisson_field(x, z, torch.zeros(1, 1, 8, 8), 5.0))
    close(joined(v), near ** 0.5 * joined(own) + (1 - near) * at_0, rtol=1e-5, atol=1e-6)


def test_PFGM__is_followed_within_what_data_in_the_cube_allow():
    """An exact field is not touched, on a charge and far out. What has learned nothing leads no
    farther than a field can, has a divergence, and is trained on as it is."""
    y, noise = torch.rand(40, 48, generator=seeded(), dtype=F64) * 2 - 1, randn(40, 48, seed=1)
    exact = ExactField(y)
    flow = pfgm.PFGM(network(exact).eval())
    for scale, z in itertools.product((0, 1e-2, 1, 30, 1e4), (1e-4, 1e-2, 1, 4.9, 300)):
        x, z = y + scale * noise, torch.full((40,), z, dtype=F64)
        close(joined(flow(x, z)), joined(exact(x, z)), rtol=1e-9)
    x = (500 * noise).requires_grad_()
    for n, v_z, z in itertools.product((0.0, 0.9, 1.0, 1.2), (0.3, -1e-9, -99.0), (0.1, 30.0)):
        def learned(x, z):
            return -n * math.sqrt(48) * x / x.norm(dim=1, keepdim=True), v_z + 0 * z
        net, z = network(learned), torch.full((40,), z, dtype=F64)
        flow = pfgm.PFGM(net)
        close(joined(flow(x, z)), joined(learned(x, z)))
        net.eval()
        slope = pfgm.drift(flow, x, z, z_exp=3)
        assert n == 0 or (slope.norm(dim=1) / x.norm(dim=1) - 1).abs().max() < 0.01
        assert torch.autograd.grad(slope.sum(), x)[0].isfinite().all()


def test_PFGM__trains_on_perturb_and_poisson_field():
    y = torch.rand(6, 12, generator=seeded()) * 2 - 1
    flow = pfgm.PFGM(None, gamma=3.0, M=50, sigma=0.02, tau=0.05, m_draws=2)
    moved, z = flow.perturb(y, seeded(1))
    for ours, want in zip((moved, z), pfgm.perturb(y, 50, 0.02, 0.05, generator=seeded(1),
                                                   m_draws=2)):
        assert torch.equal(ours, want)
    want = joined(pfgm.poisson_field(moved, z, y, 3.0))
    close(joined(flow.target(moved, z, y, y)), want)
    close(joined(flow.target(moved, z, y)), want)  # the images are the charges
    close(flow.weight(moved, z), torch.ones(6))


def test_Denoiser__of_D_inf_is_edm_and_large_D_converges_to_it():
    edm, sigma = pfgm.Denoiser(Linear()), torch.tensor([.002, .05, .5, 2, 10, 80], dtype=F64)
    s, y, noise = sigma.view(-1, 1, 1, 1), randn(9, 3, 8, 8, seed=1), randn(6, 3, 8, 8, seed=2)
    x = y[:6] + s * noise
    c_skip, c_out = 0.25 / (s ** 2 + 0.25), s * 0.5 / (s ** 2 + 0.25).sqrt()  # EDM Table 1
    xhat = c_skip * x + c_out * Linear()(x / (s ** 2 + 0.25).sqrt(), sigma.log() / 4)[0]
    v_x, v_z = edm(x, sigma)
    close(x + v_x, xhat, rtol=1e-12, atol=1e-12)
    close(v_z, -sigma)
    close(edm.weight(x, sigma), (sigma ** 2 + 0.25) / (sigma / 2) ** 2, rtol=1e-12)
    close(pfgm.drift(edm, x, sigma, z_exp=0), x - xhat, rtol=1e-9, atol=1e-12)
    for D, atol in ((1e4, 6), (1e6, 6e-2), (1e8, 6e-4)):
        z = sigma * math.sqrt(D)
        close(pfgm.Denoiser(Linear(), D)(x, z)[0], v_x, atol=atol)
        pairs = (z, D), (sigma, math.inf)
        close(*(pfgm.posterior_mean(x, at, y, d) for at, d in pairs), atol=atol)
        close(*(pfgm.kernel(x.shape, at, d, seeded(3)) / s for at, d in pairs), rtol=10 * D ** -0.5)


@pytest.mark.parametrize('D', [1, 2, 128])
def test_Denoiser__inputs_stay_bounded_under_heavy_tails(D):
    inputs, N, flow = [], 192, pfgm.Denoiser(Linear(), D)
    flow.net.register_forward_pre_hook(lambda net, given: inputs.append(given[0]))
    z = flow.draw(20000, seeded(1))
    x = torch.rand(20000, 3, 8, 8, generator=seeded()) * 2 - 1
    x += pfgm.kernel(x.shape, z, D, seeded(2))
    assert flow(x, z)[0].isfinite().all() and flow.weight(x, z).isfinite().all()
    assert x.abs().max() > (300 if D < 3 else 10)  # the tails are there
    assert inputs[0].flatten(1).square().sum(1).max() <= 1.01 * max(4 * N, N + D)


@pytest.mark.parametrize('D', [1, 2, 8, 128])
def test_Denoiser__sigma_is_what_the_norm_shows(D):
    y = torch.rand(4000, 3, 16, 16, generator=seeded(), dtype=F64) * 2 - 1  # all of about one norm
    N = y[0].numel()
    z = torch.full((4000,), 3.0, dtype=F64)
    chi2 = 2 * torch._standard_gamma(torch.full_like(z, D / 2), generator=seeded(1))
    true = z / chi2.sqrt()
    x = y + pfgm.column(true, y) * torch.randn(y.shape, generator=seeded(2), dtype=F64)
    flow = pfgm.Denoiser(Linear(), D, data_norm=(N / 3) ** 0.5)
    close(flow.sigma(x, z), true.clamp_min(3 / D ** 0.5), rtol=0.35)
    # An image that is much brighter than the others shows less noise than z may have, at most.
    white, small = y.new_ones(1, 3, 16, 16), z[:1] / 3000
    likely = 1e-3 / stats.chi2(D).ppf(1e-6) ** 0.5
    shown = ((N - N / 3) / (N + D)) ** 0.5
    close(flow.sigma(white, small), [min(likely, shown)], rtol=1e-5)


@pytest.mark.parametrize('D', [4, math.inf])
def test_Denoiser__draws_the_published_noise_levels(D):
    """EDM Table 1: ln sigma is normal, of mean -1.2 and deviation 1.2; sampling from 80 to 0.002."""
    flow, n = pfgm.Denoiser(Linear(), D), 200_000
    ln_sigma = (flow.draw(n, seeded()) / pfgm.unit(D)).log().double()
    close(ln_sigma.mean(), -1.2, atol=4 * 1.2 / n ** 0.5)
    close(ln_sigma.std(), 1.2, atol=4 * 1.2 / (2 * n) ** 0.5)
    assert (flow.low, flow.high, flow.sigma_data) == (0.002, 80.0, 0.5)


@pytest.mark.parametrize('D', [1, 128, math.inf])
def test_Denoiser__learns_the_mean_of_the_charges(D):
    flow, y = pfgm.Denoiser(Linear(), D), torch.randn(20, 3, 4, 4, generator=seeded())
    moved, z = flow.perturb(y[:6], seeded(1))
    v_x, v_z = flow.target(moved, z, y[:6], y)
    close(moved + v_x, pfgm.posterior_mean(moved, z, y, D).view(6, 3, 4, 4), atol=1e-4)
    close(v_z, -z)
    close((moved + flow.target(moved, z, y[:6])[0]), y[:6], atol=1e-4)  # of one charge: the image


def test_Denoiser__perturbs_by_given_noise_and_at_one_z_if_asked():
    y, eps = randn(5, 3, 4, 4), randn(5, 3, 4, 4, seed=1)
    moved, z = pfgm.Denoiser(Linear(), 4, only_z=7.0).perturb(y, seeded(), eps)
    close(z, [7.0] * 5)
    close(moved, y + 7 * eps, rtol=1e-12)


@pytest.mark.parametrize('reduce, want', [('sum', lambda e, z: (e + z) / 2),
                                          ('mean', lambda e, z: (e + z) / (12 + 1))])
def test_field_loss__is_half_the_sum_or_the_mean_over_N_plus_1(reduce, want):
    v, target = ((randn(4, 3, 2, 2, seed=k), randn(4, seed=9 + k)) for k in (1, 2))
    weight = torch.tensor([1.0, 2.0, 0.5, 0.0], dtype=F64)
    error_x = (v[0] - target[0]).square().sum((1, 2, 3)) * weight
    error_z = (v[1] - target[1]).square()
    close(pfgm.field_loss(v, target, weight, reduce), want(error_x, error_z), rtol=1e-12)


# ---------------------------------------------------------------- the network

@pytest.mark.parametrize('count, options', [
    (61_805_572, {}), (106_633_732, dict(num_blocks=8)),
    (124_076_292, dict(image_size=256, ch_mult=(1, 1, 2, 2, 4, 4), num_blocks=2))])
def test_UNet__has_the_published_number_of_parameters(count, options):
    with torch.device('meta'):
        assert sum(p.numel() for p in unet.UNet(**options).parameters()) == count


def test_UNet__patches_are_channels_inside_and_pixels_outside():
    torch.manual_seed(0)
    net, inside = unet.UNet(16, 3, 8, (1, 1), 1, (4,), 0, patch=4), []
    torch.nn.init.normal_(net.conv_out.weight)
    net.conv_in.register_forward_hook(lambda layer, x, out: inside.append(x[0]))
    x = torch.randn(2, 3, 16, 16, requires_grad=True)
    v_x, v_z = net(x, torch.ones(2))
    assert v_x.shape == x.shape and v_z.shape == (2,)
    for i, j in itertools.product(range(4), range(4)):
        # channel (c, i, j) of a patch is its pixel (i, j) of colour c
        assert torch.equal(inside[0][:, 4 * i + j::16], x[:, :, i::4, j::4])
    grad, = torch.autograd.grad(v_x[0].square().sum(), x)
    assert grad[0].ne(0).all() and not grad[1].any()


def test_UNet__begins_with_blocks_that_add_next_to_nothing():
    """The last layers of blocks, and the network's own, are initialised with a scale of 1e-10."""
    torch.manual_seed(0)
    net = unet.UNet(16, 3, 32, (1, 1), 1, (8,))
    for name, weight in net.named_parameters():
        if weight.dim() > 1 and name.endswith(('conv2.weight', 'out.weight')):
            fan_out, fan_in = torch.nn.init._calculate_fan_in_and_fan_out(weight)
            bound = (3e-10 / ((fan_in + fan_out) / 2)) ** 0.5
            assert 0.8 * bound < weight.abs().max() <= bound, name
    v_x, v_z = net(torch.randn(2, 3, 16, 16), torch.ones(2))
    assert v_x.abs().max() < 1e-3 and v_z.abs().max() < 1e-3


def test_UNet__weights_of_a_seed_do_not_depend_on_attn():
    with_attention, without = [], []
    for attn, names in ((4,), with_attention), ((), without):
        torch.manual_seed(0)
        names.append(unet.UNet(8, 1, 8, (1, 1), 1, attn).state_dict()['down.1.0.conv1.weight'])
    assert torch.equal(with_attention[0], without[0])


@pytest.mark.parametrize('options, message', [
    (dict(nf=30), 'nf: 30 channels do not split'), (dict(image_size=36), 'take a multiple of 8')])
def test_UNet__refuses_sizes_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message), torch.device('meta'):
        unet.UNet(**options)


# ---------------------------------------------------------------- the scripts, once each

def test_scripts__train_sample_and_evaluate(tmp_path, monkeypatch):
    """A tiny run from data to numbers; support/tests try the rest."""
    monkeypatch.chdir(tmp_path)
    script(['train.py', *TINY, '--steps', 3])
    assert {'ckpt.pt', 'log.jsonl'} <= {path.name for path in (tmp_path / 'out').iterdir()}
    script('sample.py --n 4 --nfe 3 --device cpu --out images.npz'.split())
    images = np.load('images.npz')['arr_0']
    assert images.shape == (4, 16, 16, 1) and images.dtype == np.uint8
    script('evaluate.py --swd --n 4 --nfe 3 --device cpu'.split())
    assert '"swd":' in (tmp_path / 'out' / 'results.jsonl').read_text()


@pytest.mark.parametrize('module', [train, sample, evaluate])
def test_scripts__say_their_flags(module, capsys):
    with pytest.raises(SystemExit) as stop:
        module.parse_args(['--help'])
    assert stop.value.code == 0 and '--device' in capsys.readouterr().out
