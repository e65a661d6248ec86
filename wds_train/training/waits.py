"""The seconds that a training waits for its batches.

They decide which part of the paid time counts as waiting for data (docs/report.md).
"""

import time
from collections.abc import Iterator

import torch

from wds_train.checkpoint.clock import Clock
from wds_train.loader.batch import Batch


def time_waits(
    batches: Iterator[Batch], clock: Clock, device: torch.device
) -> Iterator[tuple[Batch, float]]:
    """Yield each batch with the seconds that this process waited for it.

    The clock counts the wait for the first batch as part of the start. Of the others it counts as
    data only the time in which the device had nothing to do: the process runs ahead of a GPU, and
    a wait costs nothing while the GPU is still at the steps before.

    Args:
        batches: The batches, on `device`.
        clock: The clock of this process's activities.
        device: The device that trains.
    """
    while True:
        # Wait for the batch.
        begin = time.perf_counter()
        queued = _mark(device)
        if clock.activity != "start":
            clock.turn("data")
        batch = next(batches)
        waited = time.perf_counter() - begin

        # Count the part of the wait in which the device was busy as steps.
        idle = min(waited, _idle_seconds(queued, device, waited))
        busy = 0.0
        if clock.activity == "data":
            busy = waited - idle
        clock.turn("steps", busy)
        yield batch, waited


def _mark(device: torch.device) -> torch.cuda.Event | None:
    """Return an event that comes when the GPU has done all its work so far; None on a CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _idle_seconds(queued: torch.cuda.Event | None, device: torch.device, waited: float) -> float:
    """Return the seconds of the wait in which the device had nothing to do.

    Args:
        queued: The end of the work that a GPU had when the wait began; None on a CPU, which has
            none.
        device: The device.
        waited: The seconds of the wait.
    """
    if queued is None:
        return waited
    # The GPU is still at that work.
    if not queued.query():
        return 0.0
    # From its end until now. The event comes at once: the GPU has only the copy of this batch.
    now = _mark(device)
    assert now is not None
    now.synchronize()
    return queued.elapsed_time(now) / 1000
