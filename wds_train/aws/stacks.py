"""A run's stack of CloudFormation: make, start, stop, describe and destroy it.

The stack has a network, the rights, and a group that keeps one spot instance. Costs begin with
`start`, which sets the end first.
"""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError, WaiterError

from wds_train.aws.account import Aws, translate_errors
from wds_train.errors import Interrupted, NotFound, RunError, UsageError

TEMPLATE = Path(__file__).parents[2] / "infra" / "stack.yaml"
# The scheduled action that sets the group to no instances, whatever the instance does.
END = "wds-train-end"
TAG = "wds-train"  # of all that a stack makes; its value is the run's name
# States that no update leads out of.
BROKEN = {
    "ROLLBACK_COMPLETE",
    "ROLLBACK_FAILED",
    "CREATE_FAILED",
    "DELETE_FAILED",
    "UPDATE_ROLLBACK_FAILED",
}
WAIT = {"Delay": 5, "MaxAttempts": 240}  # of a stack's changes: 20 minutes


def name_of(run: str) -> str:
    """Return the name of the run's stack, group and log group.

    Args:
        run: The run's name, of which CloudFormation takes only letters, digits and hyphens.
    """
    return f"wds-train-{re.sub('[^A-Za-z0-9]', '-', run)}"[:120]


def find(aws: Aws, run: str) -> dict[str, Any] | None:
    """Return the run's stack; None if there is none.

    Args:
        aws: The account and region.
        run: The run's name.

    Raises:
        UsageError: The stack of this name is that of another run.
    """
    try:
        with translate_errors(f"the stack of {run}"):
            (stack,) = _describe(aws, name_of(run))
    except NotFound:
        return None
    # Two runs may have one name for CloudFormation, such as a.b and a-b.
    owner = parameters(stack).get("Run", run)
    if owner != run:
        raise UsageError(
            f"the stack {name_of(run)} is that of run {owner}; "
            "choose a run whose name differs in letters or digits"
        )
    return stack


def find_existing(aws: Aws, run: str) -> dict[str, Any]:
    """Return the run's stack.

    Args:
        aws: The account and region.
        run: The run's name.

    Raises:
        NotFound: There is none.
    """
    stack = find(aws, run)
    if stack is None:
        raise NotFound(
            f"there is no stack {name_of(run)} in {aws.region}; launch it, or give its --region"
        )
    return stack


def parameters(stack: dict[str, Any]) -> dict[str, str]:
    """Return the values that a stack was made with."""
    return {each["ParameterKey"]: each["ParameterValue"] for each in stack.get("Parameters", ())}


def kept_parameters(aws: Aws, run: str) -> dict[str, str]:
    """Return the parameters that an existing stack keeps: its bucket and its image.

    Otherwise a later launch could change the image in the middle of a training.

    Args:
        aws: The account and region.
        run: The run's name.
    """
    stack = find(aws, run)
    if stack is None:
        return {}
    values = parameters(stack)
    return {key: values[key] for key in ("CreateBucket", "Image") if key in values}


def make(aws: Aws, run: str, values: dict[str, str], template: str | None = None) -> None:
    """Create the run's stack, or update it. A stack that fails is deleted: nothing half-made stays.

    Args:
        aws: The account and region.
        run: The run's name.
        values: The parameters of the template.
        template: Its text. Default: TEMPLATE's.

    Raises:
        RunError: It failed.
        Interrupted: A person does not wait any longer; AWS goes on.
    """
    cloud = aws.client("cloudformation")
    name = name_of(run)
    common = {
        "StackName": name,
        "TemplateBody": template or TEMPLATE.read_text(),
        "Parameters": [
            {"ParameterKey": key, "ParameterValue": value} for key, value in sorted(values.items())
        ],
        "Capabilities": ["CAPABILITY_IAM"],
    }
    before = find(aws, run)
    with translate_errors(f"the stack {name}"):
        # A new one.
        if before is None:
            cloud.create_stack(**common, OnFailure="DELETE", Tags=[{"Key": TAG, "Value": run}])
            _wait(aws, "stack_create_complete", name)
            return

        # One that exists. To AWS, an update that changes nothing is an error.
        try:
            cloud.update_stack(**common)
        except ClientError as error:
            if "No updates are to be performed" not in str(error):
                raise
            return
        _wait(aws, "stack_update_complete", name)


def start(aws: Aws, run: str, hours: float) -> datetime:
    """Start one instance.

    Args:
        aws: The account and region.
        run: The run's name.
        hours: The hours after which no instance may run.

    Returns:
        The time at which it ends at the latest.
    """
    scaling = aws.client("autoscaling")
    name = name_of(run)
    end = datetime.now(UTC) + timedelta(hours=hours)
    with translate_errors(f"the group {name}"):
        # The end comes first: no instance ever runs without one. It is an action of AWS, which
        # happens whatever the instance does.
        scaling.put_scheduled_update_group_action(
            AutoScalingGroupName=name,
            ScheduledActionName=END,
            StartTime=end,
            MinSize=0,
            MaxSize=0,
            DesiredCapacity=0,
        )
        scaling.update_auto_scaling_group(AutoScalingGroupName=name, MaxSize=1, DesiredCapacity=1)
    return end


def stop(aws: Aws, run: str) -> None:
    """Set the group to no instances. The instance commits, and ends.

    Args:
        aws: The account and region.
        run: The run's name.

    Raises:
        NotFound: There is no stack.
    """
    find_existing(aws, run)
    with translate_errors(f"the group {name_of(run)}"):
        aws.client("autoscaling").update_auto_scaling_group(
            AutoScalingGroupName=name_of(run), MinSize=0, DesiredCapacity=0
        )


def destroy(aws: Aws, run: str) -> None:
    """Stop the instance, and delete the stack. The bucket is kept.

    Args:
        aws: The account and region.
        run: The run's name.

    Raises:
        NotFound: There is no stack.
        RunError: A part of it cannot be deleted.
    """
    find_existing(aws, run)
    # The instance commits before the stack takes it away. A half-made stack may have no group.
    if group(aws, run):
        stop(aws, run)
    with translate_errors(f"the stack {name_of(run)}"):
        aws.client("cloudformation").delete_stack(StackName=name_of(run))
        _wait(aws, "stack_delete_complete", name_of(run))


def machines(aws: Aws, run: str) -> list[str]:
    """Return the state of the run's group and instances, a line each.

    Args:
        aws: The account and region.
        run: The run's name.
    """
    found = group(aws, run)
    if found is None:
        return [f"group {name_of(run)}: there is none in {aws.region}"]
    wanted = f"{found['DesiredCapacity']} wanted, {len(found['Instances'])} there"
    lines = [f"group {name_of(run)}: {wanted}{_describe_end(aws, run)}"]
    for each in found["Instances"]:
        kind = each.get("InstanceType") or "of a type that AWS does not name"
        where = f"{each['AvailabilityZone']}, {each['LifecycleState']}"
        lines.append(f"instance {each['InstanceId']}: {kind}, {where}")
    # AWS suspends a group whose instances failed to start for a day.
    for each in found.get("SuspendedProcesses", ()):
        suspended = f"{each['ProcessName']} ({each['SuspensionReason']})"
        lines.append(f"suspended: {suspended}; launch again to resume it")
    return lines + _describe_failure(aws, run)


def _describe_end(aws: Aws, run: str) -> str:
    """Return the time from which no instance runs; empty if none is set."""
    with translate_errors(f"the scheduled end of {run}"):
        found = aws.client("autoscaling").describe_scheduled_actions(
            AutoScalingGroupName=name_of(run)
        )
    for action in found["ScheduledUpdateGroupActions"]:
        if action["ScheduledActionName"] == END:
            return f", none from {action['StartTime']:%Y-%m-%d %H:%M} UTC on"
    return ""


def _describe_failure(aws: Aws, run: str) -> list[str]:
    """Return why the group's newest activity failed, if it did."""
    with translate_errors(f"the activities of {run}"):
        found = aws.client("autoscaling").describe_scaling_activities(
            AutoScalingGroupName=name_of(run), MaxRecords=1
        )
    lines = []
    for each in found["Activities"]:
        if each["StatusCode"] in ("Failed", "Cancelled"):
            cause = each.get("StatusMessage", "no more is known")
            lines.append(f"failed: {each['Description']}: {cause}")
    return lines


def group(aws: Aws, run: str) -> dict[str, Any] | None:
    """Return the run's group; None if there is none.

    Args:
        aws: The account and region.
        run: The run's name.
    """
    with translate_errors(f"the group {name_of(run)}"):
        found = aws.client("autoscaling").describe_auto_scaling_groups(
            AutoScalingGroupNames=[name_of(run)]
        )
    return next(iter(found["AutoScalingGroups"]), None)


def _describe(aws: Aws, name: str) -> list[dict[str, Any]]:
    """Return the stack of this name, as a list of one."""
    try:
        return aws.client("cloudformation").describe_stacks(StackName=name)["Stacks"]
    except ClientError as error:
        if "does not exist" in str(error):
            raise NotFound(f"there is no stack {name}") from error
        raise


def _wait(aws: Aws, state: str, name: str) -> None:
    """Wait until a stack has reached a state, as the waiters of boto3 name it."""
    try:
        aws.client("cloudformation").get_waiter(state).wait(StackName=name, WaiterConfig=WAIT)
    except WaiterError as error:
        raise RunError(
            f"the stack {name} failed: {_reason(aws, name)}; what was made of it is taken away"
        ) from error
    except KeyboardInterrupt as error:
        raise Interrupted(
            f"nobody waits any longer, but AWS goes on with the stack {name} by itself; "
            "do the same again in some minutes"
        ) from error


def _reason(aws: Aws, name: str) -> str:
    """Return the first failure, in CloudFormation's words."""
    with translate_errors(f"the stack {name}"):
        try:
            answer = aws.client("cloudformation").describe_stack_events(StackName=name)
        except ClientError:  # it is gone already
            return "CloudFormation's console shows the deleted stack's events"
    # The newest event comes first. The later failures follow from the first one.
    for event in reversed(answer["StackEvents"]):
        if event["ResourceStatus"].endswith("FAILED"):
            return f"{event['LogicalResourceId']}: {event.get('ResourceStatusReason', '')}"
    return "no more is known"
