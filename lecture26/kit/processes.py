"""The processes that work on one run together, as Accelerate finds them."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import PartialState


def stays_on_cpu() -> bool:
    """Whether work is done on the CPU: without an accelerator, or where ACCELERATE_USE_CPU asks for it."""
    from accelerate.utils import parse_flag_from_env  # takes a second to import

    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def process_state() -> "PartialState":
    """Which of how many processes this is, and the device it works on.

    Accelerate has to be told that they stay on the CPU, or each of several believes that it is alone.
    """
    from accelerate import PartialState  # takes a second to import

    return PartialState(cpu=stays_on_cpu())
