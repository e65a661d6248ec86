"""The folder of a page on which anyone tries an image: `space/` of this package, ONNX files, what they are."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from wds_train.checkpoint.scores import NAMES, SCORES
from wds_train.console import say
from wds_train.models.weights import Weights
from wds_train.serving.exporters import write_onnx

HERE = Path(__file__).parent
PROGRAM = ("app.py", "classifier.py", "requirements.txt")
PYTHON = "3.12"


@dataclass(frozen=True)
class Space:
    """`choices` are the weights that a visitor chooses among, the first at first; `others` answer beside them when they are
    asked to. `footer` says in Markdown where they come from; `examples` are images by file name.
    """

    choices: Sequence[Weights]
    footer: str
    others: Sequence[Weights] = ()
    examples: Sequence[tuple[str, bytes]] = ()

    @property
    def title(self) -> str:
        first = self.choices[0]
        return f"{first.run.rstrip('/').rpartition('/')[2]}: {first.recipe.model.name}"

    def write(self, folder: Path) -> None:
        """Fill `folder`, which is there."""
        for name in PROGRAM:
            shutil.copyfile(HERE / "space" / name, folder / name)
        (folder / "models").mkdir()
        in_order = sorted(
            (*self.choices, *self.others), key=lambda weights: (weights.step, weights.kind)
        )
        for weights in in_order:
            say(f"exporting the {weights.kind} weights of step {weights.step}")
            write_onnx(weights, folder / "models" / file_of(weights))
        (folder / "app.json").write_text(
            json.dumps(self._about(in_order), indent=1, ensure_ascii=False) + "\n"
        )
        if self.examples:
            (folder / "examples").mkdir()
        for name, data in self.examples:
            (folder / "examples" / name).write_bytes(data)

    def _about(self, in_order: list[Weights]) -> dict[str, Any]:
        classes = len(self.choices[0].classes)
        return {
            "title": self.title,
            "what": f"Give an image; it answers with one of {classes:,} classes, also for what it has never seen.",
            "footer": self.footer,
            "models": {_title(weights): file_of(weights) for weights in in_order},
            "choices": [_title(weights) for weights in self.choices],
        }


def file_of(weights: Weights) -> str:
    return f"{weights.kind}-{weights.step:08d}.onnx"


def _title(weights: Weights) -> str:
    title = f"{NAMES[weights.kind]}, epoch {weights.epoch} (step {weights.step})"
    top1 = weights.metrics.get(SCORES[weights.kind])
    return title if top1 is None else f"{title}, top-1 {top1:.2f} %"


def pinned(name: str) -> str:
    """The version of a package that the page runs with."""
    lines = (HERE / "space" / "requirements.txt").read_text().splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith(f"{name}=="))


def card(name: str, head: str, **values: Any) -> str:
    """The README of a repository: `head`, which is YAML, and the card `name` filled in."""
    environment = Environment(
        loader=FileSystemLoader(HERE / "cards"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )
    return f"---\n{head.strip()}\n---\n\n{environment.get_template(name).render(**values)}"
