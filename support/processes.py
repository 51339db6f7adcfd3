"""How a script starts and ends, alone or as one of many: devices, processes of torchrun, signals.
You need not read it to understand the method.
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
from typing import NamedTuple

import torch
import torch.distributed as dist

from support import waiting
from support.cli import BadInput, printable, printable_output

try:
    import resource
except ImportError:  # Windows
    resource = None


# ---------------------------------------------------------------- beginning and end

AT_THE_END = contextlib.ExitStack()  # what run() does when main has ended, however it ended


def run(main, args):
    """Call main(args). What the user can mend ends in one line on stderr and exit code 2, the end
    of another process in one line and exit code 1."""
    with AT_THE_END:  # after the last words, since to leave the other processes may take a while
        try:
            with waiting.working(), printable_output():
                main(args)
        except (BadInput, KeyboardInterrupt, RuntimeError) as error:
            last_words = explain(error)
            if last_words is None:
                raise
            line, code = last_words
            if line:
                print(printable(line), file=sys.stderr, flush=True)
            sys.exit(code)


def explain(error):
    """(the line that tells people why the script ends, its exit code), or None for a mistake in the
    code, of which the traceback says more."""
    if isinstance(error, BadInput):
        return str(error), 2
    if isinstance(error, KeyboardInterrupt):
        return 'interrupted', 128 + signal.SIGINT
    line = (str(error) or repr(error)).splitlines()[0]
    # PyTorch's handler of SIGCHLD raises this whatever main is doing, so it may come from anywhere.
    if line.startswith('DataLoader worker'):
        return str(reader_lost(error)), 2
    if 'does not have a deterministic implementation' in line:
        return f'--deterministic: {line[:150]}; leave it out', 2
    # These are known by their module, since to import TorchDynamoException takes a second.
    if type(error).__module__.startswith(('torch._dynamo', 'torch._inductor')):
        return f'--compile: {line}; leave it out', 2
    # What gloo raises where the other end is lost is a plain RuntimeError.
    if dist.is_initialized() and (isinstance(error, dist.DistError) or 'gloo' in line):
        return f'another process has ended, or is silent: see what it says ({line[:150]})', 1
    return None


def reader_lost(error):
    """The BadInput for a process of --workers that has ended, or cannot share what it reads."""
    why = str(error).strip().splitlines()[-1][:150]
    return BadInput(f'--workers: a process that reads images has ended ({why}); give --workers 0, '
                    'or where a container has little shared memory docker run --shm-size=8g')


def setup(name, timeout=600.0, float64=False, deterministic=False):
    """Choose the device and, under torchrun, join the other processes -> (device, rank, how many).

    name: of --device. timeout: the seconds after which a silent rank ends the job. float64: whether
    the work is in float64, for which the CPU serves where the device has none. deterministic:
    whether the same command shall give the same bits each time on one device, by kernels that may
    be slower; on the CPU it does without. Raises BadInput for a device that is not there."""
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # read when CUDA begins
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False  # which would choose kernels by their time
        AT_THE_END.callback(torch.use_deterministic_algorithms, False)
    under_torchrun = 'RANK' in os.environ
    rank = local_rank = 0
    world = 1
    if under_torchrun:
        rank = int(os.environ['RANK'])
        local_rank = int(os.environ['LOCAL_RANK'])
        world = int(os.environ['WORLD_SIZE'])
    device = choose_device(name, local_rank, world)
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        # TF32 is fast. Where exactness counts, pfgm.full_float32 switches it off.
        torch.set_float32_matmul_precision('high')
    if under_torchrun:
        join(device, rank, world, timeout)
    if float64 and device.type == 'mps':
        print('--exact: in float64, which mps lacks; on the CPU')
        device = torch.device('cpu')
    return device, rank, world


def choose_device(name, local_rank, world):
    """The torch.device that --device names, on which a tensor can be made."""
    if name == 'auto':
        name = 'cpu'
        if torch.cuda.is_available():
            name = 'cuda'
        elif torch.backends.mps.is_available() and world == 1:
            name = 'mps'
    try:
        # Each process of a machine has a GPU of its own. set_device() wants its number.
        device = torch.device(f'cuda:{local_rank}' if name == 'cuda' else name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise BadInput(f'--device {name}: not on this machine ({why}); use --device cpu') from error
    if device.type == 'mps' and world > 1:
        raise BadInput(f'--device {name}: is of one process; '
                       'leave torchrun out, or use --device cpu')
    return device


def join(device, rank, world, timeout):
    """Join the other processes of this torchrun, and leave them when run() ends."""
    limit = timedelta(seconds=timeout)
    try:
        store, _, _ = next(dist.rendezvous('env://', timeout=limit))
    except (RuntimeError, OSError) as error:
        raise not_joined('the store of torchrun', error) from error
    # torchrun keeps its store when it restarts processes, and with it the addresses of those that
    # died. A prefix hides these, where all ranks know the same count of restarts: on one machine.
    restarts = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')
    machines = os.environ.get('GROUP_WORLD_SIZE', '1')
    if machines == '1':
        store = dist.PrefixStore(f'restart {restarts}', store)
    # What is asked of the CPU of each process must not wait for its GPU, so both have a way.
    backend = 'cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo'
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    except RuntimeError as error:
        raise not_joined(f'the group of all processes by {backend}', error) from error
    # What is named last here is done first. The threads of the patient group must not outlive the
    # group of all. That one holds the GIL while it waits for its threads, and they may want the GIL
    # themselves to let their tensors go: the pause gives them time to.
    AT_THE_END.push(leave)
    AT_THE_END.callback(time.sleep, 0.1)
    AT_THE_END.callback(patient.cache_clear)
    try:
        patient()
    except RuntimeError as error:
        raise not_joined('the group of all processes by gloo', error) from error


def leave(failure, *_):
    """Leave the other processes of torchrun. failure: the type of the exception with which this one
    ends, or None; ExitStack gives it, and the exception itself.

    To destroy a group of NCCL is a collective: it waits for all processes. Where this one fails the
    others do not come, since they wait for it in their next step. It then gives up its connections
    without a word, and torchrun ends the others."""
    if failure is not None and 'nccl' in dist.get_backend_config():
        dist.distributed_c10d._abort_process_group()  # there is no public name for it
    else:
        dist.destroy_process_group()


def not_joined(group, error):
    """The BadInput where the processes of torchrun do not reach one another. group: what could not
    be made of them. Gloo connects to the address to which a machine's own name leads, which may be
    one that other machines do not see, such as 127.0.1.1."""
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError:
        address = 'no address'
    why = (str(error) or repr(error)).splitlines()[0][:150]
    return BadInput(f'torchrun: {group} could not be made ({why}); this machine is {host}, which '
                    f'leads to {address}: on several machines that address must be seen by the '
                    'others, or name the network interface between them on each: '
                    'GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0 torchrun ...')


# ---------------------------------------------------------------- what a device can do

def fast_bf16(device):
    """Whether bfloat16 products run faster than float32 on this device."""
    if device.type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != 'cpu':
        return False
    for name in ('_is_amx_tile_supported', '_is_avx512_bf16_supported'):
        is_supported = getattr(torch.cpu, name, None)  # not every version of PyTorch has both
        if is_supported and is_supported():
            return True
    return False


def peak_memory(device):
    """In GB, the most that a GPU has lent or, elsewhere, the most that this process has held. None
    on Windows, which does not say."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == 'darwin':  # in bytes there, in KB elsewhere
        return peak / 2 ** 30
    return peak / 2 ** 20


def free_gpu_memory(device):
    """The bytes that a GPU has left, and 0 where its driver does not say."""
    try:
        free, _ = torch.cuda.mem_get_info(device)
    except RuntimeError:
        return 0
    return free


def free_memory():
    """The bytes of main memory that this machine, or the container that this process is in, has
    left. On macOS all that it has, and 0 where the system does not say."""
    if os.path.exists('/proc/meminfo'):
        return min([number_in('/proc/meminfo', 'MemAvailable:') * 1024, *free_of_groups()])
    try:
        return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf()
        return 0


def free_of_groups(root='/sys/fs/cgroup', own='/proc/self/cgroup'):
    """Yields the bytes that are left of each limit of a control group of Linux, which is how
    containers are limited: of version 2 or, with the second names, of version 1.

    root: where the groups are. own: the file that names the group of this process."""
    if not os.path.exists(own):
        return
    with open(own) as file:
        lines = file.read().splitlines()
    for line in lines:
        _, kinds, group = line.split(':', 2)
        if kinds == '':
            top = root
            names = ('memory.max', 'memory.current', 'inactive_file')
        elif 'memory' in kinds.split(','):
            top = f'{root}/memory'
            names = ('memory.limit_in_bytes', 'memory.usage_in_bytes', 'total_inactive_file')
        else:
            continue
        # The groups above count too. In a container the path may be that of the outside, and its
        # own group then is the top.
        parts = [part for part in group.split('/') if part]
        for depth in range(len(parts) + 1):
            folder = '/'.join([top, *parts[:depth]])
            try:
                limit = number_in(f'{folder}/{names[0]}')
                used = number_in(f'{folder}/{names[1]}')
                cached = number_in(f'{folder}/memory.stat', names[2])  # of files; it can be freed
            except (OSError, ValueError):  # no such group here, or a limit of "max"
                continue
            yield max(limit - used + cached, 0)


def number_in(path, name=None):
    """The whole number in a file or, where a name is given, in the line that begins with it. Raises
    ValueError where there is none."""
    with open(path) as file:
        if name is None:
            return int(file.read())
        for line in file:
            words = line.split()
            if words[:1] == [name]:
                return int(words[1])
    raise ValueError(f'{path} has no {name}')


# ---------------------------------------------------------------- several processes

@functools.cache  # setup() makes it, in every process at once
def patient():
    """The group of all processes, on their CPUs, for waits that may rightly take hours: a download,
    or images that one process makes."""
    return dist.new_group(backend='gloo', timeout=timedelta(days=7))


def wait():
    """Wait until every process has come here."""
    if dist.is_initialized():
        dist.barrier(group=patient())


@contextlib.contextmanager
def first_of_its_machine():
    """The block runs in one process of each machine, and then in the others, which find there what
    the first has fetched."""
    first = os.environ.get('LOCAL_RANK', '0') == '0'
    if not first:
        wait()
    yield
    if first:
        wait()


def everywhere(value):
    """The list of every process's value, in rank order. They travel by pickle, through main
    memory."""
    if not dist.is_initialized():
        return [value]
    values = [None for _ in range(dist.get_world_size())]
    dist.all_gather_object(values, value, group=patient())
    return values


def agree(flag, mend, **facts):
    """Raise BadInput, which rank 0 shows, unless every process has the same facts. flag and mend:
    the first and the last words of the line."""
    each = everywhere(facts)
    for name, value in each[0].items():
        for rank, others in enumerate(each):
            if others[name] == value:
                continue
            if dist.get_rank() > 0:
                raise BadInput('')
            raise BadInput(f'{flag}: {name} {others[name]} in process {rank}, '
                           f'{value} in process 0; {mend}')


def share_of_rank(n, rank, world):
    """The range of those of n things that this rank works on; the shares differ by one at most."""
    return range(n * rank // world, n * (rank + 1) // world)


def ranks_here():
    """How many processes of torchrun this machine has; 1 without torchrun."""
    return int(os.environ.get('LOCAL_WORLD_SIZE', '1'))


def cores_of_rank():
    """How many cores there are for this process, 1 to 8."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows
        cores = os.cpu_count() or 1
    return min(max(cores // ranks_here(), 1), 8)


class Machine(NamedTuple):
    """On what images are made or read, and in how large batches."""
    device: torch.device
    rank: int        # of this process
    world: int       # how many processes there are
    batch_size: int  # images at a time, in this process
    workers: int     # processes that read a set which is too large for memory


# ---------------------------------------------------------------- signals

LEAVE = (signal.SIGINT, signal.SIGTERM)    # save and leave after this step
SAVE = getattr(signal, 'SIGUSR1', None)    # save and go on; Windows has no such signal
WISHES = ('', 'save', 'leave')             # what signals ask for; the later outweighs the earlier


def listen():
    """From now on hear SIGINT, SIGTERM and SIGUSR1 -> a list that their numbers are added to, for
    heard().

    Once asked to leave, another SIGINT or SIGTERM ends the process at once, also where it hangs.
    And it may hang in C, in a collective that waits for a process that hangs. No Python handler
    runs there, since Python calls its handlers between two instructions of the main thread. So
    another thread does the hearing: Python's handler in C writes the number of each signal to a
    socket the moment it arrives, and the thread reads it there."""
    received = []
    reader, writer = socket.socketpair()

    def hear():
        asked_at = None  # when the process was first asked to leave
        while message := reader.recv(1):  # empty once stop() has shut the other end
            number = message[0]
            if number in LEAVE:
                now = time.monotonic()
                if asked_at is None:
                    asked_at = now
                    if os.environ.get('LOCAL_RANK', '0') == '0':
                        print('leaving after this step; once more ends it at once', flush=True)
                # A terminal sends Ctrl-C to every process, and torchrun then sends it to its own
                # again. These two, at about the same time, are one.
                elif now > asked_at + 0.5:
                    print('ended at the second signal', file=sys.stderr, flush=True)
                    os._exit(128 + number)  # sys.exit() would end this thread alone
            received.append(number)

    thread = threading.Thread(target=hear, daemon=True)  # daemon: no exit waits for it
    thread.start()
    for number in (*LEAVE, SAVE):
        # Only signals with a handler in Python are written to the socket. It has nothing to do.
        if number is not None:
            signal.signal(number, lambda number, frame: None)
    writer.setblocking(False)  # as set_wakeup_fd() demands: C's handler must not wait
    # Where so many come that the socket is full, all that matters is in it.
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

    def stop():
        signal.set_wakeup_fd(-1)
        # Forked readers of images hold copies of the socket, so that to close it would not end it.
        writer.shutdown(socket.SHUT_RDWR)
        writer.close()
        thread.join()
    AT_THE_END.callback(stop)
    return received


def deaf(worker):
    """For a forked reader of images, so that the signals it gets are not heard by the run, whose
    socket it has inherited. worker: its number, which PyTorch tells it."""
    signal.set_wakeup_fd(-1)


def heard(signals, step, world):
    """What the signals since the last call ask for: '', 'save' (and go on), or 'leave' (after
    saving). signals: the list of listen().

    Ranks hear a signal at different steps, so that they must agree on what to do, as they do on
    every 10th step."""
    if world > 1 and step % 10:
        return ''
    arrived = signals[:]
    del signals[:len(arrived)]  # not clear(): the thread may have added one by now
    wish = ''
    if any(number in LEAVE for number in arrived):
        wish = 'leave'
    elif SAVE in arrived:
        wish = 'save'
    if world > 1:
        strongest = torch.tensor(WISHES.index(wish))  # on the CPU: no GPU is waited for
        dist.all_reduce(strongest, dist.ReduceOp.MAX)
        wish = WISHES[int(strongest)]
    return wish
