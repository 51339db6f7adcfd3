"""Inception features, which FID and its kin are made of, and their mean and covariance. Read it if
you want to know whether our numbers can be compared with published ones.
"""
import os
from typing import NamedTuple, Optional

import numpy as np
import torch
import torch.nn.functional as F

import pfgm
from support import waiting
from support.cli import BadInput, say, write
from support.foreign import arrays_of
from support.processes import everywhere, first_of_its_machine

POOL = 2048  # features an image
INCEPTION = 'pt_inception-2015-12-05-6726825d.pth'
URL = f'https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION}'


# ---------------------------------------------------------------- the network

def load_inception(path, device, rank=0):
    """Inception "2015-12-05" -> (net, weight (1008, 2048) of its last layer), where net takes
    x (B, 3, 299, 299) in [-1, 1] to features (B, 2048).

    path: of its weights; None for torch hub's copy, which is downloaded once a machine if it is
    not there; or 'random'. It is torchvision's network with the pooling of the TensorFlow graph:
    averages over what lies inside the image and, in the last block, a maximum. That seems to be a
    slip, but it is in every published FID. Raises BadInput where the weights cannot be loaded."""
    from torchvision.models import Inception3  # here, because importing torchvision takes a second
    with torch.device('cpu' if path == 'random' else 'meta'):
        net = Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    if path == 'random':
        say('random Inception weights: the numbers mean nothing outside this run')
        generator = torch.Generator().manual_seed(0)
        # The norms do nothing yet. Under them weights of this size keep images apart.
        for weight in net.parameters():
            if weight.dim() > 1:
                torch.nn.init.kaiming_normal_(weight, generator=generator)
    else:
        load_weights(net, path, rank)

    average = torch.nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
    for name in ('5b', '5c', '5d', '6b', '6c', '6d', '6e', '7b'):
        repool(getattr(net, f'Mixed_{name}'), average)
    repool(net.Mixed_7c, torch.nn.MaxPool2d(3, stride=1, padding=1))
    weight = net.fc.weight.detach().double()
    net.fc = torch.nn.Identity()
    return net.to(device).eval().requires_grad_(False), weight


def load_weights(net, path, rank):
    file = path or os.path.join(torch.hub.get_dir(), 'checkpoints', INCEPTION)
    try:
        loading = waiting.doing('--inception: loading, or downloading, its weights')
        with loading, first_of_its_machine():
            if path is None and not os.path.isfile(file):
                os.makedirs(os.path.dirname(file), exist_ok=True)
                torch.hub.download_url_to_file(URL, file, '6726825d', progress=rank == 0)
        net.load_state_dict(torch.load(file, 'cpu', weights_only=True), assign=True)
    except Exception as error:  # a network, a damaged or hostile file can fail in any way
        why = ' '.join(str(error).split())[:150]
        raise BadInput(f'--inception {file}: its weights cannot be loaded ({why}); '
                       f'get {URL} by hand and put it at {file}, or give --inception FILE'
                       ) from error


def repool(block, pool):
    """Let the pooling branch of an Inception block see pool(x) of the block's input x, in place of
    torchvision's own average of it."""
    inputs = []
    block.register_forward_pre_hook(lambda block, args: inputs.append(args[0]))
    block.branch_pool.register_forward_pre_hook(lambda conv, args: (pool(inputs.pop()),))


def resize_tf1(x, size=299):
    """TensorFlow 1's resize_bilinear, (B, C, H, W) -> (B, C, size, size): output i reads the input
    at i * length / size, without half-pixel centres or antialiasing."""
    for _ in range(2):  # along the rows, and turned along the columns
        length = x.shape[3]
        at = torch.arange(size, device=x.device, dtype=x.dtype) * (length / size)
        low = at.long()
        high = (low + 1).clamp_max(length - 1)
        x = (x[..., low] + (x[..., high] - x[..., low]) * (at - low)).mT
    return x


@torch.no_grad()
def inception_features(net, pixels, resize='tf1'):
    """uint8 (B, 1 or 3, H, W) on the device of net -> features (B, 2048), float32.

    resize: 'tf1', as in the TensorFlow graph behind the published FIDs, or 'pytorch', as in
    pytorch-fid."""
    features = []
    with pfgm.full_float32(pixels.device):
        for x in pixels.expand(-1, 3, -1, -1).float().split(64):
            if resize == 'tf1':
                x = (resize_tf1(x) - 128) / 128
            else:
                x = F.interpolate(x / 255, (299, 299), mode='bilinear') * 2 - 1
            features.append(net(x))
    return torch.cat(features)


# ---------------------------------------------------------------- of many images

class Measured(NamedTuple):
    """What is known of n images."""
    n: Optional[int]                  # None where a statistics file does not say
    mu: torch.Tensor                  # (2048,) float64, the mean of the features
    sigma: torch.Tensor               # (2048, 2048) float64, their covariance, over n - 1
    features: Optional[torch.Tensor]  # (n, 2048) float32, where asked for
    pixels: Optional[torch.Tensor]    # (n, C, H, W) uint8, where asked for
    labels: Optional[torch.Tensor] = None  # int64 (n,), their classes, where they are known


def collect(batches, n, net, resize, keep, device):
    """The Measured, on the CPU, of n images over all ranks, from one pass over this rank's batches,
    uint8 (b, C, H, W).

    net: of load_inception(), or None where no features are wanted; mu and sigma are 0 then. keep:
    which of 'features' and 'pixels' to hold on to."""
    total = pfgm.float64(torch.zeros(POOL + 1, POOL, device=device))
    kept = {'features': [], 'pixels': []}
    for batch in batches:
        kept['pixels'].append(batch.cpu() if 'pixels' in keep else batch[:0])
        if net is not None:
            features = inception_features(net, batch, resize)
            kept['features'].append(features.cpu() if 'features' in keep else features[:0])
            features = pfgm.float64(features)
            total[0] += features.sum(0)
            total[1:] += features.T @ features
    total = sum(everywhere(total.cpu()))
    mu = total[0] / n
    sigma = (total[1:] - n * torch.outer(mu, mu)) / max(n - 1, 1)

    def of_all_ranks(name):
        return torch.cat(everywhere(torch.cat(kept[name]))) if name in keep else None

    return Measured(n, mu, sigma, of_all_ranks('features'), of_all_ranks('pixels'))


def read_stats(path, convention):
    """The Measured of a .npz of statistics, mu and sigma, or of features `pool_3`, as score_sde
    writes them; None for a .npz that holds neither: images.

    convention: how features are made here. Raises ValueError for a file that cannot be read, and
    for one whose features were made in another way."""
    names = ('mu', 'sigma', 'n', 'convention', 'pool_3')
    features = None
    try:
        arrays = {name: read() for name, read in arrays_of(path).items() if name in names}
        n = int(arrays['n']) if 'n' in arrays else None
        if 'pool_3' in arrays and 'mu' not in arrays and 'sigma' not in arrays:
            features = torch.from_numpy(arrays['pool_3']).float()
            n = len(features)
            parts = [part.double() for part in features.split(4096)]
            mu = sum(part.sum(0) for part in parts) / n
            sigma = sum((part - mu).T @ (part - mu) for part in parts) / (n - 1)
            arrays.update(mu=mu.numpy(), sigma=sigma.numpy())
    except Exception as error:  # a damaged or hostile file can fail in any way
        raise ValueError(f'{path}: cannot be read ({error}); accepted: a folder, .zip or .npz of '
                         'images, or a .npz of mu and sigma') from error
    if 'mu' not in arrays and 'sigma' not in arrays:
        return None

    shapes = {name: arrays[name].shape if name in arrays else None for name in ('mu', 'sigma')}
    if shapes != dict(mu=(POOL,), sigma=(POOL, POOL)) or not all(
            arrays[name].dtype.kind == 'f' and np.isfinite(arrays[name]).all() for name in shapes):
        raise ValueError(f'{path}: mu {shapes["mu"]}, sigma {shapes["sigma"]}, or not finite; '
                         f'accepted: ({POOL},) and ({POOL}, {POOL}), as --save_stats writes')
    if str(arrays.get('convention', convention)) != convention:
        raise ValueError(f'{path}: made with {arrays["convention"]}, not {convention}; give the '
                         'same --resize and --inception, or make it again with --save_stats')
    mu = torch.from_numpy(arrays['mu']).double()
    sigma = torch.from_numpy(arrays['sigma']).double()
    return Measured(n, mu, sigma, features, None)


def write_stats(path, measured, convention):
    """Statistics as the file of --save_stats, which read_stats() reads."""
    arrays = dict(mu=measured.mu.numpy(), sigma=measured.sigma.numpy(), n=measured.n,
                  convention=convention)
    write('--save_stats', path, lambda file: np.savez(file, **arrays))
    print(f'wrote {path}', flush=True)
