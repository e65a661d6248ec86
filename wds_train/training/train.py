"""A training from start or resume to its end.

refuse what cannot work -> claim the run -> restore the newest checkpoint -> fork, connect, restore -> the loop -> its end
"""

import hashlib
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from wds_train.checkpoint.begun import going_on
from wds_train.checkpoint.manifest import RunManifest
from wds_train.checkpoint.read import read_object
from wds_train.checkpoint.run import Run
from wds_train.checkpoint.snapshot import Snapshot
from wds_train.data.dataset import Dataset
from wds_train.errors import Interrupted
from wds_train.home import home
from wds_train.storage.base import Store
from wds_train.storage.open import open_store
from wds_train.storage.within import within
from wds_train.tracking.console import say
from wds_train.tracking.wandb import Tracker
from wds_train.training.ending import ending
from wds_train.training.launch import die_with_launcher
from wds_train.training.loop import Session
from wds_train.training.options import TrainOptions
from wds_train.training.ranks import Ranks
from wds_train.training.setup import fresh_run, make_cache, of_same_classes, refuse
from wds_train.training.stop import StopRequest

CURVES_SECONDS = 15.0  # for the metrics that the curves are drawn from, once the run is done


def train(options: TrainOptions, stop: StopRequest) -> dict[str, float]:
    """Train, or go on with, `options.run`; the final metrics. Raises `Interrupted` once asked to stop, state committed."""
    die_with_launcher()
    ranks = Ranks.of_environment(cpu=options.cpu)
    if options.deterministic:
        _be_deterministic()
    dataset = Dataset.open(options.dataset)
    datasets = [dataset, *(of_same_classes(Dataset.open(url), dataset) for url, _ in options.mix)]
    cache = make_cache(options, dataset)
    stop.check()
    stop.doing = f"the claim of {options.run}"
    run, snapshot = _lead(options, datasets, stop, ranks)
    tracker = Tracker(run.manifest)
    if run.manifest.status == "done":
        if ranks.leads:
            say(f"run {options.run} is done already; to train again, choose another run: make train RUN=another")
    else:
        try:
            with tracker, ending(run, stop, repeats=_repeats(options, ranks)):
                session = Session(options, datasets, run, stop, ranks=ranks, tracker=tracker)
                session.fork(snapshot.progress.step if snapshot else 0, cache)
                session.connect()
                session.restore(snapshot)
                session.run_to_end()
        finally:
            ranks.close()
    if ranks.leads:
        _close(run, options, tracker.where)
    return run.manifest.result


def _lead(
    options: TrainOptions, datasets: list[Dataset], stop: StopRequest, ranks: Ranks
) -> tuple[Run, Snapshot | None]:
    """The run, claimed, and its newest usable checkpoint; the other ranks follow."""
    store, fresh = open_store(options.run), fresh_run(options, datasets)
    if not ranks.leads:
        return _follow(store, fresh, ranks.announced(stop.sleep))
    try:
        refuse(options, datasets, fresh, store, ranks)
        run = Run.claim(store, fresh, say, wait=options.wait, pause=stop.sleep, keep_every=options.keep_every)
        with ending(run, stop, repeats=_repeats(options, ranks)):
            snapshot = None if run.manifest.status == "done" else run.restore(say)
    except BaseException:
        ranks.announce({})
        raise
    ranks.announce(
        {"manifest": run.manifest.to_json().decode(), "progress": asdict(snapshot.progress) if snapshot else None}
    )
    return run, snapshot


def _follow(store: Store, fresh: RunManifest, announced: dict[str, Any]) -> tuple[Run, Snapshot | None]:
    """The leader's run, to be read only, and the same checkpoint. It must be what this rank was told to train, too."""
    if not announced:
        raise Interrupted("rank 0 could not begin; its message says why")
    manifest = RunManifest.from_json(announced["manifest"].encode(), store.url)
    going_on(manifest, fresh, store.url)
    run = Run(store, manifest, "", say=say, leads=False)
    if announced["progress"] is None:
        return run, None
    chosen = next(c for c in reversed(manifest.checkpoints) if asdict(c.progress) == announced["progress"])
    return run, Snapshot.decode(read_object(store, chosen.object), chosen.progress)


def _be_deterministic() -> None:
    """Let PyTorch use only algorithms that give the same bits each time; on GPUs slower, on CPUs no other than the
    usual ones.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS's condition, read when CUDA starts
    torch.use_deterministic_algorithms(True)


def _repeats(options: TrainOptions, ranks: Ranks) -> bool:
    """Whether the same steps, taken again, round in the same way."""
    return options.deterministic or ranks.device.type == "cpu"


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
    """Where the curves are drawn: two runs of one name in different stores get different folders."""
    from wds_train.tracking.curves import draw_curves

    place = f"{run.manifest.run}-{hashlib.sha256(options.run.encode()).hexdigest()[:6]}"
    path = home() / "runs" / place / "curves.png"
    history = within(CURVES_SECONDS, run.history, run.store.url)
    draw_curves(history, options.recipe, f"{options.run}: {run.manifest.recipe['name']}", path)
    return Path(os.path.relpath(path))
