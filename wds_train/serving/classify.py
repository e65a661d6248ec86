"""A trained model that answers for images given as bytes, through the very transform of its validation."""

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

BATCH = 32
Answer = tuple[
    Photo, NDArray[np.float32] | WdsTrainError
]  # the logits [classes], or why there are none


class Classifier:
    """Takes images to logits on `device`: threads decode one batch while the model works on the one before."""

    def __init__(self, weights: Weights, tta: str | None, device: torch.device) -> None:
        self._member = Member(weights, View.of(weights.recipe, tta), device)

    def logits(self, images: Iterable[Photo]) -> Iterator[Answer]:
        """Each image with its logits, in the order given."""
        waiting: deque[list[tuple[Photo, Future[NDArray[np.uint8] | WdsTrainError]]]] = deque()
        source = iter(images)
        limit_threads()
        with ThreadPoolExecutor(own_cores()) as pool:
            while batch := list(islice(source, BATCH)):
                waiting.append([(photo, pool.submit(self._pixels, photo)) for photo in batch])
                if len(waiting) > 1:
                    yield from self._answers(waiting.popleft())
            while waiting:
                yield from self._answers(waiting.popleft())

    def _answers(
        self, batch: list[tuple[Photo, Future[NDArray[np.uint8] | WdsTrainError]]]
    ) -> Iterator[Answer]:
        found = [future.result() for _, future in batch]
        readable = [pixels for pixels in found if not isinstance(pixels, WdsTrainError)]
        logits = iter(
            self._member.logits(torch.from_numpy(np.stack(readable))).cpu().numpy()
            if readable
            else ()
        )
        for (photo, _), pixels in zip(batch, found, strict=True):
            yield photo, pixels if isinstance(pixels, WdsTrainError) else next(logits)

    def _pixels(self, photo: Photo) -> NDArray[np.uint8] | WdsTrainError:
        """The image as the model sees it, uint8 [side, side, 3]."""
        transform = self._member.view.transform
        pixels = np.empty((transform.side, transform.side, 3), np.uint8)
        try:
            decode_center(photo.read(), transform.crop_ratio, pixels)
        except WdsTrainError as error:
            return error
        return pixels


def sample(split: SplitReader, number: int) -> Photo:
    """A sample of a dataset, as an image that is read when it is wanted."""
    return Photo(split.index.key_of(number), lambda: split.image(number))
