"""Weights of another training: to start from (`model.init`), or learn from (`distill.teacher`)."""

import hashlib
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants, get_session, try_to_load_from_cache
from safetensors import safe_open
from torch import nn

from wds_train.config.recipe import ModelRecipe, Recipe
from wds_train.config.settings import with_settings
from wds_train.errors import StoreError, UsageError, did_you_mean
from wds_train.images.normalise import memory_layout
from wds_train.models.model import create_model
from wds_train.models.weights import SUFFIX, Weights, is_exported

TIMM = "timm:"
HUB = "https://huggingface.co"
FILE = "model.safetensors"
HUB_SECONDS = 3.0  # for the hub's first answer
IMAGES = (
    "size",
    "start_size",
    "size_ramp",
    "eval_size",
    "eval_crop",
    "mean",
    "std",
)  # of `data`, what `as_init` takes
CPU = torch.device("cpu")
META = torch.device("meta")
Loaded = tuple[nn.Module, tuple[tuple[float, ...], tuple[float, ...]]]


def initialise(model: nn.Module, recipe: Recipe) -> str:
    """Give `model`, of `recipe.model`, the weights that `model.init` names; what to tell the user
    of it. A head for another number of classes stays as it is; `UsageError` when anything else does
    not fit. On the device "meta", no more than that is found out.
    """
    setting = recipe.model.init
    device = next(model.parameters()).device
    source, _ = _load("model.init", setting, recipe.model, META if device == META else CPU)
    own = model.state_dict()
    theirs = source.state_dict()
    # The head is left out as a whole if any of it has another shape; all else must fit.
    head = [name for name in own.keys() | theirs.keys() if name.startswith(_heads(model))]
    left = head if any(_shape(own, name) != _shape(theirs, name) for name in head) else []
    wrong = [
        f"{name} is {_shape(theirs, name)} there, {_shape(own, name)} here"
        for name in sorted((own.keys() | theirs.keys()) - set(left))
        if _shape(own, name) != _shape(theirs, name)
    ]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UsageError(
            f"model.init = {setting!r} does not fit the model {recipe.model.name}: "
            f"{'; '.join(wrong[:3])}{more}. Set model.name and its layer options as those weights "
            "have them"
        )
    taken = {name: value for name, value in theirs.items() if name not in left}
    model.load_state_dict(own | taken, assign=device == META)
    if left:
        return (
            f"the weights are {setting}'s, but for the head, which has other classes and starts at "
            "random"
        )
    return f"the weights are {setting}'s, with the head"


class Teacher:
    """The model that `distill.teacher` names.

    Raises:
        UsageError: It has not `classes` classes.
    """

    def __init__(self, recipe: Recipe, classes: int, device: torch.device) -> None:
        name = recipe.distill.teacher
        model, (mean, std) = _load("distill.teacher", name, None, META if device == META else CPU)
        if model.num_classes != classes:
            raise UsageError(
                f"distill.teacher = {name!r} knows {model.num_classes} classes, the dataset has "
                f"{classes}; choose a teacher that was trained on these classes"
            )
        self.fingerprint = "" if device == META else _fingerprint(model)
        model = model.eval().requires_grad_(False)
        self._model = model.to(device).to(memory_format=memory_layout(device))
        # Images come normalised for the student, and the teacher may have learned with another mean
        # and deviation.
        own_mean = torch.tensor(recipe.data.mean)
        own_std = torch.tensor(recipe.data.std)
        self._scale = (own_std / torch.tensor(std)).view(3, 1, 1).to(device)
        self._shift = ((own_mean - torch.tensor(mean)) / torch.tensor(std)).view(3, 1, 1).to(device)

    @torch.no_grad()
    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Return the teacher's logits, float32 [n, classes], for images that are normalised as the
        recipe says.
        """
        return self._model(images * self._scale + self._shift).float()


def as_init(recipe: Recipe, settings: list[str]) -> Recipe:
    """Return `recipe`, which `settings` have changed, as it is trained: where `data.as_init` asks
    for it, with images of the sizes, crop, mean and deviation that the weights of `model.init` had,
    but for what is set. `data.as_init` is off then, so that a run that goes on does not ask again.
    """
    own = _images(recipe) if recipe.data.as_init else None
    if own is None:  # where they cannot be known, `initialise` refuses
        return recipe
    changed = with_settings(replace(recipe, data=replace(recipe.data, **own)), settings)
    return replace(changed, data=replace(changed.data, as_init=False))


def _images(recipe: Recipe) -> dict[str, Any] | None:
    """Return what the weights of `model.init` say of their images, by the fields of `data`."""
    source = recipe.model.init
    file = Path(recipe.model.init)
    if source and not source.startswith(TIMM):
        if not file.is_file():
            return None
        if is_exported(file):
            theirs = Weights.read(file).recipe.data
            return {name: getattr(theirs, name) for name in IMAGES}

    # timm's weights, or those of a file that timm has the description of.
    name = recipe.model.name
    if source.startswith(TIMM):
        name = timm_name(source, recipe.model)
    config = _config(name)
    if config is None:
        return None
    side = config.input_size[-1]
    return {
        "size": side,
        "start_size": 0,
        "eval_size": side,
        "eval_crop": config.crop_pct,
        "mean": tuple(config.mean),
        "std": tuple(config.std),
    }


def _load(setting: str, source: str, own: ModelRecipe | None, device: torch.device) -> Loaded:
    """Return the model that `source` names, with its weights, on the CPU; the mean and deviation
    that its images had. A file that does not say so is of the model `own`. On the device "meta" the
    weights are fetched, and then let go.
    """
    if source.startswith(TIMM):
        return _from_timm(setting, source, timm_name(source, own), device)
    path = Path(source)
    if own is not None and not is_exported(path):
        return _from_file(setting, path, own, device)
    weights = Weights.read(path)
    recipe = weights.recipe
    model = create_model(recipe.model, len(weights.classes), recipe.seed, device)
    model.load_state_dict(weights.tensors, assign=device == META)
    return model, (recipe.data.mean, recipe.data.std)


def timm_name(source: str, own: ModelRecipe | None) -> str:
    """Return the name of timm's weights that `source`, `timm:NAME`, asks for."""
    return source.removeprefix(TIMM) or (own.name if own else "")


def _config(name: str) -> Any:
    """timm's configuration of pretrained weights; None where it has none of that name."""
    try:
        return timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    except RuntimeError:  # the part of the name behind the dot is none that it knows
        return None


def _from_timm(setting: str, source: str, name: str, device: torch.device) -> Loaded:
    """Return timm's model of that name with its pretrained weights.

    They come from the hub, or from the file that came from there before.
    """
    config = _config(name)
    if config is None or not timm.is_model_pretrained(name):
        raise UsageError(
            f"{setting} = {source!r}: timm has no pretrained weights of that name"
            + did_you_mean(name, timm.list_pretrained())
        )
    place = (
        "" if config.hf_hub_filename else config.hf_hub_id
    )  # of FILE, but where timm takes another one
    try:
        found = try_to_load_from_cache(place, FILE) if place else None
        overlay = {"file": found, "custom_load": False} if isinstance(found, str) else {}
        # Without a network, the hub's own client would try for a minute, and tell it in 22 lines.
        if not overlay:
            get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
        model = _pretrained(ModelRecipe(name=name), config.num_classes, device, overlay)
    # Whatever the hub's client and its HTTP library raise: it depends on their versions.
    except Exception as error:
        cause = (str(error).strip().splitlines() or ["no reason given"])[0]
        remedy = f"name a file of `wds-train export`: --set {setting}=FILE"
        if setting == "model.init" and place:
            remedy = (
                f"download {HUB}/{place}/resolve/main/{FILE} where there is a network, and name "
                "that file here: --init FILE"
            )
        raise StoreError(
            f"{setting} = {TIMM + name!r}: the weights could not be fetched "
            f"({type(error).__name__}: {cause}); {remedy}"
        ) from error
    return model, (tuple(config.mean), tuple(config.std))


def _from_file(setting: str, path: Path, own: ModelRecipe, device: torch.device) -> Loaded:
    """Return the model `own` with the weights of a file such as timm's hub has.

    It holds tensors, and no word on the model.
    """
    if path.suffix != SUFFIX:  # timm would unpickle it
        raise UsageError(
            f"{setting} = {str(path)!r} cannot be read by timm: let its name end in {SUFFIX}"
        )
    config: Any = create_model(own, 1, 0, META).pretrained_cfg
    head = config["classifier"]
    # The file's own number of classes.
    with safe_open(path, "pt") as file:
        name = f"{head if isinstance(head, str) else head[0]}.weight"
        classes = config["num_classes"]
        if name in file.keys():  # noqa: SIM118
            classes = file.get_slice(name).get_shape()[0]
    overlay = {"file": str(path), "num_classes": classes, "label_offset": 0, "custom_load": False}
    try:
        model = _pretrained(own, classes, device, overlay)
    except RuntimeError as error:
        causes = str(error).strip().splitlines()
        raise UsageError(
            f"{setting} = {str(path)!r} does not fit the model {own.name}: "
            f"{causes[min(1, len(causes) - 1)].strip():.150}. Set model.name to the timm model "
            "that these weights are of, and its layer options as they have them"
        ) from error
    return model, (tuple(config["mean"]), tuple(config["std"]))


def _pretrained(
    recipe: ModelRecipe, classes: int, device: torch.device, overlay: dict[str, Any]
) -> nn.Module:
    """timm's pretrained model, its configuration changed by `overlay`."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*copying from a non-meta parameter", category=UserWarning
        )
        return create_model(
            recipe, classes, 0, device, pretrained=True, pretrained_cfg_overlay=overlay
        )


def _heads(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the names of the last layer's tensors."""
    config: Any = model.pretrained_cfg
    named = config["classifier"]
    return tuple(f"{name}." for name in ([named] if isinstance(named, str) else named))


def _shape(tensors: dict[str, torch.Tensor], name: str) -> list[int] | str:
    return list(tensors[name].shape) if name in tensors else "absent"


def _fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()
