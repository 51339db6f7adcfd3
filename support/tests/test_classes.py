"""Classes: the words of --classes, and of which classes samples are."""
import re

import pytest
import torch

from support.classes import class_numbers, classes_to_compare, other_shares
from support.cli import BadInput
from support.flow import load_flow
from support.sets import load_images
from support.tests.common import refuses, rows_of, said, trained_on_folder


@pytest.mark.parametrize('words, names, labels', [
    ('cat, dog', 'cat|dog', [0, 1]), ('Cat,DOG', 'cat|dog', [0, 1]), ('1, 0', 'cat|dog', [1, 0]),
    ('cat, tabby,dog', 'cat, tabby|dog', [0, 1]), ('dog,Cat,Tabby', 'cat, tabby|dog', [1, 0]),
    ('cat,tabby', 'cat|cat, tabby|tabby', [1]), ('cat,dog', 'Cat|cat|dog', [1, 2]),
    ('3', '5|3', [1]), (' none', 'cat|none', [1])])
def test_class_numbers__names_may_have_spaces_capitals_and_commas(words, names, labels):
    names = names.split('|')
    assert class_numbers(words.split(','), len(names), names) == labels


@pytest.mark.parametrize('words, names, accepted', [
    ('CAT', 'Cat|cat', 'Cat, cat'), ('cat', 'cat, tabby|dog', '"cat, tabby", dog'),
    ('cat, ,dog', 'cat|dog', 'cat, dog'), ('2', 'cat|dog', 'cat, dog'), ('7', '5|3', '5, 3')])
def test_class_numbers__refuses_what_is_no_name_or_two(words, names, accepted):
    names = names.split('|')
    with pytest.raises(BadInput) as refusal:
        class_numbers(words.split(','), len(names), names)
    assert str(refusal.value) == f'--classes {words}: the network knows {accepted}'


def test_class_numbers__says_what_none_is_not(capsys):
    assert class_numbers([], 2, ['cat', 'none']) == []
    assert '--classes none: no labels; for the class called none give 1' in capsys.readouterr().out


def test_classes_to_compare__are_those_of_the_samples(two_sets):
    measure = ['evaluate.py', *'--swd --device cpu --results r.jsonl'.split()]

    def swd_of(*flags):
        out = said([*measure, *flags])
        return rows_of('r.jsonl')[-1]['swd'], re.search(r'swd.*\((.*)\)', out)[1]

    cats = ['--samples', 'A/cat', '--dataset', 'A']
    swd, note = swd_of(*cats)
    assert swd > 0.1 and 'of A of all 2 classes; --classes says' in note
    for classes in ('cat', '0'):
        swd, note = swd_of(*cats, '--classes', classes)
        assert swd == 0 and note == '10 images against 10 of A of class cat'
    assert swd_of(*cats, '--classes', 'dog')[0] > 0.1
    assert swd_of('--samples', 'A', '--dataset', 'A') == (
        0, '20 images against 20 of A, as many of each class')  # they say their own
    refuses([*measure, *cats, '--classes', 'bird'], '--classes bird: --dataset A has cat, dog')

    trained_on_folder('A', 'out', '--classes')
    measure += ['--nfe', 1, '--ckpt', 'out']
    for n in (4, 50):
        _, note = swd_of('--n', n, '--classes', 'dog')
        assert note == f'{min(n, 10)} images against {min(n, 10)} of A of class dog'
    assert rows_of('r.jsonl')[-1]['reference_classes'] == 'of class dog'
    _, note = swd_of('--n', 6)
    assert note == '6 images against 6 of A, as many of each class'
    assert classes_to_compare(['cat'], {}, load_images('A/cat'), None) == (
        None, ' of all its classes, where the samples are of cat')
    flow = load_flow('out/ckpt.pt', torch.device('cpu'), classes=['cat'])
    classes, words = classes_to_compare(None, dict(out=flow), None, None)
    assert classes is None and words == ' of all its classes, where the samples are of class cat'


def test_other_shares__are_said_of_what_is_compared_with_all(two_sets):
    images = load_images('A')
    assert other_shares(torch.tensor([0, 1, 0, 1]), images) == ''
    assert other_shares(None, images) == ''
    assert 'other shares' in other_shares(torch.tensor([0, 0, 0, 1]), images)
