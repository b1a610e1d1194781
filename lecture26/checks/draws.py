"""Random arguments for the exercises: the same seed gives the same ones, another seed others."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lecture26.ddpm import cosine_betas, linear_betas

from .callables import CallableArgument


class Draws:
    """Draws from one generator, in float64 and then cast, so that both dtypes see the same numbers."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, **kind) -> Tensor:
        """Standard normal numbers, of the kind that `cast` makes."""
        return cast(torch.randn(shape, dtype=torch.float64, generator=self.generator), **kind)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0, **kind) -> Tensor:
        """Numbers between low and high, of the kind that `cast` makes."""
        drawn = torch.rand(shape, dtype=torch.float64, generator=self.generator)
        return cast(low + (high - low) * drawn, **kind)

    def integer(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def permutation(self, count: int) -> Tensor:
        """The numbers below count, (count,) int64, in no order."""
        return torch.randperm(count, generator=self.generator)

    def steps(self, count: int, num_steps: int) -> Tensor:
        """Different steps of a schedule, (count,) int64, in no order."""
        return self.permutation(num_steps)[:count]

    def network(self, kind: str, elements: int, outputs: int, **numbers) -> CallableArgument:
        """A network (x_t, t) -> (B, outputs) of a kind of callable, for samples of that many elements."""
        shapes = (elements, 7), (7,), (7, outputs)
        return CallableArgument(kind, tuple(self.normal(*shape, **numbers) for shape in shapes))

    def denoiser_weights(self, elements: int, **numbers) -> tuple[Tensor, ...]:
        """The tensors of a noisy_denoiser, for samples of that many elements."""
        shapes = (elements, 7), (7,), (7, elements)
        return tuple(self.normal(*shape, **numbers) for shape in shapes)

    def choice(self, options: Sequence) -> object:
        """One of the options."""
        return options[self.integer(0, len(options) - 1)]


def cast(drawn: Tensor, dtype: torch.dtype = torch.float64, gradient: bool = False) -> Tensor:
    """Drawn numbers in a dtype, carrying gradient if asked."""
    return drawn.to(dtype).requires_grad_(gradient)


def transposed(tensor: Tensor) -> Tensor:
    """The same values in another order of memory."""
    return tensor.mT.contiguous().mT


def schedule_tables(betas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """beta, alpha_bar and alpha_bar_prev of all steps, (T,) each."""
    alpha_bar = (1 - betas).cumprod(0)
    return betas, alpha_bar, torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])


@dataclass(frozen=True)
class Batch:
    """Samples of one shape (B, ...), each at a step of its own, with the schedule there as (B, 1, ...)."""

    note: str
    draws: Draws
    shape: tuple[int, ...]
    dtype: torch.dtype
    gradient: bool
    t: Tensor  # (B,)
    beta: Tensor  # (B, 1, ...), as the two below
    alpha_bar: Tensor
    alpha_bar_prev: Tensor

    def normal(self) -> Tensor:
        """Standard normal numbers of the batch's shape."""
        return self.draws.normal(*self.shape, dtype=self.dtype, gradient=self.gradient)


def batches(seed: int) -> list[Batch]:
    """Batches of all layouts, both schedules and dtypes, with and without gradient."""
    draws = Draws(seed)
    side, wide, height, width = (
        draws.integer(4, 5),
        draws.integer(6, 8),
        draws.integer(2, 3),
        draws.integer(6, 7),
    )
    # Where the batch is as long as the last axis, a (B,) tensor along the wrong axis raises no error.
    points, square_points = (side, wide), (side, side)
    images, square_images = (side, 3, height, width), (side, 3, side, side)
    float64, float32 = torch.float64, torch.float32
    return [
        _batch(draws, linear_betas, square_points, float64),
        _batch(draws, cosine_betas, points, float64),
        _batch(draws, linear_betas, images, float64),
        _batch(draws, cosine_betas, square_images, float64),
        _batch(draws, linear_betas, (1, wide), float64),
        _batch(draws, cosine_betas, (1, 3, height, width), float32),
        _batch(draws, linear_betas, points, float32, gradient=True),
        _batch(draws, cosine_betas, images, float64, gradient=True),
        _batch(draws, linear_betas, points, float64, step="first"),
        _batch(draws, linear_betas, points, float64, step="last"),
    ]


def _batch(draws, schedule, shape, dtype, gradient=False, step=None) -> Batch:
    num_steps = draws.choice((30, 100, 400, 1000))
    t = draws.steps(shape[0], num_steps)
    note = f"{schedule.__name__} of {num_steps} steps"
    if step is not None:
        t = torch.full_like(t, 0 if step == "first" else num_steps - 1)
        note += f", all at the {step} step"
    # (T,) -> (B, 1, ...)
    tables = (
        table[t].to(dtype).view(-1, *[1] * (len(shape) - 1)) for table in schedule_tables(schedule(num_steps))
    )
    return Batch(note, draws, shape, dtype, gradient, t, *tables)
