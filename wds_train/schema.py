"""JSON as the dataclasses that it was written from.

Each value must have the type that its field has, or an error names it. Recipes, manifests of runs
and checkpoints are read with it.
"""

import dataclasses
import re
import reprlib
import typing
from functools import cache
from types import UnionType
from typing import Any, Literal

# Of nesting. What looks into JSON that is nested deeper would meet Python's limit of recursion.
LEVELS = 6
# Larger whole numbers do not fit into 64 bits.
LARGEST = 1 << 63
# The types of JSON, for messages.
NOUNS = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    tuple: "a list",
    list: "a list",
    dict: "an object",
}
# JSON can hold halves of a surrogate pair, no file, terminal or request can.
_SURROGATES = re.compile("[\ud800-\udfff]")

# Kept, since looking up the types of a class evaluates its annotations each time.
_hints = cache(typing.get_type_hints)


def typed(hint: Any, value: Any, name: str = "") -> Any:
    """Return `value`, as JSON gave it, as an instance of `hint`, and so all within it.

    Args:
        hint: A dataclass, `tuple[X, ...]`, `tuple[X, Y]`, `dict[str, X]`, a `Literal`, a plain
            type, `Any`; or one of them `| None`.
        value: The value.
        name: Its field, for messages.

    Returns:
        An instance of `hint`: lists are tuples, and objects dataclasses, where it says so.

    Raises:
        ValueError: The value, or one within it, is of another type. The message names its field.
    """
    kind = typing.get_origin(hint) or hint
    inner = typing.get_args(hint)

    # X | None
    if kind is UnionType:
        if value is None:
            return None
        return typed(inner[0], value, name)

    # What holds other values.
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _make_dataclass(hint, value, name)
    if kind is tuple and isinstance(value, list):
        if inner[-1] is Ellipsis:
            inner = inner[:1] * len(value)
        if len(inner) == len(value):
            return _make_tuple(inner, value, name)
    if kind is dict and isinstance(value, dict):
        return _make_dict(inner, value, name)

    # Plain values.
    if kind is Any or (kind is Literal and value in inner) or _is_plain(kind, value):
        return value

    wanted = NOUNS.get(kind, "an object")
    if kind is Literal:
        wanted = f"one of {', '.join(map(str, inner))}"
    raise ValueError(f"{name or 'it'} is {reprlib.repr(value)}, not {wanted}")


def refuse_depth(value: Any, levels: int = LEVELS) -> None:
    """Raise `ValueError` if lists and objects are nested in `value` deeper than `levels`."""
    if isinstance(value, dict):
        within = list(value.values())
    elif isinstance(value, list):
        within = value
    else:
        return
    for each in within:
        if levels == 0:
            raise ValueError(f"it is nested deeper than {LEVELS} levels")
        refuse_depth(each, levels - 1)


def _make_dataclass(kind: Any, fields: dict[str, Any], name: str) -> Any:
    path = name
    if name:
        path = f"{name}."
    hints = _hints(kind)
    for field in fields:
        if field not in hints:
            raise ValueError(
                f"{path}{field!r:.60} is nothing that this wds-train knows; "
                "use the one that wrote it"
            )
    values = {}
    for field, value in fields.items():
        values[field] = typed(hints[field], value, f"{path}{field}")
    for each in dataclasses.fields(kind):
        if each.name not in values and not _has_default(each):
            raise ValueError(f"{path}{each.name} is missing")
    return kind(**values)


def _has_default(field: "dataclasses.Field[Any]") -> bool:
    missing = dataclasses.MISSING
    return field.default is not missing or field.default_factory is not missing


def _make_tuple(hints: tuple[Any, ...], values: list[Any], name: str) -> tuple[Any, ...]:
    made = []
    for number, (hint, value) in enumerate(zip(hints, values, strict=True)):
        made.append(typed(hint, value, f"{name}[{number}]"))
    return tuple(made)


def _make_dict(hints: tuple[Any, ...], values: dict[str, Any], name: str) -> dict[str, Any]:
    made = {}
    for key, value in values.items():
        # Keys of JSON are texts, but may hold what a text must not.
        typed(str, key, f"a name in {name}")
        made[key] = typed(hints[1], value, f"{name}.{key}")
    return made


def _is_plain(kind: Any, value: Any) -> bool:
    """Return True if `value` is of the plain type `kind`.

    Types are compared, since True is an `int` to `isinstance`.
    """
    if kind is float and type(value) is float:
        return True
    # JSON writes 1.0 as 1, too.
    if kind is int or kind is float:
        return type(value) is int and -LARGEST < value < LARGEST
    if kind is str:
        return type(value) is str and not _SURROGATES.search(value)
    return type(value) is kind
