"""`wds-train plan`: the table, one plan in full, prices from three places, and refusals."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from PIL import Image

from wds_train.aws.cost import GPU_RATES, Images
from wds_train.aws.cost_table import apply_speeds, best, plan_row, quotes, spot_prices
from wds_train.aws.prices import MACHINES, PRICES
from wds_train.cli import main
from wds_train.config.presets import PRESETS, preset
from wds_train.dataset.reader import Dataset


@pytest.fixture(autouse=True)
def alone(aws_env: pytest.MonkeyPatch) -> None:
    """Without credentials, AWS is asked nothing."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        aws_env.delenv(name, raising=False)


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        code = main(["plan", *arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, *capsys.readouterr()


def test_one_plan_as_json_and_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ("--recipe", "strong", "--instance", "g5.2xlarge", "--spot-price", "0.4")
    code, out, _ = told(capsys, *chosen, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["usd"] == pytest.approx(0.4 * found["hours"], rel=0.05)
    assert (found["bottleneck"], found["top1"], found["price"]) == ("decode", 78.74, 0.4)
    assert found["resize_shorter"]["px"] == 256
    assert found["resize_shorter"]["usd"] < 0.95 * found["usd"] < found["usd_on_demand"]
    _, words, _ = told(capsys, *chosen)
    for each in (
        f"hours      {found['hours']:.1f}",
        "waits for  decode",
        "arXiv:2110.00476",
        "--resize-shorter 256: ",
    ):
        assert each in words
    # This one waits for the GPU, so that smaller images would not pay.
    _, words, _ = told(capsys, "--recipe", "step", "--instance", "g5.2xlarge")
    assert "--resize-shorter" not in words


def test_the_table_is_sorted_and_marks_the_best(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, err = told(capsys, "--out", str(tmp_path / "front.png"))
    assert code == 0
    assert "prices of late 2025, us-east-1: no AWS credentials were found" in err
    rows = [[*line[2:].split(), line[0]] for line in out.splitlines()[1:] if "xlarge" in line]
    dollars = [float(each[3]) for each in rows]
    assert dollars == sorted(dollars)
    assert {each[1] for each in rows} == set(PRICES)
    marked = [float(each[4]) for each in rows if each[-1] == "*"]
    assert marked == sorted(marked)
    assert marked[-1] == 80.85
    assert "digits" not in out  # whose accuracy is not ImageNet's
    assert Image.open(tmp_path / "front.png").size > (500, 300)


def test_the_dataset_that_is_given_is_the_one_that_is_planned_for(
    capsys: pytest.CaptureFixture[str], digits: Dataset
) -> None:
    url = digits.store.url
    _, out, _ = told(
        capsys, "--recipe", "digits", "--instance", "g5.2xlarge", "--dataset", url, "--json"
    )
    *_, validation = json.loads(out)["phases"]
    assert validation["images"] == preset("digits").schedule.epochs * len(digits.split("val"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--instance", "g5.2xlrge"],
            "there is no instance 'g5.2xlrge' in the plan's table; did you mean g5.2xlarge",
        ),
        (["--recipe", "imagnet"], "there is no recipe 'imagnet'"),
        (["--set", "batch=4"], "--set needs --recipe"),
        (["--instance", "g5.xlarge"], "there is no price of g5.xlarge; give --spot-price"),
        (["--spot-price", "cheap"], "'cheap' is not a number of at least 0"),
        (["--recipe", "step", "--set", "model.name=resnet18"], "not that of model.name = resnet18"),
    ],
)
def test_what_cannot_be_planned_is_said(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, out, err = told(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_a_price_that_is_given_comes_before_aws_and_aws_before_the_table() -> None:
    machines = [MACHINES[name] for name in ("g5.2xlarge", "g5.xlarge", "g6.2xlarge")]
    found = quotes(machines, {"g5.xlarge": 0.2}, None)
    assert {name: (each.usd, each.source) for name, each in found.items()} == {
        "g5.2xlarge": (pytest.approx(0.475), "late 2025, us-east-1: 0.36-0.59"),
        "g5.xlarge": (0.2, "AWS, now"),
        "g6.2xlarge": (pytest.approx(0.475), "late 2025, us-east-1: 0.37-0.58"),
    }
    assert {each.usd for each in quotes(machines, {"g5.xlarge": 0.2}, 0.5).values()} == {0.5}


@pytest.mark.parametrize(("zone", "usd"), [(min, 0.2), (max, 0.3)])
def test_the_spot_price_is_that_of_the_cheapest_or_dearest_zone(
    aws_env: pytest.MonkeyPatch, zone: Callable[[float, float], float], usd: float
) -> None:
    import boto3
    from botocore.stub import Stubber  # moto's prices are all alike

    client = boto3.client("ec2", "us-east-1", aws_access_key_id="x", aws_secret_access_key="x")
    entries = [
        {
            "InstanceType": name,
            "SpotPrice": price,
            "AvailabilityZone": place,
            "Timestamp": datetime.now(UTC),
        }
        for name, price, place in (
            ("g5.xlarge", "0.3", "a"),
            ("g5.xlarge", "0.2", "b"),
            ("g6.xlarge", "0.4", "a"),
        )
    ]
    with Stubber(client) as stub:
        stub.add_response("describe_spot_price_history", {"SpotPriceHistory": entries})
        assert spot_prices(["g5.xlarge", "g6.xlarge"], client, zone) == {
            "g5.xlarge": usd,
            "g6.xlarge": 0.4,
        }


def test_an_aws_that_refuses_leaves_the_table(
    capsys: pytest.CaptureFixture[str], aws_env: pytest.MonkeyPatch
) -> None:
    aws_env.setenv("AWS_ACCESS_KEY_ID", "x")
    aws_env.setenv("AWS_SECRET_ACCESS_KEY", "x")
    aws_env.setenv("AWS_ENDPOINT_URL_EC2", "http://127.0.0.1:9")
    code, out, err = told(capsys, "--recipe", "quick", "--instance", "g5.2xlarge")
    assert code == 0
    assert "prices of late 2025, us-east-1: AWS told no prices: Could not connect" in err
    assert "late 2025, us-east-1: 0.36-0.59" in out


def test_what_was_measured_here_counts_for_like_machines() -> None:
    machines = [MACHINES[name] for name in ("g6.2xlarge", "g6e.2xlarge", "p4d.24xlarge")]
    l4, l40s, a100 = apply_speeds(machines, 0.5, "NVIDIA L40S", 1234.0)
    assert [each.core for each in (l4, l40s, a100)] == [0.5] * 3
    assert [each.gpu_rate for each in (l4, l40s, a100)] == [
        GPU_RATES["L4"],
        1234.0,
        GPU_RATES["A100"],
    ]
    assert apply_speeds(machines, 0.5, "NVIDIA A100-SXM4-40GB", 2000.0)[2].gpu_rate == 2000.0
    assert [each.gpu_rate for each in apply_speeds(machines, 0.5, "", None)] == [
        each.gpu_rate for each in machines
    ]


def test_calibration_measures_this_machine(
    capsys: pytest.CaptureFixture[str], aws_env: pytest.MonkeyPatch
) -> None:
    aws_env.setattr("benchmarks.decode_rates.REPEATS", 1)
    aws_env.setattr("benchmarks.decode_rates.PASS_SAMPLES", 10)
    chosen = ("--recipe", "strong", "--instance", "g5.2xlarge", "--json")
    before = json.loads(told(capsys, *chosen)[1])["phases"][0]["rates"]
    code, out, err = told(capsys, *chosen, "--calibrate")
    share = float(err.split("a core is ")[1].split()[0])
    after = json.loads(out)["phases"][0]["rates"]
    assert code == 0
    assert after["decode"] / before["decode"] == pytest.approx(
        share / MACHINES["g5.2xlarge"].core, rel=0.02
    )


def test_the_best_have_an_accuracy() -> None:
    machine, images = MACHINES["g5.2xlarge"], Images(1000, 100, 1e5)
    price = quotes([machine], {}, 0.5)[machine.type]
    rows = [
        plan_row(PRESETS[name], PRESETS[name].recipe, machine, images, price)
        for name in ("digits", "quick", "strong")
    ]
    assert [each.plan.recipe for each in best(rows)] == ["quick", "strong"]
