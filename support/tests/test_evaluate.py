"""evaluate.py: what it measures, what it writes, what it refuses."""
import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import pfgm
from evaluate import METRICS, Reference, bits_per_dim, check_counts, measure_flow
from support.cli import BadInput
from support.flow import Flow
from support.inception import POOL
from support.seeds import step_seed
from support.tests.common import (F64, TINY_PP, close, network, refuses, rows_of, said, script,
                                  seeded)

CPU = torch.device('cpu')


# ---------------------------------------------------------------- flags

@pytest.mark.parametrize('flags, message', [
    ('--swd --solvers euler', '--solvers euler: belongs to --sweep'),
    ('--swd --sweep 5 --solvers euler,rk4', '--solvers: rk4: accepted: rk45, euler'),
    ('--bpd --sweep nfe=5', '--sweep: give some of --fid'),
    ('--swd --neighbours --sweep nfe=5', 'and not --neighbours'),
    ('--swd --sweep nfe=5 --nfe 3', '--sweep: says itself how many calls'),
    ('--swd --sweep nfe=5 --solver heun', 'give --solvers in place of --solver'),
    ('--compare a b --samples c --ref d', '--compare: of checkpoints'),
    ('--compare a b --exact', '--compare: of checkpoints'),
    ('--samples a --bpd --ref b', '--samples a: images without their flow'),
    ('--samples a --swd', '--samples a: compared with what'),
    ('--exact --swd --compile', '--compile: --exact has no network'),
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


def test_check_counts__needs_enough_images_for_each_estimator():
    assert {name: metric.least for name, metric in METRICS.items() if metric.least} == {
        'fid': POOL + 1, 'is': 10, 'kid': 2, 'prc': 4, 'judge': 129}
    check_counts({'fid', 'swd'}, 2049, 2049)
    check_counts({'fid'}, None, None)
    with pytest.raises(BadInput, match='--n 2048: --fid needs 2049 images or more .the covarian'):
        check_counts({'fid'}, 2048, 2049)
    with pytest.raises(BadInput, match='the reference: n 3: --prc needs 4 images or more'):
        check_counts({'prc'}, 4, 3)
    check_counts({'is'}, 10, 3)  # which has no reference


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
    assert len(rows_of('results.jsonl')) == 2 * (3 + 1)
    assert Image.open('compare.png').size == (960, 640)
    strip = Image.open('compare_samples.png')
    assert strip.height == 30 + 4 + 2 * 68 and strip.width > 2 * 3 * 68

    script(['train.py', *TINY_PP, *'--image_size 8 --steps 1 --out_dir small'.split()])
    refuses([*compare, 'small'], '--compare .*one size')


def test_results__say_what_was_measured_and_made_them(trained, few_glyphs, here):
    common = ['evaluate.py', '--ckpt', trained, *'--device cpu --results r.jsonl --out a.png '
              '--n 4 --swd'.split()]
    changes = ('--no-bf16', '--bf16', '--schedule log', '--no-to_data', '--z_min 0.01', '--seed 3',
               '--solver heun', '--small_z official', '--weights raw', '--solver rk45 --tol 0.1')
    for flags in changes:
        script([*common, '--nfe', 3, *flags.split()])
    script([*common, *'--neighbours --bpd --nfe 2 --tol 1e-3'.split()])
    all_rows = rows_of('r.jsonl')
    for row in all_rows:
        assert {'command', 'git', 'torch', 'hardware', 'seconds', 'seed', 'n'} <= row.keys()
        assert row['step'] == 10
    *rows, of_flow, of_samples = all_rows
    not_told = ('command', 'time', 'seconds', 'swd', 'swd_of_test', 'git')
    told = {json.dumps({key: value for key, value in row.items() if key not in not_told})
            for row in rows}
    assert len(told) == len(rows) == len(changes)
    assert of_flow['round_trip_mean'] < 0.3 and of_flow['nfe'] > 10
    assert of_samples['swd'] > 0 and of_samples['samples_min'] > 0
    assert Image.open('a.png').size == (8 * 68 + 4, 68 + 4)  # four samples and their neighbours


# ---------------------------------------------------------------- references

def test_reference__of_others(tmp_path):
    """Files as ADM and score_sde publish them."""
    rng = np.random.default_rng(0)
    results = tmp_path / 'r.jsonl'
    adm, song, ours, wide = (tmp_path / name for name in ('adm.npz', 'song.npz', 's.npy',
                                                          'wide.png'))
    x = rng.integers(0, 256, (6, 8, 8, 3), np.uint8)
    np.savez(adm, arr_0=x, mu=np.zeros(POOL), sigma=np.eye(POOL), mu_s=np.zeros(3))
    np.savez(song, pool_3=rng.standard_normal((9, POOL)).astype(np.float32))
    np.save(ours, x)
    Image.new('RGB', (9, 12), (9, 99, 200)).save(wide)
    common = ['evaluate.py', '--inception', 'random', '--device', 'cpu', '--results', results,
              '--workers', 0, '--samples']
    out = said([*common, ours, '--ref', adm, '--prc', '--swd'])
    assert 'adm.npz: its mu and sigma for --fid, its 6 images for --prc --swd' in out
    row = rows_of(results)[-1]
    assert row['precision'] == row['recall'] == 1 and row['swd'] == 0
    script([*common, ours, '--ref', song, '--kid'])
    assert rows_of(results)[-1]['n_ref'] == 9
    refuses([*common, ours, '--ref', song, '--swd'], 'do for --fid --is --kid --prc only')
    refuses([*common, ours, '--ref', adm, '--swd', '--save_stats', tmp_path / 's.npz'],
            'do for --fid --is only')
    refuses([*common, wide, '--ref', ours, '--swd', '--image_size', 16],
            "--samples .*wide.png: 'wide.png' is 9x12; give an --image_size of at most 9, not 16")
    refuses([*common, ours, '--ref', ours, '--swd', '--n', 7], '--n 7: --samples .* has 6 images')


# ---------------------------------------------------------------- metrics of a flow

def images_net(N, h=2.0):
    """The field of the planar density c h / (|x|^2 + h^2)^((N+1)/2): a point charge at (0, -h)."""
    def net(x, z):
        scale = -math.sqrt(N) / (torch.hypot(x.flatten(1).norm(dim=1), z + h) + 5)
        return x * pfgm.column(scale, x), (z + h) * scale
    return net


def known_flow():
    """Lines of the method of images. They are straight, so every probe gives the divergence itself.
    """
    return Flow(network(images_net(16, 2.0)), (1, 4, 4), D=1.0, z_min=1e-3, z_max=50.0,
                upper_norm=None, z_exp=0.0, gamma=5.0)


def test_bits_per_dim__of_a_known_flow():
    pixels = torch.randint(0, 256, (6, 1, 4, 4), generator=seeded()).to(torch.uint8)
    got = bits_per_dim(known_flow(), pixels, 6, repeats=2, tol=1e-6, batch_size=64, device=CPU)
    noise = [torch.rand(1, 4, 4, generator=seeded(step_seed(0, i + repeat * 2 ** 32)), dtype=F64)
             for repeat in range(2) for i in range(6)]
    x = (pixels.repeat(2, 1, 1, 1) + torch.stack(noise)) / 128 - 1
    up = x * (50 + 2) / (1e-3 + 2)
    logp = pfgm.prior_logp(x, 2 + 1e-3) + pfgm.prior_logp(up, 50.0) - pfgm.prior_logp(up, 52.0)
    each = (7 - logp / math.log(2) / 16).view(2, 6).mean(0)
    close(got['bpd'], each.mean(), atol=1e-4)
    close(got['bpd_se'], each.std() / 6 ** 0.5, atol=1e-4)
    assert (got['n'], got['repeats']) == (6, 2)
    assert got['round_trip_mean'] <= got['round_trip_max'] < 1e-4
    one = bits_per_dim(known_flow(), pixels, 1, repeats=1, tol=1e-6, batch_size=64, device=CPU)
    assert one['bpd_se'] is None


def test_bits_per_dim__of_a_network_that_diverged():
    flow = known_flow()
    flow.net = network(lambda x, z: (x * math.nan, z))
    pixels = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    with pytest.raises(BadInput, match='--bpd: .*NaN; it has diverged'):
        bits_per_dim(flow, pixels, 2, repeats=1, tol=1e-5, batch_size=2, device=CPU)


def test_labels_for__are_those_that_the_network_knows():
    class Labelled:
        given = '--dataset a'
        name = 'a'
        labels = torch.tensor([0, 3])
        classes = ['cat', 'dog', 'fox', 'owl']

    flow = known_flow()
    assert evaluate.labels_for(flow, Labelled) is None  # trained without
    flow.classes = (0, 1, 2, 3)
    flow.class_count = 4
    flow.class_names = Labelled.classes
    assert torch.equal(evaluate.labels_for(flow, Labelled), Labelled.labels)
    flow.class_count = 3
    with pytest.raises(BadInput, match='labels from 0 to 3; the network knows 0 to 2; .*none'):
        evaluate.labels_for(flow, Labelled)
    flow.class_names = ['cat', 'dog', 'fox', 'elk']
    with pytest.raises(BadInput, match='--dataset a: its classes are cat, .* fox, elk; .*none'):
        evaluate.labels_for(flow, Labelled)


@pytest.mark.parametrize('rank', [0, 1])
def test_measure_flow__of_a_student_says_once_that_it_has_no_flow(rank, monkeypatch, capsys):
    flow = known_flow()
    flow.student = True
    monkeypatch.setenv('RANK', str(rank))
    reference = Reference(**dict.fromkeys(Reference._fields))
    assert measure_flow(['bpd'], 'one', flow, reference, None, CPU, rank, 2) == {}
    assert capsys.readouterr().out.count('distilled into one call') == (rank == 0)
    assert measure_flow(['swd'], 'one', flow, reference, None, CPU, rank, 2) == {}
    assert capsys.readouterr().out == ''
