"""Distances between two sets of images, or of their features. Read it if you want to know what a
number means.

FID: arXiv 1706.08500, IS: 1606.03498, KID: 1801.01401, precision and recall: 1904.06991, sliced
Wasserstein: Bonneel et al. 2015.
"""
import math

import numpy as np
import torch

from support.images import read_batches


# ---------------------------------------------------------------- of features

def frechet(mu1, sigma1, mu2, sigma2):
    """The Frechet distance of two normal laws, |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)): a
    float, from float64 tensors (d,), (d, d), (d,), (d, d)."""
    # S1 S2 has the eigenvalues of the symmetric R S2 R with R = S1^(1/2). They are real and, but
    # for rounding, >= 0, also where S1 or S2 is singular.
    values, vectors = torch.linalg.eigh(sigma1)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    product = root @ sigma2 @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross)


def inception_score(logits, splits=10, seed=0):
    """exp(mean KL(p(y|x) || p(y))) of each split of the logits (n, K), in a random order -> (their
    mean, their std)."""
    order = torch.from_numpy(np.random.RandomState(seed).permutation(len(logits)))
    ends = [k * len(order) // splits for k in range(1, splits)]
    scores = []
    for part in order.tensor_split(ends):
        log_p = logits[part].double().log_softmax(1)
        p = log_p.exp()
        divergence = (p * log_p - torch.xlogy(p, p.mean(0))).sum(1)
        scores.append(divergence.mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def kid(x, y, device='cpu', subsets=100, size=1000, seed=0):
    """The unbiased MMD^2 of features x (n, d), y (m, d) with the kernel (x.y / d + 1)^3, on random
    subsets of `size`, or of all where there are fewer -> (mean, std over subsets, size)."""
    random = np.random.RandomState(seed)
    size = min(size, len(x), len(y))
    pairs = size * (size - 1)  # of different rows of one set
    values = []

    def subset(rows):
        chosen = random.choice(len(rows), size, replace=False)
        return rows[chosen].to(device, torch.float64)

    def kernel(s, t):
        return (s @ t.T / s.shape[1] + 1) ** 3

    for _ in range(subsets):
        a = subset(x)
        b = subset(y)
        aa = kernel(a, a)
        bb = kernel(b, b)
        within = aa.sum() - aa.trace() + bb.sum() - bb.trace()
        values.append((within / pairs - 2 * kernel(a, b).mean()).item())
    return float(np.mean(values)), float(np.std(values)), size


def precision_recall(made, real, device='cpu', k=3):
    """(which part of `made` is inside the manifold of `real`, which part of `real` is inside that
    of `made`), from features (n, d). The manifold of a set is made of balls around its points, each
    out to the k-th nearest other point."""
    made = made.to(device, torch.float64)
    real = real.to(device, torch.float64)
    radius2_made = radius2(made, k)
    radius2_real = radius2(real, k)
    made_inside = []
    real_inside = torch.zeros(len(real), dtype=torch.bool, device=device)
    for part, radius2_part in zip(made.split(256), radius2_made.split(256)):
        d2 = squared_distances(part, real)
        made_inside.append((d2 <= radius2_real).any(1))
        real_inside |= (d2 <= radius2_part[:, None]).any(0)
    return torch.cat(made_inside).double().mean().item(), real_inside.double().mean().item()


def radius2(points, k):
    """The squared distance (n,) from each of `points` to its k-th nearest other one."""
    return torch.cat([squared_distances(part, points).kthvalue(k + 1).values  # the 1st is itself
                      for part in points.split(256)])


def squared_distances(x, y):
    """The squared distances (n, m) between float64 rows x (n, d) and y (m, d); exactly 0 where they
    are equal."""
    scale = x.square().sum(1)[:, None] + y.square().sum(1)
    d2 = torch.addmm(scale, x, y.T, alpha=-2)
    return torch.where(d2 < 1e-13 * scale, 0, d2)


# ---------------------------------------------------------------- of pixels

def sliced_wasserstein(x, y, device='cpu', projections=512, seed=0):
    """The root mean square, over random directions, of the 2-Wasserstein distance along them, of
    two sets of as many uint8 images (n, C, H, W), seen as points in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(x[0].numel(), projections, dtype=torch.float64, generator=generator)
    directions = (directions / directions.norm(dim=0) / 127.5).to(device)

    def along(images):
        parts = [part.flatten(1).to(device).double() @ directions for part in images.split(2048)]
        return torch.cat(parts).sort(dim=0).values

    return (along(x) - along(y)).square().mean().sqrt().item()


def pick_images(images, n, seed, labels=None):
    """n images of a data set at random, uint8 on the CPU. labels (n,): pick as many of each class
    as there are in these, or all that there are of it. What one set is compared with should be of
    the same classes: else a part of the distance is that of the shares of the classes."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    if labels is None:
        chosen = order[:n]
    else:
        ordered = images.labels[order]
        chosen = torch.cat([order[ordered == label][:int((labels == label).sum())]
                            for label in labels.unique()])
    return images[chosen.sort().values.tolist()].cpu()


def matched(labels, *sets):
    """How many of the first of these labels (n,) can be matched by images of the same classes in
    each of the sets: a number up to n."""
    least = len(labels)
    for label in labels.unique():
        places = (labels == label).nonzero().flatten()
        there = min(int((images.labels == label).sum()) for images in sets)
        if len(places) > there:
            least = min(least, int(places[there]))
    return least


def nearest_images(x, train, device='cpu'):
    """The nearest image of a data set to each of x, uint8 (n, C, H, W); mirrored images count too
    if training mirrors them -> (distances (n,), where pixels are in [-1, 1]; those images like x).
    """
    rows = x.flatten(1).to(device, torch.float64)
    least = torch.full((len(x),), math.inf, dtype=torch.float64, device=device)
    nearest = torch.zeros_like(x, device=device)
    indices = torch.arange(len(train)).split(512)
    for batch in read_batches(train, indices, device, workers=4):
        sides = [batch]
        if train.flip:
            sides.append(batch.flip(-1))
        for side in sides:
            d2, which = squared_distances(rows, side.flatten(1).double()).min(1)
            closer = d2 < least
            least[closer] = d2[closer]
            nearest[closer] = side[which[closer]]
    return least.sqrt().cpu() / 127.5, nearest.cpu()
