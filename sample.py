"""Sample from a trained Poisson flow, or from the exact field of a data set.

    python sample.py --nfe 100                     # out/ckpt.pt -> samples.png
    python sample.py --ckpt network-snapshot-200000.pkl --nfe 35   # a file of EDM or PFGM++
    python sample.py --exact --dataset glyphs      # no network: the field of the data itself
    torchrun --nproc_per_node=8 -- sample.py --n 50000 --out samples.npz   # all GPUs, for FID

--out ends in .png (one grid), .gif (the flow from noise to images) or .npz (arr_0, uint8 NHWC), or
is a folder. Image i depends on --seed and i alone, however the work is split. Each is a file as
soon as it is made, and the same command again makes only what is missing. The way of an image, from
the prior along the field lines to pixels, is in make_images() below.
"""
import math
import os
import shutil
from typing import NamedTuple

from support import waiting

waiting.begin(__name__)  # a line where the imports below take long; Ctrl-C ends them in one line

import torch

import pfgm
from support.cli import BadInput, Parser, above, say, watch, write
from support.flow import Kept, exact_flow, load_flow
from support.images import GREY_LEVEL, to_float, to_uint8
from support.masks import load_masks
from support.pictures import grid_of, write_grid
from support.processes import everywhere, run, setup, share_of_rank, wait
from support.sample_files import (check_out, claim, folder_of, images_to_make, read_images,
                                  save_images, write_npz)
from support.sampling_flags import SAMPLING_FLAGS, flow_flags
from support.seeds import fingerprint
from support.sets import load_images, load_pictures
from support.unused import in_sample, refuse


# ---------------------------------------------------------------- flags

def parse_args(argv=None):
    p = Parser(usage='%(prog)s [--FLAG VALUE ...]', description=__doc__)
    first = flow_flags(p)
    first.add_argument('--n', type=above(0, int), default=None,
                       help='images (default: 64; with --inpaint and --colorize so many results '
                       'of each image, by default 8)')
    first.add_argument('--out', default='samples.png',
                       help='.png, .gif, .npz or a folder (default: samples.png)')

    first.add_argument('--verbose', action='store_true',
                       help='say all that the images depend on (default: off)')

    special = p.add_argument_group('special pictures, one at a time (default: none of them)')
    one = special.add_mutually_exclusive_group()
    one.add_argument('--gif', action='store_true',
                     help='the way from noise to images: as with --out samples.gif')
    one.add_argument('--interpolate', nargs='*', metavar='IMAGE',
                     help='rows of 8: slerp between two directions of the prior, both with its '
                     'norm; or between the latents of two images that are given (for train.py '
                     '--source lerp, between the images that it starts from)')
    one.add_argument('--rescale', action='store_true',
                     help='rows of 8: one direction, with norms from a third of the prior\'s to '
                     'twice that')
    one.add_argument('--encode', metavar='IMAGES',
                     help='follow these images up to z_max and back')
    one.add_argument('--inpaint', metavar='IMAGES',
                     help='make anew what is white in --mask, and keep the rest: a row an image, '
                     'with the image, what is kept, and results (by default with --solver renew '
                     '--nfe 100)')
    one.add_argument('--colorize', metavar='IMAGES',
                     help='the same, but what is kept is their grey')
    special.add_argument('--mask', metavar='IMAGES', help='of --inpaint: one for all images, or a '
                         'folder of one for each, with its name (default: none)')
    args = p.parse_args(argv)
    if args.gif and not args.out.endswith('.gif'):
        args.out = os.path.splitext(args.out)[0] + '.gif'
    return args


def check_flags(args):
    """Raises BadInput for flags that do not go together, before anything is loaded."""
    if args.interpolate and len(args.interpolate) != 2:
        given = ' '.join(args.interpolate)
        raise BadInput(f'--interpolate {given}: give two images, or none')
    if bool(args.inpaint) != bool(args.mask):
        raise BadInput('--inpaint and --mask belong together; give both')
    restores = args.inpaint or args.colorize
    if restores and args.solver == 'rk45':
        raise BadInput('--solver rk45: not of --inpaint and --colorize, whose steps are fixed; '
                       'give another, or leave it out')
    is_gif = args.out.endswith('.gif')
    only_png = args.encode or restores
    in_rows = args.interpolate is not None or args.rescale
    if only_png and not args.out.endswith('.png') or in_rows and is_gif:
        raise BadInput(f'--out {args.out}: a picture; must end in .png')
    if (only_png or is_gif) and int(os.environ.get('WORLD_SIZE', 1)) > 1:
        raise BadInput(f'--out {args.out}: made by one process; run it without torchrun')
    if args.exact and args.start:
        raise BadInput(f'--from {args.start}: --exact starts from noise; leave it out')


# The flags of the special pictures, by their names.
MODES = ('gif', 'interpolate', 'rescale', 'encode', 'inpaint', 'colorize')


def check_flow(flow, mode, flag, are_ends_given, eta_flag):
    """Raises BadInput for what is asked of a flow that does not take it.

    mode: one of MODES, or None. flag: as it was typed. are_ends_given: whether the mode is
    interpolate, between two images that are given. eta_flag: --eta as it was typed, or None."""
    encodes = mode == 'encode' or are_ends_given
    restores = mode in ('inpaint', 'colorize')
    if flow.student is not None and (encodes or mode == 'gif'):
        raise BadInput(f'{flag}: the network is a student of --{flow.student}, which leads from '
                       'noise to images at once and has no lines to follow; leave it out')
    if flow.student == 'distill' and restores:
        raise BadInput(f'{flag}: needs many network calls, and the network is a student of '
                       '--distill, trained for one; leave it out')
    if flow.source is not None and (restores or mode == 'rescale'):
        raise BadInput(f'{flag}: changes the noise that a flow starts from, and this one starts '
                       'from images; leave it out')
    if flow.eta and encodes:
        raise BadInput(f'{eta_flag}: fresh noise cannot be encoded; leave it out')
    if flow.solver == 'renew' and encodes:
        raise BadInput('--solver renew: fresh noise cannot be encoded; give another')


def fit_to_mode(flow, mode, are_ends_given, solver, nfe, classes):
    """Set what a special picture changes in how a flow is followed. solver, nfe, classes: of the
    flags, None where not given. The others: as of check_flow()."""
    restores = mode in ('inpaint', 'colorize')
    if restores and solver is None:
        flow.solver = 'renew'
        flow.nfe = nfe or 100
    images_are_given = restores or mode == 'encode' or are_ends_given
    if images_are_given and not classes:
        flow.classes = ()  # they may be of any class
    if are_ends_given:
        flow.classes = flow.classes[:1]  # there is but one row between them
    if mode in ('interpolate', 'rescale'):
        flow.classes = tuple(label for label in flow.classes for _ in range(8))  # one a row


# ---------------------------------------------------------------- images

def make_images(flow, indices, batch_size, device, rank, starts=None):
    """The images `indices`, from noise to pixels: yields (indices, uint8 (b, C, H, W) on the CPU) a
    batch at a time. starts (n, C, H, W): on the plane z_max, in place of the prior's."""
    nfe = 0
    batches = [indices[i:i + batch_size] for i in range(0, len(indices), batch_size)]
    for batch in watch(batches, len(indices), lambda: flow.in_words(nfe), rank):
        if starts is None:
            x = flow.prior(batch)                  # on the plane z = z_max
        else:
            x = starts[batch]
        x, nfe = flow.follow(x, device, batch)     # pfgm.sample_ode(), down to the data
        yield batch, to_uint8(x).cpu()             # from [-1, 1] to grey levels


def write_images(flow, n, out, batch_size, device, rank, world, rows=None, data=None):
    """Make images 0 ... n - 1, of which each process makes a share, and write them as --out.

    Images whose files are there already are not made again. rows: a Rows, whose starts replace the
    prior's. data: the Images of an exact field, with which the samples are compared."""
    weights = [data.pixels] if data is not None else list(flow.net.state_dict().values())
    if flow.source is not None:
        weights.append(flow.source.pixels)
    # Where they differ from those of a folder, the first that differs is told: the plain words
    # of settings() before the fingerprint.
    made_by = dict(flow.settings(), net=f'{fingerprint(weights):08x}',
                   rows=None if rows is None else rows.name)
    folder = folder_of(out, made_by)
    if rank == 0:
        claim(folder, f'--out {out}', made_by)
    wait()
    paths = [os.path.join(folder, f'{i:06d}.png') for i in range(n)]
    # Each process looks at a share of the files, and all have looked before any of them adds one.
    looked = everywhere(images_to_make(paths, flow.shape, share_of_rank(n, rank, world)))
    missing = [i for share, _ in looked for i in share]
    broken = sum(count for _, count in looked)
    if broken:
        say(f'{folder}: {broken} images that cannot be read are made anew')
    if len(missing) < n:
        say(f'{folder}: {n - len(missing)} of {n} images are there; making the others')

    starts = None if rows is None else rows.starts
    save_images(make_images(flow, missing[rank::world], batch_size, device, rank, starts), paths)
    wait()
    if rank > 0:
        return
    lost = next((path for path in paths if not os.path.exists(path)), None)
    if lost:
        raise BadInput(f'--out {out}: {lost} is not there; all processes must write to one folder')

    if data is not None:
        compare_with(data, paths)
    if out.endswith('.npz'):
        write_npz(out, paths, flow.shape)
    elif out.endswith('.png'):
        write_picture(flow, out, read_images(paths), in_rows=rows is not None)
    if folder != out:
        shutil.rmtree(folder)
    print(f'{out}: {n} images')


def write_picture(flow, out, pixels, in_rows):
    """All images, uint8 (n, C, H, W), as one grid: in rows of 8, or with one column for each class
    where the classes fill the rows."""
    nrow = None
    classes = len(flow.classes)
    if in_rows:
        nrow = 8
    elif 1 < classes <= 16 and len(pixels) % classes == 0:
        nrow = classes
    if flow.source is not None and not in_rows:  # each image after the one that became it
        starts = flow.source.pixels[torch.arange(len(pixels)) % len(flow.source)]
        pixels = torch.stack([starts, pixels], 1).flatten(0, 1)
        nrow = 2 * (nrow or math.ceil(len(pixels) ** 0.5 / 2))
    write_grid('--out', out, pixels, nrow)


def compare_with(data, paths):
    """Print how many of the images made, the files `paths`, are images of the data set."""
    pixels = data.pixels.cpu().flatten(1)
    nearest = []
    for k in range(0, len(paths), 64):
        x = read_images(paths[k:k + 64]).flatten(1).double()
        distances = [torch.cdist(x, part.double()) for part in pixels.split(4096)]
        nearest.append(torch.cat(distances, 1).amin(1))
    error = torch.cat(nearest) / pixels.shape[1] ** 0.5  # root mean square, in grey levels
    print(f'{int((error < 1).sum())} of {len(paths)} samples are images of {data.name} to within '
          f'a grey level, {error.max():.2f} RMS at most')


# ---------------------------------------------------------------- special starts: rows of 8

class Rows(NamedTuple):
    """Starts of a picture in rows of 8, in place of the prior's."""
    starts: torch.Tensor  # (8 * rows, C, H, W) on the plane z_max
    name: str             # tells them from other starts


ALONG = torch.linspace(0, 1, 8, dtype=torch.float64).view(8, 1, 1, 1)  # the places of a row


def directions(x):
    """x (rows, C, H, W) -> (x / |x|, |x|), float64 on the CPU, as (rows, 1, C, H, W) and
    (rows, 1, 1, 1, 1): ready to be multiplied by ALONG."""
    x = x.cpu().double()[:, None]
    norm = x.flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1)
    return x / norm, norm


def prior_norm(flow):
    """The norm of the prior's clipped draws; of one that is not clipped |z_max eps / sqrt(chi2_D)|
    at the mean of chi2_D."""
    return flow.upper_norm or flow.z_max * math.sqrt(math.prod(flow.shape)) / pfgm.unit(flow.D)


def rescaled(flow, n):
    """Rows of one direction each, with norms from a third of the prior's to twice that."""
    a, _ = directions(flow.prior(range(0, 2 * max(n // 8, 1), 2)))
    x = a * prior_norm(flow) * (1 / 3 + 5 / 3 * ALONG)
    return Rows(x.flatten(0, 1).float(), 'rescale')


def slerp(a, b, norm):
    """Starts (8 * rows, C, H, W) of this norm, from directions a to b, both (rows, 1, C, H, W):
    sin((1 - t) w) / sin w a + sin(t w) / sin w b, where w is the angle between the two."""
    w = (a * b).sum((2, 3, 4), keepdim=True).clamp_max(1).acos().clamp_min(1e-6)  # not 0 / 0
    x = norm * (((1 - ALONG) * w).sin() * a + (ALONG * w).sin() * b) / w.sin()
    return x.flatten(0, 1).float()


def crossfade(x, y):
    """Starts (8 * rows, C, H, W) on straight lines from x to y, both (rows, C, H, W): between the
    images that a flow from another data set starts from."""
    x = x.cpu().double()[:, None]
    y = y.cpu().double()[:, None]
    return torch.lerp(x, y, ALONG).flatten(0, 1).float()


def between_draws(flow, n):
    """Rows between two draws of the prior each: between their directions, with its norm."""
    rows = max(n // 8, 1)
    first = flow.prior(range(0, 2 * rows, 2))
    second = flow.prior(range(1, 2 * rows, 2))
    if flow.source is not None:
        return Rows(crossfade(first, second), 'interpolate')
    a, _ = directions(first)
    b, _ = directions(second)
    return Rows(slerp(a, b, prior_norm(flow)), 'interpolate')


def between_images(flow, paths, data_dir, device):
    """One row between the latents of two images, the files `paths`."""
    C, size, _ = flow.shape
    ends = []
    for path in paths:
        pictures = load_pictures(path, data_dir, size, C, 1, flag='--interpolate')
        if pictures.total > 1:
            say(f'--interpolate {path}: the first of its {pictures.total} images')
        ends.append(pictures.pixels[0])
    latents, _ = flow.follow(to_float(torch.stack(ends)), device, (0, 0), up=True)
    if flow.source is not None:
        x = crossfade(latents[:1], latents[1:])
    else:
        unit, norm = directions(latents)
        x = slerp(unit[:1], unit[1:], torch.lerp(norm[:1], norm[1:], ALONG))
    return Rows(x, f'interpolate {fingerprint(ends[:1]):08x} {fingerprint(ends[1:]):08x}')


# ---------------------------------------------------------------- special pictures

def write_gif(flow, n, out, device):
    """The same n images at every step on the way down, as an animated GIF."""
    frames = []

    def keep(z, x):  # far from the data x is huge: it is shown relative to its own largest value
        shown = x / x.abs().amax((1, 2, 3), keepdim=True).clamp_min(1)
        frames.append(to_uint8(shown.float()).cpu())

    x = flow.prior(range(n))
    keep(flow.z_max, x)
    x, nfe = flow.follow(x, device, range(n), callback=keep)
    every = math.ceil(len(frames) / 40)
    picture = to_uint8(x.float()).cpu()  # the last frame is what --out x.png shows
    grids = [grid_of(frame) for frame in [*frames[:-1:every], picture]]
    if flow.shape[0] == 1:  # else a GIF would choose 256 colours for the greys
        grids = [grid.convert('L') for grid in grids]
    milliseconds = [80 for _ in grids]
    milliseconds[-1] = 2000
    write('--out', out, lambda file: grids[0].save(
        file, 'GIF', save_all=True, append_images=grids[1:], loop=0, duration=milliseconds))
    print(f'{out}: {n} images, {len(grids)} frames, {flow.in_words(nfe)}')


def encode(flow, pictures, out, device):
    """Follow the Pictures up to z_max and back, by the labels of --classes in turn, and print the
    norms of their latents and the errors of what comes back. --out is a PNG with one image a row:
    the input, its latent, what comes back, and |error| x 10."""
    x = to_float(pictures.pixels).to(device)
    latent, nfe_up = flow.follow(x, device, range(len(x)), up=True)
    back, nfe_down = flow.follow(latent, device, range(len(x)))
    error = (back.to(x) - x).abs()
    for i, (l, e) in enumerate(zip(latent, error)):
        print(f'image {i}: |latent| {l.norm():.1f}  error mean {e.mean():.2e}  max {e.max():.2e}')
    counted = f'{len(x)} images'
    if pictures.total > len(x):
        counted += f', the first of {pictures.total}'
    print(f'{counted}: mean error {error.mean():.2e} of a range of 2 '
          f'(one grey level is {GREY_LEVEL:.1e}), {nfe_up} network calls up, {nfe_down} down')
    if flow.solver != 'rk45' and error.mean() > GREY_LEVEL:
        print('this error comes of few network calls: without --nfe and --solver, rk45 makes as '
              'many as it takes')
    shown = latent / latent.abs().amax((1, 2, 3), keepdim=True)
    row = torch.stack([x, shown.to(x), back.to(x), error * 20 - 1], dim=1)
    write_grid('--out', out, to_uint8(row.flatten(0, 1)), nrow=4)


def grey(x):
    """A projection of x (b, C, H, W): the mean of its channels, in each of them."""
    return x.mean(1, keepdim=True).expand_as(x)


def outside_mask(kept):
    """A projection of x (b, C, H, W): itself where `kept`, bool (1, H, W), is true, and else 0."""
    return lambda x: x * kept


def in_range(x, part, image):
    """Images in [-1, 1] whose part is that of `image` (1, C, H, W), near the images x (b, C, H, W).

    Clipping changes the part, and to mend the part may lead out of the range. The two in turn come
    closer to both: of --colorize a pixel's error falls by a third or more each time."""
    for _ in range(50):
        x = (x + part(image - x)).clamp(-1, 1)
    return x


RESTORED = 8  # images of --inpaint and --colorize, at most


def restore(flow, pictures, parts, n, out, batch_size, device):
    """Keep a part of each of the Pictures, and make the rest of it anew in n ways: a PNG with one
    image a row, the image, what is kept of it, and the results. parts: of each a projection, see
    Kept."""
    rows = []
    batches = [batch.tolist() for i in range(len(parts))
               for batch in torch.arange(i * n, (i + 1) * n).split(batch_size)]
    for indices in watch(batches, n * len(parts), flow.in_words, rank=0):
        i = indices[0] // n
        image = to_float(pictures.pixels[i])[None].to(device)
        if indices[0] == i * n:
            rows += [image, parts[i](image)]
        x, _ = flow.follow(flow.prior(indices), device, indices, kept=Kept(parts[i], image))
        rows.append(in_range(x.float(), parts[i], image))
    write_grid('--out', out, to_uint8(torch.cat(rows)), n + 2)
    line = f'{out}: {n} results of each of {len(parts)} images'
    if pictures.total > len(parts):
        line += f', the first of {pictures.total}'
    print(line)


# ---------------------------------------------------------------- the run

def main(args):
    check_flags(args)
    device, rank, world = setup(args.device, float64=args.exact,
                                deterministic=args.deterministic)
    if rank == 0:
        check_out(args.out)

    # the flow, and how it is followed
    data = None
    options = {name: vars(args)[name] for name in SAMPLING_FLAGS}
    if args.exact:
        data = load_images(args.dataset or 'glyphs', args.data_dir, args.image_size)
        flow = exact_flow(data, args.dataset or 'glyphs', device, **options)
    else:
        flow = load_flow(args.ckpt, device, weights=args.weights, compiled=args.compile,
                         dataset=args.dataset, data_dir=args.data_dir, source=args.start,
                         bf16=args.bf16, **options)
    mode = next((name for name in MODES if vars(args)[name] not in (None, False, '')), None)
    flag = args.given.get(mode, f'--out {args.out}')
    if args.out.endswith('.gif'):
        mode = 'gif'
    are_ends_given = bool(args.interpolate)
    check_flow(flow, mode, flag, are_ends_given, args.given.get('eta'))
    fit_to_mode(flow, mode, are_ends_given, args.solver, args.nfe, args.classes)
    refuse(args.given, in_sample(vars(args), flow, args.given), vars(args))

    # what is made
    C, size, _ = flow.shape
    n = args.n or 64
    if args.n is None and flow.source is not None:
        n = min(64, len(flow.source))
    elif flow.source is not None and n > len(flow.source):
        say(f'--n {n}: there are {len(flow.source)} images to start from, so these come again')
    batch_size = args.batch_size or flow.batch_size(device)
    say(flow.headline())
    if args.verbose:
        settings = dict(flow.settings(), batch_size=batch_size)
        rounded = {name: f'{value:.6g}' if isinstance(value, float) else value
                   for name, value in settings.items()}
        say('  '.join(f'{name} {value}' for name, value in rounded.items() if value is not None))

    if args.encode:
        pictures = load_pictures(args.encode, args.data_dir, size, C, n, flag='--encode')
        return encode(flow, pictures, args.out, device)
    if args.inpaint:
        pictures = load_pictures(args.inpaint, args.data_dir, size, C, RESTORED, flag='--inpaint')
        masks = load_masks(args.mask, pictures, args.data_dir).to(device)
        parts = [outside_mask(kept) for kept in masks]
        return restore(flow, pictures, parts, args.n or 8, args.out, batch_size, device)
    if args.colorize:
        if C == 1:
            raise BadInput(f'--colorize {args.colorize}: the images of this network are grey')
        pictures = load_pictures(args.colorize, args.data_dir, size, C, RESTORED,
                                 flag='--colorize')
        parts = [grey for _ in pictures.places]
        return restore(flow, pictures, parts, args.n or 8, args.out, batch_size, device)
    if mode == 'gif':
        return write_gif(flow, n, args.out, device)

    rows = None
    if args.rescale:
        rows = rescaled(flow, n)
    elif args.interpolate:
        rows = between_images(flow, args.interpolate, args.data_dir, device)
    elif args.interpolate is not None:
        rows = between_draws(flow, n)
    if rows is not None:
        n = len(rows.starts)
    write_images(flow, n, args.out, batch_size, device, rank, world, rows, data)


if __name__ == '__main__':
    run(main, parse_args())
