"""A training from start or resume to its end.

refuse what cannot work -> claim the run -> read its newest checkpoint -> make the session, which
forks, connects and makes the trainer -> steps, validations, commits -> the report
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
from wds_train.checkpoint.run_manifest import RunManifest
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
from wds_train.training.ending import early_end, ending, last_word
from wds_train.training.local_ranks import die_with_launcher
from wds_train.training.options import TrainOptions
from wds_train.training.outcome import next_commands, outcome
from wds_train.training.ranks import Ranks
from wds_train.training.session import begin_session
from wds_train.training.setup import fresh_run, refuse
from wds_train.training.stop_request import SIGNALS, StopRequest
from wds_train.training.watch import watching

REPORT_SECONDS = 15.0  # for the metrics that the report is drawn from, once the run is done


def train(options: TrainOptions, stop: StopRequest, clock: Clock | None = None) -> dict[str, float]:
    """Train, or go on with, `options.run`, and return the final metrics.

    Args:
        options: The training.
        stop: What asks it to stop.
        clock: Counts the paid time, which without one begins now.

    Raises:
        Interrupted: Asked to stop; the state is committed.
        WdsTrainError: What else ended the training, which the run's manifest says, too.
    """
    clock = clock or Clock()
    die_with_launcher()
    limit_threads()
    ranks = Ranks.of_environment(cpu=options.cpu)
    if options.deterministic:
        _be_deterministic()
    dataset = Dataset.open(options.dataset)
    datasets = [
        dataset,
        *(check_same_classes(Dataset.open(url), dataset) for url, _ in options.mix),
    ]
    if options.cache_dir:
        make_cache_folder(options.cache_dir, dataset, "train")
    stop.check()
    stop.doing = f"the claim of {options.run}"
    run, snapshot = _lead(options, datasets, stop, ranks, clock)
    tracker = Tracker(run, partial(stop.ask, "the Stop button of W&B", by_person=True))
    if run.manifest.status == "done":
        if ranks.leads:
            say(f"run {options.run} is done already")
    else:
        # From the inside out: the watch ends, the cause is told and written, W&B ends, and an
        # interrupted run leaves its report.
        try:
            with (
                _leaving_a_report(run, options, stop, ranks),
                tracker,
                ending(run, stop, repeats=_repeats(options, ranks)),
                watching(ranks, stop, options.hang_minutes, partial(last_word, run)) as watch,
            ):
                session = begin_session(
                    options,
                    datasets,
                    run,
                    snapshot,
                    stop,
                    ranks=ranks,
                    tracker=tracker,
                    watch=watch,
                )
                session.run_to_end()
        finally:
            ranks.close()
    if ranks.leads:
        _close(run, options, tracker.where, test="test" in dataset.manifest.splits)
    return run.manifest.result


def _lead(
    options: TrainOptions, datasets: list[Dataset], stop: StopRequest, ranks: Ranks, clock: Clock
) -> tuple[Run, Snapshot | None]:
    """Return the run, claimed, and its newest usable checkpoint; the other ranks follow."""
    store = open_store(options.run)
    fresh = fresh_run(options, datasets)
    if not ranks.leads:
        return _follow(store, fresh, ranks.await_announcement(stop.sleep))
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
        with ending(run, stop, repeats=_repeats(options, ranks)):
            snapshot = None if run.manifest.status == "done" else run.restore(say)
    except BaseException:
        # The other ranks wait for a word.
        ranks.announce({})
        raise
    progress = asdict(snapshot.progress) if snapshot else None
    ranks.announce({"manifest": run.manifest.to_json().decode(), "progress": progress})
    return run, snapshot


def _follow(
    store: Store, fresh: RunManifest, announced: dict[str, Any]
) -> tuple[Run, Snapshot | None]:
    """Return the leader's run, to be read only, and the same checkpoint.

    It must be what this rank was told to train, too.
    """
    if not announced:
        raise Interrupted("rank 0 could not begin; its message says why")
    manifest = RunManifest.from_json(announced["manifest"].encode(), store.url)
    check_resume(manifest, fresh, store.url)
    run = Run(store, manifest, "", say=say, leads=False)
    if announced["progress"] is None:
        return run, None
    chosen = next(
        c for c in reversed(manifest.checkpoints) if asdict(c.progress) == announced["progress"]
    )
    return run, Snapshot.decode(read_object(store, chosen.object), chosen.progress)


def _be_deterministic() -> None:
    """Let PyTorch use only algorithms that give the same bits each time; on GPUs slower, on CPUs no
    other than the usual ones.
    """
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # cuBLAS's condition, read when CUDA starts
    torch.use_deterministic_algorithms(True)


def _repeats(options: TrainOptions, ranks: Ranks) -> bool:
    """Return True if the same steps, taken again, round in the same way."""
    return options.deterministic or ranks.device.type == "cpu"


def _close(run: Run, options: TrainOptions, wandb_at: str | None, *, test: bool) -> None:
    """Say how it went, where things are, and what to type next."""
    for newest in run.manifest.checkpoints[-1:]:
        if cause := early_end(options.recipe.schedule, newest.progress):
            say(f"ended    {cause}")
    say("\n".join(outcome(run.manifest)))
    say(f"goodput  {describe_goodput(where_time_went(run.manifest, time.time()))}")
    say(f"state    {options.run}")
    _write_report(run, options, REPORT_SECONDS)
    if wandb_at:
        upload = f" (offline; upload: wds-train wandb {shlex.quote(options.run)})"
        say(f"W&B      {wandb_at}{'' if wandb_at.startswith('http') else upload}")
    say("\n".join(next_commands(run.manifest, options.run, test=test)))


@contextlib.contextmanager
def _leaving_a_report(
    run: Run, options: TrainOptions, stop: StopRequest, ranks: Ranks
) -> Iterator[None]:
    """Let a training that is interrupted leave its report, too, if there is an epoch to be seen:
    not on an instance that is taken back, with its disk. Whatever hangs, the deadline stands.
    """
    try:
        yield
    except Interrupted:
        scored = any(checkpoint.metrics for checkpoint in run.manifest.checkpoints)
        by_signal = stop.cause in [number.name for number in SIGNALS]
        if ranks.leads and scored and run.manifest.status == "interrupted" and by_signal:
            stop.doing = "the report"
            _write_report(run, options, min(REPORT_SECONDS, stop.left / 2))
        raise


def _write_report(run: Run, options: TrainOptions, seconds: float) -> None:
    """Write the report, of metrics that come within `seconds`, and say where; whatever goes wrong
    is only said.
    """
    try:
        say(f"report   {_report(run, options, seconds)}")
    except Exception as error:
        say(
            f"report   could not be written ({error}); the run is {run.manifest.status} all the "
            "same"
        )


def _report(run: Run, options: TrainOptions, seconds: float) -> Path:
    """Return where the report is written, without a further evaluation.

    Two runs of one name in different stores get different folders.
    """
    from wds_train.report.page import write
    from wds_train.report.run_data import Account
    from wds_train.report.run_report import NOT_EVALUATED, Prices, report

    place = f"{run.manifest.run}-{hashlib.sha256(options.run.encode()).hexdigest()[:6]}"
    account = call_within(seconds, lambda: Account.of(run.store, run.manifest, say), run.store.url)
    page = write(report(account, Prices(), NOT_EVALUATED), home() / "runs" / place, "report")
    return Path(os.path.relpath(page))
