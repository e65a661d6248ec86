"""`wds-train train --dry-run`: the time and memory of a training, measured on this machine.

Nothing is claimed. The store is proved, as by a claim, and the probes are removed again.
"""

import itertools
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from wds_train.config.settings import with_settings
from wds_train.console import dollars, duration, note, say
from wds_train.dataset.reader import Dataset
from wds_train.errors import UsageError
from wds_train.loader.batch import Batch
from wds_train.loader.mixture import check_same_classes
from wds_train.loader.workers import limit_threads
from wds_train.machine import memory
from wds_train.storage.open import open_store
from wds_train.storage.proof import PROBES, prove
from wds_train.training.engine import Trainer
from wds_train.training.memory import fit_accumulation
from wds_train.training.options import TrainOptions
from wds_train.training.ranks import Ranks
from wds_train.training.setup import (
    describe_training,
    epoch_steps,
    expected_pace,
    fresh_run,
    make_train_loader,
    make_trainer,
    refuse,
)

# Steps that are measured, after one that sets up memory and kernels.
MEASURED = 2
# Samples of those steps on a CPU, whose time and memory grow with them; 1,024 would take minutes.
CPU_BATCH = 32
# Seconds. A longer training on a CPU gets the advice of a smaller one.
TOO_LONG = 2 * 3600.0
# Models and sides of images to advise, from the best to the fastest.
SMALLER = (
    ("resnet18", 160),
    ("resnet18", 128),
    ("mobilenetv3_small_100", 128),
    ("mobilenetv3_small_100", 96),
)


@dataclass(frozen=True)
class Cost:
    """The cost of a training: seconds of a step, of a validation and of all of it; peak bytes."""

    step: float
    validation: float
    whole: float
    memory: float


class Estimate:
    """The time and memory that a training would take, measured on this machine.

    The loader and the trainer are measured one after the other: on a CPU they share its cores, and
    their times add up.

    Args:
        options: The training.
    """

    def __init__(self, options: TrainOptions) -> None:
        self.options = options
        self.ranks = Ranks(cpu=options.cpu)
        self.on_cpu = self.ranks.device.type == "cpu"
        first = Dataset.open(options.dataset)
        self.datasets = [first]
        for url, _ in options.mix:
            self.datasets.append(check_same_classes(Dataset.open(url), first))

        # The batch that is measured, and the steps of it that make up one of the training.
        batch = options.recipe.batch
        repeats = options.recipe.data.repeats
        if self.on_cpu:
            self.processes = 1
            self.batch = min(batch, CPU_BATCH * repeats)
        else:
            self.processes = torch.cuda.device_count()
            self.batch = batch // self.processes
        self.share = batch / (self.batch * self.processes)
        self.small = replace(options, recipe=replace(options.recipe, batch=self.batch))

    def read(self) -> tuple[list[Batch], float]:
        """Read the last batches of the training, which are of its largest images.

        It forks: call it before a trainer is made.

        Returns:
            The batches, and the seconds that the loader takes for one.
        """
        # Without the cache: it would measure this machine's disk, and leave files on it.
        total = self.options.recipe.schedule.epochs * epoch_steps(self.small, self.datasets)
        uncached = replace(self.small, cache_dir=None)
        from_step = max(0, total - MEASURED - 1)
        loader = make_train_loader(uncached, self.datasets, self.ranks, from_step)
        loader.start()

        # From the first batch on: before it the workers start.
        batches = []
        began = 0.0
        for batch in loader:
            began = began or time.perf_counter()
            batches.append(batch)
        return batches, (time.perf_counter() - began) / max(1, len(batches) - 1)

    def cost(self, options: TrainOptions, batches: list[Batch], loading: float) -> Cost:
        """Measure the cost of a training.

        Args:
            options: The training: `small`, or one of another model.
            batches: The batches to work on.
            loading: The seconds that the loader takes for each.
        """
        # Measure its steps and a batch of its validation.
        trainer = make_trainer(options, self.datasets, self.ranks.device, self.ranks, resumes=True)
        if not self.on_cpu and options.accumulate is None:
            trainer.accumulate = fit_accumulation(trainer)
        made = self._memory()
        worked = _seconds(_steps(trainer, batches))
        data = options.recipe.data
        samples = self.datasets[0].manifest.split("val").samples
        shape = (len(batches[0].ids), data.eval_size, data.eval_size, 3)
        blank = torch.zeros(shape, dtype=torch.uint8)
        scored = _seconds(_scores(trainer, replace(batches[0], images=blank)))

        # Project them on the whole training.
        step = self._with_loading(worked, loading) * self.share
        scored = self._with_loading(scored, loading)
        validation = scored * samples / self.batch / self.processes
        pace = expected_pace(self.options, self.datasets)
        whole = step * sum(pace.costs) * pace.epoch_steps + validation * len(pace.costs)

        # On a CPU the memory of activations grows with the batch, too; a GPU had a whole one.
        grown = self._memory() - made
        if self.on_cpu:
            grown *= self.share
        return Cost(step, validation, whole, made + grown)

    def smaller(self, batches: list[Batch], loading: float) -> str:
        """Return the first of SMALLER that would not take too long, or the last, as a line."""
        said = ""
        for name, side in SMALLER:
            if side > self.small.recipe.data.size:
                continue
            settings = [
                f"model.name={name}",
                "data.start_size=0",
                f"data.size={side}",
                f"data.eval_size={side}",
            ]
            # The same batches with smaller images: decoding is not measured once more.
            blank = torch.zeros(self.batch, side, side, 3, dtype=torch.uint8)
            same = [replace(batch, images=blank) for batch in batches]
            try:
                recipe = with_settings(self.small.recipe, settings)
                cost = self.cost(replace(self.small, recipe=recipe), same, loading)
            except UsageError:
                # The recipe has an option that this model does not know.
                continue
            said = f"instead  about {duration(cost.whole)} with --set " + " --set ".join(settings)
            if cost.whole <= TOO_LONG:
                break
        return said

    def room(self) -> float:
        """Return the bytes of memory of the device."""
        if self.on_cpu:
            return float(memory())
        return float(torch.cuda.get_device_properties(self.ranks.device).total_memory)

    def _with_loading(self, worked: float, loading: float) -> float:
        """Return the seconds of a batch that is loaded and worked on.

        On a CPU both share the cores, and add up; next to a GPU they overlap.
        """
        if self.on_cpu:
            return worked + loading
        return max(worked, loading)

    def _memory(self) -> float:
        """Return the peak of the memory so far, in bytes."""
        if self.on_cpu:
            # Linux counts it in KiB.
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
        return float(torch.cuda.max_memory_allocated(self.ranks.device))


def estimate(options: TrainOptions) -> list[str]:
    """Estimate the time and memory of a training; return the lines for the user.

    Where it takes too long on a CPU, a line names a smaller training.

    Raises:
        WdsTrainError: As the training itself, before its first step.
    """
    # Refuse what the training would refuse.
    limit_threads()
    this = Estimate(options)
    store = open_store(options.run)
    refuse(options, this.datasets, fresh_run(options, this.datasets), store, this.ranks)
    prove(store, PROBES, say, unsafe=options.unsafe_store)

    # Measure. The loader forks, so it comes before the trainer.
    note("measuring two steps ...")
    batches, loading = this.read()
    cost = this.cost(this.small, batches, loading)

    # Describe the result.
    steps = epoch_steps(options, this.datasets)
    epochs = options.recipe.schedule.epochs
    of = f", from {MEASURED} of them"
    if this.share != 1:
        of = f", from {MEASURED} of batches of {this.batch}"
    paid = ""
    if options.price is not None:
        paid = f", {dollars(options.price * cost.whole / 3600)}"
    too_much = ""
    if cost.memory > this.room():
        too_much = ": too much; --accumulate N works on an Nth of a batch at a time"

    lines = [
        describe_training(options, this.datasets[0], steps, this.ranks),
        f"steps    {steps * epochs:,} of {_exact(cost.step)}{of}; {epochs} validations of "
        f"{_exact(cost.validation)}",
        f"time     about {duration(cost.whole)}{paid}",
        f"memory   about {cost.memory / 1e9:.1f} GB of {this.room() / 1e9:.1f}{too_much}",
    ]
    if this.on_cpu and cost.whole > TOO_LONG:
        smaller = this.smaller(batches, loading)
        if smaller:
            lines.append(smaller)
    return lines


def _exact(seconds: float) -> str:
    """Return a time in words, with two digits where it is short."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    return duration(seconds)


def _steps(trainer: Trainer, batches: list[Batch]) -> Iterator[object]:
    """Take one step for each item that is asked for."""
    for batch in itertools.islice(itertools.cycle(batches), MEASURED + 1):
        loss = trainer.step(replace(batch, step=trainer.progress.step))
        # Reading the loss waits for the GPU.
        yield loss.item()


def _scores(trainer: Trainer, batch: Batch) -> Iterator[object]:
    """Validate on one batch for each item that is asked for."""
    for _ in range(2):
        yield trainer.evaluate([batch], len(batch.ids))


def _seconds(work: Iterator[object]) -> float:
    """Return the mean seconds of the pieces of `work`, without the first, which warms up."""
    next(work)
    began = time.perf_counter()
    pieces = len(list(work))
    return (time.perf_counter() - began) / pieces
