"""The request to stop a training, and the deadline by which its process has to end.

Signals, the spot notice, the Stop button of W&B and other ranks ask; the training loop reads it.
"""

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

# Seconds from a signal to the end: the least that supervisors and EC2 wait before they kill.
GRACE_SECONDS = 90.0
# Between two looks at the deadline.
LOOK_SECONDS = 0.5
# The signals on which a training commits and ends.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# The signals that end it at once the second time. The others may come twice by themselves: SIGHUP,
# of a terminal that was closed, from the kernel and from the shell; SIGUSR1 and SIGUSR2, which
# Slurm sends some time before its limit, from Slurm and from a script that passes them on.
TWICE = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """A request to end the training: its cause, and its deadline.

    The loop reads it between steps. A thread ends the process at the deadline, whatever hangs. The
    first cause is the one that is named, the earliest deadline the one that counts.

    Attributes:
        cause: Who or what asked first; None until then.
        by_person: The training is to end for good.
        deadline: Monotonic seconds.
        doing: The activity of the training, which is named when it hangs.
        code: The exit code for a process that is ended at the deadline.
    """

    def __init__(self) -> None:
        self.cause: str | None = None
        self.by_person = False
        self.deadline = float("inf")
        self.doing = "the start"
        self.code = Interrupted.exit_code
        self._signals: set[int] = set()

    def listen(self) -> Self:
        """Let signals ask, and start the thread of the deadline.

        Call it before the imports that take seconds, so that a signal during these is not lost.
        """
        # `nohup` ignores SIGHUP. A rank takes it in any case: it says that the launcher died, and
        # no terminal sends it there.
        numbers = set(SIGNALS)
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN and "WDS_LAUNCHER" not in os.environ:
            numbers.remove(signal.SIGHUP)
        for number in numbers:
            signal.signal(number, self._handle)

        # Python's handlers wait for the main thread, which may hang in C code. The numbers that
        # arrive in this pipe do not.
        arrived, arrive = os.pipe()
        os.set_blocking(arrive, False)
        signal.set_wakeup_fd(arrive, warn_on_full_buffer=False)
        # A loader worker must not write its own signals into the pipe.
        os.register_at_fork(after_in_child=partial(signal.set_wakeup_fd, -1))
        arguments = (arrived, numbers)
        threading.Thread(target=self._watch, args=arguments, name="deadline", daemon=True).start()
        return self

    def ask(self, cause: str, seconds: float | None = None, *, by_person: bool = False) -> None:
        """Ask the training to end.

        Args:
            cause: Who or what asks, for messages.
            seconds: The time until the deadline; by default GRACE_SECONDS.
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

    def _handle(self, number: int, _: FrameType | None) -> None:
        """Take a signal: the handler, in the main thread."""
        name = signal.Signals(number).name
        if number in self._signals:
            if number not in TWICE:
                return
            raise KeyboardInterrupt
        self._signals.add(number)
        self.ask(name)
        line = f"{name}: stopping at the next step, state committed"
        if number in TWICE:
            line += "; once more stops at once"
        # On a terminal the cursor is behind the bar, and behind the ^C that was typed.
        if os.isatty(2):
            line = f"\n{line}"
        _write_line(f"{line}\n")

    def _watch(self, arrived: int, numbers: set[signal.Signals]) -> None:
        """End the process at the deadline: the body of the thread."""
        # A signal begins the grace, even if its handler never runs.
        left = self.left
        while left > 0:
            readable, _, _ = select.select([arrived], [], [], min(left, LOOK_SECONDS))
            if readable and numbers & set(os.read(arrived, 512)):
                self.deadline = min(self.deadline, time.monotonic() + GRACE_SECONDS)
            left = self.left

        cause = self.cause or "a signal"
        _write_line(
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
        left = seconds
        while left > 0:
            self.check()
            time.sleep(min(left, 0.2))
            left = end - time.monotonic()
        self.check()


def _write_line(line: str) -> None:
    """Write a line to stderr, without print().

    The buffer of print() may be in use in the code that the signal interrupted.
    """
    try:
        os.write(2, line.encode())
    except OSError:
        # Nobody listens any more, as in a terminal that was closed. Later lines must not fail
        # either: that would end the training before its last commit.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for output in (1, 2):
            os.dup2(nowhere, output)


def leave(code: int) -> NoReturn:
    """End this process and its loader workers now, without waiting for threads or cleaning up."""
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(code)
