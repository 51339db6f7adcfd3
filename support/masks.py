"""Masks of --inpaint: which part of each image is kept. You need not read it to understand the
method.
"""
import os
import re

import numpy as np
import torch
from PIL import Image

from support.cli import BadInput, say
from support.images import Unreadable, centre_square, read_image
from support.sets import found


def load_masks(path, pictures, data_dir):
    """Which pixels of each of the images are kept: bool (n, 1, S, S).

    path: what --mask gave, one mask for all images, or a set with one for each of them, see
    masks_of(). pictures: the sets.Pictures of --inpaint. In a mask black is kept, and white is made
    anew. Raises BadInput for masks that cannot be paired with the images or read, and for those
    that would keep nothing, or all."""
    raw = found(path, data_dir, '--mask')
    if raw.notes:
        say(f'--mask {path}: {"; ".join(raw.notes)}')
    size = pictures.pixels.shape[-1]
    numbers = masks_of(path, raw, pictures)
    kept = {k: kept_part(path, raw, k, size) for k in sorted(set(numbers))}
    return torch.stack([kept[k] for k in numbers])


def masks_of(path, raw, pictures):
    """The number of the mask of each of the images. raw: the foreign.RawSet of the masks.

    One mask is that of all images. Of several the one is taken that is called as the image is, but
    for the ending and a last word "mask". Where the names are others but the counts are the same
    they are paired in order, and a line says so."""
    count = len(raw.entries)
    if count == 1:
        return [0 for _ in pictures.places]
    names = None
    if raw.root is not None:
        names = list(raw.paths or raw.entries)
    if names is not None and pictures.names is not None:
        by_stem = {stem(name): k for k, name in enumerate(names)}
        stems = [stem(pictures.names[k]) for k in pictures.places]
        if len(by_stem) == count and all(name in by_stem for name in stems):
            return [by_stem[name] for name in stems]
    if count != pictures.total:
        raise BadInput(f'--mask {path}: {count} masks for {pictures.total} images, with other '
                       'names; give one, or one an image with its name')
    if names is not None and pictures.names is not None:
        first = pictures.places[0]
        say(f'--mask {path}: paired with the images in order, since their names differ (first: '
            f'{names[first]!r} with {pictures.names[first]!r})')
    return pictures.places


def stem(name):
    """The name of a file without its ending, and without "_mask" before it."""
    return re.sub('[-_ .]?masks?$', '', os.path.splitext(name)[0], flags=re.IGNORECASE)


def kept_part(path, raw, k, size):
    """Which pixels mask k of the RawSet keeps: bool (1, size, size)."""
    given = f'--mask {path}'
    if len(raw.entries) > 1:
        given += f': mask {k}' if raw.root is None else f': {raw.entries[k]!r}'
    try:
        mask, _, lost = read_image(raw.root, raw.entries[k])
    except Unreadable as error:
        raise BadInput(f'{given}: cannot be read ({error})') from error
    side = min(mask.size)
    if mask.width != mask.height:
        lost.append('cropped to the centre square')
    resample = Image.Resampling.BICUBIC
    if side < size:  # no more than a mask it is, however large its pixels are
        resample = Image.Resampling.NEAREST
    values = np.asarray(centre_square(mask.convert('L'), size, resample=resample))
    black = torch.from_numpy(values < 128)
    problem = ''
    if black.all():
        problem = 'nothing in it is white, to be made anew'
    elif not black.any():
        problem = 'nothing in it is black, to be kept'
    if problem:
        if side != size:
            problem = f'at {size} x {size} pixels {problem}'
        if lost:
            problem += f' ({", ".join(lost)})'
        raise BadInput(f'{given}: {problem}; give one of black and white')
    if lost:
        say(f'{given}: {", ".join(lost)}')
    return black[None]
