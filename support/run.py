"""The folder of a training run: its checkpoint to go on from, its log, and what is known of its steps.
You need not read it to understand the method.
"""
import glob
import json
import os
import shutil
import sys
from typing import NamedTuple, Optional

import torch

from support.checkpoint import read_checkpoint
from support.cli import BadInput, given_by, write
from support.processes import AT_THE_END, peak_memory
from support.sets import SETS

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

Z_BINS = (0.01, 0.1, 1.0, 10.0)  # the loss is also logged by z, split here


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


def stop_if_bad(meter, images_of, path, lr, bf16):
    """End the run at the first gradient that was not finite, with the images and z that made it.

    images_of(step): the numbers of the images of this rank's points in that step. path: of the
    run's checkpoint."""
    step = int(meter['bad'])
    if not step:
        return
    images = images_of(step)
    wrong = (~meter['bad_loss'].isfinite()).nonzero().flatten().tolist()
    if wrong:
        made = 'images ' + ', '.join(f'{int(images[i])} at z = {float(meter["bad_z"][i]):.4g}'
                                     for i in wrong[:8])
        if len(wrong) > 8:
            made += ' ...'
    else:
        made = 'none of the images'
    saved = f'{path} holds an earlier step' if os.path.exists(path) else 'nothing was saved yet'
    mend = f'a lower --lr (it was {lr:g})'
    if bf16:
        mend += ', or --no-bf16'
    raise BadInput(f'step {step}: the gradient is not finite; loss not finite for {made}; '
                   f'stopped, {saved}; go on by the same command with {mend}')


def progress(meter, step, steps, images, img_per_s, batch_size, lr, device):
    """Print one line for people, and return the dict that log.jsonl keeps.

    steps: of the whole run; images: seen in all; img_per_s: since the last line."""
    total, count = meter['sums'].sum(0).tolist()
    loss = total / count
    peak = float(meter['peak'])
    peak_step = int(meter['peak_step'])
    memory = peak_memory(device)
    left = int((steps - step) * batch_size / img_per_s)
    by_z = [round(a / n, 5) if n else None for a, n in meter['sums'].tolist()]
    line = (f'step {step}/{steps}  loss {loss:.4f}  lr {lr:.1e}  {img_per_s:.0f} img/s  '
            f'{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left  ')
    if memory:
        line += f'{memory:.1f} GB  '
    line += 'loss by z ' + ' '.join('-' if v is None else f'{v:.3g}' for v in by_z)
    if peak > 5 * loss:
        line += f'  spike {peak:.4g} at step {peak_step}'
    print(line, flush=True)
    return dict(step=step, images=images, loss=loss, lr=lr, img_per_s=img_per_s, memory_gb=memory,
                loss_by_z=by_z, z_bins=meter['edges'].tolist(), peak=peak, peak_step=peak_step)


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


def open_log(out_dir, start, batch_size):
    """log.jsonl, to append to, without the lines of steps that are about to be made again; and the
    number of images that its run has seen at step `start`."""
    path = os.path.join(out_dir, 'log.jsonl')
    lines = open(path).read().splitlines() if os.path.exists(path) else []
    rows = [row for row in (json.loads(line) for line in lines if line.endswith('}'))
            if row['step'] <= start]
    kept = ''.join(f'{json.dumps(row)}\n' for row in rows)
    write('--out_dir', path, lambda file: file.write(kept.encode()))
    last = rows[-1] if rows else dict(step=0, images=0)  # --batch_size may have changed since
    seen = last['images'] + (start - last['step']) * batch_size
    return open(path, 'a', buffering=1), seen


def restore_optimizer(opt, saved, device, rank):
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


def read_given(flag, path, taught=False):
    """read_checkpoint() of the whole file that `flag` gave, to go on from it; what is `taught` by
    it starts from its EMA, at step 0."""
    with given_by(f'--{flag}'):
        saved = read_checkpoint(path, whole=True)
    if taught:
        saved = dict(ema=saved['ema'], step=0, args=saved['args'])
    if taught or saved['args']['edm']:  # of which a snapshot is the EMA alone
        saved.setdefault('net', {k: v.clone() for k, v in saved['ema'].items()})
    elif not {'net', 'opt'} <= saved.keys():
        raise BadInput(f'--{flag} {path}: holds the EMA only; training needs the whole checkpoint')
    return saved


def check_data(dataset, identity, class_names, old, where, mend):
    """BadInput unless `dataset` has the images that a run was made with: as many, of the same names
    and labels. old: the flags of that run."""
    if dataset in SETS or old.get('dataset') in SETS:
        if dataset == old.get('dataset'):
            return
        differ = ''
    else:
        then = old.get('data') or [0]
        told = 3 if old.get('classes') else 2  # the third is of the labels
        if then[:told] == identity[:told]:
            return
        differ = ' (other names of the images, or other labels)'
        if then[0] != identity[0]:
            differ = f' ({then[0]} images there, {identity[0]} here)'
        names = old.get('class_names')
        if names and class_names and names != class_names:
            differ = (f' (classes {", ".join(names)} there, '
                      f'{", ".join(class_names)} here)')
    raise BadInput(f'--dataset {dataset}: {where} on {old.get("dataset")}; {mend}{differ}')


class Origin(NamedTuple):
    """Where training starts from."""
    saved: Optional[dict]  # a checkpoint: net, ema, step, args, and opt where it is there; or None
    flag: Optional[str]    # which flag gave it: out_dir (it is resumed), reflow, distill, init_from
    path: Optional[str]    # of the checkpoint

    @property
    def resumed(self):
        return self.flag == 'out_dir'


def open_run(out_dir, dataset, identity, class_names, *, reflow=None, distill=None, init_from=None,
             consistency=False):
    """The Origin of a run: the checkpoint in out_dir, else the one that a flag names, else none.

    dataset, identity, class_names: of the images. Where the newest checkpoint is damaged, that is
    said and the one before it is used. Raises BadInput for a folder that is no run, and where the
    images are others."""
    newest = os.path.join(out_dir, 'ckpt.pt')
    older = sorted(glob.glob(os.path.join(glob.escape(out_dir), 'ckpt-*.pt')), reverse=True)
    paths = [path for path in (newest, *older) if os.path.exists(path)]
    for path, following in zip(paths, [*paths[1:], None]):
        try:
            saved = read_given('out_dir', path)
        except BadInput as error:
            if following is None:
                raise
            print(f'{error}; going back to {following}', file=sys.stderr)
            continue
        check_data(dataset, identity, class_names, saved['args'],
                   f'--out_dir {out_dir} holds a run', 'give another --out_dir, with --init_from '
                   f'{path} to go on from its network')
        return Origin(saved, 'out_dir', newest)
    check_is_run(out_dir)
    flags = dict(reflow=reflow, distill=distill, init_from=init_from)
    flag = next((name for name, path in flags.items() if path), None)
    if flag is None:
        return Origin(None, None, None)
    path = flags[flag]
    has_teacher = flag != 'init_from'
    saved = read_given(flag, path, taught=has_teacher or consistency)
    if has_teacher and 'dataset' in saved['args']:  # the authors' files do not say
        check_data(dataset, identity, class_names, saved['args'], f'--{flag} {path} was trained',
                   f'give --dataset {saved["args"]["dataset"]}')
    return Origin(saved, flag, path)


def check_is_run(out_dir):
    """BadInput for a folder that holds other things than a run, or than folders of runs."""
    if not os.path.isdir(out_dir):
        return

    def holds_runs(name):
        inside = glob.escape(os.path.join(out_dir, name))
        return any(glob.glob(f'{inside}{deep}/log.jsonl') for deep in ('', '/*', '/*/*'))

    names = [name for name in os.listdir(out_dir) if not holds_runs(name)]
    if names and 'log.jsonl' not in names:  # a run killed before its first checkpoint left a log
        raise BadInput(f'--out_dir {out_dir}: not empty, and not a run of train.py; '
                       'give another --out_dir')
