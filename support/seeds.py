"""Numbers that tell one step, image or network from another: seeds, fingerprints, and the states of
random generators. You need not read it to understand the method.
"""
import zlib

import numpy as np
import torch


def step_seed(seed, step):
    """The seed of (seed, step), or of (seed, index of an image): a number below 2^32 that has
    nothing in common with those of its neighbours."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])


def fingerprint(tensors, start=0):
    """A number below 2^32 that tells these tensors from others, their CRC-32. start: the
    fingerprint of tensors that came before."""
    for tensor in tensors:
        start = zlib.crc32(tensor.detach().cpu().contiguous().numpy(), start)
    return start


def rng_state(device):
    """The states of the generators that dropout draws from: the CPU's and, if there is one, the
    GPU's."""
    states = [torch.get_rng_state()]
    if device.type == 'cuda' or device.type == 'mps' and torch.backends.mps.is_built():
        states.append(torch.get_device_module(device).get_rng_state())
    return states
