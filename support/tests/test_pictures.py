"""Grids, strips and plots."""
import math
import os

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.utils import make_grid

from support.cli import BadInput
from support.pictures import Axis, check_png, grid_of, plot, strip, write_grid
from support.tests.common import seeded


def test_grid_of__enlarges_small_images_by_whole_factors():
    pixels = torch.randint(0, 256, (5, 1, 24, 24), generator=seeded()).to(torch.uint8)
    grid = grid_of(pixels)  # three a row, 72 pixels each, 4 between and around them
    assert grid.size == (3 * 76 + 4, 2 * 76 + 4)
    first = np.asarray(grid)[4:76, 4:76, 0]
    assert np.array_equal(first, pixels[0, 0].numpy().repeat(3, 0).repeat(3, 1))
    assert grid_of(pixels, nrow=5).size == (5 * 76 + 4, 76 + 4)
    assert grid_of(torch.zeros(2, 3, 100, 100, dtype=torch.uint8)).size == (2 * 104 + 4, 108)


@pytest.mark.parametrize('channels', [1, 3])
def test_grid_of__is_the_grid_of_torchvision(channels):
    pixels = torch.randint(0, 256, (7, channels, 64, 64), generator=seeded()).to(torch.uint8)
    for nrow in (3, 7, 9):
        grid = make_grid(pixels, nrow, padding=4, pad_value=128)
        assert np.array_equal(grid_of(pixels, nrow), grid.permute(1, 2, 0))


def test_write_grid__writes_that_picture(here):
    pixels = torch.randint(0, 256, (4, 3, 64, 64), generator=seeded()).to(torch.uint8)
    write_grid('--out', 'a.png', pixels)
    assert np.array_equal(Image.open('a.png'), grid_of(pixels))


def test_axis__marks_round_values_and_is_logarithmic_over_a_decade():
    axis = Axis([0, 1, 4], 100, 200)
    assert axis.marks == [0, 1, 2, 3, 4]
    assert axis.position(2) == 150
    assert 100 < axis.position(0) < axis.position(4) < 200
    axis = Axis([2, 50], 560, 30)  # upwards
    assert axis.marks == [2, 5, 10, 20, 50]
    assert axis.position(10) == pytest.approx(560 - 530 / 2)  # sqrt(2 * 50) = 10
    assert Axis([3, 3], 0, 10).position(3) == pytest.approx(5)
    assert len(Axis([0, 0], 0, 10).marks) > 1


def test_plot__draws_each_curve_through_its_points(here, capsys):
    plot({'a': [(1, 1.0), (2, 3.0)], 'b': [(1, 2.0), (2, 2.5)]}, 'title', 'x', 'y', 'p.png')
    assert capsys.readouterr().out == 'wrote p.png\n'
    image = np.asarray(Image.open('p.png'))
    assert image.shape[0] == 640 and image.shape[1] > 960
    x = Axis([1, 2], 110, 930)
    y = Axis([1, 3], 560, 50)
    for point, colour in (((1, 1.0), (0x1f, 0x5f, 0xbf)), ((2, 2.5), (0xd1, 0x40, 0x2f))):
        spot = image[round(y.position(point[1])), round(x.position(point[0]))]
        assert tuple(spot) == colour
        # The legend is outside the frame, where no curve can be.
        assert (image[:, 950:] == colour).all(2).any()
    assert (image[10:40, 400:600] == 0).any()  # the title


def test_plot__leaves_out_what_is_not_finite_and_says_so(here, capsys):
    plot({'a': [(1, 2), (2, math.nan), (3, 4)], 'b': [(1, math.inf)]}, 'A', 'x', 'y', 'a.png')
    assert capsys.readouterr().out.splitlines() == [
        'a.png: leaves out what is no finite number, of a, b', 'wrote a.png']
    plot({'a': [(1, 2), (3, 4)]}, 'A', 'x', 'y', 'b.png')
    assert np.array_equal(Image.open('a.png'), Image.open('b.png'))
    plot({'a': [(1, math.nan)]}, 'A', 'x', 'y', 'c.png')
    assert not os.path.exists('c.png')


def test_strip__has_a_row_of_samples_for_each_name(here):
    rows = {name: torch.full((2, 1, 64, 64), value, dtype=torch.uint8)
            for name, value in (('first', 50), ('second', 200))}
    strip(rows, ['nfe 5', 'nfe 10'], 's.png')
    image = np.asarray(Image.open('s.png'))
    grid = grid_of(torch.cat(list(rows.values())), 2)
    assert image.shape[0] == grid.height + 30 and image.shape[1] > grid.width + 20
    assert np.array_equal(image[30:, -grid.width:], grid)


def test_check_png__refuses_other_names_and_folders_that_are_not_there(here):
    check_png('--out', 'a.png')
    with pytest.raises(BadInput, match='--out a.gif: a picture; must end in .png'):
        check_png('--out', 'a.gif')
    with pytest.raises(BadInput, match='--out no/a.png: no folder no; make it with: mkdir -p no'):
        check_png('--out', 'no/a.png')
