"""Checks that a run goes on with the recipe, the dataset and the mixture that it began with.

Pure, except `own_dataset`, which opens a dataset.
"""

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

# Differences in a message; another recipe differs in dozens.
NAMED = 5
REMEDY = "leave out what differs, or begin another run: wds-train train NAME --like"


def kept_nothing(run: RunManifest) -> bool:
    """Return True if the run ended without a checkpoint.

    Its name is free for another training: a mistyped setting must not occupy it for ever.
    """
    return not run.checkpoints and run.status in ("failed", "interrupted", "stopped")


def own_dataset(run: RunManifest) -> Dataset:
    """Return the dataset that `run` was begun on.

    Raises:
        UsageError: The manifest of an older version has no address.
        NotFound: There is no dataset any more.
        RunError: There is another dataset at its address.
    """
    url = run.dataset.get("url")
    if not url:
        raise UsageError(
            f"run {run.run} does not say where its dataset is; give its address with --dataset"
        )

    # Open it. It may have been removed, or written once more, since the run began.
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
    """Return the addresses of the other datasets of `run`, and their shares, as --mix gives them.

    Raises:
        UsageError: The manifest of an older version has no addresses.
    """
    mixture = []
    options = []
    has_addresses = True
    for each in _mixture_of(run.dataset):
        mixture.append((each.url, each.share))
        options.append(f"--mix DATASET={each.share:g}")
        if not each.url:
            has_addresses = False
    if not has_addresses:
        raise UsageError(
            f"run {run.run} does not say where the datasets of its mixture are; give them again: "
            f"{' '.join(options)}"
        )
    return tuple(mixture)


def data_of(dataset: Dataset, mixture: Iterable[tuple[Dataset, float]]) -> dict[str, Any]:
    """Return the description of a run's data for its manifest.

    Args:
        dataset: The dataset.
        mixture: The other datasets, and their shares of every batch.
    """
    mix = []
    for other, share in mixture:
        mix.append({"fingerprint": other.fingerprint, "share": share, "url": other.store.url})
    return {
        "url": dataset.store.url,
        "fingerprint": dataset.fingerprint,
        "classes": len(dataset.manifest.classes),
        "mix": mix,
    }


def check_resume(found: RunManifest, fresh: RunManifest, where: str) -> RunManifest:
    """Return the manifest to resume with, with the dataset's current address.

    Args:
        found: The run's manifest. If the run kept nothing, it goes on as `fresh`.
        fresh: The manifest that a new run would get.
        where: The run's address, for the message.

    Raises:
        UsageError: `fresh` is another training; the message names the differences.
    """
    # The settings are compared one by one only where the recipes differ, to name them. Those of a
    # run that kept nothing need not be readable at all.
    different = []
    if found.recipe != fresh.recipe and not kept_nothing(found):
        different = _compare_settings(found.settings, fresh.settings)
    different += _compare_data(found.dataset, fresh.dataset)

    # The name of a run that kept nothing is free for any training.
    if kept_nothing(found):
        # The commit that an earlier attempt left half done is of use to the same training alone.
        pending = found.pending
        if found.recipe != fresh.recipe or different:
            pending = None
        return replace(found, recipe=fresh.recipe, dataset=fresh.dataset, pending=pending)

    if different:
        named = "; ".join(different[:NAMED])
        if len(different) > NAMED:
            named += f" and {len(different) - NAMED} more"
        raise UsageError(f"{where} was begun with {named}; {REMEDY} {where}")
    return replace(found, dataset=fresh.dataset)


def _compare_settings(saved: Recipe, now: Recipe) -> list[str]:
    """Return the settings that differ, in words; another recipe's name says enough."""
    if saved.name != now.name:
        return [f"recipe {saved.name}, not {now.name}"]
    different = []
    for name in setting_names():
        setting = operator.attrgetter(name)
        if setting(saved) != setting(now):
            before = setting_of(saved, name) or "empty"
            after = setting_of(now, name) or "empty"
            different.append(f"{name} {before}, not {after}")
    return different


def _compare_data(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the differences of two descriptions by `data_of`, in words.

    The fingerprint decides: a dataset may have moved.
    """
    different = []
    if saved["fingerprint"] != now["fingerprint"]:
        different.append(f"dataset {_describe_dataset(saved)}, not {_describe_dataset(now)}")
    before = _mixture_of(saved)
    after = _mixture_of(now)
    if not _are_same(before, after):
        different.append(f"mixture {_describe_mixture(before)}, not {_describe_mixture(after)}")
    return different


def _mixture_of(dataset: dict[str, Any]) -> tuple[Mixed, ...]:
    return typed(tuple[Mixed, ...], dataset.get("mix", []))


def _are_same(mixture: tuple[Mixed, ...], other: tuple[Mixed, ...]) -> bool:
    """Return True if two mixtures are of the same datasets and shares, in the same order."""
    if len(mixture) != len(other):
        return False
    for one, another in zip(mixture, other, strict=True):
        if (one.fingerprint, one.share) != (another.fingerprint, another.share):
            return False
    return True


def _describe_dataset(dataset: dict[str, Any]) -> str:
    return f"{dataset.get('url', 'one')} (fingerprint {dataset['fingerprint'][:8]})"


def _describe_mixture(mixture: tuple[Mixed, ...]) -> str:
    named = [f"{each.url or each.fingerprint[:8]}={each.share:g}" for each in mixture]
    return ", ".join(named) or "none"
