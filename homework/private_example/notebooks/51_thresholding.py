# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 51 Thresholding: guidance that does not leave the range of images
#
# An example of an instructor's own exercises, for `make homework PRIVATE=homework/private_example`.
#
# Strong guidance pulls $\hat x_0$ out of the range $[-1,1]$ of images. Clipping each value to that range turns large
# areas into flat colours. Saharia et al. propose another way: look how far the sample reaches, and shrink it as a whole.

# %%
import matplotlib.pyplot as plt

from lecture26.checks import check, check_answer
from lecture26.kit.figures import PALETTE, show, use_style
from lecture26.kit.proof import verify

use_style()

# %% tags=["export"]
import torch

# %% [markdown]
# ## Dynamic thresholding
#
# For each sample, let $s$ be a quantile of the absolute values of all its elements, such as that of 99.5 %, but at least 1:
#
# $$s=\max\bigl(1,\ Q_p(|\hat x_0|)\bigr),\qquad
# \hat x_0'=\tfrac1s\,\operatorname{clip}(\hat x_0,\,-s,\,s) \tag{51.1, definition}$$
#
# #### Exercise 1: dynamic thresholding
#
# *Algorithm, medium, 6 minutes.* Write `dynamic_threshold`, (51.1). Each sample has an $s$ of its own, whatever number of
# axes it has. `torch.quantile` computes quantiles.


# %% tags=["export", "exercise"]
def dynamic_threshold(x_0, quantile):
    """Bring predicted clean data into [-1, 1], by how far each sample reaches.

    Args:
        x_0: predicted clean data, (B, ...).
        quantile: which quantile of a sample's absolute values is its reach, in (0, 1).

    Returns:
        Like x_0, in [-1, 1]; a sample whose reach is below 1 is clipped only.

    Source: Saharia et al. 2022, section 2.3.
    """
    ### BEGIN SOLUTION
    reach = x_0.abs().flatten(1).quantile(quantile, dim=1).clamp(min=1)  # (B,)
    reach = reach.view(-1, *[1] * (x_0.ndim - 1))
    return x_0.clamp(-reach, reach) / reach
    ### END SOLUTION


# %%
check("thresholding.dynamic_threshold", dynamic_threshold)

# %% [markdown]
# A sample that doubles its reach comes out the same, as long as the reach is at least 1:
#
# $$(2\hat x_0)'=\hat x_0'\quad\text{if } Q_p(|\hat x_0|)\ge1 \tag{51.2}$$

# %%
strong = 3 * torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
verify("51.2", dynamic_threshold(2 * strong, 0.9), dynamic_threshold(strong, 0.9), atol=1e-12)

# %%
values = torch.linspace(-4, 4, 401, dtype=torch.float64)
figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
axis.plot(values, values.clamp(-1, 1), color=PALETTE["blue"], label="clipped")
axis.plot(values, dynamic_threshold(values[None], 0.9)[0], color=PALETTE["red"], label="dynamic threshold")
axis.set(xlabel=r"$\hat x_0$", ylabel="after")
axis.legend()
show(figure, "Two curves that end at -1 and 1: one is flat from -1 and 1 on, the other only near the ends.")

# %% [markdown]
# #### Exercise 2: what is lost
#
# *Question, easy, 2 minutes.* The values of a sample are spread evenly over $[-4,4]$, as above. Which part of them does
# clipping to $[-1,1]$ move? Within 0.01.

# %% tags=["question"]
### BEGIN SOLUTION
# those beyond 1 on both sides: 6 of the 8 units
part_moved = 0.75
### END SOLUTION

# %%
measured = (values.abs() > 1).double().mean().item()
check_answer("thresholding.part_moved", part_moved, measured, within=0.01)

# %% [markdown]
# #### Exercise 3: two ways of leaving the range
#
# *Question on paper, easy, 5 minutes.* Dynamic thresholding scales a whole sample by $1/s$. What does that do to the
# contrast of an image in which only a few pixels lie far out, and why is $s$ a quantile and not the maximum?
#
# <details>
# <summary>Answer, and what to look for in yours</summary>
#
# Scaling by the maximum would make the whole image grey for the sake of a few pixels.
#
# - Contrast falls by the factor 1 / s everywhere: 1 point.
# - A quantile ignores the few pixels far out, which are clipped instead: 1 point.
#
# </details>

# %% [markdown]
# ## References
#
# - Saharia et al. 2022, *Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding*: section 2.3.
