"""The flags that say which flow to follow and how, of sample.py and evaluate.py alike. You need not
read it to understand the method.
"""
import argparse

import pfgm
from support.checkpoint import in_folder
from support.cli import above, unless
from support.flow import EDM_NFE, SOLVER_NAMES

# What flow.load_flow() and flow.exact_flow() both take, spelled as the flags are.
SAMPLING_FLAGS = ('solver', 'nfe', 'tol', 'schedule', 'z_min', 'to_data', 'small_z', 'classes',
                  'guidance', 'eta', 'seed')


def flow_flags(p):
    """Add to the parser p, in groups, the flags that say which flow to follow and how: they are the
    same in sample.py and evaluate.py. -> the group of those that most people need."""
    yes_or_no = argparse.BooleanOptionalAction
    first = p.add_argument_group('what most people need')
    first.add_argument('--ckpt', type=in_folder, default='out/ckpt.pt',
                       help='a checkpoint, ours or one of the authors, or the folder of a run '
                       '(default: %(default)s)')
    first.add_argument('--nfe', type=above(0, int), default=None,
                       help='network calls an image, with all solvers but rk45 (default: rk45 '
                       'makes as many as --tol asks for, the others 100, networks of --distill or '
                       f'--consistency 1, those of EDM and PFGM++ {EDM_NFE})')
    first.add_argument('--classes', type=unless('none', [], lambda text: text.split(',')),
                       default=None, metavar='0,7,...',
                       help='labels of the images or their names (cat,dog), in turn, or none '
                       '(default: all, where the network was trained with them)')
    first.add_argument('--guidance', type=above(-1e-9, below=1e3), default=1.0,
                       help='classifier-free guidance; other than 1 it doubles the calls '
                       '(default: 1)')
    first.add_argument('--seed', type=above(-1, int), default=0,
                       help='of all noise: image i depends on it and on i (default: 0)')

    network = p.add_argument_group('the network, or the data in its place')
    network.add_argument('--weights', default='ema', choices=('ema', 'raw'),
                         help='the averaged weights, or those of the last step (default: ema)')
    network.add_argument('--exact', action='store_true',
                         help='no network: follow the field of all images of --dataset '
                         '(default: off)')
    network.add_argument('--dataset', default=None,
                         help='of --exact (default: glyphs); or what the checkpoint was trained '
                         'on (default: as it says)')
    network.add_argument('--data_dir', default='data',
                         help='where known data sets are kept (default: data)')
    network.add_argument('--from', dest='start', metavar='IMAGES', default=None,
                         help='what a flow of train.py --source carries across (default: the '
                         'images it was trained with, in turn)')
    network.add_argument('--image_size', type=above(0, int), default=None,
                         help='of --exact, pixels a side (default: as the data is)')

    solver = p.add_argument_group('the solver')
    solver.add_argument('--solver', choices=SOLVER_NAMES, default=None,
                        help='default: rk45, or where --nfe is given unipc (official checkpoints: '
                        f'heun; those of EDM and PFGM++: heun from {EDM_NFE} calls on, unipc '
                        'below; those of --consistency: renew)')
    solver.add_argument('--tol', type=above(0), default=1e-4,
                        help='rtol and atol of rk45 (default: 1e-4)')
    solver.add_argument('--schedule', choices=(*pfgm.SCHEDULES, 'time'), default=None,
                        help='planes of the steps (default: radius; official checkpoints: log; '
                        'EDM and PFGM++ by heun: rho7); time: even in the t of vp, subvp, ddpm '
                        'and rf')
    solver.add_argument('--to_data', action=yes_or_no, default=None,
                        help='make the last call on z_min and go straight to z = 0 (default: not '
                        'with rk45, nor for official checkpoints)')
    solver.add_argument('--z_min', type=above(0), default=None,
                        help='the last plane (default: 1e-3 in PFGM and 0.002 sqrt(D) in PFGM++; '
                        'with --nfe up to 5 sqrt(D) / nfe^2, but not by heun on networks of EDM '
                        'and PFGM++)')
    solver.add_argument('--small_z', choices=('exact', 'official'), default=None,
                        help='v_z below z_exp (default: exact; official for official checkpoints)')
    solver.add_argument('--eta', type=above(-1e-9, below=1.001), default=0.0,
                        help='fresh noise of ddim: with 0 none (it is euler), with 1 ancestral '
                        'sampling of DDPM (default: 0)')

    machine = p.add_argument_group('the machine')
    machine.add_argument('--device', default='auto',
                         help='auto, cpu, cuda, cuda:1 or mps (default: auto)')
    machine.add_argument('--batch_size', type=above(0, int), default=None,
                         help='images at a time (default: as many as fit in 2 GB, or in half of '
                         'the free memory of a GPU, up to 256, or 1024; of what is not sampled, '
                         'and of rk45 in evaluate.py, 64)')
    machine.add_argument('--bf16', action=yes_or_no, default=None,
                         help='bfloat16 autocast (default: where it is fast, not for official '
                         'checkpoints; never with rk45)')
    machine.add_argument('--deterministic', action='store_true',
                         help='on a GPU the same numbers each time, by slower kernels (default: '
                         'off)')
    machine.add_argument('--compile', action='store_true',
                         help='torch.compile the network (default: off)')
    return first
