"""Solvers beyond the papers' own, and where their planes lie. Read it if you want to know how 20
network calls do what 100 of Euler do, or to add a solver of your own (the end of the file).

Each is the kind of function that pfgm.sample_ode() takes: solver(f, x, z_from, z_to) with the slope
f(x, z) = dx/dlog z = x - xhat, which yields (z (B,), x (B, ...)) on each plane that it reaches.
"""
import functools
import math

import scipy.integrate
import torch

import pfgm
from pfgm import CALL_LIMIT, SolverError, column, float64, like, log_planes


# ---------------------------------------------------------------- where the planes lie

def last_plane(z_min, nfe, D=1, N=None):
    """The plane z on which the last of `nfe` calls of a trained network is made, before x = xhat.

    5 sqrt(D) / nfe^2; for D = 1, from 5 calls on, 25 / nfe^3. N, for images of N numbers and a
    solver whose first step is free: then also no higher than sqrt(D) sqrt(N) / (40 (nfe - 1)),
    which tells for few calls of small images. Images lie farther apart the larger N is, and a
    network that sees several of them at once from the last plane gives a blur of them. All this
    was near the best on our own networks. It is never below z_min."""
    last = 5 * pfgm.unit(D) / nfe ** 2
    if D == 1:
        last *= min(1, 5 / nfe)
    if N is not None and nfe > 1:
        last = min(last, pfgm.unit(D) * math.sqrt(N) / (40 * (nfe - 1)))
    return max(z_min, last)


def unipc_order(nfe):
    """The order of unipc for `nfe` calls of a trained network: 2 up to 10 calls, 3 beyond.

    Where planes are far apart, a parabola through three xhats of a network overshoots the next one.
    In an exact field, whose xhat has no errors, order 3 is the better one at 5 calls too."""
    return 2 if nfe <= 10 else 3


def deciding_z(charges, D=1, nats=0.02, points=128):
    """The z below which a line is bound for one charge, so that it is all but straight: a float.

    There the entropy of the charges' weights, which is ln K far away, has fallen to `nats`. It is
    averaged over `points` points, each at the distance of z from a charge."""
    generator = torch.Generator().manual_seed(0)
    y = charges[torch.randint(len(charges), (points,), generator=generator).to(charges.device)]
    noise = like(torch.randn(y.shape, generator=generator, dtype=torch.float64), y)
    low, high = 1e-4, 1e4
    while high > 1.02 * low:
        middle = math.sqrt(low * high)
        w = pfgm.charge_weights(y + middle * noise, y.new_full((points,), middle), charges, D)
        entropy = -torch.xlogy(w, w).sum(1).mean()
        if entropy < nats:
            low = middle
        else:
            high = middle
    return low


# ---------------------------------------------------------------- multistep solvers

def along_polynomial(x, z, z_next, nodes, xhats):
    """x on the plane z_next, from x on the plane z, if xhat were a polynomial in t = log z.

    The polynomial goes through xhats[j] at t = nodes[j] (B,). The step is exact for it, because
    dx/dt = x - xhat(t) gives x(t1) = e^h x(t0) - int e^(t1 - t) xhat(t) dt with h = t1 - t0."""
    h = (z_next / z).log()                                           # (B,)
    s = torch.stack(nodes) - z.log()                                 # (k, B), the nodes from t0 on
    # The moments m_n = -int e^(h - s) s^n ds over [0, h] obey m_n = h^n + n m_(n-1).
    moments = [1 - h.exp()]
    for n in range(1, len(nodes)):
        moments.append(h ** n + n * moments[-1])
    powers = torch.stack([s ** n for n in range(len(nodes))])        # (n, k, B)
    weights = torch.linalg.solve(powers.permute(2, 0, 1), torch.stack(moments, -1))  # (B, k)
    return column(h.exp(), x) * x + sum(column(w, x) * xhat for w, xhat in zip(weights.T, xhats))


def multistep(f, x, z_from, z_to, nfe=20, planes=log_planes, order=3, correct=False,
              free_first_step=False):
    """Exponential Adams-Bashforth, one call a step: xhat is interpolated in log z through the last
    `order` calls. This is DPM-Solver++(3M), arXiv 2211.01095, with its integrals exact.

    correct: once the call at the end of a step is known, the step is made again, to order 4, at no
    further call. This is UniPC-3, arXiv 2302.04867.
    free_first_step: one step more, before the others, is made with xhat = 0 in place of a call, and
    then corrected. From far away nothing is lost: |xhat| <= 1 is tiny beside x."""
    free = free_first_step and nfe > 0
    grid = planes(x, z_from, z_to, nfe + free)
    nodes = []
    xhats = []
    start = x
    for i, (z, z_next) in enumerate(zip(grid[:-1], grid[1:])):
        if free and i == 0:
            xhat = torch.zeros_like(x)
        else:
            xhat = x - f(x, like(z, x))
        nodes.append(z.log())
        xhats.append(xhat)
        if free and i == 1:  # the guess of 0 has served
            del nodes[0], xhats[0]
        if correct and i > 0:
            x = along_polynomial(start, grid[i - 1], z, nodes, xhats)
        nodes = nodes[-order:]
        xhats = xhats[-order:]
        start = x
        x = along_polynomial(x, z, z_next, nodes, xhats)
        yield z_next, x


dpm3m = multistep
unipc = functools.partial(multistep, correct=True)


# ---------------------------------------------------------------- RK45, each image on its own

def rms(a):
    """The root mean square of each row of a (B, n): (B,)."""
    return torch.linalg.vector_norm(a, dim=1) / a.shape[1] ** 0.5


def first_step(slope, t, y, slope_0, span, rtol, atol):
    """scipy's guess of the length (B,) of a first step from t (B,), y (B, n), at one call's cost.

    span is the whole way in t. Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I,
    II.4, whose letters these are."""
    scale = atol + rtol * y.abs()
    longest = abs(span)
    d0 = rms(y / scale)
    d1 = rms(slope_0 / scale)
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1).clamp_max(longest)
    ahead = math.copysign(1, span) * h0
    d2 = rms((slope(t + ahead, y + ahead[:, None] * slope_0) - slope_0) / scale) / h0
    d = torch.maximum(d1, d2)
    h1 = torch.where(d <= 1e-15, (h0 * 1e-3).clamp_min(1e-6), (0.01 / d) ** 0.2)
    return torch.minimum(100 * h0, h1).clamp_max(longest)


@torch.no_grad()
def rk45_each(f, x, z_from, z_to, rtol=1e-4, atol=1e-4):
    """pfgm.rk45 for each image alone: an image does not depend on the others of its batch.

    All images step at once, by scipy's coefficients and step size control, each with step sizes of
    its own; those that arrive leave. f(x, z, rows) is asked for `rows` of x only. Yields after each
    step, with z (B,) telling how far each image has come. Raises SolverError as pfgm.rk45 does."""
    y = float64(x.flatten(1))  # on the CPU where the device has no float64
    A, B, C, E = (torch.from_numpy(table).to(y.device) for table in (
        scipy.integrate.RK45.A, scipy.integrate.RK45.B, scipy.integrate.RK45.C,
        scipy.integrate.RK45.E))
    end = math.log(z_to)
    span = end - math.log(z_from)
    direction = math.copysign(1, span)
    rows = torch.arange(len(y), device=y.device)  # of the images that are still on their way
    t = torch.full_like(y[:, 0], math.log(z_from))
    all_y = y.clone()
    all_t = t.clone()
    calls = 0

    def slope(t, y):
        nonlocal calls
        calls += 1
        with pfgm.full_float32(x.device):
            found = f(like(y.view(-1, *x.shape[1:]), x), like(t.exp(), x), rows)
        return float64(found.flatten(1))

    def combined(weights, K):
        return torch.mv(K.flatten(1).T, weights).view_as(K[0])

    slope_0 = slope(t, y)
    rejected = torch.zeros_like(t, dtype=torch.bool)  # whether the last try was too coarse
    h = first_step(slope, t, y, slope_0, span, rtol, atol)
    K = y.new_empty(7, *y.shape)  # the slopes of a step: at its start, four between, two at its end
    K[0] = slope_0
    while len(rows):
        least = 10 * (torch.nextafter(t, t + direction) - t).abs()
        stuck = h.isnan() | rejected & (h < least) | (calls > CALL_LIMIT)
        if stuck.any():
            why = 'the network gives NaN' if h.isnan().any() else 'its steps became too small'
            raise SolverError(f'RK45 stopped at z = {float(t[stuck][0].exp()):.4g}: {why}')
        ahead = t + direction * torch.maximum(h, least)
        t_next = torch.where(direction * (ahead - end) > 0, end, ahead)
        h = t_next - t
        for s in range(1, 6):
            K[s] = slope(t + C[s] * h, torch.addcmul(y, h[:, None], combined(A[s, :s], K[:s])))
        y_next = torch.addcmul(y, h[:, None], combined(B, K[:6]))
        K[6] = slope(t + h, y_next)

        scale = torch.maximum(y.abs(), y_next.abs()).mul_(rtol).add_(atol)
        error = rms(combined(E, K).mul_(h[:, None]).div_(scale))
        good = error < 1
        factor = 0.9 * error ** -0.2
        growth = torch.where(rejected, factor.clamp_max(1), factor.clamp_max(10))
        h = h.abs() * torch.where(good, growth, factor.clamp_min(0.2))
        rejected = ~good
        t = torch.where(good, t_next, t)
        y = torch.where(good[:, None], y_next, y)
        K[0] = torch.where(good[:, None], K[6], K[0])

        all_t[rows] = t
        all_y[rows] = y
        yield like(all_t.exp(), x), like(all_y.view(x.shape).clone(), x)
        left = t != end
        if not left.all():
            rows, t, y, h, rejected, slope_0 = (v[left] for v in (rows, t, y, h, rejected, K[0]))
            K = y.new_empty(7, *y.shape)
            K[0] = slope_0


# ---------------------------------------------------------------- solvers that add fresh noise

def ancestral(eta, noise):
    """A solver that replaces part of the noise in x by fresh noise, for D = inf.

    eta = 0 is DDIM (Euler), eta = 1 is ancestral sampling of DDPM, arXiv 2010.02502 Eq. 12. With
    eta None all noise is new: xhat and, on the next plane, fresh noise, arXiv 2303.01469 Algorithm
    1, for any D whose noise this is. noise(i): the normal draws, like x, of step i."""
    def solver(f, x, z_from, z_to, nfe=100, planes=log_planes):
        grid = planes(x, z_from, z_to, nfe)
        for i, (z, z_next) in enumerate(zip(grid[:-1], grid[1:])):
            z_eps = f(x, like(z, x))  # x - xhat
            if eta is None:
                fresh = z_next
            else:
                fresh = eta * z_next * (1 - (z_next / z) ** 2).sqrt()
            kept = (z_next ** 2 - fresh ** 2).clamp_min(0).sqrt() / z  # rounding can be below 0
            x = x + column(kept - 1, x) * z_eps
            x = x + column(fresh, x) * like(noise(i), x)
            yield z_next, x
    return solver


# ---------------------------------------------------------------- their names

# Solvers that invert: a word of --solver, of sweeps and of the solver bench. All but rk45 make
# exactly nfe calls. (ddim and renew, which add noise, are made by Flow for its images.)
SOLVERS = dict(rk45=rk45_each, euler=pfgm.euler, heun=pfgm.heun, dpm3m=dpm3m, unipc=unipc)
