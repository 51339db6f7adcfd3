"""The layers that are faster on CPUs compute what PyTorch's compute."""
import copy

import pytest
import torch
import torch.nn as nn

import unet
from support import cpu
from support.tests.common import F64, close, randn


def derived(f, dy, *inputs):
    """[f(*inputs), the gradient of each input], where dy is the gradient of f(*inputs)."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = f(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy.to(y))]


def assert_near(results, expected, tolerance):
    """Each result is within tolerance of what is expected, relative to the norm of it."""
    for result, right in zip(results, expected, strict=True):
        assert (result - right).norm() <= tolerance * right.norm()


# ---------------------------------------------------------------- the whole network

def test_speed_up__keeps_weights_names_mode_and_the_random_stream():
    torch.manual_seed(0)
    net = unet.UNet(8, 1, 8, (1, 2), 1, (8,), 0.1)
    expected = copy.deepcopy(net.state_dict())
    state = torch.get_rng_state()
    faster = cpu.speed_up(net.eval())
    assert faster is net and not net.training
    assert torch.equal(torch.get_rng_state(), state)
    assert list(net.state_dict()) == list(expected)
    assert all(torch.equal(net.state_dict()[name], expected[name]) for name in expected)
    types = {type(layer) for layer in net.modules()}
    assert types >= set(cpu.FASTER.values()) and not types & set(cpu.FASTER)


def test_speed_up__gives_the_numbers_of_the_network_but_for_rounding():
    torch.manual_seed(0)
    net = unet.UNet(16, 3, 32, (1, 2), 1, (16, 8), 0).double()
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    faster = cpu.speed_up(copy.deepcopy(net))
    x = randn(4, 3, 16, 16)
    z = randn(4).exp()

    def outputs_and_gradients(net):
        v_x, v_z = net(x, z)
        loss = v_x.square().sum() + v_z.square().sum()
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        return v_x.detach(), v_z.detach(), torch.cat([gradient.flatten() for gradient in gradients])
    assert_near(outputs_and_gradients(faster), outputs_and_gradients(net), 1e-9)


# ---------------------------------------------------------------- its layers

@pytest.mark.parametrize('p', [0.1, 0.13, 0.9])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_dropout__drops_each_element_with_probability_p(p, dtype):
    h = torch.ones(10, 64, 33, 47, dtype=dtype).to(memory_format=torch.channels_last)
    h.requires_grad_()
    torch.manual_seed(1)
    dropout = cpu.speed_up(nn.Sequential(nn.Dropout(p)))
    y = dropout(h)
    again = dropout(h)
    y.sum().backward()
    assert isinstance(dropout[0], cpu.Dropout)
    assert torch.equal(y, (y != 0).to(dtype) * (1 / (1 - p)))
    assert torch.equal(h.grad, y)

    def assert_rate(dropped, rate):
        close(dropped.double().mean(), rate, atol=6 * (rate / dropped.numel()) ** 0.5)
    assert_rate(y == 0, p)
    assert_rate(y + again == 0, p * p)                        # independent of another call,
    assert_rate((y[..., 1:] + y[..., :-1]) == 0, p * p)       # of the next pixel,
    assert_rate((y[:, 1:] + y[:, :-1]) == 0, p * p)           # and of the next channel
    torch.manual_seed(1)
    assert torch.equal(dropout(h), y)
    assert torch.equal(dropout.eval()(h), h)


@pytest.mark.parametrize('dtype, tolerance', [(F64, 1e-13), (torch.float32, 1e-6),
                                              (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize('shape', [(3, 512, 4, 4), (2, 32, 32, 32), (2, 24, 33, 32)])
def test_group_norm__with_channels_last_has_the_gradients_of_group_norm(shape, dtype, tolerance):
    layer, = cpu.speed_up(nn.Sequential(unet.norm(shape[1])))
    assert isinstance(layer, cpu.GroupNorm)
    x, dy = (randn(*shape, seed=k).to(dtype) for k in (1, 2))
    affine = randn(2, shape[1]).to(torch.promote_types(dtype, torch.float32))

    def ours(x, weight, bias):
        return torch.func.functional_call(layer, dict(weight=weight, bias=bias), x)

    def pytorchs(x, weight, bias):
        return nn.functional.group_norm(x, layer.num_groups, weight, bias, layer.eps)
    expected = derived(pytorchs, *(a.double() for a in (dy, x, *affine)))
    result = derived(ours, *(a.to(memory_format=torch.channels_last) for a in (dy, x)), *affine)
    assert result[1].is_contiguous(memory_format=torch.channels_last)
    assert_near(result, expected, tolerance)


@pytest.mark.parametrize('dtype, tolerance', [(F64, 1e-13), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize('pixels', [49, 300])  # 49 are written out, 300 are PyTorch's
def test_attention__on_a_cpu_has_the_values_and_gradients_of_attention(pixels, dtype, tolerance):
    dy, q, k, v = (randn(5, 1, pixels, 24, seed=seed) for seed in (3, 0, 1, 2))
    layer = cpu.speed_up(unet.Attention(24))
    assert isinstance(layer, cpu.Attention) and layer.attend is not unet.Attention.attend
    expected = derived(unet.Attention.attend, dy, q, k, v)
    result = derived(layer.attend, *(x.to(dtype) for x in (dy, q, k, v)))
    assert_near(result, expected, tolerance)


def test_attention__has_the_axis_of_heads_without_which_pytorch_may_not_fuse_it():
    shapes = []

    class Spy(unet.Attention):
        @staticmethod
        def attend(q, k, v):
            shapes.append(q.shape)
            return v
    assert Spy(8)(torch.ones(2, 8, 3, 4), None).shape == (2, 8, 3, 4)
    assert shapes == [(2, 1, 12, 8)]
