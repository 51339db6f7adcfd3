"""Physics and behaviour. `pytest -q` runs all of it in minutes on two cores, without a network.

Reference numbers of the authors' code are read from ../shared/golden where that folder exists.
"""
import contextlib
import copy
import copyreg
import functools
import io
import itertools
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import types
import urllib.error
import warnings
import zipfile
import zlib
from pathlib import Path
from unittest.mock import patch

# Networks this small are no faster on two threads, and far slower where something else runs too.
os.environ['OMP_NUM_THREADS'] = '1'  # before torch; the scripts that tests start inherit it

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import integrate, linalg, optimize, stats

import baselines
import bench
import checkpoint
import data
import evaluate
import files
import launch
import pfgm
import sample
import train
import unet
from launch import run
from pfgm import ExactField

HERE = Path(__file__).parent
GOLDEN = HERE.parent / 'shared' / 'golden'
golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason='no ../shared/golden: the reference '
                            'numbers of the authors\' code are not here')
F64 = torch.float64
warnings.filterwarnings('ignore', category=pytest.PytestUnknownMarkWarning)  # slow, cuda


@pytest.fixture(autouse=True)
def slow_only_when_asked(request):
    if request.node.get_closest_marker('slow') and 'slow' not in request.config.option.markexpr:
        pytest.skip('slow: run it with pytest -m slow -s')
    if request.node.get_closest_marker('cuda') and not torch.cuda.is_available():
        pytest.skip('no GPU here: run it where there is one, by pytest -m cuda')


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def close(a, b, rtol=0.0, atol=0.0):
    a, b = (torch.as_tensor(v, dtype=F64) for v in (a, b))
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def network(forward):
    """A module that computes `forward`."""
    net = torch.nn.Module()
    net.forward = forward
    return net


# ---------------------------------------------------------------- hyperparameters, perturbation

def test_hyperparameters_of_cifar10():
    M, z_max, upper_norm = pfgm.hyperparameters(30, 3072, 0.01, 0.03)
    assert M == int(0.75 * math.log(900 / (2 * math.sqrt(3072) * 1e-4), 1.03)) + 1
    close(z_max, math.sqrt(2 / math.pi) * 0.01 * 1.03 ** M, rtol=1e-12)
    close(upper_norm, math.sqrt(3072) * 0.01 * 1.03 ** M, rtol=1e-12)
    with pytest.raises(ValueError, match='data_norm'):
        pfgm.hyperparameters(1e-4, 3072, 0.01, 0.03)


@golden
@pytest.mark.parametrize('key', ['restrict_on', 'restrict_off'])
def test_perturbation_has_the_quantiles_of_the_authors(key):
    ref, n = np.load(GOLDEN / 'perturb_stats.npz'), 20_000
    moved, z = pfgm.perturb(torch.zeros(n, 3072), 291, limit_norm=key == 'restrict_on',
                            generator=seeded())
    assert z.shape == (n,) and (z > 0).all() and moved.dtype == z.dtype == torch.float32
    for name, ours in dict(r=moved.norm(dim=1), z=z).items():
        error = np.percentile(ours, ref['q_percent']) - ref[f'{name}_q_{key}']
        spread = ref[f'{name}_q_se_{key}'] * math.sqrt(1 + float(ref['n_draws']) / n)
        assert (abs(error) < 4 * spread).all(), (name, error / spread)


@pytest.mark.parametrize('k, how', [(1, {}), (3, dict(m_draws=3))])
def test_m_is_the_mean_of_m_draws_uniform_draws(k, how):
    moved, _ = pfgm.perturb(torch.zeros(4000, 64), 200, limit_norm=False, generator=seeded(), **how)
    m = (moved.norm(dim=1) / 0.08).log() / math.log(1.03) / 200
    assert abs(m.mean() - 1 / 2) < 0.02 and abs(m.var() * 12 * k - 1) < 0.1


# ---------------------------------------------------------------- field

def plain_field(x, z, charges, gamma):
    """The definition in float64, one (B, K, N) difference at a time."""
    x, z, y, found = x.flatten(1).double(), z.double(), charges.flatten(1).double(), []
    for point, height in zip(x, z):
        d2 = (point - y).square().sum(1) + height ** 2
        w = torch.softmax(-(len(point) + 1) / 2 * d2.log(), 0)
        E = torch.cat([point - w @ y, height[None]])
        found.append(-math.sqrt(len(point)) * E / (E.norm() + gamma))
    return torch.stack(found)


def joined(v):
    return torch.cat([v[0].flatten(1), v[1][:, None]], 1)


@golden
@pytest.mark.parametrize('size', ['N192', 'N3072'])
def test_field_equals_the_authors(size):
    ref = np.load(GOLDEN / 'field_target.npz')
    charges, points = (torch.from_numpy(ref[f'{k}_{size}']) for k in ('x_data', 'perturbed'))
    x = points[:, :-1].reshape(-1, *charges.shape[1:])
    v_x, v_z = pfgm.poisson_field(x, points[:, -1], charges, 5.0)
    assert v_x.shape == x.shape and v_x.dtype == v_z.dtype == x.dtype == torch.float32
    for key in ('target_f32', 'target_f64', 'target_exact_f64'):
        want = torch.from_numpy(ref[f'{key}_{size}']).double()
        error = (joined((v_x, v_z)) - want).norm(dim=1)
        assert (error <= 1e-5 * want.norm(dim=1) + 1e-7).all(), (key, error)


def test_field_is_exact_to_1e_6_wherever_perturbation_reaches():
    N, K, B = 3072, 4096, 32
    charges = torch.rand(K, 3, 32, 32, generator=seeded()).mul(255).round() / 127.5 - 1
    charges[7] = charges[3]                                    # a duplicated image
    x, z = pfgm.perturb(charges[:B], 291, generator=seeded(1))
    x[3], x[5], z[5] = charges[3], charges[5], 1e-4            # on top of charges
    v, want = joined(pfgm.poisson_field(x, z, charges)).double(), plain_field(x, z, charges, 5.0)
    assert ((v - want).norm(dim=1) <= 1e-6 * want.norm(dim=1)).all()
    close(joined(pfgm.poisson_field(charges[:2], torch.zeros(2), charges)), torch.zeros(2, N + 1))


def test_flux_through_a_closed_surface_counts_the_charges():
    # N = 1: in the (x, z) plane E = sum (p - y) / |p - y|^2, along p - (xhat, 0)
    charges, angle = torch.tensor([[-0.7], [0.1], [0.4]], dtype=F64), torch.arange(2000, dtype=F64)
    x, z = 2 * (angle * math.pi / 1000).cos()[:, None], 2 * (angle * math.pi / 1000).sin()
    E = joined((x - pfgm.posterior_mean(x, z, charges), z))
    E *= (1 / ((x - charges.T) ** 2 + z[:, None] ** 2)).sum(1, keepdim=True)
    flux = (E * joined((x, z)) / 2).sum(1).mean() * 2 * 2 * math.pi
    close(flux, 3 * 2 * math.pi, rtol=1e-10)


# ---------------------------------------------------------------- prior

@golden
def test_a_clipped_prior_has_the_radii_of_the_authors():
    ref, n = np.load(GOLDEN / 'prior_stats.npz'), 20_000
    upper = float(ref['upper_norm'])
    r = pfgm.sample_prior((n, 3072), 40.0, upper, generator=seeded()).norm(dim=1).double()
    below = [radii.clip(max=upper - 1) for radii in (r.numpy(), ref['draws_r'])]
    assert stats.ks_2samp(*below).pvalue > 1e-3
    share = float((r > upper - 1e-2).double().mean())
    assert abs(share - ref['analytic_prob_r_gt_upper']) < 4 * math.sqrt(0.25 / n)


@pytest.mark.parametrize('D', [1, 2, 128, math.inf])
def test_the_prior_of_any_d_has_a_density_its_law_and_no_infinite_draw(D):
    def shell(r):  # N = 3: 4 pi r^2 p(r)
        x = torch.tensor([[r, 0, 0]], dtype=F64)
        return 4 * math.pi * r * r * math.exp(pfgm.prior_logp(x, 2.0, D))
    close(integrate.quad(shell, 0, np.inf)[0], 1.0, rtol=1e-8)
    x = pfgm.sample_prior((20000, 48), 3.0, D=D, generator=seeded())
    law = stats.chi2(48) if D == math.inf else stats.betaprime(48 / 2, D / 2)
    assert stats.kstest(x.double().square().sum(1).numpy() / 9, law.cdf).pvalue > 0.01
    assert x.isfinite().all() and x.dtype == torch.float32


# ---------------------------------------------------------------- flow

@golden
@pytest.mark.parametrize('z_exp', [5, 0])
@pytest.mark.parametrize('solver, key, nfe, atol', [
    ('rk45', 'rk45', 98, 2e-5), ('euler', 'forward_euler', 100, 1e-6),
    ('heun', 'improved_euler', 199, 1e-6)])
def test_solvers_equal_the_authors(z_exp, solver, key, nfe, atol):
    ref = np.load(GOLDEN / 'ode.npz')
    net = ExactField(torch.from_numpy(ref['data_points']).float())
    x, spent = pfgm.sample_ode(net, torch.from_numpy(ref['x_init']), 40.0, 1e-3, solver, nfe,
                               z_exp=z_exp, small_z='official')
    assert spent == nfe == ref[f'nfe_{key}_zexp{z_exp}']
    close(x, ref[f'x_{key}_zexp{z_exp}'], atol=atol)


@golden
def test_exact_small_z_follows_the_true_flow():
    ref = np.load(GOLDEN / 'ode.npz')
    charges, x = (torch.from_numpy(ref[k]).double() for k in ('data_points', 'x_init'))
    x, _ = pfgm.sample_ode(ExactField(charges), x, 40.0, 1e-3, rtol=1e-10, atol=1e-10)
    close(x, ref['ref64_true_flow'], atol=1e-7)


@pytest.mark.parametrize('pixel, z', [(0.5, 0.01), (16.0, 40.0), (1600.0, 4000.0)])
def test_with_skip_the_network_is_alone_near_the_data_and_a_charge_at_0_far_away(pixel, z):
    x, z = torch.full((3, 1, 8, 8), pixel), torch.full((3,), z)
    own = torch.full_like(x, 0.25), torch.full_like(z, -0.5)
    v = baselines.PFGM(network(lambda x, z: own), dict(gamma=5.0, skip=True)).train()(x, z)
    s2 = ((64 * pixel ** 2 + z[0] ** 2) / 65 - 1 / 4).clamp_min(0)  # noise on data of spread 1/2
    near, at_0 = 1 / (1 + s2), joined(pfgm.poisson_field(x, z, torch.zeros(1, 1, 8, 8), 5.0))
    close(joined(v), near ** 0.5 * joined(own) + (1 - near) * at_0, rtol=1e-5, atol=1e-6)


def test_a_field_that_is_followed_stays_within_what_data_in_the_cube_allow():
    """An exact field is not touched, on a charge and far out. What has learned nothing leads no
    farther than a field can, has a divergence, and is trained on as it is."""
    y, noise = torch.rand(40, 48, generator=seeded(), dtype=F64) * 2 - 1, randn(40, 48, seed=1)
    args, exact = dict(method='pfgm', gamma=5.0), ExactField(y)
    flow = baselines.as_flow(network(exact).eval(), args)
    for scale, z in itertools.product((0, 1e-2, 1, 30, 1e4), (1e-4, 1e-2, 1, 4.9, 300)):
        x, z = y + scale * noise, torch.full((40,), z, dtype=F64)
        close(joined(flow(x, z)), joined(exact(x, z)), rtol=1e-9)
    x = (500 * noise).requires_grad_()
    for n, v_z, z in itertools.product((0.0, 0.9, 1.0, 1.2), (0.3, -1e-9, -99.0), (0.1, 30.0)):
        def learned(x, z):
            return -n * math.sqrt(48) * x / x.norm(dim=1, keepdim=True), v_z + 0 * z
        net, z = network(learned), torch.full((40,), z, dtype=F64)
        flow = baselines.as_flow(net, args)
        close(joined(flow(x, z)), joined(learned(x, z)))
        net.eval()
        slope = pfgm.drift(flow, x, z, z_exp=3)
        assert n == 0 or (slope.norm(dim=1) / x.norm(dim=1) - 1).abs().max() < 0.01
        assert torch.autograd.grad(slope.sum(), x)[0].isfinite().all()
    assert baselines.as_flow(net, {**args, 'official': True}) is net  # as published


@pytest.mark.parametrize('D', [1, 3, 128, math.inf])
def test_likelihood_of_charges_is_the_mixture_of_their_kernels(D):
    y, z_min, z_max = randn(6, 1, 5, 1), 0.5 * pfgm.unit(D), 20 * pfgm.unit(D)
    x, flow = y[:4] + 0.3 * randn(4, 1, 5, 1, seed=1), ExactField(y, D=D)
    def mixture(x, z):
        return torch.stack([pfgm.prior_logp(x - k, z, D) for k in y]).logsumexp(0) - math.log(6)
    tight = dict(rtol=1e-10, atol=1e-10)
    exact = pfgm.log_likelihood(flow, x, z_min, z_max, 'exact', D=D, z_exp=0, **tight)
    # the lines lead to the mixture on z_max, which is not quite the prior yet
    gap = mixture(exact.latent, z_max) - pfgm.prior_logp(exact.latent, z_max, D)
    close(exact.logp + gap, mixture(x, z_min), atol=1e-6)
    close(exact.bpd, -exact.logp / math.log(2) / 5 + 7)
    back, _ = pfgm.sample_ode(flow, exact.latent, z_max, z_min, z_exp=0, **tight)
    close(back, x, atol=1e-6)
    many = pfgm.log_likelihood(flow, x[:1].expand(3000, -1, -1, -1), z_min, z_max, D=D, z_exp=0,
                               generator=seeded(2)).logp  # by Hutchinson's estimate
    assert abs(many.mean() - exact.logp[0]) < 4 * many.std() / math.sqrt(3000)


@pytest.mark.parametrize('solver', pfgm.SOLVERS)
@pytest.mark.parametrize('nfe', [1, 2, 7, 10])
@pytest.mark.parametrize('to_data', [False, True])
def test_solvers_follow_the_straight_lines_of_one_charge_in_nfe_calls(solver, nfe, to_data):
    y, x, calls, seen = randn(1, 12), 30 * randn(3, 12, seed=1), [], []
    def net(x, z):
        calls.append(z)
        return ExactField(y)(x, z)
    out, spent = pfgm.sample_ode(net, x, 40.0, 0.01, solver, nfe, to_data=to_data,
                                 callback=lambda *at: seen.append(at))
    assert len(calls) == spent == nfe and (seen[-1][0] == 0).all() == to_data
    close(out, y + (x - y) * (not to_data) * 0.01 / 40, atol=1e-9)
    if nfe > 1 or not to_data:  # unipc's first step without a call is by now forgotten
        z, x_there = seen[-1 - to_data]
        close(x_there, y + (x - y) * 0.01 / 40, atol=1e-9)
        close(torch.stack([z, calls[-1] if to_data else z]), torch.full((2, 3), 0.01), rtol=1e-6)


@pytest.mark.parametrize('each', [False, True])
@pytest.mark.parametrize('v_x, z_to, message', [
    (lambda x, z: torch.sin(1e5 * z.log())[:, None] * 1e3 + 0 * x, 40, r'[.0-9]+: its steps'),
    (lambda x, z: torch.where(z[:, None] < 1, math.nan, x), 0.1, r'(0\.9|1)')],
    ids=['leads nowhere', 'nan'])
def test_rk45_that_cannot_go_on_says_where(v_x, z_to, message, each, monkeypatch):
    monkeypatch.setattr(pfgm, 'CALL_LIMIT', 200)
    with pytest.raises(pfgm.SolverError, match='RK45 stopped at z = ' + message):
        pfgm.sample_ode(lambda x, z: (v_x(x, z), -torch.ones(3)), torch.ones(3, 2), 10.0, z_to,
                        each=each, z_exp=0)


def test_schedules_end_where_they_say():
    x = pfgm.sample_prior((50, 3, 8, 8), 40.0, 400.0, generator=seeded(), dtype=F64)
    # a point at the last plane's distance from a charge it is bound for: d^2 = (N + 1) 0.5^2
    distance = torch.hypot(x.flatten(1).norm(dim=1), torch.tensor(40.0, dtype=F64))
    for name, end in dict(log=0.5, rho7=0.5, radius=0.5 * 193 ** 0.5 * 40 / distance).items():
        grid = pfgm.schedule(name, x, 40.0, 0.5, 9)
        assert grid.shape == (10, 50) and (grid[1:] < grid[:-1]).all()
        close(grid[[0, -1]], torch.stack([torch.full((50,), 40.0), end + 0 * distance]), 1e-12)
    close(*(pfgm.schedule(name, x, 40.0, 0.5, 9, D=math.inf) for name in ('radius', 'log')))
    for unknown in (lambda: pfgm.schedule('linear', x, 40.0, 0.5, 9),
                    lambda: pfgm.sample_ode(None, x, 40.0, 0.5, 'linear')):
        with pytest.raises(ValueError, match='linear'):
            unknown()


# ---------------------------------------------------------------- any D

class Linear(torch.nn.Module):
    """A stand-in for a U-Net: F = x sin(c_noise) + class."""
    def forward(self, x, z, labels=None):
        shift = 0 if labels is None else labels.to(x).view(-1, 1, 1, 1)
        return x * z.sin().view(-1, 1, 1, 1) + shift, z


def test_d_inf_is_edm_and_large_d_converges_to_it():
    edm, sigma = baselines.Denoiser(Linear()), torch.tensor([.002, .05, .5, 2, 10, 80], dtype=F64)
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
        close(baselines.Denoiser(Linear(), D)(x, z)[0], v_x, atol=atol)
        pairs = (z, D), (sigma, math.inf)
        close(*(pfgm.posterior_mean(x, at, y, d) for at, d in pairs), atol=atol)
        close(*(pfgm.kernel(x.shape, at, d, seeded(3)) / s for at, d in pairs), rtol=10 * D ** -0.5)


@pytest.mark.parametrize('D', [1, 2, 128])
def test_inputs_stay_bounded_under_heavy_tails(D):
    inputs, N, flow = [], 192, baselines.Denoiser(Linear(), D)
    flow.net.register_forward_pre_hook(lambda net, given: inputs.append(given[0]))
    z = flow.draw(20000, seeded(1))
    x = torch.rand(20000, 3, 8, 8, generator=seeded()) * 2 - 1
    x += pfgm.kernel(x.shape, z, D, seeded(2))
    assert flow(x, z)[0].isfinite().all() and flow.weight(x, z).isfinite().all()
    assert x.abs().max() > (300 if D < 3 else 10)  # the tails are there
    assert inputs[0].flatten(1).square().sum(1).max() <= 1.01 * max(4 * N, N + D)


def gaussian_flow(method, spread, mean):
    """The flow of D = inf of data N(mean, spread^2), from the output that is exact for it."""
    flow = baselines.METHODS[method](None)
    def F(x, c_noise, labels=None):
        t = c_noise / getattr(flow, 'scale', 0.25)
        z = t.exp() if method == 'pfgmpp' else flow.z_of(1 - t if method == 'rf' else t)
        c_skip, c_out, c_in, _ = flow.coefficients(z)
        x = x.T / c_in
        xhat = mean + spread ** 2 / (spread ** 2 + z ** 2) * (x - mean)
        return ((xhat - c_skip * x) / c_out).T, None
    flow.net = F
    return flow


@pytest.mark.parametrize('method', [name for name in baselines.METHODS if name != 'pfgm'])
def test_flows_of_a_gaussian_are_exact(method):
    m, s, inf, tight = -0.3, 0.6, math.inf, dict(z_exp=0, rtol=1e-9, atol=1e-9)
    flow = gaussian_flow(method, s, m)
    at_low, at_high = math.hypot(s, flow.low), math.hypot(s, flow.high)
    x = pfgm.sample_prior((5, 6), flow.high, D=inf, generator=seeded(), dtype=F64)
    end, _ = pfgm.sample_ode(flow, x, flow.high, flow.low, **tight)
    close(end - m, (x - m) * at_low / at_high, atol=1e-5)
    got = pfgm.log_likelihood(flow, end, flow.low, flow.high, 'exact', D=inf, **tight)
    gap = [pfgm.prior_logp(*at, inf) for at in ((got.latent - m, at_high), (got.latent, flow.high))]
    close(got.logp + gap[0] - gap[1], pfgm.prior_logp(end - m, at_low, inf), atol=1e-5)


@pytest.mark.parametrize('method, eta', [
    ('vp', 0.0), ('vp', 1.0), ('ddpm', 1.0), ('subvp', 0.5), ('pfgmpp', 0.5)])
def test_stochastic_samplers_have_the_mean_and_variance_of_a_gaussian(method, eta):
    """--solver ddim --eta, and VP-SDE and sub-VP-SDE of the tables, in 999 steps."""
    m, s, n, noise, flow = -0.3, 0.6, 20000, seeded(1), gaussian_flow(method, 0.6, -0.3)
    x = pfgm.sample_prior((n, 1), flow.high, D=math.inf, generator=seeded(), dtype=F64)
    solver = baselines.ancestral(eta, lambda i: torch.randn(n, 1, generator=noise, dtype=F64))
    x, _ = pfgm.sample_ode(flow, x, flow.high, flow.low, solver, 999, z_exp=0,
                           schedule_name=getattr(flow, 'planes', 'rho7'))
    close(x.mean(), m, atol=4 * s / n ** 0.5)
    close(x.var() / (s ** 2 + flow.low ** 2), 1, atol=4 * (2 / n) ** 0.5)


@pytest.mark.parametrize('eta, fresh', [(0.0, 0.0), (0.5, 0.5 * 3 * 7 ** 0.5 / 4), (None, 3.0)])
def test_a_step_of_ancestral_sampling_renews_what_eta_says_of_the_noise(eta, fresh):
    solver = baselines.ancestral(eta, lambda i: torch.ones(1, 2, dtype=F64))
    x, grid = torch.full((1, 2), 5.0, dtype=F64), torch.tensor([[4.0], [3.0]], dtype=F64)
    end, = solver(lambda x, z: x, x, grid, 1)  # data at 0: all of x is noise
    close(end, [[5 / 4 * (9 - fresh ** 2) ** 0.5 + fresh] * 2], rtol=1e-12)


@pytest.mark.parametrize('solver, order', [('euler', 1), ('heun', 2), ('dpm2m', 2), ('dpm3m', 2),
                                           ('unipc', 3)])  # limited by their first steps
def test_halving_the_steps_divides_the_error_by_2_to_the_order(solver, order):
    flow, x, errors = gaussian_flow('pfgmpp', 2.0, 0.0), randn(3, 8), []
    for steps in (200, 400):
        nfe = steps * (1 + (solver == 'heun'))
        out, _ = pfgm.sample_ode(flow, x, 8.0, 0.5, solver, nfe, z_exp=0)
        errors.append((out - x * math.hypot(2, 0.5) / math.hypot(2, 8)).abs().max())
    assert order - 0.5 < math.log2(errors[0] / errors[1]) < order + 0.7


def test_the_time_of_each_rival():
    """z(t) against the papers' own formulas, and t(z) inverting it."""
    t = torch.linspace(1e-3, 1, 20, dtype=F64)
    alpha = (-0.25 * t ** 2 * 19.9 - 0.05 * t).exp()  # arXiv 2011.13456
    for name, z in (('vp', (1 - alpha ** 2).sqrt() / alpha), ('subvp', (1 - alpha ** 2) / alpha)):
        flow = baselines.METHODS[name](None)
        found = [flow.z_of(t), flow.t_of(z), flow.alpha(z), flow.planes(z[-1], z[0], 19)]
        close(torch.stack(found), torch.stack([z, t, alpha, z.flip(0)]), rtol=1e-9)
    ddpm, levels = baselines.METHODS['ddpm'](None), torch.arange(1000, dtype=F64)
    bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=F64), 0)
    z = ((1 - bar) / bar).sqrt()
    close(ddpm.z_of(levels), z, rtol=1e-9)
    for found in (ddpm.t_of(z), ddpm.coefficients(z)[3]):
        close(found, levels, atol=1e-6)
    rf, y, eps, t = baselines.METHODS['rf'](None), randn(19), randn(19, seed=1), t[:-1]
    z = rf.z_of(1 - t)
    c_skip, c_out, c_in, c_noise = rf.coefficients(z)
    close(c_in * (y + z * eps), t * y + (1 - t) * eps, atol=1e-12)
    close((y - c_skip * (y + z * eps)) / c_out, y - eps, atol=1e-9)
    close(c_noise, 999 * t, atol=1e-9)


def test_classes_have_fields_of_their_own_and_guidance_mixes_them():
    charges, kinds, labels = randn(12, 5), torch.arange(12) % 3, torch.tensor([0, 2, 1, 1])
    x, z = randn(4, 5, seed=1), torch.tensor([0.1, 0.5, 1, 9], dtype=F64)
    mixed = joined(pfgm.poisson_field(x, z, charges, among=labels[:, None] == kinds))
    for i, k in enumerate(labels):
        alone = pfgm.poisson_field(x[[i]], z[[i]], charges[kinds == k])
        close(mixed[[i]], joined(alone), atol=1e-12)
    f = functools.partial(pfgm.drift, baselines.Denoiser(Linear()), randn(4, 1, 4, 4, seed=2), z,
                          z_exp=0)
    none = f(labels=torch.full((4,), -1))
    for w in (0.0, 2.5):
        close(f(labels=labels, guidance=w), none + w * (f(labels=labels) - none), atol=1e-12)


@pytest.mark.parametrize('z_from, z_to', [(40.0, 0.01), (0.01, 40.0)])
def test_rk45_takes_the_steps_of_scipy_on_each_image_alone_with_its_label(z_from, z_to):
    labels, net, seen, calls = torch.tensor([0, 2, 1, 1]), baselines.Denoiser(Linear()), [], []
    x = randn(4, 1, 4, 4, seed=2) * torch.tensor([1e3, 1, 1e2, 10]).view(4, 1, 1, 1)
    how = dict(z_exp=0, z_from=z_from, z_to=z_to)
    _, nfe = pfgm.sample_ode(net, x, **how, labels=labels, each=True,
                             callback=lambda *at: seen.append(at))
    z, states = map(torch.stack, zip(*seen))                       # (steps, B), (steps, B, ...)
    taken = z.diff(dim=0, prepend=torch.full_like(z[:1], z_from)) != 0  # not rejected, nor over
    for i in range(4):
        alone = []
        calls.append(pfgm.sample_ode(net, x[[i]], **how, labels=labels[[i]],
                                     callback=lambda *at: alone.append(at))[1])
        want_z, want = map(torch.cat, zip(*alone))
        close(z[taken[:, i], i], want_z, rtol=1e-6)
        close(states[taken[:, i], i], want, rtol=1e-6, atol=1e-6)
    assert nfe == max(calls) and (~taken[:-1] & taken[1:]).any()  # some were rejected


# ---------------------------------------------------------------- network and checkpoints

@pytest.mark.parametrize('count, kw', [
    (61_805_572, {}), (106_633_732, dict(num_blocks=8)),
    (124_076_292, dict(image_size=256, ch_mult=(1, 1, 2, 2, 4, 4), num_blocks=2))])
def test_published_networks_have_their_number_of_parameters(count, kw):
    with torch.device('meta'):
        assert sum(p.numel() for p in unet.UNet(**kw).parameters()) == count


@pytest.mark.parametrize('p', [0.1, 0.13, 0.9])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_dropout_drops_each_element_with_probability_p(p, dtype):
    h = torch.ones(10, 64, 33, 47, dtype=dtype).to(memory_format=torch.channels_last)
    h.requires_grad_()
    torch.manual_seed(1)
    dropout = launch.speed_up(torch.nn.Sequential(torch.nn.Dropout(p)))
    y, again = dropout(h), dropout(h)
    y.sum().backward()
    gone, along, across = y == 0, (y[..., 1:] + y[..., :-1]) == 0, (y[:, 1:] + y[:, :-1]) == 0
    assert torch.equal(y, (~gone).to(dtype) * (1 / (1 - p))) and torch.equal(h.grad, y)
    for dropped, rate in ((gone, p), (y + again == 0, p * p), (along, p * p), (across, p * p)):
        close(dropped.double().mean(), rate, atol=6 * (rate / dropped.numel()) ** 0.5)
    torch.manual_seed(1)
    assert torch.equal(dropout(h), y) and torch.equal(dropout.eval()(h), h)


def derived(f, dy, *inputs):
    """f(*inputs), and the gradients of all inputs where that of the result is dy."""
    inputs = [a.detach().requires_grad_() for a in inputs]
    y = f(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy.to(y))]


@pytest.mark.parametrize('dtype, tolerance', [(F64, 1e-13), (torch.float32, 1e-6),
                                              (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize('shape', [(3, 512, 4, 4), (2, 32, 32, 32), (2, 24, 33, 32)])
def test_group_norm_with_channels_last_has_the_gradients_of_group_norm(shape, dtype, tolerance):
    layer, = launch.speed_up(torch.nn.Sequential(unet.norm(shape[1])))
    x, dy = (randn(*shape, seed=k).to(dtype) for k in (1, 2))
    affine = randn(2, shape[1]).to(torch.promote_types(dtype, torch.float32))
    def ours(x, weight, bias):
        return torch.func.functional_call(layer, dict(weight=weight, bias=bias), x)
    def pytorchs(x, weight, bias):
        return torch.nn.functional.group_norm(x, layer.num_groups, weight, bias, layer.eps)
    want = derived(pytorchs, *(a.double() for a in (dy, x, *affine)))
    got = derived(ours, *(a.to(memory_format=torch.channels_last) for a in (dy, x)), *affine)
    assert got[1].is_contiguous(memory_format=torch.channels_last)
    assert all((a - b).norm() <= tolerance * b.norm() for a, b in zip(got, want))


@pytest.mark.parametrize('dtype, tolerance', [(F64, 1e-13), (torch.bfloat16, 2e-2)])
def test_attention_on_a_cpu_has_the_values_and_gradients_of_attention(dtype, tolerance):
    rows, layer = [randn(5, 1, 49, 24, seed=k) for k in (3, 0, 1, 2)], unet.Attention(24)
    want, published = derived(layer.attend, *rows), layer.attend
    assert launch.speed_up(layer).attend is not published
    got = derived(layer.attend, *(row.to(dtype) for row in rows))
    assert all((a - b).norm() <= tolerance * b.norm() for a, b in zip(got, want))


def test_attention_has_the_axis_of_heads_without_which_pytorch_may_not_fuse_it():
    layer, seen = unet.Attention(8), []
    layer.attend = lambda q, k, v: seen.append(q.shape) or v
    assert layer(torch.ones(2, 8, 3, 4), None).shape == (2, 8, 3, 4) and seen == [(2, 1, 12, 8)]


@golden
@pytest.mark.parametrize('name, kw', [('cifar10', {}), ('celeba64', dict(image_size=64))])
def test_parameters_are_in_the_published_order_and_law(name, kw):
    torch.manual_seed(0)
    net = unet.UNet(**kw)
    names, rows = checkpoint.official_names(net), (GOLDEN / f'params_{name}_ddpmpp.txt').read_text()
    rows = [line.split('\t') for line in rows.splitlines() if not line.startswith('#')]
    assert len(rows) == len(names)
    for (ours, p), (_, theirs, shape, n, std, largest) in zip(net.named_parameters(), rows):
        assert names[ours] == theirs and str(tuple(p.shape)) == shape
        close(p.detach().std(correction=0), float(std), atol=4 * float(std) / math.sqrt(int(n)))
        close(p.detach().abs().max(), float(largest), rtol=0.05)


@golden
@pytest.mark.parametrize('file', ['ckpt_cifar10_tiny.pth', 'ckpt_cifar10_tiny_legacy.pth'])
@pytest.mark.parametrize('weights', ['ema', 'raw'])
def test_official_checkpoints_give_the_authors_outputs(file, weights):
    io_ = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / 'io_cifar10_tiny.npz').items()}
    net, args = checkpoint.load_checkpoint(GOLDEN / file, weights)
    assert (args['image_size'], args['nf'], args['num_blocks']) == (32, 16, 1)
    for far in ('', '_far'):
        want = joined([io_[f'{weights}_out_{k}{far}'] for k in 'xz'])
        close(joined(net(io_['x' + far], io_['z' + far])).detach(), want, atol=5e-5)


def tiny_official(path, change=lambda saved: None):
    """An official checkpoint made from one of our networks (the levels of CIFAR-10, nf 8)."""
    torch.manual_seed(1)
    net = unet.UNet(nf=8, num_blocks=1)
    names, shadow = checkpoint.official_names(net), []
    model = {'module.sigmas': torch.zeros(3, dtype=F64)}
    for ours, p in net.named_parameters():
        name, p = names[ours], p.detach() + 0.01
        model[name] = (p.T if name.endswith('.W') else p).clone()
        shadow.append(model[name] * 2)
    state = {i: dict(step=7, exp_avg=p * 3, exp_avg_sq=p * p) for i, p in enumerate(shadow)}
    group = dict(lr=np.float64(2e-4), betas=(0.9, 0.999), eps=1e-8, weight_decay=0, amsgrad=False,
                 params=list(range(len(shadow))))
    saved = dict(model=model, ema=dict(decay=0.9999, num_updates=7, shadow_params=shadow), step=7,
                 optimizer=dict(state=state, param_groups=[group]))
    change(saved)
    torch.save(saved, path)
    return net


def test_official_checkpoint_is_read_whole_and_its_moments_serve_fused_adam(tmp_path):
    whole = tiny_official(tmp_path / 'a.pth')
    saved = checkpoint.read_checkpoint(tmp_path / 'a.pth')
    net = checkpoint.build(saved['net'], saved['args'], 'a.pth')
    opt = torch.optim.Adam(net.to(memory_format=torch.channels_last).parameters())
    train.restore(opt, saved, torch.device('cpu'), 0)
    assert opt.param_groups[0]['fused']
    for (name, p), ours in zip(whole.named_parameters(), net.parameters()):
        p, state = p.detach() + 0.01, opt.state[ours]
        for got, want in ((saved['net'][name], p), (saved['ema'][name], 2 * p),
                          (state['exp_avg'], 6 * p), (state['exp_avg_sq'], 4 * p * p)):
            close(got, want)
        # fused Adam pairs what lies at the same place in memory, whatever the strides
        assert state['exp_avg'].stride() == state['exp_avg_sq'].stride() == ours.stride()


def test_pruned_and_averaged_checkpoints_load(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a = loaded(trained)
    torch.save({**a, 'ema': {k: v + 1 for k, v in a['ema'].items()}}, 'b.pt')
    for out, given, shift in (('ema.pt', [trained], 0.0), ('mean.pt', [trained, 'b.pt'], 0.5)):
        script(['checkpoint.py', *given, '--out', out])
        for k, v in checkpoint.load_checkpoint(out)[0].net.state_dict().items():
            close(v, a['ema'][k] + shift, atol=1e-6)
    assert os.path.getsize('ema.pt') < 0.4 * os.path.getsize('b.pt')
    refuses(['sample.py', '--ckpt', 'ema.pt', '--weights', 'raw'], 'holds the EMA only')
    refuses(['train.py', *TINY, '--init_from', 'ema.pt', '--out_dir', 'o'], 'holds the EMA only')
    refuses(['checkpoint.py', 'b.pt', '--out', 'mean.pt'], '--out mean.pt: exists')
    assert sorted(os.listdir('.')) == ['b.pt', 'ema.pt', 'mean.pt']


class Payload:
    def __reduce__(self):
        return os.system, ('touch hacked',)


@pytest.mark.parametrize('message, change', [
    ('3.Conv_0.weight is missing; other does not belong',
     lambda s: s['model'].update(other=s['model'].pop('module.all_modules.3.Conv_0.weight'))),
    ('2.bias is missing', lambda s: s['model'].pop('module.all_modules.2.bias')),
    (r'5.Conv_0.weight is \(8, 16, 3, 3\), expected \(16, 8, 3, 3\)',
     lambda s: s['model'].update({'module.all_modules.5.Conv_0.weight': torch.ones(8, 16, 3, 3)})),
    ('shadow_params', lambda s: s['ema']['shadow_params'].pop()),
    ('not a checkpoint of tensors', lambda s: s.update(extra=Payload())),
    ('not a checkpoint of train.py', lambda s: s.pop('model'))])
def test_damaged_checkpoints_are_named_in_one_line(message, change, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_official('a.pth', change)
    refuses(['sample.py', '--ckpt', 'a.pth', '--device', 'cpu'], message)
    assert os.listdir('.') == ['a.pth']  # nothing ran, nothing was written


def test_patches_are_channels_inside_and_pixels_outside():
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


def test_a_run_of_an_older_version_goes_on_and_samples_as_it_did(tmp_path, monkeypatch):
    """assets/before.zip: a run of 30 steps made by commit f651589, the losses of the three that it
    made then, and its samples, by a network whose field was followed as it is."""
    with zipfile.ZipFile(HERE / 'assets' / 'before.zip') as archive:
        archive.extractall(tmp_path)
    then = json.loads((tmp_path / 'then.json').read_text())
    with monkeypatch.context() as m:
        m.setattr(baselines.PFGM, 'forward', lambda self, x, z: self.net(x, z))
        made = sampled(tmp_path / 's.npz', '--ckpt', tmp_path, '--n', 4, '--nfe', 6, '--no-bf16')
    assert np.abs(made - then['samples']).max() <= 1
    command = ['train.py', '--image_size', 8, '--steps', 33, '--device', 'cpu', '--no-bf16']
    command += ['--log_every', 1, '--out_dir', tmp_path]  # all else is the run's own
    refuses([*command, '--m_draws', 3], '--m_draws 3: .* has 1; keep it')
    other = [*command[:-1], tmp_path / 'b', '--init_from', tmp_path]
    refuses([*other, '--muon'], '--muon True: .* has False; give --no-muon')
    refuses([*other, '--nf', 8], '--nf 8: .* has 4; give --nf 4')
    script(command)
    rows = rows_of(tmp_path / 'log.jsonl')
    assert [row['step'] for row in rows] == [29, 30, 31, 32, 33] and rows[-1]['images'] == 33 * 8
    close(losses(tmp_path)[2:], then['losses'], rtol=1e-4)


def test_the_learning_rate_rises_stays_and_falls_to_0_at_the_last_step(trained, tmp_path, capsys):
    def rates(folder):
        return [row['lr'] / 2e-3 for row in rows_of(folder / 'log.jsonl')]
    close(rates(trained), [1 / 3, 2 / 3, *[1] * 8])  # of --decay 0
    command = ['train.py', *TINY, '--warmup', 2, '--decay', 0.5, '--out_dir', tmp_path]
    script([*command, '--steps', 8])
    script([*command, '--steps', 12])  # up again: as the longer run would have it
    assert 'it rises again' in capsys.readouterr().out
    close(rates(tmp_path), [1 / 2, 1, 1, 1, 1, 3 / 4, 1 / 2, 1 / 4, 4 / 6, 3 / 6, 2 / 6, 1 / 6],
          rtol=1e-12)


def test_muon_moves_matrices_by_their_orthogonal_average_and_the_rest_as_adam():
    torch.manual_seed(0)
    net = unet.UNet(8, 1, 8, (1, 2), 1, (8,), 0).double()
    adam = copy.deepcopy(net)
    opts = baselines.Muon(net, 0.01), torch.optim.Adam(adam.parameters(), 0.01, (0.9, 0.99))
    for step in range(2):
        before = copy.deepcopy(net)
        for model, opt in zip((net, adam), opts):
            for p in model.parameters():
                p.grad = randn(*p.shape, seed=p.numel() + step)
            opt.step()
    for (name, p), other, old in zip(net.named_parameters(), adam.parameters(),
                                     before.parameters()):
        if p.dim() == 1 or name.split('.')[0] in ('embed', 'conv_in', 'conv_out'):
            assert torch.equal(p, other)
            continue
        first = randn(*p.shape, seed=p.numel())
        average = 0.05 * (0.95 * first + p.grad)  # of Nesterov: once more with the gradient
        move, ahead = (a.detach().flatten(1) for a in (old - p, 0.05 * p.grad + 0.95 * average))
        U, S, V = torch.linalg.svd(ahead, full_matrices=False)
        turned = U.mT @ move @ V.mT / (0.002 * max(move.shape) ** 0.5)  # the same singular vectors
        close(turned, turned.diag().diag(), atol=1e-9)
        large = turned.diag()[S > 0.1 * S.max()]
        assert large.min() > 0.6 and large.max() < 1.25


# ---------------------------------------------------------------- the scripts

SCRIPTS = dict(train=train, sample=sample, evaluate=evaluate, checkpoint=checkpoint)
data.glyphs = functools.lru_cache(data.glyphs)  # drawn once for all tests
TINY = '--nf 8 --ch_mult 1 1 --attn 8 --batch_size 8 --field_batch 64 --log_every 1 --warmup 3 ' \
       '--sample_every 0 --device cpu --no-bf16 --lr 2e-3 --decay 0 --no-classes'.split()
TINY_PP = TINY[:TINY.index('--field_batch')] + TINY[TINY.index('--field_batch') + 2:]


def script(command):
    """Run a command line in this process; a list of words, the first a script."""
    module = SCRIPTS[command[0].removesuffix('.py')]
    run(module.main, module.parse_args([str(word) for word in command[1:]]))


def said(command):
    """What the command prints on stdout."""
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        script(command)
    return stdout.getvalue()


def refuses(command, message):
    """The command ends with exit code 2 and one line on stderr that matches `message`."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr, pytest.raises(SystemExit) as stop:
        script(command)
    text = stderr.getvalue()
    assert stop.value.code == 2 and text.count('\n') == 1, text
    assert re.search(message, text), text


def sampled(out, *flags):
    """The images (n, H, W, C) that sample.py makes as the .npz `out`."""
    script(['sample.py', '--device', 'cpu', '--out', out, *flags])
    return np.load(out)['arr_0'].astype(int)


def start(command, processes=0, **flags):
    """A training process, or torchrun with several, with its output as text."""
    launch = ['-m', 'torch.distributed.run', f'--nproc_per_node={processes}',
              *(f'--{k}={v}' for k, v in flags.items())] if processes else []
    return subprocess.Popen([sys.executable, *launch, HERE / 'train.py', *map(str, command)],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until(p, text):
    assert any(text in line for line in p.stdout), f'ended with {p.wait()} before {text!r}'


def loaded(folder):
    return torch.load(Path(folder) / 'ckpt.pt', weights_only=True)


def rows_of(file):
    """The dicts of a log.jsonl or results.jsonl."""
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def losses(folder):
    return [row['loss'] for row in rows_of(Path(folder) / 'log.jsonl')]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def same_run(a, b):
    """Whether two folders hold the same weights, and the same loss at every step."""
    saved, other = loaded(a), loaded(b)
    return losses(a) == losses(b) and all(same(saved[k], other[k]) for k in ('net', 'ema'))


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
    """A run of 10 steps on glyphs."""
    out = tmp_path_factory.mktemp('run') / 'out'
    script(['train.py', *TINY, '--steps', 10, '--dropout', 0.1, '--out_dir', out])
    return out


@pytest.fixture
def few_glyphs(monkeypatch):
    monkeypatch.setattr(data, 'glyphs', functools.partial(data.glyphs, 200))


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of it, which may be changed."""
    return shutil.copytree(trained, tmp_path / 'copied')


def test_two_processes_then_one_and_two_micro_batches_follow_the_loss_of_one(tmp_path):
    command = [*TINY, '--dropout', 0, '--steps', 8, '--out_dir']
    script(['train.py', *command, tmp_path / 'one'])
    script(['train.py', *command, tmp_path / 'half', '--accum', 2])
    p = start([*command, tmp_path / 'two', '--steps', 4], 2)
    assert 'saved' in p.communicate()[0]
    script(['train.py', *command, tmp_path / 'two'])
    one, two, half = (losses(tmp_path / k) for k in ('one', 'two', 'half'))
    close(two[:4] + half[:4], 2 * one[:4], rtol=1e-5)
    close(two, one, rtol=1e-4)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_and_sigusr1_saves(tmp_path, number):
    command = [*TINY, '--steps', 100000, '--out_dir', tmp_path]
    p = start(command)
    until(p, 'step 3/')
    refuses(['train.py', *command], 'another run is using it')
    p.send_signal(signal.SIGUSR1)
    while not (tmp_path / 'ckpt.pt').exists():
        assert p.poll() is None
        time.sleep(0.05)
    first = loaded(tmp_path)['step']
    p.send_signal(number)
    rest = p.communicate()[0]
    assert p.returncode == 0 and 'saved' in rest
    assert loaded(tmp_path)['step'] == len(losses(tmp_path)) > first >= 3


def test_nan_and_a_full_disk_keep_the_checkpoint(copied):
    ckpt, saved = copied / 'ckpt.pt', loaded(copied)
    def refuses_and_keeps(message):
        before = ckpt.read_bytes()
        refuses(['train.py', *TINY, '--dropout', 0.1, '--steps', 11, '--out_dir', copied], message)
        assert ckpt.read_bytes() == before
    if Path('/dev/full').exists():
        (copied / 'ckpt.pt.part').symlink_to('/dev/full')
        refuses_and_keeps('is intact')
    saved['net']['conv_in.bias'][:] = math.nan
    torch.save(saved, ckpt)
    refuses_and_keeps(r'step 11: .*images (\d+ at z = \S+, ){7}\d+ at z.* --lr \(it was 0.002')


@pytest.mark.parametrize('links', [True, False], ids=['links', 'none'])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(
        links, tmp_path, monkeypatch, capfd):
    """Also on a file system that has no hard links, nor locks."""
    for call in () if links else ('os.link', 'fcntl.flock'):
        monkeypatch.setattr(call, lambda *args: os.stat(tmp_path / 'no such file'))
    home, whole = tmp_path / 'o', tmp_path / 'whole'
    command = ['train.py', *TINY, *'--dropout 0.1 --save_every 2 --steps 8 --keep 3'.split(),
               '--out_dir', home]
    script(command)
    err = capfd.readouterr().err
    assert err.count('cannot be locked') == err.count('\n') == (not links)
    kept = {p.name: checkpoint.read_checkpoint(p)['step'] for p in home.glob('*.pt*')}
    assert kept == {'ckpt-0000004.pt': 4, 'ckpt-0000006.pt': 6, 'ckpt.pt': 8}
    shutil.copytree(home, whole)
    (home / 'ckpt.pt').write_bytes((whole / 'ckpt.pt').read_bytes()[:9000])
    script(command)
    assert re.search(r'o/ckpt.pt: damaged.*going back to .*ckpt-0000006.pt', capfd.readouterr().err)
    assert same_run(home, whole)


OFFLINE = r'get https://\S+ by hand and put it at \S+, or give --inception'
REFUSALS = {  # flags of each script and words of its line; TWO: as one of two processes
    'train': [
        ('--dataset nothing_here', 'no such data set'), ('--steps 0', 'above 0'), ('x', 'unrecogn'),
        ('--patch 3', 'image_size 16: patches of 3, .* of 6'), ('--hel', 'unrecognized'),
        ('--dropout 1', 'below 1'), ('--lr nan', 'a number above 0'), ('--accum 3', 'multiple of'),
        ('--field_batch 4', 'at least --batch_size'), ('--nf 30', 'take a multiple'),
        ('--D 3 --field_batch 4', '--field_batch 4: .* at least --batch_size'),
        ('--z_min 1e9', 'must be below --z_max'), ('--method vp --D 3', 'D 3: belongs'),
        ('--device cuda:7', '--device cuda:7: not on this machine'), ('--device tpu9', 'not on'),
        ('--out_dir /dev/null/x', 'cannot write'), ('--init_from no.pth', 'no such file')],
    'sample': [
        ('--ckpt no.pt', 'no such file; make one with'), ('--nfe 2.5', '--nfe: 2.5'),
        ('--solver rk4', 'rk4'), ('--out a.tiff', 'must be a file'), ('--out no/a.png', 'mkdir'),
        ('--out /proc/x', '/x: cannot be written'), ('--out /proc/x.png', 'x.png: cannot be'),
        ('--encode nothing', 'no such data set'), ('--exact --compile', '--exact has no network'),
        ('--guidance 2', '--guidance 2.0: the network knows no classes'), ('--classes -2', '-2'),
        ('--classes 3', '--classes 3: .* none; leave it out'), ('--schedule time', 'only vp'),
        ('--eta 1', 'belongs to --solver ddim'), ('--solver ddim', 'ddim: adds Gaussian noise'),
        ('--solver ddim --eta 1 --encode glyphs', '--eta 1.0: fresh'),
        ('--solver renew --interpolate glyphs glyphs', '--solver renew, --eta 0.0: fresh'),
        ('TWO --gif', 'by one process'), ('TWO --encode glyphs', 'by one process')],
    'evaluate': [
        ('', 'no metric asked'), ('--fid --n 100', 'needs 2049 images'), ('--kid --ref a', 'ref a'),
        ('--sweep nfe=0 --swd', '0'), ('--swd --sweep nfe=5 --solvers rk4', 'rk4'),
        ('--fid --samples nothing --ref x', '--samples nothing: no such'),
        ('--swd --results no/r.jsonl', 'mkdir'), ('TWO --bench', 'of one process'),
        ('--swd --n 2 --nfe 1 --results /proc/x', '--results /proc/x: cannot be written'),
        ('--is --n 20 --inception none.pth', 'none.pth: .*No such file.*; get'),
        ('--is --n 20', OFFLINE),
        ('--straightness', 'only vp'), ('--curves none.jsonl', 'none.jsonl: .*No such file')]}


@pytest.mark.parametrize('name, flags, message', [
    (name, *row) for name, rows in REFUSALS.items() for row in rows])
def test_bad_input_ends_in_one_line_before_any_work(
        name, flags, message, trained, tmp_path, monkeypatch):
    def offline(*args, **kw):
        raise urllib.error.URLError('no network')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, 'download_url_to_file', offline)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path.parent))
    monkeypatch.setattr(sample, 'make_images', None)
    if '/proc' in flags and not Path('/proc/self').exists():
        pytest.skip('no /proc: no folder refuses root')
    if 'TWO' in flags:
        monkeypatch.setenv('WORLD_SIZE', '2')
    base = [*TINY, '--out_dir', 'o'] if name == 'train' else ['--ckpt', trained, '--device', 'cpu']
    refuses([name, *base, *flags.removeprefix('TWO').split()], message)
    assert os.listdir(tmp_path) == []


def test_a_folder_in_use_is_not_overwritten(trained, tmp_path):
    before = (trained / 'ckpt.pt').read_bytes()
    Image.new('L', (16, 16)).save(tmp_path / 'a.png')
    for flags, message in ((['--dataset', tmp_path], 'holds a run on glyphs'),
                           (['--ema_decay', 0.5], '--ema_decay 0.5: the run'),
                           (['--nf', 16], '--nf 16: the run'), (['--steps', 10], 'has 10 already')):
        refuses(['train.py', *TINY, '--dropout', 0.1, '--out_dir', trained, '--steps', 20, *flags],
                message)
    (tmp_path / 'photos' / 'cats').mkdir(parents=True)
    for folder in (tmp_path, tmp_path / 'photos'):
        refuses(['train.py', *TINY, '--out_dir', folder], 'not empty')
    for name in ('b', 'b/c', ''):  # but folders of other runs may be in it
        script(['train.py', *TINY, '--steps', 1, '--out_dir', tmp_path / 'runs' / name])
    assert (trained / 'ckpt.pt').read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ['a.png', 'photos', 'runs']


def test_compile_without_a_compiler_ends_in_one_line(trained, tmp_path, monkeypatch):
    monkeypatch.setenv('CXX', 'no_such_compiler')
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path / 'c'))
    done = subprocess.run([sys.executable, HERE / 'sample.py', '--ckpt', trained, '--n', '1',
                           '--nfe', '1', '--compile'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and not (tmp_path / 'samples.png').exists(), done.stderr
    assert done.stderr.startswith('--compile: ') and done.stderr.count('\n') == 1


# ---------------------------------------------------------------- killed, stopped, restarted

@pytest.fixture
def here(tmp_path, monkeypatch):
    """The test runs in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize('kills, seed', [(2, 0), pytest.param(50, 1, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_as_one_that_never_was(kills, seed, here):
    rng = np.random.default_rng(seed)
    command = [*TINY, '--steps', 30 * kills, '--field_batch', 8,  # the last of a flag counts
               *'--dropout 0.1 --save_every 4 --sample_every 25 --out_dir'.split()]
    script(['train.py', *command, 'whole'])
    for _ in range(kills):
        p = start([*command, 'killed'])
        until(p, '  loss ')
        time.sleep(rng.uniform(0, 0.8))
        p.kill()
        assert p.wait() == -signal.SIGKILL
    start([*command, 'killed']).communicate()
    assert same_run('whole', 'killed')


def workers(p):
    """Process ids of the ranks under a torchrun."""
    return [int(pid) for pid in Path(f'/proc/{p.pid}/task/{p.pid}/children').read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize('first', [0, 1])
def test_killed_ranks_are_restarted_and_the_loss_goes_on(first, here):
    command = [*TINY, *'--steps 60 --dropout 0 --save_every 5 --out_dir'.split()]
    script(['train.py', *command, 'one'])
    p = start([*command, 'two'], 2, max_restarts=2)
    for step, rank in ((12, first), (32, 1 - first)):
        until(p, f'step {step}/')
        os.kill(workers(p)[rank], signal.SIGKILL)
        until(p, 'going on from step')
    p.communicate(timeout=120)
    assert p.returncode == 0
    close(losses('two'), losses('one'), rtol=1e-3)


@pytest.mark.slow
def test_a_hung_rank_ends_the_job(here):
    p = start([*TINY, '--steps', 100000, '--timeout', 5], 2)
    until(p, 'step 5/')
    os.kill(workers(p)[1], signal.SIGSTOP)
    p.communicate(timeout=120)
    assert p.returncode != 0


TOGETHER = dict(  # flags that may stand together in any way
    train="""--method=vp --method=rf --method=pfgm --D=3 --D=inf --classes --flip --image_size=8
        --no-skip --channels=3 --batch_size=6 --accum=2 --accum=3 --field_batch=1 --field_batch=all
        --field_batch=9 --decay=1 --patch=2 --muon --ncsnpp --label_first --dropout=0.2 --attn
        --attn=8 --ch_mult=1 --nf=7 --loss=mean --m_draws=4 --M=5 --z_max=1 --z_exp=0 --z_min=2
        --consistency --init_from=run --init_from=pp --distill=run --reflow=pp --pairs=5 --bf16
        --source=photos.npy --sample_every=1 --preset=mnist --keep=1 --dataset=photos.npy""",
    sample="""--ckpt=pp --ckpt=vp --exact --solver=euler --solver=rk45 --solver=renew --eta=1
        --solver=ddim --nfe=3 --schedule=time --schedule=log --z_min=.5 --to_data --no-to_data
        --tol=.1 --guidance=2 --classes=1,2 --classes=none --small_z=official --weights=raw --bf16
        --gif --n=9 --interpolate --rescale --encode=photos.npy --inpaint=photos.npy --field_lines
        --mask=mask.png --colorize=photos.npy --from=photos.npy --out=a.npz --out=folder""",
    evaluate="""--ckpt=pp --ckpt=vp --exact --swd --bpd --neighbours --straightness --judge --fid
        --sweep=1,2 --solvers=euler,rk45 --compare=run --n=3 --n=140 --ref=photos.npy --nfe=2
        --samples=photos.npy --dataset=photos.npy --solver=heun --repeats=2 --tol=.1 --out=a.png
        --save_stats=s.npz --guidance=2 --classes=1 --schedule=rho7 --curves=run/log.jsonl""")


@pytest.mark.slow
def test_any_flags_together_end_well_or_in_one_line(trained, few_glyphs, here, monkeypatch):
    monkeypatch.setattr(bench, 'JUDGE_STEPS', 2)
    shutil.copytree(trained, 'run')
    for out, flags in (('pp', '--D 3'), ('vp', '--method vp --classes')):
        script(['train.py', *TINY_PP, *flags.split(), '--steps', 2, '--out_dir', out])
    np.save('photos.npy', np.arange(9 * 256).astype(np.uint8).reshape(9, 16, 16))
    Image.fromarray(np.eye(16, dtype=np.uint8) * 255).save('mask.png')
    flow = '--ckpt run --device cpu --data_dir . --batch_size 70 --n 2'.split()
    base = dict(train=[*TINY, '--steps', 2], sample=flow, evaluate=[*flow, '--inception', 'random'])
    rng, codes = np.random.default_rng(0), []
    for name in 40 * [*TOGETHER]:
        shutil.rmtree('out', ignore_errors=True)
        flags = rng.choice(TOGETHER[name].split(), rng.integers(1, 5), replace=False)
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            try:
                codes.append(script([name, *base[name], *flags]) or 0)
            except SystemExit as stop:
                codes.append(stop.code)
        text = stderr.getvalue()
        assert codes[-1] == 0 or codes[-1] == 2 and text.count('\n') == 1, (name, flags, text)
    assert codes.count(0) > 30 and codes.count(2) > 13


@pytest.fixture(scope='session')
def straight(tmp_path_factory):
    """A run of 6 steps of rectified flow with classes."""
    out = tmp_path_factory.mktemp('run') / 'straight'
    script(['train.py', *TINY_PP, *'--method rf --classes --steps 6 --lr 1e-2'.split(),
            '--out_dir', out])
    return out


def test_our_own_sets_are_trained_on_their_labels_others_if_asked_and_a_run_stays_as_it_is(here):
    classes_of(Path('photos/train'), 'a', 'b', 'c')
    classes_of(Path('photos/test'), 'b', 'c')
    run_ = ['train.py', *TINY[:-1], '--steps', 1, '--out_dir']
    for out, flags, classes in (
            ('a', '', 10), ('b', '--no-classes', 0), ('c', '--dataset photos', 0),
            ('d', '--dataset photos --classes', 3), ('e', '--D 2 --field_batch all --classes', 10),
            ('f', '--method rf --field_batch 1 --source glyphs', 0),
            ('b', '--steps 2', 0), ('g', '--init_from b --steps 3', 0)):
        script([*run_, out, *flags.split()])
        assert loaded(out)['args']['classes'] == classes, flags
    assert {*data.load('photos', split='test').labels.tolist()} == {1, 2}  # as of all three
    refuses([*run_, 'e', '--D', 5, '--steps', 9], '--D 5.0: the run .* has 2.0')
    refuses('sample.py --ckpt e --device cpu --classes 10'.split(), '--classes 10: .* 0 to 9')
    np.savez('a.npz', x=np.zeros((8, 8, 8), np.uint8), y=[1, 2] * 4)
    refuses([*run_, 'h', '--dataset', 'a.npz', '--classes'],
            '--classes: 2 labels from 1 to 2; accepted: 0, 1.*; or give --no-classes')


def test_images_are_of_all_classes_in_turn_and_those_that_are_given_of_any(straight, here):
    Image.fromarray(data.load('glyphs').pixels[0, 0].numpy()).save('0.png')
    how = ['sample.py', '--ckpt', straight, *'--device cpu --nfe 1 --n'.split()]
    between, inpaint = '--interpolate 0.png 0.png', '--inpaint 0.png --mask 0.png'
    for flags, labels in (
            ('', [*range(10)]), ('--classes 3,4', [3, 4]), ('--rescale', sorted([*range(10)] * 8)),
            (between, []), (f'{between} --classes 3,4', [3] * 8),
            (inpaint, []), (f'{inpaint} --classes 3,4', [3, 4])):
        assert f'  classes {labels}  ' in said([*how, 8, *flags.split()])
    script([*how, 20])
    assert Image.open('samples.png').size == (10 * 68 + 4, 2 * 68 + 4)  # a column a class
    labels = baselines.Flow(classes=[0, 3, 7]).labels_of(range(2, 6), 'cpu')
    assert labels.tolist() == [7, 0, 3, 7]


def spied(owner, name):
    """A context in which calls of owner.name are recorded, as of a mock."""
    return patch.object(owner, name, autospec=True, side_effect=getattr(owner, name))


def test_straightness_of_known_lines():
    y, x = torch.linspace(-1, 1, 6, dtype=F64), 999 * torch.randn(5, 6, dtype=F64)
    flow = baselines.RectifiedFlow(  # of one data point y: F = y - eps, the lines are straight
        lambda x, c_noise: ((y - x) / (1 - c_noise[:, None] / 999), None))
    close(baselines.straightness(flow, x), torch.zeros(5), atol=1e-12)
    flow = baselines.VP(lambda x, c_noise: (torch.zeros_like(x), None))  # eps = 0: x / alpha stays
    alpha = flow.alpha(flow.planes(flow.high, flow.low, 50))
    whole = alpha[-1] - alpha[0]
    bent = (whole - 50 * alpha.diff()).square().mean() / whole ** 2
    close(baselines.straightness(flow, x), bent.expand(5), rtol=1e-9)


def test_comparing_checkpoints(trained, straight, few_glyphs, here, monkeypatch):
    compare = ['evaluate.py', '--n', 3, '--device', 'cpu', '--compare', trained / 'ckpt.pt']
    out = said([*compare, straight / 'ckpt.pt', *'--swd --bpd --straightness --sweep nfe=1,4 '
                '--solvers unipc,rk45 --tol 0.1'.split()])
    rows = [line.split() for line in out.splitlines() if re.match(' *(straight|out) .*unipc', line)]
    assert [row[:4] for row in rows] == [[run_, method, 'unipc', nfe] for run_, method in (
        ('out', 'pfgm'), ('straight', 'rf')) for nfe in '14']
    assert rows[0][-1] == '-' and rows[2][-1] != '-'  # no time, no straightness
    assert len(rows_of('results.jsonl')) == 2 * (3 + 1)
    script(['train.py', *TINY_PP, *'--image_size 8 --steps 1 --out_dir small'.split()])
    refuses([*compare, 'small'], '--compare .*one size')
    flow = baselines.Flow(student=True)
    for rank, lines in enumerate((1, 0)):
        monkeypatch.setenv('RANK', str(rank))
        with contextlib.redirect_stdout(io.StringIO()) as stdout:
            evaluate.flow_metrics(['bpd'], 'one', flow, baselines.Flow(test=None, train=None), None,
                                  (torch.device('cpu'), rank, 2))
        assert stdout.getvalue().count('distilled into one call') == lines


def followed(path, nfe, n):
    """The flow of a checkpoint, n draws of its prior, and where it leads them."""
    flow, _ = checkpoint.load_flow(sample.parse_args(
        ['--ckpt', str(path), '--nfe', str(nfe), '--no-bf16']), torch.device('cpu'))
    x = flow.prior(range(n))
    return flow, x, flow.follow(x, torch.device('cpu'), range(n))[0]


def test_pairs_of_a_teacher_outlive_a_kill_and_fit_one_student_only(straight, here, monkeypatch):
    monkeypatch.setattr(baselines, 'SHARD', 16)
    run_ = ['train.py', *TINY_PP, '--distill', straight, '--pairs', 40, '--out_dir']
    assert 'pairs: 40/40' in said([*run_, 'a', '--steps', 2])
    shards = sorted(Path('a/pairs').iterdir())
    made = [shard.read_bytes() for shard in shards]
    eps, y = torch.from_numpy(np.concatenate([*map(np.load, shards)])).unbind(1)
    assert abs(eps.mean()) < 0.05 and abs(eps.std() - 1) < 0.05
    close(y, followed(straight, baselines.PAIR_NFE, 40)[2], atol=1e-4)
    shards[0].unlink()
    shards[2].write_bytes(made[2][:500])
    assert 'pairs: 24/24' in said([*run_, 'a', '--steps', 4])
    assert [shard.read_bytes() for shard in shards] == made
    np.save('a.npy', np.zeros((9, 16, 16), np.uint8))
    for flag, value, message in (
            ('--reflow', straight, 'two runs'), ('--distill', 'a', 'itself a student'),
            ('--method', 'pfgm', '--method pfgm, D inf: a student of .* D, inf'),
            ('--dataset', 'a.npy', 'a.npy: --distill .* was trained on glyphs; give')):
        refuses([*run_, 'b', flag, value], message)
    shutil.copy(straight / 'ckpt.pt', 't.pt')
    run_ = ['train.py', *TINY_PP, *'--distill t.pt --pairs 8 --out_dir c --steps'.split()]
    script([*run_, 1])
    Path('t.pt').unlink()
    refuses([*run_, 2], '--distill t.pt: no such file')


@pytest.mark.parametrize('teacher, student, D', [
    ('--method pfgm', 'pfgmpp', 1), ('--D 3', 'pfgmpp', 3), ('--method vp', 'rf', math.inf),
    ('--method ddpm', 'rf', math.inf), ('--method rf', 'rf', math.inf),
    ('official', 'pfgmpp', 1), ('edm', 'pfgmpp', 128)])
def test_any_teacher_is_distilled_into_one_call(teacher, student, D, here, monkeypatch):
    """The student is trained where sampling begins, x on z_max, towards where x is led."""
    monkeypatch.setattr(train, 'PAIR_NFE', 4)
    path, how = 'a/ckpt.pt', TINY_PP
    if teacher in ('official', 'edm'):
        path, how = 'net.pth', '--dataset x.npy --channels 3 --warmup 1 --batch_size 8'.split()
        np.save('x.npy', np.zeros((9, 32, 32, 3), np.uint8))
        tiny_official(path) if teacher == 'official' else edm_file(path, pfgmpp=True, D=128)
    else:
        script(['train.py', *how, *teacher.split(), *'--steps 4 --lr 1e-2 --out_dir a'.split()])
    run_ = ['train.py', *how, '--distill', path, *'--device cpu --no-bf16 --log_every 1 --pairs 8 '
            '--steps 9 --lr 1e-2 --grad_clip 9 --out_dir'.split()]
    with spied(baselines.Denoiser, 'perturb') as perturb:
        script([*run_, 'b'])
    net, args = checkpoint.load_checkpoint('b/ckpt.pt')
    assert (args['method'], args['D'], args['z_exp']) == (student, D, 0)
    assert losses('b')[-1] < losses('b')[0]
    if teacher not in ('--method vp', '--method ddpm'):  # whose student begins farther out
        flow, x, ends = followed(path, 4, 8)
        close(np.load(*Path('b/pairs').iterdir())[:, 1], ends, atol=1e-4 * float(ends.abs().max()))
        assert flow.z_max == args['z_max'] and flow.upper_norm == args['upper_norm']
        for call in perturb.call_args_list:
            moved, z = net.perturb(*call.args[1:])
            gap = torch.cdist(moved.flatten(1).double(), x.flatten(1).double()).amin(1)
            assert (z == flow.z_max).all() and gap.max() < 1e-4 * x.flatten(1).norm(dim=1).max()
    assert 'nfe 1 ' in said('sample.py --ckpt b --n 3 --device cpu'.split())
    if teacher == '--method vp':  # a run of before, whose student is its own, goes on as that
        script([*run_, 'c', '--method', 'vp'])
        script([*run_, 'c', '--steps', 10])
        assert loaded('c')['args']['method'] == 'vp' and loaded('c')['step'] == 10


@pytest.mark.parametrize('flags', ['--D 2', '--D inf --classes', '--method vp'])
def test_consistency_training_and_its_sampler(flags, here, monkeypatch):
    """The target at z is what the network, stopped, makes of the same noise at a lower level."""
    script(['train.py', *TINY_PP, *flags.split(), *'--steps 2 --lr 1e-2 --out_dir a'.split()])
    stages, point = [], baselines.training_point

    def checked(flow, clean, *more):
        made = point(flow, clean, *more)
        moved, z, target, _, weight, *labels = made
        share = (1 - (1 + 8 / (1 + torch.exp(z / flow.unit))) / 2 ** more[-1]).clamp_min(0)
        r = pfgm.column(share, clean)
        scale = pfgm.column(moved.flatten(1).abs().amax(1) + 1, clean)
        lower = clean + r * (moved - clean)
        with torch.no_grad():
            want = torch.where(r > 0, lower + flow(lower, share * z, *labels)[0], clean)
        close((moved + target) / scale, want / scale, rtol=1e-3, atol=1e-4)
        close(weight * (1 - share), flow.weight(moved, z), rtol=1e-4)
        assert not target.requires_grad and flow.training
        stages.append(more[-1])
        return made
    monkeypatch.setattr(train, 'training_point', checked)
    run_ = ['train.py', *TINY_PP, *re.findall('--classes', flags),
            *'--consistency --init_from a --lr 1e-3 --out_dir b --steps'.split()]
    script([*run_, 16])
    assert stages == [1 + step // 2 for step in range(16)]
    assert loaded('b')['args']['method'] == loaded('a')['args']['method']
    sampling = 'sample.py --ckpt b --n 3 --device cpu'.split()
    assert 'solver renew  nfe 1 ' in said(sampling)
    assert 'solver renew  nfe 2 ' in said([*sampling, '--nfe', 2])
    refuses([*sampling, '--encode', 'glyphs'], '--solver renew.*fresh noise cannot be encoded')
    assert '): the levels of --consistency lie further apart' in said([*run_, 17])
    refuses(['train.py', *TINY, '--consistency', '--out_dir', 'c'], '--consistency: trains')
    refuses(['train.py', *TINY_PP, '--distill', 'b', '--out_dir', 'c'], 'itself a student')


def test_fresh_noise_goes_no_farther_than_the_prior():
    flow = baselines.Flow(D=1, z_max=40.0, upper_norm=300.0, seed=0, shape=(1, 4, 4))
    noise = flow.noise_of(range(200))
    norms = torch.cat([noise(step).flatten(1).norm(dim=1) for step in range(3)])
    assert norms.max() <= 7.5 * (1 + 1e-6) and (norms > 7.49).sum() > 100
    flow.upper_norm = None  # heavy tails
    assert flow.noise_of(range(200))(0).abs().max() > 100


def test_noise_is_renewed_on_every_plane():
    """x = xhat, then noise of the kernel anew: of one charge, the charge and that noise."""
    y, D = torch.randn(1, 6, generator=seeded(), dtype=F64), 3
    u = pfgm.kernel((2, 1000, 6), torch.ones(2, dtype=F64), math.inf, seeded(1))
    path = []
    end, nfe = pfgm.sample_ode(
        ExactField(y, D=D), 9 * u[0], 9.0, 0.5, baselines.ancestral(None, lambda i: u[i]), 3,
        z_exp=0, D=D, to_data=True, schedule_name='log', callback=lambda *at: path.append(at))
    assert nfe == len(path) == 3
    for (z, x), noise in zip(path, u):
        close(x, y + z[0] * noise, atol=1e-9)
    close(end, y.expand(1000, 6), atol=1e-9)


def test_a_flow_between_two_data_sets(straight, here):
    """x_t = t y + (1 - t) s of images s and y, drawn at random and paired so that they are near in
    each batch; samples start from s; reflow keeps the pairs."""
    images = torch.randint(0, 256, (2, 7, 16, 16), generator=seeded()).to(torch.uint8)
    for name, pixels in zip('sy', images):
        np.save(f'{name}.npy', pixels)
    s, drawn = data.to_float(images[0])[:, None], set()
    run_ = ['train.py', *TINY_PP, *'--dataset y.npy --lr 1e-2 --sample_every 30'.split()]
    with spied(baselines.Denoiser, 'perturb') as perturb:
        script([*run_, *'--method rf --source s.npy --steps 30 --out_dir a'.split()])
    for call in perturb.call_args_list:
        _, y, _, start = call.args
        near = torch.cdist(start.flatten(1), s.flatten(1))
        assert near.amin(1).max() < 0.05                                # an image of the other set
        cost = torch.cdist(y.flatten(1), s[near.argmin(1)].flatten(1)).square()
        close(cost.diagonal().sum(), cost[optimize.linear_sum_assignment(cost)].sum(), rtol=1e-5)
        drawn.add(tuple(sorted(near.argmin(1).tolist())))
    assert len(drawn) > 9
    how = '--ckpt a --nfe 8 --no-bf16'.split()  # by bfloat16 more than a grey level differs
    made = sampled('a.npz', *how, '--n', 9)
    assert (made[7:] == made[:2]).all() and len(np.unique(made, axis=0)) == 7
    script(['sample.py', '--device', 'cpu', *how, *'--from s.npy --out a.png'.split()])
    strip = np.asarray(Image.open('a.png').convert('L')).astype(int)    # pairs, s before y
    assert (abs(strip[4:68:4, 4:68:4] - images[0, 0].numpy()) <= 1).all()
    for kind in ('reflow', 'distill'):
        out = said([*run_, f'--{kind}', 'a', *f'--pairs 9 --steps 3 --out_dir {kind}'.split()])
        eps, end = torch.from_numpy(np.load(*Path(kind, 'pairs').iterdir())).unbind(1)
        close(end / 999 + eps, s[torch.arange(9) % 7], atol=1e-4)
        assert 'the teacher: straightness' in out and len(sampled('b.npz', '--ckpt', kind)) == 7
    refuses(['sample.py', '--ckpt', straight, '--from', 's.npy'], '--from s.npy: .* from noise')
    refuses('evaluate.py --ckpt a --bpd --device cpu'.split(), '--bpd: .*from images')
    refuses([*run_, *'--source s.npy --method vp --out_dir c'.split()], '--source s.npy: b')


# ---------------------------------------------------------------- sampling

def test_on_a_charge_the_field_is_0_and_heavy_tailed_starts_lead_back_to_the_data():
    charges = torch.rand(20, 3, 4, 4, generator=seeded()) * 2 - 1
    close(joined(pfgm.poisson_field(charges[:2], torch.zeros(2), charges)), torch.zeros(2, 49))
    x = pfgm.sample_prior((8, 3, 4, 4), 40.0, generator=seeded())
    x *= pfgm.column(1e6 / x.flatten(1).norm(dim=1), x)
    for solver, small_z in itertools.product(('rk45', 'euler', 'heun'), ('exact', 'official')):
        out, _ = pfgm.sample_ode(ExactField(charges), x, 40.0, 1e-3, solver, 20, small_z=small_z)
        assert out.abs().max() < 100  # and not nan


@pytest.mark.parametrize('N', [2, 64])
def test_equal_charges_are_reached_equally(N):
    g = seeded()
    charges = torch.randn(5, N, generator=g)
    x = pfgm.sample_prior((4000, N), 1000.0, generator=g)
    x, _ = pfgm.sample_ode(ExactField(charges), x, 1000.0, 1e-3)
    reached = torch.cdist(x, charges).argmin(1).bincount(minlength=5)
    assert stats.chisquare(reached.numpy()).pvalue > 0.01, reached


def test_likelihood_in_the_exact_field_of_many_charges(monkeypatch):
    y, x = torch.randn(20, 6, generator=seeded(), dtype=F64), torch.zeros(2, 6, dtype=F64)
    want = pfgm.log_likelihood(ExactField(y), x, 0.5, 40.0, 'exact').logp
    monkeypatch.setattr(pfgm, 'chunk', lambda x: 3)  # each backward needs all chunks
    close(pfgm.log_likelihood(ExactField(y), x, 0.5, 40.0, 'exact').logp, want, rtol=1e-9)


# rk45 on the exact field, in float64: a raw network amplifies how convolutions round in a batch
@pytest.mark.parametrize('flags', ['--exact', '--nfe 5', '--solver ddim --eta 1 --nfe 5'])
def test_an_image_depends_on_seed_and_index_only(flags, trained, straight, few_glyphs, here):
    def made(n, batch_size, seed=0):
        return sampled('a.npz', '--ckpt', straight if 'ddim' in flags else trained, '--no-bf16',
                       *flags.split(), '--n', n, '--batch_size', batch_size, '--seed', seed)
    six = made(6, 6)
    assert six.shape == (6, 16, 16, 1) and len(np.unique(six, axis=0)) == 6
    for n, batch_size in ((6, 4), (3, 1)):
        assert abs(made(n, batch_size) - six[:n]).max() <= 1  # rounding to grey levels
    assert abs(made(6, 6, seed=1) - six).max() > 1


def test_processes_share_the_images(trained, here):
    flags = ['--ckpt', trained, *'--n 5 --nfe 3 --device cpu'.split()]
    p = torchrun('--', HERE / 'sample.py', *flags, '--out', 'two.npz')
    assert p.wait() == 0, p.stdout.read()
    assert abs(sampled('one.npz', *flags) - np.load('two.npz')['arr_0'].astype(int)).max() <= 1


@pytest.mark.slow
def test_compiled_network_makes_the_same_images(trained, here):
    flags = ['--ckpt', trained, *'--n 5 --nfe 4 --batch_size 4 --no-bf16'.split()]
    assert abs(sampled('a.npz', *flags) - sampled('b.npz', *flags, '--compile')).max() <= 1


@pytest.mark.parametrize('flags, words', [
    ('--exact --n 4', ['4 of 4 samples are images of glyphs to within a grey level']),
    ('--encode glyphs --n 2 --tol 1e-6', [r'mean error \d\.\d+e-(0[4-9]|[1-9])']),
    pytest.param(f'--ckpt {GOLDEN}/ckpt_cifar10_tiny.pth --n 4 --nfe 6', [
        'small_z official', 'tol 0.0001', 'upper_norm 3000', 'z_exp 5'], marks=golden)],
    ids=['of the exact field', 'up and down again', 'of an authors file their way'])
def test_what_is_sampled_is_what_it_should_be(flags, words, trained, few_glyphs, here):
    out = said(['sample.py', '--ckpt', trained, '--device', 'cpu', *flags.split()])
    assert all(re.search(word, out) for word in words), out


# ---------------------------------------------------------------- what the README says

PAGES = 'README.md', 'RESULTS.md'
LINK = r'\[`(\w+)`\]\((\w+\.py)#L(\d+)\)'


def readme_commands():
    """The commands of the README's shell blocks and sentences, then those of RESULTS.md, in order,
    as bash expands them, which finds no others."""
    text = '\n'.join((HERE / page).read_text() for page in PAGES)
    blocks = re.findall(r'```sh\n(.*?)```|`((?:python|torchrun) [^`]*\.py [^`]*)`', text, re.S)
    known = [f'{name}() {{ echo {name} "$@"; }}' for name in ('pip', 'python', 'torchrun')]
    lines = '\n'.join(['PATH=/none', *known, *map(''.join, blocks)])
    shown = subprocess.check_output(['bash', '-efc', lines], text=True)
    return [line.split() for line in shown.splitlines()]


SMALLER = {  # what a test adds to a command with such a word; of a flag given twice the last counts
    'train.py': '--device cpu --no-bf16 --batch_size 8 --log_every 1 --steps 3',
    'sample.py': '--device cpu --no-bf16 --n 4', 'evaluate.py': '--device cpu --no-bf16 --n 4',
    '--init_from': '--steps 10', '--pairs': '--pairs 4', '--exact': '--n 2', 'rk45': '--tol 0.1',
    '--bpd': '--tol 0.1', '--encode': '--tol 0.1', '--compare': '--tol 0.1 --sweep nfe=2,3',
    '--sweep': '--sweep nfe=2,3', '--solver_bench': '--batch_size 4'}


def toy(size, channels):
    """In place of a torchvision data set: digits of its size, nothing downloaded."""
    def known(root, train, download):
        pixels, labels = data.glyphs(image_size=size, split='train' if train else 'test')
        pixels = pixels[:300] if channels == 1 else np.stack([pixels[:300]] * channels, -1)
        return types.SimpleNamespace(data=pixels, targets=labels[:300], classes=[*'0123456789'])
    return known


@pytest.fixture
def newcomer(here, monkeypatch):
    """A folder with the files that the README speaks of; networks, data, Inception made small."""
    tiny = dict(nf=8, num_blocks=1, warmup=2, sample_every=0, field_batch=16)
    way, weight = torch.randn(48, 32, generator=seeded()), torch.randn(1008, 32, dtype=F64)
    small = functools.partial(torch.nn.functional.interpolate, size=(4, 4))
    for target, value in {
            'train.PRESETS': {name: {**row, **tiny} for name, row in train.PRESETS.items()},
            'bench.UNet': functools.partial(unet.UNet, nf=8, ch_mult=(1, 1), num_blocks=1),
            'torchvision.datasets.MNIST': toy(28, 1), 'torchvision.datasets.CIFAR10': toy(32, 3),
            'evaluate.POOL': 32, 'files.POOL': 32,
            'bench.load_inception': lambda *args: (len, weight),
            'bench.features': lambda net, pixels, resize: small(
                pixels.expand(-1, 3, -1, -1).float()).flatten(1) @ way,
            'bench.BENCH_CHARGES': (64, 128), 'bench.JUDGE_STEPS': 2,
            'evaluate.check_counts': lambda *args: None}.items():
        monkeypatch.setattr(target, value)
    os.mkdir('photos')
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)
    for k in range(8):
        Image.fromarray(pixels[k]).save(f'photos/{k}.png')
    shutil.make_archive('images', 'zip', base_dir='photos')
    tiny_official('checkpoint_500000.pth')
    published = dict(pfgmpp=True, D=2048, ncsnpp=True)
    edm_file('training-state-200000.pkl', **published)
    edm_file('conditional.pkl', **published, classes=10)
    edm_file('training-state.pkl', pfgmpp=True, D=128, size=64)
    edm_file('edm-cifar10-32x32-uncond-vp.pkl')
    np.savez('cifar10_stats.npz', mu=np.zeros(32), sigma=np.eye(32))
    for name in ('bold', 'digits'):
        np.savez(f'{name}.npz', arr_0=data.glyphs()[0][:20, ..., None])
    os.mkdir('data')
    np.savez('data/bloodmnist.npz', train_images=pixels[:, 4:, 4:], test_images=pixels[:, 4:, 4:])


@pytest.mark.parametrize('count', [10, pytest.param(1000, marks=pytest.mark.slow)])
def test_readme_commands_in_their_order(newcomer, count):
    """All are parsed, and the first `count` run."""
    commands = readme_commands()
    for k, words in enumerate(commands):
        if words[0] == 'pip':
            assert (HERE / words[words.index('-r') + 1]).exists()
        elif words[1:3] != ['-m', 'pytest']:
            words = words[next(i for i, word in enumerate(words) if word.endswith('.py')):]
            words += ' '.join(SMALLER.get(word, '') for word in words).split()
            SCRIPTS[words[0].removesuffix('.py')].parse_args(words[1:])
            if k < count:
                script(words)
                for flag, path in zip(words, words[1:]):
                    assert flag not in ('--out', '--out_dir') or os.path.exists(path), words
    assert len(commands) > 30
    assert loaded('out/more')['opt']['state'][0]['step'] == 10  # the authors' file, at step 7


def test_readme_links_point_at_their_functions():
    texts = {page: (HERE / page).read_text() for page in PAGES}
    heads = {f'{page}#' + re.sub(r'[^\w -]', '', head).lower().replace(' ', '-')
             for page, text in texts.items() for head in re.findall(r'^##+ (.*)', text, re.M)}
    for name, file, line in re.findall(LINK, ''.join(texts.values())):
        found = (HERE / file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf'(def|class) {name}\b|{name} = ', found), (name, file, line)
    for target in re.findall(r'\]\(([^)]*)\)', ''.join(texts.values())):
        file, _, place = target.partition('#')
        assert target.startswith('https://') or (HERE / file).is_file(), target
        assert not (file.endswith('.md') and place) or target in heads, target
    assert len(texts['README.md'].splitlines()) <= 250


FORK = [  # (what the README links to, what to find from there on, what a fork puts in its place)
    ('SETS', r'\{', "{'ramps': (16, 1, False, '', ''), 'kmnist': (28, 1, False, 'KMNIST', ''),"),
    ('find', r"    if dataset == 'glyphs'", r"""    if dataset == 'ramps':
        return Found(None, np.arange(40 * 256).reshape(40, 16, 16).astype(np.uint8))
\g<0>"""),
    ('UNet', r'class UNet.*?(?=^\S|\Z)', """class UNet(nn.Module):
    def __init__(self, channels, **more):
        super().__init__()
        self.conv = conv(channels, channels, scale=0)
    def forward(self, x, z, labels=None):
        return self.conv(x), 0 * z
"""),
    ('PFGM', r'def target.*?\n', r"""\g<0>        return torch.ones_like(moved), 0 * z
"""),
    ('METHODS', r'\n', """
class Cosine(VP):
    t_train, t_sample, t_max = 1e-3, 1e-3, 0.99
    def z_of(self, t):
        return torch.tan(math.pi / 2 * t)
    def t_of(self, z):
        return torch.atan(z) * 2 / math.pi
    def weight(self, x, z):
        return torch.zeros_like(z)
METHODS['cosine'] = Cosine
"""),
    ('SOLVERS', r'\)\n', """)
def euler_log(f, x, grid, calls):
    for z, z_next in zip(grid[:-1], grid[1:]):
        x = x + column((z_next / z).log(), x) * f(x, like(z, x))
        yield x
SOLVERS['euler_log'] = euler_log
"""),
    ('METRICS', r'\{', """{
    'brightness': Metric('mean of the pixels', 'pixels', 1, lambda made, ref, args, home: [
        (ref.against(made.n), dict(brightness=made.pixels.double().mean().item()))]),"""),
    ('PRESETS', r"    'glyphs':(.*?)'sum'(.*?\n)", r"""\g<0>    'ramps':\g<1>'mean'\g<2>""")]
FORKED = """import torch, torchvision, types, evaluate, sample, train
torchvision.datasets.KMNIST = lambda root, train, download: types.SimpleNamespace(
    data=torch.arange(40 * 784).view(40, 28, 28).byte(), targets=[0] * 40, classes=['a'])
def script(module, words):
    module.main(module.parse_args([*words.split(), '--device', 'cpu', '--no-bf16']))
script(train, '--dataset kmnist --no-skip --steps 1 --out_dir pfgm')
script(train, '--dataset ramps --method cosine --steps 2 --log_every 1')
script(sample, '--solver euler_log --nfe 5 --n 4 --out images')
script(evaluate, '--solver euler_log --nfe 5 --n 4 --brightness')
"""


def test_readme_fork_it(here):
    """What the README says to edit, edited in a copy of the scripts, works together."""
    section = (HERE / 'README.md').read_text().partition('## Fork it')[2].partition('\n## ')[0]
    lines = {name: (file, int(line) - 1) for name, file, line in re.findall(LINK, section)}
    for path in HERE.glob('*.py'):
        shutil.copy(path, '.')
    for name, pattern, new in sorted(FORK, key=lambda edit: -lines[edit[0]][1]):  # from below
        file, line = lines[name]
        text = Path(file).read_text().splitlines(keepends=True)
        tail, count = re.subn(pattern, new, ''.join(text[line:]), count=1, flags=re.S | re.M)
        assert count == 1, name
        Path(file).write_text(''.join(text[:line]) + tail)
    ran = subprocess.run([sys.executable, '-c', FORKED], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    saved = loaded('out')
    assert saved['net'].keys() == {'conv.weight', 'conv.bias'} and saved['args']['loss'] == 'mean'
    close(saved['args']['z_max'], math.tan(0.99 * math.pi / 2), rtol=1e-12)
    # the network begins as 0: half of |v_x|^2 is left, and of an error without weight nothing
    close(losses('pfgm')[0], 784 / 2, rtol=1e-3)
    assert losses('out') == [0.0, 0.0]
    found, = rows_of('out/results.jsonl')
    images = [np.array(Image.open(path)) for path in Path('images').glob('*.png')]
    assert found['solver'] == 'euler_log' and found['nfe'] == 5 and len(images) == 4
    close(found['brightness'], np.mean(images), rtol=1e-12)


# ---------------------------------------------------------------- measuring

def test_frechet_of_gaussians():
    a, b = (torch.rand(6, 6, generator=seeded(i), dtype=F64) for i in (0, 1))
    mu, p, q = torch.arange(6, dtype=F64), a.diagonal(), b.diagonal()
    want = 6 * 2 ** 2 + (p.sqrt() - q.sqrt()).square().sum()
    close(bench.frechet(mu, p.diag(), mu + 2, q.diag()), want, rtol=1e-10)
    a, b = a @ a.T, b[:, :2] @ b[:, :2].T  # b is singular
    want = (a + b).trace() - 2 * linalg.sqrtm((a @ b).numpy()).trace().real
    close(bench.frechet(mu, a, mu, b), want, atol=1e-6)


def test_inception_score_kid_and_precision_recall():
    one_hot = torch.eye(10, dtype=F64).repeat(50, 1) * 1e3
    close(bench.inception_score(one_hot, splits=1)[0], 10.0, rtol=1e-9)
    x, y = (torch.randn(300, 16, generator=seeded(i)) for i in (0, 1))
    mean, std, size = bench.kid(x, y, subsets=20)
    assert size == 300 and abs(mean) < 0.1
    xx, yy, xy = ((u.double() @ v.double().T / 16 + 1) ** 3 for u, v in ((x, x), (y, y), (x, y)))
    off = ~torch.eye(300, dtype=torch.bool)
    close(mean, xx[off].mean() + yy[off].mean() - 2 * xy.mean(), rtol=1e-9)
    assert bench.precision_recall(x, x) == (1.0, 1.0)
    assert bench.precision_recall(x, y + 100) == (0.0, 0.0)


def test_tf1_resize_reads_from_the_corner():
    x = torch.rand(1, 1, 5, 7, generator=seeded(), dtype=F64)
    want = x[0, 0].numpy()
    for axis, length in enumerate(want.shape):
        want = np.apply_along_axis(lambda row: np.interp(
            np.arange(11) * length / 11, range(length), row), axis, want)
    close(bench.resize_tf1(x, 11)[0, 0], want, atol=1e-12)


def test_sliced_wasserstein_of_a_shift():
    x = torch.randint(0, 200, (64, 1, 4, 4), generator=seeded()).to(torch.uint8)
    shifted = bench.sliced_wasserstein(x, x + 20, projections=4000)
    close(shifted, 20 / 127.5, rtol=0.05)  # |shift| / sqrt(N), the rms of its projections
    assert bench.sliced_wasserstein(x, x) == 0


def test_statistics_and_features(here, capsys):
    place = (torch.device('cpu'), 0, 1)
    net, weight = bench.load_inception('random', place[0])
    assert 'the numbers mean nothing' in capsys.readouterr().out and weight.shape == (1008, 2048)
    pixels = torch.randint(0, 256, (5, 1, 8, 8), generator=seeded()).to(torch.uint8)
    got = evaluate.collect(iter(pixels.split(2)), 5, net, 'tf1', {'features', 'pixels'}, place)
    assert torch.equal(got.pixels, pixels) and got.features.std(0).max() > 1e-3
    # once equal to those of torch-fidelity, bit for bit
    close([got.features.mean(), got.features.std()], [0.0900560, 0.1209559], rtol=1e-4)
    close(got.mu, got.features.double().mean(0), rtol=1e-5, atol=1e-5)
    close(got.sigma, got.features.double().T.cov(), atol=1e-5)
    np.savez('a.npz', mu=got.mu, sigma=got.sigma)
    read = files.read_stats('a.npz', 'any')
    assert read.n is None and torch.equal(read.mu, got.mu) and torch.equal(read.sigma, got.sigma)
    np.savez('b.npz', sigma=got.sigma)
    with pytest.raises(ValueError, match='mu None'):
        files.read_stats('b.npz', 'any')


def test_a_judge_tells_digits_from_noise_and_is_kept(few_glyphs, here, monkeypatch):
    monkeypatch.setattr(bench, 'JUDGE_STEPS', 60)
    np.savez('digits.npz', arr_0=data.glyphs(split='test')[0][:130, ..., None])
    np.savez('noise.npz', arr_0=np.random.default_rng(0).integers(
        0, 256, (130, 16, 16, 1), np.uint8))

    def judged(name):
        out = said(f'evaluate.py --judge --samples {name} --dataset glyphs --device cpu '
                   '--data_dir .'.split())
        return rows_of('results.jsonl')[-1], 'judge: 7680/7680' in out, 'cannot be read' in out
    (real, *first), (bad, *second) = judged('digits.npz'), judged('noise.npz')
    assert (first, second) == ([True, False], [False, False])  # trained once
    assert real['judge_fd'] < 3 * real['judge_fd_of_real'] < bad['judge_fd'] / 5
    assert real['judge_precision'] > 0.5 and real['judge_recall'] > 0.1 and not bad['judge_recall']
    kept, = Path().glob('judge-*.pt')
    kept.write_bytes(kept.read_bytes()[:999])
    again, *third = judged('digits.npz')
    assert third == [True, True]
    close(again['judge_fd'], real['judge_fd'], rtol=1e-4)
    refuses('evaluate.py --judge --samples digits.npz --ref noise.npz'.split(),
            '--judge: .* has no labels')
    images, labels = data.glyphs(split='train')
    np.savez('half.npz', train_images=images, train_labels=labels, test_images=images[:200])
    refuses('evaluate.py --judge --samples digits.npz --dataset half.npz'.split(),
            '--judge: the test images of .* have no labels')


def test_lines_of_results_say_what_was_measured_and_made_them(trained, few_glyphs, here):
    common = ['evaluate.py', '--ckpt', trained, *'--device cpu --results r.jsonl --out a.png '
              '--n 4 --swd'.split()]
    changes = ('--no-bf16', '--bf16', '--schedule log', '--no-to_data', '--z_min 0.01', '--seed 3',
               '--solver heun', '--small_z official', '--weights raw', '--solver rk45 --tol 0.1')
    for flags in changes:
        script([*common, '--nfe', 3, *flags.split()])
    script([*common, *'--neighbours --bpd --nfe 2 --tol 1e-3'.split()])
    *rows, of_flow, of_samples = all_rows = rows_of('r.jsonl')
    assert all({'command', 'git', 'torch', 'hardware', 'seconds', 'seed', 'n'} <= row.keys()
               and row['step'] == 10 for row in all_rows)
    same = ('command', 'time', 'seconds', 'swd', 'swd_of_test', 'git')
    told = {json.dumps({k: v for k, v in row.items() if k not in same}) for row in rows}
    assert len(told) == len(rows) == len(changes)
    assert of_flow['round_trip_mean'] < 0.3 and of_flow['nfe'] > 10
    assert of_samples['swd'] > 0 and of_samples['samples_min'] > 0


def images_net(N, h=2.0):
    """The field of the planar density c h / (|x|^2 + h^2)^((N+1)/2): a point charge at (0, -h)."""
    def net(x, z):
        scale = -math.sqrt(N) / (torch.hypot(x.flatten(1).norm(dim=1), z + h) + 5)
        return x * pfgm.column(scale, x), (z + h) * scale
    return net


def test_bits_per_dim_of_a_known_flow():
    """The method of images. Its flow is linear, so every probe gives the divergence itself."""
    net = torch.nn.Identity()
    net.forward = images_net(16, 2.0)
    flow = baselines.Flow(net=net, gamma=5.0, z_exp=0.0, small_z='exact', z_min=1e-3, z_max=50.0,
                          D=1.0, classes=[])
    pixels = torch.randint(0, 256, (6, 1, 4, 4), generator=seeded()).to(torch.uint8)
    args = evaluate.parse_args('--bpd --tol 1e-6 --repeats 2'.split())
    got = evaluate.bits_per_dim(flow, pixels, 6, args, (torch.device('cpu'), 0, 1))
    noise = [torch.rand(1, 4, 4, generator=seeded(launch.step_seed(0, i + repeat * 2 ** 32)),
                        dtype=F64) for repeat in range(2) for i in range(6)]
    x = (pixels.repeat(2, 1, 1, 1) + torch.stack(noise)) / 128 - 1
    up = x * (50 + 2) / (1e-3 + 2)
    logp = pfgm.prior_logp(x, 2 + 1e-3) + pfgm.prior_logp(up, 50.0) - pfgm.prior_logp(up, 52.0)
    each = (7 - logp / math.log(2) / 16).view(2, 6).mean(0)
    close(got['bpd'], each.mean(), atol=1e-4)
    close(got['bpd_se'], each.std() / 6 ** 0.5, atol=1e-4)


# ---------------------------------------------------------------- data sets

def picture(seed=0, side=8):
    """A smooth random RGB image."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def pictures(root, *names, side=8):
    """The folder `root`, with picture(k) in file k."""
    for k, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(k, side).save(root / name)
    return root


def classes_of(folder, *names):
    return pictures(folder, *(f'{name}/{i}.png' for name in names for i in range(8)), side=16)


def written(save, *args, **options):
    """The bytes that it writes to a file."""
    file = io.BytesIO()
    save(file, *args, **options)
    return file.getvalue()


def encoded(image, kind='PNG', **options):
    return written(image.save, kind, **options)


def shows(pixels, image):
    """Whether uint8 (C, H, W) are those of the image."""
    return np.array_equal(pixels.permute(1, 2, 0).squeeze(), image)


def array_set(tmp_path, array, **given):
    np.save(tmp_path / 'a.npy', array)
    return data.load(tmp_path / 'a.npy', **given)


def refused(match, *args, **kwargs):
    """load() ends in one line that begins with a flag."""
    with pytest.raises(data.BadInput, match=rf'^(?=--).*{match}.*\Z'):
        data.load(*args, **kwargs)


@pytest.fixture
def folder(tmp_path):
    return pictures(tmp_path / 'set', *(f'{k}.png' for k in range(10)))


@pytest.mark.parametrize('mode, ending, shown', [
    ('P', 'png', 'RGB'), ('L', 'png', 'L'), ('1', 'png', 'L'), ('LA', 'png', 'L'),
    ('RGBA', 'png', 'RGB'), ('RGB', 'bmp', 'RGB'), ('CMYK', 'jpg', 'RGB'), ('RGB', 'JPEG', 'RGB'),
    ('RGB', 'webp', 'RGB'), ('P', 'gif', 'RGB')])
def test_images_of_any_mode_become_grey_or_rgb(tmp_path, mode, ending, shown):
    picture().convert(mode).save(tmp_path / f'a.{ending}')
    set_ = data.load(tmp_path)
    assert shows(set_[0], Image.open(tmp_path / f'a.{ending}').convert(shown))
    assert set_.flip == (shown == 'RGB') and set_.labels is None and set_.classes is None


RAMP = np.arange(16, dtype=np.uint8).reshape(4, 4) * 17
DEEP, RED = RAMP * np.uint16(257), np.full((4, 4, 3), (255, 0, 0), np.uint8)  # DEEP: of 16 bits
QUARTER_TURN = b'II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0'  # in EXIF


@pytest.mark.parametrize('raw, shown', [
    (encoded(Image.fromarray(DEEP)), RAMP), (encoded(Image.fromarray(DEEP), 'TIFF'), RAMP),
    (b'P5 4 4 65535\n' + DEEP.astype('>u2').tobytes(), RAMP),
    (encoded(Image.new('RGBA', (4, 4))), np.full((4, 4), 255)),
    (encoded(Image.new('LA', (4, 4))), np.full((4, 4), 255)),
    (encoded(Image.fromarray(np.pad(RED, ((0, 0), (3, 3), (0, 0))))), RED),
    (encoded(Image.fromarray(RAMP), exif=QUARTER_TURN), np.rot90(RAMP, -1))
], ids='png_of_16_bits tiff_of_16_bits pgm_of_16_bits transparent clear_grey wide turned'.split())
def test_images_show_all_their_bits_on_white_their_centre_square_upright(tmp_path, raw, shown):
    (tmp_path / 'a.png').write_bytes(raw)
    assert shows(data.load(tmp_path)[0], shown)


@pytest.mark.parametrize('kind', ['folder', 'zip'])
def test_the_unreadable_is_skipped_and_labels_follow(tmp_path, capsys, monkeypatch, kind):
    path, image = tmp_path / 'in' / f'a.{kind}', encoded(picture())
    entries = [(f'{"cat" if k % 2 else "ant"}/{k}.png', encoded(picture(k))) for k in range(6)]
    entries += [  # three that are no images, four broken ones, and all that there is of dogs
        ('a.txt', b''), ('__MACOSX/cat/0.png', image), ('cat/.0.png', image), ('cat/6.png', b''),
        ('cat/bomb.png', encoded(Image.new('L', (64, 64)))), ('cat/half.png', image[:80]),
        ('cat/long.png', image + bytes(100_000)), ('dog/0.png', b'junk')]
    path.parent.mkdir()
    if kind == 'folder':
        zipfile.ZipFile(io.BytesIO(zipped(entries))).extractall(path)
    else:
        path.write_bytes(encrypted(zipped([*entries, ('../evil.png', image),
                                           ('/../evil.png', image), ('cat/locked.png', image)])))
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 64 * 64 - 1)  # over it, but not twice: a warning
    monkeypatch.setattr(files, 'ENTRY_LIMIT', 100_000)
    set_, err = data.load(path, image_size=8), capsys.readouterr().err
    assert f'skipped {"6 of 12" if kind == "zip" else "5 of 11"}' in err and err.count('\n') == 1
    assert set_.classes == ['ant', 'cat', 'dog'] and set_.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert all(map(shows, set_, map(picture, (0, 2, 4, 1, 3, 5)))) and len(set_) == 6
    with pytest.raises(launch.BadInput, match='--classes: 2 labels from 0 to 1, no image of dog;'):
        set_.class_count()
    assert os.listdir(tmp_path) == ['in'] and os.listdir(path.parent) == [path.name]


def test_what_is_no_set_or_too_small_is_refused(folder, tmp_path):
    for name in ('bad/0.png', 'bad/1.png', 'empty/a.txt', 'a.txt'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('')
    picture(0, 6).save(folder / '5.png')
    for name, message in (('empty', 'no images'), ('bad', 'none of 2 images'),
                          ('a.txt', 'is of another kind'),
                          ('absent', 'no such data set.*accepted: glyphs'),
                          ('set', '5.png.* is 6x6; give an --image_size of at most 6')):
        refused(message, tmp_path / name)
    refused('0.png.* is 8x8', folder, image_size=16)
    for given in ({'split': 'valid'}, {'channels': 2}, {'image_size': 0}):
        refused(f'--{list(given)[0]} .*accepted', **given)


@pytest.mark.parametrize('channels', [1, 3, 4])
@pytest.mark.parametrize('kind', ['uint8', 'float16', 'float32', 'float64', 'signed'])
def test_arrays_of_any_layout_and_type_keep_every_pixel(tmp_path, capsys, channels, kind):
    pixels = np.random.default_rng(0).integers(0, 256, (5, channels, 6, 6), dtype=np.uint8)
    pixels.flat[:2] = 0, 255
    pixels[:, 3:] = 255  # opaque
    if kind == 'signed':
        stored = (pixels / 127.5 - 1).astype(np.float32)
    else:
        stored = pixels if kind == 'uint8' else (pixels / 255).astype(kind)
    for array in (stored, np.moveaxis(stored, 1, 3), *[stored[:, 0]] * (channels == 1)):
        set_ = array_set(tmp_path, array)
        assert np.array_equal(set_.pixels, pixels[:, :3]) and set_.pixels.is_contiguous()
    assert capsys.readouterr().out == ''
    assert array_set(tmp_path, stored, image_size=12).pixels.shape[2:] == (12, 12)
    x = data.to_float(set_.pixels)
    assert x.dtype == torch.float32 and (x.min(), x.max()) == (-1, 1)
    assert torch.equal(data.to_uint8(x), set_.pixels)
    assert data.to_uint8(3 * x.sign()).unique().tolist() == [0, 255]


@pytest.mark.parametrize('array, pixels, note', [
    ([[[-1e-7, 0.2], [0.4, 1]]], [0, 51, 102, 255], '1 values up to 1.0e-07 beyond [0, 1] clipped'),
    ([[[-1, -0.6], [0.2, 1.0005]]], [0, 51, 153, 255], 'beyond [-1, 1]'),
    (np.full((9, 2, 2), 15, np.uint8), [15] * 4, 'nearly black, no value above 15 of 255'),
    (np.full((9, 2, 5), 99, np.uint8), [99] * 4, '9 of 9 images cropped to the centre square')])
def test_what_is_done_to_an_array_is_said_in_one_line(tmp_path, capsys, array, pixels, note):
    assert array_set(tmp_path, array)[0].flatten().tolist() == pixels
    out = capsys.readouterr().out
    assert note in out and out.count('\n') == 1


@pytest.mark.parametrize('array, mend', [
    ([[[np.nan]]], 'nan'), ([[[-1.5, 1]]] * 2, '-1.5'), ([[[0, 1.1], [0, 0]]], '1.1'),
    ([[[-0.05, 0], [0, 1]]], 'not in .* scale them'),
    (np.r_[-0.9, np.ones(399)].reshape(1, 20, 20), '0.25 % of them below 0: not in'),
    (np.zeros((2, 4, 4), int), 'int64; give uint8'), (np.zeros((2, 4, 4), object), '[Oo]bject'),
    (np.zeros((0, 4, 4)), 'shape'), (np.zeros((4, 4)), 'shape'),
    (np.zeros((8, 8, 40)), r'moveaxis\(x, -1, 0\)'), (np.zeros((8, 8, 3, 40)), 'moveaxis'),
    (np.zeros((9, 12, 3)), r'one image\? give x\[None\]')])
def test_unusable_arrays_are_refused_with_the_mend(tmp_path, array, mend):
    np.save(tmp_path / 'a.npy', array)
    np.savez(tmp_path / 'a.npz', x=array)
    for name in ('a.npy', 'a.npz'):
        refused(f'{mend}.*; accepted: glyphs', tmp_path / name)


def test_npz_keys_splits_and_labels(tmp_path):
    path, x = tmp_path / 'a.npz', np.zeros((3, 4, 4), np.uint8)
    for arrays, *wanted in (
            (dict(x=x, y=np.arange(3)), [0, 1, 2], [0, 1, 2]), (dict(arr_0=x), None, None),
            (dict(train_images=x, train_labels=[[1]] * 3, test_images=x[:2],
                  test_labels=[[0]] * 2), [1, 1, 1], [0, 0])):
        np.savez(path, **arrays)
        for split, want in zip(('train', 'test'), wanted):
            labels = data.load(path, split=split).labels
            assert labels is want or labels.tolist() == want
    np.savez(path, other=x)
    refused('other', path)
    np.savez(path, x=x, y=np.arange(2))  # refused where they are wanted
    assert data.load(path).labels is None and '(2,) for 3 images' in data.load(path).unlabelled


@pytest.mark.parametrize('size, file, column', [(28, 'dermamnist.npz', 1),
                                                (63, 'dermamnist_64.npz', 2)])  # the next larger
def test_medmnist_is_downloaded_once_and_checked(tmp_path, monkeypatch, size, file, column):
    """A fake archive in the form of theirs, behind a fake server."""
    from torchvision.datasets import utils
    urls, x = [], np.zeros((6, 64, 64, 3), np.uint8)
    packed = written(np.savez_compressed, train_images=x, train_labels=[[0], [1]] * 3,
                     val_images=x[:2], test_images=x[:3] + 9, test_labels=[[0]] * 3)

    def fetch(url, path, **how):
        urls.append(url)
        Path(path).write_bytes(packed)
    monkeypatch.setattr(utils, '_urlretrieve', fetch)
    monkeypatch.setattr(utils, '_get_redirect_url', lambda url, max_hops: url)
    refused(f'corrupted.*fetch by hand {tmp_path}/dermamnist.npz', 'dermamnist', tmp_path, size)
    assert os.listdir(tmp_path) == [f'{file}.part'] and f'/{file}?' in urls[0]
    row = [*data.MEDMNIST['dermamnist']]
    row[column] = utils.calculate_md5(tmp_path / f'{file}.part')
    monkeypatch.setitem(data.MEDMNIST, 'dermamnist', row)
    train_, test = (data.load('dermamnist', tmp_path, size, split=k) for k in ('train', 'test'))
    assert len(urls) == 1 and os.listdir(tmp_path) == [file]  # what was fetched before, found whole
    assert train_.pixels.shape == (6, 3, size, size) and train_.flip and train_.class_count() == 2
    assert test.pixels.shape == (3, 3, size, size) and test.pixels.eq(9).all()


def test_known_sets_are_read_or_said_to_be_fetched_by_hand(tmp_path, monkeypatch):
    def known(root, download, train=True, split=None):  # MNIST, and CelebA of one image
        pixels = torch.zeros(4 if train else 2, 28, 28, dtype=torch.uint8)
        return types.SimpleNamespace(data=pixels, targets=pixels[:, 0, 0] + 1, classes=['a', 'b'],
                                     filename=['1.png'])
    with patch('torchvision.datasets.MNIST', side_effect=urllib.error.URLError('no\nroute')):
        refused(f'--dataset mnist: .*fetch by hand {tmp_path}/MNIST/raw', 'mnist', tmp_path)
    refused(f'--dataset lsun_bedroom: .*by hand {tmp_path}/lsun', 'lsun_bedroom', tmp_path)
    for kind in ('MNIST', 'CelebA'):
        monkeypatch.setattr(f'torchvision.datasets.{kind}', known)
    train_, test = data.load('mnist', tmp_path), data.load('mnist', tmp_path, 32, 3, 'test')
    assert train_.pixels.shape == (4, 1, 28, 28) and test.pixels.shape == (2, 3, 32, 32)
    assert train_.labels.tolist() == [1] * 4 and not test.flip and test.classes == ['a', 'b']
    (tmp_path / 'lsun_bedroom').mkdir(exist_ok=True)
    (tmp_path / 'lsun_bedroom' / 'a.webp').write_text('not an image')
    for limit in (2 << 30, 0):  # a set of that name is not probed first, nor is one that is large
        with patch.object(data, 'MEMORY_LIMIT', limit):
            refused('lsun_bedroom: no image .*can be read', 'lsun_bedroom', tmp_path)
    pictures(tmp_path, 'lsun_bedroom/0/a.webp', 'lsun_bedroom/1/a.webp',
             'celeba/img_align_celeba/0.png', side=64)
    set_ = data.load('lsun_bedroom', tmp_path)
    assert set_.pixels.shape == (2, 3, 256, 256) and set_.labels is None and set_.flip
    face = Image.new('RGB', (178, 218))
    face.paste('white', (19, 39, 159, 179))  # the crop that papers use
    face.save(tmp_path / 'celeba/img_align_celeba/1.png')
    assert shows(data.load('celeba64', tmp_path)[0], Image.new('RGB', (64, 64), 'white'))
    assert all(re.fullmatch('[0-9a-f]{32}', md5) for row in data.MEDMNIST.values()
               for md5 in row[1:])


def test_glyphs_are_the_same_bytes_balanced_and_told_apart():
    images, labels = data.glyphs(500)
    again, _ = data.glyphs.__wrapped__(500)
    assert images.shape == (500, 16, 16) and images.dtype == np.uint8 and (images == again).all()
    assert np.bincount(labels).tolist() == [50] * 10
    assert images.max(axis=(1, 2)).min() > 120 and images[:, 0].max() < 128
    assert len({image.tobytes() for image in images}) == 500 and np.median(images) == 0
    set_, (test, truth) = data.load(), data.glyphs(300, split='test')
    far = torch.cdist(*(torch.as_tensor(x).flatten(1).float() for x in (test, set_.pixels[:2000])))
    assert far.min() > 0 and (set_.labels[far.argmin(1)].numpy() == truth).mean() > 0.95
    assert set_.pixels.shape == (10_000, 1, 16, 16) and 5 < data.mean_norm(set_) < 16
    assert set_.classes == list('0123456789') and not set_.flip


@pytest.mark.parametrize('source', ['set', 'a.zip', 'a.npy'])
@pytest.mark.parametrize('workers', [0, 2])
def test_a_set_beyond_memory_serves_the_same(folder, tmp_path, monkeypatch, source, workers):
    np.save(tmp_path / 'a.npy', [np.asarray(picture(k)) for k in range(10)])
    (tmp_path / 'a.zip').write_bytes(zipped((file.name, file.read_bytes())
                                            for file in folder.iterdir()))
    small = data.load(tmp_path / source)
    monkeypatch.setattr(data, 'MEMORY_LIMIT', 0)
    large = data.load(tmp_path / source)
    assert small.pixels.shape == (10, 3, 8, 8) and large.pixels is None
    assert torch.equal(torch.stack(list(large)), small.pixels)  # plain iteration ends
    norms, state = data.to_float(small.pixels).flatten(1).norm(dim=1), torch.get_rng_state()
    indices = [torch.randint(10, (4,), generator=seeded(k)) for k in range(6)]
    for set_ in (small, large):
        served = data.batches(set_, indices, workers=workers)
        for batch, index in zip(served, indices, strict=True):
            assert torch.equal(batch, small.pixels[index])
        close([data.mean_norm(set_), data.mean_norm(set_, n=5)],
              [norms.mean(), norms[::2].mean()], rtol=1e-6)
    assert (torch.get_rng_state() == state).all()


@pytest.mark.parametrize('workers', [0, 1])
def test_large_sets_pass_over_what_cannot_be_read(folder, monkeypatch, capfd, workers):
    monkeypatch.setattr(data, 'MEMORY_LIMIT', 0)
    (folder / '9.png').write_text('broken')
    large = data.load(folder)
    batch, = data.batches(large, [torch.tensor([9, 9, 0])], workers=workers)
    assert torch.equal(batch[0], batch[2])
    assert len(capfd.readouterr().err.splitlines()) == 1
    picture(0, 4).save(folder / '9.png')
    with pytest.raises(data.BadInput, match='^--dataset .*9.png.* is 4x4') as caught:
        list(data.batches(large, [torch.tensor([9])], workers=workers))
    assert '\n' not in str(caught.value)


# What people have, and the labels of the images to train on and of those for tests.
WITH_SPLITS = {
    'train/cat train/dog val/dog': ('01', '1'),
    'train/cat train/dog valid/dog test/cat': ('01', '0'),
    'training_set/cat training_set/dog testing/dog': ('01', '1'),
    'Train2017/cat Train2017/dog VAL2017/dog': ('01', '1'),
    'seg_train/cat seg_train/dog seg_test/dog seg_pred': ('01', '1'),
    'cat/train dog/train dog/test cat/test': ('01', '01'),
    'images/train/cat images/train/dog images/dev/dog masks/train/cat': ('01', '1'),
    'train/cat train/dog test/dog test/cow': ('01', None),
    'train/cat train/dog test': ('01', None),
    'train/cat train/dog stray.png': ('01', '01')}
LAYOUTS = WITH_SPLITS | {
    'cat dog': ('01', '01'), 'train plane car': ('012', '012'),
    'cat dog a.png': (None, None), 'cat': (None, None),
    '00000/img00000000.png 00001/img00001000.png': (None, None)}


@pytest.mark.parametrize('names', LAYOUTS)
def test_splits_and_what_holds_all_are_no_classes(tmp_path, capsys, names):
    files = [name if name.endswith('.png') else f'{name}/0.png' for name in names.split()]
    paths = [pictures(tmp_path / 'set', *(f'top/{file}' for file in files))]
    for top, apart in (('top/', '/'), ('./', '/'), ('top\\', '\\')):
        paths.append(tmp_path / f'{len(paths)}.zip')
        paths[-1].write_bytes(zipped((top + file.replace('/', apart), encoded(picture(k)))
                                     for k, file in enumerate(files)))
    for split, labels in zip(('train', 'test'), LAYOUTS[names]):
        sets = [data.load(path, split=split) for path in paths]
        for set_ in sets:
            assert set_.identity == sets[0].identity and labels == (
                set_.labels if set_.labels is None else ''.join(map(str, set_.labels.tolist())))
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == (4 if split == 'test' or names in WITH_SPLITS else 0)
        assert all('split' in line for line in lines)
    assert 'seg' not in names or 'without 1 images beside seg_test, seg_train' in lines[0]


FIRST, SECOND = '00000/img00000000.png', '00001/img00001000.png'


@pytest.mark.parametrize('table, labels', [
    ({FIRST: 1, SECOND: 0}, [1, 0]), ({FIRST: 'dog', SECOND: 'cat'}, [1, 0]),
    (None, 'null'), ('no', 'cannot be read'), ({'a.png': 1}, 'no labels'),
    ({FIRST: 1}, 'no label for 1 of 2'), ({FIRST: .5, SECOND: 0}, 'float64 labels'),
    ({FIRST: [0, 1], SECOND: [1, 0]}, 'one-hot: give their argmax'),
    ({FIRST: [1, 1], SECOND: [1, 0]}, 'several an image')])
def test_labels_of_dataset_json(tmp_path, table, labels):
    table = [*table.items()] if isinstance(table, dict) else table
    entries = [(FIRST, encoded(picture())), (SECOND, encoded(picture(1))),
               ('dataset.json', json.dumps({'labels': table}).encode())]
    for path, top in ((tmp_path / 'b.zip', ''), (tmp_path / 'a.zip', 'set/')):
        path.write_bytes(zipped((top + name, raw) for name, raw in entries))
        set_ = data.load(path)
        found = set_.labels if set_.labels is None else set_.labels.tolist()
        assert len(set_) == 2 and (found == labels or found is None and labels in set_.unlabelled)
    if isinstance(labels, str):  # they refuse the set only where they are wanted
        refuses(['train.py', *TINY, '--classes', '--dataset', tmp_path / 'a.zip',
                 '--out_dir', tmp_path / 'o'], f'--classes: .*a.zip has .*{labels}')


def test_links_are_followed_and_loops_cut(tmp_path):
    pictures(tmp_path, 'store/cat/0.png', 'store/dog/0.png', 'set/fox/0.png')
    for name, target in {
            'set/cat': '../store/cat', 'set/dog': tmp_path / 'store/dog', 'set/loop': '.',
            'set/up': '..', 'set/root': '/', 'set/gone': 'nowhere', 'set/fox/up': '..',
            'set/fox/1.png': '../../store/cat/0.png',
            'store/cat/dog': '../dog', 'store/dog/cat': '../cat'}.items():  # round and round
        (tmp_path / name).symlink_to(target)
    set_ = data.load(tmp_path / 'set')
    assert set_.classes == ['cat', 'dog', 'fox'] and {*set_.labels.tolist()} == {0, 1, 2}
    assert len(set_) < 8


@pytest.mark.parametrize('limit', [2 << 30, 0])
def test_one_coloured_image_of_many_makes_a_coloured_set(tmp_path, capsys, monkeypatch, limit):
    monkeypatch.setattr(data, 'MEMORY_LIMIT', limit)
    for k in range(200):  # 64 of these are looked at first
        Image.new('RGB', (8, 12) if k % 50 == 0 else (8, 8),
                  (200, 30, 30) if k == 101 else (90, 90, 90)).save(tmp_path / f'{k:03d}.png')
    assert data.load(tmp_path).channels == 3
    assert ('4 of 200' in capsys.readouterr().out) == bool(limit)
    grey = torch.stack(list(data.load(tmp_path, channels=1, image_size=4)))
    assert grey.shape == (200, 1, 4, 4) and grey.unique().tolist() == [81, 90]
    out = capsys.readouterr().out  # what is lost is said: of a large set, of the 64
    assert 'resized to 4 x 4' in out and bool(limit) == ('1 of 200 images coloured' in out)


@pytest.mark.parametrize('fault, refusal, message', [  # to share_memory_(), in the reader
    (lambda: os.kill(os.getpid(), signal.SIGKILL), data.BadInput, '--workers 0.*shm-size'),
    (ZeroDivisionError('as raised'), ZeroDivisionError, 'as raised'),
    (RuntimeError('unable to allocate shared memory(shm) for file </torch_1>: No space left on '
                  'device (28)'), data.BadInput, '^--workers: .*No space left.*--workers 0')])
def test_a_reader_that_dies_ends_in_one_line(folder, monkeypatch, fault, refusal, message):
    monkeypatch.setattr(data, 'MEMORY_LIMIT', 0)
    large = data.load(folder)
    with patch.object(torch.Tensor, 'share_memory_', side_effect=fault):
        with pytest.raises(refusal, match=message):
            list(data.batches(large, [torch.tensor([1])], workers=1))
        assert len(list(data.batches(large, [torch.tensor([1])]))) == 1


def test_a_run_that_ends_does_not_wait_for_its_readers():
    heard = launch.listen()
    child = os.fork()
    if child == 0:  # as a reader of images: it holds all that is open
        time.sleep(60)
        os._exit(0)
    began = time.time()
    launch.AT_THE_END.close()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert time.time() - began < 30 and heard == []


def test_classes_by_name_and_data_that_moved(tmp_path):
    photos = classes_of(tmp_path / 'photos', '2', '10', 'cat')
    run_ = ['train.py', *TINY_PP, '--D', 2, '--classes', '--out_dir', tmp_path / 'o', '--steps']
    assert 'in 3 classes (2, 10, cat)' in said([*run_, 2, '--dataset', photos])
    of = ['sample.py', '--ckpt', tmp_path / 'o', '--nfe', 2, '--n', 3, '--device', 'cpu',
          '--out', tmp_path / 'a.png', '--classes']  # the checkpoint is given by its folder
    for classes, labels in (('cat,2', '[2, 0]'), ('10', '[1]'), ('none', '[]')):
        assert f'classes {labels}' in said([*of, classes])
    refuses([*of, '0'], '--classes 0: the network knows .*2, 10, cat')
    photos = photos.rename(tmp_path / 'moved')
    script([*run_, 3, '--dataset', f'{photos}/'])
    picture(0, 16).save(photos / 'cat' / '99.png')
    refuses([*run_, 4, '--dataset', photos],
            'holds a run on .*--init_from .*ckpt.pt .*24 images there, 25 here')
    (photos / 'cat' / '99.png').unlink()
    (photos / 'cat').rename(photos / 'cow')
    refuses([*run_, 4, '--dataset', photos], 'classes 2, 10, cat there, 2, 10, cow here')
    (photos / 'cow').rename(photos / 'cat')
    saved = loaded(tmp_path / 'o')
    del saved['args']['data'], saved['args']['class_names']  # a file of before: the path counts
    torch.save(saved, tmp_path / 'o' / 'ckpt.pt')
    refuses([*run_, 4, '--dataset', photos], 'numbered in natural order now')
    refuses([*run_, 4, '--dataset', photos / '2'],
            '--dataset .*2: --out_dir .*o holds a run on .*moved/; give another')


def test_a_new_label_layer_begins_as_no_label_wherever_it_joins():
    x, z = torch.randn(2, 1, 8, 8, generator=seeded()), torch.tensor([1.0, 2.0])
    for first in (False, True):
        def net(classes):
            return unet.UNet(8, 1, 8, (1, 2), 1, (), 0.0, classes, label_first=first).eval()
        old = net(2)
        for p in old.parameters():  # biases and last layers too
            p.data = torch.randn(p.shape, generator=seeded()) / 4
        saved = dict(net=old.state_dict(), ema=old.state_dict(), args=dict(label_first=first))
        for classes in (0, 3):
            new = net(classes)
            new.load_state_dict(checkpoint.for_classes(saved, classes)['ema'])
            label = [torch.tensor([2, 0])] if classes else []
            for got, want in zip(new(x, z, *label), old(x, z)):
                close(got, want, atol=1e-5, rtol=1e-5)


def test_init_from_brings_its_flow_and_takes_other_classes(tmp_path):
    two = classes_of(tmp_path / 'two', 'a', 'b')
    three = classes_of(tmp_path / 'three', 'a', 'b', 'c')
    base = ['train.py', *TINY_PP, '--steps', 3, '--out_dir']
    script([*base, tmp_path / 'o', '--dataset', two, '--D', 64, '--sigma_data', 0.4, '--classes'])
    again = ['--init_from', tmp_path / 'o', '--dataset']
    assert ('for 3 classes, not its 2, with a new label layer and from step 0'
            in said([*base, tmp_path / 'p', *again, three, '--classes']))
    old, args = (loaded(tmp_path / name)['args'] for name in 'op')
    assert args['classes'] == 3 and all(
        args[key] == old[key] for key in ('method', 'D', 'sigma_data', 'z_max', 'z_min'))
    assert '--D 2.0 (it has 64.0)' in said([*base, tmp_path / 'q', *again, two, '--classes',
                                            '--D', 2, '--steps', 4])
    for flag, value, has in (('channels', 1, '3'), ('image_size', 8, '16'),
                             ('method', 'vp', 'pfgmpp')):
        refuses([*base, tmp_path / 'x', *again, two, f'--{flag}', value],
                f'--{flag} {value}: --init_from .*ckpt.pt has {has}')
    script(['checkpoint.py', tmp_path / 'o', '--out', tmp_path / 'ema.pt'])
    refuses([*base, tmp_path / 'x', '--init_from', tmp_path / 'ema.pt', '--dataset', two],
            '--init_from .*ema.pt: holds the EMA')


@pytest.mark.parametrize('solver, value', [
    ('rk45', math.nan), ('rk45', math.inf), ('unipc', math.inf), ('heun', math.nan),
    ('ddim', math.nan)])
def test_a_network_that_gives_nan_makes_nothing(copied, monkeypatch, solver, value):
    monkeypatch.chdir(copied)
    saved = loaded('.')
    saved['ema']['conv_out.bias'][:] = value
    if solver == 'ddim':
        saved['args'].update(method='vp', D=math.inf)
    torch.save(saved, 'ckpt.pt')
    how = ['--ckpt', 'ckpt.pt', '--solver', solver, '--device', 'cpu', '--n', 2]
    for more in ([], ['--encode', 'glyphs'], ['--gif'], ['--interpolate']):
        refuses(['sample.py', *how, '--out', 'a.png', *more], '--ckpt.*(diverged|not finite)')
    refuses(['evaluate.py', *how, '--swd', '--bpd'], 'diverged')
    refuses(['sample.py', *how, '--tol', '1e-12'], '--tol 1e-12: finer than the float32')
    assert not [name for name in os.listdir('.')
                if name.endswith(('.png', '.gif', '.npz', 'results.jsonl'))]


def test_pictures_that_are_given_come_back_and_are_the_ends_of_a_row(trained, tmp_path):
    digits, (first, last) = data.load()[:2, 0].numpy(), (tmp_path / '0.png', tmp_path / '1.png')
    for path, digit in zip((first, last), digits):
        Image.fromarray(digit).save(path)
    how = ['--ckpt', trained / 'ckpt.pt', '--tol', '1e-6']
    alone = ['sample.py', *how, '--device', 'cpu', '--out', tmp_path / 'a.png']
    assert '1 images: mean error' in said([*alone, '--encode', first])
    made = sampled(tmp_path / 'b.npz', *how, '--interpolate', first, last)[..., 0]
    assert len(made) == 8  # z_min is not the plane of the data, but near it
    assert (abs(made[[0, -1]] - digits).mean((1, 2)) < 2).all()
    refuses([*alone, '--interpolate', first], '--interpolate .*0.png: give two')
    refuses([*alone, '--encode', tmp_path / 'no.png'], '^--encode .*no.png: no such')


def test_restored_images_keep_what_is_known_and_are_images_that_fit(tmp_path, monkeypatch):
    """On the exact field, whose samples are its charges: of each known part two of them."""
    monkeypatch.chdir(tmp_path)
    x = torch.randint(60, 196, (24, 8, 8, 1), generator=seeded()).expand(-1, -1, -1, 3).clone()
    x[12:] = x[:12]
    x[12:, 6:] = x[12:, 6:].flip(0)                                 # another image's two rows below
    tint = torch.randint(-25, 26, (24, 8, 8, 3), generator=seeded(1))
    tinted = x[:12].repeat(2, 1, 1, 1) + tint - tint.roll(1, 3)     # of mean 0
    mask = Image.new('L', (8, 8))
    mask.save('none.png')
    mask.paste(255, (0, 6, 8, 8))
    mask.save('mask.png')
    exact = ['sample.py', '--exact', '--device', 'cpu', '--dataset', 'x.npy']
    for charges, words in ((x, '--inpaint x.npy --mask mask.png'), (tinted, '--colorize x.npy')):
        np.save('x.npy', charges.to(torch.uint8).numpy())
        script([*exact, *words.split(), '--nfe', 40, '--z_min', 1e-3, '--n', 16, '--out', 'a.png'])
        grid = torch.from_numpy(np.array(Image.open('a.png'))).int()[4:, 4:]  # of 8 x 18 images
        for i, row in enumerate(grid.view(8, 68, 18, 68, 3)[:, :64:8, :, :64:8].transpose(1, 2)):
            fits = charges[[i, i + 12]]                           # the first is the image itself
            error = (row[:, None] - fits).abs().amax((2, 3, 4))   # (18, 2)
            assert error[0, 0] == 0 and (error[2:].amin(1) <= 1).all(), (words, i)
            assert len(error[2:].argmin(1).unique()) == 2, (words, i)
    for words, message in (
            ('--dataset glyphs --colorize glyphs', 'glyphs: the images .* are grey'),
            ('--colorize x.npy --solver rk45', '--solver rk45'),
            ('--colorize x.npy --mask mask.png', '--inpaint and --mask belong together'),
            ('--inpaint x.npy --mask none.png', '--mask none.png: nothing in it is white')):
        refuses([*exact, *words.split()], message)


def test_references_of_others(tmp_path):
    rng, results = np.random.default_rng(0), tmp_path / 'r.jsonl'
    adm, song, ours, wide = (tmp_path / k for k in ('adm.npz', 'song.npz', 's.npy', 'wide.png'))
    x = rng.integers(0, 256, (6, 8, 8, 3), np.uint8)
    features = rng.standard_normal((9, files.POOL)).astype(np.float32)
    np.savez(adm, arr_0=x, mu=np.zeros(files.POOL), sigma=np.eye(files.POOL), mu_s=np.zeros(3))
    np.savez(song, pool_3=features)
    np.save(ours, x)
    Image.new('RGB', (9, 12), (9, 99, 200)).save(wide)
    found = files.read_stats(str(song), 'any')
    close(found.mu, features.mean(0), atol=1e-5)
    close(found.sigma, np.cov(features.astype(float).T), atol=1e-5)
    common = ['evaluate.py', '--inception', 'random', '--device', 'cpu', '--results', results,
              '--workers', 0, '--samples']
    script([*common, ours, '--ref', adm, '--prc', '--swd'])
    row = rows_of(results)[-1]
    assert row['precision'] == row['recall'] == 1 and row['swd'] == 0
    script([*common, ours, '--ref', song, '--kid'])
    refuses([*common, ours, '--ref', song, '--swd'], 'do for --fid --is --kid --prc only')
    refuses([*common, wide, '--ref', ours, '--swd', '--image_size', 16],
            "--samples .*wide.png: 'wide.png' is 9x12; give an --image_size of at most 9, not 16")


# ---------------------------------------------------------------- hostile input
# Each case is one file, folder or flag that a stranger made: it is used rightly or refused in one
# line. The default suite takes the first cases of each generator; `pytest -m slow` takes more.

def mutated(raw, rng):
    """The bytes with one kind of damage."""
    raw, at, size = bytearray(raw), int(rng.integers(len(raw))), int(rng.integers(1, 64))
    kind = rng.integers(4)
    if kind < 2:
        del raw[at:at + size if kind else None]
    elif kind == 2:
        raw[at:at + 4] = b'\xff\xff\xff\x7f'
    else:  # most readers look hardest at the beginning and the end
        for k in rng.integers(min(len(raw), 100), size=size % 8 + 1):
            raw[k * (-1) ** (size % 2)] ^= 1 << int(rng.integers(8))
    return bytes(raw)


def zipped(entries, packing=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', packing) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return file.getvalue()


CENTRAL, LOCAL = b'PK\x01\x02', b'PK\x03\x04'  # begin the two headers of a zip's entry


def patched(raw, signature, offset, layout, value):
    """A zip's bytes with a field of its last header of that kind overwritten."""
    raw = bytearray(raw)
    struct.pack_into(layout, raw, raw.rindex(signature) + offset, value)
    return bytes(raw)


def encrypted(raw):
    """A zip whose last entry says that it is."""
    return patched(patched(raw, CENTRAL, 8, '<H', 1), LOCAL, 6, '<H', 1)


def claims(shape, descr='|u1'):
    """A .npy that says so, and 64 bytes of pixels."""
    text = f'{ {"descr": descr, "fortran_order": False, "shape": shape} }\n'.encode()
    return b'\x93NUMPY\1\0' + struct.pack('<H', len(text)) + text + bytes(64)


def png_of(width, height):
    """A PNG that says that it is of that size."""
    raw = bytearray(encoded(picture()))
    struct.pack_into('>II', raw, 16, width, height)
    struct.pack_into('>I', raw, 29, zlib.crc32(raw[12:29]))
    return bytes(raw)


def hostile_files():
    """({name: bytes} that are used, those that are refused): images, zips and arrays that lie, or
    are odd."""
    whole, grey = encoded(picture()), written(np.save, np.zeros((3, 8, 8), np.uint8))
    one, npz = zipped([('a.png', whole)]), zipped([('x.npy', grey)])
    nan = Image.fromarray(np.full((8, 8), np.nan, np.float32))
    used = {
        'one.png': encoded(picture(0, 1)), 'long.png': encoded(Image.new('L', (30000, 1), 7)),
        'alpha.png': encoded(picture().convert('P'), transparency=bytes(range(256))),
        'jpeg.png': encoded(picture(), 'JPEG'), 'good.zip': one, 'good.npz': npz,
        'film.gif': encoded(picture(), 'GIF', save_all=True, append_images=[picture(2)]),
        'g4.tiff': encoded(picture().convert('1'), 'TIFF', compression='group4'),
        'up.zip': zipped([('../a.png', b''), ('/etc/a.png', whole), ('b/../../c.png', b'')]),
        # labels that nobody asked for never refuse a set
        **{f'{kind}.npz': written(np.savez, x=np.zeros((3, 8, 8), np.uint8), y=labels)
           for kind, labels in (('objects', np.array([{}, 1, 2])), ('words', list('abc')))}}
    refused = {
        'half.png': whole[:80], 'zero.png': png_of(0, 0), 'bomb.png': png_of(60000, 60000),
        'a\nb.png': b'two\nlines', 'wide.png': png_of(2 ** 31 - 1, 1), 'zip.png': one,
        'nan.tif': encoded(nan, 'TIFF'), 'eps.png': b'%!PS-Adobe-3.0 EPSF-3.0\n(x) (w) file\n',
        'nested.zip': zipped([('b.zip', one)]), 'none.zip': zipped([]), 'tail.zip': one[:-40],
        'secret.zip': encrypted(one), 'bz.zip': zipped([('a.png', whole)], zipfile.ZIP_BZIP2),
        'lying.zip': patched(zipped([('a.png', bytes(2 ** 24))]), CENTRAL, 24, '<I', 100),
        'huge.zip': patched(one, CENTRAL, 24, '<I', 2 ** 31), 'half.npy': grey[:150],
        'crc.zip': patched(one, CENTRAL, 16, '<I', 1),
        'crc.npz': patched(npz, CENTRAL, 16, '<I', 1),
        'liar.npz': zipped([('x.npy', claims((10 ** 12, 32, 32)))]),
        'pickle.npy': pickle.dumps(Payload()), 'payload.npy': written(np.save, [[[Payload()]]]),
        **{f'claim{k}.npy': claims(*claim) for k, claim in enumerate([
            ((10 ** 12, 32, 32),), ((-1, 8, 8),), (None,), ((1,) * 40,), ((1, 2, 2), '|O'),
            ((1, 2, 2), '<c8'), ((1, 2, 2), '|V1000000000'), ((1, 2, 2), '__import__("os")')])}}
    return used, refused


@contextlib.contextmanager
def limited(seconds, gib):
    """An end to what takes for ever, or memory without bound; and no warnings."""
    now = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(  # past every `except Exception`
        signal.SIGALRM, lambda *_: pytest.fail('too slow'))
    resource.setrlimit(resource.RLIMIT_AS, (now + int(gib * 2 ** 30), before[1]))
    signal.alarm(seconds)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def used(path):
    """Whether the set is used, rather than refused in one line."""
    try:
        with limited(20, 3):
            set_ = data.load(path)
    except data.BadInput as error:
        assert re.fullmatch(f'--dataset {re.escape(" ".join(str(path).split()))}: .*', str(error))
        return False
    finally:
        for archive in files.ZIPS.values():
            archive.close()
        files.ZIPS.clear()
    side = set_.image_size
    assert len(set_) > 0 and set_.pixels.shape == (len(set_), set_.channels, side, side)
    assert set_.pixels.dtype == torch.uint8 and set_.channels in (1, 3)
    assert set_.labels is None or set_.labels.shape == (len(set_),)
    return True


@pytest.mark.parametrize('count', [100, pytest.param(1500, marks=pytest.mark.slow)])
def test_hostile_data_are_used_rightly_or_refused_in_one_line(tmp_path, capsys, monkeypatch, count):
    """Each kind there is, what is no file alone and beside an image, then `count` damaged ones."""
    monkeypatch.chdir(tmp_path)
    rng, (good, bad) = np.random.default_rng(0), hostile_files()
    cases = [(name, raw, raw is good.get(name)) for name, raw in {**good, **bad}.items()]
    cases += [(kind, None, beside) for beside in (False, True)  # links to nothing, themselves, ...
              for kind in ('folder', 'pipe', 'absent', 'a.png', '/dev/zero', '..')]
    damaged = map(str, rng.choice([*good], count))
    cases += [(name, mutated(good[name], rng), None) for name in damaged]
    for k, (name, raw, want) in enumerate(cases):
        folder = tmp_path / str(k)
        folder.mkdir()
        if raw is not None:
            (folder / name).write_bytes(raw)
        elif want:
            picture().save(folder / 'good.png')
        if name == 'folder':
            (folder / 'a.png').mkdir()
        elif name == 'pipe':
            os.mkfifo(folder / 'a.png')
        elif raw is None:
            (folder / 'a.png').symlink_to(name)
        found = used(folder / name if name[-4:] in ('.zip', '.npy', '.npz') else folder)
        assert want in (found, None), name
        assert len(capsys.readouterr().err.splitlines()) <= 1, name
    assert len(os.listdir(tmp_path)) == len(cases)  # nothing ran, nothing was written


@pytest.mark.slow
@pytest.mark.parametrize('path, name', [('a.zip', 'a.png'), ('a.npz', 'x.npy')])
@pytest.mark.parametrize('packing', [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_bombs_take_no_memory(tmp_path, path, name, packing):
    """An entry of 640 MB of zeros, and the same zip, which says that it has 100 bytes."""
    path = tmp_path / path
    with zipfile.ZipFile(path, 'w', packing) as archive, archive.open(name, 'w') as file:
        file.write(claims((40 << 18, 8, 8))[:-64] if name == 'x.npy' else b'')
        for _ in range(40):
            file.write(bytes(2 ** 24))
    raw = path.read_bytes()
    for bomb in (raw, patched(raw, CENTRAL, 24, '<I', 100)):
        path.write_bytes(bomb)
        with limited(60, 0.5), pytest.raises(data.BadInput) as refusal:
            data.load(path)
        assert not re.search('MemoryError|allocate', str(refusal.value))


# ---------------------------------------------------------------- checkpoints of strangers

@pytest.mark.parametrize('count', [40, pytest.param(500, marks=pytest.mark.slow)])
def test_damaged_checkpoints_end_in_one_line(trained, tmp_path, monkeypatch, count):
    """Or give the weights that they had; also under new checksums, and packed ones never."""
    monkeypatch.chdir(tmp_path)
    tiny_official('official.pth')
    rng, paths = np.random.default_rng(0), [trained / 'ckpt.pt', Path('official.pth')]
    known = [checkpoint.load_checkpoint(path)[0].state_dict() for path in paths]
    for k in range(count):
        raw, sealed, packed = paths[k % 2].read_bytes(), k % 4 > 1, k % 8 > 5
        if sealed:
            with zipfile.ZipFile(io.BytesIO(raw)) as archive:
                entries = [[name, archive.read(name)] for name in archive.namelist()]
            part = entries[rng.integers(len(entries))]
            part[1] = part[1] if packed else mutated(part[1] or b'0', rng)
            raw = zipped(entries, zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED)
        Path('a.pt').write_bytes(raw if sealed else mutated(raw, rng))
        try:
            with limited(20, 2):
                net, args = checkpoint.load_checkpoint('a.pt')
            assert not packed and (sealed or same(net.state_dict(), known[k % 2]))
            assert {*checkpoint.ARCHITECTURE} <= args.keys()
        except data.BadInput as error:
            assert re.match('--ckpt a.pt', str(error)) and len(str(error)) < 1000
    assert sorted(os.listdir('.')) == ['a.pt', 'official.pth']


RUBBISH = [  # where, and what is there, of a checkpoint of ours
    ('opt', {}), ('opt', [1]), ('opt', {'state': {0: 5}, 'param_groups': []}), ('rng', 5),
    ('rng', [[torch.zeros(3)]]), ('opt state 0 exp_avg', torch.zeros(3)), ('net', [1]),
    ('opt state 0 step', torch.tensor(-1.)), ('step', 1.5), ('step', -1), ('args', None),
    ('args nf', 10 ** 30), ('args nf', '8'), ('args ch_mult', [10 ** 9]), ('args classes', 2 ** 31),
    ('args z_min', math.nan), ('args z_max', 0), ('args gamma', 'x'), ('args D', 0),
    ('args method', []), ('args image_size', 10 ** 6), ('ema', {'a\nb': torch.zeros(3)}),
    *(('ema conv_in.bias', value) for value in (
        None, 5, torch.zeros(8).half(), torch.zeros(8).to_sparse(), torch.zeros(8, device='meta'),
        torch.zeros(1).expand(8), torch.zeros(1).expand(10 ** 12), torch.zeros(1, 8)))]


@pytest.mark.parametrize('where, value', RUBBISH)
def test_rubbish_in_a_checkpoint_ends_in_one_line(copied, where, value):
    saved = inside = loaded(copied)
    *path, key = (int(word) if word.isdigit() else word for word in where.split())
    for word in path:
        inside = inside[word]
    inside[key] = value
    torch.save(saved, copied / 'ckpt.pt')
    command = ['sample.py', '--ckpt', copied / 'ckpt.pt', '--device', 'cpu']
    if where[:3] in ('opt', 'rng'):  # of which training alone has use
        command = ['train.py', *TINY, '--dropout', 0.1, '--steps', 12, '--out_dir', copied]
    with limited(60, 2):
        refuses(command, 'damaged|no usable architecture|not the architecture|not a checkpoint')


# ---------------------------------------------------------------- the files of EDM and PFGM++

GOLDEN_EDM = HERE.parent / 'shared' / 'golden_edm'
golden_edm = pytest.mark.skipif(not GOLDEN_EDM.is_dir(), reason='no ../shared/golden_edm: the '
                                'files and numbers of EDM and PFGM++ are not here')
EDM_FILES = ('edm-cifar10-32x32-uncond-vp/network-snapshot-200000.pkl',
             'pfgmpp-cifar10_ncsnpp_D_2048_conditional/training-state-200000.pkl',
             'pfgmpp-cifar10_ncsnpp_D_2048_conditional-pt/training-state-200000.pt')


@golden_edm
@pytest.mark.parametrize('file', EDM_FILES)
@torch.no_grad()
def test_published_denoisers_give_the_authors_numbers(file):
    net, args = checkpoint.load_checkpoint(GOLDEN_EDM / file)
    ref, made = ({k: torch.from_numpy(v) for k, v in np.load(path).items() if 'trace' not in k}
                 for path in map((GOLDEN_EDM / file).with_name, ('golden.npz', 'sampler.npz')))
    labels, embedded = [ref['labels']] if 'labels' in ref else [], []
    x, sigma = ref['x'].double(), ref['sigma'].double()
    assert args['D'] == (2048 if labels else math.inf) and args['classes'] == 10 * len(labels)
    with net.net.embed[1].register_forward_hook(lambda *a: embedded.append(a[2])):
        c_in = ref['c_in'].view(-1, 1, 1, 1)
        close(net.net(c_in * ref['x'], ref['c_noise'], *labels)[0], ref['F'], atol=2e-4)
    close(F.silu(embedded[0]), ref['emb'], atol=1e-4)
    for kinds, key in [(labels, 'D'), ([], 'D_nolabel' if labels else 'D')]:
        v_x, v_z = net(x, sigma * pfgm.unit(args['D']), *kinds)
        close(v_x + x, ref[key], atol=1e-4)
        close(v_z, -sigma * pfgm.unit(args['D']))
    out, calls = pfgm.sample_ode(
        net, made['latents'].double() * (1 if labels else 80), args['z_max'], args['z_min'],
        'heun', 35, D=args['D'], z_exp=0, labels=made.get('labels'), schedule_name='rho7',
        to_data=True)
    close(out, made['x_final'], atol=1e-4)
    c_in = (sigma.square() + 0.25).rsqrt().view(-1, 1, 1, 1)
    close(net.double().net(c_in * x, sigma.log() / 4, *labels)[0], ref['F64'], atol=1e-6)


persistence = types.ModuleType('torch_utils.persistence')  # EDM's, of which a pickle has the name
exec('def _reconstruct_persistent_obj(meta): return meta', vars(persistence))


def as_edm(module):
    """How EDM's torch_utils.persistence has a module pickled."""
    if isinstance(module, torch.nn.ModuleDict):
        return copyreg.__newobj__, (torch.nn.ModuleDict,), vars(module)
    return persistence._reconstruct_persistent_obj, (dict(
        type='class', version=6, module_src='#' * 99, class_name=type(module).__name__,
        state=vars(module)),)


class Conv(torch.nn.Conv2d):
    """Behind a FIR filter that scales `up` or `down`, or as `aux` before one."""

    def __init__(self, c_in, c, size=1, way='', taps=()):
        super().__init__(c_in, c, size, padding=size // 2 + (way == 'aux'))
        self.way, taps = way, torch.tensor(taps)
        if way:
            kernel = torch.outer(taps, taps) / taps.sum() ** 2
            self.register_buffer('resample_filter', kernel[None, None])

    def forward(self, x):
        x = super().forward(x) if self.way in ('', 'aux') else x
        if self.way:
            k = self.resample_filter.expand(x.shape[1], -1, -1, -1)
            pad = 0 if self.way == 'aux' else k.shape[-1] // 2 - 1
            x = (F.conv_transpose2d(x, 4 * k, None, 2, pad, groups=len(k)) if self.way == 'up' else
                 F.conv2d(x, k, None, 2, pad, groups=len(k)))
        return super().forward(x) if self.way in ('up', 'down') else x


def norm(c):
    return torch.nn.GroupNorm(min(32, c // 4), c, eps=1e-6)


class Block(torch.nn.Module):
    def __init__(self, c_in, c, c_emb, taps, attend=False, way=''):
        super().__init__()
        self.skip_scale, self.attend = np.float64(0.5 ** 0.5), attend
        self.norm0, self.conv0 = norm(c_in), Conv(c_in, c, 3, way, taps)
        self.affine = torch.nn.Linear(c_emb, c)
        self.norm1, self.conv1 = norm(c), Conv(c, c, 3)
        self.skip = Conv(c_in, c, 1, way, taps) if c_in != c or way else None
        if attend:
            self.norm2, self.qkv, self.proj = norm(c), Conv(c, 3 * c), Conv(c, c)

    def forward(self, h, emb):
        y = self.conv0(F.silu(self.norm0(h))) + self.affine(emb)[:, :, None, None]
        y = self.conv1(F.silu(self.norm1(y)))
        h = self.skip_scale * ((self.skip(h) if self.skip else h) + y)
        if self.attend:
            q, k, v = self.qkv(self.norm2(h)).view(len(h), h.shape[1], 3, -1).unbind(2)
            w = torch.einsum('bcq,bck->bqk', q, k / h.shape[1] ** 0.5).softmax(2)
            y = torch.einsum('bqk,bck->bcq', w, v).view(h.shape)
            h = self.skip_scale * (h + self.proj(y))
        return h


class SongUNet(torch.nn.Module):
    """EDM's network written once more, with its names in its order."""

    def __init__(self, size=32, nf=8, mult=(1, 2), blocks=1, ncsnpp=False, classes=0, augment=9):
        super().__init__()
        self.nf, self.classes, self.map_noise = nf, classes, torch.nn.Module()
        width, taps = nf * (1 + ncsnpp), [1., 3, 3, 1] if ncsnpp else [1., 1]
        block = functools.partial(Block, c_emb=4 * nf, taps=taps)
        if ncsnpp:
            self.map_noise.register_buffer('freqs', torch.linspace(-2, 2, nf))
        if classes:
            self.map_label = torch.nn.Linear(classes, width)
        if augment:  # of images that are not augmented it adds nothing
            self.map_augment = torch.nn.Linear(augment, width, bias=False)
        self.map_layer0 = torch.nn.Linear(width, 4 * nf)
        self.map_layer1 = torch.nn.Linear(4 * nf, 4 * nf)
        self.enc, self.dec = enc, dec = torch.nn.ModuleDict(), torch.nn.ModuleDict()
        sides = [f'{size >> level}x{size >> level}' for level in range(len(mult))]
        c, above, skips = nf, 3, [nf]
        enc[f'{sides[0]}_conv'] = Conv(3, nf, 3)
        for side, m in zip(sides, mult):
            if side != sides[0]:
                enc[f'{side}_down'] = block(c, c, way='down')
                if ncsnpp:
                    enc[f'{side}_aux_residual'] = Conv(above, c, 3, 'aux', taps)
                above = c
                skips.append(c)
            for i in range(blocks):
                enc[f'{side}_block{i}'] = block(c, nf * m, attend=side == '16x16')
                c = nf * m
                skips.append(c)
        dec[f'{side}_in0'], dec[f'{side}_in1'] = block(c, c, attend=True), block(c, c)
        for side, m in zip(sides[::-1], mult[::-1]):
            if side != sides[-1]:
                dec[f'{side}_up'] = block(c, c, way='up')
            for i in range(blocks + 1):
                attend = side == '16x16' and i == blocks
                dec[f'{side}_block{i}'] = block(c + skips.pop(), nf * m, attend=attend)
                c = nf * m
        dec[f'{side}_aux_norm'], dec[f'{side}_aux_conv'] = norm(c), Conv(c, 3, 3)

    def forward(self, x, c_noise, labels=None):
        freqs = getattr(self.map_noise, 'freqs', None)
        f = (2 * math.pi * freqs if freqs is not None else
             1e4 ** -torch.linspace(0, 1, self.nf // 2))
        emb = torch.cat([(c_noise[:, None] * f).sin(), (c_noise[:, None] * f).cos()], 1)
        if self.classes:
            emb = emb + self.map_label(F.one_hot(labels, self.classes) * self.classes ** 0.5)
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))
        h, above, skips = x, x, []
        for name, layer in self.enc.items():
            if 'aux' in name:
                h = above = skips[-1] = (h + layer(above)) * 0.5 ** 0.5
            else:
                h = layer(h, emb) if isinstance(layer, Block) else layer(h)
                skips.append(h)
        *blocks, (_, norm), (_, last) = self.dec.items()
        for name, layer in blocks:
            h = layer(torch.cat([h, skips.pop()], 1) if '_block' in name else h, emb)
        return last(F.silu(norm(h)))


def edm_file(path, zip_form=False, change=lambda saved: None, kind='EDMPrecond', whole=True,
             size=32, nf=8, mult=(1, 2), blocks=1, ncsnpp=False, classes=0, augment=9, **flags):
    """A training-state in the form of EDM and PFGM++, or with whole=False a snapshot, of random
    weights. -> the EMA, a SongUNet."""
    given = dict(model_type='SongUNet', model_channels=nf, channel_mult=list(mult), dropout=0.13,
                 num_blocks=blocks, augment_dim=augment, use_fp16=False)
    if ncsnpp:
        given.update(embedding_type='fourier', encoder_type='residual', channel_mult_noise=2,
                     resample_filter=[1, 3, 3, 1])
    facts = dict(img_resolution=size, img_channels=3, label_dim=classes, sigma_data=0.5) | flags

    def network(seed):
        net = type(kind, (torch.nn.Module,), {})()
        vars(net).update(facts, _init_kwargs=given | facts)
        net.model = SongUNet(size, nf, mult, blocks, ncsnpp, classes, augment)
        for p in net.parameters():
            torch.nn.init.normal_(p, 0, math.prod(p.shape[1:]) ** -0.5, seeded(seed))
        return net
    ema = network(0)
    saved = dict(ema=ema, loss_fn=torch.nn.Module(), augment_pipe=None)
    if whole:
        net = network(1)
        state = {i: dict(step=torch.tensor(7.0), exp_avg=3 * p.detach(), exp_avg_sq=p.detach() ** 2)
                 for i, p in enumerate(net.parameters())}
        group = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, params=list(state))
        saved = dict(ema=ema, net=net, step=3584,
                     optimizer_state=dict(state=state, param_groups=[group]))
    change(saved)
    modules = dict.fromkeys(('torch_utils', persistence.__name__), persistence)
    with (patch.dict(sys.modules, modules), open(path, 'wb') as file,
          patch.object(torch.nn.Module, '__reduce__', as_edm)):
        torch.save(saved, file) if zip_form else pickle.dump(saved, file, protocol=4)
    return ema.model


@pytest.mark.parametrize('zip_form, shape', [
    (True, dict(classes=4, augment=0)), (False, dict(size=64, mult=(1, 2, 2, 2))),
    (False, dict(ncsnpp=True, classes=4)),
    (True, dict(ncsnpp=True, nf=12, size=64, mult=(1, 2, 2)))])
def test_published_files_are_read_whole_as_edms_network(zip_form, shape, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theirs, side = edm_file('a.pkl', zip_form, **shape), shape.get('size', 32)
    net, args = checkpoint.load_checkpoint('a.pkl')
    assert (args['D'], args['step'], args['ncsnpp']) == (math.inf, 7, 'ncsnpp' in shape)
    x, c_noise = torch.randn(2, 3, side, side, generator=seeded()), torch.tensor([-1.2, 1.1])
    labels = torch.tensor([0, 3]) if 'classes' in shape else None
    with torch.no_grad():
        close(net.net(x, c_noise, labels)[0], theirs(x, c_noise, labels), atol=2e-5)
    saved = checkpoint.read_checkpoint('a.pkl', whole=True)
    for i, (k, _) in enumerate(net.net.named_parameters()):  # moments made of the raw weights
        close(saved['opt']['state'][i]['exp_avg'], 3 * saved['net'][k], rtol=1e-6)
        close(saved['opt']['state'][i]['exp_avg_sq'], saved['net'][k].square(), rtol=1e-6)


@golden_edm
def test_full_size_published_networks_fit():
    for kind, rows in json.loads((GOLDEN_EDM / 'structure.json').read_text()).items():
        size, mult = (64, (1, 2, 2, 2)) if 'ffhq' in kind else (32, (2, 2, 2))
        ncsnpp, classes = kind.endswith('ve'), 10 if '-cond' in kind else 0
        with torch.device('meta'):
            theirs = SongUNet(size, 128, mult, 4, ncsnpp, classes).state_dict()
            net = unet.UNet(size, ch_mult=mult, classes=classes, ncsnpp=ncsnpp, label_first=True)
        found = [[f'model.{name}', list(t.shape)] for name, t in theirs.items()]
        assert found == [row[:2] for row in rows], kind
        names = checkpoint.edm_names(net, theirs)
        left = {k for k in theirs if not k.endswith('filter')} - set(names.values())
        assert left == {'map_augment.weight'} and names.keys() == net.state_dict().keys(), kind


@pytest.mark.parametrize('flags, D', [
    (dict(D=2048, pfgmpp=True), 2048), (dict(D=128, pfgmv2=True, pfgm=False), 128), ({}, math.inf),
    (dict(D=128, pfgmpp=False), math.inf), (dict(D=128, pfgm=False, pfgmv2=False), math.inf)])
def test_d_of_published_files(flags, D, tmp_path):
    edm_file(tmp_path / 'a', bool(flags), whole=False, **flags)
    net, args = checkpoint.load_checkpoint(tmp_path / 'a')
    assert args['D'] == D
    close([args['z_min'], args['z_max']], np.array([0.002, 80]) * pfgm.unit(D), rtol=1e-12)
    far = torch.full((2, 3, 32, 32), 1e4, dtype=F64)
    close(net.sigma(far, torch.ones(2)), torch.ones(2) / pfgm.unit(D), rtol=1e-6)  # not of |x|


def test_published_files_sample_encode_and_train_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    edm_file('a.pkl', classes=10, nf=4, size=16, D=128, pfgmpp=True)
    edm_file('b.pkl', whole=False, nf=4, size=16)
    for flags, want in (([], ('heun', 'rho7', 35, True)),
                        (['--nfe', '10'], ('unipc', 'radius', 10, False))):
        args = sample.parse_args(['--ckpt', 'a.pkl', *flags])
        flow, _ = checkpoint.load_flow(args, torch.device('cpu'))
        published_end = flow.ending() == (True, 0.002 * 128 ** 0.5)
        assert (flow.solver, flow.spacing(), flow.nfe, published_end) == want and flow.known == 10
    x, calls = flow.follow(flow.prior([0, 1]), torch.device('cpu'), [0, 1])
    assert x.dtype == F64 and calls == 10
    script(['checkpoint.py', 'a.pkl', '--out', 'c.pt'])
    a, c = (sampled('a.npz', '--n', 2, '--classes', 3, '--ckpt', k) for k in ('a.pkl', 'c.pt'))
    assert np.array_equal(a, c)
    for flags in ('--solver rk45 --tol 0.1', '--interpolate --nfe 3',
                  '--encode glyphs --solver dpm2m --nfe 4 --schedule log'):
        script(['sample.py', '--ckpt', 'b.pkl', '--n', 2, *flags.split()])
    script('evaluate.py --compare b.pkl a.pkl --swd --sweep nfe=3 --n 8 --dataset glyphs'.split())
    refuses(['sample.py', '--ckpt', 'b.pkl', '--classes', 0], 'the network knows none')
    train_on = ('train.py --dataset glyphs --image_size 16 --channels 3 --batch_size 2 --lr 1e-9 '
                '--device cpu --no-bf16').split()
    out = said([*train_on, '--init_from', 'b.pkl', '--steps', 1, '--out_dir', 'o'])
    assert 'b.pkl has no optimizer state; Adam starts afresh' in out
    train_on += ['--classes', '--out_dir', 'p', '--steps']
    assert 'afresh' not in said([*train_on, 8, '--init_from', 'a.pkl'])
    raw, saved = checkpoint.read_checkpoint('a.pkl', whole=True), loaded('p')
    assert all((saved['net'][k] - v).abs().max() < 1e-6 for k, v in raw['net'].items())
    assert saved['args']['edm'] and saved['args']['D'] == 128
    assert saved['opt']['state'][0]['step'] == 8
    script([*train_on, 9, '--D', 128])


def test_ncsnpp_trains_as_a_preset(tmp_path):
    script(['train.py', '--out_dir', tmp_path, *'--preset cifar10_ncsnpp --dataset glyphs --nf 8 '
            '--image_size 32 --num_blocks 1 --batch_size 2 --steps 2 --device cpu'.split()])
    net, args = checkpoint.load_checkpoint(tmp_path / 'ckpt.pt')
    assert args['method'] == 'pfgmpp' and args['ncsnpp'] and args['label_first']
    assert net.net.freq.std() > 8 and not args['edm']
    for preset, row in train.PRESETS.items():  # the published rows are what they were
        assert (row['ncsnpp'], row['label_first']) == (preset == 'cifar10_ncsnpp',) * 2


def opcodes(*parts):
    """A pickle of protocol 4 put together by hand."""
    return b'\x80\x04' + b''.join(parts) + b'.'


def word(text):
    return bytes([140, len(text)]) + text.encode()


REBUILD = word('torch._utils') + word('_rebuild_tensor_v2') + b'\x93'
HOSTILE_PICKLES = {
    'eval': opcodes(word('builtins'), word('eval'), b'\x93', word('1'), b'\x85R'),
    'dotted': opcodes(word('torch._utils'), word('_rebuild_tensor_v2.__globals__'), b'\x93)R'),
    'GLOBAL': b'\x80\x02cos\nsystem\n(X\x05\0\0\0touchtR.', 'INST': b"(S'touch'\nios\nsystem\n.",
    'odd arguments': opcodes(REBUILD, b'K\x01K\x02\x86R'),
    'attributes of a function': opcodes(REBUILD, b'}', word('__defaults__'), b'K\x01\x85sb'),
    'a deep key': opcodes(b'}', b')' + b'\x85' * 200_000, b'Ns'),
    'deep lists': opcodes(b']' * 10 ** 5 + b'a' * (10 ** 5 - 1)),
    'None': opcodes(b'N'), 'no end': opcodes(word('x'))[:-1],
    **{f'{what} of 2^{power}': opcodes(code, (2 ** power - 1).to_bytes(size, 'little'))
       for what, code, size, power in (
           ('a memo', b'Nr', 4, 31), ('bytes', b'B', 4, 32), ('bytes', b'\x8e', 8, 40),
           ('a bytearray', b'\x96', 8, 33), ('a text', b'\x8d', 8, 60),
           ('a frame', b'\x95', 8, 40), ('a number', b'\x8b', 4, 31))},
}


def with_tensor(make):
    def change(saved):
        layer = saved['ema'].model.map_layer0._parameters
        layer['weight'] = make(layer['weight'])
    return dict(change=change)


def without_number(saved):  # each twice in the next: 2^60, none with a tensor
    part = torch.nn.Module()
    for _ in range(60):
        part, inside = torch.nn.Module(), part
        part.a = part.b = inside
    saved['ema'].model.a = part


HOSTILE_FILES = {  # what edm_file() is given
    'a payload': dict(change=lambda saved: saved.update(extra=Payload())),
    'no ema': dict(change=lambda saved: saved.update(net=saved.pop('ema'))),
    'no type': dict(change=lambda saved: saved['ema']._init_kwargs.pop('model_type')),
    'within itself': dict(change=lambda saved: saved['ema'].model._modules.update(
        a=as_edm(saved['ema'])[1][0])),
    'without number': dict(change=without_number),
    'a part missing': dict(change=lambda saved: delattr(saved['ema'].model, 'map_layer1')),
    'a part more': dict(change=lambda saved: setattr(saved['ema'].model, 'a', norm(4))),
    'another shape': with_tensor(lambda t: t.T), 'half': with_tensor(lambda t: t.half()),
    'a stride of 0': with_tensor(lambda t: t[:1, :1].expand(t.shape)),
    'a claim': with_tensor(lambda t: t[:1].detach().as_strided((10 ** 12,), (0,))),
    'a mixture': dict(embedding_type='fourier'), 'VPPrecond': dict(kind='VPPrecond'),
    'wide': dict(model_channels=10 ** 9), 'many': dict(num_blocks=10 ** 9),
    'large': dict(img_resolution=2 ** 40), 'a text for D': dict(D='x' * 10 ** 6, pfgmpp=True),
    'a D of nan': dict(D=math.nan, pfgmpp=True), 'a spread below 0': dict(sigma_data=-1),
}
SAY = {'a payload': 'asks for', 'eval': 'asks for builtins.eval', 'GLOBAL': 'asks for os.system',
       'no type': 'of ADM', 'another shape': r'\(32, 8\)', 'VPPrecond': 'VPPrecond of SongUNet',
       'no ema': 'give the network-snapshot', 'dotted': 'asks for torch._utils._rebuild.*globals'}


@pytest.mark.parametrize('zip_form', [False, True])
@pytest.mark.parametrize('case', [*HOSTILE_PICKLES, *HOSTILE_FILES])
def test_hostile_published_files_are_refused(case, zip_form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if case in HOSTILE_FILES:
        edm_file('a.pkl', zip_form, whole=False, **HOSTILE_FILES[case])
    else:
        raw, told = HOSTILE_PICKLES[case], word('torch_utils.persistence') + b'0.'
        packed = zipped([('a/data.pkl', raw[:-1] + told)], zipfile.ZIP_STORED)
        Path('a.pkl').write_bytes(packed if zip_form else raw)
    with limited(20, 2), patch.object(os, 'system', side_effect=AssertionError):
        refuses(['sample.py', '--ckpt', 'a.pkl', '--device', 'cpu'],
                SAY.get(case, '--ckpt a.pkl: '))
    assert os.listdir('.') == ['a.pkl']


@pytest.mark.parametrize('seed, count', [(0, 100), pytest.param(1, 1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize('zip_form', [False, True])
def test_damaged_published_files(zip_form, seed, count, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    edm_file('good', zip_form, classes=3, ncsnpp=True, nf=4)
    raw, rng, refused = Path('good').read_bytes(), np.random.default_rng(seed), 0
    good = checkpoint.load_checkpoint('good')[0].state_dict()
    for size in (0, 1, 10, 1000, len(raw) // 2, len(raw) - 1):
        Path('cut').write_bytes(raw[:size])
        refuses(['sample.py', '--ckpt', 'cut'], '--ckpt cut: damaged')
    for _ in range(count):
        Path('a.pkl').write_bytes(mutated(raw, rng))
        try:
            with limited(20, 2):
                net, args = checkpoint.load_checkpoint('a.pkl')
            # a plain pickle has no checksum: another number in it is another weight
            assert args['edm'] and (not zip_form or same(net.state_dict(), good))
        except data.BadInput as error:
            assert re.fullmatch('--ckpt a.pkl: .{,999}', str(error))
            refused += 1
    assert refused


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='no /proc on this system')
@pytest.mark.parametrize('zip_form', [False, True])
def test_a_full_size_training_state_takes_less_than_a_gigabyte(zip_form, tmp_path):
    edm_file(tmp_path / 'a', zip_form, nf=128, mult=(2, 2, 2), blocks=4, ncsnpp=True, classes=10)
    out = python('import checkpoint\nnet, args = checkpoint.load_checkpoint("a")\n'
                 'print(sum(p.numel() for p in net.parameters()), *open("/proc/self/status"))',
                 tmp_path)
    assert 55e6 < int(out.split()[0]) < 57e6
    assert int(re.search(r'VmHWM:\s*(\d+) kB', out)[1]) < 1000 << 10


# ---------------------------------------------------------------- flags

WORDS = ['', 'x', 'nan', 'inf', '-1', '0', '1e400', '1_0', '\u0663', '\u2460', '0x10', '9' * 5000,
         '[]', 'a\nb', '\udcff', '-x', '%s', '1,2', 'nfe=', 'nfe=1,,2', '1e-400', '..', '\x1b[31m']


@pytest.mark.parametrize('every', [8, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize('name', ['train', 'sample', 'evaluate'])
def test_words_as_flags(name, every):
    """Of each flag: a value that it may have, or one line and code 2."""
    parse = SCRIPTS[name].parse_args
    for k, flag in enumerate(vars(parse([]))):
        for word in WORDS[k % every::every]:
            with contextlib.redirect_stderr(io.StringIO()) as stderr:
                try:
                    value = getattr(parse([f'--{flag}={word}']), flag)
                    assert not isinstance(value, float) or math.isfinite(value) or flag == 'D', word
                except SystemExit as stop:
                    assert stop.code == 2 and stderr.getvalue().count('\n') == 1, word


# ---------------------------------------------------------------- where people run it

def python(code, folder, *launcher, **env):
    """What a program of its own, run in a folder, prints; our modules can be imported there."""
    (folder / 'program.py').write_text(code)
    done = subprocess.run([sys.executable, *launcher, 'program.py'], cwd=folder, text=True,
                          capture_output=True, env={**os.environ, 'PYTHONPATH': str(HERE), **env})
    assert done.returncode == 0, done.stdout[-999:] + done.stderr
    return done.stdout


PRETEND = HERE.parent / 'shared' / 'tools' / 'pretend_cuda.py'
MODES = """
train.py TINY --skip --steps 2 --dropout 0.1 --out_dir o
sample.py --ckpt o --nfe 4 --n 3 --gif
sample.py --ckpt o --solver rk45 --tol 0.1 --n 3 --out digits
evaluate.py --ckpt o --bpd --swd --neighbours --n 2 --nfe 2 --tol 0.1
evaluate.py --ckpt o --judge --n 129 --nfe 1
train.py TINY --skip --steps 4 --sample_every 2 --dropout 0.1 --out_dir o
sample.py --exact --dataset large.npz --n 2
sample.py --ckpt o --n 2 --tol 0.1 --encode glyphs
sample.py --ckpt o --inpaint large.npz --mask large.npz --nfe 2 --n 2
train.py TINY_PP --method rf --classes --steps 2 --out_dir rf
train.py TINY_PP --reflow rf --pairs 16 --steps 2 --out_dir reflow
sample.py --ckpt rf --solver ddim --eta 1 --nfe 3 --n 2 --schedule time --guidance 2
train.py --dataset 32.npz --batch_size 8 --no-bf16 --steps 8 --init_from a.pth --out_dir official
sample.py --ckpt a.pth --tol 0.5 --n 2
evaluate.py --compare o rf --straightness --swd --sweep nfe=2,3 --n 2
evaluate.py --exact --dataset large.npz --bpd --n 2 --tol 0.1
evaluate.py --solver_bench --dataset large.npz --n 2 --sweep nfe=2 --solvers unipc,rk45
train.py TINY_PP --D 128 --dataset large.npz --steps 2 --workers 1 --accum 2 --out_dir pp
train.py TINY_PP --D 3 --preset cifar10_ncsnpp --steps 2 --sample_every 2 --out_dir ncsnpp
train.py TINY_PP --consistency --steps 2 --sample_every 2 --init_from ncsnpp --out_dir few
sample.py --ckpt few --nfe 2 --n 2
train.py TINY_PP --distill o --pairs 16 --steps 2 --out_dir one
train.py TINY_PP --method rf --source large.npz --steps 2 --sample_every 2 --out_dir across
sample.py --ckpt across --from large.npz --nfe 2 --n 2
sample.py --ckpt edm.pkl --n 2 --classes 1
"""
DRIVER = """
import bench, data, test_pfgm
bench.JUDGE_STEPS = 2
for line in open('modes'):
    data.MEMORY_LIMIT = 1 if '--workers' in line else 2 << 30
    print(line)
    test_pfgm.script(line.split())
print('all modes ran')
"""
pretended = pytest.mark.skipif(
    not PRETEND.exists() or not hasattr(torch._C, '_ensureCUDADeviceGuardSet'),
    reason='nothing here pretends a GPU, or this PyTorch is too old for it')


@pytest.mark.parametrize('kind, count', [
    *(pytest.param(kind, 7, marks=pretended) for kind in ('cuda', 'mps')),
    *(pytest.param(kind, 99, marks=[pretended, pytest.mark.slow]) for kind in ('cuda', 'mps')),
    pytest.param('real cuda', 99, marks=pytest.mark.cuda)])
def test_modes_on_a_pretended_device_and_on_a_real_one(kind, count, tmp_path):
    tiny_official(tmp_path / 'a.pth')
    edm_file(tmp_path / 'edm.pkl', pfgmpp=True, D=2048, ncsnpp=True, classes=3)
    for name, size in (('large.npz', 16), ('32.npz', 32)):
        pixels = np.random.default_rng(0).integers(0, 256, (20, size, size, 3), dtype=np.uint8)
        np.savez(tmp_path / name, x=pixels)
    modes = '\n'.join(MODES.strip().splitlines()[:count])
    for name, words in (('TINY_PP', TINY_PP), ('TINY', TINY)):
        modes = modes.replace(name, ' '.join(words).replace('--device cpu', ''))
    (tmp_path / 'modes').write_text(modes)
    out = python(DRIVER, tmp_path, *[PRETEND] * (kind != 'real cuda'), PRETEND=kind)
    assert out.endswith('all modes ran\n') and f'1 x {kind.split()[-1]}' in out


def test_cuda_alone_is_its_first_device(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, 'zeros', lambda *shape, device: None)
    monkeypatch.setattr(torch, 'set_float32_matmul_precision', lambda precision: None)
    monkeypatch.setattr(torch.cuda, 'set_device', chosen.append)
    device, rank, world = launch.setup('cuda')
    assert chosen == [device] and (device.index, rank, world) == (0, 0, 1)


def test_without_the_modules_that_windows_lacks(tmp_path):
    out = python('import sys\nsys.modules.update(resource=None, fcntl=None)\n'
                 'import evaluate, sample, train\n'
                 f'train.main(train.parse_args({TINY} + ["--steps", "2"]))', tmp_path)
    assert 'saved' in out


@pytest.fixture
def tf32():
    """As setup() has it on a GPU."""
    torch.set_float32_matmul_precision('high')
    yield
    torch.set_float32_matmul_precision('highest')


def test_no_tf32_in_the_field_rk45_and_likelihood(tf32):
    seen, x, z = [], torch.ones(2, 3), torch.ones(2)
    def watch(part=None):
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return part
    class Watched(data.Charges):  # the field's products are made as its chunks come
        def split(self, size):
            return map(watch, super().split(size))
    def net(x, z):
        return watch(-x), -z
    pfgm.sample_ode(net, x, 2.0, 1.0, 'euler', 1, z_exp=0)
    assert seen == [('high', True)]
    for each in (False, True):
        pfgm.sample_ode(net, x, 2.0, 1.0, each=each, z_exp=0)
    pfgm.log_likelihood(net, x, 1.0, 2.0, z_exp=0)
    pfgm.posterior_mean(x, z, Watched(torch.zeros(4, 3, 1, 1, dtype=torch.uint8)))
    assert set(seen[1:-2]) == {('highest', False)} == {seen[-1]}, seen  # [-2]: in float64
    watch()
    assert seen[-1] == ('high', True)
    with torch.autocast('cpu', torch.bfloat16):  # a caller's autocast ends there too
        within = pfgm.poisson_field(x, z, torch.eye(3))
    close(within[0], pfgm.poisson_field(x, z, torch.eye(3))[0])


def test_charges_are_made_of_their_pixels_a_chunk_at_a_time(monkeypatch):
    pixels = torch.randint(0, 256, (11, 3, 4, 4), generator=seeded()).to(torch.uint8)
    want = data.to_float(torch.cat([pixels, pixels.flip(-1)]))
    charges = data.Charges(pixels, mirror=True)
    x, z = pfgm.perturb(want[:6], 100, generator=seeded())
    among = torch.rand(6, 22, generator=seeded()) < 0.5
    whole = pfgm.poisson_field(x, z, want, among=among)
    y, at = torch.randn(20, 6, generator=seeded(), dtype=F64), torch.zeros(2, 6, dtype=F64)
    likelihood = pfgm.log_likelihood(ExactField(y), at, 0.5, 40.0, 'exact').logp
    for size in (1, 4, 22):  # the last of the images and the first mirrored one share a chunk
        monkeypatch.setattr(pfgm, 'chunk', lambda x: size)
        assert torch.equal(torch.cat(list(charges.split(size))), want) and len(charges) == 22
        for a, b in zip(pfgm.poisson_field(x, z, charges, among=among), whole):
            close(a, b, rtol=1e-6, atol=1e-7)
        # each backward needs all chunks
        again = pfgm.log_likelihood(ExactField(y), at, 0.5, 40.0, 'exact').logp
        close(again, likelihood, rtol=1e-9)


@pytest.mark.parametrize('steps', [60, pytest.param(3000, marks=pytest.mark.slow)])
def test_memory_stays_flat_and_nothing_that_is_kept_hangs_on_a_graph(tmp_path, monkeypatch, steps):
    kept, resident, update, observe = {}, [], train.update, train.observe

    def watched(net, ema, opt, *how):
        norm = update(net, ema, opt, *how)
        states = [v for state in opt.state.values() for v in state.values()]
        kept.update(norm=[norm], ema=ema.parameters(), opt=states)
        return norm

    def counted(meter, *step):
        observe(meter, *step)
        kept.update(meter=meter.values())
        pages = int(Path('/proc/self/statm').read_text().split()[1])
        resident.append(pages * resource.getpagesize() >> 20)
    monkeypatch.setattr(train, 'update', watched)
    monkeypatch.setattr(train, 'observe', counted)
    script(['train.py', *TINY, '--steps', steps, '--log_every', 50, '--dropout', 0.1,
            '--out_dir', tmp_path])
    for name, values in kept.items():
        tensors = [v for v in values if torch.is_tensor(v)]
        assert tensors and not any(t.requires_grad or t.grad_fn for t in tensors), name
    assert steps < 300 or resident[-1] < resident[300] + 30, resident[::300]


def test_a_resumed_run_may_be_tuned(copied):
    out = said(['train.py', *TINY, '--out_dir', copied, *'--dropout 0.1 --steps 12 --lr 1e-4 '
                '--batch_size 4 --grad_clip 0.5 --warmup 2 --accum 2'.split()])
    changed = '--lr 0.0001 (it was 0.002), --warmup 2 (it was 3), --grad_clip 0.5 (it was 1.0), '
    assert f'going on with {changed}--batch_size 4 (it was 8), --accum 2 (it was 1)' in out
    assert [row['images'] for row in rows_of(copied / 'log.jsonl')][-3:] == [80, 84, 88]


def test_samples_are_files_as_they_are_made_and_only_missing_ones_are_made_again(
        trained, tmp_path, monkeypatch):
    flags = ['--device', 'cpu', '--ckpt', trained / 'ckpt.pt', '--nfe', 3, '--batch_size', 2, '--n']
    whole = sampled(tmp_path / 'whole.npz', *flags, 7)
    follow, calls = baselines.Flow.follow, []

    def stopped(flow, x, *more):
        calls.append(len(x))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return follow(flow, x, *more)
    monkeypatch.setattr(baselines.Flow, 'follow', stopped)
    for name in ('a.npz', 'b.png', 'folder'):
        calls.clear()
        command = ['sample.py', '--out', tmp_path / name, *flags]
        with pytest.raises(SystemExit, match='130'):
            script([*command, 7])
        assert not (tmp_path / name).is_file()
        script([*command, 7])
        assert sum(calls) == 2 + 2 + 2 + 3  # the one that was stopped drew two in vain
    assert np.array_equal(np.load(tmp_path / 'a.npz')['arr_0'], whole)
    made = sample.read_images(sorted(tmp_path.glob('folder/*.png')))
    assert np.array_equal(made.permute(0, 2, 3, 1), whole)
    assert sorted(os.listdir(tmp_path)) == ['a.npz', 'b.png', 'folder', 'whole.npz']
    script([*command, 9])
    assert calls[-1] == 2 and sum(calls) == 9 + 2
    for flag, value in (('seed', 1), ('weights', 'raw'), ('solver', 'euler')):
        refuses([*command, 9, f'--{flag}', value], f'made with {flag} ')
    os.mkdir(tmp_path / 'c.png')
    refuses([*command, 9, '--out', tmp_path / 'c.png'], 'a folder that does not')
    (tmp_path / 'folder' / sample.MARK).write_text('[1]')
    for folder in (tmp_path, tmp_path / 'folder'):
        refuses([*command, 9, '--out', folder], 'does not say what made it')


def torchrun(*words):
    """Two processes of a script."""
    return subprocess.Popen(
        [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_two_machines_with_one_folder_and_with_two(tmp_path):
    one, a, b = (tmp_path / k for k in ('one', 'a', 'b'))
    command = [*TINY, '--dropout', 0, '--steps']

    def run_two(*folders, steps):
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            where = dict(nnodes=2, master_addr='127.0.0.1', master_port=s.getsockname()[1])
        running = [start([*command, steps, '--timeout', 60, '--out_dir', folder], 1, node_rank=k,
                         **where) for k, folder in enumerate(folders)]
        texts = [p.communicate(timeout=300)[0] for p in running]
        return [p.returncode for p in running], texts
    script(['train.py', *command, 4, '--out_dir', one])
    codes, texts = run_two(a, a, steps=2)
    assert codes == [0, 0], texts
    codes, texts = run_two(a, b, steps=4)  # only the first has the checkpoint
    assert codes == [1, 1], texts
    assert 'step 0 in process 1, 2 in process 0; give all processes' in texts[0], texts
    shutil.copytree(a, b)  # as the line says
    assert run_two(a, b, steps=4)[0] == [0, 0]
    close(losses(a), losses(one), rtol=1e-4)


@pytest.mark.parametrize('rank, order', [(0, ['downloads', 'waits']), (1, ['waits', 'finds it'])])
def test_one_process_of_a_machine_downloads_and_the_others_wait(rank, order, monkeypatch):
    torchvision, done = pytest.importorskip('torchvision'), []

    def mnist(root, train, download):
        done.append('finds it' if done else 'downloads')
        return types.SimpleNamespace(data=np.zeros((4, 28, 28), np.uint8), targets=np.arange(4),
                                     classes=None)
    monkeypatch.setattr(torchvision.datasets, 'MNIST', mnist)
    monkeypatch.setenv('LOCAL_RANK', str(rank))
    monkeypatch.setattr(launch, 'patient', lambda: 'all')
    monkeypatch.setattr(launch.dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(launch.dist, 'barrier', lambda group: done.append('waits'))
    data.load('mnist', image_size=28)
    assert done == order


@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='no /proc on this system')
def test_a_second_ctrl_c_ends_a_run_that_hangs(tmp_path):
    p = start([*TINY, '--steps', 100000, '--out_dir', tmp_path / 'o'], 2)
    until(p, 'step 3/')
    hung, stopped = workers(p)
    os.kill(stopped, signal.SIGSTOP)
    time.sleep(0.5)
    stat = Path(f'/proc/{hung}/stat')
    for _ in range(2):
        assert stat.exists() and ' Z ' not in stat.read_text()
        os.kill(hung, signal.SIGINT)
        time.sleep(1)
    assert not stat.exists() or ' Z ' in stat.read_text()
    os.kill(stopped, signal.SIGKILL)
    p.communicate(timeout=300)  # torchrun sees that they have ended
    assert p.returncode != 0


@pytest.mark.parametrize('D', [1, 128, math.inf])
def test_a_field_batch_trains_any_d_on_the_mean_of_its_charges(D):
    flow, y = baselines.Denoiser(Linear(), D), torch.randn(20, 3, 4, 4, generator=seeded())
    moved, z = flow.perturb(y[:6], seeded(1))
    v_x, v_z = flow.target(moved, z, y[:6], y)
    close(moved + v_x, pfgm.posterior_mean(moved, z, y, D).view(6, 3, 4, 4), atol=1e-4)
    close(v_z, -z)
    close((moved + flow.target(moved, z, y[:6])[0]), y[:6], atol=1e-4)  # of one charge: the image


# Run these where there is a GPU: pytest -m cuda

@pytest.fixture
def cuda_run(tmp_path, monkeypatch):
    """Runs a training script on the GPU, with the same bits each time."""
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', True)
    words = [w for w in TINY if w not in ('--device', 'cpu', '--no-bf16')] + ['--device', 'cuda']
    return lambda *more: script(['train.py', *words, *more])


@pytest.mark.cuda
@pytest.mark.parametrize('bf16', ['--bf16', '--no-bf16'])
def test_cuda_resume_is_bit_for_bit(cuda_run, tmp_path, bf16):
    for folder, stops in (('whole', [8]), ('parts', [3, 8])):
        for steps in stops:
            cuda_run(bf16, '--dropout', 0.1, '--steps', steps, '--out_dir', tmp_path / folder)
    assert same_run(tmp_path / 'whole', tmp_path / 'parts')


@pytest.mark.cuda
def test_cuda_solvers_follow_those_of_the_cpu():
    charges = data.to_float(data.load('glyphs').pixels[:50]).double()
    x = pfgm.sample_prior((4, 1, 16, 16), 40.0, 800.0, generator=seeded(), dtype=F64)
    for solver in ('rk45', *pfgm.SOLVERS):
        ends = [pfgm.sample_ode(ExactField(charges.to(device)), x.to(device), 40.0, 0.05, solver,
                                12, z_exp=0, each=True, rtol=1e-8, atol=1e-8)[0].cpu()
                for device in ('cpu', 'cuda')]
        close(*ends, atol=1e-6)


@pytest.mark.cuda
def test_cuda_field_is_exact_to_1e_6(tf32):
    charges = torch.rand(4096, 3, 32, 32, generator=seeded()) * 2 - 1
    x, z = pfgm.perturb(charges[:64], 291, generator=seeded(1))
    v = joined(pfgm.poisson_field(x.cuda(), z.cuda(), charges.cuda())).cpu()
    want = plain_field(x, z, charges, 5.0)
    assert ((v - want).norm(dim=1) <= 1e-6 * want.norm(dim=1)).all()


@pytest.mark.cuda
def test_cuda_one_rank_of_nccl_follows_the_loss_of_none(cuda_run, tmp_path):
    flags = ['--no-bf16', '--dropout', '0', '--steps', '4', '--out_dir']
    cuda_run(*flags, tmp_path / 'none')
    p = start([*TINY, '--device', 'cuda', *flags, tmp_path / 'nccl'], 1)
    assert 'saved' in p.communicate()[0]
    close(losses(tmp_path / 'nccl'), losses(tmp_path / 'none'), rtol=1e-4)


@pytest.mark.cuda
def test_cuda_memory_stays_flat(cuda_run, tmp_path, monkeypatch):
    observe, held = train.observe, []
    monkeypatch.setattr(train, 'observe', lambda *args: (
        observe(*args), held.append(torch.cuda.memory_allocated())))
    cuda_run('--steps', 300, '--log_every', 50, '--out_dir', tmp_path)
    assert held[-1] < held[50] + 2 ** 20
