"""Grids, strips and plots of results as PNG files. You need not read it to understand the method.
"""
import math

import torch.nn.functional as F
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from support.cli import write


def grid_of(pixels, nrow=None):
    """uint8 images (n, C, H, W) as one picture, each enlarged to 64 pixels or more."""
    from torchvision.utils import make_grid
    larger = F.interpolate(pixels.cpu(), scale_factor=-(-64 // pixels.shape[-1]))
    grid = make_grid(larger, nrow or int(np.ceil(len(pixels) ** 0.5)), padding=4, pad_value=128)
    return Image.fromarray(grid.permute(1, 2, 0).numpy())


# ---------------------------------------------------------------- plots and records


def write_grid(flag, path, pixels, nrow=None):
    """uint8 images (n, C, H, W) as one PNG, a file that `flag` names."""
    picture = grid_of(pixels, nrow)
    write(flag, path, lambda file: picture.save(file, 'PNG'))


def axis(values, start, end):
    """(position of a value in pixels, round values to mark), log where values span a decade."""
    low, high = min(values), max(values)
    log = low > 0 and high >= 10 * low
    to, back = (math.log10, lambda a: 10 ** a) if log else (float, float)
    margin = 0.06 * (to(high) - to(low)) or 0.1 * abs(low) or 1
    low, high = to(low) - margin, to(high) + margin
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    step = next(m * step for m in (1, 2, 5, 10) if high - low <= 7 * m * step)
    marks = [m * 10.0 ** e for e in range(math.floor(low), math.ceil(high)) for m in (1, 2, 5)
             ] if log else [k * step for k in range(math.ceil(low / step), int(high // step) + 1)]
    return (lambda value: start + (end - start) * (to(value) - low) / (high - low),
            [mark for mark in marks if back(low) <= mark <= back(high)])


def plot(curves, xlabel, ylabel, path):
    """A 960 x 640 PNG of curves {name: [(x, y), ...]} with ticks and a legend."""
    left, top, right, bottom, font = 110, 30, 930, 560, ImageFont.load_default(size=20)
    points = [p for points in curves.values() for p in points]
    across, x_marks = axis([x for x, _ in points], left, right)
    up, y_marks = axis([y for _, y in points], bottom, top)
    image = Image.new('RGB', (960, 640), 'white')
    draw = ImageDraw.Draw(image)
    for mark in x_marks:
        draw.line([across(mark), top, across(mark), bottom], '#dddddd')
        draw.text((across(mark), bottom + 8), f'{mark:g}', 'black', font, 'mt')
    for mark in y_marks:
        draw.line([left, up(mark), right, up(mark)], '#dddddd')
        draw.text((left - 8, up(mark)), f'{mark:g}', 'black', font, 'rm')
    draw.rectangle([left, top, right, bottom], None, 'black')
    draw.text(((left + right) / 2, 632), xlabel, 'black', font, 'mb')
    turned = Image.new('L', (bottom - top, 30))
    ImageDraw.Draw(turned).text(((bottom - top) / 2, 15), ylabel, 255, font, 'mm')
    image.paste('black', (8, top), turned.rotate(90, expand=True))
    colours = '#1f5fbf #d1402f #2c8a3d #8a4fbf #c78a00 #00899b #777777 #000000'.split()
    legend = right - 20 - max(font.getlength(name) for name in curves)
    for k, (name, points) in enumerate(curves.items()):
        colour, v = colours[k % len(colours)], top + 24 + 28 * k
        spots = [(across(x), up(y)) for x, y in sorted(points)]
        draw.line(spots, colour, 3)
        for x, y in spots:
            draw.ellipse([x - 5, y - 5, x + 5, y + 5], colour)
        draw.line([legend - 45, v, legend - 10, v], colour, 3)
        draw.text((legend, v), name, 'black', font, 'lm')
    write('--out', path, lambda file: image.save(file, 'PNG'))
    print(f'wrote {path}')


def strip(rows, heads, path):
    """A PNG of samples: a row for each of {name: uint8 (k, C, H, W)}, its heads spread over it."""
    font = ImageFont.load_default(size=20)
    grid = grid_of(torch.cat(list(rows.values())), len(next(iter(rows.values()))))
    left = 20 + int(max(font.getlength(name) for name in rows))
    image = Image.new('RGB', (left + grid.width, 30 + grid.height), 'white')
    image.paste(grid, (left, 30))
    draw = ImageDraw.Draw(image)
    for k, name in enumerate(rows):
        draw.text((10, 30 + (k + 0.5) * grid.height / len(rows)), name, 'black', font, 'lm')
    for k, head in enumerate(heads):
        draw.text((left + (k + 0.5) * grid.width / len(heads), 15), head, 'black', font, 'mm')
    write('--out', path, lambda file: image.save(file, 'PNG'))
    print(f'wrote {path}')
