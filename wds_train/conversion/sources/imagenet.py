"""ImageNet (ILSVRC2012) in the two forms that it is handed out in: its own tars, and Kaggle's folders.

Layouts: https://image-net.org/challenges/LSVRC/2012/ (ILSVRC2012_img_train.tar is a tar of 1,000 class tars; the ground
truth counts ILSVRC2012_ID from 1, and the devkit's meta.mat maps that to WordNet ids) and
https://www.kaggle.com/c/imagenet-object-localization-challenge/data.
"""

import csv
import io
import tarfile
from pathlib import Path

from wds_train.conversion.sources.imagefolder import Layout, add_class, imagenet_names, note_layout, read_classes
from wds_train.conversion.sources.labels import to_classes
from wds_train.conversion.sources.scan import SplitScan, scan
from wds_train.conversion.sources.source import ANYTHING, Source, Understood
from wds_train.conversion.sources.splits import from_scans
from wds_train.conversion.sources.tars import is_safe, tar_members
from wds_train.conversion.sources.tree import DiskFiles, read_tree
from wds_train.errors import DataError

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12"
TRUTH = "ILSVRC2012_validation_ground_truth.txt"
# A line per validation image, its WordNet id: the form in which several projects hand out the ground truth.
SYNSET_TRUTH = "imagenet_2012_validation_synset_labels.txt"
KAGGLE_TRAIN = Path("ILSVRC/Data/CLS-LOC/train")
MAX_DEVKIT_FILE = 64 << 20


def open_ilsvrc(root: Path) -> Source:
    """The folder that holds the train tar and, for a val split, the val tar and the devkit or a ground-truth file."""
    train, names, classes = SplitScan("train"), dict[str, str](), list[str]()
    outer = root / TRAIN_TAR
    train.stamp.add(TRAIN_TAR, outer.stat())
    inner = sorted((member for member in tar_members(outer) if is_safe(train, TRAIN_TAR, member)), key=lambda m: m.name)
    for label, member in enumerate(inner):
        wnid = member.name.rpartition("/")[2].removesuffix(".tar")
        classes.append(wnid)
        if not _add_images(train, outer, wnid, label, (member.data_offset, member.size)):
            raise DataError(f"{outer}: the class {wnid} holds no images; download it again")
    scans = [train]
    if (root / VAL_TAR).is_file():
        truth, names = _ground_truth(root)
        scans.append(_val_tar(root / VAL_TAR, truth, classes))
    understood = Understood(
        f"ImageNet's own tars; splits by {TRAIN_TAR} and {VAL_TAR}", "the class tars, and the ground truth"
    )
    infos = to_classes(classes, imagenet_names(classes) | names)
    return from_scans("imagenet ILSVRC2012 tars", infos, scans, understood)


def _add_images(found: SplitScan, outer: Path, wnid: str, label: int, where: tuple[int, int]) -> bool:
    origin = f"{outer}: {wnid}"
    images = [
        found.add(label, f"{wnid}/{member.name}", str(outer), member.data_offset, member.size)
        for member in tar_members(outer, *where)
        if is_safe(found, origin, member)
    ]
    return any(images)


def _val_tar(path: Path, truth: list[str], classes: list[str]) -> SplitScan:
    found = SplitScan("val")
    found.stamp.add(path.name, path.stat())
    images = sorted((m for m in tar_members(path) if is_safe(found, str(path), m)), key=lambda m: m.name)
    if len(images) != len(truth):
        raise DataError(
            f"{path} holds {len(images)} images, the ground truth has {len(truth)} lines; they must be equal"
        )
    for member, wnid in zip(images, truth, strict=True):
        found.add(
            _label(wnid, classes, "ground truth"), f"{wnid}/{member.name}", str(path), member.data_offset, member.size
        )
    return found


def _label(wnid: str, classes: list[str], where: str) -> int:
    if wnid not in classes:
        raise DataError(f"the {where} names the class {wnid!r}, which train lacks")
    return classes.index(wnid)


def _ground_truth(root: Path) -> tuple[list[str], dict[str, str]]:
    """The WordNet id of every validation image in the order of their names, and the classes' names where known."""
    plain = next((path for path in (root / SYNSET_TRUTH, root / TRUTH) if path.is_file()), None)
    lines = _lines(plain.read_bytes()) if plain else []
    if lines and not lines[0].isdigit():
        return [line.split()[-1] for line in lines], {}
    meta = _devkit_file(root, "data/meta.mat")
    numbers = lines or _lines(_devkit_file(root, f"data/{TRUTH}"))
    wnids, names = _synsets(meta)
    unknown = [number for number in numbers if not number.isdecimal() or len(number) > 9 or int(number) not in wnids]
    if unknown:
        raise DataError(f"the ground truth holds the id {unknown[0][:40]!r}, which meta.mat does not name")
    return [wnids[int(number)] for number in numbers], names


def _lines(data: bytes) -> list[str]:
    return [line.strip() for line in data.decode(errors="replace").splitlines() if line.strip()]


def _devkit_file(root: Path, name: str) -> bytes:
    """A file of the devkit, which lies in `root` as a folder or as the tar.gz that it comes as."""
    folder, archive = root / DEVKIT, root / f"{DEVKIT}.tar.gz"
    if (folder / name).is_file():
        return (folder / name).read_bytes()
    if not archive.is_file():
        raise DataError(f"{VAL_TAR} needs {archive.name} (or {SYNSET_TRUTH}) beside it in {root}: it holds the labels")
    try:
        with tarfile.open(archive, "r:gz") as tar:
            file = tar.extractfile(f"{DEVKIT}/{name}")
            if file is None or tar.getmember(f"{DEVKIT}/{name}").size > MAX_DEVKIT_FILE:
                raise DataError(f"{archive}: {name} is not a file of sensible size")
            return file.read()
    except (tarfile.TarError, KeyError, OSError, EOFError) as error:
        raise DataError(f"{archive} lacks {DEVKIT}/{name} or is damaged ({error}); download it again") from error


def _synsets(meta: bytes) -> tuple[dict[int, str], dict[str, str]]:
    """ILSVRC2012_ID -> WordNet id, and WordNet id -> words, from the devkit's meta.mat."""
    from scipy.io import loadmat

    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True, variable_names=["synsets"])["synsets"]
        rows = [(int(row["ILSVRC2012_ID"]), str(row["WNID"]), str(row["words"])) for row in synsets]
    except (KeyError, ValueError, TypeError, OSError) as error:
        raise DataError(f"the devkit's meta.mat cannot be read ({error}); download it again") from error
    return {number: wnid for number, wnid, _ in rows}, {wnid: words for _, wnid, words in rows}


def open_kaggle(root: Path) -> Source:
    """Kaggle's unpacked archive: `ILSVRC/`, `LOC_val_solution.csv` and `LOC_synset_mapping.txt` in `root`."""
    train_folder = root / KAGGLE_TRAIN
    names = _mapping(root / "LOC_synset_mapping.txt")
    layout = Layout()
    read_classes(layout, "train", read_tree(train_folder), ANYTHING, in_split=True)
    classes = [part.name for part in layout.parts]
    train = SplitScan("train")
    for label, part in enumerate(layout.parts):
        add_class(train, label, part, DiskFiles())
    note_layout(layout, train, DiskFiles())
    scans = [train]
    val_folder = train_folder.with_name("val")
    if val_folder.is_dir():
        scans.append(_kaggle_val(val_folder, root / "LOC_val_solution.csv", classes))
    understood = Understood(
        "Kaggle's ImageNet; splits by the folders train and val", "class folders, and LOC_val_solution.csv"
    )
    return from_scans("imagenet Kaggle", to_classes(classes, names), scans, understood)


def _kaggle_val(folder: Path, solution: Path, classes: list[str]) -> SplitScan:
    if not solution.is_file():
        raise DataError(f"{solution} is missing: it holds the labels of {folder}")
    try:
        with solution.open(newline="") as file:
            rows = [(row["ImageId"], row["PredictionString"].split()) for row in csv.DictReader(file)]
    except (KeyError, AttributeError, ValueError, csv.Error) as error:
        raise DataError(
            f"{solution} cannot be read ({error!r}); its columns are ImageId and PredictionString"
        ) from error
    if empty := next((image for image, words in rows if not words), None):
        raise DataError(f"{solution} names no class for {empty}; download it again")
    wnids = {image: words[0] for image, words in rows}
    found = SplitScan("val")
    for entry in scan(folder):
        path = Path(entry.path)
        wnid = wnids.pop(path.stem, None)
        if wnid is None:
            found.note(path, "left out", f"{solution.name} does not name it")
        else:
            found.add_file(_label(wnid, classes, solution.name), path, f"{wnid}/{path.name}")
    for missing in wnids:
        found.note(folder / missing, "left out", f"{solution.name} names it, but it is not there")
    return found


def _mapping(path: Path) -> dict[str, str]:
    """WordNet id -> human name: 'n01440764 tench, Tinca tinca' a line."""
    if not path.is_file():
        raise DataError(f"{path} is missing: it names the classes")
    return {line[:9]: line[10:].strip() for line in _lines(path.read_bytes())}
