"""The samples of WebDataset tars: their images and their labels.

`tars` reads the samples of a source with this, `index_in_place` those of tars on S3.
"""

import contextlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from wds_train.conversion.conversion_report import Note
from wds_train.conversion.sources.labels import NO_TEXT, ONE_LABEL, label_text
from wds_train.conversion.sources.names import FOREIGN_SUFFIXES, IMAGE_SUFFIXES, SPLIT_OF
from wds_train.dataset.shard import IMAGE_EXTENSIONS
from wds_train.dataset.tar import Member, key_and_extension
from wds_train.errors import DataError, UsageError

# Bytes; a larger member is no label, and would only cost memory.
MAX_LABEL = 1 << 16
# The members that may hold a sample's label; the first that is there does.
LABELS = ("cls", "json", "label", "class", "txt")
CAPTION = "txt"  # a label only if nothing else is one
BESIDE_CAPTIONS = LABELS[:-1]
LABEL_FIELDS = ("label", "cls", "class", "class_name", "category")  # of a .json
SPLIT_FIELDS = ("split", "subset", "partition", "usage", "set")  # of a .json, in any case
IMAGE_WORDS = {"image", "img"}  # 7.image.jpg
LABEL_WORDS = {"label", "cls", "class", "target"}  # 7.label.cls
FIELD = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
# Several numbers: "0 1", "3, 5".
SEVERAL = re.compile(r"[+-]?\d+(?:\.\d+)?(?:(?:\s*[,;|]\s*|\s+)[+-]?\d+(?:\.\d+)?)+[,;|]?")
# The same in a .txt, in which fractions are the corners of boxes, and no labels.
SEVERAL_WHOLE = re.compile(r"\d+(?:(?:\s*[,;|]\s*|\s+)\d+)+")
DECIMAL = re.compile(rb"-?[0-9]+\.[0-9]+")
Split = Callable[[str], tuple[str, str]]  # a member's name into key and extension
Read = Callable[[int, int], bytes]  # offset, length


class NoLabel(DataError):
    """A sample has no label at all.

    Args:
        message: What is missing.
        fields: The fields of its .json, none of which is a label.
    """

    def __init__(self, message: str, fields: Collection[str] = ()) -> None:
        super().__init__(message)
        self.fields = tuple(fields)


class SeveralLabels(DataError):
    """A label is a list of several: no fault of the sample, but another kind of dataset."""


class WdsSample:
    """The members of one key.

    Attributes:
        key: The key.
        members: Each member by its extension, in small letters.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self.members: dict[str, Member] = {}

    def images(self) -> list[str]:
        """Return the extensions of the members that may be the image.

        It is one, unless nothing says which of several it is.
        """
        found = []
        foreign = []  # in formats that shards do not hold
        for name in self.members:
            if kind_of(name) in IMAGE_EXTENSIONS:
                found.append(name)
            elif is_image(f".{name}"):
                foreign.append(name)
        return _choose_meant(found or foreign, IMAGE_WORDS)

    def labels(self, kind: str) -> list[str]:
        """Return the extensions of the members of a kind that may hold the label.

        Args:
            kind: `cls`, `json` or another of `LABELS`.
        """
        found = [name for name in self.members if kind_of(name) == kind]
        if kind == "label":  # 7.label.txt is no caption
            for name in self.members:
                if "label" in _prefix(name).split(".") and not is_image(f".{name}"):
                    found.append(name)
        # Prefer cls to fine.cls.
        meant = _choose_meant(found, LABEL_WORDS)
        # 7.mask.jpg with its own 7.mask.cls is no mask: its label counts, and may differ.
        return meant + [
            name for name in found if name not in meant and self._has_image(_prefix(name))
        ]

    def has_label(self, kinds: Iterable[str]) -> bool:
        """Return True if a member of one of the kinds may hold the label."""
        return any(map(self.labels, kinds))

    def _has_image(self, prefix: str) -> bool:
        return any(f"{prefix}.{kind}" in self.members for kind in IMAGE_EXTENSIONS)

    @property
    def is_stray(self) -> bool:
        """True for a file that lies next to samples, and is none."""
        return not self.images() and not set(self.members) & {"cls", "json"}

    def image(self) -> Member | None:
        """Return the member that holds the image; None if there is none.

        Raises:
            DataError: It may be one of several.
        """
        found = self.images()
        if not found:
            return None
        if len(found) > 1:
            raise DataError(
                f"it holds {len(found)} images, which share the key {self.key}: "
                f"{self._list_members(found)}; rename the one to train on to {self.key}.jpg; "
                "wds-train shards index with --any takes them as they are, for SampleLoader"
            )
        return self.members[found[0]]

    def label(self, read: Read, kinds: Collection[str] = BESIDE_CAPTIONS) -> str:
        """Return the label in the first kind of member that holds one.

        Args:
            read: Reads bytes of the tar.
            kinds: The kinds of members, in the order in which they are asked.

        Returns:
            The label; `NO_TEXT` if the members only say that there is none (null).

        Raises:
            NoLabel: There is nothing that could hold one.
            SeveralLabels: It is a list.
            DataError: It cannot be a label, or several members disagree.
        """
        missing = NoLabel("no .cls or .json member with a label")
        is_empty = False
        for kind in kinds:
            # Read the members of this kind. An empty .cls says "no label", an empty .json nothing.
            texts: dict[str, str] = {}
            for name in self.labels(kind):
                try:
                    if self.members[name].size:
                        texts[name] = self._text(name, kind, read)
                    elif kind != "json":
                        texts[name] = NO_TEXT
                except NoLabel as error:
                    missing = error

            # They must agree.
            said = set(texts.values()) - {NO_TEXT}
            if len(said) > 1:
                raise self._disagreement(texts)
            if said:
                return said.pop()
            is_empty |= bool(texts)
        if is_empty:
            return NO_TEXT
        raise missing

    def _disagreement(self, texts: Mapping[str, str]) -> DataError:
        """Return the error for members that say different labels: extension -> label."""
        shown = []
        for name, text in texts.items():
            shown.append(f"{text} in {self._list_members([name])}")
        return DataError(
            f"it holds several labels: {', '.join(shown)}; "
            f"rename the one to train on to {self.key}.cls"
        )

    def _text(self, name: str, kind: str, read: Read) -> str:
        """Return the label in a member.

        Args:
            name: Its extension.
            kind: Its kind.
            read: Reads bytes of the tar.
        """
        member = self.members[name]
        if member.size > MAX_LABEL:
            raise DataError(
                f"its label member .{name} has {member.size} bytes, at most {MAX_LABEL} can be read"
            )
        value: Any = read(member.data_offset, member.size)
        pattern = SEVERAL_WHOLE
        if kind != CAPTION:
            value = _parse_value(value, name)
            pattern = SEVERAL
        label = label_text(value)
        if pattern.fullmatch(label):
            raise _several(repr(label))
        return label

    def said_split(self, read: Read) -> tuple[str, str]:
        """Return the field of the .json with a split's name, and its value; empty without one."""
        # It is optional: a .json that cannot be read says nothing here.
        member = self.members.get("json")
        content = None
        if member is not None and 0 < member.size <= MAX_LABEL:
            with contextlib.suppress(ValueError, RecursionError):
                content = json.loads(read(member.data_offset, member.size))
        if isinstance(content, dict):
            for name, value in content.items():
                if name.lower() in SPLIT_FIELDS and isinstance(value, str) and value.strip():
                    return name, value.strip()
        return "", ""

    def others(self, kind: str, read: Read) -> dict[str, str]:
        """Return the labels in members of a kind that are not used.

        Another member is plainly meant, as `cls` is next to `fine.cls`.

        Args:
            kind: The kind.
            read: Reads bytes of the tar.

        Returns:
            The label by the member's extension.
        """
        used = self.labels(kind)
        found: dict[str, str] = {}
        for name in self.members:
            if kind_of(name) == kind and name not in used:
                with contextlib.suppress(DataError):
                    found[name] = self._text(name, kind, read)
        return found

    def _list_members(self, extensions: Iterable[str]) -> str:
        return shorten([self.members[name].name for name in extensions], 4)


class Labels:
    """Reads the labels of a source's samples, and remembers what is odd about them."""

    def __init__(self) -> None:
        self._asked = 0
        self._missing = 0
        self._fields: tuple[str, ...] = ()
        self._captions = False
        self._folders: set[str] = set()
        self._two = ""  # a sentence about the first sample that says two labels
        self._unread = ""  # a sentence about the first sample with an unknown split

    def label(self, sample: WdsSample, read: Read, kinds: Collection[str] = BESIDE_CAPTIONS) -> str:
        """Return the label of a sample; see `WdsSample.label`."""
        self._asked += 1
        try:
            text = sample.label(read, kinds)
        except NoLabel as error:
            # Keep what `refuse` says, should none of the samples have a label.
            self._missing += 1
            self._fields = self._fields or error.fields
            self._captions |= bool(sample.labels(CAPTION))
            self._folders |= {sample.key.rpartition("/")[0]} - {"", "."}
            raise
        if not self._two:
            there = [kind for kind in kinds if sample.labels(kind)]
            self._two = _describe_second(sample, there, read, text)
        return text

    def check_split(self, origin: str, sample: WdsSample, read: Read, split: str) -> None:
        """Compare the split in a sample's .json with that of its tar.

        Args:
            origin: The sample, for the message.
            sample: The sample.
            read: Reads bytes of the tar.
            split: The split of the tar.

        Raises:
            UsageError: They differ.
        """
        # A wrong split would mix test images into training.
        field, word = sample.said_split(read)
        said = SPLIT_OF.get(word.lower())
        if said is None:
            if field and not self._unread:
                self._unread = (
                    f"the field {field} of the .json members, {word!r} in {sample.key}, is not read"
                )
        elif said != split:
            raise UsageError(
                f"{origin}: its .json says {field} {word!r}, and its tar is read as {split}; "
                "make a tar of each split, called train.tar, val.tar and test.tar, "
                "or take the field out"
            )

    def remark(self) -> str:
        """Return a sentence about the labels of all samples; empty for nothing unusual."""
        return "; ".join(filter(None, (self._two, self._unread)))

    def refuse(self, where: str, tars: int) -> None:
        """Raise `DataError` if none of all samples has a label.

        Args:
            where: The source, for the message.
            tars: The number of its tars.
        """
        if not self._asked or self._missing < self._asked:
            return
        # Say what the samples have instead.
        seen = "there is no .cls or .json member with one"
        if self._fields:
            seen = (
                f"the .json members have the fields {shorten(self._fields, 8)}, "
                f"and none of {', '.join(LABEL_FIELDS)}"
            )
        if self._captions:
            seen += "; the .txt beside an image is its caption"
        # The class may be in the names of folders or tars.
        if len(self._folders) > 1:
            seen += (
                f"; if the folders {shorten(sorted(self._folders), 4)} are the classes, "
                "unpack the tars, and give the folder to wds-train shards"
            )
        elif tars > 1 and not self._fields and not self._captions:
            seen += (
                "; if each tar is a class, unpack each into a folder of its name, "
                "and convert the folder around these"
            )
        raise DataError(
            f"{where}: none of {self._asked:,} samples has a label: {seen}; {how_to_label(where)}"
        )


def shorten(names: Sequence[str], most: int) -> str:
    """Return names for a message.

    Args:
        names: The names.
        most: The number of names that are shown; dots stand for the others.
    """
    shown = ", ".join(names[:most])
    if len(names) > most:
        shown += ", ..."
    return shown


def _describe_second(sample: WdsSample, kinds: Sequence[str], read: Read, text: str) -> str:
    """Return a sentence about a sample with another label besides the one that is used.

    Args:
        sample: The sample.
        kinds: The kinds of members that may hold its label.
        read: Reads bytes of the tar.
        text: The label that is used.

    Returns:
        The sentence; empty if there is no other label.
    """
    for kind in kinds:
        for name, other in sample.others(kind, read).items():
            if other not in (NO_TEXT, text):
                return (
                    f"samples have two labels: {sample.key} is {text}, "
                    f"and {other} by its .{name}, which is not read"
                )
        if len(kinds) == 1:
            continue  # the label was read from it
        try:
            other = sample.label(read, (kind,))
        except DataError:
            continue
        if other not in (NO_TEXT, text):
            return (
                f"samples have two labels: {sample.key} is {text}, and {other} by its .{kind}; "
                f"of {', '.join(LABELS)} the first that is there is used"
            )
    return ""


def without_label(split: str, origin: str, error: NoLabel) -> Note:
    """Return the note on a sample without a label, which is usual for test images.

    Args:
        split: The sample's split.
        origin: The sample.
        error: What is missing.
    """
    if split == "test":
        return Note(split, origin, "ignored", "a test image without a label")
    return Note(split, origin, "left out", str(error))


def how_to_label(where: str) -> str:
    """Return the remedy for samples without labels at `where`, as a part of a sentence."""
    return (
        "write the label of each into a member KEY.cls, or into the field label of KEY.json; "
        "or take the samples as they are, for SampleLoader: "
        f"wds-train shards index {where} --any"
    )


def kind_of(extension: str) -> str:
    """Return the kind of a member: the `cls` of `label.cls`."""
    return extension.rpartition(".")[2]


def _prefix(extension: str) -> str:
    """Return the name of a member's field: the `seg` of seg.png."""
    return extension.rpartition(".")[0]


def is_image(name: str) -> bool:
    """Return True if a member of this name is an image, of whatever format."""
    return name.lower().endswith(IMAGE_SUFFIXES + FOREIGN_SUFFIXES)


def is_field(prefix: str) -> bool:
    """Return True for a name that people give a field: the `seg` of seg.png, not 0 of cat.0.jpg."""
    return all(map(FIELD.fullmatch, prefix.split(".")))


def _choose_meant(extensions: Iterable[str], words: set[str]) -> list[str]:
    """Choose the members that may be meant by their names.

    It is the plain one (jpg); else those that `words` name (image.jpg); else all. A prefix that is
    no field's name (0.jpg) may belong to the key: such a member is chosen, too.

    Args:
        extensions: The members of one kind.
        words: Names of the field that is meant.
    """
    names = list(dict.fromkeys(extensions))
    plain = []
    named = []
    odd = []
    for name in names:
        prefix = _prefix(name)
        if not prefix:
            plain.append(name)
            continue
        if not words.isdisjoint(prefix.split(".")):
            named.append(name)
        if not is_field(prefix):
            odd.append(name)
    best = plain or named
    if not best:
        return names
    return best + [name for name in odd if name not in best]


def _parse_value(text: bytes, name: str) -> Any:
    """Return the value in a `.cls` or `.json`.

    Args:
        text: Its content: JSON that holds the label, or else the bare text.
        name: Its extension.

    Raises:
        NoLabel: It is an object without a field for the label.
        SeveralLabels: It is a list of several.
        DataError: It is no JSON.
    """
    try:
        content = json.loads(text)
    except RecursionError:
        return text  # longer than a label may be
    except ValueError as error:
        if name.endswith("json") or text.lstrip()[:1] == b"{":
            raise DataError(f"its .{name} is no JSON: {str(error)[:100]}") from error
        return text
    if isinstance(content, float) and not DECIMAL.fullmatch(text.strip()):
        return text  # 1e5 and NaN may be names
    if isinstance(content, dict):
        content = _label_field(content, name)
    # A list of one label is that label.
    if isinstance(content, list) and len(content) == 1:
        content = content[0]
    if isinstance(content, list) and len(content) > 1:
        raise _several(json.dumps(content))
    return content


def _label_field(content: dict[str, Any], name: str) -> Any:
    """Return the field of a .json that holds the label.

    Args:
        content: The .json.
        name: Its extension.

    Raises:
        NoLabel: It has none.
    """
    for field in LABEL_FIELDS:
        if field in content:
            return content[field]
    raise NoLabel(f"its .{name} has none of the fields {', '.join(LABEL_FIELDS)}", list(content))


def _several(shown: str) -> SeveralLabels:
    """Return the error for a label that holds several."""
    if len(shown) > 60:
        shown = f"{shown[:57]}..."
    return SeveralLabels(
        f"its label is {shown}, which are several; {ONE_LABEL}: write it to KEY.cls; "
        "wds-train shards index with --any takes the samples as they are, for SampleLoader"
    )


def group(plain: Iterable[Member], split: Split = key_and_extension) -> Iterator[WdsSample]:
    """Yield the samples of neighbouring members that share a key, as stock webdataset does.

    Args:
        plain: The members, in the order of the tar.
        split: Splits a member's name into key and extension.
    """
    sample: WdsSample | None = None
    for member in plain:
        key, extension = split(member.name)
        # A second member of one name begins another sample.
        if sample is None or sample.key != key or extension in sample.members:
            if sample is not None:
                yield sample
            sample = WdsSample(key)
        sample.members[extension] = member
    if sample is not None:
        yield sample


def gather(plain: Iterable[Member], split: Split = key_and_extension) -> list[WdsSample]:
    """Return the samples of members that need not be neighbours, unlike those of `group`.

    Args:
        plain: The members. A second one of the same name begins another sample.
        split: Splits a member's name into key and extension.
    """
    samples: dict[str, list[WdsSample]] = {}
    for member in plain:
        key, extension = split(member.name)
        same_key = samples.setdefault(key, [])
        sample = _find_without(extension, same_key)
        if sample is None:
            sample = WdsSample(key)
            same_key.append(sample)
        sample.members[extension] = member
    return list(chain.from_iterable(samples.values()))


def _find_without(extension: str, samples: Iterable[WdsSample]) -> WdsSample | None:
    """Return the first sample that has no member of this extension; None if all have."""
    for sample in samples:
        if extension not in sample.members:
            return sample
    return None
