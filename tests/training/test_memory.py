"""Micro-batches: their gradients add up to the batch's; the memory decides their number."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_engine import assert_same_state, batch, trainer
from torch import nn

from wds_train.errors import RunError, UsageError
from wds_train.training.engine import Trainer
from wds_train.training.memory import fit_accumulation
from wds_train.training.ranks import Ranks

LAYERNORM = ("model.name=test_convnext", "data.erasing=0.5")  # BatchNorm sees the micro-batch alone


def gradients(running: Trainer) -> dict[str, torch.Tensor]:
    running.step(batch(0))
    return {
        name: weight.grad
        for name, weight in running.model.named_parameters()
        if weight.grad is not None
    }


@pytest.mark.parametrize("accumulate", [2, 3, 8])
def test_gradients_add_up(accumulate: int) -> None:
    """3 leaves unequal micro-batches: 3, 3 and 2 samples."""
    whole = trainer(*LAYERNORM)
    parts = trainer(*LAYERNORM)
    parts.accumulate = accumulate
    expected = gradients(whole)
    got = gradients(parts)
    assert expected.keys() == got.keys() != set()
    for name, value in expected.items():
        assert torch.allclose(got[name], value, rtol=1e-4, atol=1e-6), name
    assert parts.epoch_loss() == pytest.approx(whole.epoch_loss(), rel=1e-5)


class _Small:
    """A memory that holds `most` samples at a time, as the model's first layer finds out."""

    def __init__(self, model: nn.Module, most: int) -> None:
        self.most = most
        self.asked = list[int]()
        model.register_forward_pre_hook(self._fill)

    def _fill(self, _model: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        self.asked.append(len(inputs[0]))
        if len(inputs[0]) > self.most:
            raise torch.OutOfMemoryError


@pytest.mark.parametrize(
    ("most", "asked", "accumulate", "name"),
    [
        (8, [8], 1, "test_resnet"),
        (3, [8, 4, 2], 4, "test_resnet"),
        (1, [8, 4, 2, 1], 8, "test_convnext"),
    ],
)
def test_as_many_as_the_memory_needs(
    most: int, asked: list[int], accumulate: int, name: str
) -> None:
    settings = (f"model.name={name}", "model.drop_path=0.2")
    running = trainer(*settings)
    untouched = trainer(*settings)
    memory = _Small(running.model, most)
    generator = torch.get_rng_state()
    assert (fit_accumulation(running), running.accumulate) == (accumulate, 1)
    assert memory.asked == asked
    assert torch.equal(torch.get_rng_state(), generator)
    assert_same_state(running, untouched)
    assert all(weight.grad is None for weight in running.model.parameters())
    running.accumulate = untouched.accumulate = accumulate
    running.step(batch(0))
    untouched.step(batch(0))
    assert_same_state(running, untouched)


def test_one_sample_that_does_not_fit_is_an_error() -> None:
    running = trainer()
    _Small(running.model, 0)
    with pytest.raises(
        RunError,
        match=r"test_resnet on a single image of 32 pixels does not fit .* lower data.size",
    ):
        fit_accumulation(running)


def test_more_micro_batches_than_samples_are_refused() -> None:
    with pytest.raises(UsageError, match="8 samples of a batch cannot be cut into 9"):
        Trainer(trainer().recipe, 10, 10, torch.device("cpu"), accumulate=9)


def test_ranks_add_up_to_the_whole_batch() -> None:
    """Two ranks' mean gradient is that of one rank with all samples."""
    settings = (*LAYERNORM, "batch=16")
    given = batch(0), batch(1)
    whole = trainer(*settings)
    both = type(given[0])(
        0, *(np.concatenate(pair) for pair in ((given[0].ids, given[1].ids),) * 2),
        torch.cat([each.images for each in given]), torch.cat([each.labels for each in given]),
    )  # fmt: skip
    whole.step(both)
    ranks = [Trainer(whole.recipe, 10, 10, whole.device, Ranks(rank, 2)) for rank in (0, 1)]
    for rank, part in zip(ranks, given, strict=True):
        rank.step(replace(part, step=0))
    for name, weight in whole.model.named_parameters():
        parts = [rank.model.get_parameter(name).grad for rank in ranks]
        assert torch.allclose((parts[0] + parts[1]) / 2, weight.grad, rtol=1e-4, atol=1e-6), name
