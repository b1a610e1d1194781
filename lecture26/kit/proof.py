"""The check of a numbered equation: both of its sides, computed in two ways, must agree."""

import re

import torch


def verify(equation: str, actual, expected, atol: float) -> None:
    """Assert that both sides of a numbered equation agree everywhere, and print one line that says so.

    Args:
        equation: the equation's number in the notebook, such as "1.5".
        actual, expected: the two sides: tensors, arrays or numbers of one shape.
        atol: the largest absolute difference allowed, at least 0.

    Raises:
        AssertionError: a shape differs, a value is not finite, or a difference exceeds `atol`.
        ValueError: `equation` is not a number like "1.5", or `atol` is negative or not a number.
    """
    if not re.fullmatch(r"\d+\.\d+", str(equation)):
        raise ValueError(f'equation must be a number like "1.5"; got {equation!r}')
    if not atol >= 0:
        raise ValueError(f"atol must be at least 0; got {atol!r}")
    actual, expected = (_as_float64(side) for side in (actual, expected))
    if actual.shape != expected.shape:
        raise AssertionError(f"({equation}) fails: shapes {tuple(actual.shape)} and {tuple(expected.shape)}")
    if not (actual.isfinite().all() and expected.isfinite().all()):
        raise AssertionError(f"({equation}) fails: a side has values that are not finite")
    if actual.numel() == 0:
        raise AssertionError(f"({equation}) fails: both sides are empty, so nothing was compared")
    difference = (actual - expected).abs().max().item()
    if difference > atol:
        raise AssertionError(f"({equation}) fails: the sides differ by {difference:.3g}, more than {atol:g}")
    print(f"({equation}) holds: both sides agree to {atol:g}")


def _as_float64(side) -> torch.Tensor:
    # Detached and on the CPU: some devices have no float64.
    return torch.as_tensor(side).detach().cpu().double()
