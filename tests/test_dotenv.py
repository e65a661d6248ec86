"""The file `.env` is read as python-dotenv reads it.

What that would skip in silence is refused by its line's number.
"""

import os
from pathlib import Path

import pytest
from dotenv import dotenv_values

from wds_train.cli import main
from wds_train.dotenv import read_dotenv
from wds_train.errors import UsageError

# The text of the file, and what it sets.
READ = {
    "a comment behind a value": ("A=s3://b # mine", {"A": "s3://b"}),
    "a comment behind a tab": ("A=1\t# mine", {"A": "1"}),
    "a comment behind a quoted value": (
        "A='x # y' # mine\nB=\"x # y\"# mine",
        {"A": "x # y", "B": "x # y"},
    ),
    "a hash without a blank": ("A=a#b\nB=#b", {"A": "a#b", "B": "#b"}),
    "a comment for a value": ("A= # mine\nB=\t#mine", {"A": "", "B": ""}),
    "lines of comments": ("# one\n  # two\n\nA=1\n#A=2", {"A": "1"}),
    "no value": ("A=\nB=''\nC=\"\"\nD= ", {"A": "", "B": "", "C": "", "D": ""}),
    "export": ("export A=1\nexport\tB = 2\n  export C='3'", {"A": "1", "B": "2", "C": "3"}),
    "blanks around": ("  A  =  x y  \n\tB\t=\t'  z '", {"A": "x y", "B": "  z "}),
    "a name of export": ("export=1\nexported=2", {"export": "1", "exported": "2"}),
    "escapes": (r'A="a\tb\nc\\d\"e\'f"', {"A": "a\tb\nc\\d\"e'f"}),
    "escapes that are none": (r'A="C:\dir \$x \#"', {"A": r"C:\dir \$x \#"}),
    "escapes in single quotes": (r"A='it\'s a\nb \\'", {"A": r"it's a\nb" + " \\"}),
    "no escapes without quotes": (r"A=a\nb\t\\", {"A": r"a\nb\t\\"}),
    "quotes within": ("A=it's \"so\"\nB=x'y'", {"A": 'it\'s "so"', "B": "x'y'"}),
    "lines within double quotes": (
        'A="one\ntwo # no\n\nthree"\nB=4',
        {"A": "one\ntwo # no\n\nthree", "B": "4"},
    ),
    "lines within single quotes": ("A='one\nB=two'\nC=3", {"A": "one\nB=two", "C": "3"}),
    "equal signs": ("A=b=c==\nB==", {"A": "b=c==", "B": "="}),
    "the last of two": ("A=1\nA=2", {"A": "2"}),
    "other variables": (
        "A=1\nB=${A}/x\nC=${NONE}y\nD=${NONE:-z}",
        {"A": "1", "B": "1/x", "C": "y", "D": "z"},
    ),
    "dollars that are none": ("A=pa$$w$A\nB='$B'", {"A": "pa$$w$A", "B": "$B"}),
    "a mark of the file's order": ("\ufeffA=1\nB=2", {"A": "1", "B": "2"}),
    "lines of Windows": (
        "A=1 # x\r\nB='2'\r\n\r\nC=\"3\r\n4\"\r\n",
        {"A": "1", "B": "2", "C": "3\n4"},
    ),
    "lines of an old Mac": ("A=1\rB=2", {"A": "1", "B": "2"}),
    "other letters": ("A=Füße 犬 # x", {"A": "Füße 犬"}),
    "a name alone": ("A\nB=1", {"B": "1"}),
    "a quoted name": ("'A'=1", {"A": "1"}),
    "nothing": ("", {}),
}
# The text of the file, and the line that is no setting.
REFUSED = {
    "words": ("A=1\njust words s3cret", 2),
    "words below empty lines": ("A=1\n\n\n  \njust words s3cret\nB=2", 5),
    "no name": ("=s3cret", 1),
    "a quote that is not closed": ("# x\nA='s3cret\nB=1", 2),
    "a double quote that is not closed": ('A=1\n\nA="s3cret', 3),
    "more behind a quote": ("A='x' s3cret", 1),
    "a colon for the equal sign": ("A: s3cret", 1),
    "a name that begins with a digit": ("1A=s3cret", 1),
    "a name with a dash": ("B=1\nA-B=s3cret", 2),
    "a name with a dot": ("A.B=s3cret", 1),
    "a name in double quotes": ('"A"=s3cret', 1),
    "a name of other letters": ("Ä=s3cret", 1),
    "a NUL": ("A=s3cret\0", 1),
    "below lines within quotes": ('A="1\n2\n3"\ns3 cret', 4),
    "after the lines of Windows": ("A=1\r\n\r\ns3 cret\r\n", 3),
}
NAMES = ("A", "B", "C", "D", "NONE", "export", "exported")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with none of the variables set; those that a test sets go with it."""
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return tmp_path


def found() -> dict[str, str]:
    return {name: os.environ[name] for name in NAMES if name in os.environ}


@pytest.mark.parametrize("what", READ)
def test_a_file_is_read_as_python_dotenv_does(here: Path, what: str) -> None:
    text, values = READ[what]
    (here / ".env").write_bytes(text.encode())
    read_dotenv()
    assert found() == values
    for name in values:
        del os.environ[name]
    theirs = dotenv_values(here / ".env", encoding="utf-8")
    assert values == {name: value for name, value in theirs.items() if value is not None}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_be_skipped_is_refused(
    here: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text, line = REFUSED[what]
    (here / ".env").write_bytes(text.encode())
    assert main(["recipes"]) == 2
    message = f"{here}/.env, line {line}, does not read KEY=VALUE; repair it or remove it"
    assert capsys.readouterr() == ("", f"wds-train: error: {message}\n")
    assert found() == {}, "nothing of a file that is wrong is taken"


def test_the_environment_comes_first(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A", "kept")
    monkeypatch.setenv("B", "")
    (here / ".env").write_text("A=1\nB=2\nC=${A}")
    read_dotenv()
    assert found() == {"A": "kept", "B": "", "C": "kept"}


@pytest.mark.parametrize("form", ["missing", "folder", "empty", "bytes", "unreadable link"])
def test_a_file_that_is_none(here: Path, form: str) -> None:
    path = here / ".env"
    if form == "folder":
        path.mkdir()
    elif form == "empty":
        path.touch()
    elif form == "bytes":
        path.write_bytes(b"A=1\nB=\xff\n")
        with pytest.raises(UsageError, match=r"\.env cannot be read as text"):
            read_dotenv()
    elif form == "unreadable link":
        path.symlink_to("nowhere")
    if form != "bytes":
        read_dotenv()
    assert found() == {}
