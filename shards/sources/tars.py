"""Tars as sources: read where they lie, through their headers. Nothing is unpacked, no link followed, nothing executed."""

import gzip
import json
import os
import stat
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from shards.sources.base import Source, Understood, Wanted
from shards.sources.labels import Classes, LabelRules, classes_of, label_text, read_class_list
from shards.sources.litter import is_litter
from shards.sources.names import file_splits
from shards.sources.scan import SplitScan, read_bytes
from shards.sources.splits import from_scans, label_counts, relabelled
from shards.sources.spool import Spool
from wds_train.errors import AccessDenied, DataError, UsageError
from wds_train.format import manifest as manifests
from wds_train.format.shard import IMAGE_EXTENSIONS
from wds_train.format.tar import Member, key_and_extension, members

MAX_LABEL = 1 << 16
OUTSIDE = "its name points outside the archive"
CHUNK = 1 << 20
TARS = (".tar", ".tar.gz", ".tgz")
LABELS = ("cls", "json", "label", "class", "txt")  # the members that may hold a sample's label, the first that is there
LABEL_FIELDS = ("label", "cls", "class", "class_name", "category")
CLASS_LISTS = ("classes.txt", "classes.json", "labels.txt", "class_names.txt")


def _is_folder(path: Path) -> bool:
    """Whether `path` is a folder; `DataError` for what is no file either: opening a FIFO would wait for ever."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; remove it") from error
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise DataError(f"{path} is no plain file; remove it")
    return stat.S_ISDIR(mode)


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


def outside(name: str) -> bool:
    """Whether a member of this name, unpacked by others, would not stay where it is unpacked."""
    return name.startswith("/") or ".." in name.split("/")


def is_safe(found: SplitScan, origin: str, member: Member) -> bool:
    """Whether the member is a plain file with a plain name; noted when not (folders and litter are passed over)."""
    if member.kind == "directory" or is_litter(member.name):
        return False
    if member.kind != "file":
        found.note(f"{origin}: {member.name}", "left out", f"a {member.kind}, not a file")
    elif outside(member.name):
        found.note(f"{origin}: {member.name}", "left out", OUTSIDE)
    else:
        return True
    return False


class WdsSample:
    """Members of one key: where its image lies, and its label. `members` by extension, in small letters."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.members: dict[str, Member] = {}

    @property
    def image(self) -> Member | None:
        """The member `.jpg` or its like; else one whose name ends so, as in `000.image.jpg`."""
        known = {name: member for name, member in self.members.items() if name in IMAGE_EXTENSIONS}
        known = known or {n: m for n, m in self.members.items() if n.rpartition(".")[2] in IMAGE_EXTENSIONS}
        return next(iter(known.values()), None)

    @property
    def is_none(self) -> bool:
        """Whether it is no sample at all, but a file that lies beside samples."""
        return self.image is None and not set(self.members) & {"cls", "json"}

    @property
    def labels(self) -> dict[str, Member]:
        """The members that may hold the label, by what they are called: 7.cls, 7.label.cls and 7.label.txt, too."""
        parts = {name.rpartition(".")[2]: member for name, member in self.members.items()}
        parts |= {name.partition(".")[0]: member for name, member in self.members.items() if name.startswith("label.")}
        return {name: parts[name] for name in LABELS if name in parts}

    def label(self, read: Callable[[int, int], bytes], names: Collection[str] = LABELS[:-1]) -> str:
        """The label in the first of `names` that is there: from `.json`, its field label, cls or class; `DataError` for
        none.
        """
        name, member = next(((n, m) for n, m in self.labels.items() if n in names), ("", None))
        if member is None or not member.size:
            raise DataError("no .cls or .json member with a label")
        if member.size > MAX_LABEL:
            raise DataError(f"its label member .{name} has {member.size} bytes, at most {MAX_LABEL} can be read")
        text = read(member.data_offset, member.size)
        return label_text(text if name == "txt" else _parsed(text))


def _parsed(text: bytes) -> Any:
    """What a `.cls` or `.json` says: JSON, from which the label is taken, or else the bare text."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if isinstance(content, dict):
        content = next((content[name] for name in LABEL_FIELDS if name in content), None)
    return content


def group(plain: Iterator[Member]) -> Iterator[WdsSample]:
    """Members in a row whose names are equal up to the first dot of the base name: webdataset's rule."""
    sample: WdsSample | None = None
    for member in plain:
        key, extension = key_and_extension(member.name)
        if sample is None or sample.key != key or extension in sample.members:
            if sample is not None:
                yield sample
            sample = WdsSample(key)
        sample.members[extension] = member
    if sample is not None:
        yield sample


def gather(plain: Iterator[Member]) -> Iterator[WdsSample]:
    """The samples of members that need not lie side by side, as those of `group` must; a member that a sample has
    already begins another.
    """
    samples: dict[str, list[WdsSample]] = {}
    for member in plain:
        key, extension = key_and_extension(member.name)
        known = samples.setdefault(key, [])
        sample = next((each for each in known if extension not in each.members), None)
        if sample is None:
            known.append(sample := WdsSample(key))
        sample.members[extension] = member
    yield from (sample for known in samples.values() for sample in known)


def webdataset(root: Path, spool: Spool, wanted: Wanted) -> Source:
    """Existing WebDataset tars: every .tar, .tar.gz or .tgz below the folder `root`, or the one file."""
    below = (
        sorted(path for path in root.rglob("*") if path.name.endswith(TARS) and not is_litter(path.name))
        if root.is_dir()
        else [root]
    )
    paths = [path for path in below if not _is_folder(path)]
    if not paths or not root.exists():
        raise UsageError(f"{root} holds no .tar files")
    base = root if root.is_dir() else root.parent
    names = {path.relative_to(base).as_posix(): path for path in paths}
    used, unused = file_splits([*names], wanted.splits, str(root))
    scans = {split: SplitScan(split, foreign=wanted.reencode) for split in dict.fromkeys(used.values())}
    labels: dict[str, int] = {}  # in the order in which they come
    for name, cause in unused.items():
        next(iter(scans.values())).note(names[name], "ignored", cause)
    for name, split in used.items():
        path = names[name]
        found = scans[split]
        found.stamp.add(path.name, path.stat())
        _scan_wds(found, path, spool, labels)
    counts = label_counts(scans.values(), [*labels])
    classes = wds_classes(root if root.is_dir() else root.parent, counts, wanted.labels)
    understood = Understood("WebDataset tars", "the members .cls, .json and their like", classes.said)
    source = from_scans(f"webdataset {root.name}", classes.infos, [*scans.values()], understood)
    return relabelled(source, np.array([classes.numbers[text] for text in labels], np.int32))


def _scan_wds(found: SplitScan, path: Path, spool: Spool, labels: dict[str, int]) -> None:
    others: Counter[str] = Counter()
    plain_tar = path.name.endswith(".tar")

    def read(offset: int, length: int) -> bytes:
        return read_bytes(str(place), offset, length)

    place = path if plain_tar else unpacked(path, spool)
    plain = (member for member in tar_members(place) if is_safe(found, str(path), member))
    samples = [*gather(plain)]
    # Beside any other label, a .txt is a caption.
    names = LABELS[-1:] if not any(set(sample.labels) - {*LABELS[-1:]} for sample in samples) else LABELS[:-1]
    for sample in samples:
        origin, image = f"{path}: {sample.key}", sample.image
        known = {*IMAGE_EXTENSIONS, *LABELS}
        others.update(name for name in sample.members if name.rpartition(".")[2] not in known)
        if image is None:
            if not sample.is_none:
                found.note(origin, "left out", "no image member")
            continue
        try:
            text = sample.label(read, names)
        except DataError as error:
            found.note(origin, "left out", str(error))
            continue
        label = labels.setdefault(text, len(labels))
        found.add(label, image.name, str(place), image.data_offset, image.size)
    for extension, count in others.items():
        found.note(path, "ignored", f"{count} members .{extension}")


def unpacked(path: Path, spool: Spool) -> Path:
    """The plain tar in the compressed one at `path`, in the spool; of at most the spool's size, whatever it claims."""
    target = spool.file(path.name)
    left = spool.limit - spool.bytes
    try:
        with gzip.open(path) as packed, target.open("wb") as file:
            while piece := packed.read(CHUNK):
                left -= len(piece)
                if left < 0:
                    raise UsageError(
                        f"{path} unpacks to more than the spool may hold; raise --spool-gb, or unpack it yourself"
                    )
                file.write(piece)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be unpacked: {error}; make it anew") from error
    spool.bytes = spool.limit - left
    return target


def wds_classes(root: Path, counts: Mapping[str, int], rules: LabelRules) -> Classes:
    """Find the classes of tars: those that a person, a manifest of ours or a list beside the tars names, or else what follows
    from the labels.
    """
    place = next((root / name for name in (manifests.NAME, *CLASS_LISTS) if (root / name).is_file()), None)
    if place is None or rules.classes:
        return classes_of(counts, str(root), rules)
    named = replace(rules, classes=read_class_list(place))
    found = classes_of(counts, str(root), named)
    return Classes(found.infos, found.numbers, [f"the classes are those of {place.name}", *found.said])
