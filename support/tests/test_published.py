"""Tests of support/published.py: the authors' files give the authors' numbers, and hostile ones end
in one line."""
import json
import math
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import pfgm
import unet
from support import checkpoint, published
from support.cli import BadInput
from support.flow import load_flow
from support.run import restore_optimizer
from support.tests.common import (F64, HERE, SHARED, close, joined, loaded, refuses, said, same,
                                  sampled, script, seeded)
from support.tests.made import Payload, limited, mutated, zipped
from support.tests.published_files import SongUNet, as_edm, edm_file, norm, tiny_official

DATA = Path(__file__).parent / 'data'  # reference numbers of the authors' code
GOLDEN = SHARED / 'golden'             # more of them, which not everyone has
GOLDEN_EDM = SHARED / 'golden_edm'
golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason='no ../shared/golden: more reference '
                            'numbers of PFGM are not here')
golden_edm = pytest.mark.skipif(not GOLDEN_EDM.is_dir(), reason='no ../shared/golden_edm: more '
                                'files and numbers of EDM and PFGM++ are not here')
CPU = torch.device('cpu')


def tensors_in(path):
    """{name: tensor} of a .npz, its texts left out."""
    arrays = np.load(path)
    return {key: torch.from_numpy(arrays[key]) for key in arrays if 'trace' not in key}


# ---------------------------------------------------------------- constants

def test_constants__are_those_of_the_paper():
    """PFGM, Appendix B.1, and the configurations of its published code."""
    assert published.CIFAR10 == dict(M=291, z_max=40, upper_norm=3000, z_exp=5)
    assert published.CELEBA64 == dict(M=291, z_max=60, upper_norm=6000, z_exp=1)
    assert published.LSUN_BEDROOM == dict(M=356, z_max=100, upper_norm=30000, z_exp=0.1)
    assert published.OFFICIAL == dict(
        cifar10=published.CIFAR10, cifar10_deep=published.CIFAR10, celeba64=published.CELEBA64,
        lsun_bedroom=published.LSUN_BEDROOM)
    for size, name in published.OFFICIAL_BY_SIZE.items():
        assert published.OFFICIAL[name] and size == dict(
            cifar10=32, celeba64=64, lsun_bedroom=256)[name]


# ---------------------------------------------------------------- the files of PFGM

def gives_the_authors_outputs(path, weights, reference):
    net, flags = checkpoint.load_checkpoint(path, weights)
    assert (flags['image_size'], flags['nf'], flags['num_blocks']) == (32, 16, 1)
    ref = tensors_in(reference)
    for far in ('', '_far'):
        wanted = joined([ref[f'{weights}_out_x{far}'], ref[f'{weights}_out_z{far}']])
        close(joined(net(ref[f'x{far}'], ref[f'z{far}'])).detach(), wanted, atol=5e-5)


def test_convert_official__gives_the_authors_outputs():
    gives_the_authors_outputs(DATA / 'ckpt_cifar10_tiny.pth', 'ema', DATA / 'io_cifar10_tiny.npz')


def test_convert_official__reads_what_numpy_1_wrote(tmp_path):
    with zipfile.ZipFile(DATA / 'ckpt_cifar10_tiny.pth') as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    assert any(b'numpy._core.multiarray' in content for _, content in entries)
    entries = [(name, content.replace(b'numpy._core.multiarray', b'numpy.core.multiarray'))
               for name, content in entries]
    (tmp_path / 'a.pth').write_bytes(zipped(entries, zipfile.ZIP_STORED))
    gives_the_authors_outputs(tmp_path / 'a.pth', 'ema', DATA / 'io_cifar10_tiny.npz')


@golden
@pytest.mark.parametrize('file', ['ckpt_cifar10_tiny.pth', 'ckpt_cifar10_tiny_legacy.pth'])
@pytest.mark.parametrize('weights', ['ema', 'raw'])
def test_convert_official__gives_the_outputs_of_whole_files(file, weights):
    gives_the_authors_outputs(GOLDEN / file, weights, GOLDEN / 'io_cifar10_tiny.npz')


def test_convert_official__its_moments_serve_fused_adam(tmp_path):
    source = tiny_official(tmp_path / 'a.pth')
    saved = checkpoint.read_checkpoint(tmp_path / 'a.pth')
    net = checkpoint.build(saved['net'], saved['args'], 'a.pth')
    opt = torch.optim.Adam(net.to(memory_format=torch.channels_last).parameters())
    restore_optimizer(opt, saved, CPU, 0)
    assert opt.param_groups[0]['fused'] and saved['step'] == 7
    for (name, p), ours in zip(source.named_parameters(), net.parameters()):
        p = p.detach() + 0.01
        state = opt.state[ours]
        close(saved['net'][name], p)
        close(saved['ema'][name], 2 * p)
        close(state['exp_avg'], 6 * p)
        close(state['exp_avg_sq'], 4 * p * p)
        # fused Adam pairs what lies at the same place in memory, whatever the strides
        assert state['exp_avg'].stride() == state['exp_avg_sq'].stride() == ours.stride()


@pytest.mark.parametrize('image_size, ch_mult, num_blocks, dropout', [
    (32, [1, 2, 2, 2], 4, 0.1), (32, [1, 2, 2, 2], 8, 0.1), (64, [1, 2, 2, 2], 4, 0.1),
    (256, [1, 1, 2, 2, 4, 4], 2, 0.0)])
def test_official_architecture__of_the_published_networks(image_size, ch_mult, num_blocks, dropout):
    with torch.device('meta'):
        net = unet.UNet(image_size, nf=16, ch_mult=ch_mult, num_blocks=num_blocks)
    names = published.official_names(net)
    model = {names[name]: p for name, p in net.named_parameters()}
    flags = published.official_architecture(model, 'a.pth')
    assert flags == dict(published.UNSTATED_FLAGS, image_size=image_size, nf=16, channels=3,
                         ch_mult=ch_mult, attn=[16], dropout=dropout, num_blocks=num_blocks)


def rename_a_tensor(saved):
    saved['model']['other'] = saved['model'].pop('module.all_modules.3.Conv_0.weight')


@pytest.mark.parametrize('message, change', [
    ('3.Conv_0.weight is missing; other does not belong', rename_a_tensor),
    ('2.bias is missing', lambda saved: saved['model'].pop('module.all_modules.2.bias')),
    (r'5.Conv_0.weight is \(8, 16, 3, 3\), expected \(16, 8, 3, 3\)', lambda saved: saved[
        'model'].update({'module.all_modules.5.Conv_0.weight': torch.ones(8, 16, 3, 3)})),
    ('shadow_params', lambda saved: saved['ema']['shadow_params'].pop()),
    ('not a checkpoint of tensors', lambda saved: saved.update(extra=Payload())),
    ('not a checkpoint of train.py', lambda saved: saved.pop('model'))])
def test_convert_official__names_the_damage_in_one_line(message, change, here):
    tiny_official('a.pth', change)
    refuses(['sample.py', '--ckpt', 'a.pth', '--device', 'cpu'], message)
    assert os.listdir('.') == ['a.pth']  # nothing ran, nothing was written


# ---------------------------------------------------------------- the files of EDM and PFGM++

@torch.no_grad()
def gives_the_authors_numbers(file, D, classes):
    """Compare network, denoiser and sampler with golden.npz and sampler.npz beside the file."""
    net, flags = checkpoint.load_checkpoint(file)
    assert (flags['D'], flags['classes']) == (D, classes)
    ref = tensors_in(file.with_name('golden.npz'))
    made = tensors_in(file.with_name('sampler.npz'))
    labels = [ref['labels']] if classes else []
    x, sigma = ref['x'].double(), ref['sigma'].double()
    z = sigma * pfgm.unit(D)

    close(torch.stack(net.coefficients(ref['sigma'])),
          torch.stack([ref[key] for key in ('c_skip', 'c_out', 'c_in', 'c_noise')]), rtol=1e-6)
    embedded = []
    with net.net.embed[1].register_forward_hook(lambda *call: embedded.append(call[2])):
        c_in = ref['c_in'].view(-1, 1, 1, 1)
        close(net.net(c_in * ref['x'], ref['c_noise'], *labels)[0], ref['F'], atol=2e-4)
    close(F.silu(embedded[0]), ref['emb'], atol=1e-4)

    v_x, v_z = net(x, z, *labels)
    close(v_x + x, ref['D'], atol=1e-4)
    close(v_z, -z)
    v_x, _ = net(x, z)
    close(v_x + x, ref['D_nolabel' if classes else 'D'], atol=1e-4)

    start = made['latents'].double() * (1 if classes else 80)  # EDM's are of variance 1
    out, calls = pfgm.sample_ode(net, start, flags['z_max'], flags['z_min'], 'heun', 35, D=D,
                                 z_exp=0, labels=made.get('labels'), schedule_name='rho7',
                                 to_data=True)
    assert calls == 35
    close(out, made['x_final'], atol=1e-4)

    c_in = (sigma.square() + 0.25).rsqrt().view(-1, 1, 1, 1)
    close(net.double().net(c_in * x, sigma.log() / 4, *labels)[0], ref['F64'], atol=1e-6)


def test_read_edm__gives_the_authors_numbers():
    folder = DATA / 'pfgmpp-cifar10_ncsnpp_D_2048_conditional'
    gives_the_authors_numbers(folder / 'network-snapshot-200000.pt', 2048, 10)


@pytest.mark.slow
@golden_edm
@pytest.mark.parametrize('file, D, classes', [
    ('edm-cifar10-32x32-uncond-vp/network-snapshot-200000.pkl', math.inf, 0),
    ('pfgmpp-cifar10_ncsnpp_D_2048_conditional/training-state-200000.pkl', 2048, 10),
    ('pfgmpp-cifar10_ncsnpp_D_2048_conditional-pt/training-state-200000.pt', 2048, 10)])
def test_read_edm__gives_the_numbers_of_whole_files(file, D, classes):
    gives_the_authors_numbers(GOLDEN_EDM / file, D, classes)


@pytest.mark.parametrize('zip_form, shape', [
    (True, dict(classes=4, augment=0)), (False, dict(size=64, mult=(1, 2, 2, 2))),
    (False, dict(ncsnpp=True, classes=4)),
    (True, dict(ncsnpp=True, nf=12, size=64, mult=(1, 2, 2)))])
def test_read_edm__gives_the_network_and_its_moments(zip_form, shape, here):
    theirs = edm_file('a.pkl', zip_form, **shape)
    side = shape.get('size', 32)
    net, flags = checkpoint.load_checkpoint('a.pkl')
    assert (flags['D'], flags['step'], flags['ncsnpp']) == (math.inf, 7, 'ncsnpp' in shape)
    x = torch.randn(2, 3, side, side, generator=seeded())
    c_noise = torch.tensor([-1.2, 1.1])
    labels = torch.tensor([0, 3]) if 'classes' in shape else None
    with torch.no_grad():
        close(net.net(x, c_noise, labels)[0], theirs(x, c_noise, labels), atol=2e-5)
    saved = checkpoint.read_checkpoint('a.pkl', whole=True)
    assert not same(saved['net'], saved['ema'])
    state = saved['opt']['state']
    for i, (name, _) in enumerate(net.net.named_parameters()):
        close(state[i]['exp_avg'], 3 * saved['net'][name], rtol=1e-6)
        close(state[i]['exp_avg_sq'], saved['net'][name].square(), rtol=1e-6)
    assert checkpoint.read_checkpoint('a.pkl').keys() == {'ema', 'step', 'args'}


@golden_edm
def test_edm_names__of_the_full_size_networks():
    for kind, rows in json.loads((GOLDEN_EDM / 'structure.json').read_text()).items():
        size, mult = (64, (1, 2, 2, 2)) if 'ffhq' in kind else (32, (2, 2, 2))
        ncsnpp, classes = kind.endswith('ve'), 10 if '-cond' in kind else 0
        with torch.device('meta'):
            theirs = SongUNet(size, 128, mult, 4, ncsnpp, classes).state_dict()
            net = unet.UNet(size, ch_mult=mult, classes=classes, ncsnpp=ncsnpp, label_first=True)
        shapes = [[f'model.{name}', list(t.shape)] for name, t in theirs.items()]
        assert shapes == [row[:2] for row in rows], kind
        names = published.edm_names(net, theirs)
        left = {name for name in theirs if not name.endswith('filter')} - set(names.values())
        assert left == {'map_augment.weight'} and names.keys() == net.state_dict().keys(), kind


@pytest.mark.parametrize('flags, D', [
    (dict(D=2048, pfgmpp=True), 2048), (dict(D=128, pfgmv2=True, pfgm=False), 128), ({}, math.inf),
    (dict(D=128, pfgmpp=False), math.inf), (dict(D=128, pfgm=False, pfgmv2=False), math.inf)])
def test_edm_flags__D_counts_where_its_flag_is_set(flags, D, tmp_path):
    edm_file(tmp_path / 'a', zip_form=bool(flags), whole=False, **flags)
    net, flags = checkpoint.load_checkpoint(tmp_path / 'a')
    assert flags['D'] == D
    close([flags['z_min'], flags['z_max']], np.array([0.002, 80]) * pfgm.unit(D), rtol=1e-12)
    far = torch.full((2, 3, 32, 32), 1e4, dtype=F64)
    close(net.sigma(far, torch.ones(2)), torch.ones(2) / pfgm.unit(D), rtol=1e-6)  # not of |x|


def test_read_edm__files_sample_prune_encode_and_are_compared(here):
    edm_file('a.pkl', classes=10, nf=4, size=16, D=128, pfgmpp=True)
    edm_file('b.pkl', whole=False, nf=4, size=16)
    for nfe, solver, schedule, calls, ends_as_published in (
            (None, 'heun', 'rho7', 35, True), (10, 'unipc', 'radius', 10, False)):
        flow = load_flow('a.pkl', CPU, nfe=nfe)
        assert (flow.solver, flow.chosen_schedule(), flow.nfe) == (solver, schedule, calls)
        assert (flow.ending() == (True, 0.002 * 128 ** 0.5)) == ends_as_published
        assert flow.class_count == 10
    x, calls = flow.follow(flow.prior([0, 1]), CPU, [0, 1])
    assert x.dtype == F64 and calls == 10
    script(['checkpoint.py', 'a.pkl', '--out', 'c.pt'])
    images, of_pruned = (sampled('a.npz', '--n', 2, '--classes', 3, '--ckpt', path)
                         for path in ('a.pkl', 'c.pt'))
    assert np.array_equal(images, of_pruned)
    for flags in ('--solver rk45 --tol 0.1', '--interpolate --nfe 3',
                  '--encode glyphs --solver dpm3m --nfe 4 --schedule log'):
        script(['sample.py', '--ckpt', 'b.pkl', '--n', 2, *flags.split()])
    script('evaluate.py --compare b.pkl a.pkl --swd --sweep nfe=3 --n 8 --dataset glyphs'.split())
    refuses(['sample.py', '--ckpt', 'b.pkl', '--classes', 0], 'the network knows none')


def test_read_edm__files_are_trained_on(here):
    edm_file('a.pkl', classes=10, nf=4, size=16, D=128, pfgmpp=True)
    edm_file('b.pkl', whole=False, nf=4, size=16)
    train_on = ('train.py --dataset glyphs --image_size 16 --channels 3 --batch_size 2 --lr 1e-9 '
                '--device cpu --no-bf16').split()
    out = said([*train_on, '--init_from', 'b.pkl', '--steps', 1, '--out_dir', 'o'])
    assert 'the file has no optimizer state: Adam starts afresh' in out
    train_on += ['--classes', '--out_dir', 'p', '--steps']
    assert 'afresh' not in said([*train_on, 8, '--init_from', 'a.pkl'])
    raw = checkpoint.read_checkpoint('a.pkl', whole=True)['net']
    saved = loaded('p')
    assert all((saved['net'][name] - t).abs().max() < 1e-6 for name, t in raw.items())
    assert saved['args']['edm'] and saved['args']['D'] == 128
    assert saved['opt']['state'][0]['step'] == 8
    script([*train_on, 9, '--D', 128])


# ---------------------------------------------------------------- hostile files

def opcodes(*parts):
    """A pickle of protocol 4 put together by hand."""
    return b'\x80\x04' + b''.join(parts) + b'.'


def word(text):
    """The opcode of a short text."""
    return bytes([140, len(text)]) + text.encode()


REBUILD = word('torch._utils') + word('_rebuild_tensor_v2') + b'\x93'
CLAIMS = [('a memo', b'Nr', 4, 31), ('bytes', b'B', 4, 32), ('bytes', b'\x8e', 8, 40),
          ('a bytearray', b'\x96', 8, 33), ('a text', b'\x8d', 8, 60), ('a frame', b'\x95', 8, 40),
          ('a number', b'\x8b', 4, 31)]  # what, its opcode, bytes of the length, its power of 2
MANY = 30_000  # times that a megabyte is made, from a reference of some bytes to it
MEGABYTE = b'X' + (2 ** 20).to_bytes(4, 'little') + b'x' * 2 ** 20 + b'\x940'  # memo 0
HOSTILE_PICKLES = {
    'eval': opcodes(word('builtins'), word('eval'), b'\x93', word('1'), b'\x85R'),
    'dotted': opcodes(word('torch._utils'), word('_rebuild_tensor_v2.__globals__'), b'\x93)R'),
    'GLOBAL': b'\x80\x02cos\nsystem\n(X\x05\0\0\0touchtR.', 'INST': b"(S'touch'\nios\nsystem\n.",
    'odd arguments': opcodes(REBUILD, b'K\x01K\x02\x86R'),
    'attributes of a function': opcodes(REBUILD, b'}', word('__defaults__'), b'K\x01\x85sb'),
    'a deep key': opcodes(b'}', b')' + b'\x85' * 200_000, b'Ns'),
    'deep lists': opcodes(b']' * 10 ** 5 + b'a' * (10 ** 5 - 1)),
    'None': opcodes(b'N'), 'no end': opcodes(word('x'))[:-1],
    'texts encoded often': opcodes(
        MEGABYTE, word('_codecs'), word('encode'), b'\x93\x940', word('latin1'), b'\x940](',
        b'h\x01h\x00h\x02\x86R' * MANY, b'e'),
    'a long size': opcodes(
        b'\x8b' + (2 ** 20).to_bytes(4, 'little') + b'\x7f' * 2 ** 20 + b'\x940',
        REBUILD, b'(NK\x00(', b'h\x00' * MANY, b't)tR'),
    **{f'{what} of 2^{power}': opcodes(code, (2 ** power - 1).to_bytes(size, 'little'))
       for what, code, size, power in CLAIMS},
}


def with_weight(make):
    """A change of edm_file(): one weight becomes make(weight)."""
    def change(saved):
        layer = saved['ema'].model.map_layer0._parameters
        layer['weight'] = make(layer['weight'])
    return dict(change=change)


def within_itself(saved):
    saved['ema'].model._modules.update(a=as_edm(saved['ema'])[1][0])


def without_number(saved):
    """2^60 modules: each of 60 stands twice in the next. None has a tensor."""
    part = torch.nn.Module()
    for _ in range(60):
        inside, part = part, torch.nn.Module()
        part.a = part.b = inside
    saved['ema'].model.a = part


HOSTILE_FILES = {  # what edm_file() is given
    'a payload': dict(change=lambda saved: saved.update(extra=Payload())),
    'no ema': dict(change=lambda saved: saved.update(net=saved.pop('ema'))),
    'no type': dict(change=lambda saved: saved['ema']._init_kwargs.pop('model_type')),
    'within itself': dict(change=within_itself),
    'without number': dict(change=without_number),
    'a part missing': dict(change=lambda saved: delattr(saved['ema'].model, 'map_layer1')),
    'a part more': dict(change=lambda saved: setattr(saved['ema'].model, 'a', norm(4))),
    'another shape': with_weight(lambda t: t.T), 'half': with_weight(lambda t: t.half()),
    'a stride of 0': with_weight(lambda t: t[:1, :1].expand(t.shape)),
    'a claim': with_weight(lambda t: t[:1].detach().as_strided((10 ** 12,), (0,))),
    'a mixture': dict(embedding_type='fourier'), 'VPPrecond': dict(kind='VPPrecond'),
    'wide': dict(model_channels=10 ** 9), 'many': dict(num_blocks=10 ** 9),
    'large': dict(img_resolution=2 ** 40), 'a text for D': dict(D='x' * 10 ** 6, pfgmpp=True),
    'a D of nan': dict(D=math.nan, pfgmpp=True), 'a spread below 0': dict(sigma_data=-1),
}
MESSAGES = {
    'a payload': 'asks for', 'eval': 'asks for builtins.eval', 'GLOBAL': 'asks for os.system',
    'dotted': 'asks for torch._utils._rebuild.*globals', 'no type': 'of ADM',
    'another shape': r'\(32, 8\)', 'VPPrecond': 'VPPrecond of SongUNet',
    'no ema': 'give the network-snapshot', 'texts encoded often': 'a text too long',
    'a long size': 'no shape of a tensor',
    'a bytearray of 2^33': 'KeyError: 150'}  # an opcode that Reader does not have


@pytest.mark.parametrize('zip_form', [False, True])
@pytest.mark.parametrize('case', [*HOSTILE_PICKLES, *HOSTILE_FILES])
def test_reader__hostile_files_are_refused_and_nothing_runs(case, zip_form, here):
    if case in HOSTILE_FILES:
        edm_file('a.pkl', zip_form, whole=False, **HOSTILE_FILES[case])
    else:
        raw = HOSTILE_PICKLES[case]
        if zip_form:  # its pickle must say whose it is
            raw = raw[:-1] + word('torch_utils.persistence') + b'0.'
            raw = zipped([('a/data.pkl', raw)], zipfile.ZIP_STORED)
        Path('a.pkl').write_bytes(raw)
    with limited(20, 2), patch.object(os, 'system', side_effect=AssertionError):
        refuses(['sample.py', '--ckpt', 'a.pkl', '--device', 'cpu'],
                MESSAGES.get(case, '--ckpt a.pkl: '))
    assert os.listdir('.') == ['a.pkl']


@pytest.mark.parametrize('seed, count', [(0, 15), pytest.param(1, 1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize('zip_form', [False, True])
def test_reader__damage_ends_in_one_line(zip_form, seed, count, here):
    edm_file('good', zip_form, classes=3, ncsnpp=True, nf=4)
    good = checkpoint.load_checkpoint('good')[0].state_dict()
    raw = Path('good').read_bytes()
    for size in (0, 1, 10, 1000, len(raw) // 2, len(raw) - 1):
        Path('cut').write_bytes(raw[:size])
        refuses(['sample.py', '--ckpt', 'cut'], '--ckpt cut: damaged')
    rng = np.random.default_rng(seed)
    refused = 0
    for _ in range(count):
        Path('a.pkl').write_bytes(mutated(raw, rng))
        try:
            with limited(20, 2):
                net, flags = checkpoint.load_checkpoint('a.pkl')
            # a plain pickle has no checksum: another number in it is another weight
            assert flags['edm'] and (not zip_form or same(net.state_dict(), good))
        except BadInput as error:
            assert re.fullmatch('--ckpt a.pkl: .{,999}', str(error))
            refused += 1
    assert refused


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='no /proc on this system')
@pytest.mark.parametrize('zip_form', [False, True])
def test_read_objects__a_full_size_training_state_takes_little_more_than_twice_its_size(
        zip_form, tmp_path):
    path = tmp_path / 'a'
    edm_file(path, zip_form, nf=128, mult=(2, 2, 2), blocks=4, ncsnpp=True, classes=10)
    program = ('from support import checkpoint\n'
               'status = lambda: open("/proc/self/status").read()\n'
               'print(status())\n'
               f'net, flags = checkpoint.load_checkpoint({str(path)!r})\n'
               'print(sum(p.numel() for p in net.parameters()), status())')
    out = subprocess.run([sys.executable, '-c', program], cwd=HERE, check=True, text=True,
                         stdout=subprocess.PIPE).stdout
    before, after = (int(kilobytes) << 10 for kilobytes in re.findall(r'VmHWM:\s*(\d+) kB', out))
    assert 55e6 < int(re.search(r'^(\d{8,})', out, re.M)[1]) < 57e6
    print(f'{path.stat().st_size / 1e6:.0f} MB of file, {(after - before) / 1e6:.0f} MB of memory')
    assert after - before < 2.1 * path.stat().st_size
