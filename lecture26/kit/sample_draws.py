"""Random draws that are a function of (seed, number of the sample), for training and for measurements."""

import numpy as np
import torch
from torch import Tensor


class SampleDraws:
    """Random draws for a batch, on the CPU: sample n draws from its own generator, seeded with (seed, n).

    Args:
        seed: a non-negative integer, the seed of the run.
        n: numbers of the samples within the run, (B,) int64.
    """

    def __init__(self, seed: int, n: Tensor):
        # NumPy's generators hash (seed, n) to 128 bits; torch's on the CPU would keep 32 bits of a seed.
        self._generators = [np.random.default_rng([seed, index]) for index in n.tolist()]

    def integers(self, high: int) -> Tensor:
        """One integer per sample, uniform on 0, ..., high - 1: (B,) int64."""
        return torch.tensor([generator.integers(high) for generator in self._generators], device="cpu")

    def uniform(self) -> Tensor:
        """One number per sample, uniform on [0, 1): (B,) float32."""
        numbers = [generator.random() for generator in self._generators]
        return torch.tensor(numbers, dtype=torch.float32, device="cpu")

    def normal(self, *shape: int) -> Tensor:
        """Standard normal noise of the given shape per sample: (B, *shape) float32."""
        noise = np.empty((len(self._generators), *shape), dtype=np.float32)
        for generator, row in zip(self._generators, noise, strict=True):
            generator.standard_normal(dtype=np.float32, out=row)
        return torch.from_numpy(noise)
