"""Checkpoints: one file of ours, read and written, pruned and averaged. You need not read it to
understand the method.
"""
import codecs
import os

import numpy as np
import torch

from support.cli import BadInput, Parser, write
from support.methods import METHODS, as_flow
from support.networks import BEFORE_D, build, check_shapes, check_tensors
from support.processes import run
from support.published import convert_official, holds_objects, read_edm


def load_checkpoint(path, weights='ema'):
    """A trained network and the arguments it was trained with, with its `step`: (net in eval mode,
    args dict); a denoiser comes as a baselines.Denoiser, called the same way.

    Reads our files and the authors', told apart by content; nothing in a file is executed.
    Raises BadInput where the file is absent, truncated, of another kind or another architecture."""
    saved, part = read_checkpoint(path, weights == 'raw'), {'ema': 'ema', 'raw': 'net'}[weights]
    if part not in saved:
        raise BadInput(f'--weights {weights}: {path} holds the EMA only; use --weights ema')
    args = {**saved['args'], 'step': saved['step']}
    return as_flow(build(saved[part], args, path), args).eval(), args


def read_checkpoint(path, whole=False):
    """The file as a dict of net, ema, opt, step, args (and rng where it is ours), on the CPU; of
    ema, step, args where it was pruned, or is of EDM's kind and not `whole` asked for. Raises
    BadInput as load_checkpoint does."""
    if not os.path.isfile(path):
        missing = 'no such file' if not os.path.lexists(path) else 'not a file'
        raise BadInput(f'--ckpt {path}: {missing}; make one with: python train.py')
    scalar = np.float64().__reduce__()[0]  # the official lr is one
    numpy_numbers = [np.dtype, np.dtypes.Float64DType, (codecs.encode, '_codecs.encode'),
                     *((scalar, f'numpy.{core}.multiarray.scalar') for core in ('core', '_core'))]
    try:
        if holds_objects(path):
            saved = read_edm(path, whole)
        else:
            with torch.serialization.safe_globals(numpy_numbers):
                saved = torch.load(path, map_location='cpu', weights_only=True)
        keys = saved.keys() if isinstance(saved, dict) else set()
        if {'model', 'ema', 'optimizer', 'step'} <= keys:
            saved = convert_official(saved, path)
        elif not {'ema', 'args', 'step'} <= keys:
            raise BadInput(f'--ckpt {path}: not a checkpoint of train.py (net, ema, opt, step, '
                           'args), nor one of the authors of PFGM, PFGM++ or EDM')
        saved['args'] = {**BEFORE_D, **saved['args']}
        if saved['args'].get('M') == 0:  # so older files said that their method has no charges
            saved['args'].update(M=None, field_batch=1)
        check_contents(saved)
    except BadInput:
        raise
    except PermissionError as error:
        raise BadInput(f'--ckpt {path}: may not be read ({error.strerror})') from error
    except Exception as error:  # a damaged or hostile file can fail in any way, none of them ours
        reason = f'{type(error).__name__}: {error}'.splitlines()[0][:150]
        raise BadInput(f'--ckpt {path}: damaged, or not a checkpoint of tensors and numbers '
                       f'({reason})') from error
    return saved


def check_contents(saved):
    """ValueError where something that sampling needs is not there or of the wrong kind."""
    args, names = {**saved['args'], 'step': saved['step']}, saved['args'].get('class_names') or []
    for part in {'net', 'ema'} & saved.keys():
        check_tensors(saved[part])
    good = dict(
        step=type(args['step']) is int and args['step'] >= 0, method=args['method'] in METHODS,
        class_names=isinstance(names, list) and all(isinstance(name, str) for name in names),
        data=isinstance(args.get('data') or [], list), D=args['D'] >= 1,
        sigma_data=0 < args['sigma_data'] < 1e9)
    if not args.get('official'):
        norm = args['upper_norm']  # None: a prior that is not clipped
        good.update({key: 0 <= args[key] < 1e9 for key in ('z_max', 'z_exp', 'gamma')},
                    z_min=0 < args['z_min'] < args['z_max'],
                    upper_norm=norm is None or 0 <= norm < 1e9)
    for key in (key for key in good if not good[key]):
        raise ValueError(f'{key} {args[key]!r}')


def save(path, checkpoint):
    """Whole or not at all, and on the disk before the old file goes."""
    def durable(file):
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    write('checkpoint', path, durable)


# ---------------------------------------------------------------- the folder of a run

def in_folder(path):
    """An argparse type: the ckpt.pt of a folder, else the path itself."""
    return os.path.join(path, 'ckpt.pt') if os.path.isdir(path) else path


# ---------------------------------------------------------------- pruning and averaging

def parse_args(argv=None):
    p = Parser(description=__doc__)
    p.add_argument('ckpt', nargs='+', type=in_folder,
                   help='checkpoints of one architecture, ours or official')
    p.add_argument('--out', required=True, help='the file to write: ema, step, args')
    return p.parse_args(argv)


def main(args):
    saved = [read_checkpoint(path) for path in args.ckpt]
    for s, path in zip(saved, args.ckpt):
        build(s['ema'], s['args'], path)
        check_shapes(saved[0]['ema'], s['ema'], path)
    if os.path.exists(args.out):
        raise BadInput(f'--out {args.out}: exists; give a new name')
    mean = {k: sum(s['ema'][k].double() for s in saved).div(len(saved)).float()
            for k in saved[0]['ema']}
    save(args.out, dict(ema=mean, step=max(s['step'] for s in saved), args=saved[-1]['args']))
    print(f'{args.out}: the EMA of {len(saved)} checkpoint{"s" * (len(saved) > 1)}')


if __name__ == '__main__':
    run(main, parse_args())
