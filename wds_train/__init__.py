"""Train image classifiers from WebDataset shards on S3, on machines that may vanish at any moment.

The public names are those of the loaders, for any training loop (docs/loader.md): `TrainLoader`,
`EvalLoader` and `SampleLoader` read a `Dataset`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wds_train.dataset.reader import Dataset
    from wds_train.errors import DataError, WdsTrainError
    from wds_train.global_rng import keyed
    from wds_train.loader.batch import Batch
    from wds_train.loader.eval_loader import EvalLoader
    from wds_train.loader.sample_loader import SampleLoader, Samples
    from wds_train.loader.train_loader import TrainLoader

# The modules of the public names. They are imported when a name is asked for: PyTorch takes
# seconds, which `wds-train --help` has no use for.
_PLACES = {
    "Batch": "wds_train.loader.batch",
    "DataError": "wds_train.errors",
    "Dataset": "wds_train.dataset.reader",
    "EvalLoader": "wds_train.loader.eval_loader",
    "SampleLoader": "wds_train.loader.sample_loader",
    "Samples": "wds_train.loader.sample_loader",
    "TrainLoader": "wds_train.loader.train_loader",
    "WdsTrainError": "wds_train.errors",
    "keyed": "wds_train.global_rng",
}
__all__ = [
    "Batch",
    "DataError",
    "Dataset",
    "EvalLoader",
    "SampleLoader",
    "Samples",
    "TrainLoader",
    "WdsTrainError",
    "keyed",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
