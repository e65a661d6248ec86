"""A run as two repositories of the Hugging Face hub: the model with its card, and a page on which anyone tries an image.

Nothing is invented: numbers are the run's, the licence is the user's, and what is not known is said to be unknown.
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
from wds_train.serving.graph import facts
from wds_train.serving.provenance import cost, data, footer, results, revision, without_places
from wds_train.serving.space_folder import PYTHON, Space, card, file_of, pinned

NAMES = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
LICENCES = re.compile("[a-z0-9][a-z0-9.-]{0,60}")


def refuse(folder: Path, licence: str, push: str | None) -> None:
    refuse_taken(folder)
    if not LICENCES.fullmatch(licence):
        raise UsageError(
            f"--licence {licence!r} is no identifier of the hub, such as apache-2.0, mit or other"
        )
    if push is not None and not NAMES.fullmatch(push):
        raise UsageError(f"--push {push!r} is no name on the hub; write OWNER/NAME")


def write(
    folder: Path,
    run: RunManifest,
    choices: list[Weights],
    licence: str,
    name: str | None,
    *,
    device: torch.device,
) -> None:
    """Make `folder`, with `model` and `space` in it, of the first of `choices` and of all of them. `name` is what both
    repositories will be called. What can be scored is scored on `device`.
    """
    tested = score_on_test(run, choices[0], device)
    choices = [without_places(weights) for weights in choices]
    with new_folder(folder) as made:
        space = made / "space"
        space.mkdir(parents=True)
        page = Space(choices, footer(run))
        page.write(space)
        head = SpaceCardData(
            title=page.title,
            sdk="gradio",
            sdk_version=pinned("gradio"),
            python_version=PYTHON,
            app_file="app.py",
            license=licence,
            models=[name] if name else None,
        )
        (space / "README.md").write_text(card("space.md", head.to_yaml(), title=page.title))
        write_timm_folder(choices[0], made / "model")
        shutil.copyfile(space / "models" / file_of(choices[0]), made / "model" / "model.onnx")
        (made / "model" / "README.md").write_text(
            _model_card(run, choices[0], licence, name, tested)
        )


def score_on_test(
    run: RunManifest, weights: Weights, device: torch.device
) -> dict[str, Any] | None:
    """What these very weights score on the test split of the run's dataset; None where it has none, said where it cannot be
    read.
    """
    try:
        dataset = own_dataset(run)
        if "test" not in dataset.manifest.splits:
            return None
        refuse_other_classes(weights, dataset)
        split, view = dataset.split("test"), View.of(weights.recipe, None)
        say(f"scoring these weights on the {len(split):,} images of the test split")
        batch = min(weights.recipe.batch, EVAL_BATCH)
        with counted(len(split)) as seen:
            # Without loader workers: a forked one would not survive the threads that PyTorch has by now.
            scored = score([weights], [view], split, batch, workers=0, device=device, seen=seen)
    except WdsTrainError as error:
        say(f"the card has no score on the test split: {error}")
        return None
    return metrics(scored.totals, len(split)) | {"samples": len(split), "weights": weights.kind}


def _model_card(
    run: RunManifest,
    weights: Weights,
    licence: str,
    name: str | None,
    tested: dict[str, Any] | None,
) -> str:
    known, named, found = facts(weights), data(run, _validation_samples(run)), results(run)
    view = weights.recipe.data
    arguments = {
        "size": view.eval_size,
        "crop": view.eval_crop,
        "tta": "flip" if view.eval_flip else "none",
    }
    scored = [("test", tested)] if tested else []
    scored += [("val", row) for row in found]
    scores = [
        EvalResult(
            task_type="image-classification",
            dataset_type=named["name"],
            dataset_name=named["name"],
            dataset_split=split,
            metric_type="accuracy",
            metric_name=f"{metric}, {row['weights']} weights",
            metric_value=round(row[key], 4),
            metric_args=arguments,
        )
        for split, row in scored
        for metric, key in (("top-1", "top1"), ("top-5", "top5"))
    ]
    head = ModelCardData(
        model_name=run.run,
        library_name="timm",
        pipeline_tag="image-classification",
        license=licence,
        tags=["image-classification", "timm", "wds-train"],
        eval_results=scores,
    )
    return card(
        "model.md",
        head.to_yaml(),
        facts=known,
        data=named,
        results=found,
        tested=tested,
        calibration=weights.calibration,
        cost=cost(run),
        recipe=weights.recipe.to_dict(),
        revision=revision(),
        source=f"hf-hub:{name}" if name else "local-dir:.",
    )


def _validation_samples(run: RunManifest) -> int | None:
    """As the dataset says, if it is still the one of the training."""
    try:
        return own_dataset(run).manifest.split("val").samples
    except WdsTrainError:
        return None


def commands(folder: Path, name: str) -> str:
    """What a person types to upload `folder`."""
    return (
        f"hf auth login\nhf upload {name} {folder}/model\n"
        f"hf repos create {name} --type space --space-sdk gradio\nhf upload {name} {folder}/space --type space"
    )


def push(folder: Path, name: str) -> list[str]:
    """Upload `folder` to the hub, and give the addresses; `UsageError` without a token, `StoreError` when the hub refuses it."""
    if get_token() is None:
        raise UsageError(
            f"there is no token of the hub: {folder} is made, and not uploaded. Type\n{commands(folder, name)}"
        )
    hub, addresses = HfApi(), []
    for kind in ("model", "space"):
        try:
            hub.create_repo(
                name, repo_type=kind, space_sdk="gradio" if kind == "space" else None, exist_ok=True
            )
            hub.upload_folder(repo_id=name, repo_type=kind, folder_path=folder / kind)
        except Exception as error:  # whatever the hub's client and its HTTP library raise: it depends on their versions
            cause = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise StoreError(
                f"the hub did not take the {kind} {name} ({cause:.200}); let the token write there (HF_TOKEN, or `hf auth "
                f"login`), and reach {hub.endpoint}. {folder} is made; to upload it, type\n{commands(folder, name)}"
            ) from error
        addresses.append(f"{hub.endpoint}/{'spaces/' if kind == 'space' else ''}{name}")
    return addresses
