"""The proof that a store refuses a conditional write whose condition does not hold.

Everything rests on that: a run has one owner, and a manifest one writer, because the server
refuses the second one. Some servers and gateways take such a write and ignore its condition, and
answer as if all were well.

A training, a conversion and `wds-train launch` call `prove` before they own anything.
"""

import secrets
from collections.abc import Callable

from wds_train.errors import Conflict, NotFound, StoreError
from wds_train.storage.base import Store
from wds_train.storage.s3 import S3Store
from wds_train.storage.s3_connection import CHECKSUM_REMEDY, S3Connection
from wds_train.storage.s3_errors import Refused
from wds_train.storage.s3_write import digest_of

# The folder of a run where an instance's role may write and delete.
PROBES = "metrics/"
# The beginning of the object's name; no fence of a run sorts after it.
PROBE = "probe-"
# Before a server is refused: another process may have removed the probe meanwhile.
LOOKS = 3
# At a write that must succeed and that the server refuses for the moment (409).
TRIES = 5
BODY = b"wds-train"
SWAPPED = b"wds-train, swapped"
WRONG_TAG = f'"{"0" * 32}"'
UNSAFE_HELP = (
    "use a store that ignores conditional writes: only where nothing else ever writes to it at the "
    "same time"
)
COULD_HAPPEN = (
    "two processes could own one run or dataset at a time, and overwrite each other's work "
    "unnoticed"
)
KNOWN = (
    "AWS S3, Cloudflare R2 and SeaweedFS (the embedded server) are known to refuse such writes; "
    "see docs/stores.md"
)
REMEDY = (
    "--unsafe-store uses it all the same, if you know that nothing else writes there at the same "
    "time"
)

Say = Callable[[str], None]


def prove(store: Store, folder: str, say: Say, *, unsafe: bool = False) -> bool:
    """Check that `store` refuses what it must, by a small object that is removed again.

    It takes eight small requests. A local directory needs none: a lock keeps its writers apart.

    One flaw is not the end, since another process may have removed the object. All later looks must
    then find none, or a server that honours only some of the conditions would pass by luck.

    Args:
        store: Where a run or a dataset is to be owned.
        folder: Where this process may write and delete; it ends in "/".
        say: Prints a line.
        unsafe: Say what is wrong, and return False, instead of raising.

    Returns:
        True if the store refuses what it must.

    Raises:
        StoreError: The server ignores a condition, or refuses a write whose condition holds.
    """
    if not isinstance(store, S3Store):
        return True
    flaw = _look(store.connection, folder, say)
    if flaw:
        flaw = _look_again(store.connection, folder, say)
    if not flaw:
        return True
    if not unsafe:
        # The sentence ends with what could happen, who is better, and the way around.
        raise StoreError(f"{store.url}: {flaw}, so that {COULD_HAPPEN}. {KNOWN}. {REMEDY}")
    say(f"{store.url}: {flaw}; --unsafe-store: nothing else may write there at the same time")
    return False


def is_probe(key: str) -> bool:
    """Return True if an object is a probe, which a killed process left.

    It may be removed at any time: a proof that misses its probe looks again with another one.
    """
    return key.rpartition("/")[2].startswith(PROBE)


def _look(s3: S3Connection, folder: str, say: Say) -> str:
    """Return the server's flaw, found by one probe that is removed again; "" if it has none."""
    key = f"{folder}{PROBE}{secrets.token_hex(8)}"
    try:
        return _find_flaw(s3, key)
    finally:
        _remove(s3, key, say)


def _look_again(s3: S3Connection, folder: str, say: Say) -> str:
    """Return the first flaw that one of the later looks finds; "" if none finds any."""
    first = ""
    for _ in range(LOOKS - 1):
        flaw = _look(s3, folder, say)
        first = first or flaw
    return first


def _find_flaw(s3: S3Connection, key: str) -> str:
    """Return the server's flaw as a sentence that begins with its name; "" if it has none."""
    if not _is_written(s3, key):
        return f"{s3.server} refuses every write with If-None-Match, even of a new object"
    if not _is_refused(s3, key, IfNoneMatch="*"):
        return _ignores_absence(s3)
    if not _is_refused(s3, key, IfMatch=WRONG_TAG):
        return _ignores_tag(s3)
    return _find_flaw_of_swaps(s3, key)


def _find_flaw_of_swaps(s3: S3Connection, key: str) -> str:
    """Return the server's flaw in swaps as a run does them: by the ETag, and by an older one."""
    tag = _tag_of(s3, key)
    if not tag:
        return f"{s3.server} does not show an object that was written"
    if not _is_swapped(s3, key, tag):
        return f"{s3.server} refuses a write with If-Match, even by the ETag that it told"
    if not _is_refused(s3, key, IfMatch=tag):
        return _ignores_tag(s3)
    if not _is_refused(s3, key, IfNoneMatch="*"):
        return _ignores_absence(s3)
    return ""


def _ignores_absence(s3: S3Connection) -> str:
    return f"{s3.server} ignores If-None-Match (it wrote over an object that was there)"


def _ignores_tag(s3: S3Connection) -> str:
    return f"{s3.server} ignores If-Match (it wrote over an object of another ETag)"


def _is_written(s3: S3Connection, key: str) -> bool:
    """Write the probe, and return True if it is there then.

    A repetition is refused if the answer to the first request was lost.
    """
    for _ in range(TRIES):
        try:
            _put(s3, key, BODY, IfNoneMatch="*")
        except Conflict:
            if _tag_of(s3, key):
                return True
        except Refused as error:
            raise _explain(s3, key, error) from error
        else:
            return True
    return False


def _is_swapped(s3: S3Connection, key: str, tag: str) -> bool:
    """Replace the probe of `tag`, and return True if it was replaced.

    A repetition is refused if the answer to the first request was lost.
    """
    for _ in range(TRIES):
        try:
            _put(s3, key, SWAPPED, IfMatch=tag)
        except (Conflict, NotFound):
            if _tag_of(s3, key) not in ("", tag):
                return True
        else:
            return True
    return False


def _put(s3: S3Connection, key: str, body: bytes, **condition: str) -> None:
    s3.ask("put_object", key, Key=s3.full_key(key), Body=body, **digest_of(s3, body), **condition)


def _explain(s3: S3Connection, key: str, error: Refused) -> StoreError:
    """Return which header the server does not take, found by omitting one after the other."""
    # First without the checksum, then without the condition, too.
    plain = S3Connection(s3.bucket, s3.prefix, s3.endpoint, "when_required")
    if s3.checksums and _is_taken(plain, key, IfNoneMatch="*"):
        return StoreError(
            f"{s3.server} does not take x-amz-checksum-crc32 ({error}): {CHECKSUM_REMEDY}"
        )
    if _is_taken(plain, key):
        return StoreError(
            f"{s3.server} does not take If-None-Match on a write ({error}), by which a run has "
            f"one owner. {KNOWN}"
        )
    return error


def _is_taken(s3: S3Connection, key: str, **condition: str) -> bool:
    try:
        _put(s3, key, BODY, **condition)
    except StoreError:
        return False
    return True


def _tag_of(s3: S3Connection, key: str) -> str:
    """Return the ETag of the probe; "" if it is not there."""
    try:
        return s3.head(key)[1]
    except NotFound:
        return ""


def _is_refused(s3: S3Connection, key: str, **condition: str) -> bool:
    try:
        _put(s3, key, BODY, **condition)
    except (Conflict, NotFound):
        return True
    return False


def _remove(s3: S3Connection, key: str, say: Say) -> None:
    """Remove the probe. A person who may not delete can still train."""
    try:
        s3.ask("delete_object", key, Key=s3.full_key(key))
    except StoreError as error:
        say(f"the object {key} stays behind: {error}")
