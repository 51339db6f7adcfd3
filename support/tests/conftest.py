"""Fixtures of the tests of support/, and which tests are left out unless asked for."""
import functools
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from support import sets, students
from support.tests.common import TINY, TINY_PP, script
from support.tests.made import pictures


def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: takes minutes; run it with pytest -m slow -s')
    config.addinivalue_line('markers', 'cuda: wants a GPU; run it with pytest -m cuda')


@pytest.fixture(autouse=True)
def only_where_they_can_run(request):
    if request.node.get_closest_marker('slow') and 'slow' not in request.config.option.markexpr:
        pytest.skip('slow: run it with pytest -m slow -s')
    if request.node.get_closest_marker('cuda') and not torch.cuda.is_available():
        pytest.skip('no GPU here: run it where there is one, by pytest -m cuda')


@pytest.fixture(scope='session', autouse=True)
def quick_teachers():
    """Teachers make pairs, and show how straight their lines are, by a few calls of the network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(students, 'PAIR_NFE', 4)
        patch.setattr(students, 'STRAIGHTNESS_CALLS', 4)
        yield


@pytest.fixture(scope='session', autouse=True)
def impatient_loaders():
    """A DataLoader waits for a reader that does not end for 0.3 s, not for 5."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.data._utils, 'MP_STATUS_CHECK_INTERVAL', 0.3)
        yield


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
    """A run of 10 steps on glyphs."""
    out = tmp_path_factory.mktemp('run') / 'out'
    script(['train.py', *TINY, '--steps', 10, '--dropout', 0.1, '--out_dir', out])
    return out


@pytest.fixture(scope='session')
def straight(tmp_path_factory):
    """A run of 6 steps of rectified flow with classes."""
    out = tmp_path_factory.mktemp('run') / 'straight'
    script(['train.py', *TINY_PP, *'--method rf --classes --steps 6 --lr 1e-2'.split(),
            '--out_dir', out])
    return out


@pytest.fixture
def few_glyphs(monkeypatch):
    """The glyphs are 200 images."""
    monkeypatch.setattr(sets, 'glyphs', functools.partial(sets.glyphs, 200))


@pytest.fixture
def folder(tmp_path):
    """A folder of ten images, 0.png to 9.png."""
    return pictures(tmp_path / 'set', *(f'{k}.png' for k in range(10)))


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of the run, which may be changed."""
    return shutil.copytree(trained, tmp_path / 'copied')


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The test runs in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def two_sets(here, tmp_path):
    """The test runs where there are A and B, with the same names and classes, and other colours."""
    for name, colour in (('A', (200, 60, 30)), ('B', (30, 60, 200))):
        for c in ('cat', 'dog'):
            (tmp_path / name / c).mkdir(parents=True)
            for k in range(10):
                x = np.zeros((16, 16, 3), np.uint8)
                x[:, :8 if c == 'cat' else 16] = colour
                x[k] = 255
                Image.fromarray(x).save(tmp_path / name / c / f'{k}.png')


@pytest.fixture
def cuda_run():
    """A function that runs train.py with these flags on the GPU, with the same bits each time."""
    flags = [word for word in TINY if word not in ('--device', 'cpu', '--no-bf16')]

    def run_train(*more):
        script(['train.py', *flags, '--device', 'cuda', '--deterministic', *more])
    return run_train
