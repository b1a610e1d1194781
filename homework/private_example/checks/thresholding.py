"""Exercises of the example of an instructor's own chapter: dynamic thresholding.

It is put into lecture26/checks/chapters, and is written like the modules there.
"""

import torch
from torch import Tensor

from lecture26 import thresholding

from ..core import Case, Exercise, Misconception
from ..draws import Draws


def _dynamic_threshold_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    batch, side = draws.integer(3, 5), draws.integer(5, 7)
    images, points = (batch, 3, side, side), (batch, 2 * side)
    reach = draws.uniform(batch, low=1.5, high=4.0)
    float32 = {"dtype": torch.float32}
    return [
        Case("images of different reach", (reach.view(-1, 1, 1, 1) * draws.normal(*images), 0.9)),
        Case("points", (reach.view(-1, 1) * draws.normal(*points), 0.8)),
        Case("a batch of one", (3 * draws.normal(1, 3, side, side), 0.95)),
        Case("within the range", (draws.uniform(*images, low=-0.6, high=0.6), 0.9)),
        Case("float32", (2 * draws.normal(*images, **float32), 0.9)),
        Case("gradient", (draws.normal(*points, gradient=True), 0.9)),
    ]


def _reach(x_0: Tensor, quantile: float) -> Tensor:
    return x_0.abs().flatten(1).quantile(quantile, dim=1).view(-1, *[1] * (x_0.ndim - 1))


def _whole_batch(x_0: Tensor, quantile: float) -> Tensor:
    reach = x_0.abs().flatten().quantile(quantile).clamp(min=1)
    return x_0.clamp(-reach, reach) / reach


def _not_divided(x_0: Tensor, quantile: float) -> Tensor:
    reach = _reach(x_0, quantile).clamp(min=1)
    return x_0.clamp(-reach, reach)


def _of_signed_values(x_0: Tensor, quantile: float) -> Tensor:
    reach = x_0.flatten(1).quantile(quantile, dim=1).clamp(min=1).view(-1, *[1] * (x_0.ndim - 1))
    return x_0.clamp(-reach, reach) / reach


EXERCISES = [
    Exercise(
        "thresholding.dynamic_threshold",
        '"Dynamic thresholding", equation (51.1)',
        thresholding.dynamic_threshold,
        _dynamic_threshold_cases,
        (
            Misconception(
                "one reach for the whole batch",
                _whole_batch,
                "The quantile is taken over all samples. Each sample has a reach of its own.",
            ),
            Misconception(
                "not divided by the reach",
                _not_divided,
                "The result reaches to s, not to 1: divide by s after clipping.",
            ),
            Misconception(
                "reach below 1",
                lambda x_0, quantile: (
                    x_0.clamp(-_reach(x_0, quantile), _reach(x_0, quantile)) / _reach(x_0, quantile)
                ),
                "A sample that lies within the range is stretched. The reach is at least 1.",
            ),
            Misconception(
                "quantile of the signed values",
                _of_signed_values,
                "The reach is a quantile of the absolute values: a sample reaches out on both sides.",
            ),
            Misconception(
                "clipped to the range",
                lambda x_0, quantile: x_0.clamp(-1, 1),
                "This is static thresholding. Clip to the reach, then divide by it.",
            ),
        ),
    )
]
