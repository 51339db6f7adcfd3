"""evaluate.py: what it measures, what it writes, what it refuses."""
import json
import re

import pytest
import torch
from PIL import Image

import evaluate
from evaluate import Plan, measure_flow
from support import judge, reference
from support.flow import Flow
from support.processes import Machine
from support.tests.common import (TINY_PP, known_flow, refuses, rows_of, said, script)
from support.tests.made import pictures


# ---------------------------------------------------------------- flags

@pytest.mark.parametrize('flags, message', [
    ('--swd --sweep 5 --solvers euler,rk4', '--solvers: rk4: accepted: rk45, euler'),
    ('--bpd --sweep nfe=5', '--sweep: give some of --fid'),
    ('--swd --neighbours --sweep nfe=5', 'and not --neighbours'),
    ('--swd --sweep nfe=5 --nfe 3', '--sweep: says itself how many calls'),
    ('--swd --sweep nfe=5 --solver heun', 'give --solvers in place of --solver'),
    ('--compare a b --samples c --ref d', '--compare: of checkpoints'),
    ('--compare a b --exact', '--compare: of checkpoints'),
    ('--samples a --bpd --ref b', '--samples a: images without their flow'),
    ('--samples a --swd', '--samples a: compared with what'),
    ('--samples a --is --save_stats s.npz', '--samples a: compared with what'),
    ('--swd --out a.gif', '--out a.gif: a picture; must end in .png'),
    ('--fid --save_stats no/s.npz', '--save_stats no/s.npz: no folder no; make it with: mkdir -p'),
])
def test_check_flags__refuses_what_does_not_go_together(flags, message, here):
    refuses(['evaluate.py', *flags.split()], message)


def test_parse_args__of_tolerances_and_of_comparisons():
    args = evaluate.parse_args(['--bpd'])
    assert (args.bpd_tol, args.tol) == (1e-5, 1e-4)
    args = evaluate.parse_args(['--bpd', '--tol', '0.01'])
    assert (args.bpd_tol, args.tol) == (0.01, 0.01)
    rk45 = '--swd --bpd --sweep 5 --solvers rk45,euler'.split()
    args = evaluate.parse_args(rk45)
    assert (args.bpd_tol, args.tol) == (1e-5, 1e-5)  # they stand in one table
    args = evaluate.parse_args(['--compare', 'a', 'b'])
    assert args.swd and args.bpd and args.sweep == [5, 10, 20, 50]
    args = evaluate.parse_args(['--compare', 'a', '--judge', '--sweep', 'nfe=3'])
    assert args.judge and not args.swd and args.sweep == [3]


@pytest.mark.parametrize('flags, results, out', [
    ('--ckpt a/ckpt.pt', 'a/results.jsonl', 'a/neighbours.png'),
    ('--exact', 'results.jsonl', 'neighbours.png'),
    ('--samples b', 'results.jsonl', 'neighbours.png'),
    ('--sweep 5', 'out/results.jsonl', 'out/sweep.png'),
    ('--compare a b', 'results.jsonl', 'compare.png'),
    ('--sweep 5 --results b/r.jsonl', 'b/r.jsonl', 'b/sweep.png'),
    ('--sweep 5 --results b/r.jsonl --out c.png', 'b/r.jsonl', 'c.png')])
def test_fill_output__is_beside_the_checkpoint(flags, results, out):
    args = evaluate.parse_args(flags.split())
    evaluate.fill_output(args)
    assert (args.results, args.out) == (results, out)


def test_main__refuses_what_cannot_be_measured_or_kept_before_any_work(
        trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = tmp_path
    monkeypatch.setattr(judge, 'train_judge', None)
    monkeypatch.setattr(reference, 'load_inception', None)
    monkeypatch.setattr(Flow, 'follow', None)
    few = pictures(here / 'few', *(f'{c}/{k}.png' for c in 'ab' for k in range(60)), side=16)
    run = ['evaluate.py', '--device', 'cpu', '--ckpt', trained]
    refuses([*run, '--judge', '--n', 64], '--n 64: --judge needs 129 images or more')
    refuses([*run, '--prc', '--n', 3], '--n 3: --prc needs 4')
    refuses(['evaluate.py', '--judge', '--samples', few, '--ref', few],
            '120 samples: --judge needs 129')
    refuses([*run, '--judge', '--n', 130, '--dataset', few],
            '--dataset .*few: 120 images: --judge needs 129')
    for place in ('--results', '--out', '--save_stats'):
        refuses([*run, '--neighbours', '--n', 3, place, 'no/r.png'], 'mkdir')
        (here / 'x.png').mkdir(exist_ok=True)
        refuses([*run, '--neighbours', '--n', 3, place, 'x.png'],
                f'{place} x.png: cannot be written .*directory.*; give another')
    (here / 'c_samples.png').mkdir()
    refuses(['evaluate.py', '--compare', trained, trained, '--swd', '--n', 3, '--out', 'c.png'],
            '--out c_samples.png: cannot be written')


def test_main__makes_no_more_samples_than_a_source_has_images(two_sets):
    script(['train.py', *TINY_PP, *'--method rf --steps 1 --dataset A --source B'.split(),
            '--out_dir', 'out'])
    out = said(['evaluate.py', *'--ckpt out --swd --n 30 --nfe 1 --device cpu'.split()])
    assert 'out starts from 20 images' in out and '20 samples, not 30' in out
    assert rows_of('out/results.jsonl')[-1]['n'] == 20


# ---------------------------------------------------------------- sweeps and results

def test_compare__measures_checkpoints_side_by_side(trained, straight, few_glyphs, here):
    compare = ['evaluate.py', '--n', 3, '--device', 'cpu', '--compare', trained / 'ckpt.pt']
    out = said([*compare, straight / 'ckpt.pt', *'--swd --bpd --straightness --sweep nfe=1,4 '
                '--solvers unipc,rk45 --tol 0.1'.split()])
    rows = [line.split() for line in out.splitlines() if re.match(' *(straight|out) .*unipc', line)]
    assert [row[:4] for row in rows] == [
        ['out', 'pfgm', 'unipc', '1'], ['out', 'pfgm', 'unipc', '4'],
        ['straight', 'rf', 'unipc', '1'], ['straight', 'rf', 'unipc', '4']]
    assert rows[0][-1] == '-' and rows[2][-1] != '-'  # no time, no straightness
    assert '--tol 0.1: above 0.0001 bits/dim are biased' in out
    assert 'bpd by rk45 with --tol 0.1' in out
    assert re.search(r'test images of glyphs, tol 0.1, biased above 0.0001; an image comes back '
                     r'\d+.\d grey levels off, .*: give --tol 1e-05', out)
    assert len(rows_of('results.jsonl')) == 2 * (3 + 1)
    assert Image.open('compare.png').height == 640
    strip = Image.open('compare_samples.png')
    assert strip.height == 30 + 4 + 2 * 68 and strip.width > 2 * 3 * 68

    script(['train.py', *TINY_PP, *'--image_size 8 --steps 1 --out_dir small'.split()])
    refuses([*compare, 'small'], '--compare .*one size')


def test_results__say_what_was_measured_and_made_them(trained, few_glyphs, here):
    common = ['evaluate.py', '--ckpt', trained, *'--device cpu --results r.jsonl --n 4 '
              '--swd'.split()]
    changes = ('--no-bf16', '--bf16', '--schedule log', '--no-to_data', '--z_min 0.01', '--seed 3',
               '--solver heun', '--small_z official', '--weights raw')
    for flags in changes:
        script([*common, '--nfe', 3, *flags.split()])
    script([*common, *'--solver rk45 --tol 0.1'.split()])
    script([*common, *'--neighbours --bpd --nfe 2 --tol 1e-3 --out a.png'.split()])
    all_rows = rows_of('r.jsonl')
    for row in all_rows:
        assert {'command', 'git', 'torch', 'hardware', 'seconds', 'seed', 'n'} <= row.keys()
        assert row['step'] == 10
    *rows, of_flow, of_samples = all_rows
    not_told = ('command', 'time', 'seconds', 'swd', 'swd_of_test', 'git')
    told = {json.dumps({key: value for key, value in row.items() if key not in not_told})
            for row in rows}
    assert len(told) == len(rows) == len(changes) + 1
    assert of_flow['round_trip_mean'] < 0.3 and of_flow['nfe'] > 10
    assert of_samples['swd'] > 0 and of_samples['samples_min'] > 0
    assert Image.open('a.png').size == (8 * 68 + 4, 68 + 4)  # four samples and their neighbours


# ---------------------------------------------------------------- metrics of a flow

@pytest.mark.parametrize('rank', [0, 1])
def test_measure_flow__of_a_student_says_once_that_it_has_no_flow(rank, monkeypatch, capsys):
    flow = known_flow()
    flow.student = True
    monkeypatch.setenv('RANK', str(rank))
    machine = Machine(torch.device('cpu'), rank, world=2, batch_size=4, workers=0)
    plan = Plan(**{**dict.fromkeys(Plan._fields), 'asked': ['bpd']})
    assert measure_flow('one', flow, None, plan, machine) == {}
    assert capsys.readouterr().out.count('distilled into one call') == (rank == 0)
    assert measure_flow('one', flow, None, plan._replace(asked=['swd']), machine) == {}
    assert capsys.readouterr().out == ''
