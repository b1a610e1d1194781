"""What a long study has found so far, in a file, so that it goes on where it was stopped."""

import json
from collections.abc import Callable
from pathlib import Path

from lecture26.kit.files import write_json
from lecture26.kit.processes import process_state
from lecture26.recipes.recipe import state_file


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


def ledger_file(name: str) -> Path:
    """Where what an unfinished comparison has found is kept."""
    return state_file(name).with_suffix(".json")


def forget_ledger(name: str) -> None:
    """Delete what a comparison has found on its way, once its results are stored."""
    ledger_file(name).unlink(missing_ok=True)
