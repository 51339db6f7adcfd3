"""How flags left open are filled, and how they are checked against a checkpoint."""
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from support import options
from support.cli import BadInput
from support.run import Origin
from support.sets import load_images
from support.tests.common import TINY, TINY_PP, loaded, refuses, said, script
from support.tests.made import classes_of, pictures


class FakeImages:
    """A data set that says of itself what options asks, all black."""
    name = 'fake'
    labels = None
    pixels = None
    flip = True

    def __init__(self, image_size, count=50000, channels=3):
        self.image_size = image_size
        self.count = count
        self.channels = channels

    def __len__(self):
        return self.count

    def __getitem__(self, indices):
        return torch.zeros(len(indices), self.channels, *[self.image_size] * 2, dtype=torch.uint8)


def filled(images, *words, preset='cifar10', world=1):
    """The flags of a new run on these images, with the values of a preset."""
    flags = vars(train.parse_args([*words, '--preset', preset]))
    given = flags['given']
    flags = options.fill(flags, train.PRESETS[preset], False, images, Origin())
    flags = options.without_unused(flags, given, images, Origin())
    options.check_batches(flags, given, world)
    return flags


# ---------------------------------------------------------------- what was left open

@pytest.mark.parametrize('preset, size, constants', [
    ('cifar10', 32, (291, 40, 3000, 5)),
    ('cifar10_deep', 32, (291, 40, 3000, 5)),
    ('celeba64', 64, (291, 60, 6000, 1)),
    ('lsun_bedroom', 256, (356, 100, 30000, 0.1))])
def test_fill__gives_a_published_preset_its_published_flow(preset, size, constants):
    flags = filled(FakeImages(size), preset=preset)
    assert (flags['M'], flags['z_max'], flags['upper_norm'], flags['z_exp']) == constants
    others = dict(method='pfgm', D=1.0, sigma=0.01, tau=0.03, gamma=5.0, z_min=1e-3, flip=True,
                  field_batch=train.PRESETS[preset]['field_batch'], classes=0)
    assert {key: flags[key] for key in others} == others


@pytest.mark.parametrize('preset', ['cifar10_pp', 'cifar10_ncsnpp'])
def test_fill__gives_pfgmpp_the_noise_levels_of_edm_and_no_charges(preset):
    flags = filled(FakeImages(32), '--D', '2048', preset=preset)
    assert flags['method'] == 'pfgmpp' and flags['D'] == 2048 and flags['sigma_data'] == 0.5
    assert flags['field_batch'] == 1 and flags['M'] is None and flags['upper_norm'] is None
    assert flags['z_min'] == pytest.approx(0.002 * 2048 ** 0.5)
    assert flags['z_max'] == pytest.approx(80 * 2048 ** 0.5)
    assert flags['data_norm'] == pytest.approx(3072 ** 0.5)  # of images that are all black


def test_fill__leaves_no_flag_open_but_those_that_say_no():
    flags = filled(FakeImages(32))
    may_be_none = {'source', 'reflow', 'distill', 'init_from', 'bf16', 'compile'}  # by the device
    may_be_none |= {'sigma_data', 'data_norm', 'pairs', 'guidance'}  # of other methods
    assert {key for key, value in flags.items() if value is None} == may_be_none


def test_fill__does_not_change_the_mapping_that_it_is_given():
    flags = vars(train.parse_args(['--preset', 'cifar10']))
    before = dict(flags)
    preset = dict(train.CIFAR10)
    options.fill(flags, preset, False, FakeImages(32), Origin())
    assert flags == before and preset == train.CIFAR10


def test_fill__takes_what_was_given_before_all_else():
    flags = filled(FakeImages(32), *'--z_max 41 --M 290 --lr 1 --nf 32 --no-flip'.split())
    given = dict(z_max=41, M=290, lr=1, nf=32, flip=False)
    assert {key: flags[key] for key in given} == given


@pytest.mark.parametrize('words, method, D', [
    ('', 'pfgm', 1), ('--D 3', 'pfgmpp', 3), ('--ncsnpp', 'pfgmpp', 128),
    ('--method pfgmpp', 'pfgmpp', 128), ('--method vp', 'vp', float('inf')),
    ('--D inf', 'pfgmpp', float('inf')), ('--consistency', 'pfgmpp', 128),
    ('--consistency --D 1', 'pfgmpp', 1), ('--consistency --method rf', 'rf', float('inf')),
    ('--source x', 'rf', float('inf'))])
def test_fill__infers_the_method_and_D(words, method, D):
    flags = filled(FakeImages(32), *words.split())
    assert (flags['method'], flags['D']) == (method, D)


def test_fill__takes_all_images_as_charges_where_field_batch_would_not_be_fewer():
    assert filled(FakeImages(32, 4097))['field_batch'] == 4096
    small = FakeImages(32, 4096)
    assert filled(small)['field_batch'] == 4096  # decoded at each access, so not all are at hand
    small.pixels = torch.zeros(1)
    assert filled(small)['field_batch'] == 'all'


@pytest.mark.parametrize('words, message', [
    ('--method vp --D 3', '--D 3: belongs to --method pfgmpp, and not vp; leave it out'),
    ('--method vp --source x', '--source x: belongs to --method rf, and not vp; leave it out'),
    ('--z_min 41', '--z_min 41: must be below z_max, 40'),
    ('--z_max 1e-4', '--z_max 1e-4: must be above z_min, 0.001'),
    ('--accum 3', '--accum 3: the 128 points of a step must be a multiple of 2 processes x 3 pa'),
    ('--compile reduce-overhead --accum 2', '--compile reduce-overhead: its CUDA graphs write each'),
    ('--batch_size 3', '--batch_size 3: the 3 points of a step must be a multiple of 2 processes'),
    ('--field_batch 127', '--field_batch 127: the 128 points of a step are among its 127 charges'),
    ('--batch_size 8192', '--batch_size 8192: the 8192 points of a step are among its 4096 charge'),
    ('--source x --field_batch all', '--field_batch all: charges give the field of noise, and a '),
    ('--source x --field_batch 9', '--field_batch 9: charges give the field of noise, and a flow'),
    ('--reflow x --consistency', '--reflow x: --reflow, --distill and --consistency are two runs'),
    ('--reflow x --init_from y', '--init_from y: --reflow and --distill go on from their teacher'),
    ('--consistency --method pfgm', '--method pfgm: a field, and --consistency trains a denois')])
def test_fill__refuses_flags_that_contradict_one_another(words, message):
    with pytest.raises(BadInput) as error:
        filled(FakeImages(32), *words.split(), world=2)
    assert str(error.value).startswith(message)


def test_class_count__our_own_sets_are_trained_on_their_labels_others_if_asked(here):
    classes_of(Path('photos/train'), 'a', 'b', 'c')
    classes_of(Path('photos/test'), 'b', 'c')
    command = ['train.py', *TINY[:-1], '--steps', 1, '--out_dir']
    for out, flags, classes in (
            ('a', '', 10), ('b', '--no-classes', 0), ('c', '--dataset photos', 0),
            ('d', '--dataset photos --classes', 3), ('e', '--D 2 --field_batch all --classes', 10),
            ('f', '--method rf --field_batch 1 --source glyphs', 0),
            ('b', '--steps 2', 0), ('g', '--init_from b --steps 3', 0)):  # they stay as they are
        script([*command, out, *flags.split()])
        assert loaded(out)['args']['classes'] == classes, flags
    of_test = load_images('photos', 'data', None, None, split='test')
    assert {*of_test.labels.tolist()} == {1, 2}  # numbered as of all three
    refuses([*command, 'e', '--D', 5, '--steps', 9], '--D 5: the run .* has 2.0')
    refuses('sample.py --ckpt e --device cpu --classes 10'.split(), '--classes 10: .* 0 to 9')
    np.savez('a.npz', x=np.zeros((8, 8, 8), np.uint8), y=[1, 2] * 4)
    refuses([*command, 'h', '--dataset', 'a.npz', '--classes'],
            '--classes: 2 labels from 1 to 2; accepted: 0, 1.*; or give --no-classes')


def test_class_count__says_which_classes_were_found_and_are_not_used(here):
    classes_of(Path('photos'), 'dog', 'cat, tabby')
    command = ['train.py', *TINY_PP[:-1], '--D', 2, '--dataset', 'photos', '--steps', 1]
    line = '--dataset photos: 2 classes found ("cat, tabby", dog); --classes trains on them\n'
    first = 'photos: 16 images of 16 x 16 x 3'
    for out, flags, is_said in (('a', [], True), ('b', ['--no-classes'], False),
                                ('c', ['--classes'], False)):
        printed = said([*command, '--out_dir', out, *flags])
        assert (line in printed) == is_said
        in_classes = ' in 2 classes ("cat, tabby", dog)' if out == 'c' else ''
        mirrored = ', none mirrored (--flip: ' if out == 'c' else ', half of them mirrored (--no-f'
        assert f'{first}{in_classes}{mirrored}' in printed
        assert loaded(out)['args']['flip'] == (out != 'c')
    printed = said([*command, '--out_dir', 'd', '--classes', '--flip'])
    assert 'half of them mirrored' in printed and loaded('d')['args']['flip']


def test_fill__known_sets_are_mirrored_with_their_labels_too():
    images = FakeImages(32)
    images.is_known_set = True
    images.labels = torch.arange(10)
    images.class_count = lambda: 10
    assert filled(images, '--classes')['flip']
    images.is_known_set = False
    assert not filled(images, '--classes')['flip']
    assert filled(images, '--no-classes')['flip']


# ---------------------------------------------------------------- against a checkpoint

def test_check_resume__refuses_what_changes_the_run_and_says_what_may_change(trained, capsys):
    saved = loaded(trained)['args']
    for key, value in (('m_draws', 3), ('muon', False), ('D', 2.0), ('classes', 5), ('seed', 1),
                       ('ema_decay', 0.5), ('ch_mult', [2, 1]), ('field_batch', 'all')):
        assert saved[key] != value
        typed = f'--{key} as typed'
        with pytest.raises(BadInput) as error:
            options.check_resume(dict(saved, **{key: value}), saved, {key: typed})
        assert str(error.value) == (f'{typed}: the run in --out_dir {trained} has {saved[key]}; '
                                    'keep it, or give another --out_dir')
        with pytest.raises(BadInput) as error:  # left open, and filled with another value
            options.check_resume(dict(saved, **{key: value}), saved, {})
        assert str(error.value) == (
            f'--out_dir {trained}: its run has {key} {saved[key]}, not {value}; '
            f'give {options.in_words(key, saved[key])}, or another --out_dir')
    assert capsys.readouterr().out == ''
    same = dict(saved, ch_mult=(1,), device='cuda', keep=9)  # here a tuple, there a list
    options.check_resume(same, saved, {})
    assert capsys.readouterr().out == ''
    options.check_resume(dict(saved, lr=0.5, accum=2), saved, {})
    assert capsys.readouterr().out == (
        'going on with --lr 0.5 (it was 0.002), --accum 2 (it was 1)\n')
    longer = dict(saved, steps=99, decay=1.0, consistency=True)
    options.check_resume(longer, dict(longer, steps=10), {})
    assert capsys.readouterr().out == (
        '--steps 99 (it was 10): the learning rate falls to 0 there only; it rises again; '
        'the levels of --consistency lie further apart again\n')


def test_check_origin__brings_its_flow_and_takes_other_classes(tmp_path):
    two = classes_of(tmp_path / 'two', 'a', 'b')
    three = classes_of(tmp_path / 'three', 'a', 'b', 'c')
    command = ['train.py', *TINY_PP, '--steps', 3, '--out_dir']
    script([*command, tmp_path / 'o', '--dataset', two, '--D', 64, '--sigma_data', 0.4,
            '--classes'])
    again = ['--init_from', tmp_path / 'o', '--dataset']
    assert ('for 3 classes, not its 2, with a new label layer and from step 0'
            in said([*command, tmp_path / 'p', *again, three, '--classes']))
    before = loaded(tmp_path / 'o')['args']
    after = loaded(tmp_path / 'p')['args']
    assert after['classes'] == 3
    for key in ('method', 'D', 'sigma_data', 'z_max', 'z_min'):
        assert after[key] == before[key]
    out = said([*command, tmp_path / 'q', *again, two, '--classes', '--D', 2, '--steps', 4])
    assert 'its network, pfgmpp of D 2, but --D 2 (it has 64.0)\n' in out  # and nothing untyped
    for flag, value, has in (('channels', 1, '3; give --channels 3'),
                             ('image_size', 8, '16; give --image_size 16'),
                             ('method', 'vp', 'pfgmpp; give --method pfgmpp')):
        refuses([*command, tmp_path / 'x', *again, two, f'--{flag}', value],
                f'--{flag} {value}: --init_from .*ckpt.pt has {has}')


@pytest.mark.parametrize('key, value, message', [
    ('muon', False, '--no-muon: --init_from c.pt has True; give --muon'),
    ('skip', True, '--skip: --init_from c.pt has False; give --no-skip'),
    ('ch_mult', [2, 2], '--ch_mult 2 2: --init_from c.pt has [1]; give --ch_mult 1'),
    ('nf', 16, '--nf 16: --init_from c.pt has 8; give --nf 8')])
def test_check_origin__refuses_another_architecture_with_the_flag_that_mends_it(
        key, value, message, trained):
    saved = loaded(trained)
    flags = dict(saved['args'], **{key: value})
    with pytest.raises(BadInput) as error:
        options.check_origin(flags, Origin(saved, 'init_from', 'c.pt'), {})
    assert str(error.value) == message


@pytest.mark.parametrize('here, there, is_other', [
    (dict(class_names=['a', 'b']), dict(class_names=['a', 'b']), False),
    (dict(class_names=['a', 'c']), dict(class_names=['a', 'b']), True),
    (dict(class_names=None), dict(class_names=['a', 'b'], data=[8, 1, 2]), True),
    (dict(class_names=['a', 'b']), dict(class_names=None, data=[8, 1, 2]), True),
    (dict(class_names=None), dict(class_names=None, data=[8, 1, 2]), True),
    (dict(class_names=None), dict(class_names=None), False),
    (dict(class_names=['a', 'b'], classes=0), dict(class_names=['a', 'b']), True),
    (dict(classes=0), dict(classes=0, data=[8, 1, 2]), False)])
def test_has_other_classes__wants_equal_names_or_the_same_images(here, there, is_other):
    common = dict(classes=2, class_names=None, dataset='x', data=[9, 1, 2])
    assert options.has_other_classes({**common, **here}, {**common, **there}) == is_other


def test_has_other_classes__takes_as_many_of_the_authors_files_for_the_same():
    flags = dict(classes=2, class_names=['a', 'b'], dataset='x', data=[9, 1, 2])
    assert not options.has_other_classes(flags, dict(classes=2))
    assert options.has_other_classes(flags, dict(classes=3))


def test_check_origin__other_classes_without_names_get_a_new_label_layer(tmp_path):
    """As many classes as before, where one of the two sets has no names for them, or neither."""
    for name in ('lungs', 'breasts'):
        np.savez(tmp_path / f'{name}.npz', images=np.zeros((16, 16, 16), np.uint8) + len(name),
                 labels=np.arange(16) % 2 if name == 'lungs' else np.arange(16) // 8)
    pets = classes_of(tmp_path / 'pets', 'cat', 'dog')
    command = ['train.py', *TINY_PP[:-1], *'--D 2 --classes --steps 2 --out_dir'.split()]
    script([*command, tmp_path / 'o', '--dataset', tmp_path / 'lungs.npz'])
    again = ['--init_from', tmp_path / 'o', '--dataset']
    for out, other in (('a', tmp_path / 'breasts.npz'), ('b', pets)):
        assert ('for 2 classes that may be others than its 2, since names are missing, with a new '
                'label layer and from step 0') in said([*command, tmp_path / out, *again, other])
    out = said([*command, tmp_path / 'c', '--steps', 3, *again, tmp_path / 'lungs.npz'])
    assert 'label layer' not in out and 'going on from step 2' in out


# ---------------------------------------------------------------- what a checkpoint is taken for

def test_check_origin__an_average_alone_can_be_trained_on(trained, tmp_path):
    script(['checkpoint.py', trained, '--out', tmp_path / 'ema.pt'])
    command = ['train.py', *TINY, '--dropout', 0.1, '--steps', 1, '--out_dir']
    out = said([*command, tmp_path / 'a', '--init_from', tmp_path / 'ema.pt'])
    assert 'the file has no optimizer state: Muon starts afresh, at step 0' in out
    assert loaded(tmp_path / 'a')['step'] == 1
    first = loaded(trained)['ema']['conv_in.weight']
    assert (loaded(tmp_path / 'a')['net']['conv_in.weight'] - first).abs().max() < 0.01
    (tmp_path / 'b').mkdir()
    (tmp_path / 'ema.pt').rename(tmp_path / 'b' / 'ckpt.pt')
    refuses([*command, tmp_path / 'b'], '--out_dir .*b: .*ckpt.pt holds the EMA only; give another '
            '--out_dir, with --init_from .*ckpt.pt to go on from it')


def test_check_origin__does_not_miss_an_optimizer_that_was_dropped_on_purpose(trained, straight,
                                                                              tmp_path):
    consistency = ['train.py', *TINY_PP, *'--classes --consistency --steps 1'.split()]
    out = said([*consistency, '--init_from', straight, '--out_dir', tmp_path / 'a'])
    assert 'its averaged weights, from step 0' in out and 'optimizer' not in out
    labelled = ['train.py', *TINY_PP, '--classes', '--dropout', 0.1, *'--steps 1'.split()]
    out = said([*labelled, '--init_from', trained, '--out_dir', tmp_path / 'b'])
    assert 'for 10 classes, not its 0, with a new' in out and 'optimizer' not in out


def test_method_and_D__a_consistency_run_from_a_field_is_a_denoiser_of_D_1(trained, tmp_path):
    command = ['train.py', *TINY_PP, *'--dropout 0.1 --steps 1 --consistency'.split(),
               '--init_from', trained, '--out_dir']
    out = said([*command, tmp_path / 'a'])
    assert 'its network, pfgmpp of D 1' in out
    assert 'z_exp' not in out  # which nobody gave
    flags = loaded(tmp_path / 'a')['args']
    before = loaded(trained)['args']
    assert (flags['method'], flags['D'], flags['z_exp']) == ('pfgmpp', 1, 0)
    for key in ('z_min', 'z_max', 'upper_norm'):
        assert flags[key] == before[key]
    script([*command, tmp_path / 'a', '--steps', 2])  # the same command goes on
    assert loaded(tmp_path / 'a')['step'] == 2
    for more, message in (
            ('--method pfgm', '--method pfgm: .* has pfgm, which --consistency takes as pfgmpp; '
             'give --method pfgmpp'),
            ('--method vp', '--method vp: .* give --method pfgmpp')):
        refuses([*command, tmp_path / 'b', *more.split()], message)
    script([*command, tmp_path / 'b', *'--method pfgmpp --D 1'.split()])


def test_method_and_D__names_what_was_typed(trained, tmp_path):
    command = ['train.py', *TINY_PP, '--dropout', 0.1, '--init_from', trained,
               '--out_dir', tmp_path]
    refuses([*command, '--D', 2], '--D 2: belongs to --method pfgmpp, and .* has pfgm; leave')
    refuses([*command, '--source', 'glyphs'], '--source glyphs: belongs to --method rf, and .* pfg')


@pytest.mark.parametrize('flag', ['init_from', 'reflow', 'distill'])
def test_prepare__takes_the_size_and_channels_of_the_checkpoint(flag, tmp_path):
    """Of grey images whose own size is another; an array may be enlarged."""
    photos = pictures(tmp_path / 'photos', *(f'{k}.png' for k in range(8)), side=32)
    command = ['train.py', *TINY_PP, *'--dataset'.split(), photos, *'--steps 1 --out_dir'.split()]
    script([*command, tmp_path / 'o', *'--D 2 --image_size 16 --channels 1'.split()])
    pairs = [] if flag == 'init_from' else ['--pairs', 8]
    taking_over = [*command, tmp_path / 'a', *pairs, f'--{flag}', tmp_path / 'o', '--steps']
    out = said([*taking_over, 2])
    assert '8 images of 16 x 16 x 1' in out
    assert 'going on from step 2' in said([*taking_over, 3])


def test_check_resume__names_what_was_left_out_not_what_nobody_typed(tmp_path):
    command = ['train.py', *TINY_PP, *'--steps 1 --out_dir'.split(), tmp_path]
    script([*command, '--D', 64])
    refuses([*command, '--steps', 2], '^--out_dir .*: its run has method pfgmpp, not pfgm; give '
            '--method pfgmpp, or another --out_dir')
    refuses([*command[:-4], '--out_dir', tmp_path, '--D', 64, '--steps', 1],
            '^--steps 1: .*ckpt.pt has 1 already, of 1; give more --steps, or sample')
