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

POLL_SECONDS = 5.0  # between two looks at the manifest
PATIENCE = 3600.0  # seconds; an instance of a scarce type may take long to come
OVER = ("done", "failed", "stopped")  # states in which a run does not go on by itself


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
    """Return the id of the instance that trains a run.

    Args:
        aws: The account and region.
        run: The run's name.

    Raises:
        UsageError: There is none.
    """
    group = stacks.group(aws, run) or {"Instances": []}
    for each in group["Instances"]:
        if each["LifecycleState"] == "InService":
            return each["InstanceId"]
    raise UsageError(f"no instance trains {run}; make status RUN={run} has the cause")


def interrupt(aws: Aws, url: str, instance: str) -> Interruption:
    """Let the group end an instance, as it ends one that it loses, and wait until the run goes on.

    Args:
        aws: The account and region.
        url: The run's address.
        instance: The id of the instance that trains it.

    Raises:
        UsageError: The run is not being trained.
        RunError: It did not go on.
    """
    # End the instance. The group keeps its size, and so starts another.
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

    # The old instance commits, the new one claims the run, and then does steps. Each claim raises
    # the fence. It may come before a look has seen the commit.
    stopped = _wait_until(url, lambda run: run.status == "interrupted" or run.fence > before.fence)
    committed = None
    if stopped.fence == before.fence:
        committed = stopped.written - asked
    claimed = _wait_until(url, lambda run: run.fence > before.fence)
    going = _wait_until(url, lambda run: _segments_after(run, before.fence))

    # The earliest step of the new instance.
    times = []
    for segment in _segments_after(going, before.fence):
        times += [row["time/unix"] for row in read_records(store, segment)]
    return Interruption(
        step=stopped.step,
        commit=committed,
        claim=claimed.attempts[-1].started - asked,
        first_step=min(times) - asked,
    )


def _segments_after(run: RunManifest, fence: int) -> list[Segment]:
    """Return the metrics that later attempts than that of `fence` have logged."""
    return [each for each in (*run.metrics, *run.replayed) if each.fence > fence]


def _wait_until(url: str, is_reached: Callable[[RunManifest], object]) -> RunManifest:
    """Return the run's manifest once `is_reached` holds for it."""
    deadline = time.monotonic() + PATIENCE
    while True:
        run, _ = find_run(url)
        if is_reached(run):
            return run
        # It is over: to wait longer would change nothing.
        if run.status in OVER:
            raise RunError(f"run {run.run} is {run.status}: nothing goes on")
        if time.monotonic() > deadline:
            raise RunError(
                f"run {run.run} did not go on within {PATIENCE:.0f} s; "
                f"make status RUN={run.run} has the cause"
            )
        time.sleep(POLL_SECONDS)
