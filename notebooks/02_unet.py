# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown] slide=["# What you can do afterwards", "- say what each piece of a diffusion U-Net is there for", "- train a DDPM on images, and know what its loss means", "- look into a denoiser: what it expects, what its skips carry, where it looks", "- choose sampler and number of steps by quality against time"]
# # 02 The U-Net: a denoiser for images
#
# [Previous: 01 DDPM](01_ddpm.ipynb) · [Next: 03 Classifier guidance](03_classifier_guidance.ipynb)
#
# Chapter 01 derived everything about diffusion but the network. This chapter builds one for images, piece by piece, trains
# it, and measures what it can do.
#
# **What you will be able to do**
#
# - say what each piece of a diffusion U-Net is there for, and write it down with tensors;
# - train a DDPM on images, average its weights, and know what its loss means;
# - look into a denoiser: what it expects at each step, what its skips carry, where its attention looks;
# - choose a sampler and a number of steps by quality against time, on enough images;
# - train the same code on a folder of your own images.
#
# **What it needs**: [chapter 01](01_ddpm.ipynb), whose `Diffusion` and samplers are imported here, and convolutions.
# **What it takes**: two minutes to run on two cores; all data are embedded. To study: some 90 minutes for the core,
# three hours with everything. Sections marked *(at a second reading)* can wait: labels are needed in chapter 05, the bits
# nowhere. After a restart of the kernel nothing is defined any more: choose *Run All Above Selected Cell* where you want
# to go on.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.utils import save_image
from typer.testing import CliRunner

from lecture26.__main__ import app
from lecture26.checks import check, progress
from lecture26.ddpm import (
    Diffusion,
    bound,
    cosine_betas,
    ddim_step,
    ddpm_step,
    discretized_log_likelihood,
    noise_like,
    sample,
    v_from_x_0_and_eps,
)
from lecture26.kit.data import load
from lecture26.kit.evaluation import read, sample_quality
from lecture26.kit.figures import PALETTE, show, show_grid, show_table, use_style
from lecture26.kit.progress import progress_bar
from lecture26.kit.proof import verify
from lecture26.kit.results import load_results
from lecture26.recipes import load_diffusion, load_model

use_style()
colours = list(PALETTE.values())

# %% [markdown]
# Cells like the next one become the module `lecture26.unet`; the others stay in the notebook.

# %% tags=["export"]
import copy
import math
from itertools import chain, pairwise

import torch
import torch.nn.functional as F
from torch import nn

from lecture26.ddpm import at_least_float32
from lecture26.kit.state_dicts import without_compilation
from lecture26.kit.validation import check_positive_int, check_shape

# %% [markdown] tags=["core"]
# ## What this chapter reaches
#
# A U-Net that was trained on 200,000 small pictures of shapes, and a sampler of chapter 01:

# %% slide=["# What this chapter reaches: pictures out of noise", "[picture]", "Samples of the course's own U-Net, none left out: which of them would you not know how to name?"]
trained, trained_diffusion = load_model("ddpm_shapes32"), load_diffusion("ddpm_shapes32")
x_T = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(3))
first_drawn = sample(trained_diffusion.respace(50), trained, x_T.shape, ddim_step, x_T=x_T)
show(
    show_grid(first_drawn),
    "Thirty-two pictures of coloured shapes, nearly all of them well formed, on plain, striped and checkered grounds.",
)

# %% [markdown]
# *Thirty-two samples, none left out, in 50 DDIM steps.* How many are as they should be? The judge is a classifier that
# reads shape, colour, size and background off such pictures: *legible* is one of which it reads all four with more than
# 90 % confidence, as it does of nearly every real one.

# %%
judge = load_model("reader_shapes32")


def is_legible(pictures):
    """Whether the judge reads everything with more than 90 % confidence, for pictures (B, 3, 32, 32): (B,)."""
    return (torch.stack(list(read(judge, pictures).confidence.values())) > 0.9).all(dim=0)


print(f"legible: {is_legible(first_drawn).sum()} of {len(first_drawn)}")

# %%
show_table(
    [[f"{is_legible(load('shapes', 'test').batch(range(1000))['image']).float().mean():.1%}"]],
    columns=["legible, of 1,000 real pictures"],
)

# %% [markdown]
# Backgrounds, colours and sharp outlines are there, and nearly every shape has a name. What is such a network made of,
# what does it know, and what still separates its pictures from real ones?

# %% [markdown] tags=["core"]
# ## What the network has to do
#
# The pictures are *Shapes*, made by code: one object on a background, 32 pixels wide. This is how chapter 01's forward
# process takes three of them apart:

# %% slide=["# Noise takes the detail first, and the colour last", "[picture]", "To the eye: at $t=100$ the outline is in doubt; at $t=500$ only colour and rough place can be made out."]
images = load("shapes")
diffusion = Diffusion(cosine_betas(1000), prediction="v", clip=True)
three_images = images.batch([23, 33, 26])["image"]  # (3, 3, 32, 32)
three_noises = noise_like(three_images, torch.Generator().manual_seed(0))
levels = (0, 100, 300, 500, 700, 850, 999)
noisy = torch.stack(
    [diffusion.q_sample(three_images, torch.full((3,), t), three_noises) for t in levels], dim=1
)
figure = show_grid(
    noisy.flatten(0, 1), columns=len(levels), titles=[f"t = {t}" for t in levels], inches_per_image=1.2
)
show(figure, "Three pictures of coloured shapes, each in seven columns from clean to pure noise.")

# %% [markdown]
# *To the eye, at t = 100 only fine texture and the exact outline are in doubt; at t = 500 only the colour and the rough place of
# the object can be made out. (A network reads more: chapter 03's names most shapes at t = 500.)*
#
# The network gets one of these pictures and the step, and returns a picture of the same size: the predicted noise, clean
# image or velocity. So it has four things to do.
#
# 1. *Keep the size.* Each output pixel belongs to an input pixel.
# 2. *See detail.* At small $t$ everything hinges on the exact course of an edge.
# 3. *See the whole.* At large $t$ a single pixel says nothing; only many together do.
# 4. *Know the step.* How far to trust a pixel depends on $t$.
#
# The second and third pull in opposite directions: fine resolution, or a wide view. The way out starts with averages.
# Replace each block of $p\times p$ pixels by its mean. The noise in a block is independent,
# so its mean has the variance $p^2\cdot 1/p^4$, and different blocks share no pixel:
#
# $$\operatorname{Cov}\bigl(\text{block means of }\epsilon\bigr)=\frac1{p^2}\,I \tag{2.1}$$
#
# White noise again, but $p$ times weaker, while large things keep their brightness. To check it, let the averaging $A$, a
# linear map, act on each unit vector; then the covariance is $AA^\top$. (Proofs want more digits than training does:
# they compute in double precision.)

# %% slide=["# A network for this has four things to do", "- *Keep the size*: a pixel out for each pixel in.", "- *See detail*: at small $t$ all hinges on an edge.", "- *See the whole*: at large $t$ one pixel says nothing.", "- *Know the step*: how far to trust a pixel.", "? Two of them pull in opposite directions. Which?", "# Averages are less noisy", "The mean of $p\\times p$ pixels: the picture stays, white noise becomes $p$ times weaker.", "(2.1)"]
exact = {"dtype": torch.float64}
p, side = 2, 6
unit_images = torch.eye(side**2, **exact).reshape(-1, 1, side, side)  # (36, 1, 6, 6)
A = F.avg_pool2d(unit_images, p).flatten(1).T  # (9, 36)
verify("2.1", A @ A.T, torch.eye(9, **exact) / p**2, atol=1e-12)

# %% slide=["# Coarser is less noisy, and has no outline", "[picture]", "A U-Net works at all of these resolutions, and hands across what was there on the way down."] tags=["draw"]
pooled = [F.avg_pool2d(noisy[:, 3], p) for p in (1, 2, 4, 8)]
rows = [F.interpolate(picture, size=32) for picture in pooled]  # shown at one size
figure = show_grid(
    torch.stack(rows, dim=1).flatten(0, 1),
    columns=4,
    titles=["32 pixels", "16", "8", "4"],
    inches_per_image=1.2,
)
show(figure, "Three noisy pictures at four resolutions: the coarser, the less noise, and the less outline.")

# %% [markdown]
# *The images at t = 500, averaged to fewer and fewer pixels. The noise fades, and the outlines with it.*
#
# A **U-Net** works at all of these resolutions. On the way down it halves the picture a few times, and sees ever more
# of it, ever less noisy; on the way up it doubles it again; and at each resolution, what was there on the way down is
# handed across (the *skips*), so that no detail is lost.

# %% [markdown] tags=["core"]
# ## Telling the network the step
#
# The bare number $t$, up to 999, would swamp everything else; divided by 1000, neighbouring steps would look the same. It
# is better to write it as a number is written: with one digit that changes fast, and others that change ever more slowly.
# Waves do that smoothly. With $d/2$ frequencies in a geometric sequence, from 1 towards $1/P$,
#
# $$e(t)=\bigl(\cos\omega_0t,\dots,\cos\omega_{d/2-1}t,\ \sin\omega_0t,\dots,\sin\omega_{d/2-1}t\bigr),\quad
# \omega_k=P^{-k/(d/2)} \tag{2.2, definition}$$
#
# For three frequencies:

# %% slide=["# The step goes in as waves", "? Why not just the number $t$, or $t/1000$?", "One would swamp everything else, with the other, neighbours look the same. So write it with fast and slow digits:", "$$e(t)=\\bigl(\\cos\\omega_0t,\\dots,\\cos\\omega_{d/2-1}t,\\ \\sin\\omega_0t,\\dots\\bigr),\\quad\\omega_k=P^{-k/(d/2)} \\tag{2.2}$$"]
omega = torch.tensor([1.0, 0.1, 0.01])
rows = [[t, *(f"{value:.2f}" for value in (t * omega).cos().tolist())] for t in (0, 1, 10, 100)]
show_table(rows, columns=["$t$", r"$\cos t$", r"$\cos 0.1\,t$", r"$\cos 0.01\,t$"])

# %% [markdown]
# The first wave tells 0 from 1, but its value at 100 could belong to many steps; the third knows 100, but not 0 from 1.
#
# Why sines as well? Because with both, a shift in time is a *rotation*, the same wherever it starts. By the addition
# theorems,
#
# $$\begin{pmatrix}\cos\omega_k(t+s)\\ \sin\omega_k(t+s)\end{pmatrix}
# =\begin{pmatrix}\cos\omega_ks&-\sin\omega_ks\\ \sin\omega_ks&\cos\omega_ks\end{pmatrix}
# \begin{pmatrix}\cos\omega_kt\\ \sin\omega_kt\end{pmatrix} \tag{2.3}$$
#
# so a linear layer can compute 'fifty steps earlier'. And the inner product of two embeddings depends on nothing but the
# distance between the steps, since $\cos a\cos b+\sin a\sin b=\cos(a-b)$:
#
# $$e(t)\cdot e(t')=\sum_k\cos\bigl(\omega_k(t-t')\bigr) \tag{2.4}$$
#
# #### Exercise 1: the code of a step
#
# *Formula, medium, 6 minutes.* Fill in `timestep_embedding`, (2.2), for all steps of a batch at once.


# %% tags=["export", "exercise"]
def timestep_embedding(t, dim, max_period=10_000.0):
    """Encode each step as cosines and sines of geometrically spaced frequencies.

    Args:
        t: steps of the original schedule, (B,), integer or floating point.
        dim: length of the embedding, even.
        max_period: P; the frequencies fall from 1 towards 1 / P.

    Returns:
        (B, dim), the cosines first; float32 for integer t, else t's dtype.

    Raises:
        ValueError: if dim is odd.

    Source: Vaswani et al. 2017, section 3.5, with the cosines first as in Ho et al.'s successors.
    """
    if dim % 2:
        raise ValueError(f"dim must be even, for as many cosines as sines; got dim={dim}")
    ### BEGIN SOLUTION
    if not t.is_floating_point():
        t = t.float()
    k = torch.arange(dim // 2, dtype=t.dtype, device=t.device)
    # omega_k = P^(-k / (dim / 2))
    omega = torch.exp(-math.log(max_period) * k / (dim // 2))  # (dim / 2,)
    angles = t[:, None] * omega  # (B, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)  # (B, dim)
    ### END SOLUTION


# %%
check("unet.timestep_embedding", timestep_embedding)

# %% [markdown]
# To check (2.3), read each pair as one complex number $e^{i\omega_kt}$: a rotation is a multiplication by
# $e^{i\omega_ks}$.

# %% slide=["# A shift in time is a rotation", "$$\\begin{pmatrix}\\cos\\omega(t+s)\\\\ \\sin\\omega(t+s)\\end{pmatrix}=\\begin{pmatrix}\\cos\\omega s&-\\sin\\omega s\\\\ \\sin\\omega s&\\cos\\omega s\\end{pmatrix}\\begin{pmatrix}\\cos\\omega t\\\\ \\sin\\omega t\\end{pmatrix} \\tag{2.3}$$", "So a linear layer can compute 'fifty steps earlier'. And likeness depends on the distance alone:", "(2.4)"]
t, shift = torch.arange(0.0, 1000.0, 7.0, **exact), 50.0
omega = 10_000.0 ** (-torch.arange(32, **exact) / 32)


def as_complex(embedding):
    """The pairs (cosine, sine) of an embedding (B, dim) as complex numbers, (B, dim / 2)."""
    return torch.complex(*embedding.chunk(2, dim=1))


turned = as_complex(timestep_embedding(t, 64)) * torch.exp(1j * omega * shift)
later = as_complex(timestep_embedding(t + shift, 64))
verify("2.3", torch.view_as_real(turned), torch.view_as_real(later), atol=1e-10)

# %%
embedding = timestep_embedding(t, 64)
distance = t[:, None] - t  # (143, 143)
verify("2.4", embedding @ embedding.T, (omega * distance[:, :, None]).cos().sum(dim=-1), atol=1e-10)

# %% slide=["# Neighbouring steps are alike, whatever the step", "[picture]", "Left: fast and slow waves. Right: how alike other steps are to 200 and 700, one curve at two places."] tags=["draw"]
every_step = timestep_embedding(torch.arange(1000), 64)  # (1000, 64)
figure, axes = plt.subplots(1, 2, figsize=(11, 3.2), width_ratios=[3, 2], layout="constrained")
axes[0].imshow(every_step.T, aspect="auto", interpolation="nearest")
axes[0].grid(False)
axes[0].set(xlabel="step t", ylabel="entry of the embedding")
for step, colour in zip((200, 700), colours):
    axes[1].plot(every_step @ every_step[step] / 32, color=colour, label=f"t' = {step}")
axes[1].set(xlabel="step t", ylabel=r"$e(t)\cdot e(t')\,/\,32$")
axes[1].legend()
show(
    figure,
    "Left, waves over the steps, fast ones to nearly constant ones. Right, one peaked curve at two places.",
)

# %% [markdown]
# *Left: all embeddings side by side. Each row is a wave; cosines above, sines below, the fast ones first. Right: how similar
# the other steps are to steps 200 and 700. It is one curve, moved: (2.4).*
#
# Two linear layers with a nonlinearity between them turn this code into the **embedding** that every block of the
# network receives. The nonlinearity in this chapter is always the SiLU, $x\,/\,(1+e^{-x})$, a smooth ReLU.


# %% tags=["export"]
class StepEmbedding(nn.Sequential):
    """Turn steps into the embedding that every block receives: their code, then two layers.

    Args:
        code_dim: length of the code, as `timestep_embedding` makes it; even.
        dim: length of the embedding.

    Source: Ho et al. 2020, appendix B.
    """

    def __init__(self, code_dim, dim):
        super().__init__(nn.Linear(code_dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        """Map steps t (B,) to (B, dim), in the dtype of the layers."""
        first = self[0]
        return super().forward(timestep_embedding(t, first.in_features).to(first.weight.dtype))


# %% [markdown] tags=["optional"]
# ### Labels *(at a second reading)*
#
# Later chapters tell the network what the picture should show. The simplest way is a table with one learned row per class,
# added to the embedding of the step. Each table has an extra row, 'no label', for chapter 05. Several labels, such as
# shape and colour, have a table each, and the rows add up.


# %% tags=["export"]
class LabelEmbedding(nn.Module):
    """Embed one or several class labels and add them up; each has an extra row for 'no label'.

    Args:
        num_classes: the number of classes, or a tuple of numbers for several labels (shape, colour).
        dim: length of the embedding.

    Source: Ho and Salimans 2022, section 3.2 (the null label is index num_classes).
    """

    def __init__(self, num_classes, dim):
        super().__init__()
        self.num_classes = (num_classes,) if isinstance(num_classes, int) else tuple(num_classes)
        self.tables = nn.ModuleList(nn.Embedding(n + 1, dim) for n in self.num_classes)

    def forward(self, labels):
        """Map labels, (B,) or (B, number of labels) integers, to (B, dim); ValueError on any other."""
        columns = labels[:, None] if labels.ndim == 1 else labels  # (B, number of labels)
        is_integer = not columns.is_floating_point() and columns.dtype != torch.bool
        if columns.shape[1:] != (len(self.tables),) or not is_integer:
            raise ValueError(
                f"cond must hold {len(self.tables)} integer label(s) per sample; "
                f"got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        columns = columns.long().unbind(dim=1)
        for column, count in zip(columns, self.num_classes, strict=True):
            if column.numel() and not 0 <= column.min() <= column.max() <= count:
                raise ValueError(
                    f"cond must hold labels in [0, {count}], the last meaning none; got {column}"
                )
        return sum(table(column) for table, column in zip(self.tables, columns, strict=True))


# %%
shape_and_colour = LabelEmbedding((8, 8), dim=16)
red_star, no_label = torch.tensor([3, 0]), torch.tensor([8, 8])
embedded = shape_and_colour(torch.stack([red_star, no_label]))  # (2, 16)
shape_table, colour_table = shape_and_colour.tables
assert torch.equal(embedded[0], shape_table.weight[3] + colour_table.weight[0])
print(f"rows of the two tables: {len(shape_table.weight)} and {len(colour_table.weight)}")

# %% [markdown] tags=["core"]
# ## The residual block
#
# Most of a U-Net's work is done by one kind of block: two convolutions, with a normalisation and a nonlinearity before
# each, the embedding in between, and a path around it all.


# %% slide=["# The residual block: two convolutions, and a way around", "[picture]", "Above the path around; below, the step comes in, by two numbers for each channel."]
def draw_boxes(axis, boxes, width=1.5, height=0.7):
    """Draw named boxes: {text: (x, y, colour)}, each centred at its place."""
    for text, (x, y, colour) in boxes.items():
        corner = (x - width / 2, y - height / 2)
        style = {"facecolor": colour, "edgecolor": "black", "alpha": 0.35, "linewidth": 0.8}
        axis.add_patch(FancyBboxPatch(corner, width, height, boxstyle="round,pad=0.02", **style))
        axis.text(x, y, text, ha="center", va="center", fontsize=11)


def draw_arrows(axis, arrows, **style):
    """Draw arrows from (x, y) to (x, y)."""
    for start, end in arrows:
        axis.annotate("", end, start, arrowprops={"arrowstyle": "->", "linewidth": 1.2} | style)


blue, red, green, purple = colours[:4]
chain_of_boxes = {
    "GN": (1, 0, green), "SiLU ": (3, 0, purple), "conv $W_1$": (5, 0, blue), "GN ": (7, 0, green),
    "$(1+s)+b$": (9, 0, red), " SiLU": (11, 0, purple), "conv $W_2$\n(zeros)": (13, 0, blue),
}  # fmt: skip
told = {"SiLU": (5, -1.4, purple), "linear $W_e$": (7, -1.4, red)}
path_around = {"skip": (7, 1.4, blue)}
figure, axis = plt.subplots(figsize=(12, 3), layout="constrained")
draw_boxes(axis, chain_of_boxes | told | path_around)
draw_arrows(axis, [((-1, 0), (0.2, 0)), ((13.8, 0), (14.7, 0)), ((15.3, 0), (16.4, 0))])
draw_arrows(axis, [((x + 0.8, 0), (x + 1.2, 0)) for x in range(1, 13, 2)])
draw_arrows(axis, [((-0.6, 0), (6.2, 1.4))], connectionstyle="angle,angleA=90,angleB=0,rad=9")
draw_arrows(axis, [((7.8, 1.4), (15, 0.25))], connectionstyle="angle,angleA=0,angleB=90,rad=9")
draw_arrows(axis, [((3.2, -1.4), (4.2, -1.4)), ((5.8, -1.4), (6.2, -1.4)), ((7.8, -1.4), (9, -0.4))])
for text, place in {"$x$": (-1.3, 0), "+": (15, 0), "$y$": (16.7, 0), "embedding $e$": (2.2, -1.4)}.items():
    axis.text(*place, text, ha="center", va="center", fontsize=13)
axis.text(8.6, -1.4, "$s,\\ b$", fontsize=13)
axis.set(xlim=(-1.7, 17), ylim=(-2, 2))
axis.axis("off")
show(
    figure,
    "A chain of seven boxes from x to a plus sign; above it the skip, below it the embedding's way in.",
)

# %% [markdown]
# *The block. Above, the path around; below, where the step comes in.*
#
# ### Each image normalised by itself
#
# Deep networks train better when the numbers between layers stay of the order of 1. Batch normalisation shares its
# statistics among the images of a batch. That will not do here: a batch mixes nearly clean images with pure noise, and in
# sampling all are at one step. **Group normalisation** computes mean and variance for each image alone,
# over the pixels of a *group* of channels:
#
# $$\mathrm{GN}(h)_{bcij}=\gamma_c\,\frac{h_{bcij}-\mu_{bg}}{\sqrt{\sigma^2_{bg}+10^{-5}}}+\delta_c,
# \qquad\mu_{bg},\ \sigma^2_{bg}:\text{ of image } b,\text{ over channels } c\in g\text{ and all pixels} \tag{2.5}$$
#
# with a learned $\gamma_c$ and $\delta_c$ per channel. The papers use 32 groups; in our narrow layers a group has at least
# eight channels.


# %% tags=["export"]
def group_norm(channels):
    """Group normalisation with at most 32 groups of at least 8 channels each, or a single group."""
    return nn.GroupNorm(math.gcd(32, max(channels // 8, 1), channels), channels)


# %% slide=["# Each image is normalised by itself", "? Why not batch normalisation?", "A batch mixes nearly clean images with pure noise; in sampling all are at one step.", "$$\\mathrm{GN}(h)_{bcij}=\\gamma_c\\,\\frac{h_{bcij}-\\mu_{bg}}{\\sqrt{\\sigma^2_{bg}+10^{-5}}}+\\delta_c \\tag{2.5}$$"]
torch.manual_seed(0)
h = 3 + 2 * torch.randn(4, 64, 6, 6, **exact)
norm = group_norm(64).double()
for parameter in norm.parameters():
    nn.init.normal_(parameter)
gamma, delta = norm.weight[:, None, None], norm.bias[:, None, None]  # (64, 1, 1) each
grouped = h.unflatten(1, (norm.num_groups, -1))  # (4, 8, 8, 6, 6)
mean = grouped.mean(dim=(2, 3, 4), keepdim=True)
variance = grouped.var(dim=(2, 3, 4), correction=0, keepdim=True)
normalised = ((grouped - mean) / (variance + 1e-5).sqrt()).flatten(1, 2)  # (4, 64, 6, 6)
verify("2.5", norm(h), gamma * normalised + delta, atol=1e-12)
assert torch.equal(norm(h)[:1], norm(h[:1]))  # the other images of the batch do not matter

# %% [markdown]
# ### What the step changes
#
# Normalised feature maps $\hat h$ have lost their size, one sign of how noisy the image was. The embedding says the step
# outright, by two numbers per channel: how much of it to use, and where its zero lies. (This scale has nothing to do with
# guidance.)
#
# $$h'_{bcij}=\hat h_{bcij}\,(1+\text{scale}_{bc})+\text{shift}_{bc} \tag{2.6, definition}$$
#
# For instance, a channel that responds to fine edges is of no use at $t=999$. A scale of $-1$ turns it off there, and a scale
# of 0 leaves it as it is at $t=10$. A large negative shift turns it off as well, by way of the SiLU that follows.


# %% slide=["# The step acts by scale and shift", "Normalised maps have lost their size, one sign of the noise. The embedding says the step outright:", "(2.6)", "A channel for fine edges is of no use at $t=999$: a scale of $-1$ turns it off."] tags=["export"]
def scale_shift(h, scale, shift):
    """Let scale and shift (B, C) act on each channel of h (B, C, H, W): h (1 + scale) + shift.

    Source: Dhariwal and Nichol 2021, section 3.1 (adaptive group normalisation, y_s = 1 + scale).
    """
    return h * (1 + scale[:, :, None, None]) + shift[:, :, None, None]


# %% [markdown]
# ### The path around
#
# Let $W_1$, $W_2$ be the two convolutions, $e$ the embedding and $W_e$ a linear layer. The block adds what it computes
# to what it received:
#
# $$y=\mathrm{skip}(x)+W_2*\mathrm{silu}\Bigl(\mathrm{GN}\bigl(W_1*\mathrm{silu}(\mathrm{GN}(x))\bigr)(1+s)+b\Bigr),
# \qquad(s,b)=W_e\,\mathrm{silu}(e) \tag{2.7}$$
#
# where *skip* does nothing, or fits the number of channels by a convolution of $1\times1$.
#
# #### Exercise 2: the residual block
#
# *Algorithm, medium, 10 minutes.* Fill in `residual_block`: (2.7), five lines. The layers come as arguments, ready to be
# called; `F.silu` is the nonlinearity.


# %% tags=["export", "exercise"]
def residual_block(x, embedding, norm_in, conv_in, to_scale_shift, norm_out, conv_out, skip):
    """Pass feature maps through two convolutions, told the embedding, and around them.

    Args:
        x: feature maps, (B, in_channels, H, W).
        embedding: of step and label, (B, D).
        norm_in, conv_in: layers of feature maps, in front: in_channels -> in_channels, -> out_channels.
        to_scale_shift: layer, (B, D) -> (B, 2 out_channels), the scales first.
        norm_out, conv_out: layers of feature maps, behind: out_channels -> out_channels.
        skip: layer of feature maps, around all of it: in_channels -> out_channels.

    Returns:
        (B, out_channels, H, W).

    Source: Dhariwal and Nichol 2021, section 3.
    """
    ### BEGIN SOLUTION
    h = conv_in(F.silu(norm_in(x)))  # (B, out_channels, H, W)
    scale, shift = to_scale_shift(F.silu(embedding)).chunk(2, dim=1)  # (B, out_channels) each
    h = scale_shift(norm_out(h), scale, shift)
    h = conv_out(F.silu(h))
    return skip(x) + h
    ### END SOLUTION


# %% slide=["# The block in five lines", "[code residual_block]"]
check("unet.residual_block", residual_block)

# %% [markdown]
# The last convolution starts at **zero**. Then the whole branch is zero and $y=\mathrm{skip}(x)$; where the number of
# channels stays,
#
# $$y=x,\qquad\frac{\partial y}{\partial x}=I\qquad\text{at the start of training} \tag{2.8}$$
#
# However many such blocks are stacked, at first signal and gradient pass all of them untouched.


# %% tags=["export"]
def zero_init(module):
    """Set all parameters of a module to zero, so that the branch it ends adds nothing at first."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


# %% tags=["export"]
class ResidualBlock(nn.Module):
    """Two convolutions around a skip, the second one's input scaled and shifted by the embedding.

    Args:
        in_channels, out_channels: channels before and after.
        embedding_dim: length of the embedding of step and label.

    Source: Dhariwal and Nichol 2021, section 3.
    """

    def __init__(self, in_channels, out_channels, embedding_dim):
        super().__init__()
        self.norm_in = group_norm(in_channels)
        self.conv_in = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.embedding = nn.Linear(embedding_dim, 2 * out_channels)
        self.norm_out = group_norm(out_channels)
        self.conv_out = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, embedding):
        """Map x (B, in_channels, H, W) and embedding (B, embedding_dim) to (B, out_channels, H, W)."""
        inward, outward = (self.norm_in, self.conv_in), (self.norm_out, self.conv_out)
        return residual_block(x, embedding, *inward, self.embedding, *outward, self.skip)


# %% [markdown]
# First what holds at the start, with the derivative of all outputs by all inputs:

# %% slide=["# Branches end in zeros, so training begins with the identity", "(2.8)", "? Does a layer of zeros ever get away from zero?", "Yes: its gradient is its *input* times the gradient at its output. In the block, only the layers before it wait one step."]
torch.manual_seed(0)
new_block = ResidualBlock(8, 8, embedding_dim=16).double()
x, e = torch.randn(1, 8, 2, 2, **exact), torch.randn(1, 16, **exact)
jacobian = torch.autograd.functional.jacobian(lambda x: new_block(x, e), x).reshape(32, 32)
assert torch.equal(new_block(x, e), x)
verify("2.8", jacobian, torch.eye(32, **exact), atol=1e-12)

# %% [markdown]
# Does a layer of zeros ever get away from zero? The gradient of its weights is its input times the gradient at its output,
# and in a block by itself neither is zero. Only the layers in front of it, whose gradient has to pass through its zeros, wait
# for one step. (In the whole network the head will begin with zeros, too: first it moves alone, then the ends of the branches
# and all that lies outside of them, then the rest.)


# %%
def gradient_sizes(block):
    """The largest gradient of the first and of the last convolution, for an arbitrary loss."""
    block.zero_grad()
    (block(x, e) - 1).square().mean().backward()
    return block.conv_in.weight.grad.abs().max().item(), block.conv_out.weight.grad.abs().max().item()


optimizer = torch.optim.SGD(new_block.parameters(), lr=0.1)
for step in range(2):
    first, last = gradient_sizes(new_block)
    print(f"step {step}: gradient reaches the first convolution: {first > 0}, the last: {last > 0}")
    optimizer.step()

# %% [markdown]
# Now (2.7), with other weights everywhere: the module against plain functions of its weights.

# %%
block = ResidualBlock(8, 16, embedding_dim=16).double()
for parameter in block.parameters():
    nn.init.normal_(parameter, std=0.3)
weights = block.state_dict()
x, e = torch.randn(3, 8, 5, 5, **exact), torch.randn(3, 16, **exact)

# %%
scale_and_shift = F.linear(F.silu(e), weights["embedding.weight"], weights["embedding.bias"])  # (3, 32)
scale, shift = scale_and_shift[:, :, None, None].chunk(2, dim=1)  # (3, 16, 1, 1) each
h = F.silu(F.group_norm(x, 1, weights["norm_in.weight"], weights["norm_in.bias"]))
h = F.conv2d(h, weights["conv_in.weight"], weights["conv_in.bias"], padding=1)
h = F.group_norm(h, 2, weights["norm_out.weight"], weights["norm_out.bias"]) * (1 + scale) + shift
h = F.conv2d(F.silu(h), weights["conv_out.weight"], weights["conv_out.bias"], padding=1)
verify("2.7", block(x, e), F.conv2d(x, weights["skip.weight"], weights["skip.bias"]) + h, atol=1e-10)

# %% [markdown] tags=["core"]
# ## Self-attention
#
# A convolution sees three pixels across. Two ends of one object may be twenty pixels apart, and at high noise only the
# whole picture says what is there. **Attention** lets each pixel look at all others at once, and learn where to look.
#
# Three things are computed from each pixel, a *query* $q$ ('what do I look for?'), a *key* $k$ ('what am I?') and a
# *value* $v$ ('what do I say?'). A query is compared with all keys by inner products; the softmax turns these scores into
# weights that add up to 1; the answer is the mean of the values under these weights. Three tokens in numbers:

# %% slide=["# Attention: every pixel asks all others", "- query: what do I look for?", "- key: what am I?", "- value: what do I say?", "[table]"]
q = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
k = torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
v = torch.tensor([[10.0], [20.0], [60.0]])
attention_weights = (q @ k.T / math.sqrt(2)).softmax(dim=1)  # (3 queries, 3 keys)
rows = [
    [i + 1, *(f"{weight:.2f}" for weight in row), f"{result.item():.1f}"]
    for i, (row, result) in enumerate(zip(attention_weights, attention_weights @ v))
]
show_table(rows, columns=["query", "weight of key 1", "key 2", "key 3", "answer"])

# %% [markdown]
# The first query matches the first key best (inner product 4) and the third half as well (2); the last one matches all
# alike. In general, with $N$ queries as the rows of $Q$, and $M$ keys and values as
# those of $K$ and $V$,
#
# $$\mathrm{attention}(Q,K,V)=\mathrm{softmax}\!\left(\frac{QK^\top}{\sqrt d}\right)V,
# \qquad\text{the softmax over each row} \tag{2.9}$$
#
# Why the $\sqrt d$? If the entries of $q$ and $k$ are independent with mean 0 and variance 1, each of the $d$ products
# has mean 0 and variance 1, and so
#
# $$\operatorname{Var}(q\cdot k)=d \tag{2.10}$$
#
# Without the root, the softmax of long vectors would pick a single key, and pass on next to no gradient. For the check all
# combinations of entries $\pm1$ stand in for random vectors:

# %% slide=["# Weights that add up to 1, from inner products", "$$\\mathrm{attention}(Q,K,V)=\\mathrm{softmax}\\!\\left(\\frac{QK^\\top}{\\sqrt d}\\right)V \\tag{2.9}$$", "[code attention]", "# Why the root of $d$?", "$d$ products of mean 0 and variance 1:", "(2.10)", "Without the root, the softmax of long vectors picks a single key, and passes on next to no gradient."]
d = 4
signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], **exact)] * d)  # (16, 4)
verify("2.10", (signs @ signs.T).var(correction=0), float(d), atol=1e-12)

# %% [markdown]
# #### Exercise 3: attention
#
# *Formula, easy, 4 minutes.* Fill in `attention`, (2.9). There may be any number of axes in front, such as batch and heads.


# %% tags=["export", "exercise"]
def attention(q, k, v):
    """Mix the values by how well each query matches each key.

    Args:
        q: queries, (..., N, d).
        k: keys, (..., M, d).
        v: values, (..., M, e).

    Returns:
        (..., N, e), a weighted mean of the values for each query.

    Source: Vaswani et al. 2017, equation 1.
    """
    ### BEGIN SOLUTION
    # softmax(q k^T / sqrt(d)) v, the softmax over the keys
    weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)  # (..., N, M)
    return weights @ v
    ### END SOLUTION


# %%
check("unet.attention", attention)

# %%
q, k, v = (torch.randn(2, 4, *shape, **exact) for shape in ((7, 16), (5, 16), (5, 8)))
verify("2.9", attention(q, k, v), F.scaled_dot_product_attention(q, k, v), atol=1e-12)

# %% [markdown]
# ### The layer
#
# Queries, keys and values are linear functions of the normalised feature map. The channels are split among several
# **heads**, each with its own scores, so that a pixel can look at several places for several reasons. One more linear
# layer mixes the heads, and the result is added to the input. With $X$, the pixels of the normalised map as rows,
#
# $$y=x+[\,a_1,\dots,a_h\,]\,W^o,\qquad
# a_i=\mathrm{attention}(XW^q_i,XW^k_i,XW^v_i),\qquad X=\mathrm{GN}(x) \tag{2.11}$$
#
# #### Exercise 4: an attention layer
#
# *Algorithm, hard, 15 minutes.* Fill in `self_attention`, (2.11). Pixels become tokens, channels are split into heads,
# `attention` mixes them, heads are merged, tokens become pixels again. One layer makes all queries, keys and values:
# of its $3C$ outputs the first $C$ are queries, and of these the first $C/h$ belong to the first head. Write the shape
# beside each line: a wrong order of axes raises no error.


# %% tags=["export", "exercise"]
def self_attention(x, norm, qkv, project, heads):
    """Let every pixel look at every other one, in several heads, and add what it finds.

    Args:
        x: feature maps, (B, C, H, W).
        norm: layer of feature maps, keeps the shape.
        qkv: layer of tokens, (B, N, C) -> (B, N, 3 C): all queries, then all keys, then all values.
        project: layer of tokens, (B, N, C) -> (B, N, C), which mixes the heads.
        heads: the number of heads, a divisor of C; each takes C / heads channels side by side.

    Returns:
        (B, C, H, W).

    Source: Vaswani et al. 2017, section 3.2.2; Dhariwal and Nichol 2021, section 3.
    """
    ### BEGIN SOLUTION
    batch, channels, height, width = x.shape
    tokens = norm(x).flatten(2).transpose(1, 2)  # (B, H W, C)
    split = qkv(tokens).unflatten(2, (3, heads, -1))  # (B, H W, 3, heads, C / heads)
    q, k, v = split.permute(2, 0, 3, 1, 4)  # (B, heads, H W, C / heads) each
    mixed = attention(q, k, v).transpose(1, 2).flatten(2)  # (B, H W, C)
    h = project(mixed).transpose(1, 2).reshape(batch, channels, height, width)
    return x + h
    ### END SOLUTION


# %% slide=["# The layer: pixels become tokens, and again pixels", "[code self_attention: tokens .. return]", "A wrong order of axes raises no error. Write the shapes down."]
check("unet.self_attention", self_attention)


# %% tags=["export"]
class SelfAttention(nn.Module):
    """Every pixel looks at every other one, in several heads; added to its input.

    Args:
        channels: channels of the feature map.
        head_dim: channels per head; a narrower map has a single head.

    Raises:
        ValueError: if channels is above head_dim and no multiple of it.

    Source: Dhariwal and Nichol 2021, section 3 (64 channels a head there).
    """

    def __init__(self, channels, head_dim=32):
        super().__init__()
        head_dim = min(head_dim, channels)
        if channels % head_dim:
            raise ValueError(f"channels must be a multiple of head_dim={head_dim}; got channels={channels}")
        self.heads = channels // head_dim
        self.norm = group_norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.project = zero_init(nn.Linear(channels, channels))

    def forward(self, x, cond=None):
        """Map x (B, C, H, W) to (B, C, H, W); cond is for attention that looks outside the image."""
        return self_attention(x, self.norm, self.qkv, self.project, self.heads)


# %% [markdown]
# PyTorch's `nn.MultiheadAttention` keeps its weights in the same order. (The last layer starts at zero here too; with zeros
# both sides would agree whatever was in between.)

# %%
layer = SelfAttention(64).double()
nn.init.normal_(layer.project.weight)
library = nn.MultiheadAttention(64, num_heads=layer.heads, batch_first=True).double()
library.load_state_dict({
    "in_proj_weight": layer.qkv.weight, "in_proj_bias": layer.qkv.bias,
    "out_proj.weight": layer.project.weight, "out_proj.bias": layer.project.bias,
})  # fmt: skip
x = torch.randn(2, 64, 4, 4, **exact)
tokens = layer.norm(x).flatten(2).transpose(1, 2)  # (2, 16, 64)
mixed, _ = library(tokens, tokens, tokens)
verify("2.11", layer(x), x + mixed.transpose(1, 2).reshape(2, 64, 4, 4), atol=1e-10)

# %% [markdown]
# ### What attention does not know
#
# Nothing in (2.9) says *where* a token is. If a permutation $P$ shuffles the pixels, the results come out shuffled, and
# are otherwise the same:
#
# $$\mathrm{attention}(PQ,PK,PV)=P\,\mathrm{attention}(Q,K,V) \tag{2.12}$$
#
# because $P$ reorders rows and columns of the scores, and each row's softmax and sum do not mind the order. Where things
# are is known to the convolutions around it, which feel the border of the image, beyond which there are zeros.

# %% slide=["# Attention does not know where a pixel is", "? Shuffle all pixels. What happens to the answers?", "(2.12)", "They come shuffled, and are otherwise the same. The convolutions around it know places, from the border."]
q, k, v = torch.randn(3, 16, 8, **exact)
P = torch.eye(16, **exact)[torch.randperm(16)]
verify("2.12", attention(P @ q, P @ k, P @ v), P @ attention(q, k, v), atol=1e-12)

# %% [markdown]
# ### What it costs
#
# Count multiplications, for $N$ pixels and $C$ channels. Scores and mixture each take $C$ of them for every *pair* of
# pixels; the four linear maps around them, to queries, keys and values and back, take $C$ for each pixel and channel; a
# convolution takes $9C$ for each pixel and output channel:
#
# $$\text{attention layer: }\ 2N^2C+4NC^2,\qquad\text{one } 3\times3\text{ convolution: }\ 9NC^2 \tag{2.13}$$
#
# PyTorch can count what really happens:


# %%
def count_multiplications(function, *arguments):
    """Multiplications in matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops() // 2


N, C = 8 * 8, 32
counted = [
    count_multiplications(layer_of_C, torch.randn(1, C, 8, 8))
    for layer_of_C in (SelfAttention(C), nn.Conv2d(C, C, 3, padding=1))
]
costs = torch.tensor([2 * N**2 * C + 4 * N * C**2, 9 * N * C**2])
verify("2.13", torch.tensor(counted), costs, atol=0)

# %% slide=["# It is for coarse levels: its price is quadratic", "$$\\text{attention: }2N^2C+4NC^2,\\qquad 3\\times3\\text{ convolution: }9NC^2 \\tag{2.13}$$", "[table]"]
C = 64
rows = [
    [f"{side} × {side}", *(f"{cost / 1e6:.1f}" for cost in (2 * N**2 * C, 4 * N * C**2, 9 * N * C**2))]
    for side in (64, 32, 16, 8)
    for N in [side**2]
]
show_table(rows, columns=["pixels", "pairs, million", "linear maps", "one convolution"])

# %% [markdown]
# *Millions of products, for C = 64 channels: the two terms of attention, and a convolution.*
#
# Twice the resolution, sixteen times the pairs. The layer costs as much as one convolution at $N=2.5\,C$, here some 13
# pixels across. So attention is for the low resolutions, where each pixel stands for a large part of the picture anyway.

# %% [markdown] tags=["core"]
# ## Down and up
#
# To halve the resolution: a convolution that moves two pixels at a time. To double it: repeat each pixel in a block of
# $2\times2$, then smooth by a convolution. (A transposed convolution does both at once, but where its kernel is no multiple of
# the step it gives some pixels more contributions than others, which shows as a checkerboard: Odena et al.)
#
# What does the way down lose? Let $D$ be the averaging over $2\times2$ blocks and $U$ the repetition. Then $UDx$ is the
# coarse picture and $r=x-UDx$ what the way up cannot know. They share nothing: $Dr=0$, so within a block $UDx$ is
# constant and $r$ adds up to 0, and the energies add:
#
# $$x=UDx+r,\qquad\|x\|^2=\|UDx\|^2+\|r\|^2 \tag{2.14}$$

# %%
x = torch.randn(5, 3, 8, 8, **exact)
coarse = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="nearest")
energies = torch.stack([part.square().sum(dim=(1, 2, 3)) for part in (coarse, x - coarse)])  # (2, 5)
verify("2.14", energies.sum(dim=0), x.square().sum(dim=(1, 2, 3)), atol=1e-10)

# %% slide=["# Skips carry what coarseness loses", "[picture]", "Two images, what is left of them at 8 pixels, and the rest: it has the edges."] tags=["draw"]
picture = three_images[:2]
coarse_picture = F.interpolate(F.avg_pool2d(picture, 4), scale_factor=4, mode="nearest")
shown = torch.stack([picture, coarse_picture, picture - coarse_picture], dim=1).flatten(0, 1)
figure = show_grid(shown, columns=3, titles=["$x$", "$UDx$", "$r$"], inches_per_image=1.5)
show(
    figure,
    "Two pictures, their coarse versions in blocks, and the differences, in which the outlines stand out.",
)

# %% [markdown]
# *Two images, what is left of them at 8 pixels (two halvings), and the rest, which has the edges.*
#
# The rest is what the **skips** carry. Every feature map on the way down is kept; the way up takes them back, the last
# one first, and concatenates each to its own channels before a block. So the network comes by detail and the whole at
# once.
#
# The modules: a `Stage` is a residual block, with attention if wanted; a `DownLevel` and an `UpLevel` hold the stages of
# one resolution, the way up one more, for the skip that the last halving, or the very first convolution, left behind.
# `DownLevels`, the whole way down, gives back every map on it; chapters 03 and 04 will use it without a way up. The kind
# of attention is a parameter: chapter 07 will pass one that looks at a text.


# %% tags=["export"]
class Stage(nn.Module):
    """A residual block, and attention after it where a factory for one is given.

    Args:
        in_channels, out_channels: channels before and after.
        embedding_dim: length of the embedding.
        attention: None, or a factory: channels -> module called as (h, cond).
    """

    def __init__(self, in_channels, out_channels, embedding_dim, attention=None):
        super().__init__()
        self.residual = ResidualBlock(in_channels, out_channels, embedding_dim)
        self.attention = attention(out_channels) if attention else None

    def forward(self, h, embedding, cond):
        """Map h (B, in_channels, H, W), with embedding and cond, to (B, out_channels, H, W)."""
        h = self.residual(h, embedding)
        return h if self.attention is None else self.attention(h, cond)


class DownLevel(nn.Module):
    """The stages of one resolution on the way down; all but the last level then halve it.

    Args:
        in_channels, out_channels: channels before and after.
        num_blocks: the number of stages.
        embedding_dim, attention: as in Stage.
        last: whether this is the lowest resolution.
    """

    def __init__(self, in_channels, out_channels, num_blocks, embedding_dim, attention, last):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.stages = nn.ModuleList(Stage(*pair, embedding_dim, attention) for pair in pairwise(widths))
        self.downsample = None if last else nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1)
        self.skip_channels = widths[1:] + [out_channels] * (not last)

    def forward(self, h, embedding, cond):
        """Map h (B, C, H, W), with embedding and cond, to all maps on the way; the last is the output."""
        outputs = []
        for stage in self.stages:
            h = stage(h, embedding, cond)
            outputs.append(h)
        if self.downsample is not None:
            outputs.append(self.downsample(h))
        return outputs


class DownLevels(nn.ModuleList):
    """The way down: a DownLevel for each resolution, from the highest to the lowest.

    Args:
        widths: the channels of each level.
        num_blocks, embedding_dim: as in DownLevel.
        attention_at: for each level None, or a factory as in Stage.
    """

    def __init__(self, widths, num_blocks, embedding_dim, attention_at):
        last = len(widths) - 1
        super().__init__(
            DownLevel(before, after, num_blocks, embedding_dim, attention_at[level], level == last)
            for level, (before, after) in enumerate(pairwise([widths[0], *widths]))
        )

    def forward(self, h, embedding, cond):
        """Map h (B, widths[0], H, W), with embedding and cond, to all maps on the way, h the first."""
        maps = [h]
        for level in self:
            maps += level(maps[-1], embedding, cond)
        return maps


# %% tags=["export"]
class UpLevel(nn.Module):
    """The stages of one resolution on the way up, each fed with a skip; all but the last then double it.

    Args:
        in_channels, out_channels: channels before and after.
        skip_channels: the channels of each stage's skip.
        embedding_dim, attention: as in Stage.
        last: whether this is the highest resolution.
    """

    def __init__(self, in_channels, out_channels, skip_channels, embedding_dim, attention, last):
        super().__init__()
        widths = [in_channels] + [out_channels] * (len(skip_channels) - 1)
        self.stages = nn.ModuleList(
            Stage(width + skip, out_channels, embedding_dim, attention)
            for width, skip in zip(widths, skip_channels, strict=True)
        )
        self.upsample = None if last else nn.Conv2d(out_channels, out_channels, 3, padding=1)

    def forward(self, h, skips, embedding, cond):
        """Map h (B, C, H, W), with skips, one for each stage, embedding and cond, to the next resolution."""
        for stage, skip in zip(self.stages, skips, strict=True):
            h = stage(torch.cat([h, skip], dim=1), embedding, cond)
        if self.upsample is not None:
            h = self.upsample(F.interpolate(h, scale_factor=2, mode="nearest"))
        return h


# %%
down = DownLevel(8, 16, num_blocks=2, embedding_dim=16, attention=None, last=False)
x, e = torch.randn(1, 8, 8, 8), torch.randn(1, 16)
maps = [x, *down(x, e, cond=None)]
print("kept on the way down:", [tuple(feature_map.shape[1:]) for feature_map in maps])

# %% [markdown] tags=["core"]
# ## Patches
#
# At full resolution everything is expensive. So our models fold each patch of $p\times p$ pixels into the channels before
# the first convolution, and unfold it after the last: nothing is lost, and there are $p^2$ times fewer places to compute
# at. (Vision transformers do it too, chapter 08.) In numbers:

# %% slide=["# Patches: fold pixels into channels", "[output]", "Nothing is lost, and there are four times fewer places to compute at."]
numbers = torch.arange(16).reshape(1, 1, 4, 4)
print(numbers[0, 0])
print("its 2 x 2 patches, each as one column:")
print(F.pixel_unshuffle(numbers, 2).flatten(2)[0])

# %% [markdown]
# Pixel $(i,j)$ of the patch in row $r$ and column $s$ goes to channel $cp^2+ip+j$ at place $(r,s)$:
#
# $$y_{b,\ cp^2+ip+j,\ r,\ s}=x_{b,\ c,\ rp+i,\ sp+j} \tag{2.15}$$
#
# #### Exercise 5: patches
#
# *Formula, medium, 7 minutes.* Fill in `patchify`, (2.15), by splitting axes and permuting them.


# %% tags=["export", "exercise"]
def patchify(x, patch_size):
    """Fold each patch of pixels into the channels.

    Args:
        x: images, (B, C, H, W), with H and W multiples of patch_size.
        patch_size: side of a patch, p.

    Returns:
        (B, C p^2, H / p, W / p), channel c p^2 + i p + j holding pixel (i, j) of each patch of channel c.

    Raises:
        ValueError: if H or W is no multiple of patch_size.
    """
    height, width = x.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(f"x must have sides that are multiples of {patch_size}; got {height} x {width}")
    ### BEGIN SOLUTION
    x = x.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # (B, C, H/p, p, W/p, p)
    return x.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)  # (B, C, p, p, H/p, W/p), then C p p -> C p^2
    ### END SOLUTION


# %%
check("unet.patchify", patchify)


# %% tags=["export"]
def unpatchify(x, patch_size):
    """Undo patchify: x (B, C p^2, H, W), with p = patch_size, to (B, C, p H, p W)."""
    x = x.unflatten(1, (-1, patch_size, patch_size))  # (B, C, p, p, H, W)
    return x.permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)  # (B, C, H, p, W, p), then merged


# %% [markdown]
# The slow way, place by place, and there and back again:

# %%
p, x = 3, torch.randn(2, 2, 6, 9, **exact)
by_place = torch.empty(2, 2 * p**2, 2, 3, **exact)
for c, i, j in torch.cartesian_prod(torch.arange(2), torch.arange(p), torch.arange(p)).tolist():
    by_place[:, c * p**2 + i * p + j] = x[:, c, i::p, j::p]
verify("2.15", patchify(x, p), by_place, atol=0)
assert torch.equal(unpatchify(patchify(x, p), p), x)

# %% [markdown]
# #### Question 1: what folding saves
#
# *On paper, 5 minutes.* A network for 32 pixels, with $C$ channels at its highest level, folds $p=4$ instead of 2. By what
# factors do the multiplications of a convolution at that level, of the pairs in (2.13), and of the first convolution, from
# the folded picture to $C$ channels, change? What is the price?
#
# <details>
# <summary>Answer</summary>
#
# $N$ falls from $16^2$ to $8^2$. A convolution, $9NC^2$: a quarter. Pairs, $2N^2C$: a sixteenth. The first convolution,
# $9N\cdot3p^2\cdot C$: the same. The price: one place, with $C$ numbers, has to keep $4\times4$ pixels of three colours
# apart. *Full marks: three factors with reasons, and what a place has to hold.*
#
# </details>

# %% [markdown] tags=["core"]
# ## The whole
#
# This is how the pieces fit together:

# %% slide=["# The whole U-Net", "[picture]", "Down three levels, through the middle, up again; dashed: the skips; red: the embedding, which goes to every block."] tags=["draw"]
grey = "lightgrey"
top = {
    "picture $x_t$\n32×32, 3": (0, 3, grey),
    "fold into\n16×16, 12": (2, 3, purple),
    "first\nconvolution": (4, 3, blue),
}
top |= {"convolution": (12, 3, blue), "unfold": (14, 3, purple), "output\n32×32, 3": (16, 3, grey)}
ways = {
    f"{way} {side}×{side}\n{channels} channels": (8 + sign * (3.3 - 1.1 * row), 1.7 - 1.3 * row, red)
    for way, sign in (("down", -1), ("up", 1))
    for row, (side, channels) in enumerate([(16, 32), (8, 64), (4, 64)])
}
middle_box = {"middle": (8, -1.9, red)}
step_boxes = {"step $t$": (0, 0.2, grey), "waves (2.2)": (0, -0.9, green), "two layers": (0, -2, green)}
figure, axis = plt.subplots(figsize=(12, 5), layout="constrained")
draw_boxes(axis, top | ways | middle_box | step_boxes | {"label": (2.2, -2.9, grey)}, width=1.8, height=0.8)
draw_arrows(axis, [((x + 0.95, 3), (x + 1.05, 3)) for x in (0, 2, 12, 14)])
places = [(4, 3), *[ways[key][:2] for key in list(ways)[:3]], (8, -1.9)]
places += [*[ways[key][:2] for key in list(ways)[:2:-1]], (12, 3)]
draw_arrows(axis, zip(places, places[1:]), shrinkA=19, shrinkB=19)
for (x_left, y), (x_right, _) in zip(places[1:4], places[-2:-5:-1]):
    draw_arrows(axis, [((x_left + 0.95, y), (x_right - 0.95, y))], color=blue, linestyle="--")
draw_arrows(axis, [((0, -0.25), (0, -0.45)), ((0, -1.35), (0, -1.55))])
draw_arrows(axis, [((0.95, -2), (6.9, -2)), ((2.2, -2.45), (2.2, -2.05))], color=red)
axis.text(3.2, -2.35, "embedding, to every block", color=red, fontsize=12)
axis.text(8, 1.95, "skips", color=blue, ha="center", fontsize=12)
axis.set(xlim=(-1.2, 17.2), ylim=(-3.5, 3.6))
axis.axis("off")
show(
    figure,
    "Boxes in the form of a U: the picture is folded, goes down three levels, through the middle and up again, "
    "with dashed skips across; the step, and a label, come in as an embedding that goes to every block.",
)

# %% [markdown]
# *A U-Net with three levels. Folding turns 32×32 pixels of 3 numbers into 16×16 places of 12. Each red box holds one or
# more residual blocks, with attention at the low resolutions; all of them are told the embedding.*
#
# #### Exercise 6: down, through, and up
#
# *Algorithm, medium, 10 minutes.* Fill in `unet_forward`. The way down returns all its maps. The middle gets the last one.
# Each level of the way up takes as many maps as every other, the last one that is left first, beside what the level
# before returned. Embedding and condition go everywhere.


# %% tags=["export", "exercise"]
def unet_forward(h, embedding, cond, down, middle, up):
    """Send a feature map down, through the middle, and up again, where it meets the maps of the way down.

    Args:
        h: the first feature map, (B, C, H, W).
        embedding: of step and label, (B, D).
        cond: the condition, for attention that looks at it; any.
        down: (h, embedding, cond) -> list of all maps, in the order in which they are made, h the first.
        middle: (map, embedding, cond) -> map.
        up: the levels of the way up, the lowest first: (map, skips, embedding, cond) -> map. Each takes as
            many skips as the others, in the order in which its stages meet them; together, all maps.

    Returns:
        What the last level returns.

    Source: Ronneberger et al. 2015, section 2; Ho et al. 2020, appendix B.
    """
    ### BEGIN SOLUTION
    maps = down(h, embedding, cond)
    h = middle(maps[-1], embedding, cond)
    skips_per_level = len(maps) // len(up)
    for level in up:
        skips = [maps.pop() for _ in range(skips_per_level)]  # the last one first
        h = level(h, skips, embedding, cond)
    return h
    ### END SOLUTION


# %% slide=["# Down, through, and up, in code", "[code unet_forward]"]
check("unet.unet_forward", unet_forward)

# %% [markdown]
# The network's head, like the last layer of each branch, starts at zero.


# %% tags=["export"]
def levels_with_attention(channel_multipliers, attention_levels):
    """The levels that get attention, from channel_multipliers and attention_levels as UNet takes them.

    Raises TypeError or ValueError where the two make no network.
    """
    given = {"channel_multipliers": channel_multipliers, "attention_levels": attention_levels}
    for name, values in given.items():
        if isinstance(values, int):
            raise TypeError(f"{name} must be a tuple, such as (1,) or (1, 2); got {values}")
    last = len(channel_multipliers) - 1
    if last < 0:
        raise ValueError(f"channel_multipliers must hold a width per level; got {channel_multipliers}")
    if attention_levels is None:
        return tuple(range(1, last + 1))
    if not set(attention_levels) <= set(range(last + 1)):
        raise ValueError(f"attention_levels must be among the levels 0 to {last}; got {attention_levels}")
    return tuple(attention_levels)


class UNet(nn.Module):
    """Predict, from noisy images and their step, what the diffusion's prediction type asks for.

    Args:
        in_channels: channels of the images.
        base_channels: channels at the highest resolution, an even number.
        channel_multipliers: width of each level, in units of base_channels; the resolution halves in between.
        num_blocks: residual blocks per level on the way down (one more on the way up).
        attention_levels: the levels, counted from 0, with attention after each residual block; all but the
            first if None.
        patch_size: fold this many pixels each way into channels first (1 leaves the image as it is).
        out_channels: channels of the output; in_channels unless given (2 in_channels for a learned variance).
        num_classes: None, a number of classes, or a tuple of them for several labels.
        attention: factory, channels -> module called as (h, cond).

    Raises:
        TypeError, ValueError: on channels, multipliers, levels, blocks or patches that make no network.

    Source: Ho et al. 2020, appendix B; Dhariwal and Nichol 2021, section 3.
    """

    def __init__(
        self,
        in_channels,
        base_channels=64,
        channel_multipliers=(1, 2, 2),
        num_blocks=2,
        attention_levels=None,
        patch_size=1,
        out_channels=None,
        num_classes=None,
        attention=SelfAttention,
    ):
        super().__init__()
        attention_levels = levels_with_attention(channel_multipliers, attention_levels)
        check_positive_int("base_channels", base_channels)
        check_positive_int("num_blocks", num_blocks)
        check_positive_int("patch_size", patch_size)
        if base_channels % 2:
            raise ValueError(
                f"base_channels must be even, for as many cosines as sines; got base_channels={base_channels}"
            )
        self.patch_size = patch_size
        widths = [base_channels * multiplier for multiplier in channel_multipliers]
        attention_at = [attention if level in attention_levels else None for level in range(len(widths))]

        embedding_dim = 4 * base_channels
        self.time_mlp = StepEmbedding(base_channels, embedding_dim)
        self.labels = None if num_classes is None else LabelEmbedding(num_classes, embedding_dim)

        self.stem = nn.Conv2d(in_channels * patch_size**2, widths[0], 3, padding=1)
        self.down = DownLevels(widths, num_blocks, embedding_dim, attention_at)
        self.middle_in = Stage(widths[-1], widths[-1], embedding_dim, attention_at[-1])
        self.middle_out = Stage(widths[-1], widths[-1], embedding_dim)

        skips = [widths[0]] + [channels for level in self.down for channels in level.skip_channels]
        self.up = nn.ModuleList()
        width = widths[-1]
        for level in reversed(range(len(widths))):
            own = [skips.pop() for _ in range(num_blocks + 1)]
            self.up.append(UpLevel(width, widths[level], own, embedding_dim, attention_at[level], level == 0))
            width = widths[level]

        self.head_norm = group_norm(width)
        self.head = zero_init(nn.Conv2d(width, (out_channels or in_channels) * patch_size**2, 3, padding=1))

    def check_arguments(self, x_t, t, cond):
        """Raise ValueError unless x_t, t and cond, as forward takes them, fit each other and the network."""
        height, width = x_t.shape[-2:]
        multiple = self.patch_size * 2 ** (len(self.down) - 1)
        if height % multiple or width % multiple:
            raise ValueError(f"x_t must have sides that are multiples of {multiple}; got {height} x {width}")
        check_shape("t", t, x_t.shape[:1], of="one step per image")
        if self.labels is not None and (cond is None or len(cond) != len(x_t)):
            found = None if cond is None else tuple(cond.shape)
            raise ValueError(f"cond must hold the labels of {len(x_t)} image(s); got {found}")

    def forward(self, x_t, t, cond=None):
        """Map x_t (B, C, H, W), steps t (B,) and labels cond to the raw output (B, out_channels, H, W)."""
        self.check_arguments(x_t, t, cond)
        embedding = self.time_mlp(t)
        if self.labels is not None:
            embedding = embedding + self.labels(cond)

        h = self.stem(patchify(x_t, self.patch_size))
        h = unet_forward(h, embedding, cond, self.down, self.middle, self.up)
        return unpatchify(self.head(F.silu(self.head_norm(h))), self.patch_size)

    def middle(self, h, embedding, cond):
        """Map the last map of the way down, h, with embedding and cond, to what the way up begins with."""
        return self.middle_out(self.middle_in(h, embedding, cond), embedding, cond)


# %% [markdown]
# The network of the picture, and the maps that its way down keeps for the way up:

# %%
torch.manual_seed(0)
fresh_network = UNet(
    3, base_channels=32, channel_multipliers=(1, 2, 2), num_blocks=1, attention_levels=(2,), patch_size=2
)
t = torch.tensor([0, 500, 999])
with torch.no_grad():
    output = fresh_network(three_images, t)
    first_map = fresh_network.stem(patchify(three_images, 2))
    maps = fresh_network.down(first_map, fresh_network.time_mlp(t), cond=None)
print(f"in: {tuple(three_images.shape)}, out: {tuple(output.shape)}, all zeros: {bool((output == 0).all())}")
show_table(
    [[number, *feature_map.shape[1:3]] for number, feature_map in enumerate(maps, start=1)],
    columns=["map", "channels", "pixels across"],
)

# %% [markdown]
# Where are the parameters?

# %%
parts = dict(fresh_network.named_children())
parts |= {
    kind.__name__: nn.ModuleList(m for m in fresh_network.modules() if isinstance(m, kind))
    for kind in (nn.Conv2d, nn.Linear, nn.GroupNorm)
}
counts = {name: sum(weights.numel() for weights in part.parameters()) for name, part in parts.items() if part}
total = sum(weights.numel() for weights in fresh_network.parameters())
rows = [[name, f"{count:,}", f"{count / total:.0%}"] for name, count in counts.items()]
show_table([*rows, ["all", f"{total:,}", "100%"]], columns=["part, or kind of layer", "parameters", "share"])

# %% [markdown]
# ### The first loss
#
# Since the output is zero at first, the loss at the start is the mean square of the target. For the velocity
# $v=\sqrt{\bar\alpha_t}\,\epsilon-\sqrt{1-\bar\alpha_t}\,x_0$, (1.44), the mixed term vanishes, because the noise has mean 0
# and does not know the image:
#
# $$\mathbb E[v^2]=\bar\alpha_t\cdot1+(1-\bar\alpha_t)\,\mathbb E[x_0^2] \tag{2.16}$$
#
# The check runs over all combinations of some pixel values and a two-valued noise $\pm1$.

# %% slide=["# The first loss can be known beforehand", "The network begins at zero, so its loss is the mean square of the target:", "(2.16)", "A training that starts elsewhere has a mistake in its first line."]
pixels = torch.tensor([-0.9, -0.2, 0.3, 1.0], **exact)[:, None]
two_noises = torch.tensor([-1.0, 1.0], **exact)
kept = torch.linspace(0.1, 0.9, 5, **exact)[:, None, None]
v = v_from_x_0_and_eps(pixels, kept, two_noises)  # (5, 4, 2), all combinations
expected = kept + (1 - kept) * pixels.square().mean()
verify("2.16", v.square().mean(dim=(1, 2)), expected[:, 0, 0], atol=1e-12)

# %% [markdown]
# A training that starts elsewhere has a mistake in its first line. Ours:

# %%
generator = torch.Generator().manual_seed(0)
x_0 = images.batch(range(256))["image"]
t = torch.randint(0, 1000, (256,), generator=generator)
with torch.no_grad():
    first_loss = diffusion.loss(fresh_network, x_0, t, noise_like(x_0, generator)).item()
kept = diffusion.alpha_bar[t].float()[:, None, None, None]
predicted_loss = (kept + (1 - kept) * x_0.square()).mean().item()
print(f"first loss {first_loss:.2f}; as predicted, to 1 %: {abs(first_loss / predicted_loss - 1) < 0.01}")
assert abs(first_loss / predicted_loss - 1) < 0.01

# %% [markdown] tags=["core"]
# ## Averaging the weights
#
# Each training step follows the gradient on a few images at a few noise levels. So at a constant learning rate the weights
# jitter, however long one trains. The **exponential moving average** (EMA) $m$ follows the weights
# $\theta$ at a distance. With a *decay* $d$ a little below 1, after each training step,
#
# $$m_n=d\,m_{n-1}+(1-d)\,\theta_n \tag{2.17, definition}$$
#
# #### Exercise 7: one update
#
# *Formula, easy, 2 minutes.* Fill in `ema_update`, (2.17), for one tensor.


# %% tags=["export", "exercise"]
def ema_update(average, parameter, decay):
    """Move an average a little towards a parameter.

    Args:
        average, parameter: tensors of one shape.
        decay: how much of the average is kept, in [0, 1].

    Returns:
        decay * average + (1 - decay) * parameter, same shape.

    Source: Ho et al. 2020, appendix B (decay 0.9999 there).
    """
    ### BEGIN SOLUTION
    return decay * average + (1 - decay) * parameter
    ### END SOLUTION


# %% slide=["# Weights jitter, so average them", "(2.17)", "? A decay of $0.999$: over how many steps does it average?", "About a thousand: $1/(1-d)$."]
check("unet.ema_update", ema_update)

# %% [markdown]
# What it looks like, for a weight whose optimum is 1 and whose gradient is noisy (twenty thousand such weights at once,
# of which the picture shows the first):

# %%
generator = torch.Generator().manual_seed(0)
jittering = torch.full((20_000,), -1.0)
averages = {0.9: jittering.clone(), 0.99: jittering.clone()}
lines = {"the weight itself": [], "decay 0.9": [], "decay 0.99": []}
for _ in range(600):
    jittering = jittering - 0.1 * (jittering - 1 + 2 * torch.randn(20_000, generator=generator))
    lines["the weight itself"].append(jittering[0])
    for decay in averages:
        averages[decay] = ema_update(averages[decay], jittering, decay)
        lines[f"decay {decay}"].append(averages[decay][0])

# %% slide=["# Calm or up to date: the decay decides", "[picture]", "Decay 0.9 still jitters; decay 0.99 is calm, but remembers the start for hundreds of steps."] tags=["draw"]
figure, axis = plt.subplots(figsize=(8, 3), layout="constrained")
for (name, line), colour in zip(lines.items(), ("lightgrey", *colours)):
    axis.plot(line, color=colour, label=name)
axis.axhline(1, color="black", linewidth=0.8, linestyle="--")
axis.set(xlabel="training step", ylabel="weight")
axis.legend(ncols=3)
show(figure, "One jittering curve and two averages of it: the one of decay 0.99 is calm, but arrives late.")

# %% [markdown]
# *Decay 0.9 still jitters; decay 0.99 is calm, but remembers the start for hundreds of steps.*
#
# So the first updates use a smaller decay, $(1+n)/(10+n)$ after $n$ updates, as long as that is
# below $d$. And since an update adds but a thousandth of what is missing, which half precision loses, the average is kept
# in float32 at least.


# %% tags=["export"]
def out_of_half_precision(model):
    """Turn the weights and buffers of a model that are in half precision into float32; returns the model."""
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(at_least_float32(tensor.dtype))
    return model


class EMA(nn.Module):
    """An exponential moving average of a model's weights, kept as a second, frozen model.

    Early on, when the average would be made mostly of the random start, the decay is
    (1 + n) / (10 + n) after n updates, if that is smaller.

    Args:
        model: the model to follow; it is copied, without what torch.compile has made of it, and the copy
            is in float32 where the model is in half precision.
        decay: how much of the average each update keeps, in [0, 1].

    Raises:
        ValueError: if decay lies outside [0, 1].
    """

    def __init__(self, model, decay=0.999):
        super().__init__()
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must lie in [0, 1]; got decay={decay}")
        self.decay = decay
        followed = without_compilation(copy.deepcopy(model)).eval().requires_grad_(False)
        self.model = out_of_half_precision(followed)
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def update(self, model):
        """Take the model's present weights into the average; buffers are copied as they are."""
        n = self.num_updates.item()
        decay = min(self.decay, (1 + n) / (10 + n))
        for average, parameter in zip(self.model.parameters(), model.parameters(), strict=True):
            average.copy_(ema_update(average, parameter.to(average.dtype), decay))
        for average, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)
        self.num_updates += 1


# %% [markdown]
# PyTorch has an averaged model too, without the warm-up. Past the warm-up the two must agree:

# %%
layer = nn.Linear(3, 2)
ema = EMA(layer, decay=0.9)
ema.num_updates.fill_(1000)  # past the warm-up
library = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.9))
library.update_parameters(layer)  # its first update copies
for _ in range(5):
    nn.init.normal_(layer.weight)
    ema.update(layer)
    library.update_parameters(layer)
assert torch.allclose(ema.model.weight, library.module.weight, atol=1e-6)

# %% [markdown] tags=["optional"]
# ### How far back, and how calm? *(at a second reading)*
#
# Put (2.17) into itself again and again, and the weights of the past come out, each step back counting $d$ times less:
#
# $$m_n=(1-d)\sum_{j=0}^{n-1}d^{\,j}\,\theta_{n-j}+d^{\,n}m_0 \tag{2.18}$$
#
# How far back does that reach? Counting the latest weights as 1, the one before as 2, and so on, the mean age is
#
# $$(1-d)\sum_{j\ge0}(j+1)\,d^{\,j}=\frac1{1-d} \tag{2.19}$$
#
# because $\sum_j(j+1)d^{\,j}$ is the derivative of $\sum_jd^{\,j+1}=d/(1-d)$. This is the **window**: 0.999 averages over
# about the last thousand steps.

# %%
torch.manual_seed(0)
theta, decay = torch.randn(40, **exact), 0.9
average = torch.tensor(2.0, **exact)
for value in theta:
    average = ema_update(average, value, decay)
powers = decay ** torch.arange(40, **exact)  # d^j
verify("2.18", average, (1 - decay) * (powers * theta.flip(0)).sum() + decay**40 * 2.0, atol=1e-12)

# %%
decays = torch.tensor([0.5, 0.9, 0.99], **exact)
j = torch.arange(5000, **exact)[:, None]  # far enough: 0.99^5000 is below 1e-21
verify("2.19", (1 - decays) * ((j + 1) * decays**j).sum(dim=0), 1 / (1 - decays), atol=1e-8)

# %% [markdown]
# And how much does it calm? Weights of neighbouring steps are nearly the same weights. Say that their jitter, of variance 1,
# has the correlation $\varphi^k$ at a distance of $k$ steps. The variance of the sum (2.18) is a double sum of
# $d^{\,i+j}\varphi^{|i-j|}$, that is, two geometric series, one inside the other:
#
# $$\operatorname{Var}(m)=(1-d)^2\sum_{i,j\ge0}d^{\,i+j}\varphi^{|i-j|}
# =\frac{1-d}{1+d}\cdot\frac{1+d\,\varphi}{1-d\,\varphi} \tag{2.20}$$
#
# Were the steps independent, $\varphi=0$, it would be about half of one over the window. But the weights above move a tenth
# of their way at each step, so $\varphi=0.9$, and a window of ten steps is worth no more than two independent ones:

# %%
phi, age = torch.tensor([0.0, 0.5, 0.9], **exact)[:, None], torch.arange(1500, **exact)
apart = (age[:, None] - age).abs()  # |i - j|, (1500, 1500)
d = torch.tensor([0.5, 0.9, 0.98], **exact)
weights_of_age = (1 - d[:, None]) * d[:, None] ** age  # (3 decays, 1500)
double_sum = torch.stack([(weights_of_age @ f**apart * weights_of_age).sum(dim=1) for f in phi])  # (3, 3)
verify("2.20", double_sum, (1 - d) / (1 + d) * (1 + d * phi) / (1 - d * phi), atol=1e-10)

# %%
rows = []
for decay, averaged in averages.items():
    measured, alone = (averaged.var() / jittering.var()).item(), (1 - decay) / (1 + decay)
    by_formula = alone * (1 + decay * 0.9) / (1 - decay * 0.9)
    assert abs(measured / by_formula - 1) < 0.1
    rows.append([f"{decay}", f"{measured:.2f}", f"{by_formula:.2f}", f"{alone:.3f}"])
show_table(rows, columns=["decay", "variance left, measured", "by (2.20)", "were the steps independent"])

# %% [markdown]
# A longer window is calmer, but older: while the weights still improve, it lags behind. And by (2.18) the random initial
# weights still count $0.999^{1000}=0.37$ after a thousand steps. With the decay $(1+n)/(10+n)$ what is left of them after
# $N$ updates is a product that telescopes:
#
# $$\prod_{n=0}^{N-1}\frac{1+n}{10+n}=\frac{N!\;9!}{(N+9)!}=\binom{N+9}{9}^{-1} \tag{2.21}$$
#
# nothing worth mentioning after a dozen updates. (The rule is that of TensorFlow's `ExponentialMovingAverage`.) It reaches
# 0.999 only after thousands of updates; the training below, of 400 steps, never sees that decay.

# %%
ratios = [(1 + n) / (10 + n) for n in range(30)]
left_of_start = torch.tensor(ratios, **exact).cumprod(dim=0)
by_binomial = [1 / math.comb(N + 9, 9) for N in range(1, 31)]
verify("2.21", left_of_start, torch.tensor(by_binomial, **exact), atol=1e-12)

warm_up = sum((1 + n) / (10 + n) < 0.999 for n in range(10_000))
last_decay = (1 + 399) / (10 + 399)
print(f"updates with a decay below 0.999: {warm_up}")
print(f"decay of the 400th update: {last_decay:.3f}, a window of {1 / (1 - last_decay):.0f} steps")

# %% [markdown] tags=["core"]
# ## Training
#
# Shapes take hours; scikit-learn's handwritten digits, of 8 by 8 pixels, scaled up to 16 here, take less. The loop is that of
# chapter 01, with the average beside it. Every 40 steps, 64 digits that are not trained on tell how good the weights are, as
# they stand and averaged; steps and noise are the same each time.

# %%
digits = load("digits", image_size=16)
unseen_digits = load("digits", "validation", image_size=16).batch(range(64))["image"]
unseen_t = torch.linspace(0, 999, 64).long()
unseen_noise = noise_like(unseen_digits, torch.Generator().manual_seed(1))


@torch.no_grad()
def unseen_loss(network):
    """The loss on the digits that are not trained on."""
    return diffusion.loss(network, unseen_digits, unseen_t, unseen_noise).item()


# %%
torch.manual_seed(0)
digit_network = UNet(1, base_channels=32, channel_multipliers=(1, 2, 2), num_blocks=1, attention_levels=(2,))
digit_ema = EMA(digit_network)
optimizer = torch.optim.AdamW(digit_network.parameters(), lr=2e-3)
generator = torch.Generator().manual_seed(0)
losses, marks = [], [0]
unseen_losses = {"as they stand": [unseen_loss(digit_network)], "averaged": [unseen_loss(digit_ema.model)]}
for step in progress_bar(range(400), "training"):
    x_0 = digits.batch(torch.randint(len(digits), (16,), generator=generator))["image"]  # (16, 1, 16, 16)
    t = torch.randint(diffusion.num_steps, (16,), generator=generator)
    loss = diffusion.loss(digit_network, x_0, t, noise_like(x_0, generator))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    digit_ema.update(digit_network)
    losses.append(loss.item())
    if (step + 1) % 40 == 0:
        marks.append(step + 1)
        unseen_losses["as they stand"].append(unseen_loss(digit_network))
        unseen_losses["averaged"].append(unseen_loss(digit_ema.model))

# %% slide=["# Here the averaged weights are the better ones", "[picture]", "Digits, half a minute of training at a constant rate: the loss falls from its predicted start, and the averaged weights lie below."] tags=["draw"]
kept = diffusion.alpha_bar[unseen_t].float()[:, None, None, None]
start_loss = (kept + (1 - kept) * unseen_digits.square()).mean().item()  # (2.16)
figure, axes = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
axes[0].plot(range(1, 401), losses, color="lightgrey", label="training, each step")
axes[0].axhline(start_loss, color="black", linewidth=0.8, linestyle="--")
axes[0].annotate(
    "at the start, by (2.16)", (400, start_loss), xytext=(0, 5), textcoords="offset points", ha="right"
)
for (name, values), colour in zip(unseen_losses.items(), colours):
    axes[0].plot(marks, values, "o-", markersize=4, color=colour, label=f"unseen, weights {name}")
    axes[1].plot(marks[5:], values[5:], "o-", color=colour)
axes[0].set(xlabel="training step", ylabel="loss", ylim=(0, 1.0))
axes[0].legend(loc=(0.35, 0.35))
axes[1].set(xlabel="training step", title="the same two, from step 200 on")
show(
    figure,
    "The loss falls from its predicted start; of the two sets of weights, the averaged ones have the lower curve.",
)

# %% [markdown]
# *The loss falls to less than a third. From batch to batch it jumps about, since some steps are harder than others. On the
# same unseen digits and steps, the averaged weights lie below those as they stand.*

# %%
late = {name: sum(values[-6:]) / 6 for name, values in unseen_losses.items()}  # from step 200 on
print(f"less than a third of the first loss: {late['averaged'] < start_loss / 3}")
print(f"averaged weights better: {late['averaged'] < late['as they stand']}")
assert late["averaged"] < min(start_loss / 3, late["as they stand"])

# %% [markdown]
# What can it draw, after half a minute of training? The same noise, through both sets of weights:

# %% slide=["# Half a minute draws strokes, and some digits", "[picture]", "Real digits, and the same noise through both sets of weights: with DDIM the noise decides."]
x_T = torch.randn(16, 1, 16, 16, generator=torch.Generator().manual_seed(5))
short = diffusion.respace(50)
drawn = [
    sample(short, weights, x_T.shape, ddim_step, x_T=x_T) for weights in (digit_network, digit_ema.model)
]
real_digits = digits.batch(range(16))["image"]
figure = show_grid(
    torch.cat([real_digits, *drawn]),
    columns=16,
    row_titles=["real", "as they stand", "averaged"],
    inches_per_image=0.7,
)
show(
    figure, "Three rows of sixteen handwritten digits: real ones, and two rows of drawn ones, partly legible."
)

# %% [markdown]
# *Strokes of the right width, and some digits among them. Both rows are much alike: with DDIM the noise decides.*

# %% [markdown] tags=["core"]
# ## The long-trained model
#
# The network of this chapter's first picture is the same code, wider, with attention at two levels, and trained far longer,
# in two parts: `python -m lecture26 train ddpm_shapes32_part1`, and then the same with `ddpm_shapes32`, make it anew.
#
# ### What it expects
#
# A network trained on squared errors answers with an *expectation* (chapter 01). For images that can be seen. What does it
# take for $x_0$, from $x_t$ alone?

# %% slide=["# A denoiser answers with an expectation", "[picture]", "At much noise many pictures could be meant, and their mean is a blur: one step cannot draw."]
unseen_shapes = load("shapes", "validation").batch(range(64))["image"]
unseen_steps = (50, 200, 400, 600, 700, 800, 900, 999)
generator = torch.Generator().manual_seed(0)
pair = unseen_shapes[[3, 7]]
pair_noise = noise_like(pair, generator)


@torch.no_grad()
def expected_x_0(x_t, t):
    """What the long-trained network expects of x_0, given x_t (B, 3, 32, 32) at a step t."""
    return trained_diffusion.p_mean_variance(trained, x_t, torch.full((len(x_t),), t)).x_0


noisy_pairs = [trained_diffusion.q_sample(pair, torch.full((2,), t), pair_noise) for t in unseen_steps]
expectations = [expected_x_0(x_t, t) for x_t, t in zip(noisy_pairs, unseen_steps)]
rows = torch.stack([torch.stack(noisy_pairs), torch.stack(expectations)])  # (2, 8 steps, 2 images, 3, 32, 32)
figure = show_grid(
    rows.permute(2, 0, 1, 3, 4, 5).flatten(0, 2),
    columns=8,
    titles=[f"t = {t}" for t in unseen_steps],
    row_titles=["$x_t$", r"$\hat x_0$"] * 2,
    inches_per_image=1.15,
)
figure.set_figheight(5.2)
show(
    figure,
    "Two pictures with more and more noise, and what is expected of them: sharp, then blurred, then a grainy blur.",
)

# %% [markdown]
# *At little noise the picture is known, and the expectation sharp. At much noise many pictures could be meant, and their
# mean is a blur. At t = 999 it should be the mean of all images; what the network says there is a grainy blur that still depends
# on the noise. So $\hat x_0$ is an expectation, not a sample: one step from noise to image would draw a blur. (And an
# expectation can lean the wrong way: from t = 600 on the heart is taken for a star.)*
#
# #### Question 2: what do the skips carry?
#
# *Predict, then run, 5 minutes.* At t = 300, the skips of one level of the way up are replaced by zeros, for which the
# network has not been trained: this tells what it relies on. Which level's skips, those at 4, 8 or 16 places across, hold
# (a) the noise, which must be known to be taken off; (b) objects and ground; (c) little that it would miss?

# %%
four = unseen_shapes[[3, 7, 11, 20]]
four_noisy = trained_diffusion.q_sample(four, torch.full((4,), 300), noise_like(four, generator))


def without_skips(module, inputs):
    """A hook: the same inputs of an UpLevel, with zeros in the place of its skips."""
    h, skips, embedding, cond = inputs
    return h, [torch.zeros_like(skip) for skip in skips], embedding, cond


columns = {"$x_0$": four, "$x_t$": four_noisy, r"$\hat x_0$, all skips": expected_x_0(four_noisy, 300)}
for name, level in zip(("first", "second", "third"), trained.up):
    hook = level.register_forward_pre_hook(without_skips)
    columns[f"without a,\n{name} level up"] = expected_x_0(four_noisy, 300)
    hook.remove()
errors = {name: (picture - four).square().mean().item() for name, picture in columns.items()}

# %% [markdown]
# <details>
# <summary>Answer</summary>
#
# (a) 16, (b) 8, (c) 4, by the picture below: four images at one step, and zeros, which the network never met. The noise has the
# detail of $x_t$, and nothing but the skips at 16 places has it. Those at 8 places seem to hold object and ground, and those at
# 4 little that does not come by another way.
#
# </details>

# %% slide=["# The finest skips carry the noise", "? Which skips hold the noise, which the objects, and which would not be missed?", "[picture]", "Without the finest the noise stays, without those in the middle objects smear, the coarsest say little."]
figure = show_grid(
    torch.stack(list(columns.values()), dim=1).flatten(0, 1),
    columns=6,
    titles=["$x_0$", "$x_t$", r"$\hat x_0$, all skips", "without 4 × 4", "without 8 × 8", "without 16 × 16"],
    inches_per_image=1.35,
)
show(
    figure,
    "Four pictures in six columns: without the coarsest skips little changes, without those in the middle objects and "
    "grounds are smeared, without the finest ones the noise stays.",
)
whole, coarsest, middle_level, finest = list(errors.values())[2:]
print(f"without 4 x 4: less than 3 times the squared error: {coarsest < 3 * whole}")
print(f"without 8 x 8, or 16 x 16: more than 6 times: {min(middle_level, finest) > 6 * whole}")
assert coarsest < 3 * whole and min(middle_level, finest) > 6 * whole

# %% [markdown]
# ### Where the loss comes from
#
# Step by step, on unseen images:

# %% slide=["# A loss is not to be judged by its distance from 0", "[picture]", "At both ends the velocity asks for what can hardly be known."] tags=["draw"]
steps = [0, 10, 30, 60, 100, 150, 200, 300, 400, 500, 600, 700, 800, 900, 999]
same_noise = noise_like(unseen_shapes, torch.Generator().manual_seed(1))
with torch.no_grad():
    by_step = [diffusion.loss(trained, unseen_shapes, torch.full((64,), t), same_noise).item() for t in steps]
figure, axis = plt.subplots(figsize=(8, 3.2), layout="constrained")
kept = diffusion.alpha_bar[steps]
axis.plot(
    steps, kept + (1 - kept) * unseen_shapes.square().mean(), color="lightgrey", label="untrained, (2.16)"
)
axis.plot(steps, by_step, "o-", label="long-trained")
axis.set(xlabel="step t", ylabel="loss of that step", ylim=(0, None))
axis.legend()
show(
    figure,
    "Loss over the steps: high at the first few, falling to a low, level stretch, and rising again at the end.",
)

# %% [markdown]
# *At both ends the velocity asks for what can hardly be known: at t = 0 for noise that is weaker than one grey level, at
# t = 999 for the image, $v\approx-x_0$, of which pure noise says nothing: there the trained network is no better than zeros.* So
# a loss is not to be judged by its distance from 0, and two losses are comparable only over the same steps.

# %% [markdown] tags=["optional"]
# ### Where attention looks *(at a second reading)*
#
# The weights of (2.9) in the first attention layer, at 8 by 8 pixels: where do two of the 64 pixels look, one inside the
# object, and the one in the corner?

# %%
looked_at = images.batch([33, 2, 38])["image"]
t = torch.full((3,), 200)
x_t = diffusion.q_sample(looked_at, t, noise_like(looked_at, torch.Generator().manual_seed(0)))
layer, seen = trained.down[1].stages[0].attention, []
hook = layer.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
with torch.no_grad():
    trained(x_t, t)
hook.remove()

# %% slide=["# In three pictures, attention has found the object", "[picture]", "Bright is where the marked pixel looks: from the object at the object, from the corner at its outline, and not inside it."] tags=["draw"]
tokens = layer.norm(seen[0]).flatten(2).transpose(1, 2)  # (3, 64, C)
q, k, _ = layer.qkv(tokens).unflatten(2, (3, layer.heads, -1)).permute(2, 0, 3, 1, 4)
looks_at = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1).mean(dim=1)  # (3, 64, 64)
looks_at = looks_at.detach().reshape(3, 8, 8, 8, 8)  # image, row and column that look, and that are looked at

figure, axes = plt.subplots(3, 3, figsize=(5.6, 5.6), layout="constrained")
pixels_of_x_t = ((x_t.clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1)  # (3, 32, 32, 3)
for row, picture_of_x_t, attention_maps in zip(axes, pixels_of_x_t, looks_at):
    row[0].imshow(picture_of_x_t)
    for axis, (i, j) in zip(row[1:], ((3, 4), (0, 0))):
        axis.imshow(attention_maps[i, j])
        axis.plot(j, i, "+", color=colours[1], markersize=12, markeredgewidth=3)
for axis, title in zip(axes[0], ("$x_t$, t = 200", "from the object", "from the corner")):
    axis.set_title(title)
for axis in axes.flat:
    axis.grid(False)
    axis.set(xticks=[], yticks=[])
show(
    figure,
    "Three noisy pictures and their attention: from the object brightest on it, from the corner along its outline, and darkest inside it.",
)

# %% [markdown]
# *Bright is where the pixel marked + looks, the mean over the heads; each map has a scale of its own. From the object, the
# brightest places lie on it; from the corner they lie along its outline, and its inside is darkest. (Three pictures, one layer,
# one step.) Nobody told the network what an object is.*

# %% [markdown] tags=["core"]
# ## How many steps?
#
# That takes a distance between sets of images, and pixels will not do: two red stars in different places have few in common.
# So *features* are compared, what a trained classifier sees in an image just before it decides. With the mean $m$ and
# covariance $C$ of the features of real ($r$) and generated ($g$) images, the **Fréchet distance** is
#
# $$d^2=\|m_r-m_g\|^2+\operatorname{tr}\bigl(C_r+C_g-2\,(C_rC_g)^{1/2}\bigr) \tag{2.22, definition}$$
#
# It is known as FID when the classifier is Inception. Ours is the judge above, which sees through noise and blur, so it
# judges what is drawn, and hardly how grainy it is. A finite number of images makes the distance too large: compare only
# distances of as many images, and with *real against real*. Two more numbers: the share of legible images, and *recall*,
# the share of real images that have generated ones around them: what is never drawn lowers it.
#
# `python -m lecture26 measure ddpm_shapes32_steps` has stored what came out; the more steps, the fewer images:

# %%
study = load_results("ddpm_shapes32_steps")
runs = {(run["steps"], run["sampler"]): run for run in study["runs"]}


def standard_error(run, quantity="confident_share"):
    """Of a share p of the run's N images, sqrt(p (1 - p) / N)."""
    return math.sqrt(run[quantity] * (1 - run[quantity]) / run["num_samples"])


def with_error(run, quantity):
    """A share of the run's images, in per cent."""
    return f"{100 * run[quantity]:.0f} ± {100 * standard_error(run, quantity):.1f}"


rows = []
for (count, sampler), run in runs.items():
    distances = [f"{run['frechet_distance']:.0f}", f"{run['frechet_distance_real']:.0f}"]
    shares = [with_error(run, quantity) for quantity in ("confident_share", "recall", "recall_real")]
    rows.append([count, sampler.upper(), run["num_samples"], *distances, *shares])
show_table(
    rows,
    columns=[
        "steps",
        "sampler",
        "images",
        "$d^2$",
        "real: $d^2$",
        "legible, %",
        "recall, %",
        "real: recall, %",
    ],
)

# %% slide=["# Fifty steps do", "[picture]", "More steps make no more pictures legible. The distance still falls up to 50; from 100 on, 128 images show no gain."] tags=["draw"]
figure, axes = plt.subplots(1, 2, figsize=(11, 3.4), width_ratios=[3, 2], layout="constrained")
for sampler, marker, colour in zip(("ddpm", "ddim"), "os", colours):
    own = [run for (_, name), run in runs.items() if name == sampler]
    legible = [100 * run["confident_share"] for run in own]
    errors_of_share = [100 * standard_error(run) for run in own]
    style = {"color": colour, "label": sampler.upper()}
    axes[0].errorbar(
        [run["steps"] for run in own], legible, yerr=errors_of_share, fmt=marker + "-", capsize=3, **style
    )
    many = [run for run in own if run["num_samples"] >= 1000]
    ratios = [run["frechet_distance"] / run["frechet_distance_real"] for run in many]
    axes[1].loglog([run["steps"] for run in many], ratios, marker + "-", **style)
axes[0].axhline(100, color="grey", linestyle="--")
axes[0].set(xscale="log", xlabel="number of steps", ylabel="legible, %", ylim=(89, 101))
axes[0].set_xticks([10, 20, 50, 100, 250, 1000], [10, 20, 50, 100, 250, 1000])
axes[1].axhline(1, color="grey", linestyle="--", label="as real images")
axes[1].set(xlabel="number of steps", ylabel="Fréchet distance,\nreal against real = 1")
axes[1].set_xticks([10, 20, 50], [10, 20, 50])
axes[1].set_yticks([1, 2, 5, 10, 20], [1, 2, 5, 10, 20])
axes[1].legend()
for axis in axes:
    axis.minorticks_off()
show(
    figure,
    "The legible share against steps, level from 50 on and just below 100 %; the Fréchet distance against steps, "
    "falling towards that of real images.",
)

# %% [markdown]
# *Left: up to 20 steps of DDIM and 50 of DDPM, more steps make more pictures legible; beyond, no gain is seen outside the errors
# (from 100 steps on there are only 128 images). (Where
# all are legible the formula gives an error of 0, which is too small: 128 of 128 also come of a share of 99 % in one trial of
# four. And the error of recall leaves out that another set would have other neighbours.) Right: the distance, where there are a
# thousand images. DDIM is well ahead with 10 and 20 steps; its lead at 50 is small, and from 100 steps on, in the table, DDPM's
# numbers are the smaller ones, but no errors are given here.*
#
# So 50 steps do, and nearly all pictures can be read. Are they as good as real? Not quite, with either sampler: their distance
# is half as large again as that of real images, or twice, and they show a little less of the variety. Would more steps mend
# that? Up to 50 the distance is still falling, and from 100 to 1000 it does not fall, as far as 128 images can show; between 50
# and 100 nothing can be compared. How much is the network's part and how much the sampler's was not measured.

# %%
for sampler in ("ddpm", "ddim"):
    few, many = runs[50, sampler], runs[1000, sampler]
    nearly_all = few["confident_share"] > 0.95
    two_errors = 2 * math.hypot(standard_error(few), standard_error(many))
    levels_off = many["confident_share"] < few["confident_share"] + two_errors
    less_varied = few["recall"] + 2 * standard_error(few, "recall") < few["recall_real"]
    is_far = few["frechet_distance"] > 1.4 * few["frechet_distance_real"]
    print(f"{sampler}, 50 steps: nearly all legible: {nearly_all}; 1000 gain nothing: {levels_off}; ", end="")
    print(f"short of real in variety: {less_varied}, in distance: {is_far}")
    assert nearly_all and levels_off and less_varied and is_far
for count in (10, 20, 50):
    assert runs[count, "ddim"]["frechet_distance"] < runs[count, "ddpm"]["frechet_distance"]

# %% [markdown]
# A small version, live: the first 64 of the stored images again; their distances must agree to 10 %.

# %%
test_images = load("shapes", "test")
small = {}
for sampler, step in {"ddpm": ddpm_step, "ddim": ddim_step}.items():
    for count in (10, 50):
        source = torch.Generator().manual_seed(0)
        few_steps = trained_diffusion.respace(count)
        small[count, sampler] = sample(few_steps, trained, (64, 3, 32, 32), step, source)

for (count, sampler), few_images in small.items():
    live, stored = sample_quality(judge, few_images, test_images), runs[count, sampler]["first_batch"]
    ratio = live["frechet_distance"] / stored["frechet_distance"]
    print(f"{sampler}, {count} steps: as stored, to 10 %: {abs(ratio - 1) < 0.1}")
    assert abs(ratio - 1) < 0.1

# %% slide=["# With few steps DDIM keeps half of its pictures", "[picture]", "The same starting points in each row: in half of the columns DDIM draws the same with 10 steps as with 50."]
rows = {f"{sampler.upper()}, {count}": few_images[:8] for (count, sampler), few_images in small.items()}
figure = show_grid(torch.cat(list(rows.values())), row_titles=list(rows), inches_per_image=1.0)
show(figure, "Four rows of eight pictures: DDPM and DDIM with 10 and with 50 steps.")

# %% [markdown]
# *The same eight starting points in each row. In four of eight columns DDIM draws the same with 10 steps as with 50, in one more
# only the ground differs, in three colour or shape. DDPM, which takes more noise on its way, draws something else.*

# %% [markdown] tags=["optional"]
# ## Bits per dimension *(at a second reading)*
#
# Is a good sampler a good model of the data? Chapter 01's bound (1.28) says how likely a model holds a set of images. For
# 8-bit images this is a probability, by the bins of (1.31), and a probability is a code length: an event of probability
# $P$ can be written in $-\log_2P$ bits, and no code does better on average. Divided by the number of dimensions $D$, here
# $3\cdot32\cdot32$:
#
# $$\text{bits per dimension}=\frac{-\log_2P(x)}{D}=\frac{-\ln P(x)}{D\ln2} \tag{2.23, definition}$$
#
# A model that knows nothing gives each of the 256 values the same probability, and needs 8 bits.


# %% tags=["export"]
def bits_per_dim(nats, num_dimensions):
    """Turn nats, -ln P of images of num_dimensions numbers (any shape), into bits per dimension.

    Source: Ho et al. 2020, section 4.3 and table 1.
    """
    # 1 nat = 1 / ln 2 bits
    return nats / (num_dimensions * math.log(2))


# %% [markdown]
# How many does a PNG file take, which is lossless too?

# %%
D = 3 * 32 * 32
sixteen = load("shapes", "test").batch(range(16))["image"]
with tempfile.TemporaryDirectory() as folder:
    for number, image in enumerate(sixteen):
        save_image((image + 1) / 2, f"{folder}/{number}.png")
    file_bits = [8 * file.stat().st_size for file in Path(folder).iterdir()]
png = sum(file_bits) / len(file_bits) / D
print(f"PNG: {png:.1f} bits per dimension")

# %% [markdown]
# Now the model. `bound` returns each image's terms, step by step, here of the diffusion respaced to 100 steps, which is a
# model as well. Both fixed variances can be tried. For comparison there is a denoiser that *knows* the image: what it needs
# is the price of the fixed variances alone.


# %%
def image_bits(denoiser, variance, num_steps=100):
    """Bits per dimension of the sixteen images, from each step: (num_steps + 1,), the last one being the prior's."""
    short = Diffusion(trained_diffusion.betas, prediction="v", variance=variance).respace(num_steps)
    source = torch.Generator().manual_seed(4)
    nats = bound(short, denoiser, sixteen, source, discretized_log_likelihood)  # (16, num_steps + 1)
    return bits_per_dim(nats, D).mean(dim=0)


def knows_the_image(x_t, t):
    """The velocity at x_t, from the sixteen images themselves."""
    kept = trained_diffusion.alpha_bar[t].float()[:, None, None, None]
    return (kept.sqrt() * x_t - sixteen) / (1 - kept).sqrt()


# %%
bits = {
    (variance, who): image_bits(denoiser, variance)
    for variance in ("fixed_small", "fixed_large")
    for who, denoiser in (("the network", trained), ("knows the image", knows_the_image))
}
rows = [
    [variance, who, f"{terms.sum():.1f}", f"{terms[:3].sum():.1f}"] for (variance, who), terms in bits.items()
]
show_table(
    rows, columns=["variance", "denoiser", "bits per dimension", "of these, the three steps with least noise"]
)
for variance in ("fixed_small", "fixed_large"):
    terms = bits[variance, "the network"]
    assert png < terms.sum() < 8 and terms[:3].sum() > 0.5 * terms.sum()

# %% slide=["# Good samples and short codes are different virtues", "[picture]", "Most bits are paid in the steps with the least noise, for details that hardly anybody sees."] tags=["draw"]
figure, axis = plt.subplots(figsize=(8, 3.4), layout="constrained")
for (variance, who), terms in bits.items():
    style = {"color": colours[variance == "fixed_large"], "linestyle": "-" if who == "the network" else ":"}
    axis.semilogx(range(1, 101), terms[:-1].cumsum(dim=0), label=f"{variance}, {who}", **style)
axis.axhline(8, color="grey", linestyle="--", label="knows nothing")
axis.axhline(png, color="black", linewidth=0.8, label="PNG")
axis.set(xlabel="steps, from the one with the least noise", ylabel="bits per dimension so far", ylim=(0, 10))
axis.legend(fontsize="small", ncols=3, loc="upper center")
show(figure, "Four curves of bits added up over the steps: most of them come from the first few steps.")

# %% [markdown]
# *Where the bits go, added up from the step with the least noise.*
#
# Better than knowing nothing, and far worse than PNG, which has no loss either. (Ours is an upper limit: (1.28) is a bound.)
# There are three likely reasons, none of them seen in a sample; of these only the second was tried here.
#
# 1. *The last steps* decide details of a grey level or two, which hardly anybody sees, but which have to be coded, and dearly
#    by a network that is a little off; PNG foretells plain areas exactly. The loss hardly cares for them, as the weights of
#    (1.33) showed. Ho et al. found that more than half of their model's bits describe what cannot be perceived.
# 2. *The variance.* The small one is cheap for a denoiser that knows the image, but charges much for each mistake; the
#    large one forgives, and has its price whatever the network knows. The learned variance of chapter 01 lies between.
# 3. *The steps left out.* With 100 in the place of 1000, each step has to bridge more.
#
# And why must even a denoiser that knows the image pay, with the small variance? With a perfect mean every divergence is 0,
# and what is left is the last step of sampling, where the answer is a normal of standard deviation $\sigma$. Even if its
# mean is right, the right pixel value has no more than the mass of its own bin, and so costs
#
# $$-\log_2\left(\Phi\!\left(\frac{1}{255\,\sigma}\right)-\Phi\!\left(-\frac{1}{255\,\sigma}\right)\right)
# =-\log_2\operatorname{erf}\!\left(\frac{1}{255\,\sigma\sqrt2}\right) \tag{2.24}$$

# %%
log_variance = trained_diffusion.respace(100).log_posterior_variance[0]
sigma = (log_variance / 2).exp()
pixel = torch.tensor(0.2, **exact)  # any value but the outermost two
nats = -discretized_log_likelihood(pixel, pixel, log_variance)
verify("2.24", bits_per_dim(nats, 1), -torch.erf(1 / (255 * sigma * math.sqrt(2))).log2(), atol=1e-10)
print(f"sigma {sigma:.4f}: {bits_per_dim(nats, 1):.2f} bits per dimension")

# %% [markdown] tags=["core"]
# ## Your own images
#
# `load` takes a folder as well, with one subfolder per class or none. Here is one, made of Shapes saved as PNG files:

# %%
workshop = tempfile.TemporaryDirectory()
photos = Path(workshop.name, "photos")
sixty = images.batch(range(60))
for number, (image, shape) in enumerate(zip(sixty["image"], sixty["shape"])):
    folder = photos / images.labels["shape"][shape]
    folder.mkdir(parents=True, exist_ok=True)
    save_image((image + 1) / 2, folder / f"{number}.png")
mine = load(photos, image_size=32)
print(f"classes: {', '.join(mine.labels['class'])}; {len(mine)} of 60 for training")

# %% [markdown]
# One command trains on it, draws a sample, and leaves a checkpoint; a run that was stopped goes on where it was:
#
# ```
# python -m lecture26 train ddpm --data ./photos --image-size 32 --name my_model
# python -m lecture26 sample --model my_model --out grid.png
# ```
#
# All options, and `accelerate launch`: `python -m lecture26 train --help`. Here are three steps; the environment variable
# keeps the checkpoint out of the course's own folder.

# %%
command = f"train ddpm --data {photos} --image-size 32 --name my_model --steps 3 --batch-size 4"
finished = CliRunner(env={"LECTURE26_DATA": workshop.name}).invoke(app, command)
assert finished.exit_code == 0, finished.output
print(sorted(file.name for file in Path(workshop.name, "checkpoints").iterdir()))
workshop.cleanup()

# %% [markdown] tags=["core"]
# ## Your code runs the model
#
# Save this notebook, call `make mine` in a terminal, and run the next cell: it draws with your functions, as at the
# [end of chapter 01](01_ddpm.ipynb), and says which of them were called. The long-trained weights go through your
# blocks, your attention and your way down and up, and the sampler of chapter 01, which may be yours as well, draws
# images from them.

# %% tags=["milestone", "nbval-ignore-output"]
from lecture26.kit.own_package import show_milestone

show_milestone(
    "sample --model ddpm_shapes32 --count 16",
    alt="Sixteen images, most of which show one object in one colour on a plain or patterned background.",
)

# %% [markdown] tags=["core"]
# ## What the lecture's slide says
#
# Of the network, the slides say one line, under latent diffusion: 'applies U-Net denoising in latent space'. For the last
# three words, [chapter 07](07_latent_diffusion.ipynb) will give the same class other channels. In the sampling algorithm
# the slides write $\mu_\theta(x_t)$ and $\Sigma_\theta(x_t)$; what they leave out, the step $t$, reaches every block.

# %% [markdown] tags=["core"]
# ## Summary
#
# - A U-Net keeps the size, sees detail and the whole, and knows the step: coarser is less noisy (2.1), and skips carry
#   what coarseness loses (2.14).
# - The step goes in as waves, whose shifts are rotations (2.3), and acts by scale and shift on normalised channels (2.6).
# - Branches end in zeros, so each block starts as its skip alone, the identity where channels stay (2.8), and the first
#   loss is known (2.16).
# - Attention mixes all pixels, wherever they are (2.12), at a quadratic price (2.13); so it is for coarse levels.
# - Averaged weights (2.17) look back over a window; at a constant rate they were better than the last ones.
# - What the network says is an expectation: a blur where much is open.
# - Fifty steps do for this network to draw legible pictures; from 100 to 1000 no gain was seen.
# - Good samples and short codes are different virtues: bits per dimension (2.23) count what hardly anybody sees.
#
# [Chapter 03](03_classifier_guidance.ipynb) takes the long-trained network as it is, and makes it draw what is asked for.
# What you have solved so far, in all chapters:

# %% slide=["# What to remember", "- A U-Net sees detail and the whole: coarser is less noisy, and skips carry what it loses.", "- The step goes in as waves, and acts by scale and shift.", "- Branches end in zeros, so the first loss is known.", "- Attention mixes all pixels, at a quadratic price.", "- What the network says is an expectation."] tags=["nbval-ignore-output"]
progress()

# %% [markdown]
# [Previous: 01 DDPM](01_ddpm.ipynb) · [Next: 03 Classifier guidance](03_classifier_guidance.ipynb)
#
# ## References
#
# - Ronneberger, Fischer, Brox 2015, *U-Net: Convolutional Networks for Biomedical Image Segmentation*: section 2.
# - Ho, Jain, Abbeel 2020, *Denoising Diffusion Probabilistic Models*: section 4.3 (code lengths), appendix B (network, EMA).
# - Dhariwal, Nichol 2021, *Diffusion Models Beat GANs on Image Synthesis*: section 3 (architecture), 3.1 (scale and shift).
# - Nichol, Dhariwal 2021, *Improved Denoising Diffusion Probabilistic Models*: section 3 (log-likelihood).
# - Vaswani et al. 2017, *Attention Is All You Need*: sections 3.2 (attention), 3.5 (sines and cosines).
# - Wu, He 2018, *Group Normalization*: section 3.
# - Odena, Dumoulin, Olah 2016, *Deconvolution and Checkerboard Artifacts*.
# - Polyak, Juditsky 1992, *Acceleration of Stochastic Approximation by Averaging*.
# - Heusel et al. 2017, *GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium*: equation 6
#   (Fréchet distance).
# - Kynkäänniemi et al. 2019, *Improved Precision and Recall Metric for Assessing Generative Models*: section 2.
