"""The hours, the dollars and the bottleneck of a training on an instance.

It is pure arithmetic over the constants below. Their sources: (p) published in the named place, (m)
measured by this project, docs/benchmarks.md, "Plan", (i) inferred.
"""

import math
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from wds_train.config.recipe import DataRecipe, ModelRecipe, Recipe
from wds_train.config.schedule import image_side
from wds_train.errors import UsageError

# ResNet50's training images per second at 224 px, mixed precision, channels last: a roofline of
# memory bandwidth and arithmetic (i), near which A100s (2470, NVIDIA DLE) and H100s (2790 in fp16,
# Lambda) were measured (p).
GPU_RATES = {
    "L4": 470.0,
    "A10G": 780.0,
    "L40S": 1500.0,
    "A100": 2080.0,
    "H100": 4400.0,
    "H200": 4900.0,
}
# Speeds of the model's variants in timm, of which ResNet50's is 1 (p).
DEEP_STEM = 0.885
SQUEEZE_EXCITE = 0.80
# The CPU's time for an image of 224 px without the decoding, in milliseconds of one core of a Xeon
# (Sapphire Rapids) (m). Other sizes take time in proportion to their pixels.
POLICIES = {"": 0.0, "rand": 0.84, "original": 0.61, "3a": 0.58, "trivial": 0.81}
JITTER = 0.82
JITTER_HUE = 2.50
# The speed of an instance's vCPU, of which that core's is 1: 8 vCPUs of a g5.2xlarge decode 880
# images per second with Pillow (i), the core 375 (m).
VCPU = 880 / 8 / 375
# `wds-train bench decode` of its own two photographs on that core, images per second (m).
MACHINE_BENCH = 593.0
# The forward pass's share of a training step's work. A validation does nothing else.
FORWARD = 1 / 3
DRIVE_BYTES = 1e9  # bytes per second of one local disk (i)
NVME_SHARE = 0.9  # of the local disks that a cache may fill
REQUEST_SAMPLES = 20  # samples that a ranged read brings (m)
OVERHEAD = 1.03  # the factor for commits and for the first steps of each epoch (i)
START_HOURS = 0.1  # boot, installation and first batch (i)
INTERRUPTED = 0.05  # interruptions of a spot instance per hour (i)
# The hours that one costs: the boot, and half of --commit-minutes, which are done again (i).
AGAIN_HOURS = 0.1 + 10 / 60 / 2
# S3 Standard in us-east-1 (p).
STORAGE = 0.023 / 30 / 24  # dollars per GB and hour
GET = 4e-7  # dollars per request

KNOWN_MODELS = ("resnet50", "resnet50d")


@dataclass(frozen=True)
class Software:
    """The speed of the training program.

    An image costs `ms` + `ms_per_kb` x its kilobytes of the Xeon core's time, without its policy.

    Attributes:
        ms: Milliseconds for each image.
        ms_per_kb: Milliseconds for each 1,000 bytes of it.
        blur_pool: The speed of a model with blur-pool, of which the plain one's is 1.
        evaluated: The sets of weights that each validation scores.
    """

    ms: float
    ms_per_kb: float
    blur_pool: float
    evaluated: int


# Decoding, cropping and resizing took 1.16 ms at 113 KB and .43 at 32; reading, CRC and batch
# another .40 (m). timm's blur-pool costs 25 % (p).
OURS = Software(ms=0.54, ms_per_kb=0.0090, blur_pool=0.75, evaluated=2)


@dataclass(frozen=True)
class Machine:
    """An instance type.

    Attributes:
        type: Its name.
        gpu: The name of its GPUs.
        gpus: Their number.
        vcpus: The number of its vCPUs.
        network: The baseline of its network, Gbit/s.
        nvme: The size of all local disks together, GB.
        drives: The number of local disks.
        gpu_rate: Training images per second of ResNet50 at 224 px on one GPU.
        core: The speed of a vCPU, of which the Xeon core's is 1.
    """

    type: str
    gpu: str
    gpus: int
    vcpus: int
    network: float
    nvme: float
    drives: int
    gpu_rate: float
    core: float = VCPU

    @property
    def network_bytes(self) -> float:
        """The baseline of the network in bytes per second."""
        return self.network * 1e9 / 8


@dataclass(frozen=True)
class Images:
    """The images of a dataset.

    Attributes:
        train: The number of samples to train on.
        val: The number of samples to validate on.
        bytes: The mean size of an image.
    """

    train: int
    val: int
    bytes: float


IMAGENET = Images(1_281_167, 50_000, 115_400)  # of 147,897,477,120 bytes (p)


@dataclass(frozen=True)
class Phase:
    """Work of one kind.

    Attributes:
        what: Its name.
        side: The side of the images, pixels.
        images: The number of images.
        rates: The images per second that each part of the machine would give if it were alone.
    """

    what: str
    side: int
    images: float
    rates: dict[str, float]

    @property
    def bottleneck(self) -> str:
        """The slowest part of the machine."""
        return min(self.rates, key=self.rates.__getitem__)

    @property
    def seconds(self) -> float:
        """The time that the slowest part takes."""
        return self.images / self.rates[self.bottleneck]


@dataclass(frozen=True)
class Plan:
    """A training on an instance.

    Attributes:
        recipe: The recipe's name.
        instance: The instance type.
        price: Dollars per hour.
        spot: It is a spot instance.
        hours: The time of the training.
        usd: Its dollars, with storage and requests.
        bottleneck: The part of the machine that most of the time is waited for.
        phases: The kinds of work.
    """

    recipe: str
    instance: str
    price: float
    spot: bool
    hours: float
    usd: float
    bottleneck: str
    phases: tuple[Phase, ...] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan for JSON."""
        rows = []
        for phase in self.phases:
            derived = {"bottleneck": phase.bottleneck, "hours": phase.seconds / 3600}
            rows.append(asdict(phase) | derived)
        return asdict(self) | {"phases": rows}


def plan(
    recipe: Recipe,
    machine: Machine,
    images: Images,
    price: float,
    *,
    spot: bool,
    software: Software = OURS,
) -> Plan:
    """Plan a whole training on one instance.

    Args:
        recipe: The recipe of the training.
        machine: The instance.
        images: The dataset.
        price: Dollars per hour of the instance.
        spot: It is a spot instance, which is interrupted now and then.
        software: The speed of the training program.

    Raises:
        UsageError: The speed of the model is unknown.
    """
    phases = tuple(_phases(recipe, machine, images, software))

    # The time. The bottleneck is that of the most milliseconds over all phases.
    waited: Counter[str] = Counter()
    for phase in phases:
        waited[phase.bottleneck] += round(phase.seconds * 1000)
    bottleneck, _ = waited.most_common(1)[0]
    hours = sum(phase.seconds for phase in phases) / 3600 * OVERHEAD + START_HOURS
    if spot:
        hours *= 1 + INTERRUPTED * AGAIN_HOURS

    # The dollars: of the instance, of the storage of the dataset, and of the requests. An image
    # from a local disk takes none.
    stored = (images.train + images.val) * images.bytes / 1e9
    fetched = sum(phase.images for phase in phases if "network" in phase.rates)
    usd = hours * price + stored * STORAGE * hours + fetched / REQUEST_SAMPLES * GET
    return Plan(recipe.name, machine.type, price, spot, hours, usd, bottleneck, phases)


def shrink(images: Images, recipe: Recipe) -> tuple[int, Images]:
    """Estimate a dataset after a conversion with --resize-shorter.

    At 256 px the photographs of ImageNet keep .28 of their bytes (m), at other sizes in proportion
    to the area (i).

    Args:
        images: The dataset as it is.
        recipe: The recipe, which must lose nothing that it looks at.

    Returns:
        The shorter side in pixels, and the images converted to it.
    """
    data = recipe.data
    side = max(256, data.size, math.ceil(data.eval_size / data.eval_crop))
    # Images that are smaller already stay as they are.
    size = 0.28 * IMAGENET.bytes * (side / 256) ** 2
    return side, replace(images, bytes=min(images.bytes, size))


def pareto_front(rows: list[tuple[float, float]]) -> list[int]:
    """Return the places of the rows that no other one beats in both dollars and accuracy.

    Args:
        rows: Dollars and accuracy of each.

    Returns:
        Their places in `rows`, the cheapest first.
    """

    # The cheapest first; of equally cheap ones, the most accurate.
    def dearness(place: int) -> tuple[float, float]:
        usd, accuracy = rows[place]
        return usd, -accuracy

    # Each dearer row has to be more accurate than all before it.
    front = []
    best = -math.inf
    for place in sorted(range(len(rows)), key=dearness):
        _, accuracy = rows[place]
        if accuracy > best:
            best = accuracy
            front.append(place)
    return front


def _phases(recipe: Recipe, machine: Machine, images: Images, software: Software) -> list[Phase]:
    """Return the epochs of each size, then all validations together.

    The first epoch is separate if there is room for a cache, which it fills.
    """
    data = recipe.data
    epochs = recipe.schedule.epochs
    train_rate = machine.gpus * machine.gpu_rate * model_speed(recipe.model, software)
    is_cached = images.train * images.bytes <= machine.nvme * 1e9 * NVME_SHARE

    # Epochs of the same size that read from the same place are one phase.
    count_of: Counter[tuple[int, bool]] = Counter()
    for epoch in range(epochs):
        count_of[image_side(data, epoch, epochs), is_cached and epoch > 0] += 1
    phases = []
    for (side, from_disk), count in count_of.items():
        way = "network"
        rate = machine.network_bytes
        if from_disk:
            way = "disk"
            rate = machine.drives * DRIVE_BYTES
        policy_ms = _policy_ms(data) * (side / 224) ** 2
        rates = {
            way: rate / images.bytes * data.repeats,
            "GPU": train_rate * (224 / side) ** 2,
            "decode": _decode_rate(machine, images.bytes, software, policy_ms),
        }
        phases.append(Phase(f"training, {way}", side, count * images.train, rates))

    # Every epoch is validated, once for each set of weights, and again for the mirror images.
    passes = software.evaluated * (1 + data.eval_flip)
    forward = train_rate / FORWARD * (224 / data.eval_size) ** 2
    rates = {
        "network": machine.network_bytes / images.bytes,
        "GPU": forward / passes,
        "decode": _decode_rate(machine, images.bytes, software, 0.0),
    }
    phases.append(Phase("validation", data.eval_size, epochs * images.val, rates))
    return phases


def model_speed(model: ModelRecipe, software: Software = OURS) -> float:
    """Return the speed of a model, of which a plain ResNet50's is 1.

    Args:
        model: The model.
        software: The speed of the training program.

    Raises:
        UsageError: Its speed is unknown.
    """
    if model.name not in KNOWN_MODELS:
        raise UsageError(
            "the plan knows the speed of resnet50 and resnet50d alone, not that of "
            f"model.name = {model.name}"
        )
    speed = 1.0
    if model.deep_stem or model.name == "resnet50d":
        speed *= DEEP_STEM
    if model.squeeze_excite:
        speed *= SQUEEZE_EXCITE
    if model.blur_pool:
        speed *= software.blur_pool
    return speed


def _decode_rate(machine: Machine, size: float, software: Software, policy_ms: float) -> float:
    """Return the images per second that all vCPUs read, decode and augment.

    Args:
        machine: The instance.
        size: The bytes of an image.
        software: The speed of the training program.
        policy_ms: The milliseconds of the augmentation of an image.
    """
    ms = software.ms + software.ms_per_kb * size / 1000 + policy_ms
    return machine.vcpus * machine.core * 1000 / ms


def _policy_ms(data: DataRecipe) -> float:
    """Return the milliseconds of the augmentation of an image of 224 px."""
    # The name comes before the settings, as in rand-m9-mstd0.5. An unknown policy counts as the
    # dearest one.
    name = data.auto_augment.split("-")[0]
    ms = POLICIES.get(name, max(POLICIES.values()))
    *others, hue = data.color_jitter
    # A shift of hue takes a conversion to HSV and back.
    if hue:
        return ms + JITTER_HUE
    if any(others):
        return ms + JITTER
    return ms
