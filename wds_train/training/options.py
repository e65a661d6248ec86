"""The options of a training that its recipe does not decide."""

from dataclasses import dataclass
from pathlib import Path

from wds_train.checkpoint.run_manifest import name_of
from wds_train.config.precision import Precision
from wds_train.config.recipe import Recipe
from wds_train.errors import UsageError


@dataclass(frozen=True)
class TrainOptions:
    dataset: str
    run: str
    recipe: Recipe
    workers: int
    mix: tuple[tuple[str, float], ...] = ()
    """Other datasets, and the share of every batch that each gives."""
    cache_dir: Path | None = None
    cache_bytes: int = 0
    commit_minutes: float = 10.0
    max_uncommitted_minutes: float = 60.0
    keep_every: int = 0
    wait: bool = True
    deterministic: bool = False
    accumulate: int | None = None
    """Micro-batches per rank and step; None: as few as fit into the GPU's memory."""
    precision: Precision = "auto"
    compile: bool = False
    cpu: bool = False
    """Leave the GPUs alone."""
    go_on: bool = False
    """Go on with a run that a person stopped."""
    unsafe_store: bool = False
    """Train on a store that ignores conditional writes."""
    recheck: int = 0
    """Take every so many'th step twice, and compare the two to the bit; 0: none."""
    hang_minutes: float | None = None
    """The minutes that a rank may not get on before all end; None: as long as what waits by itself
    may take.
    """
    price: float | None = None
    """Dollars that an hour of this machine costs."""

    def __post_init__(self) -> None:
        name_of(self.run)
        if not 0 < self.commit_minutes < self.max_uncommitted_minutes:
            raise UsageError(
                f"--commit-minutes {self.commit_minutes:g} must be more than 0 and less than "
                f"--max-uncommitted-minutes {self.max_uncommitted_minutes:g}"
            )
