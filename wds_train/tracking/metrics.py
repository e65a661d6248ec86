"""What a row of a run's metrics holds: a JSON object, a line of the segments on S3, and a point in Weights & Biases."""

from typing import Any

Row = dict[str, Any]
# How it went on this machine this time, and when: it differs from attempt to attempt.
PASSING = ("time/", "commit/", "s3/", "gpu/")


def repeatable(row: Row) -> Row:
    """The part of a row that a resumed and an unbroken run have alike, to the last bit."""
    return {name: value for name, value in row.items() if not name.startswith(PASSING)}
