"""The store's promises, for a local directory and for S3 alike; then what only one can meet."""

import dataclasses
import hashlib
import os
import pickle
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fault_proxy import FaultProxy, Kind

from wds_train.errors import AccessDenied, Conflict, NotFound, StoreError, Unavailable, UsageError
from wds_train.storage import embedded
from wds_train.storage.base import PART_BYTES, Store
from wds_train.storage.embedded import Endpoint
from wds_train.storage.local import LocalStore
from wds_train.storage.open import open_store
from wds_train.storage.retry import Retry
from wds_train.storage.s3 import S3Store

RANDOM = random.Random(0).randbytes(3_500_000)


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(
        str(tmp_path / "store") if request.param == "local" else request.getfixturevalue("s3_url")
    )


@pytest.fixture
def s3(s3_url: str) -> S3Store:
    return S3Store(*s3_url.removeprefix("s3://").split("/"))


@pytest.fixture
def local(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


# Both kinds


def test_what_was_written_is_read_whole_and_by_ranges(store: Store) -> None:
    tag = store.write("a/b", b"0123456789")
    assert store.read("a/b") == b"0123456789"
    assert store.read("a/b", 3) == b"3456789"
    assert store.read("a/b", 3, 4) == b"3456"
    assert store.read("a/b", 3, 0) == b""
    target = bytearray(b"________")
    store.read_into("a/b", 3, memoryview(target)[2:6])
    store.read_into("a/b", 3, memoryview(target)[:0])
    assert target == b"__3456__"
    assert store.read_tagged("a/b") == (b"0123456789", tag)
    assert store.head("a/b") == (10, tag)


def test_an_empty_object_is_one(store: Store) -> None:
    store.write("empty", b"")
    assert store.read("empty") == b""
    assert [entry[:2] for entry in store.list()] == [("empty", 0)]


@pytest.mark.parametrize("start", [3, 10, 50])
def test_a_range_beyond_the_end_is_an_error_naming_it(store: Store, start: int) -> None:
    store.write("a", b"0123456789")
    with pytest.raises(
        StoreError,
        match=rf"{store.url}/a is too short: bytes {start} up to {start + 8} were asked for",
    ):
        store.read("a", start, 8)
    with pytest.raises(StoreError, match="a is too short: bytes"):
        store.read_into("a", start, memoryview(bytearray(8)))
    if start >= 10:
        with pytest.raises(
            StoreError, match=rf"{store.url}/a is too short: bytes from {start} on were asked for"
        ):
            store.read("a", start)


def test_what_is_not_there_is_named(store: Store) -> None:
    for ask in (store.read, store.read_tagged, store.head):
        with pytest.raises(NotFound, match=f"{store.url}/no/such does not exist"):
            ask("no/such")
    assert list(store.list()) == []
    store.delete("no/such")


def test_compare_and_swap_lets_one_writer_win(store: Store) -> None:
    first = store.write("m", b"1", if_absent=True)
    with pytest.raises(Conflict, match=f"{store.url}/m was written by another writer"):
        store.write("m", b"2", if_absent=True)
    assert store.read_tagged("m") == (b"1", first)
    second = store.write("m", b"2", if_match=first)
    with pytest.raises(Conflict, match=f"{store.url}/m was written by another writer"):
        store.write("m", b"3", if_match=first)
    assert store.read_tagged("m") == (b"2", second)
    store.delete("m")
    with pytest.raises(Conflict, match=f"{store.url}/m was written by another writer"):
        store.write("m", b"3", if_match=second)
    assert list(store.list()) == []


def test_a_conditional_write_of_the_bytes_in_place_has_succeeded(store: Store) -> None:
    first = store.write("m", b"1", if_absent=True)
    assert store.write("m", b"1", if_absent=True) == first
    second = store.write("m", b"2", if_match=first)
    assert store.write("m", b"2", if_match=first) == second
    assert store.read("m") == b"2"


def test_of_many_racing_writers_one_wins_each_round(store: Store) -> None:
    tag = store.write("m", b"start")
    for round_ in range(15):

        def swap(writer: int, tag: str = tag, round_: int = round_) -> str | None:
            try:
                return store.write("m", b"%d by %d" % (round_, writer), if_match=tag)
            except Conflict:
                return None

        with ThreadPoolExecutor(6) as pool:
            won = [new for new in pool.map(swap, range(6)) if new]
        assert len(won) == 1
        (tag,) = won
        assert store.head("m")[1] == tag


def test_list_gives_the_keys_under_a_prefix_in_order(store: Store) -> None:
    for key in ("b/2", "b/10", "a", "b.x", "ba/1", ".hidden"):
        store.write(key, key.encode())
    assert [entry[:2] for entry in store.list()] == [
        (".hidden", 7),
        ("a", 1),
        ("b.x", 3),
        ("b/10", 4),
        ("b/2", 3),
        ("ba/1", 4),
    ]
    assert [entry.key for entry in store.list("b/")] == ["b/10", "b/2"]
    assert [entry.key for entry in store.list("b")] == ["b.x", "b/10", "b/2", "ba/1"]
    assert [entry.key for entry in store.list("b/1")] == ["b/10"]
    assert [entry.key for entry in store.list("c/")] == []
    store.delete("b/10")
    assert [entry.key for entry in store.list("b/")] == ["b/2"]


@pytest.mark.parametrize("size", [0, 100_000, 3 * PART_BYTES + 1])
def test_a_file_is_uploaded_whole(store: Store, tmp_path: Path, size: int) -> None:
    body = random.Random(size).randbytes(size)
    (tmp_path / "file").write_bytes(body)
    store.upload("up/loaded", tmp_path / "file")
    assert hashlib.sha256(store.read("up/loaded")).digest() == hashlib.sha256(body).digest()
    with pytest.raises(StoreError, match=f"{tmp_path}/missing cannot be read: No such file"):
        store.upload("up/loaded", tmp_path / "missing")


def test_a_large_write_swaps_like_a_small_one(store: Store) -> None:
    one, two = (bytes([n]) * (PART_BYTES + 1) for n in (1, 2))
    tag = store.write("big", memoryview(one), if_absent=True)
    assert store.write("big", one, if_absent=True) == tag
    with pytest.raises(Conflict, match=f"{store.url}/big was written"):
        store.write("big", two, if_absent=True)
    assert store.head("big") == (len(one), tag)
    assert store.write("big", bytearray(two), if_match=tag) != tag
    assert store.read("big", 0, 1) == b"\2"
    assert [entry.key for entry in store.list()] == ["big"]


@pytest.mark.parametrize("key", ["../out", "a/../../out", "/etc/passwd", "a\0b"])
def test_a_key_that_leads_out_of_the_store_is_refused(
    store: Store, tmp_path: Path, key: str
) -> None:
    (tmp_path / "out").write_text("secret")
    actions: list[Callable[[], object]] = [
        lambda: store.read(key),
        lambda: store.head(key),
        lambda: store.write(key, b"1"),
        lambda: store.delete(key),
    ]
    for action in actions:
        with pytest.raises(StoreError, match="is not a key inside"):
            action()
    assert (tmp_path / "out").read_text() == "secret"


def test_addresses_that_cannot_be_are_refused() -> None:
    with pytest.raises(UsageError, match=r"'s3:///x' names no bucket; write s3://BUCKET/PREFIX"):
        open_store("s3:///x")
    with pytest.raises(UsageError, match="'gs://b/x' is neither"):
        open_store("gs://b/x")


# A local directory


def test_a_full_disk_is_named_and_leaves_the_old_object(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    if (
        os.getuid()
        or not shutil.which("mount")
        or subprocess.call(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(mount)])
    ):
        pytest.skip("cannot mount a small file system here")
    try:
        store = LocalStore(mount)
        store.write("a", b"old")
        with pytest.raises(
            StoreError, match=rf"no space left on the disk of {mount} while writing a; free some"
        ):
            store.write("a", bytes(1 << 20))
        assert store.read("a") == b"old"
        assert [path.name for path in mount.iterdir()] == ["a"]
    finally:
        subprocess.check_call(["umount", str(mount)])


def test_no_permission_is_named(local: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(path: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    local.write("a", b"")
    monkeypatch.setattr(Path, "open", deny)  # root, as whom containers run, is denied nothing
    with pytest.raises(
        AccessDenied, match=rf"no permission for {local.url}/a; check its owner and mode"
    ):
        local.read("a")


def test_list_looks_at_nothing_outside_its_prefix(
    local: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("in/a", "out/b", "out/deep/c"):
        local.write(key, b"1")
    seen: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: seen.append(str(path)) or scandir(path))
    assert [entry.key for entry in local.list("in/")] == ["in/a"]
    assert seen
    assert not [path for path in seen if path.startswith(f"{local.url}/out")]


KILLED_WRITER = """
import os, signal, sys, threading
from pathlib import Path
from wds_train.storage.local import LocalStore
os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
LocalStore(Path(sys.argv[1])).write("a", b"new")
"""


def test_a_writer_killed_before_the_rename_leaves_the_old_object_and_no_lock(
    local: LocalStore,
) -> None:
    local.write("a", b"old")
    process = subprocess.run([sys.executable, "-c", KILLED_WRITER, local.url], check=False)
    assert process.returncode == -9
    assert local.read("a") == b"old"
    assert [entry[:2] for entry in local.list()] == [("a", 3)]
    local.write("a", b"newer")
    assert [path.name for path in local.root.iterdir()] == ["a"]


# S3 through a network that fails


@pytest.fixture
def proxied(fault_proxy: FaultProxy, s3: S3Store, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    """A store behind the proxy that gives up soon."""
    for module in ("s3_session", "s3_read"):
        monkeypatch.setattr(f"wds_train.storage.{module}.SOCKET_SECONDS", 1.0)
    for module in ("retry", "s3_read"):
        monkeypatch.setattr(f"wds_train.storage.{module}.SLOWEST", 2_000_000)
    monkeypatch.setenv("WDS_S3_PATIENCE", "20")
    again = S3Store(s3.bucket, s3.prefix)
    again.write("big", RANDOM)
    fault_proxy.requests.clear()
    return again


@pytest.mark.parametrize("kind", ["reset", "truncate", "stall"])
def test_a_body_that_breaks_off_is_resumed_where_it_broke(
    proxied: S3Store, fault_proxy: FaultProxy, kind: Kind
) -> None:
    fault_proxy.fail(kind, method="GET", key="big", after=1_000_000, times=3)
    assert proxied.read("big", 100, 3_400_000) == RANDOM[100:3_400_100]
    assert fault_proxy.count("GET", "big") >= 2
    if kind != "reset":  # which drops what was on its way
        assert fault_proxy.bytes_sent("big") == 3_400_000
    fault_proxy.fail(kind, method="GET", key="big", after=1_000_000, times=2)
    assert proxied.read_tagged("big")[0] == RANDOM
    target = bytearray(3_400_000)
    proxied.read_into("big", 100, memoryview(target))
    assert target == RANDOM[100:3_400_100]


def test_a_body_that_drips_is_asked_for_again(proxied: S3Store, fault_proxy: FaultProxy) -> None:
    fault_proxy.fail("drip", method="GET", key="big", after=10_000)
    assert proxied.read("big") == RANDOM
    assert fault_proxy.count("GET", "big") == 2


def test_an_object_replaced_while_it_is_read_is_a_conflict(
    proxied: S3Store, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, s3: S3Store
) -> None:
    fault_proxy.fail("reset", method="GET", key="big", after=1_000_000)
    monkeypatch.setattr(Retry, "pause", lambda *_, **__: s3.write("big", RANDOM[::-1]))
    with pytest.raises(Conflict, match=f"{proxied.url}/big was changed by another writer"):
        proxied.read("big")


@pytest.mark.parametrize("kind", ["reset", "status", "lost_ack"])
def test_every_verb_survives_passing_trouble(
    proxied: S3Store, fault_proxy: FaultProxy, kind: Kind
) -> None:
    actions: list[Callable[[], object]] = [
        lambda: proxied.write("new", b"1"),
        lambda: proxied.read("new"),
        lambda: proxied.head("new"),
        lambda: list(proxied.list()),
        lambda: proxied.delete("new"),
    ]
    for action in actions:
        fault = fault_proxy.fail(kind, times=2)
        action()
        assert fault.times == 0
    assert [entry.key for entry in proxied.list()] == ["big"]


@pytest.mark.parametrize("size", [1, PART_BYTES + 1])
def test_a_lost_acknowledgement_is_no_conflict(
    proxied: S3Store, fault_proxy: FaultProxy, size: int
) -> None:
    one = b"1" * size
    two = b"2" * size
    for body, condition in ((one, {"if_absent": True}), (two, {"if_match": ""})):
        if "if_match" in condition:
            condition = {"if_match": proxied.head("m")[1]}  # noqa: PLW2901
        fault = fault_proxy.fail(
            "lost_ack", method="PUT" if size == 1 else "POST", key="m", times=2
        )
        tag = proxied.write("m", body, **condition)  # type: ignore[arg-type]
        assert fault.times == 0
        assert proxied.head("m") == (size, tag)
        assert proxied.read("m") == body


def test_a_lost_acknowledgement_does_not_hide_another_writer(
    proxied: S3Store, fault_proxy: FaultProxy, s3: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault_proxy.fail("lost_ack", method="PUT", key="m")
    monkeypatch.setattr(Retry, "pause", lambda *_, **__: s3.write("m", b"theirs"))
    with pytest.raises(Conflict, match=f"{proxied.url}/m was written by another writer"):
        proxied.write("m", b"ours", if_absent=True)
    assert s3.read("m") == b"theirs"


@pytest.mark.parametrize(
    ("answer", "kind", "text"),
    [
        (
            "403 AccessDenied",
            AccessDenied,
            "denied \\(AccessDenied\\): let the AWS credentials .* s3:ListBucket",
        ),
        (
            "400 ExpiredToken",
            AccessDenied,
            "denied \\(ExpiredToken\\): the credentials have expired: renew them",
        ),
        ("403 RequestTimeTooSkewed", AccessDenied, "this machine's clock is wrong: set it"),
        ("409 Conflict", Conflict, "m was written by another writer"),
        ("412 PreconditionFailed", Conflict, "m was written by another writer"),
        ("400 EntityTooLarge", StoreError, "answered 400 EntityTooLarge"),
    ],
)
def test_a_refusal_is_final_at_once(
    proxied: S3Store, fault_proxy: FaultProxy, answer: str, kind: type[StoreError], text: str
) -> None:
    fault_proxy.fail("status", method="PUT", status=int(answer[:3]), code=answer[4:], times=9)
    never_open = S3Store(
        proxied.bucket, proxied.prefix
    )  # one that was open waits for new credentials
    with pytest.raises(kind, match=f"{proxied.url}/m.*{text}|{text}") as caught:
        never_open.write("m", b"1")
    assert not isinstance(caught.value, Unavailable)
    assert fault_proxy.count("PUT") == 1


@pytest.mark.parametrize("kind", ["reset", "status", "stall", "truncate", "drip"])
def test_a_dead_server_ends_in_a_clear_error_within_the_deadline(
    proxied: S3Store, fault_proxy: FaultProxy, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WDS_S3_PATIENCE", "1.5")
    hasty = S3Store(proxied.bucket, proxied.prefix)
    fault_proxy.fail(kind, times=10**9)
    began = time.monotonic()
    with pytest.raises(
        Unavailable, match=rf"{proxied.url}/(m|big).*gave up after \d+ attempts in \d+ s"
    ) as caught:
        hasty.read("big" if kind in ("stall", "truncate", "drip") else "m")
    if kind == "status":
        assert f"after {fault_proxy.count('GET')} attempts" in str(caught.value)
    assert (
        time.monotonic() - began < 100
    )  # not the usual 120 s; at leisure it takes 1.5 s, and what a read may take


def test_many_reads_under_random_faults_give_the_same_bytes(
    proxied: S3Store, fault_proxy: FaultProxy
) -> None:
    for kind in ("reset", "truncate", "status", "stall"):
        fault_proxy.fail(
            kind, method="GET", share=0.03, after=0 if kind == "status" else 50_000, times=10**9
        )
    draws = random.Random(1)
    spans = [(draws.randrange(3_000_000), draws.randrange(1, 500_000)) for _ in range(150)]
    with ThreadPoolExecutor(8) as pool:
        bodies = list(pool.map(lambda span: proxied.read("big", *span), spans))
    assert bodies == [RANDOM[start : start + length] for start, length in spans]
    assert fault_proxy.count("GET", "big") > 150


def test_a_failed_upload_leaves_nothing_behind(
    proxied: S3Store, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(bytes(2 * PART_BYTES))
    fault_proxy.fail("status", method="PUT", status=403, code="AccessDenied", times=9)
    with pytest.raises(AccessDenied, match=f"{proxied.url}/up"):
        proxied.upload("up", tmp_path / "file")
    assert "Uploads" not in proxied.client.list_multipart_uploads(Bucket=proxied.bucket)
    assert [entry.key for entry in proxied.list()] == ["big"]


def test_bytes_damaged_on_their_way_up_are_sent_again(
    proxied: S3Store, fault_proxy: FaultProxy, aws_env: pytest.MonkeyPatch
) -> None:
    aws_env.setenv(
        "AWS_REQUEST_CHECKSUM_CALCULATION", "when_required"
    )  # boto3 shall not do our part
    proxied = pickle.loads(pickle.dumps(proxied))
    fault_proxy.fail("flip_up", method="PUT", after=10)
    proxied.write("a", RANDOM)
    assert fault_proxy.count("PUT", "a") == 2
    assert proxied.read("a") == RANDOM


def test_pauses_double_up_to_a_bound_start_anew_after_progress_and_end() -> None:
    now = [0.0]
    pauses = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        now[0] += seconds + 1

    retry = Retry(100, lambda: now[0], sleep)
    with pytest.raises(Unavailable, match=r"^no answer; gave up after \d+ attempts in \d+ s$"):
        while True:
            retry.pause(Unavailable("no answer"), progressed=len(pauses) == 20)
    assert now[0] <= 101
    assert all(pause <= min(5, 0.1 * 2 ** (n + 1)) for n, pause in enumerate(pauses[:20]))
    assert max(pauses[:20]) > 0.5
    assert pauses[20] <= 0.1


# S3 that cannot work: seconds, not minutes, and the remedy


def test_a_missing_bucket_is_not_a_missing_object(s3: S3Store) -> None:
    missing = S3Store(
        "no-such-bucket", "x"
    )  # reads only: SeaweedFS makes the bucket that an administrator writes to
    actions: list[Callable[[], object]] = [
        lambda: missing.read("a"),
        lambda: missing.read_tagged("a"),
        lambda: [*missing.list()],
    ]
    for action in actions:
        with pytest.raises(
            StoreError, match=r"the bucket of s3://no-such-bucket/x.* does not exist; create it"
        ) as caught:
            action()
        assert type(caught.value) is StoreError


@pytest.mark.parametrize(
    ("setting", "kind", "text"),
    [
        (
            "AWS_SECRET_ACCESS_KEY=wrong",
            AccessDenied,
            r"SignatureDoesNotMatch\): .*check AWS_SECRET_ACCESS_KEY",
        ),
        (
            "AWS_ACCESS_KEY_ID=wrong",
            AccessDenied,
            r"InvalidAccessKeyId\): .*check AWS_ACCESS_KEY_ID",
        ),
        ("AWS_ACCESS_KEY_ID=", AccessDenied, "no AWS credentials .*set AWS_ACCESS_KEY_ID"),
        (
            "AWS_PROFILE=nobody",
            UsageError,
            r"settings cannot be used .*\(.*nobody.*\); check .*AWS_PROFILE",
        ),
        (
            "AWS_ENDPOINT_URL=localhost:1",
            UsageError,
            r"settings cannot be used .*localhost:1.*check AWS_ENDPOINT_URL",
        ),
        (
            "AWS_ENDPOINT_URL=http://127.0.0.1:9",
            Unavailable,
            r"http://127.0.0.1:9/.*check .*AWS_ENDPOINT_URL; gave up",
        ),
        (
            "AWS_ENDPOINT_URL=http://no-such-host.invalid",
            Unavailable,
            r"http://no-such-host.invalid/.*; gave up",
        ),
    ],
)
def test_settings_that_cannot_work_are_named(
    s3_url: str, aws_env: pytest.MonkeyPatch, setting: str, kind: type[StoreError], text: str
) -> None:
    aws_env.setattr("wds_train.storage.s3_connection.FIRST_SECONDS", 1.0)
    name, value = setting.split("=")
    aws_env.setenv(name, value)
    if not value:
        aws_env.delenv(name)
        aws_env.delenv("AWS_SECRET_ACCESS_KEY")
    began = time.monotonic()
    with pytest.raises(kind, match=text) as caught:
        open_store(s3_url).read("a")
    assert s3_url in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 100  # not the usual 120 s


def test_a_bucket_name_that_cannot_be_is_named(s3: S3Store) -> None:
    with pytest.raises(UsageError, match="s3://Not_A_Bucket!/x/a is not a usable S3 address"):
        S3Store("Not_A_Bucket!", "x").read("a")


# Processes and threads


def read_often(store: S3Store) -> None:
    for start in range(0, 3_000_000, 100_000):
        assert store.read("big", start, 400_000) == RANDOM[start : start + 400_000]


def test_a_store_is_used_by_threads_and_pickled_copies_at_once(s3: S3Store) -> None:
    s3.write("big", RANDOM)
    copy = pickle.loads(pickle.dumps(s3))
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(read_often, (s3, s3, s3, copy, copy, copy)))


def test_forked_processes_do_not_share_connections(s3: S3Store) -> None:
    s3.write("big", RANDOM)
    read_often(s3)
    children = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            try:
                read_often(s3)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(pid)
    read_often(s3)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0, 0]


def test_the_embedded_server_is_reached_past_a_proxy_for_the_world(
    s3_server: Endpoint, aws_env: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY"):
        aws_env.setenv(name, "http://127.0.0.1:9")
    store = S3Store("embedded", "proxy", s3_server)
    store.write("a", b"1")
    assert store.read("a") == b"1"


def test_a_full_disk_under_the_embedded_server_is_named(
    s3_server: Endpoint, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = S3Store("embedded", "full", dataclasses.replace(s3_server, url=fault_proxy.url))
    store.write("a", b"1")
    monkeypatch.setattr(embedded, "RESERVED_BYTES", shutil.disk_usage(s3_server.root).total + 1)
    assert store.read("a") == b"1"
    fault_proxy.fail(
        "status", method="PUT", status=500, code="InternalError"
    )  # what SeaweedFS then answers
    with pytest.raises(
        StoreError, match=f"no space left on the disk of {s3_server.root}, .*/full/b; free some"
    ) as caught:
        store.write("b", b"1")
    assert type(caught.value) is StoreError
