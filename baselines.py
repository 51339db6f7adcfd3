"""The flows that PFGM is compared with, on the same network, trainer, solvers and likelihood.

A Gaussian path x_t = alpha (y + z eps), y the data, is a flow of D = inf in x_t / alpha:
dx/dlog z = x - xhat, whatever alpha(t) and whatever the network predicts. So each rival is a
pfgm.Denoiser with its own z(t), its own coefficients and its own draws of z:

    vp      variance preserving: alpha^2 = 1 / (1 + z^2)             arXiv 2011.13456, Appendix C
    subvp   sub-VP: alpha z = 1 - alpha^2                            arXiv 2011.13456, Eq. 29
    ddpm    1000 levels, alpha^2 = prod (1 - beta); DDIM is Euler    arXiv 2006.11239, 2010.02502
    rf      rectified flow: alpha = t = 1 / (1 + z), F = y - eps     arXiv 2209.03003
"""
import math
import os
import time

import numpy as np
import torch

import pfgm
from launch import BadInput, fingerprint, step_seed, wait, write

SHARD = 1000  # pairs a file
PAIR_NFE = 40  # calls of the teacher for each, by unipc


class VP(pfgm.Denoiser):
    """beta(t) = 0.1 + 19.9 t, t in [0, 1]; F predicts eps and sees 999 t."""
    b, d = 0.1, 19.9
    t_train, t_sample, t_max = 1e-5, 1e-3, 1.0  # smallest t of each, and the largest
    scale = 999.0

    def __init__(self, net, D=math.inf, sigma_data=0.5):
        super().__init__(net)
        self.low, self.high = (float(self.z_of(torch.tensor(t, dtype=torch.float64)))
                               for t in (self.t_sample, self.t_max))

    def integral(self, t):  # of beta from 0 to t: -2 ln alpha
        return self.d / 2 * t ** 2 + self.b * t

    def time(self, integral):
        return (-self.b + (self.b ** 2 + 2 * self.d * integral).sqrt()) / self.d

    def z_of(self, t):
        return self.integral(t).expm1().sqrt()

    def t_of(self, z):
        return self.time(torch.log1p(z ** 2))

    def alpha(self, z):
        return (1 + z ** 2).rsqrt()

    def coefficients(self, z):
        return torch.ones_like(z), -z, self.alpha(z), self.scale * self.t_of(z)

    def draw(self, B, generator=None, device='cpu'):
        t = torch.rand(B, generator=generator, device=device)
        return self.z_of(self.t_train + (self.t_max - self.t_train) * t)

    def planes(self, z_from, z_to, steps):
        """A schedule even in t, float64: what the papers themselves step on."""
        ends = self.t_of(torch.tensor([z_from, z_to], dtype=torch.float64))
        part = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        return self.z_of(torch.lerp(ends[0], ends[1], part))


class SubVP(VP):
    """alpha as in VP, but the noise is 1 - alpha^2: z = 1 / alpha - alpha = 2 sinh(-ln alpha)."""

    def z_of(self, t):
        return 2 * torch.sinh(self.integral(t) / 2)

    def t_of(self, z):
        return self.time(2 * torch.asinh(z / 2))

    def alpha(self, z):
        return torch.exp(-torch.asinh(z / 2))


class DDPM(VP):
    """VP in 1000 levels, beta from 1e-4 to 0.02; F sees the level, t = 0 ... 999. Between two
    levels -2 ln alpha is interpolated."""
    t_train, t_sample, t_max, scale = 0.0, 0.0, 999.0, 1.0
    table = -torch.log1p(-torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumsum(0)

    def integral(self, t):
        table, i = pfgm.like(self.table, t), t.long().clamp(0, 998)
        return torch.lerp(table[i], table[i + 1], t - i)

    def time(self, integral):
        table = pfgm.like(self.table, integral)
        i = (torch.searchsorted(table, integral, right=True) - 1).clamp(0, 998)
        return i + (integral - table[i]) / (table[i + 1] - table[i])

    def draw(self, B, generator=None, device='cpu'):
        return self.z_of(torch.randint(1000, (B,), generator=generator, device=device).float())


class RectifiedFlow(VP):
    """x_t = t y + (1 - t) eps; F predicts the velocity y - eps and sees 999 t, t from 0 to 1."""
    t_train, t_sample, t_max = 1e-4, 1e-3, 0.999  # here of 1 - t

    def z_of(self, t):
        return t / (1 - t)

    def t_of(self, z):
        return z / (1 + z)

    def alpha(self, z):
        return 1 / (1 + z)

    def coefficients(self, z):
        t = self.alpha(z)
        return t, 1 - t, t, self.scale * t


METHODS = dict(pfgm=None, pfgmpp=pfgm.Denoiser, vp=VP, subvp=SubVP, ddpm=DDPM, rf=RectifiedFlow)


def as_flow(net, args):
    """The network as net(x, z[, labels]) -> (v_x, v_z) of the method that args say."""
    method = METHODS[args['method']]
    return net if method is None else method(net, args['D'], args['sigma_data'])


def ancestral(eta, noise):
    """A solver: DDIM with eta = 0, ancestral sampling of DDPM with 1. arXiv 2010.02502 Eq. 12.

    noise(i): the normal draws, like x, of step i."""
    def solver(f, x, grid, calls, callback=None):
        for i, (z, z_next) in enumerate(zip(grid[:-1], grid[1:])):
            towards = f(x, pfgm.like(z, x))                                       # x - xhat = z eps
            fresh = eta * z_next * (1 - (z_next / z) ** 2).sqrt()
            kept = (z_next ** 2 - fresh ** 2).clamp_min(0).sqrt() / z  # rounding
            x = x + pfgm.column(kept - 1, x) * towards + pfgm.column(fresh, x) * pfgm.like(noise(i), x)
            if callback:
                callback(z_next, x)
        return x
    return solver


# ---------------------------------------------------------------- reflow and distillation

class Pairs:
    """Shards of (noise, image) on disk: pairs[indices (b,)] -> (y, eps), float32 (b, C, S, S)."""

    def __init__(self, shards):
        self.shards = shards

    def __len__(self):
        return sum(map(len, self.shards))

    def __getitem__(self, indices):
        rows = [self.shards[i // SHARD][i % SHARD] for i in indices.tolist()]
        eps, y = torch.from_numpy(np.stack(rows)).float().unbind(1)
        return y, eps


def read_shard(path, shape):
    """The memory map of a shard; None where it is absent or of another shape."""
    try:
        shard = np.load(path, mmap_mode='r', allow_pickle=False)
    except (OSError, ValueError):
        return None
    return shard if shard.shape == shape and shard.dtype == np.float16 else None


@torch.no_grad()
def make_pairs(net, z_max, z_min, args, device, rank=0, world=1):
    """The Pairs of reflow: args.pairs draws eps and where `net` leads x = z_max eps, as float16 in
    --out_dir/pairs. arXiv 2209.03003 Section 2.2. Shards of before, made by the same network from
    the same seed, are kept; the others are shared out among the processes."""
    folder, shape = os.path.join(args.out_dir, 'pairs'), (args.channels, *[args.image_size] * 2)
    mark = fingerprint(net.state_dict().values(), args.seed)
    shapes = [(min(SHARD, args.pairs - first), 2, *shape) for first in range(0, args.pairs, SHARD)]
    paths = [os.path.join(folder, f'{mark:08x}-{k:05d}.npy') for k in range(len(shapes))]
    todo = [k for k in range(rank, len(paths), world) if read_shard(paths[k], shapes[k]) is None]
    z_last, clock, done = pfgm.last_plane(z_min, PAIR_NFE, math.inf), time.time(), 0
    for k in todo:
        os.makedirs(folder, exist_ok=True)
        generator = torch.Generator().manual_seed(step_seed(args.seed, 2 ** 34 + k))
        eps, ends = torch.randn(shapes[k][0], *shape, generator=generator), []
        numbers = torch.arange(len(eps)) + k * SHARD
        for part, number in zip(eps.split(args.batch_size), numbers.split(args.batch_size)):
            labels = number.to(device) % args.classes if args.classes else None
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                x, _ = pfgm.sample_ode(net, z_max * part.to(device), z_max, z_last, 'unipc',
                                       PAIR_NFE, D=math.inf, z_exp=0, labels=labels,
                                       schedule_name='radius', to_data=True)
            ends.append(x.cpu())
        pairs = torch.stack([eps, torch.cat(ends)], 1).half()
        if not pairs.isfinite().all():
            raise BadInput(f'--{"reflow" if args.reflow else "distill"} '
                           f'{args.reflow or args.distill}: it makes images that are not finite')
        write('--out_dir', paths[k], lambda file: np.save(file, pairs.numpy()))
        done += len(eps)
        if rank == 0:
            rate = done / (time.time() - clock)
            left = int((sum(shapes[k][0] for k in todo) - done) / rate)
            print(f'pairs: {min(done * world, args.pairs)}/{args.pairs}  {rate * world:.1f} img/s'
                  f'  {left // 60}:{left % 60:02d} left', flush=True)
    wait()
    shards = [read_shard(path, shape) for path, shape in zip(paths, shapes)]
    if any(shard is None for shard in shards):
        raise BadInput(f'--out_dir {args.out_dir}: every process must see the same folder')
    return Pairs(shards)


@torch.no_grad()
def straightness(net, x, labels=None, steps=50):
    """int |(x_1 - x_0) - dx_t/dt|^2 dt / |x_1 - x_0|^2 of the lines from x (B, ...) on z = net.high
    down to net.low, by Euler steps even in t: (B,), 0 where straight. arXiv 2209.03003 Section 2.2.
    """
    high = torch.full((len(x),), net.high, dtype=torch.float64)
    path = [pfgm.column(net.alpha(high), x) * x]
    pfgm.sample_ode(net, x, net.high, net.low, 'euler', steps, D=math.inf, z_exp=0, labels=labels,
                    schedule_name=net.planes,
                    callback=lambda z, x: path.append(pfgm.column(net.alpha(z), x) * x))
    path = torch.stack(path).flatten(2)
    whole = path[-1] - path[0]
    error = (whole - steps * path.diff(dim=0)).square().sum(2).mean(0)
    return error / whole.square().sum(1)
