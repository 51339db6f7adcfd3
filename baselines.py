"""The flows that PFGM is compared with, on the same network, trainer, solvers and likelihood.

A Gaussian path x_t = alpha (y + z eps), y the data, is a flow of D = inf in the variable x_t / alpha:
dx/dlog z = x - xhat, whatever alpha(t) and whatever the network predicts. So each rival is a
pfgm.Denoiser with its own z(t), its own coefficients and its own draws of z:

    vp      variance preserving: alpha^2 = 1 / (1 + z^2)             arXiv 2011.13456, Appendix C
    subvp   sub-VP: alpha z = 1 - alpha^2                            arXiv 2011.13456, Eq. 29
    ddpm    1000 levels, alpha^2 = prod (1 - beta); DDIM is Euler    arXiv 2006.11239, 2010.02502
    rf      rectified flow: alpha = t = 1 / (1 + z), F = y - eps     arXiv 2209.03003
"""
import math

import torch

import pfgm


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
        table, i = self.table.to(t), t.long().clamp(0, 998)
        return torch.lerp(table[i], table[i + 1], t - i)

    def time(self, integral):
        table = self.table.to(integral)
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
    """A solver: DDIM with eta = 0, ancestral sampling of DDPM with eta = 1. arXiv 2010.02502 Eq. 12.

    noise(i): the normal draws, like x, of step i."""
    def solver(f, x, grid, calls, callback=None):
        for i, (z, z_next) in enumerate(zip(grid[:-1], grid[1:])):
            towards = f(x, z.to(x))                                       # x - xhat = z eps
            fresh = eta * z_next * (1 - (z_next / z) ** 2).sqrt()
            kept = (z_next ** 2 - fresh ** 2).sqrt() / z
            x = x + pfgm.column(kept - 1, x) * towards + pfgm.column(fresh, x) * noise(i).to(x)
            if callback:
                callback(z_next, x)
        return x
    return solver
