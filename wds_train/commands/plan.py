"""`wds-train plan`: estimate hours, dollars and the bottleneck of a training.

Without arguments it compares all recipes on all instances, cheapest first.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from wds_train.aws.cost import IMAGENET, MACHINE_BENCH, Images, Machine, model_speed
from wds_train.aws.cost_table import (
    Row,
    apply_speeds,
    best,
    draw,
    plan_row,
    quotes,
    spot_prices,
    top1_of,
)
from wds_train.aws.prices import DATED, MACHINES
from wds_train.commands.bench import import_benchmark
from wds_train.commands.flags import add_bucket, dollars, resolve_dataset
from wds_train.config.presets import PRESETS, preset
from wds_train.config.recipe import Recipe
from wds_train.config.settings import with_settings
from wds_train.console import align_columns
from wds_train.errors import UsageError, did_you_mean

NOTE = (
    "(p) published in the named source, (i) inferred, (m) measured by this project. Inferred are "
    "the\n"
    "rates of GPUs and vCPUs, of which --calibrate measures this machine's, spot interruptions "
    "and the start."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recipe", metavar="NAME", help="(default: all with a known accuracy on ImageNet)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="K=V",
        dest="settings",
        help="with one field changed",
    )
    parser.add_argument("--instance", metavar="TYPE", help="(default: all whose price is known)")
    parser.add_argument(
        "--spot-price",
        type=dollars,
        metavar="USD",
        help="spot price per hour (default: AWS's current price, else the built-in table)",
    )
    parser.add_argument(
        "--dataset", metavar="DATASET", help="the dataset to train on (default: ImageNet)"
    )
    add_bucket(parser, "datasets/ lives")
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="measure this machine's decoding and GPU, in a minute",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="draw dollars and accuracy, a PNG")
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> int:
    if args.settings and args.recipe is None:
        raise UsageError("--set needs --recipe, whose field it changes")
    recipes = _imagenet_recipes()
    if args.recipe:
        recipes = [with_settings(preset(args.recipe), args.settings)]
    machines = list(MACHINES.values())
    if args.instance:
        machines = [_find_machine(args.instance)]
    images = IMAGENET
    if args.dataset:
        images = _read_images(resolve_dataset(args.dataset, args.bucket))
    if args.calibrate:
        machines = _calibrate(machines, recipes[0])

    rows = _plan_all(recipes, machines, images, args.spot_price)
    if args.json:
        plans: Any = [each.to_dict() for each in rows]
        if args.recipe and args.instance:
            plans = plans[0]
        print(json.dumps(plans, indent=1))
    else:
        lines = _describe_one(rows[0]) if len(rows) == 1 else _table(rows)
        print("\n".join([*lines, "", NOTE]))
    if args.out:
        draw(rows, args.out)
    return 0


def _imagenet_recipes() -> list[Recipe]:
    return [each.recipe for each in PRESETS.values() if top1_of(each) is not None]


def _find_machine(name: str) -> Machine:
    if name not in MACHINES:
        hint = did_you_mean(name, MACHINES) or f"; there are {', '.join(MACHINES)}"
        raise UsageError(f"there is no instance {name!r} in the plan's table{hint}")
    return MACHINES[name]


def _read_images(url: str) -> Images:
    from wds_train.dataset.reader import Dataset

    manifest = Dataset.open(url).manifest
    train = manifest.split("train")
    val = manifest.split("val")
    return Images(train.samples, val.samples, train.bytes / train.samples)


def _plan_all(
    recipes: list[Recipe], machines: list[Machine], images: Images, given: float | None
) -> list[Row]:
    """Return the plan of every recipe on every machine that has a price, cheapest first."""
    live: dict[str, float] = {}
    if given is None:
        try:
            live = spot_prices([each.type for each in machines])
        except UsageError as error:
            print(f"prices of {DATED}: {error}", file=sys.stderr)
    priced = quotes(machines, live, given)
    if not priced:
        raise UsageError(
            f"there is no price of {machines[0].type}; give --spot-price, dollars an hour"
        )
    found = []
    for recipe in recipes:
        for machine in machines:
            if machine.type in priced:
                quote = priced[machine.type]
                found.append(plan_row(PRESETS[recipe.name], recipe, machine, images, quote))
    return sorted(found, key=lambda each: each.plan.usd)


def _calibrate(machines: list[Machine], recipe: Recipe) -> list[Machine]:
    """Return `machines` with the measured speed of this machine's cores and GPU."""
    import torch

    decode = import_benchmark("benchmarks.decode_rates")
    train = import_benchmark("benchmarks.train_rates")
    rates = decode.bench_decode(decode.read_images(None))["img_per_s_per_core"]
    core = rates[decode.OURS] / MACHINE_BENCH
    if not torch.cuda.is_available():
        print(f"measured: a core is {core:.2f} of the reference; no GPU here", file=sys.stderr)
        return apply_speeds(machines, core, "", None)
    measured = train.bench_train(replace(recipe, batch=128), [224], steps=20, repeats=3)
    ours = next(each for each in measured["rows"] if each["way"] == "wds-train")
    rate = ours["img_s"] / model_speed(recipe.model)
    device = measured["device"]
    print(
        f"measured: a core is {core:.2f} of the reference; {device} {rate:.0f} img/s",
        file=sys.stderr,
    )
    return apply_speeds(machines, core, device, rate)


def _describe_one(found: Row) -> list[str]:
    """Return the lines of one plan, with the phases of its training."""
    plan = found.plan
    machine = MACHINES[plan.instance]
    cost = f"{plan.usd:.2f} at ${plan.price:g} an hour, spot ({found.quote.source})"
    if found.on_demand is not None:
        cost += f"; ${found.on_demand:.2f} on demand"
    parts = f"{machine.gpus} x {machine.gpu}, {machine.vcpus} vCPUs"
    facts = [
        ["recipe", f"{plan.recipe} on {plan.instance} ({parts})"],
        ["hours", f"{plan.hours:.1f}"],
        ["dollars", cost],
        ["waits for", plan.bottleneck],
        ["expected", found.expected],
    ]
    phases = [["", "px", "hours", "images a second that each part could give"]]
    for phase in plan.phases:
        rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in phase.rates.items())
        phases.append([phase.what, str(phase.side), f"{phase.seconds / 3600:.2f}", rates])
    lines = [*align_columns(facts), "", *align_columns(phases, right=(1, 2))]
    if found.resize:
        side, after = found.resize
        resized = f"{after.hours:.1f} hours, ${after.usd:.2f} (i)"
        lines += ["", f"converted with --resize-shorter {side}: {resized}"]
    return lines


def _table(rows: list[Row]) -> list[str]:
    """Return the lines of several plans, a row each."""
    kept = best(rows)
    table = [["", "recipe", "instance", "hours", "$", "top-1", "waits for", "$ an hour"]]
    for each in rows:
        plan = each.plan
        table.append(
            [
                "*" if each in kept else "",
                plan.recipe,
                plan.instance,
                f"{plan.hours:.1f}",
                f"{plan.usd:.2f}",
                "" if each.top1 is None else f"{each.top1:g}",
                plan.bottleneck,
                f"{plan.price:g} ({each.quote.source})",
            ]
        )
    return [*align_columns(table, right=(3, 4, 5)), "", "* no other gives more accuracy for less"]
