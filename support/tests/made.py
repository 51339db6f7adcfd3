"""Files that the tests make: images, folders, arrays, and the lies of strangers."""
import contextlib
import io
import os
import resource
import signal
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.sets import load_images


class Payload:
    """A pickle of it runs a command that leaves a file called hacked."""

    def __reduce__(self):
        return os.system, ('touch hacked',)


def picture(seed=0, side=8):
    """A smooth random RGB image."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def pictures(root, *names, side=8):
    """The folder `root`, with picture(k) in file k."""
    for k, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(k, side).save(root / name)
    return root


def classes_of(folder, *names):
    return pictures(folder, *(f'{name}/{i}.png' for name in names for i in range(8)), side=16)


def array_set(tmp_path, array, **options):
    """The Images of a .npy that holds the array."""
    np.save(tmp_path / 'a.npy', array)
    return load_images(tmp_path / 'a.npy', **options)


def written(save, *args, **options):
    """The bytes that it writes to a file."""
    file = io.BytesIO()
    save(file, *args, **options)
    return file.getvalue()


def encoded(image, kind='PNG', **options):
    return written(image.save, kind, **options)


def shows(pixels, image):
    """Whether uint8 (C, H, W) are those of the image."""
    return np.array_equal(pixels.permute(1, 2, 0).squeeze(), image)


def mutated(raw, rng):
    """The bytes with one kind of damage."""
    raw, at, size = bytearray(raw), int(rng.integers(len(raw))), int(rng.integers(1, 64))
    kind = rng.integers(4)
    if kind < 2:
        del raw[at:at + size if kind else None]
    elif kind == 2:
        raw[at:at + 4] = b'\xff\xff\xff\x7f'
    else:  # most readers look hardest at the beginning and the end
        for k in rng.integers(min(len(raw), 100), size=size % 8 + 1):
            raw[k * (-1) ** (size % 2)] ^= 1 << int(rng.integers(8))
    return bytes(raw)


def zipped(entries, packing=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', packing) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return file.getvalue()


CENTRAL, LOCAL = b'PK\x01\x02', b'PK\x03\x04'  # begin the two headers of a zip's entry


def patched(raw, signature, offset, layout, value):
    """A zip's bytes with a field of its last header of that kind overwritten."""
    raw = bytearray(raw)
    struct.pack_into(layout, raw, raw.rindex(signature) + offset, value)
    return bytes(raw)


def encrypted(raw):
    """A zip whose last entry says that it is."""
    return patched(patched(raw, CENTRAL, 8, '<H', 1), LOCAL, 6, '<H', 1)


def claims(shape, descr='|u1'):
    """A .npy that says so, and 64 bytes of pixels."""
    text = f'{ {"descr": descr, "fortran_order": False, "shape": shape} }\n'.encode()
    return b'\x93NUMPY\1\0' + struct.pack('<H', len(text)) + text + bytes(64)


def png_of(width, height):
    """A PNG that says that it is of that size."""
    raw = bytearray(encoded(picture()))
    struct.pack_into('>II', raw, 16, width, height)
    struct.pack_into('>I', raw, 29, zlib.crc32(raw[12:29]))
    return bytes(raw)


@contextlib.contextmanager
def limited(seconds, gib):
    """An end to what takes for ever, or memory without bound; and no warnings."""
    now = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(  # past every `except Exception`
        signal.SIGALRM, lambda *_: pytest.fail('too slow'))
    resource.setrlimit(resource.RLIMIT_AS, (now + int(gib * 2 ** 30), before[1]))
    signal.alarm(seconds)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)
