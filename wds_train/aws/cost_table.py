"""Plans for many recipes on many instances, with AWS's current prices, or else the table's.

`wds-train plan` prints and draws them; `wds-train launch` asks for the prices alone.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from wds_train.aws.cost import Images, Machine, Plan, pareto_front, plan, shrink
from wds_train.aws.prices import DATED, PRICES
from wds_train.config.presets import Preset
from wds_train.config.recipe import Recipe
from wds_train.errors import UsageError
from wds_train.tracking.schedule_plot import new_figure, save

PAYS = 0.95  # share of the dollars from which on a conversion to smaller images is mentioned
# As presets give it for ImageNet; of a range, the lower end.
TOP1 = re.compile(r"([\d.]+)(?:-[\d.]+)? % at \d+ px")
FIGURE_INCHES = (8, 5)


@dataclass(frozen=True)
class Quote:
    """The price of an instance.

    Attributes:
        usd: Dollars per hour.
        source: The origin of the price, for people.
        spot: It is that of a spot instance.
    """

    usd: float
    source: str
    spot: bool = True


@dataclass(frozen=True)
class Row:
    """A recipe on an instance.

    Attributes:
        plan: Hours, dollars and bottleneck.
        quote: The instance's price.
        on_demand: Dollars on demand; None if the table has no price.
        top1: Percent, on ImageNet.
        expected: The expected accuracy, with its source.
        resize: Pixels and plan after --resize-shorter; None if that does not pay.
    """

    plan: Plan
    quote: Quote
    on_demand: float | None
    top1: float | None
    expected: str
    resize: tuple[int, Plan] | None

    def to_dict(self) -> dict[str, Any]:
        """Return the row as `plan --json` prints it."""
        resize = None
        if self.resize:
            side, after = self.resize
            resize = {"px": side, "hours": after.hours, "usd": after.usd}
        return self.plan.to_dict() | {
            "price_source": self.quote.source,
            "usd_on_demand": self.on_demand,
            "top1": self.top1,
            "expected": self.expected,
            "resize_shorter": resize,
        }


def quotes(
    machines: Iterable[Machine], live: dict[str, float], given: float | None
) -> dict[str, Quote]:
    """Return the price of each instance that has one.

    Args:
        machines: The instances.
        live: AWS's current prices by instance type, dollars per hour.
        given: A person's price for all of them.
    """
    # A person's price comes before AWS's, and AWS's before the table's.
    found = {}
    for machine in machines:
        if given is not None:
            found[machine.type] = Quote(given, "as given")
        elif machine.type in live:
            found[machine.type] = Quote(live[machine.type], "AWS, now")
        elif machine.type in PRICES:
            low, high = PRICES[machine.type].spot
            found[machine.type] = Quote(PRICES[machine.type].middle, f"{DATED}: {low:g}-{high:g}")
    return found


def plan_row(found: Preset, recipe: Recipe, machine: Machine, images: Images, quote: Quote) -> Row:
    """Plan a recipe on an instance.

    Args:
        found: The preset that the recipe is of, which has its accuracy.
        recipe: The recipe, with a person's settings.
        machine: The instance.
        images: The dataset.
        quote: The price of the instance.

    Raises:
        UsageError: The speed of the model is unknown.
    """
    planned = plan(recipe, machine, images, quote.usd, spot=quote.spot)

    # With smaller images.
    side, smaller = shrink(images, recipe)
    after = plan(recipe, machine, smaller, quote.usd, spot=quote.spot)
    resize = None
    if after.usd <= PAYS * planned.usd:
        resize = (side, after)

    # On demand.
    on_demand = None
    price = PRICES.get(machine.type)
    if price:
        on_demand = plan(recipe, machine, images, price.on_demand, spot=False).usd

    expected = f"{found.expected}; source: {found.source}"
    return Row(planned, quote, on_demand, top1_of(found), expected, resize)


def top1_of(found: Preset) -> float | None:
    """Return the accuracy on ImageNet that a preset expects, in percent; None if it has none."""
    expected = TOP1.match(found.expected)
    if expected is None:
        return None
    return float(expected[1])


def best(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that no other one beats in both dollars and accuracy, the cheapest first."""
    # The accuracy is ImageNet's: presets for other datasets have none.
    known = _with_accuracy(rows)
    points = [(each.plan.usd, each.top1 or 0.0) for each in known]
    return [known[place] for place in pareto_front(points)]


def _with_accuracy(rows: Sequence[Row]) -> list[Row]:
    return [each for each in rows if each.top1 is not None]


def spot_prices(
    types: Sequence[str], client: Any = None, zone: Callable[[float, float], float] = min
) -> dict[str, float]:
    """Return AWS's current spot prices in the configured region, for Linux, dollars per hour.

    Args:
        types: The instance types.
        client: EC2's client. Default: one of the AWS settings.
        zone: `min` takes the price of the cheapest zone, `max` that of the dearest.

    Raises:
        UsageError: AWS does not answer.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    # AWS gives prices for each zone.
    entries = []
    try:
        client = client or _ec2()
        pages = client.get_paginator("describe_spot_price_history").paginate(
            InstanceTypes=types, ProductDescriptions=["Linux/UNIX"], StartTime=datetime.now(UTC)
        )
        for page in pages:
            entries += page["SpotPriceHistory"]
    except (BotoCoreError, ClientError, ValueError) as error:
        raise UsageError(f"AWS told no prices: {str(error)[:200]}") from error
    prices: dict[str, float] = {}
    for entry in entries:
        name = entry["InstanceType"]
        usd = float(entry["SpotPrice"])
        prices[name] = zone(prices.get(name, usd), usd)
    return prices


def _ec2() -> Any:
    """Return a client that gives up soon: the table has prices, too."""
    import boto3
    from botocore.config import Config

    session = boto3.session.Session()
    if session.get_credentials() is None:
        raise UsageError("no AWS credentials were found")
    patience = Config(
        connect_timeout=3, read_timeout=10, retries={"total_max_attempts": 1, "mode": "standard"}
    )
    return session.client("ec2", region_name=session.region_name or "us-east-1", config=patience)


def apply_speeds(
    machines: Sequence[Machine], core: float, gpu: str, gpu_rate: float | None
) -> list[Machine]:
    """Return machines with measured speeds.

    Args:
        machines: The instances.
        core: The speed of a core, as a share of the reference.
        gpu: This machine's GPU, as PyTorch calls it.
        gpu_rate: Its speed, for instances with the same GPU.
    """
    # PyTorch says "NVIDIA A100-SXM4-40GB", the table "A100".
    words = re.split(r"[\s-]", gpu)
    found = []
    for machine in machines:
        rate = machine.gpu_rate
        if gpu_rate and machine.gpu in words:
            rate = gpu_rate
        found.append(replace(machine, core=core, gpu_rate=rate))
    return found


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw dollars and accuracy of all rows as a PNG, the best joined by a line.

    Args:
        rows: The rows. One without an accuracy is left out.
        path: The file.
    """
    figure = new_figure(*FIGURE_INCHES)
    axes = figure.subplots()

    # All rows: a colour for each instance, in the order in which they come.
    points: dict[str, tuple[list[float], list[float]]] = {}
    for each in rows:
        usd, top1 = points.setdefault(each.plan.instance, ([], []))
        if each.top1 is not None:
            usd.append(each.plan.usd)
            top1.append(each.top1)
    for instance, (usd, top1) in points.items():
        axes.plot(usd, top1, "o", markersize=4, label=instance)

    # The best of them.
    kept = best(rows)
    best_usd = [each.plan.usd for each in kept]
    best_top1 = [each.top1 for each in kept]
    axes.step(best_usd, best_top1, where="post", color="0.5", linewidth=1)
    for each in kept:
        where = {"xytext": (4, -11), "textcoords": "offset points", "fontsize": "small"}
        axes.annotate(each.plan.recipe, (each.plan.usd, each.top1), **where)

    axes.set(
        xscale="log",
        xlabel="dollars",
        ylabel="top-1, %",
        title="What an accuracy on ImageNet costs",
    )
    axes.legend(frameon=False, fontsize="small")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)
