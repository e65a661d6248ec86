"""What asks a training to stop: signals, and EC2's warning that it is about to take this spot instance back, read from
the instance metadata service (IMDSv2).

https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html: `spot/instance-action`
answers 404 until about two minutes before the end, best effort; AWS asks to look every 5 seconds.
https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/rebalance-recommendations.html: may come earlier, or not at all.
"""

import contextlib
import http.client
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from types import FrameType, TracebackType
from typing import Self
from urllib.parse import urlsplit

from wds_train.errors import Interrupted

POLL_SECONDS = 5.0
ANSWER_SECONDS = 0.4  # the service is on this machine and answers in milliseconds
NOTICE_SECONDS = 120.0
TOKEN_TTL = "21600"

Ask = Callable[[str, str, dict[str, str]], tuple[int, bytes]]
"""(method, path, headers) -> (status, body); OSError or HTTPException when there is no answer."""


class StopRequest:
    """Set by SIGTERM or SIGINT, and read between steps. The same signal again stops at once. Made before the imports
    that take seconds, so that a signal during these is not lost.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        signal.signal(signal.SIGTERM, self._set)
        signal.signal(signal.SIGINT, self._set)

    def _set(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.signal == name:
            raise KeyboardInterrupt
        self.signal = name
        # Not print(): its buffer may be in use in the very code that the signal interrupted.
        os.write(2, f"{name}: stopping at the next step, state committed; once more stops at once\n".encode())

    def check(self) -> None:
        """Raise `Interrupted` if asked to stop. For the time before the training, when there is nothing to commit."""
        if self.signal:
            raise Interrupted(f"stopped by {self.signal} before the training began; nothing was changed")

    def sleep(self, seconds: float) -> None:
        """`time.sleep`, with `check`s."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.check()
            time.sleep(min(left, 0.2))
        self.check()


class SpotWatch:
    """Looks for the notice in a thread, as a context manager; the training loop reads the attributes.

    `notice`: the `time.monotonic()` at which the instance goes, or None. `rebalance`: whether EC2 has recommended to
    move. `watching`: False once it is clear that this is no EC2 instance, known before the block begins, in under a
    second. A service that fails later means that nothing is known, never that the instance goes.
    """

    def __init__(self, ask: Ask | None = None, every: float = POLL_SECONDS) -> None:
        self.notice: float | None = None
        self.rebalance = False
        self.watching = False
        self._ask = ask or _ask
        self._every = every
        self._token: str | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="spot", daemon=True)

    def __enter__(self) -> Self:
        self.watching = os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() != "true" and self._is_ec2()
        if self.watching:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stopped.set()

    def look(self) -> None:
        """Look once. What cannot be learnt stays as it was."""
        with contextlib.suppress(OSError, http.client.HTTPException):
            self.rebalance |= self._read("events/recommendations/rebalance") is not None
        with contextlib.suppress(OSError, http.client.HTTPException):
            action = self._read("spot/instance-action")
            if action is not None and self.notice is None:
                self.notice = time.monotonic() + _seconds_left(action)

    def _watch(self) -> None:
        while self.notice is None:
            self.look()
            if self._stopped.wait(self._every):
                return

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
    """From now to the time in {"action": "terminate", "time": "2026-01-31T08:22:00Z"}; by default what AWS promises."""
    try:
        end = datetime.fromisoformat(json.loads(action)["time"])
        return min(max((end - datetime.now(UTC)).total_seconds(), 0.0), NOTICE_SECONDS)
    except (ValueError, TypeError, KeyError):
        return NOTICE_SECONDS


def _ask(method: str, path: str, headers: dict[str, str]) -> tuple[int, bytes]:
    place = urlsplit(os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254"))
    with contextlib.closing(http.client.HTTPConnection(place.netloc, timeout=ANSWER_SECONDS)) as connection:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read(1 << 16)
