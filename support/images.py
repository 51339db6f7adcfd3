"""Images as tensors: how a file is decoded, a data set of them, and how it is read. You need not
read it to understand the method; what a training step is given is in support/batches.py.
"""
import copy
import hashlib
import io
import math
import multiprocessing
import os
import re
import sys
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Optional

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from pfgm import sent
from support.cli import BadInput, CLASS_LIMIT, listed, own_rank, say, watch
from support.foreign import read_bytes
from support.processes import (deaf, everywhere, free_gpu_memory, free_memory, ranks_here,
                               reader_lost, share_of_rank)
from support.seeds import fingerprint

FORMATS = 'PNG JPEG WEBP BMP GIF TIFF PPM'.split()  # not EPS, for which Pillow runs Ghostscript

MEMORY_LIMIT = 2 << 30  # bytes of decoded pixels; a larger set is decoded at each access, unless
                        # hold() finds that there is memory for it


# ---------------------------------------------------------------- one image

class Unreadable(Exception):
    """An image cannot be decoded. The message says why."""


class Picture(NamedTuple):
    """An image as read_image() returns it."""
    image: Image.Image  # of mode L or RGB
    size: tuple         # its (width, height), or that before it was reduced
    lost: list          # what it lost on the way, in words


def open_image(root, entry):
    """A PIL image that is not decoded yet. root and entry: as in foreign.RawSet; an entry is the
    name of a file in root or, where root is None, the pixels themselves."""
    if root is None:
        return Image.fromarray(entry)
    return Image.open(io.BytesIO(read_bytes(root, entry)), formats=FORMATS)


def read_image(root, entry, least=None):
    """Decode an image -> Picture. Raises Unreadable.

    least: as of reduce()."""
    try:
        image = open_image(root, entry)
        size = image.size
        if image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8):  # turned by a quarter
            size = size[::-1]
        reduce(image, least)
        image, lost = simplified(image)
    except Exception as error:  # Pillow's plugins raise almost anything on a broken file
        raise Unreadable(repr(error)) from error
    return Picture(image, size, lost)


def reduce(image, least):
    """Let a JPEG that is not decoded yet be decoded at a half, a quarter or an eighth of its size,
    but with `least` pixels a side or more, or None for all of them. Of a large photograph that
    takes a fraction of the time. Images of other formats stay as they are."""
    if least is not None:
        image.draft(None, (least, least))


def simplified(image):
    """A PIL image of any kind as one of mode L or RGB: its first frame, turned as its EXIF says,
    transparency on white, 16 bits scaled to 8. -> (the image, what it lost, in words)."""
    lost = []
    if getattr(image, 'is_animated', False):  # an attribute of some formats only
        lost.append('of several frames, the first taken')
    ImageOps.exif_transpose(image, in_place=True)
    if is_deep(image):  # convert() would clip these at 255
        values = np.asarray(image)
        if image.mode == 'F' or values.min() < 0 or values.max() > 65535:
            raise ValueError(f'mode {image.mode}; accepted: 8 or 16 bits a channel')
        image = Image.fromarray(np.rint(values / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert('RGBA')
        least_alpha = image.getextrema()[3][0]
        if least_alpha < 255:
            lost.append('transparent, put on white')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image.convert('L' if image.mode in ('1', 'L') else 'RGB'), lost


def is_deep(image):
    """Whether the mode of a PIL image is one of more than 8 bits, all of which are grey."""
    return image.mode[0] in 'IF'


def has_colour(image):
    """Whether any pixel of an image that read_image() returned is not grey."""
    return image.mode == 'RGB' and bool(np.ptp(np.asarray(image), axis=2).any())


def entry_has_colour(root, entry, least=None):
    """Whether an image has colour. One of a grey mode need not be decoded to tell, and one that
    cannot be read has none. least: as of read_image()."""
    try:
        image = open_image(root, entry)
        if image.mode in ('1', 'L', 'LA') or is_deep(image):
            return False
        reduce(image, least)
        return has_colour(simplified(image)[0])
    except Exception:  # as in read_image()
        return False


def centre_square(image, size, *, whole_size=None, side=None, resample=Image.Resampling.BICUBIC):
    """The centred square of a PIL image, `side` pixels wide or as large as it can be, resized to
    size x size pixels. whole_size: (width, height) of the image before reduce(); side is in its
    pixels."""
    width, height = whole_size or image.size
    side = side or min(width, height)
    left = (width - side) // 2
    top = (height - side) // 2
    box = (left, top, left + side, top + side)
    factor = round(width / image.width)
    if factor == 1:
        return image.crop(box).resize((size, size), resample)
    return image.resize((size, size), resample, [edge / factor for edge in box])


def evenly_spaced(n, count=64):
    """Up to `count` different indices, in order, over n images."""
    return sorted({k * n // count for k in range(count)})


def in_parts(function, items, threads):
    """Yields [function(item) for item in part] for each part of the items, in order. threads:
    whether several threads share a part."""
    parts = [items[first:first + 64] for first in range(0, len(items), 64)]
    if not threads:
        for part in parts:
            yield list(map(function, part))
        return
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for part in parts:
            yield list(pool.map(function, part))


def threads_help(size):
    """Whether several threads decode images of this (width, height) faster than one does. Pillow
    decodes without the GIL, but on tinier images threads lose more by waiting for it."""
    return min(size) >= 64


def probe(root, entries, channels=None, least=None):
    """The size and channels that fit a set: (shorter side of its first readable image, channels).
    channels None: 1 if all images are grey, else 3. least: as of read_image(). Raises ValueError
    where none of 64 images can be read."""
    pictures = []
    problems = []
    for k in evenly_spaced(len(entries)):
        try:
            pictures.append(read_image(root, entries[k], least))
        except Unreadable as error:
            problems.append(str(error))
    if not pictures:
        raise ValueError(f'none of {len(problems)} images can be read '
                         f'({entries[0]!r}: {problems[0]})')
    size = pictures[0].size
    if channels is None:  # most sets in colour show it in these, without a look at all of them
        channels = 1
        if any(has_colour(picture.image) for picture in pictures):
            channels = 3
        elif root is not None or entries.ndim == 4:  # other arrays are grey
            parts = in_parts(lambda entry: entry_has_colour(root, entry, least), entries,
                             threads_help(size))
            if any(map(any, watch(parts, len(entries), 'looked for colour', own_rank(),
                                  briefly=True))):
                channels = 3
    return min(size), channels


# ---------------------------------------------------------------- a set of images

class Decoded(NamedTuple):
    """An image as Images.decode() returns it."""
    pixels: Optional[np.ndarray]  # uint8 (C, S, S); None where it cannot be read
    problem: str                  # why it cannot be read
    changes: list                 # what was done to it beyond decoding, in words


class Images(torch.utils.data.Dataset):
    """A data set: n images of S x S pixels and C channels, each with a label or none.

        len(images)        n
        images[k]          image k: uint8 (C, S, S)
        images[[k, ...]]   several: uint8 (b, C, S, S)
        images.labels      their classes: int64 (n,), or None

    fill() decodes all of them into `pixels`, (n, C, S, S). The images of a set of more than
    MEMORY_LIMIT are decoded at each access, and its `pixels` are None until hold() decodes all of
    them, too. Training takes its batches from training_batches(), and everything else from
    read_batches(). sets.load_images() makes it.
    """

    def __init__(self, name, flag, raw, image_size, channels, flip, is_known_set=False,
                 size_is_fixed=False):
        """raw: the foreign.RawSet of its files or arrays. size_is_fixed: whether image_size is that
        of a network or of other images, which no --image_size changes."""
        self.name = name                  # str: a name in sets.SETS, or the path of a user's set
        self.flag = flag                  # str: the flag that gave it, such as --dataset
        self.given = f'{flag} {name}'     # str: with which messages to the user begin
        self.is_known_set = is_known_set  # bool: whether `name` is one in sets.SETS. These may be
                                          # enlarged, and a line says so; a user's own may not
        self.size_is_fixed = size_is_fixed
        self.image_size = image_size      # int: S
        self.channels = channels          # int: C, 1 for grey and 3 for colour
        self.flip = flip                  # bool: whether to mirror half of them in training, where
                                          # neither --flip nor their labels say otherwise
        self.pixels = None                # uint8 (n, C, S, S), or None: decoded at each access
        self.labels = raw.labels          # int64 (n,), or None
        self.classes = raw.classes        # list of str, the name of each class, or None
        self.unlabelled = raw.unlabelled  # str: what there is instead, where labels are None
        self.apart = raw.apart            # bool: of a test split, see foreign.RawSet
        self.root = raw.root              # str or None: where the files of entries are
        self.entries = raw.entries        # names of files or uint8 array, see foreign.RawSet; None
                                          # once all are decoded
        self.skipped = 0                  # int: how many accesses met an image that was broken

        self.paths = raw.paths            # names of the entries where the set is moved or zipped,
                                          # see foreign.RawSet; None once it is identified
        self.identity = None              # three numbers that tell it from other sets, see identify

    def __len__(self):
        return len(self.entries if self.pixels is None else self.pixels)

    def __getitem__(self, index):
        """uint8 (C, S, S), or (b, C, S, S) for a list of indices.

        Where an image of a large set cannot be read, the next one that can is served in its place
        (with the label of the one that was asked for), and a line on stderr says so, once a
        process."""
        if self.pixels is not None:
            return self.pixels[index]
        if isinstance(index, list):
            if self.is_as_wanted():
                return torch.from_numpy(self.rows(index))
            return torch.stack([self[k] for k in index])
        first = range(len(self))[index]  # IndexError beyond the end, which ends an iteration
        for k in range(first, first + len(self)):
            decoded = self.decode(k % len(self))
            if decoded.pixels is not None:
                return torch.from_numpy(decoded.pixels)
            if not self.skipped:
                print(f'{self.given}: the next image replaces each that cannot be read '
                      f'(first: {decoded.problem})', file=sys.stderr)
            self.skipped += 1
        raise BadInput(f'{self.given}: no image can be read (last: {decoded.problem})')

    def classes_in_words(self):
        """How many classes there are, and their names."""
        line = f'{len(self.labels.unique())} classes found'
        if self.classes:
            line += f' ({listed(self.classes)[:500]})'
        return line

    def class_count(self, flag='--classes'):
        """How many classes the labels are. Raises BadInput in the name of `flag`, which wants them,
        where there are no labels, or other than 0, 1, 2, ... with none left out."""
        if self.labels is None:
            raise BadInput(f'{flag}: {self.name} has {self.unlabelled}; give a folder with one '
                           'folder a class, or one integer an image, or leave it out')
        labels = self.labels.unique().tolist()
        empty = [name for k, name in enumerate(self.classes or ()) if k not in labels]
        counts_up = labels == list(range(len(labels)))
        if not counts_up or empty or len(labels) > CLASS_LIMIT:
            problem = f'{flag}: {len(labels)} labels from {labels[0]} to {labels[-1]}'
            if empty:
                problem += f', no image of {listed(empty)}'
            mend = f'accepted: 0, 1, 2, ... with none left out, at most {CLASS_LIMIT}'
            if flag == '--classes':
                mend += '; or give --no-classes'
            raise BadInput(f'{problem}; {mend}')
        return len(labels)

    def decode(self, k):
        """Image k as Decoded: its centred square, resized. Raises BadInput for one of a user's own
        that is smaller than image_size: enlarging it would blur the set."""
        entry = self.entries[k]
        size = self.image_size
        least = 2 * size  # what is resized from twice its size is as good as from more
        if self.name == 'celeba64':
            least = None  # of which a part is cropped
        try:
            image, whole_size, lost = read_image(self.root, entry, least)
        except Unreadable as error:
            return Decoded(None, f'{self.file(k)}: {error}', [])
        width, height = whole_size
        side = min(whole_size)
        if self.name == 'celeba64':  # the crop that papers use
            side = min(side, 140)
        if side < size and not self.is_known_set:
            mend = f'give an --image_size of at most {side}, not {size}'
            if self.size_is_fixed:
                mend = f'it is not enlarged; give one of {size} pixels a side or more'
            raise BadInput(f'{self.given}: {self.file(k)} is {width}x{height}; {mend}')
        changes = list(lost)
        if width != height:
            changes.append('cropped to the centre square')
        if side < size:
            changes.append(f'enlarged to {size} x {size}')
        elif side > size:
            changes.append(f'resized to {size} x {size}')
        if self.channels == 1 and has_colour(image):
            changes.append('coloured, made grey')
        image = image.convert('L' if self.channels == 1 else 'RGB')
        image = centre_square(image, size, whole_size=whole_size, side=side)
        pixels = np.array(image).reshape(size, size, -1).transpose(2, 0, 1)
        return Decoded(pixels, '', changes)

    def file(self, k):
        """Image k in words: its file, or its number in an array."""
        if self.root is None:
            return f'image {k}'
        return repr(self.entries[k])

    def decode_many(self, indices):
        """Yields [decode(k) for k in part] for each part of the indices, in order."""
        size = (self.image_size, self.image_size)
        if self.root is not None:
            try:
                size = open_image(self.root, self.entries[0]).size
            except Exception:  # as in read_image()
                pass
        return in_parts(self.decode, indices, threads_help(size))

    def fill(self):
        """Decode all images into `pixels`. Of a set that is too large for memory 64 are looked at.

        Those that cannot be read are left out, and a line on stderr says so. Returns what else the
        user should be told of the images, in words. Raises BadInput where none can be read, or one
        of the user's own is smaller than image_size."""
        n = len(self)
        size = self.image_size
        is_large = n * self.channels * size ** 2 > MEMORY_LIMIT
        indices = evenly_spaced(n) if is_large else range(n)
        pixels = np.zeros((len(indices), self.channels, size, size), np.uint8)
        problems = {}  # by row of pixels
        changes = Counter()
        if self.is_as_wanted():
            for first in range(0, len(indices), 1024):
                pixels[first:first + 1024] = self.rows(indices[first:first + 1024])
        else:
            row = 0
            parts = self.decode_many(indices)
            for part in watch(parts, len(indices), f'{self.given}: decoded', own_rank(),
                              briefly=True):
                for decoded in part:
                    changes.update(decoded.changes)
                    if decoded.pixels is None:
                        problems[row] = decoded.problem
                    else:
                        pixels[row] = decoded.pixels
                    row += 1

        looked = 'looked at ' if is_large else ''
        if len(problems) == len(pixels):
            raise BadInput(f'{self.given}: no image {looked}can be read (first: {problems[0]})')
        if problems and not is_large:
            first = next(iter(problems.values()))
            print(f'{self.given}: skipped {len(problems)} of {n} images that cannot be read '
                  f'(first: {first})', file=sys.stderr)
            kept = [row for row in range(n) if row not in problems]
            pixels = pixels[kept]
            if self.labels is not None:
                self.labels = self.labels[kept]
        if not is_large:
            self.pixels = torch.from_numpy(pixels)
            self.entries = None
        notes = [f'{count} of {len(indices)} images {looked}{change}'
                 for change, count in changes.items()]
        if pixels.max() < 64:
            notes.append(f'nearly black, no value above {pixels.max()} of 255')
        self.identify(pixels)
        return notes

    def hold(self):
        """Decode a set of more than MEMORY_LIMIT into `pixels` too, as it is served otherwise: the
        next image replaces each that cannot be read. Where the processes of this machine would take
        more than half of its free memory for it, a line says so, and nothing is done.

        All processes must call it: they decide together."""
        if self.pixels is not None:
            return
        shape = (len(self), self.channels, self.image_size, self.image_size)
        size = math.prod(shape) * ranks_here()
        free = min(everywhere(free_memory()))
        if size > free / 2:
            say(f'{self.given}: read from disk in each step, since {size / 2 ** 30:.3g} GB of '
                f'pixels are more than half of the free memory, {free / 2 ** 30:.3g} GB')
            return
        pixels = np.empty(shape, np.uint8)
        broken = []
        if self.is_as_wanted():
            parts = (range(len(self))[first:first + 1024] for first in range(0, len(self), 1024))
            for part in parts:
                pixels[part.start:part.stop] = self.rows(part)
        else:
            parts = self.decode_many(range(len(self)))
            row = 0
            for part in watch(parts, len(self), f'{self.given}: decoded', own_rank(),
                              briefly=True):
                for decoded in part:
                    if decoded.pixels is None:
                        broken.append((row, decoded.problem))
                    else:
                        pixels[row] = decoded.pixels
                    row += 1
        if broken:
            print(f'{self.given}: the next image replaces each of {len(broken)} that cannot be '
                  f'read (first: {broken[0][1]})', file=sys.stderr)
        for row, _ in 2 * broken[::-1]:  # twice, for the first images may replace the last
            pixels[row] = pixels[(row + 1) % len(pixels)]
        self.pixels = torch.from_numpy(pixels)
        self.entries = None

    def rows(self, indices):
        """uint8 (b, C, S, S), the images `indices` of an array that is_as_wanted(), without a
        decoder."""
        size = self.image_size
        rows = self.entries[np.asarray(indices)].reshape(len(indices), size, size, -1)
        return np.ascontiguousarray(rows.transpose(0, 3, 1, 2))

    def identify(self, pixels):
        """Set `identity`, from the pixels (., C, S, S) that were decoded. It is kept in
        checkpoints, and stays the same where a set is moved or zipped: how many images there are, a
        CRC-32 of their labels and the names of their classes, and 64 bits of a SHA-256 of all their
        pixels.

        To decode all of a set that is too large for memory would take hours. There the hash is that
        of the names of all images, of the sizes of their files, and of the pixels of 64 of them: it
        does not see a change of another image that keeps the size of its file."""
        digest = hashlib.sha256(pixels)
        if self.pixels is None:
            digest.update('\n'.join(self.names_and_sizes()).encode(errors='surrogateescape'))
        labels = [] if self.labels is None else [self.labels]
        classes = '\n'.join(self.classes or ()).encode(errors='surrogateescape')
        self.identity = [len(self), zlib.crc32(classes, fingerprint(labels)),
                         int.from_bytes(digest.digest()[:8], 'big')]
        self.paths = None

    def names_and_sizes(self):
        """Yields a line for each image of a large set, with its name and how many bytes its file
        has. An array has neither."""
        if self.root is None:
            return
        names = self.paths or self.entries
        if os.path.isdir(self.root):
            for name, entry in zip(names, self.entries):
                path = os.path.join(self.root, entry)
                yield f'{name} {os.path.getsize(path) if os.path.isfile(path) else 0}'
        else:
            with zipfile.ZipFile(self.root) as archive:
                for name, entry in zip(names, self.entries):
                    yield f'{name} {archive.getinfo(entry).file_size}'

    def difference(self, identity, shape, labelled, classes):
        """How these images differ from those that a network was trained on, in words; '' where they
        are the same as far as the identities tell, or where there is none to compare with.

        identity, shape (C, S, S), classes: of those images, as its checkpoint keeps them. labelled:
        whether it was trained with their labels, which do not matter otherwise. Pixels are compared
        where both sets were decoded at one size."""
        if not identity:  # the authors' files do not say
            return ''
        count, labels, pixels = identity
        if count != self.identity[0]:
            return f'{count} images there, {self.identity[0]} here'
        if labelled and labels != self.identity[1]:
            if classes and self.classes and classes != self.classes:
                return f'classes {", ".join(classes)} there, {", ".join(self.classes)} here'
            return 'other labels'
        same_size = tuple(shape) == (self.channels, self.image_size, self.image_size)
        if same_size and pixels != self.identity[2]:
            return 'as many images, with other pixels'
        return ''

    def of_labels(self, labels):
        """These images without those of other labels than the list `labels`: an Images, whose
        `identity` is still that of the whole set."""
        kept = torch.isin(self.labels, torch.tensor(labels)).nonzero().flatten()
        part = copy.copy(self)
        part.labels = self.labels[kept]
        if self.pixels is not None:
            part.pixels = self.pixels[kept.to(self.pixels.device)]
        elif self.root is None:
            part.entries = self.entries[kept.numpy()]
        else:
            part.entries = [self.entries[k] for k in kept.tolist()]
        return part

    def is_as_wanted(self):
        """Whether the entries are an array of the wanted size and channels, which decode() would
        leave as it is."""
        if self.root is not None:
            return False
        shape = self.entries.shape[1:]
        if len(shape) == 2:
            shape = (*shape, 1)
        return shape == (self.image_size, self.image_size, self.channels)


# ---------------------------------------------------------------- reading a set

def move(images, device):
    """Let the pixels of Images that are in memory go to the device and stay there, but for those
    that would take more than half of what a GPU has free."""
    device = torch.device(device)
    size = images.pixels.numel()
    if images.pixels.device.type == 'cpu' and device.type == 'cuda' and size > MEMORY_LIMIT:
        if size > free_gpu_memory(device) / 2:
            return
    images.pixels = images.pixels.to(device)


def read_batches(images, indices, device='cpu', workers=0):
    """Yields uint8 (b, C, S, S) on `device` for each 1-D int64 CPU tensor of `indices`, in order.

    A set that is in memory moves to the device and stays there, if it fits. A large one is decoded
    by `workers` processes, or in this one if there are 0. Raises BadInput as Images.decode() does,
    and where such a process ends."""
    if images.pixels is not None:
        move(images, device)
        place = images.pixels.device
        for index in indices:
            yield sent(images.pixels[sent(index, place)], device)
        return
    pin = torch.device(device).type == 'cuda'
    loader = torch.utils.data.DataLoader(
        images, sampler=(index.tolist() for index in indices), batch_size=None, num_workers=workers,
        pin_memory=pin, worker_init_fn=deaf, collate_fn=to_shared_memory,
        generator=torch.Generator())  # without one, its seed would be drawn from the global stream
    try:
        if workers:
            multiprocessing.Lock()  # where it cannot, the loader would say so in many lines
        for batch in loader:
            yield batch.to(device, non_blocking=pin)
    except BadInput as error:
        # Raised in a worker, its message comes with a traceback before it.
        message = str(error).rpartition('BadInput: ')[2].strip()
        raise BadInput(message) from None
    except (RuntimeError, OSError) as error:
        if not workers or not re.search('DataLoader worker|shared memory|shm|Errno', str(error)):
            raise
        raise reader_lost(error) from error


def chosen_indices(n, of):
    """n different numbers below `of`, in order, always the same: int64 (n,). They are random, since
    every tenth image of a set whose classes come in turn would be of one class."""
    if n >= of:
        return torch.arange(of)
    return torch.randperm(of, generator=torch.Generator().manual_seed(0))[:n].sort().values


def part_of_rank(indices, rank, world):
    """This rank's share of a tensor of indices."""
    share = share_of_rank(len(indices), rank, world)
    return indices[share.start:share.stop]


def read_chosen(images, n, machine, label):
    """Yields this rank's share of n images of a data set, those of chosen_indices(), uint8
    (b, C, S, S) a batch. label: the first words of the line that says how far it has come."""
    indices = part_of_rank(chosen_indices(n, len(images)), machine.rank, machine.world)
    batches = read_batches(images, indices.split(machine.batch_size), machine.device,
                           machine.workers)
    return watch(batches, len(indices), label, machine.rank)


def to_shared_memory(batch):
    """The batch, moved to shared memory already in the worker that read it, where a failure is
    raised. Later, in the thread that sends it, a failure would only be printed, and the run would
    wait for ever."""
    if torch.utils.data.get_worker_info() is None:
        return batch
    return batch.share_memory_()


GREY_LEVEL = 1 / 128  # in [-1, 1], the distance of two of the 256 levels, dequantised


def to_float(pixels):
    """uint8 -> float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_uint8(x):
    """Float in [-1, 1] -> uint8, rounded. What lies beyond is clipped: a file holds [0, 255]."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def mean_norm(images, n=10_000):
    """The mean Euclidean norm, a float, of up to n evenly spaced images scaled to [-1, 1]."""
    n = min(n, len(images))
    total = 0.0
    for part in (torch.arange(n) * len(images) // n).split(32):
        total += to_float(images[part.tolist()]).flatten(1).norm(dim=1).double().sum()
    return float(total) / n
