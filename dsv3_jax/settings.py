"""How settings refuse what cannot be."""

from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


class ConfigError(ValueError):
    """A setting is unknown or contradicts another; the message names it and says what to change."""


def require_choices(settings: Any, prefix: str = "") -> None:
    """Refuse a value that its Literal type does not list."""
    for name, kind in get_type_hints(type(settings)).items():
        kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        literals = [k for k in kinds if get_origin(k) is Literal]
        if literals:
            choices = [c for k in kinds for c in (get_args(k) if k in literals else [None])]
            value = getattr(settings, name)
            require(value in choices, prefix + name, value, f"choose one of {', '.join(map(repr, choices))}")


def require(condition: bool, setting: str, value: object, remedy: str) -> None:
    """Raises ConfigError with the setting, its value and what to change, unless the condition holds."""
    if not condition:
        raise ConfigError(f"{setting}={value!r}: {remedy}")
