"""What the counts of a GPU's work count."""
import dataclasses
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import pfgm
from support import count
from support.batches import training_batches
from support.bench import BlankImages
from support.count import pretended_gpu
from support.flow import Flow
from support.networks import in_bfloat16
from support.run import Meter
from support.tests.common import close, randn, seeded
from unet import UNet


@pytest.fixture(scope='module')
def gpu():
    with pretended_gpu() as gpu:
        yield gpu


def on_gpu(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, device='cuda')


def last(t):
    return t.to(memory_format=torch.channels_last)


# ---------------------------------------------------------------- operations

def test_counts__of_a_product_are_its_flops_and_bytes(gpu):
    a, b = on_gpu(4, 8), on_gpu(8, 16)
    with gpu.counting() as counts:
        product = a @ b
        product.t()[1:]
    assert product.shape == (4, 16) and product.device.type == 'cuda'
    assert (counts.flops, counts.kernels) == (2 * 4 * 8 * 16, 1)
    assert counts.bytes == 4 * (4 * 8 + 8 * 16 + 4 * 16)
    assert counts.float32_bytes == counts.hidden_bytes == 0
    assert counts.operations == {'mm': (1, counts.bytes)}


def test_counts__of_an_elementwise_operation_are_float32_where_its_tensors_are(gpu):
    a, b = on_gpu(100), on_gpu(100, dtype=torch.bfloat16)
    with gpu.counting() as counts:
        F.silu(b)
    assert (counts.bytes, counts.float32_bytes, counts.activation_casts) == (400, 0, 0)
    with gpu.counting() as counts:
        F.silu(b.float()) + a[:1].expand(100)  # of which one number is read
    assert counts.float32_bytes == 400 + 800 + 800 + 4
    assert counts.bytes == counts.float32_bytes + 200
    assert (counts.kernels, counts.activation_casts) == (3, 1)


def test_counts__tell_casts_of_weights_from_those_of_activations(gpu):
    layer = nn.Linear(8, 4).to('cuda')
    x = on_gpu(6, 8)
    with gpu.counting() as counts, torch.autocast('cuda', torch.bfloat16):
        y = layer(x)
        layer(x)  # its weights are cast already
    assert y.dtype == torch.bfloat16
    assert (counts.weight_casts, counts.activation_casts) == (2, 2)
    with gpu.counting() as counts:
        y.sum().backward()
    assert (counts.weight_casts, counts.activation_casts) == (2, 0)  # of the gradients
    assert layer.weight.grad.dtype == torch.float32


def test_counts__of_a_group_norm_include_the_copies_to_channels_first(gpu):
    x = on_gpu(2, 8, 4, 4)
    size = 4 * x.numel()
    layer = nn.GroupNorm(2, 8).to('cuda')
    with gpu.counting() as counts:
        first = layer(x)
    assert counts.hidden_bytes == 0
    with gpu.counting() as counts:
        y = layer(last(x).requires_grad_())
    assert counts.hidden_bytes == 2 * size and y.stride() == first.stride()
    with gpu.counting() as counts:
        (y * y).sum().backward()
    assert counts.hidden_bytes == 2 * size  # of x, since the gradient of y is in order


def test_counts__of_a_convolution_include_copies_to_channels_last_and_its_bias(gpu):
    layer = nn.Conv2d(8, 8, 3, padding=1).to('cuda', memory_format=torch.channels_last)
    x = on_gpu(2, 8, 4, 4)
    size = 4 * x.numel()
    for x, copied in ((x, 2 * size), (last(x), 0)):
        with gpu.counting() as counts:
            y = layer(x)
        assert counts.hidden_bytes == copied + 2 * size and y.stride() == last(x).stride()


def test_counts__of_many_gradients_are_those_of_one_operation(gpu):
    layers = nn.Sequential(*[nn.Linear(2, 2) for _ in range(3)]).to('cuda')
    layers(on_gpu(1, 2)).sum().backward()
    with gpu.counting() as counts:
        nn.utils.clip_grad_norm_(layers.parameters(), 1.0)
    assert counts.operations['_foreach_norm'][0] == counts.operations['_foreach_mul_'][0] == 1


# ---------------------------------------------------------------- copies, and where the CPU waits

def test_counts__name_where_the_cpu_waits(gpu):
    x = on_gpu(3)
    with gpu.counting() as counts:
        assert x.sum().item() == 1
    with gpu.counting() as counted:
        assert x.cpu().tolist() == [1, 1, 1]
        torch.zeros(3).to('cuda')
        if (x > 0).all():
            x[torch.tensor([0, 2])]
    assert counts.copies == 0 and counted.copies == 3
    assert [words.split(' at ')[0] for words in counts.syncs + counted.syncs] == [
        'aten._local_scalar_dense.default', 'aten._to_copy.default', 'aten._to_copy.default',
        'aten._local_scalar_dense.default', 'aten.index.Tensor']
    assert all(' at support/tests/test_count.py:' in words for words in counts.syncs)


def test_counts__of_pinned_copies_that_need_not_wait_are_no_waits(gpu):
    pinned = torch.zeros(3).pin_memory()
    made = torch.zeros(3, pin_memory=True)
    assert pinned.is_pinned() and made.is_pinned() and not torch.zeros(3).is_pinned()
    with gpu.counting() as counts:
        x = pinned.to('cuda', non_blocking=True)
        made[1:].copy_(x[1:], non_blocking=True)
    assert counts.copies == 2 and counts.syncs == []
    with gpu.counting() as counts:
        pinned.to('cuda')
        torch.zeros(3).to('cuda', non_blocking=True)
        x.to('cpu', non_blocking=True)
    assert len(counts.syncs) == counts.copies == 3


# ---------------------------------------------------------------- what is not counted

def test_pretended_gpu__leaves_the_cpu_as_it_is(gpu):
    with gpu.counting() as counts:
        x = torch.randn(5, generator=torch.Generator().manual_seed(0))
        x.requires_grad_()
        (x * x).sum().backward()
    close(x.detach(), torch.randn(5, generator=seeded()))
    close(x.grad, 2 * x.detach())
    assert counts == count.Counts()


def test_backward__has_the_gradients_of_pytorch():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(),
                        nn.Linear(16, 3)).double()
    x = randn(5, 2, 4, 4)

    def loss():
        h = net[:3](x)
        return (net[3:](h + h.mean((2, 3), keepdim=True)) + net[4].bias.sum()).square().sum()
    loss().backward()
    expected = [p.grad for p in net.parameters()]
    net.zero_grad()
    count.backward(loss())
    for p, gradient in zip(net.parameters(), expected):
        close(p.grad, gradient, rtol=1e-12)


# ---------------------------------------------------------------- of the network

@pytest.fixture(scope='module')
def small(gpu):
    """A UNet with all its kinds of layers, on the GPU."""
    net = UNet(16, 3, 32, (1, 2), 1, (8,)).eval()
    return net.to('cuda', memory_format=torch.channels_last)


def test_unet__in_bfloat16_moves_hardly_any_float32(gpu, small):
    x, z = on_gpu(8, 3, 16, 16), on_gpu(8)
    with gpu.counting() as counts, torch.autocast('cuda', torch.bfloat16), torch.no_grad():
        v_x, _ = small(x, z)
    assert v_x.dtype == torch.float32
    assert counts.activation_casts == 3  # x and the embedding at the beginning, h at the end
    weights = 6 * sum(p.numel() for p in small.parameters())  # are read and written once
    assert counts.float32_bytes - weights < 0.05 * (counts.bytes - weights)


def test_follow__in_bfloat16_casts_each_weight_once(gpu, small):
    net = pfgm.PFGM(small).eval()
    with gpu.counting() as counts:
        flow = Flow(net, (3, 16, 16), 1.0, 1e-3, 40.0, 3e3, 5.0, 5.0, nfe=3, solver='euler',
                    bf16=True, net_in_bf16=in_bfloat16(net))
        _, calls = flow.follow(flow.prior(range(8)), torch.device('cuda', 0), range(8))
        dataclasses.replace(flow, nfe=2).follow(flow.prior(range(8)), torch.device('cuda', 0))
    weights = len(list(small.parameters())) - 4  # the last two layers are float32
    assert (calls, counts.weight_casts) == (3, weights)


# ---------------------------------------------------------------- what must not wait

@pytest.mark.parametrize('classes', [0, 10])
def test_training_batches__and_meter_make_no_step_wait_for_a_gpu(gpu, classes):
    images = BlankImages(40)
    images.labels = torch.arange(40) % 10
    device = torch.device('cuda', 0)
    flow = pfgm.PFGM(nn.Identity())
    meter = Meter(device)
    batches = training_batches(images, 8, 16, 0, 0, flip=True, classes=classes, workers=0,
                               device=device, rank=0, world=1)
    for step in range(1, 5):  # of which the second begins an epoch
        with gpu.counting() as counts:
            batch = next(batches)
            moved, z = flow.perturb(batch.clean, batch.generator)
            target, _ = flow.target(moved, z, batch.clean, batch.charges, batch.among)
            meter.observe(step, z, (moved - target).square().flatten(1).mean(1), z.mean())
        assert step == 1 or counts.syncs == []
        assert step == 1 or counts.copies == 1 + bool(classes)  # indices, and labels


@pytest.mark.parametrize('solver, eta', [('unipc', 0), ('dpm3m', 0), ('euler', 0), ('heun', 0),
                                         ('ddim', 1), ('renew', 0)])
def test_follow__makes_no_step_of_a_solver_wait_for_a_gpu(gpu, solver, eta):
    waits = []

    def net(x, z, labels):
        waits.append(gpu.counts.syncs)
        gpu.counts = count.Counts()
        return -x, -z

    flow = Flow(net, (1, 4, 4), math.inf, 1e-3, 80.0, None, 0.0, None, solver=solver, eta=eta,
                nfe=6, classes=(0, 1))
    with gpu.counting():
        flow.follow(flow.prior(range(4)), torch.device('cuda', 0), range(4))
    assert waits[1:] == [[], [], [], [], []]
