"""Train a Poisson flow on images.

    python train.py                                # digits drawn on the spot, 5 minutes on 2 cores
    python train.py --dataset photos/              # a folder, .zip, .npy or .npz of images
    torchrun --nproc_per_node=8 train.py --dataset cifar10         # the published CIFAR-10 run

Writes ckpt.pt, log.jsonl and sample grids to --out_dir. The same command again goes on where the
last one stopped. PFGM: arXiv 2209.11178; its equations are in pfgm.py, its network in unet.py.
"""
import argparse
import contextlib
import copy
import glob
import json
import math
import os
import shutil
import signal
import sys
import time

import torch
import torch.distributed as dist

import data as datasets
import pfgm
from baselines import METHODS, as_flow, make_pairs, straightness
from launch import (AT_THE_END, BadInput, Parser, above, agree, everywhere, fast_bf16, fingerprint, listen,
                    peak_memory, run, setup, step_seed, write)
from unet import ARCHITECTURE, UNet, build, load_checkpoint, read_checkpoint, save

# One row a data set; any other takes the row of its size. cifar10 to lsun_bedroom are the values
# of the official code, cifar10_pp EDM's for PFGM++. By the data: M, z_max and upper_norm by
# pfgm.hyperparameters, z_exp = 10 gamma / sqrt(N), where |v| still tells |E| to a few per cent.
S, L, LONG, BY_DATA = (1, 2, 2, 2), (1, 1, 2, 2, 4, 4), (2e-4, 5000, .9999), (None,) * 4
PRESETS = {name: dict(zip((
    'nf', 'ch_mult', 'num_blocks', 'attn', 'dropout', 'batch_size', 'field_batch', 'lr', 'warmup',
    'ema_decay', 'steps', 'sample_every', 'loss', 'M', 'z_max', 'upper_norm', 'z_exp'), row))
    for name, row in {
    # name         nf  mult  bl attn drop B  field lr warm ema steps grids loss M z_max upper z_exp
    'glyphs':       (32, S[:2], 1, (8,), 0, 64, 'all', 2e-3, 100, .995, 600, 200, 'sum', *BY_DATA),
    'mnist':        (32, S[:3], 1, (7,), 0, 64, 4096, 2e-3, 100, .999, 20000, 1000, 'sum',
                     *BY_DATA),
    'cifar10':      (128, S, 4, (16,), .1, 128, 4096, *LONG, 1300000, 5000, 'sum', 291, 40, 3e3, 5),
    'cifar10_deep': (128, S, 8, (16,), .1, 128, 4096, *LONG, 1300000, 5000, 'sum', 291, 40, 3e3, 5),
    'celeba64':     (128, S, 4, (16,), .1, 128, 512, *LONG, 1300000, 5000, 'sum', 291, 60, 6e3, 1),
    'lsun_bedroom': (128, L, 2, (16,), 0, 32, 32, 2e-5, 5000, .9999, 2400000, 5000, 'mean',
                     356, 100, 3e4, 0.1),
    'cifar10_pp':   (128, S[1:], 4, (16,), .13, 512, 4096, 1e-3, 19531, .99929, 390625, 5000, 'sum',
                     *BY_DATA),
}.items()}
TUNED = ('lr', 'warmup', 'grad_clip', 'batch_size', 'accum', 'workers')  # may change on resume
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
    row = PRESETS.get(known.preset or known.dataset, {})
    p = Parser(description=__doc__, parents=[pre])

    def flag(name, kind, default, text, **kw):
        if name in PRESETS['glyphs']:  # stays None until resolve(), when the data is known
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
    flag('dropout', above(-1e-9, below=1), None, 'in residual blocks')
    flag('steps', above(0, int), None, 'updates in all')
    flag('batch_size', above(0, int), None, 'points a step, over all processes')
    flag('accum', above(0, int), 1, 'micro-batches a process splits its share into')
    flag('field_batch', count_or_all, None, 'charges that define the field, or all')
    flag('lr', above(0), None, "Adam's learning rate")
    flag('warmup', above(-1, int), None, 'steps in which lr rises from 0')
    flag('grad_clip', above(0), 1.0, 'largest gradient norm')
    flag('ema_decay', above(-1e-9, below=1), None, 'of the averaged weights')
    flag('loss', str, None, 'half the sum over components, or mean', choices=('sum', 'mean'))
    flag('M', above(0, int, 10 ** 6), None, 'largest exponent of the perturbation')
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


def flow_constants(images, name, sigma=0.01, tau=0.03, gamma=5.0, z_min=1e-3):
    """M, z_max, upper_norm, z_exp of a data set: the official row of its name, or by the rule."""
    flow = {k: PRESETS.get(name, {}).get(k) for k in ('M', 'z_max', 'upper_norm', 'z_exp')}
    if None in flow.values():
        N = images.channels * images.image_size ** 2
        norm = datasets.mean_norm(images)
        try:
            rule = pfgm.hyperparameters(norm, N, sigma, tau)
        except ValueError as error:
            raise BadInput(f'--dataset {images.name}: {error}') from error
        flow = dict(rule._asdict(), z_exp=10 * gamma / math.sqrt(N))
    return dict(flow, gamma=gamma, z_min=z_min)


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
        row.update(flow_constants(images, name, args.sigma, args.tau, args.gamma))
    else:  # no charges beside the images themselves, and constants that do not depend on the data
        flow = as_flow(None, vars(args))
        row.update(field_batch=args.batch_size or row['batch_size'], M=0, upper_norm=None,
                   z_exp=0.0, z_min=flow.low * flow.unit, z_max=flow.high * flow.unit)
        if args.field_batch:
            raise BadInput(f'--field_batch {args.field_batch}: belongs to --method pfgm; '
                           f'{args.method} needs no charges')
    if saved:
        row.update({k: saved['args'][k] for k in ARCHITECTURE if k in saved['args']})
        args.classes = saved['args']['classes'] > 0 if teacher else args.classes
    args.image_size, args.channels = images.image_size, images.channels
    args.flip = images.flip if args.flip is None else args.flip
    if args.classes and images.labels is None:
        raise BadInput(f'--classes: {images.name} has no labels; give a folder with one folder a '
                       'class, or leave it out')
    labels = images.labels.unique() if args.classes else []
    args.classes = len(labels)
    if args.classes > datasets.CLASS_LIMIT or list(labels) != list(range(args.classes)):
        raise BadInput(f'--classes: {args.classes} labels from {labels[0]} to {labels[-1]}; '
                       f'accepted: 0, 1, 2, ... with none left out, at most {datasets.CLASS_LIMIT}')
    for key, value in row.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if args.method == 'pfgm' and args.field_batch != 'all' and args.field_batch >= len(images):
        args.field_batch = len(images) if images.pixels is None else 'all'
    if args.z_min >= args.z_max:
        raise BadInput(f'--z_min {args.z_min}: must be below --z_max {args.z_max:.4g}')
    if args.batch_size % (world * args.accum):
        raise BadInput(f'--batch_size {args.batch_size}: must be a multiple of '
                       f'{world} processes x --accum {args.accum}')
    if args.field_batch != 'all' and args.field_batch < args.batch_size:
        raise BadInput(f'--field_batch {args.field_batch}: the {args.batch_size} points of a step '
                       'are among its charges; at least --batch_size')


# ---------------------------------------------------------------- the data of a step

def image_order(n, count, seed, step):
    """Endless indices (count,) of step, step + 1, ...: one shuffle of all n images an epoch."""
    order, epoch, at = None, None, step * count
    while True:
        want = []
        while sum(map(len, want)) < count:
            if at // n != epoch:
                epoch = at // n
                order = torch.randperm(n, generator=torch.Generator().manual_seed(
                    step_seed(seed, 2 ** 32 + epoch)))
            take = order[at % n:][:count - sum(map(len, want))]
            want.append(take)
            at += len(take)
        yield torch.cat(want)


def gather(parts):
    """Each rank's uint8 images, joined in rank order: every rank reads only its share from disk."""
    whole = parts.new_empty(dist.get_world_size() * len(parts), *parts.shape[1:])
    dist.all_gather_into_tensor(whole, parts)
    return whole


def shuffled_images(images, count, args, step, device, rank, world):
    """Endless (x (count, C, S, S) in [-1, 1], classes or None, generator) of step, step + 1, ...,
    mirrored at random: the same on every rank, from seed and step alone."""
    indices = image_order(len(images), count, args.seed, step)
    split = images.pixels is None and world > 1
    if split:
        if count % world:
            raise BadInput(f'--field_batch {count}: must be a multiple of {world} processes')
        indices = (block.chunk(world)[rank] for block in indices)
    blocks = datasets.batches(images, indices, device, args.workers)
    for block, order in zip(blocks, image_order(len(images), count, args.seed, step)):
        x = datasets.to_float(gather(block) if split else block)
        generator = torch.Generator(device).manual_seed(step_seed(args.seed, step))
        if args.flip:
            flipped = torch.rand(len(x), 1, 1, 1, generator=generator, device=device) < 0.5
            x = torch.where(flipped, x.flip(-1), x)
        yield x, images.labels[order].to(device) if args.classes else None, generator
        step += 1


def shuffled_pairs(pairs, args, step, device):
    """Endless (y (B, C, S, S), classes or None, generator, eps like y) of step, step + 1, ..."""
    for order in image_order(len(pairs), args.batch_size, args.seed, step):
        y, eps = (part.to(device) for part in pairs[order])
        generator = torch.Generator(device).manual_seed(step_seed(args.seed, step))
        yield y, (order % args.classes).to(device) if args.classes else None, generator, eps
        step += 1


def training_steps(images, flow, args, step, device, rank, world):
    """Endless (moved, z, target_x, target_z, weight[, classes]) for this rank, its slice of the
    points. flow: the Denoiser whose z and weight they have, or None for the field of charges.
    images may be the Pairs of --reflow, whose noise is then theirs, and z_max with --distill."""
    every = args.field_batch == 'all'
    if every:
        if images.pixels is None:
            raise BadInput(f'--field_batch all: {len(images)} images do not fit in memory; '
                           'give a number of charges')
        images.pixels = images.pixels.to(device)
        charges = datasets.Charges(images.pixels, args.flip)
        kinds = images.labels.to(device).repeat(1 + args.flip) if args.classes else None
    B = args.batch_size
    mine = slice(rank * B // world, (rank + 1) * B // world)
    count = B if every else args.field_batch
    paired = args.reflow or args.distill
    source = (shuffled_pairs(images, args, step, device) if paired else
              shuffled_images(images, count, args, step, device, rank, world))
    for x, kind, generator, *eps in source:
        if not every:
            charges, kinds = x, kind
        labels, among, clean = [], None, x[:B]
        if args.classes:
            dropped = torch.rand(B, generator=generator, device=device) < 0.1
            labels = [torch.where(dropped, -1, kind[:B])[mine]]
            among = (labels[0][:, None] == kinds) | (labels[0] < 0)[:, None]
        if flow is None:
            moved, z = pfgm.perturb(clean, args.M, args.sigma, args.tau, generator=generator)
            moved, z = moved[mine], z[mine]
            target = pfgm.poisson_field(moved, z, charges, args.gamma, among=among)
            weight = torch.ones_like(z)
        else:
            z = torch.full((B,), args.z_max, device=device) if args.distill else flow.draw(
                B, generator, device)
            noise = (pfgm.column(z, x) * eps[0] if paired else
                     pfgm.kernel(clean.shape, z, args.D, generator))
            moved, z = (clean + noise)[mine], z[mine]
            target, weight = (clean[mine] - moved, -z), flow.weight(moved, z)
        yield (moved, z, *target, weight, *labels)


def field_loss(net, reduce, moved, z, target_x, target_z, weight, *labels):
    """(B,) half the weighted squared error summed over the N + 1 components, or its mean (LSUN)."""
    v_x, v_z = net(moved, z, *labels)
    error = (v_x - target_x).square().flatten(1).sum(1) * weight + (v_z - target_z).square()
    return error / 2 if reduce == 'sum' else error / (moved[0].numel() + 1)


def update(net, ema, opt, clip, decay):
    """One step of `opt` on the clipped gradients, and of the EMA -> their norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
    opt.step()
    opt.zero_grad(set_to_none=True)
    with torch.no_grad():  # else every step would hang one more graph on the average
        torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
    return norm


# ---------------------------------------------------------------- checkpoints

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


def complete(path):
    """The checkpoint at path, if training can go on from it."""
    saved = read_checkpoint(path)
    if not {'net', 'opt'} <= saved.keys():
        raise BadInput(f'{path} holds the EMA only; training needs the whole checkpoint')
    return saved


def taught(args):
    """What --reflow and --distill start from: the teacher's EMA, at step 0."""
    flag, path = ('reflow', args.reflow) if args.reflow else ('distill', args.distill)
    saved = read_checkpoint(path)
    method, dataset = saved['args']['method'], saved['args'].get('dataset')
    if method != 'rf':
        raise BadInput(f'--{flag} {path}: made by --method {method}; give a checkpoint of rf')
    if dataset != args.dataset:
        raise BadInput(f'--dataset {args.dataset}: --{flag} {path} was trained on {dataset}; give '
                       f'--dataset {dataset}')
    net = {k: v.clone() for k, v in saved['ema'].items()}
    return dict(net=net, ema=saved['ema'], step=0, args=saved['args'])


def claim(folder):
    """Lock the folder for this process (until it ends, however it ends): one run at a time."""
    try:
        import fcntl
    except ImportError:  # Windows: there two runs on one folder are the user's own affair
        return
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(held)
        raise BadInput(f'--out_dir {folder}: another run is using it; wait for it to end, or give '
                       'another --out_dir') from error
    except OSError as error:  # a network file system without locks
        print(f'--out_dir {folder}: cannot be locked ({error}); let no other run use it',
              file=sys.stderr)
    AT_THE_END.callback(os.close, held)


def open_run(args):
    """(checkpoint to go on from or None, whether it is this folder's own). A damaged one is named
    and the one before it is used."""
    newest = os.path.join(args.out_dir, 'ckpt.pt')
    older = sorted(glob.glob(os.path.join(glob.escape(args.out_dir), 'ckpt-*.pt')), reverse=True)
    paths = [path for path in (newest, *older) if os.path.exists(path)]
    for path, following in zip(paths, [*paths[1:], None]):
        try:
            saved = complete(path)
        except BadInput as error:
            if following is None:
                raise
            print(f'{error}; going back to {following}', file=sys.stderr)
            continue
        if saved['args'].get('dataset') != args.dataset:
            raise BadInput(f'--out_dir {args.out_dir}: holds a run on '
                           f'{saved["args"].get("dataset")}, not on {args.dataset}; '
                           'give another --out_dir')
        return saved, True
    kept = os.listdir(args.out_dir) if os.path.isdir(args.out_dir) else []
    kept = [name for name in kept if not glob.glob(  # folders of other runs may be in it
        glob.escape(os.path.join(args.out_dir, name)) + '/**/log.jsonl', recursive=True)]
    if kept and 'log.jsonl' not in kept:  # a run killed before its first checkpoint left a log
        raise BadInput(f'--out_dir {args.out_dir}: not empty, and not a run of train.py; '
                       'give another --out_dir')
    if args.reflow or args.distill:
        return taught(args), False
    return (complete(args.init_from), False) if args.init_from else (None, False)


def keep_older(path, step, keep):
    """Give the checkpoint of `step` a second name before a newer one replaces it, and drop all but
    the last keep - 1 of those names."""
    stem = path.removesuffix('.pt')
    name = f'{stem}-{step:07d}.pt'
    if os.path.exists(path) and not os.path.exists(name):
        try:
            os.link(path, name)
        except OSError:  # a file system without hard links
            shutil.copy2(path, f'{name}.part')
            os.replace(f'{name}.part', name)
    for old in sorted(glob.glob(f'{glob.escape(stem)}-*.pt'), reverse=True)[keep - 1:]:
        os.remove(old)


def check_resume(args, old):
    """A flag that changes what is trained must be what it was."""
    for key in (key for key in vars(args) if key in old and key not in FREE_ON_RESUME):
        a, b = (list(v) if isinstance(v, tuple) else v for v in (getattr(args, key), old[key]))
        if a != b and (key != 'field_batch' or args.method == 'pfgm'):
            raise BadInput(f'--{key} {a}: the run in --out_dir {args.out_dir} has {b}; keep it, '
                           'or give another --out_dir')
    changed = [f'--{key} {getattr(args, key)} (it was {old[key]})' for key in TUNED
               if key in old and getattr(args, key) != old[key]]
    if changed and os.environ.get('RANK', '0') == '0':
        print(f'going on with {", ".join(changed)}', flush=True)


def check_origin(args, old, path):
    """A flag that contradicts the checkpoint whose network is taken."""
    for key in ('method', 'nf', 'ch_mult', 'num_blocks', 'classes'):
        a, b = (list(v) if isinstance(v, tuple) else v for v in (getattr(args, key), old[key]))
        if a != b:
            raise BadInput(f'--{key} {a}: {path} has {b}; take that')


def open_log(args, start):
    """log.jsonl, to append to, without the lines of steps that are about to be made again; and the
    number of images that its run has seen at step `start`."""
    path = os.path.join(args.out_dir, 'log.jsonl')
    lines = open(path).read().splitlines() if os.path.exists(path) else []
    rows = [row for row in (json.loads(line) for line in lines if line.endswith('}'))
            if row['step'] <= start]
    with open(f'{path}.part', 'w') as file:
        file.writelines(f'{json.dumps(row)}\n' for row in rows)
    os.replace(f'{path}.part', path)
    last = rows[-1] if rows else dict(step=0, images=0)  # --batch_size may have changed since
    seen = last['images'] + (start - last['step']) * args.batch_size
    return open(path, 'a', buffering=1), seen


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
    picture = grid_of(datasets.to_uint8(x))
    write('--out_dir', path, lambda file: picture.save(file, 'PNG'))


def grid_of(pixels, nrow=None):
    """uint8 images (n, C, H, W) as one picture, each enlarged to 64 pixels or more."""
    from PIL import Image
    from torchvision.utils import make_grid
    pixels = pixels.cpu().repeat_interleave(k := -(-64 // pixels.shape[-1]), 2)
    grid = make_grid(pixels.repeat_interleave(k, 3), nrow or math.ceil(len(pixels) ** 0.5),
                     padding=4, pad_value=128)
    return Image.fromarray(grid.permute(1, 2, 0).numpy())


def pairs_of_teacher(args, start, device, rank, world):
    """The Pairs to train on, made by the teacher; and a line on how straight its own lines are."""
    net, saved = load_checkpoint(args.reflow or args.distill)
    net.to(device, memory_format=torch.channels_last)
    pairs = make_pairs(net, saved['z_max'], saved['z_min'], args, device, rank, world)
    if rank == 0 and start == 0:
        labels = torch.arange(64, device=device) % args.classes if args.classes else None
        start = net.high * torch.randn(64, args.channels, args.image_size, args.image_size,
                                       generator=torch.Generator().manual_seed(args.seed))
        bent = straightness(net, start.to(device), labels).mean()
        print(f'the teacher: straightness {bent:.4f} (0 is straight)', flush=True)
    return pairs


# ---------------------------------------------------------------- the run

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
    count = args.batch_size if args.field_batch == 'all' else args.field_batch
    share = args.batch_size // world
    images = next(image_order(n, count, args.seed, step - 1))[:args.batch_size][rank * share:]
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
    lr = args.lr * min(step / max(args.warmup, 1), 1)
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


def main(args):
    # devices
    device, rank, world = setup(args.device, args.timeout)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.deterministic  # shapes stay
    args.bf16 = fast_bf16(device) if args.bf16 is None else args.bf16

    # data
    images = datasets.load(args.dataset, args.data_dir, args.image_size, args.channels)
    saved, resumed = open_run(args)
    resolve(args, images, saved, world)
    if resumed:
        check_resume(args, saved['args'])
    path = os.path.join(args.out_dir, 'ckpt.pt')
    origin = path if resumed else args.reflow or args.distill or args.init_from
    if saved and not resumed:
        check_origin(args, saved['args'], origin)
    start = saved['step'] if saved else 0
    agree(f'--out_dir {args.out_dir}', 'give all processes the same flags and data, and an --out_dir '
          'that all machines share, or copies of its ckpt.pt', step=start, images=len(images),
          weights=saved and f'{fingerprint(saved["net"].values()):08x}',
          **{k: v for k, v in vars(args).items() if k not in ('out_dir', 'data_dir', 'device')})
    if start >= args.steps:
        raise BadInput(f'--steps {args.steps}: {origin} has {start} already; give more, or sample '
                       f'from it with: python sample.py --ckpt {origin}')

    # net and ema
    architecture = {k: getattr(args, k) for k in ARCHITECTURE}
    raw = build(saved['net'], vars(args), origin) if saved else UNet(**architecture)
    raw.to(device, memory_format=torch.channels_last).train()
    ema = build(saved['ema'], vars(args), origin) if saved else copy.deepcopy(raw)
    ema.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    net = as_flow(torch.compile(raw) if args.compile else raw, vars(args))
    flow = None if args.method == 'pfgm' else net
    if world > 1:
        net = torch.nn.parallel.DistributedDataParallel(
            net, device_ids=[device.index] if device.type == 'cuda' else None)

    # optimizer, and the state of dropout
    opt = torch.optim.Adam(raw.parameters(), lr=args.lr, fused=device.type != 'mps')
    torch.manual_seed(step_seed(args.seed + 1 + rank, start))
    if saved and 'opt' in saved:
        restore(opt, saved, device, rank)
    saved = None  # a quarter of it stays in use

    # folder; every rank has looked at it, since all agree
    if rank == 0:
        try:
            os.makedirs(args.out_dir, exist_ok=True)
            claim(args.out_dir)
            log, images_seen = open_log(args, start)
        except OSError as error:
            raise BadInput(f'--out_dir {args.out_dir}: cannot write there ({error})') from error
        count = sum(p.numel() for p in raw.parameters())
        how = (f'M {args.M}, upper_norm {args.upper_norm:.4g}, z_exp {args.z_exp:.3g}, field of '
               f'{args.field_batch} charges' if args.method == 'pfgm' else f'D {args.D:g}')
        print(f'{images.name}: {len(images)} images of {args.image_size} x {args.image_size} x '
              f'{args.channels}; {count:,} parameters; {args.method}: {how}, z_max {args.z_max:.3g}'
              f'; {world} x {device}{", bf16" * args.bf16}'
              + (f'; going on from step {start}' if start else ''), flush=True)
    if args.reflow or args.distill:
        images = pairs_of_teacher(args, start, device, rank, world)

    signals = listen()
    unit = flow.unit if flow else 1.0
    meter, clock, logged, last_saved = new_meter(device, unit), time.time(), start, start
    batches = training_steps(images, flow, args, start, device, rank, world)
    for step in range(start + 1, args.steps + 1):
        # lr
        for group in opt.param_groups:
            group['lr'] = args.lr * min(step / max(args.warmup, 1), 1)

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
            meter, clock, logged = new_meter(device, unit), time.time(), step
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
