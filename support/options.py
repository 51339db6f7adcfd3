"""How the flags of train.py that were left open are filled and checked. You need not read it to
understand the method.

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
# What may change when a run is resumed, with a line that says so, and what without one.
TUNED = ('lr', 'warmup', 'decay', 'grad_clip', 'batch_size', 'accum', 'workers', 'dataset')
FREE_ON_RESUME = (*TUNED, 'out_dir', 'data_dir', 'steps', 'device', 'bf16', 'compile', 'log_every',
                  'sample_every', 'save_every', 'keep', 'timeout', 'init_from', 'data',
                  'class_names')


def fill(flags, preset, has_preset, images, origin, world):
    """The mapping of flags with nothing left open, as training uses it and as a checkpoint keeps it.

    flags: as parsed, None where not given. preset: a mapping, for what nothing else says;
    has_preset: whether it was made for this data set. images: the data set. origin: a run.Origin.
    world: the number of processes. Raises BadInput for flags that contradict one another, the data,
    or the checkpoint."""
    flags = dict(flags)
    row = dict(preset)
    old = origin.saved['args'] if origin.saved else {}
    teacher = flags['reflow'] or flags['distill']
    flags['edm'] = old.get('edm', False)
    if teacher:
        check_teacher(flags, old)

    # A run that is resumed keeps its own values, in case the preset has changed since. A network
    # that is taken over keeps its own architecture.
    kept = row if origin.resumed else (*ARCHITECTURE, 'muon', 'skip')
    row.update({key: old[key] for key in kept if key in old})

    # The method, and the constants of its flow.
    of_file = old if flags['init_from'] or flags['edm'] or teacher else {}
    flags['source'] = flags['source'] or of_file.get('source')
    flags.update(method_and_D(flags, row, of_file, teacher))
    for key, value in OF_FLOW.items():
        if flags[key] is None:
            flags[key] = of_file.get(key, value)
    if flags['method'] == 'pfgm':
        row.update(flow_constants(images, flags['preset'] or flags['dataset'], flags['sigma'],
                                  flags['tau'], flags['gamma']))
    else:  # constants that do not depend on the data, and no charge but the image itself
        flow = as_flow(None, flags)
        row.update(field_batch=1, M=None, upper_norm=None, z_exp=0.0, z_min=flow.low * flow.unit,
                   z_max=flow.high * flow.unit)
    if of_file.get('D') == flags['D'] and of_file['method'] in (flags['method'], 'pfgm'):
        row.update(constants_of_file(of_file))
    if teacher:
        row['z_exp'] = 0.0  # a denoiser's v_z is exact

    # The data.
    flags.update(image_size=images.image_size, channels=images.channels)
    row['flip'] = images.flip
    flags['classes'] = class_count(flags, row, has_preset, images, origin, old, teacher)
    flags.update({key: value for key, value in row.items() if flags[key] is None})
    return check_batches(flags, images, world)


def check_teacher(flags, old):
    """BadInput for flags that do not go with --reflow or --distill."""
    flag = f'--reflow {flags["reflow"]}' if flags['reflow'] else f'--distill {flags["distill"]}'
    if flags['reflow'] and flags['distill'] or flags['consistency']:
        raise BadInput(f'{flag}: --reflow, --distill and --consistency are two runs; give one')
    if flags['init_from']:
        raise BadInput(f'--init_from {flags["init_from"]}: --reflow and --distill go on from their '
                       'teacher; leave it out')
    if flags['field_batch'] not in (None, 1):
        raise BadInput(f'--field_batch {flags["field_batch"]}: the pairs of --reflow and --distill '
                       'have no charges; leave it out')


def method_and_D(flags, row, of_file, teacher):
    """dict(method=, D=): as given, else as the file has them, else as the other flags imply."""
    own = of_file.get('method')
    if teacher:
        own = method_of_student(of_file, flags['reflow'], flags['distill'])
    method = flags['method'] or own
    if method is None:
        ncsnpp = row['ncsnpp'] if flags['ncsnpp'] is None else flags['ncsnpp']
        method = 'pfgmpp' if flags['D'] or ncsnpp else 'pfgm'
    if flags['D'] and method != 'pfgmpp':
        raise BadInput(f'--D {flags["D"]:g}: belongs to --method pfgmpp, not {method}')
    D = flags['D'] or of_file.get('D')
    if D is None:
        D = dict(pfgm=1.0, pfgmpp=128.0).get(method, math.inf)
    if teacher:
        other_method = method == 'pfgm' or flags['edm'] and method != own
        if D != of_file['D'] or other_method:
            raise BadInput(f'--method {method}, D {D:g}: a student of {teacher} is a denoiser of '
                           f'its D, {of_file["D"]:g}; leave out --D and --method')
    return dict(method=method, D=D)


def constants_of_file(of_file):
    """The constants of the flow of a checkpoint of the same method."""
    if of_file.get('official') and of_file['image_size'] in OFFICIAL_BY_SIZE:
        return flow_constants(None, OFFICIAL_BY_SIZE[of_file['image_size']])
    return {key: of_file[key] for key in (*BY_DATA, 'z_min') if key in of_file}


def class_count(flags, row, has_preset, images, origin, old, teacher):
    """How many classes the network is trained on; 0: without labels."""
    wanted = flags['classes']
    if teacher:
        wanted = old['classes'] > 0
    if wanted is None:  # as the file has it, else the preset, if it was made for this data set
        usable = images.labels is not None and not flags['source']
        wanted = row['classes'] and (origin.saved or has_preset) and usable
    return images.class_count() if wanted else 0


def check_batches(flags, images, world):
    """The flags, with all images as charges where field_batch would not be fewer; BadInput for
    batches that cannot be shared out."""
    alone = flags['field_batch'] == 1 and flags['method'] != 'pfgm'  # each image its own charge
    if not alone and flags['field_batch'] != 'all' and flags['field_batch'] >= len(images):
        flags['field_batch'] = len(images) if images.pixels is None else 'all'
    if flags['z_min'] >= flags['z_max']:
        raise BadInput(f'--z_min {flags["z_min"]}: must be below --z_max {flags["z_max"]:.4g}')
    if flags['batch_size'] % (world * flags['accum']):
        raise BadInput(f'--batch_size {flags["batch_size"]}: must be a multiple of {world} '
                       f'processes x --accum {flags["accum"]}')
    if not alone and flags['field_batch'] != 'all' and flags['field_batch'] < flags['batch_size']:
        raise BadInput(f'--field_batch {flags["field_batch"]}: the {flags["batch_size"]} points of '
                       'a step are among its charges; at least --batch_size')
    return flags


# ---------------------------------------------------------------- against a checkpoint

def differences(flags, old, keys):
    """[(key, its value here, its value in the checkpoint)] of those that differ; a tuple is the
    same as a list."""
    found = []
    for key in keys:
        if key not in old:
            continue
        here, there = flags[key], old[key]
        here = list(here) if isinstance(here, tuple) else here
        there = list(there) if isinstance(there, tuple) else there
        if here != there:
            found.append((key, here, there))
    return found


def check_resume(flags, old):
    """BadInput where a flag that changes what is trained is not what it was when the run began; a
    line says what has changed of those that may."""
    fixed = [key for key in flags if key not in FREE_ON_RESUME]
    for key, here, there in differences(flags, old, fixed):
        raise BadInput(f'--{key} {here}: the run in --out_dir {flags["out_dir"]} has {there}; keep '
                       'it, or give another --out_dir')
    changed = [f'--{key} {here} (it was {there})'
               for key, here, there in differences(flags, old, TUNED)]
    if changed:
        say(f'going on with {", ".join(changed)}')
    if flags['steps'] > old['steps']:
        rises = []
        if flags['decay']:
            rises.append('the learning rate falls to 0 there only; it rises again')
        if flags['consistency']:
            rises.append('the levels of --consistency lie further apart again')
        if rises:
            say(f'--steps {flags["steps"]} (it was {old["steps"]}): {"; ".join(rises)}')


def check_origin(flags, origin):
    """Whether the network of `origin` is trained on other classes than before, so that it needs a
    new label layer and starts at step 0. BadInput where a flag contradicts it; a line says what it
    brings and what differs."""
    old = dict(origin.saved['args'])
    if origin.flag != 'init_from':  # a student's method follows from its teacher's
        old['method'] = flags['method']
    flag = f'--{origin.flag} {origin.path}'
    free = ('attn', 'dropout', 'classes')
    fixed = [key for key in sorted(ARCHITECTURE) if key not in free]
    for key, here, there in differences(flags, old, ('method', 'muon', 'skip', *fixed)):
        if isinstance(there, bool):
            mend = f'--{key}' if there else f'--no-{key}'
        elif isinstance(there, list):
            mend = f'--{key} {" ".join(map(str, there))}'
        else:
            mend = f'--{key} {there}'
        raise BadInput(f'--{key} {here}: {flag} has {there}; give {mend}')

    keys = ['D', *OF_FLOW]
    if flags['D'] == old['D']:
        keys += [*BY_DATA, 'z_min']
    line = f'{flag}: its network, {flags["method"]}, D {flags["D"]:g} and constants'
    changed = differences(flags, old, keys)
    if changed:
        line += ', but ' + ', '.join(f'--{key} {here} (it has {there})'
                                     for key, here, there in changed)
    names_here, names_there = flags['class_names'], old.get('class_names')
    renamed = flags['classes'] and names_here and names_there and names_here != names_there
    other_classes = flags['classes'] != old['classes'] or bool(renamed)
    if other_classes:
        line += (f'; for {flags["classes"]} classes, not its {old["classes"]}, with a new label '
                 'layer and from step 0')
    say(line)
    return other_classes
