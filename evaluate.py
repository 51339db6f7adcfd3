"""Measure samples of a Poisson flow, and the flow itself.

    python evaluate.py --fid                          # 50,000 images of out/ckpt.pt, its data set
    torchrun --nproc_per_node=8 -- evaluate.py --fid --is --kid --prc    # one pass on all GPUs
    python evaluate.py --fid --samples images/ --ref cifar10.npz         # without a network
    python evaluate.py --swd --neighbours             # no Inception weights needed
    python evaluate.py --bpd --repeats 5              # likelihood of the test split
    python evaluate.py --fid --sweep nfe=5,10,20,50 --solvers euler,unipc # a table, a plot
    python evaluate.py --compare out/*/ckpt.pt        # the same for several networks, and a strip
    python evaluate.py --judge --n 512                # by a classifier of the labelled training set

Every result is also a line of results.jsonl. What the numbers mean is in support/metrics.py.
"""
import dataclasses
import math
import os
import time
from typing import Callable, NamedTuple, Optional

from support import waiting

waiting.begin(__name__)  # a line where the imports below take long; Ctrl-C ends them in one line

import numpy as np
import torch
from PIL import Image

import pfgm
from support.checkpoint import in_folder
from support.cli import (BadInput, Parser, above, check_folder, check_writable, one_of, say,
                         several, watch)
from support.flow import (DIVERGED, SAMPLING_FLAGS, class_numbers, exact_flow, flow_flags,
                          following, load_flow)
from support.images import Images, read_batches, to_uint8
from support.inception import (INCEPTION, POOL, Measured, collect, load_inception, read_stats,
                               write_stats)
from support.judge import Judge, judge_of, judged, part_legible
from support.methods import VP
from support.metrics import (frechet, inception_score, kid, matched, nearest_images, pick_images,
                             precision_recall, sliced_wasserstein)
from support.pictures import check_png, grid_of, plot, strip, write_png
from support.processes import everywhere, run, setup, share_of_rank
from support.results import print_table, record_result
from support.seeds import step_seed
from support.sets import SETS, load_images
from support.solvers import SOLVERS
from support.students import straightness

BPD_TOL = 1e-5     # of --bpd, where --tol does not say
BIASED_TOL = 1e-4  # above it bits/dim come out too low
GREY_LEVEL = 1 / 128


# ---------------------------------------------------------------- flags

def parse_args(argv=None):
    p = Parser(usage='%(prog)s [--FLAG VALUE ...]', description=__doc__)
    metrics = p.add_argument_group('metrics, one or more')
    for name, metric in METRICS.items():
        metrics.add_argument(f'--{name}', action='store_true', help=metric.help)
    metrics.add_argument('--repeats', type=above(0, int), default=1,
                         help='of --bpd, each with noise and a Hutchinson probe of its own '
                         '(default: 1)')

    samples = p.add_argument_group('samples')
    samples.add_argument('--n', type=above(0, int), default=None,
                         help='images (default: all of --samples; else 50000 with Inception '
                         'metrics, 1000 without, 256 for bpd)')
    samples.add_argument('--samples', default=None,
                         help='evaluate this folder, .zip or .npz (arr_0), at --image_size if '
                         'given, and no network (default: none)')
    samples.add_argument('--sweep', type=several(above(0, int), prefix='nfe='),
                         metavar='nfe=5,10,20', help='make them with so many network calls '
                         'each (default: none; with --compare 5,10,20,50)')
    samples.add_argument('--solvers', type=several(one_of(SOLVERS)), default=None,
                         help=f'of --sweep, of {",".join(SOLVERS)} (default: unipc); rk45 is one '
                         'point, at --tol')
    samples.add_argument('--compare', nargs='+', type=in_folder, metavar='CKPT',
                         help='sweep these side by side, with a strip of samples from the same '
                         'seeds (default: --swd --bpd, nfe=5,10,20,50; bits/dim of up to 256 '
                         'images)')

    reference = p.add_argument_group('what they are compared with')
    reference.add_argument('--ref', default=None,
                           help='these images, or a .npz of mu and sigma (default: the training '
                           'split of --dataset, not mirrored)')
    reference.add_argument('--save_stats', metavar='FILE.npz',
                           help='write mu and sigma of the reference (default: nowhere)')
    reference.add_argument('--inception', default=None, metavar='FILE',
                           help=f"{INCEPTION} (default: torch hub's copy, downloaded once), or "
                           'random: a check of the plumbing')
    reference.add_argument('--resize', choices=('tf1', 'pytorch'), default='tf1',
                           help='to 299 pixels; tf1: as in the TensorFlow graph behind the FIDs '
                           'that score_sde, PFGM and EDM published; pytorch: as in pytorch-fid '
                           '(default: tf1)')
    reference.add_argument('--workers', type=above(-1, int), default=4,
                           help='processes that read a set too large for memory (default: 4)')

    output = p.add_argument_group('output')
    output.add_argument('--out', default=None,
                        help='picture of --sweep, --compare or --neighbours (default: sweep.png, '
                        'compare.png or neighbours.png beside --results)')
    output.add_argument('--results', default=None,
                        help='a line is appended to it (default: results.jsonl beside --ckpt; in '
                        'this folder with --samples or --exact)')
    flow_flags(p)
    p.set_defaults(tol=None)
    args = p.parse_args(argv)
    args.bpd_tol = args.tol or BPD_TOL
    args.tol = args.tol or 1e-4
    if args.compare:
        args.sweep = args.sweep or [5, 10, 20, 50]
        if not asked_by(args):
            args.swd = True
            args.bpd = True
    if args.bpd and 'rk45' in (args.solvers or ()):
        args.tol = args.bpd_tol  # they stand in one table
    return args


def asked_by(args):
    """The names of the metrics that are asked for."""
    return [name for name in METRICS if vars(args)[name]]


def check_flags(args):
    """BadInput for whatever can be known before any work is done."""
    asked = asked_by(args)
    of_flows = [name for name in asked if name in OF_FLOWS]
    if not asked and not args.save_stats:
        raise BadInput('no metric asked; give one or more of '
                       + ' '.join(f'--{name}' for name in METRICS) + ', or --save_stats FILE.npz')
    if args.exact and args.compile:
        raise BadInput('--compile: --exact has no network; leave it out')
    if args.start and (args.exact or args.samples):
        raise BadInput(f'--from {args.start}: no flow of train.py --source is measured; leave it '
                       'out')
    if args.solvers and not args.sweep:
        raise BadInput(f'--solvers {",".join(args.solvers)}: belongs to --sweep nfe=5,10,20')
    if args.sweep and (not of_samples(asked) or 'neighbours' in asked):
        raise BadInput('--sweep: give some of --fid --is --kid --prc --swd --judge to sweep, '
                       'and not --neighbours')
    if args.compare and (args.samples or args.exact):
        raise BadInput('--compare: of checkpoints; leave --samples and --exact out')
    if args.sweep and (args.nfe or args.solver):
        raise BadInput('--sweep: says itself how many calls; leave --nfe out, and give --solvers '
                       'in place of --solver')
    if args.samples and (args.sweep or args.exact or of_flows):
        raise BadInput(f'--samples {args.samples}: images without their flow; leave --sweep, '
                       '--bpd, --straightness and --exact out')
    if args.samples and asked != ['is'] and not (args.ref or args.dataset):
        raise BadInput(f'--samples {args.samples}: compared with what? give --dataset or --ref')
    if args.out:
        check_png('--out', args.out)
    for flag in ('results', 'save_stats'):
        check_folder(f'--{flag}', vars(args)[flag] or '')
    if args.n is not None:
        check_counts(of_samples(asked), f'--n {args.n}', args.n)
    if args.bpd and args.bpd_tol > BIASED_TOL:
        say(f'--tol {args.bpd_tol:g}: above {BIASED_TOL:g} bits/dim are biased, and cannot be '
            'compared with those of finer ones; leave it out')


def fill_output(args):
    """Set --results and --out where they are not given: beside the checkpoint."""
    folder = ''
    if not (args.samples or args.exact or args.compare):
        folder = os.path.dirname(args.ckpt)
    name = 'neighbours.png'
    if args.compare:
        name = 'compare.png'
    elif args.sweep:
        name = 'sweep.png'
    args.results = args.results or os.path.join(folder, 'results.jsonl')
    args.out = args.out or os.path.join(os.path.dirname(args.results), name)


def check_places(args):
    """BadInput where something cannot be written that is to be written at the end."""
    if asked_by(args):
        check_writable('--results', args.results, appends=True)
    if args.sweep or args.neighbours:
        check_writable('--out', args.out)
    if args.compare:
        check_writable('--out', strip_beside(args.out))
    if args.save_stats:
        check_writable('--save_stats', args.save_stats)


def strip_beside(out):
    """The path of the strip of samples of --compare, beside its plot."""
    return f'{os.path.splitext(out)[0]}_samples.png'


# ---------------------------------------------------------------- where images come from

def load_flows(args, device):
    """The flows to be measured, {name: Flow}: of --exact, of --ckpt, or of all of --compare, and
    the images of --exact, or None.

    A checkpoint is called by its folder, or by its path where two folders are called alike."""
    options = {name: vars(args)[name] for name in SAMPLING_FLAGS}
    if args.exact:
        images = load_images(args.dataset or 'glyphs', args.data_dir, args.image_size)
        return {'exact': exact_flow(images, args.dataset, device, **options)}, images
    paths = args.compare or [args.ckpt]
    names = [os.path.basename(os.path.dirname(os.path.abspath(path))) for path in paths]
    if len(set(names)) < len(names):
        names = paths
    flows = {}
    for name, path in zip(names, paths):
        flow = load_flow(path, device, weights=args.weights, compiled=args.compile,
                         dataset=args.dataset, data_dir=args.data_dir, source=args.start,
                         bf16=args.bf16, **options)
        flows[name] = flow
        if flow.shape != flows[names[0]].shape:
            raise BadInput(f'--compare {path}: makes images of {flow.shape}, the first others; '
                           'give checkpoints of one size')
    return flows, None


def generated(flow, n, batch_size, device, rank, world, calls):
    """This rank's share of n samples of a flow, uint8 (b, C, H, W) a batch. How many network calls
    each batch took is appended to the list `calls`."""
    indices = list(share_of_rank(n, rank, world))
    for _, x, nfe in flow.images(indices, batch_size, device, rank):
        calls.append(nfe)
        yield to_uint8(x)


def chosen_indices(n, of):
    """n different numbers below `of`, in order, always the same: int64 (n,). They are random, since
    every tenth image of a set whose classes come in turn would be of one class."""
    if n >= of:
        return torch.arange(of)
    return torch.randperm(of, generator=torch.Generator().manual_seed(0))[:n].sort().values


def part_of_rank(indices, rank, world):
    """This rank's share of a tensor of indices."""
    share = share_of_rank(len(indices), rank, world)
    return indices[share.start:share.stop]


def stored(images, n, batch_size, device, rank, world, workers, label):
    """This rank's share of n images of a data set, uint8 (b, C, H, W) a batch."""
    indices = part_of_rank(chosen_indices(n, len(images)), rank, world)
    batches = read_batches(images, indices.split(batch_size), device, workers)
    return watch(batches, len(indices), label, rank)


# ---------------------------------------------------------------- what samples are compared with

class Reference(NamedTuple):
    """What samples are compared with."""
    name: str
    whole: Optional[Images]              # None: the statistics of --ref are all there is
    train: Optional[Images]              # those of it that are of the classes of the samples
    test: Optional[Images]               # the same of its test split, where it has one
    classes: str                         # in words, which classes these are; '' for all
    statistics: Optional[Measured]       # of --ref, or of one pass over train
    inception: Optional[torch.nn.Module]
    last_layer: Optional[torch.Tensor]   # of Inception, (1008, 2048)
    resize: str                          # of --resize
    judge: Optional[Judge]

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


def statistics_of_file(path, convention):
    """The Measured of --ref where it is a file of statistics, else None."""
    if not path or not path.lower().endswith('.npz'):
        return None
    try:
        return read_stats(path, convention)
    except ValueError as error:
        raise BadInput(f'--ref {error}') from error


def images_beside_statistics(args, wanted, statistics):
    """The images in the file of statistics that --ref names, or None where no metric needs them:
    --fid and --is do not, nor do --kid and --prc where the file holds features."""
    served = {'fid', 'is'}
    if statistics.features is not None:
        served |= OF_BOTH_FEATURES
    others = sorted(wanted - served)
    if not others and not args.save_stats:
        return None
    if args.save_stats or 'arr_0' not in np.load(args.ref).files:
        raise BadInput(f'--ref {args.ref}: statistics, which do for --{" --".join(sorted(served))} '
                       'only; give a folder, .zip or .npz of images')
    images = load_images(args.ref, args.data_dir, args.image_size, flag='--ref')
    say(f'--ref {args.ref}: its mu and sigma for --fid, its {len(images)} images for '
        + ' '.join(f'--{name}' for name in others))
    return images


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


def reference_images(args, wanted, statistics, flows, channels, size):
    """The data set that samples are compared with, or None where none is needed: that of --ref or
    --dataset, else the one that the networks were trained on."""
    if args.ref and statistics is not None:
        return images_beside_statistics(args, wanted, statistics)
    if args.ref:  # at its own size, as pytorch-fid reads it
        return load_images(args.ref, args.data_dir, args.image_size, flag='--ref')
    if not needs(wanted) & {'pixels', 'statistics'}:
        return None
    name = args.dataset
    flag = '--dataset'
    if not name:
        check_same_data(flows)
        name = trained_on(next(iter(flows.values())))
        flag = '--dataset of --ckpt'
    if not name:
        path = args.compare[0] if args.compare else args.ckpt
        raise BadInput(f'--ckpt {path}: does not say what it was trained on; give --dataset')
    images = load_images(name, args.data_dir, size, channels, flag=flag, size_is_fixed=True)
    check_data(flows, images, given=bool(args.dataset))
    return images


def check_counts(names, which, n):
    """BadInput for fewer images than the metrics `names` need. which: the first words of the line,
    on the n images."""
    for name in names:
        least = METRICS[name].least
        mend = f'--{name} needs {least} images or more'
        if name == 'fid':
            mend += f' (the covariance of {POOL} features)'
        if n < least:
            raise BadInput(f'{which}: {mend}; a metric for few images: --swd')


# ---------------------------------------------------------------- of which classes they are

def same_labels(labels, names, images):
    """Labels of classes called `names` (or None), as the labels of the same classes in the data set
    `images`, int64 (n,); None where it has no such classes."""
    if labels is None or len(labels) == 0 or images is None or images.labels is None:
        return None
    if names and images.classes:
        numbers = [images.classes.index(name) if name in images.classes else -1 for name in names]
        labels = torch.tensor(numbers)[labels]
    if labels.min() < 0 or labels.max() > images.labels.max():
        return None
    return labels


def labels_of_samples(indices, flow, given, words, train):
    """The classes of samples `indices`, as labels of the data set `train`: int64 (n,), or None
    where they are not known.

    flow: what makes the samples, or None where they are the Images `given`: of the classes `words`
    of --classes in turn, or with labels of their own."""
    if train is None or train.labels is None:
        return None
    if flow is not None:
        return same_labels(flow.labels_of(indices, 'cpu'), flow.class_names, train)
    if words is not None:
        try:
            numbers = class_numbers(words, int(train.labels.max()) + 1, train.classes)
        except BadInput as error:
            raise BadInput(str(error).replace('the network knows', f'{train.given} has')) from error
        labels = [numbers[i % len(numbers)] for i in indices if numbers]
        return same_labels(torch.tensor(labels), train.classes, train)
    if given.labels is None:
        return None
    return same_labels(given.labels[list(indices)], given.classes, train)


def classes_to_compare(words, flows, given, train):
    """(the classes of the samples as a list of labels of `train`, None where they are all that it
    has or are not known; in words what they are and what is compared with them).

    flows: {name: Flow} of what makes the samples. The others as in labels_of_samples()."""
    samples = {}  # {name: the labels of one turn}
    if words is not None and not flows:
        turn = range(len(words))
        samples['samples'] = labels_of_samples(turn, None, given, words, train)
    elif given is not None:
        samples['samples'] = labels_of_samples(range(len(given)), None, given, None, train)
    for name, flow in flows.items():
        samples[name] = labels_of_samples(range(len(flow.classes)), flow, None, None, train)
    every = [] if train is None or train.labels is None else train.labels.unique().tolist()
    chosen = {name: labels.unique().tolist() for name, labels in samples.items()
              if labels is not None}
    parts = [labels for labels in chosen.values() if labels != every]
    if parts and any(labels != parts[0] for labels in chosen.values()):
        raise BadInput('--compare: networks of other classes; measure them one by one, or say by '
                       '--classes which ones they share')
    if parts:
        return parts[0], ' of ' + names_of_classes(parts[0], train.classes)

    # Nothing can be left out of statistics, nor where the samples do not say their classes.
    if words and not flows and not chosen:
        return None, f' of all its classes, where the samples are of {",".join(words)}'
    if given is not None and not chosen and len(every) > 1:
        return None, f' of all {len(every)} classes; --classes says those of the samples'
    for flow in flows.values():
        is_part = 0 < len(set(flow.classes)) < flow.class_count
        if is_part and not chosen:
            return None, (' of all its classes, where the samples are of '
                          + names_of_classes(sorted(set(flow.classes)), flow.class_names))
    return None, ''


def names_of_classes(labels, names):
    """Some classes in words; of many the first."""
    words = [names[label] if names else str(label) for label in labels]
    line = ', '.join(words[:8])
    if len(words) > 8:
        line += f' ... ({len(words)} in all)'
    return f'class {line}' if len(words) == 1 else f'classes {line}'


def other_shares(labels, train):
    """In words, whether classes have other shares among samples with these labels than in the data
    set, with which a distance to all of it would be that of the shares too."""
    if labels is None:
        return ''
    classes = int(train.labels.max()) + 1
    ours = labels.bincount(minlength=classes) / len(labels)
    theirs = train.labels.bincount(minlength=classes) / len(train)
    if (ours - theirs).abs().max() < 0.02:
        return ''
    return ', whose classes have other shares'


# ---------------------------------------------------------------- the reference

def load_reference(args, wanted, own, flows, images, n, channels, size, device, rank, world):
    """The Reference for n samples of (channels, size, size), for the metrics `wanted`; and the file
    of --save_stats.

    own: the images of --exact, or None. flows: {name: Flow} of what makes the samples; or images:
    those of --samples. Raises BadInput where there are too few, before anything is trained or made.
    """
    asked = asked_by(args)
    version = 'random' if args.inception == 'random' else '2015-12-05'
    convention = f'{args.resize} resize, {version} Inception'
    statistics = statistics_of_file(args.ref, convention)
    train = own
    if args.ref or own is None:
        train = reference_images(args, wanted, statistics, flows, channels, size)
    whole = train
    # Statistics are of all their images, and so is then what stands beside them.
    can_be_part = whole if statistics is None else None
    classes, in_words = classes_to_compare(args.classes, flows, images, can_be_part)
    if classes is not None:
        train = whole.of_labels(classes)

    test = judge = None
    needed = needs(wanted)
    if 'pixels' in needed:
        if (train.channels, train.image_size) != (channels, size):
            raise BadInput(f'--ref {args.ref}: {train.image_size} pixels a side, {train.channels} '
                           f'channels; samples: {size}, {channels}; give --dataset {args.ref}')
        test = load_images(train.name, args.data_dir, size, channels, 'test', train.flag,
                           size_is_fixed=True)
        if not test.apart:
            test = None
        elif train is not whole:
            test = test_of_classes(test, classes, whole)

    # Enough images? Before the judge is trained, or Inception loaded.
    if asked:
        check_counts(of_samples(wanted), f'--n {n}' if n == args.n else f'{n} samples', n)
    n_reference = None if train is None else len(train)
    if statistics is not None:
        n_reference = statistics.n
    if n_reference is not None:
        counted = [name for name in of_samples(wanted) if 'statistics' in METRICS[name].needs]
        check_counts(counted, f'the reference: {n_reference} images{in_words}', n_reference)
    if 'judge' in wanted:
        real = test or train
        check_counts(['judge'], f'{real.given}: {len(real)} images{in_words}', len(real))
    fewest = min([n, *(len(part) for part in (train, test) if part is not None)])
    if fewest < world:
        raise BadInput(f'{fewest} images: fewer than the {world} processes; give more by --n')

    if 'judge' in wanted and rank == 0:  # before any image is made
        judge = judge_of(whole, test or train, args.data_dir, device)
    inception = last_layer = None
    if needed & {'features', 'statistics'}:
        inception, last_layer = load_inception(args.inception, device, rank)
    needs_features = bool(wanted & OF_BOTH_FEATURES)
    must_measure_reference = 'statistics' in needed
    if statistics is not None:
        must_measure_reference = needs_features and statistics.features is None
    if must_measure_reference:
        keep = {'features'} if needs_features else set()
        batches = stored(train, len(train), args.batch_size, device, rank, world, args.workers,
                         train.name)
        measured = collect(batches, len(train), inception, args.resize, keep, device)
        if statistics is not None:
            measured = measured._replace(mu=statistics.mu, sigma=statistics.sigma)
        statistics = measured
    if args.save_stats and rank == 0:
        write_stats(args.save_stats, statistics, convention)
        if classes is not None:
            print(f'{args.save_stats}: {statistics.n} images{in_words}')
    name = args.ref if train is None else train.name
    return Reference(name, whole, train, test, in_words, statistics, inception, last_layer,
                     args.resize, judge)


def of_samples(names):
    """Those of the metrics `names` that are of samples, in the order of METRICS."""
    return [name for name in METRICS if name in names and name not in OF_FLOWS]


def test_of_classes(test, classes, whole):
    """The test images of these classes, a list of labels of the training images `whole`; None where
    the test images do not say theirs."""
    labels = same_labels(torch.tensor(classes), whole.classes, test)
    if labels is None:
        say(f'{test.given}: its test images are not compared: of which classes they are is unknown')
        return None
    return test.of_labels(labels.tolist())


# ---------------------------------------------------------------- metrics of samples

class Result(NamedTuple):
    values: dict                            # {name: number}
    note: str                               # of what they are
    picture: Optional[Image.Image] = None   # for --out


# Each takes samples (Measured), a Reference, the device where float64 is, and the seed, and yields
# one Result or several.

def of_fid(samples, reference, device, seed):
    real = reference.statistics
    distance = frechet(samples.mu.to(device), samples.sigma.to(device),
                       real.mu.to(device), real.sigma.to(device))
    yield Result(dict(fid=distance), f'{reference.against(samples)}, {reference.resize} resize')


def of_is(samples, reference, device, seed):
    weight = reference.last_layer
    logits = torch.cat([part.double() @ weight.T for part in samples.features.split(4096)])
    mean, std = inception_score(logits, seed=seed)
    yield Result({'is': mean, 'is_std': std}, f'{samples.n} images, 10 splits')


def of_kid(samples, reference, device, seed):
    mean, std, size = kid(samples.features, reference.statistics.features, device, seed=seed)
    note = f'{reference.against(samples)}, 100 subsets of {size}'
    if size < 1000:
        note += ', not 1000: too few images'
    yield Result(dict(kid=mean, kid_std=std), note)


def of_prc(samples, reference, device, seed):
    precision, recall = precision_recall(samples.features, reference.statistics.features, device)
    yield Result(dict(precision=precision, recall=recall), reference.against(samples))


def of_swd(samples, reference, device, seed):
    sets = [images for images in (reference.train, reference.test) if images is not None]
    # The samples may be sorted by class: a part of them is taken at random.
    order = torch.randperm(samples.n, generator=torch.Generator().manual_seed(seed))
    labels = samples.labels
    count = min(samples.n, *(len(images) for images in sets))
    alike = 0
    if labels is not None and all(images.labels is not None for images in sets):
        alike = matched(labels[order], *sets)
    if alike > 1:
        count = alike
        labels = labels[order[:count]]
    else:
        labels = None
    chosen = order[:count].sort().values
    real = pick_images(reference.train, count, seed, labels)
    values = dict(swd=sliced_wasserstein(samples.pixels[chosen], real, device))
    if reference.test is not None:
        test = pick_images(reference.test, count, seed, labels)
        values['swd_of_test'] = sliced_wasserstein(test, real, device)
    note = f'{count} images against {count} of {reference.name}{reference.classes}'
    if labels is not None and len(labels.unique()) > 1:
        note += ', as many of each class'
    yield Result(values, note)


def of_neighbours(samples, reference, device, seed):
    """And a picture of the 32 samples closest to a training image, each left of that image."""
    measured = dict(samples=samples.pixels)
    if reference.test is not None:
        labels = samples.labels if reference.test.labels is not None else None
        measured['test'] = pick_images(reference.test, samples.n, seed, labels)
    marks = torch.tensor([0, 0.05, 0.5, 0.95]).double()
    for name, x in measured.items():
        distances, neighbours = nearest_images(x, reference.whole, device)
        least, q05, q50, q95 = distances.quantile(marks).tolist()
        values = {f'{name}_min': least, f'{name}_q05': q05, f'{name}_q50': q50,
                  f'{name}_q95': q95, f'{name}_mean': distances.mean().item(),
                  f'{name}_copies': int((distances == 0).sum())}
        picture = None
        if name == 'samples':
            first = distances.argsort()[:32]
            pairs = torch.stack([x[first], neighbours[first]], 1)
            picture = grid_of(pairs.flatten(0, 1), nrow=8)
        note = f'{name}: {len(x)} images, nearest of {len(reference.whole)} of {reference.name}'
        yield Result(values, note, picture)


def of_judge(samples, reference, device, seed):
    """The Frechet distance to the test images in the judge's features, beside that of as many
    training images, and how many samples it finds legible.

    The training images have the classes of the samples. At random their shares would differ more
    from those of the test images than the shares of samples whose classes come in turn, and a good
    flow would come out nearer to the test images than real ones."""
    judge = reference.judge
    features, p = judged(judge.net, samples.pixels)
    real = pick_images(reference.train, samples.n, seed, samples.labels)
    train, _ = judged(judge.net, real)

    def distance(x):
        return frechet(x.mean(0), x.T.cov(), judge.real.mean(0), judge.real.T.cov())

    precision, recall = precision_recall(features, judge.real, device)
    values = dict(judge_fd=distance(features), judge_fd_of_real=distance(train),
                  judge_precision=precision, judge_recall=recall, legible=part_legible(p))
    note = f'{samples.n} images{reference.classes}, of_real: {len(real)}'
    note += ' drawn at random' if samples.labels is None else ', as many of each class'
    yield Result(values, f'{note}; {judge.note}')


class Metric(NamedTuple):
    """What a metric needs. 'pixels': of the samples and of the reference. 'features': of each
    sample. 'statistics': mean and covariance of the features of the reference; with 'features'
    those of each image in it."""
    help: str
    needs: set
    least: int = 0                   # images (of FID: more than features)
    of: Optional[Callable] = None    # None: of a flow, by bits_per_dim() or straightness()


METRICS = {
    'fid': Metric('Frechet Inception distance to the reference', {'statistics'}, 2049, of_fid),
    'is': Metric('Inception Score, 10 splits', {'features'}, 10, of_is),
    'kid': Metric('kernel distance, 100 subsets of 1000', {'features', 'statistics'}, 2, of_kid),
    'prc': Metric('precision and recall, 3 nearest neighbours of Inception features',
                  {'features', 'statistics'}, 4, of_prc),
    'swd': Metric('sliced Wasserstein distance of pixels, beside that of the test split',
                  {'pixels'}, 0, of_swd),
    'neighbours': Metric('nearest training images, and a picture of the closest', {'pixels'}, 0,
                         of_neighbours),
    'judge': Metric('by a classifier of the labelled training set: Frechet distance of its '
                    'features, legible share, precision and recall', {'pixels'}, 129, of_judge),
    'bpd': Metric('bits/dim of the test split, dequantised, by rk45 (--tol: 1e-5)', {'pixels'}),
    'straightness': Metric('of the lines of vp, subvp, ddpm, rf in their own time; 0 is straight',
                           set()),
}
OF_FLOWS = [name for name, metric in METRICS.items() if metric.of is None]
OF_BOTH_FEATURES = {name for name, metric in METRICS.items()
                    if {'features', 'statistics'} <= metric.needs}


def needs(names):
    """What some metrics need, all together."""
    return set().union(*(METRICS[name].needs for name in names))


def measure_samples(asked, samples, reference, device, seed, out):
    """Print all metrics of samples that are asked for -> {name: number}. out: for a picture."""
    if device.type == 'mps':  # which has no float64
        device = torch.device('cpu')
    values = {}
    for name in asked:
        if name in OF_FLOWS:
            continue
        with waiting.doing(f'computing --{name}'):
            results = [*METRICS[name].of(samples, reference, device, seed)]
        for result in results:
            values.update(result.values)
            numbers = '  '.join(f'{key} {value:.6g}' for key, value in result.values.items())
            print(f'{numbers}  ({result.note})', flush=True)
            if result.picture is not None:
                write_png('--out', out, result.picture)
                print(f'wrote {out}')
    return values


# ---------------------------------------------------------------- metrics of a flow

def labels_for(flow, images):
    """The labels of the images, for a network that was trained with labels; else None. BadInput
    where it does not know them."""
    if not flow.classes or images.labels is None:
        return None
    if flow.class_names and images.classes and flow.class_names != images.classes:
        raise BadInput(f'{images.given}: its classes are {", ".join(images.classes)}, those of '
                       f'the network {", ".join(flow.class_names)}; leave them out with '
                       '--classes none')
    low = int(images.labels.min())
    high = int(images.labels.max())
    if low < 0 or high >= flow.class_count:
        raise BadInput(f'--dataset {images.name}: labels from {low} to {high}; the network knows '
                       f'0 to {flow.class_count - 1}; leave the labels out with --classes none')
    return images.labels


def bits_per_dim(flow, images, n, *, repeats, tol, batch_size, device, rank=0, world=1):
    """Bits/dim of n images x = (pixel + U[0, 1)) / 256 * 2 - 1, and how far from x
    the flow comes back down from their latents: {name: number}.

    The noise of an image depends on the flow's seed, its index and the repeat, the probe of the
    divergence on the batch that it is in too. Raises BadInput where RK45 cannot go on at `tol`."""
    labels = labels_for(flow, images)
    options = dict(gamma=flow.gamma, z_exp=flow.z_exp, small_z=flow.small_z, rtol=tol, atol=tol)
    indices = part_of_rank(chosen_indices(n, len(images)), rank, world)
    rows = []
    for index in watch(indices.split(batch_size), len(indices), 'bits/dim', rank):
        pixels = images[index.tolist()].cpu()
        if labels is not None:
            options['labels'] = labels[index].to(device)
        columns = []
        for repeat in range(repeats):
            seeds = [step_seed(flow.seed, i + repeat * 2 ** 32) for i in index.tolist()]
            draws = [torch.Generator().manual_seed(seed) for seed in seeds]
            noise = torch.stack([torch.rand(pixels.shape[1:], generator=generator,
                                            dtype=torch.float64) for generator in draws])
            x = (pixels + noise) / 128 - 1                           # (b, C, H, W), float64
            if not isinstance(flow.net, pfgm.ExactField):
                x = x.float()
            x = x.to(device)
            try:
                with following(flow.z_min, flow.z_max) as noted:
                    up = pfgm.log_likelihood(flow.net, x, flow.z_min, flow.z_max, D=flow.D,
                                             generator=draws[0], callback=noted, **options)
                with torch.no_grad(), following(flow.z_max, flow.z_min) as noted:
                    back, _ = pfgm.sample_ode(flow.net, up.latent, flow.z_max, flow.z_min, 'rk45',
                                              callback=noted, **options)
            except pfgm.SolverError as error:
                mend = DIVERGED if 'NaN' in str(error) else f'try --tol {10 * tol:g}'
                raise BadInput(f'--bpd: {error}; {mend}') from error
            error = (back - x).abs().flatten(1).cpu().double()
            calls = torch.full((len(x),), float(up.nfe), dtype=torch.float64)
            columns.append(torch.stack([up.bpd.cpu(), error.mean(1), error.amax(1), calls], 1))
        rows.append(torch.stack(columns, 1))                         # (b, repeats, 4)
    bpd, error, largest, calls = torch.cat(everywhere(torch.cat(rows))).unbind(2)
    each = bpd.mean(1)  # the repeats of an image are no further images
    return dict(bpd=each.mean().item(), bpd_se=(each.std() / n ** 0.5).item() if n > 1 else None,
                n=n, repeats=repeats, nfe=calls.mean().item(),
                round_trip_mean=error.mean().item(), round_trip_max=largest.max().item())


def measure_flow(asked, name, flow, reference, args, device, rank, world):
    """Print and record the metrics of a flow that are asked for -> {name: number}."""
    if not set(asked) & set(OF_FLOWS):
        return {}
    if flow.student:
        say(f'{name}: distilled into one call, so it has no flow, and no ' + ', '.join(OF_FLOWS))
        return {}
    start = time.time()
    values = {}
    facts = {}
    note = name
    if 'bpd' in asked:
        if flow.source is not None:
            raise BadInput(f'--bpd: {name} starts from images, of no known density; leave it out')
        images = reference.train
        split = 'training'
        if reference.test is not None:
            images = reference.test
            split = 'test'
        n = args.n or 256
        if args.compare:
            n = min(n, 256)
        values = bits_per_dim(flow, images, min(n, len(images)), repeats=args.repeats,
                              tol=args.bpd_tol, batch_size=args.batch_size, device=device,
                              rank=rank, world=world)
        facts = dataclasses.replace(flow, solver='rk45', tol=args.bpd_tol).facts()
        facts.update(reference.facts(), dataset=images.name, split=split)
        note = f'{split} images of {images.name}{reference.classes}, tol {args.bpd_tol:g}'
        if args.bpd_tol > BIASED_TOL:
            note += f', biased above {BIASED_TOL:g}'
        levels = values['round_trip_max'] / GREY_LEVEL
        if levels > 1:
            note += (f'; an image comes back {levels:.1f} grey levels off, so the flow was not '
                     'followed exactly')
            if args.bpd_tol > BPD_TOL:
                note += f': give --tol {BPD_TOL:g}'
    if 'straightness' in asked and isinstance(flow.net, VP):
        n = args.n or 256
        if flow.source is not None:
            n = min(n, len(flow.source))
        values['straightness'] = straightness(flow, n, args.batch_size, device)
    measured = {key: values[key] for key in OF_FLOWS if key in values}
    for key, value in measured.items():
        if not math.isfinite(value):
            raise BadInput(f'--{key}: not finite ({value}); the network of {name} has diverged; '
                           'give another')
    if values and rank == 0:
        numbers = '  '.join(f'{key} {value:.6g}' for key, value in values.items()
                            if value is not None)
        print(f'{numbers}  ({note})')
        record_result(args.results, {**facts, **values, 'run': name}, device, world,
                      seconds=time.time() - start, seed=args.seed)
    return measured


# ---------------------------------------------------------------- the run

class Point(NamedTuple):
    """A line of the table of a sweep."""
    row: dict                       # its numbers and words
    nfe: Optional[int]              # network calls that were asked for; None of rk45
    pixels: Optional[torch.Tensor]  # a few of its samples, uint8 (4, C, H, W), for --compare


def points_of_sweep(name, flow, sweep, solvers):
    """The (solver, network calls) with which a sweep follows a flow, which it calls `name`. A
    student takes the calls that it was trained for only, and a line says so. sweep: numbers of
    calls. solvers: as given, or None."""
    if flow.student == 'distill':
        say(f'{name}: a student of --distill, measured with the one call that it was trained for')
        return [(flow.solver, 1)]
    if flow.student == 'consistency':
        say(f'{name}: a student of --consistency, trained for one or two calls; all calls are '
            'made by renew')
        return [('renew', nfe) for nfe in sweep]
    points = []
    for solver in solvers or ['unipc']:
        calls = [None] if solver == 'rk45' else sweep
        points += [(solver, nfe) for nfe in calls]
    return points


def measure(asked, name, flow, images, n, reference, args, device, rank, world):
    """Measure a flow, or the given images where it is None: a list of Points, on rank 0."""
    of_flow = {}
    points = [(None, None)]
    if flow is not None:
        of_flow = measure_flow(asked, name, flow, reference, args, device, rank, world)
        points = [(flow.solver, flow.nfe)]
    if not of_samples(asked):
        return []
    if args.sweep:
        points = points_of_sweep(name, flow, args.sweep, args.solvers)

    keep = needs(of_samples(asked))
    if args.compare:
        keep.add('pixels')
    measured = []
    for solver, nfe in points:
        start = time.time()
        calls = []
        if flow is None:
            batches = stored(images, n, args.batch_size, device, rank, world, args.workers,
                             'samples')
        else:
            flow.solver = solver
            flow.nfe = nfe
            batches = generated(flow, n, args.batch_size, device, rank, world, calls)
        samples = collect(batches, n, reference.inception, args.resize, keep, device)
        if rank > 0:
            continue
        indices = range(n) if images is None else chosen_indices(n, len(images)).tolist()
        labels = labels_of_samples(indices, flow, images, args.classes, reference.train)
        samples = samples._replace(labels=labels)
        seconds = time.time() - start
        values = measure_samples(asked, samples, reference, device, args.seed, args.out)
        facts = {}
        told = {}  # what tells this point from others
        if args.compare:
            told.update(run=name, method=flow.method)
        if flow is not None:
            facts = flow.facts()
            told.update(solver=solver, nfe=float(np.mean(calls)))
        n_reference = reference.statistics.n if reference.statistics is not None else None
        row = {'n': n, 'n_ref': n_reference, **reference.facts(), 'resize': args.resize,
               'inception': args.inception, **facts, **told, **values}
        record_result(args.results, row, device, world, seconds=time.time() - start,
                      seed=args.seed)
        measured.append(Point({**told, 'seconds': seconds, **values, **of_flow}, nfe,
                              samples.pixels[:4] if args.compare else None))
    return measured


def show_sweep(points, n, args):
    """The table of a sweep, a plot of its first metric, and for --compare a strip of samples."""
    told = ['solver']
    if args.compare:
        told = ['run']
        if len(args.solvers or ()) > 1:
            told = ['run', 'solver']
    curves = {}
    pictures = {}  # {curve: {nfe: pixels}}
    for row, nfe, pixels in points:
        shown = next(key for key in row
                     if key not in ('run', 'method', 'solver', 'nfe', 'seconds'))
        curve = ' '.join(row[key] for key in told)
        curves.setdefault(curve, []).append((row['nfe'], row[shown]))
        if args.compare and row['solver'] != 'rk45':
            pictures.setdefault(curve, {})[nfe] = pixels
    print_table([point.row for point in points])
    if args.bpd:
        print(f'bpd by rk45 with --tol {args.bpd_tol:g}')
    title = f'{shown.upper()} of {n} images by the number of network calls'
    plot(curves, title, 'network calls an image (NFE)', shown.upper(), args.out)
    if pictures:
        write_strip(pictures, strip_beside(args.out))


def write_strip(pictures, out):
    """A strip of samples with a row for each curve and a column for each number of network calls.
    Where a curve has none with so many it is grey. pictures: {curve: {nfe: uint8 (4, C, H, W)}}."""
    calls = sorted({nfe for by_nfe in pictures.values() for nfe in by_nfe})
    some = next(iter(next(iter(pictures.values())).values()))
    grey = torch.full_like(some, 128)
    rows = {curve: torch.cat([by_nfe.get(nfe, grey) for nfe in calls])
            for curve, by_nfe in pictures.items()}
    strip(rows, [f'nfe {nfe}' for nfe in calls], out)


def main(args):
    asked = asked_by(args)
    wanted = set(asked)
    if args.save_stats:
        wanted.add('fid')
    check_flags(args)
    fill_output(args)
    device, rank, world = setup(args.device, float64=args.exact,
                                deterministic=args.deterministic)

    # what is measured: images that are given, or those of flows
    flows = {}
    images = own = channels = size = None
    if args.samples:
        images = load_images(args.samples, args.data_dir, args.image_size, flag='--samples')
        channels = images.channels
        size = images.image_size
    elif asked or not (args.ref or args.dataset):
        flows, own = load_flows(args, device)
        first = next(iter(flows.values()))
        channels, size, _ = first.shape
        if 'straightness' in asked and not any(isinstance(f.net, VP) for f in flows.values()):
            raise BadInput('--straightness: only vp, subvp, ddpm and rf have a time to be straight '
                           'in; give another --ckpt, or leave it out')
    n = args.n
    if n is None:
        n = 1000
        if images is not None:
            n = len(images)
        elif needs(wanted) & {'features', 'statistics'}:
            n = 50000
    if images is not None and n > len(images):
        raise BadInput(f'--n {n}: --samples {args.samples} has {len(images)} images')
    for name, flow in flows.items():
        if flow.source is not None and n > len(flow.source):
            say(f'{name} starts from {len(flow.source)} images, and more samples would be the same '
                f'again: {len(flow.source)} samples, not {n}')
            n = len(flow.source)
    if rank == 0:
        check_places(args)

    # what it is compared with
    reference = load_reference(args, wanted, own, flows, images, n, channels, size, device, rank,
                               world)

    # measure, and show
    points = []
    for name, flow in (flows or {'': None}).items():
        points += measure(asked, name, flow, images, n, reference, args, device, rank, world)
    if args.sweep and rank == 0:
        show_sweep(points, n, args)
    if rank == 0 and asked:
        print(f'results are in {args.results}')


if __name__ == '__main__':
    run(main, parse_args())
