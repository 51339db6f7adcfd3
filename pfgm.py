"""Poisson Flow Generative Models: the method, as pure functions of tensors and floats.

Data points y_k are charges on the plane z = 0 of a space with one more dimension. Their Poisson
field carries them upward to a uniform hemisphere; the same lines followed down turn noise to data.

    perturb        points off the plane, where the field is learned       PFGM Algorithm 2
    poisson_field  the regression target at those points                  PFGM Eq. 5, Algorithm 1
    sample_prior   the hemisphere, projected onto the plane z = z_max     PFGM Section 3.2
    drift          dx/dlog z along a field line                           PFGM Eq. 6 and 7
    sample_ode     follow the lines down (generate) or up (encode)        PFGM Section 3.3
    log_likelihood change of variables along the lines                    PFGM Section 3.3

Papers: PFGM arXiv 2209.11178, PFGM++ arXiv 2302.04265. Letters: x (B, ...) data in [-1, 1] with
N numbers each, z (B,) > 0 the augmented coordinate (the norm of all D of them in PFGM++, where
D = inf is diffusion and z then means its noise level sigma), K charges, D = 1 in PFGM.
A network is anything called as net(x, z) that returns (v_x like x, v_z (B,)), toward the data.
"""
import contextlib
import functools
import math
from typing import NamedTuple

import numpy as np
import torch


class SolverError(RuntimeError):
    """The solver cannot go on: the message says at which z, and nothing half-made is returned."""


class Hyperparameters(NamedTuple):
    M: int             # largest exponent of the perturbation
    z_max: float       # where sampling starts
    upper_norm: float  # the largest |x| there


def hyperparameters(data_norm, N, sigma=0.01, tau=0.03):
    """M, z_max, upper_norm for data of mean norm `data_norm` in N dimensions. PFGM Appendix B.
    z_max and upper_norm are the mean |z| and the typical |x| that perturb() reaches at m = M. All
    in units of x. Raises ValueError where no M >= 1 comes out (no spread, or sigma too large)."""
    ratio = data_norm ** 2 / (2 * math.sqrt(N) * sigma ** 2)
    if not ratio > 1:
        raise ValueError(f'data_norm {data_norm} is within the first noise level: norm^2 must '
                         f'exceed 2 sqrt(N) sigma^2 = {data_norm ** 2 / max(ratio, 1e-300):.3g}')
    M = int(0.75 * math.log(ratio) / math.log(1 + tau)) + 1
    growth = sigma * (1 + tau) ** M
    return Hyperparameters(M, math.sqrt(2 / math.pi) * growth, math.sqrt(N) * growth)


def float64(x):
    """x in float64: on its own device, or on the CPU where that has none (MPS)."""
    return (x.cpu() if x.device.type == 'mps' else x).double()


def like(values, x):
    """values in x's type, on its device; in this order, since MPS cannot hold float64."""
    return values.to(x.dtype).to(x.device)


def column(values, x):
    """values (B,) in x's type, ready to multiply x (B, ...)."""
    return like(values, x).view((-1,) + (1,) * (x.dim() - 1))


@contextlib.contextmanager
def full_float32(device):
    """Products and convolutions as exact as float32 is: no TF32, whose 10 bits are wider than the
    tolerance of RK45, and no autocast. What was set before comes back."""
    precision, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision('highest')
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = tf32


def unit(D):
    """The z of noise level sigma = 1: sqrt(D), and 1 for D = inf. PFGM++ Section 4."""
    return 1.0 if D == math.inf else math.sqrt(D)


# ---------------------------------------------------------------- where the field is learned

def perturb(x, M, sigma=0.01, tau=0.03, limit_norm=True, generator=None, m_draws=1):
    """Move each data point off the plane by a random amount. PFGM Algorithm 2, Appendix B.1.1.

    x (B, ...) -> (moved like x, z (B,) > 0): z ~ sigma (1+tau)^m and |moved - x| ~ sqrt(N) times
    that, with m ~ U[0, M]; with `limit_norm`, m ~ U[0, int(0.7 M)] where |eps_z| < sigma / 2.
    m_draws > 1: m is the mean of as many. `generator` must live on the device of x."""
    B, draw = len(x), dict(generator=generator, device=x.device)
    m = M * torch.rand(B, m_draws, **draw).mean(1)
    eps_z = sigma * torch.randn(B, **draw).abs().clamp_min(1e-7)  # float32 randn can be exactly 0
    m_low = int(0.7 * M) * torch.rand(B, m_draws, **draw).mean(1)
    if limit_norm:  # a tiny z far from the data would start a line that is all but horizontal
        m = torch.where(eps_z < sigma / 2, m_low, m)
    growth = (1 + tau) ** m
    # |eps_x| u, a Gaussian's norm times an independent uniform direction, is again that Gaussian.
    eps_x = sigma * torch.randn(x.shape, **draw, dtype=x.dtype)
    return x + column(growth, x) * eps_x, (growth * eps_z).to(x.dtype)


def kernel(shape, z, D=1, generator=None):
    """Draws (B, ...) of density p(x) ~ (|x|^2 + z^2)^(-(N+D)/2), z (B,). PFGM++ Eq. 4.
    x = z eps / sqrt(chi2_D), a Student-t with D degrees of freedom; D = inf is z eps."""
    x = torch.randn(shape, generator=generator, device=z.device, dtype=z.dtype)
    if D != math.inf:
        if z.device.type == 'mps':  # which has no draws of gamma either
            seed = int(torch.randint(2 ** 31, (), generator=generator, device=z.device))
            generator = torch.Generator().manual_seed(seed)
        half = torch.full_like(float64(z), D / 2)
        chi2 = 2 * torch._standard_gamma(half, generator=generator)
        # Below 1e-60 (a draw of probability 1e-30) the quotient would leave float32's range.
        z = float64(z) / chi2.clamp_min(1e-60).sqrt()
    return column(z, x) * x


def chunk(x):
    """How many charges go to float64 at a time for points x (B, ...): 25 MB, on a GPU 256 MB."""
    return max(1, (2 ** 25 if x.is_cuda else 3 * 2 ** 20) // x[0].numel())


def charge_weights(x, z, charges, D=1, among=None):
    """The share of each charge in the field at each point: (B, K), float64. PFGM++ Eq. 5.

    x (B, ...), z (B,), charges (K, ...):  w_k = softmax_k(-(N+D)/2 log d_k^2),
    d_k^2 = |x - y_k|^2 + z^2;  D = inf: softmax_k(-|x - y_k|^2 / (2 z^2)).
    charges: a tensor, or anything with len() and, as a tensor has it, split() into tensors.
    among (B, K) bool: the charges that count for each point (of its class), at least one."""
    # d^2 by one matrix product: |x|^2 + |y|^2 - 2 x.y cancels where x is near a charge, and a 1e-3
    # error in d changes a weight 22-fold at N = 3072, so all of it in float64.
    flat, z2 = float64(x.flatten(1)), float64(z).square()
    N, x2 = flat.shape[1], flat.square().sum(1, keepdim=True)

    def distance2(y):
        y = float64(y.flatten(1))
        y2 = torch.linalg.vector_norm(y, dim=1).square()  # without y.square(), as large as y
        return torch.addmm(x2 + y2, flat, y.T, alpha=-2)
    d2 = torch.cat([distance2(y) for y in charges.split(chunk(x))], dim=1)  # without z^2
    if D == math.inf:
        logits = -d2 / (2 * z2[:, None])
    else:  # on a charge rounding can leave d^2 < 0; any tiny number in its place wins the softmax
        logits = -(N + D) / 2 * (d2 + z2[:, None]).clamp_min(1e-300).log()
    if among is not None:
        logits = logits.masked_fill(~among.to(logits.device), -math.inf)
    return logits.softmax(dim=1)


def posterior_mean(x, z, charges, D=1, among=None):
    """xhat = sum_k w_k y_k, the mean of the data that a line through (x, z) can end at: (B, N) in
    float64. Memory: (B, K) and one chunk of charges in float64, never (B, K, N)."""
    w = charge_weights(x, z, charges, D, among)
    w = w.masked_fill(w < 1e-30, 0)  # in float32 they would be subnormal: exact, but 3 times slower
    # Products in the charges' own type: where |x - xhat| is small the weights are 0 and 1, and the
    # product exact. Sums in float64.
    parts = zip(w.split(chunk(x), dim=1), charges.split(chunk(x)))
    with full_float32(x.device):
        return sum(float64(like(part, y) @ y.flatten(1)) for part, y in parts)


def deciding_z(charges, D=1, nats=0.02, points=128):
    """The z below which a line is bound for one charge, a float: where the entropy of the weights,
    ln K far away, has fallen to `nats`, averaged over points at the distance of z from a charge."""
    generator = torch.Generator().manual_seed(0)
    y = charges[torch.randint(len(charges), (points,), generator=generator).to(charges.device)]
    noise = like(torch.randn(y.shape, generator=generator, dtype=torch.float64), y)
    low, high = 1e-4, 1e4
    while high > 1.02 * low:
        middle = math.sqrt(low * high)
        w = charge_weights(y + middle * noise, y.new_full((points,), middle), charges, D)
        entropy = -torch.xlogy(w, w).sum(1).mean()
        low, high = (middle, high) if entropy < nats else (low, middle)
    return low


def poisson_field(x, z, charges, gamma=5.0, D=1, among=None):
    """The normalised field of `charges`, pointing toward them. PFGM Eq. 5 and Algorithm 1.

    x (B, ...), z (B,), charges (K, ...), among as above -> (v_x like x, v_z (B,)):
    v = -sqrt(N) E / (|E| + gamma), E = (x - xhat, z), computed in float64, returned in x.dtype."""
    E_x = float64(x.flatten(1)) - posterior_mean(x, z, charges, D, among)
    E_z = float64(z)
    scale = -math.sqrt(E_x.shape[1]) / (torch.hypot(E_x.norm(dim=1), E_z) + gamma)
    return like((E_x * scale[:, None]).view_as(x), x), like(E_z * scale, x)


class ExactField:
    """The field of given charges (K, ...), called like a network; its samples are the charges."""

    def __init__(self, charges, gamma=5.0, D=1):
        self.charges, self.gamma, self.D = charges, gamma, D

    def __call__(self, x, z):
        return poisson_field(x, z, self.charges, self.gamma, self.D)


# ---------------------------------------------------------------- the prior on z = z_max

def sample_prior(shape, z_max, upper_norm=None, D=1, generator=None, device='cpu',
                 dtype=torch.float32):
    """Draw x on the plane z = z_max, where the flow starts. PFGM Section 3.2, Appendix B.2.1.
    shape (B, ...) -> x of that shape, from kernel(), drawn in float64 on the CPU: a seed means the
    same noise everywhere. D = 1 is the hemisphere seen from the data. `upper_norm` clips |x| to
    [1, upper_norm], as published (54 % of CIFAR-10 draws are clipped)."""
    z = torch.full(shape[:1], z_max, dtype=torch.float64)
    x = kernel(shape, z, D, generator)
    if upper_norm is not None:
        radius = x.flatten(1).norm(dim=1)
        x = x * column(radius.clamp(1.0, upper_norm) / radius, x)
    return x.to(dtype).to(device)


def prior_logp(x, z_max, D=1):
    """log density (B,), float64, in nats, of the unclipped prior at x (B, ...). PFGM Section 3.2.
    D = 1: 2 z_max / (S_N(1) (|x|^2 + z_max^2)^((N+1)/2)), S_N(1) = 2 pi^((N+1)/2) / Gamma((N+1)/2),
    the unit sphere in R^(N+1) (the published code took R^N's)."""
    N, r2 = x[0].numel(), float64(x.flatten(1)).square().sum(1)
    if D == math.inf:
        return -r2 / (2 * z_max ** 2) - N / 2 * math.log(2 * math.pi * z_max ** 2)
    constant = math.lgamma((N + D) / 2) - math.lgamma(D / 2) - N / 2 * math.log(math.pi)
    return constant + D * math.log(z_max) - (N + D) / 2 * (r2 + z_max ** 2).log()


# ---------------------------------------------------------------- the flow

def drift(net, x, z, gamma=5.0, z_exp=5.0, small_z='exact', labels=None, guidance=1.0):
    """dx/dlog z = z v_x / v_z along the field line through (x, z). PFGM Eq. 7, Appendix B.2.3.

    x (B, ...), z (B,) -> like x; it is x - xhat for any D. labels (B,): classes, -1 for none, of
    a net(x, z, labels); guidance w: f_none + w (f_label - f_none), arXiv 2207.12598, in two calls.
    Where z < z_exp the network's v_z, by then nearly 0, is replaced by the one that |v_x| implies.
    small_z='exact' solves for it; 'official' is the published approximation (3.9 % off at z = 5,
    N = 48), with its 1e-5 added to v_z. z_exp=0: never."""
    if labels is not None and guidance != 1:
        with_label, without = (drift(net, x, z, gamma, z_exp, small_z, which)
                               for which in (labels, torch.full_like(labels, -1)))
        return without + guidance * (with_label - without)
    v_x, v_z = net(x, z) if labels is None else net(x, z, labels)
    if z_exp > 0:
        N = x[0].numel()
        n = (v_x.flatten(1).norm(dim=1) / math.sqrt(N)).to(z)
        # n = |E_x| / (s + gamma), s = |E|, s^2 = |E_x|^2 + z^2
        if small_z == 'official':
            s, known = torch.hypot(gamma * n / (1 - n), z), z < z_exp
        else:  # (1 - n^2) s^2 - 2 n^2 gamma s - (n^2 gamma^2 + z^2) = 0 has a root only if n < 1
            known = (z < z_exp) & (n < 1)
            n = torch.where(known, n, 0)  # else the other branch's NaN enters the gradient
            root = torch.sqrt((gamma * n) ** 2 + (1 - n * n) * z * z)
            s = (gamma * n * n + root) / (1 - n * n)
        v_z = torch.where(known, -math.sqrt(N) * z / (s + gamma), v_z)
    if small_z == 'official':
        v_z = v_z + 1e-5
    return v_x * column(z / v_z, x)


def last_plane(z_min, nfe, D=1):
    """Where the last of `nfe` calls on a network is made, to go on by xhat: 5 sqrt(D) / nfe^2, at
    D = 1 from 5 calls on 25 / nfe^3, near the best on our own networks, and not below z_min."""
    return max(z_min, 5 * unit(D) / nfe ** 2 * (min(1, 5 / nfe) if D == 1 else 1))


SCHEDULES = ('log', 'rho7', 'radius')
CALL_LIMIT = 10_000  # of RK45, which would follow a badly learned field for days


def schedule(name, x, z_from, z_to, steps, D=1):
    """The planes of a fixed-step solver for x (B, ...) on z_from: (steps + 1, B), float64, CPU.
    'log' even in log z; 'rho7' even in z^(1/7) (EDM Eq. 5); 'radius' even in log z down to a
    z_to of each sample's own, z_to sqrt((N + D) / D) z_from / sqrt(|x|^2 + z_from^2): the weights
    of the field depend on that distance, so lines that start nearer the axis decide at larger z;
    or a function (z_from, z_to, steps) -> (steps + 1,)."""
    if callable(name):
        return name(z_from, z_to, steps)[:, None].expand(-1, len(x))
    last = torch.full((len(x),), z_to, dtype=torch.float64)
    if name == 'radius' and D != math.inf:
        distance = torch.hypot(float64(x.flatten(1)).norm(dim=1).cpu(), last.new_tensor(z_from))
        last = last * math.sqrt((x[0].numel() + D) / D) * z_from / distance
    elif name not in SCHEDULES:
        raise ValueError(f'schedule {name!r}: one of {", ".join(SCHEDULES)}')
    part = torch.linspace(0, 1, steps + 1, dtype=torch.float64)[:, None]
    if name == 'rho7':
        return (z_from ** (1 / 7) + part * (last ** (1 / 7) - z_from ** (1 / 7))) ** 7
    return z_from * (last / z_from) ** part


# A solver takes f(x, z) = dx/dlog z, a grid of planes and x on the first of them, and yields x on
# each of the others, in `calls` calls of f.

def euler(f, x, grid, calls):
    """Euler in z, one call a step: dx/dz = f / z."""
    for z, z_next in zip(grid[:-1], grid[1:]):
        x = x + column(z_next / z - 1, x) * f(x, like(z, x))
        yield x


def heun(f, x, grid, calls):
    """Heun in z, two calls a step; if `calls` is odd the last step is Euler's. EDM Algorithm 1."""
    for i, (z, z_next) in enumerate(zip(grid[:-1], grid[1:])):
        slope = f(x, like(z, x)) / column(z, x)
        x_next = x + column(z_next - z, x) * slope
        if 2 * i + 1 < calls:
            slope_next = f(x_next, like(z_next, x)) / column(z_next, x)
            x_next = x + column(z_next - z, x) * 0.5 * (slope + slope_next)
        x = x_next
        yield x


def ipndm(f, x, grid, calls):
    """Adams-Bashforth in z with the coefficients of equal steps, up to order 4. PNDM, arXiv
    2202.09778 Eq. 9, warmed up by lower orders as in DEIS, arXiv 2204.13902."""
    rows = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12),
            (55 / 24, -59 / 24, 37 / 24, -9 / 24))
    slopes = []
    for z, z_next in zip(grid[:-1], grid[1:]):
        slopes = [f(x, like(z, x)) / column(z, x), *slopes[:3]]
        step = sum(c * slope for c, slope in zip(rows[len(slopes) - 1], slopes))
        x = x + column(z_next - z, x) * step
        yield x


def dpm2m(f, x, grid, calls):
    """DPM-Solver++(2M), arXiv 2211.01095 Algorithm 2, with lambda = -log z."""
    old = h_old = None
    for z, z_next in zip(grid[:-1], grid[1:]):
        xhat, h = x - f(x, like(z, x)), (z / z_next).log()
        ahead = xhat if old is None else xhat + column(h / (2 * h_old), x) * (xhat - old)
        x = column(z_next / z, x) * x + column(1 - z_next / z, x) * ahead
        old, h_old = xhat, h
        yield x


def along_polynomial(x, z, z_next, nodes, xhats):
    """x on z_next from x on z, exactly, where xhat is a polynomial in t = log z through xhats[j] at
    t = nodes[j]: x(t1) = e^h x(t0) - int e^(t1 - t) xhat(t) dt, h = t1 - t0."""
    h, s = (z_next / z).log(), torch.stack(nodes) - z.log()          # (B,), (k, B)
    moments = [1 - h.exp()]             # m_n = -int e^(h - s) s^n ds over [0, h] = h^n + n m_(n-1)
    for n in range(1, len(nodes)):
        moments.append(h ** n + n * moments[-1])
    powers = torch.stack([s ** n for n in range(len(nodes))])        # (n, k, B)
    weights = torch.linalg.solve(powers.permute(2, 0, 1), torch.stack(moments, -1))  # (B, k)
    return column(h.exp(), x) * x + sum(column(w, x) * xhat for w, xhat in zip(weights.T, xhats))


def multistep(f, x, grid, calls, order=3, correct=False):
    """Exponential Adams-Bashforth, xhat interpolated in log z through the last `order` calls:
    DPM-Solver++(3M), arXiv 2211.01095, its integrals exact.
    `correct`, UniPC-3, arXiv 2302.04867: every step is made again, to order 4, once the call at its
    end is known, at no further call; where the grid has one step more than `calls`, its first is
    made with xhat = 0 and then corrected."""
    nodes, xhats, start, free = [], [], x, len(grid) - 1 > calls
    for i, (z, z_next) in enumerate(zip(grid[:-1], grid[1:])):
        xhats.append(torch.zeros_like(x) if free and i == 0 else x - f(x, like(z, x)))
        nodes.append(z.log())
        if free and i == 1:  # the guess has served
            del nodes[0], xhats[0]
        if correct and i > 0:
            x = along_polynomial(start, grid[i - 1], z, nodes, xhats)
        nodes, xhats, start = nodes[-order:], xhats[-order:], x
        x = along_polynomial(x, z, z_next, nodes, xhats)
        yield x


SOLVERS = dict(euler=euler, heun=heun, ipndm=ipndm, dpm2m=dpm2m, dpm3m=multistep,
               unipc=functools.partial(multistep, correct=True))


def rk45(f, x, z_from, z_to, rtol, atol, callback=None):
    """scipy's RK45 in log z with one step size for the whole batch, as published -> (x, calls)."""
    from scipy.integrate import solve_ivp

    def flat(log_z, y):
        nonlocal nfe
        nfe, flat.log_z = nfe + 1, log_z
        y = like(torch.from_numpy(y).view(x.shape), x)
        slope = float64(f(y, y.new_full((len(y),), math.exp(log_z)))).cpu().numpy().ravel()
        if np.isnan(slope).any() or nfe == 1 and np.isinf(slope).any():  # scipy would go on forever
            raise SolverError(f'RK45 stopped at z = {math.exp(log_z):.4g}: the network gives NaN')
        if nfe > CALL_LIMIT:
            raise SolverError(f'RK45 stopped at z = {math.exp(log_z):.4g}: its steps are too small')
        return slope
    nfe, span = 0, (math.log(z_from), math.log(z_to))
    solution = solve_ivp(flat, span, float64(x).cpu().numpy().ravel(), method='RK45', rtol=rtol,
                         atol=atol, t_eval=None if callback else span[1:])
    if not solution.success:
        raise SolverError(f'RK45 stopped at z = {math.exp(flat.log_z):.4g}: {solution.message}')
    states = [like(torch.from_numpy(y.copy()).view(x.shape), x) for y in solution.y.T]
    if callback:
        for log_z, state in zip(solution.t[1:], states[1:]):
            callback(x.new_full((len(x),), math.exp(log_z)), state)
    return states[-1], nfe


def rms(a):
    return torch.linalg.vector_norm(a, dim=1) / a.shape[1] ** 0.5


def first_step(slope, t, y, slope_0, span, rtol, atol):
    """scipy's guess of a first step (B,) from t (B,), y (B, n), at the cost of one call. Hairer,
    Norsett, Wanner, Solving Ordinary Differential Equations I, II.4."""
    scale, longest = atol + rtol * y.abs(), abs(span)
    d0, d1 = rms(y / scale), rms(slope_0 / scale)
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1).clamp_max(longest)
    ahead = math.copysign(1, span) * h0
    d2 = rms((slope(t + ahead, y + ahead[:, None] * slope_0) - slope_0) / scale) / h0
    d = torch.maximum(d1, d2)
    h1 = torch.where(d <= 1e-15, (h0 * 1e-3).clamp_min(1e-6), (0.01 / d) ** 0.2)
    return torch.minimum(100 * h0, h1).clamp_max(longest)


def rk45_each(f, x, z_from, z_to, rtol, atol, callback=None):
    """The same, each sample with step sizes of its own, so that it does not depend on the others of
    its batch -> (x, calls of the slowest sample). f(x, z, rows) with the rows of x that are asked.

    scipy's coefficients and step control, all samples at once; those that arrive leave."""
    from scipy.integrate import RK45
    y, end, calls = float64(x.flatten(1)), math.log(z_to), 0
    span = end - math.log(z_from)
    way, rows = math.copysign(1, span), torch.arange(len(y), device=y.device)
    t = torch.full_like(y[:, 0], math.log(z_from))
    A, B, C, E = (torch.from_numpy(v).to(y.device) for v in (RK45.A, RK45.B, RK45.C, RK45.E))
    all_y, all_t = y.clone(), t.clone()

    def slope(t, y):
        nonlocal calls
        calls += 1
        return float64(f(like(y.view(-1, *x.shape[1:]), x), like(t.exp(), x), rows).flatten(1))

    def combined(weights, K):
        return torch.mv(K.flatten(1).T, weights).view_as(K[0])
    slope_0, again = slope(t, y), torch.zeros_like(t, dtype=torch.bool)
    h = first_step(slope, t, y, slope_0, span, rtol, atol)
    K = y.new_empty(7, *y.shape)  # the slopes of a step: at its start, four between, two at its end
    K[0] = slope_0
    while len(rows):
        least = 10 * (torch.nextafter(t, t + way) - t).abs()
        stuck = h.isnan() | again & (h < least) | (calls > CALL_LIMIT)
        if stuck.any():
            raise SolverError(f'RK45 stopped at z = {float(t[stuck][0].exp()):.4g}: ' + (
                'the network gives NaN' if h.isnan().any() else 'its steps became too small'))
        ahead = t + way * torch.maximum(h, least)
        t_next = torch.where(way * (ahead - end) > 0, end, ahead)
        h = t_next - t
        for s in range(1, 6):
            K[s] = slope(t + C[s] * h, torch.addcmul(y, h[:, None], combined(A[s, :s], K[:s])))
        y_next = torch.addcmul(y, h[:, None], combined(B, K[:6]))
        K[6] = slope(t + h, y_next)
        scale = torch.maximum(y.abs(), y_next.abs()).mul_(rtol).add_(atol)
        error = rms(combined(E, K).mul_(h[:, None]).div_(scale))
        good, factor = error < 1, 0.9 * error ** -0.2
        growth = torch.where(again, factor.clamp_max(1), factor.clamp_max(10))
        h, again = h.abs() * torch.where(good, growth, factor.clamp_min(0.2)), ~good
        t, y = torch.where(good, t_next, t), torch.where(good[:, None], y_next, y)
        K[0] = torch.where(good[:, None], K[6], K[0])
        all_t[rows], left = t, t != end
        if callback or not left.all():
            all_y[rows] = y
        if callback:
            callback(like(all_t.exp(), x), like(all_y.view(x.shape).clone(), x))
        if not left.all():
            rows, t, y, h, again, slope_0 = (v[left] for v in (rows, t, y, h, again, K[0]))
            K = y.new_empty(7, *y.shape)
            K[0] = slope_0
    return like(all_y.view(x.shape), x), calls


def rk45_official(f, x, z_from, z_to, rtol, atol, callback=None):
    """rk45 of the published state, which has z, of slope z, as one more channel of x: its small
    error loosens the norm by which the steps are chosen."""
    def f_and_z(y, z):
        slope_z = column(z, y).expand_as(y[:, -1:])
        return torch.cat([f(y[:, :-1], z), slope_z], dim=1)
    y = torch.cat([x, torch.full_like(x[:, :1], z_from)], dim=1)
    report = callback and (lambda z, y: callback(z, y[:, :-1]))
    y, nfe = rk45(f_and_z, y, z_from, z_to, rtol, atol, report)
    return y[:, :-1], nfe


def sample_ode(net, x, z_from, z_to, solver='rk45', nfe=100, *, D=1, gamma=5.0, z_exp=5.0,
               small_z='exact', labels=None, guidance=1.0, rtol=1e-4, atol=1e-4, each=False,
               schedule_name='log', to_data=False, callback=None):
    """Follow the field lines of `net` from the plane z_from to z_to: generate with z_to < z_from,
    encode with z_to > z_from. PFGM Section 3.3, Appendix B.2.

    x (B, ...) on z_from -> (x on z_to, network calls spent per image). Solver 'rk45' meets rtol,
    atol with a float64 state, step sizes shared by the batch or, with `each`, per sample; those in
    SOLVERS, or a function like them, make exactly `nfe` calls on schedule(schedule_name). With
    `to_data` the last call is made on z_to and leads straight to z = 0, x = xhat.
    callback(z (B,), x) after each step. The network works in x.dtype, on x.device, under RK45 in
    full_float32(); D matters to the schedule only; labels (B,) and guidance as in drift().
    Raises ValueError for an unknown solver or nfe < 1, SolverError where RK45 cannot go on."""
    def f(x, z, rows=None):  # rows: which of the batch are asked for
        which = labels if labels is None or rows is None else labels[rows.to(labels.device)]
        return drift(net, x, z, gamma, z_exp, small_z, which, guidance)
    if solver != 'rk45' and (solver not in SOLVERS and not callable(solver) or nfe < 1):
        raise ValueError(f'solver {solver!r}, nfe {nfe}: rk45 or one of {", ".join(SOLVERS)}, '
                         'and nfe of 1 or more')
    if solver == 'rk45':
        solve = rk45_each if each else rk45_official if small_z == 'official' else rk45
        with full_float32(x.device):
            x, nfe = solve(f, x, z_from, z_to, rtol, atol, callback)
        nfe, last = nfe + to_data, z_to
    else:
        calls = nfe - to_data
        # From far away a first step needs no call: |xhat| <= 1 is lost in x, and unipc corrects it.
        free = solver == 'unipc' and calls > 0 and to_data and z_from > 10
        steps = (calls + 1) // 2 if solver == 'heun' else calls + free
        grid = schedule(schedule_name, x, z_from, z_to, steps, D)
        for z, x in zip(grid[1:], SOLVERS.get(solver, solver)(f, x, grid, calls)):
            if callback:
                callback(z, x)
        last = grid[-1]
    if to_data:
        x = x - f(x, like(torch.as_tensor(last), x).expand(len(x)))
        if callback:
            callback(x.new_zeros(len(x)), x)
    return x, nfe


# ---------------------------------------------------------------- likelihood

class Likelihood(NamedTuple):
    logp: torch.Tensor    # (B,) nats
    bpd: torch.Tensor     # (B,) bits/dim of 8-bit data scaled to [-1, 1]
    latent: torch.Tensor  # like x, on z = z_max
    nfe: int


def log_likelihood(net, x, z_min, z_max, divergence='hutchinson', *, D=1, gamma=5.0, z_exp=5.0,
                   small_z='exact', labels=None, rtol=1e-5, atol=1e-5, generator=None):
    """log p(x) = log p_prior(x(z_max)) + integral of div f dlog z, f = dx/dlog z. PFGM Section 3.3.

    x (B, ...) on z = z_min -> Likelihood. divergence 'hutchinson' (one Rademacher probe, kept for
    the whole path) or 'exact' (N backward passes a call). bits/dim = -log2 p / N + 7: one grey
    level is 2/256 wide. Uniform dequantisation, (pixel + U[0, 1)) / 256 * 2 - 1, is the caller's.
    Raises ValueError for an unknown divergence, SolverError where RK45 cannot go on."""
    if divergence not in ('hutchinson', 'exact'):
        raise ValueError(f"divergence {divergence!r}: 'hutchinson' or 'exact'")
    N = x[0].numel()
    probe = like(torch.randint(0, 2, (len(x), N), generator=generator), x) * 2 - 1

    def f(state, z):  # state (B, N + 1): x and the integral so far; z (B,)
        with torch.enable_grad():
            at = state[:, :N].reshape(x.shape).detach().requires_grad_()
            slope = drift(net, at, z, gamma, z_exp, small_z, labels).flatten(1)
            if divergence == 'hutchinson':  # div f = E[probe . d(probe . f)/dx]
                grad, = torch.autograd.grad(slope, at, probe)
                div = (grad.flatten(1) * probe).sum(1)
            else:
                div = sum(torch.autograd.grad(slope[:, i].sum(), at, retain_graph=i < N - 1)[0]
                          .flatten(1)[:, i] for i in range(N))
        return torch.cat([slope.detach(), div[:, None]], dim=1)

    start = torch.cat([x.flatten(1), x.new_zeros(len(x), 1)], dim=1)
    with full_float32(x.device):
        end, nfe = rk45(f, start, z_min, z_max, rtol, atol)
    latent = end[:, :N].view(x.shape)
    logp = prior_logp(latent, z_max, D) + float64(end[:, N])
    return Likelihood(logp, -logp / math.log(2) / N + 7, latent, nfe)
