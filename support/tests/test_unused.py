"""Every flag of every script, with each method, solver and mode: the result differs, or the flag is
refused, or a line says that it is not used. `python -m pytest -m slow -s -k walk` walks all of it.
"""
import contextlib
import io
import itertools
import math
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import sample
import train
from support import bench, checkpoint, figures, flow, students
from support.batches import Charges
from support.checkpoint import save
from support.cli import BadInput
from support.inception import collect
from support.methods import as_flow
from support.networks import build
from support.tests.common import F64, loaded, refuses, rows_of, said, script, seeded
from support.tests.made import picture
from support.tests.published_files import edm_file, tiny_official
from support.unused import OF_ONE_METHOD, OF_PFGM, OF_STUDENTS, ONLY_SAID, of_flow, refuse


# ---------------------------------------------------------------- refused, or said

def test_refuse__names_what_was_typed(capsys):
    given = dict(gamma='--gamma 50', workers='--workers 2')
    unused = dict(gamma='with --D 128', workers='with images that are in memory', tau='by it')
    with pytest.raises(BadInput, match='^--gamma 50: not used with --D 128; leave it out$'):
        refuse(given, unused, dict(gamma=50))
    refuse(dict(workers='--workers 2'), unused, {})
    assert capsys.readouterr().out == '--workers 2: not used with images that are in memory\n'
    refuse(dict(guidance='--guidance 1'), dict(guidance='by it'), dict(guidance=1.0))


@pytest.mark.parametrize('solver, nfe, to_data, has_a_say', [
    ('euler', 1, False, False), ('euler', 2, True, False), ('euler', 2, False, True),
    ('heun', 2, False, False), ('heun', 3, True, False), ('heun', 3, False, True),
    ('unipc', 1, True, False), ('unipc', 2, True, True), ('unipc', 1, False, False)])
def test_of_flow__between_two_planes_there_is_no_schedule(straight, solver, nfe, to_data,
                                                          has_a_say):
    cpu = torch.device('cpu')
    ends = []
    for schedule in ('rho7', 'log'):
        lines = flow.load_flow(straight / 'ckpt.pt', cpu, solver=solver, nfe=nfe, to_data=to_data,
                               schedule=schedule, bf16=False)
        ends.append(lines.follow(lines.prior(range(2)), cpu, range(2))[0])
    assert torch.equal(*ends) != has_a_say
    assert ('schedule' in of_flow(lines)) != has_a_say


# ---------------------------------------------------------------- what is not recorded

def test_without_unused__keeps_no_constants_of_other_methods(at_work):
    make_needed(['../pp', '../pfgm', '../one'])
    flags = loaded('../pp')['args']
    assert {flags[key] for key in (*OF_PFGM, *OF_STUDENTS)} == {None} and flags['sigma_data'] == 0.5
    flags = loaded('../pfgm')['args']
    assert None not in {flags[key] for key in OF_PFGM} and flags['sigma_data'] is None
    flags = loaded('../one')['args']
    assert flags['pairs'] == 16 and flags['guidance'] == 1 and flags['flip'] is None


@pytest.mark.parametrize('recorded_all', [False, True])
def test_train__goes_on_from_a_checkpoint_with_and_without_constants_of_other_methods(
        recorded_all, at_work):
    make_needed(['../pp'])
    saved = loaded('../pp')
    if recorded_all:  # as checkpoints once did
        saved['args'].update(M=None, sigma=0.01, tau=0.03, gamma=5.0, skip=False, m_draws=1,
                             pairs=100000, guidance=1.0)
    os.makedirs('pp', exist_ok=True)
    torch.save(saved, 'pp/ckpt.pt')
    train_run('more', '--init_from', 'pp', '--steps', 3)
    train_run('student', '--reflow', 'pp', '--pairs', 8)
    train_run('pp', '--D', 128, '--classes', '--steps', 3)
    for folder in ('more', 'student', 'pp'):
        args = loaded(folder)['args']
        assert args['D'] == 128 and args['gamma'] is None and args['sigma_data'] == 0.5
    script(['checkpoint.py', '../pp', 'pp', '--out', 'mean.pt'])


def test_likelihood__records_what_had_a_say(at_work):
    make_needed(['../pp'])
    measuring = 'evaluate.py --ckpt ../pp --n 4 --device cpu --results r'.split()
    script([*measuring, *'--bpd --tol 0.1'.split()])
    script([*measuring, *'--bpd --tol 0.1 --classes none'.split()])
    script([*measuring, *'--swd --nfe 2 --guidance 3'.split()])
    refuses([*measuring, *'--bpd --tol 0.1 --guidance 3'.split()],
            '^--guidance 3: not used by bpd; leave it out$')
    of_labels, without, of_samples = rows_of('r')
    assert of_labels['classes'] == [0, 1] and without['classes'] == []
    assert of_labels['guidance'] is None and of_labels['tol'] == 0.1
    assert of_samples['guidance'] == 3 and of_samples['tol'] is of_samples['eta'] is None
    assert 'inception' not in of_samples and 'resize' not in of_samples


def test_encode__follows_the_labels_of_classes(at_work):
    make_needed(['../pp'])
    encoding = 'sample.py --ckpt ../pp --device cpu --verbose --encode ../a --n 2 --nfe 4'.split()
    lines = {}
    for name, more in (('none', ''), ('dog', '--classes dog'),
                       ('more', '--classes dog --guidance 3')):
        lines[name] = said([*encoding, '--out', f'{name}.png', *more.split()])
    assert 'classes []' in lines['none'] and 'classes [1]' in lines['dog']
    assert len({zlib.crc32(Path(f'{name}.png').read_bytes()) for name in lines}) == 3


# ---------------------------------------------------------------- the walk: what it starts from

SMALL = ('--image_size 8 --patch 1 --nf 8 --ch_mult 1 --num_blocks 1 --attn --batch_size 8 '
         '--steps 2 --log_every 1 --save_every 1 --sample_every 0 --warmup 0 --device cpu '
         '--no-bf16').split()
RUNS = dict(  # the runs that the walk starts from
    pfgm='', pp='--D 128 --classes', vp='--method vp --classes', rf='--method rf',
    across='--method rf --source ../b', few='--D 128 --consistency --classes',
    one='--distill ../pp --pairs 16')


@pytest.fixture(scope='module')
def ground(tmp_path_factory):
    """A folder with the sets a and b, each of 16 cats and dogs of 8 x 8 pixels, in colour, with
    pictures beside them, and the empty folder work, in which the walk runs its commands."""
    ground = tmp_path_factory.mktemp('ground')
    with pytest.MonkeyPatch.context() as patch:
        os.mkdir(ground / 'work')
        patch.chdir(ground / 'work')
        for name, seed in (('a', 0), ('b', 100)):
            for k in range(16):
                path = Path('..', name, 'cat' if k % 2 else 'dog', f'{k:02d}.png')
                path.parent.mkdir(parents=True, exist_ok=True)
                picture(seed + k).save(path)
        for k in range(4):
            os.makedirs('../32', exist_ok=True)
            picture(k, 32).save(f'../32/{k}.png')
        mask = Image.new('L', (8, 8))
        mask.paste(255, (0, 0, 8, 4))
        mask.save('../mask.png')
        picture(7).save('../x.png')
        picture(8).save('../y.png')
        patch.setattr(students, 'PAIR_NFE', 4)
        patch.setattr(students, 'STRAIGHTNESS_CALLS', 4)
        yield ground


@pytest.fixture
def at_work(ground, monkeypatch):
    """The test runs in the empty folder beside the runs."""
    monkeypatch.chdir(ground / 'work')
    empty()


def empty():
    """Remove all from the folder where the test runs."""
    for path in Path('.').iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def make_needed(words):
    """Make the runs and files that are among the words of a command and are not there yet."""
    for word in map(str, words):
        name = word.removeprefix('../')
        if name == word or os.path.exists(word):
            continue
        if name in RUNS:
            flags = RUNS[name].split()
            make_needed(flags)
            train_run(word, *flags)
            stir(word)
        elif name == 'official.pth':
            tiny_official(word)
        elif name == 'edm.pkl':
            edm_file(word, pfgmpp=True, D=2048, ncsnpp=True, classes=3)


def train_run(out, *flags):
    script(['train.py', *SMALL, '--dataset', '../a', '--out_dir', out, *flags])


def stir(folder):
    """Replace the weights of a run by random ones, of which every input has a say."""
    saved = loaded(folder)
    for part, seed in (('ema', 1), ('net', 2)):
        generator = seeded(seed)
        for tensor in saved[part].values():
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    torch.save(saved, Path(folder, 'ckpt.pt'))


# ---------------------------------------------------------------- the walk: one command

class Traces:
    """Runs commands, and notes what they do that is seen from outside, or would be on another
    machine. goes_on: whether a command goes on after a flag that is found to be not used, to see
    what it would have done."""

    def __init__(self, monkeypatch, goes_on=True):
        self.events = []
        self.unused = []  # the names of flags that were found to be not used
        follow = flow.Flow.follow
        bends = students.bends_of_lines

        def traced_follow(this, x, *args, **options):
            end, nfe = follow(this, x, *args, **options)
            self.events.append(('follow', len(x), nfe, end.double().sum().item()))
            return end, nfe

        def traced_compile(net, *args, **options):
            self.events.append(('compile',))
            return net

        def traced_inception(path, device, rank):
            self.events.append(('inception', path))
            return len, torch.randn(1008, 32, dtype=F64, generator=seeded())

        def traced_features(net, pixels, resize):
            self.events.append(('features', len(pixels), resize))
            small = torch.nn.functional.interpolate(pixels.expand(-1, 3, -1, -1).float(), (4, 4))
            # of logits far apart the largest alone decides on IS
            return small.flatten(1) / 2550 @ torch.randn(48, 32, generator=seeded())

        def traced_collect(batches, *args):
            def noted():
                for batch in batches:
                    self.events.append(('batch', len(batch)))
                    yield batch
            return collect(noted(), *args)

        def traced_bends(net, x, *args, **options):
            self.events.append(('bends', len(x)))
            return bends(net, x, *args, **options)

        def traced_deterministic(mode):
            self.events.append(('deterministic', mode))

        def traced_save(path, checkpoint):
            """In place of save(): notes the weights, and samples by them, and writes little, but
            for the runs from which the walk starts."""
            if path.startswith('../'):
                return save(path, checkpoint)
            flags = checkpoint['args']
            sums = {part: sum(t.double().sum().item() for t in checkpoint[part].values())
                    for part in ('net', 'ema')}
            self.events.append(('save', checkpoint['step'], sums))
            Path(path).write_bytes(b'')
            if checkpoint['step'] == flags['steps']:
                nfe = 1 if flags['distill'] else 3
                net = as_flow(build(checkpoint['net'], flags, path), flags).eval()
                made = flow.flow_of(net, flags, solver='euler', schedule='log', nfe=nfe,
                                    to_data=nfe == 1)
                if flags['source']:
                    images = torch.arange(2 * math.prod(made.shape)) % 256
                    made.source = Charges(images.view(2, *made.shape))
                made.follow(made.prior(range(2)), torch.device('cpu'), range(2))

        def recorded(given, unused, flags):
            """In place of refuse()."""
            for name in given:
                out = io.StringIO()
                try:
                    with contextlib.redirect_stdout(out):
                        refuse({name: given[name]}, unused, flags)
                except BadInput as error:
                    out.write(str(error))
                if out.getvalue():
                    self.unused.append(name)
            if not goes_on or set(WRONG) & set(self.unused):
                refuse(given, unused, flags)

        for target, value in {
                'support.flow.Flow.follow': traced_follow,
                'support.students.bends_of_lines': traced_bends,
                'support.run.save': traced_save,
                'torch.use_deterministic_algorithms': traced_deterministic,
                'torch.compile': traced_compile,
                'torch.nn.Module.compile': traced_compile,
                'support.reference.load_inception': traced_inception,
                'support.inception.inception_features': traced_features,
                'evaluate.collect': traced_collect,
                'evaluate.SAMPLES': 5,
                'evaluate.SAMPLES_OF_INCEPTION': 5,
                'support.reference.collect': traced_collect,
                'support.judge.JUDGE_STEPS': 2,
                'support.inception.POOL': 32,
                'evaluate.check_counts': lambda *args: None,
                'support.reference.check_counts': lambda *args: None,
                'support.options.refuse': recorded,
                'sample.refuse': recorded,
                'evaluate.refuse': recorded,
                'support.bench.refuse': recorded,
                'support.figures.refuse': recorded}.items():
            monkeypatch.setattr(target, value)

    def of(self, command, copy=None):
        """Run a command in an empty folder -> (what it did, or None where it was refused; the names
        of its flags that were found to be not used). copy: a run that it goes on from, in o."""
        empty()
        with contextlib.redirect_stdout(io.StringIO()):
            make_needed([*command, copy])
        if copy:
            shutil.copytree(copy, 'o')
        self.events.clear()
        self.unused.clear()
        with contextlib.redirect_stdout(io.StringIO()) as stdout, \
                contextlib.redirect_stderr(io.StringIO()) as stderr:
            try:
                script(command)
            except SystemExit as stop:
                text = stderr.getvalue()
                assert stop.code == 2 and text.count('\n') == 1, f'{command}: {text}'
                return None, list(self.unused)
        files = {str(path): content(path) for path in sorted(Path('.').rglob('*'))
                 if path.is_file()}
        if 'so it has no flow' in stdout.getvalue():  # of a student, asked for --bpd
            self.events.append(('has no flow',))
        events = sorted(self.events, key=repr)  # checkpoints are written by a thread
        return (events, files), list(self.unused)


ITS_OWN = ('command', 'time', 'git', 'torch', 'hardware', 'seconds', 'img_per_s', 'memory_gb',
           'seed', 'D', 'to_data', 'z_last', 'schedule', 'solver', 'small_z', 'z_min', 'z_exp',
           'guidance', 'eta', 'classes', 'bf16', 'tol', 'weights', 'resize', 'inception', 'run',
           'reference', 'reference_pixels', 'n_ref')


def content(path):
    """What a file holds, but for times, and for words that repeat the flags."""
    if path.suffix == '.jsonl':
        return [{key: value for key, value in row.items() if key not in ITS_OWN}
                for row in rows_of(path)]
    if path.suffix == '.pt':
        return None
    return zlib.crc32(path.read_bytes())


def walk(traces, base, modes, flags, pairs, resumed=None):
    """Give flags in modes, print what happens how often, and fail for a flag that changes nothing
    without a word, and for one that is said to be not used although it has a say.

    base: the words of all commands. modes: {name: words}. flags: {name: words}, or alternatives of
    which one is to have a say. pairs: names of a mode and of a flag. resumed: {mode: the run that
    it goes on from}."""
    counts = dict(differs=0, refused=0, said=0)
    faults = []
    before = {}
    for mode, flag in pairs:
        command = [*base, *modes[mode].split()]
        copy = (resumed or {}).get(mode)
        if mode not in before:
            before[mode], unused = traces.of(command, copy)
            assert before[mode] and not unused, f'{mode}: {unused}'
        outcomes = set()
        alternatives = flags[flag]
        if isinstance(alternatives, str):
            alternatives = (alternatives,)
        for words in alternatives:
            if f' {words} ' in f' {" ".join(command)} ':
                outcomes.add('is there')
                continue
            done, unused = traces.of([*command, *words.split()], copy)
            if flag in unused:
                outcomes.add('said' if flag in ONLY_SAID else 'refused')
                if done is not None and done != before[mode]:
                    faults.append(f'{mode}: {words}: said to be not used, but has a say')
            elif done is None or unused:
                outcomes.add('refused')
            elif done != before[mode]:
                outcomes.add('differs')
                break
        for outcome in counts:
            if outcome in outcomes:
                counts[outcome] += 1
                break
        else:
            if not outcomes:
                faults.append(f'{mode}: {" or ".join(alternatives)}: changes nothing')
    print(base[0], counts, *faults, sep='\n  ')
    assert not faults, '\n'.join(faults)


# Refused because what they would do is wrong: of a denoiser v_z is exact, and where there are no
# charges their number would decide on the order of the images.
WRONG = ('z_exp', 'small_z', 'field_batch')


def either(flag):
    return f'--{flag}', f'--no-{flag}'


def dests(parser_of, *words):
    """The names of all flags of a script."""
    return set(vars(parser_of(list(words)))) - {'given'}


def in_turn(modes, flags):
    """Each flag with one of the modes."""
    return [(mode, flag) for mode, flag in zip(itertools.cycle(modes), flags)]


# ---------------------------------------------------------------- the walk: train.py

TRAIN_MODES = {
    'pfgm': '', 'one': '--distill ../pp --pairs 16 --classes', 'vp': '--method vp',
    'pfgm with classes': '--classes', 'pfgmpp': '--D 128',
    'charges': '--D inf --field_batch 12 --classes', 'subvp': '--method subvp --classes',
    'ddpm': '--method ddpm', 'rf': '--method rf', 'across': '--method rf --source ../b',
    'few': '--D 128 --consistency', 'reflow': '--reflow ../rf --pairs 16',
    'one of pfgm': '--distill ../pfgm --pairs 16', 'taken over': '--init_from ../pp --steps 6',
    'resumed': '--steps 4', 'resumed pp': '--D 128 --classes --steps 4'}
TRAIN_FLAGS = dict(
    dataset='--dataset ../b', preset='--preset cifar10_pp', data_dir='--data_dir d',
    image_size='--image_size 4', channels='--channels 1', classes=either('classes'),
    flip=either('flip'), workers='--workers 1', method=('--method vp', '--method rf'), D='--D 64',
    field_batch='--field_batch 10', init_from=('--init_from ../pfgm', '--init_from ../vp'),
    reflow='--reflow ../rf --pairs 9', distill='--distill ../pp --pairs 9', pairs='--pairs 9',
    guidance='--guidance 2',
    consistency=either('consistency'), source='--source ../b', nf='--nf 16', ch_mult='--ch_mult 2',
    num_blocks='--num_blocks 2', attn='--attn 8', dropout='--dropout 0.5', ncsnpp=either('ncsnpp'),
    steps='--steps 5', batch_size='--batch_size 4', accum='--accum 2', lr='--lr 0.001',
    warmup='--warmup 7', grad_clip='--grad_clip 0.001', ema_decay='--ema_decay 0.1',
    seed='--seed 1', device='--device cuda:7', bf16=either('bf16'),
    compile=('--compile', '--compile reduce-overhead'), deterministic='--deterministic',
    timeout='--timeout 5', out_dir='--out_dir p', log_every='--log_every 2',
    sample_every='--sample_every 2', save_every='--save_every 2', keep='--keep 1',
    patch='--patch 2', label_first=either('label_first'), skip=either('skip'), muon=either('muon'),
    decay='--decay 0.5', loss='--loss mean', m_draws='--m_draws 2', M='--M 20', z_max='--z_max 30',
    upper_norm='--upper_norm 7', z_exp='--z_exp 0.5', z_min='--z_min 0.1', sigma='--sigma 0.1',
    tau='--tau 0.1', gamma='--gamma 2', sigma_data='--sigma_data 0.3', data_norm='--data_norm 3')


def walk_train(traces, pairs):
    assert TRAIN_FLAGS.keys() == dests(train.parse_args)
    walk(traces, ['train.py', *SMALL, '--dataset', '../a', '--out_dir', 'o'],
         TRAIN_MODES, TRAIN_FLAGS, pairs, {'resumed': '../pfgm', 'resumed pp': '../pp'})


def test_train__each_flag_once(at_work, monkeypatch):
    refused = (*OF_ONE_METHOD, 'z_exp', 'label_first', 'source')  # by vp, before any work
    pairs = [('vp' if flag in refused else 'pfgm', flag) for flag in TRAIN_FLAGS]
    walk_train(Traces(monkeypatch, goes_on=False), pairs)


@pytest.mark.slow
@pytest.mark.parametrize('mode', TRAIN_MODES)
def test_train__walk(mode, at_work, monkeypatch):
    walk_train(Traces(monkeypatch), [(mode, flag) for flag in TRAIN_FLAGS])


# ---------------------------------------------------------------- the walk: sample.py

SAMPLING = dict(  # the flags that sample.py and evaluate.py share
    ckpt='--ckpt ../rf', nfe='--nfe 7', classes=('--classes dog', '--classes none'),
    guidance='--guidance 2', seed='--seed 1', weights='--weights raw',
    exact='--exact --dataset ../a',
    dataset=('--dataset ../b', '--dataset celeba64'), data_dir='--data_dir d', start='--from ../a',
    image_size='--image_size 4', solver=('--solver euler', '--solver heun', '--solver rk45'),
    tol='--tol 0.01', schedule=('--schedule rho7', '--schedule log'), to_data=either('to_data'),
    z_min=('--z_min 0.5', '--z_min 0.1'), small_z=('--small_z official', '--small_z exact'),
    eta='--eta 0.5', device='--device cuda:7', batch_size='--batch_size 1', bf16=either('bf16'),
    compile='--compile', deterministic='--deterministic')
SAMPLE_MODES = {
    'pfgm': '--ckpt ../pfgm --nfe 3',
    'rk45': '--ckpt ../vp --solver rk45 --tol 0.3',
    'pfgm rk45': '--ckpt ../pfgm --solver rk45 --tol 0.3',
    'pp': '--ckpt ../pp --nfe 3',
    'one call': '--ckpt ../pp --nfe 1',
    'euler': '--ckpt ../pp --nfe 3 --solver euler',
    'heun': '--ckpt ../pp --nfe 4 --solver heun',
    'dpm3m': '--ckpt ../pp --nfe 4 --solver dpm3m',
    'renew': '--ckpt ../pp --nfe 3 --solver renew',
    'ddim': '--ckpt ../vp --nfe 3 --solver ddim',
    'ddim eta': '--ckpt ../vp --nfe 3 --solver ddim --eta 1',
    'guided': '--ckpt ../pp --nfe 3 --guidance 3',
    'no label': '--ckpt ../pp --nfe 3 --classes none',
    'exact': '--exact --dataset ../a --nfe 3',
    'exact rk45': '--exact --dataset ../a --tol 0.1',
    'across': '--ckpt ../across --nfe 3',
    'few': '--ckpt ../few',
    'few two': '--ckpt ../few --nfe 2',
    'one': '--ckpt ../one',
    'official': '--ckpt ../official.pth --nfe 4',
    'official rk45': '--ckpt ../official.pth --solver rk45 --tol 1',
    'edm': '--ckpt ../edm.pkl --nfe 3',
    'folder': '--ckpt ../pp --nfe 3 --out o',
    'npz': '--ckpt ../pp --nfe 3 --out o.npz',
    'gif': '--ckpt ../pp --nfe 3 --gif',
    'interpolate': '--ckpt ../pp --nfe 3 --interpolate',
    'rescale': '--ckpt ../pp --nfe 3 --rescale',
    'between': '--ckpt ../pp --nfe 3 --interpolate ../x.png ../y.png',
    'across between': '--ckpt ../across --nfe 3 --interpolate ../x.png ../y.png',
    'encode': '--ckpt ../pp --nfe 3 --encode ../a',
    'encode rk45': '--ckpt ../vp --tol 0.3 --encode ../a',
    'inpaint': '--ckpt ../pp --nfe 3 --inpaint ../x.png --mask ../mask.png',
    'inpaint by unipc': '--ckpt ../pp --nfe 3 --inpaint ../x.png --mask ../mask.png --solver unipc',
    'colorize': '--ckpt ../pp --nfe 3 --colorize ../x.png',
    'exact inpaint': '--exact --dataset ../a --nfe 3 --inpaint ../x.png --mask ../mask.png'}
SAMPLE_FLAGS = dict(
    SAMPLING, n=('--n 3', '--n 17'), out=('--out p.png', '--out p.gif'), gif='--gif',
    interpolate=('--interpolate', '--interpolate ../y.png ../x.png'), rescale='--rescale',
    encode='--encode ../b', inpaint='--inpaint ../y.png --mask ../mask.png',
    colorize='--colorize ../y.png', mask='--mask ../x.png')


def walk_sample(traces, pairs):
    assert SAMPLE_FLAGS.keys() == dests(sample.parse_args) - {'verbose'}  # which only prints
    modes = {mode: f'--n 2 {words}' for mode, words in SAMPLE_MODES.items()}
    for mode in ('between', 'across between'):  # which make one row
        modes[mode] = SAMPLE_MODES[mode]
    walk(traces, 'sample.py --device cpu --no-bf16'.split(), modes, SAMPLE_FLAGS, pairs)


def test_sample__each_flag_once(at_work, monkeypatch):
    modes = ['pp', 'encode', 'exact']
    walk_sample(Traces(monkeypatch, goes_on=False), in_turn(modes, SAMPLE_FLAGS))


@pytest.mark.slow
@pytest.mark.parametrize('mode', SAMPLE_MODES)
def test_sample__walk(mode, at_work, monkeypatch):
    walk_sample(Traces(monkeypatch), [(mode, flag) for flag in SAMPLE_FLAGS])


# ---------------------------------------------------------------- the walk: evaluate.py

EVALUATE_MODES = {
    'swd': '--ckpt ../pp --swd --nfe 3',
    'swd rk45': '--ckpt ../vp --swd --solver rk45 --tol 0.3',
    'neighbours': '--ckpt ../pp --neighbours --nfe 3',
    'judge': '--ckpt ../pp --judge --nfe 3',
    'fid': '--ckpt ../pp --fid --nfe 3',
    'all of Inception': '--ckpt ../pp --is --kid --prc --nfe 3',
    'bpd': '--ckpt ../pp --bpd --tol 0.3',
    'bpd of pfgm': '--ckpt ../pfgm --bpd --tol 0.3',
    'bpd and swd': '--ckpt ../pp --bpd --tol 0.3 --swd --nfe 3',
    'straightness': '--ckpt ../vp --straightness',
    'straight and bpd': '--ckpt ../vp --straightness --bpd --tol 0.3',
    'exact': '--exact --dataset ../a --swd --nfe 3',
    'exact bpd': '--exact --dataset ../a --bpd --tol 0.3',
    'official': '--ckpt ../official.pth --swd --nfe 4 --ref ../32',
    'across': '--ckpt ../across --swd --nfe 3',
    'across fid': '--ckpt ../across --fid --nfe 3',
    'one': '--ckpt ../one --swd',
    'few': '--ckpt ../few --swd',
    'ref': '--ckpt ../pp --swd --nfe 3 --ref ../b',
    'ref stats': '--ckpt ../pp --fid --nfe 3 --ref ../s.npz',
    'samples': '--samples ../b --swd --dataset ../a',
    'samples fid': '--samples ../b --fid --ref ../a',
    'samples is': '--samples ../b --is --n 16',  # ten splits of one image each have an IS of 1
    'samples stats': '--samples ../b --fid --ref ../s.npz',
    'samples neighbours': '--samples ../b --neighbours --dataset ../a',
    'stats': '--save_stats s.npz --dataset ../a',
    'stats of ref': '--save_stats s.npz --ref ../a',
    'stats and fid': '--ckpt ../pp --fid --nfe 3 --save_stats s.npz',
    'sweep': '--ckpt ../pp --swd --sweep nfe=2,3',
    'sweep of solvers': '--ckpt ../pp --swd --sweep nfe=2,3 --solvers euler,rk45 --tol 0.3',
    'compare': '--compare ../pp ../vp --swd --sweep nfe=2,3',
    'compare with bpd': '--compare ../pp ../vp --sweep nfe=2 --tol 0.3'}
EVALUATE_FLAGS = dict(
    SAMPLING | {name: f'--{name}' for name in evaluate.METRICS}, bpd='--bpd --tol 0.3',
    repeats='--repeats 2', n='--n 6', samples='--samples ../b', sweep='--sweep nfe=2,4',
    solvers=('--solvers euler', '--solvers heun'), compare='--compare ../pp ../pfgm',
    ref='--ref ../b', save_stats='--save_stats t.npz', inception='--inception random',
    resize='--resize pytorch', workers='--workers 1', out='--out p.png',
    results='--results q.jsonl')


def walk_evaluate(traces, pairs):
    assert EVALUATE_FLAGS.keys() == dests(evaluate.parse_args) - {'bpd_tol'}  # of --tol
    if not os.path.exists('../s.npz'):
        np.savez('../s.npz', mu=np.zeros(32), sigma=np.eye(32))
    modes = {mode: f'--n 4 --results r.jsonl {words}' for mode, words in EVALUATE_MODES.items()}
    for mode in ('stats', 'stats of ref'):  # which measure nothing
        modes[mode] = EVALUATE_MODES[mode]
    walk(traces, 'evaluate.py --device cpu'.split(), modes, EVALUATE_FLAGS, pairs)


def test_evaluate__each_flag_once(at_work, monkeypatch):
    walk_evaluate(Traces(monkeypatch, goes_on=False), in_turn(['swd', 'samples'], EVALUATE_FLAGS))


@pytest.mark.slow
@pytest.mark.parametrize('mode', EVALUATE_MODES)
def test_evaluate__walk(mode, at_work, monkeypatch):
    walk_evaluate(Traces(monkeypatch), [(mode, flag) for flag in EVALUATE_FLAGS])


# ---------------------------------------------------------------- the walk: the other scripts

BENCH_MODES = {'all': '--n 4 --sweep nfe=3 --solvers euler,rk45', 'rk45': '--n 4 --solvers rk45'}
BENCH_FLAGS = dict(
    seed='--seed 1', device='--device cuda:7', dataset='--dataset ../b', data_dir='--data_dir d',
    image_size='--image_size 4', n='--n 3', batch_size='--batch_size 1', sweep='--sweep nfe=4',
    solvers='--solvers heun', results='--results q.jsonl', out='--out q.png')


def test_bench__has_no_other_flags():
    assert BENCH_FLAGS.keys() == dests(bench.parse_args, 'solvers') - {'bench'}
    refuses('bench.py solvers --device cpu --solvers rk45 --sweep nfe=3'.split(),
            '^--sweep nfe=3: not used with --solvers rk45, which makes the calls that it needs; ')


@pytest.mark.slow
def test_bench__walk(at_work, monkeypatch):
    traces = Traces(monkeypatch)
    walk(traces, 'bench.py solvers --device cpu --dataset ../a --results r.jsonl'.split(),
         BENCH_MODES, BENCH_FLAGS, itertools.product(BENCH_MODES, BENCH_FLAGS))


def test_bench__of_speed_reads_its_two_flags(at_work, monkeypatch):
    traces = Traces(monkeypatch)
    monkeypatch.setattr(bench, 'speed', lambda device, seed: traces.events.append(('speed', seed)))
    flags = dict(seed='--seed 1', device='--device cuda:7')
    assert flags.keys() == dests(bench.parse_args, 'speed') - {'bench'}
    walk(traces, 'bench.py speed --device cpu'.split(), {'': ''}, flags,
         itertools.product([''], flags))


OTHER_SCRIPTS = {  # {command: its flags}
    'checkpoint.py ../pp': {}, 'figures.py curves ../pp/log.jsonl': {}, 'figures.py heart': {},
    'figures.py half': dict(image_size='--image_size 12'),
    'figures.py flow --ckpt ../pfgm --device cpu': dict(
        ckpt='--ckpt ../pp', n='--n 2', seed='--seed 1', device='--device cuda:7'),
    'figures.py flow --ckpt ../across --device cpu': dict(
        ckpt='--ckpt ../pp', n='--n 2', seed='--seed 1', device='--device cuda:7')}


def test_checkpoint_and_figures__each_flag(at_work, monkeypatch):
    monkeypatch.setattr(figures, 'STRIP_NFE', 4)
    monkeypatch.setattr(figures, 'heart', lambda out: Path(out).touch())
    make_needed(['../pp'])
    traces = Traces(monkeypatch)
    for command, flags in OTHER_SCRIPTS.items():
        flags = dict(flags, out='--out b.png')
        script_name, *words = command.split()
        parser_of = (checkpoint if script_name == 'checkpoint.py' else figures).parse_args
        positional = {'figure', 'logs'} if script_name == 'figures.py' else {'ckpt'}
        assert dests(parser_of, *words, '--out', 'a.png') - positional == flags.keys()
        walk(traces, [script_name, *words, '--out', 'a.png'], {'': ''}, flags,
             itertools.product([''], flags))
