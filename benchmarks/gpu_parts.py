"""What `wds-train bench gpu` measures, a function a part. Each part runs in a process of its own, whose figures are written
as they come: a machine may vanish, and the next start goes on behind what is there.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.commit import bench_commit
from benchmarks.decode_rates import machine
from benchmarks.passes import in_child
from benchmarks.peers import OURS, Pass
from benchmarks.train_rates import CLASSES, STEPS_PER_EPOCH, random_batch, rates, ways_of
from wds_train.checkpoint.lease import read_run
from wds_train.checkpoint.restore import read_object
from wds_train.checkpoint.snapshot import Snapshot
from wds_train.config.precision import Precision
from wds_train.config.presets import preset
from wds_train.config.recipe import Recipe
from wds_train.config.settings import with_settings
from wds_train.dataset.reader import Dataset
from wds_train.errors import WdsTrainError
from wds_train.storage import embedded
from wds_train.storage.open import open_store
from wds_train.storage.s3 import S3Store
from wds_train.training.engine import Trainer
from wds_train.training.memory import fit_accumulation
from wds_train.training.options import TrainOptions
from wds_train.training.ranks import Ranks
from wds_train.training.setup import make_train_loader

# A fresh process for every training, in milliseconds: the server has imported PyTorch, and uses no GPU.
PROCESSES = multiprocessing.get_context("forkserver")

# What the search tries, each on top of the recipe `imagenette` with its epochs; docs/benchmarks.md says where it comes from.
Settings = tuple[str, ...]
SEARCHED: tuple[Settings, ...] = (
    (),
    ("optimizer.lr=0.05",),
    ("optimizer.lr=0.2",),
    ("data.scale=0.25,1.0",),
    ("model.squeeze_excite=true",),
    ("model.blur_pool=false",),
    ("schedule.flat=0.0",),
    ("schedule.flat=0.72",),
    ("optimizer.name=lamb", "optimizer.lr=0.008", "optimizer.weight_decay=0.02"),
)
SEARCH_EPOCHS = 5
MIXED_FROM = 80  # epochs: the leaderboard's runs of 5 and 20 do without mixup


@dataclass(frozen=True)
class Scale:
    """How much is measured. `settings` change the recipes of every part; `epochs` and `seeds` are those of part g."""

    settings: tuple[str, ...] = ()
    sizes: tuple[int, ...] = (224, 192, 160, 128)
    precisions: tuple[Precision, ...] = ("bf16", "fp16")
    compiled: tuple[bool, ...] = (False, True)
    batch: int = 256
    steps: int = 20
    repeats: int = 3
    workers: tuple[int, ...] = (2, 4, 8, 16)
    loader_steps: int = 200
    large_batch: int = 8192
    resumed: tuple[str, ...] = ("--deterministic", "")
    resumed_epochs: int = 2
    searched: int = len(SEARCHED)
    epochs: tuple[int, ...] = (5, 20, 80)
    seeds: tuple[int, ...] = (0, 1, 2)


FULL = Scale()
SMOKE = Scale(
    settings=(
        "model.name=test_resnet",
        "data.size=64",
        "data.eval_size=64",
        "schedule.warmup_epochs=0",
        "batch=16",
    ),
    sizes=(64,),
    precisions=("bf16",),
    compiled=(False,),
    batch=8,
    steps=1,
    repeats=1,
    workers=(1,),
    loader_steps=3,
    large_batch=16,
    resumed=("--deterministic",),
    resumed_epochs=8,
    searched=2,
    epochs=(1,),
    seeds=(0,),
)


class CannotRun(Exception):
    """Why a part cannot run here, or not to its end."""


@dataclass(frozen=True)
class Work:
    """What one part is given: the address of the dataset, empty if there is none; why there is none; the folder of the
    results; until when, on the monotonic clock, it may take.
    """

    dataset: str
    no_dataset: str
    out: Path
    scale: Scale
    until: float
    cpu: bool

    @property
    def device(self) -> torch.device:
        if not self.cpu and not torch.cuda.is_available():
            raise CannotRun(
                "PyTorch finds no GPU here; --smoke tries the part on the CPU, at a tiny scale"
            )
        return torch.device("cpu") if self.cpu else torch.device("cuda", 0)

    @property
    def images(self) -> str:
        if not self.dataset:
            raise CannotRun(self.no_dataset)
        return self.dataset

    def recipe(self, name: str, *settings: str) -> Recipe:
        return with_settings(preset(name), [*self.scale.settings, *settings])


class Rows:
    """The figures of part `name` by row, in NAME.json."""

    def __init__(self, name: str, work: Work) -> None:
        self._path, self._until = work.out / f"{name}.json", work.until
        found = json.loads(self._path.read_text()) if self._path.exists() else {}
        self.rows: dict[str, Any] = {
            key: row for key, row in found.get("rows", {}).items() if "failed" not in row
        }
        self._about = {
            "part": name,
            "device": "",
            "machine": machine(),
            "python": sys.version.split()[0],
        } | {
            "versions": {each: version(each) for each in ("wds-train", "torch", "timm")}
            | {"cuda": torch.version.cuda}
        }

    def measure(
        self, row: str, function: Callable[..., dict[str, Any]], *arguments: Any
    ) -> dict[str, Any]:
        """What `function` gives for `arguments`, unless it is there already; where it fails, why, and the other rows go on."""
        if row not in self.rows:
            if time.monotonic() > self._until:
                raise CannotRun(
                    f"no time is left for {row}; more --minutes, and the same command goes on there"
                )
            try:
                self.rows[row] = function(*arguments)
            except (
                RuntimeError,
                WdsTrainError,
            ) as error:  # too little memory, and what a compiler says
                self.rows[row] = {"failed": str(error).strip().splitlines()[0][:300]}
            self.write()
        return self.rows[row]

    def write(self, *, complete: bool = False, note: str = "") -> None:
        if torch.cuda.is_initialized():
            self._about["device"] = torch.cuda.get_device_name()
        state = self._about | {"complete": complete, "note": note, "rows": self.rows}
        written = self._path.with_suffix(".tmp")
        written.write_text(json.dumps(state, indent=1))
        written.replace(self._path)


def run_part(name: str, work: Work) -> None:
    """Measure a part, in a process of its own. What cannot be measured is noted in the part's file."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no training is left behind
    rows = Rows(name, work)
    try:
        FUNCTIONS[name](work, rows)
    except CannotRun as reason:
        rows.write(note=str(reason))
    else:
        rows.write(complete=not any("failed" in row for row in rows.rows.values()))


def training_steps(work: Work, rows: Rows) -> None:
    """(a) Training steps beside timm's loop, the same model in the same run."""
    scale, _ = work.scale, work.device
    recipe = work.recipe(
        "standard", f"batch={scale.batch}", "model.blur_pool=false", "data.start_size=0"
    )
    for compiled in scale.compiled:
        for side in scale.sizes:
            for precision in scale.precisions:
                row = f"{side} px, {precision}{', compiled' if compiled else ''}"
                rows.measure(row, _step_rates, work, recipe, side, precision, compiled)


def _step_rates(
    work: Work, recipe: Recipe, side: int, precision: Precision, compiled: bool
) -> dict[str, Any]:
    torch.compiler.reset()  # or the eighth model of the same code would run uncompiled, in silence
    scale, device = work.scale, work.device
    ways = ways_of(recipe, side, device, compiled=compiled, precision=precision)
    return {
        way: round(rate, 1)
        for way, rate in rates(ways, scale.batch, scale.steps, scale.repeats, device).items()
    }


def real_loader(work: Work, rows: Rows) -> None:
    """(b) The loader alone, then the trainer fed by it."""
    scale, dataset = work.scale, work.images
    device, cores = work.device, sorted(os.sched_getaffinity(0))
    recipe = work.recipe("imagenette")
    for workers in (each for each in scale.workers if each <= len(cores)):
        wanted = Pass(dataset, "", str(work.out), workers, recipe.batch, recipe.data.size)
        row, environment = f"loader, {workers} workers", dict(os.environ)
        rows.measure(row, in_child, "measure", OURS, wanted, cores, environment)
    alone = {
        row: figures["img_per_s"] for row, figures in rows.rows.items() if "img_per_s" in figures
    }
    if not alone:
        raise CannotRun("the loader could not be measured")
    best = max(alone, key=lambda row: alone[row])
    figures = rows.measure(
        "trainer", _fed, dataset, recipe, int(best.split()[1]), scale.loader_steps, device
    )
    figures["loader_alone_img_per_s"] = alone[
        best
    ]  # the limit, where the wait for data is more than 2 %


def _fed(
    dataset: str, recipe: Recipe, workers: int, steps: int, device: torch.device
) -> dict[str, Any]:
    opened = Dataset.open(dataset)
    split = opened.split("train")
    per_epoch = max(1, len(split) // recipe.batch)
    epochs = -(-2 * steps // per_epoch) + 1
    on_gpu = device.type == "cuda"
    schedule = replace(recipe.schedule, epochs=max(epochs, recipe.schedule.epochs))
    options = TrainOptions(
        dataset, "file:///unused/bench", replace(recipe, schedule=schedule), workers
    )
    loader = make_train_loader(options, [opened], Ranks(cpu=not on_gpu))
    loader.start()
    trainer = Trainer(recipe, len(opened.manifest.classes), per_epoch, device)
    batches = iter(loader)
    for _ in range(steps):  # cuDNN chooses its algorithms, the windows fill
        trainer.step(next(batches))
    trainer.epoch_loss()
    waited, began = 0.0, time.perf_counter()
    with _watched_gpu() as gpu:
        for _ in range(steps):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            trainer.step(batch)
        trainer.epoch_loss()
    seconds = time.perf_counter() - began
    if on_gpu:
        gpu["memory_mb"] = round(torch.cuda.max_memory_allocated(device) / 1e6)
    return {
        "workers": workers,
        "img_per_s": round(steps * recipe.batch / seconds, 1),
        "data_wait_percent": round(100 * waited / seconds, 2),
    } | gpu


@contextlib.contextmanager
def _watched_gpu() -> Iterator[dict[str, Any]]:
    """A dict that is filled, at the end, with the mean utilisation that nvidia-smi tells of; with nothing where there
    is none.
    """
    figures: dict[str, Any] = {}
    done, seen = threading.Event(), list[float]()

    def look() -> None:
        query = [
            "nvidia-smi",
            "--query-gpu=utilization.gpu",
            "--format=csv,noheader,nounits",
            "--id=0",
        ]
        while not done.wait(0.5):
            with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
                seen.append(
                    float(
                        subprocess.run(
                            query, capture_output=True, text=True, check=True, timeout=5
                        ).stdout
                    )
                )

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    yield figures
    done.set()
    looking.join()
    if seen:
        figures["utilisation_percent"] = round(sum(seen) / len(seen), 1)


def commits(work: Work, rows: Rows) -> None:
    """(c) The pause and the upload of a commit, to this disk and to an S3 server on this machine."""
    recipe, device = work.recipe("imagenette"), work.device
    trainer = Trainer(recipe, CLASSES, STEPS_PER_EPOCH, device)
    trainer.step(random_batch(recipe.batch, recipe.data.size, device))

    def on_disk() -> dict[str, Any]:
        return bench_commit(trainer, open_store(str(_fresh(work.out / "commits"))))

    def on_s3() -> dict[str, Any]:
        root = _fresh(work.out / "s3")
        try:
            return bench_commit(
                trainer, S3Store("embedded", "bench", embedded.ensure_running(root))
            )
        finally:
            embedded.stop(root)

    rows.measure("local directory", on_disk)
    rows.measure("embedded S3 server", on_s3)


def _fresh(folder: Path) -> Path:
    """A path below which nothing is: an earlier start may have been cut off in the midst of its run."""
    number = 0
    while (path := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return path


def resume(work: Work, rows: Rows) -> None:
    """(d) A run that is killed after the first epoch and resumed, beside a run that never was: equal to the last bit,
    or how far apart.
    """
    for flag in work.scale.resumed:
        rows.measure(flag or "as usual", _killed_and_resumed, work, (flag,) if flag else ())


def _killed_and_resumed(work: Work, flags: tuple[str, ...]) -> dict[str, Any]:
    # Of blur-pool's padding PyTorch has no deterministic gradient on a GPU.
    settings = ("model.blur_pool=false", f"schedule.epochs={work.scale.resumed_epochs}")
    folder = _fresh(work.out / "resume")
    unbroken = _Training(work, folder / "unbroken", settings, flags)
    unbroken.finish()
    killed = _Training(work, folder / "killed", settings, flags)
    killed.kill_after_commit()
    _Training(work, folder / "killed", settings, flags).finish()
    one, other = (_final(folder / name) for name in ("unbroken", "killed"))
    apart = [float((one.tensors[name] - value).abs().max()) for name, value in other.tensors.items()
             if value.is_floating_point() and value.numel()]  # fmt: skip
    equal = all(torch.equal(one.tensors[name], value) for name, value in other.tensors.items())
    return {"bit_equal": equal, "largest_difference": max(apart)} | {
        f"{name}_top1": read_run(open_store(str(folder / name)))[0].result["val/top1"]
        for name in ("unbroken", "killed")
    }


def _final(run: Path) -> Snapshot:
    store = open_store(str(run))
    manifest, _ = read_run(store)
    newest = manifest.checkpoints[-1]
    return Snapshot.decode(read_object(store, newest.object), newest.progress)


def accumulation(work: Work, rows: Rows) -> None:
    """(e) The micro-batches that a batch takes which is too large for any memory, and their speed."""
    scale, device = work.scale, work.device

    def measured() -> dict[str, Any]:
        recipe = work.recipe(
            "imagenette", f"batch={scale.large_batch}", f"data.size={scale.sizes[0]}"
        )
        trainer = Trainer(recipe, CLASSES, STEPS_PER_EPOCH, device)
        trainer.accumulate = fit_accumulation(trainer)
        given = random_batch(scale.large_batch, scale.sizes[0], device)
        trainer.step(given)
        trainer.epoch_loss()
        began = time.perf_counter()
        trainer.step(replace(given, step=1))
        trainer.epoch_loss()
        figures: dict[str, Any] = {"batch": scale.large_batch, "micro_batches": trainer.accumulate}
        figures["img_per_s"] = round(scale.large_batch / (time.perf_counter() - began), 1)
        if device.type == "cuda":
            figures["memory_mb"] = round(torch.cuda.max_memory_allocated(device) / 1e6)
        return figures

    rows.measure(f"{scale.sizes[0]} px", measured)


def two_ranks(work: Work, rows: Rows) -> None:
    """(f) Two ranks on one GPU: with NCCL, which refuses that in most versions, else with gloo."""
    for backend in ("gloo",) if work.device.type == "cpu" else ("nccl", "gloo"):
        figures = rows.measure(backend, _together, work, backend)
        if "failed" not in figures:
            return
        if backend == "nccl":
            figures["refused"] = figures.pop("failed")


def _together(work: Work, backend: str) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
    }
    folder, settings = (
        _fresh(work.out / "ranks") / backend,
        ("schedule.epochs=1", "schedule.warmup_epochs=0"),
    )
    began = time.monotonic()
    ranks = [
        _Training(work, folder, settings, (), place | {"RANK": str(rank), "WDS_BACKEND": backend})
        for rank in (0, 1)
    ]
    try:
        for rank in ranks:
            rank.finish()
    finally:
        for rank in ranks:
            rank.end()
    result = read_run(open_store(str(folder)))[0].result
    return {
        "loss": result["epoch/loss"],
        "top1": result["val/top1"],
        "seconds": round(time.monotonic() - began, 1),
    }


def imagenette(work: Work, rows: Rows) -> None:
    """(g) The best of SEARCHED on few epochs; then that, to the end, with every number of epochs and every seed."""
    epochs = min(SEARCH_EPOCHS, work.scale.epochs[0])

    def score(settings: Settings, seed: int) -> float:
        named = f"search, seed {seed}: {_named(settings)}"
        return rows.measure(named, _trained, work, epochs, seed, settings).get("top1", 0.0)

    best = halved(SEARCHED[: work.scale.searched], score)
    for epochs in work.scale.epochs:
        for seed in work.scale.seeds:
            rows.measure(
                f"{epochs} epochs, seed {seed}: {_named(best)}", _trained, work, epochs, seed, best
            )


def halved(candidates: Sequence[Settings], score: Callable[[Settings, int], float]) -> Settings:
    """Successive halving: every round scores those that are left with another seed, and keeps the better half by the sum of
    their scores, until one is left.
    """
    left, sums, seed = list(candidates), dict.fromkeys(candidates, 0.0), 0
    while len(left) > 1:
        for settings in left:
            sums[settings] += score(settings, seed)
        left = sorted(left, key=lambda settings: -sums[settings])[: -(-len(left) // 2)]
        seed += 1
    return left[0]


def _named(settings: Settings) -> str:
    return " ".join(settings) or "the recipe itself"


def _trained(work: Work, epochs: int, seed: int, settings: tuple[str, ...]) -> dict[str, Any]:
    """The better of raw and EMA top-1 after the last epoch. A run that an earlier start left unfinished goes on."""
    mixes = ("mix.mixup=0.2", "mix.cutmix=1.0", "mix.prob=0.5") if epochs >= MIXED_FROM else ()
    chosen = (*mixes, *settings, f"schedule.epochs={epochs}", f"seed={seed}")
    run = (
        work.out
        / "runs"
        / f"e{epochs}-s{seed}-{'-'.join(settings).replace('=', '-').replace(',', '-') or 'recipe'}"
    )
    began = time.monotonic()
    _Training(work, run, chosen, ()).finish()
    result = read_run(open_store(str(run)))[0].result
    raw, ema = result["val/top1"], result["val/top1_ema"]
    return {
        "raw": raw,
        "ema": ema,
        "top1": max(raw, ema),
        "seconds": round(time.monotonic() - began, 1),
    }


class _Training:
    """Runs `wds-train train` in a process of its own, of the recipe `imagenette`."""

    def __init__(
        self,
        work: Work,
        run: Path,
        settings: tuple[str, ...],
        flags: tuple[str, ...],
        environment: dict[str, str] | None = None,
    ) -> None:
        self._run, self._until = run, work.until
        run.parent.mkdir(parents=True, exist_ok=True)
        rank = (environment or {}).get("RANK", "0")
        self._log = run.with_name(f"{run.name}-{rank}.log")
        chosen = [
            part for setting in (*work.scale.settings, *settings) for part in ("--set", setting)
        ]
        workers = str(min(8, max(1, len(os.sched_getaffinity(0)) - 1)))
        command = [
            "train",
            "--recipe",
            "imagenette",
            "--dataset",
            work.images,
            "--run",
            str(run),
            "--workers",
            workers,
        ]
        command += ["--device", "cpu"] if work.device.type == "cpu" else []
        home = {"WDS_HOME": str(work.out / "home"), "WANDB_MODE": "disabled"} | (environment or {})
        self._process = PROCESSES.Process(
            target=_train, args=([*command, *chosen, *flags], home, str(self._log)), daemon=False
        )
        self._process.start()

    def finish(self) -> None:
        """Wait for it. `CannotRun` when the time is up: its run then goes on at the next start."""
        try:
            self._process.join(max(0.0, self._until - time.monotonic()))
            if self._process.exitcode is None:
                raise CannotRun(
                    f"no time is left for {self._run}; more --minutes, and the same command goes on there"
                )
            if self._process.exitcode:
                last = (
                    [line for line in self._log.read_text().splitlines() if line.strip()]
                    or ["no word"]
                )[-1]
                raise WdsTrainError(
                    f"the training ended with code {self._process.exitcode}: {last}"
                )
        finally:
            self.end()

    def kill_after_commit(self) -> None:
        """Kill it, with SIGKILL, as soon as the manifest names a checkpoint."""
        store = open_store(str(self._run))
        try:
            while self._process.exitcode is None and time.monotonic() < self._until:
                with contextlib.suppress(WdsTrainError):  # there is no run yet
                    if read_run(store)[0].checkpoints:
                        return
                time.sleep(0.02)
            raise WdsTrainError(
                f"{self._run} was over before it could be killed; {self._log} says more"
            )
        finally:
            self._process.kill()
            self._process.join()

    def end(self) -> None:
        """End it, so that nothing is left of it; what it committed stands."""
        if self._process.exitcode is None:
            self._process.terminate()
            self._process.join(20)
            self._process.kill()
            self._process.join()


def _train(arguments: list[str], environment: dict[str, str], log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    os.environ.update(environment)
    from wds_train.cli import main

    raise SystemExit(main(arguments))


FUNCTIONS: dict[str, Callable[[Work, Rows], None]] = {
    "a": training_steps,
    "b": real_loader,
    "c": commits,
    "d": resume,
    "e": accumulation,
    "f": two_ranks,
    "g": imagenette,
}
