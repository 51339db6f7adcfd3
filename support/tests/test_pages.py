"""What README.md and RESULTS.md say: their commands run, their links point at what they name, the
example needs pfgm.py alone, and "Fork it" works as it is written."""
import functools
import importlib
import math
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
import unet
from support import bench, sets
from support.processes import run
from support.tests.common import F64, HERE, MODULES, close, loaded, losses, rows_of, seeded
from support.tests.published_files import edm_file, tiny_official

README = (HERE / 'README.md').read_text()
RESULTS = (HERE / 'RESULTS.md').read_text()
LINK = r'\[`(\w+)`\]\(([\w/]+\.py)#L(\d+)\)'  # [`name`](file.py#L123)


# ---------------------------------------------------------------- commands

def readme_commands():
    """The commands of the README's shell blocks and sentences, then those of RESULTS.md, in order:
    [['train.py', '--dataset', ...], ...]; 'pip' and 'pytest' stand for themselves."""
    block = r'```sh\n(.*?)```'
    sentence = r'`((?:python|torchrun) [^`]*(?:\.py|-m) [^`]*)`'
    texts = [command for blocks in re.findall(f'{block}|{sentence}', README + RESULTS, re.S)
             for command in blocks if command]
    # bash expands their loops and braces, and finds no other program than these three, which show
    # their own words.
    names = ('pip', 'python', 'torchrun')
    shows = [f'{name}() {{ echo {name} "$@"; }}' for name in names]
    shown = subprocess.check_output(['bash', '-efc', '\n'.join(['PATH=/none', *shows, *texts])],
                                    text=True)
    return [after_launcher(line.split()) for line in shown.splitlines()]


def after_launcher(words):
    """The words from the script on; support.bench is called bench there."""
    if words[0] == 'pip':
        return words
    if words[1] == '-m':
        return [words[2].removeprefix('support.'), *words[3:]]
    script, *_ = [i for i, word in enumerate(words) if word.endswith('.py')]
    return words[script:]


# What makes a command small, added to one that has such a word. Of a flag that is given twice the
# last counts.
SMALLER = {
    'train.py': '--device cpu --no-bf16 --batch_size 8 --log_every 1 --steps 3',
    'sample.py': '--device cpu --no-bf16 --n 4 --tol 0.1',
    'evaluate.py': '--device cpu --no-bf16 --n 4',
    '--init_from': '--steps 10',
    '--pairs': '--pairs 4',
    '--exact': '--n 2',
    '--bpd': '--tol 0.1',
    '--compare': '--tol 0.1 --sweep nfe=2,3',
    '--sweep': '--tol 0.1 --sweep nfe=2,3',
    'speed': '--device cpu',
    'solvers': '--device cpu --n 4 --sweep nfe=2,3',
}


def toy(size, channels):
    """In place of a torchvision data set: digits of its size, nothing downloaded."""
    def stored(root, train, download):
        pixels, labels = sets.glyphs(image_size=size, split='train' if train else 'test')
        if channels == 3:
            pixels = np.stack([pixels] * 3, axis=-1)
        return types.SimpleNamespace(data=pixels, targets=labels, classes=[*'0123456789'])
    return stored


def tiny_features(net, pixels, resize):
    """In place of Inception's: 32 numbers of each image."""
    small = torch.nn.functional.interpolate(pixels.expand(-1, 3, -1, -1).float(), size=(4, 4))
    return small.flatten(1) @ torch.randn(48, 32, generator=seeded())


@pytest.fixture
def newcomer(here, few_glyphs, monkeypatch):
    """A folder with the files that the README speaks of; networks, data, Inception made small."""
    tiny = dict(nf=8, num_blocks=1, warmup=2, sample_every=0, field_batch=16)
    presets = {name: {**preset, **tiny} for name, preset in train.PRESETS.items()}
    by_size = {size: {**preset, **tiny} for size, preset in train.BY_SIZE.items()}
    tiny_unet = functools.partial(unet.UNet, nf=8, ch_mult=(1, 1), num_blocks=1)
    last_layer = torch.randn(1008, 32, dtype=F64)
    for target, value in {
            'train.PRESETS': presets,
            'train.BY_SIZE': by_size,
            'torchvision.datasets.MNIST': toy(28, 1),
            'torchvision.datasets.CIFAR10': toy(32, 3),
            'support.bench.UNet': tiny_unet,
            'support.bench.FIELD_CHARGES': (64, 128),
            'support.bench.FLOAT64_SIDE': 64,
            'support.bench.BFLOAT16_SIDE': 64,  # minutes where a CPU has no bfloat16
            'support.bench.median_seconds': functools.partial(bench.median_seconds, repeats=1),
            'torch.nn.Module.compile': lambda net, mode: None,  # a minute each
            'support.judge.JUDGE_STEPS': 2,
            'support.inception.POOL': 32,
            'support.inception.inception_features': tiny_features,
            'support.reference.load_inception': lambda *args: (len, last_layer),
            'support.reference.check_counts': lambda *args: None,
            'evaluate.check_counts': lambda *args: None}.items():
        monkeypatch.setattr(target, value)

    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)
    os.mkdir('photos')
    for k in range(8):
        Image.fromarray(pixels[k]).save(f'photos/{k}.png')
    os.mkdir('data')
    np.savez('data/bloodmnist.npz', train_images=pixels[:, 4:, 4:], test_images=pixels[:, 4:, 4:])
    np.savez('cifar10_stats.npz', mu=np.zeros(32), sigma=np.eye(32))

    tiny_official('checkpoint_500000.pth')
    published = dict(pfgmpp=True, D=2048, ncsnpp=True)
    edm_file('training-state-200000.pkl', **published)
    edm_file('conditional.pkl', **published, classes=10)
    edm_file('training-state.pkl', pfgmpp=True, D=128, size=64)
    edm_file('edm-cifar10-32x32-uncond-vp.pkl')


def test_readme_commands__are_parsed():
    commands = readme_commands()
    assert len(commands) > 80
    for command in commands:
        name = command[0].removesuffix('.py')
        if name == 'pip':
            assert (HERE / command[command.index('-r') + 1]).exists()
        elif name != 'pytest':
            module = importlib.import_module(f'support.{name}' if name in MODULES else name)
            module.parse_args(command[1:])


def run_smaller(command):
    """Run a command made small. A flag that it types must be used, one that is added need not."""
    more = ' '.join(SMALLER.get(word, '') for word in command).split()
    name = command[0].removesuffix('.py')
    module = importlib.import_module(f'support.{name}' if name in MODULES else name)
    args = module.parse_args([*command[1:], *more])
    args.given = module.parse_args(command[1:]).given
    run(module.main, args)


@pytest.mark.parametrize('count', [10, pytest.param(1000, marks=pytest.mark.slow)])
def test_readme_commands__run_in_their_order(newcomer, count):
    for command in readme_commands()[:count]:
        if command[0] in ('pip', 'pytest'):
            continue
        print(' '.join(command))  # which pytest shows if it fails, and with -s at once
        run_smaller(command)
        for flag, path in zip(command, command[1:]):
            assert flag not in ('--out', '--out_dir') or os.path.exists(path), command
    if count == 1000:  # the authors' file stood at step 7
        assert loaded('out/more')['opt']['state'][0]['step'] == 10


# ---------------------------------------------------------------- links and length

def line_of(name, file):
    """The number of the line of a file that defines a name at its top level, or None."""
    for number, line in enumerate((HERE / file).read_text().splitlines(), 1):
        if re.match(rf'(def|class) {name}\b|{name} = ', line):
            return number


def test_readme_links__point_at_the_lines_that_define_what_they_name():
    links = re.findall(LINK, README + RESULTS)
    assert len(links) >= 15
    right = [(name, file, str(line_of(name, file))) for name, file, _ in links]
    wrong = [f'[`{name}`]({file}#L{line}) is at line {number}'
             for (name, file, line), (_, _, number) in zip(links, right) if line != number]
    assert not wrong, '\n'.join(wrong)


def test_readme_links__lead_to_files_and_headings_that_exist():
    headings = set()
    for page, text in (('README.md', README), ('RESULTS.md', RESULTS)):
        for heading in re.findall(r'^##+ (.*)', text, re.M):
            anchor = re.sub(r'[^\w -]', '', heading).lower().replace(' ', '-')
            headings.add(f'{page}#{anchor}')
    for target in re.findall(r'\]\(([^)]*)\)', README + RESULTS):
        file, _, place = target.partition('#')
        if not target.startswith('https://'):
            assert (HERE / file).is_file(), target
            assert not (file.endswith('.md') and place) or target in headings, target


def test_readme__is_short():
    assert len(README.splitlines()) <= 250


# ---------------------------------------------------------------- the example with pfgm.py alone

def test_readme_example__trains_samples_and_measures_with_pfgm_alone(tmp_path):
    code = re.search(r'```python\n(.*?)```', README, re.S).group(1)
    shutil.copy(HERE / 'pfgm.py', tmp_path)
    (tmp_path / 'example.py').write_text(code)
    environment = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    ran = subprocess.run([sys.executable, 'example.py'], cwd=tmp_path, env=environment,
                         capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    pattern = r'(\d+) calls; radius ([\d.]+) \+- ([\d.]+); ([-\d.]+) bits/dim\n'
    printed = re.fullmatch(pattern, ran.stdout)
    assert printed, ran.stdout
    calls, radius, spread, bits = map(float, printed.groups())
    assert 10 < calls < 200
    close(radius, 0.7, atol=0.1)  # the ring has 0.70 +- 0.10
    close(spread, 0.1, atol=0.05)
    assert 7.3 < bits < 8         # 7.42 is the entropy; 100 points of it differ by 0.05


# ---------------------------------------------------------------- "Fork it"

# (what the README links to, what to find from there on, what a fork puts in its place)
FORK = [
    ('SETS', r'SETS = \{', r"""\g<0>
    'ramps': KnownSet(16, 1, False, ''),
    'kmnist': KnownSet(28, 1, False, '', 'KMNIST'),"""),
    ('find', r"    if dataset == 'glyphs'", r"""    if dataset == 'ramps':
        return RawSet(None, np.arange(40 * 256).reshape(40, 16, 16).astype(np.uint8))
\g<0>"""),
    ('UNet', r'class UNet.*?(?=^\S|\Z)', """class UNet(nn.Module):
    def __init__(self, channels, **more):
        super().__init__()
        self.conv = conv(channels, channels, scale=0)

    def forward(self, x, z, labels=None):
        return self.conv(x), 0 * z


"""),
    ('PFGM', r'    def target\(.*?""".*?"""\n', r"""\g<0>        return torch.ones_like(moved), 0 * z
"""),
    ('METHODS', r'\n', r"""
class Cosine(VP):
    t_train, t_sample, t_max = 1e-3, 1e-3, 0.99

    def z_of(self, t):
        return torch.tan(torch.pi / 2 * t)

    def t_of(self, z):
        return torch.atan(z) * 2 / torch.pi

    def weight(self, x, z):
        return torch.zeros_like(z)


METHODS['cosine'] = Cosine
"""),
    ('SOLVERS', r'\)\n', r""")


def euler_log(f, x, z_from, z_to, nfe=100, planes=log_planes):
    grid = planes(x, z_from, z_to, nfe)
    for z, z_next in zip(grid[:-1], grid[1:]):
        x = x + column((z_next / z).log(), x) * f(x, like(z, x))
        yield z_next, x


SOLVERS['euler_log'] = euler_log
"""),
    ('METRICS', r'METRICS = \{', r"""def of_brightness(samples, reference, device, seed):
    yield Result(dict(brightness=samples.pixels.double().mean().item()), f'{samples.n} images')


METRICS = {
    'brightness': Metric('mean of the pixels', {'pixels'}, 1, of_brightness),"""),
    ('PRESETS', r'PRESETS = dict\(', r"""RAMPS = dict(GLYPHS, loss='mean')
\g<0>ramps=RAMPS, """),
]

FORKED = """import torch, torchvision, types, evaluate, sample, train
torchvision.datasets.KMNIST = lambda root, train, download: types.SimpleNamespace(
    data=torch.arange(40 * 784).view(40, 28, 28).byte(), targets=[0] * 40, classes=['a'])
def script(module, words):
    module.main(module.parse_args([*words.split(), '--device', 'cpu', '--no-bf16']))
script(train, '--dataset kmnist --no-skip --steps 1 --out_dir pfgm')
script(train, '--dataset ramps --method cosine --steps 2 --log_every 1')
script(sample, '--solver euler_log --nfe 5 --n 4 --out images')
script(evaluate, '--solver euler_log --nfe 5 --n 4 --brightness')
"""


def test_readme_fork_it__works_as_it_is_written(here):
    """What the README says to edit, edited in a copy of the scripts, works together."""
    section = README.partition('## Fork it')[2].partition('\n## ')[0]
    places = {name: (file, int(line) - 1) for name, file, line in re.findall(LINK, section)}
    for path in HERE.glob('*.py'):
        shutil.copy(path, '.')
    shutil.copytree(HERE / 'support', 'support',
                    ignore=shutil.ignore_patterns('tests', '__pycache__'))

    from_below = sorted(FORK, key=lambda edit: -places[edit[0]][1])  # so that lines above stay
    for name, pattern, new in from_below:
        file, line = places[name]
        text = Path(file).read_text().splitlines(keepends=True)
        tail, count = re.subn(pattern, new, ''.join(text[line:]), count=1, flags=re.S | re.M)
        assert count == 1, name
        Path(file).write_text(''.join(text[:line]) + tail)

    ran = subprocess.run([sys.executable, '-c', FORKED], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    saved = loaded('out')
    assert saved['net'].keys() == {'conv.weight', 'conv.bias'}
    assert saved['args']['loss'] == 'mean'
    close(saved['args']['z_max'], math.tan(0.99 * math.pi / 2), rtol=1e-12)
    # The network begins as 0. Of |target|^2 half is left, and of an error without weight nothing.
    close(losses('pfgm')[0], 784 / 2, rtol=1e-3)
    assert losses('out') == [0.0, 0.0]
    row, = rows_of('out/results.jsonl')
    images = [np.array(Image.open(path)) for path in Path('images').glob('*.png')]
    assert row['solver'] == 'euler_log' and row['nfe'] == 5 and len(images) == 4
    close(row['brightness'], np.mean(images), rtol=1e-12)
