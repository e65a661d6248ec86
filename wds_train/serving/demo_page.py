"""The page of `publish`, on this machine, with the answers of every checkpoint and some images of the validation."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from wds_train.checkpoint.find import find_run
from wds_train.checkpoint.restore import from_newest, weights_of
from wds_train.checkpoint.resume_checks import own_dataset
from wds_train.checkpoint.run_manifest import Checkpoint, RunManifest
from wds_train.checkpoint.scores import every_of
from wds_train.checkpoint.weight_choice import Choice
from wds_train.config.schedule import is_averaged
from wds_train.console import say
from wds_train.errors import RunError, UsageError, WdsTrainError
from wds_train.evaluation.per_class import describe_weights
from wds_train.images.jpeg import START
from wds_train.models.weights import SUFFIX, Weights
from wds_train.serving.calibrated import both_kinds, prepared
from wds_train.serving.classify import make_photo
from wds_train.serving.provenance import footer
from wds_train.serving.space_folder import Space
from wds_train.storage.base import Store

EXAMPLES = 8
END_SECONDS = 10.0  # for the page to remove what visitors sent
CHECKPOINTS = 8  # that answer side by side; evenly taken, where more are kept


def interpreter(python: str | None) -> Path:
    """Where `python` is, or this one, from any folder: the page runs in one of its own. `UsageError` where it lacks what the page
    imports.
    """
    called = python or sys.executable
    try:
        found = subprocess.run(
            [called, "-c", "import gradio, onnxruntime"], capture_output=True, check=False
        )
    except OSError as error:
        raise UsageError(f"--python {called} cannot be run: {error.strerror}") from error
    if found.returncode:
        raise UsageError(
            f"{called} has not both gradio and onnxruntime; `make demo` installs them beside, and starts this"
        )
    return Path(shutil.which(called) or called).absolute()


def refuse_taken(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # or the last page's connections would count
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise UsageError(
                f"--port {port} cannot be had ({error.strerror}); choose another"
            ) from error


def serve(source: str, python: str | None, port: int) -> int:
    """Serve the page of the run at `source`, or of that file, until it is stopped; its exit code."""
    refuse_taken(port)  # before a minute of exports
    command = [str(interpreter(python)), "app.py"]
    cpu = torch.device("cpu")
    space = (
        Space([prepared(source, cpu)], f"File {Path(source).name}")
        if source.endswith(SUFFIX)
        else _of_run(source, cpu)
    )
    # `kill` must end the page, too, and remove what it made.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with tempfile.TemporaryDirectory(prefix="wds-demo-") as folder:
        space.write(Path(folder))
        say(f"http://127.0.0.1:{port} (Ctrl-C ends it)")
        environment = os.environ | {"GRADIO_SERVER_PORT": str(port), "PYTHONDONTWRITEBYTECODE": "1"}
        page = subprocess.Popen(command, cwd=folder, env=environment)
        try:
            if code := page.wait():
                raise RunError(f"the page ended with {code}; what it said is above")
        except KeyboardInterrupt:
            pass
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)  # a second one would leave the folder
            page.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                page.wait(END_SECONDS)
            page.kill()
    return 0


def _of_run(url: str, device: torch.device) -> Space:
    manifest, store = find_run(url)
    return from_newest(store, manifest, lambda newest: _space(store, newest, device))


def _space(store: Store, manifest: RunManifest, device: torch.device) -> Space:
    choices = both_kinds(store, manifest, device)
    first = choices[0]
    say(f"the page begins with the {describe_weights(first)}")
    known = {(weights.kind, weights.step) for weights in choices}
    older = [
        each
        for each in _trained(manifest, first.kind)
        if (first.kind, each.progress.step) not in known
    ]
    chosen = sorted(
        {round(place) for place in np.linspace(0, len(older) - 1, min(CHECKPOINTS, len(older)))}
    )
    others = [weights_of(store, manifest, Choice(older[place], first.kind)) for place in chosen]
    return Space(choices, footer(manifest), others, _examples(manifest, first))


def _trained(run: RunManifest, kind: str) -> list[Checkpoint]:
    """The checkpoints whose `kind` weights are others than those that the training began with."""
    every = every_of(run.recipe)
    return [
        each for each in run.checkpoints if kind == "raw" or is_averaged(each.progress.step, every)
    ]


def _examples(run: RunManifest, weights: Weights) -> list[tuple[str, bytes]]:
    """The first validation image of some classes, if they can be had."""
    try:
        split = own_dataset(run).split("val")
        labels = (
            np.linspace(0, len(weights.classes) - 1, min(EXAMPLES, len(weights.classes)))
            .round()
            .astype(int)
        )
        found = [
            (label, np.flatnonzero(split.index.label[:] == label)[:1].tolist())
            for label in labels.tolist()
        ]
        images = [
            (label, make_photo(split, number).read())
            for label, numbers in found
            for number in numbers
        ]
    except WdsTrainError as error:
        say(f"there are no examples: {error}")
        return []
    # Gradio goes by the name; the page's own reader by the content.
    return [
        (f"{label:05d}{'.jpg' if data.startswith(START) else '.png'}", data)
        for label, data in images
    ]
