"""The pauses between the attempts at one thing."""

import logging
import random
import time
from collections.abc import Callable

from wds_train.errors import Unavailable

LOG = logging.getLogger(__name__)
SLOWEST = 100_000  # bytes per second; a body that comes slower is asked for again
ATTEMPT_SECONDS = 60.0  # longer than any attempt and the pause before it: of more, this process did not run in a part
JITTER = random.SystemRandom()  # shared by no seed and no fork


class Retry:
    """The pauses between the attempts at one thing: random, doubling up to 5 s, short again after progress.

    Time in which this process did not run (SIGSTOP, a machine that is moved or suspended) says nothing of the server, and
    counts for nothing: `seconds` are those of trying.
    """

    def __init__(
        self,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._seconds, self._clock, self._sleep = seconds, clock, sleep
        self._since = clock()  # the pause before the last attempt began
        self._spent = 0.0
        self._attempts = 0
        self._fruitless = 0

    def pause(self, error: Unavailable, size: int = 0, progressed: bool = False) -> None:
        """Wait before the next attempt at reading `size` bytes; `Unavailable` when the time for them is up."""
        self._attempts += 1
        self._fruitless = 0 if progressed else self._fruitless + 1
        pause = JITTER.uniform(0, min(5.0, 0.1 * 2**self._fruitless))
        took, slowly = self._clock() - self._since, size / SLOWEST
        if took <= ATTEMPT_SECONDS + slowly:
            self._spent += took
        else:
            LOG.debug("%.0f s passed in one attempt: this process did not run for a part of them", took)
        if self._spent + pause > self._seconds + slowly:
            raise Unavailable(f"{error}; gave up after {self._attempts} attempts in {self._spent:.0f} s") from error
        LOG.debug("%s; asking again in %.1f s", error, pause)
        self._since = self._clock()
        self._sleep(pause)
