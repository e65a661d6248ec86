"""The members of tars, from their headers alone: plain files and nothing else, whatever the tar claims."""

import re
import tarfile
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from wds_train.errors import DataError

TAR_BLOCK = 512
PLAIN_STEMS = {"image", "img", "label", "cls", "class", "target", "meta", "metadata"}
# Words that name one of a sample's members (7.seg.png beside 7.jpg) and so are no part of its key.
FIELD_WORDS = PLAIN_STEMS | {
    *("jpeg", "jpg", "png", "webp"),  # 7.jpg.json
    *("alpha", "audio", "bbox", "bboxes", "boxes", "caption", "captions", "clip", "depth", "emb", "embedding"),
    *("feature", "features", "input", "keypoints", "latent", "mask", "masks", "original", "output", "rgb"),
    *("seg", "segmentation", "text", "thumb", "thumbnail", "video"),
}
COMPRESSED = {"bz2", "gz", "lz4", "xz", "zst"}  # behind another extension: 7.json.gz
EXTENSION = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


def padded(size: int) -> int:
    return size + -size % TAR_BLOCK


class Member(NamedTuple):
    """A member of a tar. `offset` is where its first header starts, `end` where its padding ends. `kind` is `file`,
    `directory`, or what else it is: no reader of ours acts on that.
    """

    name: str
    kind: str
    offset: int
    data_offset: int
    size: int

    @property
    def end(self) -> int:
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

    Words that name one of the `fields` go with the extension: cat.0.seg.png is the seg.png of cat.0. Where there is one
    dot, or no extension behind the last one, this is `key_and_extension`.
    """
    folder, slash, base = name.rpartition("/")
    parts = base.split(".")
    if len(parts) < 3 or not EXTENSION.fullmatch(parts[-1]):
        return key_and_extension(name)
    first = len(parts) - 1
    if parts[first].lower() in COMPRESSED and EXTENSION.fullmatch(parts[first - 1]):
        first -= 1
    while first > 1 and parts[first - 1].lower() in fields:
        first -= 1
    stem, extension = ".".join(parts[:first]), ".".join(parts[first:]).lower()
    if folder and stem.lower() in PLAIN_STEMS:
        return folder, extension
    return folder + slash + stem, extension


def extension_of(name: str, key: str) -> str | None:
    """What `name` is called within the sample `key`, whichever way the two were split; None where it is not its member."""
    if name.startswith(f"{key}."):
        return name[len(key) + 1 :].lower()
    own, extension = key_and_extension(name)
    return extension if own == key else None


KINDS = {
    tarfile.REGTYPE: "file",
    tarfile.AREGTYPE: "file",
    tarfile.CONTTYPE: "file",
    tarfile.DIRTYPE: "directory",
    tarfile.SYMTYPE: "symbolic link",
    tarfile.LNKTYPE: "hard link",
    tarfile.GNUTYPE_SPARSE: "sparse file",
}
EXTENDED = {
    tarfile.XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
}
MAX_EXTENDED = 1 << 20


def members(read: Callable[[int, int], bytes], start: int, end: int) -> Iterator[Member]:
    """The members of the tar that lies at [start, end) of what `read(offset, length)` reads, from the headers alone.

    ustar, GNU and pax names and sizes (POSIX.1-2001 pax; GNU tar manual, "Basic Tar Format"). `DataError` for what is no
    tar or ends too early: a cut tar otherwise reads as a shorter one.
    """
    at = start
    while True:
        member, last = _member_at(read, at, end)
        if member is None:
            if any(read(last, min(end - last, 1 << 16))):
                raise DataError(f"more follows the end of the archive at byte {last}; is it two tars in one?")
            return
        yield member
        at = last


def _member_at(read: Callable[[int, int], bytes], offset: int, end: int) -> tuple[Member | None, int]:
    """The member whose headers start at `offset`, None at the archive's end; and where the next one starts."""
    at, given = offset, dict[str, str]()
    while True:
        info = _header(read, at, end)
        if info is None:
            return None, at + TAR_BLOCK
        data = at + TAR_BLOCK
        if info.type not in EXTENDED:
            break
        if not 0 <= info.size <= MAX_EXTENDED:  # a negative one would lead back, and round in circles for ever
            raise DataError(f"the extended header at byte {at} claims {info.size} bytes")
        given |= _extended(info.type, read(data, info.size))
        at = data + padded(info.size)
    kind = (
        "sparse file" if any(name.startswith("GNU.sparse") for name in given) else KINDS.get(info.type, "special file")
    )
    size = info.size
    if (text := given.get("size")) is not None:
        if not re.fullmatch("[0-9]{1,18}", text):
            raise DataError(
                f"the extended header at byte {offset} gives the size {text[:40]!r}, which is no number of bytes"
            )
        size = int(text)
    size = size if kind in ("file", "sparse file") else 0
    member = Member(given.get("path", info.name), kind, offset, data, size)
    if size < 0 or member.end > end:
        raise DataError(f"it ends at byte {end}, in the middle of {member.name!r}")
    return member, member.end


def _header(read: Callable[[int, int], bytes], at: int, end: int) -> tarfile.TarInfo | None:
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


def _extended(kind: bytes, data: bytes) -> dict[str, str]:
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    if kind not in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
        return {}
    records, at = {}, 0
    while at < len(data) and (length := re.match(rb"(\d{1,7}) ", data[at:])) and int(length[1]) > len(length[0]):
        name, _, value = data[at + len(length[0]) : at + int(length[1]) - 1].partition(b"=")
        records[name.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        at += int(length[1])
    return records


def fields_of(record: memoryview, key: str) -> dict[str, bytes]:
    """The contents of the members of the sample `key`, by extension.

    Args:
        record: The bytes of that sample alone, from its first header to the padding of its last member.
        key: As the index has it. It says where each name is split: an index holds keys with dots, too.
    """

    def read(offset: int, length: int) -> bytes:
        return bytes(record[offset : offset + length]).ljust(length, b"\0")  # behind it, the zeros that end a tar

    fields = {}
    for member in members(read, 0, len(record) + 2 * TAR_BLOCK):
        extension = extension_of(member.name, key)
        if member.kind == "file" and extension is not None:
            fields[extension] = read(member.data_offset, member.size)
    return fields
