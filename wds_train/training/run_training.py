"""A training from start or resume to its end: `wds-train train`, in every rank.

refuse a training that cannot work -> claim the run -> read its newest checkpoint ->
make the session, which forks, connects and makes the trainer ->
steps, validations, commits -> the report
"""

import contextlib
import hashlib
import os
import shlex
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from wds_train.checkpoint.clock import Clock
from wds_train.checkpoint.find import where_time_went
from wds_train.checkpoint.restore import read_object
from wds_train.checkpoint.resume_checks import check_resume
from wds_train.checkpoint.run import Run
from wds_train.checkpoint.run_manifest import Checkpoint, RunManifest
from wds_train.checkpoint.snapshot import Snapshot
from wds_train.console import say
from wds_train.dataset.reader import Dataset
from wds_train.errors import Interrupted
from wds_train.files import home
from wds_train.loader.cache import make_cache_folder
from wds_train.loader.mixture import check_same_classes
from wds_train.loader.workers import limit_threads
from wds_train.report.formatting import describe_goodput
from wds_train.storage.base import Store
from wds_train.storage.open import open_store
from wds_train.storage.retry import call_within
from wds_train.tracking.tracker import Tracker
from wds_train.training.ending import early_end, handle_early_end, last_word
from wds_train.training.local_ranks import die_with_launcher
from wds_train.training.options import TrainOptions
from wds_train.training.outcome import describe_outcome, next_commands
from wds_train.training.ranks import Ranks
from wds_train.training.session import SessionParts, begin_session
from wds_train.training.setup import fresh_run, refuse
from wds_train.training.stop_request import SIGNALS, StopRequest
from wds_train.training.watch import watch_for_hangs

# For reading the metrics that the report is drawn from, once the run is done.
REPORT_SECONDS = 15.0


def train(options: TrainOptions, stop: StopRequest, clock: Clock | None = None) -> dict[str, float]:
    """Train, or go on with, `options.run`.

    Args:
        options: The training.
        stop: The request to stop, which listens already.
        clock: Counts the paid seconds; without one they begin now.

    Returns:
        The metrics of the last validation.

    Raises:
        Interrupted: Asked to stop; the state is committed if the time was enough.
        WdsTrainError: Another error ended the training; the run's manifest says so, too.
    """
    # Set up the process and its data.
    clock = clock or Clock()
    die_with_launcher()
    limit_threads()
    ranks = Ranks.of_environment(cpu=options.cpu)
    if options.deterministic:
        _be_deterministic()
    datasets = _open_datasets(options)
    if options.cache_dir:
        make_cache_folder(options.cache_dir, datasets[0], "train")
    stop.check()

    # Claim the run, and train.
    stop.doing = f"the claim of {options.run}"
    run, snapshot = _lead(options, datasets, stop, ranks, clock)
    tracker = Tracker(run, partial(stop.ask, "the Stop button of W&B", by_person=True))
    if run.manifest.status == "done":
        if ranks.leads:
            say(f"run {options.run} is done already")
    else:
        # They end from the inside out: the watch; the cause, printed and written; W&B; and the
        # report of an interrupted run.
        try:
            with (
                _report_if_interrupted(run, options, stop, ranks),
                tracker,
                handle_early_end(run, stop, repeats=_repeats(options, ranks)),
                watch_for_hangs(
                    ranks, stop, options.hang_minutes, partial(last_word, run)
                ) as watch,
            ):
                parts = SessionParts(options, datasets, run, stop, ranks, tracker, watch)
                begin_session(parts, snapshot).run_to_end()
        finally:
            ranks.close()

    if ranks.leads:
        _close(run, options, tracker.where, test="test" in datasets[0].manifest.splits)
    return run.manifest.result


def _open_datasets(options: TrainOptions) -> list[Dataset]:
    """Open the dataset, and those of its mixture, which must have its classes."""
    dataset = Dataset.open(options.dataset)
    datasets = [dataset]
    for url, _ in options.mix:
        datasets.append(check_same_classes(Dataset.open(url), dataset))
    return datasets


def _lead(
    options: TrainOptions, datasets: list[Dataset], stop: StopRequest, ranks: Ranks, clock: Clock
) -> tuple[Run, Snapshot | None]:
    """Claim the run, and read its newest usable checkpoint; in the other ranks, follow the leader.

    Raises:
        WdsTrainError: The training cannot work, or another instance owns the run.
    """
    store = open_store(options.run)
    fresh = fresh_run(options, datasets)
    if not ranks.leads:
        return _follow(store, fresh, ranks.await_announcement(stop.sleep))

    # Refuse first: a training that cannot work must not take the name.
    snapshot: Snapshot | None = None
    try:
        refuse(options, datasets, fresh, store, ranks)
        run = Run.claim(
            store,
            fresh,
            say,
            wait=options.wait,
            pause=stop.sleep,
            keep_every=options.keep_every,
            go_on=options.go_on,
            unsafe=options.unsafe_store,
        )
        run.writer.clock = clock
        # From here on the run is ours: an error gives it up.
        with handle_early_end(run, stop, repeats=_repeats(options, ranks)):
            if run.manifest.status != "done":
                snapshot = run.restore(say)
    except BaseException:
        # The other ranks would wait for hours.
        ranks.announce({})
        raise

    # Send the other ranks all that they need: they read the same checkpoint.
    progress: dict[str, Any] | None = None
    if snapshot:
        progress = asdict(snapshot.progress)
    ranks.announce({"manifest": run.manifest.to_json().decode(), "progress": progress})
    return run, snapshot


def _follow(
    store: Store, fresh: RunManifest, announced: dict[str, Any]
) -> tuple[Run, Snapshot | None]:
    """Return the leader's run, which is only read here, and the same checkpoint.

    Raises:
        Interrupted: The leader could not begin.
        UsageError: This rank was started for another training.
    """
    if not announced:
        raise Interrupted("rank 0 could not begin; its message says why")
    manifest = RunManifest.from_json(announced["manifest"].encode(), store.url)
    check_resume(manifest, fresh, store.url)
    run = Run(store, manifest, "", say=say, leads=False)
    if announced["progress"] is None:
        return run, None
    chosen = _find_checkpoint(manifest, announced["progress"])
    return run, Snapshot.decode(read_object(store, chosen.object), chosen.progress)


def _find_checkpoint(manifest: RunManifest, progress: dict[str, Any]) -> Checkpoint:
    """Return the newest checkpoint of this progress, which the leader has read."""
    for checkpoint in reversed(manifest.checkpoints):
        if asdict(checkpoint.progress) == progress:
            return checkpoint
    raise AssertionError(f"the leader announced {progress}, which the manifest does not name")


def _be_deterministic() -> None:
    """Let PyTorch use only algorithms that give the same bits each time.

    On GPUs they are slower; on CPUs they are the usual ones.
    """
    # cuBLAS's condition, which it reads when CUDA starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def _repeats(options: TrainOptions, ranks: Ranks) -> bool:
    """Return True if the same steps, taken again, round in the same way."""
    return options.deterministic or ranks.device.type == "cpu"


def _close(run: Run, options: TrainOptions, wandb_at: str | None, *, test: bool) -> None:
    """Print the result, where everything is, and the commands to type next.

    `wandb_at` is the address of the run's page in W&B, or its folder where that is offline.
    """
    if run.manifest.checkpoints:
        cause = early_end(options.recipe.schedule, run.manifest.checkpoints[-1].progress)
        if cause:
            say(f"ended    {cause}")
    say("\n".join(describe_outcome(run.manifest)))
    say(f"goodput  {describe_goodput(where_time_went(run.manifest, time.time()))}")
    say(f"state    {options.run}")
    _write_report(run, options, REPORT_SECONDS)
    if wandb_at and wandb_at.startswith("http"):
        say(f"W&B      {wandb_at}")
    elif wandb_at:
        upload = f"(offline; upload: wds-train wandb {shlex.quote(options.run)})"
        say(f"W&B      {wandb_at} {upload}")
    say("\n".join(next_commands(run.manifest, options.run, test=test)))


@contextlib.contextmanager
def _report_if_interrupted(
    run: Run, options: TrainOptions, stop: StopRequest, ranks: Ranks
) -> Iterator[None]:
    """Write the report of a training that a signal interrupts inside the block.

    It needs a validated epoch. An instance that is taken back gets none: its disk goes with it. The
    deadline of `stop` stands, whatever hangs.
    """
    try:
        yield
    except Interrupted:
        by_signal = stop.cause in [number.name for number in SIGNALS]
        is_interrupted = run.manifest.status == "interrupted"
        if ranks.leads and is_interrupted and by_signal and _has_validation(run.manifest):
            stop.doing = "the report"
            # Half of what is left: the rest is for its pictures.
            _write_report(run, options, min(REPORT_SECONDS, stop.left / 2))
        raise


def _has_validation(run: RunManifest) -> bool:
    """Return True if a checkpoint that is kept was validated."""
    return any(checkpoint.metrics for checkpoint in run.checkpoints)


def _write_report(run: Run, options: TrainOptions, seconds: float) -> None:
    """Write the report, of the metrics that can be read within `seconds`, and print where it is."""
    # The run is safe: no error of the report may fail it.
    try:
        say(f"report   {_report(run, options, seconds)}")
    except Exception as error:
        say(
            f"report   could not be written ({error}); the run is {run.manifest.status} all the "
            "same"
        )


def _report(run: Run, options: TrainOptions, seconds: float) -> Path:
    """Write the report, without a further evaluation, and return its path."""
    # Imported here: only the leader draws a report, once, and the modules take a while to import.
    from wds_train.report.page import write
    from wds_train.report.run_data import Account
    from wds_train.report.run_report import NOT_EVALUATED, Prices, report

    # Two runs of one name in different stores get different folders.
    place = f"{run.manifest.run}-{hashlib.sha256(options.run.encode()).hexdigest()[:6]}"
    account = call_within(seconds, lambda: Account.of(run.store, run.manifest, say), run.store.url)
    page = write(report(account, Prices(), NOT_EVALUATED), home() / "runs" / place, "report")
    return Path(os.path.relpath(page))
