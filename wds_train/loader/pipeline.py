"""The pipeline from a read plan to batches. A batch goes through this inside one loader worker:

    requests   (plan.py)     for every lane of this worker, the windows that come next (order.py),
                             in the order of the step that first needs them:
                             Request(step, lane, epoch, ids)
    fetch      (fetch.py)    ranged GETs of whole blocks by a few threads, a bounded number of bytes
                             ahead; every sample's CRC is checked, and a sample that fails it is
                             fetched again: Fetched(request, records)
    parts      (plan.py)     step by step, the next samples of each lane:
                             Part(step, epoch, positions, ids, records)
    decode     (decoder.py)  crop, resize and flip straight into the worker's slot of shared memory,
                             then the policies of the recipe, in place: Decoded

and through this in the training process:

    merge                    the parts of one step, of all workers, copied in lane order (into
                             pinned memory, for a GPU): Batch

The stages are a `webdataset.DataPipeline` behind `webdataset.WebLoader`. They consume nothing that
a state would have to hold: a loader starts at any step, and its batches are the same for every
number of ranks and workers.
"""

import itertools
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import webdataset as wds

from wds_train.dataset.reader import SplitReader
from wds_train.errors import WdsTrainError
from wds_train.loader.batch import Batch, empty_images
from wds_train.loader.cache import BlockCache
from wds_train.loader.decoder import PREFETCHED_PARTS, Decoded, Decoder, OrderAlone, Slots
from wds_train.loader.fetch import Fetcher
from wds_train.loader.plan import Plan
from wds_train.loader.transform import Transform
from wds_train.loader.workers import Workers


class Pipeline:
    """The batches of a plan.

    Workers are kept from one iteration to the next. A batch of a `TrainPlan` is merged from all
    workers' parts of its step.

    Args:
        split: The split to read.
        plan: What to read when.
        transform: Makes an array of each sample. None decodes nothing, for the order alone.
        workers: Processes that decode; 0 decodes in this one.
        cache: Keeps blocks of the split on a local disk.
        pinned: Merge into memory that a GPU copies from.

    Raises:
        UsageError: The batches take more memory than there is.
    """

    def __init__(
        self,
        split: SplitReader,
        plan: Plan,
        transform: Transform | None,
        workers: int,
        cache: BlockCache | None = None,
        *,
        pinned: bool = False,
    ) -> None:
        workers = plan.useful_workers(workers)
        self._parts_per_batch = plan.parts_per_batch(workers)
        if transform is None:
            transform = OrderAlone()

        # The stages, with the memory that workers and this process share.
        part_bytes = plan.part_samples(max(1, workers)) * transform.largest.bytes
        self._slots = Slots(workers, part_bytes)
        fetch = Fetcher(split, cache, whole=transform.largest.holds_objects)
        stages = _Stages(plan, fetch, Decoder(split, transform, self._slots))

        # The workers.
        self._pipeline = wds.WebLoader(
            wds.DataPipeline(stages, _errors_as_values),
            batch_size=None,
            collate_fn=_pass_through,
            num_workers=workers,
            # Otherwise each iteration would move the global generator of the caller.
            generator=torch.Generator(),
            persistent_workers=workers > 0,
            worker_init_fn=_init_worker,
            **_worker_options(workers),
        )
        self._workers = Workers(workers)
        self._pinned = pinned
        self._begun: Iterator[Decoded | WdsTrainError] | None = None
        self._store = split.store

    @property
    def fallbacks(self) -> int:
        """The ranges that took a second request, of this process and its workers."""
        return self._store.fallbacks

    def start(self) -> None:
        """Fork the workers and begin to read.

        Call it before this process has threads or uses a GPU: a forked child survives neither.
        """
        items = iter(self._pipeline)
        with self._workers.awaited():
            first = list(itertools.islice(items, 1))  # none, if the rank has no batch at all
            self._begun = itertools.chain(first, items)

    def __iter__(self) -> Iterator[Batch]:
        # Parts come from the workers in turn, so that the parts of a step come together.
        parts: list[Decoded] = []
        for part in self._receive():
            parts.append(part)
            if len(parts) == self._parts_per_batch:
                yield self._merge(parts)
                parts = []

    def check_workers(self) -> None:
        """Raise `WorkerDied` if a worker has died."""
        self._workers.check()

    def _receive(self) -> Iterator[Decoded]:
        """Yield the parts as they come from the workers; raise the error that came instead."""
        items = self._begun or iter(self._pipeline)
        self._begun = None
        while True:
            with self._workers.awaited():
                item = next(items, None)
            if item is None:
                return
            if isinstance(item, WdsTrainError):
                try:
                    raise item
                finally:
                    # The error's traceback holds this frame, and the frame holds `items`. Left to
                    # the garbage collector, DataLoader's queues would be closed before it can tell
                    # its workers to end, and it would wait 5 s for each.
                    del items, item
            yield item

    def _merge(self, decoded: list[Decoded]) -> Batch:
        """Merge the workers' parts of one step.

        The parts hold ascending lanes, so their order is the lanes'.
        """
        # The columns of all parts.
        first = decoded[0]
        ids = []
        positions = []
        slots = []
        labels = []
        unreadable = []
        items = []
        for each in decoded:
            part = each.part
            assert part.step == first.part.step, f"workers out of step: {_steps_of(decoded)}"
            ids.append(part.ids)
            positions.append(part.positions)
            slots.append(self._slots(each.worker, each.slot, len(part.ids), first.form))
            labels.append(each.labels)
            unreadable += each.unreadable
            items += each.items

        # The only copy of the pixels in this process. torch.cat would wake a pool of threads, which
        # would take the workers' cores.
        all_ids = np.concatenate(ids)
        shape = (len(all_ids), *first.form.shape)
        images = empty_images(shape, first.form.dtype, pinned=self._pinned)
        np.concatenate(slots, out=images.numpy())
        all_labels = torch.from_numpy(np.concatenate(labels))
        if self._pinned:
            all_labels = all_labels.pin_memory()
        return Batch(
            step=first.part.step,
            positions=np.concatenate(positions),
            ids=all_ids,
            images=images,
            labels=all_labels,
            unreadable=unreadable,
            epoch=first.part.epoch,
            items=items,
        )


def _steps_of(decoded: list[Decoded]) -> list[int]:
    return [each.part.step for each in decoded]


def _worker_options(workers: int) -> dict[str, Any]:
    """Return the options of DataLoader that it takes only if there are workers."""
    if workers == 0:
        return {}
    # Fork: the index is shared copy-on-write, and a worker is ready in milliseconds, not after
    # importing torch.
    return {"prefetch_factor": PREFETCHED_PARTS, "multiprocessing_context": "fork"}


class _Stages:
    """The stages that run in a worker, one after the other."""

    def __init__(self, plan: Plan, fetch: Fetcher, decode: Decoder) -> None:
        self._plan = plan
        self._fetch = fetch
        self._decode = decode

    def __call__(self) -> Iterator[Decoded]:
        # Without workers, this process is the only one.
        worker = 0
        workers = 1
        info = torch.utils.data.get_worker_info()
        if info is not None:
            worker = info.id
            workers = info.num_workers
        requests = self._plan.requests(worker, workers, self._fetch.small)
        fetched = self._fetch(requests)
        parts = self._plan.parts(fetched, worker, workers)
        return self._decode(parts, worker)


def _init_worker(_: int) -> None:
    """Prepare a worker, which lives and dies with its training process.

    A terminal or Slurm sends its signals to all processes at once. They are for the training
    process to handle.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # Python's exit terminates workers that are left. If they ended by the signal, PyTorch would
    # take it for a crash, and raise in the middle of the exit.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


def _errors_as_values(batches: Iterable[Decoded]) -> Iterator[Decoded | WdsTrainError]:
    """Yield an error instead of raising it.

    DataLoader would make a traceback of it, not a message for people.
    """
    try:
        yield from batches
    except WdsTrainError as error:
        yield error


def _pass_through(decoded: Decoded | WdsTrainError) -> Decoded | WdsTrainError:
    """Collate nothing.

    DataLoader's default makes tensors of the arrays, and each tensor travels as a file with a
    connection of its own.
    """
    return decoded


def copy_to_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield batches with images and labels on `device`.

    For a GPU, a stream of its own copies each batch, one ahead of the batch that is worked on.

    Args:
        batches: The batches, in pinned memory for a GPU: otherwise copies wait for it.
        device: The CPU, where batches stay as they are, or a GPU.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    ahead: deque[tuple[Batch, torch.cuda.Event]] = deque()
    for batch in batches:
        # The copy is queued before the batch ahead of it is handed out.
        with torch.cuda.stream(stream):
            images = batch.images.to(device, non_blocking=True)
            labels = batch.labels.to(device, non_blocking=True)
        ahead.append((replace(batch, images=images, labels=labels), stream.record_event()))
        if len(ahead) > 1:
            yield _wait_for_copy(*ahead.popleft())
    while ahead:
        yield _wait_for_copy(*ahead.popleft())


def _wait_for_copy(batch: Batch, copied: torch.cuda.Event) -> Batch:
    """Let the current stream wait for the copy of `batch`, and return the batch.

    Its memory is not reused before that stream is done with it.
    """
    current = torch.cuda.current_stream(batch.images.device)
    current.wait_event(copied)
    for each in (batch.images, batch.labels):
        each.record_stream(current)
    return batch
