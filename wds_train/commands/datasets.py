"""`wds-train datasets`: the datasets of the bucket."""

import argparse

from wds_train.commands.listing import Row, add_list, age, list_all
from wds_train.dataset.manifest import NAME, DatasetManifest
from wds_train.storage.base import Store


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_list(parser)


def run(args: argparse.Namespace) -> int:
    return list_all(args, "datasets", _read, _cells, "make one: wds-train shards SOURCE")


def _read(store: Store, name: str) -> Row:
    key = f"{name}/{NAME}"
    manifest = DatasetManifest.from_json(store.read(key), f"{store.url}/{key}")
    return {
        "state": "complete",
        "samples": {split: found.samples for split, found in manifest.splits.items()},
        "classes": len(manifest.classes),
        "bytes": sum(split.bytes for split in manifest.splits.values()),
        "fingerprint": manifest.fingerprint,
        "written": next(store.list(key)).written,
    }


def _cells(row: Row) -> list[str]:
    samples = ", ".join(f"{split} {count:,}" for split, count in row["samples"].items())
    return [samples, f"{row['classes']:,} classes", f"{row['bytes'] / 1e6:,.1f} MB", age(row["written"])]
