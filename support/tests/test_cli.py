"""What scripts say to people: wrong flags end in one line, files are whole or not there."""
import contextlib
import importlib
import io
import math
import os
import re
import shutil
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluate import METRICS
from sample import MODES
from support import judge
from support.classes import class_numbers
from support.cli import (BadInput, Parser, above, check_folder, given_by, one_of, printable, say,
                         several, unless, write)
from support.flow import Flow
from support.processes import run
from support.tests.common import TINY, TINY_PP, refuses, script


# ---------------------------------------------------------------- flags

def test_parser__knows_the_words_that_were_typed():
    p = Parser()
    p.add_argument('--gamma', type=float, default=5.0)
    p.add_argument('--skip', action='store_true')
    p.add_argument('--from', dest='start', nargs='*')
    args = p.parse_args('--from a b --gamma=50'.split())
    assert args.given == {'start': '--from a b', 'gamma': '--gamma 50'}
    assert p.parse_args([]).given == {}
    within = p.add_subparsers(dest='bench')
    within.add_parser('speed').add_argument('--n')
    assert p.parse_args('speed --n 3'.split()).given == {'n': '--n 3'}


# ---------------------------------------------------------------- errors and files

def test_given_by__names_the_flag_that_gave_the_file():
    with pytest.raises(BadInput, match='^--distill a.pt: no such file; see --ckpt$'):
        with given_by('--distill'):
            raise BadInput('--ckpt a.pt:\nno such file; see --ckpt')


RED = '\x1b[31mcat\u202e\udcff'


def test_printable__shows_escape_codes_and_leaves_words_and_lines():
    assert printable('c\xe4t \u732b\t1\r\n') == 'c\xe4t \u732b\t1\r\n'
    assert printable(RED) == r'\x1b[31mcat\u202e\udcff'
    assert str(BadInput(f'{RED}\n; give')) == r'\x1b[31mcat\u202e\udcff ; give'


def test_run__no_escape_code_reaches_the_terminal(capsys):
    def main(args):
        print(RED)
        print(RED, file=sys.stderr)
        sys.stdout.writelines([RED])
        raise BadInput(RED)
    with pytest.raises(SystemExit):
        run(main, None)
    captured = capsys.readouterr()
    assert captured.out.count(r'\x1b[31mcat') == 2 and captured.err.count(r'\x1b[31mcat') == 2
    assert '\x1b' not in captured.out + captured.err


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='no /dev/full, which stands for a disk')
def test_write__on_a_full_disk_keeps_the_checkpoint(copied):
    before = (copied / 'ckpt.pt').read_bytes()
    (copied / 'ckpt.pt.part').symlink_to('/dev/full')
    refuses(['train.py', *TINY, '--dropout', 0.1, '--steps', 11, '--out_dir', copied], 'is intact')
    assert (copied / 'ckpt.pt').read_bytes() == before
    assert not os.path.lexists(copied / 'ckpt.pt.part')


def test_write__replaces_the_file_or_leaves_it_as_it_was(here):
    def half(file):
        file.write(b'half')
        raise OSError('No space left on device')

    with pytest.raises(BadInput, match='^--out a: cannot be written .No space.*nothing was saved'):
        write('--out', 'a', half)
    assert os.listdir() == []
    write('--out', 'a', lambda file: file.write(b'whole'))
    with pytest.raises(BadInput, match='the one of before is intact'):
        write('--out', 'a', half)
    assert os.listdir() == ['a'] and Path('a').read_bytes() == b'whole'


# ---------------------------------------------------------------- progress

def test_say__is_said_by_the_first_process_alone(monkeypatch, capsys):
    for rank in '01':
        monkeypatch.setenv('RANK', rank)
        say(f'from {rank}')
    assert capsys.readouterr().out == 'from 0\n'


# ---------------------------------------------------------------- flags

def test_above__and_unless_take_what_they_say():
    whole = above(0, int, 10)
    assert [whole('1'), whole('9'), above(0)('0.5')] == [1, 9, 0.5]
    assert unless('all', None, whole)('all') is None and unless('all', None, whole)('7') == 7
    for text in ('0', '10', '1.5', 'all', 'nan'):
        with pytest.raises(Exception, match=f'{text}: must be a whole number above 0 and below 10'):
            whole(text)


def test_several__are_values_with_commas_between():
    calls = several(above(0, int), prefix='nfe=')
    assert calls('nfe=5,10') == calls('5,10') == [5, 10]
    with pytest.raises(Exception, match='must be a whole number'):
        calls('nfe=5,')
    assert several(one_of(('cat', 'dog')))('dog,cat') == ['dog', 'cat']
    with pytest.raises(Exception, match='^fox: accepted: cat, dog$'):
        one_of(('cat', 'dog'))('fox')


def test_check_folder__says_how_to_make_it(here):
    check_folder('--out', 'a.png')
    with pytest.raises(BadInput, match='--out a/b.png: no folder a; make it with: mkdir -p a'):
        check_folder('--out', 'a/b.png')
    os.mkdir('a')
    check_folder('--out', 'a/b.png')


@pytest.mark.parametrize('script_name, words, meant', [
    ('train', '--step 3', '--steps'), ('train', '--preset cifar_10', 'cifar10'),
    ('sample', '--solver unipcc', 'unipc'), ('evaluate', '--fidd', '--fid'),
    ('evaluate', '--swd --sweep nfe=5 --solvers hein', 'heun'), ('bench', 'solver', 'solvers')])
def test_did_you_mean__names_the_flag_or_word_that_was_nearly_given(script_name, words, meant):
    refuses([script_name, *words.split()], f'; did you mean {meant}[?]')


def test_class_numbers__name_the_class_that_was_nearly_given():
    with pytest.raises(BadInput, match='--classes dogg: the network knows cat, dog; did you mean'):
        class_numbers(['dogg'], 2, ['cat', 'dog'])
    with pytest.raises(BadInput, match='--classes bird: the network knows cat, dog$'):
        class_numbers(['bird'], 2, ['cat', 'dog'])


@pytest.mark.parametrize('name', ['train', 'sample', 'evaluate', 'support.bench speed',
                                  'support.bench solvers', 'support.checkpoint',
                                  *(f'support.figures {name}'
                                    for name in ('heart', 'flow', 'half', 'curves'))])
def test_help__says_what_each_flag_does_and_its_default(name, capsys):
    module, *subcommand = name.split()
    with pytest.raises(SystemExit):
        importlib.import_module(module).parse_args([*subcommand, '--help'])
    out = capsys.readouterr().out
    if not subcommand:  # that of the whole script has examples at its top
        assert 'python ' in out.partition('--help')[0].partition('usage')[2]
    flags = re.split(r'\n  (?=--)', out)[1:]
    without = [flag.split()[0] for flag in flags if not re.search(r'default|preset', flag)]
    switches = [f'--{metric}' for metric in METRICS] + [f'--{mode}' for mode in MODES]
    assert set(without) <= {*switches, '--out'}, without
    assert '--out' not in without or name == 'support.checkpoint'


WORDS = ['', 'x', 'nan', 'inf', '-1', '0', '1e400', '1_0', '\u0663', '\u2460', '0x10', '9' * 5000,
         '[]', 'a\nb', '\udcff', '-x', '%s', '1,2', 'nfe=', 'nfe=1,,2', '1e-400', '..', '\x1b[31m']


@pytest.mark.parametrize('every', [8, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize('name', ['train', 'sample', 'evaluate'])
def test_parser__any_word_is_a_value_or_ends_in_one_line(name, every):
    parse = importlib.import_module(name).parse_args
    for k, flag in enumerate(vars(parse([]))):
        for word in WORDS[k % every::every]:
            with contextlib.redirect_stderr(io.StringIO()) as stderr:
                try:
                    value = getattr(parse([f'--{flag}={word}']), flag)
                except SystemExit as stop:
                    assert stop.code == 2 and stderr.getvalue().count('\n') == 1, word
                    continue
            assert not isinstance(value, float) or math.isfinite(value) or flag == 'D', word


OFFLINE = r'get https://\S+ by hand and put it at \S+, or give --inception'
REFUSALS = {  # flags of each script and words of its line
    # TWO: as one of two processes; RF: of a run of rectified flow
    'train': [
        ('--dataset nothing_here', 'no such data set'),
        ('--steps 0', 'above 0'),
        ('x', 'unrecogn'),
        ('--hel', 'unrecognized'),
        ('--patch 3', 'image_size 16: patches of 3, .* of 3'),
        ('--dropout 1', 'below 1'),
        ('--lr nan', 'a number above 0'),
        ('--accum 3', 'multiple of'),
        ('--field_batch 4', 'give --field_batch 8 or more'),
        ('--nf 30', 'take a multiple'),
        ('--D 3 --field_batch 4', '--field_batch 4: .* give --field_batch 8 or more'),
        ('--z_min 1e9', 'must be below z_max'),
        ('--method vp --D 3', 'D 3: belongs'),
        ('--device cuda:7', '--device cuda:7: not on this machine'),
        ('--device tpu9', 'not on'),
        ('--out_dir /dev/null/x', 'cannot write'),
        ('--init_from no.pth', 'no such file')],
    'sample': [
        ('--ckpt no.pt', 'no such file; make one with'),
        ('--nfe 2.5', '--nfe: 2.5'),
        ('--solver rk4', 'rk4'),
        ('--out a.tiff', 'must be a file'),
        ('--out no/a.png', 'mkdir'),
        ('--out /proc/x', '/x: cannot be written'),
        ('--out /proc/x.png', 'x.png: cannot be'),
        ('--encode nothing', 'no such data set'),
        ('--exact', '--ckpt .*: not used with --exact'),
        ('--guidance 2', '--guidance 2: not used by a network that knows no classes; leave'),
        ('--classes -2', '-2'),
        ('--classes 3', '--classes 3: .* none; leave it out'),
        ('--schedule time', 'only vp'),
        ('--eta 1', '--eta 1: not used with solver rk45; it belongs to --solver ddim'),
        ('--solver ddim', 'ddim: adds Gaussian noise'),
        ('RF --solver ddim --eta 1 --encode glyphs', '--eta 1: fresh'),
        ('--solver renew --interpolate glyphs glyphs', '--solver renew: fresh'),
        ('TWO --gif', 'by one process'),
        ('TWO --encode glyphs', 'by one process')],
    'evaluate': [
        ('', 'no metric asked'),
        ('--fid --n 100', 'needs 2049 images'),
        ('--kid --ref a', 'ref a'),
        ('--sweep nfe=0 --swd', '0'),
        ('--swd --sweep nfe=5 --solvers rk4', 'rk4'),
        ('--fid --samples nothing --ref x', '--samples nothing: no such'),
        ('--swd --results no/r.jsonl', 'mkdir'),
        ('--swd --n 2 --nfe 1 --results /proc/x', '--results /proc/x: cannot be written'),
        ('--is --n 20 --inception none.pth', 'none.pth: .*No such file.*; get'),
        ('--is --n 20', OFFLINE),
        ('--straightness', 'only vp')],
    'figures': [('curves none.jsonl', 'none.jsonl: .*No such file')]}


@pytest.mark.parametrize('name, flags, message', [
    (name, *row) for name, rows in REFUSALS.items() for row in rows])
def test_bad_input__ends_in_one_line_before_any_work(
        name, flags, message, trained, straight, tmp_path, monkeypatch):
    def offline(*args, **options):
        raise urllib.error.URLError('no network')

    if '/proc' in flags and not Path('/proc/self').exists():
        pytest.skip('no /proc: no folder refuses root')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, 'download_url_to_file', offline)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path.parent))
    if name == 'sample':
        monkeypatch.setattr(Flow, 'follow', None)  # no image may be begun
    words = flags.split()
    base = ['--ckpt', straight if 'RF' in words else trained, '--device', 'cpu']
    if name == 'train':
        base = [*TINY, '--out_dir', 'o']
    elif name == 'figures':
        base = []
    if 'TWO' in words:
        monkeypatch.setenv('WORLD_SIZE', '2')
    refuses([name, *base, *(word for word in words if word not in ('TWO', 'RF'))], message)
    assert os.listdir(tmp_path) == []


TOGETHER = dict(  # flags that may stand together in any way
    train="""--method=vp --method=rf --method=pfgm --D=3 --D=inf --classes --flip --image_size=8
        --no-skip --channels=3 --batch_size=6 --accum=2 --accum=3 --field_batch=1 --field_batch=all
        --field_batch=9 --decay=1 --patch=2 --muon --ncsnpp --label_first --dropout=0.2 --attn
        --attn=8 --ch_mult=1 --nf=7 --loss=mean --m_draws=4 --M=5 --z_max=1 --z_exp=0 --z_min=2
        --consistency --init_from=run --init_from=pp --distill=run --reflow=pp --pairs=5 --bf16
        --source=photos.npy --sample_every=1 --preset=mnist --keep=1 --dataset=photos.npy""",
    sample="""--ckpt=pp --ckpt=vp --exact --solver=euler --solver=rk45 --solver=renew --eta=1
        --solver=ddim --nfe=3 --schedule=time --schedule=log --z_min=.5 --to_data --no-to_data
        --tol=.05 --guidance=2 --classes=1,2 --classes=none --small_z=official --weights=raw --bf16
        --gif --n=9 --interpolate --rescale --encode=photos.npy --inpaint=photos.npy
        --mask=mask.png --colorize=photos.npy --from=photos.npy --out=a.npz --out=folder""",
    evaluate="""--ckpt=pp --ckpt=vp --exact --swd --bpd --neighbours --straightness --judge --fid
        --sweep=1,2 --solvers=euler,rk45 --compare=run --n=3 --n=140 --ref=photos.npy --nfe=2
        --samples=photos.npy --dataset=photos.npy --solver=heun --repeats=2 --tol=.05 --out=a.png
        --save_stats=s.npz --guidance=2 --classes=1 --schedule=rho7""")


@pytest.mark.slow
def test_bad_input__any_flags_together_end_well_or_in_one_line(
        trained, few_glyphs, here, monkeypatch):
    monkeypatch.setattr(judge, 'JUDGE_STEPS', 2)
    shutil.copytree(trained, 'run')
    script(['train.py', *TINY_PP, '--D', 3, '--steps', 2, '--out_dir', 'pp'])
    script(['train.py', *TINY_PP, '--method', 'vp', '--classes', '--steps', 2, '--out_dir', 'vp'])
    np.save('photos.npy', np.arange(9 * 256).astype(np.uint8).reshape(9, 16, 16))
    Image.fromarray(np.eye(16, dtype=np.uint8) * 255).save('mask.png')
    # At its own tol of 1e-4 rk45 makes thousands of calls of a network that has learned so little.
    of_flow = '--ckpt run --device cpu --data_dir . --batch_size 70 --n 2 --tol 0.1'.split()
    base = dict(train=[*TINY, '--steps', 2], sample=of_flow,
                evaluate=[*of_flow, '--inception', 'random'])
    rng = np.random.default_rng(0)
    codes = []
    for name in 40 * [*TOGETHER]:
        shutil.rmtree('out', ignore_errors=True)
        flags = rng.choice(TOGETHER[name].split(), rng.integers(1, 5), replace=False)
        code = 0
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            try:
                script([name, *base[name], *flags])
            except SystemExit as stop:
                code = stop.code
        text = stderr.getvalue()
        assert code == 0 or code == 2 and text.count('\n') == 1, (name, flags, text)
        codes.append(code)
    assert codes.count(0) > 30 and codes.count(2) > 13
