"""Labels as sources hold them, and the classes that follow from them.

A label is read in two steps. `label_text` turns one value into a text, or into `NO_TEXT` where there is none. When all
texts of a source are known, `classes_of` decides what they are: numbers or names, which of them say "no label", and
which are two spellings of one class.
"""

import json
import math
import re
import shlex
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
WHOLE = re.compile(r"([+-]?)(\d{1,19})(?:\.0*)?")
LIST_OF_ONE = re.compile(r"""\s*\[\s*['"]?([^'",\[\]]+)['"]?\s*\]\s*""")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
# What programs write where there is no value. Beside numbers all of them say so; beside names the first group does, and
# the second may as well be a class ("none": no defect) or an abbreviation ("NA": Namibia).
NEVER_NAMES = {"nan", "NaN", "<NA>", "#N/A"}
MAYBE_NAMES = {"NA", "N/A", "n/a", "null", "NULL", "None", "-1", "?"}
MISSING_BESIDE_NUMBERS = {"nan", "<na>", "#n/a", "na", "n/a", "null", "none", "?", "-", "missing"}
MAX_CLASSES = 1 << 16
MAX_NAME = 200  # characters; a longer text is a caption
CAPTIONS = 0.5  # distinct labels a sample, above which they are no classes
FEW = 20  # samples, of which nothing follows
ONE_LABEL = "one label for each image is what is trained on"


@dataclass(frozen=True)
class LabelRules:
    """What a person said of a source's labels.

    Attributes:
        classes: The classes in their order (--classes FILE); empty where nothing was said.
        case: `keep` or `fold`: whether labels that differ in case and blanks only are one class (--label-case).
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
        numbers: The label of each text that occurred; `NO_LABEL` for those that are none.
        said: How the labels were read, in sentences for the person.
    """

    infos: tuple[ClassInfo, ...]
    numbers: dict[str, int]
    said: list[str] = field(default_factory=list)


def label_text(value: Any) -> str:
    """Return the label in a table's cell, a JSON field or a file as a text.

    Args:
        value: Text, bytes, a number, a truth value, None, or a list of one of these.

    Returns:
        The text without blanks around it, whole numbers without a fraction (3.0 is "3"); `NO_TEXT` for no label.

    Raises:
        DataError: The value is no label: a list of several, an object, a number with a fraction, a long text.
    """
    if isinstance(value, list | tuple):
        if len(value) != 1:
            raise DataError(f"its label is {_brief(value)}, {len(value)} labels; {ONE_LABEL}")
        value = value[0]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return NO_TEXT
    if isinstance(value, float):
        if not value.is_integer():
            raise DataError(f"its label is {value}, which is neither a name nor a whole number")
        value = int(value)
    content = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    if isinstance(content, str) and (alone := LIST_OF_ONE.fullmatch(content)):
        content = alone[1]
    if not isinstance(content, str | int):
        raise DataError(f"its label is {_brief(value)}, which is neither a name nor a whole number")
    text = normal(str(content)).strip()
    if UNPRINTABLE.search(text):
        raise DataError(f"its label is {_brief(value)}, which is neither a name nor a whole number")
    if len(text) > MAX_NAME:
        raise DataError(
            f"its label is a text of {len(text)} characters, at most {MAX_NAME} can be a class's name"
        )
    return text


def classes_of(
    counts: Mapping[str, int], where: str, rules: LabelRules = LabelRules(), *, sure: bool = False
) -> Classes:
    """Find the classes of a source whose labels are texts.

    Labels are numbers when all of them are whole numbers: where all of 0...n-1 occur a label is its number, else the
    classes are the numbers that occur, in their order. Otherwise labels are names, and the classes the names in sorted
    order. A list of classes decides before all that.

    Args:
        counts: Each text that occurs, and how often.
        where: The source, for messages.
        rules: What a person said.
        sure: The texts are names for certain, as those of folders are: none of them says "no label" or holds several.

    Raises:
        DataError, UsageError: They are no classes, or can be read in two ways.
    """
    unknown = sorted(rules.none - counts.keys())
    if unknown and counts:
        raise UsageError(
            f"--no-label {unknown[0]}: {where} holds no such label; correct it, or leave it out"
        )
    texts = {
        text: count for text, count in counts.items() if text != NO_TEXT and text not in rules.none
    }
    none = dict.fromkeys(counts.keys() - texts.keys(), NO_LABEL)
    said: list[str] = []
    if rules.classes:
        found = _listed(texts, where, rules)
    else:
        if not sure:
            missing = _missing(texts, where)
            none |= dict.fromkeys(missing, NO_LABEL)
            texts = {text: count for text, count in texts.items() if text not in missing}
            _refuse_captions(texts, where)
            _refuse_several(texts, where)
        spelling = _spellings(texts, where, rules)
        said += _folded_words(spelling)
        ids = _in_order(set(spelling.values()), where, said, sure=sure)
        places = {id: place for place, id in enumerate(ids)}
        found = Classes(to_classes(ids), {text: places[id] for text, id in spelling.items()})
    unlabeled = sum(counts[text] for text in none)
    if unlabeled:
        shown = ", ".join(repr(text) if text else "empty" for text in sorted(none))
        said.append(f"{unlabeled:,} without a label ({shown}) are left out")
    return Classes(found.infos, found.numbers | none, [*found.said, *said])


def _missing(texts: Mapping[str, int], where: str) -> set[str]:
    """Find the texts that say "no label"."""
    words = {text for text in texts if text.casefold() in MISSING_BESIDE_NUMBERS}
    rest = [text for text in texts if text not in words]
    if rest and all(NUMBER.fullmatch(text) for text in rest):
        if not all(WHOLE.fullmatch(text) for text in rest):
            return words  # measurements, which are refused as such
        negative = [text for text in rest if text.startswith("-") and float(text) < 0]
        if any(float(text) != -1 for text in negative):
            raise UsageError(
                f"{where} holds the label {negative[0]}; is it a class, or does it say that there is none? "
                f"--no-label={negative[0]} leaves these out, --classes FILE with a line {negative[0]} makes it a class"
            )
        if negative and len({float(text) for text in rest} - {-1.0}) == 1:
            raise UsageError(
                f"{where} holds the labels -1 and {max(rest, key=float)} alone; are these two classes, or does -1 say that there is "
                "no label? --classes FILE with a line for each makes them classes"
            )
        return words | set(negative)
    maybe = sorted(text for text in texts if text in MAYBE_NAMES)
    if maybe:
        raise UsageError(
            f"{where} holds the label {maybe[0]!r} beside names, {texts[maybe[0]]:,} times; many programs write that for a "
            f"missing value. --no-label {maybe[0]} leaves these out; --classes FILE with a line {maybe[0]} makes it a class"
        )
    return {text for text in texts if text in NEVER_NAMES or text.casefold() in UNLABELED}


def _refuse_captions(texts: Mapping[str, int], where: str) -> None:
    samples = sum(texts.values())
    if len(texts) > MAX_CLASSES or (samples > FEW and len(texts) > CAPTIONS * samples):
        raise DataError(
            f"{where} holds {len(texts):,} different labels in {samples:,} samples, such as {min(texts, key=len)!r}: these "
            "are no classes; name the right column or member for the label"
        )


def _refuse_several(texts: Mapping[str, int], where: str) -> None:
    """Refuse labels that are several in one text: `cat|dog`, `["cat", "dog"]`, `agriculture clear water`."""
    found = next((text for text in texts if _holds_several(text, texts)), None)
    if found is None and _are_tags(texts):
        found = max(texts, key=len)
    if found is None:
        return
    raise UsageError(
        f"{where} holds several labels in one cell, {found!r}; {ONE_LABEL}. Keep one for each image; or, where each "
        "combination is a class of its own, list the combinations with --classes FILE, one a line"
    )


def _holds_several(text: str, texts: Mapping[str, int]) -> bool:
    if text[:1] in "[{(" and text[-1:] in "]})" and re.search(r"[,'\"]", text):
        return True
    # A bar or a semicolon may belong to a name, too; not where one of the parts is in another label.
    for separator in ("|", ";"):
        parts = {part.strip() for part in text.split(separator)} - {""}
        if len(parts) > 1 and any(
            _is_part(parts, other, separator) for other in texts if other != text
        ):
            return True
    # A comma, a slash, a plus or a blank may belong to a name; not where each part is a label by itself, too.
    for separator in (",", "/", "+", "&"):
        pieces = [part.strip() for part in text.split(separator)]
        if len(pieces) > 1 and all(piece in texts for piece in pieces):
            return True
    words = text.split()
    return len(words) > 1 and all(word in texts for word in words)


def _is_part(parts: Collection[str], other: str, separator: str) -> bool:
    """Tell whether another label holds one of the `parts`."""
    return any(part.strip() in parts for part in other.split(separator))


def _are_tags(texts: Collection[str]) -> bool:
    """Tell whether the texts are combinations of few words, as the labels of Planet's satellite images are."""
    for separator, texts_a_word in ((None, 2), (",", 1)):
        parts = [text.split(separator) for text in texts]
        words = {word.strip() for each in parts for word in each}
        combined = max(map(len, parts), default=0) > 1 and len(texts) > 2
        if combined and len(texts) >= texts_a_word * len(words):
            return True
    return False


def _spellings(texts: Mapping[str, int], where: str, rules: LabelRules) -> dict[str, str]:
    """Map each text to the class id that it spells: 3.0 and 3, and where told so, Dog and dog."""
    if all(WHOLE.fullmatch(text) for text in texts):
        spelled = {text: _without_fraction(text) for text in texts}
    else:
        spelled = {text: text for text in texts}
    twins: dict[str, list[str]] = {}
    for id in sorted(set(spelled.values()), key=lambda id: (-texts.get(id, 0), id)):
        twins.setdefault(_folded(id), []).append(id)
    different = next((ids for ids in twins.values() if len(ids) > 1), None)
    if different and not rules.case:
        raise UsageError(
            f"{where} holds the labels {' and '.join(map(repr, sorted(different)))}, which differ in "
            f"{'zeros' if different[0].isdigit() else 'case or blanks'} only; "
            "--label-case fold makes them one class, --label-case keep leaves them apart"
        )
    if rules.case != "fold":
        return spelled
    return {text: twins[_folded(id)][0] for text, id in spelled.items()}


def _folded_words(spelling: Mapping[str, str]) -> list[str]:
    """Return what was folded, in a sentence."""
    others = sorted(
        text for text, id in spelling.items() if text != id and not WHOLE.fullmatch(text)
    )
    if not others:
        return []
    shown = ", ".join(f"{text!r} is {spelling[text]!r}" for text in others[:5])
    return [f"spellings are folded: {shown}{', ...' if others[5:] else ''}"]


def _without_fraction(text: str) -> str:
    """Return "3" for "3.0"; texts such as "007" are codes, and stay as they are."""
    sign, digits = WHOLE.fullmatch(text).groups()  # type: ignore[union-attr]
    sign = "" if sign == "+" else sign
    return f"{sign}{digits}"


def _folded(id: str) -> str:
    """Return what two spellings of one class have in common."""
    if WHOLE.fullmatch(id):
        return str(int(float(id))) if len(id) < 16 else id.lstrip("0")
    return re.sub(r"[\s_]+", " ", id.casefold()).strip()


def _in_order(ids: set[str], where: str, said: list[str], *, sure: bool) -> list[str]:
    """Return the class ids in their order, numbers by their value: 2 comes before 10."""
    if not all(NUMBER.fullmatch(id) for id in ids) or not ids:
        return sorted(ids)
    if not sure and not all(WHOLE.fullmatch(id) for id in ids):
        odd = next(id for id in sorted(ids) if not WHOLE.fullmatch(id))
        raise UsageError(
            f"{where} holds the label {odd}, a number with a fraction: a measurement is no class. Name the column of the "
            "classes (--label-column NAME), or list the values with --classes FILE, one a line"
        )
    numeric = sorted(ids, key=lambda id: (float(id), id))
    counted = [str(number) for number in range(len(ids))]
    codes = (
        [id for id in numeric if id != str(int(float(id)))]
        if all(map(WHOLE.fullmatch, numeric))
        else numeric
    )
    if numeric == counted:
        if sure and numeric != sorted(ids):
            said.append(
                f"the classes are numbers, and in their order (0, 1, 2, ... {numeric[-1]}); ImageFolder's is 0, 1, 10, ..."
            )
    elif not codes:
        said.append(
            f"the labels are numbers, but not all of 0...{len(ids) - 1}: class 0 is {numeric[0]}, class {len(ids) - 1} is "
            f"{numeric[-1]}; --classes FILE gives another list"
        )
    return numeric


def _listed(texts: Mapping[str, int], where: str, rules: LabelRules) -> Classes:
    """Match the texts with the list of classes that a person gave."""
    fold = _folded if rules.case == "fold" else normal
    places = {fold(entry.id): place for place, entry in enumerate(rules.classes)}
    numbers = {
        text: places.get(fold(text), places.get(plain_number(text), NO_LABEL)) for text in texts
    }
    odd = sorted(text for text, number in numbers.items() if number == NO_LABEL)
    if (
        odd
        and odd == sorted(texts)
        and all(WHOLE.fullmatch(text) and not text.startswith("-") for text in odd)
    ):
        # The labels are numbers and the list holds names: a number is a place in the list.
        return _by_place({text: int(plain_number(text)) for text in odd}, where, rules)
    if odd:
        names = ", ".join(map(repr, odd[:5])) + (f" and {len(odd) - 5} more" if odd[5:] else "")
        raise DataError(
            f"{where} holds the label {names}, which the list of {len(rules.classes)} classes does not name; add it there, or "
            f"leave its samples out: --no-label={shlex.quote(odd[0])}"
        )
    return Classes(rules.classes, numbers)


def _by_place(places: dict[str, int], where: str, rules: LabelRules) -> Classes:
    """Read labels as places in the list of classes, which count from 0; from 1 where nothing else fits."""
    length = len(rules.classes)
    largest = max(places.values())
    if largest < length:
        if len(places) > 1 and set(places.values()) == set(range(1, largest + 1)):
            raise UsageError(
                f"{where} holds the labels 1 to {largest} and no 0, the list of classes has {length} names; say which label has "
                f'which: a JSON file {{"1": "NAME", ...}}'
            )
        return Classes(rules.classes, places)
    if largest == length and 0 not in places.values():
        first = rules.classes[0].name
        numbers = {text: place - 1 for text, place in places.items()}
        return Classes(
            rules.classes,
            numbers,
            [f"the labels count from 1: label 1 is {first}, the first of the list of classes"],
        )
    raise DataError(
        f"{where} holds the label {largest}, the list of classes names {length} classes and not that one; make it longer"
    )


def plain_number(text: str) -> str:
    """Return the number in `text` as it is usually written; any other text as it is."""
    found = WHOLE.fullmatch(text)
    return f"{found[1].replace('+', '')}{int(found[2])}" if found else text


def read_class_list(path: Path) -> tuple[ClassInfo, ...]:
    """Read a list of classes in their order.

    Args:
        path: A text file with a name a line; JSON: a list of names, an object of number or id -> name, or of
            name -> number; the manifest.json of a dataset, or what `wds-train inspect DATASET --json` printed.

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
    """Return the classes that the content of the file at `path` lists; see `read_class_list`."""
    try:
        text = data.decode("utf-8-sig")
        if path.lower().endswith(".json"):
            infos = _from_json(json.loads(text), data, path)
        else:
            infos = to_classes([name for name in map(label_text, text.splitlines()) if name])
    except (ValueError, KeyError, TypeError, RecursionError, DataError) as error:
        raise DataError(
            f"{path} does not name the classes ({error!r}); it takes a name a line, or a JSON list of names"
        ) from error
    ids = [entry.id for entry in infos]
    twice = (
        next((id for id in ids if ids.count(id) > 1), None) if len(set(ids)) < len(ids) else None
    )
    if not infos or twice is not None:
        cause = "is empty" if not infos else f"names {twice!r} twice"
        raise DataError(f"{path} {cause}; it takes each class's name once, a line or a JSON list")
    return infos


def _from_json(content: Any, data: bytes, path: str) -> tuple[ClassInfo, ...]:
    if isinstance(content, list):
        return to_classes([label_text(name) for name in content])
    if content.get("kind") == manifests.KIND:
        return DatasetManifest.from_json(data, path).classes
    if isinstance(content.get("classes"), list):  # what `wds-train inspect DATASET --json` prints
        named = [
            (label_text(entry["id"]), label_text(entry["name"])) for entry in content["classes"]
        ]
        return to_classes([id for id, _ in named], dict(named))
    if all(isinstance(value, int) for value in content.values()):  # torchvision's class_to_idx
        return to_classes([label_text(name) for name in sorted(content, key=content.__getitem__)])
    ids = list(content)
    if all(map(WHOLE.fullmatch, ids)):
        ids.sort(key=int)
        if ids == [str(number) for number in range(len(ids))]:
            return to_classes([label_text(content[id]) for id in ids])
    return to_classes(ids, {id: label_text(content[id]) for id in ids})


def to_classes(ids: Sequence[str], names: Mapping[str, str] | None = None) -> tuple[ClassInfo, ...]:
    """Return the classes of these `ids`, with the human `names` of those that have one."""
    classes = tuple(ClassInfo(id, (names or {}).get(id, id)) for id in ids)
    for entry in classes:
        if UNPRINTABLE.search(entry.id + entry.name):
            raise DataError(f"the class {entry.id!r} has a name that cannot be printed; rename it")
    return classes


def count_texts(texts: Iterable[str]) -> dict[str, int]:
    """Count each of `texts`, in the order in which they come."""
    counts: dict[str, int] = {}
    for text in texts:
        counts[text] = counts.get(text, 0) + 1
    return counts


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
