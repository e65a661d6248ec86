"""Waiting for a store: pauses between attempts, and a limit of time for a call."""

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from wds_train.errors import Unavailable

LOG = logging.getLogger(__name__)
# Bytes per second; a body that comes slower is requested again.
SLOWEST = 100_000
# More than any attempt and the pause before it take. If more passed, this process did not run for
# a part of it.
ATTEMPT_SECONDS = 60.0
# Of one pause, in seconds.
LONGEST_PAUSE = 5.0
# The longest pause after progress, in seconds. It doubles with each attempt that brings nothing.
PAUSE_AFTER_PROGRESS = 0.1
# Shared by no seed and no fork: processes that failed together must not ask again together.
JITTER = random.SystemRandom()

T = TypeVar("T")


class Retry:
    """The pauses between the attempts at one thing: random, and doubling up to LONGEST_PAUSE.

    They are short again after progress. Time in which this process did not run (SIGSTOP, a machine
    that is moved or suspended) says nothing about the server, and does not count.

    Args:
        seconds: The time for all attempts and pauses.
        clock: Returns seconds.
        sleep: Waits for so many seconds.
    """

    def __init__(
        self,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._seconds = seconds
        self._clock = clock
        self._sleep = sleep
        # When the pause before the last attempt began.
        self._since = clock()
        self._spent = 0.0
        self._attempts = 0
        self._fruitless = 0

    def pause(self, error: Unavailable, size: int = 0, progressed: bool = False) -> None:
        """Wait before the next attempt.

        Args:
            error: What ended the last one.
            size: Bytes that are read, which get time besides.
            progressed: The last attempt brought a part of them.

        Raises:
            Unavailable: The time is up.
        """
        self._attempts += 1
        self._fruitless += 1
        if progressed:
            self._fruitless = 0
        pause = JITTER.uniform(0, min(LONGEST_PAUSE, PAUSE_AFTER_PROGRESS * 2**self._fruitless))

        # Count the time of the last attempt, unless this process stood still meanwhile.
        took = self._clock() - self._since
        slowly = size / SLOWEST
        if took <= ATTEMPT_SECONDS + slowly:
            self._spent += took
        else:
            LOG.debug(
                "%.0f s passed in one attempt: this process did not run for a part of them", took
            )

        if self._spent + pause > self._seconds + slowly:
            raise Unavailable(
                f"{error}; gave up after {self._attempts} attempts in {self._spent:.0f} s"
            ) from error
        LOG.debug("%s; asking again in %.1f s", error, pause)
        self._since = self._clock()
        self._sleep(pause)


def call_within(seconds: float, do: Callable[[], T], url: str) -> T:
    """Call `do`, and return or raise what it does.

    Args:
        seconds: The longest time to wait for it. Its thread is then left behind, so it must do
            nothing that would hurt later.
        do: The function, which waits for a store.
        url: The store's address, for the message.

    Raises:
        Unavailable: It took longer.
    """
    # Whatever comes of the call, for the thread that waits.
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(do())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name=f"within {seconds:g} s", daemon=True)
    thread.start()

    thread.join(seconds)
    if thread.is_alive():
        raise Unavailable(f"{url} did not answer within {seconds:g} s")
    for error in errors:
        raise error
    return results[0]
