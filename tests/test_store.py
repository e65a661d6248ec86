"""The store's promises, for a local directory and for S3 alike."""

from pathlib import Path

import pytest

from wds_train.errors import Conflict, NotFound, StoreError
from wds_train.store import Store, open_store


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store") if request.param == "local" else request.getfixturevalue("s3_url"))


def test_what_was_written_is_read_whole_and_by_ranges(store: Store) -> None:
    store.write("a/b", b"0123456789")
    assert store.read("a/b") == b"0123456789"
    assert store.read("a/b", 3) == b"3456789"
    assert store.read("a/b", 3, 4) == b"3456"
    assert store.read("a/b", 3, 0) == b""
    assert store.read_tagged("a/b")[0] == b"0123456789"


def test_an_empty_object_is_one(store: Store) -> None:
    store.write("empty", b"")
    assert store.read("empty") == b""
    assert list(store.list()) == [("empty", 0)]


@pytest.mark.parametrize("length", [8, 100])
def test_a_range_beyond_the_end_is_an_error_naming_both(store: Store, length: int) -> None:
    store.write("a", b"0123456789")
    with pytest.raises(StoreError, match=rf"{store.url}/a.* up to {3 + length} "):
        store.read("a", 3, length)
    with pytest.raises(StoreError, match=f"{store.url}/a"):
        store.read("a", 50, length)


def test_what_is_not_there_is_named(store: Store) -> None:
    with pytest.raises(NotFound, match=f"{store.url}/no/such does not exist"):
        store.read("no/such")
    with pytest.raises(NotFound, match=f"{store.url}/no/such does not exist"):
        store.read_tagged("no/such")
    assert list(store.list()) == []
    store.delete("no/such")


def test_compare_and_swap_lets_one_writer_win(store: Store) -> None:
    first = store.write("m", b"1", if_absent=True)
    with pytest.raises(Conflict, match=f"{store.url}/m"):
        store.write("m", b"2", if_absent=True)
    assert store.read_tagged("m") == (b"1", first)
    second = store.write("m", b"2", if_match=first)
    with pytest.raises(Conflict, match=f"{store.url}/m"):
        store.write("m", b"3", if_match=first)
    assert store.read_tagged("m") == (b"2", second)
    store.delete("m")
    with pytest.raises(Conflict, match=f"{store.url}/m"):
        store.write("m", b"3", if_match=second)


def test_list_gives_keys_and_sizes_in_order(store: Store) -> None:
    for key in ("b/2", "b/10", "a", "b.x", "ba/1"):
        store.write(key, key.encode())
    assert list(store.list()) == [("a", 1), ("b.x", 3), ("b/10", 4), ("b/2", 3), ("ba/1", 4)]
    assert [entry.key for entry in store.list("b/")] == ["b/10", "b/2"]
    assert [entry.key for entry in store.list("b")] == ["b.x", "b/10", "b/2", "ba/1"]


def test_a_file_is_uploaded(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 100_000)
    store.upload("up/loaded", tmp_path / "file")
    assert store.read("up/loaded") == b"x" * 100_000
