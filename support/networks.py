"""A UNet from the arguments and tensors of a checkpoint, checked before anything is built. You need not
read it to understand the method.
"""

import torch

from support.cli import BadInput, CLASS_LIMIT, SIZE_LIMIT
from support.cpu import speed_up
from unet import UNet


# ---------------------------------------------------------------- checkpoints

def check_tensors(tensors):
    """ValueError unless all are float32 and held in full: a stride of 0 makes one number look like
    a terabyte, which the first copy would take."""
    for name, t in tensors.items():
        if not (isinstance(name, str) and torch.is_tensor(t) and t.dtype == torch.float32
                and t.layout == torch.strided and t.device.type == 'cpu'
                and t.untyped_storage().nbytes() >= t.nbytes):
            raise ValueError(f'{name!r} is not a float32 tensor held in full')

ARCHITECTURE = ('image_size', 'channels', 'nf', 'ch_mult', 'num_blocks', 'attn', 'dropout',
                'classes', 'patch', 'ncsnpp', 'label_first')

BEFORE_D = dict(classes=0, method='pfgm', D=1.0, sigma_data=0.5, patch=1, m_draws=1, muon=False,
                skip=False, decay=0.0, ncsnpp=False, label_first=False,
                edm=False)  # of files that do not say


def blank(args, tensors, path):
    """The UNet of `args` without memory for its weights, of which a file has that many tensors."""
    try:
        if not (args['num_blocks'] * len(args['ch_mult']) <= tensors and args['channels'] in (1, 3)
                and 1 <= args['patch'] <= args['image_size'] <= SIZE_LIMIT
                and 0 <= args['dropout'] < 1 and 0 <= args['classes'] <= CLASS_LIMIT):
            raise ValueError('a value out of range')  # building it could take forever
        with torch.device('meta'):
            return UNet(**{k: args[k] for k in ARCHITECTURE})
    except Exception as error:  # of the wrong type, it can fail anywhere in there
        raise BadInput(f'--ckpt {path}: no usable architecture in its args '
                       f'({repr(error)[:150]})') from error


def build(state, args, path):
    """The UNet of `args` with the tensors of `state`; BadInput names the first that differ."""
    net = blank(args, len(state), path)
    check_shapes(net.state_dict(), state, path)
    net.load_state_dict(state, assign=True)
    return speed_up(net).eval()


def check_shapes(expected, found, path):
    """BadInput unless found, {name: tensor}, has the names and shapes of expected."""
    faults = ([f'{k} is missing' for k in sorted(expected.keys() - found.keys())] +
              [f'{k} does not belong' for k in sorted(found.keys() - expected.keys())] +
              [f'{k} is {tuple(found[k].shape)}, expected {tuple(expected[k].shape)}'
               for k in sorted(expected.keys() & found.keys())
               if found[k].shape != expected[k].shape])
    if faults:
        more = f' and {len(faults) - 3} more' if len(faults) > 3 else ''
        raise BadInput(f'--ckpt {path}: not the architecture it claims: '
                       f'{"; ".join(faults[:3])}{more}')


def for_classes(saved, count):
    """A checkpoint for another number of classes, or others: step 0, no optimizer, and a new label
    layer of zeros, with which the network begins as what it was without a label."""
    parts, first = {}, saved['args']['label_first']
    for part in ('net', 'ema'):
        state, weight = dict(saved[part]), saved[part]['embed.0.weight']
        bias = state.pop('label.bias', weight.new_zeros(weight.shape[first]))
        state.pop('label.weight', None)
        if count:
            state.update({'label.weight': torch.zeros(len(bias), count), 'label.bias': bias})
        else:
            state['embed.0.bias'] = state['embed.0.bias'] + (weight @ bias if first else bias)
        parts[part] = state
    return dict(parts, step=0, args=saved['args'])
