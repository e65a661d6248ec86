"""What asks a training to stop: signals, and EC2's warning that it is about to take this spot instance back, read from
the instance metadata service (IMDSv2).

https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html: `spot/instance-action`
answers 404 until about two minutes before the end, best effort; AWS asks to look every 5 seconds.
https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/rebalance-recommendations.html: may come earlier, or not at all.
"""

import contextlib
import http.client
import json
import multiprocessing
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from types import FrameType, TracebackType
from typing import NoReturn, Self
from urllib.parse import urlsplit

from wds_train.errors import Interrupted

GRACE_SECONDS = 90.0  # from a signal to the end: the least that supervisors and EC2 wait between asking and killing
LOOK_SECONDS = 0.5  # between two looks at the deadline
POLL_SECONDS = 5.0
ANSWER_SECONDS = 0.4  # the service is on this machine and answers in milliseconds
NOTICE_SECONDS = 120.0
TOKEN_TTL = "21600"

Ask = Callable[[str, str, dict[str, str]], tuple[int, bytes]]
"""(method, path, headers) -> (status, body); OSError or HTTPException when there is no answer."""


class StopRequest:
    """That a training is to end, why, and by when: the loop reads it between steps, and a thread of its own ends the process
    when the time is up, whatever hangs. The first cause is the one that is told, the earliest deadline the one that counts.

    Asked by SIGTERM, SIGINT, SIGHUP (a terminal that was closed) and whoever calls `ask`. SIGTERM or SIGINT again stops at
    once; SIGHUP comes twice by itself, from the kernel and from the shell.
    """

    def __init__(self) -> None:
        self.cause: str | None = None
        self.deadline = float("inf")
        self.doing = "the start"
        """What the training is at, to be named when it hangs."""
        self.code = Interrupted.exit_code
        self._signals: set[int] = set()

    def listen(self) -> Self:
        """Heed signals. To be called before the imports that take seconds, so that one during these is not lost."""
        numbers = [signal.SIGTERM, signal.SIGINT]
        # `nohup` ignores it. A rank heeds it in any case: it says that the launcher died, and no terminal sends it there.
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN or "WDS_LAUNCHER" in os.environ:
            numbers.append(signal.SIGHUP)
        for number in numbers:
            signal.signal(number, self._set)
        # Python's handlers wait for the main thread, which may hang in C code; what arrives here does not.
        arrived, arrive = os.pipe()
        os.set_blocking(arrive, False)
        signal.set_wakeup_fd(arrive, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=partial(signal.set_wakeup_fd, -1))  # a loader worker's signals are its own
        threading.Thread(target=self._watch, args=(arrived, set(numbers)), name="deadline", daemon=True).start()
        return self

    def ask(self, cause: str, seconds: float | None = None) -> None:
        """Ask the training to end within `seconds`, by default GRACE_SECONDS."""
        self.cause = self.cause or cause
        self.deadline = min(self.deadline, time.monotonic() + (GRACE_SECONDS if seconds is None else seconds))

    @property
    def left(self) -> float:
        """The seconds until the deadline."""
        return self.deadline - time.monotonic()

    def _set(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number in self._signals:
            if number == signal.SIGHUP:
                return
            raise KeyboardInterrupt
        self._signals.add(number)
        self.ask(name)
        again = "" if number == signal.SIGHUP else "; once more stops at once"
        _tell(f"{name}: stopping at the next step, state committed{again}\n")

    def _watch(self, arrived: int, numbers: set[signal.Signals]) -> None:
        """The body of the thread that ends the process."""
        while (left := self.left) > 0:
            if select.select([arrived], [], [], min(left, LOOK_SECONDS))[0] and numbers & set(os.read(arrived, 512)):
                self.deadline = min(self.deadline, time.monotonic() + GRACE_SECONDS)
        cause = self.cause or "a signal"
        _tell(f"wds-train: {cause}: the time is up while {self.doing} hangs; what was committed before stands\n")
        leave(self.code)

    def check(self) -> None:
        """Raise `Interrupted` if asked to stop. For the time before the training, when there is nothing to commit."""
        if self.cause:
            raise Interrupted(f"stopped by {self.cause} before the training began; nothing was changed")

    def sleep(self, seconds: float) -> None:
        """`time.sleep`, with `check`s."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.check()
            time.sleep(min(left, 0.2))
        self.check()


def _tell(line: str) -> None:
    """Not print(): its buffer may be in use in the very code that a signal interrupted. Where nobody listens any more, as in
    a terminal that was closed, no later line may fail either: it would end the training before its last commit.
    """
    try:
        os.write(2, line.encode())
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for output in (1, 2):
            os.dup2(nowhere, output)


def leave(code: int) -> NoReturn:
    """End this process and its loader workers now: no thread is waited for, and nothing is put in order."""
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(code)


class SpotWatch:
    """Looks for the notice in a thread, as a context manager; the training loop reads the attributes.

    A notice asks `stop` to end the training by the time at which the instance goes. `rebalance`: whether EC2 has recommended
    to move. Elsewhere than on EC2 the thread ends in under a second. A service that fails later means that nothing is
    known, never that the instance goes.
    """

    def __init__(self, stop: StopRequest, ask: Ask | None = None, every: float = POLL_SECONDS) -> None:
        self.rebalance = False
        self._stop = stop
        self._ask = ask or _ask
        self._every = every
        self._token: str | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="spot", daemon=True)

    def __enter__(self) -> Self:
        if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() != "true":
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stopped.set()

    def look(self) -> bool:
        """Look once; whether there is a notice. What cannot be learnt stays as it was."""
        with contextlib.suppress(OSError, http.client.HTTPException):
            self.rebalance |= self._read("events/recommendations/rebalance") is not None
        with contextlib.suppress(OSError, http.client.HTTPException):
            action = self._read("spot/instance-action")
            if action is not None:
                self._stop.ask("the spot notice", _seconds_left(action))
                return True
        return False

    def _watch(self) -> None:
        if self._is_ec2():
            while not self.look() and not self._stopped.wait(self._every):
                pass

    def _is_ec2(self) -> bool:
        for _ in range(2):
            with contextlib.suppress(OSError, http.client.HTTPException):
                self._renew()
                if self._token is not None:
                    return True
        return False

    def _renew(self) -> None:
        status, body = self._ask("PUT", "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": TOKEN_TTL})
        self._token = body.decode("latin-1") if status == 200 else None

    def _read(self, path: str) -> bytes | None:
        """The document, or None where there is none or the service will not say."""
        for _ in range(2):
            if self._token is None:
                self._renew()
            headers = {"X-aws-ec2-metadata-token": self._token or ""}
            status, body = self._ask("GET", f"/latest/meta-data/{path}", headers)
            if status != 401:
                return body if status == 200 else None
            self._token = None  # it has expired
        return None


def _seconds_left(action: bytes) -> float:
    """From now to the time in {"action": "terminate", "time": "2026-01-31T08:22:00Z"}; by default what AWS promises, as
    where that time is past already: then this machine's clock is wrong.
    """
    try:
        left = (datetime.fromisoformat(json.loads(action)["time"]) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError, KeyError):
        return NOTICE_SECONDS
    return left if 0 < left < NOTICE_SECONDS else NOTICE_SECONDS


def _ask(method: str, path: str, headers: dict[str, str]) -> tuple[int, bytes]:
    place = urlsplit(os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254"))
    with contextlib.closing(http.client.HTTPConnection(place.netloc, timeout=ANSWER_SECONDS)) as connection:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read(1 << 16)
