"""What is waited for no longer than so many seconds."""

import threading
from collections.abc import Callable
from typing import TypeVar

from wds_train.errors import Unavailable

T = TypeVar("T")


def within(seconds: float, do: Callable[[], T], url: str) -> T:
    """What `do()` returns or raises; `Unavailable` when the store at `url` keeps it waiting for longer than `seconds`. Its
    thread is then left behind, so that it must do nothing that would hurt later.
    """
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
