"""Runs of valid JSON and safetensors that are not ours: refused by the field, with no traceback.

Sound parts of them are used. Single ones, and mutants by the thousand, by seed.
"""

import copy
import functools
import hashlib
import json
import random
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save
from trainers import SETTINGS, Job, Training

from wds_train.checkpoint import lease as leases
from wds_train.checkpoint import run_manifest as states
from wds_train.checkpoint.lease import read_run
from wds_train.checkpoint.run import Run
from wds_train.cli import main
from wds_train.config.presets import preset
from wds_train.config.settings import with_settings
from wds_train.errors import WdsTrainError
from wds_train.storage.open import open_store
from wds_train.training.engine import Trainer

MUTANTS = 1_000
RECIPE = with_settings(preset("digits"), SETTINGS)
ODD = [
    None,
    True,
    -1,
    0,
    1.5,
    1e308,
    float("nan"),
    float("inf"),
    1 << 70,
    10**400,
    "",
    "x",
    "\ud800",
    "../x",
    [],
    {},
    [[]],
]
DEEP = "deep"  # stands for what only text can hold

Tree = dict[str, Any]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def trained(small: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints of the steps 11, 33 and 44, or so; not to be written to."""
    folder = tmp_path_factory.mktemp("trained")
    training = Training(Job(small, str(folder / "run"), str(folder)))
    assert training.end() == 0, training.output
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, as if interrupted after its last commit."""
    shutil.copytree(trained, tmp_path / "run")
    content = manifest_of(tmp_path / "run")
    write_manifest(tmp_path / "run", content | {"status": "interrupted"})
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def owners_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutants may be owned by any process, and are not waited for."""
    monkeypatch.setattr(leases, "is_gone", lambda owner: True)


def manifest_of(run: Path) -> Tree:
    return json.loads((run / states.NAME).read_text())


def write_manifest(run: Path, content: Tree) -> None:
    (run / states.NAME).write_text(
        json.dumps(content).replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000)
    )


def steps_of(run: Path) -> list[int]:
    return [entry["progress"]["step"] for entry in manifest_of(run)["checkpoints"]]


def parts_of(checkpoint: Path) -> tuple[Tensors, dict[str, str]]:
    with safe_open(checkpoint, "pt") as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}, file.metadata()


def put(run: Path, data: bytes) -> None:
    """As the newest checkpoint, with its size and sha256 in the manifest."""
    content = manifest_of(run)
    named = content["checkpoints"][-1]["object"]
    (run / named["key"]).write_bytes(data)
    write_manifest(run, content)
    named |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_manifest(run, content)


def alter(run: Path, change: Callable[[Tensors, Tree], object]) -> None:
    """`change` the newest checkpoint's tensors and `extra` in place."""
    tensors, header = parts_of(run / manifest_of(run)["checkpoints"][-1]["object"]["key"])
    extra = json.loads(header["extra"])
    change(tensors, extra)
    text = json.dumps(extra.get("instead", extra)).replace(
        f'"{DEEP}"', "[" * 100_000 + "]" * 100_000
    )
    put(run, save(tensors, header | {"extra": text}))


def answer(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = main(list(map(str, arguments)))
    captured = capsys.readouterr()
    return code, captured.out + captured.err


@functools.cache
def trainer_of_the_run() -> Trainer:
    return Trainer(RECIPE, 2, 11, torch.device("cpu"), resumes=True)


def resumed_at(run: Path, said: list[str]) -> int:
    """As `wds-train train` begins: the claim, the restore, and the first step of the optimizer."""
    store = open_store(str(run))
    claimed = Run.claim(
        store, replace(read_run(store)[0], status="running"), said.append, wait=False
    )
    snapshot = claimed.restore(said.append)
    if snapshot is None:
        return 0
    trainer = trainer_of_the_run()
    trainer.restore(snapshot)
    for parameter in trainer.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    return snapshot.progress.step


def transposed(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name].transpose(0, 1).contiguous()


CONTENTS: dict[str, tuple[Callable[[Tensors, Tree], object], str]] = {
    "extra null": (lambda t, e: e.update(instead=None), "extra is None, not an object"),
    "extra list": (lambda t, e: e.update(instead=[]), "extra is [], not an object"),
    "extra deep": (lambda t, e: e.update(instead={"scalars": DEEP}), "RecursionError"),
    "no scalars": (lambda t, e: e.pop("scalars"), "extra.scalars is missing"),
    "scalars list": (lambda t, e: e.update(scalars=[]), "extra.scalars is [], not an object"),
    "scaler text": (
        lambda t, e: e.update(scaler={"scale": "x"}),
        "extra.scaler.scale is 'x', not a number",
    ),
    "classes": (lambda t, e: e.update(classes=[["0"]]), "extra.classes[0] is ['0'], not a list"),
    "fewer classes": (
        lambda t, e: e["classes"].pop(),
        "extra.classes names 1 classes, the run's dataset has 2",
    ),
    "group": (lambda t, e: e["scalars"].update({"group/0/lr": "x"}), "group/0/lr is a text"),
    "momentum": (
        lambda t, e: e["scalars"].update({"group/1/momentum": None}),
        "group/1/momentum is absent",
    ),
    "parameter": (
        lambda t, e: t.update({"optimizer/999999/x": torch.ones(1)}),
        "optimizer/999999/x is of no parameter",
    ),
    "no number": (
        lambda t, e: t.update({"optimizer/a/x": torch.ones(1)}),
        "optimizer/a/x is of no parameter",
    ),
    "weights gone": (lambda t, e: t.pop("model/fc.weight"), "model/fc.weight is absent"),
    "average gone": (lambda t, e: t.pop("ema/fc.weight"), "ema/fc.weight is absent"),
    "both gone": (
        lambda t, e: [t.pop(f"{part}/fc.bias") for part in ("model", "ema")],
        "model/fc.bias is absent",
    ),
    "one more": (lambda t, e: t.update({"model/x": torch.ones(1)}), "model/x is float32 [1]"),
    "shape": (lambda t, e: transposed(t, "model/fc.weight"), "model/fc.weight is float32 ["),
    "type": (
        lambda t, e: t.update({"model/fc.bias": t["model/fc.bias"].long()}),
        "model/fc.bias is int64 [2]",
    ),
    "slot": (
        lambda t, e: t.update({"optimizer/0/momentum_buffer": torch.ones(3)}),
        "optimizer/0/momentum_buffer is float32 [3]",
    ),
}


@pytest.mark.parametrize(("change", "message"), CONTENTS.values(), ids=CONTENTS)
def test_a_checkpoint_of_right_hash_and_wrong_content_is_passed_over(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Tensors, Tree], object],
    message: str,
) -> None:
    """By a resume; what asks for it by its step is refused, and nothing changes."""
    steps = steps_of(run)
    alter(run, change)
    before = (run / states.NAME).read_bytes()
    usable = f"the usable checkpoints are those of step {', '.join(map(str, steps[:-1]))}"
    for command in (
        ["rollback", run, "--to"],
        ["export", run, "--to", tmp_path / "x.safetensors", "--step"],
    ):
        code, out = answer(capsys, *command, steps[-1])
        assert (code, message in out, usable in out) == (1, True, True), out
    code, out = answer(capsys, "verify", run)
    assert (code, message in out, f"a resume uses the checkpoint of step {steps[-2]}," in out) == (
        1,
        True,
        True,
    ), out
    assert (run / states.NAME).read_bytes() == before
    said: list[str] = []
    assert resumed_at(run, said) == steps[-2]
    assert message in said[0]
    assert not (tmp_path / "x.safetensors").exists()


def pending_of(manifest: Tree, key: str) -> Tree:
    """An announced commit whose checkpoint is at `key`."""
    checkpoint = dict(manifest["checkpoints"][0])
    checkpoint["object"] = checkpoint["object"] | {"key": key}
    return {"checkpoint": checkpoint, "segment": None}


MANIFESTS: dict[str, tuple[Callable[[Tree], object], str]] = {
    "no checkpoints": (lambda m: m.pop("checkpoints"), "checkpoints is missing"),
    "recipe": (lambda m: m.update(recipe=None), "recipe is None, not an object"),
    "dataset": (lambda m: m.update(dataset=7), "dataset is 7, not an object"),
    "fingerprint": (
        lambda m: m["dataset"].pop("fingerprint"),
        "dataset.fingerprint is None, not a text",
    ),
    "lease": (lambda m: m.update(lease="long"), "lease is 'long', not a number"),
    "endless": (lambda m: m.update(lease=float("inf")), "lease is inf, not 0 to 3600 seconds"),
    "written": (lambda m: m.update(written=[]), "written is [], not a number"),
    "step": (
        lambda m: m["checkpoints"][1]["progress"].update(step="3"),
        "checkpoints[1].progress.step is '3', not a whole",
    ),
    "metrics": (
        lambda m: m["checkpoints"][0].update(metrics={"a": "b"}),
        "checkpoints[0].metrics.a is 'b', not a number",
    ),
    "deep": (lambda m: m["recipe"].update(model=DEEP), "is not JSON: maximum recursion"),
    "nested": (
        lambda m: m["recipe"].update(model=json.loads("[" * 60 + "]" * 60)),
        "nested deeper than 6 levels",
    ),
    "unknown": (lambda m: m.update(colour="red"), "'colour' is nothing that this wds-train knows"),
    "our manifest": (
        lambda m: m["checkpoints"][0]["object"].update(key="manifest.json"),
        "object.key is 'manifest.json', not of the form ckpt/",
    ),
    "another's object": (
        lambda m: m.update(pending=pending_of(m, key="../other/ckpt/1-1-1.safetensors")),
        "pending: object.key is '../other/ckpt/1-1-1.safetensors', not of the form ckpt/",
    ),
    "half an announcement": (
        lambda m: m.update(pending={"checkpoint": m["checkpoints"][0]}),
        "pending.segment is missing",
    ),
}


@pytest.mark.parametrize(("change", "message"), MANIFESTS.values(), ids=MANIFESTS)
def test_a_malformed_manifest_is_refused_with_the_field(
    run: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Tree], object], message: str
) -> None:
    content = manifest_of(run)
    change(content)
    write_manifest(run, content)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for command in (["status"], ["checkpoints"], ["rollback", "--to", "44"], ["verify"]):
        code, out = answer(capsys, command[0], run, *command[1:])
        assert (code, message in out) == (1, True), out
    with pytest.raises(WdsTrainError, match=re.escape(message)):
        resumed_at(run, [])
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_looking_at_a_run_starts_no_thread(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    monkeypatch.setattr(threading.Thread, "start", lambda self: started.append(self.name))
    for command in (["status"], ["checkpoints"], ["verify"]):  # an export calibrates, in threads
        code, out = answer(capsys, command[0], run)
        assert (code, started) == (0, []), out


def mutate(tree: Any, rng: random.Random) -> Any:
    """Return a copy with one to three places removed, repeated, renamed, swapped or made odd."""
    tree = [copy.deepcopy(tree)]
    for _ in range(rng.randint(1, 3)):
        holder, place = _somewhere(tree, rng)
        match rng.randrange(6):
            case 0 if holder is not tree:
                del holder[place]
            case 1 if isinstance(holder, list) and holder is not tree:
                holder.insert(place, copy.deepcopy(holder[place]))
            case 2 if isinstance(holder, dict):
                holder[rng.choice(["x", "\ud800", "step", "0"])] = holder.pop(place)
            case 3:
                other, there = _somewhere(tree, rng)
                holder[place] = copy.deepcopy(other[there])
            case 4 if rng.random() < 0.1:
                holder[place] = DEEP
            case _:
                holder[place] = copy.deepcopy(rng.choice(ODD))
    return tree[0]


def _somewhere(tree: list[Any], rng: random.Random) -> tuple[Any, Any]:
    holder = tree
    place = 0
    while isinstance(inner := holder[place], dict | list) and inner and rng.random() < 0.85:
        holder = inner
        place = rng.choice([*inner] if isinstance(inner, dict) else range(len(inner)))
    return holder, place


def mutate_checkpoint(data: bytes, rng: random.Random) -> bytes:
    """Mutate the header, or the JSON in it; or a tensor's name, type or shape."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    body = data[8 + size :]
    if rng.random() < 0.5:
        part = rng.choice(["extra", "extra", "progress"])
        header["__metadata__"][part] = _text(mutate(json.loads(header["__metadata__"][part]), rng))
    elif rng.random() < 0.5:
        header = mutate(header, rng)
    else:
        name = rng.choice([name for name in header if name != "__metadata__"])
        entry = header.pop(name)
        entry["shape"] = rng.choice([entry["shape"][::-1], [*entry["shape"], 1], entry["shape"]])
        entry["dtype"] = {
            "F32": rng.choice(["F32", "I32", "U32"]),
            "I64": rng.choice(["I64", "F64"]),
        }[entry["dtype"]]
        header[
            rng.choice(
                [
                    name,
                    name,
                    f"{name}x",
                    f"optimizer/{rng.randrange(99)}/x",
                    f"group/{rng.randrange(3)}/lr",
                ]
            )
        ] = entry
    text = _text(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def _text(tree: Any) -> str:
    return json.dumps(tree).replace(f'"{DEEP}"', "[" * 5_000 + "]" * 5_000)


def test_mutated_runs_meet_every_command(
    run: Path, small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The end is an exit code and a message; a checkpoint that is accepted can be trained from."""
    rng = random.Random(0)
    ends = {0: 0, 1: 0, 2: 0}
    resumed = 0
    sound = manifest_of(run)
    steps = steps_of(run)
    file = tmp_path / "x.safetensors"
    newest = (run / sound["checkpoints"][-1]["object"]["key"]).read_bytes()
    commands = [["status"], ["status", "--json"], ["checkpoints"], ["verify"], ["train"], ["train"]]
    commands += [["rollback", "--to", str(steps[-1])], ["rollback", "--to", str(steps[0])]]
    commands += [
        ["export", "--to", str(file)],
        ["export", "--to", str(file), "--step", str(steps[-1])],
    ]
    eval_command = ["eval", "--dataset", small, "--workers", "0", "--step", str(steps[-1])]
    sound["dataset"]["url"] = "/nowhere"  # or hundreds of exports would each be calibrated
    shutil.copytree(run, tmp_path / "sound")
    for number in range(MUTANTS):
        if {path.name for path in run.rglob("*.*")} != {
            path.name for path in (tmp_path / "sound").rglob("*.*")
        }:
            shutil.rmtree(run)
            shutil.copytree(tmp_path / "sound", run)
        content = sound | {"status": rng.choice(["interrupted", "done"])}
        if number % 3:
            (run / sound["checkpoints"][-1]["object"]["key"]).write_bytes(newest)
            write_manifest(run, mutate(content, rng))
        else:
            write_manifest(run, content)
            put(run, mutate_checkpoint(newest, rng))
        command = eval_command if number % 200 == 0 else rng.choice(commands)
        if command == ["train"]:
            try:
                resumed += resumed_at(run, []) > 0
            except WdsTrainError:
                ends[1] += 1
            continue
        ends[answer(capsys, command[0], run, *command[1:])[0]] += 1
    assert min(ends[0], ends[1], resumed) > 20, (ends, resumed)
