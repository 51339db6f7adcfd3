"""Measure samples of a Poisson flow, and the flow itself.

    python evaluate.py --fid                          # 50,000 images of out/ckpt.pt, its data set
    torchrun --nproc_per_node=8 -- evaluate.py --fid --is --kid --prc    # one pass on all GPUs
    python evaluate.py --fid --samples images/ --ref cifar10.npz         # without a network
    python evaluate.py --swd --neighbours             # no Inception weights needed
    python evaluate.py --bpd --repeats 5              # likelihood of the test split
    python evaluate.py --fid --sweep nfe=5,10,20,50 --solvers euler,unipc # a table, a plot
    python evaluate.py --compare out/*/ckpt.pt        # the same for several networks, and a strip
    python evaluate.py --judge --n 512                # by a classifier of the labelled training set

Every result is also a line of results.jsonl. What the numbers mean is in support/measures.py.
"""
import dataclasses
import functools
import math
import os
import time
from typing import Callable, NamedTuple, Optional

from support import waiting

waiting.begin(__name__)  # a line where the imports below take long; Ctrl-C ends them in one line

import numpy as np
import torch

from support.checkpoint import in_folder
from support.classes import labels_of_samples
from support.cli import (BadInput, Parser, above, check_folder, check_writable, one_of, say,
                         several)
from support.flow import exact_flow, load_flow
from support.images import chosen_indices, read_chosen, to_uint8
from support.inception import INCEPTION, collect
from support.likelihood import BIASED_TOL, BPD_TOL, likelihood
from support.measures import METRICS, OF_FLOWS, check_counts, needs, of_samples
from support.methods import VP
from support.pictures import check_png, plot, strip, write_png
from support.processes import Machine, run, setup, share_of_rank
from support.reference import ReferenceFlags, Subjects, load_reference, trained_on
from support.results import print_table, record_result
from support.sampling_flags import SAMPLING_FLAGS, flow_flags
from support.sets import load_images
from support.solvers import SOLVERS
from support.students import straightness
from support.unused import in_evaluate, in_reference, refuse


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
    if args.start and (args.exact or args.samples):
        raise BadInput(f'--from {args.start}: no flow of train.py --source is measured; leave it '
                       'out')
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
    needs_reference = asked != ['is'] or args.save_stats
    if args.samples and needs_reference and not (args.ref or args.dataset):
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

def load_flows(paths, options, device):
    """The flows of the checkpoints `paths`, {name: Flow}. options: the other arguments of
    load_flow().

    A checkpoint is called by its folder, or by its path where two folders are called alike."""
    names = [os.path.basename(os.path.dirname(os.path.abspath(path))) for path in paths]
    if len(set(names)) < len(names):
        names = paths
    flows = {}
    for name, path in zip(names, paths):
        flow = load_flow(path, device, **options)
        flows[name] = flow
        if flow.shape != flows[names[0]].shape:
            raise BadInput(f'--compare {path}: makes images of {flow.shape}, the first others; '
                           'give checkpoints of one size')
    return flows


SAMPLES = 1000
SAMPLES_OF_INCEPTION = 50_000  # with which FID is published


def number_of_samples(n, wanted, images, flows):
    """How many samples are measured of each flow, or of the given images. n: of --n, or None.
    wanted: names of metrics. BadInput for more images than are given."""
    if n is None:
        n = SAMPLES
        if images is not None:
            n = len(images)
        elif needs(wanted) & {'features', 'statistics'}:
            n = SAMPLES_OF_INCEPTION
    if images is not None and n > len(images):
        raise BadInput(f'--n {n}: {images.given} has {len(images)} images')
    for name, flow in flows.items():
        if flow.source is not None and n > len(flow.source):
            say(f'{name} starts from {len(flow.source)} images, and more samples would be the same '
                f'again: {len(flow.source)} samples, not {n}')
            n = len(flow.source)
    return n


def generated(flow, n, machine, calls, batch_size):
    """This rank's share of n samples of a flow, uint8 (b, C, H, W) a batch, made batch_size at a
    time. How many network calls that took is appended to the list `calls`."""
    indices = list(share_of_rank(n, machine.rank, machine.world))
    for _, x, nfe in flow.images(indices, batch_size, machine.device, machine.rank):
        calls.append(nfe)
        yield from to_uint8(x).split(machine.batch_size)


# ---------------------------------------------------------------- measure

class Plan(NamedTuple):
    """What is measured of each flow, or of the images that are given."""
    asked: list                # names of metrics
    n_bpd: int                 # images of --bpd
    n_lines: int               # lines of --straightness
    batch_size: Optional[int]  # of samples; None: as is best
    repeats: int               # of --bpd
    bpd_tol: float
    solvers: Optional[list]    # of a sweep; None: as is best
    compares: bool             # whether checkpoints are compared
    classes: Optional[list]    # words
    seed: int
    out: str                   # where a picture is written
    record: Callable           # record(row, seconds=...) writes a line of results


class Point(NamedTuple):
    """A line of the table of a sweep."""
    row: dict                       # its numbers and words
    nfe: Optional[int]              # network calls that were asked for; None of rk45
    pixels: Optional[torch.Tensor]  # a few of its samples, uint8 (4, C, H, W), for --compare


def measure(name, flow, settings, subjects, reference, plan, machine):
    """Measure a flow with each of the `settings`, (solver, network calls), or the given images
    where it is None: a list of Points, on rank 0."""
    values = {}
    if flow is not None:
        values = measure_flow(name, flow, reference, plan, machine)
    if not of_samples(plan.asked):
        return []
    points = []
    for solver, nfe in settings:
        if flow is not None:
            flow.solver = solver
            flow.nfe = nfe
        point = measure_point(name, flow, subjects, reference, plan, machine)
        if point is not None:
            points.append(point._replace(row={**point.row, **values}))
    return points


def measure_flow(name, flow, reference, plan, machine):
    """Print and record the metrics of a flow that are asked for -> {name: number}."""
    if not set(plan.asked) & set(OF_FLOWS):
        return {}
    if flow.student:
        say(f'{name}: distilled into one call, so it has no flow, and no ' + ', '.join(OF_FLOWS))
        return {}
    start = time.time()
    values = {}
    facts = {}
    note = name
    if 'bpd' in plan.asked:
        values, facts, note = likelihood(name, flow, reference, plan.n_bpd, repeats=plan.repeats,
                                         tol=plan.bpd_tol, machine=machine)
    if 'straightness' in plan.asked and isinstance(flow.net, VP):
        n = plan.n_lines
        if flow.source is not None:
            n = min(n, len(flow.source))
        values['straightness'] = straightness(flow, n, machine.batch_size, machine.device)
        if 'bpd' not in plan.asked:
            facts = dict(method=flow.method, weights=flow.weights, step=flow.step,
                         classes=list(flow.classes))
    measured = {key: values[key] for key in OF_FLOWS if key in values}
    for key, value in measured.items():
        if not math.isfinite(value):
            raise BadInput(f'--{key}: not finite ({value}); the network of {name} has diverged; '
                           'give another')
    if values and machine.rank == 0:
        numbers = '  '.join(f'{key} {value:.6g}' for key, value in values.items()
                            if value is not None)
        print(f'{numbers}  ({note})')
        plan.record({**facts, **values, 'run': name}, seconds=time.time() - start)
    return measured


def settings_of(name, flow, sweep, solvers):
    """The (solver, network calls) with which a flow, called `name`, is followed. In a sweep a
    student takes the calls that it was trained for only, and a line says so. sweep: numbers of
    calls, or None. solvers: as given, or None."""
    if not sweep:
        return [(flow.solver, flow.nfe)]
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


def measure_point(name, flow, subjects, reference, plan, machine):
    """Make samples of a flow as it is set, or take the given images where it is None; measure and
    record them. -> the Point on rank 0, on others None."""
    start = time.time()
    calls = []
    if flow is None:
        batches = read_chosen(subjects.images, subjects.n, machine, 'samples')
    else:
        batch_size = machine.batch_size
        if plan.batch_size is None and flow.solver != 'rk45':  # whose calls are those of its batch
            batch_size = flow.batch_size(machine.device)
        batches = generated(flow, subjects.n, machine, calls, batch_size)
    keep = needs(of_samples(plan.asked))
    if plan.compares:
        keep.add('pixels')
    samples = collect(batches, subjects.n, reference.inception, reference.resize, keep,
                      machine.device)
    if machine.rank > 0:
        return None
    indices = range(subjects.n)
    if flow is None:
        indices = chosen_indices(subjects.n, len(subjects.images)).tolist()
    labels = labels_of_samples(indices, flow, subjects.images, plan.classes, reference.train)
    samples = samples._replace(labels=labels)
    seconds = time.time() - start
    values = measure_samples(plan.asked, samples, reference, machine.device, plan.seed, plan.out)
    facts = {}
    told = {}  # what tells this point from others
    if plan.compares:
        told.update(run=name, method=flow.method)
    if flow is not None:
        facts = flow.facts()
        told.update(solver=flow.solver, nfe=float(np.mean(calls)))
    row = {'n': subjects.n, **reference.facts_for_samples(), **facts, **told, **values}
    plan.record(row, seconds=time.time() - start)
    nfe = None if flow is None else flow.nfe
    return Point({**told, 'seconds': seconds, **values}, nfe,
                 samples.pixels[:4] if plan.compares else None)


def measure_samples(asked, samples, reference, device, seed, out):
    """Print all metrics of samples that are asked for -> {name: number}. out: for a picture."""
    if device.type == 'mps':  # which has no float64
        device = torch.device('cpu')
    values = {}
    for name in of_samples(asked):
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


# ---------------------------------------------------------------- show

def show_sweep(points, n, plan):
    """The table of a sweep, a plot of its first metric, and for --compare a strip of samples."""
    told = ['solver']
    if plan.compares:
        told = ['run']
        if len(plan.solvers or ()) > 1:
            told = ['run', 'solver']
    curves = {}
    pictures = {}  # {curve: {nfe: pixels}}
    for row, nfe, pixels in points:
        shown = next(key for key in row
                     if key not in ('run', 'method', 'solver', 'nfe', 'seconds'))
        curve = ' '.join(row[key] for key in told)
        curves.setdefault(curve, []).append((row['nfe'], row[shown]))
        if plan.compares and row['solver'] != 'rk45':
            pictures.setdefault(curve, {})[nfe] = pixels
    print_table([point.row for point in points])
    if 'bpd' in plan.asked:
        print(f'bpd by rk45 with --tol {plan.bpd_tol:g}')
    title = f'{shown.upper()} of {n} images by the number of network calls'
    plot(curves, title, 'network calls an image (NFE)', shown.upper(), plan.out)
    if pictures:
        write_strip(pictures, strip_beside(plan.out))


def write_strip(pictures, out):
    """A strip of samples with a row for each curve and a column for each number of network calls.
    Where a curve has none with so many it is grey. pictures: {curve: {nfe: uint8 (4, C, H, W)}}."""
    calls = sorted({nfe for by_nfe in pictures.values() for nfe in by_nfe})
    some = next(iter(next(iter(pictures.values())).values()))
    grey = torch.full_like(some, 128)
    rows = {curve: torch.cat([by_nfe.get(nfe, grey) for nfe in calls])
            for curve, by_nfe in pictures.items()}
    strip(rows, [f'nfe {nfe}' for nfe in calls], out)


# ---------------------------------------------------------------- the run

def main(args):
    asked = asked_by(args)
    wanted = set(asked)
    if args.save_stats:
        wanted.add('fid')
    check_flags(args)
    fill_output(args)
    device, rank, world = setup(args.device, float64=args.exact,
                                deterministic=args.deterministic)
    machine = Machine(device, rank, world, args.batch_size or 64, args.workers)

    # what is measured: images that are given, or those of flows
    flows = {}
    images = charges = None
    paths = args.compare or [args.ckpt]
    options = {name: vars(args)[name] for name in SAMPLING_FLAGS}
    if args.samples:
        images = load_images(args.samples, args.data_dir, args.image_size, flag='--samples')
    elif args.exact and (asked or not (args.ref or args.dataset)):
        charges = load_images(args.dataset or 'glyphs', args.data_dir, args.image_size)
        flows = {'exact': exact_flow(charges, args.dataset, device, **options)}
    elif asked or not (args.ref or args.dataset):
        options.update(weights=args.weights, compiled=args.compile, dataset=args.dataset,
                       data_dir=args.data_dir, source=args.start, bf16=args.bf16)
        flows = load_flows(paths, options, device)
    if 'straightness' in asked and not any(isinstance(flow.net, VP) for flow in flows.values()):
        raise BadInput('--straightness: only vp, subvp, ddpm and rf have a time to be straight '
                       'in; give another --ckpt, or leave it out')
    n = number_of_samples(args.n, wanted, images, flows)
    n_in_words = f'--n {n}' if n == args.n else f'{n} samples'
    subjects = Subjects(flows, images, charges, n, n_in_words)
    if rank == 0:
        check_places(args)

    # with which solvers, and which flags have no say in that
    settings = {name: settings_of(name, flow, args.sweep, args.solvers)
                for name, flow in flows.items()}
    followed = [dataclasses.replace(flows[name], solver=solver, nfe=nfe)
                for name in flows for solver, nfe in settings[name]]
    unused = in_evaluate(vars(args), asked, followed, args.given,
                         trained_on=trained_on(followed[0]) if followed else None,
                         uses_reference=bool(needs(wanted) & {'pixels', 'statistics'}),
                         uses_inception=bool(needs(wanted) & {'features', 'statistics'}))
    refuse(args.given, unused, vars(args))

    # what it is compared with
    flags = ReferenceFlags(args.ref, args.dataset, args.data_dir, args.image_size, args.classes,
                           paths[0], args.inception, args.resize, args.save_stats)
    reference = load_reference(asked, wanted, subjects, flags, machine)
    refuse(args.given, in_reference(vars(args), asked, images, reference), vars(args))

    # measure, and show
    n_bpd = n_lines = args.n or 256
    if args.compare:
        n_bpd = min(n_bpd, 256)
    record = functools.partial(record_result, args.results, device=device, world=world,
                               seed=args.seed)
    plan = Plan(asked, n_bpd, n_lines, args.batch_size, args.repeats, args.bpd_tol, args.solvers,
                bool(args.compare), args.classes, args.seed, args.out, record)
    points = []
    for name, flow in (flows or {'': None}).items():
        points += measure(name, flow, settings.get(name, [(None, None)]), subjects, reference, plan,
                          machine)
    if args.sweep and rank == 0:
        show_sweep(points, n, plan)
    if rank == 0 and asked:
        print(f'results are in {args.results}')


if __name__ == '__main__':
    run(main, parse_args())
