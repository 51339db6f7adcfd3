"""The folder of a training run: the checkpoint it goes on from, its log, and what is measured of
its steps. You need not read it to understand the method.
"""
import glob
import json
import os
import shutil
import sys
from typing import NamedTuple, Optional

import torch

from support.checkpoint import read_checkpoint
from support.cli import BadInput, given_by, say, write
from support.processes import AT_THE_END, peak_memory
from support.sets import SETS

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

Z_BINS = (0.01, 0.1, 1.0, 10.0)  # the loss is also logged by z, split here


# ---------------------------------------------------------------- where training starts from

class Origin(NamedTuple):
    """Where training starts from; all None where it starts afresh."""
    saved: Optional[dict]  # a checkpoint: net, ema, step, args, and opt where the file has it
    flag: Optional[str]    # what gave it: out_dir (the run is resumed), reflow, distill, init_from
    path: Optional[str]    # of the checkpoint

    @property
    def resumed(self):
        return self.flag == 'out_dir'


def open_run(out_dir, images, *, reflow=None, distill=None, init_from=None, consistency=False):
    """The Origin of a run: the checkpoint in out_dir, else the one that a flag names, else none.

    images: the data set. Where the newest checkpoint in out_dir is damaged, a line says so and the
    one before it is used. Raises BadInput for a folder that holds
    something else than a run, and where the run was made with other images."""
    newest = os.path.join(out_dir, 'ckpt.pt')
    older = sorted(glob.glob(os.path.join(glob.escape(out_dir), 'ckpt-*.pt')), reverse=True)
    paths = [path for path in (newest, *older) if os.path.exists(path)]
    for k, path in enumerate(paths):
        try:
            saved = read_given('out_dir', path)
        except BadInput as error:
            if path == paths[-1]:
                raise
            print(f'{error}; going back to {paths[k + 1]}', file=sys.stderr)
            continue
        check_data(images, saved['args'],
                   f'--out_dir {out_dir} holds a run', 'give another --out_dir, '
                   f'with --init_from {path} to go on from its network')
        return Origin(saved, 'out_dir', newest)

    check_is_run(out_dir)
    for flag, path in dict(reflow=reflow, distill=distill, init_from=init_from).items():
        if not path:
            continue
        is_teacher = flag != 'init_from'
        saved = read_given(flag, path, ema_only=is_teacher or consistency)
        if is_teacher and 'dataset' in saved['args']:  # the authors' files do not say
            check_data(images, saved['args'], f'--{flag} {path} was trained',
                       f'give --dataset {saved["args"]["dataset"]}')
        return Origin(saved, flag, path)
    return Origin(None, None, None)


def check_is_run(out_dir):
    """Raise BadInput for a folder that holds something else than a run or folders of runs."""
    if not os.path.isdir(out_dir):
        return

    def holds_runs(name):
        folder = glob.escape(os.path.join(out_dir, name))
        return any(glob.glob(f'{folder}{deeper}/log.jsonl') for deeper in ('', '/*', '/*/*'))

    names = [name for name in os.listdir(out_dir) if not holds_runs(name)]
    # A run that was killed before its first checkpoint has left a log.
    if names and 'log.jsonl' not in names:
        raise BadInput(f'--out_dir {out_dir}: not empty, and not a run of train.py; '
                       'give another --out_dir')


def read_given(flag, path, ema_only=False):
    """The checkpoint, as read_checkpoint() reads it, that `flag` gave to go on from.

    ema_only: training starts from its averaged weights, at step 0, as students do. Raises BadInput
    where the file is damaged, or lacks what training needs."""
    with given_by(f'--{flag}'):
        saved = read_checkpoint(path, whole=True)
    if ema_only:
        saved = dict(ema=saved['ema'], step=0, args=saved['args'])
    # A snapshot of EDM or PFGM++ is the averaged weights alone.
    if ema_only or saved['args']['edm']:
        saved.setdefault('net', {name: tensor.clone() for name, tensor in saved['ema'].items()})
    elif not {'net', 'opt'} <= saved.keys():
        raise BadInput(f'--{flag} {path}: holds the EMA only; training needs the whole checkpoint')
    return saved


def check_data(images, old, where, mend):
    """Raise BadInput unless the images are those that a run was made with: a known data set of that
    name or, wherever they are now, as many with the same pixels and labels. Where a known set is
    drawn or decoded otherwise here than there, as by other versions of Pillow, a line says so.

    old: the flags of that run. where and mend: the first and the last words of the line."""
    trained_on = old.get('dataset')  # None in the authors' files, which do not say
    size = old['image_size']
    difference = images.difference(old.get('data'), (old['channels'], size, size),
                                   old['classes'] > 0, old.get('class_names'))
    if images.name in SETS or trained_on in SETS:
        if images.name != trained_on:
            raise BadInput(f'--dataset {images.name}: {where} on {trained_on}; {mend}')
        if difference:
            say(f'--dataset {images.name}: not as it was there: {difference}')
    elif difference:
        raise BadInput(f'--dataset {images.name}: {where} on {trained_on}; {mend} ({difference})')


def restore_optimizer(opt, saved, device, rank):
    """Bring the optimizer, and the random generators of this rank, to the state they were saved in.

    saved: a checkpoint with opt and, unless it is the authors', rng. Raises BadInput where these do
    not fit the network."""
    try:
        groups = [dict(group, fused=device.type != 'mps') for group in saved['opt']['param_groups']]
        opt.load_state_dict(dict(saved['opt'], param_groups=groups))
        for p, state in opt.state.items():
            for key in ('exp_avg', 'exp_avg_sq'):
                if state[key].shape != p.shape:
                    raise ValueError(f'{key} is {tuple(state[key].shape)}, not {tuple(p.shape)}')
                # Fused Adam pairs what lies at the same place in memory, whatever the strides.
                state[key] = torch.empty_like(p).copy_(state[key])
            if not 1 <= float(state['step']) < 2 ** 31:
                raise ValueError(f'step is {float(state["step"])}')
        if rank < len(saved.get('rng', [])):  # there may be more ranks now
            cpu_state, *gpu_states = saved['rng'][rank]
            torch.set_rng_state(cpu_state)
            if device.type != 'cpu':
                for state in gpu_states:
                    torch.get_device_module(device).set_rng_state(state)
    except Exception as error:  # load_state_dict checks next to nothing, so anything may come
        why = repr(error)[:150]
        raise BadInput(f'the checkpoint is damaged: opt or rng do not fit ({why})') from error


# ---------------------------------------------------------------- the folder of a run

def claim(folder):
    """Lock the folder until this process ends, however it ends, so that one run at a time uses it.
    Raises BadInput where another process has the lock."""
    if fcntl is None:  # there two runs in one folder are the user's own affair
        return
    descriptor = os.open(folder, os.O_RDONLY)
    AT_THE_END.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BadInput(f'--out_dir {folder}: another run is using it; '
                       'wait for it to end, or give another --out_dir') from error
    except OSError as error:  # a network file system without locks
        print(f'--out_dir {folder}: cannot be locked ({error}); let no other run use it',
              file=sys.stderr)


def open_log(out_dir, start, batch_size):
    """Open log.jsonl, without its lines on steps that will be made again -> (the file, to append
    to; how many images the run has seen by step `start`)."""
    path = os.path.join(out_dir, 'log.jsonl')
    rows = []
    if os.path.exists(path):
        with open(path) as file:
            lines = file.read().splitlines()
        whole_lines = [line for line in lines if line.endswith('}')]  # a kill can cut the last
        rows = [row for row in map(json.loads, whole_lines) if row['step'] <= start]
    text = ''.join(f'{json.dumps(row)}\n' for row in rows)
    write('--out_dir', path, lambda file: file.write(text.encode()))
    last = rows[-1] if rows else dict(step=0, images=0)
    seen = last['images'] + (start - last['step']) * batch_size  # batch_size may have changed since
    return open(path, 'a', buffering=1), seen


def keep_older(path, step, keep):
    """Give the checkpoint `path`, which is of `step`, a second name before a newer one replaces it,
    and remove all but the last keep - 1 files with such names."""
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


# ---------------------------------------------------------------- what is measured of the steps

class Meter:
    """What is measured of the steps since the last line of the log. All of it stays on the device,
    so that observing a step does not wait for it."""

    def __init__(self, device, unit=1.0):
        """unit: the z at which the noise level is 1, in which the bins of z are measured."""
        zero = torch.zeros((), device=device)
        self.edges = unit * torch.tensor(Z_BINS, device=device)       # (4,), between the bins
        self.sums = torch.zeros(len(Z_BINS) + 1, 2, device=device)    # a bin's losses, their count
        self.peak = zero       # the largest mean loss of a step
        self.peak_step = zero  # that step
        self.bad_step = zero   # the first step whose gradient was not finite; 0 where none was
        self.bad_z = None      # (b,), the z of the points of that step
        self.bad_loss = None   # (b,), their losses

    def observe(self, step, z, loss, norm):
        """Add a step of this rank: its z and losses, each (b,), and the norm () of its gradient."""
        losses_and_ones = torch.stack([loss, torch.ones_like(loss)], 1)
        self.sums.index_add_(0, torch.bucketize(z, self.edges), losses_and_ones)
        self.peak_step = torch.where(loss.mean() > self.peak, step, self.peak_step)
        self.peak = torch.maximum(loss.mean(), self.peak)
        # A condition on a tensor would wait for the device, so both cases are computed.
        first_bad = (self.bad_step == 0) & ~norm.isfinite()
        self.bad_step = torch.where(first_bad, step, self.bad_step)
        if self.bad_z is None:
            self.bad_z = z
            self.bad_loss = loss
        self.bad_z = torch.where(first_bad, z, self.bad_z)
        self.bad_loss = torch.where(first_bad, loss, self.bad_loss)


def stop_if_bad(meter, images_of, path, lr, bf16):
    """Raise BadInput at the first gradient that was not finite, with the images and z that made it.

    images_of(step): the numbers of the images of this rank's points in that step. path: of the
    run's checkpoint. lr and bf16: as the run has them, since both may mend it."""
    step = int(meter.bad_step)
    if not step:
        return
    images = images_of(step)
    points = (~meter.bad_loss.isfinite()).nonzero().flatten().tolist()
    culprits = 'none of the images'
    if points:
        culprits = 'images ' + ', '.join(
            f'{int(images[i])} at z = {float(meter.bad_z[i]):.4g}' for i in points[:8])
    if len(points) > 8:
        culprits += ' ...'
    saved = f'{path} holds an earlier step' if os.path.exists(path) else 'nothing was saved yet'
    mend = f'a lower --lr (it was {lr:g})'
    if bf16:
        mend += ', or --no-bf16'
    raise BadInput(f'step {step}: the gradient is not finite; loss not finite for {culprits}; '
                   f'stopped, {saved}; go on by the same command with {mend}')


def progress(meter, step, steps, images, img_per_s, batch_size, lr, device):
    """Print one line for people -> the dict that log.jsonl keeps.

    steps: of the whole run. images: how many were seen in all. img_per_s: since the last line."""
    total, count = meter.sums.sum(0).tolist()
    loss = total / count
    loss_by_z = [round(a / n, 5) if n else None for a, n in meter.sums.tolist()]
    peak = float(meter.peak)
    peak_step = int(meter.peak_step)
    memory = peak_memory(device)
    left = int((steps - step) * batch_size / img_per_s)  # seconds
    line = (f'step {step}/{steps}  loss {loss:.4f}  lr {lr:.1e}  {img_per_s:.0f} img/s  '
            f'{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left  ')
    if memory:
        line += f'{memory:.1f} GB  '
    line += 'loss by z ' + ' '.join('-' if a is None else f'{a:.3g}' for a in loss_by_z)
    if peak > 5 * loss:
        line += f'  spike {peak:.4g} at step {peak_step}'
    print(line, flush=True)
    return dict(step=step, images=images, loss=loss, lr=lr, img_per_s=img_per_s, memory_gb=memory,
                loss_by_z=loss_by_z, z_bins=meter.edges.tolist(), peak=peak, peak_step=peak_step)
