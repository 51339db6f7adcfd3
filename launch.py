"""How the scripts start, share out and end: errors, flags, devices, processes, signals, files;
and how pickles of others are read without running them.

Under torchrun every process runs the same script: `rank` of `world` in all, LOCAL_RANK on its
machine. A rank that is silent for --timeout seconds in training ends the job; where one may rightly
be hours behind (a download, its share of the samples) the others wait() for it.
"""
import argparse
import contextlib
import functools
import io
import itertools
import math
import os
import pickle
import signal
import socket
import struct
import sys
import threading
import time
import zipfile
import zlib
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

try:
    import resource
except ImportError:  # Windows
    resource = None

SIZE_LIMIT = 1024  # pixels a side
CLASS_LIMIT = 10_000  # classes of labels


# ---------------------------------------------------------------- errors, files, seeds

class BadInput(ValueError):
    """What the user gave cannot be used; the message is the one line that he is shown. Empty: some
    other process shows it."""

    def __init__(self, message):
        super().__init__(' '.join(message.split()))  # a file's name or contents may break lines


def step_seed(seed, step):
    """A seed of its own for each (seed, step), or (seed, index of an image)."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])


def fingerprint(tensors, start=0):
    """A number below 2^32 that tells these tensors from others."""
    for tensor in tensors:
        start = zlib.crc32(tensor.detach().cpu().contiguous().numpy(), start)
    return start


def write(flag, path, save):
    """save(file), whole or not at all: under a temporary name, then renamed over the old file."""
    part = f'{path}.part'
    try:
        with open(part, 'wb') as file:
            save(file)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save wraps a full disk in RuntimeError
        if os.path.lexists(part):
            os.remove(part)
        kept = 'the one of before is intact' if os.path.lexists(path) else 'nothing was saved'
        why = str(error).partition('\n')[0]
        raise BadInput(f'{flag} {path}: cannot be written ({why}); {kept}; free some space or give '
                       'another, then run the same command again') from error


# ---------------------------------------------------------------- flags

class Parser(argparse.ArgumentParser):
    """Flags are spelled out, shown with their defaults, and a wrong one ends in one line."""

    def __init__(self, **kw):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                         **kw)

    def error(self, message):
        message = ' '.join(message.removeprefix('argument ').split())
        print(f'{message} (see {self.prog} --help)', file=sys.stderr)
        sys.exit(2)


def above(low, kind=float, below=2 ** 31):
    """An argparse type: a number of that kind with low < number < below."""
    def convert(text):
        try:
            number = kind(text)
        except ValueError:
            number = None
        if number is None or not low < number < below:
            word = 'a whole number' if kind is int else 'a number'
            raise argparse.ArgumentTypeError(
                f'{text}: must be {word} above {low} and below {below}')
        return number
    return convert


# ---------------------------------------------------------------- beginning and end

AT_THE_END = contextlib.ExitStack()  # of run(), however main ends


def run(main, args):
    """main(args); whatever the user can mend ends in one line on stderr and exit code 2."""
    try:
        main(args)
    except BadInput as error:
        if str(error):
            print(error, file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)
    except RuntimeError as error:
        line = str(error).splitlines()[0] if str(error) else repr(error)
        # TorchDynamoException, whose import takes a second
        if type(error).__module__.startswith(('torch._dynamo', 'torch._inductor')):
            print(f'--compile: {line}; leave it out', file=sys.stderr, flush=True)
            sys.exit(2)
        if dist.is_initialized() and (isinstance(error, dist.DistError) or 'gloo' in line):
            print(f'another process has ended, or is silent: see what it says ({line[:150]})',
                  file=sys.stderr, flush=True)
            sys.exit(1)
        raise
    finally:
        AT_THE_END.close()
        if dist.is_initialized():
            patient.cache_clear()  # its threads must not outlive it
            dist.destroy_process_group()


def setup(name, timeout=600.0):
    """(device, rank, world size) of this process, alone or under torchrun, where a rank that is
    silent for `timeout` seconds ends the job."""
    ddp = 'RANK' in os.environ  # set by torchrun
    rank, local, world = (int(os.environ[k]) if ddp else default for k, default in
                          (('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1)))
    if name == 'auto':
        name = ('cuda' if torch.cuda.is_available() else
                'mps' if torch.backends.mps.is_available() and world == 1 else 'cpu')
    try:
        device = torch.device(f'cuda:{local}' if name == 'cuda' else name)  # with an index
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f'--device {name}: not on this machine '
                       f'({str(error).splitlines()[0]}); use --device cpu') from error
    if device.type == 'mps' and world > 1:
        raise BadInput(f'--device {name}: is of one process; leave torchrun out, or use '
                       '--device cpu')
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')  # where exactness counts: pfgm.full_float32
    if ddp:
        wait = timedelta(seconds=timeout)
        store = next(dist.rendezvous('env://', timeout=wait))[0]
        # torchrun keeps its store through restarts, with the addresses of the processes that died;
        # its count of restarts is every rank's only where there is one machine
        restarts = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')
        if os.environ.get('GROUP_WORLD_SIZE', '1') == '1':
            store = dist.PrefixStore(f'restart {restarts}', store)
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo', store=store,
                                rank=rank, world_size=world, timeout=wait)
        patient()
    return device, rank, world


def fast_bf16(device):
    """Whether bfloat16 products run faster than float32 on this device."""
    if device.type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == 'cpu' and getattr(torch.cpu, '_is_amx_tile_supported', bool)()


def peak_memory(device):
    """GB: the most that a GPU has lent, elsewhere the most that this process has held; None on
    Windows, which does not say."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2 ** 30 if sys.platform == 'darwin' else 2 ** 20)


# ---------------------------------------------------------------- several processes

@functools.cache
def patient():
    """A group of all processes on their CPUs, for what may rightly take hours."""
    return dist.new_group(backend='gloo', timeout=timedelta(days=7))


def wait():
    """Until every process has come here."""
    if dist.is_initialized():
        dist.barrier(group=patient())


@contextlib.contextmanager
def first_of_its_machine():
    """The block runs in one process of each machine, then in the others, for whom what it fetches
    is there."""
    first = os.environ.get('LOCAL_RANK', '0') == '0'
    if not first:
        wait()
    yield
    if first:
        wait()


def everywhere(value):
    """The value of every process, in rank order. By pickle: for small things."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=patient())
    return values


def agree(flag, mend, **facts):
    """BadInput, shown by rank 0, unless every process has the same facts."""
    each = everywhere(facts)
    for key, value in each[0].items():
        rank = next((r for r, other in enumerate(each) if other[key] != value), None)
        if rank is not None:
            raise BadInput(f'{flag}: {key} {each[rank][key]} in process {rank}, {value} in process '
                           f'0; {mend}' if dist.get_rank() == 0 else '')


# ---------------------------------------------------------------- signals

def listen():
    """A list to which the numbers of SIGINT, SIGTERM and SIGUSR1 are added. Once asked to leave,
    another SIGINT or SIGTERM ends the process at once: a thread hears it, so even where it waits
    in C for a process that hangs, and where no handler of Python's would run."""
    heard, (ours, listen.theirs) = [], socket.socketpair()  # kept: closed, it would end the thread
    leave = signal.SIGINT, signal.SIGTERM

    def hear():
        first = None
        while number := ours.recv(1):
            number, now = number[0], time.monotonic()
            if number in leave and first and now > first + 0.5:  # torchrun repeats a terminal's
                print('ended at the second signal', file=sys.stderr, flush=True)
                os._exit(128 + number)
            if number in leave and not first:
                first = now
                if os.environ.get('LOCAL_RANK', '0') == '0':
                    print('leaving after this step; once more ends it at once', flush=True)
            heard.append(number)
    listen.theirs.setblocking(False)
    thread = threading.Thread(target=hear, daemon=True)
    thread.start()
    for number in (*leave, getattr(signal, 'SIGUSR1', signal.SIGTERM)):
        signal.signal(number, lambda number, frame: None)
    signal.set_wakeup_fd(listen.theirs.fileno(), warn_on_full_buffer=False)

    def stop():
        signal.set_wakeup_fd(-1)
        listen.theirs.close()
        thread.join()
    AT_THE_END.callback(stop)
    return heard


def deaf(worker):
    """For a forked reader of images: not to pass on to the run the signals that it gets itself."""
    signal.set_wakeup_fd(-1)


# ---------------------------------------------------------------- pickles of others

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
    'numpy.core.multiarray.scalar': lambda dtype, packed: struct.unpack('<d', packed)[0],
    'numpy._core.multiarray.scalar': lambda dtype, packed: struct.unpack('<d', packed)[0],
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
        count, = struct.unpack('<I', self.read(4))
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
    """Whether a file is one for open_pickle(), not for torch.load()."""
    with open(path, 'rb') as file:
        start = file.read(4)
        if start[:2] != b'PK':  # torch.save's own, before it wrote zips, begin with a number
            return start[:1] == b'\x80' and start[2:] != b'\x8a\n'
        with zipfile.ZipFile(file) as archive:
            return any(b'torch_utils.persistence' in archive.read(name)
                       for name in archive.namelist() if name.endswith('data.pkl'))


@contextlib.contextmanager
def open_pickle(path):
    """(what a pickle, plain or a zip of torch.save, holds; a function that reads a tensor of it).
    Raises what it may where the file is damaged, and ValueError where it asks for another name."""
    with open(path, 'rb') as file:
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
        yield Reader(io.BytesIO(archive.read(root)) if archive else file).load(), tensor


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
