"""What a process tells of a function, and beside it of a function of the grader's own."""

from collections.abc import Callable, Sequence

from torch import Tensor

from lecture26.checks.core import Case, observe

from .canary import canary
from .wire import pack_observation, section


def tell(function: Callable, cases: Sequence[Case]) -> bytes:
    """Call a function on all cases but the last, with two seeds, and the canary on the last."""
    tensors: dict[str, Tensor] = {}
    *own, last = cases

    def told(called: Callable, case: Case, seed: int) -> dict:
        return pack_observation(*observe(called, case, seed, silent=False), tensors)

    outcomes, again = ([told(function, case, seed) for case in own] for seed in (0, 1))
    return section({"outcomes": outcomes, "again": again, "canary": told(canary, last, 0)}, tensors)
