"""The calibrated weights of a run or an exported file."""

from pathlib import Path

import torch

from wds_train.checkpoint.find import find_run
from wds_train.checkpoint.restore import from_newest
from wds_train.checkpoint.run_manifest import RunManifest
from wds_train.checkpoint.scores import NAMES, SCORES
from wds_train.checkpoint.weight_choice import Choice, best_weights, choose
from wds_train.console import counted, say
from wds_train.evaluation.calibrate import calibrate_weights, load_weights
from wds_train.models.weights import SUFFIX, Weights
from wds_train.storage.base import Store


def prepared(source: str, device: torch.device) -> Weights:
    """The weights in the file `source`, or the best ones of the run at that address; said where they are not calibrated."""
    if source.endswith(SUFFIX):
        return _said(Weights.read(Path(source)))
    run, store = find_run(source)
    return _said(
        from_newest(store, run, lambda newest: of_choice(store, newest, choose(newest), device))
    )


def of_choice(store: Store, run: RunManifest, choice: Choice, device: torch.device) -> Weights:
    """The weights chosen out of `run`, calibrated where that can be."""
    weights = load_weights(store, run, choice)
    return calibrate_weights(weights, run, choice, device, counted)


def both_kinds(store: Store, run: RunManifest, device: torch.device) -> list[Weights]:
    """The best weights of `run`, then the best ones of the other kind; said where it has none, and where they are not
    calibrated.
    """
    choices = [choose(run)]
    for kind in SCORES:
        if kind == choices[0].kind:
            continue
        if other := best_weights(run, [kind]):
            choices.append(other)
        else:
            say(f"run {run.run} has no {NAMES[kind]} weights that were trained: they are left out")
    return [_said(of_choice(store, run, choice, device)) for choice in choices]


def _said(weights: Weights) -> Weights:
    """`weights`, having said why their probabilities are not calibrated, if they are not."""
    if not weights.calibration.used:
        say(
            f"the probabilities of the {weights.kind} weights of step {weights.step} are {weights.calibration}"
        )
    return weights
