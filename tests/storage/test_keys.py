"""Keys with letters that URLs write otherwise, in prefixes and in the names of objects."""

import io
import random
import re

import pytest
from fault_proxy import FaultProxy
from PIL import Image

from wds_train.cli import main
from wds_train.dataset.reader import Dataset
from wds_train.errors import UsageError
from wds_train.serving.photos import find_photos
from wds_train.storage.base import PART_BYTES
from wds_train.storage.open import open_store
from wds_train.storage.s3 import S3Store

NAMES = ["a b", "a+b", "é", "a%2Bb", "a%20b", "a&b=c", "ü+ %", "a~b!(c)*'d'", "日本"]
BODY = random.Random(0).randbytes(1000)


@pytest.mark.parametrize("name", NAMES)
def test_every_verb_means_the_same_object(s3_url: str, name: str) -> None:
    store = open_store(f"{s3_url}/{name}")
    tag = store.write(f"{name}/{name}", BODY, if_absent=True)
    store.write("other", b"1")
    assert [entry.key for entry in store.list()] == sorted([f"{name}/{name}", "other"])
    assert [entry.key for entry in store.list(flat=True)] == sorted([f"{name}/", "other"])
    assert [entry.key for entry in store.list(f"{name}/")] == [f"{name}/{name}"]
    assert store.head(f"{name}/{name}") == (len(BODY), tag)
    assert store.read(f"{name}/{name}") == BODY
    assert store.read(f"{name}/{name}", 10, 500) == BODY[10:510]
    assert store.fallbacks == 0
    store.write(f"{name}/large", bytes(PART_BYTES + 1))
    assert isinstance(store, S3Store)
    store.client.create_multipart_upload(Bucket=store.bucket, Key=f"test/{name}/{name}/left")
    store.abort_uploads(f"{name}/")
    assert not store.client.list_multipart_uploads(Bucket=store.bucket).get("Uploads")
    for entry in list(store.list()):
        store.delete(entry.key)
    assert list(open_store(s3_url).list()) == []


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A tar for each split."""
    folder = tmp_path_factory.mktemp("tars")
    for number in range(12):
        path = folder / "images" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.frombytes("RGB", (16, 16), random.Random(number).randbytes(768)).save(path)
    assert main(["shards", str(folder / "images"), str(folder / "made"), "--processes", "1"]) == 0
    return {
        split: (folder / "made" / split / "shard-000000.tar").read_bytes()
        for split in ("train", "val")
    }


@pytest.mark.parametrize("name", NAMES)
def test_tars_are_indexed_and_read_where_they_lie(
    s3_url: str, tars: dict[str, bytes], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"{s3_url}/{name}"
    for split, body in tars.items():
        open_store(url).write(f"{split}/{name}.tar", body)
    assert main(["shards", "index", url]) == 0
    shards = {
        split: [shard.name for shard in found.shards]
        for split, found in Dataset.open(url).manifest.splits.items()
    }
    assert shards == {split: [f"{split}/{name}.tar"] for split in tars}
    assert main(["verify", url]) == 0
    capsys.readouterr()
    assert main(["order", url, "--global-batch", "2"]) == 0
    assert (
        len(capsys.readouterr().out.splitlines())
        == Dataset.open(url).manifest.split("train").samples // 2 * 2
    )


def png(shade: int) -> bytes:
    """A picture of one grey."""
    out = io.BytesIO()
    Image.new("L", (4, 4), shade).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_photos_are_found(s3_url: str, name: str) -> None:
    store = open_store(s3_url)
    images = {f"{name}/{name}.png": png(1), f"{name}/b.png": png(2)}
    for key, image in images.items():
        store.write(key, image)
    found = {photo.name: photo.read() for photo in find_photos([f"{s3_url}/{name}"])}
    assert found == {f"{s3_url}/{key}": image for key, image in images.items()}
    (alone,) = find_photos([f"{s3_url}/{name}/{name}.png"])
    assert alone.read() == png(1)


# Requester pays


def payers(proxy: FaultProxy) -> list[bool]:
    return [
        bool(re.search(rb"(?i)x-amz-request-payer[:=] *requester", head)) for head, _ in proxy.heads
    ]


def everything(url: str) -> None:
    store = open_store(url)
    store.write("a", BODY, if_absent=True)
    store.write("large", bytes(PART_BYTES + 1))
    store.read("a")
    store.read("a", 10, 20)
    store.head("a")
    list(store.list())
    store.abort_uploads("")
    store.delete("a")


@pytest.mark.parametrize("value", ["requester", " requester "])
def test_who_asks_pays_for_every_request(
    fault_proxy: FaultProxy, s3_url: str, aws_env: pytest.MonkeyPatch, value: str
) -> None:
    aws_env.setenv("WDS_REQUEST_PAYER", value)
    everything(s3_url)
    assert len(payers(fault_proxy)) > 8
    assert all(payers(fault_proxy))
    assert open_store(s3_url).fallbacks == 0


@pytest.mark.parametrize("value", [None, ""])
def test_else_nobody_says_so(
    fault_proxy: FaultProxy, s3_url: str, aws_env: pytest.MonkeyPatch, value: str | None
) -> None:
    aws_env.delenv("WDS_REQUEST_PAYER", raising=False)
    if value is not None:
        aws_env.setenv("WDS_REQUEST_PAYER", value)
    everything(s3_url)
    assert not any(payers(fault_proxy))


@pytest.mark.parametrize("value", ["true", "owner", "Requester", "1"])
def test_another_payer_is_refused(s3_url: str, aws_env: pytest.MonkeyPatch, value: str) -> None:
    aws_env.setenv("WDS_REQUEST_PAYER", value)
    with pytest.raises(
        UsageError, match=rf"WDS_REQUEST_PAYER is '{value}'; it is 'requester', or not set"
    ):
        open_store(s3_url).read("a")
