"""The stack's template, parsed.

Each property that keeps the data safe or the bill small has an assertion.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from moto import mock_aws

from wds_train.errors import Interrupted

INFRA = Path(__file__).parents[2] / "infra"
QUOTA_FAMILIES = {"small": 8, "medium": 16, "large": 48, "huge": 192, "a100": 96}


class Loader(yaml.SafeLoader):
    """Reads YAML with CloudFormation's short functions.

    `!Ref X` is {"Ref": X}, `!If [...]` is {"Fn::If": [...]}.
    """


def function(loader: yaml.SafeLoader, tag: str, node: yaml.Node) -> dict[str, Any]:
    if isinstance(node, yaml.ScalarNode):
        text = str(loader.construct_scalar(node))
        value: Any = text.split(".", 1) if tag == "GetAtt" else text
    elif isinstance(node, yaml.SequenceNode):
        value = loader.construct_sequence(node, deep=True)
    else:
        value = loader.construct_mapping(node, deep=True)
    return {tag if tag in ("Ref", "Condition") else f"Fn::{tag}": value}


Loader.add_multi_constructor("!", function)
TEMPLATE: dict[str, Any] = yaml.load((INFRA / "stack.yaml").read_text(), Loader)


def properties(name: str) -> dict[str, Any]:
    return TEMPLATE["Resources"][name]["Properties"]


def of_type(kind: str) -> list[dict[str, Any]]:
    return [each for each in TEMPLATE["Resources"].values() if each["Type"] == kind]


def statements() -> dict[str, dict[str, Any]]:
    found = properties("Role")["Policies"][0]["PolicyDocument"]["Statement"]
    plain = [each["Fn::If"][1] if "Fn::If" in each else each for each in found]
    return {each["Sid"]: each for each in plain}


def instance_types(size: str | None = None) -> set[str]:
    """Return the instance types of a size.

    `Overrides` is a chain of !If over the sizes. The last branch is the size without a name.
    """
    node, found = properties("Group")["MixedInstancesPolicy"]["LaunchTemplate"]["Overrides"], {}
    while isinstance(node, dict):
        condition, yes, node = node["Fn::If"]
        found[condition.lower()] = {each["InstanceType"] for each in yes}
    found["a100"] = {each["InstanceType"] for each in node}
    assert set(found) == set(TEMPLATE["Parameters"]["Size"]["AllowedValues"])
    return found[size] if size else set().union(*found.values())


def test_the_bucket_is_private_encrypted_versioned_and_kept() -> None:
    bucket, policy = TEMPLATE["Resources"]["Store"], TEMPLATE["Resources"]["StorePolicy"]
    assert (
        bucket["DeletionPolicy"]
        == bucket["UpdateReplacePolicy"]
        == policy["DeletionPolicy"]
        == "Retain"
    )
    assert set(properties("Store")["PublicAccessBlockConfiguration"].values()) == {True}
    assert len(properties("Store")["PublicAccessBlockConfiguration"]) == 4
    assert properties("Store")["VersioningConfiguration"] == {"Status": "Enabled"}
    (rule,) = properties("Store")["BucketEncryption"]["ServerSideEncryptionConfiguration"]
    assert rule["ServerSideEncryptionByDefault"]["SSEAlgorithm"] == "AES256"
    (deny,) = properties("StorePolicy")["PolicyDocument"]["Statement"]
    assert (deny["Effect"], deny["Action"], len(deny["Resource"])) == ("Deny", "s3:*", 2)
    assert deny["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}


def test_no_object_that_a_manifest_names_expires() -> None:
    rules = properties("Store")["LifecycleConfiguration"]["Rules"]
    kept = {"Id", "Status", "AbortIncompleteMultipartUpload", "NoncurrentVersionExpiration"}
    assert {key for rule in rules for key in rule} == kept
    assert {rule["Status"] for rule in rules} == {"Enabled"}


def test_nothing_comes_in_and_s3_costs_no_gateway() -> None:
    assert properties("Closed")["SecurityGroupIngress"] == []
    assert [rule["FromPort"] for rule in properties("Closed")["SecurityGroupEgress"]] == [443]
    (endpoint,) = of_type("AWS::EC2::VPCEndpoint")
    assert endpoint["Properties"]["VpcEndpointType"] == "Gateway"
    assert endpoint["Properties"]["ServiceName"]["Fn::Sub"].endswith(".s3")
    assert not of_type("AWS::EC2::NatGateway")
    assert not of_type("AWS::EC2::SecurityGroupIngress")
    assert (
        len(of_type("AWS::EC2::Subnet"))
        == len(of_type("AWS::EC2::SubnetRouteTableAssociation"))
        == 6
    )


def test_an_instance_tells_its_keys_to_itself_alone_and_leaves_nothing_behind() -> None:
    data = properties("Template")["LaunchTemplateData"]
    assert data["MetadataOptions"] == {
        "HttpEndpoint": "enabled",
        "HttpTokens": "required",
        "HttpPutResponseHopLimit": 1,
        "InstanceMetadataTags": "enabled",
    }
    (disk,) = data["BlockDeviceMappings"]
    assert disk["Ebs"]["Encrypted"] is disk["Ebs"]["DeleteOnTermination"] is True
    assert data["InstanceInitiatedShutdownBehavior"] == "terminate"
    assert data["NetworkInterfaces"][0]["DeleteOnTermination"] is True
    assert not {"KeyName", "InstanceMarketOptions"} & set(data)
    for name in ("instance", "volume"):
        (tags,) = [
            each["Tags"] for each in data["TagSpecifications"] if each["ResourceType"] == name
        ]
        assert {"Key": "wds-train", "Value": {"Ref": "Run"}} in tags


def test_the_group_is_of_none_or_one_spot_instance_and_starts_none() -> None:
    group = properties("Group")
    assert (group["MinSize"], group["MaxSize"], group["CapacityRebalance"]) == ("0", "1", False)
    assert "DesiredCapacity" not in group
    assert group["MixedInstancesPolicy"]["InstancesDistribution"] == {
        "OnDemandBaseCapacity": 0,
        "OnDemandPercentageAboveBaseCapacity": 0,
        "SpotAllocationStrategy": "price-capacity-optimized",
    }
    (hook,) = group["LifecycleHookSpecificationList"]
    assert hook["LifecycleTransition"] == "autoscaling:EC2_INSTANCE_TERMINATING"
    assert (hook["DefaultResult"], hook["HeartbeatTimeout"]) == ("CONTINUE", 120)
    assert {"Key": "wds-train", "Value": {"Ref": "Run"}, "PropagateAtLaunch": True} in group["Tags"]


@pytest.mark.parametrize("size", QUOTA_FAMILIES)
def test_every_type_is_offered_as_spot_with_an_nvidia_gpu_and_a_local_disk(
    size: str, aws_env: pytest.MonkeyPatch
) -> None:
    with mock_aws():
        client = boto3.client("ec2", "us-east-1", aws_access_key_id="x", aws_secret_access_key="x")
        wanted = instance_types(size)
        told = client.describe_instance_types(InstanceTypes=[*wanted])["InstanceTypes"]
    assert {each["InstanceType"] for each in told} == wanted
    gpus = {each["GpuInfo"]["Gpus"][0]["Count"] for each in told}
    assert len(gpus) == 1  # one size, one number of ranks
    for each in told:
        assert each["VCpuInfo"]["DefaultVCpus"] <= QUOTA_FAMILIES[size]
        assert "spot" in each["SupportedUsageClasses"]
        assert each["InstanceStorageSupported"]
        assert each["ProcessorInfo"]["SupportedArchitectures"] == ["x86_64"]
        assert each["GpuInfo"]["Gpus"][0]["Manufacturer"] == "NVIDIA"


def test_the_role_writes_below_its_run_alone_and_only_under_a_condition() -> None:
    found = statements()
    assert {each["Effect"] for each in found.values()} == {"Allow"}
    writes = {
        sid: each for sid, each in found.items() if "s3:PutObject" in json.dumps(each["Action"])
    }
    assert {sid: each["Condition"] for sid, each in writes.items()} == {
        "WriteOnce": {"Null": {"s3:if-none-match": "false"}},
        "Swap": {"Null": {"s3:if-match": "false"}},
        "Parts": {"Bool": {"s3:ObjectCreationOperation": "false"}},
    }
    for each in [*writes.values(), found["Remove"]]:
        resources = each["Resource"] if isinstance(each["Resource"], list) else [each["Resource"]]
        ends = {one["Fn::Sub"].partition("${Bucket}/")[2] for one in resources}
        run = "${Prefix}runs/${Run}/"
        assert ends <= {f"{run}ckpt/*", f"{run}metrics/*", f"{run}manifest.json"}
    assert "manifest" not in json.dumps([found["Parts"], found["Remove"]])
    assert (
        found["List"]["Condition"]["StringLikeIfExists"]["s3:prefix"][1]["Fn::Sub"]
        == "${Prefix}runs/${Run}/*"
    )


def test_the_role_may_do_nothing_to_others() -> None:
    for sid, each in statements().items():
        assert "*" not in json.dumps(each["Action"]), sid
        assert each["Resource"] != "*", sid
    ends = statements()["EndItself"]["Resource"]["Fn::Sub"]
    assert ends.endswith(":autoScalingGroupName/${AWS::StackName}")
    managed = properties("Role")["ManagedPolicyArns"]["Fn::If"]
    assert managed[0] == "HasShell"
    assert managed[2] == {"Ref": "AWS::NoValue"}
    assert TEMPLATE["Parameters"]["SessionManager"]["Default"] == "no"


def test_no_secret_is_in_the_template_or_the_user_data() -> None:
    text = (INFRA / "stack.yaml").read_text()
    assert not re.search(r"WANDB_API_KEY|AKIA[0-9A-Z]{16}|aws_secret", text)
    (secret,) = [each for sid, each in statements().items() if sid == "Wandb"]
    assert secret["Resource"] == {"Ref": "WandbSecret"}


@pytest.mark.parametrize("name", TEMPLATE["Parameters"])
def test_parameters_say_what_they_are_and_what_they_take(name: str) -> None:
    parameter = TEMPLATE["Parameters"][name]
    assert parameter["Description"].endswith(".")
    assert {"AllowedValues", "AllowedPattern", "MinValue"} & set(parameter)
    if name not in ("Run", "Recipe", "Bucket", "CodeKey", "CodeSha256", "Image"):
        assert "Default" in parameter


@pytest.mark.parametrize(
    "text", ["$(reboot)", "`x`", "a'b", 'a"b', "a;b", "a\nb", "a&b", "a|b", "a>b", "~", "*"]
)
def test_no_parameter_of_the_user_data_can_hold_what_a_shell_reads(text: str) -> None:
    script = properties("Template")["LaunchTemplateData"]["UserData"]["Fn::Base64"]["Fn::Sub"]
    used = {
        name
        for name in re.findall(r"\$\{([A-Za-z]\w*)\}", script)
        if name in TEMPLATE["Parameters"]
    }
    assert {"Run", "Arguments", "CodeSha256"} <= used
    for name in used:
        assert not re.fullmatch(TEMPLATE["Parameters"][name]["AllowedPattern"], text), name


def test_the_user_data_is_a_clean_script_that_runs_no_other_code_than_the_stack_names(
    tmp_path: Path,
) -> None:
    script = properties("Template")["LaunchTemplateData"]["UserData"]["Fn::Base64"]["Fn::Sub"]
    filled = re.sub(r"\$\{[\w:]+\}", "filled", script)
    assert "${" not in filled  # what CloudFormation would fill in, or refuse
    (tmp_path / "user-data.sh").write_text(filled)
    done = subprocess.run(
        [shellcheck(), str(tmp_path / "user-data.sh")], capture_output=True, text=True, check=False
    )
    assert done.stdout == ""
    assert (
        script.index("sha256sum --check")
        < script.index("tar --extract")
        < script.index("exec bash")
    )


@pytest.mark.parametrize("name", sorted(path.name for path in INFRA.glob("*.sh")))
def test_shellcheck_finds_nothing(name: str) -> None:
    done = subprocess.run(
        [shellcheck(), str(INFRA / name)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_cfn_lint_finds_nothing() -> None:
    command = [Path(sys.executable).with_name("cfn-lint"), INFRA / "stack.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd here")
def test_systemd_finds_nothing(tmp_path: Path) -> None:
    units = []
    for unit in INFRA.glob("*.service"):
        units.append(tmp_path / unit.name)
        units[-1].write_text(unit.read_text().replace("/opt/wds-train", str(INFRA.parent)))
    assert len(units) == 2
    done = subprocess.run(
        ["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_service_leaves_the_training_its_time_and_ends_a_crash_loop() -> None:
    lines = (INFRA / "wds-train.service").read_text().splitlines()
    for line in (
        "KillMode=mixed",
        "TimeoutStopSec=110",
        "Restart=on-failure",
        "OnFailure=wds-train-give-up.service",
    ):
        assert line in lines
    assert "StartLimitBurst=5" in lines
    # Every start of the service would begin such a limit again.
    assert not any(line.startswith("RuntimeMaxSec") for line in lines)


def test_skypilot_goes_on_after_an_interruption_and_uses_no_image_of_its_own() -> None:
    """`make check-infra` asks SkyPilot itself, which accepts a strategy that it does not know."""
    task = yaml.safe_load((INFRA / "sky.yaml").read_text())
    recovery = task["resources"]["job_recovery"]
    assert recovery["strategy"] in ("EAGER_NEXT_REGION", "FAILOVER")
    assert (recovery["recover_on_exit_codes"], task["resources"]["use_spot"]) == (
        [Interrupted.exit_code],
        True,
    )
    assert task["resources"]["image_id"].startswith("ami-")
    done = subprocess.run(
        [shellcheck(), "--shell=bash", "-"],
        input=task["run"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")


def shellcheck() -> str:
    return str(Path(sys.executable).with_name("shellcheck"))
