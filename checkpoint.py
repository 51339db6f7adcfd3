"""Checkpoints: ours and the authors' of PFGM, PFGM++ and EDM, told apart by content; nothing in a
file is executed.

    net, args = load_checkpoint('out/ckpt.pt')       # called net(x, z), see pfgm.py
    python checkpoint.py out/ckpt.pt --out ema.pt    # only the EMA, a quarter of the size; of
                                                     # several files, their average

A file of ours is one dict: net, ema, opt, step, args, rng.
"""
import argparse
import codecs
import glob
import math
import os
import sys

import numpy as np
import torch

import data as datasets
import pfgm
from baselines import EDM, METHODS, SAMPLING, as_flow, flow_of
from files import (check_tensors, edm_names, holds_objects, official_names, open_pickle,
                   tensors_of)
from launch import (CLASS_LIMIT, SIZE_LIMIT, BadInput, Parser, above, fast_bf16, given_by,
                    keep_freed_memory, run, setup, speed_up, unless, write)
from unet import UNet

ARCHITECTURE = ('image_size', 'channels', 'nf', 'ch_mult', 'num_blocks', 'attn', 'dropout',
                'classes', 'patch', 'ncsnpp', 'label_first')
BEFORE_D = dict(classes=0, method='pfgm', D=1.0, sigma_data=0.5, patch=1, m_draws=1, muon=False,
                skip=False, decay=0.0, ncsnpp=False, label_first=False,
                edm=False)  # of files that do not say


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


def blank(args, tensors, path):
    """The UNet of `args` without memory for its weights, of which a file has that many tensors."""
    try:
        if not (args['num_blocks'] * len(args['ch_mult']) <= tensors and args['channels'] in (1, 3)
                and 1 <= args['patch'] <= args['image_size'] <= SIZE_LIMIT
                and 0 <= args['dropout'] < 1 and 0 <= args['classes'] <= CLASS_LIMIT):
            raise ValueError('a value out of range')  # building it could take forever
        with torch.device('meta'):
            return UNet(**{k: args[k] for k in ARCHITECTURE})
    except Exception as error:  # of the wrong type, it can fail anywhere in there
        raise BadInput(f'--ckpt {path}: no usable architecture in its args '
                       f'({repr(error)[:150]})') from error


def build(state, args, path):
    """The UNet of `args` with the tensors of `state`; BadInput names the first that differ."""
    net = blank(args, len(state), path)
    check_shapes(net.state_dict(), state, path)
    net.load_state_dict(state, assign=True)
    return speed_up(net).eval()


def check_shapes(expected, found, path):
    """BadInput unless found, {name: tensor}, has the names and shapes of expected."""
    faults = ([f'{k} is missing' for k in sorted(expected.keys() - found.keys())] +
              [f'{k} does not belong' for k in sorted(found.keys() - expected.keys())] +
              [f'{k} is {tuple(found[k].shape)}, expected {tuple(expected[k].shape)}'
               for k in sorted(expected.keys() & found.keys())
               if found[k].shape != expected[k].shape])
    if faults:
        more = f' and {len(faults) - 3} more' if len(faults) > 3 else ''
        raise BadInput(f'--ckpt {path}: not the architecture it claims: '
                       f'{"; ".join(faults[:3])}{more}')


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


# ---------------------------------------------------------------- the authors' files

def official_architecture(model, path):
    """UNet arguments from the vectors among the official tensors (a matrix may be transposed)."""
    def width(name):
        if f'module.all_modules.{name}' not in model:
            raise BadInput(f'--ckpt {path}: module.all_modules.{name} is missing')
        return model[f'module.all_modules.{name}'].shape[0]
    indices = sorted({int(k.split('.')[2]) for k in model if k.startswith('module.all_modules.')})
    nf, levels = width('2.bias'), [[]]
    c = nf
    for i in indices[3:-2]:
        if f'module.all_modules.{i}.NIN_0.b' in model:
            levels[-1].append('attention')
            continue
        c_in, c_out = width(f'{i}.GroupNorm_0.weight'), width(f'{i}.Conv_0.bias')
        if c_in != c:  # the first block on concat(h, skip): the way up begins
            break
        if c_in == c_out and f'module.all_modules.{i}.Conv_2.bias' in model:
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
    args = official_architecture(model, path)
    net = blank(args, len(model), path)
    names = official_names(net)
    expected = {names[k]: v for k, v in net.named_parameters()}  # square, so any way round
    check_shapes(expected, model, path)
    check_shapes({f'ema.shadow_params[{i}]': v for i, v in enumerate(net.parameters())},
                 {f'ema.shadow_params[{i}]': v for i, v in enumerate(shadow)}, path)

    def ours(tensors):
        tensors = dict(zip(names, tensors))
        check_tensors(tensors)
        return {k: (t.T if names[k].endswith('.W') else t).clone() for k, t in tensors.items()}
    moments = [ours([state[i][k] for i in range(len(names))]).values() if state else []
               for k in ('exp_avg', 'exp_avg_sq')]
    opt = {'state': {i: dict(step=torch.as_tensor(state[i]['step'], dtype=torch.float32),
                             exp_avg=m, exp_avg_sq=v) for i, (m, v) in enumerate(zip(*moments))},
           'param_groups': [dict(g, lr=float(g['lr'])) for g in saved['optimizer']['param_groups']]}
    return dict(net=ours(model[n] for n in names.values()), ema=ours(shadow), opt=opt,
                step=int(saved['step']), args=dict(args, official=True))


# ---------------------------------------------------------------- the files of EDM and PFGM++

DDPMPP = dict(embedding_type='positional', encoder_type='standard', decoder_type='standard',
              channel_mult_noise=1, channel_mult_emb=4, resample_filter=[1, 1])
NCSNPP = dict(DDPMPP, embedding_type='fourier', encoder_type='residual', channel_mult_noise=2,
              resample_filter=[1, 3, 3, 1])
EDM_DEFAULTS = dict(DDPMPP, model_type='DhariwalUNet', model_channels=128, num_blocks=4,
                    channel_mult=[1, 2, 2, 2], attn_resolutions=[16], dropout=0.1, sigma_data=0.5)


def edm_args(saved, path):
    """Our args, from the state of their EMA and what its constructor was given."""
    if not isinstance(saved, dict) or 'ema' not in saved:
        raise BadInput(f'--ckpt {path}: no ema in it; give the network-snapshot beside it')
    state = saved['ema']['state']
    given = {**EDM_DEFAULTS, **state['_init_kwargs'], **state}
    kind, look = saved['ema']['class_name'] + ' of ', {k: given[k] for k in DDPMPP}
    kind += {'DhariwalUNet': 'ADM'}.get(given['model_type'], given['model_type'])
    if kind != 'EDMPrecond of SongUNet' or look not in (DDPMPP, NCSNPP):
        raise BadInput(f'--ckpt {path}: {kind[:60]}; of the networks of EDM and PFGM++ accepted: '
                       'EDMPrecond of SongUNet, DDPM++ or NCSN++ (not ADM, nor the baselines)')
    D = float(given['D']) if any(given.get(k) for k in ('pfgmpp', 'pfgmv2', 'pfgm')) else math.inf
    return dict(
        BEFORE_D, image_size=int(given['img_resolution']), channels=int(given['img_channels']),
        nf=int(given['model_channels']), ch_mult=[int(mult) for mult in given['channel_mult']],
        num_blocks=int(given['num_blocks']), attn=[int(size) for size in given['attn_resolutions']],
        dropout=float(given['dropout']), classes=int(given['label_dim']), ncsnpp=look == NCSNPP,
        label_first=True, method='pfgmpp', D=D, sigma_data=float(given['sigma_data']), edm=True,
        z_min=EDM.low * pfgm.unit(D), z_max=EDM.high * pfgm.unit(D), z_exp=0.0, gamma=5.0,
        upper_norm=None)


def read_edm(path, whole):
    """A training-state or network-snapshot in our own form: of it only the EMA, a quarter, is read;
    with `whole` also net and opt, where they are there."""
    def fitted(ours, t):
        layer = f'.{ours}'.split('.')[-2]
        if layer in ('q', 'k', 'v'):
            t = t['qkv'.index(layer)::3]
        if layer in ('q', 'k', 'v', 'out'):  # there a 1 x 1 convolution
            t = t.reshape(t.shape[:2])
        if layer == 'conv_out':  # and v_z, of which a denoiser makes no use
            t = torch.cat([t, torch.zeros_like(t[:1])])
        return t.contiguous()

    def ours(parts, names):
        if sum(4 * math.prod(parts[name]['size']) for name in set(names.values())) > claimable:
            raise ValueError('its parts claim more bytes than it has')
        return {k: fitted(k, tensor(parts[name])) for k, name in names.items()}
    claimable = os.path.getsize(path)
    with open(path, 'rb') as file:
        saved, tensor = open_pickle(file)
        args = edm_args(saved, path)
        parts = tensors_of(saved['ema'], 'model')
        names = edm_names(blank(args, len(parts), path), parts)
        found = dict(ema=ours(parts, names), step=0, args=args)
        if whole and 'net' in saved:
            found['net'] = ours(tensors_of(saved['net'], 'model'), names)
        opt = saved.get('optimizer_state') or {}
        if state := opt.get('state'):
            step = state[0]['step']
            step = found['step'] = int(tensor(step) if isinstance(step, dict) else step)
        if state and whole:
            order = [name for name in parts if name.endswith(('weight', 'bias'))]
            group = {k: opt['param_groups'][0][k] for k in ('lr', 'betas', 'eps', 'weight_decay')}
            names.pop('freq', None)
            group['params'] = list(range(len(names)))
            rows = zip(*(ours({order[i]: row[k] for i, row in state.items()}, names).values()
                         for k in ('exp_avg', 'exp_avg_sq')))
            state = {i: dict(step=torch.tensor(float(step)), exp_avg=m, exp_avg_sq=v)
                     for i, (m, v) in enumerate(rows)}
            found['opt'] = dict(param_groups=[group], state=state)
        return found


# ---------------------------------------------------------------- the folder of a run

def in_folder(path):
    """An argparse type: the ckpt.pt of a folder, else the path itself."""
    return os.path.join(path, 'ckpt.pt') if os.path.isdir(path) else path


def read_given(flag, path, taught=False):
    """read_checkpoint() of the whole file that `flag` gave, to go on from it; what is `taught` by
    it starts from its EMA, at step 0."""
    with given_by(f'--{flag}'):
        saved = read_checkpoint(path, whole=True)
    if taught:
        saved = dict(ema=saved['ema'], step=0, args=saved['args'])
    if taught or saved['args']['edm']:  # of which a snapshot is the EMA alone
        saved.setdefault('net', {k: v.clone() for k, v in saved['ema'].items()})
    elif not {'net', 'opt'} <= saved.keys():
        raise BadInput(f'--{flag} {path}: holds the EMA only; training needs the whole checkpoint')
    return saved


def check_data(args, old, where, mend):
    """BadInput unless args.dataset has the images that a run was made with: as many, of the same
    names and labels. Files that do not tell must have the same path."""
    paths = [str(p) if str(p) in datasets.SETS else os.path.realpath(str(p))
             for p in (args.dataset, old.get('dataset'))]
    known = old.get('data') if paths[0] not in datasets.SETS else None
    told = 3 if old.get('classes') else 2  # the third is of the labels
    if paths[0] == paths[1] if known is None else known[:told] == args.data[:told]:
        return
    classes = [', '.join(map(str, names)) for names in (old.get('class_names'), args.class_names)
               if names]
    differ = (f'classes {" there, ".join(classes)} here' if len({*classes}) > 1 else
              f'{known[0]} images there, {args.data[0]} here' if known and
              known[:1] != args.data[:1] else 'other names of the images, or other labels')
    raise BadInput(f'--dataset {args.dataset}: {where} on {old.get("dataset")}; {mend}'
                   + f' ({differ})' * (known is not None))


def for_classes(saved, count):
    """A checkpoint for another number of classes, or others: step 0, no optimizer, and a new label
    layer of zeros, with which the network begins as what it was without a label."""
    parts, first = {}, saved['args']['label_first']
    for part in ('net', 'ema'):
        state, weight = dict(saved[part]), saved[part]['embed.0.weight']
        bias = state.pop('label.bias', weight.new_zeros(weight.shape[first]))
        state.pop('label.weight', None)
        if count:
            state.update({'label.weight': torch.zeros(len(bias), count), 'label.bias': bias})
        else:
            state['embed.0.bias'] = state['embed.0.bias'] + (weight @ bias if first else bias)
        parts[part] = state
    return dict(parts, step=0, args=saved['args'])


def open_run(args):
    """(checkpoint to go on from, the flag that gave it), or None twice. A damaged one of --out_dir
    is named and the one before it is used."""
    newest = os.path.join(args.out_dir, 'ckpt.pt')
    older = sorted(glob.glob(os.path.join(glob.escape(args.out_dir), 'ckpt-*.pt')), reverse=True)
    paths = [path for path in (newest, *older) if os.path.exists(path)]
    for path, following in zip(paths, [*paths[1:], None]):
        try:
            saved = read_given('out_dir', path)
        except BadInput as error:
            if following is None:
                raise
            print(f'{error}; going back to {following}', file=sys.stderr)
            continue
        check_data(args, saved['args'], f'--out_dir {args.out_dir} holds a run',
                   f'give another --out_dir, with --init_from {path} to go on from its network')
        return saved, 'out_dir'
    kept = os.listdir(args.out_dir) if os.path.isdir(args.out_dir) else []
    kept = [name for name in kept if not any(glob.glob(  # folders of other runs may be in it
        glob.escape(os.path.join(args.out_dir, name)) + f'{deep}/log.jsonl')
        for deep in ('', '/*', '/*/*'))]
    if kept and 'log.jsonl' not in kept:  # a run killed before its first checkpoint left a log
        raise BadInput(f'--out_dir {args.out_dir}: not empty, and not a run of train.py; '
                       'give another --out_dir')
    flag = next((k for k in ('reflow', 'distill', 'init_from') if getattr(args, k)), None)
    if flag is None:
        return None, None
    path, teacher = getattr(args, flag), flag != 'init_from'
    saved = read_given(flag, path, taught=teacher or args.consistency)
    if teacher and 'dataset' in saved['args']:  # the authors' files do not say
        check_data(args, saved['args'], f'--{flag} {path} was trained',
                   f'give --dataset {saved["args"]["dataset"]}')
    return saved, flag


# ---------------------------------------------------------------- a flow to follow

SOLVERS = ('rk45', *pfgm.SOLVERS, 'ddim', 'renew')
EDM_NFE = 35  # calls with which EDM and PFGM++ published CIFAR-10: 18 steps of heun


def place_for(args):
    """setup(), on the CPU where the exact field would have no float64."""
    device, rank, world = setup(args.device)
    if args.exact and device.type == 'mps':
        print('--exact: in float64, which mps lacks; on the CPU')
        device = torch.device('cpu')
    return device, rank, world


def flow_flags(p):
    """p with the flags that say which flow to follow and how, shared with evaluate.py."""
    p.add_argument('--ckpt', type=in_folder, default='out/ckpt.pt', help='ours or one of the '
                   'authors, or the folder of a run')
    p.add_argument('--weights', default='ema', choices=('ema', 'raw'))
    p.add_argument('--exact', action='store_true', help='follow the field of --dataset instead')
    p.add_argument('--dataset', default=None, help='of --exact (default: glyphs); or what the '
                   'checkpoint was trained on (default: as it says)')
    p.add_argument('--data_dir', default='data')
    p.add_argument('--image_size', type=above(0, int), default=None, help='of --exact')
    p.add_argument('--batch_size', type=above(0, int), default=64, help='images at a time')
    p.add_argument('--solver', choices=SOLVERS, default=None, help='default: rk45, or where --nfe '
                   'is given unipc (official checkpoints: heun; those of EDM and PFGM++: heun from '
                   f'{EDM_NFE} calls on, unipc below)')
    p.add_argument('--eta', type=above(-1e-9, below=1.001), default=0.0, help='fresh noise of ddim:'
                   ' 0 none (it is euler), 1 ancestral sampling of DDPM (default: 0)')
    p.add_argument('--nfe', type=above(0, int), default=None,
                   help='network calls an image, of all solvers but rk45 (default: 100; '
                   f'of one of --distill or --consistency 1, of EDM or PFGM++ {EDM_NFE})')
    p.add_argument('--schedule', choices=(*pfgm.SCHEDULES, 'time'), default=None, help='planes of '
                   'the steps (default: radius; official checkpoints: log; EDM and PFGM++ by heun: '
                   'rho7); time: even in the t of vp, subvp, ddpm and rf')
    p.add_argument('--z_min', type=above(0), default=None, help='the last plane (default: 1e-3 in '
                   'PFGM and 0.002 sqrt(D) in PFGM++; with --nfe up to 5 sqrt(D) / nfe^2, but not '
                   'by heun on networks of EDM and PFGM++)')
    p.add_argument('--to_data', action=argparse.BooleanOptionalAction, default=None, help='make '
                   'the last call on z_min and go straight to z = 0 (default: not with rk45, nor '
                   'for official checkpoints)')
    p.add_argument('--classes', type=unless('none', [], lambda text: text.split(',')), default=None,
                   metavar='0,7,...', help='labels of the images or their names (cat,dog), in '
                   'turn, or none (default: all, of a network trained with them)')
    p.add_argument('--guidance', type=above(-1e-9, below=1e3), default=1.0, help='classifier-free; '
                   'other than 1 it takes two calls for each (default: 1)')
    p.add_argument('--tol', type=above(0), default=1e-4, help='rtol and atol of rk45')
    p.add_argument('--small_z', choices=('exact', 'official'), default=None,
                   help='v_z below z_exp (default: exact; official for official checkpoints)')
    p.add_argument('--bf16', action=argparse.BooleanOptionalAction, default=None, help='bfloat16 '
                   'autocast (default: where it is fast, not for official checkpoints; '
                   'never with rk45)')
    p.add_argument('--compile', action='store_true', help='torch.compile the network')
    p.add_argument('--seed', type=above(-1, int), default=0)
    p.add_argument('--device', default='auto')
    return p


def load_flow(args, device):
    """(Flow, the images of --exact or None)."""
    if args.solver == 'rk45' and args.nfe:
        print(f'--nfe {args.nfe} is not used: rk45 makes the calls that --tol {args.tol} asks for')
    images, about = None, {}
    if args.exact:
        images = datasets.load(args.dataset or 'glyphs', args.data_dir, args.image_size)
        keep_freed_memory()
        net = pfgm.ExactField(datasets.charges_of(images, '--exact', device, dtype=torch.float64))
        saved = dict(datasets.flow_constants(images, args.dataset), z_exp=0.0,  # v_z needs no help
                     D=1.0, classes=0, channels=images.channels, image_size=images.image_size)
    else:
        net, saved = load_checkpoint(args.ckpt, args.weights)
        net.requires_grad_(False).to(device, memory_format=torch.channels_last)
        about = dict(class_names=saved.get('class_names'), step=saved['step'], weights=args.weights)
        if args.compile:
            net.compile()
        if saved.get('official'):
            name = args.dataset or datasets.OFFICIAL_BY_SIZE.get(saved['image_size'])
            if name not in datasets.OFFICIAL:
                raise BadInput(f'--dataset {name}: an official checkpoint belongs to one of '
                               + ', '.join(datasets.OFFICIAL))
            saved = {**saved, 'dataset': name, **datasets.flow_constants(None, name)}
        net.dataset = saved.get('dataset')  # the name of what it was trained on
        if saved.get('source'):  # the data set that the flow starts from
            start = datasets.load(getattr(args, 'start', None) or saved['source'], args.data_dir,
                                  saved['image_size'], saved['channels'], flag='--from')
            net.source = datasets.charges_of(start, '--from')
    official, edm, fresh = (saved.get(k, False) for k in ('official', 'edm', 'consistency'))
    student = bool(fresh or saved.get('distill'))
    nfe = args.nfe or (1 if student else EDM_NFE if edm and not args.solver else None)
    how = dict(nfe=nfe or 100, z_last=args.z_min, bf16=fast_bf16(device), solver=(
        'renew' if fresh else 'rk45' if not nfe else
        'heun' if official or edm and nfe >= EDM_NFE else 'unipc'))
    if official:
        how.update(schedule='log', small_z='official', to_data=False, bf16=False)
    if edm:
        how.update(schedule=None, bf16=False)
    how.update({k: v for k, v in vars(args).items() if k in SAMPLING and v is not None})
    flow = flow_of(net, saved, **how, **about, student=student)
    flow.z_min, flow.bf16 = args.z_min or flow.z_min, flow.bf16 and not args.exact
    check_flow(args, flow)
    return flow, images


def check_flow(args, flow):
    """The flags that this flow does not take; and its classes as a list."""
    known, names = flow.known, flow.known and getattr(flow, 'class_names', None) or []
    wanted = [*range(known)] if args.classes is None else [
        names.index(word) if word in names else int(word) if word.isdecimal() and
        not any(map(str.isdecimal, names)) else known for word in args.classes]  # known: is none
    knows = (f'0 to {known - 1}' if known and names in ([], [*map(str, range(known))]) else
             ', '.join(names) or 'none; leave it out, or train with --classes')
    for wrong, message in (
        (args.schedule == 'time' and not hasattr(flow.net, 'planes'), '--schedule time: only vp, '
         f'subvp, ddpm and rf have a time; give one of {", ".join(pfgm.SCHEDULES)}'),
        (args.eta and flow.solver != 'ddim', f'--eta {args.eta}: belongs to --solver ddim, not '
         + flow.solver),
        ((args.eta or flow.solver == 'renew') and (getattr(args, 'encode', None) or getattr(
            args, 'interpolate', None)), f'--solver {flow.solver}, --eta {args.eta}: fresh noise '
         'cannot be encoded; give another'),
        (flow.solver == 'ddim' and flow.D != math.inf, '--solver ddim: adds Gaussian noise, '
         'for D = inf only (vp, subvp, ddpm, rf, pfgmpp with --D inf)'),
        ((args.z_min or 0) >= flow.z_max, f'--z_min {args.z_min}: must be below z_max '
         f'{flow.z_max:.4g}'),
        (args.compile and args.exact, '--compile: --exact has no network; leave it out'),
        (args.guidance != 1 and not known, f'--guidance {args.guidance}: the network knows no '
         'classes; leave it out, or train with --classes'),
        (max(wanted, default=-1) >= known, f'--classes {",".join(args.classes or ())}: the network '
         f'knows {knows}'),
        (args.tol < (1e-12 if args.exact else 1e-7), f'--tol {args.tol}: finer than the float'
         + ('64, in which this field is computed, ' if args.exact else '32 of a network ')
         + 'can tell; give ' + ('1e-12' if args.exact else '1e-7') + ' or more'),
    ):
        if wrong:
            raise BadInput(message)
    flow.classes = wanted


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
