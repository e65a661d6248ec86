"""A store in a local directory."""

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from wds_train.errors import AccessDenied, Conflict, NotFound, StoreError
from wds_train.storage.base import Body, Entry, check_key, read_file, too_short

# The beginning of the names of files that are being written.
UNFINISHED = ".tmp-"


class LocalStore:
    """A store whose objects are the files below a directory. Its methods are those of `Store`.

    A tag is the sha256 of the object.

    Args:
        root: The directory. It is made when something is written.
    """

    # There are no signed addresses here.
    fallbacks = 0

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.url = str(self.root)

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        with self._translate_errors(key), _open(self._path(key)) as file:
            file.seek(start)
            data = file.read(length)
        # Without a length, a read from within the object returns one byte at least.
        least = length
        if least is None:
            least = min(start, 1)
        if len(data) < least:
            raise too_short(f"{self.url}/{key}", start, length)
        return data

    def read_into(self, key: str, start: int, target: memoryview) -> None:
        with self._translate_errors(key), _open(self._path(key)) as file:
            file.seek(start)
            if file.readinto(target) < len(target):
                raise too_short(f"{self.url}/{key}", start, len(target))

    def read_tagged(self, key: str) -> tuple[bytes, str]:
        data = self.read(key)
        return data, hashlib.sha256(data).hexdigest()

    def write(
        self, key: str, body: Body, *, if_absent: bool = False, if_match: str | None = None
    ) -> str:
        tag = hashlib.sha256(body).hexdigest()
        path = self._path(key)
        with self._translate_errors(key), _lock(path.with_name(UNFINISHED + path.name)) as file:
            # Nobody else writes here now: what the condition finds stays true until the rename.
            found = None
            if if_absent or if_match:
                found = self._find_tag(key)
            exists = if_absent and found is not None
            differs = if_match and found != if_match
            if not exists and not differs:
                _replace(path, file, [body])
            elif found != tag:
                raise Conflict(f"{self.url}/{key} was written by another writer")
        return tag

    def write_pieces(self, key: str, pieces: Iterator[Body]) -> str:
        digest = hashlib.sha256()
        path = self._path(key)

        def hashed() -> Iterator[Body]:
            for piece in pieces:
                digest.update(piece)
                yield piece

        with self._translate_errors(key), _lock(path.with_name(UNFINISHED + path.name)) as file:
            _replace(path, file, hashed())
        return digest.hexdigest()

    def upload(self, key: str, path: Path) -> None:
        self.write(key, read_file(path))

    def head(self, key: str) -> tuple[int, str]:
        with self._translate_errors(key), _open(self._path(key)) as file:
            return os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()

    def reconnect(self) -> None:
        pass

    def list(self, prefix: str = "", *, flat: bool = False) -> Iterator[Entry]:
        folder, _, start = prefix.rpartition("/")
        entries: list[Entry] = []
        with self._translate_errors(prefix):
            for top in (self.root / folder).glob("*"):
                if not top.name.startswith(start):
                    continue
                entries += _make_entries(self.root, top, folders=flat)
                if not flat:
                    for path in top.rglob("*"):
                        entries += _make_entries(self.root, path)
            yield from sorted(entries)

    def delete(self, key: str) -> None:
        with self._translate_errors(key), contextlib.suppress(NotADirectoryError):
            self._path(key).unlink(missing_ok=True)

    def abort_uploads(self, prefix: str) -> None:
        folder, _, start = prefix.rpartition("/")
        for path in (self.root / folder).rglob(f"{UNFINISHED}{start}*"):
            # This waits for a writer that lives, and removes what a killed one left.
            with _lock(path):
                pass

    def _path(self, key: str) -> Path:
        return self.root / check_key(key, self.url)

    def _find_tag(self, key: str) -> str | None:
        try:
            return self.head(key)[1]
        except NotFound:
            return None

    @contextlib.contextmanager
    def _translate_errors(self, key: str) -> Iterator[None]:
        """Raise errors of the operating system as our own, with a remedy."""
        try:
            yield
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise NotFound(f"{self.url}/{key} does not exist") from error
        except PermissionError as error:
            where = error.filename or self.url
            raise AccessDenied(f"no permission for {where}; check its owner and mode") from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StoreError(
                    f"no space left on the disk of {self.url} while writing {key}; free some and "
                    "run again"
                ) from error
            raise StoreError(f"{self.url}/{key}: {error}") from error


def _open(path: Path) -> io.BufferedReader:
    mode = path.stat().st_mode
    # Opening a FIFO would wait for ever.
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise StoreError(f"{path} is no plain file; remove it")
    return path.open("rb")


def _make_entries(root: Path, path: Path, *, folders: bool = False) -> Iterator[Entry]:
    """Yield the entry of `path`, unless it is no object, or was deleted since it was listed."""
    key = path.relative_to(root).as_posix()
    with contextlib.suppress(FileNotFoundError):
        if path.is_file() and not path.name.startswith(UNFINISHED):
            yield Entry(key, path.stat().st_size, path.stat().st_mtime)
        elif folders and path.is_dir():
            yield Entry(f"{key}/")


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[BinaryIO]:
    """Yield the empty file `path`, locked for this writer, and remove what is left of it.

    A kill releases the lock. The next writer of the same key takes over the file that it leaves.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileNotFoundError, FileExistsError, NotADirectoryError) as error:
        raise StoreError(
            f"no folder can be made at {path.parent} ({error.strerror}); choose another place"
        ) from error
    while True:
        with path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # The writer before us may have renamed this very file meanwhile.
            if not _is_at(path, file):
                continue
            file.truncate(0)
            try:
                yield file
            finally:
                # If not, it was renamed, or it is the next writer's by now.
                if _is_at(path, file):
                    path.unlink()
            return


def _is_at(path: Path, file: BinaryIO) -> bool:
    """Return True if `file` is the one at `path`."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _replace(path: Path, file: BinaryIO, pieces: Iterable[Body]) -> None:
    """Write `pieces` into `file`, and rename that to `path`."""
    file.writelines(pieces)
    file.flush()
    # Before the rename, or a power cut leaves `path` empty.
    os.fsync(file.fileno())
    Path(file.name).replace(path)
    # Or a power cut undoes the rename, which a manifest may already rely on.
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
