"""Frozen dataclasses from JSON, strictly.

In: what `json.loads` returned. Out: dataclasses, or a `ValueError` that names the field at fault.
"""

import dataclasses
import json
import types
import typing
from typing import Any, TypeVar, Union, cast

T = TypeVar("T")


def parse_json(text: str | bytes) -> Any:
    """`json.loads` that refuses NaN and infinity, which JSON does not have.

    Raises:
        ValueError: the text is no JSON, or is nested too deep.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError(f"expected JSON that is not nested deep, found {error}") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"expected a finite number, found {name}")


def decode(kind: type[T], value: Any, where: str) -> T:
    """Builds `kind` from JSON.

    Args:
        kind: a dataclass of str, int, float, bool, None, tuples, dicts by str, and dataclasses of them.
        value: the parsed JSON.
        where: what `value` is called in errors.

    Raises:
        ValueError: a field is missing, unknown or of another type.
    """
    return cast(T, _decode(kind, value, where))


def _decode(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        present = next(argument for argument in arguments if argument is not type(None))
        return None if value is None else _decode(present, value, where)
    if origin is tuple:
        return _decode_tuple(arguments, value, where)
    if origin is dict:
        items = _expect(dict, value, where).items()
        return {key: _decode(arguments[1], item, f"{where}.{key}") for key, item in items}
    if kind is float and type(value) is int:
        return value  # as it is, so that it is written again as it was
    return _expect(kind, value, where)


def _decode_dataclass(kind: Any, value: Any, where: str) -> Any:
    hints = typing.get_type_hints(kind)
    found = _expect(dict, value, where)
    if unknown := sorted(found.keys() - hints.keys()):
        raise ValueError(f"{where}: unknown fields {', '.join(unknown)}")
    if missing := sorted(hints.keys() - found.keys()):
        raise ValueError(f"{where}: missing fields {', '.join(missing)}")
    return kind(**{name: _decode(hint, found[name], f"{where}.{name}") for name, hint in hints.items()})


def _decode_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    items = _expect(list, value, where)
    kinds = (arguments[0],) * len(items) if arguments[-1] is Ellipsis else arguments
    if len(kinds) != len(items):
        raise ValueError(f"{where}: expected {len(kinds)} items, found {len(items)}")
    return tuple(_decode(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, items, strict=True)))


def _expect(kind: type[Any], value: Any, where: str) -> Any:
    # type() and not isinstance(): JSON's true is an int to Python.
    if type(value) is not kind:
        raise ValueError(f"{where}: expected {kind.__name__}, found {type(value).__name__}")
    return value
