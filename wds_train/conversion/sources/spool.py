"""Keep images that come as a stream in a local file, so that they can be read in any order."""

import contextlib
import errno
import fcntl
import hashlib
import shutil
from pathlib import Path
from types import TracebackType
from typing import IO

from wds_train.errors import AccessDenied, StoreError, UsageError

# The file of all images in the folder of a spool.
FILE = "images"


class Spool:
    """A local folder of one conversion, made when it is first used, and removed after it.

    Args:
        parent: The folder of all spools.
        destination: The dataset's address; no two conversions to it may run at once.
        limit: The most that the images may take, bytes.
    """

    def __init__(self, parent: Path, destination: str, limit: int = 50 << 30) -> None:
        self.folder = parent.absolute() / hashlib.sha256(destination.encode()).hexdigest()[:16]
        self.limit = limit
        self.bytes = 0
        self._files = 0
        self._destination = destination
        self._lock: IO[str] | None = None
        self._file: IO[bytes] | None = None

    def __enter__(self) -> "Spool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Only what this conversion made: another one may hold the lock.
        if self._file is not None and self._lock is not None:
            with contextlib.suppress(OSError):  # a full disk again, at what was still to be written
                self._file.close()
            shutil.rmtree(self.folder, ignore_errors=True)
            self._lock.close()

    def append(self, data: bytes) -> tuple[str, int, int]:
        """Keep `data`, and return path, offset and length where it can be read after `flush`."""
        try:
            if self._file is None:
                self._file = self._open()
            file = self._file
            file.write(data)
        except OSError as error:
            raise self._translate(error) from error
        self.bytes += len(data)
        return file.name, file.tell() - len(data), len(data)

    def file(self, name: str) -> Path:
        """Return the path for another file, which is removed with the spool.

        The caller writes the file, and adds its size to `bytes`.
        """
        if self._file is None:
            try:
                self._file = self._open()
            except OSError as error:
                raise self._translate(error) from error
        self._files += 1
        return self.folder / f"{self._files:06d}-{name}"

    def flush(self) -> None:
        """Write out all that was appended."""
        try:
            if self._file is not None:
                self._file.flush()
        except OSError as error:
            raise self._translate(error) from error

    def clear(self) -> None:
        """Drop all images that were appended so far."""
        if self._file is not None:
            # Keep the first byte; see `_open`.
            self._file.seek(1)
            self._file.truncate()
        self.bytes = 0

    def _open(self) -> IO[bytes]:
        """Make the folder, lock it, and return its file of images.

        Raises:
            UsageError: Another conversion to the same dataset holds the lock.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"another conversion to {self._destination} is running here; wait for it"
            ) from error
        file = (self.folder / FILE).open("wb")
        file.write(b"\0")  # so that no image lies at offset 0, which means a file of its own
        return file

    def _translate(self, error: OSError) -> Exception:
        """Return the error with its cause and remedy."""
        # Each has its own remedy.
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return StoreError(
                f"no space left on the disk of {self.folder}; "
                "free some, or set --spool to a larger disk"
            )
        if isinstance(error, PermissionError):
            return AccessDenied(
                f"no permission to write {self.folder}; set --spool to a folder of yours"
            )
        return StoreError(f"{self.folder}: {error.strerror}")
