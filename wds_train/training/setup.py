"""The parts of a training, and the checks before it claims its run."""

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
    """Raise what could not work, before the claim: a name must stay free, and a run as it is. The
    model is made without memory for its weights, and called without arithmetic (PyTorch's device
    "meta"), which takes a fraction of a second.
    """
    resumes = False
    with contextlib.suppress(NotFound):
        found = check_resume(read_run(store)[0], fresh, store.url)
        if found.status == "done":
            return
        resumes = bool(found.checkpoints)  # the weights that it began from may be gone by now
    make_train_loader(options, datasets, ranks)
    model = options.recipe.model
    if ranks.leads and not resumes and model.init.startswith(TIMM):
        weights = TIMM + timm_name(model.init, model)
        note(
            f"weights  reading {weights}, which this machine has or fetches from the Hugging Face "
            "hub ..."
        )
    on_meta = replace(options, compile=False)
    trainer = make_trainer(
        on_meta, datasets, torch.device("meta"), Ranks(ranks.rank, ranks.size), resumes=resumes
    )
    check_first_step(trainer)
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
    dataset, *mixed = datasets
    return RunManifest(
        run=name_of(options.run),
        recipe=options.recipe.to_dict(),
        dataset=data_of(dataset, zip(mixed, (share for _, share in options.mix), strict=True)),
        wandb_id=secrets.token_hex(4),
    )


def sizes(options: TrainOptions) -> list[int]:
    """Return how many images of every batch each dataset gives."""
    return split_batch(
        options.recipe.batch, [share for _, share in options.mix], options.recipe.data.repeats
    )


def epoch_steps(options: TrainOptions, datasets: list[Dataset]) -> int:
    """Return how many steps an epoch has, which is one of the first dataset."""
    return datasets[0].manifest.split("train").samples // sizes(options)[0]


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
        mix=list(zip(datasets[1:], (share for _, share in options.mix), strict=True)),
        cache=options.cache_dir,
        cache_gb=options.cache_bytes / 1e9,
        max_bad=None,
    )


def make_val_loader(options: TrainOptions, dataset: Dataset, ranks: Ranks) -> EvalLoader:
    """Make the loader of the validation. Its unreadable samples count as wrong."""
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
    """Return a step's work grows with the area of its images. A validation is the forward pass, a
    third of a step, of two models.
    """
    recipe = options.recipe
    data = options.recipe.data
    epochs = recipe.schedule.epochs
    sides = [image_side(data, epoch, epochs) for epoch in range(epochs)]
    batches = datasets[0].manifest.split("val").samples / recipe.batch
    validation = batches * 2 / 3 * (data.eval_size / data.size) ** 2 * (2 if data.eval_flip else 1)
    return Pace(
        [(side / data.size) ** 2 for side in sides], epoch_steps(options, datasets), validation
    )


def introduction(options: TrainOptions, dataset: Dataset, steps: int, ranks: Ranks) -> str:
    recipe = options.recipe
    splits = dataset.manifest.splits
    samples = splits["train"].samples
    distinct = sizes(options)[0] // recipe.data.repeats
    left = samples % distinct
    turn = "epoch" if recipe.data.repeats == 1 else "pass"
    left_out = (
        f"{samples - left:,} of {samples:,} samples; {left:,}, other ones each {turn}, are left out"
    )
    return (
        f"dataset  {dataset.store.url}: {samples:,} train, {splits['val'].samples:,} val, "
        f"{len(dataset.manifest.classes)} classes\n"
        f"run      {options.run}: recipe {recipe.name}, {recipe.model.name}, "
        f"{recipe.schedule.epochs} epochs of "
        f"{steps} steps of {recipe.batch}, on {hardware(ranks)}"
    ) + (f"\n{turn:8} {left_out}" if left else "")


def hardware(ranks: Ranks) -> str:
    """Return what the training works on."""
    device = ranks.device
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    return f"{ranks.size} x {name}" if ranks.size > 1 else name
