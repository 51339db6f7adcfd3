"""What only CPUs need to be fast: speed_up(net) puts it into a network, whose parameters and files
stay what they are; on other devices its layers are PyTorch's own.
"""
import ctypes
import sys

import numpy as np
import torch
import torch.nn as nn


def speed_up(net):
    """net, its group norms and dropouts replaced in place by those below; freed memory is kept."""
    keep_freed_memory()
    faster = {nn.GroupNorm: GroupNorm, nn.Dropout: Dropout}
    for layer in net.modules():
        layer.__class__ = faster.get(type(layer), type(layer))
    return net


class NormLast(torch.autograd.Function):
    """Group norm whose gradient stays channels last, as x is, in four sweeps of it. With
    x^ = (x - mean) rstd and y = w x^ + b, averages over a group:
    dx = rstd (w dy - <w dy> - x^ <w dy x^>)."""

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):
        B, C, H, W = x.shape
        y, *moments = torch.native_group_norm(x, weight, bias, B, C, H * W, groups, eps)
        ctx.save_for_backward(x, weight, *moments)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, mean, rstd = ctx.saved_tensors                             # moments (B, G)
        mean, rstd, w = mean[..., None], rstd[..., None], weight.view(mean.shape[1], -1)
        db, ds = (a.sum((2, 3)).to(w.dtype).view(len(x), *w.shape) for a in (dy, dy * x))
        dw = (ds - mean * db) * rstd                                          # (B, G, C/G)
        n = w.shape[1] * x.shape[2] * x.shape[3]
        p, q = ((w * a).sum(2, keepdim=True) / n for a in (db, dw))           # <w dy>, <w dy x^>
        of_x, rest, of_dy = (a.expand_as(db).reshape(*x.shape[:2], 1, 1).to(x.dtype) for a in
                             (-rstd * rstd * q, rstd * (rstd * mean * q - p), rstd * w))
        dx = torch.addcmul(rest, x, of_x).addcmul_(dy, of_dy)
        return dx, dw.sum(0).flatten(), db.sum(0).flatten(), None, None


class GroupNorm(nn.GroupNorm):
    """On a CPU PyTorch's kernel is slow where the channels are last, which is what the
    convolutions want: backward (hence NormLast), and forward on small images in small groups, where
    two copies are cheaper."""

    def forward(self, x):
        fast = x.shape[2] * x.shape[3] >= 1024 or x.shape[1] >= 16 * self.num_groups
        if x.device.type != 'cpu' or fast and not torch.is_grad_enabled():
            return super().forward(x)
        if fast:
            return NormLast.apply(x, self.weight, self.bias, self.num_groups, self.eps)
        return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)


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
