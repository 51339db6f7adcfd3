"""How the flags of train.py that were left open are filled, and how flags are checked. You need not
read it to understand the method.

A flag that nobody gave is None. It is filled, in this order, from the run in --out_dir, from the
checkpoint that --init_from, --reflow or --distill names, from the data, and from the preset.
"""
import math

from support.cli import BadInput, say
from support.methods import as_flow, flow_constants
from support.networks import ARCHITECTURE
from support.published import OFFICIAL_BY_SIZE
from support.students import method_of_student

BY_DATA = ('M', 'z_max', 'upper_norm', 'z_exp')  # the constants of methods.flow_constants()
OF_FLOW = dict(sigma_data=0.5, sigma=0.01, tau=0.03, gamma=5.0)  # constants of any data

# Flags that may change when a run is resumed. Of the first a line says that they have changed.
TUNED = ('lr', 'warmup', 'decay', 'grad_clip', 'batch_size', 'accum', 'workers', 'dataset')
FREE_ON_RESUME = (*TUNED, 'out_dir', 'data_dir', 'steps', 'device', 'bf16', 'compile', 'log_every',
                  'sample_every', 'save_every', 'keep', 'timeout', 'init_from', 'data',
                  'class_names')


# ---------------------------------------------------------------- what was left open

def fill(flags, preset, has_preset, images, origin, world):
    """The mapping of flags with nothing left open, as training uses it and a checkpoint keeps it.

    flags: as parsed, None where not given. preset: the mapping that is used where nothing else
    says; has_preset: whether it was made for this data set. images: the data set. origin: a
    run.Origin. world: the number of processes. Raises BadInput for flags that contradict one
    another, the data, or the checkpoint."""
    flags = dict(flags)
    default = dict(preset)
    saved = origin.saved['args'] if origin.saved else {}  # the flags that the checkpoint keeps
    teacher = flags['reflow'] or flags['distill']
    flags['edm'] = saved.get('edm', False)  # no flag: whether the network is one of EDM's authors
    if teacher:
        check_student(flags)

    # A run that is resumed keeps its own values, in case the preset has changed since. A network
    # that is taken over keeps its architecture.
    kept = preset if origin.resumed else (*ARCHITECTURE, 'muon', 'skip')
    default.update({key: saved[key] for key in kept if key in saved})

    # The flow: that of the network that is taken over, or else as the flags say. (A run that is
    # resumed is given its flags again; check_resume() compares them.)
    taken = saved if flags['init_from'] or teacher or flags['edm'] else {}
    flags['source'] = flags['source'] or taken.get('source')
    flags.update(method_and_D(flags, default, taken, teacher))
    for key, value in OF_FLOW.items():
        if flags[key] is None:
            flags[key] = taken.get(key, value)
    if flags['method'] == 'pfgm':
        default.update(flow_constants(images, flags['preset'] or flags['dataset'], flags['sigma'],
                                      flags['tau'], flags['gamma']))
    else:  # constants that do not depend on the data, and no charge but the image itself
        flow = as_flow(None, flags)
        default.update(field_batch=1, M=None, upper_norm=None, z_exp=0.0,
                       z_min=flow.low * flow.unit, z_max=flow.high * flow.unit)
    if taken.get('D') == flags['D'] and taken['method'] in (flags['method'], 'pfgm'):
        default.update(constants_of(taken))
    if teacher:
        default['z_exp'] = 0.0  # a denoiser's v_z is exact

    # The data.
    flags.update(image_size=images.image_size, channels=images.channels)
    flags['classes'] = class_count(flags, default, has_preset, images, origin)
    # In a mirror a left hand is a right one, and labels may say which it is.
    default['flip'] = images.flip and (not flags['classes'] or images.is_known_set)

    # Everything else.
    for key, value in default.items():
        if flags[key] is None:
            flags[key] = value
    if has_charges(flags) and flags['field_batch'] != 'all':
        if flags['field_batch'] >= len(images):
            flags['field_batch'] = 'all' if images.pixels is not None else len(images)
    check_batches(flags, world)
    return flags


def check_student(flags):
    """Raise BadInput for flags that do not go with --reflow or --distill."""
    flag = f'--reflow {flags["reflow"]}' if flags['reflow'] else f'--distill {flags["distill"]}'
    if flags['reflow'] and flags['distill'] or flags['consistency']:
        raise BadInput(f'{flag}: --reflow, --distill and --consistency are two runs; give one')
    if flags['init_from']:
        raise BadInput(f'--init_from {flags["init_from"]}: '
                       '--reflow and --distill go on from their teacher; leave it out')
    if flags['field_batch'] not in (None, 1):
        raise BadInput(f'--field_batch {flags["field_batch"]}: '
                       'the pairs of --reflow and --distill have no charges; leave it out')


def method_and_D(flags, default, taken, teacher):
    """dict(method=, D=): as given, else as in the flags `taken` from a checkpoint, else as other
    flags imply."""
    taken_method = taken.get('method')
    if teacher:
        taken_method = method_of_student(taken, flags['reflow'], flags['distill'])
    method = flags['method'] or taken_method
    if method is None:
        ncsnpp = default['ncsnpp'] if flags['ncsnpp'] is None else flags['ncsnpp']
        method = 'pfgmpp' if flags['D'] or ncsnpp else 'pfgm'
    if flags['D'] and method != 'pfgmpp':
        raise BadInput(f'--D {flags["D"]:g}: belongs to --method pfgmpp, not {method}')
    D = flags['D'] or taken.get('D')
    if D is None:
        D = dict(pfgm=1.0, pfgmpp=128.0).get(method, math.inf)
    if teacher:
        unfit = method == 'pfgm' or flags['edm'] and method != taken_method
        if unfit or D != taken['D']:
            raise BadInput(f'--method {method}, D {D:g}: a student of {teacher} is a denoiser of '
                           f'its D, {taken["D"]:g}; leave out --D and --method')
    return dict(method=method, D=D)


def constants_of(taken):
    """The constants of the flow of a checkpoint with these flags."""
    if taken.get('official') and taken['image_size'] in OFFICIAL_BY_SIZE:
        return flow_constants(None, OFFICIAL_BY_SIZE[taken['image_size']])
    return {key: taken[key] for key in (*BY_DATA, 'z_min') if key in taken}


def class_count(flags, default, has_preset, images, origin):
    """How many classes the network is trained on; 0 where it is trained without labels.

    A student is trained on them if its teacher was. Without --classes or --no-classes a network
    that is taken over stays what it was, and the preset decides for its own data set."""
    wanted = flags['classes']
    if flags['reflow'] or flags['distill']:
        wanted = origin.saved['args']['classes'] > 0
    if wanted is None:
        decided = origin.saved or has_preset
        usable = images.labels is not None and not flags['source']
        wanted = default['classes'] and decided and usable
        if usable and not wanted and not images.is_known_set:
            say(f'{images.given}: {images.classes_in_words()}; --classes trains on them')
    return images.class_count() if wanted else 0


# ---------------------------------------------------------------- batches and charges

def has_charges(flags):
    """Whether the target is the field of several charges; else each image is its own charge."""
    return flags['method'] == 'pfgm' or flags['field_batch'] != 1


def check_batches(flags, world):
    """Raise BadInput for planes in the wrong order, and for batches that cannot be shared out."""
    if flags['z_min'] >= flags['z_max']:
        raise BadInput(f'--z_min {flags["z_min"]}: must be below --z_max {flags["z_max"]:.4g}')
    if flags['batch_size'] % (world * flags['accum']):
        raise BadInput(f'--batch_size {flags["batch_size"]}: must be a multiple of {world} '
                       f'processes x --accum {flags["accum"]}')
    if has_charges(flags) and flags['field_batch'] != 'all':
        if flags['field_batch'] < flags['batch_size']:
            raise BadInput(f'--field_batch {flags["field_batch"]}: the {flags["batch_size"]} '
                           'points of a step are among its charges; at least --batch_size')


# ---------------------------------------------------------------- against a checkpoint

def differences(flags, saved, keys):
    """[(key, its value here, its value in the checkpoint)] of the keys whose values differ. A key
    that the checkpoint lacks does not count, and a tuple is the same as a list."""
    differing = []
    for key in keys:
        if key not in saved:
            continue
        here = as_list(flags[key])
        there = as_list(saved[key])
        if here != there:
            differing.append((key, here, there))
    return differing


def as_list(value):
    """A tuple as a list, anything else as it is."""
    return list(value) if isinstance(value, tuple) else value


def check_resume(flags, saved):
    """Raise BadInput where a flag that changes what is trained is not what it was when the run
    began, and say what has changed of those that may.

    saved: the flags that the run's checkpoint keeps."""
    fixed = [key for key in flags if key not in FREE_ON_RESUME]
    for key, here, there in differences(flags, saved, fixed):
        raise BadInput(f'--{key} {here}: the run in --out_dir {flags["out_dir"]} has {there}; '
                       'keep it, or give another --out_dir')
    changed = [f'--{key} {here} (it was {there})'
               for key, here, there in differences(flags, saved, TUNED)]
    if changed:
        say(f'going on with {", ".join(changed)}')
    if flags['steps'] > saved['steps']:
        effects = []
        if flags['decay']:
            effects.append('the learning rate falls to 0 there only; it rises again')
        if flags['consistency']:
            effects.append('the levels of --consistency lie further apart again')
        if effects:
            say(f'--steps {flags["steps"]} (it was {saved["steps"]}): {"; ".join(effects)}')


def check_origin(flags, origin):
    """Raise BadInput where a flag contradicts the network that is taken over from `origin`, and say
    what it brings and what differs."""
    saved = dict(origin.saved['args'])
    if origin.flag != 'init_from':  # a student's method follows from its teacher's
        saved['method'] = flags['method']
    given = f'--{origin.flag} {origin.path}'
    may_differ = ('attn', 'dropout', 'classes')
    must_agree = [key for key in sorted(ARCHITECTURE) if key not in may_differ]
    for key, here, there in differences(flags, saved, ('method', 'muon', 'skip', *must_agree)):
        if isinstance(there, bool):
            mend = f'--{key}' if there else f'--no-{key}'
        elif isinstance(there, list):
            mend = f'--{key} {" ".join(map(str, there))}'
        else:
            mend = f'--{key} {there}'
        raise BadInput(f'--{key} {here}: {given} has {there}; give {mend}')

    line = f'{given}: its network, {flags["method"]}, D {flags["D"]:g} and constants'
    constants = ['D', *OF_FLOW]
    if flags['D'] == saved['D']:
        constants += [*BY_DATA, 'z_min']
    changed = [f'--{key} {here} (it has {there})'
               for key, here, there in differences(flags, saved, constants)]
    if changed:
        line += ', but ' + ', '.join(changed)
    if has_other_classes(flags, saved):
        line += (f'; for {flags["classes"]} classes, not its {saved["classes"]}, '
                 'with a new label layer and from step 0')
    say(line)


def has_other_classes(flags, saved):
    """Whether a network with the flags `saved` needs a new label layer for these flags."""
    if flags['classes'] != saved['classes']:
        return True
    names_here = flags['class_names']
    names_there = saved.get('class_names')
    if not (flags['classes'] and names_here and names_there):
        return False
    return names_here != names_there
