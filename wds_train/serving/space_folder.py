"""The folder of a page on which anyone tries an image.

It holds the program in `space/` of this package, an ONNX file for each set of weights, and
`app.json`, which describes them. `publish` uploads such a folder; `demo` runs it on this machine.
"""

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
PYTHON = "3.12"  # the version that the hub runs the page with


@dataclass(frozen=True)
class Space:
    """The content of a page.

    Attributes:
        choices: The weights that a visitor chooses among. The page begins with the first.
        footer: The origin of the weights, in Markdown.
        others: More weights, which answer when a visitor asks every checkpoint.
        examples: Images to try, by file name.
    """

    choices: Sequence[Weights]
    footer: str
    others: Sequence[Weights] = ()
    examples: Sequence[tuple[str, bytes]] = ()

    @property
    def title(self) -> str:
        """The names of the run and its model."""
        first = self.choices[0]
        run = first.run.rstrip("/").rpartition("/")[2]
        return f"{run}: {first.recipe.model.name}"

    def write(self, folder: Path) -> None:
        """Fill a folder with the page.

        Args:
            folder: An empty one.

        Raises:
            RunError: A model cannot be exported.
        """
        # The program.
        for name in PROGRAM:
            shutil.copyfile(HERE / "space" / name, folder / name)

        # The models in the order of the training, in which the page lists them.
        (folder / "models").mkdir()
        every = [*self.choices, *self.others]
        every.sort(key=lambda weights: (weights.step, weights.kind))
        for weights in every:
            say(f"exporting the {weights.kind} weights of step {weights.step}")
            write_onnx(weights, folder / "models" / file_of(weights))
        about = json.dumps(self._describe(every), indent=1, ensure_ascii=False)
        (folder / "app.json").write_text(about + "\n")

        # Images to try. Without any, the page shows no empty gallery.
        if self.examples:
            (folder / "examples").mkdir()
        for name, data in self.examples:
            (folder / "examples" / name).write_bytes(data)

    def _describe(self, every: list[Weights]) -> dict[str, Any]:
        """Return the content of `app.json`, with the models in the order of `every`."""
        classes = len(self.choices[0].classes)
        # The page shows titles, and finds the files by them.
        models = {}
        for weights in every:
            models[_title_of(weights)] = file_of(weights)
        return {
            "title": self.title,
            "what": f"Give an image; it answers with one of {classes:,} classes, also for what it "
            "has never seen.",
            "footer": self.footer,
            "models": models,
            "choices": list(map(_title_of, self.choices)),
        }


def file_of(weights: Weights) -> str:
    """Return the name of the ONNX file of weights."""
    return f"{weights.kind}-{weights.step:08d}.onnx"


def _title_of(weights: Weights) -> str:
    title = f"{NAMES[weights.kind]}, epoch {weights.epoch} (step {weights.step})"
    top1 = weights.metrics.get(SCORES[weights.kind])
    if top1 is None:
        return title
    return f"{title}, top-1 {top1:.2f} %"


def pinned_version(name: str) -> str:
    """Return the version of a package that the page runs with.

    Args:
        name: A package of the page's requirements.txt.
    """
    for line in (HERE / "space" / "requirements.txt").read_text().splitlines():
        package, _, pinned = line.partition("==")
        if package == name:
            return pinned
    raise AssertionError(f"requirements.txt of the page does not name {name}")


def render_card(name: str, head: str, **values: Any) -> str:
    """Return the README of a repository.

    Args:
        name: The template in `cards/`.
        head: The hub's metadata, as YAML.
        **values: The template's variables. A missing one is an error.
    """
    environment = Environment(
        loader=FileSystemLoader(HERE / "cards"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # it is Markdown, where &lt; would be seen
    )
    text = environment.get_template(name).render(**values)
    return f"---\n{head.strip()}\n---\n\n{text}"
