"""A worker that is killed is one `WdsTrainError` where the loop asks for a batch, and nowhere else; the loop can go on."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import active_children
from typing import Any

import pytest

from wds_train import EvalLoader, SampleLoader, TrainLoader
from wds_train.dataset.reader import Dataset
from wds_train.errors import RunError, WdsTrainError, WorkerDied
from wds_train.loader.workers import Workers

LOADERS: dict[str, Callable[[Dataset, str], Any]] = {
    "TrainLoader": lambda digits, _: TrainLoader(digits, 64, epochs=9, size=16, workers=2),
    "a mixture": lambda digits, _: TrainLoader(
        digits, 64, epochs=9, size=16, workers=2, mix=[(digits, 0.25)]
    ),
    "SampleLoader": lambda _, captioned: SampleLoader(
        captioned, 4, epochs=99, fields=("txt",), workers=2
    ),
    "EvalLoader": lambda digits, _: EvalLoader(digits, 10, size=16, workers=2),
}


def kill_worker(number: int, which: int = 0) -> int:
    """End one of this process's workers, and wait until its parent could know."""
    worker = active_children()[which]
    assert worker.pid is not None
    os.kill(worker.pid, number)
    worker.join(120)
    assert worker.exitcode is not None
    return worker.pid


@pytest.fixture(autouse=True)
def no_others() -> Iterator[None]:
    """Workers of an earlier test would be taken for this one's."""
    deadline = time.monotonic() + 120
    while active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert active_children() == []
    yield


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM], ids=lambda number: number.name
)
def test_a_death_between_two_batches_is_one_error_at_the_next(
    digits: Dataset, captioned: str, name: str, number: signal.Signals
) -> None:
    loader, seen, killed = LOADERS[name](digits, captioned), 0, 0
    with pytest.raises(
        WorkerDied, match=rf"a loader worker died \(process \d+ was killed by {number.name}\)"
    ) as caught:
        for _ in loader:
            seen += 1
            assert seen < 500, "nobody noticed"
            if not killed:
                killed = kill_worker(number)
                deadline = time.monotonic() + 0.2
                while time.monotonic() < deadline:  # PyTorch's handler would raise in here
                    sum(range(1000))
    assert f"process {killed} was" in str(caught.value)
    assert isinstance(caught.value, WdsTrainError) and isinstance(caught.value, RunError)
    del caught
    # The loop can go on, with workers of its own.
    for _ in loader:
        break
    else:
        raise AssertionError("the loader gave nothing more")
    del loader


def test_going_on_gives_what_was_missing(digits: Dataset) -> None:
    whole = [batch.ids.tolist() for batch in TrainLoader(digits, 64, epochs=1, size=16, workers=0)]
    loader, seen = TrainLoader(digits, 64, epochs=1, size=16, workers=2), []
    for _ in range(3):
        try:
            for batch in loader:
                seen.append(batch.ids.tolist())
                if len(seen) in (3, 9):
                    kill_worker(signal.SIGKILL, which=-1)
        except WorkerDied:
            continue
        break
    assert seen == whole


# In a process of its own: PyTorch's handler raises again at whatever the process does later, pytest's own work as well.
OTHERS = """
import os, re, signal, sys, time
from multiprocessing import active_children
from torch.utils.data import DataLoader, Dataset
from wds_train import TrainLoader

class Plain(Dataset):
    def __len__(self):
        return 1000
    def __getitem__(self, number):
        time.sleep(0.01)
        return number

def theirs():
    return iter(DataLoader(Plain(), 2, num_workers=1, multiprocessing_context="fork", collate_fn=list))

def ours():
    return iter(TrainLoader(sys.argv[1], 64, epochs=9, size=16, workers=1))

batches, workers = {}, {}
for name in sys.argv[2:]:
    before = active_children()
    batches[name] = theirs() if name == "theirs" else ours()
    next(batches[name])
    workers[name] = [each for each in active_children() if each not in before]
(worker,) = workers["theirs"]
try:
    os.kill(worker.pid, signal.SIGKILL)
    for _ in batches["theirs"]:
        pass
except RuntimeError as error:
    print("told", bool(re.search(rf"DataLoader worker \\(pid\\(?s?\\)? ?{worker.pid}\\)", str(error))))
next(batches["ours"])
print("goes on", flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("order", [("theirs", "ours"), ("ours", "theirs")])
def test_the_workers_of_other_loaders_are_told_as_before(
    digits: Dataset, order: tuple[str, str]
) -> None:
    command = [sys.executable, "-c", OTHERS, digits.store.url, *order]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split("\n") == ["told True", "goes on", ""], done.stderr


@pytest.mark.parametrize(
    ("code", "how"),
    [
        (-9, "process 7 was killed by SIGKILL"),
        (-7, "process 7 was killed by SIGBUS"),
        (-63, "process 7 was killed by signal 63"),
        (0, "process 7 was killed by SIGTERM"),
        (3, "process 7 ended with exit code 3"),
    ],
)
def test_the_cause_is_told(code: int, how: str) -> None:
    workers = Workers(1)
    workers._processes = [type("Process", (), {"pid": 7, "exitcode": code})()]
    with pytest.raises(WorkerDied) as caught:
        workers.check()
    assert caught.value.how == how


def test_what_no_process_tells_is_told_as_pytorch_does() -> None:
    said = "DataLoader worker (pid 12) is killed by signal: Bus error. It is possible that dataloader's workers are out of"
    assert Workers(1).death(said).how == "DataLoader worker (pid 12) is killed by signal: Bus error"
    with pytest.raises(ValueError, match="else"), Workers(1).awaited():
        raise ValueError("something else")
    with pytest.raises(RuntimeError, match="something else"), Workers(1).awaited():
        raise RuntimeError("something else")
