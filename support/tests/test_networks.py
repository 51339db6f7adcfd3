"""Tests of support/networks.py: networks from flags and tensors that may be wrong."""
import functools
import re

import pytest
import torch

import pfgm
import unet
from support import networks
from support.cli import BadInput
from support.methods import RectifiedFlow
from support.tests.common import close, seeded
from support.tests.made import limited

FLAGS = dict(image_size=8, channels=1, nf=8, ch_mult=[1, 2], num_blocks=1, attn=[], dropout=0.0,
             classes=0, patch=1, ncsnpp=False, label_first=False)


def random_net(**flags):
    """A UNet of FLAGS in which all parameters are random, also those that are 0 at first."""
    net = unet.UNet(**{**FLAGS, **flags}).eval()
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=seeded()) / 4
    return net


# ---------------------------------------------------------------- build

def test_build__gives_the_network_of_the_tensors():
    net = random_net()
    built = networks.build(net.state_dict(), FLAGS, 'a.pt')
    assert not built.training
    x, z = torch.randn(2, 1, 8, 8, generator=seeded()), torch.tensor([1.0, 2.0])
    for ours, wanted in zip(built(x, z), net(x, z)):
        close(ours.detach(), wanted.detach(), atol=1e-5)


def test_in_bfloat16__gives_the_numbers_of_autocast_which_casts_the_weights_itself():
    net = networks.speed_up(random_net(attn=[8])).requires_grad_(False)
    before = {name: p.clone() for name, p in net.state_dict().items()}
    cast = networks.in_bfloat16(net)
    x, z = torch.randn(2, 1, 8, 8, generator=seeded()), torch.tensor([1.0, 2.0])
    with torch.autocast('cpu', torch.bfloat16):
        for ours, wanted in zip(cast(x, z), net(x, z)):
            assert torch.equal(ours, wanted) and ours.dtype == torch.float32
    assert all(torch.equal(p, before[name]) for name, p in net.state_dict().items())
    float32 = {name.split('.')[-2] for name, p in cast.named_parameters()
               if p.dtype == torch.float32}
    assert float32 == {'norm', 'norm1', 'norm2', 'norm_out', 'conv_out'}  # on a CPU


@pytest.mark.slow  # TorchDynamo's import alone takes seconds
@pytest.mark.parametrize('method', [
    functools.partial(pfgm.PFGM, skip=True), functools.partial(pfgm.Denoiser, D=2, data_norm=5.0),
    pfgm.Denoiser, RectifiedFlow])
def test_flow__compiled_is_one_graph_in_training_and_one_in_sampling(method):
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    net = networks.speed_up(random_net(attn=[8], dropout=0.1))
    flow = method(net.to(memory_format=torch.channels_last))
    flow.compile(backend=backend, fullgraph=True)  # an error where the graph would break
    for training in (True, False):
        flow.train(training)
        for _ in range(2):
            with torch.autocast('cpu', torch.bfloat16), torch.set_grad_enabled(training):
                flow(torch.ones(2, 1, 8, 8), torch.ones(2))
        assert len(graphs) == 2 - training


def test_build__names_the_tensors_that_do_not_fit():
    state = random_net().state_dict()
    state['other'] = state.pop('conv_in.weight')
    state['conv_in.bias'] = torch.zeros(3)
    message = ('--ckpt a.pt: not the architecture it claims: conv_in.weight is missing; '
               'other does not belong; conv_in.bias is (3,), expected (8,)')
    with pytest.raises(BadInput, match=re.escape(message) + '$'):
        networks.build(state, FLAGS, 'a.pt')
    state['more'] = state['other']
    with pytest.raises(BadInput, match='other does not belong and 1 more$'):
        networks.build(state, FLAGS, 'a.pt')


@pytest.mark.parametrize('flag, value', [
    ('nf', 10 ** 9), ('nf', 10 ** 30), ('nf', -8), ('nf', 2.5), ('num_blocks', 10 ** 9),
    ('ch_mult', [1] * 10 ** 5), ('ch_mult', None), ('image_size', 2 ** 40), ('image_size', '8'),
    ('patch', 0), ('patch', 16), ('channels', 2), ('dropout', 1), ('dropout', float('nan')),
    ('classes', 2 ** 31), ('classes', None), ('attn', 8)])
@pytest.mark.parametrize('ncsnpp', [False, True])
def test_blank__refuses_flags_of_no_network_before_it_is_built(flag, value, ncsnpp):
    flags = dict(FLAGS, ncsnpp=ncsnpp)
    flags[flag] = value
    with limited(20, 2), pytest.raises(BadInput, match='^--ckpt a.pt: no usable architecture'):
        networks.blank(flags, 100, 'a.pt')


def test_blank__draws_no_frequencies_for_a_network_of_any_width():
    with pytest.raises(BadInput, match='a value out of range'):
        networks.blank(dict(FLAGS, ncsnpp=True, nf=2 ** 13), 100, 'a.pt')


@pytest.mark.parametrize('flag', networks.ARCHITECTURE)
def test_blank__refuses_flags_that_are_missing(flag):
    flags = {key: value for key, value in FLAGS.items() if key != flag}
    with pytest.raises(BadInput, match=f"^--ckpt a.pt: no usable architecture .*'{flag}'"):
        networks.blank(flags, 100, 'a.pt')


@pytest.mark.parametrize('t', [
    None, 5, torch.zeros(3).half(), torch.zeros(3).to_sparse(), torch.zeros(3, device='meta'),
    torch.zeros(1).expand(3), torch.zeros(1).expand(10 ** 12)])
def test_check_tensors__wants_float32_held_in_full(t):
    with pytest.raises(ValueError, match='a.b. is not a float32 tensor held in full'):
        networks.check_tensors({'a.b': t})
    networks.check_tensors({'a.b': torch.zeros(3)})


# ---------------------------------------------------------------- for_classes

@pytest.mark.parametrize('label_first', [False, True])
@pytest.mark.parametrize('classes', [0, 3])
def test_for_classes__a_new_label_layer_begins_as_no_label(classes, label_first):
    old = random_net(classes=2, label_first=label_first)
    saved = dict(net=old.state_dict(), ema=old.state_dict(), step=7,
                 args=dict(label_first=label_first))
    changed = networks.for_classes(saved, classes)
    assert changed['step'] == 0 and 'label.weight' in saved['ema']
    new = unet.UNet(**dict(FLAGS, classes=classes, label_first=label_first)).eval()
    x, z = torch.randn(2, 1, 8, 8, generator=seeded()), torch.tensor([1.0, 2.0])
    label = [torch.tensor([2, 0])] if classes else []
    for part in ('net', 'ema'):
        new.load_state_dict(changed[part])
        for ours, wanted in zip(new(x, z, *label), old(x, z)):
            close(ours.detach(), wanted.detach(), atol=1e-5, rtol=1e-5)
