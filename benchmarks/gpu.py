"""`wds-train bench gpu`: all that needs a GPU, by one command, into one folder of JSON, a Markdown table and pictures.

Each part has a process of its own (gpu_parts.py), and is not repeated where its file says that it is complete. One that
cannot run, or fails, says so in a line, and the others run.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts import FULL, FUNCTIONS, PROCESSES, SMOKE, Work, run_part
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
SHARES = {
    "a": 6.0,
    "b": 2.0,
    "c": 0.5,
    "d": 2.0,
    "e": 0.5,
    "f": 1.0,
    "g": 8.0,
}  # of the minutes; what is left over goes on
GOALS = {5: 87.4, 20: 91.6, 80: 93.5}  # epochs: top-1 in percent of the public leaderboard
GRACE_SECONDS = 120.0  # for a part to notice that its time is up, and to stop what it started
NOT_MEASURED = "not measured"


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
    parts = args.parts.split(",")
    if unknown := sorted(set(parts) - set(TITLES)):
        raise UsageError(
            f"--parts {args.parts}: there is no part {', '.join(unknown)}; there are {', '.join(TITLES)}"
        )
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--out {args.out} cannot be made: {error.strerror}; name another folder"
        ) from error
    _refuse_another(
        args.out / "bench.json", {"data": str(args.data.resolve()), "smoke": args.smoke}
    )
    out, end = args.out.resolve(), time.monotonic() + 60 * args.minutes
    # Read by PyTorch's import, which is in the server that all processes are forked from.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    PROCESSES.set_forkserver_preload(["wds_train.training.run_training", "benchmarks.gpu_parts"])
    dataset, no_dataset = _dataset(args.data.resolve(), out)
    failed = False
    for number, part in enumerate(parts):
        left = sum(SHARES[each] for each in parts[number:])
        seconds = (end - time.monotonic()) * SHARES[part] / left
        scale = SMOKE if args.smoke else FULL
        said = _run(
            part, Work(dataset, no_dataset, out, scale, time.monotonic() + seconds, args.smoke)
        )
        failed |= said.startswith("failed")
        print(f"part {part}, {TITLES[part]}: {said}", flush=True)
        table = render(out)
    print(f"\n{table}\n\n{out / 'benchmarks.md'}")
    return int(failed)


def _refuse_another(path: Path, asked: dict[str, Any]) -> None:
    """Raise `UsageError` when the figures that are there are of something else: the table would mix them."""
    if path.exists() and json.loads(path.read_text()) != asked:
        raise UsageError(
            f"--out {path.parent} holds figures of other --data or --smoke than {asked}; name another folder"
        )
    path.write_text(json.dumps(asked))


def _dataset(data: Path, out: Path) -> tuple[str, str]:
    """The address of the dataset at, or made of, `data`; or none, and why."""
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
    """Run the part to its end; what to say of it."""
    path = work.out / f"{part}.json"
    if _read(path).get("complete"):
        return "measured already"
    process = PROCESSES.Process(target=run_part, args=(part, work), daemon=False)
    process.start()
    process.join(max(0.0, work.until - time.monotonic()) + GRACE_SECONDS)
    if process.exitcode is None:
        process.terminate()
        process.join(GRACE_SECONDS / 2)
        process.kill()
        process.join()
        return "stopped in the midst of a row, its time being up; more --minutes, and the same command goes on there"
    if process.exitcode:
        return f"failed with code {process.exitcode}; its last words are above"
    found = _read(path)
    wrong = [
        f"{row}: {figures['failed']}"
        for row, figures in found["rows"].items()
        if "failed" in figures
    ]
    return "; ".join(["done" if found["complete"] else found["note"] or "done in part", *wrong])


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def render(out: Path) -> str:
    """The Markdown table of all parts, also in benchmarks.md; pictures of what there is to draw."""
    found = {part: _read(out / f"{part}.json") for part in TITLES}
    lines = [_about(found), "", "| part | row | figures |", "|-|-|-|"]
    for part, title in TITLES.items():
        rows = found[part].get("rows", {})
        note = found[part].get("note", "")
        if not rows or note:
            lines.append(
                f"| ({part}) {title} | {'the rest' if rows else ''} | {NOT_MEASURED}{f': {note}' if note else ''} |"
            )
        lines += [
            f"| ({part}) {title} | {row} | {_figures(figures)} |" for row, figures in rows.items()
        ]
    lines += _goals(found["g"].get("rows", {}))
    text = "\n".join(lines)
    (out / "benchmarks.md").write_text(text + "\n")
    _draw(out, found)
    return text


def _about(found: dict[str, dict[str, Any]]) -> str:
    known = [each for each in found.values() if each]
    if not known:
        return f"Nothing: {NOT_MEASURED}"
    device = next((each["device"] for each in known if each["device"]), "no GPU was used")
    versions = ", ".join(
        f"{name} {number}" for name, number in known[0]["versions"].items() if number
    )
    return f"{device}; {known[0]['machine']}; Python {known[0]['python']}, {versions}"


def _figures(figures: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {format(value, '.4g') if isinstance(value, float) else value}"
        for name, value in figures.items()
    )


def _means(rows: dict[str, Any]) -> dict[int, list[float]]:
    """Top-1 of every seed, by epochs, of the runs after the search."""
    scores: dict[int, list[float]] = {}
    for row, figures in rows.items():
        first, _, rest = row.partition(" ")
        if rest.startswith("epochs") and "top1" in figures:
            scores.setdefault(int(first), []).append(figures["top1"])
    return scores


def _goals(rows: dict[str, Any]) -> list[str]:
    lines = ["", "| Imagenette, 128 px, epochs | goal | mean top-1 | seeds |", "|-|-|-|-|"]
    means = _means(rows)
    for epochs, goal in GOALS.items():
        scores = means.get(epochs, [])
        mean = f"{sum(scores) / len(scores):.2f}" if scores else NOT_MEASURED
        lines.append(f"| {epochs} | {goal} | {mean} | {len(scores)} |")
    return lines


def _draw(out: Path, found: dict[str, dict[str, Any]]) -> None:
    bars = {
        "a": (
            "img/s",
            {
                f"{row}, {way}": rate
                for row, ways in found["a"].get("rows", {}).items()
                if "failed" not in ways
                for way, rate in ways.items()
            },
        ),
        "b": (
            "img/s",
            {
                row: each["img_per_s"]
                for row, each in found["b"].get("rows", {}).items()
                if "img_per_s" in each
            },
        ),
        "g": (
            "mean top-1, %",
            {
                f"{epochs} epochs": sum(s) / len(s)
                for epochs, s in _means(found["g"].get("rows", {})).items()
            },
        ),
    }
    for part, (unit, values) in bars.items():
        if values:
            figure = new_figure(10, max(2.0, 0.25 * len(values)))
            axes = figure.subplots()
            axes.barh(list(values), list(values.values()))
            axes.invert_yaxis()
            axes.set(title=TITLES[part], xlabel=unit)
            save(figure, out / f"{part}.png")


assert set(FUNCTIONS) == set(TITLES) == set(SHARES)
