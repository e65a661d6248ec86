"""A run's stack: made, started, stopped, taken away. What costs money begins with `start`, which sets its end first."""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError, WaiterError

from wds_train.aws.account import Aws, told
from wds_train.errors import Interrupted, NotFound, RunError, UsageError

TEMPLATE = Path(__file__).parents[2] / "infra" / "stack.yaml"
END = "wds-train-end"  # the scheduled action that sets the group to none, whatever the instance does
TAG = "wds-train"
BROKEN = {"ROLLBACK_COMPLETE", "ROLLBACK_FAILED", "CREATE_FAILED", "DELETE_FAILED", "UPDATE_ROLLBACK_FAILED"}
WAIT = {"Delay": 5, "MaxAttempts": 240}  # of a stack's changes: 20 minutes


def name_of(run: str) -> str:
    """The name of the run's stack, group and log group."""
    return f"wds-train-{re.sub('[^A-Za-z0-9]', '-', run)}"[:120]


def find(aws: Aws, run: str) -> dict[str, Any] | None:
    """The run's stack; None when there is none. `UsageError` when another run of a like name has it."""
    try:
        with told(f"the stack of {run}"):
            (stack,) = _described(aws, name_of(run))
    except NotFound:
        return None
    owner = parameters(stack).get("Run", run)
    if owner != run:
        raise UsageError(
            f"the stack {name_of(run)} is that of run {owner}; choose a run whose name differs in letters or digits"
        )
    return stack


def existing(aws: Aws, run: str) -> dict[str, Any]:
    """As `find`, but `NotFound` when there is none."""
    stack = find(aws, run)
    if stack is None:
        raise NotFound(f"there is no stack {name_of(run)} in {aws.region}; launch it, or give its --region")
    return stack


def parameters(stack: dict[str, Any]) -> dict[str, str]:
    return {each["ParameterKey"]: each["ParameterValue"] for each in stack.get("Parameters", ())}


def kept(aws: Aws, run: str) -> dict[str, str]:
    """What a stack that exists was made with and keeps: its bucket, and the image, whose driver the run began with."""
    stack = find(aws, run)
    return {key: value for key, value in parameters(stack).items() if key in ("CreateBucket", "Image")} if stack else {}


def make(aws: Aws, run: str, values: dict[str, str], template: str | None = None) -> None:
    """Create the run's stack, or change it. One that fails is taken away again: nothing half-made stays."""
    cloud, name = aws.client("cloudformation"), name_of(run)
    body = template or TEMPLATE.read_text()
    known = [{"ParameterKey": key, "ParameterValue": value} for key, value in sorted(values.items())]
    common = {"StackName": name, "TemplateBody": body, "Parameters": known, "Capabilities": ["CAPABILITY_IAM"]}
    before = find(aws, run)
    with told(f"the stack {name}"):
        if before is None:
            cloud.create_stack(**common, OnFailure="DELETE", Tags=[{"Key": TAG, "Value": run}])
            _wait(aws, "stack_create_complete", name)
            return
        try:
            cloud.update_stack(**common)
        except ClientError as error:
            if "No updates are to be performed" not in str(error):
                raise
            return
        _wait(aws, "stack_update_complete", name)


def start(aws: Aws, run: str, hours: float) -> datetime:
    """Set the group to one instance until then, at most: the end is set first, on AWS's side."""
    scaling, name = aws.client("autoscaling"), name_of(run)
    end = datetime.now(UTC) + timedelta(hours=hours)
    with told(f"the group {name}"):
        scaling.put_scheduled_update_group_action(
            AutoScalingGroupName=name, ScheduledActionName=END, StartTime=end, MinSize=0, MaxSize=0, DesiredCapacity=0
        )
        scaling.update_auto_scaling_group(AutoScalingGroupName=name, MaxSize=1, DesiredCapacity=1)
    return end


def stop(aws: Aws, run: str) -> None:
    """Set the group to none: the instance commits, and goes."""
    existing(aws, run)
    with told(f"the group {name_of(run)}"):
        aws.client("autoscaling").update_auto_scaling_group(
            AutoScalingGroupName=name_of(run), MinSize=0, DesiredCapacity=0
        )


def destroy(aws: Aws, run: str) -> None:
    """Delete the stack, once its instance has gone; the bucket is kept. One that is half-made may have no group."""
    existing(aws, run)
    if group(aws, run):
        stop(aws, run)
    with told(f"the stack {name_of(run)}"):
        aws.client("cloudformation").delete_stack(StackName=name_of(run))
        _wait(aws, "stack_delete_complete", name_of(run))


def machines(aws: Aws, run: str) -> list[str]:
    """How the run's machines stand, a line each."""
    found = group(aws, run)
    if found is None:
        return [f"group {name_of(run)}: there is none in {aws.region}"]
    wanted = f"{found['DesiredCapacity']} wanted, {len(found['Instances'])} there"
    lines = [f"group {name_of(run)}: {wanted}{_end(aws, run)}"]
    for each in found["Instances"]:
        kind = each.get("InstanceType") or "of a type that AWS does not name"
        lines.append(f"instance {each['InstanceId']}: {kind}, {each['AvailabilityZone']}, {each['LifecycleState']}")
    for each in found.get("SuspendedProcesses", ()):
        lines.append(f"suspended: {each['ProcessName']} ({each['SuspensionReason']}); launch again to resume it")
    return lines + _failure(aws, run)


def _end(aws: Aws, run: str) -> str:
    with told(f"the scheduled end of {run}"):
        found = aws.client("autoscaling").describe_scheduled_actions(AutoScalingGroupName=name_of(run))
    ends = [each["StartTime"] for each in found["ScheduledUpdateGroupActions"] if each["ScheduledActionName"] == END]
    return f", none from {ends[0]:%Y-%m-%d %H:%M} UTC on" if ends else ""


def _failure(aws: Aws, run: str) -> list[str]:
    """Why the group's newest activity failed, if it did."""
    with told(f"the activities of {run}"):
        found = aws.client("autoscaling").describe_scaling_activities(AutoScalingGroupName=name_of(run), MaxRecords=1)
    return [
        f"failed: {each['Description']}: {each.get('StatusMessage', 'no more is known')}"
        for each in found["Activities"]
        if each["StatusCode"] in ("Failed", "Cancelled")
    ]


def group(aws: Aws, run: str) -> dict[str, Any] | None:
    """The run's group, if there is one."""
    with told(f"the group {name_of(run)}"):
        found = aws.client("autoscaling").describe_auto_scaling_groups(AutoScalingGroupNames=[name_of(run)])
    return next(iter(found["AutoScalingGroups"]), None)


def _described(aws: Aws, name: str) -> list[dict[str, Any]]:
    try:
        return aws.client("cloudformation").describe_stacks(StackName=name)["Stacks"]
    except ClientError as error:
        if "does not exist" in str(error):
            raise NotFound(f"there is no stack {name}") from error
        raise


def _wait(aws: Aws, state: str, name: str) -> None:
    try:
        aws.client("cloudformation").get_waiter(state).wait(StackName=name, WaiterConfig=WAIT)
    except WaiterError as error:
        raise RunError(f"the stack {name} failed: {_reason(aws, name)}; what was made of it is taken away") from error
    except KeyboardInterrupt as error:
        raise Interrupted(
            f"nobody waits any longer, but AWS goes on with the stack {name} by itself; do the same again in some minutes"
        ) from error


def _reason(aws: Aws, name: str) -> str:
    """The first thing that failed, as CloudFormation says it."""
    with told(f"the stack {name}"):
        try:
            events = aws.client("cloudformation").describe_stack_events(StackName=name)["StackEvents"]
        except ClientError:  # it is gone already
            return "CloudFormation's console shows the deleted stack's events"
    failed = [each for each in events if each["ResourceStatus"].endswith("FAILED")]
    return (
        f"{failed[-1]['LogicalResourceId']}: {failed[-1].get('ResourceStatusReason', '')}"
        if failed
        else "no more is known"
    )
