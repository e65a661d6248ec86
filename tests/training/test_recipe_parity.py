"""Recipes on the device, compared with timm, PyTorch, closed forms and plain sums."""

import copy
import re
from pathlib import Path

import pytest
import timm
import torch
from test_engine import CPU, assert_same_state, batch, recipe, trainer
from timm.layers import DropPath
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch.nn import functional as F

from wds_train.config.recipe import DistillRecipe, LossRecipe, ModelRecipe
from wds_train.dataset.manifest import ClassInfo
from wds_train.errors import NotFinite, NotFound, RunError, UsageError
from wds_train.models.losses import Criterion, distilled
from wds_train.models.model import create_model, create_optimizer
from wds_train.models.weights import Weights
from wds_train.training import engine
from wds_train.training.engine import Trainer

EVERYTHING = (
    "model.name=resnet18",
    "model.drop_path=0.2",
    "model.blur_pool=true",
    "model.deep_stem=true",
    "model.squeeze_excite=true",
    "data.erasing=0.5",
    "loss.kind=bce",
    "loss.bce_threshold=0.05",
    "optimizer.name=lamb",
    "optimizer.lr=0.01",
    "optimizer.clip_norm=0.5",
    "optimizer.layer_decay=0.8",
    "ema.kind=swa",
    "ema.every=2",
    "ema.swa_start=0.2",
    "distill.weight=0.3",
    "distill.temperature=2",
)


def exported(folder: Path, *settings: str, classes: int = 10, seed: int = 7) -> Path:
    """A file such as `wds-train export` writes, of random weights."""
    of = recipe(*settings, f"seed={seed}")
    tensors = create_model(of.model, classes, seed, CPU).state_dict()
    path = folder / f"weights{seed}.safetensors"
    Weights(
        tensors,
        "ema",
        "run",
        1,
        0,
        {},
        of,
        tuple(ClassInfo(f"c{i}", f"c{i}") for i in range(classes)),
    ).save(path)
    return path


def logits_and_targets() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(0)
    soft = torch.rand(6, 10, generator=made).softmax(dim=1)
    return 3 * torch.randn(6, 10, generator=made), torch.randint(0, 10, (6,), generator=made), soft


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_timms(smoothing: float) -> None:
    logits, labels, soft = logits_and_targets()
    ours = Criterion(LossRecipe(smoothing=smoothing))
    torch.testing.assert_close(
        ours(logits, labels), LabelSmoothingCrossEntropy(smoothing)(logits, labels)
    )
    torch.testing.assert_close(ours(logits, soft), SoftTargetCrossEntropy()(logits, soft))


@pytest.mark.parametrize(("smoothing", "threshold"), [(0.0, 0.0), (0.1, 0.0), (0.1, 0.2)])
def test_bce_is_timms_and_the_mean_of_each_class(smoothing: float, threshold: float) -> None:
    logits, labels, soft = logits_and_targets()
    ours = Criterion(LossRecipe(kind="bce", smoothing=smoothing, bce_threshold=threshold))
    theirs = BinaryCrossEntropy(smoothing, target_threshold=threshold or None)
    hard = F.one_hot(labels, 10) * (1 - smoothing) + smoothing / 10
    for targets, dense in ((labels, hard), (soft, soft)):
        wanted = (dense > threshold).float() if threshold else dense
        p = logits.sigmoid()
        expected = -(wanted * p.log() + (1 - wanted) * (1 - p).log()).mean()
        torch.testing.assert_close(ours(logits, targets), expected)
        torch.testing.assert_close(ours(logits, targets), theirs(logits, targets))


def test_distillation_is_the_closed_form() -> None:
    student, _, _ = logits_and_targets()
    teacher = student.flip(0)
    t = 2.0
    p = (teacher / t).softmax(dim=1)
    q = (student / t).softmax(dim=1)
    expected = 0.7 * 1.5 + 0.3 * t**2 * (p * (p / q).log()).sum(dim=1).mean()
    got = distilled(DistillRecipe(weight=0.3, temperature=t), torch.tensor(1.5), student, teacher)
    torch.testing.assert_close(got, expected)


def test_the_teacher_sees_the_mixed_images_in_its_own_normalisation(tmp_path: Path) -> None:
    path = exported(tmp_path, "data.mean=0.5,0.4,0.3", "data.std=0.2,0.3,0.4")
    running = trainer(f"distill.teacher={path}", "distill.weight=1", "ema.decay=0.9")
    student = copy.deepcopy(running.model).train()
    images, _ = running._mix(0, running.normalise(batch(0).images), batch(0).labels)
    pixels = images * 0.35 + 0.3  # the digits preset's deviation and mean
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
    teacher = create_model(recipe().model, 10, 7, CPU).eval()
    with torch.no_grad():
        p = teacher((pixels - mean) / std).log_softmax(1)
        q = student(images).log_softmax(1)
    assert running.step(batch(0)).item() == pytest.approx(
        (p.exp() * (p - q)).sum(1).mean().item(), rel=1e-4
    )
    assert running._teacher is not None
    after = running._teacher._model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in teacher.state_dict().items())
    assert not running._teacher._model.training


def test_another_teacher_is_refused(tmp_path: Path) -> None:
    few = exported(tmp_path, classes=7)
    with pytest.raises(UsageError, match="knows 7 classes, the dataset has 10"):
        trainer(f"distill.teacher={few}")
    path = exported(tmp_path)
    running = trainer(f"distill.teacher={path}")
    running.step(batch(0))
    exported(tmp_path, seed=8).rename(path)
    with pytest.raises(
        RunError, match=r"distill.teacher = .* holds other weights than those that this run began"
    ):
        trainer(f"distill.teacher={path}").restore(running.snapshot())


@pytest.mark.parametrize("name", ["resnet50d", "vit_tiny_patch16_224"])
def test_biases_and_norms_are_not_decayed(name: str) -> None:
    model = create_model(ModelRecipe(name=name), 10, 0, torch.device("meta"))
    optimizer = create_optimizer(recipe("optimizer.weight_decay=0.3"), model)
    decay = {
        id(weight): group["weight_decay"]
        for group in optimizer.param_groups
        for weight in group["params"]
    }
    excepted = {"pos_embed", "cls_token"}
    expected = {
        n: 0.0 if w.ndim == 1 or n in excepted else 0.3 for n, w in model.named_parameters()
    }
    assert {n: decay[id(w)] for n, w in model.named_parameters()} == expected
    assert set(expected.values()) == {0.0, 0.3}


def test_an_optimizer_that_cannot_be_resumed_is_refused() -> None:
    with pytest.raises(UsageError, match=r"timm has no optimizer 'lamp'; did you mean .*lamb"):
        trainer("optimizer.name=lamp")
    with pytest.raises(
        UsageError, match="timm's optimizer 'kron' cannot be used: its state does not fit"
    ):
        trainer("optimizer.name=kron")


def test_gradients_are_clipped_as_torch_does() -> None:
    free = trainer("optimizer.lr=0.1")
    clipped = trainer("optimizer.lr=0.1", "optimizer.clip_norm=0.05")
    free.step(batch(0))
    clipped.step(batch(0))
    norm = torch.nn.utils.clip_grad_norm_(free.model.parameters(), 0.05)
    assert norm > 0.1
    assert norm == free.grad_norm == clipped.grad_norm
    for one, other in zip(free.model.parameters(), clipped.model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_a_scaler_is_undone_before_clipping() -> None:
    """The scaler starts at 65536: clipping scaled gradients would leave next to nothing of them."""
    plain = trainer("optimizer.clip_norm=0.05")
    scaled = trainer("optimizer.clip_norm=0.05")
    scaled = Trainer(scaled.recipe, 10, 10, CPU, precision="fp16")
    plain.step(batch(0))
    scaled.step(batch(0))
    assert scaled.scaler.get_scale() == 65536
    assert scaled.grad_norm.item() == pytest.approx(plain.grad_norm.item(), rel=0.05)
    total = torch.nn.utils.get_total_norm(
        [w.grad for w in scaled.model.parameters() if w.grad is not None]
    )
    assert total.item() == pytest.approx(0.05, rel=1e-3)


def test_a_gradient_that_is_not_finite_stops_the_run() -> None:
    running = trainer("optimizer.lr=0.01")
    running.model.get_parameter("fc.bias").register_hook(lambda gradient: gradient * float("inf"))
    running.step(batch(0))
    with pytest.raises(
        NotFinite,
        match=r"norm of the gradients is (inf|nan) by step 1, .*optimizer.lr \(now 0.01\) or set "
        r".*clip_norm",
    ):
        running.epoch_loss()


def test_a_scaler_skips_such_a_step() -> None:
    running = Trainer(recipe("optimizer.clip_norm=1"), 10, 10, CPU, precision="fp16")
    before = copy.deepcopy(dict(running.model.named_parameters()))
    running.model.get_parameter("fc.bias").register_hook(lambda gradient: gradient * float("inf"))
    running.step(batch(0))
    running.epoch_loss()
    assert all(
        torch.equal(before[name], weight) for name, weight in running.model.named_parameters()
    )
    assert running.scaler.get_scale() == 32768


@pytest.mark.parametrize("every", [1, 2])
def test_swa_is_the_plain_mean_of_the_weights(every: int) -> None:
    running = trainer("ema.kind=swa", f"ema.every={every}", "ema.swa_start=0.5")  # of 20 steps
    seen = []
    for step in range(20):
        running.step(batch(step))
        if step >= 10 and (step + 1) % every == 0:
            seen.append(running.model.get_parameter("fc.weight").detach().double().clone())
    mean = torch.stack(seen).mean(dim=0)
    assert len(seen) == 10 // every
    torch.testing.assert_close(
        running.ema.module.get_parameter("fc.weight").double(), mean, rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({"blur_pool": True}, "resnetblur50"),
        ({"deep_stem": True}, "resnet50d"),
        ({"squeeze_excite": True}, "seresnet50"),
        ({"blur_pool": True, "deep_stem": True}, "resnetblur50d"),
    ],
)
def test_layer_options_are_timms_models(options: dict[str, bool], theirs: str) -> None:
    with torch.device("meta"):
        ours = create_model(ModelRecipe(name="resnet50", **options), 10, 0, torch.device("meta"))
        other = timm.create_model(theirs, num_classes=10)
        plain = timm.create_model("resnet50", num_classes=10)
    assert str(ours) == str(other) != str(plain)
    assert [(n, v.shape) for n, v in ours.state_dict().items()] == [
        (n, v.shape) for n, v in other.state_dict().items()
    ]


def test_options_that_a_model_does_not_have_are_refused() -> None:
    with pytest.raises(
        UsageError, match=r"model.blur_pool and model.squeeze_excite cannot be had with test_vit"
    ):
        trainer("model.name=test_vit", "model.blur_pool=true", "model.squeeze_excite=true")
    with pytest.raises(UsageError, match=r"vgg11 cannot be built with model.drop_path = 0.1"):
        create_model(ModelRecipe(name="vgg11", drop_path=0.1), 10, 0, torch.device("meta"))


def test_drop_path_grows_towards_the_last_block() -> None:
    rates = [
        m.drop_prob
        for m in trainer("model.drop_path=0.3").model.modules()
        if isinstance(m, DropPath)
    ]
    assert rates == pytest.approx([0.1, 0.2, 0.3])


def test_a_run_starts_from_a_file_and_resumes_without_it(tmp_path: Path) -> None:
    path = exported(tmp_path)
    running = trainer(f"model.init={path}")
    source = create_model(recipe().model, 10, 7, CPU).state_dict()
    for model in (running.model, running.ema.module):
        assert all(torch.equal(model.state_dict()[name], value) for name, value in source.items())
    assert running.notes == [f"the weights are {path}'s, with the head"]
    path.unlink()
    with pytest.raises(NotFound, match=re.escape(f"there is no file {path}")):
        Trainer(running.recipe, 10, 10, CPU)
    resumed = Trainer(running.recipe, 10, 10, CPU, resumes=True)
    resumed.restore(running.snapshot())
    assert_same_state(running, resumed)


def test_a_head_of_other_classes_stays_random(tmp_path: Path) -> None:
    path = exported(tmp_path, classes=7)
    running = trainer(f"model.init={path}")
    random = trainer()
    source = create_model(recipe().model, 7, 7, CPU).state_dict()
    own = running.model.state_dict()
    assert all(
        torch.equal(own[name], value)
        for name, value in source.items()
        if not name.startswith("fc.")
    )
    assert torch.equal(own["fc.weight"], random.model.state_dict()["fc.weight"])
    assert "but for the head" in running.notes[0]


def test_weights_of_another_shape_are_refused_by_name(tmp_path: Path) -> None:
    path = exported(tmp_path, "model.squeeze_excite=true")
    with pytest.raises(
        UsageError,
        match=r"does not fit the model test_resnet: .*layer.*se\.fc1.* is \[.*\] there, "
        r"absent here",
    ):
        trainer(f"model.init={path}")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precisions_train_and_resume_exactly(precision: engine.Precision) -> None:
    def make() -> Trainer:
        return Trainer(recipe(), 10, 10, CPU, precision=precision)

    plain = trainer()
    unbroken = make()
    first = make()
    second = make()
    for step in range(2):
        wide = plain.step(batch(step))
        low = unbroken.step(batch(step))
        assert low.item() == pytest.approx(wide.item(), rel=0.02)
        assert low.item() != wide.item()
    first.step(batch(0))
    second.restore(first.snapshot())
    second.step(batch(1))
    assert_same_state(unbroken, second)
    assert unbroken.scaler.state_dict() == second.scaler.state_dict()
    assert {weight.dtype for weight in unbroken.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(("before", "after"), [("fp32", "fp16"), ("fp16", "bf16")])
def test_a_resume_may_change_the_precision(
    before: engine.Precision, after: engine.Precision
) -> None:
    first, second = (
        Trainer(recipe(), 10, 10, CPU, precision=precision) for precision in (before, after)
    )
    first.step(batch(0))
    second.restore(first.snapshot())
    second.step(batch(1))
    assert second.epoch_loss() > 0


def test_a_compiled_model_is_the_same_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a backend that needs no C++ compiler; a checkpoint is good for both models."""
    monkeypatch.setattr(engine, "COMPILER", "aot_eager")
    calls: list[object] = []
    compiler = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda *given, **named: (calls.append(named), compiler(*given, **named))[1],
    )
    plain = trainer()
    compiled = Trainer(recipe(), 10, 10, CPU, compile=True)
    assert calls == [{"backend": "aot_eager"}]
    for step in range(2):
        assert compiled.step(batch(step)).item() == pytest.approx(
            plain.step(batch(step)).item(), rel=1e-4
        )
    again = trainer()
    again.restore(compiled.snapshot())
    assert_same_state(again, compiled)
    compiled.restore(plain.snapshot())
    assert_same_state(plain, compiled)


def test_a_resume_is_exact_with_everything_on(tmp_path: Path) -> None:
    path = exported(tmp_path)
    start = exported(tmp_path, *EVERYTHING[:1], *EVERYTHING[2:5], classes=3, seed=9)
    settings = recipe(*EVERYTHING, f"distill.teacher={path}", f"model.init={start}")

    def make(resumes: bool = False) -> Trainer:
        return Trainer(settings, 10, 10, CPU, accumulate=2, precision="bf16", resumes=resumes)

    unbroken = make()
    first = make()
    for step in range(8):
        unbroken.step(batch(step))
    for step in range(5):
        first.step(batch(step))
    snapshot = first.snapshot()
    assert snapshot is not None
    start.unlink()
    torch.manual_seed(99)
    second = make(resumes=True)
    second.restore(type(snapshot).decode(snapshot.encode(), snapshot.progress))
    for step in range(5, 8):
        second.step(batch(step))
    assert_same_state(unbroken, second)
    assert unbroken.epoch_loss() == second.epoch_loss() > 0


def test_each_option_changes_the_training(tmp_path: Path) -> None:
    """Otherwise the test above would hold for options that nobody obeys."""
    base = ("optimizer.lr=0.01", "model.name=test_resnet")
    teacher = f"distill.teacher={exported(tmp_path)}"
    options = (
        "data.erasing=0.5",
        "loss.kind=bce",
        "optimizer.clip_norm=0.01",
        "model.drop_path=0.5",
        teacher,
    )
    options = (*options, "optimizer.layer_decay=0.5")

    def weight(*settings: str) -> list[float]:
        running = trainer(*base, *settings)
        for step in range(
            3
        ):  # at the first the learning rate is 0, at the second all branches are still 0
            running.step(batch(step))
        return running.model.get_parameter("fc.weight").flatten().tolist()

    outcomes = [weight(), *(weight(option) for option in options)]
    assert len({tuple(outcome) for outcome in outcomes}) == len(options) + 1
