"""A trained model's weights, with all that it takes to use them.

They come out of a run's checkpoint, or of a file of `wds-train export`. Evaluation, the server and
`model.init` use them.
"""

import json
import logging
import os
import shlex
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as encoded

from wds_train.config.recipe import Recipe
from wds_train.config.schedule import is_averaged
from wds_train.dataset.manifest import ClassInfo
from wds_train.errors import NotFound, RunError, UsageError, WdsTrainError, unwritable
from wds_train.models.calibration import Calibration, judge_again
from wds_train.models.tensor_checks import refuse_other_weights
from wds_train.schema import typed

# timm tells the format of a file by the end of its name.
SUFFIX = ".safetensors"
# The entry of a file's header that describes the weights.
OWN = "wds-train"
LOG = logging.getLogger(__name__)


def is_exported(path: Path) -> bool:
    """Return True if a file describes its weights, as those of `wds-train export` do.

    Args:
        path: A safetensors file.

    Raises:
        NotFound: There is no such file.
        RunError: It is not a safetensors file.
    """
    try:
        with safe_open(path, "pt") as file:
            return OWN in (file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise _unusable(path, error) from error


@dataclass(frozen=True)
class Weights:
    """A trained model, and all that it takes to use it.

    Attributes:
        tensors: The state of the model by name, on the CPU.
        kind: "raw" or "ema".
        run: The run's name.
        step: The step that the weights are of.
        epoch: The epochs that were trained until then.
        metrics: The scores of their validation; empty if there was none.
        recipe: The recipe of the run.
        classes: The classes, in the order of the model's outputs.
        calibration: The calibration of the probabilities.
    """

    tensors: dict[str, torch.Tensor]
    kind: str
    run: str
    step: int
    epoch: int
    metrics: dict[str, float]
    recipe: Recipe
    classes: tuple[ClassInfo, ...]
    calibration: Calibration = field(default_factory=Calibration)

    def save(self, path: Path) -> None:
        """Write a file for `read`, and for `timm.create_model(NAME, checkpoint_path=path)`.

        Args:
            path: The file. It is replaced if it exists.

        Raises:
            UsageError: It cannot be written.
        """
        # The tensors, and a header with our description and timm's.
        own = asdict(replace(self, tensors={})) | {"recipe": self.recipe.to_dict()}
        header = {"config": json.dumps(self.timm_config()), OWN: json.dumps(own)}
        # Not by safetensors' `save_file`, which leaves a file that nobody else may read.
        data = encoded(self.tensors, header)
        unfinished = path.with_name(f".tmp-{os.getpid()}-{path.name}")
        try:
            unfinished.write_bytes(data)
            unfinished.replace(path)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise unwritable(path, error) from error

    @classmethod
    def read(cls, path: Path) -> "Weights":
        """Read the weights that `save` wrote.

        A file of an earlier version may hold what this one would not write. It is read all the
        same, with a warning.

        Args:
            path: The file.

        Raises:
            NotFound: There is no such file.
            RunError: `save` did not write it, or it lacks weights.
        """
        # The header is a description that this version knows.
        try:
            with safe_open(path, "pt") as file:
                own = json.loads((file.metadata() or {})[OWN])
                tensors = {}
                # `file` has keys, and is no mapping.
                for name in file.keys():  # noqa: SIM118
                    tensors[name] = file.get_tensor(name)
            weights = replace(typed(cls, own), tensors=tensors)
            typed(Literal["raw", "ema"], weights.kind, "kind")
        except (SafetensorError, OSError) as error:
            raise _unusable(path, error) from error
        except (KeyError, ValueError, RecursionError, UsageError) as error:
            raise RunError(
                f"{path} was not written by this version of `wds-train export` ({error!r})"
            ) from error

        # The tensors are those of the model that the file describes.
        model = weights.recipe.model
        try:
            refuse_other_weights(tensors, model, len(weights.classes))
        except RunError as error:
            raise RunError(
                f"the weights of {path} do not fit the model {model.name}: {error}"
            ) from error

        # Earlier versions wrote files that this one would not.
        every = weights.recipe.ema.every
        if weights.kind == "ema" and not is_averaged(weights.step, every):
            LOG.warning(
                "%s holds EMA weights that were never updated (ema.every is %d, and these are of "
                "step %d): they still are those that the training began with; `wds-train export` "
                "of its run makes a better file",
                *(path, every, weights.step),
            )
        return replace(weights, calibration=judge_again(weights.calibration))

    def timm_call(self, path: Path) -> str:
        """Return the Python expression that makes the model from the file at `path`."""
        model = self.recipe.model
        arguments = [
            repr(model.name),
            f"num_classes={len(self.classes)}",
            f"checkpoint_path={str(path)!r}",
        ]
        for name, value in model.timm_arguments().items():
            text = repr(value)
            if name == "aa_layer":  # its value is the name of a class
                text = f"timm.layers.{value}"
            arguments.append(f"{name}={text}")
        return f"timm.create_model({', '.join(arguments)})"

    def timm_config(self) -> dict[str, Any]:
        """Return the description of the model for timm.

        Returns:
            The content of a `config.json` (timm/models/_hub.py, save_config_for_hf).
        """
        # The model, by the arguments that timm's `create_model` takes.
        data = self.recipe.data
        classes = len(self.classes)
        model = self.recipe.model
        arguments = model.timm_arguments()
        name = model.name
        # In JSON the layer would be its name, which timm's ResNets do not take. Some have a variant
        # that blurs by itself.
        blurred = name.replace("resnet", "resnetblur", 1)
        if arguments.get("aa_layer") == "BlurPool2d" and timm.is_model(blurred):
            name = blurred
            del arguments["aa_layer"]

        # Its classes and images.
        names = {}
        for entry in self.classes:
            names[entry.id] = entry.name
        return {
            "architecture": name,
            "num_classes": classes,
            "label_names": [entry.id for entry in self.classes],
            "label_descriptions": names,
            "model_args": arguments,
            "pretrained_cfg": {
                "num_classes": classes,
                "input_size": [3, data.eval_size, data.eval_size],
                "interpolation": "bilinear",
                "crop_pct": data.eval_crop,
                "mean": data.mean,
                "std": data.std,
            },
        }


def _unusable(path: Path, error: Exception) -> WdsTrainError:
    if isinstance(error, FileNotFoundError):
        return NotFound(
            f"there is no file {path}; `wds-train export RUN --to {shlex.quote(str(path))}` makes "
            "one"
        )
    return RunError(
        f"{path} is no safetensors file ({error}); `wds-train export RUN --to FILE` makes one"
    )
