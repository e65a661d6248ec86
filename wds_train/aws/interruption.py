"""A real interruption of a run on AWS: its group ends the instance, and starts another.

The times are taken from the run's manifest and metrics.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from wds_train.aws import stacks
from wds_train.aws.account import Aws, translate_errors
from wds_train.checkpoint.find import find_run
from wds_train.checkpoint.restore import read_records
from wds_train.checkpoint.run_manifest import RunManifest, Segment
from wds_train.errors import RunError, UsageError

POLL_SECONDS = 5.0
PATIENCE = 3600.0  # seconds; an instance of a scarce type may take long to come


@dataclass(frozen=True)
class Interruption:
    """The times of an interruption: seconds from the request, by our clock and the instances'.

    Attributes:
        step: The step that was committed.
        commit: Until the commit; None if the instance ended without one.
        claim: Until the replacement claimed the run.
        first_step: Until the end of the replacement's first step.
    """

    step: int
    commit: float | None
    claim: float
    first_step: float


def instance_of(aws: Aws, run: str) -> str:
    """Return the instance that trains `run`.

    Raises:
        UsageError: There is none.
    """
    group = stacks.group(aws, run)
    for each in group["Instances"] if group else ():
        if each["LifecycleState"] == "InService":
            return each["InstanceId"]
    raise UsageError(f"no instance trains {run}; make status RUN={run} has the cause")


def interrupt(aws: Aws, url: str, instance: str) -> Interruption:
    """Let the group end an instance, as it ends one that it loses, and wait until the run goes on.

    Args:
        aws: The account and region.
        url: The run's address.
        instance: The instance that trains it.
    """
    before, store = find_run(url)
    if before.status != "running":
        raise UsageError(
            f"run {before.run} is {before.status}; only one that trains can be interrupted"
        )
    asked = time.time()
    with translate_errors(f"the end of {instance}"):
        aws.client("autoscaling").terminate_instance_in_auto_scaling_group(
            InstanceId=instance, ShouldDecrementDesiredCapacity=False
        )
    stopped = _until(url, lambda run: run.status == "interrupted" or run.fence > before.fence)
    committed = stopped.written - asked if stopped.fence == before.fence else None
    claimed = _until(url, lambda run: run.fence > before.fence)
    going = _until(url, lambda run: _logged(run, before.fence))

    times = []
    for segment in _logged(going, before.fence):
        times += [row["time/unix"] for row in read_records(store, segment)]
    return Interruption(
        step=stopped.step,
        commit=committed,
        claim=claimed.attempts[-1].started - asked,
        first_step=min(times) - asked,
    )


def _logged(run: RunManifest, fence: int) -> list[Segment]:
    """Return what the attempts after that of `fence` have logged."""
    return [each for each in (*run.metrics, *run.replayed) if each.fence > fence]


def _until(url: str, wanted: Callable[[RunManifest], object]) -> RunManifest:
    """Return the run's manifest once it is as `wanted`."""
    deadline = time.monotonic() + PATIENCE
    while True:
        run, _ = find_run(url)
        if wanted(run):
            return run
        if run.status in ("done", "failed", "stopped"):
            raise RunError(f"run {run.run} is {run.status}: nothing goes on")
        if time.monotonic() > deadline:
            raise RunError(
                f"run {run.run} did not go on within {PATIENCE:.0f} s; make status RUN={run.run} has the cause"
            )
        time.sleep(POLL_SECONDS)
