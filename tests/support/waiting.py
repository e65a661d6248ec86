"""Waiting for what must come, however slow the machine is."""

import time
from collections.abc import Callable

SECONDS = 120.0


def wait_until(condition: Callable[[], object], what: str = "it") -> None:
    """Wait until `condition` holds. A machine that is not hung is never so slow that it fails."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what} never came"
        time.sleep(0.02)
