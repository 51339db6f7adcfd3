"""sample.py: which images it makes, of what they depend, and the special pictures."""
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from support import sample_files, sets
from support.batches import Charges
from support.flow import Flow
from support.tests.common import HERE, close, refuses, said, sampled, script, seeded

DATA = Path(__file__).parent / 'data'


def test_parse_args__says_the_default_of_every_flag(capsys):
    with pytest.raises(SystemExit):
        sample.parse_args(['--help'])
    help = capsys.readouterr().out.partition('options:')[2]
    flags = re.split(r'\n  (?=--)', help.replace('one at a time (default: none of them)', ''))[1:]
    assert len(flags) > 25
    pictures = ('--gif', '--interpolate', '--rescale', '--encode', '--inpaint', '--colorize')
    for flag in flags:
        assert 'default' in flag or flag.startswith(pictures), flag


# ---------------------------------------------------------------- which images

@pytest.mark.parametrize('flags', ['--exact', '--nfe 5', '--solver ddim --eta 1 --nfe 5'])
def test_make_images__an_image_depends_on_seed_and_index_only(flags, trained, straight, few_glyphs,
                                                              here):
    network = ['--ckpt', straight if 'ddim' in flags else trained, '--no-bf16']
    if 'exact' in flags:
        network = []

    def made(n, batch_size, seed=0):
        return sampled('a.npz', *network, *flags.split(), '--n', n,
                       '--batch_size', batch_size, '--seed', seed)

    six = made(6, 6)
    assert six.shape == (6, 16, 16, 1)
    assert len(np.unique(six, axis=0)) == 6
    for n, batch_size in ((6, 4), (3, 1)):
        assert abs(made(n, batch_size) - six[:n]).max() <= 1  # rounding to grey levels
    assert abs(made(6, 6, seed=1) - six).max() > 1


@pytest.mark.slow
def test_write_images__processes_share_the_images(trained, here):
    flags = ['--ckpt', str(trained), *'--n 5 --nfe 3 --device cpu'.split()]
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--']
    two = subprocess.run([*torchrun, HERE / 'sample.py', *flags, '--out', 'two.npz'],
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert two.returncode == 0, two.stdout
    assert abs(sampled('one.npz', *flags) - np.load('two.npz')['arr_0'].astype(int)).max() <= 1


def test_images_to_make__are_those_that_are_missing_or_cannot_be_read(trained, here):
    command = ['sample.py', '--ckpt', trained, *'--n 6 --nfe 2 --device cpu --out made'.split()]
    script(command)
    before = {path: path.read_bytes() for path in Path('made').glob('*.png')}
    first, second, third, fourth, *_ = sorted(before)
    first.write_bytes(before[first][:60])
    second.write_bytes(b'')
    Image.new('RGB', (16, 16)).save(third)
    fourth.unlink()
    out = said(command)
    assert 'made: 3 images that cannot be read are made anew' in out
    assert 'made: 2 of 6 images are there; making the others' in out
    for path, content in before.items():
        assert path.read_bytes() == content
    assert 'anew' not in said(command)


def test_write_images__are_files_as_they_are_made_and_only_missing_ones_are_made_again(
        trained, tmp_path, monkeypatch):
    flags = ['--device', 'cpu', '--ckpt', trained / 'ckpt.pt', '--nfe', 3, '--batch_size', 2, '--n']
    whole = sampled(tmp_path / 'whole.npz', *flags, 7)
    follow = Flow.follow
    sizes = []  # of the batches that were followed

    def stopped(flow, x, *more):
        sizes.append(len(x))
        if len(sizes) == 3:
            raise KeyboardInterrupt
        return follow(flow, x, *more)

    monkeypatch.setattr(Flow, 'follow', stopped)
    for name in ('a.npz', 'b.png', 'folder'):
        sizes.clear()
        command = ['sample.py', '--out', tmp_path / name, *flags]
        with pytest.raises(SystemExit, match='130'):
            script([*command, 7])
        assert not (tmp_path / name).is_file()
        script([*command, 7])
        assert sum(sizes) == 2 + 2 + 2 + 3  # the batch that was stopped was begun in vain
    assert np.array_equal(np.load(tmp_path / 'a.npz')['arr_0'], whole)
    made = sample_files.read_images(sorted(tmp_path.glob('folder/*.png')))
    assert np.array_equal(made.permute(0, 2, 3, 1), whole)
    assert sorted(os.listdir(tmp_path)) == ['a.npz', 'b.png', 'folder', 'whole.npz']
    script([*command, 9])
    assert sizes[-1] == 2 and sum(sizes) == 9 + 2


def test_claim__refuses_a_folder_of_other_settings_or_of_a_stranger(trained, tmp_path):
    folder = tmp_path / 'folder'
    command = ['sample.py', '--device', 'cpu', '--ckpt', trained / 'ckpt.pt',
               *'--nfe 3 --n 3 --out'.split()]
    script([*command, folder])
    for flag, value in (('seed', 1), ('weights', 'raw'), ('solver', 'euler')):
        refuses([*command, folder, f'--{flag}', value], f'made with {flag} ')
    (folder / sample_files.MARK).write_text('[1]')
    for stranger in (tmp_path, folder):
        refuses([*command, stranger], 'does not say what made it')


def test_check_out__refuses_what_cannot_be_written(tmp_path):
    (tmp_path / 'c.png').mkdir()
    (tmp_path / 'file').touch()
    command = ['sample.py', '--exact', '--device', 'cpu', '--out']
    for name in ('c.png', 'file', 'a.jpg'):
        refuses([*command, tmp_path / name], f'--out .*{name}: must be a file .*a folder that does '
                'not')
    refuses([*command, tmp_path / 'no/a.png'], '--out .*: no folder .*; make it with: mkdir -p ')


@pytest.mark.slow
def test_make_images__a_compiled_network_makes_the_same(trained, here):
    flags = ['--ckpt', trained, *'--n 5 --nfe 4 --batch_size 4 --no-bf16'.split()]
    assert abs(sampled('a.npz', *flags) - sampled('b.npz', *flags, '--compile')).max() <= 1


@pytest.mark.parametrize('flags, patterns', [
    ('--exact --n 4', ['4 of 4 samples are images of glyphs to within a grey level']),
    ('--encode glyphs --n 1 --tol 1e-5', [r'mean error \d\.\d+e-(0[4-9]|[1-9])']),
    (f'--ckpt {DATA}/ckpt_cifar10_tiny.pth --n 4 --nfe 6',
     ['small_z official', 'upper_norm 3000', 'z_exp 5'])],
    ids=['of the exact field', 'up and down again', 'of an authors file their way'])
def test_sample__makes_what_it_should(flags, patterns, trained, few_glyphs, here):
    network = [] if 'exact' in flags else ['--ckpt', trained]
    out = said(['sample.py', *network, '--device', 'cpu', '--verbose', *flags.split()])
    for pattern in patterns:
        assert re.search(pattern, out), out


def test_fit_to_mode__images_are_of_all_classes_in_turn_and_those_that_are_given_of_any(
        straight, here):
    Image.fromarray(sets.load_images('glyphs').pixels[0, 0].numpy()).save('0.png')
    command = ['sample.py', '--ckpt', straight, *'--device cpu --verbose --nfe 1'.split()]
    between = '--interpolate 0.png 0.png'
    inpaint = '--inpaint 0.png --mask 0.png'
    for flags, labels in (
            ('--n 8', list(range(10))), ('--n 8 --classes 3,4', [3, 4]),
            ('--n 8 --rescale', sorted(8 * list(range(10)))),
            (between, []), (f'{between} --classes 3,4', 8 * [3]),
            (inpaint, []), (f'{inpaint} --classes 3,4', [3, 4])):
        out = said([*command, *flags.split()])
        assert f'  classes {labels}  ' in out and 'z_max 999  ' in out


def test_write_picture__gives_each_class_a_column(straight, here):
    script(['sample.py', '--ckpt', straight, *'--device cpu --nfe 1 --n 20'.split()])
    assert Image.open('samples.png').size == (10 * 68 + 4, 2 * 68 + 4)


# ---------------------------------------------------------------- special pictures

def test_encode__pictures_come_back_and_are_the_ends_of_an_interpolation(trained, tmp_path):
    digits = sets.load_images()[:2, 0].numpy()
    first, last = tmp_path / '0.png', tmp_path / '1.png'
    for path, digit in zip((first, last), digits):
        Image.fromarray(digit).save(path)
    flags = ['--ckpt', trained / 'ckpt.pt', '--tol', '1e-4']
    command = ['sample.py', *flags, '--device', 'cpu', '--out', tmp_path / 'a.png']
    assert '1 images: mean error' in said([*command, '--encode', first])
    made = sampled(tmp_path / 'b.npz', *flags, '--interpolate', first, last)[..., 0]
    assert len(made) == 8
    # z_min is not the plane of the data, but near it.
    assert (abs(made[[0, -1]] - digits).mean((1, 2)) < 2).all()
    refuses([*command, '--interpolate', first], '--interpolate .*0.png: give two')
    refuses([*command, '--encode', tmp_path / 'no.png'], '^--encode .*no.png: no such')


def restored_images(path, images, results):
    """The uint8 (images, 2 + results, 8, 8, 3) of a picture of restore(), of images of 8 pixels."""
    grid = torch.from_numpy(np.array(Image.open(path))).int()[4:, 4:]  # without the first border
    cells = grid.view(images, 68, 2 + results, 68, 3)
    return cells[:, :64:8, :, :64:8].transpose(1, 2)                   # each pixel is drawn 8 x 8


@pytest.fixture
def ambiguous(here):
    """Two sets of 24 images (24, 8, 8, 3), those for --inpaint and those for --colorize: what is
    kept of image i fits the images i and i + 12. And mask.png, white in the two rows below."""
    grey = torch.randint(60, 196, (24, 8, 8, 1), generator=seeded()).expand(-1, -1, -1, 3).clone()
    grey[12:] = grey[:12]
    grey[12:, 6:] = grey[12:, 6:].flip(0)                       # another image's two rows below
    tint = torch.randint(-25, 26, (24, 8, 8, 3), generator=seeded(1))
    tinted = grey[:12].repeat(2, 1, 1, 1) + tint - tint.roll(1, 3)     # of mean 0
    mask = Image.new('L', (8, 8))
    mask.save('none.png')
    Image.new('L', (8, 8), 'white').save('all.png')
    mask.paste(255, (0, 6, 8, 8))
    mask.save('mask.png')
    return grey, tinted


@pytest.mark.parametrize('flags', ['--inpaint x.npy --mask mask.png', '--colorize x.npy'])
def test_restore__keeps_what_is_known_and_makes_images_that_fit(flags, ambiguous):
    """In the exact field the samples are its charges: for each part that is kept two of them."""
    charges = ambiguous[0] if 'inpaint' in flags else ambiguous[1]
    np.save('x.npy', charges.to(torch.uint8).numpy())
    script(['sample.py', *'--exact --device cpu --dataset x.npy'.split(), *flags.split(),
            *'--nfe 40 --z_min 1e-3 --n 16 --out a.png'.split()])
    for i, row in enumerate(restored_images('a.png', 8, 16)):  # the image, what is kept, 16 results
        fits = charges[[i, i + 12]]
        error = (row[:, None] - fits).abs().amax((2, 3, 4))    # (18, 2)
        assert error[0, 0] == 0
        assert (error[2:].amin(1) <= 1).all(), i
        assert len(error[2:].argmin(1).unique()) == 2, i


def test_restore__each_image_has_its_own_mask(here):
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    np.save('x.npy', images)
    for folder in ('images', 'masks'):
        os.mkdir(folder)
    for k in range(9):
        Image.fromarray(images[k]).save(f'images/{k}.png')
        mask = Image.new('L', (8, 8), 255)
        mask.paste(0, (0, 0, 8, k % 7 + 1))
        mask.save(f'masks/{k}.png')
    out = said(['sample.py', *'--exact --device cpu --dataset x.npy --inpaint images'.split(),
                *'--mask masks --nfe 3 --n 1 --out a.png'.split()])
    assert '1 results of each of 8 images, the first of 9' in out
    for k, (image, kept, _) in enumerate(restored_images('a.png', 8, 1)):
        rows = k % 7 + 1
        assert torch.equal(kept[:rows], image[:rows])
        assert (kept[rows:] == 128).all()  # 0 in [-1, 1]


def test_in_range__keeps_the_grey_that_clipping_would_change():
    image = torch.rand(1, 3, 8, 8, generator=seeded()) * 2 - 1
    x = 2 * torch.randn(5, 3, 8, 8, generator=seeded(1))
    clipped = (x + sample.grey(image - x)).clamp(-1, 1)
    assert (clipped - image).mean(1).abs().max() * 127.5 > 40  # grey levels
    x = sample.in_range(x, sample.grey, image)
    assert x.abs().max() <= 1
    close((x - image).mean(1), torch.zeros(5, 8, 8), atol=1e-6)


def test_write_gif__ends_in_the_picture_that_is_saved(trained, here):
    command = ['sample.py', '--ckpt', trained, *'--device cpu --n 4 --nfe 3 --solver euler'.split()]
    script([*command, '--out', 'a.png'])
    script([*command, '--out', 'a.gif'])
    film = Image.open('a.gif')
    assert film.n_frames == 4
    film.seek(film.n_frames - 1)
    last = np.asarray(film.convert('L')).astype(int)
    picture = np.asarray(Image.open('a.png').convert('L')).astype(int)
    assert abs(last - picture).max() <= 1


def test_restore__refuses_flags_that_do_not_fit(ambiguous):
    np.save('x.npy', ambiguous[1].to(torch.uint8).numpy())
    for flags, message in (
            ('--dataset glyphs --colorize glyphs', 'glyphs: the images .* are grey'),
            ('--colorize x.npy --solver rk45', '--solver rk45'),
            ('--colorize x.npy --mask mask.png', '--inpaint and --mask belong together'),
            ('--inpaint x.npy --mask none.png', '--mask none.png: nothing in it is white'),
            ('--inpaint x.npy --mask all.png', '--mask all.png: nothing in it is black, to be kept')):
        refuses(['sample.py', *'--exact --device cpu --dataset x.npy'.split(), *flags.split()],
                message)


def test_main__says_the_flow_in_one_line_and_the_rest_with_verbose(trained, here):
    command = ['sample.py', '--ckpt', trained, *'--device cpu --n 1 --nfe 3'.split()]
    assert said(command).splitlines()[0] == 'pfgm, D 1, unipc, 3 network calls an image, seed 0'
    words = said([*command, '--verbose']).splitlines()[1]
    assert 'z_max 3' in words and 'batch_size 256' in words


def test_encode__says_that_its_error_comes_of_few_calls(trained, here):
    command = ['sample.py', '--ckpt', trained, *'--device cpu --encode glyphs --n 1'.split()]
    assert 'comes of few network calls' in said([*command, '--nfe', 4])


def test_write_picture__pairs_are_not_parted(monkeypatch):
    nrows = []
    monkeypatch.setattr(sample, 'write_grid', lambda flag, path, pixels, nrow: nrows.append(nrow))
    pixels = torch.zeros(9, 1, 8, 8, dtype=torch.uint8)
    flow = SimpleNamespace(classes=(), source=Charges(pixels))
    for n in (1, 3, 5, 9):
        sample.write_picture(flow, 'a.png', pixels[:n], in_rows=False)
    assert nrows == [2, 4, 4, 6]
