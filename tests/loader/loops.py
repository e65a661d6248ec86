"""A person's training loop, as processes that are killed."""

import json
import os
import signal
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from wds_train import TrainLoader

BATCH, SEED, EPOCHS, SIZE = 64, 3, 2, 8


def loop(dataset: str, folder: Path, rank: int, world: int, dies_at: int | None) -> None:
    """Trains nothing, but notes the samples of each step and, as a checkpoint every fifth step, the loader's state."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/meet",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=120),
        )
    loader = TrainLoader(dataset, BATCH, epochs=EPOCHS, size=SIZE, seed=SEED, workers=1, flip=0)
    state = folder / "state.json"
    if state.exists():
        loader.load_state_dict(json.loads(state.read_text()))
    with (folder / f"samples-{world}-{rank}.txt").open("a") as notes:
        for batch in loader:
            notes.write(
                f"{json.dumps([batch.step, batch.epoch, batch.ids.tolist(), int(batch.images.sum())])}\n"
            )
            notes.flush()
            if world > 1:
                dist.all_reduce(torch.zeros(1))  # a step's gradients
            if loader.step % 5 == 0 and rank == 0:
                partial = folder / "state.partial"
                partial.write_text(json.dumps(loader.state_dict()))
                partial.replace(state)
            if batch.step == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
