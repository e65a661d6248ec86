"""S3 servers that are odd in one way each, as faults of the proxy, and what a training makes of them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import Fault, FaultProxy

ALWAYS = 10**9
CONDITIONS = "if-none-match|if-match"
CHECKSUMS = "x-amz-(sdk-)?checksum[a-z0-9-]*|x-amz-trailer"
IGNORES_ABSENCE = "ignores If-None-Match (it wrote over an object that was there)"
IGNORES_TAG = "ignores If-Match (it wrote over an object of another ETag)"
OLD_TOKEN = "x-amz-security-token(?=: *old)"


def fault(kind: str, **details: Any) -> dict[str, Any]:
    return {"kind": kind, "times": ALWAYS} | details


def refusal(status: int, code: str, **details: Any) -> dict[str, Any]:
    return fault("status", status=status, code=code, **details)


@dataclass(frozen=True)
class OddServer:
    """One way to be odd.

    Attributes:
        faults: What is wrong from the start.
        trouble: What is wrong for a moment, while one training sleeps and the other waits for it.
        refused: What a training says that does not begin there.
        told: What the owner says once, and goes on.
        environment: Settings that the server needs.
        in_parts: Whether checkpoints must go up in parts for the oddity to show.
        renewed: Whether the trouble ends by new credentials, not by itself.
        rare: Whether it is tried by `make crash-test` alone.
    """

    faults: tuple[dict[str, Any], ...] = ()
    trouble: dict[str, Any] | None = None
    refused: str = ""
    told: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    in_parts: bool = False
    renewed: bool = False
    rare: bool = False


NO_CHECKSUMS = refusal(400, "InvalidArgument", header=CHECKSUMS)
STAYS = "what interrupted uploads left stays there"

SERVERS = {
    # Conditions
    "ignores every condition": OddServer(
        (fault("strip", header=CONDITIONS),), refused=IGNORES_ABSENCE
    ),
    "ignores If-None-Match": OddServer(
        (fault("strip", header="if-none-match"),), refused=IGNORES_ABSENCE
    ),
    "ignores If-Match": OddServer((fault("strip", header="if-match"),), refused=IGNORES_TAG),
    "ignores conditions at the end of an upload": OddServer(
        (fault("strip", method="POST", header=CONDITIONS),), in_parts=True
    ),
    # The proof, whose object has another name, cannot find this one: the owner has to look before each write.
    "ignores conditions on the manifest alone": OddServer(
        (fault("strip", key="manifest.json", header="if-match"),)
    ),
    "refuses every swap": OddServer(
        (refusal(412, "PreconditionFailed", method="PUT", header="if-match"),),
        refused="refuses a write with If-Match, even by the ETag that it told",
    ),
    # What it lacks
    "demands equal parts": OddServer(
        (fault("equal_parts", method="POST", status=400, code="InvalidPart"),), in_parts=True
    ),
    "takes no checksums": OddServer(
        (NO_CHECKSUMS,), refused="set AWS_REQUEST_CHECKSUM_CALCULATION=when_required"
    ),
    "takes no checksums, nor gets any": OddServer(
        (NO_CHECKSUMS,),
        environment={"AWS_REQUEST_CHECKSUM_CALCULATION": "when_required"},
        in_parts=True,
    ),
    "lists no uploads": OddServer(
        (refusal(501, "NotImplemented", method="GET", query="uploads"),), told=STAYS
    ),
    "may not list uploads": OddServer(
        (refusal(403, "AccessDenied", method="GET", query="uploads"),), told=STAYS, rare=True
    ),
    # Credentials and clocks
    "expired until there is a new key": OddServer(
        # The real server knows no tokens.
        (fault("strip", header="x-amz-security-token"),),
        trouble=refusal(400, "ExpiredToken", header=OLD_TOKEN),
        renewed=True,
    ),
    "calls the clock wrong for a moment": OddServer(trouble=refusal(403, "RequestTimeTooSkewed")),
    "denies everything for a moment": OddServer(trouble=refusal(403, "AccessDenied"), rare=True),
    # Conflicts and redirects
    "is busy with another write": OddServer(
        (refusal(409, "ConditionalRequestConflict", method="PUT", share=0.4),)
    ),
    "is in another region": OddServer(
        (
            refusal(
                301,
                "PermanentRedirect",
                header=r"authorization(?=:[^\r]*/us-east-1/)",
                headers="\r\nx-amz-bucket-region: eu-central-1",
            ),
        )
    ),
    "sends elsewhere for ever": OddServer((refusal(307, "TemporaryRedirect"),), refused="redirect"),
}


def begin(
    server: OddServer, proxy: FaultProxy, patch: pytest.MonkeyPatch, folder: Path
) -> Fault | None:
    """Make the proxy and the environment those of `server`; return its trouble, which has not begun."""
    for name, value in server.environment.items():
        patch.setenv(name, value)
    trouble = None
    if server.trouble:
        trouble = proxy.fail(**server.trouble)
        trouble.times = 0
    if server.renewed:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.delenv(name)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(write_credentials(folder, proxy, "old")))
    for each in server.faults:
        proxy.fail(**each)
    return trouble


def write_credentials(folder: Path, proxy: FaultProxy, token: str) -> Path:
    """Write, or replace, the file of credentials with the session token `token`."""
    path = folder / "credentials"
    key, secret = proxy.keys
    lines = [
        "[default]",
        f"aws_access_key_id={key}",
        f"aws_secret_access_key={secret}",
        f"aws_session_token={token}",
    ]
    new = folder / "credentials.new"
    new.write_text("\n".join(lines) + "\n")
    new.replace(path)
    return path
