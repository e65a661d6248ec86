"""`--set section.field=value`: one field of a recipe, by its name."""

import dataclasses
import operator
import typing
from typing import Any, Literal

from wds_train.config.recipe import Recipe
from wds_train.errors import UsageError, did_you_mean


def with_settings(recipe: Recipe, settings: list[str]) -> Recipe:
    """`recipe` with each "section.field=value" applied; `UsageError` for an unknown name or a value of another type.

    All are applied before the result is checked, so that fields bound to each other can change together.
    """
    flat = parsed(settings)
    top = {name: value for name, value in flat.items() if "." not in name}
    for section in dict.fromkeys(name.split(".")[0] for name in flat if "." in name):
        changes = {name.split(".")[1]: value for name, value in flat.items() if name.startswith(section + ".")}
        top[section] = dataclasses.replace(getattr(recipe, section), **changes)
    return dataclasses.replace(recipe, **top)


def parsed(settings: list[str]) -> dict[str, Any]:
    """The value of each name that `settings` set; `UsageError` for what no recipe can take."""
    flat: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise UsageError(f"--set {setting!r} must read NAME=VALUE")
        flat[name] = _parse(_field_type(name), name, text)
    return flat


def setting_names() -> dict[str, Any]:
    """Every name that --set knows, with its type."""
    names: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(Recipe).items():
        if dataclasses.is_dataclass(hint):
            names |= {f"{name}.{inner}": inner_hint for inner, inner_hint in typing.get_type_hints(hint).items()}
        elif name != "name":
            names[name] = hint
    return names


def setting_of(recipe: Recipe, name: str) -> str:
    """The value of `name` as --set takes it."""
    value = operator.attrgetter(name)(recipe)
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _field_type(name: str) -> Any:
    known = setting_names()
    if name not in known:
        hint = did_you_mean(name, known, cutoff=0.4) or f"; did you mean {' or '.join(sorted(known))}?"
        raise UsageError(f"--set knows no {name!r}{hint}")
    return known[name]


def _parse(hint: Any, name: str, text: str) -> Any:
    """`text` as a value of type `hint`."""
    if typing.get_origin(hint) is tuple:
        return _parse_tuple(typing.get_args(hint), name, text)
    if typing.get_origin(hint) is Literal:
        if text not in typing.get_args(hint):
            raise UsageError(f"--set {name}={text!r} is none of {', '.join(typing.get_args(hint))}")
        return text
    if hint is bool:
        if text not in ("true", "false"):
            raise UsageError(f"--set {name}={text!r} must be true or false")
        return text == "true"
    try:
        return hint(text)
    except ValueError as error:
        raise UsageError(
            f"--set {name}={text!r} is not {'a number' if hint is float else 'an ' + hint.__name__}"
        ) from error


def _parse_tuple(inner: tuple[Any, ...], name: str, text: str) -> tuple[Any, ...]:
    parts = text.split(",") if text else []
    if inner[-1] is Ellipsis:
        inner = inner[:1] * len(parts)
    if len(parts) != len(inner):
        raise UsageError(f"--set {name}={text!r} must hold {len(inner)} values, separated by commas")
    return tuple(_parse(kind, name, part) for kind, part in zip(inner, parts, strict=True))
