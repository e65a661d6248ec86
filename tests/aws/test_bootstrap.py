"""An instance from its bundle to a resumed training, with the real uv.

test_instance.py and test_life.py test the parts. This runs only with WDS_BOOTSTRAP (`make
bootstrap-test`), since it installs PyTorch twice.
"""

import io
import os
import shutil
import subprocess
import tarfile
import time
from pathlib import Path

import pytest
from fake_imds import FakeImds
from test_instance import Instance
from trainers import SETTINGS

from wds_train.aws.bundle import bundle
from wds_train.checkpoint.find import find_run
from wds_train.storage.embedded import Endpoint
from wds_train.storage.open import open_store

pytestmark = pytest.mark.skipif(
    "WDS_BOOTSTRAP" not in os.environ, reason="`make bootstrap-test` asks for it"
)
MORE = " ".join(f"--set {setting}" for setting in [*SETTINGS, "schedule.epochs=60"])


def booted(folder: Path, imds: FakeImds, bucket: str) -> tuple[Instance, "subprocess.Popen[str]"]:
    """An instance after user data and bootstrap, with its service as systemd would start it."""
    instance, settings = Instance(folder, imds), folder / "etc/wds-train.env"
    shutil.rmtree(instance.code)
    with tarfile.open(fileobj=io.BytesIO(bundle()[0])) as code:
        code.extractall(instance.code, filter="data")
    arguments = f"--dataset {bucket}/datasets/small --device cpu --workers 0 {MORE}"
    settings.write_text(
        f'WDS_RUN=first\nWDS_RECIPE=digits\nWDS_BUCKET={bucket}\nWDS_ARGUMENTS="{arguments}"\nAWS_REGION=us-east-1\n'
    )
    began = time.monotonic()
    here = {
        name: value
        for name, value in os.environ.items()
        if name != "PATH" and not name.startswith(("AWS_", "WDS_"))
    }
    # With this machine's certificates and uv's cache.
    code, out = instance.bootstrap(WDS_ROOM_GB="1", **here)
    assert code == 0, out
    print(f"bootstrap {time.monotonic() - began:.1f} s: {out.strip().splitlines()[-1]}")
    assert instance.calls[-1] == "systemctl enable --now wds-train.service"
    environment = instance.environment(HOME=str(folder), WANDB_MODE="disabled", OMP_NUM_THREADS="1")
    environment["AWS_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL"]
    # Of AWS, the role alone: no key is in the environment.
    command = [
        "bash",
        "-c",
        'set -a; . "$0"; exec "$1"',
        str(settings),
        str(instance.code / "infra/run.sh"),
    ]
    return instance, subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_from_the_bundle_to_a_resumed_training(
    s3_server: Endpoint, s3_url: str, small: str, tmp_path: Path, aws_env: pytest.MonkeyPatch
) -> None:
    store = open_store(f"{s3_url}/datasets/small")
    for path in Path(small).rglob("*"):
        if path.is_file():
            store.write(str(path.relative_to(small)), path.read_bytes())
    with FakeImds(keys=(s3_server.access_key, s3_server.secret_key)) as imds:
        first, service = booted(tmp_path / "1", imds, s3_url)
        with service:
            out = ""
            for line in service.stdout or ():
                out += line
                if line.startswith("epoch   1/") and imds.notice is None:
                    imds.give_notice()
        print(out)
        assert (service.returncode, [call for call in first.calls if "terminate" in call]) == (
            0,
            [],
        ), out
        assert "stopped by the spot notice" in out and "its successor goes on" in out
        stopped = find_run(f"{s3_url}/runs/first")[0].step
        imds.notice = None
        second, service = booted(tmp_path / "2", imds, s3_url)
        out = service.communicate(timeout=120)[0]
        print(out)
        assert f"resuming at step {stopped}" in out
        assert find_run(f"{s3_url}/runs/first")[0].status == "done"
        assert "terminate-instance-in-auto-scaling-group --should-decrement" in second.calls[-1]
