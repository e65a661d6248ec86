"""The number of micro-batches with which a batch fits in the device's memory."""

import torch

from wds_train.errors import RunError
from wds_train.training.engine import Trainer


def fit_accumulation(trainer: Trainer) -> int:
    """Return the number of micro-batches with which a batch of `trainer` fits in memory.

    It is the trainer's own `accumulate`, doubled until a forward and backward pass over a
    micro-batch of the largest images fits. Nothing of the trainer or of any generator changes.

    Uses the bare model: no other rank has to take part, and what one needs may differ from the
    others.

    Raises:
        RunError: A single sample does not fit.
    """
    accumulate = trainer.accumulate
    while True:
        micro = -(-trainer.samples // accumulate)
        if _fits(trainer, micro):
            return accumulate
        if micro == 1:
            recipe = trainer.recipe
            raise RunError(
                f"a training step of {recipe.model.name} on a single image of {recipe.data.size} "
                f"pixels does not fit in the memory of {trainer.device}; lower data.size, choose a "
                "smaller model, or a device with more memory"
            )
        accumulate = min(trainer.samples, 2 * accumulate)


def _fits(trainer: Trainer, samples: int) -> bool:
    model = trainer.model
    side = trainer.recipe.data.size
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    was_training = model.training
    model.train()
    try:
        with torch.random.fork_rng([trainer.device] if trainer.device.type == "cuda" else []):
            _pass_over(trainer, samples, side)
    except torch.OutOfMemoryError:
        fits = False  # not handled here: what the exception refers to would still be in memory
    else:
        fits = True
    model.train(was_training)
    trainer.optimizer.zero_grad(set_to_none=True)
    for buffer, before in buffers:
        buffer.copy_(before)
    if not fits and trainer.device.type == "cuda":
        torch.cuda.empty_cache()  # pieces of the failed size would be in the way of the next
    return fits


def _pass_over(trainer: Trainer, samples: int, side: int) -> None:
    weights = list(trainer.model.parameters())
    # Room for what the optimizer will hold, which comes into being with the first step: two copies,
    # as Adam's.
    reserved = (
        []
        if trainer.optimizer.state
        else [torch.empty_like(weight) for weight in weights for _ in range(2)]
    )
    # And for the pixels of the whole batch, and of the next one, which is copied ahead.
    pixels = trainer.samples * side * side * 3
    reserved += [torch.empty(pixels, device=trainer.device)]
    reserved += [torch.empty(2 * pixels, dtype=torch.uint8, device=trainer.device)]
    images = torch.zeros(samples, side, side, 3, dtype=torch.uint8)
    labels = torch.zeros(samples, dtype=torch.int64, device=trainer.device)
    trainer.loss(trainer.model, trainer.normalise(images), labels).backward()
    del reserved
