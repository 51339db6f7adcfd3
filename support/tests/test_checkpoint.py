"""Tests of support/checkpoint.py: what is saved, and files that are damaged, hostile or wrong."""
import io
import itertools
import math
import os
import re
import zipfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from support import checkpoint
from support.cli import BadInput
from support.methods import as_flow
from support.networks import ARCHITECTURE, build
from support.tests.common import TINY, close, loaded, refuses, said, same, script
from support.tests.made import limited, mutated, zipped
from support.tests.published_files import edm_file, tiny_official


# ---------------------------------------------------------------- what is saved, and read

def plain(value):
    """Whether a value consists of tensors, numbers and texts, in dicts and lists."""
    if isinstance(value, dict):
        return all(plain(part) for part in (*value, *value.values()))
    if isinstance(value, (list, tuple)):
        return all(plain(part) for part in value)
    return type(value) in (torch.Tensor, int, float, bool, str, type(None))


def test_save__a_run_keeps_plain_values_alone(trained):
    saved = loaded(trained)
    assert saved.keys() == {'net', 'ema', 'opt', 'step', 'args', 'rng'}
    assert all(plain(part) for key, part in saved.items() if key not in ('net', 'ema'))
    assert all(plain(dict(saved[key])) for key in ('net', 'ema'))


def test_save__leaves_the_old_file_where_the_new_one_cannot_be_written(tmp_path):
    path = tmp_path / 'a.pt'
    checkpoint.save(path, dict(step=1))
    with patch.object(os, 'fsync', side_effect=OSError(28, 'No space left on device')):
        with pytest.raises(BadInput, match=r'cannot be written \(.*No space left'):
            checkpoint.save(path, dict(step=2))
    assert torch.load(path) == dict(step=1) and os.listdir(tmp_path) == ['a.pt']


def test_load_checkpoint__gives_the_weights_asked_for_and_the_flags(trained):
    saved = loaded(trained)
    for weights, part in (('ema', 'ema'), ('raw', 'net')):
        net, flags = checkpoint.load_checkpoint(trained / 'ckpt.pt', weights)
        assert same(net.net.state_dict(), saved[part]) and not net.training
        assert flags == {**saved['args'], 'step': 10}
    assert not same(saved['ema'], saved['net'])
    v_x, v_z = net(torch.zeros(2, 1, 16, 16), torch.ones(2))
    assert v_x.shape == (2, 1, 16, 16) and v_z.shape == (2,)


@pytest.mark.parametrize('path, message', [
    ('none.pt', '--ckpt none.pt: no such file; make one with: python train.py'),
    ('folder', '--ckpt folder: not a file; make one with: python train.py'),
    ('text.pt', '--ckpt text.pt: damaged'), ('empty.pt', '--ckpt empty.pt: damaged'),
    ('number.pt', '--ckpt number.pt: not a checkpoint of train.py'),
    ('dict.pt', '--ckpt dict.pt: not a checkpoint of train.py')])
def test_read_checkpoint__other_files_end_in_one_line(path, message, here):
    Path('folder').mkdir()
    Path('text.pt').write_text('a text')
    Path('empty.pt').touch()
    torch.save(5, 'number.pt')
    torch.save(dict(ema={}, step=1), 'dict.pt')
    with pytest.raises(BadInput, match='^' + re.escape(message)):
        checkpoint.read_checkpoint(path)


# ---------------------------------------------------------------- pruning and averaging

def test_average__prunes_and_averages(trained, here):
    saved = loaded(trained)
    shifted = {name: t + 1 for name, t in saved['ema'].items()}
    torch.save({**saved, 'ema': shifted, 'step': 30}, 'b.pt')
    for out, files, shift, step in (('ema.pt', [trained], 0.0, 10),
                                    ('mean.pt', [trained, 'b.pt'], 0.5, 30)):
        script(['checkpoint.py', *files, '--out', out])
        net, flags = checkpoint.load_checkpoint(out)
        assert flags['step'] == step
        for name, t in net.net.state_dict().items():
            close(t, saved['ema'][name] + shift, atol=1e-6)
    assert os.path.getsize('ema.pt') < 0.4 * os.path.getsize('b.pt')
    refuses(['sample.py', '--ckpt', 'ema.pt', '--weights', 'raw'], 'holds the EMA only')
    refuses(['checkpoint.py', 'b.pt', '--out', 'mean.pt'], '--out mean.pt: exists')
    assert sorted(os.listdir('.')) == ['b.pt', 'ema.pt', 'mean.pt']


def test_average__takes_one_architecture_only(trained, here):
    tiny_official('official.pth')
    edm_file('edm.pkl', whole=False, nf=4, size=16)
    for path in ('official.pth', 'edm.pkl'):
        refuses(['checkpoint.py', trained, path, '--out', 'mean.pt'],
                f'^ckpt {path}: of other authors than .*ckpt.pt; give checkpoints that')
        script(['checkpoint.py', path, path, '--out', f'{path}.pt'])
        old, new = (checkpoint.load_checkpoint(p)[0].state_dict() for p in (path, f'{path}.pt'))
        for name in old:
            close(new[name], old[name], rtol=1e-6)
    assert 'mean.pt' not in os.listdir('.')


@pytest.mark.parametrize('change, message', [
    (dict(method='vp'), 'trained with method vp, .*ckpt.pt with pfgm'),
    (dict(method='pfgmpp', D=128.0, sigma_data=0.5), 'trained with method pfgmpp'),
    (dict(D=2.0), 'trained with D 2.0, .* with 1.0'),
    (dict(skip=True), 'trained with skip True, .* with False'),
    (dict(gamma=6.0), 'trained with gamma 6.0, .* with 5.0'),
    (dict(z_max=50.0), 'trained with z_max 50.0'),
    (dict(class_names=list('ab')), r"trained with class_names \['a', 'b'\]"),
    (dict(dataset='pictures'), 'trained with dataset pictures, .* with glyphs, which are other im'),
    (dict(consistency=True), 'trained with consistency True'),
    (dict(distill='t.pt'), 'only one of it and .* was trained by --distill'),
    (dict(reflow='t.pt'), 'only one of it and .* was trained by --reflow'),
    (dict(source='L', source_data=[9, 1, 2], method='rf'), 'trained with method rf')])
def test_check_alike__refuses_what_was_trained_otherwise(change, message, trained, here):
    saved = loaded(trained)
    saved['args'].update(change)
    torch.save(saved, 'b.pt')
    refuses(['checkpoint.py', trained, 'b.pt', '--out', 'mean.pt'],
            f'^ckpt b.pt: {message}.*; give checkpoints that were trained alike$')
    assert not Path('mean.pt').exists()


def test_check_alike__compares_the_sources_of_flows_between_data_sets():
    flags = dict(method='rf', source='L', source_data=[9, 1, 2])
    checkpoint.check_alike(flags, dict(flags, source='moved/L'), 'b.pt', 'a.pt')
    for other in (dict(source='L', source_data=[9, 1, 3]), dict(source=None, source_data=None)):
        with pytest.raises(BadInput, match='^ckpt b.pt: trained with source L, a.pt with .*alike$'):
            checkpoint.check_alike(flags, {**flags, **other}, 'b.pt', 'a.pt')


def test_check_alike__says_where_weights_began_differently(trained, here):
    saved = loaded(trained)
    saved['args'].update(seed=3, lr=1e-5, out_dir='b', data_dir='c', steps=99)
    torch.save(saved, 'b.pt')
    told = 'b.pt and .* began with other weights, from --seed 3 and 0'
    assert re.search(told, said(['checkpoint.py', trained, 'b.pt', '--out', 'a.pt']))
    saved['args'].update(seed=0)
    torch.save(saved, 'b.pt')
    assert 'began' not in said(['checkpoint.py', trained, 'b.pt', '--out', 'c.pt'])


# ---------------------------------------------------------------- damaged files

@pytest.mark.parametrize('count', [20, pytest.param(500, marks=pytest.mark.slow)])
def test_load_checkpoint__damage_ends_in_one_line_or_changes_nothing(trained, here, count):
    """Damage under new checksums can change a weight; a file that was compressed is never read."""
    tiny_official('official.pth')
    rng = np.random.default_rng(0)
    paths = [trained / 'ckpt.pt', Path('official.pth')]
    intact = [checkpoint.load_checkpoint(path)[0].state_dict() for path in paths]
    for k in range(count):
        raw = paths[k % 2].read_bytes()
        new_checksums = k % 4 > 1
        compressed = k % 8 > 5
        if new_checksums:
            with zipfile.ZipFile(io.BytesIO(raw)) as archive:
                entries = [[name, archive.read(name)] for name in archive.namelist()]
            entry = entries[rng.integers(len(entries))]
            if not compressed:
                entry[1] = mutated(entry[1] or b'0', rng)
            raw = zipped(entries, zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED)
        else:
            raw = mutated(raw, rng)
        Path('a.pt').write_bytes(raw)
        try:
            with limited(20, 2):
                net, flags = checkpoint.load_checkpoint('a.pt')
            assert not compressed
            assert new_checksums or same(net.state_dict(), intact[k % 2])
            assert {*ARCHITECTURE} <= flags.keys()
        except BadInput as error:
            assert re.match('--ckpt a.pt', str(error)) and len(str(error)) < 1000
    assert sorted(os.listdir('.')) == ['a.pt', 'official.pth']


# ---------------------------------------------------------------- rubbish in files of ours

RUBBISH = [  # where in a checkpoint of ours, and what is there
    ('opt', {}), ('opt', [1]), ('opt', {'state': {0: 5}, 'param_groups': []}), ('rng', 5),
    ('rng', [[torch.zeros(3)]]), ('opt state 0 exp_avg', torch.zeros(3)), ('net', [1]),
    ('opt state 0 step', torch.tensor(-1.)), ('step', 1.5), ('step', -1), ('args', None),
    ('args nf', 10 ** 30), ('args nf', '8'), ('args ch_mult', [10 ** 9]), ('args classes', 2 ** 31),
    ('args z_min', math.nan), ('args z_min', 1e8), ('args z_max', 0), ('args gamma', 'x'),
    ('args D', 0), ('args method', []), ('args image_size', 10 ** 6),
    ('ema', {'a\nb': torch.zeros(3)}), ('args lr', torch.zeros(3)), ('args M', None),
    *(('ema conv_in.bias', value) for value in (
        None, 5, torch.zeros(8).half(), torch.zeros(8).to_sparse(), torch.zeros(8, device='meta'),
        torch.zeros(1).expand(8), torch.zeros(1).expand(10 ** 12), torch.zeros(1, 8)))]


@pytest.mark.parametrize('where, value', RUBBISH)
def test_check_contents__rubbish_ends_in_one_line(copied, where, value):
    saved = inside = loaded(copied)
    *path, key = (int(word) if word.isdigit() else word for word in where.split())
    for word in path:
        inside = inside[word]
    inside[key] = value
    torch.save(saved, copied / 'ckpt.pt')
    command = ['sample.py', '--ckpt', copied / 'ckpt.pt', '--device', 'cpu']
    if where.startswith(('opt', 'rng')):  # which training alone uses
        command = ['train.py', *TINY, '--dropout', 0.1, '--steps', 12, '--out_dir', copied]
    with limited(60, 2):
        refuses(command, 'damaged|no usable architecture|not the architecture|not a checkpoint')


REFUSAL = '^--ckpt a.pt: (damaged|no usable architecture)'


@pytest.mark.parametrize('flag', ['method', 'D', 'classes', 'class_names', 'data', 'dataset',
                                  'patch', 'nf', 'z_min', 'M', 'edm', 'steps', 'batch_size'])
def test_check_flags__names_a_flag_that_is_missing(trained, here, flag):
    saved = loaded(trained)
    del saved['args'][flag]
    torch.save(saved, 'a.pt')
    with pytest.raises(BadInput, match=f'{REFUSAL}.*{flag}'):
        checkpoint.load_checkpoint('a.pt')


def test_check_flags__a_flag_of_another_type_is_refused_or_does_no_harm(trained):
    """Each flag in turn has each of some values. Nothing but a ValueError may come of it."""
    saved = loaded(trained)
    values = ['x', -1, 1.5, math.nan, math.inf, 10 ** 30, None, True, [], [1], ['x'] * 99, {},
              torch.zeros(3)]
    refused = set()
    for flag, value in itertools.product(saved['args'], values):
        flags = {**saved['args'], flag: value}
        try:
            checkpoint.check_flags(flags)
            net = None
            if flag in ARCHITECTURE:
                net = build(saved['ema'], flags, 'a.pt')
            as_flow(net, flags)
        except ValueError:  # BadInput is one
            refused.add(flag)
    assert refused == saved['args'].keys()  # a tensor, at least, is no value of any flag


@pytest.mark.parametrize('flag, value', [
    ('classes', 'x'), ('classes', True), ('class_names', [1]), ('class_names', 'cat'),
    ('data', []), ('data', ['x', 1, 2]), ('data', None), ('dataset', None), ('dataset', 3),
    ('patch', '2'), ('patch', None), ('m_draws', 0), ('lr', -1), ('batch_size', 0),
    ('field_batch', 'x'), ('loss', 'max'), ('tau', 0), ('upper_norm', -1), ('decay', 2),
    ('edm', True), ('official', True)])
def test_check_flags__refuses(trained, here, flag, value):
    saved = loaded(trained)
    saved['args'].update({flag: value})
    if flag in ('edm', 'official'):  # which make other flags needless, but not the method's own
        saved['args']['method'] = 'vp'
    torch.save(saved, 'a.pt')
    with pytest.raises(BadInput, match=REFUSAL):
        checkpoint.load_checkpoint('a.pt')


def test_check_flags__names_of_more_classes_than_there_are(straight, here):
    saved = loaded(straight)
    assert saved['args']['classes'] == 10
    saved['args']['class_names'].append('x')
    torch.save(saved, 'a.pt')
    with pytest.raises(BadInput, match='11 class_names of 10 classes'):
        checkpoint.load_checkpoint('a.pt')
