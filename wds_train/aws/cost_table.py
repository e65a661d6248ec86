"""Plans for many recipes on many instances, with AWS's current prices, or else the table's."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from wds_train.aws.cost import Images, Machine, Plan, front, plan, shrunk
from wds_train.aws.prices import DATED, PRICES
from wds_train.config.presets import Preset
from wds_train.config.recipe import Recipe
from wds_train.errors import UsageError
from wds_train.tracking.schedule_plot import new_figure, save

PAYS = 0.95  # share of the dollars from which on a conversion to smaller images is mentioned
# As presets give it for ImageNet; of a range, the lower end.
TOP1 = re.compile(r"([\d.]+)(?:-[\d.]+)? % at \d+ px")


@dataclass(frozen=True)
class Quote:
    """A price in dollars an hour, with its source."""

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
        """Return what `plan --json` prints."""
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
        live: AWS's current prices by instance type, dollars an hour.
        given: A person's price for all of them.
    """
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


def row(found: Preset, recipe: Recipe, machine: Machine, images: Images, quote: Quote) -> Row:
    """Return the plan of a recipe on an instance."""
    planned = plan(recipe, machine, images, quote.usd, spot=quote.spot)
    side, smaller = shrunk(images, recipe)
    after = plan(recipe, machine, smaller, quote.usd, spot=quote.spot)
    price = PRICES.get(machine.type)
    on_demand = plan(recipe, machine, images, price.on_demand, spot=False).usd if price else None
    expected = f"{found.expected}; source: {found.source}"
    pays = (side, after) if after.usd <= PAYS * planned.usd else None
    return Row(planned, quote, on_demand, top1_of(found), expected, pays)


def top1_of(found: Preset) -> float | None:
    """Return the accuracy on ImageNet that the preset expects, in percent."""
    said = TOP1.match(found.expected)
    return float(said[1]) if said else None


def best(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that no other one beats in both dollars and accuracy."""
    known = [each for each in rows if each.top1 is not None]
    return [known[place] for place in front([(each.plan.usd, each.top1 or 0.0) for each in known])]


def spot_prices(
    types: Sequence[str], client: Any = None, zone: Callable[[float, float], float] = min
) -> dict[str, float]:
    """Return AWS's current spot prices in the configured region, for Linux, dollars an hour.

    Args:
        types: The instance types.
        client: EC2's client. Default: one of the AWS settings.
        zone: `min` takes the price of the cheapest zone, `max` that of the dearest.

    Raises:
        UsageError: AWS does not answer.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        client = client or _ec2()
        pages = client.get_paginator("describe_spot_price_history").paginate(
            InstanceTypes=types, ProductDescriptions=["Linux/UNIX"], StartTime=datetime.now(UTC)
        )
        found = [entry for page in pages for entry in page["SpotPriceHistory"]]
    except (BotoCoreError, ClientError, ValueError) as error:
        raise UsageError(f"AWS told no prices: {str(error)[:200]}") from error
    prices: dict[str, float] = {}
    for entry in found:
        name = entry["InstanceType"]
        usd = float(entry["SpotPrice"])
        prices[name] = zone(prices.get(name, usd), usd)
    return prices


def _ec2() -> Any:
    import boto3
    from botocore.config import Config

    session = boto3.session.Session()
    if session.get_credentials() is None:
        raise UsageError("no AWS credentials were found")
    patience = Config(
        connect_timeout=3, read_timeout=10, retries={"total_max_attempts": 1, "mode": "standard"}
    )
    return session.client("ec2", region_name=session.region_name or "us-east-1", config=patience)


def calibrated(
    machines: Sequence[Machine], core: float, gpu: str, gpu_rate: float | None
) -> list[Machine]:
    """Return `machines` with measured speeds.

    Args:
        machines: The instances.
        core: The speed of a core, as a share of the reference.
        gpu: This machine's GPU, as PyTorch calls it.
        gpu_rate: Its speed, for instances with the same GPU.
    """
    words = re.split(r"[\s-]", gpu)
    found = []
    for machine in machines:
        rate = machine.gpu_rate
        if gpu_rate and machine.gpu in words:
            rate = gpu_rate
        found.append(replace(machine, core=core, gpu_rate=rate))
    return found


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw dollars and accuracy of all rows as a PNG at `path`, the best joined by a line."""
    figure = new_figure(8, 5)
    kept = best(rows)
    axes = figure.subplots()
    for instance in dict.fromkeys(each.plan.instance for each in rows):
        own = [each for each in rows if each.plan.instance == instance and each.top1 is not None]
        usd = [each.plan.usd for each in own]
        top1 = [each.top1 for each in own]
        axes.plot(usd, top1, "o", markersize=4, label=instance)
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
