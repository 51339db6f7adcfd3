"""The benches of solvers and of speed."""
import copy
import functools
import re

import numpy as np
import pytest
import torch

import pfgm
from support import bench
from support.bench import forward_work, median_seconds, nearest_charge, training_work
from support.count import Counts, pretended_gpu
from support.solvers import SOLVERS
from support.tests.common import close, refuses, rows_of, said, seeded, spied
from unet import UNet

CPU = torch.device('cpu')


@pytest.fixture
def few_images(here):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8), np.uint8)
    np.save('few.npy', pixels)
    return 'few.npy'


def test_solvers__compares_them_with_rk45_at_1e_8(few_images):
    command = f'bench solvers --device cpu --dataset {few_images} --n 6 --batch_size 4'.split()
    with spied(pfgm, 'rk45') as followed, spied(bench, 'plot') as plotted:
        out = said([*command, *'--sweep nfe=6,40 --solvers euler,unipc,rk45'.split()])
    tolerances = [(call.kwargs.get('rtol', 1e-4), call.kwargs.get('atol', 1e-4))
                  for call in followed.call_args_list]
    assert tolerances == [(1e-8, 1e-8)] * 2 + [(1e-4, 1e-4)] * 2  # two batches of starts each

    rows = rows_of('results.jsonl')
    assert [(row['solver'], row['schedule'], row['nfe']) for row in rows[:-1]] == [
        (solver, schedule, nfe) for solver in ('euler', 'unipc')
        for schedule in ('log', 'radius', 'rho7') for nfe in (6, 40)]
    *_, rk45 = rows
    assert (rk45['solver'], rk45['schedule'], rk45['z_min']) == ('rk45', '', 1e-3)
    assert rk45['same_image'] == 1 and rk45['rmse'] < 0.01
    for row in rows:
        assert (row['n'], row['reference'], row['seed']) == (6, 'few.npy', 0)
        if row['schedule'] == 'rho7':
            assert row['z_min'] == 1e-3
        if row['nfe'] == 40:
            assert row['same_image'] > 0.8 and row['rmse'] < 0.1
    of_unipc = {row['nfe']: row['rmse'] for row in rows[6:12] if row['schedule'] == 'radius'}
    of_euler = {row['nfe']: row['rmse'] for row in rows[:6] if row['schedule'] == 'radius'}
    assert of_unipc[40] < of_euler[40]

    assert '12 images; RK45 at 1e-8: ' in out
    assert len(re.findall(r'^ *(euler|unipc) (log|radius|rho7) +nfe 6: .*nfe 40: ', out, re.M)) == 6
    curves, *_, path = plotted.call_args.args
    assert list(curves) == ['euler radius', 'euler rho7', 'unipc radius', 'rk45 ']
    assert path == 'solvers.png'


def test_solvers__makes_the_first_step_of_unipc_without_a_call(few_images):
    seen = []

    def unipc(f, x, z_from, z_to, nfe, planes, free_first_step=False):
        seen.append((z_from > 10, free_first_step, nfe))
        yield torch.full((len(x),), z_to), x

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SOLVERS, 'unipc', unipc)
        said(['bench', 'solvers', *'--device cpu --n 2 --sweep 5 --solvers unipc'.split(),
              '--dataset', few_images])
    assert seen == [(True, True, 4)] * 3  # the fifth call leads to z = 0


def test_nearest_charge__is_the_number_of_the_image():
    charges = torch.randn(7, 1, 2, 2, generator=seeded())
    order = [3, 3, 0, 6]
    assert nearest_charge(charges[order] + 1e-3, charges).tolist() == order


def test_bench__refuses_flags_before_any_work(here, monkeypatch):
    command = ['bench', 'solvers', '--device', 'cpu']
    refuses([*command, '--solvers', 'rk4'], '--solvers: rk4: accepted: rk45, euler, heun')
    refuses([*command, '--sweep', 'nfe=0'], '--sweep: 0: must be a whole number')
    refuses([*command, '--out', 'a.gif'], '--out a.gif: a picture; must end in .png')
    refuses([*command, '--results', 'no/r.jsonl'], 'mkdir -p no')
    refuses([*command, '--dataset', 'nothing'], '--dataset nothing: no such data set')
    refuses(['bench'], 'required: BENCH')
    monkeypatch.setenv('WORLD_SIZE', '2')
    refuses(['bench', 'speed'], 'speed: a bench of one process; run it without torchrun')


# ---------------------------------------------------------------- speed

@pytest.fixture
def networks(monkeypatch):
    """A list of the networks that the bench makes, which are small."""
    made = []

    def small():
        made.append(UNet(nf=8, ch_mult=(1, 1), num_blocks=1, dropout=0.0))
        return made[-1]

    monkeypatch.setattr(bench, 'UNet', small)
    return made


def test_speed__says_seconds_memory_and_ratios(networks, monkeypatch):
    for name, value in (('FIELD_CHARGES', (64, 128)), ('FLOAT64_SIDE', 64), ('BFLOAT16_SIDE', 64),
                        ('median_seconds', functools.partial(median_seconds, repeats=1))):
        monkeypatch.setattr(bench, name, value)
    lines = said(['bench', 'speed', '--device', 'cpu']).splitlines()
    number = r'\d+\.\d+'
    assert len(lines) == 5
    for line, K in zip(lines, (64, 128)):
        assert re.match(f'field, 128 points, {K} charges: {number} s, {number} GB more, relative '
                        r'error \d\.\de-\d\d, \d+% of the rate of float64 products$', line)
    assert re.match(f'forward, 16 images of CIFAR-10: {number} s in bfloat16, plain float32 '
                    f'{number} s, ratio {number}; {number} GB; ', lines[2])
    assert re.match(f'RK45, 16 images: {number} ms a call beside the network', lines[3])
    assert lines[4].startswith('training step, 8 images of CIFAR-10: ')


def test_count__prints_a_table_and_where_the_cpu_waits(monkeypatch):
    step = Counts(flops=8e12, bytes=10 ** 11, kernels=5000, weight_casts=7, copies=2, busy=0.03,
                  syncs=['aten.copy_ at train.py:1'] * 2)
    monkeypatch.setattr(bench, 'training_counts', lambda gpu, images, *sizes: step)
    monkeypatch.setattr(bench, 'sampling_counts', lambda gpu, batch_size: Counts(kernels=2000))
    first, *rows, last = said(['bench', 'count']).splitlines()
    assert first.split() == '128 images of CIFAR-10 training step call of sampling'.split()
    values = {row[:32].strip(): row[32:].split() for row in rows}
    assert values['TFLOP'] == ['8.00', '0.00'] and values['GB moved'] == ['100.0', '0.0']
    assert values['casts of weights'] == ['7', '0']
    assert values['waits of the CPU for the GPU'] == ['2', '0']
    assert values['ms on an H100, at least'] == ['30.0', '10.0']  # 5 us a kernel
    assert last == 'training step: waits in aten.copy_ at train.py:1'


@pytest.mark.slow
def test_counts__are_those_of_a_whole_step_and_of_one_call(networks):
    with pretended_gpu() as gpu:
        step = bench.training_counts(gpu, bench.BlankImages(64), 8, 16)
        call = bench.sampling_counts(gpu, 8)
    parameters = len(list(networks[0].parameters()))
    assert step.operations['_fused_adam_'][0] == step.operations['_foreach_lerp_'][0] == 1
    assert step.operations['convolution'] == call.operations['convolution']
    norms = [layer for layer in networks[0].modules() if isinstance(layer, torch.nn.GroupNorm)]
    assert step.operations['native_group_norm_backward'][0] == len(norms)
    assert step.flops > 2.9 * call.flops > 0
    assert 0 < step.weight_casts <= 2 * parameters  # their gradients are cast, too
    assert call.weight_casts == 0
    assert step.syncs == call.syncs == []
    assert step.activation_casts < 20


def test_training_work__makes_one_update_of_the_network_and_its_average(networks, monkeypatch):
    averages = []
    deepcopy = copy.deepcopy

    def copied(net):
        averages.append(deepcopy(net))
        return averages[-1]

    monkeypatch.setattr(bench.copy, 'deepcopy', copied)
    x = torch.randn(2, 3, 32, 32, generator=seeded())
    z = torch.ones(2)
    work = training_work(x, z, (x, z), bf16=False)
    net, = networks
    average, = averages
    before = [p.detach().clone() for p in net.parameters()]
    work()
    for p, mean, old in zip(net.parameters(), average.parameters(), before):
        assert p.grad is None
        close(mean, old.lerp(p.detach(), 1e-4), atol=1e-9)
    moved = [(p.detach() - old).abs().max().item() for p, old in zip(net.parameters(), before)]
    assert max(moved) == pytest.approx(1e-4, rel=0.01)  # the first step of Adam


@pytest.mark.parametrize('bf16', [False, True])
def test_forward_work__leaves_no_gradient(networks, bf16):
    x = torch.randn(2, 3, 32, 32, generator=seeded())
    v_x, v_z = forward_work(x, torch.ones(2), bf16)()
    assert v_x.shape == x.shape and not v_x.requires_grad
    assert not networks[0].training


def test_median_seconds__calls_each_in_turn_and_leaves_the_first_round_out(monkeypatch):
    clock = iter([0, 100, 100, 200, *range(0, 400, 2)])
    monkeypatch.setattr(bench.time, 'perf_counter', lambda: next(clock))
    calls = []
    times = median_seconds(CPU, lambda: calls.append('a'), lambda: calls.append('b'), repeats=3)
    assert calls == ['a', 'b'] * 4
    assert times == [2, 2]
