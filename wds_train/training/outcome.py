"""What to tell a person at the end of a training: how good it is, and what to type next."""

from shlex import quote

from wds_train.checkpoint.find import SCORES, best_kind
from wds_train.checkpoint.manifest import RunManifest, best
from wds_train.storage.address import brief
from wds_train.tracking.console import program

NAMES = {"raw": "raw", "ema": "EMA"}


def outcome(run: RunManifest) -> list[str]:
    """The best epoch's accuracy, and the last's."""
    kind, result = best_kind(run.checkpoints), run.result
    lines = [f"last     top-1 {result['val/top1']:.2f} % raw, {result['val/top1_ema']:.2f} % EMA"]
    if found := best(run.checkpoints, SCORES[kind]):
        top = f"top-1 {found.metrics[SCORES[kind]]:.2f} % {NAMES[kind]}, of epoch {found.progress.evaluated}"
        lines.append(f"best     {top}: the weights that eval takes")
    return lines


def next_commands(run: RunManifest, url: str, *, test: bool) -> list[str]:
    """What suits this run, at `url`, whose dataset has a split for a last `test` or not."""
    wds_train, name, kind = program(), quote(brief(url)), best_kind(run.checkpoints)
    weights, seed = "" if kind == "ema" else f" --best {kind}", run.recipe["seed"] + 1
    another = quote(brief(f"{url.rstrip('/')}-seed-{seed}"))
    commands = [f"eval {name} --split test"] if test else []
    commands.append(f"export {name}{weights} --to {run.run}.safetensors")
    commands.append(f"train --like {name} --set seed={seed} --run {another}")
    return [f"{'' if number else 'next':9}{wds_train} {command}" for number, command in enumerate(commands)]


def going_on(url: str) -> str:
    """The command that goes on with the run at `url`."""
    return f"{program()} train {quote(brief(url))}"
