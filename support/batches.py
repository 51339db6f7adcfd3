"""What a training step is given: images in the order of the steps, their labels, and images as the
charges of a field. Read it if you want to know what train.py's loop begins with: the Batch, and
training_batches(), at the end.
"""
from typing import NamedTuple, Optional

import numpy as np
import torch
import torch.distributed as dist

from pfgm import sent
from support.cli import BadInput
from support.images import move, read_batches, to_float
from support.seeds import step_seed


# ---------------------------------------------------------------- images as charges

class Charges:
    """Images as the charges of a field, in [-1, 1]. They are kept as uint8, and made float a few at
    a time, as pfgm.poisson_field() asks for them by len() and split()."""

    def __init__(self, pixels, mirror=False, dtype=torch.float32, name=None):
        self.pixels = pixels         # uint8 (n, C, H, W)
        self.mirror = mirror         # bool: whether n mirrored images follow, K = 2 n in all
        self.dtype = dtype           # of the charges
        self.name = name             # of the data set
        self.device = pixels.device

    def __len__(self):
        return 2 * len(self.pixels) if self.mirror else len(self.pixels)

    def __getitem__(self, index):
        """index int64 (k,) -> (k, C, H, W) of dtype."""
        pixels = self.pixels[index % len(self.pixels)]
        if self.mirror:
            is_mirrored = (index >= len(self.pixels)).view(-1, 1, 1, 1)
            pixels = torch.where(is_mirrored, pixels.flip(-1), pixels)
        return to_float(pixels).to(self.dtype)

    def split(self, size):
        """All of them in order, `size` at a time, like Tensor.split()."""
        return (self[index] for index in torch.arange(len(self), device=self.device).split(size))

    def assigned(self, x, generator):
        """A random image for each x (B, C, H, W), so that the sum of squared distances is as small
        as these B images allow: optimal transport in a batch, arXiv 2302.00482 -> like x."""
        from scipy.optimize import linear_sum_assignment
        images = self[torch.randint(len(self), x.shape[:1], generator=generator, device=x.device)]
        distance = torch.cdist(x.flatten(1), images.flatten(1)).square()
        _, order = linear_sum_assignment(distance.cpu())
        return images[torch.from_numpy(order).to(x.device)]


def charges_of(images, flag, device='cpu', mirror=False, dtype=torch.float32):
    """All of the Images as Charges on the device, to which they move. Raises BadInput, in the name
    of `flag`, where they do not fit in memory."""
    images.hold()
    if images.pixels is not None:
        move(images, device)
    if images.pixels is None or images.pixels.device.type != torch.device(device).type:
        raise BadInput(f'{flag}: {len(images)} images of {images.name} do not fit in memory')
    return Charges(images.pixels, mirror, dtype, images.name)


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
    """Yields the indices (count,) of step, step + 1, ... without end: one shuffle of all n images
    an epoch. A step has the same indices wherever the order begins."""
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
    """Yields (x (count, C, S, S) in [-1, 1], labels (count,) or None, generator, None) of step,
    step + 1, ... without end. The images are mirrored at random if `flip`. All of it depends on
    seed and step alone, and is the same on every rank."""
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
        labels = sent(images.labels[order], device) if labelled else None
        yield x, labels, generator, None


def shuffled_pairs(pairs, count, seed, step, classes, device):
    """Yields (y (count, C, S, S), labels (count,) or None, generator, eps like y) of step,
    step + 1, ... without end, from the pairs of students.py, whose labels are `classes` classes in
    turn."""
    orders = image_order(len(pairs), count, seed, step)
    for step, order in enumerate(orders, step):
        rows = torch.from_numpy(np.stack([pairs[k] for k in order.tolist()]))
        eps, y = sent(rows, device).unbind(1)
        generator = torch.Generator(device).manual_seed(step_seed(seed, step))
        labels = sent(order % classes, device) if classes else None
        yield y, labels, generator, eps


def images_a_step(batch_size, field_batch):
    """How many images a step reads: the charges, and among them, first, the points."""
    return batch_size if field_batch == 'all' else max(batch_size, field_batch)


def training_batches(images, batch_size, field_batch, seed, step, *, flip, classes, workers, device,
                     rank, world, source=None, pairs=None):
    """Yields the Batch of step, step + 1, ... without end. It depends on seed and step alone.

    field_batch: how many charges define the field, 'all', or 1: each image is its own. classes: how
    many classes the network is told of, 0 for none. source: Charges that are paired with the
    images, as their noise. pairs: a data set of students.pairs_of_teacher(), in place of the
    images."""
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
    for x, label, generator, eps in steps:
        clean = x[:batch_size]
        if pairs is None and field_batch not in ('all', 1):
            charges = x
            charge_labels = label
        else:
            charges = every
            charge_labels = every_label
        if source is not None and eps is None:
            eps = source.assigned(clean, generator)
        labels = among = None
        if label is not None:
            dropped = torch.rand(len(clean), generator=generator, device=device) < LABEL_DROPOUT
            labels = torch.where(dropped, -1, label[:batch_size])
            if charges is not None:
                among = (labels[:, None] == charge_labels) | (labels < 0)[:, None]
        yield Batch(clean, generator, labels, charges, among, eps)
