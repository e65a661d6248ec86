"""JSON as the dataclasses that it was written from: each value of the type that its field has, or an error that names it."""

import dataclasses
import re
import reprlib
import typing
from functools import cache
from types import UnionType
from typing import Any, Literal

LEVELS = 6  # of nesting; what looks into JSON that is nested deeper would meet Python's limit of recursion
LARGEST = 1 << 63
NOUNS = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    tuple: "a list",
    list: "a list",
    dict: "an object",
}
_SURROGATES = re.compile(
    "[\ud800-\udfff]"
)  # JSON can hold them alone, no file, terminal or request can
_hints = cache(typing.get_type_hints)


def typed(hint: Any, value: Any, name: str = "") -> Any:
    """`value`, as JSON gave it, as what `hint` says: a dataclass, tuple, dict, Literal or plain type, or one of them or None, and so all
    within.
    `ValueError` with the field, which is `name` or within it, whose value is of another type.
    """
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is UnionType:  # X | None
        return None if value is None else typed(inner[0], value, name)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _dataclass(hint, value, name)
    if kind is tuple and isinstance(value, list):
        each = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        if len(each) == len(value):
            return tuple(
                typed(h, v, f"{name}[{i}]")
                for i, (h, v) in enumerate(zip(each, value, strict=True))
            )
    if kind is dict and isinstance(value, dict):
        return {
            typed(str, key, f"a name in {name}"): typed(inner[1], v, f"{name}.{key}")
            for key, v in value.items()
        }
    if kind is Any or (kind is Literal and value in inner) or _is(kind, value):
        return value
    wanted = (
        f"one of {', '.join(map(str, inner))}" if kind is Literal else NOUNS.get(kind, "an object")
    )
    raise ValueError(f"{name or 'it'} is {reprlib.repr(value)}, not {wanted}")


def _is(kind: Any, value: Any) -> bool:
    if kind in (int, float):
        return type(value) in (int, kind) and (type(value) is float or -LARGEST < value < LARGEST)
    return type(value) is kind and not (kind is str and _SURROGATES.search(value))


def _dataclass(kind: Any, tree: dict[str, Any], name: str) -> Any:
    within = f"{name}." if name else ""
    hints = _hints(kind)
    for unknown in tree.keys() - hints.keys():
        raise ValueError(
            f"{within}{unknown!r:.60} is nothing that this wds-train knows; use the one that wrote it"
        )
    values = {field: typed(hints[field], value, within + field) for field, value in tree.items()}
    for field in dataclasses.fields(kind):
        if (
            field.name not in values
            and field.default is field.default_factory is dataclasses.MISSING
        ):
            raise ValueError(f"{within}{field.name} is missing")
    return kind(**values)


def refuse_depth(value: Any, levels: int = LEVELS) -> None:
    """Raise `ValueError` when lists and objects are nested in `value` deeper than `levels`."""
    within = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for each in within:
        if levels == 0:
            raise ValueError(f"it is nested deeper than {LEVELS} levels")
        refuse_depth(each, levels - 1)
