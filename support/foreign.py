"""Other people's folders, zips, arrays and labels: which images they hold, and of which classes.
You need not read it to understand the method.

The files are strangers': nothing in them runs, none of them fills the memory, and what is decided
for the user (a split chosen, images left out) is handed back in words, so that it can be said.
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

IMAGE_EXTENSIONS = tuple(
    '.png .jpg .jpeg .jfif .webp .bmp .gif .tif .tiff .ppm .pgm'.split())

# Folders that are splits: train/ val/, Train/ TEST/, training_set/ test_set/, train2017/ val2017/.
SPLIT = re.compile('(?:(?P<train>train(?:ing)?)|(?P<val>val(?:id(?:ation)?)?|dev)|(?P<test>test(?:'
                   'ing)?))[-_ ]?(?:set|split|data|images|imgs)?[-_ ]?[0-9]*', re.I)

# A folder of pictures, and the folders beside it that hold no images to train on.
PICTURES = 'images image imgs img jpegimages'.split()
ABOUT_PICTURES = 'labels label masks mask annotations annotation segmentations'.split()

ENTRY_LIMIT = 256 << 20  # bytes that a file, or a zip's entry, may have

ZIPS = {}  # open archives, by (path, process): forked processes would share a position in the file
ZIP_LOCK = threading.Lock()


class RawSet(NamedTuple):
    """A data set whose images are found, but not decoded."""
    root: Optional[str]                    # the folder or .zip of the files; None: an array
    entries: object                        # n names of files in root, or an array: uint8 (n, H, W)
                                           # or (n, H, W, C)
    labels: Optional[torch.Tensor] = None  # int64 (n,)
    classes: Optional[list] = None         # the name of each class
    unlabelled: str = 'no labels'          # where labels is None: what there is instead, in words
    notes: tuple = ()                      # what was decided for the user, in words
    paths: Optional[list] = None           # n names that stay the same where the set is moved or
                                           # zipped; None: those of entries
    apart: bool = True                     # of a test split: whether its images are others than
                                           # those to train on


class NoLabels(Exception):
    """A set has no labels that can be used, and the message says what there is instead. This never
    refuses the set: labels may not even be wanted."""


# ---------------------------------------------------------------- folders and zips

def files_below(root):
    """Yields the files in a folder and in all folders below it, as paths relative to it.

    Links are followed, but not in circles: no link to a folder that the link lies in, and within
    what a link led to no link to a folder where the walk has been. Raises OSError for a folder that
    may not be read."""
    def refuse(error):  # by default os.walk passes over such a folder
        raise error

    top = os.path.realpath(root)
    # For each folder still to be walked: the real paths of the folders from the top down to it, and
    # whether any of them was reached by a link.
    ways = {root: ((top,), False)}
    seen = {top}
    for folder, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        way, by_link = ways.pop(folder)
        relative = os.path.relpath(folder, root)
        for file in files:
            yield os.path.normpath(os.path.join(relative, file))
        names = list(folders)
        folders.clear()  # os.walk goes on into those that are put back
        if top == '/' and way[-1] in ('/proc', '/sys', '/dev'):
            continue
        for name in names:
            path = os.path.join(folder, name)
            real = os.path.join(way[-1], name)
            is_link = os.path.islink(path)
            if is_link:
                real = os.path.realpath(path)
                leads_back = any(is_within(above, real) for above in way)
                if leads_back or by_link and real in seen:
                    continue
            ways[path] = (*way, real), by_link or is_link
            seen.add(real)
            folders.append(name)


def is_within(path, folder):
    """Whether a path is that folder or lies in it."""
    return os.path.join(path, '').startswith(os.path.join(folder, ''))


def open_entry(archive, name, limit):
    """An entry of a zip as a file, none of whose reads unpacks more than was asked for. Raises
    ValueError for one that says it is larger than `limit` bytes, or that is packed otherwise."""
    info = archive.getinfo(name)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError('packed by other than deflate')  # a read of that unpacks all at once
    if info.file_size > limit:
        raise ValueError(f'claims to unpack to {info.file_size} bytes')
    return archive.open(info)


def read_bytes(root, entry):
    """The contents of a file in the folder or .zip `root`. Raises ValueError for one of more than
    ENTRY_LIMIT bytes, and for what is no file."""
    if os.path.isdir(root):
        path = os.path.join(root, entry)
        if not os.path.isfile(path):  # opening a named pipe waits for ever
            raise ValueError('not a file')
        if os.path.getsize(path) > ENTRY_LIMIT:
            raise ValueError(f'a file of more than {ENTRY_LIMIT} bytes')
        with open(path, 'rb') as file:
            return file.read()
    with ZIP_LOCK:  # the threads that decode share one position in the archive
        key = root, os.getpid()
        if key not in ZIPS:
            ZIPS[key] = zipfile.ZipFile(root)
        file = open_entry(ZIPS[key], entry, ENTRY_LIMIT)
        return b''.join(iter(lambda: file.read(1 << 20), b''))  # checks the CRC at the end


# ---------------------------------------------------------------- which folders are classes

class Level(NamedTuple):
    """A level of folders that are not classes."""
    depth: int    # 0 for the outermost folders, 1 for those in them
    splits: dict  # of the folders whose images count: 'train', 'val' or 'test', or '' for no split


def layout(paths):
    """Take the folders that are not classes out of the paths of images: one that holds everything,
    those of splits, and images/ where masks/ lies beside it.

    paths: {name: the parts of its path} -> (paths of those that count, without such folders; {name:
    'train', 'val' or 'test'}, empty where there are no splits; notes for the user)."""
    splits = {}
    notes = []
    while level := level_without_classes(paths.values()):
        depth, folders = level
        kept = {name: path for name, path in paths.items() if path[depth] in folders}
        if len(kept) < len(paths):
            first = next(name for name in paths if name not in kept)
            beside = ', '.join(sorted(folders))
            notes.append(f'without {len(paths) - len(kept)} images beside {beside} '
                         f'(first: {first!r})')
        outer, splits = splits, {}
        for name, path in kept.items():
            split = outer.get(name, '')
            if split in ('', 'train'):  # in train/ there may be train/ and val/
                split = folders[path[depth]] or split
            if split:
                splits[name] = split
        paths = {name: path[:depth] + path[depth + 1:] for name, path in kept.items()}
    return paths, splits, notes


def level_without_classes(paths):
    """The first Level of these paths whose folders are not classes, or None."""
    def folders_at(depth):  # '' stands for the files that lie in no folder there
        return {path[depth] if len(path) > depth + 1 else '' for path in paths}

    outer = folders_at(0)
    inner = folders_at(1)
    # A class may be called train. Folders are splits where some are for training and some are not;
    # or, of the outermost, where there are no others; and of the inner ones only where both hold.
    splits = split_folders(outer)
    if has_training_and_more(splits) or splits and splits.keys() == outer - {''}:
        return Level(0, splits)
    splits = split_folders(inner)
    if has_training_and_more(splits) and splits.keys() == inner:
        return Level(1, splits)
    pictures = [folder for folder in outer if folder.lower() in PICTURES]
    if len(pictures) == 1:
        others = outer - set(pictures)
        if all(folder.lower() in ABOUT_PICTURES for folder in others):
            return Level(0, {pictures[0]: ''})
    if len(outer) == 1 and '' not in outer:
        return Level(0, dict.fromkeys(outer, ''))
    return None


def split_folders(folders):
    """{folder: 'train', 'val' or 'test'} of the folders whose names are those of splits, behind a
    beginning that all folders share: seg_train, seg_test."""
    prefix = os.path.commonprefix(list(folders - {''}))
    start = len(re.sub('[^-_. ]*$', '', prefix))  # up to the last separator in it
    matches = {folder: SPLIT.fullmatch(folder[start:]) for folder in folders}
    return {folder: match.lastgroup for folder, match in matches.items() if match}


def has_training_and_more(splits):
    return 'train' in splits.values() and len(set(splits.values())) > 1


def natural_key(name):
    """A key that sorts 2 before 10."""
    parts = re.split('([0-9]+)', name)  # every second one is digits
    return [int(part) if k % 2 else part for k, part in enumerate(parts)], name


# ---------------------------------------------------------------- labels

def integer_labels(values, names):
    """One whole number for each of the images `names`, in any form -> int64 (n,). None stands for a
    label that is missing. Raises NoLabels."""
    bare = [name for name, value in zip(names, values) if value is None]
    if bare and len(bare) == len(names):
        raise NoLabels('no labels')
    if bare:
        raise NoLabels(f'no label for {len(bare)} of {len(names)} images (first: {bare[0]!r})')
    try:
        values = np.asarray(values)
        hint = ''
        if values.ndim == 2 and values.shape[1] > 1:
            is_one_hot = (values.sum(1) == 1).all()
            hint = ', one-hot: give their argmax(1)' if is_one_hot else ', several an image'
    except (ValueError, TypeError) as error:  # lists of several lengths, or of words
        raise NoLabels('labels that are not all whole numbers') from error
    if values.size != len(names) or values.dtype.kind not in 'iu':
        raise NoLabels(f'{values.dtype} labels {values.shape} for {len(names)} images{hint}')
    return torch.from_numpy(values.reshape(-1).astype(np.int64))


def word_labels(words, vocabulary, names):
    """A word for each of the images `names`, numbered by its place among the words of `vocabulary`
    in natural order -> (int64 (n,), classes). None is no word. Raises NoLabels."""
    classes = sorted(set(vocabulary) - {None}, key=natural_key)
    if len(classes) < 2:
        raise NoLabels('no labels')
    numbers = {word: k for k, word in enumerate(classes)}
    return integer_labels([numbers.get(word) for word in words], names), classes


def table_labels(root, tables, paths, names):
    """Labels from the files dataset.json of NVlabs' dataset_tool.py, each of which holds
    {"labels": [["00000/img00000000.png", 6], ...]} or null -> (int64 (n,), classes or None).

    tables: {name of such a file: the parts of its folder}. paths: the parts of the path of each of
    the images `names`. Raises NoLabels."""
    by_path = {}
    for table, folder in tables.items():
        try:  # it may hold anything
            pairs = json.loads(read_bytes(root, table))['labels']
            for image, label in dict(pairs or ()).items():
                by_path['/'.join([*folder, *re.split(r'[/\\]', image)])] = label
        except Exception as error:
            raise NoLabels(f'labels in {table} that cannot be read ({error!r})') from error
    if not by_path:
        raise NoLabels(f'no labels, null in {table}')
    values = [by_path.get('/'.join(path)) for path in paths]
    words = [value if isinstance(value, str) else None for value in values]
    if any(word is not None for word in words):
        return word_labels(words, words, names)
    return integer_labels(values, names), None


# ---------------------------------------------------------------- the images of a folder or zip

def list_images(root, split):
    """The RawSet of a folder or .zip.

    Files with other extensions than IMAGE_EXTENSIONS are passed over, and counted in a note. Labels
    come from dataset.json where there is one. Else the outermost folders that layout() leaves are
    the classes; those of the images to train on are also the classes of a test split. Raises
    ValueError where there are no images for the split."""
    files = files_of(root)
    tables = {name: path[:-1] for name, path in files.items() if path[-1:] == ['dataset.json']}
    parts = {name: path for name, path in files.items() if name.lower().endswith(IMAGE_EXTENSIONS)}
    others = [name for name in files if name not in parts and name not in tables]
    passed_over = f'passed over {len(others)} of {len(files)} files ({endings_of(others)})'
    if not parts:
        problem = f"no images in it, which end in {' '.join(IMAGE_EXTENSIONS)}"
        if others:
            problem += f'; {passed_over}'
        raise ValueError(problem)
    paths, splits, notes = layout(parts)
    if others:
        notes.insert(0, passed_over)
    served = chosen_split(splits, split)
    if splits:
        counts = Counter(splits.values())
        unused = ' or '.join(f'{other} ({counts[other]})' for other in counts if other != served)
        note = f'its {served} split'
        if unused:
            note += f', not {unused}'
        notes.append(note)
    chosen = [name for name in paths if splits.get(name, '') == served]  # all, without splits
    to_train_on = [name for name in paths if splits.get(name, 'train') == 'train'] or chosen

    labels = classes = None
    unlabelled = ''
    folder_of = {name: path[0] if len(path) > 1 else None for name, path in paths.items()}
    try:
        if tables:
            labels, classes = table_labels(root, tables, [parts[name] for name in chosen], chosen)
        elif all(is_numbered(paths[name]) for name in to_train_on):
            raise NoLabels('folders that number the images, and no dataset.json')
        else:
            labels, classes = word_labels([folder_of[name] for name in chosen],
                                          [folder_of[name] for name in to_train_on], chosen)
    except NoLabels as error:
        unlabelled = str(error)
    return RawSet(root, chosen, labels, classes, unlabelled, tuple(notes),
                  ['/'.join(paths[name]) for name in chosen], apart=served in ('test', 'val'))


def endings_of(names):
    """In words: how these files end, those of which there are most first."""
    counts = Counter(os.path.splitext(name)[1].lower() or 'no ending' for name in names)
    words = [f'{count} {ending}' for ending, count in counts.most_common(5)]
    if len(counts) > 5:
        words.append('...')
    return ', '.join(words)


def files_of(root):
    """{name: the parts of its path} of the files in a folder or .zip, in order. __MACOSX is left
    out, and so are paths with a part that begins with a dot ('..' is one)."""
    if os.path.isdir(root):
        names = files_below(root)
        separator = re.escape(os.sep)
    else:
        with zipfile.ZipFile(root) as archive:
            names = [name for name in archive.namelist() if not name.endswith(('/', '\\'))]
        separator = r'[/\\]'  # some programs of Windows write the other one
    hidden = re.compile(r'(^|[/\\])(\.[^/\\]|__MACOSX/)')
    return {name: [part for part in re.split(separator, name) if part not in ('', '.')]
            for name in sorted(set(names)) if not hidden.search(name)}


def chosen_split(splits, split):
    """Which split of {name: 'train', 'val' or 'test'} serves as `split`, train or test: '' where
    there are none. The validation images serve as test images, and the training images where there
    is nothing else. Raises ValueError where there is nothing to train on."""
    if not splits:
        return ''
    present = list(dict.fromkeys(splits.values()))
    if split in present:
        return split
    if split == 'train':
        raise ValueError(f'holds {" and ".join(present)}, but nothing to train on')
    return 'val' if 'val' in present else 'train'


def is_numbered(path):
    """Whether the path is 00000/img00000000.png, whose folder only counts, as NVlabs'
    dataset_tool.py writes it."""
    return re.fullmatch(r'[0-9]{5}/\D*[0-9]{5,}\.\w+', '/'.join(path)) is not None


# ---------------------------------------------------------------- arrays

def read_arrays(path, split):
    """The RawSet of a .npy, or of a .npz with MedMNIST's keys or x, images or arr_0. Raises
    ValueError for arrays that are no images."""
    arrays = arrays_of(path)
    keys = ['x', 'images', 'train_images', 'arr_0']
    if split == 'test':
        keys = ['test_images', 'val_images', *keys]
    key = next((key for key in keys if key in arrays), None)
    if key is None:
        raise ValueError(f"holds {[*arrays]}, none of {', '.join(keys)}")
    notes = []
    others = [name for name in arrays if name.endswith('_images') and name != key]
    if others:
        notes.append(f'its {key}, not {" or ".join(others)}')
    array, note = as_uint8(in_rows(arrays[key]()))
    if note:
        notes.append(note)

    label_keys = ['y', 'labels']
    if key.endswith('_images'):
        label_keys = [key.replace('images', 'labels')]
    labels = None
    unlabelled = 'no labels'
    label_key = next((name for name in label_keys if name in arrays), None)
    if label_key is not None:
        try:
            labels = integer_labels(arrays[label_key](), range(len(array)))
        except NoLabels as error:
            unlabelled = str(error)
        except Exception as error:  # a damaged or hostile array raises almost anything
            unlabelled = f'{label_key} that cannot be read ({error!r})'
    return RawSet(None, array, labels, None, unlabelled, tuple(notes),
                  apart=key in ('test_images', 'val_images'))


def arrays_of(path):
    """{name: a function that reads it} for the arrays of a .npz, or for the one, x, of a .npy."""
    stored = np.load(path, mmap_mode='r', allow_pickle=False)
    if isinstance(stored, np.ndarray):
        return {'x': lambda: stored}
    limit = max(100 * os.path.getsize(path), ENTRY_LIMIT)

    def read(name):  # stored[name] would unpack a bomb
        return np.lib.format.read_array(open_entry(stored.zip, f'{name}.npy', limit))
    return {name: functools.partial(read, name) for name in stored.files}


def in_rows(array):
    """Images (n, H, W), (n, H, W, C) or (n, C, H, W) as one of the first two. Raises ValueError for
    others."""
    shape = array.shape
    depths = (1, 3, 4)  # of grey, RGB and RGBA
    if array.ndim == 4 and shape[3] not in depths and shape[1] in depths:
        array = np.moveaxis(array, 1, 3)
    if array.size == 0:
        raise ValueError(f'an array of shape {shape}, which holds no images')
    if array.ndim == 3:
        n, height, width = shape
        if height != width and width in depths:
            raise ValueError(f'images of shape {shape}; one image? give x[None], else x[..., None]')
        if height != width and (n == height or width > 4 * height):
            raise ValueError(f'images of shape {shape}; the last axis counts them? give '
                             'np.moveaxis(x, -1, 0), else x[..., None]')
    elif array.ndim != 4:
        raise ValueError(f'images of shape {shape}')
    elif array.shape[3] not in depths:
        raise ValueError(f'images of shape {shape}; the last axis counts them? give '
                         'np.moveaxis(x, -1, 0)')
    if array.shape[3:] == (1,):
        return array[..., 0]
    return array


def as_uint8(array):
    """Pixels of uint8, or floats in [0, 1] or [-1, 1], whichever most of them are in -> (uint8
    array, a note for the user or ''). Up to 1e-3 beyond an end is clipped. Raises ValueError for
    others."""
    if array.dtype == np.uint8:
        return array, ''
    if array.dtype.kind != 'f':
        raise ValueError(f'holds {array.dtype}; give uint8, from 0 to 255')
    low = float(array.min())
    high = float(array.max())
    below_zero = float((array < -1e-3).mean())
    base = -1 if below_zero >= 0.01 and low < -0.5 else 0
    if not (low >= base - 1e-3 and high <= 1 + 1e-3):  # false for NaN too
        raise ValueError(f'holds values from {low:.6g} to {high:.6g}, {100 * below_zero:.3g} % of '
                         'them below 0: not in [0, 1] nor [-1, 1]; scale them, or clip them to one')
    note = ''
    beyond = int(((array < base) | (array > 1)).sum())
    if beyond:
        most = max(base - low, high - 1)
        note = f'{beyond} values up to {most:.1e} beyond [{base}, 1] clipped'
    pixels = np.empty(array.shape, np.uint8)
    for k in range(0, len(array), 256):  # a float copy of all might not fit in memory
        part = array[k:k + 256].astype(np.promote_types(array.dtype, np.float32)).clip(base, 1)
        pixels[k:k + 256] = np.rint((part - base) * (255 / (1 - base)))
    return pixels, note
