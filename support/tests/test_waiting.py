"""No wait is silent, and Ctrl-C ends a script in one line."""
import os
import re
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from support import waiting
from support.cli import watch
from support.flow import following
from support.tests.common import HERE, until
from support.waiting import Speaker, doing


class Clock:
    """A clock that stands still unless a test moves it."""
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr('time.monotonic', clock)
    monkeypatch.setattr(waiting, 'SPEAKER', Speaker())
    return clock


def test_watch__says_after_some_seconds_and_at_the_end_how_far_it_is(clock, capsys):
    def batches():
        for _ in range(5):
            clock.now += 2
            yield range(10)

    for rank in (0, 1):
        assert list(watch(batches(), 50, lambda: 'euler', rank)) == [range(10) for _ in range(5)]
    assert list(watch([], 0, 'nothing', 0)) == []
    assert capsys.readouterr().out.splitlines() == [
        'euler: 20/50  5.0 img/s  0:06 left, 4 s so far',
        'euler: 40/50  5.0 img/s  0:02 left, 8 s so far', 'euler: 50/50  5.0 img/s  0:00 left']


def test_speaker__speaks_of_the_work_in_hand_where_the_script_is_silent(clock, capsys):
    speaker = waiting.SPEAKER
    with doing('outer'), doing(lambda: 'inner'):
        speaker.speak()
        clock.now += 2.6
        speaker.speak()
        speaker.speak()  # one line each time
        clock.now += 2
        speaker.heard()  # as whatever is printed
        clock.now += 2
        speaker.speak()
        clock.now += 200
        speaker.speak()
        clock.now += 3   # after minutes it says less
        speaker.speak()
    with doing('next'):
        clock.now += 2.6
        speaker.speak()
    clock.now += 99
    speaker.speak()
    assert capsys.readouterr().out.splitlines() == [
        'outer, inner, 3 s so far', 'outer, inner, 207 s so far', 'next, 3 s so far']


def test_speaker__is_the_first_process(clock, capsys, monkeypatch):
    monkeypatch.setenv('RANK', '1')
    with doing('work'):
        clock.now += 9
        waiting.SPEAKER.speak()
    assert capsys.readouterr().out == ''


def test_following__says_which_z_is_reached_and_by_which_image_last(clock, capsys):
    seen = []
    with following(40.0, 0.001, lambda z, x: seen.append(z.tolist())) as noted:
        clock.now += 3
        waiting.SPEAKER.speak()
        noted(torch.tensor([1.0, 30.0, 2.0]), None)
        clock.now += 3
        waiting.SPEAKER.speak()
    with following(0.001, 40.0) as noted:
        noted(torch.tensor([1.0, 30.0, 2.0]), None)
        clock.now += 3
        waiting.SPEAKER.speak()
    assert seen == [[1, 30, 2]]
    assert capsys.readouterr().out.splitlines() == [
        'z from 40 to 0.001, 3 s so far',
        'z from 40 to 0.001: 2 reached, 30 by the slowest, image 2 of 3, 6 s so far',
        'z from 0.001 to 40: 2 reached, 1 by the slowest, image 1 of 3, 3 s so far']


SCRIPT = """
    import sys, time
    from support import waiting
    waiting.PATIENCE = 0.1
    waiting.begin(__name__)
    if 'imports' in sys.argv:
        time.sleep(9)
    try:
        with waiting.working(), waiting.doing('sleeping'):
            time.sleep(9)
    except KeyboardInterrupt:
        print('cleaning up', flush=True)
        time.sleep(9)  # until the second Ctrl-C
"""


@pytest.mark.parametrize('word, line', [
    ('imports', 'loading PyTorch, 0 s so far'), ('work', 'sleeping, 0 s so far')])
def test_begin__ctrl_c_ends_imports_in_one_line_and_work_by_an_exception(tmp_path, word, line):
    script = tmp_path / 'script.py'
    script.write_text(textwrap.dedent(SCRIPT))
    process = subprocess.Popen([sys.executable, script, word], text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env={**os.environ, 'PYTHONPATH': str(HERE)})
    assert process.stdout.readline() == f'{line}\n'
    process.send_signal(signal.SIGINT)
    if word == 'work':
        until(process, 'cleaning up')
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and err == 'interrupted\n'


@pytest.mark.parametrize('name', ['train', 'sample', 'evaluate', 'support.bench',
                                  'support.checkpoint', 'support.figures'])
def test_begin__comes_before_the_slow_imports_of_each_script(name):
    lines = (HERE / f'{name.replace(".", "/")}.py').read_text().splitlines()
    begins = next(k for k, line in enumerate(lines) if line.startswith('waiting.begin(__name__)'))
    slow = [k for k, line in enumerate(lines)
            if re.match('(import|from) (torch|numpy|scipy|PIL|pfgm|unet|support[.])', line)]
    assert begins < min(slow)
