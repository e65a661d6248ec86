"""One real interruption of a run on AWS: its group ends the instance and starts another; what is said is read off the run."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from wds_train.aws import stacks
from wds_train.aws.account import Aws, told
from wds_train.checkpoint.find import find_run
from wds_train.checkpoint.restore import read_records
from wds_train.checkpoint.run_manifest import RunManifest, Segment
from wds_train.errors import RunError, UsageError

POLL_SECONDS, PATIENCE = 5.0, 3600.0  # an instance of a type that is short may take long to come


@dataclass(frozen=True)
class Interruption:
    """Seconds from the request to the commit of `step`, to the replacement's claim, and to the end of its first step. Their clocks
    are ours and the instances'. `commit` is None where the instance went without one.
    """

    step: int
    commit: float | None
    claim: float
    first_step: float


def instance_of(aws: Aws, run: str) -> str:
    """The instance that trains `run`."""
    group = stacks.group(aws, run)
    for each in group["Instances"] if group else ():
        if each["LifecycleState"] == "InService":
            return each["InstanceId"]
    raise UsageError(f"no instance trains {run}; make status RUN={run} has the cause")


def interrupt(aws: Aws, url: str, instance: str) -> Interruption:
    """Have the group end `instance`, which trains the run at `url`, as it ends one that it loses; follow the run until steps go on."""
    before = find_run(url)[0]
    if before.status != "running":
        raise UsageError(f"run {before.run} is {before.status}; only one that trains can be interrupted")
    asked = time.time()
    with told(f"the end of {instance}"):
        aws.client("autoscaling").terminate_instance_in_auto_scaling_group(
            InstanceId=instance, ShouldDecrementDesiredCapacity=False
        )
    stopped = _until(url, lambda run: run.status == "interrupted" or run.fence > before.fence)
    committed = stopped.written - asked if stopped.fence == before.fence else None
    claimed = _until(url, lambda run: run.fence > before.fence)
    going = _until(url, lambda run: _logged(run, before.fence))
    store = find_run(url)[1]
    stepped = min(row["time/unix"] for each in _logged(going, before.fence) for row in read_records(store, each))
    return Interruption(stopped.step, committed, claimed.attempts[-1].started - asked, stepped - asked)


def _logged(run: RunManifest, fence: int) -> list[Segment]:
    """What attempts after that of `fence` have logged."""
    return [each for each in (*run.metrics, *run.replayed) if each.fence > fence]


def _until(url: str, wanted: Callable[[RunManifest], object]) -> RunManifest:
    deadline = time.monotonic() + PATIENCE
    while not wanted(run := find_run(url)[0]):
        if run.status in ("done", "failed", "stopped"):
            raise RunError(f"run {run.run} is {run.status}: nothing goes on")
        if time.monotonic() > deadline:
            raise RunError(
                f"run {run.run} did not go on within {PATIENCE:.0f} s; make status RUN={run.run} has the cause"
            )
        time.sleep(POLL_SECONDS)
    return run
