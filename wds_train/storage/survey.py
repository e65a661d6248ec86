"""A survey of a store: try all that wds-train needs, and say what does not work.

`wds-train check-store` prints it. LOOKS has one function for each line.
"""

import contextlib
import secrets
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, Literal

from wds_train.errors import Conflict, NotFound, StoreError
from wds_train.storage.base import PART_BYTES, Store
from wds_train.storage.proof import COULD_HAPPEN, WRONG_TAG
from wds_train.storage.s3 import S3Store
from wds_train.storage.s3_errors import OutOfRange

State = Literal["ok", "note", "fail"]
# The least that S3 takes as a part, but for the last one.
SMALLEST_PART = 5 << 20
BODY = bytes(range(256))
# With what is not answered: some servers fail for ever at what they do not know.
PATIENCE_SECONDS = 5.0
# Of small requests, for the latency.
ROUNDS = 8
# S3 refuses requests at 900.
SKEW_SECONDS = 300.0
# A lease is renewed every 20 s.
MANIFESTS_A_DAY = 4320


@dataclass(frozen=True)
class Finding:
    """The result of one look at a server.

    Attributes:
        name: What was looked at.
        state: "note" says that it lacks something that is not needed, or that a person should know
            something. "fail" says that it cannot be used.
        text: The result in words.
    """

    name: str
    state: State
    text: str


Found = tuple[State, str]


def check(store: Store) -> Iterator[Finding]:
    """Try all that is needed, and yield what was found.

    It writes objects of a random name below the store's prefix, and removes them at the end.

    Args:
        store: The store. Its patience stays shortened.
    """
    if not isinstance(store, S3Store):
        yield Finding(
            "store", "ok", f"{store.url} is a local directory, whose writers a lock keeps apart"
        )
        return
    at = _Place(store)
    at.s3.patience = min(at.s3.patience, PATIENCE_SECONDS)
    try:
        for name, look in LOOKS:
            try:
                finding = Finding(name, *look(at))
            except StoreError as error:
                finding = Finding(name, "fail", str(error))
            yield finding
            # All others would fail for the same reason.
            if finding.state == "fail" and name in ("write", "read"):
                return
    finally:
        at.clean()


class _Place:
    """A folder of a random name below the store's prefix, where a look may write.

    Attributes:
        key: An object in it.
        tag: The object's tag, once it is written.
    """

    def __init__(self, store: S3Store) -> None:
        self.store = store
        self.s3 = store.connection
        self.folder = f"probe-{secrets.token_hex(8)}/"
        self.key = f"{self.folder}a"
        self.tag = ""

    def ask(self, verb: str, key: str, **details: Any) -> dict[str, Any]:
        return self.s3.ask(verb, key, Key=self.s3.full_key(key), **details)

    def begin_upload(self, key: str, sizes: list[int]) -> dict[str, Any]:
        """Upload parts of `sizes` bytes, and return the arguments that complete the upload."""
        upload = self.ask("create_multipart_upload", key)["UploadId"]
        parts = []
        for number, size in enumerate(sizes, 1):
            answer = self.ask(
                "upload_part", key, Body=bytes(size), UploadId=upload, PartNumber=number
            )
            part: dict[str, Any] = {"PartNumber": number}
            for name in ("ETag", "ChecksumCRC32"):
                if name in answer:
                    part[name] = answer[name]
            parts.append(part)
        return {"UploadId": upload, "MultipartUpload": {"Parts": parts}}

    def abort(self, key: str, upload: str) -> None:
        with contextlib.suppress(StoreError):
            self.ask("abort_multipart_upload", key, UploadId=upload)

    def clean(self) -> None:
        """Remove what was written. `_delete` says before if that is not possible."""
        with contextlib.suppress(StoreError):
            for entry in list(self.store.list(self.folder)):
                self.store.delete(entry.key)

    def list_keys(self) -> list[str]:
        """Return the keys of the objects in the folder."""
        return [entry.key for entry in self.store.list(self.folder)]


def _write(at: _Place) -> Found:
    at.tag = at.store.write(at.key, BODY, if_absent=True)
    return "ok", f"{at.s3.server} takes objects"


def _read(at: _Place) -> Found:
    if at.store.read_tagged(at.key) != (BODY, at.tag):
        return "fail", "what was written is not what is read"
    with contextlib.suppress(NotFound):
        at.store.read(f"{at.folder}none")
        return "fail", "an object that is not there is read all the same"
    return "ok", "what was written is read, with its ETag; what is missing is missing"


def _list(at: _Place) -> Found:
    other = f"{at.folder}b"
    at.store.write(other, b"1")
    found = at.list_keys()
    if found != [at.key, other]:
        return "fail", f"two objects are listed as {found}"
    # More than 1,000 objects come in pages; pages of one show whether the server makes any.
    try:
        page = at.s3.ask("list_objects_v2", "", Prefix=at.s3.full_key(at.folder), MaxKeys=1)
    except StoreError as error:
        return "note", f"complete; in pages not, which more than 1,000 objects need: {error}"
    if len(page.get("Contents", ())) == 1 and page.get("NextContinuationToken"):
        return "ok", "complete, in pages"
    return "ok", "complete, whatever size of page is asked for"


def _delete(at: _Place) -> Found:
    try:
        at.store.delete(f"{at.folder}b")
    except StoreError as error:
        return "note", f"what is left over stays there: {error}"
    return "ok", "objects can be removed"


def _odd_keys(at: _Place) -> Found:
    key = f"{at.folder}c +é%2B"
    try:
        at.store.write(key, BODY)
        is_read = at.store.read(key, 10, 100) == BODY[10:110]
        listed = at.list_keys()
    except StoreError as error:
        return "note", f"only plain letters in prefixes and the names of tars: {error}"
    if is_read and key in listed:
        return "ok", "a blank, +, an accent and %2B"
    return "note", "are listed as others; use plain letters alone"


def _put_refused(at: _Place, **condition: str) -> Found:
    return _refused(at, "put_object", {"Body": b"2"}, **condition)


def _refused(at: _Place, verb: str, details: dict[str, Any], **condition: str) -> Found:
    """Write the object that is there, under a condition that does not hold."""
    try:
        at.ask(verb, at.key, **details, **condition)
    except (Conflict, NotFound):
        return "ok", "a wrong one is refused, as it must be"
    # The looks after this one need the object as it was.
    at.tag = at.store.write(at.key, BODY)
    return "fail", f"ignored, so that {COULD_HAPPEN}"


def _swap(at: _Place) -> Found:
    try:
        at.tag = at.store.write(at.key, BODY[::-1], if_match=at.tag)
    except Conflict as error:
        flaw = f"refused by the right ETag, too, so that no run could be committed to: {error}"
        return "fail", flaw
    return "ok", "done, by the right ETag"


def _upload_refused(at: _Place, **condition: str) -> Found:
    upload = at.begin_upload(at.key, [1])
    try:
        state, text = _refused(at, "complete_multipart_upload", upload, **condition)
    finally:
        at.abort(at.key, upload["UploadId"])
    # The keys of checkpoints carry the fence: no two writers have the same one.
    if state == "fail":
        return "note", "ignored; harmless, since manifests go up in one piece"
    return state, text


def _ranges(at: _Place) -> Found:
    # Inside the object, and beyond its end.
    body = at.store.read(at.key)
    if at.store.read(at.key, 10, 100) != body[10:110]:
        return "fail", "other bytes came than were asked for"
    try:
        at.ask("get_object", at.key, Range="bytes=1000-1099")
    except OutOfRange:
        beyond = "past the end 416"
    except StoreError as error:
        return "note", f"right; past the end: {error}"
    else:
        beyond = "past the end other bytes"
    # The loader reads by signed addresses, and asks boto3 for what they do not bring.
    if at.store.fallbacks:
        text = (
            f"right, {beyond}; signed addresses are not answered, so that each range takes two "
            "requests"
        )
        return "note", text
    return "ok", f"right, {beyond}"


def _get_if_match(at: _Place) -> Found:
    try:
        at.ask("get_object", at.key, IfMatch=WRONG_TAG)
    except Conflict:
        return "ok", "a wrong one is refused"
    except StoreError as error:
        return "note", f"not known; nothing needs it: {error}"
    return "note", "ignored; nothing needs it: the ETags of the answers are compared"


def _parts(at: _Place, *sizes: int) -> Found:
    key = f"{at.folder}parts"
    upload = at.begin_upload(key, [*sizes, 1])
    try:
        at.ask("complete_multipart_upload", key, **upload)
    except StoreError:
        at.abort(key, upload["UploadId"])
        raise
    size, _ = at.s3.head(key)
    if size != sum(sizes) + 1:
        return "fail", f"{sum(sizes) + 1} bytes were sent, and {size} stored"
    return "ok", "taken"


def _unequal_parts(at: _Place) -> Found:
    try:
        return _parts(at, SMALLEST_PART + 1, SMALLEST_PART)
    except StoreError:
        return "note", "refused; all that goes up is of parts of one length"


def _checksums(at: _Place) -> Found:
    if not at.s3.checksums:
        return "note", "none, by AWS_REQUEST_CHECKSUM_CALCULATION; bodies go with Content-MD5"
    try:
        # Not by `ask`, which would send again what was damaged on its way.
        at.s3.ask_once(
            "put_object",
            "damaged",
            Key=at.s3.full_key(f"{at.folder}damaged"),
            Body=BODY,
            ChecksumCRC32="AAAAAA==",
        )
    except StoreError:
        return "ok", "a body that does not fit its CRC-32 is refused"
    return "note", "taken, but not compared: what is damaged on its way is found when it is read"


def _list_uploads(at: _Place) -> Found:
    try:
        at.store.abort_uploads(at.folder)
    except StoreError as error:
        return "note", f"what killed uploads leave is for a lifecycle rule to remove: {error}"
    return "ok", "what killed uploads leave is found and removed"


def _clock(at: _Place) -> Found:
    answer = at.ask("head_object", at.key)
    return clock(str(answer["ResponseMetadata"]["HTTPHeaders"].get("date", "")))


def _versioning(at: _Place) -> Found:
    try:
        status = at.s3.ask("get_bucket_versioning", "")
        rules = at.s3.ask("get_bucket_lifecycle_configuration", "").get("Rules", [])
    except NotFound:
        # S3's answer if there are no rules.
        rules = []
    except StoreError:
        text = "not told; docs/stores.md says what the bucket's versioning and lifecycle should be"
        return "note", text
    return versioning(status, rules)


def _latency(at: _Place) -> Found:
    write_ms = _measure_median_ms(lambda: at.store.write(at.key, BODY))
    read_ms = _measure_median_ms(lambda: at.store.read(at.key))
    return "ok", f"{write_ms:.0f} ms a small write, {read_ms:.0f} ms a small read"


def _throughput(at: _Place) -> Found:
    key = f"{at.folder}large"
    body = secrets.token_bytes(2 * PART_BYTES)
    megabytes = len(body) / 1e6
    up = megabytes / _measure_seconds(lambda: at.store.write(key, body))
    down = megabytes / _measure_seconds(lambda: at.store.read(key, 0, len(body)))
    return "ok", f"{up:.0f} MB/s up, {down:.0f} MB/s down, of one object of 32 MiB"


# In this order: the looks use the object that the first one writes.
LOOKS: tuple[tuple[str, Callable[[_Place], Found]], ...] = (
    ("write", _write),
    ("read", _read),
    ("list", _list),
    ("delete", _delete),
    ("PUT If-None-Match", partial(_put_refused, IfNoneMatch="*")),
    ("PUT If-Match", partial(_put_refused, IfMatch=WRONG_TAG)),
    ("swap", _swap),
    ("upload If-None-Match", partial(_upload_refused, IfNoneMatch="*")),
    ("upload If-Match", partial(_upload_refused, IfMatch=WRONG_TAG)),
    ("ranges", _ranges),
    ("GET If-Match", _get_if_match),
    ("equal parts", lambda at: _parts(at, SMALLEST_PART, SMALLEST_PART)),
    ("unequal parts", _unequal_parts),
    ("checksums", _checksums),
    ("list uploads", _list_uploads),
    ("clock", _clock),
    ("versioning", _versioning),
    ("latency", _latency),
    ("throughput", _throughput),
    # The last: what refuses them may break the connection.
    ("odd keys", _odd_keys),
)


def clock(date: str) -> Found:
    """Compare this machine's clock with the server's.

    Args:
        date: The header Date of an answer.
    """
    try:
        skew = time.time() - parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError):
        return "note", "the server tells no time"
    if abs(skew) > SKEW_SECONDS:
        flaw = f"this machine's clock is {skew:+.0f} s off"
        return "fail", f"{flaw}; S3 refuses requests from 900 s on: set it"
    return "ok", f"{abs(skew):.0f} s apart"


def versioning(status: dict[str, Any], rules: list[dict[str, Any]]) -> Found:
    """Say whether the bucket keeps for ever what is replaced or removed.

    Args:
        status: The answer on the bucket's versioning.
        rules: The rules of its lifecycle.
    """
    # What the enabled rules do, all together.
    actions: set[str] = set()
    for rule in rules:
        if rule.get("Status") == "Enabled":
            actions |= rule.keys()

    wanted = []
    kept = "off"
    if status.get("Status") == "Enabled":
        kept = "on, and older versions expire"
        if "NoncurrentVersionExpiration" not in actions:
            kept = f"on: {MANIFESTS_A_DAY:,} manifests a day stay, and each old checkpoint"
            wanted.append("NoncurrentVersionExpiration of a day")
    if "AbortIncompleteMultipartUpload" not in actions:
        wanted.append("AbortIncompleteMultipartUpload of a day")
    if wanted:
        return "note", f"{kept}; set a lifecycle rule with {' and '.join(wanted)}"
    return "ok", kept


def _measure_median_ms(do: Callable[[], object]) -> float:
    """Return the median time of a call of `do` in ms, of ROUNDS calls."""
    seconds = [_measure_seconds(do) for _ in range(ROUNDS)]
    return statistics.median(seconds) * 1e3


def _measure_seconds(do: Callable[[], object]) -> float:
    began = time.perf_counter()
    do()
    return time.perf_counter() - began
