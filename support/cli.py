"""What a script asks of people and tells them: flags, errors of one line, progress, and files that
are written whole or not at all. You need not read it to understand the method.
"""
import argparse
import contextlib
import difflib
import os
import sys
import time

from support import waiting

SIZE_LIMIT = 1024     # pixels a side
CLASS_LIMIT = 10_000  # classes of labels


# ---------------------------------------------------------------- errors

class BadInput(ValueError):
    """What the user gave cannot be used. The message is the one line that the user is shown; it is
    empty where another process shows it."""

    def __init__(self, message):
        one_line = ' '.join(message.split())  # the name or contents of a file may break lines
        super().__init__(printable(one_line))


def printable(text):
    """The text, with what is no visible character written as Python writes it, such as the escape
    codes that command a terminal: \\x1b. The names of files and classes may hold anything. The ends
    of lines stay, and so do tabs and the "\\r" of progress bars."""
    if text.isprintable():
        return text
    return ''.join(c if c.isprintable() or c in '\n\r\t' else repr(c)[1:-1] for c in text)


def listed(names):
    """The names with commas between them; those that hold commas themselves in quotes."""
    return ', '.join(f'"{name}"' if ',' in name else name for name in names)


class PrintableStream:
    """A text stream, such as sys.stdout, that is written to by way of printable()."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        waiting.SPEAKER.heard()
        return self.stream.write(printable(text))

    def writelines(self, lines):
        for line in lines:
            self.write(line)

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextlib.contextmanager
def printable_output():
    """Inside, nothing that is printed, by whatever part of the program, commands the terminal."""
    with (contextlib.redirect_stdout(PrintableStream(sys.stdout)),
          contextlib.redirect_stderr(PrintableStream(sys.stderr))):
        yield


@contextlib.contextmanager
def given_by(flag):
    """Inside, a complaint about --ckpt is made in the name of the flag that gave the file."""
    try:
        yield
    except BadInput as error:
        raise BadInput(str(error).replace('--ckpt', flag, 1)) from error


# ---------------------------------------------------------------- flags

class Parser(argparse.ArgumentParser):
    """An argument parser whose flags must be spelled out. A wrong one ends the script in one line.

    The namespace that it returns has one more field, `given`: {name: words} of the flags that the
    user typed, with the words as they were typed, as in {'gamma': '--gamma 50'}."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                         **options)

    def parse_known_args(self, words=None, namespace=None):
        words = sys.argv[1:] if words is None else list(words)
        parsed, rest = super().parse_known_args(words, namespace)
        of_subparser = getattr(parsed, 'given', {})  # a parser within this one, of a subcommand
        parsed.given = {**of_subparser, **self.typed(words)}
        return parsed, rest

    def typed(self, words):
        """{name: words} of this parser's flags among the words of a command."""
        typed = {}
        name = None
        for word in words:
            flag, equals, value = word.partition('=')
            if flag in self._option_string_actions:
                name = self._option_string_actions[flag].dest
                typed[name] = [flag, value] if equals else [flag]
            elif name is not None:
                typed[name].append(word)
        return {name: ' '.join(map(str, parts)) for name, parts in typed.items()}

    def parse_args(self, words=None, namespace=None):
        parsed, rest = self.parse_known_args(words, namespace)
        if rest:
            flags = [word.partition('=')[0] for word in rest if word.startswith('--')]
            meant = did_you_mean(flags[0], self._option_string_actions) if flags else ''
            self.error(f'unrecognized arguments: {" ".join(map(str, rest))}{meant}')
        return parsed

    def _check_value(self, action, value):  # argparse's own does not say which one was meant
        if action.choices is not None and value not in action.choices:
            accepted = ', '.join(map(str, action.choices))
            meant = did_you_mean(value, action.choices)
            raise argparse.ArgumentError(action, f'{value}: accepted: {accepted}{meant}')

    def error(self, message):
        message = printable(' '.join(message.removeprefix('argument ').split()))
        print(f'{message} (see {self.prog} --help)', file=sys.stderr)
        sys.exit(2)


def did_you_mean(word, words):
    """The end of a message about a wrong word: the one of `words` that it nearly is, or ''."""
    near = difflib.get_close_matches(str(word), map(str, words), 1)
    return f'; did you mean {near[0]}?' if near else ''


def above(low, number_type=float, below=2 ** 31):
    """An argparse type: a number of number_type, float or int, with low < number < below."""
    accepted = 'a whole number' if number_type is int else 'a number'

    def convert(text):
        try:
            number = number_type(text)
        except ValueError:
            number = None
        if number is None or not low < number < below:  # NaN fails both comparisons
            raise argparse.ArgumentTypeError(
                f'{text}: must be {accepted} above {low} and below {below}')
        return number
    return convert


def unless(word, value, convert):
    """An argparse type: `value` where the text is `word`, else convert(text)."""
    return lambda text: value if text == word else convert(text)


def several(convert, prefix=''):
    """An argparse type: a list of values with commas between them, each by convert(text). The words
    may begin with `prefix`."""
    return lambda text: [convert(part) for part in text.removeprefix(prefix).split(',')]


def one_of(words):
    """An argparse type: one of these words."""
    def convert(text):
        if text not in words:
            accepted = ', '.join(words)
            raise argparse.ArgumentTypeError(
                f'{text}: accepted: {accepted}{did_you_mean(text, words)}')
        return text
    return convert


# ---------------------------------------------------------------- progress

def own_rank():
    """The number of this process among those of torchrun; 0 where it is alone."""
    return int(os.environ.get('RANK', '0'))


def say(line):
    """Print a line once, however many processes come here: the first one prints it."""
    if own_rank() == 0:
        print(line, flush=True)


def watch(batches, count, label, rank, briefly=False):
    """Yield the batches. Whenever rank 0 has been silent for some seconds, and at the end, it says
    how far it has come and how long the rest will take.

    batches: of `count` images together, each with a len(). label: the first words of the line, or a
    function that returns them. briefly: without the line at the end."""
    if rank > 0:
        yield from batches
        return
    start = time.monotonic()
    done = 0

    def words():
        first_words = label() if callable(label) else label
        line = f'{first_words}: {done}/{count}'
        if done == 0:
            return line
        seconds = time.monotonic() - start
        left = int(seconds / done * (count - done))
        return f'{line}  {done / seconds:.1f} img/s  {left // 60}:{left % 60:02d} left'

    with waiting.doing(words):
        for batch in batches:
            yield batch
            done += len(batch)
            if done < count or briefly:  # else the last line follows
                waiting.SPEAKER.speak()
    if done and not briefly:
        print(words(), flush=True)


# ---------------------------------------------------------------- files

def check_folder(flag, path):
    """BadInput unless the folder exists in which `flag` says to write the file `path`."""
    folder = os.path.dirname(path)
    if folder and not os.path.isdir(folder):
        raise BadInput(f'{flag} {path}: no folder {folder}; make it with: mkdir -p {folder}')


def why_not_writable(path, appends=False):
    """Why write() could not write the file `path`, or with `appends` why nothing could be appended
    to it, in words; '' where it can be done."""
    try:
        if os.path.lexists(path):
            open(path, 'ab').close()
            if appends:
                return ''
        part = f'{path}.{os.getpid()}.part'  # not `path`: another process may begin to write it
        open(part, 'wb').close()
        os.remove(part)
    except OSError as error:
        return str(error)
    return ''


def check_writable(flag, path, appends=False):
    """BadInput unless the file `path`, which `flag` says to write, can be written: now, not after
    an hour of work."""
    check_folder(flag, path)
    reason = why_not_writable(path, appends)
    if reason:
        raise BadInput(f'{flag} {path}: cannot be written ({reason}); give another')


def write(flag, path, save):
    """Write the file `path`, which `flag` gave, by save(file): whole, or not at all.

    It is written under a temporary name and then renamed, so that neither a full disk nor the end
    of the process can leave half a file, or harm the one that was there. Raises BadInput where it
    cannot be written."""
    part = f'{path}.part'
    try:
        with open(part, 'wb') as file:
            save(file)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save wraps a full disk in RuntimeError
        if os.path.lexists(part):
            os.remove(part)
        why = str(error).partition('\n')[0]
        kept = 'nothing was saved'
        if os.path.lexists(path):
            kept = 'the one of before is intact'
        mend = 'free some space or give another, then run the same command again'
        raise BadInput(f'{flag} {path}: cannot be written ({why}); {kept}; {mend}') from error
