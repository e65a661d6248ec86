"""`wds-train inspect`: show the contents of a dataset."""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from wds_train.commands.flags import add_dataset, resolve_dataset
from wds_train.console import align_columns, note, readable
from wds_train.conversion.repeats import Repeats, repeat_lines
from wds_train.dataset.reader import Dataset, read_whole
from wds_train.errors import NotFound
from wds_train.schema import typed
from wds_train.tracking.contact_sheet import contact_sheet

CLASSES = 10  # of which the names are shown
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_dataset(parser)
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument(
        "--grid",
        type=Path,
        metavar="FILE",
        help="also write a contact sheet, a PNG: four images of each of 20 classes",
    )


def run(args: argparse.Namespace) -> int:
    dataset = Dataset.open(resolve_dataset(args.dataset, args.bucket))
    facts = inspect(dataset)
    if args.json:
        print(json.dumps(facts, indent=1, ensure_ascii=False))
    else:
        print("\n".join(_lines(facts)))
        for line in _repeat_lines(facts["repeats"], dataset):
            print(line)
    if args.grid:
        first_split = next(iter(dataset.manifest.splits))
        contact_sheet(dataset, first_split, args.grid, _understood(facts))
    return 0


def inspect(dataset: Dataset) -> dict[str, Any]:
    """Return what `inspect --json` prints.

    Counts, classes, bytes and quantiles of the images' sizes come from manifest and index. What the
    conversion understood of its source, and which images are there twice, come from its report;
    they are None if the dataset has none.
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
    """Return where images and labels came from, a line each, as far as the conversion said so."""
    understood = facts["understood"] or {}
    return {name: readable(understood[name]) for name in ("layout", "labels") if name in understood}


def _repeat_lines(repeats: dict[str, Any] | None, dataset: Dataset) -> list[str]:
    if repeats is None:
        return []
    return repeat_lines(typed(Repeats, repeats), held_out="hold_out" in dataset.manifest.conversion)


def _report(dataset: Dataset) -> dict[str, Any]:
    """Return the usable fields of the conversion's report.

    A dataset works without its report: one that is gone or damaged is noted, and is no error.
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
    """Return the fields of a report that `inspect` shows.

    Raises:
        ValueError: A field is not of its type.
    """
    content = typed(dict[str, Any], report, "the report")
    found: dict[str, Any] = {}
    # `null` means not known, as for samples that may hold anything.
    if content.get("repeats") is not None:
        typed(Repeats, content["repeats"], "repeats")
        found["repeats"] = content["repeats"]
    if content.get("understood") is not None:
        found["understood"] = typed(dict[str, Any], content["understood"], "understood")
        for name in {"layout", "labels"} & found["understood"].keys():
            typed(str, found["understood"][name], f"understood.{name}")
    return found


def _split(dataset: Dataset, name: str) -> dict[str, Any]:
    split = dataset.manifest.split(name)
    index = dataset.split(name).index
    classes = dataset.manifest.classes
    counts = np.bincount(index.label[:], minlength=len(classes))
    return {
        "samples": split.samples,
        "shards": len(split.shards),
        "bytes": split.bytes,
        "per_class": {entry.id: int(n) for entry, n in zip(classes, counts, strict=True)},
        "quantiles": {
            "of": QUANTILES,
            "width": _quantiles(index.width[:]),
            "height": _quantiles(index.height[:]),
            "image_bytes": _quantiles(index.data_length[:]),
        },
    }


def _quantiles(column: np.ndarray) -> list[int]:
    if not len(column):
        return []
    return [int(value) for value in np.quantile(column, QUANTILES)]


def _lines(facts: dict[str, Any]) -> list[str]:
    """Return the facts as a table for people."""
    classes = facts["classes"]
    names = [entry["name"].partition(",")[0] for entry in classes[:CLASSES]]
    if len(classes) > CLASSES:
        names.append("...")
    rows = [
        ["dataset", facts["dataset"]],
        ["fingerprint", facts["fingerprint"]],
        ["source", f"{facts['source']}, seed {facts['seed']}, images {facts['image_policy']}"],
        *([name, text] for name, text in _understood(facts).items()),
        ["classes", f"{len(classes)}: {', '.join(names)}"],
    ]
    for name, split in facts["splits"].items():
        counts = split["per_class"].values()
        text = (
            f"{split['samples']:,} samples, {split['shards']} shards, {split['bytes'] / 1e6:,.1f} "
            "MB, "
            f"{min(counts):,}..{max(counts):,} a class"
        )
        rows.append([name, text])
        for column in ("width", "height", "image_bytes"):
            sizes = [f"{value:>9,}" for value in split["quantiles"][column]]
            rows.append([f"  {column}", " ".join(sizes)])
    rows.append(["  quantile", " ".join(f"{share:>9.0%}" for share in QUANTILES)])
    return align_columns(rows)
