"""The metrics of evaluate.py: what each needs, and its number from samples and a reference. Read
it if you want to know what a number is computed from, or to add a metric of your own.
"""
from typing import Callable, NamedTuple, Optional

import torch
from PIL import Image

from support.cli import BadInput
from support.inception import POOL
from support.judge import judged, part_legible
from support.metrics import (frechet, inception_score, kid, matched, nearest_images, pick_images,
                             precision_recall, sliced_wasserstein)
from support.pictures import grid_of


class Result(NamedTuple):
    values: dict                            # {name: number}
    note: str                               # of what they are
    picture: Optional[Image.Image] = None   # for --out


# ---------------------------------------------------------------- metrics of samples

# Each takes samples (inception.Measured), a reference.Reference, the device where float64 is, and
# the seed, and yields one Result or several.

def of_fid(samples, reference, device, seed):
    real = reference.statistics
    distance = frechet(samples.mu.to(device), samples.sigma.to(device),
                       real.mu.to(device), real.sigma.to(device))
    yield Result(dict(fid=distance), f'{reference.against(samples)}, {reference.resize} resize')


def of_is(samples, reference, device, seed):
    weight = reference.last_layer
    logits = torch.cat([part.double() @ weight.T for part in samples.features.split(4096)])
    mean, std = inception_score(logits, seed=seed)
    yield Result({'is': mean, 'is_std': std}, f'{samples.n} images, 10 splits')


def of_kid(samples, reference, device, seed):
    mean, std, size = kid(samples.features, reference.statistics.features, device, seed=seed)
    note = f'{reference.against(samples)}, 100 subsets of {size}'
    if size < 1000:
        note += ', not 1000: too few images'
    yield Result(dict(kid=mean, kid_std=std), note)


def of_prc(samples, reference, device, seed):
    precision, recall = precision_recall(samples.features, reference.statistics.features, device)
    yield Result(dict(precision=precision, recall=recall), reference.against(samples))


def of_swd(samples, reference, device, seed):
    sets = [images for images in (reference.train, reference.test) if images is not None]
    # The samples may be sorted by class: a part of them is taken at random.
    order = torch.randperm(samples.n, generator=torch.Generator().manual_seed(seed))
    labels = samples.labels
    count = min(samples.n, *(len(images) for images in sets))
    alike = 0
    if labels is not None and all(images.labels is not None for images in sets):
        alike = matched(labels[order], *sets)
    if alike > 1:
        count = alike
        labels = labels[order[:count]]
    else:
        labels = None
    chosen = order[:count].sort().values
    real = pick_images(reference.train, count, seed, labels)
    values = dict(swd=sliced_wasserstein(samples.pixels[chosen], real, device))
    if reference.test is not None:
        test = pick_images(reference.test, count, seed, labels)
        values['swd_of_test'] = sliced_wasserstein(test, real, device)
    note = f'{count} images against {count} of {reference.name}{reference.classes}'
    if labels is not None and len(labels.unique()) > 1:
        note += ', as many of each class'
    yield Result(values, note)


def of_neighbours(samples, reference, device, seed):
    """And a picture of the 32 samples closest to a training image, each left of that image."""
    measured = dict(samples=samples.pixels)
    if reference.test is not None:
        labels = samples.labels if reference.test.labels is not None else None
        measured['test'] = pick_images(reference.test, samples.n, seed, labels)
    marks = torch.tensor([0, 0.05, 0.5, 0.95]).double()
    for name, x in measured.items():
        distances, neighbours = nearest_images(x, reference.whole, device)
        least, q05, q50, q95 = distances.quantile(marks).tolist()
        values = {f'{name}_min': least, f'{name}_q05': q05, f'{name}_q50': q50,
                  f'{name}_q95': q95, f'{name}_mean': distances.mean().item(),
                  f'{name}_copies': int((distances == 0).sum())}
        picture = None
        if name == 'samples':
            first = distances.argsort()[:32]
            pairs = torch.stack([x[first], neighbours[first]], 1)
            picture = grid_of(pairs.flatten(0, 1), nrow=8)
        note = f'{name}: {len(x)} images, nearest of {len(reference.whole)} of {reference.name}'
        yield Result(values, note, picture)


def of_judge(samples, reference, device, seed):
    """The Frechet distance to the test images in the judge's features, beside that of as many
    training images, and how many samples it finds legible.

    The training images have the classes of the samples. At random their shares would differ more
    from those of the test images than the shares of samples whose classes come in turn, and a good
    flow would come out nearer to the test images than real ones."""
    judge = reference.judge
    features, p = judged(judge.net, samples.pixels)
    real = pick_images(reference.train, samples.n, seed, samples.labels)
    train, _ = judged(judge.net, real)

    def distance(x):
        return frechet(x.mean(0), x.T.cov(), judge.real.mean(0), judge.real.T.cov())

    precision, recall = precision_recall(features, judge.real, device)
    values = dict(judge_fd=distance(features), judge_fd_of_real=distance(train),
                  judge_precision=precision, judge_recall=recall, legible=part_legible(p))
    note = f'{samples.n} images{reference.classes}, of_real: {len(real)}'
    note += ' drawn at random' if samples.labels is None else ', as many of each class'
    yield Result(values, f'{note}; {judge.note}')


# ---------------------------------------------------------------- the table

class Metric(NamedTuple):
    """What a metric needs. 'pixels': of the samples and of the reference. 'features': of each
    sample. 'statistics': mean and covariance of the features of the reference; with 'features'
    those of each image in it."""
    help: str
    needs: set
    least: int = 0                   # images (of FID: more than features)
    of: Optional[Callable] = None    # None: of a flow, by bits_per_dim() or straightness()


METRICS = {
    'fid': Metric('Frechet Inception distance to the reference', {'statistics'}, 2049, of_fid),
    'is': Metric('Inception Score, 10 splits', {'features'}, 10, of_is),
    'kid': Metric('kernel distance, 100 subsets of 1000', {'features', 'statistics'}, 2, of_kid),
    'prc': Metric('precision and recall, 3 nearest neighbours of Inception features',
                  {'features', 'statistics'}, 4, of_prc),
    'swd': Metric('sliced Wasserstein distance of pixels, beside that of the test split',
                  {'pixels'}, 0, of_swd),
    'neighbours': Metric('nearest training images, and a picture of the closest', {'pixels'}, 0,
                         of_neighbours),
    'judge': Metric('by a classifier of the labelled training set: Frechet distance of its '
                    'features, legible share, precision and recall', {'pixels'}, 129, of_judge),
    'bpd': Metric('bits/dim of the test split, dequantised, by rk45 (--tol: 1e-5)', {'pixels'}),
    'straightness': Metric('of the lines of vp, subvp, ddpm, rf in their own time; 0 is straight',
                           set()),
}
OF_FLOWS = [name for name, metric in METRICS.items() if metric.of is None]
OF_BOTH_FEATURES = {name for name, metric in METRICS.items()
                    if {'features', 'statistics'} <= metric.needs}


def of_samples(names):
    """Those of the metrics `names` that are of samples, in the order of METRICS."""
    return [name for name in METRICS if name in names and name not in OF_FLOWS]


def needs(names):
    """What some metrics need, all together."""
    return set().union(*(METRICS[name].needs for name in names))


def check_counts(names, which, n):
    """BadInput for fewer images than the metrics `names` need. which: the first words of the line,
    on the n images."""
    for name in names:
        least = METRICS[name].least
        mend = f'--{name} needs {least} images or more'
        if name == 'fid':
            mend += f' (the covariance of {POOL} features)'
        if n < least:
            raise BadInput(f'{which}: {mend}; a metric for few images: --swd')
