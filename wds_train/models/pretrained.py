"""Weights of another training: to start from (`model.init`), or learn from (`distill.teacher`).

A source is `timm:NAME` (pretrained weights of timm, from the Hugging Face hub or its local cache),
a file of `wds-train export`, or, for `model.init`, a safetensors file of timm's weights.

On PyTorch's "meta" device all that can be found out without weights is found out: a training asks
so first, before its loader's workers fork.
"""

import hashlib
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

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

TIMM = "timm:"  # the prefix of a source that timm knows
# The place of timm's weights, and the file of a repository that has them.
HUB = "https://huggingface.co"
FILE = "model.safetensors"
HUB_SECONDS = 3.0  # for the hub's first answer
# Fields of `data` that `data.as_init` takes from the weights.
IMAGE_FIELDS = ("size", "start_size", "size_ramp", "eval_size", "eval_crop", "mean", "std")
LISTED = 3  # tensors that a message names: with the wrong model, nearly all differ
CPU = torch.device("cpu")
META = torch.device("meta")


class Pretrained(NamedTuple):
    """A model with the weights of another training.

    Attributes:
        model: The model, on the CPU or on the device "meta".
        mean: Per-channel mean of the pixels that it learned from, in [0, 1].
        std: Per-channel standard deviation of these.
    """

    model: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]


def initialise(model: nn.Module, recipe: Recipe) -> str:
    """Give a model the weights that `model.init` names.

    A head for another number of classes stays as it is.

    Args:
        model: The model of `recipe.model`. On the device "meta" it is only checked that the weights
            fit.
        recipe: The recipe of the training.

    Returns:
        A sentence for the user on what the weights are.

    Raises:
        UsageError: Anything but the head does not fit.
        StoreError: The weights could not be fetched.
    """
    # The tensors of both models, by name.
    setting = recipe.model.init
    device = next(model.parameters()).device
    source = _load("model.init", setting, recipe.model, _load_device(device)).model
    own = model.state_dict()
    theirs = source.state_dict()

    # The head is left out as a whole if any of it has another shape. All else must fit.
    different = _find_differences(own, theirs)
    heads = _head_prefixes(model)
    keeps_head = any(name.startswith(heads) for name in different)
    wrong = []
    for name in different:
        if not name.startswith(heads):
            wrong.append(f"{name} is {_shape(theirs, name)} there, {_shape(own, name)} here")
    if wrong:
        listed = "; ".join(wrong[:LISTED])
        if len(wrong) > LISTED:
            listed += f"; and {len(wrong) - LISTED} more"
        raise UsageError(
            f"model.init = {setting!r} does not fit the model {recipe.model.name}: "
            f"{listed}. Set model.name and its layer options as those weights "
            "have them"
        )

    # All of theirs, and perhaps our head.
    tensors = dict(own)
    for name, value in theirs.items():
        if not (keeps_head and name.startswith(heads)):
            tensors[name] = value
    model.load_state_dict(tensors, assign=device == META)
    if keeps_head:
        return (
            f"the weights are {setting}'s, but for the head, which has other classes and starts at "
            "random"
        )
    return f"the weights are {setting}'s, with the head"


class Teacher:
    """The model that `distill.teacher` names.

    Args:
        recipe: The recipe of the training.
        classes: The number of the dataset's classes.
        device: Where the training computes. On "meta" the teacher is only checked.

    Attributes:
        fingerprint: The sha256 of its weights, by which a resumed run knows it; "" on "meta".

    Raises:
        UsageError: It has another number of classes.
        StoreError: Its weights could not be fetched.
    """

    def __init__(self, recipe: Recipe, classes: int, device: torch.device) -> None:
        # A teacher of other classes would teach nonsense without an error.
        name = recipe.distill.teacher
        model, mean, std = _load("distill.teacher", name, None, _load_device(device))
        if model.num_classes != classes:
            raise UsageError(
                f"distill.teacher = {name!r} knows {model.num_classes} classes, the dataset has "
                f"{classes}; choose a teacher that was trained on these classes"
            )
        self.fingerprint = ""
        if device != META:
            self.fingerprint = _fingerprint(model)
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
        """Return the teacher's logits, float32 [n, classes].

        Args:
            images: Images that are normalised as the recipe says, float32 [n, 3, height, width].
        """
        return self._model(images * self._scale + self._shift).float()


def as_init(recipe: Recipe, settings: list[str]) -> Recipe:
    """Take the sizes, crop, mean and deviation of images from `model.init`, if `data.as_init` asks.

    Args:
        recipe: The recipe, which `settings` have changed already.
        settings: The `--set` arguments, which win over the weights.

    Returns:
        The recipe as it is trained. `data.as_init` is off in it, so that a resumed run does not
        look at the weights again. Where these do not say how their images were, it is `recipe`
        itself, and `initialise` refuses the weights later.
    """
    if not recipe.data.as_init:
        return recipe
    found = _image_fields(recipe)
    if found is None:
        return recipe
    # What a person has set is set again, over the weights'.
    changed = with_settings(replace(recipe, data=replace(recipe.data, **found)), settings)
    return replace(changed, data=replace(changed.data, as_init=False))


def _image_fields(recipe: Recipe) -> dict[str, Any] | None:
    """Return the fields of `data` as the weights of `model.init` had them; None if unknown."""
    source = recipe.model.init
    if source and not source.startswith(TIMM):
        file = Path(source)
        if not file.is_file():
            return None
        if is_exported(file):
            theirs = Weights.read(file).recipe.data
            return {name: getattr(theirs, name) for name in IMAGE_FIELDS}

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


def _load_device(device: torch.device) -> torch.device:
    """Return the device to load weights on: the CPU, or "meta" for a check on "meta"."""
    if device == META:
        return META
    return CPU


def _load(setting: str, source: str, own: ModelRecipe | None, device: torch.device) -> Pretrained:
    """Load the model that a source names, with its weights.

    Args:
        setting: The setting that names the source, for messages.
        source: `timm:NAME`, or a file.
        own: The model of a file that does not describe its own. None: such files are refused.
        device: The CPU. On "meta" the weights are fetched, and then dropped.
    """
    if source.startswith(TIMM):
        return _load_from_timm(setting, source, timm_name(source, own), device)
    # A file: one that describes its model, or one of timm's weights alone.
    path = Path(source)
    if own is not None and not is_exported(path):
        return _load_plain_file(setting, path, own, device)
    weights = Weights.read(path)
    recipe = weights.recipe
    model = create_model(recipe.model, len(weights.classes), recipe.seed, device)
    model.load_state_dict(weights.tensors, assign=device == META)
    return Pretrained(model, recipe.data.mean, recipe.data.std)


def timm_name(source: str, own: ModelRecipe | None) -> str:
    """Return the name of the pretrained weights of timm that a source asks for.

    Args:
        source: `timm:NAME`, or `timm:` for those of the recipe's own model.
        own: The recipe's model; None if there is no default.
    """
    name = source.removeprefix(TIMM)
    if not name and own:
        return own.name
    return name


def _config(name: str) -> Any:
    """Return timm's configuration of pretrained weights; None if it has none of that name."""
    if not timm.is_model(name):
        return None
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError:  # the part of the name after the dot is unknown
        return None


def _load_from_timm(setting: str, source: str, name: str, device: torch.device) -> Pretrained:
    """Load a model of timm with its pretrained weights.

    They come from the hub, or from the file that came from there before.

    Raises:
        UsageError: timm has no pretrained weights of that name.
        StoreError: They could not be fetched.
    """
    config = _config(name)
    if config is None or not timm.is_model_pretrained(name):
        raise UsageError(
            f"{setting} = {source!r}: timm has no pretrained weights of that name"
            + did_you_mean(name, timm.list_pretrained())
        )
    # The repository that holds FILE. For a file of another name, timm finds its own way.
    repository = config.hf_hub_id
    if config.hf_hub_filename:
        repository = ""

    try:
        overlay = _find_cached(repository)
        # Without a network, the hub's own client would try for a minute, and tell it in 22 lines.
        if not overlay:
            get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
        model = _create_pretrained(ModelRecipe(name=name), config.num_classes, device, overlay)
    # Whatever the hub's client and its HTTP library raise: it depends on their versions.
    except Exception as error:
        # The first line has the cause; a file from elsewhere always helps.
        cause = (str(error).strip().splitlines() or ["no reason given"])[0]
        remedy = f"name a file of `wds-train export`: --set {setting}=FILE"
        if setting == "model.init" and repository:
            remedy = (
                f"download {HUB}/{repository}/resolve/main/{FILE} where there is a network, and "
                "name that file here: --init FILE"
            )
        raise StoreError(
            f"{setting} = {TIMM + name!r}: the weights could not be fetched "
            f"({type(error).__name__}: {cause}); {remedy}"
        ) from error
    return Pretrained(model, tuple(config.mean), tuple(config.std))


def _find_cached(repository: str) -> dict[str, Any]:
    """Return the change of timm's configuration that reads a file of the local cache.

    It is empty if the repository, or its file, is not there.
    """
    if not repository:
        return {}
    found = try_to_load_from_cache(repository, FILE)
    if not isinstance(found, str):  # not there, or known to be missing on the hub
        return {}
    return {"file": found, "custom_load": False}


def _load_plain_file(
    setting: str, path: Path, own: ModelRecipe, device: torch.device
) -> Pretrained:
    """Load the model `own` with the weights of a file as timm's hub has them.

    Such a file holds tensors, and does not describe their model.

    Raises:
        UsageError: It is no safetensors file, or does not fit the model.
    """
    if path.suffix != SUFFIX:  # timm would unpickle it
        raise UsageError(
            f"{setting} = {str(path)!r} cannot be read by timm: let its name end in {SUFFIX}"
        )
    model = create_model(own, 1, 0, META)
    config: Any = model.pretrained_cfg
    classes = _count_classes(path, model)
    overlay = {"file": str(path), "num_classes": classes, "label_offset": 0, "custom_load": False}
    try:
        model = _create_pretrained(own, classes, device, overlay)
    except RuntimeError as error:
        # torch names the class of the model first, and then a tensor to a line.
        causes = str(error).strip().splitlines()
        raise UsageError(
            f"{setting} = {str(path)!r} does not fit the model {own.name}: "
            f"{causes[min(1, len(causes) - 1)].strip():.150}. Set model.name to the timm model "
            "that these weights are of, and its layer options as they have them"
        ) from error
    return Pretrained(model, tuple(config["mean"]), tuple(config["std"]))


def _count_classes(path: Path, model: nn.Module) -> int:
    """Return the number of classes of the weights in a file.

    Args:
        path: The file.
        model: A model of the same kind, with any number of classes.
    """
    config: Any = model.pretrained_cfg
    head = _head_prefixes(model)[0]
    with safe_open(path, "pt") as file:
        # `file` has keys, and is no mapping.
        if f"{head}weight" in file.keys():  # noqa: SIM118
            return file.get_slice(f"{head}weight").get_shape()[0]
    return config["num_classes"]


def _create_pretrained(
    recipe: ModelRecipe, classes: int, device: torch.device, overlay: dict[str, Any]
) -> nn.Module:
    """Create a pretrained model of timm, whose configuration `overlay` changes."""
    with warnings.catch_warnings():
        # On "meta" nothing is copied, and that is what is wanted.
        warnings.filterwarnings(
            "ignore", message=".*copying from a non-meta parameter", category=UserWarning
        )
        return create_model(
            recipe, classes, 0, device, pretrained=True, pretrained_cfg_overlay=overlay
        )


def _head_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Return the prefixes of the names of the last layer's tensors. Some models have two heads."""
    config: Any = model.pretrained_cfg
    heads = config["classifier"]
    if isinstance(heads, str):
        heads = [heads]
    return tuple([f"{name}." for name in heads])


def _find_differences(own: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> list[str]:
    """Return the sorted names of tensors that only one side has, or in another shape."""
    different = []
    for name in sorted(own.keys() | theirs.keys()):
        if _shape(own, name) != _shape(theirs, name):
            different.append(name)
    return different


def _shape(tensors: dict[str, torch.Tensor], name: str) -> list[int] | str:
    """Return the shape of a tensor, or "absent", for messages."""
    if name not in tensors:
        return "absent"
    return list(tensors[name].shape)


def _fingerprint(model: nn.Module) -> str:
    """Return the sha256 of all weights and their names."""
    # Names, too: two layers of one shape may change places.
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()
