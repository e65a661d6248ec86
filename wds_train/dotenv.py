"""Settings in the file `.env` of the current folder, which stand where the environment has none."""

import os
import re
from pathlib import Path

from wds_train.errors import UsageError

NAME = ".env"
VALUE = r"""'(?P<one>[^']*)'|"(?P<two>[^"]*)"|(?P<bare>[^'"].*|)"""
LINE = re.compile(rf"(?:export +)?(?P<name>[A-Za-z_][A-Za-z0-9_]*) *= *(?:{VALUE})")


def read_dotenv() -> None:
    """Put each line `KEY=VALUE` into the environment, unless it has the key. `UsageError` with the line's number, and never its
    text, which may be a secret, where a line is none.
    """
    path = Path(NAME)
    if not path.is_file():  # or a folder: some keep their virtual environment there
        return
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path.absolute()} cannot be read as text; repair it or remove it") from error
    for number, line in enumerate(map(str.strip, lines), start=1):
        found = LINE.fullmatch(line)
        if found and line.isprintable():
            os.environ.setdefault(found["name"], found["one"] or found["two"] or found["bare"] or "")
        elif line and not line.startswith("#"):
            raise UsageError(f"{path.absolute()}, line {number}, does not read KEY=VALUE; repair it or remove it")
