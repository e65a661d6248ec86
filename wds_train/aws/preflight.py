"""What is looked at before anything is made: whoever launches hears all that would fail, with the remedy, and what it will cost."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from wds_train.aws import stacks
from wds_train.aws.account import Aws, translate_errors
from wds_train.aws.cost import Images, plan
from wds_train.aws.cost_table import quotes, spot_prices
from wds_train.aws.prices import MACHINES
from wds_train.checkpoint.lease import read_run
from wds_train.config.recipe import Recipe
from wds_train.dataset.reader import Dataset
from wds_train.errors import NotFound, UsageError, WdsTrainError
from wds_train.storage.open import open_store
from wds_train.storage.proof import PROBES, prove

# The stack's sizes, as its template has them.
SIZES = {
    "small": ("g5.2xlarge", "g6.2xlarge", "g6e.2xlarge", "g5.xlarge", "g6.xlarge", "g6e.xlarge"),
    "medium": (
        "g5.4xlarge",
        "g6.4xlarge",
        "g6e.4xlarge",
        "g5.2xlarge",
        "g6.2xlarge",
        "g6e.2xlarge",
    ),
    "large": ("g5.12xlarge", "g6.12xlarge", "g6e.12xlarge"),
    "huge": ("g5.48xlarge", "g6.48xlarge", "g6e.48xlarge"),
    "a100": ("p4d.24xlarge", "p4de.24xlarge"),
}
VCPUS = {"small": 8, "medium": 16, "large": 48, "huge": 192, "a100": 96}  # of its largest instance
QUOTAS = {"a100": ("L-7212CCBC", "All P Spot Instance Requests")}
GPU_QUOTA = ("L-3819A6DF", "All G and VT Spot Instance Requests")
IMAGE = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"
POOR = 3  # of 10: a placement score below which a wait is likely


@dataclass(frozen=True)
class Order:
    """What is to be launched. `bucket` is the bucket's name, `prefix` what comes before runs/ in it, ending with a slash."""

    bucket: str
    prefix: str
    run: str
    recipe: Recipe
    dataset: str
    size: str
    create_bucket: bool = False

    @property
    def run_url(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}runs/{self.run}"


@dataclass
class Findings:
    """What was found: `lines` for the person, `refused` of them with what has to be put right, and what the stack needs."""

    lines: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    has_bucket: bool = False
    image: str = ""
    price: float = 0.0
    hours: float | None = None
    """Which the plan says, if it knows the model."""

    def look(self, what: str, at: Callable[[], str]) -> None:
        """Note what `at` says, or the error that it raises, which refuses the launch."""
        try:
            self.lines.append(f"{what:12}{at()}")
        except WdsTrainError as error:
            self.refused.append(f"{what:12}{error}")


def preflight(aws: Aws, order: Order) -> Findings:
    """Everything that can be known beforehand; nothing is made, and no object stays that was written."""
    found = Findings()
    found.look("account", aws.account)
    if found.refused:  # every other answer would be the same
        return found
    found.look("stack", lambda: _stack(aws, order.run))
    found.look("bucket", lambda: _bucket(aws, order, found))
    found.look("quota", lambda: _quota(aws, order.size))
    found.look("placement", lambda: _placement(aws, order.size))
    found.look("image", lambda: _image(aws, found))
    if found.has_bucket:
        found.look("run", lambda: _run(order.run_url))
        found.look("store", lambda: _store(order.run_url))
        found.look("plan", lambda: _plan(aws, order, found))
    return found


def _stack(aws: Aws, run: str) -> str:
    stack = stacks.find(aws, run)
    if stack is None:
        return f"{stacks.name_of(run)}, to be made"
    status = stack["StackStatus"]
    if status in stacks.BROKEN:
        raise UsageError(
            f"{stacks.name_of(run)} is half-made ({status}); make destroy RUN={run}, and launch again"
        )
    if status.endswith("IN_PROGRESS"):
        raise UsageError(
            f"{stacks.name_of(run)} is being changed ({status}); launch when that is over"
        )
    return f"{stacks.name_of(run)}, which exists"


def _bucket(aws: Aws, order: Order, found: Findings) -> str:
    s3 = aws.client("s3")
    try:
        answer = s3.head_bucket(Bucket=order.bucket)
    except ClientError as error:
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        region = _region_in(error.response)
        if status == 404:
            return _missing(aws, order)
        if status == 403:
            raise UsageError(
                f"{order.bucket} is another account's, or these credentials may not use it; choose another"
            ) from error
        raise (
            _elsewhere(order.bucket, region, aws.region)
            if status == 301
            else UsageError(str(error))
        ) from error
    except BotoCoreError as error:
        raise UsageError(f"S3 gave no answer: {error}") from error
    region = _region_in(answer) or aws.region
    if region != aws.region:
        raise _elsewhere(order.bucket, region, aws.region)
    if order.create_bucket:
        raise UsageError(f"{order.bucket} exists already; leave --create-bucket out")
    found.has_bucket = True
    return f"s3://{order.bucket}, in {region}"


def _missing(aws: Aws, order: Order) -> str:
    stack = stacks.find(aws, order.run)
    if stack and stacks.parameters(stack).get("CreateBucket") == "yes":
        raise UsageError(
            f"{order.bucket}, which the stack made, was deleted; make destroy RUN={order.run}, and launch again"
        )
    if not order.create_bucket:
        raise UsageError(
            f"{order.bucket} does not exist; correct the name, or make it with --create-bucket"
        )
    return f"s3://{order.bucket}, to be made"


def _elsewhere(bucket: str, region: str, here: str) -> UsageError:
    return UsageError(
        f"{bucket} is in {region or 'another region'}, not in {here}, and every epoch would be paid for as transfer; launch there: --region {region}"
    )


def _region_in(answer: Any) -> str:
    return answer["ResponseMetadata"].get("HTTPHeaders", {}).get("x-amz-bucket-region", "")


def _run(url: str) -> str:
    try:
        manifest, _ = read_run(open_store(url))
    except NotFound:
        return f"{url}, to begin"
    if manifest.status == "done":
        raise UsageError(f"{url} is done already; choose another RUN=")
    if manifest.status == "running" and time.time() - manifest.written < manifest.lease:
        raise UsageError(
            f"{url} is being trained by {manifest.owner}; stop that first, or choose another RUN="
        )
    step = manifest.checkpoints[-1].progress.step if manifest.checkpoints else 0
    return f"{url}, to go on at step {step}"


def _store(url: str) -> str:
    told: list[str] = []
    prove(open_store(url), PROBES, told.append)
    return "; ".join(["refuses conditional writes as it must", *told])


def _quota(aws: Aws, size: str) -> str:
    code, name = QUOTAS.get(size, GPU_QUOTA)
    try:
        with translate_errors("the quota"):
            allowed = aws.client("service-quotas").get_service_quota(
                ServiceCode="ec2", QuotaCode=code
            )["Quota"]["Value"]
    except WdsTrainError as error:
        return f"not known ({error})"
    if allowed < VCPUS[size]:
        smaller = [
            each
            for each, vcpus in VCPUS.items()
            if vcpus <= allowed and QUOTAS.get(each) == QUOTAS.get(size)
        ]
        remedy = f"give --size {smaller[-1]}, or " if smaller else ""
        raise UsageError(
            f'the account\'s quota "{name}" is {allowed:g} vCPUs, and size {size} takes up to {VCPUS[size]}; {remedy}ask for more: '
            f"aws service-quotas request-service-quota-increase --service-code ec2 --quota-code {code} --desired-value {VCPUS[size]}"
        )
    return f"{allowed:g} vCPUs of spot instances, {VCPUS[size]} needed"


def _placement(aws: Aws, size: str) -> str:
    try:
        answer = aws.client("ec2").get_spot_placement_scores(
            InstanceTypes=[*SIZES[size]], TargetCapacity=1, RegionNames=[aws.region]
        )
        score = max((each["Score"] for each in answer["SpotPlacementScores"]), default=0)
    except (ClientError, BotoCoreError) as error:
        return f"not known ({str(error)[:100]})"
    return f"{score} of 10" + (
        "; expect to wait, or choose another size or region" if score < POOR else ""
    )


def _image(aws: Aws, found: Findings) -> str:
    with translate_errors(f"AWS's image {IMAGE}"):
        found.image = aws.client("ssm").get_parameter(Name=IMAGE)["Parameter"]["Value"]
    return f"{found.image}, AWS's newest Ubuntu 24.04 with NVIDIA's driver"


def _plan(aws: Aws, order: Order, found: Findings) -> str:
    manifest = Dataset.open(order.dataset).manifest
    train, val = manifest.split("train"), manifest.split("val")
    images = Images(train.samples, val.samples, train.bytes / train.samples)
    # Which type in which zone AWS will choose is not known: the dearest hour and the longest time are the ones to reckon with.
    try:
        live = spot_prices(SIZES[order.size], aws.client("ec2"), max)
    except UsageError:
        live = {}
    machines = [MACHINES[each] for each in SIZES[order.size] if each in MACHINES]
    priced = quotes(machines, live, None)
    if not priced:
        raise UsageError(
            f"no price of {', '.join(SIZES[order.size])} is known; let the credentials call ec2:DescribeSpotPriceHistory"
        )
    found.price = max([*live.values(), *(each.usd for each in priced.values())])
    try:
        plans = [
            plan(order.recipe, each, images, priced[each.type].usd, spot=True)
            for each in machines
            if each.type in priced
        ]
    except UsageError as error:
        return f"not known ({error})"
    found.hours = max(each.hours for each in plans)
    cheap, dear = min(each.usd for each in plans), max(each.usd for each in plans)
    return f"{min(each.hours for each in plans):.1f} to {found.hours:.1f} hours, ${cheap:.2f} to ${dear:.2f}"
