"""How the scripts start, share out, report and end: errors, flags, devices, processes, signals,
progress, and the folder of a run.

Under torchrun every process runs the same script: `rank` of `world` in all, LOCAL_RANK on its
machine. A rank that is silent for --timeout seconds in training ends the job; where one may rightly
be hours behind (a download, its share of the samples) the others wait() for it.
"""
import argparse
import contextlib
import ctypes
import functools
import glob
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
import zlib
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = resource = None

SIZE_LIMIT = 1024  # pixels a side
CLASS_LIMIT = 10_000  # classes of labels
Z_BINS = (0.01, 0.1, 1.0, 10.0)  # the loss is also logged by z, split here


# ---------------------------------------------------------------- errors, files, seeds

class BadInput(ValueError):
    """What the user gave cannot be used; the message is the one line that he is shown. Empty: some
    other process shows it."""

    def __init__(self, message):
        super().__init__(' '.join(message.split()))  # a file's name or contents may break lines


@contextlib.contextmanager
def given_by(flag):
    """What the block complains of under the name of --ckpt was given by another flag."""
    try:
        yield
    except BadInput as error:
        raise BadInput(str(error).replace('--ckpt', flag, 1)) from error


def reader_lost(error):
    """The BadInput of a process of --workers that has ended, or cannot share what it reads."""
    why = str(error).strip().splitlines()[-1][:150]
    return BadInput(f'--workers: a process that reads images has ended ({why}); give --workers 0, '
                    'or where a container has little shared memory docker run --shm-size=8g')


def say(line):
    """To people, once: by the first process."""
    if os.environ.get('RANK', '0') == '0':
        print(line, flush=True)


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


def unless(word, value, kind):
    """An argparse type: the value for that word, else of that kind."""
    return lambda text: value if text == word else kind(text)


# ---------------------------------------------------------------- beginning and end

AT_THE_END = contextlib.ExitStack()  # of run(), however main ends


def run(main, args):
    """main(args); whatever the user can mend ends in one line on stderr and exit code 2."""
    try:
        main(args)
    except (BadInput, KeyboardInterrupt, RuntimeError) as error:
        line, code = (str(error) or repr(error)).splitlines()[0], 2
        if isinstance(error, BadInput):
            line = str(error)
        elif isinstance(error, KeyboardInterrupt):
            line, code = 'interrupted', 128 + signal.SIGINT
        elif line.startswith('DataLoader worker'):  # a signal tells of it, whatever main is doing
            line = reader_lost(error)
        # TorchDynamoException, whose import takes a second
        elif type(error).__module__.startswith(('torch._dynamo', 'torch._inductor')):
            line = f'--compile: {line}; leave it out'
        elif dist.is_initialized() and (isinstance(error, dist.DistError) or 'gloo' in line):
            line = f'another process has ended, or is silent: see what it says ({line[:150]})'
            code = 1
        else:
            raise
        if line:
            print(line, file=sys.stderr, flush=True)
        sys.exit(code)
    finally:
        AT_THE_END.close()


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
        AT_THE_END.callback(dist.destroy_process_group)
        # which holds the GIL while it waits for threads, that may want it to let their tensors go
        AT_THE_END.callback(time.sleep, 0.1)
        AT_THE_END.callback(patient.cache_clear)  # first: its threads must not outlive it
        patient()
    return device, rank, world


def fast_bf16(device):
    """Whether bfloat16 products run faster than float32 on this device."""
    if device.type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == 'cpu' and any(getattr(torch.cpu, f'_is_{name}_supported', bool)()
                                        for name in ('amx_tile', 'avx512_bf16'))


def peak_memory(device):
    """GB: the most that a GPU has lent, elsewhere the most that this process has held; None on
    Windows, which does not say."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2 ** 30 if sys.platform == 'darwin' else 2 ** 20)


def rng_state(device):
    """The states of the generators that dropout draws from: the CPU's, and the GPU's."""
    states = [torch.get_rng_state()]
    if device.type == 'cuda' or device.type == 'mps' and torch.backends.mps.is_built():
        states.append(torch.get_device_module(device).get_rng_state())
    return states


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
    """The value of every process, in rank order: by pickle, through main memory."""
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


def share(n, rank, world):
    return range(n * rank // world, n * (rank + 1) // world)


# ---------------------------------------------------------------- signals

def listen():
    """A list to which the numbers of SIGINT, SIGTERM and SIGUSR1 are added. Once asked to leave,
    another SIGINT or SIGTERM ends the process at once: a thread hears it, so even where it waits
    in C for a process that hangs, and where no handler of Python's would run."""
    heard, (ours, theirs) = [], socket.socketpair()
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
    theirs.setblocking(False)
    thread = threading.Thread(target=hear, daemon=True)
    thread.start()
    for number in (*leave, getattr(signal, 'SIGUSR1', signal.SIGTERM)):
        signal.signal(number, lambda number, frame: None)
    signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)

    def stop():
        signal.set_wakeup_fd(-1)
        theirs.shutdown(socket.SHUT_RDWR)  # forked readers of images hold it open
        theirs.close()
        thread.join()
    AT_THE_END.callback(stop)
    return heard


def deaf(worker):
    """For a forked reader of images: not to pass on to the run the signals that it gets itself."""
    signal.set_wakeup_fd(-1)


def heard(signals, step, device, world):
    """What the signals since the last call ask for: '', 'save' (SIGUSR1) or 'leave' (after saving).
    Ranks hear them at different steps, so several agree on every 10th."""
    if world > 1 and step % 10:
        return ''
    leave = any(number != getattr(signal, 'SIGUSR1', None) for number in signals)
    wish = 2 if leave else 1 if signals else 0
    if world > 1:
        wishes = torch.tensor(wish, device=device)
        dist.all_reduce(wishes, dist.ReduceOp.MAX)
        wish = int(wishes)
    signals.clear()
    return ('', 'save', 'leave')[wish]


# ---------------------------------------------------------------- progress

def watch(batches, count, label, rank):
    """The same batches, with a line every few seconds that says how long the rest will take. label:
    a string, or a function that returns one."""
    start, said, done = time.time(), time.time(), 0
    for batch in batches:
        yield batch
        done += len(batch)
        now = time.time()
        if rank == 0 and (now - said > 5 or done == count):
            said, left = now, int((now - start) / done * (count - done))
            print(f'{label() if callable(label) else label}: {done}/{count}  '
                  f'{done / (now - start):.1f} img/s  '
                  f'{left // 60}:{left % 60:02d} left', flush=True)


def new_meter(device, unit=1.0):
    """What is known of the steps since the last log line, on the device; z is binned in `unit`s."""
    zero = torch.zeros((), device=device)
    edges = unit * torch.tensor(Z_BINS, device=device)
    return dict(edges=edges, peak=zero, peak_step=zero, bad=zero,
                sums=torch.zeros(len(Z_BINS) + 1, 2, device=device), bad_z=None, bad_loss=None)


def observe(meter, step, z, loss, norm):
    """Add this rank's z, loss (B,) and gradient norm of a step, without waiting for the device."""
    bins = torch.bucketize(z, meter['edges'])
    meter['sums'].index_add_(0, bins, torch.stack([loss, torch.ones_like(loss)], 1))
    meter['peak_step'] = torch.where(loss.mean() > meter['peak'], step, meter['peak_step'])
    meter['peak'] = torch.maximum(loss.mean(), meter['peak'])
    first = (meter['bad'] == 0) & ~norm.isfinite()
    if meter['bad_z'] is None:
        meter.update(bad_z=z, bad_loss=loss)
    for key, value in (('bad', step), ('bad_z', z), ('bad_loss', loss)):
        meter[key] = torch.where(first, value, meter[key])


def stop_if_bad(meter, args, order, rank, world, path):
    """End the run at the first gradient that was not finite, with the images and z that made it.
    order(step): the numbers of the images of that step."""
    step = int(meter['bad'])
    if not step:
        return
    images = order(step)[rank * args.batch_size // world:]
    wrong = (~meter['bad_loss'].isfinite()).nonzero().flatten().tolist()
    made = ', '.join(f'{int(images[i])} at z = {float(meter["bad_z"][i]):.4g}' for i in wrong[:8])
    saved = f'{path} holds an earlier step' if os.path.exists(path) else 'nothing was saved yet'
    made = f'images {made}{" ..." * (len(wrong) > 8)}' if made else 'none of the images'
    raise BadInput(f'step {step}: the gradient is not finite; loss not finite for {made}; '
                   f'stopped, {saved}; go on by the same command with a lower --lr (it was '
                   f'{args.lr:g})' + ', or --no-bf16' * args.bf16)


def progress(args, step, meter, images, rate, lr, device):
    """One line for people, and the dict that log.jsonl keeps. images: seen in all; rate: a second;
    sums (bins, 2): loss and count."""
    total, count = meter['sums'].sum(0).tolist()
    peak, peak_step, memory = float(meter['peak']), int(meter['peak_step']), peak_memory(device)
    left = int((args.steps - step) * args.batch_size / rate)
    by_z = [round(a / n, 5) if n else None for a, n in meter['sums'].tolist()]
    spike = f'  spike {peak:.4g} at step {peak_step}' if peak > 5 * total / count else ''
    print(f'step {step}/{args.steps}  loss {total / count:.4f}  lr {lr:.1e}  {rate:.0f} img/s  '
          f'{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left  '
          + (f'{memory:.1f} GB  ' if memory else '') + 'loss by z '
          + ' '.join('-' if v is None else f'{v:.3g}' for v in by_z) + spike, flush=True)
    return dict(step=step, images=images, loss=total / count, lr=lr,
                img_per_s=rate, memory_gb=memory, loss_by_z=by_z, z_bins=meter['edges'].tolist(),
                peak=peak, peak_step=peak_step)


# ---------------------------------------------------------------- the folder of a run

def claim(folder):
    """Lock the folder for this process (until it ends, however it ends): one run at a time."""
    if fcntl is None:  # there two runs on one folder are the user's own affair
        return
    held = os.open(folder, os.O_RDONLY)
    AT_THE_END.callback(os.close, held)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BadInput(f'--out_dir {folder}: another run is using it; wait for it to end, or give '
                       'another --out_dir') from error
    except OSError as error:  # a network file system without locks
        print(f'--out_dir {folder}: cannot be locked ({error}); let no other run use it',
              file=sys.stderr)


def keep_older(path, step, keep):
    """Give the checkpoint of `step` a second name before a newer one replaces it, and drop all but
    the last keep - 1 of those names."""
    stem = path.removesuffix('.pt')
    name = f'{stem}-{step:07d}.pt'
    if os.path.exists(path) and not os.path.exists(name):
        try:
            os.link(path, name)
        except OSError:  # a file system without hard links
            shutil.copy2(path, f'{name}.part')
            os.replace(f'{name}.part', name)
    for old in sorted(glob.glob(f'{glob.escape(stem)}-*.pt'), reverse=True)[keep - 1:]:
        os.remove(old)


def open_log(args, start):
    """log.jsonl, to append to, without the lines of steps that are about to be made again; and the
    number of images that its run has seen at step `start`."""
    path = os.path.join(args.out_dir, 'log.jsonl')
    lines = open(path).read().splitlines() if os.path.exists(path) else []
    rows = [row for row in (json.loads(line) for line in lines if line.endswith('}'))
            if row['step'] <= start]
    kept = ''.join(f'{json.dumps(row)}\n' for row in rows)
    write('--out_dir', path, lambda file: file.write(kept.encode()))
    last = rows[-1] if rows else dict(step=0, images=0)  # --batch_size may have changed since
    seen = last['images'] + (start - last['step']) * args.batch_size
    return open(path, 'a', buffering=1), seen


def restore(opt, saved, device, rank):
    """The states of the optimizer and of this rank's generators, as they were."""
    try:
        groups = [dict(g, fused=device.type != 'mps') for g in saved['opt']['param_groups']]
        opt.load_state_dict(dict(saved['opt'], param_groups=groups))
        for p, state in opt.state.items():
            for key in ('exp_avg', 'exp_avg_sq'):
                if state[key].shape != p.shape:
                    raise ValueError(f'{key} is {tuple(state[key].shape)}, not {tuple(p.shape)}')
                # fused Adam pairs what lies at the same place in memory, whatever the strides
                state[key] = torch.empty_like(p).copy_(state[key])
            if not 1 <= float(state['step']) < 2 ** 31:
                raise ValueError(f'step is {float(state["step"])}')
        if rank < len(saved.get('rng', [])):
            torch.set_rng_state(saved['rng'][rank][0])
            for state in saved['rng'][rank][1:] if device.type != 'cpu' else ():
                torch.get_device_module(device).set_rng_state(state)
    except Exception as error:  # load_state_dict checks next to nothing itself
        raise BadInput(f'the checkpoint is damaged: opt or rng do not fit '
                       f'({repr(error)[:150]})') from error


# ---------------------------------------------------------------- what only CPUs need

def speed_up(net):
    """net, its group norms, dropouts and attention replaced in place by those below; freed memory
    is kept."""
    keep_freed_memory()
    faster = {nn.GroupNorm: GroupNorm, nn.Dropout: Dropout}
    for layer in net.modules():
        layer.__class__ = faster.get(type(layer), type(layer))
        if hasattr(layer, 'attend'):
            layer.attend = attend
    return net


def attend(q, k, v):
    """Attention (B, 1, L, c). On a CPU PyTorch's own has a slow gradient, most so in bfloat16."""
    short = q.shape[2] <= (256 if q.dtype == torch.bfloat16 else 64)  # longer: no faster
    if q.device.type == 'cpu' and q.requires_grad and short:
        return (q @ k.mT * q.shape[3] ** -0.5).softmax(3).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


class GroupNorm(nn.GroupNorm):
    """On a CPU PyTorch's kernel is slow where the channels are last, which is what the convolutions
    want: backward always, and forward on small images in small groups. Two copies cost less."""

    def forward(self, x):
        fast = x.shape[2] * x.shape[3] >= 1024 or x.shape[1] >= 16 * self.num_groups
        if x.device.type != 'cpu' or fast and not torch.is_grad_enabled():
            return super().forward(x)
        last = functools.partial(torch.Tensor.contiguous, memory_format=torch.channels_last)
        x = x.contiguous()
        if x.requires_grad and not torch.compiler.is_compiling():
            x.register_hook(last)  # a sum of gradients of different strides is slow
        return last(super().forward(x))


class Dropout(nn.Dropout):
    """On a CPU, where PyTorch's draws and comparisons are slow, from 16 bits an element of a
    generator seeded by PyTorch's."""

    def forward(self, h):
        p = self.p
        if (not self.training or h.device.type != 'cpu' or not 2 ** -16 < p < 1 - 2 ** -16
                or torch.compiler.is_compiling()):
            return super().forward(h)
        draw = np.random.SFC64(int(torch.randint(2 ** 62, ()))).random_raw
        bits = torch.from_numpy(draw((h.numel() + 3) // 4).view(np.int16))[:h.numel()]
        low = round(p * 2 ** 16) - 2 ** 15 - 1
        keep = bits.clamp_(low, low + 1).sub_(low).as_strided(h.shape, h.stride())  # 0 or 1
        return h * (keep.to(h.dtype) * (1 / (1 - p)))


def keep_freed_memory():
    """Where the C library is glibc, have it keep freed tensors of up to 32 MB. It would return
    them, and a twentieth of a CIFAR-10 step on CPUs would be the page faults of the next ones."""
    if sys.platform == 'linux' and hasattr(library := ctypes.CDLL(None), 'mallopt'):
        library.mallopt(-3, 32 << 20)     # M_MMAP_THRESHOLD, at most 32 MB
        library.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD
