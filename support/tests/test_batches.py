"""What a training step is given."""
import itertools

import pytest
import torch

from support.batches import image_order, training_batches
from support.images import to_float
from support.sets import load_images
from support.tests.common import close


def batches_of(images, batch_size, field_batch, step=0, flip=False, classes=10):
    """training_batches() of one process on the CPU."""
    return training_batches(images, batch_size, field_batch, 0, step, flip=flip, classes=classes,
                            workers=0, device=torch.device('cpu'), rank=0, world=1)


def test_image_order__shows_all_images_once_an_epoch_and_goes_on_from_any_step():
    steps = list(itertools.islice(image_order(10, 4, 0, 0), 10))  # 4 epochs
    for epoch in torch.cat(steps).split(10):
        assert epoch.sort().values.tolist() == list(range(10))
    for step in (1, 2, 5, 9):
        assert torch.equal(next(image_order(10, 4, 0, step)), steps[step])
    assert not torch.equal(next(image_order(10, 4, 1, 0)), steps[0])


def test_training_batches__hide_a_tenth_of_the_labels():
    """As classifier-free guidance is trained, arXiv 2207.12598."""
    images = load_images()
    steps = 10
    size = 1000
    batches = batches_of(images, size, 1)
    order = image_order(len(images), size, 0, 0)
    hidden = 0
    for batch, index in itertools.islice(zip(batches, order), steps):
        is_hidden = batch.labels == -1
        hidden += int(is_hidden.sum())
        labels = images.labels[index]
        assert torch.equal(batch.labels[~is_hidden], labels[~is_hidden])
    draws = steps * size
    deviation = (0.1 * 0.9 / draws) ** 0.5  # of the share, about 0.003
    close(hidden / draws, 0.1, atol=4 * deviation)


@pytest.mark.parametrize('field_batch', [200, 'all'])
def test_training_batches__the_charges_of_a_point_are_of_its_class(field_batch):
    images = load_images()
    batch = next(batches_of(images, 100, field_batch))
    index = next(image_order(len(images), 200, 0, 0))
    if field_batch == 'all':
        charge_labels = images.labels
    else:
        charge_labels = images.labels[index]
        assert torch.equal(batch.charges, to_float(images.pixels[index]))
        assert torch.equal(batch.clean, batch.charges[:100])
    assert batch.among.shape == (100, len(batch.charges))
    for label, among in zip(batch.labels, batch.among):
        if label == -1:
            assert among.all()
        else:
            assert torch.equal(among, charge_labels == label)


def test_training_batches__go_on_from_any_step_and_mirror_half_of_the_images():
    images = load_images()
    batches = list(itertools.islice(batches_of(images, 400, 1, flip=True, classes=0), 3))
    again = next(batches_of(images, 400, 1, step=2, flip=True, classes=0))
    assert torch.equal(again.clean, batches[2].clean)
    assert again.labels is None and again.charges is None and again.eps is None

    plain = next(batches_of(images, 400, 1, step=2, classes=0))
    is_same = (again.clean == plain.clean).flatten(1).all(1)
    is_mirrored = (again.clean == plain.clean.flip(-1)).flatten(1).all(1)
    assert (is_same | is_mirrored).all()
    assert 140 < is_mirrored.sum() < 260
