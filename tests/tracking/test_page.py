"""A run's page in Weights & Biases: where it is, and what becomes of the run when W&B refuses it."""

import contextlib
import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_wandb import FakeWandb, offline_records
from trainers import Job, Training, all_ended
from waiting import wait_until

from wds_train.checkpoint.lease import read_run
from wds_train.checkpoint.run_manifest import Page, RunManifest
from wds_train.cli import main
from wds_train.errors import StoreError
from wds_train.storage.open import open_store
from wds_train.tracking import wandb_page as pages
from wds_train.tracking.wandb_page import RunPage

LONG = ("schedule.epochs=400",)
PATIENT: dict[str, Any] = {
    "training.run_training.REPORT_SECONDS": 0.0,
    "tracking.wandb_board.INIT_SECONDS": 60.0,
    "tracking.tracker.BACKLOG": 10_000,
    "tracking.tracker.FINISH_SECONDS": 100.0,
    "tracking.tracker.HASTY_SECONDS": 100.0,
}
# W&B's client asks again and again whether a deleted page is still deleted, until it gives up.
GIVES_UP = {"tracking.wandb_board.INIT_SECONDS": 8.0}


@pytest.fixture
def wandb() -> Iterator[FakeWandb]:
    with FakeWandb() as server:
        yield server


@pytest.fixture(scope="module")
def trained(small: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is done, and that W&B has never heard of."""
    folder = tmp_path_factory.mktemp("trained")
    code, output = end(
        Job(small, str(folder / "run"), str(folder), settings=("schedule.epochs=2",))
    )
    assert code == 0, output
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def end(job: Job) -> tuple[int, str]:
    training = Training(job)
    with all_ended([training]):
        return training.end(), training.output


def manifest_of(url: Path | str) -> RunManifest:
    return read_run(open_store(str(url)))[0]


def sync(
    run: Path, environment: dict[str, str], *arguments: str, **constants: Any
) -> tuple[int, str]:
    """`wds-train wandb RUN`."""
    command = ("wandb", str(run), *arguments)
    return end(
        Job(
            "",
            str(run),
            str(run.parent),
            command=command,
            environment=environment,
            constants=constants,
        )
    )


def printed(*command: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert main([*command]) == 0
    return output.getvalue()


def steps_of(run: Path | str) -> list[int]:
    """The steps that the run has rows of."""
    store, manifest = open_store(str(run)), manifest_of(run)
    lines = b"".join(store.read(segment.object.key) for segment in manifest.metrics).splitlines()
    return sorted({json.loads(line)["step"] for line in lines})


def killed_once_it_has_a_page(job: Job) -> None:
    training = Training(job)
    with all_ended([training]):
        training.until("epoch +1/400", 120)
        wait_until(lambda: manifest_of(job.run).page.url, "the page")


@pytest.mark.parametrize(
    "other", [{}, {"WANDB_PROJECT": "b", "WANDB_ENTITY": "others"}], ids=["none", "others"]
)
def test_a_replacement_goes_on_with_the_same_page(
    small: str, tmp_path: Path, wandb: FakeWandb, other: dict[str, str]
) -> None:
    first = wandb.environment | {"WANDB_PROJECT": "a", "WANDB_ENTITY": "team"}
    job = Job(
        small,
        str(tmp_path / "run"),
        str(tmp_path),
        settings=LONG,
        environment=first,
        constants=PATIENT,
    )
    killed_once_it_has_a_page(job)
    training = Training(replace(job, environment=wandb.environment | other))
    with all_ended([training]):
        wait_until(lambda: "resumed" in wandb.alerts(), "the page")
        output = training.output
    manifest = manifest_of(job.run)
    assert wandb.places == {manifest.wandb_id: {("team", "a")}}
    assert manifest.page == Page("a", "team", f"{wandb.url}/team/a/runs/{manifest.wandb_id}")
    assert ("this run's project is a, so WANDB_PROJECT=b is not used" in output) is bool(other)
    assert ("this run's entity is team, so WANDB_ENTITY=others is not used" in output) is bool(
        other
    )


# What a start has in its environment, and where the page is.
STARTS = [
    ([{"WANDB_PROJECT": "a"}, {}], ("me", "a")),
    ([{"WANDB_PROJECT": "a"}, {"WANDB_PROJECT": "b"}], ("me", "a")),
    ([{"WANDB_PROJECT": "a"}, {"WANDB_PROJECT": ""}], ("me", "a")),
    ([{}, {"WANDB_PROJECT": "b"}], ("me", "wds-train")),
    ([{"WANDB_PROJECT": ""}, {}], ("me", "wds-train")),
    ([{"WANDB_PROJECT": "größer als"}, {}], ("me", "größer als")),
    ([{"WANDB_ENTITY": "team"}, {}], ("team", "wds-train")),
    (
        [{"WANDB_ENTITY": "team"}, {"WANDB_ENTITY": "others", "WANDB_PROJECT": "b"}],
        ("team", "wds-train"),
    ),
    ([{}, {"WANDB_ENTITY": "team"}], ("me", "wds-train")),  # the login's own, as W&B told
]


@pytest.mark.parametrize(("starts", "place"), STARTS)
def test_the_place_of_the_first_start_is_the_runs(
    run: Path, wandb: FakeWandb, starts: list[dict[str, str]], place: tuple[str, str]
) -> None:
    for start in starts:
        code, output = sync(run, wandb.environment | start)
        assert code == 0, output
        kept = dict(zip(("WANDB_ENTITY", "WANDB_PROJECT"), place, strict=True))
        for variable, value in start.items():
            unused = bool(value) and value != kept[variable]
            assert (f"{variable}={value} is not used" in output) is unused, output
    manifest = manifest_of(run)
    assert wandb.places == {manifest.wandb_id: {place}}
    assert [row["_step"] for row in wandb.history[manifest.wandb_id]] == steps_of(run)


def test_an_offline_run_keeps_its_project_too(run: Path, wandb: FakeWandb) -> None:
    for project in ("a", "b"):
        code, output = sync(run, {"WANDB_MODE": "offline", "WANDB_PROJECT": project})
        assert code == 0, output
    assert "WANDB_PROJECT=b is not used" in output
    folders = (run.parent / "wandb").glob("offline-run-*")
    records = [
        record for folder in folders for record in offline_records(folder) if record.HasField("run")
    ]
    assert {record.run.project for record in records} == {"a"}
    assert sync(run, wandb.environment)[0] == 0
    assert wandb.places == {manifest_of(run).wandb_id: {("me", "a")}}


def test_a_run_of_an_older_version_takes_its_page_from_the_next_start(
    run: Path, wandb: FakeWandb
) -> None:
    path = run / "manifest.json"
    content = json.loads(path.read_text())
    del content["page"]
    path.write_text(json.dumps(content))
    for environment in ({"WANDB_PROJECT": "a"}, {}):
        code, output = sync(run, wandb.environment | environment)
        assert code == 0, output
    assert wandb.places == {manifest_of(run).wandb_id: {("me", "a")}}


def test_status_and_report_lead_to_the_page(run: Path, wandb: FakeWandb, tmp_path: Path) -> None:
    assert "W&B" not in printed("status", str(run))
    assert sync(run, wandb.environment | {"WANDB_PROJECT": "a"})[0] == 0
    page = f"{wandb.url}/me/a/runs/{manifest_of(run).wandb_id}"
    assert f"W&B          {page}" in printed("status", str(run))
    assert json.loads(printed("status", str(run), "--json"))["wandb"] == page
    printed("report", str(run), "--out", str(tmp_path / "report"), "--no-images")
    assert f'<a href="{page}">' in (tmp_path / "report" / "report.html").read_text()
    assert f"](<{page}>)" in (tmp_path / "report" / "report.md").read_text()


def test_a_deleted_page_gets_a_successor_with_the_whole_history(
    run: Path, wandb: FakeWandb
) -> None:
    assert sync(run, wandb.environment | {"WANDB_PROJECT": "a"})[0] == 0
    ids = [manifest_of(run).wandb_id]
    for _ in range(2):  # and that one again
        wandb.delete(ids[-1])
        code, output = sync(run, wandb.environment, **GIVES_UP)
        assert code == 0, output
        ids.append(manifest_of(run).wandb_id)
        assert (
            f"the run's page {ids[-2]} was deleted there; its history goes to a new page, {ids[-1]}"
            in output
        )
        assert f"sent {len(steps_of(run))} of the {len(steps_of(run))} steps" in output
        assert [row["_step"] for row in wandb.history[ids[-1]]] == steps_of(run)
        assert manifest_of(run).page.url.endswith(f"/me/a/runs/{ids[-1]}")
    assert len({*ids}) == 3
    code, output = sync(run, wandb.environment)
    assert (code, "sent 0 of the" in output) == (0, True), output


@pytest.mark.timeout(400)
def test_a_training_whose_page_was_deleted_goes_on_with_a_new_one(
    small: str, tmp_path: Path, wandb: FakeWandb
) -> None:
    job = Job(
        small,
        str(tmp_path / "run"),
        str(tmp_path),
        settings=LONG,
        environment=wandb.environment,
        constants=PATIENT,
    )
    killed_once_it_has_a_page(job)
    old = manifest_of(job.run).wandb_id
    wandb.delete(old)
    training = Training(replace(job, constants=PATIENT | GIVES_UP))
    with all_ended([training]):
        training.until(f"the run's page {old} was deleted there", 120)
        wait_until(lambda: "resumed" in wandb.alerts(), "the new page")
        new = manifest_of(job.run).wandb_id
        wait_until(lambda: len(wandb.history.get(new, [])) > 20, "the rows")
    rows = [row["_step"] for row in wandb.history[new]]
    assert new != old and rows == sorted({*rows})
    assert rows[: len(steps_of(job.run))] == steps_of(job.run)[: len(rows)]


# What W&B answers, and of what the sentence speaks.
REFUSALS = [
    (401, "user is not logged in", "W&B refuses the API key"),
    (401, "", "W&B refuses the API key"),
    (403, "permission denied", "W&B refuses project a of team"),
    (404, "project not found", "W&B refuses project a of team"),
    (404, "entity team not found during upsertBucket", "W&B refuses project a of team"),
    (400, "project is archived", "W&B refuses project a of team"),
]
SETTINGS = {"WANDB_PROJECT": "a", "WANDB_ENTITY": "team"}


@pytest.mark.parametrize(("status", "message", "sentence"), REFUSALS)
def test_what_wandb_refuses_is_a_sentence_and_can_be_sent_later(
    run: Path, wandb: FakeWandb, status: int, message: str, sentence: str
) -> None:
    wandb.refusal = status, message
    code, output = sync(run, wandb.environment | SETTINGS)
    assert (code, sentence in output, "Traceback" in output) == (1, True, False), output
    assert "does not answer" not in output and message in output
    wandb.refusal = None
    code, output = sync(run, wandb.environment | SETTINGS)
    assert code == 0, output
    assert wandb.places == {manifest_of(run).wandb_id: {("team", "a")}}
    wandb.refusal = status, message  # of a page that is there
    code, output = sync(run, wandb.environment)
    assert (code, sentence in output) == (1, True), output
    assert (manifest_of(run).page.project, manifest_of(run).page.entity) == ("a", "team")


# Settings that W&B's client refuses, and of what the sentence speaks.
MISTAKES = [
    ({"WANDB_API_KEY": "abc"}, "W&B refuses the API key"),
    ({"WANDB_PROJECT": "a/b"}, "W&B refuses project a/b"),
    ({"WANDB_PROJECT": "x" * 200}, "W&B refuses project xxx"),
    ({"WANDB_PROJECT": "a\tb"}, r"WANDB_PROJECT is 'a\tb', which cannot be a name in W&B"),
]


@pytest.mark.parametrize(("mistake", "sentence"), MISTAKES)
def test_a_mistake_in_the_settings_is_not_kept(
    run: Path, wandb: FakeWandb, mistake: dict[str, str], sentence: str
) -> None:
    code, output = sync(run, wandb.environment | mistake)
    assert (code, sentence in output, "Traceback" in output) == (1, True, False), output
    code, output = sync(run, wandb.environment | {"WANDB_PROJECT": "right"})
    assert code == 0, output
    assert wandb.places == {manifest_of(run).wandb_id: {("me", "right")}}


@pytest.mark.parametrize("refusal", [(401, "user is not logged in"), (403, "permission denied")])
def test_a_training_that_wandb_refuses_is_done_without_it(
    small: str, tmp_path: Path, wandb: FakeWandb, refusal: tuple[int, str]
) -> None:
    wandb.refusal = refusal
    url, few = str(tmp_path / "run"), ("schedule.epochs=2",)
    job = Job(
        small, url, str(tmp_path), settings=few, environment=wandb.environment, constants=PATIENT
    )
    code, output = end(job)
    assert code == 0 and manifest_of(url).status == "done", output
    assert f"({refusal[1]}" in output or refusal[1] in output, output
    assert "; going on offline; the metrics are with the run, and `wds-train wandb" in output
    wandb.refusal = None
    assert sync(tmp_path / "run", wandb.environment)[0] == 0
    assert [row["_step"] for row in wandb.history[manifest_of(url).wandb_id]] == steps_of(url)


def test_a_page_is_moved_where_a_person_says(run: Path, wandb: FakeWandb) -> None:
    assert sync(run, wandb.environment | {"WANDB_PROJECT": "a"})[0] == 0
    wandb.refusal = 403, "permission denied"
    assert sync(run, wandb.environment, "--project", "typo")[0] == 1
    assert manifest_of(run).page.project == "a"
    wandb.refusal = None
    code, output = sync(run, wandb.environment, "--project", "b", "--entity", "team")
    assert code == 0 and "the run's page is now" in output, output
    page = manifest_of(run).page
    assert (page.project, page.entity) == ("b", "team")
    assert f"{wandb.url}/team/b/runs/" in page.url


class Refuses:
    """A manifest that cannot be written."""

    def __call__(self, _: object) -> RunManifest:
        raise StoreError("read-only")


def test_who_may_only_read_the_run_is_told_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setenv("WANDB_PROJECT", "a")
    page = RunPage(RunManifest("x", {}, {}, "id"), "s3://b/runs/x", Refuses(), said.append)
    page.settle()
    assert page.manifest.page.project == "a"
    assert len(said) == 1 and "read-only" in said[0]


def test_a_new_id_that_cannot_be_kept_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or every start would make another page."""
    opened: list[str] = []

    def deleted(manifest: RunManifest, *_: object, **__: object) -> None:
        opened.append(manifest.wandb_id)
        raise RuntimeError("run x was previously created and deleted; try a new run name")

    monkeypatch.setattr(pages.Board, "open", deleted)
    monkeypatch.setattr(pages.Board, "forget", lambda: None)
    page = RunPage(
        RunManifest("x", {}, {}, "id", page=Page("p")), "s3://b/runs/x", Refuses(), print
    )
    with pytest.raises(StoreError, match="read-only"):
        page.open("online", {})
    assert opened == ["id"]


@pytest.mark.parametrize(
    "url", ["javascript:alert(1)", "file:///etc/passwd", "http://x/\x1b[2J", "ftp://x"]
)
def test_a_page_that_is_none_of_the_web_is_no_page(run: Path, url: str) -> None:
    path = run / "manifest.json"
    path.write_text(path.read_text().replace('"url": ""', f'"url": {json.dumps(url)}'))
    assert main(["status", str(run)]) == 1
