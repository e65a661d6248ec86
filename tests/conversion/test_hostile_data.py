"""Tars, indexes and manifests as an enemy would write them.

They are named in one sentence, or read aright: never a traceback, a hang, a sample lost in silence,
or a byte from outside the store.
"""

import contextlib
import copy
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import layouts
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from shards.make_shards import main
from wds_train.cli import main as wds_train
from wds_train.dataset.integrity import verify
from wds_train.dataset.manifest import KIND
from wds_train.dataset.reader import Dataset
from wds_train.errors import DataError, WdsTrainError
from wds_train.loader.fetch import Fetcher
from wds_train.loader.plan import Request

PHOTOS = layouts.photos()
DEEP = 100_000
KEPT = ""


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WDS_HOME", str(tmp_path / "home"))


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fails what hangs, also in a loop that no timeout of a thread would end."""

    def hangs(*_: object) -> None:
        raise AssertionError(f"it took over {seconds} s")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def shards(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    before, sys.argv = sys.argv, ["make_shards", *map(str, arguments), "--processes", "1"]
    try:
        with within(5):
            code = main()
    finally:
        sys.argv = before
    return code, "".join(capsys.readouterr())


# Tars: `index`, which writes beside them, and a conversion.

Part = bytes | tuple[str, bytes]


def header(
    name: bytes,
    size: int,
    kind: bytes = tarfile.REGTYPE,
    link: str = "",
    raw_size: bytes | None = None,
) -> bytes:
    """A tar header with a right checksum, whatever else it says."""
    info = tarfile.TarInfo("x")
    info.type, info.linkname = kind, link
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[:100] = name.ljust(100, b"\0")
    block[124:136] = raw_size or b"%011o\0" % size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name: str | bytes, data: bytes) -> bytes:
    name = name if isinstance(name, bytes) else name.encode()
    return header(name, len(data)) + data + bytes(-len(data) % 512)


def pax(record: bytes) -> bytes:
    """A pax header before the next member that holds one record, such as size=abc."""
    length = len(record) + 2
    while len(b"%d %s\n" % (length, record)) != length:
        length += 1
    data = b"%d %s\n" % (length, record)
    return header(b"pax", len(data), tarfile.XHDTYPE) + data + bytes(-len(data) % 512)


def pair(number: int, label: bytes = b"", extension: str = "cls") -> bytes:
    photo = PHOTOS[number % len(PHOTOS)]
    return member(f"{number:03d}.{extension}", label or b"%d" % (number % 2)) + member(
        f"{number:03d}.jpg", photo
    )


NEGATIVE = b"\xff" * 11 + b"\x00"  # -256, in GNU's base 256
ENORMOUS = b"\x80" + b"\x7f" * 11
GOOD = pair(0) + pair(1) + pair(2) + pair(3)
END = bytes(1024)
NESTED = b"[" * 40_000 + b"]" * 40_000

# name: (the tar, what `index` says, what a conversion says); KEPT is success.
TARS: dict[str, tuple[bytes, str, str]] = {
    "pax header of negative size": (
        GOOD + header(b"x", 0, tarfile.XHDTYPE, raw_size=NEGATIVE) + END,
        "claims -256 bytes",
        "claims -256 bytes",
    ),
    "GNU long name of negative size": (
        GOOD + header(b"x", 0, tarfile.GNUTYPE_LONGNAME, raw_size=NEGATIVE) + END,
        "claims -256 bytes",
        "claims -256 bytes",
    ),
    "GNU long name of enormous size": (
        GOOD + header(b"x", 0, tarfile.GNUTYPE_LONGNAME, raw_size=ENORMOUS) + END,
        "the extended header at byte",
        "the extended header at byte",
    ),
    "file of negative size": (
        GOOD + header(b"9.jpg", 0, raw_size=NEGATIVE) + END,
        "in the middle of '9.jpg'",
        "in the middle of '9.jpg'",
    ),
    "file of enormous size": (
        GOOD + header(b"9.jpg", 0, raw_size=ENORMOUS) + END,
        "in the middle of '9.jpg'",
        "in the middle of '9.jpg'",
    ),
    "pax size that is no number": (
        GOOD + pax(b"size=abc") + pair(4) + END,
        "the size 'abc'",
        "the size 'abc'",
    ),
    "pax size of 5,000 digits": (
        GOOD + pax(b"size=" + b"9" * 5000) + pair(4) + END,
        "the size '999",
        "the size '999",
    ),
    "pax size below zero": (
        GOOD + pax(b"size=-512") + pair(4) + END,
        "the size '-512'",
        "the size '-512'",
    ),
    "pax size beyond the end": (
        GOOD + pax(b"size=99999999") + pair(4) + END,
        "in the middle of '004.cls'",
        "in the middle of '004.cls'",
    ),
    "pax record of length zero": (
        GOOD + header(b"pax", 6, tarfile.XHDTYPE) + b"0 a=b\n" + bytes(506) + pair(4) + END,
        KEPT,
        KEPT,
    ),
    "pax path upwards": (
        GOOD + pax(b"path=../../../x.jpg") + member("y.jpg", PHOTOS[4]) + END,
        "its name points outside the archive",
        "its name points outside the archive",
    ),
    "pax header and nothing": (
        GOOD + pax(b"path=x.jpg"),
        "without the blocks that end a tar",
        "without the blocks",
    ),
    "names upwards": (
        GOOD + member("../../up.cls", b"0") + member("../../up.jpg", PHOTOS[4]) + END,
        "its name points outside the archive",
        "its name points outside the archive",
    ),
    "absolute names": (
        GOOD + member("/etc/up.cls", b"0") + member("/etc/up.jpg", PHOTOS[4]) + END,
        "its name points outside the archive",
        "its name points outside the archive",
    ),
    "names in Latin-1": (
        GOOD + member(b"caf\xe9.cls", b"0") + member(b"caf\xe9.jpg", PHOTOS[4]) + END,
        "caf\\udce9: its name is empty, not UTF-8, or cannot be printed; rename it",
        KEPT,
    ),
    "every name in Latin-1": (
        b"".join(
            member(name + b".cls", b"%d" % n) + member(name + b".jpg", PHOTOS[4])
            for n, name in enumerate((b"caf\xe9", b"caf\xe8"))
        )
        + END,
        "none of 2 samples can be used",
        KEPT,
    ),
    "an empty name": (GOOD + member("", b"0") + END, KEPT, KEPT),
    "names of dots": (GOOD + member(".cls", b"0") + member(".jpg", PHOTOS[4]) + END, KEPT, KEPT),
    "a Mac's litter": (
        GOOD + member("._000.jpg", b"x") + member("._000.cls", b"y") + END,
        KEPT,
        KEPT,
    ),
    "a name with a line feed": (
        GOOD + member("a\nb.cls", b"0") + member("a\nb.jpg", PHOTOS[4]) + END,
        "a\\nb: its name is empty, not UTF-8, or cannot be printed",
        KEPT,
    ),
    "symbolic link": (
        GOOD + header(b"9.jpg", 0, tarfile.SYMTYPE, "/etc/passwd") + member("9.cls", b"0") + END,
        "'9.jpg' is a symbolic link; only plain files can be used",
        "9.jpg: a symbolic link, not a file",
    ),
    "hard link": (
        GOOD + header(b"9.jpg", 0, tarfile.LNKTYPE, "000.jpg") + member("9.cls", b"0") + END,
        "'9.jpg' is a hard link; only plain files can be used",
        "9.jpg: a hard link, not a file",
    ),
    "device": (
        GOOD + header(b"9.jpg", 0, tarfile.CHRTYPE) + member("9.cls", b"0") + END,
        "'9.jpg' is a special file; only plain files can be used",
        "9.jpg: a special file, not a file",
    ),
    "FIFO": (
        GOOD + header(b"9.jpg", 0, tarfile.FIFOTYPE) + member("9.cls", b"0") + END,
        "'9.jpg' is a special file; only plain files can be used",
        "9.jpg: a special file, not a file",
    ),
    "sparse file": (
        GOOD + header(b"9.jpg", 0, tarfile.GNUTYPE_SPARSE) + member("9.cls", b"0") + END,
        "'9.jpg' is a sparse file; only plain files can be used",
        "9.jpg: a sparse file, not a file",
    ),
    "pax sparse file": (
        GOOD
        + pax(b"GNU.sparse.major=1")
        + member("9.jpg", PHOTOS[4])
        + member("9.cls", b"0")
        + END,
        "'9.jpg' is a sparse file; only plain files can be used",
        "9.jpg: a sparse file, not a file",
    ),
    "unknown kind": (
        GOOD + header(b"9.jpg", 0, b"Z") + member("9.cls", b"0") + END,
        "only plain files can be used",
        "9.jpg: a special file, not a file",
    ),
    "cut in a header": (GOOD[:-1000], "it ends at byte", "it ends at byte"),
    "cut in an image": ((GOOD + END)[: len(GOOD) - 600], "it ends at byte", "it ends at byte"),
    "cut before its end": (
        GOOD,
        "without the blocks that end a tar",
        "without the blocks that end a tar",
    ),
    "empty file": (b"", "without the blocks that end a tar", "without the blocks that end a tar"),
    "zeros alone": (
        bytes(10240),
        "no samples with an image and a label",
        "holds no images that can be used",
    ),
    "two tars in one": (
        GOOD + END + GOOD + END,
        "more follows the end of the archive",
        "more follows the end",
    ),
    "a wrong checksum": (
        b"y" + GOOD[1:] + END,
        "the tar header at byte 0 is damaged",
        "the tar header at byte 0",
    ),
    "text": (
        b"this is no tar" * 1000,
        "the tar header at byte 0 is damaged",
        "the tar header at byte 0",
    ),
    "a ZIP": (
        b"PK\3\4" + bytes(5000),
        "the tar header at byte 0 is damaged",
        "the tar header at byte 0",
    ),
    "deep JSON in .json": (
        GOOD + pair(4, NESTED, "json") + END,
        "its label member .json has 80000",
        "has 80000 bytes",
    ),
    "deep JSON in .json, a little less": (
        GOOD + pair(4, b"[" * 30_000 + b"]" * 30_000, "json") + END,
        "its label is",
        "its label is",
    ),
    "a file beside the samples": (GOOD + member("README.md", b"read me") + END, KEPT, KEPT),
    "deep JSON in .cls": (
        GOOD + pair(4, b"[" * 30_000 + b"]" * 30_000) + END,
        "its label is",
        "its label is",
    ),
    "an enormous label": (
        GOOD + pair(4, b"7" * 70_000) + END,
        "has 70000 bytes",
        "has 70000 bytes",
    ),
    "a label of 5,000 digits": (GOOD + pair(4, b"7" * 5000) + END, "its label is", "its label is"),
    "a label of 2e9": (GOOD + pair(4, b"2000000000") + END, KEPT, KEPT),
    "a label below zero": (GOOD + pair(4, b"-1") + END, KEPT, KEPT),
    "a label of bytes": (GOOD + pair(4, b"\xff\xfe\x00") + END, "its label is", "its label is"),
    "a label that is a list": (
        GOOD + pair(4, b"[1, 0]") + END,
        "its label is [1, 0]",
        "its label is [1, 0]",
    ),
    "a label that is null": (GOOD + pair(4, b"null") + END, KEPT, KEPT),
    "a pickled label": (
        GOOD + pair(4, b"cos\nsystem\n(S'x'\ntR.") + END,
        "its label is",
        "its label is",
    ),
    "an empty label": (GOOD + member("9.cls", b"") + member("9.jpg", PHOTOS[4]) + END, KEPT, KEPT),
    "an empty image": (
        GOOD + member("9.cls", b"0") + member("9.jpg", b"") + END,
        "zero bytes",
        "zero bytes",
    ),
    "text as an image": (
        GOOD + member("9.cls", b"0") + member("9.jpg", b"text") + END,
        "cannot be",
        "cannot be",
    ),
    "every sample bad": (
        b"".join(
            member(f"{n}.cls", b"%d" % (n % 2)) + member(f"{n}.jpg", b"text") for n in range(3)
        )
        + END,
        "none of 3 samples can be used",
        "none of 3 samples can be used",
    ),
    "one key twice": (GOOD + pair(0) + END, "do not lie side by side", KEPT),
    "one member twice": (
        GOOD + member("009.jpg", PHOTOS[4]) + pair(9) + END,
        "do not lie side by side",
        "009: no .cls or .json member",
    ),
    "labels alone": (
        member("0.cls", b"0") + member("1.cls", b"1") + END,
        "none of 2 samples",
        "no image member",
    ),
    "images alone": (
        member("0.jpg", PHOTOS[0]) + member("1.jpg", PHOTOS[1]) + END,
        "none of 2 samples",
        "no .cls",
    ),
}


def listed(root: Path) -> dict[str, str]:
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in root.rglob("*")
        if p.is_file()
    }


@pytest.mark.parametrize("name", TARS)
def test_tars(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, of_index, of_conversion = TARS[name]
    for what, said in (("index", of_index), ("conversion", of_conversion)):
        root = tmp_path / what / "mine"
        root.mkdir(parents=True)
        (root / "train-0.tar").write_bytes(data)
        before = listed(tmp_path)
        out = root if what == "index" else root.parent / "out"
        arguments = ["index", root] if what == "index" else [f"wds:{root}", out, "--hold-out", "0"]
        code, output = shards(capsys, *arguments)
        if said == KEPT:
            assert code == 0, output
            assert wds_train(["verify", str(out)]) == 0
        else:
            assert code in (1, 2) and said in output, output
            assert "train-0.tar" in output or root.name in output
            assert not (out / "manifest.json").exists()
        assert before.items() <= listed(tmp_path).items()
        assert output.isprintable() or output.replace("\n", "").isprintable()


@pytest.mark.parametrize("kind", ["FIFO", "link to itself", "link to a device", "folder", "litter"])
def test_no_tar_at_all(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside a good tar, something else of such a name: never opened, which would wait for ever."""
    root = tmp_path / "mine"
    root.mkdir()
    (root / "train-0.tar").write_bytes(GOOD + END)
    odd = root / "train-1.tar"
    if kind == "FIFO":
        os.mkfifo(odd)
    elif kind == "folder":
        odd.mkdir()
    elif kind == "litter":
        (root / "._train-0.tar").write_bytes(b"x")
    else:
        odd.symlink_to(odd if kind == "link to itself" else "/dev/zero")
    code, output = shards(capsys, f"wds:{root}", tmp_path / "out", "--hold-out", "0")
    if kind in ("folder", "litter"):
        assert code == 0, output
    else:
        assert code == 1 and f"{odd} " in output and "Traceback" not in output, output
    assert shards(capsys, "index", root)[0] == 0


# Manifests and indexes: `verify` names what the loader refuses, and the other way round.


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def rehashed(content: Any) -> bytes:
    """`content` with the fingerprint that follows from it, as far as one does."""
    with contextlib.suppress(Exception):
        hashed = {
            "classes": content["classes"],
            "shards": {name: split["shards"] for name, split in content["splits"].items()},
        }
        content["fingerprint"] = sha256(
            json.dumps(hashed, sort_keys=True, separators=(",", ":")).encode()
        )
    return json.dumps(content).encode()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 12 and 4 samples in several shards. Not to be written to."""
    folder = tmp_path_factory.mktemp("sound")
    for split, count in (("train", 6), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            (folder / "mine" / split / name).mkdir(parents=True)
            for n in range(count):
                (folder / "mine" / split / name / f"{n}.jpg").write_bytes(PHOTOS[8 * label + n])
    before, sys.argv = (
        sys.argv,
        ["x", str(folder / "mine"), str(folder / "out"), "--shard-mb", "0.02", "--processes", "1"],
    )
    try:
        assert main() == 0
    finally:
        sys.argv = before
    return folder / "out"


@pytest.fixture
def mine(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "copy" / "data")
    return tmp_path / "copy" / "data"


Samples = dict[str, list[tuple[int, bytes]]]  # label and image of every sample of a split


def loaded(root: Path) -> Samples | str:
    """Return the samples that the loader makes of a dataset, or its error."""
    try:
        dataset, found = Dataset.open(str(root)), Samples()
        for split in dataset.manifest.splits:
            reader = dataset.split(split)
            (window,) = Fetcher(reader)([Request(0, 0, 0, np.arange(len(reader)))])
            if broken := [record for record in window.records if isinstance(record, DataError)]:
                raise broken[0]
            found[split] = list(
                zip(reader.index.label[:].tolist(), map(bytes, window.records), strict=True)
            )  # type: ignore[arg-type]
        return found
    except WdsTrainError as error:
        return str(error)


def verified(root: Path) -> list[str]:
    """The lines of damage that `verify` prints."""
    try:
        return [str(damage) for damage in verify(Dataset.open(str(root)))]
    except WdsTrainError as error:
        return [str(error)]


def refused_by_both(root: Path, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with within(5):
        said = loaded(root)
        assert isinstance(said, str) and sentence in said, said
        capsys.readouterr()
        assert wds_train(["verify", str(root)]) == 1
        assert sentence in "".join(capsys.readouterr())
        assert wds_train(["order", str(root), "--global-batch", "4"]) == 1
        assert wds_train(["inspect", str(root)]) == 1
        error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error and len(error) < 2000


def at(*path: str | int) -> Callable[[Any], Any]:
    """The part of a manifest at `path`."""

    def find(content: Any) -> Any:
        for step in path:
            content = content[step]
        return content

    return find


def put(value: Any, *path: str | int) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        at(*path[:-1])(content)[path[-1]] = value

    return change


def without(*path: str | int) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        del at(*path[:-1])(content)[path[-1]]

    return change


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


SHARD = ("splits", "train", "shards", 0)
INDEX = ("splits", "train", "index")
MANIFESTS: dict[str, tuple[Callable[[Any], None], str]] = {
    "no classes": (put([], "classes"), "classes is empty"),
    "too few classes": (
        put([{"id": "cat", "name": "cat"}], "classes"),
        "labels 0..1, the dataset has 1 classes",
    ),
    "classes of no texts": (
        put([{"id": 1, "name": None}], "classes"),
        "classes[0] is 1, None, which are no texts that",
    ),
    "classes that are a text": (put("cat", "classes"), "is damaged"),
    "classes that are missing": (without("classes"), "is damaged: KeyError('classes')"),
    "a class of half a letter": (put("\ud800", "classes", 0, "id"), "classes[0] is"),
    "a class with a control character": (put("\x1b[2J", "classes", 0, "name"), "classes[0] is"),
    "a class with more": (put(1, "classes", 0, "x"), "is damaged"),
    "no splits": (put({}, "splits"), "splits is empty"),
    "splits that are a list": (put([], "splits"), "is damaged"),
    "splits that are missing": (without("splits"), "is damaged: KeyError('splits')"),
    "a split called ../x": (
        lambda c: c["splits"].update({"../x": c["splits"].pop("val")}),
        "a split is called '../x'",
    ),
    "a split without a name": (
        lambda c: c["splits"].update({"": c["splits"].pop("val")}),
        "a split is called ''",
    ),
    "a split that is null": (put(None, "splits", "val"), "is damaged"),
    "no shards": (put([], "splits", "train", "shards"), "splits.train.shards is empty"),
    "shards that are missing": (
        without("splits", "train", "shards"),
        "is damaged: KeyError('shards')",
    ),
    "a shard too few": (lambda c: c["splits"]["train"]["shards"].pop(), "the manifest has"),
    "a shard too many": (
        lambda c: c["splits"]["train"]["shards"].append(
            c["splits"]["train"]["shards"][0] | {"name": "x.tar"}
        ),
        "disagree on the samples per shard",
    ),
    "a shard twice": (
        lambda c: c["splits"]["train"]["shards"].append(c["splits"]["train"]["shards"][0]),
        "the object 'train/shard-000000.tar' is named twice",
    ),
    "a shard of both splits": (
        lambda c: c["splits"]["val"]["shards"].append(c["splits"]["train"]["shards"][0]),
        "the object 'train/shard-000000.tar' is named twice",
    ),
    "an index of both splits": (
        lambda c: c["splits"]["val"].update(index=c["splits"]["train"]["index"]),
        "the object 'train/index.parquet' is named twice",
    ),
    "a shard that is the manifest": (
        put("manifest.json", *SHARD, "name"),
        "which is no key inside the dataset",
    ),
    "a shard that is a number": (
        put(7, *SHARD, "name"),
        "names the object 7, which is no key inside the dataset",
    ),
    "a shard without a name": (put("", *SHARD, "name"), "names the object ''"),
    "a shard of two lines": (
        put("train/a\nb.tar", *SHARD, "name"),
        "which is no key inside the dataset",
    ),
    "a shard above": (
        put("../../../../etc/passwd", *SHARD, "name"),
        "which is no key inside the dataset",
    ),
    "a shard in the middle above": (
        put("train/../../x", *SHARD, "name"),
        "which is no key inside the dataset",
    ),
    "a shard from the root": (
        put("/etc/passwd", *SHARD, "name"),
        "which is no key inside the dataset",
    ),
    "a shard with a zero byte": (
        put("train\0x", *SHARD, "name"),
        "which is no key inside the dataset",
    ),
    "a shard of half a letter": (
        put("\udcff", *SHARD, "name"),
        "which is no key inside the dataset",
    ),
    "an index above": (put("../x", *INDEX, "name"), "which is no key inside the dataset"),
    "a report above": (put("../x", "report", "name"), "which is no key inside the dataset"),
    "a report that is a text": (put("x", "report"), "is damaged"),
    "negative bytes": (put(-1, *SHARD, "bytes"), "bytes of 'train/shard-000000.tar' is -1"),
    "bytes that are a text": (
        put("12", *SHARD, "bytes"),
        "bytes of 'train/shard-000000.tar' is '12'",
    ),
    "bytes with a fraction": (
        put(1.5, *SHARD, "bytes"),
        "bytes of 'train/shard-000000.tar' is 1.5",
    ),
    "bytes that are true": (
        put(True, *SHARD, "bytes"),
        "bytes of 'train/shard-000000.tar' is True",
    ),
    "bytes beyond number": (
        put(10**400, *SHARD, "bytes"),
        "bytes of 'train/shard-000000.tar' is 1000",
    ),
    "bytes of 2**63": (put(2**63, *SHARD, "bytes"), "bytes of 'train/shard-000000.tar' is 9223"),
    "too few bytes": (put(512, *SHARD, "bytes"), "is not in the shard"),
    "negative samples": (put(-1, *SHARD, "samples"), "samples of 'train/shard-000000.tar' is -1"),
    "samples of 2**61": (put(2**61, *SHARD, "samples"), "disagree on the samples per shard"),
    "samples beyond number": (
        put(10**400, *SHARD, "samples"),
        "samples of 'train/shard-000000.tar' is 1000",
    ),
    "an odd sha256": (put("x" * 64, *SHARD, "sha256"), "sha256 of 'train/shard-000000.tar'"),
    "a sha256 that is null": (
        put(None, *INDEX, "sha256"),
        "sha256 of 'train/index.parquet' is None",
    ),
    "an index that is missing": (without(*INDEX), "is damaged: KeyError('index')"),
    "another index": (
        lambda c: c["splits"]["train"].update(
            index=c["splits"]["val"]["index"] | {"name": "val/../val/index.parquet"}
        ),
        "which is no key inside the dataset",
    ),
    "a seed that is a text": (put("0", "seed"), "seed is '0', not of type int"),
    "a source that is null": (put(None, "source"), "source is None, not of type str"),
    "an image policy that is a list": (
        put([], "image_policy"),
        "image_policy is [], not of type dict",
    ),
    "a conversion that is a text": (put("x", "conversion"), "conversion is 'x', not of type dict"),
    "an image policy that is deep": (put({"x": nested(900)}, "image_policy"), "image_policy"),
    "a conversion that is deep": (put({"x": {"y": nested(900)}}, "conversion"), "conversion"),
    "a format that is deep": (put(nested(900), "format"), "has format"),
    "a fingerprint that is deep": (put(nested(900), "report"), "is damaged"),
    "a kind that is deep": (put(nested(900), "kind"), "is not a wds-train dataset manifest"),
    "another kind": (put("another", "kind"), "is not a wds-train dataset manifest"),
    "a newer format": (
        put(3, "format"),
        "has format 3, this wds-train reads formats 1 and 2; upgrade it",
    ),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests(name: str, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, sentence = MANIFESTS[name]
    content = json.loads((mine / "manifest.json").read_bytes())
    change(content)
    (mine / "manifest.json").write_bytes(rehashed(content))
    refused_by_both(mine, sentence, capsys)


TEXTS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "is not JSON"),
    "a number": (b"1", "is not a wds-train dataset manifest"),
    "not a number": (b"NaN", "is not a wds-train dataset manifest"),
    "a list": (b"[]", "is not a wds-train dataset manifest"),
    "Latin-1": (b'{"kind": "caf\xe9"}', "is not JSON"),
    "UTF-16": ('{"kind": "x"}'.encode("utf-16"), "is not a wds-train dataset manifest"),
    "deep lists": (b"[" * DEEP, "is not JSON"),
    "deep objects": (b'{"a":' * DEEP, "is not JSON"),
    "a number of 5,000 digits": (
        b'{"kind": "%s", "format": %s}' % (KIND.encode(), b"9" * 5000),
        "is not JSON",
    ),
    "zeros": (bytes(1000), "is not JSON"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_manifests_that_are_none(name: str, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, sentence = TEXTS[name]
    (mine / "manifest.json").write_bytes(data)
    refused_by_both(mine, sentence, capsys)


def test_an_altered_manifest(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (mine / "manifest.json").read_text()
    (mine / "manifest.json").write_text(text.replace('"id": "cat"', '"id": "cow"'))
    refused_by_both(mine, "was altered", capsys)


Columns = dict[str, list[Any]]


def replace_index(root: Path, data: bytes, split: str = "train") -> None:
    """Put `data` in the index's place, and its size and sha256 into the manifest."""
    content = json.loads((root / "manifest.json").read_bytes())
    index = content["splits"][split]["index"]
    named = index[0] if isinstance(index, list) else index
    (root / named["name"]).write_bytes(data)
    named |= {"bytes": len(data), "sha256": sha256(data)}
    (root / "manifest.json").write_bytes(rehashed(content))


def parquet(table: pa.Table, **options: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, **options)
    return out.getvalue()


def cell(column: str, row: int, value: Any) -> Callable[[Columns], None]:
    return lambda columns: columns[column].__setitem__(row, value)


def move(column: str, row: int, by: int) -> Callable[[Columns], None]:
    return lambda columns: columns[column].__setitem__(row, columns[column][row] + by)


def both(
    one: Callable[[Columns], None], other: Callable[[Columns], None]
) -> Callable[[Columns], None]:
    def change(columns: Columns) -> None:
        one(columns)
        other(columns)

    return change


def exchange(one: int, other: int) -> Callable[[Columns], None]:
    def change(columns: Columns) -> None:
        for column in columns.values():
            column[one], column[other] = column[other], column[one]

    return change


def drop(row: int) -> Callable[[Columns], None]:
    return lambda columns: [column.pop(row) for column in columns.values()] and None


def repeat(row: int) -> Callable[[Columns], None]:
    return lambda columns: [column.insert(row, column[row]) for column in columns.values()] and None


CELLS: dict[str, tuple[Callable[[Columns], None], str]] = {
    "length negative": (cell("length", 3, -512), "row 3: length -512 is not in the shard"),
    "length zero": (cell("length", 3, 0), "row 3: length 0 is not in the shard"),
    "length 2**45": (cell("length", 3, 2**45), f"row 3: length {2**45} is not in the shard"),
    "length 2**63-1": (
        cell("length", 3, 2**63 - 1),
        f"row 3: length {2**63 - 1} is not in the shard",
    ),
    "length into the next": (move("length", 0, 512), "offset are not in ascending order"),
    "offset negative": (cell("offset", 0, -1), "row 0: offset -1 is negative"),
    "offset 2**45": (cell("offset", 3, 2**45), f"offset {2**45} lies beyond the shard's end"),
    "offset 2**63-1": (
        cell("offset", 3, 2**63 - 1),
        f"offset {2**63 - 1} lies beyond the shard's end",
    ),
    "offset into the one before": (
        both(move("offset", 1, -512), move("length", 1, 512)),
        "not in ascending order",
    ),
    "data_offset negative": (
        cell("data_offset", 3, -1),
        "row 3: data_offset -1 is not behind the sample's start",
    ),
    "data_offset 2**63-1": (cell("data_offset", 3, 2**63 - 1), "row 3: data_offset"),
    "data_offset of another": (
        cell("data_offset", 1, 1),
        "row 1: data_offset 1 is not behind the sample's start",
    ),
    "data_length negative": (
        cell("data_length", 3, -1),
        "row 3: data_length -1 is not in the sample",
    ),
    "data_length zero": (cell("data_length", 3, 0), "row 3: data_length 0 is not in the sample"),
    "data_length 2**63-1": (cell("data_length", 3, 2**63 - 1), "row 3: data_length"),
    "data_length beyond": (move("data_length", 3, 2000), "is not in the sample"),
    "shard negative": (cell("shard", 0, -1), "it holds shard numbers -1.."),
    "shard too large": (cell("shard", 3, 99), "it holds shard numbers 0..99"),
    "shard 2**31-1": (cell("shard", 3, 2**31 - 1), "it holds shard numbers 0..2147483647"),
    "another shard": (cell("shard", 0, 1), "disagree on the samples per shard"),
    "label negative": (cell("label", 3, -1), "it holds labels -1..1, the dataset has 2 classes"),
    "label too large": (cell("label", 3, 2), "it holds labels 0..2, the dataset has 2 classes"),
    "label 2**31-1": (cell("label", 3, 2**31 - 1), "the dataset has 2 classes"),
    "width zero": (cell("width", 3, 0), "row 3: width 0 is no number of pixels"),
    "width negative": (cell("width", 3, -5), "row 3: width -5 is no number of pixels"),
    "width 2**31-1": (
        cell("width", 3, 2**31 - 1),
        "row 3: width 2147483647 is no number of pixels",
    ),
    "height zero": (cell("height", 3, 0), "row 3: height 0 is no number of pixels"),
    "an empty key": (cell("key", 3, ""), "row 3: key '' is no name"),
    "a key of two lines": (cell("key", 3, "a\nb"), "row 3: key 'a\\nb' is no name"),
    "a key of all the text": (cell("key", 3, "x" * 10_000_000), "row 3: key 'xxx"),
    "rows out of order": (exchange(0, 1), "not in ascending order"),
    "a row missing": (drop(2), "disagree on the samples per shard"),
    "a row twice": (repeat(2), "disagree on the samples per shard"),
    "no rows": (
        lambda columns: [column.clear() for column in columns.values()] and None,
        "disagree on the samples",
    ),
    "an empty cell": (cell("width", 3, None), "it has empty cells"),
    "an empty key's cell": (cell("key", 3, None), "it has empty cells"),
}


def table_of(root: Path) -> pa.Table:
    return pq.read_table(root / "train" / "index.parquet")


def changed(table: pa.Table, change: Callable[[Columns], None]) -> pa.Table:
    columns = table.to_pydict()
    change(columns)
    return pa.table(
        {
            name: pa.array(columns[name], table.schema.field(name).type)
            for name in table.schema.names
        }
    )


@pytest.mark.parametrize("name", CELLS)
def test_cells_of_an_index(name: str, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, sentence = CELLS[name]
    replace_index(mine, parquet(changed(table_of(mine), change)))
    refused_by_both(mine, sentence, capsys)


def with_column(name: str, values: pa.Array) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.schema.get_field_index(name), name, values)


ROWS = 12
FILES: dict[str, tuple[Callable[[pa.Table], bytes], str]] = {
    "no Parquet": (lambda table: b"PAR1 not really PAR1", "is not an index that can be read"),
    "nothing": (lambda table: b"", "is not an index that can be read"),
    "cut": (lambda table: parquet(table)[:-40], "is not an index that can be read"),
    "a column missing": (
        lambda table: parquet(table.drop_columns(["crc32"])),
        "is not an index that can be read",
    ),
    "no columns": (lambda table: parquet(pa.table({"x": [1]})), "is not an index that can be read"),
    "labels that are texts": (
        lambda table: parquet(with_column("label", pa.array(["cat"] * ROWS))(table)),
        "is not an index that can be read",
    ),
    "labels with a fraction": (
        lambda table: parquet(with_column("label", pa.array([0.5] * ROWS))(table)),
        "is not an index that can be read",
    ),
    "labels that are lists": (
        lambda table: parquet(with_column("label", pa.array([[0]] * ROWS))(table)),
        "is not an index that can be read",
    ),
    "labels beyond int32": (
        lambda table: parquet(with_column("label", pa.array([2**40] * ROWS))(table)),
        "is not an index that can be read",
    ),
    "a CRC below zero": (
        lambda table: parquet(with_column("crc32", pa.array([-1] * ROWS))(table)),
        "is not an index that can be read",
    ),
    "keys that are no UTF-8": (
        lambda table: parquet(with_column("key", pa.array([b"\xff\xfe"] * ROWS))(table)),
        "is not an index that can be read",
    ),
    "keys said to be UTF-8": (
        lambda table: parquet(
            with_column("key", pa.array([b"\xff\xfe"] * ROWS).view(pa.string()))(table)
        ),
        "is not an index that can be read",
    ),
    "a column twice": (
        lambda table: parquet(table.append_column("label", table["label"])),
        "is not an index that can be read",
    ),
    "millions of rows": (
        lambda table: parquet(table.take(pa.array([0] * 300_000))),
        "disagree on the samples per shard",
    ),
}
SOUND_FILES: dict[str, Callable[[pa.Table], bytes]] = {
    "snappy": lambda table: parquet(table, compression="snappy"),
    "plain": lambda table: parquet(table, compression="none", use_dictionary=False),
    "dictionaries": lambda table: parquet(
        table.set_column(6, "key", table["key"].dictionary_encode())
    ),
    "row groups": lambda table: parquet(table, row_group_size=1),
    "larger numbers": lambda table: parquet(
        with_column("label", table["label"].cast(pa.int64()))(table)
    ),
    "large texts": lambda table: parquet(
        with_column("key", table["key"].cast(pa.large_string()))(table)
    ),
    "another order": lambda table: parquet(table.select(table.schema.names[::-1])),
    "more columns": lambda table: parquet(table.append_column("mine", pa.array(range(ROWS)))),
    "pages of version 1": lambda table: parquet(table, version="1.0", data_page_version="1.0"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_an_index(name: str, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, sentence = FILES[name]
    replace_index(mine, make(table_of(mine)))
    refused_by_both(mine, sentence, capsys)


@pytest.mark.parametrize("name", SOUND_FILES)
def test_an_index_written_otherwise(name: str, mine: Path, sound: Path) -> None:
    replace_index(mine, SOUND_FILES[name](table_of(mine)))
    assert verified(mine) == []
    assert loaded(mine) == loaded(sound)


# Only the tars tell: the loader gets what the index says, `verify` says that the tar differs.
LIES: dict[str, tuple[Callable[[Columns], None], str]] = {
    "another label": (lambda c: c["label"].__setitem__(3, 1 - c["label"][3]), "its label is"),
    "another key": (cell("key", 3, "cat/77"), "the shard calls it"),
    "half a key": (lambda c: c["key"].__setitem__(3, c["key"][3][:-1]), "the shard calls it"),
    "two of one key": (lambda c: c["key"].__setitem__(3, c["key"][4]), "the shard calls it"),
    "another checksum": (move("crc32", 3, 1), "do not match the checksum in the index"),
    "half an image": (move("data_length", 3, -100), "its image is not where the index says"),
    "the label's header as image": (
        move("data_offset", 3, -512),
        "its image is not where the index says",
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_an_index_that_lies(name: str, mine: Path) -> None:
    change, sentence = LIES[name]
    replace_index(mine, parquet(changed(table_of(mine), change)))
    (damage,) = [line for line in verified(mine) if "sha256" not in line]
    assert sentence in damage


# Mutations by seed.

MUTANTS = 1_000
ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    1,
    2**31,
    2**45,
    2**63,
    10**30,
    0.5,
    "",
    "x",
    "../x",
    "/etc/passwd",
    "\0",
    [],
    {},
    [[]],
]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if isinstance(value, dict | list):
        for step, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, step))


def mutate_tree(content: Any, rng: random.Random) -> None:
    """A value replaced, removed, doubled, moved elsewhere, or a key renamed."""
    for _ in range(rng.randint(1, 3)):
        *above, last = rng.choice([*places(content)])
        inside, other = at(*above)(content), at(*rng.choice([*places(content)]))(content)
        match rng.randrange(5):
            case 0:
                inside[last] = copy.deepcopy(rng.choice(ODD))
            case 1:
                del inside[last]
            case 2 if isinstance(inside, list):
                inside.append(copy.deepcopy(inside[last]))
            case 3 if isinstance(inside, dict):
                inside[rng.choice(["x", "name", "../x", ""])] = inside.pop(last)
            case _:
                inside[last] = copy.deepcopy(other)
        if not [*places(content)]:
            return


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        where, size = rng.randrange(len(out)), rng.choice([1, 4, 40])
        match rng.randrange(4):
            case 0:
                out[where] ^= 1 << rng.randrange(8)
            case 1:
                out[where : where + size] = rng.randbytes(size)
            case 2:
                del out[where : where + size]
            case _:
                out[where:where] = out[where : where + size]
        out = out or bytearray(b"{")
    return bytes(out)


def mutate_cells(table: pa.Table, rng: random.Random) -> pa.Table:
    """Cells replaced, exchanged or moved by a little; rows removed, repeated or exchanged."""
    columns = table.to_pydict()
    for _ in range(rng.randint(1, 3)):
        name, row = rng.choice([*columns]), rng.randrange(len(columns["key"]))
        other, values = rng.randrange(len(columns["key"])), columns[name]
        match rng.randrange(6):
            case 0 if name == "key":
                values[row] = rng.choice(["", "x", "../x", "a\nb", values[row][:-1]])
            case 0:
                least, most = (0, 2**32 - 1) if name == "crc32" else (-(2**31), 2**31 - 1)
                wide = (
                    (-(2**63), 2**63 - 1, 2**45)
                    if pa.types.is_int64(table.schema.field(name).type)
                    else ()
                )
                values[row] = rng.choice([0, 1, least, most, *wide])
            case 1 if name != "key":
                values[row] = max(0, values[row] + rng.choice([-1024, -512, -1, 1, 512, 1024]))
            case 2:
                exchange(row, other)(columns)
            case 3 if len(values) > 1:
                drop(row)(columns)
            case 4:
                repeat(row)(columns)
            case _:
                values[row], values[other] = values[other], values[row]
    return pa.table(
        {
            name: pa.array(columns[name], table.schema.field(name).type)
            for name in table.schema.names
        }
    )


OPENED: list[str] = []  # by this process, since the hook was added, which cannot be taken away


@pytest.fixture(scope="module")
def hooked() -> None:
    sys.addaudithook(lambda event, args: OPENED.append(str(args[0])) if event == "open" else None)


def judge(root: Path, right: Samples) -> str:
    """Return `refused` (by both), `named` (by `verify`) or `sound`.

    Fails for anything else: a dataset that opens, and is not named, is right.
    """
    OPENED.clear()
    with within(5):
        damage, found = verified(root), loaded(root)
    outside = {str(root.parent / "x"), "/etc/passwd"}  # what the mutants name
    assert not outside & {os.path.normpath(path) for path in OPENED}
    text = "\n".join(damage) + (found if isinstance(found, str) else "")
    assert "Traceback" not in text and "\x1b" not in text
    if isinstance(found, str):
        assert damage, f"the loader refuses what verify calls whole: {found}"
        return "refused"
    if damage:
        return "named"
    assert all(samples in right.values() for samples in found.values()), (
        "other samples, and nobody says so"
    )
    return "sound"


@pytest.fixture(params=[False, True], ids=["whole", "by shard"])
def of_kind(mine: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The dataset, as it is, and with an index for each shard of train."""
    if request.param:
        monkeypatch.setenv("WDS_HOME", str(mine.parent / "home"))
        content, table, start = json.loads((mine / "manifest.json").read_bytes()), table_of(mine), 0
        split, indexes = content["splits"]["train"], []
        for number, shard in enumerate(split["shards"]):
            data, name = (
                parquet(table.slice(start, shard["samples"])),
                f"train/index-{number:06d}.parquet",
            )
            (mine / name).write_bytes(data)
            indexes.append({"name": name, "bytes": len(data), "sha256": sha256(data)})
            start += shard["samples"]
        split["index"], content["format"] = indexes, 2
        (mine / "manifest.json").write_bytes(json.dumps(content).encode())
    return mine


def test_mutated_manifests(of_kind: Path, hooked: None) -> None:
    mine = of_kind
    (mine.parent / "x").write_bytes(b"secret")
    rng, right, original = random.Random(0), loaded(mine), (mine / "manifest.json").read_bytes()
    assert not isinstance(right, str)
    ends = dict.fromkeys(("refused", "named", "sound"), 0)
    for number in range(MUTANTS):
        if number % 4 == 0:
            data = mutate_bytes(original, rng)
        else:
            content = json.loads(original)
            mutate_tree(content, rng)
            data = rehashed(content) if number % 4 > 1 else json.dumps(content).encode()
        (mine / "manifest.json").write_bytes(data)
        ends[judge(mine, right)] += 1
    assert ends["refused"] > MUTANTS / 2 and ends["sound"], ends


def test_mutated_indexes(of_kind: Path, hooked: None) -> None:
    mine = of_kind
    rng, right, manifest = random.Random(1), loaded(mine), (mine / "manifest.json").read_bytes()
    split = Dataset.open(str(mine)).manifest.split("train")
    name, mutants = (
        split.indexes[0].name,
        MUTANTS if split.indexes == (split.index,) else MUTANTS // 5,
    )
    original = (mine / name).read_bytes()
    table = pq.read_table(mine / name)
    assert not isinstance(right, str)
    ends = dict.fromkeys(("refused", "named", "sound"), 0)
    for number in range(mutants):
        (mine / "manifest.json").write_bytes(manifest)
        data = mutate_bytes(original, rng) if number % 4 == 0 else parquet(mutate_cells(table, rng))
        if number % 8 < 6:
            replace_index(mine, data)
        else:
            (mine / name).write_bytes(data)
        ends[judge(mine, right)] += 1
    assert ends["refused"] > mutants / 2 and ends["sound"], ends


@pytest.mark.parametrize("content", ["5", '"cat"', "true", "null"])
def test_a_list_of_classes_that_is_none_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "photos" / name / "1.png")
    (tmp_path / "classes.json").write_text(content)
    arguments = ["--classes", str(tmp_path / "classes.json"), "--dry-run"]
    assert wds_train(["shards", str(tmp_path / "photos"), str(tmp_path / "out"), *arguments]) == 1
    assert "classes.json does not name the classes" in capsys.readouterr().err


def test_a_table_of_placeholders_alone_is_no_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All labels of test images are the same; there is nothing else in the folder."""
    (tmp_path / "photos" / "test").mkdir(parents=True)
    lines = ["file,label"]
    for number in range(30):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"photos/test/{number}.png")
        lines.append(f"test/{number}.png,0")
    (tmp_path / "photos" / "labels.csv").write_text("\n".join(lines))
    assert wds_train(["shards", str(tmp_path / "photos"), str(tmp_path / "out"), "--dry-run"]) != 0
    assert "is no folder of classes" in capsys.readouterr().err


def test_an_arrow_file_without_rows_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schema = pa.schema([("image", pa.binary()), ("label", pa.int64())])
    with pa.OSFile(str(tmp_path / "train.arrow"), "wb") as sink:
        pa.ipc.new_stream(sink, schema).close()
    assert wds_train(["shards", str(tmp_path), str(tmp_path.parent / "out"), "--dry-run"]) == 1
    assert "train.arrow holds no rows" in capsys.readouterr().err
