"""Argument checks whose messages name the argument, its value and what was expected."""

from collections.abc import Sequence

from torch import Tensor


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


def check_shape(name: str, value: object, shape: Sequence[int], of: str = "") -> None:
    """Raise ValueError unless `value`, that of the argument `name`, is a tensor of that shape.

    `of` says what else has that shape: the argument, say, that `value` must be like.
    """
    found = tuple(value.shape) if isinstance(value, Tensor) else value
    if not isinstance(value, Tensor) or found != tuple(shape):
        expected = f"of {of}, {tuple(shape)}" if of else f"{tuple(shape)}"
        raise ValueError(f"{name} must have the shape {expected}; got {found!r}")
