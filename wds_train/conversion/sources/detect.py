"""Which source an address means: by its own look, or as --source says."""

import shlex
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from wds_train.console import readable
from wds_train.conversion.sources import huggingface, imagenet, torchvision
from wds_train.conversion.sources.digits import digits
from wds_train.conversion.sources.folder import folder, table
from wds_train.conversion.sources.imagefolder import image_folder, read_layout
from wds_train.conversion.sources.litter import is_litter
from wds_train.conversion.sources.scan import scan
from wds_train.conversion.sources.source import ANYTHING, Source, Wanted
from wds_train.conversion.sources.splits import checked
from wds_train.conversion.sources.spool import Spool
from wds_train.conversion.sources.tables import holds_bytes
from wds_train.conversion.sources.tars import is_tar, refuse_archives, webdataset
from wds_train.conversion.sources.tree import is_folder, read_tree
from wds_train.errors import DataError, UsageError
from wds_train.storage.address import make_name

DIGITS = "digits"
DEPTH = 3  # levels of folders in a source that are looked into for data files
LOOKED_THROUGH = 8  # folders of each
FLAGS = {
    "--table": "table",
    "--image-column": "image",
    "--label-column": "label",
    "--split-column": "split",
    "--class-level": "class_level",
}
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
    "folder": lambda root, spool, wanted: folder(root, wanted),
    "imagefolder": lambda root, spool, wanted: image_folder(root, wanted),
    "table": lambda root, spool, wanted: table(root, wanted),
    "ilsvrc": lambda root, spool, wanted: imagenet.ilsvrc_tars(root),
    "kaggle": lambda root, spool, wanted: imagenet.kaggle(root),
    "huggingface": huggingface.local,
    "wds": webdataset,
}


def open_source(address: str, spool: Spool, form: str | None = None, wanted: Wanted = ANYTHING) -> Source:
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
    if address == DIGITS:
        _refuse_unheeded(wanted, DIGITS)
        return checked(digits(spool))
    prefix, colon, rest = address.partition(":")
    if colon and prefix in ("hf", "torchvision"):
        _refuse_unheeded(wanted, prefix)
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
            remedy = f"sources are read from this machine's disks; tars on S3 are indexed in place: wds-train shards index {shlex.quote(address)}"
        raise UsageError(f"{address!r} does not exist; {remedy}")
    if readable(str(root)) != str(root):
        raise UsageError(f"{readable(str(root))} has a name that is not UTF-8, or cannot be printed; rename it")
    if root.name == imagenet.TRAIN_TAR:
        root = root.parent
    form = form or recognise(root)
    _refuse_misfit(root, form)
    _refuse_unheeded(wanted, form)
    return checked(FORMATS[form](root, spool, wanted))


def _refuse_misfit(root: Path, form: str) -> None:
    """Raise `UsageError` when what lies at `root` cannot be of the format `form`."""
    if root.is_file() and form not in ("huggingface", "wds"):
        raise UsageError(f"{root} is a file; give the folder of the images")
    needed = {"ilsvrc": Path(imagenet.TRAIN_TAR), "kaggle": imagenet.KAGGLE_TRAIN}.get(form)
    if needed is not None and not (root / needed).exists():
        raise UsageError(
            f"{root} does not hold {needed}, which --source {form} needs; leave --source out, or give another folder"
        )


def _refuse_unheeded(wanted: Wanted, form: str) -> None:
    """Raise `UsageError` for a flag that sources of this format do not heed: it would be dropped in silence."""
    given = [flag for flag, name in FLAGS.items() if getattr(wanted, name) is not None]
    unheeded = [flag for flag in given if FLAGS[flag] not in HEEDED.get(form, ())]
    if unheeded:
        raise UsageError(
            f"{unheeded[0]} says nothing of a source that is read as {form}; leave it out, or name the format: --source FORMAT"
        )


def source_root(address: str) -> Path | None:
    """Return where the source at `address` lies, as far as it is a path."""
    prefix, colon, rest = address.partition(":")
    if address == DIGITS or (colon and prefix in ("hf", "torchvision")):
        return None
    root = Path(rest if colon and prefix == "wds" else address).expanduser()
    return root.parent if root.name == imagenet.TRAIN_TAR else root


def recognise(root: Path) -> str:
    """Return the format of what lies at `root`."""
    if (root / imagenet.TRAIN_TAR).is_file():
        return "ilsvrc"
    if (root / imagenet.KAGGLE_TRAIN).is_dir():
        return "kaggle"
    if root.is_file():
        return _recognise_file(root)
    files = _first_files(root)
    # Parquet beside tars, or beside images, may hold no more than what is known of them (img2dataset's does).
    data = [path for path in files if path.suffix == ".arrow" or _holds_images(path)]
    tars = [path for path in files if is_tar(path.name)]
    form = "folder"
    if data:
        form = "huggingface"
    elif tars:
        form = "wds"
    elif not read_tree(root).total:
        refuse_archives((path.relative_to(root).as_posix() for path in root.rglob("*")), str(root))
        form = "huggingface" if files else "folder"  # the former says what its columns hold
    if data or tars:
        _refuse_images_beside(root, (data or tars)[0], form)
    return form


def _recognise_file(path: Path) -> str:
    """Return the format of a single file."""
    if path.suffix in (".arrow", ".parquet"):
        return "huggingface"
    if is_tar(path.name):
        return "wds"
    refuse_archives([path.name], str(path.parent))
    raise UsageError(f"{path} is neither a tar, an arrow file nor Parquet; give the folder of the images")


def _holds_images(path: Path) -> bool:
    """Tell whether a Parquet file has a column of bytes; one that cannot be read is looked at later."""
    if path.suffix != ".parquet":
        return False
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError):
        return True
    return any(holds_bytes(field.type) for field in schema)


def _refuse_images_beside(root: Path, data: Path, form: str) -> None:
    """Raise `UsageError` where class folders lie beside data files: an archive beside what was unpacked of it, perhaps."""
    try:
        layout = read_layout(read_tree(root), ANYTHING)
    except (DataError, UsageError):
        return
    total = sum(part.folder.total for part in layout.parts)
    raise UsageError(
        f"{root} holds {data.relative_to(root)} and {total:,} images in class folders; say which are the source: "
        f"--source {form}, or --source folder"
    )


def _first_files(root: Path) -> list[Path]:
    """Return the data files in `root` and in folders a little below it: enough to tell them from class folders."""
    found = []
    level = [root]
    for _ in range(DEPTH + 1):
        entries = [entry for place in level for entry in scan(place) if not is_litter(entry.name)]
        found += [Path(entry.path) for entry in entries if _holds_data(entry.name)]
        level = [Path(entry.path) for entry in entries if not _holds_data(entry.name) and is_folder(entry)]
        level = level[:LOOKED_THROUGH]
    return found


def _holds_data(name: str) -> bool:
    """Tell whether a file of this name may hold many images or labels."""
    return name.endswith((".arrow", ".parquet")) or is_tar(name)


def name_of(address: str) -> str:
    """What a dataset made from `address` is called: the last part of it, as far as a name can hold it."""
    return make_name(_last_part(address))


def _last_part(address: str) -> str:
    prefix, colon, rest = address.partition(":")
    if colon and prefix in ("hf", "torchvision"):
        return rest.partition(":")[0].rpartition("/")[2]
    return Path(rest if colon and prefix == "wds" else address).expanduser().resolve().name
