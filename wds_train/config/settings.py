"""`--set section.field=value`: one field of a recipe, by its name.

`train`, `recipes` and `plan` apply settings here; reports print a recipe's differences with it.
"""

import dataclasses
import difflib
import math
import operator
import typing
from collections.abc import Iterable
from typing import Any, Literal

from wds_train.config.recipe import Recipe
from wds_train.errors import UsageError

# Fields that change in proportion to one that is set: a warm-up of two epochs makes no sense in a
# training of one.
FOLLOW = {
    "schedule.epochs": ("schedule.warmup_epochs", "schedule.step_epochs"),
    "data.size": ("data.start_size", "data.eval_size"),
}
DECIMALS = 6  # of a scaled value: it is shown to people, and goes into the recipe as shown


def with_settings(recipe: Recipe, settings: list[str]) -> Recipe:
    """Change fields of a recipe.

    All are changed before the result is checked, so that fields bound to each other can change
    together.

    Args:
        recipe: The recipe, which stays as it is.
        settings: Texts "section.field=value". Fields that follow one of these change, too.

    Raises:
        UsageError: A name is unknown, a value is of another type, or the result cannot work.
    """
    values = parse_settings(settings)
    return _apply(recipe, values | _scale_followers(recipe, values))


def describe_followers(recipe: Recipe, settings: list[str]) -> list[str]:
    """Return a line for people on each field that changes in proportion to one that is set.

    Args:
        recipe: The recipe before the settings.
        settings: Texts "section.field=value".
    """
    # The settings are applied as `with_settings` applies them, which also checks them.
    changed = with_settings(recipe, settings)
    scaled = _scale_followers(recipe, parse_settings(settings))
    lines = []
    for leader, names in FOLLOW.items():
        for name in names:
            if name in scaled:
                lines.append(
                    f"{leader} = {setting_of(changed, leader)}: {name} {setting_of(recipe, name)} "
                    f"becomes {setting_of(changed, name)}"
                )
    return lines


def _scale_followers(recipe: Recipe, values: dict[str, Any]) -> dict[str, Any]:
    """Return the new values of the fields that follow one of `values`, unless they are in it."""
    scaled = {}
    for leader, names in FOLLOW.items():
        factor = values.get(leader, 0) / operator.attrgetter(leader)(recipe)
        if factor <= 0:
            continue
        for name in names:
            old = operator.attrgetter(name)(recipe)
            new = _scale(old, factor, _field_type(name))
            # What a person has set stays as it was set.
            if new != old and name not in values:
                scaled[name] = new
    return scaled


def _scale(value: Any, factor: float, kind: Any) -> Any:
    """Return a number, or each number of a tuple, times `factor`."""
    if isinstance(value, tuple):
        return tuple([round(each * factor, DECIMALS) for each in value])
    return kind(round(value * factor, DECIMALS))


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """Parse settings by the types of their fields.

    Args:
        settings: Texts "section.field=value".

    Returns:
        The values by name.

    Raises:
        UsageError: A name is unknown, or a value is of another type.
    """
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise UsageError(f"--set {setting!r} must read NAME=VALUE")
        values[name] = _parse(_field_type(name), name, text)
    return values


def _apply(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    # A section is replaced once, with all its changes: each replacement is checked.
    sections: dict[str, dict[str, Any]] = {}
    top: dict[str, Any] = {}
    for name, value in values.items():
        section, dot, field = name.partition(".")
        if dot:
            sections.setdefault(section, {})[field] = value
        else:
            top[name] = value
    for section, changes in sections.items():
        top[section] = dataclasses.replace(getattr(recipe, section), **changes)
    return dataclasses.replace(recipe, **top)


def setting_names() -> dict[str, Any]:
    """Return every name that --set knows, with its type."""
    names: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(Recipe).items():
        if dataclasses.is_dataclass(hint):
            for inner, inner_hint in typing.get_type_hints(hint).items():
                names[f"{name}.{inner}"] = inner_hint
        elif name != "name":  # a recipe of another name would be another preset
            names[name] = hint
    return names


def setting_of(recipe: Recipe, name: str) -> str:
    """Return the value of a field as --set takes it.

    Args:
        recipe: The recipe.
        name: The field's name, "section.field".
    """
    value = operator.attrgetter(name)(recipe)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value)


def _field_type(name: str) -> Any:
    known = setting_names()
    if name not in known:
        raise UsageError(f"--set knows no {name!r}{_meant(name, known)}")
    return known[name]


def _meant(name: str, known: Iterable[str]) -> str:
    """Return a hint on which name a person meant.

    It is a name with the same last part (`lr`, `sgd.lr`), or with a similar one.
    """
    # The names by their last part, which people remember.
    ends: dict[str, list[str]] = {}
    for each in known:
        ends.setdefault(each.rpartition(".")[2], []).append(each)
    end = name.rpartition(".")[2]
    near = [end]
    if end not in ends:
        near = difflib.get_close_matches(end, ends, 2)
    meant: list[str] = []
    for each in near:
        meant += ends[each]
    if not meant:
        return "; `wds-train recipes digits` lists every name"
    return f"; did you mean {' or '.join(meant)}?"


def _parse(hint: Any, name: str, text: str) -> Any:
    """Parse a value.

    Args:
        hint: The type of the field.
        name: The field's name, for messages.
        text: The value as a person wrote it.
    """
    # Types with values of their own.
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

    # Numbers. NaN and infinity are none.
    try:
        value = hint(text)
    except ValueError:
        value = math.nan
    if not abs(value) < math.inf:
        noun = "a whole number"
        if hint is float:
            noun = "a number"
        raise UsageError(f"--set {name}={text!r} is not {noun}")
    return value


def _parse_tuple(inner: tuple[Any, ...], name: str, text: str) -> tuple[Any, ...]:
    parts = []
    if text:
        parts = text.split(",")
    # tuple[float, ...] takes any number of values.
    if inner[-1] is Ellipsis:
        inner = inner[:1] * len(parts)
    if len(parts) != len(inner):
        raise UsageError(
            f"--set {name}={text!r} must hold {len(inner)} values, separated by commas"
        )
    values = []
    for kind, part in zip(inner, parts, strict=True):
        values.append(_parse(kind, name, part))
    return tuple(values)
