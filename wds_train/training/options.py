"""The options of a training that are not in its recipe.

The recipe says what is trained, and a resume must not change it. The options say how, on this
machine: `wds-train train` makes them from its command line, and each start may have others.
"""

from dataclasses import dataclass
from pathlib import Path

from wds_train.checkpoint.run_manifest import name_of
from wds_train.config.precision import Precision
from wds_train.config.recipe import Recipe
from wds_train.errors import UsageError


@dataclass(frozen=True)
class TrainOptions:
    """The options of a training.

    Attributes:
        dataset: The address of its dataset.
        run: The address of its run.
        recipe: The recipe.
        workers: Loader workers; 0 reads in the training's own process.
        mix: Other datasets, and the share of every batch that each gives.
        cache_dir: The folder of cached blocks; None for no cache.
        cache_bytes: The most bytes of the cache.
        commit_minutes: Between two commits, besides those of the epochs' ends.
        max_uncommitted_minutes: The training ends when no commit succeeds for so long.
        keep_every: Keep the checkpoint of every so many'th validation; 0: of none for that reason.
        wait: Wait for the end of another owner of the run.
        deterministic: Use only algorithms that give the same bits each time.
        accumulate: Micro-batches per rank and step; None: as few as fit in the GPU's memory.
        precision: The floating-point format that the model computes in.
        compile: Compile the model with torch.compile.
        cpu: Use no GPU.
        go_on: Go on with a run that a person stopped.
        unsafe_store: Train on a store that ignores conditional writes.
        recheck: Take every so many'th step twice, and compare the results to the bit; 0: none.
        hang_minutes: A rank that makes no progress for so long hangs, and all end; None: longer
            than any wait that ends by itself.
        price: Dollars an hour for this machine; None where it is unknown.

    Raises:
        UsageError: The run's name or the minutes cannot work.
    """

    dataset: str
    run: str
    recipe: Recipe
    workers: int
    mix: tuple[tuple[str, float], ...] = ()
    cache_dir: Path | None = None
    cache_bytes: int = 0
    commit_minutes: float = 10.0
    max_uncommitted_minutes: float = 60.0
    keep_every: int = 0
    wait: bool = True
    deterministic: bool = False
    accumulate: int | None = None
    precision: Precision = "auto"
    compile: bool = False
    cpu: bool = False
    go_on: bool = False
    unsafe_store: bool = False
    recheck: int = 0
    hang_minutes: float | None = None
    price: float | None = None

    def __post_init__(self) -> None:
        # Refused here, before anything is opened or written.
        name_of(self.run)
        if not 0 < self.commit_minutes < self.max_uncommitted_minutes:
            raise UsageError(
                f"--commit-minutes {self.commit_minutes:g} must be more than 0 and less than "
                f"--max-uncommitted-minutes {self.max_uncommitted_minutes:g}"
            )
