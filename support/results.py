"""Lines of results.jsonl, and tables. You need not read it to understand the method.
"""
import json
import os
import platform
import shlex
import subprocess
import sys
import time

import torch

from support.cli import BadInput


def print_table(rows):
    """Print dicts as the rows of a table, under a line of their keys. Where a row has no value for
    a key, it shows a dash."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    for row in [dict(zip(keys, keys)), *rows]:
        cells = []
        for key in keys:
            value = row.get(key, '-')
            cells.append(f'{value:>10}' if isinstance(value, str) else f'{value:>10.5g}')
        print('  '.join(cells))


def revision():
    """What git calls the state of this project; None without git."""
    folder = os.path.dirname(os.path.abspath(__file__))
    command = ['git', 'describe', '--always', '--dirty']
    try:
        git = subprocess.run(command, capture_output=True, text=True, timeout=10, cwd=folder)
    except (OSError, subprocess.SubprocessError):
        return None
    return git.stdout.strip() or None


def hardware(device):
    """What the device is, in words."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'{device.type}, {platform.machine()}, {os.cpu_count()} cores'


def command_line(world=1):
    """The command that started this process, as it can be pasted into a shell of Python's
    environment. world: how many processes of torchrun take part."""
    words = ['python']
    if world > 1:
        words = ['torchrun', f'--nproc_per_node={world}', '--']
    words += [word for word in sys.orig_argv[1:] if word != '-u']  # torchrun's own
    return shlex.join(words)


def record_result(path, values, device, world=1, *, seconds, seed):
    """Append one line of JSON to the file of --results: the dict `values`, and what it takes to get
    them again. world: how many processes took part. Raises BadInput where it cannot be written."""
    row = dict(command=command_line(world), time=time.strftime('%Y-%m-%dT%H:%M:%S%z'),
               git=revision(), torch=torch.__version__, hardware=f'{world} x {hardware(device)}',
               seconds=round(seconds, 1), seed=seed, **values)
    try:
        with open(path, 'a') as file:
            file.write(json.dumps(row) + '\n')
    except OSError as error:
        raise BadInput(f'--results {path}: cannot be written ({error})') from error
