"""The page's own reader and model, without PyTorch: they agree with ours on images, and refuse what is none."""

import importlib.util
import io
import sys
import zlib
from pathlib import Path
from types import ModuleType

import layouts
import numpy as np
import pytest
import torch
from PIL import Image

from wds_train.cli import main
from wds_train.data.dataset import Dataset
from wds_train.evaluation.evaluate import Member, View, chosen_weights
from wds_train.serving.classify import Classifier, sample
from wds_train.transforms.decode import decode_center

pytest.importorskip("onnxruntime")
CPU = torch.device("cpu")
PAGE = Path(__file__).parents[2] / "wds_train" / "serving" / "space" / "classifier.py"


@pytest.fixture(scope="module")
def page() -> ModuleType:
    """`classifier.py` of the page, which is a program's module and of no package."""
    spec = importlib.util.spec_from_file_location("classifier", PAGE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["classifier"] = module  # where its dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_it_imports_no_pytorch() -> None:
    for name in ("classifier.py", "app.py"):
        text = (PAGE.parent / name).read_text()
        assert "torch" not in text.replace("PyTorch", "") and "wds_train" not in text


@pytest.fixture(scope="module")
def file(served: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    assert main(["export", served, "--format", "onnx", "--to", str(path)]) == 0
    return path


def test_it_answers_as_we_do(page: ModuleType, file: Path, served: str, digits: Dataset) -> None:
    theirs = page.Classifier(file)
    photos = [sample(digits.split("val"), number) for number in range(60)]
    weights = chosen_weights(served, "best", None)
    ours = [logits for _, logits in Classifier(weights, None, CPU).logits(photos)]
    answers = [theirs.answer(page.opened(photo.read())) for photo in photos]
    assert [answer.top(1)[0] for answer in answers] == [int(logits.argmax()) for logits in ours]
    assert {answer.heat.min() >= 0 and answer.heat.max() <= 1 for answer in answers} == {True}
    assert theirs.shown(page.opened(photos[0].read()), answers[0].heat).size == (448, 448)


@pytest.mark.parametrize("side", [48, 200])
def test_it_sees_a_photograph_as_the_validation_does(page: ModuleType, file: Path, side: int) -> None:
    theirs = page.Classifier(file)
    theirs.facts["view"] = {"side": side, "crop": 0.875, "flip": False}
    for data in [*layouts.photos(), encoded(PHOTO.resize((4000, 2)), "PNG")]:
        ours = np.empty((side, side, 3), np.uint8)
        decode_center(data, 0.875, ours)
        assert (theirs.pixels(page.opened(data)) == ours).all()


def test_mirror_images_are_averaged_where_the_validation_did(page: ModuleType, file: Path, served: str) -> None:
    theirs, weights = page.Classifier(file), chosen_weights(served, "best", None)
    theirs.facts["view"]["flip"] = True
    pixels = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    member = Member(weights, View.of(weights.recipe, "flip"), CPU)
    assert theirs.run(pixels)["logits"] == pytest.approx(member.logits(torch.from_numpy(pixels)).numpy(), abs=1e-4)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
TURNED = Image.Exif()
TURNED[0x0112] = 6


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (encoded(PHOTO.convert("CMYK"), "JPEG"), (60, 40)),
        (encoded(PHOTO, "JPEG", exif=TURNED), (40, 60)),
        (encoded(PHOTO.convert("I;16"), "PNG"), (60, 40)),
        (encoded(PHOTO.convert("P"), "PNG"), (60, 40)),
        (encoded(PHOTO.convert("LA"), "PNG"), (60, 40)),
        (encoded(PHOTO, "WEBP"), (60, 40)),
        (encoded(PHOTO, "GIF", save_all=True, append_images=[PHOTO.rotate(90)]), (60, 40)),
    ],
)
def test_odd_images_are_read(page: ModuleType, data: bytes, size: tuple[int, int]) -> None:
    image = page.opened(data)
    assert (image.mode, image.size) == ("RGB", size)


def huge() -> bytes:
    data = bytearray(encoded(Image.new("1", (8, 8)), "PNG"))
    data[16:24] = (60000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "This is no JPEG"),
        (b"just text", "This is no JPEG"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "This is no JPEG"),
        (encoded(PHOTO, "TIFF"), "This is no JPEG"),
        (encoded(PHOTO, "JPEG")[:600], "damaged, or cut off"),
        (encoded(PHOTO, "PNG")[:600], "damaged, or cut off"),
        (huge(), "60000 x 60000 pixels; at most 50 million"),
        (bytes(21 << 20), "has 21 MB; at most 20 MB"),
    ],
)
def test_what_is_no_image_is_a_sentence(page: ModuleType, data: bytes, message: str) -> None:
    with pytest.raises(page.Refused, match=message):
        page.opened(data)
