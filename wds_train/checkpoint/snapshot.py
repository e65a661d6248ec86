"""A training's state in host memory, and as the safetensors of a checkpoint.

`Trainer.snapshot` makes it, the committer encodes it, and `checkpoint/restore.py` decodes it.
"""

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

# The types of the parts that are not tensors; `teacher` and `classes` are not in all checkpoints.
EXTRA = {
    "scalars": dict[str, Any],
    "scaler": dict[str, float],
    "teacher": str,
    "classes": tuple[tuple[str, str], ...],
}


@dataclass(frozen=True)
class Snapshot:
    """A training's state in host memory.

    Attributes:
        tensors: Its tensors, by their names in a checkpoint.
        extra: The rest, as JSON.
        progress: The steps and epochs so far.
    """

    tensors: dict[str, torch.Tensor]
    extra: dict[str, Any]
    progress: Progress

    def encode(self) -> bytes:
        """Return the snapshot as safetensors: nothing in it can execute when it is read."""
        header = {"extra": json.dumps(self.extra), "progress": json.dumps(asdict(self.progress))}
        return save_tensors(self.tensors, header)

    def check_finite(self) -> None:
        """Raise `NotFinite` when a tensor is not finite.

        The loss is computed before the update: it does not show yet that the last step broke the
        weights.
        """
        for name, tensor in self.tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                step = self.progress.step
                raise NotFinite(
                    f"{name} is not finite after step {step}; nothing of it was committed"
                )

    @classmethod
    def decode(cls, data: bytes, progress: Progress) -> "Snapshot":
        """Read the bytes that `encode` wrote.

        Args:
            data: The bytes, which may be damaged, or made by malicious.
            progress: The progress that the manifest names.

        Raises:
            RunError: `data` is no checkpoint of `progress`; the message names the field.
        """
        try:
            # The header by hand: safetensors does not give the metadata to `load`.
            size = int.from_bytes(data[:8], "little")
            header = typed(dict[str, dict[str, Any]], json.loads(data[8 : 8 + size]), "header")
            metadata = header.get("__metadata__", {})
            parts = {}
            for name in ("extra", "progress"):
                parts[name] = json.loads(typed(str, metadata.get(name), name))
            # Nested so deeply that Python's recursion limit would end the process?
            refuse_depth(parts)
            extra = typed(dict[str, Any], parts["extra"], "extra")
            for name, value in extra.items():
                extra[name] = typed(EXTRA.get(name, Any), value, f"extra.{name}")
            tensors = load_tensors(data)
            snapshot = cls(tensors, extra, typed(Progress, parts["progress"], "progress"))
        except (SafetensorError, ValueError, KeyError, RuntimeError, OverflowError) as error:
            # Our own messages are sentences; those of others need their type beside them.
            cause = repr(error)
            if type(error) is ValueError:
                cause = str(error)
            raise RunError(f"it is no checkpoint: {cause}") from error
        if snapshot.progress != progress:
            raise RunError(f"it holds {snapshot.progress}, the manifest says {progress}")
        return snapshot

    def refuse_misfit(self, run: RunManifest) -> None:
        """Raise `RunError` if the state does not fit the run's model and optimizer.

        The message names the field.
        """
        recipe = run.settings
        # Older checkpoints and older manifests lack the classes.
        names = self.extra.get("classes")
        classes = run.dataset.get("classes", len(names or ()))
        if names is not None and len(names) != classes:
            raise RunError(
                f"extra.classes names {len(names)} classes, the run's dataset has {classes}"
            )
        missing = {"scalars", "scaler"} - self.extra.keys()
        if missing:
            raise RunError(f"extra.{missing.pop()} is missing")
        refuse_other_state(self.tensors, self.extra["scalars"], recipe, classes)
