"""evaluate.py: what it measures, what it writes, what it refuses."""
import json
import math
import os
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import pfgm
from evaluate import METRICS, Reference, bits_per_dim, check_counts, measure_flow
from support import judge
from support.cli import BadInput
from support.flow import Flow, load_flow
from support.inception import POOL, Measured
from support.seeds import step_seed
from support.sets import load_images
from support.tests.common import (F64, TINY_PP, close, network, refuses, rows_of, said, script,
                                  seeded)
from support.tests.made import pictures

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


def test_check_counts__needs_enough_images_for_each_estimator():
    assert {name: metric.least for name, metric in METRICS.items() if metric.least} == {
        'fid': POOL + 1, 'is': 10, 'kid': 2, 'prc': 4, 'judge': 129}
    check_counts(['fid', 'swd'], '--n 2049', 2049)
    with pytest.raises(BadInput, match='--n 2048: --fid needs 2049 images or more .the covarian'):
        check_counts(['fid'], '--n 2048', 2048)
    with pytest.raises(BadInput, match='the reference: 3 images: --prc needs 4 images or more'):
        check_counts(['prc'], 'the reference: 3 images', 3)


def test_main__refuses_what_cannot_be_measured_or_kept_before_any_work(
        trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = tmp_path
    monkeypatch.setattr(judge, 'train_judge', None)
    monkeypatch.setattr(evaluate, 'load_inception', None)
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


# ---------------------------------------------------------------- what is compared with what

@pytest.fixture
def two_sets(here, tmp_path):
    """The test runs where there are A and B, with the same names and classes, and other colours."""
    for name, colour in (('A', (200, 60, 30)), ('B', (30, 60, 200))):
        for c in ('cat', 'dog'):
            (tmp_path / name / c).mkdir(parents=True)
            for k in range(10):
                x = np.zeros((16, 16, 3), np.uint8)
                x[:, :8 if c == 'cat' else 16] = colour
                x[k] = 255
                Image.fromarray(x).save(tmp_path / name / c / f'{k}.png')


def trained_on_folder(name, out, *flags):
    script(['train.py', *TINY_PP, '--D', 128, '--steps', 1, '--dataset', name, '--out_dir', out,
            *flags])


def test_check_data__tells_a_folder_that_changed_from_one_that_moved(two_sets):
    trained_on_folder('A', 'out')
    measure = ['evaluate.py', *'--ckpt out --swd --n 4 --nfe 1 --device cpu'.split()]
    alike = said(measure)
    assert 'others' not in alike
    shutil.move('A', 'moved')
    assert re.search('swd.*', said([*measure, '--dataset', 'moved']))[0].partition('  (')[0] == \
        re.search('swd.*', alike)[0].partition('  (')[0]
    assert 'others' not in said([*measure, '--dataset', 'moved'])
    shutil.copytree('B', 'A')
    refuses(measure, '--dataset of --ckpt A: not the images that out was trained on .as many images'
            ', with other pixels.; if they are meant, give --dataset A')
    assert 'out was trained on others' in said([*measure, '--dataset', 'A'])
    os.remove('moved/cat/3.png')
    assert '(20 images there, 19 here)' in said([*measure, '--dataset', 'moved'])
    rows = rows_of('out/results.jsonl')
    assert rows[0]['reference_pixels'] == rows[1]['reference_pixels']
    assert len({row['reference_pixels'] for row in rows}) == 3


def test_check_same_data__networks_of_two_sets_are_compared_with_a_third_only(two_sets):
    trained_on_folder('A', 'a')
    trained_on_folder('B', 'b')
    shutil.copytree('A', 'copy')
    trained_on_folder('copy', 'c')
    compare = ['evaluate.py', *'--swd --n 4 --sweep nfe=1 --device cpu --compare a'.split()]
    refuses([*compare, 'b'], '--compare: b was trained on B, a on other images, A; say by --datas')
    assert 'a was trained' not in said([*compare, 'c'])  # wherever they are
    out = said([*compare, 'b', '--dataset', 'A'])
    assert 'b was trained on others' in out and 'a was trained on others' not in out
    said([*compare, 'b', '--ref', 'B'])


def test_classes_to_compare__are_those_of_the_samples(two_sets):
    measure = ['evaluate.py', *'--swd --device cpu --results r.jsonl'.split()]

    def swd_of(*flags):
        out = said([*measure, *flags])
        return rows_of('r.jsonl')[-1]['swd'], re.search(r'swd.*\((.*)\)', out)[1]

    cats = ['--samples', 'A/cat', '--dataset', 'A']
    swd, note = swd_of(*cats)
    assert swd > 0.1 and 'of A of all 2 classes; --classes says' in note
    for classes in ('cat', '0'):
        swd, note = swd_of(*cats, '--classes', classes)
        assert swd == 0 and note == '10 images against 10 of A of class cat'
    assert swd_of(*cats, '--classes', 'dog')[0] > 0.1
    assert swd_of('--samples', 'A', '--dataset', 'A') == (
        0, '20 images against 20 of A, as many of each class')  # they say their own
    refuses([*measure, *cats, '--classes', 'bird'], '--classes bird: --dataset A has cat, dog')

    trained_on_folder('A', 'out', '--classes')
    measure += ['--nfe', 1, '--ckpt', 'out']
    for n in (4, 50):
        _, note = swd_of('--n', n, '--classes', 'dog')
        assert note == f'{min(n, 10)} images against {min(n, 10)} of A of class dog'
    assert rows_of('r.jsonl')[-1]['reference_classes'] == 'of class dog'
    _, note = swd_of('--n', 6)
    assert note == '6 images against 6 of A, as many of each class'
    assert evaluate.classes_to_compare(['cat'], {}, load_images('A/cat'), None) == (
        None, ' of all its classes, where the samples are of cat')
    of_all = Reference('s.npz', None, None, None, '', None, None, None, None, None)
    flow = load_flow('out/ckpt.pt', CPU, classes=['cat'])
    classes, words = evaluate.classes_to_compare(None, dict(out=flow), None, None)
    assert classes is None and words == ' of all its classes, where the samples are of class cat'
    assert of_all.facts() == dict(reference='s.npz', reference_classes=None)


def test_other_shares__are_said_of_what_is_compared_with_all(two_sets):
    images = load_images('A')
    assert evaluate.other_shares(torch.tensor([0, 1, 0, 1]), images) == ''
    assert evaluate.other_shares(None, images) == ''
    assert 'other shares' in evaluate.other_shares(torch.tensor([0, 0, 0, 1]), images)


def test_chosen_indices__are_of_all_classes_that_come_in_turn():
    for n in (10, 20, 100, 500, 1000):
        indices = evaluate.chosen_indices(n, 10_000)
        assert len(indices.unique()) == n
        assert n < 100 or (indices % 10).bincount(minlength=10).min() > n / 50
    assert torch.equal(evaluate.chosen_indices(7, 7), torch.arange(7))


def test_of_judge__real_images_have_the_classes_of_the_samples(here, monkeypatch):
    """Real images whose classes come in turn are as near to the test images as the others that
    they are set beside. At random these would be farther: their shares of the classes differ."""
    rng = np.random.default_rng(0)

    def noisy(labels):
        """Images of 2 x 2 pixels of which the class is the brightness."""
        x = 20 * labels[:, None] + rng.integers(0, 20, (len(labels), 4))
        np.savez('x.npz', x=x.reshape(-1, 2, 2).astype(np.uint8), y=labels)
        return load_images('x.npz')

    def judged(net, pixels):
        features = pixels.flatten(1).double() / 20
        return features, torch.ones(len(pixels), 1)

    monkeypatch.setattr(evaluate, 'judged', judged)
    turns = np.arange(4000) % 10
    train = noisy(turns)
    test = noisy(turns)
    real, _ = judged(None, test.pixels)
    reference = Reference('x', train, train, test, '', None, None, None, 'tf1',
                          judge.Judge(None, real, 'note'))

    def of_real(labels):
        samples = Measured(512, None, None, None, noisy(turns[:512]).pixels, labels)
        result, = evaluate.of_judge(samples, reference, CPU, 0)
        return result

    alike = of_real(torch.from_numpy(turns[:512]))
    at_random = of_real(None)
    assert alike.values['judge_fd_of_real'] < at_random.values['judge_fd_of_real'] / 2
    ratio = alike.values['judge_fd'] / alike.values['judge_fd_of_real']
    assert 0.2 < ratio < 5
    assert '512, as many of each class' in alike.note
    assert '512 drawn at random' in at_random.note


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
