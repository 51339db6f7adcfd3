"""The checkpoints of the authors of PFGM, PFGM++ and EDM, read safely into our own form, and the
constants of PFGM. You need not read it to understand the method.

PFGM's are files of tensors. Those of EDM and PFGM++ are pickles of whole objects with their source
text, which `pickle.load` would execute; Reader below reads them without that.
"""
import codecs
import io
import itertools
import math
import os
import pickle
import re
import zipfile
from typing import NamedTuple, Union

import numpy as np
import torch

import pfgm
from support.cli import BadInput
from support.networks import blank, check_shapes, check_tensors

# The constants that PFGM published for its data sets; those of other sets follow from the data.
CIFAR10 = dict(M=291, z_max=40, upper_norm=3e3, z_exp=5)
CELEBA64 = dict(M=291, z_max=60, upper_norm=6e3, z_exp=1)
LSUN_BEDROOM = dict(M=356, z_max=100, upper_norm=3e4, z_exp=0.1)
OFFICIAL = dict(cifar10=CIFAR10, cifar10_deep=CIFAR10, celeba64=CELEBA64,
                lsun_bedroom=LSUN_BEDROOM)
OFFICIAL_BY_SIZE = {32: 'cifar10', 64: 'celeba64', 256: 'lsun_bedroom'}

# Flags of train.py that the authors' files do not state, as they hold for all of these files unless
# a file says otherwise.
UNSTATED_FLAGS = dict(classes=0, method='pfgm', D=1.0, sigma_data=0.5, patch=1, m_draws=1,
                      muon=False, skip=False, decay=0.0, ncsnpp=False, label_first=False, edm=False)

# What torch.load(weights_only=True) has to accept besides tensors, by the names that NumPy 1 and
# NumPy 2 write: the learning rate in PFGM's files is a NumPy number.
NUMPY_SCALAR = np.float64().__reduce__()[0]
NUMPY_NUMBERS = [np.dtype, np.dtypes.Float64DType, (codecs.encode, '_codecs.encode'),
                 (NUMPY_SCALAR, 'numpy.core.multiarray.scalar'),
                 (NUMPY_SCALAR, 'numpy._core.multiarray.scalar')]


# ---------------------------------------------------------------- the files of PFGM

def official_architecture(model, path):
    """The flags of the network whose tensors {name: tensor} are `model`, from a file of PFGM.

    The authors number the modules in one row: two linear layers, the first convolution, the way
    down, the middle, the way up, the last group norm and the last convolution. The lengths of the
    vectors among the tensors tell which is which; a matrix may be transposed. Raises BadInput for
    what is no such network."""
    def width(name):
        name = f'module.all_modules.{name}'
        if name not in model:
            raise BadInput(f'--ckpt {path}: {name} is missing')
        return model[name].shape[0]

    def holds(name):
        return f'module.all_modules.{name}' in model

    numbers = {int(name.split('.')[2]) for name in model if name.startswith('module.all_modules.')}
    numbers = sorted(numbers)
    nf = width('2.bias')
    levels = [[]]  # of each, its residual blocks as multiples of nf, and 'attention'
    c = nf
    for number in numbers[3:-2]:
        if holds(f'{number}.NIN_0.b'):
            levels[-1].append('attention')
            continue
        c_in, c_out = width(f'{number}.GroupNorm_0.weight'), width(f'{number}.Conv_0.bias')
        if c_in != c:  # it takes a skip connection too: the way up begins
            break
        halves_the_image = c_in == c_out and holds(f'{number}.Conv_2.bias')  # else: no shortcut
        if halves_the_image:
            levels.append([])
        else:
            levels[-1].append(c_out // nf)
        c = c_out
    del levels[-1][-3:]  # the middle: a residual block, attention, a residual block
    attended = [k for k, level in enumerate(levels) if 'attention' in level]
    if not attended or not all(levels):
        raise BadInput(f'--ckpt {path}: not a DDPM++ of the authors (levels {levels})')
    image_size = 16 << attended[0]  # all their networks have attention at 16 x 16
    blocks = [block for block in levels[0] if block != 'attention']
    return dict(UNSTATED_FLAGS, image_size=image_size, nf=nf,
                channels=width(f'{numbers[-1]}.bias') - 1,
                ch_mult=[level[0] for level in levels], attn=[16],
                dropout=0.0 if image_size == 256 else 0.1,  # LSUN was trained without
                num_blocks=len(blocks))


def convert_official(saved, path):
    """A file of PFGM, a dict of model, ema, optimizer and step, in our own form: a dict of net,
    ema, opt, step and args. Raises BadInput for tensors that are no network, and may raise anything
    where the file is damaged."""
    shadow = saved['ema']['shadow_params']  # a list, in the order of the parameters
    state = saved['optimizer']['state']
    model = {name: t for name, t in saved['model'].items() if name != 'module.sigmas'}
    flags = official_architecture(model, path)
    net = blank(flags, len(model), path)
    names = official_names(net)
    # These are checked before the projections are transposed. They are square, so that both ways
    # round have one shape.
    check_shapes({names[name]: p for name, p in net.named_parameters()}, model, path)
    check_shapes({f'ema.shadow_params[{i}]': p for i, p in enumerate(net.parameters())},
                 {f'ema.shadow_params[{i}]': t for i, t in enumerate(shadow)}, path)

    def ours(tensors):
        """Tensors in the order of the parameters, as {our name: tensor}."""
        tensors = dict(zip(names, tensors))
        check_tensors(tensors)
        for name, t in tensors.items():
            if names[name].endswith('.W'):  # a projection, which they keep as (in, out)
                t = t.T
            tensors[name] = t.clone()
        return tensors

    moments = {}
    if state:
        averages = ours(state[i]['exp_avg'] for i in range(len(names)))
        squares = ours(state[i]['exp_avg_sq'] for i in range(len(names)))
        for i, name in enumerate(names):
            moments[i] = dict(step=torch.as_tensor(state[i]['step'], dtype=torch.float32),
                              exp_avg=averages[name], exp_avg_sq=squares[name])
    groups = [dict(group, lr=float(group['lr'])) for group in saved['optimizer']['param_groups']]
    return dict(net=ours(model[name] for name in names.values()), ema=ours(shadow),
                opt=dict(state=moments, param_groups=groups), step=int(saved['step']),
                args=dict(flags, official=True))


# ---------------------------------------------------------------- the files of EDM and PFGM++

# What the constructors of their networks are given where the files do not say.
DDPMPP = dict(embedding_type='positional', encoder_type='standard', decoder_type='standard',
              channel_mult_noise=1, channel_mult_emb=4, resample_filter=[1, 1])
NCSNPP = dict(DDPMPP, embedding_type='fourier', encoder_type='residual', channel_mult_noise=2,
              resample_filter=[1, 3, 3, 1])
EDM_DEFAULTS = dict(DDPMPP, model_type='DhariwalUNet', model_channels=128, num_blocks=4,
                    channel_mult=[1, 2, 2, 2], attn_resolutions=[16], dropout=0.1, sigma_data=0.5)


def edm_flags(saved, path):
    """The flags of the network in `saved`, what read_objects() makes of a file of EDM or PFGM++.
    Raises BadInput for networks that are not built here."""
    if not isinstance(saved, dict) or 'ema' not in saved:
        raise BadInput(f'--ckpt {path}: no ema in it; give the network-snapshot beside it')
    state = saved['ema']['state']
    given = {**EDM_DEFAULTS, **state['_init_kwargs'], **state}
    network = given['model_type']
    if network == 'DhariwalUNet':
        network = 'ADM'
    network = saved['ema']['class_name'] + ' of ' + network
    variant = {key: given[key] for key in DDPMPP}
    if network != 'EDMPrecond of SongUNet' or variant not in (DDPMPP, NCSNPP):
        raise BadInput(
            f'--ckpt {path}: {network[:60]}; of the networks of EDM and PFGM++ accepted: '
            'EDMPrecond of SongUNet, DDPM++ or NCSN++ (not ADM, nor the baselines)')
    D = math.inf  # also where a D is stated beside a flag that is False
    if any(given.get(key) for key in ('pfgmpp', 'pfgmv2', 'pfgm')):
        D = float(given['D'])
    return dict(
        UNSTATED_FLAGS, image_size=int(given['img_resolution']),
        channels=int(given['img_channels']), nf=int(given['model_channels']),
        ch_mult=[int(mult) for mult in given['channel_mult']], num_blocks=int(given['num_blocks']),
        attn=[int(size) for size in given['attn_resolutions']], dropout=float(given['dropout']),
        classes=int(given['label_dim']), ncsnpp=variant == NCSNPP, label_first=True,
        method='pfgmpp', D=D, sigma_data=float(given['sigma_data']), edm=True,
        z_min=pfgm.Denoiser.low * pfgm.unit(D), z_max=pfgm.Denoiser.high * pfgm.unit(D), z_exp=0.0,
        gamma=5.0, upper_norm=None)


def read_edm(path, whole=False):
    """A training-state or network-snapshot of EDM or PFGM++ in our own form: a dict of ema, step
    and args, and if `whole` is asked for also of net and opt, where the file has them. Raises
    BadInput for other networks, and may raise anything where the file is damaged."""
    saved = read_objects(path)
    flags = edm_flags(saved, path)
    tensors = tensors_of(saved['ema'])
    names = edm_names(blank(flags, len(tensors), path), tensors)
    room = os.path.getsize(path)

    def ours(tensors, names):
        """{their name: Stored} as {our name: tensor}."""
        claimed = sum(4 * math.prod(tensors[theirs].size) for theirs in set(names.values()))
        if claimed > room:  # many tensors that share a few numbers
            raise ValueError('its parts claim more bytes than it has')
        return {name: fitted(name, tensor_of(tensors[theirs])) for name, theirs in names.items()}

    checkpoint = dict(ema=ours(tensors, names), step=0, args=flags)
    if whole and 'net' in saved:
        checkpoint['net'] = ours(tensors_of(saved['net']), names)
    optimizer = saved.get('optimizer_state') or {}
    state = optimizer.get('state')  # {number of the parameter: its step and moments}
    if state:
        step = state[0]['step']
        if isinstance(step, Stored):
            step = tensor_of(step)
        checkpoint['step'] = int(step)
    if state and whole:
        theirs = [name for name in tensors if name.endswith(('weight', 'bias'))]
        names.pop('freq', None)  # no parameter
        averages = ours({theirs[i]: row['exp_avg'] for i, row in state.items()}, names)
        squares = ours({theirs[i]: row['exp_avg_sq'] for i, row in state.items()}, names)
        moments = {i: dict(step=torch.tensor(float(checkpoint['step'])), exp_avg=averages[name],
                           exp_avg_sq=squares[name]) for i, name in enumerate(names)}
        group = optimizer['param_groups'][0]
        group = {key: group[key] for key in ('lr', 'betas', 'eps', 'weight_decay')}
        group['params'] = list(range(len(names)))
        checkpoint['opt'] = dict(param_groups=[group], state=moments)
    return checkpoint


def fitted(name, t):
    """Their tensor t as our parameter `name`."""
    layer = f'.{name}'.split('.')[-2]
    if layer in ('q', 'k', 'v'):  # there one convolution makes all three, channel by channel
        t = t['qkv'.index(layer)::3]
    if layer in ('q', 'k', 'v', 'out'):  # there a 1 x 1 convolution
        t = t.reshape(t.shape[:2])
    if layer == 'conv_out':  # our last channel is v_z, of which a denoiser makes no use
        t = torch.cat([t, torch.zeros_like(t[:1])])
    return t.contiguous()


def tensors_of(network):
    """{name: Stored} of the U-Net in one of the networks of such a file, in the order of its
    parameters. ValueError where a hostile file has put modules into one another without end."""
    def walk(module, prefix):
        state = module.get('state', module)  # a ModuleDict has no `state`
        for group in ('_parameters', '_buffers', '_modules'):
            for key, part in state[group].items():
                if len(prefix + key) > 100:  # a module within itself has ever longer names
                    raise ValueError('a name too long')
                is_module = group == '_modules'
                yield prefix + key, None if is_module else part
                if is_module and part is not None:
                    yield from walk(part, f'{prefix}{key}.')

    # Each of 60 modules may hold the next one twice; no file of theirs has nearly so many parts.
    parts = itertools.islice(walk(network['state']['_modules']['model'], ''), 10 ** 5)
    return {name: part for name, part in parts if part is not None}


# ---------------------------------------------------------------- pickles that must not run
#
# A pickle is a program: its opcodes push values on a stack, look up any Python object by name, and
# call it. So these files are run by a machine of our own, which knows a closed list of names and
# makes plain values of them. A hostile file may also try to exhaust memory or the C stack; each
# departure from Python's own class below says what it is against.

class Numbers(NamedTuple):
    """The numbers of a tensor that torch.save has put into a zip."""
    raw: bytes
    count: int  # how many float32 they should be


class Stored(NamedTuple):
    """A tensor as a pickle describes it; tensor_of() makes it."""
    storage: Union[bytes, Numbers]  # bytes: a small file of torch.save, as plain pickles hold it
    offset: int
    size: list
    stride: list


class Plain(dict):
    """A dict that can only be made empty. With dict(other) a short file could make many copies."""

    def __init__(self):
        super().__init__()


def rebuild_tensor(storage, offset, size, stride, *_):
    numbers = [offset, *size, *stride]
    if len(numbers) > 20 or not all(type(n) is int and 0 <= n < 2 ** 40 for n in numbers):
        raise ValueError('no shape of a tensor')  # the product of long numbers could take forever
    return Stored(storage, offset, size, stride)


def encode(text, encoding):
    if len(text) > 8:  # one number; longer texts could be multiplied as dicts could
        raise ValueError('a text too long')
    return text.encode('latin1')


def numpy_scalar(dtype, raw):
    return np.frombuffer(raw, '<f8').item()  # all of theirs are float64


KNOWN = {  # every name that stands in a checkpoint of EDM or PFGM++, and what is made of it
    'torch_utils.persistence._reconstruct_persistent_obj': lambda meta: meta,
    'torch.nn.modules.container.ModuleDict': Plain,
    'collections.OrderedDict': Plain,
    'torch._utils._rebuild_parameter': lambda tensor, *_: tensor,
    'torch._utils._rebuild_tensor_v2': rebuild_tensor,
    'torch.storage._load_from_bytes': lambda packed: packed,
    'torch.FloatStorage': 'float32',
    'numpy.dtype': lambda *_: Plain(),
    'numpy.core.multiarray.scalar': numpy_scalar,
    'numpy._core.multiarray.scalar': numpy_scalar,
    '__builtin__.set': lambda *_: None,
    '_codecs.encode': encode,
}


class Reader(pickle._Unpickler):
    """Reads a pickle as dicts, lists, numbers and Stored, and calls nothing but what KNOWN has.

    parts: {name: bytes} of the storages in a zip of torch.save. It is Python's own class and not
    the one written in C, which would set aside as much memory as a file claims to need, and whose
    opcodes cannot be replaced."""

    def __init__(self, file, parts=None):
        super().__init__(file)
        self.parts = parts or {}

    def find_class(self, module, name):
        name = f'{module}.{name}'
        if name not in KNOWN:
            raise ValueError(f'it asks for {name}'[:100])
        return KNOWN[name]

    def persistent_load(self, key):
        _, _, name, _, count = key[:5]  # 'storage', its type, name, device, count
        return Numbers(self.parts.get(name), count)

    def load_build(self):
        # Python would set the attributes of any object, of a function of KNOWN as well, or call its
        # __setstate__. Here an object is a dict, and its state more entries of it.
        state = self.stack.pop()
        self.stack[-1].update(state if isinstance(state, dict) else {})

    def load_short_tuple(self, count):
        # A tuple becomes a list. As the key of a dict it would be hashed, and one that is nested
        # deep enough would overflow the stack of C, which ends Python. A list has no hash.
        self.stack[-count:] = [self.stack[-count:]]

    dispatch = dict(pickle._Unpickler.dispatch)
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.TUPLE[0]] = pickle._Unpickler.load_list
    dispatch[pickle.TUPLE1[0]] = lambda self: self.load_short_tuple(1)
    dispatch[pickle.TUPLE2[0]] = lambda self: self.load_short_tuple(2)
    dispatch[pickle.TUPLE3[0]] = lambda self: self.load_short_tuple(3)
    del dispatch[pickle.BYTEARRAY8[0]]  # it fills as many bytes as the file claims, before reading


def holds_objects(path):
    """Whether a file is one for read_objects(), else for torch.load().

    ValueError for a zip that is compressed or fails its checksums. torch.save does not compress, so
    that no entry can be larger than the file; torch.load would unpack one to any size, and does not
    look at checksums."""
    with open(path, 'rb') as file:
        start = file.read(4)
        if start[:2] != b'PK':
            # All pickles start with b'\x80'; those of torch.save, before it wrote zips, hold a
            # number first.
            return start[:1] == b'\x80' and start[2:] != b'\x8a\n'
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
            if compressed or sum(entry.file_size for entry in entries) > os.path.getsize(path):
                raise ValueError('its parts claim more bytes than it has')
            broken = archive.testzip()
            if broken:
                raise ValueError(f'{broken} fails its checksum')
            return any(b'torch_utils.persistence' in archive.read(entry)
                       for entry in entries if entry.filename.endswith('data.pkl'))


def read_objects(path):
    """What a pickle, plain or in a zip of torch.save, holds, as Reader reads it. Raises ValueError
    where it asks for another name, and may raise anything where the file is damaged."""
    with open(path, 'rb') as file:
        raw = file.read()  # whole, so that a claim of a length ends where the file does
    if raw[:2] != b'PK':
        return Reader(io.BytesIO(raw)).load()
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    root = next(name for name in entries if name.endswith('data.pkl'))
    folder = root.removesuffix('data.pkl') + 'data/'
    parts = {name.removeprefix(folder): content for name, content in entries.items()
             if name.startswith(folder)}
    return Reader(io.BytesIO(entries[root]), parts).load()


def tensor_of(stored):
    """The float32 tensor of a Stored, with memory of its own. ValueError where the file does not
    hold all of it."""
    storage = stored.storage
    if isinstance(storage, bytes):  # five pickles, the fourth of the storage; a count; the numbers
        file = io.BytesIO(storage)
        *_, storage, _ = [Reader(file).load() for _ in range(5)]
        storage = storage._replace(raw=file.read()[8:])
    whole = len(storage.raw) == 4 * storage.count and math.prod(stored.size) <= storage.count
    if not whole or 0 in stored.stride:  # which would repeat a number without end
        raise ValueError('a tensor is not held in full')
    numbers = torch.from_numpy(np.frombuffer(storage.raw, '<f4').copy())
    return numbers.as_strided(stored.size, stored.stride, stored.offset)


# ---------------------------------------------------------------- their names for our parameters

OFFICIAL_NAME = dict(norm1='GroupNorm_0', conv1='Conv_0', emb='Dense_0', norm2='GroupNorm_1',
                     conv2='Conv_1', shortcut='Conv_2', norm='GroupNorm_0', q='NIN_0', k='NIN_1',
                     v='NIN_2', out='NIN_3')


def official_names(net):
    """{our parameter name: PFGM's name}, in the order of both.

    Our names begin with a unit (conv_in, embed.0, down.0.1), go on with a layer where the unit has
    several, and end in weight or bias. PFGM numbers the units: down.0.0.conv1.weight is
    module.all_modules.3.Conv_0.weight."""
    numbers, names = {}, {}
    for ours, _ in net.named_parameters():
        unit, layer, leaf = re.fullmatch(r'([a-z_]+(?:\.\d+)*)\.(?:(\w+)\.)?(\w+)', ours).groups()
        number = numbers.setdefault(unit, len(numbers))
        if layer in ('q', 'k', 'v', 'out'):
            leaf = {'weight': 'W', 'bias': 'b'}[leaf]
        if layer:
            leaf = f'{OFFICIAL_NAME[layer]}.{leaf}'
        names[ours] = f'module.all_modules.{number}.{leaf}'
    return names


def edm_names(net, theirs):
    """{our name: EDM's name} of all parameters, in our order, and of the frequencies of NCSN++.

    theirs: all of EDM's names, in its order. It is ours but for two things: q, k and v are one
    convolution there, and what maps noise and labels comes first. Left out are the FIR filters,
    which are constants, and map_augment, which adds nothing to images that are not augmented.
    Raises ValueError where a name is left over."""
    left = [name for name in theirs if not name.endswith('resample_filter')
            and not name.startswith(('map_label', 'map_augment', 'map_noise'))]
    left.reverse()  # to be taken from the end
    names = {'freq': 'map_noise.freqs'} if net.ncsnpp else {}
    for ours, _ in net.named_parameters():
        q = ours.replace('.k.', '.q.').replace('.v.', '.q.')
        if ours.startswith('label.'):
            names[ours] = f'map_{ours}'
        elif q in names:  # ours is of k or v
            names[ours] = names[q]
        else:
            names[ours] = left.pop()
    if left:
        raise ValueError(f'{left[0]} does not belong'[:100])
    return names
