# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 51 A guidance schedule: a weight that grows while the noise falls
#
# An example of an instructor's own exercises, for `make homework PRIVATE=homework/private_example`.
#
# Chapter 05 guides with one weight at all steps, or at those of an interval. Wang et al. compare weights that change
# smoothly along the way, and find that it pays to begin with little and to end with much.

# %%
import matplotlib.pyplot as plt

from lecture26.checks import check, check_answer
from lecture26.kit.figures import PALETTE, show, use_style
from lecture26.kit.proof import verify

use_style()

# %% tags=["export"]
import math

import torch

# %% [markdown]
# ## A cosine of the step
#
# Let $w$ be the weight that one would use at all of the $T$ steps, counted as code does, from $t=0$ to $T-1$. In its place,
#
# $$w_t=w\left(1+\cos\frac{\pi\,(t+\frac12)}{T}\right),\qquad
# \tilde\epsilon=(1+w_t)\,\epsilon_c-w_t\,\epsilon_u \tag{51.1, definition}$$
#
# which is nearly 0 at the noisiest step and nearly $2w$ at the cleanest.
#
# #### Exercise 1: guided by a schedule
#
# *Algorithm, medium, 6 minutes.* Write `mixed_by_schedule`, (51.1). Each sample has a step of its own, whatever number of
# axes it has.


# %% tags=["export", "exercise"]
def mixed_by_schedule(eps_cond, eps_uncond, w, t, num_steps):
    """Mix a conditional and an unconditional prediction by a weight that grows while the noise falls.

    Args:
        eps_cond, eps_uncond: predictions given the condition and without it, (B, ...).
        w: the weight's mean over all steps, a number.
        t: the step of each sample, (B,) integers in [0, num_steps).
        num_steps: T, the number of steps.

    Returns:
        The guided prediction, like eps_cond.

    Source: Wang et al. 2024, who call this schedule cosine.
    """
    ### BEGIN SOLUTION
    weights = w * (1 + torch.cos(math.pi * (t.to(eps_cond.dtype) + 0.5) / num_steps))  # (B,)
    weights = weights.view(-1, *[1] * (eps_cond.ndim - 1))
    return (1 + weights) * eps_cond - weights * eps_uncond
    ### END SOLUTION


# %%
check("guidance_schedule.mixed_by_schedule", mixed_by_schedule)

# %% [markdown]
# With the half, the cosines of all steps cancel in pairs, so that the weight has the mean $w$, exactly:
#
# $$\frac1T\sum_{t=0}^{T-1}w_t=w \tag{51.2}$$

# %%
steps = torch.arange(50)
ones, zeros = torch.ones(50, 1, dtype=torch.float64), torch.zeros(50, 1, dtype=torch.float64)
by_step = mixed_by_schedule(ones, zeros, 3.0, steps, 50)[:, 0] - 1  # the weights themselves
verify("51.2", by_step.mean(), torch.tensor(3.0, dtype=torch.float64), atol=1e-12)

# %%
figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
axis.plot(steps, by_step, color=PALETTE["vermilion"], label="cosine")
axis.axhline(3.0, color=PALETTE["blue"], label="constant")
axis.set(xlabel="step t", ylabel="weight", xlim=(50, 0), ylim=(0, None))
axis.legend()
show(
    figure,
    "The weight against the step: a constant line, and a curve from nearly 0 at noise to 6 at the picture.",
)

# %% [markdown]
# #### Exercise 2: what is left for the noise
#
# *Question, easy, 3 minutes.* Of the sum of all weights, which part falls on the noisier half of the steps? Within 0.02.

# %% tags=["question"]
### BEGIN SOLUTION
# the integral of 1 + cos(pi u) from 1/2 to 1: 1/2 - 1/pi
noisy_part = 0.18
### END SOLUTION

# %%
measured = (by_step[25:].sum() / by_step.sum()).item()
check_answer("guidance_schedule.noisy_part", noisy_part, measured, within=0.02)

# %% [markdown]
# #### Exercise 3: why late
#
# *Question on paper, easy, 5 minutes.* The mean of the weight is what it was. Why should it matter when it is applied? Name what
# is decided at noisy steps, and what is left to decide at clean ones.
#
# <details>
# <summary>Answer, and what to look for in yours</summary>
#
# Guidance at noisy steps chooses between sorts of a class, and drops the less typical ones.
#
# - At noisy steps it is decided which of a class's sorts is drawn, so guidance costs variety there: 1 point.
# - At clean steps only details are open, so a larger weight sharpens without that cost: 1 point.
#
# </details>

# %% [markdown]
# ## References
#
# - Wang, Dufour, Andreou, Cani, Abrevaya, Picard, Kalogeiton 2024, *Analysis of Classifier-Free Guidance Weight Schedulers*.
