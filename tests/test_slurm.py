"""Several tasks of Slurm are the ranks of one training, or are refused with what to type.

One task is an ordinary run.
"""

import os
from pathlib import Path

import pytest
from trainers import SETTINGS, Job, Training, all_ended

from wds_train.checkpoint.lease import read_run
from wds_train.cli import main
from wds_train.environment import PLACE, SLURM
from wds_train.errors import UsageError
from wds_train.loader.arguments import place
from wds_train.loader.workers import default_workers
from wds_train.slurm import LAUNCHED, OTHERS, PORTS, first_host, take_place
from wds_train.storage.open import open_store

PLACES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
ONE_NODE = {"SLURM_NNODES": "1"}


@pytest.fixture
def job(aws_env: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without Slurm's variables, and without what `take_place` leaves in it."""
    for name in {*os.environ, *PLACES}:
        if name.startswith("SLURM_") or name in {*PLACES, *PLACE, *OTHERS}:
            aws_env.setenv(name, "")  # to be taken away at the end, whoever sets it
            aws_env.delenv(name)
    return aws_env


def given(job: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        job.setenv(name, value)


def taken() -> dict[str, str]:
    return {name: os.environ[name] for name in PLACES if name in os.environ}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (SRUN | ONE_NODE, ("3", "4", "1", "127.0.0.1")),
        (SRUN | {"SLURM_STEP_NUM_NODES": "1", "SLURM_NNODES": "2"}, ("3", "4", "1", "127.0.0.1")),
        (SRUN | {"SLURM_JOB_NODELIST": "localhost,other[2-9]"}, ("3", "4", "1", "localhost")),
        (SRUN | {"SLURM_NODELIST": "localhost"}, ("3", "4", "1", "localhost")),
        (SRUN | {"SLURM_LAUNCH_NODE_IPADDR": "127.0.0.9"}, ("3", "4", "1", "127.0.0.9")),
        (
            SRUN
            | {"SLURM_JOB_NODELIST": "no-such.invalid", "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.9"},
            ("3", "4", "1", "127.0.0.9"),
        ),
        (SRUN | ONE_NODE | {"MASTER_ADDR": "10.1.2.3"}, ("3", "4", "1", "10.1.2.3")),
        (
            SRUN | ONE_NODE | {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "7"},
            ("7", "8", "1", "127.0.0.1"),
        ),
        (SRUN | ONE_NODE | {"SLURM_GPUS_PER_TASK": "1"}, ("3", "4", "0", "127.0.0.1")),
        (SRUN | ONE_NODE | {"SLURM_GPUS_PER_TASK": "a100:1"}, ("3", "4", "0", "127.0.0.1")),
        (SRUN | ONE_NODE | {"SLURM_GPUS_PER_TASK": "2"}, ("3", "4", "1", "127.0.0.1")),
    ],
)
def test_tasks_of_srun_are_ranks(
    job: pytest.MonkeyPatch, variables: dict[str, str], expected: tuple[str, str, str, str]
) -> None:
    given(job, **variables)
    assert take_place() == ""  # rank 0 says it
    found = taken()
    assert int(found.pop("MASTER_PORT")) in PORTS
    assert tuple(found.values()) == expected


def test_rank_0_says_so_and_all_meet_at_one_port(job: pytest.MonkeyPatch) -> None:
    ports = set()
    for rank in ("3", "1", "0"):
        for name in PLACES:
            job.delenv(name, raising=False)
        given(job, **SRUN | ONE_NODE | {"SLURM_PROCID": rank})
        said = take_place()
        ports.add(os.environ["MASTER_PORT"])
    (port,) = ports
    assert (
        said
        == f"slurm    4 tasks of job 7 are the ranks of this training; they meet at 127.0.0.1:{port}"
    )
    job.delenv("WORLD_SIZE")
    job.delenv("RANK")
    job.delenv("MASTER_PORT")
    given(job, SLURM_STEP_ID="1")
    take_place()
    assert os.environ["MASTER_PORT"] != port  # another step of the same job


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_JOB_ID": "7"},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        SRUN | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        {
            "SLURM_NTASKS": "4",
            "SLURM_STEP_NUM_TASKS": "1",
            "SLURM_STEP_ID": "4294967290",
        },  # the shell of salloc
        SRUN | {"WORLD_SIZE": "1"},
        SRUN | {"RANK": "0", "WORLD_SIZE": "2"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
    ],
)
def test_one_task_and_what_torchrun_started_stay_as_they_are(
    job: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    given(job, **variables)
    before = dict(os.environ)
    assert take_place() == ""
    assert dict(os.environ) == before


BATCH = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NNODES": "1",
}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            BATCH,
            "SLURM_NTASKS = 4, but srun has not started this process; write `srun wds-train train",
        ),
        (BATCH | {"SLURM_STEP_ID": "4294967291"}, "srun has not started this process"),
        ({"SLURM_NTASKS": "2"}, "or give --processes N for N ranks on this node"),
        (
            SRUN | ONE_NODE | {"SLURM_PROCID": "4"},
            "SLURM_PROCID = 4 cannot work with SLURM_NTASKS = 4",
        ),
        (
            SRUN,
            "SLURM_JOB_NODELIST = None nor SLURM_LAUNCH_NODE_IPADDR says where task 0 can be reached; set MASTER_ADDR",
        ),
        (
            SRUN | {"SLURM_JOB_NODELIST": "no-such.invalid"},
            "SLURM_JOB_NODELIST = 'no-such.invalid' nor",
        ),
        (
            SRUN | {"SLURM_NTASKS": "x"},
            "SLURM_NTASKS = 'x' in the environment is not a whole number of at least 1",
        ),
        (
            SRUN | ONE_NODE | {"SLURM_LOCALID": ""},
            "SLURM_LOCALID = '' in the environment is not a whole number",
        ),
        *(({name: "2"}, f"{name} = 2, but WORLD_SIZE is not set") for name in OTHERS),
    ],
)
def test_what_cannot_be_told_is_refused_before_any_work(
    job: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    variables: dict[str, str],
    message: str,
) -> None:
    given(job, **variables)
    job.chdir(tmp_path)
    assert main(["train", "--dataset", "./photos", "--run", "./run"]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert message in err
    assert not [*tmp_path.iterdir()]
    assert taken() == {name: variables[name] for name in PLACES if name in variables}


@pytest.mark.parametrize("missing", ["SLURM_PROCID", "SLURM_LOCALID"])
def test_a_task_that_is_not_told_its_place_is_refused(
    job: pytest.MonkeyPatch, missing: str
) -> None:
    given(job, **{name: value for name, value in (SRUN | ONE_NODE).items() if name != missing})
    with pytest.raises(
        UsageError, match=f"SLURM_NTASKS = 4, but the environment lacks {missing}; start with srun"
    ):
        take_place()


@pytest.mark.parametrize("evidence", LAUNCHED)
def test_each_variable_of_srun_alone_tells_it(job: pytest.MonkeyPatch, evidence: str) -> None:
    known = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1"}
    given(job, **BATCH | {evidence: known.get(evidence, "0")})
    assert take_place().startswith("slurm    4 tasks of job 7 are the ranks")


def test_processes_settle_what_a_batch_script_means(job: pytest.MonkeyPatch) -> None:
    given(job, **BATCH)
    assert take_place(2) == ""
    assert taken() == {}
    given(job, **SRUN)
    with pytest.raises(
        UsageError,
        match="--processes 2 starts processes, but srun has started 4 already; leave it out",
    ):
        take_place(2)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[001-003,007],gpu5", "node001"),
        ("node[5,7]", "node5"),
        ("a[1-2]b[07-08],c", "a1b07"),
        ("rack[3]-n[1-2].local", "rack3-n1.local"),
        ("10.0.0.1,10.0.0.2", "10.0.0.1"),
        ("", ""),
    ],
)
def test_the_first_of_a_list_of_nodes(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("variables", "workers"),
    [
        ({}, 15),
        (SRUN | {"SLURM_TASKS_PER_NODE": "4"}, 3),
        (SRUN | {"SLURM_TASKS_PER_NODE": "2(x2),4", "SLURM_NODEID": "2"}, 3),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_TASKS_PER_NODE": "16"}, 7),
        (SRUN | {"SLURM_TASKS_PER_NODE": "4", "SLURM_CPUS_PER_TASK": "8"}, 7),
        (
            SRUN
            | {"SLURM_TASKS_PER_NODE": "4", "SLURM_CPUS_PER_TASK": "8", "LOCAL_WORLD_SIZE": "8"},
            1,
        ),
        (SRUN | {"SLURM_TASKS_PER_NODE": "four"}, 15),
        (BATCH | {"SLURM_TASKS_PER_NODE": "4"}, 15),
    ],
)
def test_workers_share_the_cores_of_a_node(
    job: pytest.MonkeyPatch, tmp_path: Path, variables: dict[str, str], workers: int
) -> None:
    job.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    job.setattr("wds_train.machine.ROOT", tmp_path)  # no quota of a container
    given(job, **variables)
    assert default_workers() == workers


@pytest.mark.parametrize(
    ("variables", "seen"),
    [
        (
            SRUN,
            "SLURM_NTASKS = 4, but torch.distributed is not initialised; make the loader after init_process_group",
        ),
        (SRUN | {"WORLD_SIZE": "2"}, "WORLD_SIZE = 2, but torch.distributed is not initialised"),
        (SRUN | {"WORLD_SIZE": "1"}, ""),
        (BATCH, ""),
    ],
)
def test_a_loader_of_ones_own_does_not_read_what_other_tasks_do(
    job: pytest.MonkeyPatch, variables: dict[str, str], seen: str
) -> None:
    given(job, **variables)
    if not seen:
        assert place(None, None) == (0, 1)
        return
    with pytest.raises(UsageError, match=seen):
        place(None, None)
    assert place(2, 4) == (2, 4)


def test_every_variable_has_a_range() -> None:
    assert {"SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"} <= SLURM.keys()


def test_two_tasks_train_one_run(job: pytest.MonkeyPatch, small: str, tmp_path: Path) -> None:
    """The processes are as srun would start them."""
    run = str(tmp_path / "run")
    slurm = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_NNODES": "1",
    }
    trainings = []
    with all_ended(trainings):
        for rank in ("0", "1"):
            task = slurm | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}
            settings = (*SETTINGS, "schedule.epochs=2")
            trainings.append(
                Training(Job(small, run, str(tmp_path), settings=settings, environment=task))
            )
        for training in trainings:
            assert training.end() == 0, training.output
    assert "2 tasks of job" in trainings[0].output and "slurm" not in trainings[1].output
    steps = [training.steps() for training in trainings]
    assert steps[0].keys() == steps[1].keys() and len(steps[0]) == 22
    assert not {*steps[0][0]} & {*steps[1][0]}  # each has its own samples
    assert read_run(open_store(run))[0].status == "done"
