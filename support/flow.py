"""A trained network and how to follow it: with which solver, on which planes, from which noise.

Read it if you want to know what sample.py does between the prior and an image.

    flow = load_flow('out/ckpt.pt', torch.device('cpu'), nfe=20)
    for indices, x, nfe in flow.images(range(64), batch_size=64, device=torch.device('cpu')):
        ...                                        # x (64, C, H, W) in [-1, 1]
"""
import contextlib
import dataclasses
import functools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, NamedTuple, Optional

import torch

import pfgm
from support import waiting
from support.batches import Charges, charges_of
from support.checkpoint import load_checkpoint
from support.classes import class_numbers
from support.cli import BadInput, say, watch
from support.cpu import keep_freed_memory
from support.methods import VP, PublishedDenoiser, flow_constants
from support.networks import in_bfloat16
from support.processes import cores_of_rank, fast_bf16, free_gpu_memory
from support.published import OFFICIAL, OFFICIAL_BY_SIZE
from support.seeds import step_seed
from support.sets import load_images
from support.solvers import SOLVERS, ancestral, deciding_z, last_plane, unipc_order
from support.unused import of_flow
from unet import UNet

DIVERGED = 'it has diverged: give another one, or train it again with a lower --lr'
SOLVER_NAMES = (*SOLVERS, 'ddim', 'renew')  # of --solver; the last two add fresh noise
THREAD_DRAWS = 50_000  # numbers that a thread draws at least, else to start it takes longer
EDM_NFE = 35  # calls with which EDM and PFGM++ published CIFAR-10: 18 steps of heun


class Kept(NamedTuple):
    """What is kept of an image while the rest of it is made anew."""
    part: Callable       # x (b, C, H, W) -> like x: a linear projection onto what is kept
    image: torch.Tensor  # (1, C, H, W) in [-1, 1]


def restoring(net, options, kept, noise):
    """The field of `net` where a part of the image is kept, called like a network.

    On each plane that part of x is replaced by the part of image + z noise, with the same noise
    (b, C, H, W) on all planes, and what it leads to is replaced by the part of the image; the rest
    follows the lines from there. Controllable generation of arXiv 2011.13456, Appendix I.
    options: the keywords with which drift() follows `net`. The field that is returned has used
    them already, and is itself followed with z_exp=0 alone."""
    part, image = kept

    def restored(x, z, labels=None):
        replaced = x + part(image + pfgm.column(z, x) * noise - x)
        slope = pfgm.drift(net, replaced, z, labels=labels, **options)  # x - xhat
        return part(slope - x + image) - slope, -z

    return restored


@contextlib.contextmanager
def following(z_from, z_to, callback=None):
    """Inside, where lines are followed from one plane to another, a script that has been silent for
    a while says which z they have reached -> a callback(z (B,), x) for the solver, which is to be
    called after each step and calls the one that is given."""
    reached = None  # (B,)

    def noted(z, x):
        nonlocal reached
        reached = z.cpu()  # another thread reads it, from which MPS would not take a command
        if callback is not None:
            callback(z, x)

    def words():
        line = f'z from {z_from:.3g} to {z_to:.3g}'
        if reached is None:
            return line
        z = reached.tolist()
        slowest = z.index(min(z) if z_to > z_from else max(z))
        line += f': {sorted(z)[len(z) // 2]:.3g} reached'
        if min(z) < max(z):
            line += f', {z[slowest]:.3g} by the slowest, image {slowest + 1} of {len(z)}'
        return line

    with waiting.doing(words):
        yield noted


@dataclasses.dataclass
class Flow:
    """A network, or an exact field, and what it takes to follow its lines to images."""
    net: Callable                     # net(x, z[, labels]) -> (v_x, v_z), in eval mode
    shape: tuple                      # (C, H, W) of an image
    D: float                          # augmented dimensions, math.inf for diffusion
    z_min: float                      # the plane where sampling ends, in units of x
    z_max: float                      # the plane where it starts
    upper_norm: Optional[float]       # the largest |x| there; None: the prior is not clipped
    z_exp: float                      # below it v_z is computed, not predicted
    gamma: Optional[float]            # of a field: added to its norm; None of denoisers
    # what it is
    method: Optional[str] = None      # a word of methods.METHODS; None for an exact field
    weights: Optional[str] = None     # 'ema' or 'raw'
    step: Optional[int] = None        # updates it was trained for
    student: Optional[str] = None     # distill or consistency, where one of these trained it for
                                      # one or two calls: it has no flow to follow
    dataset: Optional[str] = None     # the name of what it was trained on
    data: Optional[list] = None       # its identity, as images.Images has it
    class_count: int = 0              # how many classes it knows
    class_names: Optional[list] = None
    source: Optional[Charges] = None  # the images that it starts from, in place of noise
    # how it is followed
    solver: str = 'unipc'             # one of SOLVER_NAMES
    nfe: int = 20                     # network calls an image, of all solvers but rk45
    tol: float = 1e-4                 # rtol and atol of rk45
    schedule: Optional[str] = 'radius'  # of pfgm.SCHEDULES, or 'time'; None: as is best
    to_data: Optional[bool] = None    # whether the last call leads to z = 0; None: not with rk45
    z_last: Optional[float] = None    # where that call is made; None: by the rule of last_plane()
    small_z: str = 'exact'            # of pfgm.drift()
    guidance: float = 1.0             # of pfgm.drift()
    eta: float = 0.0                  # fresh noise of ddim
    seed: int = 0
    bf16: bool = False                # autocast to bfloat16, but never under rk45
    net_in_bf16: Optional[Callable] = None  # net with its weights cast, for calls under bf16
    classes: tuple = ()               # the labels of images 0, 1, ..., in turn; () for none
    image_bytes: int = 32 << 20       # about what the network takes of memory for an image

    # ------------------------------------------------------------ where the images start

    def prior(self, indices):
        """The starts (b, C, H, W) of images `indices`, each drawn from (seed, its index) alone. A
        flow from another data set starts from its images, in turn."""
        return self.noise_of(indices, self.z_max, first=0)(0)

    def noise_of(self, indices, z=1.0, first=2 ** 33):
        """A function noise(step) -> (b, C, H, W): draws of the prior's law, but on the plane z.

        Each image has a generator of its own, seeded by its index counted from `first`. A flow from
        another data set has seen no noise but the image that it starts from, on every step."""
        if self.source is not None:
            return lambda step: z * self.source[torch.tensor(indices)]
        draws = [torch.Generator().manual_seed(step_seed(self.seed, first + i)) for i in indices]
        most = self.upper_norm  # farther out nothing was learned
        if most is not None:
            most = most / (self.z_max / z)

        def drawn(part):
            return pfgm.sample_prior((len(part), *self.shape), z, most, self.D, part)

        # PyTorch draws without the GIL, so that several threads draw faster than one.
        least = math.ceil(THREAD_DRAWS / math.prod(self.shape))
        each = max(least, math.ceil(len(draws) / cores_of_rank()))
        parts = [draws[first:first + each] for first in range(0, len(draws), each)]

        def noise(step):
            if len(parts) == 1:
                return drawn(draws)
            with ThreadPoolExecutor(len(parts)) as pool:
                return torch.cat(list(pool.map(drawn, parts)))
        return noise

    def labels_of(self, indices, device):
        """The classes (b,) of images `indices`, or None where there are none."""
        if len(indices) == 0 or len(self.classes) == 0:
            return None
        turns = len(self.classes)
        return pfgm.sent(torch.tensor([self.classes[i % turns] for i in indices]), device)

    # ------------------------------------------------------------ on which planes, by which solver

    def is_edm(self):
        """Whether it is sampled as EDM and PFGM++ published their files."""
        return isinstance(self.net, PublishedDenoiser) and self.solver == 'heun'

    def is_official(self):
        """Whether it is of a file of PFGM's authors, whose network is the field itself."""
        return isinstance(self.net, UNet)

    def chosen_schedule(self):
        """The word of the schedule. Where none was given it is EDM's for its own solver, and ours
        for the others."""
        if self.schedule:
            return self.schedule
        return 'rho7' if self.is_edm() else 'radius'

    @functools.cached_property
    def z_decides(self):
        """Of an exact field: the z below which its lines are straight."""
        return deciding_z(self.net.charges)

    def first_step_is_free(self):
        """Whether the first step down to data needs no call of the network, as from far away with
        unipc."""
        return self.solver == 'unipc' and self.z_max > 10

    def ending(self):
        """(whether the last call leads straight to z = 0, the plane on which that call is made or,
        where there is none, the flow ends)."""
        fixed = self.solver != 'rk45'
        to_data = fixed if self.to_data is None else self.to_data
        if not (to_data and fixed):
            return to_data, self.z_min
        if self.z_last:
            return to_data, self.z_last
        if isinstance(self.net, pfgm.ExactField):
            return to_data, self.z_decides
        if self.is_edm():
            return to_data, self.z_min
        N = math.prod(self.shape) if self.first_step_is_free() else None
        return to_data, last_plane(self.z_min, self.nfe, self.D, N)

    def solver_for(self, indices, up, to_data):
        """The solver as pfgm.sample_ode() takes it, for the images `indices`."""
        if self.solver == 'rk45':
            if self.small_z == 'official':
                return 'rk45'
            return functools.partial(SOLVERS['rk45'], rtol=self.tol, atol=self.tol)
        if self.solver == 'unipc':
            free = to_data and not up and self.first_step_is_free()
            order = unipc_order(self.nfe)
            if up or isinstance(self.net, pfgm.ExactField):
                order = 3
            return functools.partial(SOLVERS['unipc'], order=order, free_first_step=free)
        if self.solver == 'renew':
            return ancestral(None, self.noise_of(indices))
        if self.solver == 'ddim' and self.eta:
            return ancestral(self.eta, self.noise_of(indices))
        return SOLVERS['euler' if self.solver == 'ddim' else self.solver]

    # ------------------------------------------------------------ following it

    @torch.no_grad()
    def follow(self, x, device, indices=(), up=False, callback=None, kept=None):
        """x (b, C, H, W) from z_max down to z_min (and z = 0), or up -> (x, network calls).

        In float32, or in float64 for an exact field and for published denoisers. indices: of the
        images, for classes and fresh noise. callback(z, x) after each step. kept: what is kept of
        an image, see restoring(). Raises BadInput where the solver cannot go on, or images are not
        finite."""
        labels = self.labels_of(indices, device)
        to_data, z_last = self.ending()
        z_from, z_to = (self.z_min, self.z_max) if up else (self.z_max, z_last)
        wide = isinstance(self.net, (pfgm.ExactField, PublishedDenoiser)) and device.type != 'mps'
        x = pfgm.sent(x.to(torch.float64 if wide else torch.float32), device)
        fixed = self.solver != 'rk45'
        net = self.net
        # The tolerance of rk45 is finer than bfloat16.
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=self.bf16 and fixed)
        with autocast:
            # Autocast stays off where the device has no bfloat16.
            if self.net_in_bf16 is not None and torch.is_autocast_enabled(device.type):
                net = self.net_in_bf16
        options = dict(gamma=self.gamma, z_exp=self.z_exp, small_z=self.small_z,
                       guidance=self.guidance)
        if kept is not None:
            net = restoring(net, options, kept, x / self.z_max)
            options = dict(z_exp=0.0)
        if not fixed:
            schedule = None
        elif up:
            schedule = 'log'
        elif self.schedule == 'time':
            schedule = self.net.planes
        else:
            schedule = self.chosen_schedule()
        try:
            with autocast, following(z_from, z_to, callback) as noted:
                x, nfe = pfgm.sample_ode(
                    net, x, z_from, z_to, self.solver_for(indices, up, to_data),
                    self.nfe if fixed else None, D=self.D, labels=labels, **options, rtol=self.tol,
                    atol=self.tol, schedule_name=schedule, to_data=to_data and not up,
                    callback=noted)
        except pfgm.SolverError as error:
            if 'NaN' in str(error):
                raise BadInput(f'--ckpt: {error}; {DIVERGED}') from error
            raise BadInput(f'--tol {self.tol}: {error}; try a larger one, or --nfe 100') from error
        if not x.isfinite().all():
            raise BadInput(f'--ckpt: the network leads to images that are not finite; {DIVERGED}')
        return x, nfe

    def batch_size(self, device):
        """How many images to make at a time: a power of 2, as many as take 2 GB or, of a GPU, half
        of what is free. Beyond 256, or on a GPU 1024, no more is gained. But for rounding images do
        not depend on it, except by the published RK45, whose steps the whole batch shares."""
        if self.solver == 'rk45' and self.small_z == 'official':
            return 64
        memory = 2 << 30
        most = 256
        free = free_gpu_memory(device) if device.type == 'cuda' else 0
        if free:
            memory = free // 2
            most = 1024
        fits = min(max(memory // self.image_bytes, 1), most)
        return 2 ** (fits.bit_length() - 1)

    def images(self, indices, batch_size, device, rank=0):
        """Make the images `indices`, and yield (indices, x (b, C, H, W), network calls) a batch at
        a time. Rank 0 says how far it has come."""
        nfe = 0
        batches = [indices[i:i + batch_size] for i in range(0, len(indices), batch_size)]
        for batch in watch(batches, len(indices), lambda: self.in_words(nfe), rank):
            x, nfe = self.follow(self.prior(batch), device, batch)
            yield batch, x, nfe

    # ------------------------------------------------------------ words about it

    def headline(self):
        """What is followed and how, in one line for people; settings() has the rest."""
        line = 'the exact field of the data'
        if self.method is not None:
            line = f'{self.method}, D {self.D:g}'
        line += f', {self.solver}'
        if self.solver == 'rk45':
            line += f' to a tolerance of {self.tol:g}'
        elif self.nfe == 1:
            line += ', 1 network call an image'
        else:
            line += f', {self.nfe} network calls an image'
        return f'{line}, seed {self.seed}'

    def in_words(self, calls=0):
        """The solver, and how many network calls an image it made, for a line of progress."""
        return f'{self.solver}, {calls} calls an image' if calls else self.solver

    def settings(self):
        """All that its images depend on but for the network's weights and the images of `source`: a
        dict that json can write."""
        names = [field.name for field in dataclasses.fields(self)]
        left_out = ('net', 'net_in_bf16', 'source', 'data', 'image_bytes')
        values = {name: getattr(self, name) for name in names if name not in left_out}
        values.update(schedule=self.chosen_schedule(), classes=list(self.classes))
        return self.without_unused(values)

    def facts(self):
        """What a line of results says of a flow, so that two that differ can be told apart."""
        to_data, z_last = self.ending()
        facts = dict(D='inf' if self.D == math.inf else self.D, to_data=to_data, z_last=z_last,
                     schedule=self.chosen_schedule(), solver=self.solver, nfe=self.nfe,
                     small_z=self.small_z, z_min=self.z_min, z_exp=self.z_exp,
                     guidance=self.guidance, eta=self.eta, classes=list(self.classes),
                     bf16=self.bf16, tol=self.tol)
        if self.method is not None:
            facts.update(method=self.method, weights=self.weights, step=self.step)
        return self.without_unused(facts)

    def without_unused(self, values):
        """The dict `values` of its fields, where None stands for what has no say in its images."""
        unused = of_flow(self)
        return {name: None if name in unused else value for name, value in values.items()}


def flow_of(net, flags, **more):
    """The Flow of a network with the mapping of train.py's flags that it was trained with, or
    constants that stand for them; more: other fields of Flow."""
    size = flags['image_size']
    if 'nf' in flags:  # of a U-Net, whose first level is the largest in memory
        channels = flags['nf'] * flags['ch_mult'][0]
        pixels = (size // flags.get('patch', 1)) ** 2
        more.update(image_bytes=80 * channels * pixels)  # measured: 20 activations in float32
    return Flow(net, (flags['channels'], size, size), flags['D'], flags['z_min'], flags['z_max'],
                flags['upper_norm'], flags['z_exp'], flags['gamma'], method=flags.get('method'),
                class_count=flags['classes'], classes=tuple(range(flags['classes'])), **more)


# ---------------------------------------------------------------- from a file, or from data

def load_flow(path, device, *, weights='ema', compiled=False, dataset=None, data_dir='data',
              source=None, source_flag='--from', solver=None, nfe=None, tol=1e-4, schedule=None,
              z_min=None, to_data=None, small_z=None, classes=None, guidance=1.0, eta=0.0, seed=0,
              bf16=None):
    """The Flow of a checkpoint, ours or the authors'.

    What is None is as is best for the network: solver rk45, or unipc where nfe is given; the
    authors' own solver, schedule and constants for their files. classes: labels or their names, in
    turn. dataset: where a published file of PFGM does not say it. source: images that a flow from
    another data set starts from, in place of those it was trained with; source_flag gave them.
    Other arguments are fields of Flow. Raises BadInput, which names the flag of sample.py, for what
    the flow does not take.

    A student of --distill has learned the plane z_max alone, and makes one call. One of
    --consistency goes on from there by `renew`."""
    net, flags = load_checkpoint(path, weights)
    net.requires_grad_(False).to(device, memory_format=torch.channels_last)
    if compiled:
        net.compile()
        say('--compile: the first batch compiles the network, which may take minutes')
    official = flags.get('official', False)
    edm = flags.get('edm', False)
    student = student_of(flags)
    check_calls(student, solver, nfe)
    if official:
        flags = with_published_constants(flags, dataset)

    solver, nfe = best_solver(solver, nfe, student, official, edm)
    if schedule is None and not edm:
        schedule = 'log' if official else 'radius'
    if official and to_data is None:
        to_data = False
    if small_z is None:
        small_z = 'official' if official else 'exact'
    if bf16 is None:
        bf16 = fast_bf16(device) and not (official or edm)
    net_in_bf16 = None
    if bf16:  # once, for all solvers and numbers of calls of a sweep
        net_in_bf16 = in_bfloat16(net)
        if compiled:
            net_in_bf16.compile()

    flow = flow_of(net, flags, weights=weights, step=flags['step'], student=student,
                   dataset=flags.get('dataset'), data=flags.get('data'),
                   class_names=flags.get('class_names'),
                   solver=solver, nfe=nfe, tol=tol, schedule=schedule, to_data=to_data,
                   z_last=z_min, small_z=small_z, guidance=guidance, eta=eta, seed=seed, bf16=bf16,
                   net_in_bf16=net_in_bf16)
    flow.z_min = z_min or flow.z_min
    if flags.get('source'):
        flow.source = charges_of(images_to_start_from(flags, source, source_flag, data_dir),
                                 source_flag)
    elif source is not None:
        raise BadInput(f'{source_flag} {source}: this flow starts from noise; leave it out')
    check_flow(flow, z_min, tol_least=1e-7, precision='float32 of a network')
    flow.classes = tuple(class_numbers(classes, flow.class_count, flow.class_names))
    return flow


def student_of(flags):
    """How a network was trained for one or two calls: a word as Flow.student has it, or None."""
    if flags.get('distill'):
        return 'distill'
    if flags.get('consistency'):
        return 'consistency'
    return None


def with_published_constants(flags, dataset):
    """The mapping of flags of a checkpoint of PFGM's authors, with the constants of its data set.
    It does not say which one that is: `dataset`, or else the one of its image size. Raises BadInput
    where they published none for that."""
    name = dataset or OFFICIAL_BY_SIZE.get(flags['image_size'])
    if name not in OFFICIAL:
        raise BadInput(f'--dataset {name}: an official checkpoint belongs to one of '
                       + ', '.join(OFFICIAL))
    return {**flags, 'dataset': name, **flow_constants(None, name)}


def best_solver(solver, nfe, student, official, edm):
    """The solver and the number of calls that are best for a network, where they are None.

    student: a field of Flow. official, edm: whether the file is one of PFGM's authors, or one of
    PFGM++ or EDM, which are followed as published."""
    if nfe is None and student:
        nfe = 1
    if nfe is None and edm and solver is None:
        nfe = EDM_NFE
    if solver is None:
        if student == 'consistency':
            solver = 'renew'
        elif nfe is None:
            solver = 'rk45'
        elif official or edm and nfe >= EDM_NFE:
            solver = 'heun'
        else:
            solver = 'unipc'
    return solver, nfe or 100


def images_to_start_from(flags, source, source_flag, data_dir):
    """The Images that a flow of train.py --source starts from.

    flags: the mapping of flags that its checkpoint keeps. source: other images, or the place where
    they are now, which source_flag gave; None: those that it was trained with, which must be there
    and be the same. Raises BadInput."""
    size = flags['image_size']
    channels = flags['channels']
    if source is not None:
        return load_images(source, data_dir, size, channels, flag=source_flag, size_is_fixed=True)
    path = flags['source']
    try:
        images = load_images(path, data_dir, size, channels, flag='--source of --ckpt',
                             size_is_fixed=True)
    except BadInput as error:
        raise BadInput(f'{error}; if it has moved, give --from') from error
    difference = images.difference(flags['source_data'], (channels, size, size), False, None)
    if difference and not images.is_known_set:
        raise BadInput(f'--source of --ckpt {path}: other images than it was trained with '
                       f'({difference}); give --from {path} to start from these, or --from with '
                       'those')
    if difference:
        say(f'--source of --ckpt {path}: not as it was there: {difference}')
    return images


def exact_flow(images, dataset, device, *, solver=None, nfe=None, tol=1e-4, schedule=None,
               z_min=None, to_data=None, small_z=None, classes=None, guidance=1.0, eta=0.0, seed=0):
    """The Flow of the exact field of all `images`, a data set known by the name `dataset`, in
    float64. The arguments are those of load_flow()."""
    keep_freed_memory()
    net = pfgm.ExactField(charges_of(images, '--exact', device, dtype=torch.float64))
    constants = dict(flow_constants(images, dataset), z_exp=0.0,  # its v_z needs no help
                     D=1.0, classes=0, channels=images.channels, image_size=images.image_size)
    if solver is None:
        solver = 'unipc' if nfe else 'rk45'
    flow = flow_of(net, constants, solver=solver, nfe=nfe or 100, tol=tol,
                   schedule=schedule or 'radius', to_data=to_data, z_last=z_min,
                   small_z=small_z or 'exact', guidance=guidance, eta=eta, seed=seed)
    flow.z_min = z_min or flow.z_min
    check_flow(flow, z_min, tol_least=1e-12, precision='float64, in which this field is computed,')
    flow.classes = tuple(class_numbers(classes, 0, None))
    return flow


def check_calls(student, solver, nfe):
    """BadInput for a solver or a number of calls, None where not given, that a student was not
    trained for. student: a field of Flow."""
    if student is None:
        return
    made_for = f'the network is a student of --{student}, trained for'
    if student == 'distill':
        if solver == 'rk45':
            raise BadInput(f'--solver rk45: {made_for} one call; leave it out')
        if nfe not in (None, 1):
            raise BadInput(f'--nfe {nfe}: {made_for} one call; leave it out')
        return
    is_one_call = nfe in (None, 1) and solver != 'rk45'
    if solver not in (None, 'renew') and not is_one_call:
        raise BadInput(f'--solver {solver}: {made_for} one call, from which only renew goes on; '
                       'leave it out')
    if nfe is not None and nfe > 2:
        say(f'--nfe {nfe}: {made_for} one or two calls, and more need not be better')


def check_flow(flow, z_min, tol_least, precision):
    """BadInput for what was asked of a flow that it does not take."""
    if flow.schedule == 'time' and not isinstance(flow.net, VP):
        raise BadInput('--schedule time: only vp, subvp, ddpm and rf have a time; give one of '
                       + ', '.join(pfgm.SCHEDULES))
    if flow.solver == 'ddim' and flow.D != math.inf:
        raise BadInput('--solver ddim: adds Gaussian noise, for D = inf only (vp, subvp, ddpm, rf, '
                       'pfgmpp with --D inf)')
    if flow.source is not None and flow.student is None:
        if flow.solver == 'renew':
            raise BadInput('--solver renew: this flow starts from images and has seen no noise; '
                           'give another')
        if flow.eta:
            raise BadInput(f'--eta {flow.eta}: this flow starts from images and has seen no noise; '
                           'leave it out')
    if z_min is not None and z_min >= flow.z_max:
        raise BadInput(f'--z_min {z_min}: must be below z_max {flow.z_max:.4g}')
    if flow.tol < tol_least:
        raise BadInput(f'--tol {flow.tol}: finer than the {precision} can tell; give {tol_least} '
                       'or more')
