"""The command `checkpoints`: which there are, and what their cards say."""

import json

import typer

from lecture26.kit.checkpoints import CheckpointError, list_checkpoints, load_card, load_state


def checkpoints(model: str | None) -> None:
    """List the checkpoints, one a line, or print the card of `model`, whole."""
    if model is not None:
        card = load_card(model)
        load_state(model, card)  # a card is only worth reading beside the file it describes
        typer.echo(json.dumps(card, indent=2))
        return
    for name in list_checkpoints():
        try:
            typer.echo(summary(load_card(name)))
        except CheckpointError as error:
            typer.echo(f"error: {error}", err=True)


def summary(card: dict) -> str:
    """The line that says what a checkpoint is, from its `card`."""
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in card["metrics"].items())
    return (
        f"{card['name']}: {card['parameters'] / 1e6:.2f} M parameters, "
        f"{card['bytes'] / 2**20:.1f} MiB, "
        f"{card['steps']} steps in {card['seconds'] / 60:.0f} min on {card['data']}; {metrics}"
    )
