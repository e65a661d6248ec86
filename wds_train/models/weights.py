"""A trained model's weights, with all that it takes to use them.

They come out of a run's checkpoint, or of an exported file.
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
from wds_train.models.calibration import Calibration, as_judged_now
from wds_train.models.tensor_checks import refuse_other_weights
from wds_train.schema import typed

SUFFIX = ".safetensors"  # timm tells the format by the name
OWN = "wds-train"  # the entry of a file's header that says what the weights are of
LOG = logging.getLogger(__name__)


def is_exported(path: Path) -> bool:
    """Return True if the file says what its weights are of, as those of `wds-train export` do; an
    error as of `Weights.read`.
    """
    try:
        with safe_open(path, "pt") as file:
            return OWN in (file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise _unusable(path, error) from error


@dataclass(frozen=True)
class Weights:
    """A trained model, and all that it takes to use it.

    `tensors` is the state of a model by name, on the CPU: the `kind` ("raw" or "ema") weights of
    `step` of `run`, with the `metrics` of their validation, if there was one. `classes` are in the
    order of the model's outputs.
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
        """Write a file for `timm.create_model(NAME, checkpoint_path=path)`, which `read` reads,
        too.
        """
        own = asdict(replace(self, tensors={})) | {"recipe": self.recipe.to_dict()}
        data = encoded(
            self.tensors, {"config": json.dumps(self.timm_config()), OWN: json.dumps(own)}
        )
        unfinished = path.with_name(f".tmp-{os.getpid()}-{path.name}")
        try:  # safetensors' own `save_file` leaves a file that nobody else may read
            unfinished.write_bytes(data)
            unfinished.replace(path)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise unwritable(path, error) from error

    @classmethod
    def read(cls, path: Path) -> "Weights":
        """Return the weights that `save` wrote; `NotFound` when there is no such file, `RunError`
        when `save` did not write it, or it lacks weights. What an earlier version wrote, and this
        one would not, is read all the same, and said.
        """
        try:
            with safe_open(path, "pt") as file:
                own = json.loads((file.metadata() or {})[OWN])
                # It is no dict, though it has keys.
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            weights = replace(typed(cls, own), tensors=tensors)
            typed(Literal["raw", "ema"], weights.kind, "kind")
        except (SafetensorError, OSError) as error:
            raise _unusable(path, error) from error
        except (KeyError, ValueError, RecursionError, UsageError) as error:
            raise RunError(
                f"{path} was not written by this version of `wds-train export` ({error!r})"
            ) from error
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
        return replace(weights, calibration=as_judged_now(weights.calibration))

    def timm_call(self, path: Path) -> str:
        """Return the Python expression that makes the model from the file at `path`."""
        model = self.recipe.model
        values = {
            name: f"timm.layers.{value}" if name == "aa_layer" else repr(value)
            for name, value in model.timm_arguments().items()
        }
        more = "".join(f", {name}={value}" for name, value in values.items())
        return (
            f"timm.create_model({model.name!r}, num_classes={len(self.classes)}, "
            f"checkpoint_path={str(path)!r}{more})"
        )

    def timm_config(self) -> dict[str, Any]:
        """Return the description of the model for timm.

        It is the content of a `config.json` (timm/models/_hub.py, save_config_for_hf).
        """
        data = self.recipe.data
        classes = len(self.classes)
        model = self.recipe.model
        arguments = model.timm_arguments()
        name = model.name
        if arguments.get("aa_layer") == "BlurPool2d" and timm.is_model(
            blurred := name.replace("resnet", "resnetblur", 1)
        ):
            # In JSON the layer would be its name, which timm's ResNets do not take.
            name = blurred
            del arguments["aa_layer"]
        return {
            "architecture": name,
            "num_classes": classes,
            "label_names": [entry.id for entry in self.classes],
            "label_descriptions": {entry.id: entry.name for entry in self.classes},
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
