"""Read torchvision's datasets that download themselves, such as `torchvision:CIFAR10`.

Where a dataset knows its files (ImageFolder and its like), their bytes are taken as they are. The
others return decoded images, which become PNG. torchvision checks each archive's MD5 before it
reads it, CIFAR's pickles included; no other pickle is opened here.
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
from wds_train.conversion.sources.sequential import Item, spool_items
from wds_train.conversion.sources.source import Source, Understood
from wds_train.conversion.sources.splits import from_scans
from wds_train.conversion.sources.spool import Spool
from wds_train.errors import DataError, UsageError


def open_torchvision(name: str, root: Path, spool: Spool) -> Source:
    """Open a dataset of torchvision, and download it if it is not there.

    Args:
        name: Its class, such as `CIFAR10`.
        root: The folder of its files.
        spool: Where images are kept that come decoded.

    Raises:
        UsageError: There is no such dataset, or it has no `train` split.
        DataError: It cannot be downloaded.
    """
    from torchvision import datasets

    kind = getattr(datasets, name, None)
    if not isinstance(kind, type):
        raise UsageError(
            f"torchvision has no dataset {name!r}; "
            "its class's name is needed, as in torchvision:CIFAR10"
        )

    # Open its splits.
    parts = {}
    for split in SPLITS:
        part = _open_split(kind, root, split)
        if part is not None:
            parts[split] = part

    # Name the classes; ImageNet's have ids, too.
    names = list(map(_join_words, parts["train"].classes))
    ids = getattr(parts["train"], "wnids", None) or names
    classes = to_classes(ids, dict(zip(ids, names, strict=True)))
    understood = Understood(
        layout=f"torchvision's {name}; splits {', '.join(parts)} as torchvision has them",
        labels="torchvision's own",
    )
    description = f"torchvision {name}"

    # Take the files as they are if every split has them; else encode what it returns.
    if all(map(_samples, parts.values())):
        scans = [_scan(split, _samples(part)) for split, part in parts.items()]
        return from_scans(description, classes, scans, understood)
    source = spool_items(description, classes, lambda: _items(parts), spool)
    return replace(source, understood=understood)


def _open_split(kind: Any, root: Path, split: str) -> Any:
    """Open a split of the dataset class `kind`.

    Returns:
        The dataset; None when it has no such split.

    Raises:
        UsageError: It has no `train`.
        DataError: It cannot be downloaded.
    """
    arguments: dict[str, Any] = {"split": split}
    if "train" in inspect.signature(kind).parameters:  # the older classes
        if split == "val":  # train=False is their test set
            return None
        arguments = {"train": split == "train"}
    # The classes say with a ValueError that they have no such split.
    try:
        return kind(str(root), download=True, **arguments)
    except ValueError as error:
        if split == "train":
            raise UsageError(
                f"torchvision's {kind.__name__} has no split {split!r}: {error}"
            ) from error
        return None
    except (OSError, RuntimeError, TypeError) as error:
        raise DataError(
            f"torchvision's {kind.__name__} cannot be had: {error}; put its files below {root}"
        ) from error


def _join_words(entry: Any) -> str:
    """Return a class's name, which some datasets give as several words."""
    if isinstance(entry, str):
        return entry
    return ", ".join(entry)


def _samples(part: Any) -> list[tuple[str, int]]:
    """Return the (path, label) of every image; empty where the dataset keeps no files of images."""
    return getattr(part, "samples", None) or getattr(part, "_samples", None) or []


def _scan(split: str, samples: list[tuple[str, int]]) -> SplitScan:
    """Scan the images of a split, which are files; each key is its folder and name."""
    found = SplitScan(split)
    for path, label in samples:
        found.add_file(label, Path(path), "/".join(Path(path).parts[-2:]))
    return found


def _items(parts: dict[str, Any]) -> Iterator[Item]:
    """Yield the samples of datasets that return decoded images, as PNG."""
    for split, part in parts.items():
        for number in range(len(part)):
            image, label = part[number]
            out = io.BytesIO()
            image.save(out, "PNG")
            yield Item(split, f"{number:06d}", int(label), out.getvalue())
