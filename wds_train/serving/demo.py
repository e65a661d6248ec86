"""The page of `publish`, on this machine, with the answers of every checkpoint and some images of the validation."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from wds_train.checkpoint.begun import own_dataset
from wds_train.checkpoint.find import find_run
from wds_train.checkpoint.manifest import RunManifest
from wds_train.checkpoint.read import weights_of
from wds_train.errors import RunError, UsageError, WdsTrainError
from wds_train.models.weights import SUFFIX, Weights
from wds_train.serving.classify import sample
from wds_train.serving.prepare import both_kinds, prepared
from wds_train.serving.publish import footer
from wds_train.serving.space_folder import Space
from wds_train.tracking.console import say
from wds_train.transforms.jpeg import START

EXAMPLES = 8
CHECKPOINTS = 8  # that answer side by side; evenly taken, where more are kept


def serve(source: str, python: Path | None, port: int) -> int:
    """Serve the page of the run at `source`, or of that file, until it is stopped; its exit code."""
    interpreter = str(python or sys.executable)
    try:
        found = subprocess.run([interpreter, "-c", "import gradio, onnxruntime"], capture_output=True, check=False)
    except OSError as error:
        raise UsageError(f"--python {interpreter} cannot be run: {error.strerror}") from error
    if found.returncode:
        raise UsageError(
            f"{interpreter} has not both gradio and onnxruntime; `make demo` installs them beside, and starts this"
        )
    cpu = torch.device("cpu")
    space = (
        Space([prepared(source, cpu)], f"File {Path(source).name}") if source.endswith(SUFFIX) else _of_run(source, cpu)
    )
    # `kill` must end the page, too, and remove what it made.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with tempfile.TemporaryDirectory(prefix="wds-demo-") as folder:
        space.write(Path(folder))
        say(f"http://127.0.0.1:{port} (Ctrl-C ends it)")
        environment = os.environ | {"GRADIO_SERVER_PORT": str(port), "PYTHONDONTWRITEBYTECODE": "1"}
        page = subprocess.Popen([interpreter, "app.py"], cwd=folder, env=environment)
        try:
            if code := page.wait():
                raise RunError(f"the page ended with {code}; is port {port} taken? Choose another --port")
        except KeyboardInterrupt:
            pass
        finally:
            page.terminate()
            page.wait()
    return 0


def _of_run(url: str, device: torch.device) -> Space:
    choices = both_kinds(url, device)
    manifest, store = find_run(url)
    kind, known = choices[0].kind, {(weights.kind, weights.step) for weights in choices}
    older = [each for each in manifest.checkpoints if (kind, each.progress.step) not in known]
    chosen = sorted({round(place) for place in np.linspace(0, len(older) - 1, min(CHECKPOINTS, len(older)))})
    others = [weights_of(store, manifest, older[place], kind) for place in chosen]
    return Space(choices, footer(manifest), others, _examples(manifest, choices[0]))


def _examples(run: RunManifest, weights: Weights) -> list[tuple[str, bytes]]:
    """The first validation image of some classes, if they can be had."""
    try:
        split = own_dataset(run).split("val")
        labels = np.linspace(0, len(weights.classes) - 1, min(EXAMPLES, len(weights.classes))).round().astype(int)
        found = [(label, np.flatnonzero(split.index.label[:] == label)[:1].tolist()) for label in labels.tolist()]
        images = [(label, sample(split, number).read()) for label, numbers in found for number in numbers]
    except WdsTrainError as error:
        say(f"there are no examples: {error}")
        return []
    # Gradio goes by the name; the page's own reader by the content.
    return [(f"{label:05d}{'.jpg' if data.startswith(START) else '.png'}", data) for label, data in images]
