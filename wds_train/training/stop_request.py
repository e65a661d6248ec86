"""The request to stop a training, and the deadline by which it has to be gone."""

import multiprocessing
import os
import select
import signal
import threading
import time
from functools import partial
from types import FrameType
from typing import NoReturn, Self

from wds_train.errors import Interrupted, StoppedByPerson

# From a signal to the end: the least that supervisors and EC2 wait between asking and killing.
GRACE_SECONDS = 90.0
LOOK_SECONDS = 0.5  # between two looks at the deadline
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""The signals on which a training commits and ends."""
TWICE = (signal.SIGTERM, signal.SIGINT)
"""The signals that end it at once the second time."""


class StopRequest:
    """Knows that a training is to end, why, and by when: the loop reads it between steps, and a
    thread of its own ends the process when the time is up, whatever hangs. The first cause is the
    one that is told, the earliest deadline the one that counts.

    Asked by the SIGNALS and whoever calls `ask`. SIGTERM or SIGINT again stops at once. The others
    may come twice by themselves: SIGHUP, of a terminal that was closed, from the kernel and from
    the shell; SIGUSR1 and SIGUSR2, which Slurm sends some time before its limit, from Slurm and
    from a script that passes them on.
    """

    def __init__(self) -> None:
        self.cause: str | None = None
        self.by_person = False
        self.deadline = float("inf")
        self.doing = "the start"
        """The activity of the training, which is named when it hangs."""
        self.code = Interrupted.exit_code
        self._signals: set[int] = set()

    def listen(self) -> Self:
        """Heed signals.

        Call it before the imports that take seconds, so that a signal during these is not lost.
        """
        numbers = set(SIGNALS)
        # `nohup` ignores it. A rank heeds it in any case: it says that the launcher died, and no
        # terminal sends it there.
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN and "WDS_LAUNCHER" not in os.environ:
            numbers.remove(signal.SIGHUP)
        for number in numbers:
            signal.signal(number, self._set)
        # Python's handlers wait for the main thread, which may hang in C code; what arrives here
        # does not.
        arrived, arrive = os.pipe()
        os.set_blocking(arrive, False)
        signal.set_wakeup_fd(arrive, warn_on_full_buffer=False)
        # A loader worker's signals are its own.
        os.register_at_fork(after_in_child=partial(signal.set_wakeup_fd, -1))
        arguments = (arrived, numbers)
        threading.Thread(target=self._watch, args=arguments, name="deadline", daemon=True).start()
        return self

    def ask(self, cause: str, seconds: float | None = None, *, by_person: bool = False) -> None:
        """Ask the training to end.

        Args:
            cause: Who or what asks, for messages.
            seconds: The time that is left; by default GRACE_SECONDS.
            by_person: End it for good, so that no replacement goes on.
        """
        if by_person:
            self.by_person = True
            self.code = StoppedByPerson.exit_code
        self.cause = self.cause or cause
        if seconds is None:
            seconds = GRACE_SECONDS
        self.deadline = min(self.deadline, time.monotonic() + seconds)

    @property
    def left(self) -> float:
        """The seconds until the deadline."""
        return self.deadline - time.monotonic()

    def _set(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number in self._signals:
            if number not in TWICE:
                return
            raise KeyboardInterrupt
        self._signals.add(number)
        self.ask(name)
        again = "; once more stops at once" if number in TWICE else ""
        start = "\n" if os.isatty(2) else ""  # behind the bar, and the ^C that the terminal shows
        _tell(f"{start}{name}: stopping at the next step, state committed{again}\n")

    def _watch(self, arrived: int, numbers: set[signal.Signals]) -> None:
        """The body of the thread that ends the process."""
        while (left := self.left) > 0:
            readable, _, _ = select.select([arrived], [], [], min(left, LOOK_SECONDS))
            if readable and numbers & set(os.read(arrived, 512)):
                self.deadline = min(self.deadline, time.monotonic() + GRACE_SECONDS)
        cause = self.cause or "a signal"
        _tell(
            f"wds-train: {cause}: the time is up while {self.doing} hangs; what was committed "
            "before stands\n"
        )
        leave(self.code)

    def check(self) -> None:
        """Raise `Interrupted` if asked to stop.

        This is for the time before the training, when there is nothing to commit.
        """
        if self.cause:
            raise Interrupted(
                f"stopped by {self.cause} before the training began; nothing was changed"
            )

    def sleep(self, seconds: float) -> None:
        """Sleep as `time.sleep` does, with a `check` now and then."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.check()
            time.sleep(min(left, 0.2))
        self.check()


def _tell(line: str) -> None:
    """Write a line to stderr, without print(): its buffer may be in use in the very code that a
    signal interrupted. Where nobody listens any more, as in a terminal that was closed, no later
    line may fail either: it would end the training before its last commit.
    """
    try:
        os.write(2, line.encode())
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for output in (1, 2):
            os.dup2(nowhere, output)


def leave(code: int) -> NoReturn:
    """End this process and its loader workers now.

    No thread is waited for, and nothing is put in order.
    """
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(code)
