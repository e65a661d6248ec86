"""Unreadable samples: each is logged, and too many of them end the epoch."""

import logging
from collections.abc import Iterable

from wds_train.errors import DataError, UsageError
from wds_train.loader.batch import Unreadable

# A user's program may configure it by this name.
LOG = logging.getLogger("wds_train.loader")


class UnreadableLimit:
    """The number of unreadable samples that an epoch may have.

    Args:
        max_bad: The largest share of an epoch's samples that may be unreadable, 0 to 1.
        samples: The samples of an epoch.
        setting: The name of `max_bad` in messages.

    Raises:
        UsageError: `max_bad` is not a share.
    """

    def __init__(self, max_bad: float, samples: int, setting: str = "max_bad") -> None:
        if not 0 <= max_bad <= 1:
            raise UsageError(f"{setting} = {max_bad!r} cannot work: it must be a share, 0 to 1")
        self._max_bad = max_bad
        self._samples = samples
        self._setting = setting

    def check(self, unreadable: int, epoch: int, last: str) -> None:
        """Raise `DataError` if an epoch has too many unreadable samples.

        Args:
            unreadable: The epoch's unreadable samples so far.
            epoch: The epoch.
            last: The name of the last one, and why it could not be read.
        """
        # A share of 0 allows none, and a share of 1 all of them.
        if unreadable > self._max_bad * self._samples:
            raise DataError(
                f"{unreadable} of the {self._samples} samples of epoch {epoch} could not be read, "
                f"more than the allowed share {self._setting} = {self._max_bad}; the last: {last}. "
                "Check the dataset with `wds-train verify`"
            )


class UnreadableCounter:
    """Counts and logs this process's unreadable samples of an epoch, and stops at the limit.

    Args:
        limit: The number that an epoch may have.
    """

    def __init__(self, limit: UnreadableLimit) -> None:
        self._limit = limit
        self.reset()

    def reset(self) -> None:
        """Begin to count from zero."""
        self._epoch = 0
        self._count = 0

    def add(self, epoch: int, unreadable: Iterable[Unreadable]) -> None:
        """Count and log the unreadable samples of one batch.

        Args:
            epoch: The batch's epoch.
            unreadable: Its unreadable samples.

        Raises:
            DataError: The epoch has more unreadable samples than its limit.
        """
        # The limit is for each epoch by itself.
        if epoch != self._epoch:
            self._epoch = epoch
            self._count = 0
        for sample in unreadable:
            self._count += 1
            LOG.warning("unreadable sample: %s", sample.named)
            # One by one, so that the message names the sample that was one too many.
            self._limit.check(self._count, epoch, sample.named)
