"""Batches that a training waits for no longer than it can."""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait

from wds_train.errors import WorkerDied
from wds_train.loader.batch import Batch
from wds_train.loader.eval_loader import EvalLoader
from wds_train.loader.train_loader import TrainLoader
from wds_train.training.stop_request import StopRequest

LOOK_SECONDS = 0.5  # between two looks at the request to stop, and at the workers
DATA_SECONDS = 10.0  # for the batch that is waited for when the training is asked to stop
# After the death of a worker, for the signal to come that has ended it and this process, too.
SIGNAL_SECONDS = 1.0


class Stopped(Exception):
    """Asked to stop, between two steps or two batches of a validation."""


def read_until_stopped(loader: TrainLoader | EvalLoader, stop: StopRequest) -> Iterator[Batch]:
    """Yield the batches of `loader`, which are read in a thread.

    A training that was asked to stop waits for the next one DATA_SECONDS at most: the run's store
    can take the last commit while the dataset's hangs.

    Raises:
        Stopped: The training was asked to stop, and the batch did not come, or its worker was ended
            by the same signal.
        WorkerDied: A worker has died by itself.
    """
    reader = ThreadPoolExecutor(1, "batches")
    batches = iter(loader)
    try:
        while True:
            coming = reader.submit(next, batches, None)
            batch = _await_or_stop(coming, loader, stop)
            if batch is None:
                return
            yield batch
    finally:
        reader.shutdown(wait=False)


def _await_or_stop(
    coming: Future[Batch | None], loader: TrainLoader | EvalLoader, stop: StopRequest
) -> Batch | None:
    """Return the batch that is coming; a worker's death counts as a stop if a signal follows it."""
    try:
        return _await(coming, loader, stop)
    except WorkerDied:
        end = time.monotonic() + SIGNAL_SECONDS
        while not stop.cause and time.monotonic() < end:
            time.sleep(0.05)
        if stop.cause:
            raise Stopped from None
        raise


def _await(
    coming: Future[Batch | None], loader: TrainLoader | EvalLoader, stop: StopRequest
) -> Batch | None:
    until = float("inf")
    while not wait([coming], LOOK_SECONDS).done:
        if stop.cause:
            until = min(until, time.monotonic() + DATA_SECONDS)
        if time.monotonic() > until:
            raise Stopped
        # A worker that was killed in the middle of a message leaves the reading thread waiting for
        # its end.
        loader.check_workers()
    return coming.result()
