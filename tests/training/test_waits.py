"""A wait for batches counts as data, except the time in which the device still had work."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch

from wds_train.checkpoint.clock import Clock
from wds_train.training import waits

WAITS = 2.0


class Gpu:
    """A GPU, by a planted time: each event comes to pass when the work queued before it is done."""

    def __init__(self) -> None:
        self.now = 0.0
        self.done_at = 0.0

    def event(self, *_: Any) -> "Event":
        return Event(self, max(self.now, self.done_at))


class Event:
    def __init__(self, gpu: Gpu, at: float) -> None:
        self.gpu = gpu
        self.at = at

    def query(self) -> bool:
        return self.at <= self.gpu.now

    def synchronize(self) -> None:
        assert self.query()

    def elapsed_time(self, end: "Event") -> float:
        return 1000 * (end.at - self.at)


def batches_of(gpu: Gpu) -> Iterator[Any]:
    while True:
        gpu.now += WAITS
        yield "batch"


@pytest.mark.parametrize(
    ("work", "data"),
    [(0.0, WAITS), (0.5, WAITS - 0.5), (WAITS, 0.0), (5 * WAITS, 0.0)],
    ids=["idle", "idle-in-the-end", "busy", "far-behind"],
)
def test_a_gpu_that_is_still_at_work_waits_for_nothing(
    monkeypatch: pytest.MonkeyPatch, work: float, data: float
) -> None:
    gpu = Gpu()
    monkeypatch.setattr(waits, "_mark", gpu.event)
    monkeypatch.setattr(waits.time, "perf_counter", lambda: gpu.now)
    clock = Clock(lambda: gpu.now)
    for _, waited in islice(waits.time_waits(batches_of(gpu), clock, torch.device("cuda")), 4):
        assert waited == WAITS
        gpu.done_at = gpu.now + work
    spent = clock.read()
    assert spent.start == WAITS
    assert spent.data == pytest.approx(3 * data)
    assert spent.steps == pytest.approx(3 * (WAITS - data))
    assert spent.seconds == pytest.approx(4 * WAITS)


def test_on_a_cpu_every_wait_is_for_data() -> None:
    gpu = Gpu()
    clock = Clock(lambda: gpu.now)
    list(islice(waits.time_waits(batches_of(gpu), clock, torch.device("cpu")), 4))
    spent = clock.read()
    assert (spent.start, spent.steps) == (WAITS, pytest.approx(0, abs=0.01))
    assert spent.data == pytest.approx(3 * WAITS, abs=0.01)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_events_of_a_real_gpu() -> None:
    device = torch.device("cuda")
    torch.cuda._sleep(200_000_000)  # cycles: at least a tenth of a second
    queued = waits._mark(device)
    assert waits._idle(queued, device, 1.0) == 0.0
    torch.cuda.synchronize()
    assert 0 <= waits._idle(queued, device, 1.0) < 1.0
