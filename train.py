"""Train a Poisson flow on images.

    python train.py                                # digits drawn on the spot, 3 minutes on 2 cores
    python train.py --dataset photos/              # a folder, .zip, .npy or .npz of images
    torchrun --nproc_per_node=8 train.py --dataset cifar10 --compile   # the published CIFAR-10 run

Writes ckpt.pt, log.jsonl and sample grids to --out_dir; the same command again goes on from there.
The equations of PFGM, arXiv 2209.11178, are in pfgm.py and the network is in unet.py; the step that
puts them together is in main() below.
"""
import argparse
import contextlib
import copy
import json
import math
import os
import time
from typing import NamedTuple, Optional

from support import waiting

waiting.begin(__name__)  # a line where the imports below take long; Ctrl-C ends them in one line

import torch
import torch.distributed as dist

import pfgm
from support import options, published, students
from support.batches import Charges, charges_of, image_order, images_a_step, training_batches
from support.checkpoint import in_folder
from support.cli import BadInput, Parser, above, given_by, listed, say, unless
from support.cpu import speed_up
from support.flow import flow_of, load_flow
from support.images import Images, to_uint8
from support.methods import METHODS, VP, as_flow
from support.networks import ARCHITECTURE, build, for_classes
from support.optim import Muon, warm_decay
from support.pictures import write_grid
from support.processes import (AT_THE_END, agree, everywhere, fast_bf16, heard, listen, run, setup,
                               wait)
from support.run import (Meter, Origin, Saver, check_data, claim, open_log, open_run, progress,
                         restore_optimizer, sampling_command, stop_if_bad)
from support.seeds import fingerprint, rng_state, step_seed
from support.sets import SETS, load_images
from unet import UNet


# ---------------------------------------------------------------- presets

# For small images our presets switch on what the papers do not use: labels (classes), 2 x 2 pixel
# patches (patch), the skip connection of pfgm.PFGM (skip), the Muon optimizer (muon), a learning
# rate that falls to 0 (decay), and more points where the field is undecided (m_draws). The
# published presets leave all of them off.
GLYPHS = dict(
    nf=64, ch_mult=(1, 1), num_blocks=1, attn=(4,), dropout=0, ncsnpp=False,
    classes=True, label_first=False, patch=2, skip=False,
    steps=1400, batch_size=64, field_batch=1024, lr=1e-2, warmup=50, decay=1.0, muon=True,
    ema_decay=0.98, loss='sum', m_draws=4, sample_every=500,
    save_every=1000)
MNIST = dict(GLYPHS, attn=(7, 8), skip=True, field_batch=4096, steps=5000, sample_every=1000)

# The official code of PFGM, github.com/Newbeeer/Poisson_flow.
CIFAR10 = dict(
    nf=128, ch_mult=(1, 2, 2, 2), num_blocks=4, attn=(16,), dropout=0.1, ncsnpp=False,
    classes=False, label_first=False, patch=1, skip=False,
    steps=1300000, batch_size=128, field_batch=4096, lr=2e-4, warmup=5000, decay=0.0, muon=False,
    ema_decay=0.9999, loss='sum', m_draws=1, sample_every=5000,
    save_every=10000, **published.CIFAR10)
CIFAR10_DEEP = dict(CIFAR10, num_blocks=8)
CELEBA64 = dict(CIFAR10, field_batch=512, **published.CELEBA64)
LSUN_BEDROOM = dict(
    CIFAR10, ch_mult=(1, 1, 2, 2, 4, 4), num_blocks=2, dropout=0,
    steps=2400000, batch_size=32, field_batch=32, lr=2e-5, loss='mean', **published.LSUN_BEDROOM)

# The values of EDM, with which PFGM++ was trained, github.com/Newbeeer/pfgmpp.
CIFAR10_PP = dict(
    CIFAR10, ch_mult=(2, 2, 2), dropout=0.13,
    steps=390625, batch_size=512, lr=1e-3, warmup=19531, ema_decay=0.99929)
CIFAR10_NCSNPP = dict(CIFAR10_PP, ncsnpp=True, label_first=True)

PRESETS = dict(glyphs=GLYPHS, mnist=MNIST, cifar10=CIFAR10, cifar10_deep=CIFAR10_DEEP,
               celeba64=CELEBA64, lsun_bedroom=LSUN_BEDROOM, cifar10_pp=CIFAR10_PP,
               cifar10_ncsnpp=CIFAR10_NCSNPP)
# Any other data set takes the first of these whose pixels a side its images do not exceed.
BY_SIZE = {28: MNIST, 32: CIFAR10, 64: CELEBA64, math.inf: LSUN_BEDROOM}


# ---------------------------------------------------------------- flags

def parse_args(argv=None):
    """The flags. One that was not given, and that a preset, the data or a checkpoint may fill, is
    None."""
    first = Parser(add_help=False)  # parsed first: these two decide which preset --help shows
    first.add_argument('--dataset', default='glyphs', help='a folder, .zip, .npy or .npz of '
                       f'images, or one of {", ".join(SETS)}')
    first.add_argument('--preset', choices=PRESETS, help='whose values the flags below have where '
                       'they are not given (default: those for the data set, or for its size)')
    chosen, _ = first.parse_known_args(argv)
    p = Parser(usage='%(prog)s [--FLAG VALUE ...]', description=__doc__, parents=[first])
    yes_or_no = argparse.BooleanOptionalAction

    data = p.add_argument_group('data')
    data.add_argument('--data_dir', default='data', help='where known data sets are kept')
    data.add_argument('--image_size', type=above(0, int),
                      help='pixels a side (default: as the checkpoint to go on from, or the data)')
    data.add_argument('--channels', type=int, choices=(1, 3), help='1 for grey, 3 for colour '
                      '(default: as the checkpoint to go on from, or the data)')
    data.add_argument('--classes', action=yes_or_no,
                      help='train on the labels too; a tenth is hidden, for --guidance')
    data.add_argument('--flip', action=yes_or_no,
                      help='mirror half of the images (default: known sets as the papers have it, '
                      'others if in colour and without --classes)')
    data.add_argument('--workers', type=above(-1, int), default=4,
                      help='processes that read a set too large for memory')

    method = p.add_argument_group('method')
    method.add_argument('--method', choices=METHODS,
                        help='the flow (default: pfgm; pfgmpp with --D, --ncsnpp or --consistency; '
                        'rf with --source)')
    method.add_argument('--D', type=unless('inf', math.inf, above(1 - 1e-9)),
                        help='augmented dimensions of pfgmpp, 1 or more, or inf (default: 128)')
    method.add_argument('--field_batch', type=unless('all', 'all', above(0, int)),
                        help='how many charges define the target, or all; for other methods than '
                        'pfgm 1 unless given: each image is its own charge')
    method.add_argument('--init_from', type=in_folder, help='go on from the network of this '
                        "checkpoint, ours or one of the authors' (default: none)")
    method.add_argument('--reflow', type=in_folder, help='straighten the flow of this checkpoint: '
                        'train on pairs of noise and image that it makes (default: none)')
    method.add_argument('--distill', type=in_folder, help='train on such pairs of this checkpoint, '
                        'for samples of one network call, --nfe 1 (default: none)')
    method.add_argument('--pairs', type=above(0, int), default=100000,
                        help='how many pairs --reflow and --distill train on')
    method.add_argument('--guidance', type=above(-1e-9, below=1e3), default=1.0,
                        help='classifier-free guidance of the teacher of --reflow or --distill, '
                        'which its student learns')
    method.add_argument('--consistency', action=yes_or_no, default=False,
                        help='train for samples of one or two calls, without pairs')
    method.add_argument('--source', help='a data set whose images, in place of noise, flow to '
                        'those of --dataset, by --method rf (default: none)')

    network = p.add_argument_group('network')
    network.add_argument('--nf', type=above(0, int, 1025), help='channels of the first level')
    network.add_argument('--ch_mult', type=above(0, int, 17), nargs='+',
                         help='channels of each level, as multiples of --nf')
    network.add_argument('--num_blocks', type=above(0, int, 33), help='residual blocks a level')
    network.add_argument('--attn', type=above(0, int), nargs='*',
                         help='sizes of an image, in pixels or --patch a side, with attention')
    network.add_argument('--dropout', type=above(-1e-9, below=1), help='in residual blocks')
    network.add_argument('--ncsnpp', action=yes_or_no, help='NCSN++ in place of DDPM++: Fourier '
                         'features of the noise level, FIR filters, a pyramid')

    training = p.add_argument_group('run')
    training.add_argument('--steps', type=above(0, int), help='updates in all')
    training.add_argument('--batch_size', type=above(0, int),
                          help='points a step, over all processes')
    training.add_argument('--accum', type=above(0, int), default=1,
                          help='parts, one after the other, in which a process takes its points')
    training.add_argument('--lr', type=above(0), help='learning rate')
    training.add_argument('--warmup', type=above(-1, int), help='steps in which lr rises from 0')
    training.add_argument('--grad_clip', type=above(0), default=1.0, help='largest gradient norm')
    training.add_argument('--ema_decay', type=above(-1e-9, below=1),
                          help='what the averaged weights keep of themselves in a step')
    training.add_argument('--seed', type=above(-1, int), default=0,
                          help='decides the first weights, the order of images and all noise')
    training.add_argument('--device', default='auto', help='auto, cpu, cuda, cuda:1 or mps')
    training.add_argument('--deterministic', action=yes_or_no, default=False,
                          help='on a GPU the same numbers each time, by slower kernels')
    training.add_argument('--bf16', action=yes_or_no,
                          help='bfloat16 autocast (default: where it is fast)')
    training.add_argument('--compile', nargs='?', const='default',
                          choices=('default', 'reduce-overhead'),
                          help='torch.compile the network, in this mode of it: reduce-overhead '
                          'makes CUDA graphs, for few images a GPU (default: off)')
    training.add_argument('--timeout', type=above(0), default=600.0,
                          help='seconds after which a silent process ends the job')

    output = p.add_argument_group('output')
    output.add_argument('--out_dir', default='out',
                        help='where the checkpoint, log and sample grids go')
    output.add_argument('--log_every', type=above(0, int), default=50,
                        help='steps between log lines')
    output.add_argument('--sample_every', type=above(-1, int),
                        help='steps between sample grids; 0: none')
    output.add_argument('--save_every', type=above(0, int),
                        help='steps between checkpoints')
    output.add_argument('--keep', type=above(0, int), default=2,
                        help='checkpoints to keep: ckpt.pt and those before it')

    fields = p.add_argument_group('preset fields', 'what few runs change: other fields of the '
                                  'presets, and constants of the flow')
    fields.add_argument('--patch', type=above(0, int, 65),
                        help='squares of so many pixels a side are one pixel to the network')
    fields.add_argument('--label_first', action=yes_or_no,
                        help='add the label to the noise level before the first linear layer')
    fields.add_argument('--skip', action=yes_or_no, help='pfgm: far from the data the network '
                        'adds to the field of one charge at 0')
    fields.add_argument('--muon', action=yes_or_no,
                        help="move the network's matrices as Muon does, not as Adam")
    fields.add_argument('--decay', type=above(-1e-9, below=1 + 1e-9),
                        help='the last part of the steps, 0 to 1, in which lr falls to 0')
    fields.add_argument('--loss', choices=('sum', 'mean'),
                        help='half the sum of the squared errors of a point, or their mean')
    fields.add_argument('--m_draws', type=above(0, int, 17),
                        help='the exponent m is the mean of so many uniform draws')
    fields.add_argument('--M', type=above(0, int, 10 ** 6),
                        help='largest exponent of the perturbation')
    fields.add_argument('--z_max', type=above(0), help='where sampling starts')
    fields.add_argument('--upper_norm', type=above(0), help='largest |x| there')
    fields.add_argument('--z_exp', type=above(-1e-9),
                        help='below this z, v_z is computed, not predicted')
    fields.add_argument('--z_min', type=above(0),
                        help='where sampling ends (default: 1e-3; pfgmpp: 0.002 sqrt(D))')
    fields.add_argument('--sigma', type=above(1e-9), help='noise at m = 0 (default: 0.01)')
    fields.add_argument('--tau', type=above(1e-9),
                        help='the noise grows by (1 + tau)^m (default: 0.03)')
    fields.add_argument('--gamma', type=above(-1e-9),
                        help='added to the norm of the field (default: 5)')
    fields.add_argument('--sigma_data', type=above(0, below=1e3),
                        help='spread of the data, of pfgmpp (default: 0.5)')
    fields.add_argument('--data_norm', type=above(0),
                        help='mean norm of the images, of pfgmpp with a finite D')
    show_defaults(p, PRESETS.get(chosen.preset or chosen.dataset, {}))
    return p.parse_args(argv)


def show_defaults(parser, preset):
    """Let the help of each flag end in its default, or in the value that the preset gives it."""
    for flag in parser._actions:
        if flag.dest in GLYPHS or flag.dest in options.BY_DATA:
            flag.help += f' (preset: {preset.get(flag.dest, "by the data")})'
        elif flag.default not in (None, argparse.SUPPRESS) and 'default: ' not in flag.help:
            flag.help += f' (default: {flag.default})'


# ---------------------------------------------------------------- before the loop

def load_source(flags, given, images, origin):
    """The Images of --source, or of the checkpoint's where it is not given; None for noise."""
    if not flags['source']:
        return None
    flag = '--source' if 'source' in given else f'--source of --{origin.flag}'
    try:
        return load_images(flags['source'], flags['data_dir'], images.image_size, images.channels,
                           flag=flag, size_is_fixed=images.size_is_fixed)
    except BadInput as error:
        if 'source' in given:
            raise
        raise BadInput(f'{error}; if it has moved, give --source') from error


class Start(NamedTuple):
    """What training starts from."""
    flags: dict                # with nothing left open
    images: Images             # the data set
    source: Optional[Charges]  # what a flow from another data set starts from, in place of noise
    origin: Origin             # the checkpoint
    step: int                  # that it has reached


def prepare(flags, device, world):
    """Read the checkpoint to go on from and the data, and fill the flags that were left open.

    flags: the mapping of flags as parsed. world: the number of processes. Raises BadInput for flags
    that contradict one another, the data, or the checkpoint."""
    given = flags['given']
    origin = open_run(flags['out_dir'], reflow=flags['reflow'], distill=flags['distill'],
                      init_from=flags['init_from'], consistency=flags['consistency'])
    saved = origin.saved['args'] if origin.saved else {}
    size = flags['image_size'] or saved.get('image_size')
    channels = flags['channels'] or saved.get('channels')
    images = load_images(flags['dataset'], flags['data_dir'], size, channels,
                         size_is_fixed=size != flags['image_size'])
    if not flags['source']:
        flags['source'] = options.taken_over(flags, saved).get('source')
    source = load_source(flags, given, images, origin)
    check_data(origin, images, source, given)
    flags.update(data=images.identity, class_names=images.classes,
                 source_data=None if source is None else source.identity)

    preset = PRESETS.get(flags['preset'] or flags['dataset'])
    if preset is None:
        preset = next(preset for size, preset in BY_SIZE.items() if images.image_size <= size)
    flags = options.fill(flags, preset, flags['dataset'] in PRESETS, images, origin)
    if origin.resumed:  # first, since it tells what was left out
        options.check_resume(flags, saved, given)
    flags = options.without_unused(flags, given, images, origin)
    options.check_batches(flags, given, world)
    if origin.saved and not origin.resumed:
        options.check_origin(flags, origin, given)
        if options.has_other_classes(flags, saved):
            origin = origin._replace(saved=for_classes(origin.saved, flags['classes']))

    step = 0
    weights = None
    if origin.saved:
        step = origin.saved['step']
        weights = f'{fingerprint(origin.saved["net"].values()):08x}'
    its_own = ('out_dir', 'data_dir', 'device')  # may differ from process to process
    same = {key: value for key, value in flags.items() if key not in its_own}
    agree(f'--out_dir {flags["out_dir"]}', 'give all processes the same flags and data, and an '
          '--out_dir that all machines share, or copies of its ckpt.pt', step=step,
          images=len(images), weights=weights, **same)
    if step >= flags['steps']:
        typed = given.get('steps', origin.given)
        raise BadInput(f'{typed}: {origin.path} has {step} already, of {flags["steps"]}; give more '
                       '--steps, or sample from it with: '
                       + sampling_command(origin.path, flags))
    if source is not None:
        source = charges_of(source, source.flag, device)
    return Start(flags, images, source, origin, step)


def networks(flags, origin, device):
    """(the network, its average), from a checkpoint or new."""
    if origin.saved:
        raw = build(origin.saved['net'], flags, origin.path)
        ema = build(origin.saved['ema'], flags, origin.path)
    else:
        try:
            raw = speed_up(UNet(**{key: flags[key] for key in ARCHITECTURE}))
        except ValueError as error:  # its message begins with the name of a flag
            raise BadInput(f'--{error}') from error
        ema = copy.deepcopy(raw)
    raw = raw.to(device, memory_format=torch.channels_last)
    ema = ema.to(device, memory_format=torch.channels_last)
    return raw.train(), ema.eval().requires_grad_(False)


def open_folder(out_dir, start, batch_size):
    """Make the folder this run's own -> (its log, how many images it has seen by step `start`)."""
    try:
        os.makedirs(out_dir, exist_ok=True)
        claim(out_dir)
        return open_log(out_dir, start, batch_size)
    except OSError as error:
        raise BadInput(f'--out_dir {out_dir}: cannot write there ({error})') from error


def description(args, images, parameters, start, command, device, world):
    """One line on what is about to be trained. parameters: how many the network has. command: that
    samples what there is at step `start`."""
    size = args.image_size
    line = f'{images.name}: {len(images)} images of {size} x {size} x {args.channels}'
    if args.classes:
        line += f' in {args.classes} classes ({listed(args.class_names or "?")[:500]})'
    if args.flip and not (args.reflow or args.distill):
        line += ', half of them mirrored (--no-flip: none)'
    elif images.flip and not images.is_known_set and args.classes:
        line += ', none mirrored (--flip: half of them)'
    line += f'; {parameters:,} parameters; {args.method}: '
    if args.method == 'pfgm':
        line += (f'M {args.M}, upper_norm {args.upper_norm:.4g}, z_exp {args.z_exp:.3g}, '
                 f'field of {args.field_batch} charges')
    else:
        line += f'D {args.D:g}'
    line += f', z_max {args.z_max:.3g}; {world} x {device}'
    if args.bf16:
        line += ', bf16'
    if start:
        line += f'; going on from step {start}, which can be sampled with: {command}'
    return line


def pairs_for_student(args, start, device, rank, world):
    """The pairs that --reflow or --distill is trained on, made by the teacher."""
    path = args.reflow or args.distill
    flag = '--reflow' if args.reflow else '--distill'
    with given_by(flag):
        teacher = load_flow(path, device, data_dir=args.data_dir, source=args.source,
                            source_flag='--source', nfe=students.PAIR_NFE,
                            guidance=args.guidance, seed=args.seed, bf16=args.bf16)
    say(f'the student is {args.method} of D {args.D:g}, from the noise and weights of its teacher, '
        f'{teacher.method}')
    pairs = students.pairs_of_teacher(teacher, args.pairs, os.path.join(args.out_dir, 'pairs'),
                                      f'{flag} {path}', args.batch_size, device, rank, world)
    if rank == 0 and start == 0 and isinstance(teacher.net, VP):
        bent = students.straightness(teacher, 16, args.batch_size, device)
        print(f'the teacher: straightness {bent:.4f} (0 is straight)', flush=True)
    return pairs


def write_samples(path, ema, flags, source, device):
    """Write a PNG of the first 36 images that sample.py makes of the average as it is now: with
    --nfe 20, or of a student in one call. source: the images that it starts from, or None."""
    nfe = 1 if flags['distill'] or flags['consistency'] else 20
    flow = flow_of(as_flow(ema, flags), flags, seed=flags['seed'], nfe=nfe, source=source)
    x, _ = flow.follow(flow.prior(range(36)), device, range(36))
    write_grid('--out_dir', path, to_uint8(x))


def learning_rate(step, lr, steps, warmup, decay):
    """The learning rate of step 1 ... steps. It rises to lr in the first `warmup` steps, stays, and
    falls to 0 in the last part `decay` of the steps."""
    rising = step / max(warmup, 1)
    falling = (steps + 1 - step) / max(decay * steps, 1)
    return lr * min(rising, falling, 1)


# ---------------------------------------------------------------- the run

def main(args):
    # devices and processes
    device, rank, world = setup(args.device, args.timeout, deterministic=args.deterministic)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = not args.deterministic  # shapes stay as they are
    if args.bf16 is None:
        args.bf16 = fast_bf16(device)

    # the checkpoint to go on from, data, and flags
    flags, images, source, origin, start = prepare(vars(args), device, world)
    args = argparse.Namespace(**flags)
    path = os.path.join(args.out_dir, 'ckpt.pt')

    # the network, as the flow that it stands for
    raw, ema = networks(flags, origin, device)
    flow = as_flow(raw, flags)
    net = flow
    if args.compile:
        flow.compile(mode=args.compile)
    if world > 1:  # a compiled flow is split where gradients are sent, which goes on beside it
        net = torch.nn.parallel.DistributedDataParallel(flow)

    # the optimizer, and the random state of dropout
    fused = device.type != 'mps'
    if args.muon:
        opt = Muon(raw, lr=args.lr, fused=fused)
    else:
        opt = torch.optim.Adam(raw.parameters(), lr=args.lr, fused=fused)
    torch.manual_seed(step_seed(args.seed + 1 + rank, start))
    if origin.saved and 'opt' in origin.saved:
        restore_optimizer(opt, origin.saved, device, rank)
    origin = None  # lets go of the checkpoint, whose optimizer state was copied

    # the folder: every process has looked at it, since all agree
    if rank == 0:
        log, images_seen = open_folder(args.out_dir, start, args.batch_size)
        parameters = sum(p.numel() for p in raw.parameters())
        command = sampling_command(path, flags)
        print(description(args, images, parameters, start, command, device, world), flush=True)
    pairs = None
    if args.reflow or args.distill:
        pairs = pairs_for_student(args, start, device, rank, world)
    else:
        images.hold()

    # the loop
    mine = slice(rank * args.batch_size // world, (rank + 1) * args.batch_size // world)
    batches = training_batches(images, args.batch_size, args.field_batch, args.seed, start,
                               flip=args.flip, classes=args.classes, workers=args.workers,
                               device=device, rank=rank, world=world, source=source, pairs=pairs)

    def images_of(step):
        """The numbers of this rank's images in a step, to tell which made it fail."""
        count = images_a_step(args.batch_size, args.field_batch)
        return next(image_order(len(pairs or images), count, args.seed, step - 1))[mine]

    if args.compile:
        say('--compile: the first steps compile the network, which may take minutes')
        if args.compile == 'reduce-overhead' and device.type != 'cuda':
            say(f'--compile reduce-overhead: there are no CUDA graphs on {device.type}; it does '
                'there what --compile does')
    signals = listen()
    meter = Meter(device, flow.unit)
    last_logged = start
    saver = Saver(path, start, args.keep, device)  # writes while the next steps are made
    clock = time.time()
    step = start
    AT_THE_END.enter_context(waiting.doing(lambda: f'step {step}/{args.steps}'))
    for step in range(start + 1, args.steps + 1):
        lr = learning_rate(step, args.lr, args.steps, args.warmup, args.decay)
        for group in opt.param_groups:
            group['lr'] = lr

        # Images, moved off the plane. Every rank draws the same noise for all B of them, and goes
        # on with the b that are its own.
        batch = next(batches)                                        # batches.Batch
        # Students, sources and labels enter here. Pairs and sources bring their own noise. A label
        # is seen by the network, and its field is that of the charges with this label. Consistency
        # training aims at the image that the network itself makes of the same line at a lower z.
        if batch.eps is None:
            moved, z = flow.perturb(batch.clean, batch.generator)    # (B, C, S, S), (B,)
        else:
            moved, z = flow.perturb(batch.clean, batch.generator, batch.eps)
        clean, moved, z = batch.clean[mine], moved[mine], z[mine]    # (b, C, S, S), (b,)
        labels = () if batch.labels is None else (batch.labels[mine],)
        among = None if batch.among is None else batch.among[mine]
        charges = batch.charges
        weight = flow.weight(moved, z)                               # (b,)
        if args.consistency:
            stage = 1 + 8 * (step - 1) // args.steps                 # the levels come closer
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                clean, share = students.at_lower_level(flow, clean, moved, z, labels, stage)
            charges = None
            weight = weight / (1 - share)

        # Target: the field that the network should have there.
        target_x, target_z = flow.target(moved, z, clean, charges, among)

        # Network and loss, in --accum parts.
        losses = []
        part_size = len(z) // args.accum
        for first in range(0, len(z), part_size):
            part = slice(first, first + part_size)
            is_last = part.stop == len(z)                            # ranks add up gradients then
            sync = contextlib.nullcontext() if is_last or world == 1 else net.no_sync()
            with sync:
                with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                    field = net(moved[part], z[part], *[label[part] for label in labels])
                    target = (target_x[part], target_z[part])
                    loss = pfgm.field_loss(field, target, weight[part], args.loss)
                (loss.mean() / args.accum).backward()
            losses.append(loss.detach())

        # Update of the network, and of its average, which warms up.
        norm = torch.nn.utils.clip_grad_norm_(raw.parameters(), args.grad_clip)
        opt.step()
        opt.zero_grad(set_to_none=True)
        ema_decay = min(args.ema_decay, warm_decay(step))
        with torch.no_grad():  # else every step would hang one more graph on the average
            torch._foreach_lerp_(list(ema.parameters()), list(raw.parameters()), 1 - ema_decay)
        meter.observe(step, z, torch.cat(losses), norm)

        # Log, sample, save.
        asked = heard(signals, step, world)
        stop = step == args.steps or asked == 'leave'
        logs = stop or step % args.log_every == 0
        samples = args.sample_every > 0 and step % args.sample_every == 0
        saves = stop or asked == 'save' or step % args.save_every == 0
        if logs or samples or saves:
            stop_if_bad(meter, images_of, path, args.lr, args.bf16)
        if logs:
            if world > 1:
                dist.all_reduce(meter.sums)
            if rank == 0:
                images_since = (step - last_logged) * args.batch_size
                images_seen += images_since
                row = progress(meter, step, args.steps, images_seen,
                               images_since / (time.time() - clock), args.batch_size, lr, device)
                log.write(json.dumps(row) + '\n')
            meter = Meter(device, flow.unit)
            last_logged = step
            clock = time.time()
        if samples and rank == 0:
            grid = os.path.join(args.out_dir, f'step{step:07d}.png')
            write_samples(grid, ema, flags, source, device)
        if saves:
            rng = everywhere(rng_state(device))
            if rank == 0:
                saver.save(dict(net=raw.state_dict(), ema=ema.state_dict(), opt=opt.state_dict(),
                                step=step, args=flags, rng=rng))
        saver.check()
        if stop:
            break
    saver.wait()
    wait()  # so that where it could not be saved, no other process has left already
    line = f'saved {path} at step {step}'
    if step < args.steps:
        line += ', from which the same command goes on'
    say(f'{line}; sample with: {sampling_command(path, flags)}')


if __name__ == '__main__':
    run(main, parse_args())
