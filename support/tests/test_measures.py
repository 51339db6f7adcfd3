"""The metrics: what each needs, and with what it compares."""
import numpy as np
import pytest
import torch

from support import judge, measures
from support.cli import BadInput
from support.inception import POOL, Measured
from support.measures import METRICS, check_counts
from support.reference import Reference
from support.sets import load_images


def test_check_counts__needs_enough_images_for_each_estimator():
    assert {name: metric.least for name, metric in METRICS.items() if metric.least} == {
        'fid': POOL + 1, 'is': 10, 'kid': 2, 'prc': 4, 'judge': 129}
    check_counts(['fid', 'swd'], '--n 2049', 2049)
    with pytest.raises(BadInput, match='--n 2048: --fid needs 2049 images or more .the covarian'):
        check_counts(['fid'], '--n 2048', 2048)
    with pytest.raises(BadInput, match='the reference: 3 images: --prc needs 4 images or more'):
        check_counts(['prc'], 'the reference: 3 images', 3)


def test_of_judge__real_images_have_the_classes_of_the_samples(here, monkeypatch):
    """Real images whose classes come in turn are as near to the test images as the others that
    they are set beside. At random these would be farther: their shares of the classes differ."""
    rng = np.random.default_rng(0)

    def noisy(labels):
        """Images of 2 x 2 pixels of which the class is the brightness."""
        x = 20 * labels[:, None] + rng.integers(0, 20, (len(labels), 4))
        np.savez('x.npz', x=x.reshape(-1, 2, 2).astype(np.uint8), y=labels)
        return load_images('x.npz')

    def judged(net, pixels):
        features = pixels.flatten(1).double() / 20
        return features, torch.ones(len(pixels), 1)

    monkeypatch.setattr(measures, 'judged', judged)
    turns = np.arange(4000) % 10
    train = noisy(turns)
    test = noisy(turns)
    real, _ = judged(None, test.pixels)
    reference = Reference('x', train, train, test, '', None, None, None, 'tf1',
                          judge.Judge(None, real, 'note'))

    def of_real(labels):
        samples = Measured(512, None, None, None, noisy(turns[:512]).pixels, labels)
        result, = measures.of_judge(samples, reference, torch.device('cpu'), 0)
        return result

    alike = of_real(torch.from_numpy(turns[:512]))
    at_random = of_real(None)
    assert alike.values['judge_fd_of_real'] < at_random.values['judge_fd_of_real'] / 2
    ratio = alike.values['judge_fd'] / alike.values['judge_fd_of_real']
    assert 0.2 < ratio < 5
    assert '512, as many of each class' in alike.note
    assert '512 drawn at random' in at_random.note
