"""Requests to the objects below a prefix of a bucket: repeated where that helps, and their errors as our own."""

import contextlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import botocore.exceptions as boto_errors
from urllib3.exceptions import HTTPError

from wds_train.environment import number_of
from wds_train.errors import AccessDenied, StoreError, Unavailable, UsageError
from wds_train.storage.base import check_key
from wds_train.storage.embedded import Endpoint
from wds_train.storage.ranges import NoAnswer, Ranges
from wds_train.storage.retry import Retry
from wds_train.storage.s3_errors import (
    DENIED,
    NO_CREDENTIALS,
    REDIRECTS,
    REMEDIES,
    SIGNED_OUT,
    Denied,
    Refused,
    brief,
    code_and_status,
    describe_missing_credentials,
    translate,
)
from wds_train.storage.s3_session import Checksums, S3Session

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

PATIENCE_SECONDS = 120.0  # for a server that has answered before; $WDS_S3_PATIENCE overrides
FIRST_SECONDS = 15.0  # for one that never has: the address may be wrong

CHECKSUM_HEADER = re.compile(r"(?i)x-amz-(sdk-)?checksum[a-z0-9-]*|x-amz-trailer")
CHECKSUM_REMEDY = (
    "set AWS_REQUEST_CHECKSUM_CALCULATION=when_required: what is written then goes with Content-MD5, "
    "which every S3 server knows"
)

# Errors of the network, which are worth another try.
BROKEN = (boto_errors.HTTPClientError, boto_errors.ConnectionError, HTTPError, NoAnswer)


class S3Connection:
    """Requests to the objects below a prefix of a bucket.

    Args:
        bucket: The bucket's name.
        prefix: What the keys of all objects begin with, without a slash at the end; may be empty.
        endpoint: The embedded server; None takes endpoint and credentials from the usual AWS settings.
        checksum_calculation: boto3's setting of that name; None takes it from the AWS settings.
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
        self.answered = False
        self.session = S3Session(bucket, self.url, endpoint, checksum_calculation)
        # The kinds of requests that were granted before. Loader workers inherit them when they are forked.
        self._granted: set[str] = set()

    @property
    def client(self) -> "S3Client":
        return self.session.client

    @property
    def ranges(self) -> Ranges | None:
        return self.session.ranges

    @property
    def server(self) -> str:
        """The server's name, for people."""
        return self.session.server

    @property
    def checksums(self) -> bool:
        """Whether bodies go with a CRC-32, as all do unless the settings ask for no more than S3 requires."""
        config = self.client.meta.config
        return config.request_checksum_calculation != "when_required"  # type: ignore[attr-defined]

    def full_key(self, key: str) -> str:
        """Return the key in the bucket of the object `key` below the prefix."""
        return f"{self.prefix}/{key}" if self.prefix else key

    def ask(self, verb: str, key: str, **details: Any) -> dict[str, Any]:
        """Ask boto3 until there is an answer, and return it.

        Args:
            verb: The method of boto3's client.
            key: The object below the prefix, or the part of a prefix, for messages.
            details: The arguments of the method, without the bucket.

        Raises:
            StoreError: The server refuses the request, or did not answer within the patience for it.
        """
        check_key(key, self.url)
        retry = self.retry()
        while True:
            generation = self.session.generation
            try:
                with self.translated(key, verb):
                    answer: dict[str, Any] = getattr(self.client, verb)(
                        Bucket=self.bucket, **details
                    )
                self.note_granted(verb)
                return answer
            except Unavailable as error:
                self.pause(retry, error, generation)

    def head(self, key: str) -> tuple[int, str]:
        """Return the size of an object in bytes, and its ETag."""
        answer = self.ask("head_object", key, Key=self.full_key(key))
        return answer["ContentLength"], tag_in(self, answer)

    def retry(self) -> Retry:
        """Return the pauses between attempts, which are fewer at a server that never answered."""
        return Retry(self.patience if self.answered else min(self.patience, FIRST_SECONDS))

    def pause(
        self,
        retry: Retry,
        error: Unavailable,
        generation: int,
        size: int = 0,
        progressed: bool = False,
    ) -> None:
        """Wait before the next attempt, which is made with new credentials if those of the last were denied.

        Args:
            retry: The pauses of this request.
            error: What became of the last attempt.
            generation: `session.generation` before the last attempt.
            size: The bytes that are to be read.
            progressed: Whether the last attempt brought some of them.

        Raises:
            AccessDenied: The time for all attempts is up, and the last was denied.
            Unavailable: The time for all attempts is up.
        """
        try:
            retry.pause(error, size, progressed)
        except Unavailable as last:
            if isinstance(error, Denied):
                raise AccessDenied(str(last)) from error
            raise
        if isinstance(error, Denied):
            self.session.renew(generation)

    def note_granted(self, verb: str) -> None:
        """Note that a request of this kind was answered well."""
        self.answered = True
        self.session.was_open = True
        self._granted.add(verb)

    @contextlib.contextmanager
    def translated(self, key: str, verb: str = "") -> Iterator[None]:
        """Raise errors of boto3 as our own.

        A denial by a store that was open before is `Denied`, which is worth another try with new credentials:
        for a matter of credentials, if any request was granted; for a plain 403, if one of this `verb` was.
        A right that was never there is refused at once.
        """
        name = f"{self.url}/{key}".rstrip("/")
        try:
            yield
        except boto_errors.ClientError as error:
            self.answered = True
            raise self._judge(error, name, verb) from error
        except (*NO_CREDENTIALS, *SIGNED_OUT) as error:
            message = describe_missing_credentials(name, error, brief(error))
            raise (Denied if self.session.was_open else AccessDenied)(message) from error
        except boto_errors.ParamValidationError as error:
            raise UsageError(f"{name} is not a usable S3 address: {brief(error)}") from error
        except boto_errors.InvalidRegionError as error:
            # botocore looked for the region that a redirect means, and found none.
            raise StoreError(f"{name}: {self.session.describe_redirect()}") from error
        except BROKEN as error:
            raise Unavailable(
                f"{name}: the S3 server does not answer ({brief(error)}); check the network and AWS_ENDPOINT_URL"
            ) from error
        except boto_errors.BotoCoreError as error:
            raise StoreError(f"{name}: {brief(error)}") from error

    def _judge(self, error: boto_errors.ClientError, name: str, verb: str) -> StoreError:
        """Return the error for an answer other than success."""
        found = translate(error, name)
        if code_and_status(error)[1] in REDIRECTS:
            return StoreError(f"{name}: {self.session.describe_redirect()}")
        if self._may_be_mended(error, verb):
            return Denied(str(found))
        header = CHECKSUM_HEADER.search(str(error))
        if isinstance(found, Refused) and self.checksums and header:
            return Refused(
                f"{found} This server does not take {header[0].lower()}: {CHECKSUM_REMEDY}"
            )
        if isinstance(found, Unavailable) and self.endpoint and self.endpoint.is_full():
            return StoreError(
                f"no space left on the disk of {self.endpoint.root}, where the embedded S3 server keeps {name}; "
                "free some and run again"
            )
        return found

    def _may_be_mended(self, error: boto_errors.ClientError, verb: str) -> bool:
        """Return whether new credentials may mend a denial."""
        code, status = code_and_status(error)
        if code in REMEDIES:
            return self.session.was_open
        # The answer to a HEAD has no body: that to an expired token is a bare 400.
        denied = status in DENIED or (verb == "head_object" and status == 400)
        return denied and verb in self._granted


def tag_in(s3: S3Connection, answer: dict[str, Any]) -> str:
    """Return the ETag of an answer.

    Raises:
        StoreError: There is none, and without it no write can be conditional.
    """
    tag = str(answer.get("ETag", ""))
    if not tag:
        raise StoreError(f"{s3.url}: {s3.server} tells no ETags; it cannot be used")
    return tag
