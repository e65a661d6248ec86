"""`--set section.field=value`: one field of a recipe, by its name."""

import dataclasses
import difflib
import math
import operator
import typing
from collections.abc import Iterable
from typing import Any, Literal

from wds_train.config.recipe import Recipe
from wds_train.errors import UsageError

# What changes in proportion to a field that is set: a warm-up of two epochs is no part of a
# training of one.
FOLLOW = {
    "schedule.epochs": ("schedule.warmup_epochs", "schedule.step_epochs"),
    "data.size": ("data.start_size", "data.eval_size"),
}


def with_settings(recipe: Recipe, settings: list[str]) -> Recipe:
    """Return `recipe` with each "section.field=value" applied, and those that follow; `UsageError`
    for an unknown name or a value of another type.

    All are applied before the result is checked, so that fields bound to each other can change
    together.
    """
    return _applied(recipe, {**(flat := parsed(settings)), **_following(recipe, flat)})


def following(recipe: Recipe, settings: list[str]) -> list[str]:
    """Return what `settings` change in proportion besides the fields that they name, a line each
    for people.
    """
    changed = with_settings(recipe, settings)
    return [
        f"{leader} = {setting_of(changed, leader)}: {name} {setting_of(recipe, name)} becomes "
        f"{setting_of(changed, name)}"
        for leader, names in FOLLOW.items()
        for name in names
        if name in _following(recipe, parsed(settings))
    ]


def _following(recipe: Recipe, flat: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that follow one of `flat`, unless they are in it, with their new values."""
    new: dict[str, Any] = {}
    for leader, names in FOLLOW.items():
        share = flat.get(leader, 0) / operator.attrgetter(leader)(recipe)
        for name in names if share > 0 else ():
            old = operator.attrgetter(name)(recipe)
            kind = _field_type(name)
            many = isinstance(old, tuple)
            scaled = (
                tuple(round(each * share, 6) for each in old)
                if many
                else kind(round(old * share, 6))
            )
            if scaled != old and name not in flat:
                new[name] = scaled
    return new


def parsed(settings: list[str]) -> dict[str, Any]:
    """Return the value of each name that `settings` set.

    Raises:
        UsageError: No recipe can take it.
    """
    flat: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise UsageError(f"--set {setting!r} must read NAME=VALUE")
        flat[name] = _parse(_field_type(name), name, text)
    return flat


def _applied(recipe: Recipe, flat: dict[str, Any]) -> Recipe:
    top = {name: value for name, value in flat.items() if "." not in name}
    for section in dict.fromkeys(name.split(".")[0] for name in flat if "." in name):
        changes = {
            name.split(".")[1]: value
            for name, value in flat.items()
            if name.startswith(section + ".")
        }
        top[section] = dataclasses.replace(getattr(recipe, section), **changes)
    return dataclasses.replace(recipe, **top)


def setting_names() -> dict[str, Any]:
    """Every name that --set knows, with its type."""
    names: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(Recipe).items():
        if dataclasses.is_dataclass(hint):
            names |= {
                f"{name}.{inner}": inner_hint
                for inner, inner_hint in typing.get_type_hints(hint).items()
            }
        elif name != "name":
            names[name] = hint
    return names


def setting_of(recipe: Recipe, name: str) -> str:
    """Return the value of `name` as --set takes it."""
    value = operator.attrgetter(name)(recipe)
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _field_type(name: str) -> Any:
    known = setting_names()
    if name not in known:
        raise UsageError(f"--set knows no {name!r}{_meant(name, known)}")
    return known[name]


def _meant(name: str, known: Iterable[str]) -> str:
    """Return a hint which of `known` a person meant by `name`.

    They are those whose last part is its own (`lr`, `sgd.lr`), else near it.
    """
    ends: dict[str, list[str]] = {}
    for each in known:
        ends.setdefault(each.rpartition(".")[2], []).append(each)
    end = name.rpartition(".")[2]
    near = [end] if end in ends else difflib.get_close_matches(end, ends, 2)
    meant = [each for one in near for each in ends[one]]
    return (
        f"; did you mean {' or '.join(meant)}?"
        if meant
        else "; `wds-train recipes digits` lists every name"
    )


def _parse(hint: Any, name: str, text: str) -> Any:
    """Parse `text` as a value of type `hint`."""
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
    if hint is str:
        return text
    try:
        value = hint(text)
    except ValueError:
        value = math.nan
    if not abs(value) < math.inf:
        raise UsageError(
            f"--set {name}={text!r} is not {'a number' if hint is float else 'a whole number'}"
        )
    return value


def _parse_tuple(inner: tuple[Any, ...], name: str, text: str) -> tuple[Any, ...]:
    parts = text.split(",") if text else []
    if inner[-1] is Ellipsis:
        inner = inner[:1] * len(parts)
    if len(parts) != len(inner):
        raise UsageError(
            f"--set {name}={text!r} must hold {len(inner)} values, separated by commas"
        )
    return tuple(_parse(kind, name, part) for kind, part in zip(inner, parts, strict=True))
