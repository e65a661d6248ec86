"""The parts of a training, and the checks before it claims its run.

The training makes its loaders and its trainer here, and so does `--dry-run`: one assembly for both.
"""

import contextlib
import secrets
from dataclasses import replace

import torch

from wds_train.checkpoint.lease import read_run
from wds_train.checkpoint.resume_checks import check_resume, data_of
from wds_train.checkpoint.run_manifest import RunManifest, name_of
from wds_train.config.schedule import image_side
from wds_train.console import note
from wds_train.dataset.reader import Dataset
from wds_train.errors import NotFound
from wds_train.loader.eval_loader import EvalLoader
from wds_train.loader.plan import split_batch
from wds_train.loader.train_loader import TrainLoader
from wds_train.models.pretrained import TIMM, timm_name
from wds_train.models.scoring import EVAL_BATCH
from wds_train.storage.base import Store
from wds_train.tracking.progress import Pace
from wds_train.training.engine import Trainer
from wds_train.training.first_step import check_compiler, check_first_step
from wds_train.training.options import TrainOptions
from wds_train.training.ranks import Ranks


def refuse(
    options: TrainOptions, datasets: list[Dataset], fresh: RunManifest, store: Store, ranks: Ranks
) -> None:
    """Refuse a training that cannot work, before the claim: its name must stay free.

    The model is made without memory for its weights, and called without arithmetic (PyTorch's
    device "meta"). That takes a fraction of a second.

    Args:
        options: The training.
        datasets: Its dataset, and the others of its mixture.
        fresh: The run as it would begin.
        store: The run's folder, in which there may be a run.
        ranks: The processes of the training.

    Raises:
        UsageError: A setting, an option or the machine cannot work.
    """
    # A run that is there must be of this training. If it goes on from a checkpoint, the weights
    # that it began with are not needed, and may be gone.
    resumes = False
    with contextlib.suppress(NotFound):
        found = check_resume(read_run(store)[0], fresh, store.url)
        if found.status == "done":
            return
        resumes = bool(found.checkpoints)

    # The loader refuses datasets and ranks that cannot work.
    make_train_loader(options, datasets, ranks)
    model = options.recipe.model
    if ranks.leads and not resumes and model.init.startswith(TIMM):
        weights = TIMM + timm_name(model.init, model)
        note(
            f"weights  reading {weights}, which this machine has or fetches from the Hugging Face "
            "hub ..."
        )

    # The trainer refuses the rest. Alone: the ranks are not connected, and a step on "meta" needs
    # no compiler.
    uncompiled = replace(options, compile=False)
    unconnected = Ranks(ranks.rank, ranks.size)
    meta = torch.device("meta")
    check_first_step(make_trainer(uncompiled, datasets, meta, unconnected, resumes=resumes))
    if options.compile and ranks.leads:
        check_compiler(ranks.device)


def make_trainer(
    options: TrainOptions,
    datasets: list[Dataset],
    device: torch.device,
    ranks: Ranks,
    *,
    resumes: bool,
) -> Trainer:
    """Make the trainer of a training on `device`; with `resumes`, `restore` is to follow."""
    return Trainer(
        options.recipe,
        len(datasets[0].manifest.classes),
        epoch_steps(options, datasets),
        device,
        ranks,
        accumulate=options.accumulate or 1,
        precision=options.precision,
        compile=options.compile,
        resumes=resumes,
    )


def fresh_run(options: TrainOptions, datasets: list[Dataset]) -> RunManifest:
    """Make the manifest of the run as it would begin."""
    return RunManifest(
        run=name_of(options.run),
        recipe=options.recipe.to_dict(),
        dataset=data_of(datasets[0], _with_shares(options, datasets)),
        wandb_id=secrets.token_hex(4),
    )


def sizes(options: TrainOptions) -> list[int]:
    """Return the number of images that each dataset gives to every batch."""
    weights = [share for _, share in options.mix]
    return split_batch(options.recipe.batch, weights, options.recipe.data.repeats)


def epoch_steps(options: TrainOptions, datasets: list[Dataset]) -> int:
    """Return the number of steps in an epoch, which is one of the first dataset."""
    return datasets[0].manifest.split("train").samples // sizes(options)[0]


def _with_shares(options: TrainOptions, datasets: list[Dataset]) -> list[tuple[Dataset, float]]:
    """Return the other datasets of the mixture, each with its share of a batch."""
    shares = [share for _, share in options.mix]
    return list(zip(datasets[1:], shares, strict=True))


def make_train_loader(
    options: TrainOptions, datasets: list[Dataset], ranks: Ranks, from_step: int = 0
) -> TrainLoader:
    """Make the loader of the training's batches, which begins at `from_step`.

    Unreadable samples are counted by the trainer, whose count survives a resume.
    """
    recipe = options.recipe
    data = recipe.data
    return TrainLoader(
        datasets[0],
        recipe.batch,
        epochs=recipe.schedule.epochs,
        size=data.size,
        start_size=data.start_size,
        size_ramp=data.size_ramp,
        scale=data.scale,
        ratio=data.ratio,
        flip=data.flip,
        color_jitter=data.color_jitter,
        augment=data.auto_augment,
        repeats=data.repeats,
        seed=recipe.seed,
        from_step=from_step,
        rank=ranks.rank,
        world=ranks.size,
        workers=options.workers,
        device=ranks.device,
        mix=_with_shares(options, datasets),
        cache=options.cache_dir,
        cache_gb=options.cache_bytes / 1e9,
        # The trainer counts the unreadable samples.
        max_bad=None,
    )


def make_val_loader(options: TrainOptions, dataset: Dataset, ranks: Ranks) -> EvalLoader:
    """Make the loader of the validation, whose unreadable samples count as wrong predictions."""
    data = options.recipe.data
    return EvalLoader(
        dataset,
        min(options.recipe.batch, EVAL_BATCH),
        size=data.eval_size,
        crop_ratio=data.eval_crop,
        rank=ranks.rank,
        world=ranks.size,
        workers=options.workers,
        device=ranks.device,
        max_bad=None,
    )


def expected_pace(options: TrainOptions, datasets: list[Dataset]) -> Pace:
    """Return the pace to expect before any step was timed, in steps of the largest images."""
    data = options.recipe.data
    epochs = options.recipe.schedule.epochs
    # A step's work grows with the area of its images.
    costs = []
    for epoch in range(epochs):
        costs.append((image_side(data, epoch, epochs) / data.size) ** 2)

    # A validation is the forward pass, a third of a step, of two models; of each image twice where
    # it is flipped.
    batches = datasets[0].manifest.split("val").samples / options.recipe.batch
    passes = 1
    if data.eval_flip:
        passes = 2
    validation = batches * 2 / 3 * (data.eval_size / data.size) ** 2 * passes
    return Pace(costs, epoch_steps(options, datasets), validation)


def describe_training(options: TrainOptions, dataset: Dataset, steps: int, ranks: Ranks) -> str:
    """Return the lines that introduce a training: its dataset, its run, and the dropped samples."""
    recipe = options.recipe
    splits = dataset.manifest.splits
    samples = splits["train"].samples
    text = (
        f"dataset  {dataset.store.url}: {samples:,} train, {splits['val'].samples:,} val, "
        f"{len(dataset.manifest.classes)} classes\n"
        f"run      {options.run}: recipe {recipe.name}, {recipe.model.name}, "
        f"{recipe.schedule.epochs} epochs of {steps} steps of {recipe.batch}, "
        f"on {describe_hardware(ranks)}"
    )
    # An epoch has only full batches. With repeats, several epochs make up a pass over all samples.
    left = samples % (sizes(options)[0] // recipe.data.repeats)
    if left:
        turn = "epoch"
        if recipe.data.repeats > 1:
            turn = "pass"
        text += (
            f"\n{turn:8} uses {samples - left:,} of {samples:,} samples (drops {left:,}, "
            f"different each {turn})"
        )
    return text


def describe_hardware(ranks: Ranks) -> str:
    """Return the hardware that the training works on, such as "2 x NVIDIA A10G"."""
    device = ranks.device
    name = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    if ranks.size == 1:
        return name
    return f"{ranks.size} x {name}"
