"""The samples of WebDataset tars: which member is the image, and what the label says."""

import contextlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

from wds_train.conversion.conversion_report import Note
from wds_train.conversion.sources.labels import NO_TEXT, ONE_LABEL, label_text
from wds_train.conversion.sources.names import FOREIGN_SUFFIXES, IMAGE_SUFFIXES, SPLIT_OF
from wds_train.dataset.shard import IMAGE_EXTENSIONS
from wds_train.dataset.tar import Member, key_and_extension
from wds_train.errors import DataError, UsageError

MAX_LABEL = 1 << 16  # bytes
LABELS = (
    "cls",
    "json",
    "label",
    "class",
    "txt",
)  # the members that may hold a sample's label, the first that is there
CAPTION = "txt"  # a label only where nothing else is one
BESIDE_CAPTIONS = LABELS[:-1]
LABEL_FIELDS = ("label", "cls", "class", "class_name", "category")  # of a .json
SPLIT_FIELDS = ("split", "subset", "partition", "usage", "set")  # of a .json, in any case
IMAGE_WORDS = {"image", "img"}  # 7.image.jpg
LABEL_WORDS = {"label", "cls", "class", "target"}  # 7.label.cls
FIELD = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
SEVERAL = re.compile(
    r"[+-]?\d+(?:\.\d+)?(?:(?:\s*[,;|]\s*|\s+)[+-]?\d+(?:\.\d+)?)+[,;|]?"
)  # 0 1; 3, 5
SEVERAL_WHOLE = re.compile(
    r"\d+(?:(?:\s*[,;|]\s*|\s+)\d+)+"
)  # in a .txt, where fractions are the corners of boxes
DECIMAL = re.compile(rb"-?[0-9]+\.[0-9]+")
Split = Callable[[str], tuple[str, str]]  # a member's name into key and extension
Read = Callable[[int, int], bytes]  # offset, length


class NoLabel(DataError):
    """A sample has no label at all. `fields` are those that its .json has in the place of one."""

    def __init__(self, message: str, fields: Collection[str] = ()) -> None:
        super().__init__(message)
        self.fields = tuple(fields)


class SeveralLabels(DataError):
    """A label is a list of several: no fault of the sample, but another kind of dataset."""


class WdsSample:
    """Members of one key: where its image lies, and its label. `members` by extension, in small letters."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.members: dict[str, Member] = {}

    def images(self) -> list[str]:
        """The extensions of the members that may be the image: one, but where nothing says which of several it is."""
        found = [name for name in self.members if kind_of(name) in IMAGE_EXTENSIONS]
        found = found or [
            name for name in self.members if is_image(f".{name}")
        ]  # in a format that shards do not hold
        return _meant(found, IMAGE_WORDS)

    def labels(self, kind: str) -> list[str]:
        """The extensions of the members of this kind (cls, json ...) that may hold the label."""
        found = [name for name in self.members if kind_of(name) == kind]
        if kind == "label":  # 7.label.txt is no caption
            found += [
                name
                for name in self.members
                if "label" in _prefix(name).split(".") and not is_image(f".{name}")
            ]
        meant = _meant(found, LABEL_WORDS)
        # 7.mask.jpg with a 7.mask.cls of its own is no mask: its label counts, and may differ.
        other = [name for name in found if name not in meant and self._has_image(_prefix(name))]
        return meant + other

    def _has_image(self, prefix: str) -> bool:
        return any(f"{prefix}.{kind}" in self.members for kind in IMAGE_EXTENSIONS)

    @property
    def is_none(self) -> bool:
        """Whether it is no sample at all, but a file that lies beside samples."""
        return not self.images() and not set(self.members) & {"cls", "json"}

    def image(self) -> Member | None:
        """The member that holds the image, None where there is none; `DataError` where it may be one of several."""
        found = self.images()
        if len(found) > 1:
            raise DataError(
                f"it holds {len(found)} images, which share the key {self.key}: {self._named(found)}; rename the one to train on to {self.key}.jpg; "
                "wds-train shards index with --any takes them as they are, for SampleLoader"
            )
        return self.members[found[0]] if found else None

    def label(self, read: Read, kinds: Collection[str] = BESIDE_CAPTIONS) -> str:
        """The label in the first of `kinds` that holds one; `NO_TEXT` where they only say that there is none (null).

        Raises:
            NoLabel: there is nothing that could hold one.
            SeveralLabels: it is a list.
            DataError: it cannot be a label, or several members disagree.
        """
        missing = NoLabel("no .cls or .json member with a label")
        is_empty = False
        for kind in kinds:
            texts: dict[str, str] = {}
            for name in self.labels(kind):
                try:
                    if self.members[name].size:
                        texts[name] = self._text(name, kind, read)
                    elif kind != "json":
                        texts[name] = NO_TEXT
                except NoLabel as error:
                    missing = error
            said = set(texts.values()) - {NO_TEXT}
            if len(said) > 1:
                told = ", ".join(f"{text} in {self._named([name])}" for name, text in texts.items())
                raise DataError(
                    f"it holds several labels: {told}; rename the one to train on to {self.key}.cls"
                )
            if said:
                return said.pop()
            is_empty |= bool(texts)
        if is_empty:
            return NO_TEXT
        raise missing

    def _text(self, name: str, kind: str, read: Read) -> str:
        member = self.members[name]
        if member.size > MAX_LABEL:
            raise DataError(
                f"its label member .{name} has {member.size} bytes, at most {MAX_LABEL} can be read"
            )
        text = read(member.data_offset, member.size)
        label = label_text(text if kind == CAPTION else _value(text, name))
        pattern = SEVERAL_WHOLE if kind == CAPTION else SEVERAL
        if pattern.fullmatch(label):
            raise _several(repr(label))
        return label

    def said_split(self, read: Read) -> tuple[str, str]:
        """The field of the .json that is called as splits are, and what it says; two empty texts where there is none."""
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
        """The labels in members of this kind that are not looked at, because another member is plainly meant: the
        `fine.cls` beside `cls`.
        """
        asked = self.labels(kind)
        found: dict[str, str] = {}
        for name in self.members:
            if kind_of(name) == kind and name not in asked:
                with contextlib.suppress(DataError):
                    found[name] = self._text(name, kind, read)
        return found

    def _named(self, extensions: Collection[str], most: int = 4) -> str:
        names = [self.members[name].name for name in extensions]
        return ", ".join(names[:most]) + (", ..." if names[most:] else "")


class Labels:
    """Asks the samples of a source for their labels, and remembers what is odd about them."""

    def __init__(self) -> None:
        self._asked = self._missing = 0
        self._fields: tuple[str, ...] = ()
        self._captions = False
        self._folders: set[str] = set()
        self._two = ""  # of the first sample that says two things
        self._unread = ""  # of the first whose split is no known one

    def label(self, sample: WdsSample, read: Read, kinds: Collection[str] = BESIDE_CAPTIONS) -> str:
        """As `WdsSample.label`."""
        self._asked += 1
        try:
            text = sample.label(read, kinds)
        except NoLabel as error:
            self._missing += 1
            self._fields = self._fields or error.fields
            self._captions |= bool(sample.labels(CAPTION))
            self._folders |= {sample.key.rpartition("/")[0]} - {"", "."}
            raise
        there = [kind for kind in kinds if sample.labels(kind)]
        if not self._two:
            self._two = _second(sample, there, read, text)
        return text

    def check_split(self, origin: str, sample: WdsSample, read: Read, split: str) -> None:
        """Compare what the sample's .json says of its split with that of its tar.

        Raises:
            UsageError: It is another one.
        """
        field, word = sample.said_split(read)
        said = SPLIT_OF.get(word.lower())
        if said is None:
            if field and not self._unread:
                self._unread = (
                    f"the field {field} of the .json members, {word!r} in {sample.key}, is not read"
                )
        elif said != split:
            raise UsageError(
                f"{origin}: its .json says {field} {word!r}, and its tar is read as {split}; make a tar of each split, called "
                "train.tar, val.tar and test.tar, or take the field out"
            )

    def remark(self) -> str:
        """Return a sentence about the labels of all samples; empty for nothing unusual."""
        return "; ".join(sentence for sentence in (self._two, self._unread) if sentence)

    def refuse(self, where: str, tars: int) -> None:
        """Raise `DataError` if none of all samples has a label; they lie in so many `tars`."""
        if not self._asked or self._missing < self._asked:
            return
        seen = "there is no .cls or .json member with one"
        if self._fields:
            shown = ", ".join(self._fields[:8]) + (", ..." if self._fields[8:] else "")
            seen = (
                f"the .json members have the fields {shown}, and none of {', '.join(LABEL_FIELDS)}"
            )
        if self._captions:
            seen += "; the .txt beside an image is its caption"
        if len(self._folders) > 1:
            shown = ", ".join(sorted(self._folders)[:4]) + (
                ", ..." if len(self._folders) > 4 else ""
            )
            seen += f"; if the folders {shown} are the classes, unpack the tars, and give the folder to wds-train shards"
        elif tars > 1 and not self._fields and not self._captions:
            seen += "; if each tar is a class, unpack each into a folder of its name, and convert the folder around these"
        raise DataError(
            f"{where}: none of {self._asked:,} samples has a label: {seen}; {how_to_label(where)}"
        )


def _second(sample: WdsSample, kinds: Sequence[str], read: Read, text: str) -> str:
    """Say which label is used of a sample whose members say more than `text`, or nothing."""
    for kind in kinds:
        for name, other in sample.others(kind, read).items():
            if other not in (NO_TEXT, text):
                return f"samples have two labels: {sample.key} is {text}, and {other} by its .{name}, which is not read"
        try:
            other = sample.label(read, (kind,)) if len(kinds) > 1 else text
        except DataError:
            continue
        if other not in (NO_TEXT, text):
            return (
                f"samples have two labels: {sample.key} is {text}, and {other} by its .{kind}; of {', '.join(LABELS)} the first "
                "that is there is used"
            )
    return ""


def without_label(split: str, origin: str, error: NoLabel) -> Note:
    """What to say of a sample without a label: test images are often handed out so."""
    if split == "test":
        return Note(split, origin, "ignored", "a test image without a label")
    return Note(split, origin, "left out", str(error))


def how_to_label(where: str) -> str:
    """What to do with the samples at `where`, which have no labels."""
    return (
        "write the label of each into a member KEY.cls, or into the field label of KEY.json; or take the samples as they "
        f"are, for SampleLoader: wds-train shards index {where} --any"
    )


def kind_of(extension: str) -> str:
    """What a member holds: the `cls` of `label.cls`."""
    return extension.rpartition(".")[2]


def _prefix(extension: str) -> str:
    """What a field is called: the `seg` of seg.png."""
    return extension.rpartition(".")[0]


def is_image(name: str) -> bool:
    """Whether a member of this name is an image, of whatever format."""
    return name.lower().endswith(IMAGE_SUFFIXES + FOREIGN_SUFFIXES)


def is_field(prefix: str) -> bool:
    """Whether people call a field of a sample so: the `seg` of seg.png, and not the 0 of cat.0.jpg."""
    return all(FIELD.fullmatch(part) for part in prefix.split("."))


def _meant(extensions: Collection[str], words: set[str]) -> list[str]:
    """Those of `extensions` that may be meant: the plain one (jpg), or those that `words` name (image.jpg), or all. One
    whose prefix is no field's (0.jpg) is that of a sample as well, whatever there is besides.
    """
    prefixes = {name: _prefix(name) for name in extensions}
    plain = [name for name, prefix in prefixes.items() if not prefix]
    named = [name for name, prefix in prefixes.items() if not words.isdisjoint(prefix.split("."))]
    best = plain or named
    if not best:
        return list(prefixes)
    odd = [name for name, prefix in prefixes.items() if prefix and not is_field(prefix)]
    return best + [name for name in odd if name not in best]


def _value(text: bytes, name: str) -> Any:
    """What a `.cls` or `.json` says: JSON, from which the label is taken, or else the bare text."""
    try:
        content = json.loads(text)
    except RecursionError:
        return text  # longer than a label may be
    except ValueError as error:
        if name.endswith("json") or text.lstrip()[:1] == b"{":
            raise DataError(f"its .{name} is no JSON: {str(error)[:100]}") from error
        return text
    if isinstance(content, dict):
        field = next((field for field in LABEL_FIELDS if field in content), None)
        if field is None:
            raise NoLabel(
                f"its .{name} has none of the fields {', '.join(LABEL_FIELDS)}", [*content]
            )
        content = content[field]
    elif isinstance(content, float) and not DECIMAL.fullmatch(text.strip()):
        return text  # 1e5 and NaN may be names
    if isinstance(content, list) and len(content) == 1:
        content = content[0]
    if isinstance(content, list) and len(content) > 1:
        raise _several(json.dumps(content))
    return content


def _several(shown: str) -> SeveralLabels:
    """Return the refusal of a label that holds several."""
    if len(shown) > 60:
        shown = f"{shown[:57]}..."
    return SeveralLabels(
        f"its label is {shown}, which are several; {ONE_LABEL}: write it to "
        "KEY.cls; wds-train shards index with --any takes the samples as they are, for SampleLoader"
    )


def group(plain: Iterable[Member], split: Split = key_and_extension) -> Iterator[WdsSample]:
    """The samples of members in a row that share a key."""
    sample: WdsSample | None = None
    for member in plain:
        key, extension = split(member.name)
        if sample is None or sample.key != key or extension in sample.members:
            if sample is not None:
                yield sample
            sample = WdsSample(key)
        sample.members[extension] = member
    if sample is not None:
        yield sample


def gather(plain: Iterable[Member], split: Split = key_and_extension) -> list[WdsSample]:
    """The samples of members that need not lie side by side, as those of `group` must; a member that a sample has
    already begins another.
    """
    samples: dict[str, list[WdsSample]] = {}
    for member in plain:
        key, extension = split(member.name)
        known = samples.setdefault(key, [])
        sample = next((each for each in known if extension not in each.members), None)
        if sample is None:
            sample = WdsSample(key)
            known.append(sample)
        sample.members[extension] = member
    return [sample for known in samples.values() for sample in known]
