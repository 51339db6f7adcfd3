"""How the flags of train.py that were left open are filled, and how flags are checked. You need not
read it to understand the method.

A flag that nobody gave is None. It is filled, in this order, from the run in --out_dir, from the
checkpoint that --init_from, --reflow or --distill names, from the data, and from the preset.
"""
import math
import os

from support.cli import BadInput, say
from support.images import mean_norm
from support.methods import as_flow, flow_constants
from support.networks import ARCHITECTURE
from support.published import OFFICIAL_BY_SIZE
from support.sets import is_same_set
from support.students import method_of_student
from support.unused import OF_ONE_METHOD, in_training, refuse

# The constants of methods.flow_constants(), and that of a Denoiser.
BY_DATA = ('M', 'z_max', 'upper_norm', 'z_exp', 'data_norm')
OF_FLOW = dict(sigma_data=0.5, sigma=0.01, tau=0.03, gamma=5.0)  # constants of any data

# Flags that may change when a run is resumed. Of the first a line says that they have changed.
TUNED = ('lr', 'warmup', 'decay', 'grad_clip', 'batch_size', 'accum', 'workers', 'dataset',
         'source')
FREE_ON_RESUME = (*TUNED, 'out_dir', 'data_dir', 'steps', 'device', 'bf16', 'compile',
                  'deterministic', 'log_every', 'sample_every', 'save_every', 'keep', 'timeout',
                  'init_from', 'data', 'class_names', 'source_data')


# ---------------------------------------------------------------- what was left open

def fill(flags, preset, has_preset, images, origin):
    """The mapping of flags with nothing left open.

    flags: as parsed, None where not given; their `given` is {name: words} of those that were typed.
    preset: the mapping that is used where nothing else says; has_preset: whether it was made for
    this data set. images: the data set. origin: a run.Origin. Raises BadInput for flags that
    contradict one another, the data, or the checkpoint."""
    flags = dict(flags)
    given = flags.pop('given')
    default = dict(preset)
    saved = origin.saved['args'] if origin.saved else {}  # the flags that the checkpoint keeps
    teacher = flags['reflow'] or flags['distill']
    flags['edm'] = saved.get('edm', False)  # no flag: whether the network is one of EDM's authors
    if teacher:
        check_student(flags)
    elif flags['source'] and flags['field_batch'] not in (None, 1):
        raise BadInput(f'{given["field_batch"]}: charges give the field of noise, and a flow from '
                       'another data set knows the image that each one becomes; leave it out')

    # A run that is resumed keeps its own values, in case the preset has changed since. A network
    # that is taken over keeps its architecture.
    kept = preset if origin.resumed else (*ARCHITECTURE, 'muon', 'skip')
    default.update({key: saved[key] for key in kept if key in saved})

    # The flow: that of the network that is taken over, or else as the flags say. (A run that is
    # resumed is given its flags again; check_resume() compares them.)
    taken = taken_over(flags, saved)
    flags.update(method_and_D(flags, given, default, taken, origin))
    for key, value in OF_FLOW.items():
        if flags[key] is None:
            flags[key] = taken.get(key)
        if flags[key] is None:  # nor is it of the method of that network
            flags[key] = value
    if flags['method'] == 'pfgm':
        default.update(flow_constants(images, flags['preset'] or flags['dataset'], flags['sigma'],
                                      flags['tau'], flags['gamma']))
    else:  # constants that do not depend on the data, and no charge but the image itself
        flow = as_flow(None, flags)
        default.update(field_batch=1, M=None, upper_norm=None, z_exp=0.0,
                       z_min=flow.low * flow.unit, z_max=flow.high * flow.unit)
        if flags['method'] == 'pfgmpp' and flags['D'] != math.inf:
            default['data_norm'] = mean_norm(images)
    if taken.get('D') == flags['D'] and taken['method'] in (flags['method'], 'pfgm'):
        default.update(constants_of(taken))
    if flags['method'] != 'pfgm':
        default['z_exp'] = 0.0  # a denoiser's v_z is exact

    # The data.
    flags.update(image_size=images.image_size, channels=images.channels)
    flags['classes'] = class_count(flags, default, has_preset, images, origin)
    # In a mirror a left hand is a right one, and labels may say which it is.
    default['flip'] = images.flip and (not flags['classes'] or images.is_known_set)
    if teacher and flags['guidance'] != 1 and not flags['classes']:
        raise BadInput(f'--guidance {flags["guidance"]:g}: {teacher} was trained without classes; '
                       'leave it out')

    # Everything else.
    for key, value in default.items():
        if flags[key] is None:
            flags[key] = value
    if has_charges(flags) and flags['field_batch'] != 'all':
        if flags['field_batch'] >= len(images):
            flags['field_batch'] = 'all' if images.pixels is not None else len(images)
    return flags


def without_unused(flags, given, images, origin):
    """The mapping of flags as a checkpoint keeps it, with None for what belongs to other methods
    and modes. Raises BadInput for a flag that was typed and is not used. flags: as of fill(), whose
    images and origin these are. given: {name: words} of the flags that were typed."""
    unused = in_training(flags, given, images, origin)
    refuse(given, unused, flags)
    return {key: None if key in OF_ONE_METHOD and key in unused else value
            for key, value in flags.items()}


def taken_over(flags, saved):
    """The flags `saved` of a checkpoint where the flow of its network is taken over, else {}."""
    is_new = not (flags['init_from'] or flags['reflow'] or flags['distill'])
    return {} if is_new and not saved.get('edm') else saved


def check_student(flags):
    """Raise BadInput for flags that do not go with --reflow or --distill."""
    flag = f'--reflow {flags["reflow"]}' if flags['reflow'] else f'--distill {flags["distill"]}'
    if flags['reflow'] and flags['distill'] or flags['consistency']:
        raise BadInput(f'{flag}: --reflow, --distill and --consistency are two runs; give one')
    if flags['init_from']:
        raise BadInput(f'--init_from {flags["init_from"]}: '
                       '--reflow and --distill go on from their teacher; leave it out')


def method_and_D(flags, given, default, taken, origin):
    """dict(method=, D=): as typed, else as in the flags `taken` from a checkpoint, else as other
    flags imply: --source rectified flow, --D, --ncsnpp and --consistency a denoiser. Raises
    BadInput for flags that contradict one another."""
    teacher = flags['reflow'] or flags['distill']
    taken_method = taken.get('method')
    if teacher:
        taken_method = method_of_student(taken, flags['reflow'], flags['distill'])
    elif flags['consistency'] and taken_method == 'pfgm':
        taken_method = 'pfgmpp'  # of the same D, as a student of --distill
    ncsnpp = default['ncsnpp'] if flags['ncsnpp'] is None else flags['ncsnpp']
    method = flags['method'] or taken_method
    if method is None:
        method = 'pfgm'
        if flags['source']:
            method = 'rf'
        elif flags['D'] or ncsnpp or flags['consistency']:
            method = 'pfgmpp'
    D = flags['D'] or taken.get('D')
    if D is None:
        D = dict(pfgm=1.0, pfgmpp=128.0).get(method, math.inf)

    if teacher:
        of_other_method = method == 'pfgm' or flags['edm'] and method != taken_method
        if of_other_method or D != taken['D']:
            typed = given['method'] if of_other_method else given['D']
            raise BadInput(f'{typed}: a student of {teacher} is {taken_method} of its D, '
                           f'{taken["D"]:g}; leave it out')
    elif taken_method and method != taken_method:
        told = f'{origin.given} has {taken["method"]}'
        if taken_method != taken['method']:
            told += f', which --consistency takes as {taken_method}'
        raise BadInput(f'{given["method"]}: {told}; give --method {taken_method}')
    if flags['consistency'] and method == 'pfgm':
        raise BadInput(f'{given["method"]}: a field, and --consistency trains a denoiser; '
                       'leave it out')
    whose = f'and not {method}'
    if 'method' not in given and taken_method:
        whose = f'and {origin.given} has {method}'
    if flags['source'] and method != 'rf' and 'source' not in given:
        raise BadInput(f'{given["method"]}: {origin.given} starts from images, as rf alone can; '
                       'leave it out')
    if flags['source'] and method != 'rf':
        raise BadInput(f'{given["source"]}: belongs to --method rf, {whose}; leave it out')
    if flags['D'] and method != 'pfgmpp':
        raise BadInput(f'{given["D"]}: belongs to --method pfgmpp, {whose}; leave it out')
    return dict(method=method, D=D)


def constants_of(taken):
    """The constants of the flow of a checkpoint with these flags."""
    if taken.get('official') and taken['image_size'] in OFFICIAL_BY_SIZE:
        return flow_constants(None, OFFICIAL_BY_SIZE[taken['image_size']])
    return {key: taken[key] for key in (*BY_DATA, 'z_min') if taken.get(key) is not None}


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


def check_batches(flags, given, world):
    """Raise BadInput for planes in the wrong order, and for batches that cannot be shared out.
    given: {name: words} of the flags that were typed, which messages name."""
    z_min = flags['z_min']
    z_max = flags['z_max']
    if z_min >= z_max and 'z_min' in given:
        raise BadInput(f'{given["z_min"]}: must be below z_max, {z_max:.4g}')
    if z_min >= z_max:
        raise BadInput(f'{given["z_max"]}: must be above z_min, {z_min:.4g}')
    if flags['compile'] == 'reduce-overhead' and flags['accum'] > 1:
        raise BadInput(f'{given["compile"]}: its CUDA graphs write each gradient over the last, so '
                       'that they cannot add up; leave out --accum, or give --compile alone')
    batch_size = flags['batch_size']
    if batch_size % (world * flags['accum']):
        typed = given.get('batch_size', given.get('accum', f'{world} processes'))
        raise BadInput(f'{typed}: the {batch_size} points of a step must be a multiple of {world} '
                       f'processes x {flags["accum"]} parts; give another --batch_size or --accum')
    if has_charges(flags) and flags['field_batch'] != 'all':
        if flags['field_batch'] < batch_size:
            typed = given.get('field_batch', given.get('batch_size', f'{batch_size} points a step'))
            raise BadInput(f'{typed}: the {batch_size} points of a step are among its '
                           f'{flags["field_batch"]} charges; give --field_batch {batch_size} '
                           'or more')


# ---------------------------------------------------------------- against a checkpoint

def differences(flags, saved, keys):
    """[(key, its value here, its value in the checkpoint)] of the keys whose values differ. A key
    that the checkpoint lacks, or that has no say in one of the two, does not count, and a tuple is
    the same as a list."""
    differing = []
    for key in keys:
        has_no_say = key in OF_ONE_METHOD and None in (flags[key], saved.get(key))
        if key not in saved or has_no_say:
            continue
        here = comparable(key, flags[key])
        there = comparable(key, saved[key])
        if here != there:
            differing.append((key, here, there))
    return differing


def comparable(key, value):
    """A tuple as a list, a path without what does not change where it leads, and anything else as
    it is."""
    if isinstance(value, tuple):
        return list(value)
    if key in ('dataset', 'source') and value:
        return os.path.normpath(value)
    return value


def in_words(key, value):
    """A flag and its value as they are typed."""
    if isinstance(value, bool):
        return f'--{key}' if value else f'--no-{key}'
    if isinstance(value, (list, tuple)):
        return f'--{key} {" ".join(map(str, value))}'
    return f'--{key} {value}'


def typed_first(differing, given):
    """The rows of differences() with those first whose flags were typed."""
    return sorted(differing, key=lambda row: row[0] not in given)


def check_resume(flags, saved, given):
    """Raise BadInput where a flag that changes what is trained is not what it was when the run
    began, and say what has changed of those that may.

    saved: the flags that the run's checkpoint keeps. given: {name: words} of those that were typed
    now, which messages name."""
    fixed = [key for key in flags if key not in FREE_ON_RESUME]
    for key, here, there in typed_first(differences(flags, saved, fixed), given):
        out_dir = f'--out_dir {flags["out_dir"]}'
        if key in given:
            raise BadInput(f'{given[key]}: the run in {out_dir} has {there}; '
                           'keep it, or give another --out_dir')
        raise BadInput(f'{out_dir}: its run has {key} {there}, not {here}; '
                       f'give {in_words(key, there)}, or another --out_dir')
    changed = [f'{in_words(key, here)} (it was {there})'
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


def check_origin(flags, origin, given):
    """Raise BadInput where a flag contradicts the network that is taken over from `origin`, and say
    what it brings and what differs. given: {name: words} of the flags that were typed."""
    saved = origin.saved['args']
    may_differ = ('attn', 'dropout', 'classes')
    must_agree = [key for key in sorted(ARCHITECTURE) if key not in may_differ]
    differing = differences(flags, saved, ('muon', 'skip', *must_agree))
    for key, here, there in typed_first(differing, given):
        raise BadInput(f'{given.get(key, in_words(key, here))}: {origin.given} has {there}; '
                       f'give {in_words(key, there)}')

    line = f'{origin.given}: its network, {flags["method"]} of D {flags["D"]:g}'
    differing = differences(flags, saved, ('D', 'source', *OF_FLOW, *BY_DATA, 'z_min'))
    if not [key for key, _, _ in differing if key not in given]:
        line += ' and constants'
    changed = [f'{given[key]} (it has {there})' for key, _, there in differing if key in given]
    if changed:
        line += ', but ' + ', '.join(changed)
    if flags['source'] and 'source' not in given:
        line += f', from the images of {flags["source"]}'
    if has_other_classes(flags, saved):
        line += other_classes_in_words(flags, saved)
    elif flags['consistency']:
        line += '; its averaged weights, from step 0'
    elif origin.lacks_optimizer and origin.flag == 'init_from':
        optimizer = 'Muon' if flags['muon'] else 'Adam'
        line += f'; the file has no optimizer state: {optimizer} starts afresh, at step 0'
    say(line)
    unnamed = saved.get('class_names') is None
    if flags['classes'] and unnamed and not has_other_classes(flags, saved) and 'data' not in saved:
        say(f'{origin.given}: its {flags["classes"]} classes, which have no names, are taken for '
            'those here, in order; if they are others, train with --no-classes first')


def has_other_classes(flags, saved):
    """Whether a network with the flags `saved` needs a new label layer for these flags.

    Classes of equal names are the same, and those of the same images. Where one of two sets has no
    names nothing else shows that its classes are the other's. The authors' files say neither: as
    many classes are taken for the same."""
    if flags['classes'] != saved['classes']:
        return True
    if not flags['classes'] or 'data' not in saved:
        return False
    names_here = flags['class_names']
    names_there = saved['class_names']
    if names_here and names_there:
        return names_here != names_there
    return not is_same_set(flags['dataset'], flags['data'], saved['dataset'], saved['data'],
                           with_labels=True)


def other_classes_in_words(flags, saved):
    """What check_origin() says of other classes than those of the network."""
    count = flags['classes']
    if count == 0:
        return f'; without its {saved["classes"]} classes, from step 0'
    if count != saved['classes']:
        which = f'{count} classes, not its {saved["classes"]}'
    elif flags['class_names'] and saved['class_names']:
        which = (f'the classes {", ".join(flags["class_names"])[:200]}, '
                 f'not its {", ".join(saved["class_names"])[:200]}')
    else:
        which = f'{count} classes that may be others than its {count}, since names are missing'
    return f'; for {which}, with a new label layer and from step 0'
