"""Trained models as files: NAME.safetensors with the weights, and NAME.json, the card that describes them.

Weights are stored in half precision and loaded in single precision. Nothing is ever unpickled, and
what is loaded is exactly what the card describes: the card holds the file's SHA-256.
"""

import json
import platform
import re
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from lecture26.kit.files import write_json
from lecture26.kit.paths import checkpoints_dir, find, names_in
from lecture26.kit.tensor_files import read_tensors, write_tensors

# What a card must be given; save_checkpoint adds the rest of CARD_FIELDS.
GIVEN_FIELDS = ("recipe", "settings", "command", "data", "steps", "seconds", "metrics")
CARD_FIELDS = ("name", *GIVEN_FIELDS, "parameters", "machine", "versions", "bytes", "sha256")

# what a card's values must be: in words, and whether one is
KINDS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "text": ("a text", lambda value: isinstance(value, str)),
    "count": ("a whole number from 0 on", lambda value: _is_number(value, int) and value >= 0),
    "number": ("a number from 0 on", lambda value: _is_number(value, int | float) and value >= 0),
    "object": ("a JSON object", lambda value: isinstance(value, dict)),
    "numbers": (
        "a JSON object of numbers",
        lambda value: isinstance(value, dict) and all(_is_number(one, int | float) for one in value.values()),
    ),
    "hash": ("64 hexadecimal digits", lambda value: bool(re.fullmatch("[0-9a-f]{64}", str(value)))),
}
FIELDS_BY_KIND = {
    "text": ("name", "recipe", "command", "data"),
    "count": ("steps", "parameters", "bytes"),
    "number": ("seconds",),
    "object": ("settings", "machine", "versions"),
    "numbers": ("metrics",),
    "hash": ("sha256",),
}

NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


class CheckpointError(ValueError):
    """A checkpoint that is missing, or is not what its card says."""


def checkpoint_files(name: str) -> tuple[Path, Path]:
    """Where a checkpoint lies.

    Args:
        name: lower-case letters, digits, - and _, beginning with a letter or digit.

    Returns:
        The weights (.safetensors) and the card (.json): in the own data folder, or those that came with the
        course, or where they would be made.

    Raises:
        ValueError: if the name has other characters.
    """
    if not NAME.fullmatch(name):
        raise ValueError(
            "a checkpoint's name is made of lower-case letters, digits, - and _, "
            f"beginning with a letter or digit; got {name!r}"
        )
    return find("checkpoints", f"{name}.safetensors", f"{name}.json")


def save_checkpoint(name: str, state: Mapping[str, Tensor], card: dict) -> dict:
    """Write a model's weights and its card, in the place of older ones of that name.

    Args:
        name: the checkpoint's name, see `checkpoint_files`.
        state: a state dict, of a compiled model too; floating-point tensors are stored in half precision.
        card: dict with at least GIVEN_FIELDS, plain values (JSON):
            recipe: the family of models it belongs to, as known to lecture26.recipes.
            settings: every setting of the recipe, the model's arguments included.
            command: the command that trains it.
            data: one line on the data.
            steps, seconds: how long it was trained.
            metrics: dict of what was measured, name to number.

    Returns:
        The full card, with CARD_FIELDS.

    Raises:
        ValueError: if a field is missing, or a weight is not finite in half precision.
    """
    weights_file, card_file = (checkpoints_dir() / file.name for file in checkpoint_files(name))
    missing = [field for field in GIVEN_FIELDS if field not in card]
    if missing:
        raise ValueError(
            f"the card of {name!r} must have {', '.join(GIVEN_FIELDS)}; missing: {', '.join(missing)}"
        )

    stored = {key: _to_half(key, tensor) for key, tensor in state.items()}
    sha256 = write_tensors(weights_file, stored)
    card = {"name": name} | card
    card |= {
        "parameters": sum(tensor.numel() for tensor in stored.values() if tensor.is_floating_point()),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "bytes": weights_file.stat().st_size,
        "sha256": sha256,
    }
    write_json(card_file, card)
    return card


def load_card(name: str) -> dict:
    """The card of a checkpoint.

    Args:
        name: the checkpoint's name.

    Returns:
        The card, with CARD_FIELDS.

    Raises:
        CheckpointError: if there is no such checkpoint, or its card is damaged or another one's.
    """
    weights_file, card_file = checkpoint_files(name)
    for file in (card_file, weights_file):
        if not file.is_file():
            known = ", ".join(list_checkpoints()) or "none"
            raise CheckpointError(
                f"there is no checkpoint {name!r}: {file} is missing (present: {known}). "
                f"{_how_to_mend(name, file)}"
            )
    try:
        card = json.loads(card_file.read_text(encoding="utf-8"))
        check_card(card)
    except ValueError as error:
        raise CheckpointError(f"{card_file} is damaged ({error}). {_how_to_mend(name, card_file)}") from error
    if card["name"] != name:
        raise CheckpointError(
            f"{card_file} is the card of {card['name']!r}, not of {name!r}. {_how_to_mend(name, card_file)}"
        )
    return card


def check_card(card: object) -> None:
    """Raise ValueError, which names all faults, unless `card` has CARD_FIELDS with values of their kinds."""
    if not isinstance(card, dict):
        raise ValueError(f"it must be a JSON object; got {card!r}")
    missing = [field for field in CARD_FIELDS if field not in card]
    faults = [f"no {', '.join(missing)}"] if missing else []
    for kind, fields in FIELDS_BY_KIND.items():
        described, is_of_kind = KINDS[kind]
        faults += [
            f"{field} must be {described}; got {card[field]!r}"
            for field in fields
            if field in card and not is_of_kind(card[field])
        ]
    if faults:
        raise ValueError("; ".join(faults))


def load_state(name: str, card: dict | None = None) -> dict[str, Tensor]:
    """The weights of a checkpoint, after checking that they are those its card describes.

    Args:
        name: the checkpoint's name.
        card: its card, if it has been read already.

    Returns:
        Name to tensor on the CPU, floating-point ones in float32.

    Raises:
        CheckpointError: if there is no such checkpoint, or the file's SHA-256 is not the card's.
    """
    expected = (load_card(name) if card is None else card)["sha256"]
    weights_file, _ = checkpoint_files(name)
    try:
        stored, _ = read_tensors(weights_file, sha256=expected)
    except ValueError as error:
        raise CheckpointError(f"{error}. {_how_to_mend(name, weights_file)}") from error
    return {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in stored.items()}


def list_checkpoints() -> list[str]:
    """The names of the checkpoints present, each with weights and card, in alphabetical order."""
    names = names_in("checkpoints", ".safetensors")
    return sorted(name for name in names if NAME.fullmatch(name) and is_complete(name))


def is_complete(name: str) -> bool:
    """Whether a checkpoint of that name has weights and card; a run that is killed may leave no card."""
    return all(file.is_file() for file in checkpoint_files(name))


def describe_machine() -> dict:
    """What a model was trained on or a result measured on: dict with processor, threads and accelerator."""
    accelerator = None
    if torch.cuda.is_available():
        accelerator = torch.cuda.get_device_name()
    elif torch.backends.mps.is_available():
        accelerator = "Apple GPU"
    return {"processor": _processor(), "threads": torch.get_num_threads(), "accelerator": accelerator}


def describe_versions() -> dict[str, str]:
    """The versions that decide what a training run computes: dict of name to version."""
    packages = ("lecture26", "torch", "timm", "numpy", "accelerate", "safetensors")
    return {"python": platform.python_version()} | {package: version(package) for package in packages}


def _is_number(value: object, kind: type) -> bool:
    """Whether a value is a number of a kind; True and False are none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _to_half(key: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    half = tensor.half()
    if not half.isfinite().all():
        raise ValueError(f"the weight {key} is not finite in half precision (largest: {tensor.abs().max()})")
    return half


def _processor() -> str:
    """The processor's model name."""
    cpuinfo = Path("/proc/cpuinfo")  # Linux: platform.processor() gives no more than 'x86_64' there
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def _how_to_mend(name: str, file: Path) -> str:
    return (
        f"If it is one of the course's, fetch it again with `git checkout -- {file}`; "
        f"or train it with `python -m lecture26 train {name} --replace`."
    )
