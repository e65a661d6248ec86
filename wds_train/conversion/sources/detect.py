"""Open the source at an address: recognise its format, or take the one that --source says."""

import shlex
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from wds_train.console import readable
from wds_train.conversion.sources import huggingface, imagenet, torchvision
from wds_train.conversion.sources.digits import open_digits
from wds_train.conversion.sources.folder import open_folder, open_table
from wds_train.conversion.sources.imagefolder import open_image_folder
from wds_train.conversion.sources.layout import read_layout
from wds_train.conversion.sources.litter import is_litter
from wds_train.conversion.sources.scan import scan
from wds_train.conversion.sources.source import ANYTHING, Source, Wanted
from wds_train.conversion.sources.splits import check_source
from wds_train.conversion.sources.spool import Spool
from wds_train.conversion.sources.tables import holds_bytes
from wds_train.conversion.sources.tars import (
    is_tar,
    open_tars,
    refuse_archives,
    refuse_archives_below,
)
from wds_train.conversion.sources.tree import is_folder, read_tree
from wds_train.errors import DataError, UsageError
from wds_train.storage.address import make_name

DIGITS = "digits"
PREFIXES = ("hf", "torchvision", "wds")
# Where data files are looked for in a source: so many levels of folders, so many folders of each.
DEPTH = 3
LOOKED_THROUGH = 8
# Flag -> the attribute of `Wanted`.
FLAGS = {
    "--table": "table",
    "--image-column": "image",
    "--label-column": "label",
    "--split-column": "split",
    "--class-level": "class_level",
}
# Format -> the attributes that it heeds.
HEEDED = {
    "folder": tuple(FLAGS.values()),
    "imagefolder": ("class_level",),
    "table": ("table", "image", "label", "split"),
    "huggingface": ("image", "label", "split"),
    "hf": ("image", "label"),
    "wds": ("class_level",),
}
Opener = Callable[[Path, Spool, Wanted], Source]
FORMATS: dict[str, Opener] = {
    "folder": lambda root, spool, wanted: open_folder(root, wanted),
    "imagefolder": lambda root, spool, wanted: open_image_folder(root, wanted),
    "table": lambda root, spool, wanted: open_table(root, wanted),
    "ilsvrc": lambda root, spool, wanted: imagenet.open_ilsvrc(root),
    "kaggle": lambda root, spool, wanted: imagenet.open_kaggle(root),
    "huggingface": huggingface.open_files,
    "wds": open_tars,
}


def open_source(
    address: str, spool: Spool, form: str | None = None, wanted: Wanted = ANYTHING
) -> Source:
    """Open the source at an address.

    Args:
        address: `digits`, `hf:ID`, `torchvision:CLASS`, `wds:PATH`, or a path.
        spool: Where images that come as a stream are kept.
        form: The format of a path, one of `FORMATS`; else it is what its files look like.
        wanted: What a person said of the source.

    Raises:
        UsageError: There is nothing, or not what `form` says.
        DataError: It cannot become a dataset.
    """
    # Sources that are no path of this machine.
    prefix, rest = _split_prefix(address)
    if address == DIGITS:
        _refuse_unheeded(wanted, DIGITS)
        return check_source(open_digits(spool))
    if prefix == "hf":
        _refuse_unheeded(wanted, prefix)
        return check_source(huggingface.open_hub(rest, spool, wanted))
    if prefix == "torchvision":
        _refuse_unheeded(wanted, prefix)
        downloads = spool.folder.parent.parent / "torchvision"
        return check_source(torchvision.open_torchvision(rest, downloads, spool))
    if prefix == "wds":
        address = rest
        form = "wds"

    # A path: check that it can be read as its format, and with these flags.
    root = Path(address).expanduser().resolve()
    _refuse_path(root, address)
    if root.name == imagenet.TRAIN_TAR:
        root = root.parent
    form = form or recognise(root)
    _refuse_misfit(root, form)
    _refuse_unheeded(wanted, form)
    return check_source(FORMATS[form](root, spool, wanted))


def _split_prefix(address: str) -> tuple[str, str]:
    """Return the prefix of an address, one of `PREFIXES` or empty, and the rest of it."""
    prefix, colon, rest = address.partition(":")
    if colon and prefix in PREFIXES:
        return prefix, rest
    return "", address


def _refuse_path(root: Path, address: str) -> None:
    """Raise `UsageError` when there is nothing at `root`, or its name cannot be printed."""
    if not root.exists():
        remedy = f"SOURCE is {DIGITS!r}, a path, hf:ID, torchvision:CLASS or wds:PATH"
        if address.startswith("s3://"):
            remedy = (
                "sources are read from this machine's disks; tars on S3 are indexed in place: "
                f"wds-train shards index {shlex.quote(address)}"
            )
        raise UsageError(f"{address!r} does not exist; {remedy}")
    if readable(str(root)) != str(root):
        raise UsageError(
            f"{readable(str(root))} has a name that is not UTF-8, or cannot be printed; rename it"
        )


def _refuse_misfit(root: Path, form: str) -> None:
    """Raise `UsageError` when what lies at `root` cannot be of the format `form`."""
    if root.is_file() and form not in ("huggingface", "wds"):
        raise UsageError(f"{root} is a file; give the folder of the images")
    needed = {"ilsvrc": Path(imagenet.TRAIN_TAR), "kaggle": imagenet.KAGGLE_TRAIN}.get(form)
    if needed is not None and not (root / needed).exists():
        raise UsageError(
            f"{root} does not hold {needed}, which --source {form} needs; "
            "leave --source out, or give another folder"
        )


def _refuse_unheeded(wanted: Wanted, form: str) -> None:
    """Raise `UsageError` for a flag that sources of this format do not heed.

    It would be dropped in silence.
    """
    heeded = HEEDED.get(form, ())
    for flag, name in FLAGS.items():
        if getattr(wanted, name) is not None and name not in heeded:
            raise UsageError(
                f"{flag} says nothing of a source that is read as {form}; "
                "leave it out, or name the format: --source FORMAT"
            )


def source_root(address: str) -> Path | None:
    """Return the file or folder of the source at `address`; None for one that is no path."""
    prefix, rest = _split_prefix(address)
    if address == DIGITS or prefix in ("hf", "torchvision"):
        return None
    root = Path(rest).expanduser()
    if root.name == imagenet.TRAIN_TAR:
        return root.parent
    return root


def recognise(root: Path) -> str:
    """Return the format of the source at `root`, one of `FORMATS`.

    Raises:
        UsageError: It is a file of no known format, or holds data files and class folders.
        DataError: It holds archives that cannot be read.
    """
    if (root / imagenet.TRAIN_TAR).is_file():
        return "ilsvrc"
    if (root / imagenet.KAGGLE_TRAIN).is_dir():
        return "kaggle"
    if root.is_file():
        return _recognise_file(root)
    files = _first_files(root)

    # Sort its data files. Parquet next to tars or images may hold no more than facts about them
    # (img2dataset's does).
    data = []
    tars = []
    for path in files:
        if path.suffix == ".arrow" or _holds_images(path):
            data.append(path)
        elif is_tar(path.name):
            tars.append(path)

    # Data files come first; then images, which may also be the rest of an unpacked archive.
    form = "folder"
    if data:
        form = "huggingface"
    elif tars:
        form = "wds"
    elif not read_tree(root).total:
        refuse_archives_below(root, root.rglob("*"))
        if files:  # Parquet without images: this reader says what its columns hold
            form = "huggingface"
    if data or tars:
        first = (data or tars)[0]
        _refuse_class_folders(root, first, form)
    return form


def _recognise_file(path: Path) -> str:
    """Return the format of a single file."""
    if path.suffix in (".arrow", ".parquet"):
        return "huggingface"
    if is_tar(path.name):
        return "wds"
    refuse_archives([path.name], str(path.parent))
    raise UsageError(
        f"{path} is neither a tar, an arrow file nor Parquet; give the folder of the images"
    )


def _holds_images(path: Path) -> bool:
    """Return whether a Parquet file has a column of bytes; one that cannot be read may have."""
    if path.suffix != ".parquet":
        return False
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError):
        return True
    return any(holds_bytes(field.type) for field in schema)


def _refuse_class_folders(root: Path, data: Path, form: str) -> None:
    """Raise `UsageError` where a source holds both data files and class folders.

    One may be an archive, and the other what was unpacked of it.
    """
    try:
        layout = read_layout(read_tree(root), ANYTHING)
    except (DataError, UsageError):
        return
    total = 0
    for part in layout.parts:
        total += part.folder.total
    raise UsageError(
        f"{root} holds {data.relative_to(root)} and {total:,} images in class folders; "
        f"say which are the source: --source {form}, or --source folder"
    )


def _first_files(root: Path) -> list[Path]:
    """Return the data files in `root` and in some folders below it.

    They are enough to tell data files from class folders.
    """
    # Level by level: data files lie near the top, and class folders may be many.
    found = []
    level = [root]
    for _ in range(DEPTH + 1):
        below = []
        for place in level:
            for entry in scan(place):
                if is_litter(entry.name):
                    continue
                if _holds_data(entry.name):
                    found.append(Path(entry.path))
                elif is_folder(entry):
                    below.append(Path(entry.path))
        level = below[:LOOKED_THROUGH]
    return found


def _holds_data(name: str) -> bool:
    """Return whether a file of this name may hold many images or labels."""
    return name.endswith((".arrow", ".parquet")) or is_tar(name)


def name_of(address: str) -> str:
    """Return the default name of a dataset made from `address`: its last part."""
    return make_name(_last_part(address))


def _last_part(address: str) -> str:
    prefix, rest = _split_prefix(address)
    if prefix in ("hf", "torchvision"):
        return rest.partition(":")[0].rpartition("/")[2]
    return Path(rest).expanduser().resolve().name
