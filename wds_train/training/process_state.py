"""The state of a process, in words: its place in the code, and the kernel's account of it.

`training/watch.py` names a rank that hangs by it. Nothing here waits.
"""

import contextlib
import sys
import threading
import traceback
from pathlib import Path
from types import FrameType

# Files of the functions in which a rank may wait for the others within a step.
WAITS = ("/torch/distributed/", "/torch/nn/parallel/distributed.py", "/torch/autograd/graph.py")
# The file of the function in which the main thread waits for a batch, which other threads and
# processes make.
DATA = "/training/deadline.py"
# Loader workers that a message names: one that does not sleep is the one to look at.
NAMED = 4

# The place of the main thread, in words; True if a rank may wait for others there.
Place = tuple[str, bool]


def place_of_main_thread() -> Place:
    """Return the place of the main thread in the code.

    Where it waits for a batch, the threads and processes that make it are named, too.
    """
    frame = _main_frame()
    if not _is_within(frame, DATA):
        return _line(frame), _may_wait(frame)

    # The threads that read for it.
    places = []
    for thread in threading.enumerate():
        reading = sys._current_frames().get(thread.ident or 0)
        if thread.name.startswith("batches") and reading is not None:
            places.append(_line(reading))
    readers = ", ".join(places) or "no thread reads"
    return f"{_line(frame)}, which waits for data: {readers}{_describe_workers()}", False


def stack_of_main_thread() -> str:
    """Return the stack of the main thread, as a traceback has it."""
    return "".join(traceback.format_stack(_main_frame()))


def state_of_process(pid: int) -> str:
    """Return the kernel's account of a process of this machine.

    It has its state, and the function of the kernel that it waits in; "gone" where it has ended.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "gone"
    state = "?"
    for line in status.splitlines():
        if line.startswith("State:"):
            state = line.partition(":")[2].strip()
            break
    # Not every kernel gives it, nor to every user.
    with contextlib.suppress(OSError):
        channel = Path(f"/proc/{pid}/wchan").read_text().strip()
        if channel not in ("", "0"):
            state += f", in {channel}"
    return state


def _main_frame() -> FrameType:
    """Return the frame that the main thread executes."""
    ident = threading.main_thread().ident
    assert ident is not None
    return sys._current_frames()[ident]


def _is_within(frame: FrameType, file: str) -> bool:
    """Return True if the function of `frame`, or one that called it, is in `file`."""
    at: FrameType | None = frame
    while at is not None:
        if at.f_code.co_filename.endswith(file):
            return True
        at = at.f_back
    return False


def _may_wait(frame: FrameType) -> bool:
    """Return True if a rank may wait for the others in the function of `frame`."""
    return any(part in frame.f_code.co_filename for part in WAITS)


def _line(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"


def _describe_workers() -> str:
    """Return the processes that this one has forked and their states; "" without any.

    Those that do not sleep come first: a worker that has nothing to do sleeps.
    """
    awake = []
    asleep = []
    for pid in _children():
        state = state_of_process(pid)
        if state.startswith("S"):
            asleep.append((state, pid))
        else:
            awake.append((state, pid))
    named = []
    for state, pid in (sorted(awake) + sorted(asleep))[:NAMED]:
        named.append(f"process {pid}: {state}")
    if not named:
        return ""
    return f"; of its loader workers, {'; '.join(named)}"


def _children() -> set[int]:
    """Return the processes that any thread of this one has forked."""
    pids: set[int] = set()
    for task in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            pids.update(map(int, task.read_text().split()))
    return pids
