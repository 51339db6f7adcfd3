"""Figures: field lines of a heart, and the losses of runs."""
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from support import figures
from support.figures import heart_of_charges, moving_mean, starts
from support.tests.common import F64, close, refuses, said, script, spied


def test_starts__are_even_on_the_hemisphere():
    z = 4.0
    x = starts(1000, z)
    cosine = z / (x.square().sum(1) + z * z).sqrt()
    close(cosine.sort().values, (torch.arange(1000, dtype=F64) + 0.5) / 1000, atol=1e-9)
    angle = torch.atan2(x[:, 1], x[:, 0])
    assert angle.cos().mean().abs() < 0.01 and angle.sin().mean().abs() < 0.01


def test_field_lines__of_a_heart_of_charges(here):
    with spied(figures.pfgm, 'sample_ode') as followed:
        out = said(['figures', 'heart', '--out', 'heart.png'])
    assert out == 'heart.png: 180 field lines of 308 charges\n'
    assert len(heart_of_charges()) == 308
    net, start, z_max = followed.call_args.args[:3]
    assert torch.equal(net.charges, heart_of_charges()) and torch.equal(start, starts(180, z_max))
    image = np.asarray(Image.open('heart.png')).astype(int)
    assert image.shape == (720, 800, 3)
    is_red = (image[..., 0] > 200) & (image[..., 1] < 60)
    is_blue = (image[..., 2] > 180) & (image[..., 0] < 80)
    assert is_red.sum() > 5_000 and is_blue.sum() > 5_000
    rows_of_red, rows_of_blue = np.nonzero(is_red)[0], np.nonzero(is_blue)[0]
    assert rows_of_red.mean() > rows_of_blue.mean() + 100  # the charges lie below the starts


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
    assert Image.open('curves.png').size == (960, 640)


def test_loss_curves__refuses_what_is_no_log(here):
    write_log('short/log.jsonl', [dict(images=64, loss=1.0)])
    write_log('other/log.jsonl', [dict(fid=3.0)] * 2)
    refuses(['figures', 'curves', 'none.jsonl'], '^none.jsonl: not a log.jsonl .*No such file')
    refuses(['figures', 'curves', 'short/log.jsonl'], '1 lines; two or more make a curve')
    refuses(['figures', 'curves', 'other/log.jsonl'], 'other/log.jsonl: not a log.jsonl')
    refuses(['figures', 'curves', 'none.jsonl', '--out', 'a.gif'], '--out a.gif: .* end in .png')
    refuses(['figures', 'heart', '--out', 'no/heart.png'], 'mkdir -p no')
    refuses(['figures'], 'required: FIGURE')
