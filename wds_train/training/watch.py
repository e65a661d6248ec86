"""Find a rank that hangs, name it with its place in the code, and end all ranks.

A thread of every rank tells the others, several times within the limit, that it is alive, and since
when it has made no progress. The ranks wait for one another in every step, so one that hangs stops
all of them. A rank that has made no progress for the limit looks for the one to blame.

Nothing here waits for the main thread, which hangs, nor for anything else without a bound.
"""

import contextlib
import faulthandler
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import NoReturn

from wds_train.checkpoint.lease import this_process
from wds_train.checkpoint.run_manifest import Owner
from wds_train.environment import number_of
from wds_train.schema import typed
from wds_train.storage.s3_connection import PATIENCE_SECONDS
from wds_train.training.process_state import (
    place_of_main_thread,
    stack_of_main_thread,
    state_of_process,
)
from wds_train.training.ranks import LAST_SECONDS, LEAVING, Ranks
from wds_train.training.stop_request import StopRequest, leave

# Seconds without progress by default: longer than any step, and than compiling a model.
LIMIT_SECONDS = 600.0
# Seconds above the patience with the dataset's store, whose own error names the cause better.
DATA_MARGIN = 60.0
# Looks within a limit.
LOOKS = 20
# Between two looks, at most.
LOOK_SECONDS = 5.0
# For a line to stderr, which may be a pipe that nobody reads.
WORD_SECONDS = 2.0
# Hanging ranks that a message names.
NAMED = 4


def limit_of(minutes: float | None) -> float:
    """Return the seconds without progress after which a rank hangs.

    Args:
        minutes: Of --hang-minutes; None: longer than any wait that ends by itself.
    """
    if minutes is not None:
        return minutes * 60
    return max(LIMIT_SECONDS, number_of("WDS_S3_PATIENCE", PATIENCE_SECONDS) + DATA_MARGIN)


@dataclass(frozen=True)
class News:
    """The news that a rank gives of itself.

    Attributes:
        owner: Its process.
        number: The number of this message, from 1.
        at: Its place in the order that all ranks work in.
        doing: The same in words.
        seconds: The time that it has been there.
        where: Its place in the code, once it has been there for long.
        waits: A rank may wait for others at that place.
        idle: It does wait for others, or has left the training.
        verdict: The sentence on the ranks that hang, by a rank that has found them, and ends.
        blamed: Those ranks.
    """

    owner: Owner
    number: int = 0
    at: tuple[int, ...] = ()
    doing: str = "the start"
    seconds: float = 0.0
    where: str = ""
    waits: bool = False
    idle: bool = False
    verdict: str = ""
    blamed: tuple[int, ...] = ()


class Watch:
    """Finds a rank that hangs, this one or another, and ends this one.

    The main thread calls `beat` wherever it makes progress.

    Args:
        ranks: The processes of the training.
        stop: The request to stop, which has its own deadline.
        minutes: Of --hang-minutes; None for the default.
        last_word: Called by the leader before it ends, for LAST_SECONDS at most.
    """

    def __init__(
        self, ranks: Ranks, stop: StopRequest, minutes: float | None, last_word: Callable[[], None]
    ) -> None:
        self._ranks = ranks
        self._stop = stop
        self._last_word = last_word
        self._others = [rank for rank in range(ranks.size) if rank != ranks.rank]
        self._limit = limit_of(minutes)
        self._every = min(LOOK_SECONDS, self._limit / LOOKS)
        self._own = News(this_process())
        # Monotonic seconds: of the last beat, of the start, and of the last exchange of news.
        self._beat_at = self._began_at = time.monotonic()
        self._talked_at = self._began_at
        # The last news of each other rank, and when it came.
        self._heard: dict[int, tuple[News, float]] = {}
        self._closed = threading.Event()

    @property
    def silence(self) -> timedelta:
        """The time that the ranks may wait for one another: this watch must be faster."""
        return timedelta(seconds=self._limit + 2 * LAST_SECONDS)

    def start(self) -> None:
        """Begin to watch. This process must not fork any more."""
        self._beat_at = self._began_at = self._talked_at = time.monotonic()
        if self._ranks.size > 1:
            threading.Thread(target=self._talk, name="news", daemon=True).start()
        # At once: the very first step may be the one that keeps all threads from running.
        _arm_faulthandler(self._limit + 4 * self._every)
        threading.Thread(target=self._look, name="watch", daemon=True).start()

    def beat(self, doing: str, *at: int) -> None:
        """Note progress of the main thread.

        Args:
            doing: What it does now, in words.
            at: The place in the order that all ranks work in.
        """
        self._own = replace(self._own, doing=doing, at=at)
        self._beat_at = time.monotonic()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()

    def _talk(self) -> None:
        """Exchange news with the other ranks: the body of a thread, which may hang in the store."""
        # RuntimeError: the store is gone, with the process that held it.
        with contextlib.suppress(RuntimeError):
            store = self._ranks.meeting()
            for number in itertools.count(1):
                store.set(f"news-{self._ranks.rank}", json.dumps(asdict(self._news(number))))
                for rank in self._others:
                    if store.check([f"news-{rank}"]):
                        self._hear(rank, typed(News, json.loads(store.get(f"news-{rank}"))))
                self._talked_at = time.monotonic()
                time.sleep(self._every)

    def _hear(self, rank: int, news: News) -> None:
        """Keep the news of a rank; the same once more says nothing of its present."""
        known = self._heard.get(rank)
        if known is None or known[0].number != news.number:
            self._heard[rank] = (news, time.monotonic())

    def _news(self, number: int = 0) -> News:
        """Return the present news of this rank. Once closed, it is to blame for nothing."""
        seconds = time.monotonic() - self._beat_at
        where = ""
        waits = False
        if seconds > self._limit / 2:
            where, waits = place_of_main_thread()
        idle = self._ranks.waiting or self._closed.is_set()
        return replace(
            self._own, number=number, seconds=seconds, where=where, waits=waits, idle=idle
        )

    def _look(self) -> None:
        """Judge every few seconds: the body of a thread."""
        looked_at = time.monotonic()
        while not self._closed.wait(self._every):
            # A look that comes far too late: this whole process was stopped.
            now = time.monotonic()
            if now - looked_at > 3 * self._every + 1:
                self._forget(now - looked_at)
            looked_at = now
            _arm_faulthandler(self._limit + 4 * self._every)
            # Asked to stop, the training has a deadline already.
            if not self._stop.cause:
                self._judge(now - self._beat_at > self._limit + 3 * self._every)

    def _judge(self, late: bool) -> None:
        """End this process where a rank is to blame.

        The leader decides. Where it is silent, each rank decides for itself.
        """
        # The leader has decided.
        if 0 in self._heard:
            leader, _ = self._heard[0]
            if leader.verdict:
                self._end(leader.verdict, leader.blamed)
        if not late:
            return

        # A silent rank explains those that wait for it.
        silent = self._silent()
        hanging = silent or self._hanging()
        if hanging and (self._ranks.leads or 0 in silent):
            verdict = "; ".join(list(hanging.values())[:NAMED])
            if len(hanging) > NAMED:
                verdict += f" (and {len(hanging) - NAMED} more)"
            self._end(verdict, tuple(hanging))

    def _forget(self, seconds: float) -> None:
        """Count no time in which this whole process was stopped, as a machine that moves is."""
        self._beat_at += seconds
        self._talked_at += seconds
        self._began_at += seconds
        # Replaced as a whole: another thread adds to it.
        later = {}
        for rank, (news, at) in self._heard.items():
            later[rank] = (news, at + seconds)
        self._heard = later

    def _hanging(self) -> dict[int, str]:
        """Return the ranks to blame, with a sentence for each; empty where all wait, or go on."""
        now = time.monotonic()
        known = {}
        # The news is some seconds old.
        for rank, (news, at) in self._heard.items():
            known[rank] = replace(news, seconds=news.seconds + now - at)
        known[self._ranks.rank] = self._news()
        return blame_ranks(known, self._limit)

    def _silent(self) -> dict[int, str]:
        """Return the ranks that have given no news for the limit.

        Their process, or its machine, is stopped or gone.
        """
        if self._ranks.size == 1:
            return {}
        # This rank hears nothing at all: the store itself hangs.
        now = time.monotonic()
        if now - self._talked_at > self._limit:
            return {0: self._describe_store(now - self._talked_at)}
        sentences = {}
        for rank in self._others:
            news, at = self._heard.get(rank, (None, self._began_at))
            if now - at > self._limit:
                sentences[rank] = _describe_silence(rank, news, now - at)
        return sentences

    def _describe_store(self, seconds: float) -> str:
        """Return a sentence on the ranks' store, which rank 0 holds where no launcher does."""
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        sentence = f"where the ranks meet, at {place}, nothing has answered for {seconds:.0f} s"
        if 0 in self._heard:
            news, at = self._heard[0]
            sentence += f"; {_describe_silence(0, news, time.monotonic() - at)}"
        return sentence

    def _end(self, verdict: str, blamed: tuple[int, ...]) -> NoReturn:
        """Say which ranks are to blame, let the leader have its last word, and end this process."""
        LEAVING.set()
        faulthandler.cancel_dump_traceback_later()

        # One rank a machine says it, and those that are to blame, with their stack.
        rank = self._ranks.rank
        first = min({rank, *self._heard} - set(blamed), default=rank)
        if rank == first or rank in blamed or self._ranks.local == 0:
            _write(
                f"wds-train: {verdict}. All ranks end; the same command goes on from the newest "
                "checkpoint. If a step may take so long here, give more --hang-minutes (now "
                f"{self._limit / 60:g})"
            )
        if rank in blamed:
            _write(f"rank {rank}, the main thread:\n{stack_of_main_thread()}")

        # The leader gives the run up, and then sends its verdict to the others.
        if self._ranks.leads:
            _bounded(LAST_SECONDS, self._last_word)
            self._own = replace(self._own, verdict=verdict, blamed=blamed)
            # They must hear of it before the connections end, which is an error to them.
            if self._ranks.size > 1:
                time.sleep(3 * self._every)
        leave(self._stop.code)


@contextlib.contextmanager
def watch_for_hangs(
    ranks: Ranks, stop: StopRequest, minutes: float | None, last_word: Callable[[], None]
) -> Iterator[Watch]:
    """Make a `Watch`, which may be started inside the block, and close it after the block."""
    watch = Watch(ranks, stop, minutes, last_word)
    try:
        yield watch
    finally:
        watch.close()


def blame_ranks(known: dict[int, News], limit: float) -> dict[int, str]:
    """Find the ranks that keep the others waiting.

    Args:
        known: The present news of every rank.
        limit: Seconds without progress after which a rank is late.

    Returns:
        A sentence for each rank to blame; empty where all wait, or go on.
    """
    # The late ones, of those that do not wait for others.
    busy = 0
    late = {}
    for rank, news in known.items():
        if news.idle:
            continue
        busy += 1
        if news.seconds > limit:
            late[rank] = news

    # Of these the ones that are furthest behind: the others wait for them before the next step.
    least = min((news.at for news in late.values()), default=())
    behind = {}
    hanging = {}
    for rank, news in late.items():
        if news.at != least:
            continue
        behind[rank] = _describe_place(rank, news)
        if not news.waits:
            hanging[rank] = behind[rank]

    # All are where a rank waits for others: they wait for one another.
    if not hanging and len(late) == busy:
        return behind
    return hanging


def _describe_silence(rank: int, news: News | None, seconds: float) -> str:
    """Return a sentence on a rank that gave no news for so long; `news` is the last of it."""
    if news is None:
        return (
            f"rank {rank} has not been heard of since the start, {seconds:.0f} s ago; was it "
            "started?"
        )
    said = (
        f"rank {rank} ({news.owner}) has told nothing for {seconds:.0f} s, last at {news.doing}; "
    )
    # On another machine nothing more can be found out.
    if news.owner.machine == "" or news.owner.machine != this_process().machine:
        return (
            f"{said}its process is stopped or gone, or its machine or the network is: look at "
            f"{news.owner.host}"
        )
    state = state_of_process(news.owner.pid)
    if state == "gone":
        return f"{said}its process is gone"
    if state.startswith("R"):
        return (
            f"{said}its process is in state {state}: in C code that lets no other thread of it run"
        )
    return f"{said}its process is in state {state}"


def _describe_place(rank: int, news: News) -> str:
    """Return a sentence on a rank that can say where it hangs."""
    return (
        f"rank {rank} ({news.owner}) has not got beyond {news.doing} for {news.seconds:.0f} s; it "
        f"is in {news.where}"
    )


def _arm_faulthandler(seconds: float) -> None:
    """Let Python's own watchdog print the stacks of all threads, unless it is armed again in time.

    It is for C code that keeps all Python threads from running, those of the watch included.
    """
    faulthandler.dump_traceback_later(seconds, file=2)


def _write(text: str) -> None:
    """Write a line to stderr, which may be a pipe that nobody reads any more, or that is full."""

    def write() -> None:
        with contextlib.suppress(OSError):
            os.write(2, f"{text.rstrip()}\n".encode())

    _bounded(WORD_SECONDS, write)


def _bounded(seconds: float, work: Callable[[], None]) -> None:
    """Do `work` in a thread, and wait for it for `seconds` at most."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
