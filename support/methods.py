"""The rivals of PFGM, a few lines each: VP, sub-VP, DDPM and rectified flow. Read it if you want to
compare them with PFGM, or to add a path from noise to data.

    pfgm    the Poisson field of charges                             arXiv 2209.11178
    pfgmpp  any D, as a denoiser; D = inf is diffusion as in EDM     arXiv 2302.04265, 2206.00364
    vp      variance preserving: alpha^2 = 1 / (1 + z^2)             arXiv 2011.13456, Appendix C
    subvp   sub-VP: alpha z = 1 - alpha^2                            arXiv 2011.13456, Eq. 29
    ddpm    1000 levels, alpha^2 = prod (1 - beta); DDIM is Euler    arXiv 2006.11239, 2010.02502
    rf      rectified flow: alpha = t = 1 / (1 + z), F = y - eps     arXiv 2209.03003

A Gaussian path x_t = alpha (y + z eps), where y is an image, is a flow of D = inf in x_t / alpha:
dx/dlog z = x - xhat, whatever alpha(t) is and whatever the network's output stands for. So each
rival is a pfgm.Denoiser with its own time, coefficients and draws of z.
"""

import torch

import pfgm
from pfgm import PFGM, Denoiser
from support.cli import BadInput
from support.images import mean_norm
from support.published import OFFICIAL


class PublishedDenoiser(Denoiser):
    """A network of EDM or PFGM++ as their authors call it: sigma is z / sqrt(D) whatever |x| is,
    and x may be float64."""

    def sigma(self, x, z):
        return z / self.unit


class VP(Denoiser):
    """beta(t) = 0.1 + 19.9 t with t in [0, 1]; F predicts eps and sees 999 t.

    A subclass says z_of(t), its inverse t_of(z) and alpha(z); t_train and t_sample are the smallest
    t of training and of sampling, t_max is the largest of both."""
    beta_0, beta_slope = 0.1, 19.9
    t_train, t_sample, t_max = 1e-5, 1e-3, 1.0
    scale = 999.0  # F sees this times t

    def __init__(self, net, only_z=None):
        super().__init__(net, only_z=only_z)
        ends = torch.tensor([self.t_sample, self.t_max], dtype=torch.float64)
        self.low, self.high = self.z_of(ends).tolist()

    def integral(self, t):
        """int beta from 0 to t, which is -2 ln alpha."""
        return self.beta_slope / 2 * t ** 2 + self.beta_0 * t

    def time(self, integral):
        """The t at which integral() has this value."""
        root = (self.beta_0 ** 2 + 2 * self.beta_slope * integral).sqrt()
        return (-self.beta_0 + root) / self.beta_slope

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
        """The schedule on which the papers themselves step, even in t: (steps + 1,), float64."""
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
    """VP in 1000 levels, with beta from 1e-4 to 0.02; F sees the level, t = 0 ... 999. Between two
    levels -2 ln alpha is interpolated."""
    t_train, t_sample, t_max = 0.0, 0.0, 999.0
    scale = 1.0
    table = -torch.log1p(-torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumsum(0)

    def integral(self, t):
        table = pfgm.like(self.table, t)
        i = t.long().clamp(0, 998)
        return torch.lerp(table[i], table[i + 1], t - i)

    def time(self, integral):
        table = pfgm.like(self.table, integral)
        i = (torch.searchsorted(table, integral, right=True) - 1).clamp(0, 998)
        return i + (integral - table[i]) / (table[i + 1] - table[i])

    def draw(self, B, generator=None, device='cpu'):
        return self.z_of(torch.randint(1000, (B,), generator=generator, device=device).float())


class RectifiedFlow(VP):
    """x_t = t y + (1 - t) eps; F predicts the velocity y - eps and sees 999 t, with t in [0, 1].

    eps is noise or, in a flow from one data set to another, an image of the other set."""
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


METHODS = dict(pfgm=PFGM, pfgmpp=Denoiser, vp=VP, subvp=SubVP, ddpm=DDPM, rf=RectifiedFlow)


def as_flow(net, flags):
    """The network as net(x, z[, labels]) -> (v_x, v_z), by the method that it was trained with.

    flags: the mapping of train.py's flags that a checkpoint keeps, or what stands for it in a
    published file (`official`: of PFGM, `edm`: of EDM or PFGM++). Raises BadInput where they
    contradict one another."""
    method = flags['method']
    if flags.get('source') and method != 'rf':
        raise BadInput(f'--source {flags["source"]}: belongs to --method rf, not {method}')
    if method == 'pfgm':
        if flags.get('consistency'):
            raise BadInput('--consistency: trains a denoiser, not a field of pfgm; give --D 1')
        if flags.get('official'):
            return net  # as published: the field, with no bounds
        return PFGM(net, flags['gamma'], flags.get('M'), flags.get('sigma'), flags.get('tau'),
                    flags.get('m_draws'), flags.get('skip'))
    only_z = flags['z_max'] if flags.get('distill') else None
    if method != 'pfgmpp':
        return METHODS[method](net, only_z)
    kind = PublishedDenoiser if flags.get('edm') else Denoiser
    mean, std = -1.2, 1.2
    if flags.get('consistency'):  # which needs the high levels more
        mean, std = -1.1, 2.0
    return kind(net, flags['D'], flags['sigma_data'], mean, std, only_z, flags.get('data_norm'))


def flow_constants(images, name, sigma=0.01, tau=0.03, gamma=5.0, z_min=1e-3):
    """The constants of PFGM for a data set: a dict of M, z_max, upper_norm, z_exp, gamma, z_min.

    They are the published ones where `name` has such, else they follow from the images by PFGM
    Appendix B, with z_exp = 10 gamma / sqrt(N), where |v| still tells |E| to a few per cent."""
    if name in OFFICIAL:
        constants = dict(OFFICIAL[name])
    else:
        N = images.channels * images.image_size ** 2
        try:
            rule = pfgm.hyperparameters(mean_norm(images), N, sigma, tau)
        except ValueError as error:
            raise BadInput(f'--dataset {images.name}: {error}') from error
        constants = dict(rule._asdict(), z_exp=10 * gamma / N ** 0.5)
    return dict(constants, gamma=gamma, z_min=z_min)
