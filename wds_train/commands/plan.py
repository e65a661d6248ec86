"""`wds-train plan`: hours, dollars and the bottleneck of a training, before it; all recipes on all instances, cheapest first."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from wds_train.aws.cost import IMAGENET, MACHINE_BENCH, Images, Machine, model_speed
from wds_train.aws.cost_table import Row, best, calibrated, draw, quotes, row, spot_prices, top1_of
from wds_train.aws.prices import DATED, MACHINES
from wds_train.commands.flags import add_bucket, dataset_url, dollars
from wds_train.config.presets import PRESETS, preset
from wds_train.config.recipe import Recipe
from wds_train.config.settings import with_settings
from wds_train.errors import UsageError, did_you_mean

NOTE = (
    "(p) published in the named source, (i) inferred, (m) measured by this project. Inferred are the rates of GPUs and\n"
    "vCPUs, of which --calibrate measures this machine's, spot interruptions and the start."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", metavar="NAME", help="(default: all with a known accuracy on ImageNet)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="K=V", dest="settings", help="with one field changed"
    )
    parser.add_argument("--instance", metavar="TYPE", help="(default: all whose price is known)")
    parser.add_argument(
        "--spot-price", type=dollars, metavar="USD", help="an hour (default: AWS's, else a dated table)"
    )
    parser.add_argument("--dataset", metavar="DATASET", help="whose images (default: ImageNet's)")
    add_bucket(parser, "datasets/ lives")
    parser.add_argument("--calibrate", action="store_true", help="measure this machine's decoding and GPU, in a minute")
    parser.add_argument("--out", type=Path, metavar="FILE", help="draw dollars and accuracy, a PNG")
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> int:
    if args.settings and args.recipe is None:
        raise UsageError("--set needs --recipe, whose field it changes")
    recipes = [with_settings(preset(args.recipe), args.settings)] if args.recipe else _of_imagenet()
    machines = [_machine(args.instance)] if args.instance else [*MACHINES.values()]
    images = _images(dataset_url(args.dataset, args.bucket)) if args.dataset else IMAGENET
    if args.calibrate:
        machines = _calibrate(machines, recipes[0])
    rows = _rows(recipes, machines, images, args.spot_price)
    if args.json:
        single = args.recipe and args.instance
        print(json.dumps(rows[0].to_dict() if single else [each.to_dict() for each in rows], indent=1))
    else:
        print("\n".join([*(_one(rows[0]) if len(rows) == 1 else _table(rows)), "", NOTE]))
    if args.out:
        draw(rows, args.out)
    return 0


def _of_imagenet() -> list[Recipe]:
    return [each.recipe for each in PRESETS.values() if top1_of(each) is not None]


def _machine(name: str) -> Machine:
    if name not in MACHINES:
        hint = did_you_mean(name, MACHINES) or f"; there are {', '.join(MACHINES)}"
        raise UsageError(f"there is no instance {name!r} in the plan's table{hint}")
    return MACHINES[name]


def _images(url: str) -> Images:
    from wds_train.dataset.reader import Dataset

    manifest = Dataset.open(url).manifest
    train, val = manifest.split("train"), manifest.split("val")
    return Images(train.samples, val.samples, train.bytes / train.samples)


def _rows(recipes: list[Recipe], machines: list[Machine], images: Images, given: float | None) -> list[Row]:
    """Every recipe on every machine that has a price, cheapest first."""
    live: dict[str, float] = {}
    if given is None:
        try:
            live = spot_prices([each.type for each in machines])
        except UsageError as error:
            print(f"prices of {DATED}: {error}", file=sys.stderr)
    priced = quotes(machines, live, given)
    if not priced:
        raise UsageError(f"there is no price of {machines[0].type}; give --spot-price, dollars an hour")
    found = [
        row(PRESETS[recipe.name], recipe, machine, images, priced[machine.type])
        for recipe in recipes
        for machine in machines
        if machine.type in priced
    ]
    return sorted(found, key=lambda each: each.plan.usd)


def _calibrate(machines: list[Machine], recipe: Recipe) -> list[Machine]:
    """`machines` as if their vCPUs were this one's, and GPUs of this one's kind as it is."""
    import torch

    from benchmarks.decode_rates import OURS, bench_decode, read_images
    from benchmarks.train_rates import bench_train

    core = bench_decode(read_images(None))["img_per_s_per_core"][OURS] / MACHINE_BENCH
    if not torch.cuda.is_available():
        print(f"measured: a core is {core:.2f} of the reference; no GPU here", file=sys.stderr)
        return calibrated(machines, core, "", None)
    measured = bench_train(replace(recipe, batch=128), [224], steps=20, repeats=3)
    rate = next(each["img_s"] for each in measured["rows"] if each["way"] == "wds-train") / model_speed(recipe.model)
    print(f"measured: a core is {core:.2f} of the reference; {measured['device']} {rate:.0f} img/s", file=sys.stderr)
    return calibrated(machines, core, measured["device"], rate)


def _one(found: Row) -> list[str]:
    plan, machine = found.plan, MACHINES[found.plan.instance]
    on_demand = f"; ${found.on_demand:.2f} on demand" if found.on_demand is not None else ""
    lines = [
        f"recipe     {plan.recipe} on {plan.instance} ({machine.gpus} x {machine.gpu}, {machine.vcpus} vCPUs)",
        f"hours      {plan.hours:.1f}",
        f"dollars    {plan.usd:.2f} at ${plan.price:g} an hour, spot ({found.quote.source}){on_demand}",
        f"waits for  {plan.bottleneck}",
        f"expected   {found.expected}",
        "",
        f"{'':18}{'px':>4}{'hours':>8}  images a second that each part could give",
    ]
    for phase in plan.phases:
        rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in phase.rates.items())
        lines.append(f"{phase.what:18}{phase.side:4}{phase.seconds / 3600:8.2f}  {rates}")
    if found.resize:
        side, after = found.resize
        lines += ["", f"converted with --resize-shorter {side}: {after.hours:.1f} hours, ${after.usd:.2f} (i)"]
    return lines


def _table(rows: list[Row]) -> list[str]:
    kept = best(rows)
    lines = [f"  {'recipe':10}{'instance':15}{'hours':>8}{'$':>9}{'top-1':>8}  {'waits for':10} $ an hour"]
    for each in rows:
        plan, top1 = each.plan, "" if each.top1 is None else f"{each.top1:g}"
        mark = "*" if each in kept else " "
        lines.append(
            f"{mark} {plan.recipe:10}{plan.instance:15}{plan.hours:8.1f}{plan.usd:9.2f}{top1:>8}  {plan.bottleneck:10} "
            f"{plan.price:g} ({each.quote.source})"
        )
    return [*lines, "", "* no other gives more accuracy for less"]
