"""The command `measure`: a measurement that takes too long for a notebook, made and stored."""

import typer

from lecture26.commands.invocation import invocation
from lecture26.kit.results import results_file
from lecture26.studies import measurements


def measure(name: str, replace: bool) -> None:
    """Make a measurement, and store it in data/results.

    Args:
        name: of the measurement.
        replace: whether to write over the results of that name.

    Raises:
        ValueError: if there is no such measurement, or its results exist.
    """
    if results_file(name).exists() and not replace:
        raise ValueError(f"results {name!r} exist: write over them with --replace")
    measurements.measure(name, invocation("measure", name, *["--replace"] * replace))
    typer.echo(f"stored: {results_file(name)}")
