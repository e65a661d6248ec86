"""Lines for a person at the end of a training: how good it is, and what to type next."""

from shlex import quote

from wds_train.checkpoint.run_manifest import RunManifest
from wds_train.checkpoint.scores import NAMES, every_of, never_averaged, telling
from wds_train.checkpoint.weight_choice import best_weights
from wds_train.console import program
from wds_train.storage.address import shorten


def describe_outcome(run: RunManifest) -> list[str]:
    """Return lines on the accuracy of the last epoch, and of the best, of a run that is done."""
    # The last epoch, whose EMA weights may never have been updated.
    every = every_of(run.recipe)
    result = telling(run.result, run.step, every)
    ema = f"the EMA weights were {never_averaged(run.step, every)}"
    if "val/top1_ema" in result:
        ema = f"{result['val/top1_ema']:.2f} % EMA"
    lines = [f"last     top-1 {result['val/top1']:.2f} % raw, {ema}"]

    # The best one, whose checkpoint is kept.
    found = best_weights(run)
    if found:
        epoch = found.checkpoint.progress.evaluated
        top = f"top-1 {found.top1:.2f} % {NAMES[found.kind]}, of epoch {epoch}"
        lines.append(f"best     {top}: the weights that eval uses")
    return lines


def next_commands(run: RunManifest, url: str, *, test: bool) -> list[str]:
    """Return lines with commands that a person may want to type next.

    Args:
        run: The run, which is done.
        url: Its address.
        test: True if its dataset has a split "test".
    """
    name = quote(shorten(url))
    commands = []
    if test:
        commands.append(f"eval {name} --split test")

    # The raw weights are named where they are the better ones: most people expect the EMA's.
    found = best_weights(run)
    weights = ""
    if found and found.kind == "raw":
        weights = " --best raw"
    commands.append(f"export {name}{weights} --to {run.run}.safetensors")

    # The same with another seed, to see how much of a difference is chance.
    seed = run.recipe["seed"] + 1
    another = quote(shorten(f"{url.rstrip('/')}-seed-{seed}"))
    commands.append(f"train --like {name} --set seed={seed} --run {another}")

    lines = []
    label = "next"
    for command in commands:
        lines.append(f"{label:9}{program()} {command}")
        label = ""
    return lines


def resume_command(url: str) -> str:
    """Return the command that goes on with the run at `url`."""
    return f"{program()} train {quote(shorten(url))}"
