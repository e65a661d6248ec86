"""Which source an address means, and its rows."""

from pathlib import Path

from shards.digits import digits
from shards.imagefolder import image_folder
from shards.source import Source, checked
from shards.spool import Spool
from wds_train.errors import UsageError

DIGITS = "digits"


def open_source(address: str, spool: Spool) -> Source:
    """The source at `address`: `digits`, or a folder of images."""
    if address == DIGITS:
        return checked(digits(spool))
    root = Path(address).expanduser()
    if not root.is_dir():
        raise UsageError(f"{address!r} is neither {DIGITS!r} nor a folder; give the folder that holds the images")
    return checked(image_folder(root.resolve()))


def name_of(address: str) -> str:
    """What a dataset made from `address` is called."""
    return Path(address).expanduser().resolve().name
