"""The checks before a launch on AWS.

They find the cost and all that would fail, each problem with its remedy, before anything is made.
`wds-train launch` prints them.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from wds_train.aws import stacks
from wds_train.aws.account import Aws, translate_errors
from wds_train.aws.cost import Images, Machine, Plan, plan
from wds_train.aws.cost_table import Quote, quotes, spot_prices
from wds_train.aws.prices import MACHINES
from wds_train.checkpoint.lease import read_run
from wds_train.config.recipe import Recipe
from wds_train.dataset.reader import Dataset
from wds_train.errors import NotFound, UsageError, WdsTrainError
from wds_train.storage.open import open_store
from wds_train.storage.proof import PROBES, prove

# The instance types of each size, as the stack's template has them.
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
# The vCPUs of the largest type of each size, which count against a quota.
VCPUS = {"small": 8, "medium": 16, "large": 48, "huge": 192, "a100": 96}
# The quotas of AWS, by code and name. A size without one of its own falls under GPU_QUOTA.
QUOTAS = {"a100": ("L-7212CCBC", "All P Spot Instance Requests")}
GPU_QUOTA = ("L-3819A6DF", "All G and VT Spot Instance Requests")
# The parameter in which AWS publishes the newest image.
IMAGE = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"
POOR = 3  # of 10: a placement score below which a wait is likely


@dataclass(frozen=True)
class Order:
    """The launch that a person asks for.

    Attributes:
        bucket: The bucket's name.
        prefix: The part of keys before runs/, which ends in a slash unless it is empty.
        run: The run's name.
        recipe: The recipe of the training.
        dataset: The dataset's address.
        size: One of SIZES.
        create_bucket: Make the bucket, which must not exist yet.
    """

    bucket: str
    prefix: str
    run: str
    recipe: Recipe
    dataset: str
    size: str
    create_bucket: bool = False

    @property
    def run_url(self) -> str:
        """The run's address."""
        return f"s3://{self.bucket}/{self.prefix}runs/{self.run}"


@dataclass
class LaunchChecks:
    """The findings of the checks, and the facts that the launch needs.

    Attributes:
        lines: A line for each check that passed, for the person.
        refused: A line for each that failed, with the remedy.
        has_bucket: The bucket exists.
        image: The id of the machine image.
        price: Dollars per hour of the dearest instance.
        hours: The longest time of the training; None if the plan does not know the model.
    """

    lines: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    has_bucket: bool = False
    image: str = ""
    price: float = 0.0
    hours: float | None = None

    def check(self, name: str, describe: Callable[[], str]) -> None:
        """Make one check.

        Args:
            name: Its name.
            describe: Returns its line, or raises an error that refuses the launch.
        """
        try:
            self.lines.append(f"{name:12}{describe()}")
        except WdsTrainError as error:
            self.refused.append(f"{name:12}{error}")


def preflight(aws: Aws, order: Order) -> LaunchChecks:
    """Check everything that can be known before a launch.

    Nothing is made, and no object stays in the bucket that was written for a check.

    Args:
        aws: The account and region.
        order: The launch.
    """
    found = LaunchChecks()
    found.check("account", aws.account)
    if found.refused:  # every other answer would be the same
        return found
    found.check("stack", lambda: _check_stack(aws, order.run))
    found.check("bucket", lambda: _check_bucket(aws, order, found))
    found.check("quota", lambda: _check_quota(aws, order.size))
    found.check("placement", lambda: _rate_placement(aws, order.size))
    found.check("image", lambda: _find_image(aws, found))
    # These three read or write the bucket. Without it there is no dataset to plan for.
    if found.has_bucket:
        found.check("run", lambda: _check_run(order.run_url))
        found.check("store", lambda: _check_store(order.run_url))
        found.check("plan", lambda: _plan(aws, order, found))
    return found


def _check_stack(aws: Aws, run: str) -> str:
    """Refuse a stack that cannot be updated."""
    name = stacks.name_of(run)
    stack = stacks.find(aws, run)
    if stack is None:
        return f"{name}, to be made"
    status = stack["StackStatus"]
    if status in stacks.BROKEN:
        raise UsageError(
            f"{name} is half-made ({status}); make destroy RUN={run}, and launch again"
        )
    if status.endswith("IN_PROGRESS"):
        raise UsageError(f"{name} is being changed ({status}); launch when that is over")
    return f"{name}, which exists"


def _check_bucket(aws: Aws, order: Order, found: LaunchChecks) -> str:
    """Refuse a bucket that the instance could not use, and note whether it exists."""
    try:
        answer = aws.client("s3").head_bucket(Bucket=order.bucket)
    except ClientError as error:
        # HEAD has no body with a code and a message: the status is all that S3 says.
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        if status == 404:
            return _check_missing_bucket(aws, order)
        if status == 403:
            raise UsageError(
                f"{order.bucket} is another account's, or these credentials may not use it; "
                "choose another"
            ) from error
        if status == 301:
            raise _wrong_region(order.bucket, _region_in(error.response), aws.region) from error
        raise UsageError(str(error)) from error
    except BotoCoreError as error:
        raise UsageError(f"S3 gave no answer: {error}") from error

    region = _region_in(answer) or aws.region
    if region != aws.region:
        raise _wrong_region(order.bucket, region, aws.region)
    if order.create_bucket:
        raise UsageError(f"{order.bucket} exists already; leave --create-bucket out")
    found.has_bucket = True
    return f"s3://{order.bucket}, in {region}"


def _check_missing_bucket(aws: Aws, order: Order) -> str:
    """Refuse a bucket that does not exist, unless it is to be made."""
    stack = stacks.find(aws, order.run)
    # A stack does not make its bucket a second time.
    if stack and stacks.parameters(stack).get("CreateBucket") == "yes":
        raise UsageError(
            f"{order.bucket}, which the stack made, was deleted; make destroy RUN={order.run}, "
            "and launch again"
        )
    if not order.create_bucket:
        raise UsageError(
            f"{order.bucket} does not exist; correct the name, or make it with --create-bucket"
        )
    return f"s3://{order.bucket}, to be made"


def _wrong_region(bucket: str, region: str, here: str) -> UsageError:
    return UsageError(
        f"{bucket} is in {region or 'another region'}, not in {here}, and every epoch would be "
        f"paid for as transfer; launch there: --region {region}"
    )


def _region_in(answer: Any) -> str:
    """Return the region that an answer of S3 names; empty if it names none."""
    headers = answer["ResponseMetadata"].get("HTTPHeaders", {})
    return headers.get("x-amz-bucket-region", "")


def _check_run(url: str) -> str:
    """Refuse a run that is over, or that is being trained."""
    try:
        manifest, _ = read_run(open_store(url))
    except NotFound:
        return f"{url}, to begin"
    if manifest.status == "done":
        raise UsageError(f"{url} is done already; choose another RUN=")
    # An owner that stopped renewing its lease is gone, whatever the status says.
    if manifest.status == "running" and time.time() - manifest.written < manifest.lease:
        raise UsageError(
            f"{url} is being trained by {manifest.owner}; stop that first, or choose another RUN="
        )
    step = 0
    if manifest.checkpoints:
        step = manifest.checkpoints[-1].progress.step
    return f"{url}, to go on at step {step}"


def _check_store(url: str) -> str:
    """Refuse a store on which two owners could overwrite each other's commits."""
    notes = ["refuses conditional writes as it must"]
    prove(open_store(url), PROBES, notes.append)
    return "; ".join(notes)


def _check_quota(aws: Aws, size: str) -> str:
    """Refuse a size that the account's quota does not allow; an unknown quota allows all."""
    # The rights to ask for it may be missing. AWS refuses the instance later, if it must.
    code, name = QUOTAS.get(size, GPU_QUOTA)
    try:
        with translate_errors("the quota"):
            answer = aws.client("service-quotas").get_service_quota(
                ServiceCode="ec2", QuotaCode=code
            )
            allowed = answer["Quota"]["Value"]
    except WdsTrainError as error:
        return f"not known ({error})"
    needed = VCPUS[size]
    if allowed >= needed:
        return f"{allowed:g} vCPUs of spot instances, {needed} needed"

    # The remedy: a smaller size if one fits, and the command that asks for more.
    smaller = _largest_size(allowed, QUOTAS.get(size))
    remedy = ""
    if smaller:
        remedy = f"give --size {smaller}, or "
    raise UsageError(
        f'the account\'s quota "{name}" is {allowed:g} vCPUs, and size {size} takes up to '
        f"{needed}; {remedy}ask for more: aws service-quotas request-service-quota-increase "
        f"--service-code ec2 --quota-code {code} --desired-value {needed}"
    )


def _largest_size(vcpus: float, quota: tuple[str, str] | None) -> str | None:
    """Return the last size that so many vCPUs of a quota allow; None if they allow none.

    Args:
        vcpus: The value of the quota.
        quota: The quota; None for GPU_QUOTA.
    """
    largest = None
    for size, needed in VCPUS.items():
        if needed <= vcpus and QUOTAS.get(size) == quota:
            largest = size
    return largest


def _rate_placement(aws: Aws, size: str) -> str:
    """Return how likely AWS has such an instance now, by its own score."""
    try:
        answer = aws.client("ec2").get_spot_placement_scores(
            InstanceTypes=[*SIZES[size]], TargetCapacity=1, RegionNames=[aws.region]
        )
    except (ClientError, BotoCoreError) as error:
        return f"not known ({str(error)[:100]})"
    scores = [each["Score"] for each in answer["SpotPlacementScores"]]
    score = max(scores, default=0)
    if score < POOR:
        return f"{score} of 10; expect to wait, or choose another size or region"
    return f"{score} of 10"


def _find_image(aws: Aws, found: LaunchChecks) -> str:
    """Note the id of AWS's newest machine image."""
    with translate_errors(f"AWS's image {IMAGE}"):
        answer = aws.client("ssm").get_parameter(Name=IMAGE)
    found.image = answer["Parameter"]["Value"]
    return f"{found.image}, AWS's newest Ubuntu 24.04 with NVIDIA's driver"


def _plan(aws: Aws, order: Order, found: LaunchChecks) -> str:
    """Note the price and the hours of the training, for the limit of the launch.

    AWS chooses the type and the zone. So the dearest hour and the longest time count.
    """
    manifest = Dataset.open(order.dataset).manifest
    train = manifest.split("train")
    images = Images(train.samples, manifest.split("val").samples, train.bytes / train.samples)

    # Prices by type: of the dearest zone, or else the table's.
    types = SIZES[order.size]
    try:
        live = spot_prices(types, aws.client("ec2"), max)
    except UsageError:
        live = {}
    machines = [MACHINES[each] for each in types if each in MACHINES]
    priced = quotes(machines, live, None)
    if not priced:
        raise UsageError(
            f"no price of {', '.join(types)} is known; let the credentials call "
            "ec2:DescribeSpotPriceHistory"
        )
    # AWS may name prices of types that the table lacks.
    found.price = max(live.values(), default=0.0)
    for quote in priced.values():
        found.price = max(found.price, quote.usd)

    # The plan. It knows few models; without it, the person has to set the limit.
    try:
        plans = _plan_each(order.recipe, machines, images, priced)
    except UsageError as error:
        return f"not known ({error})"
    hours = [each.hours for each in plans]
    usd = [each.usd for each in plans]
    found.hours = max(hours)
    return f"{min(hours):.1f} to {max(hours):.1f} hours, ${min(usd):.2f} to ${max(usd):.2f}"


def _plan_each(
    recipe: Recipe, machines: list[Machine], images: Images, priced: dict[str, Quote]
) -> list[Plan]:
    """Return the plan for each machine that has a price."""
    plans = []
    for machine in machines:
        if machine.type in priced:
            plans.append(plan(recipe, machine, images, priced[machine.type].usd, spot=True))
    return plans
