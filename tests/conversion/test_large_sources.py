"""The table of a source's files: in mapped files when it is large, and never copied whole."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from wds_train.conversion.sources.scan import MAPPED, Rows
from wds_train.conversion.sources.source import CHUNK, ROWS, Source, take
from wds_train.conversion.sources.splits import hold_out
from wds_train.dataset.arrow import to_batch
from wds_train.dataset.manifest import ClassInfo
from wds_train.errors import StoreError


def batch(number: int, rows: int = CHUNK) -> pa.RecordBatch:
    names = [f"{number:03d}/{n:06d}" for n in range(rows)]
    columns = [
        names,
        np.arange(rows) % 7,
        [f"/source/{name}.jpg" for name in names],
        np.zeros(rows),
        np.arange(rows),
    ]
    return to_batch(columns, ROWS)


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pa.Table:
    """Rows for two files, and some more."""
    monkeypatch.setenv("WDS_HOME", str(tmp_path / "home"))
    rows, one = Rows(), batch(0)
    for _ in range(2 * MAPPED // CHUNK):
        rows.add_batch(one)
    rows.add("last", 0, "/source/last.jpg", 0, 1)
    table = rows.table()
    assert [len(each) for each in table["key"].chunks] == [MAPPED, MAPPED, 1]
    assert (
        list((tmp_path / "home").iterdir()) == []
    )  # files without a name: they go with whoever uses them
    return table


def test_a_large_table_is_not_in_memory(large: pa.Table) -> None:
    assert large.nbytes > 50e6 and pa.total_allocated_bytes() < large.nbytes / 10
    assert take(large, [2 * MAPPED, 0, MAPPED + 5]).to_pylist() == [
        {"key": "last", "label": 0, "path": "/source/last.jpg", "offset": 0, "length": 1},
        {
            "key": "000/000000",
            "label": 0,
            "path": "/source/000/000000.jpg",
            "offset": 0,
            "length": 0,
        },
        {
            "key": "000/000005",
            "label": 5,
            "path": "/source/000/000005.jpg",
            "offset": 0,
            "length": 5,
        },
    ]
    before = pa.total_allocated_bytes()
    found = take(large, np.arange(0, large.num_rows, 1000))
    assert pa.total_allocated_bytes() - before < 1e6 and found["length"].to_pylist()[1] == 1000


def test_a_source_is_the_same_however_its_table_is_cut() -> None:
    digests = []
    for cuts in ([50_000], [16_384, 16_384, 17_232], [1, 20_000, 29_999]):
        whole, start, parts = batch(0, 50_000), 0, []
        for rows in cuts:
            parts.append(whole.slice(start, rows))
            start += rows
        source = Source("x", (ClassInfo("a", "a"),) * 7, {"train": pa.Table.from_batches(parts)})
        held = hold_out(source, 0.1)
        kept = hashlib.sha256(repr(held.splits["val"].to_pydict()).encode()).hexdigest()
        digests.append((source.digest(), held.digest(), kept))
    assert len({*digests}) == 1


def test_no_folder_for_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").write_bytes(b"no folder")
    monkeypatch.setenv("WDS_HOME", str(tmp_path / "home"))
    rows, one = Rows(), batch(0)
    with pytest.raises(
        StoreError, match=r"the table of the source's files cannot be kept in .*set WDS_HOME"
    ):
        for _ in range(MAPPED // CHUNK):
            rows.add_batch(one)
