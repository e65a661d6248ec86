"""Stores that ignore conditional writes are found out before anything is owned."""

import random
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import Fault, FaultProxy

from wds_train.checkpoint.lease import read_run
from wds_train.checkpoint.run import Run
from wds_train.checkpoint.run_manifest import Checkpoint, Object, Owner, Progress, RunManifest
from wds_train.cli import main
from wds_train.commands.status import _lines, describe
from wds_train.config.presets import preset
from wds_train.errors import AccessDenied, Interrupted, NotFound, StoreError
from wds_train.storage.local import LocalStore
from wds_train.storage.open import open_store
from wds_train.storage.proof import prove
from wds_train.storage.s3 import S3Store
from wds_train.storage.s3_connection import S3Connection

ALWAYS = 10**9
FRESH = RunManifest("r", {}, {"url": "d", "fingerprint": "f"}, "w")
# What a server leaves out, and what is then said of it.
IGNORED = {
    "both conditions": (
        "if-none-match|if-match",
        "ignores If-None-Match (it wrote over an object that was there)",
    ),
    "if-none-match": (
        "if-none-match",
        "ignores If-None-Match (it wrote over an object that was there)",
    ),
    "if-match": ("if-match", "ignores If-Match (it wrote over an object of another ETag)"),
}


@pytest.fixture
def store(fault_proxy: FaultProxy, s3_url: str) -> S3Store:
    """A store behind the proxy."""
    return S3Store(*s3_url.removeprefix("s3://").split("/", 1))


def strip(proxy: FaultProxy, header: str) -> Fault:
    return proxy.fail("strip", method="PUT", header=header, times=ALWAYS)


def keys(store: S3Store) -> list[str]:
    return [entry.key for entry in store.list()]


@pytest.mark.parametrize("case", IGNORED)
def test_a_server_that_ignores_a_condition_is_refused(
    store: S3Store, fault_proxy: FaultProxy, case: str
) -> None:
    header, flaw = IGNORED[case]
    strip(fault_proxy, header)
    with pytest.raises(StoreError) as caught:
        prove(store, "ckpt/", print)
    assert str(caught.value) == (
        f"{store.url}: the S3 server {fault_proxy.url} {flaw}, so that two processes could own one "
        "run or dataset at a time, and overwrite each other's work unnoticed. AWS S3, Cloudflare R2 "
        "and SeaweedFS (the embedded server) are known to refuse such writes; see docs/stores.md. "
        "--unsafe-store uses it all the same, if you know that nothing else "
        "writes there at the same time"
    )
    assert keys(store) == []


def test_a_sound_server_is_proved_by_eight_requests_that_leave_nothing(
    store: S3Store, fault_proxy: FaultProxy
) -> None:
    said: list[str] = []
    assert prove(store, "ckpt/", said.append)
    assert fault_proxy.count() == 8
    assert {key.startswith("test/ckpt/probe-") for _, key in fault_proxy.requests} == {True}
    assert keys(store) == []
    assert said == []


@pytest.mark.parametrize("share", [0.5, 0.8])
@pytest.mark.parametrize("case", IGNORED)
def test_a_server_that_ignores_a_condition_at_times_is_mostly_refused(
    store: S3Store, fault_proxy: FaultProxy, case: str, share: float
) -> None:
    """As one of several gateways does.

    Of one condition, a proof asks twice; after a flaw, all looks must be sound.
    """
    strip(fault_proxy, IGNORED[case][0]).share = share
    refused = 0
    for _ in range(20):
        try:
            prove(store, "ckpt/", print)
        except StoreError:
            refused += 1
    assert refused >= (10 if share == 0.5 else 17)


@pytest.mark.parametrize("status", [409, 412])
def test_a_server_that_refuses_the_right_swap_is_named(
    store: S3Store, fault_proxy: FaultProxy, status: int
) -> None:
    """As one whose ETags a gateway rewrites."""
    fault_proxy.fail(
        "status",
        method="PUT",
        header="if-match",
        status=status,
        code="PreconditionFailed",
        times=ALWAYS,
    )
    with pytest.raises(
        StoreError, match="refuses a write with If-Match, even by the ETag that it told"
    ):
        prove(store, "ckpt/", print)
    assert keys(store) == []


def test_a_server_that_hides_what_was_written_is_named(
    store: S3Store, fault_proxy: FaultProxy
) -> None:
    fault_proxy.fail("status", method="HEAD", status=404, code="NoSuchKey", times=ALWAYS)
    with pytest.raises(StoreError, match="does not show an object that was written"):
        prove(store, "ckpt/", print)


def test_conditions_stripped_from_the_end_of_uploads_alone_do_no_harm(
    store: S3Store, fault_proxy: FaultProxy
) -> None:
    fault_proxy.fail("strip", method="POST", header="if-none-match|if-match", times=ALWAYS)
    assert prove(store, "ckpt/", print)


def test_a_local_directory_needs_no_proof(tmp_path: Path) -> None:
    assert prove(LocalStore(tmp_path / "store"), "ckpt/", print)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("kind", ["reset", "status", "lost_ack"])
def test_a_lost_answer_is_no_flaw(store: S3Store, fault_proxy: FaultProxy, kind: str) -> None:
    for method in ("PUT", "PUT", "PUT", "DELETE"):
        fault_proxy.fail(kind, method=method, share=0.7, times=2)  # type: ignore[arg-type]
    assert prove(store, "ckpt/", print)
    assert keys(store) == []


@pytest.mark.parametrize("times", [1, 2, 4])
def test_a_write_refused_for_the_moment_is_tried_again(
    store: S3Store, fault_proxy: FaultProxy, times: int
) -> None:
    fault_proxy.fail(
        "status", method="PUT", status=409, code="ConditionalRequestConflict", times=times
    )
    assert prove(store, "ckpt/", print)


def test_a_server_that_refuses_every_conditional_write_is_named(
    store: S3Store, fault_proxy: FaultProxy
) -> None:
    fault_proxy.fail(
        "status",
        method="PUT",
        header="if-none-match",
        status=412,
        code="PreconditionFailed",
        times=99,
    )
    with pytest.raises(
        StoreError,
        match="refuses every write with If-None-Match, even of a new object, so that two processes",
    ):
        prove(store, "ckpt/", print)


def test_who_may_not_write_is_told_so(store: S3Store, fault_proxy: FaultProxy) -> None:
    fault_proxy.fail("status", method="PUT", status=403, code="AccessDenied", times=99)
    with pytest.raises(
        AccessDenied, match=r"access to s3://.*/ckpt/probe-\w+ was denied .*let the AWS credentials"
    ):
        prove(store, "ckpt/", print)


@pytest.mark.parametrize(
    ("status", "code"), [(403, "AccessDenied"), (405, "MethodNotAllowed"), (501, "NotImplemented")]
)
def test_who_may_not_delete_is_told_and_goes_on(
    store: S3Store, fault_proxy: FaultProxy, status: int, code: str
) -> None:
    fault_proxy.fail("status", method="DELETE", status=status, code=code, times=ALWAYS)
    said: list[str] = []
    assert prove(store, "ckpt/", said.append)
    assert len(said) == 1
    assert re.match(rf"the object ckpt/probe-\w+ stays behind: .*{code}", said[0])


def test_proofs_at_one_time_do_not_disturb_one_another(store: S3Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda _: prove(store, "ckpt/", print), range(24)))
    assert keys(store) == []


def by_host(_: FaultProxy, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("wds_train.storage.s3_session.GOOGLE_HOST", "127.0.0.1")


def by_header(_: FaultProxy, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        "wds_train.storage.s3_session.GOOGLE_HEADERS", ("x-amz-request-id",)
    )  # which SeaweedFS answers


@pytest.mark.parametrize("known", [by_host, by_header])
def test_google_is_called_by_its_name(
    store: S3Store,
    fault_proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
    known: Callable[[FaultProxy, pytest.MonkeyPatch], None],
) -> None:
    known(fault_proxy, monkeypatch)
    strip(fault_proxy, "if-none-match|if-match")
    with pytest.raises(
        StoreError,
        match=r"Google Cloud Storage \(http:.*\), which has no conditions of ETags on writes",
    ):
        prove(store, "ckpt/", print)


# A run


@pytest.mark.parametrize("case", IGNORED)
def test_a_run_is_not_claimed_there(store: S3Store, fault_proxy: FaultProxy, case: str) -> None:
    strip(fault_proxy, IGNORED[case][0])
    with pytest.raises(StoreError, match=re.escape(IGNORED[case][1])):
        Run.claim(store, FRESH, print)
    assert keys(store) == []


@pytest.mark.parametrize("case", IGNORED)
def test_a_run_that_is_there_is_not_claimed_or_rolled_back(
    store: S3Store, fault_proxy: FaultProxy, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Run.claim(store, FRESH, print).end("interrupted")
    before = store.read_tagged("manifest.json")
    strip(fault_proxy, IGNORED[case][0])
    with pytest.raises(StoreError, match=re.escape(IGNORED[case][1])):
        Run.claim(store, FRESH, print)
    monkeypatch.setattr(
        RunManifest, "back_to", lambda self, step: replace(self, rollbacks=step, checkpoints=("c",))
    )
    monkeypatch.setattr("wds_train.checkpoint.run.read_chosen", lambda *_: None)
    with pytest.raises(StoreError, match=re.escape(IGNORED[case][1])):
        Run.roll_back(store, 1, print)
    assert store.read_tagged("manifest.json") == before


@pytest.mark.parametrize("header", ["if-match", "if-none-match"])
def test_a_claim_that_is_refused_for_ever_ends(
    store: S3Store, fault_proxy: FaultProxy, header: str
) -> None:
    """By a server that refuses the manifest alone, and not the probe."""
    if header == "if-match":
        Run.claim(store, FRESH, print).end("interrupted")
    fault_proxy.fail(
        "status",
        method="PUT",
        key="manifest.json",
        header=header,
        status=412,
        code="PreconditionFailed",
        times=ALWAYS,
    )
    with pytest.raises(
        StoreError, match=r"cannot be claimed: the server refused 30 times to write manifest\.json"
    ):
        Run.claim(store, FRESH, print, pause=lambda _: None)


@pytest.mark.parametrize("header", ["if-match", "if-none-match|if-match"])
@pytest.mark.parametrize("late", ["a renewal", "the end"])
def test_who_slept_finds_its_successor_where_conditions_are_ignored(
    store: S3Store, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, header: str, late: str
) -> None:
    first = Run.claim(store, FRESH, print)
    first.writer.write(lambda found: replace(found, lease=0.1))
    fault_proxy.fail("strip", method="PUT", key="manifest.json", header=header, times=ALWAYS)
    Run.claim(store, FRESH, print)
    before = store.read_tagged("manifest.json")
    with pytest.raises(Interrupted, match="has claimed"):
        first.end("interrupted") if late == "the end" else first.writer.write(lambda found: found)
    assert store.read_tagged("manifest.json") == before


def test_of_two_that_claimed_with_one_fence_the_later_owns(
    store: S3Store, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server took both manifests, and both processes saw no run before."""
    fault_proxy.fail(
        "strip", method="PUT", key="manifest.json", header="if-none-match", times=ALWAYS
    )
    first = Run.claim(store, FRESH, print)
    monkeypatch.setattr(
        "wds_train.checkpoint.run.this_process", lambda: Owner("host", "another", 1, 1)
    )
    second = Run._take(store, FRESH, "", print, 0)
    assert first.manifest.fence == second.manifest.fence
    with pytest.raises(Interrupted, match=r"another instance \(.*host.*\) has claimed"):
        first.writer.write(lambda found: found)
    second.writer.write(lambda found: found)
    assert read_run(store)[0].owner.machine == "another"


@pytest.mark.parametrize("case", IGNORED)
def test_a_run_of_before_is_claimed_and_rolled_back_by_who_is_alone(
    store: S3Store, fault_proxy: FaultProxy, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It began on a sound store, without the flag; its manifest says so from then on."""
    run = Run.claim(store, FRESH, print)
    two = [
        Checkpoint(
            Object(f"ckpt/000001-{step}-0.safetensors", 1, "0" * 64), Progress(step=step), {}
        )
        for step in (1, 2)
    ]
    run.writer.write(lambda found: replace(found, checkpoints=tuple(two)))
    run.end("interrupted")
    assert not read_run(store)[0].unsafe_store
    strip(fault_proxy, IGNORED[case][0])
    monkeypatch.setattr("wds_train.checkpoint.run.read_chosen", lambda *_: None)
    _, after = Run.roll_back(store, 1, print, unsafe=True)
    assert after.unsafe_store
    assert read_run(store)[0].unsafe_store
    with pytest.raises(StoreError, match=re.escape(IGNORED[case][1])):
        Run.claim(store, FRESH, print)
    Run.claim(store, FRESH, print, unsafe=True).end("interrupted")
    assert read_run(store)[0].unsafe_store


@pytest.mark.parametrize("case", IGNORED)
def test_who_is_alone_may_claim_it_and_the_manifest_says_so(
    store: S3Store, fault_proxy: FaultProxy, case: str
) -> None:
    fault = strip(fault_proxy, IGNORED[case][0])
    said: list[str] = []
    Run.claim(store, FRESH, said.append, unsafe=True).end("interrupted")
    manifest = read_run(store)[0]
    assert manifest.unsafe_store
    described = describe(replace(manifest, recipe=preset("digits").to_dict()), 0.0, None)
    assert described["unsafe_store"]
    assert _lines(described)[-1] == (
        "store        ignores conditional writes (--unsafe-store): never train this run twice at a time"
    )
    assert [line for line in said if line.endswith("nothing else may write there at the same time")]
    fault.times = 0
    Run.claim(store, FRESH, said.append, unsafe=True).end("interrupted")  # proved after all
    assert not read_run(store)[0].unsafe_store


def test_a_run_that_is_done_is_read_without_a_proof(
    store: S3Store, fault_proxy: FaultProxy
) -> None:
    done = {"val/top1": 1.0, "val/top1_ema": 1.0}
    Run.claim(store, FRESH, print).end("done", result=done)
    fault_proxy.requests.clear()
    strip(fault_proxy, "if-none-match|if-match")
    assert Run.claim(store, FRESH, print).manifest.status == "done"
    assert not fault_proxy.count("PUT")


def test_a_claim_that_loses_a_race_proves_the_store_once(
    store: S3Store, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault_proxy.fail(
        "status", method="PUT", key="manifest.json", status=409, code="Conflict", times=3
    )
    Run.claim(store, FRESH, print, pause=lambda _: None)
    assert fault_proxy.count("PUT", "probe-") == 6


def test_the_probe_of_a_killed_process_is_removed_by_the_next_claim(store: S3Store) -> None:
    for name in ("metrics/probe-0123", "ckpt/probe-4567"):
        store.write(name, b"")
    Run.claim(store, FRESH, print).end("interrupted")
    assert keys(store) == ["manifest.json"]


@pytest.mark.parametrize("passed", range(1, 6))
def test_a_probe_that_another_process_removed_is_no_flaw(
    store: S3Store, monkeypatch: pytest.MonkeyPatch, passed: int
) -> None:
    """As the next claim does, between any two writes."""
    ask = S3Connection.ask
    asked: list[str] = []

    def removed(self: S3Connection, verb: str, key: str, **details: Any) -> dict[str, Any]:
        if verb == "put_object":
            asked.append(key)
            if len(asked) == 1 + passed:
                ask(self, "delete_object", key, Key=self.full_key(key))
        return ask(self, verb, key, **details)

    monkeypatch.setattr(S3Connection, "ask", removed)
    assert prove(store, "ckpt/", print)
    assert len({*asked}) == 3  # after one flaw, both other looks must be sound
    assert keys(store) == []


# A dataset


def images(folder: Path) -> Path:
    from PIL import Image

    for number in range(8):
        path = folder / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.frombytes("RGB", (16, 16), random.Random(number).randbytes(768)).save(path)
    return folder


def convert(folder: Path, url: str) -> list[str]:
    return ["shards", str(images(folder / "images")), url, "--processes", "1"]


def index(folder: Path, url: str) -> list[str]:
    assert main([*convert(folder, str(folder / "made"))]) == 0
    for split in ("train", "val"):
        open_store(url).write(
            f"{split}.tar", (folder / "made" / split / "shard-000000.tar").read_bytes()
        )
    return ["shards", "index", url]


@pytest.mark.parametrize("case", IGNORED)
@pytest.mark.parametrize("begun", [convert, index])
def test_a_dataset_is_not_made_there(
    store: S3Store,
    fault_proxy: FaultProxy,
    case: str,
    begun: Callable[[Path, str], list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = begun(tmp_path, store.url)
    before = keys(store)
    strip(fault_proxy, IGNORED[case][0])
    assert main(command) == 1
    assert IGNORED[case][1] in capsys.readouterr().err
    assert keys(store) == before
    assert main([*command, "--unsafe-store"]) == 0
    assert f"{IGNORED[case][1]}; --unsafe-store: nothing else may write" in "".join(
        capsys.readouterr()
    )
    assert "manifest.json" in keys(store)
    assert not [key for key in keys(store) if "probe-" in key]
    with pytest.raises(NotFound):
        store.read(".wip/plan.json")
