"""Answer for images without PyTorch: by an ONNX file of `wds-train export`, onnxruntime and Pillow.

The page is a program of its own, on a machine that has no wds-train. So what a conversion does to
odd images is done here once more, and a test holds the two together.
"""

import io
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin

# The limits for what visitors send.
MOST_BYTES = 20 << 20
MOST_PIXELS = 50_000_000  # 150 MB once decoded
FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
# MOST_PIXELS is the limit; Pillow's own would call a larger image damaged.
Image.MAX_IMAGE_PIXELS = None
# A PNG's texts and colour profile, bytes. Pillow's own limit is 1 MB, above which it would call a
# sound image damaged.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 64 << 20

THREADS = 2  # of one answer; the page gives two at a time
SHOWN = 448  # side of the heat map, pixels
HOT = np.array([255, 60, 0], np.float32)  # the colour of the places that count most
OPACITY = 0.6  # of that colour where it counts most
# A longer side of more times the shorter is cut before it is resized: a strip of one pixel by a
# million would become gigabytes.
THIN = 16

# The rest is as a conversion to shards has it.
BACKGROUND = "white"  # below transparent pixels
# A PNG's kinds of pixels, which are byte 25 of its file; byte 24 are the bits of a sample.
GREY = 0
COLOUR = 2
GREY_ALPHA = 4
# A grey PNG of 2 or 4 bits: Pillow scales its samples to 8 by this, but not the one that it calls
# transparent.
FEW_GREYS = {b"\2\0": 85, b"\4\0": 17}
FILLED = 0x1000  # from this value on, 16 bits are taken for filled
# Samples that fit into so many bits are small numbers. Had they been scaled up to 16 bits, the
# image would be almost black.
SURE_BITS = 12

Pixels = NDArray[np.uint8]


class Refused(Exception):
    """An image that gets no answer. The message is for whoever sent it."""


@dataclass(frozen=True)
class Answer:
    """The answer for an image.

    Attributes:
        probabilities: Of the classes, float64 [classes].
        heat: Where in the image the likeliest class was found, float32 [h, w] in [0, 1]. None if
            the model cannot tell.
        seconds: The time of the model alone.
    """

    probabilities: NDArray[np.float64]
    heat: NDArray[np.float32] | None
    seconds: float

    def top(self, count: int) -> list[int]:
        """Return the labels of the likeliest classes, the likeliest first."""
        return np.argsort(-self.probabilities, kind="stable")[:count].tolist()


class Classifier:
    """A model of an ONNX file.

    Args:
        path: The file.

    Attributes:
        facts: The content of the file's metadata: view, calibration, names of classes.
    """

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        self._session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        metadata = self._session.get_modelmeta().custom_metadata_map
        self.facts: dict[str, Any] = json.loads(metadata["wds-train"])
        self._outputs = [output.name for output in self._session.get_outputs()]

    def pixels(self, image: Image.Image) -> Pixels:
        """Return the part of an upright RGB image that the model sees, uint8 [side, side, 3]."""
        view = self.facts["view"]
        return np.asarray(_cut_square(image, view["crop"], view["side"]))

    def draw_heat(self, image: Image.Image, heat: NDArray[np.float32]) -> Image.Image:
        """Return the part of the image that the model sees, coloured by `heat` [h, w] in [0, 1]."""
        square = _cut_square(image, self.facts["view"]["crop"], SHOWN)
        pixels = np.asarray(square, np.float32)
        # The map has few places, such as 7 x 7: enlarged smoothly, it looks like a map.
        small = Image.fromarray((255 * heat).astype(np.uint8))
        spread = small.resize((SHOWN, SHOWN), Image.Resampling.BICUBIC)
        share = OPACITY * np.asarray(spread, np.float32)[:, :, None] / 255
        return Image.fromarray(((1 - share) * pixels + share * HOT).astype(np.uint8))

    def answer(self, image: Image.Image) -> Answer:
        """Return the answer for an upright RGB image."""
        pixels = self.pixels(image)[None]
        started = time.perf_counter()
        found = self.run(pixels)
        logits = found["logits"][0].astype(np.float64) / self.facts["calibration"]["temperature"]
        seconds = time.perf_counter() - started

        # Less the largest, or the exponential of a large logit would be infinite.
        shares = np.exp(logits - logits.max())
        heat = None
        if "head" in found:
            heat = _activation_map(found["features"][0], found["head"][int(logits.argmax())])
        return Answer(shares / shares.sum(), heat, seconds)

    def run(self, pixels: Pixels) -> dict[str, NDArray[np.float32]]:
        """Return the outputs of the file, by name.

        If the model was validated with mirror images, the logits are the mean of both views.

        Args:
            pixels: uint8 [n, side, side, 3].
        """
        outputs = self._session.run(self._outputs, {"pixels": pixels})
        found = dict(zip(self._outputs, outputs, strict=True))
        if self.facts["view"]["flip"]:
            mirrored = np.ascontiguousarray(pixels[:, :, ::-1])
            (logits,) = self._session.run(["logits"], {"pixels": mirrored})
            found["logits"] = (found["logits"] + logits) / 2
        return found


def _activation_map(
    features: NDArray[np.float32], weights: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return the activation map of a class, [h, w] in [0, 1].

    Args:
        features: The last feature map, [channels, h, w].
        weights: The row of the class in the head's weights, [channels].
    """
    # A place that speaks against the class counts as one that says nothing.
    heat = np.maximum(np.einsum("chw,c->hw", features, weights), 0)
    return heat / max(float(heat.max()), 1e-9)


def open_image(data: bytes) -> Image.Image:
    """Return an image as RGB, upright.

    Args:
        data: The file.

    Raises:
        Refused: It is no image, damaged or too large, which is found before any pixel is made.
    """
    if len(data) > MOST_BYTES:
        megabytes = len(data) >> 20
        raise Refused(f"This file has {megabytes} MB; at most {MOST_BYTES >> 20} MB are taken.")
    try:
        # The header says how many pixels there are. A file of kilobytes may claim billions.
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MOST_PIXELS:
            raise Refused(
                f"This image has {image.width} x {image.height} pixels; at most "
                f"{MOST_PIXELS // 10**6} million are taken."
            )
        image.load()

        # By these texts Pillow turns an image, and browsers do not.
        for text in ("xmp", "XML:com.adobe.xmp"):
            image.info.pop(text, None)
        if image.format == "PNG":
            coloured = _convert_png(image, data)
        else:
            coloured = _convert_colours(image)
        return _turn_upright(_put_on_background(coloured), image.info)
    except Image.UnidentifiedImageError as error:
        raise Refused("This is no JPEG, PNG, WebP or GIF image.") from error
    except Refused:
        raise
    except Exception as error:  # on damaged bytes Pillow's readers raise nearly anything
        raise Refused("This image is damaged, or cut off.") from error


def _convert_png(image: Image.Image, data: bytes) -> Image.Image:
    """Return a PNG in RGB, or in RGBA if it has transparent pixels."""
    if "transparency" in image.info:
        image.info["transparency"] *= FEW_GREYS.get(data[24:26], 1)
    if data[24] == 16:
        return _convert_sixteen_bits(image, data)
    return _convert_colours(image)


def _convert_colours(image: Image.Image) -> Image.Image:
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _convert_sixteen_bits(image: Image.Image, data: bytes) -> Image.Image:
    """Bring a PNG of 16 bits a sample to 8, as a conversion does (docs/shards.md, Images)."""
    colours = 3
    if data[25] in (GREY, GREY_ALPHA):
        colours = 1
    samples = _read_samples(data)
    bits = _read_significant_bits(data)
    planes = [_to_eight_bits(samples[..., :colours], bits[:colours])]

    # Transparency comes from a channel of its own, or from one colour that is called transparent.
    hidden = image.info.get("transparency")
    if samples.shape[2] > colours:
        planes.append(_to_eight_bits(samples[..., colours:], bits[colours:]))
    elif hidden is not None:
        is_hidden = (samples == hidden).all(axis=2, keepdims=True)
        planes.append(np.where(is_hidden, 0, 255).astype(np.uint8))
    pixels = np.concatenate(planes, axis=2)
    if pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    return _convert_colours(Image.fromarray(pixels))


def _read_samples(data: bytes) -> NDArray[np.uint16]:
    """Return all 16 bits of the samples of a PNG, uint16 [height, width, channels].

    By itself Pillow gives 16 bits for grey images alone, and the upper 8 for others. It is told to
    unpack the file's bytes in another way.
    """

    def unpack(raw: str) -> NDArray[Any]:
        image = Image.open(io.BytesIO(data), formats=("PNG",))
        image.tile = [tile._replace(args=raw) for tile in image.tile]
        image.load()
        return np.asarray(image)

    kind = data[25]
    if kind == GREY:
        return unpack("I;16B").astype(np.uint16)[..., None]
    if kind == GREY_ALPHA:  # the four bytes of a pixel, as if they were four colours of 8 bits
        return unpack("RGBA").view(">u2").astype(np.uint16)
    mode = "RGB" if kind == COLOUR else "RGBA"
    # 16B takes the first byte of each sample, 16L the second.
    upper = np.left_shift(unpack(f"{mode};16B"), 8, dtype=np.uint16)
    return upper | unpack(f"{mode};16L")


def _read_significant_bits(data: bytes) -> bytes:
    """Return the content of a PNG's chunk sBIT, the bits used of each channel.

    It is empty if there is no such chunk.
    """
    at = 8  # after the signature
    while at < len(data):
        # A chunk is its size, its name, its content and a checksum, which have 12 bytes together.
        size = int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] == b"sBIT":
            return data[at + 8 : at + 8 + size]
        at += 12 + size
    return b""


def _to_eight_bits(samples: NDArray[np.uint16], bits: bytes) -> Pixels:
    """Bring samples of 16 bits to 8: stretched if sBIT says that fewer are used, else the upper 8.

    Args:
        samples: [height, width, channels].
        bits: The bits used of each channel, as sBIT says; empty if it says nothing.

    Raises:
        Refused: Nothing says which number is white.
    """
    highest = int(samples.max())
    count = max(bits, default=0)
    if highest == 0 or not 0 < count <= 16:
        if 0 < highest < FILLED:
            raise Refused(
                f"This image has 16 bits a sample, of 0 to {highest}, and does not say which "
                "number is white. Convert it to 8 bits."
            )
        return _upper_bits(samples)

    # A program may have scaled few bits up to 16, and have kept their number in sBIT: the bits
    # behind are then zeros, or the upper ones again.
    top = (1 << count) - 1
    behind = samples & (0xFFFF >> count)
    is_scaled_up = bool(((behind == 0) | (behind == samples >> count)).all())
    if count == 16 or highest > top or (count > SURE_BITS and is_scaled_up):
        return _upper_bits(samples)
    return np.rint(samples.astype(np.float64) * 255 / top).astype(np.uint8)


def _upper_bits(samples: NDArray[np.uint16]) -> Pixels:
    return (samples >> 8).astype(np.uint8)


def _turn_upright(image: Image.Image, info: dict[Any, Any]) -> Image.Image:
    """Turn an image as the EXIF in `info` says. EXIF that makes no sense turns nothing."""
    image.info = info
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def _put_on_background(image: Image.Image) -> Image.Image:
    if image.mode != "RGBA":
        return image
    background = Image.new("RGBA", image.size, BACKGROUND)
    return Image.alpha_composite(background, image).convert("RGB")


def _cut_square(image: Image.Image, crop: float, side: int) -> Image.Image:
    """Return the centre of an image, as the validation saw it, and as timm does it.

    Args:
        image: The image, upright and in RGB.
        crop: The share of the shorter side that is seen.
        side: The side of the result, pixels.
    """
    shorter = min(image.size)
    longest = THIN * shorter
    if max(image.size) > longest:
        size = (min(image.width, longest), min(image.height, longest))
        image = ImageOps.fit(image, size, Image.Resampling.NEAREST)

    # The shorter side becomes `side` / `crop`.
    scaled = math.floor(side / crop)
    width = int(scaled * image.width / shorter)
    height = int(scaled * image.height / shorter)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    left = round((resized.width - side) / 2)
    top = round((resized.height - side) / 2)
    return resized.crop((left, top, left + side, top + side))
