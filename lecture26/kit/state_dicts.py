"""The names of a model's weights, whatever torch.compile has wrapped around it or its parts."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

COMPILED = "_orig_mod."  # what torch.compile puts before the names of the module that it wraps


def plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under the names that its weights have in the model that was not compiled."""
    return {name.replace(COMPILED, ""): tensor for name, tensor in state.items()}


def load_plain(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load a state dict with plain names into a model, compiled or not; raises as `load_state_dict` does."""
    own = {name.replace(COMPILED, ""): name for name in model.state_dict()}
    model.load_state_dict({own.get(name, name): tensor for name, tensor in state.items()})


def without_compilation(model: nn.Module) -> nn.Module:
    """The model that torch.compile has wrapped; compiled parts are unwrapped in place."""
    model = getattr(model, "_orig_mod", model)
    for name, part in model.named_children():
        setattr(model, name, without_compilation(part))
    return model
