"""Random arguments for the exercises: the same seed gives the same ones, another seed others."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Draws:
    """Draws from one generator, in float64 and then cast, so that both dtypes see the same numbers."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float64, gradient: bool = False) -> Tensor:
        """Standard normal numbers, carrying gradient if asked."""
        drawn = torch.randn(shape, dtype=torch.float64, generator=self.generator)
        return drawn.to(dtype).requires_grad_(gradient)

    def uniform(
        self, *shape: int, low: float = 0.0, high: float = 1.0, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        """Numbers between low and high."""
        return (low + (high - low) * torch.rand(shape, dtype=torch.float64, generator=self.generator)).to(
            dtype
        )

    def integer(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def steps(self, count: int, num_steps: int) -> Tensor:
        """Different steps of a schedule, (count,) int64, in no order."""
        return torch.randperm(num_steps, generator=self.generator)[:count]

    def choice(self, options: Sequence) -> object:
        """One of the options."""
        return options[self.integer(0, len(options) - 1)]
