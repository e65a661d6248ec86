"""What is typed behind `make TARGET` reaches the program as it was typed, whatever characters it holds."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from wds_train.cli import parser
from wds_train.storage.address import resolve_address

ROOT = Path(__file__).parent.parent
MAKEFILE = (ROOT / "Makefile").read_text()
NOTED = "noted.json"
# Stands in for every program that a recipe starts: the words that it got, as JSON.
PROGRAM = f"""#!{sys.executable}
import json, sys
with open({NOTED!r}, "a") as file:
    file.write(json.dumps(sys.argv) + "\\n")
"""
LOCKS = (
    "requirements",
    *(
        f"requirements-{name}"
        for name in ("uv", "demo", "infra", "sky", "notebook", "peers", "chaos")
    ),
)

# Target, setting, and what the program is to get for the VALUE of it; the rest of its words is the target's own.
TYPED = [
    ("shards", "SOURCE", ["shards", "--", "VALUE"]),
    ("shards", "DATASET", ["shards", "--", "digits", "VALUE"]),
    ("shards", "BUCKET", ["shards", "--bucket=VALUE", "--", "digits"]),
    ("train", "DATASET", ["train", "--dataset=VALUE"]),
    ("train", "RUN", ["train", "--run=VALUE"]),
    ("train", "RECIPE", ["train", "--recipe=VALUE"]),
    ("train", "BUCKET", ["train", "--bucket=VALUE"]),
    ("plan", "RECIPE", ["plan", "--recipe=VALUE"]),
    ("plan", "INSTANCE", ["plan", "--instance=VALUE"]),
    ("plan", "DATASET", ["plan", "--dataset=VALUE"]),
    ("plan", "BUCKET", ["plan", "--bucket=VALUE"]),
    ("report", "RUN", ["report", "--out=report", "--", "VALUE"]),
    ("report", "OUT", ["report", "--out=VALUE", "--", "digits"]),
    ("report", "BUCKET", ["report", "--out=report", "--bucket=VALUE", "--", "digits"]),
    ("wandb-sync", "RUN", ["wandb", "--", "VALUE"]),
    ("wandb-sync", "BUCKET", ["wandb", "--bucket=VALUE", "--", "digits"]),
    ("launch", "RUN", ["launch", "--", "VALUE"]),
    ("launch", "BUCKET", ["launch", "--bucket=VALUE"]),
    ("launch", "RECIPE", ["launch", "--recipe=VALUE"]),
    ("launch", "REGION", ["launch", "--region=VALUE"]),
    ("launch", "CHECK", ["launch", "--check"]),
    ("status", "RUN", ["status", "--machines", "--", "VALUE"]),
    ("status", "BUCKET", ["status", "--machines", "--bucket=VALUE"]),
    ("status", "REGION", ["status", "--machines", "--region=VALUE"]),
    ("logs", "RUN", ["logs", "--", "VALUE"]),
    ("logs", "REGION", ["logs", "--region=VALUE"]),
    ("stop", "RUN", ["stop", "--", "VALUE"]),
    ("stop", "REGION", ["stop", "--region=VALUE"]),
    ("destroy", "RUN", ["destroy", "--", "VALUE"]),
    ("destroy", "REGION", ["destroy", "--region=VALUE"]),
    ("leftovers", "REGION", ["leftovers", "--region=VALUE"]),
    ("demo", "RUN", ["demo", "--python", ".venv-demo/bin/python", "--", "VALUE"]),
    (
        "demo",
        "BUCKET",
        ["demo", "--python", ".venv-demo/bin/python", "--bucket=VALUE", "--", "digits"],
    ),
    ("rehearse", "RUN", ["rehearse", "--", "VALUE"]),
    ("rehearse", "BUCKET", ["rehearse", "--bucket=VALUE"]),
    ("rehearse", "REGION", ["rehearse", "--region=VALUE"]),
]
# What the program gets of a target without settings, where that is more than the target's name.
WITHOUT = {
    "shards": ["shards", "--", "digits"],
    "report": ["report", "--out=report", "--", "digits"],
    "wandb-sync": ["wandb", "--", "digits"],
    "status": ["status", "--machines"],
    "demo": ["demo", "--python", ".venv-demo/bin/python", "--", "digits"],
}
VALUES = [
    "./my photos",
    "two  blanks and a\ttab",
    "it's mine",
    "'quoted'",
    'so "called"',
    "price$b",
    "$$(echo)",
    "$(shell touch pwned)",
    "${HOME}/x $HOME",
    "open $( bracket",
    "`touch pwned`",
    "a; touch pwned",
    "a & b && c || d | e > f < g",
    "back\\slash\\",
    "\\'",
    "-leading",
    "--help",
    "glob * ? [a] {b,c} ~ !x",
    "hash # and % and , and :=",
    "Füße 犬 😀",
    "behind ",
]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the Makefile, in which everything seems to be installed, and every program is the stand-in."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in (*(f"{lock}.lock" for lock in LOCKS), "pyproject.toml"):
        (tmp_path / name).touch()
    for name in ("", "-demo", "-infra", "-sky", "-notebook", "-peers", "-chaos"):
        folder = tmp_path / f".venv{name}" / "bin"
        folder.mkdir(parents=True)
        for program in ("wds-train", "python", "uv"):
            (folder / program).write_text(PROGRAM)
            (folder / program).chmod(0o755)
        (folder.parent / ".installed").touch()
    return tmp_path


def make(checkout: Path, *words: str, **environment: str) -> list[list[str]]:
    """The words that each program got which `make WORDS...` started."""
    noted = checkout / NOTED
    noted.unlink(missing_ok=True)
    done = subprocess.run(
        ["make", *words],
        cwd=checkout,
        env={"PATH": os.environ["PATH"], "HOME": str(checkout)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not (checkout / "pwned").exists()
    return [json.loads(line) for line in noted.read_text().splitlines()]


def filled(words: list[str], value: str) -> list[str]:
    return [".venv/bin/wds-train", *(word.replace("VALUE", value) for word in words)]


@pytest.mark.parametrize(
    ("target", "name", "words"), TYPED, ids=[f"{row[0]}-{row[1]}" for row in TYPED]
)
def test_every_setting_of_every_target_is_one_word(
    checkout: Path, target: str, name: str, words: list[str]
) -> None:
    value = "a blank, a 'quote', a \"quote\" and $b"
    assert make(checkout, target, f"{name}={value}") == [filled(words, value)]
    assert make(checkout, target, **{name: value}) == [filled(words, value)]
    assert make(checkout, target, f"{name}=") == [filled(WITHOUT.get(target, [target]), "")]


def test_the_table_has_every_setting_of_every_target() -> None:
    used = set()
    for target, recipe in re.findall(r"^([a-z-]+):.*##.*\n((?:\t.*\n)+)", MAKEFILE, re.M):
        names = set(re.findall(r"\$\(call (?:flag|named),([A-Z]+)", recipe))
        names |= {"CHECK"} if "$(CHECK)" in recipe else set()
        names |= {"RUN"} if "$(run)" in recipe else set()
        used |= {(target, name) for name in names}
    assert used == {(target, name) for target, name, _ in TYPED}


@pytest.mark.parametrize("value", VALUES)
def test_a_value_may_hold_anything(checkout: Path, value: str) -> None:
    wanted = [filled(["shards", f"--bucket={value}", "--", value, value], value)]
    names = ("BUCKET", "SOURCE", "DATASET")
    assert make(checkout, "shards", *(f"{name}={value}" for name in names)) == wanted
    assert make(checkout, "shards", **dict.fromkeys(names, value)) == wanted


@pytest.mark.parametrize("value", [value for value in VALUES if value != "--help"])
def test_the_program_reads_what_it_got(checkout: Path, value: str) -> None:
    (words,) = make(checkout, "shards", f"BUCKET={value}", f"SOURCE={value}", f"DATASET={value}")
    args = parser(words[1:]).parse_args(words[1:])
    assert (args.bucket, args.source, args.dataset) == (value, value, value)
    (words,) = make(checkout, "report", f"RUN={value}", f"OUT=x{value}")
    args = parser(words[1:]).parse_args(words[1:])
    assert (args.run, str(args.out)) == (value, f"x{value}")


def test_a_tilde_is_the_home_folder_though_no_shell_reads_it(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(checkout))
    (words,) = make(checkout, "report", "OUT=~/my report")
    assert parser(words[1:]).parse_args(words[1:]).out == checkout / "my report"
    (words,) = make(checkout, "train", "DATASET=~/my photos", "BUCKET=~/my bucket")
    args = parser(words[1:]).parse_args(words[1:])
    assert resolve_address(args.dataset, "datasets", args.bucket) == f"{checkout}/my photos"
    assert (
        resolve_address("digits", "datasets", args.bucket)
        == f"{checkout}/my bucket/datasets/digits"
    )


@pytest.mark.parametrize("target", sorted({target for target, *_ in TYPED}))
def test_without_settings_a_command_has_its_defaults(checkout: Path, target: str) -> None:
    assert make(checkout, target) == [filled(WITHOUT.get(target, [target]), "")]


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("--set a=b --cache-dir '/mnt/my disk'", ["--set", "a=b", "--cache-dir", "/mnt/my disk"]),
        ('--cache-dir "/mnt/it\'s"', ["--cache-dir", "/mnt/it's"]),
        ("--init '/data/a$b' --set 'x=$(1)'", ["--init", "/data/a$b", "--set", "x=$(1)"]),
        ("--init $HOME/a", ["--init", "HOME/a"]),
        ("--init my\\ disk", ["--init", "my disk"]),
        ("--set a=b\n  --set c=d\n", ["--set", "a=b", "--set", "c=d"]),
        ("", []),
    ],
)
def test_more_arguments_are_words_of_the_shell(
    checkout: Path, typed: str, words: list[str]
) -> None:
    words = [word.replace("HOME", str(checkout)) for word in words]
    assert make(checkout, "train", "RUN=a b", f"ARGS={typed}") == [
        [".venv/bin/wds-train", "train", "--run=a b", *words]
    ]
    assert make(checkout, "status", "RUN=-x", ARGS=typed)[0][3:] == [*words, "--", "-x"]
    assert make(checkout, "test-cpus", f"ARGS={typed}")[-1][8:] == words


@pytest.mark.parametrize("value", ["a\nb", "a\ntouch pwned", "a'\ntouch pwned\n'"])
def test_a_line_break_is_refused(checkout: Path, value: str) -> None:
    for words, more in (["train", f"RUN={value}"], {}), (["train"], {"RUN": value}):
        done = subprocess.run(
            ["make", *words],
            cwd=checkout,
            env=os.environ | more,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, "RUN holds a line break" in done.stderr) == (2, True)
    assert not {"pwned", NOTED} & {path.name for path in checkout.iterdir()}


@pytest.mark.parametrize("name", ["demo", "infra", "sky", "notebook", "peers"])
def test_an_environment_of_its_own_holds_what_its_lock_lists(checkout: Path, name: str) -> None:
    (checkout / "my python").write_text(PROGRAM)
    (checkout / "my python").chmod(0o755)
    folder = checkout / f".venv-{name}"
    (folder / ".installed").unlink()
    made, *installed = make(checkout, f".venv-{name}/.installed", "PYTHON=./my python")
    assert made == ["./my python", "-m", "venv", "--without-pip", f".venv-{name}"]
    assert [words[-1] for words in installed] == [
        f"requirements-{name}.lock",
        *(["."] if name in ("notebook", "peers") else []),
    ]
    assert all(f".venv-{name}/bin/python" in words for words in installed)
    assert (folder / ".installed").exists()
