"""Rows of a run's metrics.

A row is a JSON object: a line of the segments on S3, and a point in Weights & Biases.
"""

from typing import Any

Row = dict[str, Any]
# Times and speeds of this machine, which differ from attempt to attempt.
PASSING = ("time/", "commit/", "s3/", "gpu/")


def repeatable(row: Row) -> Row:
    """Return the part of a row that is bit-equal in a resumed and an uninterrupted run."""
    return {name: value for name, value in row.items() if not name.startswith(PASSING)}
