"""A clock of a process's activities, for the report of where paid time goes.

The training turns it; the writer of the manifest reads it at every write.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from wds_train.checkpoint.goodput import Spent

Activity = Literal["start", "steps", "data", "commit", "validation"]
# Activities that are lost when the process ends in the middle of them.
UNFINISHED = ("steps", "validation")
# Decimals of the seconds in a manifest: milliseconds, far below the length of a step.
DIGITS = 3


@dataclass(frozen=True)
class _Since:
    """An activity, when it began, and what was spent before it."""

    activity: Activity
    began: float
    before: Spent


class Clock:
    """Adds up the seconds of a process by its activities; the first one is "start".

    One thread turns it and others read it, without a lock: all that it knows is one object, which
    is replaced.

    Args:
        now: Returns the monotonic time, seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._since = _Since("start", now(), Spent())

    @property
    def activity(self) -> Activity:
        """The activity that is under way."""
        return self._since.activity

    def turn(self, activity: Activity, also: float = 0.0) -> None:
        """Finish the activity so far, and begin another one.

        Args:
            activity: The new one.
            also: Seconds of the finished one that belong to the new one.
        """
        now = self._now()
        spent = _spent(self._since, now)
        if also:
            # Moved one after the other: both may be the same activity.
            left: float = getattr(spent, self._since.activity) - also
            spent = replace(spent, **{self._since.activity: left})
            spent = replace(spent, **{activity: getattr(spent, activity) + also})
        self._since = _Since(activity, now, spent)

    def read(self) -> Spent:
        """Return the seconds so far, with those of the activity under way."""
        # Read once: another thread may turn the clock meanwhile.
        since = self._since
        now = self._now()
        under_way = 0.0
        if since.activity in UNFINISHED:
            under_way = now - since.began
        spent = replace(_spent(since, now), under_way=under_way)
        return Spent(**{name: round(seconds, DIGITS) for name, seconds in vars(spent).items()})


def _spent(since: _Since, now: float) -> Spent:
    """Return the seconds until `now`."""
    so_far: float = getattr(since.before, since.activity)
    return replace(since.before, **{since.activity: so_far + now - since.began})
