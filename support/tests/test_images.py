"""Images: decoding, and reading a set of them."""
import io
import os
import re
import signal
import zipfile
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

from support import foreign, waiting
from support import images as images_module
from support.batches import charges_of
from support.cli import BadInput
from support.images import chosen_indices, mean_norm, move, read_batches, to_float
from support.sets import load_images
from support.tests.common import close, seeded
from support.tests.made import encoded, encrypted, picture, shows, zipped

# ---------------------------------------------------------------- one image

@pytest.mark.parametrize('mode, ending, shown', [
    ('P', 'png', 'RGB'), ('L', 'png', 'L'), ('1', 'png', 'L'), ('LA', 'png', 'L'),
    ('RGBA', 'png', 'RGB'), ('RGB', 'bmp', 'RGB'), ('CMYK', 'jpg', 'RGB'), ('RGB', 'JPEG', 'RGB'),
    ('RGB', 'webp', 'RGB'), ('P', 'gif', 'RGB'),
])
def test_read_image__any_mode_becomes_grey_or_rgb(tmp_path, mode, ending, shown):
    picture().convert(mode).save(tmp_path / f'a.{ending}')
    images = load_images(tmp_path)
    assert shows(images[0], Image.open(tmp_path / f'a.{ending}').convert(shown))
    assert images.flip == (shown == 'RGB')
    assert images.labels is None and images.classes is None


RAMP = np.arange(16, dtype=np.uint8).reshape(4, 4) * 17
DEEP = RAMP * np.uint16(257)  # of 16 bits
RED = np.full((4, 4, 3), (255, 0, 0), np.uint8)
QUARTER_TURN = b'II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0'  # in EXIF


@pytest.mark.parametrize('raw, shown', [
    pytest.param(encoded(Image.fromarray(DEEP)), RAMP, id='png_of_16_bits'),
    pytest.param(encoded(Image.fromarray(DEEP), 'TIFF'), RAMP, id='tiff_of_16_bits'),
    pytest.param(b'P5 4 4 65535\n' + DEEP.astype('>u2').tobytes(), RAMP, id='pgm_of_16_bits'),
    pytest.param(encoded(Image.new('RGBA', (4, 4))), np.full((4, 4), 255), id='transparent'),
    pytest.param(encoded(Image.new('LA', (4, 4))), np.full((4, 4), 255), id='clear_grey'),
    pytest.param(encoded(Image.fromarray(np.pad(RED, ((0, 0), (3, 3), (0, 0))))), RED, id='wide'),
    pytest.param(encoded(Image.fromarray(RAMP), exif=QUARTER_TURN), np.rot90(RAMP, -1),
                 id='turned'),
])
def test_read_image__shows_all_bits_on_white_the_centre_square_upright(tmp_path, raw, shown):
    (tmp_path / 'a.png').write_bytes(raw)
    assert shows(load_images(tmp_path)[0], shown)


@pytest.mark.parametrize('limit', [2 << 30, 0])
def test_probe__one_coloured_image_of_many_makes_a_coloured_set(tmp_path, capsys, monkeypatch,
                                                                limit):
    monkeypatch.setattr(images_module, 'MEMORY_LIMIT', limit)
    is_large = limit == 0
    for k in range(200):  # 64 of these are looked at first, and 101 is not among them
        size = (8, 12) if k % 50 == 0 else (8, 8)
        colour = (200, 30, 30) if k == 101 else (90, 90, 90)
        Image.new('RGB', size, colour).save(tmp_path / f'{k:03d}.png')
    assert load_images(tmp_path).channels == 3
    assert ('4 of 200' in capsys.readouterr().out) == (not is_large)

    grey = torch.stack(list(load_images(tmp_path, channels=1, image_size=4)))
    assert grey.shape == (200, 1, 4, 4) and grey.unique().tolist() == [81, 90]
    out = capsys.readouterr().out  # what is lost is said: of a large set, of the 64
    assert 'resized to 4 x 4' in out
    assert ('1 of 200 images coloured' in out) == (not is_large)


def test_read_image__a_large_jpeg_is_decoded_at_a_reduced_size(tmp_path):
    turn = Image.Exif()
    turn[0x0112] = 6  # a quarter
    picture(0, 512).crop((0, 0, 512, 400)).save(tmp_path / 'a.jpg', exif=turn, quality=95)
    picture(0, 512).save(tmp_path / 'a.png')
    for least, reduced in ((None, (400, 512)), (401, (400, 512)), (200, (200, 256)),
                           (10, (50, 64))):
        image, size, _ = images_module.read_image(tmp_path, 'a.jpg', least)
        assert image.size == reduced and size == (400, 512)
    assert images_module.read_image(tmp_path, 'a.png', 10).image.size == (512, 512)

    whole = images_module.read_image(tmp_path, 'a.jpg').image
    expected = np.asarray(images_module.centre_square(whole, 16)).astype(int)
    images = load_images(tmp_path, image_size=16)  # never from less than 32 pixels a side
    shown = images[0].permute(1, 2, 0).numpy()
    assert abs(shown - expected).max() <= 2


def test_in_parts__several_threads_yield_the_same_in_order():
    items = range(200)
    for threads in (False, True):
        parts = list(images_module.in_parts(str, items, threads))
        assert [len(part) for part in parts] == [64, 64, 64, 8]
        assert sum(parts, []) == list(map(str, items))


def test_fill__large_photographs_are_decoded_by_several_threads_with_progress(
        tmp_path, monkeypatch, capsys):
    for k in range(3):
        picture(k, 300).save(tmp_path / f'{k}.jpg')
    monkeypatch.setattr(waiting, 'PATIENCE', 0)
    monkeypatch.setattr(waiting.SPEAKER, 'last_line', -1e9)  # silent for long
    with patch.object(images_module, 'in_parts', side_effect=images_module.in_parts) as parts:
        load_images(tmp_path, image_size=16)
    threads = parts.call_args.args[2]
    assert threads
    assert re.search(f'--dataset {tmp_path}: decoded: [1-3]/3  .* img/s', capsys.readouterr().out)


# ---------------------------------------------------------------- a set of images

@pytest.mark.parametrize('kind', ['folder', 'zip'])
def test_fill__skips_what_cannot_be_read_and_labels_follow(tmp_path, capsys, monkeypatch, kind):
    path = tmp_path / 'in' / f'a.{kind}'
    image = encoded(picture())
    entries = [(f'{"cat" if k % 2 else "ant"}/{k}.png', encoded(picture(k))) for k in range(6)]
    entries += [('a.txt', b''), ('__MACOSX/cat/0.png', image), ('cat/.0.png', image)]  # no images
    entries += [('cat/6.png', b''), ('cat/half.png', image[:80]),  # broken ones
                ('cat/bomb.png', encoded(Image.new('L', (64, 64)))),
                ('cat/long.png', image + bytes(100_000)),
                ('dog/0.png', b'junk')]  # all that there is of dogs
    path.parent.mkdir()
    if kind == 'folder':
        zipfile.ZipFile(io.BytesIO(zipped(entries))).extractall(path)
    else:
        entries += [('../evil.png', image), ('/../evil.png', image), ('cat/locked.png', image)]
        path.write_bytes(encrypted(zipped(entries)))
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 64 * 64 - 1)  # over it, but not twice: a warning
    monkeypatch.setattr(foreign, 'ENTRY_LIMIT', 100_000)

    images = load_images(path, image_size=8)
    err = capsys.readouterr().err
    counted = '6 of 12' if kind == 'zip' else '5 of 11'
    assert f'skipped {counted}' in err and err.count('\n') == 1
    assert len(images) == 6
    assert images.classes == ['ant', 'cat', 'dog'] and images.labels.tolist() == [0, 0, 0, 1, 1, 1]
    for shown, k in zip(images, (0, 2, 4, 1, 3, 5)):
        assert shows(shown, picture(k))
    with pytest.raises(BadInput, match='--classes: 2 labels from 0 to 1, no image of dog;'):
        images.class_count()
    assert os.listdir(tmp_path) == ['in'] and os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize('source', ['set', 'a.zip', 'a.npy'])
@pytest.mark.parametrize('workers', [0, 2])
def test_read_batches__a_set_beyond_memory_serves_the_same(folder, tmp_path, monkeypatch, source,
                                                           workers):
    np.save(tmp_path / 'a.npy', [np.asarray(picture(k)) for k in range(10)])
    files = [(file.name, file.read_bytes()) for file in folder.iterdir()]
    (tmp_path / 'a.zip').write_bytes(zipped(files))
    small = load_images(tmp_path / source)
    monkeypatch.setattr(images_module, 'MEMORY_LIMIT', 0)
    large = load_images(tmp_path / source)
    assert small.pixels.shape == (10, 3, 8, 8) and large.pixels is None
    assert torch.equal(torch.stack(list(large)), small.pixels)  # plain iteration ends

    norms = to_float(small.pixels).flatten(1).norm(dim=1)
    state = torch.get_rng_state()
    indices = [torch.randint(10, (4,), generator=seeded(k)) for k in range(6)]
    for images in (small, large):
        served = read_batches(images, indices, workers=workers)
        for batch, index in zip(served, indices, strict=True):
            assert torch.equal(batch, small.pixels[index])
        close(mean_norm(images), norms.mean(), rtol=1e-6)
        close(mean_norm(images, n=5), norms[::2].mean(), rtol=1e-6)
    assert (torch.get_rng_state() == state).all()


@pytest.mark.parametrize('workers', [0, 1])
def test_read_batches__large_sets_pass_over_what_cannot_be_read(folder, monkeypatch, capfd,
                                                                workers):
    monkeypatch.setattr(images_module, 'MEMORY_LIMIT', 0)
    (folder / '9.png').write_text('broken')
    large = load_images(folder)
    batch, = read_batches(large, [torch.tensor([9, 9, 0])], workers=workers)
    assert torch.equal(batch[0], batch[2])
    assert len(capfd.readouterr().err.splitlines()) == 1

    picture(0, 4).save(folder / '9.png')
    with pytest.raises(BadInput, match='^--dataset .*9.png.* is 4x4') as caught:
        list(read_batches(large, [torch.tensor([9])], workers=workers))
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('is_array', [False, True])
def test_hold__a_large_set_in_memory_is_what_is_served_from_disk(folder, tmp_path, monkeypatch,
                                                                 capfd, is_array):
    monkeypatch.setattr(images_module, 'MEMORY_LIMIT', 0)
    path = folder
    if is_array:
        path = tmp_path / 'a.npy'
        np.save(path, [np.asarray(picture(k)) for k in range(10)])
    else:
        for k in (0, 4, 5, 9):
            (folder / f'{k}.png').write_text('broken')
    images = load_images(path)
    identity = images.identity
    served = torch.stack(list(images))
    capfd.readouterr()
    images.hold()
    assert torch.equal(images.pixels, served) and images.identity == identity
    out, err = capfd.readouterr()
    assert ('replaces each of 4 ' in err) != is_array and len(images) == 10


def test_hold__a_set_of_more_than_half_of_the_free_memory_stays_on_disk_and_a_line_says_so(
        folder, monkeypatch, capsys):
    monkeypatch.setattr(images_module, 'MEMORY_LIMIT', 0)
    images = load_images(folder)
    size = 10 * 3 * 8 * 8
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')  # each of two processes would hold it
    monkeypatch.setattr(images_module, 'free_memory', lambda: 4 * size - 1)
    capsys.readouterr()  # on a busy machine, how far the reading had come
    images.hold()
    assert images.pixels is None
    assert re.fullmatch(f'--dataset {folder}: read from disk in each step, since .* GB of pixels '
                        'are more than half of the free memory, .* GB\n', capsys.readouterr().out)
    with pytest.raises(BadInput, match='^--exact: 10 images of .* do not fit in memory'):
        charges_of(images, '--exact')
    monkeypatch.setattr(images_module, 'free_memory', lambda: 4 * size)
    assert len(charges_of(images, '--exact')) == 10


@pytest.mark.parametrize('free, moves', [(3839, False), (3840, True)])
def test_move__a_gpu_takes_what_fills_half_of_its_free_memory(folder, monkeypatch, free, moves):
    monkeypatch.setattr(images_module, 'MEMORY_LIMIT', 0)
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (free, 2 * free))
    images = load_images(folder)
    images.hold()
    with patch.object(torch.Tensor, 'to') as to:
        move(images, 'cuda')
    assert to.called == moves


@pytest.mark.parametrize('limit', [0, 2 << 30])
def test_rows__of_an_array_no_image_is_decoded(limit, tmp_path, monkeypatch):
    monkeypatch.setattr(images_module, 'MEMORY_LIMIT', limit)
    pixels = np.random.default_rng(0).integers(0, 256, (70, 8, 8, 3), np.uint8)
    np.save(tmp_path / 'a.npy', pixels)
    with patch.object(images_module.Images, 'decode', side_effect=AssertionError):
        images = load_images(tmp_path / 'a.npy')
        assert np.array_equal(images[[3, 69]], pixels[[3, 69]].transpose(0, 3, 1, 2))
        images.hold()
    assert np.array_equal(images.pixels, pixels.transpose(0, 3, 1, 2))


def kill_this_process():
    os.kill(os.getpid(), signal.SIGKILL)


NO_SHARED_MEMORY = RuntimeError('unable to allocate shared memory(shm) for file </torch_1>: '
                                'No space left on device (28)')


@pytest.mark.parametrize('fault, refusal, message', [
    (kill_this_process, BadInput, '--workers 0.*shm-size'),
    (ZeroDivisionError('as raised'), ZeroDivisionError, 'as raised'),
    (NO_SHARED_MEMORY, BadInput, '^--workers: .*No space left.*--workers 0'),
])
def test_read_batches__a_reader_that_dies_ends_in_one_line(folder, monkeypatch, fault, refusal,
                                                           message):
    monkeypatch.setattr(images_module, 'MEMORY_LIMIT', 0)
    large = load_images(folder)
    with patch.object(torch.Tensor, 'share_memory_', side_effect=fault):  # called by the reader
        with pytest.raises(refusal, match=message):
            list(read_batches(large, [torch.tensor([1])], workers=1))
        assert len(list(read_batches(large, [torch.tensor([1])]))) == 1


def test_chosen_indices__are_of_all_classes_that_come_in_turn():
    for n in (10, 20, 100, 500, 1000):
        indices = chosen_indices(n, 10_000)
        assert len(indices.unique()) == n
        assert n < 100 or (indices % 10).bincount(minlength=10).min() > n / 50
    assert torch.equal(chosen_indices(7, 7), torch.arange(7))


# ---------------------------------------------------------------- which images these are

def test_identify__tells_pixels_labels_and_classes_apart(tmp_path):
    def identity(name, pixels, **labels):
        np.savez(tmp_path / name, x=pixels, **labels)
        return load_images(tmp_path / name).identity

    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8), np.uint8)
    plain = identity('a.npz', pixels)
    assert identity('b.npz', pixels) == plain
    assert identity('c.npz', pixels[::-1])[2] != plain[2]
    one_other = pixels.copy()
    one_other[7, 3, 3] ^= 1
    assert identity('d.npz', one_other)[:2] == plain[:2]
    assert identity('d.npz', one_other)[2] != plain[2]
    labelled = identity('e.npz', pixels, y=np.arange(40) % 2)
    assert labelled[2] == plain[2] and labelled[1] != plain[1]

    for folder, names in (('f', 'cat dog'), ('g', 'ant bee')):
        for name in names.split():
            (tmp_path / folder / name).mkdir(parents=True)
            Image.fromarray(pixels[0]).save(tmp_path / folder / name / '0.png')
    f, g = (load_images(tmp_path / folder) for folder in 'fg')
    assert f.identity[2] == g.identity[2] and f.identity[1] != g.identity[1]
    shape = (1, 8, 8)
    assert g.difference(f.identity, shape, True, f.classes) == \
        'classes cat, dog there, ant, bee here'
    assert g.difference(f.identity, shape, False, f.classes) == ''  # trained without labels
    assert g.difference(plain, shape, False, None) == '40 images there, 2 here'
    assert g.difference(None, shape, False, None) == ''
    other = [2, f.identity[1], 0]
    assert f.difference(other, shape, True, None) == 'as many images, with other pixels'
    assert f.difference(other, (1, 16, 16), True, None) == ''  # cannot be compared


def test_identify__of_a_set_too_large_for_memory_sees_sizes_and_names(tmp_path, monkeypatch):
    monkeypatch.setattr(images_module, 'MEMORY_LIMIT', 0)
    pixels = np.random.default_rng(0).integers(0, 256, (130, 8, 8), np.uint8)
    (tmp_path / 'a').mkdir()
    for k, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / 'a' / f'{k:03d}.png')
    before = load_images(tmp_path / 'a').identity
    (tmp_path / 'a').rename(tmp_path / 'b')
    with zipfile.ZipFile(tmp_path / 'c.zip', 'w') as archive:
        for file in sorted((tmp_path / 'b').iterdir()):
            archive.write(file, file.name)
    assert load_images(tmp_path / 'b').identity == before
    assert load_images(tmp_path / 'c.zip').identity == before
    Image.fromarray(pixels[1] * 0).save(tmp_path / 'b' / '001.png')  # not one of the 64
    changed = load_images(tmp_path / 'b').identity
    assert changed[2] != before[2]
    (tmp_path / 'b' / '001.png').rename(tmp_path / 'b' / '001a.png')
    assert load_images(tmp_path / 'b').identity[2] not in (changed[2], before[2])


@pytest.mark.parametrize('limit', [0, 1 << 30])
def test_of_labels__leaves_the_others_out(limit, tmp_path, monkeypatch):
    monkeypatch.setattr(images_module, 'MEMORY_LIMIT', limit)
    pixels = np.arange(12 * 64).astype(np.uint8).reshape(12, 8, 8)
    np.savez(tmp_path / 'a.npz', x=pixels, y=np.arange(12) % 3)
    for c in 'abc':
        (tmp_path / 'set' / c).mkdir(parents=True)
    for k, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / 'set' / 'abc'[k % 3] / f'{k:02d}.png')
    array = load_images(tmp_path / 'a.npz').of_labels([0, 2])
    assert array.labels.tolist() == [0, 2] * 4
    assert np.array_equal(array[list(range(8))][:, 0], pixels[[0, 2, 3, 5, 6, 8, 9, 11]])
    files = load_images(tmp_path / 'set').of_labels([1])
    assert np.array_equal(files[[0, 1, 2, 3]][:, 0], pixels[[1, 4, 7, 10]])
    assert len(files) == 4 and files.labels.unique().tolist() == [1]
