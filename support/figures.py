"""The figures of the README, and the losses of training runs. You need not read it to understand
the method.

    python -m support.figures heart --out heart.png       # the field lines of a heart of charges
    python -m support.figures curves out/*/log.jsonl      # losses of runs, in curves.png
"""
import json
import math
import os

import numpy as np
import torch
from PIL import Image, ImageDraw

import pfgm
from support.cli import BadInput, Parser
from support.pictures import check_png, plot, write_png
from support.processes import run


def parse_args(argv=None):
    p = Parser(prog='python -m support.figures', description=__doc__)
    figures = p.add_subparsers(dest='figure', required=True, metavar='FIGURE')
    heart = figures.add_parser('heart', help='the field lines of a heart of charges')
    heart.add_argument('--out', default='heart.png', help='default: heart.png')
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
    plot(curves, 'images seen', 'training loss', out)


# ---------------------------------------------------------------- field lines

def heart_of_charges():
    """Points (K, 2) on a grid that fill the shape of a heart."""
    side = torch.arange(-1.2, 1.3, 0.11, dtype=torch.float64)
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


def project(x, z):
    """Where points x (..., 2) at heights z (...) lie in the picture, (..., 2) in pixels, seen from
    the front and above."""
    return torch.stack([800 + 330 * x[..., 0], 940 - 330 * (0.8 * z + 0.6 * x[..., 1])], -1)


def dot(draw, u, v, colour):
    draw.ellipse([u - 6, v - 6, u + 6, v + 6], colour)


def field_lines(out, n=180, z_max=4.0):
    """A PNG of n field lines of a heart of charges, from the hemisphere down to the plane."""
    charges = heart_of_charges()
    start = starts(n, z_max)
    zs = [torch.full((n,), z_max, dtype=torch.float64)]
    xs = [start]

    def keep(z, x):
        zs.append(z)
        xs.append(x)

    pfgm.sample_ode(pfgm.ExactField(charges), start, z_max, 1e-3, 'heun', 799, z_exp=0,
                    callback=keep)
    z = torch.stack(zs)                                              # (planes, n)
    x = torch.stack(xs)                                              # (planes, n, 2)
    is_drawn = torch.hypot(x.norm(dim=2), z) <= 2.2                  # inside this hemisphere

    picture = Image.new('RGB', (1600, 1440), 'white')
    draw = ImageDraw.Draw(picture)
    farther_first = x[-1, :, 1].argsort(descending=True)
    for k in farther_first.tolist():
        points = project(x, z)[is_drawn[:, k], k].tolist()
        for j, (here, there) in enumerate(zip(points, points[1:])):
            part = j / len(points)  # from blue at the top to red at the charges
            colour = (int(60 + 170 * part), 110 - int(60 * part), int(210 - 130 * part))
            draw.line([*here, *there], colour, 3)
        dot(draw, *points[0], (40, 90, 200))
    for u, v in project(charges, torch.zeros(())).tolist():
        dot(draw, u, v, (215, 30, 50))
    write_png('--out', out, picture.resize((800, 720), Image.Resampling.LANCZOS))
    print(f'{out}: {n} field lines of {len(charges)} charges')


def main(args):
    check_png('--out', args.out)
    if args.figure == 'heart':
        field_lines(args.out)
    else:
        loss_curves(args.logs, args.out)


if __name__ == '__main__':
    run(main, parse_args())
