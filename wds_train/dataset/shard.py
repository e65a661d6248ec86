"""Shards: plain WebDataset tars, one sample after the other.

A sample is two adjacent members: `KEY.cls`, the label in ASCII, and `KEY.jpg|png|webp`, the image's
bytes, untouched. Headers carry no times, owners or modes of the machine: the same samples give the
same bytes.
"""

import re
import tarfile
from dataclasses import dataclass
from typing import Any

import numpy as np
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from wds_train.dataset.tar import TAR_BLOCK
from wds_train.errors import DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
# The zeros that end a tar.
END_BYTES = 2 * TAR_BLOCK
# A key is a tar member's name before its extension, by which webdataset groups. It has no dots
# (webdataset cuts at the first) and no odd characters (it must survive every tool), and is short
# enough for a plain ustar header.
KEY = re.compile(r"[A-Za-z0-9_-]+(?:/[A-Za-z0-9_-]+)*")
KEY_LENGTH = 90


@dataclass(frozen=True)
class Sample:
    """An image to be written.

    Attributes:
        key: Its name in the shard, of at most KEY_LENGTH characters; see KEY.
        label: Its class, in [0, classes).
        image: The encoded image, as the source holds it.
        extension: The image's format, one of IMAGE_EXTENSIONS.
        width: The width of the upright image, pixels.
        height: The height of the upright image, pixels.
    """

    key: str
    label: int
    image: bytes
    extension: str
    width: int
    height: int


class ShardWriter:
    """Builds one shard, and the rows of its index.

    `take` and `finish` hand over the shard's bytes, piece by piece or all at once.

    Args:
        number: The number of the shard in its split.

    Attributes:
        rows: A dictionary of the index's columns for each sample.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.rows: list[dict[str, Any]] = []
        self._buffer = bytearray()
        self._taken = 0

    def add(self, sample: Sample) -> None:
        """Add a sample after the others.

        Args:
            sample: The sample.

        Raises:
            DataError: Its key cannot be one.
        """
        if not KEY.fullmatch(sample.key) or len(sample.key) > KEY_LENGTH:
            raise DataError(
                f"{sample.key!r} cannot be a sample's key; "
                f"use letters, digits, '_', '-' and '/', at most {KEY_LENGTH}"
            )
        start = len(self._buffer)
        self._add_member(f"{sample.key}.cls", str(sample.label).encode())
        data_start = self._add_member(f"{sample.key}.{sample.extension}", sample.image)
        # Places count from the shard's start, of which a part may have been taken.
        self.rows.append(
            {
                "shard": self.number,
                "offset": self._taken + start,
                "length": len(self._buffer) - start,
                "data_offset": self._taken + data_start,
                "data_length": len(sample.image),
                "label": sample.label,
                "key": sample.key,
                "width": sample.width,
                "height": sample.height,
                "crc32": crc32(memoryview(self._buffer)[start:]),
            }
        )

    @property
    def waiting(self) -> int:
        """The number of bytes that were not taken yet."""
        return len(self._buffer)

    def take(self) -> bytearray:
        """Return the shard's bytes since the last call, which end with a sample."""
        taken = self._buffer
        self._buffer = bytearray()
        self._taken += len(taken)
        return taken

    def finish(self) -> bytearray:
        """Return the last of the shard's bytes, with the two zero blocks that end a tar.

        Nothing can be added after that.
        """
        self._buffer += bytes(END_BYTES)
        return self.take()

    def _add_member(self, name: str, data: bytes) -> int:
        """Add a member, and return where its data starts in the buffer."""
        self._buffer += _ustar_header(name.encode(), len(data))
        data_start = len(self._buffer)
        self._buffer += data
        self._buffer += bytes(-len(data) % TAR_BLOCK)
        return data_start


# tarfile's own header of a file of mode 644, without time, owner or name of this machine. The other
# fields are filled in below.
TEMPLATE = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)


def _ustar_header(name: bytes, size: int) -> bytes:
    """Return the header that tarfile would write (POSIX.1-2001 ustar), ten times as fast.

    It is a template with name, size and checksum put in.
    """
    assert len(name) <= 100 and size < 8 << 30, "the fields of a plain ustar header"
    header = bytearray(TEMPLATE)
    header[: len(name)] = name
    header[124:135] = b"%011o" % size
    # The checksum is taken with its own field as spaces.
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def record_bytes(image_bytes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the bytes of samples in a shard, int64 [n]: headers, label and padded image.

    They are two blocks of headers, one of the label, and those of the image.

    Args:
        image_bytes: The sizes of their encoded images, int64 [n].
    """
    return 3 * TAR_BLOCK + image_bytes + -image_bytes % TAR_BLOCK
