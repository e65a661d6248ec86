"""What the pages say is so: every command is one, blocks marked `run` run, and quoted messages are the code's own."""

import ast
import importlib.util
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wds_train.cli import main, parser

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MAKEFILE = (ROOT / "Makefile").read_text()
COMMAND = re.compile(
    r"(\$ )?([A-Z_]+=\S+ )*(\.venv/bin/)?(make|wds-train|python3?|torchrun|accelerate) .*"
)
OURS = ("wds_train.cli", "shards.make_shards")  # modules that are run as the command line
# What makes a documented training one of a second.
SMALL = "--workers 0 --init '' --set model.name=test_resnet --set model.init= --set schedule.epochs=1 --set batch=16 --set "
SMALL += (
    "schedule.warmup_epochs=0 --set data.size=32 --set data.eval_size=32 --set data.start_size=0"
)


@dataclass(frozen=True)
class Block:
    """A fenced block: ```` ```sh run ```` has the `kind` "sh run"."""

    page: Path
    kind: str
    text: str

    def commands(self) -> Iterator[list[str]]:
        """The words of each command, without comments, variables before it, and what it is piped into."""
        for line in self.text.replace("\\\n", " ").splitlines():
            if COMMAND.fullmatch(line):
                lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="|&;<>")
                lexer.whitespace_split = True
                words = [*lexer]
                end = next(
                    (i for i, word in enumerate(words) if re.fullmatch(r"[|&;<>]+", word)),
                    len(words),
                )
                words = words[
                    next(i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)) : end
                ]
                yield [words[0].removeprefix(".venv/bin/"), *words[1:]]


def blocks(page: Path) -> list[Block]:
    return [
        Block(page, *found)
        for found in re.findall(r"^```([^\n]*)\n(.*?)^```$", page.read_text(), re.M | re.S)
    ]


def made(words: list[str]) -> list[list[str]]:
    """The commands of ours that `make` would run; it refuses a target that is none, and we a variable that it does not use."""
    for name in (word.partition("=")[0] for word in words[1:] if "=" in word):
        assert re.search(rf"\$\({name}\)|,{name}[,)]", MAKEFILE), (
            f"the Makefile does not use {name}"
        )
    plan = subprocess.run(
        [*words, "-n"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert plan.returncode == 0, plan.stderr
    lines = [line for line in plan.stdout.splitlines() if line.startswith(".venv/bin/wds-train ")]
    return [shlex.split(line)[1:] for line in lines]


def typed(words: list[str]) -> list[list[str]]:
    """The command lines of wds-train that a command comes to; what else it names must exist."""
    if words[0] == "make":
        return made(words)
    if words[0] == "wds-train":
        return [words[1:]]
    if named := next((module for module in OURS if module in words), None):
        rest = words[words.index(named) + 1 :]
        return [rest if named == "wds_train.cli" else ["shards", *rest]]
    if words[1] == "-c":
        compile(words[2], "-c", "exec")
    elif words[1] == "-m" and words[2] not in ("venv", "pip"):
        assert importlib.util.find_spec(words[2]), words
        for path in (word for word in words[3:] if word.startswith("tests/")):
            assert (ROOT / path).exists(), path
    for path in (word for word in words if word.startswith("examples/")):
        assert (ROOT / path).exists(), path
    return []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_one(page: Path) -> None:
    for block in blocks(page):
        for words in block.commands():
            for arguments in typed(words):
                parser(arguments).parse_args(arguments)
    assert page.read_text().count("\n```") == 2 * len(blocks(page))
    unfenced = [
        line
        for line in page.read_text().splitlines()
        if COMMAND.fullmatch(line.removeprefix("    ")) and line[0] == " "
    ]
    assert not unfenced, "a command that is indented, not fenced, is not looked at"


def test_what_make_help_says() -> None:
    said = subprocess.run(
        ["make", "help"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    examples = re.findall(r"make [a-z]+(?: [A-Z]+=[^\s;]+)+", said.stdout)
    assert len(examples) >= 2
    for arguments in (arguments for line in examples for arguments in made(shlex.split(line))):
        parser(arguments).parse_args(arguments)


@pytest.fixture
def place(tmp_path: Path, aws_env: pytest.MonkeyPatch) -> Path:
    """A folder of a person's own, with photos of two kinds and a bucket; no server is needed."""
    for split, count in (("train", 20), ("test", 4)):
        for kind in ("cats", "dogs"):
            folder = tmp_path / "photos" / split / kind
            folder.mkdir(parents=True)
            for number in range(count):
                noise = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(noise).save(folder / f"{number}.png")
    shutil.copytree(tmp_path / "photos", tmp_path / "imagenet")
    aws_env.chdir(tmp_path)
    aws_env.setenv("WDS_HOME", str(tmp_path / "home"))
    aws_env.setenv("WDS_BUCKET", str(tmp_path / "bucket"))
    aws_env.setenv("WANDB_MODE", "offline")
    return tmp_path


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(block.kind.endswith("run") for block in blocks(page))],
    ids=lambda page: page.name,
)
def test_what_is_marked_runs(page: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the page's order, in one folder: its folders and its bucket are the test's."""
    here = {
        "/data/imagenet": "imagenet",
        "~/photos": "photos",
        "s3://my-bucket": "bucket",
        "photo.jpg": "photos/test/cats/0.png",
    }
    for block in (block for block in blocks(page) if block.kind.endswith("run")):
        text = block.text
        for name, instead in here.items():
            text = text.replace(name, str(place / instead))
        if block.kind == "python run":
            exec(compile(text, str(page), "exec"), {})
        for words in Block(page, "", text).commands():
            for arguments in typed(words):
                more = shlex.split(SMALL) if arguments[0] == "train" else []
                assert main([*arguments, *more]) == 0, (arguments, capsys.readouterr().err)


def text_of(node: ast.expr) -> str:
    """The text that an expression makes; what is filled in is a NUL."""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "\0"


def said_by_the_code() -> str:
    """Every text of the code, a line each."""
    files = [*(ROOT / "wds_train").rglob("*.py"), *(ROOT / "shards").rglob("*.py")]
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text()))]
    return "\n".join(
        text_of(node)
        for node in nodes
        if isinstance(node, ast.JoinedStr | ast.BinOp | ast.Constant)
    )


def test_the_messages_are_the_code_s() -> None:
    """docs/troubleshooting.md heads each entry by a message, `...` standing for what differs."""
    messages = re.findall(r"^### `(.*)`$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)
    texts = said_by_the_code()
    assert len(messages) >= 25
    patterns = {
        message: "[^\n]*".join(map(re.escape, message.split("..."))) for message in messages
    }
    assert not [message for message, pattern in patterns.items() if not re.search(pattern, texts)]
