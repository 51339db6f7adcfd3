"""The folder of a training run: the checkpoint it goes on from, its log, and what is measured of
its steps. You need not read it to understand the method.
"""
import glob
import json
import os
import shlex
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Optional

import torch

from support.checkpoint import read_checkpoint, save
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
    """Where training starts from; all None or False where it starts afresh."""
    saved: Optional[dict] = None    # a checkpoint: net, ema, step, args, and opt where it is kept
    flag: Optional[str] = None      # what gave it: out_dir (a run to go on), reflow, distill,
                                    # init_from
    path: Optional[str] = None      # of the checkpoint
    lacks_optimizer: bool = False   # whether the file of --init_from has no optimizer state

    @property
    def resumed(self):
        return self.flag == 'out_dir'

    @property
    def given(self):
        """With which words messages about it begin."""
        return f'--{self.flag} {os.path.dirname(self.path) if self.resumed else self.path}'


def open_run(out_dir, *, reflow=None, distill=None, init_from=None, consistency=False):
    """The Origin of a run: the checkpoint in out_dir, else the one that a flag names, else none.

    Where the newest checkpoint in out_dir is damaged, a line says so and the one before it is used.
    Raises BadInput for a folder that holds something else than a run."""
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
        return Origin(saved, 'out_dir', newest)

    check_is_run(out_dir)
    for flag, path in dict(reflow=reflow, distill=distill, init_from=init_from).items():
        if not path:
            continue
        saved = read_given(flag, path)
        lacks_optimizer = 'opt' not in saved
        if flag != 'init_from' or consistency or lacks_optimizer:
            saved = dict(net=saved['net'], ema=saved['ema'], step=0, args=saved['args'])
        if flag != 'init_from' or consistency:  # students start from the average, at step 0
            saved['net'] = {name: tensor.clone() for name, tensor in saved['ema'].items()}
        return Origin(saved, flag, path, lacks_optimizer)
    return Origin()


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


def read_given(flag, path):
    """The checkpoint, as read_checkpoint() reads it, that `flag` gave to go on from, with its net:
    a copy of the average where the file is that alone, as a pruned one and a snapshot of EDM are.

    Raises BadInput where the file is damaged, or a run cannot go on from it."""
    with given_by(f'--{flag}'):
        saved = read_checkpoint(path, whole=True)
    if flag == 'out_dir' and not {'net', 'opt'} <= saved.keys():
        raise BadInput(f'--out_dir {os.path.dirname(path)}: {path} holds the EMA only; '
                       f'give another --out_dir, with --init_from {path} to go on from it')
    saved.setdefault('net', {name: tensor.clone() for name, tensor in saved['ema'].items()})
    return saved


def check_data(origin, images, source, given):
    """Raise BadInput unless the images are those that the run to go on with, or the teacher, was
    trained on, and the source those that it starts from: known data sets of the same names or,
    wherever they are now, as many with the same pixels and labels. Where a known set is drawn or
    decoded otherwise here than there, as by other versions of Pillow, a line says so.

    images, source: Images; no source means noise. given: {name: words} of the flags that were
    typed."""
    if origin.saved is None or origin.flag == 'init_from':
        return
    old = origin.saved['args']
    trained_on = old.get('dataset')
    if trained_on is None:  # a file of other authors, which does not say
        if origin.resumed:
            raise BadInput(f'{origin.given}: {origin.path} is a file of other authors, not a run; '
                           f'give another --out_dir, with --init_from {origin.path}')
        return
    shape = (old['channels'], old['image_size'], old['image_size'])
    difference = images.difference(old['data'], shape, old['classes'] > 0, old['class_names'])
    check_set('dataset', images, trained_on, difference, origin, given)
    old_source = old['source']
    if source is not None and old_source:
        difference = source.difference(old['source_data'], shape, False, None)
        check_set('source', source, old_source, difference, origin, given)
    elif source is not None:
        refuse_data('source', source.name, 'noise', origin, given)
    elif old_source:
        refuse_data('source', 'noise', old_source, origin, given)


def check_set(name, images, there, difference, origin, given):
    """Raise BadInput unless the images that the flag `name` gave are those that were called `there`
    when `origin` was trained. difference: in words, of the images, see Images.difference()."""
    if images.is_known_set or there in SETS:
        if images.name != there:
            refuse_data(name, images.name, there, origin, given)
        elif difference:
            say(f'{images.given}: not as it was there: {difference}')
    elif difference:
        refuse_data(name, images.name, there, origin, given, f' ({difference})')


def refuse_data(name, here, there, origin, given, reason=''):
    """Raise BadInput for a data set that is not the one of `origin`. name: of the flag, dataset or
    source. here and there: what the flag says here, and said when that was trained. reason: the
    last words."""
    preposition = 'on' if name == 'dataset' else 'from'
    keep = f'give --{name} {there}'
    if there == 'noise':
        keep = 'leave it out'
    if origin.resumed:
        story = f'{origin.given} holds a run {preposition} {there}'
        mend = (f'give another --out_dir, with --init_from {origin.path} to go on from its network')
        if name not in given:
            mend = f'{keep}, or {mend}'
    else:
        story = f'{origin.given} was trained {preposition} {there}'
        mend = keep
    if name in given:
        raise BadInput(f'{given[name]}: {story}; {mend}{reason}')
    raise BadInput(f'{story}, not {preposition} {here}; {mend}{reason}')


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


def sampling_command(path, flags):
    """The command that people want after training: samples of the checkpoint `path` in seconds.
    flags: those it was trained with. A student makes the calls that it was trained for."""
    command = 'python sample.py'
    if path != os.path.join('out', 'ckpt.pt'):
        command += f' --ckpt {shlex.quote(path)}'
    if not (flags['distill'] or flags['consistency']):
        command += ' --nfe 20'
    return command


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


def copied(value):
    """A copy of what a checkpoint holds, with all tensors in main memory, also those in dicts,
    lists and tuples. Those of a GPU go to pinned memory, and have not arrived yet: the GPU copies
    them after all that it was given before, and nobody waits for it."""
    if isinstance(value, dict):
        return {key: copied(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copied(part) for part in value)
    if not isinstance(value, torch.Tensor):
        return value
    place = torch.empty_like(value, device='cpu', pin_memory=value.is_cuda)
    return place.copy_(value, non_blocking=value.is_cuda)


class Saver:
    """Writes the checkpoints of a run in a thread, while training goes on.

    save() has the state copied before later steps change it. The thread waits until the copy is
    there, and writes it. A checkpoint is written when the one before it is on the disk."""

    def __init__(self, path, step, keep, device):
        """path: of ckpt.pt, which is of `step` if it is there. keep: of keep_older(). device: where
        the state is."""
        self.path = path
        self.step = step
        self.keep = keep
        self.device = device
        self.thread = ThreadPoolExecutor(1)
        self.writing = None  # the future of the checkpoint that is being written
        AT_THE_END.callback(self.thread.shutdown)  # however the run ends, it ends writing

    def save(self, checkpoint):
        """Begin to write this checkpoint, a dict. Raises BadInput where the last one could not be
        written."""
        self.wait()
        self.writing = self.thread.submit(self.write, copied(checkpoint))

    def write(self, checkpoint):
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)  # this thread waits, and training goes on
        keep_older(self.path, self.step, self.keep)
        save(self.path, checkpoint)
        self.step = checkpoint['step']

    def check(self):
        """Raises BadInput where a checkpoint could not be written; does not wait."""
        if self.writing is not None and self.writing.done():
            self.wait()

    def wait(self):
        """Wait until the last checkpoint is on the disk. Raises BadInput where it cannot be
        written."""
        if self.writing is not None:
            writing = self.writing
            self.writing = None
            writing.result()


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
