"""An account and a region of AWS, and its errors as ours."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import boto3
import botocore.exceptions as boto_errors
from botocore.config import Config

from wds_train.errors import AccessDenied, RunError, Unavailable, UsageError

# Codes of AWS's errors, which differ from service to service. Those of missing rights:
DENIED = {
    "AccessDenied",
    "AccessDeniedException",
    "UnauthorizedOperation",
    "AuthFailure",
    "403",
    "Forbidden",
}
# Those of credentials that are not valid, or not any more:
EXPIRED = {
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidClientTokenId",
    "UnrecognizedClientException",
    "RequestExpired",
}
LOGIN = "log in (aws sso login, aws configure), or set AWS_PROFILE"


class Aws:
    """Clients of one region.

    Args:
        region: Its name. Default: that of the AWS settings.

    Raises:
        UsageError: No region is set.
    """

    def __init__(self, region: str | None = None) -> None:
        with translate_errors("the AWS settings"):
            self.session = boto3.session.Session(region_name=region or None)
        if self.session.region_name is None:
            raise UsageError("no AWS region is set; give --region, or set AWS_REGION")
        self.region: str = self.session.region_name
        # A service that hangs is given up after about two minutes.
        self._config = Config(
            connect_timeout=5,
            read_timeout=30,
            retries={"total_max_attempts": 4, "mode": "standard"},
        )

    # The cache keeps this object for ever, of which a command has one.
    @functools.cache  # noqa: B019
    def client(self, name: str) -> Any:
        """Return the client of a service, the same one each time.

        Args:
            name: The service, as boto3 calls it.
        """
        return self.session.client(name, config=self._config)  # type: ignore[call-overload]

    def account(self) -> str:
        """Return the account's number.

        Raises:
            AccessDenied: There are no valid credentials.
        """
        with translate_errors("the AWS credentials"):
            return self.client("sts").get_caller_identity()["Account"]


@contextlib.contextmanager
def translate_errors(what: str) -> Iterator[None]:
    """Raise errors of boto3 as ours.

    Args:
        what: The subject of the request, for the message.

    Raises:
        AccessDenied: There are no valid credentials, or they lack a right.
        UsageError: The AWS settings name a profile that does not exist.
        Unavailable: AWS gave no answer.
        RunError: AWS refused for another reason.
    """
    try:
        yield
    # AWS answered with an error.
    except boto_errors.ClientError as error:
        details = error.response["Error"]
        code = details.get("Code", "")
        text = str(details.get("Message", ""))[:300]
        if code in EXPIRED:
            raise AccessDenied(
                f"the AWS credentials are not valid, or have expired ({code}): {LOGIN}"
            ) from error
        if code in DENIED:
            right = f"{error.operation_name} was denied ({text or code})"
            raise AccessDenied(
                f"{what}: {right}; docs/aws.md lists the rights of who launches"
            ) from error
        raise RunError(f"{what}: AWS answered {code} to {error.operation_name}: {text}") from error
    # No request was sent, or none was answered.
    except boto_errors.ProfileNotFound as error:
        raise UsageError(f"{error}; set AWS_PROFILE to one that there is") from error
    except (
        boto_errors.NoCredentialsError,
        boto_errors.PartialCredentialsError,
        boto_errors.TokenRetrievalError,
    ) as error:
        raise AccessDenied(f"no AWS credentials were found ({error}): {LOGIN}") from error
    except boto_errors.WaiterError as error:
        raise RunError(f"{what}: {error}") from error
    except boto_errors.BotoCoreError as error:
        raise Unavailable(f"{what}: AWS gave no answer: {error}") from error
