"""Every error that a user can meet, as one tree. The command line prints the message alone and exits with `exit_code`.

    WdsTrainError              1
    ├── UsageError             2    a flag, setting or argument that cannot work
    ├── StoreError             1    the object store
    │   ├── NotFound                the object does not exist (404)
    │   ├── AccessDenied            the credentials are missing, wrong, expired or not enough (401, 403)
    │   ├── Conflict                a compare-and-swap lost: somebody else wrote first (409, 412)
    │   └── Unavailable             the store did not answer, or kept failing, until the retries ran out
    ├── DataError              1    a dataset or a sample is not what its manifest says
    ├── RunError               1    the state of a run cannot be used, or training cannot go on
    │   ├── NotFinite               a loss or a weight is not finite
    │   ├── WorkerDied              a loader worker was killed, or crashed
    │   └── Miscomputed             a step that was computed twice gave two results
    ├── Dropped                1    what a run's manifest named is gone, since its newest one names it no more
    ├── StoppedByPerson        1    stopped for good by a person, after committing: only they let it go on
    └── Interrupted            75   stopped by a signal or a newer owner, after committing what could be: run it again
        └── RanksLost               another process of this training is gone

Foreign exceptions (botocore, OSError, pyarrow) are translated where they enter, `raise ... from`.
A message says what was wrong, the value, and what to do.
"""

import difflib
import sys
from collections.abc import Iterable
from typing import Any


class WdsTrainError(Exception):
    exit_code = 1
    told = False
    """Whether `tell` has printed it."""


class UsageError(WdsTrainError):
    exit_code = 2


class StoreError(WdsTrainError):
    pass


class NotFound(StoreError):
    pass


class AccessDenied(StoreError):
    pass


class Conflict(StoreError):
    pass


class Unavailable(StoreError):
    pass


class DataError(WdsTrainError):
    pass


class RunError(WdsTrainError):
    pass


class NotFinite(RunError):
    pass


class WorkerDied(RunError):
    def __init__(self, how: str) -> None:
        super().__init__(
            f"a loader worker died ({how}); if the machine ran out of memory, use fewer --workers, then run again"
        )
        self.how = how


class Miscomputed(RunError):
    """`difference` is what the run's manifest keeps of it, a `checkpoint.manifest.Difference`."""

    def __init__(self, message: str, difference: Any) -> None:
        super().__init__(message)
        self.difference = difference


class Dropped(WdsTrainError):
    pass


class StoppedByPerson(WdsTrainError):
    pass


class Interrupted(WdsTrainError):
    exit_code = 75  # sysexits.h EX_TEMPFAIL: a supervisor restarts on it


class RanksLost(Interrupted):
    pass


def did_you_mean(name: str, known: Iterable[str], most: int = 3) -> str:
    """The end of a message that knows no `name`: the question after the nearest of `known`, or nothing if none is near."""
    near = difflib.get_close_matches(name, [*known], most)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def unwritable(path: object, error: OSError, remedy: str = "") -> UsageError:
    """What to raise where a file that a person asked for, at `path`, cannot be written."""
    cause = error.strerror or error
    return UsageError(
        f"{path} cannot be written" + (f" ({cause}); {remedy}" if remedy else f": {cause}")
    )


def tell(error: WdsTrainError) -> None:
    """Print what `error` says, unless that was done before."""
    if not error.told:
        error.told = True
        print(
            f"wds-train: {'' if isinstance(error, Interrupted) else 'error: '}{error}",
            file=sys.stderr,
            flush=True,
        )
