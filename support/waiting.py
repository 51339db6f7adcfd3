"""What a script says while one waits for it, and how Ctrl-C ends it. You need not read it to
understand the method.

    from support import waiting

    waiting.begin(__name__)              # the first lines of a script, before the slow imports
    ...
    with waiting.doing('reading it'):    # said whenever nothing else was for some seconds
        ...
"""
import atexit
import contextlib
import os
import signal
import sys
import threading
import time

PATIENCE = 2.5  # seconds of silence after which a line says what is under way


# ---------------------------------------------------------------- what is under way

class Work:
    """Something that a script is doing."""

    def __init__(self, words):
        self.words = words  # a text, or a function that returns one
        self.began = time.monotonic()


class Speaker:
    """Says what is under way whenever the script has been silent for PATIENCE seconds; of work that
    has taken minutes, for a sixtieth of the time that it has taken."""

    def __init__(self):
        self.works = []  # of Work, each a part of the one before it
        self.last_line = time.monotonic()
        self.lock = threading.Lock()
        self.thread = None
        self.stopped = threading.Event()

    def heard(self):
        """Something was printed."""
        self.last_line = time.monotonic()

    def speak(self):
        """Print a line if it is time for one."""
        with self.lock:
            works = self.works[:]
            if os.environ.get('RANK', '0') != '0' or not works:
                return
            # The first work is the whole script, where begin() was called.
            parts = works[1:] if self.thread is not None and len(works) > 1 else works
            now = time.monotonic()
            taken = now - parts[0].began
            if now - self.last_line < max(PATIENCE, taken / 60):
                return
            self.heard()
            words = [work.words() if callable(work.words) else work.words for work in parts]
            print(f'{", ".join(words)}, {taken:.0f} s so far', flush=True)

    def run(self):
        while not self.stopped.wait(0.2):
            try:
                self.speak()
            except (OSError, ValueError):  # nobody reads the output any more
                return

    def start(self):
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def stop(self):
        """A thread that still prints when Python ends would end it with an error."""
        self.stopped.set()
        if self.thread is not None:
            self.thread.join()


SPEAKER = Speaker()


@contextlib.contextmanager
def doing(words):
    """Inside, the script is at this work, and says so whenever it has been silent for a while.

    words: a text, or a function that returns one. Another thread calls it while the work goes on,
    in a script that called begin(); in other programs speak() does, between two batches."""
    work = Work(words)
    SPEAKER.works.append(work)
    try:
        yield
    finally:
        SPEAKER.works.remove(work)


# ---------------------------------------------------------------- beginning and Ctrl-C

def begin(module_name):
    """Call it before the imports of a script, which may take seconds: a line then says so, and
    Ctrl-C ends them in one line. It does nothing in a module that is imported.

    module_name: __name__ of the caller."""
    if module_name != '__main__':
        return
    signal.signal(signal.SIGINT, end_at_once)
    SPEAKER.works.append(Work('loading PyTorch'))
    SPEAKER.start()
    atexit.register(SPEAKER.stop)


def end_at_once(number, frame):
    """A handler of SIGINT for when there is nothing to finish. Inside an import an exception would
    be taken for a reason why the import failed, or be printed with its traceback."""
    os.write(sys.__stderr__.fileno(), b'interrupted\n')
    os._exit(128 + number)


def interrupt(number, frame):
    """A handler of SIGINT for the work itself, which cleans up. The next Ctrl-C does not wait for
    that."""
    signal.signal(signal.SIGINT, end_at_once)
    raise KeyboardInterrupt


@contextlib.contextmanager
def working():
    """The work of a script that called begin(): inside, Ctrl-C raises KeyboardInterrupt."""
    if SPEAKER.thread is None:
        yield
        return
    SPEAKER.works[0].words = 'at work'
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, end_at_once)
