"""The notice that this instance is about to end, from the instance metadata service (IMDSv2).

It comes from EC2, which takes a spot instance back, or from its Auto Scaling group.

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

# Between two looks: AWS asks for this interval.
POLL_SECONDS = 5.0
# For each of the first two answers where nothing else says that this is EC2: elsewhere the address
# may swallow every packet.
FIRST_SECONDS = 0.4
# For each later answer, and on EC2: the service of a busy machine may be slow, and nothing waits
# for it.
ANSWER_SECONDS = 5.0
# From the notice to the end, as AWS promises.
NOTICE_SECONDS = 120.0
# Looks in a row without an answer until a line says so: a minute.
SILENT_LOOKS = 12
# Seconds that a token is valid: 6 hours, the most that the service gives.
TOKEN_TTL = "21600"
# The kernel's files on the machine; tests have another folder.
SYSTEM = Path("/sys")
ADDRESSES = {"ipv4": "http://169.254.169.254", "ipv6": "http://[fd00:ec2::254]"}

# The errors of a service that does not answer; a ValueError comes of an address that cannot be one.
NO_ANSWER = (OSError, http.client.HTTPException, ValueError)
# Sends a request: (method, path, headers) -> (status, body). It raises one of NO_ANSWER.
Ask = Callable[[str, str, dict[str, str]], tuple[int, bytes]]
# Gets facts of the instance, by their names.
Tell = Callable[..., None]
# Shows a line to a person.
Say = Callable[[str], object]


class SpotWatch:
    """Looks for the notice in a thread, inside a `with` block.

    A notice asks `stop` to end the training by the time at which the instance ends. On EC2 the
    service is asked as long as the training lives, and a line says so when it cannot be reached.
    Elsewhere the thread ends within seconds. A service that fails never counts as a notice.

    Args:
        ask: Sends a request to the service; tests have their own.
        every: Seconds between two looks.
        tell: Called with `instance=`, the type of the instance.
        say: Called with a line for a person.

    Attributes:
        rebalance: True once EC2 has recommended to move.
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
        self._warned = False
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
        # A training that was over before the thread could say so.
        if self._evidence and not self._reached:
            self._warn(*_remedy(self._problem or "no answer yet"))

    def look(self) -> bool:
        """Look once; return True if there is a notice. No answer changes nothing."""
        action = self._fetch("spot/instance-action")
        if action is not None:
            self._stop.ask("the spot notice", _seconds_left(action))
            return True
        self.rebalance |= self._fetch("events/recommendations/rebalance") is not None
        if self._fetch("autoscaling/target-lifecycle-state") == b"Terminated":
            self._stop.ask("the Auto Scaling group, which ends this instance")
            return True
        return False

    def _watch(self) -> None:
        """Look until there is a notice, or the training ends: the body of the thread."""
        if not self._reach_service():
            return
        self._tell_type()
        while not self.look():
            self._judge_silence()
            if self._stopped.wait(self._every):
                return

    def _reach_service(self) -> bool:
        """Wait for the first answer of the service; return False where this is not EC2."""
        # Ask, elsewhere three times: one packet may be lost.
        waits = [FIRST_SECONDS, FIRST_SECONDS, ANSWER_SECONDS]
        if self._evidence:
            waits = [ANSWER_SECONDS]
        for seconds in waits:
            self._seconds = seconds
            if self._is_reached():
                return True
        if not self._evidence:
            return False

        # EC2, whose service does not answer: warn, and go on asking until the training ends.
        while not self._is_reached():
            self._warn(*_remedy(self._problem))
            if self._stopped.wait(self._every):
                return False
        if self._warned:
            self._say("spot     the metadata service answers now: a spot notice will be heeded")
        return True

    def _is_reached(self) -> bool:
        """Return True if the service gives a token: it answers nothing without one."""
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
        """Warn once when a service that has answered before does so no more."""
        # Each look has three requests.
        if self._silent >= 3 * SILENT_LOOKS and not self._warned:
            self._warn(
                f"answers no more ({self._problem})",
                "it is asked on, but a notice may be missed meanwhile",
            )

    def _warn(self, what: str, remedy: str) -> None:
        """Say once that no notice would be seen: `what` the service does, and the remedy."""
        if self._warned:
            return
        self._warned = True
        seen = ""
        if self._evidence:
            seen = f" ({self._evidence})"
        self._say(
            f"spot     this is EC2{seen}, whose metadata service at {address()} {what}: "
            f"no spot notice would be seen; {remedy}"
        )

    def _tell_type(self) -> None:
        """Tell the instance's type, for the cost of the run."""
        if self._tell is None:
            return
        kind = self._fetch("instance-type")
        if kind:
            self._tell(instance=kind.decode("latin-1"))

    def _renew(self) -> None:
        """Get a token; keep the reason where the service gives none."""
        status, body = self._ask(
            "PUT", "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": TOKEN_TTL}
        )
        if status == 200:
            self._token = body.decode("latin-1")
            self._problem = ""
        else:
            self._token = None
            self._problem = f"status {status}"

    def _fetch(self, path: str) -> bytes | None:
        """Return the document; None where there is none, or no answer."""
        try:
            found = self._read(path)
        except NO_ANSWER as error:
            self._silent += 1
            self._problem = str(error) or type(error).__name__
            return None
        self._silent = 0
        return found

    def _read(self, path: str) -> bytes | None:
        """Return the document; None where there is none.

        Raises:
            OSError: The service refuses; or another one of NO_ANSWER.
        """
        for _ in range(2):  # the first answer may be that the token has expired
            if self._token is None:
                self._renew()
            headers = {"X-aws-ec2-metadata-token": self._token or ""}
            status, body = self._ask("GET", f"/latest/meta-data/{path}", headers)
            if status == 200:
                return body
            if status == 404:
                return None
            if status != 401:
                break
            self._token = None
        raise OSError(f"status {status}")

    def _ask_service(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, bytes]:
        """Send a request to the service, as `Ask` has it."""
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
    """Return the sign that this machine is an EC2 instance, in words; "" where there is none.

    https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/identify_ec2_instances.html

    Args:
        system: The kernel's files; by default /sys.
    """
    system = system or SYSTEM
    # A person who sets the address wants the service to be asked.
    if os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT"):
        return "AWS_EC2_METADATA_SERVICE_ENDPOINT is set"
    # Nitro instances name their vendor; older ones the version of their BIOS, or begin their UUID
    # with EC2.
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
    """Return the address of the metadata service: that of the AWS settings, or its usual one."""
    mode = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE", "").lower()
    return os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or ADDRESSES.get(
        mode, ADDRESSES["ipv4"]
    )


def _text(path: Path) -> str:
    """Return the content of a file; "" where it is not there, or this user may not read it."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _remedy(problem: str) -> tuple[str, str]:
    """Return the fault of a service that gives no token, in words, and the remedy."""
    # It answers, but is switched off for this instance.
    if problem in ("status 403", "status 404"):
        return f"gives no token ({problem})", (
            "switch it on: aws ec2 modify-instance-metadata-options --instance-id ID "
            "--http-endpoint enabled"
        )
    # It does not answer.
    return f"cannot be reached ({problem})", (
        "in a container its answers need two hops: aws ec2 modify-instance-metadata-options "
        "--instance-id ID --http-put-response-hop-limit 2 (HttpPutResponseHopLimit 2), or run the "
        "container on the host's network"
    )


def _seconds_left(action: bytes) -> float:
    """Return the seconds until the time that a notice names.

    Args:
        action: The notice, such as {"action": "terminate", "time": "2026-01-31T08:22:00Z"}.
            Without a time the seconds are those that AWS promises.
    """
    try:
        end = datetime.fromisoformat(json.loads(action)["time"])
        left = (end - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError, KeyError):
        return NOTICE_SECONDS
    # The time is past, or far away: this machine's clock is wrong.
    if not 0 < left < NOTICE_SECONDS:
        return NOTICE_SECONDS
    return left
