"""How a script starts and ends on one device or many: devices, ranks under torchrun, signals. You need
not read it to understand the method.
"""
import contextlib
import functools
import os
import signal
import socket
import sys
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from support.cli import BadInput

try:
    import resource
except ImportError:  # Windows
    resource = None


def reader_lost(error):
    """The BadInput of a process of --workers that has ended, or cannot share what it reads."""
    why = str(error).strip().splitlines()[-1][:150]
    return BadInput(f'--workers: a process that reads images has ended ({why}); give --workers 0, '
                    'or where a container has little shared memory docker run --shm-size=8g')


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


def setup(name, timeout=600.0, float64=False):
    """(device, rank, world size) of this process, alone or under torchrun, where a rank that is
    silent for `timeout` seconds ends the job. float64: the CPU serves where the device has none."""
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
    if float64 and device.type == 'mps':
        print('--exact: in float64, which mps lacks; on the CPU')
        device = torch.device('cpu')
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


def share_of_rank(n, rank, world):
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
