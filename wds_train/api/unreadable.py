"""Samples that could not be used: each is named, and too many end the loop."""

import logging
from collections.abc import Iterable

from wds_train.data.batch import Unreadable
from wds_train.errors import DataError

LOG = logging.getLogger(__name__)


class Bound:
    """Lets at most `share` of an epoch's `samples` be unreadable, of those that this process met."""

    def __init__(self, share: float, samples: int) -> None:
        self._share, self._samples = share, samples
        self._epoch, self._met = 0, 0

    def __call__(self, epoch: int, unreadable: Iterable[Unreadable]) -> None:
        if epoch != self._epoch:
            self._epoch, self._met = epoch, 0
        for each in unreadable:
            self._met += 1
            named = f"{each.shard}, key {each.key}: {each.cause}"
            LOG.warning("unreadable sample: %s", named)
            if self._met > self._share * self._samples:
                raise DataError(
                    f"{self._met} of the {self._samples} samples of epoch {epoch} could not be read, more than the share "
                    f"max_bad = {self._share}; the last: {named}. Check the dataset with `wds-train verify`"
                )
