"""How far a model's probabilities can be believed."""

from dataclasses import dataclass

SURE = 0.5  # the probability of an answer below which it is likelier wrong than right


@dataclass(frozen=True)
class Calibration:
    """`temperature` was fitted on `fitted` samples, none where it is 0, and judged on `judged` others, where it is 1 if it did
    not help: `error_raw` and `error` are the expected calibration error without and with it, `sure` the share of sure
    answers, `right_sure` and `right_unsure` the shares of right ones among these and the others; all in percent, -1 where
    there were none.
    """

    temperature: float = 1.0
    fitted: int = 0
    judged: int = 0
    error_raw: float = -1.0
    error: float = -1.0
    sure: float = -1.0
    right_sure: float = -1.0
    right_unsure: float = -1.0

    def __str__(self) -> str:
        if not self.fitted:
            return "not calibrated"
        return (
            f"temperature {self.temperature:.2f} of {self.fitted} validation samples; on {self.judged} others the probabilities "
            f"are off by {self.error:.1f} points ({self.error_raw:.1f} without), {self.sure:.0f} % of the answers are sure"
        )
