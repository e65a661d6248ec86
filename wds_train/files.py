"""The folder of this machine's state."""

import os
from pathlib import Path


def home() -> Path:
    """Return the folder of this machine's state: $WDS_HOME, or `.wds` in the current folder.

    The embedded server's data, the shared indexes, spools and reports are in it.
    """
    return Path(os.environ.get("WDS_HOME", ".wds")).absolute()
