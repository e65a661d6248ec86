"""Write a model's weights in formats that other programs read.

Each file is tried against our own model before it gets its name. `WRITERS` has a writer for every
--format of `wds-train export`.
"""

import io
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray

from wds_train.errors import RunError, UsageError, unwritable
from wds_train.models.weights import SUFFIX, Weights
from wds_train.serving.graph import INPUT, OUTPUTS, Graph, describe_model

METADATA = "wds-train"  # the entry of a file that holds the facts of `describe_model`
# The largest difference of logits, as a share of the largest logit. Other kernels add in another
# order, which changes the last digits; more is a model that lost something on the way.
SAME = 1e-5
SAME_ONNX = 1e-4

# Takes uint8 images [n, side, side, 3] to logits [n, classes].
Logits = Callable[[torch.Tensor], NDArray[np.float32]]


def write_safetensors(weights: Weights, path: Path) -> str:
    """Write our own format, which timm loads.

    Args:
        weights: The model.
        path: The file.

    Returns:
        The Python call that loads it.

    Raises:
        UsageError: The file cannot be written.
    """
    weights.save(path)
    return weights.timm_call(path)


def write_onnx(weights: Weights, path: Path) -> str:
    """Write an ONNX file with the input and the outputs of `Graph`, and the facts as metadata.

    Args:
        weights: The model.
        path: The file.

    Returns:
        The Python call that runs it.

    Raises:
        UsageError: A package is missing, or the file cannot be written.
        RunError: ONNX cannot express the model, or makes other logits of it.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (what PyTorch exports through)
    except ImportError as error:
        raise UsageError(
            f"--format onnx needs {error.name}: install wds-train[serve], or onnx, onnxscript and "
            "onnxruntime"
        ) from error

    # Export.
    graph = Graph(weights)
    names = OUTPUTS if graph.mapped else OUTPUTS[:2]
    with _silence(), _refuse_failure(weights, "ONNX"):
        program: Any = torch.onnx.export(
            graph,
            (graph.example(2),),
            dynamo=True,
            dynamic_shapes=_any_batch(),
            input_names=[INPUT],
            output_names=names,
            verbose=False,
        )
    program.model.metadata_props[METADATA] = _facts_of(weights)
    data = program.model_proto.SerializeToString()

    # Try what will be written.
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

    def run(pixels: torch.Tensor) -> NDArray[np.float32]:
        (logits,) = session.run(["logits"], {INPUT: pixels.numpy()})
        return logits

    _compare(graph, run, SAME_ONNX, "ONNX")
    _write(path, data)
    pixels = f"{{{INPUT!r}: uint8 [n, {graph.side}, {graph.side}, 3]}}"
    return f"onnxruntime.InferenceSession({str(path)!r}).run(None, {pixels})"


def write_torch_export(weights: Weights, path: Path) -> str:
    """Write a program of `torch.export` with the input and the outputs of `Graph`, and the facts.

    Args:
        weights: The model.
        path: The file.

    Returns:
        The Python call that loads it.

    Raises:
        UsageError: The file cannot be written.
        RunError: `torch.export` cannot express the model, or makes other logits of it.
    """
    graph = Graph(weights)
    with _silence(), _refuse_failure(weights, "torch.export"):
        program = torch.export.export(graph, (graph.example(2),), dynamic_shapes=_any_batch())

    def run(pixels: torch.Tensor) -> NDArray[np.float32]:
        return program.module()(pixels)[0].numpy()

    _compare(graph, run, SAME, "torch.export")
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={METADATA: _facts_of(weights)})
    _write(path, file.getvalue())
    return f"torch.export.load({str(path)!r}).module()"


def write_timm_folder(weights: Weights, path: Path) -> str:
    """Write a folder as on the Hugging Face hub, for `timm.create_model("local-dir:...")`.

    Its config has our own fields alone. The config of timm's own model of this name would bring
    another training's tag, licence, paper and address.

    Args:
        weights: The model.
        path: The folder, which may exist if it is empty.

    Returns:
        The Python call that loads it.

    Raises:
        UsageError: The folder is taken, or cannot be written.
        RunError: timm cannot name the model, or makes other logits of it.
    """
    with new_folder(path) as folder:
        # The content.
        config = json.dumps(weights.timm_config(), indent=1, ensure_ascii=False)
        (folder / "config.json").write_text(config + "\n")
        weights.save(folder / f"model{SUFFIX}")
        with _refuse_failure(weights, "timm's config.json"):
            loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()

        # timm's model takes normalised images, as its own transform makes them.
        graph = Graph(weights)

        def run(pixels: torch.Tensor) -> NDArray[np.float32]:
            return loaded(graph.normalise(pixels)).numpy()

        _compare(graph, run, SAME, "the timm folder")
    return f"timm.create_model({f'local-dir:{path}'!r}, pretrained=True)"


WRITERS = {
    "safetensors": write_safetensors,
    "onnx": write_onnx,
    "torch-export": write_torch_export,
    "timm-hub": write_timm_folder,
}


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill, which gets the name `path` when the context ends without an error.

    Raises:
        UsageError: There is something at `path` that is no empty folder, or it cannot be written.
    """
    refuse_taken(path)
    unfinished = _unfinished(path)
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        unfinished.rename(path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def refuse_taken(path: Path) -> None:
    """Raise `UsageError` if `new_folder` could not make `path`.

    It is called before minutes of work are spent on its content.
    """
    if not path.name:  # "." and "/": the folder that is renamed in the end needs a name
        raise UsageError(f"{path} cannot be made anew; name a folder that is not there yet")
    try:
        taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
    except OSError as error:
        raise unwritable(path, error) from error
    if taken:
        raise UsageError(f"{path} is there and not empty; name a folder that is not there yet")


def _any_batch() -> dict[str, dict[int, Any]]:
    """Return the shapes that may differ from the example's: the number of images."""
    return {INPUT: {0: torch.export.Dim("batch")}}


def _facts_of(weights: Weights) -> str:
    return json.dumps(describe_model(weights), ensure_ascii=False)


@torch.inference_mode()
def _compare(graph: Graph, other: Logits, share: float, name: str) -> None:
    """Compare the logits of an exported model with those of `graph`.

    Args:
        graph: Our own model.
        other: The exported one.
        share: The difference that is allowed, as a share of the largest logit.
        name: The format, for the message.

    Raises:
        RunError: They differ by more.
    """
    # More images than the export was made with: a batch size that was frozen in would show.
    pixels = graph.example(3)
    ours = graph(pixels)[0].numpy()
    worst = float(np.abs(ours - other(pixels)).max())
    if worst > share * max(1.0, float(np.abs(ours).max())):
        raise RunError(
            f"the logits of the model as {name} are off by {worst:.2g}; nothing was written: use "
            "another format"
        )


@contextmanager
def _refuse_failure(weights: Weights, name: str) -> Iterator[None]:
    """Raise `RunError` for whatever fails in the context.

    Args:
        weights: The model, for the message.
        name: The format, for the message.
    """
    try:
        yield
    except Exception as error:
        # A tracer or a builder that does not know a layer raises anything. The first line says
        # what; pages of the model's code may follow.
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        model = weights.recipe.model.name
        raise RunError(
            f"the model {model} cannot be put into {name} ({cause:.200}); use another format"
        ) from error


@contextmanager
def _silence() -> Iterator[None]:
    """Hide the messages of the exporters, which are for their own developers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _unfinished(path: Path) -> Path:
    """Return the name that a file or folder has until it is complete.

    It is in the same folder, for a rename within one file system, and has the process's number, for
    two exports at once.
    """
    return path.with_name(f".tmp-{os.getpid()}-{path.name}")


def _write(path: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all."""
    unfinished = _unfinished(path)
    try:
        unfinished.write_bytes(data)
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise unwritable(path, error) from error
