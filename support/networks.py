"""A UNet from the flags and the tensors of a checkpoint, which are checked before anything is
built. You need not read it to understand the method.
"""
import copy

import torch
import torch.nn as nn

from support.cli import BadInput, CLASS_LIMIT, SIZE_LIMIT
from support.cpu import speed_up
from unet import GroupNorm, UNet

ARCHITECTURE = ('image_size', 'channels', 'nf', 'ch_mult', 'num_blocks', 'attn', 'dropout',
                'classes', 'patch', 'ncsnpp', 'label_first')  # the flags that UNet() takes
NF_LIMIT = 2 ** 12


# ---------------------------------------------------------------- checks

def check_tensors(tensors):
    """ValueError unless all values of {name: tensor} are float32 and held in full.

    A tensor with a stride of 0 repeats one number, so that a file of some bytes can claim a
    terabyte; the first copy of it would ask for that much memory."""
    for name, t in tensors.items():
        good = (isinstance(name, str) and torch.is_tensor(t) and t.dtype == torch.float32
                and t.layout == torch.strided and t.device.type == 'cpu'
                and t.untyped_storage().nbytes() >= t.nbytes)
        if not good:
            raise ValueError(f'{name!r} is not a float32 tensor held in full')


def check_shapes(expected, tensors, path):
    """BadInput unless `tensors` of the file `path` have the names and shapes of `expected`, which
    is {name: tensor} too."""
    faults = [f'{name} is missing' for name in sorted(expected.keys() - tensors.keys())]
    faults += [f'{name} does not belong' for name in sorted(tensors.keys() - expected.keys())]
    for name in sorted(expected.keys() & tensors.keys()):
        shape, wanted = tuple(tensors[name].shape), tuple(expected[name].shape)
        if shape != wanted:
            faults.append(f'{name} is {shape}, expected {wanted}')
    if faults:
        told = '; '.join(faults[:3])
        if len(faults) > 3:
            told += f' and {len(faults) - 3} more'
        raise BadInput(f'--ckpt {path}: not the architecture it claims: {told}')


# ---------------------------------------------------------------- networks

def blank(flags, tensor_count, path):
    """The UNet that `flags` describe, on the device 'meta': it has shapes, but no memory.

    tensor_count: how many tensors the file `path` has for it; a network of more blocks than that is
    refused before it is built. Raises BadInput."""
    try:
        small_enough = (flags['num_blocks'] * len(flags['ch_mult']) <= tensor_count
                        and flags['nf'] <= NF_LIMIT and flags['channels'] in (1, 3)
                        and 1 <= flags['patch'] <= flags['image_size'] <= SIZE_LIMIT
                        and 0 <= flags['dropout'] < 1 and 0 <= flags['classes'] <= CLASS_LIMIT)
        if not small_enough:  # to build it could take forever
            raise ValueError('a value out of range')
        with torch.device('meta'):
            return UNet(**{key: flags[key] for key in ARCHITECTURE})
    except Exception as error:  # a value of another type can fail anywhere in there
        raise BadInput(f'--ckpt {path}: no usable architecture in its args '
                       f'({repr(error)[:150]})') from error


def build(state, flags, path):
    """The UNet that `flags` describe, in eval mode, with the tensors of `state`, both of the file
    `path`. Raises BadInput, which names the first tensors that do not fit."""
    net = blank(flags, len(state), path)
    check_shapes(net.state_dict(), state, path)
    net.load_state_dict(state, assign=True)
    return speed_up(net).eval()


def in_bfloat16(net):
    """A copy of a network, for calls under autocast to bfloat16, whose UNet has its weights cast
    already. Autocast itself casts weights without a gradient anew in every call.

    The last layers of a UNet stay float32, and so do the group norms on a CPU, whose kernel takes
    them beside an input in bfloat16."""
    shared = {id(t): t for t in (*net.parameters(), *net.buffers())}  # of both, until cast
    net = copy.deepcopy(net, shared)
    for whole in net.modules():
        if not isinstance(whole, UNet):
            continue
        for layer in whole.modules():
            is_product = isinstance(layer, (nn.Conv2d, nn.Linear))
            is_norm = isinstance(layer, GroupNorm) and layer.weight.device.type != 'cpu'
            if layer in (whole.norm_out, whole.conv_out) or not (is_product or is_norm):
                continue
            for name, p in layer.named_parameters(recurse=False):
                setattr(layer, name, nn.Parameter(p.to(torch.bfloat16), requires_grad=False))
    return net


def for_classes(saved, count):
    """A checkpoint, a dict of net, ema and args, for a network of `count` classes, none where it is
    0, which may be others than before. -> dict(net, ema, step=0, args), without an optimizer.

    The weights of the new label layer are 0, and its bias is the old one's: the network begins as
    what it was without a label."""
    label_first = saved['args']['label_first']

    def relabelled(state):
        state = dict(state)
        weight = state['embed.0.weight']                             # (4 nf, width)
        width = weight.shape[1] if label_first else weight.shape[0]
        bias = state.pop('label.bias', weight.new_zeros(width))
        state.pop('label.weight', None)
        if count:
            state['label.weight'] = torch.zeros(width, count)
            state['label.bias'] = bias
        else:  # no layer is left to hold the bias: the layer that it was added to takes it over
            if label_first:
                bias = weight @ bias
            state['embed.0.bias'] = state['embed.0.bias'] + bias
        return state

    return dict(net=relabelled(saved['net']), ema=relabelled(saved['ema']), step=0,
                args=saved['args'])
