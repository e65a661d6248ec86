"""Checks that a run goes on with what it began with: its recipe, its dataset and its mixture."""

import operator
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from wds_train.checkpoint.run_manifest import Mixed, RunManifest
from wds_train.config.recipe import Recipe
from wds_train.config.settings import setting_names, setting_of
from wds_train.dataset.reader import Dataset
from wds_train.errors import NotFound, RunError, UsageError
from wds_train.schema import typed

NAMED = 5  # differences; another recipe differs in dozens
REMEDY = "leave out what differs, or begin another run: wds-train train NAME --like"


def kept_nothing(run: RunManifest) -> bool:
    """Return True if it was given up without a checkpoint.

    A mistyped setting must not hold the name for ever.
    """
    return not run.checkpoints and run.status in ("failed", "interrupted", "stopped")


def own_dataset(run: RunManifest) -> Dataset:
    """Return the dataset that `run` was begun on; an error when it is gone, or another one is in
    its place.
    """
    if not (url := run.dataset.get("url")):
        raise UsageError(
            f"run {run.run} does not say where its dataset is; give its address with --dataset"
        )
    remedy = "give --dataset with the address of the one that the run began on"
    try:
        dataset = Dataset.open(url)
    except NotFound as error:
        raise NotFound(
            f"the dataset of run {run.run} is gone: there is none at {url} any more; {remedy}"
        ) from error
    if dataset.fingerprint != run.dataset["fingerprint"]:
        raise RunError(
            f"the dataset of run {run.run} was made anew: {url} has the fingerprint "
            f"{dataset.fingerprint[:8]}, the run began on {run.dataset['fingerprint'][:8]}; "
            f"{remedy}"
        )
    return dataset


def own_mixture(run: RunManifest) -> tuple[tuple[str, float], ...]:
    """Return the other datasets of `run` and their shares, as --mix gives them."""
    mixture = _mixture(run.dataset)
    if any(not each.url for each in mixture):
        shares = " ".join(f"--mix DATASET={each.share:g}" for each in mixture)
        raise UsageError(
            f"run {run.run} does not say where the datasets of its mixture are; give them again: "
            f"{shares}"
        )
    return tuple((each.url, each.share) for each in mixture)


def data_of(dataset: Dataset, mixture: Iterable[tuple[Dataset, float]]) -> dict[str, Any]:
    """Return what a run's manifest says of the data that it is begun on."""
    mix = [
        {"fingerprint": other.fingerprint, "share": share, "url": other.store.url}
        for other, share in mixture
    ]
    classes = len(dataset.manifest.classes)
    return {
        "url": dataset.store.url,
        "fingerprint": dataset.fingerprint,
        "classes": classes,
        "mix": mix,
    }


def check_resume(found: RunManifest, fresh: RunManifest, where: str) -> RunManifest:
    """Return the run `found` at `where` as it goes on: with the dataset where it lies now, and if
    it kept nothing, as `fresh`. `UsageError` that names all in which `fresh` is another training.
    """
    if kept_nothing(found):
        # What an earlier attempt left half done is of use to the same training alone.
        same = found.recipe == fresh.recipe and not _other_data(found.dataset, fresh.dataset)
        pending = found.pending if same else None
        return replace(found, recipe=fresh.recipe, dataset=fresh.dataset, pending=pending)
    settings = (
        [] if found.recipe == fresh.recipe else _other_settings(found.settings, fresh.settings)
    )
    if different := settings + _other_data(found.dataset, fresh.dataset):
        more = f" and {len(different) - NAMED} more" if len(different) > NAMED else ""
        raise UsageError(
            f"{where} was begun with {'; '.join(different[:NAMED])}{more}; {REMEDY} {where}"
        )
    return replace(found, dataset=fresh.dataset)


def _other_settings(saved: Recipe, now: Recipe) -> list[str]:
    if saved.name != now.name:
        return [f"recipe {saved.name}, not {now.name}"]
    different = [
        name
        for name in setting_names()
        if operator.attrgetter(name)(saved) != operator.attrgetter(name)(now)
    ]
    return [
        f"{name} {setting_of(saved, name) or 'empty'}, not {setting_of(now, name) or 'empty'}"
        for name in different
    ]


def _other_data(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    different = []
    if saved["fingerprint"] != now["fingerprint"]:
        names = [
            f"{each.get('url', 'one')} (fingerprint {each['fingerprint'][:8]})"
            for each in (saved, now)
        ]
        different.append(f"dataset {', not '.join(names)}")
    mixtures = [_mixture(each) for each in (saved, now)]
    if len({tuple((each.fingerprint, each.share) for each in mixture) for mixture in mixtures}) > 1:
        different.append(f"mixture {', not '.join(map(_named, mixtures))}")
    return different


def _mixture(dataset: dict[str, Any]) -> tuple[Mixed, ...]:
    return typed(tuple[Mixed, ...], dataset.get("mix", []))


def _named(mixture: tuple[Mixed, ...]) -> str:
    return (
        ", ".join(f"{each.url or each.fingerprint[:8]}={each.share:g}" for each in mixture)
        or "none"
    )
