"""Flow: from where to where a network is followed, and what it refuses."""
import inspect
import math
import os
import shutil
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import optimize

import pfgm
from pfgm import ExactField
from support import flow as flow_module
from support.flow import Flow, load_flow
from support.images import to_float
from support.seeds import step_seed
from support.solvers import ancestral
from support.tests.common import (F64, TINY_PP, close, loaded, refuses, said, sampled, script,
                                  seeded, spied)
from support.tests.made import picture, pictures

CPU = torch.device('cpu')


def flow_without_network(**fields):
    """A Flow of PFGM with the published constants of CIFAR-10, for images of 4 x 4."""
    constants = dict(net=None, shape=(1, 4, 4), D=1, z_min=1e-3, z_max=40.0, upper_norm=300.0,
                     z_exp=5.0, gamma=5.0)
    return Flow(**{**constants, **fields})


def test_labels_of__are_the_classes_in_turn():
    labels = flow_without_network(classes=(0, 3, 7)).labels_of(range(2, 6), 'cpu')
    assert labels.tolist() == [7, 0, 3, 7]
    assert flow_without_network().labels_of(range(2), 'cpu') is None


def test_noise_of__goes_no_farther_than_the_prior():
    noise = flow_without_network().noise_of(range(200))
    norms = torch.cat([noise(step).flatten(1).norm(dim=1) for step in range(3)])
    assert norms.max() <= 7.5 * (1 + 1e-6)  # 300 / 40
    assert (norms > 7.49).sum() > 100
    heavy_tailed = flow_without_network(upper_norm=None)
    assert heavy_tailed.noise_of(range(200))(0).abs().max() > 100


def test_noise_of__is_other_noise_than_that_of_the_prior():
    flow = flow_without_network(upper_norm=None)
    start = flow.prior([0, 1]) / flow.z_max
    fresh = flow.noise_of([0, 1])
    assert not torch.isclose(fresh(0), start).any() and not torch.isclose(fresh(1), start).any()
    assert not torch.isclose(start[0], start[1]).any()  # images have noise of their own


@pytest.mark.parametrize('D', [1, 128, math.inf])
@pytest.mark.parametrize('cores', [1, 3])
def test_noise_of__an_image_is_drawn_alone_or_by_several_threads(D, cores, monkeypatch):
    monkeypatch.setattr(flow_module, 'cores_of_rank', lambda: cores)
    monkeypatch.setattr(flow_module, 'THREAD_DRAWS', 64)
    flow = flow_without_network(D=D, shape=(1, 8, 8))
    with patch.object(pfgm, 'sample_prior', side_effect=pfgm.sample_prior) as sample_prior:
        together = flow.prior(range(10))
    assert sample_prior.call_count == cores
    for i in range(10):
        generator = seeded(step_seed(flow.seed, i))
        alone = pfgm.sample_prior((1, 1, 8, 8), flow.z_max, flow.upper_norm, D, generator)
        assert torch.equal(together[i:i + 1], alone)


@pytest.mark.parametrize('device, free, fields, batch_size', [
    ('cpu', 0, dict(image_bytes=1 << 20), 256), ('cpu', 0, dict(image_bytes=32 << 20), 64),
    ('cpu', 0, dict(image_bytes=3 << 30), 1),
    ('cuda', 80 << 30, dict(image_bytes=10 << 20), 1024),
    ('cuda', 8 << 30, dict(image_bytes=10 << 20), 256),
    ('cuda', 80 << 30, dict(solver='rk45', small_z='official'), 64)])
def test_batch_size__is_what_fits_in_memory(device, free, fields, batch_size, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (free, 80 << 30))
    assert flow_without_network(**fields).batch_size(torch.device(device)) == batch_size


def test_batch_size__where_the_driver_does_not_say_is_that_of_a_cpu(monkeypatch):
    def fails(device):
        raise RuntimeError('CUDA error: not supported')

    monkeypatch.setattr(torch.cuda, 'mem_get_info', fails)
    flow = flow_without_network(image_bytes=10 << 20)
    assert flow.batch_size(torch.device('cuda')) == flow.batch_size(torch.device('cpu')) == 128


def test_ending__is_the_plane_of_the_last_call_before_z_0():
    flow = flow_without_network(solver='unipc', nfe=10, shape=(3, 32, 32))
    assert flow.ending() == (True, 25 / 10 ** 3)  # solvers.last_plane()
    assert flow_without_network(solver='euler', nfe=2).ending() == (True, 5 / 4)
    assert flow_without_network(solver='unipc', nfe=2).ending() == (True, 16 ** 0.5 / 40)
    assert flow_without_network(solver='unipc', nfe=2, z_max=9.0).ending() == (True, 5 / 4)
    assert flow_without_network(solver='unipc', nfe=100).ending() == (True, 1e-3)
    assert flow_without_network(solver='heun', nfe=10, z_last=0.5).ending() == (True, 0.5)
    assert flow_without_network(solver='rk45').ending() == (False, 1e-3)
    assert flow_without_network(solver='heun', nfe=10, to_data=False).ending() == (False, 1e-3)


def test_solver_for__unipc_has_order_2_for_few_calls_of_a_network():
    field = ExactField(torch.zeros(1, 1, 4, 4))
    for net, nfe, order in [(None, 10, 2), (None, 11, 3), (field, 10, 3)]:
        solver = flow_without_network(net=net, nfe=nfe).solver_for([0], up=False, to_data=True)
        assert solver.keywords == dict(correct=True, order=order, free_first_step=True)


def test_ancestral__renews_the_noise_on_every_plane():
    """x = xhat, then noise of the kernel anew: of one charge, the charge and that noise."""
    y = torch.randn(1, 6, generator=seeded(), dtype=F64)
    D = 3
    noise = pfgm.kernel((2, 1000, 6), torch.ones(2, dtype=F64), math.inf, seeded(1))
    path = []
    end, nfe = pfgm.sample_ode(
        ExactField(y, D=D), 9 * noise[0], 9.0, 0.5, ancestral(None, lambda i: noise[i]), 3, z_exp=0,
        D=D, to_data=True, schedule_name='log', callback=lambda z, x: path.append((z, x)))
    assert nfe == len(path) == 3
    for (z, x), fresh in zip(path, noise):
        close(x, y + z[0] * fresh, atol=1e-9)
    close(end, y.expand(1000, 6), atol=1e-9)


def test_prior__a_flow_between_two_data_sets_starts_from_images(straight, here):
    """x_t = t y + (1 - t) s of images s and y, drawn at random and paired so that they are near in
    each batch; samples start from s; reflow keeps the pairs."""
    images = torch.randint(0, 256, (2, 7, 16, 16), generator=seeded()).to(torch.uint8)
    for name, pixels in zip('sy', images):
        np.save(f'{name}.npy', pixels)
    s = to_float(images[0])[:, None]
    command = ['train.py', *TINY_PP, *'--dataset y.npy --lr 1e-2 --sample_every 30'.split()]
    with spied(pfgm.Denoiser, 'perturb') as perturb:
        script([*command, *'--method rf --source s.npy --steps 30 --out_dir a'.split()])
    batches = set()
    for call in perturb.call_args_list:
        given = inspect.signature(pfgm.Denoiser.perturb).bind(*call.args, **call.kwargs).arguments
        y, start = given['x'], given['eps']
        distance = torch.cdist(start.flatten(1), s.flatten(1))
        nearest = distance.argmin(1)
        assert distance.amin(1).max() < 0.05                             # an image of the other set
        cost = torch.cdist(y.flatten(1), s[nearest].flatten(1)).square()
        least = cost[optimize.linear_sum_assignment(cost)].sum()
        close(cost.diagonal().sum(), least, rtol=1e-5)
        batches.add(tuple(sorted(nearest.tolist())))
    assert len(batches) > 9

    flags = '--ckpt a --nfe 8 --no-bf16'.split()  # by bfloat16 more than a grey level differs
    made = sampled('a.npz', *flags, '--n', 9)
    assert (made[7:] == made[:2]).all() and len(np.unique(made, axis=0)) == 7
    script(['sample.py', '--device', 'cpu', *flags, *'--from s.npy --out a.png'.split()])
    strip = np.asarray(Image.open('a.png').convert('L')).astype(int)     # pairs, s before y
    assert (abs(strip[4:68:4, 4:68:4] - images[0, 0].numpy()) <= 1).all()

    for kind in ('reflow', 'distill'):
        out = said([*command, f'--{kind}', 'a', *f'--pairs 9 --steps 3 --out_dir {kind}'.split()])
        eps, end = torch.from_numpy(np.load(*Path(kind, 'pairs').iterdir())).unbind(1)
        close(end / 999 + eps, s[torch.arange(9) % 7], atol=1e-4)
        assert 'the teacher: straightness' in out
        assert len(sampled('b.npz', '--ckpt', kind)) == 7

    refuses(['sample.py', '--ckpt', straight, '--from', 's.npy'], '--from s.npy: .* from noise')
    refuses('evaluate.py --ckpt a --bpd --device cpu'.split(), '--bpd: .*from images')
    refuses([*command, *'--source s.npy --method vp --out_dir c'.split()], '--source s.npy: b')


@pytest.fixture
def across(here):
    """The folder a of a run of 2 steps of a flow from the images of the folder L to glyphs, in a
    folder that is the current one. -> the command that made it."""
    pictures(Path('L'), *(f'{k}.png' for k in range(9)), side=16)
    command = ['train.py', *TINY_PP, *'--channels 1 --source L --out_dir a --steps'.split()]
    script([*command, 2])
    return command


def test_check_flow__a_flow_between_data_sets_sees_no_fresh_noise(across):
    sampling = 'sample.py --ckpt a --device cpu --n 2 --nfe 4 --out b.png'.split()
    Image.new('L', (16, 16), 255).save('mask.png')
    for flags, message in (
            ('--solver renew', '--solver renew: this flow starts from images and has'),
            ('--solver ddim --eta 1', '--eta 1.0: this flow starts from images and has'),
            ('--rescale', '--rescale: changes the noise .* this one starts from images'),
            ('--inpaint L --mask mask.png', '--inpaint L: changes the noise .* from images')):
        refuses([*sampling, *flags.split()], f'^{message}')
    script([*sampling, *'--solver ddim'.split()])  # without noise it is euler


def test_between_draws__of_a_flow_between_data_sets_leads_from_image_to_image(across):
    flags = '--ckpt a --nfe 8 --solver euler --no-bf16'.split()
    first = sampled('a.npz', *flags, '--n', 2)
    row = sampled('b.npz', *flags, '--interpolate', '--n', 8)
    assert len(row) == 8 and abs(row[[0, 7]] - first).max() <= 1
    assert abs(first[0] - first[1]).max() > 20


def test_noise_of__a_student_between_data_sets_renews_the_image_that_it_starts_from(across):
    assert 'rf of D inf' in said([*across[:-3], *'--consistency --init_from a --out_dir b --steps 2'
                                  .split()])
    flow = load_flow('b/ckpt.pt', CPU, nfe=2, bf16=False)
    assert flow.student == 'consistency' and flow.solver == 'renew'
    x = flow.prior(range(12))
    assert torch.equal(flow.noise_of(range(12))(5) * flow.z_max, x)
    end, calls = flow.follow(x, CPU, range(12))
    assert calls == 2
    z = flow.ending()[1]  # the second call: xhat of the first, and the same image as its noise
    once = xhat(flow, x, flow.z_max)
    close(end, xhat(flow, once + z * x / flow.z_max, z), atol=1e-3)


def xhat(flow, x, z):
    with torch.no_grad():
        v_x, _ = flow.net(x, torch.full((len(x),), z))
    return x + v_x


def test_check_data__a_source_is_compared_as_a_data_set_is(across):
    """By another spelling, moved, with other images, gone, or left out."""
    def moved_to(path):
        return [path if word == 'L' else word for word in across]
    out = said([*moved_to('./L/'), 3])
    assert 'going on from step 2' in out and 'going on with' not in out
    shutil.copytree('L', 'moved')
    assert 'going on with --source moved (it was L)' in said([*moved_to('moved'), 4])
    refuses([*across[:-5], *across[-3:], 5], '^--out_dir a holds a run from moved, not from noise; '
            'give --source moved, or give another --out_dir')
    picture(99, 16).save('L/9.png')
    refuses([*across, 5], '^--source L: --out_dir a holds a run from moved; give another '
            r'--out_dir, with --init_from a/ckpt.pt .*\(9 images there, 10 here\)')
    script(['train.py', *TINY_PP,
            *'--distill a --pairs 8 --source moved --out_dir d --steps 1'.split()])
    refuses([*'train.py --distill a --source L --out_dir e'.split(), *TINY_PP],
            '^--source L: --distill a/ckpt.pt was trained from moved; give --source moved')

    sampling = 'sample.py --ckpt a --device cpu --n 2 --nfe 2 --out b.png'.split()
    measuring = ('evaluate.py --ckpt a --device cpu --swd --n 8 --nfe 2 --results r.jsonl').split()
    picture(99, 16).save('moved/9.png')
    for command in (sampling, measuring):
        refuses(command, '^--source of --ckpt moved: other images than it was trained with .*; '
                'give --from moved to start from these, or --from')
        script([*command, '--from', 'L'])
    shutil.rmtree('moved')
    for command in (sampling, measuring):
        refuses(command, '^--source of --ckpt moved: no such .*; if it has moved, give --from$')
    refuses(['train.py', *TINY_PP, *'--init_from a --out_dir f'.split()],
            '^--source of --init_from moved: no such .*; if it has moved, give --source$')
    for script_name in ('sample.py', 'evaluate.py --swd'):
        refuses([*script_name.split(), *'--exact --from L'.split()], '^--from L: .*; leave it out')


@pytest.mark.parametrize('solver, value', [
    ('rk45', math.nan), ('rk45', math.inf), ('unipc', math.inf), ('heun', math.nan),
    ('ddim', math.nan)])
def test_follow__makes_nothing_of_a_network_that_gives_nan(copied, monkeypatch, solver, value):
    monkeypatch.chdir(copied)
    saved = loaded('.')
    saved['ema']['conv_out.bias'][:] = value
    if solver == 'ddim':
        saved['args'].update(method='vp', D=math.inf)
    torch.save(saved, 'ckpt.pt')
    flags = ['--ckpt', 'ckpt.pt', '--solver', solver, '--device', 'cpu', '--n', 2]
    refuses(['sample.py', *flags, '--out', 'a.png'], '--ckpt.*(diverged|not finite)')
    if solver == 'unipc':  # for any other it is the same
        for more in (['--encode', 'glyphs'], ['--gif'], ['--interpolate']):
            refuses(['sample.py', *flags, '--out', 'a.png', *more], '--ckpt.*(diverged|not finite)')
        refuses(['evaluate.py', *flags, '--swd', '--bpd'], 'diverged')
    refuses(['sample.py', *flags, '--tol', '1e-12'], '--tol 1e-12: finer than the float32')
    assert not [name for name in os.listdir('.')
                if name.endswith(('.png', '.gif', '.npz', 'results.jsonl'))]
