"""Two conversions of one dataset at one moment: one dataset, whole, and nothing else is left."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from wds_train.cli import main
from wds_train.dataset.reader import Dataset
from wds_train.storage.open import open_store

CONVERT = [sys.executable, "-m", "shards.make_shards"]


def images(folder: Path) -> Path:
    for number in range(40):
        path = folder / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.frombytes("RGB", (16, 16), random.Random(number).randbytes(768)).save(path)
    return folder


def both(commands: list[list[str]]) -> list[tuple[int, str]]:
    """Return the exit status and the messages of commands that begin at one moment."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    begun = [subprocess.Popen(command, **pipes) for command in commands]
    said = [process.communicate(timeout=120)[0] for process in begun]
    return [(process.returncode, text) for process, text in zip(begun, said, strict=True)]


CASES = {
    "alike": ([], []),
    "of two seeds": (["--seed", "5"], ["--seed", "6"]),
    "of two seeds, over one": (["--seed", "5", "--overwrite"], ["--seed", "6", "--overwrite"]),
    "alike, over one": (["--seed", "5", "--overwrite"], ["--seed", "5", "--overwrite"]),
}


@pytest.mark.parametrize("case", CASES)
def test_two_conversions_make_one_dataset(s3_url: str, tmp_path: Path, case: str) -> None:
    begin = [
        *CONVERT,
        str(images(tmp_path / "images")),
        s3_url,
        "--shard-mb",
        "0.01",
        "--processes",
        "1",
    ]
    if "over" in case:
        assert main(["shards", *begin[3:], "--seed", "1"]) == 0
    ended = both([[*begin, *flags] for flags in CASES[case]])
    codes = sorted(code for code, _ in ended)
    assert codes[0] == 0, ended
    assert not any("Traceback" in text for _, text in ended), ended
    if "alike" in case:
        assert codes == [0, 0], ended
    assert main(["verify", s3_url]) == 0
    left = [entry.key for entry in open_store(s3_url).list()]
    assert {*left} == Dataset.open(s3_url).manifest.objects() | {"manifest.json"}


def test_two_indexes_make_one_dataset(s3_url: str, tmp_path: Path) -> None:
    made, store = str(tmp_path / "made"), open_store(s3_url)
    assert main(["shards", str(images(tmp_path / "images")), made, "--processes", "1"]) == 0
    for split in ("train", "val"):
        store.write(f"{split}.tar", (tmp_path / "made" / split / "shard-000000.tar").read_bytes())
    ended = both([[*CONVERT, "index", s3_url]] * 2)
    assert [code for code, _ in ended] == [0, 0], ended
    assert main(["verify", s3_url]) == 0
    assert {entry.key for entry in store.list()} == Dataset.open(s3_url).manifest.objects() | {
        "manifest.json"
    }
