"""`wds-train datasets` and `wds-train runs`: list what is below the bucket."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from wds_train.checkpoint import run_manifest
from wds_train.checkpoint.run_manifest import RunManifest
from wds_train.checkpoint.weight_choice import best_weights
from wds_train.commands.flags import add_bucket
from wds_train.commands.status import describe
from wds_train.console import align_columns
from wds_train.dataset import manifest as dataset_manifest
from wds_train.dataset.manifest import DatasetManifest
from wds_train.errors import AccessDenied, DataError, NotFound, RunError
from wds_train.storage.address import NAME, announce_embedded, resolve_folder
from wds_train.storage.base import Store
from wds_train.storage.open import open_store

READERS = 8  # of manifests, at a time
Row = dict[str, Any]


def add_list_arguments(parser: argparse.ArgumentParser) -> None:
    add_bucket(parser, "datasets/ and runs/ live")
    parser.add_argument("--json", action="store_true", help="as JSON")


def list_datasets(args: argparse.Namespace) -> int:
    return _list(
        args, "datasets", _read_dataset, _dataset_cells, "make one: wds-train shards SOURCE"
    )


def list_runs(args: argparse.Namespace) -> int:
    return _list(
        args, "runs", _read_run, _run_cells, "begin one: wds-train train NAME --dataset DATASET"
    )


def _list(
    args: argparse.Namespace,
    kind: str,
    read: Callable[[Store, str], Row],
    cells: Callable[[Row], list[str]],
    hint: str,
) -> int:
    """Print a row for each name below the bucket. One that cannot be read stops no others.

    Args:
        args: The arguments of the command.
        kind: "datasets" or "runs".
        read: Reads one of them.
        cells: Returns the cells of its row, after name and state.
        hint: The command that makes the first one.
    """
    address = resolve_folder(kind, args.bucket)
    announce_embedded(address, "")
    store = open_store(address)
    entries = store.list(flat=True)
    folders = [entry.key.removesuffix("/") for entry in entries if entry.key.endswith("/")]
    names = sorted(name for name in folders if NAME.fullmatch(name))

    def read_row(name: str) -> Row:
        try:
            return {"name": name, **read(store, name)}
        except NotFound:
            return {"name": name, "state": "unfinished"}
        except (DataError, RunError, AccessDenied) as error:
            return {"name": name, "state": "unusable", "error": str(error)}

    with ThreadPoolExecutor(READERS) as pool:
        rows = list(pool.map(read_row, names))

    if args.json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
    elif rows:
        table = []
        for row in rows:
            is_read = "bytes" in row
            table.append([row["name"], row["state"], *(cells(row) if is_read else [])])
        print("\n".join(align_columns(table)))
    else:
        print(f"there are no {kind} at {store.url}; {hint}")
    for row in rows:
        if "error" in row:
            print(f"{row['name']}: {row['error']}", file=sys.stderr)
    return 0


def _read_dataset(store: Store, name: str) -> Row:
    key = f"{name}/{dataset_manifest.NAME}"
    manifest = DatasetManifest.from_json(store.read(key), f"{store.url}/{key}")
    return {
        "state": "complete",
        "samples": {split: found.samples for split, found in manifest.splits.items()},
        "classes": len(manifest.classes),
        "bytes": sum(split.bytes for split in manifest.splits.values()),
        "fingerprint": manifest.fingerprint,
        "written": next(store.list(key)).written,
    }


def _dataset_cells(row: Row) -> list[str]:
    samples = ", ".join(f"{split} {count:,}" for split, count in row["samples"].items())
    return [samples, f"{row['classes']:,} classes", _megabytes(row), _age(row["written"])]


def _read_run(store: Store, name: str) -> Row:
    key = f"{name}/{run_manifest.NAME}"
    manifest = RunManifest.from_json(store.read(key), f"{store.url}/{key}")
    status = describe(manifest, time.time(), None)
    best = best_weights(manifest)
    return {
        "state": status["status"],
        "epochs": status["epochs"],
        "of_epochs": status["of_epochs"],
        "top1": best.top1 if best else None,
        "recipe": manifest.settings.name,
        "model": manifest.settings.model.name,
        "dataset": manifest.dataset.get("url", ""),
        "bytes": sum(named.bytes for named in manifest.objects),
        "written": manifest.written,
    }


def _run_cells(row: Row) -> list[str]:
    epochs = f"{row['epochs']}/{row['of_epochs']} epochs"
    top1 = "-" if row["top1"] is None else f"{row['top1']:.2f} %"
    dataset = row["dataset"].rpartition("/")[2]
    made_of = f"{row['model']} on {dataset}, {row['recipe']}"
    return [epochs, top1, made_of, _megabytes(row), _age(row["written"])]


def _megabytes(row: Row) -> str:
    return f"{row['bytes'] / 1e6:,.1f} MB"


def _age(then: float) -> str:
    """Return how long ago a time was, in one unit."""
    seconds = max(0.0, time.time() - then)
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
