"""Lines for a person at the end of a training: how good it is, and what to type next."""

from shlex import quote

from wds_train.checkpoint.run_manifest import RunManifest
from wds_train.checkpoint.scores import NAMES, every_of, never_averaged, telling
from wds_train.checkpoint.weight_choice import best_weights
from wds_train.console import program
from wds_train.storage.address import shorten


def outcome(run: RunManifest) -> list[str]:
    """Return the best epoch's accuracy, and the last's."""
    every = every_of(run.recipe)
    result = telling(run.result, run.step, every)
    ema = f"the EMA weights were {never_averaged(run.step, every)}"
    if "val/top1_ema" in result:
        ema = f"{result['val/top1_ema']:.2f} % EMA"
    lines = [f"last     top-1 {result['val/top1']:.2f} % raw, {ema}"]
    if found := best_weights(run):
        epoch = found.checkpoint.progress.evaluated
        top = f"top-1 {found.top1:.2f} % {NAMES[found.kind]}, of epoch {epoch}"
        lines.append(f"best     {top}: the weights that eval takes")
    return lines


def next_commands(run: RunManifest, url: str, *, test: bool) -> list[str]:
    """Return what suits this run, at `url`, whose dataset has a split for a last `test` or not."""
    wds_train = program()
    name = quote(shorten(url))
    found = best_weights(run)
    seed = run.recipe["seed"] + 1
    weights = " --best raw" if found and found.kind == "raw" else ""
    another = quote(shorten(f"{url.rstrip('/')}-seed-{seed}"))
    commands = [f"eval {name} --split test"] if test else []
    commands.append(f"export {name}{weights} --to {run.run}.safetensors")
    commands.append(f"train --like {name} --set seed={seed} --run {another}")
    return [
        f"{'' if number else 'next':9}{wds_train} {command}"
        for number, command in enumerate(commands)
    ]


def resume_command(url: str) -> str:
    """Return the command that goes on with the run at `url`."""
    return f"{program()} train {quote(shorten(url))}"
