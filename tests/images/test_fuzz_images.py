"""Mutated images, 12,000 of them: pixels or a DataError, always; no crash, hang, blow-up, or pixel that nobody decoded.

They run in a process of their own, with its memory capped, so that a crash or a blow-up is a failure and not the end.
"""

import io
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from benchmarks.decode_rates import read_images
from wds_train.dataset.index import MAX_PIXELS
from wds_train.errors import DataError
from wds_train.images import jpeg
from wds_train.images.crop import Box, random_resized_crop
from wds_train.images.decode import decode_crop, probe
from wds_train.rng import generator

MUTATIONS = 12_000
SECONDS_EACH = 10  # of CPU; a JPEG of MAX_PIXELS takes .5 s on an idle core
# The dearest image takes 9 bytes a pixel (decode.py), Pillow's own readers a few more.
MEMORY = 16 * MAX_PIXELS


def test_mutated_images_give_pixels_or_a_data_error() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", __file__],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},  # for `benchmarks`
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert done.stderr == ""
    accepted, refused = map(int, done.stdout.split())
    assert accepted + refused == MUTATIONS
    assert (
        accepted > MUTATIONS / 20 and refused > MUTATIONS / 4
    )  # it tries both what can be read and what cannot


def seeds() -> list[bytes]:
    """Small images of every kind, and one of an ordinary size."""
    photo = Image.open(io.BytesIO(read_images(None)[0]))
    small = photo.resize((48, 40))

    def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    exif = Image.Exif()
    exif[0x0112] = 6
    return [
        encoded(small, "JPEG", subsampling=0),
        encoded(small, "JPEG", subsampling=2, exif=exif.tobytes()),
        encoded(small, "JPEG", progressive=True),
        encoded(small, "JPEG", restart_marker_blocks=2),
        encoded(small.convert("L"), "JPEG"),
        encoded(small.convert("CMYK"), "JPEG"),
        encoded(photo.resize((500, 333)), "JPEG", quality=90),
        encoded(small, "PNG", exif=exif.tobytes()),
        encoded(small.quantize(64), "PNG", transparency=bytes(64)),
        cv2.imencode(".png", np.asarray(small.convert("L")).astype(np.uint16) * 257)[1].tobytes(),
        encoded(small, "WEBP", exif=exif.tobytes()),
        encoded(small.convert("RGBA"), "WEBP", lossless=True),
        encoded(small.quantize(64), "GIF"),
    ]


def mutated(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    """One to four changes of the kinds that disks, networks, and people with bad intentions make."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        at = (
            int(rng.integers(len(changed) + 1))
            if rng.random() < 0.6
            else int(rng.integers(min(len(changed), 400) + 1))
        )
        size = int(rng.integers(1, 33))
        match rng.integers(8):
            case 0 | 1:
                changed[at : at + 1] = bytes([rng.integers(256)])
            case 2:
                changed[at : at + size] = rng.bytes(size)
            case 3:
                del changed[at : at + size]
            case 4:
                changed[at:at] = changed[at : at + size] * int(rng.integers(1, 4))
            case 5:
                changed[at : at + 2] = b"\xff" + bytes([rng.integers(0xC0, 0x100)])
            case 6:
                changed[at : at + 4] = [0, 0, 0, 0] if rng.random() < 0.5 else b"\xff\xff\xff\xff"
            case 7:
                changed[at:] = b"" if rng.random() < 0.5 else other[at:]
    return bytes(changed)


def try_one(rng: np.random.Generator, data: bytes) -> bool:
    """Was it accepted? Anything but pixels or a DataError raises."""
    try:
        box = random_resized_crop(rng, *probe(data), (0.08, 1.0), (3 / 4, 4 / 3))
        out = np.zeros((24, 24, 3), np.uint8)
        decode_crop(data, box, out)
    except DataError as error:
        assert str(error), data
        return False
    again = np.full_like(out, 255)
    decode_crop(data, box, again)
    assert np.array_equal(out, again), "some pixels were never written"
    check_rows(data, box)
    return True


def check_rows(data: bytes, box: Box) -> None:
    """The rows that were decoded are those of the whole image, as libjpeg-turbo makes it when it may not stop early."""
    header = jpeg.read_header(memoryview(data)) if data[:2] == jpeg.START else None
    if header and header.components in (1, 3) and header.orientation == 1:
        rows = box.top + box.height
        whole = simplejpeg.decode_jpeg(data, fastdct=True, fastupsample=True, strict=False)
        assert np.array_equal(jpeg.decode_rows(memoryview(data), header, rows)[:rows], whole[:rows])


def main() -> None:
    rng = generator("fuzz images")
    images = seeds()
    decode_crop(
        images[0], Box(0, 0, 48, 40), np.zeros((8, 8, 3), np.uint8)
    )  # what libraries load late, before the cap
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
    accepted = 0
    for number in range(MUTATIONS):
        data = mutated(rng, images[number % len(images)], images[rng.integers(len(images))])
        started = time.process_time()
        accepted += try_one(rng, data)
        assert time.process_time() - started < SECONDS_EACH, data
    print(accepted, MUTATIONS - accepted)


if __name__ == "__main__":
    main()
