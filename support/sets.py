"""Known data sets, and load_images(), which finds and decodes any set. Read it if you want to add
one."""
import difflib
import os
import re
import warnings
from collections import Counter
from typing import NamedTuple, Optional

import torch.nn.functional as F
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from support import waiting
from support.cli import BadInput, SIZE_LIMIT, say
from support.foreign import IMAGE_EXTENSIONS, RawSet, list_images, read_arrays
from support.images import Images, probe
from support.processes import first_of_its_machine


# ---------------------------------------------------------------- the sets known by name

class KnownSet(NamedTuple):
    image_size: int         # the default of --image_size, pixels a side
    channels: int           # the default of --channels
    flip: bool              # the default of --flip: whether training mirrors half of the images
    by_hand: str            # the files to fetch where the download fails; {} is --data_dir
    torchvision: str = ''   # the class of torchvision.datasets that downloads it, if there is one


SETS = {
    'glyphs': KnownSet(image_size=16, channels=1, flip=False, by_hand=''),
    'mnist': KnownSet(
        image_size=28, channels=1, flip=False, torchvision='MNIST',
        by_hand='{}/MNIST/raw/train-* and t10k-*-ubyte.gz'),
    'fashion_mnist': KnownSet(
        image_size=28, channels=1, flip=False, torchvision='FashionMNIST',
        by_hand='{}/FashionMNIST/raw/*-ubyte.gz'),
    'cifar10': KnownSet(
        image_size=32, channels=3, flip=True, torchvision='CIFAR10',
        by_hand='{}/cifar-10-python.tar.gz (cs.toronto.edu/~kriz)'),
    'celeba64': KnownSet(
        image_size=64, channels=3, flip=True, torchvision='CelebA',
        by_hand='{}/celeba/*.txt and, unzipped, img_align_celeba/'),
    'lsun_bedroom': KnownSet(
        image_size=256, channels=3, flip=True,
        by_hand='{}/lsun_bedroom/ (as github.com/fyu/lsun exports)'),
}

# MedMNIST v2, its 2-D sets: arXiv 2110.14795, zenodo.org/records/10519652. Each is there in four
# sizes, and here are the MD5 sums of these archives, as medmnist 3.0.2 has them.
MEDMNIST_SIZES = (28, 64, 128, 224)
MEDMNIST_MD5 = {
    'pathmnist': ('a8b06965200029087d5bd730944a56c1', '55aa9c1e0525abe5a6b9d8343a507616',
                  'ac42d08fb904d92c244187169d1fd1d9', '2c51a510bcdc9cf8ddb2af93af1eadec'),
    'chestmnist': ('02c8a6516a18b556561a56cbdd36c4a8', '9de6cd0b934ebb5b7426cfba5efbae16',
                   'db107e5590b27930b62dbaf558aebee3', '45bd33e6f06c3e8cdb481c74a89152aa'),
    'dermamnist': ('0744692d530f8e62ec473284d019b0c7', 'b70a2f5635c6199aeaa28c31d7202e1f',
                   '2defd784463fa5243564e855ed717de1', '8974907d8e169bef5f5b96bc506ae45d'),
    'octmnist': ('c68d92d5b585d8d81f7112f81e2d0842', 'e229e9440236b774d9f0dfef9d07bdaf',
                 '0a97e76651ace45c5d943ee3f65b63ae', 'abc493b6d529d5de7569faaef2773ba3'),
    'pneumoniamnist': ('28209eda62fecd6e6a2d98b1501bb15f', '8f4eceb4ccffa70c672198ea285246c6',
                       '05b46931834c231683c68f40c47b2971', 'd6a3c71de1b945ea11211b03746c1fe1'),
    'retinamnist': ('bd4c0672f1bba3e3a89f0e4e876791e4', 'afda852cc34dcda56f86ad2b2457dbcc',
                    'e48e916a24454daf90583d4e6efb1a18', 'eae7e3b6f3fcbda4ae613ebdcbe35348'),
    'breastmnist': ('750601b1f35ba3300ea97c75c52ff8f6', '742edef2a1fd1524b2efff4bd7ba9364',
                    '363e4b3f8d712e9b5de15470a2aaadf1', 'b56378a6eefa9fed602bb16d192d4c8b'),
    'bloodmnist': ('7053d0359d879ad8a5505303e11de1dc', '2b94928a2ae4916078ca51e05b6b800b',
                   'adace1e0ed228fccda1f39692059dd4c', 'b718ff6835fcbdb22ba9eacccd7b2601'),
    'tissuemnist': ('ebe78ee8b05294063de985d821c1c34b', '123ece2eba09d0aa5d698fda57103344',
                    '61b955355d7425a89687b06cca3ce0c2', 'b077128c4a949f0a4eb01517f9037b9c'),
    'organamnist': ('68e3f8846a6bd62f0c9bf841c0d9eacc', '2dcccc29b88e6da5a01161ef20cda288',
                    'eeae80d0a227a8d099027e1b3cfd3b60', '50747347e05c87dd3aaf92c49f9f3170'),
    'organcmnist': ('b9ceb9546e10131b32923c5bbeaea2b1', '3ce34a8724ea6f548e6db4744d03b6a9',
                    '773c1f009daa3fe5d9a2a201b2a7ed94', '050f5e875dc056f6768abf94ec9995d1'),
    'organsmnist': ('9ab87b696fb54e2a387ebe992d6ed5f1', '53a6d115339d874c25e309a994ff46d3',
                    'ded0c5fa01a95dc4978b956f613e9b8e', 'b354719e553fbbb2513d5533f52a4cb1'),
}
MEDMNIST_IN_COLOUR = ('pathmnist', 'dermamnist', 'retinamnist', 'bloodmnist')


def medmnist_set(name):
    in_colour = name in MEDMNIST_IN_COLOUR
    return KnownSet(
        image_size=28, channels=3 if in_colour else 1, flip=in_colour,
        by_hand=f'{{}}/{name}.npz, or of 64 pixels {name}_64.npz (zenodo.org/records/10519652)')


SETS.update({name: medmnist_set(name) for name in MEDMNIST_MD5})

ACCEPTED = (f"{', '.join(SETS)}, an image, a folder or .zip of them, a .npy or .npz of arrays "
            '(n, H, W), (n, H, W, C) or (n, C, H, W) with C of 1, 3 or 4, uint8 or float in [0, 1] '
            'or [-1, 1], with one integer label an image or none')


# ---------------------------------------------------------------- any set

def load_images(dataset='glyphs', data_dir='data', image_size=None, channels=None, split='train',
                flag='--dataset', size_is_fixed=False):
    """The Images of a data set, decoded where they fit in memory.

    dataset: a name in SETS, or a path (the name wins over a file that is called so). data_dir:
    where the known sets are kept. image_size None: the known default, or the shorter side of the
    first image of a path. channels None: the known default, or 1 if all images of a path are grey,
    else 3. split: train or test. As its test split a path without one serves its val split, or
    without any split all of its images. flag: the one that gave `dataset`, for messages.
    size_is_fixed: whether image_size is that of a network or of other images, so that no message
    tells to change it. Raises BadInput."""
    if split not in ('train', 'test'):
        raise BadInput(f'--split {split}: accepted: train, test')
    if channels not in (None, 1, 3):
        raise BadInput(f'--channels {channels}: accepted: 1, 3')
    dataset = str(dataset)
    raw = found(dataset, str(data_dir), flag, image_size, split)
    is_known_set = dataset in SETS
    if is_known_set:
        default_size = SETS[dataset].image_size
        default_channels = SETS[dataset].channels
        flip = SETS[dataset].flip
    else:
        least = 2 * image_size if image_size else None
        try:
            with waiting.doing(f'{flag} {dataset}: looking at its sizes and colours'):
                default_size, default_channels = probe(raw.root, raw.entries, channels, least)
        except Exception as error:  # as in found()
            raise unusable(dataset, data_dir, flag, error) from error
        flip = default_channels == 3
    size = default_size if image_size is None else image_size
    if not 1 <= size <= SIZE_LIMIT:
        raise BadInput(f'--image_size {size}: of {flag} {dataset}; accepted: 1 to {SIZE_LIMIT}')
    images = Images(dataset, flag, raw, size, channels or default_channels, flip, is_known_set,
                    size_is_fixed)
    notes = list(raw.notes)
    if split == 'test' and not raw.apart:
        notes.append('no test split in it: these images serve')
    notes += images.fill()
    say_notes(images, notes)
    return images


class Pictures(NamedTuple):
    """A few images that the user gave, such as those of --inpaint."""
    pixels: torch.Tensor   # uint8 (n, C, S, S)
    places: list           # n numbers: which images of the whole set they are
    names: Optional[list]  # of all images of the set, their files; None for an array
    total: int             # how many the set has


def load_pictures(dataset, data_dir, image_size, channels, count, flag):
    """The first `count` images of a data set that can be read, as Pictures. No others are decoded.

    image_size and channels: those of the network. dataset, data_dir, flag: as of load_images().
    Raises BadInput, also for an image of the user's that is smaller than image_size."""
    dataset = str(dataset)
    raw = found(dataset, str(data_dir), flag, image_size)
    images = Images(dataset, flag, raw, image_size, channels, flip=False,
                    is_known_set=dataset in SETS, size_is_fixed=True)
    pixels = []
    places = []
    problems = []
    changes = Counter()
    for k in range(len(images)):
        decoded = images.decode(k)
        if decoded.pixels is None:
            problems.append(decoded.problem)
            continue
        pixels.append(torch.from_numpy(decoded.pixels))
        places.append(k)
        changes.update(decoded.changes)
        if len(pixels) == count:
            break
    if not pixels:
        raise BadInput(f'{images.given}: no image can be read (first: {problems[0]})')
    notes = list(raw.notes)
    if problems:
        notes.append(f'without {len(problems)} that cannot be read (first: {problems[0]})')
    notes += [f'{change_count} of {len(pixels)} images {change}'
              for change, change_count in changes.items()]
    say_notes(images, notes)
    names = None
    if raw.root is not None:
        names = list(raw.paths or raw.entries)
    return Pictures(torch.stack(pixels), places, names, len(images))


def say_notes(images, notes):
    """Say in one line what was decided for the user: of a known set only whether its images were
    enlarged, since the rest is part of what it is."""
    if images.is_known_set:
        notes = [note for note in notes if 'enlarged' in note]
    if notes:
        say(f'{images.given}: {"; ".join(notes)}')


def found(dataset, data_dir, flag, image_size=None, split='train'):
    """The RawSet of a known set or of a path, as find() finds it. Raises BadInput in the name of
    `flag`, which gave `dataset`."""
    # Not catch_warnings, which is not safe with threads: these stay for the whole process.
    warnings.filterwarnings('ignore', module='PIL')
    warnings.simplefilter('error', Image.DecompressionBombWarning)
    warnings.filterwarnings('ignore', 'This DataLoader will create')  # more workers than cores
    if dataset in SETS and os.path.lexists(dataset):
        say(f'{flag} {dataset}: the known set, not the file or folder here that is called so; that '
            f'is ./{dataset}')
    work = 'finding, or downloading, its files'
    if dataset == 'glyphs':
        work = 'drawing it'
    # What the first process of a machine downloads is there for the others.
    with waiting.doing(f'{flag} {dataset}: {work}'), first_of_its_machine():
        try:
            return find(dataset, data_dir, image_size, split)
        except Exception as error:  # a damaged file makes the libraries raise almost anything
            raise unusable(dataset, data_dir, flag, error) from error


def unusable(dataset, data_dir, flag, error):
    """The BadInput for a data set that cannot be found or read, because of `error`."""
    mend = f'accepted: {ACCEPTED}'
    if dataset in SETS:
        mend = f'fetch by hand {SETS[dataset].by_hand.format(data_dir)}'
    return BadInput(f'{flag} {dataset}: {str(error) or repr(error)}; {mend}')


def meant_set(name):
    """The known set whose name is nearly this one, CIFAR-10 for cifar10, or None."""
    def bare(text):
        return re.sub('[^a-z0-9]', '', text.lower())
    names = {bare(known): known for known in SETS}
    last_part = os.path.basename(name.rstrip('/'))
    near = difflib.get_close_matches(bare(last_part), names, 1, cutoff=0.75)
    return names[near[0]] if near else None


def is_same_set(name, identity, other_name, other_identity, with_labels=False):
    """Whether two data sets are the same, each known by its name and its Images.identity at one
    image size: a known set of one name or, wherever they are now, as many images with the same
    pixels.

    with_labels: whether their labels and the names of their classes must be the same too."""
    if name in SETS or other_name in SETS:
        return name == other_name
    count, labels, pixels = identity
    other_count, other_labels, other_pixels = other_identity
    same_labels = labels == other_labels or not with_labels
    return (count, pixels) == (other_count, other_pixels) and same_labels


def find(dataset, data_dir, image_size, split):
    """The RawSet of a known set, downloaded where it is not there, or of a path. image_size: what
    the user asked for, or None. Raises ValueError where there is none, and whatever torchvision and
    damaged files raise."""
    if dataset == 'glyphs':
        pixels, labels = glyphs(image_size=min(image_size or 16, 64), split=split)
        return RawSet(None, pixels, torch.from_numpy(labels).long(), list('0123456789'))
    if dataset in SETS and SETS[dataset].torchvision:
        return from_torchvision(dataset, data_dir, split)
    if dataset in MEDMNIST_MD5:
        return from_path(medmnist(dataset, data_dir, image_size or 28), split)
    if dataset == 'lsun_bedroom':
        path = f'{data_dir}/lsun_bedroom'
        if not os.path.lexists(path):
            raise ValueError(f'there is no {path}')
        raw = from_path(path, split)
        return RawSet(raw.root, raw.entries, apart=raw.apart)  # its folders are no classes
    return from_path(dataset, split)


def from_torchvision(dataset, data_dir, split):
    """The RawSet of a known set that torchvision downloads."""
    from torchvision import datasets  # here, because it takes a second, which --help has not
    kind = getattr(datasets, SETS[dataset].torchvision)
    if dataset == 'celeba64':  # its targets are 40 attributes, not classes
        faces = kind(data_dir, download=True, split=split)
        return RawSet(f'{data_dir}/celeba/img_align_celeba', faces.filename)
    stored = kind(data_dir, download=True, train=split == 'train')
    return RawSet(None, np.asarray(stored.data), torch.as_tensor(stored.targets), stored.classes)


def medmnist(name, data_dir, image_size):
    """The path of the archive of a MedMNIST set: of the images that are as large as image_size, or
    the next larger. It is downloaded and checked where it is not there."""
    from torchvision.datasets.utils import download_url
    size = next((size for size in MEDMNIST_SIZES if size >= image_size), MEDMNIST_SIZES[-1])
    file = f'{name}.npz' if size == 28 else f'{name}_{size}.npz'
    path = f'{data_dir}/{file}'
    if not os.path.lexists(path):  # the user's own is taken as it is
        md5 = MEDMNIST_MD5[name][MEDMNIST_SIZES.index(size)]
        download_url(f'https://zenodo.org/records/10519652/files/{file}?download=1', data_dir,
                     f'{file}.part', md5)
        os.replace(f'{path}.part', path)
    return path


def from_path(path, split):
    """The RawSet of a folder, zip, array or single image. Raises ValueError for others."""
    ending = os.path.splitext(path)[1].lower()
    is_file = os.path.isfile(path)
    if os.path.isdir(path) or is_file and ending == '.zip':
        return list_images(path, split)
    if is_file and ending in ('.npy', '.npz'):
        return read_arrays(path, split)
    if is_file and ending in IMAGE_EXTENSIONS:
        return RawSet(os.path.dirname(path) or '.', [os.path.basename(path)], apart=False)
    if not os.path.lexists(path):
        problem = 'no such data set, file or folder'
        meant = meant_set(path)
        if meant:
            problem += f'; did you mean {meant}?'
        raise ValueError(problem)
    if is_file:
        raise ValueError(f'is of another kind ({ending or "no ending"})')
    raise ValueError('neither a file nor a folder')


# ---------------------------------------------------------------- the set that is drawn here

def glyphs(n=10_000, image_size=16, split='train'):
    """The digits in turn, white on black, each under its own affine map and stroke width: (uint8
    array (n, S, S), labels (n,)). The same arguments give the same bytes."""
    strokes = 4  # widths from 0 to 3 pixels of a sheet
    font = ImageFont.load_default(size=96)
    sheets = []
    for digit in range(10):
        for stroke in range(strokes):
            sheet = Image.new('L', (128, 128))
            ImageDraw.Draw(sheet).text((64, 64), str(digit), 255, font, 'mm', stroke_width=stroke)
            sheets.append(np.asarray(sheet))
    sheets = torch.from_numpy(np.stack(sheets)).float()[:, None]  # (10 * strokes, 1, 128, 128)

    rng = np.random.default_rng(('train', 'test').index(split))
    labels = np.arange(n) % 10
    which = torch.from_numpy(labels * strokes + rng.integers(strokes, size=n))
    low = (-.25, -.2, .7, .8, -.08, -.08)
    high = (.25, .2, 1, .96, .08, .08)
    angle, shear, width, height, right, down = rng.uniform(low, high, (n, 6)).T
    cos = np.cos(angle)
    sin = np.sin(angle)
    # Each map leads from the image to the sheet, both of them the square [-1, 1]^2.
    maps = np.stack([width * (cos + shear * sin), width * (shear * cos - sin), right,
                     height * sin, height * cos, down], 1).reshape(n, 2, 3)
    maps = torch.from_numpy(maps).float()

    scale = max(1, 64 // image_size)  # drawn so much larger and averaged, against jagged edges
    side = image_size * scale
    parts = []
    for k, m in zip(which.split(500), maps.split(500)):
        grid = F.affine_grid(m, (len(m), 1, side, side), align_corners=False)
        drawn = F.grid_sample(sheets[k], grid, align_corners=False)
        parts.append(F.avg_pool2d(drawn, scale))
    return torch.cat(parts)[:, 0].round().to(torch.uint8).numpy(), labels
