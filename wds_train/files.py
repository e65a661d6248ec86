"""The folder of this machine's state."""

import os
from pathlib import Path


def home() -> Path:
    """The folder of this machine's state: $WDS_HOME, or `.wds` in the current folder."""
    return Path(os.environ.get("WDS_HOME", ".wds")).absolute()
