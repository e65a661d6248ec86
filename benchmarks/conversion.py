"""Conversion side by side with litdata's `optimize`: the same images, processes and S3 server, runs interleaved.

    python -m benchmarks.conversion FOLDER --litdata /path/to/venv/bin/python --images 3000 --processes 2

FOLDER holds images anywhere below it; they are hard-linked into ten classes, over and over, until there are enough.
litdata lives in an environment of its own, since it brings pins of its own. Each converts a few images first, which is
not measured: Python then has its bytecode. Time is that of the work alone, without starting Python; memory is the sum
over all processes of the run, sampled.
"""

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

from wds_train.config.numbers import positive
from wds_train.errors import UsageError, WdsTrainError
from wds_train.storage.embedded import ensure_running, stop

CLASSES = 10
OURS = """
import argparse, sys, time
from shards import make_shards
if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    make_shards.add_arguments(parser)
    args = parser.parse_args([sys.argv[1], sys.argv[2], "--processes", sys.argv[3]])
    began = time.perf_counter()
    assert make_shards.run(args) == 0
    print("SECONDS", time.perf_counter() - began)
"""
# Bytes as they are: the cheapest that optimize can be asked for.
LITDATA = """
import sys, time
from pathlib import Path
import litdata
from litdata.streaming import downloader
# obstore, by which it uploads, refuses plain http unless told; the test server has no TLS.
downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True
def read(item):
    path, label = item
    return {"image": Path(path).read_bytes(), "label": label}
if __name__ == "__main__":
    classes = sorted(path for path in Path(sys.argv[1]).iterdir())
    began = time.perf_counter()
    inputs = [(str(path), label) for label, folder in enumerate(classes) for path in sorted(folder.iterdir())]
    litdata.optimize(fn=read, inputs=inputs, output_dir=sys.argv[2], chunk_bytes="128MB", num_workers=int(sys.argv[3]))
    print("SECONDS", time.perf_counter() - began)
"""


class Run(NamedTuple):
    """What one conversion took. `cpu_seconds` and `peak_mib` are those of the tool's own processes, starting Python
    included; `server_seconds` are the CPU time of the S3 server meanwhile.
    """

    seconds: float
    peak_mib: float
    cpu_seconds: float
    server_seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="images, anywhere below it")
    parser.add_argument(
        "--litdata", metavar="PYTHON", help="the Python of an environment with litdata and boto3"
    )
    parser.add_argument("--images", type=positive, default=3000, help="(%(default)s)")
    parser.add_argument("--processes", type=positive, default=2, help="(%(default)s)")
    parser.add_argument("--repeats", type=positive, default=3, help="(%(default)s)")
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as work:
        source, few = (
            _link(args.folder, Path(work) / name, n)
            for name, n in (("images", args.images), ("few", 40))
        )
        endpoint = ensure_running(Path(work) / "s3")
        environment = os.environ | {
            "AWS_ENDPOINT_URL": endpoint.url,
            "AWS_ACCESS_KEY_ID": endpoint.access_key,
            "AWS_SECRET_ACCESS_KEY": endpoint.secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "TMPDIR": work,
        }
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        # The real bucket's name, but not the one that always means the embedded server of this folder.
        subprocess.run(
            [
                sys.executable,
                "-c",
                "import boto3; boto3.client('s3').create_bucket(Bucket='bench')",
            ],
            env=environment,
            check=True,
        )
        tools = {"wds-train": (sys.executable, OURS)} | (
            {"litdata": (args.litdata, LITDATA)} if args.litdata else {}
        )
        results: dict[str, list[Run]] = {name: [] for name in tools}
        try:
            for repeat in range(-1, args.repeats):
                for name, (python, script) in tools.items():
                    arguments = [
                        str(few if repeat < 0 else source),
                        f"s3://bench/{name}{repeat}",
                        str(args.processes),
                    ]
                    measured = _measure(python, script, arguments, environment, Path(work))
                    results[name] += [measured] * (repeat >= 0)
        finally:
            stop(Path(work) / "s3")
    _print(results, args)
    return 0


def _link(folder: Path, root: Path, images: int) -> Path:
    """Make `images` hard links to the images of `folder`, in class folders."""
    paths = sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png")
    )
    if not paths:
        raise UsageError(f"{folder} holds no images; give a folder of JPEG or PNG files")
    for number in range(images):
        path = paths[number % len(paths)]
        place = root / f"class{number % CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            try:
                os.link(path, place / f"{number:06d}{path.suffix}")
            except OSError:  # another file system
                (place / f"{number:06d}{path.suffix}").write_bytes(path.read_bytes())
    return root


def _measure(
    python: str, script: str, arguments: list[str], environment: dict[str, str], work: Path
) -> Run:
    """Run the script; the work's seconds as it prints them, the rest as seen from outside."""
    path = work / "bench_script.py"
    path.write_text(script)
    command, before = [python, str(path), *arguments], _server_seconds()
    with (work / "log").open("w+") as log:
        process = subprocess.Popen(
            command,
            env=environment | {"PYTHONPATH": str(Path.cwd())},
            stdout=log,
            stderr=log,
            cwd=work,
        )
        most = [0.0, 0.0]
        watcher = threading.Thread(target=_watch, args=(process, most))
        watcher.start()
        code = process.wait()
        watcher.join()
        log.seek(0)
        text = log.read()
    found = re.search(r"SECONDS ([0-9.]+)", text)
    if code or not found:
        raise WdsTrainError(f"{' '.join(command[:2])} failed with {code}:\n{text[-2000:]}")
    return Run(float(found[1]), most[0], most[1], _server_seconds() - before)


def _server_seconds() -> float:
    """CPU seconds of the S3 server: between the runs, it is this process's only child."""
    return sum(_tree(pid)[1] for pid in _children(os.getpid()))


def _children(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def _watch(process: "subprocess.Popen[bytes]", most: list[float]) -> None:
    """Keep the largest memory, in MiB, and CPU time, in seconds, that the processes were seen to have together."""
    while process.poll() is None:
        for place, value in enumerate(_tree(process.pid)):
            most[place] = max(most[place], value)
        time.sleep(0.05)


def _tree(pid: int) -> tuple[float, float]:
    """Proportional set size (shared pages count once) and CPU seconds of a process and all below it, ended ones too."""
    try:
        children = _children(pid)
        pss = re.search(
            r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE
        )
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]
    except OSError:
        return 0.0, 0.0
    below = [_tree(child) for child in children]
    memory = int(pss[1]) / 1024 if pss else 0.0
    cpu = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    return memory + sum(part[0] for part in below), cpu + sum(part[1] for part in below)


def _print(results: dict[str, list[Run]], args: argparse.Namespace) -> None:
    facts = {
        name: {
            "images_per_second": [round(args.images / run.seconds, 1) for run in runs],
            "median": round(statistics.median(args.images / run.seconds for run in runs), 1),
            "cpu_ms_per_image": round(
                statistics.median(run.cpu_seconds for run in runs) / args.images * 1000, 2
            ),
            "server_ms_per_image": round(
                statistics.median(run.server_seconds for run in runs) / args.images * 1000, 2
            ),
            "peak_mib": round(max(run.peak_mib for run in runs)),
        }
        for name, runs in results.items()
    }
    if args.json:
        print(json.dumps({"images": args.images, "processes": args.processes, **facts}, indent=1))
        return
    print(f"{args.images} images, {args.processes} processes")
    for name, fact in facts.items():
        print(
            f"{name:10} {fact['median']:8} img/s (of {fact['images_per_second']}), {fact['cpu_ms_per_image']} CPU ms/img "
            f"and the server's {fact['server_ms_per_image']}, peak {fact['peak_mib']} MiB"
        )
    if len(facts) == 2:
        ratios = [
            theirs.seconds / ours.seconds for ours, theirs in zip(*results.values(), strict=True)
        ]
        print(
            f"ratio      {statistics.median(ratios):.2f} (of {[round(ratio, 2) for ratio in ratios]})"
        )


if __name__ == "__main__":
    own = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(own)
    sys.exit(run(own.parse_args()))
