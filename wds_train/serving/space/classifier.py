"""Images to answers, without PyTorch: an ONNX file of `wds-train export`, onnxruntime, Pillow and NumPy."""

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

MOST_BYTES = 20 << 20
MOST_PIXELS = 50_000_000  # 150 MB once decoded
FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
SHOWN = 448  # side of the heat map, pixels
THIN = 16  # a longer side of more times the shorter is cut before it is resized
HOT = np.array([255, 60, 0], np.float32)
THREADS = 2
Image.MAX_IMAGE_PIXELS = (
    None  # MOST_PIXELS is the limit; Pillow's own would call a larger image damaged
)
# A PNG's texts and colour profile, of which Pillow's own limit is 1 MB: it would call a sound image damaged.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 64 << 20
BACKGROUND = "white"  # below transparent pixels, as in training
FEW_GREYS = {b"\2\0": 85, b"\4\0": 17}
FILLED = 0x1000  # from this value on, 16 bits are taken for filled
SURE_BITS = 12

Pixels = NDArray[np.uint8]


class Refused(Exception):
    """An image that is not answered for; the message is for whoever sent it."""


@dataclass(frozen=True)
class Answer:
    """`probabilities` [classes]; `heat` [h, w] in [0, 1], where in the image the likeliest class was found, if the model can
    tell; `seconds` of the model alone.
    """

    probabilities: NDArray[np.float64]
    heat: NDArray[np.float32] | None
    seconds: float

    def top(self, count: int) -> list[int]:
        return np.argsort(-self.probabilities, kind="stable")[:count].tolist()


class Classifier:
    """The model in the file at `path`."""

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        self._session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self.facts: dict[str, Any] = json.loads(
            self._session.get_modelmeta().custom_metadata_map["wds-train"]
        )
        self._outputs = [output.name for output in self._session.get_outputs()]

    def pixels(self, image: Image.Image) -> Pixels:
        """What the model sees of an upright RGB image: the centre of its view, uint8 [side, side, 3]."""
        view = self.facts["view"]
        return np.asarray(_square(image, view["crop"], view["side"]))

    def shown(self, image: Image.Image, heat: NDArray[np.float32]) -> Image.Image:
        """The part of the image that the model sees, hot where it looked."""
        square = np.asarray(_square(image, self.facts["view"]["crop"], SHOWN), np.float32)
        spread = Image.fromarray((255 * heat).astype(np.uint8)).resize(
            (SHOWN, SHOWN), Image.Resampling.BICUBIC
        )
        share = 0.6 * np.asarray(spread, np.float32)[:, :, None] / 255
        return Image.fromarray(((1 - share) * square + share * HOT).astype(np.uint8))

    def answer(self, image: Image.Image) -> Answer:
        pixels, started = self.pixels(image)[None], time.perf_counter()
        found = self.run(pixels)
        logits = found["logits"][0].astype(np.float64) / self.facts["calibration"]["temperature"]
        seconds = time.perf_counter() - started
        shares = np.exp(logits - logits.max())
        heat = (
            _heat(found["features"][0], found["head"][int(logits.argmax())])
            if "head" in found
            else None
        )
        return Answer(shares / shares.sum(), heat, seconds)

    def run(self, pixels: Pixels) -> dict[str, NDArray[np.float32]]:
        """The file's outputs for uint8 [n, side, side, 3]; the logits are the mean of both views where the model was validated
        so.
        """
        found = dict(
            zip(self._outputs, self._session.run(self._outputs, {"pixels": pixels}), strict=True)
        )
        if self.facts["view"]["flip"]:
            mirrored = np.ascontiguousarray(pixels[:, :, ::-1])
            found["logits"] = (
                found["logits"] + self._session.run(["logits"], {"pixels": mirrored})[0]
            ) / 2
        return found


def _heat(features: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """The class activation map [h, w] of a class with these `weights` of the head, in [0, 1]."""
    heat = np.maximum(np.einsum("chw,c->hw", features, weights), 0)
    return heat / max(float(heat.max()), 1e-9)


def opened(data: bytes) -> Image.Image:
    """The image as RGB, upright; `Refused` for what is none, or too large: found out before any pixel is made."""
    if len(data) > MOST_BYTES:
        raise Refused(
            f"This file has {len(data) >> 20} MB; at most {MOST_BYTES >> 20} MB are taken."
        )
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MOST_PIXELS:
            raise Refused(
                f"This image has {image.width} x {image.height} pixels; at most {MOST_PIXELS // 10**6} million are taken."
            )
        image.load()
        for text in (
            "xmp",
            "XML:com.adobe.xmp",
        ):  # by which Pillow turns an image, and browsers do not
            image.info.pop(text, None)
        is_deep = image.format == "PNG" and data[24] == 16
        if (
            image.format == "PNG" and "transparency" in image.info
        ):  # of 2 or 4 bits, which Pillow scales to 8 without it
            image.info["transparency"] *= FEW_GREYS.get(data[24:26], 1)
        coloured = _of_sixteen_bits(image, data) if is_deep else _colours(image)
        return _upright(_on_background(coloured), image.info)
    except Image.UnidentifiedImageError as error:
        raise Refused("This is no JPEG, PNG, WebP or GIF image.") from error
    except Refused:
        raise
    except Exception as error:  # on damaged bytes Pillow's readers raise nearly anything
        raise Refused("This image is damaged, or cut off.") from error


def _colours(image: Image.Image) -> Image.Image:
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _of_sixteen_bits(image: Image.Image, data: bytes) -> Image.Image:
    """A PNG with 8 bits a sample, as the conversion to shards makes it (docs/shards.md, Images)."""
    colours = 1 if data[25] in (0, 4) else 3
    samples, bits = _samples(data), _significant_bits(data)
    planes = [_eight(samples[..., :colours], bits[:colours])]
    hidden = image.info.get("transparency")
    if samples.shape[2] > colours:
        planes.append(_eight(samples[..., colours:], bits[colours:]))
    elif hidden is not None:
        planes.append(
            np.where((samples == hidden).all(axis=2, keepdims=True), 0, 255).astype(np.uint8)
        )
    pixels = np.concatenate(planes, axis=2)
    return _colours(Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels))


def _samples(data: bytes) -> NDArray[np.uint16]:
    """All 16 bits, [height, width, channels]. Pillow gives them for grey alone, else the first byte (16B) or the second (16L)."""

    def unpacked(raw: str) -> NDArray[Any]:
        image = Image.open(io.BytesIO(data), formats=("PNG",))
        image.tile = [tile._replace(args=raw) for tile in image.tile]
        image.load()
        return np.asarray(image)

    if data[25] == 0:
        return unpacked("I;16B").astype(np.uint16)[..., None]
    if data[25] == 4:  # the four bytes of a pixel, as if they were four colours of 8 bits
        return unpacked("RGBA").view(">u2").astype(np.uint16)
    mode = "RGB" if data[25] == 2 else "RGBA"
    return np.left_shift(unpacked(f"{mode};16B"), 8, dtype=np.uint16) | unpacked(f"{mode};16L")


def _significant_bits(data: bytes) -> bytes:
    """What the chunk sBIT says; empty where there is none."""
    at = 8
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] == b"sBIT":
            return data[at + 8 : at + 8 + size]
        at += 12 + size
    return b""


def _eight(samples: NDArray[np.uint16], bits: bytes) -> Pixels:
    """Stretched where sBIT says that fewer bits are used, else the upper 8."""
    highest = int(samples.max())
    count = max(bits, default=0)
    if highest == 0 or not 0 < count <= 16:
        if 0 < highest < FILLED:
            raise Refused(
                f"This image has 16 bits a sample, of 0 to {highest}, and does not say which number is white. Convert it to 8 bits."
            )
        return (samples >> 8).astype(np.uint8)
    top = (1 << count) - 1
    behind = samples & (0xFFFF >> count)
    is_scaled_up = bool(((behind == 0) | (behind == samples >> count)).all())
    if count == 16 or highest > top or (count > SURE_BITS and is_scaled_up):
        return (samples >> 8).astype(np.uint8)
    return np.rint(samples.astype(np.float64) * 255 / top).astype(np.uint8)


def _upright(image: Image.Image, info: dict[Any, Any]) -> Image.Image:
    """Turned as the EXIF in `info` says; EXIF that makes no sense turns nothing."""
    image.info = info
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def _on_background(image: Image.Image) -> Image.Image:
    if image.mode != "RGBA":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image).convert("RGB")


def _square(image: Image.Image, crop: float, side: int) -> Image.Image:
    """The centre of the image, as the validation saw it, and as timm does: the shorter side resized to `side` /
    `crop`, `side` of each cut from the middle.
    """
    shorter = min(image.size)
    if (
        max(image.size) > THIN * shorter
    ):  # resized, a strip of one pixel by a million would be gigabytes
        image = ImageOps.fit(
            image,
            (min(image.width, THIN * shorter), min(image.height, THIN * shorter)),
            Image.Resampling.NEAREST,
        )
    resized = [int(math.floor(side / crop) * each / shorter) for each in image.size]
    left, top = (round((each - side) / 2) for each in resized)
    return image.resize((resized[0], resized[1]), Image.Resampling.BILINEAR).crop(
        (left, top, left + side, top + side)
    )
