"""`wds-train check-store`: what a server lacks is found, named, and of the weight that it has."""

import json
import time
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import FaultProxy

from wds_train.cli import main
from wds_train.storage import survey as checks
from wds_train.storage.open import open_store

ALWAYS = 10**9
CHECKSUMS = "x-amz-(sdk-)?checksum[a-z0-9-]*|x-amz-trailer"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "ROUNDS", 1)


def looked(url: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, str]]:
    """The exit code, and the state of each look, from --json; nothing may stay behind."""
    capsys.readouterr()
    code = main(["check-store", url, "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["usable"] == (code == 0)
    return code, {found["name"]: found["state"] for found in told["found"]}


def test_a_sound_server_passes_and_keeps_nothing(
    s3_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, states = looked(s3_url, capsys)
    assert code == 0
    assert list(states) == [name for name, _ in checks.LOOKS]
    assert {name for name, state in states.items() if state != "ok"} == {"versioning"}
    assert list(open_store(s3_url).list()) == []
    assert main(["check-store", s3_url]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[4] == "PUT If-None-Match     ok    a wrong one is refused, as it must be"
    assert lines[-1] == f"{s3_url} can be used for runs and datasets"


# A fault of the proxy; which looks then are no longer "ok", and what they are.
LACKS: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "conditions": (
        "strip",
        {"header": "if-none-match|if-match", "method": "PUT"},
        {"PUT If-None-Match": "fail", "PUT If-Match": "fail"},
    ),
    "if-match": ("strip", {"header": "if-match", "method": "PUT"}, {"PUT If-Match": "fail"}),
    "conditions of uploads": (
        "strip",
        {"header": "if-none-match|if-match", "method": "POST"},
        {"upload If-None-Match": "note", "upload If-Match": "note"},
    ),
    "if-match on reads": (
        "strip",
        {"header": "if-match", "method": "GET"},
        {"GET If-Match": "note"},
    ),
    "unequal parts": (
        "equal_parts",
        {"method": "POST", "status": 400, "code": "InvalidPart"},
        {"unequal parts": "note"},
    ),
    "list of uploads": (
        "status",
        {"query": "uploads", "method": "GET", "status": 501},
        {"list uploads": "note"},
    ),
    "delete": (
        "status",
        {"method": "DELETE", "status": 403, "code": "AccessDenied"},
        {"delete": "note", "list uploads": "note"},  # its uploads are ended by DELETE, too
    ),
    "list": (
        "status",
        {"query": "list-type", "status": 403, "code": "AccessDenied"},
        {"list": "fail", "odd keys": "note"},
    ),
    "pages": (
        "status",
        {"query": "max-keys", "status": 501, "code": "NotImplemented"},
        {"list": "note"},
    ),
    "odd keys": (
        "status",
        {"key": "+", "status": 403, "code": "SignatureDoesNotMatch"},
        {"odd keys": "note"},
    ),
    "write": (
        "status",
        {"method": "PUT", "status": 403, "code": "AccessDenied"},
        {"write": "fail"},
    ),
    "checksum headers": (
        "status",
        {"header": CHECKSUMS, "status": 400, "code": "InvalidArgument"},
        {"write": "fail"},
    ),
    "right swaps": (
        "status",
        {"header": "if-match", "method": "PUT", "status": 412},
        {"swap": "fail"},
    ),
    "versioning": ("status", {"query": "versioning", "status": 403, "code": "AccessDenied"}, {}),
}


@pytest.mark.parametrize("lack", LACKS)
def test_a_lack_is_found(
    fault_proxy: FaultProxy, s3_url: str, capsys: pytest.CaptureFixture[str], lack: str
) -> None:
    kind, fault, expected = LACKS[lack]
    fault_proxy.fail(kind, times=ALWAYS, **fault)  # type: ignore[arg-type]
    code, states = looked(s3_url, capsys)
    found = {
        name: state for name, state in states.items() if state != "ok" and name != "versioning"
    }
    assert found == expected
    assert code == ("fail" in expected.values())


def test_a_local_directory_can_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert looked(str(tmp_path / "runs"), capsys) == (0, {"store": "ok"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("seconds", "state"), [(0, "ok"), (-200, "ok"), (400, "fail"), (-400, "fail"), (None, "note")]
)
def test_a_clock_that_is_wrong_is_named(seconds: float | None, state: str) -> None:
    date = "" if seconds is None else formatdate(time.time() + seconds, usegmt=True)
    assert checks.clock(date)[0] == state


ABORT = {"Status": "Enabled", "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 1}}
EXPIRE = {"Status": "Enabled", "NoncurrentVersionExpiration": {"NoncurrentDays": 1}}


@pytest.mark.parametrize(
    ("status", "rules", "found"),
    [
        ({"Status": "Enabled"}, [ABORT, EXPIRE], ("ok", "on, and older versions expire")),
        ({}, [ABORT], ("ok", "off")),
        (
            {},
            [],
            ("note", "off; set a lifecycle rule with AbortIncompleteMultipartUpload of a day"),
        ),
        (
            {"Status": "Enabled"},
            [ABORT, EXPIRE | {"Status": "Disabled"}],
            (
                "note",
                "on: 4,320 manifests a day stay, and each old checkpoint; set a lifecycle rule with "
                "NoncurrentVersionExpiration of a day",
            ),
        ),
    ],
)
def test_a_bucket_that_keeps_everything_is_named(
    status: dict[str, Any], rules: list[dict[str, Any]], found: tuple[str, str]
) -> None:
    assert checks.versioning(status, rules) == found
