"""The parts of `wds-train bench gpu`, one function each.

Each part runs in a process of its own. Its figures are written as they come: a machine may vanish,
and the next start goes on behind what is there.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.commit import bench_commit
from benchmarks.gpu_training import Training
from benchmarks.gpu_work import SEARCHED, CannotRun, Rows, Settings, Work
from benchmarks.passes import in_child
from benchmarks.peers import OURS, Pass
from benchmarks.train_rates import CLASSES, STEPS_PER_EPOCH, random_batch, rates, ways_of
from wds_train.checkpoint.lease import read_run
from wds_train.checkpoint.restore import read_object
from wds_train.checkpoint.snapshot import Snapshot
from wds_train.config.precision import Precision
from wds_train.config.recipe import Recipe
from wds_train.dataset.reader import Dataset
from wds_train.loader.train_loader import TrainLoader
from wds_train.storage import embedded
from wds_train.storage.open import open_store
from wds_train.storage.s3 import S3Store
from wds_train.training.engine import Trainer
from wds_train.training.memory import fit_accumulation
from wds_train.training.options import TrainOptions
from wds_train.training.ranks import Ranks
from wds_train.training.setup import make_train_loader

SEARCH_EPOCHS = 5
MIXED_FROM = 80  # epochs: the leaderboard's runs of 5 and 20 do without mixup
MIXED = ("mix.mixup=0.2", "mix.cutmix=1.0", "mix.prob=0.5")
LOOK_SECONDS = 0.5  # between looks at the GPU's utilisation


def run_part(name: str, work: Work) -> None:
    """Measure a part, in a process of its own. What cannot be measured is noted in its file.

    Args:
        name: The part's letter.
        work: What it is given.
    """
    # A plain SIGTERM would end this process alone, and leave its trainings behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    rows = Rows(name, work)
    try:
        FUNCTIONS[name](work, rows)
    except CannotRun as reason:
        rows.write(note=str(reason))
    else:
        rows.write(complete=not any("failed" in figures for figures in rows.rows.values()))


def training_steps(work: Work, rows: Rows) -> None:
    """(a) Measure training steps and timm's loop, with the same model in the same run."""
    scale = work.scale
    recipe = work.recipe(
        "standard", f"batch={scale.batch}", "model.blur_pool=false", "data.start_size=0"
    )
    for compiled in scale.compiled:
        suffix = ", compiled" if compiled else ""
        for side in scale.sizes:
            for precision in scale.precisions:
                row = f"{side} px, {precision}{suffix}"
                rows.measure(row, _step_rates, work, recipe, side, precision, compiled)


def _step_rates(
    work: Work, recipe: Recipe, side: int, precision: Precision, compiled: bool
) -> dict[str, Any]:
    """Return images per second of our step and of timm's."""
    torch.compiler.reset()  # or the eighth model of the same code would run uncompiled, in silence
    scale = work.scale
    device = work.device
    ways = ways_of(recipe, side, device, compiled=compiled, precision=precision)
    measured = rates(ways, scale.batch, scale.steps, scale.repeats, device)
    return {way: round(rate, 1) for way, rate in measured.items()}


def real_loader(work: Work, rows: Rows) -> None:
    """(b) Measure the loader alone, then the trainer fed by it."""
    scale = work.scale
    dataset = work.images
    device = work.device
    cores = sorted(os.sched_getaffinity(0))
    recipe = work.recipe("imagenette")

    # The loader alone, with as many workers as the machine has cores for.
    for workers in scale.workers:
        if workers <= len(cores):
            wanted = Pass(dataset, "", str(work.out), workers, recipe.batch, recipe.data.size)
            row = f"loader, {workers} workers"
            rows.measure(row, in_child, "measure", OURS, wanted, cores, dict(os.environ))
    alone: dict[str, float] = {}
    for row, figures in rows.rows.items():
        if "img_per_s" in figures:
            alone[row] = figures["img_per_s"]
    if not alone:
        raise CannotRun("the loader could not be measured")

    # The trainer, fed with the number of workers that was best.
    best = max(alone, key=lambda row: alone[row])
    workers = int(best.split()[1])
    figures = rows.measure("trainer", _fed, work, device, recipe, workers)
    # The limit, if the wait for data is more than 2 %.
    figures["loader_alone_img_per_s"] = alone[best]


def _fed(work: Work, device: torch.device, recipe: Recipe, workers: int) -> dict[str, Any]:
    """Return the speed of a trainer that the real loader feeds, and its wait for data."""
    steps = work.scale.loader_steps
    dataset = Dataset.open(work.images)
    per_epoch = max(1, len(dataset.split("train")) // recipe.batch)
    loader = _training_loader(work, dataset, recipe, workers, per_epoch)
    loader.start()
    trainer = Trainer(recipe, len(dataset.manifest.classes), per_epoch, device)

    # cuDNN chooses its algorithms, the windows fill.
    batches = iter(loader)
    for _ in range(steps):
        trainer.step(next(batches))
    trainer.epoch_loss()

    # Asking for the loss waits until the device has done all steps.
    waited = 0.0
    began = time.perf_counter()
    with _watched_gpu() as gpu:
        for _ in range(steps):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            trainer.step(batch)
        trainer.epoch_loss()
    seconds = time.perf_counter() - began
    if device.type == "cuda":
        gpu["memory_mb"] = round(torch.cuda.max_memory_allocated(device) / 1e6)
    return {
        "workers": workers,
        "img_per_s": round(steps * recipe.batch / seconds, 1),
        "data_wait_percent": round(100 * waited / seconds, 2),
    } | gpu


def _training_loader(
    work: Work, dataset: Dataset, recipe: Recipe, workers: int, per_epoch: int
) -> TrainLoader:
    """Return the loader of a training that is long enough to warm up and to be measured."""
    epochs = -(-2 * work.scale.loader_steps // per_epoch) + 1
    schedule = replace(recipe.schedule, epochs=max(epochs, recipe.schedule.epochs))
    recipe = replace(recipe, schedule=schedule)
    options = TrainOptions(work.images, "file:///unused/bench", recipe, workers)
    return make_train_loader(options, [dataset], Ranks(cpu=work.device.type != "cuda"))


@contextlib.contextmanager
def _watched_gpu() -> Iterator[dict[str, Any]]:
    """Yield a dict that gets the GPU's mean utilisation at the end, if nvidia-smi has it."""
    figures: dict[str, Any] = {}
    seen: list[float] = []
    done = threading.Event()

    def look() -> None:
        while not done.wait(LOOK_SECONDS):
            with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
                seen.append(_utilisation())

    # nvidia-smi takes as long as a step, so it runs during the training.
    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    yield figures
    done.set()
    looking.join()
    if seen:
        figures["utilisation_percent"] = round(sum(seen) / len(seen), 1)


def _utilisation() -> float:
    query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--id=0"]
    done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=5)
    return float(done.stdout)


def commits(work: Work, rows: Rows) -> None:
    """(c) Measure a commit's pause and upload, to this disk and to an S3 server on this machine."""
    recipe = work.recipe("imagenette")
    device = work.device
    trainer = Trainer(recipe, CLASSES, STEPS_PER_EPOCH, device)
    trainer.step(random_batch(recipe.batch, recipe.data.size, device))
    rows.measure("local directory", _commit_to_disk, work, trainer)
    rows.measure("embedded S3 server", _commit_to_s3, work, trainer)


def _commit_to_disk(work: Work, trainer: Trainer) -> dict[str, Any]:
    return bench_commit(trainer, open_store(str(_fresh(work.out / "commits"))))


def _commit_to_s3(work: Work, trainer: Trainer) -> dict[str, Any]:
    root = _fresh(work.out / "s3")
    try:
        store = S3Store("embedded", "bench", embedded.ensure_running(root))
        return bench_commit(trainer, store)
    finally:
        embedded.stop(root)


def _fresh(folder: Path) -> Path:
    """Return a path at which nothing is: an earlier start may have been cut off in its run."""
    number = 0
    path = folder.with_name(f"{folder.name}-0")
    while path.exists():
        number += 1
        path = folder.with_name(f"{folder.name}-{number}")
    return path


def resume(work: Work, rows: Rows) -> None:
    """(d) Compare a run that is killed after an epoch and resumed with one that never was."""
    for flag in work.scale.resumed:
        flags = (flag,) if flag else ()
        rows.measure(flag or "as usual", _killed_and_resumed, work, flags)


def _killed_and_resumed(work: Work, flags: tuple[str, ...]) -> dict[str, Any]:
    """Return whether the runs end with the same bits, the largest difference, and their top-1."""
    # PyTorch has no deterministic gradient of blur-pool's padding on a GPU.
    settings = ("model.blur_pool=false", f"schedule.epochs={work.scale.resumed_epochs}")
    folder = _fresh(work.out / "resume")
    unbroken = folder / "unbroken"
    killed = folder / "killed"
    Training(work, unbroken, settings, flags).finish()
    Training(work, killed, settings, flags).kill_after_commit()
    Training(work, killed, settings, flags).finish()

    # Equal bits are asked of all tensors, a distance of those that have one.
    expected = _final_state(unbroken)
    equal = True
    differences = []
    for name, value in _final_state(killed).tensors.items():
        other = expected.tensors[name]
        equal = equal and torch.equal(other, value)
        if value.is_floating_point() and value.numel():
            differences.append(float((other - value).abs().max()))
    return {
        "bit_equal": equal,
        "largest_difference": max(differences),
        "unbroken_top1": _result(unbroken)["val/top1"],
        "killed_top1": _result(killed)["val/top1"],
    }


def _final_state(run: Path) -> Snapshot:
    store = open_store(str(run))
    manifest, _ = read_run(store)
    newest = manifest.checkpoints[-1]
    return Snapshot.decode(read_object(store, newest.object), newest.progress)


def _result(run: Path) -> dict[str, Any]:
    """Return the figures that a run's manifest has of its end."""
    manifest, _ = read_run(open_store(str(run)))
    return manifest.result


def accumulation(work: Work, rows: Rows) -> None:
    """(e) Measure a batch that is too large for any memory, in the micro-batches that it takes."""
    rows.measure(f"{work.scale.sizes[0]} px", _accumulated, work)


def _accumulated(work: Work) -> dict[str, Any]:
    batch = work.scale.large_batch
    side = work.scale.sizes[0]
    device = work.device
    recipe = work.recipe("imagenette", f"batch={batch}", f"data.size={side}")
    trainer = Trainer(recipe, CLASSES, STEPS_PER_EPOCH, device)
    trainer.accumulate = fit_accumulation(trainer)

    # The first step warms up; the loss waits for the device.
    given = random_batch(batch, side, device)
    trainer.step(given)
    trainer.epoch_loss()
    began = time.perf_counter()
    trainer.step(replace(given, step=1))
    trainer.epoch_loss()
    seconds = time.perf_counter() - began

    figures: dict[str, Any] = {"batch": batch, "micro_batches": trainer.accumulate}
    figures["img_per_s"] = round(batch / seconds, 1)
    if device.type == "cuda":
        figures["memory_mb"] = round(torch.cuda.max_memory_allocated(device) / 1e6)
    return figures


def two_ranks(work: Work, rows: Rows) -> None:
    """(f) Train with two ranks on one GPU: by NCCL, which most versions refuse, else by gloo."""
    backends = ["nccl", "gloo"]
    if work.device.type == "cpu":
        backends = ["gloo"]
    for backend in backends:
        figures = rows.measure(backend, _together, work, backend)
        if "failed" not in figures:
            return
        # That NCCL refuses is no failure of the part.
        if backend == "nccl":
            figures["refused"] = figures.pop("failed")


def _together(work: Work, backend: str) -> dict[str, Any]:
    """Train with two ranks, and return the run's loss, top-1 and seconds."""
    # Both ranks train one run, and find each other at a free port.
    place = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "WDS_BACKEND": backend,
    }
    run = _fresh(work.out / "ranks") / backend
    settings = ("schedule.epochs=1", "schedule.warmup_epochs=0")
    began = time.monotonic()
    ranks = []
    for rank in ("0", "1"):
        ranks.append(Training(work, run, settings, (), place | {"RANK": rank}))
    try:
        for training in ranks:
            training.finish()
    finally:
        # A rank that waits for one that failed would wait long.
        for training in ranks:
            training.end()
    result = _result(run)
    return {
        "loss": result["epoch/loss"],
        "top1": result["val/top1"],
        "seconds": round(time.monotonic() - began, 1),
    }


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def imagenette(work: Work, rows: Rows) -> None:
    """(g) Find the best of `SEARCHED` on few epochs, then train it to the end.

    The second is done for every number of epochs and every seed.
    """
    # A candidate whose training fails scores 0, and so is dropped first.
    few = min(SEARCH_EPOCHS, work.scale.epochs[0])

    def score(settings: Settings, seed: int) -> float:
        row = f"search, seed {seed}: {_named(settings)}"
        return rows.measure(row, _trained, work, few, seed, settings).get("top1", 0.0)

    best = halved(SEARCHED[: work.scale.searched], score)
    for epochs in work.scale.epochs:
        for seed in work.scale.seeds:
            row = f"{epochs} epochs, seed {seed}: {_named(best)}"
            rows.measure(row, _trained, work, epochs, seed, best)


def halved(candidates: Sequence[Settings], score: Callable[[Settings, int], float]) -> Settings:
    """Find the best candidate by successive halving.

    Every round scores those that are left with another seed, and keeps the better half by the sum
    of their scores, until one is left.

    Args:
        candidates: What is compared; at least one.
        score: Returns the score of a candidate with a seed; more is better.

    Returns:
        The best.
    """
    left = list(candidates)
    sums = dict.fromkeys(candidates, 0.0)
    seed = 0
    while len(left) > 1:
        for settings in left:
            sums[settings] += score(settings, seed)
        left.sort(key=lambda settings: -sums[settings])
        left = left[: -(-len(left) // 2)]
        seed += 1
    return left[0]


def _named(settings: Settings) -> str:
    return " ".join(settings) or "the recipe itself"


def _trained(work: Work, epochs: int, seed: int, settings: Settings) -> dict[str, Any]:
    """Train, or go on with a run that an earlier start left unfinished.

    Returns:
        Top-1 after the last epoch of the raw and the EMA weights, the better of both, and seconds.
    """
    mixed = MIXED if epochs >= MIXED_FROM else ()
    chosen = (*mixed, *settings, f"schedule.epochs={epochs}", f"seed={seed}")
    named = "-".join(settings).replace("=", "-").replace(",", "-") or "recipe"
    run = work.out / "runs" / f"e{epochs}-s{seed}-{named}"
    began = time.monotonic()
    Training(work, run, chosen, ()).finish()
    result = _result(run)
    raw = result["val/top1"]
    ema = result["val/top1_ema"]
    return {
        "raw": raw,
        "ema": ema,
        "top1": max(raw, ema),
        "seconds": round(time.monotonic() - began, 1),
    }


FUNCTIONS: dict[str, Callable[[Work, Rows], None]] = {
    "a": training_steps,
    "b": real_loader,
    "c": commits,
    "d": resume,
    "e": accumulation,
    "f": two_ranks,
    "g": imagenette,
}
