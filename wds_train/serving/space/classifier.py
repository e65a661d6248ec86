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
from PIL import Image, ImageOps

MOST_BYTES = 20 << 20
MOST_PIXELS = 50_000_000  # 150 MB once decoded
FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
SHOWN = 448  # side of the heat map, pixels
THIN = 16  # a longer side of more times the shorter is cut before it is resized
HOT = np.array([255, 60, 0], np.float32)
THREADS = 2
Image.MAX_IMAGE_PIXELS = None  # MOST_PIXELS is the limit; Pillow's own would call a larger image damaged

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
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.facts: dict[str, Any] = json.loads(self._session.get_modelmeta().custom_metadata_map["wds-train"])
        self._outputs = [output.name for output in self._session.get_outputs()]

    def pixels(self, image: Image.Image) -> Pixels:
        """What the model sees of an upright RGB image: the centre of its view, uint8 [side, side, 3]."""
        view = self.facts["view"]
        return np.asarray(_square(image, view["crop"], view["side"]))

    def shown(self, image: Image.Image, heat: NDArray[np.float32]) -> Image.Image:
        """The part of the image that the model sees, hot where it looked."""
        square = np.asarray(_square(image, self.facts["view"]["crop"], SHOWN), np.float32)
        spread = Image.fromarray((255 * heat).astype(np.uint8)).resize((SHOWN, SHOWN), Image.Resampling.BICUBIC)
        share = 0.6 * np.asarray(spread, np.float32)[:, :, None] / 255
        return Image.fromarray(((1 - share) * square + share * HOT).astype(np.uint8))

    def answer(self, image: Image.Image) -> Answer:
        pixels, started = self.pixels(image)[None], time.perf_counter()
        found = self.run(pixels)
        logits = found["logits"][0].astype(np.float64) / self.facts["calibration"]["temperature"]
        seconds = time.perf_counter() - started
        shares = np.exp(logits - logits.max())
        heat = _heat(found["features"][0], found["head"][int(logits.argmax())]) if "head" in found else None
        return Answer(shares / shares.sum(), heat, seconds)

    def run(self, pixels: Pixels) -> dict[str, NDArray[np.float32]]:
        """The file's outputs for uint8 [n, side, side, 3]; the logits are the mean of both views where the model was validated
        so.
        """
        found = dict(zip(self._outputs, self._session.run(self._outputs, {"pixels": pixels}), strict=True))
        if self.facts["view"]["flip"]:
            mirrored = np.ascontiguousarray(pixels[:, :, ::-1])
            found["logits"] = (found["logits"] + self._session.run(["logits"], {"pixels": mirrored})[0]) / 2
        return found


def _heat(features: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """The class activation map [h, w] of a class with these `weights` of the head, in [0, 1]."""
    heat = np.maximum(np.einsum("chw,c->hw", features, weights), 0)
    return heat / max(float(heat.max()), 1e-9)


def opened(data: bytes) -> Image.Image:
    """The image as RGB, upright; `Refused` for what is none, or too large: found out before any pixel is made."""
    if len(data) > MOST_BYTES:
        raise Refused(f"This file has {len(data) >> 20} MB; at most {MOST_BYTES >> 20} MB are taken.")
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MOST_PIXELS:
            raise Refused(
                f"This image has {image.width} x {image.height} pixels; at most {MOST_PIXELS // 10**6} million are taken."
            )
        image.load()
        return _rgb(ImageOps.exif_transpose(image))
    except Image.UnidentifiedImageError as error:
        raise Refused("This is no JPEG, PNG, WebP or GIF image.") from error
    except Refused:
        raise
    except Exception as error:  # on damaged bytes Pillow's readers raise nearly anything
        raise Refused("This image is damaged, or cut off.") from error


def _rgb(image: Image.Image) -> Image.Image:
    """Of 16 bits the upper 8, which `convert` would clip at 255 instead."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _square(image: Image.Image, crop: float, side: int) -> Image.Image:
    """The centre of the image, as the validation saw it, and as timm does: the shorter side resized to `side` /
    `crop`, `side` of each cut from the middle.
    """
    shorter = min(image.size)
    if max(image.size) > THIN * shorter:  # resized, a strip of one pixel by a million would be gigabytes
        image = ImageOps.fit(
            image, (min(image.width, THIN * shorter), min(image.height, THIN * shorter)), Image.Resampling.NEAREST
        )
    resized = [int(math.floor(side / crop) * each / shorter) for each in image.size]
    left, top = (round((each - side) / 2) for each in resized)
    return image.resize((resized[0], resized[1]), Image.Resampling.BILINEAR).crop((left, top, left + side, top + side))
