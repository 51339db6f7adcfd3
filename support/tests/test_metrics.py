"""Distances between sets of images, on sets whose distance is known."""
import inspect

import pytest
import torch
from scipy import linalg

from support.foreign import RawSet
from support.images import Images
from support.metrics import (frechet, inception_score, kid, matched, nearest_images, pick_images,
                             precision_recall, sliced_wasserstein, squared_distances)
from support.tests.common import F64, close, randn, seeded


def test_frechet__of_diagonal_gaussians():
    p = torch.rand(6, generator=seeded(0), dtype=F64)
    q = torch.rand(6, generator=seeded(1), dtype=F64)
    mu = torch.arange(6, dtype=F64)
    of_means = 6 * 2 ** 2
    of_covariances = (p.sqrt() - q.sqrt()).square().sum()
    close(frechet(mu, p.diag(), mu + 2, q.diag()), of_means + of_covariances, rtol=1e-10)


def test_frechet__of_a_singular_covariance():
    mu = torch.arange(6, dtype=F64)
    root, other = (torch.rand(6, 6, generator=seeded(i), dtype=F64) for i in (0, 1))
    a = root @ root.T
    b = other[:, :2] @ other[:, :2].T
    want = (a + b).trace() - 2 * linalg.sqrtm((a @ b).numpy()).trace().real
    close(frechet(mu, a, mu, b), want, atol=1e-6)


def test_inception_score__of_certain_logits_is_the_number_of_classes():
    certain = torch.eye(10, dtype=F64).repeat(50, 1) * 1e3
    mean, std = inception_score(certain, splits=1)
    close(mean, 10.0, rtol=1e-9)
    assert std == 0
    close(inception_score(torch.zeros(500, 10))[0], 1.0, rtol=1e-9)


def test_kid__is_the_unbiased_mmd_of_the_cubic_kernel():
    x, y = (torch.randn(300, 16, generator=seeded(i)) for i in (0, 1))
    mean, std, size = kid(x, y, subsets=20)
    assert size == 300
    assert abs(mean) < 0.1 and std < 1e-9  # all subsets are the whole
    xx, yy, xy = ((u.double() @ v.double().T / 16 + 1) ** 3 for u, v in ((x, x), (y, y), (x, y)))
    off_diagonal = ~torch.eye(300, dtype=torch.bool)
    close(mean, xx[off_diagonal].mean() + yy[off_diagonal].mean() - 2 * xy.mean(), rtol=1e-9)


def test_kid__takes_100_subsets_of_1000():
    defaults = {name: p.default for name, p in inspect.signature(kid).parameters.items()}
    assert (defaults['subsets'], defaults['size']) == (100, 1000)
    x = torch.randn(1100, 4, generator=seeded())
    _, std, size = kid(x, x, subsets=3)
    assert size == 1000 and std > 0


def test_precision_recall__of_the_same_set_and_of_one_far_away():
    x, y = (torch.randn(300, 16, generator=seeded(i)) for i in (0, 1))
    assert precision_recall(x, x) == (1.0, 1.0)
    assert precision_recall(x, y + 100) == (0.0, 0.0)


def test_precision_recall__reaches_to_the_third_nearest_neighbour():
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0], [1e6]])  # balls of 3, 2, 2, 3 around the first
    made = torch.tensor([[5.9], [6.1], [-2.9], [-3.1]])
    precision, _ = precision_recall(made, real)
    # The fifth ball, around 1e6, reaches down to 1.
    assert precision == 0.5 + 0.25
    far = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    assert precision_recall(made, far)[0] == 0.5


def test_precision_recall__of_many_rows_are_those_of_all_distances():
    made = torch.randn(600, 3, generator=seeded(0))
    real = torch.randn(700, 3, generator=seeded(1)) + 1

    def part_inside(x, points):
        radii = torch.cdist(points, points).sort(1).values[:, 3]
        return (torch.cdist(x, points) <= radii).any(1).double().mean().item()

    expected = part_inside(made, real), part_inside(real, made)
    assert precision_recall(made, real) == pytest.approx(expected, abs=1e-3)
    assert abs(expected[0] - expected[1]) > 0.01


def test_squared_distances__are_exactly_0_between_equal_rows():
    x = randn(5, 700) * 1e3
    d2 = squared_distances(x, x)
    assert torch.equal(d2.diagonal(), torch.zeros(5, dtype=F64))
    close(d2, torch.cdist(x, x).square(), rtol=1e-6, atol=1e-2)


def test_sliced_wasserstein__of_a_shift():
    x = torch.randint(0, 200, (64, 1, 4, 4), generator=seeded()).to(torch.uint8)
    shifted = sliced_wasserstein(x, x + 20, projections=4000)
    close(shifted, 20 / 127.5, rtol=0.05)  # |shift| / sqrt(N), the rms of its projections
    assert sliced_wasserstein(x, x) == 0


class Labelled:
    """A data set of 30 images of two classes, 20 of class 0 and 10 of class 1."""
    labels = torch.tensor([0, 0, 1] * 10)

    def __len__(self):
        return 30

    def __getitem__(self, index):
        return torch.tensor(index)


def test_pick_images__of_the_classes_of_others():
    images = Labelled()
    picked = pick_images(images, 12, 0, torch.tensor([1, 0, 1] * 4))
    assert len(picked.unique()) == 12
    assert images.labels[picked].tolist().count(1) == 8
    picked = pick_images(images, 15, 0, torch.ones(15))
    assert images.labels[picked].tolist() == [1] * 10  # all that there are
    assert len(pick_images(images, 3, 0, torch.tensor([5, 5, 0]))) == 1


def test_matched__stops_at_the_first_class_that_has_no_more():
    images = Labelled()
    assert matched(torch.tensor([0, 1] * 4), images) == 8
    assert matched(torch.tensor([0, 1] * 20), images) == 21  # the 11th of class 1 comes next
    assert matched(torch.tensor([0, 1, 5, 0]), images, images) == 2


def test_pick_images__takes_different_ones_and_the_same_for_a_seed():
    images = torch.arange(50).view(50, 1, 1, 1).to(torch.uint8)
    picked = pick_images(images, 20, seed=0)
    assert len(picked.unique()) == 20
    assert torch.equal(picked, pick_images(images, 20, seed=0))
    assert not torch.equal(picked, pick_images(images, 20, seed=1))


@pytest.mark.parametrize('flip', [False, True])
def test_nearest_images__may_be_mirrored_where_training_mirrors(flip):
    pixels = torch.randint(0, 256, (30, 1, 4, 4), generator=seeded()).to(torch.uint8)
    train = Images('a set', '--dataset', RawSet(None, pixels[:, 0].numpy()), 4, 1, flip)
    train.fill()
    x = torch.cat([pixels[7:8], pixels[9:10].flip(-1)])
    distances, nearest = nearest_images(x, train)
    assert distances[0] == 0 and torch.equal(nearest[0], pixels[7])
    if flip:
        assert distances[1] == 0 and torch.equal(nearest[1], x[1])
    else:
        away = (pixels.double() - x[1].double()).flatten(1).norm(dim=1)
        close(distances[1], away.min() / 127.5, rtol=1e-9)
        assert torch.equal(nearest[1], pixels[away.argmin()])
