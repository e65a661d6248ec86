"""Labels as sources hold them, and the classes that follow from them."""

import re
from collections.abc import Collection
from typing import Any

from shards.sources.splits import to_classes
from wds_train.errors import DataError
from wds_train.format.manifest import UNPRINTABLE, ClassInfo

NUMBER = re.compile(r"0|[1-9][0-9]{0,18}")
MAX_CLASSES = 1 << 16
MAX_NAME = 200  # characters; a longer text is a caption
CAPTIONS = 0.5  # distinct labels a sample, above which they are no classes
FEW = 20  # samples, of which nothing follows


def label_text(value: Any) -> str:
    """The `value` of a table's cell, a JSON field or a file as a label; `DataError` for what is neither a name nor a
    number.
    """
    shown = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    text = str(shown).strip() if isinstance(shown, str | int) else ""
    if UNPRINTABLE.search(text) or not text:
        raise DataError(f"its label is {_brief(value)}, which is neither a name nor a whole number")
    if len(text) > MAX_NAME:
        raise DataError(f"its label is a text of {len(text)} characters, at most {MAX_NAME} can be a class's name")
    return text


def classes_of(texts: Collection[str], samples: int, where: str) -> tuple[tuple[ClassInfo, ...], dict[str, int]]:
    """The classes of a source whose labels are `texts`, and each text's label.

    Labels are numbers when all of them are plain whole numbers: these are kept, and the classes are 0 to the largest, or,
    where that would be over `MAX_CLASSES`, those that occur, in their order. Otherwise labels are names ('003' as well), and
    the classes are the names in sorted order.
    """
    if len(texts) > MAX_CLASSES or (samples > FEW and len(texts) > CAPTIONS * samples):
        raise DataError(
            f"{where} holds {len(texts):,} different labels in {samples:,} samples, such as {min(texts, key=len)!r}: these "
            "are no classes; name the right column or member for the label"
        )
    if all(NUMBER.fullmatch(text) for text in texts):
        numbers = sorted(map(int, texts))
        largest = numbers[-1] if numbers else -1
        ids = [str(number) for number in (range(largest + 1) if largest < MAX_CLASSES else numbers)]
    else:
        ids = sorted(texts)
    return to_classes(ids), {id: label for label, id in enumerate(ids)}


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
