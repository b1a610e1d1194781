"""The command `train`: a model by its recipe, saved as a checkpoint."""

import dataclasses
import json

import typer

from lecture26 import recipes
from lecture26.commands.invocation import data_option, invocation, options
from lecture26.kit.checkpoints import is_complete


def train(recipe: str, changes: dict, state_every: float, replace: bool) -> None:
    """Train a model, save it as a checkpoint, and print its metrics as JSON.

    Args:
        recipe: a recipe's name.
        changes: settings of the recipe, in the place of its own; None changes nothing.
        state_every: seconds between two saved states.
        replace: whether to write over a checkpoint of that name.

    Raises:
        ValueError, OSError: on an unknown recipe, a wrong setting, or a checkpoint that exists.
        KeyboardInterrupt: when stopped, with the state written.
    """
    changes = {key: value for key, value in changes.items() if value is not None}
    if "data" in changes:
        changes["data"] = data_option(changes["data"])
    chosen = dataclasses.replace(recipes.find_recipe(recipe), **changes)
    if is_complete(chosen.name) and not replace:
        raise ValueError(
            f"a checkpoint {chosen.name!r} exists: choose another --name, or write over it with --replace"
        )
    card = recipes.run(chosen, invocation("train", recipe, *options(changes)), state_every)
    if card is not None:
        typer.echo(json.dumps({"name": card["name"], "seconds": card["seconds"], "metrics": card["metrics"]}))
