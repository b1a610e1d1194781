"""Random draws by (seed, number of the sample)."""

import torch

from lecture26.kit.sample_draws import SampleDraws


def test_draws_depend_on_seed_and_sample_only():
    def draws(seed, n):
        random = SampleDraws(seed, torch.tensor(n))
        return random.integers(1000), random.uniform(), random.normal(2, 3)

    together = draws(1, [4, 5, 6])
    for position, n in enumerate([4, 5, 6]):
        for batch, alone in zip(together, draws(1, [n]), strict=True):
            assert torch.equal(batch[position], alone[0])
    for batch, other_seed in zip(together, draws(2, [4, 5, 6]), strict=True):
        assert not torch.equal(batch, other_seed)


def test_draws_have_the_distributions_they_name():
    n = 20_000
    random = SampleDraws(0, torch.arange(n))
    integers, uniform, normal = random.integers(10), random.uniform(), random.normal(2)
    assert (integers.dtype, uniform.dtype, normal.dtype) == (torch.int64, torch.float32, torch.float32)
    assert normal.shape == (n, 2)
    # Six standard errors: of a count with p = 1/10, and of a mean of n numbers.
    counts = integers.bincount(minlength=10)
    assert len(counts) == 10
    assert (counts - n / 10).abs().max() < 6 * (n * 0.1 * 0.9) ** 0.5
    assert 0 <= uniform.min() and uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 6 * (1 / 12 / n) ** 0.5
    assert normal.mean(dim=0).abs().max() < 6 / n**0.5
    assert (normal.var(dim=0) - 1).abs().max() < 6 * (2 / n) ** 0.5
    # Neighbouring samples, seeded with neighbouring numbers, are uncorrelated.
    assert (normal[1:, 0] * normal[:-1, 0]).mean().abs() < 6 / n**0.5


def test_draws_are_on_the_cpu_whatever_the_default_device():
    def draws():
        random = SampleDraws(0, torch.arange(3, device="cpu"))
        return random.integers(10), random.uniform(), random.normal(2)

    expected = draws()
    with torch.device("meta"):
        found = draws()
    assert all(map(torch.equal, found, expected))
