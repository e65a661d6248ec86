"""Every error that a user can meet, as one tree.

The command line prints the message alone and exits with `exit_code`.

    WdsTrainError              1
    ├── UsageError             2    a flag, setting or argument that cannot work
    ├── StoreError             1    the object store
    │   ├── NotFound                the object does not exist (404)
    │   ├── AccessDenied            the credentials are missing, wrong, expired or not enough
    │   │                           (401, 403)
    │   ├── Conflict                a compare-and-swap lost: somebody else wrote first (409, 412)
    │   └── Unavailable             the store did not answer, or kept failing, until the retries
    │                               ran out
    ├── DataError              1    a dataset or a sample is not what its manifest says
    ├── RunError               1    the state of a run cannot be used, or training cannot go on
    │   ├── NotFinite               a loss or a weight is not finite
    │   ├── WorkerDied              a loader worker was killed, or crashed
    │   └── Miscomputed             a step that was computed twice gave two results
    ├── Dropped                1    what a run's manifest named is gone, since its newest one names
    │                               it no more
    ├── StoppedByPerson        1    stopped for good by a person, after committing: only they let it
    │                               go on
    └── Interrupted            75   stopped by a signal or a newer owner, after committing what
        │                           could be: run it again
        └── RanksLost               another process of this training is gone

Foreign exceptions (botocore, OSError, pyarrow) are translated where they enter, `raise ... from`.
A message says what was wrong, the value, and what to do.
"""

import difflib
import sys
from collections.abc import Iterable
from typing import Any


class WdsTrainError(Exception):
    """An error whose message is for people.

    Attributes:
        exit_code: The exit code of the command that ends by it.
        told: `tell` has printed it.
    """

    exit_code = 1
    told = False


class UsageError(WdsTrainError):
    """A flag, setting or argument cannot work."""

    exit_code = 2


class StoreError(WdsTrainError):
    """The object store cannot do what is needed."""


class NotFound(StoreError):
    """The object does not exist."""


class AccessDenied(StoreError):
    """The credentials are missing, wrong, expired or not enough."""


class Conflict(StoreError):
    """Somebody else wrote first."""


class Unavailable(StoreError):
    """The store did not answer. Another try may succeed."""


class DataError(WdsTrainError):
    """A dataset or a sample is not what its manifest says."""


class RunError(WdsTrainError):
    """The state of a run cannot be used, or training cannot go on."""


class NotFinite(RunError):
    """A loss or a weight is not finite."""


class WorkerDied(RunError):
    """A loader worker was killed, or crashed.

    Args:
        how: Its end in words, such as "signal 9".
    """

    def __init__(self, how: str) -> None:
        super().__init__(
            f"a loader worker died ({how}); if the machine ran out of memory, use fewer --workers, "
            "then run again"
        )
        self.how = how


class Miscomputed(RunError):
    """A step that was computed twice gave two results.

    Args:
        message: The message.
        difference: What the run's manifest keeps of it, a
            `checkpoint.run_manifest.Difference`.
    """

    def __init__(self, message: str, difference: Any) -> None:
        super().__init__(message)
        self.difference = difference


class Dropped(WdsTrainError):
    """An object that a run's manifest named is gone, since its newest one names it no more."""


class StoppedByPerson(WdsTrainError):
    """A person stopped the run for good, after it had committed."""


class Interrupted(WdsTrainError):
    """A signal or a newer owner stopped the run: run it again."""

    # EX_TEMPFAIL of sysexits.h: a supervisor restarts on it.
    exit_code = 75


class RanksLost(Interrupted):
    """Another process of this training is gone."""


def did_you_mean(name: str, known: Iterable[str], most: int = 3) -> str:
    """Return the end of a message that knows no `name`: a question after the nearest known names.

    Args:
        name: What a person wrote.
        known: The names that there are.
        most: The number of names to ask for.

    Returns:
        The question, with a semicolon before it; "" if no known name is near.
    """
    near = difflib.get_close_matches(name, [*known], most)
    if not near:
        return ""
    return f"; did you mean {' or '.join(near)}?"


def unwritable(path: object, error: OSError, remedy: str = "") -> UsageError:
    """Return the error for a file that a person asked for and that cannot be written.

    Args:
        path: The file.
        error: The reason.
        remedy: What the person can do about it.
    """
    cause = error.strerror or error
    if remedy:
        return UsageError(f"{path} cannot be written ({cause}); {remedy}")
    return UsageError(f"{path} cannot be written: {cause}")


def tell(error: WdsTrainError) -> None:
    """Print the message of `error`, unless that was done before."""
    if error.told:
        return
    error.told = True
    # An interruption is no fault: the run goes on later.
    kind = "error: "
    if isinstance(error, Interrupted):
        kind = ""
    print(f"wds-train: {kind}{error}", file=sys.stderr, flush=True)
