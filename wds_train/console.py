"""The terminal and the log: lines, tables, and progress bars.

Other packages log to children of the logger "wds_train": --quiet hides INFO, only --verbose shows
DEBUG. All of it ends here, as lines on stderr.
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
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from itertools import zip_longest
from typing import NamedTuple, Self

from tqdm import tqdm

LOG = logging.getLogger("wds_train")
FIRST_SECONDS = 5.0  # to the first line where there is no terminal
LOG_SECONDS = 30.0  # between two lines where there is no terminal
SCREEN_SECONDS = 0.1  # between two states of a bar
RECENT_SECONDS = 30.0  # the time over which a rate is measured
KNOWN_SECONDS = 1.0  # of work, before the remaining time is shown
FRAME = "{percentage:3.0f}%{bar} {desc}"
FRAME_COLUMNS = 6  # of the percentage, the space, and the shortest bar
GAP = "  "  # between two columns of a table
# A unit is used below `most` seconds.
UNITS = (("s", 1.0, 90.0), ("min", 60.0, 5400.0), ("h", 3600.0, 172_800.0))
# tqdm would start a thread of its own, for bars that are not drawn often enough.
tqdm.monitor_interval = 0


def say(message: str) -> None:
    """Print a line on stderr, above the progress bar if there is one."""
    with contextlib.suppress(OSError):  # a terminal that was closed must not end the training
        tqdm.write(message, file=sys.stderr)


def note(message: str) -> None:
    """Print a line as `say` does, unless --quiet is given."""
    LOG.info("%s", message)


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


LOG.addHandler(_Lines())
LOG.setLevel(logging.INFO)
LOG.propagate = False


def add_level(parser: argparse.ArgumentParser) -> None:
    """Add --quiet and --verbose, which `set_level` reads."""
    level = parser.add_mutually_exclusive_group()
    level.add_argument("--quiet", action="store_true", help="print only errors and the result")
    level.add_argument("--verbose", action="store_true", help="also print retries and uploads")


def set_level(args: argparse.Namespace) -> None:
    """Show as much as --quiet or --verbose say."""
    if getattr(args, "quiet", False):
        LOG.setLevel(logging.WARNING)
    elif getattr(args, "verbose", False):
        LOG.setLevel(logging.DEBUG)
    else:
        LOG.setLevel(logging.INFO)


def loading() -> None:
    """Explain the next seconds, if PyTorch is not imported yet."""
    if "torch" not in sys.modules:
        note("loading PyTorch ...")


def program() -> str:
    """Return what to type to start this program: its name, or its path if that is needed."""
    called = sys.argv[0]
    if os.path.basename(called) != "wds-train" or shutil.which("wds-train"):  # noqa: PTH119
        return "wds-train"
    return shlex.quote(os.path.relpath(called))


def readable(name: str) -> str:
    """Return `name` with control characters and bytes that are no UTF-8 escaped."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in name)


def duration(seconds: float) -> str:
    """Return a time in the unit that fits it: "45 s", "12 min", "3.5 h", "2.1 days"."""
    for unit, size, most in UNITS:
        if seconds < most:
            digits = 1 if unit == "h" else 0
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds / 86_400:.1f} days"


def dollars(amount: float) -> str:
    """Return an amount of dollars, to the cent."""
    return "less than $0.01" if 0 < amount < 0.01 else f"${amount:,.2f}"


def align_columns(rows: Iterable[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Return the lines of a table, with its columns aligned.

    Args:
        rows: The cells of each line. A row may be shorter than the others.
        right: Indices of the columns to align to the right, as numbers are. The others align to
        the left.
    """
    rows = list(rows)
    columns = zip_longest(*rows, fillvalue="")
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for row in rows:
        cells = []
        for index, cell in enumerate(row):
            width = widths[index]
            cells.append(cell.rjust(width) if index in right else cell.ljust(width))
        lines.append(GAP.join(cells).rstrip())
    return lines


def fitting(parts: Sequence[str], columns: int) -> str:
    """Return as many of `parts`, the most important first, as fit into `columns`."""
    line = ""
    for part in parts:
        longer = f"{line} {part}" if line else part
        if len(longer) > columns:
            break
        line = longer
    return line


class Bar:
    """Progress towards `total`: a bar in a terminal, elsewhere a line from time to time.

    The first line comes after FIRST_SECONDS, and then one every LOG_SECONDS.

    Args:
        total: The amount of work, in any unit.
        shown: False hides it, as --quiet does.
    """

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
        """Draw the bar or print the line, if it is `due`.

        Args:
            done: The amount of work that is done.
            parts: Texts, the most important first. A bar has those for which the terminal has room.
        """
        if not self.due:
            return
        self._next = time.monotonic() + self._pause
        if self._tqdm.disable:
            say(", ".join(parts))
            return
        with contextlib.suppress(OSError):  # as `say`
            columns = _columns()
            self._tqdm.n = done
            self._tqdm.ncols = columns
            self._tqdm.set_description_str(fitting(parts, columns - FRAME_COLUMNS), refresh=False)
            self._tqdm.refresh()

    def print(self, line: str) -> None:
        """Print a line of the result, on stdout."""
        self._tqdm.clear()
        print(line, flush=True)

    def close(self) -> None:
        """Remove the bar from the terminal."""
        self._tqdm.close()


def _columns() -> int:
    """Return the columns of the terminal that may be used: the last stays free.

    It may be made wider or narrower at any time.
    """
    return (os.get_terminal_size(sys.stderr.fileno()).columns or 80) - 1


class _Mark(NamedTuple):
    """The work that was done at a time."""

    seconds: float
    size: int
    images: int


class Meter(Bar):
    """A bar for bytes, and the images in them, that are read or made.

    Args:
        size: The bytes of all the work; 0 if only images are counted.
        images: The images of all the work; 0 if only bytes are counted.
    """

    def __init__(self, size: int, images: int = 0) -> None:
        super().__init__(size or images)
        self._size = size
        self._images = images
        self._lock = threading.Lock()
        self._marks = deque([_Mark(time.monotonic(), 0, 0)])

    def add(self, size: int = 0, images: int = 0) -> None:
        """Count what was done since the last call. Any thread may call it."""
        with self._lock:
            last = self._marks[-1]
            self.reached(last.size + size, last.images + images)

    def reached(self, size: int, images: int) -> None:
        """Set what is done by now.

        Work that is done twice, after a lost answer, counts twice: more than all of it is never
        shown.
        """
        marks = self._marks
        now = time.monotonic()
        if marks[-1].size == 0 and marks[-1].images == 0:
            marks.clear()  # the time before the first work says nothing about its pace
        marks.append(_Mark(now, min(size, self._size), min(images, self._images)))
        while len(marks) > 2 and marks[1].seconds < now - RECENT_SECONDS:
            marks.popleft()
        if self.due:
            self._show()

    @contextlib.contextmanager
    def following(self, counts: Callable[[], Iterable[int]]) -> Iterator[None]:
        """Let a thread set what is done, while the context lasts.

        Args:
            counts: Returns the bytes and the images that are done.
        """
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
        first = self._marks[0]
        last = self._marks[-1]
        seconds = max(last.seconds - first.seconds, 1e-3)
        rate = (last.size - first.size) / seconds
        images_s = (last.images - first.images) / seconds

        # Bytes tell the remaining time better than images, which differ in size.
        remaining = None
        if rate:
            remaining = (self._size - last.size) / rate
        elif images_s:
            remaining = (self._images - last.images) / images_s

        # The most important first: a narrow terminal shows no more than the beginning.
        parts = []
        if self._images:
            parts.append(f"{last.images:,}/{self._images:,} images")
        if self._size:
            parts.append(f"{last.size / 1e6:,.1f}/{self._size / 1e6:,.1f} MB")
        if remaining is not None and seconds >= KNOWN_SECONDS:
            parts.append(f"{duration(remaining)} left")
        if self._size:
            parts.append(f"{rate / 1e6:,.1f} MB/s")
        if self._images:
            parts.append(f"{images_s:,.0f} img/s")
        self.show(last.size if self._size else last.images, *parts)


@contextlib.contextmanager
def counted(images: int) -> Iterator[Callable[[int], None]]:
    """Show a bar for so many images, and yield the function that counts those that are done."""
    with Meter(0, images) as meter:
        yield partial(meter.add, 0)
