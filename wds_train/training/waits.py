"""How long a training waits for its batches."""

import time
from collections.abc import Iterator

import torch

from wds_train.checkpoint.clock import Clock
from wds_train.loader.batch import Batch


def timed(batches: Iterator[Batch], clock: Clock, device: torch.device) -> Iterator[tuple[Batch, float]]:
    """Each batch, which is on `device`, with the seconds that this process waited for it.

    The clock counts the wait for the first batch as part of the start. Of the others it counts as data only the time in
    which the device had nothing to do: the process runs ahead of a GPU, and what it waits for while the GPU is still at
    the steps before costs nothing.
    """
    while True:
        begin = time.perf_counter()
        queued = _mark(device)
        if clock.activity != "start":
            clock.turn("data")
        batch = next(batches)
        waited = time.perf_counter() - begin
        busy = waited - min(waited, _idle(queued, device, waited))
        clock.turn("steps", busy if clock.activity == "data" else 0.0)
        yield batch, waited


def _mark(device: torch.device) -> torch.cuda.Event | None:
    """What comes to pass on a GPU when it has done all that it was given so far; None elsewhere."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _idle(queued: torch.cuda.Event | None, device: torch.device, waited: float) -> float:
    """For how many of the seconds that were waited the device had nothing to do; a CPU for all of them."""
    if queued is None:
        return waited
    if not queued.query():
        return 0.0
    now = _mark(device)
    assert now is not None
    now.synchronize()  # at once: the GPU has nothing before it but the copy of this batch
    return queued.elapsed_time(now) / 1000
