"""A training from start or resume to its end: the loader, the engine, the run on S3 and the signals, put together.

    claim the run -> restore the newest checkpoint -> for every step: load, step -> at every epoch: validate, commit

The loop looks at signals, the spot notice and the clock between steps only, so that what is committed is always a whole
step; while validating, between batches: the validation is then repeated after the resume.
"""

import contextlib
import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from wds_train.cache import BlockCache
from wds_train.checkpoint import Run, Snapshot, read_object
from wds_train.dataset import Dataset
from wds_train.devserver import home
from wds_train.distributed import LAST_SECONDS, Ranks, die_with_launcher, lost_ranks
from wds_train.engine import Trainer
from wds_train.errors import (
    Interrupted,
    NotFinite,
    NotFound,
    RanksLost,
    RunError,
    StoreError,
    Unavailable,
    UsageError,
    WdsTrainError,
    tell,
)
from wds_train.lease import read_run
from wds_train.memory import fit_accumulation
from wds_train.pipeline import (
    Batch,
    EvalPlan,
    EvalTransform,
    Loader,
    Mixture,
    TrainPlan,
    TrainTransform,
    on_device,
    shares,
)
from wds_train.recipe import Recipe
from wds_train.scoring import EVAL_BATCH, Precision
from wds_train.spot import SpotWatch, StopRequest
from wds_train.state import RunManifest, name_of
from wds_train.store import Store, open_store
from wds_train.tracker import Progress, Tracker, say

LOGS_PER_EPOCH = 4
LOG_STEPS = 50  # at most so many steps between two records; each makes the CPU wait for the GPU
LAST_MOMENT = 2.0  # seconds of the last commit's time that are left to say how it went
ROLLBACKS = 2  # per run, after a loss that is not finite


@dataclass(frozen=True)
class TrainOptions:
    dataset: str
    run: str
    recipe: Recipe
    workers: int
    mix: tuple[tuple[str, float], ...] = ()
    """Other datasets, and the share of every batch that each gives."""
    cache_dir: Path | None = None
    cache_bytes: int = 0
    commit_minutes: float = 10.0
    max_uncommitted_minutes: float = 60.0
    keep_every: int = 0
    wait: bool = True
    deterministic: bool = False
    accumulate: int | None = None
    """Micro-batches per rank and step; None: as few as fit into the GPU's memory."""
    precision: Precision = "auto"
    compile: bool = False
    cpu: bool = False
    """Whether to leave the GPUs alone."""

    def __post_init__(self) -> None:
        name_of(self.run)
        if not 0 < self.commit_minutes < self.max_uncommitted_minutes:
            raise UsageError(
                f"--commit-minutes {self.commit_minutes:g} must be more than 0 and less than --max-uncommitted-minutes "
                f"{self.max_uncommitted_minutes:g}"
            )


def train(options: TrainOptions, stop: StopRequest) -> dict[str, float]:
    """Train, or go on with, `options.run`; the final metrics. Raises `Interrupted` once asked to stop, state committed."""
    die_with_launcher()
    ranks = Ranks.of_environment(cpu=options.cpu)
    if options.deterministic:
        _be_deterministic()
    dataset = Dataset.open(options.dataset)
    datasets = [dataset, *(_of_same_classes(Dataset.open(url), dataset) for url, _ in options.mix)]
    stop.check()
    stop.doing = f"the claim of {options.run}"
    run, snapshot = _lead(options, datasets, stop, ranks)
    tracker = Tracker(run.manifest)
    if run.manifest.status == "done":
        if ranks.leads:
            say(f"run {options.run} is done already; to train again, choose another run: make train RUN=another")
    else:
        try:
            with tracker, _ending(run, stop, options.deterministic):
                session = _Session(options, datasets, run, stop, ranks=ranks, tracker=tracker)
                session.fork(snapshot.progress.step if snapshot else 0)
                session.connect()
                session.restore(snapshot)
                session.run_to_end()
        finally:
            ranks.close()
    if ranks.leads:
        _close(run, options, tracker.where)
    return run.manifest.result


@contextlib.contextmanager
def _ending(run: Run, stop: StopRequest, deterministic: bool) -> Iterator[None]:
    """How a training ends that does not get to its end: the cause is told, and then the manifest says so, too, if the store
    takes that last word within seconds. A run that is done stays done, whatever fails after its last commit.
    """
    try:
        yield
    except WdsTrainError as caught:
        stop.doing = f"the last word to {run.store.url}"
        error, status = _judged(run, caught, deterministic)
        if run.manifest.status != "done":
            tell(error)
            if status is not None:
                _finish_commits(run)
        if run.manifest.status == "done":
            say(f"the run is done all the same ({error})")
            return
        if status is not None:
            _give_up(run, status)
        raise error from caught


def _judged(run: Run, error: WdsTrainError, deterministic: bool) -> tuple[WdsTrainError, str | None]:
    """What to tell of `error`, and the status that it gives the run. None where the manifest says it already, is another
    instance's, or lies in a store that does not answer, which takes no last word either.
    """
    if isinstance(error, NotFinite):
        return _go_back(run, error, deterministic)
    if isinstance(error, RanksLost):
        return error, "interrupted"
    return error, None if isinstance(error, Interrupted | Unavailable) else "failed"


def _lead(
    options: TrainOptions, datasets: list[Dataset], stop: StopRequest, ranks: Ranks
) -> tuple[Run, Snapshot | None]:
    """The run, claimed, and its newest usable checkpoint; the other ranks follow."""
    store = open_store(options.run)
    if not ranks.leads:
        return _follow(store, ranks.announced(stop.sleep))
    try:
        _refuse(options, datasets, store, ranks)
        fresh = _fresh_run(options, datasets)
        run = Run.claim(store, fresh, say, wait=options.wait, pause=stop.sleep, keep_every=options.keep_every)
        with _ending(run, stop, options.deterministic):
            snapshot = None if run.manifest.status == "done" else run.restore(say)
    except BaseException:
        ranks.announce({})
        raise
    ranks.announce(
        {"manifest": run.manifest.to_json().decode(), "progress": asdict(snapshot.progress) if snapshot else None}
    )
    return run, snapshot


def _refuse(options: TrainOptions, datasets: list[Dataset], store: Store, ranks: Ranks) -> None:
    """Raise what could not work, before the claim: a name must stay free, and a run as it is. The model is made without
    memory for its weights, and called without arithmetic (PyTorch's device "meta"), which takes a fraction of a second.
    """
    resumes = False
    with contextlib.suppress(NotFound):
        found, _ = read_run(store)
        if found.status == "done":
            return
        resumes = bool(found.checkpoints)  # the weights that it began from may be gone by now
    steps = _steps(options, datasets)
    for dataset, size in zip(datasets, _sizes(options), strict=True):
        _plan(options, dataset, size, range(steps * options.recipe.schedule.epochs), ranks)
    on_meta = replace(options, compile=False)
    _trainer(on_meta, datasets, torch.device("meta"), Ranks(ranks.rank, ranks.size), resumes=resumes)


def _trainer(
    options: TrainOptions, datasets: list[Dataset], device: torch.device, ranks: Ranks, *, resumes: bool
) -> Trainer:
    return Trainer(
        options.recipe,
        len(datasets[0].manifest.classes),
        _steps(options, datasets),
        device,
        ranks,
        accumulate=options.accumulate or 1,
        precision=options.precision,
        compile=options.compile,
        resumes=resumes,
    )


def _follow(store: Store, announced: dict[str, Any]) -> tuple[Run, Snapshot | None]:
    """The leader's run, to be read only, and the same checkpoint."""
    if not announced:
        raise Interrupted("rank 0 could not begin; its message says why")
    manifest = RunManifest.from_json(announced["manifest"].encode(), store.url)
    run = Run(store, manifest, "", say=say, leads=False)
    if announced["progress"] is None:
        return run, None
    chosen = next(c for c in reversed(manifest.checkpoints) if asdict(c.progress) == announced["progress"])
    return run, Snapshot.decode(read_object(store, chosen.object), chosen.progress)


def _be_deterministic() -> None:
    """Only algorithms that give the same bits each time; on GPUs slower, on CPUs no other than the usual ones."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS's condition, read when CUDA starts
    torch.use_deterministic_algorithms(True)


def _go_back(run: Run, error: NotFinite, deterministic: bool) -> tuple[WdsTrainError, str | None]:
    """As `_judged`, after a loss that is not finite, which was not committed. On a GPU the next attempt, from the newest
    checkpoint, may round otherwise and pass; where the same arithmetic would only fail again, it is not tried.
    """
    _finish_commits(run)
    if not run.manifest.checkpoints or deterministic or not torch.cuda.is_available():
        return error, "failed"
    if run.manifest.rollbacks == ROLLBACKS:
        return RunError(f"{error}; {ROLLBACKS} returns to a checkpoint did not help"), "failed"
    done = run.manifest.rollbacks + 1
    _give_up(run, "interrupted", rollbacks=done)
    newest = run.manifest.checkpoints[-1].progress.step
    return Interrupted(f"{error}; the next start goes back to step {newest} (return {done} of {ROLLBACKS})"), None


def _finish_commits(run: Run) -> None:
    """Wait for the commit under way, which is of an earlier and sound state: up to an epoch would be lost with it."""
    with contextlib.suppress(WdsTrainError):
        run.committer.wait(LAST_SECONDS / 2)


def _give_up(run: Run, status: str, **changes: Any) -> None:
    """Say in the manifest how it ended. If the store does not let us, the lease runs out by itself."""
    try:
        run.end(status, **changes)
    except (StoreError, Interrupted) as error:
        say(f"{run.store.url} could not be marked as {status}: {error}")


def _of_same_classes(other: Dataset, dataset: Dataset) -> Dataset:
    if other.manifest.classes != dataset.manifest.classes:
        raise UsageError(
            f"{other.store.url} cannot be mixed into {dataset.store.url}: its {len(other.manifest.classes)} classes are not "
            f"the same {len(dataset.manifest.classes)}, in the same order; convert it with the same class list"
        )
    return other


def _fresh_run(options: TrainOptions, datasets: list[Dataset]) -> RunManifest:
    dataset, *mixed = datasets
    return RunManifest(
        run=name_of(options.run),
        recipe=options.recipe.to_dict(),
        dataset={
            "url": dataset.store.url,
            "fingerprint": dataset.fingerprint,
            "classes": len(dataset.manifest.classes),
            "mix": [
                {"fingerprint": other.fingerprint, "share": share}
                for other, (_, share) in zip(mixed, options.mix, strict=True)
            ],
        },
        wandb_id=secrets.token_hex(4),
    )


@dataclass
class Pace:
    """Of the steps since the last record, which all ended with the GPU idle: a single step's time would hold the work of
    those that the GPU was still doing, or none of its own.
    """

    steps: int = 0
    waited: float = 0.0
    seconds: float = 0.0

    def add(self, waited: float, worked: float) -> None:
        self.steps, self.waited, self.seconds = self.steps + 1, self.waited + waited, self.seconds + waited + worked

    def drain(self, batch: int) -> dict[str, float]:
        """Images a second, and the share of the time that was waited for data."""
        timing = {"time/img_s": self.steps * batch / self.seconds, "time/data_wait": self.waited / self.seconds}
        self.steps, self.waited, self.seconds = 0, 0.0, 0.0
        return timing


class _Session:
    """One process's work on a run, from its claim to its end or interruption: `fork`, `connect`, `restore`, `run_to_end`."""

    def __init__(
        self,
        options: TrainOptions,
        datasets: list[Dataset],
        run: Run,
        stop: StopRequest,
        *,
        ranks: Ranks,
        tracker: Tracker,
    ) -> None:
        self._options, self._run, self._stop, self._ranks, self._tracker = options, run, stop, ranks, tracker
        self._datasets = datasets
        self._classes = [[entry.id, entry.name] for entry in datasets[0].manifest.classes]
        self._epoch_steps = _steps(options, datasets)
        self._total = options.recipe.schedule.epochs * self._epoch_steps
        self._val_samples = datasets[0].manifest.split("val").samples

    def fork(self, start: int) -> None:
        """Begin to read, for the steps from `start` on. Before this process has threads or uses a GPU: loader workers are
        forked, and a forked child survives neither.
        """
        self._loader = _loader(self._options, self._datasets, range(start, self._total), self._ranks)
        self._val_loader = _val_loader(self._options, self._datasets[0], self._ranks)
        if start < self._total:
            self._loader.start()
        self._val_loader.start()

    def connect(self) -> None:
        """Hold the run, and meet the other ranks and W&B: from here on there are threads."""
        self._run.committer.max_uncommitted = self._options.max_uncommitted_minutes * 60
        self._run.begin()
        self._stop.doing = "the training"
        if self._ranks.leads:
            self._tracker.start()
            self._run.history()  # which names what is damaged
        self._ranks.connect()

    def restore(self, snapshot: Snapshot | None) -> None:
        """Make the trainer, as `snapshot` left it."""
        options, ranks = self._options, self._ranks
        trainer = self._trainer = _trainer(options, self._datasets, ranks.device, ranks, resumes=snapshot is not None)
        if options.accumulate is None and ranks.device.type == "cuda":  # a CPU's memory holds any batch it can work on
            trainer.accumulate = round(ranks.largest(fit_accumulation(trainer)))
        self._say(_introduction(options, self._datasets[0], self._epoch_steps, ranks))
        for note in trainer.notes:
            self._say(f"weights  {note}")
        if trainer.accumulate > 1:
            self._say(f"memory   each batch in {trainer.accumulate} micro-batches")
        if snapshot:
            trainer.restore(snapshot)
            step = trainer.progress.step
            self._say(f"resuming at step {step} of {self._total} (epoch {step / self._epoch_steps:.2f})")

    def run_to_end(self) -> None:
        with SpotWatch(self._stop) as self._spot:
            self._progress = Progress(
                self._total, self._trainer.progress.step, self._options.recipe.batch, shown=self._ranks.leads
            )
            try:
                self._train()
            except _Stopped:
                self._interrupt()
            finally:
                self._progress.close()
            while not self._run.committer.wait(0.2):
                if self._stop.cause:
                    self._interrupt()
            self._run.end("done")
            self._stop.code = 0
            self._stop.doing = "another rank"
            self._ranks.total(1)  # all leave together: a rank that leaves earlier looks like one that was lost
            self._stop.doing = "what comes after the run"

    def _train(self) -> None:
        trainer, epoch_steps = self._trainer, self._epoch_steps
        self._saved = trainer.progress
        self._saved_at = time.monotonic()
        self._rebalance_said = False
        self._commit_timing: dict[str, float] = {}
        self._pace = Pace()
        batches = _timed(on_device(self._loader, trainer.device))
        while trainer.progress.evaluated * epoch_steps < self._total:
            if self._look_up():
                trainer.epoch_loss()
                self._commit({})
            if trainer.progress.step == (trainer.progress.evaluated + 1) * epoch_steps:
                self._end_epoch()
            else:
                self._step(*next(batches))

    def _look_up(self) -> bool:
        """Whether it is time for a commit. Raises what ends the training: `_Stopped` when any rank was asked to stop, and
        what `Run.check` raises. All ranks look up at the same step, and come to the same answer.
        """
        self._run.committer.check()
        if self._spot.rebalance and not self._rebalance_said:
            self._rebalance_said = True
            say(
                "EC2 recommends to move: this spot instance is at an elevated risk of being taken back; training goes on"
            )
        old = time.monotonic() - self._saved_at >= self._options.commit_minutes * 60
        due = self._ranks.leads and old and not self._run.committer.busy
        stopped, commits = self._ranks.total(self._stop.cause is not None, due)
        if stopped:
            raise _Stopped
        return commits > 0

    def _say(self, message: str) -> None:
        if self._ranks.leads:
            say(message)

    def _step(self, batch: Batch, waited: float) -> None:
        start = time.perf_counter()
        for lost in batch.lost:
            say(f"unreadable sample: {lost.shard}, key {lost.key}: {lost.cause}")
        with lost_ranks():
            loss = self._trainer.step(batch)
        done, shown = self._trainer.progress.step, None
        record: dict[str, Any] = {}
        if _is_logged(done, self._epoch_steps):
            shown = self._ranks.total(loss.item())[0] / self._ranks.size
            self._trainer.epoch_loss()
            record = {"step": done, "epoch": done / self._epoch_steps, "train/loss": shown}
            record |= {"train/lr": self._trainer.lr(done - 1), "train/grad_norm": self._trainer.grad_norm.item()}
        self._pace.add(waited, time.perf_counter() - start)
        if record:
            timing = self._pace.drain(self._options.recipe.batch) | self._drain_commit_timing()
            timing |= {"s3/fallbacks": self._loader.fallbacks} if self._loader.fallbacks else {}
            self._tracker.log(record, timing)
        self._progress.step(done, shown)

    def _end_epoch(self) -> None:
        """Validate and commit."""
        trainer = self._trainer
        loss = trainer.epoch_loss()
        with lost_ranks():
            metrics = trainer.evaluate(self._looking_up(on_device(self._val_loader, trainer.device)), self._val_samples)
        lost = trainer.epoch_lost()
        trainer.evaluated()
        epoch, epochs = trainer.progress.evaluated, self._options.recipe.schedule.epochs
        record = {"step": trainer.progress.step, "epoch": float(epoch), "epoch/loss": loss, "epoch/lost": lost}
        self._tracker.log(record | metrics, {})
        self._say(
            f"epoch {epoch:3d}/{epochs}  loss {loss:.3f}  "
            f"top-1 {metrics['val/top1']:.2f} %  EMA {metrics['val/top1_ema']:.2f} %"
            + (f"  {lost} unreadable" if lost else "")
            + (f"  {self._loader.fallbacks} ranges asked for twice" if self._loader.fallbacks else "")
        )
        done = {"status": "done", "result": metrics | {"epoch/loss": loss}} if epoch == epochs else {}
        self._commit(metrics, **done)

    def _looking_up(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The ranks' numbers of batches differ by one: they look up together before those that all have."""
        shared = -(-self._val_samples // min(self._options.recipe.batch, EVAL_BATCH)) // self._ranks.size
        for number, batch in enumerate(batches):
            if number < shared:
                self._look_up()
            yield batch

    def _commit(self, metrics: dict[str, float], **changes: Any) -> None:
        start = time.perf_counter()
        snapshot, records = self._trainer.snapshot(), self._tracker.drain()
        if snapshot is not None:
            snapshot.extra["classes"] = self._classes
            self._run.committer.commit(snapshot, metrics, records, **changes)
        self._saved, self._saved_at = self._trainer.progress, time.monotonic()
        self._commit_timing["commit/stall_ms"] = (time.perf_counter() - start) * 1000

    def _drain_commit_timing(self) -> dict[str, float]:
        """What the newest commits cost: `stall_ms` the training's pause, `upload_s` the work in the background."""
        timing, self._commit_timing = self._commit_timing, {}
        committer = self._run.committer
        if committer.upload_s is not None:
            timing["commit/upload_s"], committer.upload_s = committer.upload_s, None
        return timing

    def _interrupt(self) -> None:
        """Commit, unless this very state is committed or on its way, and leave; unless it was the last that was missing."""
        self._stop.ask("another rank")
        self._stop.doing = f"the last commit to {self._run.store.url}"
        progress = self._trainer.progress
        if (progress.step, progress.evaluated) != (self._saved.step, self._saved.evaluated):
            self._trainer.epoch_loss()
            self._commit({}, status="interrupted")
        committed = self._run.committer.wait(self._stop.left - LAST_MOMENT)
        if self._run.manifest.status == "done":
            return
        if committed:
            _give_up(self._run, "interrupted")
        self._stop.doing = "another rank"
        self._ranks.total(1)  # the others wait for the leader's commit; the first that leaves ends them all
        outcome = _outcome(progress.step, self._total, self._run.store.url, committed)
        raise Interrupted(f"stopped by {self._stop.cause} {outcome}")


def _timed(batches: Iterator[Batch]) -> Iterator[tuple[Batch, float]]:
    """Each batch with the seconds that the training waited for it."""
    while True:
        start = time.perf_counter()
        batch = next(batches)
        yield batch, time.perf_counter() - start


def _is_logged(step: int, epoch_steps: int) -> bool:
    """A function of the step alone, so that a resumed run logs what the unbroken one does."""
    return step % min(LOG_STEPS, max(1, epoch_steps // LOGS_PER_EPOCH)) == 0


def _outcome(step: int, total: int, where: str, committed: bool) -> str:
    """Where the training was, what became of its state, and what the same command will do."""
    if not step:
        return f"before the first of {total} steps; the same command begins anew"
    at = f"at step {step} of {total}"
    if committed:
        return f"{at}, state committed to {where}; the same command goes on from there"
    return (
        f"{at}, whose state could not be committed in time; the same command goes on from the newest checkpoint of "
        f"{where}"
    )


def _sizes(options: TrainOptions) -> list[int]:
    """How many images of every batch each dataset gives."""
    return shares(options.recipe.batch, [share for _, share in options.mix], options.recipe.data.repeats)


def _steps(options: TrainOptions, datasets: list[Dataset]) -> int:
    """Of an epoch, which is the first dataset's."""
    return datasets[0].manifest.split("train").samples // _sizes(options)[0]


def _plan(
    options: TrainOptions, dataset: Dataset, size: int, steps: range, ranks: Ranks
) -> tuple[TrainPlan, TrainTransform]:
    """What `size` images of every batch are read from `dataset` by, for `steps` at least."""
    recipe, shards = options.recipe, dataset.manifest.split("train").shards
    repeats, shard_samples = recipe.data.repeats, tuple(shard.samples for shard in shards)
    samples = size // repeats
    per_pass = max(1, sum(shard_samples) // samples)  # a split of less than a batch is TrainPlan's to refuse
    passes = range(-(-steps.stop // per_pass))
    place = {"rank": ranks.rank, "world": ranks.size, "from_step": steps.start}
    plan = TrainPlan(shard_samples, dataset.fingerprint, recipe.seed, samples, passes, repeats=repeats, **place)
    return plan, TrainTransform(recipe, steps_per_epoch=steps.stop // recipe.schedule.epochs)


def _loader(options: TrainOptions, datasets: list[Dataset], steps: range, ranks: Ranks) -> Loader | Mixture:
    """What the training reads, for `steps` at least; the first dataset's through the cache, if there is one."""
    on_gpu, loaders = ranks.device.type == "cuda", []
    for dataset, size in zip(datasets, _sizes(options), strict=True):
        split, workers = dataset.split("train"), options.workers
        cache = None
        if options.cache_dir and dataset is datasets[0]:
            cache = BlockCache(options.cache_dir, options.cache_bytes, split, dataset.fingerprint)
        workers = workers and max(1, round(workers * size / options.recipe.batch))
        plan, transform = _plan(options, dataset, size, steps, ranks)
        loaders.append(Loader(split, plan, transform, workers, cache, pinned=on_gpu and len(datasets) == 1))
    return Mixture(loaders, options.recipe.seed, pinned=on_gpu) if len(loaders) > 1 else loaders[0]


def _val_loader(options: TrainOptions, dataset: Dataset, ranks: Ranks) -> Loader:
    split, data = dataset.split("val"), options.recipe.data
    plan = EvalPlan(len(split), min(options.recipe.batch, EVAL_BATCH), ranks.rank, ranks.size)
    transform = EvalTransform(data.eval_size, data.eval_crop)
    return Loader(split, plan, transform, options.workers, pinned=ranks.device.type == "cuda")


class _Stopped(Exception):
    """Asked to stop, between two steps or two batches of a validation."""


def _introduction(options: TrainOptions, dataset: Dataset, steps: int, ranks: Ranks) -> str:
    recipe, splits, device = options.recipe, dataset.manifest.splits, ranks.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return (
        f"dataset  {dataset.store.url}: {splits['train'].samples:,} train, {splits['val'].samples:,} val, "
        f"{len(dataset.manifest.classes)} classes\n"
        f"run      {options.run}: recipe {recipe.name}, {recipe.model.name}, {recipe.schedule.epochs} epochs of "
        f"{steps} steps of {recipe.batch}, on {f'{ranks.size} x ' if ranks.size > 1 else ''}{name}"
    )


def _close(run: Run, options: TrainOptions, wandb_at: str | None) -> None:
    """Say how it went, where things are, and what to type next."""
    result = run.manifest.result
    say(f"top-1 {result['val/top1']:.2f} % raw, {result['val/top1_ema']:.2f} % EMA")
    say(f"state    {options.run}")
    try:
        say(f"curves   {_picture(run, options)}")
    except Exception as error:  # whatever it is: the run is done, and no restart would make it more so
        say(f"curves   could not be drawn ({error}); the run is done all the same")
    if wandb_at:
        say(
            f"W&B      {wandb_at}"
            + ("" if wandb_at.startswith("http") else f" (offline; upload: wandb sync {wandb_at})")
        )
    say("next     make train RUN=second ARGS='--set seed=1', or your own data: make shards SOURCE=/path/to/images")


def _picture(run: Run, options: TrainOptions) -> Path:
    """Two runs of one name in different stores get different folders."""
    from wds_train.report import draw_curves  # a plotting library that cannot start must not keep a training from it

    place = f"{run.manifest.run}-{hashlib.sha256(options.run.encode()).hexdigest()[:6]}"
    path = home() / "runs" / place / "curves.png"
    draw_curves(run.history(), options.recipe, f"{options.run}: {run.manifest.recipe['name']}", path)
    return Path(os.path.relpath(path))
