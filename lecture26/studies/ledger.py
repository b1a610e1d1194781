"""What a long study has found so far, in a file, so that it goes on where it was stopped."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from lecture26.kit.files import write_json
from lecture26.kit.image_set import ImageSet
from lecture26.kit.processes import process_state
from lecture26.kit.training import History
from lecture26.recipes.recipe import Recipe, state_file, train_network


class Ledger:
    """Numbers that are kept in a file as they come, so that a study that was stopped goes on.

    Args:
        file: where; None keeps them in memory only.
        settings: plain values; a file of other ones is refused.

    Raises:
        ValueError: if the file belongs to a study with other settings, or is damaged.
    """

    def __init__(self, file: Path | None, settings: dict):
        self._file, self._settings, self._done = file, json.loads(json.dumps(settings)), {}
        if file is None or not file.exists():
            return
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            settings, self._done = content["settings"], content["done"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged ({error}): delete it to start anew") from error
        if settings != self._settings:
            raise ValueError(f"{file} belongs to a study with other settings: delete it to start anew")

    def once(self, key: str, compute: Callable[[], dict]) -> dict:
        """What `compute` returned under this key, now or before the study was stopped.

        Of several processes all get what the main one has computed: what to do next is decided by it.
        """
        if key not in self._done:
            from accelerate.utils import broadcast_object_list  # takes a second to import

            measured = json.loads(json.dumps(compute()))
            (self._done[key],) = broadcast_object_list([measured])
            if self._file is not None and process_state().is_main_process:
                write_json(self._file, {"settings": self._settings, "done": self._done})
        return self._done[key]


def train_and_look(
    recipe: Recipe,
    images: ImageSet,
    look_at: Callable[[int, nn.Module], dict],
    steps: Sequence[int],
    ledger: Ledger,
    name: str,
    state: str | None,
    settings: dict,
) -> tuple[list[dict], History]:
    """Train a network and look at it on the way, going on where it was stopped.

    Args:
        recipe, images: as `train_network` takes them.
        look_at: look_at(steps taken so far, averaged network) -> what was found.
        steps: after which to look, rising; the last is that of the end.
        ledger: where what was found is kept.
        name: of the network in the ledger.
        state: the study's name for states; None keeps none.
        settings: what names the state, see `train_network`.

    Returns:
        What was found, in the order of `steps`; and the History of the losses.
    """

    def watch(step: int, network: nn.Module) -> None:
        if step in steps:
            ledger.once(f"{name}, {step}", lambda: look_at(step, network))

    file = None if state is None else state_file(f"{state}_{name}")
    _, history = train_network(recipe, images, watch=watch, state_file=file, settings=settings)
    if file is not None:
        file.unlink()
    return [ledger.once(f"{name}, {step}", dict) for step in steps], history


def ledger_file(name: str) -> Path:
    """Where what an unfinished comparison has found is kept."""
    return state_file(name).with_suffix(".json")


def forget_ledger(name: str) -> None:
    """Delete what a comparison has found on its way, once its results are stored."""
    ledger_file(name).unlink(missing_ok=True)
