"""Exercises of the example of an instructor's own chapter: a guidance schedule.

It is put into lecture26/checks/chapters, and is written like the modules there.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lecture26 import guidance_schedule

from ..core import Case, Exercise, Misconception
from ..draws import Draws


def _mixed_by_schedule_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    few, many, side = draws.integer(3, 4), draws.integer(6, 8), draws.integer(4, 5)

    def case(note: str, *shape: int, w: float, num_steps: int, **kind) -> Case:
        both = draws.normal(*shape, **kind), draws.normal(*shape, **kind)
        return Case(note, (*both, w, draws.steps(shape[0], num_steps), num_steps))

    return [
        case("points", many, 3, w=2.0, num_steps=50),
        case("images", few, 3, side, side, w=1.5, num_steps=1000),
        case("as many samples as elements", side, side, w=3.0, num_steps=20),
        case("a batch of one", 1, 3, 2, side, w=0.5, num_steps=100),
        case("a negative weight", many, 2, w=-0.5, num_steps=50),
        case("float32", few, 1, side, side, w=2.0, num_steps=200, dtype=torch.float32),
        case("gradient", many, 4, w=1.0, num_steps=80, gradient=True),
    ]


def _by_weights(weigh: Callable[[Tensor, int], Tensor]) -> Callable:
    """Mixed by w times any function of the steps and their number, right or wrong."""

    def wrong(eps_cond, eps_uncond, w, t, num_steps):
        weights = w * weigh(t.to(eps_cond.dtype), num_steps).view(-1, *[1] * (eps_cond.ndim - 1))
        return (1 + weights) * eps_cond - weights * eps_uncond

    return wrong


def _along_the_last_axis(eps_cond, eps_uncond, w, t, num_steps):
    weights = w * (1 + torch.cos(math.pi * (t.to(eps_cond.dtype) + 0.5) / num_steps))
    return (1 + weights) * eps_cond - weights * eps_uncond


def _guidance_scale(eps_cond, eps_uncond, w, t, num_steps):
    return guidance_schedule.mixed_by_schedule(eps_cond, eps_uncond, w, t, num_steps) - (
        eps_cond - eps_uncond
    )


EXERCISES = [
    Exercise(
        "guidance_schedule.mixed_by_schedule",
        '"A cosine of the step", equation (51.1)',
        guidance_schedule.mixed_by_schedule,
        _mixed_by_schedule_cases,
        (
            Misconception(
                "large at noisy steps",
                _by_weights(lambda t, num_steps: 1 - torch.cos(math.pi * (t + 0.5) / num_steps)),
                "The weight is large at noisy steps and small at clean ones. It is the other way round.",
            ),
            Misconception(
                "half the weight",
                _by_weights(lambda t, num_steps: (1 + torch.cos(math.pi * (t + 0.5) / num_steps)) / 2),
                "The weight is halved: its mean over all steps is w, so its largest value is nearly 2 w.",
            ),
            Misconception(
                "the half forgotten",
                _by_weights(lambda t, num_steps: 1 + torch.cos(math.pi * t / num_steps)),
                "The half of (t + 1/2) is missing.",
            ),
            Misconception(
                "the same weight at all steps",
                _by_weights(lambda t, num_steps: torch.ones_like(t)),
                "The weight does not depend on the step.",
            ),
            Misconception(
                "first sample's step for all",
                _by_weights(
                    lambda t, num_steps: 1 + torch.cos(math.pi * (t[:1] + 0.5) / num_steps).expand(len(t))
                ),
                "The first sample's step is used for all. Each sample has a step of its own.",
            ),
            Misconception(
                "weights along the last axis",
                _along_the_last_axis,
                "A tensor of shape (B,) broadcasts against the last axis, not against the batch: make it "
                "(B, 1, ...).",
            ),
            Misconception(
                "guidance scale for w",
                _guidance_scale,
                "This takes the weight for a guidance scale, which is 1 where the weight is 0.",
            ),
        ),
    )
]
