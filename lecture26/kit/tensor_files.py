"""Tensors as files: safetensors that are replaced as a whole, and checked when they are read.

Nothing is ever unpickled. A file that another one describes, as a card does, is checked by its SHA-256, which
stands there; a file that stands alone says in its metadata what format it has, and carries a checksum.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lecture26.kit.files import replace_when_complete, write_json
from lecture26.kit.paths import expanded
from lecture26.kit.state_dicts import plain_names


def tensor_bytes(tensor: Tensor) -> bytes:
    """The numbers of a tensor in memory order, as a contiguous copy on the CPU has them."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def write_tensors(file: str | Path, tensors: Mapping[str, Tensor], metadata: dict | None = None) -> str:
    """Write tensors into a safetensors file, in the place of an older one.

    Args:
        file: the path; its folder is made if need be.
        tensors: name to tensor, of any device; those of a compiled model get its plain names.
        metadata: None, or what the file says of itself, texts by name: "format", which `read_tensors` asks
            for, and any others. A checksum of the tensors, and of the text "about" if there is one, is added.

    Returns:
        The SHA-256 of the file.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in plain_names(tensors).items()}
    if metadata is not None:
        metadata = metadata | {"checksum": _checksum(tensors, metadata.get("about", ""))}
    content = save(tensors, metadata)
    with replace_when_complete(file) as temporary:
        temporary.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def read_tensors(
    file: str | Path, *, sha256: str | None = None, format: str | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what `write_tensors` has written.

    Args:
        file: the path.
        sha256: of a file that is described elsewhere, as `write_tensors` returned it; None for another one.
        format: what the metadata of a file that stands alone must give as "format"; None for another one.

    Returns:
        The tensors by name, on the CPU, and the metadata.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or another one.
    """
    file = expanded(file)
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    content = file.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if sha256 not in (None, found):
        raise ValueError(f"{file} is not what was saved: its SHA-256 must be {sha256}; got {found}")
    try:
        tensors, metadata = load(content), _metadata(content)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{file} is damaged, or no safetensors file ({error})") from error
    if format is not None:
        if metadata.get("format") != format:
            raise ValueError(f"{file} is a safetensors file, but its format is not {format!r}")
        if metadata.get("checksum") != _checksum(tensors, metadata.get("about", "")):
            raise ValueError(f"{file} is damaged: its checksum is wrong")
    return tensors, metadata


def write_parts(file: str | Path, settings: dict, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write a model of several parts: each into a NAME.safetensors, and what describes them beside these.

    Args:
        file: the description's path, a .json.
        settings: how to build the model, plain values (JSON).
        parts: the state dict of each part, by its name.
    """
    hashes = {"settings": _settings_hash(settings)}
    for name, tensors in parts.items():
        hashes[name] = write_tensors(Path(file).with_name(f"{name}.safetensors"), tensors)
    write_json(file, {"settings": settings, "sha256": hashes})


def read_parts(file: str | Path, names: Iterable[str]) -> tuple[dict, dict[str, dict[str, Tensor]]]:
    """Read what `write_parts` has written.

    Args:
        file: the description's path.
        names: of the parts.

    Returns:
        The settings, and the state dict of each part by its name.

    Raises:
        ValueError: if a file is missing, or is not what was saved.
    """
    file = expanded(file)
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
        settings, hashes = description["settings"], description["sha256"]
        if hashes["settings"] != _settings_hash(settings):
            raise ValueError(f"{file} is not what was saved: it has other settings")
        parts = {
            name: read_tensors(file.with_name(f"{name}.safetensors"), sha256=hashes[name])[0]
            for name in names
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"folder must hold a saved {file.stem}; {file.parent} does not: {type(error).__name__}: {error}"
        ) from error
    return settings, parts


def _checksum(tensors: Mapping[str, Tensor], about: str) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)} ".encode())
        digest.update(tensor_bytes(tensors[name]))
    digest.update(about.encode())
    return digest.hexdigest()


def _metadata(content: bytes) -> dict[str, str]:
    """What a safetensors file says of itself: 8 bytes hold the length of its header, which is JSON."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]).get("__metadata__") or {}


def _settings_hash(settings: dict) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
