"""The likelihood of a data set under a trained flow, in bits/dim. Read it if you want to know what
--bpd of evaluate.py measures; the likelihood of one point is pfgm.log_likelihood().
"""
import dataclasses
from typing import NamedTuple

import torch

import pfgm
from support.cli import BadInput, watch
from support.flow import DIVERGED, following
from support.images import GREY_LEVEL, chosen_indices, part_of_rank
from support.processes import everywhere
from support.seeds import step_seed

BPD_TOL = 1e-5     # of --bpd, where --tol does not say
BIASED_TOL = 1e-4  # above it bits/dim come out too low


class SetLikelihood(NamedTuple):
    values: dict  # {name: number}, as of bits_per_dim()
    facts: dict   # what a line of results says of the flow and of the images
    note: str     # of what the values are


def likelihood(name, flow, reference, n, *, repeats, tol, machine):
    """The SetLikelihood of up to n images of the test split of a Reference, or of its training
    images where it has none, under a flow called `name`. Raises BadInput as bits_per_dim() does,
    and for a flow that starts from images."""
    if flow.source is not None:
        raise BadInput(f'--bpd: {name} starts from images, of no known density; leave it out')
    images = reference.train
    split = 'training'
    if reference.test is not None:
        images = reference.test
        split = 'test'
    values = bits_per_dim(flow, images, min(n, len(images)), repeats=repeats, tol=tol,
                          batch_size=machine.batch_size, device=machine.device, rank=machine.rank,
                          world=machine.world)
    labels = labels_for(flow, images)
    facts = dataclasses.replace(flow, solver='rk45', tol=tol, to_data=False, z_last=None).facts()
    facts.update(classes=[] if labels is None else labels.unique().tolist(), guidance=None)
    facts.update(reference.facts(), dataset=images.name, split=split)
    note = f'{split} images of {images.name}{reference.classes}, tol {tol:g}'
    if tol > BIASED_TOL:
        note += f', biased above {BIASED_TOL:g}'
    levels = values['round_trip_max'] / GREY_LEVEL
    if levels > 1:
        note += f'; an image comes back {levels:.1f} grey levels off, '
        note += 'so the flow was not followed exactly'
        if tol > BPD_TOL:
            note += f': give --tol {BPD_TOL:g}'
    return SetLikelihood(values, facts, note)


def bits_per_dim(flow, images, n, *, repeats, tol, batch_size, device, rank=0, world=1):
    """Bits/dim of n images x = (pixel + U[0, 1)) / 256 * 2 - 1, and how far from x
    the flow comes back down from their latents: {name: number}.

    The noise of an image depends on the flow's seed, its index and the repeat, the probe of the
    divergence on the batch that it is in too. Raises BadInput where RK45 cannot go on at `tol`."""
    labels = labels_for(flow, images)
    indices = part_of_rank(chosen_indices(n, len(images)), rank, world)
    rows = []
    for index in watch(indices.split(batch_size), len(indices), 'bits/dim', rank):
        pixels = images[index.tolist()].cpu()
        label = None if labels is None else labels[index].to(device)
        columns = []
        for repeat in range(repeats):
            seeds = [step_seed(flow.seed, i + repeat * 2 ** 32) for i in index.tolist()]
            draws = [torch.Generator().manual_seed(seed) for seed in seeds]
            noise = torch.stack([torch.rand(pixels.shape[1:], generator=generator,
                                            dtype=torch.float64) for generator in draws])
            x = (pixels + noise) / 128 - 1                           # (b, C, H, W), float64
            if not isinstance(flow.net, pfgm.ExactField):
                x = x.float()
            columns.append(up_and_back(flow, x.to(device), label, tol, draws[0]))
        rows.append(torch.stack(columns, 1))                         # (b, repeats, 4)
    bpd, error, largest, calls = torch.cat(everywhere(torch.cat(rows))).unbind(2)
    each = bpd.mean(1)  # the repeats of an image are no further images
    return dict(bpd=each.mean().item(), bpd_se=(each.std() / n ** 0.5).item() if n > 1 else None,
                n=n, repeats=repeats, nfe=calls.mean().item(),
                round_trip_mean=error.mean().item(), round_trip_max=largest.max().item())


def up_and_back(flow, x, labels, tol, generator):
    """Follow x (b, C, H, W) up to the prior and back down: float64 (b, 4), on the CPU, of each its
    bits/dim, the mean and the largest error of what comes back, and the network calls on the way
    up. generator: of the divergence's probe."""
    options = dict(gamma=flow.gamma, z_exp=flow.z_exp, small_z=flow.small_z, rtol=tol, atol=tol,
                   labels=labels)
    try:
        with following(flow.z_min, flow.z_max) as noted:
            up = pfgm.log_likelihood(flow.net, x, flow.z_min, flow.z_max, D=flow.D,
                                     generator=generator, callback=noted, **options)
        with torch.no_grad(), following(flow.z_max, flow.z_min) as noted:
            back, _ = pfgm.sample_ode(flow.net, up.latent, flow.z_max, flow.z_min, 'rk45',
                                      callback=noted, **options)
    except pfgm.SolverError as error:
        mend = DIVERGED if 'NaN' in str(error) else f'try --tol {10 * tol:g}'
        raise BadInput(f'--bpd: {error}; {mend}') from error
    error = (back - x).abs().flatten(1).cpu().double()
    calls = torch.full((len(x),), float(up.nfe), dtype=torch.float64)
    return torch.stack([up.bpd.cpu(), error.mean(1), error.amax(1), calls], 1)


def labels_for(flow, images):
    """The labels of the images, for a network that was trained with labels; else None. BadInput
    where it does not know them."""
    if not flow.classes or images.labels is None:
        return None
    if flow.class_names and images.classes and flow.class_names != images.classes:
        raise BadInput(f'{images.given}: its classes are {", ".join(images.classes)}, those of '
                       f'the network {", ".join(flow.class_names)}; leave them out with '
                       '--classes none')
    low = int(images.labels.min())
    high = int(images.labels.max())
    if low < 0 or high >= flow.class_count:
        raise BadInput(f'--dataset {images.name}: labels from {low} to {high}; the network knows '
                       f'0 to {flow.class_count - 1}; leave the labels out with --classes none')
    return images.labels
