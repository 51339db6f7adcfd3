"""Benches: the speed of this project, and solvers without a network. Nothing imports it.
"""
import copy
import math
import time

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import pfgm
from pfgm import field_loss
from support.cpu import speed_up
from support.images import charges_of
from support.methods import flow_constants
from support.metrics import squared_distances
from support.optim import update
from support.pictures import plot
from support.processes import peak_memory
from support.results import record_result
from support.sets import load_images
from support.solvers import SOLVERS, deciding_z
from unet import UNet


# ---------------------------------------------------------------- solvers, without a network

def solver_bench(args, device):
    """How many samples end at the training image that RK45 at 1e-8 leads them to, and the RMSE, for
    each solver, schedule and NFE, in the exact field of --dataset: a table and a plot."""
    images = load_images(args.dataset or 'glyphs', args.data_dir, args.image_size)
    charges = torch.cat([*charges_of(images, '--solver_bench', device,
                                              dtype=torch.float64).split(256)])
    published = (images.channels, images.image_size) == (3, 32)
    flow = flow_constants(images, 'cifar10' if published else args.dataset)
    net, n = pfgm.ExactField(charges), args.n or 256
    start = pfgm.sample_prior((n, *charges.shape[1:]), flow['z_max'], flow['upper_norm'],
                              generator=torch.Generator().manual_seed(args.seed),
                              device=device, dtype=torch.float64)
    clock, z_last = time.time(), deciding_z(charges)

    def follow(*how, **more):
        ends, calls = zip(*(pfgm.sample_ode(net, x, flow['z_max'], *how, z_exp=0, **more)
                            for x in start.split(args.batch_size)))
        return torch.cat(ends), max(calls)

    def which(x):
        return torch.cat([squared_distances(part, charges.flatten(1)).argmin(1)
                          for part in x.flatten(1).split(64)])
    end, calls = follow(1e-3, 'rk45', rtol=1e-8, atol=1e-8)
    right = which(end)
    print(f'{n} starts on z = {flow["z_max"]:.4g}, |x| <= {flow["upper_norm"]:.4g}, {len(charges)} '
          f'images; RK45 at 1e-8: {calls} calls; the weights decide above z = {z_last:.3g}; '
          f'{time.time() - clock:.0f} s', flush=True)
    curves = {}
    grids = (('log', z_last), ('radius', z_last), ('rho7', 1e-3))
    for name in args.solvers or ('rk45', *SOLVERS):
        for schedule, low in grids if name != 'rk45' else [('', 1e-3)]:
            row = []
            for nfe in (args.sweep or (5, 10, 20, 35)) if name != 'rk45' else [None]:
                x, nfe = follow(low, name, nfe, schedule_name=schedule, to_data=name != 'rk45')
                same = (which(x) == right).double().mean().item()
                error = (x - charges[right]).square().mean().sqrt().item()
                row.append(f'nfe {nfe}: {same:.3f} {error:.3f}')
                if schedule in ('', 'radius') or (name, schedule) == ('euler', 'rho7'):
                    curves.setdefault(f'{name} {schedule}', []).append((nfe, error))
                record_result(args, device, 1, time.time() - clock, dict(
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
