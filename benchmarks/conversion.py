"""Conversion compared with litdata's `optimize`: the same images, processes and S3 server.

    python -m benchmarks.conversion FOLDER --litdata /path/to/venv/bin/python --images 3000

FOLDER holds images anywhere below it. They are hard-linked into ten classes, over and over, until
there are enough. litdata lives in an environment of its own, since it brings pins of its own. Each
tool converts a few images first, which is not measured: Python then has its bytecode. Time is that
of the work alone, without starting Python. Memory is the sum over all processes of the run, as
sampled.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wds_train.config.numbers import positive
from wds_train.errors import UsageError, WdsTrainError
from wds_train.storage.embedded import ensure_running, stop

CLASSES = 10
FEW = 40  # images of the conversion that is not measured
KB_PER_MIB = 1024  # /proc counts memory in kB
LOOK_SECONDS = 0.05  # between looks at the memory and the CPU time of a run
OURS_NAME = "wds-train"
OURS = """
import argparse, sys, time
from wds_train.conversion import command
if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args([sys.argv[1], sys.argv[2], "--processes", sys.argv[3]])
    began = time.perf_counter()
    assert command.run(args) == 0
    print("SECONDS", time.perf_counter() - began)
"""
# Bytes as they are: the cheapest that optimize can be asked for.
LITDATA = """
import sys, time
from pathlib import Path
import litdata
from litdata.streaming import downloader
# obstore, by which it uploads, refuses plain http by default; the test server has no TLS.
downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True
def read(item):
    path, label = item
    return {"image": Path(path).read_bytes(), "label": label}
if __name__ == "__main__":
    classes = sorted(path for path in Path(sys.argv[1]).iterdir())
    began = time.perf_counter()
    inputs = []
    for label, folder in enumerate(classes):
        for path in sorted(folder.iterdir()):
            inputs.append((str(path), label))
    litdata.optimize(
        fn=read,
        inputs=inputs,
        output_dir=sys.argv[2],
        chunk_bytes="128MB",
        num_workers=int(sys.argv[3]),
    )
    print("SECONDS", time.perf_counter() - began)
"""


@dataclass(frozen=True)
class Tool:
    """A converter: a Python that can import it, and a script that converts and prints SECONDS."""

    python: str
    script: str


class Run(NamedTuple):
    """The cost of one conversion.

    Attributes:
        seconds: The work's time, as the tool's script prints it.
        peak_mib: The most memory of the tool's own processes together.
        cpu_seconds: CPU time of the same processes, starting Python included.
        server_seconds: CPU time of the S3 server meanwhile.
    """

    seconds: float
    peak_mib: float
    cpu_seconds: float
    server_seconds: float


class Usage(NamedTuple):
    """Memory in MiB and CPU time in seconds of several processes together."""

    mib: float
    cpu_seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments and flags of this benchmark to `parser`."""
    parser.add_argument("folder", type=Path, help="images, anywhere below it")
    parser.add_argument(
        "--litdata", metavar="PYTHON", help="the Python of an environment with litdata and boto3"
    )
    parser.add_argument("--images", type=positive, default=3000, help="(%(default)s)")
    parser.add_argument("--processes", type=positive, default=2, help="(%(default)s)")
    parser.add_argument("--repeats", type=positive, default=3, help="(%(default)s)")
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    """Run the benchmark with the parsed flags, and return the exit status."""
    tools = {OURS_NAME: Tool(sys.executable, OURS)}
    if args.litdata:
        tools["litdata"] = Tool(args.litdata, LITDATA)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        source = _link(args.folder, work / "images", args.images)
        few = _link(args.folder, work / "few", FEW)
        environment = _environment(work)
        _make_bucket(environment)
        results: defaultdict[str, list[Run]] = defaultdict(list)
        try:
            # In turns, so that whatever else the machine does slows all of them.
            for repeat in range(-1, args.repeats):
                folder = few if repeat < 0 else source
                for name, tool in tools.items():
                    url = f"s3://bench/{name}{repeat}"
                    arguments = [str(folder), url, str(args.processes)]
                    measured = _measure(tool, arguments, environment, work)
                    if repeat >= 0:
                        results[name].append(measured)
        finally:
            stop(work / "s3")
    _print(results, args)
    return 0


def _environment(work: Path) -> dict[str, str]:
    """Start the S3 server below `work`, and return an environment that leads both tools to it."""
    endpoint = ensure_running(work / "s3")
    environment = os.environ | {
        "AWS_ENDPOINT_URL": endpoint.url,
        "AWS_ACCESS_KEY_ID": endpoint.access_key,
        "AWS_SECRET_ACCESS_KEY": endpoint.secret_key,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "TMPDIR": str(work),
    }
    # With it, every run would compile all modules again.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return environment


def _make_bucket(environment: dict[str, str]) -> None:
    """Make the bucket `bench`: wds-train takes `embedded` for the server of this machine's home."""
    script = "import boto3; boto3.client('s3').create_bucket(Bucket='bench')"
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


def _link(folder: Path, root: Path, images: int) -> Path:
    """Make `images` hard links to the images of `folder`, in class folders."""
    paths = sorted([path for path in folder.rglob("*") if _is_image(path)])
    if not paths:
        raise UsageError(f"{folder} holds no images; give a folder of JPEG or PNG files")
    for number in range(images):
        path = paths[number % len(paths)]
        link = root / f"class{number % CLASSES}" / f"{number:06d}{path.suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, link)
        except FileExistsError:
            continue
        except OSError:  # another file system
            link.write_bytes(path.read_bytes())
    return root


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in (".jpg", ".jpeg", ".png")


def _measure(tool: Tool, arguments: list[str], environment: dict[str, str], work: Path) -> Run:
    """Run a tool's script with `arguments`, and return what it took.

    Raises:
        WdsTrainError: It failed; the message has the end of its output.
    """
    path = work / "bench_script.py"
    path.write_text(tool.script)
    command = [tool.python, str(path), *arguments]
    before = _server_seconds()
    with (work / "log").open("w+") as log:
        # In its own folder, so that it can leave nothing here; PYTHONPATH leads it back.
        process = subprocess.Popen(
            command,
            env=environment | {"PYTHONPATH": str(Path.cwd())},
            stdout=log,
            stderr=log,
            cwd=work,
        )
        most = _watch(process)
        code = process.wait()
        log.seek(0)
        text = log.read()
    found = re.search(r"SECONDS ([0-9.]+)", text)
    if code or not found:
        raise WdsTrainError(f"{' '.join(command[:2])} failed with {code}:\n{text[-2000:]}")
    return Run(float(found[1]), most.mib, most.cpu_seconds, _server_seconds() - before)


def _server_seconds() -> float:
    """Return the CPU seconds of the S3 server: between the runs, this process's only child."""
    return _trees(_children(os.getpid())).cpu_seconds


def _watch(process: "subprocess.Popen[bytes]") -> Usage:
    """Wait for a process, and return the most that it and all below it were seen to use at once."""
    most = Usage(0.0, 0.0)
    while process.poll() is None:
        seen = _tree(process.pid)
        most = Usage(max(most.mib, seen.mib), max(most.cpu_seconds, seen.cpu_seconds))
        time.sleep(LOOK_SECONDS)
    return most


def _tree(pid: int) -> Usage:
    """Return what a process and all below it use; nothing if it has ended.

    Memory is the proportional set size, which counts shared pages once. CPU time includes that of
    children that have ended.
    """
    try:
        children = _children(pid)
        memory = Path(f"/proc/{pid}/smaps_rollup").read_text()
        # User, system and the children's, after the name, which may hold spaces.
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]
    except OSError:
        return Usage(0.0, 0.0)
    pss = re.search(r"^Pss:\s+(\d+) kB", memory, re.MULTILINE)
    mib = int(pss[1]) / KB_PER_MIB if pss else 0.0
    cpu = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    below = _trees(children)
    return Usage(mib + below.mib, cpu + below.cpu_seconds)


def _trees(pids: list[int]) -> Usage:
    """Return what several processes and all below them use together."""
    mib = 0.0
    cpu = 0.0
    for pid in pids:
        used = _tree(pid)
        mib += used.mib
        cpu += used.cpu_seconds
    return Usage(mib, cpu)


def _children(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def _summary(runs: list[Run], images: int) -> dict[str, Any]:
    """Return rates and costs of the runs of one tool, each of so many images."""
    rates = [images / run.seconds for run in runs]
    typical = Run(*np.median(runs, axis=0).tolist())
    most = Run(*np.max(runs, axis=0).tolist())
    return {
        "images_per_second": [round(rate, 1) for rate in rates],
        "median": round(statistics.median(rates), 1),
        "cpu_ms_per_image": round(typical.cpu_seconds / images * 1000, 2),
        "server_ms_per_image": round(typical.server_seconds / images * 1000, 2),
        "peak_mib": round(most.peak_mib),
    }


def _print(results: dict[str, list[Run]], args: argparse.Namespace) -> None:
    """Print the figures of every tool, and the ratio of ours to litdata's if both ran."""
    facts = {name: _summary(runs, args.images) for name, runs in results.items()}
    if args.json:
        print(json.dumps({"images": args.images, "processes": args.processes, **facts}, indent=1))
        return
    print(f"{args.images} images, {args.processes} processes")
    for name, fact in facts.items():
        print(
            f"{name:10} {fact['median']:8} img/s (of {fact['images_per_second']}), "
            f"{fact['cpu_ms_per_image']} CPU ms/img "
            f"and the server's {fact['server_ms_per_image']}, peak {fact['peak_mib']} MiB"
        )
    if len(facts) == 1:
        return
    # Compared within a repeat, as the tools took turns.
    ratios = []
    for ours, theirs in zip(results[OURS_NAME], results["litdata"], strict=True):
        ratios.append(theirs.seconds / ours.seconds)
    rounded = [round(ratio, 2) for ratio in ratios]
    print(f"ratio      {statistics.median(ratios):.2f} (of {rounded})")


if __name__ == "__main__":
    own = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(own)
    sys.exit(run(own.parse_args()))
