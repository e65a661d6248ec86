"""`wds-train inspect`: what a dataset holds."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from wds_train.commands.arguments import add_dataset, dataset_url
from wds_train.data.dataset import Dataset
from wds_train.tracking.contact_sheet import contact_sheet

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_dataset(parser)
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument("--grid", type=Path, metavar="FILE", help="also write a contact sheet of the images, a PNG")


def run(args: argparse.Namespace) -> int:
    dataset = Dataset.open(dataset_url(args.dataset, args.bucket))
    facts = inspect(dataset)
    print(json.dumps(facts, indent=1, ensure_ascii=False) if args.json else _table(facts))
    if args.grid:
        contact_sheet(dataset, next(iter(dataset.manifest.splits)), args.grid)
    return 0


def inspect(dataset: Dataset) -> dict[str, Any]:
    """Counts, classes, bytes and quantiles of the images' sizes, from manifest and index alone."""
    manifest = dataset.manifest
    return {
        "dataset": dataset.store.url,
        "fingerprint": manifest.fingerprint,
        "source": manifest.source,
        "seed": manifest.seed,
        "image_policy": manifest.image_policy,
        "classes": [{"id": entry.id, "name": entry.name} for entry in manifest.classes],
        "bytes": sum(split.bytes for split in manifest.splits.values()),
        "splits": {name: _split(dataset, name) for name in manifest.splits},
    }


def _split(dataset: Dataset, name: str) -> dict[str, Any]:
    split, index = dataset.manifest.split(name), dataset.split(name).index
    counts = np.bincount(index.label[:], minlength=len(dataset.manifest.classes))
    columns: dict[str, np.ndarray] = {
        "width": index.width[:],
        "height": index.height[:],
        "image_bytes": index.data_length[:],
    }
    return {
        "samples": split.samples,
        "shards": len(split.shards),
        "bytes": split.bytes,
        "per_class": {entry.id: int(n) for entry, n in zip(dataset.manifest.classes, counts, strict=True)},
        "quantiles": {"of": QUANTILES} | {name: _quantiles(column) for name, column in columns.items()},
    }


def _quantiles(column: np.ndarray) -> list[int]:
    return [int(value) for value in np.quantile(column, QUANTILES)] if len(column) else []


def _table(facts: dict[str, Any]) -> str:
    names = ", ".join(entry["name"].partition(",")[0] for entry in facts["classes"][:10])
    lines = [
        f"dataset      {facts['dataset']}",
        f"fingerprint  {facts['fingerprint']}",
        f"source       {facts['source']}, seed {facts['seed']}, images {facts['image_policy']}",
        f"classes      {len(facts['classes'])}: {names}" + (", ..." if len(facts["classes"]) > 10 else ""),
    ]
    for name, split in facts["splits"].items():
        counts = split["per_class"].values()
        lines.append(
            f"{name:12} {split['samples']:,} samples, {split['shards']} shards, {split['bytes'] / 1e6:,.1f} MB, "
            f"{min(counts):,}..{max(counts):,} a class"
        )
        sizes = split["quantiles"]
        lines += [
            f"  {column:12}" + " ".join(f"{value:>9,}" for value in sizes[column])
            for column in ("width", "height", "image_bytes")
        ]
    lines.append("  quantile    " + " ".join(f"{share:>9.0%}" for share in QUANTILES))
    return "\n".join(lines)
