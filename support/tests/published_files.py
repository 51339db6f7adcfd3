"""Checkpoints in the form of the authors of PFGM, EDM and PFGM++, with random weights, for tests.

EDM pickles whole objects. Its network is written here once more, with its names in its order, so
that what our reader makes of a file can be compared with a network of the authors' own form.
"""
import copyreg
import functools
import math
import pickle
import sys
import types
from unittest.mock import patch

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import unet
from support import published
from support.tests.common import F64, seeded


# ---------------------------------------------------------------- PFGM

def tiny_official(path, change=lambda saved: None):
    """Write a checkpoint in the form of PFGM's authors, and return the UNet that it is made from.

    The network has the levels of CIFAR-10 and 8 channels. The file's weights are the UNet's plus
    0.01, its average twice that, and Adam's moments 3 times and the square of the average.
    change(saved): what is altered before it is written."""
    torch.manual_seed(1)
    net = unet.UNet(nf=8, num_blocks=1)
    names = published.official_names(net)
    model = {'module.sigmas': torch.zeros(3, dtype=F64)}
    shadow = []
    for ours, parameter in net.named_parameters():
        weight = parameter.detach() + 0.01
        if names[ours].endswith('.W'):
            weight = weight.T
        model[names[ours]] = weight.clone()
        shadow.append(2 * weight)
    state = {i: dict(step=7, exp_avg=3 * p, exp_avg_sq=p * p) for i, p in enumerate(shadow)}
    group = dict(lr=np.float64(2e-4), betas=(0.9, 0.999), eps=1e-8, weight_decay=0, amsgrad=False,
                 params=list(range(len(shadow))))
    saved = dict(model=model, ema=dict(decay=0.9999, num_updates=7, shadow_params=shadow), step=7,
                 optimizer=dict(state=state, param_groups=[group]))
    change(saved)
    torch.save(saved, path)
    return net


# ---------------------------------------------------------------- the network of EDM and PFGM++

class Conv(nn.Conv2d):
    """A convolution with a FIR filter that scales `up` or `down`; as `aux` the filter comes after
    it. taps: of the filter, in one direction."""

    def __init__(self, c_in, c, size=1, way='', taps=()):
        super().__init__(c_in, c, size, padding=size // 2 + (way == 'aux'))
        self.way = way
        if way:
            taps = torch.tensor(taps)
            kernel = torch.outer(taps, taps) / taps.sum() ** 2
            self.register_buffer('resample_filter', kernel[None, None])

    def forward(self, x):
        if not self.way:
            return super().forward(x)
        if self.way == 'aux':
            x = super().forward(x)
        kernel = self.resample_filter.expand(x.shape[1], -1, -1, -1)
        if self.way == 'aux':
            return F.conv2d(x, kernel, None, 2, 0, groups=len(kernel))
        padding = kernel.shape[-1] // 2 - 1
        if self.way == 'up':
            x = F.conv_transpose2d(x, 4 * kernel, None, 2, padding, groups=len(kernel))
        else:
            x = F.conv2d(x, kernel, None, 2, padding, groups=len(kernel))
        return super().forward(x)


def norm(c):
    return nn.GroupNorm(min(32, c // 4), c, eps=1e-6)


class Block(nn.Module):
    def __init__(self, c_in, c, c_emb, taps, attend=False, way=''):
        super().__init__()
        self.skip_scale = np.float64(0.5 ** 0.5)
        self.attend = attend
        self.norm0 = norm(c_in)
        self.conv0 = Conv(c_in, c, 3, way, taps)
        self.affine = nn.Linear(c_emb, c)
        self.norm1 = norm(c)
        self.conv1 = Conv(c, c, 3)
        self.skip = Conv(c_in, c, 1, way, taps) if c_in != c or way else None
        if attend:
            self.norm2 = norm(c)
            self.qkv = Conv(c, 3 * c)
            self.proj = Conv(c, c)

    def forward(self, h, emb):
        y = self.conv0(F.silu(self.norm0(h))) + self.affine(emb)[:, :, None, None]
        y = self.conv1(F.silu(self.norm1(y)))
        if self.skip is not None:
            h = self.skip(h)
        h = self.skip_scale * (h + y)
        if self.attend:
            q, k, v = self.qkv(self.norm2(h)).view(len(h), h.shape[1], 3, -1).unbind(2)
            w = torch.einsum('bcq,bck->bqk', q, k / h.shape[1] ** 0.5).softmax(2)
            y = torch.einsum('bqk,bck->bcq', w, v).view(h.shape)
            h = self.skip_scale * (h + self.proj(y))
        return h


class SongUNet(nn.Module):
    """The network F of EDM and PFGM++: (B, 3, size, size), c_noise (B,), labels (B,) -> like x.

    augment: how many augmentation labels it takes, of which nothing is made here: for images that
    are not augmented their layer adds nothing."""

    def __init__(self, size=32, nf=8, mult=(1, 2), blocks=1, ncsnpp=False, classes=0, augment=9):
        super().__init__()
        self.nf = nf
        self.classes = classes
        width = 2 * nf if ncsnpp else nf
        taps = [1., 3, 3, 1] if ncsnpp else [1., 1]
        block = functools.partial(Block, c_emb=4 * nf, taps=taps)

        self.map_noise = nn.Module()
        if ncsnpp:
            self.map_noise.register_buffer('freqs', torch.linspace(-2, 2, nf))
        if classes:
            self.map_label = nn.Linear(classes, width)
        if augment:
            self.map_augment = nn.Linear(augment, width, bias=False)
        self.map_layer0 = nn.Linear(width, 4 * nf)
        self.map_layer1 = nn.Linear(4 * nf, 4 * nf)

        sides = [f'{size >> level}x{size >> level}' for level in range(len(mult))]
        self.enc = enc = nn.ModuleDict()
        enc[f'{sides[0]}_conv'] = Conv(3, nf, 3)
        skips = [nf]
        c, above = nf, 3
        for side, m in zip(sides, mult):
            if side != sides[0]:
                enc[f'{side}_down'] = block(c, c, way='down')
                if ncsnpp:
                    enc[f'{side}_aux_residual'] = Conv(above, c, 3, 'aux', taps)
                    above = c
                skips.append(c)
            for i in range(blocks):
                enc[f'{side}_block{i}'] = block(c, nf * m, attend=side == '16x16')
                c = nf * m
                skips.append(c)

        self.dec = dec = nn.ModuleDict()
        dec[f'{side}_in0'] = block(c, c, attend=True)
        dec[f'{side}_in1'] = block(c, c)
        for side, m in zip(sides[::-1], mult[::-1]):
            if side != sides[-1]:
                dec[f'{side}_up'] = block(c, c, way='up')
            for i in range(blocks + 1):
                attend = side == '16x16' and i == blocks
                dec[f'{side}_block{i}'] = block(c + skips.pop(), nf * m, attend=attend)
                c = nf * m
        dec[f'{side}_aux_norm'] = norm(c)
        dec[f'{side}_aux_conv'] = Conv(c, 3, 3)

    def forward(self, x, c_noise, labels=None):
        if 'freqs' in dict(self.map_noise.named_buffers()):
            angle = 2 * math.pi * c_noise[:, None] * self.map_noise.freqs
        else:
            angle = c_noise[:, None] * 1e4 ** -torch.linspace(0, 1, self.nf // 2)
        emb = torch.cat([angle.sin(), angle.cos()], 1)
        if self.classes:
            emb = emb + self.map_label(F.one_hot(labels, self.classes) * self.classes ** 0.5)
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))
        h, above, skips = x, x, []
        for name, layer in self.enc.items():
            if 'aux' in name:
                h = above = skips[-1] = (h + layer(above)) * 0.5 ** 0.5
            else:
                h = layer(h, emb) if isinstance(layer, Block) else layer(h)
                skips.append(h)
        *blocks, (_, last_norm), (_, last) = self.dec.items()
        for name, layer in blocks:
            if '_block' in name:
                h = torch.cat([h, skips.pop()], 1)
            h = layer(h, emb)
        return last(F.silu(last_norm(h)))


# ---------------------------------------------------------------- its files

persistence = types.ModuleType('torch_utils.persistence')  # EDM's, of which a pickle has the name
exec('def _reconstruct_persistent_obj(meta): return meta', vars(persistence))


def as_edm(module):
    """How EDM's torch_utils.persistence has a module pickled: a value for __reduce__."""
    if isinstance(module, nn.ModuleDict):
        return copyreg.__newobj__, (nn.ModuleDict,), vars(module)
    meta = dict(type='class', version=6, module_src='#' * 99, class_name=type(module).__name__,
                state=vars(module))
    return persistence._reconstruct_persistent_obj, (meta,)


def edm_file(path, zip_form=False, change=lambda saved: None, kind='EDMPrecond', whole=True,
             size=32, nf=8, mult=(1, 2), blocks=1, ncsnpp=False, classes=0, augment=9, **flags):
    """Write a checkpoint in the form of EDM and PFGM++, of random weights, and return its average,
    a SongUNet.

    zip_form: written by torch.save, else as a plain pickle. whole: a training-state, in which
    Adam's moments are 3 times and the square of the raw weights, else a network-snapshot.
    change(saved): what is altered before it is written. kind: the name of the class around the
    network. flags: more of what its constructor was given, such as D and pfgmpp."""
    given = dict(model_type='SongUNet', model_channels=nf, channel_mult=list(mult), dropout=0.13,
                 num_blocks=blocks, augment_dim=augment, use_fp16=False)
    if ncsnpp:
        given.update(embedding_type='fourier', encoder_type='residual', channel_mult_noise=2,
                     resample_filter=[1, 3, 3, 1])
    facts = dict(img_resolution=size, img_channels=3, label_dim=classes, sigma_data=0.5) | flags

    def network(seed):
        net = type(kind, (nn.Module,), {})()
        vars(net).update(facts, _init_kwargs=given | facts)
        net.model = SongUNet(size, nf, mult, blocks, ncsnpp, classes, augment)
        for p in net.parameters():
            nn.init.normal_(p, 0, math.prod(p.shape[1:]) ** -0.5, seeded(seed))
        return net

    ema = network(0)
    saved = dict(ema=ema, loss_fn=nn.Module(), augment_pipe=None)
    if whole:
        net = network(1)
        state = {i: dict(step=torch.tensor(7.0), exp_avg=3 * p.detach(), exp_avg_sq=p.detach() ** 2)
                 for i, p in enumerate(net.parameters())}
        group = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, params=list(state))
        saved = dict(ema=ema, net=net, step=3584,
                     optimizer_state=dict(state=state, param_groups=[group]))
    change(saved)
    modules = dict.fromkeys(('torch_utils', persistence.__name__), persistence)
    with (patch.dict(sys.modules, modules), open(path, 'wb') as file,
          patch.object(nn.Module, '__reduce__', as_edm)):
        if zip_form:
            torch.save(saved, file)
        else:
            pickle.dump(saved, file, protocol=4)
    return ema.model
