"""The cost of committing a training's state: the pause of the training, and the upload.

The state is a ResNet50's; it goes to an embedded S3 server of the benchmark's own.

    .venv/bin/python -m benchmarks.commit
"""

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.train_rates import random_batch
from wds_train.checkpoint.run import Run
from wds_train.checkpoint.run_manifest import Progress, RunManifest
from wds_train.config.presets import preset
from wds_train.storage import embedded
from wds_train.storage.base import Store
from wds_train.storage.s3 import S3Store
from wds_train.training.engine import Trainer

COMMITS = 5  # that are measured; medians over them are printed


def bench_commit(trainer: Trainer, store: Store) -> dict[str, Any]:
    """Commit a training's state `COMMITS` times, each after the upload of the one before.

    Args:
        trainer: The training. It has made a step, so that there is momentum to save.
        store: Where the run goes; it must not hold one yet.

    Returns:
        `mb`, the state's size in MB, and medians: `stall_ms`, until the training may go on, and
        `upload_s`, until the checkpoint is committed.
    """
    # Start a run, as a training does.
    dataset = {"url": "", "fingerprint": ""}
    fresh = RunManifest(run="bench", recipe=trainer.recipe.to_dict(), dataset=dataset, wandb_id="")
    run = Run.claim(store, fresh, print)

    # The pause ends when the committer has the snapshot; the upload goes on in the background.
    stalls = []
    uploads = []
    for step in range(1, COMMITS + 1):
        began = time.perf_counter()
        snapshot = trainer.snapshot()
        assert snapshot is not None, "one process alone leads"
        run.committer.commit(replace(snapshot, progress=Progress(step=step)), {}, [])
        stalls.append(1000 * (time.perf_counter() - began))
        run.committer.wait()
        uploads.append(time.perf_counter() - began)

    size = run.manifest.checkpoints[-1].object.bytes
    run.end("interrupted")
    return {
        "mb": round(size / 1e6, 1),
        "stall_ms": round(statistics.median(stalls), 1),
        "upload_s": round(statistics.median(uploads), 3),
    }


def main() -> None:
    """Measure the commits of one training to an embedded S3 server, and print the figures."""
    trainer = Trainer(
        preset("imagenette"), classes=1000, steps_per_epoch=100, device=torch.device("cpu")
    )
    trainer.step(random_batch(8, 64, trainer.device))
    with tempfile.TemporaryDirectory() as folder:
        store = S3Store("embedded", "bench", embedded.ensure_running(Path(folder)))
        figures = bench_commit(trainer, store)
        embedded.stop(Path(folder))
    print(f"{COMMITS} commits, medians: {figures}")


if __name__ == "__main__":
    main()
