"""Lines of results.jsonl and tables. You need not read it to understand the method.
"""
import json
import os
import platform
import subprocess
import sys
import time

import torch

from support.cli import BadInput


def print_table(rows):
    keys = list(dict.fromkeys(k for row in rows for k in row))
    for row in [dict(zip(keys, keys)), *rows]:
        print('  '.join(f'{v:>10}' if isinstance(v, str) else f'{v:>10.5g}'
                        for v in (row.get(k, '-') for k in keys)))


def record_result(args, device, world, seconds, values):
    """Append one line to --results: the values, and what it takes to get them again."""
    try:
        git = subprocess.run(['git', 'describe', '--always', '--dirty'], capture_output=True,
                             text=True, timeout=10, cwd=os.path.dirname(os.path.abspath(__file__)))
        revision = git.stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        revision = None
    name = (torch.cuda.get_device_name(device) if device.type == 'cuda' else
            f'{device.type}, {platform.machine()}, {os.cpu_count()} cores')
    row = dict(command=' '.join(sys.argv), time=time.strftime('%Y-%m-%dT%H:%M:%S%z'), git=revision,
               torch=torch.__version__, hardware=f'{world} x {name}', seconds=round(seconds, 1),
               seed=args.seed, **values)
    try:
        with open(args.results, 'a') as file:
            file.write(json.dumps(row) + '\n')
    except OSError as error:
        raise BadInput(f'--results {args.results}: cannot be written ({error})') from error
