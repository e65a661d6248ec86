"""What a training takes on an instance: hours, dollars, and what it waits for. Pure arithmetic over the constants below.

(p): published in the named source. (m): measured by this project, docs/benchmarks.md, "Plan". (i): inferred.
"""

import math
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from wds_train.config.recipe import DataRecipe, ModelRecipe, Recipe
from wds_train.config.schedule import image_side
from wds_train.errors import UsageError

# ResNet50's training images per second at 224 px, mixed precision, channels last: a roofline of memory bandwidth and
# arithmetic (i), which A100s (2470, NVIDIA DLE) and H100s (2790 in fp16, Lambda) were measured around (p).
GPU_RATES = {
    "L4": 470.0,
    "A10G": 780.0,
    "L40S": 1500.0,
    "A100": 2080.0,
    "H100": 4400.0,
    "H200": 4900.0,
}
# Speed of the model's variants in timm, ResNet50's being 1 (p).
DEEP_STEM, SQUEEZE_EXCITE = 0.885, 0.80
# CPU milliseconds an image of 224 px, one core of a Xeon (Sapphire Rapids), beside the decoding (m); other sizes in proportion.
POLICIES = {"": 0.0, "rand": 0.84, "original": 0.61, "3a": 0.58, "trivial": 0.81}
JITTER, JITTER_HUE = 0.82, 2.50
# An instance's vCPU beside that core: 8 of a g5.2xlarge decode 880 img/s with Pillow (i), the core 375 (m).
VCPU = 880 / 8 / 375
MACHINE_BENCH = (
    593.0  # images per second, `wds-train bench decode` of its own two photographs on that core (m)
)
FORWARD = (
    1 / 3
)  # of a training step's work is the forward pass, which is all that a validation does
DRIVE_BYTES = 1e9  # a second, from each local disk (i)
NVME_SHARE = 0.9  # of the local disks that a cache may fill
REQUEST_SAMPLES = 20  # that a ranged read brings (m)
OVERHEAD, START_HOURS = (
    1.03,
    0.1,
)  # commits and the first steps of each epoch; boot, installation and first batch (i)
INTERRUPTED, AGAIN_HOURS = (
    0.05,
    0.1 + 10 / 60 / 2,
)  # a spot instance's per hour; boot, and half of --commit-minutes (i)
STORAGE, GET = (
    0.023 / 30 / 24,
    4e-7,
)  # dollars per GB and hour, and per request: S3 Standard, us-east-1 (p)


@dataclass(frozen=True)
class Software:
    """What runs. An image costs `ms` + `ms_per_kb` x its kilobytes of the Xeon core's time, without its policy."""

    ms: float
    ms_per_kb: float
    blur_pool: float
    """Speed of a model with blur-pool, the plain one's being 1."""
    evaluated: int
    """How many sets of weights each validation scores."""


# Decoding, cropping and resizing took 1.16 ms at 113 KB and .43 at 32; reading, CRC and batch another .40 (m). timm's
# blur-pool costs 25 % (p).
OURS = Software(ms=0.54, ms_per_kb=0.0090, blur_pool=0.75, evaluated=2)


@dataclass(frozen=True)
class Machine:
    """`network` is the baseline in Gbit/s, `nvme` the GB of all local `drives`, `core` a vCPU's speed, the Xeon core's
    being 1; `gpu_rate` ResNet50's images per second at 224 px on one GPU.
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


@dataclass(frozen=True)
class Images:
    """A dataset: samples to train and to validate on, and the mean bytes of one."""

    train: int
    val: int
    bytes: float


IMAGENET = Images(1_281_167, 50_000, 115_400)  # of 147,897,477,120 bytes (p)


@dataclass(frozen=True)
class Phase:
    """Work of one kind: `images` of `side` px. `rates`: how many a second each part would give, were it alone."""

    what: str
    side: int
    images: float
    rates: dict[str, float]

    @property
    def bottleneck(self) -> str:
        return min(self.rates, key=self.rates.__getitem__)

    @property
    def seconds(self) -> float:
        return self.images / self.rates[self.bottleneck]


@dataclass(frozen=True)
class Plan:
    recipe: str
    instance: str
    price: float
    """Dollars an hour."""
    spot: bool
    hours: float
    usd: float
    bottleneck: str
    """What most of the time is waited for."""
    phases: tuple[Phase, ...] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        rows = [
            asdict(phase) | {"bottleneck": phase.bottleneck, "hours": phase.seconds / 3600}
            for phase in self.phases
        ]
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
    """The whole training of `recipe` on one `machine`, which costs `price` dollars an hour."""
    phases = tuple(_phases(recipe, machine, images, software))
    waited: Counter[str] = Counter()
    for phase in phases:
        waited[phase.bottleneck] += round(phase.seconds * 1000)
    worked = sum(phase.seconds for phase in phases) / 3600 * OVERHEAD + START_HOURS
    hours = worked * (1 + INTERRUPTED * AGAIN_HOURS * spot)
    fetched = sum(phase.images for phase in phases if "network" in phase.rates)
    stored = (images.train + images.val) * images.bytes / 1e9
    usd = hours * price + stored * STORAGE * hours + fetched / REQUEST_SAMPLES * GET
    return Plan(
        recipe.name, machine.type, price, spot, hours, usd, waited.most_common(1)[0][0], phases
    )


def shrunk(images: Images, recipe: Recipe) -> tuple[int, Images]:
    """The shorter side in pixels that `recipe` looks at, and `images` converted with `--resize-shorter` to that: at 256 px
    the photographs of ImageNet keep .28 of their bytes (m), elsewhere in proportion to the area (i).
    """
    side = max(256, recipe.data.size, math.ceil(recipe.data.eval_size / recipe.data.eval_crop))
    return side, replace(images, bytes=min(images.bytes, 0.28 * IMAGENET.bytes * (side / 256) ** 2))


def front(rows: list[tuple[float, float]]) -> list[int]:
    """The places of those (dollars, accuracy) that no other beats in both: cheapest first."""
    best, kept = -math.inf, []
    for place in sorted(range(len(rows)), key=lambda each: (rows[each][0], -rows[each][1])):
        if rows[place][1] > best:
            best = rows[place][1]
            kept.append(place)
    return kept


def _phases(recipe: Recipe, machine: Machine, images: Images, software: Software) -> list[Phase]:
    """The epochs at each size, the first alone, as it fills the cache; then all validations together."""
    data, epochs = recipe.data, recipe.schedule.epochs
    model = model_speed(recipe.model, software)
    cached = images.train * images.bytes <= machine.nvme * 1e9 * NVME_SHARE
    epochs_of = Counter(
        (image_side(data, epoch, epochs), cached and epoch > 0) for epoch in range(epochs)
    )
    found = []
    for (side, from_disk), count in epochs_of.items():
        way, rate = (
            ("disk", machine.drives * DRIVE_BYTES)
            if from_disk
            else ("network", machine.network * 1e9 / 8)
        )
        rates = {way: rate / images.bytes * data.repeats}
        rates["GPU"] = machine.gpus * machine.gpu_rate * model * (224 / side) ** 2
        rates["decode"] = _decoded(
            machine, images.bytes, software, _policy_ms(data) * (side / 224) ** 2
        )
        found.append(Phase(f"training, {way}", side, count * images.train, rates))
    passes = software.evaluated * (1 + data.eval_flip)
    forward = machine.gpus * machine.gpu_rate * model / FORWARD * (224 / data.eval_size) ** 2
    rates = {"network": machine.network * 1e9 / 8 / images.bytes, "GPU": forward / passes}
    rates["decode"] = _decoded(machine, images.bytes, software, 0.0)
    return [*found, Phase("validation", data.eval_size, epochs * images.val, rates)]


def model_speed(model: ModelRecipe, software: Software = OURS) -> float:
    """The model's images per second, those of a plain ResNet50 being 1."""
    if model.name not in ("resnet50", "resnet50d"):
        raise UsageError(
            f"the plan knows the speed of resnet50 and resnet50d alone, not that of model.name = {model.name}"
        )
    deep = model.deep_stem or model.name == "resnet50d"
    speeds = (
        (deep, DEEP_STEM),
        (model.squeeze_excite, SQUEEZE_EXCITE),
        (model.blur_pool, software.blur_pool),
    )
    return math.prod(speed for on, speed in speeds if on)


def _decoded(machine: Machine, size: float, software: Software, policy_ms: float) -> float:
    """How many images of `size` bytes all vCPUs read, decode and augment in a second."""
    return (
        machine.vcpus
        * machine.core
        * 1000
        / (software.ms + software.ms_per_kb * size / 1000 + policy_ms)
    )


def _policy_ms(data: DataRecipe) -> float:
    policy = POLICIES.get(data.auto_augment.split("-")[0], max(POLICIES.values()))
    *others, hue = data.color_jitter
    return policy + (JITTER_HUE if hue else JITTER if any(others) else 0.0)
