"""What the tests share: tiny runs of the scripts, and how they are compared."""
import contextlib
import functools
import importlib
import io
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

# Networks this small are no faster on two threads, and far slower where something else runs too.
os.environ['OMP_NUM_THREADS'] = '1'  # the scripts that tests start inherit it

import numpy as np
import pytest
import torch

import pfgm
from support import sets
from support.cli import BadInput
from support.flow import Flow
from support.processes import run

torch.set_num_threads(1)
HERE = Path(__file__).parents[2]  # the folder of the scripts
SHARED = HERE.parent / 'shared'   # reference numbers that not everyone has
F64 = torch.float64
MODULES = ('checkpoint', 'bench', 'figures')  # run by python -m support.<name>
TINY = '--nf 8 --ch_mult 1 --attn 8 --batch_size 8 --field_batch 64 --log_every 1 --warmup 3 ' \
       '--sample_every 0 --device cpu --no-bf16 --lr 2e-3 --decay 0 --no-classes'.split()
TINY_PP = TINY[:TINY.index('--field_batch')] + TINY[TINY.index('--field_batch') + 2:]
sets.glyphs = functools.lru_cache(sets.glyphs)  # drawn once for all tests


# ---------------------------------------------------------------- numbers

def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def close(a, b, rtol=0.0, atol=0.0):
    a, b = (torch.as_tensor(v, dtype=F64) for v in (a, b))
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def joined(field):
    """(v_x, v_z) as one tensor (B, N + 1)."""
    v_x, v_z = field
    return torch.cat([v_x.flatten(1), v_z[:, None]], 1)


def network(forward):
    """A module that computes `forward`."""
    net = torch.nn.Module()
    net.forward = forward
    return net


class Linear(torch.nn.Module):
    """A stand-in for a U-Net: F = x sin(c_noise) + class."""

    def forward(self, x, z, labels=None):
        shift = 0 if labels is None else labels.to(x).view(-1, 1, 1, 1)
        return x * z.sin().view(-1, 1, 1, 1) + shift, z


def images_net(N, h=2.0):
    """The field of the planar density c h / (|x|^2 + h^2)^((N+1)/2): a point charge at (0, -h)."""
    def net(x, z):
        scale = -math.sqrt(N) / (torch.hypot(x.flatten(1).norm(dim=1), z + h) + 5)
        return x * pfgm.column(scale, x), (z + h) * scale
    return net


def known_flow():
    """Lines of the method of images. They are straight, so every probe gives the divergence itself.
    """
    return Flow(network(images_net(16, 2.0)), (1, 4, 4), D=1.0, z_min=1e-3, z_max=50.0,
                upper_norm=None, z_exp=0.0, gamma=5.0)


# ---------------------------------------------------------------- scripts

def script(command):
    """Run a command line in this process; a list of words, the first a script."""
    name = command[0].removesuffix('.py')
    module = importlib.import_module(f'support.{name}' if name in MODULES else name)
    run(module.main, module.parse_args([str(word) for word in command[1:]]))


def said(command):
    """What the command prints on stdout."""
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        script(command)
    return stdout.getvalue()


def refuses(command, message):
    """The command ends with exit code 2 and one line on stderr that matches `message`."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr, pytest.raises(SystemExit) as stop:
        script(command)
    text = stderr.getvalue()
    assert stop.value.code == 2 and text.count('\n') == 1, text
    assert re.search(message, text), text


def load_refuses(message, *args, **options):
    """load_images() ends in one line that begins with a flag and matches `message`."""
    with pytest.raises(BadInput, match=rf'^(?=--).*{message}.*\Z'):
        sets.load_images(*args, **options)


def sampled(out, *flags):
    """The images (n, H, W, C) that sample.py makes as the .npz `out`."""
    script(['sample.py', '--device', 'cpu', '--out', out, *flags])
    return np.load(out)['arr_0'].astype(int)


def trained_on_folder(name, out, *flags):
    """A run of one step of PFGM++ on a folder of images."""
    script(['train.py', *TINY_PP, '--D', 128, '--steps', 1, '--dataset', name, '--out_dir', out,
            *flags])


def torchrun(command, processes, **flags):
    """A torchrun of train.py, with its output as text."""
    launch = ['-m', 'torch.distributed.run', f'--nproc_per_node={processes}',
              *(f'--{key}={value}' for key, value in flags.items())]
    return subprocess.Popen([sys.executable, *launch, HERE / 'train.py', *map(str, command)],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


class Forked(multiprocessing.get_context('fork').Process):
    """train.py in a process that begins as a copy of this one, so that nothing is imported again.

    environment: variables that it has beside those of this process."""

    def __init__(self, command, **environment):
        super().__init__()
        self.command = command
        self.environment = environment
        reading, self.writing = os.pipe()
        self.stdout = open(reading)  # what it prints
        self.start()
        os.close(self.writing)

    def run(self):
        os.environ.update(self.environment)
        os.dup2(self.writing, 1)
        sys.stdout = open(1, 'w', buffering=1, closefd=False)
        script(['train.py', *self.command])

    def wait(self):
        """Its exit code, when it has ended; as of a subprocess."""
        self.join()
        return self.exitcode


def until(process, text):
    """Read what the process prints until a line with this text."""
    assert any(text in line for line in process.stdout), (
        f'ended with {process.wait()} before {text!r}')


def spied(owner, name):
    """A context in which calls of owner.name are recorded, as of a mock."""
    return patch.object(owner, name, autospec=True, side_effect=getattr(owner, name))


# ---------------------------------------------------------------- what they wrote

def loaded(folder):
    """The checkpoint of a run."""
    return torch.load(Path(folder) / 'ckpt.pt', weights_only=True)


def rows_of(file):
    """The dicts of a log.jsonl or results.jsonl."""
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def losses(folder):
    return [row['loss'] for row in rows_of(Path(folder) / 'log.jsonl')]


def same(a, b):
    """Whether two state dicts hold the same tensors."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def same_run(a, b):
    """Whether two folders hold the same weights, and the same loss at every step."""
    saved, other = loaded(a), loaded(b)
    return losses(a) == losses(b) and all(same(saved[key], other[key]) for key in ('net', 'ema'))
