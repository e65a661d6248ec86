"""Tars as sources: read where they lie, through their headers. Nothing is unpacked, no link followed, nothing executed."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from shards.source import Source, SplitScan, choose_splits, from_scans, read_bytes, split_word, to_classes
from wds_train import manifest as manifests
from wds_train.errors import AccessDenied, DataError, UsageError
from wds_train.manifest import ClassInfo, DatasetManifest
from wds_train.tario import IMAGE_EXTENSIONS, Member, members

MAX_LABEL = 1 << 16


def tar_members(path: Path, start: int = 0, size: int | None = None) -> Iterator[Member]:
    """The members of the tar at `path`, or of the one inside it at [start, start + size)."""
    try:
        with path.open("rb", buffering=0) as file:
            end = os.fstat(file.fileno()).st_size if size is None else start + size
            yield from members(lambda offset, length: os.pread(file.fileno(), length, offset), start, end)
    except PermissionError as error:
        raise AccessDenied(f"no permission to read {path}; check its owner and mode") from error
    except (DataError, OSError) as error:
        raise DataError(f"{path} cannot be used as a tar: {error}") from error


def is_safe(found: SplitScan, origin: str, member: Member) -> bool:
    """Whether the member is a plain file with a plain name; noted when not (folders are passed over)."""
    if member.kind == "directory":
        return False
    if member.kind != "file":
        found.note(f"{origin}: {member.name}", "left out", f"a {member.kind}, not a file")
    elif member.name.startswith("/") or ".." in member.name.split("/"):
        found.note(f"{origin}: {member.name}", "left out", "its name points outside the archive")
    else:
        return True
    return False


class WdsSample:
    """Adjacent members of one key: where its image lies, and its label. `where` begins error messages."""

    def __init__(self, key: str, where: str = "") -> None:
        self.key, self.where = key, where
        self.members: dict[str, Member] = {}

    def add(self, member: Member) -> None:
        extension = member.name.removeprefix(f"{self.key}.").lower()
        if extension in self.members:
            raise DataError(f"{self.where}the sample {self.key!r} has two members {extension!r}")
        self.members[extension] = member

    @property
    def image(self) -> Member | None:
        return next((member for name, member in self.members.items() if name in IMAGE_EXTENSIONS), None)

    def label(self, read: Callable[[int, int], bytes]) -> int:
        """From `.cls`, a number in ASCII, or from `label` or `cls` of `.json`; `DataError` when there is none."""
        member = self.members.get("cls") or self.members.get("json")
        if member is None or not 0 < member.size <= MAX_LABEL:
            raise DataError("no .cls or .json member with a label")
        text = read(member.data_offset, member.size)
        try:
            content = json.loads(text)  # a bare number is JSON too
            value = content.get("label", content.get("cls")) if isinstance(content, dict) else content
        except ValueError:
            value = None
        if type(value) is not int or not 0 <= value < 1 << 31:
            raise DataError(f"its label is {text[:40]!r}, not a whole number")
        return value


def group(plain: Iterator[Member], where: str = "") -> Iterator[WdsSample]:
    """Members in a row whose names are equal up to the first dot of the base name: webdataset's rule."""
    sample: WdsSample | None = None
    for member in plain:
        folder, slash, base = member.name.rpartition("/")
        key = folder + slash + base.partition(".")[0]
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = WdsSample(key, where)
        sample.add(member)
    if sample is not None:
        yield sample


def webdataset(root: Path) -> Source:
    """Existing WebDataset tars: every .tar below the folder `root`, or the one file."""
    paths = sorted(root.rglob("*.tar")) if root.is_dir() else [root]
    if not paths or not root.exists():
        raise UsageError(f"{root} holds no .tar files")
    words = {path: split_word(path.relative_to(root if root.is_dir() else root.parent).as_posix()) for path in paths}
    chosen = choose_splits(words.values())
    scans = {split: SplitScan(split) for split in chosen.values()}
    for path, word in words.items():
        if word not in chosen:
            scans["train"].note(path, "ignored", f"the split {word!r} is not used")
            continue
        found = scans[chosen[word]]
        found.stamp.add(path.name, path.stat())
        _scan_wds(found, path)
    labels = [label for found in scans.values() for label in found.rows.table()["label"].unique().to_pylist()]
    return from_scans(f"webdataset {root.name}", wds_classes(root, max(labels, default=-1)), [*scans.values()])


def _scan_wds(found: SplitScan, path: Path) -> None:
    others: Counter[str] = Counter()

    def read(offset: int, length: int) -> bytes:
        return read_bytes(str(path), offset, length)

    plain = (member for member in tar_members(path) if is_safe(found, str(path), member))
    for sample in group(plain, f"{path}: "):
        origin = f"{path}: {sample.key}"
        others.update(name for name in sample.members if name not in (*IMAGE_EXTENSIONS, "cls", "json"))
        try:
            label, image = sample.label(read), sample.image
        except DataError as error:
            found.note(origin, "left out", str(error))
            continue
        if image is None:
            found.note(origin, "left out", "no image member")
        else:
            found.add(label, image.name, str(path), image.data_offset, image.size)
    for extension, count in others.items():
        found.note(path, "ignored", f"{count} members .{extension}")


def wds_classes(root: Path, largest: int) -> tuple[ClassInfo, ...]:
    """The classes that a manifest of ours beside the tars names, or else the labels as they are."""
    path = root / manifests.NAME
    if path.is_file():
        classes = DatasetManifest.from_json(path.read_bytes(), str(path)).classes
        if largest >= len(classes):
            raise DataError(f"{root} holds the label {largest}, {path} names {len(classes)} classes")
        return classes
    return to_classes([str(label) for label in range(largest + 1)])
