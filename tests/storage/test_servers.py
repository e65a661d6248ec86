"""Servers that each lack something: claims and conversions go on without it."""

import hashlib
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fault_proxy import FaultProxy
from PIL import Image

from wds_train.checkpoint.run import Run
from wds_train.checkpoint.run_manifest import RunManifest
from wds_train.cli import main
from wds_train.errors import StoreError
from wds_train.storage.open import open_store
from wds_train.storage.s3 import S3Store
from wds_train.storage.s3_connection import PATIENCE_SECONDS, S3Connection

ALWAYS = 10**9
FRESH = RunManifest("r", {}, {"url": "d", "fingerprint": "f"}, "w")
EQUAL_PARTS = {"method": "POST", "status": 400, "code": "InvalidPart"}


# Housekeeping

# What a server does not have, or a role may not do.
LACKS = {
    "lists no uploads": {"query": "uploads", "status": 501, "code": "NotImplemented"},
    "may not list uploads": {"query": "uploads", "status": 403, "code": "AccessDenied"},
    "knows no uploads": {"query": "uploads", "status": 404, "code": "NoSuchUpload"},
    "may not delete": {"method": "DELETE", "status": 403, "code": "AccessDenied"},
    "has no method DELETE": {"method": "DELETE", "status": 405, "code": "MethodNotAllowed"},
}


@pytest.mark.parametrize("lack", LACKS)
def test_a_claim_goes_on_without_housekeeping(
    fault_proxy: FaultProxy, s3_url: str, monkeypatch: pytest.MonkeyPatch, lack: str
) -> None:
    store = open_store(s3_url)
    orphan = "ckpt/000001-000000099-000009.safetensors"
    store.write(orphan, b"1")
    fault_proxy.fail("status", times=ALWAYS, **LACKS[lack])  # type: ignore[arg-type]
    said: list[str] = []
    run = Run.claim(store, FRESH, said.append)
    assert run.manifest.status == "running"
    (line,) = [line for line in said if "what interrupted uploads left stays there" in line]
    assert LACKS[lack]["code"] in line or "does not exist" in line
    assert (orphan in [entry.key for entry in store.list()]) == (
        "DELETE" in lack or "delete" in lack
    )


SLOW = {
    "lists no uploads in time": {"kind": "hang", "method": "GET", "query": "uploads"},
    "is in trouble when it lists uploads": {"kind": "status", "method": "GET", "query": "uploads"},
    "is in trouble when it lists": {"kind": "status", "method": "GET", "query": "list-type"},
}


@pytest.mark.parametrize("case", SLOW)
def test_a_claim_does_not_wait_for_housekeeping_beyond_its_lease(
    fault_proxy: FaultProxy, s3_url: str, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr("wds_train.checkpoint.orphans.TIDY_SECONDS", 1.0)
    monkeypatch.setattr("wds_train.storage.s3_session.SOCKET_SECONDS", 2.0)
    fault_proxy.fail(times=ALWAYS, **SLOW[case])  # type: ignore[arg-type]
    store = open_store(s3_url)
    said: list[str] = []
    began = time.monotonic()
    assert Run.claim(store, FRESH, said.append).manifest.status == "running"
    assert time.monotonic() - began < 15
    (line,) = said
    assert "what interrupted uploads left stays there" in line
    assert isinstance(store, S3Store)
    assert store.connection.patience == PATIENCE_SECONDS


def test_orphans_that_take_too_long_are_left_to_the_next_claim(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wds_train.checkpoint.orphans.TIDY_SECONDS", 0.5)
    store = open_store(s3_url)
    said: list[str] = []
    for number in range(9):
        store.write(f"ckpt/000001-00000000{number}-000000.safetensors", b"1")
    delete = S3Store.delete

    def slow(self: S3Store, key: str) -> None:
        time.sleep(0.3)
        delete(self, key)

    monkeypatch.setattr(S3Store, "delete", slow)
    Run.claim(store, FRESH, said.append)
    left = len(list(store.list("ckpt/")))
    assert 0 < left < 9
    assert "is slow: the rest is left to the next start" in said[-1]


def test_who_may_only_read_a_finished_run_is_told_nothing(
    fault_proxy: FaultProxy, s3_url: str
) -> None:
    store = open_store(s3_url)
    said: list[str] = []
    Run.claim(store, FRESH, print).end("done", result={"val/top1": 1.0, "val/top1_ema": 1.0})
    store.write("ckpt/000001-000000099-000009.safetensors", b"1")
    for method in ("DELETE", "PUT", "POST"):
        fault_proxy.fail("status", method=method, status=403, code="AccessDenied", times=ALWAYS)
    fault_proxy.fail("status", query="uploads", status=403, code="AccessDenied", times=ALWAYS)
    assert Run.claim(store, FRESH, said.append).manifest.status == "done"
    assert said == []


@pytest.mark.parametrize("lack", LACKS)
def test_a_conversion_ends_well_without_housekeeping(
    fault_proxy: FaultProxy,
    s3_url: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    lack: str,
) -> None:
    for number in range(4):
        path = tmp_path / "images" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    fault_proxy.fail("status", times=ALWAYS, **LACKS[lack])  # type: ignore[arg-type]
    command = ["shards", str(tmp_path / "images"), s3_url, "--processes", "1"]
    assert main(command) == 0
    told = capsys.readouterr().err
    assert told.count("what interrupted or older conversions left stays there") == 1
    assert main(["verify", s3_url]) == 0
    assert main(command) == 0  # complete already
    assert main([*command, "--seed", "1", "--overwrite"]) == 0
    assert main(["verify", s3_url]) == 0


@pytest.mark.parametrize("count", [1, 5, 12])
def test_all_pages_of_a_listing_are_read(
    s3_url: str, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Pages of five, of objects and of uploads that killed writers left.

    Uploads of other prefixes stay.
    """
    store = open_store(s3_url)
    assert isinstance(store, S3Store)
    for number in range(count):
        store.write(f"a/{number:02d}", b"1")
        for prefix in ("a", "b"):
            store.client.create_multipart_upload(Bucket=store.bucket, Key=f"test/{prefix}/{number}")
    ask = S3Connection.ask
    sizes = {"list_objects_v2": {"MaxKeys": 5}, "list_multipart_uploads": {"MaxUploads": 5}}

    def in_pages(self: S3Connection, verb: str, key: str, **details: Any) -> dict[str, Any]:
        return ask(self, verb, key, **details, **sizes.get(verb, {}))

    monkeypatch.setattr(S3Connection, "ask", in_pages)
    assert [entry.key for entry in store.list("a/")] == [
        f"a/{number:02d}" for number in range(count)
    ]
    store.abort_uploads("a/")
    left = store.client.list_multipart_uploads(Bucket=store.bucket).get("Uploads", [])
    assert sorted(upload["Key"] for upload in left) == sorted(
        f"test/b/{number}" for number in range(count)
    )


FOREIGN = {"Key": "other/a/0", "UploadId": "0"}


@pytest.mark.parametrize(
    ("verb", "page"),
    [
        ("list_objects_v2", {"IsTruncated": True}),
        ("list_objects_v2", {"IsTruncated": True, "NextContinuationToken": "same"}),
        (
            "list_multipart_uploads",
            {"IsTruncated": True, "NextKeyMarker": "same", "Uploads": [FOREIGN]},
        ),
    ],
)
def test_a_listing_that_has_no_next_page_ends(
    s3_url: str, monkeypatch: pytest.MonkeyPatch, verb: str, page: dict[str, Any]
) -> None:
    store = open_store(s3_url)
    asked: list[str] = []

    def answer(self: S3Connection, verb: str, key: str, **details: Any) -> dict[str, Any]:
        asked.append(verb)
        return page

    monkeypatch.setattr(S3Connection, "ask", answer)
    with pytest.raises(StoreError, match="lists no more than its first objects; it cannot be used"):
        store.abort_uploads("a/") if "uploads" in verb else list(store.list("a/"))
    assert asked in ([verb], [verb, verb])


def test_uploads_of_other_prefixes_are_left_alone(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a server lists them that does not know prefixes."""
    store = open_store(s3_url)
    asked: list[str] = []

    def answer(self: S3Connection, verb: str, key: str, **details: Any) -> dict[str, Any]:
        asked.append(verb)
        return {"Uploads": [FOREIGN, {"Key": "test/a/0", "UploadId": "1"}]}

    monkeypatch.setattr(S3Connection, "ask", answer)
    store.abort_uploads("a/")
    assert asked == ["list_multipart_uploads", "abort_multipart_upload"]


# Parts of one length

PART = 5 << 20  # the least that S3 takes
MIB = 1 << 20


@pytest.mark.parametrize(
    ("pieces", "parts"),
    [
        (
            [PART + 200_000, PART + 100_000, 3 * MIB],
            [PART, PART, 3 * MIB + 300_000],
        ),  # as packing gives them
        ([12 * MIB], [PART, PART, 2 * MIB]),
        ([MIB] * 11, [PART, PART, MIB]),
        ([PART, PART], [PART, PART]),
        ([2 * PART, 0, 1], [PART, PART, 1]),
        ([0, PART + 1, 0], [PART, 1]),
        ([PART], []),
        ([PART - 1, 0], []),
        ([0], []),
        ([], []),
    ],
)
def test_parts_are_of_one_length_whatever_the_pieces_are(
    fault_proxy: FaultProxy,
    s3_url: str,
    monkeypatch: pytest.MonkeyPatch,
    pieces: list[int],
    parts: list[int],
) -> None:
    monkeypatch.setattr("wds_train.storage.s3_write.PART_BYTES", PART)
    fault_proxy.fail("equal_parts", times=ALWAYS, **EQUAL_PARTS)  # type: ignore[arg-type]
    bodies = [random.Random(number).randbytes(size) for number, size in enumerate(pieces)]
    store = open_store(s3_url)
    tag = store.write_pieces("shard", iter(bodies))
    assert store.head("shard") == (sum(pieces), tag)
    assert hashlib.sha256(store.read("shard")).digest() == hashlib.sha256(b"".join(bodies)).digest()
    assert [
        lengths[number] for lengths in fault_proxy.parts.values() for number in sorted(lengths)
    ] == parts


def test_a_large_shard_goes_up_in_parts_of_one_length(
    fault_proxy: FaultProxy, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("wds_train.storage.s3_write", "wds_train.conversion.pack"):
        monkeypatch.setattr(f"{module}.PART_BYTES", PART)
    fault_proxy.fail("equal_parts", times=ALWAYS, **EQUAL_PARTS)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    for number in range(16):
        path = tmp_path / "images" / "train" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        side = 500 + 9 * number
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(
            path, compress_level=1
        )
    assert (
        main(["shards", str(tmp_path / "images"), s3_url, "--processes", "1", "--hold-out", "0"])
        == 0
    )
    (parts,) = fault_proxy.parts.values()
    *lengths, last = [parts[number] for number in sorted(parts)]
    assert len(lengths) > 1
    assert {*lengths} == {PART}
    assert 0 < last <= PART
    assert main(["verify", s3_url]) == 0
