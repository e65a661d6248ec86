"""Which source an address means: by its own look, or as --source says."""

from collections.abc import Callable
from pathlib import Path

from shards.sources import huggingface, imagenet, torchvision
from shards.sources.base import ANYTHING, Source, Wanted
from shards.sources.digits import digits
from shards.sources.imagefolder import class_ids, find_splits, image_folder, is_folder
from shards.sources.names import LITTER
from shards.sources.scan import scan
from shards.sources.splits import checked
from shards.sources.spool import Spool
from shards.sources.table import table, tables
from shards.sources.tars import TARS, webdataset
from wds_train.errors import DataError, UsageError
from wds_train.storage.address import name_from
from wds_train.tracking.console import readable

DIGITS = "digits"
Opener = Callable[[Path, Spool, Wanted], Source]
FORMATS: dict[str, Opener] = {
    "imagefolder": lambda root, spool, wanted: image_folder(root, wanted),
    "table": lambda root, spool, wanted: table(root, wanted),
    "ilsvrc": lambda root, spool, wanted: imagenet.ilsvrc_tars(root),
    "kaggle": lambda root, spool, wanted: imagenet.kaggle(root),
    "huggingface": huggingface.local,
    "wds": webdataset,
}


def open_source(address: str, spool: Spool, form: str | None = None, wanted: Wanted = ANYTHING) -> Source:
    """The source at `address`: `digits`, `hf:ID`, `torchvision:CLASS`, `wds:PATH`, or a path, whose format is `form` or
    what its files look like.
    """
    if address == DIGITS:
        return checked(digits(spool))
    prefix, colon, rest = address.partition(":")
    if colon and prefix == "hf":
        return checked(huggingface.hub(rest, spool, wanted))
    if colon and prefix == "torchvision":
        return checked(torchvision.torchvision(rest, spool.folder.parent.parent / "torchvision", spool))
    if colon and prefix == "wds":
        address, form = rest, "wds"
    root = Path(address).expanduser().resolve()
    if not root.exists():
        remedy = f"SOURCE is {DIGITS!r}, a path, hf:ID, torchvision:CLASS or wds:PATH"
        if address.startswith("s3://"):
            remedy = f"sources are read from this machine's disks; tars on S3 are indexed in place: wds-train shards index {address}"
        raise UsageError(f"{address!r} does not exist; {remedy}")
    if readable(str(root)) != str(root):
        raise UsageError(f"{readable(str(root))} has a name that is not UTF-8, or cannot be printed; rename it")
    if root.name == imagenet.TRAIN_TAR:
        root = root.parent
    if root.is_file() and (form or recognise(root)) in ("imagefolder", "table", "kaggle"):
        raise UsageError(f"{root} is a file; give the folder of the images")
    return checked(FORMATS[form or recognise(root)](root, spool, wanted))


def source_root(address: str) -> Path | None:
    """Where the source at `address` lies, as far as it is a path."""
    prefix, colon, rest = address.partition(":")
    if address == DIGITS or (colon and prefix in ("hf", "torchvision")):
        return None
    root = Path(rest if colon and prefix == "wds" else address).expanduser()
    return root.parent if root.name == imagenet.TRAIN_TAR else root


def recognise(root: Path) -> str:
    """The format of what lies at `root`."""
    if (root / imagenet.TRAIN_TAR).is_file():
        return "ilsvrc"
    if (root / imagenet.KAGGLE_TRAIN).is_dir():
        return "kaggle"
    files = [root] if root.is_file() else _first_files(root)
    suffixes = {path.suffix for path in files}
    if suffixes & {".arrow", ".parquet"}:
        return "huggingface"
    if any(path.name.endswith(TARS) for path in files):
        return "wds"
    if root.is_file():
        raise UsageError(f"{root} is neither a tar, an arrow file nor Parquet; give the folder of the images")
    return "table" if tables(root) and not _holds_classes(root) else "imagefolder"


def _holds_classes(root: Path) -> bool:
    """Whether folders say the classes: those in `root`, or in its splits wherever. A table says those of images that lie further down."""
    try:
        base, splits = find_splits(root)
        return (base == root or base not in splits.values()) and bool(class_ids(splits["train"]))
    except DataError:
        return False


def _first_files(root: Path) -> list[Path]:
    """The files in `root` and in the folders in it: enough to tell data files from class folders."""
    entries = [entry for entry in scan(root) if not LITTER.fullmatch(entry.name)]
    folders = [root, *[Path(entry.path) for entry in entries if is_folder(entry)][:8]]
    kinds = (".arrow", ".parquet", *TARS)
    return [Path(entry.path) for folder in folders for entry in scan(folder) if entry.name.endswith(kinds)]


def name_of(address: str) -> str:
    """What a dataset made from `address` is called: the last part of it, as far as a name can hold it."""
    return name_from(_last_part(address))


def _last_part(address: str) -> str:
    prefix, colon, rest = address.partition(":")
    if colon and prefix in ("hf", "torchvision"):
        return rest.partition(":")[0].rpartition("/")[2]
    return Path(rest if colon and prefix == "wds" else address).expanduser().resolve().name
