"""The figures of the README. Nothing imports it.
"""
import json
import math
import os

import numpy as np
import torch
from PIL import Image, ImageDraw

import pfgm
from support.cli import BadInput, write
from support.pictures import plot


def loss_curves(args):
    """The loss of each log of train.py against images seen, as --out."""
    curves = {}
    for path in args.curves:
        try:
            with open(path) as file:
                points = [(row['images'], row['loss']) for row in map(json.loads, file)]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(f'--curves {path}: not a log.jsonl of train.py ({error})') from error
        if len(points) < 2:
            raise BadInput(f'--curves {path}: {len(points)} lines; two or more make a curve')
        window = max(len(points) // 10, 1)
        name = os.path.basename(os.path.dirname(os.path.abspath(path)))
        curves[name if name not in curves else path] = [
            tuple(np.mean(points[max(k - window, 0):k], axis=0)) for k in range(1, len(points) + 1)]
    plot(curves, 'images seen', 'training loss', args.out)


def field_lines(path):
    """A PNG of the field lines of a heart of charges, from the hemisphere down to the plane."""
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
