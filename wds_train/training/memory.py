"""The number of micro-batches with which a batch fits in the device's memory.

A training on a GPU without --accumulate calls it before its first step, and so does `--dry-run`.
"""

import torch

from wds_train.errors import RunError
from wds_train.training.engine import Trainer


def fit_accumulation(trainer: Trainer) -> int:
    """Return the number of micro-batches with which a batch of `trainer` fits in memory.

    It is the trainer's own `accumulate`, doubled until a forward and backward pass over a
    micro-batch of the largest images fits. The trainer and all generators stay as they are.

    The bare model is tried: no other rank has to take part, and the ranks may need different
    numbers.

    Raises:
        RunError: A single sample does not fit.
    """
    accumulate = trainer.accumulate
    while True:
        # The largest micro-batch: rounded up.
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
    """Return True if a pass over so many samples fits."""
    model = trainer.model
    side = trainer.recipe.data.size
    on_gpu = trainer.device.type == "cuda"

    # Try it. Buffers (as those of BatchNorm) and generators change, and are put back.
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    was_training = model.training
    model.train()
    devices: list[torch.device] = []
    if on_gpu:
        devices = [trainer.device]
    try:
        with torch.random.fork_rng(devices):
            _pass_over(trainer, samples, side)
    except torch.OutOfMemoryError:
        # Not handled here: the exception refers to tensors, which would still be in memory.
        fits = False
    else:
        fits = True

    # Put all back.
    model.train(was_training)
    trainer.optimizer.zero_grad(set_to_none=True)
    for buffer, before in buffers:
        buffer.copy_(before)
    # PyTorch keeps pieces of the failed size, which would be in the way of the next.
    if not fits and on_gpu:
        torch.cuda.empty_cache()
    return fits


def _pass_over(trainer: Trainer, samples: int, side: int) -> None:
    """Take a forward and a backward pass, with all in memory that a step has there."""
    # The optimizer's state, which its first step makes: two copies of the weights, as Adam's.
    reserved = []
    if not trainer.optimizer.state:
        for weight in trainer.model.parameters():
            reserved.append(torch.empty_like(weight))
            reserved.append(torch.empty_like(weight))
    # The pixels of the whole batch: normalised, as float32, and as they came, uint8. The next
    # batch is copied ahead.
    pixels = trainer.samples * side * side * 3
    reserved.append(torch.empty(pixels, device=trainer.device))
    reserved.append(torch.empty(2 * pixels, dtype=torch.uint8, device=trainer.device))
    images = torch.zeros(samples, side, side, 3, dtype=torch.uint8)
    labels = torch.zeros(samples, dtype=torch.int64, device=trainer.device)
    trainer.loss(trainer.model, trainer.normalise(images), labels).backward()
    del reserved
