"""The command `evaluate`: a checkpoint, measured anew."""

import json

import typer

from lecture26.kit.processes import process_state
from lecture26.recipes import Trained


def evaluate(model: str) -> None:
    """Measure the checkpoint `model` anew, and print its metrics as JSON."""
    checkpoint = Trained(model)
    network, recipe = checkpoint.network.to(process_state().device), checkpoint.recipe
    metrics = recipe.evaluate(network, recipe.load_images("test"))
    typer.echo(json.dumps(metrics, indent=2))
