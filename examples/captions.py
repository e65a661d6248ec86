"""Beyond labels: images and their captions, trained as CLIP is. The tars are plain WebDataset ones, by whomever, that hold a
`txt` beside every `jpg`; they are indexed once, where they lie.

    wds-train shards index s3://bucket/captions
    python examples/captions.py s3://bucket/captions
"""

import argparse
import io
import zlib

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from wds_train import SampleLoader

SIDE, VOCABULARY, WORDS = 64, 4096, 16


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset")
    parser.add_argument("--model", default="resnet10t")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    images = timm.create_model(args.model, num_classes=128)
    words = nn.EmbeddingBag(VOCABULARY, 128)
    optimizer = torch.optim.AdamW([*images.parameters(), *words.parameters()])
    loader = SampleLoader(
        args.dataset, args.batch, epochs=args.epochs, fields=("jpg", "txt"), transform=pair
    )
    for samples in loader:
        pairs = [
            each for each in samples.fields if each is not None
        ]  # without what could not be read
        pixels, tokens = (torch.from_numpy(np.stack(each)) for each in zip(*pairs, strict=True))
        seen = normalize(images(pixels.permute(0, 3, 1, 2) / 127.5 - 1))
        read = normalize(words(tokens))
        likeness, own = 10 * seen @ read.T, torch.arange(len(seen))
        loss = (cross_entropy(likeness, own) + cross_entropy(likeness.T, own)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loader.step % loader.steps_per_epoch == 0:
            print(
                f"step {loader.step}: loss {loss.item():.3f}; the last: {samples.keys[-1]}",
                flush=True,
            )


def pair(
    fields: dict[str, bytes], key: str, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """A sample's pixels, flipped or not, and the numbers of its caption's words. It runs in the loader's workers."""
    pixels = np.asarray(Image.open(io.BytesIO(fields["jpg"])).convert("RGB").resize((SIDE, SIDE)))
    words = fields["txt"].decode().lower().split()[:WORDS]
    tokens = np.zeros(WORDS, np.int64)
    tokens[: len(words)] = [zlib.crc32(word.encode()) % VOCABULARY for word in words]
    return pixels[:, :: rng.choice([1, -1])].copy(), tokens


if __name__ == "__main__":
    main()
