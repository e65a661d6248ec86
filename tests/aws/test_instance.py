"""The scripts of an instance, run for real in an empty folder.

Every end of a training has a test, and every assumption is broken once. AWS's command line,
systemd, the driver and the disks are stand-ins; the metadata service is a fake.
"""

import os
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_imds import FakeImds
from waiting import wait_until

INFRA = Path(__file__).parents[2] / "infra"
SETTINGS = "WDS_RUN=first\nWDS_RECIPE=quick\nWDS_BUCKET=s3://b/p\nAWS_REGION=us-east-1\nWDS_LOG=/wds-train/x\n"
ENDS = (
    "terminate-instance-in-auto-scaling-group --should-decrement-desired-capacity --instance-id i-1"
)


class Instance:
    """A machine.

    `stub` puts a command on its PATH. `calls` are the calls of the commands that are recorded.
    """

    def __init__(self, folder: Path, imds: FakeImds) -> None:
        self.folder, self.bin, self.code = folder, folder / "bin", folder / "opt/wds-train"
        self.imds = imds
        imds.more |= {"instance-id": "i-1", "tags/instance/aws:autoscaling:groupName": "the-group"}
        for path in (
            self.bin,
            folder / "etc/systemd/system",
            self.code / "wheels",
            self.code / ".venv/bin",
        ):
            path.mkdir(parents=True)
        shutil.copytree(INFRA, self.code / "infra")
        (folder / "etc/wds-train.env").write_text(SETTINGS)
        (folder / "etc/os-release").write_text(
            'PRETTY_NAME="Ubuntu 24.04.1 LTS"\nVERSION_ID="24.04"\n'
        )
        self.uv()
        self.stub("nvidia-smi", 'echo "GPU 0: NVIDIA A10G (UUID: x)"')
        self.stub("lsblk", 'echo "/dev/nvme1n1 Amazon EC2 NVMe Instance Storage"')
        self.stub("mountpoint", "exit 1")
        self.stub("blkid", "exit 2")
        for name in ("aws", "systemctl", "mount", "mkfs.ext4", "shutdown"):
            self.record(name)

    def stub(self, name: str, script: str) -> None:
        (self.bin / name).write_text(f"#!/bin/bash\n{script}\n")
        (self.bin / name).chmod(0o755)

    def uv(self, script: str = "") -> None:
        """Return the files of uv that the bundle has."""
        with zipfile.ZipFile(self.code / "wheels/uv-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr(
                "uv-1.data/scripts/uv",
                f'#!/bin/bash\necho "uv $*" >> {self.folder}/calls\n{script}',
            )

    def record(self, name: str, script: str = "") -> None:
        self.stub(name, f'echo "{name} $*" >> {self.folder}/calls\n{script}')

    @property
    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def environment(self, **more: str) -> dict[str, str]:
        path = f"{self.bin}:{os.environ['PATH']}"
        patient = {"WDS_METADATA_SECONDS": "60"}
        return {"PATH": path, "AWS_EC2_METADATA_SERVICE_ENDPOINT": self.imds.url, **patient, **more}

    def bootstrap(self, **more: str) -> tuple[int, str]:
        command = ["bash", str(self.code / "infra/bootstrap.sh"), str(self.folder)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=self.environment(**more)
        )
        return done.returncode, done.stdout + done.stderr

    def start(self, training: str, **more: str) -> "subprocess.Popen[str]":
        self.stub("training", f'echo "training $*" >> {self.folder}/calls\n{training}')
        environment = self.environment(
            WDS_TRAIN="training", WDS_RUN="first", WDS_RECIPE="quick", WDS_BUCKET="s3://b/p", **more
        )
        command = ["bash", str(self.code / "infra/run.sh")]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, training: str, **more: str) -> tuple[int, str]:
        with self.start(training, **more) as process:
            out, _ = process.communicate(timeout=120)
        return process.returncode, out


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[Instance]:
    with FakeImds() as imds:
        yield Instance(tmp_path, imds)


def test_a_stock_image_becomes_a_running_service(instance: Instance) -> None:
    code, out = instance.bootstrap()
    assert code == 0, out
    assert "the training is started; its log is CloudWatch's /wds-train/x and" in out
    assert [call for call in instance.calls if not call.startswith("uv")] == [
        "mkfs.ext4 -q /dev/nvme1n1",
        f"mount /dev/nvme1n1 {instance.folder}/mnt/nvme",
        "systemctl daemon-reload",
        "systemctl enable --now wds-train.service",
    ]
    assert [call.split()[1:3] for call in instance.calls if call.startswith("uv")] == [
        ["venv", "--quiet"],
        ["pip", "install"],
        ["pip", "install"],
    ]
    assert any("--require-hashes -r requirements.lock" in call for call in instance.calls)
    assert (
        f"WDS_CACHE={instance.folder}/mnt/nvme\n"
        in (instance.folder / "etc/wds-train.env").read_text()
    )
    assert {path.name for path in (instance.folder / "etc/systemd/system").iterdir()} == {
        "wds-train.service",
        "wds-train-give-up.service",
    }


def test_a_disk_that_holds_something_is_not_formatted(instance: Instance) -> None:
    instance.stub("blkid", "exit 0")
    assert instance.bootstrap()[0] == 0
    assert not [call for call in instance.calls if call.startswith("mkfs")]


def test_the_disk_that_the_image_has_mounted_is_used_as_it_is(instance: Instance) -> None:
    (instance.folder / "opt/dlami/nvme").mkdir(parents=True)
    instance.stub("mountpoint", '[[ "$*" == *opt/dlami/nvme ]]')
    assert instance.bootstrap()[0] == 0
    assert not [call for call in instance.calls if call.startswith(("mkfs", "mount"))]
    assert (
        f"WDS_CACHE={instance.folder}/opt/dlami/nvme\n"
        in (instance.folder / "etc/wds-train.env").read_text()
    )


def test_without_a_local_disk_s3_is_read_every_time(instance: Instance) -> None:
    instance.stub("lsblk", 'echo "/dev/nvme0n1 Amazon Elastic Block Store"')
    code, out = instance.bootstrap()
    assert code == 0
    assert "no local disk; every epoch will be read from S3" in out
    assert "WDS_CACHE=\n" in (instance.folder / "etc/wds-train.env").read_text()


@pytest.mark.parametrize("failures", [2, 99])
def test_packages_that_do_not_come_are_asked_for_again_for_a_while(
    instance: Instance, failures: int
) -> None:
    asked = f"grep -c 'pip install.*requirements.lock' {instance.folder}/calls"
    instance.uv(f'[[ "$*" != *requirements.lock ]] || [ "$({asked})" -gt {failures} ] || exit 1\n')
    code, out = instance.bootstrap(WDS_TRY_SECONDS="0")
    if failures == 2:
        assert code == 0, out
    else:
        assert "the packages cannot be installed, for the reason above; five tries were made" in out
        assert instance.calls[-1].startswith(
            "aws autoscaling terminate-instance-in-auto-scaling-group"
        )
    assert sum("requirements.lock" in call for call in instance.calls) == min(failures + 1, 5)


BROKEN = {
    "wds-train.env is missing": lambda machine: (machine.folder / "etc/wds-train.env").unlink(),
    "does not set WDS_RUN": lambda machine: (machine.folder / "etc/wds-train.env").write_text(
        "WDS_RECIPE=x\n"
    ),
    "does not set AWS_REGION": lambda machine: (machine.folder / "etc/wds-train.env").write_text(
        SETTINGS.replace("AWS_REGION=us-east-1\n", "")
    ),
    'no Ubuntu 24.04 ("Debian")': lambda machine: (machine.folder / "etc/os-release").write_text(
        'PRETTY_NAME="Debian"\nVERSION_ID="12"\n'
    ),
    "no x86_64 but aarch64": lambda machine: machine.stub("uname", "echo aarch64"),
    "python3 is older than 3.11": lambda machine: machine.stub("python3", "exit 1"),
    "nvidia-smi finds no GPU": lambda machine: machine.stub("nvidia-smi", "echo failed; exit 9"),
    "the metadata service tells no instance id": lambda machine: machine.imds.more.pop(
        "instance-id"
    ),
    "less than 1000000 GB are free": lambda machine: None,
    "holds no wheel of uv": lambda machine: shutil.rmtree(machine.code / "wheels"),
    "the bootstrap failed at line": lambda machine: machine.stub("mkfs.ext4", "exit 1"),
}


@pytest.mark.parametrize("sentence", BROKEN)
def test_an_assumption_that_does_not_hold_is_a_sentence_and_the_end(
    instance: Instance, sentence: str
) -> None:
    BROKEN[sentence](instance)
    code, out = instance.bootstrap(**({"WDS_ROOM_GB": "1000000"} if "1000000" in sentence else {}))
    assert code != 0
    assert sentence in out
    assert "and no other follows" in out
    assert not [call for call in instance.calls if "systemctl" in call]
    assert instance.calls[-1].startswith(
        "aws autoscaling terminate-instance-in-auto-scaling-group --should-decrement"
    )


@pytest.mark.parametrize("name", ["WDS_ROOM_GB", "WDS_TRY_SECONDS"])
@pytest.mark.parametrize("text", ["abc", "-1", "1.5", "010", " "])
def test_a_number_that_is_none_is_named(instance: Instance, name: str, text: str) -> None:
    code, out = instance.bootstrap(**{name: text})
    assert code != 0
    assert (
        f"{name} = '{text}' in the environment is not a whole number of at least 0; unset it" in out
    )
    assert not [call for call in instance.calls if "pip install" in call]


def test_a_group_that_cannot_be_told_leaves_the_shutdown(instance: Instance) -> None:
    instance.record("aws", "exit 255")
    instance.stub("nvidia-smi", "exit 9")
    code, out = instance.bootstrap()
    assert code != 0
    assert "the group could not be told" in out
    assert instance.calls[-1] == "shutdown -h now"


@pytest.mark.parametrize(
    ("training", "code", "ends"),
    [
        ("exit 0", 0, True),
        ("exit 1", 0, True),
        ("exit 2", 0, True),
        ("exit 75", 75, False),
        ("kill -9 $$", 75, False),
    ],
)
def test_what_the_end_of_a_training_means(
    instance: Instance, training: str, code: int, ends: bool
) -> None:
    assert instance.run(training)[0] == code
    assert [call for call in instance.calls if call.startswith("aws")] == [
        f"aws autoscaling {ENDS}"
    ] * ends


@pytest.mark.parametrize("code", [75, 0, 1])
def test_after_a_notice_the_instance_stays_down_and_a_successor_is_wished_for(
    instance: Instance, code: int
) -> None:
    instance.imds.give_notice()
    assert instance.run(f"exit {code}")[0] == 0
    assert not [call for call in instance.calls if "terminate" in call]


def test_a_group_that_ends_the_instance_is_told_when_it_may(instance: Instance) -> None:
    instance.imds.more["autoscaling/target-lifecycle-state"] = "Terminated"
    assert instance.run("exit 75")[0] == 0
    (call,) = [call for call in instance.calls if call.startswith("aws")]
    assert (
        "complete-lifecycle-action --lifecycle-hook-name commit --lifecycle-action-result CONTINUE"
        in call
    )
    assert call.endswith("--auto-scaling-group-name the-group --instance-id i-1")


def test_the_training_is_asked_as_the_settings_say(instance: Instance) -> None:
    instance.run("exit 0", WDS_CACHE="/mnt/nvme", WDS_ARGUMENTS="--set batch=512 --price 0.4")
    assert instance.calls[0] == (
        "training train --run first --recipe quick --bucket s3://b/p --cache-dir /mnt/nvme --set batch=512 --price 0.4"
    )


def test_the_last_lines_are_shipped_before_systemd_kills_what_is_left(instance: Instance) -> None:
    shipper = instance.code / ".venv/bin/python"
    shipper.write_text(
        f'#!/bin/bash\necho "$*" > {instance.folder}/shipped\nsleep 0.3\ncat >> {instance.folder}/shipped\n'
    )
    shipper.chmod(0o755)
    assert instance.run("echo last words; exit 75", WDS_LOG="/wds-train/x") == (75, "")
    first, *rest = (instance.folder / "shipped").read_text().splitlines()
    assert first.startswith("-m wds_train.aws.log_shipper /wds-train/x i-1-")
    assert rest == ["last words", "wds-train: exit code 75; starting again"]


def test_sigterm_reaches_the_training_and_its_exit_code_counts(instance: Instance) -> None:
    with instance.start(
        f"trap 'echo asked >> {instance.folder}/calls; exit 75' TERM\n"
        f"echo trapped >> {instance.folder}/calls; while :; do sleep 0.05; done"
    ) as it:
        wait_until(lambda: "trapped" in instance.calls, "the stand-in")
        it.terminate()
        assert it.wait(120) == 75
    assert "asked" in instance.calls


def test_the_wandb_key_goes_into_the_environment_alone(instance: Instance) -> None:
    instance.record("aws", '[ "$1" != secretsmanager ] || echo the-key')
    code, out = instance.run(
        '[ "$WANDB_API_KEY" = the-key ] || exit 75', WDS_WANDB_SECRET="arn:aws:x"
    )
    assert (code, "the-key" in out) == (0, False)
    instance.record("aws", "exit 1")
    code, out = instance.run('[ -z "${WANDB_API_KEY:-}" ] && exit 75', WDS_WANDB_SECRET="arn:aws:x")
    assert code == 75
    assert "training without a login" in out
