"""Training: the presets, the flags, and what one step does."""
import copy
import math
import re

import numpy as np
import pytest
import torch

import pfgm
import train
from support import bench, checkpoint, methods
from support.batches import image_order
from support.count import Counts, pretended_gpu
from support.images import to_float
from support.methods import as_flow
from support.networks import build
from support.run import Meter
from support.seeds import step_seed
from support.sets import load_images
from support.tests.common import (TINY, TINY_PP, close, loaded, losses, refuses, rows_of, said,
                                  script)
from support.tests.made import classes_of, picture
from unet import UNet


# ---------------------------------------------------------------- presets

# The tables of PFGM, arXiv 2209.11178 Appendix D, with its code, and of EDM, arXiv 2206.00364
# Appendix F, with which PFGM++ was trained. Written out, so that no preset is compared with itself.
PUBLISHED = dict(
    cifar10=dict(
        nf=128, ch_mult=(1, 2, 2, 2), num_blocks=4, attn=(16,), dropout=0.1, batch_size=128,
        field_batch=4096, steps=1300000, lr=2e-4, warmup=5000, ema_decay=0.9999, loss='sum',
        M=291, z_max=40, upper_norm=3000, z_exp=5),
    cifar10_deep=dict(
        nf=128, ch_mult=(1, 2, 2, 2), num_blocks=8, attn=(16,), dropout=0.1, batch_size=128,
        field_batch=4096, steps=1300000, lr=2e-4, warmup=5000, ema_decay=0.9999, loss='sum',
        M=291, z_max=40, upper_norm=3000, z_exp=5),
    celeba64=dict(
        nf=128, ch_mult=(1, 2, 2, 2), num_blocks=4, attn=(16,), dropout=0.1, batch_size=128,
        field_batch=512, steps=1300000, lr=2e-4, warmup=5000, ema_decay=0.9999, loss='sum',
        M=291, z_max=60, upper_norm=6000, z_exp=1),
    lsun_bedroom=dict(
        nf=128, ch_mult=(1, 1, 2, 2, 4, 4), num_blocks=2, attn=(16,), dropout=0, batch_size=32,
        field_batch=32, steps=2400000, lr=2e-5, warmup=5000, ema_decay=0.9999, loss='mean',
        M=356, z_max=100, upper_norm=30000, z_exp=0.1),
    cifar10_pp=dict(
        nf=128, ch_mult=(2, 2, 2), num_blocks=4, attn=(16,), dropout=0.13, batch_size=512,
        steps=390625, lr=1e-3, warmup=19531, ema_decay=0.99929, loss='sum'),
    cifar10_ncsnpp=dict(
        nf=128, ch_mult=(2, 2, 2), num_blocks=4, attn=(16,), dropout=0.13, batch_size=512,
        steps=390625, lr=1e-3, warmup=19531, ema_decay=0.99929, loss='sum'))

OURS = dict(  # not from a paper: these make the pictures of the README
    glyphs=dict(
        nf=64, ch_mult=(1, 1), num_blocks=1, attn=(4,), dropout=0, batch_size=64, field_batch=1024,
        steps=1400, lr=1e-2, warmup=50, ema_decay=0.98, loss='sum', classes=True, patch=2,
        skip=False, muon=True, decay=1.0, m_draws=4, ncsnpp=False, label_first=False),
    mnist=dict(
        nf=64, ch_mult=(1, 1), num_blocks=1, attn=(7, 8), dropout=0, batch_size=64,
        field_batch=4096, steps=5000, lr=1e-2, warmup=50, ema_decay=0.98, loss='sum', classes=True,
        patch=2, skip=True, muon=True, decay=1.0, m_draws=4, ncsnpp=False, label_first=False))


@pytest.mark.parametrize('name', [*PUBLISHED, *OURS])
def test_presets__are_the_published_values(name):
    preset = train.PRESETS[name]
    expected = {**PUBLISHED, **OURS}[name]
    assert {key: preset[key] for key in expected} == expected


@pytest.mark.parametrize('name', PUBLISHED)
def test_presets__of_the_papers_leave_off_what_is_ours(name):
    preset = train.PRESETS[name]
    ours = dict(classes=False, patch=1, skip=False, muon=False, decay=0.0, m_draws=1)
    assert {key: preset[key] for key in ours} == ours
    is_ncsnpp = name == 'cifar10_ncsnpp'
    assert (preset['ncsnpp'], preset['label_first']) == (is_ncsnpp, is_ncsnpp)


def test_presets__are_tested_one_by_one():
    assert set(train.PRESETS) == {*PUBLISHED, *OURS}
    assert {size: name for size, preset in train.BY_SIZE.items()
            for name in train.PRESETS if train.PRESETS[name] is preset} == {
                28: 'mnist', 32: 'cifar10', 64: 'celeba64', math.inf: 'lsun_bedroom'}


def test_presets__ncsnpp_trains(tmp_path):
    script(['train.py', '--out_dir', tmp_path, *'--preset cifar10_ncsnpp --dataset glyphs --nf 8 '
            '--image_size 32 --num_blocks 1 --batch_size 2 --steps 2 --device cpu'.split()])
    net, flags = checkpoint.load_checkpoint(tmp_path / 'ckpt.pt')
    assert flags['method'] == 'pfgmpp' and flags['ncsnpp'] and flags['label_first']
    assert net.net.freq.std() > 8 and not flags['edm']


# ---------------------------------------------------------------- flags

def help_of(capsys, monkeypatch, *flags):
    """The lines of --help, each flag on one."""
    monkeypatch.setenv('COLUMNS', '9999')
    with pytest.raises(SystemExit) as stop:
        train.parse_args([*flags, '--help'])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    joined = []
    for line in lines:
        if line.startswith(' ' * 20) and joined:  # argparse breaks after a long name
            joined[-1] += f' {line.strip()}'
        else:
            joined.append(line)
    return joined


def test_help__ends_each_flag_with_its_default_or_its_value_in_the_preset(capsys, monkeypatch):
    lines = help_of(capsys, monkeypatch)
    flags = vars(train.parse_args([]))
    shown = {}
    for line in lines:
        if line.startswith('  --'):
            name, default = re.match(r'  --(\w+).*\((?:default|preset): (.*)\)$', line).groups()
            shown[name] = default
    del flags['given']
    assert shown.keys() == flags.keys()
    for name, value in flags.items():
        if value is not None:  # else a preset, the data or a checkpoint decides
            assert shown[name] == str(value)
    for name, value in train.GLYPHS.items():
        assert shown[name] == str(value)
    assert shown['M'] == 'by the data'


def test_help__shows_the_preset_of_the_data_set_or_the_one_that_is_named(capsys, monkeypatch):
    for flags in (['--dataset', 'lsun_bedroom'], ['--preset=lsun_bedroom']):
        text = '\n'.join(help_of(capsys, monkeypatch, *flags))
        for name, value in (('M', '356'), ('lr', '2e-05'), ('ch_mult', '(1, 1, 2, 2, 4, 4)')):
            assert re.search(rf'  --{name} .*\(preset: {re.escape(value)}\)', text)


def test_help__is_in_groups_and_rare_flags_come_last(capsys, monkeypatch):
    lines = help_of(capsys, monkeypatch)
    groups = [line[:-1] for line in lines if line.endswith(':') and not line.startswith(' ')]
    assert groups == ['options', 'data', 'method', 'network', 'run', 'output', 'preset fields']
    last = '\n'.join(lines[lines.index('preset fields:'):])
    for name in ('m_draws', 'patch', 'skip', 'muon', 'decay', 'label_first'):
        assert f'\n  --{name}' in last


# ---------------------------------------------------------------- one step

@pytest.mark.parametrize('step, rate', [
    (1, 0.25), (2, 0.5), (3, 0.75), (4, 1), (5, 1), (16, 1), (17, 0.8), (18, 0.6), (20, 0.2)])
def test_learning_rate__rises_stays_and_falls(step, rate):
    close(train.learning_rate(step, 2.0, steps=20, warmup=4, decay=0.25), 2 * rate, rtol=1e-12)


def test_learning_rate__of_the_papers_rises_and_stays():
    assert train.learning_rate(1, 2e-4, 1300000, warmup=5000, decay=0.0) == 2e-4 / 5000
    assert train.learning_rate(5000, 2e-4, 1300000, warmup=5000, decay=0.0) == 2e-4
    assert train.learning_rate(1300000, 2e-4, 1300000, warmup=5000, decay=0.0) == 2e-4
    assert train.learning_rate(1, 0.1, 10, warmup=0, decay=0.0) == 0.1


def test_learning_rate__of_a_run_rises_stays_and_falls_to_0_at_the_last_step(
        trained, tmp_path, capsys):
    def rates(folder):
        return [row['lr'] / 2e-3 for row in rows_of(folder / 'log.jsonl')]
    close(rates(trained), [1 / 3, 2 / 3, *[1] * 8])  # of --decay 0
    command = ['train.py', *TINY, '--warmup', 2, '--decay', 0.5, '--out_dir', tmp_path]
    script([*command, '--steps', 8])
    script([*command, '--steps', 12])  # up again: as the longer run would have it
    assert 'it rises again' in capsys.readouterr().out
    close(rates(tmp_path), [1 / 2, 1, 1, 1, 1, 3 / 4, 1 / 2, 1 / 4, 4 / 6, 3 / 6, 2 / 6, 1 / 6],
          rtol=1e-12)


@pytest.fixture
def first_weights(monkeypatch):
    """A dict that is filled with the weights that the network has before its first step."""
    weights = {}
    networks = train.networks

    def spy(*arguments):
        raw, ema = networks(*arguments)
        weights.update(copy.deepcopy(raw.state_dict()))
        return raw, ema
    monkeypatch.setattr(train, 'networks', spy)
    return weights


def test_step__averages_the_weights_with_a_decay_that_warms_up(first_weights, tmp_path):
    script(['train.py', *TINY, *'--ema_decay 0.5 --steps 12 --save_every 1 --keep 20'.split(),
            '--lr', 0.05, '--out_dir', tmp_path])
    average = {name: weight.double() for name, weight in first_weights.items()}
    decays = []
    for step in range(1, 13):
        name = 'ckpt.pt' if step == 12 else f'ckpt-{step:07d}.pt'
        saved = torch.load(tmp_path / name, weights_only=True)
        assert saved['step'] == step
        decays.append(min(0.5, (1 + step) / (10 + step)))
        for key, weight in saved['net'].items():
            average[key] = decays[-1] * average[key] + (1 - decays[-1]) * weight.double()
            close(saved['ema'][key], average[key], rtol=1e-4, atol=1e-6)
    assert decays[0] == 2 / 11 and decays[6] < decays[7] == decays[11] == 0.5


def test_step__clips_the_gradient_and_moves_as_adam_of_the_papers(first_weights, tmp_path):
    script(['train.py', *TINY, *'--no-muon --grad_clip 1e-3 --warmup 0 --steps 1'.split(),
            '--out_dir', tmp_path])
    saved = loaded(tmp_path)
    group, = saved['opt']['param_groups']
    assert group['betas'] == (0.9, 0.999) and group['eps'] == 1e-8 and group['weight_decay'] == 0
    states = saved['opt']['state'].values()
    gradients = [state['exp_avg'].double() / 0.1 for state in states]
    close(sum(g.square().sum() for g in gradients).sqrt(), 1e-3, rtol=1e-4)
    for (name, weight), g in zip(saved['net'].items(), gradients, strict=True):
        moved = (first_weights[name].double() - weight.double())
        close(moved, 2e-3 * g / (g.abs() + 1e-8), atol=1e-6)


@pytest.mark.parametrize('has_classes', [False, True], ids=['no_classes', 'classes'])
def test_step__has_the_loss_of_algorithm_1(has_classes, tmp_path):
    """Of the fourth step the loss is computed here anew, from the weights after the third."""
    command = ['train.py', *TINY, '--lr', 0.05, '--m_draws', 1,  # so that some points are far out
               '--out_dir', tmp_path]
    if has_classes:
        command.append('--classes')  # after --no-classes; the last one counts
    script([*command, '--steps', 3])
    before = loaded(tmp_path)
    script([*command, '--steps', 4])

    flags = before['args']
    images = load_images('glyphs', 'data', None, None)
    indices = next(image_order(len(images), 64, 0, 3))
    charges = to_float(images.pixels[indices])
    generator = torch.Generator().manual_seed(step_seed(0, 3))
    labels = ()
    among = None
    if has_classes:  # a point without a label sees the field of all charges
        is_hidden = torch.rand(8, generator=generator) < 0.1
        of_charges = images.labels[indices]
        of_points = torch.where(is_hidden, -1, of_charges[:8])
        labels = (of_points,)
        among = is_hidden[:, None] | (of_points[:, None] == of_charges)
    moved, z = pfgm.perturb(charges[:8], flags['M'], generator=generator, m_draws=flags['m_draws'])
    target_x, target_z = pfgm.poisson_field(moved, z, charges, 5.0, among=among)
    net = as_flow(build(before['net'], flags, 'net').train(), flags)
    with torch.no_grad():
        v_x, v_z = net(moved, z, *labels)
    assert v_x.norm() > 0.1 * target_x.norm()  # the network has its part in the loss
    error = (v_x - target_x).square().flatten(1).sum(1) + (v_z - target_z).square()
    close(losses(tmp_path)[3], (error / 2).mean(), rtol=1e-5)


def test_step__of_a_denoiser_weighs_the_error_as_edm(tmp_path):
    """The same for pfgmpp with D = inf: EDM Eq. 8."""
    command = ['train.py', *TINY_PP, '--D', 'inf', '--lr', 1e-2, '--out_dir', tmp_path]
    script([*command, '--steps', 3])
    before = loaded(tmp_path)
    script([*command, '--steps', 4])
    flags = before['args']
    images = load_images('glyphs', 'data', None, None)
    clean = to_float(images.pixels[next(image_order(len(images), 8, 0, 3))])
    generator = torch.Generator().manual_seed(step_seed(0, 3))
    sigma = torch.exp(-1.2 + 1.2 * torch.randn(8, generator=generator))
    noisy = clean + sigma.view(-1, 1, 1, 1) * torch.randn(clean.shape, generator=generator)
    net = as_flow(build(before['net'], flags, 'net').train(), flags)
    with torch.no_grad():
        v_x, _ = net(noisy, sigma)
    denoised = noisy + v_x
    weight = (sigma ** 2 + 0.25) / (0.5 * sigma) ** 2
    error = weight * (denoised - clean).square().flatten(1).sum(1)
    close(losses(tmp_path)[3], (error / 2).mean(), rtol=1e-4)


# ---------------------------------------------------------------- runs on labels

def test_step__calls_the_network_in_autocast_and_compiled_as_a_whole(straight, tmp_path,
                                                                     monkeypatch):
    calls = []
    compiled = []
    forward = UNet.forward
    backward = torch.Tensor.backward

    def noted(net, x, z, *labels):
        calls.append((net.training, torch.is_autocast_enabled('cpu')))
        return forward(net, x, z, *labels)

    def noted_backward(loss):
        calls.append(('backward', torch.is_autocast_enabled('cpu')))
        backward(loss)

    monkeypatch.setattr(UNet, 'forward', noted)
    monkeypatch.setattr(torch.Tensor, 'backward', noted_backward)
    monkeypatch.setattr(torch.nn.Module, 'compile',
                        lambda module, mode: compiled.append((type(module), mode)))
    command = [word for word in TINY_PP if word not in ('--no-bf16', '--no-classes')]
    out = said(['train.py', *command, '--bf16', '--classes', '--consistency', '--init_from',
                straight, '--compile', 'reduce-overhead', '--steps', 1, '--out_dir', tmp_path])
    assert '--compile reduce-overhead: there are no CUDA graphs on cpu; it does there' in out
    # The target of consistency, and what is learned. A sum is float32 in a GPU's autocast, so that
    # gradients would be cast there.
    assert calls == [(False, True), (True, True), ('backward', False)]
    assert compiled == [(methods.RectifiedFlow, 'reduce-overhead')]


@pytest.mark.slow
def test_step__asks_of_a_gpu_what_the_bench_counts(here, monkeypatch):
    """A run on a pretended GPU, whose second step waits for nothing."""
    small = dict(nf=8, ch_mult=(1, 1), num_blocks=1, dropout=0)
    np.save('x.npy', np.zeros((64, 32, 32, 3), np.uint8))
    steps = []
    observe = Meter.observe

    def noted(meter, *measured):
        observe(meter, *measured)
        steps.append(gpu.counts)
        gpu.counts = Counts()

    monkeypatch.setattr(Meter, 'observe', noted)
    monkeypatch.setattr(train, 'stop_if_bad', lambda *of_the_run: None)  # every number is 1
    monkeypatch.setattr(train.Saver, 'save', lambda saver, checkpoint: None)
    monkeypatch.setitem(train.PRESETS, 'cifar10', dict(train.CIFAR10, **small))
    monkeypatch.setattr(bench, 'UNet', lambda: UNet(**small))
    with pretended_gpu() as gpu:
        script(['train.py', *'--device cuda --dataset x.npy --channels 3 --preset cifar10'.split(),
                *'--batch_size 8 --field_batch 16 --steps 3 --sample_every 0'.split()])
        counted = bench.training_counts(gpu, bench.BlankImages(64), 8, 16)
    _, second, third, *_ = steps  # and those of the bench
    assert second == third and second.syncs == counted.syncs == []
    for name in ('flops', 'activation_casts', 'weight_casts', 'copies'):
        assert getattr(second, name) == getattr(counted, name), name
    assert abs(second.kernels - counted.kernels) < 10  # --accum and losses that are joined


def test_train__on_classes_by_name_goes_on_where_the_data_moved(tmp_path):
    photos = classes_of(tmp_path / 'photos', '2', '10', 'cat')
    out = tmp_path / 'o'
    command = ['train.py', *TINY_PP, '--D', 2, '--classes', '--out_dir', out, '--steps']
    assert 'in 3 classes (2, 10, cat)' in said([*command, 2, '--dataset', photos])

    # --ckpt takes the folder of a run.
    sampling = ['sample.py', '--ckpt', out, '--nfe', 2, '--n', 3, '--device', 'cpu',
                '--out', tmp_path / 'a.png', '--verbose', '--classes']
    for classes, labels in (('cat,2', '[2, 0]'), ('10', '[1]'), ('none', '[]')):
        assert f'classes {labels}' in said([*sampling, classes])
    refuses([*sampling, '0'], '--classes 0: the network knows .*2, 10, cat')

    photos = photos.rename(tmp_path / 'moved')
    script([*command, 3, '--dataset', f'{photos}/'])
    picture(0, 16).save(photos / 'cat' / '99.png')
    refuses([*command, 4, '--dataset', photos],
            'holds a run on .*--init_from .*ckpt.pt .*24 images there, 25 here')
    (photos / 'cat' / '99.png').unlink()
    (photos / 'cat').rename(photos / 'cow')
    refuses([*command, 4, '--dataset', photos], 'classes 2, 10, cat there, 2, 10, cow here')
    refuses([*command, 4, '--dataset', photos / '2'],
            '--dataset .*2: --out_dir .*o holds a run on .*moved/; give another')
