"""What a script says to people and asks of them: one-line errors, flags, progress, and files that are
whole or not there. You need not read it to understand the method.
"""
import argparse
import contextlib
import os
import sys
import time

SIZE_LIMIT = 1024  # pixels a side

CLASS_LIMIT = 10_000  # classes of labels


# ---------------------------------------------------------------- errors, files, seeds

class BadInput(ValueError):
    """What the user gave cannot be used; the message is the one line that he is shown. Empty: some
    other process shows it."""

    def __init__(self, message):
        super().__init__(' '.join(message.split()))  # a file's name or contents may break lines


@contextlib.contextmanager
def given_by(flag):
    """What the block complains of under the name of --ckpt was given by another flag."""
    try:
        yield
    except BadInput as error:
        raise BadInput(str(error).replace('--ckpt', flag, 1)) from error


def say(line):
    """To people, once: by the first process."""
    if os.environ.get('RANK', '0') == '0':
        print(line, flush=True)


def write(flag, path, save):
    """save(file), whole or not at all: under a temporary name, then renamed over the old file."""
    part = f'{path}.part'
    try:
        with open(part, 'wb') as file:
            save(file)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save wraps a full disk in RuntimeError
        if os.path.lexists(part):
            os.remove(part)
        kept = 'the one of before is intact' if os.path.lexists(path) else 'nothing was saved'
        why = str(error).partition('\n')[0]
        raise BadInput(f'{flag} {path}: cannot be written ({why}); {kept}; free some space or give '
                       'another, then run the same command again') from error


# ---------------------------------------------------------------- flags

class Parser(argparse.ArgumentParser):
    """Flags are spelled out, shown with their defaults, and a wrong one ends in one line."""

    def __init__(self, **kw):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                         **kw)

    def error(self, message):
        message = ' '.join(message.removeprefix('argument ').split())
        print(f'{message} (see {self.prog} --help)', file=sys.stderr)
        sys.exit(2)


def above(low, kind=float, below=2 ** 31):
    """An argparse type: a number of that kind with low < number < below."""
    def convert(text):
        try:
            number = kind(text)
        except ValueError:
            number = None
        if number is None or not low < number < below:
            word = 'a whole number' if kind is int else 'a number'
            raise argparse.ArgumentTypeError(
                f'{text}: must be {word} above {low} and below {below}')
        return number
    return convert


def unless(word, value, kind):
    """An argparse type: the value for that word, else of that kind."""
    return lambda text: value if text == word else kind(text)


# ---------------------------------------------------------------- progress

def watch(batches, count, label, rank):
    """The same batches, with a line every few seconds that says how long the rest will take. label:
    a string, or a function that returns one."""
    start, said, done = time.time(), time.time(), 0
    for batch in batches:
        yield batch
        done += len(batch)
        now = time.time()
        if rank == 0 and (now - said > 5 or done == count):
            said, left = now, int((now - start) / done * (count - done))
            print(f'{label() if callable(label) else label}: {done}/{count}  '
                  f'{done / (now - start):.1f} img/s  '
                  f'{left // 60}:{left % 60:02d} left', flush=True)
