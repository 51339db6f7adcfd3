"""Networks that learn from a trained one, for few network calls: reflow, distillation, consistency.
You need not read it to understand PFGM.

Reflow and distillation train on pairs, of noise and of the image that the teacher makes of it.
"""
import math
import os

import numpy as np
import torch

import pfgm
from support.cli import BadInput, given_by, watch, write
from support.processes import wait
from support.seeds import fingerprint

SHARD = 1000   # pairs a file
PAIR_NFE = 40  # calls of the teacher for each, by unipc


# ---------------------------------------------------------------- consistency training

def at_lower_level(flow, clean, moved, z, labels, stage):
    """The target image of consistency training: what the network itself makes of the same noise at
    a lower level. arXiv 2406.14548 Section 3, for any D.

    clean, moved (B, C, S, S), z (B,), labels () or ((B,),), stage 1, 2, ... -> (image like clean,
    share (B,)). The lower level is z times share = 1 - (1 + 8 sigmoid(-sigma)) / 2^stage. The
    network is stopped (no gradient) and without dropout. Where share is 0 it is the image itself.
    """
    share = (1 - (1 + 8 * torch.sigmoid(-z / flow.unit)) / 2 ** stage).clamp_min(0)
    lower = clean + pfgm.column(share, clean) * (moved - clean)
    flow.eval()
    with torch.no_grad():
        v_x, _ = flow(lower, (share * z).clamp_min(1e-3 * flow.low * flow.unit), *labels)
    flow.train()
    return torch.where(pfgm.column(share, clean) > 0, lower + v_x, clean), share


# ---------------------------------------------------------------- reflow and distillation

def method_of_student(teacher, reflow, distill):
    """The method that --reflow or --distill trains, from the mapping of flags of its teacher.

    It is the teacher's, with two exceptions. A PFGM teacher gives a denoiser with D = 1, and
    --distill of VP, sub-VP or DDPM gives a rectified flow: far from the data neither the field nor
    eps tells well where one large step leads. Raises BadInput for a teacher that is itself a
    student of one call."""
    flag = f'--reflow {reflow}' if reflow else f'--distill {distill}'
    if teacher.get('distill') not in (None, distill) or teacher.get('consistency'):
        raise BadInput(f'{flag}: itself a student of one call; give its teacher')
    goes_on = teacher.get('distill')  # a run of a student that is resumed stays what it is
    if distill and not goes_on and teacher['method'] in ('vp', 'subvp', 'ddpm'):
        return 'rf'
    return 'pfgmpp' if teacher['method'] == 'pfgm' else teacher['method']


def read_shard(path, shape):
    """The memory map of a file of pairs; None where it is absent, cut short or of another shape."""
    try:
        shard = np.load(path, mmap_mode='r', allow_pickle=False)
    except (OSError, ValueError):
        return None
    if shard.shape != shape or shard.dtype != np.float32:
        return None
    return shard


def make_pairs(teacher, indices, batch_size, device):
    """The pairs `indices` of a teacher, a Flow: float32 (n, 2, C, S, S) on the CPU."""
    pairs = []
    for first in range(0, len(indices), batch_size):
        batch = indices[first:first + batch_size]
        x = teacher.prior(batch)
        y, _ = teacher.follow(x, device, batch)
        y = y.float().cpu()
        pairs.append(torch.stack([(x - y) / teacher.z_max, y], 1))
    return torch.cat(pairs)


def pairs_of_teacher(teacher, count, folder, flag, batch_size, device, rank, world):
    """The pairs that a student of `teacher`, a Flow, is trained on: `count` draws x of its prior
    and the images y where it leads them, kept in `folder`. arXiv 2209.03003 Section 2.2.

    -> a data set of float32 (2, C, S, S): eps = (x - y) / z_max, and y, so that the line between
    them is y + z eps. Each rank makes its share of the files, and files that this network has made
    before are kept. flag: what named the teacher. Raises BadInput where it cannot be followed."""
    made_by = f'{fingerprint(teacher.net.state_dict().values(), teacher.seed):08x}'
    if teacher.guidance != 1:
        made_by += f'-guidance{teacher.guidance:g}'
    shards = [range(count)[first:first + SHARD] for first in range(0, count, SHARD)]
    paths = [os.path.join(folder, f'{made_by}-{k:05d}.npy') for k in range(len(shards))]
    shapes = [(len(shard), 2, *teacher.shape) for shard in shards]

    mine = range(rank, len(shards), world)
    missing = [k for k in mine if read_shard(paths[k], shapes[k]) is None]
    todo = [shards[k] for k in missing]
    pairs_missing = sum(len(shard) for shard in todo)
    # watch() comes first in zip(): it says its last line when it is asked for one more.
    for shard, k in zip(watch(todo, pairs_missing, 'pairs', rank), missing):
        os.makedirs(folder, exist_ok=True)
        with given_by(flag):
            pairs = make_pairs(teacher, shard, batch_size, device).numpy()
        write('--out_dir', paths[k], lambda file: np.save(file, pairs))
    wait()
    made = [read_shard(path, shape) for path, shape in zip(paths, shapes)]
    if any(shard is None for shard in made):
        given = os.path.dirname(folder)
        raise BadInput(f'--out_dir {given}: every process must see the same folder')
    return torch.utils.data.ConcatDataset(made)


STRAIGHTNESS_CALLS = 200  # with 50 steps of Euler it comes out up to 13 % too low


@torch.no_grad()
def straightness(flow, n, batch_size, device):
    """How bent the lines of a method with a time are, a float: 0 where they are straight, of n
    lines of a Flow. arXiv 2209.03003 Section 2.2.

    It is E int |(x_1 - x_0) - dx_t/dt|^2 dt / E |x_1 - x_0|^2, a ratio of means, along the lines
    from the prior down to the lowest plane that the network knows."""
    bends = []
    lengths = []
    for indices in torch.arange(n).split(batch_size):
        indices = indices.tolist()
        x = flow.prior(indices).to(device)
        bend, length = bends_of_lines(flow.net, x, flow.labels_of(indices, device),
                                      STRAIGHTNESS_CALLS)
        bends.append(bend)
        lengths.append(length)
    return (torch.cat(bends).mean() / torch.cat(lengths).mean()).item()


@torch.no_grad()
def bends_of_lines(net, x, labels, calls):
    """(int |(x_1 - x_0) - dx_t/dt|^2 dt, |x_1 - x_0|^2), both (B,), along the lines from x (B, ...)
    on the plane net.high down to net.low, by steps of Heun even in the method's own time t, with
    so many calls of the network. labels: (B,), or None."""
    high = torch.full((len(x),), net.high, dtype=torch.float64)
    path = [pfgm.column(net.alpha(high), x) * x]

    def keep(z, x):
        path.append(pfgm.column(net.alpha(z), x) * x)

    pfgm.sample_ode(net, x, net.high, net.low, 'heun', calls, D=math.inf, z_exp=0, labels=labels,
                    schedule_name=net.planes, callback=keep)
    path = torch.stack(path).flatten(2)                              # (steps + 1, B, N)
    steps = path.diff(dim=0)
    whole = path[-1] - path[0]
    bends = (whole - len(steps) * steps).square().sum(2).mean(0)
    return bends, whole.square().sum(1)
