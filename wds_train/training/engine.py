"""The arithmetic of training: one optimizer step, one validation, and the state that both leave behind."""

import contextlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
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
from wds_train.training.state import entries_of, load_optimizer, on_host

COMPILER = "inductor"  # of torch.compile


@dataclass
class Trainer:
    """A model in training on one device; a rank's batches are samples [rank * batch / size, ...) of the global ones.
    `steps_per_epoch` is what the schedule counts epochs by. A batch is worked on in `accumulate` micro-batches, whose
    gradients add up to its own; a resume on other hardware may change that. With `resumes`, `restore` is to follow, and
    the weights of `model.init` are not read. `notes` is what to tell the user of how the model was made.

    The running epoch's loss is summed on the device, and copied into `progress` only by `snapshot`: reading it at every
    step would make the CPU wait for the GPU.
    """

    recipe: Recipe
    classes: int
    steps_per_epoch: int
    device: torch.device
    ranks: Ranks = field(default_factory=Ranks)
    accumulate: int = 1
    precision: Precision = "auto"
    compile: bool = False
    resumes: bool = False

    def __post_init__(self) -> None:
        if self.device.type == "cuda":
            _tune_cuda()
        if torch.are_deterministic_algorithms_enabled():
            refuse_nondeterministic(self.recipe, self.device)
        self._mix = Mixing(self.recipe, self.classes, self.device, self.ranks.rank, self.ranks.size)
        if not 1 <= self.accumulate <= self.samples:
            raise UsageError(
                f"a rank's {self.samples} samples of a batch cannot be cut into {self.accumulate} micro-batches; "
                f"give --accumulate a divisor of {self.samples}"
            )
        self.model = create_model(self.recipe.model, self.classes, self.recipe.seed, self.device)
        refuse_sizes(self.model, self.recipe.model.name, _sides(self.recipe.data))
        self.notes = [initialise(self.model, self.recipe)] if self.recipe.model.init and not self.resumes else []
        self._teacher = Teacher(self.recipe, self.classes, self.device) if self.recipe.distill.teacher else None
        self._parallel = self.ranks.parallel(self.model)
        self._called: Callable[..., torch.Tensor] = self._parallel
        if self.compile:
            self._called = torch.compile(self._parallel, backend=COMPILER)
        self.ema = Ema(self.model, self.recipe.ema)
        self.optimizer = create_optimizer(self.recipe, self.model)
        self._amp = amp_dtype(self.device, self.precision)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self._amp == torch.float16)
        self.criterion = Criterion(self.recipe.loss)
        self.normalise = Normaliser(self.recipe.data, self.device)
        self._predictor = Predictor(self.device, flip=self.recipe.data.eval_flip, precision=self.precision)
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.grad_norm = torch.zeros((), device=self.device)
        self.largest_norm = torch.zeros((), device=self.device)
        self.progress = Progress()
        samples = self.steps_per_epoch * self.recipe.batch
        self.unreadable_limit = UnreadableLimit(self.recipe.data.max_bad, samples, "data.max_bad")

    def step(self, batch: Batch) -> torch.Tensor:
        """Make one optimizer step; its loss, a float32 scalar on the device."""
        loss = self.gradients(batch)
        self.update(batch, loss)
        return loss

    def gradients(self, batch: Batch) -> torch.Tensor:
        """Leave the gradients of the step's loss in the parameters; return that loss, detached."""
        step = self.progress.step
        assert batch.step == step, f"the loader gave step {batch.step}, the trainer is at {step}"
        self._parallel.train()
        self.optimizer.zero_grad(set_to_none=True)
        labels = batch.labels.to(self.device, non_blocking=True)
        images, targets = self._mix(step, self.normalise(batch.images), labels)
        with derived_randomness(self.device, self.recipe.seed, "step", step, self.ranks.rank):
            return self._backward(images, targets)

    def update(self, batch: Batch, loss: torch.Tensor) -> None:
        """Change the weights and their averages by the gradients of `batch`, and count the step."""
        step = self.progress.step
        lr = self.lr(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        self._clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        decay = average_decay(self.recipe.ema, step, self.recipe.schedule.epochs * self.steps_per_epoch)
        if decay is not None:
            self.ema.decay = decay
            self.ema.update(self.model)
        self.loss_sum += loss
        self.progress = _counted(self, batch)

    def lr(self, step: int) -> float:
        """The learning rate of optimizer step `step`, before any layer's own `lr_scale`."""
        return self.recipe.peak_lr * lr_share(self.recipe.schedule, step, self.steps_per_epoch)

    @property
    def samples(self) -> int:
        """How many samples of each global batch are this rank's."""
        return self.recipe.batch // self.ranks.size

    def _backward(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Leave the gradients of the mean loss over `images` in the parameters; that loss, detached."""
        micros = list(zip(images.tensor_split(self.accumulate), targets.tensor_split(self.accumulate), strict=True))
        total = torch.zeros((), device=self.device)
        for number, (part, target) in enumerate(micros, start=1):
            # The ranks exchange gradients at the last alone; those of the others are only added up.
            ranks = self._parallel if isinstance(self._parallel, DistributedDataParallel) else None
            with ranks.no_sync() if ranks and number < len(micros) else contextlib.nullcontext():
                loss = self.loss(self._called, part, target) * (len(part) / len(images))
                self.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def loss(self, model: Callable[..., torch.Tensor], images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean loss of `model`, which is this trainer's, on normalised images."""
        with autocast(self.device, self._amp):
            logits = model(images).float()
            taught = None if self._teacher is None else self._teacher.logits(images)
        loss = self.criterion(logits, targets)
        return loss if taught is None else distilled(self.recipe.distill, loss, logits, taught)

    def _clip(self) -> None:
        """Scale the gradients down to `clip_norm`. `grad_norm` is their norm before, float32 on the device."""
        self.scaler.unscale_(self.optimizer)
        weights = [weight for weight in self.model.parameters() if weight.grad is not None]
        self.grad_norm = torch.nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
        if self.recipe.optimizer.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(weights, self.recipe.optimizer.clip_norm, self.grad_norm)
        if not self.scaler.is_enabled():  # a scaler skips the step, and tries a smaller scale
            self.largest_norm = torch.maximum(self.largest_norm, self.grad_norm)

    def epoch_loss(self) -> float:
        """Mean training loss of the epoch so far, over all ranks; `NotFinite` when it, or a gradient, is not; `DataError`
        when the ranks together could not read more samples than the recipe allows.
        """
        # One copy from the device for both.
        loss_sum, norm = torch.stack([self.loss_sum, self.largest_norm.double()]).tolist()
        loss_sum, unreadable = self.ranks.total(loss_sum, self.progress.lost)
        self.unreadable_limit.check(int(unreadable), self.progress.evaluated, "named by the ranks that met them")
        mean = loss_sum / self.ranks.size / max(1, self.progress.loss_steps)
        _refuse_infinite(mean, norm, self.recipe, self.progress.step)
        return mean

    def epoch_unreadable(self) -> int:
        """The unreadable samples of the epoch so far, of all ranks."""
        return int(self.ranks.total(self.progress.lost)[0])

    def evaluated(self, metrics: dict[str, float]) -> None:
        """Count the epoch as validated, which gave `metrics`, and begin its sums anew."""
        self.progress = self.progress.validated(telling(metrics, self.progress.step, self.recipe.ema.every))
        self.loss_sum.zero_()

    @torch.inference_mode()
    def evaluate(self, batches: Iterable[Batch], samples: int, found: Findings | None = None) -> dict[str, float]:
        """Top-1, top-5 in percent and mean cross-entropy, of raw and EMA weights, over one pass; `found`: by the raw."""
        self.ranks.adopt(self.model, self.ema.module)
        models = {"": self.model.eval(), "_ema": self.ema.module.eval()}
        totals = torch.zeros((len(models), 4), dtype=torch.float64, device=self.device)
        for batch in batches:
            pixels = self.normalise(batch.images)
            logits = [self._predictor.logits(model, pixels) for model in models.values()]
            totals += torch.stack([sums(each, batch) for each in logits])
            if found is not None:
                found.add(logits[0], batch)
        everywhere = torch.tensor(self.ranks.total(*totals.flatten().tolist()), dtype=torch.float64)
        scored = zip(models, everywhere.view(len(models), 4), strict=True)
        return {f"val/{n}{suffix}": value for suffix, total in scored for n, value in metrics(total, samples).items()}

    def snapshot(self, **noted: Any) -> Snapshot | None:
        """A copy of the state in host memory, with what is `noted` beside it; training may go on at once. All ranks take
        part, the leader gets it.
        """
        loss_sum, unreadable = self.ranks.total(self.loss_sum.item() / self.ranks.size, self.progress.lost)
        if not self.ranks.leads:
            return None
        entries = entries_of(self.model, self.ema.module, self.optimizer)
        # A copy of each on its own: safetensors refuses views and shared storage, and the training goes on writing.
        tensors = {name: on_host(value) for name, value in entries.items() if torch.is_tensor(value)}
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        # A dtype among a group's settings (timm's Adafactor) is the optimizer's own, as it was made.
        scalars = {n: value for n, value in entries.items() if n not in tensors and not isinstance(value, torch.dtype)}
        extra = json.loads(json.dumps({"scalars": scalars, "scaler": self.scaler.state_dict()}))
        if self._teacher is not None:
            extra["teacher"] = self._teacher.fingerprint
        return Snapshot(tensors, extra | noted, replace(self.progress, loss_sum=loss_sum, lost=int(unreadable)))

    def restore(self, snapshot: Snapshot) -> None:
        """Become what `snapshot` holds; `RunError` when it is of another model, optimizer or teacher."""
        if self._teacher is not None and snapshot.extra.get("teacher") != self._teacher.fingerprint:
            raise RunError(
                f"distill.teacher = {self.recipe.distill.teacher!r} holds other weights than those that this run began to "
                "learn from; put the file back, or start another --run"
            )
        try:
            self.model.load_state_dict(section(snapshot.tensors, "model/"))
            self.ema.module.load_state_dict(section(snapshot.tensors, "ema/"))
            load_optimizer(self.optimizer, snapshot.tensors | snapshot.extra["scalars"])
            if self.scaler.is_enabled() and snapshot.extra["scaler"]:  # empty after another precision: a scale anew
                self.scaler.load_state_dict(snapshot.extra["scaler"])
        except (RuntimeError, KeyError, ValueError) as error:
            raise RunError(f"the checkpoint does not fit the model {self.recipe.model.name}: {error}") from error
        self.progress = snapshot.progress
        if self.ranks.leads:
            self.loss_sum.fill_(self.progress.loss_sum * self.ranks.size)  # the mean over the ranks stays what it was
        else:
            self.progress = replace(self.progress, lost=0)


def gpu_figures(trainer: Trainer) -> dict[str, float]:
    """With a GPU, the most memory that was in use so far; with fp16, what losses are multiplied by."""
    if trainer.device.type != "cuda":
        return {}
    scale = {"gpu/amp_scale": trainer.scaler.get_scale()} if trainer.scaler.is_enabled() else {}
    return scale | {"gpu/memory_gb": torch.cuda.max_memory_allocated(trainer.device) / 1e9}


def _sides(data: DataRecipe) -> dict[str, int]:
    """The sides of images, in pixels, by the settings that ask for them."""
    names = ("size", "start_size", "eval_size")
    return {f"data.{name}": getattr(data, name) for name in names if getattr(data, name)}


def _counted(trainer: Trainer, batch: Batch) -> Progress:
    """Return the trainer's progress with the step of `batch` in it."""
    done = trainer.progress
    unreadable = done.lost + len(batch.unreadable)
    named = "; ".join(entry.named for entry in batch.unreadable)
    trainer.unreadable_limit.check(unreadable, done.evaluated, named)
    return replace(done, step=done.step + 1, loss_steps=done.loss_steps + 1, lost=unreadable)


def _refuse_infinite(loss: float, norm: float, recipe: Recipe, step: int) -> None:
    """Raise `NotFinite` when the mean loss, or the largest norm of the gradients, is not finite."""
    optimizer, at = recipe.optimizer, f"by step {step}"
    remedy = f"lower optimizer.lr (now {optimizer.lr})"
    if not math.isfinite(loss):
        raise NotFinite(
            f"the training loss is {loss} {at}; {remedy} or lengthen schedule.warmup_epochs, under another --run"
        )
    if not math.isfinite(norm):
        raise NotFinite(
            f"the norm of the gradients is {norm} {at}, with a mean loss of {loss:.4g}; {remedy} or set "
            f"optimizer.clip_norm (now {optimizer.clip_norm}), under another --run"
        )


def refuse_nondeterministic(recipe: Recipe, device: torch.device) -> None:
    """Raise `UsageError` for what PyTorch would only refuse in the midst of the first step."""
    if recipe.model.blur_pool and device.type == "cuda":
        raise UsageError(
            "--deterministic cannot work with model.blur_pool = True on a GPU: PyTorch has no deterministic gradient of the "
            "padding by reflection before it; leave out --deterministic, or --set model.blur_pool=false under another --run"
        )


def _tune_cuda() -> None:
    """Let cuDNN try its algorithms on every new size and keep the fastest, which need not be the same the next time;
    and use TF32 for what autocast leaves in float32.
    """
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
