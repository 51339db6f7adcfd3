"""Sample from a trained Poisson flow, or from the exact field of a data set.

    python sample.py --nfe 100                     # out/ckpt.pt -> samples.png
    python sample.py --exact --dataset glyphs      # no network: the field of the data itself
    torchrun --nproc_per_node=8 -- sample.py --n 50000 --out samples.npz   # all GPUs, for FID

--out ends in .png (one grid), .gif (the flow from noise to images), .npz (arr_0, uint8 NHWC), or
is a folder. Image i depends on --seed and i alone, however the work is split.
"""
import argparse
import json
import math
import os
import shutil
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

import data as datasets
import pfgm
from baselines import ancestral
from launch import (BadInput, Parser, above, fast_bf16, fingerprint, run, setup, step_seed, wait,
                    write)
from train import PRESETS, flow_constants, grid_of
from unet import load_checkpoint


SOLVERS = ('rk45', *pfgm.SOLVERS, 'ddim')
OFFICIAL_BY_SIZE = {32: 'cifar10', 64: 'celeba64', 256: 'lsun_bedroom'}  # the authors' data sets


def class_list(text):
    return [] if text == 'none' else [above(-1, int)(part) for part in text.split(',')]


def flow_flags(p):
    """The flags that say which flow to follow and how, shared with evaluate.py."""
    p.add_argument('--ckpt', default='out/ckpt.pt', help='ours or an official one')
    p.add_argument('--weights', default='ema', choices=('ema', 'raw'))
    p.add_argument('--exact', action='store_true', help='follow the field of --dataset instead')
    p.add_argument('--dataset', default=None, help='of --exact (default: glyphs); or what the '
                   'checkpoint was trained on (default: as it says)')
    p.add_argument('--data_dir', default='data')
    p.add_argument('--image_size', type=above(0, int), default=None, help='of --exact')
    p.add_argument('--batch_size', type=above(0, int), default=64, help='images at a time')
    p.add_argument('--solver', choices=SOLVERS, default=None,
                   help='default: rk45, or where --nfe is given unipc (official checkpoints: heun)')
    p.add_argument('--eta', type=above(-1e-9, below=1.001), default=0.0, help='fresh noise of ddim:'
                   ' 0 none (it is euler), 1 ancestral sampling of DDPM (default: 0)')
    p.add_argument('--nfe', type=above(0, int), default=None,
                   help='network calls an image, of all solvers but rk45 (default: 100; '
                   'of a distilled network 1)')
    p.add_argument('--schedule', choices=(*pfgm.SCHEDULES, 'time'), default=None, help='planes of '
                   'the steps (default: radius; official checkpoints: log); time: even in the t of '
                   'vp, subvp, ddpm and rf')
    p.add_argument('--z_min', type=above(0), default=None, help='the last plane (default: 1e-3 in '
                   'PFGM and 0.002 sqrt(D) in PFGM++; with --nfe up to 5 sqrt(D) / nfe^2)')
    p.add_argument('--to_data', action=argparse.BooleanOptionalAction, default=None, help='make '
                   'the last call on z_min and go straight to z = 0 (default: not with rk45, nor '
                   'for official checkpoints)')
    p.add_argument('--classes', type=class_list, default=None, metavar='0,7,...', help='labels of '
                   'the images, in turn, or none (default: all, of a network trained with them)')
    p.add_argument('--guidance', type=above(-1e-9, below=1e3), default=1.0, help='classifier-free; '
                   'other than 1 it takes two calls for each (default: 1)')
    p.add_argument('--tol', type=above(0), default=1e-4, help='rtol and atol of rk45')
    p.add_argument('--small_z', choices=('exact', 'official'), default=None,
                   help='v_z below z_exp (default: exact; official for official checkpoints)')
    p.add_argument('--bf16', action=argparse.BooleanOptionalAction, default=None, help='bfloat16 '
                   'autocast (default: where it is fast, not for official checkpoints; '
                   'never with rk45)')
    p.add_argument('--compile', action='store_true', help='torch.compile the network')
    p.add_argument('--seed', type=above(-1, int), default=0)
    p.add_argument('--device', default='auto')


def parse_args(argv=None):
    p = Parser(description=__doc__)
    flow_flags(p)
    p.add_argument('--n', type=above(0, int), default=64, help='images')
    p.add_argument('--out', default='samples.png', help='.png, .gif, .npz or a folder')
    kind = p.add_mutually_exclusive_group()
    kind.add_argument('--gif', action='store_true', help='like --out samples.gif')
    kind.add_argument('--interpolate', action='store_true',
                      help='rows of 8: slerp between two directions, both of the prior\'s norm')
    kind.add_argument('--rescale', action='store_true',
                      help='rows of 8: one direction, norms from a third to twice the prior\'s')
    kind.add_argument('--encode', metavar='IMAGES', help='follow these images up to z_max and back')
    kind.add_argument('--field_lines', action='store_true', help='the figure: a heart of charges')
    return p.parse_args(argv)


def place_for(args):
    """setup(), on the CPU where the exact field would have no float64."""
    device, rank, world = setup(args.device)
    if args.exact and device.type == 'mps':
        print('--exact: in float64, which mps lacks; on the CPU')
        device = torch.device('cpu')
    return device, rank, world


def load_flow(args, device):
    """(net, flow, images or None); flow is what sample_ode needs to know beside the network."""
    if args.solver == 'rk45' and args.nfe:
        print(f'--nfe {args.nfe} is not used: rk45 makes the calls that --tol {args.tol} asks for')
    images, saved = None, {}
    if args.exact:
        images = datasets.load(args.dataset or 'glyphs', args.data_dir, args.image_size)
        if images.pixels is None:
            raise BadInput(f'--exact --dataset {args.dataset}: does not fit in memory')
        flow = flow_constants(images, args.dataset)
        net = pfgm.ExactField(datasets.Charges(images.pixels.to(device), dtype=torch.float64))
        flow.update(z_exp=0.0, D=1.0, classes=0, student=False,  # its v_z needs no help
                    shape=tuple(images.pixels.shape[1:]))
    else:
        net, saved = load_checkpoint(args.ckpt, args.weights)
        net.to(device, memory_format=torch.channels_last)
        if args.compile:
            net.compile()
        if saved.get('official'):
            name = args.dataset or OFFICIAL_BY_SIZE.get(saved['image_size'])
            if name not in PRESETS or PRESETS[name]['M'] is None:
                raise BadInput(f'--dataset {name}: an official checkpoint belongs to one of '
                               + ', '.join(k for k, row in PRESETS.items() if row['M']))
            saved = {**saved, **PRESETS[name], 'z_min': 1e-3, 'gamma': 5.0}
        flow = {k: saved[k] for k in ('z_max', 'upper_norm', 'z_exp', 'z_min', 'gamma', 'D')}
        flow['shape'] = (saved['channels'], saved['image_size'], saved['image_size'])
        flow.update(classes=saved['classes'], method=saved['method'], step=saved['step'],
                    weights=args.weights, student=bool(saved.get('distill')))
    official = saved.get('official', False)
    nfe = args.nfe or (1 if saved.get('distill') else None)  # all that a student has learned
    solver = args.solver or ('rk45' if not nfe else 'heun' if official else 'unipc')
    flow.update(small_z=args.small_z or ('official' if official else 'exact'), solver=solver,
                nfe=nfe or 100, tol=args.tol, guidance=args.guidance, eta=args.eta,
                seed=args.seed, schedule=args.schedule or ('log' if official else 'radius'),
                to_data=False if official and args.to_data is None else args.to_data,
                z_min=args.z_min or flow['z_min'], z_last=args.z_min)
    flow['bf16'] = not args.exact and (fast_bf16(device) and not official
                                       if args.bf16 is None else args.bf16)
    check_flow(args, net, flow)
    return net, flow, images


def check_flow(args, net, flow):
    """The flags that this flow does not take; and its classes as a list."""
    known, wanted = flow['classes'], args.classes
    wanted = list(range(known)) if wanted is None else wanted
    for wrong, message in (
        (args.schedule == 'time' and not hasattr(net, 'planes'), '--schedule time: only vp, subvp, '
         f'ddpm and rf have a time; give one of {", ".join(pfgm.SCHEDULES)}'),
        (args.eta and flow['solver'] != 'ddim', f'--eta {args.eta}: belongs to --solver ddim, not '
         + flow['solver']),
        (args.eta and getattr(args, 'encode', None), f'--eta {args.eta}: fresh noise cannot be '
         'encoded; leave it out'),
        (flow['solver'] == 'ddim' and flow['D'] != math.inf, '--solver ddim: adds Gaussian noise, '
         'for D = inf only (vp, subvp, ddpm, rf, pfgmpp with --D inf)'),
        ((args.z_min or 0) >= flow['z_max'], f'--z_min {args.z_min}: must be below z_max '
         f'{flow["z_max"]:.4g}'),
        (args.compile and args.exact, '--compile: --exact has no network; leave it out'),
        (args.guidance != 1 and not known, f'--guidance {args.guidance}: the network knows no '
         'classes; leave it out, or train with --classes'),
        (max(wanted, default=-1) >= known, f'--classes {max(wanted, default=-1)}: the network '
         'knows '
         + (f'0 to {known - 1}' if known else 'none; leave it out, or train with --classes')),
    ):
        if wrong:
            raise BadInput(message)
    flow.update(classes=wanted, known=known)


def prior(flow, seed, indices):
    """The starts of images `indices`, each drawn from (seed, its index) alone."""
    return torch.cat([pfgm.sample_prior(
        (1, *flow['shape']), flow['z_max'], flow['upper_norm'], flow['D'],
        generator=torch.Generator().manual_seed(step_seed(seed, i))) for i in indices])


def labels_of(flow, indices, device):
    """The classes (b,) of images `indices`, or None for none."""
    chosen = flow['classes']
    if chosen and len(indices):
        return torch.tensor([chosen[i % len(chosen)] for i in indices], device=device)


def noise_of(flow, indices):
    """The fresh noise of ddim: noise(step) like x, each image from its own generator."""
    draws = [torch.Generator().manual_seed(step_seed(flow['seed'], 2 ** 33 + i)) for i in indices]
    return lambda step: torch.stack([torch.randn(flow['shape'], generator=g) for g in draws])


def ending(net, flow):
    """(whether the last call leads straight to z = 0, the plane on which it is made or, without it,
    the flow ends)."""
    fixed, z = flow['solver'] != 'rk45', flow['z_min']
    to_data = fixed if flow['to_data'] is None else flow['to_data']
    if to_data and fixed:
        if isinstance(net, pfgm.ExactField) and not flow['z_last']:
            flow['z_last'] = pfgm.deciding_z(net.charges)  # below it the lines are straight
        z = flow['z_last'] or pfgm.last_plane(z, flow['nfe'], flow['D'])
    return to_data, z


def facts(net, flow):
    """What a line of results needs to say of a flow, so that two that differ can be told apart."""
    to_data, z_last = ending(net, flow)
    names = ('method', 'D', 'weights', 'step', 'solver', 'nfe', 'schedule', 'small_z', 'z_min',
             'z_exp', 'guidance', 'eta', 'classes', 'bf16')
    found = {k: flow[k] for k in names if k in flow}
    found.update(D='inf' if flow['D'] == math.inf else flow['D'], to_data=to_data, z_last=z_last)
    if flow['solver'] == 'rk45':
        found.update(tol=flow['tol'], nfe=None, schedule=None, bf16=False)
    return found


@torch.no_grad()
def follow(net, flow, x, device, indices=(), up=False, callback=None):
    """x down from z_max to z_min (and z = 0), or up -> (x, nfe), in float32 (float64 for an exact
    field). indices: which images these are, for their classes and fresh noise."""
    labels = labels_of(flow, indices, device)
    solver = flow['solver']
    if solver == 'ddim':
        solver = ancestral(flow['eta'], noise_of(flow, indices)) if flow['eta'] else 'euler'
    to_data, z_last = ending(net, flow)
    ends = (flow['z_min'], flow['z_max']) if up else (flow['z_max'], z_last)
    dtype = torch.float64 if isinstance(net, pfgm.ExactField) else torch.float32
    twice = labels is not None and flow['guidance'] != 1
    how = {k: flow[k] for k in ('D', 'gamma', 'z_exp', 'small_z', 'guidance')}
    bf16 = flow['bf16'] and solver != 'rk45'  # whose tolerance is finer than bfloat16
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            x, nfe = pfgm.sample_ode(
                net, x.to(dtype).to(device), *ends, solver, flow['nfe'], labels=labels, **how,
                rtol=flow['tol'], atol=flow['tol'],
                each=flow['small_z'] != 'official',
                schedule_name='log' if up else net.planes if flow['schedule'] == 'time' else
                flow['schedule'], to_data=to_data and not up, callback=callback)
    except pfgm.SolverError as error:
        raise BadInput(f'--tol {flow["tol"]}: {error}; try a larger one, or --nfe 100') from error
    if not x.isfinite().all():
        raise BadInput('--ckpt: the network leads to images that are not finite; it has diverged: '
                       'give another one, or train it again with a lower --lr')
    return x, nfe * (1 + twice)


def generate(net, flow, indices, args, place, starts=None):
    """Yield (indices, uint8 images on the CPU) of a list of indices, a batch at a time, with
    progress. `starts` (n, C, H, W) replaces the prior's draws."""
    device, rank, _ = place
    clock = time.time()
    for first in range(0, len(indices), args.batch_size):
        batch = indices[first:first + args.batch_size]
        x = prior(flow, args.seed, batch) if starts is None else starts[batch]
        x, nfe = follow(net, flow, x, device, batch)
        if rank == 0:
            done, seconds = first + len(batch), time.time() - clock
            left = int(seconds / done * (len(indices) - done))
            print(f'{done}/{len(indices)} images  {flow["solver"]} nfe {nfe}  '
                  f'{done / seconds:.2f} img/s  {left // 60}:{left % 60:02d} left', flush=True)
        yield batch, datasets.to_uint8(x).cpu()


def special_starts(args, flow):
    """Starts of --interpolate and --rescale: rows of 8 images."""
    rows = max(args.n // 8, 1)
    x = prior(flow, args.seed, range(2 * rows)).double()
    x = (x / x.flatten(1).norm(dim=1).view(-1, 1, 1, 1))
    a, b = x[0::2, None], x[1::2, None]                         # (rows, 1, C, H, W), unit length
    t = torch.linspace(0, 1, 8, dtype=torch.float64).view(1, 8, 1, 1, 1)
    # a prior that is not clipped: the norm of z_max eps / sqrt(chi2_D) at the mean of chi2_D
    norm = flow['upper_norm'] or flow['z_max'] * math.sqrt(a[0].numel()) / pfgm.unit(flow['D'])
    if args.rescale:
        x = a * norm * (1 / 3 + 5 / 3 * t)
    else:  # slerp: sin((1-t) w) / sin w a + sin(t w) / sin w b, w the angle between a and b
        w = (a * b).sum((2, 3, 4), keepdim=True).acos()
        x = norm * (((1 - t) * w).sin() * a + (t * w).sin() * b) / w.sin()
    return x.flatten(0, 1).float()


def write_flow_gif(net, flow, args, device):
    """The same images at every step on the way down, as an animated GIF."""
    frames = []

    def keep(z, x):  # far from the data x is huge: shown relative to its own largest value
        shown = x / x.abs().amax((1, 2, 3), keepdim=True).clamp_min(1)
        frames.append(datasets.to_uint8(shown.float()).cpu())
    x = prior(flow, args.seed, range(args.n))
    keep(flow['z_max'], x)
    _, nfe = follow(net, flow, x, device, range(args.n), callback=keep)
    frames = frames[::-(-len(frames) // 40)] + frames[-1:]
    grids = [grid_of(frame) for frame in frames]
    write('--out', args.out, lambda file: grids[0].save(
        file, 'GIF', save_all=True, append_images=grids[1:], loop=0,
        duration=[80] * (len(grids) - 1) + [2000]))
    print(f'{args.out}: {args.n} images, {len(grids)} frames, {flow["solver"]} nfe {nfe}')


def encode(net, flow, args, device):
    """Images up to z_max and back. A PNG with one image a row: input, latent, what comes back,
    and |error| x 10; norms and errors are printed."""
    C, size, _ = flow['shape']
    images = datasets.load(args.encode, args.data_dir, size, C)
    pixels = torch.stack([images[i] for i in range(min(args.n, len(images)))])
    x = datasets.to_float(pixels).to(device)
    latent, nfe_up = follow(net, flow, x, device, up=True)
    back, nfe_down = follow(net, flow, latent, device)
    error = (back.to(x) - x).abs()
    for i, (l, e) in enumerate(zip(latent, error)):
        print(f'image {i}: |latent| {l.norm():.1f}  error mean {e.mean():.2e}  max {e.max():.2e}')
    print(f'{len(x)} images: mean error {error.mean():.2e} of a range of 2 '
          f'(one grey level is 7.8e-3), nfe {nfe_up} up, {nfe_down} down')
    shown = latent / latent.abs().amax((1, 2, 3), keepdim=True)
    row = torch.stack([x, shown.to(x), back.to(x), error * 20 - 1], dim=1)
    picture = grid_of(datasets.to_uint8(row.flatten(0, 1)), nrow=4)
    write('--out', args.out, lambda file: picture.save(file, 'PNG'))


def field_lines(path):
    """A PNG of the field lines of a heart of charges, from the hemisphere down to the plane."""
    from PIL import Image, ImageDraw
    side = torch.arange(-1.2, 1.3, 0.11, dtype=torch.float64)
    x, y = torch.meshgrid(side, side, indexing='xy')
    heart = (x * x + y * y - 1) ** 3 <= x * x * y ** 3
    charges = torch.stack([x[heart], y[heart]], 1)
    n, z_max = 180, 4.0
    i = torch.arange(n, dtype=torch.float64) + 0.5  # a Fibonacci lattice: even on the hemisphere
    z, angle = 1 - i / n, math.pi * (1 + 5 ** 0.5) * i
    x = torch.stack([angle.cos(), angle.sin()], 1) * (z_max * (1 - z * z).sqrt() / z)[:, None]
    planes = [(torch.full((n,), z_max, dtype=x.dtype), x)]
    pfgm.sample_ode(pfgm.ExactField(charges), x, z_max, 1e-3, 'heun', 799, z_exp=0,
                    callback=lambda z, x: planes.append((z, x)))
    z, x = (torch.stack(parts) for parts in zip(*planes))            # (steps, n), (steps, n, 2)
    drawn = torch.hypot(x.norm(dim=2), z) <= 2.2                     # inside this hemisphere

    def project(x, z):  # seen from the front and above
        return torch.stack([800 + 330 * x[..., 0], 940 - 330 * (0.8 * z + 0.6 * x[..., 1])], -1)
    image = Image.new('RGB', (1600, 1440), 'white')
    draw = ImageDraw.Draw(image)
    for k in x[-1, :, 1].argsort(descending=True).tolist():  # the farther ones first
        points = project(x, z)[drawn[:, k], k].tolist()
        for j, (start, end) in enumerate(zip(points, points[1:])):
            share = j / len(points)
            draw.line([*start, *end], (int(60 + 170 * share), 110 - int(60 * share),
                                       int(210 - 130 * share)), 3)
        u, v = points[0]
        draw.ellipse([u - 6, v - 6, u + 6, v + 6], (40, 90, 200))
    for u, v in project(charges, torch.zeros(())).tolist():
        draw.ellipse([u - 6, v - 6, u + 6, v + 6], (215, 30, 50))
    image = image.resize((800, 720), Image.Resampling.LANCZOS)
    write('--out', path, lambda file: image.save(file, 'PNG'))
    print(f'{path}: {n} field lines of {len(charges)} charges')


# ---------------------------------------------------------------- files

KINDS = ('.png', '.gif', '.npz')
MARK = '.made_by.json'  # in a folder of samples: what made them


def check_out(out, single):
    """Whether --out can be written: now, not after an hour of sampling. single: one file."""
    folder = os.path.dirname(out.rstrip('/'))
    if folder and not os.path.isdir(folder):
        raise BadInput(f'--out {out}: no folder {folder}; make it with: mkdir -p {folder}')
    if not single and os.path.splitext(out)[1]:
        raise BadInput(f'--out {out}: must end in .png, .gif or .npz, or be a folder')
    if not single and os.path.lexists(out) and not os.path.isdir(out):
        raise BadInput(f'--out {out}: a file; must end in .png, .gif or .npz, or be a folder')
    try:
        if single:
            with open(f'{out}.part', 'wb'):
                pass
            os.remove(f'{out}.part')
        else:
            os.makedirs(out, exist_ok=True)
    except OSError as error:
        raise BadInput(f'--out {out}: cannot be written ({error}); give another') from error


def claim(folder, flag, made_by):
    """Make the folder, or go on with one that holds images made by the same flags: image i depends
    on them and on i alone. They are written to it, so that other images are not taken for these."""
    path = os.path.join(folder, MARK)
    os.makedirs(folder, exist_ok=True)
    try:
        with open(path) as file:
            before = json.load(file)
    except (OSError, ValueError):
        before = {}
        if os.listdir(folder):
            raise BadInput(f'{flag}: {folder} is a folder that is not empty, and does not say what '
                           'made it; give a new one') from None
    differ = [k for k in made_by if before and before.get(k) != made_by[k]]
    if differ:
        raise BadInput(f'{flag}: {folder} holds images made with {differ[0]} {before.get(differ[0])}'
                       f', not {made_by[differ[0]]}; give a new one, or remove that')
    write(flag, path, lambda file: file.write(json.dumps(made_by).encode()))


def image_path(folder, i):
    return os.path.join(folder, f'{i:06d}.png')


def save_png(folder, i, pixels):
    """uint8 (C, H, W) as a file, whole or not at all."""
    from PIL import Image
    image = Image.fromarray(pixels.permute(1, 2, 0).squeeze(2 if len(pixels) == 1 else ()).numpy())
    write('--out', image_path(folder, i), lambda file: image.save(file, 'PNG'))


def read_png(folder, i):
    """The array (H, W, C) of save_png()."""
    from PIL import Image
    with Image.open(image_path(folder, i)) as image:
        return np.array(image).reshape(*image.size[::-1], -1)


def write_npz(path, folder, n, shape):
    """arr_0, uint8 (n, H, W, C), from the folder's images, one at a time: it may not fit in memory."""
    C, H, W = shape
    head = dict(descr='|u1', fortran_order=False, shape=(n, H, W, C))

    def save(file):
        with zipfile.ZipFile(file, 'w') as archive, archive.open('arr_0.npy', 'w',
                                                                 force_zip64=True) as array:
            np.lib.format.write_array_header_1_0(array, head)
            for i in range(n):
                array.write(read_png(folder, i).tobytes())
    write('--out', path, save)


def compare_with(images, folder, n):
    """Print how many of the images made are images of a data set."""
    found, count, worst = images.pixels.cpu().flatten(1), 0, 0.0
    for part in torch.arange(n).split(64):
        x = torch.from_numpy(np.stack([read_png(folder, i).transpose(2, 0, 1) for i in part.tolist()]))
        x = x.flatten(1).double()
        nearest = torch.cat([torch.cdist(x, y.double()) for y in found.split(4096)], 1).argmin(1)
        error = (x - found[nearest]).square().mean(1).sqrt()
        count, worst = count + int((error < 1).sum()), max(worst, float(error.max()))
    print(f'{count} of {n} samples are images of {images.name} to within a grey level, '
          f'{worst:.2f} RMS at most')


def make_images(net, flow, images, args, place):
    """The images of --out, each process its share, each image a file as soon as it is made, so that
    the same command again makes only what is missing. A .png or .npz is made of them at the end."""
    _, rank, world = place
    special = special_starts(args, flow) if args.interpolate or args.rescale else None
    n = args.n if special is None else len(special)
    tensors = [images.pixels] if args.exact else net.state_dict().values()
    made_by = json.dumps(dict(flow, weights=f'{fingerprint(tensors):08x}', rows=(
        'interpolate' if args.interpolate else 'rescale' if args.rescale else None)))
    single = args.out.endswith(KINDS)
    folder = f'{args.out}.{zlib.crc32(made_by.encode()):08x}' if single else args.out
    if rank == 0:
        claim(folder, f'--out {args.out}', json.loads(made_by))
    wait()
    missing = [i for i in range(n) if not os.path.exists(image_path(folder, i))]
    if rank == 0 and len(missing) < n:
        print(f'{folder}: {n - len(missing)} of {n} images are there; making the others')
    wait()  # all have looked before any adds to them
    with ThreadPoolExecutor(4) as pool:  # files are written while the next batch is sampled
        saves = []
        for indices, pixels in generate(net, flow, missing[rank::world], args, place, special):
            saves += [pool.submit(save_png, folder, *pair) for pair in zip(indices, pixels)]
            while saves and saves[0].done():
                saves.pop(0).result()  # a disk that is full ends the run here
        for save in saves:
            save.result()
    wait()
    if rank > 0:
        return
    lost = next((i for i in range(n) if not os.path.exists(image_path(folder, i))), None)
    if lost is not None:
        raise BadInput(f'--out {args.out}: {image_path(folder, lost)} is not there; all processes '
                       'must write to one folder')
    if args.exact:
        compare_with(images, folder, n)
    if args.out.endswith('.npz'):
        write_npz(args.out, folder, n, flow['shape'])
    elif single:
        pixels = torch.from_numpy(np.stack([read_png(folder, i) for i in range(n)]))
        picture = grid_of(pixels.permute(0, 3, 1, 2), nrow=8 if special is not None else None)
        write('--out', args.out, lambda file: picture.save(file, 'PNG'))
    if single:
        shutil.rmtree(folder)
    print(f'{args.out}: {n} images')


def main(args):
    if args.gif and not args.out.endswith('.gif'):
        args.out = os.path.splitext(args.out)[0] + '.gif'
    picture, rows = args.encode or args.field_lines, args.interpolate or args.rescale
    if picture and not args.out.endswith('.png') or rows and args.out.endswith('.gif'):
        raise BadInput(f'--out {args.out}: a picture; must end in .png')
    one = picture or args.out.endswith('.gif')  # made by one process
    device, rank, world = place = place_for(args)
    if rank == 0:
        check_out(args.out, args.out.endswith(KINDS))
    if one and rank > 0:
        return
    if args.field_lines:
        return field_lines(args.out)
    net, flow, images = load_flow(args, device)
    if rank == 0:
        print('  '.join(f'{k} {v}' for k, v in flow.items()), flush=True)
    if args.encode:
        return encode(net, flow, args, device)
    if args.out.endswith('.gif'):
        return write_flow_gif(net, flow, args, device)
    make_images(net, flow, images, args, place)


if __name__ == '__main__':
    run(main, parse_args())
