"""The arithmetic of training: an optimizer step, a validation, and the state that both change.

`training/session.py` drives it; nothing here reads a clock, a store or a signal.
"""

import json
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from wds_train.checkpoint.run_manifest import Progress
from wds_train.checkpoint.scores import telling
from wds_train.checkpoint.snapshot import Snapshot
from wds_train.config.precision import Precision
from wds_train.config.recipe import DataRecipe, Recipe
from wds_train.config.schedule import average_decay, lr_share
from wds_train.errors import NotFinite, RunError, UsageError
from wds_train.global_rng import derived_randomness
from wds_train.images.normalise import Normaliser
from wds_train.loader.batch import Batch
from wds_train.loader.unreadable import UnreadableLimit
from wds_train.models.losses import Criterion, distilled
from wds_train.models.mistakes import Findings
from wds_train.models.model import Ema, create_model, create_optimizer, refuse_sizes
from wds_train.models.precision import amp_dtype, autocast
from wds_train.models.pretrained import Teacher, initialise
from wds_train.models.scoring import Predictor, metrics, sums
from wds_train.models.tensor_checks import section
from wds_train.training.mixing import Mixing
from wds_train.training.ranks import Ranks
from wds_train.training.state import copy_entries, load_optimizer

# The backend of torch.compile. Tests take one that needs no C++ compiler.
COMPILER = "inductor"


class Trainer:
    """A model in training on one device.

    A rank's batches are samples [rank * batch / size, ...) of the global ones.

    The running epoch's loss is summed on the device, and copied into `progress` only by `snapshot`:
    reading it at every step would make the CPU wait for the GPU.

    Args:
        recipe: The recipe.
        classes: The number of classes.
        steps_per_epoch: The steps that the schedule counts as an epoch.
        device: Where the model is; "meta" computes shapes alone.
        ranks: The processes that train the model together; default: this one alone.
        accumulate: Micro-batches of a rank's batch, whose gradients add up to those of the batch. A
            resume on other hardware may change it.
        precision: The floating-point format that the model computes in.
        compile: Compile the model with torch.compile.
        resumes: `restore` is to follow, so that the weights of `model.init` are not read.

    Attributes:
        notes: Lines for the user about the weights that the training begins with.
        progress: The steps and epochs so far.
        grad_norm: The gradients' norm at the newest step, before clipping, float32 on the device.

    Raises:
        UsageError: The recipe cannot work on this device, or with these ranks.
    """

    def __init__(  # noqa: PLR0913
        self,
        recipe: Recipe,
        classes: int,
        steps_per_epoch: int,
        device: torch.device,
        ranks: Ranks | None = None,
        *,
        accumulate: int = 1,
        precision: Precision = "auto",
        compile: bool = False,
        resumes: bool = False,
    ) -> None:
        self.recipe = recipe
        self.classes = classes
        self.steps_per_epoch = steps_per_epoch
        self.device = device
        self.ranks = ranks or Ranks()
        self.accumulate = accumulate
        self.precision = precision
        _set_up(recipe, device)
        self._mix = Mixing(recipe, classes, device, self.ranks.rank, self.ranks.size)
        _refuse_micro_batches(self.samples, accumulate)

        # The model, its wrappers and its teacher.
        self.model = create_model(recipe.model, classes, recipe.seed, device)
        refuse_sizes(self.model, recipe.model.name, _sides(recipe.data))
        starts_from = recipe.model.init and not resumes
        self.notes = [initialise(self.model, recipe)] if starts_from else []
        self._teacher = _make_teacher(recipe, classes, device)
        self._parallel = self.ranks.parallel(self.model)
        self._called: Callable[..., torch.Tensor] = self._parallel
        if compile:
            self._called = torch.compile(self._parallel, backend=COMPILER)

        # Its updates and its scores.
        self.ema = Ema(self.model, recipe.ema)
        self.optimizer = create_optimizer(recipe, self.model)
        self._amp = amp_dtype(device, precision)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self._amp == torch.float16)
        self.criterion = Criterion(recipe.loss)
        self.normalise = Normaliser(recipe.data, device)
        self._predictor = Predictor(device, flip=recipe.data.eval_flip, precision=precision)

        # Its progress.
        self.progress = Progress()
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.grad_norm = torch.zeros((), device=device)
        self.largest_norm = torch.zeros((), device=device)
        samples = steps_per_epoch * recipe.batch
        self.unreadable_limit = UnreadableLimit(recipe.data.max_bad, samples, "data.max_bad")

    def step(self, batch: Batch) -> torch.Tensor:
        """Make one optimizer step; return its loss, a float32 scalar on the device."""
        loss = self.gradients(batch)
        self.update(batch, loss)
        return loss

    def gradients(self, batch: Batch) -> torch.Tensor:
        """Leave the gradients of the step's loss in the parameters; return that loss, detached."""
        step = self.progress.step
        # A loader that is one step off after a resume would train on other samples, unseen.
        assert batch.step == step, f"the loader gave step {batch.step}, the trainer is at {step}"
        self._parallel.train()
        self.optimizer.zero_grad(set_to_none=True)
        labels = batch.labels.to(self.device, non_blocking=True)
        images, targets = self._mix(step, self.normalise(batch.images), labels)
        with derived_randomness(self.device, self.recipe.seed, "step", step, self.ranks.rank):
            return _backward(self, images, targets)

    def update(self, batch: Batch, loss: torch.Tensor) -> None:
        """Change the weights and their averages by the gradients of `batch`, and count the step."""
        step = self.progress.step
        lr = self.lr(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        _clip(self)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        _average(self, step)
        self.loss_sum += loss
        self.progress = _count_step(self, batch)

    def lr(self, step: int) -> float:
        """Return the learning rate of optimizer step `step`, before any layer's own `lr_scale`."""
        return self.recipe.peak_lr * lr_share(self.recipe.schedule, step, self.steps_per_epoch)

    @property
    def samples(self) -> int:
        """This rank's samples of each global batch."""
        return self.recipe.batch // self.ranks.size

    def loss(
        self, model: Callable[..., torch.Tensor], images: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """Return the mean loss on normalised images; `targets` are [n], or [n, classes]."""
        taught = None
        with autocast(self.device, self._amp):
            logits = model(images).float()
            if self._teacher is not None:
                taught = self._teacher.logits(images)
        loss = self.criterion(logits, targets)
        if taught is None:
            return loss
        return distilled(self.recipe.distill, loss, logits, taught)

    def epoch_loss(self) -> float:
        """Return the mean training loss of the epoch so far, over all ranks.

        Raises:
            NotFinite: It, or a gradient, is not finite.
            DataError: The ranks together could not read more samples than the recipe allows.
        """
        # One copy from the device for both.
        own_sum, norm = torch.stack([self.loss_sum, self.largest_norm.double()]).tolist()
        loss_sum, unreadable = self.ranks.total(own_sum, self.progress.lost)
        named = "named by the ranks that met them"
        self.unreadable_limit.check(int(unreadable), self.progress.evaluated, named)
        mean = loss_sum / self.ranks.size / max(1, self.progress.loss_steps)
        _refuse_infinite(mean, norm, self.recipe, self.progress.step)
        return mean

    def epoch_unreadable(self) -> int:
        """Return the unreadable samples of the epoch so far, of all ranks."""
        return int(self.ranks.total(self.progress.lost)[0])

    def end_epoch(self, metrics: dict[str, float]) -> None:
        """Count the epoch as validated, with these `metrics`, and reset its sums."""
        scores = telling(metrics, self.progress.step, self.recipe.ema.every)
        self.progress = self.progress.with_validation(scores)
        self.loss_sum.zero_()

    @torch.inference_mode()
    def evaluate(
        self, batches: Iterable[Batch], samples: int, found: Findings | None = None
    ) -> dict[str, float]:
        """Score the raw and the EMA weights in one pass over a validation.

        Args:
            batches: This rank's batches.
            samples: The samples of all ranks.
            found: Collects the predictions of the raw weights.

        Returns:
            Top-1 and top-5 in percent, and the mean cross-entropy; the EMA's names end in "_ema".
        """
        return _score(self, batches, samples, found)

    def snapshot(self, **noted: Any) -> Snapshot | None:
        """Copy the state, and what is `noted`, to host memory; the training may go on at once.

        All ranks take part; the leader gets the snapshot, the others None.
        """
        own_sum = self.loss_sum.item() / self.ranks.size
        loss_sum, unreadable = self.ranks.total(own_sum, self.progress.lost)
        if not self.ranks.leads:
            return None
        tensors, scalars = copy_entries(self.model, self.ema.module, self.optimizer, self.device)
        extra = json.loads(json.dumps({"scalars": scalars, "scaler": self.scaler.state_dict()}))
        if self._teacher is not None:
            extra["teacher"] = self._teacher.fingerprint
        progress = replace(self.progress, loss_sum=loss_sum, lost=int(unreadable))
        return Snapshot(tensors, extra | noted, progress)

    def restore(self, snapshot: Snapshot) -> None:
        """Take up the state of `snapshot`.

        Raises:
            RunError: It is of another model, optimizer or teacher.
        """
        _load(self, snapshot)


def _backward(trainer: Trainer, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Leave the gradients of the mean loss over `images`; return that loss, detached."""
    parts = images.tensor_split(trainer.accumulate)
    part_targets = targets.tensor_split(trainer.accumulate)
    total = torch.zeros((), device=trainer.device)
    for number, (part, target) in enumerate(zip(parts, part_targets, strict=True), start=1):
        # The ranks exchange gradients at the last micro-batch; those of the others only add up.
        exchange: AbstractContextManager[object] = nullcontext()
        if isinstance(trainer._parallel, DistributedDataParallel) and number < len(parts):
            exchange = trainer._parallel.no_sync()
        with exchange:
            # Micro-batches may differ by one sample: each counts by its share.
            loss = trainer.loss(trainer._called, part, target) * (len(part) / len(images))
            trainer.scaler.scale(loss).backward()
        total += loss.detach()
    return total


def _clip(trainer: Trainer) -> None:
    """Scale the gradients down to `clip_norm`, and keep their norm before."""
    trainer.scaler.unscale_(trainer.optimizer)
    weights = []
    gradients = []
    for weight in trainer.model.parameters():
        if weight.grad is not None:
            weights.append(weight)
            gradients.append(weight.grad)
    trainer.grad_norm = torch.nn.utils.get_total_norm(gradients)
    clip_norm = trainer.recipe.optimizer.clip_norm
    if clip_norm:
        torch.nn.utils.clip_grads_with_norm_(weights, clip_norm, trainer.grad_norm)
    # With a scaler an infinite norm is no fault: it skips the step, and tries a smaller scale.
    if not trainer.scaler.is_enabled():
        trainer.largest_norm = torch.maximum(trainer.largest_norm, trainer.grad_norm)


def _average(trainer: Trainer, step: int) -> None:
    """Bring the weights after `step` into their averages, if the recipe averages at this step."""
    total = trainer.recipe.schedule.epochs * trainer.steps_per_epoch
    decay = average_decay(trainer.recipe.ema, step, total)
    if decay is not None:
        trainer.ema.decay = decay
        trainer.ema.update(trainer.model)


def _score(
    trainer: Trainer, batches: Iterable[Batch], samples: int, found: Findings | None
) -> dict[str, float]:
    """Score the raw and the EMA weights: the body of `Trainer.evaluate`."""
    # All ranks score the leader's model: its buffers, too.
    trainer.ranks.adopt(trainer.model, trainer.ema.module)
    models = {"": trainer.model.eval(), "_ema": trainer.ema.module.eval()}
    totals = torch.zeros((len(models), 4), dtype=torch.float64, device=trainer.device)
    for batch in batches:
        pixels = trainer.normalise(batch.images)
        for row, model in enumerate(models.values()):
            logits = trainer._predictor.logits(model, pixels)
            totals[row] += sums(logits, batch)
            # The raw weights come first.
            if found is not None and row == 0:
                found.add(logits, batch)

    # Add up the sums of all ranks, and divide them by the samples.
    everywhere = torch.tensor(trainer.ranks.total(*totals.flatten().tolist()), dtype=torch.float64)
    scores: dict[str, float] = {}
    for suffix, total in zip(models, everywhere.view(len(models), 4), strict=True):
        for name, value in metrics(total, samples).items():
            scores[f"val/{name}{suffix}"] = value
    return scores


def _load(trainer: Trainer, snapshot: Snapshot) -> None:
    """Load a snapshot: the body of `Trainer.restore`."""
    if trainer._teacher is not None:
        _refuse_other_teacher(trainer.recipe, trainer._teacher, snapshot)
    try:
        trainer.model.load_state_dict(section(snapshot.tensors, "model/"))
        trainer.ema.module.load_state_dict(section(snapshot.tensors, "ema/"))
        load_optimizer(trainer.optimizer, snapshot.tensors | snapshot.extra["scalars"])
        # A checkpoint of another precision has no scale: it begins at its default.
        if trainer.scaler.is_enabled() and snapshot.extra["scaler"]:
            trainer.scaler.load_state_dict(snapshot.extra["scaler"])
    except (RuntimeError, KeyError, ValueError) as error:
        name = trainer.recipe.model.name
        raise RunError(f"the checkpoint does not fit the model {name}: {error}") from error

    # The sums of the epoch so far are those of all ranks: the leader alone carries them on. Its
    # loss is taken times the ranks, since their mean is read.
    trainer.progress = snapshot.progress
    if trainer.ranks.leads:
        trainer.loss_sum.fill_(trainer.progress.loss_sum * trainer.ranks.size)
    else:
        trainer.progress = replace(trainer.progress, lost=0)


def _make_teacher(recipe: Recipe, classes: int, device: torch.device) -> Teacher | None:
    if not recipe.distill.teacher:
        return None
    return Teacher(recipe, classes, device)


def _refuse_other_teacher(recipe: Recipe, teacher: Teacher, snapshot: Snapshot) -> None:
    if snapshot.extra.get("teacher") != teacher.fingerprint:
        raise RunError(
            f"distill.teacher = {recipe.distill.teacher!r} holds other weights than those that "
            "this run began to learn from; put the file back, or start another --run"
        )


def gpu_figures(trainer: Trainer) -> dict[str, float]:
    """Return a GPU's peak memory so far, in GB, and the loss scale of fp16; empty on a CPU."""
    if trainer.device.type != "cuda":
        return {}
    figures: dict[str, float] = {}
    if trainer.scaler.is_enabled():
        figures["gpu/amp_scale"] = trainer.scaler.get_scale()
    figures["gpu/memory_gb"] = torch.cuda.max_memory_allocated(trainer.device) / 1e9
    return figures


def _set_up(recipe: Recipe, device: torch.device) -> None:
    """Set PyTorch's global switches for a training on `device`."""
    if device.type == "cuda":
        _tune_cuda()
    if torch.are_deterministic_algorithms_enabled():
        refuse_nondeterministic(recipe, device)


def _refuse_micro_batches(samples: int, accumulate: int) -> None:
    if not 1 <= accumulate <= samples:
        raise UsageError(
            f"a rank's {samples} samples of a batch cannot be cut into {accumulate} micro-batches; "
            f"give --accumulate a divisor of {samples}"
        )


def _sides(data: DataRecipe) -> dict[str, int]:
    """Return the sides of images, in pixels, by the settings that ask for them."""
    sides = {"data.size": data.size}
    # 0: the size does not grow.
    if data.start_size:
        sides["data.start_size"] = data.start_size
    sides["data.eval_size"] = data.eval_size
    return sides


def _count_step(trainer: Trainer, batch: Batch) -> Progress:
    """Return the trainer's progress after the step on `batch`."""
    done = trainer.progress
    unreadable = done.lost + len(batch.unreadable)
    named = "; ".join(entry.named for entry in batch.unreadable)
    trainer.unreadable_limit.check(unreadable, done.evaluated, named)
    return replace(done, step=done.step + 1, loss_steps=done.loss_steps + 1, lost=unreadable)


def _refuse_infinite(loss: float, norm: float, recipe: Recipe, step: int) -> None:
    """Raise `NotFinite` when the mean loss, or the largest norm of the gradients, is not finite."""
    optimizer = recipe.optimizer
    at = f"by step {step}"
    remedy = f"lower optimizer.lr (now {optimizer.lr})"
    if not math.isfinite(loss):
        raise NotFinite(
            f"the training loss is {loss} {at}; {remedy} or lengthen schedule.warmup_epochs, under "
            "another --run"
        )
    if not math.isfinite(norm):
        raise NotFinite(
            f"the norm of the gradients is {norm} {at}, with a mean loss of {loss:.4g}; {remedy} "
            f"or set optimizer.clip_norm (now {optimizer.clip_norm}), under another --run"
        )


def refuse_nondeterministic(recipe: Recipe, device: torch.device) -> None:
    """Raise `UsageError` for a model that PyTorch would only refuse in the middle of a step."""
    if recipe.model.blur_pool and device.type == "cuda":
        raise UsageError(
            "--deterministic cannot work with model.blur_pool = True on a GPU: PyTorch has no "
            "deterministic gradient of the padding by reflection before it; leave out "
            "--deterministic, or --set model.blur_pool=false under another --run"
        )


def _tune_cuda() -> None:
    """Choose speed on the GPU: cuDNN's fastest algorithms, and TF32.

    cuDNN tries its algorithms on every new size; the fastest need not be the same the next time.
    TF32 is for the operations that autocast leaves in float32.
    """
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
