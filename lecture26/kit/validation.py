"""Argument checks whose messages name the argument, its value and what was expected."""

from collections.abc import Sequence


def check_choice(name: str, value: object, choices: Sequence) -> None:
    """Raise ValueError unless `value`, that of the argument `name`, is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_int(name: str, value: object) -> None:
    """Raise TypeError unless `value`, that of the argument `name`, is an int (a bool is not)."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int; got {value!r} of type {type(value).__name__}")


def check_positive_int(name: str, value: object) -> None:
    """Raise TypeError unless `value` is an int (a bool is not), ValueError unless it is at least 1.

    It is the value of the argument `name`.
    """
    check_int(name, value)
    if value < 1:
        raise ValueError(f"{name} must be at least 1; got {value!r}")
