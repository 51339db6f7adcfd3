"""The rivals of PFGM, in closed forms."""
import math

import pytest
import torch

import pfgm
from support.cli import BadInput
from support.methods import METHODS, PublishedDenoiser, as_flow, flow_constants
from support.tests.common import F64, Linear, close, randn, seeded


def gaussian_flow(method, spread, mean):
    """The flow of D = inf of data N(mean, spread^2), from the output that is exact for it."""
    flow = METHODS[method](None)

    def F(x, c_noise, labels=None):
        if method == 'pfgmpp':
            z = (4 * c_noise).exp()
        else:
            t = c_noise / flow.scale
            z = flow.z_of(1 - t if method == 'rf' else t)
        c_skip, c_out, c_in, _ = flow.coefficients(z)
        x = x.T / c_in
        xhat = mean + spread ** 2 / (spread ** 2 + z ** 2) * (x - mean)
        return ((xhat - c_skip * x) / c_out).T, None
    flow.net = F
    return flow


@pytest.mark.parametrize('method', [name for name in METHODS if name != 'pfgm'])
def test_METHODS__flows_of_a_gaussian_are_exact(method):
    m, s, inf, tight = -0.3, 0.6, math.inf, dict(z_exp=0, rtol=1e-8, atol=1e-8)
    flow = gaussian_flow(method, s, m)
    at_low, at_high = math.hypot(s, flow.low), math.hypot(s, flow.high)
    x = pfgm.sample_prior((5, 6), flow.high, D=inf, generator=seeded(), dtype=F64)
    end, _ = pfgm.sample_ode(flow, x, flow.high, flow.low, **tight)
    close(end - m, (x - m) * at_low / at_high, atol=1e-5)
    got = pfgm.log_likelihood(flow, end, flow.low, flow.high, 'exact', D=inf, **tight)
    gap = [pfgm.prior_logp(*at, inf) for at in ((got.latent - m, at_high), (got.latent, flow.high))]
    close(got.logp + gap[0] - gap[1], pfgm.prior_logp(end - m, at_low, inf), atol=1e-5)


def test_METHODS__have_the_times_of_their_papers():
    """z(t) against the papers' own formulas, and t(z) inverting it."""
    t = torch.linspace(1e-3, 1, 20, dtype=F64)
    alpha = (-0.25 * t ** 2 * 19.9 - 0.05 * t).exp()  # arXiv 2011.13456
    for name, z in (('vp', (1 - alpha ** 2).sqrt() / alpha), ('subvp', (1 - alpha ** 2) / alpha)):
        flow = METHODS[name](None)
        got = [flow.z_of(t), flow.t_of(z), flow.alpha(z), flow.planes(z[-1], z[0], 19)]
        close(torch.stack(got), torch.stack([z, t, alpha, z.flip(0)]), rtol=1e-9)
    ddpm, levels = METHODS['ddpm'](None), torch.arange(1000, dtype=F64)
    bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=F64), 0)
    z = ((1 - bar) / bar).sqrt()
    close(ddpm.z_of(levels), z, rtol=1e-9)
    for level in (ddpm.t_of(z), ddpm.coefficients(z)[3]):
        close(level, levels, atol=1e-6)
    rf, y, eps, t = METHODS['rf'](None), randn(19), randn(19, seed=1), t[:-1]
    z = rf.z_of(1 - t)
    c_skip, c_out, c_in, c_noise = rf.coefficients(z)
    close(c_in * (y + z * eps), t * y + (1 - t) * eps, atol=1e-12)
    close((y - c_skip * (y + z * eps)) / c_out, y - eps, atol=1e-9)
    close(c_noise, 999 * t, atol=1e-9)


@pytest.mark.parametrize('method, t_train, t_sample, t_max', [
    ('vp', 1e-5, 1e-3, 1.0), ('subvp', 1e-5, 1e-3, 1.0), ('rf', 1e-4, 1e-3, 0.999)])
def test_METHODS__train_and_sample_between_their_papers_ends(method, t_train, t_sample, t_max):
    """score_sde samples from t = 1 to 1e-3 and trains from 1e-5; rf is even in t, to 1 - t here."""
    flow, n = METHODS[method](None), 100_000
    t = flow.t_of(flow.draw(n, seeded()).double())
    assert t_train - 1e-4 < t.min() < t_train + 20 / n and t_max - 20 / n < t.max() < t_max + 1e-4
    close(t.mean(), (t_train + t_max) / 2, atol=4 * 0.3 / n ** 0.5)
    close(flow.t_of(torch.tensor([flow.low, flow.high], dtype=F64)), [t_sample, t_max], atol=1e-9)


def test_as_flow__gives_each_method_what_it_was_trained_with():
    flags = dict(method='pfgmpp', D=16.0, sigma_data=0.7, z_max=5.0, gamma=2.0)
    flow = as_flow(None, flags)
    assert (flow.D, flow.sigma_data, flow.mean, flow.std, flow.only_z) == (16.0, 0.7, -1.2, 1.2,
                                                                          None)
    assert as_flow(None, dict(flags, distill='teacher.pt')).only_z == 5.0
    few = as_flow(None, dict(flags, consistency=True))
    assert (few.mean, few.std) == (-1.1, 2.0)  # arXiv 2406.14548
    assert type(as_flow(None, dict(flags, edm=True))) is PublishedDenoiser
    assert as_flow(None, dict(flags, method='pfgm')).gamma == 2.0
    net = torch.nn.Identity()
    assert as_flow(net, dict(flags, method='pfgm', official=True)) is net  # as published
    for wrong, message in ((dict(source='photos'), '--source photos: belongs to --method rf'),
                           (dict(method='pfgm', consistency=True), '--consistency: trains')):
        with pytest.raises(BadInput, match=message):
            as_flow(None, {**flags, **wrong})


def test_PublishedDenoiser__takes_sigma_from_z_alone():
    x, z = 100 * randn(3, 1, 2, 2), torch.tensor([1.0, 2, 3], dtype=F64)
    close(PublishedDenoiser(Linear(), 4).sigma(x, z), z / 2)
    assert (pfgm.Denoiser(Linear(), 4).sigma(x, z) > 2 * z).all()  # |x| shows more noise


@pytest.mark.parametrize('name, M, z_max, upper_norm, z_exp', [
    ('cifar10', 291, 40, 3000, 5), ('cifar10_deep', 291, 40, 3000, 5),
    ('celeba64', 291, 60, 6000, 1), ('lsun_bedroom', 356, 100, 30000, 0.1)])
def test_flow_constants__are_those_that_pfgm_published(name, M, z_max, upper_norm, z_exp):
    assert flow_constants(None, name) == dict(M=M, z_max=z_max, upper_norm=upper_norm, z_exp=z_exp,
                                              gamma=5.0, z_min=1e-3)
