"""Odd but sound images: the pixels that a conversion leaves are those that the file means, and that training reads."""

import base64
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import odd_images as odd
import pytest
from PIL import Image

from wds_train.conversion.image_policy import CheckedImage, ImagePolicy, check
from wds_train.errors import DataError
from wds_train.images import plain as plain_module
from wds_train.images.crop import Box
from wds_train.images.decode import decode_center, decode_crop, decode_whole, probe
from wds_train.images.pillow import orientation
from wds_train.serving.photos import find_photos

KEEP = ImagePolicy()
FULL = ImagePolicy(verify="full")
ANEW = ImagePolicy(reencode=True, quality=100)
SHAPE = (odd.HEIGHT, odd.WIDTH)
RAMP = np.linspace(0, 1, odd.HEIGHT * odd.WIDTH).reshape(SHAPE)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def trained(found: CheckedImage) -> np.ndarray:
    """What training sees of the whole image, through each of its ways to decode."""
    pixels = np.zeros((found.height, found.width, 3), np.uint8)
    decode_crop(found.data, Box(0, 0, found.width, found.height), pixels)
    whole = decode_whole(found.data)
    if found.extension == "jpg":  # another inverse DCT, and another upsampling
        assert np.abs(whole.astype(int) - pixels).mean() < 5
    else:
        np.testing.assert_array_equal(pixels, whole)
    assert tuple(probe(found.data)) == (found.width, found.height)
    return whole


def asked(data: bytes, tmp_path: Path) -> np.ndarray:
    """What a model sees of the file when it is asked about it."""
    path = tmp_path / "photo"
    path.write_bytes(data)
    (photo,) = find_photos([str(path)])
    return decode_whole(photo.read())


def grey(pixels: np.ndarray) -> np.ndarray:
    return np.repeat(pixels[..., None].astype(np.uint8), 3, axis=2)


# JPEG: what a conversion lets pass, the loader decodes.

READ_JPEGS = {
    "baseline": odd.jpeg((200, 100, 160)),
    "extended": odd.jpeg((200, 100, 160), 0xC1),
    "progressive": odd.jpeg((200, 100, 160), 0xC2),
    "lossless grey": odd.jpeg((200,), 0xC3),
    "lossless rgb": odd.jpeg((245, 187, 150), 0xC3, names=b"RGB"),
    "lossless without names": odd.jpeg((245, 187, 150), 0xC3),
    "arithmetic grey": odd.arithmetic("grey"),
    "arithmetic": odd.arithmetic("colours"),
    "arithmetic progressive": odd.arithmetic("progressive"),
    "grey sampled 2x2": odd.jpeg((200,), sampling=(0x22,)),
    "4:4:0 in other numbers": odd.jpeg((200, 100, 160), sampling=(0x22, 0x21, 0x21)),
    "4:4:1": odd.jpeg((200, 100, 160), sampling=(0x14, 0x11, 0x11)),
    "4:1:0": odd.jpeg((200, 100, 160), sampling=(0x42, 0x11, 0x11)),
    "3x1": odd.jpeg((200, 100, 160), sampling=(0x31, 0x11, 0x11)),
    "1x3": odd.jpeg((200, 100, 160), sampling=(0x13, 0x11, 0x11)),
    "colours finer than light": odd.jpeg((200, 100, 160), sampling=(0x11, 0x22, 0x22)),
    "each colour otherwise": odd.jpeg((200, 100, 160), sampling=(0x21, 0x12, 0x11)),
    "four colours": odd.jpeg((200, 100, 160, 20)),
    "four colours, lossless": odd.jpeg((200, 100, 160, 20), 0xC3),
    "four colours, progressive": odd.jpeg((200, 100, 160, 20), 0xC2),
    "four colours, sampled": odd.jpeg((200, 100, 160, 20), sampling=(0x22, 0x11, 0x11, 0x22)),
    "four colours, oddly sampled": odd.jpeg((200, 100, 160, 20), sampling=(0x21, 0x12, 0x11, 0x22)),
}


@pytest.mark.parametrize("policy", [KEEP, FULL], ids=["header", "full"])
@pytest.mark.parametrize("name", READ_JPEGS)
def test_a_jpeg_that_passes_is_decoded(name: str, policy: ImagePolicy, tmp_path: Path) -> None:
    data = READ_JPEGS[name]
    found = check(data, policy)
    assert (found.data, found.extension, found.width, found.height) == (
        data,
        "jpg",
        odd.WIDTH,
        odd.HEIGHT,
    )
    colour = (245, 187, 150)
    if "grey" in name:
        colour = (200, 200, 200)
    if "four" in name:
        colour = (16, 8, 13)
    assert (trained(found) == colour).all()
    assert (asked(data, tmp_path) == colour).all()
    centre = np.zeros((16, 16, 3), np.uint8)
    decode_center(data, 1.0, centre)
    assert (centre == colour).all()
    top = np.zeros((8, 8, 3), np.uint8)
    decode_crop(data, Box(3, 2, 8, 8), top)  # which needs no more than the first rows
    assert (top == colour).all()


def with_process(marker: int) -> bytes:
    return odd.jpeg((200, 100, 160)).replace(b"\xff\xc0", bytes([0xFF, marker]))


UNREAD_JPEGS = {
    "12 bits": (odd.jpeg((3000,), 0xC1, 12), "a JPEG of 12 bits a sample"),
    "12 bits, colours": (odd.jpeg((3000, 900, 2000), 0xC1, 12), "a JPEG of 12 bits a sample"),
    "12 bits, progressive": (odd.jpeg((3000, 900, 2000), 0xC2, 12), "a JPEG of 12 bits a sample"),
    "10 bits, lossless": (odd.jpeg((900,), 0xC3, 10), "a JPEG of 10 bits a sample"),
    "16 bits, lossless": (odd.jpeg((40000,), 0xC3, 16), "a JPEG of 16 bits a sample"),
    "hierarchical": (with_process(0xC5), "a hierarchical JPEG"),
    "hierarchical, lossless": (with_process(0xC7), "a hierarchical JPEG"),
    "hierarchical, arithmetic": (with_process(0xCD), "a hierarchical JPEG"),
    "lossless, arithmetic": (with_process(0xCB), "a lossless JPEG of arithmetic codes"),
    "JPEG-LS": (with_process(0xF7), "a JPEG-LS"),
    "two colours": (odd.jpeg((200, 100)), "a JPEG of 2 colours"),
    "fractions of a sample": (
        odd.jpeg((200, 100, 160), sampling=(0x32, 0x21, 0x11)),
        "cannot be decoded",
    ),
    "lossless, cut off": (odd.jpeg((200,), 0xC3)[:300], "cannot be decoded"),
}


@pytest.mark.parametrize("policy", [KEEP, FULL, ANEW], ids=["header", "full", "reencode"])
@pytest.mark.parametrize("name", UNREAD_JPEGS)
def test_a_jpeg_that_the_loader_cannot_decode_is_refused(name: str, policy: ImagePolicy) -> None:
    data, message = UNREAD_JPEGS[name]
    with pytest.raises(DataError, match=message):
        check(data, policy)
    with pytest.raises(DataError, match=message):
        decode_crop(data, Box(0, 0, 8, 8), np.zeros((8, 8, 3), np.uint8))


def test_full_verification_is_by_the_loaders_decoder() -> None:
    """Pillow passes over damage that the loader does not."""
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(photo, "JPEG")
    damaged = data[: len(data) // 2] + b"\xff\xd9" + data[len(data) // 2 + 2 :]
    check(damaged, KEEP)
    for read in (lambda: check(damaged, FULL), lambda: decode_whole(damaged)):
        with pytest.raises(DataError, match="Corrupt JPEG data"):
            read()


# Which way is up.

CORNERED = np.full((*SHAPE, 3), 128, np.uint8)
CORNERED[:8, :8] = (250, 10, 10)  # top left
CORNERED[:8, -8:] = (10, 250, 10)
CORNERED[-8:, :8] = (10, 10, 250)
CORNERED_PNG = odd.png(CORNERED)
TURNS = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}
RAW = b"Raw profile type exif"


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("kind", ["tEXt", "zTXt", "iTXt", "iTXt-z"])
def test_a_png_turns_by_its_raw_profile(kind: str, where: str, turn: int, tmp_path: Path) -> None:
    data = odd.png(CORNERED, **{where: odd.text_chunk(kind, RAW, odd.raw_profile(turn))})
    right = TURNS[turn](CORNERED)
    assert orientation(data) == turn
    for policy in (KEEP, FULL):
        found = check(data, policy)
        assert (found.data, found.oddity) == (data, f"EXIF orientation {turn}")
        np.testing.assert_array_equal(trained(found), right)
    np.testing.assert_array_equal(asked(data, tmp_path), right)
    small = check(data, ImagePolicy(resize_shorter=12))
    assert (small.height, small.width) == tuple(side // 2 for side in right.shape[:2])


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\nexif\n",
        odd.raw_profile(6).replace(b"4d4d", b"4dzz"),
        odd.raw_profile(6)[:40],
        odd.raw_profile(9),
        b"\nexif\n 99\nnot hexadecimal at all\n",
    ],
)
def test_a_raw_profile_that_makes_no_sense_turns_nothing(text: bytes, tmp_path: Path) -> None:
    data = odd.png(CORNERED, odd.text_chunk("tEXt", RAW, text))
    np.testing.assert_array_equal(trained(check(data, FULL)), CORNERED)
    np.testing.assert_array_equal(asked(data, tmp_path), CORNERED)


def test_a_chunk_for_exif_comes_before_a_raw_profile() -> None:
    for before, after in (("eXIf", "text"), ("text", "eXIf")):
        chunks = {
            "eXIf": odd.chunk(b"eXIf", odd.tiff_exif(3)),
            "text": odd.text_chunk("zTXt", RAW, odd.raw_profile(6)),
        }
        assert orientation(odd.png(CORNERED, chunks[before], chunks[after])) == 3


def test_a_raw_profile_that_never_ends_is_no_memory() -> None:
    bomb = odd.chunk(b"zTXt", RAW + b"\0\0" + zlib.compress(b"\nexif\n 8\n" + b"00" * (50 << 20)))
    np.testing.assert_array_equal(trained(check(odd.png(CORNERED, bomb), KEEP)), CORNERED)


def turned_exif(turn: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = turn
    return exif.tobytes()


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("form", ["AVIF", "TIFF", "TIFF-lzw", "PNG", "WEBP", "JPEG"])
def test_what_is_encoded_anew_stands_upright(form: str, turn: int) -> None:
    """AVIF is turned by boxes of its own; Pillow writes them, and leaves the EXIF without its orientation."""
    image, policy = Image.fromarray(CORNERED).resize((160, 96), 0), ANEW
    if form.startswith("TIFF"):
        data = encoded(
            image,
            "TIFF",
            tiffinfo={274: turn},
            compression="tiff_lzw" if form == "TIFF-lzw" else None,
        )
    else:
        data = encoded(image, form, exif=turned_exif(turn), quality=100)
    if form in ("PNG", "WEBP", "JPEG"):  # which are encoded anew where they are made smaller
        policy = ImagePolicy(resize_shorter=48, quality=100)
    if form == "AVIF":
        assert b"irot" in data or b"imir" in data
    found = check(data, policy)
    assert found.altered
    pixels = np.asarray(
        Image.fromarray(trained(found)).resize(np.array(TURNS[turn](CORNERED).shape[1::-1]), 0)
    )
    assert np.abs(pixels.astype(int) - TURNS[turn](CORNERED))[4::8, 4::8].max() < 40


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


@pytest.mark.parametrize("form", ["AVIF", "TIFF", "GIF", "PNG", "WEBP", "JPEG"])
def test_xmp_turns_nothing_that_is_encoded_anew(form: str) -> None:
    image = Image.fromarray(CORNERED)
    data = encoded(image, form, **({"tiffinfo": {700: XMP}} if form == "TIFF" else {"xmp": XMP}))
    if form == "GIF":
        at = data.index(b"\x2c")
        data = (
            data[:at]
            + b"\x21\xff\x0bXMP DataXMP"
            + XMP
            + b"\1"
            + bytes(range(255, -1, -1))
            + b"\0"
            + data[at:]
        )
    small = check(data, ImagePolicy(reencode=True, resize_shorter=12))
    assert (small.width, small.height) == (odd.WIDTH // 2, odd.HEIGHT // 2)


# HEIC.

HEIC = base64.b64decode(
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAXxtZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAA"
    "AAAAACJpbG9jAAAAAERAAAEAAQAAAAABoAABAAAAAAAAAE8AAAAjaWluZgAAAAAAAQAAABVpbmZlAgAAAAABAABodmMxAAAA"
    "AA5waXRtAAAAAAABAAAA/GlwcnAAAADcaXBjbwAAAHVodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH//wNw"
    "AAADAJAAAAMAAAMAHroCQGEAAQApQgEBA3AAAAMAkAAAAwAAAwAeoCCBBZbqrprm4CGgwIAAAAyAAAADAIRiAAEABkQBwXPB"
    "iQAAABNjb2xybmNseAABAA0ABoAAAAAUaXNwZQAAAAAAAABAAAAAQAAAAChjbGFwAAAAGAAAAAEAAAAQAAAAAf///9gAAAAC"
    "////0AAAAAIAAAAQcGl4aQAAAAADCAgIAAAAGGlwbWEAAAAAAAAAAQABBYECAwWEAAAAV21kYXQAAABLKAGvCchrCBojmJb/"
    "eP/9v8hdTPfz5ShzVbCxGwhNFk+7oIuo2M6rtftBuK1QivC+JqcfpeiFCUsH9+d4iIDqTcZzs26A406MkF7c"
)


@pytest.mark.parametrize(
    "data",
    [
        HEIC,
        HEIC.replace(b"ftypheic", b"ftypmif1"),
        HEIC[:8] + b"heix" + HEIC[12:],
        HEIC[:8] + b"hevc" + HEIC[12:],
        HEIC[:40],
    ],
    ids=["heic", "mif1", "heix", "hevc", "cut off"],
)
def test_heic_is_named_where_nothing_reads_it(
    data: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    for policy in (KEEP, ANEW):
        with pytest.raises(
            DataError,
            match=r"^HEIC: install pillow-heif \(the extra `heic`\) and use --reencode, or convert it$",
        ):
            check(data, policy)
    with pytest.raises(
        DataError, match=r"^HEIC: install pillow-heif \(the extra `heic`\), or convert it$"
    ):
        asked(data, tmp_path)


def test_avif_is_no_heic() -> None:
    data = encoded(Image.fromarray(CORNERED), "AVIF")
    for brand in (b"avif", b"mif1"):
        assert check(data[:8] + brand + data[12:], ANEW).altered


@pytest.mark.parametrize("turn", [1, *TURNS])
def test_heic_is_read_where_pillow_heif_is(turn: int, tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    big = Image.fromarray(CORNERED).resize((160, 96), 0)
    data = encoded(big, "HEIF", exif=turned_exif(turn), quality=95)
    right = TURNS.get(turn, np.asarray)(np.asarray(big)).astype(int)
    with pytest.raises(DataError, match=r"its format is HEIC; .*encode it anew with --reencode"):
        check(data, KEEP)
    for pixels in (trained(check(data, ANEW)), asked(data, tmp_path)):
        assert np.abs(pixels - right)[16::32, 16::32].max() < 40


# Depth.


def stretched(top: float) -> np.ndarray:
    """The ramp of numbers from 0 to `top` as 8 bits."""
    return (
        np.rint(np.round(RAMP * top) * 255 / top)
        if top > 1
        else np.rint(RAMP.astype(np.float32).astype(float) * 255)
    )


def ramp(top: float, channels: int = 1, dtype: type = np.uint16) -> np.ndarray:
    return np.repeat(np.round(RAMP * top)[..., None], channels, axis=2).astype(dtype)


def sbit(*bits: int) -> bytes:
    return odd.chunk(b"sBIT", bytes(bits))


STATED_PNGS = {
    "12 bits": (odd.png(ramp(4095), sbit(12)), 4095),
    "10 bits": (odd.png(ramp(1023), sbit(10)), 1023),
    "8 bits": (odd.png(ramp(255), sbit(8)), 255),
    "14 bits": (odd.png(ramp(16383), sbit(14)), 16383),
    "12 bits, colours": (odd.png(ramp(4095, 3), sbit(12, 12, 12)), 4095),
    "12 bits, of which few are used": (odd.png(ramp(4095) // 2, sbit(12)), None),
    "12 bits, of one number": (odd.png(np.full((*SHAPE, 1), 2048, np.uint16), sbit(12)), None),
}


@pytest.mark.parametrize("name", STATED_PNGS)
def test_a_png_is_stretched_by_what_it_says(name: str, tmp_path: Path) -> None:
    data, top = STATED_PNGS[name]
    right = grey(stretched(top)) if top else None
    if name == "12 bits, of which few are used":
        right = grey(np.rint((ramp(4095) // 2)[..., 0] * 255.0 / 4095))
    if name == "12 bits, of one number":
        right = grey(np.full(SHAPE, 128))
    for policy in (KEEP, FULL):
        found = check(data, policy)
        assert found.altered and found.extension == "png"
        assert f"0 to {top or 4095} (sBIT) stretched to 8 bits" in found.oddity
        np.testing.assert_array_equal(trained(found), right)
        assert Image.open(io.BytesIO(found.data)).mode == "RGB"
    np.testing.assert_array_equal(asked(data, tmp_path), right)


@pytest.mark.parametrize(
    ("top", "channels"), [(4095, 1), (4095, 3), (255, 1), (255, 3), (1, 1), (1023, 2), (4095, 4)]
)
def test_a_png_of_few_bits_that_says_nothing_is_refused(
    top: int, channels: int, tmp_path: Path
) -> None:
    data = odd.png(ramp(top, channels))
    seen = rf"16 bits\) are 0 to {top}, and it does not say which number is white; convert it to 8 bits"
    for policy in (KEEP, FULL, ANEW, ImagePolicy(resize_shorter=8)):
        with pytest.raises(DataError, match=seen):
            check(data, policy)
    with pytest.raises(DataError, match=seen):
        asked(data, tmp_path)


def scaled_up(bits: int) -> np.ndarray:
    """Numbers of `bits` in 16, as the standard wants them: their own first bits behind them. None is bright."""
    numbers = (ramp((1 << bits) - 1) // 5).astype(np.uint16)
    return (numbers << (16 - bits) | numbers >> (2 * bits - 16)).astype(np.uint16)


FILLED_PNGS = {
    "16 bits": (odd.png(ramp(65535)), ramp(65535)),
    "16 bits, colours": (odd.png(ramp(65535, 3)), ramp(65535)),
    "from 4096 on": (odd.png(ramp(4096)), ramp(4096)),
    "14 bits that say nothing": (odd.png(ramp(16383)), ramp(16383)),
    "black": (odd.png(ramp(0)), ramp(0)),
    "black, and says so": (odd.png(ramp(0), sbit(12)), ramp(0)),
    "dark, of 16 bits by what it says": (odd.png(ramp(255), sbit(16)), ramp(255)),
    "12 bits scaled up": (odd.png(scaled_up(12), sbit(12)), scaled_up(12)),
    "14 bits scaled up": (odd.png(scaled_up(14), sbit(14)), scaled_up(14)),
    "an sBIT that cannot be": (odd.png(ramp(65535), sbit(0)), ramp(65535)),
}


@pytest.mark.parametrize("name", FILLED_PNGS)
def test_sixteen_bits_that_are_filled_keep_their_bytes(name: str, tmp_path: Path) -> None:
    """Their upper 8 bits are what training has always read."""
    data, samples = FILLED_PNGS[name]
    for policy in (KEEP, FULL):
        found = check(data, policy)
        assert (found.data, found.altered) == (data, False)
        assert found.oddity.endswith("16 bits a sample, the upper 8 kept")
        np.testing.assert_array_equal(trained(found), grey(samples[..., 0] >> 8))
    np.testing.assert_array_equal(asked(data, tmp_path), grey(samples[..., 0] >> 8))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("passes", [((0, 0, 1, 1),), odd.INTERLACED], ids=["plain", "interlaced"])
def test_all_sixteen_bits_of_every_kind_of_png_are_read(channels: int, passes: tuple) -> None:
    samples = np.random.default_rng(0).integers(0, 4096, (*SHAPE, channels)).astype(np.uint16)
    colours = 3 if channels > 2 else 1
    right = np.rint(samples[..., :colours] * 255.0 / 4095)
    if channels % 2 == 0:
        samples[..., -1:] = 4095
    found = check(odd.png(samples, sbit(*[12] * channels), passes=passes), KEEP)
    np.testing.assert_array_equal(trained(found), np.broadcast_to(right, (*SHAPE, 3)))


STATED_TIFFS = {
    "12 in 16": (odd.tiff(ramp(4095), {281: 4095}), stretched(4095)),
    "12 in 16, big-endian": (odd.tiff(ramp(4095), {281: 4095}, ">"), stretched(4095)),
    "12 in 16, colours": (odd.tiff(ramp(4095, 3), {281: (4095,) * 3}), stretched(4095)),
    "12 in 16, colours, big-endian": (
        odd.tiff(ramp(4095, 3), {281: (4095,) * 3}, ">"),
        stretched(4095),
    ),
    "8 in 16": (odd.tiff(ramp(255), {281: 255}), stretched(255)),
    "from a number on": (
        odd.tiff(ramp(1000) + np.uint16(500), {280: 500, 281: 1500}),
        stretched(1000),
    ),
    "SMaxSampleValue": (odd.tiff(ramp(4095), {341: 4095}), stretched(4095)),
    "F of 0 to 1": (odd.tiff(RAMP[..., None].astype(np.float32), {341: 1.0}), stretched(1)),
    "F of 0 to 1, big-endian": (
        odd.tiff(RAMP[..., None].astype(np.float32), {341: 1.0}, ">"),
        stretched(1),
    ),
    "F of 0 to 1000": (odd.tiff(ramp(1000, dtype=np.float32), {341: 1000.0}), stretched(1000)),
    "I of 0 to 255": (odd.tiff(ramp(255, dtype=np.int32), {341: 255}), stretched(255)),
    "I of 0 to 1000000": (odd.tiff(ramp(10**6, dtype=np.int32), {341: 10**6}), stretched(10**6)),
    "unsigned 32 bits": (
        odd.tiff(ramp(2**32 - 1, dtype=np.uint32), {341: 2**32 - 1}),
        stretched(2**32 - 1),
    ),
    "16 bits with a sign": (
        odd.tiff(ramp(1000, dtype=np.int16) - np.int16(500), {340: -500, 341: 500}),
        stretched(1000),
    ),
    "8 bits with a sign": (
        odd.tiff(ramp(200, dtype=np.int16).astype(np.int16).astype(np.int8) * 0, {341: 100}),
        RAMP * 0,
    ),
    "white is zero": (odd.tiff(ramp(4095), {281: 4095, 262: 0}), 255 - stretched(4095)),
    "F, white is zero": (
        odd.tiff(RAMP[..., None].astype(np.float32), {341: 1.0, 262: 0}),
        255 - stretched(1),
    ),
}


@pytest.mark.parametrize("name", STATED_TIFFS)
def test_a_tiff_is_stretched_by_what_it_says(name: str) -> None:
    data, right = STATED_TIFFS[name]
    found = check(data, ANEW)
    assert "SampleValue) stretched to 8 bits" in found.oddity
    assert np.abs(trained(found).astype(int) - grey(right)).max() <= 2  # it is a JPEG now


def test_a_tiff_of_twelve_bits_a_sample_says_its_range_by_that() -> None:
    row = b"\x00\x00\x80" + b"\xff\xff\xff"  # 0, 128, 4095, 4095
    data = odd.tiff(
        np.frombuffer(row * 8, np.uint8).reshape(8, 6, 1), {256: 4, 257: 8, 258: 12, 278: 8}
    )
    found = check(data, ANEW)
    assert found.oddity == "0 to 4095 (BitsPerSample) stretched to 8 bits"
    assert np.abs(trained(found)[0, :, 0].astype(int) - [0, 8, 255, 255]).max() <= 4


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            odd.tiff(RAMP[..., None].astype(np.float32)),
            r"mode F, 32 bits\) are 0 to 1, and it does not say",
        ),
        (
            odd.tiff(ramp(255, dtype=np.int32)),
            r"mode I, 32 bits\) are 0 to 255, and it does not say",
        ),
        (
            odd.tiff(ramp(10**6, dtype=np.int32)),
            r"mode I, 32 bits\) are 0 to 1000000, and it does not say",
        ),
        (odd.tiff(ramp(2**32 - 1, dtype=np.uint32)), r"are 0 to 4294967295, and it does not say"),
        (odd.tiff(ramp(4095)), r"mode I;16, 16 bits\) are 0 to 4095, and it does not say"),
        (odd.tiff(ramp(4095, 3)), r"mode RGB, 16 bits\) are 0 to 4095, and it does not say"),
        (
            odd.tiff(ramp(100, dtype=np.int16) - np.int16(50)),
            r"mode I, 16 bits\) are -50 to 50, and it does not say",
        ),
        (
            odd.tiff(ramp(100, dtype=np.int8) - np.int8(50)),
            r"mode L, 8 bits\) are -50 to 50, and it does not say",
        ),
        (
            odd.tiff(ramp(5000), {281: 4095}),
            r"are 0 to 5000, beyond the range that it states, 0 to 4095 \(MaxSample",
        ),
        (
            odd.tiff(ramp(100, dtype=np.int16) - np.int16(50), {341: 100}),
            r"are -50 to 50, beyond the range",
        ),
        (
            odd.tiff(np.where(RAMP > 0.5, np.nan, RAMP)[..., None].astype(np.float32), {341: 1.0}),
            "are infinite, or no",
        ),
        (
            odd.tiff(np.where(RAMP > 0.5, np.inf, RAMP)[..., None].astype(np.float32), {341: 1.0}),
            "are infinite, or no",
        ),
        (
            odd.tiff(RAMP[..., None].astype(np.float64), {341: 1.0}),
            "a TIFF of a kind that is not read",
        ),
    ],
)
def test_a_tiff_that_does_not_say_what_is_white_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check(data, ANEW)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_tiff_of_sixteen_bits_keeps_its_upper_eight(channels: int, order: str) -> None:
    samples = ramp(65535, channels)
    if channels == 4:
        samples[..., 3] = 65535
    found = check(odd.tiff(samples, {338: 2} if channels == 4 else {}, order), ANEW)
    assert found.oddity == "16 bits a sample, the upper 8 kept"
    assert np.abs(trained(found).astype(int) - grey(samples[..., 0] >> 8)).max() <= 2


# Transparency.

SEEN = np.zeros(SHAPE, bool)
SEEN[4:-4, 8:-8] = True


def icon(hidden: tuple[int, int, int], alpha: int = 0) -> np.ndarray:
    """A blue square; around it the colour `hidden`, of which `alpha` is seen."""
    pixels = np.full((*SHAPE, 4), (*hidden, alpha), np.uint8)
    pixels[SEEN] = (20, 40, 200, 255)
    return pixels


def palette_png(hidden: tuple[int, int, int], *, table: bool) -> bytes:
    """An icon of two colours; tRNS is a table of what each of them shows, or names the transparent one."""
    image = Image.fromarray(SEEN.astype(np.uint8), "P")
    image.putpalette([*hidden, 20, 40, 200])
    return encoded(image, "PNG", transparency=bytes([0, 254 + table]) if table else 0)


def grey_icon(hidden: int) -> np.ndarray:
    return np.dstack([np.where(SEEN, 70, hidden), np.where(SEEN, 255, 0)]).astype(np.uint8)


def keyed_png(hidden: int, channels: int, dtype: type) -> bytes:
    """A grey or coloured PNG of which one colour is transparent."""
    scale = 1 if dtype is np.uint8 else 257
    colour = [hidden * scale] * channels
    samples = np.where(SEEN[..., None], 70 * scale, np.array(colour)).astype(dtype)
    return odd.png(samples, odd.chunk(b"tRNS", struct.pack(f">{channels}H", *colour)))


def sixteen(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.uint16) * 257


BLUE, GREY = (20, 40, 200), (70, 70, 70)
RED, GREEN = (255, 0, 0), (0, 255, 0)
ICONS = {
    "RGBA": (lambda n: odd.png(icon((RED, GREEN)[n])), BLUE, KEEP),
    "LA": (lambda n: odd.png(grey_icon(255 * n)), GREY, KEEP),
    "palette and a table": (lambda n: palette_png((RED, GREEN)[n], table=True), BLUE, KEEP),
    "palette and an index": (lambda n: palette_png((RED, GREEN)[n], table=False), BLUE, KEEP),
    "RGB and a colour": (lambda n: keyed_png(10 + n, 3, np.uint8), GREY, KEEP),
    "L and a colour": (lambda n: keyed_png(10 + n, 1, np.uint8), GREY, KEEP),
    "RGBA of 16 bits": (lambda n: odd.png(sixteen(icon((RED, GREEN)[n]))), BLUE, KEEP),
    "LA of 16 bits": (lambda n: odd.png(sixteen(grey_icon(255 * n))), GREY, KEEP),
    "RGB of 16 bits and a colour": (lambda n: keyed_png(10 + n, 3, np.uint16), GREY, KEEP),
    "L of 16 bits and a colour": (lambda n: keyed_png(10 + n, 1, np.uint16), GREY, KEEP),
    "WebP": (
        lambda n: encoded(
            Image.fromarray(icon((RED, GREEN)[n])), "WEBP", lossless=True, exact=True
        ),
        BLUE,
        KEEP,
    ),
    "GIF": (lambda n: gif((RED, GREEN)[n]), BLUE, ANEW),
    "TIFF": (lambda n: odd.tiff(icon((RED, GREEN)[n]), {338: 2}), BLUE, ANEW),
    "TIFF of 16 bits": (lambda n: odd.tiff(sixteen(icon((RED, GREEN)[n])), {338: 2}), BLUE, ANEW),
    "AVIF": (
        lambda n: encoded(Image.fromarray(icon((RED, GREEN)[n])), "AVIF", quality=100),
        BLUE,
        ANEW,
    ),
}


def gif(hidden: tuple[int, int, int]) -> bytes:
    image = Image.fromarray(SEEN.astype(np.uint8), "P")
    image.putpalette([*hidden, *BLUE])
    return encoded(image, "GIF", transparency=0)


@pytest.mark.parametrize("name", ICONS)
def test_icons_that_look_alike_are_alike(name: str, tmp_path: Path) -> None:
    make, colour, policy = ICONS[name]
    files = [make(0), make(1)]
    assert files[0] != files[1]
    found = [check(data, policy) for data in files]
    assert found[0].data == found[1].data or name == "AVIF"  # which loses something
    right = np.where(SEEN[..., None], colour, 255)
    for each in found:
        assert each.altered and each.oddity.endswith("transparent pixels, laid on white")
        if policy is KEEP:
            np.testing.assert_array_equal(trained(each), right)
        for place in ((0, 0), (12, 20), (-1, -1)):
            assert np.abs(trained(each)[place].astype(int) - right[place]).max() <= 3
    if policy is KEEP or name == "GIF":
        for data in files:
            np.testing.assert_array_equal(asked(data, tmp_path), right)


@pytest.mark.parametrize("alpha", [1, 100, 128, 254])
def test_half_transparent_pixels_are_mixed_with_white(alpha: int) -> None:
    found = trained(check(odd.png(icon(RED, alpha)), KEEP))
    mixed = np.rint((np.array(RED) * alpha + 255.0 * (255 - alpha)) / 255)
    assert np.abs(found[~SEEN] - mixed).max() <= 1 and (found[SEEN] == BLUE).all()


OPAQUE = {
    "RGBA": odd.png(icon(RED, 255)),
    "RGBA of 16 bits": odd.png(sixteen(icon(RED, 255))),
    "LA": odd.png(np.dstack([np.full(SHAPE, 9, np.uint8), np.full(SHAPE, 255, np.uint8)])),
    "a colour that does not occur": odd.png(
        icon(RED, 255)[..., :3], odd.chunk(b"tRNS", bytes([0, 1, 0, 2, 0, 3]))
    ),
    "a table of opaque colours": encoded(
        Image.fromarray(CORNERED).quantize(8), "PNG", transparency=bytes([255, 255, 255, 254])
    ).replace(b"\xff\xff\xff\xfe", b"\xff\xff\xff\xff"),
    "WebP": encoded(Image.fromarray(icon(RED, 255)), "WEBP", lossless=True),
    "RGB": odd.png(CORNERED),
}


@pytest.mark.parametrize("name", [name for name in OPAQUE if "table" not in name])
def test_what_is_opaque_keeps_its_bytes(name: str) -> None:
    found = check(OPAQUE[name], KEEP)
    assert (found.data, found.altered) == (OPAQUE[name], False)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_transparent_grey_of_a_png_of_few_bits_is_found(bits: int, tmp_path: Path) -> None:
    """Pillow scales the samples to 8 bits, and not the one that is transparent."""
    samples = np.where(SEEN, 0, 1)
    data = odd.few_bits_png(samples, bits, odd.chunk(b"tRNS", b"\0\1"))
    right = grey(np.where(SEEN, 0, 255))
    np.testing.assert_array_equal(trained(check(data, KEEP)), right)
    np.testing.assert_array_equal(asked(data, tmp_path), right)
    other = odd.few_bits_png(samples, bits, odd.chunk(b"tRNS", bytes([0, (1 << bits) - 1])))
    if bits > 1:
        assert not check(other, KEEP).altered


def test_what_shows_nothing_is_white_and_noted() -> None:
    found = check(odd.png(np.zeros((*SHAPE, 4), np.uint8)), KEEP)
    assert (
        trained(found) == 255
    ).all() and "nothing but transparency, laid on white" in found.oddity


@pytest.mark.parametrize("turn", TURNS)
def test_a_turned_image_is_made_plain_and_upright_at_once(turn: int) -> None:
    pixels = np.dstack([CORNERED, np.full(SHAPE, 255, np.uint8)])
    pixels[10, 10, 3] = 0
    found = check(odd.png(pixels, odd.chunk(b"eXIf", odd.tiff_exif(turn))), KEEP)
    white = CORNERED.copy()
    white[10, 10] = 255
    np.testing.assert_array_equal(trained(found), TURNS[turn](white))


@pytest.mark.parametrize(
    "name", ["RGBA", "palette and a table", "L of 16 bits and a colour", "WebP"]
)
def test_images_of_older_shards_are_read_as_ever(name: str) -> None:
    """Runs of today go on with the pixels that they have had: the loader leaves the transparency away."""
    data = ICONS[name][0](0)
    image = Image.open(io.BytesIO(data))
    hidden = (
        grey(np.where(SEEN, 70, 10)) if name.startswith("L") else np.asarray(image.convert("RGB"))
    )
    np.testing.assert_array_equal(decode_whole(data), hidden)


# Texts and colour profiles.

TEXTS = {
    "a compressed text of 2 MB": odd.text_chunk("zTXt", b"Comment", b"word " * 400_000),
    "a plain text of 2 MB": odd.text_chunk("tEXt", b"Comment", b"word " * 400_000),
    "an international text of 2 MB": odd.text_chunk("iTXt", b"Comment", b"word " * 400_000),
    "the same, compressed": odd.text_chunk("iTXt-z", b"Comment", b"word " * 400_000),
    "texts of 70 MB": odd.text_chunk("tEXt", b"Comment", bytes(70 << 20).replace(b"\0", b"x")),
    "a colour profile of 2 MB": odd.colour_profile(2 << 20),
    "a text of a bomb": odd.text_chunk("zTXt", b"Comment", bytes(80 << 20)),
    "a text called transparency": odd.text_chunk("tEXt", b"transparency", b"none at all"),
    "a text called bbox": odd.text_chunk("tEXt", b"bbox", b"none at all"),
    "a text that is damaged": odd.chunk(b"zTXt", b"Comment\0\0no zlib"),
    "a profile that is damaged": odd.chunk(b"iCCP", b"a\0\7no zlib"),
}


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("name", TEXTS)
def test_what_a_png_tells_beside_its_pixels_is_no_reason_to_refuse_it(
    name: str, where: str, tmp_path: Path
) -> None:
    data = odd.png(CORNERED, **{where: TEXTS[name]})
    for policy in (KEEP, FULL):
        found = check(data, policy)
        assert (found.data, found.altered, found.oddity) == (data, False, "")
        np.testing.assert_array_equal(trained(found), CORNERED)
    np.testing.assert_array_equal(asked(data, tmp_path), CORNERED)
    assert check(data, ImagePolicy(resize_shorter=12)).altered


def test_the_pixels_of_a_png_are_still_looked_at() -> None:
    noise = np.random.default_rng(0).integers(0, 256, CORNERED.shape, dtype=np.uint8)
    data = odd.png(noise, odd.text_chunk("tEXt", b"Comment", b"x"))
    cut = data[: data.index(b"IDAT") + 60]
    check(cut, KEEP)
    for read in (lambda: check(cut, FULL), lambda: decode_whole(cut)):
        with pytest.raises(DataError, match="cannot be decoded"):
            read()


@pytest.mark.parametrize("kind", [1, 3, 5, 7])
def test_a_png_of_a_kind_that_cannot_be_is_refused(kind: int) -> None:
    """Of palettes without one, and of kinds that there are not."""
    data = odd.png(CORNERED)
    head = data[16:25] + bytes([kind]) + data[26:29]
    for policy in (KEEP, FULL, ANEW):
        with pytest.raises(DataError, match="cannot be decoded"):
            check(data[:8] + odd.chunk(b"IHDR", head) + data[33:], policy)


def test_a_png_of_apples_own_form_is_refused_by_its_header() -> None:
    data = odd.png(CORNERED)
    theirs = data[:8] + odd.chunk(b"CgBI", bytes([0x50, 0, 0x20, 2])) + data[8:]
    for read in (lambda: check(theirs, KEEP), lambda: decode_whole(theirs)):
        with pytest.raises(DataError, match="it is no PNG of the standard: it begins with b'CgBI'"):
            read()


def test_one_background_is_for_all() -> None:
    """The page on which a model is tried cannot import ours."""
    page = Path(plain_module.__file__).parents[1] / "serving" / "space" / "classifier.py"
    assert f'BACKGROUND = "{plain_module.BACKGROUND}"' in page.read_text()
