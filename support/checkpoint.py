"""Checkpoints: from a file, ours or one of the authors', to a trained network; and several files
pruned and averaged to one. You need not read it to understand the method.

    net, flags = load_checkpoint('out/ckpt.pt')
    v_x, v_z = net(x, z)              # x (B, C, S, S), z (B,); and labels (B,) where it has classes
    flags['method'], flags['step']    # the flags of train.py, and the updates that were made

    python -m support.checkpoint a.pt b.pt --out ema.pt

A file of ours is a dict of state dicts and plain values: net and ema (the raw and the averaged
weights), opt (the optimizer), step, args (the flags of train.py) and rng (the random generators). A
pruned one has ema, step and args.
"""
import math
import os

from support import waiting

waiting.begin(__name__)  # a line where the imports below take long; Ctrl-C ends them in one line

import torch

from support.cli import BadInput, CLASS_LIMIT, Parser, given_by, say, write
from support.methods import METHODS, as_flow
from support.networks import build, check_shapes, check_tensors
from support.processes import run
from support.published import NUMPY_NUMBERS, convert_official, holds_objects, read_edm
from support.sets import is_same_set
from support.unused import OF_ONE_METHOD, OF_PFGM


# ---------------------------------------------------------------- reading and writing

def load_checkpoint(path, weights='ema'):
    """A trained network in eval mode, called net(x, z[, labels]) -> (v_x, v_z), and the mapping of
    the flags that it was trained with, with its `step`.

    The file may be ours or one of the authors of PFGM, PFGM++ and EDM; its content tells. weights:
    'ema' or 'raw'. Nothing in a file is executed. Raises BadInput where the file is absent,
    damaged, of another kind, or not of the architecture that it claims."""
    saved = read_checkpoint(path, whole=weights == 'raw')
    part = 'net' if weights == 'raw' else 'ema'
    if part not in saved:
        raise BadInput(f'--weights {weights}: {path} holds the EMA only; use --weights ema')
    flags = dict(saved['args'], step=saved['step'])
    net = build(saved[part], flags, path)
    return as_flow(net, flags).eval(), flags


def read_checkpoint(path, whole=False):
    """The file as a dict in our own form, on the CPU: net, ema, opt, step, args and rng, or ema,
    step and args where it was pruned. The authors' files have no rng.

    whole: of a file of EDM or PFGM++ give net and opt too, if it has them; without, only its EMA.
    Raises BadInput as load_checkpoint() does."""
    if not os.path.lexists(path):
        raise BadInput(f'--ckpt {path}: no such file; make one with: python train.py')
    if not os.path.isfile(path):
        raise BadInput(f'--ckpt {path}: not a file; make one with: python train.py')
    try:
        if holds_objects(path):
            saved = read_edm(path, whole)
        else:
            with torch.serialization.safe_globals(NUMPY_NUMBERS):
                saved = torch.load(path, map_location='cpu', weights_only=True)
        keys = saved.keys() if isinstance(saved, dict) else set()
        if {'model', 'ema', 'optimizer', 'step'} <= keys:
            saved = convert_official(saved, path)
        elif not {'ema', 'args', 'step'} <= keys:
            raise BadInput(f'--ckpt {path}: not a checkpoint of train.py (net, ema, opt, step, '
                           'args), nor one of the authors of PFGM, PFGM++ or EDM')
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


def save(path, checkpoint):
    """Write the file whole or not at all; the new one is on the disk before the old one goes."""
    def durable(file):
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    write('checkpoint', path, durable)


def in_folder(path):
    """An argparse type: the path of a checkpoint; that of a folder means the ckpt.pt in it."""
    return os.path.join(path, 'ckpt.pt') if os.path.isdir(path) else path


# ---------------------------------------------------------------- what a file must hold
#
# A file from a stranger may say anything. What sampling and training read of its flags is therefore
# checked here, once, so that no other place meets a text for a number. networks.blank() checks the
# flags of the architecture.

def number(low, high):
    """A test of values: an int or a float in [low, high], which NaN is not."""
    return lambda value: isinstance(value, (int, float)) and low <= value <= high


def whole_number(low, high):
    return lambda value: type(value) is int and low <= value <= high


def optional(test):
    return lambda value: value is None or test(value)


def is_text(value):
    return isinstance(value, str)


def is_truth(value):
    return isinstance(value, bool)


def is_plain(value):
    """Whether it is None, a number, a text, or a list of these."""
    items = value if isinstance(value, (list, tuple)) else [value]
    return all(item is None or isinstance(item, (bool, int, float, str)) for item in items)


def is_method(value):
    return is_text(value) and value in METHODS


def is_identity(value):
    """Of a data set, as images.Images has it: how many images, a mark of their labels, a hash of
    their pixels."""
    return (isinstance(value, list) and len(value) == 3
            and all(whole_number(0, 2 ** 64)(item) for item in value))


def are_names(value):
    return isinstance(value, list) and all(is_text(name) for name in value)


def is_field_batch(value):
    return value == 'all' or whole_number(1, 2 ** 31)(value)


# What every checkpoint says, also one made of a published file.
FLAGS = dict(method=is_method, D=number(1, math.inf), sigma_data=optional(number(1e-30, 1e9)),
             classes=whole_number(0, CLASS_LIMIT), ncsnpp=is_truth, label_first=is_truth,
             m_draws=optional(whole_number(1, 2 ** 10)), skip=optional(is_truth), muon=is_truth,
             decay=number(0, 1), edm=is_truth)

# The constants of its flow, which follow from the image size where PFGM published the file.
CONSTANTS = dict(z_min=number(1e-30, 1e9), z_max=number(0, 1e9), z_exp=number(0, 1e9),
                 gamma=optional(number(0, 1e9)), upper_norm=optional(number(0, 1e9)))

# What a run of train.py says besides.
RUN_FLAGS = dict(
    dataset=is_text, data=is_identity, class_names=optional(are_names), source=optional(is_text),
    reflow=optional(is_text), distill=optional(is_text), consistency=is_truth,
    M=optional(whole_number(1, 10 ** 6)), sigma=optional(number(1e-9, 1e9)),
    tau=optional(number(1e-9, 1e9)), field_batch=is_field_batch,
    batch_size=whole_number(1, 2 ** 31), flip=optional(is_truth),
    steps=whole_number(1, 2 ** 31), sample_every=whole_number(0, 2 ** 31),
    save_every=whole_number(1, 2 ** 31), lr=number(0, 1e9),
    warmup=whole_number(0, 2 ** 31), ema_decay=number(0, 1),
    loss=lambda value: value in ('sum', 'mean'))

# What only a run from a source, of a student, or of a denoiser with a finite D needs to say.
MODE_FLAGS = dict(source_data=optional(is_identity), guidance=optional(number(0, 1e3)),
                  data_norm=optional(number(0, 1e9)))


def check_contents(saved):
    """ValueError where a part of a checkpoint is missing that sampling or training needs, or is of
    the wrong type, or out of range."""
    for part in ('net', 'ema'):
        if part in saved:
            if not isinstance(saved[part], dict):
                raise ValueError(f'{part} is not a dict of tensors')
            check_tensors(saved[part])
    if not whole_number(0, 2 ** 62)(saved['step']):
        raise ValueError(f'step {saved["step"]!r}')
    if not isinstance(saved['args'], dict):
        raise ValueError('args is not a dict of flags')
    check_flags(saved['args'])


def check_flags(flags):
    """ValueError where a flag of a checkpoint cannot be one."""
    for key, value in flags.items():
        if not (is_text(key) and is_plain(value)):
            raise ValueError(f'{key!r} in its args is not a plain value')
    official, edm = flags.get('official', False), flags.get('edm', False)
    tests = dict(FLAGS)
    if not official:
        tests.update(CONSTANTS)
    if not (official or edm):
        tests.update(RUN_FLAGS)
    for key in tests:
        if key not in flags:
            raise ValueError(f'{key} is missing from its args')
    for key, test in dict(FLAGS, **CONSTANTS, **RUN_FLAGS, **MODE_FLAGS).items():
        if key in flags and not test(flags[key]):
            raise ValueError(f'{key} {flags[key]!r}')

    method = flags['method']
    if official and method != 'pfgm' or edm and method != 'pfgmpp':
        raise ValueError(f'method {method!r} of a published file')
    if not official and flags['z_min'] >= flags['z_max']:
        raise ValueError(f'z_min {flags["z_min"]} is not below z_max {flags["z_max"]}')
    if flags.get('source') and flags.get('source_data') is None:
        raise ValueError('source_data is missing from its args')
    needed = ()
    if method == 'pfgm' and not official:
        needed = OF_PFGM
    elif method == 'pfgmpp':
        needed = ('sigma_data',)
    for key in needed:
        if flags.get(key) is None:
            raise ValueError(f'{key} is missing from its args')
    names = flags.get('class_names') or []
    if flags['classes'] and len(names) > flags['classes']:
        raise ValueError(f'{len(names)} class_names of {flags["classes"]} classes')


# ---------------------------------------------------------------- pruning and averaging

# What a network is, and what it stands for: the flags in which checkpoints that are averaged must
# agree. Where some of them differ the tensors have the same shapes nevertheless.
ALIKE = ('method', 'D', 'image_size', 'channels', 'nf', 'ch_mult', 'num_blocks', 'attn', 'classes',
         'class_names', 'patch', 'ncsnpp', 'label_first', 'skip', 'sigma_data', 'data_norm',
         'gamma', 'M', 'sigma', 'tau', 'm_draws', 'z_max', 'upper_norm', 'z_exp', 'z_min',
         'consistency')


def check_alike(flags, other, path, other_path):
    """Raise BadInput unless two checkpoints, with these mappings of flags, were trained alike, and
    say so where their weights began differently. path, other_path: their files."""
    mend = 'give checkpoints that were trained alike'
    for key in ('official', 'edm'):
        if flags.get(key, False) != other.get(key, False):
            raise BadInput(f'ckpt {path}: of other authors than {other_path}; {mend}')
    for key in ALIKE:
        here, there = (list(value) if isinstance(value, tuple) else value
                       for value in (flags.get(key), other.get(key)))
        has_no_say = key in OF_ONE_METHOD and None in (here, there)
        if here != there and not has_no_say:
            raise BadInput(f'ckpt {path}: trained with {key} {here}, {other_path} with {there}; '
                           f'{mend}')
    for key in ('reflow', 'distill'):  # the path of the teacher may differ
        if bool(flags.get(key)) != bool(other.get(key)):
            raise BadInput(f'ckpt {path}: only one of it and {other_path} was trained by --{key}; '
                           f'{mend}')
    for key, identity in (('dataset', 'data'), ('source', 'source_data')):
        here = flags.get(key)
        there = other.get(key)
        if here and there:
            same = is_same_set(here, flags[identity], there, other[identity])
        else:
            same = here == there
        if not same:
            raise BadInput(f'ckpt {path}: trained with {key} {here}, {other_path} with {there}, '
                           f'which are other images; {mend}')
    from_same = flags.get('init_from') and flags.get('init_from') == other.get('init_from')
    if flags.get('seed') != other.get('seed') and not from_same:
        say(f'{path} and {other_path} began with other weights, from --seed {flags.get("seed")} '
            f'and {other.get("seed")}: the mean of such networks is seldom a good one')


def average(paths, out):
    """Write to the file `out` the mean of the EMAs of checkpoints that were trained alike, with the
    args of the last of them and the step of the most trained. Raises BadInput where they were not,
    or `out` is there already."""
    with given_by('ckpt'):
        checkpoints = [read_checkpoint(path) for path in paths]
        first = checkpoints[0]['ema']
        for saved, path in zip(checkpoints, paths):
            build(saved['ema'], saved['args'], path)  # which refuses what is no network
            check_alike(saved['args'], checkpoints[0]['args'], path, paths[0])
            check_shapes(first, saved['ema'], path)
    if os.path.exists(out):
        raise BadInput(f'--out {out}: exists; give a new name')
    mean = {}
    for name in first:
        total = sum(saved['ema'][name].double() for saved in checkpoints)
        mean[name] = (total / len(checkpoints)).float()
    step = max(saved['step'] for saved in checkpoints)
    save(out, dict(ema=mean, step=step, args=checkpoints[-1]['args']))


def parse_args(argv=None):
    p = Parser(description=__doc__)
    p.add_argument('ckpt', nargs='+', type=in_folder,
                   help='checkpoints that were trained alike, ours or official')
    p.add_argument('--out', required=True, help='the file to write: ema, step, args')
    return p.parse_args(argv)


def main(args):
    average(args.ckpt, args.out)
    count = len(args.ckpt)
    print(f'{args.out}: the EMA of {count} checkpoint' + ('s' if count > 1 else ''))


if __name__ == '__main__':
    run(main, parse_args())
