"""Mistakes of a first day, as a table: each ends as one line on stderr with the value, the cause and the remedy, and leaves nothing."""

import argparse
import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wds_train.cli import COMMANDS, main, parser
from wds_train.config.numbers import Number

TINY = "--set model.name=test_resnet --set schedule.epochs=1 --set schedule.warmup_epochs=0 --set data.size=16"
TINY += " --set data.eval_size=16 --set batch=16 --workers 0"
TRAIN = f"train --dataset small --run new {TINY}"

# What is typed, the exit code, and what the line says, part by part: the value, the cause, the remedy.
MISTAKES = [
    # Commands and arguments
    ("", 2, "required: COMMAND; see wds-train --help"),
    ("trian", 2, "no command 'trian'; did you mean train?"),
    ("resume first", 2, "no command 'resume'; see wds-train --help"),
    ("train --recpie digits", 2, "no argument '--recpie'; did you mean --recipe"),
    ("train --dataset", 2, "--dataset: expected one argument; see wds-train train --help"),
    ("order", 2, "required: DATASET; see wds-train order --help"),
    ("inspect small medium", 2, "no argument 'medium'; see wds-train inspect --help"),
    (
        "eval first --dataset small --tta flop",
        2,
        "--tta: invalid choice: 'flop' (choose from|flip|see wds-train eval",
    ),
    ("bench decod", 2, "invalid choice: 'decod' (choose from|decode"),
    # Numbers out of their range
    (
        "shards photos --hold-out 2",
        2,
        "--hold-out: '2' is not a number of at least 0 and less than 1; see",
    ),
    ("shards photos --quality 500", 2, "--quality: '500' is not a whole number from 1 to 100; see"),
    ("shards photos --processes 0", 2, "--processes: '0' is not a whole number of at least 1; see"),
    ("shards photos --shard-mb -1", 2, "--shard-mb: '-1' is not a number of more than 0; see"),
    (
        "shards photos --max-bad all",
        2,
        "--max-bad: 'all' is not a number of at least 0 and less than 1; see",
    ),
    ("order small --workers two", 2, "--workers: 'two' is not a whole number of at least 0; see"),
    ("order small --epoch -1", 2, "--epoch: '-1' is not a whole number of at least 0; see"),
    (
        "train --commit-minutes nan",
        2,
        "--commit-minutes: 'nan' is not a number of more than 0; see",
    ),
    ("train --cache-gb inf", 2, "--cache-gb: 'inf' is not a number of more than 0; see"),
    (
        "eval first --dataset small --crop 1.5",
        2,
        "--crop: '1.5' is not a number of more than 0 and at most 1; see",
    ),
    ("status first --price free", 2, "--price: 'free' is not a number of at least 0; see"),
    ("rollback first --to last", 2, "--to: 'last' is not a whole number of at least 0; see"),
    # Recipes
    ("train --recipe imagnet", 2, "no recipe 'imagnet'; did you mean imagenette?"),
    (f"{TRAIN} --set lr=0.1", 2, "--set knows no 'lr'; did you mean optimizer.lr?"),
    (f"{TRAIN} --set optimizer.lr", 2, "--set 'optimizer.lr' must read NAME=VALUE"),
    (f"{TRAIN} --set optimizer.lr=fast", 2, "--set optimizer.lr='fast' is not a number"),
    (
        f"{TRAIN} --set optimizer.lr=-1",
        2,
        "optimizer.lr = -1.0 cannot work: it must be a positive number",
    ),
    (
        f"{TRAIN} --set schedule.warmup_epochs=3",
        2,
        "schedule.warmup_epochs = 3.0|less than schedule.epochs (1)",
    ),
    (
        f"{TRAIN} --set schedule.kind=cosinus",
        2,
        "schedule.kind='cosinus' is none of cosine, linear, step, onecycle",
    ),
    (
        f"{TRAIN} --set model.name=resnet5O",
        2,
        "timm has no model 'resnet5O'; did you mean resnet50",
    ),
    (f"{TRAIN} --set optimizer.name=adamm", 2, "'adamm'|did you mean adam"),
    (f"{TRAIN} --set data.auto_augment=random", 2, "data.auto_augment|'random'|rand-m"),
    (
        f"{TRAIN} --set batch=4096",
        2,
        "181 samples to train on, fewer than one global batch of 4096; set a smaller one, --set batch=",
    ),
    (
        f"{TRAIN} --accumulate 999",
        2,
        "16 samples of a batch cannot be cut into 999 micro-batches; give --accumulate a divisor of 16",
    ),
    (
        f"{TRAIN} --init best.pt",
        1,
        "no file best.pt; `wds-train export RUN --to best.pt` makes one",
    ),
    (
        f"{TRAIN} --init none.safetensors",
        1,
        "no file none.safetensors; `wds-train export RUN --to none.safetensors`",
    ),
    (
        f"{TRAIN} --init ./notes.safetensors",
        1,
        "notes.safetensors is no safetensors file (|; `wds-train export RUN --to FILE` makes one",
    ),
    (f"{TRAIN} --mix other", 2, "'other' is not DATASET=SHARE with a share between 0 and 1"),
    (f"{TRAIN} --mix other=0.25", 1, "no dataset at|datasets/other"),
    # Names and addresses
    (
        f"train --dataset smal --run new {TINY}",
        1,
        "no dataset at|datasets/smal (|check the address",
    ),
    (
        f"train --dataset photos/small --run new {TINY}",
        2,
        "'photos/small'|write ./photos/small, or s3://photos/small",
    ),
    (
        f"train --dataset small --run '' {TINY}",
        2,
        "'' cannot be a run's name: use at most 100 letters",
    ),
    (f"train --dataset small --run my/run {TINY}", 2, "'my/run'|write ./my/run, or s3://my/run"),
    (f"train --dataset small --run 'my run' {TINY}", 2, "'my run' cannot be a run's name: use"),
    (
        "train --bucket my-bucket",
        2,
        "--bucket 'my-bucket' names no place; write s3://my-bucket, or ./my-bucket",
    ),
    (
        "inspect s3:/bucket/x",
        2,
        "'s3:/bucket/x' is neither an address nor a name; write s3://bucket/x",
    ),
    (
        "inspect https://b.s3.eu-west-1.amazonaws.com/x",
        2,
        "is neither an address nor a name; write s3://b/x",
    ),
    (
        "inspect gs://bucket/x",
        2,
        "'gs://bucket/x' is neither an address nor a name; it is s3://BUCKET/PREFIX",
    ),
    (
        "inspect ./photos",
        1,
        "no dataset at|photos (no manifest.json)|make one of this folder: wds-train shards ./photos photos",
    ),
    ("inspect first", 1, "no dataset at|datasets/first"),
    ("verify nothing", 1, "no dataset and no run at|nothing|check the address"),
    ("status frist", 1, "no run at|runs/frist (no manifest.json); check the address"),
    (
        "status ./bucket/datasets/small",
        1,
        "small/manifest.json is not a wds-train run manifest; choose another run name",
    ),
    ("export first --to weights.pt", 2, "--to weights.pt must end in .safetensors"),
    (
        "export first --to missing/weights.safetensors",
        2,
        "there is no folder missing; make it first",
    ),
    (
        "export first --step 5 --to weights.safetensors",
        2,
        "first has no checkpoint of step 5; it has those of 11",
    ),
    ("rollback first --to 5", 2, "first has no checkpoint of step 5; it has those of 11"),
    ("eval ./notes.safetensors --dataset small", 1, "notes.safetensors"),
    ("eval ./none.safetensors --dataset small", 1, "none.safetensors"),
    ("eval first --dataset small --split test", 1, "test|train, val"),
    (
        "eval first --dataset ./bucket/datasets/three",
        2,
        "it knows 2 classes, the dataset has 3; use a dataset of the classes",
    ),
    # Sources
    (
        "shards fotos",
        2,
        "'fotos' does not exist; SOURCE is 'digits', a path, hf:ID, torchvision:CLASS or wds:PATH",
    ),
    (
        "shards s3://bucket/tars",
        2,
        "'s3://bucket/tars' does not exist|wds-train shards index s3://bucket/tars",
    ),
    ("shards notes.txt", 2, "notes.txt|give the folder of the images"),
    ("shards empty", 1, "empty"),
    ("shards photos", 1, "photos|class"),
    ("shards one", 1, "one"),
    ("shards two two/shards", 2, "'two/shards'|write ./two/shards"),
    ("shards two ./two/shards", 2, "overlap|choose a destination beside the source"),
    ("shards two /proc/nope", 1, "no folder can be made at /proc/nope/.wip|choose another place"),
    ("shards two small --processes 1", 2, "small|was begun with other settings|--overwrite"),
    ("shards two --source imagefoldr", 2, "--source: invalid choice: 'imagefoldr'|imagefolder"),
    ("shards torchvision:Nothing", 2, "Nothing"),
    (
        "shards two --executor localhost:8786",
        2,
        "--executor: 'localhost:8786' is not of the form dask://HOST:PORT",
    ),
    (
        "shards index ./photos",
        2,
        "photos holds no .tar files; check the address; .tar.gz must be unpacked",
    ),
]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, small: str) -> Path:
    """A folder as people have them: photos, notes, and a bucket with datasets and a run."""
    desk = tmp_path_factory.mktemp("desk")
    photo = Image.fromarray(np.zeros((16, 16, 3), np.uint8))
    for place in (
        "photos",
        "one/cats",
        "two/cats",
        "two/dogs",
        "three/a",
        "three/b",
        "three/c",
    ):
        (desk / place).mkdir(parents=True)
        for number in range(3):
            photo.save(desk / place / f"{number}.png")
    (desk / "empty").mkdir()
    for name in ("notes.txt", "notes.safetensors"):
        (desk / name).write_text("milk, bread")
    shutil.copytree(small, desk / "bucket/datasets/small")
    bucket = ["--bucket", str(desk / "bucket")]
    before = Path.cwd()
    os.chdir(desk)  # where .wds belongs, too
    assert main(["shards", str(desk / "three"), "three", "--processes", "1", *bucket]) == 0
    assert main(["train", "--dataset", "small", "--run", "first", *bucket, *TINY.split()]) == 0
    os.chdir(before)
    return desk


@pytest.fixture
def at_desk(desk: Path, aws_env: pytest.MonkeyPatch) -> Iterator[Path]:
    aws_env.chdir(desk)
    aws_env.setenv("WDS_BUCKET", str(desk / "bucket"))
    aws_env.setenv("WDS_HOME", str(desk / "home"))
    yield desk


def listed(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("typed", "code", "message"), MISTAKES, ids=[typed[:60] for typed, *_ in MISTAKES]
)
def test_a_mistake_is_one_line(
    at_desk: Path, capsys: pytest.CaptureFixture[str], typed: str, code: int, message: str
) -> None:
    before = listed(at_desk)
    got = main(shlex.split(typed))
    # What the command was at when it met the mistake may stand before.
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.endswith(" ...")]
    assert (got, len(lines)) == (code, 1), lines
    assert lines[0].startswith("wds-train: error: ")
    assert all(part in lines[0] for part in message.split("|")), lines
    assert listed(at_desk) == before


def test_there_are_fifty() -> None:
    assert len({typed for typed, *_ in MISTAKES}) >= 50


def actions(one: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The arguments of a parser, and of those of its commands."""
    for action in one._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from actions(inner)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_number_says_its_range(command: str) -> None:
    for action in actions(parser([command])):
        assert action.type not in (int, float), (
            f"{action.option_strings}: what may it be? Use a Number"
        )
        if isinstance(action.type, Number):
            assert action.help and action.help.endswith(f"[{action.type}]")
