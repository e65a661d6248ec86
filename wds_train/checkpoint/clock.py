"""A clock of a process's activities, which says where its seconds go."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from wds_train.checkpoint.goodput import Spent

Activity = Literal["start", "steps", "data", "commit", "validation"]
UNFINISHED = ("steps", "validation")
"""Activities that are lost when the process ends in the middle of them."""
DIGITS = 3  # of the seconds that are noted


@dataclass(frozen=True)
class _Since:
    """An activity, when it began, and what was spent before it."""

    activity: Activity
    began: float
    before: Spent


class Clock:
    """Adds up the seconds of a process by its activities; it begins with "start".

    One thread turns it and others read it, without a lock: all that it knows is one object, which
    is replaced.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._since = _Since("start", now(), Spent())

    @property
    def activity(self) -> Activity:
        """The activity that is under way."""
        return self._since.activity

    def turn(self, activity: Activity, also: float = 0.0) -> None:
        """Say that the activity so far is finished, and that another one begins.

        `also` are seconds of the finished one that belong to the new one.
        """
        now = self._now()
        spent = _spent(self._since, now)
        if also:
            left: float = getattr(spent, self._since.activity) - also
            spent = replace(spent, **{self._since.activity: left})
            spent = replace(spent, **{activity: getattr(spent, activity) + also})
        self._since = _Since(activity, now, spent)

    def read(self) -> Spent:
        """Return what was spent so far, the activity under way included."""
        since = self._since
        now = self._now()
        spent = _spent(since, now)
        under_way = now - since.began if since.activity in UNFINISHED else 0.0
        rounded = {name: round(seconds, DIGITS) for name, seconds in vars(spent).items()}
        return Spent(**rounded | {"under_way": round(under_way, DIGITS)})


def _spent(since: _Since, now: float) -> Spent:
    """Return what was spent until `now`."""
    so_far: float = getattr(since.before, since.activity)
    return replace(since.before, **{since.activity: so_far + now - since.began})
