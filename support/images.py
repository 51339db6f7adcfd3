"""Images as tensors: decoding, batches, their order, and images as charges. Read it if you want to know
what a training step is given.
"""
import io
import multiprocessing
import os
import re
import sys
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Optional

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps

from support.cli import BadInput, CLASS_LIMIT
from support.foreign import read_bytes
from support.processes import deaf, reader_lost
from support.seeds import fingerprint, step_seed

FORMATS = 'PNG JPEG WEBP BMP GIF TIFF PPM'.split()  # not EPS, for which Pillow runs Ghostscript

MEMORY_LIMIT = 2 << 30  # bytes of decoded pixels; a larger set is decoded at each access instead


def probe(root, source, channels):
    """-> (shorter side of the first readable image, channels or 1 if all are grey, else 3, whether
    that is 3), as in SETS."""
    found = [read_image(root, source[k]) for k in sorted({k * len(source) // 64 for k in range(64)})]
    images = [image for image, _ in found if image]
    if not images:
        raise ValueError(f'none of {len(found)} images can be read ({source[0]!r}: {found[0][1]})')
    grey = not channels and not any(map(coloured, images)) and not any(
        coloured(read_image(root, entry, whole=False)[0]) for entry in source)
    channels = channels or (1 if grey else 3)
    return min(images[0].size), channels, channels == 3


def coloured(image):
    return bool(image and image.mode == 'RGB' and np.ptp(np.asarray(image), axis=2).any())


def read_image(root, entry, whole=True):
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

    def __init__(self, name, flag, found, image_size, channels, flip, is_known_set=False):
        self.is_known_set = is_known_set
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
        image, problem = read_image(self.root, self.source[k])
        if image is None:
            return None, f'{self.source[k]!r}: {problem}', []
        size, side = self.image_size, min(image.size)
        if side < size and self.root is not None and not self.is_known_set:
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


def read_batches(data, indices, device='cpu', workers=0):
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
        pin_memory=pin, worker_init_fn=deaf, collate_fn=to_shared_memory,
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


def to_shared_memory(batch):
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


# ---------------------------------------------------------------- the images of a training step

LABEL_DROPOUT = 0.1  # the share of images whose label a network does not see, for guidance


class Batch(NamedTuple):
    """What a training step is given. B points over all processes, K charges."""
    clean: torch.Tensor               # (B, C, S, S) in [-1, 1], the images that are moved
    generator: torch.Generator        # of all that is drawn in this step, the same on every rank
    labels: Optional[torch.Tensor]    # (B,) classes of `clean`, -1 where it is not to be seen
    charges: object                   # (K, C, S, S) or Charges; None: each image is its own charge
    among: Optional[torch.Tensor]     # (B, K) bool, which charges are of the class of each point
    eps: Optional[torch.Tensor]       # (B, C, S, S), the noise of `clean` where it is given


def image_order(n, count, seed, step):
    """Endless indices (count,) of step, step + 1, ...: one shuffle of all n images an epoch."""
    def shuffled(epoch):
        generator = torch.Generator().manual_seed(step_seed(seed, 2 ** 32 + epoch))
        return torch.randperm(n, generator=generator)

    epoch, start = divmod(step * count, n)
    order = shuffled(epoch)[start:]
    while True:
        while len(order) < count:
            epoch += 1
            order = torch.cat([order, shuffled(epoch)])
        yield order[:count]
        order = order[count:]


def shuffled_images(images, count, seed, step, flip, labelled, workers, device, rank, world):
    """Endless (x (count, C, S, S) in [-1, 1], labels (count,) or None, generator) of step,
    step + 1, ..., mirrored at random if `flip`: the same on every rank, from seed and step alone.
    """
    indices = image_order(len(images), count, seed, step)
    split = images.pixels is None and world > 1  # each rank decodes a share of a large set
    if split:
        if count % world:
            raise BadInput(f'--field_batch {count}: must be a multiple of {world} processes')
        indices = (block.chunk(world)[rank] for block in indices)
    blocks = read_batches(images, indices, device, workers)
    orders = image_order(len(images), count, seed, step)
    for step, (block, order) in enumerate(zip(blocks, orders), step):
        if split:  # the shares are joined in rank order
            mine = block
            block = mine.new_empty(count, *mine.shape[1:])
            dist.all_gather_into_tensor(block, mine)
        x = to_float(block)
        generator = torch.Generator(device).manual_seed(step_seed(seed, step))
        if flip:
            flipped = torch.rand(len(x), 1, 1, 1, generator=generator, device=device) < 0.5
            x = torch.where(flipped, x.flip(-1), x)
        yield x, images.labels[order].to(device) if labelled else None, generator


def shuffled_pairs(pairs, count, seed, step, classes, device):
    """Endless (y (count, C, S, S), labels (count,) or None, generator, eps like y) of step,
    step + 1, ..., from the pairs of students.py, whose labels are `classes` classes in turn."""
    orders = image_order(len(pairs), count, seed, step)
    for step, order in enumerate(orders, step):
        rows = torch.from_numpy(np.stack([pairs[k] for k in order.tolist()]))
        eps, y = (part.to(device) for part in rows.unbind(1))
        generator = torch.Generator(device).manual_seed(step_seed(seed, step))
        yield y, (order % classes).to(device) if classes else None, generator, eps


def images_a_step(batch_size, field_batch):
    """How many images a step reads: the charges, and among them, first, the points."""
    return batch_size if field_batch == 'all' else max(batch_size, field_batch)


def training_batches(images, batch_size, field_batch, seed, step, *, flip, classes, workers, device,
                     rank, world, source=None, pairs=None):
    """An endless Batch of step, step + 1, ..., from seed and step alone.

    field_batch: how many charges define the field, 'all', or 1: each image is its own. classes: how
    many the network is told of, 0 for none. source: Charges that are paired with the images, as
    their noise. pairs: a data set of pairs_of_teacher(), in place of the images."""
    every = None  # the charges of every step, and their labels
    every_label = None
    if pairs is not None:
        steps = shuffled_pairs(pairs, batch_size, seed, step, classes, device)
    else:
        if field_batch == 'all':
            every = charges_of(images, '--field_batch all', device, flip)
            if classes:
                every_label = images.labels.to(device).repeat(1 + flip)
        count = images_a_step(batch_size, field_batch)
        steps = shuffled_images(images, count, seed, step, flip, bool(classes), workers, device,
                                rank, world)
    for x, label, generator, *eps in steps:
        clean = x[:batch_size]
        eps = eps[0] if eps else None
        charges, charge_labels = every, every_label
        if pairs is None and field_batch not in ('all', 1):
            charges, charge_labels = x, label
        if source is not None and eps is None:
            eps = source.assigned(clean, generator)
        labels = among = None
        if label is not None:
            dropped = torch.rand(len(clean), generator=generator, device=device) < LABEL_DROPOUT
            labels = torch.where(dropped, -1, label[:batch_size])
            if charges is not None:
                among = (labels[:, None] == charge_labels) | (labels < 0)[:, None]
        yield Batch(clean, generator, labels, charges, among, eps)
