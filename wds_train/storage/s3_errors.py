"""Errors of S3 and boto3 as our own, with what to do about each.

`s3_connection.py` raises them.
"""

import os
import re

import botocore.exceptions as boto_errors

from wds_train.errors import AccessDenied, Conflict, NotFound, StoreError, Unavailable

# Answers that are worth another try: a server in trouble, and bytes damaged on their way to it.
RETRIED = {408, 429, 500, 502, 503, 504}
RETRIED_CODES = {
    "SlowDown",
    "RequestTimeout",
    "Throttling",
    "BadDigest",
    "XAmzContentChecksumMismatch",
}
# Answers of a server that is busy with another write of the same object. The same request may
# succeed later.
BUSY = {"ConditionalRequestConflict", "OperationAborted"}
# 409 is a write that raced another; 404 is what AWS answers to If-Match on a missing key, where
# SeaweedFS says 412.
CAS_LOST = {409, 412}
REDIRECTS = {301, 302, 303, 307, 308}
# The query of an address in a message: in a signed one, it is a key to the object.
QUERY = re.compile(r"\?[^\s?'\"()<>]*=[^\s'\"()<>]*")

# What to do about codes that are about the credentials or the clock, not about a right: new
# credentials mend them.
REMEDIES = {
    "ExpiredToken": "the credentials have expired: renew them",
    "ExpiredTokenException": "the credentials have expired: renew them",
    "TokenRefreshRequired": "the session token must be refreshed: renew the credentials",
    "RequestExpired": "the credentials have expired: renew them",
    "InvalidToken": "the session token is not valid: renew the credentials",
    "InvalidClientTokenId": "the session token is not valid: renew the credentials",
    "InvalidAccessKeyId": "there is no such access key: check AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret key is not the access key's: check AWS_SECRET_ACCESS_KEY",
    "RequestTimeTooSkewed": (
        "this machine's clock is wrong: set it, for example with `timedatectl set-ntp true`"
    ),
}
# What to do about all other denials.
GRANT = (
    "let the AWS credentials read and write there, and list the bucket "
    "(without s3:ListBucket a missing object looks like a denied one)"
)
# The statuses of denials.
DENIED = {401, 403}

# Errors of boto3 before it has asked S3: nobody has signed in, or the sign-in has expired.
SIGNED_OUT: tuple[type[Exception], ...] = (
    boto_errors.SSOError,
    boto_errors.TokenRetrievalError,
    boto_errors.NoAuthTokenError,
)
# boto3 of before 2025 knows no `aws login`.
if hasattr(boto_errors, "LoginError"):
    SIGNED_OUT = (*SIGNED_OUT, boto_errors.LoginError)

# The same, with all other ways to have no credentials, or to be unable to renew them.
NO_CREDENTIALS: tuple[type[Exception], ...] = (
    boto_errors.NoCredentialsError,
    boto_errors.PartialCredentialsError,
    boto_errors.CredentialRetrievalError,
    boto_errors.MetadataRetrievalError,
    boto_errors.UnknownCredentialError,
    boto_errors.ConfigParseError,
    *SIGNED_OUT,
)


class Denied(Unavailable):
    """The request was denied by a store that was open before: new credentials may mend it."""


class OutOfRange(StoreError):
    """The object ends before the range that was asked for."""


class Refused(StoreError):
    """The server does not take the request.

    It lacks something, or does not take a header or a value.
    """


def code_and_status(error: boto_errors.ClientError) -> tuple[str, int]:
    """Return the error code of an answer, and its HTTP status."""
    code = error.response.get("Error", {}).get("Code", "")
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return code, status


def brief(error: BaseException) -> str:
    """Return the text of a foreign error on one line.

    Query strings of addresses are left out: a signed one is a key to the object.
    """
    return re.sub(r"\s+", " ", QUERY.sub("?...", str(error)))[:200]


def translate(error: boto_errors.ClientError, name: str) -> StoreError:
    """Return the error for an answer of S3 other than success.

    Args:
        error: What boto3 raised.
        name: The address that was asked for.
    """
    code, status = code_and_status(error)
    answered = f"{name}: the S3 server answered {status} {code}: {brief(error)}"
    found: StoreError
    # No `NotFound` for a missing bucket: a run would be taken for a fresh one.
    if code == "NoSuchBucket":
        found = StoreError(f"the bucket of {name} does not exist; create it, or correct the name")
    elif is_denial(code, status):
        found = AccessDenied(describe_denial(name, code))
    elif status == 404:
        found = NotFound(f"{name} does not exist")
    # Before CAS_LOST, which has the same status: a busy server has refused nothing yet.
    elif code in BUSY:
        found = Unavailable(f"{name}: another write of it is under way ({code})")
    elif status in CAS_LOST:
        found = Conflict(f"{name} was changed by another writer ({code})")
    elif status == 416:
        found = OutOfRange(f"{name} is shorter than the range that was asked for")
    elif status in RETRIED or code in RETRIED_CODES:
        found = Unavailable(answered)
    else:
        found = Refused(answered)
    return found


def is_denial(code: str, status: int) -> bool:
    """Return True if an answer denies access.

    Args:
        code: Its error code.
        status: Its HTTP status.
    """
    return code in REMEDIES or status in DENIED


def describe_denial(name: str, code: str) -> str:
    """Return the sentence for a request that S3 denied with `code`.

    Args:
        name: The address that was asked for.
        code: The error code of the answer, or its status if it had none.
    """
    return f"access to {name} was denied ({code}): {REMEDIES.get(code, GRANT)}"


def describe_missing_credentials(name: str, error: Exception, cause: str) -> str:
    """Return the sentence for credentials that boto3 does not have or cannot renew.

    Args:
        name: The address that was asked for.
        error: One of NO_CREDENTIALS.
        cause: The text of `error`.
    """
    if isinstance(error, SIGNED_OUT):
        return (
            f"the AWS sign-in for {name} is missing or has expired ({cause}); "
            f"sign in: {_sign_in_command(error)}"
        )
    if isinstance(error, boto_errors.ConfigParseError):
        return f"the AWS settings for {name} cannot be read ({cause}); repair that file"
    if isinstance(error, boto_errors.CredentialRetrievalError | boto_errors.MetadataRetrievalError):
        return (
            f"the AWS credentials for {name} cannot be fetched ({cause}); run again when their "
            "source answers, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    return (
        f"no AWS credentials for {name} ({cause}); set AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY, or give the instance a role"
    )


def _sign_in_command(error: Exception) -> str:
    """Return the command that mends `error`, one of SIGNED_OUT, with the profile in use."""
    command = "aws sso login"
    # LoginError and its children: `aws login` is another way to sign in.
    if type(error).__name__.startswith("Login"):
        command = "aws login"
    profile = os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE")
    if profile:
        command += f" --profile {profile}"
    return command
