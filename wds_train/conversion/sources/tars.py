"""Read tars as sources, where they lie, through their headers.

Nothing is unpacked, no link is followed, nothing is executed.
"""

import gzip
import os
import re
import stat
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from wds_train.console import readable
from wds_train.conversion.conversion_report import Note
from wds_train.conversion.sources.imagefolder import folder_source
from wds_train.conversion.sources.labels import (
    CAPTIONS,
    MISSING_BESIDE_NUMBERS,
    NO_TEXT,
    NUMBER,
    WHOLE,
    Classes,
    LabelRules,
    classes_of,
    read_class_list,
)
from wds_train.conversion.sources.layout import read_layout
from wds_train.conversion.sources.litter import is_litter
from wds_train.conversion.sources.names import SPLIT_FOLDER, SPLIT_OF, file_splits
from wds_train.conversion.sources.scan import SplitScan, Stamp, read_bytes
from wds_train.conversion.sources.source import Source, Understood, Wanted
from wds_train.conversion.sources.splits import from_scans, label_counts, relabel
from wds_train.conversion.sources.spool import Spool
from wds_train.conversion.sources.tar_keys import Keys
from wds_train.conversion.sources.tar_lists import refuse_lists
from wds_train.conversion.sources.tar_samples import (
    BESIDE_CAPTIONS,
    CAPTION,
    LABELS,
    Labels,
    NoLabel,
    SeveralLabels,
    WdsSample,
    gather,
    how_to_label,
    is_image,
    kind_of,
    shorten,
    without_label,
)
from wds_train.conversion.sources.tree import TarFile, TarFiles
from wds_train.dataset import manifest as manifests
from wds_train.dataset.tar import Member, key_and_extension, members
from wds_train.errors import AccessDenied, DataError, UsageError

OUTSIDE = "its name points outside the archive"
CHUNK = 1 << 20  # bytes that are unpacked at once
TARS = (".tar", ".tar.gz", ".tgz")  # in any case
# Archives that are not read: other compressions, other formats, and the pieces of a cut archive.
ARCHIVE = re.compile(
    r".+\.(?:tar\.(?:xz|bz2?|zstd?|lz4?|lzma|lzo|br|sz|z|7z)|t(?:xz|bz2?|b2|zst|lz|az)|zip|7z|rar"
    r"|(?:tar|tgz|zip|7z|tar\.\w+)\.(?:part)?[-_]?(?:\d+|[a-z]{2})|z\d\d)",
    re.IGNORECASE,
)
# The remedy for archives, as a part of a sentence.
UNPACK = "unpack each to a plain .tar, or move it away"
SENTENCE = 4  # captions: half of the texts have so many words or more
# Files with the classes in their order, next to tars; the first that is there is read.
CLASS_LISTS = ("classes.txt", "classes.json", "labels.txt", "class_names.txt")


def _is_folder(path: Path) -> bool:
    """Return whether `path` is a folder.

    Raises:
        DataError: It is no plain file either: opening a FIFO would wait for ever.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; remove it") from error
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise DataError(f"{path} is no plain file; remove it")
    return stat.S_ISDIR(mode)


def is_tar(name: str) -> bool:
    """Return whether a file of this name is a tar that can be read, plain or gzip-compressed."""
    return name.lower().endswith(TARS)


def refuse_archives(names: Iterable[str], where: str) -> None:
    """Raise `DataError` for archives that cannot be read among the files of a source.

    Their samples would be missing in silence.

    Args:
        names: The paths of all files of the source, or the one file that is the source.
        where: The source, for the message.
    """
    found = []
    for name in names:
        if ARCHIVE.fullmatch(name) and not is_tar(name) and not is_litter(name):
            found.append(name)
    if found:
        shown = shorten(sorted(found), 4)
        raise DataError(f"{where} holds {shown}, which cannot be read as it is; {UNPACK}")


def refuse_archives_below(root: Path, paths: Iterable[Path]) -> None:
    """Raise `DataError` for archives that cannot be read among files in the folder `root`."""
    refuse_archives((path.relative_to(root).as_posix() for path in paths), str(root))


def tar_members(path: Path, start: int = 0, size: int | None = None) -> Iterator[Member]:
    """Yield the members of a tar.

    Args:
        path: The file.
        start: Where the tar begins in it, for one inside another.
        size: The tar's bytes; None for all up to the end of the file.

    Raises:
        AccessDenied: It may not be read.
        DataError: It is no tar, or damaged.
    """
    try:
        with path.open("rb", buffering=0) as file:
            end = os.fstat(file.fileno()).st_size
            if size is not None:
                end = start + size

            def read(offset: int, length: int) -> bytes:
                return os.pread(file.fileno(), length, offset)

            yield from members(read, start, end)
    except PermissionError as error:
        raise AccessDenied(f"no permission to read {path}; check its owner and mode") from error
    except (DataError, OSError) as error:
        raise DataError(f"{path} cannot be used as a tar: {error}") from error


def outside(name: str) -> bool:
    """Return whether a member of this name would leave the folder that it is unpacked to."""
    return name.startswith("/") or ".." in name.split("/")


def is_safe(found: SplitScan, origin: str, member: Member) -> bool:
    """Return whether the member is a plain file with a safe name.

    Others are noted in `found`, except folders and litter.
    """
    if member.kind == "directory" or is_litter(member.name):
        return False
    if member.kind != "file":
        found.note(f"{origin}: {member.name}", "left out", f"a {member.kind}, not a file")
    elif outside(member.name):
        found.note(f"{origin}: {member.name}", "left out", OUTSIDE)
    else:
        return True
    return False


def folder_files(tars: Mapping[Path, Path]) -> tuple[dict[Path, list[TarFile]], list[Note]]:
    """List the files of tars that hold folders of images, as `tar cf data.tar CLASSES/` makes them.

    Args:
        tars: The tars, and where each lies as a plain one.

    Returns:
        The files of each tar, none where the tars hold labels or no folders of images; and notes on
        members that are no files.
    """
    files: dict[Path, list[TarFile]] = {}
    has_folders = False
    found = SplitScan("train")
    for tar, plain in tars.items():
        files[tar] = []
        kinds: dict[str, set[str]] = {}  # of the members of each key
        for member in tar_members(plain):
            if not is_safe(found, str(tar), member):
                continue
            key, extension = key_and_extension(member.name)
            kind = kind_of(extension)
            if is_image(member.name):
                kind = "image"
                has_folders |= "/" in member.name.removeprefix("./")
            of_key = kinds.setdefault(key, set())
            of_key.add(kind)
            if "image" in of_key and not of_key.isdisjoint(LABELS):
                return {}, []  # a sample of WebDataset
            files[tar].append(TarFile(member.name, str(plain), member.data_offset, member.size))
    if not has_folders:
        return {}, []
    return files, found.notes


def open_tars(root: Path, spool: Spool, wanted: Wanted) -> Source:
    """Open existing tars, which are WebDataset's, or hold folders of images.

    Args:
        root: A folder, for every .tar, .tar.gz or .tgz below it, in any case; or one file.
        spool: Where compressed tars are unpacked.
        wanted: The flags.

    Raises:
        UsageError: There are no tars, or flags do not fit them.
        DataError: The tars cannot be used.
    """
    # Find the tars, and their splits.
    paths = _find_tars(root)
    if not paths or not root.exists():
        raise UsageError(f"{root} holds no .tar files")
    base = _folder_of(root)
    names = {path.relative_to(base).as_posix(): path for path in paths}
    used, unused = file_splits(list(names), wanted.splits, str(root))
    splits = {}
    tars = {}
    for name, split in used.items():
        path = names[name]
        splits[path] = split
        tars[path] = path
        if not path.name.lower().endswith(".tar"):
            tars[path] = unpack_gzip(path, spool)
    ignored = {}
    for name, cause in unused.items():
        ignored[names[name]] = cause

    # Read what they hold.
    files, notes = folder_files(tars)
    if not files:
        return _samples(root, tars, splits, ignored, wanted)
    source = _class_folders(root, files, splits, wanted)
    for path, cause in ignored.items():
        notes.append(Note("train", readable(str(path)), "ignored", cause))
    return replace(source, notes=[*source.notes, *notes])


def _folder_of(root: Path) -> Path:
    """Return the folder of a source that is a folder or a file."""
    if root.is_dir():
        return root
    return root.parent


def _find_tars(root: Path) -> list[Path]:
    """Return the tars in a folder, sorted by path, or the one that `root` is.

    Raises:
        DataError: There are archives that cannot be read, or `root` is no plain file.
    """
    if not root.is_dir():
        return [] if _is_folder(root) else [root]
    below = sorted(root.rglob("*"))
    refuse_archives_below(root, below)
    tars = []
    for path in below:
        if is_tar(path.name) and not is_litter(path.name) and not _is_folder(path):
            tars.append(path)
    return tars


def _samples(
    root: Path,
    tars: Mapping[Path, Path],
    splits: Mapping[Path, str],
    ignored: Mapping[Path, str],
    wanted: Wanted,
) -> Source:
    """Return the source of WebDataset tars.

    Args:
        root: The source.
        tars: The tars, and where each lies as a plain one.
        splits: The split of each.
        ignored: Tars that are not used, and why.
        wanted: The flags.
    """
    if wanted.class_level:
        raise UsageError(
            f"{root} holds labelled samples, and --class-level is of class folders; leave it out"
        )

    # Scan them.
    scans = {}
    for split in dict.fromkeys(splits.values()):
        scans[split] = SplitScan(split, foreign=wanted.reencode)
    first = next(iter(scans.values()))
    for path, cause in ignored.items():
        first.note(path, "ignored", cause)
    scan = _TarScan(root, tars)
    for path, split in splits.items():
        scan.add(path, scans[split])
    scan.check_labels()

    # Number the classes.
    counts = label_counts(scans.values(), [*scan.labels])
    # A single class is no error yet if samples are unreadable: these may be the other classes, and
    # are reported first.
    left_out = False
    for found in scans.values():
        for note in found.notes:
            left_out |= note.what == "left out"
    classes = wds_classes(_folder_of(root), counts, wanted.labels, one=left_out)
    remarks = scan.remarks()
    for sentence in remarks:
        first.note(root, "kept", sentence)
    understood = Understood("WebDataset tars", scan.origin, [*classes.said, *remarks])
    source = from_scans(f"webdataset {root.name}", classes.infos, [*scans.values()], understood)
    numbers = list(map(classes.numbers.__getitem__, scan.labels))
    return relabel(source, np.array(numbers, np.int32))


def _class_folders(
    root: Path, files: Mapping[Path, list[TarFile]], splits: Mapping[Path, str], wanted: Wanted
) -> Source:
    """Return the source of tars with class folders, which are read like folders on a disk.

    Args:
        root: The source.
        files: The files of each tar.
        splits: The split of each tar.
        wanted: The flags.
    """
    refuse_lists(root, files)
    several = len(set(splits.values())) > 1
    together = []
    stamp = Stamp()
    for tar, of_tar in files.items():
        stamp.add(tar.name, tar.stat())
        # train.tar and val.tar may each have the same folders of classes.
        prefix = ""
        if several:
            prefix = f"{splits[tar]}/"
        for file in of_tar:
            together.append(replace(file, name=prefix + file.name.removeprefix("./")))
    found = TarFiles(together)
    source = folder_source(read_layout(found.tree(root.name), wanted), root.name, found, wanted)
    return replace(source, stamp=source.stamp + stamp.hexdigest())


def refuse_split_folders(tar: str, samples: Sequence[WdsSample], split: str) -> None:
    """Raise `DataError` for samples that lie in folders of other splits than their tar.

    Args:
        tar: The tar, for the message.
        samples: Its samples.
        split: Its split.
    """
    named = {}
    for sample in samples:
        for folder in sample.key.split("/")[:-1]:
            found = SPLIT_FOLDER.fullmatch(folder)
            if found:
                named[folder] = SPLIT_OF[found[1].lower()]
    if set(named.values()) - {split}:
        raise DataError(
            f"{tar} holds samples in the folders {', '.join(sorted(named))}, "
            f"which are called as splits are, and would all be {split}; "
            "make a tar of each split, called train.tar, val.tar and test.tar"
        )


class _TarScan:
    """Scans the tars of a source, one after the other, with what they have in common.

    Args:
        root: The source.
        places: The tars, and where each lies as a plain one.

    Attributes:
        labels: The labels' texts in the order in which they come, with their numbers.
    """

    def __init__(self, root: Path, places: Mapping[Path, Path]) -> None:
        self.labels: dict[str, int] = {}
        self._root = root
        self._places = places
        self._keys = Keys()
        self._asked = Labels()
        self._texts: Counter[str] = Counter()  # of .txt members that are labels
        # By CAPTION the first tar with labels in .txt members, by "others" the first with others.
        self._tar_of: dict[str, Path] = {}

    def add(self, path: Path, found: SplitScan) -> None:
        """Add the samples in the tar at `path` to those `found`."""
        # Read the members, and decide which are labels, and where keys end.
        found.stamp.add(path.name, path.stat())
        place = self._places[path]
        plain = [member for member in tar_members(place) if is_safe(found, str(path), member)]
        samples = gather(plain)
        kinds = self._kinds(path, samples)
        split = self._keys.choose(str(path), plain, kinds)
        if split is not key_and_extension:
            samples = gather(plain, split)
        refuse_split_folders(str(path), samples, found.split)

        # Add the samples, and note the members that are no part of them.
        others: Counter[str] = Counter()
        for sample in samples:
            image = self._add_sample(sample, path, found, kinds)
            others.update(_beside(sample, image))
        for extension, count in others.items():
            found.note(path, "ignored", f"{count} members .{extension}")

    def _add_sample(
        self, sample: WdsSample, path: Path, found: SplitScan, kinds: Collection[str]
    ) -> Member | None:
        """Add the sample, or note why not; return its image if it was added."""
        place = str(self._places[path])
        read = partial(read_bytes, place)
        origin = f"{path}: {sample.key}"
        if not sample.images():
            if not sample.is_stray:
                found.note(origin, "left out", "no image member")
            return None
        try:
            text = self._asked.label(sample, read, kinds)
            self._asked.check_split(origin, sample, read, found.split)
            image = sample.image()
        except SeveralLabels as error:
            # Another kind of dataset: no sample of it can be used.
            raise DataError(f"{origin}: {error}") from error
        except NoLabel as error:
            found.notes.append(without_label(found.split, readable(origin), error))
            return None
        except DataError as error:
            # A fault of this sample alone.
            found.note(origin, "left out", str(error))
            return None
        assert image is not None, "it has one"
        if CAPTION in kinds:
            self._texts[text] += 1
        label = self.labels.setdefault(text, len(self.labels))
        found.add(label, image.name, place, image.data_offset, image.size)
        return image

    def _kinds(self, path: Path, samples: Sequence[WdsSample]) -> Collection[str]:
        """Return the kinds of members of a tar that may hold labels.

        If there is any other label, in any of the tars, a .txt is a caption.
        """
        # A sample without an image is left out: its label decides nothing.
        with_image = [sample for sample in samples if sample.images()]
        if _have_label(with_image, BESIDE_CAPTIONS):
            self._tar_of.setdefault("others", path)
        elif _have_label(with_image, (CAPTION,)):
            self._tar_of.setdefault(CAPTION, path)
            if "others" not in self._tar_of:
                return (CAPTION,)
        if len(self._tar_of) > 1 and self._tar_of["others"] == path:
            raise DataError(
                f"{self._tar_of[CAPTION]} has labels in .txt members alone, {path} in others, "
                "beside which a .txt is a caption; "
                "make a dataset of each, or add a .cls to every sample"
            )
        return BESIDE_CAPTIONS

    @property
    def origin(self) -> str:
        """The place that the labels come from, in words."""
        if CAPTION in self._tar_of and "others" not in self._tar_of:
            return "the .txt members, beside which there is nothing else that holds one"
        return "the members .cls, .json and their like"

    def remarks(self) -> list[str]:
        """Return remarks on how keys and labels were read, a sentence each."""
        return list(filter(None, (self._keys.remark(), self._asked.remark())))

    def check_labels(self) -> None:
        """Raise `DataError` if there are no labels, or the .txt members hold captions."""
        self._asked.refuse(str(self._root), len(self._places))
        if not self._texts:
            return
        # Captions differ from sample to sample, and are sentences.
        words = sorted(len(text.split()) for text in self._texts)
        many = len(words) > CAPTIONS * self._texts.total()
        if many and words[len(words) // 2] >= SENTENCE:
            shortest = min(self._texts, key=len)
            raise DataError(
                f"{self._root} has a .txt for each sample and no other label, such as "
                f"{shortest!r}: these are captions; {how_to_label(str(self._root))}"
            )


def _have_label(samples: Iterable[WdsSample], kinds: Collection[str]) -> bool:
    """Return True if a sample has a member of one of the kinds, which may hold a label."""
    return any(sample.has_label(kinds) for sample in samples)


def _beside(sample: WdsSample, image: Member | None) -> list[str]:
    """Return the extensions of members that are neither the image nor may be the label.

    Args:
        sample: A sample.
        image: Its image; None where the sample was left out.
    """
    extensions = []
    for extension, member in sample.members.items():
        if kind_of(extension) in LABELS:
            continue
        used = member == image
        if image is None:
            used = is_image(f".{extension}")
        if not used:
            extensions.append(extension)
    return extensions


def unpack_gzip(path: Path, spool: Spool) -> Path:
    """Unpack a compressed tar into the spool.

    Args:
        path: The tar.
        spool: Where it goes.

    Returns:
        The plain tar.

    Raises:
        UsageError: It is larger than the spool may be.
        DataError: It is damaged.
    """
    target = spool.file(path.name)
    left = spool.limit - spool.bytes
    try:
        with gzip.open(path) as packed, target.open("wb") as file:
            # At most the spool's size is written, whatever size the file claims.
            while piece := packed.read(CHUNK):
                left -= len(piece)
                if left < 0:
                    raise UsageError(
                        f"{path} unpacks to more than the spool may hold; "
                        "raise --spool-gb, or unpack it yourself"
                    )
                file.write(piece)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be unpacked: {error}; make it again") from error
    spool.bytes = spool.limit - left
    return target


def wds_classes(
    root: Path, counts: Mapping[str, int], rules: LabelRules, *, one: bool = False
) -> Classes:
    """Find the classes of tars.

    They are those that a person names, or a manifest of ours or a list in the folder; if there is
    none of these, those of the labels.

    Args:
        root: The folder of the tars.
        counts: Each label, and how often it occurs.
        rules: The flags about labels.
        one: A single class is no error.
    """
    if not rules.classes:
        for name in (manifests.NAME, *CLASS_LISTS):
            if (root / name).is_file():
                listed = replace(rules, classes=read_class_list(root / name))
                return tar_classes(counts, str(root), listed, name, one=one)
    return tar_classes(counts, str(root), rules, one=one)


def tar_classes(
    counts: Mapping[str, int], where: str, rules: LabelRules, listed: str = "", *, one: bool = False
) -> Classes:
    """Find the classes of labels in tars.

    Args:
        counts: Each text that occurs, and how often.
        where: The tars, for messages.
        rules: The flags about labels, with the list of classes that lies with the tars.
        listed: The name of that list.
        one: A single class is no error.

    Raises:
        UsageError: The labels are measurements, or longer numbers than can be read.
        DataError: There is one class.
    """
    # Fractions, and numbers of over 19 digits, are no classes.
    missing = MISSING_BESIDE_NUMBERS | {NO_TEXT} | rules.none
    texts = []
    odd = []
    for text in sorted(counts):
        if text.casefold() not in missing:
            texts.append(text)
            if not WHOLE.fullmatch(text):
                odd.append(text)
    if odd and all(map(NUMBER.fullmatch, texts)) and not rules.classes:
        raise UsageError(
            f"{where} holds the label {odd[0]}, which is no whole number of up to 19 digits: "
            "a measurement is no class. Write the class's name or number into each label member, "
            "or list the values with --classes FILE, one a line"
        )
    found = classes_of(counts, where, rules)
    if len(found.infos) == 1 and not one:
        raise DataError(
            f"the tars of {where} know one label, {found.infos[0].id!r}: "
            "there is nothing to tell apart"
        )
    said = list(found.said)
    if listed:
        said.insert(0, f"the classes are those of {listed}")
    return Classes(found.infos, found.numbers, said)
