"""torchvision's datasets that download themselves: `torchvision:Imagenette`, `torchvision:CIFAR10`, ...

Where a dataset knows its files (ImageFolder and its like), their bytes are taken as they are. The others hand out
decoded images, which become PNG. torchvision checks each archive's MD5 before it reads it, CIFAR's pickles included; no
other pickle is opened here.
"""

import inspect
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from wds_train.conversion.sources.labels import to_classes
from wds_train.conversion.sources.names import SPLITS
from wds_train.conversion.sources.scan import SplitScan
from wds_train.conversion.sources.sequential import Item, spooled
from wds_train.conversion.sources.source import Source, Understood
from wds_train.conversion.sources.splits import from_scans
from wds_train.conversion.sources.spool import Spool
from wds_train.errors import DataError, UsageError


def torchvision(name: str, root: Path, spool: Spool) -> Source:
    """The dataset class `name` of torchvision, downloaded below `root` unless it is there."""
    from torchvision import datasets

    kind = getattr(datasets, name, None)
    if not isinstance(kind, type):
        raise UsageError(f"torchvision has no dataset {name!r}; its class's name is needed, as in torchvision:CIFAR10")
    found = {split: _open(kind, root, split) for split in SPLITS}
    parts = {split: part for split, part in found.items() if part is not None}
    ids = getattr(parts["train"], "wnids", None) or [_word(entry) for entry in parts["train"].classes]
    names = dict(zip(ids, map(_word, parts["train"].classes), strict=True))
    understood = Understood(
        f"torchvision's {name}; splits {', '.join(parts)} as torchvision has them", "torchvision's own"
    )
    if all(_samples(part) for part in parts.values()):
        scans = [_scan(split, _samples(part)) for split, part in parts.items()]
        return from_scans(f"torchvision {name}", to_classes(ids, names), scans, understood)
    source = spooled(f"torchvision {name}", to_classes(ids, names), lambda: _items(parts), spool)
    return replace(source, understood=understood)


def _open(kind: Any, root: Path, split: str) -> Any:
    """The split of the dataset; None when it has none but `train`, which it must have."""
    by_flag = "train" in inspect.signature(kind).parameters  # the older classes: train=False is their test set
    if by_flag and split == "val":
        return None
    try:
        return kind(str(root), download=True, **{"train": split == "train"} if by_flag else {"split": split})
    except ValueError as error:
        if split == "train":
            raise UsageError(f"torchvision's {kind.__name__} has no split {split!r}: {error}") from error
        return None
    except (OSError, RuntimeError, TypeError) as error:
        message = f"torchvision's {kind.__name__} cannot be had: {error}; put its files below {root}"
        raise DataError(message) from error


def _word(entry: Any) -> str:
    return entry if isinstance(entry, str) else ", ".join(entry)


def _samples(part: Any) -> list[tuple[str, int]]:
    """The (path, label) of every image, where the dataset keeps them as files."""
    return getattr(part, "samples", None) or getattr(part, "_samples", None) or []


def _scan(split: str, samples: list[tuple[str, int]]) -> SplitScan:
    found = SplitScan(split)
    for path, label in samples:
        found.add_file(label, Path(path), "/".join(Path(path).parts[-2:]))
    return found


def _items(parts: dict[str, Any]) -> Iterator[Item]:
    for split, part in parts.items():
        for number in range(len(part)):
            image, label = part[number]
            out = io.BytesIO()
            image.save(out, "PNG")
            yield Item(split, f"{number:06d}", int(label), out.getvalue())
