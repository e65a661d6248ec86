"""A run on S3: claimed by one instance, committed to in the background, resumed by the next.

claim    read the manifest, wait until nobody holds the run, raise its fence, write it back by compare-and-swap
renew    in a thread, several times per lease: the manifest with another nonce, for claimants to see a sign of life
commit   copy the state to host memory at a step boundary (the training goes on), then in a thread: upload the
         checkpoint, upload the metrics, swap the manifest, and only then delete what the new manifest dropped
restore  the newest checkpoint whose size, sha256 and tensors are right; damaged ones are passed over and named

An instance that another one has replaced meets a foreign fence at its next write, and writes nothing more. What it may
have uploaded at that moment carries its own fence in the key: named by nobody, and removed at the next claim.
"""

import contextlib
import hashlib
import json
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from wds_train import lease as leases
from wds_train import state as states
from wds_train.errors import AccessDenied, Conflict, Interrupted, NotFinite, NotFound, RunError, StoreError, Unavailable
from wds_train.fit import refuse_other_state
from wds_train.lease import Say, read_run, this_process, until_free
from wds_train.state import Checkpoint, Object, Progress, RunManifest, Segment, steps
from wds_train.store import Store
from wds_train.typed import refuse_depth, typed

RETRY_SECONDS = 60.0  # longest pause between attempts at a commit, each of which has the store's own retries within
LAST_WORD_SECONDS = 5.0
READERS = 8  # of metrics, at a time
QUEUE_SECONDS = 10.0  # longest wait of the training for the commit before, ere it is replaced by the new one
# What of a checkpoint is no tensor; `teacher` and `classes` are not in all.
EXTRA = {
    "scalars": dict[str, Any],
    "scaler": dict[str, float],
    "teacher": str,
    "classes": tuple[tuple[str, str], ...],
}


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

    def check_finite(self) -> None:
        """`NotFinite` when a tensor holds what is no number: the last step can have broken weights that the loss, which
        comes before the update, does not show yet.
        """
        for name, tensor in self.tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise NotFinite(f"{name} is not finite after step {self.progress.step}; nothing of it was committed")

    @classmethod
    def decode(cls, data: bytes, progress: Progress) -> "Snapshot":
        """Raises `RunError` with the field when `data` is no checkpoint of `progress`."""
        try:
            size = int.from_bytes(data[:8], "little")
            header = typed(dict[str, dict[str, Any]], json.loads(data[8 : 8 + size]), "header").get("__metadata__", {})
            parts = {name: json.loads(typed(str, header.get(name), name)) for name in ("extra", "progress")}
            refuse_depth(parts)
            extra = typed(dict[str, Any], parts["extra"], "extra")
            extra = {name: typed(EXTRA.get(name, Any), value, f"extra.{name}") for name, value in extra.items()}
            snapshot = cls(load_tensors(data), extra, typed(Progress, parts["progress"], "progress"))
        except (SafetensorError, ValueError, KeyError, RuntimeError, OverflowError) as error:
            raise RunError(f"it is no checkpoint: {error if type(error) is ValueError else repr(error)}") from error
        if snapshot.progress != progress:
            raise RunError(f"it holds {snapshot.progress}, the manifest says {progress}")
        return snapshot

    def refuse_misfit(self, run: RunManifest) -> None:
        """`RunError` with the field when it is not of the run's model and optimizer."""
        recipe, noted = run.settings, self.extra.get("classes")
        classes = run.dataset.get("classes", len(noted or ()))
        if noted is not None and len(noted) != classes:
            raise RunError(f"extra.classes names {len(noted)} classes, the run's dataset has {classes}")
        if missing := {"scalars", "scaler"} - self.extra.keys():
            raise RunError(f"extra.{missing.pop()} is missing")
        refuse_other_state(self.tensors, self.extra["scalars"], recipe, classes)


def read_object(store: Store, named: Object) -> bytes:
    """The bytes of an object that a manifest names; `RunError` when they are missing, or not those it names."""
    try:
        data = store.read(named.key)
    except NotFound as error:
        raise RunError(f"{store.url}/{named.key} is missing") from error
    found = Object(named.key, len(data), hashlib.sha256(data).hexdigest())
    if found != named:
        raise RunError(
            f"{store.url}/{named.key} is damaged: it has {found.bytes} bytes of sha256 {found.sha256}, "
            f"committed were {named.bytes} of {named.sha256}"
        )
    return data


def read_checkpoint(store: Store, run: RunManifest, named: Checkpoint) -> Snapshot:
    """A checkpoint that `run` names; `RunError` when a training could not go on from it."""
    data = read_object(store, named.object)
    try:
        snapshot = Snapshot.decode(data, named.progress)
        snapshot.refuse_misfit(run)
    except RunError as error:
        raise RunError(f"{store.url}/{named.object.key} is damaged: {error}") from error
    return snapshot


def read_chosen(store: Store, run: RunManifest, chosen: Checkpoint) -> Snapshot:
    """As `read_checkpoint`, of what a person asked for: the error names the steps whose checkpoints could be used."""
    try:
        return read_checkpoint(store, run, chosen)
    except RunError as error:
        usable = [each for each in run.checkpoints if each != chosen and flaw_of(store, run, each) is None]
        raise RunError(f"{error}; the usable checkpoints are those of step {steps(usable)}") from error


def flaw_of(store: Store, run: RunManifest, named: Checkpoint) -> RunError | None:
    """Why a checkpoint cannot be used, if it cannot."""
    try:
        read_checkpoint(store, run, named)
    except RunError as error:
        return error
    return None


def read_records(store: Store, segment: Segment) -> list[dict[str, Any]]:
    """The records of a segment of metrics, a line each; `RunError` when it is damaged."""
    data = read_object(store, segment.object)
    try:
        return [typed(dict[str, float], json.loads(line), "a record") for line in data.splitlines()]
    except (ValueError, RecursionError) as error:
        raise RunError(f"{store.url}/{segment.object.key} is damaged: {error}") from error


class Writer:
    """The one that may write a run's manifest: this process, while the manifest carries the fence that it claimed with.

    `fatal` is what ended that, found in a thread; `leads` is False in a rank other than 0, which writes nothing.
    """

    def __init__(self, store: Store, manifest: RunManifest, tag: str, *, say: Say = print, leads: bool = True) -> None:
        self.store, self.manifest, self.leads = store, manifest, leads
        self.fatal: Exception | None = None
        self._tag, self._say = tag, say
        self._claimed_at = self._written_at = time.monotonic()
        self._writing = threading.Lock()
        self._closed = threading.Event()

    def start_renewing(self) -> None:
        """Renew the lease from here on. To be called once this process forks no more: a forked child would inherit the
        lock, perhaps held.
        """
        if self.leads:
            threading.Thread(target=self._renew, name="lease", daemon=True).start()

    def close(self) -> None:
        """Renew the lease no more."""
        self._closed.set()

    @property
    def is_late(self) -> bool:
        """Whether the lease has run out since the last write."""
        return time.monotonic() - self._written_at > self.manifest.lease

    def write(self, change: Callable[[RunManifest], RunManifest]) -> None:
        """Swap the manifest for what `change` makes of it; `Interrupted` when another instance has claimed the run.

        Our own fence in the manifest after a lost swap means that an earlier write of ours arrived, though its answer
        did not, or that the server refused two writes at one moment (409): take it up and try again.
        """
        with self._writing:
            for _ in range(3):
                seconds = time.monotonic() - self._claimed_at
                manifest = change(self.manifest).stamped(secrets.token_hex(16), time.time(), seconds)
                try:
                    self._tag = self.store.write(states.NAME, manifest.to_json(), if_match=self._tag)
                except Conflict as error:
                    self._take_up(error)
                else:
                    self.manifest, self._written_at = manifest, time.monotonic()
                    return
        raise StoreError(f"{self.store.url}/{states.NAME} could not be written: the server kept refusing")

    def _take_up(self, error: Conflict) -> None:
        try:
            found, tag = read_run(self.store)
        except NotFound as gone:
            raise RunError(f"{self.store.url}/{states.NAME} was deleted while this instance was training") from gone
        if found.fence != self.manifest.fence:
            raise Interrupted(
                f"another instance ({found.owner}) has claimed {self.store.url}; this one stops and changes nothing more"
            ) from error
        self.manifest, self._tag = found, tag

    def _renew(self) -> None:
        """The body of the lease thread. What the store fails to write now it may write later: others may claim the run
        by then, which the next write that passes finds out.
        """
        every = self.manifest.lease / leases.RENEWALS
        while not self._closed.wait(max(0.0, self._written_at + every - time.monotonic())):
            if time.monotonic() - self._written_at < every:
                continue  # a commit has renewed it
            try:
                self.write(lambda manifest: manifest)
            except StoreError as error:
                self._say(f"the lease of {self.store.url} could not be renewed ({error}); trying again")
                self._closed.wait(every)
            except Exception as error:
                self.fatal = error
                return


def collect(store: Store, before: RunManifest, after: RunManifest, say: Say) -> None:
    """Delete what the manifest named before and names no more. Failing costs storage until the next claim."""
    for dropped in sorted(before.keys - after.keys):
        try:
            store.delete(dropped)
        except StoreError as error:
            say(f"{dropped} could not be removed ({error}); the next start removes it")


@dataclass(frozen=True)
class _Commit:
    """`records` is how many of the run's uncommitted records belong to it; `taken` is a monotonic time, seconds."""

    snapshot: Snapshot
    metrics: dict[str, float]
    records: int
    changes: dict[str, Any]
    taken: float


class Committer:
    """Commits snapshots in a thread of its own, while the training goes on.

    Two commits are in hand at most: one under way and the next. One that fails for want of the store is tried again
    until it succeeds or a newer one takes its place, and the training goes on meanwhile; `check` raises what ends it.
    """

    def __init__(self, writer: Writer, *, say: Say, keep_every: int) -> None:
        self.failures = 0
        self.max_uncommitted = float("inf")
        self.upload_s: float | None = None
        self._writer, self._say, self._keep_every = writer, say, keep_every
        self._safe_at = time.monotonic()
        self._changed = threading.Condition()
        self._next: _Commit | None = None
        self._current: _Commit | None = None
        self._records: list[dict[str, Any]] = []
        self._failure: StoreError | None = None
        self._fruitless = 0
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """From here on there is training to lose."""
        self._safe_at = time.monotonic()

    def commit(
        self, snapshot: Snapshot, metrics: dict[str, float], records: list[dict[str, Any]], **changes: Any
    ) -> None:
        """Start committing `snapshot`; `changes` are other fields of the manifest. Raises what `check` raises."""
        taken = time.monotonic()
        with self._changed:
            self._changed.wait_for(lambda: self._next is None or self._failure or self._writer.fatal, QUEUE_SECONDS)
            self.check()
            self._records += records
            self._next = _Commit(snapshot, metrics, len(self._records), changes, taken)
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="commit", daemon=True)
                self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a commit is under way."""
        return self._next is not None or self._current is not None

    def check(self) -> None:
        """Raise what ends this instance's work: `Interrupted` when another one has claimed the run, `NotFinite`, and
        `RunError` when the oldest state that is not safe has waited for longer than `max_uncommitted` seconds.
        """
        if self._writer.fatal is not None:
            raise self._writer.fatal
        waited = time.monotonic() - self._safe_at
        if self.busy and waited > self.max_uncommitted:
            raise RunError(
                f"nothing could be committed for {waited / 60:.1f} minutes (--max-uncommitted-minutes allows "
                f"{self.max_uncommitted / 60:g}): {self._failure or 'the upload is too slow'}. Stopping before more is "
                "lost; repair that and run again, to go on from the newest checkpoint"
            )

    def wait(self, seconds: float = float("inf")) -> bool:
        """Wait until nothing is under way, but for `seconds` at most; whether it is so. Raises what `check` raises."""
        end = time.monotonic() + seconds
        with self._changed:
            while True:
                self.check()
                left = min(end - time.monotonic(), 0.5)
                if not self.busy or left <= 0:
                    return not self.busy
                self._changed.wait(left)

    def _work(self) -> None:
        """The body of the commit thread."""
        while self._writer.fatal is None:
            with self._changed:
                self._changed.wait_for(lambda: self._next is not None)
                job = self._current = self._next
                self._next = None
            assert job is not None
            error: Exception | None = None
            try:
                self._commit(job)
            except Exception as caught:
                error = caught
            with self._changed:
                self._current = None
                self._settle(job, error)
                self._changed.notify_all()
            if self._failure is not None:
                time.sleep(min(RETRY_SECONDS, 2.0**self._fruitless))

    def _settle(self, job: _Commit, error: Exception | None) -> None:
        if error is None:
            self._failure, self._fruitless, self._safe_at = None, 0, job.taken
            del self._records[: job.records]
            if self._next is not None:
                self._next = replace(self._next, records=self._next.records - job.records)
        elif isinstance(error, StoreError):
            self._failure, self._fruitless, self.failures = error, self._fruitless + 1, self.failures + 1
            self._next = self._next or job
            self._say(f"commit of step {job.snapshot.progress.step} failed ({error}); training goes on, trying again")
        else:
            self._writer.fatal = error

    def _commit(self, job: _Commit) -> None:
        began, writer = time.perf_counter(), self._writer
        job.snapshot.check_finite()
        if writer.is_late:
            writer.write(lambda manifest: manifest)  # is the run still ours?
        at = job.snapshot.progress
        place = f"{writer.manifest.fence:06d}-{at.step:09d}-{at.evaluated:06d}"
        checkpoint = Checkpoint(self._put(f"ckpt/{place}.safetensors", job.snapshot.encode()), at, job.metrics)
        lines = "".join(json.dumps(record) + "\n" for record in self._records[: job.records]).encode()
        segment = Segment(self._put(f"metrics/{place}.jsonl", lines), at.step, at.evaluated) if lines else None
        before = writer.manifest
        writer.write(lambda found: replace(found.with_commit(checkpoint, segment, self._keep_every), **job.changes))
        self.upload_s = time.perf_counter() - began
        collect(writer.store, before, writer.manifest, self._say)

    def _put(self, key: str, data: bytes) -> Object:
        self._writer.store.write(key, data, if_absent=True)
        return Object(key, len(data), hashlib.sha256(data).hexdigest())


class Run:
    """A run that this process has claimed, or only reads; one that does not lead (a rank other than 0) ends in silence."""

    def __init__(
        self,
        store: Store,
        manifest: RunManifest,
        tag: str,
        *,
        say: Say = print,
        keep_every: int = 0,
        leads: bool = True,
    ) -> None:
        self.store, self._say = store, say
        self.writer = Writer(store, manifest, tag, say=say, leads=leads)
        self.committer = Committer(self.writer, say=say, keep_every=keep_every)

    @property
    def manifest(self) -> RunManifest:
        return self.writer.manifest

    @classmethod
    def claim(
        cls,
        store: Store,
        fresh: RunManifest,
        say: Say,
        *,
        wait: bool = True,
        pause: Callable[[float], None] = time.sleep,
        keep_every: int = 0,
    ) -> "Run":
        """Claim the run at `store`, or create it as `fresh`; a run that is done is only read. `RunError` when it is of
        another recipe or dataset, or another instance holds it and `wait` is False.
        """
        while True:
            try:
                found, tag = read_run(store)
            except NotFound:
                found = fresh
                condition: dict[str, Any] = {"if_absent": True}
            else:
                if not found.checkpoints and found.status in ("failed", "interrupted"):
                    # Given up with nothing to keep: a mistyped setting must not hold the name for ever.
                    found = replace(found, recipe=fresh.recipe, dataset=fresh.dataset)
                _refuse_mismatch(found, fresh, store.url)
                found, tag = until_free(store, found, tag, wait=wait, say=say, pause=pause)
                if found.status == "done":
                    run = cls(store, found, tag, say=say)
                    with contextlib.suppress(StoreError):  # who may only read a finished run leaves it as it is
                        run._collect_orphans()  # of a kill right after the last commit
                    return run
                condition = {"if_match": tag}
            try:
                run = cls._take(store, found, condition, say, keep_every)
            except Conflict:
                pause(0.1)  # another claimant was faster: look again
            else:
                run._collect_orphans()
                return run

    @staticmethod
    def roll_back(store: Store, step: int, say: Say) -> tuple[RunManifest, RunManifest]:
        """Make the checkpoint of `step` the newest, forgetting what was committed after it; the manifests before and after.
        `RunError` when it cannot be used, or an instance holds the run: then nothing has changed.

        One swap both claims the run, so that no earlier owner writes again, and takes it back; only then is deleted what
        came after.
        """
        before, tag = until_free(store, *read_run(store), wait=False, say=say)
        after = before.back_to(step)
        read_chosen(store, before, after.checkpoints[-1])
        if after == before:
            return before, before
        claimed = replace(after.claimed(this_process(), leases.LEASE_SECONDS, time.time()), status=after.status)
        after = claimed.stamped(secrets.token_hex(16), time.time(), 0.0)
        store.write(states.NAME, after.to_json(), if_match=tag)
        collect(store, before, after, say)
        return before, after

    @classmethod
    def _take(cls, store: Store, found: RunManifest, condition: dict[str, Any], say: Say, keep_every: int) -> "Run":
        nonce = secrets.token_hex(16)
        claimed = replace(found.claimed(this_process(), leases.LEASE_SECONDS, time.time()), nonce=nonce)
        tag = store.write(states.NAME, claimed.to_json(), **condition)
        return cls(store, claimed, tag, say=say, keep_every=keep_every)

    def restore(self, say: Say) -> Snapshot | None:
        """The newest usable checkpoint, or None when the run has committed none. `RunError` when all are damaged.

        The manifest forgets damaged ones, and the metrics that came after the one before: they will be logged again.
        """
        for checkpoint in reversed(self.manifest.checkpoints):
            try:
                snapshot = read_checkpoint(self.store, self.manifest, checkpoint)
            except RunError as error:
                say(f"checkpoint {checkpoint.object.key} cannot be used ({error}); trying the one before")
                continue
            if checkpoint != self.manifest.checkpoints[-1]:
                self.writer.write(partial(RunManifest.up_to, checkpoint=checkpoint))
            return snapshot
        if self.manifest.checkpoints:
            raise RunError(
                f"every checkpoint of {self.store.url} is damaged; restore one from a backup or start another run"
            )
        return None

    def history(self) -> list[dict[str, Any]]:
        """All committed metrics that can be read, a record per line logged, oldest first; the others are named."""
        with ThreadPoolExecutor(READERS) as pool:
            return [record for records in pool.map(self._records_of, self.manifest.metrics) for record in records]

    def _records_of(self, segment: Segment) -> list[dict[str, Any]]:
        try:
            return read_records(self.store, segment)
        except Unavailable:
            raise
        except (StoreError, RunError) as error:
            self._say(f"metrics {segment.object.key} cannot be used ({error}); the curves go without them")
            return []

    def begin(self) -> None:
        """From here on the lease is renewed, and there is training to lose. This process must not fork any more."""
        self.committer.begin()
        self.writer.start_renewing()

    def end(self, status: str, **changes: Any) -> None:
        """Give the run up, as `status`. The caller has waited for what was under way. `Unavailable` when the store does not
        take it within LAST_WORD_SECONDS: the process is about to end, and the lease runs out by itself.
        """
        self.writer.close()
        if not self.writer.leads or (self.manifest.status == status and not changes):
            return
        failed: list[Exception] = []

        def write() -> None:
            try:
                self.writer.write(lambda manifest: replace(manifest.ended(status), **changes))
            except Exception as error:
                failed.append(error)

        last = threading.Thread(target=write, name="last word", daemon=True)
        last.start()
        last.join(LAST_WORD_SECONDS)
        if last.is_alive():
            raise Unavailable(f"{self.store.url} did not answer within {LAST_WORD_SECONDS:g} s")
        if failed:
            raise failed[0]

    def _collect_orphans(self) -> None:
        """Delete what a killed instance uploaded and never named. Safe for fences up to ours: they can name nothing more."""
        named = self.manifest.keys
        for prefix in ("ckpt/", "metrics/"):
            for entry in list(self.store.list(prefix)):
                fence = entry.key.removeprefix(prefix).partition("-")[0]
                if entry.key not in named and fence <= f"{self.manifest.fence:06d}":
                    self.store.delete(entry.key)
                    self._say(f"removed {entry.key}, which no manifest names: left by an interrupted upload or removal")
            # Without leave to list unfinished uploads, the bucket's lifecycle rule has to remove them.
            with contextlib.suppress(AccessDenied):
                self.store.abort_uploads(prefix)


def _refuse_mismatch(found: RunManifest, fresh: RunManifest, where: str) -> None:
    saved, current = _flat(found.recipe), _flat(fresh.recipe)
    different = [
        f"{name}: {saved.get(name)} (saved), {current.get(name)} (now)"
        for name in saved | current
        if saved.get(name) != current.get(name)
    ]
    if any(found.dataset.get(name) != fresh.dataset.get(name) for name in ("fingerprint", "mix")):
        different.append(f"dataset: {found.dataset} (saved), {fresh.dataset} (now)")
    if different:
        raise RunError(f"{where} was started with other settings; {'; '.join(different)}. Use these, or another --run")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
