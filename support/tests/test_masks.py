"""Masks of --inpaint: which belongs to which image, and what is refused."""
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from support.cli import BadInput
from support.masks import load_masks
from support.sets import load_pictures
from support.tests.made import pictures


def white_below(row, side=8):
    """A mask that keeps the rows above this one."""
    mask = Image.new('L', (side, side), 255)
    mask.paste(0, (0, 0, side, row))
    return mask


def rows_kept(kept):
    """How many of the rows of each mask (n, 1, S, S) are kept; they must be whole ones."""
    assert torch.equal(kept, kept[..., :1].expand_as(kept))
    return kept[:, 0, :, 0].sum(1).tolist()


@pytest.fixture
def given(here):
    """Three images, in the folder images, and an empty folder masks."""
    os.mkdir('masks')
    pictures(Path('images'), 'a.png', 'b.png', 'c.png')
    return load_pictures('images', 'data', 8, 3, 8, '--inpaint')


@pytest.mark.parametrize('names, rows, line', [
    ('a b c', [1, 2, 3], ''), ('c b a', [1, 2, 3], ''), ('a_mask b-Mask c', [1, 2, 3], ''),
    ('a b bb c', [1, 2, 4], ''),  # masks of more images
    ('x', [1, 1, 1], ''),
    ('x y z', [1, 2, 3], "paired with the images in order.*first: 'x.png' with 'a.png'")])
def test_load_masks__are_one_an_image_by_name_or_in_order_or_one_for_all(
        given, capsys, names, rows, line):
    for k, name in enumerate(sorted(names.split())):
        white_below(k + 1).save(f'masks/{name}.png')
    assert rows_kept(load_masks('masks', given, 'data')) == rows
    out = capsys.readouterr().out
    assert re.search(line, out) if line else out == ''


def test_load_masks__follow_the_names_where_an_image_cannot_be_read(given):
    for k, name in enumerate('abc'):
        white_below(k + 1).save(f'masks/{name}.png')
    Path('images/b.png').write_text('broken')
    given = load_pictures('images', 'data', 8, 3, 8, '--inpaint')
    assert rows_kept(load_masks('masks', given, 'data')) == [1, 3]
    for name in 'abc':
        os.rename(f'masks/{name}.png', f'masks/x{name}.png')
    assert rows_kept(load_masks('masks', given, 'data')) == [1, 3]


def test_load_masks__of_arrays_are_paired_in_order(given):
    masks = np.stack([np.asarray(white_below(k)) for k in (5, 6, 7)])
    np.save('masks.npy', masks)
    assert rows_kept(load_masks('masks.npy', given, 'data')) == [5, 6, 7]
    np.save('masks.npy', masks[:2])
    with pytest.raises(BadInput, match='--mask masks.npy: 2 masks for 3 images, with other names'):
        load_masks('masks.npy', given, 'data')


@pytest.mark.parametrize('side, row, kept', [(2, 1, 4), (4, 3, 6), (16, 4, 2), (80, 20, 2)])
def test_load_masks__are_resized_to_the_images(given, side, row, kept):
    white_below(row, side).save('mask.png')
    assert rows_kept(load_masks('mask.png', given, 'data')) == [kept] * 3


def strokes():
    """White on transparent."""
    image = Image.new('RGBA', (8, 8))
    image.paste('white', (2, 2, 6, 6))
    return image


@pytest.mark.parametrize('mask, message', [
    (Image.new('L', (8, 8)), 'nothing in it is white, to be made anew; give'),
    (Image.new('L', (8, 8), 'white'), 'nothing in it is black, to be kept; give one of black and'),
    (strokes(), r'nothing in it is black, to be kept \(transparent, put on white\); give')])
def test_load_masks__what_keeps_all_or_nothing_is_refused(given, mask, message):
    mask.save('mask.png')
    with pytest.raises(BadInput, match=f'^--mask mask.png: {message}'):
        load_masks('mask.png', given, 'data')


def test_load_masks__one_of_several_that_cannot_be_used_is_named(given):
    for name in 'abc':
        white_below(2).save(f'masks/{name}.png')
    Path('masks/b.png').write_text('broken')
    with pytest.raises(BadInput, match="^--mask masks: 'b.png': cannot be read"):
        load_masks('masks', given, 'data')
    Image.new('L', (32, 32)).save('masks/b.png')
    with pytest.raises(BadInput, match="^--mask masks: 'b.png': at 8 x 8 pixels nothing in it is"):
        load_masks('masks', given, 'data')
