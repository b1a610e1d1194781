"""Stands in for the course's checks: the sample notebook has one exercise."""

import math


def check(exercise, candidate):
    """Whether a candidate for `waves.decay` halves once in a half-life."""
    assert exercise == "waves.decay"
    return candidate([1.0], math.log(2)) == [0.5]
