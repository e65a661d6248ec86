"""A run's curves as a picture."""

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def draw_curves(history: list[dict[str, Any]], title: str, path: Path) -> None:
    """Loss, accuracy and learning rate over epochs, from a run's records, as a PNG at `path`."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    steps = [record for record in history if "train/loss" in record]
    epochs = [record for record in history if "val/top1" in record]
    _plot(loss, steps, "train/loss", "train, per step", color="0.75", linewidth=0.8)
    _plot(loss, epochs, "epoch/loss", "train, epoch mean", color="C0")
    _plot(loss, epochs, "val/loss", "validation", color="C1")
    _plot(loss, epochs, "val/loss_ema", "validation, EMA", color="C2")
    loss.set(title="loss", xlabel="epoch")
    _plot(accuracy, epochs, "val/top1", "raw", color="C1", marker=".")
    _plot(accuracy, epochs, "val/top1_ema", "EMA", color="C2", marker=".")
    accuracy.set(title="validation top-1, %", xlabel="epoch")
    _plot(rate, steps, "train/lr", "", color="C3")
    rate.set(title="learning rate", xlabel="epoch")
    for axes in (loss, accuracy):
        if axes.lines:
            axes.legend(frameon=False, fontsize="small")
    for axes in (loss, accuracy, rate):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)


def _plot(axes: Any, records: list[dict[str, Any]], name: str, label: str, **style: Any) -> None:
    points = [(record["epoch"], record[name]) for record in records if name in record]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, **style)
