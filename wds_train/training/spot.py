"""The warning that this instance is about to go, from the instance metadata service (IMDSv2).

EC2's, which takes a spot instance back, or its Auto Scaling group's.

https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html:
`spot/instance-action` answers 404 until about two minutes before the end, best effort; AWS asks to
look every 5 seconds.
https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/rebalance-recommendations.html: may come
earlier, or not at all.
https://docs.aws.amazon.com/autoscaling/ec2/userguide/retrieving-target-lifecycle-state-through-imds.html:
`Terminated` once the group is set to none; a lifecycle hook gives the time to commit.
"""

import contextlib
import http.client
import json
import os
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from wds_train.training.stop_request import StopRequest

POLL_SECONDS = 5.0
FIRST_SECONDS = 0.4  # for each of the first two answers, where nothing else says that this is EC2
# For each later one, and where it is EC2: a busy machine's service may be slow, and nobody waits
# for it.
ANSWER_SECONDS = 5.0
NOTICE_SECONDS = 120.0
SILENT_LOOKS = 12  # in a row without an answer, after which it is said: a minute
TOKEN_TTL = "21600"
SYSTEM = Path("/sys")
ADDRESSES = {"ipv4": "http://169.254.169.254", "ipv6": "http://[fd00:ec2::254]"}

NO_ANSWER = (OSError, http.client.HTTPException, ValueError)  # the last of an address that is none
Ask = Callable[[str, str, dict[str, str]], tuple[int, bytes]]
"""(method, path, headers) -> (status, body); one of NO_ANSWER when there is none."""
Tell = Callable[..., None]
Say = Callable[[str], object]


class SpotWatch:
    """Looks for the notice in a thread, as a context manager; the training loop reads the
    attributes.

    A notice asks `stop` to end the training by the time at which the instance goes. `rebalance`:
    whether EC2 has recommended to move. `tell(instance=...)` is told the instance's type. Where
    this is EC2, the service is asked as long as the training lives, and `say` gets a line when it
    cannot be reached. Elsewhere the thread ends in under a second. A service that fails means that
    nothing is known, never that the instance goes.
    """

    def __init__(
        self,
        stop: StopRequest,
        ask: Ask | None = None,
        every: float = POLL_SECONDS,
        *,
        tell: Tell | None = None,
        say: Say = lambda _: None,
    ) -> None:
        self.rebalance = False
        self._stop = stop
        self._ask = ask or self._ask_service
        self._every = every
        self._tell = tell
        self._say = say
        self._seconds = FIRST_SECONDS
        self._token: str | None = None
        self._evidence = evidence_of_ec2()
        self._problem = ""
        self._reached = False
        self._silent = 0
        self._told = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="spot", daemon=True)

    def __enter__(self) -> Self:
        if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() != "true":
            self._thread.start()
        elif self._evidence:
            self._warn("is not asked, since AWS_EC2_METADATA_DISABLED = true", "unset it")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._stopped.set()
        # the training was over before the thread could tell
        if self._evidence and not self._reached:
            self._warn(*_remedy(self._problem or "no answer yet"))

    def look(self) -> bool:
        """Look once; whether there is a notice. What cannot be learnt stays as it was."""
        if (action := self._learnt("spot/instance-action")) is not None:
            self._stop.ask("the spot notice", _seconds_left(action))
            return True
        self.rebalance |= self._learnt("events/recommendations/rebalance") is not None
        if self._learnt("autoscaling/target-lifecycle-state") == b"Terminated":
            self._stop.ask("the Auto Scaling group, which ends this instance")
            return True
        return False

    def _watch(self) -> None:
        """The body of the thread."""
        if not self._is_ec2():
            return
        self._tell_type()
        while not self.look():
            self._judge_silence()
            if self._stopped.wait(self._every):
                return

    def _is_ec2(self) -> bool:
        """Return True if this is EC2, once it is known; on EC2, whether the service has answered
        before the training's end.
        """
        for seconds in (
            (ANSWER_SECONDS,) if self._evidence else (FIRST_SECONDS, FIRST_SECONDS, ANSWER_SECONDS)
        ):
            self._seconds = seconds
            if self._is_reached():
                return True
        if not self._evidence:
            return False
        while not self._is_reached():
            self._warn(*_remedy(self._problem))
            if self._stopped.wait(self._every):
                return False
        if self._told:
            self._say("spot     the metadata service answers now: a spot notice will be heeded")
        return True

    def _is_reached(self) -> bool:
        """Return True if the service gives a token, without which it says nothing."""
        try:
            self._renew()
        except NO_ANSWER as error:
            self._problem = str(error) or type(error).__name__
        if self._token is None:
            return False
        self._reached = True
        self._seconds = ANSWER_SECONDS
        return True

    def _judge_silence(self) -> None:
        """Say once when a service that has answered before does so no more."""
        if self._silent >= 3 * SILENT_LOOKS and not self._told:
            self._warn(
                f"answers no more ({self._problem})",
                "it is asked on, but a notice may be missed meanwhile",
            )

    def _warn(self, what: str, remedy: str) -> None:
        if not self._told:
            self._told = True
            seen = f" ({self._evidence})" if self._evidence else ""
            self._say(
                f"spot     this is EC2{seen}, whose metadata service at {address()} {what}: "
                f"no spot notice would be seen; {remedy}"
            )

    def _tell_type(self) -> None:
        if self._tell is not None and (kind := self._learnt("instance-type")):
            self._tell(instance=kind.decode("latin-1"))

    def _renew(self) -> None:
        status, body = self._ask(
            "PUT", "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": TOKEN_TTL}
        )
        self._token = body.decode("latin-1") if status == 200 else None
        self._problem = "" if status == 200 else f"status {status}"

    def _learnt(self, path: str) -> bytes | None:
        """Return the document, or None where there is none, or no answer."""
        try:
            found = self._read(path)
        except NO_ANSWER as error:
            self._silent += 1
            self._problem = str(error) or type(error).__name__
            return None
        self._silent = 0
        return found

    def _read(self, path: str) -> bytes | None:
        """Return the document, or None where there is none.

        Raises:
            OSError: The service will not say; or another one of NO_ANSWER.
        """
        for _ in range(2):
            if self._token is None:
                self._renew()
            headers = {"X-aws-ec2-metadata-token": self._token or ""}
            status, body = self._ask("GET", f"/latest/meta-data/{path}", headers)
            if status in (200, 404):
                return body if status == 200 else None
            if status != 401:
                break
            self._token = None  # it has expired
        raise OSError(f"status {status}")

    def _ask_service(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, bytes]:
        place = urlsplit(address())
        if not place.netloc:
            raise OSError(f"{address()} is no address such as {ADDRESSES['ipv4']}")
        with contextlib.closing(
            http.client.HTTPConnection(place.netloc, timeout=self._seconds)
        ) as connection:
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read(1 << 16)


def evidence_of_ec2(system: Path | None = None) -> str:
    """Return what shows that this machine is one of EC2's, or that its metadata service is wanted;
    "" where nothing does.

    https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/identify_ec2_instances.html
    """
    system = system or SYSTEM
    if os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT"):
        return "AWS_EC2_METADATA_SERVICE_ENDPOINT is set"
    for name in ("sys_vendor", "board_vendor", "bios_vendor", "chassis_vendor"):
        if "amazon ec2" in _text(system / "class/dmi/id" / name).lower():
            return f"{name} is Amazon EC2"
    if "amazon" in _text(system / "class/dmi/id/bios_version").lower():
        return "bios_version names Amazon"
    for path in ("hypervisor/uuid", "class/dmi/id/product_uuid"):
        if _text(system / path).lower().startswith("ec2"):
            return f"{path} begins with ec2"
    return ""


def address() -> str:
    """Return where the metadata service is: as the AWS settings say, else at its usual place."""
    mode = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE", "").lower()
    return os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or ADDRESSES.get(
        mode, ADDRESSES["ipv4"]
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:  # not every machine has the file, and not every user may read it
        return ""


def _remedy(problem: str) -> tuple[str, str]:
    """Return what a service that gives no token does, and what helps."""
    if problem in ("status 403", "status 404"):
        return f"gives no token ({problem})", (
            "switch it on: aws ec2 modify-instance-metadata-options --instance-id ID "
            "--http-endpoint enabled"
        )
    return f"cannot be reached ({problem})", (
        "in a container its answers need two hops: aws ec2 modify-instance-metadata-options "
        "--instance-id ID --http-put-response-hop-limit 2 (HttpPutResponseHopLimit 2), or run the "
        "container on the host's network"
    )


def _seconds_left(action: bytes) -> float:
    """Return the seconds until the time that a notice names.

    `action` is such as {"action": "terminate", "time": "2026-01-31T08:22:00Z"}. Without a time it
    is what AWS promises, and also where that time is past: then this machine's clock is wrong.
    """
    try:
        left = (
            datetime.fromisoformat(json.loads(action)["time"]) - datetime.now(UTC)
        ).total_seconds()
    except (ValueError, TypeError, KeyError):
        return NOTICE_SECONDS
    return left if 0 < left < NOTICE_SECONDS else NOTICE_SECONDS
