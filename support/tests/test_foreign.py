"""Folders, zips, arrays and labels that strangers made: used rightly, or refused in one line.

The hostile cases are one file, folder or link each. The default suite takes the first cases of each
generator, and `pytest -m slow` takes more."""
import json
import os
import pickle
import re
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from support import foreign
from support.cli import BadInput
from support.images import to_float, to_uint8
from support.sets import load_images
from support.tests.common import TINY, load_refuses, refuses
from support.tests.made import (CENTRAL, Payload, array_set, claims, encoded, encrypted, limited,
                                mutated, patched, picture, pictures, png_of, written, zipped)

# ---------------------------------------------------------------- folders

# What people have, and the labels of the images to train on and of those for tests: a digit an
# image, or None for no labels.
WITH_SPLITS = {
    'train/cat train/dog val/dog': ('01', '1'),
    'train/cat train/dog valid/dog test/cat': ('01', '0'),
    'training_set/cat training_set/dog testing/dog': ('01', '1'),
    'Train2017/cat Train2017/dog VAL2017/dog': ('01', '1'),
    'seg_train/cat seg_train/dog seg_test/dog seg_pred': ('01', '1'),
    'cat/train dog/train dog/test cat/test': ('01', '01'),
    'images/train/cat images/train/dog images/dev/dog masks/train/cat': ('01', '1'),
    'train/cat train/dog test/dog test/cow': ('01', None),
    'train/cat train/dog test': ('01', None),
    'train/cat train/dog stray.png': ('01', '01'),
}
LAYOUTS = WITH_SPLITS | {
    'cat dog': ('01', '01'),
    'train plane car': ('012', '012'),
    'cat dog a.png': (None, None),
    'cat': (None, None),
    '00000/img00000000.png 00001/img00001000.png': (None, None),
}


def digits_of(labels):
    return None if labels is None else ''.join(str(label) for label in labels.tolist())


@pytest.mark.parametrize('names', LAYOUTS)
def test_layout__splits_and_what_holds_everything_are_no_classes(tmp_path, capsys, names):
    files = [name if name.endswith('.png') else f'{name}/0.png' for name in names.split()]
    paths = [pictures(tmp_path / 'set', *(f'top/{file}' for file in files))]
    for top, separator in (('top/', '/'), ('./', '/'), ('top\\', '\\')):
        path = tmp_path / f'{len(paths)}.zip'
        path.write_bytes(zipped((top + file.replace('/', separator), encoded(picture(k)))
                                for k, file in enumerate(files)))
        paths.append(path)
    for split, labels in zip(('train', 'test'), LAYOUTS[names]):
        loaded = [load_images(path, split=split) for path in paths]
        for images in loaded:
            assert images.identity == loaded[0].identity
            assert digits_of(images.labels) == labels
        lines = capsys.readouterr().out.splitlines()
        says_split = split == 'test' or names in WITH_SPLITS
        assert len(lines) == (len(paths) if says_split else 0)
        assert all('split' in line for line in lines)
        if 'seg' in names:
            assert 'without 1 images beside seg_test, seg_train' in lines[0]


def test_layout__what_lies_beside_the_pictures_of_a_split_is_not_counted():
    names = 'train/images/0.png train/masks/0.png val/images/1.png val/masks/1.png'.split()
    paths, splits, notes = foreign.layout({name: name.split('/') for name in names})
    assert paths == {'train/images/0.png': ['0.png'], 'val/images/1.png': ['1.png']}
    assert splits == {'train/images/0.png': 'train', 'val/images/1.png': 'val'}
    assert notes == ["without 2 images beside images (first: 'train/masks/0.png')"]


def test_list_images__a_set_of_nothing_to_train_on_is_refused(tmp_path):
    pictures(tmp_path / 'set', 'test/a.png', 'val/b.png')
    load_refuses('holds test and val, but nothing to train on', tmp_path / 'set')
    assert len(load_images(tmp_path / 'set', split='test')) == 1


@pytest.mark.parametrize('is_zip', [False, True])
def test_list_images__counts_what_it_passes_over(tmp_path, capsys, is_zip):
    names = ['a.jfif', 'b.HEIC', 'c.heic', 'd.AVIF', 'readme', '.hidden', 'dataset.json']
    files = {name: b'' for name in names} | {'a.jfif': encoded(picture(), 'JPEG')}
    root = pictures(tmp_path / 'set', 'e.png')
    for name, raw in files.items():
        (root / name).write_bytes(raw)
    if is_zip:
        entries = [(file.name, file.read_bytes()) for file in root.iterdir()]
        root = tmp_path / 'a.zip'
        root.write_bytes(zipped([('empty/', b''), *entries]))
    images = load_images(root)
    assert len(images) == 2  # .jfif is JPEG
    note = 'passed over 4 of 7 files (2 .heic, 1 .avif, 1 no ending)'
    assert capsys.readouterr().out == f'--dataset {root}: {note}\n'

    (tmp_path / 'none').mkdir()
    (tmp_path / 'none' / 'b.heic').write_bytes(b'')
    load_refuses(r'no images in it, .*passed over 1 of 1 files \(1 .heic\)', tmp_path / 'none')


def test_files_below__follows_links_but_not_in_circles(tmp_path):
    pictures(tmp_path, 'store/cat/0.png', 'store/dog/0.png', 'set/fox/0.png')
    links = {
        'set/cat': '../store/cat',
        'set/dog': tmp_path / 'store/dog',
        'set/loop': '.',
        'set/up': '..',
        'set/root': '/',
        'set/gone': 'nowhere',
        'set/fox/up': '..',
        'set/fox/1.png': '../../store/cat/0.png',
        'store/cat/dog': '../dog',  # these two lead round and round
        'store/dog/cat': '../cat',
    }
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    images = load_images(tmp_path / 'set')
    assert images.classes == ['cat', 'dog', 'fox']
    assert set(images.labels.tolist()) == {0, 1, 2}
    assert len(images) < 8


# ---------------------------------------------------------------- labels

FIRST = '00000/img00000000.png'
SECOND = '00001/img00001000.png'


@pytest.mark.parametrize('table, labels', [
    ({FIRST: 1, SECOND: 0}, [1, 0]),
    ({FIRST: 'dog', SECOND: 'cat'}, [1, 0]),
    (None, 'null'),
    ('no', 'cannot be read'),
    ({'a.png': 1}, 'no labels'),
    ({FIRST: 1}, 'no label for 1 of 2'),
    ({FIRST: .5, SECOND: 0}, 'float64 labels'),
    ({FIRST: 'dog', SECOND: [0]}, 'no labels'),
    ({FIRST: [0, 1], SECOND: [1, 0]}, 'one-hot: give their argmax'),
    ({FIRST: [1, 1], SECOND: [1, 0]}, 'several an image'),
])
def test_table_labels__dataset_json_is_used_or_what_is_wrong_is_said(tmp_path, table, labels):
    if isinstance(table, dict):
        table = list(table.items())
    entries = [(FIRST, encoded(picture())), (SECOND, encoded(picture(1))),
               ('dataset.json', json.dumps({'labels': table}).encode())]
    for path, top in ((tmp_path / 'b.zip', ''), (tmp_path / 'a.zip', 'set/')):
        path.write_bytes(zipped((top + name, raw) for name, raw in entries))
        images = load_images(path)
        assert len(images) == 2
        if isinstance(labels, str):
            assert images.labels is None and labels in images.unlabelled
        else:
            assert images.labels.tolist() == labels
    if isinstance(labels, str):  # labels refuse a set only where they are wanted
        refuses(['train.py', *TINY, '--classes', '--dataset', tmp_path / 'a.zip',
                 '--out_dir', tmp_path / 'o'], f'--classes: .*a.zip has .*{labels}')


# ---------------------------------------------------------------- arrays

@pytest.mark.parametrize('channels', [1, 3, 4])
@pytest.mark.parametrize('kind', ['uint8', 'float16', 'float32', 'float64', 'signed'])
def test_read_arrays__keeps_every_pixel_of_any_layout_and_type(tmp_path, capsys, channels, kind):
    pixels = np.random.default_rng(0).integers(0, 256, (5, channels, 6, 6), dtype=np.uint8)
    pixels.flat[:2] = 0, 255
    pixels[:, 3:] = 255  # opaque
    if kind == 'signed':
        stored = (pixels / 127.5 - 1).astype(np.float32)
    elif kind == 'uint8':
        stored = pixels
    else:
        stored = (pixels / 255).astype(kind)
    layouts = [stored, np.moveaxis(stored, 1, 3)]
    if channels == 1:
        layouts.append(stored[:, 0])
    for array in layouts:
        images = array_set(tmp_path, array)
        assert np.array_equal(images.pixels, pixels[:, :3])
        assert images.pixels.is_contiguous()
    assert capsys.readouterr().out == ''
    assert array_set(tmp_path, stored, image_size=4).pixels.shape[2:] == (4, 4)

    x = to_float(images.pixels)
    assert x.dtype == torch.float32 and (x.min(), x.max()) == (-1, 1)
    assert torch.equal(to_uint8(x), images.pixels)
    assert to_uint8(3 * x.sign()).unique().tolist() == [0, 255]


@pytest.mark.parametrize('array, pixels, note', [
    ([[[-1e-7, 0.2], [0.4, 1]]], [0, 51, 102, 255], '1 values up to 1.0e-07 beyond [0, 1] clipped'),
    ([[[-1, -0.6], [0.2, 1.0005]]], [0, 51, 153, 255], 'beyond [-1, 1]'),
    (np.full((9, 2, 2), 15, np.uint8), [15] * 4, 'nearly black, no value above 15 of 255'),
    (np.full((9, 2, 5), 99, np.uint8), [99] * 4, '9 of 9 images cropped to the centre square'),
])
def test_read_arrays__what_is_done_to_an_array_is_said_in_one_line(tmp_path, capsys, array, pixels,
                                                                   note):
    assert array_set(tmp_path, array)[0].flatten().tolist() == pixels
    out = capsys.readouterr().out
    assert note in out and out.count('\n') == 1


@pytest.mark.parametrize('array, mend', [
    ([[[np.nan]]], 'nan'),
    ([[[-1.5, 1]]] * 2, '-1.5'),
    ([[[0, 1.1], [0, 0]]], '1.1'),
    ([[[-0.05, 0], [0, 1]]], 'not in .* scale them'),
    (np.r_[-0.9, np.ones(399)].reshape(1, 20, 20), '0.25 % of them below 0: not in'),
    (np.zeros((2, 4, 4), int), 'int64; give uint8'),
    (np.zeros((2, 4, 4), object), '[Oo]bject'),
    (np.zeros((0, 4, 4)), 'shape'),
    (np.zeros((4, 4)), 'shape'),
    (np.zeros((8, 8, 40)), r'moveaxis\(x, -1, 0\)'),
    (np.zeros((8, 8, 3, 40)), 'moveaxis'),
    (np.zeros((9, 12, 3)), r'one image\? give x\[None\]'),
])
def test_read_arrays__unusable_arrays_are_refused_with_the_mend(tmp_path, array, mend):
    np.save(tmp_path / 'a.npy', array)
    np.savez(tmp_path / 'a.npz', x=array)
    for name in ('a.npy', 'a.npz'):
        load_refuses(f'{mend}.*; accepted: glyphs', tmp_path / name)


def test_read_arrays__keys_of_a_npz_say_which_split_and_which_labels(tmp_path):
    path = tmp_path / 'a.npz'
    x = np.zeros((3, 4, 4), np.uint8)

    np.savez(path, x=x, y=np.arange(3))
    assert load_images(path).labels.tolist() == [0, 1, 2]
    assert load_images(path, split='test').labels.tolist() == [0, 1, 2]
    np.savez(path, arr_0=x)
    assert load_images(path).labels is None
    assert load_images(path, split='test').labels is None
    np.savez(path, train_images=x, train_labels=[[1]] * 3, test_images=x[:2], test_labels=[[0]] * 2)
    assert load_images(path).labels.tolist() == [1, 1, 1]
    assert load_images(path, split='test').labels.tolist() == [0, 0]

    np.savez(path, other=x)
    load_refuses('other', path)
    np.savez(path, x=x, y=np.arange(2))  # refused only where they are wanted
    images = load_images(path)
    assert images.labels is None and '(2,) for 3 images' in images.unlabelled


# ---------------------------------------------------------------- hostile files

def files_to_use():
    """{name: bytes} of images, zips and arrays that are odd, but can be used."""
    grey = np.zeros((3, 8, 8), np.uint8)
    whole = encoded(picture())
    bilevel = picture().convert('1')
    return {
        'one.png': encoded(picture(0, 1)),
        'long.png': encoded(Image.new('L', (30000, 1), 7)),
        'alpha.png': encoded(picture().convert('P'), transparency=bytes(range(256))),
        'jpeg.png': encoded(picture(), 'JPEG'),
        'good.zip': zipped([('a.png', whole)]),
        'good.npz': zipped([('x.npy', written(np.save, grey))]),
        'film.gif': encoded(picture(), 'GIF', save_all=True, append_images=[picture(2)]),
        'g4.tiff': encoded(bilevel, 'TIFF', compression='group4'),
        'up.zip': zipped([('../a.png', b''), ('/etc/a.png', whole), ('b/../../c.png', b'')]),
        # labels that nobody asked for never refuse a set
        'objects.npz': written(np.savez, x=grey, y=np.array([{}, 1, 2])),
        'words.npz': written(np.savez, x=grey, y=list('abc')),
    }


def files_to_refuse():
    """{name: bytes} of images, zips and arrays that are broken, or lie."""
    whole = encoded(picture())
    grey = written(np.save, np.zeros((3, 8, 8), np.uint8))
    one = zipped([('a.png', whole)])
    npz = zipped([('x.npy', grey)])
    nan = Image.fromarray(np.full((8, 8), np.nan, np.float32))
    files = {
        'half.png': whole[:80],
        'zero.png': png_of(0, 0),
        'bomb.png': png_of(60000, 60000),
        'wide.png': png_of(2 ** 31 - 1, 1),
        'a\nb.png': b'two\nlines',
        'zip.png': one,
        'nan.tif': encoded(nan, 'TIFF'),
        'eps.png': b'%!PS-Adobe-3.0 EPSF-3.0\n(x) (w) file\n',
        'nested.zip': zipped([('b.zip', one)]),
        'none.zip': zipped([]),
        'tail.zip': one[:-40],
        'secret.zip': encrypted(one),
        'bz.zip': zipped([('a.png', whole)], zipfile.ZIP_BZIP2),
        'lying.zip': patched(zipped([('a.png', bytes(2 ** 24))]), CENTRAL, 24, '<I', 100),
        'huge.zip': patched(one, CENTRAL, 24, '<I', 2 ** 31),
        'crc.zip': patched(one, CENTRAL, 16, '<I', 1),
        'crc.npz': patched(npz, CENTRAL, 16, '<I', 1),
        'half.npy': grey[:150],
        'liar.npz': zipped([('x.npy', claims((10 ** 12, 32, 32)))]),
        'pickle.npy': pickle.dumps(Payload()),
        'payload.npy': written(np.save, [[[Payload()]]]),
    }
    headers = [((10 ** 12, 32, 32),), ((-1, 8, 8),), (None,), ((1,) * 40,), ((1, 2, 2), '|O'),
               ((1, 2, 2), '<c8'), ((1, 2, 2), '|V1000000000'), ((1, 2, 2), '__import__("os")')]
    for k, header in enumerate(headers):
        files[f'claim{k}.npy'] = claims(*header)
    return files


def is_used(path):
    """Whether load_images() uses the set: if so it is a sound one, and if not it is refused in one
    line that names it."""
    try:
        with limited(20, 3):
            images = load_images(path)
    except BadInput as error:
        name = re.escape(' '.join(str(path).split()))
        assert re.fullmatch(f'--dataset {name}: .*', str(error))
        return False
    finally:
        for archive in foreign.ZIPS.values():
            archive.close()
        foreign.ZIPS.clear()
    n = len(images)
    side = images.image_size
    assert n > 0 and images.channels in (1, 3)
    assert images.pixels.shape == (n, images.channels, side, side)
    assert images.pixels.dtype == torch.uint8
    assert images.labels is None or images.labels.shape == (n,)
    return True


def check(folder, name, expected, capsys):
    """The set of this name in the folder, or else the folder, is used or not as expected (None:
    either), and no more than a line is said of it on stderr."""
    is_set = name.endswith(('.zip', '.npy', '.npz'))
    used = is_used(folder / name if is_set else folder)
    assert expected in (used, None), name
    assert len(capsys.readouterr().err.splitlines()) <= 1, name


def test_load_images__odd_files_are_used_and_hostile_ones_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    used = files_to_use()
    files = used | files_to_refuse()
    for k, (name, raw) in enumerate(files.items()):
        folder = tmp_path / str(k)
        folder.mkdir()
        (folder / name).write_bytes(raw)
        check(folder, name, name in used, capsys)
    assert len(os.listdir(tmp_path)) == len(files)  # nothing ran, nothing was written


@pytest.mark.parametrize('beside_an_image', [False, True])
@pytest.mark.parametrize('kind', ['folder', 'pipe', 'absent', 'a.png', '/dev/zero', '..'])
def test_load_images__what_is_no_file_is_passed_over(tmp_path, capsys, kind, beside_an_image):
    """A folder, a named pipe, or a link to this target, that is called a.png."""
    folder = tmp_path / 'set'
    folder.mkdir()
    if beside_an_image:
        picture().save(folder / 'good.png')
    if kind == 'folder':
        (folder / 'a.png').mkdir()
    elif kind == 'pipe':
        os.mkfifo(folder / 'a.png')
    else:
        (folder / 'a.png').symlink_to(kind)
    check(folder, 'a.png', beside_an_image, capsys)


@pytest.mark.parametrize('count', [100, pytest.param(1500, marks=pytest.mark.slow)])
def test_load_images__damaged_files_are_used_rightly_or_refused(tmp_path, capsys, monkeypatch,
                                                                count):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    files = files_to_use()
    for k, name in enumerate(rng.choice(list(files), count).tolist()):
        folder = tmp_path / str(k)
        folder.mkdir()
        (folder / name).write_bytes(mutated(files[name], rng))
        check(folder, name, None, capsys)
    assert len(os.listdir(tmp_path)) == count  # nothing ran, nothing was written


@pytest.mark.slow
@pytest.mark.parametrize('path, name', [('a.zip', 'a.png'), ('a.npz', 'x.npy')])
@pytest.mark.parametrize('packing', [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_open_entry__bombs_take_no_memory(tmp_path, path, name, packing):
    """An entry of 640 MB of zeros, and the same zip, which says that it has 100 bytes."""
    path = tmp_path / path
    with zipfile.ZipFile(path, 'w', packing) as archive, archive.open(name, 'w') as file:
        if name == 'x.npy':
            file.write(claims((40 << 18, 8, 8))[:-64])
        for _ in range(40):
            file.write(bytes(2 ** 24))
    raw = path.read_bytes()
    for bomb in (raw, patched(raw, CENTRAL, 24, '<I', 100)):
        path.write_bytes(bomb)
        with limited(60, 0.5), pytest.raises(BadInput) as refusal:
            load_images(path)
        assert not re.search('MemoryError|allocate', str(refusal.value))
