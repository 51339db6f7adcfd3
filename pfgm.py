"""Poisson Flow Generative Models: the whole method, in one file that stands alone.

Data points y_k are electric charges on the plane z = 0 of a space with one more dimension. Their
field lines carry them upward to a uniform hemisphere; the same lines, followed downward, turn noise
into data. A network learns the direction of the field, and an ODE solver follows it.

    perturb, kernel    points off the plane, where the field is learned      PFGM Algorithm 2
    poisson_field      the field of the charges at those points              PFGM Eq. 5
    sample_prior       the hemisphere, projected onto the plane z = z_max    PFGM Section 3.2
    drift              dx/dlog z along a field line                          PFGM Eq. 6 and 7
    sample_ode         follow the lines down (generate) or up (encode)       PFGM Section 3.3
    log_likelihood     the change of variables along the lines               PFGM Section 3.3
    PFGM, Denoiser     a network that stands for the field, and its loss     PFGM++ Section 3

PFGM is arXiv 2209.11178, PFGM++ is arXiv 2302.04265, and EDM is arXiv 2206.00364. The letters mean
the same everywhere:

    x (B, ...)   data, or points of space, in units where images lie in [-1, 1]
    N            how many numbers one x has: C * H * W for images
    z (B,) > 0   the augmented coordinate, in the same units as x
    D            how many augmented dimensions there are. D = 1 is PFGM. For larger D, z is the norm
                 of all D of them. D = inf is diffusion, and z is then its noise level sigma.
    K            how many charges there are

A network is anything that is called net(x, z), or net(x, z, labels), and returns the field
(v_x like x, v_z (B,)), pointing toward the data.
"""
import contextlib
import functools
import inspect
import math
from typing import NamedTuple

import numpy as np
import scipy.integrate
import scipy.special
import torch


class SolverError(RuntimeError):
    """The solver cannot go on. The message says at which z; nothing half-made is returned."""


# ---------------------------------------------------------------- precision and shapes

def float64(x):
    """x in float64: on its own device, or on the CPU where that device has none (MPS)."""
    return (x.cpu() if x.device.type == 'mps' else x).double()


def sent(x, device):
    """x on the device. From the CPU to a GPU it goes by way of pinned memory, since a copy from
    other memory would wait until the GPU has done all that it was given before."""
    if x.device.type == 'cpu' and torch.device(device).type == 'cuda':
        pinned = torch.empty_like(x, memory_format=torch.contiguous_format, pin_memory=True)
        return pinned.copy_(x).to(device, non_blocking=True)
    return x.to(device)


def like(values, x):
    """values in the type of x and on its device. In this order, since MPS cannot hold float64."""
    return sent(values.to(x.dtype), x.device)


def column(values, x):
    """values (B,) as (B, 1, ..., 1) in the type of x, ready to multiply x (B, ...)."""
    return like(values, x).view((-1,) + (1,) * (x.dim() - 1))


@contextlib.contextmanager
def full_float32(device):
    """Inside, products and convolutions are as exact as float32 is.

    TF32 has 10 bits of mantissa and bfloat16 has 7, both coarser than the tolerance of RK45. What
    was set before comes back at the end."""
    precision = torch.get_float32_matmul_precision()
    cudnn_tf32 = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision('highest')
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = cudnn_tf32


def unit(D):
    """The z at which the noise level sigma is 1: sqrt(D), and 1 for D = inf. PFGM++ Section 4."""
    return 1.0 if D == math.inf else math.sqrt(D)


# ---------------------------------------------------------------- where the field is learned

class Hyperparameters(NamedTuple):
    M: int             # the largest exponent of the perturbation
    z_max: float       # the plane where sampling starts
    upper_norm: float  # the largest |x| on that plane


def hyperparameters(data_norm, N, sigma=0.01, tau=0.03):
    """M, z_max and upper_norm for data of mean norm `data_norm` in N dimensions. PFGM Appendix B.

    z_max is the mean z, and upper_norm the typical |x|, that perturb() reaches at m = M, in units
    of x. Raises ValueError where no M of 1 or more comes out: the data have no spread, or sigma is
    too large for them."""
    ratio = data_norm ** 2 / (2 * math.sqrt(N) * sigma ** 2)
    if not ratio > 1:
        least = data_norm ** 2 / max(ratio, 1e-300)
        raise ValueError(f'data_norm {data_norm} is within the first noise level: norm^2 must '
                         f'exceed 2 sqrt(N) sigma^2 = {least:.3g}')
    M = int(0.75 * math.log(ratio) / math.log(1 + tau)) + 1
    growth = sigma * (1 + tau) ** M
    return Hyperparameters(M, math.sqrt(2 / math.pi) * growth, math.sqrt(N) * growth)


def perturb(x, M, sigma=0.01, tau=0.03, limit_norm=True, generator=None, m_draws=1):
    """Move each data point off the plane z = 0 by a random amount. PFGM Algorithm 2, App. B.1.1.

    x (B, ...) -> (moved like x, z (B,) > 0). With m ~ U[0, M], z is about sigma (1 + tau)^m and
    |moved - x| about sqrt(N) times that, both in units of x.
    limit_norm: where |eps_z| < sigma / 2, m is drawn from U[0, int(0.7 M)] instead.
    m_draws: m is the mean of so many uniform draws; 1 is the paper's.
    generator: must live on the device of x."""
    B = len(x)
    draw = dict(generator=generator, device=x.device)
    m = M * torch.rand(B, m_draws, **draw).mean(1)
    eps_z = sigma * torch.randn(B, **draw).abs().clamp_min(1e-7)  # float32 randn can be exactly 0
    m_low = int(0.7 * M) * torch.rand(B, m_draws, **draw).mean(1)
    if limit_norm:  # a tiny z far from the data would start a line that is all but horizontal
        m = torch.where(eps_z < sigma / 2, m_low, m)
    growth = (1 + tau) ** m
    # The paper draws |eps_x|, the norm of a Gaussian, and a uniform direction u. The two are
    # independent, so |eps_x| u is again that Gaussian.
    eps_x = sigma * torch.randn(x.shape, **draw, dtype=x.dtype)
    return x + column(growth, x) * eps_x, (growth * eps_z).to(x.dtype)


def kernel(shape, z, D=1, generator=None):
    """Draw x of `shape` (B, ...) with the density p(x) ~ (|x|^2 + z^2)^(-(N+D)/2). PFGM++ Eq. 4.

    z (B,). A draw is x = z eps / sqrt(chi2_D), a Student-t with D degrees of freedom; for D = inf
    it is z eps. generator: one for all, or on the CPU a list of one for each x, which then depends
    on its own alone."""
    x = torch.empty(shape, device=z.device, dtype=z.dtype)
    generators = [generator]
    if isinstance(generator, list):
        generators = generator
    for part, own in zip(x.chunk(len(generators)), generators):
        part.normal_(generator=own)
    if D != math.inf:
        if z.device.type == 'mps':  # which has no draws of the gamma law: make them on the CPU
            seed = int(torch.randint(2 ** 31, (), generator=generator, device=z.device))
            generators = [torch.Generator().manual_seed(seed)]
        half = torch.full_like(float64(z), D / 2)
        parts = zip(half.chunk(len(generators)), generators)
        chi2 = 2 * torch.cat([torch._standard_gamma(part, generator=own) for part, own in parts])
        # Below 1e-60 (a draw of probability 1e-30) the quotient would leave float32's range.
        z = float64(z) / chi2.clamp_min(1e-60).sqrt()
    return column(z, x) * x


# ---------------------------------------------------------------- the field of charges

def chunk(x):
    """How many charges are taken to float64 at a time for points x (B, ...): 25 MB of them, or
    256 MB on a GPU."""
    return max(1, (2 ** 25 if x.is_cuda else 3 * 2 ** 20) // x[0].numel())


def charge_weights(x, z, charges, D=1, among=None):
    """The share w_k of each charge in the field at each point: (B, K), float64. PFGM++ Eq. 5.

    x (B, ...), z (B,), charges (K, ...). With d_k^2 = |x - y_k|^2 + z^2,
    w = softmax_k(-(N+D)/2 log d_k^2); for D = inf, w = softmax_k(-|x - y_k|^2 / (2 z^2)).
    charges: a tensor, or anything with len() and, like a tensor, split() into tensors.
    among (B, K) bool: which charges count for each point (those of its class), at least one.
    Raises ValueError where there are no charges."""
    if len(charges) == 0:
        raise ValueError('charges: there are none, so there is no field; give one or more')
    # d^2 comes from one matrix product. |x|^2 + |y|^2 - 2 x.y cancels where x is near a charge, and
    # an error of 1e-3 in d changes a weight 22-fold at N = 3072, so all of it is in float64.
    flat = float64(x.flatten(1))
    x2 = flat.square().sum(1, keepdim=True)
    z2 = float64(z).square()
    N = flat.shape[1]

    def squared_distance(y):  # from each point to each charge of a chunk, without z^2
        y = float64(y.flatten(1))
        y2 = torch.linalg.vector_norm(y, dim=1).square()  # y.square() would be as large as y
        return torch.addmm(x2 + y2, flat, y.T, alpha=-2)

    d2 = torch.cat([squared_distance(y) for y in charges.split(chunk(x))], dim=1)
    if D == math.inf:
        logits = -d2 / (2 * z2[:, None])
    else:  # on a charge rounding can leave d^2 < 0; any tiny number in its place wins the softmax
        logits = -(N + D) / 2 * (d2 + z2[:, None]).clamp_min(1e-300).log()
    if among is not None:
        logits = logits.masked_fill(~among.to(logits.device), -math.inf)
    return logits.softmax(dim=1)


def posterior_mean(x, z, charges, D=1, among=None):
    """xhat = sum_k w_k y_k, the mean of the data that a line through (x, z) can end at.

    -> (B, N) in float64. Memory: (B, K) and one chunk of charges in float64, never (B, K, N)."""
    w = charge_weights(x, z, charges, D, among)
    w = w.masked_fill(w < 1e-30, 0)  # in float32 they would be subnormal: exact, but 3 times slower
    # The products are made in the charges' own type: where |x - xhat| is small the weights are 0
    # and 1, and the product is exact. The sums are in float64.
    parts = zip(w.split(chunk(x), dim=1), charges.split(chunk(x)))
    with full_float32(x.device):
        return sum(float64(like(part, y) @ y.flatten(1)) for part, y in parts)


def poisson_field(x, z, charges, gamma=5.0, D=1, among=None):
    """The normalised field of `charges`, pointing toward them. PFGM Eq. 5 and Algorithm 1.

    x (B, ...), z (B,), charges (K, ...) and among as in charge_weights() -> (v_x like x, v_z (B,)).
    v = -sqrt(N) E / (|E| + gamma) with E = (x - xhat, z), computed in float64 and returned in the
    type of x. Raises ValueError where there are no charges."""
    E_x = float64(x.flatten(1)) - posterior_mean(x, z, charges, D, among)
    E_z = float64(z)
    scale = -math.sqrt(E_x.shape[1]) / (torch.hypot(E_x.norm(dim=1), E_z) + gamma)
    return like((E_x * scale[:, None]).view_as(x), x), like(E_z * scale, x)


class ExactField:
    """The field of given charges (K, ...), called like a network. Its samples are the charges."""

    def __init__(self, charges, gamma=5.0, D=1):
        self.charges = charges
        self.gamma = gamma
        self.D = D

    def __call__(self, x, z):
        return poisson_field(x, z, self.charges, self.gamma, self.D)


# ---------------------------------------------------------------- the prior on z = z_max

def sample_prior(shape, z_max, upper_norm=None, D=1, generator=None, device='cpu',
                 dtype=torch.float32):
    """Draw x on the plane z = z_max, where the flow starts. PFGM Section 3.2, Appendix B.2.1.

    shape (B, ...) -> x of that shape, from kernel(). It is drawn in float64 on the CPU, so that a
    seed means the same noise on every device. For D = 1 it is the uniform hemisphere, seen from the
    data. upper_norm clips |x| to [1, upper_norm], as published; on CIFAR-10 it clips 54 % of the
    draws. generator: as of kernel()."""
    z = torch.full(shape[:1], z_max, dtype=torch.float64)
    x = kernel(shape, z, D, generator)
    if upper_norm is not None:
        alone = 1 if isinstance(generator, list) else len(x)  # how an image is summed depends on it
        radius = torch.cat([part.flatten(1).norm(dim=1) for part in x.split(alone)])
        x = x * column(radius.clamp(1.0, upper_norm) / radius, x)
    return x.to(dtype).to(device)


def prior_logp(x, z_max, D=1):
    """The log density of the unclipped prior at x (B, ...): (B,), float64, nats. PFGM Section 3.2.

    For D = 1 it is p(x) = 2 z_max / (S_N(1) (|x|^2 + z_max^2)^((N+1)/2)), where
    S_N(1) = 2 pi^((N+1)/2) / Gamma((N+1)/2) is the area of the unit sphere in R^(N+1). (The
    published code took that of R^N.)"""
    N = x[0].numel()
    r2 = float64(x.flatten(1)).square().sum(1)
    if D == math.inf:
        return -r2 / (2 * z_max ** 2) - N / 2 * math.log(2 * math.pi * z_max ** 2)
    constant = math.lgamma((N + D) / 2) - math.lgamma(D / 2) - N / 2 * math.log(math.pi)
    return constant + D * math.log(z_max) - (N + D) / 2 * (r2 + z_max ** 2).log()


# ---------------------------------------------------------------- the direction of the flow

def drift(net, x, z, gamma=5.0, z_exp=5.0, small_z='exact', labels=None, guidance=1.0):
    """dx/dlog z = z v_x / v_z along the field line through (x, z). PFGM Eq. 7, Appendix B.2.3.

    x (B, ...), z (B,) -> like x. For any D it equals x - xhat.
    labels (B,): classes for net(x, z, labels), -1 for none. guidance w mixes two calls into
    f_none + w (f_label - f_none), arXiv 2207.12598.
    z_exp: where z < z_exp the network's v_z, by then nearly 0, is replaced by the v_z that |v_x|
    implies; 0 means never. small_z='exact' solves for it. small_z='official' is the published
    approximation, with the published 1e-5 added to v_z; at z = 5 it is off by up to 10 % even for a
    perfect field, depending on |x|."""
    if labels is not None and guidance != 1:
        follow = functools.partial(drift, net, x, z, gamma, z_exp, small_z)
        with_label = follow(labels)
        without = follow(torch.full_like(labels, -1))
        return without + guidance * (with_label - without)
    v_x, v_z = net(x, z) if labels is None else net(x, z, labels)
    if z_exp > 0:
        N = x[0].numel()
        n = (v_x.flatten(1).norm(dim=1) / math.sqrt(N)).to(z)
        # n = |E_x| / (s + gamma), where s = |E| and s^2 = |E_x|^2 + z^2. Find s.
        if small_z == 'official':
            s = torch.hypot(gamma * n / (1 - n), z)
            replaced = z < z_exp
        else:  # (1 - n^2) s^2 - 2 n^2 gamma s - (n^2 gamma^2 + z^2) = 0 has a root only if n < 1
            replaced = (z < z_exp) & (n < 1)
            n = torch.where(replaced, n, 0)  # else the other branch's NaN enters the gradient
            root = torch.sqrt((gamma * n) ** 2 + (1 - n * n) * z * z)
            s = (gamma * n * n + root) / (1 - n * n)
        v_z = torch.where(replaced, -math.sqrt(N) * z / (s + gamma), v_z)
    if small_z == 'official':
        v_z = v_z + 1e-5
    return v_x * column(z / v_z, x)


# ---------------------------------------------------------------- planes and solvers

SCHEDULES = ('log', 'rho7', 'radius')
CALL_LIMIT = 10_000  # of RK45, which would follow a badly learned field for days


def schedule(name, x, z_from, z_to, steps, D=1):
    """The planes of a fixed-step solver for x (B, ...) on z_from: (steps + 1, B), float64, CPU.

    'log'     even in log z, as PFGM published it
    'rho7'    even in z^(1/7), EDM Eq. 5, as PFGM++ published it
    'radius'  even in log z, down to a last plane of each sample's own,
              z_to sqrt((N + D) / D) z_from / sqrt(|x|^2 + z_from^2). The weights of the field
              depend on that distance: lines that start nearer the axis decide at larger z.
    or a function (z_from, z_to, steps) -> (steps + 1,). Raises ValueError for other names."""
    if callable(name):
        return name(z_from, z_to, steps)[:, None].expand(-1, len(x))
    if name not in SCHEDULES:
        raise ValueError(f'schedule {name!r}: one of {", ".join(SCHEDULES)}')
    last = torch.full((len(x),), z_to, dtype=torch.float64)
    if name == 'radius' and D != math.inf:
        N = x[0].numel()
        distance = torch.hypot(float64(x.flatten(1)).norm(dim=1).cpu(), last.new_tensor(z_from))
        last = last * math.sqrt((N + D) / D) * z_from / distance
    part = torch.linspace(0, 1, steps + 1, dtype=torch.float64)[:, None]
    if name == 'rho7':
        return (z_from ** (1 / 7) + part * (last ** (1 / 7) - z_from ** (1 / 7))) ** 7
    return z_from * (last / z_from) ** part


log_planes = functools.partial(schedule, 'log')

# A solver is one kind of function: solver(f, x, z_from, z_to) takes the slope f(x, z) = dx/dlog z
# and x (B, ...) on the plane z_from, and yields (z (B,), x) on each plane that it reaches, down or
# up, to z_to. What else it takes has defaults, which functools.partial sets: nfe, how many calls of
# f it makes, and planes, where: a function (x, z_from, z_to, steps) -> (steps + 1, B).


def euler(f, x, z_from, z_to, nfe=100, planes=log_planes):
    """Euler in z, one call a step: dx/dz = f / z."""
    grid = planes(x, z_from, z_to, nfe)
    for z, z_next in zip(grid[:-1], grid[1:]):
        x = x + column(z_next / z - 1, x) * f(x, like(z, x))
        yield z_next, x


def heun(f, x, z_from, z_to, nfe=100, planes=log_planes):
    """Heun in z, two calls a step; if nfe is odd the last step is Euler's. EDM Algorithm 1."""
    grid = planes(x, z_from, z_to, (nfe + 1) // 2)
    for i, (z, z_next) in enumerate(zip(grid[:-1], grid[1:])):
        slope = f(x, like(z, x)) / column(z, x)
        x_next = x + column(z_next - z, x) * slope
        if 2 * i + 1 < nfe:
            slope_next = f(x_next, like(z_next, x)) / column(z_next, x)
            x_next = x + column(z_next - z, x) * 0.5 * (slope + slope_next)
        x = x_next
        yield z_next, x


@torch.no_grad()  # its state is a numpy array, which no gradient passes
def rk45(f, x, z_from, z_to, rtol=1e-4, atol=1e-4):
    """scipy's RK45 in log z, one step size for the whole batch, as PFGM published it.

    The state is float64; f sees it in the type of x, in full_float32(). Yields after each step.
    Raises SolverError at NaN, where its steps become too small, and after CALL_LIMIT calls."""
    calls = 0

    def at(log_z, flat):
        state = like(torch.from_numpy(flat.copy()).view(x.shape), x)
        return state.new_full((len(state),), math.exp(log_z)), state

    def slope(log_z, flat):
        nonlocal calls
        calls += 1
        z, state = at(log_z, flat)
        with full_float32(x.device):
            found = float64(f(state, z)).cpu().numpy().ravel()
        where = f'RK45 stopped at z = {math.exp(log_z):.4g}'
        if np.isnan(found).any() or calls == 1 and np.isinf(found).any():
            raise SolverError(f'{where}: the network gives NaN')  # scipy would go on forever
        if calls > CALL_LIMIT:
            raise SolverError(f'{where}: its steps are too small')
        return found

    state = float64(x).cpu().numpy().ravel()
    steps = scipy.integrate.RK45(slope, math.log(z_from), state, math.log(z_to), rtol=rtol,
                                 atol=atol)
    while steps.status == 'running':
        message = steps.step()
        if steps.status == 'failed':
            raise SolverError(f'RK45 stopped at z = {math.exp(steps.t):.4g}: {message}')
        yield at(steps.t, steps.y)


def rk45_published(f, x, z_from, z_to, rtol=1e-4, atol=1e-4):
    """rk45 of the state that PFGM published, in which z, of slope z, is one more channel of x.

    The small error of that channel loosens the norm by which the step sizes are chosen."""
    def f_and_z(state, z):
        slope_z = column(z, state).expand_as(state[:, -1:])
        return torch.cat([f(state[:, :-1], z), slope_z], dim=1)

    state = torch.cat([x, torch.full_like(x[:, :1], z_from)], dim=1)
    for z, state in rk45(f_and_z, state, z_from, z_to, rtol, atol):
        yield z, state[:, :-1]


def with_options(solver, **options):
    """The solver with these keywords set; ValueError where it does not take one of them."""
    for name, value in options.items():
        if name not in inspect.signature(solver).parameters:
            raise ValueError(f'{name} {value}: this solver, a function, does not take it; leave it '
                             'out, or set its own steps by functools.partial')
    return functools.partial(solver, **options)


def sample_ode(net, x, z_from, z_to, solver='rk45', nfe=None, *, D=1, gamma=5.0, z_exp=5.0,
               small_z='exact', labels=None, guidance=1.0, rtol=1e-4, atol=1e-4,
               schedule_name=None, to_data=False, callback=None):
    """Follow the field lines of `net` from the plane z_from to z_to: generate with z_to < z_from,
    encode with z_to > z_from. PFGM Section 3.3, Appendix B.2.

    x (B, ...) on z_from -> (x on z_to, how many network calls each image took, counted).
    solver: 'rk45' meets rtol and atol with a float64 state; 'euler' and 'heun' make exactly nfe
    calls (100 if None) on the planes schedule(schedule_name) ('log' if None; D matters to these
    alone). Or a function solver(f, x, z_from, z_to), as described above euler(); nfe and planes are
    passed on to it if you give them. It may also ask f(x, z, rows) for some rows of the batch only.
    to_data: the last of the nfe calls is made on z_to and leads straight to z = 0, at x = xhat.
    callback(z (B,), x) after each step. labels (B,), guidance, gamma, z_exp, small_z as in drift().
    The network works in the type of x and on its device. Gradients pass all solvers but rk45; call
    it under torch.no_grad() where you want none.
    Raises ValueError for an unknown solver, nfe < 1, or a plane z <= 0, and SolverError where RK45
    cannot go on."""
    if not (z_from > 0 and z_to > 0):
        raise ValueError(f'z_from {z_from}, z_to {z_to}: lines are followed in log z, so both must '
                         'be above 0; to_data=True goes on from z_to to z = 0')
    if nfe is not None and nfe < 1:
        raise ValueError(f'nfe {nfe}: must be 1 or more')
    calls = 0

    def counted_net(*inputs):
        nonlocal calls
        calls += 1
        return net(*inputs)

    def f(x, z, rows=None):
        own = labels if labels is None or rows is None else labels[rows.to(labels.device)]
        return drift(counted_net, x, z, gamma, z_exp, small_z, own, guidance)

    if solver == 'rk45':
        kind = rk45_published if small_z == 'official' else rk45
        solve = functools.partial(kind, rtol=rtol, atol=atol)
    elif solver in ('euler', 'heun'):
        solve = functools.partial(euler if solver == 'euler' else heun,
                                  nfe=(nfe or 100) - to_data,
                                  planes=functools.partial(schedule, schedule_name or 'log', D=D))
    elif callable(solver):
        options = {}
        if nfe is not None:
            options['nfe'] = nfe - to_data
        if schedule_name is not None:
            options['planes'] = functools.partial(schedule, schedule_name, D=D)
        solve = with_options(solver, **options)
    else:
        raise ValueError(f'solver {solver!r}: rk45, euler, heun, or a function')

    z = torch.full((len(x),), z_from, dtype=torch.float64)
    for z, x in solve(f, x, z_from, z_to):
        if callback:
            callback(z, x)
    if to_data:
        x = x - f(x, like(z, x))
        if callback:
            callback(torch.zeros_like(z), x)
    return x, calls


# ---------------------------------------------------------------- likelihood

class Likelihood(NamedTuple):
    logp: torch.Tensor    # (B,) nats
    bpd: torch.Tensor     # (B,) bits/dim of 8-bit data scaled to [-1, 1]
    latent: torch.Tensor  # like x, on the plane z = z_max
    nfe: int              # network calls, each with its divergence


def log_likelihood(net, x, z_min, z_max, divergence='hutchinson', *, D=1, gamma=5.0, z_exp=5.0,
                   small_z='exact', labels=None, rtol=1e-5, atol=1e-5, generator=None,
                   callback=None):
    """log p(x) = log p_prior(x(z_max)) + integral of div f dlog z, f = dx/dlog z. PFGM Section 3.3.

    x (B, ...) on the plane z = z_min -> Likelihood.
    divergence: 'hutchinson' takes one Rademacher probe for the whole path, 'exact' takes N backward
    passes a call. bits/dim are -log2 p / N + 7, since one grey level is 2/256 wide. Uniform
    dequantisation, x = (pixel + U[0, 1)) / 256 * 2 - 1, is left to the caller. callback(z (B,), x)
    after each step.
    Raises ValueError for an unknown divergence or a plane z <= 0, SolverError where RK45 cannot go
    on."""
    if divergence not in ('hutchinson', 'exact'):
        raise ValueError(f"divergence {divergence!r}: 'hutchinson' or 'exact'")
    if not (z_min > 0 and z_max > 0):
        raise ValueError(f'z_min {z_min}, z_max {z_max}: lines are followed in log z, so both must '
                         'be above 0')
    N = x[0].numel()
    probe = like(torch.randint(0, 2, (len(x), N), generator=generator), x) * 2 - 1
    calls = 0

    def f(state, z):  # state (B, N + 1): x and the integral so far
        nonlocal calls
        calls += 1
        with torch.enable_grad():
            at = state[:, :N].reshape(x.shape).detach().requires_grad_()
            slope = drift(net, at, z, gamma, z_exp, small_z, labels).flatten(1)
            if divergence == 'hutchinson':  # div f = E[probe . d(probe . f)/dx]
                grad, = torch.autograd.grad(slope, at, probe)
                div = (grad.flatten(1) * probe).sum(1)
            else:  # div f = sum_i df_i/dx_i
                div = 0
                for i in range(N):
                    row, = torch.autograd.grad(slope[:, i].sum(), at, retain_graph=i < N - 1)
                    div = div + row.flatten(1)[:, i]
        return torch.cat([slope.detach(), div[:, None]], dim=1)

    state = torch.cat([x.flatten(1), x.new_zeros(len(x), 1)], dim=1)
    for z, state in rk45(f, state, z_min, z_max, rtol, atol):
        if callback:
            callback(z, state[:, :N].view(x.shape))
    latent = state[:, :N].view(x.shape)
    logp = prior_logp(latent, z_max, D) + float64(state[:, N])
    return Likelihood(logp, -logp / math.log(2) / N + 7, latent, calls)


# ---------------------------------------------------------------- how a network is a field
#
# Both classes are called net(x, z[, labels]) -> (v_x, v_z), and say how the network is trained: a
# step takes moved, z = net.perturb(y) of images y, and regresses net(moved, z) on net.target() by
# field_loss(), each error weighed by net.weight(). A subclass may replace any of the three.

class PFGM(torch.nn.Module):
    """A network that predicts the normalised Poisson field itself, as PFGM published it (D = 1).

    net(x, z[, labels]) -> (v_x like x, v_z (B,)). gamma, M, sigma, tau, m_draws: of
    poisson_field() and perturb(). Two things are ours. In eval mode |v_x| and v_z are kept within
    what data in [-1, 1] allow, |E_x| within sqrt(N) of |x|: far out v_z is all but 0, and lines
    would lead anywhere. And with `skip` the network adds, where the noise is large, to the field of
    one charge at 0, and the less the farther away."""
    unit = 1.0  # the z at which the noise level is 1

    def __init__(self, net, gamma=5.0, M=291, sigma=0.01, tau=0.03, m_draws=1, skip=False):
        super().__init__()
        self.net = net
        self.gamma = gamma
        self.skip = skip
        self.perturbation = dict(M=M, sigma=sigma, tau=tau, m_draws=m_draws)

    def forward(self, x, z, *labels):
        v_x, v_z = self.net(x, z, *labels)
        root_N = math.sqrt(x[0].numel())
        r = x.flatten(1).norm(dim=1)

        def scale(E_x):  # |v| / |E| where |E_x| has this value: poisson_field() without its sign
            return root_N / (torch.hypot(E_x, z) + self.gamma)

        if self.skip:
            # s is the noise that |x| shows if the data's spread is 1/2; c weighs the network.
            s2 = ((r * r + z * z) / (root_N ** 2 + 1) - 1 / 4).clamp_min(0)
            c = (1 + s2).rsqrt()
            at_0 = -s2 / (1 + s2) * scale(r)  # times (x, z): the field of a charge at 0
            v_x = column(c, x) * v_x + column(at_0, x) * x
            v_z = c * v_z + at_0 * z
        if self.net.training:
            return v_x, v_z
        E_x = torch.stack([(r - root_N).clamp_min(0), r + root_N])  # the least and the most |E_x|
        bounds = scale(E_x)
        norm = v_x.flatten(1).norm(dim=1).clamp_min(1e-30)
        v_x = v_x * column(norm.clamp(*(bounds * E_x)) / norm, v_x)
        return v_x, v_z.clamp(*(-bounds * z))

    def perturb(self, x, generator=None):
        """x (B, ...) -> (moved like x, z (B,)), where the field is learned."""
        return perturb(x, **self.perturbation, generator=generator)

    def target(self, moved, z, clean, charges=None, among=None):
        """The field of the charges at (moved, z). PFGM Algorithm 1. If none are given, they are
        `clean`, the images that were moved."""
        charges = clean if charges is None else charges
        return poisson_field(moved, z, charges, self.gamma, among=among)

    def weight(self, moved, z):
        """(B,): all squared errors weigh the same."""
        return torch.ones_like(z)


class Denoiser(torch.nn.Module):
    """A network F as the mean of the data, xhat = c_skip x + c_out F(c_in x, c_noise), called like
    a field: net(x, z[, labels]) -> (xhat - x, -z). EDM Table 1 and PFGM++ Section 3.

    The noise level is sigma = z / sqrt(D), and z for D = inf. At small D the noise has heavy tails,
    |x| can have any size, and no c_in of sigma alone bounds the input. So where |x| shows that the
    noise is larger than z says, sigma is what |x| shows: sqrt((|x|^2 - |y|^2 + z^2) / (N + D)) for
    data of the mean norm |y| = `data_norm`. That must not be taken for noise which is the data's
    own, where an image is brighter than the others. So sigma is at most the level that one draw in
    a million has on this z, which for large D is hardly above z / sqrt(D).

    data_norm: None means sqrt(N), the most that data in [-1, 1] have. mean, std: of ln sigma in
    training. only_z: every training step is made at this z, if given."""
    low, high = 0.002, 80.0  # the noise levels where sampling ends and starts

    def __init__(self, net, D=math.inf, sigma_data=0.5, mean=-1.2, std=1.2, only_z=None,
                 data_norm=None):
        super().__init__()
        self.net = net
        self.D = D
        self.sigma_data = sigma_data
        self.mean = mean
        self.std = std
        self.only_z = only_z
        self.unit = unit(D)
        self.data_norm = data_norm
        # x - y = z eps / sqrt(chi2_D), as in kernel(): a small chi2 is a large noise level.
        self.least_chi2 = None
        if D != math.inf:
            self.least_chi2 = 2 * float(scipy.special.gammaincinv(D / 2, 1e-6))

    def sigma(self, x, z):
        """The noise level (B,) at (x, z)."""
        if self.D == math.inf:
            return z
        N = x[0].numel()
        y2 = N if self.data_norm is None else self.data_norm ** 2
        r2 = x.flatten(1).square().sum(1) + z * z
        shown = ((r2 - y2) / (N + self.D)).clamp_min(0).sqrt()
        return shown.clamp(z / self.unit, z / math.sqrt(self.least_chi2))

    def coefficients(self, sigma):
        """c_skip, c_out, c_in, c_noise, each (B,). EDM Table 1."""
        total = (sigma ** 2 + self.sigma_data ** 2).sqrt()
        c_skip = (self.sigma_data / total) ** 2
        c_out = sigma * self.sigma_data / total
        return c_skip, c_out, 1 / total, sigma.log() / 4

    def forward(self, x, z, *labels):
        c_skip, c_out, c_in, c_noise = self.coefficients(self.sigma(x, z))
        F, _ = self.net(column(c_in, x) * x, c_noise, *labels)
        return column(c_skip - 1, x) * x + column(c_out, x) * F, -z

    def draw(self, B, generator=None, device='cpu'):
        """z (B,) of a training step: ln sigma is normal. EDM Table 1."""
        noise = torch.randn(B, generator=generator, device=device)
        return self.unit * torch.exp(self.mean + self.std * noise)

    def perturb(self, x, generator=None, eps=None):
        """x (B, ...) -> (moved like x, z (B,)). The noise comes from kernel(), or is z eps where
        eps (B, ...) is given, as in pairs of noise and images. PFGM++ Eq. 4."""
        z = self.draw(len(x), generator, x.device)
        if self.only_z is not None:
            z = torch.full_like(z, self.only_z)
        if eps is None:
            return x + kernel(x.shape, z, self.D, generator), z
        return x + column(z, x) * eps, z

    def target(self, moved, z, clean, charges=None, among=None):
        """(xhat - moved, -z), where xhat is the image itself or, if charges are given, the mean of
        all of them, which has the same expectation and less variance. arXiv 2302.00670."""
        if charges is not None:
            mean = posterior_mean(moved, z, charges, self.D, among)
            clean = like(mean.view_as(moved), moved)
        return clean - moved, -z

    def weight(self, moved, z):
        """(B,): the squared error of xhat times this is the squared error of F. EDM Eq. 8."""
        _, c_out, _, _ = self.coefficients(self.sigma(moved, z))
        return 1 / c_out ** 2


def field_loss(field, target, weight, reduce='sum'):
    """The squared error (B,) of a field (v_x, v_z) against a target (v_x, v_z). PFGM Algorithm 1.

    weight (B,) multiplies the error of v_x. reduce='sum': half the sum over the N + 1 components,
    as PFGM published it for CIFAR-10 and CelebA; 'mean': their mean, as it did for LSUN."""
    v_x, v_z = field
    target_x, target_z = target
    error = (v_x - target_x).square().flatten(1).sum(1) * weight + (v_z - target_z).square()
    if reduce == 'sum':
        return error / 2
    N = v_x[0].numel()
    return error / (N + 1)
