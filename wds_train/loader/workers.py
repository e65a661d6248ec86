"""The loader workers of a process: their default number, and the error for one that dies.

The system kills a worker where memory runs out. PyTorch then raises its own error wherever the main
thread happens to be, in the middle of a step or of a commit. Here it is raised where a batch is
waited for, as a `WorkerDied`.
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

# The pids of all workers that this process has had. Their loaders report their deaths.
_PIDS: set[int] = set()
# The workers whose batch the main thread waits for. One loader may be read inside another's loop.
_WAITING: "list[Workers]" = []


MOST_WORKERS = 16  # by default; `workers=` may ask for more


def default_workers() -> int:
    """Return the default number of workers: this process's cores less one, from 1 to 16."""
    return max(1, min(MOST_WORKERS, own_cores() - 1))


def own_cores() -> int:
    """Return the cores that this process may use: the ranks of a machine share its cores."""
    allowed = cores()
    tasks = tasks_here()
    # Slurm may have bound each task to its cores already. To divide them would count that twice.
    if tasks > 1 and "SLURM_CPUS_PER_TASK" in os.environ and "LOCAL_WORLD_SIZE" not in os.environ:
        return min(allowed, int(number_of("SLURM_CPUS_PER_TASK", allowed)))
    return max(1, allowed // tasks)


def limit_threads() -> None:
    """Let PyTorch use no more threads than this process has cores.

    By itself it uses one for each core of the machine. If that is more than a container's quota,
    all of them are stopped for a part of the time. OMP_NUM_THREADS has precedence.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > own_cores():
        torch.set_num_threads(own_cores())


class Workers:
    """The worker processes of one loader.

    Args:
        number: The number of workers that the loader forks.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._processes: list[BaseProcess] = []

    @contextlib.contextmanager
    def awaited(self) -> Iterator[None]:
        """Mark code that waits for the workers.

        Workers that are forked within are known from then on.

        Raises:
            WorkerDied: A worker has died.
        """
        # Processes that are there before the workers are forked.
        before = []
        if self._number and not self._processes:
            before = multiprocessing.active_children()
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
                children = multiprocessing.active_children()
                self._remember([each for each in children if each not in before])

    def check(self) -> None:
        """Raise `WorkerDied` if a worker has ended: workers live as long as their loader."""
        for each in self._processes:
            if each.exitcode is not None:
                raise self.death("")

    def has(self, pid: int) -> bool:
        """Return True if the process `pid` is one of these workers."""
        return pid in [each.pid for each in self._processes]

    def death(self, message: str) -> WorkerDied:
        """Return the error that says which worker died, and of what.

        Args:
            message: PyTorch's error, which is used if no worker has ended yet.
        """
        # PyTorch's first sentence says that a worker died, and the rest what a person may try.
        how = message.strip().split(". ")[0].rstrip(".")
        for each in self._processes:
            code = each.exitcode
            if code is not None:
                how = f"process {each.pid} {_describe_exit(code)}"
        return WorkerDied(how)

    def _remember(self, processes: list[BaseProcess]) -> None:
        self._processes = processes
        for process in processes:
            if process.pid:
                _PIDS.add(process.pid)
        _calm_pytorch()


def _describe_exit(code: int) -> str:
    """Return the words for an exit code of `multiprocessing`, which is -N for signal N."""
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
    # Other threads may set no handler, and PyTorch has set none there either.
    if threading.current_thread() is not threading.main_thread():
        return
    # PyTorch sets its handler with the first DataLoader, and never again: ours stays around it.
    handler = signal.getsignal(signal.SIGCHLD)
    if not callable(handler) or isinstance(handler, _Calm):
        return
    signal.signal(signal.SIGCHLD, _Calm(handler))


class _Calm:
    """A handler of SIGCHLD that calls PyTorch's, and drops its error for a worker of ours.

    The error is raised only where that worker's loader is waited for.
    """

    def __init__(self, handler) -> None:  # type: ignore[no-untyped-def]
        self._handler = handler

    def __call__(self, number: int, frame: FrameType | None) -> None:
        try:
            self._handler(number, frame)
        except RuntimeError as error:
            # An error of somebody else's workers, or of anything else, goes on.
            found = re.search(r"DataLoader worker \(pid (\d+)\)", str(error))
            if found is None or int(found[1]) not in _PIDS:
                raise
            if _WAITING and _WAITING[-1].has(int(found[1])):
                raise _WAITING[-1].death(str(error)) from error
