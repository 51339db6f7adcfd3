"""Sets known by name, and what load_images() refuses."""
import os
import re
import types
import urllib.error
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

from support import images as images_module
from support import sets
from support.cli import BadInput
from support.images import mean_norm
from support.sets import load_images, load_pictures, meant_set
from support.tests.common import load_refuses
from support.tests.made import picture, pictures, shows, written


def test_load_images__what_is_no_set_or_too_small_is_refused(folder, tmp_path):
    for name in ('bad/0.png', 'bad/1.png', 'empty/a.txt', 'a.txt'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('')
    picture(0, 6).save(folder / '5.png')
    load_refuses('no images', tmp_path / 'empty')
    load_refuses('none of 2 images', tmp_path / 'bad')
    load_refuses('is of another kind', tmp_path / 'a.txt')
    load_refuses('no such data set, file or folder; accepted: glyphs', tmp_path / 'absent')
    load_refuses(r'no such data set.*; did you mean cifar10\?; accepted', 'CIFAR-10')
    load_refuses('5.png.* is 6x6; give an --image_size of at most 6', tmp_path / 'set')
    load_refuses('0.png.* is 8x8', folder, image_size=16)
    load_refuses("0.png' is 8x8; it is not enlarged; give one of 16 pixels a side or more", folder,
                 image_size=16, size_is_fixed=True)
    np.save(tmp_path / 'a.npy', np.zeros((3, 8, 8), np.uint8))
    load_refuses('a.npy: image 0 is 8x8; give an --image_size of at most 8, not 9',
                 tmp_path / 'a.npy', image_size=9)
    load_refuses('--split .*accepted', split='valid')
    load_refuses('--channels .*accepted', channels=2)
    load_refuses('--image_size .*accepted', image_size=0)


@pytest.mark.parametrize('names, known', [
    ('CIFAR-10 cifar data/cifar10/', 'cifar10'), ('Mnist MNIST', 'mnist'), ('celeba', 'celeba64'),
    ('fashion-mnist FashionMNIST', 'fashion_mnist'), ('lsun-bedroom', 'lsun_bedroom'),
    ('blood_mnist', 'bloodmnist'), ('photos imagenet64 my_digits cats out', None)])
def test_meant_set__knows_other_spellings_and_guesses_no_more(names, known):
    for name in names.split():
        assert meant_set(name) == known, name


def test_found__says_that_a_known_set_wins_over_a_folder_of_its_name(here, few_glyphs, capsys):
    os.mkdir('glyphs')
    load_images()
    assert '--dataset glyphs: the known set, not the file or folder' in capsys.readouterr().out


def test_load_pictures__decodes_only_what_is_used(folder, capsys):
    (folder / '0.png').write_text('broken')
    (folder / '3.png').write_text('broken')
    with patch.object(images_module, 'read_image', side_effect=images_module.read_image) as read:
        pictures = load_pictures(folder, 'data', 8, 3, 2, '--inpaint')
    assert read.call_count == 3
    assert pictures.places == [1, 2] and pictures.total == 10
    assert pictures.names == [f'{k}.png' for k in range(10)]
    for pixels, k in zip(pictures.pixels, (1, 2), strict=True):
        assert shows(pixels, picture(k))
    out = capsys.readouterr().out
    assert f"--inpaint {folder}: without 1 that cannot be read (first: '0.png': " in out
    with pytest.raises(BadInput, match="--inpaint .*: '1.png' is 8x8; it is not enlarged"):
        load_pictures(folder, 'data', 16, 3, 2, '--inpaint')
    everything = load_pictures('glyphs', 'data', 16, 1, 3, '--encode')
    assert len(everything.pixels) == 3 and everything.total == 10_000 and everything.names is None


# ---------------------------------------------------------------- downloaded sets

@pytest.mark.parametrize('size, file, archive', [
    (28, 'dermamnist.npz', 0),
    (63, 'dermamnist_64.npz', 1),  # the next larger
])
def test_medmnist__is_downloaded_once_and_checked(tmp_path, monkeypatch, size, file, archive):
    """A fake archive in the form of theirs, behind a fake server."""
    from torchvision.datasets import utils
    urls = []
    x = np.zeros((6, 64, 64, 3), np.uint8)
    packed = written(np.savez_compressed, train_images=x, train_labels=[[0], [1]] * 3,
                     val_images=x[:2], test_images=x[:3] + 9, test_labels=[[0]] * 3)

    def fetch(url, path, **options):
        urls.append(url)
        Path(path).write_bytes(packed)

    monkeypatch.setattr(utils, '_urlretrieve', fetch)
    monkeypatch.setattr(utils, '_get_redirect_url', lambda url, max_hops: url)
    load_refuses(f'corrupted.*fetch by hand {tmp_path}/dermamnist.npz', 'dermamnist', tmp_path,
                 size)
    assert os.listdir(tmp_path) == [f'{file}.part'] and f'/{file}?' in urls[0]

    sums = list(sets.MEDMNIST_MD5['dermamnist'])
    sums[archive] = utils.calculate_md5(tmp_path / f'{file}.part')
    monkeypatch.setitem(sets.MEDMNIST_MD5, 'dermamnist', sums)
    train_images = load_images('dermamnist', tmp_path, size)
    test_images = load_images('dermamnist', tmp_path, size, split='test')
    # what was fetched before is found whole, and put in place
    assert len(urls) == 1 and os.listdir(tmp_path) == [file]
    assert train_images.pixels.shape == (6, 3, size, size)
    assert train_images.flip and train_images.class_count() == 2
    assert test_images.pixels.shape == (3, 3, size, size) and test_images.pixels.eq(9).all()


def test_medmnist__has_four_sums_a_set():
    assert len(sets.MEDMNIST_MD5) == 12 and sets.MEDMNIST_SIZES == (28, 64, 128, 224)
    for sums in sets.MEDMNIST_MD5.values():
        assert len(sums) == 4
        assert all(re.fullmatch('[0-9a-f]{32}', md5) for md5 in sums)
    grey = [name for name in sets.MEDMNIST_MD5 if sets.SETS[name].channels == 1]
    assert sorted(grey) == ['breastmnist', 'chestmnist', 'octmnist', 'organamnist', 'organcmnist',
                            'organsmnist', 'pneumoniamnist', 'tissuemnist']


@pytest.fixture
def fake_torchvision(monkeypatch):
    """Stand-ins for MNIST, and for CelebA of one image."""
    def known_set(root, download, train=True, split=None):
        pixels = torch.zeros(4 if train else 2, 28, 28, dtype=torch.uint8)
        return types.SimpleNamespace(data=pixels, targets=pixels[:, 0, 0] + 1, classes=['a', 'b'],
                                     filename=['1.png'])
    for kind in ('MNIST', 'CelebA'):
        monkeypatch.setattr(f'torchvision.datasets.{kind}', known_set)


def test_load_images__what_cannot_be_downloaded_is_to_be_fetched_by_hand(tmp_path):
    with patch('torchvision.datasets.MNIST', side_effect=urllib.error.URLError('no\nroute')):
        load_refuses(f'--dataset mnist: .*fetch by hand {tmp_path}/MNIST/raw', 'mnist', tmp_path)
    load_refuses(f'--dataset lsun_bedroom: .*by hand {tmp_path}/lsun', 'lsun_bedroom', tmp_path)


def test_load_images__mnist_by_torchvision(tmp_path, fake_torchvision, capsys):
    train_images = load_images('mnist', tmp_path)
    test_images = load_images('mnist', tmp_path, 32, 3, 'test')
    assert train_images.pixels.shape == (4, 1, 28, 28)
    assert train_images.labels.tolist() == [1] * 4
    assert test_images.pixels.shape == (2, 3, 32, 32)
    assert not test_images.flip and test_images.classes == ['a', 'b']
    assert capsys.readouterr().out == '--dataset mnist: 2 of 2 images enlarged to 32 x 32\n'


def test_load_images__lsun_bedroom_of_a_folder(tmp_path):
    (tmp_path / 'lsun_bedroom').mkdir()
    (tmp_path / 'lsun_bedroom' / 'a.webp').write_text('not an image')
    for limit in (2 << 30, 0):  # a set of that name is not probed first, nor is one that is large
        with patch.object(images_module, 'MEMORY_LIMIT', limit):
            load_refuses('lsun_bedroom: no image .*can be read', 'lsun_bedroom', tmp_path)
    pictures(tmp_path, 'lsun_bedroom/0/a.webp', 'lsun_bedroom/1/a.webp', side=64)
    images = load_images('lsun_bedroom', tmp_path)
    assert images.pixels.shape == (2, 3, 256, 256)
    assert images.labels is None and images.flip


def test_load_images__celeba64_is_cropped_as_in_the_papers(tmp_path, fake_torchvision):
    pictures(tmp_path, 'celeba/img_align_celeba/0.png', side=64)
    face = Image.new('RGB', (178, 218))
    face.paste('white', (19, 39, 159, 179))  # 140 x 140 pixels
    face.save(tmp_path / 'celeba/img_align_celeba/1.png')
    images = load_images('celeba64', tmp_path)
    assert shows(images[0], Image.new('RGB', (64, 64), 'white'))


# ---------------------------------------------------------------- glyphs

def test_glyphs__are_the_same_bytes_balanced_and_told_apart():
    pixels, labels = sets.glyphs(500)
    again, _ = sets.glyphs.__wrapped__(500)
    assert pixels.shape == (500, 16, 16) and pixels.dtype == np.uint8
    assert (pixels == again).all()
    assert np.bincount(labels).tolist() == [50] * 10
    assert len({glyph.tobytes() for glyph in pixels}) == 500
    # bright on a black ground, which reaches the upper edge
    assert pixels.max(axis=(1, 2)).min() > 120 and np.median(pixels) == 0
    assert pixels[:, 0].max() < 128

    images = load_images()
    assert images.pixels.shape == (10_000, 1, 16, 16) and not images.flip
    assert images.classes == list('0123456789')
    assert 5 < mean_norm(images) < 16

    test_pixels, test_labels = sets.glyphs(300, split='test')  # told by the nearest of training
    distance = torch.cdist(torch.from_numpy(test_pixels).flatten(1).float(),
                           images.pixels[:2000].flatten(1).float())
    assert distance.min() > 0
    assert (images.labels[distance.argmin(1)].numpy() == test_labels).mean() > 0.95
