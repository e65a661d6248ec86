"""The run manifest: `manifest.json` of a run, the one mutable object, changed only by compare-and-swap.

It names every checkpoint and every segment of metrics with size and sha256; what it does not name does not exist.
`fence` counts the claims: an instance writes only while the manifest carries the fence that it claimed with.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from wds_train.errors import RunError

FORMAT = 1
KIND = "wds-train run"
NAME = "manifest.json"
KEPT = 2  # newest checkpoints kept: with one alone, a damaged newest would leave nothing to go back to


@dataclass(frozen=True)
class Progress:
    """How far a training is, and the sums of its running epoch. `step` optimizer steps are done and `evaluated` epochs
    validated; `loss_sum` is over the epoch's `loss_steps` steps, `lost` counts its unreadable samples.
    """

    step: int = 0
    evaluated: int = 0
    loss_sum: float = 0.0
    loss_steps: int = 0
    lost: int = 0


@dataclass(frozen=True)
class Object:
    key: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """`metrics` are those of the validation at this step, empty when there was none."""

    object: Object
    progress: Progress
    metrics: dict[str, float] = field(hash=False)


@dataclass(frozen=True)
class RunManifest:
    run: str
    recipe: dict[str, Any]
    dataset: dict[str, Any]
    wandb_id: str
    fence: int = 0
    owner: str = ""
    nonce: str = ""
    status: str = "running"
    checkpoints: tuple[Checkpoint, ...] = ()
    metrics: tuple[Object, ...] = ()
    result: dict[str, float] = field(default_factory=dict)

    def with_commit(self, checkpoint: Checkpoint, segment: Object | None) -> "RunManifest":
        """The manifest after a commit, holding the newest checkpoints and the best ones."""
        kept = keep((*self.checkpoints, checkpoint))
        return replace(self, checkpoints=kept, metrics=self.metrics if segment is None else (*self.metrics, segment))

    def to_json(self) -> bytes:
        return (json.dumps({"format": FORMAT, "kind": KIND} | asdict(self), indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> "RunManifest":
        """Read a manifest found at `where`; `RunError` when it is another kind, a newer format, or damaged."""
        try:
            content = json.loads(data)
        except ValueError as error:
            raise RunError(f"{where} is not JSON: {error}") from error
        if not isinstance(content, dict) or content.pop("kind", None) != KIND:
            raise RunError(f"{where} is not a {KIND} manifest; choose another run name")
        if (version := content.pop("format", None)) != FORMAT:
            raise RunError(f"{where} has format {version}, this wds-train reads format {FORMAT}; upgrade it")
        try:
            content["checkpoints"] = tuple(_checkpoint(entry) for entry in content["checkpoints"])
            content["metrics"] = tuple(Object(**entry) for entry in content["metrics"])
            return cls(**content)
        except (KeyError, TypeError) as error:
            raise RunError(f"{where} is damaged: {error!r}") from error


def _checkpoint(entry: dict[str, Any]) -> Checkpoint:
    return Checkpoint(Object(**entry["object"]), Progress(**entry["progress"]), entry["metrics"])


def best(checkpoints: tuple[Checkpoint, ...], metric: str) -> Checkpoint | None:
    """The checkpoint with the highest `metric`, the earliest of equals; None when none has it."""
    scored = [checkpoint for checkpoint in checkpoints if metric in checkpoint.metrics]
    return max(scored, key=lambda checkpoint: checkpoint.metrics[metric], default=None)


def keep(checkpoints: tuple[Checkpoint, ...]) -> tuple[Checkpoint, ...]:
    """Those worth their storage: the newest KEPT and the best by raw and by EMA top-1; oldest first."""
    kept = {*checkpoints[-KEPT:], best(checkpoints, "val/top1"), best(checkpoints, "val/top1_ema")} - {None}
    return tuple(checkpoint for checkpoint in checkpoints if checkpoint in kept)
