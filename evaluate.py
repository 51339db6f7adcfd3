"""Measure samples of a Poisson flow, and the flow itself.

    python evaluate.py --fid                          # 50,000 images of out/ckpt.pt, its data set
    torchrun --nproc_per_node=8 -- evaluate.py --fid --is --kid --prc    # one pass on all GPUs
    python evaluate.py --fid --samples images/ --ref cifar10.npz         # without a network
    python evaluate.py --swd --neighbours             # no Inception weights needed
    python evaluate.py --bpd --repeats 5              # likelihood of the test split
    python evaluate.py --fid --sweep nfe=5,10,20,50 --solvers euler,unipc # a table, a plot
    python evaluate.py --compare out/*/ckpt.pt        # the same for several networks, and a strip
    python evaluate.py --dataset cifar10 --save_stats cifar10.npz        # for pytorch-fid, EDM
    python evaluate.py --solver_bench --dataset images.zip               # solvers, no network
    python evaluate.py --bench                                           # speed
    python evaluate.py --curves out/*/log.jsonl                          # loss against images seen

Every result is also a line of results.jsonl. FID: arXiv 1706.08500, IS: 1606.03498, KID:
1801.01401, precision and recall: 1904.06991, sliced Wasserstein: Bonneel et al. 2015.
"""
import contextlib
import copy
import functools
import json
import math
import os
import platform
import subprocess
import sys
import time
from typing import NamedTuple, Optional
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import data as datasets
import pfgm
import unet
from baselines import straightness
from launch import (BadInput, Parser, above, first_of_its_machine, peak_memory, run, setup, step_seed,
                    wait, write)
from sample import OFFICIAL_BY_SIZE, facts, flow_flags, follow, labels_of, load_flow, place_for, prior
from train import field_loss, flow_constants, grid_of, update
from unet import read_checkpoint

METRICS = {
    'fid': 'Frechet Inception distance to the reference',
    'is': 'Inception Score, 10 splits',
    'kid': 'kernel Inception distance, 100 subsets of 1000',
    'prc': 'precision and recall, 3 nearest neighbours of Inception features',
    'swd': 'sliced Wasserstein distance of pixels, beside that of the test split',
    'neighbours': 'distances to the nearest training images, and a picture of the closest pairs',
    'bpd': 'bits/dim of the test split, uniform dequantisation, always rk45 (--tol: 1e-5)',
    'straightness': 'of the lines of vp, subvp, ddpm and rf in their own time; 0 is straight',
}
OF_FLOWS = ('bpd', 'straightness')  # the others are of samples
SOLVERS = ('rk45', *pfgm.SOLVERS)
POOL = 2048  # features an image
INCEPTION = 'pt_inception-2015-12-05-6726825d.pth'
URL = f'https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION}'


def sweep_range(text):
    return [above(0, int)(part) for part in text.removeprefix('nfe=').split(',')]


def parse_args(argv=None):
    p = Parser(description=__doc__)
    for name, text in METRICS.items():
        p.add_argument(f'--{name}', action='store_true', help=text)
    p.add_argument('--solver_bench', action='store_true', help='all solvers of --solvers at the '
                   'NFEs of --sweep, in the exact field of --dataset: share of right ends')
    p.add_argument('--bench', action='store_true', help='time the field and the CIFAR-10 network')
    p.add_argument('--curves', nargs='+', metavar='LOG', help='plot the loss of these log.jsonl '
                   'files against images seen, a moving mean over a tenth of each')
    flow_flags(p)
    p.set_defaults(tol=None)
    p.add_argument('--n', type=above(0, int), default=None, help='images (default: all of '
                   '--samples; else 50000 with Inception metrics, 1000 without, 256 for bpd)')
    p.add_argument('--samples', default=None, help='evaluate this folder, .zip or .npz (arr_0)')
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
    p.add_argument('--sweep', type=sweep_range, metavar='nfe=5,10,20', help='network calls')
    p.add_argument('--compare', nargs='+', metavar='CKPT', help='sweep these side by side, with a '
                   'strip of samples from the same seeds (default: --swd --bpd, nfe=5,10,20,50; '
                   'bits/dim of up to 256 images)')
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
    alone = next((name for name in ('bench', 'solver_bench', 'curves') if vars(args)[name]), '')
    for wrong, message in (
        (not asked and not args.save_stats and not alone, 'no metric asked; give one or more of '
         + ' '.join(f'--{name}' for name in METRICS) + ', or --save_stats FILE.npz'),
        (not set(args.solvers or ()) <= set(SOLVERS),
         f'--solvers {solvers}: accepted: {",".join(SOLVERS)}, or some of them'),
        (alone and int(os.environ.get('WORLD_SIZE', 1)) > 1, f'--{alone}: of one process; run it '
         'without torchrun'),
        (solvers and not args.sweep and not args.solver_bench,
         f'--solvers {solvers}: belongs to --sweep nfe=5,10,20 or --solver_bench'),
        (alone and asked, f'--{alone}: runs alone; leave --{asked[0]} out' if asked else ''),
        (args.sweep and not alone and (not set(asked) - set(OF_FLOWS) or 'neighbours' in asked),
         '--sweep: give some of --fid --is --kid --prc --swd to sweep, and not --neighbours'),
        (args.compare and (alone or args.samples or args.exact), '--compare: of checkpoints; leave '
         '--samples, --exact and the benches out'),
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
        path = getattr(args, flag) or ''
        folder = os.path.dirname(path)
        if folder and not os.path.isdir(folder):
            raise BadInput(f'--{flag} {path}: no folder {folder}; make it with: mkdir -p {folder}')
    home = '' if (args.samples or args.exact or args.compare
                  or alone) else os.path.dirname(args.ckpt)
    args.results = args.results or os.path.join(home, 'results.jsonl')
    name = ('solvers' if args.solver_bench else 'compare' if args.compare else 'curves' if
            args.curves else 'sweep' if args.sweep else 'neighbours')
    args.out = args.out or os.path.join(os.path.dirname(args.results), f'{name}.png')


def check_counts(asked, n, n_ref):
    """Fewer images than an estimator needs are refused. n_ref None: no reference, or one whose
    statistics do not say."""
    for name, least in (('fid', POOL + 1), ('is', 10), ('kid', 2), ('prc', 4)):
        for count, what in ((n, '--n'), (None if name == 'is' else n_ref, 'the reference: n')):
            if name in asked and count is not None and count < least:
                why = f' (the covariance of {POOL} features)' if name == 'fid' else ''
                raise BadInput(f'{what} {count}: --{name} needs {least} images or more{why}; '
                               'a metric for few images: --swd')


# ---------------------------------------------------------------- where images come from

def share(n, rank, world):
    return range(n * rank // world, n * (rank + 1) // world)


def all_rows(rows, n, device, world):
    """The rows (n, ...) of all ranks on the CPU, from each rank's share of them."""
    if world == 1:
        return rows.cpu()
    wait()
    most = -(-n // world)
    mine = torch.zeros(most, *rows.shape[1:], dtype=rows.dtype, device=device)
    mine[:len(rows)] = rows.to(device)
    whole = mine.new_empty(world * most, *rows.shape[1:])
    dist.all_gather_into_tensor(whole, mine)
    parts = enumerate(whole.cpu().split(most))
    return torch.cat([part[:len(share(n, r, world))] for r, part in parts])


def watch(batches, count, label, rank):
    """The same batches, with a line every few seconds that says how long the rest will take."""
    start, said, done = time.time(), time.time(), 0
    for batch in batches:
        yield batch
        done += len(batch)
        now = time.time()
        if rank == 0 and (now - said > 5 or done == count):
            said, left = now, int((now - start) / done * (count - done))
            print(f'{label}: {done}/{count}  {done / (now - start):.1f} img/s  '
                  f'{left // 60}:{left % 60:02d} left', flush=True)


def generated(net, flow, n, args, place, calls):
    """This rank's share of n samples, uint8; what each batch spent is appended to calls."""
    device, rank, world = place
    for indices in torch.tensor(share(n, rank, world)).split(args.batch_size):
        indices = indices.tolist()
        x, nfe = follow(net, flow, prior(flow, args.seed, indices), device, indices)
        calls.append(nfe)
        yield datasets.to_uint8(x)


def stored(images, n, args, place):
    """This rank's share of n evenly spaced images of a data set, uint8."""
    device, rank, world = place
    indices = torch.tensor(share(n, rank, world)) * len(images) // n
    return datasets.batches(images, indices.split(args.batch_size), device, workers=4)


def pick(images, n, seed):
    """n images of a data set at random, uint8 on the CPU."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images[order[:n].sort().values.tolist()].cpu()


def load_images(flag, name, args, size=None, channels=None, split='train'):
    try:
        return datasets.load(name, args.data_dir, size, channels, split)
    except BadInput as error:
        raise BadInput(str(error).replace('--dataset', flag, 1)) from error


def load_flows(args, device):
    """({run: (net, flow)}, the images of --exact or None): of --ckpt, or of all of --compare, each
    under the name of its folder, or its own where two would be alike."""
    paths = args.compare or [args.ckpt]
    names = [os.path.basename(os.path.dirname(os.path.abspath(path))) for path in paths]
    names = paths if len(set(names)) < len(names) else names
    flows = {}
    for name, args.ckpt in zip(names, paths):
        net, flow, images = load_flow(args, device)
        flows[name] = net, flow
        if flow['shape'] != next(iter(flows.values()))[1]['shape']:
            raise BadInput(f'--compare {args.ckpt}: makes images of {flow["shape"]}, the first '
                           f'others; give checkpoints of one size')
    return flows, images


def training_set_of(args):
    """The name of what --ckpt was trained on."""
    saved = read_checkpoint(args.ckpt)['args']
    return saved.get('dataset') or OFFICIAL_BY_SIZE.get(saved['image_size'])


def held_out(train, args):
    """The test split beside a training set, or None for a path that has none."""
    test = load_images('--dataset', train.name, args, train.image_size, train.channels, 'test')
    if train.pixels is None or test.pixels is None:
        same = train.pixels is test.pixels and len(train) == len(test) and (
            list(train.source) == list(test.source) if train.root else
            all(map(np.array_equal, train.source, test.source)))
    else:
        same = torch.equal(train.pixels.cpu(), test.pixels)
    return None if same else test


# ---------------------------------------------------------------- Inception features

class Measured(NamedTuple):
    n: Optional[int]                  # images; None where a statistics file does not say
    mu: torch.Tensor                  # (2048,) float64
    sigma: torch.Tensor               # (2048, 2048) float64, ddof 1
    features: Optional[torch.Tensor]  # (n, 2048) float32, where asked for
    pixels: Optional[torch.Tensor]    # (n, C, H, W) uint8, where asked for


def random_weights(net):
    """He-normal weights from seed 0 under norms that do nothing: images keep features apart."""
    generator, state = torch.Generator().manual_seed(0), {}
    for name, like in net.state_dict().items():
        if like.dim() > 1:
            noise = torch.randn(like.shape, generator=generator)
            state[name] = noise * math.sqrt(2 / like[0].numel())
        else:
            one = name.endswith(('bn.weight', 'running_var'))
            state[name] = torch.full(like.shape, int(one), dtype=like.dtype)
    return state


def inception_file(path, rank):
    """The weights' path: as given, or torch hub's copy, downloaded once a machine if absent."""
    if path:
        if not os.path.isfile(path):
            raise BadInput(f'--inception {path}: no such file; get {URL}')
        return path
    path = os.path.join(torch.hub.get_dir(), 'checkpoints', INCEPTION)
    with first_of_its_machine():
        if not os.path.isfile(path):
            try:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                torch.hub.download_url_to_file(URL, path, hash_prefix='6726825d',
                                               progress=rank == 0)
            except Exception as error:  # a network can fail in any way
                raise BadInput(f'--inception: cannot download it ({error}); get {URL} by hand and '
                               f'put it at {path}, or give --inception FILE') from error
    return path


def repool(block, pool):
    """Give the block's pooling branch pool(x) of the block's x, not torchvision's own average."""
    inputs = []
    block.register_forward_pre_hook(lambda block, x: inputs.append(x[0]))
    block.branch_pool.register_forward_pre_hook(lambda conv, x: (pool(inputs.pop()),))


def load_inception(path, device, rank=0):
    """Inception "2015-12-05": (net, weight (1008, 2048)), net(x (B, 3, 299, 299)) -> (B, 2048).

    torchvision's network with the pooling of the TensorFlow graph: averages over what lies inside
    the image and, in the last block, a maximum (a slip, it seems, but every published FID's)."""
    from torchvision.models import Inception3
    with torch.device('meta'):
        net = Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    if path == 'random' and rank == 0:
        print('random Inception weights: the numbers mean nothing outside this run')
    file = path if path == 'random' else inception_file(path, rank)
    try:
        net.load_state_dict(random_weights(net) if path == 'random' else
                            torch.load(file, map_location='cpu', weights_only=True), assign=True)
    except Exception as error:  # a damaged or hostile file can fail in any way
        raise BadInput(f'--inception {file}: not the weights in {INCEPTION} '
                       f'({" ".join(str(error).split())[:150]}); get {URL}') from error
    inside = functools.partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1,
                               count_include_pad=False)
    for name in ('5b', '5c', '5d', '6b', '6c', '6d', '6e', '7b'):
        repool(getattr(net, f'Mixed_{name}'), inside)
    repool(net.Mixed_7c, functools.partial(F.max_pool2d, kernel_size=3, stride=1, padding=1))
    weight, net.fc = net.fc.weight.detach().double(), torch.nn.Identity()
    return net.to(device).eval().requires_grad_(False), weight


def resize_tf1(x, size=299):
    """TensorFlow 1's resize_bilinear: output i reads the input at i * length / size, without
    half-pixel centres or antialiasing. (B, C, H, W) -> (B, C, size, size)."""
    def between(length):
        at = torch.arange(size, device=x.device, dtype=x.dtype) * (length / size)
        low = at.long()
        return low, (low + 1).clamp_max(length - 1), at - low
    low, high, part = between(x.shape[3])
    x = x[..., low] + (x[..., high] - x[..., low]) * part
    low, high, part = between(x.shape[2])
    return x[..., low, :] + (x[..., high, :] - x[..., low, :]) * part[:, None]


@torch.no_grad()
def features(net, pixels, resize='tf1'):
    """uint8 (B, 1 or 3, H, W) on the device of net -> pool features (B, 2048), float32."""
    rows = []
    # Full float32: left to itself, cuDNN would round to TF32.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for x in pixels.expand(-1, 3, -1, -1).float().split(64):
            if resize == 'tf1':
                x = (resize_tf1(x) - 128) / 128
            else:
                x = F.interpolate(x / 255, (299, 299), mode='bilinear') * 2 - 1
            rows.append(net(x))
    return torch.cat(rows)


def collect(batches, n, net, resize, keep, place):
    """One pass over this rank's uint8 batches -> Measured over all ranks, on the CPU.

    net None: no features. keep: which of 'features' and 'pixels' to hold on to."""
    device, rank, world = place
    home = 'cpu' if device.type == 'mps' else device  # MPS has no float64
    total = torch.zeros(POOL + 1, POOL, dtype=torch.float64, device=home)
    kept = {'features': [], 'pixels': []}
    for batch in batches:
        kept['pixels'].append(batch.cpu() if 'pixels' in keep else batch[:0])
        if net is not None:
            found = features(net, batch, resize)
            kept['features'].append(found.cpu() if 'features' in keep else found[:0])
            found = pfgm.float64(found)
            total[0] += found.sum(0)
            total[1:] += found.T @ found
    if world > 1:
        wait()  # for whoever is behind, longer than a collective does
        dist.all_reduce(total)
    mu = total[0] / n
    sigma = (total[1:] - n * torch.outer(mu, mu)) / max(n - 1, 1)
    rows = {k: all_rows(torch.cat(kept[k]), n, device, world) if k in keep else None for k in kept}
    return Measured(n, mu.cpu(), sigma.cpu(), **rows)


def read_stats(path, convention):
    """Measured from a statistics file, or None for a .npz that is none: images."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {k: np.lib.format.read_array(datasets.open_entry(file.zip, f'{k}.npy'))
                     for k in ('mu', 'sigma', 'n', 'convention') if k in file.files}
        n = int(found['n']) if 'n' in found else None
    except Exception as error:  # a damaged or hostile file can fail in any way
        raise BadInput(f'--ref {path}: cannot be read ({error}); accepted: a folder, .zip or .npz '
                       'of images, or a .npz of mu and sigma') from error
    if not {'mu', 'sigma'} & found.keys():
        return None
    shapes = [found[k].shape if k in found else None for k in ('mu', 'sigma')]
    if shapes != [(POOL,), (POOL, POOL)] or not all(
            found[k].dtype.kind == 'f' and np.isfinite(found[k]).all() for k in ('mu', 'sigma')):
        raise BadInput(f'--ref {path}: mu {shapes[0]}, sigma {shapes[1]}, or not finite; accepted: '
                       f'({POOL},) and ({POOL}, {POOL}), as --save_stats writes')
    if str(found.get('convention', convention)) != convention:
        raise BadInput(f'--ref {path}: made with {found["convention"]}, not {convention}; give the '
                       'same --resize and --inception, or make it again with --save_stats')
    mu, sigma = (torch.from_numpy(found[k]).double() for k in ('mu', 'sigma'))
    return Measured(n, mu, sigma, None, None)


# ---------------------------------------------------------------- metrics

def frechet(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), of float64 tensors (d,), (d, d) -> float."""
    # S1 S2 has the eigenvalues of the symmetric R S2 R, R = S1^(1/2): real, and >= 0 but for
    # rounding, also where S1 or S2 is singular.
    values, vectors = torch.linalg.eigh(sigma1)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    product = root @ sigma2 @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross)


def inception_score(logits, splits=10, seed=0):
    """exp(mean KL(p(y|x) || p(y))) of each split of the shuffled logits (n, K) -> (mean, std)."""
    order = torch.from_numpy(np.random.RandomState(seed).permutation(len(logits)))
    scores = []
    for part in order.tensor_split([k * len(order) // splits for k in range(1, splits)]):
        log_p = logits[part].double().log_softmax(1)
        p = log_p.exp()
        scores.append((p * log_p - torch.xlogy(p, p.mean(0))).sum(1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def kid(x, y, device='cpu', subsets=100, size=1000, seed=0):
    """Unbiased MMD^2 of features x (n, d), y (m, d) with the kernel (x.y / d + 1)^3, over random
    subsets of `size`, or of all where there are fewer -> (mean, std over subsets, size)."""
    draw, size, values = np.random.RandomState(seed), min(size, len(x), len(y)), []
    for _ in range(subsets):
        a, b = (t[draw.choice(len(t), size, replace=False)].to(device, torch.float64)
                for t in (x, y))
        aa, bb, ab = ((s @ t.T / s.shape[1] + 1) ** 3 for s, t in ((a, a), (b, b), (a, b)))
        within = aa.sum() - aa.trace() + bb.sum() - bb.trace()
        values.append((within / (size * (size - 1)) - 2 * ab.mean()).item())
    return float(np.mean(values)), float(np.std(values)), size


def distance2(x, y):
    """Squared distances (n, m) between float64 rows; exactly 0 between equal ones."""
    scale = x.square().sum(1)[:, None] + y.square().sum(1)
    d2 = torch.addmm(scale, x, y.T, alpha=-2)
    return torch.where(d2 < 1e-13 * scale, 0, d2)


def precision_recall(made, real, device='cpu', k=3):
    """(share of `made` inside the manifold of `real`, share of `real` inside that of `made`) from
    features (n, d). A manifold: balls around all its points, each out to the k-th nearest other."""
    def inside(x, points):
        radius2 = torch.cat([distance2(part, points).kthvalue(k + 1).values  # the first is itself
                             for part in points.split(1024)])
        hits = [(distance2(part, points) <= radius2).any(1) for part in x.split(1024)]
        return torch.cat(hits).double().mean().item()
    made, real = (x.to(device, torch.float64) for x in (made, real))
    return inside(made, real), inside(real, made)


def sliced_wasserstein(x, y, device='cpu', projections=512, seed=0):
    """Root mean square, over random directions, of the 2-Wasserstein distance along them, of as
    many uint8 images x as y (n, C, H, W), in [-1, 1]."""
    ways = torch.randn(x[0].numel(), projections, dtype=torch.float64,
                       generator=torch.Generator().manual_seed(seed))
    ways = (ways / ways.norm(dim=0) / 127.5).to(device)
    a, b = (torch.cat([part.flatten(1).to(device).double() @ ways for part in images.split(2048)])
            .sort(dim=0).values for images in (x, y))
    return (a - b).square().mean().sqrt().item()


def nearest(x, train, device='cpu'):
    """The nearest image of a data set to each of x uint8, mirrored too if training mirrors:
    (distances (n,) in [-1, 1], those images like x)."""
    rows = x.flatten(1).to(device, torch.float64)
    best = torch.full((len(x),), math.inf, dtype=torch.float64, device=device)
    found = torch.zeros_like(x, device=device)
    for batch in datasets.batches(train, torch.arange(len(train)).split(512), device, workers=4):
        for side in (batch, batch.flip(-1)) if train.flip else (batch,):
            d2, which = distance2(rows, side.flatten(1).double()).min(1)
            closer = d2 < best
            best[closer], found[closer] = d2[closer], side[which[closer]]
    return best.sqrt().cpu() / 127.5, found.cpu()


def bits_per_dim(net, flow, images, n, args, place):
    """Bits/dim of n evenly spaced images x = (pixel + U[0, 1)) / 256 * 2 - 1, and how far from x
    the flow comes back down from their latents. RK45: few fixed steps would give any number.
    The noise of an image depends on --seed and its index, the probe on the batch it is in too."""
    device, rank, world = place
    exact = isinstance(net, pfgm.ExactField)
    if not exact:
        net.requires_grad_(False)  # only the gradient with respect to x is wanted
    how = dict(gamma=flow['gamma'], z_exp=flow['z_exp'], small_z=flow['small_z'],
               rtol=args.bpd_tol, atol=args.bpd_tol)
    ends, rows = (flow['z_min'], flow['z_max']), []
    if flow['classes'] and images.labels is not None:
        low, high = int(images.labels.min()), int(images.labels.max())
        if low < 0 or high >= flow['known']:
            raise BadInput(f'--dataset {images.name}: labels from {low} to {high}; the network knows '
                           f'0 to {flow["known"] - 1}; leave the labels out with --classes none')
    chunks = (torch.tensor(share(n, rank, world)) * len(images) // n).split(args.batch_size)
    for chunk in watch(chunks, len(share(n, rank, world)), 'bits/dim', rank):
        pixels, repeats = images[chunk.tolist()].cpu(), []
        if flow['classes'] and images.labels is not None:
            how['labels'] = images.labels[chunk].to(device)
        for repeat in range(args.repeats):
            seeds = [step_seed(args.seed, i + repeat * 2 ** 32) for i in chunk.tolist()]
            draws = [torch.Generator().manual_seed(seed) for seed in seeds]
            noise = torch.stack([torch.rand(pixels.shape[1:], generator=g, dtype=torch.float64)
                                 for g in draws])
            x = (pixels + noise) / 128 - 1  # float64
            x = (x if exact else x.float()).to(device)
            try:
                up = pfgm.log_likelihood(net, x, *ends, D=flow['D'], generator=draws[0], **how)
                with torch.no_grad():
                    back, _ = pfgm.sample_ode(net, up.latent, *ends[::-1], 'rk45', **how)
            except pfgm.SolverError as error:
                raise BadInput(f'--bpd: {error}; try --tol {10 * args.bpd_tol:g}') from error
            error = (back - x).abs().flatten(1).cpu().double()
            calls = torch.full((len(x),), float(up.nfe), dtype=torch.float64)
            repeats.append(torch.stack([up.bpd.cpu(), error.mean(1), error.amax(1), calls], 1))
        rows.append(torch.stack(repeats, 1))                                 # (b, repeats, 4)
    bpd, error, worst, calls = all_rows(torch.cat(rows), n, device, world).unbind(2)
    each = bpd.mean(1)  # the repeats of an image are no further images
    return dict(bpd=each.mean().item(), bpd_se=(each.std() / n ** 0.5).item() if n > 1 else None,
                n=n, repeats=args.repeats, nfe=calls.mean().item(),
                round_trip_mean=error.mean().item(), round_trip_max=worst.max().item())


def flow_metrics(asked, name, net, flow, images, split, args, place):
    """bits/dim and straightness of a flow, printed, recorded, and returned as one flat dict."""
    device, rank, world = place
    clock, found = time.time(), {}
    if flow.get('student') and set(OF_FLOWS) & set(asked):
        print(f'{name}: distilled into one call, so it has no flow, and no ' + ', '.join(OF_FLOWS))
        return {}
    if 'bpd' in asked:
        count = min(256, args.n or 256) if args.compare else args.n or 256
        found = bits_per_dim(net, flow, images, min(count, len(images)), args, place)
    if 'straightness' in asked and hasattr(net, 'planes'):
        rows = [straightness(net, prior(flow, args.seed, part.tolist()).to(device),
                             labels_of(flow, part.tolist(), device))
                for part in torch.arange(args.n or 256).split(args.batch_size)]
        found['straightness'] = torch.cat(rows).mean().item()
    bad = [k for k in OF_FLOWS if not math.isfinite(found.get(k, 0))]
    if bad:
        raise BadInput(f'--{bad[0]}: not finite ({found[bad[0]]}); the network of {name} has diverged')
    if found and rank == 0:
        note = f'({split} images of {images.name})' if 'bpd' in asked else f'({name})'
        print('  '.join(f'{k} {v:.6g}' for k, v in found.items() if v is not None), '', note)
        about = dict(dataset=images.name, split=split) if 'bpd' in asked else {}
        how = facts(net, dict(flow, solver='rk45', tol=args.bpd_tol)) if 'bpd' in asked else {}
        record(args, device, world, time.time() - clock, {**how, **found, 'run': name, **about})
    return {k: found[k] for k in OF_FLOWS if k in found}


def measure(asked, made, ref, weight, train, test, args, device):
    """All metrics of one set of samples but bpd, printed and returned as one flat dict."""
    home, found = 'cpu' if device.type == 'mps' else device, {}
    name, n = train.name if train else args.ref, made.n
    against = f'{n} images against {ref and ref.n or "the"} of {name}'

    def say(note, **values):
        found.update(values)
        print('  '.join(f'{k} {v:.6g}' for k, v in values.items()) + f'  ({note})', flush=True)
    if 'fid' in asked:
        say(f'{against}, {args.resize} resize',
            fid=frechet(*(t.to(home) for t in (made.mu, made.sigma, ref.mu, ref.sigma))))
    if 'is' in asked:
        logits = torch.cat([part.double() @ weight.T for part in made.features.split(4096)])
        mean, std = inception_score(logits, seed=args.seed)
        say(f'{n} images, 10 splits', **{'is': mean, 'is_std': std})
    if 'kid' in asked:
        mean, std, size = kid(made.features, ref.features, home, seed=args.seed)
        few = f', not 1000: too few images' if size < 1000 else ''
        say(f'{against}, 100 subsets of {size}{few}', kid=mean, kid_std=std)
    if 'prc' in asked:
        precision, recall = precision_recall(made.features, ref.features, home)
        say(against, precision=precision, recall=recall)
    if 'swd' in asked:
        sets = [train, test] if test else [train]
        m = min(n, *map(len, sets))
        real = [pick(images, m, args.seed) for images in sets]
        values = [sliced_wasserstein(x, real[0], home) for x in (made.pixels[:m], *real[1:])]
        say(f'{m} images against {m} of {name}', **dict(zip(('swd', 'swd_of_test'), values)))
    if 'neighbours' in asked:
        sets = {'samples': made.pixels, **({'test': pick(test, n, args.seed)} if test else {})}
        for kind, x in sets.items():
            distances, theirs = nearest(x, train, home)
            marks = distances.quantile(torch.tensor([0, .05, .5, .95]).double()).tolist()
            say(f'{kind}: {len(x)} images, nearest of {len(train)} of {name}',
                **{f'{kind}_{k}': v for k, v in zip(('min', 'q05', 'q50', 'q95'), marks)},
                **{f'{kind}_mean': distances.mean().item(),
                   f'{kind}_copies': int((distances == 0).sum())})
            if kind == 'samples':  # the 32 closest, each left of its neighbour
                first = distances.argsort()[:32]
                grid = grid_of(torch.stack([x[first], theirs[first]], 1).flatten(0, 1), 8)
                write('--out', args.out, lambda file: grid.save(file, 'PNG'))
                print(f'wrote {args.out}')
    return found


# ---------------------------------------------------------------- solvers, without a network

def solver_bench(args):
    """How many samples end at the training image that RK45 at 1e-8 leads them to, and the RMSE, for
    each solver, schedule and NFE, in the exact field of --dataset: a table and a plot."""
    args.exact = True
    device, _, world = place_for(args)
    images = load_images('--dataset', args.dataset or 'glyphs', args, args.image_size)
    if images.pixels is None:
        raise BadInput(f'--solver_bench --dataset {images.name}: does not fit in memory')
    published = (images.channels, images.image_size) == (3, 32)
    flow = flow_constants(images, 'cifar10' if published else args.dataset)
    charges = datasets.to_float(images.pixels.to(device)).double()
    net, n = pfgm.ExactField(charges), args.n or 256
    start = pfgm.sample_prior((n, *charges.shape[1:]), flow['z_max'], flow['upper_norm'],
                              generator=torch.Generator().manual_seed(args.seed),
                              device=device, dtype=torch.float64)
    clock, z_last = time.time(), pfgm.deciding_z(charges)

    def follow(*how, **more):
        parts = [pfgm.sample_ode(net, x, flow['z_max'], *how, z_exp=0, **more)
                 for x in start.split(args.batch_size)]
        return torch.cat([x for x, _ in parts]), max(calls for _, calls in parts)

    def which(x):
        return torch.cat([distance2(part, charges.flatten(1)).argmin(1)
                          for part in x.flatten(1).split(64)])
    end, calls = follow(1e-3, 'rk45', rtol=1e-8, atol=1e-8)
    right = which(end)
    print(f'{n} starts on z = {flow["z_max"]:.4g}, |x| <= {flow["upper_norm"]:.4g}, {len(charges)} '
          f'images; RK45 at 1e-8: {calls} calls; the weights decide above z = {z_last:.3g}; '
          f'{time.time() - clock:.0f} s', flush=True)
    curves = {}
    grids = (('log', z_last), ('radius', z_last), ('rho7', 1e-3))
    for name, schedule, low in [(solver, *grid) for solver in args.solvers or SOLVERS
                                for grid in (grids if solver != 'rk45' else (('', 1e-3),))]:
        row = []
        for nfe in args.sweep or (5, 10, 20, 35):
            x, nfe = (follow(1e-3, 'rk45') if name == 'rk45' else
                      follow(low, name, nfe, schedule_name=schedule, to_data=True))
            same = (which(x) == right).double().mean().item()
            error = (x - charges[right]).square().mean().sqrt().item()
            row.append(f'nfe {nfe}: {same:.3f} {error:.3f}')
            if schedule in ('', 'radius') or (name, schedule) == ('euler', 'rho7'):
                curves.setdefault(f'{name} {schedule}', []).append((nfe, error))
            record(args, device, world, time.time() - clock, dict(
                solver=name, schedule=schedule, z_min=low, nfe=nfe, same_image=same, rmse=error,
                n=n, reference=images.name))
            if name == 'rk45':
                break
        print(f'{name:>6} {schedule:6}  ' + '   '.join(row), flush=True)
    plot(curves, 'network calls an image (NFE)', 'RMSE to the right image', args.out)


# ---------------------------------------------------------------- speed

BENCH_CHARGES = (4096, 50000)


def seconds(device, *works, repeats=5):
    """Median times of some functions, called in turn, so that what else slows the machine slows
    them alike; after one call of each that warms up."""
    times = []
    for work in works * (repeats + 1):
        clock = time.perf_counter()
        work()
        if device.type == 'cuda':
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - clock)
    return np.median(np.reshape(times, (-1, len(works)))[1:], 0).tolist()


def network_work(what, x, z, target, bf16):
    """A function that makes one forward, or one update as train.py does (loss, clip, Adam, EMA),
    of the CIFAR-10 network: as here, or the plain way, which is float32, channels first, and
    PyTorch's own group norm and dropout."""
    net = unet.UNet().to(x.device).train(what != 'forward')
    net.to(memory_format=torch.channels_last if bf16 else torch.contiguous_format)
    plain = [] if bf16 else [patch.object(unet.Norm, 'forward', torch.nn.GroupNorm.forward),
                             patch.object(unet, 'dropout', F.dropout)]
    opt = torch.optim.Adam(net.parameters(), lr=1e-4, fused=True)
    ema = copy.deepcopy(net).requires_grad_(False)

    def work():
        with contextlib.ExitStack() as stack:
            for change in plain:
                stack.enter_context(change)
            stack.enter_context(torch.autocast(x.device.type, torch.bfloat16, enabled=bf16))
            if what == 'forward':
                with torch.no_grad():
                    return net(x, z)
            loss = field_loss(net, 'sum', x, z, *target, torch.ones_like(z))
        loss.mean().backward()
        return update(net, ema, opt, 1.0, 0.9999)
    return work


def bench(args):
    """The field and the CIFAR-10 network at their real sizes: medians, memory, ratios to the plain
    way in the same run, and the share of the rate of matrix products, called in turn with them."""
    device, *_ = setup(args.device)
    big = device.type == 'cuda'

    def peak():
        return peak_memory(device) or math.nan
    generator = torch.Generator(device).manual_seed(args.seed)
    a, cases = torch.randn(2048, 2048, device=device, dtype=torch.float64), []
    out = a @ a
    for K in BENCH_CHARGES:
        y = torch.rand(K, 3, 32, 32, generator=generator, device=device).mul_(2).sub_(1)
        x, z = pfgm.perturb(y[:128], 291, generator=generator)
        before = peak()
        times = seconds(device, lambda: pfgm.poisson_field(x, z, y),
                        lambda: torch.mm(a, a, out=out))
        cases.append((x, z, y, times, peak() - before))
    for x, z, y, (t, product), more in cases:  # the float64 field takes more memory, hence later
        exact = pfgm.poisson_field(x.double(), z.double(), y.double())
        error = max((a - b).norm() / b.norm() for a, b in zip(pfgm.poisson_field(x, z, y), exact))
        floor = product * 2 * x.numel() * len(y) / len(out) ** 3
        print(f'field, 128 points, {len(y)} charges: {t:.3f} s, {more:.2f} GB more, relative error '
              f'{error:.1e}, {floor / t:.0%} of the rate of float64 products', flush=True)
    a = torch.randn(4096, 4096, device=device).bfloat16()
    for what, B in (('forward', 128 if big else 16), ('training step', 128 if big else 8)):
        x, z = pfgm.perturb(y[:B], 291, generator=generator)
        target = pfgm.poisson_field(x, z, y[:4096])
        plain, ours = (network_work(what, x, z, target, bf16) for bf16 in (False, True))
        with torch.autocast(device.type, torch.bfloat16, enabled=what == 'forward'):
            # weights are cast once, as over the calls of a sampler
            *times, product = seconds(device, plain, ours, lambda: a @ a)
        if what == 'forward':  # a flow that costs nothing leaves the solver's own time
            start, calls = pfgm.sample_prior(x.shape, 40.0, 3e3, device=device), []
            own, = seconds(device, lambda: calls.append(pfgm.sample_ode(
                lambda x, z: (-x, -z), start, 40.0, 1e-3, z_exp=0, each=True)[1]))
            print(f'RK45, {B} images: {own / calls[0] * 1e3:.1f} ms a call beside the network, '
                  f'{own / calls[0] / times[0]:.1%} of its float32 forward', flush=True)
        with FlopCounterMode(display=False) as flops:
            ours()
        rate = 2 * len(a) ** 3 / product
        print(f'{what}, {B} images of CIFAR-10: {times[1]:.3f} s in bfloat16, plain float32 '
              f'{times[0]:.3f} s, ratio {times[0] / times[1]:.2f}; {peak():.1f} GB; '
              f'{flops.get_total_flops() / times[1] / rate:.0%} of the rate of bfloat16 products '
              f'in between, {rate / 1e12:.2f} TFLOP/s', flush=True)


# ---------------------------------------------------------------- plots and records

def axis(values, start, end):
    """(position of a value in pixels, round values to mark), log where values span a decade."""
    low, high = min(values), max(values)
    log = low > 0 and high >= 10 * low
    to, back = (math.log10, lambda a: 10 ** a) if log else (float, float)
    margin = 0.06 * (to(high) - to(low)) or 0.1 * abs(low) or 1
    low, high = to(low) - margin, to(high) + margin
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    step = next(m * step for m in (1, 2, 5, 10) if high - low <= 7 * m * step)
    marks = [m * 10.0 ** e for e in range(math.floor(low), math.ceil(high)) for m in (1, 2, 5)
             ] if log else [k * step for k in range(math.ceil(low / step), int(high // step) + 1)]
    return (lambda value: start + (end - start) * (to(value) - low) / (high - low),
            [mark for mark in marks if back(low) <= mark <= back(high)])


def plot(curves, xlabel, ylabel, path):
    """A 960 x 640 PNG of curves {name: [(x, y), ...]} with ticks and a legend."""
    from PIL import Image, ImageDraw, ImageFont
    left, top, right, bottom, font = 110, 30, 930, 560, ImageFont.load_default(size=20)
    points = [p for points in curves.values() for p in points]
    across, x_marks = axis([x for x, _ in points], left, right)
    up, y_marks = axis([y for _, y in points], bottom, top)
    image = Image.new('RGB', (960, 640), 'white')
    draw = ImageDraw.Draw(image)
    for mark in x_marks:
        draw.line([across(mark), top, across(mark), bottom], '#dddddd')
        draw.text((across(mark), bottom + 8), f'{mark:g}', 'black', font, 'mt')
    for mark in y_marks:
        draw.line([left, up(mark), right, up(mark)], '#dddddd')
        draw.text((left - 8, up(mark)), f'{mark:g}', 'black', font, 'rm')
    draw.rectangle([left, top, right, bottom], None, 'black')
    draw.text(((left + right) / 2, 632), xlabel, 'black', font, 'mb')
    turned = Image.new('L', (bottom - top, 30))
    ImageDraw.Draw(turned).text(((bottom - top) / 2, 15), ylabel, 255, font, 'mm')
    image.paste('black', (8, top), turned.rotate(90, expand=True))
    colours = '#1f5fbf #d1402f #2c8a3d #8a4fbf #c78a00 #00899b #777777 #000000'.split()
    legend = right - 20 - max(font.getlength(name) for name in curves)
    for k, (name, points) in enumerate(curves.items()):
        colour, v = colours[k % len(colours)], top + 24 + 28 * k
        spots = [(across(x), up(y)) for x, y in sorted(points)]
        draw.line(spots, colour, 3)
        for x, y in spots:
            draw.ellipse([x - 5, y - 5, x + 5, y + 5], colour)
        draw.line([legend - 45, v, legend - 10, v], colour, 3)
        draw.text((legend, v), name, 'black', font, 'lm')
    write('--out', path, lambda file: image.save(file, 'PNG'))
    print(f'wrote {path}')


def loss_curves(args):
    """The loss of each log of train.py against images seen, as --out."""
    curves = {}
    for path in args.curves:
        try:
            with open(path) as file:
                rows = [json.loads(line) for line in file]
            points = [(row['images'], row['loss']) for row in rows]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(f'--curves {path}: not a log.jsonl of train.py ({error})') from error
        if len(points) < 2:
            raise BadInput(f'--curves {path}: {len(points)} lines; two or more make a curve')
        window = max(len(points) // 10, 1)
        name = os.path.basename(os.path.dirname(os.path.abspath(path)))
        curves[name if name not in curves else path] = [
            tuple(np.mean(points[max(k - window, 0):k], axis=0)) for k in range(1, len(points) + 1)]
    plot(curves, 'images seen', 'training loss', args.out)


def strip(rows, heads, path):
    """A PNG of samples: a row for each of {name: uint8 (k, C, H, W)}, its heads spread over it."""
    from PIL import Image, ImageDraw, ImageFont
    font = ImageFont.load_default(size=20)
    grid = grid_of(torch.cat(list(rows.values())), len(next(iter(rows.values()))))
    left = 20 + int(max(font.getlength(name) for name in rows))
    image = Image.new('RGB', (left + grid.width, 30 + grid.height), 'white')
    image.paste(grid, (left, 30))
    draw = ImageDraw.Draw(image)
    for k, name in enumerate(rows):
        draw.text((10, 30 + (k + 0.5) * grid.height / len(rows)), name, 'black', font, 'lm')
    for k, head in enumerate(heads):
        draw.text((left + (k + 0.5) * grid.width / len(heads), 15), head, 'black', font, 'mm')
    write('--out', path, lambda file: image.save(file, 'PNG'))
    print(f'wrote {path}')


def print_table(rows):
    keys = list(dict.fromkeys(k for row in rows for k in row))
    for row in [dict(zip(keys, keys)), *rows]:
        print('  '.join(f'{v:>10}' if isinstance(v, str) else f'{v:>10.5g}'
                        for v in (row.get(k, '-') for k in keys)))


def record(args, device, world, seconds, values):
    """Append one line to --results: the values, and what it takes to get them again."""
    try:
        git = subprocess.run(['git', 'describe', '--always', '--dirty'], capture_output=True,
                             text=True, timeout=10, cwd=os.path.dirname(os.path.abspath(__file__)))
        revision = git.stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        revision = None
    name = (torch.cuda.get_device_name(device) if device.type == 'cuda' else
            f'{device.type}, {platform.machine()}, {os.cpu_count()} cores')
    row = dict(command=' '.join(sys.argv), time=time.strftime('%Y-%m-%dT%H:%M:%S%z'), git=revision,
               torch=torch.__version__, hardware=f'{world} x {name}', seconds=round(seconds, 1),
               seed=args.seed, **values)
    try:
        with open(args.results, 'a') as file:
            file.write(json.dumps(row) + '\n')
    except OSError as error:
        raise BadInput(f'--results {args.results}: cannot be written ({error})') from error


def main(args):
    asked = [name for name in METRICS if vars(args)[name]]
    wanted = set(asked) | ({'fid'} if args.save_stats else set())
    check_flags(args, asked)
    if args.curves:
        return loss_curves(args)
    if args.solver_bench or args.bench:
        return (bench if args.bench else solver_bench)(args)
    device, rank, world = place = place_for(args)

    # what is evaluated
    flows, source, train, stats, test = {}, None, None, None, None
    channels = size = None
    if args.samples:
        source = load_images('--samples', args.samples, args)
        channels, size = source.channels, source.image_size
    elif asked or not (args.ref or args.dataset):
        flows, train = load_flows(args, device)
        channels, size = next(iter(flows.values()))[1]['shape'][:2]
        timed = any(hasattr(net, 'planes') for net, _ in flows.values())
        if 'straightness' in asked and not timed:
            raise BadInput('--straightness: only vp, subvp, ddpm and rf have a time to be straight '
                           'in; give another --ckpt, or leave it out')
    inception_wanted = wanted & {'fid', 'is', 'kid', 'prc'}
    n = args.n or (len(source) if source else 50000 if inception_wanted else 1000)
    if source and n > len(source):
        raise BadInput(f'--n {n}: --samples {args.samples} has {len(source)} images')

    # what it is compared with
    which = 'random' if args.inception == 'random' else '2015-12-05'
    convention = f'{args.resize} resize, {which} Inception'
    if args.ref and args.ref.lower().endswith('.npz'):
        stats = read_stats(args.ref, convention)
    if stats and (args.save_stats or wanted - {'fid', 'is'}):
        raise BadInput(f'--ref {args.ref}: statistics, which do for --fid only; give a folder, '
                       '.zip or .npz of images')
    if args.ref:  # at its own size, as pytorch-fid reads it
        train = None if stats else load_images('--ref', args.ref, args)
    elif not train and wanted - {'is', 'straightness'}:
        name = args.dataset or training_set_of(args)
        train = load_images('--dataset', name, args, size, channels)
    if wanted & {'swd', 'neighbours', 'bpd'}:
        if (train.channels, train.image_size) != (channels, size):
            raise BadInput(f'--ref {args.ref}: {train.image_size} pixels a side, {train.channels} '
                           f'channels; samples: {size}, {channels}; give --dataset {args.ref}')
        test = held_out(train, args)
    least = min([n, *(len(images) for images in (train, test) if images)])
    check_counts(wanted, n if asked else None, len(train) if train else stats and stats.n)
    if least < world:
        raise BadInput(f'{least} images: fewer than the {world} processes; give more by --n')

    # one pass over the reference
    inception = weight = ref = None
    if inception_wanted:
        inception, weight = load_inception(args.inception, device, rank)
    if wanted & {'fid', 'kid', 'prc'}:
        keep = {'features'} if wanted & {'kid', 'prc'} else set()
        ref = stats or collect(
            watch(stored(train, len(train), args, place), len(share(len(train), rank, world)),
                  train.name, rank), len(train), inception, args.resize, keep, place)
    if args.save_stats and rank == 0:
        write('--save_stats', args.save_stats, lambda file: np.savez(
            file, mu=ref.mu.numpy(), sigma=ref.sigma.numpy(), n=ref.n, convention=convention))
        print(f'wrote {args.save_stats}', flush=True)

    # one pass over the samples, for each point of a sweep, of each flow
    keep = ({'features'} if wanted & {'is', 'kid', 'prc'} else set()) | (
        {'pixels'} if wanted & {'swd', 'neighbours'} or args.compare else set())
    curves, table, strips = {}, [], {}
    for name, (net, flow) in (flows or {'': (None, {})}).items():
        own = flow_metrics(asked, name, net, flow, test or train, 'test' if test else 'training',
                           args, place)
        points = [(flow.get('solver'), flow.get('nfe'))] if set(asked) - set(OF_FLOWS) else []
        if args.sweep:
            points = [(solver, nfe) for solver in args.solvers or ['unipc']
                      for nfe in (args.sweep if solver != 'rk45' else [None])]
        for solver, nfe in points:
            clock, calls = time.time(), []
            if flow:
                flow.update(solver=solver, nfe=nfe or 100)
            batches = (stored(source, n, args, place) if source else
                       generated(net, flow, n, args, place, calls))
            made = collect(watch(batches, len(share(n, rank, world)), 'samples', rank),
                           n, inception, args.resize, keep, place)
            if rank > 0:
                continue
            seconds = time.time() - clock
            values = measure(asked, made, ref, weight, train, test, args, device)
            how = dict(solver=solver, nfe=float(np.mean(calls))) if flow else {}
            how = {**(dict(run=name, method=flow['method']) if args.compare else {}), **how}
            record(args, device, world, time.time() - clock, dict(
                n=n, n_ref=ref.n if ref else None, reference=train.name if train else args.ref,
                resize=args.resize, inception=args.inception,
                **{**(facts(net, flow) if flow else {}), **how, **values}))
            if args.sweep:
                table.append({**how, 'seconds': seconds, **values, **own})
                shown = next(iter(values))
                curve = ' '.join([name] * bool(args.compare)
                                 + [solver] * (not args.compare or len(args.solvers or ()) > 1))
                curves.setdefault(curve, []).append((how['nfe'], values[shown]))
                if args.compare and solver != 'rk45':
                    strips.setdefault(curve, []).append(made.pixels[:4])
    if table:
        print_table(table)
        plot(curves, 'network calls an image (NFE)', shown.upper() + f', {n} images', args.out)
    if strips:
        heads = [f'nfe {nfe}' for nfe in args.sweep]
        strip({k: torch.cat(v) for k, v in strips.items()}, heads,
              f'{os.path.splitext(args.out)[0]}_samples.png')
    if rank == 0 and asked:
        print(f'results are in {args.results}')


if __name__ == '__main__':
    run(main, parse_args())
