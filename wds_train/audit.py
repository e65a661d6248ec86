"""What is in a dataset: `wds-train inspect`."""

import argparse
import json
from typing import Any

import numpy as np

from wds_train.dataset import Dataset

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", metavar="DATASET", help="s3://bucket/prefix or a local directory")
    parser.add_argument("--json", action="store_true", help="as JSON")


def run_inspect(args: argparse.Namespace) -> int:
    facts = inspect(Dataset.open(args.dataset))
    print(json.dumps(facts, indent=1, ensure_ascii=False) if args.json else _table(facts))
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
    counts = np.bincount(index.label, minlength=len(dataset.manifest.classes))
    columns: dict[str, np.ndarray] = {"width": index.width, "height": index.height, "image_bytes": index.data_length}
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
    lines = [
        f"dataset      {facts['dataset']}",
        f"fingerprint  {facts['fingerprint']}",
        f"source       {facts['source']}, seed {facts['seed']}, images {facts['image_policy']}",
        f"classes      {len(facts['classes'])}: {', '.join(entry['name'] for entry in facts['classes'][:10])}",
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
    lines.append("  quantiles at " + " ".join(f"{share:>8.0%}" for share in QUANTILES))
    return "\n".join(lines)
