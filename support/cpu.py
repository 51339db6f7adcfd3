"""What makes training on CPUs faster, with the same results. You need not read it to understand the
method.
"""
import ctypes
import functools
import sys

import torch.nn.functional as F
import torch.nn as nn
import numpy as np
import torch


# ---------------------------------------------------------------- what only CPUs need

def speed_up(net):
    """net, its group norms, dropouts and attention replaced in place by those below; freed memory
    is kept."""
    keep_freed_memory()
    faster = {nn.GroupNorm: GroupNorm, nn.Dropout: Dropout}
    for layer in net.modules():
        layer.__class__ = faster.get(type(layer), type(layer))
        if hasattr(layer, 'attend'):
            layer.attend = attend
    return net


def attend(q, k, v):
    """Attention (B, 1, L, c). On a CPU PyTorch's own has a slow gradient, most so in bfloat16."""
    short = q.shape[2] <= (256 if q.dtype == torch.bfloat16 else 64)  # longer: no faster
    if q.device.type == 'cpu' and q.requires_grad and short:
        return (q @ k.mT * q.shape[3] ** -0.5).softmax(3).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


class GroupNorm(nn.GroupNorm):
    """On a CPU PyTorch's kernel is slow where the channels are last, which is what the convolutions
    want: backward always, and forward on small images in small groups. Two copies cost less."""

    def forward(self, x):
        fast = x.shape[2] * x.shape[3] >= 1024 or x.shape[1] >= 16 * self.num_groups
        if x.device.type != 'cpu' or fast and not torch.is_grad_enabled():
            return super().forward(x)
        last = functools.partial(torch.Tensor.contiguous, memory_format=torch.channels_last)
        x = x.contiguous()
        if x.requires_grad and not torch.compiler.is_compiling():
            x.register_hook(last)  # a sum of gradients of different strides is slow
        return last(super().forward(x))


class Dropout(nn.Dropout):
    """On a CPU, where PyTorch's draws and comparisons are slow, from 16 bits an element of a
    generator seeded by PyTorch's."""

    def forward(self, h):
        p = self.p
        if (not self.training or h.device.type != 'cpu' or not 2 ** -16 < p < 1 - 2 ** -16
                or torch.compiler.is_compiling()):
            return super().forward(h)
        draw = np.random.SFC64(int(torch.randint(2 ** 62, ()))).random_raw
        bits = torch.from_numpy(draw((h.numel() + 3) // 4).view(np.int16))[:h.numel()]
        low = round(p * 2 ** 16) - 2 ** 15 - 1
        keep = bits.clamp_(low, low + 1).sub_(low).as_strided(h.shape, h.stride())  # 0 or 1
        return h * (keep.to(h.dtype) * (1 / (1 - p)))


def keep_freed_memory():
    """Where the C library is glibc, have it keep freed tensors of up to 32 MB. It would return
    them, and a twentieth of a CIFAR-10 step on CPUs would be the page faults of the next ones."""
    if sys.platform == 'linux' and hasattr(library := ctypes.CDLL(None), 'mallopt'):
        library.mallopt(-3, 32 << 20)     # M_MMAP_THRESHOLD, at most 32 MB
        library.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD
