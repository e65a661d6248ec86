"""The origin of a model in words, for its card and its page.

It says what the run's manifest knows, and nothing else. Places are reduced to names: an address may
tell more about its owner than is meant for all.
"""

from dataclasses import replace
from importlib.metadata import version
from typing import Any

from wds_train.checkpoint.run_manifest import RunManifest
from wds_train.checkpoint.scores import SCORES
from wds_train.checkpoint.weight_choice import best_weights
from wds_train.models.weights import Weights
from wds_train.tracking import versions


def best_results(run: RunManifest) -> list[dict[str, Any]]:
    """Return the best validation of the raw and of the EMA weights, as rows of the card.

    The weights that are published come first.
    """
    # EMA weights that were never updated have no best.
    choices = []
    for kind in SCORES:
        choice = best_weights(run, [kind])
        if choice:
            choices.append(choice)
    published = best_weights(run)
    choices.sort(key=lambda choice: choice != published)

    rows = []
    for choice in choices:
        # The two scores of a kind have names that differ in nothing else.
        top5 = choice.metrics[SCORES[choice.kind].replace("top1", "top5")]
        row = {
            "weights": choice.kind,
            "epoch": choice.checkpoint.progress.evaluated,
            "top1": choice.top1,
            "top5": top5,
        }
        rows.append(row)
    return rows


def remove_places(weights: Weights) -> Weights:
    """Return weights that name their run, first weights and teacher, but not where these are."""
    recipe = weights.recipe
    model = replace(recipe.model, init=_name_of(recipe.model.init))
    distill = replace(recipe.distill, teacher=_name_of(recipe.distill.teacher))
    recipe = replace(recipe, model=model, distill=distill)
    return replace(weights, run=_name_of(weights.run), recipe=recipe)


def _name_of(place: str) -> str:
    return place.rstrip("/").rpartition("/")[2]


def describe_dataset(run: RunManifest, samples: int | None) -> dict[str, Any]:
    """Return the facts of the dataset that a run was trained on.

    Args:
        run: The run's manifest.
        samples: The validation images; None if unknown.
    """
    noted = run.dataset
    images = "an unknown number of"
    if samples is not None:
        images = f"{samples:,}"
    return {
        "name": _name_of(str(noted.get("url", ""))) or "unknown",
        "classes": noted.get("classes"),
        "fingerprint": noted.get("fingerprint", "unknown"),
        "mixed": len(noted.get("mix", ())),
        "samples": images,
    }


def describe_cost(run: RunManifest) -> str:
    """Return the hours and interruptions of a run in a sentence.

    Dollars and hardware are named if all attempts noted them, which those of older runs did not.
    """
    totals = run.totals()
    text = (
        f"{totals.seconds / 3600:.2f} hours in {totals.attempts} attempts, "
        f"{totals.interruptions} interruptions survived"
    )
    hardware = {attempt.hardware for attempt in run.attempts} - {""}
    if hardware:
        text += f", on {', '.join(sorted(hardware))}"
    if _has_all_prices(run):
        return f"{text}, ${totals.dollars:.2f}."
    return f"{text}, dollars not recorded."


def _has_all_prices(run: RunManifest) -> bool:
    """Return True if every attempt of the run noted its price."""
    if run.earlier.attempts:  # of these, the manifest keeps sums alone
        return False
    return all(attempt.price is not None for attempt in run.attempts)


def describe_version() -> str:
    """Return the version of this package, with the commit if it runs from a clone."""
    text = version("wds-train")
    commit = versions.revision()
    if commit:
        text += f", revision {commit}"
    return text


def footer(run: RunManifest) -> str:
    """Return the origin of a run's model in a line of Markdown, for the page."""
    noted = describe_dataset(run, None)
    dataset = f"{noted['name']} `{noted['fingerprint'][:16]}`"
    by = f"wds-train {describe_version()}"
    return f"Run {run.run}, dataset {dataset}, by {by}: {describe_cost(run)}"
