"""Three benches: how fast the field and the network are, what they would ask of a GPU, and how well
solvers do in an exact field, without a network. You need not read it to understand the method.

    python -m support.bench speed
    python -m support.bench count
    python -m support.bench solvers --dataset images.zip --sweep nfe=5,10,20
"""
import copy
import functools
import math
import os
import time

from support import waiting

waiting.begin(__name__)  # a line where the imports below take long; Ctrl-C ends them in one line

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import pfgm
from support.batches import charges_of, training_batches
from support.cli import BadInput, Parser, above, check_writable, one_of, several
from support.count import Counts, pretended_gpu
from support.cpu import speed_up
from support.flow import Flow
from support.methods import flow_constants
from support.metrics import squared_distances
from support.networks import in_bfloat16
from support.pictures import check_png, plot
from support.processes import peak_memory, run, setup
from support.results import record_result
from support.run import Meter
from support.sets import load_images
from support.solvers import SOLVERS, deciding_z
from support.unused import in_bench, refuse
from unet import UNet


def parse_args(argv=None):
    p = Parser(prog='python -m support.bench', description=__doc__)
    benches = p.add_subparsers(dest='bench', required=True, metavar='BENCH')
    speed = benches.add_parser('speed', help='the field and the CIFAR-10 network, in seconds')
    benches.add_parser('count', help='what a training step and a network call of sampling on '
                       'CIFAR-10 ask of a GPU: operations and bytes, on a machine without one')
    solvers = benches.add_parser('solvers', help='solvers in the exact field of --dataset: which '
                                 'part of the starts they lead to the right image')
    for bench in (speed, solvers):
        bench.add_argument('--seed', type=above(-1, int), default=0, help='default: 0')
        bench.add_argument('--device', default='auto', help='auto, cpu, cuda, cuda:1 or mps '
                           '(default: auto)')
    add = solvers.add_argument
    add('--dataset', default='glyphs', help='default: glyphs')
    add('--data_dir', default='data', help='where known data sets are kept (default: data)')
    add('--image_size', type=above(0, int), default=None,
        help='pixels a side (default: as the data is)')
    add('--n', type=above(0, int), default=256, help='starts (default: 256)')
    add('--batch_size', type=above(0, int), default=64, help='starts at a time (default: 64)')
    add('--sweep', type=several(above(0, int), prefix='nfe='), metavar='nfe=5,10,20',
        default=[5, 10, 20, 35], help='network calls (default: nfe=5,10,20,35)')
    add('--solvers', type=several(one_of(SOLVERS)), default=[*SOLVERS],
        help=f'of {",".join(SOLVERS)} (default: all)')
    add('--results', default='results.jsonl', help='a line is appended to it for each solver and '
        'number of calls (default: results.jsonl)')
    add('--out', default=None, help='the plot (default: solvers.png beside --results)')
    return p.parse_args(argv)


# ---------------------------------------------------------------- solvers, without a network

EDM_LAST = 1e-3  # the plane where RK45 ends, and the schedule rho7 of EDM


def solvers(images, dataset, device, *, n, batch_size, solver_names, nfes, seed, results, out):
    """Print, record in `results` and plot as `out` how well solvers follow the exact field of all
    `images`, in which RK45 at 1e-8 says where each start belongs.

    For each solver, schedule and number of calls that is the part of n starts that are led to the
    same image, and the RMSE to that image. dataset: the name of the images, for the constants of
    the flow."""
    charges = torch.cat([*charges_of(images, '--dataset', device, dtype=torch.float64).split(256)])
    net = pfgm.ExactField(charges)
    like_cifar10 = (images.channels, images.image_size) == (3, 32)
    constants = flow_constants(images, 'cifar10' if like_cifar10 else dataset)
    z_max = constants['z_max']
    upper_norm = constants['upper_norm']
    generator = torch.Generator().manual_seed(seed)
    start = pfgm.sample_prior((n, *charges.shape[1:]), z_max, upper_norm, generator=generator,
                              device=device, dtype=torch.float64)
    clock = time.time()
    z_decides = deciding_z(charges)

    def follow(solver, z_to, nfe=None, schedule=None):
        """(where the starts are led, network calls). A number of calls includes the last one, which
        leads straight to z = 0."""
        ends = []
        most_calls = 0
        for x in start.split(batch_size):
            end, calls = pfgm.sample_ode(net, x, z_max, z_to, solver, nfe, z_exp=0,
                                         schedule_name=schedule, to_data=nfe is not None)
            ends.append(end)
            most_calls = max(calls, most_calls)
        return torch.cat(ends), most_calls

    fine = functools.partial(pfgm.rk45, rtol=1e-8, atol=1e-8)
    end, calls = follow(fine, EDM_LAST)
    right = nearest_charge(end, charges)
    print(f'{n} starts on z = {z_max:.4g}, |x| <= {upper_norm:.4g}, {len(charges)} images; '
          f'RK45 at 1e-8: {calls} calls; the weights decide above z = {z_decides:.3g}; '
          f'{time.time() - clock:.0f} s', flush=True)

    curves = {}
    for name in solver_names:
        solver = SOLVERS[name]
        runs = [('log', z_decides), ('radius', z_decides), ('rho7', EDM_LAST)]
        if name == 'rk45':  # with one step size for all starts, as PFGM published it
            solver = pfgm.rk45
            runs = [('', EDM_LAST)]
        if name == 'unipc' and z_max > 10:  # from far away its first step needs no call
            solver = functools.partial(solver, free_first_step=True)
        for schedule, z_to in runs:
            columns = []
            for nfe in nfes if schedule else [None]:
                x, calls = follow(solver, z_to, nfe, schedule or None)
                same_image = (nearest_charge(x, charges) == right).double().mean().item()
                rmse = (x - charges[right]).square().mean().sqrt().item()
                columns.append(f'nfe {calls}: {same_image:.3f} {rmse:.3f}')
                values = dict(solver=name, schedule=schedule, z_min=z_to, nfe=calls,
                              same_image=same_image, rmse=rmse, n=n, reference=images.name)
                record_result(results, values, device, seconds=time.time() - clock, seed=seed)
                if schedule in ('', 'radius') or (name, schedule) == ('euler', 'rho7'):
                    curves.setdefault(f'{name} {schedule}', []).append((calls, rmse))
            print(f'{name:>6} {schedule:6}  ' + '   '.join(columns), flush=True)
    title = f'Solvers in the exact field of {images.name}'
    plot(curves, title, 'network calls an image (NFE)', 'RMSE to the right image', out)


def nearest_charge(x, charges):
    """The numbers (n,) of the charges that are nearest to each of x (n, C, H, W)."""
    rows = charges.flatten(1)
    parts = [squared_distances(part, rows).argmin(1) for part in x.flatten(1).split(64)]
    return torch.cat(parts)


# ---------------------------------------------------------------- speed

FIELD_CHARGES = (4096, 50000)  # those of a published training step, and all of CIFAR-10
FLOAT64_SIDE = 2048            # of the square matrices whose product is the measure
BFLOAT16_SIDE = 4096


def speed(device, seed):
    """Time the field and the CIFAR-10 network at their real sizes.

    It prints medians, memory, ratios to the plain way in the same run, and which part they reach of
    the rate of matrix products that are called in turn with them."""
    generator = torch.Generator(device).manual_seed(seed)
    charges = time_field(device, generator)
    is_gpu = device.type == 'cuda'

    x, z = pfgm.perturb(charges[:128 if is_gpu else 16], 291, generator=generator)
    works = [forward_work(x, z, bf16) for bf16 in (False, True)]
    # Within this autocast the weights are cast once, as over the calls of a sampler.
    with torch.autocast(device.type, torch.bfloat16):
        plain_seconds = time_network(f'forward, {len(x)}', *works, device)
    time_solver(x, plain_seconds, device)

    x, z = pfgm.perturb(charges[:128 if is_gpu else 8], 291, generator=generator)
    target = pfgm.poisson_field(x, z, charges[:4096])
    works = [training_work(x, z, target, bf16) for bf16 in (False, True)]
    time_network(f'training step, {len(x)}', *works, device)


def time_field(device, generator):
    """Print the time of the field of 128 points, and return the charges (K, 3, 32, 32) of the last
    case."""
    a = torch.randn(FLOAT64_SIDE, FLOAT64_SIDE, device=device, dtype=torch.float64)
    out = a @ a
    cases = []
    for K in FIELD_CHARGES:
        y = torch.rand(K, 3, 32, 32, generator=generator, device=device).mul_(2).sub_(1)
        x, z = pfgm.perturb(y[:128], 291, generator=generator)
        before = peak(device)
        times = median_seconds(device, lambda: pfgm.poisson_field(x, z, y),
                               lambda: torch.mm(a, a, out=out))
        cases.append((x, z, y, times, peak(device) - before))
    # The exact field takes more memory, hence after the memory of all cases is known.
    for x, z, y, (field_seconds, product_seconds), more in cases:
        field = pfgm.poisson_field(x, z, y)
        exact = pfgm.poisson_field(x.double(), z.double(), y.double())
        error = max((part - whole).norm() / whole.norm() for part, whole in zip(field, exact))
        least_seconds = product_seconds * 2 * x.numel() * len(y) / len(a) ** 3
        print(f'field, 128 points, {len(y)} charges: {field_seconds:.3f} s, {more:.2f} GB more, '
              f'relative error {error:.1e}, {least_seconds / field_seconds:.0%} of the rate of '
              'float64 products', flush=True)
    return y


def time_network(words, plain, ours, device):
    """Print the times of two ways to do the same work, and return that of the plain one."""
    a = torch.randn(BFLOAT16_SIDE, BFLOAT16_SIDE, device=device).bfloat16()
    plain_seconds, our_seconds, product = median_seconds(device, plain, ours, lambda: a @ a)
    with FlopCounterMode(display=False) as flops:
        ours()
    rate = 2 * len(a) ** 3 / product
    part = flops.get_total_flops() / our_seconds / rate
    print(f'{words} images of CIFAR-10: {our_seconds:.3f} s in bfloat16, plain float32 '
          f'{plain_seconds:.3f} s, ratio {plain_seconds / our_seconds:.2f}; {peak(device):.1f} GB; '
          f'{part:.0%} of the rate of bfloat16 products in between, {rate / 1e12:.2f} TFLOP/s',
          flush=True)
    return plain_seconds


def time_solver(x, plain_seconds, device):
    """Print the time that RK45 itself takes: that of a flow that costs nothing."""
    start = pfgm.sample_prior(x.shape, 40.0, 3e3, device=device)
    calls = 0

    def work():
        nonlocal calls
        _, calls = pfgm.sample_ode(lambda x, z: (-x, -z), start, 40.0, 1e-3, SOLVERS['rk45'],
                                   z_exp=0)

    seconds, = median_seconds(device, work)
    print(f'RK45, {len(x)} images: {seconds / calls * 1e3:.1f} ms a call beside the network, '
          f'{seconds / calls / plain_seconds:.1%} of its float32 forward', flush=True)


def cifar10_network(device, bf16):
    """The network as this project runs it in bfloat16, channels last, or the plain way: float32,
    channels first, and PyTorch's own group norm and dropout."""
    net = UNet().to(device)
    if bf16:
        speed_up(net).to(memory_format=torch.channels_last)
    return net


def forward_work(x, z, bf16):
    """A function that makes one forward pass."""
    net = cifar10_network(x.device, bf16).eval()

    def work():
        with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            return net(x, z)
    return work


def training_work(x, z, target, bf16):
    """A function that makes one update, as the step in train.py does it: loss, gradient, clipping,
    Adam, and the average."""
    net = cifar10_network(x.device, bf16).train()
    opt = torch.optim.Adam(net.parameters(), lr=1e-4, fused=True)
    ema = copy.deepcopy(net).requires_grad_(False)
    weight = torch.ones_like(z)

    def work():
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            loss = pfgm.field_loss(net(x, z), target, weight)
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - 0.9999)
    return work


def median_seconds(device, *works, repeats=5):
    """The median time of each of some functions. They are called in turn, so that what else slows
    the machine slows them alike, after one call of each that warms up."""
    times = []
    for work in works * (repeats + 1):
        start = time.perf_counter()
        work()
        if device.type == 'cuda':
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    rounds = np.reshape(times, (-1, len(works)))
    return np.median(rounds[1:], axis=0).tolist()


def peak(device):
    """Gigabytes: the most memory so far; NaN where the system does not say."""
    return peak_memory(device) or math.nan


# ---------------------------------------------------------------- what a GPU has to do

class BlankImages:
    """A data set of n images like CIFAR-10's, for training_batches()."""
    labels = None

    def __init__(self, n):
        self.pixels = torch.zeros(n, 3, 32, 32, dtype=torch.uint8)

    def __len__(self):
        return len(self.pixels)


def count():
    """Print what one training step and one network call of sampling ask of a GPU, of 128 images and
    the CIFAR-10 network in bfloat16."""
    with pretended_gpu() as gpu:
        columns = {'training step': training_counts(gpu, BlankImages(50000), 128, 4096),
                   'call of sampling': sampling_counts(gpu, 128)}
    rows = [('TFLOP', lambda c: f'{c.flops / 1e12:.2f}'),
            ('GB moved', lambda c: f'{c.bytes / 1e9:.1f}'),
            ('  for another order, and biases', lambda c: f'{c.hidden_bytes / 1e9:.1f}'),
            ('  float32, but for products', lambda c: f'{c.float32_bytes / 1e9:.1f}'),
            ('casts of activations', lambda c: f'{c.activation_casts}'),
            ('casts of weights', lambda c: f'{c.weight_casts}'),
            ('kernels', lambda c: f'{c.kernels}'),
            ('copies between CPU and GPU', lambda c: f'{c.copies}'),
            ('waits of the CPU for the GPU', lambda c: f'{len(c.syncs)}'),
            ('ms on an H100, at least', lambda c: f'{c.seconds * 1e3:.1f}')]
    print(f'{"128 images of CIFAR-10":32}' + ''.join(f'{name:>18}' for name in columns))
    for words, value in rows:
        print(f'{words:32}' + ''.join(f'{value(counts):>18}' for counts in columns.values()))
    for name, counts in columns.items():
        for words in sorted(set(counts.syncs)):
            print(f'{name}: waits in {words}')


def training_counts(gpu, images, batch_size, field_batch):
    """The Counts of a training step as train.py makes it, the second, on a PretendedGPU."""
    device = torch.device('cuda', 0)
    net = speed_up(UNet())
    ema = copy.deepcopy(net).to(device, memory_format=torch.channels_last)
    ema.eval().requires_grad_(False)
    net = net.to(device, memory_format=torch.channels_last).train()
    flow = pfgm.PFGM(net)
    opt = torch.optim.Adam(net.parameters(), lr=1e-4, fused=True)
    meter = Meter(device, flow.unit)
    batches = training_batches(images, batch_size, field_batch, 0, 0, flip=True, classes=0,
                               workers=0, device=device, rank=0, world=1)
    for step in (1, 2):
        with gpu.counting() as counts:
            batch = next(batches)
            moved, z = flow.perturb(batch.clean, batch.generator)
            weight = flow.weight(moved, z)
            target = flow.target(moved, z, batch.clean, batch.charges)
            with torch.autocast('cuda', torch.bfloat16):
                loss = pfgm.field_loss(flow(moved, z), target, weight)
            loss.mean().backward()
            norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            opt.step()
            opt.zero_grad(set_to_none=True)
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1e-4)
            meter.observe(step, z, loss.detach(), norm)
    return counts


def sampling_counts(gpu, batch_size):
    """The Counts of the fifth network call of Flow.follow(), and of the solver's part after it, on
    a PretendedGPU."""
    device = torch.device('cuda', 0)
    net = speed_up(UNet()).eval().requires_grad_(False)
    net = net.to(device, memory_format=torch.channels_last)
    field = pfgm.PFGM(net).eval()
    flow = Flow(field, (3, 32, 32), 1.0, 1e-3, 40.0, 3e3, 5.0, 5.0, nfe=7, bf16=True,
                net_in_bf16=in_bfloat16(field))
    x = flow.prior(range(batch_size))
    parts = []

    def next_part(module, inputs):
        gpu.counts = Counts()
        parts.append(gpu.counts)

    net.register_forward_pre_hook(next_part)
    flow.follow(x, device, range(batch_size))
    return parts[4]


# ---------------------------------------------------------------- the run

def main(args):
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:
        raise BadInput(f'{args.bench}: a bench of one process; run it without torchrun')
    if args.bench == 'count':
        count()
        return
    device, _, _ = setup(args.device, float64=args.bench == 'solvers')
    if args.bench == 'speed':
        speed(device, args.seed)
        return
    refuse(args.given, in_bench(vars(args)), vars(args))
    out = args.out or os.path.join(os.path.dirname(args.results), 'solvers.png')
    check_png('--out', out)
    check_writable('--results', args.results, appends=True)
    check_writable('--out', out)
    images = load_images(args.dataset, args.data_dir, args.image_size)
    solvers(images, args.dataset, device, n=args.n, batch_size=args.batch_size,
            solver_names=args.solvers, nfes=args.sweep, seed=args.seed, results=args.results,
            out=out)


if __name__ == '__main__':
    run(main, parse_args())
