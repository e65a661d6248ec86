"""Write a run as two repositories of the Hugging Face hub, and upload them.

One is the model with its card, the other a page (a Space) on which anyone tries an image. Nothing
is invented: the numbers are the run's, the licence is the user's, and a fact that is missing is
called unknown.
"""

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, HfApi, ModelCardData, SpaceCardData, get_token

from wds_train.checkpoint.resume_checks import own_dataset
from wds_train.checkpoint.run_manifest import RunManifest
from wds_train.console import counted, say
from wds_train.errors import StoreError, UsageError, WdsTrainError
from wds_train.evaluation.evaluate import View, refuse_other_classes, score
from wds_train.models.scoring import EVAL_BATCH, metrics
from wds_train.models.weights import Weights
from wds_train.serving.exporters import new_folder, refuse_taken, write_timm_folder
from wds_train.serving.graph import describe_model
from wds_train.serving.provenance import (
    best_results,
    describe_cost,
    describe_dataset,
    describe_version,
    footer,
    remove_places,
)
from wds_train.serving.space_folder import PYTHON, Space, file_of, pinned_version, render_card

# The names of a repository and of a licence, as the hub has them. It would refuse others only after
# minutes of exports.
NAMES = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
LICENCES = re.compile("[a-z0-9][a-z0-9.-]{0,60}")
# The scores of a card: their names, and their keys in the results.
SCORES = (("top-1", "top1"), ("top-5", "top5"))


def refuse_arguments(folder: Path, licence: str, push: str | None) -> None:
    """Raise `UsageError` for arguments of `wds-train publish` that cannot work."""
    refuse_taken(folder)
    if not LICENCES.fullmatch(licence):
        raise UsageError(
            f"--licence {licence!r} is no identifier of the hub, such as apache-2.0, mit or other"
        )
    if push is not None and not NAMES.fullmatch(push):
        raise UsageError(f"--push {push!r} is no name on the hub; write OWNER/NAME")


def write_repositories(
    folder: Path,
    run: RunManifest,
    choices: list[Weights],
    licence: str,
    name: str | None,
    *,
    device: torch.device,
) -> None:
    """Make `folder` with the two repositories in it, `model` and `space`.

    Args:
        folder: A folder that does not exist yet, or is empty.
        run: The run's manifest.
        choices: The weights of the page. The first of them are those of the model.
        licence: The licence of the model, as the hub calls it.
        name: OWNER/NAME of both repositories; None if they are not uploaded yet.
        device: Where the model is scored on the test split, if the dataset has one.

    Raises:
        UsageError: The folder is taken, or cannot be written.
        RunError: The model cannot be exported.
    """
    # Scored with their run's address still in place, for the messages.
    tested = score_on_test(run, choices[0], device)
    choices = [remove_places(weights) for weights in choices]
    model = choices[0]
    with new_folder(folder) as made:
        # The page.
        space = made / "space"
        space.mkdir(parents=True)
        page = Space(choices, footer(run))
        page.write(space)
        models = None
        if name:
            models = [name]
        head = SpaceCardData(
            title=page.title,
            sdk="gradio",
            sdk_version=pinned_version("gradio"),
            python_version=PYTHON,
            app_file="app.py",
            license=licence,
            models=models,
        )
        card = render_card("space.md", head.to_yaml(), title=page.title)
        (space / "README.md").write_text(card)

        # The model. Its ONNX file is that of the page.
        write_timm_folder(model, made / "model")
        shutil.copyfile(space / "models" / file_of(model), made / "model" / "model.onnx")
        card = _model_card(run, model, licence, name, tested)
        (made / "model" / "README.md").write_text(card)


def score_on_test(
    run: RunManifest, weights: Weights, device: torch.device
) -> dict[str, Any] | None:
    """Score weights on the test split of the run's dataset.

    Args:
        run: The run's manifest.
        weights: The weights of the run that are published.
        device: Where the model computes.

    Returns:
        `loss`, `top1`, `top5`, `samples` and `weights`. None if there is no test split, or if it
        cannot be read, which is printed.
    """
    try:
        dataset = own_dataset(run)
        if "test" not in dataset.manifest.splits:
            return None
        refuse_other_classes(weights, dataset)
        split = dataset.split("test")
        view = View.of(weights.recipe, None)
        say(f"scoring these weights on the {len(split):,} images of the test split")
        batch = min(weights.recipe.batch, EVAL_BATCH)
        with counted(len(split)) as seen:
            # Without loader workers: a forked one would not survive the threads that PyTorch has
            # by now.
            scores = score([weights], [view], split, batch, workers=0, device=device, seen=seen)
    except WdsTrainError as error:
        say(f"the card has no score on the test split: {error}")
        return None
    return metrics(scores.totals, len(split)) | {"samples": len(split), "weights": weights.kind}


def _model_card(
    run: RunManifest,
    weights: Weights,
    licence: str,
    name: str | None,
    tested: dict[str, Any] | None,
) -> str:
    """Return the README of the model's repository."""
    dataset = describe_dataset(run, _validation_samples(run))
    results = best_results(run)

    # The head is for the hub, which finds models by it, and lists their scores.
    head = ModelCardData(
        model_name=run.run,
        library_name="timm",
        pipeline_tag="image-classification",
        license=licence,
        tags=["image-classification", "timm", "wds-train"],
        eval_results=_hub_results(weights, dataset["name"], results, tested),
    )

    # The text is for people. Until it is uploaded, its example loads the model from its own folder.
    source = "local-dir:."
    if name:
        source = f"hf-hub:{name}"
    return render_card(
        "model.md",
        head.to_yaml(),
        facts=describe_model(weights),
        data=dataset,
        results=results,
        tested=tested,
        calibration=weights.calibration,
        cost=describe_cost(run),
        recipe=weights.recipe.to_dict(),
        revision=describe_version(),
        source=source,
    )


def _hub_results(
    weights: Weights, dataset: str, results: list[dict[str, Any]], tested: dict[str, Any] | None
) -> list[EvalResult]:
    """Return the scores in the hub's form, those on the test split first.

    Args:
        weights: The weights that are published.
        dataset: The dataset's name.
        results: The best validations of the run.
        tested: The scores on the test split; None without one.
    """
    # A score says nothing without the view of the images that it was measured with.
    view = weights.recipe.data
    tta = "flip" if view.eval_flip else "none"
    arguments = {"size": view.eval_size, "crop": view.eval_crop, "tta": tta}
    rows = []
    if tested:
        rows.append(("test", tested))
    for row in results:
        rows.append(("val", row))

    # The hub takes one entry for each score.
    found = []
    for split, row in rows:
        for metric, key in SCORES:
            entry = EvalResult(
                task_type="image-classification",
                dataset_type=dataset,
                dataset_name=dataset,
                dataset_split=split,
                metric_type="accuracy",
                metric_name=f"{metric}, {row['weights']} weights",
                metric_value=round(row[key], 4),
                metric_args=arguments,
            )
            found.append(entry)
    return found


def _validation_samples(run: RunManifest) -> int | None:
    """Return the number of validation images; None if the dataset is not that of the training."""
    try:
        return own_dataset(run).manifest.split("val").samples
    except WdsTrainError:
        return None


def upload_commands(folder: Path, name: str) -> str:
    """Return the commands that a person types to upload `folder` as OWNER/NAME."""
    return (
        f"hf auth login\n"
        f"hf upload {name} {folder}/model\n"
        f"hf repos create {name} --type space --space-sdk gradio\n"
        f"hf upload {name} {folder}/space --type space"
    )


def push(folder: Path, name: str) -> list[str]:
    """Upload both repositories to the hub.

    Args:
        folder: Made by `write_repositories`.
        name: OWNER/NAME of both.

    Returns:
        Their addresses.

    Raises:
        UsageError: There is no token.
        StoreError: The hub refuses, or cannot be reached.
    """
    typed = upload_commands(folder, name)
    if get_token() is None:
        raise UsageError(
            f"there is no token of the hub: {folder} is made, and not uploaded. Type\n{typed}"
        )
    hub = HfApi()
    addresses = []
    for kind, sdk, prefix in (("model", None, ""), ("space", "gradio", "spaces/")):
        try:
            # It exists already if an earlier upload failed half-way.
            hub.create_repo(name, repo_type=kind, space_sdk=sdk, exist_ok=True)
            hub.upload_folder(repo_id=name, repo_type=kind, folder_path=folder / kind)
        except Exception as error:
            # The hub's client and its HTTP library raise other errors from version to version.
            cause = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise StoreError(
                f"the hub did not take the {kind} {name} ({cause:.200}); let the token write there "
                f"(HF_TOKEN, or `hf auth login`), and reach {hub.endpoint}. {folder} is made; to "
                f"upload it, type\n{typed}"
            ) from error
        addresses.append(f"{hub.endpoint}/{prefix}{name}")
    return addresses
