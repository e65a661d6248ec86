"""The calibration of a model's probabilities, and the one function that makes them.

`evaluation/calibrate.py` fits the temperature. A run's manifest and exported files keep it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

# An answer of a lower probability is likelier wrong than right.
SURE = 0.5
# Images: a temperature of fewer is chance.
NEEDED = 100


@dataclass(frozen=True)
class Calibration:
    """A temperature, by which logits are divided, and how well it does.

    A figure is -1 where there were no samples to measure it on.

    Attributes:
        temperature: The temperature; 1 changes nothing.
        fitted: The samples that it was fitted on; 0 if it was not.
        judged: The other samples, on which the figures below were measured.
        error_raw: Expected calibration error without the temperature, in percent.
        error: Expected calibration error with it, in percent.
        sure: Share of sure answers, whose probability is at least SURE, in percent.
        right_sure: Share of right ones among the sure answers, in percent.
        right_unsure: Share of right ones among the other answers, in percent.
        reason: The reason why the temperature is 1, if it is known.
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
        return float(_format_points(self.error)) < float(_format_points(self.error_raw))

    def __str__(self) -> str:
        if self.reason:
            return f"not calibrated: {self.reason}"
        if not self.used:
            return "not calibrated"
        error = _format_points(self.error)
        error_raw = _format_points(self.error_raw)
        return (
            f"temperature {self.temperature:.2f} of {self.fitted} validation samples; on "
            f"{self.judged} others the probabilities are off by {error} points "
            f"({error_raw} without), {self.sure:.0f} % of the answers are sure"
        )


def uncalibrated(images: int) -> Calibration:
    """Return the calibration for a model that has too few images to fit a temperature.

    Args:
        images: The number of images, less than NEEDED.
    """
    plural = "s"
    if images == 1:
        plural = ""
    return Calibration(reason=f"{images} image{plural}, at least {NEEDED} are needed")


def refused(found: Calibration) -> Calibration:
    """Return the calibration that replaces a temperature that does not help.

    Args:
        found: The calibration with that temperature.

    Returns:
        A calibration of temperature 1, with the reason. The caller fills in its figures.
    """
    error = _format_points(found.error)
    error_raw = _format_points(found.error_raw)
    reason = (
        f"a temperature of {found.temperature:.2f}, fitted on {found.fitted} images, does not "
        f"help: on {found.judged} others the probabilities are off by {error} "
        f"points with it, {error_raw} without"
    )
    return Calibration(
        1.0, found.fitted, found.judged, found.error_raw, found.error_raw, reason=reason
    )


def judge_again(found: Calibration) -> Calibration:
    """Apply today's rules to the calibration in a manifest or file.

    Earlier versions used temperatures that were fitted on a few images, or that did not help.

    Args:
        found: The calibration as it was written.
    """
    if found.reason or not found.fitted:
        return found
    # It was fitted on some of the images, and judged on the others.
    if found.fitted + found.judged < NEEDED:
        return uncalibrated(found.fitted + found.judged)
    if found.helps:
        return found
    return refused(found)


def probabilities(logits: NDArray[Any], temperature: float) -> NDArray[np.float64]:
    """Return the probabilities of logits, float64 [samples, classes].

    Every command, page and file takes an image's probabilities from here.

    Args:
        logits: Logits of any float dtype, [samples, classes].
        temperature: The temperature of their calibration; 1 for none.
    """
    # In float64: float32 would round the small probabilities that a large temperature makes.
    return np.exp(log_softmax(logits.astype(np.float64) / temperature, axis=1))


def _format_points(points: float) -> str:
    """Return an error as messages show it: two that look equal must count as equal."""
    return f"{points:.1f}"
