"""Damped waves.

Generated from notebooks/01_waves.py, which derives and checks it: edit there, then run `make package`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

Samples = list[float]  # a signal, one value for each time


# --- 1.1 The decay e^{-kt} ---


def decay(times: Samples, rate: float) -> Samples:
    """How much of a wave is left.

    Args:
        times: in seconds.
        rate: k, in 1/s, not negative.
    """
    if rate < 0:
        raise ValueError(f"rate must not be negative; got {rate}")
    # a(t) = exp(-k t)   (1.1)
    left = [math.exp(-rate * t) for t in times]  # one factor for each time
    return left


# Nothing below depends on the unit of time.


# A wave knows its numbers; what it does follows in 1.2.
@dataclass(frozen=True)
class Wave:
    """A damped wave, exp(-k t) cos(2 pi f t)."""

    frequency: float  # f, in Hz
    rate: float  # k, in 1/s

    def envelope(self, times: Samples) -> Samples:
        """The amplitude."""
        return decay(times, self.rate)

    # --- 1.2 What a wave does ---

    # Amplitude and phase multiply.
    # a(t) cos(phi(t))
    def __call__(self, times: Samples) -> Samples:
        """The signal."""
        pairs = zip(self.envelope(times), phases(times, self.frequency), strict=True)
        return [amplitude * math.cos(phase) for amplitude, phase in pairs]

    # no method for the spectrum: chapter 02

    # --- 1.3 As text ---

    def __str__(self) -> str:
        return f"""\
{self.frequency} Hz
  damped by {self.rate} 1/s"""


# --- 1.2 What a wave does ---


def phases(times: Samples, frequency: float) -> Iterator[float]:
    """Angles in radians."""
    # phi(t) = 2 pi f t
    return (2 * math.pi * frequency * t for t in times)
