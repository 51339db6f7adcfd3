"""Other people's folders, zips, arrays and labels, read so that nothing in them runs, fills the memory
or goes unsaid. You need not read it to understand the method.
"""
import functools
import json
import os
import re
import threading
import zipfile
from collections import Counter
from typing import NamedTuple, Optional

import numpy as np
import torch

# Folders that are splits: train/ val/, Train/ TEST/, training_set/ test_set/, train2017/ val2017/,
# and behind a beginning that all share seg_train/ seg_test/.
SPLIT = re.compile('(?:(?P<train>train(?:ing)?)|(?P<val>val(?:id(?:ation)?)?|dev)|(?P<test>test(?:'
                   'ing)?))[-_ ]?(?:set|split|data|images|imgs)?[-_ ]?[0-9]*', re.I)

PICTURES = 'images image imgs img jpegimages'.split()  # beside folders that are not to train on:

ABOUT_THEM = 'labels label masks mask annotations annotation segmentations'.split()

ENTRY_LIMIT = 256 << 20  # bytes that a file, or a zip's entry, may have

ZIP_LOCK, ZIPS = threading.Lock(), {}  # archives by (path, process): forked ones share a position


# ---------------------------------------------------------------- folders and zips

def files_below(root):
    """The files in a folder and its folders, relative to it. Links are followed, but for those that
    lead to a folder they are in and, within what a link led to, to where the walk has been."""
    def refuse(error):  # by default os.walk passes over a folder that it may not read
        raise error
    top = os.path.realpath(root)
    above, seen = {root: ((top,), False)}, {top}  # a folder's own folders; was any a link?
    for folder, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        chain, linked = above.pop(folder)
        yield from (os.path.normpath(os.path.join(os.path.relpath(folder, root), file))
                    for file in files)
        names, folders[:] = folders[:], []
        for name in names if top != '/' or chain[-1] not in ('/proc', '/sys', '/dev') else ():
            path, real = os.path.join(folder, name), os.path.join(chain[-1], name)
            if os.path.islink(path):
                real = os.path.realpath(path)
                back = any(os.path.join(up, '').startswith(os.path.join(real, '')) for up in chain)
                if back or linked and real in seen:
                    continue
            above[path] = (*chain, real), linked or os.path.islink(path)
            seen.add(real)
            folders.append(name)


def open_entry(archive, name, limit):
    """A zip's entry as a file, of which no read unpacks more than was asked for; or ValueError."""
    info = archive.getinfo(name)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError('packed by other than deflate')  # a read of that unpacks all at once
    if info.file_size > limit:
        raise ValueError(f'claims to unpack to {info.file_size} bytes')
    return archive.open(info)


def read_bytes(root, entry):
    """The contents, of up to ENTRY_LIMIT bytes, of a file of a folder or .zip."""
    if os.path.isdir(root):
        if not os.path.isfile(os.path.join(root, entry)):  # opening a named pipe waits for ever
            raise ValueError('not a file')
        if os.path.getsize(os.path.join(root, entry)) > ENTRY_LIMIT:
            raise ValueError(f'a file of more than {ENTRY_LIMIT} bytes')
        with open(os.path.join(root, entry), 'rb') as file:
            return file.read()
    with ZIP_LOCK:
        key = root, os.getpid()
        archive = ZIPS[key] = ZIPS.get(key) or zipfile.ZipFile(root)
        file = open_entry(archive, entry, ENTRY_LIMIT)
        return b''.join(iter(lambda: file.read(1 << 20), b''))


# ---------------------------------------------------------------- what folders mean

def natural_key(name):
    """A key that sorts 2 before 10."""
    return [int(part) if k % 2 else part for k, part in enumerate(re.split('([0-9]+)', name))], name


def layout(paths):
    """Takes the folders that are no classes out of paths, {name: its parts}: one that holds all,
    splits, images/ beside masks/. -> (paths, {name: train, val or test} or {}, notes)."""
    splits, notes = {}, []
    while stay := no_classes(paths.values()):
        depth, folders = stay
        kept = {name: path for name, path in paths.items() if path[depth] in folders}
        if len(kept) < len(paths):
            first = next(name for name in paths if name not in kept)
            notes.append(f'without {len(paths) - len(kept)} images beside '
                         f'{", ".join(sorted(folders))} (first: {first!r})')
        found = {name: folders[path[depth]] for name, path in kept.items()}
        if any(found.values()):  # in train/ there may be train/ and val/
            splits = {name: kind if splits.get(name, 'train') == 'train' else splits[name]
                      for name, kind in found.items()}
        paths = {name: path[:depth] + path[depth + 1:] for name, path in kept.items()}
    return paths, splits, notes


def no_classes(paths):
    """(level, {folder: the split it is, or ''}) of a level of folders that are no classes, or None;
    those that are not among them go. A class may be called train: splits are some of training
    beside others, or all there is, on the second level only both."""
    levels = [{path[depth] if len(path) > depth + 1 else '' for path in paths} for depth in (0, 1)]
    for depth, folders in enumerate(levels):
        shared = len(re.sub('[^-_. ]*$', '', os.path.commonprefix(list(folders - {''}))))
        found = {folder: match.lastgroup for folder in folders
                 if (match := SPLIT.fullmatch(folder[shared:]))}
        beside = 'train' in found.values() and len({*found.values()}) > 1
        if beside and (not depth or {*found} == folders) or not depth and found and (
                {*found} == folders - {''}):
            return depth, found
    first, pictures = levels[0], [folder for folder in levels[0] if folder.lower() in PICTURES]
    if len(pictures) == 1 and all(k.lower() in ABOUT_THEM for k in first - {*pictures}):
        return 0, {pictures[0]: ''}
    return None if len(first) > 1 or '' in first else (0, dict.fromkeys(first, ''))


def table_values(root, tables, paths):
    """The label of each path, None without, by the files `tables`, {name: the parts of its folder},
    of {"labels": [["00000/img00000000.png", 6], ...]} or null."""
    found = {}
    try:
        for name, folder in tables.items():
            labels = json.loads(read_bytes(root, name))['labels']
            for image, label in dict(labels or ()).items():
                found['/'.join([*folder, *re.split(r'[/\\]', image)])] = label
    except Exception as error:  # it may hold anything
        return f'labels in {name} that cannot be read ({error!r})'
    return [found.get('/'.join(path)) for path in paths] if found else f'no labels, null in {name}'


def as_labels(values, names, words=()):
    """(int64 (n,), classes or None, '') of a value for each of names, an integer or one of `words`,
    numbered in natural order; or (None, None, what there is instead)."""
    classes = sorted({*words} - {None}, key=natural_key)
    if isinstance(values, str) or len(classes) == 1:
        return None, None, values if isinstance(values, str) else 'no labels'
    numbers = {word: k for k, word in enumerate(classes)}
    values = list(map(numbers.get, values)) if classes else values
    bare = [name for name, value in zip(names, values) if value is None]
    if bare:
        some = f'no label for {len(bare)} of {len(names)} images (first: {bare[0]!r})'
        return None, None, some if len(bare) < len(names) else 'no labels'
    try:
        values, hint = np.asarray(values), ''
        if values.ndim == 2 and values.shape[1] > 1:
            one = (values.sum(1) == 1).all()
            hint = ', one-hot: give their argmax(1)' if one else ', several an image'
    except (ValueError, TypeError):  # lists of several lengths, or of words
        return None, None, 'labels that are not all whole numbers'
    if values.size == len(names) and values.dtype.kind in 'iu':
        return torch.from_numpy(values.reshape(-1).astype(np.int64)), classes or None, ''
    return None, None, f'{values.dtype} labels {values.shape} for {len(names)} images{hint}'


# ---------------------------------------------------------------- arrays

def arrays_of(path):
    """{name: a function that reads it} of the arrays of a .npz, or of the one, x, of a .npy."""
    stored = np.load(path, mmap_mode='r', allow_pickle=False)
    if isinstance(stored, np.ndarray):
        return {'x': lambda: stored}
    limit = max(100 * os.path.getsize(path), ENTRY_LIMIT)

    def read(name):  # stored[name] would unpack a bomb
        return np.lib.format.read_array(open_entry(stored.zip, f'{name}.npy', limit))
    return {name: functools.partial(read, name) for name in stored.files}


def in_rows(array):
    """Images (n, H, W), (n, H, W, C) or (n, C, H, W) as one of the first two; else ValueError."""
    n, *shape = array.shape
    if array.ndim == 4 and shape[2] not in (1, 3, 4) and shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 1, 3)
    flat = array.ndim == 3 and shape[0] != shape[1]  # of images that are wide: of another layout?
    one = flat and shape[1] in (1, 3, 4)
    if array.size == 0 or one or flat and (n == shape[0] or shape[1] > 4 * shape[0]) or not (
            array.ndim == 3 or array.ndim == 4 and array.shape[3] in (1, 3, 4)):
        mend = '; one image? give x[None]' if one else (
            '; the last axis counts them? give np.moveaxis(x, -1, 0)' * (array.ndim in (3, 4)))
        raise ValueError(f'images of shape {(n, *shape)}{mend}' + ', else x[..., None]' * flat)
    return array[..., 0] if array.shape[3:] == (1,) else array


def as_uint8(array):
    """(array, notes) of uint8, or of floats in [0, 1] or [-1, 1], whichever most of them are in: up
    to 1e-3 beyond an end is clipped. ValueError for others."""
    if array.dtype == np.uint8:
        return array, []
    if array.dtype.kind != 'f':
        raise ValueError(f'holds {array.dtype}; give uint8, from 0 to 255')
    low, high = float(array.min()), float(array.max())  # NaN, if there is one
    below = float((array < -1e-3).mean())
    base = -1 if below >= 0.01 and low < -0.5 else 0
    if not (low >= base - 1e-3 and high <= 1 + 1e-3):
        raise ValueError(f'holds values from {low:.6g} to {high:.6g}, {100 * below:.3g} % of them '
                         'below 0: not in [0, 1] nor [-1, 1]; scale them, or clip them to one')
    beyond, pixels = int(((array < base) | (array > 1)).sum()), np.empty(array.shape, np.uint8)
    for k in range(0, len(array), 256):  # a float copy of all might not fit
        part = array[k:k + 256].astype(np.promote_types(array.dtype, np.float32)).clip(base, 1)
        pixels[k:k + 256] = np.rint((part - base) * (255 / (1 - base)))
    return pixels, [f'{beyond} values up to {max(base - low, high - 1):.1e} beyond [{base}, 1] '
                    'clipped'] * (beyond > 0)

IMAGE_EXTENSIONS = tuple('.png .jpg .jpeg .webp .bmp .gif .tif .tiff .ppm .pgm'.split())


class Found(NamedTuple):
    """What find() finds."""
    root: Optional[str]                    # a folder or .zip
    source: object                         # names in it, or uint8 (n, H, W) or (n, H, W, C)
    labels: Optional[torch.Tensor] = None  # int64 (n,)
    classes: Optional[list] = None         # their names
    unlabelled: str = 'no labels'          # what there is instead
    notes: list = []                       # what was decided for the user
    paths: Optional[list] = None           # what layout() leaves of the names
    apart: bool = True                     # of a test split: whether it is not the training images


# ---------------------------------------------------------------- folders, zips and arrays

def list_images(root, split):
    """The Found of a folder or .zip. Other extensions, __MACOSX and paths with a part that begins
    with a dot ('..' too) are ignored. dataset.json, of NVlabs' dataset_tool.py, has the labels of
    the images below its folder; without it the first folders of what layout() leaves are classes.
    """
    if os.path.isdir(root):
        names, slash = files_below(root), re.escape(os.sep)
    else:
        with zipfile.ZipFile(root) as archive:
            names, slash = archive.namelist(), r'[/\\]'  # Windows has programs that write the other
    parts = {name: [part for part in re.split(slash, name) if part not in ('', '.')]
             for name in sorted({*names}) if not re.search(r'(^|[/\\])(\.[^/\\]|__MACOSX/)', name)}
    tables = {name: path[:-1] for name, path in parts.items() if path[-1:] == ['dataset.json']}
    parts = {name: path for name, path in parts.items() if name.lower().endswith(IMAGE_EXTENSIONS)}
    if not parts:
        raise ValueError(f"no images in it, which end in {' '.join(IMAGE_EXTENSIONS)}")
    paths, splits, notes = layout(parts)
    counts = Counter(splits.values())
    if splits and split == 'train' and not counts[split]:
        raise ValueError(f'holds {" and ".join(counts)}, but nothing to train on')
    served = next(kind for kind in (split, 'val', 'train', '') if counts[kind] or not kind)
    others = ' or '.join(f'{kind} ({k})' for kind, k in counts.items() if kind != served)
    notes += [f'its {served} split{", not " * bool(others)}{others}'] * bool(splits)
    chosen = [name for name in paths if splits.get(name, '') == served]
    base = [name for name in paths if splits.get(name, 'train') == 'train'] or chosen
    folder = {name: path[0] if len(path) > 1 else None for name, path in paths.items()}
    shards = all(re.fullmatch(r'[0-9]{5}/\D*[0-9]{5,}\.\w+', '/'.join(paths[k])) for k in base)
    values = (table_values(root, tables, [parts[name] for name in chosen]) if tables else
              'folders that number the images, and no dataset.json' if shards else
              [folder[name] for name in chosen])
    labels, classes, why = as_labels(values, chosen, [folder[name] for name in base] if not tables
                                     else [word for word in values if isinstance(word, str)])
    return Found(root, chosen, labels, classes, why, notes, ['/'.join(paths[k]) for k in chosen],
                 apart=served in ('test', 'val'))


def read_arrays(path, split):
    """The Found of a .npy, or a .npz with MedMNIST's keys or x, images or arr_0."""
    arrays = arrays_of(path)
    keys = ['test_images', 'val_images'] * (split == 'test') + [
        'x', 'images', 'train_images', 'arr_0']
    key = next((key for key in keys if key in arrays), None)
    if key is None:
        raise ValueError(f"holds {[*arrays]}, none of {', '.join(keys)}")
    own = [key.replace('images', 'labels')] if '_images' in key else ['y', 'labels']
    own = next((name for name in own if name in arrays), None)
    try:
        values = arrays[own]() if own else 'no labels'
    except Exception as error:  # they may not even be wanted
        values = f'{own} that cannot be read ({error!r})'
    others = ' or '.join(k for k in arrays if k.endswith('_images') and k != key)
    notes = [f'its {key}, not {others}'] * bool(others)
    array, clipped = as_uint8(in_rows(arrays[key]()))
    labels, _, why = as_labels(values, range(len(array)))
    return Found(None, array, labels, None, why, notes + clipped,
                 apart=key.startswith(('test', 'val')))
