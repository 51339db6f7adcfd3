"""Lines of results and tables."""
import pytest
import torch

from support.cli import BadInput
from support.results import print_table, record_result
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


def test_record_result__that_cannot_be_written(here):
    with pytest.raises(BadInput, match='--results no/r.jsonl: cannot be written'):
        record_result('no/r.jsonl', {}, torch.device('cpu'), seconds=1, seed=0)
