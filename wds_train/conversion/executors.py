"""Run the making of shards: in processes of this machine, or on a Dask cluster."""

import argparse
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed, wait
from multiprocessing import forkserver

from wds_train.conversion import pack
from wds_train.conversion.pack import Counts, ShardDone, ShardTask, make_shard
from wds_train.errors import UsageError

DASK = "dask://"
# Processes are forked from a server, not from this process: a fork of this one would inherit the
# locks of boto3's and pyarrow's threads in whatever state they are. Unlike spawn, the server
# imports everything once, and while the source is scanned.
CONTEXT = multiprocessing.get_context("forkserver")


def parse_dask_address(text: str) -> str:
    """Return the value of --executor, as argparse's type of it."""
    if not text.startswith(DASK):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form {DASK}HOST:PORT")
    return text


def start_fork_server() -> None:
    """Start the server that workers are forked from, so that it is ready when they are needed."""
    # All that the main module imports, since workers import that again; but not the main module, of
    # which runpy would warn.
    CONTEXT.set_forkserver_preload(
        [
            "wds_train.conversion.convert",
            "wds_train.conversion.index_in_place",
            "wds_train.conversion.sources.detect",
            "tqdm",
        ]
    )
    forkserver.ensure_running()


def make_counts(processes: int) -> Counts:
    """Return counts that the workers of `open_executor` add to.

    Args:
        processes: The number of workers; up to 1 means this very process.
    """
    if processes <= 1:
        return Counts(threading.Lock(), [0, 0])
    return Counts(CONTEXT.Lock(), CONTEXT.RawArray("q", 2))


@contextlib.contextmanager
def open_executor(
    address: str | None, processes: int, counts: Counts
) -> Iterator[tuple[Executor | None, int]]:
    """Open what makes the shards.

    Args:
        address: A Dask cluster's; None for processes of this machine.
        processes: How many of those; up to 1 means this very process.
        counts: What the workers add to, except a cluster's, which share no memory.

    Yields:
        The executor, None for this very process; and how many tasks it runs at once.

    Raises:
        UsageError: There is no such cluster, or the package for it is missing.
    """
    if address is not None:
        with _dask(address) as (executor, at_once):
            yield executor, at_once
    elif processes <= 1:
        pack.process_counts = counts
        yield None, 1
    else:
        arguments = (dict(os.environ), counts)
        pool = ProcessPoolExecutor(
            processes, CONTEXT, initializer=_begin_worker, initargs=arguments
        )
        try:
            yield pool, processes
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _dask(address: str) -> Iterator[tuple[Executor, int]]:
    try:
        from distributed import Client
    except ImportError as error:
        raise UsageError(
            "--executor needs the package `distributed`; "
            "install it: .venv/bin/uv pip install distributed"
        ) from error
    try:
        client = Client(f"tcp://{address.removeprefix(DASK)}", timeout=10)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"no Dask scheduler answers at {address} ({error}); start one, or correct the address"
        ) from error
    with client:
        threads = sum(client.nthreads().values())
        # pure=False: Dask would otherwise return the result of an equal task that was cancelled or
        # lost.
        yield client.get_executor(pure=False, retries=2), max(1, threads)


def _begin_worker(environment: dict[str, str], counts: Counts) -> None:
    """Prepare a worker process: its environment, its counts, and its end."""
    # The fork server may have started before credentials were set.
    os.environ.clear()
    os.environ.update(environment)
    pack.process_counts = counts
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    # Die with the parent. Workers of a killed conversion would otherwise wait for tasks for ever,
    # and write at the same time as the next conversion.
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_tasks(
    executor: Executor | None, tasks: Iterable[ShardTask], in_flight: int
) -> Iterator[ShardDone]:
    """Make every shard, and yield each when it is finished.

    Args:
        executor: Where; None for this process.
        tasks: The shards.
        in_flight: The most that are being made or wait for it.
    """
    if executor is None:
        yield from map(make_shard, tasks)
        return

    # Few in flight keep memory small: a task holds the rows of its shard.
    pending: set[Future[ShardDone]] = set()
    try:
        for task in tasks:
            pending.add(executor.submit(make_shard, task))
            if len(pending) >= in_flight:
                ready, pending = wait(pending, return_when="FIRST_COMPLETED")
                for future in ready:
                    yield future.result()
        for future in as_completed(pending):
            yield future.result()
    finally:
        for future in pending:
            future.cancel()
