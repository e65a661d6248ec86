"""Samples beyond images: tars of stock webdataset, indexed where they lie, and what their members hold."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wds_train import DataError, Dataset, EvalLoader, SampleLoader, TrainLoader
from wds_train.cli import main
from wds_train.errors import UsageError


def of_number(fields: dict[str, bytes], key: str, rng: np.random.Generator) -> Any:
    return key, fields["txt"].decode(), float(rng.random())


@pytest.mark.parametrize("workers", [0, 2])
def test_members_come_as_they_were_written(captioned: str, workers: int) -> None:
    loader = SampleLoader(captioned, 8, epochs=1, workers=workers)
    keys: list[str] = []
    for samples in loader:
        keys += samples.keys
        for key, label, fields in zip(
            samples.keys, samples.labels.tolist(), samples.fields, strict=True
        ):
            assert [*fields] == ["cls", "npy", "png", "txt"]
            assert (fields["txt"].decode(), int(fields["cls"])) == (f"number {int(key)}", label)
            assert fields["npy"].startswith(b"\x93NUMPY")
            assert len(fields["npy"]) == 128 + 8 * int(key)
    assert sorted(keys) == [f"{number:04d}" for number in range(40)]


def test_the_order_and_state_are_those_of_images(captioned: str) -> None:
    images = TrainLoader(captioned, 8, epochs=2, size=8, workers=0, flip=0)
    captions = SampleLoader(
        captioned, 8, epochs=2, fields=(".TXT",), transform=of_number, workers=2
    )
    (first, *rest), shown = list(captions), list(images)
    assert [each.ids.tolist() for each in (first, *rest)] == [batch.ids.tolist() for batch in shown]
    assert first.fields[0][:2] == (first.keys[0], f"number {int(first.keys[0])}")
    images.step = 7
    late = SampleLoader(captioned, 8, epochs=2, transform=of_number, workers=0, rank=1, world=2)
    late.load_state_dict(images.state_dict())
    assert [each.fields for each in late] == [each.fields[4:] for each in rest[6:]]
    mixed = list(
        SampleLoader(
            captioned, 16, epochs=1, mix=[(captioned, 0.5)], transform=of_number, workers=0
        )
    )
    for each in mixed:
        assert (len(each.fields), [value[0] for value in each.fields]) == (16, each.keys)
        assert [int(key) % 4 for key in each.keys] == each.labels.tolist()


def test_a_member_that_is_not_there(captioned: str) -> None:
    samples = next(
        iter(SampleLoader(captioned, 8, epochs=1, fields=("txt", "wav"), workers=0, max_bad=1))
    )
    assert samples.fields == [None] * 8
    assert {entry.cause for entry in samples.unreadable} == {
        "it has no member .wav, only .cls, .npy, .png, .txt"
    }
    with pytest.raises(DataError, match="1 of the 40 samples of epoch 0 could not be read"):
        next(iter(SampleLoader(captioned, 8, epochs=1, fields=("txt", "wav"), workers=0)))
    with pytest.raises(UsageError, match=r"fields = 'txt' is one text; write fields=\('txt',\)"):
        SampleLoader(captioned, 8, epochs=1, fields="txt")


def test_a_function_is_watched_here_too(captioned: str) -> None:
    def draws(fields: dict[str, bytes], key: str, rng: np.random.Generator) -> float:
        return np.random.random()

    for transform, message in (
        (draws, "numpy.random"),
        (lambda *_: {}["x"], "failed on part-.*: KeyError: 'x'"),
    ):
        with pytest.raises(UsageError, match=message):
            list(SampleLoader(captioned, 8, epochs=1, transform=transform, workers=1))


@pytest.mark.parametrize(
    "made",
    [lambda: 0, threading.Lock(), (each for each in "x")],
    ids=lambda each: type(each).__name__,
)
def test_what_a_worker_cannot_send_is_refused(captioned: str, made: Any) -> None:
    """The loop would wait for it for ever."""
    refusal = rf"returned a {type(made).__name__} for part-.*, key \d+, which a worker cannot send .* or use workers=0"
    with pytest.raises(UsageError, match=refusal):
        list(SampleLoader(captioned, 8, epochs=1, transform=lambda *_: made, workers=1))
    assert (
        next(
            iter(SampleLoader(captioned, 8, epochs=1, transform=lambda *_: made, workers=0))
        ).fields
        == [made] * 8
    )


def test_tars_without_images(
    sounds: Path, captioned: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["shards", "index", str(sounds)]) == 1
    assert (
        "hold no samples with an image and a label; --any indexes samples without images"
        in capsys.readouterr().err
    )
    assert main(["shards", "index", str(sounds), "--any"]) == 0
    (samples,) = list(SampleLoader(str(sounds), 20, epochs=1, workers=0))
    assert {
        key: fields["flac"][0] for key, fields in zip(samples.keys, samples.fields, strict=True)
    } == {f"{number:04d}": number for number in range(20)}
    for make in (
        lambda: TrainLoader(str(sounds), 4, epochs=1),
        lambda: EvalLoader(str(sounds), 4, split="train"),
    ):
        with pytest.raises(
            UsageError, match="was indexed with --any, whatever its samples hold; use SampleLoader"
        ):
            make()
    assert main(["verify", str(sounds)]) == 0
    assert main(["shards", "index", captioned, "--any", "--dry-run"]) == 0
    assert main(["shards", captioned, "nowhere", "--any"]) == 2
    assert "--any is of `wds-train shards index`" in capsys.readouterr().err
    assert Dataset.open(str(sounds)).manifest.classes[0].name == "any"
