"""Addresses and names of datasets, runs and buckets, as people write them.

Nothing here asks or starts a server.
"""

import contextlib
import functools
import os
import re
import sys
from pathlib import Path

from wds_train.errors import UsageError
from wds_train.files import home

EMBEDDED_BUCKET = "embedded"
# A name of a dataset or a run; it is a folder's, too, so no slash and no leading dot.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}")
# A path begins so; without, a name and a path could not be told apart.
LOCAL = ("/", "./", "../", "~/")
# The usual mistakes, and what was meant.
SLIPS = (
    (re.compile(r"(?i:s3a?n?):/{0,2}(?P<place>[^/].*)"), "s3://{place}"),
    (
        re.compile(r"https?://(?P<bucket>[^./]+)\.s3[.-][^/]*/?(?P<key>[^?#]*).*"),
        "s3://{bucket}/{key}",
    ),
    (re.compile(r"https?://s3[.-][^/]*/(?P<place>[^?#]*).*"), "s3://{place}"),
    (re.compile(r"arn:aws[^:]*:s3:::(?P<place>.+)"), "s3://{place}"),
    (re.compile(r"(?P<place>[A-Za-z0-9][\w.-]*/.*)"), "./{place}, or s3://{place}"),
    (re.compile(r"(?P<place>[^/:]+)"), "./{place}"),
)


def resolve_address(text: str, kind: str, bucket: str | None = None) -> str:
    """Return the address of a dataset or a run.

    Args:
        text: Its address, or its name: BUCKET/`kind`/NAME is the address of a name.
        kind: "datasets" or "runs".
        bucket: BUCKET. Default: $WDS_BUCKET, or else the embedded server's bucket.

    Raises:
        UsageError: `text` is neither. The message says what was probably meant.
    """
    if NAME.fullmatch(text):
        return f"{resolve_folder(kind, bucket)}/{text}"
    return check_address(text, "the address")


def resolve_folder(kind: str, bucket: str | None = None) -> str:
    """Return the address below which all datasets, or all runs, are that have a name."""
    base = bucket or os.environ.get("WDS_BUCKET") or f"s3://{EMBEDDED_BUCKET}"
    flag = "WDS_BUCKET"
    if bucket:
        flag = "--bucket"
    if NAME.fullmatch(base):
        raise UsageError(
            f"{flag} {base!r} names no place; write s3://{base}, or ./{base} for a local folder"
        )
    return f"{check_address(base, flag).rstrip('/')}/{kind}"


def make_name(text: str) -> str:
    """Return a name that is as close to `text` as possible."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:60].strip("-._") or "dataset"


def shorten(address: str) -> str:
    """Return the name that means `address` in this environment, or else the address."""
    place, _, name = address.rpartition("/")
    kind = place.rpartition("/")[2]
    with contextlib.suppress(UsageError):
        if NAME.fullmatch(name) and resolve_address(name, kind) == address:
            return name
    return address


def announce_embedded(address: str, text: str) -> None:
    """Print a notice, once, if the embedded server is used because no bucket is set.

    Args:
        address: The address that `text` resolved to.
        text: What the person wrote.
    """
    if is_embedded(address) and not is_embedded(text):
        _print_embedded_notice()


def announce_name(address: str, text: str) -> None:
    """Print a notice if the name `text` is also the name of a folder here.

    Args:
        address: The address that `text` resolved to.
        text: What the person wrote.
    """
    # A text all along: a path would lose the leading "./".
    if NAME.fullmatch(text) and os.path.isdir(text):  # noqa: PTH112
        print(
            f"{text} is the one at {address}, not the folder ./{text} (for that, write ./{text})",
            file=sys.stderr,
        )


@functools.cache
def _print_embedded_notice() -> None:
    hint = "to use your own, add BUCKET=s3://... to make, or --bucket s3://..., or set WDS_BUCKET"
    data = str(home())
    if home() == Path.cwd() / ".wds":
        data = ".wds/"
    print(
        f"no bucket is set: using the embedded S3 server, data under {data} ({hint})",
        file=sys.stderr,
    )


def is_embedded(address: str) -> bool:
    """Return True if `address` is on the embedded server."""
    bucket = f"s3://{EMBEDDED_BUCKET}"
    return address == bucket or address.startswith(f"{bucket}/")


def check_address(text: str, what: str) -> str:
    """Return `text` if it is an address, with `~` replaced.

    Args:
        text: `s3://BUCKET[/PREFIX]`, or a path that begins with `/`, `./`, `../` or `~/`.
        what: What `text` is, for the message: a flag, or "the address".

    Raises:
        UsageError: It is neither. The message says what was probably meant.
    """
    if not text.isprintable():
        raise UsageError(
            f"{what} {text!r} holds characters that cannot be printed; write it without"
        )
    if text.startswith("s3://"):
        _check_s3_address(text, what)
        return text
    if text.startswith(LOCAL) or text in (".", "..", "~"):
        return os.path.expanduser(text)  # noqa: PTH111

    # It is neither: say what was probably meant.
    remedy = "it is s3://BUCKET/PREFIX, a path like /x or ./x, or a name"
    for slip, form in SLIPS:
        found = slip.fullmatch(text.strip())
        if found:
            remedy = f"write {form.format(**found.groupdict())}"
            break
    raise UsageError(f"{what} {text!r} is neither an address nor a name; {remedy}")


def _check_s3_address(text: str, what: str) -> None:
    bucket, _, prefix = text.removeprefix("s3://").partition("/")
    if not BUCKET.fullmatch(bucket):
        raise UsageError(f"{text!r} names no bucket; write s3://BUCKET/PREFIX")
    for mark in "?#":
        if mark in prefix:
            raise UsageError(
                f"{what} {text!r} holds {mark!r}, with which a URL's path ends; use a prefix "
                "without it"
            )
    # HTTP libraries resolve such parts, and would ask for another key.
    parts = prefix.rstrip("/").split("/")
    if parts != [""] and {"", ".", ".."} & set(parts):
        raise UsageError(
            f"{what} {text!r} has an empty, '.' or '..' part; write the prefix without"
        )
