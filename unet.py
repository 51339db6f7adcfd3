"""The DDPM++ U-Net that learns the Poisson field. It stands alone.

    net = UNet(image_size=32, channels=3)         # 61.8 M parameters, as published for CIFAR-10
    v_x, v_z = net(x, z)                          # x (B, C, H, W), z (B,) -> like x, (B,)

The architecture is DDPM++ of arXiv 2011.13456 (Appendix H) with BigGAN residual blocks, as it was
trained in PFGM, arXiv 2209.11178. With `ncsnpp` it is NCSN++ of the same paper, as it was trained
in EDM, arXiv 2206.00364, and PFGM++, arXiv 2302.04265. Modules are created in the order of the
published parameters, which the readers of those files rely on.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


# ---------------------------------------------------------------- layers as they are initialised

def initialise(layer, scale=1.0):
    """Variance scaling, fan_avg, uniform; biases are 0. A scale of 0 means 1e-10."""
    fan_out, fan_in = nn.init._calculate_fan_in_and_fan_out(layer.weight)
    bound = math.sqrt(3 * max(scale, 1e-10) / ((fan_in + fan_out) / 2))
    nn.init.uniform_(layer.weight, -bound, bound)
    nn.init.zeros_(layer.bias)
    return layer


def conv(c_in, c_out, k=3, scale=1.0):
    return initialise(nn.Conv2d(c_in, c_out, k, padding=k // 2), scale)


def linear(c_in, c_out, scale=1.0):
    return initialise(nn.Linear(c_in, c_out), scale)


def norm(c):
    """Group norm of c channels, in groups of 4 or, from 128 channels on, in 32 groups."""
    groups = min(c // 4, 32)
    if groups < 1 or c % groups:
        raise ValueError(f'nf: {c} channels do not split into {groups} groups; take a multiple of '
                         '32 (small networks: of 4)')
    return GroupNorm(groups, c, eps=1e-6)


class GroupNorm(nn.GroupNorm):
    """Group norm whose input and output have the same type, and whose statistics are float32.

    Autocast for GPUs would make the input float32, and so all that follows up to the next
    convolution."""

    def forward(self, x):
        if x.device.type == 'cpu':  # whose autocast leaves group norm alone
            return super().forward(x)
        with no_autocast(x):
            weight = self.weight.to(x.dtype)
            bias = self.bias.to(x.dtype)
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


def no_autocast(x):
    """Inside, operations on the device of x keep the type of their input."""
    return torch.autocast(x.device.type, enabled=False)


def blur(h, padding=1):
    """[1, 2, 1] / 4 in both directions.

    Followed by the mean of 2 x 2 pixels, or after their repetition, this is the FIR filter
    [1, 3, 3, 1] = [1, 1] * [1, 2, 1] of arXiv 1912.04958."""
    return F.avg_pool2d(F.avg_pool2d(h, 2, 1, padding), 2, 1)


# ---------------------------------------------------------------- blocks

class ResBlock(nn.Module):
    """(B, c_in, H, W), emb (B, 4 nf) -> (B, c_out, H, W).

    resample 'down' or 'up' halves or doubles H and W, by means and repetition or with `fir` by the
    FIR filter of blur()."""

    def __init__(self, c_in, c_out, c_emb, dropout, resample=None, fir=False):
        super().__init__()
        self.norm1 = norm(c_in)
        self.conv1 = conv(c_in, c_out)
        self.emb = linear(c_emb, c_out)
        self.norm2 = norm(c_out)
        self.conv2 = conv(c_out, c_out, scale=0)
        self.dropout = nn.Dropout(dropout)
        self.resample = resample
        self.fir = fir
        self.shortcut = None
        if c_in != c_out or resample:
            self.shortcut = conv(c_in, c_out, 1)

    def resized(self, h):
        if self.resample == 'down':
            return F.avg_pool2d(blur(h) if self.fir else h, 2)
        if self.resample == 'up':
            with no_autocast(h):  # which on a GPU would make it float32
                h = F.interpolate(h, scale_factor=2)  # nearest
            return blur(h) if self.fir else h
        return h

    def forward(self, x, emb):
        h = self.conv1(self.resized(F.silu(self.norm1(x))))
        h = h + self.emb(F.silu(emb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        x = self.resized(x)
        if self.shortcut is not None:
            x = self.shortcut(x)
        return (x + h) * math.sqrt(0.5)


class Attention(nn.Module):
    """One head over all pixels, (B, c, H, W) -> the same. The embedding is not used."""
    attend = staticmethod(F.scaled_dot_product_attention)  # its scale is c^-1/2

    def __init__(self, c):
        super().__init__()
        self.norm = norm(c)
        self.q = linear(c, c, 0.1)
        self.k = linear(c, c, 0.1)
        self.v = linear(c, c, 0.1)
        self.out = linear(c, c, scale=0)

    def forward(self, x, emb):
        # (B, 1, HW, c), since fused kernels want an axis of heads. Copied once, not by q, k and v.
        h = self.norm(x).flatten(2).mT[:, None].contiguous()
        h = self.attend(self.q(h), self.k(h), self.v(h))
        return (x + self.out(h).mT.reshape(x.shape)) * math.sqrt(0.5)


class Pyramid(nn.Conv2d):
    """Adds to features (B, c, H, W) those of twice their size above them (B, c_in, 2H, 2W), which
    at the top are the image itself, by a 3 x 3 convolution and the FIR filter."""

    def __init__(self, c_in, c):
        super().__init__(c_in, c, 3, padding=2)
        initialise(self)

    def forward(self, h, above):
        return (h + F.avg_pool2d(blur(super().forward(above), 0), 2)) * math.sqrt(0.5)


# ---------------------------------------------------------------- the network

class UNet(nn.Module):
    """net(x, z): x (B, channels, S, S) in units of the data, z (B,) > 0 -> v_x like x, v_z (B,).

    nf * ch_mult[level] channels and num_blocks residual blocks at each level, and attention where
    the image has one of the sizes `attn`.
    classes > 0: it takes labels (B,) too, -1 meaning none; `label_first` adds them before the first
    linear layer of the embedding, not after it.
    patch > 1: squares of patch x patch pixels become one pixel of more channels.
    ncsnpp: Fourier features of z, which should then be a logarithm (a Denoiser's is), FIR
    resampling, and a Pyramid.
    Raises ValueError where S / patch cannot be halved at every level."""

    def __init__(self, image_size=32, channels=3, nf=128, ch_mult=(1, 2, 2, 2), num_blocks=4,
                 attn=(16,), dropout=0.1, classes=0, ncsnpp=False, label_first=False, patch=1):
        super().__init__()
        last = len(ch_mult) - 1
        if image_size % (patch * 2 ** last):
            raise ValueError(f'image_size {image_size}: patches of {patch}, halved {last} times; '
                             f'take a multiple of {patch * 2 ** last}')
        self.nf = nf
        self.ncsnpp = ncsnpp
        self.label_first = label_first
        self.patch = patch
        size = image_size // patch
        inputs = channels * patch ** 2

        # the embedding of z and of the label
        width = 2 * nf if ncsnpp else nf
        if ncsnpp:
            self.register_buffer('freq', 16 * torch.randn(nf, device='cpu'))  # slow on meta
        self.embed = nn.ModuleList([linear(width, 4 * nf), linear(4 * nf, 4 * nf)])
        self.label = None
        if classes:
            self.label = linear(classes, width if label_first else 4 * nf)
        self.conv_in = conv(inputs, nf)

        def res(c_in, c_out, resample=None):
            return ResBlock(c_in, c_out, 4 * nf, dropout, resample, fir=ncsnpp)

        # the way down: stages, each of which leaves one skip connection
        self.down = nn.ModuleList()
        c = nf
        skips = [nf]
        above = inputs
        for level, mult in enumerate(ch_mult):
            for _ in range(num_blocks):
                stage = [res(c, nf * mult)]
                c = nf * mult
                attention = Attention(c)  # always drawn: other weights do not depend on `attn`
                if size >> level in attn:
                    stage.append(attention)
                self.down.append(nn.ModuleList(stage))
                skips.append(c)
            if level < last:
                stage = [res(c, c, 'down')]
                if ncsnpp:
                    stage.append(Pyramid(above, c))
                    above = c
                self.down.append(nn.ModuleList(stage))
                skips.append(c)

        self.mid = nn.ModuleList([res(c, c), Attention(c), res(c, c)])

        # the way up: stages, each of which takes one skip connection
        self.up = nn.ModuleList()
        for level, mult in reversed(list(enumerate(ch_mult))):
            for block in range(num_blocks + 1):
                stage = [res(c + skips.pop(), nf * mult)]
                c = nf * mult
                if block == num_blocks and size >> level in attn:
                    stage.append(Attention(c))
                if block == num_blocks and level > 0:
                    stage.append(res(c, c, 'up'))
                self.up.append(nn.ModuleList(stage))
        self.norm_out = norm(c)
        self.conv_out = conv(c, (channels + 1) * patch ** 2, scale=0)

    def embedding(self, z, labels, dtype):
        """z (B,), labels (B,) or None -> (B, 4 nf)."""
        half = self.nf // 2
        if self.ncsnpp:
            freq = 2 * math.pi * self.freq
        else:
            freq = torch.exp(-math.log(1e4) / (half - 1) * torch.arange(half, device=z.device))
        angle = z.to(dtype)[:, None] * freq.to(dtype)                # (B, nf/2 or nf)
        emb = torch.cat([angle.sin(), angle.cos()], dim=1)           # (B, nf or 2 nf)
        label = 0
        if self.label is not None:
            if labels is None:
                labels = torch.full(z.shape, -1, device=z.device)
            classes = self.label.in_features
            one_hot = F.one_hot(labels + 1, classes + 1)[:, 1:]      # all 0 for the label -1
            label = self.label(one_hot.to(dtype) * classes ** 0.5)   # of variance 1
        emb = self.embed[0](emb + label) if self.label_first else self.embed[0](emb) + label
        return self.embed[1](F.silu(emb))

    def forward(self, x, z, labels=None):
        x = x.to(self.conv_out.weight.dtype)  # which may have come in float64
        emb = self.embedding(z, labels, x.dtype)                     # (B, 4 nf)
        x = F.pixel_unshuffle(x, self.patch)
        above = x
        skips = [self.conv_in(x)]                                    # (B, nf, S, S)
        for stage in self.down:
            h = skips[-1]
            for layer in stage:
                if isinstance(layer, Pyramid):
                    h = above = layer(h, above)
                else:
                    h = layer(h, emb)
            skips.append(h)
        h = skips[-1]
        for layer in self.mid:
            h = layer(h, emb)
        for stage in self.up:
            h = torch.cat([h, skips.pop()], dim=1)
            for layer in stage:
                h = layer(h, emb)
        # The field itself is float32. On a GPU its convolution is in TF32, unless the caller says
        # otherwise, as pfgm.full_float32() does for RK45.
        with no_autocast(x):
            h = self.conv_out(F.silu(self.norm_out(h.to(x.dtype))))
            h = F.pixel_shuffle(h, self.patch)                       # (B, C + 1, S, S)
        return h[:, :-1], h[:, -1].mean((1, 2))
