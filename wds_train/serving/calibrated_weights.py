"""The calibrated weights of a run or an exported file.

`predict`, `export`, `publish` and `demo` load their models here, so that all of them show the same
probabilities for an image.
"""

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


def load_calibrated(source: str, device: torch.device) -> Weights:
    """Load weights for answering, and print a note if their probabilities are not calibrated.

    Args:
        source: An exported file, or the address of a run, whose best weights are taken.
        device: Where the model computes if the weights have yet to be calibrated.

    Raises:
        WdsTrainError: There is no such file or run, or its weights cannot be used.
    """
    if source.endswith(SUFFIX):
        weights = Weights.read(Path(source))
    else:
        run, store = find_run(source)
        # A run in training replaces checkpoints while they are read.
        weights = from_newest(
            store, run, lambda newest: calibrate_choice(store, newest, choose(newest), device)
        )
    _note_uncalibrated(weights)
    return weights


def calibrate_choice(
    store: Store, run: RunManifest, choice: Choice, device: torch.device
) -> Weights:
    """Load the chosen weights of a run, and calibrate them if the validation images can be read.

    Args:
        store: The run's.
        run: The run's manifest.
        choice: The weights to load.
        device: Where the model computes.
    """
    weights = load_weights(store, run, choice)
    return calibrate_weights(weights, run, choice, device, counted)


def load_both_kinds(store: Store, run: RunManifest, device: torch.device) -> list[Weights]:
    """Load the best weights of a run, then the best ones of the other kind, raw or EMA.

    A note is printed if there are none of the other kind, and for weights that are not calibrated.

    Args:
        store: The run's.
        run: The run's manifest.
        device: Where the model computes.

    Returns:
        One or two sets of weights, the best first.
    """
    # The kind of the best weights is settled. The other kind may have none: EMA weights that were
    # never updated say nothing.
    choices = [choose(run)]
    for kind in SCORES:
        if kind == choices[0].kind:
            continue
        other = best_weights(run, [kind])
        if other:
            choices.append(other)
        else:
            say(f"run {run.run} has no {NAMES[kind]} weights that were trained: they are left out")

    found = []
    for choice in choices:
        weights = calibrate_choice(store, run, choice, device)
        _note_uncalibrated(weights)
        found.append(weights)
    return found


def _note_uncalibrated(weights: Weights) -> None:
    """Print why the probabilities of `weights` are not calibrated, if they are not."""
    if not weights.calibration.used:
        name = f"{weights.kind} weights of step {weights.step}"
        say(f"the probabilities of the {name} are {weights.calibration}")
