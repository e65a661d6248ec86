"""The embedded S3 server: shared, found again, replaced when dead, stopped by the last who leaves."""

import contextlib
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from wds_train import devserver
from wds_train.errors import WdsTrainError
from wds_train.store import S3Store

# A command that uses the server until its input ends.
USER = """
import sys
from wds_train.devserver import ensure_running
print(ensure_running().url, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def user() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that uses the embedded server, and the URL that it found."""
    process = subprocess.Popen([sys.executable, "-c", USER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin and process.stdout
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait()


def test_processes_share_a_server_even_a_killed_one_s_and_the_last_to_leave_stops_it(embedded_home: Path) -> None:
    root = embedded_home / "s3"
    with user() as (starter, first):
        starter.kill()
    (pid,) = devserver._pids(root)
    with user() as (_, second):
        with user() as (_, third):
            assert first == second == third
        assert devserver._pids(root) == [pid]
    assert devserver._pids(root) == []
    assert (root / "server.json").stat().st_mode & 0o077 == 0


def test_a_killed_server_comes_back_where_it_was_with_all_that_it_acknowledged(tmp_path: Path) -> None:
    first = devserver.ensure_running(tmp_path)
    store = S3Store("embedded", "x", first)
    for i in range(20):
        store.write(f"{i}", b"%d" % i * 10_000)
    assert devserver.stop(tmp_path)  # by SIGKILL
    assert devserver.ensure_running(tmp_path) == first
    assert [store.read(f"{i}") for i in range(20)] == [b"%d" % i * 10_000 for i in range(20)]
    assert devserver.stop(tmp_path)
    assert not devserver.stop(tmp_path)
    with socket.create_server(("127.0.0.1", first.ports[-1])):  # another program took the port
        moved = devserver.ensure_running(tmp_path)
    assert moved.url != first.url
    assert S3Store("embedded", "x", moved).read("19") == b"19" * 10_000
    devserver.stop(tmp_path)


def test_a_damaged_server_file_gives_no_second_server_over_one_folder(tmp_path: Path) -> None:
    devserver.ensure_running(tmp_path)
    (first,) = devserver._pids(tmp_path)
    (tmp_path / "server.json").write_text("{")
    endpoint = devserver.ensure_running(tmp_path)
    (second,) = devserver._pids(tmp_path)
    assert second != first
    assert json.loads((tmp_path / "server.json").read_text())["url"] == endpoint.url
    devserver.stop(tmp_path)


def test_a_port_taken_between_the_look_and_the_bind_costs_a_second_draw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = devserver._free_ports()
    draws = iter([(*devserver._free_ports()[:3], 0), free])
    with socket.create_server(("127.0.0.1", 0)) as foreign:
        taken = foreign.getsockname()[1]
        monkeypatch.setattr(devserver, "_free_ports", lambda: tuple(port or taken for port in next(draws)))
        assert devserver.ensure_running(tmp_path).ports == free
    devserver.stop(tmp_path)


def test_a_server_that_cannot_start_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "filerldb2").write_text("not a folder")
    with pytest.raises(
        WdsTrainError, match=rf"stopped with code 255; the end of {tmp_path}/server.log:\n(.*\n)*.*filerldb2"
    ):
        devserver.ensure_running(tmp_path)
    assert devserver._pids(tmp_path) == []


def test_a_missing_program_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(WdsTrainError, match=r"\(weed\) is not installed; run `make setup`"):
        devserver.ensure_running(tmp_path)


def test_a_full_disk_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devserver, "MIN_FREE_BYTES", shutil.disk_usage(tmp_path).free * 2)
    with pytest.raises(WdsTrainError, match=rf"less than \d+ MiB are free on the disk of {tmp_path}.*WDS_HOME"):
        devserver.ensure_running(tmp_path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WdsTrainError, match=rf"cannot create {tmp_path}/file/s3 .*: Not a directory"):
        devserver.ensure_running(tmp_path / "file" / "s3")
