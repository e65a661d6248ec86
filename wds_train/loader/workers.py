"""The loader workers of a process: how many it has by itself, and what is told when one dies.

The system kills a worker where memory runs out. PyTorch then raises an error of its own wherever the main thread happens
to be, in the midst of a step or of a commit; here it is raised where a batch is waited for, as a `WorkerDied`.
"""

import contextlib
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from types import FrameType

from wds_train.environment import number_of
from wds_train.errors import WorkerDied
from wds_train.machine import cores
from wds_train.slurm import tasks_here

_PIDS: set[int] = set()
"""Of all workers that this process has had, whose deaths are told by their loader."""
_WAITING: "list[Workers]" = []
"""Whose batch the main thread waits for."""


def default_workers() -> int:
    """Return a process per core of this one's, less one for the work itself, and 16 at most."""
    return max(1, min(16, own_cores() - 1))


def own_cores() -> int:
    """Return how many cores this process may use: the ranks of a machine share its cores."""
    allowed, tasks = cores(), tasks_here()
    # Slurm may have bound each task to its own already, which a division would count twice.
    if tasks > 1 and "SLURM_CPUS_PER_TASK" in os.environ and "LOCAL_WORLD_SIZE" not in os.environ:
        return min(allowed, int(number_of("SLURM_CPUS_PER_TASK", allowed)))
    return max(1, allowed // tasks)


def limit_threads() -> None:
    """Let PyTorch work in no more threads than this process has cores, unless OMP_NUM_THREADS says how many.

    It takes one for each core of the machine. With more than a container's quota is worth, all of them are stopped for
    a part of the time.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > own_cores():
        torch.set_num_threads(own_cores())


class Workers:
    """The worker processes of one loader, of which there are to be `number`."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._processes: list[BaseProcess] = []

    @contextlib.contextmanager
    def awaited(self) -> Iterator[None]:
        """Within, what is waited for comes from the workers, or `WorkerDied` is raised.

        Workers that are forked within are known from then on.
        """
        before = multiprocessing.active_children() if self._number and not self._processes else []
        in_main = threading.current_thread() is threading.main_thread()
        if in_main:
            _WAITING.append(self)
        try:
            self.check()
            yield
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise self.death(str(error)) from error
        finally:
            if in_main:
                _WAITING.pop()
            if self._number and not self._processes:
                self._know([each for each in multiprocessing.active_children() if each not in before])

    def check(self) -> None:
        """Raise `WorkerDied` if a worker is no more: they live as long as their loader."""
        if any(each.exitcode is not None for each in self._processes):
            raise self.death("")

    def has(self, pid: int) -> bool:
        """Whether the process `pid` is one of these workers."""
        return any(each.pid == pid for each in self._processes)

    def death(self, said: str) -> WorkerDied:
        """Return the error that tells which worker died, and of what; as PyTorch `said` it where that is not known."""
        how = said.strip().split(". ")[0].rstrip(".")
        for each in self._processes:
            if (code := each.exitcode) is not None:
                how = f"process {each.pid} {_end_of(code)}"
        return WorkerDied(how)

    def _know(self, processes: list[BaseProcess]) -> None:
        self._processes = processes
        _PIDS.update(each.pid for each in processes if each.pid)
        _calm_pytorch()


def _end_of(code: int) -> str:
    """What an exit code of `multiprocessing` says of a worker's end."""
    if code > 0:
        return f"ended with exit code {code}"
    number = -code or signal.SIGTERM  # on which our workers end with 0
    try:
        return f"was killed by {signal.Signals(number).name}"
    except ValueError:
        return f"was killed by signal {number}"


def _calm_pytorch() -> None:
    """Keep PyTorch's handler of SIGCHLD from raising for our workers while no batch is waited for.

    It goes on to raise for the workers of loaders that are not ours.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    if (
        threading.current_thread() is not threading.main_thread()
    ):  # others may set no handler; PyTorch has set none either
        return
    if not callable(handler) or isinstance(handler, _Calm):
        return
    signal.signal(signal.SIGCHLD, _Calm(handler))


class _Calm:
    """A handler of SIGCHLD that lets `handler` raise for a worker of ours only where its loader's batch is waited for."""

    def __init__(self, handler) -> None:  # type: ignore[no-untyped-def]
        self._handler = handler

    def __call__(self, number: int, frame: FrameType | None) -> None:
        try:
            self._handler(number, frame)
        except RuntimeError as error:
            found = re.search(r"DataLoader worker \(pid (\d+)\)", str(error))
            if found is None or int(found[1]) not in _PIDS:
                raise
            if _WAITING and _WAITING[-1].has(int(found[1])):
                raise _WAITING[-1].death(str(error)) from error
