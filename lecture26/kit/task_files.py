"""What a task has learned on a frozen backbone: what belongs to it, and how it is written into a file."""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from lecture26.kit.tensor_files import read_tensors, tensor_bytes, write_tensors

TASK_TENSORS = ("prompts", "head.weight", "head.bias")  # all that prompts and a head learn
TASK_FORMAT = "lecture26 task"


def backbone_fingerprint(vit: nn.Module) -> str:
    """A text that tells backbones apart: a hash of all weights but those of the heads.

    Args:
        vit: a timm VisionTransformer, on any device. A copy in float64 of weights in float32 has the same
            fingerprint, one that was rounded to half precision another. Settings that are no weights do not
            count.

    Returns:
        64 hexadecimal digits (SHA-256).
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(vit.state_dict().items()):
        if not name.startswith(("head.", "head_dist.")):
            digest.update(f"{name} {tuple(tensor.shape)} ".encode())
            digest.update(tensor_bytes(tensor.float()))
    return digest.hexdigest()


def check_task_state(state: Mapping[str, Tensor], vit: nn.Module, fingerprint: str) -> None:
    """Raise unless a task's state is whole and belongs to a backbone.

    Args:
        state: what `VPT.task_state_dict` returns.
        vit: a timm VisionTransformer.
        fingerprint: its `backbone_fingerprint`.

    Raises:
        ValueError: if tensors are missing or too many, or do not fit each other or the backbone.
    """
    if set(state) != set(TASK_TENSORS):
        raise ValueError(f"state must have the tensors {', '.join(TASK_TENSORS)}; got {', '.join(state)}")
    prompts, weight, bias = (state[name] for name in TASK_TENSORS)
    if prompts.ndim != 3 or weight.ndim != 2 or bias.shape != weight.shape[:1]:
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        raise ValueError(
            f"state must have prompts (1 or L, n, d), weights (K, d) and biases (K,); got {shapes}"
        )
    if {prompts.shape[2], weight.shape[1]} != {vit.embed_dim} or prompts.shape[0] not in (1, len(vit.blocks)):
        raise ValueError(
            f"state must belong to a backbone of {len(vit.blocks)} blocks of width {vit.embed_dim}; its "
            f"prompts have shape {tuple(prompts.shape)}, its head {tuple(weight.shape)}"
        )
    backbone = getattr(state, "backbone", None)
    if backbone not in (None, fingerprint):
        raise ValueError(
            "state must belong to this backbone; it was learned on another one of the same depth and width, "
            f"or before the weights were rounded (fingerprint {backbone[:12]}, here {fingerprint[:12]})"
        )


def save_task(file: str | Path, state: OrderedDict[str, Tensor]) -> None:
    """Write what a task has learned into a safetensors file.

    Args:
        file: the path; a file that is there is replaced as a whole.
        state: what `VPT.task_state_dict` returns. Its attribute `about`, if it has one, is a dict of plain
            values (JSON) to keep beside the numbers, such as the names of the classes.

    Raises:
        ValueError: if the state does not say what backbone it belongs to.
    """
    if getattr(state, "backbone", None) is None:
        raise ValueError(
            "state must have the attribute `backbone`, as VPT.task_state_dict() gives it; it has none"
        )
    about = getattr(state, "about", {})
    told = {"format": TASK_FORMAT, "backbone": state.backbone}
    write_tensors(file, state, told | ({"about": json.dumps(about)} if about else {}))


def load_task(file: str | Path) -> OrderedDict[str, Tensor]:
    """Read what `save_task` has written.

    Args:
        file: the path.

    Returns:
        An OrderedDict like that of `VPT.task_state_dict`; its attribute `about` is {} if nothing was told.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or no task's file.
    """
    tensors, metadata = read_tensors(file, format=TASK_FORMAT)
    if "backbone" not in metadata:
        raise ValueError(f"{file} is damaged: it does not say what backbone it belongs to")
    state = OrderedDict(tensors)
    state.backbone, state.about = metadata["backbone"], json.loads(metadata.get("about", "{}"))
    return state
