"""Credentials that are renewed while a store is in use, clocks that are off, and redirects."""

import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import botocore.exceptions as boto_errors
import pytest
from fault_proxy import FaultProxy
from outcomes import assert_same_end
from trainers import Job, Training, all_ended

from wds_train.errors import AccessDenied, Conflict, StoreError, UsageError
from wds_train.storage.open import open_store
from wds_train.storage.s3 import S3Store
from wds_train.storage.s3_errors import describe_missing_credentials
from wds_train.storage.s3_session import MOST_REDIRECTS, S3Session

ALWAYS = 10**9
PART = 5 << 20  # the least that S3 takes
DATA = bytes(range(256)) * 8
LARGE = DATA * (PART // len(DATA)) + b"rest"


class KeyFile:
    """The credentials file that a store reads."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, key: str) -> None:
        """Put the access key `key` into the file, as tools do: by a rename."""
        beside = self.path.with_suffix(".new")
        beside.write_text(
            f"[default]\naws_access_key_id = {key}\naws_secret_access_key = secret-of-{key}\n"
        )
        beside.replace(self.path)


@pytest.fixture
def keys(fault_proxy: FaultProxy, aws_env: pytest.MonkeyPatch, tmp_path: Path) -> KeyFile:
    """A credentials file with the key OLD, which the proxy accepts."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        aws_env.delenv(name)
    file = KeyFile(tmp_path / "credentials")
    file.write("OLD")
    aws_env.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file.path))
    aws_env.setenv("WDS_S3_PATIENCE", "30")
    fault_proxy.accepted = {"OLD"}
    return file


@pytest.fixture
def store(keys: KeyFile, s3_url: str, aws_env: pytest.MonkeyPatch) -> S3Store:
    """A store that has granted every kind of request before."""
    aws_env.setattr("wds_train.storage.s3_write.PART_BYTES", PART)
    store = open_store(s3_url)
    assert isinstance(store, S3Store)
    for request in REQUESTS.values():
        request(store)
    return store


def put(store: S3Store) -> None:
    store.write("put", DATA)
    assert store.read("put") == DATA


def put_parts(store: S3Store) -> None:
    store.write("parts", LARGE)
    assert store.head("parts")[0] == len(LARGE)


def read_range(store: S3Store) -> None:
    store.write("object", DATA)
    assert store.read("object", 100, 50) == DATA[100:150]


def read_whole(store: S3Store) -> None:
    store.write("object", DATA)
    assert store.read("object") == DATA


def list_objects(store: S3Store) -> None:
    store.write("listed/a", DATA)
    assert [entry.key for entry in store.list("listed/")] == ["listed/a"]


def look_up(store: S3Store) -> None:
    store.write("object", DATA)
    assert store.head("object")[0] == len(DATA)


def delete(store: S3Store) -> None:
    store.write("gone", DATA)
    store.delete("gone")


def swap(store: S3Store) -> None:
    store.write("swapped", DATA)
    _, tag = store.read_tagged("swapped")
    store.write("swapped", DATA[::-1], if_match=tag)
    assert store.read("swapped") == DATA[::-1]


REQUESTS: dict[str, Callable[[S3Store], None]] = {
    "put": put,
    "multipart upload": put_parts,
    "read of a range": read_range,
    "read of a whole object": read_whole,
    "listing": list_objects,
    "head": look_up,
    "delete": delete,
    "swap": swap,
}

DENIALS = {
    "expired": (400, "ExpiredToken"),
    "invalid token": (400, "InvalidToken"),
    "refresh required": (400, "TokenRefreshRequired"),
    "no such key": (403, "InvalidAccessKeyId"),
    "wrong secret": (403, "SignatureDoesNotMatch"),
    "plain": (403, "AccessDenied"),
}


@pytest.mark.parametrize("request_of", REQUESTS)
@pytest.mark.parametrize("denial", DENIALS)
def test_renewed_credentials_are_taken_up(
    fault_proxy: FaultProxy, store: S3Store, keys: KeyFile, request_of: str, denial: str
) -> None:
    fault_proxy.denial.status, fault_proxy.denial.code = DENIALS[denial]
    fault_proxy.accepted = {"NEW"}
    keys.write("NEW")
    REQUESTS[request_of](store)
    assert fault_proxy.signers["NEW"]


@pytest.mark.parametrize("request_of", REQUESTS)
def test_credentials_are_waited_for(
    fault_proxy: FaultProxy, store: S3Store, keys: KeyFile, request_of: str
) -> None:
    """They are renewed only after the first denials."""
    fault_proxy.accepted = {"NEW"}
    before = fault_proxy.signers["OLD"]

    def renew() -> None:
        while fault_proxy.signers["OLD"] < before + 2:
            stop.wait(0.02)
        keys.write("NEW")

    stop = threading.Event()
    thread = threading.Thread(target=renew)
    thread.start()
    REQUESTS[request_of](store)
    thread.join()
    assert fault_proxy.signers["NEW"]


def test_an_upload_goes_on_in_its_middle(
    fault_proxy: FaultProxy, store: S3Store, keys: KeyFile
) -> None:
    def pieces() -> Iterator[bytes]:
        yield LARGE[:PART]
        yield LARGE[:PART]
        fault_proxy.accepted = {"NEW"}
        keys.write("NEW")
        yield b"rest"

    store.write_pieces("pieces", pieces())
    assert store.read("pieces") == LARGE[:PART] * 2 + b"rest"


def test_many_reads_renew_once(
    fault_proxy: FaultProxy, store: S3Store, keys: KeyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []
    sign_in = S3Session._sign_in

    def counted(self: S3Session) -> boto3.session.Session:
        made.append(self)
        return sign_in(self)

    store.write("object", DATA)
    monkeypatch.setattr(S3Session, "_sign_in", counted)
    fault_proxy.accepted = {"NEW"}
    keys.write("NEW")
    with ThreadPoolExecutor(30) as pool:
        found = list(pool.map(lambda start: store.read("object", start, 10), range(300)))
    assert found == [DATA[start : start + 10] for start in range(300)]
    assert len(made) == 1


@pytest.mark.parametrize(("status", "code"), [*DENIALS.values(), (403, "RequestTimeTooSkewed")])
def test_a_store_that_was_never_open_refuses_at_once(
    fault_proxy: FaultProxy, keys: KeyFile, s3_url: str, status: int, code: str
) -> None:
    fault_proxy.denial.status = status
    fault_proxy.denial.code = code
    fault_proxy.accepted = set()
    with pytest.raises(AccessDenied, match=f"was denied \\({code}\\)"):
        open_store(s3_url).read("object")
    assert fault_proxy.signers["OLD"] <= 2


def test_a_right_that_was_never_there_is_refused_at_once(
    fault_proxy: FaultProxy, keys: KeyFile, s3_url: str
) -> None:
    """The store is open, but not for this kind of request."""
    store = open_store(s3_url)
    store.write("object", DATA)
    fault_proxy.fail("status", method="DELETE", status=403, code="AccessDenied", times=ALWAYS)
    with pytest.raises(AccessDenied, match="was denied"):
        store.delete("object")
    assert fault_proxy.count("DELETE") == 1


def test_a_denial_that_stays_ends_within_the_patience(
    fault_proxy: FaultProxy, store: S3Store, keys: KeyFile
) -> None:
    store.connection.patience = 1.0
    fault_proxy.accepted = set()
    with pytest.raises(
        AccessDenied,
        match=r"ExpiredToken\): the credentials have expired: renew them; gave up after",
    ):
        store.read("object")


@pytest.mark.parametrize(
    "content", ["", "[default]\naws_access_key_id = NEW\n", "[default\n", "[other]\n"]
)
def test_a_file_that_is_just_being_written_is_read_again(
    fault_proxy: FaultProxy, store: S3Store, keys: KeyFile, content: str
) -> None:
    fault_proxy.accepted = {"NEW"}
    keys.path.write_text(content)
    timer = threading.Timer(0.5, keys.write, ["NEW"])
    timer.start()
    read_range(store)
    timer.join()


@pytest.mark.parametrize("request_of", REQUESTS)
def test_a_clock_that_is_set_right_is_waited_for(
    fault_proxy: FaultProxy, store: S3Store, request_of: str
) -> None:
    fault_proxy.fail("status", status=403, code="RequestTimeTooSkewed", times=4)
    REQUESTS[request_of](store)


# Writes under way


@pytest.mark.parametrize("code", ["ConditionalRequestConflict", "OperationAborted"])
@pytest.mark.parametrize("data", [DATA, LARGE], ids=["one request", "in parts"])
@pytest.mark.parametrize("method", ["PUT", "POST"])
def test_a_write_that_meets_another_is_repeated(
    fault_proxy: FaultProxy, store: S3Store, code: str, data: bytes, method: str
) -> None:
    fault_proxy.fail("status", method=method, key="met", status=409, code=code, times=3)
    store.write("met", data, if_absent=True)
    assert store.read("met") == data


def test_a_write_that_lost_says_so(fault_proxy: FaultProxy, store: S3Store) -> None:
    store.write("taken", b"theirs")
    fault_proxy.fail(
        "status", method="PUT", key="taken", status=409, code="ConditionalRequestConflict", times=2
    )
    with pytest.raises(Conflict, match="was written by another writer"):
        store.write("taken", DATA, if_absent=True)
    assert store.read("taken") == b"theirs"


def test_a_forgotten_upload_is_sent_again(fault_proxy: FaultProxy, store: S3Store) -> None:
    """As AWS does after a conflict at the end of a multipart upload."""
    fault_proxy.fail(
        "status", method="POST", key="forgotten", query="uploadId", status=404, code="NoSuchUpload"
    )
    store.write("forgotten", LARGE, if_absent=True)
    assert store.read("forgotten") == LARGE


def test_uploads_that_are_always_forgotten_are_nobody_else_s(
    fault_proxy: FaultProxy, store: S3Store
) -> None:
    fault_proxy.fail(
        "status",
        method="POST",
        key="forgotten",
        query="uploadId",
        status=404,
        code="NoSuchUpload",
        times=ALWAYS,
    )
    with pytest.raises(
        StoreError, match="the S3 server forgot 3 multipart uploads before their end"
    ):
        store.write("forgotten", LARGE, if_absent=True)
    fault_proxy.faults.clear()
    assert [entry.key for entry in store.list("forgotten")] == []


# Redirects


@pytest.mark.parametrize("status", [301, 302, 307, 308])
@pytest.mark.parametrize("location", ["http://127.0.0.1:9/elsewhere?X-Amz-Signature=secret", ""])
@pytest.mark.parametrize("request_of", ["put", "read of a range", "listing", "head"])
def test_a_redirect_for_ever_ends_in_a_sentence(
    fault_proxy: FaultProxy, keys: KeyFile, s3_url: str, status: int, location: str, request_of: str
) -> None:
    headers = f"\r\nLocation: {location}" if location else ""
    fault_proxy.fail(
        "status", status=status, code="TemporaryRedirect", headers=headers, times=ALWAYS
    )
    with pytest.raises(StoreError, match="redirects") as caught:
        REQUESTS[request_of](open_store(s3_url))
    said = str(caught.value)
    assert fault_proxy.url in said
    assert "set AWS_ENDPOINT_URL" in said
    assert ("http://127.0.0.1:9/elsewhere" in said) == bool(location)
    assert "secret" not in said
    assert sum(fault_proxy.requests.values()) <= MOST_REDIRECTS + 3


# Sentences


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (
            boto_errors.TokenRetrievalError(provider="sso", error_msg="expired"),
            "aws sso login --profile mine",
        ),
        (boto_errors.SSOTokenLoadError(error_msg="not there"), "aws sso login --profile mine"),
        (boto_errors.UnauthorizedSSOTokenError(), "aws sso login --profile mine"),
        (boto_errors.NoAuthTokenError(), "aws sso login --profile mine"),
        (boto_errors.LoginRefreshRequired(), "aws login --profile mine"),
        (
            boto_errors.CredentialRetrievalError(provider="process", error_msg="exit 1"),
            "when their source answers",
        ),
        (boto_errors.MetadataRetrievalError(error_msg="timed out"), "when their source answers"),
        (boto_errors.NoCredentialsError(), "set AWS_ACCESS_KEY_ID"),
        (boto_errors.ConfigParseError(path="/x", error="torn"), "repair that file"),
    ],
)
def test_missing_credentials_say_what_to_do(
    error: Exception, remedy: str, aws_env: pytest.MonkeyPatch
) -> None:
    aws_env.setenv("AWS_PROFILE", "mine")
    said = describe_missing_credentials("s3://b/x", error, str(error))
    assert remedy in said
    assert str(error)[:40] in said


def test_an_expired_sign_in_says_so(aws_env: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(
        "[profile mine]\nsso_session = s\nsso_account_id = 1\nsso_role_name = r\nregion = us-east-1\n"
        "[sso-session s]\nsso_start_url = https://example.invalid/start\nsso_region = us-east-1\n"
    )
    aws_env.setenv("AWS_CONFIG_FILE", str(config))
    aws_env.setenv("AWS_PROFILE", "mine")
    aws_env.setenv("HOME", str(tmp_path))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        aws_env.delenv(name, raising=False)
    with pytest.raises(AccessDenied, match="sign in: aws sso login --profile mine"):
        open_store("s3://bucket/x").read("object")


@pytest.mark.parametrize("value", ["abc", "-1", "nan", "inf", ""])
def test_a_patience_that_is_no_number_is_refused(aws_env: pytest.MonkeyPatch, value: str) -> None:
    aws_env.setenv("WDS_S3_PATIENCE", value)
    with pytest.raises(UsageError, match="WDS_S3_PATIENCE"):
        open_store("s3://bucket/x")


# A whole training


@pytest.mark.timeout(300)
def test_a_training_goes_on_with_new_credentials(
    small: str, s3_url: str, keys: KeyFile, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    """Its dataset and its run lie on a store that stops to accept the old key amid the run."""
    local = Training(Job(small, str(tmp_path / "unbroken"), str(tmp_path)))
    assert local.end() == 0, local.output
    dataset = open_store(f"{s3_url}/data")
    for path in sorted(Path(small).rglob("*")):
        if path.is_file():
            dataset.write(str(path.relative_to(small)), path.read_bytes())
    run = f"{s3_url}/run"
    with all_ended([training := Training(Job(f"{s3_url}/data", run, str(tmp_path), workers=1))]):
        training.until("epoch   2/4")
        fault_proxy.accepted = {"NEW"}
        keys.write("NEW")
        assert training.end() == 0, training.output
    assert fault_proxy.signers["NEW"]
    assert "goes on" not in training.output
    assert_same_end(str(tmp_path / "unbroken"), run)
    assert json.loads(open_store(run).read("manifest.json"))["status"] == "done"
    assert os.environ["AWS_SHARED_CREDENTIALS_FILE"] == str(keys.path)
