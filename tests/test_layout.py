"""The code's own rules: imports point downwards, functions stay small, nothing is unpickled."""

import ast
import functools
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "wds_train").glob("*.py")) + sorted((ROOT / "shards").glob("*.py"))
# A module may import those before it. The pure ones use stdlib and numpy alone.
PURE = ["errors", "typed", "recipe", "presets", "schedule", "manifest", "order", "state", "cost"]
OUTSIDE = [
    "addresses",
    "devserver",
    "store",
    "tario",
    "augment",
    "randomness",
    "policies",
    "jpeg",
    "pillow",
    "decode",
    "mixing",
    "model",
    "fit",
    "distributed",
    "tracker",
    "spot",
    "lease",
]
COMPOSED = [
    "dataset",
    "contact_sheet",
    "cache",
    "pipeline",
    "scoring",
    "checkpoint",
    "weights",
    "losses",
    "transfer",
    "engine",
    "memory",
    "report",
    "train",
    "recipes",
    "status",
    "evaluate",
    "audit",
    "bench",
    "bench_peers",
    "bench_pass",
    "bench_loader",
    "bench_train",
    "bench_commit",
    "bench_gpu_parts",
    "bench_gpu",
    "cli",
]
LAYERS = PURE + OUTSIDE + COMPOSED
FORBIDDEN = {"pickle", "cPickle", "dill", "shelve", "marshal"}


@functools.cache
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text()) for path in FILES}


def imported(tree: ast.Module) -> set[str]:
    """Modules imported at the top of the file, as dotted names; `from wds_train import x` counts as wds_train.x."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = (
                {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "wds_train" else {node.module}
            )
            names |= inner
    return names


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if path.parent.name == "wds_train" and path.stem != "__init__"],
    ids=lambda p: p.stem,
)
def test_imports_point_downwards(path: Path) -> None:
    assert path.stem in LAYERS, f"{path.name} is in no layer: add it to LAYERS"
    below = LAYERS[: LAYERS.index(path.stem)]
    ours = {name.split(".")[1] for name in imported(trees()[path]) if name.startswith("wds_train.")}
    assert ours <= set(below), f"{path.name} imports {ours - set(below)}, which are not below it"


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.stem in PURE and path.parent.name == "wds_train"], ids=lambda p: p.stem
)
def test_pure_modules_touch_no_world(path: Path) -> None:
    outside = {"torch", "boto3", "os", "time", "socket", "subprocess", "random", "pathlib"}
    assert not {name.split(".")[0] for name in imported(trees()[path])} & outside


def test_sharding_never_imports_torch() -> None:
    for path in FILES:
        if path.parent.name == "shards":
            assert not {name.split(".")[0] for name in imported(trees()[path])} & {"torch", "timm", "torchvision"}, path


def test_functions_are_small() -> None:
    sizes = {
        f"{path.name}:{node.name}": node.end_lineno - node.lineno + 1
        for path, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.end_lineno
    }
    lengths = sorted(sizes.values())
    assert statistics.median(lengths) <= 10
    assert lengths[int(0.9 * len(lengths))] <= 40
    assert not {name: size for name, size in sizes.items() if size > 80}


def test_nothing_is_unpickled() -> None:
    for path, tree in trees().items():
        modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        modules |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not modules & FORBIDDEN, path
        assert not re.search(r"torch\.load\(|np\.load\(|allow_pickle", path.read_text()), path
