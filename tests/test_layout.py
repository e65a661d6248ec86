"""The code's own rules: imports point to earlier packages, functions stay small, nothing is unpickled."""

import ast
import functools
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOP = ("wds_train", "shards", "benchmarks", "examples")
# In dependency order: a package may import the packages before it, and files of its own.
PACKAGES = {
    "errors": "the exceptions, and what a person reads of them",
    "schema": "JSON to dataclasses and back",
    "rng": "random generators, each made from a key",
    "global_rng": "the global random state of libraries, kept unchanged",
    "files": "the folder of this machine's state",
    "machine": "the cores and the memory that this process may use",
    "config": "what is trained: recipe, presets, settings, schedule; pure",
    "environment": "numbers in environment variables",
    "dotenv": "settings in a file .env",
    "slurm": "ranks as Slurm numbers them",
    "storage": "where bytes live: addresses, local folders, S3, the embedded server",
    "console": "progress, notes and tables on the terminal",
    "dataset": "a dataset on the disk: manifest, tar shards, index, verification",
    "images": "pixels: decode, crop, augment, normalise",
    "loader": "bytes to batches: order, plan, fetch, cache, workers, the public loaders",
    "models": "networks: build, losses, weights, calibration, scoring",
    "checkpoint": "a run on S3: manifest, lease, commits, restore",
    "evaluation": "accuracy on a split, per class and calibrated",
    "tracking": "curves and Weights & Biases",
    "report": "a run as a page, and runs compared",
    "conversion": "images to shards; one source a file in sources/; no PyTorch",
    "training": "a training: session, engine, ranks, spot notices, endings",
    "aws": "instances, prices and stacks on AWS",
    "serving": "predict, export, publish, demo",
    "commands": "one command a file",
    "cli": "the table of commands",
    "shards": "make_shards, the conversion as people type it",
    "benchmarks": "how fast the parts are; not installed",
    "examples": "the loaders in the training loops of others",
}
PURE = {"errors", "schema", "config", "aws.cost"}  # computations only: no files, network or clock
WORLD = {"torch", "boto3", "os", "time", "socket", "subprocess", "random", "pathlib"}
FORBIDDEN = {"pickle", "cPickle", "dill", "shelve", "marshal"}
TORCH = {"torch", "timm", "torchvision"}


@functools.cache
def trees() -> dict[str, ast.Module]:
    """Return the syntax tree of each module of the project, by its dotted name."""
    found = {}
    for top in TOP:
        for path in sorted((ROOT / top).rglob("*.py")):
            if path.name != "__init__.py":
                name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                found[name] = ast.parse(path.read_text())
    return found


def imports_of(tree: ast.Module, modules: set[str]) -> set[str]:
    """Return all that a file imports, also inside functions and under TYPE_CHECKING.

    A name that is a module of `modules` is returned with its package in front.
    """
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.add(full if full in modules else node.module)
    return names


def imports_at_the_top(tree: ast.Module) -> set[str]:
    """Return the top-level packages that a file imports when it is imported itself."""
    at_the_top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return {name.split(".")[0] for name in imports_of(ast.Module(at_the_top, []), set())}


def package_of(module: str) -> str:
    """Return the package, or the single file, that a module belongs to."""
    parts = module.split(".")
    return parts[1] if parts[0] == "wds_train" else parts[0]


def points_upwards(module: str, imports: set[str]) -> set[str]:
    """Return those of `imports` that are neither in an earlier package nor in the module's own."""
    own = package_of(module)
    assert own in PACKAGES, f"{module} has no place: add its package to PACKAGES"
    order = [*PACKAGES]
    allowed = {*order[: order.index(own) + 1]}
    found = set()
    for name in imports:
        # "wds_train" alone are the public names, which examples use and nothing below may.
        ours = name.split(".")[0] in TOP
        public = name == "wds_train" and own in ("benchmarks", "examples")
        if ours and not public and (name == "wds_train" or package_of(name) not in allowed):
            found.add(name)
    return found


def circle_in(graph: dict[str, set[str]]) -> tuple[str, ...]:
    """Return the modules of a circle of imports; none if there is no circle."""
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        if name in path:
            yield path[path.index(name) :]
        elif name not in done:
            for each in sorted(graph[name]):
                yield from walk(each, (*path, name))
            done.add(name)

    for name in graph:
        for circle in walk(name, ()):
            return circle
    return ()


@pytest.mark.parametrize("module", trees())
def test_imports_point_to_earlier_packages(module: str) -> None:
    assert not points_upwards(module, imports_of(trees()[module], set(trees())))


@pytest.mark.parametrize("package", [*PACKAGES][:-1])
@pytest.mark.parametrize(
    "form",
    [
        "from {} import x",
        "import {}",
        "def f():\n    from {} import x",
        "class A:\n    def f(self):\n        import {}",
        "if TYPE_CHECKING:\n    from {} import x",
        "try:\n    import {}\nexcept ImportError:\n    pass",
    ],
)
def test_an_import_that_points_upwards_is_found(package: str, form: str) -> None:
    def dotted(name: str) -> str:
        return name if name in TOP else f"wds_train.{name}"

    later = {dotted(each) for each in [*PACKAGES][[*PACKAGES].index(package) + 1 :]}
    tree = ast.parse("\n".join(form.format(each) for each in sorted(later)))
    assert points_upwards(f"{dotted(package)}.new", imports_of(tree, set())) == later


def test_a_module_without_a_place_is_found() -> None:
    with pytest.raises(AssertionError, match=r"wds_train\.attic\.new has no place"):
        points_upwards("wds_train.attic.new", set())


def test_no_module_imports_itself_through_others() -> None:
    names = set(trees())
    graph = {name: imports_of(tree, names) & names - {name} for name, tree in trees().items()}
    assert not circle_in(graph)


def test_a_circle_is_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set[str]()}
    assert circle_in(graph) == ("b", "c")


def test_pure_packages_touch_no_world() -> None:
    for module, tree in trees().items():
        if {package_of(module), module.removeprefix("wds_train.")} & PURE:
            tops = {name.split(".")[0] for name in imports_of(tree, set())}
            assert not tops & WORLD, module


def test_a_conversion_starts_without_torch() -> None:
    # Inside a function it may: `torchvision:NAME` is a source that needs torchvision.
    for module, tree in trees().items():
        if package_of(module) in ("conversion", "shards"):
            assert not imports_at_the_top(tree) & TORCH, module


def test_functions_and_classes_are_small() -> None:
    functions, classes, methods = {}, {}, {}
    for module, tree in trees().items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or not node.end_lineno:
                continue
            name = f"{module}:{node.name}"
            size = node.end_lineno - node.lineno + 1
            if isinstance(node, ast.FunctionDef):
                functions[name] = size
            else:
                classes[name] = size
                methods[name] = sum(isinstance(each, ast.FunctionDef) for each in node.body)
    lengths = sorted(functions.values())
    assert statistics.median(lengths) <= 10
    assert lengths[int(0.9 * len(lengths))] <= 40
    assert not {name: size for name, size in functions.items() if size > 60}
    assert not {name: size for name, size in classes.items() if size > 200}
    assert not {name: count for name, count in methods.items() if count > 15}


def test_contributing_lists_the_packages() -> None:
    lines = [line.split() for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines()]
    listed = []
    for package, purpose in PACKAGES.items():
        is_folder = (ROOT / "wds_train" / package).is_dir() or package in TOP
        name = f"{package}/" if is_folder else f"{package}.py"
        assert [name, *purpose.split()] in lines, f"CONTRIBUTING.md lacks: {name}  {purpose}"
        listed.append(lines.index([name, *purpose.split()]))
    assert listed == sorted(listed), "CONTRIBUTING.md lists the packages in another order"


def test_nothing_is_unpickled() -> None:
    for module, tree in trees().items():
        assert not imports_of(tree, set()) & FORBIDDEN, module
    for top in set(TOP) - {"examples"}:
        for path in (ROOT / top).rglob("*.py"):
            assert not re.search(r"torch\.load\(|np\.load\(|allow_pickle", path.read_text()), path
