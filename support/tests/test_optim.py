"""The Muon optimizer."""
import copy

import pytest
import torch

import unet
from support.optim import Muon, orthogonal
from support.tests.common import F64, close, randn


def tiny_network():
    torch.manual_seed(0)
    return unet.UNet(8, 1, 8, (1, 2), 1, (8,), 0, classes=3).double()


def step_with_random_gradients(net, opt, step):
    for p in net.parameters():
        p.grad = randn(*p.shape, seed=p.numel() + step)
    opt.step()


@pytest.mark.parametrize('shape', [(4, 5, 9), (4, 9, 5), (2, 6, 6)])
def test_orthogonal__brings_singular_values_to_about_1_and_keeps_the_singular_vectors(shape):
    G = randn(*shape)
    U, S, V = torch.linalg.svd(G, full_matrices=False)
    turned = U.mT @ orthogonal(G) @ V.mT
    values = turned.diagonal(dim1=1, dim2=2)
    close(turned, torch.diag_embed(values), atol=1e-9)
    assert values.min() > 0.6 and values.max() < 1.25


def test_orthogonal__of_zeros_is_zeros():
    close(orthogonal(torch.zeros(1, 3, 4, dtype=F64)), torch.zeros(1, 3, 4))


def test_muon__moves_matrices_by_their_orthogonal_average_and_the_rest_as_adam():
    net = tiny_network()
    adam_net = copy.deepcopy(net)
    muon = Muon(net, lr=0.01)
    adam = torch.optim.Adam(adam_net.parameters(), lr=0.01, betas=(0.9, 0.99))
    for step in range(2):
        before = copy.deepcopy(net)
        step_with_random_gradients(net, muon, step)
        step_with_random_gradients(adam_net, adam, step)

    by_adam = []
    for (name, p), of_adam, old in zip(net.named_parameters(), adam_net.parameters(),
                                       before.parameters(), strict=True):
        if p.dim() == 1 or name.split('.')[0] in ('embed', 'label', 'conv_in', 'conv_out'):
            by_adam.append(name)
            assert torch.equal(p, of_adam), name
            continue
        first = randn(*p.shape, seed=p.numel())
        average = 0.05 * (0.95 * first + p.grad)
        nesterov = 0.05 * p.grad + 0.95 * average  # once more with the gradient
        U, S, V = torch.linalg.svd(nesterov.flatten(1), full_matrices=False)
        move = (old - p).detach().flatten(1)
        turned = U.mT @ move @ V.mT / (0.2 * max(move.shape) ** 0.5 * 0.01)
        close(turned, turned.diag().diag(), atol=1e-9)  # the same singular vectors
        large = turned.diag()[S > 0.1 * S.max()]
        assert large.min() > 0.6 and large.max() < 1.25, name
    assert {'embed.0.weight', 'label.weight', 'conv_in.weight', 'conv_out.weight'} <= {*by_adam}


def test_muon__goes_on_from_its_saved_state():
    net = tiny_network()
    opt = Muon(net, lr=0.01)
    step_with_random_gradients(net, opt, 0)
    again = copy.deepcopy(net)
    other = Muon(again, lr=0.5)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    step_with_random_gradients(net, opt, 1)
    step_with_random_gradients(again, other, 1)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), again.parameters()))


def test_muon__takes_a_network_without_the_ends_of_a_unet():
    net = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.Conv2d(3, 2, 1)).double()
    before = copy.deepcopy(net)
    step_with_random_gradients(net, Muon(net, lr=0.01), 0)
    close(net[0].bias - before[0].bias, -0.01 * net[0].bias.grad.sign(), atol=1e-6)  # as Adam
    move = (before[0].weight - net[0].weight).detach().flatten(1)
    values = torch.linalg.svdvals(move) / (0.2 * 3 ** 0.5 * 0.01)
    assert values.min() > 0.6 and values.max() < 1.25
