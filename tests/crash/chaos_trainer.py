"""Our trainer as ckpt-chaos can try it: what it changes on S3 is shown to the tool as events on files.

ckpt-chaos kills a process at each change of a file below a folder, {out}. A run in a local directory lies in that folder.
For a run on S3, each request that changes the store is shown as a file that is opened for writing before the request is
sent, and closed after its answer:

before   the process dies before the request is sent
torn     it dies when the server has answered, and before the trainer has seen the answer

Rank 1 changes nothing in a store. Its events are those of its part in each snapshot, which all ranks take together.
"""

import hashlib
import json
import os
import socket
import sys
import threading
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any

from trainers import CONTEXT, SETTINGS

CHANGES = (
    "put_object",
    "create_multipart_upload",
    "upload_part",
    "complete_multipart_upload",
    "abort_multipart_upload",
    "delete_object",
)
COMPLETING = ("put_object", "complete_multipart_upload")
EPOCHS = 2


class Server:
    """Does the work of each `chaos_client` in a process of its own, forked with PyTorch imported."""

    def __init__(self, folder: Path, dataset: str, bucket: str) -> None:
        self.address = str(folder / "socket")
        self._folder = folder
        self._work = {"dataset": dataset, "bucket": bucket}
        self._count = 0
        self._listener = socket.socket(socket.AF_UNIX)

    def __enter__(self) -> "Server":
        self._listener.bind(self.address)
        self._listener.listen(64)
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed: the test is over
                return
            self._count += 1
            home = self._folder / f"{self._count:05d}"
            threading.Thread(target=self._answer, args=(client, home), daemon=True).start()

    def _answer(self, client: socket.socket, home: Path) -> None:
        with client, client.makefile() as lines:
            request = json.loads(lines.readline())
            home.mkdir()
            log = home / "log"
            log.touch()
            process = CONTEXT.Process(target=_work, args=(request, self._work, str(home)))
            process.start()
            connection.wait([client, process.sentinel])
            if process.is_alive():  # the tool has killed the client
                process.kill()
            process.join()
            answer = {"code": process.exitcode, "output": log.read_text(errors="replace")}
            try:
                client.sendall(json.dumps(answer).encode() + b"\n")
            except OSError:
                return


def _work(request: dict[str, Any], work: dict[str, str], home: str) -> None:
    """The body of a process that does what a client was asked for: `train PLACE OUT` or `result PLACE OUT`."""
    log = os.open(f"{home}/log", os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(log, number)
    os.environ.update(request["environment"] | {"WANDB_MODE": "disabled", "WDS_HOME": home})
    sys.path += os.environ.get("PYTHONPATH", "").split(os.pathsep)
    verb, place, out = request["arguments"]
    run = (
        f"{out}/run"
        if place == "directory"
        else f"{work['bucket']}/{Path(out).parent.name}-{_digest(out)[:8]}"
    )
    if verb == "result":
        print(_result(run))
        return
    rank = int(os.environ.get("RANK", "0"))
    folders = ("requests", "ckpt") if place == "s3" else ()
    for folder in folders:
        Path(out, folder).mkdir(parents=True, exist_ok=True)
    Path(out).mkdir(parents=True, exist_ok=True)
    _show_changes(Path(out), rank, on_s3=place == "s3")
    _arm(rank)
    _train(run, work["dataset"])


def _arm(rank: int) -> None:
    """Have ckpt-chaos count the changes from here on, and end this process at one of them, if it asks for that."""
    if "CKPT_CHAOS_WATCH" not in os.environ:  # a resume
        return
    if "CKPT_CHAOS_CRASH_AT" in os.environ:
        # The tool (0.1.8) gives this rank its point, and leaves out that it is the one to be killed.
        os.environ["CKPT_CHAOS_CRASH_RANK"] = str(rank)
    from ckpt_chaos.targets.common import arm_from_env

    arm_from_env(rank, lazy=True)


def _train(run: str, dataset: str) -> None:
    import torch

    from wds_train.cli import entry
    from wds_train.errors import NotFound

    torch.set_num_threads(1)
    try:
        manifest = _manifest(run)
    except NotFound:
        manifest = None
    if manifest is not None and manifest.status == "done":
        print(
            f"resuming at step {manifest.step} of {manifest.step} (epoch {EPOCHS}.00): the run is done",
            flush=True,
        )
    settings = [
        part for setting in (*SETTINGS, f"schedule.epochs={EPOCHS}") for part in ("--set", setting)
    ]
    options = ["--workers", "0", "--keep-every", "1"]
    sys.argv[1:] = ["train", "--dataset", dataset, "--run", run, *options, *settings]
    entry()


def _manifest(run: str) -> Any:
    from wds_train.checkpoint.lease import read_run
    from wds_train.storage.open import open_store

    return read_run(open_store(run))[0]


def _result(run: str) -> str:
    """Return the digest of all that a finished run has come to: weights, optimizer, records and result."""
    from outcomes import end_state

    snapshot, history, result = end_state(run)
    digest = hashlib.sha256()
    for name in sorted(snapshot.tensors):
        digest.update(name.encode())
        digest.update(snapshot.tensors[name].numpy().tobytes())
    digest.update(
        json.dumps(
            [snapshot.extra, str(snapshot.progress), history, result], sort_keys=True
        ).encode()
    )
    return digest.hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _show_changes(out: Path, rank: int, *, on_s3: bool) -> None:
    """Show the tool what it cannot see by itself."""
    from wds_train.storage.s3_connection import S3Connection
    from wds_train.training.engine import Trainer

    if rank:
        Trainer.snapshot = _shown(Trainer.snapshot, out / f"snapshot of rank {rank}")  # type: ignore[method-assign]
    elif on_s3:
        S3Connection.ask = _shown_request(S3Connection.ask, out)  # type: ignore[method-assign]


def _shown(function: Callable[..., Any], file: Path) -> Callable[..., Any]:
    def shown(*arguments: Any, **named: Any) -> Any:
        with file.open("w") as event:
            event.write("begun, ")
            result = function(*arguments, **named)
            event.write("ended")
        return result

    return shown


def _shown_request(ask: Callable[..., Any], out: Path) -> Callable[..., Any]:
    def shown(s3: Any, verb: str, key: str, **details: Any) -> Any:
        if verb not in CHANGES:
            return ask(s3, verb, key, **details)
        name = "probe" if "probe-" in key else key.replace("/", " ")
        with (out / "requests" / f"{verb} {name}").open("w") as event:
            event.write(f"{verb} {key}\n")
            answer = ask(s3, verb, key, **details)
            if verb in COMPLETING and key.startswith("ckpt/"):
                # The tool takes it for a whole checkpoint from here on. It does not count links as changes.
                (out / key).symlink_to(__file__)
        return answer

    return shown
