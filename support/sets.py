"""Known data sets, and load_images(), which finds and decodes any. Read it if you want to add a data set.
"""
import os
import warnings

import torch.nn.functional as F
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from support.cli import BadInput, SIZE_LIMIT, say
from support.foreign import Found, IMAGE_EXTENSIONS, list_images, read_arrays
from support.images import Images, probe
from support.processes import first_of_its_machine

# MedMNIST v2, its 2-D sets: channels, and the MD5 of the archives of 28, 64, 128 and 224 pixels as
# medmnist 3.0.2 has them. arXiv 2110.14795, zenodo record 10519652.
MEDMNIST_SIZES = (28, 64, 128, 224)

MEDMNIST = {
    'pathmnist': (3, 'a8b06965200029087d5bd730944a56c1', '55aa9c1e0525abe5a6b9d8343a507616',
                     'ac42d08fb904d92c244187169d1fd1d9', '2c51a510bcdc9cf8ddb2af93af1eadec'),
    'chestmnist': (1, '02c8a6516a18b556561a56cbdd36c4a8', '9de6cd0b934ebb5b7426cfba5efbae16',
                      'db107e5590b27930b62dbaf558aebee3', '45bd33e6f06c3e8cdb481c74a89152aa'),
    'dermamnist': (3, '0744692d530f8e62ec473284d019b0c7', 'b70a2f5635c6199aeaa28c31d7202e1f',
                      '2defd784463fa5243564e855ed717de1', '8974907d8e169bef5f5b96bc506ae45d'),
    'octmnist': (1, 'c68d92d5b585d8d81f7112f81e2d0842', 'e229e9440236b774d9f0dfef9d07bdaf',
                    '0a97e76651ace45c5d943ee3f65b63ae', 'abc493b6d529d5de7569faaef2773ba3'),
    'pneumoniamnist': (1, '28209eda62fecd6e6a2d98b1501bb15f', '8f4eceb4ccffa70c672198ea285246c6',
                          '05b46931834c231683c68f40c47b2971', 'd6a3c71de1b945ea11211b03746c1fe1'),
    'retinamnist': (3, 'bd4c0672f1bba3e3a89f0e4e876791e4', 'afda852cc34dcda56f86ad2b2457dbcc',
                       'e48e916a24454daf90583d4e6efb1a18', 'eae7e3b6f3fcbda4ae613ebdcbe35348'),
    'breastmnist': (1, '750601b1f35ba3300ea97c75c52ff8f6', '742edef2a1fd1524b2efff4bd7ba9364',
                       '363e4b3f8d712e9b5de15470a2aaadf1', 'b56378a6eefa9fed602bb16d192d4c8b'),
    'bloodmnist': (3, '7053d0359d879ad8a5505303e11de1dc', '2b94928a2ae4916078ca51e05b6b800b',
                      'adace1e0ed228fccda1f39692059dd4c', 'b718ff6835fcbdb22ba9eacccd7b2601'),
    'tissuemnist': (1, 'ebe78ee8b05294063de985d821c1c34b', '123ece2eba09d0aa5d698fda57103344',
                       '61b955355d7425a89687b06cca3ce0c2', 'b077128c4a949f0a4eb01517f9037b9c'),
    'organamnist': (1, '68e3f8846a6bd62f0c9bf841c0d9eacc', '2dcccc29b88e6da5a01161ef20cda288',
                       'eeae80d0a227a8d099027e1b3cfd3b60', '50747347e05c87dd3aaf92c49f9f3170'),
    'organcmnist': (1, 'b9ceb9546e10131b32923c5bbeaea2b1', '3ce34a8724ea6f548e6db4744d03b6a9',
                       '773c1f009daa3fe5d9a2a201b2a7ed94', '050f5e875dc056f6768abf94ec9995d1'),
    'organsmnist': (1, '9ab87b696fb54e2a387ebe992d6ed5f1', '53a6d115339d874c25e309a994ff46d3',
                       'ded0c5fa01a95dc4978b956f613e9b8e', 'b354719e553fbbb2513d5533f52a4cb1'),
}

SETS = {  # image size, channels, random flips?, torchvision class, what to fetch by hand
    'glyphs':        (16, 1, False, '', ''),
    'mnist':         (28, 1, False, 'MNIST', '{}/MNIST/raw/train-* and t10k-*-ubyte.gz'),
    'fashion_mnist': (28, 1, False, 'FashionMNIST', '{}/FashionMNIST/raw/*-ubyte.gz'),
    'cifar10':       (32, 3, True, 'CIFAR10', '{}/cifar-10-python.tar.gz (cs.toronto.edu/~kriz)'),
    'celeba64':      (64, 3, True, 'CelebA', '{}/celeba/*.txt and, unzipped, img_align_celeba/'),
    'lsun_bedroom':  (256, 3, True, '', '{}/lsun_bedroom/ (as github.com/fyu/lsun exports)'),
}

SETS.update({name: (28, channels, channels == 3, '', f'{{}}/{name}.npz, or of 64 pixels '
                    f'{name}_64.npz (zenodo.org/records/10519652)')
             for name, (channels, *_) in MEDMNIST.items()})

ACCEPTED = (f"{', '.join(SETS)}, an image, a folder or .zip of them, a .npy or .npz of arrays "
            '(n, H, W), (n, H, W, C) or (n, C, H, W) with C of 1, 3 or 4, uint8 or float in [0, 1] '
            'or [-1, 1], with one integer label an image or none')


def load_images(dataset='glyphs', data_dir='data', image_size=None, channels=None, split='train',
         flag='--dataset'):
    """The Images of `dataset`, given by `flag`: a name in SETS (it wins over a file of that name)
    or a path.

    image_size None: the known default, or the shorter side of a path's first image. channels None:
    the known default, or 1 if all images are grey, else 3. A path without a test split serves its
    val, or without any split all its images as either. Raises BadInput.
    """
    if split not in ('train', 'test'):
        raise BadInput(f'--split {split}: accepted: train, test')
    if channels not in (None, 1, 3):
        raise BadInput(f'--channels {channels}: accepted: 1, 3')
    # Not catch_warnings, which is not safe with threads: these stay for the whole process.
    warnings.filterwarnings('ignore', module='PIL')
    warnings.simplefilter('error', Image.DecompressionBombWarning)
    warnings.filterwarnings('ignore', 'This DataLoader will create')  # more workers than cores
    dataset = str(dataset)
    with first_of_its_machine():
        try:
            found = find(dataset, str(data_dir), image_size, split)
            size, depth, flip, *_ = SETS.get(dataset) or probe(found.root, found.source, channels)
        except Exception as error:  # a damaged file makes the libraries raise almost anything
            mend = f'accepted: {ACCEPTED}' if dataset not in SETS else (
                f'fetch by hand {SETS[dataset][4].format(data_dir)}')
            raise BadInput(f'{flag} {dataset}: {str(error) or repr(error)}; {mend}') from error
    size = size if image_size is None else image_size
    if not 1 <= size <= SIZE_LIMIT:
        raise BadInput(f'--image_size {size}: of {flag} {dataset}; accepted: 1 to {SIZE_LIMIT}')
    data = Images(dataset, flag, found, size, channels or depth, flip, dataset in SETS)
    alone = ['no test split in it: these images serve'] * (split == 'test' and not data.apart)
    notes = [*found.notes, *alone, *data.fill()]
    if notes and dataset not in SETS:
        say(f'{data.given}: {"; ".join(notes)}')
    return data


def find(dataset, data_dir, image_size, split):
    """-> Found."""
    path = f'{data_dir}/lsun_bedroom' if dataset == 'lsun_bedroom' else (
        medmnist(dataset, data_dir, image_size or 28) if dataset in MEDMNIST else dataset)
    ending, file = os.path.splitext(path)[1].lower(), os.path.isfile(path)
    if dataset == 'glyphs':
        pixels, labels = glyphs(image_size=min(image_size or 16, 64), split=split)
        return Found(None, pixels, torch.from_numpy(labels).long(), list('0123456789'))
    if dataset in SETS and path == dataset:
        from torchvision import datasets  # here, because it takes a second that --help has not
        which = {'split': split} if dataset == 'celeba64' else {'train': split == 'train'}
        found = getattr(datasets, SETS[dataset][3])(data_dir, download=True, **which)
        if dataset == 'celeba64':  # its targets are 40 attributes, not classes
            return Found(f'{data_dir}/celeba/img_align_celeba', found.filename)
        return Found(None, np.asarray(found.data), torch.as_tensor(found.targets), found.classes)
    if os.path.isdir(path) or file and ending == '.zip':
        found = list_images(path, split)
        return found if path == dataset else Found(*found[:2], apart=found.apart)  # LSUN
    if file and ending in ('.npy', '.npz'):
        return read_arrays(path, split)
    if file and ending in IMAGE_EXTENSIONS:
        return Found(os.path.dirname(path) or '.', [os.path.basename(path)], apart=False)
    missing = f'there is no {path}' if dataset in SETS else 'no such data set, file or folder'
    raise ValueError(missing if not os.path.lexists(path) else 'is of another kind' if file else
                     'neither a file nor a folder')


def medmnist(name, data_dir, image_size):
    """The path of the archive of this set whose size is the next, downloaded and checked where it
    is not there."""
    from torchvision.datasets.utils import download_url
    which = next((k for k, size in enumerate(MEDMNIST_SIZES) if size >= image_size), 3)
    file = f'{name}_{MEDMNIST_SIZES[which]}.npz' if which else f'{name}.npz'
    if not os.path.lexists(path := f'{data_dir}/{file}'):  # a user's own is taken as it is
        download_url(f'https://zenodo.org/records/10519652/files/{file}?download=1', data_dir,
                     f'{file}.part', MEDMNIST[name][1 + which])
        os.replace(f'{path}.part', path)
    return path


def glyphs(n=10_000, image_size=16, split='train'):
    """-> (uint8 array (n, S, S), labels (n,)): the digits in turn, white on black, each under an
    affine map and stroke width of its own; the same bytes for the same arguments."""
    font, strokes, inks = ImageFont.load_default(size=96), 4, []
    for k in range(10 * strokes):
        sheet = Image.new('L', (128, 128))
        ImageDraw.Draw(sheet).text((64, 64), str(k // strokes), 255, font, 'mm',
                                   stroke_width=k % strokes)
        inks.append(np.asarray(sheet))
    inks = torch.from_numpy(np.stack(inks)).float()[:, None]
    rng, labels = np.random.default_rng(('train', 'test').index(split)), np.arange(n) % 10
    which = torch.from_numpy(labels * strokes + rng.integers(strokes, size=n))
    angle, shear, width, height, right, down = rng.uniform(
        (-.25, -.2, .7, .8, -.08, -.08), (.25, .2, 1, .96, .08, .08), (n, 6)).T
    cos, sin = np.cos(angle), np.sin(angle)  # the maps lead from the image to the sheet
    maps = np.stack([width * (cos + shear * sin), width * (shear * cos - sin), right,
                     height * sin, height * cos, down], 1).reshape(n, 2, 3)
    maps, parts = torch.from_numpy(maps).float(), []
    fine = max(1, 64 // image_size)  # drawn this much larger and averaged, against jagged edges
    for k, m in zip(which.split(500), maps.split(500)):
        grid = F.affine_grid(m, (len(m), 1, *[image_size * fine] * 2), align_corners=False)
        parts.append(F.avg_pool2d(F.grid_sample(inks[k], grid, align_corners=False), fine))
    return torch.cat(parts)[:, 0].round().to(torch.uint8).numpy(), labels
