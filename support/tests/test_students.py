"""Students: what they are trained on, and what they make of it."""
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pfgm
from support import checkpoint, students
from support.flow import Flow, load_flow
from support.methods import VP, RectifiedFlow
from support.tests.common import (F64, TINY_PP, close, loaded, losses, refuses, rows_of, said,
                                  script, spied)
from support.tests.made import picture
from support.tests.published_files import edm_file, tiny_official

CPU = torch.device('cpu')
STRAIGHTNESS_CALLS = students.STRAIGHTNESS_CALLS  # before conftest.py lowers it


def followed(path, nfe, n):
    """The flow of a checkpoint, n draws of its prior, and where it leads them."""
    flow = load_flow(str(path), CPU, nfe=nfe, bf16=False)
    x = flow.prior(range(n))
    end, _ = flow.follow(x, CPU, range(n))
    return flow, x, end


# A student is trained on the labels that its teacher was trained on.
STUDENT = [word for word in TINY_PP if word != '--no-classes']


# ---------------------------------------------------------------- straightness

def test_bends_of_lines__of_known_lines():
    y = torch.linspace(-1, 1, 6, dtype=F64)
    x = 999 * torch.randn(5, 6, dtype=F64)
    # A rectified flow of one data point y: F = y - eps, and the lines are straight.
    flow = RectifiedFlow(lambda x, c_noise: ((y - x) / (1 - c_noise[:, None] / 999), None))
    close(students.bends_of_lines(flow, x, None, 10)[0], torch.zeros(5), atol=1e-9)
    # VP with eps = 0: x / alpha stays as it is.
    flow = VP(lambda x, c_noise: (torch.zeros_like(x), None))
    alpha = flow.alpha(flow.planes(flow.high, flow.low, 25))
    whole = alpha[-1] - alpha[0]
    bent = (whole - 25 * alpha.diff()).square().mean() / whole ** 2
    bends, lengths = students.bends_of_lines(flow, x, None, 50)
    close(bends / lengths, bent.expand(5), rtol=1e-9)


@pytest.mark.parametrize('spread', [(0.1, 0.1, 0.1, 0.1), (0.5, 0.5, 0.5, 0.5),
                                    (0.05, 0.1, 0.5, 2.0)])
def test_straightness__of_a_gaussian_is_that_of_the_closed_form(spread, monkeypatch):
    """Of data N(0, s^2) the lines of a rectified flow are x_t = x_1 w(t) / w(1), where w^2 is
    t^2 + (1 - t)^2 s^2, and t goes from 0, the data, to 1. Where s differs from axis to axis, so
    does the bend of the lines, and a mean of ratios is not a ratio of means."""
    monkeypatch.setattr(students, 'STRAIGHTNESS_CALLS', STRAIGHTNESS_CALLS)
    s = torch.tensor(spread, dtype=F64).view(4, 1, 1)

    def velocity(x, c_noise):
        t = 1 - pfgm.column(c_noise / 999, x)
        return ((1 - t) * s ** 2 - t) / (t ** 2 + (1 - t) ** 2 * s ** 2) * x, None

    flow = Flow(RectifiedFlow(velocity), (4, 1, 1), math.inf, 1e-3, RectifiedFlow(velocity).high,
                None, 0.0, 0.0)
    ends = [flow.net.t_of(torch.tensor(z, dtype=F64)) for z in (flow.net.low, flow.net.high)]
    t = torch.linspace(*ends, 10 ** 6, dtype=F64).view(1, -1)
    w = (t ** 2 + (1 - t) ** 2 * s.view(4, 1) ** 2).sqrt() / ends[1]
    length = (w[:, -1] - w[:, 0]).square()
    bend = w.diff().square().mean(1) * w.shape[1] ** 2 - length
    want = bend.sum() / length.sum()
    # All draws of one norm along each axis: what is left is the error of the steps.
    flow.prior = lambda indices: flow.z_max * torch.tensor(
        [1., -1, 1, -1], dtype=F64).view(4, 1, 1).expand(len(indices), 4, 1, 1)
    measured = students.straightness(flow, 3, 2, torch.device('cpu'))
    close(measured, want, rtol=0.01)
    lines = [torch.tensor(row, dtype=F64).view(4, 1, 1) for row in ((3., 0, 0, 0), (0., 0, 0, 1))]
    flow.prior = lambda indices: flow.z_max * torch.stack([lines[k] for k in indices])
    measured = students.straightness(flow, 2, 1, torch.device('cpu'))
    scale = torch.tensor([9., 0, 0, 1], dtype=F64)
    close(measured, (scale * bend).sum() / (scale * length).sum(), rtol=0.01)


# ---------------------------------------------------------------- reflow and distillation

@pytest.mark.slow
def test_pairs_of_teacher__outlive_a_kill(straight, here, monkeypatch):
    monkeypatch.setattr(students, 'SHARD', 16)
    command = ['train.py', *STUDENT, '--distill', straight, *'--pairs 40 --out_dir a'.split()]
    assert 'pairs: 40/40' in said([*command, '--steps', 2])
    shards = sorted(Path('a/pairs').iterdir())
    made = [shard.read_bytes() for shard in shards]
    eps, y = torch.from_numpy(np.concatenate([np.load(shard) for shard in shards])).unbind(1)
    assert abs(eps.mean()) < 0.05 and abs(eps.std() - 1) < 0.05
    close(y, followed(straight / 'ckpt.pt', students.PAIR_NFE, 40)[2], atol=1e-4)
    shards[0].unlink()
    shards[2].write_bytes(made[2][:500])
    assert 'pairs: 24/24' in said([*command, '--steps', 4])
    assert [shard.read_bytes() for shard in shards] == made
    refuses(['train.py', *STUDENT, *'--distill a --out_dir b'.split()], 'itself a student')


def test_method_of_student__is_the_teachers(straight, here):
    command = ['train.py', *STUDENT, '--distill', straight, *'--pairs 40 --out_dir b'.split()]
    np.save('a.npy', np.zeros((9, 16, 16), np.uint8))
    for flag, value, message in (
            ('--reflow', straight, 'two runs'),
            ('--method', 'pfgm', '--method pfgm: a student of .* is rf of its D, inf'),
            ('--dataset', 'a.npy', 'a.npy: --distill .* was trained on glyphs; give')):
        refuses([*command, flag, value], message)


def test_pairs_of_teacher__need_the_teacher_again_when_the_run_goes_on(straight, here):
    shutil.copy(straight / 'ckpt.pt', 't.pt')
    command = ['train.py', *STUDENT, *'--distill t.pt --pairs 8 --out_dir c --steps'.split()]
    script([*command, 1])
    Path('t.pt').unlink()
    refuses([*command, 2], '--distill t.pt: no such file')


def check_perturb(calls, net, flow, x):
    """The points that were trained on lie where sampling begins, on z_max, at the draws x."""
    far = x.flatten(1).norm(dim=1).max()
    for call in calls:
        moved, z = net.perturb(*call.args[1:], **call.kwargs)
        gap = torch.cdist(moved.flatten(1).double(), x.flatten(1).double()).amin(1)
        assert (z == flow.z_max).all() and gap.max() < 1e-4 * far


@pytest.mark.parametrize('teacher, student, D', [
    ('--method pfgm', 'pfgmpp', 1), ('--D 3', 'pfgmpp', 3), ('--method vp', 'rf', math.inf),
    ('--method ddpm', 'rf', math.inf), ('--method rf', 'rf', math.inf),
    ('official', 'pfgmpp', 1), ('edm', 'pfgmpp', 128)])
def test_distill__makes_of_any_teacher_a_student_of_one_call(teacher, student, D, here,
                                                            monkeypatch):
    """The student is trained where sampling begins, x on z_max, towards where x is led."""
    path = 'a/ckpt.pt'
    network = TINY_PP
    if teacher in ('official', 'edm'):
        path = 'net.pth'
        network = '--dataset x.npy --channels 3 --warmup 1 --batch_size 8'.split()
        np.save('x.npy', np.zeros((9, 32, 32, 3), np.uint8))
    if teacher == 'official':
        tiny_official(path)
    elif teacher == 'edm':
        edm_file(path, pfgmpp=True, D=128)
    else:
        script(['train.py', *network, *teacher.split(), *'--steps 4 --lr 1e-2 --out_dir a'.split()])
    command = ['train.py', *network, '--distill', path, *'--device cpu --no-bf16 --log_every 1 '
               '--pairs 8 --steps 9 --lr 1e-2 --grad_clip 9 --out_dir b'.split()]
    with spied(pfgm.Denoiser, 'perturb') as perturb:
        script(command)
    net, args = checkpoint.load_checkpoint('b/ckpt.pt')
    assert (args['method'], args['D'], args['z_exp']) == (student, D, 0)
    assert losses('b')[-1] < losses('b')[0]
    if teacher not in ('--method vp', '--method ddpm'):  # whose students begin farther out
        flow, x, ends = followed(path, 4, 8)
        pairs = np.load(*Path('b/pairs').iterdir())
        close(pairs[:, 1], ends, atol=1e-4 * float(ends.abs().max()))
        assert flow.z_max == args['z_max'] and flow.upper_norm == args['upper_norm']
        check_perturb(perturb.call_args_list, net, flow, x)
    assert ', 1 network call an image, ' in said('sample.py --ckpt b --n 3 --device cpu'.split())


def test_pairs_of_teacher__of_a_guided_teacher(straight, here):
    command = ['train.py', *STUDENT, '--distill', straight, *'--pairs 8 --steps'.split()]
    script([*command, 1, *'--out_dir a --guidance 3'.split()])
    flow = load_flow(straight / 'ckpt.pt', CPU, nfe=students.PAIR_NFE, guidance=3.0, bf16=False)
    ends, _ = flow.follow(flow.prior(range(8)), CPU, range(8))
    path, = Path('a/pairs').iterdir()
    close(np.load(path)[:, 1], ends, atol=1e-4)
    unguided = followed(straight / 'ckpt.pt', students.PAIR_NFE, 8)[2]
    assert (unguided - ends).abs().max() > 0.01
    assert loaded('a')['args']['guidance'] == 3
    assert 'pairs:' not in said([*command, 2, *'--out_dir a --guidance 3'.split()])
    refuses([*command, 3, *'--out_dir a --guidance 2'.split()], '^--guidance 2: the run .* has 3.0')
    refuses([*command, 3, *'--out_dir a'.split()], '^--out_dir a: its run has guidance 3.0, not 1')
    script(['train.py', *TINY_PP, *'--method rf --steps 1 --out_dir t'.split()])
    refuses(['train.py', *TINY_PP, *'--distill t --guidance 3 --out_dir b'.split()],
            '^--guidance 3: t/ckpt.pt was trained without classes')


@pytest.fixture(scope='module')
def student(straight, tmp_path_factory):
    """A run of one step of --distill."""
    out = tmp_path_factory.mktemp('run') / 'student'
    script(['train.py', *STUDENT, '--distill', straight, *'--pairs 8 --steps 1'.split(),
            '--out_dir', out])
    return out


@pytest.mark.parametrize('flags, named', [
    ('--nfe 20', '--nfe 20'), ('--solver rk45', '--solver rk45'), ('--nfe 10 --gif', '--nfe 10'),
    ('--gif', '--gif'), ('--out b.gif', '--out b.gif'), ('--encode 0.png', '--encode 0.png'),
    ('--interpolate 0.png 0.png', '--interpolate 0.png'), ('--colorize 0.png', '--colorize 0.png'),
    ('--inpaint 0.png --mask 0.png', '--inpaint 0.png')])
def test_check_calls__a_student_of_one_call_is_asked_for_no_more(flags, named, student, here):
    picture(0, 16).convert('L').save('0.png')
    refuses(['sample.py', '--ckpt', student, *'--device cpu --n 2'.split(), *flags.split()],
            f'^{named}.*: .*a student of --distill')


def test_check_calls__one_call_between_draws_is_what_a_student_makes(student, here):
    for flags in ('--nfe 1', '--interpolate', '--solver euler'):
        out = said(['sample.py', '--ckpt', student, *'--device cpu --n 8'.split(), *flags.split()])
        assert ', 1 network call an image, ' in out


def test_settings_of__a_student_are_the_calls_that_it_has_learned(student, straight, here):
    out = said(['evaluate.py', '--compare', straight, student, '--device', 'cpu', '--n', 8, '--swd',
                *'--sweep nfe=2,4 --results r.jsonl'.split()])
    assert 'student: a student of --distill, measured with the one call that it was trained' in out
    rows = [(row['run'], row['nfe']) for row in rows_of('r.jsonl')]
    assert rows == [('straight', 2), ('straight', 4), ('student', 1)]
    strip = np.asarray(Image.open('compare_samples.png').convert('L'))[30:]
    cells = strip[4:, -(12 * 68):].reshape(2, 68, 12, 68)  # two rows of 12 samples, and borders
    is_grey = (cells == 128).all((1, 3)).reshape(2, 3, 4).all(2)
    assert is_grey.tolist() == [[True, False, False], [False, True, True]]
    refuses(['evaluate.py', '--ckpt', student, *'--device cpu --swd --nfe 5'.split()], '^--nfe 5: ')


# ---------------------------------------------------------------- consistency training

@pytest.mark.parametrize('flags', [
    '--D inf --classes', pytest.param('--D 2', marks=pytest.mark.slow),
    pytest.param('--method vp', marks=pytest.mark.slow)])
def test_at_lower_level__is_what_the_stopped_network_makes_of_the_same_noise(flags, here,
                                                                             monkeypatch):
    script(['train.py', *TINY_PP, *flags.split(), *'--steps 2 --lr 1e-2 --out_dir a'.split()])
    at_lower_level = students.at_lower_level
    stages = []
    expected = []  # the target and the weight of each step's loss

    def checked(flow, clean, moved, z, labels, stage):
        image, share = at_lower_level(flow, clean, moved, z, labels, stage)
        close(share, (1 - (1 + 8 / (1 + torch.exp(z / flow.unit))) / 2 ** stage).clamp_min(0),
              atol=1e-6)
        r = pfgm.column(share, clean)
        scale = pfgm.column(moved.flatten(1).abs().amax(1) + 1, clean)
        lower = clean + r * (moved - clean)
        with torch.no_grad():
            v_x, _ = flow(lower, share * z, *labels)
        close(image / scale, torch.where(r > 0, lower + v_x, clean) / scale, rtol=1e-3, atol=1e-4)
        assert not image.requires_grad and flow.training
        stages.append(stage)
        expected.append((image - moved, flow.weight(moved, z) / (1 - share)))
        return image, share

    monkeypatch.setattr(students, 'at_lower_level', checked)
    command = ['train.py', *TINY_PP, *re.findall('--classes', flags),
               *'--consistency --init_from a --lr 1e-3 --out_dir b --steps'.split()]
    with spied(pfgm, 'field_loss') as field_loss:
        script([*command, 16])
    assert stages == [1 + step // 2 for step in range(16)]
    assert loaded('b')['args']['method'] == loaded('a')['args']['method']
    assert field_loss.call_count == 16
    for (target, weight), call in zip(expected, field_loss.call_args_list):
        _, (v_x, _), w, _ = call.args
        close(v_x, target)
        close(w, weight, rtol=1e-6)

    sampling = 'sample.py --ckpt b --n 3 --device cpu'.split()
    assert 'renew, 1 network call an image' in said(sampling)
    assert 'renew, 2 network calls an image' in said([*sampling, '--nfe', 2])
    assert 'two calls' not in said([*sampling, '--nfe', 2])
    assert 'trained for one or two calls, and more need' in said([*sampling, '--nfe', 3])
    for more in ('--solver rk45', '--solver unipc --nfe 2', '--encode glyphs', '--gif'):
        refuses([*sampling, *more.split()], f'^{more[:12]}.*: the network is a student of --consis')
    assert '): the levels of --consistency lie further apart' in said([*command, 17])
    refuses(['train.py', *STUDENT, '--distill', 'b', '--out_dir', 'c'], 'itself a student')
