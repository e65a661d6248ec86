"""`wds-train bench gpu`: all that needs a GPU, by one command, into one folder.

The folder gets JSON, a Markdown table and pictures. Each part runs in a process of its own
(gpu_parts.py), and is not repeated if its file says that it is complete. A part that cannot run, or
fails, says so in a line, and the others run.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts import FUNCTIONS, run_part
from benchmarks.gpu_training import PROCESSES
from benchmarks.gpu_work import FULL, SMOKE, Work
from wds_train.config.numbers import above_zero
from wds_train.errors import UsageError
from wds_train.tracking.schedule_plot import new_figure, save

TITLES = {
    "a": "training steps beside timm's loop",
    "b": "the trainer fed by the real loader",
    "c": "commits",
    "d": "kill -9 and resume",
    "e": "a batch too large for the memory",
    "f": "two ranks on one GPU",
    "g": "Imagenette at 128 px",
}
# Of the minutes. A part that needs less leaves the rest to those after it.
SHARES = {
    "a": 6.0,
    "b": 2.0,
    "c": 0.5,
    "d": 2.0,
    "e": 0.5,
    "f": 1.0,
    "g": 8.0,
}
GOALS = {5: 87.4, 20: 91.6, 80: 93.5}  # epochs: top-1 in percent of the public leaderboard
# For a part to notice that its time is up, and to stop what it started.
GRACE_SECONDS = 120.0
NOT_MEASURED = "not measured"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `wds-train bench gpu` to its parser."""
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        required=True,
        metavar="DIR",
        help="a dataset, or a folder of train/ and val/ with a folder a class",
    )
    add(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="for the results; again: goes on behind those there",
    )
    add(
        "--minutes",
        type=above_zero,
        default=20.0,
        metavar="M",
        help="for all parts together (default: %(default)s)",
    )
    add("--parts", default=",".join(TITLES), metavar="a,b,...", help="which (default: %(default)s)")
    add(
        "--smoke",
        action="store_true",
        help="at a tiny scale, on the CPU: whether everything works, no figures to keep",
    )


def run(args: argparse.Namespace) -> int:
    """Run the parts one after the other, and return 1 if one of them failed.

    Raises:
        UsageError: A part is unknown, or the results cannot go to `--out`.
    """
    parts = args.parts.split(",")
    _prepare_out(parts, args)
    out = args.out.resolve()
    end = time.monotonic() + 60 * args.minutes

    # Read by PyTorch's import, which is in the server that all processes are forked from.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    PROCESSES.set_forkserver_preload(["wds_train.training.run_training", "benchmarks.gpu_parts"])
    dataset, no_dataset = _dataset(args.data.resolve(), out)
    scale = SMOKE if args.smoke else FULL

    failed = False
    for number, part in enumerate(parts):
        # What earlier parts did not use is shared by all that are left.
        left = sum(SHARES[each] for each in parts[number:])
        now = time.monotonic()
        until = now + (end - now) * SHARES[part] / left
        outcome = _run(part, Work(dataset, no_dataset, out, scale, until, args.smoke))
        failed |= outcome.startswith("failed")
        print(f"part {part}, {TITLES[part]}: {outcome}", flush=True)
        # Drawn after every part: the machine may vanish before the next ends.
        table = render(out)
    print(f"\n{table}\n\n{out / 'benchmarks.md'}")
    return int(failed)


def _prepare_out(parts: list[str], args: argparse.Namespace) -> None:
    """Make the folder of the results.

    Raises:
        UsageError: A part is unknown, or the folder cannot be made, or holds other figures.
    """
    unknown = sorted(set(parts) - set(TITLES))
    if unknown:
        raise UsageError(
            f"--parts {args.parts}: there is no part {', '.join(unknown)}; "
            f"there are {', '.join(TITLES)}"
        )
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--out {args.out} cannot be made: {error.strerror}; name another folder"
        ) from error
    asked = {"data": str(args.data.resolve()), "smoke": args.smoke}
    _refuse_another(args.out / "bench.json", asked)


def _refuse_another(path: Path, asked: dict[str, Any]) -> None:
    """Raise `UsageError` if the figures there are of something else: the table would mix them."""
    if path.exists() and json.loads(path.read_text()) != asked:
        raise UsageError(
            f"--out {path.parent} holds figures of other --data or --smoke than {asked}; "
            "name another folder"
        )
    path.write_text(json.dumps(asked))


def _dataset(data: Path, out: Path) -> tuple[str, str]:
    """Find the dataset at `data`, or convert the images there.

    Returns:
        The dataset's address and "", or "" and the reason why there is none.
    """
    made = out / "dataset"
    for folder in (data, made):
        if (folder / "manifest.json").exists():
            return str(folder), ""
    from wds_train.cli import main

    if not data.is_dir():
        return "", f"--data {data} is no folder"
    if main(["shards", str(data), str(made)]):
        return "", f"--data {data} holds neither a dataset nor images that `wds-train shards` takes"
    return str(made), ""


def _run(part: str, work: Work) -> str:
    """Run a part to its end, and return its outcome in words."""
    path = work.out / f"{part}.json"
    if _read(path).get("complete"):
        return "measured already"
    process = PROCESSES.Process(target=run_part, args=(part, work), daemon=False)
    process.start()

    # Give it its time, and a little more to stop what it started.
    process.join(max(0.0, work.until - time.monotonic()) + GRACE_SECONDS)
    if process.exitcode is None:
        process.terminate()
        process.join(GRACE_SECONDS / 2)
        process.kill()
        process.join()
        return (
            "stopped in the midst of a row, its time being up; "
            "more --minutes, and the same command goes on there"
        )
    if process.exitcode:
        return f"failed with code {process.exitcode}; its last words are above"

    # The part ended by itself: its file says how far it came.
    found = _read(path)
    outcome = ["done"]
    if not found["complete"]:
        outcome = [found["note"] or "done in part"]
    for row, figures in found["rows"].items():
        if "failed" in figures:
            outcome.append(f"{row}: {figures['failed']}")
    return "; ".join(outcome)


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    return json.loads(path.read_text())


def render(out: Path) -> str:
    """Write the Markdown table of all parts to benchmarks.md, and draw what can be drawn.

    Args:
        out: The folder of the results.

    Returns:
        The table.
    """
    found = {part: _read(out / f"{part}.json") for part in TITLES}
    lines = [_about(found), "", "| part | row | figures |", "|-|-|-|"]
    for part, title in TITLES.items():
        lines += _part_lines(f"({part}) {title}", found[part])
    lines += _goals(found["g"].get("rows", {}))
    text = "\n".join(lines)
    (out / "benchmarks.md").write_text(text + "\n")
    _draw(out, found)
    return text


def _part_lines(title: str, found: dict[str, Any]) -> list[str]:
    """Return a line for every row of a part, and one for what was not measured."""
    rows = found.get("rows", {})
    note = found.get("note", "")
    lines = []
    if not rows or note:
        missing = "the rest" if rows else ""
        reason = f": {note}" if note else ""
        lines.append(f"| {title} | {missing} | {NOT_MEASURED}{reason} |")
    for row, figures in rows.items():
        lines.append(f"| {title} | {row} | {_figures(figures)} |")
    return lines


def _about(found: dict[str, dict[str, Any]]) -> str:
    """Describe the machine and the versions, as the first part that ran found them."""
    known = [each for each in found.values() if each]
    if not known:
        return f"Nothing: {NOT_MEASURED}"
    first = known[0]

    # Not every part uses the GPU.
    device = "no GPU was used"
    for each in known:
        if each["device"]:
            device = each["device"]
            break
    versions = []
    for name, number in first["versions"].items():
        if number:
            versions.append(f"{name} {number}")
    return f"{device}; {first['machine']}; Python {first['python']}, {', '.join(versions)}"


def _figures(figures: dict[str, Any]) -> str:
    named = []
    for name, value in figures.items():
        if isinstance(value, float):
            named.append(f"{name} {value:.4g}")
        else:
            named.append(f"{name} {value}")
    return ", ".join(named)


def _scores(rows: dict[str, Any]) -> dict[int, list[float]]:
    """Return top-1 of every seed, by epochs, of the runs after the search."""
    scores: dict[int, list[float]] = {}
    for row, figures in rows.items():
        first, _, rest = row.partition(" ")
        if rest.startswith("epochs") and "top1" in figures:
            scores.setdefault(int(first), []).append(figures["top1"])
    return scores


def _goals(rows: dict[str, Any]) -> list[str]:
    """Return a table of what Imagenette's leaderboard has, and what was reached."""
    lines = ["", "| Imagenette, 128 px, epochs | goal | mean top-1 | seeds |", "|-|-|-|-|"]
    reached = _scores(rows)
    for epochs, goal in GOALS.items():
        scores = reached.get(epochs, [])
        mean = NOT_MEASURED
        if scores:
            mean = f"{sum(scores) / len(scores):.2f}"
        lines.append(f"| {epochs} | {goal} | {mean} | {len(scores)} |")
    return lines


def _draw(out: Path, found: dict[str, dict[str, Any]]) -> None:
    """Draw the figures of those parts that are rates or scores."""
    # Part a: every way of every row that has rates.
    step_rates: dict[str, float] = {}
    for row, ways in found["a"].get("rows", {}).items():
        if "failed" not in ways:
            for way, rate in ways.items():
                step_rates[f"{row}, {way}"] = rate
    _draw_bars(out, "a", "img/s", step_rates)

    # Part b: the loaders, and the trainer that they feed.
    loader_rates: dict[str, float] = {}
    for row, figures in found["b"].get("rows", {}).items():
        if "img_per_s" in figures:
            loader_rates[row] = figures["img_per_s"]
    _draw_bars(out, "b", "img/s", loader_rates)

    # Part g: means over the seeds.
    means: dict[str, float] = {}
    for epochs, scores in _scores(found["g"].get("rows", {})).items():
        means[f"{epochs} epochs"] = sum(scores) / len(scores)
    _draw_bars(out, "g", "mean top-1, %", means)


def _draw_bars(out: Path, part: str, unit: str, values: dict[str, float]) -> None:
    """Draw a bar for each value into PART.png; nothing if there are none."""
    if not values:
        return
    figure = new_figure(10, max(2.0, 0.25 * len(values)))
    axes = figure.subplots()
    axes.barh(list(values), list(values.values()))
    axes.invert_yaxis()  # the first row on top
    axes.set(title=TITLES[part], xlabel=unit)
    save(figure, out / f"{part}.png")


# A part without a title or a share would fail only when its turn comes.
assert set(FUNCTIONS) == set(TITLES) == set(SHARES)
