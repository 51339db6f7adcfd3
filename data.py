"""Image data sets as square uint8 tensors: load() finds and decodes one, batches() serves it.

Accepted: a name in SETS; a folder (searched recursively) or .zip of images of any mode, or one of
them; a .npy or .npz of images (n, H, W), (n, H, W, C) or (n, C, H, W), uint8 or float in [0, 1] or
[-1, 1]. What is decided for the user (splits, crops, grey or colour) is said in one line.
"""
import io
import multiprocessing
import os
import re
import sys
import warnings
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Optional

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

import pfgm
from files import (MEDMNIST, MEDMNIST_SIZES, arrays_of, as_labels, as_uint8, files_below, in_rows,
                   layout, read_bytes, table_values)
from launch import (CLASS_LIMIT, SIZE_LIMIT, BadInput, deaf, fingerprint, first_of_its_machine,
                    reader_lost, say, step_seed)

SETS = {  # image size, channels, random flips?, torchvision class, what to fetch by hand
    'glyphs':        (16, 1, False, '', ''),
    'mnist':         (28, 1, False, 'MNIST', '{}/MNIST/raw/train-* and t10k-*-ubyte.gz'),
    'fashion_mnist': (28, 1, False, 'FashionMNIST', '{}/FashionMNIST/raw/*-ubyte.gz'),
    'cifar10':       (32, 3, True, 'CIFAR10', '{}/cifar-10-python.tar.gz (cs.toronto.edu/~kriz)'),
    'celeba64':      (64, 3, True, 'CelebA', '{}/celeba/*.txt and, unzipped, img_align_celeba/'),
    'lsun_bedroom':  (256, 3, True, '', '{}/lsun_bedroom/ (as github.com/fyu/lsun exports)'),
}
SETS.update({name: (28, channels, channels == 3, '', f'{{}}/{name}.npz, or of 64 pixels '
                    f'{name}_64.npz (zenodo.org/records/10519652)')
             for name, (channels, *_) in MEDMNIST.items()})
# M, z_max, upper_norm and z_exp of the official code; other sets' follow from the data.
OFFICIAL = {'cifar10': (291, 40, 3e3, 5), 'cifar10_deep': (291, 40, 3e3, 5),
            'celeba64': (291, 60, 6e3, 1), 'lsun_bedroom': (356, 100, 3e4, 0.1)}
OFFICIAL_BY_SIZE = {32: 'cifar10', 64: 'celeba64', 256: 'lsun_bedroom'}
IMAGE_EXTENSIONS = tuple('.png .jpg .jpeg .webp .bmp .gif .tif .tiff .ppm .pgm'.split())
FORMATS = 'PNG JPEG WEBP BMP GIF TIFF PPM'.split()  # not EPS, for which Pillow runs Ghostscript
ACCEPTED = (f"{', '.join(SETS)}, an image, a folder or .zip of them, a .npy or .npz of arrays "
            '(n, H, W), (n, H, W, C) or (n, C, H, W) with C of 1, 3 or 4, uint8 or float in [0, 1] '
            'or [-1, 1], with one integer label an image or none')
MEMORY_LIMIT = 2 << 30  # bytes of decoded pixels; a larger set is decoded at each access instead


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


def load(dataset='glyphs', data_dir='data', image_size=None, channels=None, split='train',
         flag='--dataset'):
    """The Images of `dataset`, given by `flag`: a name in SETS (it wins over a file of that name)
    or a path.

    image_size None: the known default, or the shorter side of a path's first image. channels None:
    the known default, or 1 if all images are grey, else 3. A path without a test split serves its
    val, or without any split all its images as either. Raises BadInput.
    """
    if split not in ('train', 'test'):
        raise BadInput(f'--split {split}: accepted: train, test')
    if channels not in (None, 1, 3):
        raise BadInput(f'--channels {channels}: accepted: 1, 3')
    # Not catch_warnings, which is not safe with threads: these stay for the whole process.
    warnings.filterwarnings('ignore', module='PIL')
    warnings.simplefilter('error', Image.DecompressionBombWarning)
    warnings.filterwarnings('ignore', 'This DataLoader will create')  # more workers than cores
    dataset = str(dataset)
    with first_of_its_machine():
        try:
            found = find(dataset, str(data_dir), image_size, split)
            size, depth, flip, *_ = SETS.get(dataset) or probe(found.root, found.source, channels)
        except Exception as error:  # a damaged file makes the libraries raise almost anything
            mend = f'accepted: {ACCEPTED}' if dataset not in SETS else (
                f'fetch by hand {SETS[dataset][4].format(data_dir)}')
            raise BadInput(f'{flag} {dataset}: {str(error) or repr(error)}; {mend}') from error
    size = size if image_size is None else image_size
    if not 1 <= size <= SIZE_LIMIT:
        raise BadInput(f'--image_size {size}: of {flag} {dataset}; accepted: 1 to {SIZE_LIMIT}')
    data = Images(dataset, flag, found, size, channels or depth, flip)
    alone = ['no test split in it: these images serve'] * (split == 'test' and not data.apart)
    notes = [*found.notes, *alone, *data.fill()]
    if notes and dataset not in SETS:
        say(f'{data.given}: {"; ".join(notes)}')
    return data


def find(dataset, data_dir, image_size, split):
    """-> Found."""
    path = f'{data_dir}/lsun_bedroom' if dataset == 'lsun_bedroom' else (
        medmnist(dataset, data_dir, image_size or 28) if dataset in MEDMNIST else dataset)
    ending, file = os.path.splitext(path)[1].lower(), os.path.isfile(path)
    if dataset == 'glyphs':
        pixels, labels = glyphs(image_size=min(image_size or 16, 64), split=split)
        return Found(None, pixels, torch.from_numpy(labels).long(), list('0123456789'))
    if dataset in SETS and path == dataset:
        from torchvision import datasets  # here, because it takes a second that --help has not
        which = {'split': split} if dataset == 'celeba64' else {'train': split == 'train'}
        found = getattr(datasets, SETS[dataset][3])(data_dir, download=True, **which)
        if dataset == 'celeba64':  # its targets are 40 attributes, not classes
            return Found(f'{data_dir}/celeba/img_align_celeba', found.filename)
        return Found(None, np.asarray(found.data), torch.as_tensor(found.targets), found.classes)
    if os.path.isdir(path) or file and ending == '.zip':
        found = list_images(path, split)
        return found if path == dataset else Found(*found[:2], apart=found.apart)  # LSUN
    if file and ending in ('.npy', '.npz'):
        return read_arrays(path, split)
    if file and ending in IMAGE_EXTENSIONS:
        return Found(os.path.dirname(path) or '.', [os.path.basename(path)], apart=False)
    missing = f'there is no {path}' if dataset in SETS else 'no such data set, file or folder'
    raise ValueError(missing if not os.path.lexists(path) else 'is of another kind' if file else
                     'neither a file nor a folder')


def medmnist(name, data_dir, image_size):
    """The path of the archive of this set whose size is the next, downloaded and checked where it
    is not there."""
    from torchvision.datasets.utils import download_url
    which = next((k for k, size in enumerate(MEDMNIST_SIZES) if size >= image_size), 3)
    file = f'{name}_{MEDMNIST_SIZES[which]}.npz' if which else f'{name}.npz'
    if not os.path.lexists(path := f'{data_dir}/{file}'):  # a user's own is taken as it is
        download_url(f'https://zenodo.org/records/10519652/files/{file}?download=1', data_dir,
                     f'{file}.part', MEDMNIST[name][1 + which])
        os.replace(f'{path}.part', path)
    return path


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


def probe(root, source, channels):
    """-> (shorter side of the first readable image, channels or 1 if all are grey, else 3, whether
    that is 3), as in SETS."""
    found = [read(root, source[k]) for k in sorted({k * len(source) // 64 for k in range(64)})]
    images = [image for image, _ in found if image]
    if not images:
        raise ValueError(f'none of {len(found)} images can be read ({source[0]!r}: {found[0][1]})')
    grey = not channels and not any(map(coloured, images)) and not any(
        coloured(read(root, entry, whole=False)[0]) for entry in source)
    channels = channels or (1 if grey else 3)
    return min(images[0].size), channels, channels == 3


def coloured(image):
    return bool(image and image.mode == 'RGB' and np.ptp(np.asarray(image), axis=2).any())


def read(root, entry, whole=True):
    """-> (PIL image of mode L or RGB, None) or (None, why it cannot be read): the first frame,
    turned as its EXIF says, transparency on white, 16 bits scaled to 8; info['lost'] says which.
    whole=False leaves one of a grey mode as it is, not even decoded."""
    try:
        image = Image.fromarray(entry) if root is None else Image.open(
            io.BytesIO(read_bytes(root, entry)), formats=FORMATS)
        if not whole and (image.mode in ('1', 'L', 'LA') or image.mode[0] in 'IF'):
            return image, None
        lost = ['of several frames, the first taken'] * getattr(image, 'is_animated', False)
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode[0] in 'IF':  # convert() would clip these at 255
            values = np.asarray(image)
            if image.mode == 'F' or values.min() < 0 or values.max() > 65535:
                raise ValueError(f'mode {image.mode}; accepted: 8 or 16 bits a channel')
            image = Image.fromarray(np.rint(values / 257).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert('RGBA')
            lost += ['transparent, put on white'] * (image.getextrema()[3][0] < 255)
            image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
        image = image.convert('L' if image.mode in '1L' else 'RGB')
        image.info = dict(lost=lost)
        return image, None
    except Exception as error:  # Pillow's plugins raise almost anything on a broken file
        return None, repr(error)


class Images(torch.utils.data.Dataset):
    """pixels uint8 (n, C, S, S), or None for a large set, which is decoded at each access; labels
    int64 (n,) or None; classes, a list of names, or None; name, image_size, channels, flip; flag,
    which gave the name; identity, the same at another place."""

    def __init__(self, name, flag, found, image_size, channels, flip):
        self.name, self.flag, self.given = name, flag, f'{flag} {name}'
        self.root, self.source, self.labels, self.classes, self.unlabelled = found[:5]
        self.image_size, self.channels, self.flip = image_size, channels, flip
        self.pixels, self.skipped, self.apart = None, 0, found.apart
        told = (self.source[::-(-len(self) // 16)].tobytes() if self.root is None else
                '\n'.join(found.paths or self.source).encode(errors='surrogateescape'))
        labels = [] if self.labels is None else [self.labels]
        self.identity = [len(self), zlib.crc32(told), fingerprint(labels)]

    def __len__(self):
        return len(self.source if self.pixels is None else self.pixels)

    def __getitem__(self, index):
        """uint8 (C, S, S), or (b, C, S, S) for a list. A large set serves the next readable image
        (beside the label of the one asked for) for one that is not, saying so once a process."""
        if self.pixels is not None:
            return self.pixels[index]
        if isinstance(index, list):
            return torch.stack([self[k] for k in index])
        first = range(len(self))[index]  # IndexError beyond the end
        for k in range(first, first + len(self)):
            pixels, problem, _ = self.decode(k % len(self))
            if problem is None:
                return torch.from_numpy(pixels)
            if not self.skipped:
                print(f'{self.given}: the next image replaces each that cannot be read '
                      f'(first: {problem})', file=sys.stderr)
            self.skipped += 1
        raise BadInput(f'{self.given}: no image can be read (last: {problem})')

    def class_count(self, flag='--classes'):
        """How many classes its labels are, for a flag; BadInput where they do for none."""
        if self.labels is None:
            raise BadInput(f'{flag}: {self.name} has {self.unlabelled}; give a folder with one '
                           'folder a class, or one integer an image, or leave it out')
        labels = self.labels.unique().tolist()
        without = [name for k, name in enumerate(self.classes or ()) if k not in labels]
        if len(labels) > CLASS_LIMIT or labels != list(range(len(labels))) or without:
            raise BadInput(f'{flag}: {len(labels)} labels from {labels[0]} to {labels[-1]}'
                           + f', no image of {", ".join(without)}' * bool(without)
                           + f'; accepted: 0, 1, 2, ... with none left out, at most {CLASS_LIMIT}'
                           + '; or give --no-classes' * (flag == '--classes'))
        return len(labels)

    def decode(self, k):
        """-> (uint8 array (C, S, S), None, what was lost): image k's centred square, resized; or
        (None, why not, []). Raises BadInput for a file of the user's that is smaller: enlarging it
        would blur the set."""
        image, problem = read(self.root, self.source[k])
        if image is None:
            return None, f'{self.source[k]!r}: {problem}', []
        size, side = self.image_size, min(image.size)
        if side < size and self.root is not None and self.name not in SETS:
            raise BadInput(f'{self.given}: {self.source[k]!r} is {image.width}x{image.height}; '
                           f'give an --image_size of at most {side}, not {size}')
        lost = image.info['lost'] + ['cropped to the centre square'] * (
            image.width != image.height) + [f'resized to {size} x {size}'] * (side != size) + [
            'coloured, made grey'] * (self.channels == 1 and coloured(image))
        side = min(side, 140) if self.name == 'celeba64' else side  # the crop that papers use
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.convert('L' if self.channels == 1 else 'RGB')
        image = image.crop((left, top, left + side, top + side))
        image = image.resize((size, size), Image.Resampling.BICUBIC)
        return np.array(image).reshape(size, size, -1).transpose(2, 0, 1), None, lost

    def fill(self):
        """Fills pixels, leaving out (and saying so in one line) what cannot be read; of a set too
        large for that looks at 64 images -> notes of what they lose, and of a set next to black."""
        n, size, bad, lost = len(self), self.image_size, {}, Counter()
        large = n * self.channels * size ** 2 > MEMORY_LIMIT
        some = sorted({k * n // 64 for k in range(64)}) if large else range(n)
        looked = 'looked at ' if large else ''
        pixels = np.zeros((len(some), self.channels, size, size), np.uint8)
        fit = self.root is None and (*self.source.shape, 1)[1:4] == (size, size, self.channels)
        if fit and not large:  # decode() changes nothing
            pixels[:] = self.source.reshape(n, size, size, -1).transpose(0, 3, 1, 2)
            some = []
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            # Pillow decodes without the GIL; on tiny images threads lose more by waiting for it.
            decoded = (pool.map if size >= 64 else map)(self.decode, some)
            for k, (image, problem, words) in enumerate(decoded):
                lost.update(words)
                if problem is None:
                    pixels[k] = image
                else:
                    bad[k] = problem
        if len(bad) == len(pixels):
            raise BadInput(f'{self.given}: no image {looked}can be read (first: {bad[0]})')
        if bad and not large:
            print(f'{self.given}: skipped {len(bad)} of {n} images that cannot be read '
                  f'(first: {next(iter(bad.values()))})', file=sys.stderr)
            keep = [k for k in range(n) if k not in bad]
            pixels, self.labels = pixels[keep], None if self.labels is None else self.labels[keep]
        if not large:
            self.pixels, self.source = torch.from_numpy(pixels), None
        return [f'{k} of {len(some)} images {looked}{word}' for word, k in lost.items()] + [
            f'nearly black, no value above {pixels.max()} of 255'] * bool(pixels.max() < 64)


def batches(data, indices, device='cpu', workers=0):
    """Yields uint8 (b, C, S, S) on `device` for each 1-D int64 CPU tensor of `indices`, in order. A
    small set moves to the device and stays there; `workers` processes decode a large one."""
    if data.pixels is not None:
        data.pixels = data.pixels.to(device)
        for index in indices:
            yield data.pixels[index.to(device)]
        return
    pin = torch.device(device).type == 'cuda'
    loader = torch.utils.data.DataLoader(
        data, sampler=(index.tolist() for index in indices), batch_size=None, num_workers=workers,
        pin_memory=pin, worker_init_fn=deaf, collate_fn=share,
        generator=torch.Generator())  # else its seed moves the global stream
    try:
        if workers:
            multiprocessing.Lock()  # where it cannot, the loader would say so in many lines
        for batch in loader:
            yield batch.to(device, non_blocking=pin)
    except BadInput as error:  # from a worker it comes with a traceback in its message
        raise BadInput(str(error).rpartition('BadInput: ')[2].strip()) from None
    except (RuntimeError, OSError) as error:
        if not workers or not re.search('DataLoader worker|shared memory|shm|Errno', str(error)):
            raise
        raise reader_lost(error) from error


def share(batch):
    """The batch in shared memory already in its worker, where a failure is raised: later, in the
    thread that sends it, it would only be printed, and the run would wait for ever."""
    return batch.share_memory_() if torch.utils.data.get_worker_info() else batch


def to_float(pixels):
    """uint8 -> float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


class Charges:
    """The images pixels, uint8 (K, C, H, W), as charges in [-1, 1], and behind them with `mirror`
    their mirror images: kept as they are, and made a few at a time, as the field asks for them."""

    def __init__(self, pixels, mirror=False, dtype=torch.float32):
        self.pixels, self.mirror, self.dtype, self.device = pixels, mirror, dtype, pixels.device

    def __len__(self):
        return len(self.pixels) * (1 + self.mirror)

    def __getitem__(self, index):
        """index (k,) -> (k, C, H, W) of dtype."""
        pixels = self.pixels[index % len(self.pixels)]
        if self.mirror:
            mirrored = (index >= len(self.pixels)).view(-1, 1, 1, 1)
            pixels = torch.where(mirrored, pixels.flip(-1), pixels)
        return to_float(pixels).to(self.dtype)

    def split(self, size):
        return (self[index] for index in torch.arange(len(self), device=self.device).split(size))

    def assigned(self, x, generator):
        """As many images at random as x (B, C, H, W) has, in the order in which the sum of squared
        distances to x is least: optimal transport in a batch, arXiv 2302.00482."""
        from scipy.optimize import linear_sum_assignment
        images = self[torch.randint(len(self), x.shape[:1], generator=generator, device=x.device)]
        distance = torch.cdist(x.flatten(1), images.flatten(1)).square()
        return images[torch.from_numpy(linear_sum_assignment(distance.cpu())[1]).to(x.device)]


def charges_of(images, flag, device='cpu', mirror=False, dtype=torch.float32):
    """All of the images as Charges; BadInput where they do not fit in memory."""
    if images.pixels is None:
        raise BadInput(f'{flag}: {len(images)} images of {images.name} do not fit in memory')
    images.pixels = images.pixels.to(device)
    return Charges(images.pixels, mirror, dtype)


def to_uint8(x):
    """float in [-1, 1] -> uint8, rounded; beyond the range is cut to [0, 255], all a file holds."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def mean_norm(data, n=10_000):
    """Mean Euclidean norm, a float, of up to n evenly spaced images scaled to [-1, 1]."""
    n = min(n, len(data))
    parts = (torch.arange(n) * len(data) // n).split(32)
    norms = [to_float(data[part.tolist()]).flatten(1).norm(dim=1).double().sum() for part in parts]
    return float(sum(norms)) / n


def flow_constants(images, name, sigma=0.01, tau=0.03, gamma=5.0, z_min=1e-3):
    """M, z_max, upper_norm, z_exp of a data set: the official ones of its name, or by the rule and
    z_exp = 10 gamma / sqrt(N), where |v| still tells |E| to a few per cent."""
    if name in OFFICIAL:
        flow = dict(zip(('M', 'z_max', 'upper_norm', 'z_exp'), OFFICIAL[name]))
    else:
        N, norm = images.channels * images.image_size ** 2, mean_norm(images)
        try:
            rule = pfgm.hyperparameters(norm, N, sigma, tau)
        except ValueError as error:
            raise BadInput(f'--dataset {images.name}: {error}') from error
        flow = dict(rule._asdict(), z_exp=10 * gamma / N ** 0.5)
    return dict(flow, gamma=gamma, z_min=z_min)


def grid_of(pixels, nrow=None):
    """uint8 images (n, C, H, W) as one picture, each enlarged to 64 pixels or more."""
    from torchvision.utils import make_grid
    larger = F.interpolate(pixels.cpu(), scale_factor=-(-64 // pixels.shape[-1]))
    grid = make_grid(larger, nrow or int(np.ceil(len(pixels) ** 0.5)), padding=4, pad_value=128)
    return Image.fromarray(grid.permute(1, 2, 0).numpy())


# ---------------------------------------------------------------- the images of a training step

def image_order(n, count, seed, step):
    """Endless indices (count,) of step, step + 1, ...: one shuffle of all n images an epoch."""
    def shuffled(epoch):
        generator = torch.Generator().manual_seed(step_seed(seed, 2 ** 32 + epoch))
        return torch.randperm(n, generator=generator)
    epoch, at = divmod(step * count, n)
    order = shuffled(epoch)[at:]
    while True:
        while len(order) < count:
            epoch += 1
            order = torch.cat([order, shuffled(epoch)])
        yield order[:count]
        order = order[count:]


def shuffled_images(images, count, args, step, device, rank, world):
    """Endless (x (count, C, S, S) in [-1, 1], classes or None, generator) of step, step + 1, ...,
    mirrored at random: the same on every rank, from seed and step alone."""
    indices = image_order(len(images), count, args.seed, step)
    split = images.pixels is None and world > 1
    if split:
        if count % world:
            raise BadInput(f'--field_batch {count}: must be a multiple of {world} processes')
        indices = (block.chunk(world)[rank] for block in indices)
    blocks = batches(images, indices, device, args.workers)
    orders = image_order(len(images), count, args.seed, step)
    for step, (block, order) in enumerate(zip(blocks, orders), step):
        if split:  # every rank has read only its share, and they are joined in rank order
            mine, block = block, block.new_empty(count, *block.shape[1:])
            dist.all_gather_into_tensor(block, mine)
        x = to_float(block)
        generator = torch.Generator(device).manual_seed(step_seed(args.seed, step))
        if args.flip:
            flipped = torch.rand(len(x), 1, 1, 1, generator=generator, device=device) < 0.5
            x = torch.where(flipped, x.flip(-1), x)
        yield x, images.labels[order].to(device) if args.classes else None, generator


def shuffled_pairs(pairs, args, step, device):
    """Endless (y (B, C, S, S), classes or None, generator, eps like y) of step, step + 1, ..."""
    orders = image_order(len(pairs), args.batch_size, args.seed, step)
    for step, order in enumerate(orders, step):
        rows = torch.from_numpy(np.stack([pairs[k] for k in order.tolist()]))
        eps, y = (part.to(device) for part in rows.unbind(1))
        generator = torch.Generator(device).manual_seed(step_seed(args.seed, step))
        yield y, (order % args.classes).to(device) if args.classes else None, generator, eps


def glyphs(n=10_000, image_size=16, split='train'):
    """-> (uint8 array (n, S, S), labels (n,)): the digits in turn, white on black, each under an
    affine map and stroke width of its own; the same bytes for the same arguments."""
    font, strokes, inks = ImageFont.load_default(size=96), 4, []
    for k in range(10 * strokes):
        sheet = Image.new('L', (128, 128))
        ImageDraw.Draw(sheet).text((64, 64), str(k // strokes), 255, font, 'mm',
                                   stroke_width=k % strokes)
        inks.append(np.asarray(sheet))
    inks = torch.from_numpy(np.stack(inks)).float()[:, None]
    rng, labels = np.random.default_rng(('train', 'test').index(split)), np.arange(n) % 10
    which = torch.from_numpy(labels * strokes + rng.integers(strokes, size=n))
    angle, shear, width, height, right, down = rng.uniform(
        (-.25, -.2, .7, .8, -.08, -.08), (.25, .2, 1, .96, .08, .08), (n, 6)).T
    cos, sin = np.cos(angle), np.sin(angle)  # the maps lead from the image to the sheet
    maps = np.stack([width * (cos + shear * sin), width * (shear * cos - sin), right,
                     height * sin, height * cos, down], 1).reshape(n, 2, 3)
    maps, parts = torch.from_numpy(maps).float(), []
    fine = max(1, 64 // image_size)  # drawn this much larger and averaged, against jagged edges
    for k, m in zip(which.split(500), maps.split(500)):
        grid = F.affine_grid(m, (len(m), 1, *[image_size * fine] * 2), align_corners=False)
        parts.append(F.avg_pool2d(F.grid_sample(inks[k], grid, align_corners=False), fine))
    return torch.cat(parts)[:, 0].round().to(torch.uint8).numpy(), labels
