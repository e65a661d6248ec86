"""Refuse a destination that overlaps its source: a conversion never writes over what it reads."""

from pathlib import Path

from wds_train.errors import UsageError
from wds_train.files import home
from wds_train.storage.address import is_embedded
from wds_train.storage.base import Store


def refuse_overlap(source: Path | None, store: Store) -> None:
    """Raise `UsageError` when the destination lies in the source, or the source in it.

    Shards would replace files that are still to be read, or lie among the images ever after. Links
    are followed, and two names of one folder are one.

    Args:
        source: The source's file or folder; None for one that is not on this machine.
        store: The destination.
    """
    if source is None:
        return

    # Compare folders of this machine; an S3 store elsewhere overlaps nothing here.
    source = source.resolve()
    if is_embedded(store.url):
        # The server's folder may well lie below the source: .wds is passed over there, as all
        # hidden folders are.
        overlap = is_within(source, (home() / "s3").resolve())
    elif not store.url.startswith("s3://"):
        place = Path(store.url).resolve()
        overlap = is_within(place, source) or is_within(source, place)
    else:
        return
    if overlap:
        raise UsageError(
            f"the dataset {store.url} and its source {source} overlap: a conversion writes nothing "
            "into what it reads; choose a destination beside the source"
        )


def is_within(inner: Path, outer: Path) -> bool:
    """Return whether `inner` is `outer` or lies below it. Both must be resolved."""
    return any(_same(place, outer) for place in (inner, *inner.parents))


def _same(one: Path, other: Path) -> bool:
    if one == other:
        return True
    try:
        return one.samefile(other)  # a bind mount, or a file system that takes A for a
    except OSError:
        return False
