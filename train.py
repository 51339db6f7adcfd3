"""Train a Poisson flow on images.

    python train.py                                # digits drawn on the spot, 3 minutes on 2 cores
    python train.py --dataset photos/              # a folder, .zip, .npy or .npz of images
    torchrun --nproc_per_node=8 train.py --dataset cifar10         # the published CIFAR-10 run

Writes ckpt.pt, log.jsonl and sample grids to --out_dir; the same command again goes on. PFGM: arXiv
2209.11178; its equations are in pfgm.py, the network in unet.py, loss and update in baselines.py.
"""
import argparse
import contextlib
import copy
import json
import math
import os
import time

import torch
import torch.distributed as dist

import data as datasets
from baselines import (METHODS, PAIR_NFE, Muon, as_flow, field_loss, method_of_student,
                       pairs_of_teacher, training_point, update)
from bench import sample_grid
from checkpoint import (ARCHITECTURE, build, flow_flags, for_classes, in_folder, load_flow,
                        open_run, save)
from launch import (BadInput, Parser, above, agree, claim, everywhere, fast_bf16, fingerprint,
                    given_by, heard, keep_older, listen, new_meter, observe, open_log, progress,
                    restore, rng_state, run, say, setup, speed_up, step_seed, stop_if_bad, unless)
from unet import UNet

# One row a data set; any other takes the row of its size. cifar10 to lsun_bedroom are the values
# of the official code (with data.OFFICIAL), the two after them EDM's. What a row leaves out: REST.
S, L, LONG = (1, 2, 2, 2), (1, 1, 2, 2, 4, 4), (2e-4, 5000, .9999)
EDM = .13, 512, 4096, 1e-3, 19531, .99929, 390625, 5000, 'sum'
OURS = 2, 1.0, 4, True, True, True  # patch, decay, m_draws, muon, skip, classes
NO_SKIP = *OURS[:4], False, True
REST = dict(patch=1, decay=0.0, m_draws=1, muon=False, skip=False, classes=False, ncsnpp=False,
            label_first=False)
PRESETS = {name: dict(zip((
    'nf', 'ch_mult', 'num_blocks', 'attn', 'dropout', 'batch_size', 'field_batch', 'lr', 'warmup',
    'ema_decay', 'steps', 'sample_every', 'loss', *REST),
    (*row, *[*REST.values()][len(row) - 13:]))) for name, row in {
    # name         nf  mult  bl attn drop batch field lr warm-up ema  steps  grids  loss
    'glyphs':       (64, (1, 1), 1, (4,), 0, 64, 1024, 1e-2, 50, .98, 1400, 500, 'sum', *NO_SKIP),
    'mnist':        (64, (1, 1), 1, (7, 8), 0, 64, 4096, 1e-2, 50, .98, 5000, 1000, 'sum', *OURS),
    'cifar10':      (128, S, 4, (16,), .1, 128, 4096, *LONG, 1300000, 5000, 'sum'),
    'cifar10_deep': (128, S, 8, (16,), .1, 128, 4096, *LONG, 1300000, 5000, 'sum'),
    'celeba64':     (128, S, 4, (16,), .1, 128, 512, *LONG, 1300000, 5000, 'sum'),
    'lsun_bedroom': (128, L, 2, (16,), 0, 32, 32, 2e-5, 5000, .9999, 2400000, 5000, 'mean'),
    'cifar10_pp':   (128, S[1:], 4, (16,), *EDM),
    'cifar10_ncsnpp': (128, S[1:], 4, (16,), *EDM, 1, 0.0, 1, False, False, False, True, True),
}.items()}
BY_SIZE = {28: 'mnist', 32: 'cifar10', 64: 'celeba64', math.inf: 'lsun_bedroom'}
BY_DATA = ('M', 'z_max', 'upper_norm', 'z_exp')  # data.flow_constants
OF_FLOW = dict(sigma_data=0.5, sigma=0.01, tau=0.03, gamma=5.0)  # with --init_from by the file
TUNED = 'lr warmup decay grad_clip batch_size accum workers dataset'.split()  # may change on resume
FREE_ON_RESUME = {*TUNED, *'out_dir data_dir steps device bf16 compile log_every sample_every '
                  'save_every keep timeout init_from data class_names'.split()}


FLAGS = (  # name, type (None: yes or no), default, help, what else argparse takes
    ('data_dir', str, 'data', 'where known data sets are kept'),
    ('out_dir', str, 'out', 'where the checkpoint, log and sample grids go'),
    ('image_size', above(0, int), None, 'pixels a side (default: as the data is)'),
    ('channels', int, None, 'grey or colour (default: as the data is)', dict(choices=(1, 3))),
    ('method', str, None, 'default: pfgm, with --D or --ncsnpp pfgmpp', dict(choices=METHODS)),
    ('D', unless('inf', math.inf, above(1 - 1e-9)), None, '1 or more, or inf (default: 128)'),
    ('classes', None, None, 'train on the labels too; a tenth is left out, for --guidance'),
    ('flip', None, None, 'mirror half of the images (default: as the data is)'),
    ('source', str, None, 'of rf: these images into those of --dataset, not noise'),
    ('reflow', in_folder, None, 'straighten this checkpoint: train on pairs it makes'),
    ('distill', in_folder, None, 'the same, into samples of one call (--nfe 1)'),
    ('consistency', None, False, 'train for samples of one or two calls, without pairs'),
    ('pairs', above(0, int), 100000, 'noise and images of --reflow and --distill'),
    ('init_from', in_folder, None, 'go on from this checkpoint, ours or one of the authors'),
    ('seed', above(-1, int), 0, 'of the weights, the order of images and all noise'),
    ('device', str, 'auto', 'auto, cpu, cuda, cuda:1 or mps'),
    ('bf16', None, None, 'bfloat16 autocast (default: where it is fast)'),
    ('compile', None, False, 'torch.compile the network'),
    ('workers', above(-1, int), 4, 'processes that read a set too large for memory'),
    ('nf', above(0, int, 1025), None, 'channels of the first level'),
    ('ch_mult', above(0, int, 17), None, 'their multiple at each level', dict(nargs='+')),
    ('num_blocks', above(0, int, 33), None, 'residual blocks a level'),
    ('attn', above(0, int), None, 'image sizes with attention', dict(nargs='*')),
    ('patch', above(0, int, 65), None, 'pixels a side that the network takes as one'),
    ('skip', None, None, 'of pfgm: far from the data add to the field of a charge at 0'),
    ('dropout', above(-1e-9, below=1), None, 'in residual blocks'),
    ('ncsnpp', None, None, 'NCSN++: Fourier features of the noise, FIR filters, a pyramid'),
    ('label_first', None, None, 'labels join the noise before the first linear layer'),
    ('steps', above(0, int), None, 'updates in all'),
    ('batch_size', above(0, int), None, 'points a step, over all processes'),
    ('accum', above(0, int), 1, 'micro-batches a process splits its share into'),
    ('field_batch', unless('all', 'all', above(0, int)), None, 'charges that define the target, or '
     'all (of other methods than pfgm by default 1, each image its own)'),
    ('lr', above(0), None, "Adam's learning rate"),
    ('warmup', above(-1, int), None, 'steps in which lr rises from 0'),
    ('decay', above(-1e-9, below=1 + 1e-9), None, 'part of the steps in which lr falls to 0'),
    ('muon', None, None, "move the network's matrices as Muon does, not Adam"),
    ('grad_clip', above(0), 1.0, 'largest gradient norm'),
    ('ema_decay', above(-1e-9, below=1), None, 'of the averaged weights'),
    ('loss', str, None, 'half the sum over components, or mean', dict(choices=('sum', 'mean'))),
    ('M', above(0, int, 10 ** 6), None, 'largest exponent of the perturbation'),
    ('m_draws', above(0, int, 17), None, 'm is the mean of so many uniform draws'),
    ('z_max', above(0), None, 'where sampling starts'),
    ('upper_norm', above(0), None, 'largest |x| there'),
    ('z_exp', above(-1e-9), None, 'below it v_z is computed, not predicted'),
    ('z_min', above(0), None, 'where sampling ends (default: 1e-3; pfgmpp: 0.002 sqrt(D))'),
    ('sigma_data', above(0, below=1e3), None, 'spread of the data, of pfgmpp (default: 0.5)'),
    ('sigma', above(1e-9), None, 'noise at m = 0 (default: 0.01)'),
    ('tau', above(1e-9), None, 'growth of the noise, (1 + tau)^m (default: 0.03)'),
    ('gamma', above(-1e-9), None, 'added to the norm of the field (default: 5)'),
    ('log_every', above(0, int), 50, 'steps between log lines'),
    ('sample_every', above(-1, int), None, 'steps between sample grids; 0: none'),
    ('save_every', above(0, int), 1000, 'steps between checkpoints'),
    ('keep', above(0, int), 2, 'checkpoints to keep: ckpt.pt and those before it'),
    ('timeout', above(0), 600.0, 'seconds after which a silent process ends the job'),
)


def parse_args(argv=None):
    pre = Parser(add_help=False)
    pre.add_argument('--dataset', default='glyphs', help='a folder, .zip, .npy or .npz of images, '
                     f'or one of {", ".join(datasets.SETS)}')
    pre.add_argument('--preset', choices=PRESETS, help='row of defaults (by data set, else size)')
    known = pre.parse_known_args(argv)[0]
    name = known.preset or known.dataset
    row = {**PRESETS.get(name, {}), **dict(zip(BY_DATA, datasets.OFFICIAL.get(name, ())))}
    p = Parser(description=__doc__, parents=[pre])
    for key, kind, default, text, *more in FLAGS:
        if key in (*PRESETS['glyphs'], *BY_DATA):  # None until resolve(), when the data is known
            value = row.get(key)
            text += f' (preset: {"by the data" if value is None else value})'
        elif default is not None:
            text += f' (default: {default})'
        how = dict(type=kind) if kind else dict(action=argparse.BooleanOptionalAction)
        p.add_argument(f'--{key}', default=default, help=text.replace('%', '%%'), **how,
                       **dict(*more))
    return p.parse_args(argv)


def resolve(args, images, saved, resumed, world):
    """Fill the flags left open, from the checkpoint, the preset row or the data, and check them."""
    name = args.preset or args.dataset
    teacher, old = args.reflow or args.distill, saved['args'] if saved else {}
    args.edm = old.get('edm', False)
    given = old if args.init_from or args.edm or teacher else {}  # where no flag says
    row = dict(PRESETS[name if name in PRESETS else next(
        preset for size, preset in BY_SIZE.items() if images.image_size <= size)])
    kept = row if resumed else (*ARCHITECTURE, 'muon', 'skip')  # rows may have changed since
    row.update({k: old[k] for k in kept if k in old})
    ncsnpp = row['ncsnpp'] if args.ncsnpp is None else args.ncsnpp
    own = method_of_student(args, old) if teacher else given.get('method')
    args.source = args.source or given.get('source')
    args.method = args.method or own or ('pfgmpp' if args.D or ncsnpp else 'pfgm')
    if teacher and args.init_from:
        raise BadInput(f'--init_from {args.init_from}: --reflow and --distill go on from their '
                       'teacher; leave it out')
    if args.D and args.method != 'pfgmpp':
        raise BadInput(f'--D {args.D:g}: belongs to --method pfgmpp, not {args.method}')
    args.D = args.D or given.get('D') or {'pfgm': 1.0, 'pfgmpp': 128.0}.get(args.method, math.inf)
    if teacher and (args.D != old['D'] or args.method == 'pfgm' or args.edm and args.method != own):
        raise BadInput(f'--method {args.method}, D {args.D:g}: a student of {teacher} is a '
                       f'denoiser of its D, {old["D"]:g}; leave out --D and --method')
    vars(args).update({k: given.get(k, v) for k, v in OF_FLOW.items() if getattr(args, k) is None})
    if args.method == 'pfgm':
        row.update(datasets.flow_constants(images, name, args.sigma, args.tau, args.gamma))
    else:  # constants that do not depend on the data, and no charge but the image itself
        flow = as_flow(None, vars(args))
        row.update(field_batch=1, upper_norm=None, z_exp=0.0, z_min=flow.low * flow.unit,
                   z_max=flow.high * flow.unit)
        if teacher and args.field_batch not in (None, 1):
            raise BadInput(f'--field_batch {args.field_batch}: the pairs of --reflow and --distill '
                           'have no charges; leave it out')
    if given.get('D') == args.D and given['method'] in (args.method, 'pfgm'):
        official = datasets.OFFICIAL_BY_SIZE.get(old['image_size']) if old.get('official') else None
        row.update(datasets.flow_constants(None, official) if official else
                   {k: old[k] for k in (*BY_DATA, 'z_min') if k in old})
    if teacher:
        args.classes, row['z_exp'] = old['classes'] > 0, 0.0  # a denoiser's v_z is exact
    args.image_size, args.channels, row['flip'] = images.image_size, images.channels, images.flip
    if args.classes is None:  # as the file has it, else the row, of a set that has a row
        args.classes = row['classes'] and (saved or args.dataset in PRESETS) and (
            images.labels is not None and not args.source)
    args.classes = images.class_count() if args.classes else 0
    vars(args).update({k: v for k, v in row.items() if getattr(args, k) is None})
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


def differing(args, old, keys):
    """(key, the flag's value, the file's) of those that the file has otherwise."""
    for key in (key for key in keys if key in old):
        a, b = (list(v) if isinstance(v, tuple) else v for v in (getattr(args, key), old[key]))
        if a != b:
            yield key, a, b


def check_resume(args, old):
    """A flag that changes what is trained must be what it was."""
    for key, a, b in differing(args, old, [k for k in vars(args) if k not in FREE_ON_RESUME]):
        raise BadInput(f'--{key} {a}: the run in --out_dir {args.out_dir} has {b}; keep it, or '
                       'give another --out_dir')
    changed = [f'--{key} {a} (it was {b})' for key, a, b in differing(args, old, TUNED)]
    if changed:
        say(f'going on with {", ".join(changed)}')
    rises = ['the learning rate falls to 0 there only; it rises again'] * bool(args.decay) + [
        'the levels of --consistency lie further apart again'] * args.consistency
    if rises and args.steps > old['steps']:
        say(f'--steps {args.steps} (it was {old["steps"]}): {"; ".join(rises)}')


def check_origin(args, old, flag, path):
    """A flag that contradicts the checkpoint whose network is taken; is it of other classes?"""
    for key, a, b in differing(args, old, ('method', 'muon', 'skip', *sorted(
            {*ARCHITECTURE} - {'attn', 'dropout', 'classes'}))):
        mend = ('no-' * (not b) + key if isinstance(b, bool) else
                ' '.join(map(str, [key, *(b if isinstance(b, list) else [b])])))
        raise BadInput(f'--{key} {a}: {flag} {path} has {b}; give --{mend}')
    keys = ('D', *OF_FLOW, *(BY_DATA + ('z_min',) if args.D == old['D'] else ()))
    changed = [f'--{key} {a} (it has {b})' for key, a, b in differing(args, old, keys)]
    names = [names for names in (old.get('class_names'), args.class_names) if names]
    fresh = args.classes != old['classes'] or bool(args.classes) and names[:1] != names[-1:]
    say(f'{flag} {path}: its network, {args.method}, D {args.D:g} and constants'
        + f', but {", ".join(changed)}' * bool(changed)
        + f'; for {args.classes} classes, not its {old["classes"]}, with a new label layer and '
        'from step 0' * fresh)
    return fresh


# ---------------------------------------------------------------- a step

def learning_rate(args, step):
    """Of step 1 ... --steps: up in --warmup steps, and down in the last part --decay of all."""
    down = (args.steps + 1 - step) / max(args.decay * args.steps, 1)
    return args.lr * min(step / max(args.warmup, 1), down, 1)


def images_a_step(args):
    """How many are read: the charges, and among them, first, the points."""
    return args.batch_size if args.field_batch == 'all' else max(args.batch_size, args.field_batch)


def training_steps(images, flow, args, step, place):
    """Endless training_point()s for this process. images may be the pairs of --reflow."""
    device, rank, world = place
    B = args.batch_size
    mine = slice(rank * B // world, (rank + 1) * B // world)
    charges = kinds = None
    if args.field_batch == 'all':
        charges = datasets.charges_of(images, '--field_batch all', device, args.flip)
        kinds = images.labels.to(device).repeat(1 + args.flip) if args.classes else None
    blocks = datasets.shuffled_images(images, images_a_step(args), args, step, *place)
    if args.reflow or args.distill:
        blocks = datasets.shuffled_pairs(images, args, step, device)
    for done, (x, kind, generator, *eps) in enumerate(blocks, step):
        if args.field_batch not in ('all', 1):
            charges, kinds = x, kind
        if args.source and not eps:
            eps = [flow.source.assigned(x[:B], generator)]
        labels = kind is not None and (kind[:B], kind if kinds is None else kinds)
        stage = args.consistency and 1 + 8 * done // args.steps  # the levels ever closer
        yield training_point(flow, x[:B], generator, mine, charges, labels, eps, stage)


# ---------------------------------------------------------------- the run

def prepare(args, images, place):
    """The flags, filled in and checked, and where to start: (checkpoint or None, path, step)."""
    args.data, args.class_names = images.identity, images.classes
    saved, flag = open_run(args)
    resolve(args, images, saved, flag == 'out_dir', place[2])
    origin = flag and in_folder(getattr(args, flag))
    if flag == 'out_dir':
        if args.classes and images.root and 'data' not in saved['args']:
            raise BadInput('--classes: folders are numbered in natural order now, 2 before 10, and '
                           f'were not in the run in --out_dir {args.out_dir}; give another')
        check_resume(args, saved['args'])
    elif saved:
        old = saved['args'] if args.init_from else {**saved['args'], 'method': args.method}
        if check_origin(args, old, f'--{flag}', origin):
            saved = for_classes(saved, args.classes)
    start = saved['step'] if saved else 0
    agree(f'--out_dir {args.out_dir}', 'give all processes the same flags and data, and an '
          '--out_dir that all machines share, or copies of its ckpt.pt', step=start,
          images=len(images),
          weights=saved and f'{fingerprint(saved["net"].values()):08x}',
          **{k: v for k, v in vars(args).items() if k not in ('out_dir', 'data_dir', 'device')})
    if start >= args.steps:
        raise BadInput(f'--steps {args.steps}: {origin} has {start} already; give more, or sample '
                       f'from it with: python sample.py --ckpt {origin}')
    return saved, origin, start


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
    raw, ema = (net.to(device, memory_format=torch.channels_last) for net in (raw, ema))
    return raw.train(), ema.eval().requires_grad_(False)


def open_folder(args, start, raw, images, place):
    """Make --out_dir this run's, say what is trained -> (its log, images seen by step start)."""
    device, _, world = place
    try:
        os.makedirs(args.out_dir, exist_ok=True)
        claim(args.out_dir)
        log, seen = open_log(args, start)
    except OSError as error:
        raise BadInput(f'--out_dir {args.out_dir}: cannot write there ({error})') from error
    how = (f'M {args.M}, upper_norm {args.upper_norm:.4g}, z_exp {args.z_exp:.3g}, field of '
           f'{args.field_batch} charges' if args.method == 'pfgm' else f'D {args.D:g}')
    print(f'{images.name}: {len(images)} images of {args.image_size} x {args.image_size} x '
          f'{args.channels}' + f' in {args.classes} classes' * bool(args.classes)
          + f' ({", ".join(args.class_names or "?")[:500]})' * bool(args.classes)
          + f'; {sum(p.numel() for p in raw.parameters()):,} parameters; {args.method}: {how}, '
          f'z_max {args.z_max:.3g}; {world} x {device}{", bf16" * args.bf16}'
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
    saved, origin, start = prepare(args, images, place)
    path = os.path.join(args.out_dir, 'ckpt.pt')

    # model
    raw, ema = networks(args, saved, origin, device)
    flow = net = as_flow(torch.compile(raw) if args.compile else raw, vars(args))
    if args.source:
        other = datasets.load(args.source, args.data_dir, args.image_size, args.channels,
                              flag='--source')
        flow.source = datasets.charges_of(other, '--source', device)
    if world > 1:
        net = torch.nn.parallel.DistributedDataParallel(net)

    # optimizer, and the state of dropout
    how = dict(lr=args.lr, fused=device.type != 'mps')
    opt = Muon(raw, **how) if args.muon else torch.optim.Adam(raw.parameters(), **how)
    torch.manual_seed(step_seed(args.seed + 1 + rank, start))
    if saved and 'opt' in saved:
        restore(opt, saved, device, rank)
    elif args.init_from and saved:
        say(f'{origin} has no optimizer state; Adam starts afresh')
    saved = None  # a quarter of it stays in use

    # folder: every process has looked at it, since all agree
    if rank == 0:
        log, images_seen = open_folder(args, start, raw, images, place)
    if args.reflow or args.distill:
        how = flow_flags(Parser()).parse_args([
            '--ckpt', args.reflow or args.distill, '--nfe', str(PAIR_NFE), '--seed', str(args.seed),
            '--data_dir', args.data_dir, '--bf16' if args.bf16 else '--no-bf16'])
        with given_by('--reflow' if args.reflow else '--distill'):
            teacher, _ = load_flow(how, device)
        images = pairs_of_teacher(teacher, args, start, *place)

    # loop
    signals = listen()
    meter, clock, logged, last_saved = new_meter(device, flow.unit), time.time(), start, start
    batches = training_steps(images, flow, args, start, place)
    for step in range(start + 1, args.steps + 1):
        # lr
        lr = learning_rate(args, step)
        for group in opt.param_groups:
            group['lr'] = lr

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
        logs, samples, saves = (every and step % every == 0 for every in
                                (args.log_every, args.sample_every, args.save_every))
        logs, saves = logs or stop, saves or stop or asked == 'save'
        if logs or samples or saves:
            stop_if_bad(meter, args, lambda bad: next(datasets.image_order(
                len(images), images_a_step(args), args.seed, bad - 1)), rank, world, path)
        if logs:
            if world > 1:
                dist.all_reduce(meter['sums'])
            if rank == 0:
                rate = (step - logged) * args.batch_size / (time.time() - clock)
                images_seen += (step - logged) * args.batch_size
                row = progress(args, step, meter, images_seen, rate, lr, device)
                log.write(json.dumps(row) + '\n')
            meter, clock, logged = new_meter(device, flow.unit), time.time(), step
        if samples and rank == 0:
            sample_grid(ema, args, device, os.path.join(args.out_dir, f'step{step:07d}.png'),
                        flow.source if args.source else None)
        if saves:
            rng = everywhere(rng_state(device))
            if rank == 0:
                keep_older(path, last_saved, args.keep)
                save(path, dict(net=raw.state_dict(), ema=ema.state_dict(), opt=opt.state_dict(),
                                step=step, args=vars(args), rng=rng))
                last_saved = step
        if stop:
            break
    say(f'saved {path} at step {step}; sample with: python sample.py --ckpt {path}')


if __name__ == '__main__':
    run(main, parse_args())
