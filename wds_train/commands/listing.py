"""What `datasets` and `runs` share: a row for each manifest below the bucket, read several at a time."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from typing import Any

from wds_train.commands.flags import add_bucket
from wds_train.errors import AccessDenied, DataError, NotFound, RunError
from wds_train.storage.address import NAME, all_of, announced
from wds_train.storage.base import Store
from wds_train.storage.open import open_store

READERS = 8  # of manifests, at a time
Row = dict[str, Any]


def add_list(parser: argparse.ArgumentParser) -> None:
    add_bucket(parser, "datasets/ and runs/ live")
    parser.add_argument("--json", action="store_true", help="as JSON")


def list_all(
    args: argparse.Namespace, kind: str, read: Callable[[Store, str], Row], cells: Callable[[Row], list[str]], hint: str
) -> int:
    """Print what `read` finds at each name of `kind`, as `cells` show it; one that is damaged stops no others."""
    store = open_store(announced(all_of(kind, args.bucket), ""))
    folders = [entry.key.removesuffix("/") for entry in store.list(flat=True) if entry.key.endswith("/")]
    names = sorted(name for name in folders if NAME.fullmatch(name))

    def row(name: str) -> Row:
        try:
            return {"name": name, **read(store, name)}
        except NotFound:
            return {"name": name, "state": "unfinished"}
        except (DataError, RunError, AccessDenied) as error:
            return {"name": name, "state": "unusable", "error": str(error)}

    with ThreadPoolExecutor(READERS) as pool:
        rows = [*pool.map(row, names)]
    if args.json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
    elif rows:
        _print_table([[each["name"], each["state"], *(cells(each) if "bytes" in each else [])] for each in rows])
    else:
        print(f"there are no {kind} at {store.url}; {hint}")
    for each in rows:
        if "error" in each:
            print(f"{each['name']}: {each['error']}", file=sys.stderr)
    return 0


def age(then: float) -> str:
    """How long ago that is, in one unit."""
    seconds = max(0.0, time.time() - then)
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def _print_table(lines: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip_longest(*lines, fillvalue="")]
    for line in lines:
        print("  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=False)).rstrip())
