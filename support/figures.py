"""The figures of the README, and the losses of training runs. You need not read it to understand
the method.

    python -m support.figures heart --out heart.png       # field lines of a heart of charges
    python -m support.figures flow --out flow.png         # from noise to images of out/ckpt.pt
    python -m support.figures half --out right_half.png   # a mask for sample.py --inpaint
    python -m support.figures curves out/*/log.jsonl      # losses of runs, in curves.png
"""
import json
import math
import os

from support import waiting

waiting.begin(__name__)  # a line where the imports below take long; Ctrl-C ends them in one line

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import pfgm
from support.checkpoint import in_folder
from support.cli import BadInput, Parser, above
from support.flow import load_flow
from support.images import to_uint8
from support.pictures import check_png, plot, strip, write_png
from support.processes import run, setup
from support.unused import of_start, refuse


def parse_args(argv=None):
    p = Parser(prog='python -m support.figures', description=__doc__)
    figures = p.add_subparsers(dest='figure', required=True, metavar='FIGURE')
    heart = figures.add_parser('heart', help='the field lines of a heart of charges, without the '
                               'extra dimension and with it')
    heart.add_argument('--out', default='heart.png', help='default: heart.png')
    flow = figures.add_parser('flow', help='images of a network on their way from noise to data')
    flow.add_argument('--ckpt', type=in_folder, default='out/ckpt.pt', help='default: out/ckpt.pt')
    flow.add_argument('--n', type=above(0, int), default=10, help='images (default: 10)')
    flow.add_argument('--seed', type=above(-1, int), default=0, help='default: 0')
    flow.add_argument('--device', default='auto', help='default: auto')
    flow.add_argument('--out', default='flow.png', help='default: flow.png')
    half = figures.add_parser('half', help='a mask for sample.py --inpaint, whose right half is '
                              'made anew')
    half.add_argument('--image_size', type=above(1, int), default=16, help='default: 16')
    half.add_argument('--out', default='right_half.png', help='default: right_half.png')
    curves = figures.add_parser('curves', help='the loss of training runs against images seen, a '
                                'moving mean over a tenth of each run')
    curves.add_argument('logs', nargs='+', metavar='LOG', help='a log.jsonl of train.py')
    curves.add_argument('--out', default='curves.png', help='default: curves.png')
    return p.parse_args(argv)


# ---------------------------------------------------------------- losses

def read_log(path):
    """[(images seen, loss), ...] of a log.jsonl of train.py."""
    try:
        with open(path) as file:
            rows = [json.loads(line) for line in file]
        points = [(row['images'], row['loss']) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f'{path}: not a log.jsonl of train.py ({error})') from error
    if len(points) < 2:
        raise BadInput(f'{path}: {len(points)} lines; two or more make a curve')
    return points


def moving_mean(points):
    """The mean of each point (x, y) with those before it, over a tenth of them all."""
    window = max(len(points) // 10, 1)
    return [tuple(np.mean(points[max(end - window, 0):end], axis=0))
            for end in range(1, len(points) + 1)]


def loss_curves(paths, out):
    """Plot the losses of logs of train.py, each under the name of its folder."""
    curves = {}
    for path in paths:
        name = os.path.basename(os.path.dirname(os.path.abspath(path)))
        if name in curves:
            name = path
        curves[name] = moving_mean(read_log(path))
    plot(curves, 'Losses of training runs', 'images seen', 'training loss', out)


# ---------------------------------------------------------------- field lines

SPACING = 0.11  # of the charges


def heart_of_charges():
    """Points (K, 2) on a grid that fill the shape of a heart."""
    side = torch.arange(-1.2, 1.3, SPACING, dtype=torch.float64)
    x, y = torch.meshgrid(side, side, indexing='xy')
    inside = (x * x + y * y - 1) ** 3 <= x * x * y ** 3
    return torch.stack([x[inside], y[inside]], 1)


def starts(n, z):
    """n points x (n, 2) on the plane z whose directions from 0 are even on the hemisphere, by a
    Fibonacci lattice."""
    i = torch.arange(n, dtype=torch.float64) + 0.5
    height = 1 - i / n
    angle = math.pi * (1 + 5 ** 0.5) * i
    radius = z * (1 - height * height).sqrt() / height
    return torch.stack([angle.cos(), angle.sin()], 1) * radius[:, None]


def flat_field(x, charges, width):
    """The field (n, 2) at x (n, 2) in the plane itself, without z, of K charges each of which is
    spread over a spot of this width: sum (x - y) / (|x - y|^2 + width^2) / K."""
    away = x[:, None] - charges                                      # (n, K, 2)
    distance2 = away.square().sum(2, keepdim=True) + width ** 2
    return (away / distance2).mean(1)


def flat_lines(charges, n, radius, step=0.04, steps=300):
    """n lines (steps + 1, n, 2) from a circle against flat_field(), by steps of Heun."""
    angle = 2 * math.pi * torch.arange(n, dtype=torch.float64) / n
    x = radius * torch.stack([angle.cos(), angle.sin()], 1)
    lines = [x]
    for _ in range(steps):
        slope = flat_field(x, charges, SPACING)
        slope = (slope + flat_field(x - step * slope, charges, SPACING)) / 2
        x = x - step * slope
        lines.append(x)
    return torch.stack(lines)


def project(x, z):
    """Where points x (..., 2) at heights z (...) lie in a panel, (..., 2) in pixels, seen from the
    front and above."""
    return torch.stack([800 + 330 * x[..., 0], 975 - 330 * (0.8 * z + 0.6 * x[..., 1])], -1)


def from_above(x):
    """Where points x (..., 2) of the plane lie in a panel, (..., 2) in pixels."""
    return torch.stack([800 + 280 * x[..., 0], 770 - 280 * x[..., 1]], -1)


def dot(draw, u, v, colour):
    draw.ellipse([u - 6, v - 6, u + 6, v + 6], colour)


def draw_line(draw, points):
    """A line through points [(u, v), ...], from blue where it starts to red where it ends."""
    for j, (here, there) in enumerate(zip(points, points[1:])):
        part = j / len(points)
        colour = (int(60 + 170 * part), 110 - int(60 * part), int(210 - 130 * part))
        draw.line([*here, *there], colour, 3)
    dot(draw, *points[0], (40, 90, 200))


def panel(title):
    """An empty panel of 1600 x 1440 pixels -> (picture, what draws on it)."""
    picture = Image.new('RGB', (1600, 1440), 'white')
    draw = ImageDraw.Draw(picture)
    draw.text((800, 70), title, 'black', ImageFont.load_default(size=54), 'mm')
    return picture, draw


def heart(out, n=180, z_max=4.0):
    """A PNG of two panels: the field lines of a heart in its plane, and n lines of the same heart
    with one more dimension, from the hemisphere down to the plane."""
    charges = heart_of_charges()

    flat, draw = panel('without the extra dimension')
    for u, v in from_above(charges).tolist():
        dot(draw, u, v, (240, 130, 130))
    lines = from_above(flat_lines(charges, n // 3, 2.2))
    for k in range(lines.shape[1]):
        draw_line(draw, lines[:, k].tolist())
    u, v = lines[-1].mean(0).tolist()
    draw.ellipse([u - 18, v - 18, u + 18, v + 18], (215, 30, 50))

    start = starts(n, z_max)
    zs = [torch.full((n,), z_max, dtype=torch.float64)]
    xs = [start]

    def keep(z, x):
        zs.append(z)
        xs.append(x)

    pfgm.sample_ode(pfgm.ExactField(charges), start, z_max, 1e-3, 'heun', 399, z_exp=0,
                    callback=keep)
    z = torch.stack(zs)                                              # (planes, n)
    x = torch.stack(xs)                                              # (planes, n, 2)
    is_drawn = torch.hypot(x.norm(dim=2), z) <= 2.2                  # inside this hemisphere

    above_plane, draw = panel('with it')
    farther_first = x[-1, :, 1].argsort(descending=True)
    for k in farther_first.tolist():
        draw_line(draw, project(x, z)[is_drawn[:, k], k].tolist())
    for u, v in project(charges, torch.zeros(())).tolist():
        dot(draw, u, v, (215, 30, 50))

    both = Image.new('RGB', (3200, 1440), 'white')
    both.paste(flat, (0, 0))
    both.paste(above_plane, (1600, 0))
    both = both.resize((1200, 540), Image.Resampling.LANCZOS)
    write_png('--out', out, both.quantize(128, dither=Image.Dither.NONE))
    print(f'{out}: field lines of {len(charges)} charges')


# ---------------------------------------------------------------- from noise to data

STRIP_ROWS = 8
STRIP_NFE = 35


def shown(x):
    """Points x (n, C, H, W) on one plane as images, uint8. Far from the data they are large, and
    each is shown relative to its own largest value."""
    return to_uint8((x / x.abs().amax((1, 2, 3), keepdim=True).clamp_min(1)).float()).cpu()


def flow_strip(ckpt, n, seed, device, out, given):
    """A PNG of n images of a network on several planes: the noise in the first row, the images in
    the last. A student of one or two calls has no such way, which is a BadInput. given: {name:
    words} of the flags that were typed."""
    flow = load_flow(ckpt, device, nfe=STRIP_NFE, seed=seed)
    if flow.student is not None:
        raise BadInput(f'--ckpt {ckpt}: a student of --{flow.student}, which leads from noise to '
                       'images at once; give another network')
    refuse(given, of_start(flow), {})
    flow.schedule = 'log'  # so that all images are on one plane at a time
    planes = [(flow.z_max, flow.prior(range(n)))]

    def keep(z, x):
        planes.append((float(torch.as_tensor(z).max()), x))

    x, _ = flow.follow(planes[0][1], device, range(n), callback=keep)
    chosen = torch.linspace(0, len(planes) - 1, STRIP_ROWS).round().long().tolist()
    rows = {f'z = {planes[k][0]:.2g}': shown(planes[k][1]) for k in chosen[:-1]}
    rows['z = 0'] = to_uint8(x.float()).cpu()
    strip(rows, [], out)


# ---------------------------------------------------------------- a mask

def right_half(size, out):
    """A PNG of size x size pixels whose right half is white."""
    mask = np.zeros((size, size), np.uint8)
    mask[:, size // 2:] = 255
    write_png('--out', out, Image.fromarray(mask))
    print(f'{out}: a mask of {size} x {size} pixels')


def main(args):
    check_png('--out', args.out)
    if args.figure == 'heart':
        heart(args.out)
    elif args.figure == 'flow':
        device, _, _ = setup(args.device)
        flow_strip(args.ckpt, args.n, args.seed, device, args.out, args.given)
    elif args.figure == 'half':
        right_half(args.image_size, args.out)
    else:
        loss_curves(args.logs, args.out)


if __name__ == '__main__':
    run(main, parse_args())
