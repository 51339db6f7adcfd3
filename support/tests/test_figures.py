"""Figures: field lines of a heart, the way from noise to data, losses of runs."""
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from support import figures
from support.figures import (SPACING, flat_field, flat_lines, heart_of_charges, moving_mean,
                             starts)
from support.tests.common import (F64, close, loaded, refuses, said, sampled, script, spied)


def test_starts__are_even_on_the_hemisphere():
    z = 4.0
    x = starts(1000, z)
    cosine = z / (x.square().sum(1) + z * z).sqrt()
    close(cosine.sort().values, (torch.arange(1000, dtype=F64) + 0.5) / 1000, atol=1e-9)
    angle = torch.atan2(x[:, 1], x[:, 0])
    assert angle.cos().mean().abs() < 0.01 and angle.sin().mean().abs() < 0.01


def test_flat_lines__all_end_at_one_point_inside_the_heart():
    charges = heart_of_charges()
    lines = flat_lines(charges, 12, radius=2.2)
    close(lines[0].norm(dim=1), torch.full((12,), 2.2), atol=1e-6)
    ends = lines[-1]
    middle = ends.mean(0)
    assert (ends - middle).norm(dim=1).max() < 0.01
    assert flat_field(middle[None], charges, SPACING).norm() < 1e-3  # no force is left there
    assert (charges - middle).norm(dim=1).min() < SPACING


@pytest.fixture
def few_steps(monkeypatch):
    """The lines in the plane have few steps."""
    monkeypatch.setattr(figures, 'flat_lines', functools.partial(flat_lines, step=0.2, steps=60))


def test_heart__without_the_extra_dimension_and_with_it(here, few_steps):
    with spied(figures.pfgm, 'sample_ode') as followed:
        out = said(['figures', 'heart', '--out', 'heart.png'])
    assert out == 'heart.png: field lines of 308 charges\n'
    assert len(heart_of_charges()) == 308
    net, start, z_max = followed.call_args.args[:3]
    assert torch.equal(net.charges, heart_of_charges()) and torch.equal(start, starts(180, z_max))
    image = np.asarray(Image.open('heart.png').convert('RGB')).astype(int)
    assert image.shape == (540, 1200, 3)
    is_red = (image[..., 0] > 190) & (image[..., 1] < 80)
    is_blue = (image[..., 2] > 180) & (image[..., 0] < 100)
    rows_of_red, columns_of_red = np.nonzero(is_red)
    is_left = columns_of_red < 600
    assert 100 < is_left.sum() < 300            # one dot, where all lines end
    assert np.ptp(columns_of_red[is_left]) < 20
    assert (~is_left).sum() > 2_000             # all charges
    assert is_blue[:, :600].sum() > 500 and is_blue[:, 600:].sum() > 1_000
    # On the right the charges lie below the starts.
    assert rows_of_red[~is_left].mean() > np.nonzero(is_blue[:, 600:])[0].mean() + 40


# ---------------------------------------------------------------- a network's way, a mask

def test_flow_strip__leads_from_the_noise_to_what_sample_py_makes(trained, here, monkeypatch):
    monkeypatch.setattr(figures, 'STRIP_NFE', 8)
    with spied(figures, 'strip') as drawn:
        script(['figures', 'flow', '--ckpt', trained, '--n', 3, '--device', 'cpu'])
    rows = drawn.call_args.args[0]
    assert len(rows) == 8 and all(images.shape == (3, 1, 16, 16) for images in rows.values())
    names = list(rows)
    heights = [float(name.removeprefix('z = ')) for name in names]
    assert heights == sorted(heights, reverse=True) and heights[0] > 30 and heights[-1] == 0
    images = sampled('a.npz', '--ckpt', trained, *'--n 3 --nfe 8 --schedule log'.split())
    assert np.array_equal(rows[names[-1]].permute(0, 2, 3, 1), images)
    assert Image.open('flow.png').size[1] > 8 * 64


def test_flow_strip__refuses_a_student(copied, here):
    saved = loaded(copied)
    saved['args'].update(method='pfgmpp', D=128.0, sigma_data=0.5, consistency=True)
    torch.save(saved, copied / 'ckpt.pt')
    refuses(['figures', 'flow', '--ckpt', copied], '--ckpt .*: a student of --consistency')
    refuses(['figures', 'flow', '--ckpt', 'none.pt'], '--ckpt none.pt')


def test_right_half__is_a_mask_for_inpaint(here):
    script(['figures', 'half', '--image_size', 28])
    mask = np.asarray(Image.open('right_half.png'))
    assert mask.shape == (28, 28) and (mask[:, :14] == 0).all() and (mask[:, 14:] == 255).all()


def test_moving_mean__is_over_a_tenth_of_the_points():
    means = moving_mean([(k, float(k)) for k in range(20)])
    assert len(means) == 20
    assert means[0] == (0, 0) and means[1] == (0.5, 0.5) and means[5] == (4.5, 4.5)


def write_log(path, rows):
    path = Path(path)
    path.parent.mkdir(parents=True)
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def test_loss_curves__are_called_by_the_folders_of_the_runs(here):
    rows = [dict(images=64 * k, loss=1 / k) for k in range(1, 30)]
    write_log('a/run/log.jsonl', rows)
    write_log('b/run/log.jsonl', rows)
    with spied(figures, 'plot') as plotted:
        script(['figures', 'curves', 'a/run/log.jsonl', 'b/run/log.jsonl'])
    curves, *_, path = plotted.call_args.args
    assert list(curves) == ['run', 'b/run/log.jsonl'] and path == 'curves.png'
    assert curves['run'] == moving_mean([(row['images'], row['loss']) for row in rows])
    assert Image.open('curves.png').height == 640


def test_loss_curves__refuses_what_is_no_log(here):
    write_log('short/log.jsonl', [dict(images=64, loss=1.0)])
    write_log('other/log.jsonl', [dict(fid=3.0)] * 2)
    refuses(['figures', 'curves', 'none.jsonl'], '^none.jsonl: not a log.jsonl .*No such file')
    refuses(['figures', 'curves', 'short/log.jsonl'], '1 lines; two or more make a curve')
    refuses(['figures', 'curves', 'other/log.jsonl'], 'other/log.jsonl: not a log.jsonl')
    refuses(['figures', 'curves', 'none.jsonl', '--out', 'a.gif'], '--out a.gif: .* end in .png')
    refuses(['figures', 'heart', '--out', 'no/heart.png'], 'mkdir -p no')
    refuses(['figures'], 'required: FIGURE')
