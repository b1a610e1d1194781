"""What the notebooks for teaching live need: the finished function, but only where none was typed."""

import ast
import inspect
import textwrap
from collections.abc import Callable
from importlib import import_module


def typed_or_finished(function: Callable, module: str, given: int = 0) -> Callable:
    """The function as it was typed in a cell; the finished one if its body is still to be written.

    Whatever was typed stays, right or wrong; a line says which of the two it is.

    Args:
        function: the notebook's own.
        module: of the finished function with the same name, such as "lecture26.ddpm".
        given: how many statements its body holds before anything is typed; docstring and dots do not count.

    Returns:
        Either of the two functions.
    """
    name = function.__name__
    if is_unwritten(function, given):
        print(f"{name}: nothing was typed, so this is the finished function")
        return getattr(import_module(module), name)
    if function.__module__ == module:
        print(f"{name}: the finished function")
    else:
        print(f"{name}: as typed above; the finished one is to be had by")
        print(f"    from {module} import {name}")
    return function


def is_unwritten(function: Callable, given: int = 0) -> bool:
    """Whether a function's body still has its `...`, and no statements besides those that are `given`."""
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):  # from no cell of this notebook: nothing is known of it, and so it stays
        return False
    return has_dots_and(source, given)


def has_dots_and(source: str, given: int) -> bool:
    """Whether the first function in `source` holds a `...` and so many (`given`) statements besides."""
    (function, *_) = ast.parse(textwrap.dedent(source)).body
    statements = [node for part in function.body for node in ast.walk(part) if isinstance(node, ast.stmt)]
    texts = [
        node for node in statements if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    ]
    has_dots = any(text.value.value is ... for text in texts)
    return has_dots and len(statements) - len(texts) == given
