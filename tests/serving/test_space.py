"""The page's own reader and model, without PyTorch.

They agree with ours on images, and refuse files that are none.
"""

import importlib.util
import io
import sys
import zlib
from pathlib import Path
from types import ModuleType

import layouts
import numpy as np
import odd_images as odd
import pytest
import torch
from PIL import Image

from wds_train.cli import main
from wds_train.dataset.reader import Dataset
from wds_train.evaluation.evaluate import Member, View, choose_weights
from wds_train.images.decode import decode_center, decode_whole
from wds_train.images.plain import plain_bytes
from wds_train.serving.classify import Classifier, make_photo

pytest.importorskip("onnxruntime")
CPU = torch.device("cpu")
PAGE = Path(__file__).parents[2] / "wds_train" / "serving" / "space" / "classifier.py"


@pytest.fixture(scope="module")
def page() -> ModuleType:
    """The module `classifier.py` of the page, which belongs to no package."""
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
    photos = [make_photo(digits.split("val"), number) for number in range(60)]
    weights = choose_weights(served, "best", None)
    ours = [logits for _, logits in Classifier(weights, None, CPU).logits(photos)]
    answers = [theirs.answer(page.open_image(photo.read())) for photo in photos]
    assert [answer.top(1)[0] for answer in answers] == [int(logits.argmax()) for logits in ours]
    assert {answer.heat.min() >= 0 and answer.heat.max() <= 1 for answer in answers} == {True}
    assert theirs.draw_heat(page.open_image(photos[0].read()), answers[0].heat).size == (448, 448)


@pytest.mark.parametrize("side", [48, 200])
def test_it_sees_a_photograph_as_the_validation_does(
    page: ModuleType, file: Path, side: int
) -> None:
    theirs = page.Classifier(file)
    theirs.facts["view"] = {"side": side, "crop": 0.875, "flip": False}
    for data in [*layouts.photos(), encoded(PHOTO.resize((4000, 2)), "PNG")]:
        ours = np.empty((side, side, 3), np.uint8)
        decode_center(data, 0.875, ours)
        assert (theirs.pixels(page.open_image(data)) == ours).all()


def test_mirror_images_are_averaged_where_the_validation_did(
    page: ModuleType, file: Path, served: str
) -> None:
    theirs, weights = page.Classifier(file), choose_weights(served, "best", None)
    theirs.facts["view"]["flip"] = True
    pixels = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    member = Member(weights, View.of(weights.recipe, "flip"), CPU)
    assert theirs.run(pixels)["logits"] == pytest.approx(
        member.logits(torch.from_numpy(pixels)).numpy(), abs=1e-4
    )


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
        (
            encoded(Image.fromarray(np.asarray(PHOTO.convert("L")) * np.uint16(257)), "PNG"),
            (60, 40),
        ),
        (encoded(PHOTO.convert("P"), "PNG"), (60, 40)),
        (encoded(PHOTO.convert("LA"), "PNG"), (60, 40)),
        (encoded(PHOTO, "WEBP"), (60, 40)),
        (encoded(PHOTO, "GIF", save_all=True, append_images=[PHOTO.rotate(90)]), (60, 40)),
    ],
)
def test_odd_images_are_read(page: ModuleType, data: bytes, size: tuple[int, int]) -> None:
    image = page.open_image(data)
    assert (image.mode, image.size) == ("RGB", size)


SAMPLES = np.random.default_rng(0).integers(0, 256, (odd.HEIGHT, odd.WIDTH, 4), dtype=np.uint8)
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def deep(channels: int, top: int, *bits: int) -> bytes:
    """Return a PNG of 16 bits a sample, with numbers up to `top` and the given sBIT."""
    samples = (SAMPLES[..., :channels] / 255 * top).round().astype(np.uint16)
    return odd.png(samples, odd.chunk(b"sBIT", bytes(bits)) if bits else b"")


SEEN_ALIKE = {
    "RGBA": odd.png(SAMPLES),
    "LA": odd.png(SAMPLES[..., :2]),
    "a transparent colour": odd.png(
        SAMPLES[..., :3],
        odd.chunk(b"tRNS", bytes([0, SAMPLES[0, 0, 0], 0, SAMPLES[0, 0, 1], 0, SAMPLES[0, 0, 2]])),
    ),
    "a transparent grey": odd.png(
        SAMPLES[..., :1], odd.chunk(b"tRNS", bytes([0, SAMPLES[0, 0, 0]]))
    ),
    "a transparent grey of 2 bits": odd.few_bits_png(
        SAMPLES[..., 0] >> 6, 2, odd.chunk(b"tRNS", b"\0\1")
    ),
    "a transparent grey of 4 bits": odd.few_bits_png(
        SAMPLES[..., 0] >> 4, 4, odd.chunk(b"tRNS", b"\0\7")
    ),
    "a palette": encoded(PHOTO.quantize(8), "PNG", transparency=bytes([0, 100, 255])),
    "a transparent index": encoded(PHOTO.quantize(8), "PNG", transparency=3),
    "WebP": encoded(Image.fromarray(SAMPLES), "WEBP", lossless=True, exact=True),
    "GIF": encoded(PHOTO.quantize(8), "GIF", transparency=3),
    "16 bits": deep(1, 65535),
    "16 bits, colours": deep(3, 65535),
    "16 bits, RGBA": deep(4, 65535),
    "16 bits, LA": deep(2, 65535),
    "16 bits, a transparent grey": odd.png(
        SAMPLES[..., :1] * np.uint16(257), odd.chunk(b"tRNS", bytes([SAMPLES[0, 0, 0]] * 2))
    ),
    "12 bits": deep(1, 4095, 12),
    "12 bits, colours": deep(3, 4095, 12, 12, 12),
    "12 bits, RGBA": deep(4, 4095, 12, 12, 12, 12),
    "12 bits, LA": deep(2, 4095, 12, 12),
    "14 bits": deep(1, 16383, 14),
    "8 bits in 16": deep(1, 255, 8),
    "black": deep(1, 0),
    "raw profile": odd.png(
        SAMPLES[..., :3], odd.text_chunk("zTXt", b"Raw profile type exif", odd.raw_profile(6))
    ),
    "raw profile behind": odd.png(
        SAMPLES, b"", odd.text_chunk("tEXt", b"Raw profile type exif", odd.raw_profile(8))
    ),
    "raw profile without sense": odd.png(
        SAMPLES, odd.text_chunk("tEXt", b"Raw profile type exif", b"\n\n\nxy")
    ),
    "EXIF and transparency": odd.png(SAMPLES, odd.chunk(b"eXIf", odd.tiff_exif(5))),
    "EXIF and 12 bits": odd.png(
        SAMPLES * np.uint16(16),
        odd.chunk(b"eXIf", odd.tiff_exif(5)) + odd.chunk(b"sBIT", b"\x0c\x0c\x0c\x0c"),
    ),
    "XMP alone, JPEG": encoded(PHOTO, "JPEG", xmp=XMP),
    "XMP alone, WebP": encoded(PHOTO, "WEBP", xmp=XMP, lossless=True),
    "XMP alone, PNG": odd.png(SAMPLES[..., :3], odd.text_chunk("iTXt", b"XML:com.adobe.xmp", XMP)),
    "2 MB of text": odd.png(SAMPLES[..., :3], odd.text_chunk("zTXt", b"a", b"text " * 400_000)),
    "2 MB of text, RGBA": odd.png(SAMPLES, odd.text_chunk("iTXt-z", b"a", b"text " * 400_000)),
    "2 MB of profile": odd.png(SAMPLES[..., :3], odd.colour_profile(2 << 20)),
    "lossless grey": odd.jpeg((200,), 0xC3),
    "oddly sampled": odd.jpeg((200, 100, 160), sampling=(0x14, 0x11, 0x11)),
    "arithmetic": odd.arithmetic("colours"),
}


@pytest.mark.parametrize("name", SEEN_ALIKE)
def test_it_sees_odd_images_as_a_conversion_makes_them(page: ModuleType, name: str) -> None:
    """So does `predict`, which calls the same function."""
    data = SEEN_ALIKE[name]
    np.testing.assert_array_equal(
        np.asarray(page.open_image(data)), decode_whole(plain_bytes(data))
    )


@pytest.mark.parametrize(("channels", "top"), [(1, 4095), (3, 4095), (4, 1000), (2, 255)])
def test_numbers_without_a_range_are_a_sentence(page: ModuleType, channels: int, top: int) -> None:
    with pytest.raises(
        page.Refused,
        match=rf"has 16 bits a sample, of 0 to {top}, and does not say which number is white",
    ):
        page.open_image(deep(channels, top))


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
        page.open_image(data)
