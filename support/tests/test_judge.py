"""The judge of labelled images."""
import os
import re
import shutil
from pathlib import Path

import numpy as np
import torch

from support import judge, sets
from support.cli import BadInput
from support.judge import LEGIBLE, part_legible
from support.tests.common import close, refuses, rows_of, said


def test_judge_of__tells_digits_from_noise_and_is_kept(few_glyphs, here, monkeypatch):
    monkeypatch.setattr(judge, 'JUDGE_STEPS', 30)
    digits, _ = sets.glyphs(split='test')
    noise = np.random.default_rng(0).integers(0, 256, (130, 16, 16, 1), np.uint8)
    np.savez('digits.npz', arr_0=digits[:130, ..., None])
    np.savez('noise.npz', arr_0=noise)

    def measured(name):
        """(the line of results, whether the judge was trained)."""
        out = said(f'evaluate.py --judge --samples {name} --dataset glyphs --device cpu '
                   '--data_dir .'.split())
        return rows_of('results.jsonl')[-1], 'judge: 3840/3840' in out

    real, trained = measured('digits.npz')
    assert trained
    bad, trained = measured('noise.npz')
    assert not trained
    assert real['judge_fd'] < 3 * real['judge_fd_of_real'] < bad['judge_fd'] / 5
    assert real['judge_precision'] > 0.5 and real['judge_recall'] > 0.1
    assert bad['judge_recall'] == 0


def test_judge_of__sets_with_the_same_names_and_labels_have_judges_of_their_own(here, monkeypatch):
    monkeypatch.setattr(judge, 'JUDGE_STEPS', 2)
    for name in 'ab':
        pixels = np.random.default_rng(ord(name)).integers(0, 256, (130, 8, 8), np.uint8)
        np.savez(f'{name}.npz', x=pixels, y=np.arange(130) % 2)
        images = sets.load_images(f'{name}.npz')
        judge.judge_of(images, images, 'kept', torch.device('cpu'))
    shutil.copy('b.npz', 'c.npz')
    images = sets.load_images('c.npz')
    judge.judge_of(images, images, 'kept', torch.device('cpu'))
    assert len(os.listdir('kept')) == 2


def test_judge_of__one_that_cannot_be_read_is_trained_again(here, monkeypatch, capsys):
    monkeypatch.setattr(judge, 'JUDGE_STEPS', 2)
    pixels = np.random.default_rng(0).integers(0, 256, (130, 8, 8), np.uint8)
    np.savez('a.npz', x=pixels, y=np.arange(130) % 2)
    images = sets.load_images('a.npz')
    first = judge.judge_of(images, images, 'kept', torch.device('cpu'))
    kept, = Path('kept').iterdir()
    kept.write_bytes(kept.read_bytes()[:999])
    again = judge.judge_of(images, images, 'kept', torch.device('cpu'))
    assert 'cannot be read' in capsys.readouterr().out
    close(again.real, first.real, rtol=1e-4)


def test_judge_of__serves_where_it_cannot_be_kept_and_says_so_first(here, monkeypatch, capsys):
    monkeypatch.setattr(judge, 'JUDGE_STEPS', 2)
    np.savez('a.npz', x=np.arange(130 * 64).astype(np.uint8).reshape(130, 8, 8),
             y=np.arange(130) % 2)
    Path('file').touch()
    images = sets.load_images('a.npz')
    assert judge.judge_of(images, images, 'file', torch.device('cpu')).real.shape == (130, 128)
    line, *progress = capsys.readouterr().out.splitlines()
    assert re.fullmatch('--data_dir file: cannot be written .*; the judge is not kept', line)
    assert progress

    def full(flag, path, save):
        raise BadInput(f'{flag} {path}: cannot be written (no space)')

    monkeypatch.setattr(judge, 'write', full)
    assert judge.judge_of(images, images, 'kept', torch.device('cpu')).net
    assert 'cannot be written (no space)' in capsys.readouterr().out


def test_judge_of__needs_labels(few_glyphs, here):
    images, labels = sets.glyphs(split='train')
    np.savez('digits.npz', arr_0=images[:130, ..., None])
    command = 'evaluate.py --judge --device cpu --samples digits.npz'.split()
    refuses([*command, '--ref', 'digits.npz'], '--judge: .* has no labels')
    np.savez('half.npz', train_images=images, train_labels=labels, test_images=images[:200])
    refuses([*command, '--dataset', 'half.npz'], '--judge: the test images of .* have no labels')


def test_part_legible__counts_what_is_nearly_certain():
    assert LEGIBLE == 0.9
    p = torch.tensor([[0.95, 0.05], [0.5, 0.5], [0.1, 0.9], [0.89, 0.11]])
    assert part_legible(p.double().round(decimals=2)) == 0.5
