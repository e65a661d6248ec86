"""Trainings on servers that each lack something: a run has one owner there, or the server is refused before there is one."""

import hashlib
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fault_proxy import FaultProxy
from outcomes import assert_same_end
from PIL import Image
from trainers import Job, Training, all_ended

from wds_train.checkpoint.manifest import RunManifest
from wds_train.checkpoint.run import Run
from wds_train.cli import main
from wds_train.errors import StoreError
from wds_train.storage.open import open_store
from wds_train.storage.s3 import S3Store
from wds_train.storage.s3_connection import S3Connection

ALWAYS = 10**9
FRESH = RunManifest("r", {}, {"url": "d", "fingerprint": "f"}, "w")
# Checkpoints of 6.5 MB go up in two parts, of the least length that S3 takes; and nobody waits a minute for a sleeper.
MODEL = ("model.name=mobilenetv3_small_050", "data.size=32", "data.eval_size=32")
CONSTANTS = {"checkpoint.lease.LEASE_SECONDS": 2.0, "storage.s3_write.PART_BYTES": 5 << 20}
EQUAL_PARTS = {"method": "POST", "status": 400, "code": "InvalidPart"}
NO_LISTING = {"method": "GET", "query": "uploads", "status": 501, "code": "NotImplemented"}
NO_CHECKSUMS = {"header": "x-amz-(sdk-)?checksum[a-z0-9-]*|x-amz-trailer", "status": 400, "code": "InvalidArgument"}
CONDITIONS = "if-none-match|if-match"


@dataclass(frozen=True)
class Server:
    """What a server lacks, as a fault of the proxy, and what a training says of it: `refused`, or `told` and goes on."""

    kind: str
    fault: dict[str, Any]
    refused: str = ""
    told: str = ""
    environment: dict[str, str] = field(default_factory=dict)


SERVERS = {
    "ignores every condition": Server(
        "strip", {"header": CONDITIONS}, refused="ignores If-None-Match (it wrote over an object that was there)"
    ),
    "ignores If-Match": Server(
        "strip", {"header": "if-match"}, refused="ignores If-Match (it wrote over an object of another ETag)"
    ),
    "ignores conditions at the end of an upload": Server("strip", {"method": "POST", "header": CONDITIONS}),
    "demands equal parts": Server("equal_parts", EQUAL_PARTS),
    "takes no checksums": Server("status", NO_CHECKSUMS, refused="set AWS_REQUEST_CHECKSUM_CALCULATION=when_required"),
    "takes no checksums, nor gets any": Server(
        "status", NO_CHECKSUMS, environment={"AWS_REQUEST_CHECKSUM_CALCULATION": "when_required"}
    ),
    "lists no uploads": Server("status", NO_LISTING, told="what interrupted uploads left stays there"),
}


def job(small: str, run: str, folder: Path, **details: Any) -> Job:
    return Job(small, run, str(folder), settings=MODEL, constants=CONSTANTS, **details)


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest, fault_proxy: FaultProxy, aws_env: pytest.MonkeyPatch) -> Server:
    server = SERVERS[request.param]
    for name, value in server.environment.items():
        aws_env.setenv(name, value)
    fault_proxy.fail(server.kind, times=ALWAYS, **server.fault)  # type: ignore[arg-type]
    return server


@pytest.fixture(scope="module")
def unbroken(small: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A run that nothing happened to, in a local directory."""
    folder = tmp_path_factory.mktemp("unbroken")
    training = Training(job(small, str(folder / "runs" / "one"), folder))
    assert training.end() == 0, training.output
    yield str(folder / "runs" / "one")


def assert_refused(server: Server, trainings: list[Training], run: str) -> None:
    for training in trainings:
        assert training.end() == 1
        assert server.refused in training.output
    assert list(open_store(run).list()) == []


@pytest.mark.timeout(300)
def test_of_two_trainings_one_owns_the_run(
    small: str, s3_url: str, tmp_path: Path, server: Server, unbroken: str
) -> None:
    run = f"{s3_url}/race"
    with all_ended(racers := [Training(job(small, run, tmp_path)) for _ in range(2)]):
        if server.refused:
            assert_refused(server, racers, run)
            return
        assert [racer.end() for racer in racers] == [0, 0], [racer.output for racer in racers]
    (owner,) = [racer for racer in racers if racer.steps()]
    assert not server.told or owner.output.count(server.told) == 1
    assert_same_end(unbroken, run)


@pytest.mark.timeout(300)
def test_a_sleeper_changes_nothing(small: str, s3_url: str, tmp_path: Path, server: Server, unbroken: str) -> None:
    run = f"{s3_url}/sleeper"
    asleep = job(small, run, tmp_path, point="after a step", nth=15, sent=signal.SIGSTOP)
    with all_ended([first := Training(asleep)]):
        if server.refused:
            assert_refused(server, [first], run)
            return
        first.until("held at after a step")
        with all_ended([second := Training(job(small, run, tmp_path))]):
            assert second.end() == 0, second.output
        before = open_store(run).read_tagged("manifest.json")
        assert first.end(signal.SIGCONT) == 75, first.output
        assert "another instance" in first.output
        assert open_store(run).read_tagged("manifest.json") == before
    assert_same_end(unbroken, run)


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
    store, orphan = open_store(s3_url), "ckpt/000001-000000099-000009.safetensors"
    store.write(orphan, b"1")
    fault_proxy.fail("status", times=ALWAYS, **LACKS[lack])  # type: ignore[arg-type]
    said: list[str] = []
    run = Run.claim(store, FRESH, said.append)
    assert run.manifest.status == "running"
    (line,) = [line for line in said if "what interrupted uploads left stays there" in line]
    assert LACKS[lack]["code"] in line or "does not exist" in line
    assert (orphan in [entry.key for entry in store.list()]) == ("DELETE" in lack or "delete" in lack)


def test_who_may_only_read_a_finished_run_is_told_nothing(fault_proxy: FaultProxy, s3_url: str) -> None:
    store, said = open_store(s3_url), list[str]()
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
def test_all_pages_of_a_listing_are_read(s3_url: str, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Pages of five, of objects and of uploads that killed writers left; those of other prefixes stay."""
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
    assert [entry.key for entry in store.list("a/")] == [f"a/{number:02d}" for number in range(count)]
    store.abort_uploads("a/")
    left = store.client.list_multipart_uploads(Bucket=store.bucket).get("Uploads", [])
    assert sorted(upload["Key"] for upload in left) == sorted(f"test/b/{number}" for number in range(count))


FOREIGN = {"Key": "other/a/0", "UploadId": "0"}


@pytest.mark.parametrize(
    ("verb", "page"),
    [
        ("list_objects_v2", {"IsTruncated": True}),
        ("list_objects_v2", {"IsTruncated": True, "NextContinuationToken": "same"}),
        ("list_multipart_uploads", {"IsTruncated": True, "NextKeyMarker": "same", "Uploads": [FOREIGN]}),
    ],
)
def test_a_listing_that_has_no_next_page_ends(
    s3_url: str, monkeypatch: pytest.MonkeyPatch, verb: str, page: dict[str, Any]
) -> None:
    store, asked = open_store(s3_url), list[str]()

    def answer(self: S3Connection, verb: str, key: str, **details: Any) -> dict[str, Any]:
        asked.append(verb)
        return page

    monkeypatch.setattr(S3Connection, "ask", answer)
    with pytest.raises(StoreError, match="lists no more than its first objects; it cannot be used"):
        store.abort_uploads("a/") if "uploads" in verb else list(store.list("a/"))
    assert asked in ([verb], [verb, verb])


def test_uploads_of_other_prefixes_are_left_alone(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a server lists them that does not know prefixes."""
    store, asked = open_store(s3_url), list[str]()

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
        ([PART + 200_000, PART + 100_000, 3 * MIB], [PART, PART, 3 * MIB + 300_000]),  # as packing gives them
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
    fault_proxy: FaultProxy, s3_url: str, monkeypatch: pytest.MonkeyPatch, pieces: list[int], parts: list[int]
) -> None:
    monkeypatch.setattr("wds_train.storage.s3_write.PART_BYTES", PART)
    fault_proxy.fail("equal_parts", times=ALWAYS, **EQUAL_PARTS)  # type: ignore[arg-type]
    bodies = [random.Random(number).randbytes(size) for number, size in enumerate(pieces)]
    store = open_store(s3_url)
    tag = store.write_pieces("shard", iter(bodies))
    assert store.head("shard") == (sum(pieces), tag)
    assert hashlib.sha256(store.read("shard")).digest() == hashlib.sha256(b"".join(bodies)).digest()
    assert [lengths[number] for lengths in fault_proxy.parts.values() for number in sorted(lengths)] == parts


def test_a_large_shard_goes_up_in_parts_of_one_length(
    fault_proxy: FaultProxy, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("wds_train.storage.s3_write", "shards.pack"):
        monkeypatch.setattr(f"{module}.PART_BYTES", PART)
    fault_proxy.fail("equal_parts", times=ALWAYS, **EQUAL_PARTS)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    for number in range(16):
        path = tmp_path / "images" / "train" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        side = 500 + 9 * number
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path, compress_level=1)
    assert main(["shards", str(tmp_path / "images"), s3_url, "--processes", "1", "--hold-out", "0"]) == 0
    (parts,) = fault_proxy.parts.values()
    *lengths, last = [parts[number] for number in sorted(parts)]
    assert len(lengths) > 1
    assert {*lengths} == {PART}
    assert 0 < last <= PART
    assert main(["verify", s3_url]) == 0
