"""The processes that train one model, and their communication.

Each has a GPU, or a share of the cores, and learns its place from the environment that torchrun
sets (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, ...); `launch` sets the same on one machine. Rank 0
leads: it alone claims, commits and reports the run.

    announce / await_announcement   before there are threads: the claimed run
    connect                         from here on, no process may fork
    total, largest, exchange, adopt, parallel
"""

import json
import os
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from wds_train.environment import PLACE, number_of, refuse_bad_numbers
from wds_train.errors import RanksLost, UsageError

# The key of the leader's announcement in the store where the ranks meet.
ANNOUNCEMENT = "run"
# A rank that is silent for so long has died without closing its connections.
SILENCE = timedelta(minutes=10)
# For the other ranks to end once one has failed: time for the leader's commit under way.
LAST_SECONDS = 30.0
# Set when a thread ends this process, as all ranks end: their connections then close as intended.
LEAVING = threading.Event()


class Ranks:
    """The processes that train one model, as this one of them sees them.

    A single process, or one that is not connected, talks to nobody: it is its own sum and maximum.

    Args:
        rank: The number of this process, from 0.
        size: The number of all processes.
        local: The number of this process on its machine, which is that of its GPU.
        cpu: Use no GPU.

    Attributes:
        waiting: True while the main thread waits for an answer of the other ranks.
    """

    def __init__(self, rank: int = 0, size: int = 1, local: int = 0, *, cpu: bool = False) -> None:
        self.rank = rank
        self.size = size
        self.local = local
        self._cpu = cpu
        self.waiting = False
        self._store: dist.Store | None = None
        self._group: Any = None

    @classmethod
    def of_environment(cls, *, cpu: bool = False) -> Self:
        """Return this process's place by its environment; without one it trains alone.

        Raises:
            UsageError: The variables cannot work, or some are missing.
        """
        refuse_bad_numbers(PLACE)
        rank = int(number_of("RANK", 0))
        size = int(number_of("WORLD_SIZE", 1))
        local = int(number_of("LOCAL_RANK", 0))
        if not 0 <= rank < size:
            raise UsageError(
                f"RANK = {rank} cannot work with WORLD_SIZE = {size}; start with torchrun"
            )
        missing = sorted({"MASTER_ADDR", "MASTER_PORT"} - os.environ.keys())
        if size > 1 and missing:
            raise UsageError(
                f"WORLD_SIZE = {size}, but the environment lacks {' and '.join(missing)}; start "
                "with torchrun"
            )
        return cls(rank, size, local, cpu=cpu)

    @property
    def leads(self) -> bool:
        """True in rank 0, which alone writes."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """This process's GPU; without GPUs, the CPU."""
        if self._cpu or not torch.cuda.is_available():
            return torch.device("cpu")
        if self.local >= torch.cuda.device_count():
            raise UsageError(
                f"LOCAL_RANK = {self.local}, but this machine has {torch.cuda.device_count()} "
                "GPUs; start fewer processes"
            )
        return torch.device("cuda", self.local)

    def announce(self, content: dict[str, Any]) -> None:
        """Send the leader's announcement to the others, before `connect`, which starts threads."""
        if self.size > 1:
            with lost_ranks():
                self._store = _meeting()
                self._store.set(ANNOUNCEMENT, json.dumps(content))

    def await_announcement(self, pause: Callable[[float], None]) -> dict[str, Any]:
        """Wait for the leader's announcement, and return it.

        It may take hours until the run is free. `pause` sleeps so many seconds; an error that it
        raises ends the wait.
        """
        with lost_ranks():
            self._store = _meeting()
            while not self._store.check([ANNOUNCEMENT]):
                pause(0.2)
            return json.loads(self._store.get(ANNOUNCEMENT))

    def connect(self, silence: timedelta = SILENCE) -> None:
        """Join the other ranks, which may keep this one waiting for `silence` at most.

        This process must not fork any more.
        """
        if self.size == 1:
            return
        assert self._store is not None, "connect() comes after announce()"
        # DDP warns of layers whose gradients it has to copy, a matter of microseconds. A person
        # can do nothing about it.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        with lost_ranks():
            # NCCL refuses two ranks on one GPU, which `bench gpu` tries with gloo.
            backend = "gloo"
            device = None
            if self.device.type == "cuda" and os.environ.get("WDS_BACKEND") != "gloo":
                backend = "nccl"
                device = self.device
            dist.init_process_group(
                backend,
                store=self._store,
                rank=self.rank,
                world_size=self.size,
                timeout=silence,
                device_id=device,
            )
            # A second group for numbers of the host: they must not wait for the GPU.
            self._group = dist.new_group(backend="gloo", timeout=silence)

    def total(self, *values: float) -> list[float]:
        """Return the sum over all ranks of each value, in float64."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def largest(self, value: float) -> float:
        """Return the largest of all ranks' values."""
        return self._reduced((value,), dist.ReduceOp.MAX)[0]

    def _reduced(self, values: Sequence[float], how: Any) -> list[float]:
        """Return each value, reduced over all ranks."""
        if self._group is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        with _note_waiting(self):
            dist.all_reduce(tensor, how, group=self._group)
        return tensor.tolist()

    def exchange(self, about: str, word: str) -> list[str]:
        """Send `word` to the other ranks; return the words of all, in the order of the ranks.

        `about` is the key of this exchange, which no other one may have.
        """
        if self._group is None:
            return [word]
        assert self._store is not None
        words = []
        with _note_waiting(self):
            self._store.set(f"{about}/{self.rank}", word)
            for rank in range(self.size):
                words.append(self._store.get(f"{about}/{rank}").decode())
        return words

    def parallel(self, model: nn.Module) -> nn.Module:
        """Wrap `model` so that its backward pass averages the gradients over all ranks.

        All ranks get the leader's weights and buffers.
        """
        if self._group is None:
            return model
        return DistributedDataParallel(model, gradient_as_bucket_view=True)

    def adopt(self, *models: nn.Module) -> None:
        """Give all ranks the leader's buffers: each rank's BatchNorm has seen other samples."""
        if self._group is None:
            return
        with _note_waiting(self):
            for model in models:
                for buffer in model.buffers():
                    dist.broadcast(buffer, 0)

    def meeting(self) -> dist.Store:
        """Return another connection to the store where the ranks meet, for one thread."""
        assert self._store is not None
        return dist.PrefixStore("watch", self._store.clone())

    def close(self) -> None:
        """Leave the group. The other ranks must be done with it, too."""
        if self._group is not None:
            self._group = None
            dist.destroy_process_group()


def _meeting() -> dist.Store:
    """Return the store where the ranks of this start meet.

    torchrun keeps its store over restarts, with the words of ranks that are gone: the number of the
    start is part of every key.
    """
    store = next(dist.rendezvous("env://", timeout=SILENCE))[0]
    start = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}-{os.environ['WORLD_SIZE']}"
    return dist.PrefixStore(f"wds-train-{start}", store)


def refuse_unusable_gpu(dev: Path = Path("/dev")) -> None:
    """Raise `UsageError` when this machine has an NVIDIA GPU that PyTorch cannot use.

    The training would go on unseen on the CPU, which takes a hundred times as long.
    """
    if torch.cuda.is_available():
        return
    driver = _nvidia_driver()
    if not (driver or any(dev.glob("nvidia[0-9]*"))):
        return

    # Name the build, the reason and the remedy.
    built = "a build for CPUs alone"
    remedy = "install one for CUDA"
    if torch.version.cuda:
        built = f"built for CUDA {torch.version.cuda}"
        remedy = "update the driver, or install a PyTorch for an older CUDA"
    reason = "no more is known"
    try:
        torch.zeros(1, device="cuda")
    except (RuntimeError, AssertionError) as error:  # an AssertionError of a build for CPUs
        reason = str(error).strip().split(". ")[0].splitlines()[0]
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        remedy = f"unset CUDA_VISIBLE_DEVICES (now {hidden!r}), {remedy}"
    raise UsageError(
        f"this machine has a GPU (driver {driver or 'unknown'}) that PyTorch {torch.__version__}, "
        f"{built}, cannot use: {reason}; {remedy} (https://pytorch.org/get-started/locally), or "
        "give --device cpu to train on the CPU"
    )


def _nvidia_driver() -> str:
    """Return the driver's version as `nvidia-smi` names it; "" without it, or without a GPU."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ""
    return (done.stdout.splitlines() or [""])[0].strip()


@contextmanager
def lost_ranks() -> Iterator[None]:
    """Turn the errors of the backends into `RanksLost` when another rank is gone.

    Gloo raises a bare RuntimeError, with the name of its own source file in it.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        # A thread is about to end this process, and has said why: leave it the last line.
        if LEAVING.is_set():
            time.sleep(2 * LAST_SECONDS)
        reason = str(error).strip().splitlines()[0]
        raise RanksLost(
            f"contact with the other ranks is lost ({reason}); the same command, on any number of "
            "GPUs, goes on from the newest checkpoint"
        ) from error


@contextmanager
def _note_waiting(ranks: Ranks) -> Iterator[None]:
    """Mark this rank as waiting for the others inside the block: it is not the one that hangs."""
    ranks.waiting = True
    try:
        with lost_ranks():
            yield
    finally:
        ranks.waiting = False
