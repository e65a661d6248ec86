"""What a commit of a ResNet50's state costs: the pause of the training, and the upload in the background.

.venv/bin/python docs/bench_commit.py            (to an embedded S3 server of its own)
"""

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from wds_train import devserver
from wds_train.checkpoint import Run
from wds_train.engine import Trainer
from wds_train.pipeline import Batch
from wds_train.presets import preset
from wds_train.state import Progress, RunManifest
from wds_train.store import S3Store

COMMITS = 5


def main() -> None:
    recipe = preset("imagenette")
    trainer = Trainer(recipe, classes=1000, steps_per_epoch=100, device=torch.device("cpu"))
    ids = np.arange(8)
    images = torch.zeros((8, 64, 64, 3), dtype=torch.uint8)
    trainer.step(Batch(0, ids, ids, images, torch.arange(8)))  # so that there is momentum to save
    with tempfile.TemporaryDirectory() as folder:
        store = S3Store("embedded", "bench", devserver.ensure_running(Path(folder)))
        fresh = RunManifest(run="bench", recipe=recipe.to_dict(), dataset={"url": "", "fingerprint": ""}, wandb_id="")
        run = Run.claim(store, fresh, print)
        stalls, uploads = [], []
        for step in range(1, COMMITS + 1):
            began = time.perf_counter()
            snapshot = replace(trainer.snapshot(), progress=Progress(step=step))
            run.commit(snapshot, {}, [])
            stalls.append(1000 * (time.perf_counter() - began))
            run.wait()
            uploads.append(time.perf_counter() - began)
        size = run.manifest.checkpoints[-1].object.bytes
        run.end("interrupted")
        devserver.stop(Path(folder))
    print(
        f"state {size / 1e6:.0f} MB, {COMMITS} commits, medians: stall {statistics.median(stalls):.0f} ms, "
        f"upload {statistics.median(uploads):.2f} s (all: {', '.join(f'{s:.2f}' for s in uploads)})"
    )


if __name__ == "__main__":
    main()
