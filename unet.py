"""The DDPM++ U-Net that learns the Poisson field, and the checkpoints it is kept in.

    net = UNet(image_size=32, channels=3)         # 61.8 M parameters, as published for CIFAR-10
    v_x, v_z = net(x, z)                          # x (B, C, H, W), z (B,) -> like x, (B,)
    net, args = load_checkpoint('out/ckpt.pt')    # ours, or one of the authors' published files
    python unet.py out/ckpt.pt --out ema.pt       # only the EMA, a quarter of the size; of several
                                                  # files, their average

Architecture: DDPM++ of arXiv 2011.13456 (Appendix H) with BigGAN residual blocks, as trained in
PFGM, arXiv 2209.11178. Modules are created in the order of the published parameters.
"""
import codecs
import math
import os
import sys
import zipfile

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from baselines import METHODS, as_flow
from data import CLASS_LIMIT, SIZE_LIMIT
from launch import BadInput, write


def initialise(layer, scale=1.0):
    """Variance scaling, fan_avg, uniform; biases 0. A scale of 0 means 1e-10."""
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
    groups = min(c // 4, 32)
    if groups < 1 or c % groups:
        raise BadInput(f'--nf: {c} channels do not split into {groups} groups; '
                       'take a multiple of 32 (small networks: of 4)')
    return Norm(groups, c, eps=1e-6)


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


class Norm(nn.GroupNorm):
    """Group norm. On a CPU PyTorch's kernel is slow where the channels are last, which is what the
    convolutions want: backward (hence NormLast), and forward on small images in small groups, where
    two copies are cheaper."""

    def forward(self, x):
        fast = x.shape[2] * x.shape[3] >= 1024 or x.shape[1] >= 16 * self.num_groups
        if x.device.type != 'cpu' or fast and not torch.is_grad_enabled():
            return super().forward(x)
        if fast:
            return NormLast.apply(x, self.weight, self.bias, self.num_groups, self.eps)
        return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)


def dropout(h, p, training):
    """F.dropout; on a CPU, where PyTorch's draws and comparisons are slow, from 16 bits an element
    of a generator seeded by PyTorch's."""
    if (not training or h.device.type != 'cpu' or not 2 ** -16 < p < 1 - 2 ** -16
            or torch.compiler.is_compiling()):
        return F.dropout(h, p, training)
    draw = np.random.SFC64(int(torch.randint(2 ** 62, ()))).random_raw
    bits = torch.from_numpy(draw((h.numel() + 3) // 4).view(np.int16))[:h.numel()]
    low = round(p * 2 ** 16) - 2 ** 15 - 1
    keep = bits.clamp_(low, low + 1).sub_(low).as_strided(h.shape, h.stride())  # 0 or 1
    return h * (keep.to(h.dtype) * (1 / (1 - p)))


class ResBlock(nn.Module):
    """(B, c_in, H, W), emb (B, 4 nf) -> (B, c_out, H, W), H and W halved or doubled on request."""

    def __init__(self, c_in, c_out, c_emb, dropout, resample=None):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), conv(c_in, c_out)
        self.emb = linear(c_emb, c_out)
        self.norm2, self.conv2 = norm(c_out), conv(c_out, c_out, scale=0)
        self.dropout, self.resample = dropout, resample
        if c_in != c_out or resample:
            self.shortcut = conv(c_in, c_out, 1)

    def scale(self, h):
        if self.resample == 'down':
            return F.avg_pool2d(h, 2)
        return F.interpolate(h, scale_factor=2) if self.resample == 'up' else h  # nearest

    def forward(self, x, emb):
        h = self.conv1(self.scale(F.silu(self.norm1(x)))) + self.emb(F.silu(emb))[:, :, None, None]
        h = self.conv2(dropout(F.silu(self.norm2(h)), self.dropout, self.training))
        x = self.scale(x)
        return ((self.shortcut(x) if hasattr(self, 'shortcut') else x) + h) * math.sqrt(0.5)


class Attention(nn.Module):
    """One head over all pixels, (B, c, H, W) -> the same. The embedding is not used."""

    def __init__(self, c):
        super().__init__()
        self.norm = norm(c)
        self.q, self.k, self.v = (linear(c, c, 0.1) for _ in range(3))
        self.out = linear(c, c, scale=0)

    def forward(self, x, emb):
        h = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, c)
        h = F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h))  # scale c^-1/2
        return (x + self.out(h).transpose(1, 2).reshape(x.shape)) * math.sqrt(0.5)


class UNet(nn.Module):
    """net(x, z): x (B, channels, S, S) in units of the data, z (B,) > 0 -> v_x like x, v_z (B,).

    nf x ch_mult channels and num_blocks residual blocks at each level, attention where the image
    has one of the sizes `attn`. With classes > 0 it takes labels (B,) too, -1 meaning none.
    Raises BadInput where S cannot be halved at every level."""

    def __init__(self, image_size=32, channels=3, nf=128, ch_mult=(1, 2, 2, 2), num_blocks=4,
                 attn=(16,), dropout=0.1, classes=0):
        super().__init__()
        last = len(ch_mult) - 1
        if image_size % 2 ** last or image_size < 2 ** last:
            raise BadInput(f'--image_size {image_size}: the network halves it {last} times; '
                           f'take a multiple of {2 ** last}')
        self.nf = nf
        self.embed = nn.ModuleList([linear(nf, 4 * nf), linear(4 * nf, 4 * nf)])
        self.label = linear(classes, 4 * nf) if classes else None
        self.conv_in = conv(channels, nf)

        def res(c_in, c_out, resample=None):
            return ResBlock(c_in, c_out, 4 * nf, dropout, resample)
        self.down = nn.ModuleList()  # stages, one skip connection each
        c, skips = nf, [nf]
        for level, mult in enumerate(ch_mult):
            attend = image_size >> level in attn
            for _ in range(num_blocks):
                stage, c = [res(c, nf * mult)], nf * mult
                self.down.append(nn.ModuleList(stage + [Attention(c)] * attend))
                skips.append(c)
            if level < last:
                self.down.append(nn.ModuleList([res(c, c, 'down')]))
                skips.append(c)
        self.mid = nn.ModuleList([res(c, c), Attention(c), res(c, c)])
        self.up = nn.ModuleList()
        for level, mult in reversed(list(enumerate(ch_mult))):
            for block in range(num_blocks + 1):
                stage, c = [res(c + skips.pop(), nf * mult)], nf * mult
                if block == num_blocks and image_size >> level in attn:
                    stage.append(Attention(c))
                if block == num_blocks and level > 0:
                    stage.append(res(c, c, 'up'))
                self.up.append(nn.ModuleList(stage))
        self.norm_out, self.conv_out = norm(c), conv(c, channels + 1, scale=0)

    def forward(self, x, z, labels=None):
        half = self.nf // 2
        freq = torch.exp(-math.log(1e4) / (half - 1) * torch.arange(half, device=x.device))
        angle = z.to(x.dtype)[:, None] * freq.to(x.dtype)                     # (B, nf/2)
        emb = torch.cat([angle.sin(), angle.cos()], dim=1)                   # (B, nf)
        emb = self.embed[0](emb)
        if self.label is not None:  # one-hot of variance 1, and 0 for the label -1
            k = self.label.in_features
            labels = torch.full(z.shape, -1, device=x.device) if labels is None else labels
            emb = emb + self.label(F.one_hot(labels + 1, k + 1)[:, 1:].to(x.dtype) * k ** 0.5)
        emb = self.embed[1](F.silu(emb))                                     # (B, 4 nf)
        skips = [self.conv_in(x)]                                            # (B, nf, S, S)
        for stage in self.down:
            h = skips[-1]
            for layer in stage:
                h = layer(h, emb)
            skips.append(h)
        h = skips[-1]
        for layer in self.mid:
            h = layer(h, emb)
        for stage in self.up:
            h = torch.cat([h, skips.pop()], dim=1)
            for layer in stage:
                h = layer(h, emb)
        with torch.autocast(x.device.type, enabled=False):  # the field itself in full precision
            h = self.conv_out(F.silu(self.norm_out(h.to(x.dtype))))          # (B, C + 1, S, S)
        return h[:, :-1], h[:, -1].mean((1, 2))


# ---------------------------------------------------------------- checkpoints

ARCHITECTURE = ('image_size', 'channels', 'nf', 'ch_mult', 'num_blocks', 'attn', 'dropout',
                'classes')
BEFORE_D = dict(classes=0, method='pfgm', D=1.0, sigma_data=0.5)  # of files that do not say


def load_checkpoint(path, weights='ema'):
    """A trained network and the arguments it was trained with, with its `step`: (net in eval mode,
    args dict); a denoiser comes as a pfgm.Denoiser, called the same way.

    Reads our files and the authors', told apart by content; nothing in a file is executed.
    Raises BadInput where the file is absent, truncated, of another kind or another architecture."""
    saved, part = read_checkpoint(path), {'ema': 'ema', 'raw': 'net'}[weights]
    if part not in saved:
        raise BadInput(f'--weights {weights}: {path} holds the EMA only; use --weights ema')
    args = {**saved['args'], 'step': saved['step']}
    return as_flow(build(saved[part], args, path), args).eval(), args


def blank(args, tensors, path):
    """The UNet of `args` without memory for its weights, of which a file has that many tensors."""
    try:
        if not (args['num_blocks'] * len(args['ch_mult']) <= tensors and args['channels'] in (1, 3)
                and args['image_size'] <= SIZE_LIMIT and 0 <= args['dropout'] < 1
                and 0 <= args['classes'] <= CLASS_LIMIT):
            raise ValueError('a value out of range')  # building it could take forever
        with torch.device('meta'):
            return UNet(**{k: args[k] for k in ARCHITECTURE})
    except Exception as error:  # of the wrong type, it can fail anywhere in there
        raise BadInput(f'--ckpt {path}: no usable architecture in its args '
                       f'({repr(error)[:150]})') from error


def build(state, args, path):
    """The UNet of `args` with the tensors of `state`; BadInput names the first that differ."""
    net = blank(args, len(state), path)
    check_shapes({k: v.shape for k, v in net.state_dict().items()},
                 {k: v.shape for k, v in state.items()}, path)
    net.load_state_dict(state, assign=True)
    return net.eval()


def check_shapes(expected, found, path):
    missing, extra = expected.keys() - found.keys(), found.keys() - expected.keys()
    wrong = [k for k in expected.keys() & found.keys() if expected[k] != found[k]]
    faults = ([f'{k} is missing' for k in sorted(missing)] +
              [f'{k} does not belong' for k in sorted(extra)] +
              [f'{k} is {tuple(found[k])}, expected {tuple(expected[k])}' for k in sorted(wrong)])
    if faults:
        more = f' and {len(faults) - 3} more' if len(faults) > 3 else ''
        raise BadInput(f'--ckpt {path}: not the architecture it claims: '
                       f'{"; ".join(faults[:3])}{more}')


def read_checkpoint(path):
    """The file as a dict of net, ema, opt, step, args (and rng where it is ours), on the CPU; of
    ema, step, args where it was pruned. Raises BadInput as load_checkpoint does."""
    if not os.path.isfile(path):
        raise BadInput(f'--ckpt {path}: no such file; make one with: python train.py')
    float64, scalar = np.dtype(np.float64), np.float64().__reduce__()[0]
    numpy_numbers = [np.dtype, type(float64), (codecs.encode, '_codecs.encode'),  # the official lr
                     (scalar, 'numpy.core.multiarray.scalar'),
                     (scalar, 'numpy._core.multiarray.scalar')]
    try:
        check_archive(path)
        with torch.serialization.safe_globals(numpy_numbers):
            saved = torch.load(path, map_location='cpu', weights_only=True)
        keys = saved.keys() if isinstance(saved, dict) else set()
        if {'model', 'ema', 'optimizer', 'step'} <= keys:
            saved = convert_official(saved, path)
        elif not {'ema', 'args', 'step'} <= keys:
            raise BadInput(f'--ckpt {path}: not a checkpoint of train.py (net, ema, opt, step, '
                           'args), nor an official one (model, ema, optimizer, step)')
        saved['args'] = {**BEFORE_D, **saved['args']}
        check_contents(saved)
    except BadInput:
        raise
    except Exception as error:  # a damaged or hostile file can fail in any way, none of them ours
        reason = f'{type(error).__name__}: {error}'.splitlines()[0][:150]
        raise BadInput(f'--ckpt {path}: damaged, or not a checkpoint of tensors and numbers '
                       f'({reason})') from error
    return saved


def check_archive(path):
    """ValueError where a zip, which torch.save writes stored, is packed or fails its checksums:
    torch.load would unpack the one to any size and pass over the other."""
    with open(path, 'rb') as file:
        if file.read(2) != b'PK':
            return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if (any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
                or sum(entry.file_size for entry in entries) > os.path.getsize(path)):
            raise ValueError('its parts claim more bytes than it has')
        if broken := archive.testzip():
            raise ValueError(f'{broken} fails its checksum')


def check_tensors(tensors):
    """ValueError unless all are float32 and held in full: a stride of 0 makes one number look like
    a terabyte, which the first copy would take."""
    for name, t in tensors.items():
        if not (isinstance(name, str) and torch.is_tensor(t) and t.dtype == torch.float32
                and t.layout == torch.strided and t.device.type == 'cpu'
                and t.untyped_storage().nbytes() >= t.nbytes):
            raise ValueError(f'{name!r} is not a float32 tensor held in full')


def check_contents(saved):
    """ValueError where something that sampling needs is not there or of the wrong kind."""
    args, step = saved['args'], saved['step']
    for part in {'net', 'ema'} & saved.keys():
        check_tensors(saved[part])
    if type(step) is not int or step < 0:
        raise ValueError(f'step {step!r}')
    if args['method'] not in METHODS:
        raise ValueError(f'method {args["method"]!r}')
    if not (args['D'] >= 1 and 0 < args['sigma_data'] < 1e9):
        raise ValueError(f'D {args["D"]!r}, sigma_data {args["sigma_data"]!r}')
    if not args.get('official'):
        for key in ('z_min', 'z_max', 'upper_norm', 'z_exp', 'gamma'):
            if key == 'upper_norm' and args[key] is None:  # a prior that is not clipped
                continue
            if not (0 <= args[key] < 1e9 and 0 < args['z_min'] < args['z_max']):
                raise ValueError(f'{key} {args[key]!r}')


def save(path, checkpoint):
    """Whole or not at all, and on the disk before the old file goes."""
    def durable(file):
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    write('checkpoint', path, durable)


OFFICIAL_NAME = dict(norm1='GroupNorm_0', conv1='Conv_0', emb='Dense_0', norm2='GroupNorm_1',
                     conv2='Conv_1', shortcut='Conv_2', norm='GroupNorm_0', q='NIN_0', k='NIN_1',
                     v='NIN_2', out='NIN_3')


def official_names(net):
    """{our parameter name: official name}, in the order of both."""
    units = [*net.embed, net.conv_in, *(u for s in net.down for u in s), *net.mid,
             *(u for s in net.up for u in s), net.norm_out, net.conv_out]
    index = {id(parameter): (i, name) for i, unit in enumerate(units)
             for name, parameter in unit.named_parameters()}
    names = {}
    for ours, parameter in net.named_parameters():
        i, name = index[id(parameter)]
        *layer, leaf = name.split('.')
        if layer and layer[0] in ('q', 'k', 'v', 'out'):
            leaf = {'weight': 'W', 'bias': 'b'}[leaf]
        layer = [OFFICIAL_NAME[k] for k in layer]
        names[ours] = '.'.join([f'module.all_modules.{i}', *layer, leaf])
    return names


def official_architecture(shapes, path):
    """UNet arguments from the vectors among the official tensors (a matrix may be transposed)."""
    def width(name):
        if f'module.all_modules.{name}' not in shapes:
            raise BadInput(f'--ckpt {path}: module.all_modules.{name} is missing')
        return shapes[f'module.all_modules.{name}'][0]
    indices = sorted({int(k.split('.')[2]) for k in shapes if k.startswith('module.all_modules.')})
    nf, levels = width('2.bias'), [[]]
    c = nf
    for i in indices[3:-2]:
        if f'module.all_modules.{i}.NIN_0.b' in shapes:
            levels[-1].append('attention')
            continue
        c_in, c_out = width(f'{i}.GroupNorm_0.weight'), width(f'{i}.Conv_0.bias')
        if c_in != c:  # the first block on concat(h, skip): the way up begins
            break
        if c_in == c_out and f'module.all_modules.{i}.Conv_2.bias' in shapes:
            levels.append([])  # it has a shortcut because it halves the image
        else:
            levels[-1].append(c_out // nf)
        c = c_out
    del levels[-1][-3:]  # the middle: residual, attention, residual
    attended = [i for i, level in enumerate(levels) if 'attention' in level]
    if not attended or not all(levels):
        raise BadInput(f'--ckpt {path}: not a DDPM++ of the authors (levels {levels})')
    return dict(BEFORE_D, image_size=16 << attended[0], nf=nf,
                channels=width(f'{indices[-1]}.bias') - 1,
                ch_mult=[level[0] for level in levels], attn=[16],
                dropout=0.0 if attended[0] == 4 else 0.1,  # LSUN was trained without
                num_blocks=len([block for block in levels[0] if block != 'attention']))


def convert_official(saved, path):
    """An official dict(model, ema, optimizer, step) in our own form. q, k, v and out projections
    are stored (in, out) there, the transpose of a linear layer's weight."""
    shadow, state = saved['ema']['shadow_params'], saved['optimizer']['state']
    model = {k: v for k, v in saved['model'].items() if k != 'module.sigmas'}
    args = official_architecture({k: v.shape for k, v in model.items()}, path)
    net = blank(args, len(model), path)
    names = official_names(net)
    check_shapes({names[k]: v.shape for k, v in net.named_parameters()},  # square, so any way round
                 {k: v.shape for k, v in model.items()}, path)
    check_shapes({f'ema.shadow_params[{i}]': v.shape for i, v in enumerate(net.parameters())},
                 {f'ema.shadow_params[{i}]': v.shape for i, v in enumerate(shadow)}, path)
    turned = [name.endswith('.W') for name in names.values()]

    def ours(tensors):
        tensors = dict(zip(names, tensors))
        check_tensors(tensors)
        return {k: (t.T if turn else t).clone() for (k, t), turn in zip(tensors.items(), turned)}
    moments = [ours([state[i][k] for i in range(len(names))]).values() if state else []
               for k in ('exp_avg', 'exp_avg_sq')]
    opt = {'state': {i: dict(step=torch.as_tensor(state[i]['step'], dtype=torch.float32),
                             exp_avg=m, exp_avg_sq=v) for i, (m, v) in enumerate(zip(*moments))},
           'param_groups': [dict(g, lr=float(g['lr'])) for g in saved['optimizer']['param_groups']]}
    return dict(net=ours(model[n] for n in names.values()), ema=ours(shadow), opt=opt,
                step=int(saved['step']), args=dict(args, official=True))


def main(argv=None):
    import argparse
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('ckpt', nargs='+', help='checkpoints of one architecture, ours or official')
    p.add_argument('--out', required=True, help='the file to write: ema, step, args')
    args = p.parse_args(argv)
    try:
        saved = [read_checkpoint(path) for path in args.ckpt]
        nets = [build(s['ema'], s['args'], path) for s, path in zip(saved, args.ckpt)]
        if os.path.exists(args.out):
            raise BadInput(f'--out {args.out}: exists; give a new name')
        for net, path in zip(nets, args.ckpt):
            check_shapes({k: v.shape for k, v in nets[0].state_dict().items()},
                         {k: v.shape for k, v in net.state_dict().items()}, path)
        mean = {k: sum(s['ema'][k].double() for s in saved).div(len(saved)).float()
                for k in saved[0]['ema']}
        save(args.out, dict(ema=mean, step=max(s['step'] for s in saved), args=saved[-1]['args']))
    except BadInput as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(f'{args.out}: the EMA of {len(saved)} checkpoint{"s" * (len(saved) > 1)}')


if __name__ == '__main__':
    main()
