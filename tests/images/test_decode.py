"""Decoding: right pixels or a DataError that names the cause; never a grey image, a warning or a blow-up."""

import contextlib
import io
import os
import resource
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data import create_transform

from benchmarks import decode_rates as bench
from benchmarks.decode_rates import psnr, read_images
from wds_train.dataset.index import MAX_PIXELS
from wds_train.errors import DataError
from wds_train.images import jpeg
from wds_train.images.crop import Box
from wds_train.images.decode import decode_center, decode_crop, probe

SHARED = Path(os.environ.get("WDS_SHARED", Path(__file__).parents[3] / "shared"))
PHOTOS = SHARED / "data" / "imagenet-photos-150.tar"
WIDTH, HEIGHT = 90, 70
PHOTO = Image.open(io.BytesIO(read_images(None)[1])).resize((WIDTH, HEIGHT))
END = b"\xff\xd9"
BOX = Box(left=11, top=5, width=40, height=48)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def cropped(data: bytes, box: Box = BOX, *, flip: bool = False) -> np.ndarray:
    """The crop at its own size: what is compared is then the decoder, not the resize."""
    out = np.zeros((box.height, box.width, 3), np.uint8)
    decode_crop(data, box, out, flip=flip)
    return out


def jpeg_of(image: Image.Image = PHOTO, **options: object) -> bytes:
    return encoded(image, "JPEG", **{"quality": 92, **options})


def png16(*, grey: bool) -> tuple[bytes, np.ndarray]:
    """A 16-bit PNG, and the 8-bit pixels that it should become."""
    pixels = (
        np.random.default_rng(0)
        .integers(0, 65536, (HEIGHT, WIDTH) if grey else (HEIGHT, WIDTH, 3))
        .astype(np.uint16)
    )
    data = cv2.imencode(".png", pixels if grey else pixels[..., ::-1])[1].tobytes()
    upper = (pixels >> 8).astype(np.uint8)
    return data, np.repeat(upper[..., None], 3, axis=2) if grey else upper


def exif(orientation: int, *, order: str = "little") -> bytes:
    """An EXIF segment's content of two tags: the maker, at an offset, and the orientation, in place."""

    def numbers(*values: tuple[int, int]) -> bytes:
        return b"".join(value.to_bytes(size, order) for value, size in values)

    maker = numbers((0x010F, 2), (2, 2), (9, 4), (38, 4))
    turn = numbers((0x0112, 2), (3, 2), (1, 4), (orientation, 2), (0, 2))
    head = (b"II" if order == "little" else b"MM") + numbers((42, 2), (8, 4), (2, 2))
    return b"Exif\0\0" + head + maker + turn + numbers((0, 4)) + b"a camera\0"


FORMATS = {
    "jpeg 4:4:4": jpeg_of(subsampling=0),
    "jpeg 4:2:2": jpeg_of(subsampling=1),
    "jpeg 4:2:0": jpeg_of(subsampling=2),
    "jpeg progressive": jpeg_of(progressive=True),
    "jpeg restart markers": jpeg_of(restart_marker_blocks=3),
    "jpeg grey": jpeg_of(PHOTO.convert("L")),
    "jpeg cmyk": jpeg_of(PHOTO.convert("CMYK")),
    "png": encoded(PHOTO, "PNG"),
    "png interlaced": cv2.imencode(".png", np.asarray(PHOTO)[..., ::-1])[1].tobytes(),
    "png grey": encoded(PHOTO.convert("L"), "PNG"),
    "png bits": encoded(PHOTO.convert("1"), "PNG"),
    "png palette": encoded(PHOTO.quantize(200), "PNG"),
    "png palette + transparency": encoded(
        PHOTO.quantize(200), "PNG", transparency=bytes(range(200))
    ),
    "png alpha": encoded(PHOTO.convert("RGBA"), "PNG"),
    "png grey alpha": encoded(PHOTO.convert("LA"), "PNG"),
    "webp": encoded(PHOTO, "WEBP", quality=90),
    "webp lossless": encoded(PHOTO, "WEBP", lossless=True),
    "webp alpha": encoded(PHOTO.convert("RGBA"), "WEBP"),
    "gif": encoded(PHOTO.quantize(255), "GIF"),
}


@pytest.mark.parametrize("data", FORMATS.values(), ids=FORMATS)
def test_every_format_gives_pillows_pixels(data: bytes) -> None:
    assert probe(data) == (WIDTH, HEIGHT)
    left, top, width, height = BOX
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))[
        top : top + height, left : left + width
    ]
    if (
        data[:2] == jpeg.START
    ):  # another inverse DCT and upsampling than Pillow's: the same picture, not the same bits
        assert psnr(cropped(data), expected) > 33
    else:
        np.testing.assert_array_equal(cropped(data), expected)
    np.testing.assert_array_equal(cropped(data, flip=True), cropped(data)[:, ::-1])


@pytest.mark.parametrize("grey", [True, False])
def test_sixteen_bits_keep_their_upper_eight(grey: bool) -> None:
    data, expected = png16(grey=grey)
    left, top, width, height = BOX
    np.testing.assert_array_equal(cropped(data), expected[top : top + height, left : left + width])


@pytest.mark.parametrize(
    "options", [{"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"grey": True}], ids=str
)
def test_stopping_at_the_crops_last_row_changes_no_pixel(options: dict[str, int]) -> None:
    data = memoryview(jpeg_of(PHOTO.convert("L")) if "grey" in options else jpeg_of(**options))
    header = jpeg.read_header(data)
    whole = jpeg.decode_rows(data, header, HEIGHT)
    for rows in range(1, HEIGHT):
        some = jpeg.decode_rows(data, header, rows)
        assert len(some) == rows  # it did stop there
        np.testing.assert_array_equal(some, whole[:rows])


@pytest.mark.parametrize("cut", [None, -200], ids=["whole", "damaged"])
def test_bytes_that_can_be_written_are_left_as_they_were(cut: int | None) -> None:
    """The next crop of a sample that is repeated is of the same bytes."""
    data = jpeg_of()[:cut]
    mine = memoryview(bytearray(data))
    header = jpeg.read_header(mine)
    with contextlib.suppress(DataError):
        np.testing.assert_array_equal(
            jpeg.decode_rows(mine, header, 5),
            jpeg.decode_rows(memoryview(data), header, HEIGHT)[:5],
        )
    assert mine == data


@pytest.mark.parametrize("name", ["jpeg progressive", "jpeg restart markers"])
def test_jpegs_whose_leftover_bytes_could_hide_damage_are_decoded_whole(name: str) -> None:
    data = memoryview(FORMATS[name])
    assert len(jpeg.decode_rows(data, jpeg.read_header(data), 8)) == HEIGHT


def test_a_header_that_libjpeg_reads_otherwise_is_an_error() -> None:
    data = memoryview(FORMATS["jpeg 4:4:4"])
    header = jpeg.read_header(data)
    for wrong in (header._replace(width=WIDTH + 1), header._replace(height=HEIGHT + 8)):
        with pytest.raises(
            DataError,
            match=rf"{wrong.height}, {wrong.width}\) rows and columns or \({HEIGHT}, {WIDTH}\)",
        ):
            jpeg.decode_rows(data, wrong, wrong.height)


def test_markers_without_content_and_fill_bytes_are_stepped_over_as_libjpeg_does() -> None:
    data = FORMATS["jpeg 4:4:4"]
    frame = jpeg.read_header(memoryview(data)).frame
    fake = (
        b"\xff\xc0\x00\x11"
        + data[frame : frame + 1]
        + b"\0\x08\0\x08"
        + data[frame + 5 : frame + 15]
    )
    odd = (
        data[:2]
        + b"\xff\x01\xff\xd3\xff\xff\xff\xe5\x00"
        + bytes([len(fake) + 2])
        + fake
        + data[2:]
    )
    assert probe(odd) == (WIDTH, HEIGHT)
    np.testing.assert_array_equal(cropped(odd), cropped(data))


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("factor", [1, 3], ids=["bilinear", "antialiased"])
def test_boxes_are_those_of_the_upright_image(orientation: int, order: str, factor: int) -> None:
    data = jpeg_of(exif=exif(orientation, order=order), subsampling=0, quality=98)
    size = (HEIGHT, WIDTH) if orientation >= 5 else (WIDTH, HEIGHT)
    assert probe(data) == size
    out = np.zeros((BOX.height // factor, BOX.width // factor, 3), np.uint8)
    decode_crop(data, BOX, out)
    corners = (BOX.left, BOX.top, BOX.left + BOX.width, BOX.top + BOX.height)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert upright.size == size
    expected = np.asarray(upright.resize(out.shape[1::-1], Image.Resampling.BILINEAR, box=corners))
    assert psnr(out, expected) > 33
    flipped = np.zeros_like(out)
    decode_crop(data, BOX, flipped, flip=True)
    assert psnr(flipped[:, ::-1], expected) > 33


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"Exif\0\0",
        exif(0)[:20],
        exif(0),
        exif(9),
        exif(6)[:30],
        exif(6).replace(b"II*", b"II+"),
        b"Exif\0\0II*\0" + b"\xff" * 40,
    ],
)
def test_an_exif_segment_that_makes_no_sense_is_passed_over(content: bytes) -> None:
    assert probe(jpeg_of(exif=content)) == (WIDTH, HEIGHT)


@pytest.mark.parametrize(
    "name", ["jpeg 4:4:4", "jpeg 4:2:0", "jpeg progressive", "jpeg restart markers", "jpeg cmyk"]
)
def test_a_jpeg_cut_off_anywhere_is_an_error_even_below_the_crop(name: str) -> None:
    data = FORMATS[name]
    first_row = Box(0, 0, WIDTH, 1)
    for length in [*range(0, len(data) - 2, 7), len(data) - 2, len(data) - 1]:
        with pytest.raises(DataError, match=r"cut off|cannot be decoded|empty|no JPEG"):
            cropped(data[:length], first_row)


@pytest.mark.parametrize("name", [name for name in FORMATS if name.startswith(("png", "webp"))])
def test_a_png_or_webp_cut_off_is_an_error(name: str) -> None:
    data = FORMATS[name]
    end = (
        len(data) - 40 if name.startswith("png") else len(data)
    )  # a PNG's last bytes are checksums, which Pillow spares
    for length in [*range(0, end, 97), end - 1]:
        with pytest.raises(DataError):
            cropped(data[:length])


def damaged(data: bytes, share: float) -> bytes:
    """The JPEG with an end marker written into its scan at `share` of its length: the rows from there on are lost."""
    at = int(len(data) * share)
    return data[:at] + END + data[at + 2 :]


def test_damage_counts_above_the_crops_last_row_and_not_below() -> None:
    data = jpeg_of(subsampling=0)
    top, bottom = Box(0, 0, WIDTH, 16), Box(0, HEIGHT - 16, WIDTH, 16)
    late, early = damaged(data, 0.9), damaged(data, 0.3)
    np.testing.assert_array_equal(cropped(late, top), cropped(data, top))
    for harmed in (late, early):
        with pytest.raises(DataError, match="cannot be decoded: Corrupt JPEG data"):
            cropped(harmed, bottom)


def test_bytes_left_over_hide_no_damage_before_them() -> None:
    data = jpeg_of(subsampling=0)
    padded = data[:-2] + b"left over" + END
    bottom = Box(0, HEIGHT - 16, WIDTH, 16)
    np.testing.assert_array_equal(cropped(padded, bottom), cropped(data, bottom))
    with pytest.raises(DataError, match="Corrupt JPEG data"):
        cropped(damaged(padded, 0.5), bottom)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"it is empty \(0 bytes\)"),
        (b"\xff\xd8", "a JPEG without a frame"),
        (b"no image at all", r"it is no JPEG, PNG, WebP or GIF; it begins with b'no image'"),
        (encoded(PHOTO, "BMP"), "it begins with b'BM"),
        (encoded(PHOTO, "TIFF"), "it begins with b'II"),
    ],
)
def test_what_is_no_image_is_an_error_that_says_what_it_is(data: bytes, message: str) -> None:
    for read in (probe, cropped):
        with pytest.raises(DataError, match=message):
            read(data)


@pytest.mark.parametrize(
    "box", [Box(-1, 0, 9, 9), Box(0, 0, WIDTH + 1, 9), Box(0, HEIGHT - 8, 9, 9), Box(0, 0, 0, 9)]
)
@pytest.mark.parametrize("name", ["jpeg 4:4:4", "png"])
def test_a_box_outside_the_image_is_an_error(name: str, box: Box) -> None:
    with pytest.raises(
        DataError, match=rf"its size is {WIDTH}x{HEIGHT}, which does not contain the crop"
    ):
        decode_crop(FORMATS[name], box, np.zeros((9, 9, 3), np.uint8))


def huge() -> dict[str, bytes]:
    """Files of a few bytes to a megabyte that claim, or hold, a great many pixels."""
    small = jpeg_of()
    frame = jpeg.read_header(memoryview(small)).frame
    png = FORMATS["png"]
    header = png[12:16] + (60000).to_bytes(4) * 2 + png[24:29]
    vp8x = b"VP8X" + (10).to_bytes(4, "little") + bytes(4) + (16382).to_bytes(3, "little") * 2
    gif = bytearray(FORMATS["gif"])
    gif[6:10] = b"\xff\xff\xff\xff"
    return {
        "jpeg": small[: frame + 1] + b"\xff\xff\xff\xff" + small[frame + 5 :],
        "jpeg of no rows": small[: frame + 1] + b"\0\0" + small[frame + 3 :],
        "png": png[:12] + header + zlib.crc32(header).to_bytes(4) + png[33:],
        "png bomb": encoded(Image.new("L", (MAX_PIXELS // 4096 + 1, 4096)), "PNG"),
        "webp": b"RIFF"
        + (len(vp8x) + len(FORMATS["webp"]) - 8).to_bytes(4, "little")
        + b"WEBP"
        + vp8x
        + FORMATS["webp"][12:],
        "gif": bytes(gif),
    }


@pytest.mark.parametrize(("name", "data"), huge().items(), ids=huge())
def test_huge_images_are_refused_before_they_take_memory(name: str, data: bytes) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (probe, cropped):
        with pytest.raises(
            DataError, match=r"it has \d+x\d+ pixels|exceeds limit|cannot be decoded"
        ):
            read(data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


def test_a_jpeg_of_a_thousand_scans_is_refused() -> None:
    data = FORMATS["jpeg progressive"]
    last = data.rindex(b"\xff\xda")
    with pytest.raises(DataError, match=r"a JPEG of 10\d\d scans, at most 100"):
        probe(data[:last] + data[last:-2] * 1000 + END)


def test_nothing_is_printed_about_odd_files(tmp_path: Path) -> None:
    odd = {
        "palette": FORMATS["png palette + transparency"],
        "exif": jpeg_of(
            PHOTO.convert("CMYK"), exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0" + b"\x12\x01" * 9
        ),
        "bomb": huge()["png bomb"],
        "damaged": damaged(FORMATS["jpeg 4:4:4"], 0.5),
        "cut": FORMATS["webp"][:500],
    }
    for name, data in odd.items():
        (tmp_path / name).write_bytes(data)
    script = """if True:
        import pathlib, sys, numpy
        from wds_train.images.crop import Box
        from wds_train.images.decode import decode_crop
        from wds_train.errors import DataError
        for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
            try:
                decode_crop(path.read_bytes(), Box(0, 0, 50, 50), numpy.zeros((9, 9, 3), numpy.uint8))
            except DataError:
                pass
    """
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", script, tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_threads_decode_at_once_as_one_does() -> None:
    expected = [cropped(data) for data in FORMATS.values()]
    wrong: list[int] = []

    def decode_all() -> None:
        for _ in range(20):
            wrong.extend(
                i for i, data in enumerate(FORMATS.values()) if (cropped(data) != expected[i]).any()
            )

    threads = [threading.Thread(target=decode_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_every_reduction_by_over_two_is_pillows_antialiased_one() -> None:
    data = FORMATS["png"]
    for size in (5, 12, 19):
        box = Box(3, 4, 2 * size + 1, 2 * size + 7)
        out = np.zeros((size, size, 3), np.uint8)
        decode_crop(data, box, out)
        left, top, width, height = box
        part = Image.open(io.BytesIO(data)).crop((left, top, left + width, top + height))
        expected = np.asarray(part.resize((size, size), Image.Resampling.BILINEAR))
        assert np.abs(out.astype(int) - expected).max() <= 1


@pytest.mark.skipif(not PHOTOS.exists(), reason=f"the ImageNet photos are not at {PHOTOS}")
def test_real_photos_have_36_db_on_average() -> None:
    values = bench._psnr(read_images(PHOTOS))
    assert len(values) == 150 and np.mean(values) >= 36


def test_bench_decode_reports_both_ways(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "REPEATS", 1)
    monkeypatch.setattr(bench, "PASS_SAMPLES", 2)
    threads = torch.get_num_threads()
    result = bench.bench_decode(read_images(None))
    torch.set_num_threads(threads)
    rates = result["img_per_s_per_core"]
    assert result["ratio"] == pytest.approx(rates[bench.OURS] / rates[bench.REFERENCE], rel=0.02)
    assert result["psnr_db"]["mean"] > 33


@pytest.mark.parametrize("side", [24, 32, 96], ids=lambda side: f"{side}px")
@pytest.mark.parametrize("crop", [1.0, 0.875, 0.95])
@pytest.mark.parametrize("size", [(64, 64), (90, 70), (70, 101), (20, 300)], ids=str)
def test_the_centre_has_the_pixels_of_timms_evaluation(
    size: tuple[int, int], crop: float, side: int
) -> None:
    """Else an exported model would see other images there, and score otherwise."""
    view = create_transform(
        (3, side, side), interpolation="bilinear", crop_pct=crop, mean=(0,) * 3, std=(1,) * 3
    )
    for data in (jpeg_of(PHOTO.resize(size), subsampling=2), encoded(PHOTO.resize(size), "PNG")):
        expected = view(Image.open(io.BytesIO(data)).convert("RGB")).permute(1, 2, 0).numpy() * 255
        out = np.zeros((side, side, 3), np.uint8)
        decode_center(data, crop, out)
        np.testing.assert_array_equal(out, expected.round())


def test_the_centre_of_a_turned_image_is_that_of_the_upright_one() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data, out = jpeg_of(exif=exif), np.zeros((24, 24, 3), np.uint8)
    decode_center(data, 1.0, out)
    again = np.zeros_like(out)
    decode_center(encoded(ImageOps.exif_transpose(Image.open(io.BytesIO(data))), "PNG"), 1.0, again)
    np.testing.assert_array_equal(out, again)


def test_the_centre_of_a_strip_takes_no_gigabytes() -> None:
    """Resized as a whole, this one would have more columns than Pillow can count."""
    out = np.zeros((64, 64, 3), np.uint8)
    decode_center(encoded(Image.new("L", (40_000_000, 1), 77), "PNG"), 1.0, out)
    assert (out == 77).all()
