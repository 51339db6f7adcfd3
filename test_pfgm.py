"""Physics and behaviour. `pytest -q` runs all of it in minutes on two cores, without a network.

Reference numbers of the authors' code are read from ../shared/golden where that folder exists.
"""
import contextlib
import functools
import io
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
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
from PIL import Image
from scipy import integrate, stats

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


def close(a, b, rtol=0.0, atol=0.0):
    a, b = (torch.as_tensor(v, dtype=F64) for v in (a, b))
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


# ---------------------------------------------------------------- hyperparameters, perturbation

def test_hyperparameters_of_cifar10():
    M, z_max, upper_norm = pfgm.hyperparameters(900 ** 0.5, 3072, 0.01, 0.03)
    assert M == int(0.75 * math.log(900 / (2 * math.sqrt(3072) * 1e-4)) / math.log(1.03)) + 1
    close(z_max, math.sqrt(2 / math.pi) * 0.01 * 1.03 ** M, rtol=1e-12)
    close(upper_norm, math.sqrt(3072) * 0.01 * 1.03 ** M, rtol=1e-12)
    with pytest.raises(ValueError, match='data_norm'):
        pfgm.hyperparameters(1e-4, 3072, 0.01, 0.03)


@golden
@pytest.mark.parametrize('limit', [True, False])
def test_perturbation_quantiles(limit):
    ref, n = np.load(GOLDEN / 'perturb_stats.npz'), 20_000
    key = 'restrict_on' if limit else 'restrict_off'
    x = torch.zeros(n, 3072)
    moved, z = pfgm.perturb(x, 291, limit_norm=limit, generator=seeded())
    assert moved.shape == x.shape and z.shape == (n,) and (z > 0).all()
    for name, ours in (('r', moved.norm(dim=1)), ('z', z)):
        p = stats.ks_2samp(ours.numpy(), ref[f'draws_{name}_{key}']).pvalue
        assert p > 1e-3, (name, p)
        error = np.percentile(ours, ref['q_percent']) - ref[f'{name}_q_{key}']
        spread = ref[f'{name}_q_se_{key}'] * math.sqrt(1 + float(ref['n_draws']) / n)
        assert (abs(error) < 4 * spread).all(), (name, error / spread)


@pytest.mark.parametrize('shape', [(5, 3, 4, 4), (5, 1, 6, 6), (5, 2)])
def test_shapes_and_dtypes_follow_the_input(shape):
    for dtype in (torch.float32, F64):
        x = torch.rand(shape, dtype=dtype)
        moved, z = pfgm.perturb(x, 200)
        v_x, v_z = pfgm.poisson_field(moved, z, x)
        for like_x, per_image in ((moved, z), (v_x, v_z)):
            assert like_x.shape == shape and like_x.dtype == dtype
            assert per_image.shape == (5,) and per_image.dtype == dtype
        out, nfe = pfgm.sample_ode(ExactField(x), moved, 1.0, 0.1, 'euler', 3)
        assert out.shape == shape and out.dtype == dtype and nfe == 3


# ---------------------------------------------------------------- field

def plain_field(x, z, charges, gamma):
    """The definition in float64, one (B, K, N) difference at a time."""
    x, z, y = x.flatten(1).double(), z.double(), charges.flatten(1).double()
    N, out = x.shape[1], []
    for point, height in zip(x, z):
        d2 = (point - y).square().sum(1) + height ** 2
        w = torch.softmax(-(N + 1) / 2 * d2.log(), 0)
        E = torch.cat([point - w @ y, height[None]])
        out.append(-math.sqrt(N) * E / (E.norm() + gamma))
    return torch.stack(out)


def joined(v):
    return torch.cat([v[0].flatten(1), v[1][:, None]], 1)


@golden
@pytest.mark.parametrize('size', ['N192', 'N3072'])
def test_field_equals_the_authors(size):
    ref = np.load(GOLDEN / 'field_target.npz')
    charges, points = (torch.from_numpy(ref[f'{k}_{size}']) for k in ('x_data', 'perturbed'))
    x, z = points[:, :-1].reshape(-1, *charges.shape[1:]), points[:, -1]
    v = joined(pfgm.poisson_field(x, z, charges, 5.0)).double()
    for key in ('target_f32', 'target_f64', 'target_exact_f64'):
        want = torch.from_numpy(ref[f'{key}_{size}']).double()
        error = (v - want).norm(dim=1)
        assert (error <= 1e-5 * want.norm(dim=1) + 1e-7).all(), (key, error)


def test_field_is_exact_to_1e_6_wherever_perturbation_reaches():
    N, K, B = 3072, 4096, 32
    charges = torch.rand(K, 3, 32, 32, generator=seeded()).mul(255).round() / 127.5 - 1
    charges[7] = charges[3]                                    # a duplicated image
    x, z = pfgm.perturb(charges[:B], 291, generator=seeded(1))
    x[3], x[5], z[5] = charges[3], charges[5], 1e-4            # on top of charges
    v, want = joined(pfgm.poisson_field(x, z, charges)).double(), plain_field(x, z, charges, 5.0)
    assert ((v - want).norm(dim=1) <= 1e-6 * want.norm(dim=1)).all()


def test_field_on_a_charge_at_z_0_is_0():
    charges = torch.rand(9, 50, generator=seeded())
    v_x, v_z = pfgm.poisson_field(charges[:2], torch.zeros(2), charges)
    close(v_x, torch.zeros(2, 50), atol=1e-12)
    close(v_z, torch.zeros(2))


def test_far_field_points_home():
    charges = torch.rand(20, 3, 8, 8, dtype=F64) * 2 - 1
    x, z = torch.randn(4, 3, 8, 8, dtype=F64) * 1e6, torch.full((4,), 1e5, dtype=F64)
    v = joined(pfgm.poisson_field(x, z, charges, gamma=0.0))
    place = torch.cat([x.flatten(1), z[:, None]], 1)
    close(v, -math.sqrt(192) * place / place.norm(dim=1, keepdim=True), atol=1e-5)


def test_flux_through_a_closed_surface_counts_the_charges():
    # N = 1: the (x, z) plane, E = sum (p - y) / |p - y|^2. Its flux is 2 pi per charge inside.
    charges = torch.tensor([[-0.7], [0.1], [0.4]], dtype=F64)
    angle = (torch.arange(2000, dtype=F64) + 0.5) * (2 * math.pi / 2000)
    x, z = 2 * angle.cos()[:, None], 2 * angle.sin()
    d2 = (x - charges.T) ** 2 + z[:, None] ** 2
    total = (1 / d2).sum(1)  # |E| up to the direction: E = (x - xhat, z) sum_k 1 / d_k^2
    v_x, v_z = pfgm.poisson_field(x, z, charges, gamma=0.0)
    E = -torch.cat([v_x, v_z[:, None]], 1)  # unit vectors, N = 1
    length = torch.hypot(x[:, 0] - pfgm.posterior_mean(x, z, charges)[:, 0], z) * total
    flux = (length * (E * torch.stack([x[:, 0], z], 1) / 2).sum(1)).sum() * 2 * 2 * math.pi / 2000
    close(flux, 3 * 2 * math.pi, rtol=1e-10)


# ---------------------------------------------------------------- prior

@golden
def test_prior_radius_quantiles():
    ref = np.load(GOLDEN / 'prior_stats.npz')
    n, upper = 20_000, float(ref['upper_norm'])
    free = pfgm.sample_prior((n, 3072), 40.0, generator=seeded()).norm(dim=1).double()
    clipped = pfgm.sample_prior((n, 3072), 40.0, upper, generator=seeded()).norm(dim=1).double()
    assert stats.ks_2samp(clipped.clamp(max=upper - 1), ref['draws_r'].clip(max=upper - 1)
                          ).pvalue > 1e-3
    share, want = float((clipped > upper - 1e-2).double().mean()), ref['analytic_prob_r_gt_upper']
    assert abs(share - want) < 4 * math.sqrt(0.25 / n)
    ratio = free.numpy() ** 2 / (free.numpy() ** 2 + 40.0 ** 2)
    assert stats.kstest(ratio, stats.beta(3072 / 2, 1 / 2).cdf).pvalue > 1e-3


@pytest.mark.parametrize('D', [1, 3, 128, math.inf])
def test_prior_density_integrates_to_1_and_matches_its_draws(D):
    z_max = 2.0 if D == math.inf else 2.0 * math.sqrt(D)
    def shell(r):  # N = 3: 4 pi r^2 p(r)
        return 4 * math.pi * r * r * math.exp(pfgm.prior_logp(torch.tensor([[r, 0, 0]], dtype=F64), z_max, D))
    close(integrate.quad(shell, 0, np.inf)[0], 1.0, rtol=1e-8)
    r = pfgm.sample_prior((4000, 3), z_max, D=D, generator=seeded(), dtype=F64).norm(dim=1)
    inside = sum(integrate.quad(shell, a, a + 0.5)[0] for a in np.arange(0, 3, 0.5))
    assert abs(float((r < 3).double().mean()) - inside) < 4 * math.sqrt(0.25 / 4000)


def test_no_prior_draw_is_infinite():
    x = pfgm.sample_prior((200_000, 16), 40.0, generator=seeded())
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
    net = ExactField(torch.from_numpy(ref['data_points']))
    x, _ = pfgm.sample_ode(net, torch.from_numpy(ref['x_init']).double(), 40.0, 1e-3, z_exp=5.0,
                           rtol=1e-10, atol=1e-10)
    close(x, ref['ref64_true_flow'], atol=1e-7)


def images_net(N, h=2.0):
    """The field of the planar density c h / (|x|^2 + h^2)^((N+1)/2): a point charge at (0, -h)."""
    def net(x, z):
        scale = -math.sqrt(N) / (torch.hypot(x.flatten(1).norm(dim=1), z + h) + 5)
        return x * scale.view(-1, *[1] * (x.dim() - 1)), (z + h) * scale
    return net


@pytest.mark.parametrize('shape', [(6, 2), (6, 1, 4, 4)])
def test_method_of_images_flow_inverse_and_likelihood(shape):
    N, h, z_min, z_max = math.prod(shape[1:]), 2.0, 1e-3, 50.0
    x, tight = torch.randn(shape, generator=seeded(), dtype=F64), dict(rtol=1e-11, atol=1e-11)
    net = images_net(N, h)
    up, _ = pfgm.sample_ode(net, x, z_min, z_max, z_exp=0, **tight)
    close(up, x * (z_max + h) / (z_min + h), rtol=1e-6)
    back, _ = pfgm.sample_ode(net, up, z_max, z_min, z_exp=0, **tight)
    close(back, x, atol=1e-6)
    got = pfgm.log_likelihood(net, x, z_min, z_max, 'exact', z_exp=0, **tight)
    # on z_max the density is the prior's of height z_max + h, not yet that of height z_max
    logp = got.logp - pfgm.prior_logp(up, z_max) + pfgm.prior_logp(up, z_max + h)
    close(logp, pfgm.prior_logp(x, h + z_min), atol=1e-6)
    close(got.latent, up, rtol=1e-8)
    close(got.bpd, -got.logp / math.log(2) / N + 7)


def test_hutchinson_is_unbiased():
    x = torch.randn(1, 6, generator=seeded(), dtype=F64)
    charges = torch.randn(5, 6, generator=seeded(1), dtype=F64)
    exact = pfgm.log_likelihood(ExactField(charges), x, 0.5, 40.0, 'exact').logp
    many = pfgm.log_likelihood(ExactField(charges), x.repeat(3000, 1), 0.5, 40.0,
                               generator=seeded(2)).logp
    assert abs(many.mean() - exact) < 4 * many.std() / math.sqrt(3000)


@pytest.mark.parametrize('D', [1, 3, 128, math.inf])
def test_likelihood_of_charges_is_the_mixture_of_their_kernels(D):
    unit = 1.0 if D == math.inf else math.sqrt(D)
    y = torch.randn(6, 5, generator=seeded(), dtype=F64)
    x = y[:4] + 0.3 * torch.randn(4, 5, generator=seeded(1), dtype=F64)
    got = pfgm.log_likelihood(ExactField(y, D=D), x, 0.5 * unit, 20 * unit, 'exact', D=D, z_exp=0,
                              rtol=1e-10, atol=1e-10)
    def mixture(x, z):
        return torch.logsumexp(torch.stack([pfgm.prior_logp(x - k, z, D) for k in y]), 0
                               ) - math.log(len(y))
    at_z_max = mixture(got.latent, 20 * unit) - pfgm.prior_logp(got.latent, 20 * unit, D)
    close(got.logp + at_z_max, mixture(x, 0.5 * unit), atol=1e-6)


def test_one_charge_has_straight_lines():
    y, x = torch.randn(1, 12, dtype=F64), torch.randn(3, 12, dtype=F64) * 30
    for solver, nfe in (('rk45', 0), ('euler', 1), ('euler', 7), ('heun', 8)):
        out, _ = pfgm.sample_ode(ExactField(y), x, 40.0, 0.01, solver, nfe)
        close(out, y + (x - y) * 0.01 / 40, atol=1e-3 if solver == 'rk45' else 1e-9)


@pytest.mark.parametrize('N', [2, 64])
def test_equal_charges_are_reached_equally(N):
    K, g = 5, seeded()
    charges = torch.randn(K, N, generator=g)
    x = pfgm.sample_prior((4000, N), 1000.0, generator=g)
    x, _ = pfgm.sample_ode(ExactField(charges), x, 1000.0, 1e-3)
    reached = torch.bincount(torch.cdist(x, charges).argmin(1), minlength=K)
    assert stats.chisquare(reached.numpy()).pvalue > 0.01, reached


@pytest.mark.parametrize('solver', pfgm.SOLVERS)
@pytest.mark.parametrize('nfe', [1, 2, 7, 10])
@pytest.mark.parametrize('to_data', [False, True])
def test_nfe_is_the_number_of_network_calls(solver, nfe, to_data):
    calls, seen = [], []
    exact = ExactField(torch.randn(4, 3, generator=seeded()))
    def net(x, z):
        calls.append(z)
        return exact(x, z)
    x, spent = pfgm.sample_ode(net, torch.randn(2, 3), 20.0, 0.1, solver, nfe, to_data=to_data,
                               callback=lambda z, x: seen.append(z))
    assert len(calls) == spent == nfe and x.isfinite().all()
    close(seen[-1], [0.0 if to_data else 0.1] * 2, rtol=1e-7)
    if to_data and nfe > 1:
        close(calls[-1], [0.1] * 2, rtol=1e-6)


@pytest.mark.parametrize('solver, order', [('euler', 1), ('heun', 2), ('dpm2m', 2), ('dpm3m', 2),
                                           ('unipc', 3)])  # limited by their first steps
def test_order_of_the_solvers(solver, order):
    """Halving the steps divides the error by 2^order. Data N(0, 4), D = inf: xhat = 4 x / (4 + z^2)
    and x is in proportion to sqrt(4 + z^2)."""
    def net(x, z):
        return (4 / (4 + z ** 2) - 1)[:, None] * x, -z
    x, z_max, z_min, errors = torch.randn(3, 8, generator=seeded(), dtype=F64), 8.0, 0.5, []
    for steps in (200, 400):
        nfe = steps * (1 + (solver == 'heun'))
        out, _ = pfgm.sample_ode(net, x, z_max, z_min, solver, nfe, z_exp=0)
        errors.append((out - x * math.sqrt((4 + z_min ** 2) / (4 + z_max ** 2))).abs().max())
    assert order - 0.5 < math.log2(errors[0] / errors[1]) < order + 0.7


def test_a_step_is_exact_where_xhat_is_a_polynomial_in_log_z():
    # x(t) = 2 + 3t + t^2/2 + c e^t solves dx/dt = x - xhat with xhat = x - x' = -1 + 2t + t^2/2
    t = torch.tensor([[1.5, 1.2], [0.7, 0.3], [0.1, -0.4], [-0.9, -1.1]], dtype=F64)
    def flow(t):
        return (2 + 3 * t + t ** 2 / 2 + 5 * t.exp())[:, None]
    xhats = [(-1 + 2 * s + s ** 2 / 2)[:, None] for s in t]
    got = pfgm.along_polynomial(flow(t[2]), t[2].exp(), t[3].exp(), list(t[:3]), xhats[:3])
    close(got, flow(t[3]), atol=1e-12)


def test_schedules_end_where_they_say():
    x = pfgm.sample_prior((50, 3, 8, 8), 40.0, 400.0, generator=seeded(), dtype=F64)
    for name in pfgm.SCHEDULES:
        grid = pfgm.schedule(name, x, 40.0, 0.5, 9)
        assert grid.shape == (10, 50) and (grid[1:] < grid[:-1]).all()
        close(grid[0], 40.0 + 0 * grid[0], rtol=1e-12)
        if name != 'radius':
            close(grid[-1], 0.5 + 0 * grid[-1], rtol=1e-12)
    # a point at the last plane's distance from a charge it is bound for: d^2 = (N + 1) 0.5^2
    distance = torch.hypot(x.flatten(1).norm(dim=1), torch.tensor(40.0, dtype=F64))
    close(pfgm.schedule('radius', x, 40.0, 0.5, 9)[-1] * distance / 40, 0.5 * 193 ** 0.5 + 0 * distance,
          rtol=1e-12)
    close(pfgm.schedule('radius', x, 40.0, 0.5, 9, D=math.inf), pfgm.schedule('log', x, 40.0, 0.5, 9))
    with pytest.raises(ValueError, match='linear'):
        pfgm.schedule('linear', x, 40.0, 0.5, 9)


def test_unipc_finds_the_right_image_in_few_calls():
    """The bench of --solver_bench on 300 glyphs: the share of right ends at 5, 10 and 20 calls."""
    charges = data.to_float(data.load('glyphs').pixels[:300]).double()
    x = pfgm.sample_prior((128, 1, 16, 16), 40.0, 800.0, generator=seeded(), dtype=F64)
    def ends(*how, **more):
        out, _ = pfgm.sample_ode(ExactField(charges), x, 40.0, *how, z_exp=0, **more)
        return torch.cdist(out.flatten(1), charges.flatten(1)).argmin(1)
    right, z_last = ends(1e-3, rtol=1e-7, atol=1e-7), pfgm.deciding_z(charges)
    for nfe, least in ((5, 0.88), (10, 0.97), (20, 0.99)):
        share = {solver: (ends(z_last, solver, nfe, schedule_name='radius', to_data=True)
                          == right).double().mean() for solver in ('euler', 'unipc')}

        assert share['unipc'] >= least and share['unipc'] > share['euler']


# ---------------------------------------------------------------- any D

@pytest.mark.parametrize('D', [1, 2, 128, math.inf])
def test_kernel_quantiles(D):
    N, z = 48, torch.full((20000,), 3.0, dtype=F64)
    r2 = pfgm.kernel((20000, N), z, D, seeded()).square().sum(1).numpy() / 9
    law = stats.chi2(N) if D == math.inf else stats.betaprime(N / 2, D / 2)
    assert stats.kstest(r2, law.cdf).pvalue > 0.01


class Linear(torch.nn.Module):
    """A stand-in for a U-Net: F = x sin(c_noise) + class."""

    def forward(self, x, z, labels=None):
        shift = 0 if labels is None else labels.to(x).view(-1, 1, 1, 1)
        return x * z.sin().view(-1, 1, 1, 1) + shift, z


def test_d_inf_is_edm_and_large_d_converges_to_it():
    x = 3 * torch.randn(6, 3, 8, 8, generator=seeded(), dtype=F64)
    sigma = torch.tensor([0.002, 0.05, 0.5, 2.0, 10.0, 80.0], dtype=F64)
    v_x, v_z = baselines.Denoiser(Linear())(x, sigma)
    s = sigma.view(-1, 1, 1, 1)  # EDM Table 1, sigma_data 0.5
    c_skip, c_out = 0.25 / (s ** 2 + 0.25), s * 0.5 / (s ** 2 + 0.25).sqrt()
    xhat = c_skip * x + c_out * Linear()(x / (s ** 2 + 0.25).sqrt(), sigma.log() / 4)[0]
    close(x + v_x, xhat, rtol=1e-12, atol=1e-12)
    close(v_z, -sigma)
    close(baselines.Denoiser(Linear()).weight(x, sigma), (sigma ** 2 + 0.25) / (sigma / 2) ** 2, rtol=1e-12)
    close(pfgm.drift(baselines.Denoiser(Linear()), x, sigma, z_exp=0), x - xhat, rtol=1e-9, atol=1e-12)
    y = torch.randn(9, 3, 8, 8, generator=seeded(1), dtype=F64)
    for D, atol in ((1e4, 6), (1e6, 6e-2), (1e8, 6e-4)):
        z = sigma * math.sqrt(D)
        noisy = y[:6] + s * torch.randn(6, 3, 8, 8, generator=seeded(2), dtype=F64)
        close(baselines.Denoiser(Linear(), D)(noisy, z)[0], baselines.Denoiser(Linear())(noisy, sigma)[0], atol=atol)
        close(pfgm.posterior_mean(noisy, z, y, D), pfgm.posterior_mean(noisy, sigma, y, math.inf), atol=atol)
        a, b = (pfgm.kernel((6, 3, 8, 8), scale, d, seeded(3)) for scale, d in ((z, D), (sigma, math.inf)))
        close(a / s, b / s, rtol=10 * D ** -0.5)


@pytest.mark.parametrize('D', [1, 2, 128])
def test_inputs_stay_bounded_under_heavy_tails(D):
    seen = []
    class Watch(Linear):
        def forward(self, x, z):
            seen.append(x.flatten(1).square().sum(1).max())
            return super().forward(x, z)
    flow, N = baselines.Denoiser(Watch(), D), 192
    y = torch.rand(20000, 3, 8, 8, generator=seeded()) * 2 - 1
    z = flow.draw(len(y), seeded(1))
    x = y + pfgm.kernel(y.shape, z, D, seeded(2))
    v_x, _ = flow(x, z)
    assert v_x.isfinite().all() and flow.weight(x, z).isfinite().all()
    assert x.abs().max() > (300 if D < 3 else 10)  # the tails are there
    assert seen[0] <= 1.01 * max(4 * N, N + D)


def gaussian_rival(method, spread=0.6, mean=0.0):
    """The flow of D = inf of data N(mean, spread^2), from the network output that is exact for it."""
    flow = baselines.METHODS[method](None)
    def F(x, c_noise, labels=None):
        t = c_noise / getattr(flow, 'scale', 0.25)
        z = t.exp() if method == 'pfgmpp' else flow.z_of(1 - t if method == 'rf' else t)
        c_skip, c_out, c_in, _ = flow.coefficients(z)
        xhat = mean + spread ** 2 / (spread ** 2 + z ** 2) * (x.flatten(1).T / c_in - mean)
        return ((xhat - c_skip * x.flatten(1).T / c_in) / c_out).T.view_as(x), None
    flow.net = F
    return flow


RIVALS = [name for name in baselines.METHODS if not name.startswith('pfgm')]


@pytest.mark.parametrize('method', RIVALS)
def test_rival_flows_of_a_gaussian_are_exact(method):
    flow, spread = gaussian_rival(method), 0.6
    z_min, z_max = flow.low, flow.high
    x = pfgm.sample_prior((5, 6), z_max, D=math.inf, generator=seeded(), dtype=F64)
    shrink = math.sqrt((spread ** 2 + z_min ** 2) / (spread ** 2 + z_max ** 2))
    tight = dict(z_exp=0, rtol=1e-9, atol=1e-9)
    end, _ = pfgm.sample_ode(flow, x, z_max, z_min, **tight)
    close(end, x * shrink, atol=1e-5)
    got = pfgm.log_likelihood(flow, end, z_min, z_max, 'exact', D=math.inf, **tight)
    normal = torch.distributions.Normal(0, math.sqrt(spread ** 2 + z_min ** 2))
    top = torch.distributions.Normal(0, math.sqrt(spread ** 2 + z_max ** 2))
    gap = top.log_prob(got.latent).sum(1) - pfgm.prior_logp(got.latent, z_max, math.inf)
    close(got.logp + gap, normal.log_prob(end).sum(1), atol=1e-5)
    for solver, schedule, atol in (('unipc', 'log', 0.01), ('euler', flow.planes, 0.3)):
        few, nfe = pfgm.sample_ode(flow, x, z_max, z_min, solver, 40, D=math.inf, z_exp=0,
                                   schedule_name=schedule)
        assert nfe == 40
        close(few, end, atol=atol)


def test_the_time_of_each_rival():
    """z(t) against the papers' own formulas, and t(z) inverting it."""
    t = torch.linspace(1e-3, 1, 20, dtype=F64)
    lmc = -0.25 * t ** 2 * 19.9 - 0.05 * t  # log mean coefficient, arXiv 2011.13456
    alpha = lmc.exp()
    for name, z in (('vp', (1 - alpha ** 2).sqrt() / alpha), ('subvp', (1 - alpha ** 2) / alpha)):
        flow = baselines.METHODS[name](None)
        close(flow.z_of(t), z, rtol=1e-9)
        close(flow.t_of(z), t, rtol=1e-9)
        close(flow.alpha(z), alpha, rtol=1e-9)
        close(flow.planes(z[-1].item(), z[0].item(), 19), z.flip(0), rtol=1e-9)
    bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=F64), 0)
    flow, levels = baselines.METHODS['ddpm'](None), torch.arange(1000, dtype=F64)
    close(flow.z_of(levels), ((1 - bar) / bar).sqrt(), rtol=1e-9)
    close(flow.t_of(((1 - bar) / bar).sqrt()), levels, atol=1e-6)
    close(flow.coefficients(flow.z_of(levels))[3], levels, atol=1e-6)
    rf, y, eps = baselines.METHODS['rf'](None), torch.randn(20, dtype=F64), torch.randn(20, dtype=F64)
    z = rf.z_of(1 - t[:-1])
    c_skip, c_out, c_in, c_noise = rf.coefficients(z)
    y, eps = y[:-1], eps[:-1]
    close(c_in * (y + z * eps), t[:-1] * y + (1 - t[:-1]) * eps, atol=1e-12)
    close((y - c_skip * (y + z * eps)) / c_out, y - eps, atol=1e-9)
    close(c_noise, 999 * t[:-1], atol=1e-9)


@pytest.mark.parametrize('eta', [0.0, 0.5, 1.0])
def test_ddim_keeps_the_variance_of_a_gaussian(eta):
    flow, spread = gaussian_rival('ddpm'), 0.6
    x = pfgm.sample_prior((20000, 1), flow.high, D=math.inf, generator=seeded(), dtype=F64)
    generator = seeded(1)
    solver = baselines.ancestral(eta, lambda i: torch.randn(x.shape, generator=generator, dtype=F64))
    out, nfe = pfgm.sample_ode(flow, x, flow.high, flow.low, solver, 999, z_exp=0, schedule_name=flow.planes)
    assert nfe == 999 and stats.kstest(out[:, 0].numpy() / math.hypot(spread, flow.low), 'norm').pvalue > 0.01
    if eta == 0:
        close(out, pfgm.sample_ode(flow, x, flow.high, flow.low, 'euler', 999, z_exp=0,
                                   schedule_name=flow.planes)[0], atol=1e-9)


@pytest.mark.parametrize('eta', [0.0, 0.5, 1.0])
@pytest.mark.parametrize('method', ['vp', 'subvp', 'pfgmpp'])
def test_stochastic_samplers_have_the_mean_and_variance_of_a_gaussian(method, eta):
    """--solver ddim --eta, VP-SDE and sub-VP-SDE of the tables: x_(i+1) - m = A_i (x_i - m) + s_i noise
    is known in closed form where the data are N(m, s^2), and of 1000 steps the law is the data's."""
    m, s = -0.3, 0.6
    flow, steps = gaussian_rival(method, s, m), 1000
    planes = getattr(flow, 'planes', None) or (lambda z_from, z_to, steps: pfgm.schedule(
        'rho7', torch.zeros(1, 1), z_from, z_to, steps)[:, 0])
    z = planes(flow.high, flow.low, steps)
    fresh = eta * z[1:] * (1 - (z[1:] / z[:-1]) ** 2).sqrt()
    kept = (z[1:] ** 2 - fresh ** 2).sqrt() / z[:-1]
    towards = z[:-1] ** 2 / (s ** 2 + z[:-1] ** 2)                  # (x - xhat) / (x - m)
    mean, var = torch.tensor(-m, dtype=F64), torch.tensor(flow.high ** 2, dtype=F64)
    for A, noise in zip(1 + (kept - 1) * towards, fresh):
        mean, var = A * mean, A ** 2 * var + noise ** 2
    close(mean, 0, atol=0.01)
    close(var.sqrt(), math.hypot(s, flow.low), rtol=0.01)
    n, generator = 20000, seeded(1)
    x = pfgm.sample_prior((n, 1), flow.high, D=math.inf, generator=seeded(), dtype=F64)
    solver = baselines.ancestral(eta, lambda i: torch.randn(x.shape, generator=generator, dtype=F64))
    x, nfe = pfgm.sample_ode(flow, x, flow.high, flow.low, solver, steps, z_exp=0, schedule_name=planes)
    assert nfe == steps
    close(x.mean(), m + mean, atol=4 * s / n ** 0.5)
    close(x.var() / var, 1, atol=4 * (2 / n) ** 0.5)


def test_classes_have_fields_of_their_own_and_guidance_mixes_them():
    charges, kinds = torch.randn(12, 5, generator=seeded(), dtype=F64), torch.arange(12) % 3
    x, z = torch.randn(4, 5, generator=seeded(1), dtype=F64), torch.tensor([0.1, 0.5, 1, 9.], dtype=F64)
    labels = torch.tensor([0, 2, 1, 1])
    mixed = pfgm.poisson_field(x, z, charges, among=labels[:, None] == kinds)
    for i, k in enumerate(labels):
        alone = pfgm.poisson_field(x[i:i + 1], z[i:i + 1], charges[kinds == k])
        close(mixed[0][i], alone[0][0], atol=1e-12)
        close(mixed[1][i], alone[1][0], atol=1e-12)
    net, x = baselines.Denoiser(Linear()), torch.randn(4, 1, 4, 4, generator=seeded(2), dtype=F64)
    def f(*how):
        return pfgm.drift(net, x, z, 5.0, 0.0, 'exact', *how)
    none = f(torch.full((4,), -1))
    close(f(labels, 0.0), none)
    close(f(labels, 2.5), none + 2.5 * (f(labels) - none), atol=1e-12)
    together, _ = pfgm.sample_ode(net, x, 40.0, 0.01, z_exp=0, labels=labels, each=True)
    for i in range(4):  # the solvers of a batch leave it one by one, each with its own label
        alone, _ = pfgm.sample_ode(net, x[i:i + 1], 40.0, 0.01, z_exp=0, labels=labels[i:i + 1], each=True)
        close(together[i], alone[0], atol=1e-9)


def test_rk45_steps_of_a_sample_do_not_depend_on_its_batch():
    charges = torch.randn(9, 16, generator=seeded(), dtype=F64)
    x, net = pfgm.sample_prior((6, 16), 30.0, 500.0, generator=seeded(1), dtype=F64), ExactField(charges)
    whole, nfe = pfgm.sample_ode(net, x, 30.0, 1e-3, each=True)
    for part in ([0, 1], [4], [5, 3]):
        out, _ = pfgm.sample_ode(net, x[part], 30.0, 1e-3, each=True)
        close(out, whole[part], atol=1e-8)
    together, _ = pfgm.sample_ode(net, x, 30.0, 1e-3)
    close(whole, together, atol=5e-3)


def one_by_one(net):
    """The same field, whose rounding does not depend on the batch."""
    def each(x, z):
        parts = [net(x[i:i + 1], z[i:i + 1]) for i in range(len(x))]
        return tuple(map(torch.cat, zip(*parts)))
    return each


@golden
@pytest.mark.parametrize('z_from, z_to, least', [(40.0, 1e-3, 1e-12), (1e-3, 40.0, 1e-11)])
def test_rk45_takes_the_steps_of_scipy_on_each_image_alone(z_from, z_to, least, monkeypatch):
    """Equal to 1e-12 where sums are made in scipy's order; the error estimate, which cancels to a
    1e-4 of its terms, makes other orders differ by 1e-8."""
    ref = np.load(GOLDEN / 'ode.npz')
    net = one_by_one(ExactField(torch.from_numpy(ref['data_points']).double()))
    x = torch.from_numpy(ref['x_init']).double()[:16]
    if z_to > z_from:
        x = pfgm.sample_ode(net, x, z_to, z_from, z_exp=5)[0]
    want = []
    for one in x:
        def f(log_z, y):
            y = torch.from_numpy(y).view(1, *one.shape)
            return pfgm.drift(net, y, y.new_full((1,), math.exp(log_z)), z_exp=5).numpy().ravel()
        want.append(integrate.solve_ivp(f, (math.log(z_from), math.log(z_to)), one.numpy().ravel(),
                                        rtol=1e-4, atol=1e-4))

    def check(tolerance):
        states = [[] for _ in x]
        def keep(z, x):
            for found, z_i, x_i in zip(states, z.tolist(), x):
                if not found or found[-1][0] != z_i:  # else its step was rejected, or it has arrived
                    found.append((z_i, x_i))
        _, nfe = pfgm.sample_ode(net, x, z_from, z_to, z_exp=5, each=True, callback=keep)
        assert nfe == max(w.nfev for w in want)
        for found, w in zip(states, want):
            assert len(found) == len(w.t) - 1
            close([z for z, _ in found], np.exp(w.t[1:]), rtol=tolerance)
            close(torch.stack([x for _, x in found]).flatten(1), w.y.T[1:], tolerance, tolerance)
    check(1e-6)
    monkeypatch.setattr(torch, 'mv', lambda A, b: torch.from_numpy(np.dot(A.numpy(), b.numpy())))
    monkeypatch.setattr(torch, 'addcmul', lambda y, h, slope: y + h * slope)
    check(least)


@pytest.mark.parametrize('each', [False, True])
def test_rk45_that_cannot_go_on_says_where(each):
    def net(x, z):
        return torch.where(z[:, None] < 1, math.nan, x), -torch.ones(len(x))
    with pytest.raises(pfgm.SolverError, match=r'z = (0\.9|1)'):
        pfgm.sample_ode(net, torch.ones(3, 2), 10.0, 0.1, each=each, z_exp=0)
    with pytest.raises(ValueError, match='rk4'):
        pfgm.sample_ode(net, torch.ones(3, 2), 10.0, 0.1, 'rk4')


# ---------------------------------------------------------------- network and checkpoints

PARAMETERS = [({}, 61_805_572), (dict(num_blocks=8), 106_633_732), (dict(image_size=64), 61_805_572),
              (dict(image_size=256, ch_mult=(1, 1, 2, 2, 4, 4), num_blocks=2), 124_076_292)]


@pytest.mark.parametrize('kw, count', PARAMETERS)
def test_published_networks_have_their_number_of_parameters(kw, count):
    with torch.device('meta'):
        assert sum(p.numel() for p in unet.UNet(**kw).parameters()) == count


@pytest.mark.parametrize('p', [0.1, 0.13, 0.9])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_dropout_drops_each_element_with_probability_p(p, dtype):
    h = torch.ones(10, 64, 33, 47, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    torch.manual_seed(1)
    dropout = launch.speed_up(torch.nn.Sequential(torch.nn.Dropout(p)))
    y, again = dropout(h), dropout(h)
    y.sum().backward()
    kept = y != 0
    assert torch.equal(y, kept.to(dtype) * (1 / (1 - p))) and torch.equal(h.grad, y)
    for dropped, rate in ((~kept, p), (~kept & (again == 0), p * p),
                          (~kept[..., 1:] & ~kept[..., :-1], p * p), (~kept[:, 1:] & ~kept[:, :-1], p * p)):
        close(dropped.double().mean(), rate, atol=6 * (rate / dropped.numel()) ** 0.5)
    torch.manual_seed(1)
    assert torch.equal(dropout(h), y) and torch.equal(dropout.eval()(h), h)


@pytest.mark.parametrize('dtype, tolerance', [(F64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize('shape', [(3, 512, 4, 4), (2, 32, 32, 32), (2, 24, 33, 32)])
def test_group_norm_with_channels_last_has_the_gradients_of_group_norm(shape, dtype, tolerance):
    layer, = launch.speed_up(torch.nn.Sequential(unet.norm(shape[1]))).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p, generator=seeded())
    x, dy = (torch.randn(shape, generator=seeded(k), dtype=F64).to(dtype) for k in (1, 2))

    def grads(forward, x, dy):
        x = x.clone().requires_grad_(True)
        y = forward(layer, x)
        return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy)]
    want = grads(torch.nn.GroupNorm.forward, x.double(), dy.double())
    layer.to(torch.promote_types(dtype, torch.float32))
    got = grads(launch.GroupNorm.forward, *(a.to(memory_format=torch.channels_last) for a in (x, dy)))
    assert got[1].is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(got, want):
        assert (a - b).norm() <= tolerance * b.norm()


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
        std, largest, n = float(std), float(largest), int(n)
        assert abs(float(p.detach().std(correction=0)) - std) <= 4 * std / math.sqrt(n), ours
        assert abs(float(p.detach().abs().max()) - largest) <= 0.05 * largest, ours


@golden
@pytest.mark.parametrize('file', ['ckpt_cifar10_tiny.pth', 'ckpt_cifar10_tiny_legacy.pth'])
@pytest.mark.parametrize('weights', ['ema', 'raw'])
def test_official_checkpoints_give_the_authors_outputs(file, weights):
    io_ = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / 'io_cifar10_tiny.npz').items()}
    net, args = checkpoint.load_checkpoint(GOLDEN / file, weights)
    assert (args['image_size'], args['nf'], args['num_blocks']) == (32, 16, 1)
    with torch.no_grad():
        for far in ('', '_far'):
            v_x, v_z = net(io_['x' + far], io_['z' + far])
            close(v_x, io_[f'{weights}_out_x{far}'], atol=5e-5)
            close(v_z, io_[f'{weights}_out_z{far}'], atol=5e-5)


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


def test_official_checkpoint_is_read_whole(tmp_path):
    net = tiny_official(tmp_path / 'a.pth')
    saved = checkpoint.read_checkpoint(tmp_path / 'a.pth')
    for i, (name, p) in enumerate(net.named_parameters()):
        close(saved['net'][name], p.detach() + 0.01)
        close(saved['ema'][name], (p.detach() + 0.01) * 2)
        close(saved['opt']['state'][i]['exp_avg'], (p.detach() + 0.01) * 6)
    torch.optim.Adam(net.parameters()).load_state_dict(saved['opt'])


def test_pruned_and_averaged_checkpoints_load(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    a = torch.load(trained / 'ckpt.pt', weights_only=True)
    torch.save({**a, 'ema': {k: v + 1 for k, v in a['ema'].items()}}, 'b.pt')
    script(['checkpoint.py', *[str(trained / 'ckpt.pt'), '--out', 'ema.pt']])
    script(['checkpoint.py', *[str(trained / 'ckpt.pt'), 'b.pt', '--out', 'mean.pt']])
    for path, shift in (('ema.pt', 0.0), ('mean.pt', 0.5)):
        net, _ = checkpoint.load_checkpoint(path)
        for k, v in net.state_dict().items():
            close(v, a['ema'][k] + shift, atol=1e-6)
    assert os.path.getsize('ema.pt') < 0.4 * os.path.getsize('b.pt')
    refuses(['sample.py', '--ckpt', 'ema.pt', '--weights', 'raw'], 'holds the EMA only')
    os.mkdir('o')
    os.rename('ema.pt', 'o/ckpt.pt')
    refuses(['train.py', *TINY, '--steps', 20, '--out_dir', 'o'], 'holds the EMA only')
    for bad in (['no.pt', '--out', 'c.pt'], ['b.pt', '--out', 'mean.pt']):
        with pytest.raises(SystemExit):
            script(['checkpoint.py', *bad])
    assert sorted(os.listdir('.')) == ['b.pt', 'mean.pt', 'o']


class Payload:
    def __reduce__(self):
        return os.system, ('touch hacked',)


def rename(saved):
    saved['model']['module.all_modules.3.Conv_9.weight'] = saved['model'].pop(
        'module.all_modules.3.Conv_0.weight')


def transpose(saved):
    key = 'module.all_modules.5.Conv_0.weight'
    saved['model'][key] = saved['model'][key].transpose(0, 1).clone()


DAMAGE = {
    'renamed': (rename, '3.Conv_0.weight is missing; .*3.Conv_9.weight does not belong'),
    'missing': (lambda s: s['model'].pop('module.all_modules.2.bias'), '2.bias is missing'),
    'transposed': (transpose, r'5.Conv_0.weight is \(8, 16, 3, 3\), expected \(16, 8, 3, 3\)'),
    'short ema': (lambda s: s['ema']['shadow_params'].pop(), 'shadow_params'),
    'payload': (lambda s: s.update(extra=Payload()), 'not a checkpoint of tensors'),
    'not ours': (lambda s: s.pop('model'), 'not a checkpoint of train.py'),
}


@pytest.mark.parametrize('kind', DAMAGE)
def test_damaged_checkpoints_are_named_in_one_line(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change, message = DAMAGE[kind]
    tiny_official('a.pth', change)
    refuses(['sample.py', '--ckpt', 'a.pth', '--device', 'cpu'], message)
    assert sorted(os.listdir('.')) == ['a.pth']  # nothing ran, nothing was written


def test_truncated_and_absent_checkpoints(tmp_path):
    tiny_official(tmp_path / 'a.pth')
    whole = (tmp_path / 'a.pth').read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / 'a.pth').write_bytes(whole[:size])
        refuses(['sample.py', '--ckpt', str(tmp_path / 'a.pth')], 'damaged')
    refuses(['sample.py', '--ckpt', str(tmp_path / 'b.pth')], 'no such file; make one with')


# ---------------------------------------------------------------- the scripts

SCRIPTS = dict(train=train, sample=sample, evaluate=evaluate, checkpoint=checkpoint)
data.glyphs = functools.lru_cache(data.glyphs)  # drawn once for all tests
TINY = '--nf 8 --ch_mult 1 1 --attn 8 --batch_size 8 --field_batch 64 --log_every 1 --warmup 3 ' \
       '--sample_every 0 --device cpu --no-bf16'.split()


def script(command):
    """Run a command line in this process; a list of words, the first a script."""
    module = SCRIPTS[command[0].removesuffix('.py')]
    run(module.main, module.parse_args([str(word) for word in command[1:]]))


def refuses(command, message):
    """The command ends with exit code 2 and one line on stderr that matches `message`."""
    stderr, sys.stderr = sys.stderr, io.StringIO()
    try:
        with pytest.raises(SystemExit) as stop:
            script(command)
        text = sys.stderr.getvalue()
    finally:
        sys.stderr = stderr
    assert stop.value.code == 2 and text.count('\n') == 1, text
    assert re.search(message, text), text


def losses(folder):
    return [json.loads(line)['loss'] for line in open(Path(folder) / 'log.jsonl')]


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A run of 10 steps on glyphs."""
    out = tmp_path_factory.mktemp('run') / 'out'
    script(['train.py', *TINY, '--steps', 10, '--dropout', 0.1, '--out_dir', out])
    return out


def test_ten_steps_equal_five_and_five(trained, tmp_path):
    for steps in (5, 10):
        script(['train.py', *TINY, '--steps', steps, '--dropout', 0.1, '--out_dir', tmp_path / 'o'])
    a, b = (torch.load(d / 'ckpt.pt', weights_only=True) for d in (trained, tmp_path / 'o'))
    assert a['step'] == b['step'] == 10 and losses(trained) == losses(tmp_path / 'o')
    for part in ('net', 'ema'):
        assert a[part].keys() == b[part].keys()
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part])
    for i, state in a['opt']['state'].items():
        assert all(torch.equal(v, b['opt']['state'][i][k]) for k, v in state.items())
    assert all(torch.equal(x, y) for x, y in zip(a['rng'][0], b['rng'][0]))


def test_two_processes_follow_the_loss_of_one(tmp_path):
    command = [*TINY, '--steps', 4, '--dropout', 0]
    script(['train.py', *command, '--out_dir', tmp_path / 'one'])
    subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', HERE /
                    'train.py', *map(str, command), '--out_dir', tmp_path / 'two'], check=True,
                   capture_output=True)
    close(losses(tmp_path / 'two'), losses(tmp_path / 'one'), rtol=1e-5)
    script(['train.py', *command, '--out_dir', tmp_path / 'half', '--accum', 2])
    close(losses(tmp_path / 'half'), losses(tmp_path / 'one'), rtol=1e-5)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves(tmp_path, number):
    p = subprocess.Popen([sys.executable, HERE / 'train.py', *TINY, '--steps', '100000',
                          '--out_dir', tmp_path / 'o'], stdout=subprocess.PIPE, text=True)
    for line in p.stdout:
        if line.startswith('step 3/'):
            p.send_signal(number)
            break
    rest = p.stdout.read()
    assert p.wait() == 0 and 'saved' in rest
    step = torch.load(tmp_path / 'o' / 'ckpt.pt', weights_only=True)['step']
    assert step == len(losses(tmp_path / 'o')) >= 3


def test_nan_stops_with_the_step_and_keeps_the_checkpoint(tmp_path):
    script(['train.py', *TINY, '--steps', 2, '--out_dir', tmp_path])
    before = (tmp_path / 'ckpt.pt').read_bytes()
    saved = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
    saved['net']['conv_in.bias'][:] = math.nan
    torch.save(saved, tmp_path / 'ckpt.pt')
    before = (tmp_path / 'ckpt.pt').read_bytes()
    refuses(['train.py', *TINY, '--steps', 9, '--out_dir', tmp_path],
            r'step 3: .*images (\d+ at z = [\d.e-]+, ){7}\d+ at z')
    assert (tmp_path / 'ckpt.pt').read_bytes() == before


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='no /dev/full on this system')
def test_full_disk_leaves_the_old_checkpoint(trained, tmp_path, monkeypatch):
    script(['train.py', *TINY, '--steps', 1, '--out_dir', tmp_path])
    before = (tmp_path / 'ckpt.pt').read_bytes()
    (tmp_path / 'ckpt.pt.part').symlink_to('/dev/full')
    refuses(['train.py', *TINY, '--steps', 2, '--out_dir', tmp_path], 'is intact')
    assert (tmp_path / 'ckpt.pt').read_bytes() == before


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(tmp_path, capfd):
    command = ['train.py', *TINY, '--save_every', 2, '--out_dir', tmp_path / 'o']
    script([*command, '--steps', 6])
    assert sorted(p.name for p in (tmp_path / 'o').glob('*.pt')) == ['ckpt-0000004.pt', 'ckpt.pt']
    whole, want = (tmp_path / 'o' / 'ckpt.pt').read_bytes(), losses(tmp_path / 'o')
    (tmp_path / 'o' / 'ckpt.pt').unlink()
    (tmp_path / 'o' / 'ckpt.pt').write_bytes(whole[:9000])
    script([*command, '--steps', 6])
    assert re.search(r'o/ckpt.pt: damaged.*going back to .*ckpt-0000004.pt', capfd.readouterr().err)
    assert losses(tmp_path / 'o') == want
    a, b = (torch.load(io.BytesIO(f), weights_only=True)['net'] for f in
            (whole, (tmp_path / 'o' / 'ckpt.pt').read_bytes()))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_two_runs_on_one_folder_and_sigusr1(tmp_path):
    command = [*TINY, '--steps', '100000', '--out_dir', tmp_path / 'o']
    p = subprocess.Popen([sys.executable, HERE / 'train.py', *command], text=True,
                         stdout=subprocess.PIPE)
    for line in p.stdout:
        if line.startswith('step 3/'):
            break
    refuses(['train.py', *command], 'another run is using it')
    p.send_signal(signal.SIGUSR1)
    while not (tmp_path / 'o' / 'ckpt.pt').exists():
        assert p.poll() is None
        time.sleep(0.05)
    p.kill()
    p.wait()
    assert torch.load(tmp_path / 'o' / 'ckpt.pt', weights_only=True)['step'] >= 3


def test_a_slow_file_system_without_links_and_locks(tmp_path, monkeypatch, capsys):
    """As network file systems can be: every write takes its time, and may be the last."""
    import fcntl

    def absent(*args):
        raise OSError('not supported')
    writes, writing = [], torch.save

    def slow(saved, file):  # the third one is cut off half way
        data = io.BytesIO()
        writing(saved, data)
        writes.append(file.name)
        half = len(data.getvalue()) // 2
        file.write(data.getvalue()[:half])
        file.flush()
        time.sleep(0.1)
        if len(writes) == 3:
            raise OSError('stale file handle')
        file.write(data.getvalue()[half:])
    monkeypatch.setattr(os, 'link', absent)
    monkeypatch.setattr(fcntl, 'flock', absent)
    monkeypatch.setattr(torch, 'save', slow)
    command = ['train.py', *TINY, '--save_every', 2, '--steps', 8, '--keep', 3, '--out_dir', tmp_path]
    with pytest.raises(SystemExit):
        script(command)
    said = capsys.readouterr().err
    assert 'cannot be locked (not supported)' in said and said.count('\n') == 2
    assert 'ckpt.pt: cannot be written (stale file handle); the one of before is intact' in said
    assert checkpoint.read_checkpoint(tmp_path / 'ckpt.pt')['step'] == 4
    script(command)
    kept = sorted(path.name for path in tmp_path.glob('*.pt*'))
    assert kept == ['ckpt-0000004.pt', 'ckpt-0000006.pt', 'ckpt.pt']
    assert [checkpoint.read_checkpoint(tmp_path / name)['step'] for name in kept] == [4, 6, 8]


def test_a_spike_is_logged(trained, capsys):
    args = train.parse_args(['--steps', '9', '--warmup', '1', '--lr', '1', '--batch_size', '2'])
    meter = train.new_meter('cpu')
    for step, loss in enumerate([1., 1., 1., 1., 1., 1., 1., 1., 90.], 1):
        train.observe(meter, step, torch.ones(2), torch.full((2,), loss), torch.ones(()))
    row = train.progress(args, 9, meter, 18, 1.0, torch.device('cpu'))
    assert row['peak_step'] == 9 and 'spike 90 at step 9' in capsys.readouterr().out


BAD_TRAIN = [
    ('--dataset nothing_here', 'no such data set'), ('--image_size 15', 'multiple of 2'),
    ('--steps 0', 'must be a whole number above 0'), ('--lr nan', 'must be a number above 0'),
    ('--batch_size 8 --accum 3', 'multiple of'), ('--field_batch 4', 'at least --batch_size'),
    ('--nf 30', 'take a multiple'), ('--z_min 1e9', 'must be below --z_max'),
    ('--device cuda:7', '--device cuda:7: not on this machine'), ('--device tpu9', 'not on this'),
    ('--data x', 'unrecognized'), ('--dropout 1', 'below 1'), ('--out_dir /dev/null/x', 'cannot write'), ('--init_from no.pth', 'no such file'),
]


@pytest.mark.parametrize('flags, message', BAD_TRAIN)
def test_bad_training_flags(flags, message, tmp_path):
    refuses(['train.py', *TINY, '--out_dir', tmp_path / 'o', *flags.split()], message)
    assert not (tmp_path / 'o').exists()


def test_a_folder_in_use_is_not_overwritten(trained, tmp_path):
    before = (trained / 'ckpt.pt').read_bytes()
    Image.new('L', (16, 16)).save(tmp_path / 'a.png')
    refuses(['train.py', *TINY, '--dataset', tmp_path, '--out_dir', trained], 'holds a run on glyphs')
    refuses(['train.py', *TINY, '--out_dir', tmp_path], 'not empty')
    for name in ('b', 'b/c'):  # but folders of other runs may be in it
        script(['train.py', *TINY, '--steps', 1, '--out_dir', tmp_path / 'runs' / name])
    script(['train.py', *TINY, '--steps', 1, '--out_dir', tmp_path / 'runs'])
    (tmp_path / 'photos' / 'cats').mkdir(parents=True)
    refuses(['train.py', *TINY, '--out_dir', tmp_path / 'photos'], 'not empty')
    refuses(['train.py', *TINY, '--out_dir', trained, '--steps', 20, '--ema_decay', 0.5], '--ema_decay 0.5: the run')
    refuses(['train.py', *TINY, '--out_dir', trained, '--steps', 20, '--nf', 16], '--nf 16: the run')
    refuses(['train.py', *TINY, '--out_dir', trained, '--steps', 10], 'has 10 already')
    assert (trained / 'ckpt.pt').read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ['a.png', 'photos', 'runs']


def test_official_moments_serve_fused_adam_as_they_serve_plain_adam(tmp_path):
    tiny_official(tmp_path / 'a.pth')
    after = []
    for fused in (True, False):
        saved = checkpoint.read_checkpoint(tmp_path / 'a.pth')
        net = checkpoint.build(saved['net'], saved['args'], 'a.pth').to(memory_format=torch.channels_last)
        opt = torch.optim.Adam(net.parameters())
        train.restore(opt, saved, torch.device('cpu'), 0)
        assert all(state[k].stride() == p.stride() for p, state in opt.state.items()
                   for k in ('exp_avg', 'exp_avg_sq')) and opt.param_groups[0]['fused']
        opt.param_groups[0].update(fused=fused, lr=0.1)
        for i, p in enumerate(net.parameters()):
            p.grad = torch.empty_like(p).normal_(generator=torch.Generator().manual_seed(i))
        opt.step()
        after.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    close(after[0], after[1], atol=1e-6)


def test_compile_without_a_compiler_ends_in_one_line(trained, tmp_path):
    done = subprocess.run(
        [sys.executable, HERE / 'sample.py', '--ckpt', trained / 'ckpt.pt', '--n', '1', '--nfe', '1',
         '--compile'], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, 'CXX': 'no_such_compiler', 'TORCHINDUCTOR_CACHE_DIR': str(tmp_path / 'c')})
    assert done.returncode == 2 and not (tmp_path / 'samples.png').exists(), done.stderr
    assert done.stderr.startswith('--compile: ') and done.stderr.count('\n') == 1


@pytest.mark.slow
def test_compiled_network_makes_the_same_images(trained, tmp_path):
    flags = ['sample.py', '--ckpt', trained / 'ckpt.pt', '--n', 5, '--nfe', 4, '--batch_size', 4,
             '--device', 'cpu', '--no-bf16', '--out']
    script([*flags, tmp_path / 'a.npz'])
    script([*flags, tmp_path / 'b.npz', '--compile'])
    a, b = (np.load(tmp_path / f'{k}.npz')['arr_0'].astype(int) for k in 'ab')
    assert abs(a - b).max() <= 1
    refuses([*flags, tmp_path / 'c.npz', '--exact', '--compile'], '--compile: --exact has no network')


def test_official_checkpoint_trains_on(tmp_path):
    tiny_official(tmp_path / 'a.pth')
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / 'd.npz', x=pixels)
    script(['train.py', '--dataset', tmp_path / 'd.npz', '--init_from', tmp_path / 'a.pth',
            '--out_dir', tmp_path / 'o', '--steps', 9, '--batch_size', 4, '--field_batch', 8,
            '--sample_every', 0, '--device', 'cpu'])
    saved = torch.load(tmp_path / 'o' / 'ckpt.pt', weights_only=True)
    assert saved['step'] == 9 and saved['args']['nf'] == 8 and saved['opt']['state'][0]['step'] == 9


# ---------------------------------------------------------------- killed, stopped, restarted

def start(command, processes=0, **flags):
    """A training process, or torchrun with several, with its output as text."""
    launch = ['-m', 'torch.distributed.run', f'--nproc_per_node={processes}',
              *(f'--{k}={v}' for k, v in flags.items())] if processes else []
    return subprocess.Popen([sys.executable, *launch, HERE / 'train.py', *map(str, command)],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until(p, text):
    for line in p.stdout:
        if text in line:
            return
    raise AssertionError(f'ended with {p.wait()} before {text!r}')


def kill_and_resume(tmp_path, kills, seed=0):
    """kill -9 a run at random moments; the finished run must equal one that was never killed."""
    rng = np.random.default_rng(seed)
    command = [*TINY, '--steps', 30 * kills, '--dropout', 0.1, '--save_every', 4, '--field_batch',
               8, '--sample_every', 25]  # of a flag given twice the last one counts
    script(['train.py', *command, '--out_dir', tmp_path / 'whole'])
    killed = 0
    while True:
        p = start([*command, '--out_dir', tmp_path / 'killed'])
        if killed < kills:
            for line in p.stdout:
                if line.startswith('step'):
                    break
            time.sleep(rng.uniform(0, 0.8))
        if killed == kills or p.poll() is not None:
            rest = p.communicate()[0]
            assert p.returncode == 0 or 'already' in rest, rest
            break
        p.kill()
        p.wait()
        killed += 1
    a, b = (torch.load(tmp_path / d / 'ckpt.pt', weights_only=True) for d in ('whole', 'killed'))
    for part in ('net', 'ema'):
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part])
    assert losses(tmp_path / 'whole') == losses(tmp_path / 'killed')
    print(f'{killed} kills, every restart went on, {a["step"]} steps bit for bit')
    return killed


def test_kill_9_and_resume(tmp_path):
    assert kill_and_resume(tmp_path, 2) == 2


@pytest.mark.slow
def test_kill_9_fifty_times(tmp_path):
    assert kill_and_resume(tmp_path, 50, seed=1) == 50


def workers(p):
    """Process ids of the ranks under a torchrun."""
    return [int(pid) for pid in Path(f'/proc/{p.pid}/task/{p.pid}/children').read_text().split()]


@pytest.mark.slow
def test_killed_ranks_are_restarted_and_the_loss_goes_on(tmp_path):
    command = [*TINY, '--steps', 60, '--dropout', 0, '--save_every', 5]
    script(['train.py', *command, '--out_dir', tmp_path / 'one'])
    for first in range(2):
        p = start([*command, '--out_dir', tmp_path / f'two{first}'], 2, max_restarts=2)
        for step, rank in ((12, first), (32, 1 - first)):
            until(p, f'step {step}/')
            os.kill(workers(p)[rank], signal.SIGKILL)
            until(p, 'going on from step')
        out = p.communicate(timeout=120)[0]
        assert p.returncode == 0, out[-2000:]
        close(losses(tmp_path / f'two{first}'), losses(tmp_path / 'one'), rtol=1e-3)
    print('4 ranks killed under torchrun --max_restarts, 4 restarts')


@pytest.mark.slow
def test_a_hung_rank_ends_the_job(tmp_path):
    p = start([*TINY, '--steps', 100000, '--timeout', 5, '--out_dir', tmp_path / 'o'], 2)
    until(p, 'step 5/')
    os.kill(workers(p)[1], signal.SIGSTOP)
    p.communicate(timeout=120)
    assert p.returncode != 0


def test_another_number_of_processes_follows_the_same_loss(tmp_path):
    command = [*TINY, '--dropout', 0]
    script(['train.py', *command, '--steps', 8, '--out_dir', tmp_path / 'one'])
    p = start([*command, '--steps', 4, '--out_dir', tmp_path / 'two'], 2)
    assert 'saved' in p.communicate()[0]
    script(['train.py', *command, '--steps', 8, '--out_dir', tmp_path / 'two'])
    close(losses(tmp_path / 'two'), losses(tmp_path / 'one'), rtol=1e-4)


TINY_PP = TINY[:TINY.index('--field_batch')] + TINY[TINY.index('--field_batch') + 2:]


@pytest.mark.parametrize('D', ['1', '2', '128', 'inf'])
def test_any_d_trains_samples_and_has_a_likelihood(D, tmp_path, capsys):
    out = tmp_path / 'o'
    script(['train.py', *TINY_PP, '--D', D, '--steps', 12, '--classes', '--lr', '1e-2', '--out_dir', out])
    assert np.isfinite(losses(out)).all() and losses(out)[-1] < losses(out)[0]
    ckpt = ['--ckpt', out / 'ckpt.pt', '--device', 'cpu']
    for flags in ([], ['--guidance', '2', '--classes', '3,7'], ['--classes', 'none']):
        script(['sample.py', *ckpt, '--nfe', 6, '--n', 5, *flags, '--out', tmp_path / 's.npz'])
        made = np.load(tmp_path / 's.npz')['arr_0']
        assert made.shape == (5, 16, 16, 1)
    script(['evaluate.py', *ckpt, '--bpd', '--n', 3, '--tol', '1e-2'])
    assert 'bpd' in capsys.readouterr().out
    net, args = checkpoint.load_checkpoint(out / 'ckpt.pt')
    assert args['D'] == float(D) and args['classes'] == 10 and isinstance(net, baselines.Denoiser)
    refuses(['train.py', *TINY_PP, '--D', '5', '--classes', '--lr', '1e-2', '--steps', 20,
             '--out_dir', out], '--D 5.0: the run .* has')
    refuses(['sample.py', *ckpt, '--classes', '10'], '--classes 10: the network knows 0 to 9')


@pytest.mark.parametrize('method', RIVALS)
def test_rivals_train_and_sample(method, tmp_path, capsys):
    out = tmp_path / 'o'
    script(['train.py', *TINY_PP, '--method', method, '--steps', 12, '--lr', '1e-2', '--out_dir', out])
    assert np.isfinite(losses(out)).all() and losses(out)[-1] < losses(out)[0]
    for flags in ([], ['--schedule', 'time'], ['--solver', 'ddim', '--eta', '1']):
        script(['sample.py', '--ckpt', out / 'ckpt.pt', '--nfe', 6, '--n', 3, '--device', 'cpu', *flags,
                '--out', tmp_path / 's.npz'])
        assert np.load(tmp_path / 's.npz')['arr_0'].shape == (3, 16, 16, 1)
    refuses(['train.py', *TINY_PP, '--method', method, '--D', 3, '--out_dir', tmp_path / 'p'], '--D 3: belongs')
    ckpt = ['--ckpt', out / 'ckpt.pt', '--device', 'cpu', '--out', tmp_path / 'e.png']
    script(['sample.py', *ckpt, '--encode', 'glyphs', '--n', 2, '--solver', 'ddim', '--nfe', 6])
    said = capsys.readouterr().out
    assert 'schedule time' in said and len(said) < 4000  # not the network itself
    refuses(['sample.py', *ckpt, '--encode', 'glyphs', '--solver', 'ddim', '--eta', 1], '--eta 1.0: fresh')
    refuses(['sample.py', *ckpt, '--guidance', 2], '--guidance 2.0: the network knows no classes')
    refuses(['sample.py', *ckpt, '--classes', 3], '--classes 3: .* none; leave it out')


def test_straightness_of_known_lines():
    class Point(torch.nn.Module):  # of one data point y: F = y - eps, the lines are straight
        def forward(self, x, c_noise):
            t = (c_noise / 999)[:, None]
            return (y - x) / (1 - t), None
    y, x = torch.linspace(-1, 1, 6, dtype=F64), 999 * torch.randn(5, 6, generator=seeded(), dtype=F64)
    close(baselines.straightness(baselines.RectifiedFlow(Point()), x), torch.zeros(5, dtype=F64), atol=1e-12)
    flow = baselines.VP(lambda x, c_noise: (torch.zeros_like(x), None))  # eps = 0: x / alpha stays
    alpha = flow.alpha(flow.planes(flow.high, flow.low, 50))
    whole = alpha[-1] - alpha[0]
    bent = (whole - 50 * alpha.diff()).square().mean() / whole ** 2
    close(baselines.straightness(flow, x), bent.expand(5), rtol=1e-9)


def few_bits(bits_per_dim, flow, images, n, args, place):
    return bits_per_dim(flow, images, 3, args, place)


def test_comparing_checkpoints(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, 'bits_per_dim', functools.partial(few_bits, evaluate.bits_per_dim))
    script(['train.py', *TINY_PP, '--method', 'rf', '--steps', 3, '--out_dir', tmp_path / 'straight'])
    ckpts = [tmp_path / 'straight' / 'ckpt.pt', trained / 'ckpt.pt']
    script(['evaluate.py', '--compare', *ckpts, '--swd', '--bpd', '--straightness', '--sweep', 'nfe=1,4',
            '--solvers', 'unipc,rk45', '--n', 6, '--tol', '1e-1', '--device', 'cpu'])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if 'unipc' in line]
    rows = [row for row in rows if row[:2] in (['straight', 'rf'], [trained.name, 'pfgm'])]
    assert [row[2:4] for row in rows] == [['unipc', '1'], ['unipc', '4']] * 2
    assert all(np.isfinite([float(v) for v in row[3:] if v != '-']).all() for row in rows)
    assert rows[0][-1] != '-' and rows[2][-1] == '-'  # no time, no straightness
    assert Image.open('compare.png').size == (960, 640) and Image.open('compare_samples.png').width > 8 * 64
    assert len(Path('results.jsonl').read_text().splitlines()) == 2 * (3 + 1)
    script(['train.py', *TINY_PP, '--image_size', 8, '--steps', 1, '--out_dir', tmp_path / 'small'])
    refuses(['evaluate.py', '--compare', *ckpts, tmp_path / 'small' / 'ckpt.pt'], '--compare .*one size')
    refuses(['evaluate.py', '--straightness', '--ckpt', ckpts[1]], '--straightness: only vp')


def test_reflow_and_distillation(tmp_path, capsys):
    """Pairs are draws of the prior and where the teacher leads them; killed between two shards the
    run keeps what it has; both students train, resume and sample in one call."""
    out, small = tmp_path / 'rf', ['--pairs', 40, '--lr', '1e-2']
    script(['train.py', *TINY_PP, '--method', 'rf', '--classes', '--steps', 6, '--out_dir', out])
    for kind in ('reflow', 'distill'):
        home = tmp_path / kind
        run = ['train.py', *TINY_PP, f'--{kind}', out / 'ckpt.pt', *small, '--out_dir', home]
        with patch.object(baselines, 'SHARD', 16):
            script([*run, '--steps', 20])
            said = capsys.readouterr().out
            assert 'the teacher: straightness' in said and 'pairs: 40/40' in said
            files = sorted((home / 'pairs').iterdir())
            assert [len(np.load(f)) for f in files] == [16, 16, 8]
            made = {f: f.read_bytes() for f in files}
            files[0].unlink(), files[2].write_bytes(made[files[2]][:500])
            script([*run, '--steps', 22])
            assert 'pairs: 24/24' in capsys.readouterr().out
            assert {f: f.read_bytes() for f in files} == made
        assert np.isfinite(losses(home)).all() and len(losses(home)) == 22
        assert np.mean(losses(home)[-5:]) < np.mean(losses(home)[:3])
        script(['sample.py', '--ckpt', home / 'ckpt.pt', '--n', 3, '--device', 'cpu', '--out',
                tmp_path / 's.npz', *(['--nfe', 1] if kind == 'reflow' else [])])
        assert 'nfe 1 ' in capsys.readouterr().out
    eps, y = torch.from_numpy(np.concatenate([np.load(f) for f in files])).float().unbind(1)
    net, args = checkpoint.load_checkpoint(out / 'ckpt.pt')
    with torch.no_grad():
        start = y + eps * args['z_max']
        end, _ = pfgm.sample_ode(net, start, args['z_max'], 1e-3, rtol=1e-4, atol=1e-4,
                                 labels=torch.arange(40) % 10, z_exp=0)
    assert (eps.mean().abs() < 0.05) and (eps.std() - 1).abs() < 0.05
    assert (end - y).abs().mean() < 0.02
    script(['evaluate.py', '--ckpt', home / 'ckpt.pt', '--swd', '--n', 3, '--device', 'cpu'])
    assert json.loads((home / 'results.jsonl').read_text())['nfe'] == 1  # all that the student knows
    refuses([*run, '--reflow', out / 'ckpt.pt'], 'two runs')
    refuses([*run[:-1], tmp_path / 'x', '--method', 'pfgm'], '--method pfgm, D inf: a student of .* D, inf')
    refuses(['train.py', *TINY_PP, '--reflow', home, '--out_dir', tmp_path / 'x'], 'itself a student')
    np.save(tmp_path / 'a.npy', np.zeros((9, 16, 16), np.uint8))
    refuses(['train.py', '--dataset', tmp_path / 'a.npy', '--reflow', out / 'ckpt.pt', '--out_dir',
             tmp_path / 'x'], '--dataset .*a.npy: --reflow .* was trained on glyphs; give --dataset glyphs')


@pytest.mark.parametrize('teacher, student, D', [
    ('pfgm', 'pfgmpp', 1), ('D 3', 'pfgmpp', 3), ('vp', 'vp', math.inf), ('ddpm', 'ddpm', math.inf),
    ('vp as rf', 'rf', math.inf), ('official', 'pfgmpp', 1), ('edm', 'pfgmpp', 128)])
def test_any_teacher_is_distilled_into_one_call(teacher, student, D, tmp_path, monkeypatch, capsys):
    """The student is trained where sampling begins, x on z_max, towards where the teacher leads x."""
    out, path, how = tmp_path / 'a', tmp_path / 'a' / 'ckpt.pt', TINY_PP
    if teacher in ('official', 'edm'):
        path, how = tmp_path / 'net.pth', ['--dataset', tmp_path / 'x.npy', '--channels', 3, '--warmup',
                                           1, *'--device cpu --no-bf16 --batch_size 8 --log_every 1'.split()]
        np.save(tmp_path / 'x.npy', np.zeros((9, 32, 32, 3), np.uint8))
        tiny_official(path) if teacher == 'official' else edm_file(path, pfgmpp=True, D=128)
    else:
        method = ['--D', 3] if teacher == 'D 3' else ['--method', teacher.split()[0]]
        script(['train.py', *TINY_PP, *method, '--steps', 4, '--lr', '1e-2', '--out_dir', out])
    home, seen, perturb = tmp_path / 'b', [], baselines.Denoiser.perturb

    def kept(flow, *args, **eps):
        seen.append(perturb(flow, *args, **eps))
        return seen[-1]
    monkeypatch.setattr(baselines.Denoiser, 'perturb', kept)
    monkeypatch.setattr(train, 'PAIR_NFE', 4)
    run = ['train.py', *how, '--distill', path, '--pairs', 8, '--steps', 9, '--lr', '1e-2', '--grad_clip', 9]
    script([*run, '--out_dir', home, *['--method', 'rf'] * (teacher == 'vp as rf')])
    said = capsys.readouterr().out
    assert f'the student is {student} of D {D:g}' in said and losses(home)[-1] < losses(home)[0]
    pairs, = (home / 'pairs').iterdir()
    eps, y = torch.from_numpy(np.load(pairs)).unbind(1)
    net, args = checkpoint.load_checkpoint(home / 'ckpt.pt')
    assert (args['method'], args['D'], args['z_exp']) == (student, D, 0)
    z_max = args['z_max']
    start = pfgm.sample_prior(y.shape, 1.0, None, D)  # its norms, or those that the prior is cut to
    if teacher != 'vp as rf':
        flow = checkpoint.load_flow(flags_of('--ckpt', path, '--nfe', 4, '--device', 'cpu'), torch.device('cpu'))[0]
        start = flow.prior(range(8))
        assert flow.z_max == z_max and flow.upper_norm == args['upper_norm']
        ends, _ = flow.follow(start, torch.device('cpu'), range(8))
        close(y, ends, atol=1e-4 * float(ends.abs().max()))
        for moved, z in seen:  # each a start of the teacher's, on its own plane
            assert (z == z_max).all()
            near = torch.cdist(moved.flatten(1).double(), start.flatten(1).double()).amin(1)
            assert (near < 1e-4 * start.flatten(1).norm(dim=1).max()).all()
    script(['sample.py', '--ckpt', home, '--n', 3, '--device', 'cpu', '--out', tmp_path / 's.npz'])
    assert 'nfe 1 ' in capsys.readouterr().out


@pytest.mark.parametrize('flags', [['--D', 2], ['--D', 'inf', '--classes'], ['--method', 'vp']])
def test_consistency_training_and_its_sampler(flags, tmp_path, monkeypatch, capsys):
    """The target at z is what the network, stopped, makes of the same noise at a lower level."""
    script(['train.py', *TINY_PP, *flags, '--steps', 2, '--lr', '1e-2', '--out_dir', tmp_path / 'a'])
    seen, point = [], baselines.training_point

    def kept(flow, clean, generator, mine, charges, kinds, eps, stage):
        state, labels = generator.get_state(), None
        made = point(flow, clean, generator, mine, charges, kinds, eps, stage)
        generator.set_state(state)
        plain = point(flow, clean, generator, mine, charges, kinds, eps)
        moved, z, target, _, weight, *labels = made
        close(moved, plain[0])
        ratio = (1 - (1 + 8 / (1 + torch.exp(z / flow.unit))) / 2 ** stage).clamp_min(0)
        for i in range(len(z)):
            r = float(ratio[i])
            lower = clean[i] + r * (moved[i] - clean[i])
            with torch.no_grad():
                v_x = flow(lower[None], r * z[i:i + 1], *(k[i:i + 1] for k in labels))[0][0] if r else 0
            want = lower + v_x if r else clean[i]
            close(moved[i] + target[i], want, rtol=1e-3, atol=1e-4 * float(moved[i].abs().max() + 1))
        close(weight * (1 - ratio), plain[4], rtol=1e-4)
        assert not target.requires_grad and flow.training
        seen.append(stage)
        return made
    monkeypatch.setattr(train, 'training_point', kept)
    more = ['--consistency', '--init_from', tmp_path / 'a', '--lr', '1e-3', '--out_dir', tmp_path / 'b']
    words = ['train.py', *TINY_PP, *[f for f in flags if f == '--classes'], *more]
    script([*words, '--steps', 16])
    assert seen[:16] == [1 + step // 2 for step in range(16)] and np.isfinite(losses(tmp_path / 'b')).all()
    made = torch.load(tmp_path / 'b' / 'ckpt.pt', weights_only=True)
    assert made['args']['method'] == ('vp' if 'vp' in flags else 'pfgmpp') and made['step'] == 16
    capsys.readouterr()
    for nfe in ([], ['--nfe', 2]):
        script(['sample.py', '--ckpt', tmp_path / 'b', '--n', 3, '--device', 'cpu', *nfe, '--out', tmp_path / 's.npz'])
        assert f'solver consistency  nfe {(nfe or [0, 1])[1]} ' in capsys.readouterr().out
    refuses(['train.py', *TINY, '--consistency', '--out_dir', tmp_path / 'c'], '--consistency: trains a denoiser')
    refuses(['train.py', *TINY_PP, '--distill', tmp_path / 'b', '--out_dir', tmp_path / 'c'], 'itself a student')


def test_one_call_for_each_level_of_the_consistency_sampler():
    """x = xhat, then noise of the kernel anew: of one charge, the charge and that noise."""
    y, D = torch.randn(1, 6, generator=seeded(), dtype=F64), 3
    u = pfgm.kernel((2, 1000, 6), torch.ones(2, dtype=F64), math.inf, seeded(1))
    solver = baselines.renewing(lambda i: u[i])
    x, path = 9 * u[0], []
    end, nfe = pfgm.sample_ode(ExactField(y, D=D), x, 9.0, 0.5, solver, 3, z_exp=0, D=D, to_data=True,
                               schedule_name='log', callback=lambda z, x: path.append((float(z[0]), x)))
    assert nfe == 3 and len(path) == 3
    for (z, x), noise in zip(path, u):
        close(x, y + z * noise, atol=1e-9)
    close(end, y.expand(1000, 6), atol=1e-9)


def test_a_flow_between_two_data_sets(tmp_path, monkeypatch, capsys):
    """x_t = t y + (1 - t) s of images s and y at random; samples start from s; reflow keeps the pairs."""
    monkeypatch.chdir(tmp_path)
    s, y = torch.randint(0, 256, (2, 7, 16, 16), generator=seeded()).to(torch.uint8)
    np.save('s.npy', s.numpy()), np.save('y.npy', y.numpy())
    s, y = (data.to_float(v)[:, None] for v in (s, y))
    seen, perturb = [], baselines.RectifiedFlow.perturb

    def kept(flow, x, generator, *eps):
        moved, z = perturb(flow, x, generator, *eps)
        seen.append((x, z, moved))
        return moved, z
    monkeypatch.setattr(baselines.RectifiedFlow, 'perturb', kept)
    script(['train.py', *TINY_PP, '--dataset', 'y.npy', '--method', 'rf', '--source', 's.npy', '--steps', 30,
            '--lr', '1e-2', '--sample_every', 30, '--out_dir', 'a'])
    pairs = set()
    for x, z, moved in seen[:30]:
        eps = (moved - x) / z[:, None, None, None]                      # an image of the other set
        near = torch.cdist(eps.flatten(1), s.flatten(1))
        assert (near.amin(1) < 0.05 * (1 + 1 / z)).all()
        pairs |= {*zip(near.argmin(1).tolist(), torch.cdist(x.flatten(1), y.flatten(1)).argmin(1).tolist())}
    assert len(pairs) > 40 and losses('a')[-1] < losses('a')[0]        # any with any
    how = ['--nfe', 8, '--device', 'cpu']
    script(['sample.py', '--ckpt', 'a', '--from', 's.npy', *how, '--out', 'strip.png'])
    strip = np.asarray(Image.open('strip.png').convert('L'))
    assert strip.shape == (4 * 68 + 4, 4 * 68 + 4)                      # 7 pairs
    assert (abs(strip[4:68:4, 4:68:4] - ((s[0, 0].numpy() + 1) * 127.5).round()) <= 1).all()
    script(['sample.py', '--ckpt', 'a', *how, '--n', 9, '--out', 'b.npz'])
    made = np.load('b.npz')['arr_0']
    assert (made[7:] == made[:2]).all() and len(np.unique(made.reshape(9, -1), axis=0)) == 7
    net, args = checkpoint.load_checkpoint('a/ckpt.pt')
    x, _ = pfgm.sample_ode(net, args['z_max'] * s, args['z_max'], pfgm.last_plane(net.low, 8, math.inf), 'unipc',
                           8, D=math.inf, z_exp=0, schedule_name='radius', to_data=True)
    assert (abs(data.to_uint8(x[:, 0]).int() - torch.from_numpy(made[:7, :, :, 0]).int()) <= 1).all()
    capsys.readouterr()
    for kind in ('reflow', 'distill'):
        script(['train.py', *TINY_PP, '--dataset', 'y.npy', f'--{kind}', 'a', '--pairs', 9, '--steps', 3, '--out_dir', kind])
        assert 'straightness' in capsys.readouterr().out
        pairs, = Path(kind, 'pairs').iterdir()
        eps, end = torch.from_numpy(np.load(pairs)).unbind(1)
        close(end / 999 + eps, s[torch.arange(9) % 7], atol=1e-4)
        script(['sample.py', '--ckpt', kind, '--n', 2, *how[2:], '--out', f'{kind}.npz'])
    script(['sample.py', '--ckpt', 'a', '--encode', 'y.npy', '--n', 2, *how, '--out', 'e.png'])
    refuses(['evaluate.py', '--ckpt', 'a', '--bpd', '--device', 'cpu'], '--bpd: .*starts from images')
    refuses(['train.py', *TINY_PP, '--source', 's.npy', '--method', 'vp', '--out_dir', 'c'], '--source s.npy: belongs')
    script(['train.py', *TINY_PP, '--method', 'rf', '--steps', 1, '--out_dir', 'd'])
    refuses(['sample.py', '--ckpt', 'd', '--from', 's.npy'], '--from s.npy: this flow starts from noise')


def flags_of(*words):
    p = launch.Parser()
    checkpoint.flow_flags(p)
    return p.parse_args([str(word) for word in words])


def test_labels_with_a_gap_are_refused_and_a_class_has_one_number_in_both_splits(tmp_path):
    x = np.zeros((8, 8, 8), np.uint8)
    np.savez(tmp_path / 'a.npz', x=x, y=np.array([1, 2] * 4))
    refuses(['train.py', *TINY_PP, '--dataset', tmp_path / 'a.npz', '--D', 2, '--classes', '--out_dir',
             tmp_path / 'o'], '--classes: 2 labels from 1 to 2; accepted: 0, 1')
    for name in ('train/a', 'train/b', 'train/c', 'test/b', 'test/c'):
        (tmp_path / 'f' / name).mkdir(parents=True)
        Image.fromarray(x[0]).save(tmp_path / 'f' / name / '0.png')
    train, test = (data.load(tmp_path / 'f', split=split) for split in ('train', 'test'))
    assert train.labels.tolist() == [0, 1, 2] and test.labels.tolist() == [1, 2]


def test_class_conditional_field(tmp_path):
    script(['train.py', *TINY, '--classes', '--steps', 3, '--out_dir', tmp_path / 'o'])
    script(['sample.py', '--ckpt', tmp_path / 'o' / 'ckpt.pt', '--nfe', 4, '--n', 3, '--device', 'cpu',
            '--out', tmp_path / 's.png'])
    refuses(['sample.py', '--ckpt', tmp_path / 'o' / 'ckpt.pt', '--classes', '-2'], '-2')


@pytest.mark.skipif(not Path('/proc/self').exists(), reason='no /proc: no folder refuses root')
def test_places_that_cannot_be_written_are_refused(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, 'make_images', None)  # found out before any work
    ckpt = ['--ckpt', trained / 'ckpt.pt', '--device', 'cpu']
    for out in ('x.png', 'x.gif', 'x.npz', 'x'):
        refuses(['sample.py', *ckpt, '--out', f'/proc/{out}'], f'--out /proc/{out}: cannot be written')
    refuses(['train.py', *TINY, '--out_dir', '/proc/x'], '--out_dir /proc/x: cannot write there')
    refuses(['evaluate.py', *ckpt, '--swd', '--n', 2, '--nfe', 1, '--results', '/proc/x'],
            '--results /proc/x: cannot be written')


def test_loss_curves(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script(['evaluate.py', '--curves', trained / 'log.jsonl'])
    assert Image.open('curves.png').size == (960, 640)
    Path('a.jsonl').write_text('[1]')
    for log, why in (('a.jsonl', 'not a log.jsonl'), ('none.jsonl', 'No such file')):
        refuses(['evaluate.py', '--curves', log], f'--curves {log}: .*{why}')


def test_benches_want_one_process(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    for flag in ('--bench', '--solver_bench'):
        refuses(['evaluate.py', flag], f'{flag}: of one process')


def test_heavy_tailed_starts_stay_finite():
    net = ExactField(torch.rand(20, 3, 4, 4, generator=seeded()) * 2 - 1)
    x = pfgm.sample_prior((8, 3, 4, 4), 40.0, generator=seeded())
    x *= (1e6 / x.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
    for solver in ('rk45', 'euler', 'heun'):
        for small_z in ('exact', 'official'):
            out, _ = pfgm.sample_ode(net, x, 40.0, 1e-3, solver, 20, small_z=small_z)
            assert out.isfinite().all() and out.abs().max() < 100


# ---------------------------------------------------------------- sampling

# rk45 on the exact field, in float64: a raw network amplifies how convolutions round in a batch
@pytest.mark.parametrize('flags', [['--exact'], ['--nfe', '5']])
def test_an_image_depends_on_seed_and_index_only(trained, tmp_path, flags):
    def sampled(n, batch_size, seed=0):
        out = tmp_path / f'{n}-{batch_size}-{seed}.npz'
        script(['sample.py', '--ckpt', trained / 'ckpt.pt', '--n', n, '--batch_size', batch_size,
                '--seed', seed, '--out', out, '--device', 'cpu', *flags])
        return np.load(out)['arr_0'].astype(int)
    six = sampled(6, 6)
    assert six.shape == (6, 16, 16, 1) and len(np.unique(six.reshape(6, -1), axis=0)) == 6
    for n, batch_size in ((6, 4), (3, 1)):
        assert abs(sampled(n, batch_size) - six[:n]).max() <= 1  # rounding to grey levels
    assert abs(sampled(6, 6, seed=1) - six).max() > 1


def test_processes_share_the_images(trained, tmp_path):
    command = ['--ckpt', str(trained / 'ckpt.pt'), '--n', '5', '--nfe', '3', '--device', 'cpu']
    script(['sample.py', *command, '--out', tmp_path / 'one.npz'])
    for out in ('two.npz', 'folder'):
        subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2',
                        '--', HERE / 'sample.py', *command, '--out', tmp_path / out], check=True,
                       capture_output=True)
    one, two = (np.load(tmp_path / f'{k}.npz')['arr_0'].astype(int) for k in ('one', 'two'))
    assert abs(one - two).max() <= 1 and len(list((tmp_path / 'folder').glob('*.png'))) == 5
    first = np.asarray(Image.open(tmp_path / 'folder' / '000000.png')).astype(int)
    assert abs(first - one[0, :, :, 0]).max() <= 1


def test_exact_samples_are_training_images(tmp_path, capsys):
    script(['sample.py', '--exact', '--n', 4, '--out', tmp_path / 'a.png', '--device', 'cpu'])
    said = capsys.readouterr().out
    assert '4 of 4 samples are images of glyphs to within a grey level' in said
    assert re.search(r'nfe \d+', said) and Image.open(tmp_path / 'a.png').size > (64, 64)


@pytest.mark.parametrize('kind, name, size', [
    ('--gif', 'a.gif', None), ('--interpolate', 'a.png', None), ('--rescale', 'a.png', None),
    ('--field_lines', 'a.png', (800, 720))])
def test_pictures(trained, tmp_path, kind, name, size):
    script(['sample.py', '--ckpt', trained / 'ckpt.pt', '--n', 8, '--nfe', 4, kind, '--device',
            'cpu', '--out', tmp_path / name])
    image = Image.open(tmp_path / name)
    assert size is None or image.size == size
    assert name != 'a.gif' or image.n_frames >= 3


def test_encoding_inverts(trained, tmp_path, capsys):
    script(['sample.py', '--ckpt', trained / 'ckpt.pt', '--encode', 'glyphs', '--n', 2, '--tol',
            '1e-6', '--out', tmp_path / 'a.png', '--device', 'cpu'])
    error = float(re.search(r'mean error (\S+)', capsys.readouterr().out)[1])
    assert error < 1e-3


BAD_SAMPLE = [('--nfe 0', '--nfe: 0'), ('--nfe 2.5', '--nfe: 2.5'), ('--n -1', '--n: -1'),
              ('--solver rk4', 'rk4'), ('--out a.tiff', 'must end in'), ('--out no/a.png', 'mkdir'),
              ('--encode nothing', 'no such data set')]


@pytest.mark.parametrize('flags, message', BAD_SAMPLE)
def test_bad_sampling_flags(trained, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    refuses(['sample.py', '--ckpt', trained / 'ckpt.pt', *flags.split(), '--device', 'cpu'], message)
    assert os.listdir(tmp_path) == []


PAGES = 'README.md', 'RESULTS.md'
LINK = r'\[`(\w+)`\]\((\w+\.py)#L(\d+)\)'


def readme_commands():
    """The commands of the README's shell blocks and sentences, then those of RESULTS.md, in order,
    loops written out."""
    text = '\n'.join((HERE / page).read_text() for page in PAGES)
    blocks = re.findall(r'```sh\n(.*?)```|`((?:python|torchrun) [^`]*\.py [^`]*)`', text, re.S)
    script = re.sub(r' *#.*', '', '\n'.join(map(''.join, blocks))).replace('\\\n', ' ')
    script = re.sub(r'(\S*)\{(\S*)\}(\S*)', lambda word: ' '.join(
        word[1] + part + word[3] for part in word[2].split(',')), script)
    script = re.sub(r'for (\w+) in (.*?); do(.*?); done', lambda loop: '\n'.join(
        loop[3].replace(f'${loop[1]}', word) for word in loop[2].split()), script, flags=re.S)
    return [part.split() for line in script.splitlines() for part in line.split('&&') if part.strip()]


class Toy:
    """In place of a torchvision data set: digits of its size, nothing downloaded."""

    def __init__(self, size, depth):
        self.size, self.depth = size, depth

    def __call__(self, root, train, download):
        pixels, self.targets = data.glyphs(image_size=self.size, split='train' if train else 'test')
        self.data = np.stack([pixels[:300]] * 3, -1) if self.depth == 3 else pixels[:300]
        self.targets, self.classes = self.targets[:300], list('0123456789')
        return self


def shrunk(words):
    """The script and flags of a README command, with sizes for a test; of a flag given twice the
    last one counts."""
    words = words[next(i for i, word in enumerate(words) if word.endswith('.py')):]
    small = [*words, '--device', 'cpu', '--no-bf16'] if words[0] != 'checkpoint.py' else words
    if words[0] == 'train.py':
        small += ['--steps', 10 if '--init_from' in words else 3, '--batch_size', 8, '--log_every', 1]
        small += ['--pairs', 4] if '--pairs' in words else []
    elif words[0] != 'checkpoint.py' and '--bench' not in words and '--curves' not in words:
        small += ['--n', 4] if '--exact' not in words else ['--n', 2]
        small += ['--tol', '0.1'] if {'--bpd', 'rk45', '--compare', '--encode'} & set(words) else []
        small += ['--sweep', 'nfe=2,3'] if {'--sweep', '--compare'} & set(words) else []
    return small + (['--batch_size', 4] if '--solver_bench' in words else [])


@pytest.fixture
def newcomer(tmp_path, monkeypatch):
    """A folder with the files that the README speaks of; networks, data and Inception made small."""
    monkeypatch.chdir(tmp_path)
    for row in train.PRESETS.values():
        for key, value in dict(nf=8, num_blocks=1, warmup=2, sample_every=0, field_batch=16).items():
            monkeypatch.setitem(row, key, value)
    monkeypatch.setattr(unet.UNet.__init__, '__defaults__', (32, 3, 8, (1, 1), 1, (16,), 0.1, 0))
    monkeypatch.setattr('torchvision.datasets.MNIST', Toy(28, 1))
    monkeypatch.setattr('torchvision.datasets.CIFAR10', Toy(32, 3))
    monkeypatch.setattr(bench, 'POOL', 32)
    way = torch.randn(48, 32, generator=seeded())
    monkeypatch.setattr(bench, 'load_inception', lambda *args: (len, torch.randn(1008, 32).double()))
    monkeypatch.setattr(bench, 'features', lambda net, pixels, resize: torch.nn.functional.interpolate(
        pixels.expand(-1, 3, -1, -1).float(), size=(4, 4)).flatten(1) @ way)
    monkeypatch.setattr(evaluate, 'check_counts', lambda *args: None)
    monkeypatch.setattr(bench, 'BENCH_CHARGES', (64, 128))
    os.mkdir('photos')
    with zipfile.ZipFile('images.zip', 'w') as file:
        for k, image in enumerate(torch.randint(0, 256, (8, 32, 32, 3), generator=seeded())):
            Image.fromarray(image.to(torch.uint8).numpy()).save(f'photos/{k}.png')
            file.write(f'photos/{k}.png')
    tiny_official('checkpoint_500000.pth')
    np.savez('cifar10_stats.npz', mu=np.zeros(32), sigma=np.eye(32))


@pytest.mark.parametrize('count', [7, pytest.param(1000, marks=pytest.mark.slow)])
def test_readme_commands_in_their_order(newcomer, count):
    """All are parsed and the first `count` run; of those of evaluate.py that differ in values only,
    the first."""
    ran = set()
    for k, words in enumerate(readme_commands()):
        if words[0] == 'pip':
            assert (HERE / words[words.index('-r') + 1]).exists()
        elif words[1:3] != ['-m', 'pytest']:
            command = shrunk(words)
            kind = tuple(word for word in map(str, command) if word.startswith('--'))
            if k >= count or command[0] == 'evaluate.py' and kind in ran:
                if command[0] != 'checkpoint.py':
                    SCRIPTS[command[0].removesuffix('.py')].parse_args([str(word) for word in command[1:]])
                continue
            if command[0] == 'checkpoint.py':
                checkpoint.main(checkpoint.parse_args(command[1:]))
            else:
                script(command)
            made = [command[i + 1] for i, word in enumerate(command) if word in ('--out', '--out_dir')]
            assert all(os.path.exists(path) for path in made), command
            ran.add(kind)
    assert len(ran) > min(30, count - 4) and os.path.exists('out/photos/ckpt.pt')


def test_readme_links_point_at_their_functions():
    texts = {page: (HERE / page).read_text() for page in PAGES}
    heads = {f'{page}#' + re.sub(r'[^\w -]', '', head).lower().replace(' ', '-')
             for page, text in texts.items() for head in re.findall(r'^##+ (.*)', text, re.M)}
    links = re.findall(LINK, '\n'.join(texts.values()))
    for name, file, line in links:
        found = (HERE / file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf'(def|class) {name}\b|{name} = ', found), (name, file, line)
    assert len(links) > 10 and len(texts['README.md'].splitlines()) <= 250
    for target in re.findall(r'\]\(([^)]*)\)', '\n'.join(texts.values())):
        file, _, place = target.partition('#')
        assert target.startswith('https://') or (HERE / file).is_file(), target
        assert not (file.endswith('.md') and place) or target in heads, target


FORK = [  # (what the README links to, what to find from there on, what a fork puts in its place)
    ('SETS', r'\{', """{'ramps': (16, 1, False, '', ''),
    'kmnist': (28, 1, False, 'KMNIST', ''),"""),
    ('find', r"    if dataset == 'glyphs'", r"""    if dataset == 'ramps':
        return None, np.arange(40 * 256).reshape(40, 16, 16).astype(np.uint8), None, None
\g<0>"""),
    ('UNet', r'class UNet.*?(?=^\S|\Z)', """class UNet(nn.Module):
    def __init__(self, channels, **more):
        super().__init__()
        self.conv = conv(channels + 1, channels + 1, scale=0)

    def forward(self, x, z, labels=None):
        h = self.conv(torch.cat([x, z.view(-1, 1, 1, 1).expand_as(x[:, :1])], 1))
        return h[:, :-1], h[:, -1].mean((1, 2))
"""),
    ('PFGM', r'def target.*?\n', r"""\g<0>        return torch.ones_like(moved), 0 * z
"""),
    ('METHODS', r'\n', """


class Weightless(Denoiser):
    def weight(self, x, z):
        return torch.zeros_like(z)


class Cosine(VP):
    t_train, t_sample, t_max = 1e-3, 1e-3, 0.99

    def z_of(self, t):
        return torch.tan(math.pi / 2 * t)

    def t_of(self, z):
        return torch.atan(z) * 2 / math.pi


METHODS.update(weightless=Weightless, cosine=Cosine)
"""),
    ('SOLVERS', r'\)\n', """)


def euler_log(f, x, grid, calls):
    for z, z_next in zip(grid[:-1], grid[1:]):
        x = x + column((z_next / z).log(), x) * f(x, like(z, x))
        yield x


SOLVERS['euler_log'] = euler_log
"""),
    ('METRICS', r'\{', "{'brightness': 'mean of the pixels',"),
    ('measure', r'    return found', r"""    if 'brightness' in asked:
        say(against, brightness=made.pixels.double().mean().item())
\g<0>"""),
    ('evaluate', r"'neighbours'\}", "'neighbours', 'brightness'}"),
    ('PRESETS', r"    'glyphs':(.*?)'sum'(.*?\n)", r"""\g<0>    'ramps':\g<1>'mean'\g<2>"""),
]


def test_readme_fork_it(tmp_path):
    """What the README says to edit, edited in a copy of the scripts, works together."""
    section = (HERE / 'README.md').read_text().partition('## Fork it')[2].partition('\n## ')[0]
    lines = {name: (file, int(line) - 1) for name, file, line in re.findall(LINK, section)}
    for path in HERE.glob('*.py'):
        shutil.copy(path, tmp_path)
    for name, pattern, new in sorted(FORK, key=lambda edit: -lines[edit[0]][1]):  # from below
        file, line = lines[name]
        text = (tmp_path / file).read_text().splitlines(keepends=True)
        tail, count = re.subn(pattern, new, ''.join(text[line:]), count=1, flags=re.S | re.M)
        assert count == 1, name
        (tmp_path / file).write_text(''.join(text[:line]) + tail)
    (tmp_path / 'fork.py').write_text("""import torchvision, torch, evaluate, sample, train
class KMNIST:
    def __init__(self, root, train, download):
        self.data = torch.arange(40 * 784).view(40, 28, 28).byte()
        self.targets, self.classes = [0] * 40, ['a']
torchvision.datasets.KMNIST = KMNIST
def script(module, words):
    module.main(module.parse_args([*words.split(), '--device', 'cpu', '--no-bf16']))
script(train, '--dataset kmnist --steps 1 --out_dir pfgm')
for method in ('weightless', 'cosine'):
    script(train, f'--dataset ramps --method {method} --steps 2 --log_every 1 --out_dir {method}')
how = '--ckpt cosine/ckpt.pt --solver euler_log --nfe 5 --n 4'
script(sample, f'{how} --out images')
script(evaluate, f'{how} --brightness')
""")
    ran = subprocess.run([sys.executable, 'fork.py'], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    saved = torch.load(tmp_path / 'cosine' / 'ckpt.pt', weights_only=True)
    assert saved['net'].keys() == {'conv.weight', 'conv.bias'} and saved['args']['loss'] == 'mean'
    close(saved['args']['z_max'], math.tan(0.99 * math.pi / 2), rtol=1e-12)
    # the network begins as 0: half of |v_x|^2 is left, and of an error without weight nothing
    close(losses(tmp_path / 'pfgm')[0], 784 / 2, rtol=1e-3)
    assert losses(tmp_path / 'weightless') == [0.0, 0.0]
    found = json.loads((tmp_path / 'cosine' / 'results.jsonl').read_text())
    images = [np.array(Image.open(path)) for path in sorted((tmp_path / 'images').glob('*.png'))]
    assert found['solver'] == 'euler_log' and found['nfe'] == 5 and len(images) == 4
    close(found['brightness'], np.mean(images), rtol=1e-12)


@golden
def test_official_checkpoint_samples(tmp_path, capsys):
    script(['sample.py', '--ckpt', GOLDEN / 'ckpt_cifar10_tiny.pth', '--n', 4, '--nfe', 6, '--out',
            tmp_path / 'a.png', '--device', 'cpu'])
    said = capsys.readouterr().out
    assert all(k in said for k in ('small_z official', 'tol 0.0001', 'upper_norm 3000', 'z_exp 5'))
    assert Image.open(tmp_path / 'a.png').size == (140, 140)


# ---------------------------------------------------------------- measuring

def test_frechet_of_gaussians():
    a, b = (torch.rand(6, 6, generator=seeded(i), dtype=F64) for i in (0, 1))
    mu = torch.arange(6, dtype=F64)
    diagonal = [torch.diag(m.diagonal()) for m in (a, b)]
    want = 6.0 * 4 + float((diagonal[0].sqrt() - diagonal[1].sqrt()).square().sum())
    close(bench.frechet(mu, diagonal[0], mu + 2, diagonal[1]), want, rtol=1e-10)
    a, b = a @ a.T, b[:, :2] @ b[:, :2].T  # b is singular
    from scipy.linalg import sqrtm
    want = float((a + b).trace()) - 2 * float(np.trace(sqrtm((a @ b).numpy())).real)
    close(bench.frechet(mu, a, mu, b), want, atol=1e-6)


def test_inception_score_kid_and_precision_recall():
    one_hot = torch.eye(10, dtype=F64).repeat(50, 1) * 1e3
    score, _ = bench.inception_score(one_hot, splits=1)
    close(score, 10.0, rtol=1e-9)
    x, y = (torch.randn(300, 16, generator=seeded(i)) for i in (0, 1))
    mean, std, size = bench.kid(x, y, subsets=20)
    assert size == 300 and abs(mean) < 0.1
    k = [((u.double() @ v.double().T / 16 + 1) ** 3) for u, v in ((x, x), (y, y), (x, y))]
    off = ~torch.eye(300, dtype=torch.bool)
    close(mean, float(k[0][off].mean() + k[1][off].mean() - 2 * k[2].mean()), rtol=1e-9)
    assert bench.precision_recall(x, x) == (1.0, 1.0)
    assert bench.precision_recall(x, y + 100) == (0.0, 0.0)


def test_tf1_resize_reads_from_the_corner():
    x = torch.rand(1, 1, 5, 7, generator=seeded(), dtype=F64)
    got, size = bench.resize_tf1(x, 11)[0, 0], 11
    for i in range(size):
        for j in range(size):
            v, u = i * 5 / size, j * 7 / size
            a, b, c, d = int(v), min(int(v) + 1, 4), int(u), min(int(u) + 1, 6)
            top = x[0, 0, a, c] * (1 - u + c) + x[0, 0, a, d] * (u - c)
            low = x[0, 0, b, c] * (1 - u + c) + x[0, 0, b, d] * (u - c)
            close(got[i, j], top * (1 - v + a) + low * (v - a), atol=1e-12)


def test_sliced_wasserstein_of_a_shift():
    x = torch.randint(0, 200, (64, 1, 4, 4), generator=seeded()).to(torch.uint8)
    shifted = bench.sliced_wasserstein(x, x + 20, projections=4000)
    close(shifted, 20 / 127.5, rtol=0.05)  # |shift| / sqrt(N), the rms of its projections
    assert bench.sliced_wasserstein(x, x) == 0


def test_statistics_and_features(tmp_path, capsys):
    place = (torch.device('cpu'), 0, 1)
    net, weight = bench.load_inception('random', place[0])
    assert 'the numbers mean nothing' in capsys.readouterr().out and weight.shape == (1008, 2048)
    pixels = torch.randint(0, 256, (5, 1, 8, 8), generator=seeded()).to(torch.uint8)
    got = evaluate.collect(iter(pixels.split(2)), 5, net, 'pytorch', {'features', 'pixels'}, place)
    assert torch.equal(got.pixels, pixels) and got.features.std(0).max() > 1e-3
    close(got.mu, got.features.double().mean(0), rtol=1e-5, atol=1e-5)
    close(got.sigma, np.cov(got.features.double().numpy().T), atol=1e-5)
    np.savez(tmp_path / 'a.npz', mu=got.mu, sigma=got.sigma)
    read = evaluate.read_stats(str(tmp_path / 'a.npz'), 'any')
    assert read.n is None and torch.equal(read.mu, got.mu) and torch.equal(read.sigma, got.sigma)
    np.savez(tmp_path / 'b.npz', sigma=got.sigma)
    refuses(['evaluate.py', '--fid', '--samples', 'x', '--ref', tmp_path / 'b.npz'], 'no such data set')
    with pytest.raises(data.BadInput, match='mu None'):
        evaluate.read_stats(str(tmp_path / 'b.npz'), 'any')


@pytest.mark.slow  # pip install pytorch-fid torch-fidelity, in an environment of their own
def test_metrics_are_those_of_pytorch_fid_and_torch_fidelity(tmp_path, monkeypatch):
    fid = pytest.importorskip('pytorch_fid.inception')
    extractor = pytest.importorskip('torch_fidelity.feature_extractor_inceptionv3')
    from pytorch_fid.fid_score import calculate_frechet_distance
    from torch_fidelity import metric_isc, metric_kid, metric_prc
    net, weight = bench.load_inception('random', 'cpu')
    from torchvision.models import Inception3
    state = bench.random_weights(Inception3(1008, aux_logits=False, init_weights=False))
    torch.save(state, tmp_path / 'w.pth')
    monkeypatch.setattr(fid, 'load_state_dict_from_url', lambda *args, **kw: state)
    by_fid = fid.InceptionV3([3]).eval()
    by_fidelity = extractor.FeatureExtractorInceptionV3(
        'x', ['2048', 'logits_unbiased'], feature_extractor_weights_path=tmp_path / 'w.pth').eval()
    grey = data.load('glyphs').pixels[:64].expand(-1, 3, -1, -1)
    coarse = torch.randint(0, 256, (64, 3, 8, 8), generator=seeded()).to(torch.uint8)
    ours, theirs, logits = [], [], []
    with torch.no_grad():
        for pixels in (grey, coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)):
            want = by_fid(pixels[:16] / 255)[0][:, :, 0, 0]
            close(bench.features(net, pixels[:16], 'pytorch'), want, rtol=1e-4, atol=1e-6)
            found = [by_fidelity(part) for part in pixels.split(16)]
            theirs, logits = ([*old, torch.cat(new)] for old, new in zip((theirs, logits), zip(*found)))
            ours.append(torch.cat([bench.features(net, part, 'tf1') for part in pixels.split(16)]))
            close(ours[-1], theirs[-1], rtol=1e-4, atol=1e-6)
    moments = [m for x in ours for m in (x[:, :32].double().mean(0), torch.cov(x[:, :32].double().T))]
    close(bench.frechet(*moments), calculate_frechet_distance(*map(np.asarray, moments)), rtol=1e-3)
    got = metric_kid.kid_features_to_metric(
        *theirs, kid_subsets=100, kid_subset_size=50, kid_degree=3, kid_gamma=None, kid_coef0=1,
        rng_seed=0, verbose=False)
    close(bench.kid(*ours, size=50)[0], got['kernel_inception_distance_mean'], rtol=1e-3)
    got = metric_isc.isc_features_to_metric(torch.cat(logits), splits=10, shuffle=True, rng_seed=0)
    close(bench.inception_score(torch.cat(ours).double() @ weight.T)[0], got['inception_score_mean'],
          rtol=1e-3)
    got = metric_prc.prc_features_to_metric(
        *theirs[::-1], prc_neighborhood=3, prc_batch_size=64, save_cpu_ram=False, verbose=False)
    assert bench.precision_recall(*ours) == (got['precision'], got['recall'])


def test_offline_measures_are_recorded(trained, tmp_path, capsys):
    common = ['evaluate.py', '--ckpt', trained / 'ckpt.pt', '--device', 'cpu', '--results',
              tmp_path / 'r.jsonl', '--out', tmp_path / 'a.png']
    script([*common, '--swd', '--neighbours', '--n', 12, '--nfe', 3])
    assert Image.open(tmp_path / 'a.png').size[0] > 200
    script([*common, '--swd', '--n', 8, '--sweep', 'nfe=1,2,4', '--solvers', 'euler,heun'])
    assert Image.open(tmp_path / 'a.png').size == (960, 640)
    script([*common, '--bpd', '--n', 2, '--tol', '1e-3'])
    rows = [json.loads(line) for line in open(tmp_path / 'r.jsonl')]
    assert [(r['solver'], r['nfe']) for r in rows[1:7]] == [
        (s, n) for s in ('euler', 'heun') for n in (1, 2, 4)]
    for row in rows:
        assert {'command', 'git', 'torch', 'hardware', 'seconds', 'seed', 'n'} <= row.keys()
    assert rows[0]['swd'] > 0 and rows[0]['samples_min'] > 0 and rows[7]['bpd'] > 0
    assert rows[7]['round_trip_mean'] < 0.3 and rows[7]['nfe'] > 10


def test_bits_per_dim_of_a_known_flow():
    # the method of images: log p is that of prior_logp with height h + z_min, up to z_max -> inf
    class Net(torch.nn.Module):
        def forward(self, x, z):
            return images_net(16, 2.0)(x, z)
    flow = baselines.Flow(net=Net(), gamma=5.0, z_exp=0.0, small_z='exact', z_min=1e-3, z_max=1e4,
                          D=1.0, classes=[])
    pixels = torch.randint(0, 256, (6, 1, 4, 4), generator=seeded()).to(torch.uint8)
    args = evaluate.parse_args(['--bpd', '--tol', '1e-6', '--repeats', '2'])
    got = evaluate.bits_per_dim(flow, pixels, 6, args, (torch.device('cpu'), 0, 1))
    want = pfgm.prior_logp((pixels + 0.5) / 128 - 1, 2.0 + 1e-3)
    want = (-want / math.log(2) / 16 + 7).mean()
    assert abs(got['bpd'] - float(want)) < 0.3 and got['bpd_se'] > 0  # the probe's noise


BAD_EVALUATE = [
    ('', 'no metric asked'), ('--fid --n 100', 'needs 2049 images'), ('--kid --ref a.npz', 'a.npz'),
    ('--fid --samples nothing --ref x', '--samples nothing: no such'), ('--sweep nfe=0 --swd', '0'),
    ('--swd --sweep nfe=5 --solvers rk4', 'rk4'), ('--swd --results no/r.jsonl', 'mkdir'),
    ('--is --n 20 --inception none.pth', 'no such file; get')]


@pytest.mark.parametrize('flags, message', BAD_EVALUATE)
def test_bad_evaluation_flags(trained, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    refuses(['evaluate.py', '--ckpt', trained / 'ckpt.pt', '--device', 'cpu', *flags.split()], message)
    assert os.listdir(tmp_path) == []


def test_absent_inception_says_what_to_fetch(trained, tmp_path, monkeypatch):
    def offline(*args, **kw):
        raise urllib.error.URLError('no network')
    monkeypatch.setattr(torch.hub, 'download_url_to_file', offline)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    refuses(['evaluate.py', '--is', '--n', 20, '--ckpt', trained / 'ckpt.pt', '--device', 'cpu'],
            r'get https://\S+ by hand and put it at \S+, or give --inception FILE')


# ---------------------------------------------------------------- data sets

def picture(seed=0, side=8):
    """A smooth random RGB image."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def encoded(image, kind='PNG', **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def refused(match, *args, **kwargs):
    with pytest.raises(data.BadInput, match=match) as caught:
        data.load(*args, **kwargs)
    message = str(caught.value)
    assert '\n' not in message and message.startswith('--')
    return message


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / 'set'
    root.mkdir()
    for k in range(10):
        picture(k).save(root / f'{k}.png')
    return root


def one(tmp_path, name, image, **options):
    root = tmp_path / 'one'
    root.mkdir()
    image.save(root / name, **options)
    return data.load(root)


@pytest.mark.parametrize('mode, name, channels', [
    ('P', 'a.png', 3), ('L', 'a.png', 1), ('1', 'a.png', 1), ('LA', 'a.png', 1), ('RGB', 'a.bmp', 3),
    ('RGBA', 'a.png', 3), ('CMYK', 'a.jpg', 3), ('RGB', 'a.JPEG', 3), ('RGB', 'a.webp', 3),
    ('YCbCr', 'a.jpg', 3), ('P', 'a.gif', 3)])
def test_modes(tmp_path, mode, name, channels):
    set_ = one(tmp_path, name, picture().convert(mode))
    assert set_.pixels.shape == (1, channels, 8, 8) and set_.pixels.dtype == torch.uint8
    assert set_.flip == (channels == 3) and set_.labels is None and set_.classes is None
    if name == 'a.png' and mode in ('RGBA', 'P', 'L'):
        expected = np.asarray(picture().convert(mode).convert('L' if channels == 1 else 'RGB'))
        assert (set_[0].permute(1, 2, 0).numpy().squeeze() == expected).all()


@pytest.mark.parametrize('mode', ['RGBA', 'LA'])
def test_transparent_is_white(tmp_path, mode):
    assert one(tmp_path, 'a.png', Image.new(mode, (4, 4), 0)).pixels.unique().tolist() == [255]


@pytest.mark.parametrize('name', ['a.png', 'a.tif', 'a.pgm'])
def test_16_bits_are_scaled_not_clipped(tmp_path, name):
    ramp = (np.arange(16, dtype=np.uint16) * 257 * 17).reshape(4, 4)
    if name == 'a.pgm':  # which Pillow 10 can read only
        (tmp_path / name).write_bytes(b'P5 4 4 65535\n' + ramp.astype('>u2').tobytes())
        set_ = data.load(tmp_path, channels=None)
    else:
        set_ = one(tmp_path, name, Image.fromarray(ramp))
    assert set_.channels == 1 and set_.pixels.flatten().tolist() == list(range(0, 256, 17))


def test_exif_rotation_is_applied(tmp_path):
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:, :4] = 255  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise: the top half is white
    set_ = one(tmp_path, 'a.png', Image.fromarray(pixels), exif=exif)
    assert (set_[0][0, :4] == 255).all() and (set_[0][0, 4:] == 0).all()


def test_centre_square_and_channels(tmp_path):
    wide = np.zeros((4, 10, 3), np.uint8)
    wide[:, 3:7] = (255, 0, 0)
    root = tmp_path / 'wide'
    root.mkdir()
    Image.fromarray(wide).save(root / 'a.png')
    assert data.load(root)[0][0].eq(255).all()
    grey = data.load(root, channels=1)
    assert grey.pixels.shape == (1, 1, 4, 4) and grey.pixels.unique().tolist() == [76]
    assert data.load(root, image_size=2).pixels.shape == (1, 3, 2, 2)
    Image.new('L', (4, 4), 9).save(root / 'a.png')
    assert data.load(root, channels=3)[0].unique().tolist() == [9]


def test_broken_files_are_skipped_and_counted(folder, capsys):
    whole = (folder / '3.png').read_bytes()
    (folder / '3.png').write_bytes(whole[:len(whole) // 2])
    (folder / '7.png').write_text('not an image')
    (folder / 'notes.txt').write_text('ignored')
    (folder / '.hidden.png').write_text('ignored')
    set_ = data.load(folder)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and 'skipped 2 of 10 images' in lines[0] and '3.png' in lines[0]
    kept = [k for k in range(10) if k not in (3, 7)]
    assert all((set_[i].permute(1, 2, 0).numpy() == np.asarray(picture(k))).all()
               for i, k in enumerate(kept))


def test_labels_follow_skipped_images(tmp_path):
    for k, name in enumerate('abba'):
        os.makedirs(tmp_path / 'set' / name, exist_ok=True)
        picture(k).save(tmp_path / 'set' / name / f'{k}.png')
    (tmp_path / 'set' / 'a' / '0.png').write_text('')
    set_ = data.load(tmp_path / 'set')
    assert set_.classes == ['a', 'b'] and set_.labels.tolist() == [0, 1, 1]


def test_nothing_to_read_is_refused(tmp_path):
    (tmp_path / 'empty').mkdir()
    refused('no images', tmp_path / 'empty')
    (tmp_path / 'bad').mkdir()
    for k in range(3):
        (tmp_path / 'bad' / f'{k}.png').write_text('no image')
    refused('none of 3 images', tmp_path / 'bad')
    refused('no such data set.*accepted: glyphs', tmp_path / 'absent')
    refused('no such data set', 'glyph')
    (tmp_path / 'a.txt').write_text('')
    refused('a.txt: is of another kind; accepted', tmp_path / 'a.txt')
    (tmp_path / 'a.zip').write_text('')
    refused('zip', tmp_path / 'a.zip')
    (tmp_path / 'a.npy').write_text('')
    refused('--dataset .*a.npy', tmp_path / 'a.npy')


@pytest.mark.parametrize('given', [{'split': 'valid'}, {'channels': 2}, {'image_size': 0}])
def test_bad_arguments_are_refused(given):
    refused(f'--{list(given)[0]} .*accepted', **given)


def test_small_files_are_refused_but_arrays_are_enlarged(folder, tmp_path):
    picture(0, 6).save(folder / '5.png')
    assert '--image_size of at most 6' in refused('5.png.* is 6x6', folder)
    refused('0.png.* is 8x8', folder, image_size=16)
    np.save(tmp_path / 'a.npy', np.zeros((2, 8, 8), np.uint8))
    assert data.load(tmp_path / 'a.npy', image_size=16).pixels.shape == (2, 1, 16, 16)


def test_symlink_loop_ends(folder):
    (folder / 'loop').symlink_to(folder, target_is_directory=True)
    assert len(data.load(folder)) == 10


def test_own_splits_of_a_folder(tmp_path, folder):
    assert len(data.load(folder, split='test')) == 10
    for name, count in (('train', 3), ('test', 2)):
        for k in range(count):
            os.makedirs(tmp_path / 'both' / name / f'c{k % 2}', exist_ok=True)
            picture(k).save(tmp_path / 'both' / name / f'c{k % 2}' / f'{k}.png')
    train, test = (data.load(tmp_path / 'both', split=split) for split in ('train', 'test'))
    assert (len(train), len(test)) == (3, 2)
    assert train.classes == ['c0', 'c1'] and train.labels.tolist() == [0, 0, 1]


def test_zip(tmp_path, capsys):
    path = tmp_path / 'in' / 'set.zip'
    path.parent.mkdir()
    with zipfile.ZipFile(path, 'w') as archive:
        for k in range(6):
            archive.writestr(f'{"cat" if k % 2 else "ant"}/{k}.png', encoded(picture(k)))
        for name in ('../evil.png', '/../evil.png', '__MACOSX/cat/0.png', 'cat/.0.png'):
            archive.writestr(name, encoded(picture()))
        archive.writestr('readme.txt', 'ignored')
        archive.writestr('cat/empty.png', b'')
    set_ = data.load(path)
    assert set_.classes == ['ant', 'cat'] and set_.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (set_[3].permute(1, 2, 0).numpy() == np.asarray(picture(1))).all()
    assert 'skipped 1 of 7' in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ['in'] and os.listdir(tmp_path / 'in') == ['set.zip']


def test_hostile_zip_entries_are_skipped(tmp_path, capsys, monkeypatch):
    path = tmp_path / 'set.zip'
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('a.png', encoded(picture()))
        archive.writestr('b.png', encoded(Image.new('L', (64, 64))))  # a bomb under the limit below
        archive.writestr('c.png', encoded(picture()) + bytes(100_000))
        archive.writestr('locked.png', encoded(picture()))
    raw = bytearray(path.read_bytes())
    raw[raw.rindex(b'PK\x01\x02') + 8] |= 1  # the encrypted flag of the last entry
    raw[raw.rindex(b'PK\x03\x04') + 6] |= 1
    path.write_bytes(raw)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 64 * 64 - 1)  # over it, but not twice: a warning
    monkeypatch.setattr(data, 'ENTRY_LIMIT', 100_000)
    assert len(data.load(path, image_size=8)) == 1
    assert 'skipped 3 of 4' in capsys.readouterr().err


@pytest.mark.parametrize('shape', [(5, 6, 6), (5, 6, 6, 1), (5, 6, 6, 3), (5, 1, 6, 6), (5, 3, 6, 6),
                                   (5, 6, 6, 4), (5, 4, 6, 6)])
@pytest.mark.parametrize('kind', ['uint8', 'float32', 'float64', 'signed'])
def test_array_layouts_and_types(tmp_path, shape, kind):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    pixels.flat[:2] = 0, 255
    if 4 in shape:
        np.moveaxis(pixels, 3 if shape[3] == 4 else 1, 0)[3] = 255  # opaque
    stored = {'uint8': pixels, 'float32': (pixels / 255).astype(np.float32), 'float64': pixels / 255,
              'signed': (pixels / 127.5 - 1).astype(np.float32)}[kind]
    np.save(tmp_path / 'a.npy', stored)
    expected = pixels[:, None] if len(shape) == 3 else pixels
    expected = expected if expected.shape[1] in (1, 3, 4) else np.moveaxis(expected, 3, 1)
    set_ = data.load(tmp_path / 'a.npy')
    assert (set_.pixels.numpy() == expected[:, :3]).all() and set_.pixels.is_contiguous()


@pytest.mark.parametrize('array, match', [
    (np.full((2, 4, 4), np.nan, np.float32), 'nan'), (np.full((2, 4, 4), np.inf), 'inf'),
    (np.full((2, 4, 4), 255.0), '255'), (np.full((2, 4, 4), -1.5), '-1.5'),
    (np.zeros((2, 4, 4), np.int64), 'int64'), (np.zeros((2, 4, 4), bool), 'bool'),
    (np.zeros((4, 4), np.uint8), 'shape'), (np.zeros((2, 5, 5, 2), np.uint8), 'shape'),
    (np.zeros((0, 4, 4), np.uint8), 'shape'), (np.zeros((2, 4, 4), object), '[Oo]bject')])
def test_unusable_arrays_are_refused(tmp_path, array, match):
    np.save(tmp_path / 'a.npy', array, allow_pickle=True)
    refused(match, tmp_path / 'a.npy')
    np.savez(tmp_path / 'a.npz', x=array)
    assert 'accepted: glyphs' in refused(match, tmp_path / 'a.npz')


def test_npz_keys_splits_and_labels(tmp_path):
    path, images = tmp_path / 'a.npz', np.zeros((3, 4, 4), np.uint8)
    np.savez(path, x=images, y=np.arange(3, dtype=np.uint8))
    assert data.load(path).labels.tolist() == data.load(path, split='test').labels.tolist() == [0, 1, 2]
    np.savez(path, train_images=images, train_labels=np.ones((3, 1), np.uint8),
             test_images=images[:2], test_labels=np.zeros((2, 1), np.uint8))
    assert data.load(path).labels.tolist() == [1, 1, 1]
    assert data.load(path, split='test').labels.tolist() == [0, 0]
    np.savez(path, images)
    assert len(data.load(path)) == 3
    np.savez(path, other=images)
    refused('other', path)
    np.savez(path, x=images, y=np.arange(2))  # refused where they are wanted
    assert data.load(path).labels is None and '(2,) for 3 images' in data.load(path).unlabelled


@pytest.mark.parametrize('shape', [(5, 4, 4), (5, 4, 4, 1), (5, 4, 4, 3), (5, 4, 4, 4), (5, 6, 4, 3)])
def test_arrays_of_the_right_size_are_taken_as_they_are(tmp_path, shape):
    images = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
    np.save(tmp_path / 'a.npy', images)
    got = data.load(tmp_path / 'a.npy')
    source = data.find(str(tmp_path / 'a.npy'), '', None, 'train')[1]
    plain = data.Images('a', None, source, None, None, 4, got.channels)
    assert got.pixels.shape == (5, 1 if shape[3:] in ((), (1,)) else 3, 4, 4) and got.pixels.is_contiguous()
    assert all(np.array_equal(plain.decode(k)[0], got.pixels[k]) for k in range(5))


def test_medmnist_is_downloaded_once_and_checked(tmp_path, monkeypatch):
    """A fake archive in the form of theirs, behind a fake server."""
    from torchvision.datasets import utils
    asked, content = [], {}

    def fetch(url, path, **how):
        asked.append(url)
        Path(path).write_bytes(content[url.split('/')[-1].removesuffix('?download=1')])
    monkeypatch.setattr(utils, '_urlretrieve', fetch)
    monkeypatch.setattr(utils, '_get_redirect_url', lambda url, max_hops: url)
    for name, size, labels in (('dermamnist', 28, np.arange(6)[:, None] % 2), ('breastmnist', 64, np.ones(
            (6, 1))), ('chestmnist', 128, np.ones((6, 14)))):
        file, shape = io.BytesIO(), (size, size, 3)[:2 + (name == 'dermamnist')]
        x = {f'{split}_images': np.full((n, *shape), n, np.uint8)
             for split, n in (('train', 6), ('val', 2), ('test', 3))}
        np.savez_compressed(file, **x, train_labels=labels.astype(np.uint8),
                            val_labels=np.zeros((2, labels.shape[1]), np.uint8),
                            test_labels=np.zeros((3, labels.shape[1]), np.uint8))
        key = f'{name}.npz' if size == 28 else f'{name}_{size}.npz'
        content[key] = file.getvalue()
        for given in (size, size - 1) if size > 28 else (None, 28):  # the next larger one serves
            refused(f'{name}: File not found or corrupted.*fetch by hand {tmp_path}/{name}.npz', name,
                    tmp_path, given)
        assert not (tmp_path / key).exists()
        row, at = list(data.MEDMNIST[name]), 1 + data.MEDMNIST_SIZES.index(size)
        row[at] = utils.calculate_md5(tmp_path / f'{key}.part')
        monkeypatch.setitem(data.MEDMNIST, name, tuple(row))
        asked.clear()
        train_, test = data.load(name, tmp_path, size), data.load(name, tmp_path, size, split='test')
        assert not asked and (tmp_path / key).exists()  # what was fetched before, now found to be whole
        assert train_.pixels.shape == (6, 3 if len(shape) > 2 else 1, size, size) and len(test) == 3
        assert train_.pixels.eq(6).all() and test.pixels.eq(3).all()
        if name == 'dermamnist':
            assert train_.class_count() == 2 and train_.labels.tolist() == [0, 1] * 3 and train_.flip
        if name == 'chestmnist':
            with pytest.raises(launch.BadInput, match='chestmnist has .*several an image'):
                train_.class_count()
    assert all(len(row) == 5 and all(re.fullmatch('[0-9a-f]{32}', md5) for md5 in row[1:])
               for name, row in data.MEDMNIST.items() if name not in ('dermamnist', 'breastmnist', 'chestmnist'))


def refuse_connection():
    raise urllib.error.URLError('no network in a test')


def test_bloodmnist_and_lsun(tmp_path, monkeypatch):
    from torchvision.datasets import utils
    monkeypatch.setattr(utils, '_get_redirect_url', lambda url, max_hops: refuse_connection())
    refused('bloodmnist.npz', 'bloodmnist', tmp_path)
    refused('lsun_bedroom', 'lsun_bedroom', tmp_path)
    np.savez(tmp_path / 'bloodmnist.npz', train_images=np.zeros((3, 28, 28, 3), np.uint8),
             train_labels=np.ones((3, 1), np.uint8))
    set_ = data.load('bloodmnist', tmp_path)
    assert set_.pixels.shape == (3, 3, 28, 28) and set_.labels.tolist() == [1, 1, 1]
    for k in range(2):
        os.makedirs(tmp_path / 'lsun_bedroom' / str(k))
        picture(k, 64).save(tmp_path / 'lsun_bedroom' / str(k) / 'a.webp')
    set_ = data.load('lsun_bedroom', tmp_path)
    assert set_.pixels.shape == (2, 3, 256, 256) and set_.labels is None and set_.flip


def test_celeba_crop(tmp_path, monkeypatch):
    from torchvision import datasets
    image = np.zeros((218, 178, 3), np.uint8)
    image[39:179, 19:159] = 255
    os.makedirs(tmp_path / 'celeba' / 'img_align_celeba')
    Image.fromarray(image).save(tmp_path / 'celeba' / 'img_align_celeba' / '1.png')

    class Fake:
        filename = ['1.png']

        def __init__(self, root, split, download):
            pass
    monkeypatch.setattr(datasets, 'CelebA', Fake)
    set_ = data.load('celeba64', tmp_path)
    assert set_.pixels.shape == (1, 3, 64, 64) and set_.pixels.eq(255).all()


@pytest.mark.parametrize('name, kind, where', [
    ('mnist', 'MNIST', 'MNIST/raw'), ('fashion_mnist', 'FashionMNIST', 'FashionMNIST/raw'),
    ('cifar10', 'CIFAR10', 'cifar-10-python.tar.gz'), ('celeba64', 'CelebA', 'celeba')])
def test_no_network_is_one_line(tmp_path, monkeypatch, name, kind, where):
    from torchvision import datasets
    for error in (urllib.error.URLError('no\nroute'), RuntimeError('first\nsecond'), OSError('gone')):
        def fail(*args, error=error, **kwargs):
            raise error
        monkeypatch.setattr(datasets, kind, fail)
        assert f'{tmp_path}/{where}' in refused(f'--dataset {name}', name, tmp_path)


def test_torchvision_arrays(tmp_path, monkeypatch):
    from torchvision import datasets

    class Fake:
        classes = ['a', 'b']

        def __init__(self, root, train, download):
            self.data = torch.zeros(4 if train else 2, 28, 28, dtype=torch.uint8)
            self.targets = torch.ones(4 if train else 2, dtype=torch.int64)
    monkeypatch.setattr(datasets, 'MNIST', Fake)
    train, test = data.load('mnist', tmp_path), data.load('mnist', tmp_path, 32, 3, 'test')
    assert train.pixels.shape == (4, 1, 28, 28) and test.pixels.shape == (2, 3, 32, 32)
    assert train.labels.tolist() == [1] * 4 and not test.flip and test.classes == ['a', 'b']


def test_glyphs_are_the_same_bytes_and_balanced():
    images, labels = data.glyphs(500)
    again, _ = data.glyphs(500)
    assert images.shape == (500, 16, 16) and images.dtype == np.uint8 and (images == again).all()
    assert np.bincount(labels).tolist() == [50] * 10
    assert not (images == data.glyphs(500, split='test')[0]).all()
    assert images.max(axis=(1, 2)).min() > 120 and images[:, 0].max() < 128 and np.median(images) == 0
    assert data.glyphs(20, 28)[0].shape == (20, 28, 28)
    assert len({image.tobytes() for image in images}) == 500


def test_glyphs_classes_are_told_apart():
    train, labels = data.glyphs(2000)
    test, truth = data.glyphs(300, split='test')
    far = torch.cdist(torch.tensor(test).flatten(1).float(), torch.tensor(train).flatten(1).float())
    assert (labels[far.argmin(1)] == truth).mean() > 0.95


def test_load_glyphs():
    set_ = data.load()
    assert set_.pixels.shape == (10_000, 1, 16, 16) and set_.classes == list('0123456789')
    assert not set_.flip and set_.name == 'glyphs' and 5 < data.mean_norm(set_) < 16


@pytest.mark.parametrize('source', ['folder', 'zip', 'npy'])
@pytest.mark.parametrize('workers', [0, 2])
def test_batches_serve_the_same_in_order(folder, tmp_path, monkeypatch, source, workers):
    path = folder
    if source == 'zip':
        path = tmp_path / 'a.zip'
        with zipfile.ZipFile(path, 'w') as archive:
            for k in range(10):
                archive.write(folder / f'{k}.png', f'{k}.png')
    if source == 'npy':
        path = tmp_path / 'a.npy'
        np.save(path, np.stack([np.asarray(picture(k)) for k in range(10)]))
    small = data.load(path)
    monkeypatch.setattr(data, 'MEMORY_LIMIT', 0)
    large = data.load(path)
    assert small.pixels is not None and large.pixels is None and len(large) == 10
    indices = [torch.randint(10, (4,), generator=torch.Generator().manual_seed(k)) for k in range(6)]
    state = torch.get_rng_state()
    pairs = list(zip(data.batches(small, indices), data.batches(large, indices, workers=workers),
                     strict=True))
    assert len(pairs) == 6 and (torch.get_rng_state() == state).all()
    for (a, b), index in zip(pairs, indices):
        assert a.shape == (4, 3, 8, 8) and a.dtype == torch.uint8 and torch.equal(a, b)
        assert torch.equal(a, small.pixels[index])
    assert data.mean_norm(small) == data.mean_norm(large)
    assert torch.equal(torch.stack(list(large)), small.pixels)  # plain iteration ends


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


def test_a_dataloader_takes_it(folder):
    loader = torch.utils.data.DataLoader(data.load(folder), batch_size=4)
    assert [len(batch) for batch in loader] == [4, 4, 2]


def test_all_pixel_values_survive():
    values = torch.arange(256, dtype=torch.uint8)
    x = data.to_float(values)
    assert x.dtype == torch.float32 and (x.min(), x.max()) == (-1, 1)
    assert torch.equal(data.to_uint8(x), values)
    assert data.to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_mean_norm(tmp_path):
    np.save(tmp_path / 'a.npy', np.full((300, 4, 4, 3), 255, np.uint8))
    assert data.mean_norm(data.load(tmp_path / 'a.npy')) == pytest.approx(4)
    assert data.mean_norm(data.load(tmp_path / 'a.npy'), n=7) == pytest.approx(4)


# What people have: {path: its colour}, and the labels of the training images and of the others.
LAYOUTS = {
    'train/cat train/dog val/dog': ('01', '1'), 'train/cat train/dog valid/dog test/cat': ('01', '0'),
    'Train/cat Train/dog TEST/dog': ('01', '1'), 'training/cat training/dog testing/dog': ('01', '1'),
    'training_set/cat training_set/dog test_set/dog': ('01', '1'), 'train2017/cat train2017/dog val2017/dog': ('01', '1'),
    'seg_train/cat seg_train/dog seg_test/dog seg_pred': ('01', '1'), 'cat/train dog/train dog/test cat/test': ('01', '01'),
    'images/train/cat images/train/dog images/dev/dog masks/train/cat': ('01', '1'), 'cat dog': ('01', '01'),
    'train/cat train/dog test/dog test/cow': ('01', None), 'train/cat train/dog test': ('01', None),
    'train/cat train/dog stray.png': ('01', '01'), 'train plane car': ('120', '120'), 'cat dog a.png': (None, None),
    'cat': (None, None), '00000/img00000000.png 00001/img00001000.png': (None, None)}


@pytest.mark.parametrize('names', LAYOUTS)
def test_splits_and_what_holds_all_are_no_classes(tmp_path, capsys, names):
    files = [name if name.endswith('.png') else f'{name}/0.png' for name in names.split()]
    for k, name in enumerate(files):
        (tmp_path / 'set' / 'top' / name).parent.mkdir(parents=True, exist_ok=True)
        picture(k).save(tmp_path / 'set' / 'top' / name)
    zips = {'top.zip': 'top/{}', 'dot.zip': './{}'}
    for path, form in zips.items():
        (tmp_path / path).write_bytes(zipped([(form.format(name), encoded(picture(k))) for k, name in enumerate(files)]))
    slashes = bytes(zipped([(f'top/{name}', encoded(picture(k))) for k, name in enumerate(files)]))
    for name in files:
        slashes = slashes.replace(f'top/{name}'.encode(), f'top/{name}'.replace('/', '\\').encode())
    (tmp_path / 'back.zip').write_bytes(slashes)
    for split, labels in zip(('train', 'test'), LAYOUTS[names]):
        sets = [data.load(tmp_path / path, split=split) for path in ('set', 'top.zip', 'dot.zip', 'back.zip')]
        for set_ in sets:
            found = None if set_.labels is None else ''.join(map(str, set_.labels.tolist()))
            assert found == (labels and ''.join(sorted(labels)) if names != 'train plane car' else '012')
            assert set_.identity == sets[0].identity and len(set_) == (len(labels) if labels else len(set_))
        said = capsys.readouterr().out
        assert ('split' in said) == (split == 'test' or 'rain' in names and 'plane' not in names)
        assert said.count('\n') == (4 if said else 0)
    if 'seg' in names:
        assert 'without 1 images beside seg_test, seg_train' in said


@pytest.mark.parametrize('table, labels', [
    ([['00000/img00000000.png', 1], ['00001/img00001000.png', 0]], [1, 0]), (None, 'null'), ('no', 'cannot be read'),
    ([['00000/img00000000.png', 1]], 'no label for 1 of 2'), ([['a.png', 1]], 'no labels'), (7, 'cannot be read'),
    ([['00000/img00000000.png', .5], ['00001/img00001000.png', 0]], 'float64 labels'),
    ([['00000/img00000000.png', [0, 1]], ['00001/img00001000.png', [1, 0]]], 'one-hot: give their argmax'),
    ([['00000/img00000000.png', [1, 1]], ['00001/img00001000.png', [1, 0]]], 'several an image'),
    ([['00000/img00000000.png', 'dog'], ['00001/img00001000.png', 'cat']], [1, 0])])
def test_labels_of_dataset_json(tmp_path, table, labels):
    files = [('00000/img00000000.png', encoded(picture())), ('00001/img00001000.png', encoded(picture(1)))]
    for path, top in (('b.zip', ''), ('a.zip', 'set/')):
        entries = [*files, ('dataset.json', json.dumps({'labels': table}).encode())]
        (tmp_path / path).write_bytes(zipped([(top + name, raw) for name, raw in entries]))
        set_ = data.load(tmp_path / path)
        assert len(set_) == 2 and (set_.labels is None) == isinstance(labels, str)
        assert labels in set_.unlabelled if isinstance(labels, str) else set_.labels.tolist() == labels
    if isinstance(labels, str):  # they refuse the set only where they are wanted
        refuses(['train.py', *TINY, '--classes', '--dataset', tmp_path / 'a.zip', '--out_dir', tmp_path / 'o'],
                f'--classes: .*a.zip has .*{re.escape(labels)}')


def test_links_are_followed_and_loops_cut(tmp_path):
    for name in ('store/cat', 'store/dog', 'set/fox'):
        (tmp_path / name).mkdir(parents=True)
        picture(len(name)).save(tmp_path / name / '0.png')
    for name, target in (('cat', '../store/cat'), ('dog', tmp_path / 'store' / 'dog'), ('loop', '.'), ('up', '..'),
                         ('root', '/'), ('fox/1.png', '../../store/cat/0.png'), ('gone', 'nowhere'), ('fox/up', '..')):
        (tmp_path / 'set' / name).symlink_to(target)
    (tmp_path / 'store' / 'cat' / 'dog').symlink_to('../dog')  # and from there back again
    (tmp_path / 'store' / 'dog' / 'cat').symlink_to('../cat')
    set_ = data.load(tmp_path / 'set')
    assert set_.classes == ['cat', 'dog', 'fox'] and {0, 1, 2} == set(set_.labels.tolist()) and len(set_) < 8


def of_floats(*edges, share=0.5):
    x = np.random.default_rng(0).random((9, 8, 8))
    x.flat[:int(share * x.size)] *= edges[0] < 0 and -1 or 1
    x.flat[-2:] = edges
    return x


@pytest.mark.parametrize('array, brightest, said', [
    (of_floats(-1e-7, 1, share=0), 255, '1 values up to 1.0e-07 beyond [0, 1] clipped'), (of_floats(-1, 1.0005), 255, 'beyond [-1, 1]'),
    (of_floats(0, 1).astype(np.float16), 255, ''), (of_floats(-0.05, 1, share=0), None, 'neither|not in'),
    (of_floats(-0.05, 1, share=0.001), None, 'not in'), (of_floats(0, 1.1), None, '1.1'), (of_floats(0, 1) * 255, None, '255'),
    ((of_floats(0, 1) * 15).astype(np.uint8), 15, 'nearly black, no value above 15 of 255'),
    (np.zeros((8, 8, 40), np.uint8), None, r'moveaxis\(x, -1, 0\)'), (np.zeros((8, 8, 3, 40), np.uint8), None, 'moveaxis'),
    (np.zeros((9, 12, 3), np.uint8), None, r'one image\? give x\[None\]'), (np.zeros((9, 8, 8), np.uint16), None, 'give uint8'),
    (np.full((9, 8, 12), 99, np.uint8), 99, '9 of 9 images cropped to the centre square')])
def test_floats_go_by_their_bulk_and_odd_arrays_are_refused_with_the_mend(tmp_path, capsys, array, brightest, said):
    np.save(tmp_path / 'a.npy', array)
    if brightest is None:
        refused(said, tmp_path / 'a.npy')
        return
    assert data.load(tmp_path / 'a.npy').pixels.max() == brightest
    out = capsys.readouterr().out
    assert said in out and out.count('\n') == bool(said)
    if said == '':
        close(data.load(tmp_path / 'a.npy').pixels[:, 0], np.rint(array.astype(float) * 255))


@pytest.mark.parametrize('limit', [2 << 30, 0])
def test_one_coloured_image_of_many_makes_the_set_coloured_and_losses_are_counted(tmp_path, capsys, monkeypatch, limit):
    monkeypatch.setattr(data, 'MEMORY_LIMIT', limit)
    for k in range(200):  # 64 of these are looked at first
        Image.new('RGB', (8, 12) if k % 50 == 0 else (8, 8), (200, 30, 30) if k == 101 else (90, 90, 90)).save(
            tmp_path / f'{k:03d}.png')
    assert data.load(tmp_path).channels == 3
    assert ('4 of 200' in capsys.readouterr().out) == bool(limit)
    assert data.load(tmp_path, channels=1, image_size=4).channels == 1
    said = capsys.readouterr().out
    assert 'resized to 4 x 4' in said and ('1 of 200 images coloured, made grey' in said) == bool(limit)


def test_a_reader_that_dies_ends_in_one_line(folder, monkeypatch):
    monkeypatch.setattr(data, 'MEMORY_LIMIT', 0)
    large = data.load(folder)
    for break_it in (lambda self: os.kill(os.getpid(), signal.SIGKILL), lambda self: 1 / 0):
        def fail(self, break_it=break_it):
            break_it(self)
            raise AssertionError
        monkeypatch.setattr(torch.Tensor, 'share_memory_', fail)
        with pytest.raises((data.BadInput, ZeroDivisionError)) as caught:
            list(data.batches(large, [torch.tensor([1])], workers=1))
        assert caught.type is ZeroDivisionError or '--workers 0' in str(caught.value) and 'shm-size' in str(caught.value)

    def full(self):
        raise RuntimeError('unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)')
    monkeypatch.setattr(torch.Tensor, 'share_memory_', full)
    with pytest.raises(data.BadInput, match='^--workers: .*No space left.*--workers 0'):
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


def classes_of(folder, *names):
    for k, name in enumerate(names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(8):
            picture(k + 9 * i, 16).save(folder / name / f'{i}.png')
    return folder


def test_classes_by_name_and_data_that_moved(tmp_path, capsys):
    photos = classes_of(tmp_path / 'photos', '2', '10', 'cat')
    run_ = ['train.py', *TINY_PP, '--D', 2, '--classes', '--out_dir', tmp_path / 'o', '--steps']
    script([*run_, 2, '--dataset', photos])
    assert 'in 3 classes (2, 10, cat)' in capsys.readouterr().out
    ckpt = ['sample.py', '--ckpt', tmp_path / 'o', '--nfe', 2, '--n', 3, '--device', 'cpu']  # a folder
    for classes, labels in (('cat,2', '[2, 0]'), ('10', '[1]'), ('none', '[]')):
        script([*ckpt, '--classes', classes, '--out', tmp_path / 'a.png'])
        assert f'classes {labels}' in capsys.readouterr().out
    refuses([*ckpt, '--classes', '0', '--out', tmp_path / 'a.png'], '--classes 0: the network knows .*2, 10, cat')
    refuses([*ckpt, '--classes', 'dog', '--out', tmp_path / 'a.png'], '--classes dog: the network knows')
    photos = photos.rename(tmp_path / 'moved')
    script([*run_, 3, '--dataset', f'{photos}/'])
    saved = torch.load(tmp_path / 'o' / 'ckpt.pt', weights_only=True)
    assert saved['step'] == 3 and saved['args']['class_names'] == ['2', '10', 'cat']
    picture(0, 16).save(photos / 'cat' / '99.png')
    refuses([*run_, 4, '--dataset', photos], 'holds a run on .*--init_from .*ckpt.pt .*24 images there, 25 here')
    (photos / 'cat' / '99.png').unlink()
    (photos / 'cat').rename(photos / 'cow')
    refuses([*run_, 4, '--dataset', photos], 'classes 2, 10, cat there, 2, 10, cow here')
    (photos / 'cow').rename(photos / 'cat')
    del saved['args']['data'], saved['args']['class_names']  # a file of before: the path counts
    torch.save(saved, tmp_path / 'o' / 'ckpt.pt')
    refuses([*run_, 4, '--dataset', photos], 'numbered in natural order now')
    refuses([*run_, 4, '--dataset', tmp_path / 'moved' / '2'], '--dataset .*2: --out_dir .*o holds a run on .*moved/; give another')


def test_a_class_of_which_nothing_can_be_read_is_named(tmp_path):
    photos = classes_of(tmp_path / 'photos', 'a', 'b', 'c')
    for path in (photos / 'c').iterdir():
        path.write_text('junk')
    assert sorted(data.load(photos).labels.tolist()) == [0] * 8 + [1] * 8
    with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()) as said:
        script(['train.py', *TINY, '--classes', '--dataset', photos, '--out_dir', tmp_path / 'o'])
    assert re.search('skipped 8 of 24.*\n--classes: 2 labels from 0 to 1, no image of c;', said.getvalue())


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


def test_init_from_brings_its_flow_and_takes_other_classes(tmp_path, capsys):
    one = classes_of(tmp_path / 'one', 'a', 'b')
    base = ['train.py', *TINY_PP, '--steps', 3, '--out_dir']
    script([*base, tmp_path / 'o', '--dataset', one, '--D', 64, '--sigma_data', 0.4, '--classes'])
    again = ['--init_from', tmp_path / 'o', '--dataset']
    net, old = (torch.load(tmp_path / 'o' / 'ckpt.pt', weights_only=True)[k] for k in ('net', 'args'))
    script([*base, tmp_path / 'p', *again, classes_of(tmp_path / 'two', 'a', 'b', 'c'), '--classes'])
    args = torch.load(tmp_path / 'p' / 'ckpt.pt', weights_only=True)['args']
    assert all(args[k] == old[k] for k in ('method', 'D', 'sigma_data', 'z_max', 'z_min')) and args['classes'] == 3
    assert 'for 3 classes, not its 2, with a new label layer and from step 0' in capsys.readouterr().out
    x, z = torch.randn(2, 3, 16, 16, generator=seeded()), torch.tensor([1., 2.])
    outs = []
    for classes in (2, 3, 0):  # a new label layer begins as the network without labels
        saved = dict(net=net, ema=net, args=dict(label_first=False))
        saved = saved if classes == 2 else checkpoint.for_classes(saved, classes)
        labels = torch.full((2,), 1 if classes == 3 else -1)
        made = checkpoint.build(saved['net'], {**old, 'classes': classes}, 'x')
        outs.append(made(x, z, labels if classes else None)[0])
    close(outs[0], outs[1], atol=1e-6)
    close(outs[0], outs[2], atol=1e-6)
    script([*base, tmp_path / 'q', *again, one, '--classes', '--D', 2, '--steps', 4])
    assert '--D 2.0 (it has 64.0)' in capsys.readouterr().out
    refuses([*base, tmp_path / 'x', *again, one, '--steps', 9, '--channels', 1], '--channels 1: --init_from .*ckpt.pt has 3')
    refuses([*base, tmp_path / 'x', *again, one, '--image_size', 8], '--image_size 8: --init_from .*ckpt.pt has 16')
    refuses([*base, tmp_path / 'x', *again, one, '--method', 'vp'], '--method vp: --init_from .* has pfgmpp')
    script(['checkpoint.py', tmp_path / 'o', '--out', tmp_path / 'ema.pt'])
    refuses([*base, tmp_path / 'x', '--init_from', tmp_path / 'ema.pt', '--dataset', one], '--init_from .*ema.pt: holds the EMA')


@pytest.mark.parametrize('solver', ['rk45', 'unipc', 'heun', 'ddim'])
@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_a_network_that_gives_nan_makes_nothing(tmp_path, monkeypatch, solver, value):
    monkeypatch.chdir(tmp_path)
    net = unet.UNet(16, 1, 8, (1, 1), 1, (8,), 0.0)
    torch.nn.init.constant_(net.conv_out.bias, value)
    args = dict(image_size=16, channels=1, nf=8, ch_mult=[1, 1], num_blocks=1, attn=[8], dropout=0.0, classes=0, M=None,
                method='vp' if solver == 'ddim' else 'pfgm', D=math.inf if solver == 'ddim' else 1.0, sigma_data=0.5,
                z_min=1e-3, z_max=9.0, upper_norm=99.0, z_exp=0.0, gamma=5.0, dataset='glyphs')
    torch.save(dict(ema=net.state_dict(), args=args, step=1), 'a.pt')
    how = ['--ckpt', 'a.pt', '--solver', solver, '--device', 'cpu', '--n', 2]
    for more in ([], ['--encode', 'glyphs'], ['--gif'], ['--interpolate']):
        refuses(['sample.py', *how, '--out', 'a.png', *more], '--ckpt.*(diverged|not finite)')
    refuses(['evaluate.py', *how, '--swd', '--bpd'], 'diverged')
    refuses(['sample.py', *how, '--tol', '1e-12'], '--tol 1e-12: finer than the float32')
    assert not [name for name in os.listdir('.') if name.endswith(('.png', '.gif', '.npz', 'results.jsonl'))]


def test_pictures_that_are_given(trained, tmp_path, capsys):
    for k in range(2):
        digit = data.load()[k]
        Image.fromarray(digit[0].numpy()).save(tmp_path / f'{k}.png')
    how = ['--ckpt', trained / 'ckpt.pt', '--tol', '1e-6', '--device', 'cpu', '--out']
    script(['sample.py', '--encode', tmp_path / '0.png', *how, tmp_path / 'a.png'])
    assert '1 images: mean error' in capsys.readouterr().out
    script(['sample.py', '--interpolate', tmp_path / '0.png', tmp_path / '1.png', *how, tmp_path / 'b.npz'])
    made = np.load(tmp_path / 'b.npz')['arr_0'][..., 0].astype(int)
    assert len(made) == 8  # z_min is not the plane of the data, but near it
    assert abs(made[0] - data.load()[0][0].numpy()).mean() < 2 and abs(made[-1] - data.load()[1][0].numpy()).mean() < 2
    refuses(['sample.py', '--interpolate', tmp_path / '0.png', *how, tmp_path / 'b.png'], '--interpolate .*0.png: give two')
    refuses(['sample.py', '--encode', tmp_path / 'no.png', *how, tmp_path / 'b.png'], '^--encode .*no.png: no such')


def test_restored_images_keep_what_is_known_and_are_images_that_fit(tmp_path, monkeypatch):
    """On the exact field, whose samples are its charges: of each known part two of them."""
    monkeypatch.chdir(tmp_path)
    x = torch.randint(60, 196, (24, 8, 8, 1), generator=seeded()).expand(-1, -1, -1, 3).clone()
    x[12:] = x[:12]
    x[12:, 6:] = x[12:, 6:].flip(0)                                 # another image's two rows below
    tint = torch.randint(-25, 26, (24, 8, 8, 3), generator=seeded(1))
    tinted = x[:12].repeat(2, 1, 1, 1) + tint - tint.roll(1, 3)     # of mean 0
    mask, follow = np.zeros((8, 8), np.uint8), baselines.Flow.follow
    mask[6:] = 255
    Image.fromarray(mask).save('mask.png')
    for kind, charges, words in (('inpaint', x, ['--mask', 'mask.png']), ('colorize', tinted, [])):
        np.save('x.npy', charges.to(torch.uint8).numpy())
        made = []

        def kept(flow, *args, known, **how):
            end, nfe = follow(flow, *args, known=known, **how)
            close(known[0](end), known[0](known[1].expand_as(end)), atol=1e-6)  # without the paste
            made.append(data.to_uint8(end).permute(0, 2, 3, 1))
            return end, nfe
        monkeypatch.setattr(baselines.Flow, 'follow', kept)
        given = ['sample.py', '--exact', '--dataset', 'x.npy', f'--{kind}', 'x.npy', '--device', 'cpu']
        script([*given, *words, '--nfe', 40, '--z_min', 1e-3, '--n', 16, '--out', f'{kind}.png'])
        monkeypatch.setattr(baselines.Flow, 'follow', follow)
        assert Image.open(f'{kind}.png').size == (18 * 68 + 4, 8 * 68 + 4) and len(made) == 8
        for i, results in enumerate(made):
            fits = charges[[i, i + 12], ..., :results.shape[3]].flatten(1).int()
            error = (results.flatten(1)[:, None].int() - fits).abs().amax(2)      # (16, 2)
            assert (error.amin(1) <= 1).all() and len(error.argmin(1).unique()) == 2, (kind, i)
    refuses([*given, '--solver', 'rk45'], '--solver rk45')
    refuses([*given, '--mask', 'mask.png'], '--inpaint and --mask belong together')
    refuses(['sample.py', '--exact', '--colorize', 'glyphs'], 'glyphs: the images of this network are grey')
    Image.fromarray(0 * mask).save('none.png')
    given[given.index('--colorize')] = '--inpaint'
    refuses([*given, '--mask', 'none.png'], '--mask none.png: nothing in it is white')


def test_references_of_others(tmp_path, capsys):
    rng = np.random.default_rng(0)
    x, eye = rng.integers(0, 256, (6, 8, 8, 3), np.uint8), np.eye(bench.POOL)
    np.savez(tmp_path / 'adm.npz', arr_0=x, mu=np.zeros(bench.POOL), sigma=eye, mu_s=np.zeros(3), sigma_s=np.eye(3))
    features = rng.standard_normal((9, bench.POOL)).astype(np.float32)
    np.savez(tmp_path / 'song.npz', pool_3=features)
    found = evaluate.read_stats(str(tmp_path / 'song.npz'), 'any')
    close(found.mu, features.mean(0), atol=1e-5)
    close(found.sigma, np.cov(features.astype(float).T), atol=1e-5)
    np.save(tmp_path / 's.npy', x)
    common = ['evaluate.py', '--samples', tmp_path / 's.npy', '--inception', 'random', '--device', 'cpu', '--results',
              tmp_path / 'r.jsonl', '--workers', 0]
    script([*common, '--ref', tmp_path / 'adm.npz', '--prc', '--swd'])
    row = json.loads(open(tmp_path / 'r.jsonl').read().splitlines()[-1])
    assert row['precision'] == row['recall'] == 1 and row['swd'] == 0
    script([*common, '--ref', tmp_path / 'song.npz', '--kid'])
    refuses([*common, '--ref', tmp_path / 'song.npz', '--swd'], 'do for --fid --is --kid --prc only')
    Image.new('RGB', (9, 12), (9, 99, 200)).save(tmp_path / 'wide.png')
    refuses([*common[:2], tmp_path / 'wide.png', *common[3:], '--ref', tmp_path / 's.npy', '--swd', '--image_size', 16],
            "--samples .*wide.png: 'wide.png' is 9x12; give an --image_size of at most 9, not 16")
    script([*common[:2], tmp_path / 'wide.png', *common[3:], '--ref', tmp_path / 's.npy', '--swd', '--image_size', 8])
    assert '1 of 1 images cropped to the centre square; 1 of 1 images resized to 8 x 8' in capsys.readouterr().out


# ---------------------------------------------------------------- hostile input
# Each case is one file, folder or flag that a stranger made: it is used rightly or refused in one
# line. The default suite takes the first cases of each generator; `pytest -m slow` takes them all.

def mutated(raw, rng):
    """The bytes with one kind of damage."""
    raw, n = bytearray(raw), len(raw)
    at, size = int(rng.integers(n)), int(rng.integers(1, 64))
    kind = rng.integers(7)
    if kind == 0:
        del raw[at:]
    elif kind == 1:
        del raw[at:at + size]
    elif kind == 2:
        raw[at:at] = rng.bytes(size)
    elif kind == 3:
        raw[at:at + 4] = b'\xff\xff\xff\x7f'
    elif kind == 4:
        start = int(rng.integers(n))
        raw[at:at + size] = raw[start:start + size]
    else:  # most readers look hardest at the beginning and the end
        for k in rng.integers(n if kind == 5 else min(n, 100), size=size % 8 + 1):
            raw[k * (-1) ** (size % 2)] ^= 1 << int(rng.integers(8))
    return bytes(raw)


def zipped(entries, packing=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, 'w', packing) as archive:
        warnings.simplefilter('ignore')  # of a name that is there twice
        for name, content in entries:
            archive.writestr(name, content)
    return file.getvalue()


def patched(raw, signature, offset, layout, *values):
    """A zip's bytes with a field of its last header of that kind overwritten."""
    raw = bytearray(raw)
    struct.pack_into(layout, raw, raw.rindex(signature) + offset, *values)
    return bytes(raw)


def npy(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def header(text):
    """A .npy of that header and 64 bytes of pixels."""
    text = text.encode() + b'\n'
    return b'\x93NUMPY' + b'\1\0' + struct.pack('<H', len(text)) + text + bytes(64)


def claims(shape, descr='|u1'):
    return header(repr({'descr': descr, 'fortran_order': False, 'shape': shape}))


def chunk(kind, content):
    return (struct.pack('>I', len(content)) + kind + content
            + struct.pack('>I', zlib.crc32(kind + content)))


def png_of(width, height, content=b'', bits=8, colour=0):
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, bits, colour,
                                                                 0, 0, 0))
            + chunk(b'IDAT', zlib.compress(content)) + chunk(b'IEND', b''))


def pictures():
    """{name: bytes} of every kind of image file that is accepted."""
    image, found = picture(1), {}
    for name, kind, mode, options in (
            ('rgb.png', 'PNG', 'RGB', {}), ('grey.jpg', 'JPEG', 'L', {}), ('a.webp', 'WEBP', 'RGB', {}),
            ('cmyk.jpeg', 'JPEG', 'CMYK', {}), ('a.bmp', 'BMP', 'RGB', {}), ('a.pgm', 'PPM', 'L', {}),
            ('a.tif', 'TIFF', 'RGB', dict(compression='tiff_lzw')), ('g4.tiff', 'TIFF', '1', dict(
                compression='group4')), ('jpg.tif', 'TIFF', 'RGB', dict(compression='jpeg')),
            ('alpha.png', 'PNG', 'P', dict(transparency=bytes(range(0, 256)))),
            ('la.png', 'PNG', 'LA', {}), ('f.tif', 'TIFF', 'F', {}), ('i.tif', 'TIFF', 'I', {}),
            ('16.png', 'PNG', 'I;16', {}),
            ('film.gif', 'GIF', 'P', dict(save_all=True, append_images=[picture(2), picture(3)])),
            ('film.webp', 'WEBP', 'RGB', dict(save_all=True, append_images=[picture(2)])),
            ('film.png', 'PNG', 'RGB', dict(save_all=True, append_images=[picture(2)])),
            ('pages.tif', 'TIFF', 'RGB', dict(save_all=True, append_images=[picture(2)])),
            ('cmyk.tif', 'TIFF', 'CMYK', {}), ('lab.tif', 'TIFF', 'LAB', {})):
        given = image.convert('L').convert(mode) if mode in ('I;16', 'F', 'I') else (
            image if mode == 'LAB' else image.convert(mode))
        if mode == 'LAB':
            given = Image.frombytes('LAB', image.size, image.tobytes())
        found[name] = encoded(given, kind, **options)
    return found


def odd_pictures():
    exif = Image.Exif()
    exif[0x0112] = 77
    whole = encoded(picture())
    return {
        'one.png': encoded(picture(0, 1)), 'long.png': encoded(Image.new('L', (30000, 1), 7)),
        'exif.jpg': encoded(picture(), 'JPEG', exif=exif), 'empty.png': b'', 'half.png': whole[:80],
        'half.jpg': encoded(picture(0, 64), 'JPEG')[:900], 'jpeg.png': encoded(picture(), 'JPEG'),
        'text.jpg': b'hello\n' * 99, 'zip.png': zipped([('a.png', whole)]), 'zero.png': png_of(0, 0),
        'bomb.png': png_of(60000, 60000), 'wide.png': png_of(2 ** 31 - 1, 1), 'short.png': png_of(9, 9),
        'flat.bmp': b'BM' + struct.pack('<IHHIIiiHHIIiiII', 54, 0, 0, 54, 40, 8, 0, 1, 24, 0, 0, 0, 0,
                                        0, 0), 'none.pgm': b'P5 0 0 255\n', 'huge.pgm': b'P5 99999 99999 255\n',
        'a\nb.png': b'two\nlines', 'flat.gif': b'GIF89a' + bytes(7) + b',' + bytes(9) + b'\2\0;',
        'eps.png': b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) (w) file\n',
        'text.png': whole[:33] + chunk(b'zTXt', b'a\0\0' + zlib.compress(bytes(2 ** 21))) + whole[33:],
        'nan.tif': encoded(Image.fromarray(np.full((8, 8), np.nan, np.float32)), 'TIFF'),
    }


def archives():
    """{name: bytes} of zips, .npy and .npz that lie, or are odd."""
    whole, grey = encoded(picture()), np.zeros((3, 8, 8), np.uint8)
    one, npz = zipped([('a.png', whole)]), zipped([('x.npy', npy(grey))])
    central, local, end = b'PK\x01\x02', b'PK\x03\x04', b'PK\x05\x06'
    secret = patched(patched(one, central, 8, '<H', 1), local, 6, '<H', 1)
    lying = patched(zipped([('a.png', bytes(2 ** 24))]), central, 24, '<I', 100)
    found = {
        'good.zip': one, 'nested.zip': zipped([('b.zip', one)]), 'secret.zip': secret, 'lying.zip': lying,
        'inner.zip': zipped([('b.png', one)]), 'twice.zip': zipped([('a.png', whole), ('a.png', b'')]),
        'up.zip': zipped([('../a.png', whole), ('/etc/a.png', whole), ('b/../../c.png', whole)]),
        'drive.zip': zipped([('C:\\a.png', whole), ('a\0.png', whole), ('\n.png', whole)]),
        'crc.zip': patched(one, central, 16, '<I', 1), 'half.zip': one[:len(one) // 2],
        'big.zip': patched(one, central, 20, '<II', 2 ** 32 - 2, 2 ** 32 - 2), 'none.zip': zipped([]),
        'huge.zip': patched(one, central, 24, '<I', 2 ** 31), 'tail.zip': one + bytes(70_000),
        'many.zip': patched(one, end, 8, '<HH', 65534, 65534), 'new.zip': patched(one, central, 6, '<H', 99),
        'far.zip': patched(one, central, 42, '<I', 2 ** 31), 'method.zip': patched(one, central, 10, '<H', 97),
        'disk.zip': patched(one, end, 4, '<HH', 7, 7), 'front.zip': b'MZ' * 50 + one,
        'bz.zip': zipped([('a.png', whole)], zipfile.ZIP_BZIP2), 'png.zip': whole,
        'lzma.zip': zipped([('a.png', whole)], zipfile.ZIP_LZMA), 'folders.zip': zipped([('a.png/', b'')]),
        'good.npz': npz, 'crc.npz': patched(npz, central, 16, '<I', 1), 'empty.npz': zipped([]),
        'raw.npz': zipped([('x.npy', bytes(999))]), 'plain.npz': zipped([('x', npy(grey))]),
        'bz.npz': zipped([('x.npy', npy(grey))], zipfile.ZIP_BZIP2), 'is.npz': npy(grey), 'is.npy': npz,
        'liar.npz': zipped([('x.npy', claims((10 ** 12, 32, 32)))]),
        'labels.npz': zipped([('x.npy', npy(grey)), ('y.npy', npy(np.array([{}, 1, 2], object)))]),
        'text.npz': zipped([('x.npy', npy(grey)), ('y.npy', npy(np.array(['a', 'b', 'c'])))]),
        'few.npz': zipped([('x.npy', npy(grey)), ('y.npy', b'')]),
        'pickle.npy': pickle.dumps(Payload()), 'pickle.npz': zipped([('x.npy', pickle.dumps(Payload()))]),
        'payload.npy': npy(np.array([[[Payload()]]], object)), 'empty.npy': b'', 'half.npy': npy(grey)[:150],
        'deep.npy': header('(' * 9000), 'eval.npy': header('__import__("os").system("touch hacked")'),
        'long.npy': header('{"descr": "|u1"' + ' ' * 60000 + '}'), 'nul.npy': header('\0'),
        'keys.npy': header("{'descr': '|u1', 'fortran_order': False, 'shape': (1, 8, 8), 'x': 1}"),
        'mixed.npy': claims((4,), [('a', '<u1'), ('b', '<f4')]), 'sub.npy': claims((1, 8, 1), ('|u1', (8,))),
    }
    for k, shape in enumerate([(10 ** 12, 32, 32), (2 ** 62, 4, 4), (2 ** 32, 2 ** 32), (-1, 8, 8), (1, -8, -8),
                               (1.5, 8, 8), (True, 8, 8), '8', None, (), (64,), (0, 8, 8), (1,) * 40, (1, 8, 8)]):
        found[f'claim{k}.npy'] = claims(shape)
        found[f'claim{k}.npz'] = zipped([('x.npy', claims(shape))])
    for k, descr in enumerate(['|O', '|V1', '<f2', '>f8', '<c8', '<M8[s]', '<U1', '|b1', '|i1', '<u2', '<f16',
                               '|V1000000000', '?', '', 'x', None, 7, [], '|S0']):
        found[f'type{k}.npy'] = claims((1, 2, 2), descr)
    floats = np.zeros((2, 4, 4), np.float32)
    for k, value in enumerate([np.nan, np.inf, -np.inf, 1.001, -1.001, 3e38]):
        floats[1, 2, 3] = value
        found[f'float{k}.npy'] = npy(floats)
    return found


def special(folder, kind):
    """A folder with something in it that is not an image file, alone or beside one that is."""
    if 'beside' in kind:
        picture().save(folder / 'good.png')
    path = folder / 'a.png'
    if 'folder' in kind:
        path.mkdir()
    elif 'dangling' in kind:
        path.symlink_to(folder / 'absent')
    elif 'loop' in kind:
        path.symlink_to(path)
    elif 'pipe' in kind:
        os.mkfifo(path)
    elif 'device' in kind:
        path.symlink_to('/dev/zero')
    elif 'socket' in kind:
        with contextlib.chdir(folder), socket.socket(socket.AF_UNIX) as s:
            s.bind('a.png')
    elif 'cycle' in kind:
        path.symlink_to('..', target_is_directory=True)
    elif 'elsewhere' in kind:  # images elsewhere, linked to, are a common way to make a set
        (folder.parent / 'away').mkdir(exist_ok=True)
        picture().save(folder.parent / 'away' / 'b.png')
        path.symlink_to('../away/b.png')
    elif 'bytes' in kind:
        with open(os.fsencode(folder) + b'/\xff\xfe.png', 'wb') as file:
            file.write(b'no')


SPECIAL = [f'{kind} {where}' for where in ('alone', 'beside') for kind in (
    'folder', 'dangling', 'loop', 'pipe', 'device', 'socket', 'cycle', 'elsewhere', 'bytes')]


def data_cases(root, seed, count):
    """Yield (path, label) of count inputs: each kind there is, then damaged ones of all kinds."""
    rng, images = np.random.default_rng(seed), pictures()
    files = {**images, **odd_pictures(), **archives()}
    whole = {**images, 'a.zip': zipped([(f'{k % 2}/{k}.png', encoded(picture(k))) for k in range(3)]),
             'a.npy': npy(np.zeros((3, 8, 8, 3), np.uint8)),
             'a.npz': zipped([('x.npy', npy(np.zeros((3, 8, 8)))), ('y.npy', npy(np.arange(3)))])}
    weights = [4 if name in ('a.zip', 'a.npy', 'a.npz') else 1 for name in whole]
    named = [*files, *SPECIAL]
    for k in range(count):
        folder = root / str(k)
        folder.mkdir()
        label = named[k] if k < len(named) else str(rng.choice(list(whole), p=np.divide(
            weights, sum(weights))))
        if label in SPECIAL:
            special(folder, label)
        else:
            (folder / label).write_bytes(files[label] if k < len(named) else mutated(whole[label], rng))
        path = folder / label if label.endswith(('.zip', '.npy', '.npz')) else folder
        yield path, label if k < len(named) else f'damaged {label}'


class TooSlow(BaseException):
    """Past every `except Exception`."""


@contextlib.contextmanager
def limited(seconds, gib):
    """An end to what takes for ever, or memory without bound."""
    def stop(*_):
        raise TooSlow
    with open('/proc/self/statm') as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (now + (gib << 30), before[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


class Watch:
    """Notes every file that is opened and every program that is started while it is on."""
    on, seen = False, []

    def __call__(self, event, args):
        if not self.on:
            return
        if event in ('subprocess.Popen', 'os.system', 'os.exec', 'os.posix_spawn', 'os.fork'):
            self.seen.append((event, args))
        if event == 'open' and isinstance(args[0], str):
            self.seen.append((args[0], args[1] or '', args[2]))


@pytest.fixture(scope='module')
def watch():
    found = Watch()
    sys.addaudithook(found)  # there is no way to take it off again
    for name, raw in pictures().items():  # Pillow imports its plugins when it first needs them
        Image.open(io.BytesIO(raw)).load()
    yield found
    found.on = False


def used(path, watch):
    """Whether the set is used, rather than refused in one line; nothing else is touched."""
    watch.seen = []
    try:
        with limited(20, 3), warnings.catch_warnings(record=True) as warned:
            watch.on = True
            set_ = data.load(path)
            watch.on = False
    except data.BadInput as error:
        message = str(error)
        assert '\n' not in message and message.startswith('--'), message
        assert f'--dataset {" ".join(str(path).split())}' in message, message
        return False
    finally:
        watch.on = False
        for _, archive in files.ZIPS.items():
            archive.close()
        files.ZIPS.clear()
        here = str(path.parent if path.is_file() else path)
        for seen in watch.seen:
            assert seen[0].startswith((here, sys.prefix, sys.base_prefix)), seen
            assert not set(seen[1]) & set('wax+') and not seen[2] & (os.O_WRONLY | os.O_RDWR), seen
    assert not warned, [str(w.message) for w in warned]
    side = set_.image_size
    assert len(set_) > 0 and set_.pixels.shape == (len(set_), set_.channels, side, side)
    assert set_.pixels.dtype == torch.uint8 and set_.channels in (1, 3)
    assert set_.labels is None or set_.labels.shape == (len(set_),)
    return True


KNOWN = {'good.zip': True, 'good.npz': True, 'secret.zip': False, 'nested.zip': False, 'up.zip': True,
         'bomb.png': False, 'eps.png': False, 'lying.zip': False, 'crc.zip': False, 'crc.npz': False,
         'long.png': True, 'one.png': True, 'jpeg.png': True, 'film.gif': True, 'cmyk.jpeg': True,
         'claim13.npy': True, 'claim13.npz': True, 'bz.zip': False, 'pickle.npy': False,
         'labels.npz': True, 'text.npz': True, 'elsewhere alone': True, 'pipe alone': False,
         'tail.zip': False, 'front.zip': True, '16.png': True, 'alpha.png': True}


def fuzz_data(tmp_path, watch, capsys, seed, count):
    outcomes = []
    for path, label in data_cases(tmp_path, seed, count):
        outcomes.append(used(path, watch))
        assert outcomes[-1] == KNOWN.get(label, outcomes[-1]), label
        assert outcomes[-1] or not label.endswith('beside'), label
        assert len(capsys.readouterr().err.splitlines()) <= 1, label
    assert set(os.listdir(tmp_path)) <= {'away', *map(str, range(count))}
    with capsys.disabled():
        print(f'\n{count} data sets: {sum(outcomes)} used, {count - sum(outcomes)} refused')


def test_hostile_data(tmp_path, watch, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fuzz_data(tmp_path, watch, capsys, 0, 240)


@pytest.mark.slow
def test_hostile_data_at_length(tmp_path, watch, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fuzz_data(tmp_path, watch, capsys, 1, 1500)


BOMBS = '''
import resource, sys
sys.path.insert(0, sys.argv.pop(1))
import data
data.load()
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
for path in sys.argv[1:]:
    try:
        data.load(path)
        print('used', path)
    except data.BadInput as error:
        assert len(str(error).splitlines()) == 1
print((peak() - before) >> 10)
'''


def packed_zeros(path, name, packing, start=b''):
    """A zip of one entry: `start`, then 640 MB of zeros; and the same zip, which says 100 bytes."""
    with zipfile.ZipFile(path, 'w', packing) as archive, archive.open(name, 'w') as file:
        file.write(start)
        for _ in range(40):
            file.write(bytes(2 ** 24))
    liar = path.with_stem(f'{path.stem}_lying')
    liar.write_bytes(patched(path.read_bytes(), b'PK\x01\x02', 24, '<I', 100))
    return path, liar


@pytest.mark.slow
def test_bombs_take_no_memory(tmp_path):
    start = claims((40 << 18, 8, 8))[:-64]
    paths = [path for packing in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2) for path in (
        *packed_zeros(tmp_path / f'{packing}.zip', 'a.png', packing),
        *packed_zeros(tmp_path / f'{packing}.npz', 'x.npy', packing, start))]
    for name, raw in odd_pictures().items():
        if name in ('bomb.png', 'wide.png', 'text.png', 'huge.pgm'):
            (tmp_path / name).mkdir()
            (tmp_path / name / name).write_bytes(raw)
            paths.append(tmp_path / name)
    done = subprocess.run([sys.executable, '-c', BOMBS, HERE, *paths], capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    *others, grown = done.stdout.split()
    assert not others and int(grown) < 300, done.stdout
    print(f'\n{len(paths)} bombs: all refused, {grown} MB')


# ---------------------------------------------------------------- checkpoints of strangers

RUBBISH = [None, 'x', '8', -1, 0, 1.5, math.nan, math.inf, 10 ** 6, 2 ** 31, 10 ** 30, [], {}, [1] * 1000,
           [10 ** 9], [[1]], ['a'], True, {'a': {'b': [1, {}]}}, torch.zeros(3), b'\0', (8, 8), {1: 2}]


def bad_tensor(t, kind):
    return [5, None, t.tolist(), t.half(), t.int(), t.to_sparse(), t.to('meta'), t.new_zeros(()),
            t.to(torch.complex64), t[:0], t.flatten()[:1].clone().expand(10 ** 12), t[None], t.bool(),
            t.new_zeros(1).as_strided(t.shape, [0] * t.dim())][kind]


def bad_contents(saved, rng):
    """Something in the dict is not what it should be."""
    def rubbish():
        return RUBBISH[rng.integers(len(RUBBISH))]
    part = str(rng.choice(list(saved)))
    kind, inside = rng.integers(6), saved[part]
    if kind == 0:
        saved[part] = rubbish()
    elif kind == 1:
        del saved[part]
    elif kind == 2 and 'args' in saved:
        key = str(rng.choice([*checkpoint.ARCHITECTURE, 'z_min', 'z_max', 'upper_norm', 'z_exp', 'gamma']))
        saved['args'] = {**saved['args'], key: rubbish()}
        if rng.random() < 0.2:
            del saved['args'][key]
    elif kind == 3 or 'args' in saved and kind == 2:
        while isinstance(inside, dict) and inside:  # somewhere down
            key = list(inside)[rng.integers(len(inside))]
            if not isinstance(inside[key], dict) or rng.random() < 0.2:
                inside[key] = rubbish()
                break
            inside = inside[key]
    else:
        tensors = saved['ema'] if 'args' in saved else saved[['model', 'ema'][rng.integers(2)]]
        tensors = tensors.get('shadow_params', tensors)
        keys = list(tensors) if isinstance(tensors, dict) else range(len(tensors))
        key = keys[rng.integers(len(keys))]
        if kind == 5 and isinstance(tensors, dict):
            tensors[['a\nb', 7, (1, 2), None, 'module.all_modules.x.W'][rng.integers(5)]] = tensors.pop(key)
        else:
            tensors[key] = bad_tensor(tensors[key], rng.integers(14))


def rewritten(raw, rng):
    """The zip again with a part of it gone, emptied, exchanged, packed or huge."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        entries = [[name, archive.read(name)] for name in archive.namelist()]
    kind, k = rng.integers(6), rng.integers(len(entries))
    if kind == 0:
        del entries[k]
    elif kind == 1:
        entries[k][1] = b''
    elif kind == 2:
        j = rng.integers(len(entries))
        entries[k][1], entries[j][1] = entries[j][1], entries[k][1]
    elif kind == 3:
        entries[k][1] = mutated(entries[k][1] or b'0', rng)
    elif kind == 4:
        entries[k][1] += bytes(2 ** 20)
    return zipped(entries, zipfile.ZIP_DEFLATED if kind >= 4 else zipfile.ZIP_STORED)


def checkpoint_cases(raws, seed, count):
    """Yield (which file's weights it may hold: None for any, bytes)."""
    rng = np.random.default_rng(seed)
    for k in range(count):
        raw, kind = raws[k % len(raws)], rng.integers(8)
        if kind < 3:
            yield k % len(raws), mutated(raw, rng)
        elif kind == 3:  # the head of one, the tail of another
            cut = int(rng.integers(len(raw)))
            yield k % len(raws), raw[:cut] + raws[(k + 1) % len(raws)][-cut:]
        elif kind == 4:
            yield None, rewritten(raw, rng)  # with new checksums
        else:
            saved, file = torch.load(io.BytesIO(raw), weights_only=False), io.BytesIO()
            bad_contents(saved, rng)
            torch.save(saved, file)
            yield k % len(raws), file.getvalue()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def fuzz_checkpoints(trained, tmp_path, capsys, seed, count):
    tiny_official(tmp_path / 'official.pth')
    files, used = [trained / 'ckpt.pt', tmp_path / 'official.pth'], 0
    nets = [[checkpoint.load_checkpoint(path, weights)[0].state_dict() for weights in ('ema', 'raw')]
            for path in files]
    for which, raw in checkpoint_cases([path.read_bytes() for path in files], seed, count):
        (tmp_path / 'a.pt').write_bytes(raw)
        try:
            with limited(20, 2), warnings.catch_warnings():
                warnings.simplefilter('error')
                net, args = checkpoint.load_checkpoint(tmp_path / 'a.pt')
            assert which is None or any(same(net.state_dict(), known) for known in nets[which])
            assert {*checkpoint.ARCHITECTURE} <= args.keys()
            used += 1
        except data.BadInput as error:
            message = str(error)
            assert '\n' not in message and message.startswith('--ckpt') and 'a.pt' in message
            assert len(message) < 1000
    assert sorted(os.listdir(tmp_path)) == ['a.pt', 'official.pth']
    with capsys.disabled():
        print(f'\n{count} checkpoints: {used} used, {count - used} refused')


def test_hostile_checkpoints(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fuzz_checkpoints(trained, tmp_path, capsys, 0, 30)


@pytest.mark.slow
def test_hostile_checkpoints_at_length(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fuzz_checkpoints(trained, tmp_path, capsys, 1, 300)


# ---------------------------------------------------------------- the files of EDM and PFGM++

GOLDEN_EDM = HERE.parent / 'shared' / 'golden_edm'
golden_edm = pytest.mark.skipif(not GOLDEN_EDM.is_dir(), reason='no ../shared/golden_edm: the '
                                'files and numbers of EDM and PFGM++ are not here')
EDM_FILES = ('edm-cifar10-32x32-uncond-vp/network-snapshot-200000.pkl',
             'pfgmpp-cifar10_ncsnpp_D_2048_conditional/training-state-200000.pkl',
             'pfgmpp-cifar10_ncsnpp_D_2048_conditional-pt/training-state-200000.pt')


@golden_edm
@pytest.mark.parametrize('file', EDM_FILES)
def test_published_denoisers_give_the_authors_numbers(file):
    net, args = checkpoint.load_checkpoint(GOLDEN_EDM / file)
    folder = (GOLDEN_EDM / file).parent
    ref, made = ({k: torch.from_numpy(v) for k, v in np.load(path).items() if 'trace' not in k}
                 for path in (folder / 'golden.npz', folder / 'sampler.npz'))
    labels, unit = [ref['labels']] if 'labels' in ref else [], pfgm.unit(args['D'])
    x, sigma, embedded = ref['x'].double(), ref['sigma'].double(), []
    assert args['D'] == (2048 if labels else math.inf) and args['classes'] == 10 * len(labels)
    with torch.no_grad():
        hook = net.net.embed[1].register_forward_hook(lambda *a: embedded.append(a[2]))
        F = net.predict(ref['c_in'].view(-1, 1, 1, 1) * ref['x'], ref['c_noise'], *labels)
        hook.remove()
        close(F, ref['F'], atol=2e-4)
        close(torch.nn.functional.silu(embedded[0]), ref['emb'], atol=1e-4)
        for kinds, key in [(labels, 'D'), ([], 'D_nolabel' if labels else 'D')]:
            v_x, v_z = net(x, sigma * unit, *kinds)
            close(v_x + x, ref[key], atol=1e-4)
            close(v_z, -sigma * unit)
        out, calls = pfgm.sample_ode(
            net, made['latents'].double() * (1 if labels else 80), args['z_max'], args['z_min'],
            'heun', 35, D=args['D'], z_exp=0, labels=made.get('labels'), schedule_name='rho7',
            to_data=True)
        close(out, made['x_final'], atol=1e-4)
        c_in = (sigma.square() + 0.25).rsqrt().view(-1, 1, 1, 1)
        close(net.double().predict(c_in * x, sigma.log() / 4, *labels), ref['F64'], atol=1e-6)


def test_fir_filters_are_those_of_stylegan():
    """blur() and means or repetitions, against [1, 3, 3, 1] x [1, 3, 3, 1] / 64 itself."""
    F, taps = torch.nn.functional, torch.tensor([1., 3, 3, 1], dtype=F64)
    x, h = (torch.randn(2, 5, n, n, dtype=F64, generator=seeded(n)) for n in (8, 4))
    kernel = (taps[:, None] * taps / 64).expand(5, 1, 4, 4)
    down, up = (unet.ResBlock(4, 4, 4, 0, kind, fir=True) for kind in ('down', 'up'))
    close(down.scale(x), F.conv2d(x, kernel, None, 2, 1, groups=5), atol=1e-14)
    close(up.scale(x), F.conv_transpose2d(x, 4 * kernel, None, 2, 1, groups=5), atol=1e-14)
    pyramid = unet.Pyramid(5, 5).double()
    with torch.no_grad():
        torch.nn.init.normal_(pyramid.bias)
        above = F.conv2d(x, pyramid.weight, None, padding=2)
        above = F.conv2d(above, kernel, pyramid.bias, 2, groups=5)
        close(pyramid(h, x), (h + above) / math.sqrt(2), atol=1e-14)


def edm_shapes(size=32, nf=8, mult=(1, 2), blocks=1, ncsnpp=False, classes=0, augment=9):
    """{name: shape} of EDM's SongUNet in its order."""
    out, width, taps = {}, nf * (1 + ncsnpp), 4 if ncsnpp else 2

    def layer(name, *shape, bias=True, resample=False):
        out[f'{name}.weight'] = shape
        if bias:
            out[f'{name}.bias'] = shape[:1]
        if resample:
            out[f'{name}.resample_filter'] = (1, 1, taps, taps)

    def block(name, a, b, attend=False, resample=False):
        layer(f'{name}.norm0', a)
        layer(f'{name}.conv0', b, a, 3, 3, resample=resample)
        layer(f'{name}.affine', b, 4 * nf)
        layer(f'{name}.norm1', b)
        layer(f'{name}.conv1', b, b, 3, 3)
        if a != b or resample:
            layer(f'{name}.skip', b, a, 1, 1, resample=resample)
        if attend:
            layer(f'{name}.norm2', b)
            layer(f'{name}.qkv', 3 * b, b, 1, 1)
            layer(f'{name}.proj', b, b, 1, 1)
    if ncsnpp:
        out['map_noise.freqs'] = (nf,)
    if classes:
        layer('map_label', width, classes)
    if augment:
        layer('map_augment', width, augment, bias=False)
    layer('map_layer0', 4 * nf, width)
    layer('map_layer1', 4 * nf, 4 * nf)
    layer(f'enc.{size}x{size}_conv', nf, 3, 3, 3)
    c, above, skips = nf, 3, [nf]
    sides = [f'{size >> level}x{size >> level}' for level in range(len(mult))]
    for side, m in zip(sides, mult):
        if side != sides[0]:
            block(f'enc.{side}_down', c, c, resample=True)
            if ncsnpp:
                layer(f'enc.{side}_aux_residual', c, above, 3, 3, resample=True)
            above = c
            skips.append(c)
        for i in range(blocks):
            block(f'enc.{side}_block{i}', c, nf * m, attend=side == '16x16')
            c = nf * m
            skips.append(c)
    block(f'dec.{side}_in0', c, c, attend=True)
    block(f'dec.{side}_in1', c, c)
    for side, m in zip(sides[::-1], mult[::-1]):
        if side != sides[-1]:
            block(f'dec.{side}_up', c, c, resample=True)
        for i in range(blocks + 1):
            attend = side == '16x16' and i == blocks
            block(f'dec.{side}_block{i}', c + skips.pop(), nf * m, attend)
            c = nf * m
    layer(f'dec.{side}_aux_norm', c)
    layer(f'dec.{side}_aux_conv', 3, c, 3, 3)
    return out


class Persistent:
    """Pickled as EDM's torch_utils.persistence pickles an object."""

    def __init__(self, kind, **state):
        self.state = state
        self.meta = dict(type='class', version=6, module_src='#' * 99, class_name=kind, state=state)

    def __reduce__(self):
        return sys.modules['torch_utils.persistence']._reconstruct_persistent_obj, (self.meta,)


def edm_module(tensors, kind='Module'):
    """The tree of {dotted name: tensor} as persistent objects."""
    inside, own, modules = {}, {'_parameters': {}, '_buffers': {}}, {}
    for key, tensor in tensors.items():
        head, _, tail = key.partition('.')
        if tail:
            inside.setdefault(head, {})[tail] = tensor
        else:
            own['_parameters' if key in ('weight', 'bias') else '_buffers'][key] = tensor
    for key, parts in inside.items():
        modules[key] = edm_module(parts)
        if key in ('enc', 'dec'):
            state = modules[key].state
            modules[key] = torch.nn.ModuleDict.__new__(torch.nn.ModuleDict)
            modules[key].__dict__.update(state)
    return Persistent(kind, training=False, **own, _modules=modules, skip_scale=np.float64(0.5))


def edm_file(path, zip_form=False, change=lambda saved: None, kind='EDMPrecond', whole=True,
             size=32, nf=8, mult=(1, 2), blocks=1, ncsnpp=False, classes=0, augment=9, **flags):
    """A training-state in the form of EDM and PFGM++, or with whole=False a snapshot, of random
    weights. -> EDM's {name: tensor} of the EMA."""
    shapes = edm_shapes(size, nf, mult, blocks, ncsnpp, classes, augment)
    attributes = dict(img_resolution=size, img_channels=3, label_dim=classes, **flags)
    given = dict(attributes, model_type='SongUNet', model_channels=nf, channel_mult=list(mult),
                 num_blocks=blocks, augment_dim=augment, dropout=0.13, use_fp16=False)
    if ncsnpp:
        given.update(embedding_type='fourier', encoder_type='residual', channel_mult_noise=2,
                     resample_filter=[1, 3, 3, 1])

    def network(seed):
        tensors = {k: torch.randn(shape, generator=seeded(seed)) / math.prod(shape[1:]) ** 0.5
                   for k, shape in shapes.items()}
        model = edm_module({k: torch.nn.Parameter(v) if k.endswith(('weight', 'bias')) else v
                            for k, v in tensors.items()}, 'SongUNet')
        return tensors, Persistent(kind, _parameters={}, _buffers={}, _modules={'model': model},
                                   sigma_data=0.5, _init_kwargs=given, **attributes)
    tensors, ema = network(0)
    saved = dict(ema=ema, loss_fn=Persistent('EDMLoss', P_mean=-1.2), augment_pipe=None)
    if whole:
        raw, net = network(1)
        order = [v for k, v in raw.items() if k.endswith(('weight', 'bias'))]
        state = {i: dict(step=torch.tensor(7.0), exp_avg=3 * p, exp_avg_sq=p * p)
                 for i, p in enumerate(order)}
        group = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0,
                     params=list(range(len(order))))
        saved = dict(optimizer_state=dict(state=state, param_groups=[group]), step=3584, ema=ema,
                     net=net)
    change(saved)
    modules = {k: type(sys)(k) for k in ('torch_utils', 'torch_utils.persistence')}
    rebuild = modules['torch_utils.persistence']._reconstruct_persistent_obj = lambda meta: meta
    rebuild.__module__ = 'torch_utils.persistence'
    rebuild.__qualname__ = '_reconstruct_persistent_obj'
    with patch.dict(sys.modules, modules), open(path, 'wb') as file:
        torch.save(saved, file) if zip_form else pickle.dump(saved, file, protocol=4)
    return tensors


def plain_edm(p, x, c_noise, labels, size=32, nf=8, ncsnpp=False, classes=0, **_):
    """EDM's network written once more, straight on its tensors p."""
    F, taps = torch.nn.functional, torch.tensor([1., 3, 3, 1] if ncsnpp else [1., 1])
    kernel, pad, r = taps[:, None] * taps / taps.sum() ** 2, (len(taps) - 2) // 2, 0.5 ** 0.5

    def conv(name, h, padding=1):
        return F.conv2d(h, p[f'{name}.weight'], p[f'{name}.bias'], padding=padding)

    def linear(name, h):
        return F.linear(h, p[f'{name}.weight'], p[f'{name}.bias'])

    def norm(name, h):
        groups = min(32, h.shape[1] // 4)
        return F.group_norm(h, groups, p[f'{name}.weight'], p[f'{name}.bias'], 1e-6)

    def scale(h, name):
        k = kernel.expand(h.shape[1], 1, *kernel.shape)
        if 'down' in name:
            return F.conv2d(h, k, None, 2, pad, groups=len(k))
        return F.conv_transpose2d(h, 4 * k, None, 2, pad, groups=len(k)) if '_up' in name else h

    def block(name, h):
        y = conv(f'{name}.conv0', scale(F.silu(norm(f'{name}.norm0', h)), name))
        y = F.silu(norm(f'{name}.norm1', y + linear(f'{name}.affine', emb)[:, :, None, None]))
        h = scale(h, name)
        h = conv(f'{name}.skip', h, 0) if f'{name}.skip.weight' in p else h
        h = r * (h + conv(f'{name}.conv1', y))
        if f'{name}.qkv.weight' in p:
            qkv = conv(f'{name}.qkv', norm(f'{name}.norm2', h), 0)
            q, k, v = qkv.view(len(h), h.shape[1], 3, -1).unbind(2)
            w = torch.einsum('bcq,bck->bqk', q, k / h.shape[1] ** 0.5).softmax(2)
            h = r * (h + conv(f'{name}.proj', torch.einsum('bqk,bck->bcq', w, v).view(h.shape), 0))
        return h
    f = 2 * math.pi * p['map_noise.freqs'] if ncsnpp else (
        1e4 ** -(torch.arange(nf // 2) / (nf // 2 - 1)))
    emb = torch.cat([(c_noise[:, None] * f).sin(), (c_noise[:, None] * f).cos()], 1)
    if classes:
        emb = emb + linear('map_label', F.one_hot(labels, classes) * classes ** 0.5)
    emb = F.silu(linear('map_layer1', F.silu(linear('map_layer0', emb))))
    h, above, skips = x, x, []
    for name in dict.fromkeys('.'.join(k.split('.')[:2]) for k in p if k[:4] in ('enc.', 'dec.')):
        if name == f'enc.{size}x{size}_conv':
            h = conv(name, h)
        elif 'aux_residual' in name:
            y = F.conv2d(above, p[f'{name}.weight'], padding=2)
            k = kernel.expand(y.shape[1], 1, 4, 4)
            h = above = skips[-1] = r * (h + F.conv2d(y, k, p[f'{name}.bias'], 2, groups=len(k)))
            continue
        elif 'aux_norm' in name:
            h = F.silu(norm(name, h))
        elif 'aux_conv' in name:
            return conv(name, h)
        elif name.startswith('dec') and '_block' in name:
            h = block(name, torch.cat([h, skips.pop()], 1))
        else:
            h = block(name, h)
        if name.startswith('enc'):
            skips.append(h)


@pytest.mark.parametrize('zip_form', [False, True])
@pytest.mark.parametrize('shape', [
    dict(), dict(classes=4, augment=0), dict(ncsnpp=True, nf=12), dict(ncsnpp=True, classes=4),
    dict(size=64, mult=(1, 2, 2, 2)), dict(ncsnpp=True, size=64, mult=(1, 2, 2))])
def test_published_files_are_read_whole_and_converted(shape, zip_form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theirs, side = edm_file('a.pkl', zip_form, **shape), shape.get('size', 32)
    net, args = checkpoint.load_checkpoint('a.pkl')
    assert (args['D'], args['step'], args['ncsnpp']) == (math.inf, 7, 'ncsnpp' in shape)
    x, c_noise = torch.randn(2, 3, side, side, generator=seeded()), torch.tensor([-1.2, 1.1])
    labels = [torch.tensor([0, 3])] if 'classes' in shape else []
    with torch.no_grad():
        want = plain_edm(theirs, x, c_noise, *labels or [None], **shape)
        close(net.predict(x, c_noise, *labels), want, atol=2e-5)
    script(['checkpoint.py', 'a.pkl', '--out', 'b.pt'])
    again, same_args = checkpoint.load_checkpoint('b.pt')
    assert same(net.state_dict(), again.state_dict()) and same_args == args
    saved = checkpoint.read_checkpoint('a.pkl', whole=True)
    for i, (k, _) in enumerate(net.net.named_parameters()):  # moments made of the raw weights
        close(saved['opt']['state'][i]['exp_avg'], 3 * saved['net'][k], rtol=1e-6)
        close(saved['opt']['state'][i]['exp_avg_sq'], saved['net'][k].square(), rtol=1e-6)


@golden_edm
@pytest.mark.parametrize('kind', [
    'cifar10-32x32-uncond-vp', 'cifar10-32x32-cond-vp', 'cifar10-32x32-uncond-ve',
    'cifar10-32x32-cond-ve', 'ffhq-64x64-uncond-vp', 'ffhq-64x64-uncond-ve'])
def test_full_size_published_networks_fit(kind):
    rows = json.loads((GOLDEN_EDM / 'structure.json').read_text())[kind]
    size, mult = (64, (1, 2, 2, 2)) if '64' in kind else (32, (2, 2, 2))
    ncsnpp, classes = kind.endswith('ve'), 10 if '-cond' in kind else 0
    shapes = edm_shapes(size, 128, mult, 4, ncsnpp, classes)
    assert [[f'model.{k}', list(v)] for k, v in shapes.items()] == [row[:2] for row in rows]
    with torch.device('meta'):
        net = unet.UNet(size, ch_mult=mult, classes=classes, ncsnpp=ncsnpp, label_first=True)
    names = checkpoint.edm_names(net, shapes)
    theirs_of = {'norm1': 'norm0', 'conv1': 'conv0', 'emb': 'affine', 'norm2': 'norm1',
                 'conv2': 'conv1', 'shortcut': 'skip', 'norm': 'norm2', 'q': 'qkv', 'k': 'qkv',
                 'v': 'qkv', 'out': 'proj'}
    for ours, p in net.state_dict().items():
        layer, leaf = f'.{ours}'.split('.')[-2:]
        assert layer not in theirs_of or names[ours].endswith(f'.{theirs_of[layer]}.{leaf}'), ours
        count = p.numel() * (3 if layer in ('q', 'k', 'v') else 1)
        count -= p[-1].numel() if layer == 'conv_out' else 0
        assert math.prod(shapes[names[ours]]) == count, ours
    left = {k for k in shapes if not k.endswith('filter')} - set(names.values())
    assert left == {'map_augment.weight'} and names.keys() == net.state_dict().keys()


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


def test_published_files_sample_encode_and_train_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    edm_file('a.pkl', classes=10, nf=4, size=16, D=128, pfgmpp=True)
    edm_file('b.pkl', whole=False, nf=4, size=16)
    for flags, solver, planes in (([], 'heun', 'rho7'), (['--nfe', '10'], 'unipc', 'radius')):
        args = sample.parse_args(['--ckpt', 'a.pkl', *flags])
        flow, _ = checkpoint.load_flow(args, torch.device('cpu'))
        assert (flow.solver, flow.spacing(), flow.known) == (solver, planes, 10)
        assert (flow.ending() == (True, 0.002 * 128 ** 0.5)) == (solver == 'heun')
        assert flow.nfe == (35 if solver == 'heun' else 10)
    x, calls = flow.follow(flow.prior([0, 1]), torch.device('cpu'), [0, 1])
    assert x.dtype == F64 and calls == 10
    script(['checkpoint.py', 'a.pkl', '--out', 'c.pt'])
    for file in ('a.pkl', 'c.pt'):
        script(['sample.py', '--ckpt', file, *'--n 2 --nfe 35 --classes 3 --out'.split(),
                f'{file}.npz'])
    assert (np.load('a.pkl.npz')['arr_0'] == np.load('c.pt.npz')['arr_0']).all()
    for flags in ('--solver rk45 --tol 0.1', '--solver ipndm --nfe 4 --schedule log',
                  '--interpolate --nfe 3', '--encode glyphs --solver dpm2m --nfe 4'):
        script(['sample.py', '--ckpt', 'b.pkl', '--n', 2, '--out', 'b.png', *flags.split()])
    script(['evaluate.py', '--compare', 'b.pkl', 'a.pkl', *'--swd --sweep nfe=3 --n 8 --dataset '
            'glyphs --batch_size 8'.split()])
    words = ['train.py', *'--dataset glyphs --image_size 16 --channels 3 --batch_size 2 --lr 1e-9 '
             '--log_every 1 --sample_every 9 --device cpu --no-bf16'.split()]
    capsys.readouterr()
    script([*words, '--init_from', 'b.pkl', '--steps', 1, '--out_dir', 'o'])
    assert 'b.pkl has no optimizer state; Adam starts afresh' in capsys.readouterr().out
    script([*words, '--init_from', 'a.pkl', '--classes', '--steps', 8, '--out_dir', 'p'])
    assert 'afresh' not in capsys.readouterr().out
    raw, saved = (checkpoint.read_checkpoint(k, True) for k in ('a.pkl', 'p/ckpt.pt'))
    assert all((saved['net'][k] - v).abs().max() < 1e-6 for k, v in raw['net'].items())
    assert saved['args']['edm'] and saved['args']['D'] == 128
    assert saved['opt']['state'][0]['step'] == 8
    script([*words, '--classes', '--D', 128, '--steps', 9, '--out_dir', 'p'])
    refuses(['sample.py', '--ckpt', 'b.pkl', '--classes', 0], 'the network knows none')


def test_ncsnpp_trains_as_a_preset(tmp_path):
    words = ['train.py', '--out_dir', tmp_path, *'--preset cifar10_ncsnpp --dataset glyphs --nf 8 '
             '--image_size 32 --num_blocks 1 --batch_size 2 --log_every 1 --device cpu'.split()]
    script([*words, '--steps', 2])
    script([*words, '--steps', 4])
    net, args = checkpoint.load_checkpoint(tmp_path / 'ckpt.pt')
    assert args['method'] == 'pfgmpp' and args['ncsnpp'] and args['label_first']
    assert net.net.freq.std() > 8 and len(losses(tmp_path)) == 4 and not args['edm']
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
    'hub': opcodes(word('torch.hub'), word('load'), b'\x93', word('a'), b'\x85R'),
    'dotted': opcodes(word('torch._utils'), word('_rebuild_tensor_v2.__globals__'), b'\x93)R'),
    'GLOBAL': b'\x80\x02cos\nsystem\n(X\x05\0\0\0touchtR.',
    'INST': b"(S'touch'\nios\nsystem\n.",
    'an extension': opcodes(b'\x82\x01'),
    'odd arguments': opcodes(REBUILD, b'K\x01K\x02\x86R'),
    'no arguments': opcodes(REBUILD, b'NR'),
    'attributes of a function': opcodes(REBUILD, b'}', word('__defaults__'), b'K\x01\x85sb'),
    'attributes of a class': opcodes(word('collections'), word('OrderedDict'), b'\x93}',
                                     word('pop'), b'Nsb'),
    'a new function': opcodes(REBUILD, b')\x81'),
    'a number called': opcodes(b'K\x01)R'),
    'a deep key': opcodes(b'}', b')' + b'\x85' * 200_000, b'Ns'),
    'deep lists': opcodes(b']' * 10 ** 5 + b'a' * (10 ** 5 - 1)),
    'a memo of 2^31': opcodes(b'Nr\xff\xff\xff\x7f'),
    '4 GB of bytes': opcodes(b'B\xff\xff\xff\xff'),
    'a terabyte': opcodes(b'\x8e' + struct.pack('<Q', 10 ** 12)),
    'a bytearray of 8 GB': opcodes(b'\x96' + struct.pack('<Q', 8 << 30)),
    'text of an exabyte': opcodes(b'\x8d' + struct.pack('<Q', 10 ** 18)),
    'a frame of a terabyte': opcodes(b'\x95' + struct.pack('<Q', 10 ** 12)),
    'a number of 2 GB': opcodes(b'\x8b' + struct.pack('<i', 2 ** 31 - 1)),
    'None': opcodes(b'N'), 'a number': opcodes(b'K\x01'), 'no end': opcodes(word('x'))[:-1],
}


def model_of(saved):
    return saved['ema'].state['_modules']['model'].state['_modules']


def with_tensor(make):
    def change(saved):
        layer = model_of(saved)['map_layer0'].state['_parameters']
        layer['weight'] = make(layer['weight'])
    return change


def with_facts(**facts):
    def change(saved):
        saved['ema'].state['_init_kwargs'].update(facts)
        saved['ema'].state.update(facts)
    return change


def modules_without_number(saved):  # each twice in the next: 2^60, none with a tensor
    part = dict(_parameters={}, _buffers={}, _modules={})
    for _ in range(60):
        part = dict(_parameters={}, _buffers={}, _modules={'a': part, 'b': part})
    model_of(saved)['a'] = part


HOSTILE_CHANGES = {
    'a payload': lambda saved: saved.update(extra=Payload()),
    'no ema': lambda saved: saved.update(net=saved.pop('ema')),
    'modules within themselves': lambda saved: model_of(saved).update(a=saved['ema'].meta),
    'modules without number': modules_without_number,
    'a part missing': lambda saved: model_of(saved).pop('map_layer1'),
    'a part more': lambda saved: model_of(saved).update(a=edm_module({'weight': torch.ones(2)})),
    'another shape': with_tensor(lambda t: t.T),
    'a stride of 0': with_tensor(lambda t: t[:1, :1].expand(t.shape)),
    'a claim': with_tensor(lambda t: t[:1].detach().as_strided((10 ** 12,), (0,))),
    'float64': with_tensor(lambda t: t.double()),
    'half': with_tensor(lambda t: t.half()),
    'a number for a tensor': with_tensor(lambda t: 5.0),
    'a dict for a tensor': with_tensor(lambda t: {'size': [8]}),
    'ADM': with_facts(model_type='DhariwalUNet'),
    'no type': lambda saved: saved['ema'].state['_init_kwargs'].pop('model_type'),
    'a mixture': with_facts(embedding_type='fourier'),
    'wide': with_facts(model_channels=10 ** 9),
    'many': with_facts(num_blocks=10 ** 9),
    'large': with_facts(img_resolution=2 ** 40),
    'a text for D': with_facts(D='x' * 10 ** 6, pfgmpp=True),
    'a D of nan': with_facts(D=math.nan, pfgmpp=True),
    'a D of 0': with_facts(D=0, pfgmpp=True),
    'a text for classes': with_facts(label_dim='9' * 10 ** 5),
    'a spread below 0': with_facts(sigma_data=-1),
    **dict.fromkeys(('VPPrecond', 'VEPrecond', 'iDDPMPrecond'), lambda saved: None),
}
SAY = {'a payload': 'asks for', 'eval': 'asks for builtins.eval', 'GLOBAL': 'asks for os.system',
       'ADM': 'EDMPrecond of ADM', 'no type': 'EDMPrecond of ADM', 'another shape': r'\(32, 8\)',
       'VPPrecond': 'VPPrecond of SongUNet', 'no ema': 'give the network-snapshot'}


@pytest.mark.parametrize('zip_form', [False, True])
@pytest.mark.parametrize('case', [*HOSTILE_PICKLES, *HOSTILE_CHANGES])
def test_hostile_published_files_are_refused(case, zip_form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if case in HOSTILE_CHANGES:
        edm_file('a.pkl', zip_form, HOSTILE_CHANGES[case],
                 case if 'Precond' in case else 'EDMPrecond', whole=False)
    else:
        raw = HOSTILE_PICKLES[case]
        marked = raw[:-1] + word('torch_utils.persistence') + b'0.'
        Path('a.pkl').write_bytes(zipped([('a/data.pkl', marked)], zipfile.ZIP_STORED)
                                  if zip_form else raw)
    with limited(20, 2), patch.object(os, 'system', side_effect=AssertionError):
        refuses(['sample.py', '--ckpt', 'a.pkl', '--device', 'cpu'],
                SAY.get(case, '--ckpt a.pkl: '))
    assert os.listdir('.') == ['a.pkl']


def fuzz_published(capsys, seed, count):
    for zip_form in (False, True):
        edm_file('good', zip_form, classes=3, ncsnpp=True, nf=4)
        raw, rng, used = Path('good').read_bytes(), np.random.default_rng(seed), 0
        good = checkpoint.load_checkpoint('good')[0].state_dict()
        for _ in range(count):
            Path('a.pkl').write_bytes(mutated(raw, rng))
            try:
                with limited(20, 2):
                    net, args = checkpoint.load_checkpoint('a.pkl')
                # a plain pickle has no checksum: another number in it is another weight
                assert args['edm'] and (not zip_form or same(net.state_dict(), good))
                used += 1
            except data.BadInput as error:
                message = str(error)
                assert '\n' not in message and message.startswith('--ckpt a.pkl: ')
                assert len(message) < 1000
        with capsys.disabled():
            kind = 'zips' if zip_form else 'pickles'
            print(f'\n{count} {kind}: {used} used, {count - used} refused')
        assert used < count


def test_damaged_published_files(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fuzz_published(capsys, 0, 100)
    for zip_form in (False, True):
        edm_file('good', zip_form)
        raw = Path('good').read_bytes()
        for size in (0, 1, 10, 1000, len(raw) // 2, len(raw) - 1):
            Path('cut').write_bytes(raw[:size])
            refuses(['sample.py', '--ckpt', 'cut'], '--ckpt cut: damaged')


@pytest.mark.slow
def test_damaged_published_files_at_length(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fuzz_published(capsys, 1, 1000)


LOADING = '''
import sys
sys.path.insert(0, sys.argv[1])
import checkpoint
net, args = checkpoint.load_checkpoint(sys.argv[2])
print(sum(p.numel() for p in net.parameters()))
for line in open('/proc/self/status'):
    if line.startswith('VmHWM'):  # of this program; resource's includes what started it
        print(int(line.split()[1]) >> 10)
'''


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='no /proc on this system')
@pytest.mark.parametrize('zip_form', [False, True])
def test_a_full_size_training_state_takes_less_than_a_gigabyte(zip_form, tmp_path):
    path = tmp_path / 'a.pkl'
    edm_file(path, zip_form, nf=128, mult=(2, 2, 2), blocks=4, ncsnpp=True, classes=10)
    done = subprocess.run([sys.executable, '-c', LOADING, HERE, path], capture_output=True,
                          text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    count, megabytes = map(int, done.stdout.split())
    print(f'\n{os.path.getsize(path) >> 20} MB of {count:,} parameters: {megabytes} MB at most')
    assert 55e6 < count < 57e6 and megabytes < 1000


# ---------------------------------------------------------------- flags

WORDS = ['', 'x', 'nan', 'inf', '-inf', '-1', '0', '1e400', '-1e400', str(2 ** 70), '1e3', ' 5', '5 ', '1_0',
         '\u0663', '\u2460', '1.5', '0x10', '9' * 5000, 'None', 'True', '[]', 'a\nb', '\udcff', '--', '-x', '%s',
         '{}', '1,2', 'nfe=', 'nfe=0', 'nfe=1,,2', ',', 'a' * 10000, '\t', '1e-400', '+3', '..', '\x1b[31m']
MODULES = [train, sample, evaluate]


def options(module, monkeypatch):
    """The flags of a script, as its parser knows them."""
    parsers = []
    whole = train.Parser.parse_args
    with monkeypatch.context() as patch:
        patch.setattr(train.Parser, 'parse_args',
                      lambda self, argv=None: parsers.append(self) or whole(self, argv))
        module.parse_args([])
    return [action for action in parsers[-1]._actions if action.dest != 'help']


def parsed(module, argv):
    """The arguments, or None where they are refused with code 2 and one line."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr, \
            contextlib.redirect_stdout(io.StringIO()) as stdout:
        try:
            return module.parse_args(argv)
        except SystemExit as stop:
            assert stop.code == 2, argv
    text = stderr.getvalue()
    assert text.count('\n') == 1 and not stdout.getvalue(), (argv, text)
    return None


def fuzz_words(module, monkeypatch, capsys, every):
    count, taken = 0, 0
    for k, action in enumerate(options(module, monkeypatch)):
        flag, words = action.option_strings[0], WORDS[k % every::every]
        joined = [[f'{flag}={word}'] for word in words if word != '--']  # to Python 3.12: []
        for argv in ([flag], *joined, *([flag, word] for word in words)):
            args = parsed(module, argv)
            count, taken = count + 1, taken + (args is not None)
            value = getattr(args, action.dest, None)
            assert not isinstance(value, float) or math.isfinite(value) or action.dest == 'D', argv
            if action.choices and args and action.nargs not in ('*', '+'):
                assert value in (None, *action.choices), argv
    for argv in (['--unknown'], ['x'], ['--', 'x'], ['-n', '3'], ['--hel'], ['--seed', '1', '2']):
        assert parsed(module, argv) is None
    with capsys.disabled():
        print(f'\n{module.__name__}: {count} command lines, {taken} parsed')


@pytest.mark.parametrize('module', MODULES, ids=lambda module: module.__name__)
def test_words_as_flags(module, monkeypatch, capsys):
    fuzz_words(module, monkeypatch, capsys, 8)


@pytest.mark.slow
@pytest.mark.parametrize('module', MODULES, ids=lambda module: module.__name__)
def test_all_words_as_flags(module, monkeypatch, capsys):
    fuzz_words(module, monkeypatch, capsys, 1)


ABSURD = ['1', '1000000', str(2 ** 40), str(2 ** 70), '1e-300', '1e300', '/proc/self/mem', '/', 'no/such/x']
BASE = {'train': [*TINY, '--steps', 1], 'sample': ['--n', 2, '--nfe', 3, '--device', 'cpu'],
        'evaluate': ['--swd', '--n', 2, '--nfe', 3, '--device', 'cpu']}
FOR_EVER = {'steps', 'n', 'nfe', 'repeats', 'sweep', 'timeout'}  # more of them only takes longer


def absurd_cases(module, monkeypatch):
    """Yield (flag, value) that the parser takes, but that no one can mean."""
    for action in options(module, monkeypatch):
        if action.nargs == 0:
            continue
        for word in ABSURD:
            if action.choices or action.dest == 'device':
                continue
            if parsed(module, [f'--{action.dest}={word}']) is not None:
                yield action.dest, word


def ends_well(module, argv, dest):
    """Whether a script runs to its end, rather than ending in one line with code 2."""
    stderr = io.StringIO()
    try:
        with limited(20, 3), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(stderr), \
                warnings.catch_warnings():
            warnings.simplefilter('ignore')
            script([f'{module.__name__}.py', *argv])
        return True
    except TooSlow:
        assert dest in FOR_EVER, argv
        return True
    except SystemExit as stop:
        assert stop.code == 2 and stderr.getvalue().count('\n') == 1, (argv, stderr.getvalue())
        return False


def fuzz_absurd(module, trained, tmp_path, monkeypatch, capsys, every):
    monkeypatch.chdir(tmp_path)
    outcomes = []
    for k, (dest, word) in enumerate(absurd_cases(module, monkeypatch)):
        if k % every:
            continue
        out = ['--out_dir', f'o{k}'] if module is train else ['--ckpt', trained / 'ckpt.pt']
        outcomes.append(ends_well(module, [*BASE[module.__name__], *out, f'--{dest}={word}'], dest))
    with capsys.disabled():
        print(f'\n{module.__name__}: {len(outcomes)} absurd runs, {sum(outcomes)} ended, the rest refused')


@pytest.mark.slow
@pytest.mark.parametrize('module', MODULES, ids=lambda module: module.__name__)
def test_absurd_flags(module, trained, tmp_path, monkeypatch, capsys):
    fuzz_absurd(module, trained, tmp_path, monkeypatch, capsys, 1)


@pytest.mark.parametrize('module', [train, sample], ids=lambda module: module.__name__)
def test_a_few_absurd_flags(module, trained, tmp_path, monkeypatch, capsys):
    fuzz_absurd(module, trained, tmp_path, monkeypatch, capsys, 37)


@pytest.mark.parametrize('part, value', [
    ('opt', {}), ('opt', [1]), ('opt', {'state': {0: 5}, 'param_groups': []}), ('rng', 5),
    ('rng', [[torch.zeros(3)]]), ('opt', 'moments'), ('opt', 'steps')])
def test_rubbish_beside_the_weights_ends_training_in_one_line(trained, tmp_path, part, value):
    saved = torch.load(trained / 'ckpt.pt', weights_only=True)
    if value in ('moments', 'steps'):
        key, wrong = ('exp_avg', torch.zeros(3)) if value == 'moments' else ('step', torch.tensor(-1.))
        value = saved['opt']
        value['state'][0][key] = wrong
    (tmp_path / 'o').mkdir()
    torch.save({**saved, part: value}, tmp_path / 'o' / 'ckpt.pt')
    refuses(['train.py', *TINY, '--dropout', 0.1, '--steps', 12, '--out_dir', tmp_path / 'o'], 'damaged')


# ---------------------------------------------------------------- combinations of flags

SMALL = '--nf 8 --ch_mult 1 1 --attn 8 --warmup 2 --log_every 1 --pairs 9 --steps 2 --out_dir a'
OF_TRAINING = '''--flip|--no-flip  --bf16|--no-bf16  --loss sum|--loss mean  --dropout 0.2
--ema_decay 0|--ema_decay 0.9  --accum 2|--accum 2|--accum 3  --z_max 20|--z_max 1  --z_min 0.01
--lr 1e-2|--lr 0.5|--lr 1e9 --save_every 1  --grad_clip 0.1  --seed 5  --keep 1 --save_every 1
--sample_every 2  --image_size 8  --channels 1|--channels 3  --attn|--attn 4 8  --workers 0
--ch_mult 1|--ch_mult 1 2 1  --preset cifar10|--preset lsun_bedroom|--preset cifar10_pp'''
OF_FIELD = '''--field_batch 8|--field_batch 16|--field_batch all|--field_batch 64|--field_batch 2
--gamma 0|--gamma 1  --z_exp 0|--z_exp 1|--z_exp 9  --sigma 0.1  --tau 0.1  --M 3  --upper_norm 9'''
OF_FLOW = '--solver ' + '|--solver '.join(evaluate.SOLVERS) + '''  --nfe 1|--nfe 2|--nfe 3|--nfe 4
--nfe 3  --schedule log|--schedule rho7|--schedule radius  --to_data|--no-to_data  --weights raw
--z_min 0.1|--z_min 1e-6|--z_min 1|--z_min 1e9  --small_z official|--small_z exact  --seed 3
--batch_size 1|--batch_size 3  --bf16|--no-bf16'''
OUTPUTS = '''--out s.png|--out s.npz|--out folder|--out s.gif  --gif|--interpolate|--encode {0}
|--rescale|--encode {1} --out s.png|--rescale --out s.npz|--interpolate --out folder'''
MEASURES = '''--swd|--neighbours|--bpd|--straightness|--swd --neighbours --bpd|--bpd --dataset {1}
|--swd --dataset {1}|--swd --ref {0}|--prc --ref {1}|--fid --n 40|--prc --is --n 12|--kid --ref {1}
|--save_stats f.npz|--fid --kid --n 40 --ref {0}|--bpd --repeats 2|--fid --ref f.npz --n 40'''
SWEEPS = '''--swd --sweep 1,3|--swd --sweep nfe=2 --solvers euler,rk45|--swd --sweep 4 --bpd
|--straightness --kid --swd --sweep nfe=2,4 --solvers heun,ipndm'''
check_counts = evaluate.check_counts  # newcomer takes it away


def chain(rng):
    """Yield the commands of a random chain; the later ones use what those before have made."""
    def some(p, flags):  # of each 'a|b c|d' in flags one, with probability p
        groups = flags.replace('\n|', '|').replace('\n', '  ').split('  ')
        return [word for group in groups if rng.random() < p
                for word in rng.choice(group.split('|')).split()]

    def flow(p):  # of a checkpoint, with flags most of which it takes
        ckpt = rng.choice([*ckpts * 3, official])
        about = checkpoint.read_checkpoint(ckpt)['args']
        return ['--ckpt', ckpt, *some(p, OF_FLOW), *some(
            .5 if about['classes'] else .03, '--guidance 0|--guidance 2  --classes 0|--classes 0,1'
            '|--classes none|--classes 9'), *some(
            .3 if about['D'] == math.inf else .02, '--solver ddim --nfe 3|--solver ddim --eta 0.5'
            '|--solver ddim --nfe 2 --eta 1'), *some(
            .3 if about['method'] in RIVALS else .02, '--schedule time'), *some(
            .8 if about.get('official') else 0, '--dataset cifar10')]
    sets = ['../colour.npz', '../folder', 'glyphs', '../grey.npy', '../images.zip']
    source, other, official = rng.choice(sets), rng.choice(sets), '../checkpoint_500000.pth'
    method = rng.choice(['pfgm', 'pfgm', 'pfgmpp', 'pfgmpp', 'rf', 'rf', *RIVALS])
    base = ['train.py', '--dataset', source, *SMALL.split(), '--batch_size', rng.choice('48'),
            *some(.5 if source in sets[:3] else .03, '--classes')]
    first = [*base, '--method', method, *some(.09, OF_TRAINING)]
    first += some(method == 'pfgmpp', '--D 1|--D 2|--D 128|--D inf')
    first += some(.3 * (method == 'pfgm'), OF_FIELD)
    yield first
    if not os.path.exists('a/ckpt.pt'):
        return
    more = some(.04, OF_TRAINING)
    kinds = ['--reflow a/ckpt.pt', '--distill a/ckpt.pt'] * (method == 'rf' or rng.random() < .1)
    taught = [[*base, *kind.split(), '--out_dir', 'b', *more] for kind in kinds]
    yield from rng.sample([
        [*first, '--steps', 3, *more], *taught,
        [*first, '--steps', 4, '--out_dir', 'b', '--init_from', 'a/ckpt.pt', *more],
        [*base, *'--attn 16 --image_size 32 --channels 3 --no-classes --steps 9'.split(),
         '--init_from', official, '--out_dir', 'b', *more]], rng.random() < .6)
    ckpts = [path for path in ('a/ckpt.pt', 'b/ckpt.pt') if os.path.exists(path)]
    exact = ['--exact', '--dataset', source, *some(.25, OF_FLOW)]
    for _ in range(2):
        yield ['sample.py', *rng.choice([flow(.3)] * 6 + [exact]), '--n', 3,
               *some(.5, OUTPUTS.format(source, other))]
    made = [path for path in ('s.npz', 'folder') if os.path.exists(path)] or ckpts
    for _ in range(2):
        yield ['evaluate.py', *rng.choices([
            [*flow(.15), '--n', 4, *some(1, MEASURES.format(source, other))],
            [*exact, '--n', 4, *some(1, MEASURES.format(source, other))],
            [*flow(0), '--n', 4, *some(1, SWEEPS), *some(.1, '--weights raw  --small_z official')],
            ['--compare', *ckpts, 'a/ckpt.pt', '--sweep', '1,2', '--n', 3, '--swd',
             *some(.3, '--bpd  --straightness  --solvers rk45,heun  --batch_size 2')],
            ['--samples', rng.choice(made), *some(.9, f'--dataset {source}|--ref {source}'),
             *some(1, '--swd|--neighbours|--swd --n 2|--kid|--is|--neighbours --swd')],
            ['--solver_bench', '--dataset', source, '--n', 3, '--sweep', '2,3',
             *some(.7, '--solvers rk45,heun|--solvers unipc,euler,dpm3m')],
            ['--curves', *(path.replace('ckpt.pt', 'log.jsonl') for path in ckpts)]],
            (7, 1, 2, 2, 2, 1, .5))[0]]


def ends(command):
    """Whether a command ends well, and what it leaves is sound; else in one line, with code 2."""
    line, stderr = ' '.join(map(str, command)), io.StringIO()
    try:
        with limited(60, 8), warnings.catch_warnings(action='error'), \
                contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(stderr):
            warnings.simplefilter('ignore', ResourceWarning)
            script([*command, '--device', 'cpu', *['--tol', '0.1'] * (command[0] != 'train.py')])
        for path in map(str, Path('.').rglob('*.*')):
            assert path[-3:] not in ('png', 'gif') or Image.open(path).format.lower() == path[-3:]
            assert not path.endswith('npz') or len(np.load(path).files)
            for row in open(path) if path.endswith('jsonl') else ():
                json.loads(row, parse_constant=pytest.fail)  # NaN, Infinity
        return True
    except SystemExit as stop:
        globals().update(last_line=stderr.getvalue().strip())
        assert stop.code == 2 and stderr.getvalue().count('\n') == 1, (line, stderr.getvalue())
        return False
    except (Exception, TooSlow, pytest.fail.Exception) as error:
        raise AssertionError(line) from error


def run_chain(k, world, monkeypatch):
    """Whether each command of chain k ended well."""
    rng = random.Random(k)
    (world / str(k)).mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(world / str(k))
        patch.setattr(data, 'MEMORY_LIMIT', 1 if rng.random() < .2 else data.MEMORY_LIMIT)
        return [ends(command) for command in chain(rng)]


@pytest.fixture
def world(newcomer, tmp_path, monkeypatch):
    """Beside the newcomer's files, small data sets of every kind; no image drawn is NaN."""
    x = torch.randint(0, 256, (40, 16, 16, 3), generator=seeded()).to(torch.uint8).numpy()
    y, follow = np.arange(40) % 3, baselines.Flow.follow
    np.savez('colour.npz', train_images=x, train_labels=y, test_images=x[:9])
    np.save('grey.npy', x[:, :8, :8, 0])
    for k, pixels in enumerate(x):
        os.makedirs(f'folder/class {k % 3}', exist_ok=True)
        Image.fromarray(pixels).save(f'folder/class {k % 3}/{k}.png')

    def finite(*args, **kw):
        x, nfe = follow(*args, **kw)
        assert x.isfinite().all()
        return x, nfe
    monkeypatch.setattr(baselines.Flow, 'follow', finite)
    monkeypatch.setattr(evaluate, 'check_counts', check_counts)
    monkeypatch.setattr(data, 'glyphs', functools.partial(data.glyphs, 50))
    return tmp_path


def test_combinations(world, monkeypatch):
    for k in range(8):
        run_chain(k, world, monkeypatch)


@pytest.mark.slow
def test_500_combinations(world, monkeypatch, capsys):
    ended, k = [], 12
    while len(ended) < 500:
        ended, k = ended + run_chain(k, world, monkeypatch), k + 1
    with capsys.disabled():
        print(f'\n{len(ended)} commands: {sum(ended)} ended well, the others were refused')


# ---------------------------------------------------------------- where people run it

PRETEND = HERE.parent / 'shared' / 'tools' / 'pretend_cuda.py'
MODES = """
train.py TINY --steps 2 --dropout 0.1 --out_dir o
sample.py --ckpt o/ckpt.pt --nfe 4 --n 3
sample.py --ckpt o/ckpt.pt --solver rk45 --tol 0.1 --n 3 --out digits
evaluate.py --ckpt o/ckpt.pt --bpd --swd --neighbours --n 2 --nfe 2 --tol 0.1
train.py TINY --steps 4 --sample_every 2 --dropout 0.1 --out_dir o
sample.py --exact --n 2
train.py TINY --field_batch all --steps 2 --classes --dropout 0.1 --out_dir all
sample.py --ckpt all/ckpt.pt --nfe 3 --n 2 --weights raw --classes 3 --guidance 2
train.py TINY_PP --D 128 --classes --steps 2 --accum 2 --out_dir pp
sample.py --ckpt pp/ckpt.pt --nfe 3 --n 2 --guidance 2 --out a.npz
train.py TINY_PP --dataset large.npz --D inf --steps 2 --workers 1 --out_dir large
train.py TINY_PP --method vp --steps 2 --out_dir vp
train.py TINY_PP --method ddpm --steps 2 --out_dir ddpm
sample.py --ckpt ddpm/ckpt.pt --solver ddim --eta 1 --nfe 3 --n 2 --schedule time
train.py TINY_PP --method rf --steps 2 --out_dir rf
train.py TINY_PP --reflow rf/ckpt.pt --pairs 16 --steps 2 --out_dir reflow
train.py TINY_PP --distill rf/ckpt.pt --pairs 16 --steps 2 --out_dir distill
train.py --dataset 32.npz --batch_size 4 --field_batch 8 --steps 8 --sample_every 0 --init_from a.pth --out_dir official
sample.py --ckpt a.pth --nfe 2 --n 2
sample.py --ckpt a.pth --tol 0.5 --n 2
sample.py --ckpt o/ckpt.pt --nfe 2 --n 2 --gif
sample.py --ckpt o/ckpt.pt --n 2 --tol 0.1 --encode glyphs
sample.py --ckpt o/ckpt.pt --nfe 2 --n 8 --interpolate
sample.py --ckpt o/ckpt.pt --nfe 2 --n 8 --rescale
evaluate.py --ckpt rf/ckpt.pt --straightness --n 2
evaluate.py --compare o/ckpt.pt rf/ckpt.pt reflow/ckpt.pt --swd --sweep nfe=2,3 --n 2
evaluate.py --exact --bpd --n 2 --tol 0.1
evaluate.py --solver_bench --n 2 --sweep nfe=2 --solvers unipc,rk45
"""
DRIVER = """
import sys
sys.path.insert(0, {here!r})
import data, evaluate, launch, sample, train
for line in open('modes'):
    data.MEMORY_LIMIT = 1 if '--workers' in line else 2 << 30
    name, *words = line.split()
    module = dict(train=train, sample=sample, evaluate=evaluate)[name[:-3]]
    print(line)
    launch.run(module.main, module.parse_args(words))
print('all modes ran')
"""


@pytest.mark.skipif(not PRETEND.exists() or not hasattr(torch._C, '_ensureCUDADeviceGuardSet'),
                    reason='nothing here pretends a GPU, or this PyTorch is too old for it')
@pytest.mark.parametrize('count', [6, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize('kind', ['cuda', 'mps'])
def test_modes_on_a_pretended_device(kind, count, tmp_path):
    tiny_official(tmp_path / 'a.pth')
    for size in (16, 32):
        pixels = np.random.default_rng(0).integers(0, 256, (20, size, size, 3), dtype=np.uint8)
        np.savez(tmp_path / {16: 'large.npz', 32: '32.npz'}[size], x=pixels)
    words = {'TINY_PP': ' '.join(TINY_PP), 'TINY': ' '.join(TINY)}
    modes = re.sub('TINY_PP|TINY', lambda word: words[word[0]], MODES).replace('--device cpu', '')
    (tmp_path / 'modes').write_text('\n'.join(modes.strip().splitlines()[:count]))
    (tmp_path / 'driver.py').write_text(DRIVER.format(here=str(HERE)))
    done = subprocess.run([sys.executable, PRETEND, 'driver.py'], cwd=tmp_path, text=True,
                          capture_output=True, env={**os.environ, 'PRETEND': kind})
    assert done.stdout.endswith('all modes ran\n'), done.stdout[-999:] + done.stderr
    assert f'1 x {kind}' in done.stdout


def test_cuda_alone_is_its_first_device(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, 'zeros', lambda *shape, device: None)
    monkeypatch.setattr(torch, 'set_float32_matmul_precision', lambda precision: None)
    monkeypatch.setattr(torch.cuda, 'set_device', chosen.append)
    device, rank, world = launch.setup('cuda')
    assert chosen == [device] and (device.index, rank, world) == (0, 0, 1)


def test_no_tf32_in_the_field_rk45_and_likelihood(monkeypatch):
    seen = []
    def settings():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    class Watched(data.Charges):  # the field's products are made as its chunks come
        def split(self, size):
            for part in super().split(size):
                seen.append(settings())
                yield part
    def net(x, z):
        seen.append(settings())
        return -x, -z
    torch.set_float32_matmul_precision('high')
    try:
        x, z = torch.ones(2, 3, requires_grad=True), torch.ones(2)
        pfgm.sample_ode(net, x.detach(), 2.0, 1.0, 'euler', 1, z_exp=0)
        assert seen == [('high', True)]
        seen.clear()
        for each in (False, True):
            pfgm.sample_ode(net, x.detach(), 2.0, 1.0, each=each, z_exp=0)
        pfgm.log_likelihood(net, x.detach(), 1.0, 2.0, z_exp=0)
        assert set(seen) == {('highest', False)} and settings() == ('high', True)
        seen.clear()
        pixels = torch.zeros(4, 3, 1, 1, dtype=torch.uint8)
        pfgm.posterior_mean(torch.zeros(2, 3), z, Watched(pixels))
        assert seen[-1] == ('highest', False)
        with torch.autocast('cpu', torch.bfloat16):  # a caller's autocast ends there too
            exact = pfgm.poisson_field(x.detach(), z, torch.eye(3))
        close(exact[0], pfgm.poisson_field(x.detach(), z, torch.eye(3))[0])
    finally:
        torch.set_float32_matmul_precision('highest')


def test_charges_are_made_of_their_pixels_a_chunk_at_a_time(monkeypatch):
    pixels = torch.randint(0, 256, (11, 3, 4, 4), generator=seeded()).to(torch.uint8)
    want = data.to_float(torch.cat([pixels, pixels.flip(-1)]))
    charges = data.Charges(pixels, mirror=True)
    x, z = pfgm.perturb(want[:6], 100, generator=seeded())
    among = torch.rand(6, 22, generator=seeded()) < 0.5
    whole = pfgm.poisson_field(x, z, want, among=among)
    for size in (1, 4, 22):  # the last of the images and the first mirrored one share a chunk
        monkeypatch.setattr(pfgm, 'chunk', lambda x: size)
        assert torch.equal(torch.cat(list(charges.split(size))), want) and len(charges) == 22
        for a, b in zip(pfgm.poisson_field(x, z, charges, among=among), whole):
            close(a, b, rtol=1e-6, atol=1e-7)


def test_likelihood_in_the_exact_field_of_many_charges(monkeypatch):
    y, x = torch.randn(20, 6, generator=seeded(), dtype=F64), torch.zeros(2, 6, dtype=F64)
    want = pfgm.log_likelihood(ExactField(y), x, 0.5, 40.0, 'exact').logp
    monkeypatch.setattr(pfgm, 'chunk', lambda x: 3)  # each backward needs all chunks
    close(pfgm.log_likelihood(ExactField(y), x, 0.5, 40.0, 'exact').logp, want, rtol=1e-9)


def soak(tmp_path, monkeypatch, steps, before):
    """Resident MB after step `before` and at the end; no graph may hang on what is kept."""
    kept, resident, update = {}, [], train.update
    observe = train.observe

    def watched(net, ema, opt, clip, decay):
        norm = update(net, ema, opt, clip, decay)
        kept.update(ema=list(ema.parameters()), norm=[norm], opt=[
            v for state in opt.state.values() for v in state.values() if torch.is_tensor(v)])
        return norm

    def counted(meter, step, *more):
        observe(meter, step, *more)
        kept.update(meter=[v for v in meter.values() if torch.is_tensor(v)])
        if step in (before, steps):
            pages = int(Path('/proc/self/statm').read_text().split()[1])
            resident.append(pages * os.sysconf('SC_PAGE_SIZE') / 2 ** 20)
    monkeypatch.setattr(train, 'update', watched)
    monkeypatch.setattr(train, 'observe', counted)
    script(['train.py', *TINY, '--steps', steps, '--log_every', 50, '--dropout', 0.1, '--out_dir', tmp_path])
    for name, tensors in kept.items():
        assert tensors and not any(t.requires_grad or t.grad_fn for t in tensors), name
    return resident


def test_nothing_that_is_kept_hangs_on_a_graph(tmp_path, monkeypatch):
    soak(tmp_path, monkeypatch, 60, 30)


@pytest.mark.slow
def test_memory_stays_flat(tmp_path, monkeypatch):
    before, after = soak(tmp_path, monkeypatch, 3000, 300)
    print(f'resident: {before:.0f} MB at step 300, {after:.0f} MB at step 3000')
    assert after < before + 30


def test_a_resumed_run_may_be_tuned(tmp_path, capsys):
    out = ['--out_dir', tmp_path / 'o']
    script(['train.py', *TINY, *out, '--steps', 4])
    saved = torch.load(tmp_path / 'o' / 'ckpt.pt', weights_only=True)
    torch.save({**saved, 'net': {k: v * math.nan for k, v in saved['net'].items()}}, tmp_path / 'o' / 'ckpt.pt')
    refuses(['train.py', *TINY, *out, '--steps', 9], r'step 5: .* a lower --lr \(it was 0.002\)')
    torch.save(saved, tmp_path / 'o' / 'ckpt.pt')
    capsys.readouterr()
    script(['train.py', *TINY, *out, '--steps', 6, '--lr', 1e-4, '--batch_size', 4, '--grad_clip', 0.5,
            '--warmup', 2, '--accum', 2])
    said = capsys.readouterr().out
    assert 'going on with --lr 0.0001 (it was 0.002), --warmup 2 (it was 3), --grad_clip 0.5' in said
    assert [json.loads(line)['images'] for line in open(tmp_path / 'o' / 'log.jsonl')] == [8, 16, 24, 32, 36, 40]
    script(['train.py', *TINY_PP, '--D', 2, '--steps', 2, '--out_dir', tmp_path / 'pp'])
    script(['train.py', *TINY_PP, '--D', 2, '--steps', 3, '--batch_size', 4, '--out_dir', tmp_path / 'pp'])


def test_samples_are_files_as_they_are_made_and_only_missing_ones_are_made_again(
        trained, tmp_path, monkeypatch, capsys):
    command = ['sample.py', '--ckpt', trained / 'ckpt.pt', '--nfe', 3, '--device', 'cpu', '--batch_size', 2]
    script([*command, '--n', 7, '--out', tmp_path / 'whole.npz'])
    whole = np.load(tmp_path / 'whole.npz')['arr_0']
    follow, calls = baselines.Flow.follow, []

    def stopped(flow, x, *more):
        calls.append(len(x))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return follow(flow, x, *more)
    for out in (tmp_path / 'a.npz', tmp_path / 'b.png', tmp_path / 'folder'):
        calls.clear()
        monkeypatch.setattr(baselines.Flow, 'follow', stopped)
        with pytest.raises(SystemExit) as stop:
            script([*command, '--n', 7, '--out', out])
        assert stop.value.code == 130 and (not out.exists() or out.is_dir())
        script([*command, '--n', 7, '--out', out])
        assert sum(calls) == 2 + 2 + 2 + 3  # the one that was stopped drew two in vain
    assert np.array_equal(np.load(tmp_path / 'a.npz')['arr_0'], whole)
    made = [sample.read_png(tmp_path / 'folder', i) for i in range(7)]
    assert np.array_equal(np.stack(made), whole)
    assert sorted(os.listdir(tmp_path)) == ['a.npz', 'b.png', 'folder', 'whole.npz']
    calls.clear()
    script([*command, '--n', 9, '--out', tmp_path / 'folder'])
    assert sum(calls) == 2
    for other in (['--seed', 1], ['--weights', 'raw'], ['--solver', 'euler']):
        refuses([*command, '--n', 9, '--out', tmp_path / 'folder', *other], f'made with {other[0][2:]} ')
    Image.new('L', (16, 16)).save(tmp_path / 'x.png')
    refuses([*command, '--out', tmp_path], 'does not say what made it')


def torchrun(*words, nodes=1, node=0, port=0, **how):
    where = [f'--nnodes={nodes}', f'--node_rank={node}', '--master_addr=127.0.0.1',
             f'--master_port={port}'] if nodes > 1 else ['--nproc_per_node=2']
    return subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', *where, *map(str, words)],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **how)


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def two_machines(*folders, steps):
    port = free_port()
    running = [torchrun(HERE / 'train.py', *TINY, '--dropout', 0, '--steps', steps, '--timeout', 60,
                        '--out_dir', folder, nodes=2, node=k, port=port)
               for k, folder in enumerate(folders)]
    said = [p.communicate(timeout=120)[0] for p in running]
    return [p.returncode for p in running], said


def test_two_machines_with_one_folder_and_with_two(tmp_path):
    one, shared, a, b = (tmp_path / k for k in ('one', 'shared', 'a', 'b'))
    script(['train.py', *TINY, '--dropout', 0, '--steps', 4, '--out_dir', one])
    for folders, steps in (((shared, shared), 4), ((a, b), 2)):
        codes, said = two_machines(*folders, steps=steps)
        assert codes == [0, 0], said
    close(losses(shared), losses(one), rtol=1e-4)
    codes, said = two_machines(a, b, steps=4)  # only the first has the checkpoint
    assert codes == [1, 1] and 'step 0 in process 1, 2 in process 0; give all processes' in said[0], said
    shutil.copytree(a, b)  # as the line says
    assert two_machines(a, b, steps=4)[0] == [0, 0]
    close(losses(a), losses(one), rtol=1e-4)


DOWNLOAD = """
import os, sys, time
sys.path.insert(0, {here!r})
import numpy as np
import torchvision
import data, launch

class MNIST:
    def __init__(self, root, train, download):
        rank = os.environ['RANK']
        if os.path.exists('whole'):
            print('rank', rank, 'finds it', flush=True)
        else:
            open('part', 'x').close()
            time.sleep(1)
            os.rename('part', 'whole')
            print('rank', rank, 'downloads', flush=True)
        self.data, self.targets = np.zeros((4, 28, 28), np.uint8), np.arange(4)
        self.classes = None

torchvision.datasets.MNIST = MNIST
launch.setup('cpu')
data.load('mnist', image_size=28)
"""


def test_one_process_of_a_machine_downloads_and_the_others_wait(tmp_path):
    (tmp_path / 'download.py').write_text(DOWNLOAD.format(here=str(HERE)))
    p = torchrun('download.py', cwd=tmp_path)
    said = p.communicate(timeout=60)[0]
    assert p.returncode == 0 and 'rank 0 downloads' in said and 'rank 1 finds it' in said, said


def test_without_the_modules_that_windows_lacks(tmp_path):
    (tmp_path / 'windows.py').write_text(
        f'import sys; sys.path.insert(0, {str(HERE)!r})\n'
        'sys.modules.update(resource=None, fcntl=None)\n'
        'import evaluate, sample, train\n'
        f'train.main(train.parse_args({[str(w) for w in TINY]} + ["--steps", "2"]))\n')
    done = subprocess.run([sys.executable, 'windows.py'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and 'saved' in done.stdout, done.stderr


@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='no /proc on this system')
def test_a_second_ctrl_c_ends_a_run_that_hangs(tmp_path):
    p = start([*TINY, '--steps', 100000, '--out_dir', tmp_path / 'o'], 2)
    until(p, 'step 3/')
    hung, stopped = workers(p)
    os.kill(stopped, signal.SIGSTOP)
    time.sleep(0.5)
    for _ in range(2):
        assert Path(f'/proc/{hung}/wchan').exists()
        os.kill(hung, signal.SIGINT)
        time.sleep(1)
    assert ' Z ' in Path(f'/proc/{hung}/stat').read_text() if Path(f'/proc/{hung}').exists() else True
    os.kill(stopped, signal.SIGKILL)
    p.communicate(timeout=60)  # torchrun sees that they have ended
    assert p.returncode != 0


@pytest.mark.parametrize('flags', [['--gif'], ['--encode', 'glyphs'], ['--field_lines']])
def test_pictures_of_one_process_are_refused_under_torchrun(trained, tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('WORLD_SIZE', '2')
    refuses(['sample.py', '--ckpt', trained / 'ckpt.pt', '--n', 2, '--nfe', 2, *flags], 'one process')
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('D', [1, 128, math.inf])
def test_a_field_batch_trains_any_d_on_the_mean_of_its_charges(D, tmp_path):
    flow, y = baselines.Denoiser(Linear(), D), torch.randn(20, 3, 4, 4, generator=seeded())
    moved, z = flow.perturb(y[:6], seeded(1))
    v_x, v_z = flow.target(moved, z, y[:6], y)
    close(moved + v_x, pfgm.posterior_mean(moved, z, y, D).view(6, 3, 4, 4), atol=1e-4)
    close(v_z, -z)
    close((moved + flow.target(moved, z, y[:6])[0]), y[:6], atol=1e-4)  # of one charge: the image
    for count in (64, 'all'):
        script(['train.py', *TINY_PP, '--D', D, '--field_batch', count, '--classes', '--steps', 3,
                '--out_dir', tmp_path / str(count)])
        assert np.isfinite(losses(tmp_path / str(count))).all()
    refuses(['train.py', *TINY_PP, '--D', D, '--field_batch', 4, '--out_dir', tmp_path / 'o'],
            '--field_batch 4: .* at least --batch_size')


def test_lines_of_results_say_what_made_them(trained, tmp_path):
    command = ['evaluate.py', '--ckpt', trained / 'ckpt.pt', '--swd', '--n', 4, '--device', 'cpu', '--results',
               tmp_path / 'r.jsonl', '--nfe', 3]
    changes = [[], ['--bf16'], ['--schedule', 'log'], ['--no-to_data'], ['--z_min', '0.01'], ['--small_z',
               'official'], ['--weights', 'raw'], ['--solver', 'heun'], ['--seed', 3], ['--solver', 'rk45']]
    for flags in changes:
        script([*command, *flags])
    rows = [json.loads(line) for line in open(tmp_path / 'r.jsonl')]
    same = ('command', 'time', 'seconds', 'swd', 'swd_of_test', 'git')
    told = {json.dumps({k: v for k, v in row.items() if k not in same}) for row in rows}
    assert len(told) == len(changes) and all(row['step'] == 10 for row in rows)


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
    a, b = (torch.load(tmp_path / k / 'ckpt.pt', weights_only=True) for k in ('whole', 'parts'))
    for part in ('net', 'ema'):
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part])


@pytest.mark.cuda
def test_cuda_solvers_follow_those_of_the_cpu(tmp_path):
    charges = data.to_float(data.load('glyphs').pixels[:50]).double()
    x = pfgm.sample_prior((4, 1, 16, 16), 40.0, 800.0, generator=seeded(), dtype=F64)
    for solver in ('rk45', *pfgm.SOLVERS):
        ends = [pfgm.sample_ode(ExactField(charges.to(device)), x.to(device), 40.0, 0.05, solver, 12,
                                z_exp=0, each=True, rtol=1e-8, atol=1e-8)[0].cpu() for device in ('cpu', 'cuda')]
        close(*ends, atol=1e-6)


@pytest.mark.cuda
def test_cuda_field_is_exact_to_1e_6():
    charges = torch.rand(4096, 3, 32, 32, generator=seeded()) * 2 - 1
    x, z = pfgm.perturb(charges[:64], 291, generator=seeded(1))
    torch.set_float32_matmul_precision('high')
    try:
        v = pfgm.poisson_field(x.cuda(), z.cuda(), charges.cuda())
    finally:
        torch.set_float32_matmul_precision('highest')
    want = plain_field(x, z, charges, 5.0)
    assert ((joined(v).cpu() - want).norm(dim=1) <= 1e-6 * want.norm(dim=1)).all()


@pytest.mark.cuda
def test_cuda_modes(cuda_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, flags in (('pfgm', []), ('accum', ['--accum', 2]), ('compiled', ['--compile']),
                        ('pp', ['--D', '128', '--field_batch', 8, '--classes'])):
        flags = [f for f in flags if f not in ('--field_batch', 8)]
        words = [w for w in TINY_PP if w not in ('--device', 'cpu', '--no-bf16')] if name == 'pp' else []
        if words:
            script(['train.py', *words, '--device', 'cuda', *flags, '--steps', 3, '--out_dir', name])
        else:
            cuda_run(*flags, '--steps', 3, '--out_dir', name)
        for more in (['--nfe', 3], ['--solver', 'rk45', '--tol', 0.01]):
            script(['sample.py', '--ckpt', f'{name}/ckpt.pt', '--n', 5, '--device', 'cuda', *more, '--out', 'a.npz'])
        script(['evaluate.py', '--ckpt', f'{name}/ckpt.pt', '--bpd', '--swd', '--n', 2, '--nfe', 2, '--tol', 0.1,
                '--device', 'cuda', '--results', 'r.jsonl'])
    assert all(np.isfinite(row.get('bpd', 0)) for row in map(json.loads, open('r.jsonl')))


@pytest.mark.cuda
def test_cuda_one_rank_of_nccl_follows_the_loss_of_none(cuda_run, tmp_path):
    cuda_run('--no-bf16', '--dropout', 0, '--steps', 4, '--out_dir', tmp_path / 'none')
    words = [w for w in TINY if w not in ('--device', 'cpu')]
    subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=1', HERE / 'train.py', *words,
                    '--device', 'cuda', '--dropout', '0', '--steps', '4', '--out_dir', tmp_path / 'nccl'], check=True)
    close(losses(tmp_path / 'nccl'), losses(tmp_path / 'none'), rtol=1e-4)


@pytest.mark.cuda
def test_cuda_memory_stays_flat(cuda_run, tmp_path, monkeypatch):
    observe, held = train.observe, []
    monkeypatch.setattr(train, 'observe', lambda *args: (observe(*args), held.append(torch.cuda.memory_allocated())))
    cuda_run('--steps', 300, '--log_every', 50, '--out_dir', tmp_path)
    assert held[-1] < held[50] + 2 ** 20
