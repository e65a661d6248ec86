"""`wds-train verify`: every byte of a dataset or a run is read anew."""

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
from wds_train.storage.address import announced, located, not_here
from wds_train.storage.base import Store
from wds_train.storage.open import open_store


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("address", metavar="DATASET_OR_RUN", help="s3://bucket/prefix, a directory, or a name")
    add_bucket(parser, "datasets/ and runs/ live")


def run(args: argparse.Namespace) -> int:
    """Read whatever lies at the address: a name may be a dataset's and a run's."""
    meant = dict.fromkeys(located(args.address, kind, args.bucket) for kind in ("datasets", "runs"))
    addresses = [not_here(announced(address, args.address), args.address) for address in meant]
    found = {url: manifest for url in addresses if (manifest := _manifest_at(url)) is not None}
    if not found:
        raise NotFound(f"there is no dataset and no run at {' or '.join(addresses)} (no {NAME}); check the address")
    return max(_verify_run(url) if _is_run(manifest) else _verify_dataset(url) for url, manifest in found.items())


def _manifest_at(url: str) -> bytes | None:
    try:
        return open_store(url).read(NAME)
    except NotFound:
        return None


def _is_run(manifest: bytes) -> bool:
    return states.KIND.encode() in manifest  # also of one that is no whole JSON any more


def _verify_dataset(url: str) -> int:
    dataset = Dataset.open(url)
    found, splits = 0, dataset.manifest.splits.values()
    size, samples = sum(split.bytes for split in splits), sum(split.samples for split in splits)
    with Meter(size) as meter:
        for damage in verify(dataset, meter.add):
            meter.print(str(damage))
            found += 1
    print(
        f"{dataset.store.url}: {f'{found} damaged' if found else 'whole'}; {samples:,} samples, {size / 1e6:,.1f} MB read"
    )
    return 1 if found else 0


def _verify_run(url: str) -> int:
    """Read all that a run names; a line for each object that is damaged, and the checkpoint that a resume would use.

    A run in training drops checkpoints meanwhile: then what its newest manifest names is read, too.
    """
    manifest, store = find_run(url)
    loading()
    from wds_train.checkpoint.restore import ROUNDS, too_fast

    flaws: dict[str, RunError | None] = {}
    with Meter(sum(named.bytes for named in manifest.objects)) as meter:
        for _ in range(ROUNDS):
            if _read_all(store, manifest, flaws, meter):
                break
            manifest = find_run(url)[0]
        else:
            raise too_fast(store)
    return _tell(store, manifest, flaws)


def _read_all(store: Store, manifest: RunManifest, flaws: dict[str, RunError | None], meter: Meter) -> bool:
    """Note in `flaws`, by their keys, what is wrong with the objects that were not read before; whether all were there to
    be read, rather than dropped by a newer commit.
    """
    from wds_train.checkpoint.restore import flaw_of, read_records

    whole = True
    parts: list[Checkpoint | Segment] = [*manifest.checkpoints, *manifest.metrics, *manifest.replayed]
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


def _tell(store: Store, manifest: RunManifest, flaws: dict[str, RunError | None]) -> int:
    """Print what is wrong with what `manifest` names; the exit code."""
    damaged = [flaw for key, flaw in flaws.items() if flaw is not None and key in manifest.keys]
    for line in damaged:
        print(line)
    state = f"{len(damaged)} damaged" if damaged else "whole"
    size = sum(named.bytes for named in manifest.objects)
    print(
        f"{store.url}: {state}; {len(manifest.checkpoints)} checkpoints, {len(manifest.metrics + manifest.replayed)} segments "
        f"of metrics, {size / 1e6:,.1f} MB"
    )
    usable = [each for each in manifest.checkpoints if flaws[each.object.key] is None]
    if manifest.pending is not None and _is_whole(store, manifest):
        usable.append(manifest.pending.checkpoint)
    if usable:
        print(f"a resume uses the checkpoint of step {usable[-1].progress.step}, {usable[-1].object.key}")
    elif damaged:
        print("there is no checkpoint that a resume could use")
    else:
        print("a resume begins anew: nothing is committed")
    return 1 if damaged else 0


def _is_whole(store: Store, manifest: RunManifest) -> bool:
    """Return whether the next attempt would adopt the commit that an attempt announced and did not finish."""
    from wds_train.checkpoint.restore import read_pending

    if manifest.pending is None:
        return False
    try:
        read_pending(store, manifest, manifest.pending)
    except (RunError, Dropped):
        return False
    return True
