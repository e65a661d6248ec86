"""The code's own rules: imports point downwards, rooms stay small, nothing is unpickled."""

import ast
import functools
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The house: what is in a room may import the rooms before it, and files of its own room, in no circle.
ROOMS = {
    "errors": "the exception tree",
    "typed": "JSON as the dataclasses that it was written from",
    "rng": "keys, and the generators that are made of them",
    "global_rng": "the libraries' global generators, kept still",
    "home": "the folder of this machine's state",
    "dotenv": "settings in a file .env",
    "config": "what is trained, and how: recipe, settings, presets, schedule; pure",
    "environment": "numbers from the environment",
    "slurm": "this process's place, as Slurm says it",
    "limits": "the cores and the memory that this process may use",
    "storage": "where bytes live: addresses, a local directory, S3, the embedded server",
    "format": "what a dataset is on the disk: manifest, tars, shards, index",
    "transforms": "what happens to an image: decode, crop, policies, mixing",
    "data": "bytes to batches: order, plan, fetch, cache, decoder, batch, loader, mixture",
    "api": "batches for loops of others: the loaders that `import wds_train` has",
    "models": "what is trained: model, losses, weights, pretrained weights",
    "checkpoint": "a run on S3: manifest, snapshot, lease, writer, committer, run",
    "evaluation": "scoring, and what an evaluation found",
    "tracking": "what a person sees of a run: console, W&B, curves",
    "report": "a run as a page, and runs side by side",
    "training": "claim, steps, end: options, setup, engine, loop, ranks, signals",
    "cloud": "AWS: what a training takes there, and the stack that it runs in",
    "serving": "a trained model at work: predict, export, publish, demo",
    "bench": "what the parts cost",
    "commands": "one file a command",
    "cli": "the table of commands",
}
PURE = {"errors", "typed", "config", "aws.cost"}  # stdlib and NumPy alone, and nothing of the world
WORLD = {"torch", "boto3", "os", "time", "socket", "subprocess", "random", "pathlib"}
FORBIDDEN = {"pickle", "cPickle", "dill", "shelve", "marshal"}


@functools.cache
def trees() -> dict[str, ast.Module]:
    """Every module of the project by its dotted name."""
    files = [
        path
        for top in ("wds_train", "shards")
        for path in (ROOT / top).rglob("*.py")
        if path.name != "__init__.py"
    ]
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text())
        for path in sorted(files)
    }


def imported(tree: ast.Module, modules: set[str]) -> set[str]:
    """What the file imports at its top, ours by the module's name."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in modules else str(node.module) for name in full}
    return names


def room_of(module: str) -> str:
    return module.split(".")[1]


def points_upwards(module: str, imports: set[str]) -> set[str]:
    """Those of `imports` that are neither in a room below the module's nor in its own."""
    assert room_of(module) in ROOMS, f"{module} is in no room: add it to ROOMS"
    below = [*ROOMS][: [*ROOMS].index(room_of(module))]
    ours = {name for name in imports if name.startswith("wds_train.")}
    return {
        name for name in ours if room_of(name) not in below and room_of(name) != room_of(module)
    }


@pytest.mark.parametrize("module", [name for name in trees() if name.startswith("wds_train.")])
def test_imports_point_downwards(module: str) -> None:
    assert not points_upwards(module, imported(trees()[module], set(trees())))


@pytest.mark.parametrize("room", [*ROOMS][:-1])
def test_an_import_that_points_upwards_is_found(room: str) -> None:
    above = [*ROOMS][[*ROOMS].index(room) + 1 :]
    tree = ast.parse("".join(f"from wds_train.{each} import x\n" for each in above))
    assert points_upwards(f"wds_train.{room}.new", imported(tree, set())) == {
        f"wds_train.{each}" for each in above
    }
    with pytest.raises(AssertionError, match=r"wds_train\.attic\.new is in no room"):
        points_upwards("wds_train.attic.new", set())


def test_no_module_imports_itself_through_others() -> None:
    graph = {name: imported(tree, set(trees())) & set(trees()) for name, tree in trees().items()}

    def walk(name: str, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        if name in path:
            yield (*path[path.index(name) :], name)
        elif name not in done:
            for each in graph[name]:
                yield from walk(each, (*path, name))
            done.add(name)

    done: set[str] = set()
    assert not [circle for name in graph for circle in walk(name, ())]


def test_pure_rooms_touch_no_world() -> None:
    for module, tree in trees().items():
        if (
            module.startswith("wds_train.")
            and {room_of(module), module.removeprefix("wds_train.")} & PURE
        ):
            assert not {name.split(".")[0] for name in imported(tree, set())} & WORLD, module


def test_sharding_never_imports_torch() -> None:
    for module, tree in trees().items():
        if module.startswith("shards."):
            assert not {name.split(".")[0] for name in imported(tree, set())} & {
                "torch",
                "timm",
                "torchvision",
            }, module


def test_functions_and_classes_are_small() -> None:
    functions, classes, methods = {}, {}, {}
    for module, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.end_lineno:
                size = node.end_lineno - node.lineno + 1
                (functions if isinstance(node, ast.FunctionDef) else classes)[
                    f"{module}:{node.name}"
                ] = size
            if isinstance(node, ast.ClassDef):
                methods[f"{module}:{node.name}"] = sum(
                    isinstance(each, ast.FunctionDef) for each in node.body
                )
    lengths = sorted(functions.values())
    assert statistics.median(lengths) <= 10
    assert lengths[int(0.9 * len(lengths))] <= 40
    assert not {name: size for name, size in functions.items() if size > 60}
    assert not {name: size for name, size in classes.items() if size > 200}
    assert not {name: count for name, count in methods.items() if count > 15}


def test_the_readme_draws_the_house() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    for room, what in ROOMS.items():
        assert any(
            line.split()
            == [f"{room}{'' if (ROOT / 'wds_train' / room).is_dir() else '.py'}", *what.split()]
            for line in lines
        ), f"README.md lacks the line: {room}  {what}"


def test_nothing_is_unpickled() -> None:
    for module, tree in trees().items():
        assert not imported(tree, set()) & FORBIDDEN, module
        for node in ast.walk(tree):
            modules = (
                {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            )
            modules |= {node.module or ""} if isinstance(node, ast.ImportFrom) else set()
            assert not modules & FORBIDDEN, module
    for path in [*(ROOT / "wds_train").rglob("*.py"), *(ROOT / "shards").rglob("*.py")]:
        assert not re.search(r"torch\.load\(|np\.load\(|allow_pickle", path.read_text()), path
