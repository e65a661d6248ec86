"""Settings in the file `.env` of the current folder, which stand where the environment has none."""

import re
from io import StringIO
from pathlib import Path

from wds_train.errors import UsageError

FILE = ".env"
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def read_dotenv() -> None:
    """Put what the file says into the environment, unless that has the name: read by python-dotenv.

    Raises:
        UsageError: The file is no text, or a line of it cannot be read. Then nothing of it is taken. The message names
            the line by its number and never shows its text, which may be a secret.
    """
    path = Path(FILE)
    if not path.is_file():  # or a folder: some keep their virtual environment there
        return
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path.absolute()} cannot be read as text; repair it or remove it"
        ) from error

    # Imported here since it takes a fifth of the time of `--help`: only for those who have a file.
    from dotenv import load_dotenv

    bad_line = _first_bad_line(text)
    if bad_line is not None:
        raise UsageError(
            f"{path.absolute()}, line {bad_line}, does not read KEY=VALUE; repair it or remove it"
        )
    load_dotenv(stream=StringIO(text))


def _first_bad_line(text: str) -> int | None:
    """The number of the first line that sets no variable and is not meant to; python-dotenv would skip it in silence."""
    from dotenv.parser import parse_stream

    for binding in parse_stream(StringIO(text)):
        named = binding.key is None or NAME.fullmatch(binding.key)
        if (
            binding.error or not named or "\0" in (binding.value or "")
        ):  # no variable can hold a NUL
            read = binding.original.string
            blank_lines = read[: len(read) - len(read.lstrip())].count("\n")
            return binding.original.line + blank_lines
    return None
