"""The checkpoints of the authors of PFGM, PFGM++ and EDM, and their constants. You need not read it to
understand the method.
"""
import io
import itertools
import math
import os
import pickle
import re
import zipfile

import numpy as np
import torch

import pfgm
from support.cli import BadInput
from support.networks import BEFORE_D, blank, check_shapes, check_tensors

# The constants that PFGM published for its data sets; those of other sets follow from the data.
CIFAR10 = dict(M=291, z_max=40, upper_norm=3e3, z_exp=5)
CELEBA64 = dict(M=291, z_max=60, upper_norm=6e3, z_exp=1)
LSUN_BEDROOM = dict(M=356, z_max=100, upper_norm=3e4, z_exp=0.1)
OFFICIAL = dict(cifar10=CIFAR10, cifar10_deep=CIFAR10, celeba64=CELEBA64,
                lsun_bedroom=LSUN_BEDROOM)
OFFICIAL_BY_SIZE = {32: 'cifar10', 64: 'celeba64', 256: 'lsun_bedroom'}


# ---------------------------------------------------------------- the authors' files

def official_architecture(model, path):
    """UNet arguments from the vectors among the official tensors (a matrix may be transposed)."""
    def width(name):
        if f'module.all_modules.{name}' not in model:
            raise BadInput(f'--ckpt {path}: module.all_modules.{name} is missing')
        return model[f'module.all_modules.{name}'].shape[0]
    indices = sorted({int(k.split('.')[2]) for k in model if k.startswith('module.all_modules.')})
    nf, levels = width('2.bias'), [[]]
    c = nf
    for i in indices[3:-2]:
        if f'module.all_modules.{i}.NIN_0.b' in model:
            levels[-1].append('attention')
            continue
        c_in, c_out = width(f'{i}.GroupNorm_0.weight'), width(f'{i}.Conv_0.bias')
        if c_in != c:  # the first block on concat(h, skip): the way up begins
            break
        if c_in == c_out and f'module.all_modules.{i}.Conv_2.bias' in model:
            levels.append([])  # it has a shortcut because it halves the image
        else:
            levels[-1].append(c_out // nf)
        c = c_out
    del levels[-1][-3:]  # the middle: residual, attention, residual
    attended = [i for i, level in enumerate(levels) if 'attention' in level]
    if not attended or not all(levels):
        raise BadInput(f'--ckpt {path}: not a DDPM++ of the authors (levels {levels})')
    return dict(BEFORE_D, image_size=16 << attended[0], nf=nf,
                channels=width(f'{indices[-1]}.bias') - 1,
                ch_mult=[level[0] for level in levels], attn=[16],
                dropout=0.0 if attended[0] == 4 else 0.1,  # LSUN was trained without
                num_blocks=len([block for block in levels[0] if block != 'attention']))


def convert_official(saved, path):
    """An official dict(model, ema, optimizer, step) in our own form. q, k, v and out projections
    are stored (in, out) there, the transpose of a linear layer's weight."""
    shadow, state = saved['ema']['shadow_params'], saved['optimizer']['state']
    model = {k: v for k, v in saved['model'].items() if k != 'module.sigmas'}
    args = official_architecture(model, path)
    net = blank(args, len(model), path)
    names = official_names(net)
    expected = {names[k]: v for k, v in net.named_parameters()}  # square, so any way round
    check_shapes(expected, model, path)
    check_shapes({f'ema.shadow_params[{i}]': v for i, v in enumerate(net.parameters())},
                 {f'ema.shadow_params[{i}]': v for i, v in enumerate(shadow)}, path)

    def ours(tensors):
        tensors = dict(zip(names, tensors))
        check_tensors(tensors)
        return {k: (t.T if names[k].endswith('.W') else t).clone() for k, t in tensors.items()}
    moments = [ours([state[i][k] for i in range(len(names))]).values() if state else []
               for k in ('exp_avg', 'exp_avg_sq')]
    opt = {'state': {i: dict(step=torch.as_tensor(state[i]['step'], dtype=torch.float32),
                             exp_avg=m, exp_avg_sq=v) for i, (m, v) in enumerate(zip(*moments))},
           'param_groups': [dict(g, lr=float(g['lr'])) for g in saved['optimizer']['param_groups']]}
    return dict(net=ours(model[n] for n in names.values()), ema=ours(shadow), opt=opt,
                step=int(saved['step']), args=dict(args, official=True))


# ---------------------------------------------------------------- the files of EDM and PFGM++

DDPMPP = dict(embedding_type='positional', encoder_type='standard', decoder_type='standard',
              channel_mult_noise=1, channel_mult_emb=4, resample_filter=[1, 1])

NCSNPP = dict(DDPMPP, embedding_type='fourier', encoder_type='residual', channel_mult_noise=2,
              resample_filter=[1, 3, 3, 1])

EDM_DEFAULTS = dict(DDPMPP, model_type='DhariwalUNet', model_channels=128, num_blocks=4,
                    channel_mult=[1, 2, 2, 2], attn_resolutions=[16], dropout=0.1, sigma_data=0.5)


def edm_args(saved, path):
    """Our args, from the state of their EMA and what its constructor was given."""
    if not isinstance(saved, dict) or 'ema' not in saved:
        raise BadInput(f'--ckpt {path}: no ema in it; give the network-snapshot beside it')
    state = saved['ema']['state']
    given = {**EDM_DEFAULTS, **state['_init_kwargs'], **state}
    kind, look = saved['ema']['class_name'] + ' of ', {k: given[k] for k in DDPMPP}
    kind += {'DhariwalUNet': 'ADM'}.get(given['model_type'], given['model_type'])
    if kind != 'EDMPrecond of SongUNet' or look not in (DDPMPP, NCSNPP):
        raise BadInput(f'--ckpt {path}: {kind[:60]}; of the networks of EDM and PFGM++ accepted: '
                       'EDMPrecond of SongUNet, DDPM++ or NCSN++ (not ADM, nor the baselines)')
    D = float(given['D']) if any(given.get(k) for k in ('pfgmpp', 'pfgmv2', 'pfgm')) else math.inf
    return dict(
        BEFORE_D, image_size=int(given['img_resolution']), channels=int(given['img_channels']),
        nf=int(given['model_channels']), ch_mult=[int(mult) for mult in given['channel_mult']],
        num_blocks=int(given['num_blocks']), attn=[int(size) for size in given['attn_resolutions']],
        dropout=float(given['dropout']), classes=int(given['label_dim']), ncsnpp=look == NCSNPP,
        label_first=True, method='pfgmpp', D=D, sigma_data=float(given['sigma_data']), edm=True,
        z_min=pfgm.Denoiser.low * pfgm.unit(D), z_max=pfgm.Denoiser.high * pfgm.unit(D), z_exp=0.0, gamma=5.0,
        upper_norm=None)


def read_edm(path, whole):
    """A training-state or network-snapshot in our own form: of it only the EMA, a quarter, is read;
    with `whole` also net and opt, where they are there."""
    def fitted(ours, t):
        layer = f'.{ours}'.split('.')[-2]
        if layer in ('q', 'k', 'v'):
            t = t['qkv'.index(layer)::3]
        if layer in ('q', 'k', 'v', 'out'):  # there a 1 x 1 convolution
            t = t.reshape(t.shape[:2])
        if layer == 'conv_out':  # and v_z, of which a denoiser makes no use
            t = torch.cat([t, torch.zeros_like(t[:1])])
        return t.contiguous()

    def ours(parts, names):
        if sum(4 * math.prod(parts[name]['size']) for name in set(names.values())) > claimable:
            raise ValueError('its parts claim more bytes than it has')
        return {k: fitted(k, tensor(parts[name])) for k, name in names.items()}
    claimable = os.path.getsize(path)
    with open(path, 'rb') as file:
        saved, tensor = open_pickle(file)
        args = edm_args(saved, path)
        parts = tensors_of(saved['ema'], 'model')
        names = edm_names(blank(args, len(parts), path), parts)
        found = dict(ema=ours(parts, names), step=0, args=args)
        if whole and 'net' in saved:
            found['net'] = ours(tensors_of(saved['net'], 'model'), names)
        opt = saved.get('optimizer_state') or {}
        if state := opt.get('state'):
            step = state[0]['step']
            step = found['step'] = int(tensor(step) if isinstance(step, dict) else step)
        if state and whole:
            order = [name for name in parts if name.endswith(('weight', 'bias'))]
            group = {k: opt['param_groups'][0][k] for k in ('lr', 'betas', 'eps', 'weight_decay')}
            names.pop('freq', None)
            group['params'] = list(range(len(names)))
            rows = zip(*(ours({order[i]: row[k] for i, row in state.items()}, names).values()
                         for k in ('exp_avg', 'exp_avg_sq')))
            state = {i: dict(step=torch.tensor(float(step)), exp_avg=m, exp_avg_sq=v)
                     for i, (m, v) in enumerate(rows)}
            found['opt'] = dict(param_groups=[group], state=state)
        return found


# ---------------------------------------------------------------- pickles

KNOWN = {  # every name that stands in a checkpoint of EDM or PFGM++, and what is made of it
    'torch_utils.persistence._reconstruct_persistent_obj': lambda meta: meta,
    'torch.nn.modules.container.ModuleDict': dict,
    'collections.OrderedDict': dict,
    'torch._utils._rebuild_parameter': lambda tensor, *_: tensor,
    'torch._utils._rebuild_tensor_v2': lambda storage, offset, size, stride, *_: dict(
        storage=storage, offset=offset, size=size, stride=stride),
    'torch.storage._load_from_bytes': lambda packed: packed,
    'torch.FloatStorage': 'float32',
    'numpy.dtype': lambda *_: {},  # always float64
    'numpy.core.multiarray.scalar': lambda dtype, packed: np.frombuffer(packed, '<f8').item(),
    'numpy._core.multiarray.scalar': lambda dtype, packed: np.frombuffer(packed, '<f8').item(),
    '__builtin__.set': lambda *_: None,
    '_codecs.encode': lambda text, encoding: text.encode('latin1'),
}


class Reader(pickle._Unpickler):
    """Reads a pickle as dicts, lists and numbers, and calls nothing but KNOWN. It is Python's own
    class, not the one in C, so that its opcodes can be others; and what is large stays in the file,
    as the range of its bytes."""

    def __init__(self, file):
        super().__init__(file)
        self.file = file

    def find_class(self, module, name):
        if f'{module}.{name}' not in KNOWN:
            raise ValueError(f'it asks for {module}.{name}'[:100])
        return KNOWN[f'{module}.{name}']

    def persistent_load(self, key):
        return dict(name=key[2], count=key[4])

    def build(self):  # the state of an object
        state = self.stack.pop()
        self.stack[-1].update(state if isinstance(state, dict) else {})

    def binbytes(self):
        count = int.from_bytes(self.read(4), 'little')
        if count < 2 ** 16 or self._unframer.current_frame:
            self.append(self.read(count))
        else:
            start = self.file.tell()
            self.file.seek(count, os.SEEK_CUR)
            self.append(range(start, start + count))

    def listed(self, count):  # a tuple has a hash, which for a deep one ends Python; a list has not
        self.stack[-count:] = [self.stack[-count:]]

    dispatch = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: build, pickle.BINBYTES[0]: binbytes,
                pickle.TUPLE[0]: pickle._Unpickler.load_list,
                **{code[0]: lambda self, count=count: self.listed(count) for count, code in
                   enumerate((pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3), 1)}}
    del dispatch[pickle.BYTEARRAY8[0]]  # it would fill as many bytes as are claimed


def holds_objects(path):
    """Whether a file is one for open_pickle(), not for torch.load(). ValueError where a zip, which
    torch.save writes stored, is packed or fails its checksums: torch.load would unpack the one to
    any size and pass over the other."""
    with open(path, 'rb') as file:
        start = file.read(4)
        if start[:2] != b'PK':  # torch.save's own, before it wrote zips, begin with a number
            return start[:1] == b'\x80' and start[2:] != b'\x8a\n'
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if (any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
                    or sum(entry.file_size for entry in entries) > os.path.getsize(path)):
                raise ValueError('its parts claim more bytes than it has')
            if broken := archive.testzip():
                raise ValueError(f'{broken} fails its checksum')
            return any(b'torch_utils.persistence' in archive.read(name)
                       for name in archive.namelist() if name.endswith('data.pkl'))


def open_pickle(file):
    """(what a pickle, plain or a zip of torch.save, holds; a function that reads a tensor of it
    while the file is open). Raises what it may where the file is damaged, and ValueError where it
    asks for another name."""
    archive = zipfile.ZipFile(file) if file.read(2) == b'PK' else None
    root = archive and next(name for name in archive.namelist() if name.endswith('data.pkl'))

    def tensor(t):
        storage = t['storage']
        if archive:
            numbers = archive.read(root.removesuffix('data.pkl') + 'data/' + storage['name'])
        else:  # torch.save's of one storage: five pickles, a count, the numbers
            if isinstance(storage, range):
                file.seek(storage.start)
                storage = file.read(len(storage))
            packed = io.BytesIO(storage)
            *_, storage, _ = [Reader(packed).load() for _ in range(5)]
            numbers = packed.read()[8:]
        if (len(numbers) != 4 * storage['count'] or math.prod(t['size']) > storage['count']
                or 0 in t['stride']):
            raise ValueError('a tensor is not held in full')
        numbers = torch.from_numpy(np.frombuffer(numbers, '<f4').copy())
        return numbers.as_strided(t['size'], t['stride'], t['offset'])
    file.seek(0)
    return Reader(io.BytesIO(archive.read(root)) if archive else file).load(), tensor


def tensors_of(module, child):
    """{name: tensor} of a child of a module in such a file, in the order of its parameters."""
    def walk(module, prefix):
        state = module.get('state', module)
        for kind in ('_parameters', '_buffers', '_modules'):
            for key, part in state[kind].items():
                if len(prefix + key) > 100:
                    raise ValueError('a name too long')  # or a module within itself
                yield prefix + key, part if kind != '_modules' else None
                if part is not None and kind == '_modules':
                    yield from walk(part, f'{prefix}{key}.')
    parts = itertools.islice(walk(module['state']['_modules'][child], ''), 10 ** 5)
    return {name: part for name, part in parts if part is not None}


# ---------------------------------------------------------------- their names for our parameters

OFFICIAL_NAME = dict(norm1='GroupNorm_0', conv1='Conv_0', emb='Dense_0', norm2='GroupNorm_1',
                     conv2='Conv_1', shortcut='Conv_2', norm='GroupNorm_0', q='NIN_0', k='NIN_1',
                     v='NIN_2', out='NIN_3')


def official_names(net):
    """{our parameter name: official name}, in the order of both. They number the units, which our
    names have up to their numbers: conv_in, embed.0, down.0.1."""
    units, names = {}, {}
    for ours, _ in net.named_parameters():
        unit, layer, leaf = re.fullmatch(r'([a-z_]+(?:\.\d+)*)\.(?:(\w+)\.)?(\w+)', ours).groups()
        if layer in ('q', 'k', 'v', 'out'):
            leaf = {'weight': 'W', 'bias': 'b'}[leaf]
        inside = [OFFICIAL_NAME[layer], leaf] if layer else [leaf]
        number = units.setdefault(unit, len(units))
        names[ours] = '.'.join([f'module.all_modules.{number}', *inside])
    return names


def edm_names(net, theirs):
    """{our name: theirs} of all parameters, in our order, and of the frequencies. The order is the
    same, but that q, k and v are one there and labels first. Left out: the filters, which are
    constants, and map_augment, which adds nothing where images are not augmented."""
    left = [name for name in theirs if not name.endswith('resample_filter')
            and not name.startswith(('map_label', 'map_augment', 'map_noise'))][::-1]
    names = {'freq': 'map_noise.freqs'} if net.ncsnpp else {}
    for ours, _ in net.named_parameters():
        twin = ours.replace('.k.', '.q.').replace('.v.', '.q.')
        names[ours] = (f'map_{ours}' if ours.startswith('label.') else
                       names[twin] if twin in names else left.pop())
    if left:
        raise ValueError(f'{left[0]} does not belong'[:100])
    return names
