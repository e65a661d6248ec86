"""Conversion side by side with litdata's `optimize`: the same images, processes and S3 server, runs interleaved.

    python -m shards.bench_convert FOLDER --litdata /path/to/venv/bin/python --images 3000 --processes 2

FOLDER holds images anywhere below it; they are hard-linked into ten classes, over and over, until there are enough.
litdata lives in an environment of its own, since it brings pins of its own. Time is that of the work alone, without
starting Python; memory is the sum over all processes of the run, sampled.
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

from wds_train.devserver import ensure_running, stop
from wds_train.errors import UsageError, WdsTrainError

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="images, anywhere below it")
    parser.add_argument("--litdata", metavar="PYTHON", help="the Python of an environment with litdata and boto3")
    parser.add_argument("--images", type=int, default=3000, help="(%(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as work:
        source = _link(args.folder, Path(work) / "images", args.images)
        endpoint = ensure_running(Path(work) / "s3")
        environment = os.environ | {
            "AWS_ENDPOINT_URL": endpoint.url,
            "AWS_ACCESS_KEY_ID": endpoint.access_key,
            "AWS_SECRET_ACCESS_KEY": endpoint.secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "TMPDIR": work,
        }
        # The real bucket's name, but not the one that always means the embedded server of this folder.
        subprocess.run(
            [sys.executable, "-c", "import boto3; boto3.client('s3').create_bucket(Bucket='bench')"],
            env=environment,
            check=True,
        )
        tools = {"wds-train": (sys.executable, OURS)} | ({"litdata": (args.litdata, LITDATA)} if args.litdata else {})
        results: dict[str, list[tuple[float, float]]] = {name: [] for name in tools}
        try:
            for repeat in range(args.repeats):
                for name, (python, script) in tools.items():
                    url = f"s3://bench/{name}-{repeat}"
                    results[name].append(
                        _measure(python, script, [str(source), url, str(args.processes)], environment, Path(work))
                    )
        finally:
            stop(Path(work) / "s3")
    _print(results, args)
    return 0


def _link(folder: Path, root: Path, images: int) -> Path:
    """`images` hard links to the images of `folder`, in class folders."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
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
) -> tuple[float, float]:
    """Seconds of work, and peak memory in MiB."""
    path = work / "bench_script.py"
    path.write_text(script)
    command = [python, str(path), *arguments]
    with (work / "log").open("w+") as log:
        process = subprocess.Popen(
            command, env=environment | {"PYTHONPATH": str(Path.cwd())}, stdout=log, stderr=log, cwd=work
        )
        peak = [0.0]
        watcher = threading.Thread(target=_watch, args=(process, peak))
        watcher.start()
        code = process.wait()
        watcher.join()
        log.seek(0)
        text = log.read()
    found = re.search(r"SECONDS ([0-9.]+)", text)
    if code or not found:
        raise WdsTrainError(f"{' '.join(command[:2])} failed with {code}:\n{text[-2000:]}")
    return float(found[1]), peak[0]


def _watch(process: "subprocess.Popen[bytes]", peak: list[float]) -> None:
    while process.poll() is None:
        peak[0] = max(peak[0], _tree_mib(process.pid))
        time.sleep(0.05)


def _tree_mib(pid: int) -> float:
    """Proportional set size of a process and all below it, in MiB: shared pages count once."""
    total = 0.0
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        total = int(re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)[1]) / 1024  # type: ignore[index]
    except (OSError, TypeError):
        return 0.0
    return total + sum(_tree_mib(int(child)) for child in children)


def _print(results: dict[str, list[tuple[float, float]]], args: argparse.Namespace) -> None:
    facts = {
        name: {
            "images_per_second": [round(args.images / seconds, 1) for seconds, _ in runs],
            "median": round(statistics.median(args.images / seconds for seconds, _ in runs), 1),
            "peak_mib": round(max(peak for _, peak in runs)),
        }
        for name, runs in results.items()
    }
    if args.json:
        print(json.dumps({"images": args.images, "processes": args.processes, **facts}, indent=1))
        return
    print(f"{args.images} images, {args.processes} processes")
    for name, fact in facts.items():
        print(f"{name:10} {fact['median']:8} img/s (of {fact['images_per_second']}), peak {fact['peak_mib']} MiB")
    if len(facts) == 2:
        ours, theirs = (fact["median"] for fact in facts.values())
        print(f"ratio      {ours / theirs:.1f}")


if __name__ == "__main__":
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(own)
    sys.exit(run(own.parse_args()))
