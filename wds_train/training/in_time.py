"""Batches that a training waits for no longer than it can."""

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait

from wds_train.data.batch import Batch
from wds_train.training.stop import StopRequest

DATA_SECONDS = 10.0  # for the batch that is waited for when the training is asked to stop


class Stopped(Exception):
    """Asked to stop, between two steps or two batches of a validation."""


def in_time(batches: Iterable[Batch], stop: StopRequest) -> Iterator[Batch]:
    """The batches, read in a thread: a training that was asked to stop waits for the next one DATA_SECONDS at most. The run's
    store can take the last commit while the dataset's hangs.
    """
    reader, items = ThreadPoolExecutor(1, "batches"), iter(batches)
    try:
        while (batch := _awaited(reader.submit(next, items, None), stop)) is not None:
            yield batch
    finally:
        reader.shutdown(wait=False)


def _awaited(coming: Future[Batch | None], stop: StopRequest) -> Batch | None:
    until = float("inf")
    while not wait([coming], 0.5).done:
        if stop.cause:
            until = min(until, time.monotonic() + DATA_SECONDS)
        if time.monotonic() > until:
            raise Stopped
    return coming.result()
