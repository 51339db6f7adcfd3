"""Which flags have no say in what was asked, so that none is given in vain. You need not read it to
understand the method.

Each script has a function here that returns {flag: why} of the flags that its method, solver and
mode do not read. refuse() ends the script where the user typed one of them: "--gamma 50: not used
with --D 128; leave it out". What is not read is not recorded either: a checkpoint keeps None for
it, and so does a line of results.jsonl.
"""
import dataclasses
import math
import os

from support.cli import BadInput, say
from support.optim import warm_decay
from support.sets import SETS

# Flags of place and speed, which commands give out of habit, and values that a network of this size
# or a run of this length does not reach: a line says that they are not used, and nothing ends.
ONLY_SAID = ('data_dir', 'workers', 'timeout', 'attn', 'ema_decay')

# Values that ask for what is done anyway where the flag is not used.
ASKS_NOTHING = dict(guidance=1.0, eta=0.0, bf16=False, classes=[], z_exp=0.0, field_batch=1)


def refuse(given, unused, flags):
    """Raise BadInput for the first flag that was typed and is not used, or say so in a line.

    given: {name: words} of the flags that were typed, see cli.Parser. unused: {name: why}. flags:
    the mapping of all flags."""
    for name, words in given.items():
        asks_nothing = name in ASKS_NOTHING and flags[name] == ASKS_NOTHING[name]
        if name not in unused or asks_nothing:
            continue
        if name in ONLY_SAID:
            say(f'{words}: not used {unused[name]}')
        else:
            raise BadInput(f'{words}: not used {unused[name]}; leave it out')


def first_given(given, names, otherwise):
    """The words of the first of these flags that was typed, or else other words."""
    for name in names:
        if name in given:
            return given[name]
    return otherwise


def is_kept(dataset):
    """Whether it is a known data set that is kept in --data_dir."""
    return dataset in SETS and dataset != 'glyphs'


# ---------------------------------------------------------------- train.py

# What one method or mode alone reads. Elsewhere a checkpoint keeps None for it.
OF_PFGM = ('M', 'sigma', 'tau', 'gamma', 'skip', 'm_draws')
OF_PFGMPP = ('sigma_data', 'data_norm')
OF_STUDENTS = ('pairs', 'guidance')
OF_ONE_METHOD = (*OF_PFGM, *OF_PFGMPP, *OF_STUDENTS, 'flip')  # flip: not of students


def in_training(flags, given, images, origin):
    """{flag: why} of the flags of train.py that are not used.

    flags: the mapping of flags with nothing left open. given: of those that were typed. images: the
    data set. origin: a run.Origin."""
    unused = {}
    saved = origin.saved['args'] if origin.saved else {}
    method = flags['method']
    deciding = ('D', 'method', 'ncsnpp', 'consistency', 'reflow', 'distill', 'init_from')
    with_method = f'with {first_given(given, deciding, f"method {method}")}'
    if method != 'pfgm':
        unused.update(dict.fromkeys(OF_PFGM, with_method))
        unused['z_exp'] = f'{with_method}, where v_z is exact'
    if method != 'pfgmpp':
        unused.update(dict.fromkeys(OF_PFGMPP, with_method))
    elif flags['D'] == math.inf or flags['edm']:
        unused['data_norm'] = 'where sigma is EDM\'s own'
    if flags['source']:
        unused['upper_norm'] = 'by a flow that starts from images'

    # A student is trained on the pairs that its teacher makes, and not on the images.
    teacher = first_given(given, ('reflow', 'distill'), None)
    if teacher is None:
        unused.update(dict.fromkeys(OF_STUDENTS, 'without --reflow or --distill'))
    else:
        unused['flip'] = f'with {teacher}'
        unused['workers'] = f'with {teacher}'
        unused['field_batch'] = f'with {teacher}, whose pairs have no charges'
        if bool(flags['classes']) != (given.get('classes') == '--classes'):
            unused['classes'] = f'with {teacher}, which decides on it'
        if not saved.get('source'):
            unused['source'] = f'with {teacher}, whose flow starts from noise'
    if flags['distill']:
        unused['z_min'] = f'with {teacher}, for samples of one call'
    if flags['consistency']:
        unused['field_batch'] = 'with --consistency, which has no charges'
    if not flags['classes']:
        unused['label_first'] = 'without --classes'
    if origin.resumed and flags['init_from'] != saved.get('init_from'):
        unused['init_from'] = f'with --out_dir {flags["out_dir"]}, which holds a run'

    if images.pixels is not None:
        unused['workers'] = 'with images that are in memory'
    if not (is_kept(flags['dataset']) or is_kept(flags['source'])):
        unused['data_dir'] = f'with --dataset {flags["dataset"]}'
    if 'RANK' not in os.environ:
        unused['timeout'] = 'without torchrun'
    largest = flags['image_size'] // flags['patch']
    sizes = [largest >> level for level in range(len(flags['ch_mult']))]
    if flags['attn'] and not set(sizes) & set(flags['attn']):
        unused['attn'] = f'by images of {", ".join(map(str, sizes))} pixels a side'
    warmest = warm_decay(flags['steps'])
    if flags['ema_decay'] >= warmest:
        unused['ema_decay'] = (f'in {flags["steps"]} steps, in which the average warms up to '
                               f'{warmest:.4g}')
    return unused


# ---------------------------------------------------------------- sample.py

def of_flow(flow):
    """{flag: why} of the flags of sampling that have no say in the images of this flow.Flow."""
    unused = {}
    with_solver = f'with solver {flow.solver}'
    if flow.solver == 'rk45':
        unused['nfe'] = f'{with_solver}, which makes the calls that --tol asks for'
        unused['schedule'] = with_solver
        unused['bf16'] = with_solver
    else:
        unused['tol'] = with_solver
        leads_to_data, _ = flow.ending()
        calls = flow.nfe - leads_to_data  # before the one that leads straight to z = 0
        steps = (calls + 1) // 2 if flow.solver == 'heun' else calls
        first_is_free = flow.first_step_is_free() and leads_to_data
        if steps == 0:
            unused.update(dict.fromkeys(('schedule', 'z_min', 'eta'), 'with one network call'))
        elif steps == 1 and flow.D == math.inf and not first_is_free:
            unused['schedule'] = f'by {flow.solver} with {flow.nfe} calls, which is one step'
    if flow.solver != 'ddim':
        unused['eta'] = f'{with_solver}; it belongs to --solver ddim'
    if not flow.class_count:
        unused['guidance'] = 'by a network that knows no classes'
    elif not flow.classes:
        unused['guidance'] = 'where no labels are followed (--classes)'
    if flow.method is None and flow.solver != 'rk45':
        unused['small_z'] = 'with --exact, where v_z is exact'
    elif flow.method not in (None, 'pfgm'):
        unused['small_z'] = f'with method {flow.method}, where v_z is exact'
    return unused


def of_start(flow):
    """{flag: why} of the flags that have no say in where this flow.Flow starts."""
    return {'seed': 'by a flow that starts from images'} if flow.source is not None else {}


def of_network(flags, flow):
    """{flag: why} of the flags that say which network it is, or which data in its place."""
    unused = {}
    if flags['exact']:
        names = ('ckpt', 'weights', 'compile', 'bf16')
        unused.update(dict.fromkeys(names, 'with --exact, which has no network'))
    else:
        unused['image_size'] = 'without --exact: the network has its own'
        if not flow.is_official():
            unused['dataset'] = 'without --exact: the checkpoint says what it was trained on'
    return unused


def in_sample(flags, flow, given):
    """{flag: why} of the flags of sample.py that are not used to make images of this flow.Flow."""
    unused = {**of_flow(flow), **of_start(flow), **of_network(flags, flow)}
    if flags['encode']:
        unused.update(dict.fromkeys(('seed', 'batch_size', 'start'), 'with --encode'))
        if flow.solver != 'rk45':  # on the way up no call leads to z = 0
            unused.pop('schedule', None)
            unused.pop('z_min', None)
    if flags['interpolate']:
        with_two = f'with {given["interpolate"]}, one row of 8'
        unused.update(dict.fromkeys(('seed', 'n', 'start'), with_two))
    if flags['out'].endswith('.gif'):
        unused['batch_size'] = f'with --out {flags["out"]}, whose images are made together'
    names = [flags[name] for name in ('dataset', 'encode', 'inpaint', 'colorize', 'mask', 'start')]
    names += flags['interpolate'] or []
    if flow.source is not None:
        names.append(flow.source.name)
    if not any(is_kept(name) for name in names):
        unused['data_dir'] = 'where no known data set is read'
    return unused


# ---------------------------------------------------------------- evaluate.py

HOW_TO_FOLLOW = ('solver', 'nfe', 'tol', 'schedule', 'to_data', 'z_min', 'small_z', 'guidance',
                 'eta', 'bf16')
RANDOM_METRICS = {'is', 'kid', 'swd', 'neighbours', 'judge'}  # which take subsets or directions


def of_all(flows):
    """{flag: why} of the flags of sampling that none of the flows uses."""
    of_each = [of_flow(flow) for flow in flows]
    return {name: why for name, why in of_each[0].items()
            if all(name in others for others in of_each)}


def in_evaluate(flags, asked, flows, given, *, trained_on, uses_reference, uses_inception):
    """{flag: why} of the flags of evaluate.py that are not used.

    asked: the names of the metrics. flows: one flow.Flow for each checkpoint, solver and number of
    calls that is measured; none where images are given. trained_on: the data set of the first, or
    None. uses_reference, uses_inception: whether a metric needs these."""
    by_metrics = f'by {" and ".join(asked) or "--save_stats"}'
    of_flows = {'bpd', 'straightness'}  # which follow the lines in ways of their own
    unused = {}
    if flows:
        unused.update(of_all(flows))
        if set(asked) <= of_flows:
            unused.update(dict.fromkeys(HOW_TO_FOLLOW, by_metrics))
        if 'bpd' in asked:
            for name in ('tol', 'z_min'):
                unused.pop(name, None)
            by_rk45 = [dataclasses.replace(flow, solver='rk45') for flow in flows]
            unused.pop('small_z', None)
            unused.update({name: why for name, why in of_all(by_rk45).items() if name == 'small_z'})
        unused.update(of_network(flags, flows[0]))
    else:
        why = f'with {first_given(given, ("samples", "save_stats"), "")}'
        unused.update(dict.fromkeys(('ckpt', 'weights', 'exact', 'compile', *HOW_TO_FOLLOW), why))
        if not uses_reference:  # whose classes are said to be those of the samples
            unused['classes'] = why
        if not flags['samples']:
            unused['image_size'] = why
    if all(flow.source is not None for flow in flows) and not RANDOM_METRICS & set(asked):
        unused['seed'] = by_metrics

    # The network, and what it is compared with.
    if flags['compare']:
        unused['ckpt'] = 'with --compare'
    if flags['ref']:
        unused.pop('image_size', None)
    unused.pop('dataset', None)
    is_named = flags['exact'] or any(flow.is_official() for flow in flows)
    if flags['ref'] and not is_named:
        unused['dataset'] = f'with {given["ref"]}'
    elif not (is_named or uses_reference):
        unused['dataset'] = by_metrics
    if not uses_reference:
        unused['ref'] = by_metrics
    if not uses_inception:
        unused.update(dict.fromkeys(('inception', 'resize'), f'{by_metrics}, without Inception'))
    names = [flags['samples'], flags['ref'] or flags['dataset'] or trained_on]
    if is_named:
        names.append(flags['dataset'])
    names += [flow.source.name for flow in flows if flow.source is not None]
    if 'judge' not in asked and not any(is_kept(name) for name in names):
        unused['data_dir'] = 'where no known data set is read'

    # The work, and where its results go.
    if 'bpd' not in asked:
        unused['repeats'] = 'without --bpd'
    if not flags['sweep']:
        unused['solvers'] = 'without --sweep nfe=5,10,20 (for one solver give --solver)'
    elif flags['solvers'] == ['rk45']:
        unused['sweep'] = 'with --solvers rk45, which makes the calls that it needs'
    if not (flags['sweep'] or 'neighbours' in asked):
        unused['out'] = 'without --sweep, --compare or --neighbours'
    if not asked:
        unused.update(dict.fromkeys(('samples', 'start', 'n', 'results'), by_metrics))
    return unused


def in_reference(flags, asked, images, reference):
    """{flag: why} of the flags of evaluate.py that turn out not to be used when the
    reference.Reference is there. asked: the names of the metrics. images: of --samples, or None."""
    unused = {}
    read = [image_set for image_set in (images, reference.train) if image_set is not None]
    if all(image_set.pixels is not None for image_set in read):
        unused['workers'] = 'with images that are in memory'
    if flags['ref'] and images is None and reference.train is None:
        unused['image_size'] = f'with the statistics of --ref {flags["ref"]}'
    if images is not None and set(asked) == {'neighbours'} and reference.test is None:
        unused['seed'] = 'by neighbours without a test split'
    return unused


# ---------------------------------------------------------------- support/bench.py

def in_bench(flags):
    """{flag: why} of the flags of the bench of solvers that are not used."""
    unused = {}
    if flags['solvers'] == ['rk45']:
        unused['sweep'] = 'with --solvers rk45, which makes the calls that it needs'
    if not is_kept(flags['dataset']):
        unused['data_dir'] = f'with --dataset {flags["dataset"]}'
    return unused
