"""A judge of images: a small classifier of a labelled data set. Samples are compared with real
images in its features. Read it if you want to know what --judge says.
"""
import itertools
import os
import zlib
from typing import NamedTuple

import torch
import torch.nn.functional as F

import pfgm
from support.batches import image_order
from support.cli import BadInput, say, watch, write, why_not_writable
from support.cpu import keep_freed_memory
from support.images import read_batches, to_float

JUDGE_STEPS = 1000
JUDGE_BATCH = 128
LEGIBLE = 0.9  # the probability of one class from which on an image counts as legible


class Judge(NamedTuple):
    net: torch.nn.Module
    real: torch.Tensor  # (n, 128) float64, the features of up to 10,000 test images
    note: str           # how well it reads those


def judge_net(channels, classes):
    """A small classifier: x (B, channels, S, S) in [-1, 1] -> logits (B, classes). All but its last
    layer gives features (B, 128)."""
    from torchvision.ops import Conv2dNormActivation  # importing torchvision takes a second
    widths = (channels, 32, 32, 64, 128, 128)
    strides = (1, 2, 1, 2, 1)
    layers = [Conv2dNormActivation(fan_in, fan_out, 3, stride)
              for fan_in, fan_out, stride in zip(widths, widths[1:], strides)]
    return torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
                               torch.nn.Linear(128, classes))


def train_judge(images, classes, device):
    """The classifier, from seed 0, after JUDGE_STEPS batches of a labelled training set."""
    keep_freed_memory()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = judge_net(images.channels, classes).to(device)
    opt = torch.optim.AdamW(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 4e-3, JUDGE_STEPS)
    endless = image_order(len(images), JUDGE_BATCH, seed=0, step=0)
    order = list(itertools.islice(endless, JUDGE_STEPS))
    batches = read_batches(images, order, device, workers=4)
    for index, batch in zip(watch(order, JUDGE_STEPS * JUDGE_BATCH, 'judge', 0), batches):
        logits = net(to_float(batch))
        F.cross_entropy(logits, images.labels[index].to(device)).backward()
        opt.step()
        schedule.step()
        opt.zero_grad(set_to_none=True)
    return net


@torch.no_grad()
def judged(net, pixels):
    """uint8 (n, C, S, S) -> (features (n, 128), probabilities (n, K)), float64, on the CPU."""
    device = next(net.parameters()).device
    with pfgm.full_float32(device):
        features = torch.cat([net[:-1](to_float(x.to(device))) for x in pixels.split(512)])
        logits = net[-1](features)
    return features.cpu().double(), logits.cpu().double().softmax(1)


def judge_of(train, test, data_dir, device):
    """The Judge of a labelled data set, whose classifier is trained once and kept in data_dir,
    under a name that tells its images and labels from all others. Where nothing can be written
    there a line says so, and it is trained each time.

    test: the images that its features are taken of; of the classes of the samples, say. Raises
    BadInput where there are no labels."""
    classes = train.class_count('--judge')
    if test.labels is None:
        raise BadInput(f'--judge: the test images of {test.name} have {test.unlabelled}; '
                       'give them labels as the training images have, or leave it out')
    mark = zlib.crc32(repr((train.identity, train.image_size, train.channels)).encode())
    path = os.path.join(data_dir, f'judge-{mark:08x}.pt')
    net = judge_net(train.channels, classes)
    try:
        net.load_state_dict(torch.load(path, map_location='cpu', weights_only=True))
        net.to(device)
    except Exception as error:  # a damaged file can fail in any way
        if os.path.exists(path):
            print(f'{path}: cannot be read ({str(error)[:80]}); it is made anew', flush=True)
        reason = why_not_kept(path)
        if reason:
            say(f'--data_dir {data_dir}: cannot be written ({reason}); the judge is not kept')
        net = train_judge(train, classes, device)
        if not reason:
            keep_judge(path, net)
    net.eval()

    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:10_000]
    real, p = judged(net, test[order.tolist()].cpu())
    right = (p.argmax(1) == test.labels[order]).double().mean()
    note = f'the judge is right on {right:.1%} of {len(real)} images of {test.name}, '
    note += f'and reads {part_legible(p):.1%}'
    return Judge(net, real, note)


def why_not_kept(path):
    """Why the file of a judge cannot be written, in words; '' where it can. Its folder is made
    where there is none."""
    try:
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    except OSError as error:
        return str(error)
    return why_not_writable(path)


def keep_judge(path, net):
    """Write the judge to a file, or say why it cannot be written: it serves this once all the same.
    """
    try:
        write('--data_dir', path, lambda file: torch.save(net.state_dict(), file))
    except BadInput as error:
        say(str(error))


def part_legible(p):
    """Which part of the rows of probabilities (n, K) gives one class LEGIBLE or more."""
    return (p.amax(1) >= LEGIBLE).double().mean().item()
