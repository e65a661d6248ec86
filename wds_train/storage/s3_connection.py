"""Requests to the objects below a prefix of a bucket: repeated if that helps, with errors of ours.

`s3.py`, `s3_read.py` and `s3_write.py` make their requests here. `s3_session.py` signs and sends
them.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import botocore.exceptions as boto_errors
from urllib3.exceptions import HTTPError

from wds_train.environment import number_of
from wds_train.errors import AccessDenied, StoreError, Unavailable, UsageError
from wds_train.storage.base import check_key
from wds_train.storage.embedded import Endpoint
from wds_train.storage.ranges import NoAnswer
from wds_train.storage.retry import Retry
from wds_train.storage.s3_errors import (
    DENIED,
    NO_CREDENTIALS,
    REDIRECTS,
    REMEDIES,
    Denied,
    Refused,
    brief,
    code_and_status,
    describe_missing_credentials,
    translate,
)
from wds_train.storage.s3_session import Checksums, GetAnswer, S3Session

# For a server that has answered before; $WDS_S3_PATIENCE overrides it.
PATIENCE_SECONDS = 120.0
# For one that never has: the address may be wrong.
FIRST_SECONDS = 15.0

GET = "get_object"
CHECKSUM_HEADER = re.compile(r"(?i)x-amz-(sdk-)?checksum[a-z0-9-]*|x-amz-trailer")
CHECKSUM_REMEDY = (
    "set AWS_REQUEST_CHECKSUM_CALCULATION=when_required: what is written then goes with "
    "Content-MD5, which every S3 server knows"
)

# Errors of the network, which are worth another try.
BROKEN = (boto_errors.HTTPClientError, boto_errors.ConnectionError, HTTPError, NoAnswer)

T = TypeVar("T")


class Progress(Protocol):
    """The bytes of a body that several attempts bring together.

    Attributes:
        size: The bytes that have come.
        expected: The bytes that will have come at the end.
    """

    size: int
    expected: int


class S3Connection:
    """Requests to the objects below a prefix of a bucket.

    Args:
        bucket: The bucket's name.
        prefix: What the keys of all objects begin with, without a slash at the end; may be empty.
        endpoint: The embedded server; None takes endpoint and credentials from the usual AWS
            settings.
        checksum_calculation: boto3's setting of that name; None takes it from the AWS settings.

    Attributes:
        url: The address of the prefix.
        patience: The longest time in seconds for all attempts at one request.
        session: Signs and sends the requests.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str,
        endpoint: Endpoint | None,
        checksum_calculation: Checksums | None = None,
    ) -> None:
        self.bucket = bucket
        self.prefix = prefix
        self.endpoint = endpoint
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self.patience = number_of("WDS_S3_PATIENCE", PATIENCE_SECONDS)
        self.session = S3Session(bucket, self.url, endpoint, checksum_calculation)
        self._answered = False

    @property
    def server(self) -> str:
        """The server's name, for people."""
        return self.session.server

    @property
    def checksums(self) -> bool:
        """True if bodies go with a CRC-32: the default, unless the settings ask for the least."""
        config = self.session.client.meta.config
        return config.request_checksum_calculation != "when_required"  # type: ignore[attr-defined]

    def full_key(self, key: str) -> str:
        """Return the key in the bucket of the object `key` below the prefix."""
        if self.prefix:
            return f"{self.prefix}/{key}"
        return key

    def ask(self, verb: str, key: str, **details: Any) -> dict[str, Any]:
        """Ask boto3 until there is an answer, and return it.

        Args:
            verb: The method of boto3's client.
            key: The object below the prefix, or the part of a prefix, for messages.
            details: The arguments of the method, without the bucket.

        Raises:
            StoreError: The server refuses the request, or did not answer within the patience for
                it.
        """
        check_key(key, self.url)
        answer = self.repeat(verb, key, lambda: self._send(verb, details))
        self._note_granted(verb)
        return answer

    def ask_once(self, verb: str, key: str, **details: Any) -> dict[str, Any]:
        """Ask boto3 once, and return the answer. Arguments and errors are as those of `ask`."""
        with self._translate_errors(key, verb):
            return self._send(verb, details)

    def head(self, key: str) -> tuple[int, str]:
        """Return the size of an object in bytes, and its ETag."""
        answer = self.ask("head_object", key, Key=self.full_key(key))
        return answer["ContentLength"], tag_in(self, answer)

    @contextlib.contextmanager
    def get(self, key: str, headers: dict[str, str]) -> Iterator[GetAnswer]:
        """Yield the answer to one GET, as `S3Session.get`. Call it inside `repeat`.

        Args:
            key: The object below the prefix.
            headers: `{"Range": "bytes=..."}`, or nothing for the whole object.
        """
        full_key = self.full_key(check_key(key, self.url))
        with self.session.get(full_key, headers) as answer:
            # The request was granted, even if its body breaks off.
            self._note_granted(GET)
            yield answer

    def repeat(
        self, verb: str, key: str, attempt: Callable[[], T], progress: Progress | None = None
    ) -> T:
        """Call `attempt` until the server answers, and return its result.

        Args:
            verb: The method of boto3's client that it calls.
            key: The object below the prefix, for messages.
            attempt: Makes the request.
            progress: What attempts bring together. A large body gets more time, and pauses are
                short again after an attempt that brought a part.

        Raises:
            StoreError: The server refuses the request, or did not answer within the patience for
                it.
        """
        # A server that never answered gets less time.
        patience = self.patience
        if not self._answered:
            patience = min(patience, FIRST_SECONDS)
        retry = Retry(patience)

        size_before = 0
        while True:
            generation = self.session.generation
            try:
                with self._translate_errors(key, verb):
                    return attempt()
            except Unavailable as error:
                expected = 0
                progressed = False
                if progress:
                    expected = progress.expected
                    progressed = progress.size > size_before
                    size_before = progress.size
                _pause(retry, error, expected, progressed)
                if isinstance(error, Denied):
                    self.session.renew(generation)

    def _send(self, verb: str, details: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = getattr(self.session.client, verb)(Bucket=self.bucket, **details)
        return answer

    def _note_granted(self, verb: str) -> None:
        """Note that a request of this kind was answered well."""
        self._answered = True
        self.session.granted.add(verb)

    @contextlib.contextmanager
    def _translate_errors(self, key: str, verb: str) -> Iterator[None]:
        """Raise errors of boto3 as our own.

        A denial by a store that was open before is `Denied`, which is worth another try with new
        credentials: for a matter of credentials, if any request was granted; for a plain 403, if
        one of this `verb` was. A right that was never there is refused at once.
        """
        name = f"{self.url}/{key}".rstrip("/")
        try:
            yield
        except boto_errors.ClientError as error:
            self._answered = True
            raise self._judge(error, name, verb) from error
        except NO_CREDENTIALS as error:
            message = describe_missing_credentials(name, error, brief(error))
            if self.session.granted:
                raise Denied(message) from error
            raise AccessDenied(message) from error
        except boto_errors.ParamValidationError as error:
            raise UsageError(f"{name} is not a usable S3 address: {brief(error)}") from error
        except boto_errors.InvalidRegionError as error:
            # botocore looked for the region that a redirect means, and found none.
            raise StoreError(f"{name}: {self.session.describe_redirect()}") from error
        except BROKEN as error:
            raise Unavailable(
                f"{name}: the S3 server does not answer ({brief(error)}); check the network and "
                "AWS_ENDPOINT_URL"
            ) from error
        except boto_errors.BotoCoreError as error:
            raise StoreError(f"{name}: {brief(error)}") from error

    def _judge(self, error: boto_errors.ClientError, name: str, verb: str) -> StoreError:
        """Return the error for an answer other than success."""
        found = translate(error, name)
        _, status = code_and_status(error)
        if status in REDIRECTS:
            return StoreError(f"{name}: {self.session.describe_redirect()}")
        if _may_be_mended(error, verb, self.session.granted):
            return Denied(str(found))
        header = CHECKSUM_HEADER.search(str(error))
        if isinstance(found, Refused) and self.checksums and header:
            return Refused(
                f"{found} This server does not take {header[0].lower()}: {CHECKSUM_REMEDY}"
            )
        # SeaweedFS says "internal error" when its disk is full.
        if isinstance(found, Unavailable) and self.endpoint and self.endpoint.is_full():
            return StoreError(
                f"no space left on the disk of {self.endpoint.root}, where the embedded S3 server "
                f"keeps {name}; free some and run again"
            )
        return found


def tag_in(s3: S3Connection, answer: dict[str, Any]) -> str:
    """Return the ETag of an answer.

    Raises:
        StoreError: There is none, and without it no write can be conditional.
    """
    tag = str(answer.get("ETag", ""))
    if not tag:
        raise StoreError(f"{s3.url}: {s3.server} tells no ETags; it cannot be used")
    return tag


def _pause(retry: Retry, error: Unavailable, expected: int, progressed: bool) -> None:
    """Wait before the next attempt.

    Raises:
        AccessDenied: The time for all attempts is up, and the last was denied.
        Unavailable: The time for all attempts is up.
    """
    try:
        retry.pause(error, expected, progressed)
    except Unavailable as last:
        if isinstance(error, Denied):
            raise AccessDenied(str(last)) from error
        raise


def _may_be_mended(error: boto_errors.ClientError, verb: str, granted: set[str]) -> bool:
    """Return True if new credentials may mend a denial, since old ones were granted as much."""
    code, status = code_and_status(error)
    if code in REMEDIES:
        return bool(granted)
    # The answer to a HEAD has no body: that to an expired token is a bare 400.
    denied = status in DENIED or (verb == "head_object" and status == 400)
    return denied and verb in granted
