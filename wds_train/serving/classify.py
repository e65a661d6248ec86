"""Classify images given as bytes, as the model saw them in its validation.

`wds-train predict` hands in the photos that a person names.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from wds_train.dataset.reader import SplitReader
from wds_train.errors import WdsTrainError
from wds_train.evaluation.evaluate import Member, View
from wds_train.images.decode import decode_center
from wds_train.loader.workers import limit_threads, own_cores
from wds_train.models.weights import Weights
from wds_train.serving.photos import Photo

# Images that the model takes at a time. Two such batches are in memory, of 5 MB each at 224 px.
BATCH = 32

# A photo with its logits, float32 [classes], or the reason why there are none.
Answer = tuple[Photo, NDArray[np.float32] | WdsTrainError]
Pixels = NDArray[np.uint8]
# The photos of a batch, whose pixels threads are making.
Decoding = list[tuple[Photo, Future[Pixels | WdsTrainError]]]


class Classifier:
    """A trained model that answers for photos.

    Args:
        weights: The trained model.
        tta: The views to average, as --tta has them. Default: those of the validation.
        device: Where the model computes.
    """

    def __init__(self, weights: Weights, tta: str | None, device: torch.device) -> None:
        self._member = Member(weights, View.of(weights.recipe, tta), device)

    def logits(self, images: Iterable[Photo]) -> Iterator[Answer]:
        """Yield each image with its logits, in the order given.

        Threads decode one batch while the model works on the one before.
        """
        decoding: deque[Decoding] = deque()
        source = iter(images)
        limit_threads()
        with ThreadPoolExecutor(own_cores()) as pool:
            while photos := list(islice(source, BATCH)):
                decoding.append([(photo, pool.submit(self._decode, photo)) for photo in photos])
                # Only from the second batch on: the first one gives the threads a lead.
                if len(decoding) > 1:
                    yield from self._classify(decoding.popleft())
            while decoding:
                yield from self._classify(decoding.popleft())

    def _classify(self, batch: Decoding) -> Iterator[Answer]:
        """Yield the answers for a batch, once all of its images are decoded."""
        decoded = []
        readable = []
        for photo, future in batch:
            pixels = future.result()
            decoded.append((photo, pixels))
            if not isinstance(pixels, WdsTrainError):
                readable.append(pixels)

        # The model sees the readable images alone; their logits are dealt out in the same order.
        rows: Iterator[NDArray[np.float32]] = iter(())
        if readable:
            logits = self._member.logits(torch.from_numpy(np.stack(readable)))
            rows = iter(logits.cpu().numpy())
        for photo, pixels in decoded:
            if isinstance(pixels, WdsTrainError):
                yield photo, pixels
            else:
                yield photo, next(rows)

    def _decode(self, photo: Photo) -> Pixels | WdsTrainError:
        """Return the image as the model sees it, uint8 [side, side, 3], or its error."""
        transform = self._member.view.transform
        pixels = np.empty((transform.side, transform.side, 3), np.uint8)
        try:
            decode_center(photo.read(), transform.crop_ratio, pixels)
        except WdsTrainError as error:
            return error
        return pixels


def make_photo(split: SplitReader, number: int) -> Photo:
    """Return a sample of a dataset as a photo, which is read when its bytes are asked for."""
    return Photo(split.index.key_of(number), lambda: split.image(number))
