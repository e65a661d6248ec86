"""The run manifest: `manifest.json`, the one object of a run that changes.

It is changed by compare-and-swap alone. It names every checkpoint and every segment of metrics with
size and sha256; what it does not name does not exist. `fence` counts the claims: an instance writes
only while the manifest carries the fence that it claimed with. While `status` is "running" the run
belongs to its owner, who rewrites the manifest several times per `lease` seconds. Any other status
means that nobody owns it.

All functions here are pure: `checkpoint/writer.py` and `checkpoint/run.py` read and write.
"""

import hashlib
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
# The next start goes on from "interrupted" and "failed", and from "stopped" (by a person) only with
# --go-on; "done" is final, unless a person goes back to an earlier checkpoint.
STATUSES = ("running", "interrupted", "failed", "stopped", "done")
# Runs' names: good as a part of a key, as a folder, and as a name in W&B.
NAMES = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# Nothing else may be named: what a manifest names and its successor does not is deleted.
CHECKPOINT_KEYS = re.compile(r"ckpt/\d+-\d+-\d+\.safetensors")
SEGMENT_KEYS = re.compile(r"metrics/\d+-\d+-\d+(-ahead)?\.jsonl")
SHA256 = re.compile("[0-9a-f]{64}")
# Of a page in a browser; "" where there is none. A report links to it: no spaces, no scripts.
ADDRESS = re.compile(r"(https?://[!-~]+)?")
# Seconds. A claimant waits for as long as a manifest says: a damaged one must not stop it for ever.
LONGEST_LEASE = 3600.0
# More than any dataset has; a damaged number would make a model that fills the memory.
MOST_CLASSES = 1 << 24
# Metrics that every validation gives, among others, and that a run that is done must have.
RESULT = ("val/top1", "val/top1_ema")
# Fields added since the first version of the manifest: those of older runs lack them.
ADDED = {
    "earlier",
    "rollbacks",
    "result",
    "replayed",
    "unsafe_store",
    "page",
    "differences",
    "pending",
}
# Segments kept of rows that no checkpoint goes with: they are for the curves alone.
REPLAYED = 50
# Attempts kept one by one; a run interrupted for ever would otherwise grow its manifest for ever.
LISTED = 100
# Newest checkpoints kept: with one alone, a damaged newest would leave nothing to go back to.
KEPT = 2


@dataclass(frozen=True)
class Progress:
    """The progress of a training, and the sums of its running epoch.

    Attributes:
        step: Optimizer steps that are done.
        evaluated: Epochs that are validated.
        loss_sum: The sum of the losses of the epoch's `loss_steps` steps.
        loss_steps: The steps of the epoch so far.
        lost: The epoch's unreadable samples.
        best: The highest top-1 so far, in percent, of raw or EMA weights.
        best_epoch: The first validated epoch that had it.
    """

    step: int = 0
    evaluated: int = 0
    loss_sum: float = 0.0
    loss_steps: int = 0
    lost: int = 0
    best: float = -1.0
    best_epoch: int = 0

    def with_validation(self, metrics: dict[str, float]) -> "Progress":
        """Return the progress with one more epoch validated, and the sums of the next one at zero.

        Args:
            metrics: Of the validation, without those that say nothing of the training.
        """
        epoch = self.evaluated + 1
        top1 = max(metrics[name] for name in RESULT if name in metrics)
        if top1 > self.best:
            return Progress(self.step, epoch, best=top1, best_epoch=epoch)
        return Progress(self.step, epoch, best=self.best, best_epoch=self.best_epoch)


@dataclass(frozen=True)
class Object:
    """An object on the store: a checkpoint, or a segment of metrics. `key` is below the run."""

    key: str
    bytes: int
    sha256: str


def describe_object(key: str, data: bytes) -> Object:
    """Return the entry of a manifest for an object that holds `data`."""
    return Object(key, len(data), hashlib.sha256(data).hexdigest())


def place_of(fence: int, at: Progress) -> str:
    """Return the name of what an attempt uploads at `at`, without its folder and extension."""
    return f"{fence:06d}-{at.step:09d}-{at.evaluated:06d}"


def fence_of(written: Object) -> int:
    """Return the fence of the attempt that wrote an object: its name begins with it."""
    return int(written.key.partition("/")[2].partition("-")[0])


@dataclass(frozen=True)
class Checkpoint:
    """The state of a training after a step.

    Attributes:
        object: The tensors, as safetensors.
        progress: The steps and epochs so far.
        metrics: Those of the validation at this step; empty when there was none.
        spent: The seconds that its attempt had spent until then; None where an older version
            committed it.
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
    """Metrics logged up to a `step` and a number of `evaluated` epochs, those of a `Progress`."""

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

    Its objects may be on the store, in part, or not at all. `result` is that of the run, where this
    is its last commit.
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
    """A process that owns a run.

    Attributes:
        host: The machine's name, for people.
        machine: Unique to a boot and a PID namespace; "" where that cannot be known.
        pid: The number of the process.
        started: When it started, in clock ticks since the boot: no later process of the same number
            has the same.
    """

    host: str = ""
    machine: str = ""
    pid: int = 0
    started: int = 0

    def __str__(self) -> str:
        return f"{self.host}, process {self.pid}"


@dataclass(frozen=True)
class Attempt:
    """One instance's work on a run.

    Attributes:
        host: The machine's name.
        started: Unix time, for people only.
        seconds: From its claim up to its last sign of life.
        ended: A status, or "lost" when it just fell silent.
        step: The step that it began at.
        hardware: Such as "2 x NVIDIA A10G".
        instance: EC2's type; "" elsewhere.
        price: Dollars an hour.
        spent: Where its time went, from the start of its process on; None where that was not noted.
        committed: What of `spent` had been spent at the newest state that counts; None likewise.
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
        """Return its time by use; it is `over` once it commits nothing more."""
        return parts_of(self.spent, self.committed, self.seconds, over=over)


@dataclass(frozen=True)
class Difference:
    """A step that was computed twice, and gave two results.

    Attributes:
        step: The optimizer step, from 1.
        rank: The rank that computed it.
        tensor: The first tensor that differed, in words.
        host: The machine's name.
        boot: Unique to the machine since its last boot; "" where that is unknown.
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

    Attributes:
        attempts: Their number.
        interruptions: Of these, those that ended as "interrupted" or "lost".
        failures: Of these, those that ended as "failed".
        seconds: Their time.
        dollars: The cost of those whose price is known.
        parts: Their time by use; None where an older version added them up.
    """

    attempts: int = 0
    interruptions: int = 0
    failures: int = 0
    seconds: float = 0.0
    dollars: float = 0.0
    parts: Parts | None = None

    def plus(self, attempt: Attempt) -> "Totals":
        """Return the sums with one more attempt, which is over."""
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
        """The time by use; all of it counts as not recorded where an older version added it up."""
        if self.parts is None:
            return Parts(not_recorded=self.seconds)
        return self.parts


@dataclass(frozen=True)
class Mixed:
    """Another dataset, which gives `share` of every batch; `url` is "" in older manifests."""

    fingerprint: str
    share: float
    url: str = ""


# The types of what a manifest says of its dataset; `RunManifest.dataset` itself takes any.
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

    Attributes:
        recipe: The recipe, as `Recipe.to_dict` returns it.
        dataset: Its data, as `resume_checks.data_of` describes it.
        fence: The number of claims.
        lease: Seconds of silence after which others may claim it.
        nonce: A random text, another at each write: no two manifests are equal.
        written: Unix time, for people only.
        rollbacks: Returns to a checkpoint after a loss that was not finite.
        checkpoints: Those that are kept, oldest first; so are `metrics` and `attempts`.
        replayed: The newest REPLAYED segments of rows ahead of a checkpoint. Those of the last
            attempt may yet be committed; older ones were logged by attempts that ended before that.
        attempts: The newest LISTED; `earlier` has the sums over those before.
        unsafe_store: It was claimed last with --unsafe-store, on a store that ignores conditional
            writes.
        differences: The findings of `--recheck`.
        pending: The commit that is being uploaded. Its objects count for nothing until it is
            finished, or adopted by the next owner.
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

    def with_claim(self, owner: Owner, lease: float, now: float) -> "RunManifest":
        """Return the manifest of its next owner; the attempt before is over."""
        before = _end_lost(self.attempts)
        # The oldest one moves to the sums where the new one makes the list too long.
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
        """Return the sums over all attempts."""
        return reduce(Totals.plus, self.attempts, self.earlier)

    def with_stamp(self, nonce: str, now: float, seconds: float) -> "RunManifest":
        """Return the manifest as it is written `seconds` into the last attempt."""
        return replace(self, nonce=nonce, written=now).with_attempt(
            seconds=round(seconds, 1), ended=self.status
        )

    def with_commit(
        self, checkpoint: Checkpoint, segment: Segment | None, keep_every: int = 0
    ) -> "RunManifest":
        """Return the manifest after a commit, with the checkpoints that `keep` returns.

        Adding the same again changes nothing.
        """
        others = [c for c in self.checkpoints if c.object.key != checkpoint.object.key]
        kept = keep((*others, checkpoint), keep_every, every_of(self.recipe))
        metrics = self.metrics
        if segment is not None and segment not in metrics:
            metrics = (*metrics, segment)

        # Rows that were uploaded ahead are in the commit's own segment now.
        ahead = []
        for each in self.replayed:
            if each.fence != checkpoint.fence or not each.within(checkpoint.progress):
                ahead.append(each)
        changed = replace(
            self, checkpoints=kept, metrics=metrics, replayed=tuple(ahead), pending=None
        )
        if checkpoint.spent is None:
            return changed
        return changed.with_attempt(committed=checkpoint.spent)

    def with_ahead(self, segment: Segment) -> "RunManifest":
        """Return the manifest with rows that were logged since the last commit.

        Adding the same again changes nothing.
        """
        others = [each for each in self.replayed if each != segment]
        return replace(self, replayed=(*others, segment)[-REPLAYED:])

    @property
    def step(self) -> int:
        """The step of the newest checkpoint; 0 without one."""
        return self.checkpoints[-1].progress.step if self.checkpoints else 0

    @property
    def settings(self) -> Recipe:
        """The recipe; raises `RunError` with the field that this version cannot train by."""
        try:
            return Recipe.from_dict(self.recipe)
        except RunError as error:
            raise RunError(
                f"the manifest of run {self.run} is damaged, or another version's: {error}"
            ) from error

    @property
    def objects(self) -> tuple[Object, ...]:
        """All objects that count: those of checkpoints and metrics."""
        committed: list[Checkpoint | Segment] = [*self.checkpoints, *self.metrics, *self.replayed]
        return tuple(each.object for each in committed)

    @property
    def keys(self) -> set[str]:
        """The keys of all objects that must not be deleted, those of a pending commit included."""
        named = [*self.objects]
        if self.pending is not None:
            named += self.pending.objects
        return {each.key for each in named}

    def with_status(self, status: str) -> "RunManifest":
        """Return the manifest with `status`.

        A run that went back to its last step is done without another validation: its result is that
        step's.
        """
        result = self.result
        if status == "done" and self.checkpoints:
            result = self.checkpoints[-1].metrics | result
        return replace(self, status=status, result=result)

    def back_to(self, step: int) -> "RunManifest":
        """Return the manifest as of the newest checkpoint of `step`.

        A run that is done stays done when nothing came after.

        Raises:
            UsageError: There is no checkpoint of this step.
        """
        kept = [c for c in self.checkpoints if c.progress.step <= step]
        if not kept or kept[-1].progress.step != step:
            raise UsageError(
                f"run {self.run} has no checkpoint of step {step}; it has those of "
                f"{list_steps(self.checkpoints)}"
            )
        if self.status == "done" and len(kept) == len(self.checkpoints):
            return self
        return replace(self.up_to(kept[-1]), status="interrupted", result={}, rollbacks=0)

    def up_to(self, checkpoint: Checkpoint) -> "RunManifest":
        """Return the manifest without its commits after `checkpoint`.

        Their metrics become `replayed`.
        """
        metrics, beyond = _split_segments(self.metrics, checkpoint.progress)
        return replace(
            self,
            checkpoints=self.checkpoints[: self.checkpoints.index(checkpoint) + 1],
            metrics=tuple(metrics),
            replayed=(*self.replayed, *beyond)[-REPLAYED:],
            attempts=_take_back(self.attempts, self.earlier.attempts, checkpoint),
            pending=None,
        )

    def with_attempt(self, **details: Any) -> "RunManifest":
        """Return the manifest with `details` of the attempt under way."""
        return replace(self, attempts=(*self.attempts[:-1], replace(self.attempts[-1], **details)))

    def to_json(self) -> bytes:
        """Return the content of `manifest.json`."""
        content = {"format": FORMAT, "kind": KIND} | asdict(self)
        return (json.dumps(content, indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> "RunManifest":
        """Read a manifest found at `where`.

        Raises:
            RunError: It is of another kind, a newer format, or damaged.
        """
        content = _parse_content(data, where)
        try:
            return _make_manifest(content)
        except ValueError as error:
            raise RunError(
                f"{where} is damaged: {error}; restore it from a backup, or choose another run name"
            ) from error


def _parse_content(data: bytes, where: str) -> dict[str, Any]:
    """Return the fields of a run's manifest.

    Raises:
        RunError: It is of another kind, or of another version's format.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{where} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.pop("kind", None) != KIND:
        raise RunError(f"{where} is not a {KIND} manifest; choose another run name")

    # Refuse other versions: this one would drop the fields that it does not know.
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


def _make_manifest(content: dict[str, Any]) -> RunManifest:
    """Return the manifest of these fields; raise `ValueError` for a field that cannot be right."""
    refuse_depth(content)
    # A default would start the run over where the checkpoints are missing, and delete them.
    required = {each.name for each in fields(RunManifest)} - ADDED
    for missing in sorted(required - content.keys()):
        raise ValueError(f"{missing} is missing")
    manifest = typed(RunManifest, content)
    # Older manifests have no result: it is that of the newest checkpoint.
    manifest = manifest.with_status(manifest.status)
    for flaw in _flaws(manifest):
        raise ValueError(flaw)
    return manifest


def _flaws(run: RunManifest) -> Iterator[str]:
    """Yield the values that no manifest of ours has, though their types are right.

    Each is a sentence with the field and its value.
    """
    for name, value in run.dataset.items():
        typed(DATASET.get(name, Any), value, f"dataset.{name}")

    # The rules: (field, value, the rule holds, the rule in words).
    classes = run.dataset.get("classes", 1)
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
    # Keys above all: what they name is read, and deleted.
    for where, at, keys in _named_objects(run):
        has_form = bool(keys.fullmatch(at.key))
        is_digest = bool(SHA256.fullmatch(at.sha256))
        digest = f"{where}: sha256 of {at.key}"
        rules += [
            (f"{where}: object.key", at.key, has_form, f"of the form {keys.pattern}"),
            (f"{where}: bytes of {at.key}", at.bytes, at.bytes >= 0, "at least 0"),
            (digest, at.sha256, is_digest, "64 hexadecimal digits"),
        ]

    # Report the rules that do not hold.
    for name, value, holds, rule in rules:
        if not holds:
            yield f"{name} is {value!r:.60}, not {rule}"


def _named_objects(run: RunManifest) -> Iterator[tuple[str, Object, re.Pattern[str]]]:
    """Yield each object that a manifest names: its field, and the form that its key must have."""
    for checkpoint in run.checkpoints:
        yield "checkpoints", checkpoint.object, CHECKPOINT_KEYS
    for segment in run.metrics:
        yield "metrics", segment.object, SEGMENT_KEYS
    for segment in run.replayed:
        yield "replayed", segment.object, SEGMENT_KEYS
    if run.pending is not None:
        yield "pending", run.pending.checkpoint.object, CHECKPOINT_KEYS
        if run.pending.segment is not None:
            yield "pending", run.pending.segment.object, SEGMENT_KEYS


def _split_segments(
    segments: Iterable[Segment], at: Progress
) -> tuple[list[Segment], list[Segment]]:
    """Return the segments that hold nothing beyond `at`, and the others."""
    within = []
    beyond = []
    for segment in segments:
        if segment.within(at):
            within.append(segment)
        else:
            beyond.append(segment)
    return within, beyond


def _end_lost(attempts: Iterable[Attempt]) -> list[Attempt]:
    """Return the attempts; those that nobody ended were lost."""
    ended = []
    for attempt in attempts:
        if attempt.ended == "running":
            ended.append(replace(attempt, ended="lost"))
        else:
            ended.append(attempt)
    return ended


def _take_back(
    attempts: tuple[Attempt, ...], earlier: int, checkpoint: Checkpoint
) -> tuple[Attempt, ...]:
    """Return the attempts without the work that was committed after `checkpoint`.

    Args:
        attempts: Those that a manifest lists.
        earlier: The number of attempts before these.
        checkpoint: The newest one that counts. One of an older version does not say what its
            attempt had spent: that attempt keeps what it has.
    """
    found = []
    for fence, attempt in enumerate(attempts, start=earlier + 1):
        counted = attempt.committed
        # An attempt after the checkpoint's own has nothing left that counts.
        if fence > checkpoint.fence:
            counted = None
        elif fence == checkpoint.fence and checkpoint.spent is not None:
            counted = checkpoint.spent
        found.append(replace(attempt, committed=counted))
    return tuple(found)


def adopt_commit(run: RunManifest, pending: Pending, keep_every: int = 0) -> RunManifest:
    """Return the manifest of `run` with a commit that an earlier attempt uploaded, but never named.

    Args:
        run: The manifest.
        pending: The commit, which has arrived as a whole.
        keep_every: As in `keep`.
    """
    adopted = pending.checkpoint
    committed = run.with_commit(adopted, pending.segment, keep_every)
    # It is that attempt's work, and not this one's.
    attempts = _take_back(run.attempts, run.earlier.attempts, adopted)
    committed = replace(committed, attempts=attempts, result=pending.result or run.result)
    return committed.with_attempt(step=adopted.progress.step)


def list_steps(checkpoints: Iterable[Checkpoint]) -> str:
    """Return the steps of `checkpoints`, for people."""
    numbers = {checkpoint.progress.step for checkpoint in checkpoints}
    return ", ".join(map(str, sorted(numbers))) or "none"


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
    """Return the checkpoint whose weights had the highest top-1; the earliest of equal ones.

    Args:
        checkpoints: Oldest first.
        kind: "raw" or "ema".
        ema_every: The recipe's `ema.every`: EMA weights that were never updated have no score.

    Returns:
        None when no checkpoint has a score.
    """
    found: Checkpoint | None = None
    highest = 0.0
    for checkpoint in checkpoints:
        scores = telling(checkpoint.metrics, checkpoint.progress.step, ema_every)
        top1 = scores.get(SCORES[kind])
        # Strictly higher: the earliest of equal ones stays.
        if top1 is not None and (found is None or top1 > highest):
            found = checkpoint
            highest = top1
    return found


def keep(
    checkpoints: tuple[Checkpoint, ...], every: int = 0, ema_every: int = 1
) -> tuple[Checkpoint, ...]:
    """Return the checkpoints that are worth their storage.

    These are the newest KEPT, the best by raw and by EMA top-1, and, with `every`, those of each
    `every`th epoch's validation.

    Args:
        checkpoints: Oldest first, as those that are returned.
        every: Epochs; 0 for none.
        ema_every: The recipe's `ema.every`.
    """
    tops = [best(checkpoints, kind, ema_every) for kind in SCORES]
    kept = []
    for checkpoint in checkpoints:
        is_newest = checkpoint in checkpoints[-KEPT:]
        is_regular = every and checkpoint.metrics and checkpoint.progress.evaluated % every == 0
        if is_newest or is_regular or checkpoint in tops:
            kept.append(checkpoint)
    return tuple(kept)
