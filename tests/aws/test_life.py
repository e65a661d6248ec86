"""The whole life of a run on AWS, from the launch to a group without instances.

It has the group, its instances, their scripts and trainings. moto is AWS, SeaweedFS its S3, the
metadata service a fake. The test does what moto lacks: an instance runs the stack's script, its
`aws` reaches the group, systemd starts a service again, and the clock carries out the schedule.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_imds import FakeImds
from moto import mock_aws
from moto.ec2.responses import EC2Response
from outcomes import assert_same_end
from test_instance import INFRA, Instance
from test_stacks import IMAGE, SCORES, for_moto
from trainers import SETTINGS, Job, Training, all_ended

from wds_train.aws import preflight as looks
from wds_train.aws import stacks
from wds_train.aws.account import Aws
from wds_train.checkpoint.find import find_run
from wds_train.cli import main
from wds_train.errors import Interrupted, UsageError
from wds_train.storage.open import open_store

TRAIN = """
import sys
from wds_train.training.spot import SpotWatch
SpotWatch.__init__.__defaults__ = (None, 0.02)  # looks for the notice more often
from wds_train.cli import entry
sys.argv[1:] = ["train", *sys.argv[2:]]
entry()
"""
MORE = " ".join(["--device cpu --workers 0", *(f"--set {setting}" for setting in SETTINGS)])


class Cloud:
    """The account, the run's group in it, and the instances that the group has started."""

    def __init__(self, bucket: str, folder: Path, imds: FakeImds) -> None:
        self.aws, self.bucket, self.run = Aws("us-east-1"), bucket, f"{bucket}/runs/first"
        self._folder, self._imds, self._count = folder, imds, 0

    def launch(self) -> None:
        arguments = [
            "--recipe",
            "digits",
            "--dataset",
            "small",
            "--max-hours",
            "5",
            "--region",
            "us-east-1",
        ]
        assert (
            main(["launch", "first", "--bucket", self.bucket, *arguments, "--arguments", MORE]) == 0
        )

    def group(self) -> tuple[int, list[str]]:
        """Return how many instances the group wants, and those that it has."""
        (found,) = self.aws.client("autoscaling").describe_auto_scaling_groups()[
            "AutoScalingGroups"
        ]
        return found["DesiredCapacity"], [each["InstanceId"] for each in found["Instances"]]

    def boot(self) -> Instance:
        """The group's instance, as its bootstrap leaves it."""
        _, (name,) = self.group()
        self._count += 1
        self._imds.notice = None
        instance = Instance(self._folder / f"{self._count}", self._imds)
        self._imds.more |= {
            "instance-id": name,
            "tags/instance/aws:autoscaling:groupName": stacks.name_of("first"),
        }
        return instance

    def start(self, instance: Instance, training: str = "") -> "subprocess.Popen[str]":
        """Start the service with the stack's values, as user data would set them.

        `training` runs instead of a real one.
        """
        values = stacks.parameters(stacks.find_existing(self.aws, "first"))
        (instance.folder / "train.py").write_text(TRAIN)
        real = f'exec {sys.executable} {instance.folder}/train.py "$@"'
        environment = {
            name: value
            for name, value in os.environ.items()
            if name.startswith(("AWS_", "WDS_", "OMP_"))
        }
        environment |= {
            "WDS_RUN": values["Run"],
            "WDS_RECIPE": values["Recipe"],
            "WDS_ARGUMENTS": values["Arguments"],
        }
        environment |= {
            "WDS_BUCKET": f"s3://{values['Bucket']}/{values['Prefix']}",
            "WANDB_MODE": "disabled",
        }
        environment |= {
            "WDS_HOME": str(instance.folder),
            "PYTHONPATH": str(INFRA.parent),
            "WDS_TRAIN": "training",
        }
        instance.stub("training", training or real)
        command = ["bash", str(instance.code / "infra/run.sh")]
        environment |= instance.environment()
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def attempt(self, instance: Instance, training: str = "") -> tuple[int, str]:
        with self.start(instance, training) as service:
            out, _ = service.communicate(timeout=120)
        self.heed(instance)
        return service.returncode, out

    def heed(self, instance: Instance) -> None:
        """Do what the instance has asked of its group."""
        for call in instance.calls:
            found = re.fullmatch(
                r"aws autoscaling terminate-instance-in-auto-scaling-group (.*)", call
            )
            if found:
                decrements, _, name = shlex.split(found[1])
                self.aws.client("autoscaling").terminate_instance_in_auto_scaling_group(
                    InstanceId=name,
                    ShouldDecrementDesiredCapacity=decrements
                    == "--should-decrement-desired-capacity",
                )

    def take(self) -> None:
        """Take the spot instance back."""
        _, names = self.group()
        self.aws.client("ec2").terminate_instances(InstanceIds=names)

    def later(self) -> None:
        """Carry out what the group has scheduled."""
        scaling = self.aws.client("autoscaling")
        for each in scaling.describe_scheduled_actions()["ScheduledUpdateGroupActions"]:
            sizes: dict[str, Any] = {
                name: each[name] for name in ("MinSize", "MaxSize", "DesiredCapacity")
            }
            scaling.update_auto_scaling_group(
                AutoScalingGroupName=each["AutoScalingGroupName"], **sizes
            )


@pytest.fixture
def cloud(
    imds: FakeImds, s3_url: str, small: str, tmp_path: Path, aws_env: pytest.MonkeyPatch
) -> Iterator[Cloud]:
    aws_env.setenv("AWS_ENDPOINT_URL_S3", os.environ["AWS_ENDPOINT_URL"])
    aws_env.delenv("AWS_ENDPOINT_URL")
    aws_env.setattr(looks, "IMAGE", "/image")
    aws_env.setattr(EC2Response, "get_spot_placement_scores", lambda _: SCORES, raising=False)
    aws_env.setattr("wds_train.aws.bundle.bundle", lambda: (b"the code", False))
    (tmp_path / "stack.json").write_text(for_moto())
    aws_env.setattr(stacks, "TEMPLATE", tmp_path / "stack.json")
    store = open_store(f"{s3_url}/datasets/small")
    for path in sorted(Path(small).rglob("*")):
        if path.is_file():
            store.write(str(path.relative_to(small)), path.read_bytes())
    with mock_aws(config={"core": {"mock_credentials": False}}):
        cloud = Cloud(s3_url, tmp_path, imds)
        cloud.aws.client("ssm").put_parameter(Name="/image", Value=IMAGE, Type="String")
        yield cloud


def test_from_the_launch_over_an_interruption_to_a_group_of_none(
    cloud: Cloud, imds: FakeImds, tmp_path: Path
) -> None:
    cloud.launch()
    first = cloud.boot()
    with cloud.start(first) as service:
        out = ""
        for line in service.stdout or ():
            out += line
            if line.startswith("epoch   1/"):
                imds.give_notice()
    assert (service.returncode, [call for call in first.calls if "terminate" in call]) == (0, []), (
        out
    )
    assert "stopped by the spot notice" in out
    assert "its successor goes on" in out
    stopped = find_run(cloud.run)[0]
    assert (stopped.status, 0 < stopped.step < stopped.settings.schedule.epochs * 11) == (
        "interrupted",
        True,
    )

    gone = cloud.group()[1]
    cloud.take()
    wished, names = cloud.group()
    assert (wished, len(names), names != gone) == (1, 1, True)

    code, out = cloud.attempt(cloud.boot())
    assert (code, cloud.group()) == (0, (0, [])), out
    assert f"resuming at step {stopped.step}" in out
    assert find_run(cloud.run)[0].totals().attempts == 2
    job = Job(f"{cloud.bucket}/datasets/small", f"{cloud.bucket}/runs/unbroken", str(tmp_path))
    with all_ended([unbroken := Training(job)]):
        assert unbroken.end() == 0, unbroken.output
    assert_same_end(cloud.run, f"{cloud.bucket}/runs/unbroken")


def test_what_cannot_succeed_ends_with_a_group_of_none(cloud: Cloud) -> None:
    cloud.launch()
    # A fatal error, of a real training: the stack names a recipe that there is not.
    code, out = cloud.attempt(
        cloud.boot(), f'exec {sys.executable} -m wds_train.cli "$@" --set nothing=1'
    )
    assert (code, cloud.group()) == (0, (0, [])), out
    assert f"exit code {UsageError.exit_code}" in out

    # A crash loop: systemd starts the service again as often as its unit says, and then the unit of
    # its failure.
    stacks.start(cloud.aws, "first", 5)
    looping, starts = cloud.boot(), unit("wds-train.service", "StartLimitBurst")
    for _ in range(int(starts)):
        assert cloud.attempt(looping, "kill -9 $$")[0] == Interrupted.exit_code
        assert cloud.group()[0] == 1
    give_up = unit(unit("wds-train.service", "OnFailure"), "ExecStart").replace(
        "/opt/wds-train", str(looping.code)
    )
    subprocess.run(shlex.split(give_up), env=looping.environment(), check=True)
    cloud.heed(looping)
    assert cloud.group() == (0, [])

    # The dead man's switch: whatever the instance does.
    stacks.start(cloud.aws, "first", 5)
    with cloud.start(cloud.boot(), "trap '' TERM; sleep 600 & wait") as wedged:
        assert cloud.group()[0] == 1
        cloud.later()
        assert cloud.group() == (0, [])
        wedged.kill()


def unit(name: str, setting: str) -> str:
    (value,) = re.findall(rf"^{setting}=(.*)$", (INFRA / name).read_text(), re.M)
    return value
