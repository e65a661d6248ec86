"""What a person sees of a run in a terminal or a log."""

import contextlib
import sys
import time

from tqdm import tqdm

LOG_SECONDS = 30.0  # between lines where there is no terminal


def say(message: str) -> None:
    """Print a line for the person, above the progress bar if there is one."""
    with contextlib.suppress(OSError):  # a terminal that was closed must not end the training
        tqdm.write(message, file=sys.stderr)


class Bar:
    """A bar over all steps in a terminal; elsewhere a line every LOG_SECONDS."""

    def __init__(self, total: int, done: int, batch: int, *, shown: bool = True) -> None:
        self._batch, self._total, self._shown = batch, total, shown
        self._bar = tqdm(
            total=total,
            initial=done,
            unit="step",
            disable=not (shown and sys.stderr.isatty()),
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}% {bar} step {n_fmt}/{total_fmt}, {remaining} left{postfix}",
        )
        self._start, self._first = time.monotonic(), done
        self._next_line = self._start + LOG_SECONDS

    def step(self, done: int, loss: float | None) -> None:
        now = time.monotonic()
        rate = (done - self._first) / max(now - self._start, 1e-9)
        if loss is not None:
            self._bar.set_postfix_str(f"loss {loss:.3f}, {rate * self._batch:.0f} img/s", refresh=False)
        with contextlib.suppress(OSError):  # as `say`
            self._bar.update(done - self._bar.n)
        if self._shown and self._bar.disable and now >= self._next_line:
            left = (self._total - done) / max(rate, 1e-9)
            shown = "" if loss is None else f", loss {loss:.3f}"
            say(f"step {done}/{self._total}{shown}, {rate * self._batch:.0f} img/s, {left / 60:.0f} min left")
            self._next_line = now + LOG_SECONDS

    def close(self) -> None:
        self._bar.close()
