"""The run manifest: `manifest.json` of a run, the one mutable object, changed only by
compare-and-swap.

It names every checkpoint and every segment of metrics with size and sha256; what it does not name
does not exist. `fence` counts the claims: an instance writes only while the manifest carries the
fence that it claimed with. While `status` is "running" the run is its owner's, who writes the
manifest anew several times per `lease` seconds; any other status gives it up.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import reduce
from typing import Any

from wds_train.checkpoint.goodput import Parts, Spent, parts_of
from wds_train.checkpoint.scores import SCORES, every_of, telling
from wds_train.config.recipe import Recipe
from wds_train.errors import RunError, UsageError
from wds_train.schema import refuse_depth, typed

FORMAT = 1
KIND = "wds-train run"
NAME = "manifest.json"
STATUSES = ("running", "interrupted", "failed", "stopped", "done")
NAMES = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# Nothing else may be named: what a manifest names and its successor does not is deleted.
CHECKPOINT_KEYS = re.compile(r"ckpt/\d+-\d+-\d+\.safetensors")
SEGMENT_KEYS = re.compile(r"metrics/\d+-\d+-\d+(-ahead)?\.jsonl")
SHA256 = re.compile("[0-9a-f]{64}")
ADDRESS = re.compile(r"(https?://[!-~]+)?")  # of a page in a browser; "" where there is none
LONGEST_LEASE = 3600.0  # seconds; a claimant waits for as long as a manifest says
MOST_CLASSES = 1 << 24
RESULT = ("val/top1", "val/top1_ema")  # every validation gives them, among others
ADDED = {
    "earlier",
    "rollbacks",
    "result",
    "replayed",
    "unsafe_store",
    "page",
    "differences",
    "pending",
}  # to the manifest, since its first version
REPLAYED = 50  # segments kept of rows that no checkpoint goes with
# Attempts kept one by one; a run interrupted for ever would otherwise grow its manifest for ever.
LISTED = 100
# Newest checkpoints kept: with one alone, a damaged newest would leave nothing to go back to
KEPT = 2


@dataclass(frozen=True)
class Progress:
    """The progress of a training, and the sums of its running epoch.

    `step` optimizer steps are done and `evaluated` epochs validated; `loss_sum` is over the epoch's
    `loss_steps` steps, `lost` counts its unreadable samples. `best` is the highest top-1 so far, of
    raw or EMA weights, and `best_epoch` the first validated epoch that had it.
    """

    step: int = 0
    evaluated: int = 0
    loss_sum: float = 0.0
    loss_steps: int = 0
    lost: int = 0
    best: float = -1.0
    best_epoch: int = 0

    def validated(self, metrics: dict[str, float]) -> "Progress":
        """Return the progress with one epoch more validated, by telling `metrics`; the next one's
        sums begin.
        """
        epoch = self.evaluated + 1
        top1 = max(metrics[name] for name in RESULT if name in metrics)
        best = (top1, epoch) if top1 > self.best else (self.best, self.best_epoch)
        return Progress(self.step, epoch, best=best[0], best_epoch=best[1])


@dataclass(frozen=True)
class Object:
    key: str
    bytes: int
    sha256: str


def fence_of(written: Object) -> int:
    """Return the fence of the attempt that wrote an object, which its key begins with."""
    return int(written.key.partition("/")[2].partition("-")[0])


@dataclass(frozen=True)
class Checkpoint:
    """The state of a training after a step.

    `metrics` are those of the validation at this step, empty when there was none. `spent` is what
    its attempt had spent until then; None where an older version committed it.
    """

    object: Object
    progress: Progress
    metrics: dict[str, float] = field(hash=False)
    spent: Spent | None = None

    @property
    def fence(self) -> int:
        """The fence of the attempt that committed it."""
        return fence_of(self.object)


@dataclass(frozen=True)
class Segment:
    """Metrics logged up to `step` and `evaluated`, those of a `Progress`."""

    object: Object
    step: int
    evaluated: int

    @property
    def fence(self) -> int:
        """The fence of the attempt that wrote it."""
        return fence_of(self.object)

    def within(self, at: Progress) -> bool:
        """Return True if it holds nothing beyond `at`."""
        return (self.step, self.evaluated) <= (at.step, at.evaluated)


@dataclass(frozen=True)
class Pending:
    """A commit that has been announced and not finished.

    Its objects may be on the store, in part, or not at all.

    `result` is that of the run, where this is its last commit.
    """

    checkpoint: Checkpoint
    segment: Segment | None
    result: dict[str, float] = field(default_factory=dict, hash=False)

    @property
    def objects(self) -> tuple[Object, ...]:
        """The objects that the commit consists of."""
        if self.segment is None:
            return (self.checkpoint.object,)
        return (self.segment.object, self.checkpoint.object)


@dataclass(frozen=True)
class Owner:
    """A process.

    `machine` is unique to a boot and a PID namespace, "" where that cannot be known; `started` is
    in clock ticks since the boot, and tells the process from a later one of the same PID.
    """

    host: str = ""
    machine: str = ""
    pid: int = 0
    started: int = 0

    def __str__(self) -> str:
        return f"{self.host}, process {self.pid}"


@dataclass(frozen=True)
class Attempt:
    """One instance's work: from `started` (Unix time, for people only) for `seconds`, up to its
    last sign of life. `ended` is a status, or "lost" when it just fell silent. It began at `step`,
    on `hardware`; `price` is what an hour costs, in dollars, and `instance` EC2's type, ""
    elsewhere. `spent` says where its time went, from the start of its process on, and `committed`
    what of it had been spent at the newest state that counts; None where that was not noted.
    """

    host: str
    started: float
    seconds: float = 0.0
    ended: str = "running"
    step: int = 0
    hardware: str = ""
    instance: str = ""
    price: float | None = None
    spent: Spent | None = None
    committed: Spent | None = None

    def parts(self, *, over: bool) -> Parts:
        """Return what became of its time; `over`, once it commits nothing more."""
        return parts_of(self.spent, self.committed, self.seconds, over=over)


@dataclass(frozen=True)
class Difference:
    """A step that was computed twice, on `rank` of a training, and gave another `tensor` the second
    time. `boot` is unique to the machine since its last boot, "" where that is unknown.
    """

    step: int
    rank: int
    tensor: str
    host: str
    boot: str = ""

    def is_of_machine(self, host: str, boot: str) -> bool:
        """Return True if it was seen on that machine.

        Its name is the same, or, in other containers, its boot.
        """
        return self.host == host or (self.boot != "" and self.boot == boot)


@dataclass(frozen=True)
class Totals:
    """The sums over the attempts of a run.

    `interruptions` are those that ended as "interrupted" or "lost"; `dollars` of those whose price
    is known. `parts` says where their time went; None where an older version added them up.
    """

    attempts: int = 0
    interruptions: int = 0
    failures: int = 0
    seconds: float = 0.0
    dollars: float = 0.0
    parts: Parts | None = None

    def plus(self, attempt: Attempt) -> "Totals":
        return Totals(
            self.attempts + 1,
            self.interruptions + (attempt.ended in ("interrupted", "lost")),
            self.failures + (attempt.ended == "failed"),
            round(self.seconds + attempt.seconds, 1),
            self.dollars + attempt.seconds / 3600 * (attempt.price or 0.0),
            self.known_parts.plus(attempt.parts(over=True)),
        )

    @property
    def known_parts(self) -> Parts:
        """The parts of the time; all of it is not recorded where an older version added it up."""
        return Parts(not_recorded=self.seconds) if self.parts is None else self.parts


@dataclass(frozen=True)
class Mixed:
    """Another dataset, which gives `share` of every batch. Older versions kept no address."""

    fingerprint: str
    share: float
    url: str = ""


DATASET = {"url": str, "fingerprint": str, "classes": int, "mix": tuple[Mixed, ...]}


@dataclass(frozen=True)
class Page:
    """The page of Weights & Biases that shows a run, whose id there is `RunManifest.wandb_id`.

    `project` and `entity` are those that the run was first shown in, whatever the settings of later
    starts say; "" where none is known yet. `url` is the page's address, "" until W&B has answered.
    """

    project: str = ""
    entity: str = ""
    url: str = ""


@dataclass(frozen=True)
class RunManifest:
    """All that is known of a run.

    `attempts` are the newest LISTED, `earlier` sums up those before them. `written` is Unix time,
    for people only; `rollbacks` counts the returns to a checkpoint after a loss that was not
    finite. `replayed` are the newest REPLAYED segments of rows ahead of a checkpoint: those of the
    last attempt may yet be committed, those before were logged by attempts that ended before that,
    or went back behind them. `unsafe_store`: it was claimed last with --unsafe-store, on a store
    that ignores conditional writes. `differences` are what `--recheck` found. `pending` is the
    commit that is being uploaded: its objects count for nothing until it is finished, or adopted by
    the next owner.
    """

    run: str
    recipe: dict[str, Any]
    dataset: dict[str, Any]
    wandb_id: str
    fence: int = 0
    owner: Owner = Owner()
    lease: float = 0.0
    nonce: str = ""
    written: float = 0.0
    status: str = "running"
    rollbacks: int = 0
    checkpoints: tuple[Checkpoint, ...] = ()
    metrics: tuple[Segment, ...] = ()
    replayed: tuple[Segment, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    earlier: Totals = Totals()
    result: dict[str, float] = field(default_factory=dict)
    unsafe_store: bool = False
    page: Page = Page()
    differences: tuple[Difference, ...] = ()
    pending: Pending | None = None

    def claimed(self, owner: Owner, lease: float, now: float) -> "RunManifest":
        """Return the manifest of its next owner, the attempt of the one before ended."""
        before = tuple(
            replace(a, ended="lost") if a.ended == "running" else a for a in self.attempts
        )
        earlier = reduce(Totals.plus, before[: 1 - LISTED], self.earlier)
        attempts = (*before[1 - LISTED :], Attempt(owner.host, now, step=self.step))
        return replace(
            self,
            fence=self.fence + 1,
            owner=owner,
            lease=lease,
            status="running",
            attempts=attempts,
            earlier=earlier,
            written=now,
        )

    def totals(self) -> Totals:
        """Return what all attempts come to."""
        return reduce(Totals.plus, self.attempts, self.earlier)

    def stamped(self, nonce: str, now: float, seconds: float) -> "RunManifest":
        """Return the manifest as it is written `seconds` into the last attempt."""
        return replace(self, nonce=nonce, written=now).with_attempt(
            seconds=round(seconds, 1), ended=self.status
        )

    def with_commit(
        self, checkpoint: Checkpoint, segment: Segment | None, keep_every: int = 0
    ) -> "RunManifest":
        """Return the manifest after a commit, holding the checkpoints that `keep` names.

        Adding the same again changes nothing.
        """
        others = [c for c in self.checkpoints if c.object.key != checkpoint.object.key]
        kept = keep((*others, checkpoint), keep_every, every_of(self.recipe))
        new = () if segment is None or segment in self.metrics else (segment,)
        ahead = tuple(
            s
            for s in self.replayed
            if s.fence != checkpoint.fence or not s.within(checkpoint.progress)
        )
        changed = replace(
            self, checkpoints=kept, metrics=self.metrics + new, replayed=ahead, pending=None
        )
        return (
            changed
            if checkpoint.spent is None
            else changed.with_attempt(committed=checkpoint.spent)
        )

    def with_ahead(self, segment: Segment) -> "RunManifest":
        """Return the manifest with rows that were logged since the last commit.

        Adding the same again changes nothing.
        """
        others = tuple(s for s in self.replayed if s != segment)
        return replace(self, replayed=(*others, segment)[-REPLAYED:])

    @property
    def step(self) -> int:
        """The step of the newest checkpoint; 0 without one."""
        return self.checkpoints[-1].progress.step if self.checkpoints else 0

    @property
    def settings(self) -> Recipe:
        """The recipe; `RunError` with the field that this version cannot train by."""
        try:
            return Recipe.from_dict(self.recipe)
        except RunError as error:
            raise RunError(
                f"the manifest of run {self.run} is damaged, or another version's: {error}"
            ) from error

    @property
    def objects(self) -> tuple[Object, ...]:
        """All that the manifest names as committed."""
        return (
            *(c.object for c in self.checkpoints),
            *(s.object for s in self.metrics + self.replayed),
        )

    @property
    def keys(self) -> set[str]:
        """The keys of all objects that must not be deleted, those of a pending commit included."""
        pending = self.pending.objects if self.pending else ()
        return {named.key for named in (*self.objects, *pending)}

    def ended(self, status: str) -> "RunManifest":
        """Return the manifest with `status`.

        A run that goes back to its last step is done without another validation: its result is that
        step's.
        """
        result = self.result
        if status == "done" and self.checkpoints:
            result = self.checkpoints[-1].metrics | result
        return replace(self, status=status, result=result)

    def back_to(self, step: int) -> "RunManifest":
        """Return the manifest as of the newest checkpoint of `step`; `UsageError` when there is
        none. A run that is done is done still when nothing came after.
        """
        kept = [c for c in self.checkpoints if c.progress.step <= step]
        if not kept or kept[-1].progress.step != step:
            raise UsageError(
                f"run {self.run} has no checkpoint of step {step}; it has those of "
                f"{steps(self.checkpoints)}"
            )
        if self.status == "done" and len(kept) == len(self.checkpoints):
            return self
        return replace(self.up_to(kept[-1]), status="interrupted", result={}, rollbacks=0)

    def up_to(self, checkpoint: Checkpoint) -> "RunManifest":
        """Return the manifest without what was committed after `checkpoint`, one of its own; the
        metrics become `replayed`.
        """
        kept = self.checkpoints[: self.checkpoints.index(checkpoint) + 1]
        metrics = tuple(s for s in self.metrics if s.within(checkpoint.progress))
        replayed = self.replayed + tuple(s for s in self.metrics if s not in metrics)
        attempts = taken_back(self.attempts, self.earlier.attempts, checkpoint)
        return replace(
            self,
            checkpoints=kept,
            metrics=metrics,
            replayed=replayed[-REPLAYED:],
            attempts=attempts,
            pending=None,
        )

    def with_attempt(self, **details: Any) -> "RunManifest":
        """Return the manifest with `details` of the attempt under way."""
        return replace(self, attempts=(*self.attempts[:-1], replace(self.attempts[-1], **details)))

    def to_json(self) -> bytes:
        return (
            json.dumps({"format": FORMAT, "kind": KIND} | asdict(self), indent=1) + "\n"
        ).encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> "RunManifest":
        """Read a manifest found at `where`.

        Raises:
            RunError: It is of another kind, a newer format, or damaged.
        """
        content = _parse_content(data, where)
        try:
            refuse_depth(content)
            # A default would begin anew where the checkpoints are missing, and delete them.
            required = {each.name for each in fields(cls)} - ADDED
            for missing in sorted(required - content.keys()):
                raise ValueError(f"{missing} is missing")
            manifest = typed(cls, content)
            manifest = manifest.ended(manifest.status)
            for flaw in _flaws(manifest):
                raise ValueError(flaw)
        except ValueError as error:
            raise RunError(
                f"{where} is damaged: {error}; restore it from a backup, or choose another run name"
            ) from error
        return manifest


def _parse_content(data: bytes, where: str) -> dict[str, Any]:
    """Return the fields of a run's manifest; refuse other kinds, and formats of other versions."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{where} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.pop("kind", None) != KIND:
        raise RunError(f"{where} is not a {KIND} manifest; choose another run name")
    version = content.pop("format", None)
    if version != FORMAT:
        raise RunError(
            f"{where} has format {version!r:.60}, this wds-train reads format {FORMAT}; upgrade it"
        )
    if isinstance(content.get("owner"), str) and "lease" not in content:
        raise RunError(
            f"{where} was written by a wds-train from before leases, whose runs this one does not "
            "read; finish it with the version that began it, or choose another run name"
        )
    return content


def _flaws(run: RunManifest) -> Iterator[str]:
    """Yield what no manifest of ours holds though its types are right.

    Each is a sentence with the field and its value.
    """
    for name, value in run.dataset.items():
        typed(DATASET.get(name, Any), value, f"dataset.{name}")

    # All objects that the manifest names, with the form that their keys must have.
    classes = run.dataset.get("classes", 1)
    named = [("checkpoints", c.object, CHECKPOINT_KEYS) for c in run.checkpoints]
    named += [("metrics", s.object, SEGMENT_KEYS) for s in run.metrics]
    named += [("replayed", s.object, SEGMENT_KEYS) for s in run.replayed]
    if run.pending is not None:
        named.append(("pending", run.pending.checkpoint.object, CHECKPOINT_KEYS))
        if run.pending.segment is not None:
            named.append(("pending", run.pending.segment.object, SEGMENT_KEYS))

    # (field, value, the rule holds, the rule in words)
    is_complete = run.status != "done" or {*RESULT} <= {*run.result}
    rules: list[tuple[str, Any, bool, str]] = [
        ("run", run.run, bool(NAMES.fullmatch(run.run)), "a run's name"),
        (
            "dataset.fingerprint",
            run.dataset.get("fingerprint"),
            "fingerprint" in run.dataset,
            "a text",
        ),
        ("dataset.classes", classes, 0 < classes < MOST_CLASSES, "a number of classes"),
        ("fence", run.fence, run.fence >= 0, "at least 0"),
        ("lease", run.lease, 0 <= run.lease <= LONGEST_LEASE, f"0 to {LONGEST_LEASE:g} seconds"),
        ("status", run.status, run.status in STATUSES, f"one of {', '.join(STATUSES)}"),
        ("page.project", run.page.project, run.page.project.isprintable(), "a name"),
        ("page.entity", run.page.entity, run.page.entity.isprintable(), "a name"),
        ("page.url", run.page.url, bool(ADDRESS.fullmatch(run.page.url)), "an address of the web"),
        ("result", run.result, is_complete, f"one with {' and '.join(RESULT)}"),
    ]
    for where, at, keys in named:
        has_form = bool(keys.fullmatch(at.key))
        is_digest = bool(SHA256.fullmatch(at.sha256))
        digest = f"{where}: sha256 of {at.key}"
        rules += [
            (f"{where}: object.key", at.key, has_form, f"of the form {keys.pattern}"),
            (f"{where}: bytes of {at.key}", at.bytes, at.bytes >= 0, "at least 0"),
            (digest, at.sha256, is_digest, "64 hexadecimal digits"),
        ]
    for name, value, holds, rule in rules:
        if not holds:
            yield f"{name} is {value!r:.60}, not {rule}"


def taken_back(
    attempts: tuple[Attempt, ...], earlier: int, checkpoint: Checkpoint
) -> tuple[Attempt, ...]:
    """Return the attempts, of which nothing counts any more that was committed after `checkpoint`.

    `earlier` is the number of attempts before these. A checkpoint of an older version does not say
    what its attempt had spent: that attempt keeps what it has.
    """
    found = []
    for fence, attempt in enumerate(attempts, start=earlier + 1):
        counted = attempt.committed
        if fence > checkpoint.fence:
            counted = None
        elif fence == checkpoint.fence and checkpoint.spent is not None:
            counted = checkpoint.spent
        found.append(replace(attempt, committed=counted))
    return tuple(found)


def adopting(run: RunManifest, pending: Pending, keep_every: int = 0) -> RunManifest:
    """Return the manifest of `run` with a commit that an earlier attempt uploaded as a whole, but
    did not finish.
    """
    adopted = pending.checkpoint
    committed = run.with_commit(adopted, pending.segment, keep_every)
    # It is that attempt's work, and not this one's.
    attempts = taken_back(run.attempts, run.earlier.attempts, adopted)
    result = pending.result or run.result
    return replace(committed, attempts=attempts, result=result).with_attempt(
        step=adopted.progress.step
    )


def steps(checkpoints: Iterable[Checkpoint]) -> str:
    """Return the steps of `checkpoints`, for people."""
    return ", ".join(str(step) for step in sorted({c.progress.step for c in checkpoints})) or "none"


def name_of(url: str) -> str:
    """Return the name of the run at `url`, its last part.

    Raises:
        UsageError: It would make trouble in keys, paths or W&B.
    """
    name = url.rstrip("/").rsplit("/", 1)[-1]
    if not NAMES.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot be a run's name: use at most 100 letters, digits, '.', '_' and '-', "
            "a letter or digit first"
        )
    return name


def best(checkpoints: Iterable[Checkpoint], kind: str, ema_every: int) -> Checkpoint | None:
    """Return the checkpoint whose `kind` weights had the highest top-1, the earliest of equals;
    None when none has a telling one. `ema_every` is the recipe's `ema.every`.
    """
    scored = [
        (c, telling(c.metrics, c.progress.step, ema_every).get(SCORES[kind])) for c in checkpoints
    ]
    tops = [(checkpoint, top1) for checkpoint, top1 in scored if top1 is not None]
    return max(tops, key=lambda each: each[1], default=(None, 0.0))[0]


def keep(
    checkpoints: tuple[Checkpoint, ...], every: int = 0, ema_every: int = 1
) -> tuple[Checkpoint, ...]:
    """Return the checkpoints that are worth their storage.

    These are the newest KEPT, the best by raw and by EMA top-1, and, with `every`, those of each
    `every`th epoch's validation; oldest first.
    """
    kept = {*checkpoints[-KEPT:], *(best(checkpoints, kind, ema_every) for kind in SCORES)}
    if every:
        kept |= {c for c in checkpoints if c.metrics and c.progress.evaluated % every == 0}
    return tuple(checkpoint for checkpoint in checkpoints if checkpoint in kept)
