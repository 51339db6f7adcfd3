"""What samples are compared with: a data set, or statistics of one. Read it if you want to know
which images a number of evaluate.py is measured against, and what is checked before.
"""
from typing import NamedTuple, Optional

import numpy as np
import torch

from support.classes import classes_to_compare, other_shares, same_labels
from support.cli import BadInput, say
from support.images import Images, read_chosen
from support.inception import Measured, collect, load_inception, read_stats, write_stats
from support.judge import Judge, judge_of
from support.measures import METRICS, OF_BOTH_FEATURES, check_counts, needs, of_samples
from support.sets import SETS, load_images


class Subjects(NamedTuple):
    """What is measured: flows that make samples, or images that are given. It is neither where only
    the statistics of a reference are asked for."""
    flows: dict                # {name: flow.Flow}
    images: Optional[Images]   # those of --samples
    charges: Optional[Images]  # those of --exact, which are the training images too
    n: int                     # samples, of each flow
    n_in_words: str            # how messages call that number

    def shape(self):
        """(C, S, S) of a sample, or None."""
        if self.images is not None:
            return (self.images.channels, self.images.image_size, self.images.image_size)
        for flow in self.flows.values():
            return flow.shape
        return None


class ReferenceFlags(NamedTuple):
    """What the user says of the reference: each field is the flag of that name."""
    ref: Optional[str]
    dataset: Optional[str]
    data_dir: str
    image_size: Optional[int]
    classes: Optional[list]    # words
    ckpt: str                  # the first one of --compare
    inception: Optional[str]
    resize: str
    save_stats: Optional[str]

    def convention(self):
        """In words, how features are made. Statistics that were made otherwise are refused."""
        version = 'random' if self.inception == 'random' else '2015-12-05'
        return f'{self.resize} resize, {version} Inception'


class Compared(NamedTuple):
    """The data set that samples are compared with. All is None where there is none."""
    whole: Optional[Images]   # the training images
    train: Optional[Images]   # those of them that are of the classes of the samples
    test: Optional[Images]    # the same of its test split, where it has one
    labels: Optional[list]    # the labels of these classes; None for all
    classes: str              # in words, which classes these are; '' for all


class Reference(NamedTuple):
    """What samples are compared with."""
    name: str
    whole: Optional[Images]              # as in Compared, and so the next three; None: the
    train: Optional[Images]              # statistics of --ref are all there is
    test: Optional[Images]
    classes: str
    statistics: Optional[Measured]       # of --ref, or of one pass over train
    inception: Optional[torch.nn.Module]
    last_layer: Optional[torch.Tensor]   # of Inception, (1008, 2048)
    resize: str                          # of --resize
    judge: Optional[Judge]
    weights: Optional[str] = None        # of --inception

    def against(self, samples):
        """In words: how many samples are compared with this, and whether both are alike."""
        known = self.statistics is not None and self.statistics.n
        line = f'{samples.n} images against {known or "the"} of {self.name}{self.classes}'
        return line + other_shares(samples.labels, self.train)

    def facts(self):
        """What a line of results says of it, so that two of one name can be told apart."""
        facts = dict(reference=self.name, reference_classes=self.classes.strip() or None)
        if self.whole is not None:
            facts['reference_pixels'] = f'{self.whole.identity[-1]:016x}'
        return facts

    def facts_for_samples(self):
        """And what it says of a comparison of samples with it."""
        n_ref = self.statistics.n if self.statistics is not None else None
        facts = dict(n_ref=n_ref, **self.facts())
        if self.inception is not None:
            facts.update(resize=self.resize, inception=self.weights)
        return facts


def load_reference(asked, wanted, subjects, flags, machine):
    """The Reference for the samples of some Subjects, and the file of --save_stats.

    asked: names of metrics. wanted: these, and 'fid' for --save_stats. Raises BadInput where there
    are too few images, before anything is trained or made."""
    statistics = statistics_of_file(flags)
    images = subjects.charges
    if flags.ref or images is None:
        images = reference_images(wanted, statistics, subjects, flags)
    compared = images_to_compare(images, wanted, statistics, subjects, flags)
    check_enough_images(asked, wanted, statistics, compared, subjects, machine.world)

    judge = None
    if 'judge' in wanted and machine.rank == 0:  # before any image is made
        judge = judge_of(compared.whole, compared.test or compared.train, flags.data_dir,
                         machine.device)
    inception = last_layer = None
    if needs(wanted) & {'features', 'statistics'}:
        inception, last_layer = load_inception(flags.inception, machine.device, machine.rank)
    statistics = measured_statistics(wanted, statistics, compared.train, inception, flags.resize,
                                     machine)
    if flags.save_stats and machine.rank == 0:
        write_stats(flags.save_stats, statistics, flags.convention())
        if compared.labels is not None:
            print(f'{flags.save_stats}: {statistics.n} images{compared.classes}')
    name = flags.ref if images is None else images.name
    return Reference(name, compared.whole, compared.train, compared.test, compared.classes,
                     statistics, inception, last_layer, flags.resize, judge, flags.inception)


# ---------------------------------------------------------------- statistics

def statistics_of_file(flags):
    """The Measured of --ref where it is a file of statistics, else None."""
    if not flags.ref or not flags.ref.lower().endswith('.npz'):
        return None
    try:
        return read_stats(flags.ref, flags.convention())
    except ValueError as error:
        raise BadInput(f'--ref {error}') from error


def measured_statistics(wanted, statistics, train, inception, resize, machine):
    """The Measured of the training images where the metrics `wanted` need more than the statistics
    of --ref, or None, tell; else these. What --ref tells is not measured again."""
    needs_features = bool(wanted & OF_BOTH_FEATURES)
    must_measure_reference = 'statistics' in needs(wanted)
    if statistics is not None:
        must_measure_reference = needs_features and statistics.features is None
    if not must_measure_reference:
        return statistics
    keep = {'features'} if needs_features else set()
    batches = read_chosen(train, len(train), machine, train.name)
    measured = collect(batches, len(train), inception, resize, keep, machine.device)
    if statistics is not None:
        measured = measured._replace(mu=statistics.mu, sigma=statistics.sigma)
    return measured


# ---------------------------------------------------------------- images

def reference_images(wanted, statistics, subjects, flags):
    """The data set that samples are compared with, or None where none is needed: that of --ref or
    --dataset, else the one that the networks were trained on."""
    if flags.ref and statistics is not None:
        return images_beside_statistics(wanted, statistics, flags)
    if flags.ref:  # at its own size, as pytorch-fid reads it
        return load_images(flags.ref, flags.data_dir, flags.image_size, flag='--ref')
    if not needs(wanted) & {'pixels', 'statistics'}:
        return None
    name = flags.dataset
    flag = '--dataset'
    if not name:
        check_same_data(subjects.flows)
        name = trained_on(next(iter(subjects.flows.values())))
        flag = '--dataset of --ckpt'
    if not name:
        raise BadInput(f'--ckpt {flags.ckpt}: does not say what it was trained on; give --dataset')
    channels, size, _ = subjects.shape() or (None, None, None)
    images = load_images(name, flags.data_dir, size, channels, flag=flag, size_is_fixed=True)
    check_data(subjects.flows, images, given=bool(flags.dataset))
    return images


def images_beside_statistics(wanted, statistics, flags):
    """The images in the file of statistics that --ref names, or None where no metric needs them:
    --fid and --is do not, nor do --kid and --prc where the file holds features."""
    served = {'fid', 'is'}
    if statistics.features is not None:
        served |= OF_BOTH_FEATURES
    others = sorted(wanted - served)
    if not others and not flags.save_stats:
        return None
    if flags.save_stats or 'arr_0' not in np.load(flags.ref).files:
        served_flags = ' '.join(f'--{name}' for name in sorted(served))
        raise BadInput(f'--ref {flags.ref}: statistics, which do for {served_flags} only; give a '
                       'folder, .zip or .npz of images')
    images = load_images(flags.ref, flags.data_dir, flags.image_size, flag='--ref')
    say(f'--ref {flags.ref}: its mu and sigma for --fid, its {len(images)} images for '
        + ' '.join(f'--{name}' for name in others))
    return images


def images_to_compare(images, wanted, statistics, subjects, flags):
    """The Compared: those of the Images, or None, that are of the classes of the samples."""
    if images is None and statistics is None:
        return Compared(None, None, None, None, '')
    # Statistics are of all their images, and so is then what stands beside them.
    can_be_part = images if statistics is None else None
    labels, in_words = classes_to_compare(flags.classes, subjects.flows, subjects.images,
                                          can_be_part)
    train = images
    if labels is not None:
        train = images.of_labels(labels)
    test = None
    if 'pixels' in needs(wanted):
        channels, size, _ = subjects.shape()
        if (train.channels, train.image_size) != (channels, size):
            raise BadInput(f'--ref {flags.ref}: {train.image_size} pixels a side, {train.channels} '
                           f'channels; samples: {size}, {channels}; give --dataset {flags.ref}')
        test = load_images(train.name, flags.data_dir, size, channels, 'test', train.flag,
                           size_is_fixed=True)
        if not test.apart:
            test = None
        elif labels is not None:
            test = test_of_classes(test, labels, images)
    return Compared(images, train, test, labels, in_words)


def test_of_classes(test, labels, whole):
    """The test images of the classes that are these labels, a list, of the training images `whole`;
    None where the test images do not say theirs."""
    labels_of_test = same_labels(torch.tensor(labels), whole.classes, test)
    if labels_of_test is None:
        say(f'{test.given}: its test images are not compared: of which classes they are is unknown')
        return None
    return test.of_labels(labels_of_test.tolist())


# ---------------------------------------------------------------- checks

def trained_on(flow):
    """The name of the data set that a network was trained on, or None where nothing says it."""
    if not flow.dataset and flow.shape[1] == 32:
        return 'cifar10'  # files of EDM and PFGM++ do not say
    return flow.dataset


def check_same_data(flows):
    """BadInput unless all networks of --compare were trained on the same images, wherever these
    are: in one table all are measured against the same."""
    (first_name, first), *others = flows.items()
    for name, flow in others:
        same = trained_on(flow) == trained_on(first)
        if flow.data and first.data and flow.dataset not in SETS:
            same = flow.data == first.data
        if not same:
            raise BadInput(f'--compare: {name} was trained on {trained_on(flow)}, {first_name} on '
                           f'other images, {trained_on(first)}; say by --dataset or --ref what '
                           'all are compared with')


def check_data(flows, images, given):
    """Say where the images are not those that a network was trained on; BadInput where they were
    found by the name that its checkpoint has for them. given: whether the user named them."""
    for name, flow in flows.items():
        difference = images.difference(flow.data, flow.shape, flow.class_count > 0,
                                       flow.class_names)
        if not difference:
            continue
        if given or images.is_known_set:
            say(f'{images.given}: {name} was trained on others ({difference})')
        else:
            raise BadInput(f'{images.given}: not the images that {name} was trained on '
                           f'({difference}); if they are meant, give --dataset {images.name}')


def check_enough_images(asked, wanted, statistics, compared, subjects, world):
    """BadInput where there are fewer samples, or images of the reference, than the metrics need, or
    than there are processes. It comes before the judge is trained, or Inception loaded."""
    n = subjects.n
    if asked:
        check_counts(of_samples(wanted), subjects.n_in_words, n)
    n_reference = None if compared.train is None else len(compared.train)
    if statistics is not None:
        n_reference = statistics.n
    if n_reference is not None:
        counted = [name for name in of_samples(wanted) if 'statistics' in METRICS[name].needs]
        check_counts(counted, f'the reference: {n_reference} images{compared.classes}', n_reference)
    if 'judge' in wanted:
        real = compared.test or compared.train
        check_counts(['judge'], f'{real.given}: {len(real)} images{compared.classes}', len(real))
    sets = [images for images in (compared.train, compared.test) if images is not None]
    fewest = min([n, *map(len, sets)])
    if fewest < world:
        raise BadInput(f'{fewest} images: fewer than the {world} processes; give more by --n')
