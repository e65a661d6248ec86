"""A spot instance's end, rehearsed on this machine: a real training, a metadata service that gives it notice, and its
replacement, on an S3 server of their own.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from wds_train.checkpoint.find import find_run
from wds_train.checkpoint.restore import read_records
from wds_train.errors import Interrupted, RunError
from wds_train.storage.address import EMBEDDED_BUCKET

RUN = f"s3://{EMBEDDED_BUCKET}/runs/rehearsal"
# Small, and so long that it still trains when it sees the notice; of five steps an epoch, so that each is logged.
SETTINGS = (
    "model.name=test_resnet",
    "batch=256",
    "schedule.epochs=1000",
    "schedule.warmup_epochs=1",
)
TRAINING = [
    "train",
    "--run",
    RUN,
    "--workers",
    "0",
    *(part for each in SETTINGS for part in ("--set", each)),
]
EPOCH, SHOWN = re.compile(r"epoch +\d+/"), re.compile(r"run  |resuming|wds-train: ")
NOTICE_SECONDS = 120.0


@dataclass(frozen=True)
class Rehearsal:
    """Seconds from the notice to the commit of `step`, and to the end of the process; and from the replacement's start to
    the end of its first step.
    """

    step: int
    commit: float
    gone: float
    first_step: float


class Metadata(ThreadingHTTPServer):
    """EC2's metadata service (IMDSv2), as much of it as a notice takes: `documents` by their paths."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.documents: dict[str, bytes] = {}

    def give_notice(self) -> None:
        end = datetime.now(UTC) + timedelta(seconds=NOTICE_SECONDS)
        action = {"action": "terminate", "time": f"{end:%Y-%m-%dT%H:%M:%SZ}"}
        self.documents["/latest/meta-data/spot/instance-action"] = json.dumps(action).encode()

    @contextmanager
    def serving(self) -> Iterator[str]:
        """Its address, as long as it answers."""
        threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()
        try:
            yield f"http://127.0.0.1:{self.server_port}"
        finally:
            self.shutdown()
            self.server_close()


class _Answers(BaseHTTPRequestHandler):
    server: Metadata

    def do_PUT(self) -> None:
        self._answer(b"token")

    def do_GET(self) -> None:
        self._answer(self.server.documents.get(self.path))

    def _answer(self, body: bytes | None) -> None:
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *_: object) -> None:
        pass


def rehearse(folder: Path, say: Callable[[str], None]) -> Rehearsal:
    """Train, give notice after the first epoch, train on; all that is kept is below `folder`, which is $WDS_HOME."""
    metadata = Metadata()
    with metadata.serving() as url:
        noticed: list[float] = []

        def notice(_: "subprocess.Popen[str]") -> None:
            noticed.append(time.time())
            metadata.give_notice()
            say("notice   as EC2 gives it, two minutes before it takes the instance")

        _attempt(url, folder, say, notice)
        gone = time.time()
        before = find_run(RUN)[0]
        metadata.documents.clear()
        started = time.time()
        _attempt(url, folder, say, lambda training: training.terminate())
    after, store = find_run(RUN)
    segments = [each for each in after.metrics if each.fence == after.fence]
    stepped = min(row["time/unix"] for each in segments for row in read_records(store, each))
    return Rehearsal(before.step, before.written - noticed[0], gone - noticed[0], stepped - started)


def _attempt(
    url: str,
    folder: Path,
    say: Callable[[str], None],
    scored: Callable[["subprocess.Popen[str]"], None],
) -> None:
    """A training of its own process, some of whose lines are passed on; after its first epoch, `scored` ends it."""
    environment = os.environ | {"WDS_HOME": str(folder), "WDS_BUCKET": "", "WANDB_MODE": "disabled"}
    environment |= {"AWS_EC2_METADATA_SERVICE_ENDPOINT": url, "AWS_EC2_METADATA_DISABLED": "false"}
    command = [sys.executable, "-m", "wds_train.cli", *TRAINING]
    told, epochs = [], 0
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as training:
        try:
            for line in training.stderr or ():
                told.append(line)
                epochs += (epoch := bool(EPOCH.match(line)))
                if epochs <= 1 if epoch else SHOWN.match(line):
                    say(line.rstrip())
                if epoch and epochs == 1:
                    scored(training)
        except BaseException:
            training.kill()  # or it would train on for its thousand epochs, with nobody who knows of it
            raise
    if training.returncode != Interrupted.exit_code:
        raise RunError(
            f"the training ended with exit code {training.returncode}, not as interrupted: {''.join(told[-3:]).strip()}"
        )
