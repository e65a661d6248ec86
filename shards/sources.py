"""Which source an address means: by its own look, or as --source says."""

from collections.abc import Callable
from pathlib import Path

from shards import huggingface, imagenet, torchvision_source
from shards.digits import digits
from shards.imagefolder import image_folder
from shards.source import Source, checked
from shards.spool import Spool
from shards.tars import webdataset
from wds_train.errors import UsageError

DIGITS = "digits"
Opener = Callable[[Path, Spool], Source]
FORMATS: dict[str, Opener] = {
    "imagefolder": lambda root, spool: image_folder(root),
    "ilsvrc": lambda root, spool: imagenet.ilsvrc_tars(root),
    "kaggle": lambda root, spool: imagenet.kaggle(root),
    "huggingface": huggingface.local,
    "wds": webdataset,
}


def open_source(address: str, spool: Spool, form: str | None = None) -> Source:
    """The source at `address`: `digits`, `hf:ID`, `torchvision:CLASS`, `wds:PATH`, or a path, whose format is `form` or
    what its files look like.
    """
    if address == DIGITS:
        return checked(digits(spool))
    prefix, colon, rest = address.partition(":")
    if colon and prefix == "hf":
        return checked(huggingface.hub(rest, spool))
    if colon and prefix == "torchvision":
        return checked(torchvision_source.torchvision(rest, spool.folder.parent.parent / "torchvision", spool))
    if colon and prefix == "wds":
        address, form = rest, "wds"
    root = Path(address).expanduser().resolve()
    if not root.exists():
        raise UsageError(
            f"{address!r} does not exist; SOURCE is {DIGITS!r}, a path, hf:ID, torchvision:CLASS or wds:PATH"
        )
    if root.name == imagenet.TRAIN_TAR:
        root = root.parent
    return checked(FORMATS[form or recognise(root)](root, spool))


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
    if ".tar" in suffixes:
        return "wds"
    if root.is_file():
        raise UsageError(f"{root} is neither a tar, an arrow file nor Parquet; give the folder of the images")
    return "imagefolder"


def _first_files(root: Path) -> list[Path]:
    """The files in `root` and in the folders in it: enough to tell data files from class folders."""
    folders = [root, *sorted(path for path in root.iterdir() if path.is_dir())[:8]]
    return [path for folder in folders for path in folder.iterdir() if path.suffix in (".arrow", ".parquet", ".tar")]


def name_of(address: str) -> str:
    """What a dataset made from `address` is called: the last part of it."""
    prefix, colon, rest = address.partition(":")
    if colon and prefix in ("hf", "torchvision"):
        return rest.partition(":")[0].rpartition("/")[2]
    return Path(rest if colon and prefix == "wds" else address).expanduser().resolve().name
