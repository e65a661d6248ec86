"""Labels as sources hold them, and the classes that follow from them.

A label is read in two steps. `label_text` turns one value into a text, or into `NO_TEXT` for no
label. When all texts of a source are known, `classes_of` decides what they are: numbers or names,
which of them say "no label", and which are two spellings of one class.
"""

import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wds_train.conversion.sources.names import UNLABELED, normal
from wds_train.dataset import manifest as manifests
from wds_train.dataset.manifest import UNPRINTABLE, ClassInfo, DatasetManifest
from wds_train.errors import DataError, UsageError

NO_TEXT = ""  # the text of a value that is no label: an empty cell, null, NaN
NO_LABEL = -1  # the number of such a text
# 19 digits: longer numbers do not fit into 64 bits.
WHOLE = re.compile(r"([+-]?)(\d{1,19})(?:\.0*)?")
# ["cat"], as programs write a column of lists to CSV.
LIST_OF_ONE = re.compile(r"""\s*\[\s*['"]?([^'",\[\]]+)['"]?\s*\]\s*""")
# Any number: labels that are numbers with fractions are refused as measurements.
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
# Texts that programs write for a missing value. Among numbers all of them mean that. Among names
# the first group does; the second may as well be a class ("none": no defect) or an abbreviation
# ("NA": Namibia).
NEVER_NAMES = {"nan", "NaN", "<NA>", "#N/A"}
MAYBE_NAMES = {"NA", "N/A", "n/a", "null", "NULL", "None", "-1", "?"}
MISSING_BESIDE_NUMBERS = {"nan", "<na>", "#n/a", "na", "n/a", "null", "none", "?", "-", "missing"}
MAX_CLASSES = 1 << 16
MAX_NAME = 200  # characters; a longer text is a caption
CAPTIONS = 0.5  # distinct labels per sample, above which they are no classes
FEW = 20  # samples, too few to call their labels captions
ONE_LABEL = "one label for each image is what is trained on"


@dataclass(frozen=True)
class LabelRules:
    """The flags about labels that a person gave.

    Attributes:
        classes: The classes in their order (--classes FILE); empty without the flag.
        case: `keep` or `fold`: whether labels that differ in case and blanks only are one class
            (--label-case).
        none: Texts that mean "no label" (--no-label).
    """

    classes: tuple[ClassInfo, ...] = ()
    case: str = ""
    none: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Classes:
    """The classes of a source.

    Attributes:
        infos: The classes; a label is a place in this list.
        numbers: The label of each text that occurred; `NO_LABEL` for texts that are no label.
        said: Sentences for the person about how the labels were read.
    """

    infos: tuple[ClassInfo, ...]
    numbers: dict[str, int]
    said: list[str] = field(default_factory=list)


def label_text(value: Any) -> str:
    """Return the label in a table's cell, a JSON field or a file as a text.

    Args:
        value: Text, bytes, a number, a truth value, None, or a list of one of these.

    Returns:
        The text without blanks around it, whole numbers without a fraction (3.0 is "3"); `NO_TEXT`
        for no label.

    Raises:
        DataError: The value is no label: a list of several, an object, a number with a fraction, a
            long text.
    """
    # A list of one label is that label; null and NaN are none.
    if isinstance(value, list | tuple):
        if len(value) != 1:
            raise DataError(f"its label is {_brief(value)}, {len(value)} labels; {ONE_LABEL}")
        value = value[0]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return NO_TEXT

    # pandas writes a column of whole numbers with a gap as 3.0, 4.0, ...
    if isinstance(value, float):
        if not value.is_integer():
            raise DataError(f"its label is {value}, which is neither a name nor a whole number")
        value = int(value)

    content = value
    if isinstance(value, bytes):
        content = value.decode("utf-8", "replace")
    # A list may also stand in a text.
    if isinstance(content, str):
        alone = LIST_OF_ONE.fullmatch(content)
        if alone:
            content = alone[1]
    if not isinstance(content, str | int):
        raise DataError(f"its label is {_brief(value)}, which is neither a name nor a whole number")

    # The text becomes a class's name, in manifests and on terminals.
    text = normal(str(content)).strip()
    if UNPRINTABLE.search(text):
        raise DataError(f"its label is {_brief(value)}, which is neither a name nor a whole number")
    if len(text) > MAX_NAME:
        raise DataError(
            f"its label is a text of {len(text)} characters, "
            f"at most {MAX_NAME} can be a class's name"
        )
    return text


def classes_of(
    counts: Mapping[str, int], where: str, rules: LabelRules = LabelRules(), *, sure: bool = False
) -> Classes:
    """Find the classes of a source whose labels are texts.

    Labels are numbers when all of them are whole numbers: if all of 0...n-1 occur a label is its
    number, else the classes are the numbers that occur, in their order. Otherwise labels are names,
    and the classes the names in sorted order. A list of classes takes precedence over all that.

    Args:
        counts: Each text that occurs, and how often.
        where: The source, for messages.
        rules: The flags about labels.
        sure: The texts are names for certain, as those of folders are: none of them says "no label"
            or holds several.

    Raises:
        DataError: The labels are no classes, or the list of classes lacks one.
        UsageError: The labels can be read in two ways.
    """
    unknown = sorted(rules.none - counts.keys())
    if unknown and counts:
        raise UsageError(
            f"--no-label {unknown[0]}: {where} holds no such label; correct it, or leave it out"
        )

    # Set the texts aside that say "no label".
    texts = dict(counts)
    none = {NO_TEXT, *rules.none} & counts.keys()
    for text in none:
        del texts[text]
    if not rules.classes and not sure:
        missing = _find_missing(texts, where)
        for text in missing:
            del texts[text]
        none |= missing
        _refuse_captions(texts, where)
        _refuse_several(texts, where)

    # Number the others.
    if rules.classes:
        found = _match_list(texts, where, rules)
    else:
        found = _number_texts(texts, where, rules, sure=sure)

    said = list(found.said)
    unlabeled = sum(map(counts.__getitem__, none))
    if unlabeled:
        said.append(f"{unlabeled:,} without a label ({_show_missing(none)}) are left out")
    return Classes(found.infos, found.numbers | dict.fromkeys(none, NO_LABEL), said)


def _show_missing(texts: Iterable[str]) -> str:
    """Return the texts that say "no label" for a message."""
    shown = []
    for text in sorted(texts):
        if text == NO_TEXT:
            shown.append("empty")
        else:
            shown.append(repr(text))
    return ", ".join(shown)


def _number_texts(
    texts: Mapping[str, int], where: str, rules: LabelRules, *, sure: bool
) -> Classes:
    """Return the classes of texts that all are labels; see `classes_of`."""
    spelling = _map_spellings(texts, where, rules)
    ids = _sort_ids(set(spelling.values()), where, sure=sure)
    said = _describe_folding(spelling) + _describe_order(ids, sure=sure)
    places = {}
    for place, id in enumerate(ids):
        places[id] = place
    numbers = {}
    for text, id in spelling.items():
        numbers[text] = places[id]
    return Classes(to_classes(ids), numbers, said)


def _find_missing(texts: Mapping[str, int], where: str) -> set[str]:
    """Find the texts that say "no label".

    Raises:
        UsageError: A text may say so, or be a class.
    """
    words = set()
    rest = []
    for text in texts:
        if text.casefold() in MISSING_BESIDE_NUMBERS:
            words.add(text)
        else:
            rest.append(text)
    if rest and all(map(NUMBER.fullmatch, rest)):
        return words | _find_missing_numbers(rest, where)

    maybe = sorted(MAYBE_NAMES & texts.keys())
    if maybe:
        raise UsageError(
            f"{where} holds the label {maybe[0]!r} beside names, {texts[maybe[0]]:,} times; "
            "many programs write that for a missing value. "
            f"--no-label {maybe[0]} leaves these out; "
            f"--classes FILE with a line {maybe[0]} makes it a class"
        )
    found = set()
    for text in texts:
        if text in NEVER_NAMES or text.casefold() in UNLABELED:
            found.add(text)
    return found


def _find_missing_numbers(numbers: Sequence[str], where: str) -> set[str]:
    """Find the numbers that say "no label": -1, beside labels of two classes or more.

    Raises:
        UsageError: -1 may as well be a class, or there are other negative numbers.
    """
    if not all(map(WHOLE.fullmatch, numbers)):
        return set()  # measurements: `_sort_ids` refuses them
    values = set(map(float, numbers))
    negative = []
    for text in numbers:
        if text.startswith("-") and float(text) < 0:  # -0 is 0
            negative.append(text)

    if min(values) < -1:
        raise UsageError(
            f"{where} holds the label {negative[0]}; "
            "is it a class, or does it say that there is none? "
            f"--no-label={negative[0]} leaves these out, "
            f"--classes FILE with a line {negative[0]} makes it a class"
        )
    if negative and len(values - {-1.0}) == 1:
        raise UsageError(
            f"{where} holds the labels -1 and {max(numbers, key=float)} alone; "
            "are these two classes, or does -1 say that there is no label? "
            "--classes FILE with a line for each makes them classes"
        )
    return set(negative)


def _refuse_captions(texts: Mapping[str, int], where: str) -> None:
    """Raise `DataError` if there are too many different texts for classes."""
    samples = sum(texts.values())
    if len(texts) > MAX_CLASSES or (samples > FEW and len(texts) > CAPTIONS * samples):
        raise DataError(
            f"{where} holds {len(texts):,} different labels in {samples:,} samples, "
            f"such as {min(texts, key=len)!r}: these are no classes; "
            "name the right column or member for the label"
        )


def _refuse_several(texts: Mapping[str, int], where: str) -> None:
    """Raise `UsageError` for several labels in one text.

    Such as `cat|dog`, `["cat", "dog"]`, `agriculture clear water`.
    """
    found = _find_several(texts)
    if found is not None:
        raise UsageError(
            f"{where} holds several labels in one cell, {found!r}; {ONE_LABEL}. "
            "Keep one for each image; or, where each combination is a class of its own, "
            "list the combinations with --classes FILE, one a line"
        )


def _find_several(texts: Mapping[str, int]) -> str | None:
    """Return a text that holds several labels; None if there is none."""
    for text in texts:
        if _holds_several(text, texts):
            return text
    if _are_tags(texts):
        return max(texts, key=len)
    return None


def _holds_several(text: str, texts: Mapping[str, int]) -> bool:
    """Return True if a text holds several labels, judged by the other `texts`."""
    if text[:1] in "[{(" and text[-1:] in "]})" and re.search(r"[,'\"]", text):
        return True
    # A bar or a semicolon may belong to a name, too, unless another label has one of the parts.
    for separator in ("|", ";"):
        parts = {*_split(text, separator)} - {""}
        if len(parts) > 1 and _is_part_elsewhere(parts, text, texts, separator):
            return True
    # A comma, a slash, a plus or a blank may belong to a name, unless each part is a label, too.
    for separator in (",", "/", "+", "&"):
        pieces = _split(text, separator)
        if len(pieces) > 1 and texts.keys() >= set(pieces):
            return True
    # Blanks, too: `agriculture clear`, where both words are labels.
    words = text.split()
    return len(words) > 1 and texts.keys() >= set(words)


def _split(text: str, separator: str | None) -> list[str]:
    """Split a text, and return its parts without blanks around them."""
    return [part.strip() for part in text.split(separator)]


def _is_part_elsewhere(parts: set[str], text: str, texts: Iterable[str], separator: str) -> bool:
    """Return True if another text than `text` has one of the `parts`."""
    elsewhere = set()
    for other in texts:
        if other != text:
            elsewhere.update(_split(other, separator))
    return not parts.isdisjoint(elsewhere)


def _are_tags(texts: Collection[str]) -> bool:
    """Return True if the texts combine few words, like the labels of Planet's satellite images."""
    # Names of several words share some of them, too: twice as many texts as words are needed.
    for separator, texts_per_word in ((None, 2), (",", 1)):
        words: set[str] = set()
        most = 0
        for text in texts:
            parts = _split(text, separator)
            words.update(parts)
            most = max(most, len(parts))
        if most > 1 and len(texts) > 2 and len(texts) >= texts_per_word * len(words):
            return True
    return False


def _map_spellings(texts: Mapping[str, int], where: str, rules: LabelRules) -> dict[str, str]:
    """Return the class id of each text.

    3.0 is 3, and with --label-case fold, the rarer of Dog and dog is the other.

    Args:
        texts: Each text, and how often it occurs.
        where: The source, for messages.
        rules: The flags about labels.

    Raises:
        UsageError: Two ids differ in case, blanks or zeros only, and no flag says what they are.
    """
    spelled = dict(zip(texts, texts, strict=True))
    # Numbers only if all texts are: "3.0" may be the name of a version.
    if all(map(WHOLE.fullmatch, texts)):
        for text in texts:
            spelled[text] = _drop_fraction(text)

    # Collect the ids that may be one class, the most frequent first.
    twins: dict[str, list[str]] = {}
    for id in sorted(set(spelled.values()), key=lambda id: (-texts.get(id, 0), id)):
        twins.setdefault(_fold(id), []).append(id)
    if not rules.case:
        for ids in twins.values():
            if len(ids) > 1:
                raise _two_spellings(ids, where)
    # Every spelling becomes the most frequent one.
    if rules.case == "fold":
        for text, id in spelled.items():
            spelled[text] = twins[_fold(id)][0]
    return spelled


def _two_spellings(ids: Sequence[str], where: str) -> UsageError:
    """Return the error for ids that may be spellings of one class."""
    difference = "case or blanks"
    if ids[0].isdigit():
        difference = "zeros"
    return UsageError(
        f"{where} holds the labels {' and '.join(map(repr, sorted(ids)))}, "
        f"which differ in {difference} only; "
        "--label-case fold makes them one class, --label-case keep leaves them apart"
    )


def _describe_folding(spelling: Mapping[str, str]) -> list[str]:
    """Return a sentence about texts that were folded; none if nothing was."""
    shown = []
    for text, id in sorted(spelling.items()):
        if text != id and not WHOLE.fullmatch(text):
            shown.append(f"{text!r} is {id!r}")
    if not shown:
        return []
    # The first five are enough to recognise them.
    if len(shown) > 5:
        shown[5:] = ["..."]
    return [f"spellings are folded: {', '.join(shown)}"]


def _drop_fraction(text: str) -> str:
    """Return "3" for "3.0"; texts such as "007" are codes, and stay as they are."""
    sign, digits = WHOLE.fullmatch(text).groups()  # type: ignore[union-attr]
    return f"{sign.replace('+', '')}{digits}"


def _fold(text: str) -> str:
    """Return the text that all spellings of one class have in common."""
    if not WHOLE.fullmatch(text):
        return re.sub(r"[\s_]+", " ", text.casefold()).strip()
    if len(text) < 16:  # a float holds so many digits exactly
        return str(int(float(text)))
    return text.lstrip("0")


def _sort_ids(ids: set[str], where: str, *, sure: bool) -> list[str]:
    """Return class ids in their order, numbers by their value: 2 comes before 10.

    Raises:
        UsageError: They are measurements, and no names of folders (`sure`).
    """
    if not all(map(NUMBER.fullmatch, ids)):
        return sorted(ids)
    if not sure:
        for id in sorted(ids):
            if not WHOLE.fullmatch(id):
                raise UsageError(
                    f"{where} holds the label {id}, a number with a fraction: "
                    "a measurement is no class. Name the column of the classes "
                    "(--label-column NAME), "
                    "or list the values with --classes FILE, one a line"
                )
    return sorted(ids, key=lambda id: (float(id), id))


def _describe_order(ids: Sequence[str], *, sure: bool) -> list[str]:
    """Return a sentence about class ids whose order may surprise; none for other ids."""
    if not ids or not all(map(NUMBER.fullmatch, ids)):
        return []
    if list(ids) == list(map(str, range(len(ids)))):
        if not sure or list(ids) == sorted(ids):
            return []
        return [
            f"the classes are numbers, and in their order (0, 1, 2, ... {ids[-1]}); "
            "ImageFolder's is 0, 1, 10, ..."
        ]
    for id in ids:
        if not WHOLE.fullmatch(id) or id != str(int(float(id))):
            return []  # codes such as 007, which nobody takes for labels
    last = len(ids) - 1
    return [
        f"the labels are numbers, but not all of 0...{last}: "
        f"class 0 is {ids[0]}, class {last} is {ids[-1]}; --classes FILE gives another list"
    ]


def _match_list(texts: Mapping[str, int], where: str, rules: LabelRules) -> Classes:
    """Match the texts with the list of classes that a person gave.

    Raises:
        DataError: The list lacks a label.
        UsageError: The labels are numbers, and may count from 0 or from 1.
    """
    # Look up each text, as it is spelled or as a number.
    fold = normal
    if rules.case == "fold":
        fold = _fold
    places = {}
    for place, entry in enumerate(rules.classes):
        places[fold(entry.id)] = place
    numbers = {}
    odd = []
    for text in texts:
        number = places.get(fold(text), places.get(plain_number(text), NO_LABEL))
        numbers[text] = number
        if number == NO_LABEL:
            odd.append(text)
    if not odd:
        return Classes(rules.classes, numbers)

    # The labels are numbers and the list holds names: a number is a place in the list.
    if len(odd) == len(texts) and _are_places(odd):
        by_text = {}
        for text in sorted(odd):
            by_text[text] = int(plain_number(text))
        return _match_places(by_text, where, rules)

    odd.sort()
    names = ", ".join(map(repr, odd[:5]))
    if len(odd) > 5:
        names += f" and {len(odd) - 5} more"
    raise DataError(
        f"{where} holds the label {names}, "
        f"which the list of {len(rules.classes)} classes does not name; "
        f"add it there, or leave its samples out: --no-label={shlex.quote(odd[0])}"
    )


def _are_places(texts: Iterable[str]) -> bool:
    """Return True if all texts are whole numbers without a minus."""
    return all(WHOLE.fullmatch(text) and not text.startswith("-") for text in texts)


def _match_places(places: dict[str, int], where: str, rules: LabelRules) -> Classes:
    """Read labels as places in the list of classes.

    They count from 0; from 1 only if nothing else fits.

    Args:
        places: The number that each text is.
        where: The source, for messages.
        rules: The flags about labels, with the list.

    Raises:
        DataError: A number is larger than the list.
        UsageError: The numbers may count from 0 or from 1.
    """
    length = len(rules.classes)
    largest = max(places.values())
    # Places from 0 fit; all but 0 may as well be places from 1.
    if largest < length:
        if len(places) > 1 and set(places.values()) == set(range(1, largest + 1)):
            raise UsageError(
                f"{where} holds the labels 1 to {largest} and no 0, "
                f"the list of classes has {length} names; "
                'say which label has which: a JSON file {"1": "NAME", ...}'
            )
        return Classes(rules.classes, places)
    # One too many and no 0: they count from 1, as in MATLAB.
    if largest == length and 0 not in places.values():
        numbers = {}
        for text, place in places.items():
            numbers[text] = place - 1
        sentence = (
            f"the labels count from 1: label 1 is {rules.classes[0].name}, "
            "the first of the list of classes"
        )
        return Classes(rules.classes, numbers, [sentence])
    raise DataError(
        f"{where} holds the label {largest}, "
        f"the list of classes names {length} classes and not that one; make it longer"
    )


def plain_number(text: str) -> str:
    """Return the number in `text` as it is usually written (7 for +007.0).

    Any other text is returned as it is.
    """
    found = WHOLE.fullmatch(text)
    if found is None:
        return text
    return f"{found[1].replace('+', '')}{int(found[2])}"


def read_class_list(path: Path) -> tuple[ClassInfo, ...]:
    """Read a list of classes in their order.

    Args:
        path: A text file with a name a line; JSON: a list of names, an object of number or
            id -> name, or of name -> number; the manifest.json of a dataset, or what
            `wds-train inspect DATASET --json` printed.

    Raises:
        DataError: The file names no classes, or one twice.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}; give a file with a class's name a line"
        ) from error
    return parse_class_list(data, str(path))


def parse_class_list(data: bytes, path: str) -> tuple[ClassInfo, ...]:
    """Return the classes in a list of classes.

    Args:
        data: The content of the file; see `read_class_list`.
        path: The file, for its suffix and for messages.

    Raises:
        DataError: It names no classes, or one twice.
    """
    try:
        text = data.decode("utf-8-sig")
        if path.lower().endswith(".json"):
            infos = _parse_json(json.loads(text), data, path)
        else:
            infos = to_classes([name for name in map(label_text, text.splitlines()) if name])
    except (ValueError, KeyError, TypeError, RecursionError, DataError) as error:
        raise DataError(
            f"{path} does not name the classes ({error!r}); "
            "it takes a name a line, or a JSON list of names"
        ) from error

    cause = ""
    if not infos:
        cause = "is empty"
    twice = _find_twice(infos)
    if twice is not None:
        cause = f"names {twice!r} twice"
    if cause:
        raise DataError(f"{path} {cause}; it takes each class's name once, a line or a JSON list")
    return infos


def _find_twice(infos: Iterable[ClassInfo]) -> str | None:
    """Return the first id that occurs twice; None if all differ."""
    counts: Counter[str] = Counter()
    for entry in infos:
        counts[entry.id] += 1
    for id, count in counts.items():
        if count > 1:
            return id
    return None


def _parse_json(content: Any, data: bytes, path: str) -> tuple[ClassInfo, ...]:
    """Return the classes in a JSON file.

    Args:
        content: The parsed file.
        data: Its bytes.
        path: Its path, for messages.
    """
    # Lists: names in order, a manifest, what `wds-train inspect DATASET --json` prints.
    if isinstance(content, list):
        return to_classes(list(map(label_text, content)))
    if not isinstance(content, dict):
        raise TypeError("neither a list nor an object")
    if content.get("kind") == manifests.KIND:
        return DatasetManifest.from_json(data, path).classes
    if isinstance(content.get("classes"), list):
        names = {}
        ids = []
        for entry in content["classes"]:
            id = label_text(entry["id"])
            ids.append(id)
            names[id] = label_text(entry["name"])
        return to_classes(ids, names)

    # Objects: name -> number (torchvision's class_to_idx), number -> name, id -> name.
    if all(isinstance(value, int) for value in content.values()):
        return to_classes(list(map(label_text, sorted(content, key=content.__getitem__))))
    ids = list(content)
    are_numbers = all(map(WHOLE.fullmatch, ids))
    if are_numbers:
        ids.sort(key=int)
    names = {}
    for id in ids:
        names[id] = label_text(content[id])
    if are_numbers and ids == list(map(str, range(len(ids)))):
        return to_classes(list(names.values()))
    return to_classes(ids, names)


def to_classes(ids: Sequence[str], names: Mapping[str, str] | None = None) -> tuple[ClassInfo, ...]:
    """Return the classes of some ids.

    Args:
        ids: The ids, in the order of the labels.
        names: The human name of each id that has one; others are their own name.

    Raises:
        DataError: An id or a name cannot be printed.
    """
    names = names or {}
    classes = []
    for id in ids:
        entry = ClassInfo(id, names.get(id, id))
        if UNPRINTABLE.search(entry.id + entry.name):
            raise DataError(f"the class {entry.id!r} has a name that cannot be printed; rename it")
        classes.append(entry)
    return tuple(classes)


def count_texts(texts: Iterable[str]) -> dict[str, int]:
    """Count each of `texts`, in the order in which they come."""
    return dict(Counter(texts))


def _brief(value: Any) -> str:
    """Return a value for a message, cut to 60 characters."""
    text = repr(value)
    if len(text) > 60:
        return f"{text[:57]}..."
    return text
