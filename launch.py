"""How the scripts start, share out and end: errors, flags, devices, processes, signals, files.

Under torchrun every process runs the same script: `rank` of `world` in all, LOCAL_RANK on its
machine. A rank that is silent for --timeout seconds in training ends the job; where one may rightly
be hours behind (a download, its share of the samples) the others wait() for it.
"""
import argparse
import contextlib
import functools
import os
import re
import signal
import socket
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
# Folders that are splits: train/ val/, Train/ TEST/, training_set/ test_set/, train2017/ val2017/,
# and behind a beginning that all share seg_train/ seg_test/.
SPLIT = re.compile('(?:(?P<train>train(?:ing)?)|(?P<val>val(?:id(?:ation)?)?|dev)|(?P<test>test(?:'
                   'ing)?))[-_ ]?(?:set|split|data|images|imgs)?[-_ ]?[0-9]*', re.I)
PICTURES = 'images image imgs img jpegimages'.split()  # beside folders that are not to train on:
ABOUT_THEM = 'labels label masks mask annotations annotation segmentations'.split()


# ---------------------------------------------------------------- errors, files, seeds

class BadInput(ValueError):
    """What the user gave cannot be used; the message is the one line that he is shown. Empty: some
    other process shows it."""

    def __init__(self, message):
        super().__init__(' '.join(message.split()))  # a file's name or contents may break lines


def reader_lost(error):
    """The BadInput of a process of --workers that has ended, or cannot share what it reads."""
    why = str(error).strip().splitlines()[-1][:150]
    return BadInput(f'--workers: a process that reads images has ended ({why}); give --workers 0, '
                    'or where a container has little shared memory docker run --shm-size=8g')


def step_seed(seed, step):
    """A seed of its own for each (seed, step), or (seed, index of an image)."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])


def image_order(n, count, seed, step):
    """Endless indices (count,) of step, step + 1, ...: one shuffle of all n images an epoch."""
    order, epoch, at = None, None, step * count
    while True:
        want = []
        while sum(map(len, want)) < count:
            if at // n != epoch:
                epoch = at // n
                order = torch.randperm(n, generator=torch.Generator().manual_seed(
                    step_seed(seed, 2 ** 32 + epoch)))
            take = order[at % n:][:count - sum(map(len, want))]
            want.append(take)
            at += len(take)
        yield torch.cat(want)


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
                back = any(os.path.commonpath([real, up]) == real for up in chain)
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


ZIP_LOCK, ZIPS = threading.Lock(), {}  # archives by (path, process): forked ones share a position


def read_bytes(root, entry, limit):
    """The contents, of up to limit bytes, of a file of a folder or .zip."""
    if os.path.isdir(root):
        if not os.path.isfile(os.path.join(root, entry)):  # opening a named pipe waits for ever
            raise ValueError('not a file')
        if os.path.getsize(os.path.join(root, entry)) > limit:
            raise ValueError(f'a file of more than {limit} bytes')
        with open(os.path.join(root, entry), 'rb') as file:
            return file.read()
    with ZIP_LOCK:
        key = root, os.getpid()
        archive = ZIPS[key] = ZIPS.get(key) or zipfile.ZipFile(root)
        file = open_entry(archive, entry, limit)
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
        if line.startswith('DataLoader worker'):  # a signal tells of it, whatever main is doing
            print(reader_lost(error), file=sys.stderr, flush=True)
            sys.exit(2)
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


def gather(parts):
    """Each rank's uint8 images, joined in rank order: every rank reads only its share from disk."""
    whole = parts.new_empty(dist.get_world_size() * len(parts), *parts.shape[1:])
    dist.all_gather_into_tensor(whole, parts)
    return whole


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
        listen.theirs.shutdown(socket.SHUT_RDWR)  # forked readers of images hold it open
        listen.theirs.close()
        thread.join()
    AT_THE_END.callback(stop)
    return heard


def deaf(worker):
    """For a forked reader of images: not to pass on to the run the signals that it gets itself."""
    signal.set_wakeup_fd(-1)
