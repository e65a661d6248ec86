"""What people write for a dataset, a run or a bucket, and the address that it means. No server is asked or started."""

import contextlib
import functools
import os
import re
import sys
from pathlib import Path

from wds_train.errors import UsageError
from wds_train.files import home

EMBEDDED_BUCKET = "embedded"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}")
LOCAL = ("/", "./", "../", "~/")
# (what is written, what was meant): the usual slips.
SLIPS = (
    (re.compile(r"(?i:s3a?n?):/{0,2}(?P<place>[^/].*)"), "s3://{place}"),
    (re.compile(r"https?://(?P<bucket>[^./]+)\.s3[.-][^/]*/?(?P<key>[^?#]*).*"), "s3://{bucket}/{key}"),
    (re.compile(r"https?://s3[.-][^/]*/(?P<place>[^?#]*).*"), "s3://{place}"),
    (re.compile(r"arn:aws[^:]*:s3:::(?P<place>.+)"), "s3://{place}"),
    (re.compile(r"(?P<place>[A-Za-z0-9][\w.-]*/.*)"), "./{place}, or s3://{place}"),
    (re.compile(r"(?P<place>[^/:]+)"), "./{place}"),
)


def located(text: str, kind: str, bucket: str | None = None) -> str:
    """The address of the dataset or run that a person calls `text`: an address as it is, a name as BUCKET/`kind`/NAME, where
    `kind` is "datasets" or "runs". BUCKET is `bucket`, else $WDS_BUCKET, else the embedded server's. `UsageError` for
    anything else, with what was probably meant.
    """
    return f"{all_of(kind, bucket)}/{text}" if NAME.fullmatch(text) else checked(text, "the address")


def all_of(kind: str, bucket: str | None = None) -> str:
    """The address below which all datasets, or runs, with names lie."""
    base = bucket or os.environ.get("WDS_BUCKET") or f"s3://{EMBEDDED_BUCKET}"
    flag = "--bucket" if bucket else "WDS_BUCKET"
    if NAME.fullmatch(base):
        raise UsageError(f"{flag} {base!r} names no place; write s3://{base}, or ./{base} for a local folder")
    return f"{checked(base, flag).rstrip('/')}/{kind}"


def name_from(text: str) -> str:
    """`text` as far as a name can hold it."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:60].strip("-._") or "dataset"


def brief(address: str) -> str:
    """The shortest that means `address` where this process runs: a name, if `located` finds it there, else all of it."""
    place, _, name = address.rpartition("/")
    kind = place.rpartition("/")[2]
    with contextlib.suppress(UsageError):
        if NAME.fullmatch(name) and located(name, kind) == address:
            return name
    return address


def announced(address: str, text: str) -> str:
    """`address`, which `text` was taken for; said in one line, once, where that is the embedded server for want of a bucket."""
    if is_embedded(address) and not is_embedded(text):
        _announce_embedded()
    return address


def not_here(address: str, text: str) -> str:
    """`address`, which the name `text` was taken for; said where a folder of this name is here, too."""
    if NAME.fullmatch(text) and os.path.isdir(text):  # noqa: PTH112 (as all here: text, not a path)
        print(f"{text} is the one at {address}, not the folder ./{text} (for that, write ./{text})", file=sys.stderr)
    return address


@functools.cache
def _announce_embedded() -> None:
    hint = "to use your own, add BUCKET=s3://... to make, or --bucket s3://..., or set WDS_BUCKET"
    data = ".wds/" if home() == Path.cwd() / ".wds" else home()
    print(f"no bucket is set: using the embedded S3 server, data under {data} ({hint})", file=sys.stderr)


def is_embedded(address: str) -> bool:
    """Whether `address` lies on the embedded server."""
    return address == f"s3://{EMBEDDED_BUCKET}" or address.startswith(f"s3://{EMBEDDED_BUCKET}/")


def checked(text: str, what: str) -> str:
    """`text`, if it is `s3://BUCKET[/PREFIX]` or a path that begins with `/`, `./`, `../` or `~/`; else `UsageError`."""
    if any(not letter.isprintable() for letter in text):
        raise UsageError(f"{what} {text!r} holds characters that cannot be printed; write it without")
    if text.startswith("s3://"):
        bucket, _, prefix = text.removeprefix("s3://").partition("/")
        if not BUCKET.fullmatch(bucket):
            raise UsageError(f"{text!r} names no bucket; write s3://BUCKET/PREFIX")
        if odd := next((mark for mark in "?#" if mark in prefix), None):
            raise UsageError(f"{what} {text!r} holds {odd!r}, with which a URL's path ends; use a prefix without it")
        if {"", ".", ".."} & {*prefix.rstrip("/").split("/")} and prefix.rstrip("/"):
            raise UsageError(f"{what} {text!r} has an empty, '.' or '..' part; write the prefix without")
        return text
    if text.startswith(LOCAL) or text in (".", "..", "~"):
        return os.path.expanduser(text)  # noqa: PTH111 (a path would lose the leading ./)
    meant = [form.format(**found.groupdict()) for slip, form in SLIPS if (found := slip.fullmatch(text.strip()))]
    remedy = f"write {meant[0]}" if meant else "it is s3://BUCKET/PREFIX, a path like /x or ./x, or a name"
    raise UsageError(f"{what} {text!r} is neither an address nor a name; {remedy}")
