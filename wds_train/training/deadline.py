"""Read batches in a thread, so that a request to stop ends the wait for one.

`training/session.py` reads its training and validation batches by it.
"""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait

from wds_train.errors import WorkerDied
from wds_train.loader.batch import Batch
from wds_train.loader.eval_loader import EvalLoader
from wds_train.loader.train_loader import TrainLoader
from wds_train.training.stop_request import StopRequest

# Between two looks at the request to stop, and at the workers.
LOOK_SECONDS = 0.5
# For the next batch once the training is asked to stop. The rest of the grace is for the commit.
DATA_SECONDS = 10.0
# After the death of a worker, for the signal that killed it to reach this process, too.
SIGNAL_SECONDS = 1.0


class Stopped(Exception):
    """The training was asked to stop, between two steps or two batches of a validation."""


def read_until_stopped(loader: TrainLoader | EvalLoader, stop: StopRequest) -> Iterator[Batch]:
    """Yield the batches of `loader`, which are read in a thread.

    A training that was asked to stop waits for the next one DATA_SECONDS at most: the run's store
    can take the last commit while the dataset's hangs.

    Args:
        loader: The loader, whose workers run.
        stop: The request to stop.

    Raises:
        Stopped: The training was asked to stop, and the batch did not come, or its worker was
            killed by the same signal.
        WorkerDied: A worker has died by itself.
    """
    # watch.py looks for threads of this name, to say where a batch hangs.
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
        # Not waited for: it may hang in a store that does not answer.
        reader.shutdown(wait=False)


def _await_or_stop(
    coming: Future[Batch | None], loader: TrainLoader | EvalLoader, stop: StopRequest
) -> Batch | None:
    """Return the batch that is coming; a worker's death counts as a stop if a signal follows it."""
    try:
        return _await(coming, loader, stop)
    except WorkerDied:
        # Ctrl-C, and the end of a Slurm job, reach all processes at one moment.
        end = time.monotonic() + SIGNAL_SECONDS
        while not stop.cause and time.monotonic() < end:
            time.sleep(0.05)
        if stop.cause:
            raise Stopped from None
        raise


def _await(
    coming: Future[Batch | None], loader: TrainLoader | EvalLoader, stop: StopRequest
) -> Batch | None:
    """Return the batch that is coming; None after the last."""
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
