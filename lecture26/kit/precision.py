"""In which precision a network trains: bfloat16 where the device has units for it and is faster with them."""

import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lecture26.kit.processes import process_state

PRECISIONS = ("auto", "fp32", "bf16")
TIMED_STEPS = 3
ADVANTAGE = 1.1  # what bfloat16 gains in speed has to be more than this, or its rounding is for nothing


class Choice(NamedTuple):
    """A precision, "fp32" or "bf16", and why it was chosen, in a few words."""

    precision: str
    reason: str


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which a network on a `device` computes in a `precision`, "fp32" or "bf16"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def has_bfloat16_units(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices in hardware; without, that takes many times as long."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def choose_precision(
    model: nn.Module, batch: dict[str, Tensor], loss: Callable[[nn.Module, dict[str, Tensor]], Tensor]
) -> Choice:
    """The precision in which a training step is faster, by trying a few; the model stays as it is.

    Args:
        model: the network, on the device where it shall train; its gradients are None afterwards.
        batch: of training, on the same device.
        loss: loss(model, batch) -> scalar.

    Returns:
        The choice; fp32 where bf16 gains less than ADVANTAGE.
    """
    device = next(model.parameters()).device
    if not has_bfloat16_units(device):
        return Choice("fp32", "the device has no units for bfloat16")
    buffers = [buffer.clone() for buffer in model.buffers()]
    seconds = {"fp32": [], "bf16": []}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for _ in range(1 + TIMED_STEPS):
            for precision, taken in seconds.items():
                taken.append(_time_step(model, batch, loss, device, precision))
    for buffer, before in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(before)
    fp32, bf16 = (min(taken[1:]) for taken in seconds.values())  # the first step prepares the others
    chosen = "bf16" if fp32 > ADVANTAGE * bf16 else "fp32"
    return Choice(chosen, f"a step takes {bf16:.2g} s in bf16 and {fp32:.2g} s in fp32")


def say(choice: Choice) -> None:
    """Tell whoever waits the `choice` of a training, once for all processes."""
    if process_state().is_main_process:
        print(f"precision: {choice.precision} ({choice.reason})", file=sys.stderr)


def _time_step(model: nn.Module, batch: dict, loss: Callable, device: torch.device, precision: str) -> float:
    """The seconds of a forward and a backward pass; infinity if the memory does not suffice for them."""
    started = time.perf_counter()
    try:
        with autocast(device, precision):
            batch_loss = loss(model, batch)
        batch_loss.backward()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
    except torch.OutOfMemoryError:
        return float("inf")
    finally:
        model.zero_grad(set_to_none=True)
    return time.perf_counter() - started
