"""Samples that could not be used: each is named, and too many end the loop."""

import logging
from collections.abc import Iterable

from wds_train.errors import DataError, UsageError
from wds_train.loader.batch import Unreadable

LOG = logging.getLogger(__name__)


class Bound:
    """Lets at most the share `max_bad` of an epoch's `samples` be unreadable, of those that this process met since `reset`."""

    def __init__(self, max_bad: float, samples: int) -> None:
        if not 0 <= max_bad <= 1:
            raise UsageError(f"max_bad = {max_bad!r} cannot work: it must be a share, 0 to 1")
        self._max_bad, self._samples = max_bad, samples
        self.reset()

    def reset(self) -> None:
        self._epoch, self._met = 0, 0

    def __call__(self, epoch: int, unreadable: Iterable[Unreadable]) -> None:
        if epoch != self._epoch:
            self._epoch, self._met = epoch, 0
        for each in unreadable:
            self._met += 1
            named = f"{each.shard}, key {each.key}: {each.cause}"
            LOG.warning("unreadable sample: %s", named)
            if self._met > self._max_bad * self._samples:
                raise DataError(
                    f"{self._met} of the {self._samples} samples of epoch {epoch} could not be read, more than the share "
                    f"max_bad = {self._max_bad}; the last: {named}. Check the dataset with `wds-train verify`"
                )
