"""A rank that hangs: which one it is, where it is, and the end of all of them.

Every rank tells the others by a thread, several times a limit, that it is there, and since when it
has not got on. The ranks wait for one another in every step, so that one that hangs stops all of
them: when a rank itself has not got on for the limit, it looks for the one that is to blame. That
one is named with its place in the code, and every rank ends.

Nothing here waits for the main thread, which hangs, nor for anything else without a bound.
"""

import contextlib
import faulthandler
import itertools
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import NoReturn

from wds_train.checkpoint.lease import this_process
from wds_train.checkpoint.run_manifest import Owner
from wds_train.environment import number_of
from wds_train.schema import typed
from wds_train.storage.s3_connection import PATIENCE_SECONDS
from wds_train.training.ranks import LAST_SECONDS, LEAVING, Ranks
from wds_train.training.stop_request import StopRequest, leave

LIMIT_SECONDS = 600.0
# seconds above the patience with the dataset's store, which ends by an error of its own
DATA_MARGIN = 60.0
LOOKS = 20  # in a limit
LOOK_SECONDS = 5.0  # between two of them, at most
WORD_SECONDS = 2.0  # for a line to stderr, which may be a pipe that nobody reads
NAMED = 4  # hanging ranks, or workers of one, that a message names
WAITS = ("/torch/distributed/", "/torch/nn/parallel/distributed.py", "/torch/autograd/graph.py")
"""Files of the functions in which a rank may wait for the others within a step."""
DATA = "/training/deadline.py"
"""The file of the function in which the main thread waits for a batch, which other threads and
processes make.
"""

Place = tuple[str, bool]
"""The place of the main thread, in words, and if a rank may wait for others there."""


def limit_of(minutes: float | None) -> float:
    """Return the seconds after which a rank that does not get on hangs.

    They are those asked for, or as many as what waits by itself may take.
    """
    if minutes is not None:
        return minutes * 60
    return max(LIMIT_SECONDS, number_of("WDS_S3_PATIENCE", PATIENCE_SECONDS) + DATA_MARGIN)


@dataclass(frozen=True)
class News:
    """The news that a rank gives of itself: the `told`th time, that it came to `doing`, which is
    `at` in the order that all ranks work in, and has been there for `seconds`. `where` is its place
    in the code, once it has been there for long, and `waits` whether that is one where a rank may
    wait for others. `idle`: it does wait for others, or has left the training. With `verdict`, it
    has found those that are `blamed`, and ends.
    """

    owner: Owner
    told: int = 0
    at: tuple[int, ...] = ()
    doing: str = "the start"
    seconds: float = 0.0
    where: str = ""
    waits: bool = False
    idle: bool = False
    verdict: str = ""
    blamed: tuple[int, ...] = ()


class Watch:
    """Knows that a rank hangs, this one or another.

    The main thread says `beat` wherever it gets on.

    `last_word` is what the leader does before it ends, for LAST_SECONDS at most.
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
        self._beat_at = self._began_at = time.monotonic()
        self._heard: dict[int, tuple[News, float]] = {}
        self._talked_at = self._began_at
        self._closed = threading.Event()

    @property
    def silence(self) -> timedelta:
        """The time that the ranks may wait for one another.

        It lasts until this watch has found the one that hangs.
        """
        return timedelta(seconds=self._limit + 2 * LAST_SECONDS)

    def start(self) -> None:
        """Begin to watch. It is to be called once this process forks no more."""
        self._beat_at = self._began_at = self._talked_at = time.monotonic()
        if self._ranks.size > 1:
            threading.Thread(target=self._talk, name="news", daemon=True).start()
        _put_off_watchdog(self._limit + 4 * self._every)
        threading.Thread(target=self._look, name="watch", daemon=True).start()

    def beat(self, doing: str, *at: int) -> None:
        """Say that the main thread got on, and what it does now: `at` which place in the order that
        all ranks work in.
        """
        self._own = replace(self._own, doing=doing, at=at)
        self._beat_at = time.monotonic()

    def close(self) -> None:
        """Watch no more."""
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()

    def _talk(self) -> None:
        """The body of the thread that tells the other ranks, and hears them.

        It alone may hang with their store.
        """
        with contextlib.suppress(RuntimeError):  # the store is gone, with the process that held it
            store = self._ranks.meeting()
            for told in itertools.count(1):
                store.set(f"news-{self._ranks.rank}", json.dumps(asdict(self._news(told))))
                for rank in self._others:
                    if store.check([f"news-{rank}"]):
                        self._hear(rank, typed(News, json.loads(store.get(f"news-{rank}"))))
                self._talked_at = time.monotonic()
                time.sleep(self._every)

    def _hear(self, rank: int, news: News) -> None:
        known = self._heard.get(rank)
        if known is None or known[0].told != news.told:
            self._heard[rank] = (news, time.monotonic())

    def _news(self, told: int = 0) -> News:
        """Return what to tell of this rank now. Once closed, it is to blame for nothing."""
        seconds = time.monotonic() - self._beat_at
        place = ("", False)
        if seconds > self._limit / 2:
            place = place_of_main_thread()
        idle = self._ranks.waiting or self._closed.is_set()
        return replace(
            self._own, told=told, seconds=seconds, where=place[0], waits=place[1], idle=idle
        )

    def _look(self) -> None:
        """The body of the thread that judges."""
        looked_at = time.monotonic()
        while not self._closed.wait(self._every):
            now = time.monotonic()
            if now - looked_at > 3 * self._every + 1:
                self._forget(now - looked_at)
            looked_at = now
            _put_off_watchdog(self._limit + 4 * self._every)
            # Asked to stop, the training has a deadline already.
            if not self._stop.cause:
                self._judge(now - self._beat_at > self._limit + 3 * self._every)

    def _judge(self, late: bool) -> None:
        """End this process where a rank is to blame.

        The leader decides that, or, where it is silent, each for itself.
        """
        leader = self._heard[0][0] if 0 in self._heard else None
        if leader and leader.verdict:
            self._end(leader.verdict, leader.blamed)
        if not late:
            return
        silent = self._silent()
        hanging = silent or self._hanging()
        if hanging and (self._ranks.leads or 0 in silent):
            named = "; ".join(list(hanging.values())[:NAMED])
            more = f" (and {len(hanging) - NAMED} more)" if len(hanging) > NAMED else ""
            self._end(f"{named}{more}", tuple(hanging))

    def _forget(self, seconds: float) -> None:
        """Count no time in which this whole process was stopped, as a machine that moves is."""
        self._beat_at += seconds
        self._talked_at += seconds
        self._began_at += seconds
        self._heard = {rank: (news, at + seconds) for rank, (news, at) in self._heard.items()}

    def _hanging(self) -> dict[int, str]:
        """Return the ranks to blame, with a sentence for each; empty where all wait, or go on."""
        now = time.monotonic()
        # What was heard is some seconds old.
        known = {
            rank: replace(news, seconds=news.seconds + now - at)
            for rank, (news, at) in self._heard.items()
        }
        known[self._ranks.rank] = self._news()
        busy = {rank: news for rank, news in known.items() if not news.idle}
        late = {rank: news for rank, news in busy.items() if news.seconds > self._limit}
        # The others are in the same step, or wait for this one before the next.
        least = min((news.at for news in late.values()), default=())
        behind = {rank: news for rank, news in late.items() if news.at == least}
        to_blame = {rank: news for rank, news in behind.items() if not news.waits}
        if not to_blame and len(late) == len(busy):  # all wait for one another
            to_blame = behind
        return {rank: _place(rank, news) for rank, news in to_blame.items()}

    def _silent(self) -> dict[int, str]:
        """Return the ranks that have given no news for the limit.

        Their process, or its machine, is stopped or gone.
        """
        if self._ranks.size == 1:
            return {}
        now = time.monotonic()
        if now - self._talked_at > self._limit:
            return {0: self._store_hangs(now - self._talked_at)}
        sentences = {}
        for rank in self._others:
            news, at = self._heard.get(rank, (None, self._began_at))
            if now - at > self._limit:
                sentences[rank] = _silence(rank, news, now - at)
        return sentences

    def _store_hangs(self, seconds: float) -> str:
        """Return a sentence on the ranks' store, which rank 0 holds where no launcher does."""
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        told = f"where the ranks meet, at {place}, nothing has answered for {seconds:.0f} s"
        if known := self._heard.get(0):
            told += f"; {_silence(0, known[0], time.monotonic() - known[1])}"
        return told

    def _end(self, verdict: str, blamed: tuple[int, ...]) -> NoReturn:
        """Say who is to blame, let the leader have its last word, and end this process."""
        LEAVING.set()
        faulthandler.cancel_dump_traceback_later()
        rank = self._ranks.rank
        first = min({rank, *self._heard} - set(blamed), default=rank)
        if rank == first or rank in blamed or self._ranks.local == 0:
            _write(
                f"wds-train: {verdict}. All ranks end; the same command goes on from the newest "
                "checkpoint. If a step may take so long here, give more --hang-minutes (now "
                f"{self._limit / 60:g})"
            )
        if rank in blamed:
            _write(
                f"rank {rank}, the main thread:\n{''.join(traceback.format_stack(_main_frame()))}"
            )
        if self._ranks.leads:
            _bounded(LAST_SECONDS, self._last_word)
            self._own = replace(self._own, verdict=verdict, blamed=blamed)
            if self._ranks.size > 1:
                time.sleep(
                    3 * self._every
                )  # for the others to hear of it: the end of a connection is an error to them
        leave(self._stop.code)


@contextlib.contextmanager
def watching(
    ranks: Ranks, stop: StopRequest, minutes: float | None, last_word: Callable[[], None]
) -> Iterator[Watch]:
    """Give a `Watch` that may be started within, and watches no more afterwards."""
    watch = Watch(ranks, stop, minutes, last_word)
    try:
        yield watch
    finally:
        watch.close()


def place_of_main_thread() -> Place:
    """Return where the main thread is: where it waits for a batch, where that is made."""
    frame = _main_frame()
    if frame.f_code.co_filename.endswith(DATA) or _called_from(frame, DATA):
        readers = [thread for thread in threading.enumerate() if thread.name.startswith("batches")]
        frames = [sys._current_frames().get(reader.ident or 0) for reader in readers]
        at = ", ".join(_line(each) for each in frames if each is not None)
        return f"{_line(frame)}, which waits for data: {at or 'no thread reads'}{_workers()}", False
    waits = any(part in frame.f_code.co_filename for part in WAITS)
    return _line(frame), waits


def _main_frame() -> FrameType:
    ident = threading.main_thread().ident
    assert ident is not None
    return sys._current_frames()[ident]


def _called_from(frame: FrameType, file: str) -> bool:
    """Return True if the function of `frame` was called, in the end, by one in `file`."""
    back = frame.f_back
    while back is not None:
        if back.f_code.co_filename.endswith(file):
            return True
        back = back.f_back
    return False


def _line(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"


def _workers() -> str:
    """Return the processes that this one has forked, those that do not sleep first, and what each
    is at.
    """
    pids: set[int] = set()
    for task in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            pids.update(int(pid) for pid in task.read_text().split())
    states = sorted((_state(pid), pid) for pid in pids)
    awake = [each for each in states if not each[0].startswith("S")] + [
        each for each in states if each[0][:1] == "S"
    ]
    named = "; ".join(f"process {pid}: {state}" for state, pid in awake[:NAMED])
    return f"; of its loader workers, {named}" if named else ""


def _state(pid: int) -> str:
    """Return the kernel's account of a process of this machine.

    It has its state, and the function of the kernel that it waits in.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "gone"
    state = next(
        (
            line.partition(":")[2].strip()
            for line in status.splitlines()
            if line.startswith("State:")
        ),
        "?",
    )
    with contextlib.suppress(OSError):
        if (channel := Path(f"/proc/{pid}/wchan").read_text().strip()) not in ("", "0"):
            state += f", in {channel}"
    return state


def _silence(rank: int, news: News | None, seconds: float) -> str:
    """Return a sentence on a rank that gave no news for so long; `news` is the last of it."""
    if news is None:
        return (
            f"rank {rank} has not been heard of since the start, {seconds:.0f} s ago; was it "
            "started?"
        )
    said = (
        f"rank {rank} ({news.owner}) has told nothing for {seconds:.0f} s, last at {news.doing}; "
    )
    if news.owner.machine == "" or news.owner.machine != this_process().machine:
        return (
            f"{said}its process is stopped or gone, or its machine or the network is: look at "
            f"{news.owner.host}"
        )
    state = _state(news.owner.pid)
    if state.startswith("R"):
        return (
            f"{said}its process is in state {state}: in C code that lets no other thread of it run"
        )
    return (
        f"{said}its process is in state {state}"
        if state != "gone"
        else f"{said}its process is gone"
    )


def _place(rank: int, news: News) -> str:
    """Return a sentence on a rank that can say where it hangs."""
    return (
        f"rank {rank} ({news.owner}) has not got beyond {news.doing} for {news.seconds:.0f} s; it "
        f"is in {news.where}"
    )


def _write(text: str) -> None:
    """Write a line to stderr, which may be a pipe that nobody reads any more, or that is full."""

    def write() -> None:
        with contextlib.suppress(OSError):
            os.write(2, f"{text.rstrip()}\n".encode())

    _bounded(WORD_SECONDS, write)


def _bounded(seconds: float, work: Callable[[], None]) -> None:
    """Do it in a thread of its own, and wait for that so long at most."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)


def _put_off_watchdog(seconds: float) -> None:
    """Let Python's own watchdog show where the threads are, unless this is called again within `seconds`.

    It is for C code that keeps all Python threads from running, the watching one included. That may be so
    from the very first steps on.
    """
    faulthandler.dump_traceback_later(seconds, file=2)
