"""Bodies whole on their way, and reads of one version alone.

With S3's checksums, and on servers that do not take them.
"""

import base64
import hashlib
import random
import re
from typing import Any

import pytest
from fault_proxy import FaultProxy

from wds_train.checkpoint.run import Run
from wds_train.checkpoint.run_manifest import RunManifest
from wds_train.errors import Conflict, StoreError
from wds_train.storage.base import PART_BYTES, Store
from wds_train.storage.open import open_store
from wds_train.storage.proof import prove
from wds_train.storage.retry import Retry
from wds_train.storage.s3_connection import S3Connection

ALWAYS = 10**9
CHECKSUMS = "x-amz-(sdk-)?checksum[a-z0-9-]*|x-amz-trailer"
REMEDY = "set AWS_REQUEST_CHECKSUM_CALCULATION=when_required"
BODY = random.Random(0).randbytes(1_000_000)


@pytest.fixture(params=["environment", "config file"])
def plain(request: pytest.FixtureRequest, aws_env: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """The setting that asks for no checksums."""
    if request.param == "environment":
        aws_env.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    else:
        (tmp_path / "config").write_text(
            "[default]\nrequest_checksum_calculation = when_required\n"
        )
        aws_env.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))


def sent(proxy: FaultProxy) -> set[str]:
    """The headers of all requests so far that have to do with a body's digest."""
    heads = "\r\n".join(head.decode() for head, _ in proxy.heads)
    return {
        name.lower()
        for name in re.findall(r"(?im)^(x-amz-[a-z0-9-]*checksum[a-z0-9-]*|content-md5):", heads)
    }


@pytest.mark.parametrize("size", [0, 1000, PART_BYTES + 1])
def test_every_body_goes_with_a_checksum(fault_proxy: FaultProxy, s3_url: str, size: int) -> None:
    open_store(s3_url).write("a", bytes(size))
    assert sent(fault_proxy) <= {"x-amz-checksum-crc32", "x-amz-checksum-algorithm"}
    assert "x-amz-checksum-crc32" in sent(fault_proxy)


@pytest.mark.parametrize("size", [0, 1000, PART_BYTES + 1])
@pytest.mark.usefixtures("plain")
def test_without_checksums_it_goes_with_its_md5(
    fault_proxy: FaultProxy, s3_url: str, size: int
) -> None:
    store = open_store(s3_url)
    body = random.Random(size).randbytes(size)
    tag = store.write("a", body, if_absent=True)
    store.write_pieces("b", iter([body]))
    assert sent(fault_proxy) == {"content-md5"}
    assert store.read_tagged("a") == (body, tag)
    assert store.read("b") == body
    if size <= PART_BYTES:
        digest = base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest())
        assert b"Content-MD5: " + digest in fault_proxy.heads[0][0]


# How servers refuse them: Backblaze B2, older gateways, one that says nothing of use.
REFUSALS: dict[str, dict[str, Any]] = {
    "named": {
        "status": 400,
        "code": "InvalidArgument",
        "message": "Unsupported header 'x-amz-checksum-crc32' received",
    },
    "named otherwise": {
        "status": 400,
        "code": "InvalidArgument",
        "message": "X-Amz-Checksum-Crc32 is not known",
    },
    "not implemented": {
        "status": 501,
        "code": "NotImplemented",
        "message": "A header implies what is not implemented",
    },
    "bad request": {"status": 400, "code": "InvalidRequest", "message": "Bad Request"},
}


@pytest.mark.parametrize("case", REFUSALS)
def test_the_header_and_the_remedy_are_named_before_a_claim(
    fault_proxy: FaultProxy, s3_url: str, case: str
) -> None:
    fault_proxy.fail("status", header=CHECKSUMS, times=ALWAYS, **REFUSALS[case])
    store = open_store(s3_url)
    with pytest.raises(
        StoreError,
        match=rf"does not take x-amz-checksum-crc32 .*{REFUSALS[case]['code']}.*: {REMEDY}",
    ):
        Run.claim(store, RunManifest("r", {}, {"url": "d", "fingerprint": "f"}, "w"), print)
    assert list(store.list()) == []


@pytest.mark.parametrize("case", ["named", "named otherwise"])
@pytest.mark.parametrize("size", [1000, PART_BYTES + 1])
def test_a_write_names_them_too(fault_proxy: FaultProxy, s3_url: str, case: str, size: int) -> None:
    header = (
        CHECKSUMS if size == 1000 else "x-amz-checksum-algorithm"
    )  # at the beginning of an upload
    fault_proxy.fail("status", header=header, times=ALWAYS, **REFUSALS[case])
    with pytest.raises(
        StoreError, match=rf"This server does not take x-amz-checksum-crc32: {REMEDY}"
    ):
        open_store(s3_url).write("a", bytes(size))


@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.usefixtures("plain")
def test_with_the_remedy_such_a_server_is_used(
    fault_proxy: FaultProxy, s3_url: str, case: str
) -> None:
    fault_proxy.fail("status", header=CHECKSUMS, times=ALWAYS, **REFUSALS[case])
    store = open_store(s3_url)
    assert prove(store, "ckpt/", print)
    tag = store.write("a", bytes(PART_BYTES + 1))
    assert store.head("a") == (PART_BYTES + 1, tag)


@pytest.mark.parametrize(
    ("status", "code"), [(501, "NotImplemented"), (400, "InvalidArgument"), (400, "InvalidRequest")]
)
def test_a_server_that_takes_no_condition_is_told_apart(
    fault_proxy: FaultProxy, s3_url: str, status: int, code: str
) -> None:
    fault_proxy.fail(
        "status", header="if-none-match|if-match", status=status, code=code, times=ALWAYS
    )
    with pytest.raises(
        StoreError,
        match=rf"does not take If-None-Match on a write .*{code}.* by which a run has one",
    ) as e:
        prove(open_store(s3_url), "ckpt/", print)
    assert REMEDY not in str(e.value)
    assert list(open_store(s3_url).list()) == []


def test_a_write_that_is_refused_for_another_reason_stays_as_it_is(
    fault_proxy: FaultProxy, s3_url: str
) -> None:
    fault_proxy.fail("status", method="PUT", status=400, code="KeyTooLongError", times=ALWAYS)
    with pytest.raises(StoreError, match="answered 400 KeyTooLongError") as caught:
        prove(open_store(s3_url), "ckpt/", print)
    assert REMEDY not in str(caught.value)


@pytest.mark.parametrize("after", [0, 10, 999_999])
@pytest.mark.usefixtures("plain")
def test_a_flipped_bit_is_found_without_checksums(
    fault_proxy: FaultProxy, s3_url: str, after: int
) -> None:
    store = open_store(s3_url)
    fault_proxy.fail("flip_up", method="PUT", after=after)
    store.write("a", BODY)
    assert fault_proxy.count("PUT", "a") == 2
    assert store.read("a") == BODY


# Reads, on servers that know no If-Match for them


def whole(store: Store) -> bytes:
    return store.read("a")


def tagged(store: Store) -> bytes:
    return store.read_tagged("a")[0]


def span(store: Store) -> bytes:
    return store.read("a", 100, 900_000)


def into(store: Store) -> bytes:
    store.read_into("a", 100, memoryview(target := bytearray(900_000)))
    return bytes(target)


READS = {"whole": whole, "tagged": tagged, "span": span, "into": into}


@pytest.mark.parametrize("read", READS)
def test_no_read_needs_if_match(fault_proxy: FaultProxy, s3_url: str, read: str) -> None:
    store = open_store(s3_url)
    store.write("a", BODY)
    fault_proxy.heads.clear()
    fault_proxy.fail(
        "status", method="GET", header="if-match", status=501, code="NotImplemented", times=ALWAYS
    )
    fault_proxy.fail("reset", method="GET", after=300_000, times=2)
    assert READS[read](store) in (BODY, BODY[100:900_100])


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("new", [BODY[::-1], BODY + b"1", b"short"])
def test_what_is_replaced_while_it_is_read_is_never_mixed(
    fault_proxy: FaultProxy, s3_url: str, monkeypatch: pytest.MonkeyPatch, read: str, new: bytes
) -> None:
    store = open_store(s3_url)
    store.write("a", BODY)
    fault_proxy.fail("truncate", method="GET", after=300_000)
    monkeypatch.setattr(Retry, "pause", lambda *_, **__: store.write("a", new))
    with pytest.raises(
        Conflict, match=f"{s3_url}/a was changed by another writer while it was read"
    ):
        READS[read](store)


def test_a_server_that_tells_no_etags_is_refused(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without one, a swap would be a write without a condition."""
    store = open_store(s3_url)
    ask = S3Connection.ask
    store.write("a", b"1")

    def without_tags(self: S3Connection, verb: str, key: str, **details: Any) -> dict[str, Any]:
        return {
            name: value for name, value in ask(self, verb, key, **details).items() if name != "ETag"
        }

    monkeypatch.setattr(S3Connection, "ask", without_tags)
    for act in (
        lambda: store.head("a"),
        lambda: store.write("b", b"1"),
        lambda: store.write("c", bytes(PART_BYTES + 1)),
    ):
        with pytest.raises(StoreError, match="tells no ETags; it cannot be used"):
            act()
