"""The paid time of a run by its use, and the share that became steps that count.

Pure: `checkpoint/clock.py` takes the time, and the run's manifest keeps it. docs/report.md defines
each part. Every paid second is in exactly one of them.
"""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Spent:
    """Seconds of one process by its activities.

    All but `under_way` add up to its whole time.

    Attributes:
        start: Until the first step.
        steps: In training steps.
        data: Waiting for batches.
        commit: Blocked by a commit.
        validation: Validating.
        under_way: The seconds of the step or the validation that is not finished yet. They are in
            `steps` or `validation`, too.
    """

    start: float = 0.0
    steps: float = 0.0
    data: float = 0.0
    commit: float = 0.0
    validation: float = 0.0
    under_way: float = 0.0

    @property
    def seconds(self) -> float:
        """The whole time."""
        return self.start + self.steps + self.data + self.commit + self.validation


@dataclass(frozen=True)
class Parts:
    """Paid seconds by their use.

    Attributes:
        steps: Became steps that count.
        start: Until an attempt's first step.
        data: Waiting for batches.
        commit: Blocked by a commit.
        validation: Validations that count.
        lost: In a step or a validation that was never finished.
        trained_twice: In steps and validations that were finished, but are in no checkpoint.
        not_recorded: Of attempts of an older version, which did not record this.
    """

    steps: float = 0.0
    start: float = 0.0
    data: float = 0.0
    commit: float = 0.0
    validation: float = 0.0
    lost: float = 0.0
    trained_twice: float = 0.0
    not_recorded: float = 0.0

    @property
    def paid(self) -> float:
        """The sum of all parts, in seconds."""
        return sum(asdict(self).values())

    @property
    def goodput(self) -> float | None:
        """The share of the paid time that became steps that count; None where nothing is recorded.

        Time that was not recorded counts as paid, but not as steps: the share is a lower bound.
        """
        if self.paid <= self.not_recorded:
            return None
        return self.steps / self.paid

    def shares(self) -> dict[str, float]:
        """Return each part as a share of the paid time; empty where nothing was paid."""
        # An attempt that was claimed this moment has paid for nothing yet.
        paid = self.paid
        if not paid:
            return {}
        return {name: seconds / paid for name, seconds in asdict(self).items()}

    def plus(self, other: "Parts") -> "Parts":
        """Return the sum of both, part by part."""
        sums = asdict(self)
        for name, seconds in asdict(other).items():
            sums[name] += seconds
        return Parts(**sums)


def parts_of(spent: Spent | None, committed: Spent | None, seconds: float, *, over: bool) -> Parts:
    """Divide the time of one attempt by its use.

    Args:
        spent: Up to the attempt's last sign of life; None where its version recorded nothing.
        committed: Up to its newest state that counts; None where none does.
        seconds: From its claim to its last sign of life.
        over: True if the attempt has ended, so that it commits nothing more.
    """
    if spent is None:
        return Parts(not_recorded=seconds)
    # The work of an attempt that goes on may yet be committed.
    counted = spent
    if over:
        counted = committed or Spent()
    # What is not committed was either left unfinished, or will be trained again.
    useless = spent.steps - counted.steps + spent.validation - counted.validation
    lost = min(useless, spent.under_way)
    return Parts(
        steps=counted.steps,
        start=spent.start,
        data=spent.data,
        commit=spent.commit,
        validation=counted.validation,
        lost=lost,
        trained_twice=useless - lost,
    )
