"""A training's state in host memory, and as safetensors."""

import json
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from wds_train.checkpoint.run_manifest import Progress, RunManifest
from wds_train.errors import NotFinite, RunError
from wds_train.models.tensor_checks import refuse_other_state
from wds_train.schema import refuse_depth, typed

# What of a checkpoint is no tensor; `teacher` and `classes` are not in all.
EXTRA = {
    "scalars": dict[str, Any],
    "scaler": dict[str, float],
    "teacher": str,
    "classes": tuple[tuple[str, str], ...],
}


@dataclass(frozen=True)
class Snapshot:
    """A training's state in host memory: named tensors, what is not a tensor as JSON, and how far it is."""

    tensors: dict[str, torch.Tensor]
    extra: dict[str, Any]
    progress: Progress

    def encode(self) -> bytes:
        """The snapshot as safetensors: nothing in it can execute when it is read."""
        header = {"extra": json.dumps(self.extra), "progress": json.dumps(asdict(self.progress))}
        return save_tensors(self.tensors, header)

    def check_finite(self) -> None:
        """Raise `NotFinite` when a tensor holds what is no number: the last step can have broken weights that the loss,
        which comes before the update, does not show yet.
        """
        for name, tensor in self.tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise NotFinite(f"{name} is not finite after step {self.progress.step}; nothing of it was committed")

    @classmethod
    def decode(cls, data: bytes, progress: Progress) -> "Snapshot":
        """The snapshot that `encode` wrote; `RunError` with the field when `data` is no checkpoint of `progress`."""
        try:
            size = int.from_bytes(data[:8], "little")
            header = typed(dict[str, dict[str, Any]], json.loads(data[8 : 8 + size]), "header").get("__metadata__", {})
            parts = {name: json.loads(typed(str, header.get(name), name)) for name in ("extra", "progress")}
            refuse_depth(parts)
            extra = typed(dict[str, Any], parts["extra"], "extra")
            extra = {name: typed(EXTRA.get(name, Any), value, f"extra.{name}") for name, value in extra.items()}
            snapshot = cls(load_tensors(data), extra, typed(Progress, parts["progress"], "progress"))
        except (SafetensorError, ValueError, KeyError, RuntimeError, OverflowError) as error:
            raise RunError(f"it is no checkpoint: {error if type(error) is ValueError else repr(error)}") from error
        if snapshot.progress != progress:
            raise RunError(f"it holds {snapshot.progress}, the manifest says {progress}")
        return snapshot

    def refuse_misfit(self, run: RunManifest) -> None:
        """Raise `RunError` with the field when the snapshot is not of the run's model and optimizer."""
        recipe, noted = run.settings, self.extra.get("classes")
        classes = run.dataset.get("classes", len(noted or ()))
        if noted is not None and len(noted) != classes:
            raise RunError(f"extra.classes names {len(noted)} classes, the run's dataset has {classes}")
        if missing := {"scalars", "scaler"} - self.extra.keys():
            raise RunError(f"extra.{missing.pop()} is missing")
        refuse_other_state(self.tensors, self.extra["scalars"], recipe, classes)
