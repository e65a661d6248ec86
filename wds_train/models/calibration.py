"""The calibration of a model's probabilities, and the one function that makes them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

SURE = 0.5  # the probability of an answer below which it is likelier wrong than right
NEEDED = 100  # images: the temperature of fewer is chance


@dataclass(frozen=True)
class Calibration:
    """A temperature, by which logits are divided, and how well it does.

    It was fitted on `fitted` samples, none where it is 0, and judged on `judged` others:
    `error_raw` and `error` are the expected calibration error there without and with it, `sure` the
    share of sure answers, `right_sure` and `right_unsure` the shares of right ones among these and
    the others; all in percent, -1 where there were none. `reason` says why the temperature is 1,
    where it is known.
    """

    temperature: float = 1.0
    fitted: int = 0
    judged: int = 0
    error_raw: float = -1.0
    error: float = -1.0
    sure: float = -1.0
    right_sure: float = -1.0
    right_unsure: float = -1.0
    reason: str = ""

    @property
    def used(self) -> bool:
        """True if the probabilities are calibrated."""
        return bool(self.fitted) and not self.reason

    @property
    def helps(self) -> bool:
        """True if the error that is printed is less with the temperature than without."""
        return float(_printed(self.error)) < float(_printed(self.error_raw))

    def __str__(self) -> str:
        if not self.used:
            return f"not calibrated: {self.reason}" if self.reason else "not calibrated"
        return (
            f"temperature {self.temperature:.2f} of {self.fitted} validation samples; on "
            f"{self.judged} others the probabilities are off by {_printed(self.error)} points "
            f"({_printed(self.error_raw)} without), {self.sure:.0f} % of the answers are sure"
        )


def uncalibrated(images: int) -> Calibration:
    """Return the calibration by so few images that no temperature is fitted."""
    return Calibration(
        reason=f"{images} image{'' if images == 1 else 's'}, at least {NEEDED} are needed"
    )


def refused(found: Calibration) -> Calibration:
    """Return the calibration that is left of a temperature that does not help.

    The figures without it are to be filled in.
    """
    reason = (
        f"a temperature of {found.temperature:.2f}, fitted on {found.fitted} images, does not "
        f"help: on {found.judged} others the probabilities are off by {_printed(found.error)} "
        f"points with it, {_printed(found.error_raw)} without"
    )
    return Calibration(
        1.0, found.fitted, found.judged, found.error_raw, found.error_raw, reason=reason
    )


def as_judged_now(found: Calibration) -> Calibration:
    """Return, as it is judged now, `found` as an earlier version wrote it, which used temperatures
    of a few images, and such as did not help.
    """
    if found.reason or not found.fitted:
        return found
    if found.fitted + found.judged < NEEDED:
        return uncalibrated(found.fitted + found.judged)
    return found if found.helps else refused(found)


def probabilities(logits: NDArray[Any], temperature: float) -> NDArray[np.float64]:
    """Return the softmax of `logits` [samples, classes] at `temperature`.

    Every command, page and file takes an image's probabilities from here.
    """
    return np.exp(log_softmax(logits.astype(np.float64) / temperature, axis=1))


def _printed(points: float) -> str:
    return f"{points:.1f}"
