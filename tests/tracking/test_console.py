"""Bars and lines: what they say, that they fit, and where they say nothing."""

import contextlib
import fcntl
import itertools
import os
import pty
import re
import struct
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import layouts
import pytest
from fault_proxy import FaultProxy

from wds_train import console
from wds_train.cli import COMMANDS, main
from wds_train.console import Bar, Meter, duration, fitting
from wds_train.conversion import pack
from wds_train.conversion.executors import make_counts
from wds_train.conversion.image_policy import ImagePolicy
from wds_train.conversion.pack import Counts, Packing, ShardTask
from wds_train.dataset.reader import Dataset
from wds_train.storage.open import open_store
from wds_train.tracking.progress import Pace, TrainingBar

END = b"all of it"


@contextlib.contextmanager
def terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch, pause: float = 0.0
) -> Iterator[Callable[[], str]]:
    """A pseudo-terminal for sys.stderr and sys.stdout; and what was written to it, to be asked for once."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    data = bytearray()

    def read() -> None:  # meanwhile: whoever writes into a full one waits
        while not data.endswith(END):
            data.extend(os.read(ours, 65536))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()

    def written() -> str:
        os.write(theirs, END)
        reader.join()
        return data.removesuffix(END).decode()

    with os.fdopen(theirs, "w") as file, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", file)
        patch.setattr(sys, "stdout", file)
        patch.setattr(console, "SCREEN_SECONDS", pause)
        yield written
    os.close(ours)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of the log for every look."""
    monkeypatch.setattr(console, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(console, "LOG_SECONDS", 0.0)


def drawn(text: str) -> list[str]:
    """The states of a bar, one after the other."""
    return [state for state in text.split("\r") if "%" in state]


def train(bar: TrainingBar) -> None:
    for step in (101, 102, 103):
        bar.step(step, 0.0, 0.0125, 2.345)
    bar.validating(2, 640, 5000)


@pytest.mark.parametrize(
    ("columns", "price", "fields"), [(40, 3.0, 1), (80, None, 6), (80, 3.0, 6), (200, 3.0, 8)]
)
def test_a_training_s_bar_fits_and_uses_its_terminal(
    columns: int, price: float | None, fields: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr("time.monotonic", itertools.count(100.0, 0.25).__next__)
    with (
        terminal(columns, monkeypatch) as written,
        TrainingBar(Pace([1.0] * 16, 50, 10.0), 100, 64, price) as bar,
    ):
        train(bar)
        text = written()
    states = drawn(text)
    assert len(states) == 5  # tqdm's own first, then ours
    assert {len(state.rstrip()) <= columns - 1 for state in states} == {True}
    assert "\x1b[" not in text
    assert "step 103/800" in states[3]
    assert "validating 640/5,000" in states[4] or columns == 40
    whole = r"(step 103/800|left|loss 2\.345|img/s|wait 0%|lr 0\.013|\$0\.\d\d)"
    assert re.search(rf" {whole}$", states[3].rstrip()), states[3]  # nothing is cut
    wanted = [
        "epoch 3/16",
        " left",
        "loss 2.345",
        " img/s",
        "wait 0%",
        "lr 0.013",
        "$0.00",
        " of $0.",
    ]
    assert sum(field in states[3] for field in wanted) == fields, states[3]
    if columns == 200:
        assert len(states[3].rstrip()) > 150  # the bar takes the rest


def test_as_a_log_a_training_writes_lines(hasty: None, capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingBar(Pace([1.0] * 16, 50, 10.0), 100, 64) as bar:
        train(bar)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "epoch 3/16, step 101/800, loss 2.345, lr 0.013"
    assert re.fullmatch(
        r"epoch 3/16, step 102/800, \d+ s left, loss 2.345, \d+ img/s, wait 0%, lr 0.013", lines[1]
    )
    assert re.fullmatch(r"epoch 2/16, validating 640/5,000, \d+ s left, lr 0.013", lines[3])


def test_a_log_s_first_line_comes_soon_and_the_others_seldom(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    said = []
    with Bar(100) as bar:
        for _ in range(100):
            now += 1.0
            if bar.due:
                said.append(now)
                bar.show(1, "a line")
    assert said == [100 + 5, 100 + 35, 100 + 65, 100 + 95]
    assert capsys.readouterr().err == "a line\n" * 4


def test_what_is_left_counts_growing_images_and_validations() -> None:
    """Steps of 2 s, of 8 s once the images have twice the side; validations of 30 s, commits included."""
    pace, now = Pace([0.25, 0.25, 1.0], 10, 4.0), 0.0
    seen: list[tuple[float, float | None]] = []
    for epoch, cost in enumerate(pace.costs):
        for step in range(epoch * 10 + 1, epoch * 10 + 11):
            now += 8 * cost
            pace.step(step, now, 0.4 * cost)
            seen.append((now, pace.left(step, epoch)))
        pace.validated(0.0, now)
        pace.validated(0.5, now + 13.5)
        now += 30.0
        pace.validated(1.0, now)
    assert seen[0][1] is None  # nothing is known after one step
    assert seen[9][1] == pytest.approx(
        now - seen[9][0] + 3 * (4.0 * 8 - 30)
    )  # no validation was seen yet
    assert all(left == pytest.approx(now - at) for at, left in seen[10:])
    assert pace.waits() == pytest.approx(0.05)


def test_what_was_long_ago_says_nothing_of_what_is_to_come() -> None:
    pace, now = Pace([1.0], 1000, 0.0), 0.0
    for step in range(1, 401):
        now += 1.0 if step < 200 else 2.0
        pace.step(step, now, 0.0)
    assert pace.rate() == 0.5
    assert pace.left(400, 1) == 1200.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4, "4 s"), (89, "89 s"), (600, "10 min"), (7200, "2.0 h"), (300_000, "3.5 days")],
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_what_has_no_room_is_left_out_from_the_end() -> None:
    assert fitting(["one", "two", "three", "4"], 9) == "one two"


def test_a_meter_counts_bytes_and_images_of_all_threads(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = sys.getswitchinterval()
    with Meter(80_000_000, 8000) as meter:
        sys.setswitchinterval(1e-6)  # or threads seldom meet
        threads = [
            threading.Thread(target=lambda: [meter.add(10_000, 1) for _ in range(2000)])
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(usual)
        monkeypatch.setattr("time.monotonic", lambda: 1e9)  # when a line is due
        meter.add()
    line = capsys.readouterr().err
    assert line.startswith("8,000/8,000 images, 80.0/80.0 MB, "), line


def test_what_a_meter_says_is_left_begins_with_the_work(
    hasty: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with Meter(10_000_000) as meter:
        for at in (60.0, 60.5, 61.0, 62.0):  # a minute to start
            now = at
            meter.add(2_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert [" left" in line for line in lines] == [False, False, True, True]
    assert lines[2:] == ["6.0/10.0 MB, 1 s left, 4.0 MB/s", "8.0/10.0 MB, 1 s left, 3.0 MB/s"]


@pytest.mark.parametrize("columns", [80, 200])
def test_a_conversion_s_bar_moves_within_a_shard(
    columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of processes, whose counts come together; what is drawn last is all of it."""
    source = layouts.image_folder(tmp_path / "folder", layouts.small_tree())
    with terminal(columns, monkeypatch, pause=0.02) as written:
        assert main(["shards", str(source), str(tmp_path / "out"), "--processes", "2"]) == 0
        states = drawn(written())
    samples = sum(
        split.samples for split in Dataset.open(str(tmp_path / "out")).manifest.splits.values()
    )
    assert f" {samples}/{samples} images " in states[-1]
    assert max(len(state.rstrip()) for state in states) < columns


def test_a_shard_is_counted_while_it_is_packed(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = layouts.image_folder(tmp_path / "folder", layouts.small_tree())
    monkeypatch.setattr(pack, "COUNT_SECONDS", -1.0)
    counts, told = make_counts(1), []

    class Told(Counts):
        def add(self, size: int, images: int) -> None:
            super().add(size, images)
            told.append(tuple(self.values))

    monkeypatch.setattr(pack, "process_counts", Told(counts.lock, counts.values))
    rows = rows_of(sorted(Path(source).rglob("*.*g")))
    for _ in Packing(
        ShardTask(open_store(str(tmp_path)), "", "train", 0, rows, ImagePolicy())
    ).pieces():
        pass
    sizes = rows["length"].to_pylist()
    assert [images for _, images in told[:-1]] == list(range(1, len(sizes) + 1))
    assert told[-1] == (sum(sizes), len(sizes))


def rows_of(files: list[Path]):  # type: ignore[no-untyped-def]
    import pyarrow as pa

    from wds_train.conversion.sources.source import ROWS

    entries = [
        {
            "key": path.stem,
            "label": 0,
            "path": str(path),
            "offset": 0,
            "length": path.stat().st_size,
        }
        for path in files
    ]
    return pa.Table.from_pylist(entries, ROWS)


def test_verify_and_index_show_their_bytes(
    hasty: None, small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = sum(split.bytes for split in Dataset.open(small).manifest.splits.values())
    whole = f"{size / 1e6:,.1f}/{size / 1e6:,.1f} MB, "
    assert main(["verify", small]) == 0
    assert whole in capsys.readouterr().err
    for tar in Path(small).glob("*/*.tar"):
        (tmp_path / "tars" / tar.parent.name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "tars" / tar.parent.name / tar.name).write_bytes(tar.read_bytes())
    assert main(["shards", "index", str(tmp_path / "tars")]) == 0
    assert whole in capsys.readouterr().err


def test_quiet_leaves_the_last_lines_and_verbose_tells_of_retries(
    hasty: None,
    s3_url: str,
    fault_proxy: FaultProxy,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = str(layouts.image_folder(tmp_path / "folder", layouts.small_tree()))
    assert main(["shards", source, f"{s3_url}/data", "--quiet"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert [line.split()[0] for line in said.out.splitlines()] == [f"{s3_url}/data:", "fingerprint"]
    assert main(["verify", f"{s3_url}/data", "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    for level, said_so in (([], False), (["--verbose"], True)):
        fault_proxy.fail("reset", method="GET", key="manifest.json", times=1)
        assert main(["verify", f"{s3_url}/data", *level]) == 0
        assert ("; asking again in " in capsys.readouterr().err) is said_so
    assert main(["verify", "/nowhere", "--quiet"]) == 1
    assert "there is no dataset" in capsys.readouterr().err


def test_quiet_and_verbose_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "x", "--quiet", "--verbose"]) == 2
    assert "not allowed with" in capsys.readouterr().err


def test_no_command_waits_for_pytorch_before_it_says_anything() -> None:
    """`bench` says so itself before it imports what its arguments need."""
    import subprocess

    names = [name for name in COMMANDS if name != "bench"]
    code = (
        "import contextlib, sys\nfrom wds_train.cli import main\n"
        f"for name in {names!r}:\n"
        "    with contextlib.suppress(SystemExit):\n        main([name, '--help'])\n"
        "    assert 'torch' not in sys.modules, name\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
