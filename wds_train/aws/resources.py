"""Resources that carry our tag and cost money as long as they exist, for `wds-train leftovers`."""

from collections.abc import Iterator
from typing import Any

from botocore.exceptions import ClientError

from wds_train.aws.account import Aws, translate_errors
from wds_train.aws.stacks import TAG

# Filters of EC2. A terminated instance is listed for an hour, and costs nothing.
TAGGED = [{"Name": "tag-key", "Values": [TAG]}]
LIVING = {"Name": "instance-state-name", "Values": ["pending", "running", "stopping", "stopped"]}


def leftovers(aws: Aws) -> list[str]:
    """Return a line for each resource, with the command that removes it.

    Args:
        aws: The account and region.
    """
    return [*_groups(aws), *_instances(aws), *_volumes(aws), *_buckets(aws)]


def _groups(aws: Aws) -> Iterator[str]:
    """Yield the groups that would start an instance again."""
    # All groups of the account come. Ours have the tag.
    found = []
    with translate_errors("the groups"):
        pages = aws.client("autoscaling").get_paginator("describe_auto_scaling_groups").paginate()
        for page in pages:
            found += page["AutoScalingGroups"]
    for each in found:
        run = _run_of(each)
        wanted = each["DesiredCapacity"]
        if run is not None and wanted:
            name = each["AutoScalingGroupName"]
            yield f"group     {name} wants {wanted} instance: make stop RUN={run}"


def _instances(aws: Aws) -> Iterator[str]:
    """Yield the instances that are not terminated."""
    found = []
    with translate_errors("the instances"):
        pages = aws.client("ec2").get_paginator("describe_instances")
        for page in pages.paginate(Filters=[*TAGGED, LIVING]):
            for reservation in page["Reservations"]:
                found += reservation["Instances"]
    for each in found:
        name = each["InstanceId"]
        run = _run_of(each)
        if run is None:  # the tag was removed since
            run = "RUN"
        yield (
            f"instance  {name} ({each['InstanceType']}, {each['State']['Name']}): "
            f"make stop RUN={run}, or aws ec2 terminate-instances --instance-ids {name}"
        )


def _volumes(aws: Aws) -> Iterator[str]:
    """Yield the volumes, also those that an instance has left behind."""
    found = []
    with translate_errors("the volumes"):
        pages = aws.client("ec2").get_paginator("describe_volumes").paginate(Filters=TAGGED)
        for page in pages:
            found += page["Volumes"]
    for each in found:
        name = each["VolumeId"]
        remedy = f"aws ec2 delete-volume --volume-id {name}"
        if each["Attachments"]:
            remedy = "goes with its instance"
        yield f"volume    {name} ({each['Size']} GiB, {each['State']}): {remedy}"


def _buckets(aws: Aws) -> Iterator[str]:
    """Yield the buckets, which a destroyed stack leaves."""
    s3 = aws.client("s3")
    with translate_errors("the buckets"):
        buckets = s3.list_buckets()["Buckets"]
    for bucket in buckets:
        name = bucket["Name"]
        with translate_errors(f"the tags of {name}"):
            try:
                tags = s3.get_bucket_tagging(Bucket=name)["TagSet"]
            except ClientError:  # it has no tags, or we may not read them
                continue
        # It holds the results, and no command of ours deletes it.
        if _tag_value(tags) is not None:
            kept = "holds datasets and runs, $.023 per GB and month; kept on purpose"
            yield f"bucket    {name}: {kept}"


def _run_of(resource: dict[str, Any]) -> str | None:
    """Return the name of the run that a resource belongs to; None if it is not ours."""
    return _tag_value(resource["Tags"])


def _tag_value(tags: list[dict[str, str]]) -> str | None:
    """Return the value of our tag; None if it is not among `tags`."""
    for tag in tags:
        if tag["Key"] == TAG:
            return tag["Value"]
    return None
