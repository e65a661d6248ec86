"""`wds-train verify`: re-read every byte of a dataset or a run."""

import argparse

from wds_train.checkpoint import run_manifest as states
from wds_train.checkpoint.find import find_run
from wds_train.checkpoint.run_manifest import Checkpoint, RunManifest, Segment
from wds_train.commands.flags import add_bucket
from wds_train.console import Meter, loading
from wds_train.dataset.integrity import verify
from wds_train.dataset.manifest import NAME
from wds_train.dataset.reader import Dataset
from wds_train.errors import Dropped, NotFound, RunError
from wds_train.storage.address import announce_embedded, announce_name, resolve_address
from wds_train.storage.base import Store
from wds_train.storage.open import open_store


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "address", metavar="DATASET_OR_RUN", help="s3://bucket/prefix, a directory, or a name"
    )
    add_bucket(parser, "datasets/ and runs/ live")


def run(args: argparse.Namespace) -> int:
    """Verify all that is at the address: a name may be one of a dataset and of a run."""
    addresses = []
    for kind in ("datasets", "runs"):
        address = resolve_address(args.address, kind, args.bucket)
        if address not in addresses:
            addresses.append(address)
    for address in addresses:
        announce_embedded(address, args.address)
        announce_name(address, args.address)

    codes = []
    manifests = {address: _read_manifest(address) for address in addresses}
    for address, manifest in manifests.items():
        if manifest is not None:
            verify_it = _verify_run if _is_run(manifest) else _verify_dataset
            codes.append(verify_it(address))
    if not codes:
        places = " or ".join(addresses)
        raise NotFound(f"there is no dataset and no run at {places} (no {NAME}); check the address")
    return max(codes)


def _read_manifest(url: str) -> bytes | None:
    try:
        return open_store(url).read(NAME)
    except NotFound:
        return None


def _is_run(manifest: bytes) -> bool:
    # A search rather than a parse: the manifest may be damaged.
    return states.KIND.encode() in manifest


def _verify_dataset(url: str) -> int:
    dataset = Dataset.open(url)
    splits = dataset.manifest.splits.values()
    size = sum(split.bytes for split in splits)
    samples = sum(split.samples for split in splits)
    damaged = 0
    with Meter(size) as meter:
        for damage in verify(dataset, meter.add):
            meter.print(str(damage))
            damaged += 1
    state = f"{damaged} damaged" if damaged else "whole"
    print(f"{dataset.store.url}: {state}; {samples:,} samples, {size / 1e6:,.1f} MB read")
    return 1 if damaged else 0


def _verify_run(url: str) -> int:
    """Read all that a run names, and print what is damaged and what a resume would use.

    A run in training drops checkpoints meanwhile. Then what its newest manifest names is read, too.
    """
    manifest, store = find_run(url)
    loading()
    from wds_train.checkpoint.restore import ROUNDS, too_fast

    flaws: dict[str, RunError | None] = {}
    with Meter(sum(named.bytes for named in manifest.objects)) as meter:
        for _ in range(ROUNDS):
            if _read_all(store, manifest, flaws, meter):
                break
            manifest, _ = find_run(url)
        else:
            raise too_fast(store)
    return _print_result(store, manifest, flaws)


def _read_all(
    store: Store, manifest: RunManifest, flaws: dict[str, RunError | None], meter: Meter
) -> bool:
    """Read all objects that were not read before.

    Args:
        store: The run's.
        manifest: It names the objects.
        flaws: Gets the flaw of each object by its key, None if it is whole.
        meter: Counts the bytes.

    Returns:
        False if a newer commit has dropped some of them.
    """
    from wds_train.checkpoint.restore import flaw_of, read_records

    whole = True
    parts: list[Checkpoint | Segment] = [
        *manifest.checkpoints,
        *manifest.metrics,
        *manifest.replayed,
    ]
    for named in parts:
        key = named.object.key
        if key in flaws:
            continue
        try:
            if isinstance(named, Checkpoint):
                flaws[key] = flaw_of(store, manifest, named)
            else:
                flaws[key] = None
                read_records(store, named)
        except RunError as error:
            flaws[key] = error
        except Dropped:
            flaws.pop(key, None)
            whole = False
        meter.add(named.object.bytes)
    return whole


def _print_result(store: Store, manifest: RunManifest, flaws: dict[str, RunError | None]) -> int:
    """Print the flaws of what `manifest` names, and return the exit code."""
    keys = manifest.keys
    damaged = [flaw for key, flaw in flaws.items() if flaw is not None and key in keys]
    for flaw in damaged:
        print(flaw)
    state = f"{len(damaged)} damaged" if damaged else "whole"
    size = sum(named.bytes for named in manifest.objects)
    segments = len(manifest.metrics) + len(manifest.replayed)
    print(
        f"{store.url}: {state}; {len(manifest.checkpoints)} checkpoints, "
        f"{segments} segments of metrics, {size / 1e6:,.1f} MB"
    )

    # A resume takes the newest that is whole: a commit that was announced, or else a checkpoint.
    usable = [each for each in manifest.checkpoints if flaws[each.object.key] is None]
    if manifest.pending is not None and _is_whole(store, manifest):
        usable.append(manifest.pending.checkpoint)
    if usable:
        newest = usable[-1]
        print(f"a resume uses the checkpoint of step {newest.progress.step}, {newest.object.key}")
    elif damaged:
        print("there is no checkpoint that a resume could use")
    else:
        print("a resume begins anew: nothing is committed")
    return 1 if damaged else 0


def _is_whole(store: Store, manifest: RunManifest) -> bool:
    """Return whether the next attempt would adopt a commit that was announced and not finished."""
    from wds_train.checkpoint.restore import read_pending

    if manifest.pending is None:
        return False
    try:
        read_pending(store, manifest, manifest.pending)
    except (RunError, Dropped):
        return False
    return True
