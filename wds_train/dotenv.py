"""Settings in the file `.env` of the current folder.

They count where the environment has none of that name. python-dotenv reads them.
"""

import re
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from wds_train.errors import UsageError

if TYPE_CHECKING:
    from dotenv.parser import Binding

FILE = ".env"
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def read_dotenv() -> None:
    """Put what the file says into the environment, unless that has the name.

    Raises:
        UsageError: The file is no text, or a line of it cannot be read. Then nothing of it is
            taken. The message names the line by its number and never shows its text, which may be a
            secret.
    """
    path = Path(FILE)
    # Some keep their virtual environment in a folder of this name.
    if not path.is_file():
        return
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path.absolute()} cannot be read as text; repair it or remove it"
        ) from error

    # Imported here since it takes a fifth of the time of `--help`: only for those who have a file.
    from dotenv import load_dotenv

    bad_line = _find_bad_line(text)
    if bad_line is not None:
        raise UsageError(
            f"{path.absolute()}, line {bad_line}, does not read KEY=VALUE; repair it or remove it"
        )
    load_dotenv(stream=StringIO(text))


def _find_bad_line(text: str) -> int | None:
    """Return the number of the first line that sets no variable and is not meant to; None if none.

    python-dotenv would skip it in silence.
    """
    from dotenv.parser import parse_stream

    for binding in parse_stream(StringIO(text)):
        if not _is_good(binding):
            # A binding begins with the blank lines before it.
            read = binding.original.string
            blank_lines = read[: len(read) - len(read.lstrip())].count("\n")
            return binding.original.line + blank_lines
    return None


def _is_good(binding: "Binding") -> bool:
    """Return True if a binding sets a variable, or is a comment or blank."""
    if binding.error:
        return False
    if binding.key is not None and not NAME.fullmatch(binding.key):
        return False
    # No variable can hold a NUL.
    return "\0" not in (binding.value or "")
