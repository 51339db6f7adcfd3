"""What makes a network faster on CPUs: other ways to compute three of its layers, and a setting of
the C library. You need not read it to understand the method.

The layers keep their parameters and their meaning, and on GPUs they are PyTorch's own. Group norm
and attention give the same numbers but for rounding; dropout draws from another generator.
"""
import ctypes
import sys

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import unet


def speed_up(net):
    """Change the layers of `net` that have a faster version below into it -> the same net.

    Only the class of a layer changes. Its parameters, their names in a checkpoint and its mode stay
    what they are, and nothing is drawn at random. The whole process keeps its freed memory."""
    keep_freed_memory()
    for layer in net.modules():
        layer.__class__ = FASTER.get(type(layer), type(layer))
    return net


class GroupNorm(unet.GroupNorm):
    """Group norm on channels-first copies, where those are faster.

    The convolutions want the channels last (contiguous over the channels of a pixel). On a CPU
    PyTorch's kernel of group norm is slow in that order: always backward, and forward where images
    and groups are small. There two copies, to channels first and back, cost less."""

    def forward(self, x):
        pixels = x.shape[2] * x.shape[3]
        forward_is_fast = pixels >= 1024 or x.shape[1] >= 16 * self.num_groups
        if x.device.type != 'cpu' or forward_is_fast and not torch.is_grad_enabled():
            return super().forward(x)
        x = x.contiguous()
        if x.requires_grad and not torch.compiler.is_compiling():
            # The gradient of x has its channels first, too. It is copied back at once, before it is
            # added to others, since a sum of gradients with different strides is slow.
            x.register_hook(channels_last)
        return channels_last(super().forward(x))


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


class Dropout(nn.Dropout):
    """Dropout that takes 16 random bits of NumPy for each element.

    On a CPU PyTorch's draws and comparisons are slow. A new generator of NumPy's is seeded by
    PyTorch's, whose state, which checkpoints keep, still decides everything. p is rounded to a
    multiple of 2^-16."""

    def forward(self, h):
        p_fits = 2 ** -16 < self.p < 1 - 2 ** -16
        if not (self.training and h.device.type == 'cpu' and p_fits):
            return super().forward(h)
        if torch.compiler.is_compiling():  # which would stop at NumPy
            return super().forward(h)
        generator = np.random.SFC64(int(torch.randint(2 ** 62, ())))
        words = generator.random_raw((h.numel() + 3) // 4)  # of 64 bits
        bits = torch.from_numpy(words.view(np.int16))[:h.numel()]  # -2^15 ... 2^15 - 1
        # An element is kept where its bits are above `last_dropped`. Clamped to that number and the
        # next, less that number, they are 0 or 1, in less time than by a comparison.
        last_dropped = round(self.p * 2 ** 16) - 2 ** 15 - 1
        kept = bits.clamp_(last_dropped, last_dropped + 1).sub_(last_dropped)
        kept = kept.as_strided(h.shape, h.stride())  # in the order in which h lies in memory
        return h * (kept.to(h.dtype) * (1 / (1 - self.p)))


class Attention(unet.Attention):
    """Attention written out where it is trained on few pixels. There PyTorch's own has a slow
    gradient on a CPU, most so in bfloat16."""

    @staticmethod
    def attend(q, k, v):
        """q, k, v (B, 1, L, c) -> like v."""
        L = q.shape[2]
        limit = 256 if q.dtype == torch.bfloat16 else 64  # of more pixels it is no faster
        if q.device.type == 'cpu' and q.requires_grad and L <= limit:
            weights = (q @ k.mT * q.shape[3] ** -0.5).softmax(3)
            return weights.to(v.dtype) @ v
        return F.scaled_dot_product_attention(q, k, v)


FASTER = {unet.GroupNorm: GroupNorm, nn.Dropout: Dropout, unet.Attention: Attention}


def keep_freed_memory():
    """Let the C library keep freed tensors of up to 32 MB for the next ones, where it is glibc.

    Otherwise it returns them to the system, and a twentieth of a CIFAR-10 step on CPUs are the page
    faults of getting them back."""
    if sys.platform != 'linux':
        return
    library = ctypes.CDLL(None)
    if not hasattr(library, 'mallopt'):  # another C library, such as musl
        return
    M_TRIM_THRESHOLD = -1
    M_MMAP_THRESHOLD = -3
    library.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # glibc takes no more
    library.mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)
