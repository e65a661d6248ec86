"""Where shards are made: in processes of this machine, or on a Dask cluster."""

import argparse
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed, wait
from multiprocessing import forkserver

from wds_train.conversion import pack
from wds_train.conversion.pack import Counts, ShardDone, ShardTask, make_shard
from wds_train.errors import UsageError

DASK = "dask://"
# A server that is forked from, not this process: a fork of this one would inherit the locks of boto3's and pyarrow's
# threads in whatever state they are. Unlike spawn, it imports everything once, and while the source is scanned.
CONTEXT = multiprocessing.get_context("forkserver")


def dask_address(text: str) -> str:
    """The type of --executor."""
    if not text.startswith(DASK):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form {DASK}HOST:PORT")
    return text


def prepare() -> None:
    """Start what workers come from, so that it is ready when they are needed."""
    # All that the main module imports, since workers import that again; but not itself, of which runpy would warn.
    CONTEXT.set_forkserver_preload(
        [
            "wds_train.conversion.convert",
            "wds_train.conversion.index_in_place",
            "wds_train.conversion.sources.detect",
            "tqdm",
        ]
    )
    forkserver.ensure_running()


def counted(processes: int) -> Counts:
    """Counts that this many processes of `opened` add to."""
    if processes <= 1:
        return Counts(threading.Lock(), [0, 0])
    return Counts(CONTEXT.Lock(), CONTEXT.RawArray("q", 2))


@contextlib.contextmanager
def opened(address: str | None, processes: int, counts: Counts) -> Iterator[tuple[Executor | None, int]]:
    """An executor, None for this very process, and how many tasks it runs at once. What it packs is in `counts`, but for a
    cluster's, which share no memory.
    """
    if address is not None:
        with _dask(address) as (executor, at_once):
            yield executor, at_once
    elif processes <= 1:
        pack.made = counts
        yield None, 1
    else:
        executor = ProcessPoolExecutor(processes, CONTEXT, initializer=_begin, initargs=(dict(os.environ), counts))
        try:
            yield executor, processes
        finally:
            executor.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _dask(address: str) -> Iterator[tuple[Executor, int]]:
    try:
        from distributed import Client
    except ImportError as error:
        raise UsageError(
            "--executor needs the package `distributed`; install it: .venv/bin/uv pip install distributed"
        ) from error
    try:
        client = Client(f"tcp://{address.removeprefix(DASK)}", timeout=10)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"no Dask scheduler answers at {address} ({error}); start one, or correct the address"
        ) from error
    with client:
        # pure=False: Dask would otherwise give back the result of an equal task that was cancelled or lost.
        yield client.get_executor(pure=False, retries=2), max(1, sum(client.nthreads().values()))


def _begin(environment: dict[str, str], counts: Counts) -> None:
    """Take the parent's environment: the server that workers fork from may have started before credentials were set.
    And die with the parent: workers of a killed conversion would wait for tasks for ever, and write beside the next one.
    """
    os.environ.clear()
    os.environ.update(environment)
    pack.made = counts
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_tasks(executor: Executor | None, tasks: Iterable[ShardTask], in_flight: int) -> Iterator[ShardDone]:
    """Make every shard, at most `in_flight` at a time; in this process when there is no executor."""
    if executor is None:
        yield from map(make_shard, tasks)
        return
    pending = set()
    try:
        for task in tasks:
            pending.add(executor.submit(make_shard, task))
            if len(pending) >= in_flight:
                ready, pending = wait(pending, return_when="FIRST_COMPLETED")
                yield from (future.result() for future in ready)
        yield from (future.result() for future in as_completed(pending))
    finally:
        for future in pending:
            future.cancel()
