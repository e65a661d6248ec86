"""Several processes that train one model, each on its GPU (or its share of the cores).

This is where they tell one another what each has to know.

A process learns its place from the environment that torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR, ...), and so does every process that `launch` starts on one machine. Rank 0 leads: it
alone claims, commits and reports the run.
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

FIRST_WORD = "run"
# A rank that says nothing for so long has died without closing its connections.
SILENCE = timedelta(minutes=10)
# for the other ranks to end once one has failed: time for the leader's commit under way
LAST_SECONDS = 30.0
LEAVING = threading.Event()
"""Set when a thread ends this process, as all ranks end: that their connections close is then no
news.
"""


class Ranks:
    """The processes that train one model, as this one of them sees them.

    A process alone, or one that is not connected, answers everything on the spot.

    Args:
        rank: The number of this process, from 0.
        size: The number of all processes.
        local: The number of this process on its machine, which is that of its GPU.
        cpu: Leave the GPUs alone.
    """

    def __init__(self, rank: int = 0, size: int = 1, local: int = 0, *, cpu: bool = False) -> None:
        self.rank = rank
        self.size = size
        self.local = local
        self._cpu = cpu
        self.waiting = False
        """True while the main thread waits for a word of the other ranks."""
        self._store: dist.Store | None = None
        self._group: Any = None

    @classmethod
    def of_environment(cls, *, cpu: bool = False) -> Self:
        refuse_bad_numbers(PLACE)
        rank = int(number_of("RANK", 0))
        size = int(number_of("WORLD_SIZE", 1))
        local = int(number_of("LOCAL_RANK", 0))
        if not 0 <= rank < size:
            raise UsageError(
                f"RANK = {rank} cannot work with WORLD_SIZE = {size}; start with torchrun"
            )
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if size > 1 and missing:
            raise UsageError(
                f"WORLD_SIZE = {size}, but the environment lacks {' and '.join(missing)}; start "
                "with torchrun"
            )
        return cls(rank, size, local, cpu=cpu)

    @property
    def leads(self) -> bool:
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
        """Tell the others the leader's first word, before `connect`, which starts threads."""
        if self.size > 1:
            with lost_ranks():
                self._store = _meeting()
                self._store.set(FIRST_WORD, json.dumps(content))

    def await_announcement(self, pause: Callable[[float], None]) -> dict[str, Any]:
        """Wait for the leader's announcement, and return it.

        It may take hours until the run is free; `pause` may raise what ends that.
        """
        with lost_ranks():
            self._store = _meeting()
            while not self._store.check([FIRST_WORD]):
                pause(0.2)
            return json.loads(self._store.get(FIRST_WORD))

    def connect(self, silence: timedelta = SILENCE) -> None:
        """Join the other ranks, which may keep this one waiting for `silence` at most.

        This process must not fork any more.
        """
        if self.size == 1:
            return
        assert self._store is not None, "connect() comes after announce()"
        # Of layers whose gradients DDP has to copy, a matter of microseconds: nothing that its
        # reader could mend.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        with lost_ranks():
            backend = "gloo"
            device = None
            if self.device.type == "cuda":
                backend = "nccl"
                device = self.device
            # NCCL takes no two ranks on one GPU, as `bench gpu` tries it
            if os.environ.get("WDS_BACKEND") == "gloo":
                backend = "gloo"
                device = None
            dist.init_process_group(
                backend,
                store=self._store,
                rank=self.rank,
                world_size=self.size,
                timeout=silence,
                device_id=device,
            )
            self._group = dist.new_group(
                backend="gloo", timeout=silence
            )  # for the host's words: no GPU is waited for

    def total(self, *values: float) -> list[float]:
        """Return the sum over all ranks of each value, in float64."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def largest(self, value: float) -> float:
        """Return the largest of all ranks' values."""
        return self._reduced((value,), dist.ReduceOp.MAX)[0]

    def _reduced(self, values: Sequence[float], how: Any) -> list[float]:
        if self._group is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        with _awaiting(self):
            dist.all_reduce(tensor, how, group=self._group)
        return tensor.tolist()

    def exchange(self, about: str, word: str) -> list[str]:
        """Return every rank's word about something, in the order of the ranks; this one's is
        `word`.
        """
        if self._group is None:
            return [word]
        assert self._store is not None
        with _awaiting(self):
            self._store.set(f"{about}/{self.rank}", word)
            return [self._store.get(f"{about}/{rank}").decode() for rank in range(self.size)]

    def parallel(self, model: nn.Module) -> nn.Module:
        """Return the `model`, whose backward pass averages the gradients over all ranks; with the
        leader's weights and buffers.
        """
        if self._group is None:
            return model
        return DistributedDataParallel(model, gradient_as_bucket_view=True)

    def adopt(self, *models: nn.Module) -> None:
        """Give all ranks the leader's buffers: each rank's BatchNorm has seen other samples."""
        if self._group is None:
            return
        with _awaiting(self):
            for buffer in (buffer for model in models for buffer in model.buffers()):
                dist.broadcast(buffer, 0)

    def meeting(self) -> dist.Store:
        """Return another connection to the store where the ranks meet, for a thread of its own."""
        assert self._store is not None
        return dist.PrefixStore("watch", self._store.clone())

    def close(self) -> None:
        if self._group is not None:
            self._group = None
            dist.destroy_process_group()


def _meeting() -> dist.Store:
    """Return where the ranks of this start meet. torchrun keeps its store over restarts, with the
    words of those who are gone.
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

    # What PyTorch was built for, and why it cannot use the GPU.
    built = "a build for CPUs alone"
    remedy = "install one for CUDA"
    if torch.version.cuda:
        built = f"built for CUDA {torch.version.cuda}"
        remedy = "update the driver, or install a PyTorch for an older CUDA"
    reason = "no more is known"
    try:
        torch.zeros(1, device="cuda")
    except (RuntimeError, AssertionError) as error:  # the latter of a build for CPUs
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
    """Return the driver's version that `nvidia-smi` names; empty without it, or where it finds no
    GPU.
    """
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ""
    return (done.stdout.splitlines() or [""])[0].strip()


@contextmanager
def lost_ranks() -> Iterator[None]:
    """Translate what the backends raise when another rank is gone.

    Gloo raises a bare RuntimeError, with its own file's name in it.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        if LEAVING.is_set():  # and has said why
            time.sleep(2 * LAST_SECONDS)
        reason = str(error).strip().splitlines()[0]
        raise RanksLost(
            f"contact with the other ranks is lost ({reason}); the same command, on any number of "
            "GPUs, goes on from the newest checkpoint"
        ) from error


@contextmanager
def _awaiting(ranks: Ranks) -> Iterator[None]:
    """Within, the main thread waits for the other ranks."""
    ranks.waiting = True
    try:
        with lost_ranks():
            yield
    finally:
        ranks.waiting = False
