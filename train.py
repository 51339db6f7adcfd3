"""Train a Poisson flow on images.

    python train.py                                # digits drawn on the spot, 5 minutes on 2 cores
    python train.py --dataset photos/              # a folder, .zip, .npy or .npz of images
    torchrun --nproc_per_node=8 train.py --dataset cifar10         # the published CIFAR-10 run

Writes ckpt.pt, log.jsonl and sample grids to --out_dir. The same command again goes on where the
last one stopped. PFGM: arXiv 2209.11178; its equations are in pfgm.py, its network in unet.py, and
what a step is trained on, its loss and its update in baselines.py, for PFGM and the others.
"""
import argparse
import contextlib
import copy
import json
import math
import os
import signal
import time

import torch
import torch.distributed as dist

import data as datasets
import pfgm
from baselines import (METHODS, PFGM, Muon, as_flow, field_loss, pairs_of_teacher, training_point,
                       update)
from checkpoint import (ARCHITECTURE, build, claim, keep_older, load_checkpoint, open_log, open_run,
                        save)
from cpu import speed_up
from launch import (CLASS_LIMIT, BadInput, Parser, above, agree, everywhere, fast_bf16,
                    fingerprint, listen, peak_memory, run, setup, step_seed, write)
from unet import UNet

# One row a data set; any other takes the row of its size. cifar10 to lsun_bedroom are the values
# of the official code (with data.OFFICIAL), cifar10_pp EDM's for PFGM++.
S, L, LONG = (1, 2, 2, 2), (1, 1, 2, 2, 4, 4), (2e-4, 5000, .9999)
OURS, AS_PUBLISHED = (2, 1.0, 3, True), (1, 0.0, 1, False)  # patch, decay, m_draws, muon
PRESETS = {name: dict(zip((
    'nf', 'ch_mult', 'num_blocks', 'attn', 'dropout', 'batch_size', 'field_batch', 'lr', 'warmup',
    'ema_decay', 'steps', 'sample_every', 'loss', 'patch', 'decay', 'm_draws', 'muon'),
    (*row, *AS_PUBLISHED))) for name, row in {
    # name         nf  mult  bl attn drop batch field lr warm-up ema  steps  grids  loss
    'glyphs':       (64, (1, 1), 1, (4,), 0, 64, 1024, 1e-2, 50, .98, 1300, 400, 'sum', *OURS),
    'mnist':        (64, (1, 1), 1, (7, 8), 0, 64, 4096, 1e-2, 50, .98, 4000, 1000, 'sum', *OURS),
    'cifar10':      (128, S, 4, (16,), .1, 128, 4096, *LONG, 1300000, 5000, 'sum'),
    'cifar10_deep': (128, S, 8, (16,), .1, 128, 4096, *LONG, 1300000, 5000, 'sum'),
    'celeba64':     (128, S, 4, (16,), .1, 128, 512, *LONG, 1300000, 5000, 'sum'),
    'lsun_bedroom': (128, L, 2, (16,), 0, 32, 32, 2e-5, 5000, .9999, 2400000, 5000, 'mean'),
    'cifar10_pp':   (128, S[1:], 4, (16,), .13, 512, 4096, 1e-3, 19531, .99929, 390625, 5000,
                     'sum'),
}.items()}
BY_DATA = ('M', 'z_max', 'upper_norm', 'z_exp')  # data.flow_constants
# What may change on resume:
TUNED = ('lr', 'warmup', 'decay', 'grad_clip', 'batch_size', 'accum', 'workers')
FREE_ON_RESUME = {'out_dir', 'data_dir', 'steps', 'device', 'bf16', 'compile', 'log_every',
                  'sample_every', 'save_every', 'keep', 'timeout', 'init_from', *TUNED}
Z_BINS = (0.01, 0.1, 1.0, 10.0)  # the loss is also logged by z, split here


def count_or_all(text):
    return text if text == 'all' else above(0, int)(text)


def dimensions(text):
    return math.inf if text == 'inf' else above(1 - 1e-9)(text)


def parse_args(argv=None):
    pre = Parser(add_help=False)
    pre.add_argument('--dataset', default='glyphs', help='a folder, .zip, .npy or .npz of images, '
                     f'or one of {", ".join(datasets.SETS)}')
    pre.add_argument('--preset', choices=PRESETS, help='row of defaults (by data set, else size)')
    known = pre.parse_known_args(argv)[0]
    preset = known.preset or known.dataset
    row = {**PRESETS.get(preset, {}), **dict(zip(BY_DATA, datasets.OFFICIAL.get(preset, ())))}
    p = Parser(description=__doc__, parents=[pre])

    def flag(name, kind, default, text, **kw):
        if name in (*PRESETS['glyphs'], *BY_DATA):  # None until resolve(), when the data is known
            value = row.get(name)
            text += f' (preset: {"by the data" if value is None else value})'
        elif default is not None:
            text += f' (default: {default})'
        kw = {'type': kind, **kw} if kind else {'action': argparse.BooleanOptionalAction, **kw}
        p.add_argument(f'--{name}', default=default, help=text.replace('%', '%%'), **kw)
    flag('data_dir', str, 'data', 'where known data sets are kept')
    flag('out_dir', str, 'out', 'where the checkpoint, log and sample grids go')
    flag('image_size', above(0, int), None, 'pixels a side (default: as the data is)')
    flag('channels', int, None, 'grey or colour (default: as the data is)', choices=(1, 3))
    flag('method', str, None, 'what is trained (default: pfgm, with --D pfgmpp)', choices=METHODS)
    flag('D', dimensions, None, 'augmented dimensions of pfgmpp, 1 or more, or inf (default: 128)')
    flag('classes', None, False, 'train on the labels too; a tenth is left out, for --guidance')
    flag('flip', None, None, 'mirror half of the images (default: as the data is)')
    flag('reflow', str, None, 'straighten this checkpoint of rf: train on pairs that it makes')
    flag('distill', str, None, 'the same, into samples of one call (--nfe 1)')
    flag('pairs', above(0, int), 100000, 'noise and images of --reflow and --distill')
    flag('init_from', str, None, 'go on from this checkpoint, ours or an official one')
    flag('seed', above(-1, int), 0, 'of the weights, the order of images and all noise')
    flag('device', str, 'auto', 'auto, cpu, cuda, cuda:1 or mps')
    flag('bf16', None, None, 'bfloat16 autocast (default: where it is fast)')
    flag('compile', None, False, 'torch.compile the network')
    flag('workers', above(-1, int), 4, 'processes that read a set too large for memory')
    flag('nf', above(0, int, 1025), None, 'channels of the first level')
    flag('ch_mult', above(0, int, 17), None, 'their multiple at each level', nargs='+')
    flag('num_blocks', above(0, int, 33), None, 'residual blocks a level')
    flag('attn', above(0, int), None, 'image sizes with attention', nargs='*')
    flag('patch', above(0, int, 65), None, 'pixels a side that the network takes as one')
    flag('dropout', above(-1e-9, below=1), None, 'in residual blocks')
    flag('steps', above(0, int), None, 'updates in all')
    flag('batch_size', above(0, int), None, 'points a step, over all processes')
    flag('accum', above(0, int), 1, 'micro-batches a process splits its share into')
    flag('field_batch', count_or_all, None, 'charges that define the target, or all (of other '
         'methods than pfgm by default 1, each image its own)')
    flag('lr', above(0), None, "Adam's learning rate")
    flag('warmup', above(-1, int), None, 'steps in which lr rises from 0')
    flag('decay', above(-1e-9, below=1 + 1e-9), None, 'last part of the steps, 0 to 1, in which lr '
         'falls to 0')
    flag('muon', None, None, "move the network's matrices as Muon does, not Adam")
    flag('grad_clip', above(0), 1.0, 'largest gradient norm')
    flag('ema_decay', above(-1e-9, below=1), None, 'of the averaged weights')
    flag('loss', str, None, 'half the sum over components, or mean', choices=('sum', 'mean'))
    flag('M', above(0, int, 10 ** 6), None, 'largest exponent of the perturbation')
    flag('m_draws', above(0, int, 17), None, 'm is the mean of so many uniform draws')
    flag('z_max', above(0), None, 'where sampling starts')
    flag('upper_norm', above(0), None, 'largest |x| there')
    flag('z_exp', above(-1e-9), None, 'below it v_z is computed, not predicted')
    flag('z_min', above(0), None, 'where sampling ends (default: 1e-3; pfgmpp: 0.002 sqrt(D))')
    flag('sigma_data', above(0, below=1e3), 0.5, 'spread of the data, of pfgmpp')
    flag('sigma', above(1e-9), 0.01, 'noise at m = 0')
    flag('tau', above(1e-9), 0.03, 'growth of the noise, (1 + tau)^m')
    flag('gamma', above(-1e-9), 5.0, 'added to the norm of the field')
    flag('log_every', above(0, int), 50, 'steps between log lines')
    flag('sample_every', above(-1, int), None, 'steps between sample grids; 0: none')
    flag('save_every', above(0, int), 1000, 'steps between checkpoints')
    flag('keep', above(0, int), 2, 'checkpoints to keep: ckpt.pt and those before it')
    flag('timeout', above(0), 600.0, 'seconds after which a silent process ends the job')
    return p.parse_args(argv)


def resolve(args, images, saved, world):
    """Fill the flags left open, from the checkpoint, the preset row or the data, and check them."""
    sizes = ((28, 'mnist'), (32, 'cifar10'), (64, 'celeba64'), (math.inf, 'lsun_bedroom'))
    by_size = next(name for size, name in sizes if images.image_size <= size)
    name = args.preset or args.dataset
    teacher = args.reflow or args.distill
    args.method = args.method or ('rf' if teacher else 'pfgmpp' if args.D else 'pfgm')
    if teacher and args.init_from:
        raise BadInput(f'--init_from {args.init_from}: --reflow and --distill go on from their '
                       'teacher; leave it out')
    if teacher and (args.method != 'rf' or args.reflow and args.distill):
        raise BadInput(f'--{"reflow" if args.reflow else "distill"} {teacher}: belongs to --method '
                       f'rf, not {args.method}; and --reflow and --distill are two runs')
    if args.D and args.method != 'pfgmpp':
        raise BadInput(f'--D {args.D:g}: belongs to --method pfgmpp, not {args.method}')
    args.D = args.D or {'pfgm': 1.0, 'pfgmpp': 128.0}.get(args.method, math.inf)
    row = dict(PRESETS[name if name in PRESETS else by_size])
    if args.method == 'pfgm':
        row.update(datasets.flow_constants(images, name, args.sigma, args.tau, args.gamma))
    else:  # constants that do not depend on the data, and no charge but the image itself
        flow = as_flow(None, vars(args))
        row.update(field_batch=1, upper_norm=None, z_exp=0.0, z_min=flow.low * flow.unit,
                   z_max=flow.high * flow.unit)
        if teacher and args.field_batch not in (None, 1):
            raise BadInput(f'--field_batch {args.field_batch}: the pairs of --reflow and --distill '
                           'have no charges; leave it out')
    if saved:
        kept = *ARCHITECTURE, 'muon'
        row.update({k: saved['args'][k] for k in kept if k in saved['args']})
        args.classes = saved['args']['classes'] > 0 if teacher else args.classes
    args.image_size, args.channels = images.image_size, images.channels
    args.flip = images.flip if args.flip is None else args.flip
    if args.classes and images.labels is None:
        raise BadInput(f'--classes: {images.name} has no labels; give a folder with one folder a '
                       'class, or leave it out')
    labels = images.labels.unique() if args.classes else []
    args.classes = len(labels)
    if args.classes > CLASS_LIMIT or list(labels) != list(range(args.classes)):
        raise BadInput(f'--classes: {args.classes} labels from {labels[0]} to {labels[-1]}; '
                       f'accepted: 0, 1, 2, ... with none left out, at most {CLASS_LIMIT}')
    for key, value in row.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    alone = args.field_batch == 1 and args.method != 'pfgm'
    if not alone and args.field_batch != 'all' and args.field_batch >= len(images):
        args.field_batch = len(images) if images.pixels is None else 'all'
    if args.z_min >= args.z_max:
        raise BadInput(f'--z_min {args.z_min}: must be below --z_max {args.z_max:.4g}')
    if args.batch_size % (world * args.accum):
        raise BadInput(f'--batch_size {args.batch_size}: must be a multiple of '
                       f'{world} processes x --accum {args.accum}')
    if not alone and args.field_batch != 'all' and args.field_batch < args.batch_size:
        raise BadInput(f'--field_batch {args.field_batch}: the {args.batch_size} points of a step '
                       'are among its charges; at least --batch_size')


def check_resume(args, old):
    """A flag that changes what is trained must be what it was."""
    for key in (key for key in vars(args) if key in old and key not in FREE_ON_RESUME):
        a, b = (list(v) if isinstance(v, tuple) else v for v in (getattr(args, key), old[key]))
        if a != b:
            raise BadInput(f'--{key} {a}: the run in --out_dir {args.out_dir} has {b}; keep it, '
                           'or give another --out_dir')
    changed = [f'--{key} {getattr(args, key)} (it was {old[key]})' for key in TUNED
               if key in old and getattr(args, key) != old[key]]
    if changed and os.environ.get('RANK', '0') == '0':
        print(f'going on with {", ".join(changed)}', flush=True)
    if args.decay and args.steps > old['steps'] and os.environ.get('RANK', '0') == '0':
        print(f'--steps {args.steps} (it was {old["steps"]}): the learning rate falls to 0 there '
              'only; it rises again', flush=True)


def check_origin(args, old, path):
    """A flag that contradicts the checkpoint whose network is taken."""
    for key in ('method', 'nf', 'ch_mult', 'num_blocks', 'classes', 'patch', 'muon'):
        a, b = (list(v) if isinstance(v, tuple) else v for v in (getattr(args, key), old[key]))
        if a != b:
            raise BadInput(f'--{key} {a}: {path} has {b}; take that')


# ---------------------------------------------------------------- the data of a step

def shuffled_pairs(pairs, args, step, device):
    """Endless (y (B, C, S, S), classes or None, generator, eps like y) of step, step + 1, ..."""
    for order in datasets.image_order(len(pairs), args.batch_size, args.seed, step):
        y, eps = (part.to(device) for part in pairs[order])
        generator = torch.Generator(device).manual_seed(step_seed(args.seed, step))
        yield y, (order % args.classes).to(device) if args.classes else None, generator, eps
        step += 1


def training_steps(images, flow, args, step, place):
    """Endless training_point()s for this process. images may be the Pairs of --reflow."""
    device, rank, world = place
    B, all_charges = args.batch_size, args.field_batch == 'all'
    mine = slice(rank * B // world, (rank + 1) * B // world)
    charges = kinds = None
    if all_charges:
        if images.pixels is None:
            raise BadInput(f'--field_batch all: {len(images)} images do not fit in memory; '
                           'give a number of charges')
        images.pixels = images.pixels.to(device)
        charges = datasets.Charges(images.pixels, args.flip)
        kinds = images.labels.to(device).repeat(1 + args.flip) if args.classes else None
    count = B if all_charges else max(B, args.field_batch)
    source = (shuffled_pairs(images, args, step, device) if args.reflow or args.distill else
              datasets.shuffled_images(images, count, args, step, device, rank, world))
    for x, kind, generator, *eps in source:
        if args.field_batch not in ('all', 1):
            charges, kinds = x, kind
        labels = kind is not None and (kind[:B], kind if kinds is None else kinds)
        yield training_point(flow, x[:B], generator, mine, charges, labels, eps=eps)


def learning_rate(args, step):
    """Of step 1 ... --steps: up in --warmup steps, and down in the last part --decay of all."""
    down = (args.steps + 1 - step) / max(args.decay * args.steps, 1)
    return args.lr * min(step / max(args.warmup, 1), down, 1)


# ---------------------------------------------------------------- what a run keeps and says

def rng_state(device):
    """The states of the generators that dropout draws from: the CPU's, and the GPU's."""
    states = [torch.get_rng_state()]
    if device.type == 'cuda':
        states.append(torch.cuda.get_rng_state(device))
    elif device.type == 'mps' and torch.backends.mps.is_built():
        states.append(torch.mps.get_rng_state())
    return states


def restore(opt, saved, device, rank):
    """The states of the optimizer and of this rank's generators, as they were."""
    try:
        groups = [dict(g, fused=device.type != 'mps') for g in saved['opt']['param_groups']]
        opt.load_state_dict(dict(saved['opt'], param_groups=groups))
        for p, state in opt.state.items():
            for key in ('exp_avg', 'exp_avg_sq'):
                if state[key].shape != p.shape:
                    raise ValueError(f'{key} is {tuple(state[key].shape)}, not {tuple(p.shape)}')
                # fused Adam pairs what lies at the same place in memory, whatever the strides
                state[key] = torch.empty_like(p).copy_(state[key])
            if not 1 <= float(state['step']) < 2 ** 31:
                raise ValueError(f'step is {float(state["step"])}')
        if rank < len(saved.get('rng', [])):
            torch.set_rng_state(saved['rng'][rank][0])
            for state in saved['rng'][rank][1:] if device.type != 'cpu' else ():
                torch.get_device_module(device).set_rng_state(state)
    except Exception as error:  # load_state_dict checks next to nothing itself
        raise BadInput(f'the checkpoint is damaged: opt or rng do not fit '
                       f'({repr(error)[:150]})') from error


def sample_grid(net, args, device, path):
    """A PNG of what the network makes now: 36 images from fixed noise, 20 calls."""
    shape = (36, args.channels, args.image_size, args.image_size)
    x = pfgm.sample_prior(shape, args.z_max, args.upper_norm, args.D, device=device,
                          generator=torch.Generator().manual_seed(args.seed))
    labels = torch.arange(36, device=device) % args.classes if args.classes else None
    z_last = pfgm.last_plane(args.z_min, 20, args.D)
    with torch.no_grad():
        x, _ = pfgm.sample_ode(as_flow(net, vars(args)), x, args.z_max, z_last, 'unipc', 20,
                               D=args.D, gamma=args.gamma, z_exp=args.z_exp, labels=labels,
                               schedule_name='radius', to_data=True)
    picture = datasets.grid_of(datasets.to_uint8(x))
    write('--out_dir', path, lambda file: picture.save(file, 'PNG'))


def new_meter(device, unit=1.0):
    """What is known of the steps since the last log line, on the device; z is binned in `unit`s."""
    zero = torch.zeros((), device=device)
    edges = unit * torch.tensor(Z_BINS, device=device)
    return dict(edges=edges, peak=zero, peak_step=zero, bad=zero,
                sums=torch.zeros(len(Z_BINS) + 1, 2, device=device), bad_z=None, bad_loss=None)


def observe(meter, step, z, loss, norm):
    """Add this rank's z, loss (B,) and gradient norm of a step, without waiting for the device."""
    bins = torch.bucketize(z, meter['edges'])
    meter['sums'].index_add_(0, bins, torch.stack([loss, torch.ones_like(loss)], 1))
    meter['peak_step'] = torch.where(loss.mean() > meter['peak'], step, meter['peak_step'])
    meter['peak'] = torch.maximum(loss.mean(), meter['peak'])
    first = (meter['bad'] == 0) & ~norm.isfinite()
    if meter['bad_z'] is None:
        meter.update(bad_z=z, bad_loss=loss)
    for key, value in (('bad', step), ('bad_z', z), ('bad_loss', loss)):
        meter[key] = torch.where(first, value, meter[key])


def stop_if_bad(meter, args, n, rank, world, path):
    """End the run at the first gradient that was not finite, with the images and z that made it."""
    step = int(meter['bad'])
    if not step:
        return
    count = args.batch_size if args.field_batch == 'all' else max(args.batch_size, args.field_batch)
    share = args.batch_size // world
    images = next(datasets.image_order(n, count, args.seed, step - 1))[rank * share:]
    wrong = (~meter['bad_loss'].isfinite()).nonzero().flatten().tolist()
    made = ', '.join(f'{int(images[i])} at z = {float(meter["bad_z"][i]):.4g}' for i in wrong[:8])
    saved = f'{path} holds an earlier step' if os.path.exists(path) else 'nothing was saved yet'
    made = f'images {made}{" ..." * (len(wrong) > 8)}' if made else 'none of the images'
    raise BadInput(f'step {step}: the gradient is not finite; loss not finite for {made}; '
                   f'stopped, {saved}; go on by the same command with a lower --lr (it was '
                   f'{args.lr:g})' + ', or --no-bf16' * args.bf16)


def progress(args, step, meter, images, rate, device):
    """One line for people, and the dict that log.jsonl keeps. images: seen in all; rate: a second;
    sums (bins, 2): loss and count."""
    total, count = meter['sums'].sum(0).tolist()
    peak, peak_step, memory = float(meter['peak']), int(meter['peak_step']), peak_memory(device)
    left = int((args.steps - step) * args.batch_size / rate)
    by_z = [round(a / n, 5) if n else None for a, n in meter['sums'].tolist()]
    lr = learning_rate(args, step)
    spike = f'  spike {peak:.4g} at step {peak_step}' if peak > 5 * total / count else ''
    print(f'step {step}/{args.steps}  loss {total / count:.4f}  lr {lr:.1e}  {rate:.0f} img/s  '
          f'{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left  '
          + (f'{memory:.1f} GB  ' if memory else '') + 'loss by z '
          + ' '.join('-' if v is None else f'{v:.3g}' for v in by_z) + spike, flush=True)
    return dict(step=step, images=images, loss=total / count, lr=lr,
                img_per_s=rate, memory_gb=memory, loss_by_z=by_z, z_bins=meter['edges'].tolist(),
                peak=peak, peak_step=peak_step)


def heard(signals, step, device, world):
    """What the signals since the last call ask for: '', 'save' (SIGUSR1) or 'leave' (after saving).
    Ranks hear them at different steps, so several agree on every 10th."""
    if world > 1 and step % 10:
        return ''
    leave = any(number != getattr(signal, 'SIGUSR1', None) for number in signals)
    wish = 2 if leave else 1 if signals else 0
    if world > 1:
        wishes = torch.tensor(wish, device=device)
        dist.all_reduce(wishes, dist.ReduceOp.MAX)
        wish = int(wishes)
    signals.clear()
    return ('', 'save', 'leave')[wish]


# ---------------------------------------------------------------- the run

def prepare(args, images, place):
    """The flags, filled in and checked, and where to start: (checkpoint or None, its path)."""
    saved, resumed = open_run(args)
    resolve(args, images, saved, place[2])
    origin = (os.path.join(args.out_dir, 'ckpt.pt') if resumed else
              args.reflow or args.distill or args.init_from)
    if resumed:
        check_resume(args, saved['args'])
    elif saved:
        check_origin(args, saved['args'], origin)
    start = saved['step'] if saved else 0
    agree(f'--out_dir {args.out_dir}', 'give all processes the same flags and data, and an '
          '--out_dir that all machines share, or copies of its ckpt.pt', step=start,
          images=len(images),
          weights=saved and f'{fingerprint(saved["net"].values()):08x}',
          **{k: v for k, v in vars(args).items() if k not in ('out_dir', 'data_dir', 'device')})
    if start >= args.steps:
        raise BadInput(f'--steps {args.steps}: {origin} has {start} already; give more, or sample '
                       f'from it with: python sample.py --ckpt {origin}')
    return saved, origin


def networks(args, saved, origin, device):
    """(the network, its average), from a checkpoint or new."""
    if saved:
        raw, ema = (build(saved[part], vars(args), origin) for part in ('net', 'ema'))
    else:
        try:
            raw = speed_up(UNet(**{k: getattr(args, k) for k in ARCHITECTURE}))
        except ValueError as error:
            raise BadInput(f'--{error}') from error
        ema = copy.deepcopy(raw)
    raw.to(device, memory_format=torch.channels_last).train()
    ema.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    return raw, ema


def open_folder(args, start, raw, images, place):
    """Make --out_dir this run's, say what is trained -> (its log, images seen by step start)."""
    device, _, world = place
    try:
        os.makedirs(args.out_dir, exist_ok=True)
        claim(args.out_dir)
        log, seen = open_log(args, start)
    except OSError as error:
        raise BadInput(f'--out_dir {args.out_dir}: cannot write there ({error})') from error
    count = sum(p.numel() for p in raw.parameters())
    how = (f'M {args.M}, upper_norm {args.upper_norm:.4g}, z_exp {args.z_exp:.3g}, field of '
           f'{args.field_batch} charges' if args.method == 'pfgm' else f'D {args.D:g}')
    print(f'{images.name}: {len(images)} images of {args.image_size} x {args.image_size} x '
          f'{args.channels}; {count:,} parameters; {args.method}: {how}, z_max {args.z_max:.3g}'
          f'; {world} x {device}{", bf16" * args.bf16}'
          + (f'; going on from step {start}' if start else ''), flush=True)
    return log, seen


def main(args):
    # set up
    device, rank, world = place = setup(args.device, args.timeout)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.deterministic  # shapes stay
    args.bf16 = fast_bf16(device) if args.bf16 is None else args.bf16

    # data, and the checkpoint to go on from
    images = datasets.load(args.dataset, args.data_dir, args.image_size, args.channels)
    saved, origin = prepare(args, images, place)
    path = os.path.join(args.out_dir, 'ckpt.pt')
    start = saved['step'] if saved else 0

    # model
    raw, ema = networks(args, saved, origin, device)
    net = as_flow(torch.compile(raw) if args.compile else raw, vars(args))
    flow = PFGM(vars(args)) if args.method == 'pfgm' else net
    if args.distill:
        flow.only = args.z_max
    if world > 1:
        net = torch.nn.parallel.DistributedDataParallel(
            net, device_ids=[device.index] if device.type == 'cuda' else None)

    # optimizer, and the state of dropout
    how = dict(lr=args.lr, fused=device.type != 'mps')
    opt = Muon(raw, **how) if args.muon else torch.optim.Adam(raw.parameters(), **how)
    torch.manual_seed(step_seed(args.seed + 1 + rank, start))
    if saved and 'opt' in saved:
        restore(opt, saved, device, rank)
    saved = None  # a quarter of it stays in use

    # folder: every process has looked at it, since all agree
    if rank == 0:
        log, images_seen = open_folder(args, start, raw, images, place)
    if args.reflow or args.distill:
        teacher, _ = load_checkpoint(args.reflow or args.distill)
        teacher.to(device, memory_format=torch.channels_last)
        images = pairs_of_teacher(teacher, args, start, device, rank, world)

    # loop
    signals = listen()
    meter, clock, logged, last_saved = new_meter(device, flow.unit), time.time(), start, start
    batches = training_steps(images, flow, args, start, place)
    for step in range(start + 1, args.steps + 1):
        # lr
        for group in opt.param_groups:
            group['lr'] = learning_rate(args, step)

        # step
        batch, losses = next(batches), []
        for i, micro in enumerate(zip(*(t.chunk(args.accum) for t in batch))):
            last = i == args.accum - 1
            with contextlib.nullcontext() if last or world == 1 else net.no_sync(), \
                    torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                loss = field_loss(net, args.loss, *micro)
                (loss.mean() / args.accum).backward()
            losses.append(loss.detach())
        norm = update(raw, ema, opt, args.grad_clip, min(args.ema_decay, (1 + step) / (10 + step)))
        observe(meter, step, batch[1], torch.cat(losses), norm)

        # log, sample, save
        asked = heard(signals, step, device, world)
        stop = step == args.steps or asked == 'leave'
        logs, samples, saves = (stop or every and step % every == 0 for every in
                                (args.log_every, args.sample_every, args.save_every))
        saves = saves or asked == 'save'
        if logs or samples or saves:
            stop_if_bad(meter, args, len(images), rank, world, path)
        if logs:
            if world > 1:
                dist.all_reduce(meter['sums'])
            if rank == 0:
                rate = (step - logged) * args.batch_size / (time.time() - clock)
                images_seen += (step - logged) * args.batch_size
                row = progress(args, step, meter, images_seen, rate, device)
                log.write(json.dumps(row) + '\n')
            meter, clock, logged = new_meter(device, flow.unit), time.time(), step
        if samples and args.sample_every and step % args.sample_every == 0 and rank == 0:
            sample_grid(ema, args, device, os.path.join(args.out_dir, f'step{step:07d}.png'))
        if saves:
            rng = everywhere(rng_state(device))
            if rank == 0:
                keep_older(path, last_saved, args.keep)
                save(path, dict(net=raw.state_dict(), ema=ema.state_dict(), opt=opt.state_dict(),
                                step=step, args=vars(args), rng=rng))
                last_saved = step
        if stop:
            break
    if rank == 0:
        print(f'saved {path} at step {step}; sample with: python sample.py --ckpt {path}')


if __name__ == '__main__':
    run(main, parse_args())
