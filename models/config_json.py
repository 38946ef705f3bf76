"""Configurations as JSON values, and back."""

import dataclasses
import types
import typing
from typing import Any


def to_json(config: Any) -> dict[str, Any]:
    """The fields of a dataclass as JSON values, dataclasses in them and tuples too."""
    return {
        field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config) if field.init
    }


def from_json(kind: type, values: dict[str, Any]) -> Any:
    """The dataclass of which `to_json` made the values; a field that they lack has its default.

    Raises:
        ValueError: the dataclass does not have a field of the values.
    """
    hints = typing.get_type_hints(kind)
    unknown = [name for name in values if name not in hints]
    if unknown:
        raise ValueError(
            f"{kind.__name__} has no {', '.join(unknown)}, which another version of retro-jax wrote"
        )
    return kind(**{name: _read(hints[name], value) for name, value in values.items()})


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_json(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _read(hint: Any, value: Any) -> Any:
    """The value of a field, by its type: a plain one, a dataclass, a tuple of them, or None."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    for option in options:
        if isinstance(value, dict) and dataclasses.is_dataclass(option):
            return from_json(option, value)
        if isinstance(value, list) and typing.get_origin(option) is tuple:
            return tuple(_read(typing.get_args(option)[0], item) for item in value)
    return value
