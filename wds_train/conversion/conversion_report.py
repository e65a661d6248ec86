"""Notes on samples that are not in the dataset as they are in the source, and why.

They are collected during a conversion, judged, printed, and kept in `report.json`.
"""

import json
import math
import os
import sys
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


@dataclass
class Cause:
    """A cause that several notes have.

    Attributes:
        text: The cause.
        example: The origin of the first of them.
        count: How many notes.
    """

    text: str
    example: str
    count: int = 0


def count_causes(notes: Iterable[Note]) -> list[Cause]:
    """Return the causes of notes, the most frequent first."""
    causes: dict[str, Cause] = {}
    for note in notes:
        cause = causes.setdefault(note.cause, Cause(note.cause, note.origin))
        cause.count += 1
    return sorted(causes.values(), key=lambda cause: -cause.count)


def select_left_out(notes: Iterable[Note]) -> list[Note]:
    """Return the notes on unreadable samples, which count against the tolerance."""
    return [note for note in notes if note.what == "left out"]


def reasons(notes: Sequence[Note], most: int = 5) -> str:
    """Return why samples are left out or ignored, for the end of a sentence.

    Args:
        notes: All notes.
        most: The most causes to name.

    Returns:
        The causes, most frequent first, each with an example; empty if there are none.
    """
    absent = [note for note in notes if note.what in ("left out", "ignored")]
    listed = []
    for cause in count_causes(absent)[:most]:
        listed.append(f"{cause.count} x {cause.text} ({cause.example})")
    if not listed:
        return ""
    return f": {'; '.join(listed)}"


def report_json(
    notes: Iterable[Note], reencoded: int, extra: Mapping[str, Any] | None = None
) -> bytes:
    """Return the content of `report.json`.

    Args:
        notes: Every file and sample that is not in the dataset as it is in the source, and why.
        reencoded: How many images were encoded again.
        extra: More to keep there: how the source was understood, what is repeated.
    """
    # Sorted, so that the same conversion writes the same bytes however many processes it has.
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
    unreadable = select_left_out(notes)
    # 0.29 * 100 is 28.999999999999996: of 100 samples a share of 0.29 would allow 28.
    allowed = max_bad * found + 1e-9
    if len(unreadable) <= allowed:
        return

    # The message names the share that would do, rounded up to a tenth of a percent.
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
    stream = sys.stderr if number == 2 else sys.stdout
    try:
        print(line, file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def print_notes(notes: list[Note], report: str = "report.json", most: int = 20) -> None:
    """Print notes: a line for each unreadable sample, and one for all others of one kind.

    Args:
        notes: All notes.
        report: The object that holds all of them.
        most: The most lines to print.
    """
    # Group the notes. Those of one kind share a line; each unreadable sample has its own, by its
    # number.
    alike: dict[object, list[Note]] = {}
    for number, note in enumerate(notes):
        kind: object = (note.what, note.split, note.cause)
        if note.what == "left out":
            kind = number
        alike.setdefault(kind, []).append(note)

    # Print a line for each group, as many as there is room for.
    left = len(notes)
    for group in list(alike.values())[:most]:
        first = group[0]
        left -= len(group)
        also = f" and {len(group) - 1:,} more" if len(group) > 1 else ""
        say(f"{first.what:9} {first.split:6} {first.origin}{also}: {first.cause}")
    if left:
        say(f"... and {left:,} more; {report} beside the manifest has all of them")
