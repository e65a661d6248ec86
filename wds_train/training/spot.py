"""The warning that this instance is about to go, from the instance metadata service (IMDSv2): EC2's, which takes a spot
instance back, or its Auto Scaling group's.

https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html: `spot/instance-action`
answers 404 until about two minutes before the end, best effort; AWS asks to look every 5 seconds.
https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/rebalance-recommendations.html: may come earlier, or not at all.
https://docs.aws.amazon.com/autoscaling/ec2/userguide/retrieving-target-lifecycle-state-through-imds.html: `Terminated` once the
group is set to none; a lifecycle hook gives the time to commit.
"""

import contextlib
import http.client
import json
import os
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from wds_train.training.stop import StopRequest

POLL_SECONDS = 5.0
ANSWER_SECONDS = 0.4  # the service is on this machine and answers in milliseconds
NOTICE_SECONDS = 120.0
TOKEN_TTL = "21600"

Ask = Callable[[str, str, dict[str, str]], tuple[int, bytes]]
"""(method, path, headers) -> (status, body); OSError or HTTPException when there is no answer."""
Tell = Callable[..., None]


class SpotWatch:
    """Looks for the notice in a thread, as a context manager; the training loop reads the attributes.

    A notice asks `stop` to end the training by the time at which the instance goes. `rebalance`: whether EC2 has recommended
    to move. `tell(instance=...)` is told the instance's type. Elsewhere than on EC2 the thread ends in under a second. A service that fails later means that nothing is
    known, never that the instance goes.
    """

    def __init__(
        self, stop: StopRequest, ask: Ask | None = None, every: float = POLL_SECONDS, *, tell: Tell | None = None
    ) -> None:
        self.rebalance = False
        self._stop = stop
        self._ask = ask or _ask
        self._every, self._tell = every, tell
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
        with contextlib.suppress(OSError, http.client.HTTPException):
            if self._read("autoscaling/target-lifecycle-state") == b"Terminated":
                self._stop.ask("the Auto Scaling group, which ends this instance")
                return True
        return False

    def _watch(self) -> None:
        if self._is_ec2():
            self._tell_type()
            while not self.look() and not self._stopped.wait(self._every):
                pass

    def _is_ec2(self) -> bool:
        for _ in range(2):
            with contextlib.suppress(OSError, http.client.HTTPException):
                self._renew()
                if self._token is not None:
                    return True
        return False

    def _tell_type(self) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if self._tell is not None and (kind := self._read("instance-type")):
                self._tell(instance=kind.decode("latin-1"))

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
    """How long it is from now to the time in {"action": "terminate", "time": "2026-01-31T08:22:00Z"}; by default what
    AWS promises, as where that time is past already: then this machine's clock is wrong.
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
