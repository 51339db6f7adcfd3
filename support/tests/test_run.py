"""The folder of a training run: resumed, killed, damaged, in use; and the meter of its steps."""
import math
import os
import re
import resource
import shutil
import signal
import threading
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

import train
from support import checkpoint, run
from support.cli import BadInput
from support.run import Saver, sampling_command
from support.tests.common import (TINY, Forked, loaded, refuses, rows_of, said, same_run,
                                  script, until)
from support.tests.made import picture, pictures


def test_restore_optimizer__a_run_in_two_parts_ends_as_one_in_one(here):
    command = ['train.py', *TINY, '--dropout', 0.1, '--muon']
    script([*command, '--steps', 6, '--out_dir', 'whole'])
    script([*command, '--steps', 3, '--out_dir', 'parts'])
    script([*command, '--steps', 6, '--out_dir', 'parts'])
    assert same_run('whole', 'parts')


# ---------------------------------------------------------------- where training starts from

@pytest.mark.parametrize('kills, seed', [(1, 0), pytest.param(50, 1, marks=pytest.mark.slow)])
def test_open_run__after_kills_at_random_moments_ends_as_a_run_that_was_never_killed(
        kills, seed, here):
    rng = np.random.default_rng(seed)
    command = [*TINY, '--steps', 30 * kills, '--field_batch', 8,  # the last of a flag counts
               *'--dropout 0.1 --save_every 4 --sample_every 25 --out_dir'.split()]
    script(['train.py', *command, 'whole'])
    for _ in range(kills):
        process = Forked([*command, 'killed'])
        until(process, '  loss ')
        time.sleep(rng.uniform(0, 0.8))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    script(['train.py', *command, 'killed'])
    assert same_run('whole', 'killed')


@pytest.mark.parametrize('has_links', [True, False], ids=['links', 'no_links'])
def test_open_run__names_a_damaged_checkpoint_and_uses_the_one_before(
        has_links, tmp_path, monkeypatch, capfd):
    """Also on a file system that has no hard links, nor locks."""
    if not has_links:
        for call in ('os.link', 'fcntl.flock'):
            monkeypatch.setattr(call, lambda *args: os.stat(tmp_path / 'no such file'))
    home = tmp_path / 'o'
    whole = tmp_path / 'whole'
    command = ['train.py', *TINY, *'--dropout 0.1 --save_every 2 --steps 8 --keep 3'.split(),
               '--out_dir', home]
    script(command)
    err = capfd.readouterr().err
    assert err.count('cannot be locked') == err.count('\n') == (0 if has_links else 1)
    kept = {path.name: checkpoint.read_checkpoint(path)['step'] for path in home.glob('*.pt*')}
    assert kept == {'ckpt-0000004.pt': 4, 'ckpt-0000006.pt': 6, 'ckpt.pt': 8}

    shutil.copytree(home, whole)
    (home / 'ckpt.pt').write_bytes((whole / 'ckpt.pt').read_bytes()[:9000])
    script(command)
    assert re.search(r'o/ckpt.pt: damaged.*going back to .*ckpt-0000006.pt', capfd.readouterr().err)
    assert same_run(home, whole)


@pytest.mark.parametrize('flags, message', [
    (['--dataset', 'pictures'], 'holds a run on glyphs'),
    (['--ema_decay', 0.5], '--ema_decay 0.5: the run'),
    (['--nf', 16], '--nf 16: the run'),
    (['--steps', 10], 'has 10 already')])
def test_open_run__is_not_overwritten_by_another_run(flags, message, trained, here):
    os.mkdir('pictures')
    Image.new('L', (16, 16)).save('pictures/a.png')
    before = (trained / 'ckpt.pt').read_bytes()
    refuses(['train.py', *TINY, '--dropout', 0.1, '--out_dir', trained, '--steps', 20, *flags],
            message)
    assert (trained / 'ckpt.pt').read_bytes() == before


def test_check_data__tells_a_folder_that_changed_from_one_that_moved(here, tmp_path):
    pictures(tmp_path / 'set', *(f'{k}.png' for k in range(10)), side=16)
    command = ['train.py', *TINY, '--out_dir', 'out', '--dataset']
    script([*command, 'set', '--steps', 1])
    shutil.move('set', 'moved')
    script([*command, 'moved', '--steps', 2])
    picture(77, 16).save('moved/3.png')
    refuses([*command, 'moved', '--steps', 3],
            '--dataset moved: --out_dir out holds a run on moved; give another --out_dir, .* '
            '.as many images, with other pixels.')
    os.remove('moved/3.png')
    refuses([*command, 'moved', '--steps', 3], '10 images there, 9 here')


def test_check_data__says_where_a_known_set_is_drawn_otherwise(trained, few_glyphs, copied):
    out = said(['train.py', *TINY, '--dropout', 0.1, '--out_dir', copied, '--steps', 11])
    assert '--dataset glyphs: not as it was there: 10000 images there, 200 here' in out


def test_check_is_run__refuses_folders_of_other_things_but_not_of_runs(tmp_path):
    (tmp_path / 'a.png').touch()
    (tmp_path / 'photos' / 'cats').mkdir(parents=True)
    for folder in (tmp_path, tmp_path / 'photos'):
        refuses(['train.py', *TINY, '--out_dir', folder], 'not empty')
    for name in ('b', 'b/c', ''):
        script(['train.py', *TINY, '--steps', 1, '--out_dir', tmp_path / 'runs' / name])
    assert sorted(os.listdir(tmp_path)) == ['a.png', 'photos', 'runs']


def test_check_resume__says_what_was_tuned(copied):
    out = said(['train.py', *TINY, '--out_dir', copied, *'--dropout 0.1 --steps 12 --lr 1e-4 '
                '--batch_size 4 --grad_clip 0.5 --warmup 2 --accum 2'.split()])
    assert ('going on with --lr 0.0001 (it was 0.002), --warmup 2 (it was 3), '
            '--grad_clip 0.5 (it was 1.0), --batch_size 4 (it was 8), --accum 2 (it was 1)') in out
    assert [row['images'] for row in rows_of(copied / 'log.jsonl')][-3:] == [80, 84, 88]


# ---------------------------------------------------------------- the folder

def test_open_log__drops_cut_lines_and_steps_to_be_made_again(tmp_path):
    (tmp_path / 'log.jsonl').write_text(
        '{"step": 2, "images": 16}\n{"step": 4, "images": 32}\n{"step": 5, "ima')
    log, seen = run.open_log(str(tmp_path), start=3, batch_size=4)
    log.close()
    assert seen == 16 + 4  # of steps 1 and 2, and of step 3 with the batch size of now
    assert rows_of(tmp_path / 'log.jsonl') == [dict(step=2, images=16)]


# ---------------------------------------------------------------- what is measured of the steps

def test_observe__sorts_losses_by_z_and_keeps_the_peak_and_the_first_bad_step():
    meter = run.Meter(torch.device('cpu'), unit=2.0)  # so that bins are split at 0.02 ... 20
    z = torch.tensor([0.015, 0.15, 1.5, 15.0, 150.0])
    loss = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    meter.observe(1, z, loss, torch.tensor(1.0))
    meter.observe(2, z, 10 * loss, torch.tensor(math.inf))
    meter.observe(3, z.flip(0), loss, torch.tensor(math.nan))
    totals = 11 * loss + loss.flip(0)
    assert torch.equal(meter.sums, torch.stack([totals, torch.full((5,), 3.0)], 1))
    assert (float(meter.peak), int(meter.peak_step), int(meter.bad_step)) == (30, 2, 2)
    assert torch.equal(meter.bad_z, z) and torch.equal(meter.bad_loss, 10 * loss)


def test_stop_if_bad__names_the_images_and_keeps_the_checkpoint(copied):
    saved = loaded(copied)
    saved['net']['conv_in.bias'][:] = math.nan
    torch.save(saved, copied / 'ckpt.pt')
    before = (copied / 'ckpt.pt').read_bytes()
    refuses(['train.py', *TINY, '--dropout', 0.1, '--steps', 11, '--out_dir', copied],
            r'step 11: .*images (\d+ at z = \S+, ){7}\d+ at z.* --lr \(it was 0.002')
    assert (copied / 'ckpt.pt').read_bytes() == before


@pytest.mark.parametrize('steps', [60, pytest.param(3000, marks=pytest.mark.slow)])
def test_meter__memory_stays_flat_and_nothing_that_is_kept_hangs_on_a_graph(
        steps, tmp_path, monkeypatch):
    kept = {}  # tensors that live from step to step
    resident = []  # MB
    make_networks, observe, adam_step = train.networks, run.Meter.observe, torch.optim.Adam.step

    def networks(*args):
        raw, ema = make_networks(*args)
        kept['ema'] = list(ema.parameters())
        return raw, ema

    def step_of(opt, *args):
        adam_step(opt, *args)
        kept['opt'] = [value for state in opt.state.values() for value in state.values()]

    def observed(meter, step, z, loss, norm):
        observe(meter, step, z, loss, norm)
        kept.update(meter=list(vars(meter).values()), norm=[norm], loss=[loss])
        pages = int(Path('/proc/self/statm').read_text().split()[1])
        resident.append(pages * resource.getpagesize() >> 20)

    monkeypatch.setattr(train, 'networks', networks)
    monkeypatch.setattr(torch.optim.Adam, 'step', step_of)
    monkeypatch.setattr(run.Meter, 'observe', observed)
    script(['train.py', *TINY, '--steps', steps, '--log_every', 50, '--dropout', 0.1,
            '--out_dir', tmp_path])
    assert kept.keys() == {'ema', 'opt', 'meter', 'norm', 'loss'}
    for name, tensors in kept.items():
        assert tensors and not any(t.requires_grad or t.grad_fn for t in tensors), name
    assert steps < 300 or resident[-1] < resident[300] + 30, resident[::300]


# ---------------------------------------------------------------- on a GPU

@pytest.mark.cuda
@pytest.mark.parametrize('bf16', ['--bf16', '--no-bf16'])
def test_open_run__on_cuda_resumes_bit_for_bit(bf16, cuda_run, tmp_path):
    for folder, stops in (('whole', [8]), ('parts', [3, 8])):
        for steps in stops:
            cuda_run(bf16, '--dropout', 0.1, '--steps', steps, '--out_dir', tmp_path / folder)
    assert same_run(tmp_path / 'whole', tmp_path / 'parts')


@pytest.mark.cuda
def test_meter__on_cuda_memory_stays_flat(cuda_run, tmp_path, monkeypatch):
    observe = run.Meter.observe
    allocated = []

    def observed(meter, *step):
        observe(meter, *step)
        allocated.append(torch.cuda.memory_allocated())

    monkeypatch.setattr(run.Meter, 'observe', observed)
    cuda_run('--steps', 300, '--log_every', 50, '--out_dir', tmp_path)
    assert allocated[-1] < allocated[50] + 2 ** 20


def test_sampling_command__is_that_of_20_calls_or_of_a_student():
    plain = dict(distill=None, consistency=False)
    assert sampling_command('out/ckpt.pt', plain) == 'python sample.py --nfe 20'
    assert sampling_command('a b/ckpt.pt', plain) == (
        "python sample.py --ckpt 'a b/ckpt.pt' --nfe 20")
    student = dict(distill='a.pt', consistency=False)
    assert sampling_command('out/ckpt.pt', student) == 'python sample.py'


def test_saver__writes_the_state_of_its_step_while_training_goes_on(here, monkeypatch):
    may_write = threading.Event()
    save = run.save

    def slow(path, checkpoint):
        assert may_write.wait(10)
        save(path, checkpoint)

    monkeypatch.setattr(run, 'save', slow)
    weight = torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last)
    saver = Saver('ckpt.pt', 0, 2, torch.device('cpu'))
    saver.save(dict(step=1, net={'w': weight}, opt=[(weight,)]))
    weight.zero_()  # the next step, before the file is written
    saver.check()
    assert not os.path.exists('ckpt.pt')
    may_write.set()
    saver.save(dict(step=2, net={'w': weight}))
    saver.wait()
    assert sorted(os.listdir()) == ['ckpt-0000001.pt', 'ckpt.pt']
    first = torch.load('ckpt-0000001.pt', weights_only=True)
    assert (first['net']['w'] == 1).all() and (first['opt'][0][0] == 1).all()
    assert first['net']['w'].is_contiguous(memory_format=torch.channels_last)
    assert (torch.load('ckpt.pt', weights_only=True)['net']['w'] == 0).all()


@pytest.mark.parametrize('method', ['check', 'wait', 'save'])
def test_saver__an_error_of_its_thread_ends_the_run_in_one_line(method, here, monkeypatch):
    def full(path, checkpoint):
        raise BadInput('checkpoint ckpt.pt: cannot be written')

    monkeypatch.setattr(run, 'save', full)
    saver = Saver('ckpt.pt', 0, 2, torch.device('cpu'))
    saver.save(dict(step=1))
    saver.thread.submit(str).result()  # by now it has failed
    with pytest.raises(BadInput, match='cannot be written'):
        saver.save(dict(step=2)) if method == 'save' else getattr(saver, method)()


def test_saver__of_a_gpu_only_its_thread_waits_for_the_copy(here, monkeypatch):
    main_thread = threading.get_ident()
    done = []
    may_arrive = threading.Event()

    def synchronize(device):
        assert threading.get_ident() != main_thread and may_arrive.wait(10)
        done.append('arrived')

    monkeypatch.setattr(torch.cuda, 'synchronize', synchronize)
    monkeypatch.setattr(run, 'save', lambda path, checkpoint: done.append('written'))
    saver = Saver('ckpt.pt', 0, 2, torch.device('cuda'))
    saver.save(dict(step=1))
    done.append('the next step')
    may_arrive.set()
    saver.wait()
    assert done == ['the next step', 'arrived', 'written']


def test_copied__a_gpu_is_told_to_copy_and_not_waited_for():
    class OnGPU(torch.Tensor):
        is_cuda = True

    weight = torch.ones(2).as_subclass(OnGPU)
    with patch.object(torch, 'empty_like') as empty_like:
        run.copied(dict(opt=[(weight, 7)]))
    empty_like.assert_called_once_with(weight, device='cpu', pin_memory=True)
    empty_like.return_value.copy_.assert_called_once_with(weight, non_blocking=True)
