"""Scripts as people run them: in several processes, on other devices, stopped, killed, misused."""
import contextlib
import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import pfgm
from support import processes, sets
from support.batches import charges_of
from support.cli import BadInput
from support.solvers import SOLVERS
from support.tests.common import (F64, HERE, SHARED, TINY, TINY_PP, Forked, close, joined, loaded,
                                  losses, refuses, script, seeded, torchrun, until)
from support.tests.published_files import edm_file, tiny_official

has_proc = pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='no /proc here')


# ---------------------------------------------------------------- beginning and end

@pytest.mark.slow
def test_run__compile_without_a_compiler_ends_in_one_line(trained, tmp_path, monkeypatch):
    monkeypatch.setenv('CXX', 'no_such_compiler')
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path / 'cache'))
    command = [HERE / 'sample.py', '--ckpt', trained, '--n', '1', '--nfe', '1', '--compile']
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and not (tmp_path / 'samples.png').exists(), done.stderr
    assert done.stderr.startswith('--compile: ') and done.stderr.count('\n') == 1


@pytest.mark.parametrize('error, code, line', [
    (BadInput('--nfe 0:\n give more'), 2, '--nfe 0: give more\n'),
    (BadInput(''), 2, ''),  # another process shows it
    (KeyboardInterrupt(), 130, 'interrupted\n'),
    (RuntimeError('DataLoader worker (pid 7) is killed'), 2, r'--workers: .*--workers 0.*\n')])
def test_run__ends_in_one_line_with_its_code(error, code, line, capsys):
    def main(args):
        raise error
    with pytest.raises(SystemExit) as stop:
        processes.run(main, None)
    assert stop.value.code == code and re.fullmatch(line, capsys.readouterr().err)


def test_run__a_mistake_in_the_code_keeps_its_traceback():
    def main(args):
        raise RuntimeError('shapes do not match')
    with pytest.raises(RuntimeError, match='shapes do not match'):
        processes.run(main, None)


# ---------------------------------------------------------------- several processes

@pytest.mark.parametrize('world', [1, 2, 3, 7])
@pytest.mark.parametrize('n', [0, 5, 21])
def test_share_of_rank__shares_out_everything_evenly(n, world):
    shares = [processes.share_of_rank(n, rank, world) for rank in range(world)]
    assert [k for share in shares for k in share] == list(range(n))
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1


def two_processes(command):
    """Run train.py in two processes with the environment that torchrun gives them."""
    port = free_port()
    ranks = []
    for rank in '01':
        ranks.append(Forked(command, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE='2',
                            LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port))
    printed = [process.stdout.read() for process in ranks]
    assert [process.wait() for process in ranks] == [0, 0], printed
    assert 'saved' in printed[0]


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return str(s.getsockname()[1])


def test_setup__two_processes_then_one_and_two_micro_batches_follow_the_loss_of_one(tmp_path):
    command = [*TINY, '--dropout', 0, '--steps', 4, '--out_dir']
    script(['train.py', *command, tmp_path / 'one'])
    script(['train.py', *command, tmp_path / 'half', '--accum', 2])
    two_processes([*command, tmp_path / 'two', '--steps', 2])
    script(['train.py', *command, tmp_path / 'two'])
    one, two, half = (losses(tmp_path / name) for name in ('one', 'two', 'half'))
    assert len(one) == len(two) == len(half) == 4
    close(two[:2], one[:2], rtol=1e-5)
    close(half, one, rtol=1e-5)
    close(two, one, rtol=1e-4)


@pytest.mark.slow
def test_agree__two_machines_with_one_folder_or_with_copies(tmp_path):
    one, a, b = (tmp_path / name for name in ('one', 'a', 'b'))
    command = [*TINY, '--dropout', 0, '--steps']

    def run_two(*folders, steps):
        """(exit codes, what they print) of two machines, each with its folder."""
        where = dict(nnodes=2, master_addr='127.0.0.1', master_port=free_port())
        running = [torchrun([*command, steps, '--timeout', 60, '--out_dir', folder], 1, node_rank=k,
                         **where) for k, folder in enumerate(folders)]
        texts = [process.communicate(timeout=300)[0] for process in running]
        return [process.returncode for process in running], texts

    script(['train.py', *command, 4, '--out_dir', one])
    codes, texts = run_two(a, a, steps=2)
    assert codes == [0, 0], texts
    codes, texts = run_two(a, b, steps=4)  # only the first has the checkpoint
    assert codes == [1, 1], texts
    assert 'step 0 in process 1, 2 in process 0; give all processes' in texts[0], texts
    shutil.copytree(a, b)  # as the line says
    codes, texts = run_two(a, b, steps=4)
    assert codes == [0, 0], texts
    close(losses(a), losses(one), rtol=1e-4)


@pytest.mark.parametrize('rank, order', [(0, ['downloads', 'waits']), (1, ['waits', 'finds it'])])
def test_first_of_its_machine__downloads_and_the_others_wait(rank, order, monkeypatch):
    torchvision = pytest.importorskip('torchvision')
    done = []

    def mnist(root, train, download):
        done.append('finds it' if done else 'downloads')
        return types.SimpleNamespace(data=np.zeros((4, 28, 28), np.uint8), targets=np.arange(4),
                                     classes=None)

    monkeypatch.setattr(torchvision.datasets, 'MNIST', mnist)
    monkeypatch.setenv('LOCAL_RANK', str(rank))
    monkeypatch.setattr(processes, 'patient', lambda: 'all')
    monkeypatch.setattr(processes.dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(processes.dist, 'barrier', lambda group: done.append('waits'))
    sets.load_images('mnist', image_size=28)
    assert done == order


def workers(process):
    """The process ids of the ranks under a torchrun."""
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children')
    return [int(pid) for pid in children.read_text().split()]


@pytest.mark.slow
@has_proc
@pytest.mark.parametrize('first', [0, 1])
def test_join__killed_ranks_are_restarted_and_the_loss_goes_on(first, here):
    command = [*TINY, *'--steps 60 --dropout 0 --save_every 5 --out_dir'.split()]
    script(['train.py', *command, 'one'])
    process = torchrun([*command, 'two'], 2, max_restarts=2)
    for step, rank in ((12, first), (32, 1 - first)):
        until(process, f'step {step}/')
        os.kill(workers(process)[rank], signal.SIGKILL)
        until(process, 'going on from step')
    process.communicate(timeout=120)
    assert process.returncode == 0
    close(losses('two'), losses('one'), rtol=1e-3)


@pytest.mark.slow
@has_proc
def test_join__a_hung_rank_ends_the_job(here):
    process = torchrun([*TINY, '--steps', 100000, '--timeout', 5], 2)
    until(process, 'step 5/')
    os.kill(workers(process)[1], signal.SIGSTOP)
    process.communicate(timeout=120)
    assert process.returncode != 0


# ---------------------------------------------------------------- signals

@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_listen__a_signal_saves_and_leaves_and_sigusr1_saves(number, tmp_path):
    command = [*TINY, '--steps', 100000, '--out_dir', tmp_path]
    process = Forked(command)
    until(process, 'step 3/')
    refuses(['train.py', *command], 'another run is using it')
    os.kill(process.pid, signal.SIGUSR1)
    while not (tmp_path / 'ckpt.pt').exists():
        assert process.is_alive()
        time.sleep(0.05)
    first = loaded(tmp_path)['step']
    os.kill(process.pid, number)
    rest = process.stdout.read()
    assert process.wait() == 0 and 'saved' in rest
    assert loaded(tmp_path)['step'] == len(losses(tmp_path)) > first >= 3


@pytest.mark.slow
@has_proc
def test_listen__a_second_ctrl_c_ends_a_run_that_hangs(tmp_path):
    process = torchrun([*TINY, '--steps', 100000, '--out_dir', tmp_path / 'o'], 2)
    until(process, 'step 3/')
    hung, stopped = workers(process)
    os.kill(stopped, signal.SIGSTOP)
    time.sleep(0.5)
    stat = Path(f'/proc/{hung}/stat')
    for _ in range(2):
        assert stat.exists() and ' Z ' not in stat.read_text()  # it is no zombie yet
        os.kill(hung, signal.SIGINT)
        time.sleep(1)
    assert not stat.exists() or ' Z ' in stat.read_text()
    os.kill(stopped, signal.SIGKILL)
    process.communicate(timeout=300)  # torchrun sees that they have ended
    assert process.returncode != 0


def test_listen__a_run_that_ends_does_not_wait_for_its_readers_of_images():
    signals = processes.listen()
    child = os.fork()
    if child == 0:  # as a reader of images: it holds all that is open
        time.sleep(60)
        os._exit(0)
    began = time.time()
    processes.AT_THE_END.close()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert time.time() - began < 30 and signals == []


def test_heard__asks_to_leave_rather_than_to_save_and_knows_no_other_signal():
    signals = []
    for numbers, wish in (([], ''), ([signal.SIGUSR1], 'save'), ([signal.SIGCHLD], ''),
                          ([signal.SIGUSR1, signal.SIGTERM], 'leave'),
                          ([signal.SIGINT, signal.SIGUSR1], 'leave'), ([], '')):
        signals += numbers
        assert processes.heard(signals, 7, 1) == wish
        assert signals == []


def test_heard__several_ranks_agree_on_every_10th_step_and_lose_no_signal(monkeypatch):
    signals = [signal.SIGUSR1]

    def all_reduce(wishes, op):
        assert op is processes.dist.ReduceOp.MAX
        wishes += 1  # another rank was asked to leave
        signals.append(signal.SIGTERM)  # this one is, in the meantime

    monkeypatch.setattr(processes.dist, 'all_reduce', all_reduce)
    assert processes.heard(signals, 19, 2) == ''
    assert processes.heard(signals, 20, 2) == 'leave'
    assert signals == [signal.SIGTERM]


# ---------------------------------------------------------------- devices

def test_setup__cuda_alone_is_its_first_device(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, 'zeros', lambda *shape, device: None)
    monkeypatch.setattr(torch, 'set_float32_matmul_precision', lambda precision: None)
    monkeypatch.setattr(torch.cuda, 'set_device', chosen.append)
    device, rank, world = processes.setup('cuda')
    assert chosen == [device] and (device.index, rank, world) == (0, 0, 1)


def python(code, folder, *launcher, **environment):
    """What a program of its own, run in a folder, prints; our modules can be imported there."""
    (folder / 'program.py').write_text(code)
    environment = {**os.environ, 'PYTHONPATH': str(HERE), **environment}
    done = subprocess.run([sys.executable, *launcher, 'program.py'], cwd=folder, text=True,
                          capture_output=True, env=environment)
    assert done.returncode == 0, done.stdout[-999:] + done.stderr
    return done.stdout


@pytest.mark.slow
def test_peak_memory__and_claim_without_the_modules_that_windows_lacks(tmp_path):
    out = python('import sys\nsys.modules.update(resource=None, fcntl=None)\n'
                 'import evaluate, sample, train\n'
                 f'train.main(train.parse_args({TINY} + ["--steps", "2"]))', tmp_path)
    assert 'saved' in out


PRETEND = SHARED / 'tools' / 'pretend_cuda.py'
pretended = pytest.mark.skipif(
    not PRETEND.exists() or not hasattr(torch._C, '_ensureCUDADeviceGuardSet'),
    reason='nothing here pretends a GPU, or this PyTorch is too old for it')
MODES = """
train.py TINY --skip --steps 2 --dropout 0.1 --out_dir o
sample.py --ckpt o --nfe 4 --n 3 --gif
sample.py --ckpt o --solver rk45 --tol 0.1 --n 3 --out digits
evaluate.py --ckpt o --bpd --swd --neighbours --n 2 --nfe 2 --tol 0.1
evaluate.py --ckpt o --judge --n 129 --nfe 1
train.py TINY --skip --steps 4 --sample_every 2 --dropout 0.1 --out_dir o
sample.py --exact --dataset large.npz --n 2
sample.py --ckpt o --n 2 --tol 0.1 --encode glyphs
sample.py --ckpt o --inpaint large.npz --mask large.npz --nfe 2 --n 2
train.py TINY_PP --method rf --classes --steps 2 --out_dir rf
train.py TINY_PP --classes --reflow rf --pairs 16 --steps 2 --out_dir reflow
sample.py --ckpt rf --solver ddim --eta 1 --nfe 3 --n 2 --schedule time --guidance 2
train.py --dataset 32.npz --batch_size 8 --no-bf16 --steps 8 --init_from a.pth --out_dir official
sample.py --ckpt a.pth --tol 0.5 --n 2
evaluate.py --compare o rf --straightness --swd --sweep nfe=2,3 --n 2
evaluate.py --exact --dataset large.npz --bpd --n 2 --tol 0.1
bench solvers --dataset large.npz --n 2 --sweep nfe=2 --solvers unipc,rk45
train.py TINY_PP --D 128 --dataset large.npz --steps 2 --workers 1 --accum 2 --out_dir pp
train.py TINY_PP --D 3 --preset cifar10_ncsnpp --steps 2 --sample_every 2 --out_dir ncsnpp
train.py TINY_PP --consistency --steps 2 --sample_every 2 --init_from ncsnpp --out_dir few
sample.py --ckpt few --nfe 2 --n 2
train.py TINY_PP --distill o --pairs 16 --steps 2 --out_dir one
train.py TINY_PP --method rf --source large.npz --steps 2 --sample_every 2 --out_dir across
sample.py --ckpt across --from large.npz --nfe 2 --n 2
sample.py --ckpt edm.pkl --n 2 --classes 1
"""
DRIVER = """
from support import images, judge
from support.tests import common
judge.JUDGE_STEPS = 2
for line in open('modes'):
    images.MEMORY_LIMIT = 1 if '--workers' in line else 2 << 30
    images.free_memory = lambda: 0
    print(line)
    common.script(line.split())
print('all modes ran')
"""


@pytest.mark.slow
@pytest.mark.parametrize('device, count', [
    *(pytest.param(device, 7, marks=pretended) for device in ('cuda', 'mps')),
    *(pytest.param(device, 99, marks=[pretended, pytest.mark.slow]) for device in ('cuda', 'mps')),
    pytest.param('real cuda', 99, marks=pytest.mark.cuda)])
def test_setup__every_mode_runs_on_a_pretended_device_and_on_a_real_one(device, count, tmp_path):
    tiny_official(tmp_path / 'a.pth')
    edm_file(tmp_path / 'edm.pkl', pfgmpp=True, D=2048, ncsnpp=True, classes=3)
    for name, size in (('large.npz', 16), ('32.npz', 32)):
        pixels = np.random.default_rng(0).integers(0, 256, (20, size, size, 3), dtype=np.uint8)
        np.savez(tmp_path / name, x=pixels)
    modes = '\n'.join(MODES.strip().splitlines()[:count])
    for name, words in (('TINY_PP', TINY_PP), ('TINY', TINY)):
        modes = modes.replace(name, ' '.join(words).replace('--device cpu', ''))
    (tmp_path / 'modes').write_text(modes)
    launcher = [] if device == 'real cuda' else [PRETEND]
    out = python(DRIVER, tmp_path, *launcher, PRETEND=device)
    assert out.endswith('all modes ran\n') and f'1 x {device.split()[-1]}' in out


@pytest.mark.parametrize('version, group, files', [
    (2, '0::/a/b', {'a/memory.max': 'max', 'a/memory.current': 7, 'a/b/memory.max': 1000,
                    'a/b/memory.current': 700, 'a/b/memory.stat': 'anon 500\ninactive_file 100'}),
    (1, '4:cpu,memory:/of/outside', {
        'memory/memory.limit_in_bytes': 1000, 'memory/memory.usage_in_bytes': 700,
        'memory/memory.stat': 'inactive_file 5\ntotal_inactive_file 100'})])
def test_free_memory__is_what_a_container_has_left(version, group, files, tmp_path):
    own = tmp_path / 'cgroup'
    own.write_text(f'1:name=systemd:/\n{group}\n')
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f'{content}\n')
    assert list(processes.free_of_groups(str(tmp_path), str(own))) == [400]
    assert list(processes.free_of_groups(str(tmp_path), str(tmp_path / 'none'))) == []


def test_free_memory__is_half_a_gigabyte_at_least_where_tests_run():
    assert processes.free_memory() > 2 ** 29


def test_setup__deterministic_kernels_are_asked_for_until_the_run_ends(monkeypatch):
    monkeypatch.delenv('RANK', raising=False)
    monkeypatch.setenv('CUBLAS_WORKSPACE_CONFIG', ':16:8')
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', True)
    asked = []

    def main(args):
        processes.setup('cpu', deterministic=True)
        asked.append(torch.are_deterministic_algorithms_enabled())

    processes.run(main, None)
    assert asked == [True] and not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark
    error = RuntimeError('put_ does not have a deterministic implementation, but you set ...')
    assert processes.explain(error)[0].startswith('--deterministic: put_ does not')


def test_join__says_what_failed_and_which_variable_names_the_network(monkeypatch):
    def refused(*args, **options):
        raise RuntimeError('connectFullMesh failed: Connection refused')

    monkeypatch.setattr(torch.distributed, 'rendezvous', lambda *args, **options: iter(
        [(torch.distributed.HashStore(), 0, 2)]))
    monkeypatch.setattr(torch.distributed, 'init_process_group', refused)
    with pytest.raises(BadInput, match='by gloo could not be made .connectFullMesh failed: Conn.*'
                                       'GLOO_SOCKET_IFNAME'):
        processes.join(torch.device('cpu'), 0, 2, 5.0)


BOTH = 'cpu:gloo,cuda:nccl'


@pytest.mark.parametrize('backend, error, ends_by', [
    (BOTH, None, 'destroy'), (BOTH, BadInput('full'), 'abort'),
    (BOTH, ValueError('a mistake'), 'abort'), ('cpu:gloo', BadInput('full'), 'destroy')])
def test_leave__where_a_process_fails_nothing_waits_for_the_others(backend, error, ends_by,
                                                                   monkeypatch):
    """To destroy a group of NCCL does. That of gloo is this process's own affair."""
    dist = processes.dist
    done = []
    monkeypatch.setattr(dist, 'rendezvous', lambda *args, **options: iter(
        [(dist.HashStore(), 0, 2)]))
    monkeypatch.setattr(dist, 'init_process_group', lambda *args, **options: None)
    monkeypatch.setattr(dist, 'get_backend_config', lambda: backend)
    monkeypatch.setattr(dist, 'destroy_process_group', lambda: done.append('destroy'))
    monkeypatch.setattr(dist.distributed_c10d, '_abort_process_group',
                        lambda: done.append('abort'))
    monkeypatch.setattr(processes, 'patient', functools.cache(lambda: None))

    def main(args):
        processes.join(torch.device('cpu'), 0, 2, 5.0)
        if error is not None:
            raise error

    with contextlib.suppress(SystemExit, ValueError):
        processes.run(main, None)
    assert done == [ends_by]


# ---------------------------------------------------------------- on a GPU

@pytest.mark.cuda
def test_join__on_cuda_one_rank_of_nccl_follows_the_loss_of_none(cuda_run, tmp_path):
    flags = ['--no-bf16', '--dropout', '0', '--steps', '4', '--out_dir']
    cuda_run(*flags, tmp_path / 'none')
    process = torchrun([*TINY, '--device', 'cuda', *flags, tmp_path / 'nccl'], 1)
    assert 'saved' in process.communicate()[0]
    close(losses(tmp_path / 'nccl'), losses(tmp_path / 'none'), rtol=1e-4)


@pytest.mark.cuda
def test_sample_ode__on_cuda_follows_that_of_the_cpu():
    charges = charges_of(sets.load_images('glyphs'), '--dataset', dtype=F64)[torch.arange(50)]
    x = pfgm.sample_prior((4, 1, 16, 16), 40.0, 800.0, generator=seeded(), dtype=F64)
    for name, solver in SOLVERS.items():
        nfe = None if name == 'rk45' else 12
        if name == 'rk45':
            solver = functools.partial(solver, rtol=1e-8, atol=1e-8)
        ends = []
        for device in ('cpu', 'cuda'):
            end, _ = pfgm.sample_ode(pfgm.ExactField(charges.to(device)), x.to(device), 40.0, 0.05,
                                     solver, nfe, z_exp=0)
            ends.append(end.cpu())
        close(*ends, atol=1e-6)


@pytest.fixture
def tf32():
    """Products in TF32 wherever nobody asks for more, as setup() has it on a GPU."""
    torch.set_float32_matmul_precision('high')
    yield
    torch.set_float32_matmul_precision('highest')


@pytest.mark.cuda
def test_poisson_field__on_cuda_is_exact_to_1e_6(tf32):
    charges = torch.rand(4096, 3, 32, 32, generator=seeded()) * 2 - 1
    x, z = pfgm.perturb(charges[:64], 291, generator=seeded(1))
    on_gpu = joined(pfgm.poisson_field(x.cuda(), z.cuda(), charges.cuda())).cpu()
    in_float64 = joined(pfgm.poisson_field(x.double(), z.double(), charges.double()))
    error = (on_gpu - in_float64).norm(dim=1)
    assert (error <= 1e-6 * in_float64.norm(dim=1)).all()
