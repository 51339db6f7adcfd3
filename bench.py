"""What evaluate.py measures with: distances between sets of images, the solver bench, speed, and
the tables, plots and lines of results that show it. Run by its flags --solver_bench, --bench and
--curves.
"""
import copy
import functools
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import time
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.utils.flop_counter import FlopCounterMode

import data as datasets
import pfgm
from baselines import as_flow, field_loss, flow_of, update
from launch import (BadInput, first_of_its_machine, keep_freed_memory, peak_memory, say, speed_up,
                    watch, write)
from unet import UNet

INCEPTION = 'pt_inception-2015-12-05-6726825d.pth'
URL = f'https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION}'


# ---------------------------------------------------------------- Inception features

def repool(block, pool):
    """Give the block's pooling branch pool(x) of the block's x, not torchvision's own average."""
    inputs = []
    block.register_forward_pre_hook(lambda block, x: inputs.append(x[0]))
    block.branch_pool.register_forward_pre_hook(lambda conv, x: (pool(inputs.pop()),))


def load_inception(path, device, rank=0):
    """Inception "2015-12-05": (net, weight (1008, 2048)), net(x (B, 3, 299, 299)) -> (B, 2048).
    path: of its weights, or None for torch hub's copy, downloaded once a machine if absent.

    torchvision's network with the pooling of the TensorFlow graph: averages over what lies inside
    the image and, in the last block, a maximum (a slip, it seems, but every published FID's)."""
    from torchvision.models import Inception3
    with torch.device('cpu' if path == 'random' else 'meta'):
        net = Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    if path == 'random':  # under norms that do nothing such weights keep images apart
        say('random Inception weights: the numbers mean nothing outside this run')
        generator = torch.Generator().manual_seed(0)
        for weight in (p for p in net.parameters() if p.dim() > 1):
            torch.nn.init.kaiming_normal_(weight, generator=generator)
    else:
        file = path or os.path.join(torch.hub.get_dir(), 'checkpoints', INCEPTION)
        try:
            with first_of_its_machine():
                if not path and not os.path.isfile(file):
                    os.makedirs(os.path.dirname(file), exist_ok=True)
                    torch.hub.download_url_to_file(URL, file, '6726825d', progress=rank == 0)
            net.load_state_dict(torch.load(file, 'cpu', weights_only=True), assign=True)
        except Exception as error:  # a network, a damaged or hostile file can fail in any way
            raise BadInput(f'--inception {file}: its weights cannot be loaded '
                           f'({" ".join(str(error).split())[:150]}); get {URL} by hand and put it '
                           f'at {file}, or give --inception FILE') from error
    inside = torch.nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
    for name in ('5b', '5c', '5d', '6b', '6c', '6d', '6e', '7b'):
        repool(getattr(net, f'Mixed_{name}'), inside)
    repool(net.Mixed_7c, torch.nn.MaxPool2d(3, stride=1, padding=1))
    weight, net.fc = net.fc.weight.detach().double(), torch.nn.Identity()
    return net.to(device).eval().requires_grad_(False), weight


def resize_tf1(x, size=299):
    """TensorFlow 1's resize_bilinear: output i reads the input at i * length / size, without
    half-pixel centres or antialiasing. (B, C, H, W) -> (B, C, size, size)."""
    for _ in range(2):  # along the rows, and turned along the columns
        length = x.shape[3]
        at = torch.arange(size, device=x.device, dtype=x.dtype) * (length / size)
        low = at.long()
        high = (low + 1).clamp_max(length - 1)
        x = (x[..., low] + (x[..., high] - x[..., low]) * (at - low)).mT
    return x


@torch.no_grad()
def features(net, pixels, resize='tf1'):
    """uint8 (B, 1 or 3, H, W) on the device of net -> pool features (B, 2048), float32."""
    def resized(x):
        if resize == 'tf1':
            return (resize_tf1(x) - 128) / 128
        return F.interpolate(x / 255, (299, 299), mode='bilinear') * 2 - 1
    with pfgm.full_float32(pixels.device):
        return torch.cat([net(resized(x)) for x in pixels.expand(-1, 3, -1, -1).float().split(64)])


# ---------------------------------------------------------------- distances between sets

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


def pick(images, n, seed):
    """n images of a data set at random, uint8 on the CPU."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images[order[:n].sort().values.tolist()].cpu()


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


# ---------------------------------------------------------------- a judge, where images have labels

JUDGE_STEPS, JUDGE_BATCH = 1000, 128


def judge_net(channels, classes):
    """A small classifier of x (B, channels, S, S) in [-1, 1]; all but its last layer: (B, 128)."""
    from torchvision.ops import Conv2dNormActivation as Conv
    widths, strides = (channels, 32, 32, 64, 128, 128), (1, 2, 1, 2, 1)
    layers = [Conv(*pair, 3, stride) for *pair, stride in zip(widths, widths[1:], strides)]
    return torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
                               torch.nn.Linear(128, classes))


def train_judge(images, classes, device):
    """The classifier after JUDGE_STEPS batches of a labelled training set, from seed 0."""
    keep_freed_memory()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = judge_net(images.channels, classes).to(device)
    opt = torch.optim.AdamW(net.parameters())
    rate = torch.optim.lr_scheduler.OneCycleLR(opt, 4e-3, JUDGE_STEPS)
    order = [*itertools.islice(datasets.image_order(len(images), JUDGE_BATCH, 0, 0), JUDGE_STEPS)]
    batches = datasets.batches(images, order, device, workers=4)
    for index, batch in zip(watch(order, JUDGE_STEPS * JUDGE_BATCH, 'judge', 0), batches):
        logits = net(datasets.to_float(batch))
        F.cross_entropy(logits, images.labels[index].to(device)).backward()
        opt.step()
        rate.step()
        opt.zero_grad(set_to_none=True)
    return net


@torch.no_grad()
def judged(net, pixels, device):
    """uint8 (n, C, S, S) -> features (n, 128) and probabilities (n, K), float64, on the CPU."""
    with pfgm.full_float32(device):
        found = torch.cat([net[:-1](datasets.to_float(x.to(device))) for x in pixels.split(512)])
        return found.cpu().double(), net[-1](found).cpu().double().softmax(1)


@functools.cache
def judge_of(train, test, data_dir, device):
    """(the classifier of a labelled data set, kept in data_dir; the features of up to 10,000 of its
    test images; a line on how well it reads them). BadInput where there are no labels."""
    classes = train.class_count('--judge')
    if test.labels is None:
        raise BadInput(f'--judge: the test images of {test.name} have {test.unlabelled}; give them '
                       'labels as the training images have, or leave it out')
    mark = zlib.crc32(repr((train.identity, train.image_size, train.channels)).encode())
    path, net = os.path.join(data_dir, f'judge-{mark:08x}.pt'), judge_net(train.channels, classes)
    try:
        net.load_state_dict(torch.load(path, map_location='cpu', weights_only=True))
        net.to(device)
    except Exception as error:  # a damaged file can fail in any way
        if os.path.exists(path):
            print(f'{path}: cannot be read ({str(error)[:80]}); it is made anew', flush=True)
        net = train_judge(train, classes, device)
        os.makedirs(data_dir, exist_ok=True)
        write('--data_dir', path, lambda file: torch.save(net.state_dict(), file))
    net.eval()
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:10_000]
    real, p = judged(net, test[order.tolist()].cpu(), device)
    right = (p.argmax(1) == test.labels[order]).double().mean()
    note = f'the judge is right on {right:.1%} of {len(real)} images of {test.name}, and reads '
    return net, real, note + f'{(p.amax(1) >= 0.9).double().mean():.1%}'


def of_judge(made, ref, args, home):
    """The metric: the Frechet distance to the test images in the judge's features, that of as many
    training images, the share of samples that it gives 0.9 to one class, precision and recall."""
    net, real, note = judge_of(ref.train, ref.test or ref.train, args.data_dir, home)
    found, p = judged(net, made.pixels, home)
    train, _ = judged(net, pick(ref.train, made.n, args.seed), home)
    distance, of_real = (frechet(x.mean(0), x.T.cov(), real.mean(0), real.T.cov())
                         for x in (found, train))
    inside = precision_recall(found, real, home)
    yield f'{made.n} images; {note}', dict(
        judge_fd=distance, judge_fd_of_real=of_real, judge_precision=inside[0],
        judge_recall=inside[1], legible=(p.amax(1) >= 0.9).double().mean().item())


# ---------------------------------------------------------------- solvers, without a network

def solver_bench(args, device):
    """How many samples end at the training image that RK45 at 1e-8 leads them to, and the RMSE, for
    each solver, schedule and NFE, in the exact field of --dataset: a table and a plot."""
    images = datasets.load(args.dataset or 'glyphs', args.data_dir, args.image_size)
    charges = torch.cat([*datasets.charges_of(images, '--solver_bench', device,
                                              dtype=torch.float64).split(256)])
    published = (images.channels, images.image_size) == (3, 32)
    flow = datasets.flow_constants(images, 'cifar10' if published else args.dataset)
    net, n = pfgm.ExactField(charges), args.n or 256
    start = pfgm.sample_prior((n, *charges.shape[1:]), flow['z_max'], flow['upper_norm'],
                              generator=torch.Generator().manual_seed(args.seed),
                              device=device, dtype=torch.float64)
    clock, z_last = time.time(), pfgm.deciding_z(charges)

    def follow(*how, **more):
        ends, calls = zip(*(pfgm.sample_ode(net, x, flow['z_max'], *how, z_exp=0, **more)
                            for x in start.split(args.batch_size)))
        return torch.cat(ends), max(calls)

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
    for name in args.solvers or ('rk45', *pfgm.SOLVERS):
        for schedule, low in grids if name != 'rk45' else [('', 1e-3)]:
            row = []
            for nfe in (args.sweep or (5, 10, 20, 35)) if name != 'rk45' else [None]:
                x, nfe = follow(low, name, nfe, schedule_name=schedule, to_data=name != 'rk45')
                same = (which(x) == right).double().mean().item()
                error = (x - charges[right]).square().mean().sqrt().item()
                row.append(f'nfe {nfe}: {same:.3f} {error:.3f}')
                if schedule in ('', 'radius') or (name, schedule) == ('euler', 'rho7'):
                    curves.setdefault(f'{name} {schedule}', []).append((nfe, error))
                record(args, device, 1, time.time() - clock, dict(
                    solver=name, schedule=schedule, z_min=low, nfe=nfe, same_image=same, rmse=error,
                    n=n, reference=images.name))
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
    net = UNet().to(x.device).train(what != 'forward')
    if bf16:
        speed_up(net).to(memory_format=torch.channels_last)
    opt = torch.optim.Adam(net.parameters(), lr=1e-4, fused=True)
    ema = copy.deepcopy(net).requires_grad_(False)

    def work():
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            if what == 'forward':
                with torch.no_grad():
                    return net(x, z)
            loss = field_loss(net, 'sum', x, z, *target, torch.ones_like(z))
        loss.mean().backward()
        return update(net, ema, opt, 1.0, 0.9999)
    return work


def speed(args, device):
    """The field and the CIFAR-10 network at their real sizes: medians, memory, ratios to the plain
    way in the same run, and the share of the rate of matrix products, called in turn with them."""
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
                points = [(row['images'], row['loss']) for row in map(json.loads, file)]
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
    font = ImageFont.load_default(size=20)
    grid = datasets.grid_of(torch.cat(list(rows.values())), len(next(iter(rows.values()))))
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


def sample_grid(net, args, device, path, source):
    """A PNG of the first 36 images that sample.py --nfe 20 makes of the network as it is now, or of
    a student's in one call; source: what they start from, or None."""
    flow = flow_of(as_flow(net, vars(args)), vars(args), seed=args.seed,
                   nfe=1 if args.distill or args.consistency else 20)
    flow.net.source = source
    x, _ = flow.follow(flow.prior(range(36)), device, range(36))
    picture = datasets.grid_of(datasets.to_uint8(x))
    write('--out_dir', path, lambda file: picture.save(file, 'PNG'))


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
