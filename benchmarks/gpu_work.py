"""The task of a part of `wds-train bench gpu`, and the file that its figures go to."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.host import machine, versions_of
from wds_train.config.precision import Precision
from wds_train.config.presets import preset
from wds_train.config.recipe import Recipe
from wds_train.config.settings import with_settings
from wds_train.errors import WdsTrainError

LONGEST_REASON = 300  # characters of an error that the table shows

# What the search of part g tries, each on top of the recipe `imagenette` with its epochs.
# docs/benchmarks.md says where it comes from.
Settings = tuple[str, ...]
SEARCHED: tuple[Settings, ...] = (
    (),
    ("optimizer.lr=0.05",),
    ("optimizer.lr=0.2",),
    ("data.scale=0.25,1.0",),
    ("model.squeeze_excite=true",),
    ("model.blur_pool=false",),
    ("schedule.flat=0.0",),
    ("schedule.flat=0.72",),
    ("optimizer.name=lamb", "optimizer.lr=0.008", "optimizer.weight_decay=0.02"),
)


@dataclass(frozen=True)
class Scale:
    """The amount of work in every part.

    Attributes:
        settings: Changes to the recipes of all parts.
        sizes: Sides of the images in parts a and e, pixels.
        precisions: Precisions of part a.
        compiled: Whether part a uses torch.compile.
        batch: Samples of a step in part a.
        steps: Steps of a repeat in part a.
        repeats: Repeats of part a.
        workers: Loader processes that part b tries.
        loader_steps: Steps of the training in part b.
        large_batch: The batch of part e.
        resumed: Flags of the trainings that part d kills and resumes.
        resumed_epochs: Epochs of those.
        searched: How many of `SEARCHED` part g tries.
        epochs: Numbers of epochs of part g.
        seeds: Seeds of part g.
    """

    settings: Settings = ()
    sizes: tuple[int, ...] = (224, 192, 160, 128)
    precisions: tuple[Precision, ...] = ("bf16", "fp16")
    compiled: tuple[bool, ...] = (False, True)
    batch: int = 256
    steps: int = 20
    repeats: int = 3
    workers: tuple[int, ...] = (2, 4, 8, 16)
    loader_steps: int = 200
    large_batch: int = 8192
    resumed: tuple[str, ...] = ("--deterministic", "")
    resumed_epochs: int = 2
    searched: int = len(SEARCHED)
    epochs: tuple[int, ...] = (5, 20, 80)
    seeds: tuple[int, ...] = (0, 1, 2)


FULL = Scale()
SMOKE = Scale(
    settings=(
        "model.name=test_resnet",
        "data.size=64",
        "data.eval_size=64",
        "schedule.warmup_epochs=0",
        "batch=16",
    ),
    sizes=(64,),
    precisions=("bf16",),
    compiled=(False,),
    batch=8,
    steps=1,
    repeats=1,
    workers=(1,),
    loader_steps=3,
    large_batch=16,
    resumed=("--deterministic",),
    resumed_epochs=8,
    searched=2,
    epochs=(1,),
    seeds=(0,),
)


class CannotRun(Exception):
    """A part cannot run here, or not to its end; the message says why."""


@dataclass(frozen=True)
class Work:
    """The task of one part.

    Attributes:
        dataset: The dataset's address; "" if there is none.
        no_dataset: Why there is none.
        out: The folder of the results.
        scale: How much is measured.
        until: When the part's time is up, on the monotonic clock.
        cpu: Run on the CPU, although there may be a GPU.
    """

    dataset: str
    no_dataset: str
    out: Path
    scale: Scale
    until: float
    cpu: bool

    @property
    def device(self) -> torch.device:
        """The device to measure.

        Raises:
            CannotRun: There is no GPU, and the CPU was not asked for.
        """
        if self.cpu:
            return torch.device("cpu")
        if not torch.cuda.is_available():
            raise CannotRun(
                "PyTorch finds no GPU here; --smoke tries the part on the CPU, at a tiny scale"
            )
        return torch.device("cuda", 0)

    @property
    def images(self) -> str:
        """The dataset's address.

        Raises:
            CannotRun: There is no dataset.
        """
        if not self.dataset:
            raise CannotRun(self.no_dataset)
        return self.dataset

    def recipe(self, name: str, *settings: str) -> Recipe:
        """Return a preset with the scale's settings, and then with `settings`."""
        return with_settings(preset(name), [*self.scale.settings, *settings])


class Rows:
    """The figures of a part by row, kept in NAME.json.

    Rows that are in the file already are not measured again, unless they failed.

    Args:
        name: The part's letter.
        work: Where the file is, and until when rows may be begun.
    """

    def __init__(self, name: str, work: Work) -> None:
        self._path = work.out / f"{name}.json"
        self._until = work.until
        self.rows = _read_rows(self._path)
        versions: dict[str, str | None] = {**versions_of(("wds-train", "torch", "timm"))}
        versions["cuda"] = torch.version.cuda  # None for a PyTorch without
        self._about = {
            "part": name,
            "device": "",
            "machine": machine(),
            "python": sys.version.split()[0],
            "versions": versions,
        }

    def measure(
        self, row: str, function: Callable[..., dict[str, Any]], *arguments: Any
    ) -> dict[str, Any]:
        """Measure a row, unless it is there already, and write the file.

        Args:
            row: The row's name.
            function: Returns the figures for `arguments`.
            arguments: As `function` takes them.

        Returns:
            The figures, or `failed` and the reason; the other rows then go on.

        Raises:
            CannotRun: The time is up.
        """
        if row in self.rows:
            return self.rows[row]
        if time.monotonic() > self._until:
            raise CannotRun(
                f"no time is left for {row}; more --minutes, and the same command goes on there"
            )
        try:
            self.rows[row] = function(*arguments)
        # RuntimeError: too little memory, or what a compiler says.
        except (RuntimeError, WdsTrainError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:LONGEST_REASON]
            self.rows[row] = {"failed": reason}
        self.write()
        return self.rows[row]

    def write(self, *, complete: bool = False, note: str = "") -> None:
        """Write the file by rename, so that a machine that vanishes leaves a whole one.

        Args:
            complete: No row is missing: the part need not run again.
            note: Why rows are missing.
        """
        # Asking for the device's name would initialise CUDA, in parts that do without.
        if torch.cuda.is_initialized():
            self._about["device"] = torch.cuda.get_device_name()
        state = self._about | {"complete": complete, "note": note, "rows": self.rows}
        written = self._path.with_suffix(".tmp")
        written.write_text(json.dumps(state, indent=1))
        written.replace(self._path)


def _read_rows(path: Path) -> dict[str, Any]:
    """Return the rows of an earlier start that did not fail."""
    if not path.exists():
        return {}
    rows = {}
    for name, row in json.loads(path.read_text()).get("rows", {}).items():
        if "failed" not in row:
            rows[name] = row
    return rows
