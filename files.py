"""What others have written, read so that nothing in it runs, fills the memory or goes unsaid:
folders and zips, whatever their layout; labels; arrays; checkpoints; statistics of features.
Errors are ValueErrors.
"""
import functools
import io
import itertools
import json
import math
import os
import pickle
import re
import threading
import zipfile
from typing import NamedTuple, Optional

import numpy as np
import torch

# Folders that are splits: train/ val/, Train/ TEST/, training_set/ test_set/, train2017/ val2017/,
# and behind a beginning that all share seg_train/ seg_test/.
SPLIT = re.compile('(?:(?P<train>train(?:ing)?)|(?P<val>val(?:id(?:ation)?)?|dev)|(?P<test>test(?:'
                   'ing)?))[-_ ]?(?:set|split|data|images|imgs)?[-_ ]?[0-9]*', re.I)
PICTURES = 'images image imgs img jpegimages'.split()  # beside folders that are not to train on:
ABOUT_THEM = 'labels label masks mask annotations annotation segmentations'.split()
POOL = 2048  # features an image, of Inception
ENTRY_LIMIT = 256 << 20  # bytes that a file, or a zip's entry, may have
# MedMNIST v2, its 2-D sets: channels, and the MD5 of the archives of 28, 64, 128 and 224 pixels as
# medmnist 3.0.2 has them. arXiv 2110.14795, zenodo record 10519652.
MEDMNIST_SIZES = (28, 64, 128, 224)
MEDMNIST = {
    'pathmnist': (3, 'a8b06965200029087d5bd730944a56c1', '55aa9c1e0525abe5a6b9d8343a507616',
                     'ac42d08fb904d92c244187169d1fd1d9', '2c51a510bcdc9cf8ddb2af93af1eadec'),
    'chestmnist': (1, '02c8a6516a18b556561a56cbdd36c4a8', '9de6cd0b934ebb5b7426cfba5efbae16',
                      'db107e5590b27930b62dbaf558aebee3', '45bd33e6f06c3e8cdb481c74a89152aa'),
    'dermamnist': (3, '0744692d530f8e62ec473284d019b0c7', 'b70a2f5635c6199aeaa28c31d7202e1f',
                      '2defd784463fa5243564e855ed717de1', '8974907d8e169bef5f5b96bc506ae45d'),
    'octmnist': (1, 'c68d92d5b585d8d81f7112f81e2d0842', 'e229e9440236b774d9f0dfef9d07bdaf',
                    '0a97e76651ace45c5d943ee3f65b63ae', 'abc493b6d529d5de7569faaef2773ba3'),
    'pneumoniamnist': (1, '28209eda62fecd6e6a2d98b1501bb15f', '8f4eceb4ccffa70c672198ea285246c6',
                          '05b46931834c231683c68f40c47b2971', 'd6a3c71de1b945ea11211b03746c1fe1'),
    'retinamnist': (3, 'bd4c0672f1bba3e3a89f0e4e876791e4', 'afda852cc34dcda56f86ad2b2457dbcc',
                       'e48e916a24454daf90583d4e6efb1a18', 'eae7e3b6f3fcbda4ae613ebdcbe35348'),
    'breastmnist': (1, '750601b1f35ba3300ea97c75c52ff8f6', '742edef2a1fd1524b2efff4bd7ba9364',
                       '363e4b3f8d712e9b5de15470a2aaadf1', 'b56378a6eefa9fed602bb16d192d4c8b'),
    'bloodmnist': (3, '7053d0359d879ad8a5505303e11de1dc', '2b94928a2ae4916078ca51e05b6b800b',
                      'adace1e0ed228fccda1f39692059dd4c', 'b718ff6835fcbdb22ba9eacccd7b2601'),
    'tissuemnist': (1, 'ebe78ee8b05294063de985d821c1c34b', '123ece2eba09d0aa5d698fda57103344',
                       '61b955355d7425a89687b06cca3ce0c2', 'b077128c4a949f0a4eb01517f9037b9c'),
    'organamnist': (1, '68e3f8846a6bd62f0c9bf841c0d9eacc', '2dcccc29b88e6da5a01161ef20cda288',
                       'eeae80d0a227a8d099027e1b3cfd3b60', '50747347e05c87dd3aaf92c49f9f3170'),
    'organcmnist': (1, 'b9ceb9546e10131b32923c5bbeaea2b1', '3ce34a8724ea6f548e6db4744d03b6a9',
                       '773c1f009daa3fe5d9a2a201b2a7ed94', '050f5e875dc056f6768abf94ec9995d1'),
    'organsmnist': (1, '9ab87b696fb54e2a387ebe992d6ed5f1', '53a6d115339d874c25e309a994ff46d3',
                       'ded0c5fa01a95dc4978b956f613e9b8e', 'b354719e553fbbb2513d5533f52a4cb1'),
}
ZIP_LOCK, ZIPS = threading.Lock(), {}  # archives by (path, process): forked ones share a position


# ---------------------------------------------------------------- folders and zips

def files_below(root):
    """The files in a folder and its folders, relative to it. Links are followed, but for those that
    lead to a folder they are in and, within what a link led to, to where the walk has been."""
    def refuse(error):  # by default os.walk passes over a folder that it may not read
        raise error
    top = os.path.realpath(root)
    above, seen = {root: ((top,), False)}, {top}  # a folder's own folders; was any a link?
    for folder, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        chain, linked = above.pop(folder)
        yield from (os.path.normpath(os.path.join(os.path.relpath(folder, root), file))
                    for file in files)
        names, folders[:] = folders[:], []
        for name in names if top != '/' or chain[-1] not in ('/proc', '/sys', '/dev') else ():
            path, real = os.path.join(folder, name), os.path.join(chain[-1], name)
            if os.path.islink(path):
                real = os.path.realpath(path)
                back = any(os.path.join(up, '').startswith(os.path.join(real, '')) for up in chain)
                if back or linked and real in seen:
                    continue
            above[path] = (*chain, real), linked or os.path.islink(path)
            seen.add(real)
            folders.append(name)


def open_entry(archive, name, limit):
    """A zip's entry as a file, of which no read unpacks more than was asked for; or ValueError."""
    info = archive.getinfo(name)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError('packed by other than deflate')  # a read of that unpacks all at once
    if info.file_size > limit:
        raise ValueError(f'claims to unpack to {info.file_size} bytes')
    return archive.open(info)


def read_bytes(root, entry):
    """The contents, of up to ENTRY_LIMIT bytes, of a file of a folder or .zip."""
    if os.path.isdir(root):
        if not os.path.isfile(os.path.join(root, entry)):  # opening a named pipe waits for ever
            raise ValueError('not a file')
        if os.path.getsize(os.path.join(root, entry)) > ENTRY_LIMIT:
            raise ValueError(f'a file of more than {ENTRY_LIMIT} bytes')
        with open(os.path.join(root, entry), 'rb') as file:
            return file.read()
    with ZIP_LOCK:
        key = root, os.getpid()
        archive = ZIPS[key] = ZIPS.get(key) or zipfile.ZipFile(root)
        file = open_entry(archive, entry, ENTRY_LIMIT)
        return b''.join(iter(lambda: file.read(1 << 20), b''))


# ---------------------------------------------------------------- what folders mean

def natural(name):
    """A key that sorts 2 before 10."""
    return [int(part) if k % 2 else part for k, part in enumerate(re.split('([0-9]+)', name))], name


def layout(paths):
    """Takes the folders that are no classes out of paths, {name: its parts}: one that holds all,
    splits, images/ beside masks/. -> (paths, {name: train, val or test} or {}, notes)."""
    splits, notes = {}, []
    while stay := no_classes(paths.values()):
        depth, folders = stay
        kept = {name: path for name, path in paths.items() if path[depth] in folders}
        if len(kept) < len(paths):
            first = next(name for name in paths if name not in kept)
            notes.append(f'without {len(paths) - len(kept)} images beside '
                         f'{", ".join(sorted(folders))} (first: {first!r})')
        found = {name: folders[path[depth]] for name, path in kept.items()}
        if any(found.values()):  # in train/ there may be train/ and val/
            splits = {name: kind if splits.get(name, 'train') == 'train' else splits[name]
                      for name, kind in found.items()}
        paths = {name: path[:depth] + path[depth + 1:] for name, path in kept.items()}
    return paths, splits, notes


def no_classes(paths):
    """(level, {folder: the split it is, or ''}) of a level of folders that are no classes, or None;
    those that are not among them go. A class may be called train: splits are some of training
    beside others, or all there is, on the second level only both."""
    levels = [{path[depth] if len(path) > depth + 1 else '' for path in paths} for depth in (0, 1)]
    for depth, folders in enumerate(levels):
        shared = len(re.sub('[^-_. ]*$', '', os.path.commonprefix(list(folders - {''}))))
        found = {folder: match.lastgroup for folder in folders
                 if (match := SPLIT.fullmatch(folder[shared:]))}
        beside = 'train' in found.values() and len({*found.values()}) > 1
        if beside and (not depth or {*found} == folders) or not depth and found and (
                {*found} == folders - {''}):
            return depth, found
    first, pictures = levels[0], [folder for folder in levels[0] if folder.lower() in PICTURES]
    if len(pictures) == 1 and all(k.lower() in ABOUT_THEM for k in first - {*pictures}):
        return 0, {pictures[0]: ''}
    return None if len(first) > 1 or '' in first else (0, dict.fromkeys(first, ''))


def table_values(root, tables, paths):
    """The label of each path, None without, by the files `tables`, {name: the parts of its folder},
    of {"labels": [["00000/img00000000.png", 6], ...]} or null."""
    found = {}
    try:
        for name, folder in tables.items():
            labels = json.loads(read_bytes(root, name))['labels']
            for image, label in dict(labels or ()).items():
                found['/'.join([*folder, *re.split(r'[/\\]', image)])] = label
    except Exception as error:  # it may hold anything
        return f'labels in {name} that cannot be read ({error!r})'
    return [found.get('/'.join(path)) for path in paths] if found else f'no labels, null in {name}'


def as_labels(values, names, words=()):
    """(int64 (n,), classes or None, '') of a value for each of names, an integer or one of `words`,
    numbered in natural order; or (None, None, what there is instead)."""
    classes = sorted({*words} - {None}, key=natural)
    if isinstance(values, str) or len(classes) == 1:
        return None, None, values if isinstance(values, str) else 'no labels'
    numbers = {word: k for k, word in enumerate(classes)}
    values = list(map(numbers.get, values)) if classes else values
    bare = [name for name, value in zip(names, values) if value is None]
    if bare:
        some = f'no label for {len(bare)} of {len(names)} images (first: {bare[0]!r})'
        return None, None, some if len(bare) < len(names) else 'no labels'
    try:
        values, hint = np.asarray(values), ''
        if values.ndim == 2 and values.shape[1] > 1:
            one = (values.sum(1) == 1).all()
            hint = ', one-hot: give their argmax(1)' if one else ', several an image'
    except (ValueError, TypeError):  # lists of several lengths, or of words
        return None, None, 'labels that are not all whole numbers'
    if values.size == len(names) and values.dtype.kind in 'iu':
        return torch.from_numpy(values.reshape(-1).astype(np.int64)), classes or None, ''
    return None, None, f'{values.dtype} labels {values.shape} for {len(names)} images{hint}'


# ---------------------------------------------------------------- arrays

def arrays_of(path):
    """{name: a function that reads it} of the arrays of a .npz, or of the one, x, of a .npy."""
    stored = np.load(path, mmap_mode='r', allow_pickle=False)
    if isinstance(stored, np.ndarray):
        return {'x': lambda: stored}
    limit = max(100 * os.path.getsize(path), ENTRY_LIMIT)

    def read(name):  # stored[name] would unpack a bomb
        return np.lib.format.read_array(open_entry(stored.zip, f'{name}.npy', limit))
    return {name: functools.partial(read, name) for name in stored.files}


def in_rows(array):
    """Images (n, H, W), (n, H, W, C) or (n, C, H, W) as one of the first two; else ValueError."""
    n, *shape = array.shape
    if array.ndim == 4 and shape[2] not in (1, 3, 4) and shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 1, 3)
    flat = array.ndim == 3 and shape[0] != shape[1]  # of images that are wide: of another layout?
    one = flat and shape[1] in (1, 3, 4)
    if array.size == 0 or one or flat and (n == shape[0] or shape[1] > 4 * shape[0]) or not (
            array.ndim == 3 or array.ndim == 4 and array.shape[3] in (1, 3, 4)):
        mend = '; one image? give x[None]' if one else (
            '; the last axis counts them? give np.moveaxis(x, -1, 0)' * (array.ndim in (3, 4)))
        raise ValueError(f'images of shape {(n, *shape)}{mend}' + ', else x[..., None]' * flat)
    return array[..., 0] if array.shape[3:] == (1,) else array


def as_uint8(array):
    """(array, notes) of uint8, or of floats in [0, 1] or [-1, 1], whichever most of them are in: up
    to 1e-3 beyond an end is clipped. ValueError for others."""
    if array.dtype == np.uint8:
        return array, []
    if array.dtype.kind != 'f':
        raise ValueError(f'holds {array.dtype}; give uint8, from 0 to 255')
    low, high = float(array.min()), float(array.max())  # NaN, if there is one
    below = float((array < -1e-3).mean())
    base = -1 if below >= 0.01 and low < -0.5 else 0
    if not (low >= base - 1e-3 and high <= 1 + 1e-3):
        raise ValueError(f'holds values from {low:.6g} to {high:.6g}, {100 * below:.3g} % of them '
                         'below 0: not in [0, 1] nor [-1, 1]; scale them, or clip them to one')
    beyond, pixels = int(((array < base) | (array > 1)).sum()), np.empty(array.shape, np.uint8)
    for k in range(0, len(array), 256):  # a float copy of all might not fit
        part = array[k:k + 256].astype(np.promote_types(array.dtype, np.float32)).clip(base, 1)
        pixels[k:k + 256] = np.rint((part - base) * (255 / (1 - base)))
    return pixels, [f'{beyond} values up to {max(base - low, high - 1):.1e} beyond [{base}, 1] '
                    'clipped'] * (beyond > 0)


def read_shard(path, shape):
    """The memory map of a shard; None where it is absent or of another shape."""
    try:
        shard = np.load(path, mmap_mode='r', allow_pickle=False)
    except (OSError, ValueError):
        return None
    return shard if shard.shape == shape and shard.dtype == np.float32 else None


# ---------------------------------------------------------------- checkpoints

def check_tensors(tensors):
    """ValueError unless all are float32 and held in full: a stride of 0 makes one number look like
    a terabyte, which the first copy would take."""
    for name, t in tensors.items():
        if not (isinstance(name, str) and torch.is_tensor(t) and t.dtype == torch.float32
                and t.layout == torch.strided and t.device.type == 'cpu'
                and t.untyped_storage().nbytes() >= t.nbytes):
            raise ValueError(f'{name!r} is not a float32 tensor held in full')


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


# ---------------------------------------------------------------- statistics

class Measured(NamedTuple):
    n: Optional[int]                  # images; None where a statistics file does not say
    mu: torch.Tensor                  # (2048,) float64
    sigma: torch.Tensor               # (2048, 2048) float64, ddof 1
    features: Optional[torch.Tensor]  # (n, 2048) float32, where asked for
    pixels: Optional[torch.Tensor]    # (n, C, H, W) uint8, where asked for


def read_stats(path, convention):
    """Measured from a statistics file, whose `pool_3` are the features (score_sde), or None for a
    .npz that is none: images."""
    try:
        names = 'mu', 'sigma', 'n', 'convention', 'pool_3'
        found = {name: read() for name, read in arrays_of(path).items() if name in names}
        n, features = int(found['n']) if 'n' in found else None, found.pop('pool_3', None)
        if features is not None and not {'mu', 'sigma'} & found.keys():
            n, features = len(features), torch.from_numpy(features).float()
            parts = [part.double() for part in features.split(4096)]
            mu = sum(part.sum(0) for part in parts) / n
            sigma = sum((part - mu).T @ (part - mu) for part in parts) / (n - 1)
            found.update(mu=mu.numpy(), sigma=sigma.numpy())
    except Exception as error:  # a damaged or hostile file can fail in any way
        raise ValueError(f'{path}: cannot be read ({error}); accepted: a folder, .zip or .npz '
                         'of images, or a .npz of mu and sigma') from error
    if not {'mu', 'sigma'} & found.keys():
        return None
    shapes = [found[k].shape if k in found else None for k in ('mu', 'sigma')]
    if shapes != [(POOL,), (POOL, POOL)] or not all(
            found[k].dtype.kind == 'f' and np.isfinite(found[k]).all() for k in ('mu', 'sigma')):
        raise ValueError(f'{path}: mu {shapes[0]}, sigma {shapes[1]}, or not finite; accepted: '
                         f'({POOL},) and ({POOL}, {POOL}), as --save_stats writes')
    if str(found.get('convention', convention)) != convention:
        raise ValueError(f'{path}: made with {found["convention"]}, not {convention}; give the '
                         'same --resize and --inception, or make it again with --save_stats')
    mu, sigma = (torch.from_numpy(found[k]).double() for k in ('mu', 'sigma'))
    return Measured(n, mu, sigma, features if torch.is_tensor(features) else None, None)
