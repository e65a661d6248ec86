"""A rehearsal of a spot instance's end, on this machine, for `wds-train rehearse`.

A real training gets the notice from a fake metadata service, commits and stops. Its replacement
goes on. Both use the embedded S3 server, which has nothing else in it.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from wds_train.checkpoint.find import find_run
from wds_train.checkpoint.restore import read_records
from wds_train.checkpoint.run_manifest import RunManifest
from wds_train.errors import Interrupted, RunError
from wds_train.storage.address import EMBEDDED_BUCKET
from wds_train.storage.base import Store

RUN = f"s3://{EMBEDDED_BUCKET}/runs/rehearsal"
# A small model, and so many epochs that it still trains when it sees the notice. An epoch has five
# steps: each of them is logged.
TRAINING = (
    *("train", "--run", RUN, "--workers", "0"),
    *("--set", "model.name=test_resnet"),
    *("--set", "batch=256"),
    *("--set", "schedule.epochs=1000"),
    *("--set", "schedule.warmup_epochs=1"),
)
EPOCH = re.compile(r"epoch +\d+/")  # the line of a training after each epoch
SHOWN = re.compile(r"run  |resuming|wds-train: ")  # lines that are shown besides the first epoch's
NOTICE_SECONDS = 120.0  # from EC2's notice to the end of the instance
POLL_SECONDS = 0.05  # until the metadata service sees that it is to end

Process = subprocess.Popen[str]


@dataclass(frozen=True)
class Rehearsal:
    """The times of a rehearsal, in seconds.

    Attributes:
        step: The step that was committed.
        commit: From the notice to the commit.
        gone: From the notice to the end of the process.
        first_step: From the replacement's start to the end of its first step.
    """

    step: int
    commit: float
    gone: float
    first_step: float


class MetadataService(ThreadingHTTPServer):
    """As much of EC2's metadata service (IMDSv2) as a notice takes.

    Attributes:
        documents: The documents that it serves, by their paths.
    """

    def __init__(self) -> None:
        # Port 0: the system chooses a free one.
        super().__init__(("127.0.0.1", 0), _Handler)
        self.documents: dict[str, bytes] = {}

    def give_notice(self) -> None:
        """Announce the end of the instance, as EC2 does two minutes before it."""
        end = datetime.now(UTC) + timedelta(seconds=NOTICE_SECONDS)
        action = {"action": "terminate", "time": f"{end:%Y-%m-%dT%H:%M:%SZ}"}
        self.documents["/latest/meta-data/spot/instance-action"] = json.dumps(action).encode()

    @contextmanager
    def serving(self) -> Iterator[str]:
        """Serve while the context lasts, and yield the address."""
        arguments = {"poll_interval": POLL_SECONDS}
        threading.Thread(target=self.serve_forever, kwargs=arguments, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{self.server_port}"
        finally:
            self.shutdown()
            self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: MetadataService

    def do_PUT(self) -> None:
        self._answer(b"token")

    def do_GET(self) -> None:
        self._answer(self.server.documents.get(self.path))

    def _answer(self, body: bytes | None) -> None:
        if body is None:
            self.send_response(404)
            body = b""
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log nothing: the lines would be between those of the training."""


def rehearse(folder: Path, say: Callable[[str], None]) -> Rehearsal:
    """Train, give notice after the first epoch, and train on.

    Args:
        folder: The folder of all state, which is $WDS_HOME.
        say: Prints a line.

    Raises:
        RunError: A training did not end as interrupted.
    """
    metadata = MetadataService()
    with metadata.serving() as url:
        # The instance. It sees the notice, commits and stops.
        noticed: list[float] = []

        def give_notice(_: Process) -> None:
            noticed.append(time.time())
            metadata.give_notice()
            say("notice   as EC2 gives it, two minutes before it takes the instance")

        _train(url, folder, say, give_notice)
        gone = time.time()
        before, _ = find_run(RUN)

        # Its replacement, which is ended by a signal after an epoch of its own.
        metadata.documents.clear()
        started = time.time()
        _train(url, folder, say, Process.terminate)

    after, store = find_run(RUN)
    return Rehearsal(
        step=before.step,
        commit=before.written - noticed[0],
        gone=gone - noticed[0],
        first_step=_first_step_time(store, after) - started,
    )


def _first_step_time(store: Store, run: RunManifest) -> float:
    """Return the time at which the run's newest owner had done its first step."""
    times = []
    for segment in run.metrics:
        if segment.fence == run.fence:
            times += [row["time/unix"] for row in read_records(store, segment)]
    return min(times)


def _train(
    url: str, folder: Path, say: Callable[[str], None], after_epoch: Callable[[Process], None]
) -> None:
    """Train in a process until it is interrupted.

    Args:
        url: The address of the metadata service.
        folder: The folder of all state.
        say: Prints a line of the training.
        after_epoch: Called with the process after its first epoch. It lets the training end.

    Raises:
        RunError: The training did not end as interrupted.
    """
    # The embedded server and the metadata service of the rehearsal, whatever the person has set.
    environment = os.environ | {
        "WDS_HOME": str(folder),
        "WDS_BUCKET": "",
        "WANDB_MODE": "disabled",
        "AWS_EC2_METADATA_SERVICE_ENDPOINT": url,
        "AWS_EC2_METADATA_DISABLED": "false",
    }
    command = [sys.executable, "-m", "wds_train.cli", *TRAINING]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as training:
        try:
            lines = _follow(training, training.stderr or (), say, after_epoch)
        except BaseException:
            # Otherwise it would train on for its thousand epochs, and nobody would know of it.
            training.kill()
            raise
    if training.returncode != Interrupted.exit_code:
        raise RunError(
            f"the training ended with exit code {training.returncode}, not as interrupted: "
            f"{''.join(lines[-3:]).strip()}"
        )


def _follow(
    training: Process,
    output: Iterable[str],
    say: Callable[[str], None],
    after_epoch: Callable[[Process], None],
) -> list[str]:
    """Read the lines of a training until it ends, print some, and return all of them."""
    lines = []
    epochs = 0
    for line in output:
        lines.append(line)
        is_epoch = EPOCH.match(line) is not None
        epochs += is_epoch
        is_first_epoch = is_epoch and epochs == 1
        # More epochs may be done before the training sees the notice.
        if is_first_epoch or (not is_epoch and SHOWN.match(line)):
            say(line.rstrip())
        if is_first_epoch:
            after_epoch(training)
    return lines
