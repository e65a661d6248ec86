"""Images and their captions, trained as CLIP is: samples that are more than an image and a label.

The tars are plain WebDataset ones, by anybody, that hold a `txt` for every `jpg`. They are indexed
once, where they are.

    wds-train shards index s3://bucket/captions
    python examples/captions.py s3://bucket/captions
"""

import argparse
import io
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from wds_train import SampleLoader

SIDE = 64  # of the images, pixels
VOCABULARY = 4096  # numbers that words are hashed to
WORDS = 16  # of a caption that are read
FEATURES = 128
SHARPNESS = 10  # the inverse of a temperature, which CLIP itself learns


def main() -> None:
    """Train a small model of images and one of captions, and print the loss of each epoch."""
    args = parse_arguments()
    torch.manual_seed(0)

    # Two networks, which make features of images and of captions.
    images = timm.create_model(args.model, num_classes=FEATURES)
    words = nn.EmbeddingBag(VOCABULARY, FEATURES)
    optimizer = torch.optim.AdamW([*images.parameters(), *words.parameters()])
    loader = SampleLoader(
        args.dataset, args.batch, epochs=args.epochs, fields=("jpg", "txt"), transform=pair
    )
    for samples in loader:
        pixels, tokens = stack(samples.fields)
        seen = normalize(images(pixels.permute(0, 3, 1, 2) / 127.5 - 1))
        read = normalize(words(tokens))

        # Each image should be most like its own caption, and each caption most like its image.
        likeness = SHARPNESS * seen @ read.T
        own = torch.arange(len(seen))
        loss = (cross_entropy(likeness, own) + cross_entropy(likeness.T, own)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loader.step % loader.steps_per_epoch == 0:
            print(
                f"step {loader.step}: loss {loss.item():.3f}; the last: {samples.keys[-1]}",
                flush=True,
            )


def parse_arguments() -> argparse.Namespace:
    """Return the flags of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset")
    parser.add_argument("--model", default="resnet10t")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=5)
    return parser.parse_args()


def stack(samples: Iterable[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Make tensors of what `pair` returned for each sample of a batch.

    Returns:
        Pixels, uint8 [n, SIDE, SIDE, 3], and tokens, int64 [n, WORDS].
    """
    pixels = []
    tokens = []
    for sample in samples:
        if sample is not None:  # it could not be read
            pixels.append(sample[0])
            tokens.append(sample[1])
    return torch.from_numpy(np.stack(pixels)), torch.from_numpy(np.stack(tokens))


def pair(
    fields: dict[str, bytes], key: str, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Make arrays of a sample. The loader's workers run it.

    Args:
        fields: The sample's files, by extension.
        key: The sample's key.
        rng: The generator of all random draws: with it, a resume makes the same arrays.

    Returns:
        The pixels, flipped or not, uint8 [SIDE, SIDE, 3], and the numbers of the caption's words,
        int64 [WORDS].
    """
    pixels = np.asarray(Image.open(io.BytesIO(fields["jpg"])).convert("RGB").resize((SIDE, SIDE)))
    words = fields["txt"].decode().lower().split()[:WORDS]
    tokens = np.zeros(WORDS, np.int64)
    for place, word in enumerate(words):
        tokens[place] = zlib.crc32(word.encode()) % VOCABULARY
    return pixels[:, :: rng.choice([1, -1])].copy(), tokens


if __name__ == "__main__":
    main()
