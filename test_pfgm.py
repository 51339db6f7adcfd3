"""Physics and behaviour. `pytest -q` runs all of it in minutes on two cores, without a network.

Reference numbers of the authors' code are read from ../shared/golden where that folder exists.
"""
import argparse
import contextlib
import copy
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
from PIL import Image
from scipy import integrate, optimize, stats

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
    assert moved.dtype == z.dtype == x.dtype
    for name, ours in (('r', moved.norm(dim=1)), ('z', z)):
        p = stats.ks_2samp(ours.numpy(), ref[f'draws_{name}_{key}']).pvalue
        assert p > 1e-3, (name, p)
        error = np.percentile(ours, ref['q_percent']) - ref[f'{name}_q_{key}']
        spread = ref[f'{name}_q_se_{key}'] * math.sqrt(1 + float(ref['n_draws']) / n)
        assert (abs(error) < 4 * spread).all(), (name, error / spread)


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
    v_x, v_z = pfgm.poisson_field(x, z, charges, 5.0)
    assert v_x.shape == x.shape and v_x.dtype == v_z.dtype == x.dtype == torch.float32
    v = joined((v_x, v_z)).double()
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
    close(joined(pfgm.poisson_field(charges[:2], torch.zeros(2), charges)), torch.zeros(2, N + 1))


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
def test_prior_density_integrates_to_1(D):
    def shell(r):  # N = 3: 4 pi r^2 p(r)
        x = torch.tensor([[r, 0, 0]], dtype=F64)
        return 4 * math.pi * r * r * math.exp(pfgm.prior_logp(x, 2.0, D))
    close(integrate.quad(shell, 0, np.inf)[0], 1.0, rtol=1e-8)


@pytest.mark.parametrize('D', [1, 2, 128, math.inf])
def test_prior_quantiles_of_any_D(D):
    x = pfgm.sample_prior((20000, 48), 3.0, D=D, generator=seeded(), dtype=F64)
    law = stats.chi2(48) if D == math.inf else stats.betaprime(48 / 2, D / 2)
    assert stats.kstest(x.square().sum(1).numpy() / 9, law.cdf).pvalue > 0.01


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


def test_with_skip_the_network_is_alone_near_the_data_and_a_charge_at_0_far_away():
    args, net = dict(gamma=5.0, skip=True), torch.nn.Identity()
    net.forward = lambda x, z: (torch.full_like(x, 0.25), torch.full_like(z, -0.5))
    near = torch.full((3, 1, 8, 8), 0.5)  # no noise shows beyond data of spread 1/2
    for x, z, noise in ((near, 0.01, 0), (32 * near, 40.0, 20), (3200 * near, 4000.0, 2000)):
        flow, z = baselines.PFGM(net, args).train(), torch.full((3,), z)
        v_x, v_z = flow(x, z)
        at_0 = pfgm.poisson_field(x, z, torch.zeros(1, 1, 8, 8), 5.0)
        s2 = max((x[0].square().sum() + z[0] ** 2).item() / 65 - 0.25, 0)
        c2 = 1 / (1 + s2)                                  # by itself alone, and not at all
        close(v_x, c2 ** 0.5 * 0.25 + (1 - c2) * at_0[0], rtol=1e-5, atol=1e-6)
        close(v_z, c2 ** 0.5 * -0.5 + (1 - c2) * at_0[1], rtol=1e-5, atol=1e-6)
        assert s2 >= 0.2 * noise ** 2
    assert (v_x - at_0[0]).abs().max() < 1e-3
    args['skip'] = False
    assert torch.equal(baselines.PFGM(net, args).train()(x, z)[0], torch.full_like(x, 0.25))


def test_a_field_that_is_followed_stays_within_what_data_in_the_cube_allow():
    """An exact field is not touched, on a charge and far out. What has learned nothing leads no
    farther than a field can, has a divergence, and is trained on as it is."""
    y = torch.rand(40, 3, 4, 4, generator=seeded(), dtype=F64) * 2 - 1
    noise = torch.randn(y.shape, generator=seeded(1), dtype=F64)
    args = dict(M=9, sigma=0.01, tau=0.03, m_draws=1, gamma=5.0, method='pfgm')

    def following(of):
        net = torch.nn.Identity()
        net.forward = of
        return baselines.as_flow(net, args), net.eval()
    flow, _ = following(ExactField(y))
    for scale, z in itertools.product((0, 1e-2, 1, 30, 1e4), (1e-4, 1e-2, 1, 4.9, 300)):
        x, z = y + scale * noise, torch.full((40,), z, dtype=F64)
        for got, want in zip(flow(x, z), ExactField(y)(x, z)):
            close(got, want, rtol=1e-9)
    for n, v_z in itertools.product((0.0, 0.9, 1.0, 1.2), (0.3, -1e-9, -99.0)):
        def learned(x, z):
            r = x.flatten(1).norm(dim=1)
            return -n * math.sqrt(48) * pfgm.column(1 / r, x) * x, v_z + 0 * z
        flow, net = following(learned)
        for z in (0.1, 30.0):
            x, z = (500 * noise).requires_grad_(), torch.full((40,), z, dtype=F64)
            slope = pfgm.drift(flow, x, z, z_exp=3)
            ratio = slope.detach().flatten(1).norm(dim=1) / x.detach().flatten(1).norm(dim=1)
            assert n == 0 or (ratio > 0.99).all() and (ratio < 1.01).all()
            assert torch.autograd.grad(slope.sum(), x)[0].isfinite().all()
        net.train()
        for got, want in zip(flow(x, z), learned(x, z)):
            close(got, want, rtol=0)
    assert baselines.as_flow(net, {**args, 'official': True}) is net  # as published


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
    for solver, nfe in (('rk45', 0), *((solver, n) for solver in pfgm.SOLVERS for n in (1, 7))):
        out, _ = pfgm.sample_ode(ExactField(y), x, 40.0, 0.01, solver, nfe)
        close(out, y + (x - y) * 0.01 / 40, atol=1e-3 if solver == 'rk45' else 1e-9)
    seen = []  # unipc's first step without a call is forgotten once it has been corrected
    out, _ = pfgm.sample_ode(ExactField(y), x, 40.0, 0.01, 'unipc', 7, to_data=True,
                             callback=lambda *at: seen.append(at))
    close(seen[-2][1], y + (x - y) * 0.01 / 40, atol=1e-9)
    close(out, y.expand(3, -1), atol=1e-9)


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


@pytest.mark.parametrize('each', [False, True])
def test_rk45_of_a_field_that_leads_nowhere_ends(monkeypatch, each):
    monkeypatch.setattr(pfgm, 'CALL_LIMIT', 200)
    with pytest.raises(pfgm.SolverError, match='RK45 stopped at z = [.0-9]+: its steps'):
        pfgm.sample_ode(lambda x, z: (torch.sin(1e5 * z.log())[:, None] * 1e3 + 0 * x, -z),
                        torch.zeros(2, 3), 1e-3, 40.0, z_exp=0, each=each)


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
    grids = {name: pfgm.schedule(name, x, 40.0, 0.5, 9) for name in pfgm.SCHEDULES}
    # a point at the last plane's distance from a charge it is bound for: d^2 = (N + 1) 0.5^2
    distance = torch.hypot(x.flatten(1).norm(dim=1), torch.tensor(40.0, dtype=F64))
    ends = dict(log=0.5, rho7=0.5, radius=0.5 * 193 ** 0.5 * 40 / distance)
    for name, grid in grids.items():
        assert grid.shape == (10, 50) and (grid[1:] < grid[:-1]).all()
        close(grid[0], torch.full((50,), 40.0), rtol=1e-12)
        close(grid[-1], ends[name] + 0 * distance, rtol=1e-12)
    close(pfgm.schedule('radius', x, 40.0, 0.5, 9, D=math.inf), grids['log'])
    with pytest.raises(ValueError, match='linear'):
        pfgm.schedule('linear', x, 40.0, 0.5, 9)


# ---------------------------------------------------------------- any D

class Linear(torch.nn.Module):
    """A stand-in for a U-Net: F = x sin(c_noise) + class."""

    def forward(self, x, z, labels=None):
        shift = 0 if labels is None else labels.to(x).view(-1, 1, 1, 1)
        return x * z.sin().view(-1, 1, 1, 1) + shift, z


def test_d_inf_is_edm_and_large_d_converges_to_it():
    x = 3 * torch.randn(6, 3, 8, 8, generator=seeded(), dtype=F64)
    sigma = torch.tensor([0.002, 0.05, 0.5, 2.0, 10.0, 80.0], dtype=F64)
    edm = baselines.Denoiser(Linear())
    v_x, v_z = edm(x, sigma)
    s = sigma.view(-1, 1, 1, 1)  # EDM Table 1, sigma_data 0.5
    c_skip, c_out = 0.25 / (s ** 2 + 0.25), s * 0.5 / (s ** 2 + 0.25).sqrt()
    xhat = c_skip * x + c_out * Linear()(x / (s ** 2 + 0.25).sqrt(), sigma.log() / 4)[0]
    close(x + v_x, xhat, rtol=1e-12, atol=1e-12)
    close(v_z, -sigma)
    close(edm.weight(x, sigma), (sigma ** 2 + 0.25) / (sigma / 2) ** 2, rtol=1e-12)
    close(pfgm.drift(edm, x, sigma, z_exp=0), x - xhat, rtol=1e-9, atol=1e-12)
    y = torch.randn(9, 3, 8, 8, generator=seeded(1), dtype=F64)
    for D, atol in ((1e4, 6), (1e6, 6e-2), (1e8, 6e-4)):
        z = sigma * math.sqrt(D)
        noisy = y[:6] + s * torch.randn(6, 3, 8, 8, generator=seeded(2), dtype=F64)
        close(baselines.Denoiser(Linear(), D)(noisy, z)[0], edm(noisy, sigma)[0], atol=atol)
        pair = (z, D), (sigma, math.inf)
        close(*(pfgm.posterior_mean(noisy, at, y, d) for at, d in pair), atol=atol)
        a, b = (pfgm.kernel((6, 3, 8, 8), at, d, seeded(3)) for at, d in pair)
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
    """The flow of D = inf of data N(mean, spread^2), from the output that is exact for it."""
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
    rf, y, eps = baselines.METHODS['rf'](None), *torch.randn(2, 19, dtype=F64)
    z = rf.z_of(1 - t[:-1])
    c_skip, c_out, c_in, c_noise = rf.coefficients(z)
    close(c_in * (y + z * eps), t[:-1] * y + (1 - t[:-1]) * eps, atol=1e-12)
    close((y - c_skip * (y + z * eps)) / c_out, y - eps, atol=1e-9)
    close(c_noise, 999 * t[:-1], atol=1e-9)


@pytest.mark.parametrize('eta', [0.0, 0.5, 1.0])
def test_ddim_keeps_the_variance_of_a_gaussian(eta):
    flow, g = gaussian_rival('ddpm', spread=0.6), seeded(1)
    x = pfgm.sample_prior((20000, 1), flow.high, D=math.inf, generator=seeded(), dtype=F64)
    def end(solver):
        return pfgm.sample_ode(flow, x, flow.high, flow.low, solver, 999, z_exp=0,
                               schedule_name=flow.planes)[0]
    out = end(baselines.ancestral(eta, lambda i: torch.randn(x.shape, generator=g, dtype=F64)))
    assert stats.kstest(out[:, 0].numpy() / math.hypot(0.6, flow.low), 'norm').pvalue > 0.01
    if eta == 0:
        close(out, end('euler'), atol=1e-9)


@pytest.mark.parametrize('eta', [0.0, 0.5, 1.0])
@pytest.mark.parametrize('method', ['vp', 'subvp', 'pfgmpp'])
def test_stochastic_samplers_have_the_mean_and_variance_of_a_gaussian(method, eta):
    """--solver ddim --eta, VP-SDE and sub-VP-SDE of the tables: where the data are N(m, s^2),
    x_(i+1) - m = A_i (x_i - m) + s_i noise, all known, and of 1000 steps the law is the data's."""
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
    solver = baselines.ancestral(
        eta, lambda i: torch.randn(x.shape, generator=generator, dtype=F64))
    x, nfe = pfgm.sample_ode(flow, x, flow.high, flow.low, solver, steps, z_exp=0,
                             schedule_name=planes)
    assert nfe == steps
    close(x.mean(), m + mean, atol=4 * s / n ** 0.5)
    close(x.var() / var, 1, atol=4 * (2 / n) ** 0.5)


def test_classes_have_fields_of_their_own_and_guidance_mixes_them():
    charges, kinds = torch.randn(12, 5, generator=seeded(), dtype=F64), torch.arange(12) % 3
    x, z = torch.randn(4, 5, generator=seeded(1), dtype=F64), torch.tensor([.1, .5, 1, 9]).double()
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
    def end(which):
        return pfgm.sample_ode(net, x[which], 40.0, 0.01, z_exp=0, labels=labels[which],
                               each=True)[0]
    x *= torch.tensor([1e3, 1, 1e2, 10]).view(4, 1, 1, 1)
    together = end(slice(None))
    for i in range(4):  # the solvers of a batch leave it one by one, each with its own label
        close(together[i], end(slice(i, i + 1))[0], rtol=1e-9, atol=1e-9)


@golden
@pytest.mark.parametrize('z_from, z_to', [(40.0, 1e-3), (1e-3, 40.0)])
def test_rk45_takes_the_steps_of_scipy_on_each_image_alone(z_from, z_to):
    """At every state: the error estimate, which cancels to a 1e-4 of its terms, makes sums in
    another order than scipy's differ by 1e-8."""
    ref = np.load(GOLDEN / 'ode.npz')
    exact = ExactField(torch.from_numpy(ref['data_points']).double())
    def net(x, z):  # one by one, so that the rounding does not depend on the batch
        parts = [exact(x[i:i + 1], z[i:i + 1]) for i in range(len(x))]
        return tuple(map(torch.cat, zip(*parts)))
    x = torch.from_numpy(ref['x_init']).double()[:16]
    if z_to > z_from:
        x = pfgm.sample_ode(net, x, z_to, z_from, z_exp=5)[0]
    states = [[] for _ in x]
    def keep(z, x):
        for found, z_i, x_i in zip(states, z.tolist(), x):
            if not found or found[-1][0] != z_i:  # else its step was rejected, or it is there
                found.append((z_i, x_i))
    _, nfe = pfgm.sample_ode(net, x, z_from, z_to, z_exp=5, each=True, callback=keep)
    calls = []
    for one, found in zip(x, states):
        def f(log_z, y):
            y = torch.from_numpy(y).view(1, *one.shape)
            return pfgm.drift(net, y, y.new_full((1,), math.exp(log_z)), z_exp=5).numpy().ravel()
        want = integrate.solve_ivp(f, (math.log(z_from), math.log(z_to)), one.numpy().ravel(),
                                   rtol=1e-4, atol=1e-4)
        calls.append(want.nfev)
        close([z for z, _ in found], np.exp(want.t[1:]), rtol=1e-6)
        close(torch.stack([x for _, x in found]).flatten(1), want.y.T[1:], 1e-6, 1e-6)
    assert nfe == max(calls)


@pytest.mark.parametrize('each', [False, True])
def test_rk45_that_cannot_go_on_says_where(each):
    def net(x, z):
        return torch.where(z[:, None] < 1, math.nan, x), -torch.ones(len(x))
    with pytest.raises(pfgm.SolverError, match=r'z = (0\.9|1)'):
        pfgm.sample_ode(net, torch.ones(3, 2), 10.0, 0.1, each=each, z_exp=0)
    with pytest.raises(ValueError, match='rk4'):
        pfgm.sample_ode(net, torch.ones(3, 2), 10.0, 0.1, 'rk4')


# ---------------------------------------------------------------- network and checkpoints

PARAMETERS = [({}, 61_805_572), (dict(num_blocks=8), 106_633_732),
              (dict(image_size=64), 61_805_572),
              (dict(image_size=256, ch_mult=(1, 1, 2, 2, 4, 4), num_blocks=2), 124_076_292)]


@pytest.mark.parametrize('kw, count', PARAMETERS)
def test_published_networks_have_their_number_of_parameters(kw, count):
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


@pytest.mark.parametrize('dtype, tolerance', [(F64, 1e-13), (torch.float32, 1e-6),
                                              (torch.bfloat16, 5e-3)])
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
    got = grads(launch.GroupNorm.forward,
                *(a.to(memory_format=torch.channels_last) for a in (x, dy)))
    assert got[1].is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(got, want):
        assert (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize('dtype, tolerance', [(F64, 1e-13), (torch.bfloat16, 2e-2)])
def test_attention_on_a_cpu_has_the_values_and_gradients_of_attention(dtype, tolerance):
    q, k, v, dy = (torch.randn(5, 1, 49, 24, generator=seeded(k), dtype=F64) for k in range(4))

    def grads(attend, *rows):
        rows = [row.clone().requires_grad_(True) for row in rows]
        return [y := attend(*rows), *torch.autograd.grad(y, rows, dy.to(y.dtype))]
    layer = launch.speed_up(unet.Attention(24))
    assert layer.attend is not unet.Attention.attend
    for a, b in zip(grads(layer.attend, *(row.to(dtype) for row in (q, k, v))),
                    grads(unet.Attention.attend, q, k, v)):
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


def test_official_checkpoint_is_read_whole_and_its_moments_serve_fused_adam(tmp_path):
    whole = tiny_official(tmp_path / 'a.pth')
    after = []
    for fused in (True, False):
        saved = checkpoint.read_checkpoint(tmp_path / 'a.pth')
        net = checkpoint.build(saved['net'], saved['args'], 'a.pth')
        opt = torch.optim.Adam(net.to(memory_format=torch.channels_last).parameters())
        train.restore(opt, saved, torch.device('cpu'), 0)
        assert opt.param_groups[0]['fused']
        opt.param_groups[0].update(fused=fused, lr=0.1)
        for i, (name, p) in enumerate(whole.named_parameters()):
            close(saved['net'][name], p.detach() + 0.01)
            close(saved['ema'][name], (p.detach() + 0.01) * 2)
            close(saved['opt']['state'][i]['exp_avg'], (p.detach() + 0.01) * 6)
        for i, p in enumerate(net.parameters()):
            assert all(opt.state[p][k].stride() == p.stride() for k in ('exp_avg', 'exp_avg_sq'))
            p.grad = torch.empty_like(p).normal_(generator=seeded(i))
        opt.step()
        after.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    close(*after, atol=1e-6)


def test_pruned_and_averaged_checkpoints_load(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a = torch.load(trained / 'ckpt.pt', weights_only=True)
    torch.save({**a, 'ema': {k: v + 1 for k, v in a['ema'].items()}}, 'b.pt')
    script(['checkpoint.py', trained / 'ckpt.pt', '--out', 'ema.pt'])
    script(['checkpoint.py', trained / 'ckpt.pt', 'b.pt', '--out', 'mean.pt'])
    for path, shift in (('ema.pt', 0.0), ('mean.pt', 0.5)):
        for k, v in checkpoint.load_checkpoint(path)[0].net.state_dict().items():
            close(v, a['ema'][k] + shift, atol=1e-6)
    assert os.path.getsize('ema.pt') < 0.4 * os.path.getsize('b.pt')
    refuses(['sample.py', '--ckpt', 'ema.pt', '--weights', 'raw'], 'holds the EMA only')
    os.mkdir('o')
    os.rename('ema.pt', 'o/ckpt.pt')
    refuses(['train.py', *TINY, '--steps', 20, '--out_dir', 'o'], 'holds the EMA only')
    refuses(['checkpoint.py', 'no.pt', '--out', 'c.pt'], '--ckpt no.pt: no such file')
    refuses(['checkpoint.py', 'b.pt', '--out', 'mean.pt'], '--out mean.pt: exists')
    assert sorted(os.listdir('.')) == ['b.pt', 'mean.pt', 'o']


class Payload:
    def __reduce__(self):
        return os.system, ('touch hacked',)


def turned(tensors, key):
    tensors[key] = tensors[key].transpose(0, 1).clone()


CONV = 'module.all_modules.{}.Conv_{}.weight'
DAMAGE = {
    'renamed': (lambda s: s['model'].update({CONV.format(3, 9): s['model'].pop(CONV.format(3, 0))}),
                '3.Conv_0.weight is missing; .*3.Conv_9.weight does not belong'),
    'missing': (lambda s: s['model'].pop('module.all_modules.2.bias'), '2.bias is missing'),
    'transposed': (lambda s: turned(s['model'], CONV.format(5, 0)),
                   r'5.Conv_0.weight is \(8, 16, 3, 3\), expected \(16, 8, 3, 3\)'),
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


def test_patches_are_channels_inside_and_pixels_outside(tmp_path):
    torch.manual_seed(0)
    net = unet.UNet(16, 3, 8, (1, 1), 1, (4,), 0, patch=4)
    torch.nn.init.normal_(net.conv_out.weight)
    inside = []
    net.conv_in.register_forward_hook(lambda layer, x, out: inside.append((x[0], out)))
    x = torch.randn(2, 3, 16, 16, requires_grad=True)
    v_x, v_z = net(x, torch.ones(2))
    assert v_x.shape == x.shape and v_z.shape == (2,) and inside[0][1].shape == (2, 8, 4, 4)
    for i in range(4):
        for j in range(4):  # channel (c, i, j) of a patch is its pixel (i, j) of colour c
            assert torch.equal(inside[0][0][:, 4 * i + j::16], x[:, :, i::4, j::4])
    grad, = torch.autograd.grad(v_x[0].square().sum(), x)
    assert grad[0].ne(0).all() and not grad[1].any()
    with pytest.raises(ValueError, match='multiple of 8'):
        unet.UNet(20, 3, 8, (1, 1), 1, (4,), 0, patch=4)


def test_a_run_of_an_older_version_goes_on_and_samples_as_it_did(tmp_path, monkeypatch):
    """assets/before.zip: a run of 30 steps made by commit f651589, the losses of the three that it
    made then, and its samples, by a network whose field was followed as it is."""
    with zipfile.ZipFile(HERE / 'assets' / 'before.zip') as archive:
        archive.extractall(tmp_path)
    then = json.loads((tmp_path / 'then.json').read_text())
    with monkeypatch.context() as m:
        m.setattr(baselines.PFGM, 'forward', lambda self, x, z: self.net(x, z))
        made = sampled(tmp_path / 's.npz', '--ckpt', tmp_path / 'ckpt.pt', '--n', 4, '--nfe', 6,
                       '--no-bf16')
    assert np.abs(made - then['samples']).max() <= 1
    script(['train.py', '--image_size', 8, '--steps', 33, '--log_every', 1, '--device', 'cpu',
            '--no-bf16', '--out_dir', tmp_path])  # all else is the run's own
    rows = rows_of(tmp_path / 'log.jsonl')
    assert [row['step'] for row in rows] == [29, 30, 31, 32, 33] and rows[-1]['images'] == 33 * 8
    close(losses(tmp_path)[2:], then['losses'], rtol=1e-4)


def test_a_run_of_before_a_flag_goes_on_without_it(trained, tmp_path, capsys):
    assert checkpoint.load_checkpoint(trained / 'ckpt.pt')[0].net.patch == 2
    command = ['train.py', *TINY, '--out_dir', tmp_path]
    script([*command, '--patch', 1, '--m_draws', 1, '--no-muon', '--steps', 1])
    saved = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
    for key in ('patch', 'decay', 'm_draws', 'muon'):
        del saved['args'][key]
    torch.save(saved, tmp_path / 'ckpt.pt')
    refuses([*command, '--steps', 2, '--patch', 2], '--patch 2: .* has 1; keep it')
    refuses([*command, '--steps', 2, '--muon'], '--muon True: .* has False; keep it')
    refuses([*command, '--steps', 2, '--m_draws', 3], '--m_draws 3: .* has 1; keep it')
    script([*command, '--steps', 2])  # though the preset has other values now
    other = ['train.py', *TINY, '--init_from', tmp_path / 'ckpt.pt', '--out_dir', tmp_path / 'b']
    refuses([*other, '--muon'], '--muon True: .* has False; give --no-muon')
    refuses([*other, '--patch', 2], '--patch 2: .* has 1; give --patch 1')
    assert checkpoint.load_checkpoint(tmp_path / 'ckpt.pt')[0].net.patch == 1


def test_the_learning_rate_rises_stays_and_falls_to_0_at_the_last_step(tmp_path, capsys):
    args = types.SimpleNamespace(lr=8.0, warmup=2, decay=0.5, steps=8)
    rates = [train.learning_rate(args, step) for step in range(1, 9)]
    assert rates == [4, 8, 8, 8, 8, 6, 4, 2]
    args.decay = 0
    assert [train.learning_rate(args, step) for step in (2, 8)] == [8, 8]
    command = ['train.py', *TINY, '--warmup', 0, '--decay', 1, '--out_dir', tmp_path / 'o']
    script([*command, '--steps', 4])
    script([*command, '--steps', 8])  # up again: as the longer run would have it
    assert 'it rises again' in capsys.readouterr().out
    rates = [json.loads(line)['lr'] / 2e-3 for line in open(tmp_path / 'o' / 'log.jsonl')]
    close(torch.tensor(rates), torch.tensor([1, .75, .5, .25, .5, .375, .25, .125]))


@pytest.mark.parametrize('shape', [(3, 8, 20), (2, 20, 8)])
def test_orthogonal_keeps_the_singular_vectors(shape):
    G = torch.randn(shape, generator=seeded(), dtype=F64)
    U, S, V = torch.linalg.svd(G, full_matrices=False)
    s = U.mT @ baselines.orthogonal(G) @ V.mT
    close(s, torch.diag_embed(s.diagonal(dim1=1, dim2=2)), atol=1e-9)
    s = s.diagonal(dim1=1, dim2=2)[S > 0.1 * S.amax(1, keepdim=True)]
    assert s.min() > 0.6 and s.max() < 1.25


def test_muon_moves_matrices_by_their_orthogonal_average_and_the_rest_as_adam():
    torch.manual_seed(0)
    net = unet.UNet(8, 1, 8, (1,), 1, (8,), 0)
    adam = copy.deepcopy(net)
    one, other = baselines.Muon(net, 0.01), torch.optim.Adam(adam.parameters(), 0.01, (0.9, 0.99))
    before = net.mid[0].conv1.weight.detach().clone()
    for model, opt in ((net, one), (adam, other)):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=seeded(p.numel()))
        opt.step()
    assert torch.equal(net.conv_in.weight, adam.conv_in.weight)
    assert torch.equal(net.mid[0].norm1.bias, adam.mid[0].norm1.bias)
    grad = net.mid[0].conv1.weight.grad.view(1, 8, 72)
    move = (before - net.mid[0].conv1.weight).detach().view(8, 72)
    close(move, 0.002 * 72 ** 0.5 * baselines.orthogonal(grad)[0], atol=1e-6)
    assert not torch.equal(net.mid[1].q.weight, adam.mid[1].q.weight)


def test_m_draws_gather_m_about_the_middle_and_1_is_the_published_law():
    x = torch.zeros(4000, 64)
    same = pfgm.perturb(x, 200, m_draws=1, generator=seeded())
    assert all(torch.equal(a, b) for a, b in zip(same, pfgm.perturb(x, 200, generator=seeded())))
    for k in (1, 3):  # the mean of k uniforms: mean 1/2, variance 1 / (12 k)
        moved, _ = pfgm.perturb(x, 200, m_draws=k, limit_norm=False, generator=seeded())
        m = (moved.norm(dim=1) / 0.08).log() / math.log(1.03) / 200
        assert abs(m.mean() - 0.5) < 0.02 and abs(m.var() * 12 * k - 1) < 0.1


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
    for line in p.stdout:
        if text in line:
            return
    raise AssertionError(f'ended with {p.wait()} before {text!r}')


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


def test_ten_steps_equal_five_and_five(trained, tmp_path):
    for steps in (5, 10):
        script(['train.py', *TINY, '--steps', steps, '--dropout', 0.1, '--out_dir', tmp_path / 'o'])
    assert same_run(trained, tmp_path / 'o')
    a, b = loaded(trained), loaded(tmp_path / 'o')
    assert a['step'] == b['step'] == 10
    assert all(same(state, b['opt']['state'][i]) for i, state in a['opt']['state'].items())
    assert all(torch.equal(x, y) for x, y in zip(a['rng'][0], b['rng'][0]))


def test_two_processes_then_one_and_two_micro_batches_follow_the_loss_of_one(tmp_path):
    one, two, half = (tmp_path / k for k in ('one', 'two', 'half'))
    command = [*TINY, '--dropout', 0]
    script(['train.py', *command, '--steps', 8, '--out_dir', one])
    p = start([*command, '--steps', 4, '--out_dir', two], 2)
    assert 'saved' in p.communicate()[0]
    close(losses(two), losses(one)[:4], rtol=1e-5)
    script(['train.py', *command, '--steps', 8, '--out_dir', two])
    close(losses(two), losses(one), rtol=1e-4)
    script(['train.py', *command, '--steps', 4, '--out_dir', half, '--accum', 2])
    close(losses(half), losses(one)[:4], rtol=1e-5)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_and_sigusr1_saves(tmp_path, number):
    command, ckpt = [*TINY, '--steps', 100000, '--out_dir', tmp_path / 'o'], tmp_path / 'o/ckpt.pt'
    p = start(command)
    until(p, 'step 3/')
    refuses(['train.py', *command], 'another run is using it')
    p.send_signal(signal.SIGUSR1)
    while not ckpt.exists():
        assert p.poll() is None
        time.sleep(0.05)
    first = loaded(tmp_path / 'o')['step']
    p.send_signal(number)
    rest = p.communicate()[0]
    assert p.returncode == 0 and 'saved' in rest
    assert loaded(tmp_path / 'o')['step'] == len(losses(tmp_path / 'o')) > first >= 3


def test_nan_and_a_full_disk_keep_the_checkpoint(copied):
    command = ['train.py', *TINY, '--dropout', 0.1, '--steps', 11, '--out_dir', copied]
    saved, before = loaded(copied), (copied / 'ckpt.pt').read_bytes()
    if Path('/dev/full').exists():
        (copied / 'ckpt.pt.part').symlink_to('/dev/full')
        refuses(command, 'is intact')
        assert (copied / 'ckpt.pt').read_bytes() == before
    saved['net']['conv_in.bias'][:] = math.nan
    torch.save(saved, copied / 'ckpt.pt')
    before = (copied / 'ckpt.pt').read_bytes()
    refuses(command, r'step 11: .*images (\d+ at z = \S+, ){7}\d+ at z.* --lr \(it was 0.002')
    assert (copied / 'ckpt.pt').read_bytes() == before


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(tmp_path, capfd):
    home = tmp_path / 'o'
    command = ['train.py', *TINY, '--save_every', 2, '--steps', 6, '--out_dir', home]
    script(command)
    assert sorted(p.name for p in home.glob('*.pt')) == ['ckpt-0000004.pt', 'ckpt.pt']
    shutil.copytree(home, tmp_path / 'whole')
    (home / 'ckpt.pt').write_bytes((tmp_path / 'whole/ckpt.pt').read_bytes()[:9000])
    script(command)
    assert re.search(r'o/ckpt.pt: damaged.*going back to .*ckpt-0000004.pt', capfd.readouterr().err)
    assert same_run(home, tmp_path / 'whole')


def test_a_file_system_without_links_and_locks(tmp_path, monkeypatch, capsys):
    def absent(*args):
        raise OSError('not supported')
    monkeypatch.setattr(os, 'link', absent)
    monkeypatch.setattr('fcntl.flock', absent)
    script(['train.py', *TINY, *'--save_every 2 --steps 8 --keep 3 --out_dir'.split(), tmp_path])
    err = capsys.readouterr().err
    assert 'cannot be locked (not supported)' in err and err.count('\n') == 1
    kept = {p.name: checkpoint.read_checkpoint(p)['step'] for p in tmp_path.glob('*.pt*')}
    assert kept == {'ckpt-0000004.pt': 4, 'ckpt-0000006.pt': 6, 'ckpt.pt': 8}


REFUSALS = [  # a command on a folder of its own or on the network `trained`, and words of its line
    ('train.py --dataset nothing_here', 'no such data set'), ('train.py --steps 0', 'above 0'),
    ('train.py --image_size 15', 'multiple of 4'),
    ('train.py --patch 3', 'image_size 16: patches of 3, .* of 6'),
    ('train.py --decay 1.1', 'below 1'), ('train.py --lr nan', 'a number above 0'),
    ('train.py --accum 3', 'multiple of'), ('train.py --field_batch 4', 'at least --batch_size'),
    ('train.py --D 3 --field_batch 4', '--field_batch 4: .* at least --batch_size'),
    ('train.py --nf 30', 'take a multiple'), ('train.py --z_min 1e9', 'must be below --z_max'),
    ('train.py --device cuda:7', '--device cuda:7: not on this machine'),
    ('train.py --device tpu9', 'not on this'), ('train.py --data x', 'unrecognized'),
    ('train.py --hel', 'unrecognized'), ('train.py -n 3', 'unrecog'), ('train.py x', 'unrecog'),
    ('train.py --dropout 1', 'below 1'), ('train.py --out_dir /dev/null/x', 'cannot write'),
    ('train.py --out_dir /proc/x', '--out_dir /proc/x: cannot write there'),
    ('train.py --init_from no.pth', 'no such file'), ('train.py --method vp --D 3', 'D 3: belongs'),
    ('sample.py --ckpt no.pt', 'no such file; make one with'), ('sample.py --nfe 0', '--nfe: 0'),
    ('sample.py --nfe 2.5', '--nfe: 2.5'), ('sample.py --solver rk4', 'rk4'),
    ('sample.py --out a.tiff', 'must end in'), ('sample.py --out no/a.png', 'mkdir'),
    *((f'sample.py --out /proc/{out}', f'--out /proc/{out}: cannot be written')
      for out in ('x.png', 'x.gif', 'x.npz', 'x')),
    ('sample.py --encode nothing', 'no such data set'), ('sample.py --classes -2', '-2'),
    ('sample.py --exact --compile', '--compile: --exact has no network'),
    ('sample.py --guidance 2', '--guidance 2.0: the network knows no classes'),
    ('sample.py --classes 3', '--classes 3: .* none; leave it out'),
    ('sample.py --schedule time', 'only vp'), ('sample.py --eta 1', 'belongs to --solver ddim'),
    ('sample.py --solver ddim', '--solver ddim: adds Gaussian noise'),
    ('sample.py --solver ddim --eta 1 --encode glyphs', '--eta 1.0: fresh'),
    *((f'WORLD_SIZE=2 {command}', 'of one process|by one process') for command in (
        'sample.py --gif', 'sample.py --encode glyphs', 'sample.py --field_lines',
        'evaluate.py --bench', 'evaluate.py --solver_bench')),
    ('evaluate.py', 'no metric asked'), ('evaluate.py --fid --n 100', 'needs 2049 images'),
    ('evaluate.py --kid --ref a.npz', 'a.npz'), ('evaluate.py --sweep nfe=0 --swd', '0'),
    ('evaluate.py --fid --samples nothing --ref x', '--samples nothing: no such'),
    ('evaluate.py --swd --sweep nfe=5 --solvers rk4', 'rk4'),
    ('evaluate.py --swd --results no/r.jsonl', 'mkdir'),
    ('evaluate.py --swd --n 2 --nfe 1 --results /proc/x', '--results /proc/x: cannot be written'),
    ('evaluate.py --is --n 20 --inception none.pth', 'no such file; get'),
    ('evaluate.py --is --n 20', r'get https://\S+ by hand and put it at \S+, or give --inception'),
    ('evaluate.py --straightness', '--straightness: only vp'),
    ('evaluate.py --curves none.jsonl', '--curves none.jsonl: .*No such file')]


@pytest.mark.parametrize('command, message', REFUSALS)
def test_bad_input_ends_in_one_line_before_any_work(
        command, message, trained, tmp_path, monkeypatch):
    def offline(*args, **kw):
        raise urllib.error.URLError('no network')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, 'download_url_to_file', offline)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path.parent))
    monkeypatch.setattr(sample, 'make_images', None)
    if '/proc' in command and not Path('/proc/self').exists():
        pytest.skip('no /proc: no folder refuses root')
    if command != (command := command.removeprefix('WORLD_SIZE=2 ')):
        monkeypatch.setenv('WORLD_SIZE', '2')
    name, *flags = command.split()
    base = ([*TINY, '--out_dir', 'o'] if name == 'train.py' else
            ['--ckpt', trained / 'ckpt.pt', '--device', 'cpu'])
    refuses([name, *base, *flags], message)
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


def test_compile_without_a_compiler_ends_in_one_line(trained, tmp_path):
    cache = str(tmp_path / 'c')
    done = subprocess.run(
        [sys.executable, HERE / 'sample.py', '--ckpt', trained / 'ckpt.pt', '--n', '1', '--nfe',
         '1', '--compile'], cwd=tmp_path, capture_output=True, text=True, env={
            **os.environ, 'CXX': 'no_such_compiler', 'TORCHINDUCTOR_CACHE_DIR': cache})
    assert done.returncode == 2 and not (tmp_path / 'samples.png').exists(), done.stderr
    assert done.stderr.startswith('--compile: ') and done.stderr.count('\n') == 1


# ---------------------------------------------------------------- killed, stopped, restarted

@pytest.mark.parametrize('kills, seed', [(2, 0), pytest.param(50, 1, marks=pytest.mark.slow)])
def test_kill_9_and_resume(tmp_path, kills, seed):
    """Killed at random moments, a finished run equals one that was never killed."""
    rng, killed = np.random.default_rng(seed), 0
    command = [*TINY, '--steps', 30 * kills, '--dropout', 0.1, '--save_every', 4, '--field_batch',
               8, '--sample_every', 25]  # of a flag given twice the last one counts
    script(['train.py', *command, '--out_dir', tmp_path / 'whole'])
    while True:
        p = start([*command, '--out_dir', tmp_path / 'killed'])
        if killed < kills:
            next((line for line in p.stdout if line.startswith('step')), None)
            time.sleep(rng.uniform(0, 0.8))
        if killed == kills or p.poll() is not None:
            break
        p.kill()
        p.wait()
        killed += 1
    rest = p.communicate()[0]
    assert killed == kills and (p.returncode == 0 or 'already' in rest), rest
    assert same_run(tmp_path / 'whole', tmp_path / 'killed')


def workers(p):
    """Process ids of the ranks under a torchrun."""
    return [int(pid) for pid in Path(f'/proc/{p.pid}/task/{p.pid}/children').read_text().split()]


TOGETHER = {  # flags that may stand together in any way; a space splits a value in two
    'train': """--method=vp --method=rf --method=pfgm --D=3 --D=inf --classes --flip --image_size=8
        --no-skip --channels=3 --batch_size=6 --accum=2 --accum=3 --field_batch=1 --field_batch=all
        --decay=1 --field_batch=9 --patch=2 --muon --ncsnpp --label_first --dropout=0.2 --attn
        --attn=8,4 --ch_mult=1 --nf=7 --loss=mean --m_draws=4 --M=5 --z_max=1 --z_exp=0 --z_min=2
        --sigma=.1 --gamma=0 --warmup=0 --ema_decay=0 --consistency --init_from=run --init_from=pp
        --distill=run --reflow=pp --pairs=5 --source=photos.npy --seed=7 --sample_every=1 --lr=9
        --bf16 --preset=mnist --keep=1 --steps=1 --dataset=photos.npy""",
    'sample': """--ckpt=pp --ckpt=vp --exact --solver=euler --solver=rk45 --solver=renew --eta=1
        --solver=ddim --nfe=3 --schedule=time --schedule=log --z_min=.5 --to_data --no-to_data
        --tol=.1 --guidance=2 --classes=1,2 --classes=none --small_z=official --weights=raw
        --bf16 --gif --n=9 --interpolate --rescale --encode=photos.npy --inpaint=photos.npy
        --mask=mask.png --colorize=photos.npy --from=photos.npy --field_lines --out=a.npz
        --out=folder --seed=3""",
    'evaluate': """--ckpt=pp --ckpt=vp --exact --swd --bpd --neighbours --straightness --judge --fid
        --sweep=1,2 --solvers=euler,rk45 --compare=run --n=3 --n=140 --ref=photos.npy --nfe=2
        --samples=photos.npy --dataset=photos.npy --solver=heun --repeats=2 --tol=.1 --out=a.png
        --save_stats=s.npz --guidance=2 --classes=1 --schedule=rho7 --seed=2 --curves=run/log.jsonl
        """}


@pytest.mark.slow
def test_any_flags_together_end_well_or_in_one_line(trained, few_glyphs, tmp_path, monkeypatch,
                                                    capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, 'JUDGE_STEPS', 2)
    shutil.copytree(trained, 'run')
    script(['train.py', *TINY_PP, '--D', 3, '--steps', 2, '--out_dir', 'pp'])
    script(['train.py', *TINY_PP, '--method', 'vp', '--classes', '--steps', 2, '--out_dir', 'vp'])
    np.save('photos.npy', np.arange(9 * 256, dtype=np.int64).astype(np.uint8).reshape(9, 16, 16))
    Image.fromarray(np.eye(16, dtype=np.uint8) * 255).save('mask.png')
    rng, ended, count = np.random.default_rng(0), [], 120
    for k in range(count):
        name = [*TOGETHER][k % 3]
        some = rng.choice(TOGETHER[name].split(), rng.integers(1, 5), replace=False)
        words = [word for flag in some
                 for word in re.split('[=,]' if name == 'train' else '=', flag)]
        base = (TINY + ['--steps', '2', '--out_dir', f'o{k}'] if name == 'train' else
                '--ckpt run --device cpu --data_dir . --batch_size 70'.split())
        base += ['--inception', 'random'] * (name == 'evaluate') + ['--n', '2'] * (name != 'train')
        command = [f'{name}.py', *base, *words]
        capsys.readouterr()
        try:
            script(command)
            ended.append(0)
        except SystemExit as stop:
            said = capsys.readouterr().err.splitlines()
            assert stop.code == 2 and len(said) == 1, (command, said)
            ended.append(2)
        except Exception as error:
            raise AssertionError(' '.join(command)) from error
    assert ended.count(0) > count / 4 and ended.count(2) > count / 9
    print(f'{count} commands, {ended.count(0)} ended well, {ended.count(2)} refused')


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


@pytest.mark.parametrize('D, charges', [('2', 'all'), ('inf', 1)])
def test_a_run_keeps_its_d_and_its_classes(D, charges, tmp_path):
    home = tmp_path / 'o'
    command = ['train.py', *TINY, '--classes', '--out_dir', home, '--field_batch', charges]
    script([*command, '--D', D, '--steps', 2])
    net, args = checkpoint.load_checkpoint(home / 'ckpt.pt')
    assert args['D'] == float(D) and args['classes'] == 10 and isinstance(net, baselines.Denoiser)
    refuses([*command, '--D', '5', '--steps', 20], '--D 5.0: the run .* has')
    refuses(['sample.py', '--ckpt', home / 'ckpt.pt', '--device', 'cpu', '--classes', '10'],
            '--classes 10: the network knows 0 to 9')
    labels = baselines.Flow(classes=[0, 3, 7]).labels_of(range(2, 6), 'cpu')
    assert labels.tolist() == [7, 0, 3, 7]


def test_our_own_sets_are_trained_on_their_labels_and_what_is_given_may_be_of_any_class(
        tmp_path, monkeypatch, capsys):
    """glyphs (and mnist), unless flag or run say otherwise; other data by --classes alone."""
    monkeypatch.chdir(tmp_path)
    words = ['train.py', *TINY[:-1], '--steps']
    photos = classes_of(tmp_path / 'photos', 'a', 'b')
    for more, known in (([], 10), (['--no-classes'], 0), (['--dataset', photos], 0),
                        (['--dataset', photos, '--classes'], 2),
                        (['--method', 'rf', '--field_batch', 1, '--source', 'glyphs'], 0)):
        shutil.rmtree('out', ignore_errors=True)
        script([*words, 1, *more])
        assert checkpoint.load_checkpoint('out/ckpt.pt')[1]['classes'] == known
        if more == ['--no-classes']:  # a run, and what goes on from it, stays what it is
            script([*words, 2])
            script([*words, 3, '--init_from', 'out', '--out_dir', 'more'])
            assert checkpoint.load_checkpoint('more/ckpt.pt')[1]['classes'] == 0
    shutil.rmtree('out')
    script([*words, 1])
    glyph = Image.fromarray(data.load('glyphs').pixels[0, 0].numpy())
    glyph.save('0.png')
    capsys.readouterr()
    for more, labels in (
            ([], [*range(10)]), (['--classes', '3,4'], [3, 4]),
            (['--rescale'], [k for k in range(10) for _ in range(8)]),
            (['--interpolate', '0.png', '0.png'], []),
            (['--interpolate', '0.png', '0.png', '--classes', '3,4'], 8 * [3]),
            (['--inpaint', '0.png', '--mask', '0.png'], []),
            (['--inpaint', '0.png', '--mask', '0.png', '--classes', '3,4'], [3, 4])):
        script(['sample.py', '--device', 'cpu', '--nfe', 1, '--n', 8, *more])
        assert f'  classes {labels}  ' in capsys.readouterr().out
    script(['sample.py', '--device', 'cpu', '--nfe', 1, '--n', 20])  # a column a class
    assert Image.open('samples.png').size == (10 * 68 + 4, 2 * 68 + 4)


@pytest.fixture(scope='session')
def straight(tmp_path_factory):
    """A run of 6 steps of rectified flow with classes."""
    out = tmp_path_factory.mktemp('run') / 'straight'
    script(['train.py', *TINY_PP, '--method', 'rf', '--classes', '--steps', 6, '--lr', '1e-2',
            '--out_dir', out])
    return out


def test_straightness_of_known_lines():
    class Point(torch.nn.Module):  # of one data point y: F = y - eps, the lines are straight
        def forward(self, x, c_noise):
            t = (c_noise / 999)[:, None]
            return (y - x) / (1 - t), None
    y, x = torch.linspace(-1, 1, 6, dtype=F64), 999 * torch.randn(5, 6, dtype=F64)
    close(baselines.straightness(baselines.RectifiedFlow(Point()), x), torch.zeros(5), atol=1e-12)
    flow = baselines.VP(lambda x, c_noise: (torch.zeros_like(x), None))  # eps = 0: x / alpha stays
    alpha = flow.alpha(flow.planes(flow.high, flow.low, 50))
    whole = alpha[-1] - alpha[0]
    bent = (whole - 50 * alpha.diff()).square().mean() / whole ** 2
    close(baselines.straightness(flow, x), bent.expand(5), rtol=1e-9)


def test_comparing_checkpoints(trained, straight, few_glyphs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compare = ['evaluate.py', '--compare', straight / 'ckpt.pt', trained / 'ckpt.pt', '--n', 3]
    out = said([*compare, *'--swd --bpd --straightness --sweep nfe=1,4 --solvers unipc,rk45 '
                '--tol 0.1 --device cpu'.split()])
    rows = [line.split() for line in out.splitlines() if re.match(' *(straight|out) .*unipc', line)]
    assert [row[:4] for row in rows] == [[name, method, 'unipc', nfe] for name, method in (
        ('straight', 'rf'), ('out', 'pfgm')) for nfe in '14']
    assert rows[0][-1] != '-' and rows[2][-1] == '-'  # no time, no straightness
    assert len(rows_of('results.jsonl')) == 2 * (3 + 1)
    script(['train.py', *TINY_PP, '--image_size', 8, '--steps', 1, '--out_dir', 'small'])
    refuses([*compare, '--compare', trained / 'ckpt.pt', 'small/ckpt.pt'], '--compare .*one size')


def test_reflow_and_distillation(straight, tmp_path, monkeypatch):
    """Pairs are draws of the prior and where the teacher leads them; killed between two shards the
    run keeps what it has; both students train, and that of distillation samples in one call."""
    teacher, home = straight / 'ckpt.pt', tmp_path / 'distill'
    run = ['train.py', *TINY_PP, '--distill', teacher, '--pairs', 40, '--out_dir', home]
    monkeypatch.setattr(baselines, 'SHARD', 16)
    out = said([*run, '--steps', 2])
    assert 'the teacher: straightness' in out and 'pairs: 40/40' in out
    files = sorted((home / 'pairs').iterdir())
    assert [len(np.load(f)) for f in files] == [16, 16, 8]
    made = {f: f.read_bytes() for f in files}
    files[0].unlink()
    files[2].write_bytes(made[files[2]][:500])
    assert 'pairs: 24/24' in said([*run, '--steps', 4])
    assert {f: f.read_bytes() for f in files} == made and np.isfinite(losses(home)).all()
    script(['train.py', *TINY_PP, '--reflow', teacher, '--pairs', 16, '--steps', 2, '--out_dir',
            tmp_path / 'reflow'])
    assert 'nfe 1 ' in said(['sample.py', '--ckpt', home / 'ckpt.pt', '--n', 3, '--device', 'cpu',
                             '--out', tmp_path / 's.npz'])  # all that the student knows
    eps, y = torch.from_numpy(np.concatenate([np.load(f) for f in files])).float().unbind(1)
    net, args = checkpoint.load_checkpoint(teacher)
    with torch.no_grad():
        end, _ = pfgm.sample_ode(net, y + eps * args['z_max'], args['z_max'], 1e-3, z_exp=0,
                                 labels=torch.arange(40) % 10)
    assert (eps.mean().abs() < 0.05) and (eps.std() - 1).abs() < 0.05
    assert (end - y).abs().mean() < 0.02
    np.save(tmp_path / 'a.npy', np.zeros((9, 16, 16), np.uint8))
    new, words = ['--out_dir', tmp_path / 'x'], 'a.npy: --distill .* was trained on glyphs; give'
    refuses([*run, '--reflow', teacher], 'two runs')
    refuses([*run, *new, '--method', 'pfgm'], '--method pfgm, D inf: a student of .* D, inf')
    refuses(['train.py', *TINY_PP, '--reflow', home, *new], 'itself a student')
    refuses([*run, *new, '--dataset', tmp_path / 'a.npy'], words)


@pytest.mark.parametrize('teacher, student, D', [
    ('pfgm', 'pfgmpp', 1), ('D 3', 'pfgmpp', 3), ('rf', 'rf', math.inf), ('ddpm', 'rf', math.inf),
    ('vp', 'rf', math.inf), ('official', 'pfgmpp', 1), ('edm', 'pfgmpp', 128)])
def test_any_teacher_is_distilled_into_one_call(teacher, student, D, tmp_path, monkeypatch, capsys):
    """The student is trained where sampling begins, x on z_max, towards where x is led."""
    out, path, how = tmp_path / 'a', tmp_path / 'a' / 'ckpt.pt', TINY_PP
    if teacher in ('official', 'edm'):
        how = '--channels 3 --warmup 1 --device cpu --no-bf16 --batch_size 8 --log_every 1'.split()
        path, how = tmp_path / 'net.pth', ['--dataset', tmp_path / 'x.npy', *how]
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
    run = ['train.py', *how, '--no-bf16', '--distill', path, '--pairs', 8, '--steps', 9,
           '--out_dir', home]
    script([*run, '--lr', '1e-2', '--grad_clip', 9])
    said = capsys.readouterr().out
    assert f'the student is {student} of D {D:g}' in said and losses(home)[-1] < losses(home)[0]
    pairs, = (home / 'pairs').iterdir()
    eps, y = torch.from_numpy(np.load(pairs)).unbind(1)
    net, args = checkpoint.load_checkpoint(home / 'ckpt.pt')
    assert (args['method'], args['D'], args['z_exp']) == (student, D, 0)
    z_max = args['z_max']
    start = pfgm.sample_prior(y.shape, 1.0, None, D)  # its norms, or those that the prior is cut to
    if teacher not in ('vp', 'ddpm'):  # rf begins farther out
        cpu = torch.device('cpu')
        flow, _ = checkpoint.load_flow(flags_of('--ckpt', path, '--nfe', 4, '--no-bf16'), cpu)
        start = flow.prior(range(8))
        assert flow.z_max == z_max and flow.upper_norm == args['upper_norm']
        ends, _ = flow.follow(start, cpu, range(8))
        close(y, ends, atol=1e-4 * float(ends.abs().max()))
        for moved, z in seen:  # each a start of the teacher's, on its own plane
            assert (z == z_max).all()
            near = torch.cdist(moved.flatten(1).double(), start.flatten(1).double()).amin(1)
            assert (near < 1e-4 * start.flatten(1).norm(dim=1).max()).all()
    script(['sample.py', '--ckpt', home, '--n', 3, '--device', 'cpu', '--out', tmp_path / 's.npz'])
    assert 'nfe 1 ' in capsys.readouterr().out
    if teacher == 'vp':  # a run of before, whose student is its own, goes on as that
        own = [*run[:-1], tmp_path / 'c', '--lr', '1e-2', '--grad_clip', 9]
        script([*own, '--method', 'vp'])
        script([*own, '--steps', 10])
        assert loaded(tmp_path / 'c')['args']['method'] == 'vp' and len(losses(tmp_path / 'c')) > 9


@pytest.mark.parametrize('flags', [['--D', 2], ['--D', 'inf', '--classes'], ['--method', 'vp']])
def test_consistency_training_and_its_sampler(flags, tmp_path, monkeypatch, capsys):
    """The target at z is what the network, stopped, makes of the same noise at a lower level."""
    monkeypatch.chdir(tmp_path)
    script(['train.py', *TINY_PP, *flags, '--steps', 2, '--lr', '1e-2', '--out_dir', 'a'])
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
                one = lower[None], r * z[i:i + 1], *(k[i:i + 1] for k in labels)
                want = lower + flow(*one)[0][0] if r else clean[i]
            scale = float(moved[i].abs().max() + 1)
            close(moved[i] + target[i], want, rtol=1e-3, atol=1e-4 * scale)
        close(weight * (1 - ratio), plain[4], rtol=1e-4)
        assert not target.requires_grad and flow.training
        seen.append(stage)
        return made
    monkeypatch.setattr(train, 'training_point', kept)
    words = ['train.py', *TINY_PP, '--consistency', '--init_from', 'a', '--lr', '1e-3',
             *[word for word in flags if word == '--classes'], '--out_dir', 'b']
    script([*words, '--steps', 16])
    assert seen[:16] == [1 + step // 2 for step in range(16)] and np.isfinite(losses('b')).all()
    made = torch.load('b/ckpt.pt', weights_only=True)
    assert made['args']['method'] == ('vp' if 'vp' in flags else 'pfgmpp') and made['step'] == 16
    capsys.readouterr()
    for nfe in ([], ['--nfe', 2]):
        script(['sample.py', '--ckpt', 'b', '--n', 3, '--device', 'cpu', *nfe, '--out', 's.npz'])
        assert f'solver renew  nfe {(nfe or [0, 1])[1]} ' in capsys.readouterr().out
    refuses(['sample.py', '--ckpt', 'b', '--encode', 'glyphs', '--device', 'cpu'],
            '--solver renew.*fresh noise cannot be encoded')
    script([*words, '--steps', 17])
    assert '): the levels of --consistency lie further apart' in capsys.readouterr().out
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
    solver = baselines.ancestral(None, lambda i: u[i])
    x, path = 9 * u[0], []
    end, nfe = pfgm.sample_ode(
        ExactField(y, D=D), x, 9.0, 0.5, solver, 3, z_exp=0, D=D, to_data=True,
        schedule_name='log', callback=lambda z, x: path.append((float(z[0]), x)))
    assert nfe == 3 and len(path) == 3
    for (z, x), noise in zip(path, u):
        close(x, y + z * noise, atol=1e-9)
    close(end, y.expand(1000, 6), atol=1e-9)


def test_a_flow_between_two_data_sets(tmp_path, monkeypatch):
    """x_t = t y + (1 - t) s of images s and y, drawn at random and paired so that they are near in
    each batch; samples start from s; reflow keeps the pairs."""
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
    run = ['train.py', *TINY_PP, '--dataset', 'y.npy', '--lr', '1e-2', '--sample_every', 30]
    script([*run, '--method', 'rf', '--source', 's.npy', '--steps', 30, '--out_dir', 'a'])
    pairs, drawn = set(), set()
    for x, z, moved in seen[:30]:
        eps = (moved - x) / z[:, None, None, None]                      # an image of the other set
        near = torch.cdist(eps.flatten(1), s.flatten(1))
        assert (near.amin(1) < 0.05 * (1 + 1 / z)).all()
        ends = torch.cdist(x.flatten(1), y.flatten(1))
        a, b = near.argmin(1), ends.argmin(1)
        cost = torch.cdist(y[b].flatten(1), s[a].flatten(1)).square()
        close(cost.diagonal().sum(), cost[optimize.linear_sum_assignment(cost)].sum(), rtol=1e-5)
        pairs |= {*zip(a.tolist(), b.tolist())}
        drawn |= {tuple(sorted(a.tolist()))}
    assert 7 < len(pairs) < 49 and len(drawn) > 9 and losses('a')[-1] < losses('a')[0]
    how = ['--nfe', 8, '--device', 'cpu', '--no-bf16']  # by which more than a grey level differs
    script(['sample.py', '--ckpt', 'a', '--from', 's.npy', *how, '--out', 'strip.png'])
    strip = np.asarray(Image.open('strip.png').convert('L'))
    assert strip.shape == (4 * 68 + 4, 4 * 68 + 4)                      # 7 pairs
    assert (abs(strip[4:68:4, 4:68:4] - ((s[0, 0].numpy() + 1) * 127.5).round()) <= 1).all()
    script(['sample.py', '--ckpt', 'a', *how, '--n', 9, '--out', 'b.npz'])
    made = np.load('b.npz')['arr_0']
    assert (made[7:] == made[:2]).all() and len(np.unique(made.reshape(9, -1), axis=0)) == 7
    net, args = checkpoint.load_checkpoint('a/ckpt.pt')
    last = pfgm.last_plane(net.low, 8, math.inf)
    x, _ = pfgm.sample_ode(net, args['z_max'] * s, args['z_max'], last, 'unipc', 8, D=math.inf,
                           z_exp=0, schedule_name='radius', to_data=True)
    assert (abs(data.to_uint8(x[:, 0]).int().numpy() - made[:7, :, :, 0]) <= 1).all()
    for kind in ('reflow', 'distill'):
        assert 'straightness' in said([*run, f'--{kind}', 'a', '--pairs', 9, '--steps', 3,
                                       '--out_dir', kind])
        pairs, = Path(kind, 'pairs').iterdir()
        eps, end = torch.from_numpy(np.load(pairs)).unbind(1)
        close(end / 999 + eps, s[torch.arange(9) % 7], atol=1e-4)
        script(['sample.py', '--ckpt', kind, '--n', 2, *how[2:], '--out', f'{kind}.npz'])
    script(['sample.py', '--ckpt', 'a', '--encode', 'y.npy', '--n', 2, *how, '--out', 'e.png'])
    refuses(['evaluate.py', '--ckpt', 'a', '--bpd', '--device', 'cpu'], '--bpd: .*from images')
    refuses([*run, '--source', 's.npy', '--method', 'vp', '--out_dir', 'c'], '--source s.npy: b')
    script(['train.py', *TINY_PP, '--method', 'rf', '--steps', 1, '--out_dir', 'd'])
    refuses(['sample.py', '--ckpt', 'd', '--from', 's.npy'], '--from s.npy: .* from noise')


def flags_of(*words):
    p = launch.Parser()
    checkpoint.flow_flags(p)
    return p.parse_args([str(word) for word in words])


def test_labels_with_a_gap_are_refused_and_a_class_has_one_number_in_both_splits(tmp_path):
    x = np.zeros((8, 8, 8), np.uint8)
    np.savez(tmp_path / 'a.npz', x=x, y=np.array([1, 2] * 4))
    refuses(['train.py', *TINY_PP, '--dataset', tmp_path / 'a.npz', '--D', 2, '--classes',
             '--out_dir', tmp_path / 'o'],
            '--classes: 2 labels from 1 to 2; accepted: 0, 1.*; or give --no-classes')
    for name in ('train/a', 'train/b', 'train/c', 'test/b', 'test/c'):
        (tmp_path / 'f' / name).mkdir(parents=True)
        Image.fromarray(x[0]).save(tmp_path / 'f' / name / '0.png')
    labels = [data.load(tmp_path / 'f', split=split).labels.tolist() for split in ('train', 'test')]
    assert labels == [[0, 1, 2], [1, 2]]


def test_heavy_tailed_starts_stay_finite():
    net = ExactField(torch.rand(20, 3, 4, 4, generator=seeded()) * 2 - 1)
    x = pfgm.sample_prior((8, 3, 4, 4), 40.0, generator=seeded())
    x *= (1e6 / x.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
    for solver in ('rk45', 'euler', 'heun'):
        for small_z in ('exact', 'official'):
            out, _ = pfgm.sample_ode(net, x, 40.0, 1e-3, solver, 20, small_z=small_z)
            assert out.isfinite().all() and out.abs().max() < 100


def test_field_on_a_charge_at_z_0_is_0():
    charges = torch.rand(9, 50, generator=seeded())
    v_x, v_z = pfgm.poisson_field(charges[:2], torch.zeros(2), charges)
    close(v_x, torch.zeros(2, 50), atol=1e-12)
    close(v_z, torch.zeros(2))


@pytest.mark.parametrize('N', [2, 64])
def test_equal_charges_are_reached_equally(N):
    K, g = 5, seeded()
    charges = torch.randn(K, N, generator=g)
    x = pfgm.sample_prior((4000, N), 1000.0, generator=g)
    x, _ = pfgm.sample_ode(ExactField(charges), x, 1000.0, 1e-3)
    reached = torch.bincount(torch.cdist(x, charges).argmin(1), minlength=K)
    assert stats.chisquare(reached.numpy()).pvalue > 0.01, reached


def test_likelihood_in_the_exact_field_of_many_charges(monkeypatch):
    y, x = torch.randn(20, 6, generator=seeded(), dtype=F64), torch.zeros(2, 6, dtype=F64)
    want = pfgm.log_likelihood(ExactField(y), x, 0.5, 40.0, 'exact').logp
    monkeypatch.setattr(pfgm, 'chunk', lambda x: 3)  # each backward needs all chunks
    close(pfgm.log_likelihood(ExactField(y), x, 0.5, 40.0, 'exact').logp, want, rtol=1e-9)


# ---------------------------------------------------------------- sampling

# rk45 on the exact field, in float64: a raw network amplifies how convolutions round in a batch
@pytest.mark.parametrize('flags', ['--exact', '--nfe 5', '--solver ddim --eta 1 --nfe 5'])
def test_an_image_depends_on_seed_and_index_only(trained, straight, few_glyphs, tmp_path, flags):
    run = straight if 'ddim' in flags else trained

    def made(n, batch_size, seed=0):
        return sampled(tmp_path / 'a.npz', '--ckpt', run / 'ckpt.pt', '--n', n, '--no-bf16',
                       '--batch_size', batch_size, '--seed', seed, *flags.split())
    six = made(6, 6)
    assert six.shape == (6, 16, 16, 1) and len(np.unique(six.reshape(6, -1), axis=0)) == 6
    for n, batch_size in ((6, 4), (3, 1)):
        assert abs(made(n, batch_size) - six[:n]).max() <= 1  # rounding to grey levels
    assert abs(made(6, 6, seed=1) - six).max() > 1


def test_processes_share_the_images(trained, tmp_path):
    flags = ['--ckpt', trained / 'ckpt.pt', '--n', '5', '--nfe', '3', '--device', 'cpu']
    p = torchrun('--', HERE / 'sample.py', *flags, '--out', tmp_path / 'two.npz')
    assert p.wait() == 0, p.stdout.read()
    two = np.load(tmp_path / 'two.npz')['arr_0'].astype(int)
    assert abs(sampled(tmp_path / 'one.npz', *flags) - two).max() <= 1


def test_exact_samples_are_training_images(few_glyphs, tmp_path):
    out = said(['sample.py', '--exact', '--n', 4, '--out', tmp_path / 'a.png', '--device', 'cpu'])
    assert '4 of 4 samples are images of glyphs to within a grey level' in out
    assert re.search(r'nfe \d+', out) and Image.open(tmp_path / 'a.png').size == (140, 140)


def test_encoding_inverts(trained, tmp_path):
    out = said(['sample.py', '--ckpt', trained / 'ckpt.pt', '--encode', 'glyphs', '--n', 2, '--tol',
                '1e-6', '--out', tmp_path / 'a.png', '--device', 'cpu'])
    assert float(re.search(r'mean error (\S+)', out)[1]) < 1e-3


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
    parts = [part for line in script.splitlines() for part in line.split('&&')]
    return [part.split() for part in parts if part.strip()]


def toy(size, depth):
    """In place of a torchvision data set: digits of its size, nothing downloaded."""
    def known(root, train, download):
        pixels, labels = (a[:300] for a in data.glyphs(image_size=size, split=(
            'train' if train else 'test')))
        return argparse.Namespace(data=np.stack([pixels] * 3, -1) if depth == 3 else pixels,
                                  targets=labels, classes=list('0123456789'))
    return known


def shrunk(words):
    """The script and flags of a README command, with sizes for a test; of a flag given twice the
    last one counts."""
    words = words[next(i for i, word in enumerate(words) if word.endswith('.py')):]
    if words[0] == 'checkpoint.py':
        return words
    small = [*words, '--device', 'cpu', '--no-bf16']
    if words[0] == 'train.py':
        small += ['--steps', 10 if '--init_from' in words else 3, '--batch_size', 8]
        small += ['--log_every', 1] + ['--pairs', 4] * ('--pairs' in words)
    elif not {'--bench', '--curves'} & set(words):
        small += ['--n', 4 - 2 * ('--exact' in words)]
        small += ['--tol', '0.1'] * bool({'--bpd', 'rk45', '--compare', '--encode'} & set(words))
        small += ['--sweep', 'nfe=2,3'] * bool({'--sweep', '--compare'} & set(words))
    return small + ['--batch_size', 4] * ('--solver_bench' in words)


@pytest.fixture
def newcomer(tmp_path, monkeypatch):
    """A folder with the files that the README speaks of; networks, data, Inception made small."""
    monkeypatch.chdir(tmp_path)
    tiny = dict(nf=8, num_blocks=1, warmup=2, sample_every=0, field_batch=16)
    monkeypatch.setattr(train, 'PRESETS', {k: {**v, **tiny} for k, v in train.PRESETS.items()})
    way, weight = torch.randn(48, 32, generator=seeded()), torch.randn(1008, 32, dtype=F64)
    small = functools.partial(torch.nn.functional.interpolate, size=(4, 4))
    monkeypatch.setattr(unet.UNet.__init__, '__defaults__', (32, 3, 8, (1, 1), 1, (16,), 0.1, 0,
                                                        False, False, 1))
    for target, value in {
            'torchvision.datasets.MNIST': toy(28, 1), 'torchvision.datasets.CIFAR10': toy(32, 3),
            'evaluate.POOL': 32, 'files.POOL': 32,
            'bench.load_inception': lambda *args: (len, weight),
            'bench.features': lambda net, pixels, resize: small(
                pixels.expand(-1, 3, -1, -1).float()).flatten(1) @ way,
            'bench.BENCH_CHARGES': (64, 128), 'bench.JUDGE_STEPS': 2,
            'evaluate.check_counts': lambda *args: None}.items():
        monkeypatch.setattr(target, value)
    os.mkdir('photos')
    with zipfile.ZipFile('images.zip', 'w') as file:
        for k, image in enumerate(np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3))):
            Image.fromarray(image.astype(np.uint8)).save(f'photos/{k}.png')
            file.write(f'photos/{k}.png')
    tiny_official('checkpoint_500000.pth')
    for name, flags in (('training-state-200000', dict(pfgmpp=True, D=2048, ncsnpp=True)),
                        ('conditional', dict(pfgmpp=True, D=2048, ncsnpp=True, classes=10)),
                        ('training-state', dict(pfgmpp=True, D=128, size=64)),
                        ('edm-cifar10-32x32-uncond-vp', {})):
        edm_file(f'{name}.pkl', **flags)
    np.savez('cifar10_stats.npz', mu=np.zeros(32), sigma=np.eye(32))
    for name in ('bold', 'digits'):
        np.savez(f'{name}.npz', arr_0=data.glyphs()[0][:20, ..., None])
    os.mkdir('data')
    cells = np.random.default_rng(1).integers(0, 256, (20, 28, 28, 3)).astype(np.uint8)
    np.savez('data/bloodmnist.npz', train_images=cells, test_images=cells)


@pytest.mark.parametrize('count', [7, pytest.param(1000, marks=pytest.mark.slow)])
def test_readme_commands_in_their_order(newcomer, count):
    """All are parsed and the first `count` run; of those of evaluate.py that differ in values only,
    the first."""
    ran = set()
    for k, words in enumerate(readme_commands()):
        if words[0] == 'pip':
            assert (HERE / words[words.index('-r') + 1]).exists()
        elif words[1:3] != ['-m', 'pytest']:
            command = [str(word) for word in shrunk(words)]
            kind = tuple(word for word in command if word.startswith('--'))
            if k >= count or command[0] == 'evaluate.py' and kind in ran:
                SCRIPTS[command[0].removesuffix('.py')].parse_args(command[1:])
                continue
            script(command)
            for flag, path in zip(command, command[1:]):
                assert flag not in ('--out', '--out_dir') or os.path.exists(path), command
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
        return Found(None, np.arange(40 * 256).reshape(40, 16, 16).astype(np.uint8))
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
    ('METRICS', r'\{', """{
    'brightness': Metric('mean of the pixels', 'pixels', 1, lambda made, ref, args, home: [
        (ref.against(made.n), dict(brightness=made.pixels.double().mean().item()))]),"""),
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
script(train, '--dataset kmnist --no-skip --steps 1 --out_dir pfgm')
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


def test_official_checkpoint_trains_on(tmp_path):
    tiny_official(tmp_path / 'a.pth')
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / 'd.npz', x=pixels)
    script(['train.py', '--dataset', tmp_path / 'd.npz', '--init_from', tmp_path / 'a.pth',
            '--out_dir', tmp_path / 'o', '--steps', 9, '--batch_size', 4, '--field_batch', 8,
            '--sample_every', 0, '--device', 'cpu'])
    saved = torch.load(tmp_path / 'o' / 'ckpt.pt', weights_only=True)
    assert saved['step'] == 9 and saved['args']['nf'] == 8 and saved['opt']['state'][0]['step'] == 9


@pytest.mark.slow
def test_compiled_network_makes_the_same_images(trained, tmp_path):
    flags = ['sample.py', '--ckpt', trained / 'ckpt.pt', '--n', 5, '--nfe', 4, '--batch_size', 4,
             '--device', 'cpu', '--no-bf16', '--out']
    script([*flags, tmp_path / 'a.npz'])
    script([*flags, tmp_path / 'b.npz', '--compile'])
    a, b = (np.load(tmp_path / f'{k}.npz')['arr_0'].astype(int) for k in 'ab')
    assert abs(a - b).max() <= 1
    refuses([*flags, tmp_path / 'c.npz', '--exact', '--compile'],
            '--compile: --exact has no network')


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
    got = bench.resize_tf1(x, 11)[0, 0]
    for i, j in np.ndindex(11, 11):
        v, u = i * 5 / 11, j * 7 / 11
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
    got = evaluate.collect(iter(pixels.split(2)), 5, net, 'tf1', {'features', 'pixels'}, place)
    assert torch.equal(got.pixels, pixels) and got.features.std(0).max() > 1e-3
    # once equal to those of torch-fidelity, bit for bit
    close([got.features.mean(), got.features.std()], [0.0900560, 0.1209559], rtol=1e-4)
    close(got.mu, got.features.double().mean(0), rtol=1e-5, atol=1e-5)
    close(got.sigma, np.cov(got.features.double().numpy().T), atol=1e-5)
    np.savez(tmp_path / 'a.npz', mu=got.mu, sigma=got.sigma)
    read = files.read_stats(str(tmp_path / 'a.npz'), 'any')
    assert read.n is None and torch.equal(read.mu, got.mu) and torch.equal(read.sigma, got.sigma)
    np.savez(tmp_path / 'b.npz', sigma=got.sigma)
    with pytest.raises(ValueError, match='mu None'):
        files.read_stats(str(tmp_path / 'b.npz'), 'any')


def test_a_judge_tells_digits_from_noise_and_is_kept(few_glyphs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, 'JUDGE_STEPS', 60)
    digits = data.glyphs(split='test')[0][:130]
    noise = np.random.default_rng(0).integers(0, 256, (130, 16, 16, 1), np.uint8)
    np.savez(tmp_path / 'digits.npz', arr_0=digits[..., None])
    np.savez(tmp_path / 'noise.npz', arr_0=noise)

    def judged(name):
        script(['evaluate.py', '--judge', '--samples', tmp_path / f'{name}.npz', '--dataset',
                'glyphs', '--device', 'cpu', '--data_dir', tmp_path, '--results',
                tmp_path / 'r.jsonl'])
        return rows_of(tmp_path / 'r.jsonl')[-1], capsys.readouterr().out
    real, said = judged('digits')
    assert 'judge: 7680/7680' in said and 'the judge is right on ' in said
    bad, said = judged('noise')
    assert 'judge: ' not in said  # read from the disk
    assert real['judge_fd'] < 3 * real['judge_fd_of_real'] < bad['judge_fd'] / 5
    assert real['judge_precision'] > 0.5 and real['judge_recall'] > 0.1 and not bad['judge_recall']
    kept, = tmp_path.glob('judge-*.pt')
    kept.write_bytes(kept.read_bytes()[:999])
    again, said = judged('digits')
    assert 'cannot be read' in said and 'judge: 7680/7680' in said
    close(again['judge_fd'], real['judge_fd'], rtol=1e-4)
    np.savez(tmp_path / 'plain.npz', arr_0=noise)
    refuses(['evaluate.py', '--judge', '--samples', tmp_path / 'digits.npz', '--ref',
             tmp_path / 'plain.npz'], '--judge: .* has no labels')

def test_lines_of_results_say_what_was_measured_and_made_them(trained, few_glyphs, tmp_path):
    common = ['evaluate.py', '--ckpt', trained / 'ckpt.pt', '--device', 'cpu', '--results',
              tmp_path / 'r.jsonl', '--out', tmp_path / 'a.png', '--n', 4, '--swd']
    changes = ('--no-bf16', '--bf16', '--schedule log', '--no-to_data', '--z_min 0.01',
               '--solver heun', '--small_z official', '--weights raw', '--seed 3',
               '--solver rk45 --tol 0.1')
    for flags in changes:
        script([*common, '--nfe', 3, *flags.split()])
    script([*common, '--neighbours', '--bpd', '--nfe', 2, '--tol', '1e-3'])
    *rows, of_flow, of_samples = rows_of(tmp_path / 'r.jsonl')
    assert all({'command', 'git', 'torch', 'hardware', 'seconds', 'seed', 'n'} <= row.keys()
               and row['step'] == 10 for row in (*rows, of_flow, of_samples))
    same = ('command', 'time', 'seconds', 'swd', 'swd_of_test', 'git')
    told = {json.dumps({k: v for k, v in row.items() if k not in same}) for row in rows}
    assert len(told) == len(changes) == len(rows)
    assert of_flow['round_trip_mean'] < 0.3 and of_flow['nfe'] > 10
    assert of_samples['swd'] > 0 and of_samples['samples_min'] > 0


def test_bits_per_dim_of_a_known_flow():
    # The method of images. Its flow is linear, so every probe gives the divergence itself.
    class Net(torch.nn.Module):
        def forward(self, x, z):
            return images_net(16, 2.0)(x, z)
    flow = baselines.Flow(net=Net(), gamma=5.0, z_exp=0.0, small_z='exact', z_min=1e-3, z_max=50.0,
                          D=1.0, classes=[])
    pixels = torch.randint(0, 256, (6, 1, 4, 4), generator=seeded()).to(torch.uint8)
    args = evaluate.parse_args(['--bpd', '--tol', '1e-6', '--repeats', '2'])
    got = evaluate.bits_per_dim(flow, pixels, 6, args, (torch.device('cpu'), 0, 1))
    want = []
    for i in range(12):  # image i % 6 with the uniform noise of its seed
        g = seeded(launch.step_seed(0, i % 6 + i // 6 * 2 ** 32))
        x = (pixels[i % 6] + torch.rand(1, 4, 4, generator=g, dtype=F64))[None] / 128 - 1
        up = x * (50 + 2) / (1e-3 + 2)
        logp = pfgm.prior_logp(x, 2 + 1e-3) + pfgm.prior_logp(up, 50.0) - pfgm.prior_logp(up, 52.0)
        want.append(7 - logp / math.log(2) / 16)
    each = torch.cat(want).view(2, 6).mean(0)
    close(got['bpd'], each.mean(), atol=1e-4)
    close(got['bpd_se'], each.std() / 6 ** 0.5, atol=1e-4)


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
    ('P', 'a.png', 3), ('L', 'a.png', 1), ('1', 'a.png', 1), ('LA', 'a.png', 1),
    ('RGBA', 'a.png', 3), ('RGB', 'a.bmp', 3), ('CMYK', 'a.jpg', 3), ('RGB', 'a.JPEG', 3),
    ('RGB', 'a.webp', 3), ('YCbCr', 'a.jpg', 3), ('P', 'a.gif', 3)])
def test_modes(tmp_path, mode, name, channels):
    image = picture().convert(mode)
    set_ = one(tmp_path, name, image)
    assert set_.pixels.shape == (1, channels, 8, 8) and set_.pixels.dtype == torch.uint8
    assert set_.flip == (channels == 3) and set_.labels is None and set_.classes is None
    if name == 'a.png':
        expected = np.asarray(image.convert('L' if channels == 1 else 'RGB'))
        assert (set_[0].permute(1, 2, 0).numpy().squeeze() == expected).all()
    if mode in ('RGBA', 'LA'):  # transparent is white
        Image.new(mode, (4, 4), 0).save(tmp_path / 'one' / name)
        assert data.load(tmp_path / 'one').pixels.unique().tolist() == [255]


@pytest.mark.parametrize('name', ['a.png', 'a.tif', 'a.pgm'])
def test_16_bits_are_scaled_not_clipped(tmp_path, name):
    ramp = (np.arange(16, dtype=np.uint16) * 257 * 17).reshape(4, 4)
    if name == 'a.pgm':  # which Pillow 10 can read only
        (tmp_path / name).write_bytes(b'P5 4 4 65535\n' + ramp.astype('>u2').tobytes())
    else:
        Image.fromarray(ramp).save(tmp_path / name)
    set_ = data.load(tmp_path)
    assert set_.channels == 1 and set_.pixels.flatten().tolist() == list(range(0, 256, 17))


def test_exif_rotation_centre_square_and_channels(tmp_path):
    wide, exif = np.zeros((4, 10, 3), np.uint8), Image.Exif()
    wide[:, 3:7] = (255, 0, 0)
    assert one(tmp_path, 'a.png', Image.fromarray(wide))[0][0].eq(255).all()
    grey = data.load(tmp_path / 'one', channels=1)
    assert grey.pixels.shape == (1, 1, 4, 4) and grey.pixels.unique().tolist() == [76]
    assert data.load(tmp_path / 'one', image_size=2).pixels.shape == (1, 3, 2, 2)
    exif[0x0112] = 6  # shown turned clockwise; the right half is white
    Image.fromarray(wide[:, 1:5, 0]).save(tmp_path / 'one' / 'a.png', exif=exif)
    turned = data.load(tmp_path / 'one', channels=3)[0]
    assert turned[:, :2].eq(0).all() and turned[:, 2:].eq(255).all()


def test_broken_files_are_skipped_and_counted_and_labels_follow(tmp_path, capsys):
    for k, name in enumerate('abbab'):
        os.makedirs(tmp_path / name, exist_ok=True)
        picture(k).save(tmp_path / name / f'{k}.png')
    (tmp_path / 'b/1.png').write_bytes((tmp_path / 'b/1.png').read_bytes()[:80])
    for name in ('a/0.png', 'a/notes.txt', '.hidden.png'):
        (tmp_path / name).write_text('not an image')
    (tmp_path / 'b/loop').symlink_to(tmp_path, target_is_directory=True)
    set_, err = data.load(tmp_path), capsys.readouterr().err
    assert err.count('\n') == 1 and 'skipped 2 of 5 images' in err and '0.png' in err
    assert set_.classes == ['a', 'b'] and set_.labels.tolist() == [0, 1, 1]
    for pixels, k in zip(set_, (3, 2, 4), strict=True):
        assert (pixels.permute(1, 2, 0).numpy() == np.asarray(picture(k))).all()


def test_nothing_to_read_is_refused(tmp_path):
    for name in ('bad/0.png', 'bad/1.png', 'a.txt', 'a.zip', 'a.npy', 'empty/a.txt'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('')
    for name, message in (('empty', 'no images'), ('bad', 'none of 2 images'), ('a.zip', 'zip'),
                          ('absent', 'no such data set.*accepted: glyphs'), ('a.npy', 'a.npy'),
                          ('a.txt', 'is of another kind')):
        refused(message, tmp_path / name)
    for given in ({'split': 'valid'}, {'channels': 2}, {'image_size': 0}):
        refused(f'--{list(given)[0]} .*accepted', **given)


def test_small_files_are_refused_but_arrays_are_enlarged(folder, tmp_path):
    picture(0, 6).save(folder / '5.png')
    assert '--image_size of at most 6' in refused('5.png.* is 6x6', folder)
    refused('0.png.* is 8x8', folder, image_size=16)
    np.save(tmp_path / 'a.npy', np.zeros((2, 8, 8), np.uint8))
    assert data.load(tmp_path / 'a.npy', image_size=16).pixels.shape == (2, 1, 16, 16)


def test_zip(tmp_path, capsys, monkeypatch):
    path, image = tmp_path / 'in' / 'set.zip', encoded(picture())
    path.parent.mkdir()
    entries = [(f'{"cat" if k % 2 else "ant"}/{k}.png', encoded(picture(k))) for k in range(6)]
    ignored = '../evil.png', '/../evil.png', '__MACOSX/cat/0.png', 'cat/.0.png', 'a.txt'
    bad = dict(bomb=encoded(Image.new('L', (64, 64))), long=image + bytes(100_000), empty=b'',
               locked=image)
    raw = zipped([*entries, *((name, image) for name in ignored),
                  *((f'cat/{name}.png', content) for name, content in bad.items())])
    raw = patched(raw, b'PK\x01\x02', 8, '<H', 1)  # the last entry is encrypted
    path.write_bytes(patched(raw, b'PK\x03\x04', 6, '<H', 1))
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 64 * 64 - 1)  # over it, but not twice: a warning
    monkeypatch.setattr(data, 'ENTRY_LIMIT', 100_000)
    set_ = data.load(path, image_size=8)
    assert set_.classes == ['ant', 'cat'] and set_.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (set_[3].permute(1, 2, 0).numpy() == np.asarray(picture(1))).all()
    assert 'skipped 4 of 10' in capsys.readouterr().err
    assert os.listdir(tmp_path) == ['in'] and os.listdir(tmp_path / 'in') == ['set.zip']


@pytest.mark.parametrize('shape', [
    (5, 6, 6), (5, 6, 6, 1), (5, 6, 6, 3), (5, 1, 6, 6), (5, 3, 6, 6), (5, 6, 6, 4), (5, 4, 6, 6)])
@pytest.mark.parametrize('kind', ['uint8', 'float32', 'float64', 'signed'])
def test_array_layouts_and_types(tmp_path, shape, kind):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    pixels.flat[:2] = 0, 255
    if 4 in shape:
        np.moveaxis(pixels, 3 if shape[3] == 4 else 1, 0)[3] = 255  # opaque
    stored = {'uint8': pixels, 'float32': (pixels / 255).astype(np.float32),
              'float64': pixels / 255, 'signed': (pixels / 127.5 - 1).astype(np.float32)}[kind]
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
    path, x = tmp_path / 'a.npz', np.zeros((3, 4, 4), np.uint8)
    for arrays, *wanted in (
            (dict(x=x, y=np.arange(3)), [0, 1, 2], [0, 1, 2]), (dict(arr_0=x), None, None),
            (dict(train_images=x, train_labels=np.ones((3, 1), np.uint8), test_images=x[:2],
                  test_labels=np.zeros((2, 1), np.uint8)), [1, 1, 1], [0, 0])):
        np.savez(path, **arrays)
        for split, want in zip(('train', 'test'), wanted):
            labels = data.load(path, split=split).labels
            assert labels is want or labels.tolist() == want
    np.savez(path, other=x)
    refused('other', path)
    np.savez(path, x=x, y=np.arange(2))  # refused where they are wanted
    assert data.load(path).labels is None and '(2,) for 3 images' in data.load(path).unlabelled


def test_medmnist_is_downloaded_once_and_checked(tmp_path, monkeypatch):
    """A fake archive in the form of theirs, behind a fake server."""
    from torchvision.datasets import utils
    asked, content = [], {}

    def fetch(url, path, **how):
        asked.append(url)
        Path(path).write_bytes(content[url.split('/')[-1].removesuffix('?download=1')])
    monkeypatch.setattr(utils, '_urlretrieve', fetch)
    monkeypatch.setattr(utils, '_get_redirect_url', lambda url, max_hops: url)
    for name, size, labels in (('dermamnist', 28, np.arange(6)[:, None] % 2),
                               ('breastmnist', 64, np.ones((6, 1))),
                               ('chestmnist', 128, np.ones((6, 14)))):
        file, shape = io.BytesIO(), (size, size, 3)[:2 + (name == 'dermamnist')]
        x = {f'{split}_images': np.full((n, *shape), n, np.uint8)
             for split, n in (('train', 6), ('val', 2), ('test', 3))}
        np.savez_compressed(file, **x, train_labels=labels.astype(np.uint8),
                            val_labels=np.zeros((2, labels.shape[1]), np.uint8),
                            test_labels=np.zeros((3, labels.shape[1]), np.uint8))
        key = f'{name}.npz' if size == 28 else f'{name}_{size}.npz'
        content[key] = file.getvalue()
        for given in (size, size - 1) if size > 28 else (None, 28):  # the next larger one serves
            refused(f'{name}: File not found or corrupted.*fetch by hand {tmp_path}/{name}.npz',
                    name, tmp_path, given)
        assert not (tmp_path / key).exists()
        row, at = list(data.MEDMNIST[name]), 1 + data.MEDMNIST_SIZES.index(size)
        row[at] = utils.calculate_md5(tmp_path / f'{key}.part')
        monkeypatch.setitem(data.MEDMNIST, name, tuple(row))
        asked.clear()
        train_, test = (data.load(name, tmp_path, size),
                        data.load(name, tmp_path, size, split='test'))
        # what was fetched before, now found to be whole
        assert not asked and (tmp_path / key).exists()
        assert train_.pixels.shape == (6, 3 if len(shape) > 2 else 1, size, size) and len(test) == 3
        assert train_.pixels.eq(6).all() and test.pixels.eq(3).all()
        if name == 'dermamnist':
            assert (train_.class_count() == 2 and train_.labels.tolist() == [0, 1] * 3
                    and train_.flip)
        if name == 'chestmnist':
            with pytest.raises(launch.BadInput, match='chestmnist has .*several an image'):
                train_.class_count()
    assert all(len(row) == 5 and all(re.fullmatch('[0-9a-f]{32}', md5) for md5 in row[1:])
               for name, row in data.MEDMNIST.items()
               if name not in ('dermamnist', 'breastmnist', 'chestmnist'))


def refuse_connection(*args, **how):
    raise urllib.error.URLError('no network in a test')


def test_known_sets(tmp_path, monkeypatch):
    def known(root, download, train=True, split=None):  # MNIST, and CelebA of one image
        pixels = torch.zeros(4 if train else 2, 28, 28, dtype=torch.uint8)
        return argparse.Namespace(data=pixels, targets=torch.ones(len(pixels), dtype=torch.int64),
                                  classes=['a', 'b'], filename=['1.png'])
    monkeypatch.setattr('torchvision.datasets.MNIST', known)
    monkeypatch.setattr('torchvision.datasets.CelebA', known)
    train_, test = data.load('mnist', tmp_path), data.load('mnist', tmp_path, 32, 3, 'test')
    assert train_.pixels.shape == (4, 1, 28, 28) and test.pixels.shape == (2, 3, 32, 32)
    assert train_.labels.tolist() == [1] * 4 and not test.flip and test.classes == ['a', 'b']
    monkeypatch.setattr('torchvision.datasets.utils._get_redirect_url', refuse_connection)
    for name in ('bloodmnist', 'lsun_bedroom'):
        refused(f'{name}.*fetch by hand', name, tmp_path)
    for name in ('celeba/img_align_celeba', 'lsun_bedroom/0', 'lsun_bedroom/1'):
        os.makedirs(tmp_path / name)
        picture(0, 64).save(tmp_path / name / 'a.webp')
    set_ = data.load('lsun_bedroom', tmp_path)
    assert set_.pixels.shape == (2, 3, 256, 256) and set_.labels is None and set_.flip
    image = np.zeros((218, 178, 3), np.uint8)
    image[39:179, 19:159] = 255  # the crop that papers use
    Image.fromarray(image).save(tmp_path / 'celeba/img_align_celeba/1.png')
    set_ = data.load('celeba64', tmp_path)
    assert set_.pixels.shape == (1, 3, 64, 64) and set_.pixels.eq(255).all()
    np.savez(tmp_path / 'bloodmnist.npz', train_images=np.zeros((3, 28, 28, 3), np.uint8),
             train_labels=np.ones((3, 1), np.uint8))
    set_ = data.load('bloodmnist', tmp_path)
    assert set_.pixels.shape == (3, 3, 28, 28) and set_.labels.tolist() == [1, 1, 1]


def test_no_network_is_one_line(tmp_path):
    for name, kind, where in (
            ('mnist', 'MNIST', 'MNIST/raw'), ('fashion_mnist', 'FashionMNIST', 'FashionMNIST/raw'),
            ('cifar10', 'CIFAR10', 'cifar-10-python.tar.gz'), ('celeba64', 'CelebA', 'celeba')):
        for error in (urllib.error.URLError('no\nroute'), RuntimeError('a\nb'), OSError('gone')):
            with patch(f'torchvision.datasets.{kind}', side_effect=error):
                assert f'{tmp_path}/{where}' in refused(f'--dataset {name}', name, tmp_path)


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
    assert set_.pixels.shape == (10_000, 1, 16, 16) and set_.classes == list('0123456789')
    assert not set_.flip and set_.name == 'glyphs' and 5 < data.mean_norm(set_) < 16


@pytest.mark.parametrize('source', ['folder', 'zip', 'npy'])
@pytest.mark.parametrize('workers', [0, 2])
def test_batches_serve_the_same_in_order(folder, tmp_path, monkeypatch, source, workers):
    path = folder if source == 'folder' else tmp_path / f'a.{source}'
    if source == 'zip':
        path.write_bytes(zipped([(f'{k}.png', encoded(picture(k))) for k in range(10)]))
    if source == 'npy':
        np.save(path, [np.asarray(picture(k)) for k in range(10)])
    small = data.load(path)
    monkeypatch.setattr(data, 'MEMORY_LIMIT', 0)
    large = data.load(path)
    assert small.pixels.shape == (10, 3, 8, 8) and large.pixels is None and len(large) == 10
    indices = [torch.randint(10, (4,), generator=seeded(k)) for k in range(6)]
    state = torch.get_rng_state()
    served = (data.batches(set_, indices, workers=workers) for set_ in (small, large))
    for index, a, b in zip(indices, *served, strict=True):
        assert a.dtype == torch.uint8 and torch.equal(a, b) and torch.equal(a, small.pixels[index])
    assert (torch.get_rng_state() == state).all()
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


def test_all_pixel_values_survive(tmp_path):
    values = torch.arange(256, dtype=torch.uint8)
    x = data.to_float(values)
    assert x.dtype == torch.float32 and (x.min(), x.max()) == (-1, 1)
    assert torch.equal(data.to_uint8(x), values)
    assert data.to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
    np.save(tmp_path / 'a.npy', np.full((300, 4, 4, 3), 255, np.uint8))
    set_ = data.load(tmp_path / 'a.npy')
    close([data.mean_norm(set_), data.mean_norm(set_, n=7)], [4.0] * 2, rtol=1e-9)


# What people have: {path: its colour}, and the labels of the training images and of the others.
LAYOUTS = {
    'train/cat train/dog val/dog': ('01', '1'),
    'train/cat train/dog valid/dog test/cat': ('01', '0'),
    'Train/cat Train/dog TEST/dog': ('01', '1'),
    'training/cat training/dog testing/dog': ('01', '1'),
    'training_set/cat training_set/dog test_set/dog': ('01', '1'),
    'train2017/cat train2017/dog val2017/dog': ('01', '1'),
    'seg_train/cat seg_train/dog seg_test/dog seg_pred': ('01', '1'),
    'cat/train dog/train dog/test cat/test': ('01', '01'),
    'images/train/cat images/train/dog images/dev/dog masks/train/cat': ('01', '1'),
    'cat dog': ('01', '01'),
    'train/cat train/dog test/dog test/cow': ('01', None), 'train/cat train/dog test': ('01', None),
    'train/cat train/dog stray.png': ('01', '01'), 'train plane car': ('120', '120'),
    'cat dog a.png': (None, None),
    'cat': (None, None), '00000/img00000000.png 00001/img00001000.png': (None, None)}


@pytest.mark.parametrize('names', LAYOUTS)
def test_splits_and_what_holds_all_are_no_classes(tmp_path, capsys, names):
    files = [name if name.endswith('.png') else f'{name}/0.png' for name in names.split()]
    for k, name in enumerate(files):
        (tmp_path / 'set' / 'top' / name).parent.mkdir(parents=True, exist_ok=True)
        picture(k).save(tmp_path / 'set' / 'top' / name)
    zips = {'top.zip': 'top/{}', 'dot.zip': './{}'}
    for path, form in zips.items():
        (tmp_path / path).write_bytes(zipped([(form.format(name), encoded(picture(k)))
                                              for k, name in enumerate(files)]))
    slashes = bytes(zipped([(f'top/{name}', encoded(picture(k))) for k, name in enumerate(files)]))
    for name in files:
        slashes = slashes.replace(f'top/{name}'.encode(), f'top/{name}'.replace('/', '\\').encode())
    (tmp_path / 'back.zip').write_bytes(slashes)
    for split, labels in zip(('train', 'test'), LAYOUTS[names]):
        sets = [data.load(tmp_path / path, split=split)
                for path in ('set', 'top.zip', 'dot.zip', 'back.zip')]
        for set_ in sets:
            found = None if set_.labels is None else ''.join(map(str, set_.labels.tolist()))
            assert found == (labels and ''.join(sorted(labels)) if names != 'train plane car'
                             else '012')
            assert (set_.identity == sets[0].identity
                    and len(set_) == (len(labels) if labels else len(set_)))
        said = capsys.readouterr().out
        assert ('split' in said) == (split == 'test' or 'rain' in names and 'plane' not in names)
        assert said.count('\n') == (4 if said else 0)
    if 'seg' in names:
        assert 'without 1 images beside seg_test, seg_train' in said


@pytest.mark.parametrize('table, labels', [
    ([['00000/img00000000.png', 1], ['00001/img00001000.png', 0]], [1, 0]),
    (None, 'null'), ('no', 'cannot be read'),
    ([['00000/img00000000.png', 1]], 'no label for 1 of 2'),
    ([['a.png', 1]], 'no labels'), (7, 'cannot be read'),
    ([['00000/img00000000.png', .5], ['00001/img00001000.png', 0]], 'float64 labels'),
    ([['00000/img00000000.png', [0, 1]], ['00001/img00001000.png', [1, 0]]],
     'one-hot: give their argmax'),
    ([['00000/img00000000.png', [1, 1]], ['00001/img00001000.png', [1, 0]]], 'several an image'),
    ([['00000/img00000000.png', 'dog'], ['00001/img00001000.png', 'cat']], [1, 0])])
def test_labels_of_dataset_json(tmp_path, table, labels):
    files = [('00000/img00000000.png', encoded(picture())),
             ('00001/img00001000.png', encoded(picture(1)))]
    for path, top in (('b.zip', ''), ('a.zip', 'set/')):
        entries = [*files, ('dataset.json', json.dumps({'labels': table}).encode())]
        (tmp_path / path).write_bytes(zipped([(top + name, raw) for name, raw in entries]))
        set_ = data.load(tmp_path / path)
        assert len(set_) == 2 and (set_.labels is None) == isinstance(labels, str)
        assert (labels in set_.unlabelled if isinstance(labels, str)
                else set_.labels.tolist() == labels)
    if isinstance(labels, str):  # they refuse the set only where they are wanted
        refuses(['train.py', *TINY, '--classes', '--dataset', tmp_path / 'a.zip',
                 '--out_dir', tmp_path / 'o'],
                f'--classes: .*a.zip has .*{re.escape(labels)}')


def test_links_are_followed_and_loops_cut(tmp_path):
    for name in ('store/cat', 'store/dog', 'set/fox'):
        (tmp_path / name).mkdir(parents=True)
        picture(len(name)).save(tmp_path / name / '0.png')
    for name, target in (('cat', '../store/cat'), ('dog', tmp_path / 'store' / 'dog'),
                         ('loop', '.'), ('up', '..'), ('root', '/'),
                         ('fox/1.png', '../../store/cat/0.png'), ('gone', 'nowhere'),
                         ('fox/up', '..')):
        (tmp_path / 'set' / name).symlink_to(target)
    (tmp_path / 'store' / 'cat' / 'dog').symlink_to('../dog')  # and from there back again
    (tmp_path / 'store' / 'dog' / 'cat').symlink_to('../cat')
    set_ = data.load(tmp_path / 'set')
    assert (set_.classes == ['cat', 'dog', 'fox'] and {0, 1, 2} == set(set_.labels.tolist())
            and len(set_) < 8)


def of_floats(*edges, share=0.5):
    x = np.random.default_rng(0).random((9, 8, 8))
    x.flat[:int(share * x.size)] *= edges[0] < 0 and -1 or 1
    x.flat[-2:] = edges
    return x


@pytest.mark.parametrize('array, brightest, said', [
    (of_floats(-1e-7, 1, share=0), 255, '1 values up to 1.0e-07 beyond [0, 1] clipped'),
    (of_floats(-1, 1.0005), 255, 'beyond [-1, 1]'),
    (of_floats(0, 1).astype(np.float16), 255, ''),
    (of_floats(-0.05, 1, share=0), None, 'neither|not in'),
    (of_floats(-0.05, 1, share=0.001), None, 'not in'),
    (of_floats(0, 1.1), None, '1.1'), (of_floats(0, 1) * 255, None, '255'),
    ((of_floats(0, 1) * 15).astype(np.uint8), 15, 'nearly black, no value above 15 of 255'),
    (np.zeros((8, 8, 40), np.uint8), None, r'moveaxis\(x, -1, 0\)'),
    (np.zeros((8, 8, 3, 40), np.uint8), None, 'moveaxis'),
    (np.zeros((9, 12, 3), np.uint8), None, r'one image\? give x\[None\]'),
    (np.zeros((9, 8, 8), np.uint16), None, 'give uint8'),
    (np.full((9, 8, 12), 99, np.uint8), 99, '9 of 9 images cropped to the centre square')])
def test_floats_go_by_their_bulk_and_odd_arrays_are_refused_with_the_mend(
        tmp_path, capsys, array, brightest, said):
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
def test_one_coloured_image_of_many_makes_the_set_coloured_and_losses_are_counted(
        tmp_path, capsys, monkeypatch, limit):
    monkeypatch.setattr(data, 'MEMORY_LIMIT', limit)
    for k in range(200):  # 64 of these are looked at first
        Image.new('RGB', (8, 12) if k % 50 == 0 else (8, 8),
                  (200, 30, 30) if k == 101 else (90, 90, 90)).save(tmp_path / f'{k:03d}.png')
    assert data.load(tmp_path).channels == 3
    assert ('4 of 200' in capsys.readouterr().out) == bool(limit)
    assert data.load(tmp_path, channels=1, image_size=4).channels == 1
    said = capsys.readouterr().out
    assert ('resized to 4 x 4' in said
            and ('1 of 200 images coloured, made grey' in said) == bool(limit))


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
        assert (caught.type is ZeroDivisionError
                or '--workers 0' in str(caught.value) and 'shm-size' in str(caught.value))

    def full(self):
        raise RuntimeError('unable to allocate shared memory(shm) for file </torch_1>: '
                           'No space left on device (28)')
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
    ckpt = ['sample.py', '--ckpt', tmp_path / 'o',  # a folder
            '--nfe', 2, '--n', 3, '--device', 'cpu']
    for classes, labels in (('cat,2', '[2, 0]'), ('10', '[1]'), ('none', '[]')):
        script([*ckpt, '--classes', classes, '--out', tmp_path / 'a.png'])
        assert f'classes {labels}' in capsys.readouterr().out
    refuses([*ckpt, '--classes', '0', '--out', tmp_path / 'a.png'],
            '--classes 0: the network knows .*2, 10, cat')
    refuses([*ckpt, '--classes', 'dog', '--out', tmp_path / 'a.png'],
            '--classes dog: the network knows')
    photos = photos.rename(tmp_path / 'moved')
    script([*run_, 3, '--dataset', f'{photos}/'])
    saved = torch.load(tmp_path / 'o' / 'ckpt.pt', weights_only=True)
    assert saved['step'] == 3 and saved['args']['class_names'] == ['2', '10', 'cat']
    picture(0, 16).save(photos / 'cat' / '99.png')
    refuses([*run_, 4, '--dataset', photos],
            'holds a run on .*--init_from .*ckpt.pt .*24 images there, 25 here')
    (photos / 'cat' / '99.png').unlink()
    (photos / 'cat').rename(photos / 'cow')
    refuses([*run_, 4, '--dataset', photos], 'classes 2, 10, cat there, 2, 10, cow here')
    (photos / 'cow').rename(photos / 'cat')
    del saved['args']['data'], saved['args']['class_names']  # a file of before: the path counts
    torch.save(saved, tmp_path / 'o' / 'ckpt.pt')
    refuses([*run_, 4, '--dataset', photos], 'numbered in natural order now')
    refuses([*run_, 4, '--dataset', tmp_path / 'moved' / '2'],
            '--dataset .*2: --out_dir .*o holds a run on .*moved/; give another')


def test_a_class_of_which_nothing_can_be_read_is_named(tmp_path):
    photos = classes_of(tmp_path / 'photos', 'a', 'b', 'c')
    for path in (photos / 'c').iterdir():
        path.write_text('junk')
    assert sorted(data.load(photos).labels.tolist()) == [0] * 8 + [1] * 8
    with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()) as said:
        script(['train.py', *TINY, '--classes', '--dataset', photos, '--out_dir', tmp_path / 'o'])
    assert re.search('skipped 8 of 24.*\n--classes: 2 labels from 0 to 1, no image of c;',
                     said.getvalue())


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
    net, old = (torch.load(tmp_path / 'o' / 'ckpt.pt', weights_only=True)[k]
                for k in ('net', 'args'))
    script([*base, tmp_path / 'p', *again, classes_of(tmp_path / 'two', 'a', 'b', 'c'),
            '--classes'])
    args = torch.load(tmp_path / 'p' / 'ckpt.pt', weights_only=True)['args']
    assert (all(args[k] == old[k] for k in ('method', 'D', 'sigma_data', 'z_max', 'z_min'))
            and args['classes'] == 3)
    assert ('for 3 classes, not its 2, with a new label layer and from step 0'
            in capsys.readouterr().out)
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
    refuses([*base, tmp_path / 'x', *again, one, '--steps', 9, '--channels', 1],
            '--channels 1: --init_from .*ckpt.pt has 3')
    refuses([*base, tmp_path / 'x', *again, one, '--image_size', 8],
            '--image_size 8: --init_from .*ckpt.pt has 16')
    refuses([*base, tmp_path / 'x', *again, one, '--method', 'vp'],
            '--method vp: --init_from .* has pfgmpp')
    script(['checkpoint.py', tmp_path / 'o', '--out', tmp_path / 'ema.pt'])
    refuses([*base, tmp_path / 'x', '--init_from', tmp_path / 'ema.pt', '--dataset', one],
            '--init_from .*ema.pt: holds the EMA')


@pytest.mark.parametrize('solver', ['rk45', 'unipc', 'heun', 'ddim'])
@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_a_network_that_gives_nan_makes_nothing(tmp_path, monkeypatch, solver, value):
    monkeypatch.chdir(tmp_path)
    net = unet.UNet(16, 1, 8, (1, 1), 1, (8,), 0.0)
    torch.nn.init.constant_(net.conv_out.bias, value)
    args = dict(image_size=16, channels=1, nf=8, ch_mult=[1, 1], num_blocks=1, attn=[8],
                dropout=0.0, classes=0, M=None, method='vp' if solver == 'ddim' else 'pfgm',
                D=math.inf if solver == 'ddim' else 1.0, sigma_data=0.5,
                z_min=1e-3, z_max=9.0, upper_norm=99.0, z_exp=0.0, gamma=5.0, dataset='glyphs')
    torch.save(dict(ema=net.state_dict(), args=args, step=1), 'a.pt')
    how = ['--ckpt', 'a.pt', '--solver', solver, '--device', 'cpu', '--n', 2]
    for more in ([], ['--encode', 'glyphs'], ['--gif'], ['--interpolate']):
        refuses(['sample.py', *how, '--out', 'a.png', *more], '--ckpt.*(diverged|not finite)')
    refuses(['evaluate.py', *how, '--swd', '--bpd'], 'diverged')
    refuses(['sample.py', *how, '--tol', '1e-12'], '--tol 1e-12: finer than the float32')
    assert not [name for name in os.listdir('.')
                if name.endswith(('.png', '.gif', '.npz', 'results.jsonl'))]


def test_pictures_that_are_given(trained, tmp_path, capsys):
    for k in range(2):
        digit = data.load()[k]
        Image.fromarray(digit[0].numpy()).save(tmp_path / f'{k}.png')
    how = ['--ckpt', trained / 'ckpt.pt', '--tol', '1e-6', '--device', 'cpu', '--out']
    script(['sample.py', '--encode', tmp_path / '0.png', *how, tmp_path / 'a.png'])
    assert '1 images: mean error' in capsys.readouterr().out
    script(['sample.py', '--interpolate', tmp_path / '0.png', tmp_path / '1.png',
            *how, tmp_path / 'b.npz'])
    made = np.load(tmp_path / 'b.npz')['arr_0'][..., 0].astype(int)
    assert len(made) == 8  # z_min is not the plane of the data, but near it
    assert (abs(made[0] - data.load()[0][0].numpy()).mean() < 2
            and abs(made[-1] - data.load()[1][0].numpy()).mean() < 2)
    refuses(['sample.py', '--interpolate', tmp_path / '0.png', *how, tmp_path / 'b.png'],
            '--interpolate .*0.png: give two')
    refuses(['sample.py', '--encode', tmp_path / 'no.png', *how, tmp_path / 'b.png'],
            '^--encode .*no.png: no such')


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
        given = ['sample.py', '--exact', '--dataset', 'x.npy', f'--{kind}', 'x.npy', '--device',
                 'cpu']
        script([*given, *words, '--nfe', 40, '--z_min', 1e-3, '--n', 16, '--out', f'{kind}.png'])
        monkeypatch.setattr(baselines.Flow, 'follow', follow)
        assert Image.open(f'{kind}.png').size == (18 * 68 + 4, 8 * 68 + 4) and len(made) == 8
        for i, results in enumerate(made):
            fits = charges[[i, i + 12], ..., :results.shape[3]].flatten(1).int()
            error = (results.flatten(1)[:, None].int() - fits).abs().amax(2)      # (16, 2)
            assert (error.amin(1) <= 1).all() and len(error.argmin(1).unique()) == 2, (kind, i)
    refuses([*given, '--solver', 'rk45'], '--solver rk45')
    refuses([*given, '--mask', 'mask.png'], '--inpaint and --mask belong together')
    refuses(['sample.py', '--exact', '--colorize', 'glyphs'], 'glyphs: the images .* are grey')
    Image.fromarray(0 * mask).save('none.png')
    given[given.index('--colorize')] = '--inpaint'
    refuses([*given, '--mask', 'none.png'], '--mask none.png: nothing in it is white')


def test_references_of_others(tmp_path, capsys):
    rng = np.random.default_rng(0)
    x, eye = rng.integers(0, 256, (6, 8, 8, 3), np.uint8), np.eye(files.POOL)
    np.savez(tmp_path / 'adm.npz', arr_0=x, mu=np.zeros(files.POOL), sigma=eye,
             mu_s=np.zeros(3), sigma_s=np.eye(3))
    features = rng.standard_normal((9, files.POOL)).astype(np.float32)
    np.savez(tmp_path / 'song.npz', pool_3=features)
    found = files.read_stats(str(tmp_path / 'song.npz'), 'any')
    close(found.mu, features.mean(0), atol=1e-5)
    close(found.sigma, np.cov(features.astype(float).T), atol=1e-5)
    np.save(tmp_path / 's.npy', x)
    common = ['evaluate.py', '--samples', tmp_path / 's.npy', '--inception', 'random',
              '--device', 'cpu', '--results', tmp_path / 'r.jsonl', '--workers', 0]
    script([*common, '--ref', tmp_path / 'adm.npz', '--prc', '--swd'])
    row = json.loads(open(tmp_path / 'r.jsonl').read().splitlines()[-1])
    assert row['precision'] == row['recall'] == 1 and row['swd'] == 0
    script([*common, '--ref', tmp_path / 'song.npz', '--kid'])
    refuses([*common, '--ref', tmp_path / 'song.npz', '--swd'],
            'do for --fid --is --kid --prc only')
    Image.new('RGB', (9, 12), (9, 99, 200)).save(tmp_path / 'wide.png')
    refuses([*common[:2], tmp_path / 'wide.png', *common[3:], '--ref', tmp_path / 's.npy',
             '--swd', '--image_size', 16],
            "--samples .*wide.png: 'wide.png' is 9x12; give an --image_size of at most 9, not 16")
    script([*common[:2], tmp_path / 'wide.png', *common[3:], '--ref', tmp_path / 's.npy',
            '--swd', '--image_size', 8])
    assert ('1 of 1 images cropped to the centre square; 1 of 1 images resized to 8 x 8'
            in capsys.readouterr().out)


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


def patched(raw, signature, offset, layout, *values):
    """A zip's bytes with a field of its last header of that kind overwritten."""
    raw = bytearray(raw)
    struct.pack_into(layout, raw, raw.rindex(signature) + offset, *values)
    return bytes(raw)


def npy(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


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
    whole, grey = encoded(picture()), npy(np.zeros((3, 8, 8), np.uint8))
    one, npz = zipped([('a.png', whole)]), zipped([('x.npy', grey)])
    nan = Image.fromarray(np.full((8, 8), np.nan, np.float32))
    central, local, payload = b'PK\x01\x02', b'PK\x03\x04', np.array([[[Payload()]]], object)
    used = {
        'one.png': encoded(picture(0, 1)), 'long.png': encoded(Image.new('L', (30000, 1), 7)),
        'alpha.png': encoded(picture().convert('P'), transparency=bytes(range(256))),
        'jpeg.png': encoded(picture(), 'JPEG'), 'good.zip': one, 'good.npz': npz,
        'film.gif': encoded(picture(), 'GIF', save_all=True, append_images=[picture(2)]),
        'g4.tiff': encoded(picture().convert('1'), 'TIFF', compression='group4'),
        'up.zip': zipped([('../a.png', b''), ('/etc/a.png', whole), ('b/../../c.png', b'')]),
        # labels that nobody asked for never refuse a set
        'objects.npz': zipped([('x.npy', grey), ('y.npy', npy(np.array([{}, 1, 2])))]),
        'words.npz': zipped([('x.npy', grey), ('y.npy', npy(np.array(['a', 'b', 'c'])))])}
    refused = {
        'half.png': whole[:80], 'zero.png': png_of(0, 0), 'bomb.png': png_of(60000, 60000),
        'a\nb.png': b'two\nlines', 'wide.png': png_of(2 ** 31 - 1, 1), 'zip.png': one,
        'nan.tif': encoded(nan, 'TIFF'), 'eps.png': b'%!PS-Adobe-3.0 EPSF-3.0\n(x) (w) file\n',
        'nested.zip': zipped([('b.zip', one)]), 'none.zip': zipped([]), 'tail.zip': one[:-40],
        'secret.zip': patched(patched(one, central, 8, '<H', 1), local, 6, '<H', 1),
        'lying.zip': patched(zipped([('a.png', bytes(2 ** 24))]), central, 24, '<I', 100),
        'huge.zip': patched(one, central, 24, '<I', 2 ** 31), 'half.npy': grey[:150],
        'crc.zip': patched(one, central, 16, '<I', 1),
        'crc.npz': patched(npz, central, 16, '<I', 1),
        'bz.zip': zipped([('a.png', whole)], zipfile.ZIP_BZIP2),
        'liar.npz': zipped([('x.npy', claims((10 ** 12, 32, 32)))]),
        'pickle.npy': pickle.dumps(Payload()), 'payload.npy': npy(payload),
        **{f'claim{k}.npy': claims(*claim) for k, claim in enumerate([
            ((10 ** 12, 32, 32),), ((-1, 8, 8),), (None,), ((1,) * 40,), ((1, 2, 2), '|O'),
            ((1, 2, 2), '<c8'), ((1, 2, 2), '|V1000000000'), ((1, 2, 2), '__import__("os")')])}}
    return used, refused


class TooSlow(BaseException):
    """Past every `except Exception`."""


@contextlib.contextmanager
def limited(seconds, gib):
    """An end to what takes for ever, or memory without bound."""
    def stop(*_):
        raise TooSlow
    now = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (now + int(gib * 2 ** 30), before[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def used(path):
    """Whether the set is used, rather than refused in one line."""
    try:
        with limited(20, 3), warnings.catch_warnings(action='error'):
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
def test_hostile_data(tmp_path, capsys, monkeypatch, count):
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
def test_bombs_take_no_memory(tmp_path):
    """Zips of one entry of 640 MB of zeros, and the same zips, which say that it has 100 bytes."""
    for packing in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2):
        for name, start in (('a.png', b''), ('x.npy', claims((40 << 18, 8, 8))[:-64])):
            path = tmp_path / f'a.{"npz" if start else "zip"}'
            with zipfile.ZipFile(path, 'w', packing) as archive, archive.open(name, 'w') as file:
                file.write(start)
                for _ in range(40):
                    file.write(bytes(2 ** 24))
            raw = path.read_bytes()
            for bomb in (raw, patched(raw, b'PK\x01\x02', 24, '<I', 100)):
                path.write_bytes(bomb)
                with limited(60, 0.5), pytest.raises(data.BadInput) as refusal:
                    data.load(path)
                assert not re.search('MemoryError|allocate', str(refusal.value))


# ---------------------------------------------------------------- checkpoints of strangers

@pytest.mark.parametrize('count', [40, pytest.param(500, marks=pytest.mark.slow)])
def test_damaged_bytes_of_checkpoints(trained, tmp_path, monkeypatch, count):
    """They give the weights that they had, or end in one line; also under new checksums, and
    packed ones always."""
    monkeypatch.chdir(tmp_path)
    tiny_official('official.pth')
    rng, files = np.random.default_rng(0), [trained / 'ckpt.pt', Path('official.pth')]
    known = [checkpoint.load_checkpoint(path)[0].state_dict() for path in files]
    for k in range(count):
        raw, sealed, packed = files[k % 2].read_bytes(), k % 4 > 1, k % 8 > 5
        if sealed:
            with zipfile.ZipFile(io.BytesIO(raw)) as archive:
                entries = [[name, archive.read(name)] for name in archive.namelist()]
            part = entries[rng.integers(len(entries))]
            part[1] = part[1] if packed else mutated(part[1] or b'0', rng)
            raw = zipped(entries, zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED)
        Path('a.pt').write_bytes(raw if sealed else mutated(raw, rng))
        try:
            with limited(20, 2), warnings.catch_warnings(action='error'):
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

PRETEND = HERE.parent / 'shared' / 'tools' / 'pretend_cuda.py'
MODES = """
train.py TINY --skip --steps 2 --dropout 0.1 --out_dir o
sample.py --ckpt o/ckpt.pt --nfe 4 --n 3
sample.py --ckpt o/ckpt.pt --solver rk45 --tol 0.1 --n 3 --out digits
evaluate.py --ckpt o/ckpt.pt --bpd --swd --neighbours --n 2 --nfe 2 --tol 0.1
evaluate.py --ckpt o/ckpt.pt --judge --n 129 --nfe 1
train.py TINY --skip --steps 4 --sample_every 2 --dropout 0.1 --out_dir o
sample.py --exact --dataset large.npz --n 2
train.py TINY_PP --D 128 --dataset large.npz --steps 2 --workers 1 --accum 2 --out_dir pp
train.py TINY_PP --method rf --classes --steps 2 --out_dir rf
train.py TINY_PP --reflow rf/ckpt.pt --pairs 16 --steps 2 --out_dir reflow
sample.py --ckpt rf/ckpt.pt --solver ddim --eta 1 --nfe 3 --n 2 --schedule time --guidance 2
train.py --dataset 32.npz --batch_size 8 --no-bf16 --steps 8 --init_from a.pth --out_dir official
sample.py --ckpt a.pth --nfe 2 --n 2
sample.py --ckpt a.pth --tol 0.5 --n 2
sample.py --ckpt o/ckpt.pt --nfe 2 --n 2 --gif
sample.py --ckpt o/ckpt.pt --n 2 --tol 0.1 --encode glyphs
evaluate.py --compare o/ckpt.pt rf/ckpt.pt --straightness --swd --sweep nfe=2,3 --n 2
evaluate.py --exact --dataset large.npz --bpd --n 2 --tol 0.1
evaluate.py --solver_bench --dataset large.npz --n 2 --sweep nfe=2 --solvers unipc,rk45
train.py TINY_PP --D 3 --preset cifar10_ncsnpp --steps 2 --sample_every 2 --out_dir ncsnpp
train.py TINY_PP --consistency --steps 2 --sample_every 2 --init_from ncsnpp --out_dir few
sample.py --ckpt few --nfe 2 --n 2
train.py TINY_PP --distill o --pairs 16 --steps 2 --out_dir one
train.py TINY_PP --method rf --source large.npz --steps 2 --sample_every 2 --out_dir across
sample.py --ckpt across --from large.npz --nfe 2 --n 2
sample.py --ckpt o --inpaint large.npz --mask large.npz --nfe 2 --n 2
sample.py --ckpt edm.pkl --n 2 --classes 1
"""
DRIVER = """
import sys
sys.path.insert(0, {here!r})
import bench, data, evaluate, launch, sample, train
bench.JUDGE_STEPS = 2
for line in open('modes'):
    data.MEMORY_LIMIT = 1 if '--workers' in line else 2 << 30
    name, *words = line.split()
    module = dict(train=train, sample=sample, evaluate=evaluate)[name[:-3]]
    print(line)
    launch.run(module.main, module.parse_args(words))
print('all modes ran')
"""
pretended = pytest.mark.skipif(
    not PRETEND.exists() or not hasattr(torch._C, '_ensureCUDADeviceGuardSet'),
    reason='nothing here pretends a GPU, or this PyTorch is too old for it')


@pytest.mark.parametrize('kind, count', [
    pytest.param('cuda', 7, marks=pretended), pytest.param('mps', 7, marks=pretended),
    *(pytest.param(kind, 99, marks=[pretended, pytest.mark.slow]) for kind in ('cuda', 'mps')),
    pytest.param('real cuda', 99, marks=pytest.mark.cuda)])
def test_modes_on_a_pretended_device_and_on_a_real_one(kind, count, tmp_path):
    tiny_official(tmp_path / 'a.pth')
    edm_file(tmp_path / 'edm.pkl', pfgmpp=True, D=2048, ncsnpp=True, classes=3)
    for size in (16, 32):
        pixels = np.random.default_rng(0).integers(0, 256, (20, size, size, 3), dtype=np.uint8)
        np.savez(tmp_path / {16: 'large.npz', 32: '32.npz'}[size], x=pixels)
    words = {'TINY_PP': ' '.join(TINY_PP), 'TINY': ' '.join(TINY)}
    modes = re.sub('TINY_PP|TINY', lambda word: words[word[0]], MODES).replace('--device cpu', '')
    (tmp_path / 'modes').write_text('\n'.join(modes.strip().splitlines()[:count]))
    (tmp_path / 'driver.py').write_text(DRIVER.format(here=str(HERE)))
    pretend = [PRETEND] if kind in ('cuda', 'mps') else []
    done = subprocess.run([sys.executable, *pretend, 'driver.py'], cwd=tmp_path, text=True,
                          capture_output=True, env={**os.environ, 'PRETEND': kind})
    assert done.stdout.endswith('all modes ran\n'), done.stdout[-999:] + done.stderr
    assert f'1 x {kind.split()[-1]}' in done.stdout


def test_cuda_alone_is_its_first_device(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, 'zeros', lambda *shape, device: None)
    monkeypatch.setattr(torch, 'set_float32_matmul_precision', lambda precision: None)
    monkeypatch.setattr(torch.cuda, 'set_device', chosen.append)
    device, rank, world = launch.setup('cuda')
    assert chosen == [device] and (device.index, rank, world) == (0, 0, 1)


def test_no_tf32_in_the_field_rk45_and_likelihood():
    seen, x, z = [], torch.ones(2, 3), torch.ones(2)
    def watch():
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
    class Watched(data.Charges):  # the field's products are made as its chunks come
        def split(self, size):
            for part in super().split(size):
                watch()
                yield part
    def net(x, z):
        watch()
        return -x, -z
    torch.set_float32_matmul_precision('high')
    try:
        pfgm.sample_ode(net, x, 2.0, 1.0, 'euler', 1, z_exp=0)
        assert seen == [('high', True)]
        for each in (False, True):
            pfgm.sample_ode(net, x, 2.0, 1.0, each=each, z_exp=0)
        pfgm.log_likelihood(net, x, 1.0, 2.0, z_exp=0)
        pfgm.posterior_mean(x, z, Watched(torch.zeros(4, 3, 1, 1, dtype=torch.uint8)))
        assert set(seen[1:-2]) == {('highest', False)} == {seen[-1]}, seen
        watch()
        assert seen[-1] == ('high', True)
        with torch.autocast('cpu', torch.bfloat16):  # a caller's autocast ends there too
            within = pfgm.poisson_field(x, z, torch.eye(3))
        close(within[0], pfgm.poisson_field(x, z, torch.eye(3))[0])
    finally:
        torch.set_float32_matmul_precision('highest')


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

    def watched(net, ema, opt, clip, decay):
        norm = update(net, ema, opt, clip, decay)
        kept.update(ema=list(ema.parameters()), norm=[norm], opt=[
            v for state in opt.state.values() for v in state.values() if torch.is_tensor(v)])
        return norm

    def counted(meter, step, *more):
        observe(meter, step, *more)
        kept.update(meter=[v for v in meter.values() if torch.is_tensor(v)])
        pages = int(Path('/proc/self/statm').read_text().split()[1])
        resident.append(pages * os.sysconf('SC_PAGE_SIZE') >> 20)
    monkeypatch.setattr(train, 'update', watched)
    monkeypatch.setattr(train, 'observe', counted)
    script(['train.py', *TINY, '--steps', steps, '--log_every', 50, '--dropout', 0.1,
            '--out_dir', tmp_path])
    for name, tensors in kept.items():
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
        with pytest.raises(SystemExit) as stop:
            script([*command, 7])
        assert stop.value.code == 130 and not (tmp_path / name).is_file()
        script([*command, 7])
        assert sum(calls) == 2 + 2 + 2 + 3  # the one that was stopped drew two in vain
    assert np.array_equal(np.load(tmp_path / 'a.npz')['arr_0'], whole)
    assert np.array_equal([sample.read_png(tmp_path / 'folder', i) for i in range(7)], whole)
    assert sorted(os.listdir(tmp_path)) == ['a.npz', 'b.png', 'folder', 'whole.npz']
    script([*command, 9])
    assert calls[-1] == 2 and sum(calls) == 9 + 2
    for other in (['--seed', 1], ['--weights', 'raw'], ['--solver', 'euler']):
        refuses([*command, 9, *other], f'made with {other[0][2:]} ')
    refuses([*command, 9, '--out', tmp_path], 'does not say what made it')


def torchrun(*words, nodes=1, node=0, port=0, **how):
    where = [f'--nnodes={nodes}', f'--node_rank={node}', '--master_addr=127.0.0.1',
             f'--master_port={port}'] if nodes > 1 else ['--nproc_per_node=2']
    launch = [sys.executable, '-m', 'torch.distributed.run', *where, *map(str, words)]
    return subprocess.Popen(launch, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            **how)


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def two_machines(*folders, steps):
    port = free_port()
    running = [torchrun(HERE / 'train.py', *TINY, '--dropout', 0, '--steps', steps, '--timeout', 60,
                        '--out_dir', folder, nodes=2, node=k, port=port)
               for k, folder in enumerate(folders)]
    texts = [p.communicate(timeout=300)[0] for p in running]
    return [p.returncode for p in running], texts


def test_two_machines_with_one_folder_and_with_two(tmp_path):
    one, a, b = (tmp_path / k for k in ('one', 'a', 'b'))
    script(['train.py', *TINY, '--dropout', 0, '--steps', 4, '--out_dir', one])
    codes, texts = two_machines(a, a, steps=2)
    assert codes == [0, 0], texts
    codes, texts = two_machines(a, b, steps=4)  # only the first has the checkpoint
    assert codes == [1, 1], texts
    assert 'step 0 in process 1, 2 in process 0; give all processes' in texts[0], texts
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
        if not os.path.exists('whole'):
            open('part', 'x').close()
            time.sleep(1)
            os.rename('part', 'whole')
            print('rank', os.environ['RANK'], 'downloads', flush=True)
        else:
            print('rank', os.environ['RANK'], 'finds it', flush=True)
        self.data, self.targets, self.classes = np.zeros((4, 28, 28), np.uint8), np.arange(4), None

torchvision.datasets.MNIST = MNIST
launch.setup('cpu')
data.load('mnist', image_size=28)
"""


def test_one_process_of_a_machine_downloads_and_the_others_wait(tmp_path):
    (tmp_path / 'download.py').write_text(DOWNLOAD.format(here=str(HERE)))
    p = torchrun('download.py', cwd=tmp_path)
    text = p.communicate(timeout=300)[0]
    assert p.returncode == 0 and 'rank 0 downloads' in text and 'rank 1 finds it' in text, text


def test_without_the_modules_that_windows_lacks(tmp_path):
    (tmp_path / 'windows.py').write_text(
        f'import sys; sys.path.insert(0, {str(HERE)!r})\n'
        'sys.modules.update(resource=None, fcntl=None)\n'
        'import evaluate, sample, train\n'
        f'train.main(train.parse_args({TINY} + ["--steps", "2"]))\n')
    done = subprocess.run([sys.executable, 'windows.py'], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0 and 'saved' in done.stdout, done.stderr


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
