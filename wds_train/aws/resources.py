"""Resources that carry our tag and cost money as long as they exist."""

from collections.abc import Iterator

from botocore.exceptions import ClientError

from wds_train.aws.account import Aws, translate_errors
from wds_train.aws.stacks import TAG

TAGGED = [{"Name": "tag-key", "Values": [TAG]}]
LIVING = {"Name": "instance-state-name", "Values": ["pending", "running", "stopping", "stopped"]}


def leftovers(aws: Aws) -> list[str]:
    """Return a line for each resource, with the command that removes it."""
    return [*_groups(aws), *_instances(aws), *_volumes(aws), *_buckets(aws)]


def _groups(aws: Aws) -> Iterator[str]:
    with translate_errors("the groups"):
        pages = aws.client("autoscaling").get_paginator("describe_auto_scaling_groups").paginate()
        found = [each for page in pages for each in page["AutoScalingGroups"]]
    for each in found:
        runs = [tag["Value"] for tag in each["Tags"] if tag["Key"] == TAG]
        if runs and each["DesiredCapacity"]:
            name = each["AutoScalingGroupName"]
            yield f"group     {name} wants {each['DesiredCapacity']} instance: make stop RUN={runs[0]}"


def _instances(aws: Aws) -> Iterator[str]:
    with translate_errors("the instances"):
        pages = (
            aws.client("ec2")
            .get_paginator("describe_instances")
            .paginate(Filters=[*TAGGED, LIVING])
        )
        found = []
        for page in pages:
            for reservation in page["Reservations"]:
                found += reservation["Instances"]
    for each in found:
        name = each["InstanceId"]
        yield (
            f"instance  {name} ({each['InstanceType']}, {each['State']['Name']}): "
            f"make stop RUN={_run(each)}, or aws ec2 terminate-instances --instance-ids {name}"
        )


def _volumes(aws: Aws) -> Iterator[str]:
    with translate_errors("the volumes"):
        pages = aws.client("ec2").get_paginator("describe_volumes").paginate(Filters=TAGGED)
        found = [each for page in pages for each in page["Volumes"]]
    for each in found:
        name = each["VolumeId"]
        remedy = f"aws ec2 delete-volume --volume-id {name}"
        if each["Attachments"]:
            remedy = "goes with its instance"
        yield f"volume    {name} ({each['Size']} GiB, {each['State']}): {remedy}"


def _buckets(aws: Aws) -> Iterator[str]:
    s3 = aws.client("s3")
    with translate_errors("the buckets"):
        names = [each["Name"] for each in s3.list_buckets()["Buckets"]]
    for name in names:
        with translate_errors(f"the tags of {name}"):
            try:
                tags = s3.get_bucket_tagging(Bucket=name)["TagSet"]
            except ClientError:  # it has none, or is not ours to ask
                continue
        if any(tag["Key"] == TAG for tag in tags):
            yield f"bucket    {name}: holds datasets and runs, $.023 per GB and month; kept on purpose"


def _run(instance: dict[str, list[dict[str, str]]]) -> str:
    """Return the name of the run that an instance trains."""
    for tag in instance["Tags"]:
        if tag["Key"] == TAG:
            return tag["Value"]
    return "RUN"
