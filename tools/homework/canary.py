"""A function of the grader's own, which a student's process calls after the student's.

What it does is known: it changes one argument, leaves a .grad in the other, and returns values that nobody
knows beforehand. A process that tells anything else of it does not tell the truth of the student's function
either.
"""

import hashlib

import torch
from torch import Tensor

from lecture26.checks.core import Case, Outcome, Remains, difference, observe, with_traces

PARAMETERS = ("x", "y")


def canary(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """3 x, and what y has become."""
    x.square().sum().backward()
    y.add_(x.detach().sum())
    return 3 * x, y.clone()


def canary_case(seed: int) -> Case:
    """Arguments for it. A secret seed cannot be found from them."""
    digest = hashlib.sha256(f"canary {seed}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    x, y = torch.randn(2, 3, dtype=torch.float64, generator=generator)
    return Case("", (x.requires_grad_(), y))


def sings(claimed: tuple[Outcome, Remains], case: Case) -> bool:
    """Whether what a process tells of the canary is the truth."""
    truth, claim = (with_traces(*found, case.arguments) for found in (observe(canary, case), claimed))
    return difference(claim, truth, PARAMETERS) is None
