"""ImageNet (ILSVRC2012) in its two published forms: its own tars, and Kaggle's folders.

Layouts: https://image-net.org/challenges/LSVRC/2012/ (ILSVRC2012_img_train.tar is a tar of 1,000
class tars; the ground truth counts ILSVRC2012_ID from 1, and the devkit's meta.mat maps that to
WordNet ids) and https://www.kaggle.com/c/imagenet-object-localization-challenge/data.
"""

import csv
import io
import tarfile
from pathlib import Path

from wds_train.conversion.sources.imagefolder import (
    add_class,
    imagenet_names,
    note_layout,
)
from wds_train.conversion.sources.labels import to_classes
from wds_train.conversion.sources.layout import Layout, read_classes
from wds_train.conversion.sources.scan import SplitScan, scan
from wds_train.conversion.sources.source import ANYTHING, Source, Understood
from wds_train.conversion.sources.splits import from_scans
from wds_train.conversion.sources.tars import Member, is_safe, tar_members
from wds_train.conversion.sources.tree import DiskFiles, read_tree
from wds_train.errors import DataError

# Names that ImageNet gives its files.
TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12"
TRUTH = "ILSVRC2012_validation_ground_truth.txt"
# The WordNet id of a validation image in each line: the form in which several projects publish the
# ground truth.
SYNSET_TRUTH = "imagenet_2012_validation_synset_labels.txt"
# Of Kaggle's archive.
KAGGLE_TRAIN = Path("ILSVRC/Data/CLS-LOC/train")
MAX_DEVKIT_FILE = 64 << 20  # bytes; the ground truth has 50,000 lines of at most 4 digits


def open_ilsvrc(root: Path) -> Source:
    """Open ImageNet's own tars.

    Args:
        root: The folder that holds the train tar and, for a val split, the val tar and the devkit
            or a ground-truth file.

    Raises:
        DataError: A tar is damaged, or the labels of the val split are missing.
    """
    # Each member of the train tar is the tar of a class. Sorted by name, their numbers are those of
    # torchvision and timm.
    train = SplitScan("train")
    outer = root / TRAIN_TAR
    train.stamp.add(TRAIN_TAR, outer.stat())
    classes = []
    for label, member in enumerate(_members_by_name(train, TRAIN_TAR, outer)):
        wnid = member.name.rpartition("/")[2].removesuffix(".tar")
        classes.append(wnid)
        if not _add_images(train, outer, wnid, label, (member.data_offset, member.size)):
            raise DataError(f"{outer}: the class {wnid} holds no images; download it again")

    # The val tar holds images alone; their labels are in the ground truth.
    scans = [train]
    names: dict[str, str] = {}
    if (root / VAL_TAR).is_file():
        truth, names = _read_ground_truth(root)
        scans.append(_scan_val_tar(root / VAL_TAR, truth, classes))
    understood = Understood(
        layout=f"ImageNet's own tars; splits by {TRAIN_TAR} and {VAL_TAR}",
        labels="the class tars, and the ground truth",
    )
    infos = to_classes(classes, imagenet_names(classes) | names)
    return from_scans("imagenet ILSVRC2012 tars", infos, scans, understood)


def _members_by_name(found: SplitScan, where: str, path: Path) -> list[Member]:
    """Return the members of a tar, sorted by name, and note those that cannot be used.

    Args:
        found: The scan that gets the notes.
        where: The tar, for the notes.
        path: Its path.
    """
    members = []
    for member in tar_members(path):
        if is_safe(found, where, member):
            members.append(member)
    # The ground truth has the validation images in the order of their names.
    members.sort(key=lambda member: member.name)
    return members


def _add_images(
    found: SplitScan, outer: Path, wnid: str, label: int, place: tuple[int, int]
) -> bool:
    """Add the images of a class tar.

    Args:
        found: The scan that they are added to.
        outer: The train tar.
        wnid: The class.
        label: Its number.
        place: Offset and bytes of the class tar in the train tar.

    Returns:
        True if there are any.
    """
    added = False
    for member in tar_members(outer, *place):
        if is_safe(found, f"{outer}: {wnid}", member):
            name = f"{wnid}/{member.name}"
            added |= found.add(label, name, str(outer), member.data_offset, member.size)
    return added


def _scan_val_tar(path: Path, truth: list[str], classes: list[str]) -> SplitScan:
    """Scan the val tar; `truth` has the WordNet id of every image in the order of their names."""
    found = SplitScan("val")
    found.stamp.add(path.name, path.stat())
    images = _members_by_name(found, str(path), path)
    if len(images) != len(truth):
        raise DataError(
            f"{path} holds {len(images)} images, the ground truth has {len(truth)} lines; "
            "they must be equal"
        )
    for member, wnid in zip(images, truth, strict=True):
        label = _number_of(wnid, classes, "ground truth")
        name = f"{wnid}/{member.name}"
        found.add(label, name, str(path), member.data_offset, member.size)
    return found


def _number_of(wnid: str, classes: list[str], where: str) -> int:
    """Return the number of the class `wnid`, which `where` names."""
    if wnid not in classes:
        raise DataError(f"the {where} names the class {wnid!r}, which train lacks")
    return classes.index(wnid)


def _read_ground_truth(root: Path) -> tuple[list[str], dict[str, str]]:
    """Read the labels of the validation images.

    Returns:
        The WordNet id of every image in the order of their names; and the classes' names, as far as
        they are known.
    """
    # A plain file may hold the WordNet ids themselves.
    lines: list[str] = []
    for path in (root / SYNSET_TRUTH, root / TRUTH):
        if path.is_file():
            lines = _split_lines(path.read_bytes())
            break
    if lines and not lines[0].isdigit():
        return [line.split()[-1] for line in lines], {}

    # Else there are numbers, which the devkit explains. They are no labels: ILSVRC2012_ID has an
    # order of its own, and every validation image would be mislabelled.
    meta = _read_devkit_file(root, "data/meta.mat")
    numbers = lines or _split_lines(_read_devkit_file(root, f"data/{TRUTH}"))
    wnids, names = _read_synsets(meta)
    truth = []
    for number in numbers:
        known = number.isdecimal() and len(number) <= 9 and int(number) in wnids
        if not known:
            raise DataError(
                f"the ground truth holds the id {number[:40]!r}, which meta.mat does not name"
            )
        truth.append(wnids[int(number)])
    return truth, names


def _split_lines(data: bytes) -> list[str]:
    """Return the lines of a text that are not empty."""
    lines = data.decode(errors="replace").splitlines()
    return [line.strip() for line in lines if line.strip()]


def _read_devkit_file(root: Path, name: str) -> bytes:
    """Return a file of the devkit, which lies in `root` as a folder or as a tar.gz."""
    folder = root / DEVKIT
    archive = root / f"{DEVKIT}.tar.gz"
    if (folder / name).is_file():
        return (folder / name).read_bytes()
    if not archive.is_file():
        raise DataError(
            f"{VAL_TAR} needs {archive.name} (or {SYNSET_TRUTH}) beside it in {root}: "
            "it holds the labels"
        )
    try:
        with tarfile.open(archive, "r:gz") as tar:
            file = tar.extractfile(f"{DEVKIT}/{name}")
            if file is None or tar.getmember(f"{DEVKIT}/{name}").size > MAX_DEVKIT_FILE:
                raise DataError(f"{archive}: {name} is not a file of sensible size")
            return file.read()
    except (tarfile.TarError, KeyError, OSError, EOFError) as error:
        raise DataError(
            f"{archive} lacks {DEVKIT}/{name} or is damaged ({error}); download it again"
        ) from error


def _read_synsets(meta: bytes) -> tuple[dict[int, str], dict[str, str]]:
    """Read the devkit's meta.mat.

    Returns:
        ILSVRC2012_ID -> WordNet id, and WordNet id -> words.
    """
    from scipy.io import loadmat

    wnids = {}
    names = {}
    try:
        found = loadmat(io.BytesIO(meta), squeeze_me=True, variable_names=["synsets"])
        for row in found["synsets"]:
            wnid = str(row["WNID"])
            wnids[int(row["ILSVRC2012_ID"])] = wnid
            names[wnid] = str(row["words"])
    except (KeyError, ValueError, TypeError, OSError) as error:
        raise DataError(
            f"the devkit's meta.mat cannot be read ({error}); download it again"
        ) from error
    return wnids, names


def open_kaggle(root: Path) -> Source:
    """Open Kaggle's unpacked archive.

    Args:
        root: The folder with `ILSVRC/`, `LOC_val_solution.csv` and `LOC_synset_mapping.txt`.

    Raises:
        DataError: One of the two tables is missing or cannot be read.
    """
    # The class folders of train say the classes.
    train_folder = root / KAGGLE_TRAIN
    names = _read_mapping(root / "LOC_synset_mapping.txt")
    layout = Layout()
    read_classes(layout, "train", read_tree(train_folder), ANYTHING, in_split=True)
    train = SplitScan("train")
    classes = []
    for label, part in enumerate(layout.parts):
        classes.append(part.name)
        add_class(train, label, part, DiskFiles())
    note_layout(layout, train, DiskFiles())

    # The validation images lie in one folder; a table labels them.
    scans = [train]
    val_folder = train_folder.with_name("val")
    if val_folder.is_dir():
        scans.append(_scan_kaggle_val(val_folder, root / "LOC_val_solution.csv", classes))
    understood = Understood(
        layout="Kaggle's ImageNet; splits by the folders train and val",
        labels="class folders, and LOC_val_solution.csv",
    )
    return from_scans("imagenet Kaggle", to_classes(classes, names), scans, understood)


def _scan_kaggle_val(folder: Path, solution: Path, classes: list[str]) -> SplitScan:
    """Scan the validation images in `folder`, whose labels are in the table `solution`."""
    wnids = _read_solution(folder, solution)
    found = SplitScan("val")
    for entry in scan(folder):
        path = Path(entry.path)
        wnid = wnids.pop(path.stem, None)
        if wnid is None:
            found.note(path, "left out", f"{solution.name} does not name it")
        else:
            label = _number_of(wnid, classes, solution.name)
            found.add_file(label, path, f"{wnid}/{path.name}")
    # Rows that are left name images that did not arrive.
    for missing in wnids:
        found.note(folder / missing, "left out", f"{solution.name} names it, but it is not there")
    return found


def _read_solution(folder: Path, solution: Path) -> dict[str, str]:
    """Return the WordNet id of each validation image, by its name without a suffix."""
    if not solution.is_file():
        raise DataError(f"{solution} is missing: it holds the labels of {folder}")
    rows = []
    try:
        with solution.open(newline="") as file:
            for row in csv.DictReader(file):
                rows.append((row["ImageId"], row["PredictionString"].split()))
    except (KeyError, AttributeError, ValueError, csv.Error) as error:
        raise DataError(
            f"{solution} cannot be read ({error!r}); its columns are ImageId and PredictionString"
        ) from error

    # The first word is the class; boxes follow.
    wnids = {}
    for image, words in rows:
        if not words:
            raise DataError(f"{solution} names no class for {image}; download it again")
        wnids[image] = words[0]
    return wnids


def _read_mapping(path: Path) -> dict[str, str]:
    """Return the classes' names by WordNet id; each line is like 'n01440764 tench, Tinca tinca'."""
    if not path.is_file():
        raise DataError(f"{path} is missing: it names the classes")
    return {line[:9]: line[10:].strip() for line in _split_lines(path.read_bytes())}
