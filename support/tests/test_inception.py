"""Inception features and their statistics."""
import numpy as np
import pytest
import torch

from support.inception import (POOL, collect, inception_features, load_inception, read_stats,
                               resize_tf1, write_stats)
from support.tests.common import F64, close, seeded

CPU = torch.device('cpu')


def test_resize_tf1__reads_from_the_corner():
    x = torch.rand(1, 1, 5, 7, generator=seeded(), dtype=F64)
    want = x[0, 0].numpy()
    for axis, length in enumerate(want.shape):
        at = np.arange(11) * length / 11
        want = np.apply_along_axis(lambda row: np.interp(at, range(length), row), axis, want)
    close(resize_tf1(x, 11)[0, 0], want, atol=1e-12)


@pytest.mark.parametrize('resize', ['tf1', 'pytorch'])
def test_inception_features__are_of_three_channels_of_299_pixels_in_minus_1_to_1(resize):
    seen = []

    def net(x):
        seen.append(x)
        return x.mean((2, 3))

    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 8, 8)
    features = inception_features(net, pixels, resize)
    assert seen[0].shape == (2, 3, 299, 299)
    top = 1 if resize == 'pytorch' else 127 / 128  # as in the TensorFlow graph
    close(features, [[-1] * 3, [top] * 3], atol=1e-5)


def test_collect__gives_mean_and_covariance_of_the_features_of_inception(capsys):
    net, weight = load_inception('random', CPU)
    assert 'the numbers mean nothing' in capsys.readouterr().out
    assert weight.shape == (1008, 2048) and weight.dtype == F64
    pixels = torch.randint(0, 256, (5, 1, 8, 8), generator=seeded()).to(torch.uint8)
    got = collect(iter(pixels.split(2)), 5, net, 'tf1', {'features', 'pixels'}, CPU)
    assert torch.equal(got.pixels, pixels)
    assert got.features.std(0).max() > 1e-3
    # These two numbers were once equal to those of torch-fidelity, bit for bit.
    close([got.features.mean(), got.features.std()], [0.0900560, 0.1209559], rtol=1e-4)
    close(got.mu, got.features.double().mean(0), rtol=1e-5, atol=1e-5)
    close(got.sigma, got.features.double().T.cov(), atol=1e-5)


def test_collect__keeps_what_is_asked_for():
    pixels = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    got = collect(iter(pixels.split(2)), 3, None, 'tf1', {'pixels'}, CPU)
    assert got.n == 3 and len(got.pixels) == 3 and got.features is None
    got = collect(iter(pixels.split(2)), 3, None, 'tf1', set(), CPU)
    assert got.pixels is None


def test_read_stats__reads_what_write_stats_wrote(here):
    features = np.random.default_rng(0).standard_normal((9, POOL)).astype(np.float32)
    np.savez('song.npz', pool_3=features)  # as score_sde writes them
    song = read_stats('song.npz', 'any')
    close(song.mu, features.mean(0), atol=1e-5)
    close(song.sigma, np.cov(features.astype(float).T), atol=1e-5)
    assert song.n == 9 and np.array_equal(song.features, features)

    write_stats('ours.npz', song, 'tf1 resize')
    ours = read_stats('ours.npz', 'tf1 resize')
    assert torch.equal(ours.mu, song.mu) and torch.equal(ours.sigma, song.sigma)
    assert ours.n == 9 and ours.features is None
    with pytest.raises(ValueError, match='made with tf1 resize, not pytorch resize'):
        read_stats('ours.npz', 'pytorch resize')


def test_read_stats__of_others(here):
    mu = np.zeros(POOL)
    sigma = np.eye(POOL)
    np.savez('no_count.npz', mu=mu, sigma=sigma)
    stats = read_stats('no_count.npz', 'any')
    assert stats.n is None
    assert np.array_equal(stats.mu, mu) and np.array_equal(stats.sigma, sigma)
    np.savez('images.npz', arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    assert read_stats('images.npz', 'any') is None
    np.savez('half.npz', sigma=sigma)
    with pytest.raises(ValueError, match='mu None'):
        read_stats('half.npz', 'any')
    np.savez('nan.npz', mu=mu * np.nan, sigma=sigma)
    with pytest.raises(ValueError, match='or not finite'):
        read_stats('nan.npz', 'any')
    with pytest.raises(ValueError, match='absent.npz: cannot be read'):
        read_stats('absent.npz', 'any')
