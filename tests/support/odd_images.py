"""Image files that are odd but sound, built byte by byte: PNG, TIFF and JPEG as no library here would write them."""

import struct
import zlib

import numpy as np

PNG_KINDS = {1: 0, 2: 4, 3: 2, 4: 6}  # by the number of channels
WIDTH, HEIGHT = 40, 24
# The passes of an interlaced PNG: where each begins, and its steps.
INTERLACED = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)


def chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def png(
    samples: np.ndarray, before: bytes = b"", after: bytes = b"", *, passes: tuple = ((0, 0, 1, 1),)
) -> bytes:
    """A PNG of the `samples`, uint8 or uint16 [height, width, channels], with more chunks `before` and `after` its pixels. Those
    come in one pass, or in the seven of `INTERLACED`.
    """
    height, width, channels = samples.shape
    bits = 8 * samples.itemsize
    big = samples.astype(samples.dtype.newbyteorder(">"))
    rows = b"".join(
        b"\0" + big[y, left::across].tobytes()
        for left, top, across, down in passes
        for y in range(top, height if left < width else 0, down)
    )
    head = struct.pack(">IIBBBBB", width, height, bits, PNG_KINDS[channels], 0, 0, len(passes) > 1)
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + before + pixels + after + chunk(b"IEND", b"")
    )


def few_bits_png(samples: np.ndarray, bits: int, before: bytes = b"") -> bytes:
    """A grey PNG of 1, 2 or 4 `bits` a sample, [height, width]."""
    height, width = samples.shape
    each = (samples[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    packed = np.packbits(each.reshape(height, -1).astype(np.uint8), axis=1)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0))
    rows = b"".join(b"\0" + row.tobytes() for row in packed)
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + before
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def text_chunk(kind: str, keyword: bytes, text: bytes) -> bytes:
    """A text of one of the kinds that PNG has: tEXt, zTXt, iTXt, and iTXt compressed (iTXt-z)."""
    if kind == "tEXt":
        return chunk(b"tEXt", keyword + b"\0" + text)
    if kind == "zTXt":
        return chunk(b"zTXt", keyword + b"\0\0" + zlib.compress(text))
    if kind == "iTXt":
        return chunk(b"iTXt", keyword + b"\0\0\0en\0word\0" + text)
    return chunk(b"iTXt", keyword + b"\0\1\0en\0word\0" + zlib.compress(text))


def colour_profile(size: int) -> bytes:
    return chunk(b"iCCP", b"large\0\0" + zlib.compress(np.random.default_rng(0).bytes(size), 1))


def tiff_exif(orientation: int) -> bytes:
    """EXIF of the one tag Orientation."""
    return b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)


def raw_profile(orientation: int) -> bytes:
    """EXIF as ImageMagick writes it into a text."""
    exif = b"Exif\0\0" + tiff_exif(orientation)
    digits = exif.hex()
    lines = [digits[at : at + 72] for at in range(0, len(digits), 72)]
    return b"\nexif\n%8d\n" % len(exif) + "\n".join(lines).encode() + b"\n"


TIFF_TYPES = {int: (4, "I"), float: (12, "d"), bytes: (1, "B")}


def tiff(samples: np.ndarray, tags: dict[int, object] | None = None, order: str = "<") -> bytes:
    """An uncompressed TIFF of the `samples` [height, width, channels]; `tags` beside those that it needs, or instead of them."""
    height, width, channels = samples.shape
    kind = {"u": 1, "i": 2, "f": 3}[samples.dtype.kind]
    pixels = samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    wanted: dict[int, object] = {
        256: width,
        257: height,
        258: (8 * samples.itemsize,) * channels,
        259: 1,
        262: 2 if channels >= 3 else 1,
        273: 8,
        277: channels,
        278: height,
        279: len(pixels),
        339: (kind,) * channels,
    } | (tags or {})
    directory, extra = b"", b""
    start = 8 + len(pixels) + len(pixels) % 2
    after = start + 2 + 12 * len(wanted) + 4
    for tag, value in sorted(wanted.items()):
        values = (
            value
            if isinstance(value, tuple)
            else tuple(value)
            if isinstance(value, bytes)
            else (value,)
        )
        number, letter = TIFF_TYPES[bytes if isinstance(value, bytes) else type(values[0])]
        if letter == "I" and min(values) < 0:
            number, letter = 9, "i"
        elif letter == "I" and max(values) <= 0xFFFF:
            number, letter = 3, "H"
        content = struct.pack(f"{order}{len(values)}{letter}", *values)
        if len(content) > 4:
            cell = struct.pack(f"{order}I", after + len(extra))
            extra += content + b"\0" * (len(content) % 2)
        else:
            cell = content.ljust(4, b"\0")
        directory += struct.pack(f"{order}HHI", tag, number, len(values)) + cell
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, start)
    count = struct.pack(f"{order}H", len(wanted))
    return head + pixels + b"\0" * (len(pixels) % 2) + count + directory + bytes(4) + extra


def jpeg(
    colour: tuple[int, ...],
    process: int = 0xC0,
    bits: int = 8,
    *,
    sampling: tuple[int, ...] | None = None,
    names: bytes = b"\1\2\3\4",
) -> bytes:
    """A JPEG of one `colour`, Huffman-coded, by any process: of each block, or in a lossless one of each sample, the difference
    from the one before is 0. `sampling`: a byte for each component, 0x11 to 0x44. `names`: what the components are called.
    """
    sampling = sampling or (0x11,) * len(colour)
    is_lossless = process == 0xC3
    # Codes of four bits for the numbers of bits 0 to 14; for the other coefficients one code: there are none.
    tables = b"\0" + bytes([0, 0, 0, 15, *[0] * 12]) + bytes(range(15))
    tables += b"\x10" + bytes([1, *[0] * 15]) + b"\0"
    quant = b"\0" + b"\x08" + b"\1" * 63
    parts = b"".join(bytes([names[n], sampling[n], 0]) for n in range(len(colour)))
    frame = struct.pack(">BHHB", bits, HEIGHT, WIDTH, len(colour)) + parts
    last = 0 if process == 0xC2 or is_lossless else 63
    scan = bytes([len(colour)]) + b"".join(bytes([names[n], 0]) for n in range(len(colour)))
    scan += bytes([1 if is_lossless else 0, last, 0])
    middle = 1 << (bits - 1)
    blocks = [1 if len(colour) == 1 else (each >> 4) * (each & 15) for each in sampling]
    end = "0" if last else ""  # of the block's other coefficients
    first = "".join(
        _difference(value - middle) + end + (_difference(0) + end) * (count - 1)
        for value, count in zip(colour, blocks, strict=True)
    )
    coded = first + (_difference(0) + end) * sum(blocks) * (_units(sampling, is_lossless) - 1)
    coded += "1" * (-len(coded) % 8)
    content = int(coded, 2).to_bytes(len(coded) // 8, "big").replace(b"\xff", b"\xff\0")
    segments = [(0xDB, quant), (process, frame), (0xC4, tables), (0xDA, scan)]
    written = b"".join(
        struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body for marker, body in segments
    )
    return b"\xff\xd8" + written + content + b"\xff\xd9"


def _difference(value: int) -> str:
    """The code for the number of bits of a difference, and the bits."""
    count = abs(value).bit_length()
    bits = value if value >= 0 else value + (1 << count) - 1
    return f"{count:04b}" + (f"{bits:0{count}b}" if count else "")


def _units(sampling: tuple[int, ...], is_lossless: bool) -> int:
    """How often something of every component follows: samples, or as many blocks as each is sampled with."""
    if is_lossless:
        return WIDTH * HEIGHT
    across, down = (
        (1, 1)
        if len(sampling) == 1
        else (max(s >> 4 for s in sampling), max(s & 15 for s in sampling))
    )
    return -(-WIDTH // (8 * across)) * -(-HEIGHT // (8 * down))


# What libjpeg-turbo's jpegtran -arithmetic makes of jpeg((200,)), jpeg((200, 100, 160)) and, with -progressive, of the latter.
QUANTS = "ffd8ffe000104a46494600010100000100010000ffdb00430008" + "01" * 63
ARITHMETIC = {
    "grey": (
        (200,),
        QUANTS + "ffc9000b080018002801011100ffcc000600101005ffda0008010100003f00d2a4814effd9",
    ),
    "colours": (
        (200, 100, 160),
        QUANTS
        + "ffc90011080018002803011100021100031100ffcc000a0010100501101105ffda000c03010002110311003f00d2a488b46a9994"
        + "6580ffd9",
    ),
    "progressive": (
        (200, 100, 160),
        QUANTS
        + "ffca0011080018002803011100021100031100ffcc000600100110ffda000c03010002110310000001d256e00da8af08ffcc0004"
        + "1005ffda0008010100010502b0ffcc00041105ffda0008010301013f01b0ffcc00041105ffda0008010201013f01b0ffcc000410"
        + "05ffda0008010100063f02b0ffcc00041005ffda0008010100013f21b0ffda000c030100020003000000104bc6ffcc00041105ff"
        + "da0008010301013f10b0ffcc00041105ffda0008010201013f10b0ffcc00041005ffda0008010100013f10b0ffd9",
    ),
}


def arithmetic(name: str) -> bytes:
    return bytes.fromhex(ARITHMETIC[name][1])
