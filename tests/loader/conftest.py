"""Datasets of the loaders' tests, beside the handwritten digits."""

import io
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from wds_train.cli import main

CAPTIONED = 40


def png(number: int) -> bytes:
    pixels, sink = np.full((10, 12, 3), number, np.uint8), io.BytesIO()
    Image.fromarray(pixels).save(sink, "png")
    return sink.getvalue()


@pytest.fixture(scope="session")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Tars of stock webdataset's writer, with a caption and an array beside each image, indexed where they lie."""
    folder = tmp_path_factory.mktemp("captioned")
    for shard in range(2):
        with webdataset.TarWriter(str(folder / f"part-{shard}.tar")) as tar:
            for number in range(shard * CAPTIONED // 2, (shard + 1) * CAPTIONED // 2):
                members = {
                    "png": png(number),
                    "cls": number % 4,
                    "txt": f"number {number}",
                    "npy": np.arange(number),
                }
                tar.write({"__key__": f"{number:04d}", **members})
    assert main(["shards", "index", str(folder)]) == 0
    return str(folder)


@pytest.fixture(scope="session")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tar without images: a sound and its text each."""
    folder = tmp_path_factory.mktemp("sounds")
    with webdataset.TarWriter(str(folder / "sounds.tar")) as tar:
        for number in range(20):
            tar.write(
                {
                    "__key__": f"{number:04d}",
                    "flac": bytes([number]) * 100,
                    "txt": f"sound {number}",
                }
            )
    return folder
