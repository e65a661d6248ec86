"""The loader. What a batch goes through, all of it inside one loader worker:

    requests   (plan.py)     for every lane of this worker, the windows that come next (order.py), in the order of the step
                             that first needs them: Request(step, epoch, lane, ids)
    fetch      (fetch.py)    ranged GETs of whole blocks by a few threads, a bounded number of bytes ahead; every sample's
                             CRC is checked, a damaged one is fetched again: Fetched(request, records)
    parts      (plan.py)     step by step, the next samples of each lane: Part(step, positions, ids, records)
    decode     (decoder.py)  crop, resize and flip straight into the worker's slot of shared memory, then the policies of
                             the recipe, in place: Decoded

and in the trainer's process:

    merge                    the parts of one step, of all workers, copied in lane order (into pinned memory, for a GPU): Batch

The stages are a `webdataset.DataPipeline` behind `webdataset.WebLoader`. Nothing is consumed that a state would have
to hold: a loader starts at any step, and its batches are the same for every number of ranks and workers.
"""

import itertools
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace

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


class _Stages:
    """The stages that run in a worker, one after the other."""

    def __init__(self, plan: Plan, fetch: Fetcher, decode: Decoder) -> None:
        self._plan, self._fetch, self._decode = plan, fetch, decode

    def __call__(self) -> Iterator[Decoded]:
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        requests = self._plan.requests(worker, workers, self._fetch.small)
        fetched = self._fetch(requests)
        parts = self._plan.parts(fetched, worker, workers)
        return self._decode(parts, worker)


def _init_worker(_: int) -> None:
    """Prepare a worker, which lives and dies with its trainer: what a terminal or Slurm sends to all processes at once is
    the trainer's to handle.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # Python's exit terminates workers that are left. Were that their end by a signal, PyTorch would take it for a crash of
    # theirs, and raise in the midst of the exit.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


def _errors_as_values(batches: Iterable[Decoded]) -> Iterator[Decoded | WdsTrainError]:
    """Yield an error instead of raising it: what DataLoader makes of a worker's exception is a traceback, not a message
    for people.
    """
    try:
        yield from batches
    except WdsTrainError as error:
        yield error


def _as_it_is(decoded: Decoded | WdsTrainError) -> Decoded | WdsTrainError:
    """Collate nothing. DataLoader's own function would make tensors of the arrays, each of which travels as a file and
    a connection of its own.
    """
    return decoded


def copy_to_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches, with images and labels on `device`. On a GPU each is copied by a stream of its own, one ahead of the
    batch that is worked on. The batches' memory should be pinned: the copies would wait for the GPU otherwise.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream, ahead = torch.cuda.Stream(device), deque[tuple[Batch, torch.cuda.Event]]()
    for batch in batches:
        with torch.cuda.stream(stream):
            images, labels = (each.to(device, non_blocking=True) for each in (batch.images, batch.labels))
        ahead.append((replace(batch, images=images, labels=labels), stream.record_event()))
        if len(ahead) > 1:
            yield _arrived(*ahead.popleft())
    while ahead:
        yield _arrived(*ahead.popleft())


def _arrived(batch: Batch, copied: torch.cuda.Event) -> Batch:
    """The `batch`, for the current stream to use after the copy; its memory is not used anew before that stream is
    done.
    """
    current = torch.cuda.current_stream(batch.images.device)
    current.wait_event(copied)
    for each in (batch.images, batch.labels):
        each.record_stream(current)
    return batch


class Pipeline:
    """Batches of `plan`. With `workers` > 0 they are decoded in that many processes, kept for every iteration. A batch
    of a `TrainPlan` is merged from all workers' parts of the step; with `pinned`, in memory that a GPU copies from.
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
        transform = transform or OrderAlone()
        self._slots = Slots(workers, plan.part_samples(max(1, workers)) * transform.largest.bytes)
        fetch = Fetcher(split, cache, whole=transform.largest.holds_objects)
        stages = _Stages(plan, fetch, Decoder(split, transform, self._slots))
        self._pipeline = wds.WebLoader(
            wds.DataPipeline(stages, _errors_as_values),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=workers,
            generator=torch.Generator(),  # or each iteration would move the global one of whoever trains
            persistent_workers=workers > 0,
            prefetch_factor=PREFETCHED_PARTS if workers else None,
            # Fork: the index is shared copy-on-write, and a worker is ready in milliseconds, not after importing torch.
            multiprocessing_context="fork" if workers else None,
            worker_init_fn=_init_worker,
        )
        self._workers = Workers(workers)
        self._pinned = pinned
        self._begun: Iterator[Decoded | WdsTrainError] | None = None
        self._store = split.store

    @property
    def fallbacks(self) -> int:
        """How many ranges took a second request, of this process and its workers (`Store.fallbacks`)."""
        return self._store.fallbacks

    def start(self) -> None:
        """Fork the workers and begin reading. It is to be called before this process has threads or uses a GPU, neither
        of which a forked child survives.
        """
        items = iter(self._pipeline)
        with self._workers.awaited():
            self._begun = itertools.chain(list(itertools.islice(items, 1)), items)  # a rank may have no batch at all

    def __iter__(self) -> Iterator[Batch]:
        parts: list[Decoded] = []
        for part in self._received():
            parts.append(part)
            if len(parts) == self._parts_per_batch:
                yield self._merge(parts)
                parts = []

    def check_workers(self) -> None:
        """Raise `WorkerDied` if a worker is no more."""
        self._workers.check()

    def _received(self) -> Iterator[Decoded]:
        items, self._begun = self._begun or iter(self._pipeline), None
        while True:
            with self._workers.awaited():
                item = next(items, None)
            if item is None:
                return
            if isinstance(item, WdsTrainError):
                try:
                    raise item
                finally:
                    # Its traceback holds this frame, and `items` holds it: left to the garbage collector, DataLoader's
                    # queues are closed before it can tell its workers to end, and it waits 5 s for each.
                    del items, item
            yield item

    def _merge(self, decoded: list[Decoded]) -> Batch:
        """The workers' parts of one step as one batch; they hold ascending lanes, so their order is the lanes'."""
        assert len({each.part.step for each in decoded}) == 1, f"workers out of step: {[d.part.step for d in decoded]}"
        ids, form = np.concatenate([each.part.ids for each in decoded]), decoded[0].form
        images = empty_images((len(ids), *form.shape), form.dtype, pinned=self._pinned)
        slots = [self._slots(each.worker, each.slot, len(each.part.ids), form) for each in decoded]
        # torch.cat would wake a pool of threads, which take the workers' cores.
        np.concatenate(slots, out=images.numpy())
        labels = torch.from_numpy(np.concatenate([each.labels for each in decoded]))
        return Batch(
            decoded[0].part.step,
            np.concatenate([each.part.positions for each in decoded]),
            ids,
            images,
            labels.pin_memory() if self._pinned else labels,
            [entry for each in decoded for entry in each.unreadable],
            decoded[0].part.epoch,
            [item for each in decoded for item in each.items],
        )
