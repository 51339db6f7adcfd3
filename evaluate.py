"""Measure samples of a Poisson flow, and the flow itself.

    python evaluate.py --fid                          # 50,000 images of out/ckpt.pt, its data set
    torchrun --nproc_per_node=8 -- evaluate.py --fid --is --kid --prc    # one pass on all GPUs
    python evaluate.py --fid --samples images/ --ref cifar10.npz         # without a network
    python evaluate.py --swd --neighbours             # no Inception weights needed
    python evaluate.py --bpd --repeats 5              # likelihood of the test split
    python evaluate.py --fid --sweep nfe=5,10,20,50 --solvers euler,unipc # a table, a plot
    python evaluate.py --compare out/*/ckpt.pt        # the same for several networks, and a strip
    python evaluate.py --judge --n 512                # by a classifier of the labelled training set

Every result is also a line of results.jsonl. FID: arXiv 1706.08500, IS: 1606.03498, KID:
1801.01401, precision and recall: 1904.06991, sliced Wasserstein: Bonneel et al. 2015.
"""
import dataclasses
import math
import os
import time
from typing import Callable, NamedTuple, Optional

import numpy as np
import torch

import pfgm
from support.checkpoint import in_folder
from support.cli import BadInput, Parser, above, say, watch, write
from support.flow import (DIVERGED, SAMPLING_FLAGS, exact_flow, flow_flags, load_flow)
from support.images import Images, read_batches, to_uint8
from support.metrics import (INCEPTION, Measured, POOL, frechet, inception_features,
    inception_score, judge_of, kid, load_inception, nearest_images, of_judge, pick_images,
    precision_recall, read_stats, sliced_wasserstein)
from support.pictures import grid_of, plot, strip
from support.methods import VP
from support.processes import everywhere, run, setup, share_of_rank
from support.results import print_table, record_result
from support.seeds import step_seed
from support.sets import load_images
from support.solvers import SOLVERS
from support.students import straightness


def parse_args(argv=None):
    p = Parser(description=__doc__)
    for name, metric in METRICS.items():
        p.add_argument(f'--{name}', action='store_true', help=metric.help)
    flow_flags(p)
    p.set_defaults(tol=None)
    p.add_argument('--n', type=above(0, int), default=None, help='images (default: all of '
                   '--samples; else 50000 with Inception metrics, 1000 without, 256 for bpd)')
    p.add_argument('--samples', default=None, help='evaluate this folder, .zip or .npz (arr_0), '
                   'at --image_size if given')
    p.add_argument('--workers', type=above(-1, int), default=4, help='processes that read a set '
                   'too large for memory (default: 4)')
    p.add_argument('--ref', default=None, help='compare with these images, or with a .npz of mu '
                   'and sigma (default: the training split of --dataset, not mirrored)')
    p.add_argument('--save_stats', metavar='FILE.npz', help='write mu, sigma of the reference')
    p.add_argument('--inception', default=None, metavar='FILE', help=f'{INCEPTION} (default: '
                   "torch hub's copy, downloaded once), or random: a check of the plumbing")
    p.add_argument('--resize', choices=('tf1', 'pytorch'), default='tf1', help='to 299 pixels; '
                   'tf1: as in the TensorFlow graph behind the FIDs that score_sde, PFGM and EDM '
                   'published; pytorch: as in pytorch-fid (default: tf1)')
    p.add_argument('--repeats', type=above(0, int), default=1, help='of --bpd, each with noise '
                   'and a Hutchinson probe of its own (default: 1)')
    p.add_argument('--sweep', metavar='nfe=5,10,20', help='network calls', type=lambda text: [
        above(0, int)(part) for part in text.removeprefix('nfe=').split(',')])
    p.add_argument('--compare', nargs='+', type=in_folder, metavar='CKPT', help='sweep these side '
                   'by side, with a strip of samples from the same seeds (default: --swd --bpd, '
                   'nfe=5,10,20,50; bits/dim of up to 256 images)')
    p.add_argument('--solvers', type=lambda text: text.split(','), default=None, help='of --sweep, '
                   f'of {",".join(SOLVERS)} (default: unipc); rk45 is one point, at --tol')
    p.add_argument('--out', default=None, help='picture of --sweep, --compare or --neighbours '
                   '(default: sweep.png, compare.png or neighbours.png beside --results)')
    p.add_argument('--results', default=None, help='a line is appended to it (default: '
                   'results.jsonl beside --ckpt; in this folder with --samples or --exact)')
    args = p.parse_args(argv)
    args.bpd_tol, args.tol = args.tol or 1e-5, args.tol or 1e-4
    if args.compare:
        args.sweep = args.sweep or [5, 10, 20, 50]
        if not any(vars(args)[name] for name in METRICS):
            args.swd = args.bpd = True
    return args


def check_flags(args, asked):
    """Whatever can be known before any work is done, and where to write."""
    solvers = ','.join(args.solvers or ())
    for wrong, message in (
        (not asked and not args.save_stats, 'no metric asked; give one or more of '
         + ' '.join(f'--{name}' for name in METRICS) + ', or --save_stats FILE.npz'),
        (not set(args.solvers or ()) <= set(SOLVERS),
         f'--solvers {solvers}: accepted: {",".join(SOLVERS)}, or some of them'),
        (solvers and not args.sweep,
         f'--solvers {solvers}: belongs to --sweep nfe=5,10,20'),
        (args.sweep and (not set(asked) - set(OF_FLOWS) or 'neighbours' in asked),
         '--sweep: give some of --fid --is --kid --prc --swd to sweep, and not --neighbours'),
        (args.compare and (args.samples or args.exact), '--compare: of checkpoints; leave '
         '--samples, --exact out'),
        (args.sweep and (args.nfe or args.solver), '--sweep: says itself how many calls; leave '
         '--nfe out, and give --solvers in place of --solver'),
        (args.samples and (args.sweep or args.exact or set(OF_FLOWS) & set(asked)), f'--samples '
         f'{args.samples}: images without their flow; leave --sweep, --bpd, --straightness and '
         '--exact out'),
        (args.samples and asked != ['is'] and not (args.ref or args.dataset),
         f'--samples {args.samples}: compared with what? give --dataset or --ref'),
    ):
        if wrong:
            raise BadInput(message)
    if args.out and not args.out.endswith('.png'):
        raise BadInput(f'--out {args.out}: a picture; must end in .png')
    for flag in ('results', 'save_stats', 'out'):
        path, folder = vars(args)[flag], os.path.dirname(vars(args)[flag] or '')
        if folder and not os.path.isdir(folder):
            raise BadInput(f'--{flag} {path}: no folder {folder}; make it with: mkdir -p {folder}')
    home = '' if args.samples or args.exact or args.compare else os.path.dirname(args.ckpt)
    args.results = args.results or os.path.join(home, 'results.jsonl')
    name = 'compare' if args.compare else 'sweep' if args.sweep else 'neighbours'
    args.out = args.out or os.path.join(os.path.dirname(args.results), f'{name}.png')


def check_counts(asked, n, n_ref):
    """Fewer images than an estimator needs are refused. n_ref None: no reference, or one whose
    statistics do not say."""
    for name in (name for name in METRICS if name in asked):
        of_ref = n_ref if 'statistics' in needs([name]) else None
        for count, what in ((n, '--n'), (of_ref, 'the reference: n')):
            if count is not None and count < METRICS[name].least:
                why = f' (the covariance of {POOL} features)' if name == 'fid' else ''
                raise BadInput(f'{what} {count}: --{name} needs {METRICS[name].least} images or '
                               f'more{why}; a metric for few images: --swd')


# ---------------------------------------------------------------- where images come from

def generated(flow, n, args, place, calls):
    """This rank's share of n samples, uint8; what each batch spent is appended to calls."""
    device, rank, world = place
    for _, x, nfe in flow.images(list(share_of_rank(n, rank, world)), args.batch_size, device, rank):
        calls.append(nfe)
        yield to_uint8(x)


def stored(images, n, args, place, label):
    """This rank's share of n evenly spaced images of a data set, uint8."""
    device, rank, world = place
    indices = torch.tensor(share_of_rank(n, rank, world)) * len(images) // n
    batches = read_batches(images, indices.split(args.batch_size), device, args.workers)
    return watch(batches, len(indices), label, rank)


def load_flows(args, device):
    """({run: Flow}, the images of --exact or None): of --ckpt, or of all of --compare, each
    under the name of its folder, or its own where two would be alike."""
    paths = args.compare or [args.ckpt]
    names = [os.path.basename(os.path.dirname(os.path.abspath(path))) for path in paths]
    names = paths if len(set(names)) < len(names) else names
    options = {name: vars(args)[name] for name in SAMPLING_FLAGS}
    if args.exact:
        images = load_images(args.dataset or 'glyphs', args.data_dir, args.image_size)
        return {names[0]: exact_flow(images, args.dataset, device, **options)}, images
    flows = {}
    for name, path in zip(names, paths):
        flows[name] = load_flow(path, device, weights=args.weights, compiled=args.compile,
                                dataset=args.dataset, data_dir=args.data_dir, bf16=args.bf16,
                                **options)
        if flows[name].shape != flows[names[0]].shape:
            raise BadInput(f'--compare {path}: makes images of {flows[name].shape}, the first '
                           'others; give checkpoints of one size')
    return flows, None


# ---------------------------------------------------------------- one pass over images

def collect(batches, n, net, resize, keep, place):
    """One pass over this rank's uint8 batches -> Measured over all ranks, on the CPU. net None: no
    features. keep: which of 'features' and 'pixels' to hold on to."""
    device, rank, world = place
    total = pfgm.float64(torch.zeros(POOL + 1, POOL, device=device))
    kept = {'features': [], 'pixels': []}
    for batch in batches:
        kept['pixels'].append(batch.cpu() if 'pixels' in keep else batch[:0])
        if net is not None:
            found = inception_features(net, batch, resize)
            kept['features'].append(found.cpu() if 'features' in keep else found[:0])
            found = pfgm.float64(found)
            total[0] += found.sum(0)
            total[1:] += found.T @ found
    total = sum(everywhere(total.cpu()))
    mu = total[0] / n
    sigma = (total[1:] - n * torch.outer(mu, mu)) / max(n - 1, 1)
    rows = {k: torch.cat(everywhere(torch.cat(kept[k]))) if k in keep else None for k in kept}
    return Measured(n, mu, sigma, **rows)


# ---------------------------------------------------------------- metrics

def bits_per_dim(flow, images, n, args, place):
    """Bits/dim of n evenly spaced images x = (pixel + U[0, 1)) / 256 * 2 - 1, and how far from x
    the flow comes back down from their latents. The noise of an image depends on --seed and its
    index, the probe on the batch it is in too."""
    device, rank, world = place
    how = dict(gamma=flow.gamma, z_exp=flow.z_exp, small_z=flow.small_z,
               rtol=args.bpd_tol, atol=args.bpd_tol)
    ends, rows = (flow.z_min, flow.z_max), []
    labels = images.labels if flow.classes else None
    if labels is not None:
        names = flow.class_names
        if names and images.classes and names != images.classes:
            raise BadInput(f'{images.given}: its classes are {", ".join(images.classes)}, those of '
                           f'the network {", ".join(names)}; leave them out with --classes none')
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= flow.class_count:
            raise BadInput(f'--dataset {images.name}: labels from {low} to {high}; the network '
                           f'knows 0 to {flow.class_count - 1}; leave the labels out with --classes none')
    mine = torch.tensor(share_of_rank(n, rank, world)) * len(images) // n
    for chunk in watch(mine.split(args.batch_size), len(mine), 'bits/dim', rank):
        pixels, repeats = images[chunk.tolist()].cpu(), []
        if labels is not None:
            how['labels'] = labels[chunk].to(device)
        for repeat in range(args.repeats):
            seeds = [step_seed(args.seed, i + repeat * 2 ** 32) for i in chunk.tolist()]
            draws = [torch.Generator().manual_seed(seed) for seed in seeds]
            noise = torch.stack([torch.rand(pixels.shape[1:], generator=g, dtype=torch.float64)
                                 for g in draws])
            x = (pixels + noise) / 128 - 1  # float64
            x = (x if isinstance(flow.net, pfgm.ExactField) else x.float()).to(device)
            try:
                up = pfgm.log_likelihood(flow.net, x, *ends, D=flow.D, generator=draws[0], **how)
                with torch.no_grad():
                    back, _ = pfgm.sample_ode(flow.net, up.latent, *ends[::-1], 'rk45', **how)
            except pfgm.SolverError as error:
                mend = DIVERGED if 'NaN' in str(error) else f'try --tol {10 * args.bpd_tol:g}'
                raise BadInput(f'--bpd: {error}; {mend}') from error
            error = (back - x).abs().flatten(1).cpu().double()
            calls = torch.full((len(x),), float(up.nfe), dtype=torch.float64)
            repeats.append(torch.stack([up.bpd.cpu(), error.mean(1), error.amax(1), calls], 1))
        rows.append(torch.stack(repeats, 1))                                 # (b, repeats, 4)
    bpd, error, worst, calls = torch.cat(everywhere(torch.cat(rows))).unbind(2)
    each = bpd.mean(1)  # the repeats of an image are no further images
    return dict(bpd=each.mean().item(), bpd_se=(each.std() / n ** 0.5).item() if n > 1 else None,
                n=n, repeats=args.repeats, nfe=calls.mean().item(),
                round_trip_mean=error.mean().item(), round_trip_max=worst.max().item())


def flow_metrics(asked, name, flow, ref, args, place):
    """bits/dim and straightness of a flow, printed, recorded, and returned as one flat dict."""
    device, rank, world = place
    images, split = (ref.test, 'test') if ref.test else (ref.train, 'training')
    clock, found = time.time(), {}
    if flow.student and set(OF_FLOWS) & set(asked):
        say(f'{name}: distilled into one call, so it has no flow, and no ' + ', '.join(OF_FLOWS))
        return {}
    if 'bpd' in asked:
        if flow.source is not None:
            raise BadInput(f'--bpd: {name} starts from images, of no known density; leave it out')
        count = min(256, args.n or 256) if args.compare else args.n or 256
        found = bits_per_dim(flow, images, min(count, len(images)), args, place)
    if 'straightness' in asked and isinstance(flow.net, VP):
        rows = [straightness(flow.net, flow.prior(part.tolist()).to(device),
                             flow.labels_of(part.tolist(), device))
                for part in torch.arange(args.n or 256).split(args.batch_size)]
        found['straightness'] = torch.cat(rows).mean().item()
    bad = [k for k in OF_FLOWS if not math.isfinite(found.get(k, 0))]
    if bad:
        raise BadInput(f'--{bad[0]}: not finite ({found[bad[0]]}); the network of {name} has '
                       'diverged; give another')
    if found and rank == 0:
        note = f'({split} images of {images.name})' if 'bpd' in asked else f'({name})'
        print('  '.join(f'{k} {v:.6g}' for k, v in found.items() if v is not None), '', note)
        about = dict(dataset=images.name, split=split) if 'bpd' in asked else {}
        how = dataclasses.replace(flow, solver='rk45', tol=args.bpd_tol)
        record_result(args, device, world, time.time() - clock,
                     {**(how.facts() if about else {}), **found, 'run': name, **about})
    return {k: found[k] for k in OF_FLOWS if k in found}


class Compared(NamedTuple):
    """What samples are measured against: data sets, and the features of the first."""
    name: str
    train: Optional[Images]
    test: Optional[Images]
    stats: Optional[Measured]           # of --ref, or of one pass over train
    inception: Optional[torch.nn.Module]
    weight: Optional[torch.Tensor]      # of its last layer

    def against(self, n):
        return f'{n} images against {self.stats and self.stats.n or "the"} of {self.name}'


# A metric of samples: (made: Measured, ref: Compared, args, where float64 is) -> (note, values) ...


def of_fid(made, ref, args, home):
    sides = (t.to(home) for side in (made, ref.stats) for t in (side.mu, side.sigma))
    yield f'{ref.against(made.n)}, {args.resize} resize', dict(fid=frechet(*sides))


def of_is(made, ref, args, home):
    logits = torch.cat([part.double() @ ref.weight.T for part in made.features.split(4096)])
    yield f'{made.n} images, 10 splits', dict(zip(('is', 'is_std'),
                                                  inception_score(logits, seed=args.seed)))


def of_kid(made, ref, args, home):
    mean, std, size = kid(made.features, ref.stats.features, home, seed=args.seed)
    few = ', not 1000: too few images' if size < 1000 else ''
    yield f'{ref.against(made.n)}, 100 subsets of {size}{few}', dict(kid=mean, kid_std=std)


def of_prc(made, ref, args, home):
    yield ref.against(made.n), dict(zip(('precision', 'recall'), precision_recall(
        made.features, ref.stats.features, home)))


def of_swd(made, ref, args, home):
    sets = [ref.train, ref.test] if ref.test else [ref.train]
    m = min(made.n, *map(len, sets))
    real = [pick_images(images, m, args.seed) for images in sets]
    values = [sliced_wasserstein(x, real[0], home) for x in (made.pixels[:m], *real[1:])]
    yield f'{m} images against {m} of {ref.name}', dict(zip(('swd', 'swd_of_test'), values))


def of_neighbours(made, ref, args, home):
    test = {'test': pick_images(ref.test, made.n, args.seed)} if ref.test else {}
    for kind, x in {'samples': made.pixels, **test}.items():
        distances, theirs = nearest_images(x, ref.train, home)
        marks = distances.quantile(torch.tensor([0, .05, .5, .95]).double()).tolist()
        yield f'{kind}: {len(x)} images, nearest of {len(ref.train)} of {ref.name}', {
            **{f'{kind}_{k}': v for k, v in zip(('min', 'q05', 'q50', 'q95'), marks)},
            f'{kind}_mean': distances.mean().item(), f'{kind}_copies': int((distances == 0).sum())}
        if kind == 'samples':  # the 32 closest, each left of its neighbour
            first = distances.argsort()[:32]
            grid = grid_of(torch.stack([x[first], theirs[first]], 1).flatten(0, 1), 8)
            write('--out', args.out, lambda file: grid.save(file, 'PNG'))
            print(f'wrote {args.out}')


class Metric(NamedTuple):
    help: str
    needs: str = ''                # pixels, features, statistics (of features)
    least: int = 0                 # images (of FID: more than features)
    of: Optional[Callable] = None  # None: bits_per_dim() or straightness(), of a flow

METRICS = {
    'fid': Metric('Frechet Inception distance to the reference', 'statistics', 2049, of_fid),
    'is': Metric('Inception Score, 10 splits', 'features', 10, of_is),
    'kid': Metric('kernel distance, 100 subsets of 1000', 'features statistics', 2, of_kid),
    'prc': Metric('precision and recall, 3 nearest neighbours of Inception features',
                  'features statistics', 4, of_prc),
    'swd': Metric('sliced Wasserstein distance of pixels, beside that of the test split', 'pixels',
                  0, of_swd),
    'neighbours': Metric('nearest training images, and a picture of the closest', 'pixels', 0,
                         of_neighbours),
    'judge': Metric('by a classifier of the labelled training set: Frechet distance of its '
                    'features, legible share, precision and recall', 'pixels', 129, of_judge),
    'bpd': Metric('bits/dim of the test split, dequantised, by rk45 (--tol: 1e-5)', 'pixels'),
    'straightness': Metric('of the lines of vp, subvp, ddpm, rf in their own time; 0 is straight'),
}

OF_FLOWS = [name for name, metric in METRICS.items() if not metric.of]


def needs(names):
    """What some metrics need: of pixels, features, statistics."""
    return {kind for name in names for kind in METRICS[name].needs.split()}


def measure(asked, made, ref, args, device):
    """All metrics of one set of samples, printed and returned as one flat dict."""
    home, found = torch.device('cpu') if device.type == 'mps' else device, {}
    for name in (name for name in METRICS if name in asked and METRICS[name].of):
        for note, values in METRICS[name].of(made, ref, args, home):
            found.update(values)
            print('  '.join(f'{k} {v:.6g}' for k, v in values.items()) + f'  ({note})', flush=True)
    return found


# ---------------------------------------------------------------- the run

def compared_with(args, wanted, train, trained_on, n, size, channels, place):
    """The Compared of --ref, --dataset, train, or the set named trained_on; and --save_stats."""
    device, rank, world = place
    which = 'random' if args.inception == 'random' else '2015-12-05'
    convention = f'{args.resize} resize, {which} Inception'
    test = stats = inception = weight = None
    if args.ref and args.ref.lower().endswith('.npz'):
        try:
            stats = read_stats(args.ref, convention)
        except ValueError as error:
            raise BadInput(f'--ref {error}') from error
    needed = needs(wanted)
    paired = {k for k in METRICS if {'features', 'statistics'} <= needs([k])}  # of the reference
    own = {'fid', 'is'} | (paired if stats and stats.features is not None else set())
    more = stats and (wanted - own or args.save_stats)  # than such a file has, but for its images
    if more and (args.save_stats or 'arr_0' not in np.load(args.ref).files):
        raise BadInput(f'--ref {args.ref}: statistics, which do for --{" --".join(sorted(own))} '
                       'only; give a folder, .zip or .npz of images')
    if args.ref:  # at its own size, as pytorch-fid reads it
        train = load_images(args.ref, args.data_dir, args.image_size,
                              flag='--ref') if more or not stats else None
        if more and rank == 0:
            print(f'--ref {args.ref}: its mu and sigma for --fid, its {len(train)} images for '
                  + ' '.join(f'--{name}' for name in sorted(wanted - own)), flush=True)
    elif not train and needed & {'pixels', 'statistics'}:
        name = args.dataset or trained_on or size == 32 and 'cifar10'  # a file of EDM names none
        if not name:
            raise BadInput(f'--ckpt {(args.compare or [args.ckpt])[0]}: does not say what it was '
                           'trained on; give --dataset')
        flag = '--dataset' if args.dataset else '--dataset of --ckpt'
        train = load_images(name, args.data_dir, size, channels, flag=flag)
    if 'pixels' in needed:
        if (train.channels, train.image_size) != (channels, size):
            raise BadInput(f'--ref {args.ref}: {train.image_size} pixels a side, {train.channels} '
                           f'channels; samples: {size}, {channels}; give --dataset {args.ref}')
        test = load_images(train.name, args.data_dir, size, channels, 'test', train.flag)
        test = test if test.apart else None
        if 'judge' in wanted and rank == 0:  # before any image is made
            judge_of(train, test or train, args.data_dir, device)
    least = min([n, *(len(images) for images in (train, test) if images)])
    asked = any(vars(args)[name] for name in METRICS)
    check_counts(wanted, n if asked else None, stats.n if stats else train and len(train))
    if least < world:
        raise BadInput(f'{least} images: fewer than the {world} processes; give more by --n')
    if needed & {'features', 'statistics'}:
        inception, weight = load_inception(args.inception, device, rank)
    if wanted & paired - own if stats else 'statistics' in needed:
        keep = {'features'} if wanted & paired else set()
        found = collect(stored(train, len(train), args, place, train.name), len(train), inception,
                        args.resize, keep, place)
        stats = found._replace(mu=stats.mu, sigma=stats.sigma) if stats else found
    if args.save_stats and rank == 0:
        write('--save_stats', args.save_stats, lambda file: np.savez(
            file, mu=stats.mu.numpy(), sigma=stats.sigma.numpy(), n=stats.n, convention=convention))
        print(f'wrote {args.save_stats}', flush=True)
    return Compared(train.name if train else args.ref, train, test, stats, inception, weight)


def evaluate(args, asked, name, flow, source, n, ref, place):
    """Measure one flow, or the images of source: [(a row of the table, a few of its images)]."""
    device, rank, world = place
    of_samples = {*asked} - {*OF_FLOWS}
    keep = needs(of_samples) | ({'pixels'} if args.compare else set())
    own, measured = flow_metrics(asked, name, flow, ref, args, place) if flow else {}, []
    points = [(flow.solver, flow.nfe) if flow else (None, None)]
    if args.sweep:
        points = [(solver, nfe) for solver in args.solvers or ['unipc']
                  for nfe in (args.sweep if solver != 'rk45' else [None])]
    for solver, nfe in points if of_samples else ():
        clock, calls = time.time(), []
        if flow:
            flow.solver, flow.nfe = solver, nfe
        batches = (generated(flow, n, args, place, calls) if flow else
                   stored(source, n, args, place, 'samples'))
        made = collect(batches, n, ref.inception, args.resize, keep, place)
        if rank > 0:
            continue
        seconds = time.time() - clock
        values = measure(asked, made, ref, args, device)
        how = dict(solver=solver, nfe=float(np.mean(calls))) if flow else {}
        how = {**(dict(run=name, method=flow.method) if args.compare else {}), **how}
        record_result(args, device, world, time.time() - clock, {
            'n': n, 'n_ref': ref.stats and ref.stats.n, 'reference': ref.name,
            'resize': args.resize, 'inception': args.inception,
            **(flow.facts() if flow else {}), **how, **values})
        measured.append(({**how, 'seconds': seconds, **values, **own},
                         made.pixels[:4] if args.compare else None))
    return measured


def show(args, measured, n):
    """The table of a sweep, a plot of its first metric, and a strip of samples."""
    curves, pictures, several = {}, {}, len(args.solvers or ()) > 1
    told = ['solver'] if not args.compare else ['run', 'solver'] if several else ['run']
    for row, pixels in measured:
        shown = next(k for k in row if k not in ('run', 'method', 'solver', 'nfe', 'seconds'))
        curve = ' '.join(row[key] for key in told)
        curves.setdefault(curve, []).append((row['nfe'], row[shown]))
        if args.compare and row['solver'] != 'rk45':
            pictures[curve] = torch.cat([pictures.get(curve, pixels[:0]), pixels])
    print_table([row for row, _ in measured])
    plot(curves, 'network calls an image (NFE)', shown.upper() + f', {n} images', args.out)
    if pictures:
        strip(pictures, [f'nfe {nfe}' for nfe in args.sweep],
                    f'{os.path.splitext(args.out)[0]}_samples.png')


def main(args):
    asked = [name for name in METRICS if vars(args)[name]]
    wanted = set(asked) | ({'fid'} if args.save_stats else set())
    check_flags(args, asked)
    device, rank, world = place = setup(args.device, float64=args.exact)

    # what is evaluated
    flows, source, train, trained_on, size, channels = {}, None, None, None, None, None
    if args.samples:
        source = load_images(args.samples, args.data_dir, args.image_size, flag='--samples')
        channels, size = source.channels, source.image_size
    elif asked or not (args.ref or args.dataset):
        flows, train = load_flows(args, device)
        first = next(iter(flows.values()))
        channels, size, trained_on = *first.shape[:2], first.dataset
        timed = any(isinstance(flow.net, VP) for flow in flows.values())
        if 'straightness' in asked and not timed:
            raise BadInput('--straightness: only vp, subvp, ddpm and rf have a time to be straight '
                           'in; give another --ckpt, or leave it out')
    inception = needs(wanted) & {'features', 'statistics'}
    n = args.n or (len(source) if source else 50000 if inception else 1000)
    if source and n > len(source):
        raise BadInput(f'--n {n}: --samples {args.samples} has {len(source)} images')

    ref = compared_with(args, wanted, train, trained_on, n, size, channels, place)
    measured = []
    for name, flow in (flows or {'': None}).items():
        measured += evaluate(args, asked, name, flow, source, n, ref, place)
    if args.sweep and rank == 0:
        show(args, measured, n)
    if rank == 0 and asked:
        print(f'results are in {args.results}')

if __name__ == '__main__':
    run(main, parse_args())
