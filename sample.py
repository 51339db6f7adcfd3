"""Sample from a trained Poisson flow, or from the exact field of a data set.

    python sample.py --nfe 100                     # out/ckpt.pt -> samples.png
    python sample.py --ckpt network-snapshot-200000.pkl --nfe 35   # a file of EDM or PFGM++
    python sample.py --exact --dataset glyphs      # no network: the field of the data itself
    torchrun --nproc_per_node=8 -- sample.py --n 50000 --out samples.npz   # all GPUs, for FID

--out ends in .png (one grid), .gif (the flow from noise to images), .npz (arr_0, uint8 NHWC), or
is a folder. Image i depends on --seed and i alone, however the work is split; it is a file as soon
as it is made, and the same command again makes only what is missing.
"""
import json
import math
import os
import shutil
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

import pfgm
from support.cli import BadInput, Parser, above, say, write
from support.flow import SAMPLING_FLAGS, exact_flow, flow_flags, load_flow
from support.images import to_float, to_uint8
from support.pictures import grid_of
from support.processes import run, setup, wait
from support.seeds import fingerprint
from support.sets import load_images


def parse_args(argv=None):
    p = flow_flags(Parser(description=__doc__))
    p.add_argument('--n', type=above(0, int), default=None, help='images (default: 64; of '
                   '--inpaint and --colorize results an image, default: 8)')
    p.add_argument('--out', default='samples.png', help='.png, .gif, .npz or a folder')
    kind = p.add_mutually_exclusive_group()
    kind.add_argument('--gif', action='store_true', help='like --out samples.gif')
    kind.add_argument('--interpolate', nargs='*', metavar='IMAGE', help='rows of 8: slerp between '
                      'two directions, both of the prior\'s norm; or between the latents of two '
                      'images that are given')
    kind.add_argument('--rescale', action='store_true',
                      help='rows of 8: one direction, norms from a third to twice the prior\'s')
    kind.add_argument('--encode', metavar='IMAGES', help='follow these images up to z_max and back')
    kind.add_argument('--inpaint', metavar='IMAGES', help='make anew what is white in --mask, the '
                      'rest kept as it is: a row an image, of it, what is kept, and results (by '
                      'default of --solver renew --nfe 100)')
    kind.add_argument('--colorize', metavar='IMAGES', help='the same, kept their grey')
    p.add_argument('--from', dest='start', metavar='IMAGES', help='what a flow of train.py '
                   '--source carries across (default: the images it was trained on), in turn')
    p.add_argument('--mask', metavar='IMAGE', help='of --inpaint')
    return p.parse_args(argv)


def special_starts(args, flow, device):
    """(the starts of --interpolate and --rescale, rows of 8 images; words that tell them from
    others)."""
    C, size, _ = flow.shape
    ends = [load_images(path, args.data_dir, size, C, flag='--interpolate')[0]
            for path in args.interpolate or ()]
    x = flow.prior(range(2 * max(args.n // 8, 1)))
    if ends:  # their latents in place of the prior's draws
        x, _ = flow.follow(to_float(torch.stack(ends)), device, (0, 0), up=True)
    x = x.cpu().double()
    norm = x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    x = x / norm
    a, b = x[0::2, None], x[1::2, None]                         # (rows, 1, C, H, W), unit length
    t = torch.linspace(0, 1, 8, dtype=torch.float64).view(1, 8, 1, 1, 1)
    if ends:
        norm = torch.lerp(norm[:1, None], norm[1:, None], t)
    else:  # a prior that is not clipped: |z_max eps / sqrt(chi2_D)| at the mean of chi2_D
        norm = flow.upper_norm or flow.z_max * math.sqrt(a[0].numel()) / pfgm.unit(flow.D)
    if args.rescale:
        told, x = 'rescale', a * norm * (1 / 3 + 5 / 3 * t)
    else:  # slerp: sin((1-t) w) / sin w a + sin(t w) / sin w b, w the angle between a and b
        w = (a * b).sum((2, 3, 4), keepdim=True).clamp_max(1).acos().clamp_min(1e-6)  # not 0 / 0
        x = norm * (((1 - t) * w).sin() * a + (t * w).sin() * b) / w.sin()
        told = ' '.join(['interpolate'] + [f'{fingerprint([end]):08x}' for end in ends])
    return x.flatten(0, 1).float(), told


def write_flow_gif(flow, args, device):
    """The same images at every step on the way down, as an animated GIF."""
    frames = []

    def keep(z, x):  # far from the data x is huge: shown relative to its own largest value
        shown = x / x.abs().amax((1, 2, 3), keepdim=True).clamp_min(1)
        frames.append(to_uint8(shown.float()).cpu())
    x = flow.prior(range(args.n))
    keep(flow.z_max, x)
    _, nfe = flow.follow(x, device, range(args.n), callback=keep)
    frames = frames[::-(-len(frames) // 40)] + frames[-1:]
    grids = [grid_of(frame) for frame in frames]
    write('--out', args.out, lambda file: grids[0].save(
        file, 'GIF', save_all=True, append_images=grids[1:], loop=0,
        duration=[80] * (len(grids) - 1) + [2000]))
    print(f'{args.out}: {args.n} images, {len(grids)} frames, {flow.solver} nfe {nfe}')


def encode(flow, args, device):
    """Images up to z_max and back. A PNG with one image a row: input, latent, what comes back,
    and |error| x 10; norms and errors are printed."""
    C, size, _ = flow.shape
    images = load_images(args.encode, args.data_dir, size, C, flag='--encode')
    x = to_float(images[[*range(min(args.n, len(images)))]]).to(device)
    latent, nfe_up = flow.follow(x, device, up=True)
    back, nfe_down = flow.follow(latent, device)
    error = (back.to(x) - x).abs()
    for i, (l, e) in enumerate(zip(latent, error)):
        print(f'image {i}: |latent| {l.norm():.1f}  error mean {e.mean():.2e}  max {e.max():.2e}')
    print(f'{len(x)} images: mean error {error.mean():.2e} of a range of 2 '
          f'(one grey level is 7.8e-3), nfe {nfe_up} up, {nfe_down} down')
    shown = latent / latent.abs().amax((1, 2, 3), keepdim=True)
    row = torch.stack([x, shown.to(x), back.to(x), error * 20 - 1], dim=1)
    picture = grid_of(to_uint8(row.flatten(0, 1)), nrow=4)
    write('--out', args.out, lambda file: picture.save(file, 'PNG'))


def restore(flow, args, device):
    """Images of which a part is known, the rest made anew in --n ways: a PNG with one image a row,
    the image, what is known of it, and the results."""
    C, size, _ = flow.shape
    given, flag = (args.inpaint, '--inpaint') if args.inpaint else (args.colorize, '--colorize')
    images, rows = load_images(given, args.data_dir, size, C, flag=flag), []
    if args.colorize and C == 1:
        raise BadInput(f'--colorize {given}: the images of this network are grey')
    if args.inpaint:
        mask = load_images(args.mask, args.data_dir, size, 1, flag='--mask')[0].to(device) < 128
        if mask.all():
            raise BadInput(f'--mask {args.mask}: nothing in it is white, to be made anew')

    def part(x):  # a projection: grey is the mean of the channels
        return x * mask if args.inpaint else x.mean(1, keepdim=True).expand_as(x)
    for i in range(min(len(images), 8)):
        image = to_float(images[i])[None].to(device)
        batches = torch.arange(i * args.n, (i + 1) * args.n).split(args.batch_size)
        made = [flow.follow(flow.prior(b), device, b, known=(part, image))[0]
                for b in map(torch.Tensor.tolist, batches)]
        rows += [image, part(image), *(x.float() + part(image - x.float()) for x in made)]
    picture = grid_of(to_uint8(torch.cat(rows)), args.n + 2)
    write('--out', args.out, lambda file: picture.save(file, 'PNG'))
    print(f'{args.out}: {args.n} results of each of {min(len(images), 8)} images'
          + f', the first of {len(images)}' * (len(images) > 8))


# ---------------------------------------------------------------- files

KINDS = ('.png', '.gif', '.npz')

MARK = '.made_by.json'  # in a folder of samples: what made them


def check_out(out, single):
    """Whether --out can be written: now, not after an hour of sampling. single: one file."""
    folder = os.path.dirname(out.rstrip('/'))
    if folder and not os.path.isdir(folder):
        raise BadInput(f'--out {out}: no folder {folder}; make it with: mkdir -p {folder}')
    other = (os.path.isdir(out) == single if os.path.lexists(out) else
             os.path.splitext(out)[1] and not single)
    if other:
        raise BadInput(f'--out {out}: must be a file that ends in .png, .gif or .npz, or a folder '
                       'that does not')
    try:
        if single:
            open(f'{out}.part', 'wb').close()
            os.remove(f'{out}.part')
        else:
            os.makedirs(out, exist_ok=True)
    except OSError as error:
        raise BadInput(f'--out {out}: cannot be written ({error}); give another') from error


def mark(folder, flag, made_by):
    """Make the folder, or go on with one that holds images made by the same flags: image i depends
    on them and on i alone. They are written to it, so that other images are not taken for these."""
    path = os.path.join(folder, MARK)
    os.makedirs(folder, exist_ok=True)
    try:
        with open(path) as file:
            before = dict(json.load(file))
    except (OSError, ValueError, TypeError):
        before = made_by
        if os.listdir(folder):
            raise BadInput(f'{flag}: {folder} is a folder that is not empty, and does not say what '
                           'made it; give a new one') from None
    for key, value in made_by.items():
        if before.get(key) != value:
            raise BadInput(f'{flag}: {folder} holds images made with {key} {before.get(key)}, not '
                           f'{value}; give a new one, or remove that')
    write(flag, path, lambda file: file.write(json.dumps(made_by).encode()))


def save_png(path, pixels):
    """uint8 (C, H, W) as a file, whole or not at all."""
    image = Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).numpy())
    write('--out', path, lambda file: image.save(file, 'PNG'))


def read_images(paths):
    """uint8 (n, C, H, W) of the files of save_png()."""
    rows = np.stack([np.atleast_3d(Image.open(path)) for path in paths])  # (n, H, W, C)
    return torch.from_numpy(rows).permute(0, 3, 1, 2)


def write_npz(out, paths, shape):
    """arr_0, uint8 (n, H, W, C), image by image: all of them may not fit in memory."""
    C, H, W = shape
    head = dict(descr='|u1', fortran_order=False, shape=(len(paths), H, W, C))

    def save(file):
        with zipfile.ZipFile(file, 'w') as archive, archive.open('arr_0.npy', 'w',
                                                                 force_zip64=True) as array:
            np.lib.format.write_array_header_1_0(array, head)
            for path in paths:
                array.write(Image.open(path).tobytes())
    write('--out', out, save)


def compare_with(images, paths):
    """Print how many of the images made are images of a data set."""
    found, errors = images.pixels.cpu().flatten(1), []
    for k in range(0, len(paths), 64):
        x = read_images(paths[k:k + 64]).flatten(1).double()
        distance = torch.cat([torch.cdist(x, y.double()) for y in found.split(4096)], 1)
        errors.append(distance.amin(1) / x.shape[1] ** 0.5)
    error = torch.cat(errors)
    print(f'{int((error < 1).sum())} of {len(paths)} samples are images of {images.name} to within '
          f'a grey level, {error.max():.2f} RMS at most')


def make_images(flow, images, args, place, special=None, rows=None):
    """The images of --out, each process its share, each image a file as soon as it is made, so that
    the same command again makes only what is missing. A .png or .npz is made of them at the end.
    special, rows: of special_starts()."""
    device, rank, world = place
    n = args.n if special is None else len(special)
    tensors = [images.pixels] if args.exact else flow.net.state_dict().values()
    source = flow.source
    tensors = [*tensors, source.pixels] if source else tensors
    made_by = json.dumps({**flow.settings(), 'net': f'{fingerprint(tensors):08x}', 'rows': rows})
    single = args.out.endswith(KINDS)
    folder = f'{args.out}.{zlib.crc32(made_by.encode()):08x}' if single else args.out
    if rank == 0:
        mark(folder, f'--out {args.out}', json.loads(made_by))
    wait()
    paths = [os.path.join(folder, f'{i:06d}.png') for i in range(n)]
    missing = [i for i in range(n) if not os.path.exists(paths[i])]
    if len(missing) < n:
        say(f'{folder}: {n - len(missing)} of {n} images are there; making the others')
    wait()  # all have looked before any adds to them
    with ThreadPoolExecutor(4) as pool:  # files are written while the next batch is sampled
        saved = ()
        for indices, x, _ in flow.images(missing[rank::world], args.batch_size, device, rank,
                                         special):
            list(saved)  # a disk that is full ends the run here
            saved = pool.map(save_png, [paths[i] for i in indices], to_uint8(x).cpu())
        list(saved)
    wait()
    if rank > 0:
        return
    lost = next((path for path in paths if not os.path.exists(path)), None)
    if lost:
        raise BadInput(f'--out {args.out}: {lost} is not there; all processes must write to one '
                       'folder')
    if args.exact:
        compare_with(images, paths)
    if args.out.endswith('.npz'):
        write_npz(args.out, paths, flow.shape)
    elif single:
        pixels = read_images(paths)
        if source and special is None:  # each behind the image that became it
            starts = source.pixels[torch.arange(n) % len(source)]
            pixels = torch.stack([starts, pixels], 1).flatten(0, 1)
        turns = len(flow.classes)  # one column a class, where they fill the rows
        picture = grid_of(pixels, 8 if special is not None else
                                   turns if 1 < turns <= 16 and n % turns == 0 else None)
        write('--out', args.out, lambda file: picture.save(file, 'PNG'))
    if single:
        shutil.rmtree(folder)
    print(f'{args.out}: {n} images')


def main(args):
    if args.gif and not args.out.endswith('.gif'):
        args.out = os.path.splitext(args.out)[0] + '.gif'
    known = args.inpaint or args.colorize
    picture = args.encode or known
    rows = args.interpolate is not None or args.rescale
    if args.interpolate and len(args.interpolate) != 2:
        raise BadInput(f'--interpolate {" ".join(args.interpolate)}: give two images, or none')
    if bool(args.inpaint) != bool(args.mask):
        raise BadInput('--inpaint and --mask belong together; give both')
    if known and args.solver == 'rk45':
        raise BadInput('--solver rk45: not of --inpaint and --colorize, whose steps are fixed; '
                       'give another, or leave it out')
    if known and not args.solver:
        args.solver, args.nfe = 'renew', args.nfe or 100
    if picture and not args.out.endswith('.png') or rows and args.out.endswith('.gif'):
        raise BadInput(f'--out {args.out}: a picture; must end in .png')
    if (picture or args.out.endswith('.gif')) and int(os.environ.get('WORLD_SIZE', 1)) > 1:
        raise BadInput(f'--out {args.out}: made by one process; run it without torchrun')
    device, rank, world = place = setup(args.device, float64=args.exact)
    if rank == 0:
        check_out(args.out, args.out.endswith(KINDS))
    options = {name: getattr(args, name) for name in SAMPLING_FLAGS}
    images = None
    if args.exact and args.compile:
        raise BadInput('--compile: --exact has no network; leave it out')
    if args.exact:
        dataset = args.dataset or 'glyphs'
        images = load_images(dataset, args.data_dir, args.image_size)
        flow = exact_flow(images, dataset, device, **options)
    else:
        flow = load_flow(args.ckpt, device, weights=args.weights, compiled=args.compile,
                         dataset=args.dataset, data_dir=args.data_dir, source=args.start,
                         bf16=args.bf16, **options)
    source = flow.source
    if (args.eta or flow.solver == 'renew') and (args.encode or args.interpolate):
        raise BadInput(f'--solver {flow.solver}, --eta {args.eta}: fresh noise cannot be encoded; '
                       'give another')
    if args.start and not source:
        raise BadInput(f'--from {args.start}: this flow starts from noise; give --encode instead')
    args.n = args.n or (8 if known else min(64, len(source)) if source else 64)
    if (args.interpolate or known) and not args.classes:
        flow.classes = []  # images that are given may be of any class
    if rows:  # each of one class; images that are given have one way between them
        flow.classes = [k for k in flow.classes[:1 if args.interpolate else None] for _ in range(8)]
    say('  '.join(f'{k} {v}' for k, v in flow.settings().items()))
    if known:
        return restore(flow, args, device)
    if args.encode:
        return encode(flow, args, device)
    if args.out.endswith('.gif'):
        return write_flow_gif(flow, args, device)
    make_images(flow, images, args, place, *(special_starts(args, flow, device) if rows else ()))

if __name__ == '__main__':
    run(main, parse_args())
