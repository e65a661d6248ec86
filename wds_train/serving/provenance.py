"""Where a model comes from, in words: what its run's manifest knows, and nothing else."""

from dataclasses import replace
from importlib.metadata import version
from typing import Any

from wds_train.checkpoint.run_manifest import RunManifest
from wds_train.checkpoint.scores import SCORES
from wds_train.checkpoint.weight_choice import best_weights
from wds_train.models.weights import Weights
from wds_train.tracking import versions as machine


def results(run: RunManifest) -> list[dict[str, Any]]:
    """The best validation of the raw and of the EMA weights, of those that are published first."""
    found = [choice for kind in SCORES if (choice := best_weights(run, [kind]))]
    published = best_weights(run)
    found.sort(key=lambda choice: choice != published)
    return [
        {
            "weights": choice.kind,
            "epoch": choice.checkpoint.progress.evaluated,
            "top1": choice.top1,
            "top5": choice.metrics[SCORES[choice.kind].replace("top1", "top5")],
        }
        for choice in found
    ]


def without_places(weights: Weights) -> Weights:
    """The weights for others' eyes: with the names of their run and of files that they began from or learned from, not with
    where these lie.
    """
    recipe = weights.recipe
    model = replace(recipe.model, init=_name(recipe.model.init))
    distill = replace(recipe.distill, teacher=_name(recipe.distill.teacher))
    return replace(
        weights, run=_name(weights.run), recipe=replace(recipe, model=model, distill=distill)
    )


def _name(place: str) -> str:
    return place.rstrip("/").rpartition("/")[2]


def data(run: RunManifest, samples: int | None) -> dict[str, Any]:
    """The dataset by name: its address may say more of its owner than is meant for all."""
    named = run.dataset
    return {
        "name": _name(str(named.get("url", ""))) or "unknown",
        "classes": named.get("classes"),
        "fingerprint": named.get("fingerprint", "unknown"),
        "mixed": len(named.get("mix", ())),
        "samples": "an unknown number of" if samples is None else f"{samples:,}",
    }


def cost(run: RunManifest) -> str:
    """Hours and interruptions; dollars and hardware where every attempt noted them."""
    totals = run.totals()
    # Attempts of older runs noted neither.
    hardware = {attempt.hardware for attempt in run.attempts} - {""}
    known = not run.earlier.attempts and all(attempt.price is not None for attempt in run.attempts)
    return (
        f"{totals.seconds / 3600:.2f} hours in {totals.attempts} attempts, {totals.interruptions} interruptions survived"
        + (f", on {', '.join(sorted(hardware))}" if hardware else "")
        + (f", ${totals.dollars:.2f}." if known else ", dollars not recorded.")
    )


def revision() -> str:
    """The version of this package, with the commit where it runs out of a checkout."""
    commit = machine.revision()
    return f"{version('wds-train')}{f', revision {commit}' if commit else ''}"


def footer(run: RunManifest) -> str:
    """All of it in a line of Markdown."""
    named = data(run, None)
    return f"Run {run.run}, dataset {named['name']} `{named['fingerprint'][:16]}`, by wds-train {revision()}: {cost(run)}"
