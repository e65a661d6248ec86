"""What carries our tag and costs money as long as it is there."""

from collections.abc import Iterator

from botocore.exceptions import ClientError

from wds_train.aws.account import Aws, told
from wds_train.aws.stacks import TAG

TAGGED = [{"Name": "tag-key", "Values": [TAG]}]
LIVING = {"Name": "instance-state-name", "Values": ["pending", "running", "stopping", "stopped"]}


def leftovers(aws: Aws) -> list[str]:
    """A line each, with what to do about it."""
    return [*_groups(aws), *_instances(aws), *_volumes(aws), *_buckets(aws)]


def _groups(aws: Aws) -> Iterator[str]:
    with told("the groups"):
        pages = aws.client("autoscaling").get_paginator("describe_auto_scaling_groups").paginate()
        found = [each for page in pages for each in page["AutoScalingGroups"]]
    for each in found:
        runs = [tag["Value"] for tag in each["Tags"] if tag["Key"] == TAG]
        if runs and each["DesiredCapacity"]:
            yield f"group     {each['AutoScalingGroupName']} wants {each['DesiredCapacity']} instance: make stop RUN={runs[0]}"


def _instances(aws: Aws) -> Iterator[str]:
    with told("the instances"):
        pages = aws.client("ec2").get_paginator("describe_instances").paginate(Filters=[*TAGGED, LIVING])
        found = [each for page in pages for part in page["Reservations"] for each in part["Instances"]]
    for each in found:
        yield (
            f"instance  {each['InstanceId']} ({each['InstanceType']}, {each['State']['Name']}): make stop RUN={_run(each)}, or "
            f"aws ec2 terminate-instances --instance-ids {each['InstanceId']}"
        )


def _volumes(aws: Aws) -> Iterator[str]:
    with told("the volumes"):
        pages = aws.client("ec2").get_paginator("describe_volumes").paginate(Filters=TAGGED)
        found = [each for page in pages for each in page["Volumes"]]
    for each in found:
        remedy = (
            "goes with its instance" if each["Attachments"] else f"aws ec2 delete-volume --volume-id {each['VolumeId']}"
        )
        yield f"volume    {each['VolumeId']} ({each['Size']} GiB, {each['State']}): {remedy}"


def _buckets(aws: Aws) -> Iterator[str]:
    s3 = aws.client("s3")
    with told("the buckets"):
        names = [each["Name"] for each in s3.list_buckets()["Buckets"]]
    for name in names:
        with told(f"the tags of {name}"):
            try:
                tags = s3.get_bucket_tagging(Bucket=name)["TagSet"]
            except ClientError:  # it has none, or is not ours to ask
                continue
        if any(tag["Key"] == TAG for tag in tags):
            yield f"bucket    {name}: holds datasets and runs, $.023 per GB and month; kept on purpose"


def _run(instance: dict[str, list[dict[str, str]]]) -> str:
    return next((tag["Value"] for tag in instance["Tags"] if tag["Key"] == TAG), "RUN")
