"""The seconds that a training waits for its batches."""

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
        begin = time.perf_counter()
        queued = _mark(device)
        if clock.activity != "start":
            clock.turn("data")
        batch = next(batches)
        waited = time.perf_counter() - begin
        busy = waited - min(waited, _idle_seconds(queued, device, waited))
        clock.turn("steps", busy if clock.activity == "data" else 0.0)
        yield batch, waited


def _mark(device: torch.device) -> torch.cuda.Event | None:
    """Return an event that comes when a GPU has done all that it was given so far.

    None on a CPU, which runs ahead of nothing.
    """
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _idle_seconds(queued: torch.cuda.Event | None, device: torch.device, waited: float) -> float:
    """Return for how many of the seconds that were waited the device had nothing to do.

    A CPU has nothing to do in all of them.
    """
    if queued is None:
        return waited
    if not queued.query():
        return 0.0
    now = _mark(device)
    assert now is not None
    now.synchronize()  # at once: the GPU has nothing before it but the copy of this batch
    return queued.elapsed_time(now) / 1000
