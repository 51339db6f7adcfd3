"""The flows that one network can learn, on one trainer, with the same solvers and likelihood.

    pfgm    the Poisson field of charges                             arXiv 2209.11178
    pfgmpp  any D, as a denoiser; D = inf is diffusion as in EDM     arXiv 2302.04265, 2206.00364
    vp      variance preserving: alpha^2 = 1 / (1 + z^2)             arXiv 2011.13456, Appendix C
    subvp   sub-VP: alpha z = 1 - alpha^2                            arXiv 2011.13456, Eq. 29
    ddpm    1000 levels, alpha^2 = prod (1 - beta); DDIM is Euler    arXiv 2006.11239, 2010.02502
    rf      rectified flow: alpha = t = 1 / (1 + z), F = y - eps     arXiv 2209.03003

A Gaussian path x_t = alpha (y + z eps), y the data, is a flow of D = inf in x_t / alpha:
dx/dlog z = x - xhat, whatever alpha(t) and the network's output. So each rival is a Denoiser with
its own z(t), coefficients and draws of z. Each says perturb(), target(), and weight() of errors.
"""
import math
import os
import types

import numpy as np
import torch

import pfgm
from files import read_shard
from launch import BadInput, fingerprint, given_by, say, step_seed, wait, watch, write

SHARD, PAIR_NFE = 1000, 40  # pairs a file, and calls of the teacher for each, by unipc


class PFGM(torch.nn.Module):
    """The Poisson field of charges, predicted by the network itself; with --skip the network adds,
    where the noise is large, to the field of one charge at 0, and the less the farther away.
    Where it is followed |v_x| and v_z are kept within what data in [-1, 1] allow, |E_x| within
    sqrt(N) of |x|: far out, where v_z is all but 0, lines would lead anywhere."""
    unit = 1.0

    def __init__(self, net, args):
        super().__init__()
        self.net, self.gamma, self.skip = net, args['gamma'], args.get('skip')
        self.how = {k: args.get(k) for k in ('M', 'sigma', 'tau', 'm_draws')}

    def forward(self, x, z, *labels):
        v_x, v_z = self.net(x, z, *labels)
        root_N, r = math.sqrt(x[0].numel()), x.flatten(1).norm(dim=1)

        def share(E_x):  # |v| / |E|
            return root_N / (torch.hypot(E_x, z) + self.gamma)
        if self.skip:
            # s, the noise that |x| shows if the data's spread is 1/2; c, the network's weight
            s2 = ((r * r + z * z) / (root_N ** 2 + 1) - 1 / 4).clamp_min(0)
            c, at_0 = (1 + s2).rsqrt(), -s2 / (1 + s2) * share(r)
            v_x = pfgm.column(c, x) * v_x + pfgm.column(at_0, x) * x
            v_z = c * v_z + at_0 * z
        if self.net.training:
            return v_x, v_z
        E_x = torch.stack([(r - root_N).clamp_min(0), r + root_N])  # the least and the most
        scale = share(E_x)
        norm = v_x.flatten(1).norm(dim=1).clamp_min(1e-30)
        v_x = v_x * pfgm.column(norm.clamp(*(scale * E_x)) / norm, v_x)
        return v_x, v_z.clamp(*(-scale * z))

    def perturb(self, x, generator=None):
        return pfgm.perturb(x, **self.how, generator=generator)

    def target(self, moved, z, clean, charges, among=None):
        return pfgm.poisson_field(moved, z, charges, self.gamma, among=among)

    def weight(self, moved, z):
        return torch.ones_like(z)


class Denoiser(torch.nn.Module):
    """A network F as the mean of the data, xhat = c_skip x + c_out F(c_in x, c_noise), called like
    a field: net(x, z) -> (xhat - x, -z). EDM Table 1 and PFGM++ Section 3.

    The noise level is sigma = z / sqrt(D), for D = inf z. Student-t tails make |x| of any size at
    small D, and no c_in of sigma alone bounds it; so where |x| shows that the noise is larger,
    sigma is what it shows, sqrt((|x|^2 - N + z^2) / (N + D)) (no data has |y|^2 > N), so that
    |c_in x|^2 < max(N / sigma_data^2, N + D). At D = inf sigma is always EDM's own."""
    mean, std, low, high = -1.2, 1.2, 0.002, 80.0  # of ln sigma in training; sigma in sampling
    only = None  # the z of training, where it is one: of a student of one call

    def __init__(self, net, D=math.inf, sigma_data=0.5):
        super().__init__()
        self.net, self.D, self.sigma_data = net, D, sigma_data
        self.unit = pfgm.unit(D)

    def sigma(self, x, z):
        if self.D == math.inf:
            return z
        r2, N = x.flatten(1).square().sum(1) + z * z, x[0].numel()
        return torch.maximum(z / self.unit, ((r2 - N) / (N + self.D)).clamp_min(0).sqrt())

    def coefficients(self, sigma):
        """c_skip, c_out, c_in, c_noise, each (B,)."""
        total = (sigma ** 2 + self.sigma_data ** 2).sqrt()
        return ((self.sigma_data / total) ** 2, sigma * self.sigma_data / total, 1 / total,
                sigma.log() / 4)

    def perturb(self, x, generator=None, eps=None):
        """x (B, ...) -> (moved, z): by the kernel, or by given noise eps (of reflow's pairs)."""
        z = self.draw(len(x), generator, x.device)
        if self.only:
            z = torch.full_like(z, self.only)
        noise = (pfgm.kernel(x.shape, z, self.D, generator) if eps is None else
                 pfgm.column(z, x) * eps)
        return x + noise, z

    def target(self, moved, z, clean, charges=None, among=None):
        """(xhat - moved, -z): xhat is the image, or its mean by all charges, arXiv 2302.00670."""
        if charges is not None:
            mean = pfgm.posterior_mean(moved, z, charges, self.D, among)
            clean = pfgm.like(mean.view_as(moved), moved)
        return clean - moved, -z

    def draw(self, B, generator=None, device='cpu'):
        """z (B,) of a training step."""
        noise = torch.randn(B, generator=generator, device=device)
        return self.unit * torch.exp(self.mean + self.std * noise)

    def weight(self, x, z):
        """(B,): the squared error of xhat times it is the squared error of F."""
        return 1 / self.coefficients(self.sigma(x, z))[1] ** 2

    def forward(self, x, z, *labels):
        c_skip, c_out, c_in, c_noise = self.coefficients(self.sigma(x, z))
        F, _ = self.net(pfgm.column(c_in, x) * x, c_noise, *labels)
        return pfgm.column(c_skip - 1, x) * x + pfgm.column(c_out, x) * F, -z


class EDM(Denoiser):
    """As EDM and PFGM++ published it: sigma is z / sqrt(D) whatever |x|, and x may be float64."""

    def sigma(self, x, z):
        return z / self.unit


class VP(Denoiser):
    """beta(t) = 0.1 + 19.9 t, t in [0, 1]; F predicts eps and sees 999 t."""
    b, d = 0.1, 19.9
    t_train, t_sample, t_max = 1e-5, 1e-3, 1.0  # smallest t of each, and the largest
    scale = 999.0

    def __init__(self, net, D=math.inf, sigma_data=0.5):
        super().__init__(net)
        ends = torch.tensor([self.t_sample, self.t_max], dtype=torch.float64)
        self.low, self.high = self.z_of(ends).tolist()

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
    """x_t = t y + (1 - t) eps; F predicts the velocity y - eps and sees 999 t, t from 0 to 1. eps
    is noise or, from one data set to another, one of the images `source`, data.Charges."""
    source = None
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


DIVERGED = 'it has diverged: give another one, or train it again with a lower --lr'
METHODS = dict(pfgm=PFGM, pfgmpp=Denoiser, vp=VP, subvp=SubVP, ddpm=DDPM, rf=RectifiedFlow)


def as_flow(net, args):
    """The network as net(x, z[, labels]) -> (v_x, v_z) of the method that args say."""
    method = EDM if args.get('edm') else METHODS[args['method']]
    if args.get('source') and args['method'] != 'rf':
        raise BadInput(f'--source {args["source"]}: belongs to --method rf, not {args["method"]}')
    if method is PFGM and args.get('consistency'):
        raise BadInput('--consistency: trains a denoiser, not a field of pfgm; give --D 1')
    if method is PFGM:
        return net if args.get('official') else PFGM(net, args)
    flow = method(net, args['D'], args['sigma_data'])
    flow.only = args.get('distill') and args['z_max']
    if args.get('consistency'):  # which needs the high levels more
        flow.mean, flow.std = -1.1, 2.0
    return flow


# ---------------------------------------------------------------- target, loss, update

def at_lower_level(flow, clean, moved, z, stage, labels):
    """What the network itself, stopped and without dropout, makes of the same noise at a share of
    its level (B,), 1 - (1 + 8 sigmoid(-sigma)) / 2^stage. arXiv 2406.14548 Section 3, for any D."""
    share = (1 - (1 + 8 * torch.sigmoid(-z / flow.unit)) / 2 ** stage).clamp_min(0)
    lower = clean + pfgm.column(share, clean) * (moved - clean)
    flow.eval()
    with torch.no_grad():
        v_x, _ = flow(lower, (share * z).clamp_min(1e-3 * flow.low * flow.unit), *labels)
    flow.train()
    return torch.where(pfgm.column(share, clean) > 0, lower + v_x, clean), share


def training_point(flow, clean, generator, mine, charges=None, kinds=None, eps=(), stage=0):
    """(moved, z, target_x, target_z, weight[, labels]) for the rows `mine` of clean (B, ...), from
    the generator alone. kinds: the classes of clean and of the charges, (B,) and (K,), of which the
    network does not see a tenth; eps: (the noise of clean,) or (); stage: 1 and up of consistency
    training, where the image is what a lower level leads to."""
    labels, among = [], None
    if kinds:
        dropped = torch.rand(len(clean), generator=generator, device=clean.device) < 0.1
        labels = [torch.where(dropped, -1, kinds[0])[mine]]
        among = (labels[0][:, None] == kinds[1]) | (labels[0] < 0)[:, None]
    moved, z = (part[mine] for part in flow.perturb(clean, generator, *eps))
    weight = flow.weight(moved, z)
    if stage:
        image, share = at_lower_level(flow, clean[mine], moved, z, stage, labels)
        target, weight = flow.target(moved, z, image), weight / (1 - share)
    else:
        target = flow.target(moved, z, clean[mine], charges, among)
    return moved, z, *target, weight, *labels


def field_loss(net, reduce, moved, z, target_x, target_z, weight, *labels):
    """(B,) half the weighted squared error summed over the N + 1 components, or its mean (LSUN)."""
    v_x, v_z = net(moved, z, *labels)
    error = (v_x - target_x).square().flatten(1).sum(1) * weight + (v_z - target_z).square()
    return error / 2 if reduce == 'sum' else error / (moved[0].numel() + 1)


def orthogonal(G):
    """The matrices G (k, m, n) with all singular values brought to 0.7 ... 1.2, by five steps of a
    quintic Newton-Schulz iteration, taken in G G^T, the smaller of the two squares."""
    if G.shape[1] > G.shape[2]:
        return orthogonal(G.mT).mT
    G = G / G.flatten(1).norm(dim=1)[:, None, None].clamp_min(1e-30)
    S, one = G @ G.mT, torch.eye(G.shape[1], dtype=G.dtype, device=G.device)
    turn = p = 3.4445 * one - 4.775 * S + 2.0315 * S @ S
    for _ in range(4):  # every step multiplies G by a polynomial p(S), hence S by p(S)^2
        S = p @ p @ S
        p = 3.4445 * one - 4.775 * S + 2.0315 * S @ S
        turn = p @ turn
    return turn @ G


class Muon(torch.optim.Adam):
    """Adam, but a weight of two or more dimensions inside the network moves along its averaged
    gradient made orthogonal, by as much as Adam would: Muon, arXiv 2502.16982 Eq. 4."""

    def __init__(self, net, lr, **how):
        ends = (getattr(net, name, None) for name in ('embed', 'label', 'conv_in', 'conv_out'))
        outer = {p for part in ends if part for p in part.parameters()}
        inside = [p for p in net.parameters() if p.dim() > 1 and p not in outer]
        rest = [p for p in net.parameters() if p.dim() == 1 or p in outer]
        super().__init__([dict(params=rest), dict(params=inside, betas=(0.95, 0.99))], lr=lr,
                         betas=(0.9, 0.99), **how)

    @torch.no_grad()
    def step(self):
        inside, shapes = self.param_groups[1], {}
        lr, inside['lr'] = inside['lr'], 0.0  # Adam averages the gradients, and moves nothing
        super().step()
        inside['lr'] = lr
        for p in inside['params']:
            ahead = torch.lerp(p.grad, self.state[p]['exp_avg'], 0.95).reshape(len(p), -1)
            shapes.setdefault(ahead.shape, {})[p] = ahead
        for shape, moves in shapes.items():
            for p, move in zip(moves, orthogonal(torch.stack([*moves.values()]))):
                p.sub_(move.view(p.shape), alpha=0.2 * max(shape) ** 0.5 * lr)


def update(net, ema, opt, clip, decay):
    """One step of `opt` on the clipped gradients, and of the EMA -> their norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
    opt.step()
    opt.zero_grad(set_to_none=True)
    with torch.no_grad():  # else every step would hang one more graph on the average
        torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
    return norm


# ---------------------------------------------------------------- following them

def ancestral(eta, noise):
    """A solver: DDIM with eta = 0, ancestral sampling of DDPM with 1, arXiv 2010.02502 Eq. 12; with
    None all noise is new: xhat and, on the next plane, fresh noise, arXiv 2303.01469 Algorithm 1.
    noise(i): the normal draws, like x, of step i."""
    def solver(f, x, grid, calls):
        for i, (z, z_next) in enumerate(zip(grid[:-1], grid[1:])):
            towards = f(x, pfgm.like(z, x))                               # x - xhat = z eps
            fresh = z_next if eta is None else eta * z_next * (1 - (z_next / z) ** 2).sqrt()
            kept = (z_next ** 2 - fresh ** 2).clamp_min(0).sqrt() / z  # rounding
            x = x + pfgm.column(kept - 1, x) * towards
            x = x + pfgm.column(fresh, x) * pfgm.like(noise(i), x)
            yield x
    return solver


def restoring(net, how, part, image, noise):
    """The field of net where part(x), a projection, is known to be the image's: on each plane it
    is that of image + z noise, the same noise on all, and what it leads to is the image's. The rest
    follows the lines from there. Controllable generation of arXiv 2011.13456, Appendix I.
    how: what drift() takes of net, and need not know of the field that is returned."""
    def restored(x, z, labels=None):
        at = x + part(image + pfgm.column(z, x) * noise - x)
        towards = pfgm.drift(net, at, z, labels=labels, **how)
        return part(towards - x + image) - towards, -z
    return restored


class Flow(types.SimpleNamespace):
    """A network, or an exact field, and what it takes to follow its lines; checkpoint.load_flow()
    makes one. Of its training: net, shape (C, H, W), D, z_min, z_max, upper_norm, z_exp, gamma,
    known (how many classes), class_names, and of a checkpoint method, step, weights, student. Of
    sampling: SAMPLING, and classes, the labels of the images in turn."""

    def prior(self, indices):
        """The starts of images `indices`, each drawn from (seed, its index) alone; of a flow from
        another data set its images, in turn."""
        if source := getattr(self.net, 'source', None):
            return self.z_max * source[torch.tensor(indices)]
        return self.noise_of(indices, self.z_max, first=0)(0)

    def labels_of(self, indices, device):
        """The classes (b,) of images `indices`, or None for none."""
        if turns := len(indices) and len(self.classes):
            return torch.tensor([self.classes[i % turns] for i in indices], device=device)

    def noise_of(self, indices, z=1.0, first=2 ** 33):
        """noise(step) like x, the prior's but at z, each image from a generator of its own, seeded
        by its index counted from `first`."""
        draws = [torch.Generator().manual_seed(step_seed(self.seed, first + i)) for i in indices]
        most = self.upper_norm and self.upper_norm / (self.z_max / z)  # beyond nothing was learned
        return lambda step: torch.cat([pfgm.sample_prior((1, *self.shape), z, most, self.D, g)
                                       for g in draws])

    def spacing(self):
        """The schedule: where none was given EDM's for its own solver, and ours for the others."""
        return self.schedule or ('rho7' if self.as_edm() else 'radius')

    def as_edm(self):
        return isinstance(self.net, EDM) and self.solver == 'heun'

    def ending(self):
        """(whether the last call leads straight to z = 0, the plane on which it is made or, without
        it, the flow ends)."""
        fixed, z = self.solver != 'rk45', self.z_min
        to_data = fixed if self.to_data is None else self.to_data
        if to_data and fixed:
            if isinstance(self.net, pfgm.ExactField) and not self.z_last:
                self.z_last = pfgm.deciding_z(self.net.charges)  # below it the lines are straight
            z = self.z_last or (z if self.as_edm() else pfgm.last_plane(z, self.nfe, self.D))
        return to_data, z

    def facts(self):
        """What a line of results says of a flow, so that two that differ can be told apart."""
        to_data, z_last = self.ending()
        names = ('method', 'D', 'weights', 'step', 'solver', 'nfe', 'schedule', 'small_z', 'z_min',
                 'z_exp', 'guidance', 'eta', 'classes', 'bf16')
        found = {k: v for k, v in vars(self).items() if k in names}
        found.update(D='inf' if self.D == math.inf else self.D, to_data=to_data, z_last=z_last,
                     schedule=self.spacing())
        if self.solver == 'rk45':
            found.update(tol=self.tol, nfe=None, schedule=None, bf16=False)
        return found

    @torch.no_grad()
    def follow(self, x, device, indices=(), up=False, callback=None, known=None):
        """x down from z_max to z_min (and z = 0), or up -> (x, nfe), in float32 (float64 for an
        exact field or EDM). indices: of the images, for classes and fresh noise; known: (part,
        image) of restoring()."""
        labels = self.labels_of(indices, device)
        solver = 'euler' if self.solver == 'ddim' and not self.eta else self.solver
        if solver in ('ddim', 'renew'):
            solver = ancestral(self.eta if solver == 'ddim' else None, self.noise_of(indices))
        to_data, z_last = self.ending()
        ends = (self.z_min, self.z_max) if up else (self.z_max, z_last)
        wide = isinstance(self.net, (pfgm.ExactField, EDM)) and device.type != 'mps'  # has none
        how = {k: getattr(self, k) for k in ('gamma', 'z_exp', 'small_z', 'guidance')}
        bf16 = self.bf16 and solver != 'rk45'  # whose tolerance is finer than bfloat16
        net, x = self.net, x.to(torch.float64 if wide else torch.float32).to(device)
        if known:
            net, how = restoring(net, how, *known, x / self.z_max), dict(z_exp=0.0)
        try:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                x, nfe = pfgm.sample_ode(
                    net, x, *ends, solver, self.nfe, D=self.D, labels=labels, **how, rtol=self.tol,
                    atol=self.tol, each=self.small_z != 'official', to_data=to_data and not up,
                    schedule_name='log' if up else self.net.planes if self.schedule == 'time'
                    else self.spacing(), callback=callback)
        except pfgm.SolverError as error:
            raise BadInput(f'--ckpt: {error}; {DIVERGED}' if 'NaN' in str(error) else f'--tol '
                           f'{self.tol}: {error}; try a larger one, or --nfe 100') from error
        if not x.isfinite().all():
            raise BadInput(f'--ckpt: the network leads to images that are not finite; {DIVERGED}')
        return x, nfe * (1 if labels is None or self.guidance == 1 else 2)

    def images(self, indices, batch_size, device, rank=0, starts=None):
        """Yield (indices, x, nfe), a batch at a time. starts (n, C, H, W) replaces the prior's."""
        nfe, batches = 0, [indices[i:i + batch_size] for i in range(0, len(indices), batch_size)]
        for batch in watch(batches, len(indices), lambda: f'{self.solver} nfe {nfe}', rank):
            x = self.prior(batch) if starts is None else starts[batch]
            x, nfe = self.follow(x, device, batch)
            yield batch, x, nfe


SAMPLING = dict(solver='unipc', nfe=20, tol=1e-4, schedule='radius', to_data=None, z_last=None,
                small_z='exact', guidance=1.0, eta=0.0, seed=0, bf16=False)


def flow_of(net, args, **how):
    """The Flow of a network with the args of its training, sampled as SAMPLING says, or how."""
    names = 'method', 'D', 'z_min', 'z_max', 'upper_norm', 'z_exp', 'gamma'
    return Flow(net=net, shape=(args['channels'], args['image_size'], args['image_size']),
                known=args['classes'], classes=[*range(args['classes'])],
                **{k: args[k] for k in names if k in args}, **{**SAMPLING, **how})


# ---------------------------------------------------------------- reflow and distillation

def method_of_student(args, teacher):
    """What --reflow and --distill train: the teacher's method. But of pfgm a denoiser of D = 1, and
    --distill of what predicts eps rf: far out neither field nor eps tells where one call leads."""
    flag = f'--{"reflow" if args.reflow else "distill"} {args.reflow or args.distill}'
    if args.reflow and args.distill or args.consistency:
        raise BadInput(f'{flag}: --reflow, --distill and --consistency are two runs; give one')
    if teacher.get('distill') not in (None, args.distill) or teacher.get('consistency'):
        raise BadInput(f'{flag}: itself a student of one call; give its teacher')
    if args.distill and not teacher.get('distill') and teacher['method'] in ('vp', 'subvp', 'ddpm'):
        return 'rf'  # and a run that goes on stays what it is
    return 'pfgmpp' if teacher['method'] == 'pfgm' else teacher['method']


def pairs_of_teacher(teacher, args, step, device, rank, world):
    """The pairs of reflow: args.pairs draws x of the prior of `teacher`, a Flow, and the images y
    where it leads them, as eps = (x - y) / z_max and y, float32 (2, C, S, S), in --out_dir/pairs:
    the line between is y + z eps. arXiv 2209.03003 Section 2.2. Those of that network are kept.
    Says what is trained on them and, at the first step, how straight the teacher's lines are."""
    say(f'the student is {args.method} of D {args.D:g}, from the noise and weights of its teacher, '
        f'{teacher.method}')
    flag = f'--reflow {args.reflow}' if args.reflow else f'--distill {args.distill}'
    folder = os.path.join(args.out_dir, 'pairs')
    mark = fingerprint(teacher.net.state_dict().values(), args.seed)
    paths = {range(args.pairs)[first:first + SHARD]: os.path.join(
        folder, f'{mark:08x}-{first // SHARD:05d}.npy') for first in range(0, args.pairs, SHARD)}
    todo = [shard for shard in [*paths][rank::world]
            if read_shard(paths[shard], (len(shard), 2, *teacher.shape)) is None]
    for shard in watch(todo, sum(map(len, todo)), 'pairs', rank):
        os.makedirs(folder, exist_ok=True)
        pairs = []
        for first in range(0, len(shard), args.batch_size):
            batch = shard[first:first + args.batch_size]
            x = teacher.prior(batch)
            with given_by(flag):
                y = teacher.follow(x, device, batch)[0].float().cpu()
            pairs.append(torch.stack([(x - y) / teacher.z_max, y], 1))
        write('--out_dir', paths[shard], lambda file: np.save(file, torch.cat(pairs).numpy()))
    wait()
    made = [read_shard(path, (len(shard), 2, *teacher.shape)) for shard, path in paths.items()]
    if any(shard is None for shard in made):
        raise BadInput(f'--out_dir {args.out_dir}: every process must see the same folder')
    if rank == 0 and step == 0 and hasattr(teacher.net, 'planes'):
        start = teacher.prior(range(64)).to(device)
        bent = straightness(teacher.net, start, teacher.labels_of(range(64), device)).mean()
        print(f'the teacher: straightness {bent:.4f} (0 is straight)', flush=True)
    return torch.utils.data.ConcatDataset(made)


@torch.no_grad()
def straightness(net, x, labels=None, steps=50):
    """int |(x_1 - x_0) - dx_t/dt|^2 dt / |x_1 - x_0|^2 of the lines from x (B, ...) on z = net.high
    to net.low, by Euler steps even in t: (B,), 0 where straight. arXiv 2209.03003 Section 2.2."""
    high = torch.full((len(x),), net.high, dtype=torch.float64)
    path = [pfgm.column(net.alpha(high), x) * x]
    pfgm.sample_ode(net, x, net.high, net.low, 'euler', steps, D=math.inf, z_exp=0, labels=labels,
                    schedule_name=net.planes,
                    callback=lambda z, x: path.append(pfgm.column(net.alpha(z), x) * x))
    path = torch.stack(path).flatten(2)
    whole = path[-1] - path[0]
    return (whole - steps * path.diff(dim=0)).square().sum(2).mean(0) / whole.square().sum(1)
