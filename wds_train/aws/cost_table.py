"""Plans for many recipes on many instances, with prices: AWS's of this moment where it tells them, the table's elsewhere."""

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

PAYS = 0.95  # of the dollars, at most, for which a conversion to smaller images is worth its word
TOP1 = re.compile(r"([\d.]+)(?:-[\d.]+)? % at \d+ px")  # as presets say it of ImageNet; of a span, its lower end


@dataclass(frozen=True)
class Quote:
    """Dollars an hour, and who says so."""

    usd: float
    source: str
    spot: bool = True


@dataclass(frozen=True)
class Row:
    plan: Plan
    quote: Quote
    on_demand: float | None
    """Dollars on demand, where the table has the price."""
    top1: float | None
    """Percent, on ImageNet."""
    expected: str
    resize: tuple[int, Plan] | None
    """The plan for images converted with --resize-shorter, and its pixels, where that pays."""

    def to_dict(self) -> dict[str, Any]:
        resize = self.resize and {"px": self.resize[0], "hours": self.resize[1].hours, "usd": self.resize[1].usd}
        added = {"price_source": self.quote.source, "usd_on_demand": self.on_demand, "top1": self.top1}
        return self.plan.to_dict() | added | {"expected": self.expected, "resize_shorter": resize}


def quotes(machines: Iterable[Machine], live: dict[str, float], given: float | None) -> dict[str, Quote]:
    """What each instance costs: as `given` by a person, else `live`, else as the table has it; who has no price is left out."""
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
    planned = plan(recipe, machine, images, quote.usd, spot=quote.spot)
    side, smaller = shrunk(images, recipe)
    after = plan(recipe, machine, smaller, quote.usd, spot=quote.spot)
    price = PRICES.get(machine.type)
    on_demand = plan(recipe, machine, images, price.on_demand, spot=False).usd if price else None
    expected = f"{found.expected}; source: {found.source}"
    pays = (side, after) if after.usd <= PAYS * planned.usd else None
    return Row(planned, quote, on_demand, top1_of(found), expected, pays)


def top1_of(found: Preset) -> float | None:
    """The accuracy on ImageNet that the preset expects, percent."""
    said = TOP1.match(found.expected)
    return float(said[1]) if said else None


def best(rows: Sequence[Row]) -> list[Row]:
    """Those that no other row beats in dollars and in accuracy."""
    known = [each for each in rows if each.top1 is not None]
    return [known[place] for place in front([(each.plan.usd, each.top1 or 0.0) for each in known])]


def spot_prices(
    types: Sequence[str], client: Any = None, zone: Callable[[float, float], float] = min
) -> dict[str, float]:
    """The spot price of each type in its cheapest `zone` of the configured region, or, by `max`, its dearest, of Linux, now;
    `UsageError` where AWS does not tell.
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
        name, usd = entry["InstanceType"], float(entry["SpotPrice"])
        prices[name] = zone(prices.get(name, usd), usd)
    return prices


def _ec2() -> Any:
    import boto3
    from botocore.config import Config

    session = boto3.session.Session()
    if session.get_credentials() is None:
        raise UsageError("no AWS credentials were found")
    patience = Config(connect_timeout=3, read_timeout=10, retries={"total_max_attempts": 1, "mode": "standard"})
    return session.client("ec2", region_name=session.region_name or "us-east-1", config=patience)


def calibrated(machines: Sequence[Machine], core: float, gpu: str, gpu_rate: float | None) -> list[Machine]:
    """`machines` with the speed of a core of this machine, and with `gpu_rate` those of its `gpu`, as PyTorch calls it."""
    words = re.split(r"[\s-]", gpu)
    return [
        replace(each, core=core, gpu_rate=gpu_rate if gpu_rate and each.gpu in words else each.gpu_rate)
        for each in machines
    ]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Dollars and accuracy of all rows as a PNG at `path`, the best joined by a line."""
    figure, kept = new_figure(8, 5), best(rows)
    axes = figure.subplots()
    for instance in dict.fromkeys(each.plan.instance for each in rows):
        of_it = [each for each in rows if each.plan.instance == instance and each.top1 is not None]
        axes.plot([e.plan.usd for e in of_it], [e.top1 for e in of_it], "o", markersize=4, label=instance)
    axes.step([e.plan.usd for e in kept], [e.top1 for e in kept], where="post", color="0.5", linewidth=1)
    for each in kept:
        where = {"xytext": (4, -11), "textcoords": "offset points", "fontsize": "small"}
        axes.annotate(each.plan.recipe, (each.plan.usd, each.top1), **where)
    axes.set(xscale="log", xlabel="dollars", ylabel="top-1, %", title="What an accuracy on ImageNet costs")
    axes.legend(frameon=False, fontsize="small")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)
