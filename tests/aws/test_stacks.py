"""Launch, stop, destroy and leftovers, against moto. Stand-ins do what it lacks."""

import hashlib
import io
import json
import re
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from answers import answer
from botocore.exceptions import EndpointConnectionError
from botocore.stub import Stubber
from moto import mock_aws
from moto.ec2.responses import EC2Response
from test_template import TEMPLATE, instance_types
from told_runs import history_of, make_run

from wds_train.aws import interruption as interrupt
from wds_train.aws import preflight as looks
from wds_train.aws import stacks
from wds_train.aws.account import Aws
from wds_train.aws.bundle import key_of
from wds_train.aws.preflight import SIZES, VCPUS, Order, preflight
from wds_train.aws.resources import leftovers
from wds_train.checkpoint.run_manifest import Attempt, Checkpoint, Object, Progress, RunManifest
from wds_train.cli import main
from wds_train.commands.launch import limit_hours
from wds_train.config.presets import preset
from wds_train.dataset.manifest import ClassInfo, DatasetManifest, Index, Shard, Split
from wds_train.errors import AccessDenied, Interrupted, NotFound, RunError, Unavailable, UsageError

IMAGE = "ami-03cf127a"  # one of moto's
SCORES = """<GetSpotPlacementScoresResponse><spotPlacementScoreSet><item><region>us-east-1</region><score>2</score></item>
</spotPlacementScoreSet></GetSpotPlacementScoresResponse>"""
NETWORK = ("VPC", "Subnet", "Route", "Gateway", "Endpoint", "SecurityGroup", "BucketPolicy")


def for_moto() -> str:
    """Return the template without what moto cannot delete, which is the network.

    A null value in a list is removed, too.
    """
    tree = json.loads(json.dumps(TEMPLATE))
    resources = {
        name: each
        for name, each in tree["Resources"].items()
        if not any(word in each["Type"].rpartition("::")[2] for word in NETWORK)
    }
    group = resources["Group"]["Properties"]
    group["AvailabilityZones"] = ["us-east-1a"]
    del group["VPCZoneIdentifier"], resources["Group"]["DependsOn"]
    del resources["Template"]["Properties"]["LaunchTemplateData"]["NetworkInterfaces"]
    statement = resources["Role"]["Properties"]["Policies"][0]["PolicyDocument"]["Statement"]
    resources["Role"]["Properties"]["Policies"][0]["PolicyDocument"]["Statement"] = statement[:-1]
    return json.dumps(tree | {"Resources": resources})


@pytest.fixture
def aws(aws_env: pytest.MonkeyPatch) -> Iterator[Aws]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        aws_env.setenv(name, "testing")
    aws_env.delenv("AWS_ENDPOINT_URL", raising=False)
    aws_env.setattr(looks, "IMAGE", "/image")
    aws_env.setattr(EC2Response, "get_spot_placement_scores", lambda _: SCORES, raising=False)
    with mock_aws():
        aws = Aws("us-east-1")
        aws.client("ssm").put_parameter(Name="/image", Value=IMAGE, Type="String")
        yield aws


@pytest.fixture
def order(aws: Aws, tmp_path: Path, aws_env: pytest.MonkeyPatch) -> Order:
    """A bucket with a dataset, ready for a launch, and a template that moto can make."""
    bucket = f"test-{uuid.uuid4().hex}"
    aws.client("s3").create_bucket(Bucket=bucket)
    splits = {
        name: Split(
            (Shard(f"{name}/shard-000000.tar", 10**9, 10_000, "0" * 64),),
            Index(f"{name}/i.parquet", 1, "0" * 64),
        )
        for name in ("train", "val")
    }
    manifest = DatasetManifest((ClassInfo("a", "a"), ClassInfo("b", "b")), splits, "made", 0, {})
    aws.client("s3").put_object(
        Bucket=bucket, Key="p/datasets/quick/manifest.json", Body=manifest.to_json()
    )
    (tmp_path / "stack.json").write_text(for_moto())
    aws_env.setattr(stacks, "TEMPLATE", tmp_path / "stack.json")
    return Order(bucket, "p/", "first", preset("quick"), f"s3://{bucket}/p/datasets/quick", "small")


def launch(order: Order, *more: str) -> int:
    place = f"s3://{order.bucket}/{order.prefix}"
    return main(
        [
            "launch",
            order.run,
            "--bucket",
            place,
            "--recipe",
            "quick",
            "--region",
            "us-east-1",
            *more,
        ]
    )


@pytest.fixture
def code(aws_env: pytest.MonkeyPatch) -> None:
    """A stand-in for the bundle, which takes seconds and the network.

    Every launch has another one: a bundle that exists is read by signed addresses, which moto does
    not know.
    """
    versions = iter((b"the code", b"the next"))
    aws_env.setattr("wds_train.aws.bundle.bundle", lambda: (next(versions), False))


def group(aws: Aws) -> dict[str, Any]:
    (found,) = aws.client("autoscaling").describe_auto_scaling_groups()["AutoScalingGroups"]
    return found


def test_a_launch_makes_the_stack_sets_its_end_and_then_wishes_for_one(
    aws: Aws, order: Order, code: None
) -> None:
    assert launch(order, "--max-hours", "5", "--arguments", "--price 0.4") == 0
    assert (group(aws)["DesiredCapacity"], len(group(aws)["Instances"])) == (1, 1)
    (end,) = aws.client("autoscaling").describe_scheduled_actions()["ScheduledUpdateGroupActions"]
    assert (end["MinSize"], end["MaxSize"], end["DesiredCapacity"]) == (0, 0, 0)
    assert timedelta(hours=4.9) < end["StartTime"] - datetime.now(UTC) <= timedelta(hours=5)
    values = stacks.parameters(stacks.find_existing(aws, "first"))
    assert values["Arguments"] == f"--dataset s3://{order.bucket}/p/datasets/quick --price 0.4"
    stored = aws.client("s3").get_object(Bucket=order.bucket, Key=values["CodeKey"])["Body"].read()
    assert (stored, values["CodeSha256"]) == (b"the code", key_of(b"the code")[1])


def test_a_check_makes_nothing(
    aws: Aws, order: Order, capsys: pytest.CaptureFixture[str], aws_env: pytest.MonkeyPatch
) -> None:
    aws_env.setenv("WDS_BUCKET", f"s3://{order.bucket}/p")  # as for all other commands
    assert main(["launch", "first", "--recipe", "quick", "--region", "us-east-1", "--check"]) == 0
    out = capsys.readouterr().out
    for word in (
        "account",
        "stack",
        "bucket",
        "run",
        "quota",
        "placement",
        "image",
        "plan",
        "the end",
        "nothing was made",
    ):
        assert f"\n{word}" in f"\n{out}"
    assert aws.client("cloudformation").list_stacks()["StackSummaries"] == []
    assert [
        each["Key"] for each in aws.client("s3").list_objects_v2(Bucket=order.bucket)["Contents"]
    ] == ["p/datasets/quick/manifest.json"]


def test_a_bucket_that_is_not_there_yet_is_made_and_nothing_started(
    aws: Aws, order: Order, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh = Order(
        f"{order.bucket}-new", *(order.prefix, order.run, order.recipe, order.dataset, order.size)
    )
    assert launch(fresh) == 2
    assert (
        "does not exist; correct the name, or make it with --create-bucket"
        in capsys.readouterr().err
    )
    assert launch(fresh, "--create-bucket") == 0
    assert "now the images: make shards" in capsys.readouterr().out
    assert group(aws)["DesiredCapacity"] == 0
    assert aws.client("s3").head_bucket(Bucket=fresh.bucket)
    assert stacks.kept_parameters(aws, "first")["CreateBucket"] == "yes"
    assert launch(fresh, "--create-bucket") == 2  # it exists
    aws.client("s3").delete_bucket(Bucket=fresh.bucket)
    assert launch(fresh) == 2
    assert "which the stack made, was deleted; make destroy RUN=first" in capsys.readouterr().err


def test_stop_launch_again_and_destroy(
    aws: Aws,
    order: Order,
    code: None,
    capsys: pytest.CaptureFixture[str],
    aws_env: pytest.MonkeyPatch,
) -> None:
    aws_env.setattr("sys.stdin", io.StringIO("another\n"))
    assert launch(order) == 0
    assert main(["stop", "first", "--region", "us-east-1"]) == 0
    assert (group(aws)["DesiredCapacity"], group(aws)["Instances"]) == (0, [])
    # As the scheduled end leaves it:
    aws.client("autoscaling").update_auto_scaling_group(
        AutoScalingGroupName="wds-train-first", MaxSize=0
    )
    assert launch(order) == 0
    assert (group(aws)["MaxSize"], group(aws)["DesiredCapacity"]) == (1, 1)
    assert main(["destroy", "first", "--region", "us-east-1"]) == 2  # the answer is another name
    assert stacks.find(aws, "first")
    assert main(["destroy", "first", "--region", "us-east-1", "--yes"]) == 0
    assert f"the bucket s3://{order.bucket} and all that it holds stay" in capsys.readouterr().out
    assert stacks.find(aws, "first") is None
    assert aws.client("s3").head_bucket(Bucket=order.bucket)
    assert main(["stop", "first", "--region", "us-east-1"]) == 1
    assert "there is no stack wds-train-first in us-east-1; launch it" in capsys.readouterr().err


def test_a_half_made_stack_without_its_group_is_destroyed(aws: Aws) -> None:
    stack = {
        "StackName": "wds-train-first",
        "StackStatus": "DELETE_FAILED",
        "CreationTime": datetime.now(UTC),
    }
    with Stubber(aws.client("cloudformation")) as stub:
        stub.add_response("describe_stacks", {"Stacks": [stack]})
        stub.add_response("delete_stack", {}, {"StackName": "wds-train-first"})
        stub.add_client_error(
            "describe_stacks", "ValidationError", "Stack with id x does not exist"
        )
        stacks.destroy(aws, "first")
        stub.assert_no_pending_responses()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-usd", "0"], "--max-usd 0 buys no hour"),
        (["--max-usd", "1e9"], "hours are over a year, which is no limit"),
        (["--max-hours", "0"], "'0' is not a number of more than 0"),
        (["--size", "tiny"], "invalid choice: 'tiny'"),
        (["--arguments", "$(reboot)"], "may hold letters, digits, blanks"),
        (["--dataset", "s3://other/x"], "must be a name below the bucket"),
        (["--bucket", "s3://bucket/a b"], "may hold letters, digits and ._- alone"),
        (["--bucket", "/local"], "is no s3://BUCKET[/PREFIX]"),
        (["--dataset", "absent"], "there is no dataset at s3://"),
        (
            ["--region", "eu-west-1"],
            "and every epoch would be paid for as transfer; launch there: --region us-east-1",
        ),
    ],
)
def test_what_cannot_be_launched_is_a_sentence_and_makes_nothing(
    aws: Aws, order: Order, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    try:
        code = launch(order, *arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    err = capsys.readouterr().err
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert aws.client("cloudformation").list_stacks()["StackSummaries"] == []


def test_a_quota_of_nothing_is_told_with_what_to_ask_for(aws: Aws, order: Order) -> None:
    with Stubber(aws.client("service-quotas")) as stub:
        for value in (0.0, 8.0, 8.0):
            stub.add_response("get_service_quota", {"Quota": {"Value": value}})
        (refused,) = preflight(aws, order).refused
        assert (
            'quota "All G and VT Spot Instance Requests" is 0 vCPUs, and size small takes up to 8; ask for more'
            in refused
        )
        assert "--quota-code L-3819A6DF --desired-value 8" in refused
        assert not preflight(aws, order).refused
        (refused,) = preflight(aws, Order(**vars(order) | {"size": "medium"})).refused
        assert "give --size small, or ask for more" in refused


def test_a_placement_score_is_told(aws: Aws, order: Order) -> None:
    assert [
        line
        for line in preflight(aws, order).lines
        if line.startswith("placement   2 of 10; expect to wait")
    ]


@pytest.mark.parametrize(
    ("status", "message"),
    [
        ("ROLLBACK_COMPLETE", "is half-made"),
        ("DELETE_FAILED", "is half-made"),
        ("UPDATE_ROLLBACK_FAILED", "is half-made"),
        ("UPDATE_IN_PROGRESS", "is being changed"),
    ],
)
def test_a_stack_that_is_not_whole_is_refused(
    aws: Aws, order: Order, status: str, message: str
) -> None:
    stack = {
        "StackName": "wds-train-first",
        "StackStatus": status,
        "CreationTime": datetime.now(UTC),
    }
    with Stubber(aws.client("cloudformation")) as stub:
        stub.add_response("describe_stacks", {"Stacks": [stack]})
        (refused,) = preflight(aws, order).refused
    assert message in refused


def test_a_stack_that_fails_is_taken_away_and_its_cause_told(aws: Aws, order: Order) -> None:
    event = {
        "ResourceStatus": "CREATE_FAILED",
        "LogicalResourceId": "Group",
        "ResourceStatusReason": "no such zone",
    }
    event |= {"StackId": "x", "EventId": "x", "StackName": "x", "Timestamp": datetime.now(UTC)}
    stack = {
        "StackName": "x",
        "StackStatus": "ROLLBACK_COMPLETE",
        "CreationTime": datetime.now(UTC),
    }
    with Stubber(aws.client("cloudformation")) as stub:
        stub.add_client_error(
            "describe_stacks", "ValidationError", "Stack with id x does not exist"
        )
        stub.add_response("create_stack", {})
        stub.add_response("describe_stacks", {"Stacks": [stack]})
        stub.add_response("describe_stack_events", {"StackEvents": [event]})
        with pytest.raises(
            RunError, match="Group: no such zone; what was made of it is taken away"
        ):
            stacks.make(aws, "first", {})


def test_another_run_of_a_like_name_is_not_touched(aws: Aws, order: Order, code: None) -> None:
    assert launch(order) == 0
    stack = stacks.find_existing(aws, "first") | {
        "Parameters": [{"ParameterKey": "Run", "ParameterValue": "fi.rst"}]
    }
    with Stubber(aws.client("cloudformation")) as stub:
        stub.add_response("describe_stacks", {"Stacks": [stack]})
        with pytest.raises(UsageError, match="choose a run whose name differs"):
            stacks.stop(aws, "first")
    assert group(aws)["DesiredCapacity"] == 1


def test_the_limit_is_the_least_that_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert limit_hours(10.2, 0.5, None, None) == 21
    assert limit_hours(10.2, 0.5, 30.0, None) == 30
    assert limit_hours(10.2, 0.5, 30.0, 8.0) == 16
    assert capsys.readouterr().out == ""
    assert limit_hours(10.2, 0.5, 3.0, None) == 3
    assert "the limit comes before" in capsys.readouterr().out
    assert limit_hours(None, 0.5, None, 8.0) == 16


def test_what_the_plan_does_not_know_is_launched_with_a_limit(
    aws: Aws, order: Order, capsys: pytest.CaptureFixture[str]
) -> None:
    unknown = ("--recipe", "small", "--dataset", "quick", "--check")
    assert launch(order, *unknown) == 2
    assert (
        "the plan does not know the hours; give --max-hours or --max-usd" in capsys.readouterr().err
    )
    assert launch(order, *unknown, "--max-hours", "3") == 0
    assert "the end     3.0 hours from now at the latest" in capsys.readouterr().out


def test_what_it_costs_is_reckoned_at_the_dearest_type_and_zone(aws: Aws, order: Order) -> None:
    entries = [
        {
            "InstanceType": name,
            "SpotPrice": usd,
            "AvailabilityZone": zone,
            "Timestamp": datetime.now(UTC),
        }
        for name, usd, zone in (
            ("p4d.24xlarge", "6", "a"),
            ("p4d.24xlarge", "9", "b"),
            ("p4de.24xlarge", "14", "a"),
        )
    ]
    scores = {"SpotPlacementScores": [{"Region": "us-east-1", "Score": 9}]}
    with Stubber(aws.client("ec2")) as stub:
        stub.add_response("get_spot_placement_scores", scores)
        stub.add_response("describe_spot_price_history", {"SpotPriceHistory": entries})
        assert preflight(aws, replace(order, size="a100")).price == 14


def test_without_credentials_one_sentence(
    aws_env: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        aws_env.delenv(name, raising=False)
    order = Order(
        "some-bucket", "", "first", preset("quick"), "s3://some-bucket/datasets/quick", "small"
    )
    assert launch(order) == 2
    err = capsys.readouterr().err
    assert "account     no AWS credentials were found" in err
    assert "log in (aws sso login, aws configure), or set AWS_PROFILE" in err
    assert main(["leftovers", "--region", "us-east-1"]) == 1
    aws_env.delenv("AWS_REGION")
    for nothing in ([], ["--region", ""]):
        assert main(["leftovers", *nothing]) == 2
        assert "no AWS region is set; give --region" in capsys.readouterr().err


def test_a_right_that_lacks_is_named(aws: Aws) -> None:
    with Stubber(aws.client("cloudformation")) as stub:
        stub.add_client_error(
            "describe_stacks",
            "AccessDenied",
            "not authorized to perform: cloudformation:DescribeStacks",
        )
        with pytest.raises(
            AccessDenied, match=r"DescribeStacks was denied .+docs/aws\.md lists the rights"
        ):
            stacks.find(aws, "first")


def test_what_still_costs_money_is_told(
    aws: Aws, order: Order, code: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert leftovers(aws) == []
    ec2 = aws.client("ec2")
    tags = [{"Key": "wds-train", "Value": "first"}]
    ec2.run_instances(
        ImageId=IMAGE,
        MinCount=1,
        MaxCount=1,
        TagSpecifications=[{"ResourceType": "instance", "Tags": tags}],
    )
    ec2.create_volume(
        AvailabilityZone="us-east-1a",
        Size=7,
        TagSpecifications=[{"ResourceType": "volume", "Tags": tags}],
    )
    aws.client("s3").put_bucket_tagging(Bucket=order.bucket, Tagging={"TagSet": tags})
    assert launch(order) == 0
    found = leftovers(aws)
    assert [line.split()[0] for line in found] == [
        "group",
        "instance",
        "instance",
        "volume",
        "bucket",
    ]
    assert "make stop RUN=first" in found[0]
    assert re.search(r"\(7 GiB, available\): aws ec2 delete-volume --volume-id vol-", found[3])


def test_a_bucket_that_gives_no_answer_is_a_sentence(aws: Aws, order: Order) -> None:
    def silent(**_: Any) -> None:
        raise EndpointConnectionError(endpoint_url="https://s3")

    aws.client("s3").get_bucket_tagging = silent
    with pytest.raises(Unavailable, match=f"the tags of {order.bucket}: AWS gave no answer"):
        leftovers(aws)


def test_a_run_that_waits_for_its_first_instance_has_a_status(
    aws: Aws, order: Order, code: None, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = (
        "status",
        "first",
        "--bucket",
        f"s3://{order.bucket}/{order.prefix}",
        "--machines",
        "--region",
        "us-east-1",
    )
    status, _, err = answer(capsys, *asked)
    assert (status, "there is no run at" in err) == (1, True)
    assert launch(order) == 0
    capsys.readouterr()
    status, out, _ = answer(capsys, *asked)
    assert (status, out.splitlines()[0]) == (
        0,
        f"run      s3://{order.bucket}/p/runs/first: not begun yet",
    )
    found = json.loads(answer(capsys, *asked, "--json")[1])
    assert (found["status"], found["machines"]) == ("not begun", out.splitlines()[1:])


def test_who_does_not_wait_for_the_stack_hears_that_it_goes_on(
    aws: Aws, order: Order, code: None
) -> None:
    def leave(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    aws.client("cloudformation").get_waiter = lambda _: SimpleNamespace(wait=leave)
    with pytest.raises(Interrupted, match="AWS goes on with the stack wds-train-first by itself"):
        stacks.make(
            aws,
            "first",
            {"Run": "first"},
            '{"Resources": {}, "Parameters": {"Run": {"Type": "String"}}}',
        )


def test_the_machines_are_told_with_what_keeps_them(aws: Aws, order: Order, code: None) -> None:
    with pytest.raises(NotFound):
        stacks.find_existing(aws, "first")
    assert stacks.machines(aws, "first") == ["group wds-train-first: there is none in us-east-1"]
    assert launch(order) == 0
    aws.client("autoscaling").suspend_processes(
        AutoScalingGroupName="wds-train-first", ScalingProcesses=["Launch"]
    )
    activity = {
        "Description": "Launching",
        "StatusCode": "Failed",
        "StatusMessage": "no capacity",
        "ActivityId": "x",
    }
    activity |= {"AutoScalingGroupName": "x", "Cause": "x", "StartTime": datetime.now(UTC)}
    aws.client("autoscaling").describe_scaling_activities = lambda **_: {"Activities": [activity]}
    state, machine, suspended, failed = stacks.machines(aws, "first")
    assert re.fullmatch(
        r"group wds-train-first: 1 wanted, 1 there, none from \d{4}-\d\d-\d\d \d\d:\d\d UTC on",
        state,
    )
    assert machine.startswith("instance i-")
    assert suspended.startswith("suspended: Launch")
    assert failed == "failed: Launching: no capacity"


def test_logs_are_those_of_the_newest_instances(
    aws: Aws, order: Order, code: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(order) == 0
    assert main(["logs", "first", "--region", "us-east-1"]) == 1
    assert "holds no line yet" in capsys.readouterr().err
    logs, name = aws.client("logs"), "/wds-train/wds-train-first"
    now = int(datetime.now(UTC).timestamp() * 1000)
    for number, stream in enumerate(("i-1", "i-2")):
        logs.create_log_stream(logGroupName=name, logStreamName=stream)
        event = {"timestamp": now + number, "message": f"of {stream}"}
        logs.put_log_events(logGroupName=name, logStreamName=stream, logEvents=[event])
    assert main(["logs", "first", "--region", "us-east-1"]) == 0
    assert [line.split("  ", 1)[1] for line in capsys.readouterr().out.splitlines()] == [
        "i-1  of i-1",
        "i-2  of i-2",
    ]


def test_sizes_are_those_of_the_template() -> None:
    assert {size: set(types) for size, types in SIZES.items()} == {
        size: instance_types(size) for size in SIZES
    }
    assert set(VCPUS) == set(SIZES)


def ends(aws: Aws, folder: Path, running: RunManifest) -> None:
    """Act as the instances of `running` do once one is to go.

    The old one commits; the next one claims the run and logs a step.
    """
    (gone,) = [each["InstanceId"] for each in group(aws)["Instances"]]
    while [each["InstanceId"] for each in group(aws)["Instances"]] == [gone]:
        time.sleep(0.02)
    state = Checkpoint(
        Object("ckpt/000001-000000043-000002.safetensors", 1, "0" * 64), Progress(43), {}
    )
    stopped = replace(running, status="interrupted", checkpoints=(state,), written=time.time())
    claimed = replace(stopped, status="running", fence=2, attempts=(Attempt("two", time.time()),))
    row = (folder / (first := running.metrics[0].object.key)).read_bytes().splitlines()[0]
    row = row.replace(b"1700000060.0", str(time.time() + 5).encode()) + b"\n"
    (folder / (key := first.replace("000001-", "000002-", 1))).write_bytes(row)
    segment = replace(
        running.metrics[0], object=Object(key, len(row), hashlib.sha256(row).hexdigest())
    )
    for each in (stopped, claimed, replace(claimed, replayed=(segment,))):
        (folder / "new").write_bytes(each.to_json())
        (folder / "new").replace(folder / "manifest.json")
        time.sleep(0.2)


@pytest.mark.usefixtures("code")
def test_a_run_on_aws_is_interrupted_once_and_followed_until_steps_go_on(
    aws: Aws,
    order: Order,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    aws_env: pytest.MonkeyPatch,
) -> None:
    aws_env.setattr(interrupt, "POLL_SECONDS", 0.02)
    run, asked = tmp_path / "first", ["rehearse", str(tmp_path / "first"), "--region", "us-east-1"]
    running = make_run(run, history_of(2), attempts=[Attempt("one", 0.0)], status="running")
    assert launch(order) == 0
    (first,) = group(aws)["Instances"]
    aws_env.setattr("sys.stdin", io.StringIO("another\n"))
    status, _, err = answer(capsys, *asked)
    assert (status, "nothing was ended" in err) == (2, True)
    assert group(aws)["Instances"] == [first]
    successor = threading.Thread(target=ends, args=(aws, run, running))
    successor.start()
    status, out, err = answer(capsys, *asked, "--yes")
    successor.join()
    assert status == 0, err
    (second,) = group(aws)["Instances"]
    assert (group(aws)["DesiredCapacity"], second["InstanceId"] != first["InstanceId"]) == (1, True)
    assert f"instance {first['InstanceId']}: " in out
    commit, claim, steps = re.search(
        r"commit +([\d.]+) s, at step 43;.*claim +([\d.]+) s.*steps +([\d.]+) s", out, re.S
    ).groups()  # type: ignore[union-attr]
    assert float(commit) <= float(claim) < 5 <= float(steps)
    # Nothing that trains is ended when the run, or the group, says that there is none.
    make_run(run, history_of(2))
    assert "run first is interrupted; only one that trains" in answer(capsys, *asked, "--yes")[2]
    aws.client("autoscaling").update_auto_scaling_group(
        AutoScalingGroupName="wds-train-first", DesiredCapacity=0
    )
    assert "no instance trains first; make status RUN=first" in answer(capsys, *asked, "--yes")[2]
