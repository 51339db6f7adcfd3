"""Lines of results and tables."""
import shlex
import subprocess
import sys

import pytest
import torch

from support.cli import BadInput
from support.results import command_line, print_table, record_result
from support.tests.common import rows_of


def test_print_table__shows_a_dash_where_a_row_has_no_value(capsys):
    print_table([dict(run='a', fid=1.23456789), dict(run='b', bpd=3.0)])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [['run', 'fid', 'bpd'], ['a', '1.2346', '-'], ['b', '-', '3']]


def test_record_result__says_how_to_get_the_numbers_again(here):
    for fid in (3.5, 4.5):
        record_result('r.jsonl', dict(fid=fid), torch.device('cpu'), 2, seconds=1.26, seed=7)
    row, other = rows_of('r.jsonl')
    assert (row['fid'], other['fid'], row['seed'], row['seconds']) == (3.5, 4.5, 7, 1.3)
    assert row['hardware'].startswith('2 x cpu, ') and row['torch'] == torch.__version__
    assert {'command', 'time', 'git'} <= row.keys()


def test_command_line__can_be_pasted_into_a_shell(monkeypatch):
    words = ['/usr/bin/python3', 'evaluate.py', '--samples', 'my images/', '--ref', "it's $1.npz"]
    monkeypatch.setattr(sys, 'orig_argv', words)
    assert shlex.split(command_line()) == ['python', *words[1:]]
    done = subprocess.run(['sh', '-c', command_line().replace('python evaluate.py', 'printf %s,')],
                          capture_output=True, text=True)
    assert done.stdout == "--samples,my images/,--ref,it's $1.npz,"
    monkeypatch.setattr(sys, 'orig_argv', ['python3', '-u', 'evaluate.py', '--fid'])
    assert command_line(8) == 'torchrun --nproc_per_node=8 -- evaluate.py --fid'


def test_record_result__that_cannot_be_written(here):
    with pytest.raises(BadInput, match='--results no/r.jsonl: cannot be written'):
        record_result('no/r.jsonl', {}, torch.device('cpu'), seconds=1, seed=0)
