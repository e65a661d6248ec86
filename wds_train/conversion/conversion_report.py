"""What is not in the dataset as it is in the source, and why: collected on the way, judged, printed, and kept beside the manifest."""

import itertools
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
    """A file or sample that is not in the dataset as the source holds it. `what`: `left out` (counts against the
    tolerance), `ignored` (no sample at all), `altered` (encoded anew), or `kept` (untouched, but odd).
    """

    split: str
    origin: str
    what: str
    cause: str


def reasons(notes: Sequence[Note], most: int = 5) -> str:
    """Why what is left out or ignored is: the causes, most frequent first, each with an example."""
    causes = Counter(note.cause for note in notes if note.what in ("left out", "ignored"))
    example = {note.cause: note.origin for note in reversed(notes)}
    told = [f"{count} x {cause} ({example[cause]})" for cause, count in causes.most_common(most)]
    return f": {'; '.join(told)}" if told else ""


def report_json(notes: Iterable[Note], reencoded: int, extra: Mapping[str, Any] | None = None) -> bytes:
    """Return the content of `report.json`.

    Args:
        notes: Every file and sample that is not in the dataset as it is in the source, and why.
        reencoded: How many images were encoded anew.
        extra: More to keep there: how the source was understood, what is repeated.
    """
    rows = [vars(note) for note in sorted(notes, key=lambda note: (note.what, note.split, note.origin, note.cause))]
    content = {"reencoded": reencoded, **(extra or {}), "samples": rows}
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def judge(notes: list[Note], found: int, max_bad: float) -> None:
    """Stop when more was left out than may be. `found`: all samples that the source's scan met."""
    bad = [note for note in notes if note.what == "left out"]
    if len(bad) <= max_bad * found + 1e-9:  # 0.07 * 100 is 7.000000000000001, and 0.29 * 100 is 28.999999999999996
        return
    print_notes(bad)
    if len(bad) >= found:
        raise DataError(f"none of {found} samples can be used{reasons(bad)}; repair them")
    raise DataError(
        f"{len(bad)} samples cannot be used, of {found} at most {int(max_bad * found + 1e-9)} may{reasons(bad, 1)}; repair or remove "
        f"them, or leave them out: --max-bad {math.ceil(len(bad) / found * 1000) / 1000:g}"
    )


def say(line: str, number: int = 1) -> None:
    """A line for the person, on stdout or on stderr. A conversion goes on where nobody reads it any more (`| head`), and where the
    disk of its log is full; from then on nothing is said.
    """
    try:
        print(line, file=sys.stdout if number == 1 else sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def print_notes(notes: list[Note], report: str = "report.json", most: int = 20) -> None:
    """A line for each of the notes that are left out, and one for all others of a split with the same cause."""
    alike: dict[object, list[Note]] = {}
    for number, note in enumerate(notes):
        key = number if note.what == "left out" else (note.what, note.split, note.cause)
        alike.setdefault(key, []).append(note)
    for first, *others in itertools.islice(alike.values(), most):
        also = f" and {len(others):,} more" if others else ""
        say(f"{first.what:9} {first.split:6} {first.origin}{also}: {first.cause}")
    if left := sum(map(len, itertools.islice(alike.values(), most, None))):
        say(f"... and {left:,} more; {report} beside the manifest has all of them")
