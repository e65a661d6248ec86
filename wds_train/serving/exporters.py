"""A model's weights in the formats of others. Each is tried against our own model before it is there under its name."""

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
from wds_train.serving.graph import INPUT, OUTPUTS, Graph, facts

METADATA = "wds-train"  # the name of the facts within a file
# The largest difference of logits, as a share of the largest logit: kernels add in another order, no more than that.
SAME, SAME_ONNX = 1e-5, 1e-4


def write_safetensors(weights: Weights, path: Path) -> str:
    """Our own format, which timm loads; the call that does."""
    weights.save(path)
    return weights.timm_call(path)


def write_onnx(weights: Weights, path: Path) -> str:
    """An ONNX file with `Graph`'s input and outputs, the facts in its metadata."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (what PyTorch exports through)
    except ImportError as error:
        raise UsageError(
            f"--format onnx needs {error.name}: install wds-train[serve], or onnx, onnxscript and onnxruntime"
        ) from error
    graph = Graph(weights)
    names = OUTPUTS if graph.mapped else OUTPUTS[:2]
    with _quiet(), _refused(weights, "ONNX"):
        shapes = {INPUT: {0: torch.export.Dim("batch")}}
        program: Any = torch.onnx.export(
            graph,
            (graph.example(2),),
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=[INPUT],
            output_names=names,
            verbose=False,
        )
    program.model.metadata_props[METADATA] = json.dumps(facts(weights), ensure_ascii=False)
    data = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    _compare(
        graph, lambda pixels: session.run(["logits"], {INPUT: pixels.numpy()})[0], SAME_ONNX, "ONNX"
    )
    _write(path, data)
    return f"onnxruntime.InferenceSession({str(path)!r}).run(None, {{{INPUT!r}: uint8 [n, {graph.side}, {graph.side}, 3]}})"


def write_torch_export(weights: Weights, path: Path) -> str:
    """A program of `torch.export` with `Graph`'s input and outputs, the facts beside it."""
    graph, file = Graph(weights), io.BytesIO()
    with _quiet(), _refused(weights, "torch.export"):
        program = torch.export.export(
            graph, (graph.example(2),), dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}}
        )
    _compare(graph, lambda pixels: program.module()(pixels)[0].numpy(), SAME, "torch.export")
    torch.export.save(
        program, file, extra_files={METADATA: json.dumps(facts(weights), ensure_ascii=False)}
    )
    _write(path, file.getvalue())
    return f"torch.export.load({str(path)!r}).module()"


def write_timm_folder(weights: Weights, path: Path) -> str:
    """A folder as on the Hugging Face hub, for `timm.create_model("local-dir:...")`. Its config is ours alone: that of timm's
    own model of the name would bring another training's tag, licence, paper and address.
    """
    with new_folder(path) as folder:
        (folder / "config.json").write_text(
            json.dumps(weights.timm_config(), indent=1, ensure_ascii=False) + "\n"
        )
        weights.save(folder / f"model{SUFFIX}")
        with _refused(weights, "timm's config.json"):
            loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        graph = Graph(weights)
        _compare(
            graph, lambda pixels: loaded(graph.normalise(pixels)).numpy(), SAME, "the timm folder"
        )
    return f"timm.create_model({f'local-dir:{path}'!r}, pretrained=True)"


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which gets the name `path` when the block ends well; `UsageError` when there is something of that name
    that is no empty folder.
    """
    refuse_taken(path)
    unfinished = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        unfinished.rename(path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def refuse_taken(path: Path) -> None:
    """`UsageError` where `new_folder` could not make `path`: to be called before the work of minutes."""
    if not path.name:  # "." and "/": what is made beside it and renamed needs one
        raise UsageError(f"{path} cannot be made anew; name a folder that is not there yet")
    try:
        taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
    except OSError as error:
        raise unwritable(path, error) from error
    if taken:
        raise UsageError(f"{path} is there and not empty; name a folder that is not there yet")


@torch.inference_mode()
def _compare(
    graph: Graph, other: Callable[[torch.Tensor], NDArray[np.float32]], share: float, what: str
) -> None:
    """Raise `RunError` when `other` has not the logits of `graph`, for a batch of another size than it was made with."""
    pixels = graph.example(3)
    ours, theirs = graph(pixels)[0].numpy(), other(pixels)
    if (worst := float(np.abs(ours - theirs).max())) > share * max(1.0, float(np.abs(ours).max())):
        raise RunError(
            f"the logits of the model as {what} are off by {worst:.2g}; nothing was written: use another format"
        )


WRITERS = {
    "safetensors": write_safetensors,
    "onnx": write_onnx,
    "torch-export": write_torch_export,
    "timm-hub": write_timm_folder,
}


@contextmanager
def _refused(weights: Weights, what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever a tracer or a builder raises that does not know a layer
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        name = weights.recipe.model.name
        raise RunError(
            f"the model {name} cannot be put into {what} ({cause:.200}); use another format"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' own words, which are for their developers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _write(path: Path, data: bytes) -> None:
    unfinished = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        unfinished.write_bytes(data)
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise unwritable(path, error) from error
