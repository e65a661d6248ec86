"""What a person sees of a piece of work in a terminal or a log: lines, and bars that move.

The rooms below tell through `logging`, in children of the logger "wds_train": INFO what --quiet hides, DEBUG what only
--verbose shows. It all ends here, as lines on stderr.
"""

import argparse
import contextlib
import logging
import os
import shlex
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Self

from tqdm import tqdm

LOG = logging.getLogger("wds_train")
FIRST_SECONDS, LOG_SECONDS = 5.0, 30.0  # to the first line where there is no terminal, and between two
SCREEN_SECONDS = 0.1  # between two states of a bar
RECENT_SECONDS = 30.0  # that a rate is taken over
KNOWN_SECONDS = 1.0  # of work, until it is said how long the rest will take
FRAME = "{percentage:3.0f}%{bar} {desc}"
FRAME_COLUMNS = 6  # of the percentage, the space, and the shortest bar
tqdm.monitor_interval = 0  # a thread of its own, for bars that are not drawn anew often enough


def say(message: str) -> None:
    """Print a line for the person, above the progress bar if there is one."""
    with contextlib.suppress(OSError):  # a terminal that was closed must not end the training
        tqdm.write(message, file=sys.stderr)


def note(message: str) -> None:
    """As `say`, what --quiet leaves out."""
    LOG.info("%s", message)


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


LOG.addHandler(_Lines())
LOG.setLevel(logging.INFO)
LOG.propagate = False


def add_level(parser: argparse.ArgumentParser) -> None:
    """Add --quiet and --verbose, which `set_level` heeds."""
    level = parser.add_mutually_exclusive_group()
    level.add_argument("--quiet", action="store_true", help="print what went wrong and the last lines, nothing else")
    level.add_argument("--verbose", action="store_true", help="print retries and uploads, too")


def set_level(args: argparse.Namespace) -> None:
    quiet, verbose = getattr(args, "quiet", False), getattr(args, "verbose", False)
    LOG.setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)


def loading() -> None:
    """Say what the next seconds are spent on, where PyTorch is yet to be imported."""
    if "torch" not in sys.modules:
        note("loading PyTorch ...")


def program() -> str:
    """What to type for this program: its name, or the path where the shell would not find it."""
    called = sys.argv[0]
    if os.path.basename(called) != "wds-train" or shutil.which("wds-train"):  # noqa: PTH119
        return "wds-train"
    return shlex.quote(os.path.relpath(called))


def readable(name: str) -> str:
    """The `name`, which may be no UTF-8 or hold control characters, as something that can be printed in a line."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in name)


def duration(seconds: float) -> str:
    for unit, size, most in (("s", 1.0, 90.0), ("min", 60.0, 5400.0), ("h", 3600.0, 172_800.0)):
        if seconds < most:
            return f"{seconds / size:.1f} h" if unit == "h" else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86_400:.1f} days"


def dollars(amount: float) -> str:
    return "less than $0.01" if 0 < amount < 0.01 else f"${amount:,.2f}"


def fitting(parts: Sequence[str], columns: int) -> str:
    """As many of `parts`, the most important first, as `columns` have room for."""
    line = ""
    for part in parts:
        longer = f"{line} {part}" if line else part
        if len(longer) > columns:
            break
        line = longer
    return line


class Bar:
    """How far something is of `total`: a bar in a terminal, elsewhere a line after FIRST_SECONDS and every LOG_SECONDS."""

    def __init__(self, total: float, *, shown: bool = True) -> None:
        self._shown = shown and LOG.isEnabledFor(logging.INFO)
        terminal = self._shown and sys.stderr.isatty()
        self._tqdm = tqdm(total=total, disable=not terminal, bar_format=FRAME, leave=False)
        self._pause = SCREEN_SECONDS if terminal else LOG_SECONDS
        self._next = time.monotonic() + (0.0 if terminal else FIRST_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def due(self) -> bool:
        """Whether it is time for `show` to do anything."""
        return self._shown and time.monotonic() >= self._next

    def show(self, done: float, *parts: str) -> None:
        """If it is `due`, draw it, or print the line; of `parts`, the most important first, what the terminal has room for."""
        if not self.due:
            return
        self._next = time.monotonic() + self._pause
        if self._tqdm.disable:
            say(", ".join(parts))
            return
        with contextlib.suppress(OSError):  # as `say`
            columns = _columns()
            self._tqdm.n, self._tqdm.ncols = done, columns
            self._tqdm.set_description_str(fitting(parts, columns - FRAME_COLUMNS), refresh=False)
            self._tqdm.refresh()

    def print(self, line: str) -> None:
        """A line of the result, on stdout."""
        self._tqdm.clear()
        print(line, flush=True)

    def close(self) -> None:
        self._tqdm.close()


def _columns() -> int:
    """The columns to use of the terminal, of which the last stays free; it may be made wider or narrower at any time."""
    return (os.get_terminal_size(sys.stderr.fileno()).columns or 80) - 1


class Meter(Bar):
    """A bar for `size` bytes, and the `images` in them, that are read or made."""

    def __init__(self, size: int, images: int = 0) -> None:
        super().__init__(size or images)
        self._size, self._images, self._lock = size, images, threading.Lock()
        self._marks = deque([(time.monotonic(), 0, 0)])

    def add(self, size: int = 0, images: int = 0) -> None:
        """Count what was done since the last call, by any thread."""
        with self._lock:
            _, done, seen = self._marks[-1]
            self.reached(done + size, seen + images)

    def reached(self, size: int, images: int) -> None:
        """What is done by now. Work that is done twice, after a lost answer, counts twice: the whole is the most."""
        now, marks = time.monotonic(), self._marks
        if marks[-1][1:] == (0, 0):  # what came before the first work says nothing of its pace
            marks.clear()
        marks.append((now, min(size, self._size), min(images, self._images)))
        while len(marks) > 2 and marks[1][0] < now - RECENT_SECONDS:
            marks.popleft()
        if self.due:
            self._show()

    @contextlib.contextmanager
    def following(self, counts: Callable[[], Iterable[int]]) -> Iterator[None]:
        """Within, a thread looks at what `counts` says is done: bytes and images."""
        over = threading.Event()

        def follow() -> None:
            while not over.wait(SCREEN_SECONDS):
                self.reached(*counts())

        thread = threading.Thread(target=follow, name="bar", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            if not self._tqdm.disable:
                self._next = 0.0  # or a bar could vanish long before its end
            self.reached(*counts())

    def _show(self) -> None:
        (began, first, unseen), (now, done, seen) = self._marks[0], self._marks[-1]
        seconds, parts = max(now - began, 1e-3), []
        rate, images_s = (done - first) / seconds, (seen - unseen) / seconds
        ahead = (self._size - done) / rate if rate else (self._images - seen) / images_s if images_s else None
        if self._images:
            parts.append(f"{seen:,}/{self._images:,} images")
        if self._size:
            parts.append(f"{done / 1e6:,.1f}/{self._size / 1e6:,.1f} MB")
        if ahead is not None and seconds >= KNOWN_SECONDS:
            parts.append(f"{duration(ahead)} left")
        parts += [f"{rate / 1e6:,.1f} MB/s"] if self._size else []
        parts += [f"{images_s:,.0f} img/s"] if self._images else []
        self.show(done if self._size else seen, *parts)


@contextlib.contextmanager
def counted(images: int) -> Iterator[Callable[[int], None]]:
    """A bar for so many images; within, tell how many more are done."""
    with Meter(0, images) as meter:
        yield partial(meter.add, 0)
