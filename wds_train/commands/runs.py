"""`wds-train runs`: the runs of the bucket."""

import argparse
import time

from wds_train.checkpoint.run_manifest import NAME, RunManifest
from wds_train.checkpoint.weight_choice import best_weights
from wds_train.commands.listing import Row, add_list, age, list_all
from wds_train.commands.status import describe
from wds_train.storage.base import Store


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_list(parser)


def run(args: argparse.Namespace) -> int:
    return list_all(args, "runs", _read, _cells, "begin one: wds-train train NAME --dataset DATASET")


def _read(store: Store, name: str) -> Row:
    key = f"{name}/{NAME}"
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


def _cells(row: Row) -> list[str]:
    top1 = "-" if row["top1"] is None else f"{row['top1']:.2f} %"
    made_of = f"{row['model']} on {row['dataset'].rpartition('/')[2]}, {row['recipe']}"
    epochs = f"{row['epochs']}/{row['of_epochs']} epochs"
    return [epochs, top1, made_of, f"{row['bytes'] / 1e6:,.1f} MB", age(row["written"])]
