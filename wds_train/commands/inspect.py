"""`wds-train inspect`: what a dataset holds."""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from wds_train.commands.flags import add_dataset, dataset_url
from wds_train.console import note, readable
from wds_train.conversion.repeats import Repeats, repeat_lines
from wds_train.dataset.reader import Dataset, read_whole
from wds_train.errors import NotFound
from wds_train.schema import typed
from wds_train.tracking.contact_sheet import contact_sheet

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_dataset(parser)
    parser.add_argument("--json", action="store_true", help="as JSON")
    sheet = "also write a contact sheet, a PNG: four images of each of 20 classes"
    parser.add_argument("--grid", type=Path, metavar="FILE", help=sheet)


def run(args: argparse.Namespace) -> int:
    dataset = Dataset.open(dataset_url(args.dataset, args.bucket))
    facts = inspect(dataset)
    if args.json:
        print(json.dumps(facts, indent=1, ensure_ascii=False))
    else:
        print(_table(facts))
        for line in _repeat_lines(facts["repeats"], dataset):
            print(line)
    if args.grid:
        contact_sheet(dataset, next(iter(dataset.manifest.splits)), args.grid, _understood(facts))
    return 0


def inspect(dataset: Dataset) -> dict[str, Any]:
    """Counts, classes, bytes and quantiles of the images' sizes, from manifest and index. What the
    conversion understood of its source, and which images are there twice, is from its report, and
    None where no report says it.
    """
    manifest = dataset.manifest
    report = _report(dataset)
    return {
        "dataset": dataset.store.url,
        "fingerprint": manifest.fingerprint,
        "source": manifest.source,
        "seed": manifest.seed,
        "image_policy": manifest.image_policy,
        "understood": report.get("understood"),
        "classes": [{"id": entry.id, "name": entry.name} for entry in manifest.classes],
        "bytes": sum(split.bytes for split in manifest.splits.values()),
        "splits": {name: _split(dataset, name) for name in manifest.splits},
        "repeats": report.get("repeats"),
    }


def _understood(facts: dict[str, Any]) -> dict[str, str]:
    """Where the images and their labels came from, a line each, if the conversion said so."""
    understood = facts["understood"] or {}
    return {name: readable(understood[name]) for name in ("layout", "labels") if name in understood}


def _repeat_lines(repeats: dict[str, Any] | None, dataset: Dataset) -> list[str]:
    if repeats is None:
        return []
    return repeat_lines(typed(Repeats, repeats), held_out="hold_out" in dataset.manifest.conversion)


def _report(dataset: Dataset) -> dict[str, Any]:
    """What can be used of the report beside the manifest. A dataset is as good without: a report that
    is gone or damaged is told, and no error.
    """
    named = dataset.manifest.report
    if named is None:
        return {}
    try:
        data = read_whole(dataset.store, named)
        if hashlib.sha256(data).hexdigest() != named.sha256:
            raise ValueError("its sha256 is not the one in the manifest")
        return _checked(json.loads(data))
    except (NotFound, ValueError, RecursionError) as error:
        where = f"{dataset.store.url}/{named.name}"
        note(f"{where} cannot be read, so what the conversion saw is not known: {error}")
        return {}


def _checked(report: Any) -> dict[str, Any]:
    """The fields of a report that `inspect` shows; `ValueError` where one is not as it is written."""
    content = typed(dict[str, Any], report, "the report")
    found: dict[str, Any] = {}
    # `null` says that it is not known: of samples that hold anything, say.
    if content.get("repeats") is not None:
        typed(Repeats, content["repeats"], "repeats")
        found["repeats"] = content["repeats"]
    if content.get("understood") is not None:
        found["understood"] = typed(dict[str, Any], content["understood"], "understood")
        for name in {"layout", "labels"} & found["understood"].keys():
            typed(str, found["understood"][name], f"understood.{name}")
    return found


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
        *(f"{name:12} {text}" for name, text in _understood(facts).items()),
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
