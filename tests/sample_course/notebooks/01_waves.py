# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown] slide=["# Waves die away", "? How much is left of a wave?", "(1.1)", "# What to remember", "- A rate, and a half-life."]
# # 01 · Damped waves
#
# A course of one chapter, on which the tools are tested.

# %% tags=["export"]
import math

# only the notebook prints tables
import pprint
from dataclasses import dataclass

Samples = list[float]  # a signal, one value for each time


# %%
# %precision 3
pprint.pprint({"half-life": math.log(2)})

# %% [markdown]
# ## 1.1 The decay $e^{-kt}$
#
# $$ e^{-k(s+t)} = e^{-ks} e^{-kt} \tag{1.1} $$
#
# ```python
# # no heading: a comment in a code block
# ```


# %% tags=["export", "exercise"]
def decay(times: Samples, rate: float) -> Samples:
    """How much of a wave is left.

    Args:
        times: in seconds.
        rate: k, in 1/s, not negative.
    """
    if rate < 0:
        raise ValueError(f"rate must not be negative; got {rate}")
    ### BEGIN SOLUTION
    # a(t) = exp(-k t)   (1.1)
    left = [math.exp(-rate * t) for t in times]  # one factor for each time
    return left
    ### END SOLUTION


# Nothing below depends on the unit of time.

# %%
from lecture26.checks import check

check("waves.decay", decay)


# %% tags=["export"]
# A wave knows its numbers; what it does follows in 1.2.
@dataclass(frozen=True)
class Wave:
    """A damped wave, exp(-k t) cos(2 pi f t)."""

    frequency: float  # f, in Hz
    rate: float  # k, in 1/s

    def envelope(self, times: Samples) -> Samples:
        """The amplitude."""
        return decay(times, self.rate)


# %% [markdown]
# ## 1.2 What a **wave** does

# %% tags=["export"]
from collections.abc import Iterator


# %% slide=["# Two of them multiply", "[code phases]", "$2\\pi ft$, and the decay besides."] tags=["export"]
def phases(times: Samples, frequency: float) -> Iterator[float]:
    """Angles in radians."""
    # phi(t) = 2 pi f t
    return (2 * math.pi * frequency * t for t in times)


# Amplitude and phase multiply.
class Wave(Wave):  # the class, continued
    # a(t) cos(phi(t))
    def __call__(self, times: Samples) -> Samples:
        """The signal."""
        pairs = zip(self.envelope(times), phases(times, self.frequency), strict=True)
        return [amplitude * math.cos(phase) for amplitude, phase in pairs]

    # no method for the spectrum: chapter 02


# %% [markdown]
# ### 1.3 As text


# %% tags=["export"]
class Wave(Wave):
    def __str__(self) -> str:
        return f"""\
{self.frequency} Hz
  damped by {self.rate} 1/s"""


# %%
wave = Wave(frequency=1.0, rate=0.5)
print(wave)
[round(value, 6) for value in wave([0.0, 0.5, 1.0])]
