"""Random numbers by position: entry (counter, draw) of a table that is computed, never stored.

A sequential generator has to be asked in order. Here the n-th number is a function of (seed, draw, n), so a
batch of arbitrary indices is drawn at once, and an image is the same whatever was drawn before it.
The function is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014, figure 17): each draw number has a generator of its own, whose n-th output is returned.
"""

import torch

from lecture26.kit.validation import check_int, check_positive_int

RANDOM_BITS = 24  # the most that a float32 holds exactly


def random_bits(seed: int, counters: torch.Tensor, num_draws: int) -> torch.Tensor:
    """Independent random integers for each counter.

    Args:
        seed: any int; other seeds give unrelated tables.
        counters: (B,) int64, the rows of the table wanted, in any order.
        num_draws: D, how many numbers each row has. A larger D leaves the first ones as they are.

    Returns:
        (B, D) int64, uniform on 0, ..., 2**24 - 1.

    Raises:
        TypeError: `seed` or `num_draws` is not an int.
        ValueError: `num_draws` is less than 1.
    """
    check_int("seed", seed)
    check_positive_int("num_draws", num_draws)
    seed = torch.tensor(_signed(seed % 2**64), device="cpu")
    draws = torch.arange(1, num_draws + 1, device="cpu")
    generators = _mix(_mix(seed + _GOLDEN_GAMMA) + draws * _GOLDEN_GAMMA)  # (D,) one starting state each
    bits = _mix(generators + (counters[:, None] + 1) * _GOLDEN_GAMMA)  # (B, D)
    return _shift_right(bits, 64 - RANDOM_BITS)


def uniform(bits: torch.Tensor) -> torch.Tensor:
    """Map `bits`, integers from `random_bits`, to float32 numbers, uniform on [0, 1)."""
    return bits.float() / 2**RANDOM_BITS


def choice(bits: torch.Tensor, num_options: int) -> torch.Tensor:
    """Map `bits`, integers from `random_bits`, to int64 numbers, uniform on 0, ..., num_options - 1."""
    return bits * num_options >> RANDOM_BITS


def _mix(z: torch.Tensor) -> torch.Tensor:
    z = (z ^ _shift_right(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift_right(z, 31)


def _shift_right(z: torch.Tensor, places: int) -> torch.Tensor:
    # torch has no unsigned 64-bit arithmetic; >> on int64 repeats the sign bit, which the mask removes.
    return (z >> places) & (2 ** (64 - places) - 1)


def _signed(unsigned: int) -> int:
    return unsigned - 2**64 if unsigned >= 2**63 else unsigned


_GOLDEN_GAMMA = _signed(0x9E3779B97F4A7C15)  # 2**64 divided by the golden ratio, made odd
