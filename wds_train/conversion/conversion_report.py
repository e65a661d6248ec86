"""Notes on samples that are not in the dataset as they are in the source, and why.

They are collected during a conversion, judged, printed, and kept in `report.json`.
"""

import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wds_train.errors import DataError


@dataclass(frozen=True)
class Note:
    """A file or sample that is not in the dataset as the source holds it.

    Attributes:
        split: Its split; empty for what belongs to none.
        origin: Its path or key.
        what: `left out` (unreadable: counts against the tolerance), `ignored` (no sample at all),
            `altered` (encoded again), or `kept` (untouched, but odd).
        cause: Why.
    """

    split: str
    origin: str
    what: str
    cause: str


def reasons(notes: Sequence[Note], most: int = 5) -> str:
    """Return why samples are left out or ignored, for the end of a sentence.

    Args:
        notes: All notes.
        most: The most causes to name.

    Returns:
        The causes, most frequent first, each with an example; empty if there are none.
    """
    causes = Counter(note.cause for note in notes if note.what in ("left out", "ignored"))
    examples = {note.cause: note.origin for note in reversed(notes)}  # the first of each cause
    listed = [f"{count} x {cause} ({examples[cause]})" for cause, count in causes.most_common(most)]
    return f": {'; '.join(listed)}" if listed else ""


def report_json(
    notes: Iterable[Note], reencoded: int, extra: Mapping[str, Any] | None = None
) -> bytes:
    """Return the content of `report.json`.

    Args:
        notes: Every file and sample that is not in the dataset as it is in the source, and why.
        reencoded: How many images were encoded again.
        extra: More to keep there: how the source was understood, what is repeated.
    """
    ordered = sorted(notes, key=lambda note: (note.what, note.split, note.origin, note.cause))
    content = {
        "reencoded": reencoded,
        **(extra or {}),
        "samples": [vars(note) for note in ordered],
    }
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace")


def judge(notes: list[Note], found: int, max_bad: float) -> None:
    """Raise `DataError` when more samples are unreadable than the tolerance allows.

    Args:
        notes: All notes.
        found: All samples that the source's scan found, readable or not.
        max_bad: The share of them that may be unreadable.
    """
    unreadable = [note for note in notes if note.what == "left out"]
    # 0.07 * 100 is 7.000000000000001, and 0.29 * 100 is 28.999999999999996
    allowed = max_bad * found + 1e-9
    if len(unreadable) <= allowed:
        return
    print_notes(unreadable)
    if len(unreadable) >= found:
        raise DataError(f"none of {found} samples can be used{reasons(unreadable)}; repair them")
    needed = math.ceil(len(unreadable) / found * 1000) / 1000
    raise DataError(
        f"{len(unreadable)} samples cannot be used, of {found} at most {int(allowed)} may"
        f"{reasons(unreadable, 1)}; repair or remove them, or leave them out: --max-bad {needed:g}"
    )


def say(line: str, number: int = 1) -> None:
    """Print a line for the person.

    A conversion goes on where nobody reads its output any more (`| head`), and where the disk of
    its log is full; from then on its output is discarded.

    Args:
        line: The text.
        number: The file descriptor: 1 for stdout, 2 for stderr.
    """
    try:
        print(line, file=sys.stdout if number == 1 else sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def print_notes(notes: list[Note], report: str = "report.json", most: int = 20) -> None:
    """Print notes: a line for each unreadable sample, and one for all others of one kind.

    Args:
        notes: All notes.
        report: The object that holds all of them.
        most: The most lines to print.
    """
    alike: dict[object, list[Note]] = {}
    for number, note in enumerate(notes):
        # The number makes each unreadable sample a kind of its own.
        kind = number if note.what == "left out" else (note.what, note.split, note.cause)
        alike.setdefault(kind, []).append(note)
    groups = list(alike.values())
    for first, *others in groups[:most]:
        also = f" and {len(others):,} more" if others else ""
        say(f"{first.what:9} {first.split:6} {first.origin}{also}: {first.cause}")
    left = sum(len(group) for group in groups[most:])
    if left:
        say(f"... and {left:,} more; {report} beside the manifest has all of them")
