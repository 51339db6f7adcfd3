"""The files that sample.py writes: a folder of PNGs that remembers what made it, and an .npz of
them. You need not read it to understand the method.

Each image is a file as soon as it is made, so that a run that was stopped goes on where it was. A
single .png or .npz is joined from such a folder at the end.
"""
import json
import os
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

from support.cli import BadInput, write
from support.pictures import to_picture

ENDINGS = ('.png', '.gif', '.npz')  # of an --out that is one file; anything else is a folder
MARK = '.made_by.json'              # in a folder of samples: what made them


def check_out(out):
    """Raises BadInput where --out cannot be written: now, not after an hour of sampling."""
    parent = os.path.dirname(out.rstrip('/'))
    if parent and not os.path.isdir(parent):
        raise BadInput(f'--out {out}: no folder {parent}; make it with: mkdir -p {parent}')
    is_file = out.endswith(ENDINGS)
    if is_file:
        misnamed = os.path.isdir(out)
    elif os.path.lexists(out):
        misnamed = not os.path.isdir(out)
    else:
        misnamed = os.path.splitext(out)[1] != ''
    if misnamed:
        raise BadInput(f'--out {out}: must be a file that ends in .png, .gif or .npz, or a folder '
                       'that does not')
    try:
        if is_file:
            open(f'{out}.part', 'wb').close()
            os.remove(f'{out}.part')
        else:
            os.makedirs(out, exist_ok=True)
    except OSError as error:
        raise BadInput(f'--out {out}: cannot be written ({error}); give another') from error


def folder_of(out, made_by):
    """The folder in which the images of --out are collected: --out itself, or beside a single file
    one whose name tells what makes them."""
    if not out.endswith(ENDINGS):
        return out
    return f'{out}.{zlib.crc32(json.dumps(made_by).encode()):08x}'


def claim(folder, flag, made_by):
    """Make the folder, or go on with one whose images were made by the same settings.

    made_by: a dict of all that image i depends on but for i. It is written into the folder, so that
    images of other settings are never taken for these. Raises BadInput for a folder of others."""
    path = os.path.join(folder, MARK)
    os.makedirs(folder, exist_ok=True)
    made_by = json.loads(json.dumps(made_by))  # as it comes back from a file: lists, not tuples
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
    image = to_picture(pixels)
    write('--out', path, lambda file: image.save(file, 'PNG'))


def save_images(batches, paths):
    """Write image i as the PNG paths[i], in threads, while the next batch is being sampled.

    batches: an iterable of (indices, uint8 (b, C, H, W) on the CPU)."""
    with ThreadPoolExecutor(4) as pool:
        saved = ()
        for indices, pixels in batches:
            list(saved)  # raises here what went wrong in the threads: a full disk ends the run
            saved = pool.map(save_png, [paths[i] for i in indices], pixels)
        list(saved)


def is_whole(path, shape):
    """Whether a file of save_png() is there and can be read, as an image of `shape` (C, H, W)."""
    C, H, W = shape
    try:
        with Image.open(path) as image:
            image.load()
            return image.size == (W, H) and image.mode == ('L' if C == 1 else 'RGB')
    except Exception:  # there is none, or Pillow's plugins raise almost anything on a broken file
        return False


def images_to_make(paths, shape, indices):
    """Which of the images `indices` have no file among `paths` that can be read: those that are to
    be made -> (their indices, how many of these have a file that cannot be read)."""
    with ThreadPoolExecutor(4) as pool:
        whole = list(pool.map(lambda i: is_whole(paths[i], shape), indices))
    missing = [i for i, is_there in zip(indices, whole) if not is_there]
    broken = sum(os.path.lexists(paths[i]) for i in missing)
    return missing, broken


def read_images(paths):
    """uint8 (n, C, H, W) of the files of save_png()."""
    rows = np.stack([np.atleast_3d(Image.open(path)) for path in paths])  # (n, H, W, C)
    return torch.from_numpy(rows).permute(0, 3, 1, 2)


def write_npz(out, paths, shape):
    """Join PNGs of `shape` (C, H, W) in the array arr_0, uint8 (n, H, W, C), of an .npz.

    It is written image by image, because all of them may not fit in memory."""
    C, H, W = shape
    header = dict(descr='|u1', fortran_order=False, shape=(len(paths), H, W, C))

    def save(file):
        with zipfile.ZipFile(file, 'w') as archive:
            with archive.open('arr_0.npy', 'w', force_zip64=True) as array:
                np.lib.format.write_array_header_1_0(array, header)
                for path in paths:
                    array.write(Image.open(path).tobytes())

    write('--out', out, save)
