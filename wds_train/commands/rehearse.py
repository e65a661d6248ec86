"""`wds-train rehearse`: a spot instance's end on this machine, with what it costs in seconds."""

import argparse
import os
import sys
import tempfile
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(_: argparse.Namespace) -> int:
    from wds_train.cloud.rehearse import rehearse
    from wds_train.storage import embedded

    with tempfile.TemporaryDirectory(prefix="wds-rehearsal-") as folder:
        os.environ["WDS_HOME"] = folder  # the server and the run go with it
        embedded.ensure_running()  # one for all processes
        try:
            found = rehearse(Path(folder), lambda line: print(line, file=sys.stderr, flush=True))
        finally:
            embedded.stop()
    print(f"notice to commit   {found.commit:5.1f} s, at step {found.step}; AWS gives 120")
    print(f"notice to the end  {found.gone:5.1f} s")
    print(f"start to step {found.step + 1:4} {found.first_step:5.1f} s, of the replacement")
    return 0
