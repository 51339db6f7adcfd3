"""Train a Poisson flow on images.

    python train.py                                # digits drawn on the spot, 3 minutes on 2 cores
    python train.py --dataset photos/              # a folder, .zip, .npy or .npz of images
    torchrun --nproc_per_node=8 train.py --dataset cifar10         # the published CIFAR-10 run

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

import torch
import torch.distributed as dist

import pfgm
from support import options, published, students
from support.checkpoint import in_folder, save
from support.cli import BadInput, Parser, above, given_by, say, unless
from support.cpu import speed_up
from support.flow import flow_of, load_flow
from support.images import charges_of, image_order, images_a_step, to_uint8, training_batches
from support.methods import METHODS, VP, as_flow
from support.networks import ARCHITECTURE, build, for_classes
from support.optim import Muon
from support.pictures import write_grid
from support.processes import agree, everywhere, fast_bf16, heard, listen, run, setup
from support.run import (Meter, claim, keep_older, open_log, open_run, progress, restore_optimizer,
                         stop_if_bad)
from support.seeds import fingerprint, rng_state, step_seed
from support.sets import SETS, load_images
from unet import UNet

# Presets. For small images ours switch on five things that the papers do not use: 2 x 2 pixel
# patches, the Muon optimizer, a learning rate that falls to 0, more points where the field is
# undecided (m_draws), and the skip connection of pfgm.PFGM; and they train on labels. All are off
# in the published presets.
GLYPHS = dict(
    nf=64, ch_mult=(1, 1), num_blocks=1, attn=(4,), patch=2, dropout=0, ncsnpp=False,
    label_first=False, classes=True, skip=False,
    batch_size=64, field_batch=1024, steps=1400, lr=1e-2, warmup=50, decay=1.0, muon=True,
    ema_decay=0.98, loss='sum', m_draws=4, sample_every=500)
MNIST = dict(GLYPHS, attn=(7, 8), skip=True, field_batch=4096, steps=5000, sample_every=1000)

# The official code of PFGM, github.com/Newbeeer/Poisson_flow.
CIFAR10 = dict(
    nf=128, ch_mult=(1, 2, 2, 2), num_blocks=4, attn=(16,), patch=1, dropout=0.1, ncsnpp=False,
    label_first=False, classes=False, skip=False,
    batch_size=128, field_batch=4096, steps=1300000, lr=2e-4, warmup=5000, decay=0.0, muon=False,
    ema_decay=0.9999, loss='sum', m_draws=1, sample_every=5000, **published.CIFAR10)
CIFAR10_DEEP = dict(CIFAR10, num_blocks=8)
CELEBA64 = dict(CIFAR10, field_batch=512, **published.CELEBA64)
LSUN_BEDROOM = dict(
    CIFAR10, ch_mult=(1, 1, 2, 2, 4, 4), num_blocks=2, dropout=0, batch_size=32, field_batch=32,
    steps=2400000, lr=2e-5, loss='mean', **published.LSUN_BEDROOM)

# EDM's values, with which PFGM++ was trained, github.com/Newbeeer/pfgmpp.
CIFAR10_PP = dict(
    CIFAR10, ch_mult=(2, 2, 2), dropout=0.13, batch_size=512, steps=390625, lr=1e-3, warmup=19531,
    ema_decay=0.99929)
CIFAR10_NCSNPP = dict(CIFAR10_PP, ncsnpp=True, label_first=True)

PRESETS = dict(glyphs=GLYPHS, mnist=MNIST, cifar10=CIFAR10, cifar10_deep=CIFAR10_DEEP,
               celeba64=CELEBA64, lsun_bedroom=LSUN_BEDROOM, cifar10_pp=CIFAR10_PP,
               cifar10_ncsnpp=CIFAR10_NCSNPP)
BY_SIZE = {28: MNIST, 32: CIFAR10, 64: CELEBA64, math.inf: LSUN_BEDROOM}  # up to so many pixels


# ---------------------------------------------------------------- flags

def parse_args(argv=None):
    """The flags. Those that the preset, the data or a checkpoint may fill are None if not given."""
    first = Parser(add_help=False)  # what decides which defaults --help shows
    first.add_argument('--dataset', default='glyphs', help='a folder, .zip, .npy or .npz of '
                       f'images, or one of {", ".join(SETS)} (default: glyphs)')
    first.add_argument('--preset', choices=PRESETS, help='whose defaults (default: those made for '
                       'the data set, else for its size)')
    known, _ = first.parse_known_args(argv)
    preset = PRESETS.get(known.preset or known.dataset, {})

    p = Parser(description=__doc__, parents=[first])
    yes_or_no = argparse.BooleanOptionalAction

    def add(group, flag, help, default=None, **how):
        name = flag.removeprefix('--')
        if name in GLYPHS or name in options.BY_DATA:
            help += f' (preset: {preset.get(name, "by the data")})'
        elif default is not None:
            help += f' (default: {default})'
        group.add_argument(flag, default=default, help=help.replace('%', '%%'), **how)

    data = p.add_argument_group('data')
    add(data, '--data_dir', 'where known data sets are kept', 'data')
    add(data, '--image_size', 'pixels a side (default: as the data is)', type=above(0, int))
    add(data, '--channels', 'grey or colour (default: as the data is)', type=int, choices=(1, 3))
    add(data, '--classes', 'train on the labels too; a tenth is left out, for --guidance',
        action=yes_or_no)
    add(data, '--flip', 'mirror half of the images (default: as the data is)', action=yes_or_no)
    add(data, '--workers', 'processes that read a set too large for memory', 4,
        type=above(-1, int))

    method = p.add_argument_group('method')
    add(method, '--method', 'the flow (default: pfgm, with --D or --ncsnpp pfgmpp)',
        choices=METHODS)
    add(method, '--D', 'augmented dimensions of pfgmpp, 1 or more, or inf (default: 128)',
        type=unless('inf', math.inf, above(1 - 1e-9)))
    add(method, '--field_batch', 'charges that define the target, or all (of other methods than '
        'pfgm by default 1, each image its own)', type=unless('all', 'all', above(0, int)))
    add(method, '--init_from', 'go on from this checkpoint, ours or one of the authors',
        type=in_folder)
    add(method, '--reflow', 'straighten this checkpoint: train on pairs it makes', type=in_folder)
    add(method, '--distill', 'the same, into samples of one call (--nfe 1)', type=in_folder)
    add(method, '--pairs', 'noise and images of --reflow and --distill', 100000,
        type=above(0, int))
    add(method, '--consistency', 'train for samples of one or two calls, without pairs', False,
        action=yes_or_no)
    add(method, '--source', 'of rf: these images into those of --dataset, not noise')

    network = p.add_argument_group('network')
    add(network, '--nf', 'channels of the first level', type=above(0, int, 1025))
    add(network, '--ch_mult', 'their multiple at each level', type=above(0, int, 17), nargs='+')
    add(network, '--num_blocks', 'residual blocks a level', type=above(0, int, 33))
    add(network, '--attn', 'image sizes with attention', type=above(0, int), nargs='*')
    add(network, '--dropout', 'in residual blocks', type=above(-1e-9, below=1))
    add(network, '--ncsnpp', 'NCSN++: Fourier features of the noise, FIR filters, a pyramid',
        action=yes_or_no)

    how = p.add_argument_group('run')
    add(how, '--steps', 'updates in all', type=above(0, int))
    add(how, '--batch_size', 'points a step, over all processes', type=above(0, int))
    add(how, '--accum', 'micro-batches a process splits its share into', 1, type=above(0, int))
    add(how, '--lr', "Adam's learning rate", type=above(0))
    add(how, '--warmup', 'steps in which lr rises from 0', type=above(-1, int))
    add(how, '--grad_clip', 'largest gradient norm', 1.0, type=above(0))
    add(how, '--ema_decay', 'of the averaged weights', type=above(-1e-9, below=1))
    add(how, '--seed', 'of the weights, the order of images and all noise', 0,
        type=above(-1, int))
    add(how, '--device', 'auto, cpu, cuda, cuda:1 or mps', 'auto')
    add(how, '--bf16', 'bfloat16 autocast (default: where it is fast)', action=yes_or_no)
    add(how, '--compile', 'torch.compile the network', False, action=yes_or_no)
    add(how, '--timeout', 'seconds after which a silent process ends the job', 600.0,
        type=above(0))

    output = p.add_argument_group('output')
    add(output, '--out_dir', 'where the checkpoint, log and sample grids go', 'out')
    add(output, '--log_every', 'steps between log lines', 50, type=above(0, int))
    add(output, '--sample_every', 'steps between sample grids; 0: none', type=above(-1, int))
    add(output, '--save_every', 'steps between checkpoints', 1000, type=above(0, int))
    add(output, '--keep', 'checkpoints to keep: ckpt.pt and those before it', 2,
        type=above(0, int))

    fields = p.add_argument_group('preset fields')
    add(fields, '--patch', 'pixels a side that the network takes as one', type=above(0, int, 65))
    add(fields, '--label_first', 'labels join the noise before the first linear layer',
        action=yes_or_no)
    add(fields, '--skip', 'of pfgm: far from the data add to the field of a charge at 0',
        action=yes_or_no)
    add(fields, '--muon', "move the network's matrices as Muon does, not Adam", action=yes_or_no)
    add(fields, '--decay', 'part of the steps in which lr falls to 0',
        type=above(-1e-9, below=1 + 1e-9))
    add(fields, '--loss', 'half the sum over components, or mean', choices=('sum', 'mean'))
    add(fields, '--m_draws', 'm is the mean of so many uniform draws', type=above(0, int, 17))
    add(fields, '--M', 'largest exponent of the perturbation', type=above(0, int, 10 ** 6))
    add(fields, '--z_max', 'where sampling starts', type=above(0))
    add(fields, '--upper_norm', 'largest |x| there', type=above(0))
    add(fields, '--z_exp', 'below it v_z is computed, not predicted', type=above(-1e-9))
    add(fields, '--z_min', 'where sampling ends (default: 1e-3; pfgmpp: 0.002 sqrt(D))',
        type=above(0))
    add(fields, '--sigma', 'noise at m = 0 (default: 0.01)', type=above(1e-9))
    add(fields, '--tau', 'growth of the noise, (1 + tau)^m (default: 0.03)', type=above(1e-9))
    add(fields, '--gamma', 'added to the norm of the field (default: 5)', type=above(-1e-9))
    add(fields, '--sigma_data', 'spread of the data, of pfgmpp (default: 0.5)',
        type=above(0, below=1e3))
    return p.parse_args(argv)


# ---------------------------------------------------------------- before the loop

def prepare(flags, images, world):
    """(the mapping of flags with nothing left open, the run.Origin to start from, the step)."""
    flags.update(data=images.identity, class_names=images.classes)
    origin = open_run(flags['out_dir'], flags['dataset'], images.identity, images.classes,
                      reflow=flags['reflow'], distill=flags['distill'],
                      init_from=flags['init_from'], consistency=flags['consistency'])
    preset = PRESETS.get(flags['preset'] or flags['dataset'])
    if preset is None:
        preset = next(row for size, row in BY_SIZE.items() if images.image_size <= size)
    flags = options.fill(flags, preset, flags['dataset'] in PRESETS, images, origin, world)
    if origin.resumed:
        options.check_resume(flags, origin.saved['args'])
    elif origin.saved and options.check_origin(flags, origin):
        origin = origin._replace(saved=for_classes(origin.saved, flags['classes']))

    start = origin.saved['step'] if origin.saved else 0
    weights = origin.saved and f'{fingerprint(origin.saved["net"].values()):08x}'
    own = ('out_dir', 'data_dir', 'device')  # may differ from process to process
    agree(f'--out_dir {flags["out_dir"]}', 'give all processes the same flags and data, and an '
          '--out_dir that all machines share, or copies of its ckpt.pt', step=start,
          images=len(images), weights=weights,
          **{key: value for key, value in flags.items() if key not in own})
    if start >= flags['steps']:
        raise BadInput(f'--steps {flags["steps"]}: {origin.path} has {start} already; give more, '
                       f'or sample from it with: python sample.py --ckpt {origin.path}')
    return flags, origin, start


def networks(flags, origin, device):
    """(the network, its average), from a checkpoint or new."""
    if origin.saved:
        raw = build(origin.saved['net'], flags, origin.path)
        ema = build(origin.saved['ema'], flags, origin.path)
    else:
        try:
            raw = speed_up(UNet(**{key: flags[key] for key in ARCHITECTURE}))
        except ValueError as error:
            raise BadInput(f'--{error}') from error
        ema = copy.deepcopy(raw)
    raw = raw.to(device, memory_format=torch.channels_last)
    ema = ema.to(device, memory_format=torch.channels_last)
    return raw.train(), ema.eval().requires_grad_(False)


def open_folder(args, start, parameters, images, device, world):
    """Make --out_dir this run's and say what is trained -> (its log, images seen by step start)."""
    try:
        os.makedirs(args.out_dir, exist_ok=True)
        claim(args.out_dir)
        log, seen = open_log(args.out_dir, start, args.batch_size)
    except OSError as error:
        raise BadInput(f'--out_dir {args.out_dir}: cannot write there ({error})') from error
    line = f'{images.name}: {len(images)} images of {args.image_size} x {args.image_size} x '
    line += f'{args.channels}'
    if args.classes:
        line += f' in {args.classes} classes ({", ".join(args.class_names or "?")[:500]})'
    line += f'; {parameters:,} parameters; {args.method}: '
    if args.method == 'pfgm':
        line += (f'M {args.M}, upper_norm {args.upper_norm:.4g}, z_exp {args.z_exp:.3g}, field of '
                 f'{args.field_batch} charges')
    else:
        line += f'D {args.D:g}'
    line += f', z_max {args.z_max:.3g}; {world} x {device}'
    if args.bf16:
        line += ', bf16'
    if start:
        line += f'; going on from step {start}'
    print(line, flush=True)
    return log, seen


def pairs_for_student(args, start, device, rank, world):
    """The pairs that --reflow or --distill is trained on, made by the teacher."""
    path = args.reflow or args.distill
    flag = '--reflow' if args.reflow else '--distill'
    with given_by(flag):
        teacher = load_flow(path, device, data_dir=args.data_dir, nfe=students.PAIR_NFE,
                            seed=args.seed, bf16=args.bf16)
    say(f'the student is {args.method} of D {args.D:g}, from the noise and weights of its teacher, '
        f'{teacher.method}')
    pairs = students.pairs_of_teacher(teacher, args.pairs, os.path.join(args.out_dir, 'pairs'),
                                      f'{flag} {path}', args.batch_size, device, rank, world)
    if rank == 0 and start == 0 and isinstance(teacher.net, VP):
        x = teacher.prior(range(64)).to(device)
        bent = students.straightness(teacher.net, x, teacher.labels_of(range(64), device)).mean()
        print(f'the teacher: straightness {bent:.4f} (0 is straight)', flush=True)
    return pairs


def write_samples(ema, args, device, source, path):
    """A PNG of the first 36 images that sample.py --nfe 20 makes of the average as it is now, or of
    a student's in one call. source: what they start from, or None."""
    nfe = 1 if args.distill or args.consistency else 20
    flow = flow_of(as_flow(ema, vars(args)), vars(args), seed=args.seed, nfe=nfe, source=source)
    x, _ = flow.follow(flow.prior(range(36)), device, range(36))
    write_grid('--out_dir', path, to_uint8(x))


def learning_rate(step, lr, steps, warmup, decay):
    """Of step 1 ... steps: up to lr in `warmup` steps, and down to 0 in the last part `decay`."""
    up = step / max(warmup, 1)
    down = (steps + 1 - step) / max(decay * steps, 1)
    return lr * min(up, down, 1)


# ---------------------------------------------------------------- the run

def main(args):
    # devices and processes
    device, rank, world = setup(args.device, args.timeout)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.deterministic  # shapes stay
    args.bf16 = fast_bf16(device) if args.bf16 is None else args.bf16

    # data, flags, and the checkpoint to go on from
    images = load_images(args.dataset, args.data_dir, args.image_size, args.channels)
    flags, origin, start = prepare(vars(args), images, world)
    args = argparse.Namespace(**flags)
    path = os.path.join(args.out_dir, 'ckpt.pt')

    # the network, as the flow that it stands for
    raw, ema = networks(flags, origin, device)
    flow = as_flow(torch.compile(raw) if args.compile else raw, flags)
    net = flow
    if world > 1:
        net = torch.nn.parallel.DistributedDataParallel(flow)
    source = None  # the images that a flow from another data set starts from
    if args.source:
        other = load_images(args.source, args.data_dir, args.image_size, args.channels,
                            flag='--source')
        source = charges_of(other, '--source', device)

    # the optimizer, and the state of dropout
    kind = Muon if args.muon else torch.optim.Adam
    opt = kind(raw if args.muon else raw.parameters(), lr=args.lr, fused=device.type != 'mps')
    torch.manual_seed(step_seed(args.seed + 1 + rank, start))
    if origin.saved and 'opt' in origin.saved:
        restore_optimizer(opt, origin.saved, device, rank)
    elif args.init_from and origin.saved:
        say(f'{origin.path} has no optimizer state; Adam starts afresh')
    origin = None  # a quarter of it stays in use

    # the folder: every process has looked at it, since all agree
    if rank == 0:
        parameters = sum(p.numel() for p in raw.parameters())
        log, images_seen = open_folder(args, start, parameters, images, device, world)
    pairs = None
    if args.reflow or args.distill:
        pairs = pairs_for_student(args, start, device, rank, world)

    # the loop
    mine = slice(rank * args.batch_size // world, (rank + 1) * args.batch_size // world)
    batches = training_batches(images, args.batch_size, args.field_batch, args.seed, start,
                               flip=args.flip, classes=args.classes, workers=args.workers,
                               device=device, rank=rank, world=world, source=source, pairs=pairs)
    signals = listen()
    meter = Meter(device, flow.unit)
    clock, logged, last_saved = time.time(), start, start
    for step in range(start + 1, args.steps + 1):
        lr = learning_rate(step, args.lr, args.steps, args.warmup, args.decay)
        for group in opt.param_groups:
            group['lr'] = lr

        # images, moved off the plane; every rank draws all of them and takes its share
        batch = next(batches)                                        # images.Batch
        # Students, sources and labels enter here: pairs and sources bring their own noise eps,
        # consistency training another image to aim at, and labels a field of their own class.
        noise = {} if batch.eps is None else dict(eps=batch.eps)
        labels = () if batch.labels is None else (batch.labels[mine],)
        among = None if batch.among is None else batch.among[mine]
        moved, z = flow.perturb(batch.clean, batch.generator, **noise)
        clean, moved, z = batch.clean[mine], moved[mine], z[mine]    # (b, C, S, S), (b,)
        charges, weight = batch.charges, flow.weight(moved, z)
        if args.consistency:
            stage = 1 + 8 * (step - 1) // args.steps                 # the levels ever closer
            clean, share = students.at_lower_level(flow, clean, moved, z, labels, stage)
            charges, weight = None, weight / (1 - share)

        # target: the field that the network should have there
        target = flow.target(moved, z, clean, charges, among)        # v_x like moved, v_z (b,)

        # network and loss, in --accum parts
        losses = []
        points = (moved, z, *target, weight, *labels)
        for i, part in enumerate(zip(*(t.chunk(args.accum) for t in points))):
            x, height, target_x, target_z, w, *label = part
            is_last = i == args.accum - 1
            together = contextlib.nullcontext() if is_last or world == 1 else net.no_sync()
            with together, torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                field = net(x, height, *label)
                loss = pfgm.field_loss(field, (target_x, target_z), w, args.loss)
                (loss.mean() / args.accum).backward()
            losses.append(loss.detach())

        # update of the network, and of its average
        norm = torch.nn.utils.clip_grad_norm_(raw.parameters(), args.grad_clip)
        opt.step()
        opt.zero_grad(set_to_none=True)
        decay = min(args.ema_decay, (1 + step) / (10 + step))        # it warms up
        with torch.no_grad():  # else every step would hang one more graph on the average
            torch._foreach_lerp_(list(ema.parameters()), list(raw.parameters()), 1 - decay)
        meter.observe(step, z, torch.cat(losses), norm)

        # log, sample, save
        asked = heard(signals, step, device, world)
        stop = step == args.steps or asked == 'leave'
        logs = stop or step % args.log_every == 0
        samples = args.sample_every and step % args.sample_every == 0
        saves = stop or asked == 'save' or step % args.save_every == 0
        if logs or samples or saves:
            def images_of(step, count=images_a_step(args.batch_size, args.field_batch)):
                return next(image_order(len(pairs or images), count, args.seed, step - 1))[mine]
            stop_if_bad(meter, images_of, path, args.lr, args.bf16)
        if logs:
            if world > 1:
                dist.all_reduce(meter.sums)
            if rank == 0:
                rate = (step - logged) * args.batch_size / (time.time() - clock)
                images_seen += (step - logged) * args.batch_size
                row = progress(meter, step, args.steps, images_seen, rate, args.batch_size, lr,
                               device)
                log.write(json.dumps(row) + '\n')
            meter, clock, logged = Meter(device, flow.unit), time.time(), step
        if samples and rank == 0:
            write_samples(ema, args, device, source,
                          os.path.join(args.out_dir, f'step{step:07d}.png'))
        if saves:
            rng = everywhere(rng_state(device))
            if rank == 0:
                keep_older(path, last_saved, args.keep)
                save(path, dict(net=raw.state_dict(), ema=ema.state_dict(), opt=opt.state_dict(),
                                step=step, args=flags, rng=rng))
                last_saved = step
        if stop:
            break
    say(f'saved {path} at step {step}; sample with: python sample.py --ckpt {path}')


if __name__ == '__main__':
    run(main, parse_args())
