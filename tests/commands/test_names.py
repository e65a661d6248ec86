"""A run that supplies what it was begun with, names below a bucket, what is listed there, and settings in `.env`."""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trainers import SETTINGS, STEPS_PER_EPOCH, Job, Training, all_ended

from wds_train.checkpoint.lease import read_run
from wds_train.checkpoint.resume_checks import check_resume
from wds_train.checkpoint.run_manifest import RunManifest
from wds_train.cli import main
from wds_train.config.presets import preset
from wds_train.dataset.reader import Dataset
from wds_train.storage.open import open_store

Answer = Callable[..., tuple[int, str]]
SETS = [part for setting in SETTINGS for part in ("--set", setting)]


@pytest.fixture(scope="module")
def begun(small: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bucket with the dataset `noise` and the run `c1`, which was stopped in its second epoch. Not to be written to."""
    bucket = tmp_path_factory.mktemp("bucket")
    shutil.copytree(small, bucket / "datasets/noise")
    shutil.copytree(Path(small).parent / "images", bucket / "images")
    command = (
        "train",
        "c1",
        "--dataset",
        "noise",
        "--bucket",
        str(bucket),
        "--workers",
        "0",
        *SETS,
    )
    stopped = Job(
        "",
        "",
        str(bucket),
        command=command,
        point="after a step",
        nth=STEPS_PER_EPOCH + 4,
        sent=signal.SIGTERM,
    )
    training = Training(stopped)
    with all_ended([training]):
        assert training.end() == 75, training.output
    return bucket


@pytest.fixture
def bucket(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, that WDS_BUCKET names. The run's dataset is in the first one."""
    monkeypatch.setenv("WDS_BUCKET", str(tmp_path / "bucket"))
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(begun, tmp_path / "bucket")


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> Answer:
    def ask(*arguments: object) -> tuple[int, str]:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return ask


def manifest_of(bucket: Path, run: str) -> RunManifest:
    return read_run(open_store(str(bucket / "runs" / run)))[0]


def attempt(folder: Path, *command: str, **changes: Any) -> Training:
    """A training that has ended; with point="claimed" right after it claimed its run."""
    training = Training(
        Job("", "", str(folder), command=("train", *command, "--workers", "0"), **changes)
    )
    with all_ended([training]):
        training.end()
    return training


def change(bucket: Path, run: str, **changes: Any) -> None:
    path = bucket / "runs" / run / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_run_goes_on_by_its_name_alone(bucket: Path, begun: Path, tmp_path: Path) -> None:
    """And from then on it knows where its dataset has moved to."""
    before = manifest_of(bucket, "c1")
    moved = attempt(
        tmp_path,
        "c1",
        "--dataset",
        "noise",
        "--set",
        "seed=0",
        point="after a step",
        sent=signal.SIGTERM,
    )
    assert f"resuming at step {before.checkpoints[-1].progress.step} of 44" in moved.output
    after = manifest_of(bucket, "c1")
    assert (after.status, after.recipe) == ("interrupted", before.recipe)
    assert after.dataset == before.dataset | {"url": str(bucket / "datasets/noise")}
    alone = attempt(tmp_path, "c1")
    assert f"dataset  {bucket}/datasets/noise" in alone.output
    done = manifest_of(bucket, "c1")
    assert (done.status, done.recipe, done.checkpoints[-1].progress.step) == (
        "done",
        before.recipe,
        44,
    ), alone.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "c1 --set seed=3 --set model.name=resnet18",
            "c1 was begun with seed 0, not 3; model.name test_resnet, not resnet18; leave",
        ),
        (
            "c1 --recipe imagenette --set seed=3",
            "c1 was begun with recipe digits, not imagenette; leave",
        ),
        ("c1 --init timm:resnet18", "c1 was begun with model.init empty, not timm:resnet18; leave"),
        ("c1 --dataset DIGITS", "datasets/noise (fingerprint "),
        ("c1 --mix DIGITS=0.25", "c1 was begun with mixture none, not "),
        ("c1 --like c2", "c1 was begun with seed 0, not 1; leave"),
        ("c1 --run c2", "are two runs; name one"),
        ("--like c1", "the new run needs a name: wds-train train NAME --like c1"),
        ("c3 --like none", "there is no run at "),
        ("c3 --like broken", "broken/manifest.json is not JSON"),
        ("EMPTY", "'' cannot be a run's name"),
        ("--run EMPTY", "'' cannot be a run's name"),
        ("c3 --shard", "--shard needs the folder of the images: --dataset FOLDER"),
        ("c3 --recipe imagenette", "no --dataset is given, and none is called like the recipe"),
        ("noise", "/datasets/noise; to train on that: wds-train train --dataset noise ("),
        (
            "noise --recipe finetune",
            "/datasets/noise; to train on that: wds-train train --dataset noise (",
        ),
        (
            "./bucket/images",
            "but a folder bucket/images; to train on that: wds-train train --dataset ./bucket/images --shard (",
        ),
        (
            "--run bucket",
            "but a folder bucket; to train on that: wds-train train --dataset bucket --shard (",
        ),
        ("c3 --bucket mybucket", "write s3://mybucket, or ./mybucket for a local folder"),
    ],
)
def test_what_cannot_go_on_is_said_in_a_line(
    bucket: Path, digits: Dataset, answer: Answer, arguments: str, message: str
) -> None:
    shutil.copytree(bucket / "runs/c1", bucket / "runs/c2")
    change(bucket, "c2", recipe=manifest_of(bucket, "c1").recipe | {"seed": 1})
    shutil.copytree(bucket / "runs/c1", bucket / "runs/broken")
    (bucket / "runs/broken/manifest.json").write_text("{")
    before = {path: path.read_bytes() for path in bucket.rglob("*") if path.is_file()}
    words = [
        word.replace("DIGITS", digits.store.url).replace("EMPTY", "") for word in arguments.split()
    ]
    code, said = answer("train", *words)
    assert code in (1, 2), said
    assert message in said and said.count("\n") == 1 and len(said) < 500
    assert {path: path.read_bytes() for path in bucket.rglob("*") if path.is_file()} == before


def test_many_differences_are_counted(bucket: Path) -> None:
    found = manifest_of(bucket, "c1")
    fresh = RunManifest(
        "c1", preset("imagenette").to_dict() | {"name": "digits"}, found.dataset, "w"
    )
    with pytest.raises(
        Exception, match=r"(; .*){4} and \d+ more; leave out what differs"
    ) as caught:
        check_resume(found, fresh, "here")
    assert "{" not in str(caught.value)


def make_anew(path: Path) -> None:
    images, seed = path.parent.parent / "images", ["--seed", "7", "--overwrite"]
    assert main(["shards", str(images), str(path), *seed]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda path: path.rename(path.with_name("old")),
            "the dataset of run c1 is gone: there is none at ",
        ),
        (make_anew, "the dataset of run c1 was made anew: "),
    ],
)
def test_a_dataset_that_is_not_the_runs_any_more(
    bucket: Path, answer: Answer, change: Callable[[Path], object], message: str
) -> None:
    saved = manifest_of(bucket, "c1").dataset | {"url": str(bucket / "datasets/noise")}
    path = bucket / "runs/c1/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dataset": saved}))
    change(bucket / "datasets/noise")
    for command in (
        ["train", "c1"],
        ["train", "c2", "--like", "c1"],
        ["eval", "c1", "--device", "cpu"],
    ):
        code, said = answer(*command)
        assert (
            code == 1 and message in said and "give --dataset with the address of the one" in said
        )
    assert not (bucket / "runs/c2").exists()


def test_a_run_like_another(bucket: Path, tmp_path: Path) -> None:
    attempt(tmp_path, "c2", "--like", "c1", "--set", "seed=5", point="claimed")
    first, second = manifest_of(bucket, "c1"), manifest_of(bucket, "c2")
    assert (second.recipe, second.dataset) == (first.recipe | {"seed": 5}, first.dataset)
    again = attempt(
        tmp_path, "c2", "--like", "c1", "--set", "seed=5", point="claimed"
    )  # the same command goes on
    assert manifest_of(bucket, "c2").fence == 2, again.output


def test_a_run_that_kept_nothing_begins_anew(bucket: Path, tmp_path: Path) -> None:
    change(bucket, "c1", checkpoints=[], metrics=[], status="failed")
    attempt(tmp_path, "c1", "--set", "seed=5", point="claimed")
    assert manifest_of(bucket, "c1").recipe == manifest_of(bucket, "c1").recipe | {"seed": 5}
    assert manifest_of(bucket, "c1").settings.model.name == "test_resnet"


def test_eval_takes_the_dataset_from_the_run(bucket: Path, answer: Answer) -> None:
    code, said = answer("eval", "c1", "--json", "--workers", "0", "--device", "cpu")
    assert code == 0, said
    assert json.loads(said)["dataset"] == manifest_of(bucket, "c1").dataset["url"]
    assert answer("eval", "c1.safetensors", "--device", "cpu") == (
        2,
        "wds-train: error: c1.safetensors does not say where a dataset is; give one with --dataset\n",
    )


def test_a_folder_of_images_is_sharded_if_asked(
    bucket: Path, small: str, tmp_path: Path, answer: Answer
) -> None:
    photos = shutil.copytree(Path(small).parent / "images", tmp_path / "my photos")
    before = sorted(photos.rglob("*"))
    code, said = answer("train", "--dataset", "./my photos")
    assert code == 1 and "make one of this folder: wds-train shards './my photos' my-photos" in said
    for _ in range(2):
        made = attempt(tmp_path, "--dataset", "./my photos", "--shard", *SETS, point="claimed")
    assert "is complete already" in made.output
    assert manifest_of(bucket, "my-photos-digits").dataset["url"] == str(
        bucket / "datasets/my-photos"
    )
    assert sorted(photos.rglob("*")) == before


def test_a_name_that_is_a_folder_here_too(bucket: Path, tmp_path: Path, answer: Answer) -> None:
    (tmp_path / "noise").mkdir()
    for command in ("inspect", "verify"):
        code, said = answer(command, "noise")
        assert code == 0, said
        assert (
            f"noise is the one at {bucket}/datasets/noise, not the folder ./noise (for that, write ./noise)"
            in said
        )


def test_all_runs_and_datasets_are_listed(bucket: Path, answer: Answer) -> None:
    shutil.copytree(bucket / "runs/c1", bucket / "runs/broken")
    (bucket / "runs/broken/manifest.json").write_text("{")
    (bucket / "datasets/half/train").mkdir(parents=True)
    code, said = answer("runs")
    assert code == 0
    assert (
        re.search(r"^broken +unusable$", said, re.M) and "broken/manifest.json is not JSON" in said
    )
    assert re.search(
        r"^c1 +interrupted +1/4 epochs +\d+\.\d\d % +test_resnet on noise, digits +\d\.\d MB +\d+ \w+ ago$",
        said,
        re.M,
    )
    code, said = answer("datasets")
    assert code == 0
    assert re.search(r"^half +unfinished$", said, re.M)
    assert re.search(
        r"^noise +complete +train 181, val 40 +2 classes +0\.\d MB +\d+ \w+ ago$", said, re.M
    )
    scored = next(c.metrics for c in manifest_of(bucket, "c1").checkpoints if c.metrics)
    _, said = answer("runs", "--json")
    rows = {row["name"]: row for row in json.loads(said[: said.rindex("]") + 1])}
    assert rows["c1"]["top1"] == max(scored["val/top1"], scored["val/top1_ema"])
    _, said = answer("datasets", "--json")
    assert json.loads(said)[1]["fingerprint"] == manifest_of(bucket, "c1").dataset["fingerprint"]


def test_an_empty_bucket_says_what_to_do(s3_url: str, answer: Answer) -> None:
    assert answer("runs", "--bucket", s3_url) == (
        0,
        f"there are no runs at {s3_url}/runs; begin one: wds-train train NAME --dataset DATASET\n",
    )
    assert answer("datasets", "--bucket", s3_url, "--json") == (0, "[]\n")


def test_what_lies_on_s3_is_listed(s3_url: str, begun: Path, answer: Answer) -> None:
    store = open_store(s3_url)
    for name in ("runs/c1/manifest.json", "runs/c2/manifest.json", "datasets/noise/manifest.json"):
        store.write(name, (begun / name.replace("c2", "c1")).read_bytes())
    _, said = answer("runs", "--bucket", s3_url, "--json")
    assert [row["name"] for row in json.loads(said)] == ["c1", "c2"]
    _, said = answer("datasets", "--bucket", s3_url, "--json")
    assert [(row["name"], row["written"] > 1e9) for row in json.loads(said)] == [("noise", True)]


def test_settings_come_from_a_file(
    bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Answer
) -> None:
    for name in ("WDS_BUCKET", "OTHER", "QUOTED", "EMPTY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("KEPT", "of the environment")
    lines = [
        "# a comment",
        "",
        f"WDS_BUCKET={bucket}",
        "export OTHER = a=b#c ",
        "QUOTED='x y'",
        "EMPTY=",
        "KEPT=no",
    ]
    (tmp_path / ".env").write_text("\ufeff" + "\r\n".join(lines))
    assert answer("inspect", "noise")[0] == 0
    assert [os.environ[name] for name in ("OTHER", "QUOTED", "EMPTY", "KEPT")] == [
        "a=b#c",
        "x y",
        "",
        "of the environment",
    ]


@pytest.mark.parametrize(
    "line", ["just words s3cret", "=s3cret", "1A=s3cret", "A='s3cret", "A=s3cret\0", "A-B=s3cret"]
)
def test_nonsense_in_the_file_is_named_by_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Answer, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text(f"# one\n{line}\n")
    assert answer("recipes") == (
        2,
        f"wds-train: error: {tmp_path}/.env, line 2, does not read KEY=VALUE; repair it or remove it\n",
    )
    (tmp_path / ".env").write_bytes(b"A=\xff\n")
    assert answer("recipes") == (
        2,
        f"wds-train: error: {tmp_path}/.env cannot be read as text; repair it or remove it\n",
    )
