"""The same real photographs, laid out as each kind of source is handed out."""

import csv
import functools
import gzip
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Tree = dict[str, dict[str, list[tuple[str, bytes]]]]  # split -> WordNet id -> (file name, bytes)

WNIDS = ("n01440764", "n02102040", "n03028079")
NAMES = ("tench, Tinca tinca", "English springer", "church, church building")
# ILSVRC2012_ID counts in an order of its own, which is not that of the WordNet ids: a converter that mixes them up
# mislabels every validation image.
ILSVRC_IDS = (3, 1, 2)


@functools.cache
def photos() -> tuple[bytes, ...]:
    """24 different JPEGs, cut from the two photographs in scikit-learn's wheel."""
    from sklearn.datasets import load_sample_images

    cut = []
    for number in range(24):
        pixels = load_sample_images().images[number % 2]
        top, left, side = 9 * number, 17 * number, 64 + 8 * (number % 5)
        out = io.BytesIO()
        Image.fromarray(pixels[top : top + side, left : left + side + 16]).save(
            out, "JPEG", quality=80
        )
        cut.append(out.getvalue())
    return tuple(cut)


def small_tree() -> Tree:
    """5 train and 3 val photographs in each of three classes."""
    images = list(photos())
    tree: Tree = {"train": {}, "val": {}}
    for label, wnid in enumerate(WNIDS):
        mine = images[8 * label : 8 * label + 8]
        tree["train"][wnid] = [(f"{wnid}_{n}.JPEG", data) for n, data in enumerate(mine[:5])]
        tree["val"][wnid] = [
            (f"ILSVRC2012_val_{3 * n + label + 1:08d}.JPEG", data)
            for n, data in enumerate(mine[5:])
        ]
    return tree


def imagenette() -> Tree:
    """imagenette128.tar of the shared data, or a skip that names it."""
    shared = Path(os.environ.get("WDS_SHARED", Path(__file__).parents[2] / "shared"))
    path = shared / "data" / "imagenette128.tar"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    tree: Tree = {"train": {}, "val": {}}
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isfile() and (file := tar.extractfile(member)):
                split, wnid, name = member.name.split("/")[-3:]
                tree[split].setdefault(wnid, []).append((name, file.read()))
    return tree


def image_folder(root: Path, tree: Tree) -> Path:
    for split, classes in tree.items():
        for wnid, images in classes.items():
            (root / split / wnid).mkdir(parents=True)
            for name, data in images:
                (root / split / wnid / name).write_bytes(data)
    return root


def tar_of(files: list[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def _numbered(tree: Tree) -> list[tuple[str, str, bytes]]:
    """The val images as ImageNet has them: (wnid, ILSVRC2012_val_NNNNNNNN.JPEG, bytes), in the order of the numbers."""
    images = [(wnid, name, data) for wnid, images in tree["val"].items() for name, data in images]
    images.sort(key=lambda image: image[1])
    return [
        (wnid, f"ILSVRC2012_val_{n + 1:08d}.JPEG", data) for n, (wnid, _, data) in enumerate(images)
    ]


def ilsvrc(root: Path, tree: Tree, *, devkit: bool = True) -> Path:
    """ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and the devkit's tar.gz."""
    from scipy.io import savemat

    root.mkdir()
    classes = [(f"{wnid}.tar", tar_of(images)) for wnid, images in tree["train"].items()]
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar_of(classes))
    val = _numbered(tree)
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar_of([(name, data) for _, name, data in val]))
    if not devkit:
        return root
    wnids = list(tree["train"])
    ids = ILSVRC_IDS if len(wnids) == 3 else tuple(range(len(wnids), 0, -1))
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    rows = [(ids[n], wnid, f"words of {wnid}", 0) for n, wnid in enumerate(wnids)] + [
        (1001, "n00001740", "entity", 9)
    ]
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(rows, dtype=kind).reshape(-1, 1)})
    truth = "".join(f"{ids[wnids.index(wnid)]}\n" for wnid, _, _ in val)
    base = "ILSVRC2012_devkit_t12"
    kit = tar_of(
        [
            (f"{base}/data/meta.mat", meta.getvalue()),
            (f"{base}/data/ILSVRC2012_validation_ground_truth.txt", truth.encode()),
        ]
    )
    (root / f"{base}.tar.gz").write_bytes(gzip.compress(kit))
    return root


def kaggle(root: Path, tree: Tree) -> Path:
    base = root / "ILSVRC" / "Data" / "CLS-LOC"
    image_folder(base, {"train": tree["train"]})
    (base / "val").mkdir()
    (base / "test").mkdir()
    with (root / "LOC_val_solution.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["ImageId", "PredictionString"])
        for wnid, name, data in _numbered(tree):
            (base / "val" / name).write_bytes(data)
            rows.writerow([name.removesuffix(".JPEG"), f"{wnid} 1 2 30 40 {wnid} 5 6 70 80 "])
    lines = [f"{wnid} words of {wnid}" for wnid in tree["train"]]
    (root / "LOC_synset_mapping.txt").write_text("\n".join(lines) + "\n")
    return root


def huggingface_dict(tree: Tree):  # type: ignore[no-untyped-def]
    """A `datasets.DatasetDict` with the splits `train` and `validation`, its images undecoded."""
    import datasets

    wnids = list(tree["train"])
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=wnids)}
    )
    splits = {}
    for split, classes in tree.items():
        rows = [
            (wnids.index(wnid), name, data)
            for wnid, images in classes.items()
            for name, data in images
        ]
        content = {
            "image": [{"bytes": data, "path": name} for _, name, data in rows],
            "label": [row[0] for row in rows],
        }
        splits["validation" if split == "val" else split] = datasets.Dataset.from_dict(
            content, features=features
        )
    return datasets.DatasetDict(splits)


def save_to_disk(root: Path, tree: Tree) -> Path:
    huggingface_dict(tree).save_to_disk(str(root), num_shards={"train": 2, "validation": 1})
    return root


def parquet(root: Path, tree: Tree) -> Path:
    (root / "data").mkdir(parents=True)
    for split, rows in huggingface_dict(tree).items():
        rows.to_parquet(str(root / "data" / f"{split}-00000-of-00001.parquet"), batch_size=4)
    return root


def webdataset(root: Path, tree: Tree) -> Path:
    """Two train tars and a val tar by webdataset's own writer, labels in `.cls`."""
    import webdataset

    root.mkdir()
    wnids = list(tree["train"])
    for split, classes in tree.items():
        rows = [
            (wnids.index(wnid), name, data)
            for wnid, images in classes.items()
            for name, data in images
        ]
        per_tar = len(rows) if split == "val" else len(rows) // 2 + 1
        for start in range(0, len(rows), per_tar):
            with webdataset.TarWriter(str(root / f"some-{split}-{start:06d}.tar")) as tar:
                for label, name, data in rows[start : start + per_tar]:
                    tar.write(
                        {
                            "__key__": name.split(".")[0],
                            "jpg": data,
                            "cls": label,
                            "txt": f"a photo of {label}",
                        }
                    )
    return root
