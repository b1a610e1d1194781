"""The processes that work on one run together, as Accelerate finds them."""

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import PartialState

# Of Accelerate's variables these say where a training runs; the others would change what it computes.
PLACE = ("ACCELERATE_USE_CPU", "ACCELERATE_TORCH_DEVICE", "ACCELERATE_CPU_AFFINITY", "ACCELERATE_DEBUG_MODE")


@contextmanager
def own_settings() -> Iterator[None]:
    """Hide from Accelerate those of its environment variables that would change a training.

    ACCELERATE_GRADIENT_ACCUMULATION_STEPS, for one, divides each loss; a run's settings are its arguments.
    """
    hidden = {name for name in os.environ if name.startswith("ACCELERATE_")} - set(PLACE)
    values = {name: os.environ.pop(name) for name in hidden}
    try:
        yield
    finally:
        os.environ.update(values)


def stays_on_cpu() -> bool:
    """Whether work is done on the CPU: without an accelerator, or where ACCELERATE_USE_CPU asks for it."""
    from accelerate.utils import parse_flag_from_env  # takes a second to import

    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def process_state() -> "PartialState":
    """Which of how many processes this is, and the device it works on.

    Accelerate has to be told that they stay on the CPU, or each of several believes that it is alone.
    """
    from accelerate import PartialState  # takes a second to import

    with own_settings():
        state = PartialState(cpu=stays_on_cpu())
    if state.num_processes > 1:
        _leave_at_exit()
    return state


@cache
def _leave_at_exit() -> None:
    """Have this process leave the others in order: gloo's threads abort one that just ends now and then."""
    atexit.register(lambda: torch.distributed.is_initialized() and torch.distributed.destroy_process_group())
