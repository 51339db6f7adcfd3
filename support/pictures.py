"""Grids, strips and plots, as PNG files. You need not read it to understand the method.
"""
import math

import torch
from PIL import Image, ImageDraw, ImageFont

from support.cli import BadInput, check_folder, say, write


def check_png(flag, path):
    """BadInput unless a picture can be written to the path that `flag` gave."""
    if not path.endswith('.png'):
        raise BadInput(f'{flag} {path}: a picture; must end in .png')
    check_folder(flag, path)


def write_png(flag, path, picture):
    """A PIL image as the file that `flag` names."""
    write(flag, path, lambda file: picture.save(file, 'PNG'))


def to_picture(pixels):
    """uint8 (C, H, W) as a PIL image, grey or RGB."""
    return Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).numpy())


# ---------------------------------------------------------------- images side by side

def grid_of(pixels, nrow=None):
    """uint8 images (n, C, H, W) as one PIL image, each enlarged to 64 pixels or more.

    nrow: images a row; None makes the grid as square as it can be."""
    if nrow is None:
        nrow = math.ceil(len(pixels) ** 0.5)
    size = math.ceil(64 / pixels.shape[-1]) * pixels.shape[-1]
    columns = min(nrow, len(pixels))
    rows = math.ceil(len(pixels) / nrow)
    step = size + 4  # with the grey line between two images
    grid = Image.new('RGB', (columns * step + 4, rows * step + 4), (128, 128, 128))
    for i, image in enumerate(pixels.cpu()):
        enlarged = to_picture(image).resize((size, size), Image.Resampling.NEAREST)
        grid.paste(enlarged, (i % nrow * step + 4, i // nrow * step + 4))
    return grid


def write_grid(flag, path, pixels, nrow=None):
    """uint8 images (n, C, H, W) as one PNG, a file that `flag` names."""
    write_png(flag, path, grid_of(pixels, nrow))


def strip(rows, heads, path):
    """Write to --out a PNG of samples, with a row for each of `rows`, {name: uint8 (k, C, H, W)}.

    heads: words above the columns, each over an equal part of the width."""
    font = ImageFont.load_default(size=20)
    images = list(rows.values())
    grid = grid_of(torch.cat(images), nrow=len(images[0]))
    left = 20 + int(max(font.getlength(name) for name in rows))
    picture = Image.new('RGB', (left + grid.width, 30 + grid.height), 'white')
    picture.paste(grid, (left, 30))
    draw = ImageDraw.Draw(picture)
    for k, name in enumerate(rows):
        middle = 30 + (k + 0.5) * grid.height / len(rows)
        draw.text((10, middle), name, 'black', font, 'lm')
    for k, head in enumerate(heads):
        middle = left + (k + 0.5) * grid.width / len(heads)
        draw.text((middle, 15), head, 'black', font, 'mm')
    write_png('--out', path, picture)
    print(f'wrote {path}')


# ---------------------------------------------------------------- plots

COLOURS = '#1f5fbf #d1402f #2c8a3d #8a4fbf #c78a00 #00899b #777777 #000000'.split()


class Axis:
    """One axis of a plot, whose pixels go from `start` to `end`: where a value lies on it, and the
    round values to mark. It is logarithmic where the values span a factor of 10 or more."""

    def __init__(self, values, start, end):
        smallest = min(values)
        largest = max(values)
        self.is_log = smallest > 0 and largest >= 10 * smallest
        self.start = start
        self.end = end
        self.low = self.scaled(smallest)
        self.high = self.scaled(largest)
        margin = 0.06 * (self.high - self.low) or 0.1 * abs(smallest) or 1  # where all are equal
        self.low -= margin
        self.high += margin
        self.marks = [mark for mark in self.round_values()
                      if self.low <= self.scaled(mark) <= self.high]

    def scaled(self, value):
        return math.log10(value) if self.is_log else float(value)

    def position(self, value):
        """The pixel of a value."""
        part = (self.scaled(value) - self.low) / (self.high - self.low)
        return self.start + (self.end - self.start) * part

    def round_values(self):
        """Values to mark, some of which may lie beyond the ends: 1, 2 and 5 of each decade, or
        seven steps of such a width at most."""
        if self.is_log:
            decades = range(math.floor(self.low), math.ceil(self.high))
            return [m * 10.0 ** decade for decade in decades for m in (1, 2, 5)]
        span = self.high - self.low
        power = 10.0 ** math.floor(math.log10(span / 2))
        step = next(m * power for m in (1, 2, 5, 10) if span <= 7 * m * power)
        first = math.ceil(self.low / step)
        last = int(self.high // step)
        return [k * step for k in range(first, last + 1)]


def plot(curves, title, xlabel, ylabel, path):
    """Write to --out a PNG 640 pixels high, with a title, marks on both axes and a legend on the
    right of the frame, where it hides no curve.

    curves: {name: [(x, y), ...]}. Points that are not finite are left out, and a line says so."""
    finite = {name: [point for point in points if all(map(math.isfinite, point))]
              for name, points in curves.items()}
    left_out = [name for name in curves if len(finite[name]) < len(curves[name])]
    curves = {name: points for name, points in finite.items() if points}
    if left_out:
        say(f'{path}: leaves out what is no finite number, of {", ".join(left_out)}')
    if not curves:
        return
    left, top, right, bottom = 110, 50, 930, 560
    font = ImageFont.load_default(size=20)
    names_width = math.ceil(max(font.getlength(name) for name in curves))
    picture = Image.new('RGB', (right + 80 + names_width, 640), 'white')
    draw = ImageDraw.Draw(picture)

    # the title and the frame
    draw.text(((left + right) / 2, 25), title, 'black', font, 'mm')
    points = [point for points in curves.values() for point in points]
    x_axis = Axis([x for x, _ in points], left, right)
    y_axis = Axis([y for _, y in points], bottom, top)
    for mark in x_axis.marks:
        across = x_axis.position(mark)
        draw.line([across, top, across, bottom], '#dddddd')
        draw.text((across, bottom + 8), f'{mark:g}', 'black', font, 'mt')
    for mark in y_axis.marks:
        up = y_axis.position(mark)
        draw.line([left, up, right, up], '#dddddd')
        draw.text((left - 8, up), f'{mark:g}', 'black', font, 'rm')
    draw.rectangle([left, top, right, bottom], None, 'black')
    draw.text(((left + right) / 2, 632), xlabel, 'black', font, 'mb')
    turned = Image.new('L', (bottom - top, 30))  # PIL writes across only
    ImageDraw.Draw(turned).text(((bottom - top) / 2, 15), ylabel, 255, font, 'mm')
    picture.paste('black', (8, top), turned.rotate(90, expand=True))

    # the curves and the legend
    legend = right + 65
    for k, (name, points) in enumerate(curves.items()):
        colour = COLOURS[k % len(COLOURS)]
        spots = [(x_axis.position(x), y_axis.position(y)) for x, y in sorted(points)]
        draw.line(spots, colour, 3)
        for x, y in spots:
            draw.ellipse([x - 5, y - 5, x + 5, y + 5], colour)
        line = top + 24 + 28 * k
        draw.line([legend - 45, line, legend - 10, line], colour, 3)
        draw.text((legend, line), name, 'black', font, 'lm')
    write_png('--out', path, picture)
    print(f'wrote {path}')
