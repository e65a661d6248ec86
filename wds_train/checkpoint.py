"""A run on S3: claimed by one instance, committed to in the background, resumed by the next.

claim    read the manifest, raise its fence, write it back by compare-and-swap
commit   copy the state to host memory at a step boundary (the training goes on), then in a thread: upload the
         checkpoint, upload the metrics, swap the manifest, and only then delete what the new manifest dropped
restore  the newest checkpoint whose size, sha256 and tensors are right; damaged ones are passed over and named
"""

import hashlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from wds_train import state as states
from wds_train.errors import Conflict, Interrupted, NotFound, RunError, StoreError
from wds_train.state import Checkpoint, Object, Progress, RunManifest
from wds_train.store import Store

Say = Callable[[str], None]


@dataclass(frozen=True)
class Snapshot:
    """A training's state in host memory: named tensors, what is not a tensor as JSON, and how far it is."""

    tensors: dict[str, torch.Tensor]
    extra: dict[str, Any]
    progress: Progress

    def encode(self) -> bytes:
        """As safetensors: nothing in it can execute when it is read."""
        header = {"extra": json.dumps(self.extra), "progress": json.dumps(asdict(self.progress))}
        return save_tensors(self.tensors, header)

    @classmethod
    def decode(cls, data: bytes, progress: Progress) -> "Snapshot":
        """Raises `RunError` when `data` is no checkpoint of `progress`."""
        try:
            size = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + size])["__metadata__"]
            snapshot = cls(load_tensors(data), json.loads(header["extra"]), Progress(**json.loads(header["progress"])))
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"not a checkpoint: {error!r}") from error
        if snapshot.progress != progress:
            raise RunError(f"it holds {snapshot.progress}, the manifest says {progress}")
        return snapshot


class Run:
    """A run that this process has claimed. One commit is under way at a time; `commit` waits for the one before."""

    def __init__(self, store: Store, manifest: RunManifest, tag: str) -> None:
        self.store = store
        self.manifest = manifest
        self._tag = tag
        self._uploader = ThreadPoolExecutor(1, "commit")
        self._pending: Future[None] | None = None

    @classmethod
    def claim(cls, store: Store, fresh: RunManifest, say: Say) -> "Run":
        """Claim the run at `store`, or create it as `fresh`. `RunError` when it is of another recipe or dataset."""
        try:
            data, tag = store.read_tagged(states.NAME)
        except NotFound:
            found = fresh
            condition: dict[str, Any] = {"if_absent": True}
        else:
            found = RunManifest.from_json(data, f"{store.url}/{states.NAME}")
            _refuse_mismatch(found, fresh, store.url)
            condition = {"if_match": tag}
        claimed = replace(found, fence=found.fence + 1, owner=f"{socket.gethostname()}:{os.getpid()}")
        if found.status != "done":
            claimed = replace(claimed, status="running")
        try:
            run = cls(store, *_swap(store, claimed, condition))
        except Conflict as error:
            raise RunError(
                f"{store.url} was claimed by another instance at this moment; run again to wait for it"
            ) from error
        run._collect_orphans(say)
        return run

    def restore(self, say: Say) -> Snapshot | None:
        """The newest usable checkpoint, or None when the run has committed none. `RunError` when all are damaged."""
        for checkpoint in reversed(self.manifest.checkpoints):
            try:
                return Snapshot.decode(self.read(checkpoint.object), checkpoint.progress)
            except (NotFound, RunError) as error:
                say(f"checkpoint {checkpoint.object.key} cannot be used ({error}); trying the one before")
        if self.manifest.checkpoints:
            raise RunError(
                f"every checkpoint of {self.store.url} is damaged; restore one from a backup or start another run"
            )
        return None

    def read(self, named: Object) -> bytes:
        """The bytes of an object that the manifest names; `RunError` when they are not those it names."""
        data = self.store.read(named.key)
        if len(data) != named.bytes or hashlib.sha256(data).hexdigest() != named.sha256:
            raise RunError(
                f"{self.store.url}/{named.key} is damaged: its {len(data)} bytes are not the {named.bytes} that were committed"
            )
        return data

    def history(self) -> list[dict[str, Any]]:
        """All committed metrics, a record per line logged, oldest first."""
        return [json.loads(line) for segment in self.manifest.metrics for line in self.read(segment).splitlines()]

    def commit(
        self, snapshot: Snapshot, metrics: dict[str, float], records: list[dict[str, Any]], **changes: Any
    ) -> None:
        """Start committing `snapshot`; `changes` are other fields of the manifest. Waits for the commit before, and
        raises what it raised: `Interrupted` when another instance has claimed the run.
        """
        self.wait()
        self._pending = self._uploader.submit(self._commit, snapshot, metrics, records, changes)

    def wait(self) -> None:
        """Until the commit under way is done."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _commit(
        self, snapshot: Snapshot, metrics: dict[str, float], records: list[dict[str, Any]], changes: dict[str, Any]
    ) -> None:
        place = f"{self.manifest.fence:06d}-{snapshot.progress.step:09d}-{snapshot.progress.evaluated:06d}"
        checkpoint = Checkpoint(self._put(f"ckpt/{place}.safetensors", snapshot.encode()), snapshot.progress, metrics)
        lines = "".join(json.dumps(record) + "\n" for record in records).encode()
        segment = self._put(f"metrics/{place}.jsonl", lines) if records else None
        before = self.manifest
        self._swap(replace(before.with_commit(checkpoint, segment), **changes))
        for dropped in {c.object.key for c in before.checkpoints} - {c.object.key for c in self.manifest.checkpoints}:
            self.store.delete(dropped)

    def _put(self, key: str, data: bytes) -> Object:
        self.store.write(key, data, if_absent=True)
        return Object(key, len(data), hashlib.sha256(data).hexdigest())

    def _swap(self, manifest: RunManifest) -> None:
        try:
            self.manifest, self._tag = _swap(self.store, manifest, {"if_match": self._tag})
        except Conflict as error:
            raise Interrupted(
                f"another instance has claimed {self.store.url}; this one stops and changes nothing more"
            ) from error

    def _collect_orphans(self, say: Say) -> None:
        """Delete what a killed instance uploaded and never named. Safe only now: older fences can name nothing more."""
        named = {c.object.key for c in self.manifest.checkpoints} | {segment.key for segment in self.manifest.metrics}
        for prefix in ("ckpt/", "metrics/"):
            for entry in list(self.store.list(prefix)):
                if entry.key not in named:
                    self.store.delete(entry.key)
                    say(f"removed {entry.key}, left by an instance that was killed while uploading it")


def _swap(store: Store, manifest: RunManifest, condition: dict[str, Any]) -> tuple[RunManifest, str]:
    """Write the manifest with a fresh nonce. After a lost acknowledgement the retry meets our own write as a
    `Conflict`: the nonce, read back, tells it from another writer's.
    """
    manifest = replace(manifest, nonce=secrets.token_hex(16))
    for _ in range(3):
        try:
            return manifest, store.write(states.NAME, manifest.to_json(), **condition)
        except Conflict:
            time.sleep(0.1)  # a 409 means that another conditional write was under way at the same moment
            try:
                data, tag = store.read_tagged(states.NAME)
            except NotFound:
                continue
            if RunManifest.from_json(data, f"{store.url}/{states.NAME}").nonce == manifest.nonce:
                return manifest, tag
            if tag != condition.get("if_match"):
                raise
    raise StoreError(f"{store.url}/{states.NAME} could not be written: the server kept refusing")


def _refuse_mismatch(found: RunManifest, fresh: RunManifest, where: str) -> None:
    saved, current = _flat(found.recipe), _flat(fresh.recipe)
    different = [
        f"{name}: {saved.get(name)} (saved), {current.get(name)} (now)"
        for name in saved | current
        if saved.get(name) != current.get(name)
    ]
    if found.dataset["fingerprint"] != fresh.dataset["fingerprint"]:
        different.append(f"dataset: {found.dataset} (saved), {fresh.dataset} (now)")
    if different:
        raise RunError(f"{where} was started with other settings; {'; '.join(different)}. Use these, or another --run")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
