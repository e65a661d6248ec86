"""Log lines for CloudWatch: all arrive in order, and a CloudWatch that fails delays nobody."""

import io
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from botocore.stub import Stubber
from moto import mock_aws

from wds_train.aws.log_shipper import KEPT, LONGEST, Shipper, ship


@pytest.fixture
def logs(aws_env: pytest.MonkeyPatch) -> Iterator[Any]:
    with mock_aws():
        client = boto3.client("logs", "us-east-1", aws_access_key_id="x", aws_secret_access_key="x")
        client.create_log_group(logGroupName="group")
        yield client


def shipped(logs: Any) -> list[str]:
    return [each["message"] for each in logs.filter_log_events(logGroupName="group")["events"]]


def test_all_lines_arrive_in_order_and_pass_on(
    logs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"line {number}" for number in range(450)]
    ship(
        io.StringIO("\n".join([*lines, "", "x" * 2000])), Shipper(logs, "group", "i-1"), every=0.01
    )
    assert shipped(logs) == [*lines, " ", "x" * LONGEST]  # CloudWatch takes no empty one
    assert capsys.readouterr().out.splitlines() == [*lines, "", "x" * 2000]


def test_what_fails_is_sent_again_and_too_much_is_left_out(
    logs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    shipper = Shipper(logs, "group", "i-1")
    for number in range(KEPT + 3):
        shipper.add(f"{number}")
    with Stubber(logs) as stub:
        stub.add_response("create_log_stream", {})
        stub.add_client_error("put_log_events", "ThrottlingException")
        shipper.flush()
    assert shipper.lost == 3
    assert "CloudWatch took no log" in capsys.readouterr().err
    logs.create_log_stream(logGroupName="group", logStreamName="i-1")
    shipper.flush()
    assert shipper.lost == 3
    found = logs.get_log_events(logGroupName="group", logStreamName="i-1", startFromHead=True)[
        "events"
    ]
    assert found[0]["message"] == "3"
