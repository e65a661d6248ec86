"""The members of tars, from their headers alone: only plain files, whatever the tar claims.

The conversion reads other people's tars by it, and `verify` reads ours.
"""

import re
import tarfile
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from wds_train.errors import DataError

TAR_BLOCK = 512
# The names of members whose key is their folder: 7/image.jpg.
PLAIN_STEMS = {"image", "img", "label", "cls", "class", "target", "meta", "metadata"}
# Words that name one of a sample's members (7.seg.png next to 7.jpg): they are no part of its key.
FIELD_WORDS = (
    PLAIN_STEMS
    | {"jpeg", "jpg", "png", "webp"}  # 7.jpg.json
    | {"alpha", "audio", "bbox", "bboxes", "boxes", "caption", "captions", "clip", "depth"}
    | {"emb", "embedding", "feature", "features", "input", "keypoints", "latent", "mask", "masks"}
    | {"original", "output", "rgb", "seg", "segmentation", "text", "thumb", "thumbnail", "video"}
)
# Behind another extension: 7.json.gz.
COMPRESSED = {"bz2", "gz", "lz4", "xz", "zst"}
EXTENSION = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


def padded(size: int) -> int:
    """Return `size` rounded up to whole blocks of a tar."""
    return size + -size % TAR_BLOCK


class Member(NamedTuple):
    """A member of a tar.

    Attributes:
        name: Its name.
        kind: "file", "directory", or what else it is. No reader of ours acts on the others.
        offset: Where its first header starts.
        data_offset: Where its data starts.
        size: The bytes of its data.
    """

    name: str
    kind: str
    offset: int
    data_offset: int
    size: int

    @property
    def end(self) -> int:
        """The offset at which its padding ends."""
        return self.data_offset + padded(self.size)


def key_and_extension(name: str) -> tuple[str, str]:
    """Split a member's name at the first dot of its base name, as webdataset does.

    7/image.jpg and 7/label.cls are members of one sample, too: their key is the folder.
    """
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    if folder and stem.lower() in PLAIN_STEMS:
        return folder, extension.lower()
    return folder + slash + stem, extension.lower()


def key_and_last_extension(name: str, fields: Collection[str] = FIELD_WORDS) -> tuple[str, str]:
    """Split a member's name before its last extension: cat.0.jpg is the jpg of cat.0.

    If it has one dot, or no extension behind the last one, this is `key_and_extension`.

    Args:
        name: The member's name.
        fields: Words that go with the extension: cat.0.seg.png is the seg.png of cat.0.
    """
    folder, slash, base = name.rpartition("/")
    parts = base.split(".")
    if len(parts) < 3 or not EXTENSION.fullmatch(parts[-1]):
        return key_and_extension(name)
    # The extension begins before the last dot, a compression's, and the words that go with it.
    first = len(parts) - 1
    if parts[first].lower() in COMPRESSED and EXTENSION.fullmatch(parts[first - 1]):
        first -= 1
    while first > 1 and parts[first - 1].lower() in fields:
        first -= 1
    stem = ".".join(parts[:first])
    extension = ".".join(parts[first:]).lower()
    if folder and stem.lower() in PLAIN_STEMS:
        return folder, extension
    return folder + slash + stem, extension


def extension_of(name: str, key: str) -> str | None:
    """Return the extension of a member in a sample; None if it is not its member.

    It works for keys of `key_and_extension` and of `key_and_last_extension`.

    Args:
        name: The member's name.
        key: The sample's key.
    """
    if name.startswith(f"{key}."):
        return name[len(key) + 1 :].lower()
    # The key may be the member's folder.
    own_key, extension = key_and_extension(name)
    if own_key != key:
        return None
    return extension


# The kinds of members, by the type flag of their header.
KINDS = {
    tarfile.REGTYPE: "file",
    tarfile.AREGTYPE: "file",
    tarfile.CONTTYPE: "file",
    tarfile.DIRTYPE: "directory",
    tarfile.SYMTYPE: "symbolic link",
    tarfile.LNKTYPE: "hard link",
    tarfile.GNUTYPE_SPARSE: "sparse file",
}
# Headers that say something of the member after them.
EXTENDED = {
    tarfile.XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
}
# Of such a header, in bytes: far more than names and sizes take.
MAX_EXTENDED = 1 << 20


def members(read: Callable[[int, int], bytes], start: int, end: int) -> Iterator[Member]:
    """Yield the members of a tar, from its headers alone.

    It reads ustar, GNU and pax names and sizes (POSIX.1-2001 pax; GNU tar manual, "Basic Tar
    Format").

    Args:
        read: `read(offset, length)` returns bytes of what the tar lies in.
        start: Where the tar starts.
        end: Where it ends.

    Raises:
        DataError: It is not a tar, or ends too early: a cut tar would otherwise read as a shorter
            one.
    """
    at = start
    while True:
        member, last = _member_at(read, at, end)
        if member is None:
            # A second tar behind this one would be lost in silence.
            if any(read(last, min(end - last, 1 << 16))):
                raise DataError(
                    f"more follows the end of the archive at byte {last}; is it two tars in one?"
                )
            return
        yield member
        at = last


def _member_at(
    read: Callable[[int, int], bytes], offset: int, end: int
) -> tuple[Member | None, int]:
    """Return the member whose headers start at `offset`, and where the next one starts.

    The member is None at the end of the archive.
    """
    # Extended headers come first, and give names and sizes that do not fit into the last one.
    at = offset
    given: dict[str, str] = {}
    while True:
        info = _header(read, at, end)
        if info is None:
            return None, at + TAR_BLOCK
        data = at + TAR_BLOCK
        if info.type not in EXTENDED:
            break
        # A negative size would lead back, and round in circles for ever.
        if not 0 <= info.size <= MAX_EXTENDED:
            raise DataError(f"the extended header at byte {at} claims {info.size} bytes")
        given |= _read_extended(info.type, read(data, info.size))
        at = data + padded(info.size)

    # The last header is the member's own.
    if any(name.startswith("GNU.sparse") for name in given):
        kind = "sparse file"
    else:
        kind = KINDS.get(info.type, "special file")
    size = info.size
    if "size" in given:
        size = _parse_size(given["size"], offset)
    # Whatever the header of a link or a folder claims, no data follows it.
    if kind not in ("file", "sparse file"):
        size = 0
    member = Member(given.get("path", info.name), kind, offset, data, size)
    if size < 0 or member.end > end:
        raise DataError(f"it ends at byte {end}, in the middle of {member.name!r}")
    return member, member.end


def _parse_size(text: str, offset: int) -> int:
    """Return the size that the extended header at byte `offset` gives, in bytes."""
    if not re.fullmatch("[0-9]{1,18}", text):
        raise DataError(
            f"the extended header at byte {offset} gives the size {text[:40]!r}, "
            "which is no number of bytes"
        )
    return int(text)


def _header(read: Callable[[int, int], bytes], at: int, end: int) -> tarfile.TarInfo | None:
    """Read the header at byte `at`; None for the zeros that end an archive."""
    if at + TAR_BLOCK > end:
        raise DataError(f"it ends at byte {end} without the blocks that end a tar: it was cut")
    block = read(at, TAR_BLOCK)
    if at == 0 and block[:2] == b"\x1f\x8b":
        raise DataError("it is compressed with gzip; unpack it to a plain tar first")
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
        return None
    except tarfile.HeaderError as error:
        raise DataError(f"the tar header at byte {at} is damaged ({error})") from error


def _read_extended(kind: bytes, data: bytes) -> dict[str, str]:
    """Return the records of an extended header, such as "path" and "size"."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    if kind not in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
        return {}
    # A record of pax is "LENGTH NAME=VALUE\n", where the length counts itself, too.
    records: dict[str, str] = {}
    at = 0
    while at < len(data):
        length = re.match(rb"(\d{1,7}) ", data[at:])
        if length is None or int(length[1]) <= len(length[0]):
            break
        stop = at + int(length[1])
        name, _, value = data[at + len(length[0]) : stop - 1].partition(b"=")
        records[name.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        at = stop
    return records


def fields_of(record: memoryview, key: str) -> dict[str, bytes]:
    """Return the contents of the members of a sample, by extension.

    Args:
        record: All bytes of the sample, from its first tar header to the last padding.
        key: Its key in the index, which says where each name is split: keys may have dots.
    """

    def read(offset: int, length: int) -> bytes:
        # Behind the record come the zeros that end a tar.
        return bytes(record[offset : offset + length]).ljust(length, b"\0")

    fields = {}
    for member in members(read, 0, len(record) + 2 * TAR_BLOCK):
        extension = extension_of(member.name, key)
        if member.kind == "file" and extension is not None:
            fields[extension] = read(member.data_offset, member.size)
    return fields
