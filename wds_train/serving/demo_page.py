"""Serve the page of `publish` on this machine, for `wds-train demo`.

It has the answers of every checkpoint of a run, and some validation images to try.
"""

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
from wds_train.serving.calibrated_weights import load_both_kinds, load_calibrated
from wds_train.serving.classify import make_photo
from wds_train.serving.provenance import footer
from wds_train.serving.space_folder import Space
from wds_train.storage.base import Store

EXAMPLES = 8  # images to try
END_SECONDS = 10.0  # for the page to remove the images that visitors sent
# Older checkpoints that answer side by side. Each takes an export, and its model's memory.
CHECKPOINTS = 8
CPU = torch.device("cpu")


def serve(source: str, python: str | None, port: int) -> int:
    """Serve the page until it is stopped.

    Args:
        source: The address of a run, or an exported file.
        python: A Python that has the page's packages. Default: this one.
        port: The port on this machine.

    Returns:
        The exit code.

    Raises:
        UsageError: The port is taken, or the Python lacks a package.
        RunError: The page failed.
    """
    # These two before a minute of exports.
    refuse_taken(port)
    command = [str(find_interpreter(python)), "app.py"]
    if source.endswith(SUFFIX):
        space = Space([load_calibrated(source, CPU)], f"File {Path(source).name}")
    else:
        space = _space_of_run(source)

    # `kill` must end the page, too, and remove its folder.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with tempfile.TemporaryDirectory(prefix="wds-demo-") as folder:
        space.write(Path(folder))
        say(f"http://127.0.0.1:{port} (Ctrl-C ends it)")
        environment = os.environ | {"GRADIO_SERVER_PORT": str(port), "PYTHONDONTWRITEBYTECODE": "1"}
        page = subprocess.Popen(command, cwd=folder, env=environment)
        try:
            code = page.wait()
            if code:
                raise RunError(f"the page ended with {code}; what it said is above")
        except KeyboardInterrupt:
            pass
        finally:
            _end(page)
    return 0


def _end(page: "subprocess.Popen[bytes]") -> None:
    """End the page, which removes what its visitors sent."""
    # A second signal would interrupt this, and leave the folder.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    page.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        page.wait(END_SECONDS)
    page.kill()


def find_interpreter(python: str | None) -> Path:
    """Return the absolute path of a Python, since the page runs in another folder.

    Args:
        python: Its name or path. Default: the running one.

    Raises:
        UsageError: It cannot be run, or lacks a package that the page imports.
    """
    called = python or sys.executable
    command = [called, "-c", "import gradio, onnxruntime"]
    try:
        tried = subprocess.run(command, capture_output=True, check=False)
    except OSError as error:
        raise UsageError(f"--python {called} cannot be run: {error.strerror}") from error
    if tried.returncode:
        raise UsageError(
            f"{called} has not both gradio and onnxruntime; `make demo` installs them beside, and "
            "starts this"
        )
    return Path(shutil.which(called) or called).absolute()


def refuse_taken(port: int) -> None:
    """Raise `UsageError` if the page could not listen on `port`."""
    with socket.socket() as probe:
        # Otherwise connections that the last page had would count for a minute.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise UsageError(
                f"--port {port} cannot be had ({error.strerror}); choose another"
            ) from error


def _space_of_run(url: str) -> Space:
    manifest, store = find_run(url)
    # A run in training replaces checkpoints while they are read.
    return from_newest(store, manifest, lambda newest: _make_space(store, newest))


def _make_space(store: Store, manifest: RunManifest) -> Space:
    """Return the page of a run: the best weights of both kinds, and older ones to compare."""
    choices = load_both_kinds(store, manifest, CPU)
    first = choices[0]
    say(f"the page begins with the {describe_weights(first)}")

    # The other checkpoints answer with weights of the best kind.
    known = {(weights.kind, weights.step) for weights in choices}
    older = []
    for checkpoint in _trained_checkpoints(manifest, first.kind):
        if (first.kind, checkpoint.progress.step) not in known:
            older.append(checkpoint)
    others = []
    for place in _spread_evenly(len(older), CHECKPOINTS):
        others.append(weights_of(store, manifest, Choice(older[place], first.kind)))
    return Space(choices, footer(manifest), others, _read_examples(manifest, first))


def _spread_evenly(count: int, most: int) -> list[int]:
    """Return at most `most` of the places [0, count), the first and the last among them."""
    places = np.linspace(0, count - 1, min(most, count))
    return places.round().astype(int).tolist()


def _trained_checkpoints(run: RunManifest, kind: str) -> list[Checkpoint]:
    """Return the checkpoints whose `kind` weights differ from the first ones of the training."""
    every = every_of(run.recipe)
    trained = []
    for checkpoint in run.checkpoints:
        if kind == "raw" or is_averaged(checkpoint.progress.step, every):
            trained.append(checkpoint)
    return trained


def _read_examples(run: RunManifest, weights: Weights) -> list[tuple[str, bytes]]:
    """Return the first validation image of some classes, with names for their files.

    If the dataset cannot be read, that is printed, and there are none.
    """
    # The labels are spread over all classes, of which neighbours may look alike.
    examples = []
    try:
        split = own_dataset(run).split("val")
        labels = split.index.label[:]
        for label in _spread_evenly(len(weights.classes), EXAMPLES):
            samples = np.flatnonzero(labels == label)
            if len(samples) == 0:
                continue
            data = make_photo(split, int(samples[0])).read()
            # Gradio goes by the name; the page's own reader by the content.
            suffix = ".jpg" if data.startswith(START) else ".png"
            examples.append((f"{label:05d}{suffix}", data))
    except WdsTrainError as error:
        say(f"there are no examples: {error}")
        return []
    return examples
