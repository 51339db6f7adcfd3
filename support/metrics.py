"""Distances between sets of images, Inception features, and a judge of labelled images. Read it if you
want to know what a number means.
"""
import functools
import itertools
import math
import os
import zlib
from typing import NamedTuple, Optional

import torch.nn.functional as F
import numpy as np
import torch

import pfgm
from support.cli import BadInput, say, watch, write
from support.cpu import keep_freed_memory
from support.foreign import arrays_of
from support.images import image_order, read_batches, to_float
from support.processes import first_of_its_machine

POOL = 2048  # features an image, of Inception


# ---------------------------------------------------------------- statistics

class Measured(NamedTuple):
    n: Optional[int]                  # images; None where a statistics file does not say
    mu: torch.Tensor                  # (2048,) float64
    sigma: torch.Tensor               # (2048, 2048) float64, ddof 1
    features: Optional[torch.Tensor]  # (n, 2048) float32, where asked for
    pixels: Optional[torch.Tensor]    # (n, C, H, W) uint8, where asked for


def read_stats(path, convention):
    """Measured from a statistics file, whose `pool_3` are the features (score_sde), or None for a
    .npz that is none: images."""
    try:
        names = 'mu', 'sigma', 'n', 'convention', 'pool_3'
        found = {name: read() for name, read in arrays_of(path).items() if name in names}
        n, features = int(found['n']) if 'n' in found else None, found.pop('pool_3', None)
        if features is not None and not {'mu', 'sigma'} & found.keys():
            n, features = len(features), torch.from_numpy(features).float()
            parts = [part.double() for part in features.split(4096)]
            mu = sum(part.sum(0) for part in parts) / n
            sigma = sum((part - mu).T @ (part - mu) for part in parts) / (n - 1)
            found.update(mu=mu.numpy(), sigma=sigma.numpy())
    except Exception as error:  # a damaged or hostile file can fail in any way
        raise ValueError(f'{path}: cannot be read ({error}); accepted: a folder, .zip or .npz '
                         'of images, or a .npz of mu and sigma') from error
    if not {'mu', 'sigma'} & found.keys():
        return None
    shapes = [found[k].shape if k in found else None for k in ('mu', 'sigma')]
    if shapes != [(POOL,), (POOL, POOL)] or not all(
            found[k].dtype.kind == 'f' and np.isfinite(found[k]).all() for k in ('mu', 'sigma')):
        raise ValueError(f'{path}: mu {shapes[0]}, sigma {shapes[1]}, or not finite; accepted: '
                         f'({POOL},) and ({POOL}, {POOL}), as --save_stats writes')
    if str(found.get('convention', convention)) != convention:
        raise ValueError(f'{path}: made with {found["convention"]}, not {convention}; give the '
                         'same --resize and --inception, or make it again with --save_stats')
    mu, sigma = (torch.from_numpy(found[k]).double() for k in ('mu', 'sigma'))
    return Measured(n, mu, sigma, features if torch.is_tensor(features) else None, None)

INCEPTION = 'pt_inception-2015-12-05-6726825d.pth'

URL = f'https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION}'


# ---------------------------------------------------------------- Inception features

def repool(block, pool):
    """Give the block's pooling branch pool(x) of the block's x, not torchvision's own average."""
    inputs = []
    block.register_forward_pre_hook(lambda block, x: inputs.append(x[0]))
    block.branch_pool.register_forward_pre_hook(lambda conv, x: (pool(inputs.pop()),))


def load_inception(path, device, rank=0):
    """Inception "2015-12-05": (net, weight (1008, 2048)), net(x (B, 3, 299, 299)) -> (B, 2048).
    path: of its weights, or None for torch hub's copy, downloaded once a machine if absent.

    torchvision's network with the pooling of the TensorFlow graph: averages over what lies inside
    the image and, in the last block, a maximum (a slip, it seems, but every published FID's)."""
    from torchvision.models import Inception3
    with torch.device('cpu' if path == 'random' else 'meta'):
        net = Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    if path == 'random':  # under norms that do nothing such weights keep images apart
        say('random Inception weights: the numbers mean nothing outside this run')
        generator = torch.Generator().manual_seed(0)
        for weight in (p for p in net.parameters() if p.dim() > 1):
            torch.nn.init.kaiming_normal_(weight, generator=generator)
    else:
        file = path or os.path.join(torch.hub.get_dir(), 'checkpoints', INCEPTION)
        try:
            with first_of_its_machine():
                if not path and not os.path.isfile(file):
                    os.makedirs(os.path.dirname(file), exist_ok=True)
                    torch.hub.download_url_to_file(URL, file, '6726825d', progress=rank == 0)
            net.load_state_dict(torch.load(file, 'cpu', weights_only=True), assign=True)
        except Exception as error:  # a network, a damaged or hostile file can fail in any way
            raise BadInput(f'--inception {file}: its weights cannot be loaded '
                           f'({" ".join(str(error).split())[:150]}); get {URL} by hand and put it '
                           f'at {file}, or give --inception FILE') from error
    inside = torch.nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
    for name in ('5b', '5c', '5d', '6b', '6c', '6d', '6e', '7b'):
        repool(getattr(net, f'Mixed_{name}'), inside)
    repool(net.Mixed_7c, torch.nn.MaxPool2d(3, stride=1, padding=1))
    weight, net.fc = net.fc.weight.detach().double(), torch.nn.Identity()
    return net.to(device).eval().requires_grad_(False), weight


def resize_tf1(x, size=299):
    """TensorFlow 1's resize_bilinear: output i reads the input at i * length / size, without
    half-pixel centres or antialiasing. (B, C, H, W) -> (B, C, size, size)."""
    for _ in range(2):  # along the rows, and turned along the columns
        length = x.shape[3]
        at = torch.arange(size, device=x.device, dtype=x.dtype) * (length / size)
        low = at.long()
        high = (low + 1).clamp_max(length - 1)
        x = (x[..., low] + (x[..., high] - x[..., low]) * (at - low)).mT
    return x


@torch.no_grad()
def inception_features(net, pixels, resize='tf1'):
    """uint8 (B, 1 or 3, H, W) on the device of net -> pool features (B, 2048), float32."""
    def resized(x):
        if resize == 'tf1':
            return (resize_tf1(x) - 128) / 128
        return F.interpolate(x / 255, (299, 299), mode='bilinear') * 2 - 1
    with pfgm.full_float32(pixels.device):
        return torch.cat([net(resized(x)) for x in pixels.expand(-1, 3, -1, -1).float().split(64)])


# ---------------------------------------------------------------- distances between sets

def frechet(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), of float64 tensors (d,), (d, d) -> float."""
    # S1 S2 has the eigenvalues of the symmetric R S2 R, R = S1^(1/2): real, and >= 0 but for
    # rounding, also where S1 or S2 is singular.
    values, vectors = torch.linalg.eigh(sigma1)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    product = root @ sigma2 @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross)


def inception_score(logits, splits=10, seed=0):
    """exp(mean KL(p(y|x) || p(y))) of each split of the shuffled logits (n, K) -> (mean, std)."""
    order = torch.from_numpy(np.random.RandomState(seed).permutation(len(logits)))
    scores = []
    for part in order.tensor_split([k * len(order) // splits for k in range(1, splits)]):
        log_p = logits[part].double().log_softmax(1)
        p = log_p.exp()
        scores.append((p * log_p - torch.xlogy(p, p.mean(0))).sum(1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def kid(x, y, device='cpu', subsets=100, size=1000, seed=0):
    """Unbiased MMD^2 of features x (n, d), y (m, d) with the kernel (x.y / d + 1)^3, over random
    subsets of `size`, or of all where there are fewer -> (mean, std over subsets, size)."""
    draw, size, values = np.random.RandomState(seed), min(size, len(x), len(y)), []
    for _ in range(subsets):
        a, b = (t[draw.choice(len(t), size, replace=False)].to(device, torch.float64)
                for t in (x, y))
        aa, bb, ab = ((s @ t.T / s.shape[1] + 1) ** 3 for s, t in ((a, a), (b, b), (a, b)))
        within = aa.sum() - aa.trace() + bb.sum() - bb.trace()
        values.append((within / (size * (size - 1)) - 2 * ab.mean()).item())
    return float(np.mean(values)), float(np.std(values)), size


def squared_distances(x, y):
    """Squared distances (n, m) between float64 rows; exactly 0 between equal ones."""
    scale = x.square().sum(1)[:, None] + y.square().sum(1)
    d2 = torch.addmm(scale, x, y.T, alpha=-2)
    return torch.where(d2 < 1e-13 * scale, 0, d2)


def precision_recall(made, real, device='cpu', k=3):
    """(share of `made` inside the manifold of `real`, share of `real` inside that of `made`) from
    features (n, d). A manifold: balls around all its points, each out to the k-th nearest other."""
    def inside(x, points):
        radius2 = torch.cat([squared_distances(part, points).kthvalue(k + 1).values  # the first is itself
                             for part in points.split(1024)])
        hits = [(squared_distances(part, points) <= radius2).any(1) for part in x.split(1024)]
        return torch.cat(hits).double().mean().item()
    made, real = (x.to(device, torch.float64) for x in (made, real))
    return inside(made, real), inside(real, made)


def sliced_wasserstein(x, y, device='cpu', projections=512, seed=0):
    """Root mean square, over random directions, of the 2-Wasserstein distance along them, of as
    many uint8 images x as y (n, C, H, W), in [-1, 1]."""
    ways = torch.randn(x[0].numel(), projections, dtype=torch.float64,
                       generator=torch.Generator().manual_seed(seed))
    ways = (ways / ways.norm(dim=0) / 127.5).to(device)
    a, b = (torch.cat([part.flatten(1).to(device).double() @ ways for part in images.split(2048)])
            .sort(dim=0).values for images in (x, y))
    return (a - b).square().mean().sqrt().item()


def pick_images(images, n, seed):
    """n images of a data set at random, uint8 on the CPU."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images[order[:n].sort().values.tolist()].cpu()


def nearest_images(x, train, device='cpu'):
    """The nearest image of a data set to each of x uint8, mirrored too if training mirrors:
    (distances (n,) in [-1, 1], those images like x)."""
    rows = x.flatten(1).to(device, torch.float64)
    best = torch.full((len(x),), math.inf, dtype=torch.float64, device=device)
    found = torch.zeros_like(x, device=device)
    for batch in read_batches(train, torch.arange(len(train)).split(512), device, workers=4):
        for side in (batch, batch.flip(-1)) if train.flip else (batch,):
            d2, which = squared_distances(rows, side.flatten(1).double()).min(1)
            closer = d2 < best
            best[closer], found[closer] = d2[closer], side[which[closer]]
    return best.sqrt().cpu() / 127.5, found.cpu()


# ---------------------------------------------------------------- a judge, where images have labels

JUDGE_STEPS, JUDGE_BATCH = 1000, 128


def judge_net(channels, classes):
    """A small classifier of x (B, channels, S, S) in [-1, 1]; all but its last layer: (B, 128)."""
    from torchvision.ops import Conv2dNormActivation as Conv
    widths, strides = (channels, 32, 32, 64, 128, 128), (1, 2, 1, 2, 1)
    layers = [Conv(*pair, 3, stride) for *pair, stride in zip(widths, widths[1:], strides)]
    return torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
                               torch.nn.Linear(128, classes))


def train_judge(images, classes, device):
    """The classifier after JUDGE_STEPS batches of a labelled training set, from seed 0."""
    keep_freed_memory()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = judge_net(images.channels, classes).to(device)
    opt = torch.optim.AdamW(net.parameters())
    rate = torch.optim.lr_scheduler.OneCycleLR(opt, 4e-3, JUDGE_STEPS)
    order = [*itertools.islice(image_order(len(images), JUDGE_BATCH, 0, 0), JUDGE_STEPS)]
    batches = read_batches(images, order, device, workers=4)
    for index, batch in zip(watch(order, JUDGE_STEPS * JUDGE_BATCH, 'judge', 0), batches):
        logits = net(to_float(batch))
        F.cross_entropy(logits, images.labels[index].to(device)).backward()
        opt.step()
        rate.step()
        opt.zero_grad(set_to_none=True)
    return net


@torch.no_grad()
def judged(net, pixels, device):
    """uint8 (n, C, S, S) -> features (n, 128) and probabilities (n, K), float64, on the CPU."""
    with pfgm.full_float32(device):
        found = torch.cat([net[:-1](to_float(x.to(device))) for x in pixels.split(512)])
        return found.cpu().double(), net[-1](found).cpu().double().softmax(1)


@functools.cache
def judge_of(train, test, data_dir, device):
    """(the classifier of a labelled data set, kept in data_dir; the features of up to 10,000 of its
    test images; a line on how well it reads them). BadInput where there are no labels."""
    classes = train.class_count('--judge')
    if test.labels is None:
        raise BadInput(f'--judge: the test images of {test.name} have {test.unlabelled}; give them '
                       'labels as the training images have, or leave it out')
    mark = zlib.crc32(repr((train.identity, train.image_size, train.channels)).encode())
    path, net = os.path.join(data_dir, f'judge-{mark:08x}.pt'), judge_net(train.channels, classes)
    try:
        net.load_state_dict(torch.load(path, map_location='cpu', weights_only=True))
        net.to(device)
    except Exception as error:  # a damaged file can fail in any way
        if os.path.exists(path):
            print(f'{path}: cannot be read ({str(error)[:80]}); it is made anew', flush=True)
        net = train_judge(train, classes, device)
        os.makedirs(data_dir, exist_ok=True)
        write('--data_dir', path, lambda file: torch.save(net.state_dict(), file))
    net.eval()
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:10_000]
    real, p = judged(net, test[order.tolist()].cpu(), device)
    right = (p.argmax(1) == test.labels[order]).double().mean()
    note = f'the judge is right on {right:.1%} of {len(real)} images of {test.name}, and reads '
    return net, real, note + f'{(p.amax(1) >= 0.9).double().mean():.1%}'


def of_judge(made, ref, args, home):
    """The metric: the Frechet distance to the test images in the judge's features, that of as many
    training images, the share of samples that it gives 0.9 to one class, precision and recall."""
    net, real, note = judge_of(ref.train, ref.test or ref.train, args.data_dir, home)
    found, p = judged(net, made.pixels, home)
    train, _ = judged(net, pick_images(ref.train, made.n, args.seed), home)
    distance, of_real = (frechet(x.mean(0), x.T.cov(), real.mean(0), real.T.cov())
                         for x in (found, train))
    inside = precision_recall(found, real, home)
    yield f'{made.n} images; {note}', dict(
        judge_fd=distance, judge_fd_of_real=of_real, judge_precision=inside[0],
        judge_recall=inside[1], legible=(p.amax(1) >= 0.9).double().mean().item())
