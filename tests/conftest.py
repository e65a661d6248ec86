"""One real S3 server for the session, a bucket of its own for each test, and a proxy that breaks what passes it."""

import os
import shutil
import uuid
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path

import boto3
import pytest
import trainers  # says what the fork server imports
from fake_imds import FakeImds
from fault_proxy import FaultProxy

from wds_train.cli import main
from wds_train.dataset.reader import Dataset
from wds_train.storage import embedded
from wds_train.storage.embedded import Endpoint

AWS_SETTINGS = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL_S3")


def pytest_sessionstart(session: pytest.Session) -> None:
    """One thread for PyTorch: the models are tiny, and threads that wait for one another on busy cores take minutes. And the
    fork server, with PyTorch imported: a conversion would start it without, for every training to import anew.
    """
    os.environ.setdefault(
        "OMP_NUM_THREADS", "1"
    )  # PyTorch reads it when it is imported, which is later
    os.environ["WDS_BUCKET"] = ""  # no bucket of a developer's, not of a file .env either
    if hasattr(session.config, "workerinput") or not getattr(
        session.config.option, "numprocesses", None
    ):
        forkserver.ensure_running()  # not where xdist only hands out the tests


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    root = tmp_path_factory.mktemp("s3")
    yield embedded.ensure_running(root)
    embedded.stop(root)
    shutil.rmtree(root)


@pytest.fixture
def aws_env(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment with no AWS settings but those that the test makes; subprocesses inherit it."""
    for name in AWS_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    return monkeypatch


@pytest.fixture
def s3_url(s3_server: Endpoint, aws_env: pytest.MonkeyPatch) -> Iterator[str]:
    """`s3://<fresh bucket>/test` on the session's server, which the AWS environment variables point to."""
    aws_env.setenv("AWS_ENDPOINT_URL", s3_server.url)
    aws_env.setenv("AWS_ACCESS_KEY_ID", s3_server.access_key)
    aws_env.setenv("AWS_SECRET_ACCESS_KEY", s3_server.secret_key)
    bucket = f"test-{uuid.uuid4().hex}"
    client = boto3.session.Session().client("s3", endpoint_url=s3_server.url)
    client.create_bucket(Bucket=bucket)
    yield f"s3://{bucket}/test"
    client.delete_bucket(Bucket=bucket)  # SeaweedFS removes what it holds with it


@pytest.fixture
def fault_proxy(
    s3_server: Endpoint, s3_url: str, aws_env: pytest.MonkeyPatch
) -> Iterator[FaultProxy]:
    """A proxy before the session's server, to which the AWS environment variables point from now on."""
    keys = s3_server.access_key, s3_server.secret_key
    with FaultProxy(int(s3_server.url.rpartition(":")[2]), keys=keys) as proxy:
        aws_env.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture
def embedded_home(tmp_path: Path, aws_env: pytest.MonkeyPatch) -> Iterator[Path]:
    """A WDS_HOME of its own; the embedded server that a test or its subprocesses start in it dies with the test."""
    aws_env.setenv("WDS_HOME", str(tmp_path / "home"))
    yield tmp_path / "home"
    embedded.stop()


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The handwritten digits as a dataset in a local directory, in several small shards. Not to be written to."""
    folder = tmp_path_factory.mktemp("digits")
    arguments = [
        "shards",
        "digits",
        str(folder / "data"),
        "--shard-mb",
        "1",
        "--spool",
        str(folder / "spool"),
    ]
    assert main(arguments) == 0
    return Dataset.open(str(folder / "data"))


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The dataset that the small trainings train on. Not to be written to."""
    return trainers.make_dataset(tmp_path_factory.mktemp("small"))


@pytest.fixture
def imds(s3_url: str, aws_env: pytest.MonkeyPatch) -> Iterator[FakeImds]:
    """EC2's metadata service, as a training on an instance finds it."""
    with FakeImds() as imds:
        aws_env.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", imds.url)
        aws_env.setenv("AWS_EC2_METADATA_DISABLED", "false")
        yield imds
