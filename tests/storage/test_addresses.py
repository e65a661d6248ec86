"""What an address means, and that no signature is ever told."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fault_proxy import FaultProxy

from wds_train.cli import main
from wds_train.dataset.reader import Dataset
from wds_train.errors import UsageError
from wds_train.storage.address import resolve_address
from wds_train.storage.embedded import Endpoint
from wds_train.storage.open import open_store


@pytest.fixture(autouse=True)
def no_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WDS_BUCKET", raising=False)


@pytest.mark.parametrize(
    ("text", "bucket", "address"),
    [
        ("s3://b1/x/y", None, "s3://b1/x/y"),
        ("s3://b1/x/y/", None, "s3://b1/x/y/"),
        ("s3://b1", None, "s3://b1"),
        ("/data/x", "s3://b1", "/data/x"),
        ("./x", "s3://b1", "./x"),
        ("../x y", None, "../x y"),
        ("~/x", None, str(Path.home() / "x")),
        ("pets", None, "s3://embedded/datasets/pets"),
        ("pets", "s3://b1", "s3://b1/datasets/pets"),
        ("pets", "s3://b1/team/", "s3://b1/team/datasets/pets"),
        ("pets", "./here", "./here/datasets/pets"),
        ("my.pets-2_0", "/data", "/data/datasets/my.pets-2_0"),
    ],
)
def test_what_an_address_means(text: str, bucket: str | None, address: str) -> None:
    assert resolve_address(text, "datasets", bucket) == address


def test_the_bucket_is_set_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WDS_BUCKET", "s3://b1/x")
    assert resolve_address("pets", "runs") == "s3://b1/x/runs/pets"
    assert resolve_address("pets", "runs", "s3://b2") == "s3://b2/runs/pets"
    monkeypatch.setenv("WDS_BUCKET", "b1")
    with pytest.raises(
        UsageError,
        match=r"WDS_BUCKET 'b1' names no place; write s3://b1, or ./b1 for a local folder",
    ):
        resolve_address("pets", "runs")


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("a/b", "write ./a/b, or s3://a/b"),
        ("s3:/b1/x", "write s3://b1/x"),
        ("S3://b1/x", "write s3://b1/x"),
        ("s3a://b1/x", "write s3://b1/x"),
        ("https://b1.s3.eu-west-1.amazonaws.com/x/y?versionId=3", "write s3://b1/x/y"),
        ("https://s3.amazonaws.com/b1/x", "write s3://b1/x"),
        ("arn:aws:s3:::b1/x", "write s3://b1/x"),
        ("gs://b1/x", "it is s3://BUCKET/PREFIX, a path like /x or ./x, or a name"),
        ("s3://b1/x#y", "holds '#'"),
        ("s3://b1/x?y=1", "holds '?'"),
        ("s3://b1/../x", "'..' part"),
        ("s3://b1//x", "an empty, '.' or '..' part"),
        ("s3:///x", "names no bucket"),
        ("s3://", "names no bucket"),
        ("s3://b 1/x", "names no bucket"),
        ("", "it is s3://BUCKET/PREFIX"),
        (" ", "it is s3://BUCKET/PREFIX"),
        ("my pets", "write ./my pets"),
        ("a\nb", "cannot be printed"),
    ],
)
def test_what_is_no_address(
    text: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        resolve_address(text, "datasets")
    assert remedy in str(caught.value) and (not text.strip() or repr(text) in str(caught.value))
    for command in (
        ["inspect", text],
        ["verify", text],
        ["order", text],
        ["status", text],
        ["shards", "digits", text],
    ):
        assert main(command) == 2
    assert not list(tmp_path.iterdir())


def test_a_bucket_without_its_scheme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (["shards", "digits"], ["train"], ["status", "x"], ["inspect", "x"]):
        assert main([*command, "--bucket", "my-bucket"]) == 2
        assert "write s3://my-bucket, or ./my-bucket" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_a_folder_here(
    embedded_home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pets").mkdir()
    assert main(["inspect", "pets"]) == 1
    error = capsys.readouterr().err
    assert "there is no dataset at s3://embedded/datasets/pets" in error and "write ./pets" in error


def test_no_secret_is_told(
    fault_proxy: FaultProxy, s3_server: Endpoint, s3_url: str, tmp_path: Path
) -> None:
    """A conversion, a verification, an order and a training while the server misbehaves.

    What they print, and all that they leave anywhere, holds no signature and no key.
    """
    environment = os.environ | {
        "WDS_S3_PATIENCE": "3",
        "WDS_HOME": str(tmp_path / "home"),
        "WANDB_MODE": "offline",
    }

    def run(*arguments: str) -> bytes:
        command = [sys.executable, "-m", "wds_train.cli", *arguments]
        return subprocess.run(
            command, check=False, env=environment, cwd=tmp_path, capture_output=True, timeout=120
        ).stderr

    train = [
        "train",
        "--dataset",
        f"{s3_url}/digits",
        "--run",
        f"{s3_url}/run",
        "--set",
        "model.name=test_resnet",
    ]
    train += ["--set", "schedule.epochs=1", "--set", "schedule.warmup_epochs=0", "--workers", "1"]
    said = run("shards", "digits", f"{s3_url}/digits", "--shard-mb", "1")
    assert b"Traceback" not in said
    fault_proxy.fail("status", status=503, times=20, share=0.3)
    fault_proxy.fail("reset", times=20, share=0.3)
    said += run("verify", f"{s3_url}/digits") + run(
        "order", f"{s3_url}/digits", "--global-batch", "64"
    )
    said += run(*train)
    fault_proxy.faults.clear()
    for kind in ("reset", "truncate"):
        fault_proxy.fail(kind, method="GET", key="shard", times=1000)  # type: ignore[arg-type]
        said += run("order", f"{s3_url}/digits", "--global-batch", "64")
        fault_proxy.faults.clear()
    fault_proxy.fail("status", status=403, code="AccessDenied", times=1000)
    said += run("order", f"{s3_url}/digits", "--global-batch", "64") + run(*train)
    fault_proxy.faults.clear()
    assert b"error" in said
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    store = open_store(s3_url)
    kept += b"".join(store.read(entry.key) for entry in store.list())
    for secret in (
        b"Signature=",
        b"X-Amz-",
        b"AWSAccessKeyId=",
        s3_server.secret_key.encode(),
        s3_server.access_key.encode(),
    ):
        assert secret not in said + kept, secret
    assert Dataset.open(f"{s3_url}/digits").manifest.splits
