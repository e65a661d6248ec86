"""AWS as the commands see it: one account, one region, and errors as sentences."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import boto3
import botocore.exceptions as boto_errors
from botocore.config import Config

from wds_train.errors import AccessDenied, RunError, Unavailable, UsageError

DENIED = {"AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "AuthFailure", "403", "Forbidden"}
EXPIRED = {
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidClientTokenId",
    "UnrecognizedClientException",
    "RequestExpired",
}
LOGIN = "log in (aws sso login, aws configure), or set AWS_PROFILE"


class Aws:
    """Clients of one region: the one that is given, else the settings'."""

    def __init__(self, region: str | None = None) -> None:
        with told("the AWS settings"):
            self.session = boto3.session.Session(region_name=region or None)
        if self.session.region_name is None:
            raise UsageError("no AWS region is set; give --region, or set AWS_REGION")
        self.region: str = self.session.region_name
        self._config = Config(connect_timeout=5, read_timeout=30, retries={"total_max_attempts": 4, "mode": "standard"})

    @functools.cache  # noqa: B019 (one a command)
    def client(self, name: str) -> Any:
        return self.session.client(name, config=self._config)  # type: ignore[call-overload]

    def account(self) -> str:
        """The account's number: whether there are credentials, and whether they are valid."""
        with told("the AWS credentials"):
            return self.client("sts").get_caller_identity()["Account"]


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """Translate what boto3 raises while `what` is asked for."""
    try:
        yield
    except boto_errors.ClientError as error:
        code, text = error.response["Error"].get("Code", ""), str(error.response["Error"].get("Message", ""))[:300]
        if code in EXPIRED:
            raise AccessDenied(f"the AWS credentials are not valid, or have expired ({code}): {LOGIN}") from error
        if code in DENIED:
            right = f"{error.operation_name} was denied ({text or code})"
            raise AccessDenied(f"{what}: {right}; docs/aws.md lists the rights of who launches") from error
        raise RunError(f"{what}: AWS answered {code} to {error.operation_name}: {text}") from error
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
