"""The pauses between the attempts at one thing."""

import logging
import random
import time
from collections.abc import Callable

from wds_train.errors import Unavailable

LOG = logging.getLogger(__name__)
SLOWEST = 100_000  # bytes per second; a body that comes slower is asked for again
JITTER = random.SystemRandom()  # shared by no seed and no fork


class Retry:
    """The pauses between the attempts at one thing: random, doubling up to 5 s, short again after progress."""

    def __init__(
        self,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._seconds, self._clock, self._sleep = seconds, clock, sleep
        self._began = clock()
        self._attempts = 0
        self._fruitless = 0

    def pause(self, error: Unavailable, size: int = 0, progressed: bool = False) -> None:
        """Wait before the next attempt at reading `size` bytes; `Unavailable` when the time for them is up."""
        self._attempts += 1
        self._fruitless = 0 if progressed else self._fruitless + 1
        pause = JITTER.uniform(0, min(5.0, 0.1 * 2**self._fruitless))
        spent = self._clock() - self._began
        if spent + pause > self._seconds + size / SLOWEST:
            raise Unavailable(f"{error}; gave up after {self._attempts} attempts in {spent:.0f} s") from error
        LOG.debug("%s; asking again in %.1f s", error, pause)
        self._sleep(pause)
