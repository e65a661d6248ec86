"""Thousands of mutated shards and tars, by seed: an error, or the right bytes.

Never a wrong sample, a crash or a hang.
"""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from wds_train.dataset.reader import Dataset, SplitReader
from wds_train.dataset.tar import members
from wds_train.errors import DataError, StoreError
from wds_train.loader.fetch import Fetcher
from wds_train.loader.plan import Request

MUTANTS = 5_000
SAMPLES = 12


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Change bytes one to four times: flip, set, remove, repeat, zero, move, cut off the end."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, size = rng.randrange(len(out)), rng.choice([1, 8, 512, 3000])
        match rng.randrange(7):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at] = rng.choice(b"\x00\xff 07xLSg\n")
            case 2:
                del out[at : at + size]
            case 3:
                out[at:at] = out[at : at + size]
            case 4:
                out[at : at + size] = bytes(len(out[at : at + size]))
            case 5:
                out[at : at + size] = out[rng.randrange(len(out)) :][: len(out[at : at + size])]
            case _:
                del out[max(1, at) :]
        out = out or bytearray(b"\0")
    return bytes(out)


@pytest.fixture
def copy(digits: Dataset, tmp_path: Path) -> SplitReader:
    """A dataset of its own, whose first shard the test overwrites."""
    shutil.copytree(digits.store.url, tmp_path / "copy")
    return Dataset.open(str(tmp_path / "copy")).split("train")


def test_the_loader_meets_mutated_shards(copy: SplitReader, tmp_path: Path) -> None:
    """Every sample comes out as it went in, or is named as damaged, or the store has an error."""
    shard = tmp_path / "copy" / copy.shard_names[0]
    end = int(copy.index.offset[SAMPLES])
    original, rest = shard.read_bytes()[:end], shard.read_bytes()[end:]
    ids = np.arange(SAMPLES, dtype=np.int64)
    fetch = Fetcher(copy)
    fetched = next(fetch([Request(0, 0, 0, ids)]))  # type: ignore[arg-type]
    clean = [bytes(record) for record in fetched.records]
    rng, damaged, refused = random.Random(0), 0, 0
    for _ in range(MUTANTS):
        shard.write_bytes((mutate(original, rng) + rest)[: end + len(rest)])
        try:
            records = next(fetch([Request(0, 0, 0, ids)])).records
        except StoreError:
            refused += 1
            continue
        for record, right in zip(records, clean, strict=True):
            if isinstance(record, DataError):
                damaged += 1
            else:
                assert bytes(record) == right
    assert damaged > MUTANTS  # the mutants are not harmless
    assert refused < MUTANTS // 10


def test_the_tar_reader_meets_mutated_tars(digits: Dataset) -> None:
    """Members inside the file's bounds, or a `DataError`; at most one step for each block."""
    data = digits.store.read(
        "train/shard-000000.tar", 0, int(digits.split("train").index.offset[SAMPLES])
    ) + bytes(1024)
    rng, refused = random.Random(1), 0
    for _ in range(MUTANTS):
        mutant = mutate(data, rng)

        def read(offset: int, length: int, mutant: bytes = mutant) -> bytes:
            assert 0 <= offset <= len(mutant)
            assert length <= 1 << 20
            return mutant[offset : offset + length]

        try:
            found = list(members(read, 0, len(mutant)))
        except DataError:
            refused += 1
            continue
        assert len(found) <= len(mutant) // 512
        assert all(member.data_offset >= 0 and member.end <= len(mutant) for member in found)
    assert refused > MUTANTS // 2
