# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown] slide=["# Most numbers of a picture say nothing new", "64 by 64 pixels of three colours: 12,288 numbers, and a U-Net pays for each of them at every step.", "? A code of a twelfth of the numbers. What must it be good for?", "From it, the picture must come back. And all codes together must be a distribution that one can draw from.", "# What you can do afterwards", "- derive the evidence lower bound, and measure what it falls short by", "- pass a gradient through a random draw", "- predict at which weight a latent number dies", "- judge an autoencoder by more than its decibels", "- build a second stage, and give codes the scale it expects"]
# # 06 The variational autoencoder: a smaller space to diffuse in
#
# [Previous: 05 Classifier-free guidance](05_classifier_free_guidance.ipynb) · [Next: 07 Latent diffusion](07_latent_diffusion.ipynb)
#
# A picture of 64 by 64 pixels has 12,288 numbers, and a U-Net pays for each of them, at every step of every sample. This
# chapter turns pictures into something smaller and back; chapter 07 diffuses there. Two things are asked of such a code:
# from it, the picture must come back, and all codes together must be a distribution that one can draw from. A
# **variational autoencoder** (VAE) trades the two against each other, by one number.
#
# **What you will be able to do**
#
# - derive the evidence lower bound, and measure what it falls short by;
# - pass a gradient through a random draw, and say why the other way to do it is worse;
# - predict at which weight of the divergence a latent number dies, and let the likelihood choose the weight;
# - train an autoencoder of images, and judge it by more than its decibels;
# - build a second stage that draws codes, and give the codes the scale that it expects.
#
# **What it needs**: [chapter 01](01_ddpm.ipynb) (normal densities, the schedule, the training step),
# [chapter 02](02_unet.ipynb) (blocks, patches). **What it takes**: two minutes to run on two cores; all data are
# embedded. To study: some 90 minutes for the core, two and a half hours with everything. Sections marked *(at a second
# reading)* can wait; none is needed later. After a restart of the kernel nothing is defined any more: choose *Run All
# Above Selected Cell* where you want to go on.

# %%
import matplotlib.pyplot as plt
from torch.distributions import kl_divergence
from torchvision.utils import make_grid

from lecture26.checks import check, check_answer, progress
from lecture26.ddpm import (
    Diffusion,
    cosine_betas,
    ddim_step,
    noise_like,
    q_sample,
    sample,
    training_step,
)
from lecture26.kit.checkpoints import load_card
from lecture26.kit.data import load
from lecture26.kit.evaluation import attribute_accuracy, extract_features, frechet_distance
from lecture26.kit.figures import PALETTE, show, show_grid, show_table, use_style
from lecture26.kit.proof import verify
from lecture26.kit.training import train
from lecture26.recipes import find_recipe, load_diffusion, load_model

use_style()
colours = list(PALETTE.values())

# %% [markdown]
# Cells like the next one become the module `lecture26.vae`; the others stay in the notebook.

# %% tags=["export"]
import math

import torch
from torch import nn
from torch.distributions import Normal
from torch.nn import functional as F

from lecture26.kit.validation import check_positive_int, check_shape
from lecture26.unet import group_norm, levels_with_attention, patchify, unpatchify, zero_init

# %% [markdown] tags=["core"]
# ## What this chapter reaches
#
# An autoencoder that was trained on 400,000 pictures of shapes: its codes, and the pictures that come back from them.

# %% slide=["# What this chapter reaches: a twelfth of the numbers", "[picture]", "Pictures that the network has not seen; three of the four channels of their codes, as colours; what comes back."]
trained_vae, vae_recipe = load_model("vae_shapes64"), find_recipe("vae_shapes64")
eight_images = vae_recipe.load_images("test").batch([0, 3, 4, 7, 8, 11, 12, 15])["image"]  # (8, 3, 64, 64)
eight_codes = trained_vae.encode(eight_images)[0]  # (8, 4, 16, 16), the means
codes_as_colours = F.interpolate(eight_codes[:, :3] / 2.5, size=64)  # most numbers are in [-2.5, 2.5]
come_back = trained_vae.decode(eight_codes)
three_rows = torch.cat([eight_images, codes_as_colours, come_back])
figure = show_grid(three_rows, row_titles=["images", "codes", "come back"], inches_per_image=1.3)
show(
    figure,
    "Three rows of eight: pictures of shapes, blocky small pictures in which they can be made out, and the pictures again.",
)

# %% [markdown]
# *Pictures that the network has not seen; three of the four channels of their codes, as colours; what comes back.* All
# that the decoder sees are 16 by 16 places of four numbers. And what comes out of codes that are drawn at random? For
# that, the end of this chapter needs a second model, and a scale between the two.

# %% [markdown] tags=["core"]
# ## A hidden number behind each picture
#
# Imagine that data come about in two steps. A hidden number $z$ is drawn from a standard normal distribution, the
# **prior**. Then a *decoder* turns it into a point of the plane, here on a circle, and the world adds some noise:
#
# $$z\sim\mathcal N(0,I),\qquad x=g(z)+\sigma\,\eta,\quad\eta\sim\mathcal N(0,I),
# \qquad p(x)=\int p(z)\,p(x\mid z)\,dz \tag{6.1, definition}$$
#
# $z$ is the **latent variable**, each of its components a *latent number*, and a value of it a *code*; $p(x)$ is called the
# **evidence**. With one latent number the integral is a sum over a fine grid, exact to ten digits. (Proofs compute in
# double precision.)

# %% slide=["# A hidden number behind each picture", "$$z\\sim\\mathcal N(0,I),\\qquad x=g(z)+\\sigma\\,\\eta,\\qquad p(x)=\\int p(z)\\,p(x\\mid z)\\,dz \\tag{6.1}$$", "Prior, decoder, evidence. Which $z$ lies behind a given $x$?", "$$p(z\\mid x)=\\frac{p(z)\\,p(x\\mid z)}{p(x)}$$", "With a thousand latent numbers, the integral is out of reach."]
exact = {"dtype": torch.float64}
circle_std = 0.2
line = torch.linspace(-8, 8, 2001, **exact)  # a grid of z
spacing = (line[1] - line[0]).item()
prior = Normal(torch.tensor(0.0, **exact), 1.0)


def decode_point(z):
    """A point of the circle for each code, (..., 1) -> (..., 2)."""
    return torch.cat([(1.5 * z).cos(), (1.5 * z).sin()], dim=-1)


def log_joint_on_line(x):
    """log p(x, z) for points x (..., 2) and all z of the grid: (..., 2001)."""
    by_number = Normal(decode_point(line[:, None]), circle_std).log_prob(x[..., None, :])
    return prior.log_prob(line) + by_number.sum(dim=-1)


def integrate(values):
    """The integral over z of values on the grid, (..., 2001) -> (...)."""
    return torch.trapezoid(values, line, dim=-1)


two_points = torch.tensor([[0.3, 1.1], [-1.1, 0.05]], **exact)  # a plain one, and one where the ends meet
two_evidences = integrate(log_joint_on_line(two_points).exp()).log()  # (2,)
show_table(
    [["plain", f"{two_evidences[0]:.3f}"], ["torn", f"{two_evidences[1]:.3f}"]],
    columns=["point", r"$\log p(x)$, nats"],
)

# %% [markdown]
# Which $z$ lies behind a given $x$? Bayes' rule answers: $p(z\mid x)=p(z)\,p(x\mid z)/p(x)$, the **posterior**. For the
# plain point it is one bump. From $z=-2.1$ to $z=2.1$ the decoder runs once around the circle, so both ends land on the
# same place. The torn point lies there, and could have come from either.

# %% slide=["# Two points, and what each says of its latent number", "[picture]", "The decoder runs around a circle; at the torn point both ends meet, and its posterior has two bumps."] tags=["draw"]
side = torch.linspace(-1.8, 1.8, 60, **exact)
plane = torch.stack(torch.meshgrid(side, side, indexing="xy"), dim=-1)  # (60, 60, 2)
figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
density = integrate(log_joint_on_line(plane).exp())
axes[0].imshow(density, extent=(-1.8, 1.8, -1.8, 1.8), origin="lower", cmap="Greys")
for place, name in enumerate(("plain", "torn")):
    axes[0].plot(*two_points[place], "os"[place], color=colours[place], markersize=9, label=f"{name} point")
    posterior = (log_joint_on_line(two_points[place]) - two_evidences[place]).exp()
    axes[1].plot(line, posterior, color=colours[place], label=f"posterior, {name} point")
axes[1].plot(line, prior.log_prob(line).exp(), "--", color="grey", label="prior")
axes[0].set(title="evidence p(x)", xticks=[], yticks=[])
axes[0].grid(False)
axes[1].set(xlim=(-4, 4), xlabel="z", title="prior and posteriors")
for axis in axes:
    axis.legend(loc="upper right", fontsize="small")
show(
    figure,
    "A ring of density with two points on it; their posteriors over z, one with a single bump, one with two.",
)

# %% [markdown] slide=["# The evidence is the bound, plus what the guess falls short by", "Any guess $q(z\\mid x)$ will do:", "(6.2)", "(6.3)", "? Raise $\\mathcal L$. Which two good things may happen?"]
# *Left: where the data are, dark; the ring is faint where the ends meet. Right: what each of the two points says
# about its latent number.*
#
# With 1,024 latent numbers there is no grid: the integral is out of reach, and the posterior with it. Something has to
# stand in.

# %% [markdown] tags=["core"]
# ## The bound
#
# Take any distribution $q(z\mid x)$, a guess at the posterior. Write $\log p(x)$, which does not depend on $z$, as an
# expectation over $q$, and put in $p(x)=p(x,z)/p(z\mid x)$:
#
# $$\log p(x)=\mathbb E_q\left[\log\frac{p(x,z)}{p(z\mid x)}\right]
# =\mathbb E_q\left[\log\frac{p(x,z)}{q(z\mid x)}\right]+\mathbb E_q\left[\log\frac{q(z\mid x)}{p(z\mid x)}\right]$$
#
# The second term is a divergence. The first is what we can compute, and it gets a name, the **evidence lower bound**
# (ELBO):
#
# $$\mathcal L(x)=\mathbb E_{q(z\mid x)}\bigl[\log p(x,z)-\log q(z\mid x)\bigr] \tag{6.2, definition}$$
#
# $$\log p(x)=\mathcal L(x)+\mathrm{KL}\bigl(q(z\mid x)\,\|\,p(z\mid x)\bigr) \tag{6.3}$$
#
# A divergence is at least 0, so $\mathcal L\le\log p(x)$ for *every* $q$, and it falls short by how far the guess is from
# the true posterior. Raise $\mathcal L$, and the evidence grows, or the guess gets better, or both. (One may even get
# worse, if the other gains more.) With $p(x,z)=p(x\mid z)\,p(z)$ it falls into two terms:
#
# $$\mathcal L(x)=\mathbb E_{q(z\mid x)}\bigl[\log p(x\mid z)\bigr]-\mathrm{KL}\bigl(q(z\mid x)\,\|\,p(z)\bigr)
# \tag{6.4}$$
#
# Draw a code from the guess, decode it, and see how likely the data are: *reconstruction*. And keep the guess near
# the prior: *regularity*. [Chapter 01](01_ddpm.ipynb) met this bound in (1.28), with $x_1,\dots,x_T$ as latents and a $q$
# that is fixed. Here $q$ is learned.
#
# The usual guess is a normal distribution with independent numbers,
# $q(z\mid x)=\mathcal N(\mu,\operatorname{diag} \sigma^2)$, whose means and variances a network reads off $x$: the
# **encoder**. It puts out $\log\sigma^2$, so that any number will do, and $\sigma$ comes out positive.

# %% slide=["# Two ways in, one way out", "[picture]", "Training goes from left to right. To draw, the encoder is left away, and codes come from the prior."] tags=["draw"]
figure, axis = plt.subplots(figsize=(12, 3.6), layout="constrained")
parts = {
    "$x$": (0, 0, "lightgrey"), "encoder": (2, 0, colours[0]), r"$\mu,\ \log\sigma^2$": (4.3, 0, "lightgrey"),
    r"$z=\mu+\sigma\,\epsilon$": (7, 0, colours[2]), "decoder $g$": (9.6, 0, colours[0]), r"$\hat x$": (11.6, 0, "lightgrey"),
    r"$\epsilon\sim\mathcal{N}(0,I)$": (7, -1.3, "lightgrey"), r"prior $\mathcal{N}(0,I)$": (7, 1.5, "lightgrey"),
}  # fmt: skip
for text, (across, up, colour) in parts.items():
    rim = {"boxstyle": "round,pad=0.45", "facecolor": colour, "edgecolor": "black", "alpha": 0.35}
    axis.text(across, up, text, ha="center", va="center", fontsize=14, bbox=rim, color="none")
    axis.text(across, up, text, ha="center", va="center", fontsize=14)
black, red = (
    {"arrowstyle": "->", "linewidth": 1.5},
    {"arrowstyle": "<->", "linewidth": 1.5, "color": colours[1]},
)
for begin, end in ((0.35, 1.2), (2.8, 3.35), (5.25, 5.85), (8.15, 8.65), (10.6, 11.2)):
    axis.annotate("", (end, 0), (begin, 0), arrowprops=black)
axis.annotate("", (7, -0.45), (7, -0.85), arrowprops=black)
axis.annotate("", (7, 0.45), (7, 1.05), arrowprops=black | {"linestyle": "--"})
axis.annotate("", (5.95, 1.5), (4.3, 0.45), arrowprops=red | {"connectionstyle": "arc3,rad=-0.25"})
axis.text(3.0, 1.3, r"divergence (6.5)", color=colours[1], ha="center", fontsize=13)
axis.plot([0, 0, 11.6, 11.6], [-0.9, -2, -2, -0.9], color=colours[1], linewidth=1.5)
for across in (0, 11.6):
    axis.annotate("", (across, -0.4), (across, -0.95), arrowprops=red | {"arrowstyle": "->"})
axis.text(3.2, -1.85, r"squared error (6.6)", color=colours[1], ha="center", fontsize=13)
axis.text(7.15, 0.75, "to draw without $x$", fontsize=12, va="center")
axis.set(xlim=(-0.6, 12.2), ylim=(-2.2, 2))
axis.axis("off")
show(
    figure,
    "x goes through the encoder to a mean and a log-variance, a draw of z, the decoder, and comes out as x-hat; red arrows "
    "mark the divergence from the prior and the squared error between x and x-hat.",
)

# %% [markdown]
# *The two terms of the loss in red. To draw, the left half is left away.*
#
# ### The divergence
#
# Of one number, with $\mathbb E_q[z^2]=\mu^2+\sigma^2$, the divergence needs no integral:
#
# $$\mathrm{KL}=\mathbb E_q\left[-\tfrac12\log\sigma^2-\frac{(z-\mu)^2}{2\sigma^2}+\frac{z^2}2\right]
# =\tfrac12\left(-\log\sigma^2-1+\mu^2+\sigma^2\right)$$
#
# and independent numbers add up:
#
# $$\mathrm{KL}\bigl(\mathcal N(\mu,\operatorname{diag}\sigma^2)\,\|\,\mathcal N(0,I)\bigr)
# =\tfrac12\sum_i\left(\mu_i^2+\sigma_i^2-1-\log\sigma_i^2\right) \tag{6.5}$$
#
# It is 0 for $\mu=0$, $\sigma=1$ only. With $\mu=2$, $\sigma=0.5$ it charges $\tfrac12(4+0.25-1+1.39)=2.32$ nats: a sharp
# guess pays for its sharpness, $-\log\sigma$, and a far one for its distance, $\mu^2/2$.
#
# #### Exercise 1: the divergence
#
# *Formula, medium, 5 minutes.* Write `kl_to_standard_normal`, (6.5), for a batch of codes of any shape: vectors, or small
# pictures. Which axes are summed over?


# %% tags=["export", "exercise"]
def kl_to_standard_normal(mean, log_variance):
    """The divergence KL(N(mean, variance) || N(0, I)) of each sample's code distribution from the prior.

    Args:
        mean: of each latent number, (B, ...).
        log_variance: the logarithm of each variance, like mean.

    Returns:
        (B,), in nats: one number for each sample, at least 0.

    Source: Kingma and Welling 2014, appendix B.
    """
    ### BEGIN SOLUTION
    # KL = 1/2 sum_i (mu_i^2 + sigma_i^2 - 1 - log sigma_i^2)
    per_number = (mean**2 + log_variance.exp() - 1 - log_variance) / 2
    return per_number.flatten(1).sum(dim=1)
    ### END SOLUTION


# %% slide=["# Two terms, each with a meaning", "$$\\mathcal L(x)=\\underbrace{\\mathbb E_{q(z\\mid x)}\\bigl[\\log p(x\\mid z)\\bigr]}_{\\text{reconstruction}}-\\underbrace{\\mathrm{KL}\\bigl(q(z\\mid x)\\,\\|\\,p(z)\\bigr)}_{\\text{regularity}} \\tag{6.4}$$", "A normal guess, read off $x$ by the **encoder**, needs no integral:", "$$\\mathrm{KL}=\\tfrac12\\sum_i\\left(\\mu_i^2+\\sigma_i^2-1-\\log\\sigma_i^2\\right) \\tag{6.5}$$"]
check("vae.kl_to_standard_normal", kl_to_standard_normal)

# %% slide=["# The divergence charges for distance and for sharpness", "[code kl_to_standard_normal]", "? $\\mu=2$, $\\sigma=0.5$: what does it charge?", "$\\tfrac12(4+0.25-1+1.39)=2.32$ nats."]
generator = torch.Generator().manual_seed(0)
some_means, some_log_variances = torch.randn(2, 5, 4, 3, 3, generator=generator, **exact)
by_torch = kl_divergence(Normal(some_means, (some_log_variances / 2).exp()), prior).sum(dim=(1, 2, 3))
verify("6.5", kl_to_standard_normal(some_means, some_log_variances), by_torch, atol=1e-12)

# %% [markdown]
# ### The reconstruction
#
# Our decoder adds normal noise of standard deviation $\sigma$ to each of $D$ numbers, so that the logarithm of its
# density is a squared error, seen through $\sigma$. (Here and in (6.10) $\sigma$ is the decoder's. The encoder's are
# $\sigma_i$, written $\sigma$ in (6.8) and (6.9).)
#
# $$-\log p(x\mid z)=\frac{\|x-\hat x\|^2}{2\sigma^2}+\frac D2\log(2\pi\sigma^2),\qquad\hat x=g(z) \tag{6.6}$$
#
# #### Exercise 2: the reconstruction
#
# *Formula, easy, 4 minutes.* Write `negative_log_likelihood`, the constant included: it will matter where a weight is
# chosen.


# %% tags=["export", "exercise"]
def negative_log_likelihood(x, x_hat, decoder_std):
    """-log p(x | z) of a decoder that adds Gaussian noise: p(x | z) = N(x; x_hat, decoder_std^2 I).

    Args:
        x: data, (B, ...).
        x_hat: the decoder's outputs, like x.
        decoder_std: the standard deviation of each number of x around x_hat; a number above 0.

    Returns:
        (B,), in nats, one number for each sample.

    Raises:
        ValueError: if x and x_hat are of different shapes.

    Source: Kingma and Welling 2014, appendix C.2.
    """
    check_shape("x_hat", x_hat, x.shape, of="x")
    ### BEGIN SOLUTION
    # -log N(x; x_hat, sigma^2 I) = |x - x_hat|^2 / (2 sigma^2) + D/2 log(2 pi sigma^2)
    squares = ((x - x_hat) ** 2).flatten(1)  # (B, D)
    constant = squares.shape[1] / 2 * math.log(2 * math.pi * decoder_std**2)
    return squares.sum(dim=1) / (2 * decoder_std**2) + constant
    ### END SOLUTION


# %%
check("vae.negative_log_likelihood", negative_log_likelihood)

# %%
some_data, some_outputs = torch.randn(2, 5, 3, 4, 4, generator=generator, **exact)
by_torch = -Normal(some_outputs, 0.3).log_prob(some_data).sum(dim=(1, 2, 3))
verify("6.6", negative_log_likelihood(some_data, some_outputs, 0.3), by_torch, atol=1e-9)

# %% [markdown]
# ### The bound on a grid
#
# With one or two latent numbers, evidence and bound can both be had, as sums over a grid of codes. That is how one finds
# out what a bound is worth.
#
# #### Exercise 3: the bound on a grid
#
# *Algorithm, hard, 20 minutes.* Write `bound_on_grid`: decode the grid once, find $\log p(x,z)$ for each pair of a
# sample and a code, and from it $\log p(x)$ by (6.1) and $\mathcal L(x)$ by (6.2). It must hold, too, where no code of the
# grid explains a sample, and every density is 0 in floating point.


# %% tags=["export", "exercise"]
def bound_on_grid(x, decode, decoder_std, mean, log_variance, codes, volume):
    """The evidence and the bound of each sample, by sums over a grid of codes.

    Args:
        x: data, (B, D).
        decode: callable, codes (G, k) -> the decoder's outputs (G, D).
        decoder_std: the standard deviation of each number of x around an output; a number above 0.
        mean, log_variance: of each sample's guess q(z | x), (B, k).
        codes: a grid, (G, k), even, fine and wide enough for prior, posteriors and guesses.
        volume: of a cell of the grid: its spacing to the power of k.

    Returns:
        log_evidence, elbo: log p(x) and the bound, (B,) each, in nats. Both carry gradient.

    Source: equations 6.1 and 6.2 of the chapter.
    """
    ### BEGIN SOLUTION
    x_hat = decode(codes)  # (G, D)
    # log p(x, z) = log p(z) + log p(x | z)
    log_prior = -negative_log_likelihood(codes, torch.zeros_like(codes), 1.0)  # (G,)
    log_likelihoods = [-negative_log_likelihood(one.expand_as(x_hat), x_hat, decoder_std) for one in x]
    log_joint = log_prior + torch.stack(log_likelihoods)  # (B, G)
    guess = Normal(mean[:, None], (log_variance[:, None] / 2).exp())
    log_q = guess.log_prob(codes).sum(dim=2)  # (B, G)
    # p(x) = integral of p(x, z) over z
    log_evidence = log_joint.logsumexp(dim=1) + math.log(volume)
    # L = E_q[log p(x, z) - log q(z | x)]
    elbo = (log_q.exp() * (log_joint - log_q)).sum(dim=1) * volume
    return log_evidence, elbo
    ### END SOLUTION


# %%
check("vae.bound_on_grid", bound_on_grid)

# %% [markdown]
# On the circle, for five guesses at each of the two points: the bound against its two terms, and the evidence against
# bound and gap, with the posterior by Bayes' rule.

# %%
five_means = torch.tensor([0.0, 0.8, 0.8, 2.0, -2.1], **exact)[:, None]  # (5, 1)
five_log_variances = 2 * torch.tensor([1.0, 0.5, 0.1, 0.4, 0.15], **exact).log()[:, None]
five_guesses = Normal(five_means, (five_log_variances / 2).exp()).log_prob(line)  # log q, (5, 2001)
ten = (two_points.repeat_interleave(5, dim=0), five_means.repeat(2, 1), five_log_variances.repeat(2, 1))
on_grid = bound_on_grid(ten[0], decode_point, circle_std, *ten[1:], line[:, None], spacing)
ten_evidences, ten_bounds = (values.view(2, 5) for values in on_grid)

likelihoods = log_joint_on_line(two_points) - prior.log_prob(line)  # log p(x | z), (2, 2001)
reconstruction = integrate(five_guesses.exp() * likelihoods[:, None])  # (2, 5)
verify("6.4", ten_bounds, reconstruction - kl_to_standard_normal(five_means, five_log_variances), atol=1e-9)
log_posteriors = log_joint_on_line(two_points).log_softmax(dim=-1) - math.log(spacing)
gaps = integrate(five_guesses.exp() * (five_guesses - log_posteriors[:, None]))  # KL(q || posterior), (2, 5)
verify("6.3", ten_evidences, ten_bounds + gaps, atol=1e-9)

# %% [markdown]
# Which guess is best? Nothing here is random, so the bound can simply be climbed.


# %%
def best_guess(x, start):
    """The normal guess with the highest bound near a mean, for a point x (2,): mean, log-variance, and the gap."""
    parameters = torch.tensor([start, -1.0], requires_grad=True, **exact)  # mean, log-variance
    climber = torch.optim.LBFGS([parameters], max_iter=200, line_search_fn="strong_wolfe")

    def on_grid():
        guess = parameters[:1, None], parameters[1:, None]
        return bound_on_grid(x[None], decode_point, circle_std, *guess, line[:, None], spacing)

    def negative_bound():
        climber.zero_grad()
        loss = -on_grid()[1].sum()
        loss.backward()
        return loss

    climber.step(negative_bound)
    log_evidence, elbo = on_grid()
    return *parameters.detach(), (log_evidence - elbo).item()


# %% [markdown]
# #### Exercise 4: two bumps, one guess
#
# *Question, medium, 5 minutes.* The point $(-1.1,0)$ lies exactly where the two ends meet: its posterior has two equal
# bumps, far apart. The best normal guess takes one of them. How many nats does the bound then fall short of the evidence?
# Use (6.3); within 0.1 will do.

# %% tags=["question"]
### BEGIN SOLUTION
# where the guess is, the posterior has the same form but half of the height: KL = log(q / (q / 2)) = ln 2
gap_of_one_bump = 0.69
### END SOLUTION

# %%
check_answer(
    "vae.gap_of_one_bump",
    gap_of_one_bump,
    best_guess(torch.tensor([-1.1, 0.0], **exact), start=2.0)[2],
    within=0.1,
    hint="On the bump that the guess takes, by which factor do guess and posterior differ?",
)

# %% slide=["# The best normal guess takes one bump", "[picture]", "Where the posterior has one bump hardly anything is lost; where it has two, nearly a bit."] tags=["draw"]
figure, axes = plt.subplots(1, 2, figsize=(11, 3.2), layout="constrained", sharey=True)
for axis, name, point, start in zip(axes, ("plain", "torn"), two_points, (0.5, 2.0)):
    best_mean, best_log_variance, gap = best_guess(point, start)
    axis.plot(line, log_joint_on_line(point).softmax(dim=-1) / spacing, color=colours[0], label="posterior")
    best = Normal(best_mean, (best_log_variance / 2).exp()).log_prob(line).exp()
    axis.plot(line, best, "--", color=colours[1], label="best normal guess")
    axis.set(title=f"{name} point: gap {gap:.3f} nats", xlabel="z", xlim=(-4, 4))
    axis.legend(loc="upper left")
show(
    figure,
    "For the plain point the best guess covers the posterior; for the torn one it covers one of two bumps.",
)

# %% [markdown]
# *The best normal guess. Where the posterior has one bump, hardly anything is lost. Where it has two, the gap is minus
# the logarithm of the share of the bump that was taken, nearly a bit.*
#
# This gap is the price of a simple *form* of guess. An encoder network adds to it, as one function has to serve all
# $x$; on digits the sum of the two is measured below.

# %% [markdown] tags=["core"]
# ## A gradient through a random draw
#
# To train, we need the gradient of $\mathcal L$. The divergence is a formula. The reconstruction is an expectation
# over $q$, which depends on what we want to differentiate by. One draw $z\sim q$ gives a number $f(z)=\log p(x\mid z)$;
# how would that change with $\mu$? A draw has no derivative.
#
# *One way* is to differentiate the density under the integral, $\nabla q=q\,\nabla\log q$:
#
# $$\nabla\,\mathbb E_q[f(z)]=\int f(z)\,\nabla q(z)\,dz=\mathbb E_q\bigl[f(z)\,\nabla\log q(z)\bigr]
# \tag{6.7, step}$$
#
# the **score-function** estimate. *The other way* takes the randomness out of $q$. Draw noise that knows nothing of
# $\mu$ and $\sigma$, and build $z$ from it:
#
# $$z=\mu+\sigma\,\epsilon,\qquad\epsilon\sim\mathcal N(0,I),\qquad\sigma=e^{\frac12\log\sigma^2}
# \tag{6.8, definition}$$
#
# Now $z$ is a function of $\mu$ and $\log\sigma^2$ with $\partial z/\partial\mu=1$ and
# $\partial z/\partial\log\sigma^2=\tfrac12\sigma\epsilon$, the expectation is over $\epsilon$, and the gradient goes
# inside. This is the **reparameterisation**:
#
# $$\frac{\partial}{\partial\mu}\mathbb E_q[f]=\mathbb E_\epsilon\bigl[f'(\mu+\sigma\epsilon)\bigr],\qquad
# \frac{\partial}{\partial\log\sigma^2}\mathbb E_q[f]=\mathbb E_\epsilon\bigl[f'(\mu+\sigma\epsilon)\,
# \tfrac12\sigma\epsilon\bigr] \tag{6.9}$$
#
# #### Exercise 5: a draw with a gradient
#
# *Formula, easy, 3 minutes.* Write `reparameterize`. What it is given is the logarithm of a variance; what stretches the
# noise is a standard deviation.


# %% tags=["export", "exercise"]
def reparameterize(mean, log_variance, noise):
    """Turn standard normal noise into a draw from N(mean, variance) that has a gradient.

    Args:
        mean: of each latent number, (B, ...).
        log_variance: the logarithm of each variance, like mean.
        noise: from N(0, 1), like mean.

    Returns:
        z, like mean.

    Source: Kingma and Welling 2014, section 2.4.
    """
    ### BEGIN SOLUTION
    # z = mu + sigma eps, sigma = exp(log(sigma^2) / 2)
    return mean + (log_variance / 2).exp() * noise
    ### END SOLUTION


# %% slide=["# How does a draw change with $\\mu$?", "? $z\\sim\\mathcal N(\\mu,\\sigma^2)$, and $f(z)$ is a number. What is its derivative by $\\mu$?", "A draw has none. Take the randomness out:", "$$z=\\mu+\\sigma\\,\\epsilon,\\qquad\\epsilon\\sim\\mathcal N(0,I) \\tag{6.8}$$", "$$\\frac{\\partial}{\\partial\\mu}\\mathbb E_q[f]=\\mathbb E_\\epsilon\\bigl[f'(\\mu+\\sigma\\epsilon)\\bigr] \\tag{6.9}$$"]
check("vae.reparameterize", reparameterize)

# %% [markdown]
# Both ways must agree in expectation: the left side of (6.9) by (6.7), on the grid of $z$; the right side through
# `reparameterize`, on the same grid, now of $\epsilon$.


# %% slide=["# Reparameterisation is a line", "[code reparameterize]", "The other way needs no slope of $f$:", "$$\\nabla\\,\\mathbb E_q[f(z)]=\\mathbb E_q\\bigl[f(z)\\,\\nabla\\log q(z)\\bigr] \\tag{6.7}$$"]
def f_plain(z):
    """log p(x | z) of the plain point, (...) -> (...)."""
    return Normal(decode_point(z[..., None]), circle_std).log_prob(two_points[0]).sum(dim=-1)


mu, log_sigma2 = (torch.tensor(value, requires_grad=True, **exact) for value in (0.8, -2.0))
log_q = Normal(mu, (log_sigma2 / 2).exp()).log_prob(line)
by_score = torch.autograd.grad(integrate(log_q.exp() * f_plain(line)), (mu, log_sigma2))
along_path = prior.log_prob(line).exp() * f_plain(reparameterize(mu, log_sigma2, line))
by_path = torch.autograd.grad(integrate(along_path), (mu, log_sigma2))
verify("6.9", torch.stack(by_path), torch.stack(by_score), atol=1e-9)

# %% [markdown]
# How far from the truth are averages over a batch? And what if 50 is added to $f$, which changes nothing in the truth?

# %%
draws = torch.randn(500, 64, generator=torch.Generator().manual_seed(1), **exact)  # 500 batches of 64
many_mu = torch.full((500, 64), 0.8, requires_grad=True, **exact)  # one for each draw, with its own gradient
f_values = f_plain(reparameterize(many_mu, log_sigma2.detach(), draws))
(path,) = torch.autograd.grad(f_values.sum(), many_mu)
# grad log q by mu is (z - mu) / sigma^2 = eps / sigma
score, f_values = draws / (log_sigma2.detach() / 2).exp(), f_values.detach()
estimates = {
    "path": path.mean(dim=1),
    "score function": (f_values * score).mean(dim=1),
    "score function, f + 50": ((f_values + 50) * score).mean(dim=1),
}
rows = [["exact", f"{by_path[0]:.1f}", ""]]
for name, values in estimates.items():
    mean_and_error = f"{values.mean():.1f} ± {values.std() / math.sqrt(500):.1f}"
    rows.append([name, mean_and_error, f"{values.std():.1f}"])
show_table(rows, columns=["estimate", "mean of 500 batches", "standard deviation of one"])

# %% slide=["# Both are right on average; one is far noisier", "[picture]", "The score function uses the value of $f$, so that a constant makes it noisier; the path uses the slope."] tags=["draw"]
figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
for (name, values), colour in zip(estimates.items(), colours):
    axis.hist(values, bins=50, range=(-50, 60), histtype="step", linewidth=2, color=colour, label=name)
axis.axvline(by_path[0].item(), color="black", linewidth=1, label="exact")
axis.set(xlabel="gradient by the mean, from 64 draws", ylabel="batches")
axis.legend()
show(figure, "Three histograms around the exact gradient: that of the path is the narrowest.")

# %% [markdown]
# *All are right on average. The score function uses the value of $f$, so that a constant added to it makes it noisier; the
# path uses the slope.* (Where only the value is known, as in reinforcement learning, one subtracts a *baseline* from $f$
# for this very reason.)
#
# #### Exercise 6: a thousand latent numbers
#
# *Question on paper, hard, 12 minutes.* Let $f(z)=\sum_{i=1}^df_i(z_i)$, and let a baseline have taken away its mean:
# $\mathbb E_q[f_i]=0$. How does the variance of each of the two estimates of $\partial/\partial\mu_1$, from one draw, grow
# with $d$?
#
# <details>
# <summary>Answer, and what to look for in yours</summary>
#
# The path's estimate is $f_1'(z_1)$, whatever $d$ is. The score function's is
# $\bigl(f_1+\sum_{i>1}f_i\bigr)\,\epsilon_1/\sigma_1$. The other $f_i$ are independent of $\epsilon_1$ and have mean 0, so
# their products with it have mean 0, are uncorrelated with each other and with the first term, and add
#
# $$\sum_{i>1}\frac{\operatorname{Var}(f_i)\;\mathbb E[\epsilon_1^2]}{\sigma_1^2}=\frac1{\sigma_1^2}\sum_{i>1}
# \operatorname{Var}(f_i)$$
#
# to its variance: it grows like $d$, its standard deviation like $\sqrt d$. With 1,024 numbers it takes hundreds of
# times as many draws as with one.
#
# - The path's derivative contains $f_1'$ alone, so nothing grows: 1 point.
# - Each further $f_i$ is independent of $\epsilon_1$, so that its term has mean 0 and the estimate stays right: 1 point.
# - The variances add up because the terms are uncorrelated, with a reason: 1 point.
# - Growth like $d$ in the variance, or $\sqrt d$ in the error, is said: 1 point.
#
# </details>
#
# Measured, with $d$ numbers that are seen through noise as they are, $f(z)=\log\mathcal N(x;z,I)$ minus its mean, and
# averages of 64 draws:

# %% slide=["# With a thousand latent numbers only the path is left", "[table]", "Along the path each number gets its own slope; the score function gives all the same value."]
spread_of_guess, x_of_all, rows = 0.5, 1.0, []
source = torch.Generator().manual_seed(2)
for d in (1, 16, 256, 1024):
    eps = torch.randn(100 * 64, d, generator=source)
    slope = x_of_all - spread_of_guess * eps  # f_i' at z = sigma eps: the path's estimate by each mu_i
    f = -((slope**2).sum(dim=1, keepdim=True) - d * (x_of_all**2 + spread_of_guess**2)) / 2  # (6400, 1)
    both = slope, f * eps / spread_of_guess
    errors = [estimate.view(100, 64, d).mean(dim=1).std(dim=0).mean().item() for estimate in both]
    rows.append([d, *(f"{error:.2f}" for error in errors)])
    assert errors[1] > 1.8 * math.sqrt(d) * errors[0]
show_table(rows, columns=["latent numbers", "error of the path", "error of the score function"])

# %% [markdown]
# The exact derivative is 1. Along the path each number gets its own slope; the score function gives all of them the same
# value, times noise.

# %% [markdown] tags=["core"]
# ## One number to trade by
#
# Multiply the bound by $-\sigma^2$, with (6.6):
#
# $$-\sigma^2\mathcal L(x)=\mathbb E_q\Bigl[\tfrac12\|x-\hat x\|^2\Bigr]
# +\sigma^2\,\mathrm{KL}+\tfrac12D\,\sigma^2\log(2\pi\sigma^2) \tag{6.10}$$
#
# With $\sigma$ fixed, the constant moves no parameter. What is left is half the squared error plus a **KL weight** times
# the divergence. So the weight is no trick: it *is* the variance of the decoder's noise, the size of the errors that we
# declare not to matter.
#
# Both terms are *sums*. Averaging one and summing the other changes the weight by the number of terms: for images, a factor
# of thousands.
#
# #### Exercise 7: the loss
#
# *Formula, medium, 5 minutes.* Write `vae_loss`: (6.10) without its constant, from one draw for each sample. Sum over the
# numbers of a sample, and average over the batch.


# %% tags=["export", "exercise"]
def vae_loss(x, x_hat, mean, log_variance, kl_weight):
    """Half the squared error of the reconstruction plus the weighted divergence: what a VAE is trained by.

    Args:
        x: data, (B, ...).
        x_hat: the decoder's outputs for one draw of z each, like x.
        mean, log_variance: what the encoder says of each sample, (B, ...).
        kl_weight: a number, at least 0; the variance of the decoder's noise if the loss is to be its bound.

    Returns:
        A scalar: each term is summed over the numbers of a sample, and the total averaged over the batch.

    Raises:
        ValueError: if x and x_hat are of different shapes.

    Source: Kingma and Welling 2014, equation 10, times the variance of the decoder's noise; Higgins et al.
        2017, equation 4, whose beta is kl_weight over that variance.
    """
    check_shape("x_hat", x_hat, x.shape, of="x")
    ### BEGIN SOLUTION
    # L = mean over the batch of 1/2 |x - x_hat|^2 + beta KL
    squared_error = ((x - x_hat) ** 2).flatten(1).sum(dim=1)  # (B,)
    return (squared_error / 2 + kl_weight * kl_to_standard_normal(mean, log_variance)).mean()
    ### END SOLUTION


# %% slide=["# The KL weight is the variance that we declare not to matter", "$$-\\sigma^2\\mathcal L(x)=\\mathbb E_q\\Bigl[\\tfrac12\\|x-\\hat x\\|^2\\Bigr]+\\sigma^2\\,\\mathrm{KL}+\\text{const} \\tag{6.10}$$", "[code vae_loss]"]
check("vae.vae_loss", vae_loss)

# %% slide=["# Sums, not means", "? Average the squared error over pixels, and sum the divergence. What changes?", "The weight: by the number of pixel values, a factor of thousands.", "Both terms are sums, over the numbers of $x$ and over those of $z$. Divide the whole, if at all."]
six, six_hat = torch.randn(2, 6, 3, 8, 8, generator=torch.Generator().manual_seed(3), **exact)  # D = 192
six_codes = torch.randn(
    2, 6, 4, 2, 2, generator=torch.Generator().manual_seed(4), **exact
)  # mean, log-variance
six_bounds = -negative_log_likelihood(six, six_hat, 0.3) - kl_to_standard_normal(*six_codes)  # one draw each
constant = 192 / 2 * 0.3**2 * math.log(2 * math.pi * 0.3**2)
verify(
    "6.10", -(0.3**2) * six_bounds.mean(), vae_loss(six, six_hat, *six_codes, 0.3**2) + constant, atol=1e-9
)

# %% [markdown]
# Something to train, for data that are no images: three layers each way.


# %% tags=["export"]
class SmallVAE(nn.Module):
    """A variational autoencoder of flat data, with three linear layers each way.

    Args:
        numbers: D, the numbers of a sample.
        latents: k, the numbers of a code.
        hidden: width of the layers.
    """

    def __init__(self, numbers, latents, hidden=192):
        super().__init__()
        self.encoder, self.decoder = (
            nn.Sequential(
                nn.Linear(first, hidden),
                nn.SiLU(),
                nn.Linear(hidden, hidden),
                nn.SiLU(),
                nn.Linear(hidden, last),
            )
            for first, last in ((numbers, 2 * latents), (latents, numbers))
        )

    def encode(self, x):
        """Map data x (B, D) to the mean and the log-variance of their codes, (B, k) each."""
        return self.encoder(x).chunk(2, dim=1)

    def decode(self, z):
        """Map codes z (B, k) to data (B, D)."""
        return self.decoder(z)


# %% [markdown]
# #### Exercise 8: a training step
#
# *Algorithm, medium, 8 minutes.* Write `vae_training_step`: from a batch to a moved network. The optimizer may hold
# gradients of the step before, and the loss returned is the one that the step began with.


# %% tags=["export", "exercise"]
def vae_training_step(optimizer, encode, decode, x, noise, kl_weight):
    """One step of an optimizer along the gradient of a VAE's loss on a batch.

    Args:
        optimizer: a torch.optim.Optimizer of the weights of encoder and decoder.
        encode: callable, data -> mean, log_variance of their codes.
        decode: callable, codes -> data.
        x: data, (B, ...).
        noise: standard normal, one number for each latent number of the batch.
        kl_weight: as vae_loss takes it.

    Returns:
        The loss before the step, a scalar that carries no gradient.

    Source: Kingma and Welling 2014, algorithm 1.
    """
    ### BEGIN SOLUTION
    optimizer.zero_grad()
    mean, log_variance = encode(x)
    x_hat = decode(reparameterize(mean, log_variance, noise))
    loss = vae_loss(x, x_hat, mean, log_variance, kl_weight)
    loss.backward()
    optimizer.step()
    return loss.detach()
    ### END SOLUTION


# %% slide=["# A VAE's training step: encode, draw, decode, descend", "[code vae_training_step]", "# Decode a draw, not the mean", "? Decode the mean in the place of a draw. What goes wrong?", "The encoder's widths feel the divergence alone, and become the prior's; a draw then spoils every picture."]
check("vae.vae_training_step", vae_training_step)

# %% [markdown] tags=["core"]
# ## Too much weight, too little
#
# There is a case in which it can be said exactly what the weight does. Let the data be one number with mean 0 and variance
# $\lambda$, and let encoder and decoder be linear: $q(z\mid x)=\mathcal N(v\,x,s^2)$ and $\hat x=w\,z$. (The letters are
# local: $\lambda$ is not the log signal-to-noise ratio, $\beta$ no step of a schedule, $v$ no prediction, $w$ no guidance.)
# With $z=v\,x+s\,\epsilon$, the loss at the KL weight $\beta=\sigma^2$, averaged over $x$ and $\epsilon$, is
#
# $$L(w,v,s)=\tfrac12\bigl((1-wv)^2\lambda+w^2s^2\bigr)+\tfrac\beta2\bigl(v^2\lambda+s^2-1-\log s^2\bigr)$$
#
# *The encoder, given $w$.* Set the derivatives by $v$ and by $s^2$ to zero: $-w(1-wv)+\beta v=0$ and
# $w^2+\beta-\beta/s^2=0$, so $v=w/(w^2+\beta)$ and $s^2=\beta/(w^2+\beta)$, the true posterior.
#
# *The decoder.* So there is no gap, and the loss is $-\beta$ times the mean log evidence, up to the constant. In the model
# $x\sim\mathcal N(0,w^2+\beta)$, which fits data of variance $\lambda$ best with the variance $\lambda$, and the worse the
# farther it is above; below $\beta$ it cannot be. So, up to a common sign of $w$ and $v$,
#
# $$w^2=\max(\lambda-\beta,\,0),\qquad v=\frac{w}{w^2+\beta},\qquad s^2=\min\Bigl(\frac\beta\lambda,\,1\Bigr)
# \tag{6.11}$$
#
# Put it back in. Where $\beta<\lambda$, the code's total variance is $v^2\lambda+s^2=1$, so the divergence is
# $-\tfrac12\log s^2$, and the squared error $\beta^2/\lambda+(\lambda-\beta)\beta/\lambda=\beta$. Where
# $\beta\ge\lambda$, nothing is coded:
#
# $$\mathbb E\,\mathrm{KL}=\tfrac12\log\frac\lambda\beta\ \text{ or }\ 0,\qquad
# \mathbb E\,\|x-\hat x\|^2=\min(\lambda,\beta) \tag{6.12}$$
#
# The weight is a **price**. A direction of the data whose variance is below the price is not bought: its latent number is
# switched off, $\mu=0$ and $\sigma=1$ whatever $x$ is. This is **posterior collapse**, here no accident of training but the
# optimum of the loss. (Networks can also get stuck in it.) For data of many dimensions the best linear autoencoder with
# $k$ latent numbers treats the $k$ largest principal directions like this, each by itself, and drops the rest (Tipping and
# Bishop 1999; Lucas et al. 2019).


# %% slide=["# The weight is a price", "One number of variance $\\lambda$, linear encoder and decoder, KL weight $\\beta$. At the optimum", "$$\\mathbb E\\,\\mathrm{KL}=\\max\\left(\\tfrac12\\log\\frac\\lambda\\beta,\\,0\\right),\\qquad\\mathbb E\\,\\|x-\\hat x\\|^2=\\min(\\lambda,\\beta) \\tag{6.12}$$", "A direction of less variance than the price is not bought: **posterior collapse**, the optimum and no accident."]
def linear_loss(parameters, variance, beta):
    """L(w, v, s), and its two parts: the squared error and the divergence."""
    w, v, log_s2 = parameters
    error = (1 - w * v) ** 2 * variance + w**2 * log_s2.exp()
    divergence = (v**2 * variance + log_s2.exp() - 1 - log_s2) / 2
    return error / 2 + beta * divergence, error, divergence


def fit_linear(variance, beta):
    """The w, v and log s^2 with the least loss, found by descent."""
    parameters = torch.tensor([0.5, 0.5, -0.5], requires_grad=True, **exact)
    tolerances = {"tolerance_grad": 1e-12, "tolerance_change": 1e-16}
    descent = torch.optim.LBFGS([parameters], max_iter=500, line_search_fn="strong_wolfe", **tolerances)

    def loss():
        descent.zero_grad()
        value = linear_loss(parameters, variance, beta)[0]
        value.backward()
        return value

    descent.step(loss)
    return parameters.detach()


# %%
found, derived, costs, prices = [], [], [], []
for variance, beta in [(2.0, 0.01), (2.0, 0.5), (0.3, 0.1), (0.3, 0.6)]:
    w, v, log_s2 = fitted = fit_linear(variance, beta)
    found.append(torch.stack([w**2, v * w.sign(), log_s2.exp()]))
    w2 = max(variance - beta, 0.0)
    derived.append([w2, math.sqrt(w2) / (w2 + beta), min(beta / variance, 1.0)])
    costs.append(torch.stack(linear_loss(fitted, variance, beta)[1:]))
    prices.append([min(variance, beta), max(0.5 * math.log(variance / beta), 0.0)])
verify("6.11", torch.stack(found), torch.tensor(derived, **exact), atol=1e-4)
verify("6.12", torch.stack(costs), torch.tensor(prices, **exact), atol=1e-6)

# %% [markdown]
# ### On handwritten digits
#
# Does that say anything about networks? Take the digits at 8 by 8 pixels, 1,197 to learn from and 304 unseen ones. From
# the variances $\lambda_i$ of their principal directions follows what the best linear autoencoder with 16 latent numbers
# pays (the divergence) and what it gets.

# %%
learned_digits, unseen_digits = (load("digits", split, 8) for split in ("train", "test"))
learned_digits, unseen_digits = (
    digits.batch(range(len(digits))) for digits in (learned_digits, unseen_digits)
)
pixels, unseen = (
    digits["image"].flatten(1) for digits in (learned_digits, unseen_digits)
)  # (1197, 64), (304, 64)
variances = torch.linalg.eigvalsh(torch.cov(pixels.double().T, correction=0)).flip(0)  # largest first
print("variances of the first directions", [round(value, 2) for value in variances[:10].tolist()])
print(f"of all 64 together {variances.sum():.1f}")


# %%
def linear_trade(beta, latents=16):
    """Squared error and divergence of the best linear autoencoder of the digits, by (6.12)."""
    kept, rest = variances[:latents], variances[latents:]
    error = kept.clamp(max=beta).sum() + rest.sum()
    return error.item(), (kept / beta).log().clamp(min=0).sum().item() / 2


# %% [markdown]
# #### Exercise 9: who is alive?
#
# *Question, easy, 3 minutes.* At the KL weight 1, how many latent numbers does the best *linear* autoencoder of the digits
# use? Read it off the variances.

# %% tags=["question"]
### BEGIN SOLUTION
# those directions are bought whose variance is above the price: 2.8, 2.55, 2.24, 1.58, 1.09
alive_at_one = 5
### END SOLUTION

# %%
check_answer(
    "vae.alive_at_one",
    alive_at_one,
    sum(bool(fit_linear(variance.item(), 1.0)[0].abs() > 0.1) for variance in variances[:16]),
    within=0,
    hint="The weight is a price: which directions are worth it?",
)

# %% [markdown]
# And networks, small and nonlinear, trained by your step at seven weights. A latent number is called *active* if its mean
# moves from picture to picture:
#
# $$\operatorname{Var}_x\bigl(\mathbb E_{q(z\mid x)}[z_i]\bigr)>0.01 \tag{6.13, definition}$$


# %% tags=["export"]
def active_latents(mean, threshold=0.01):
    """Which latent numbers say anything about the data: those whose mean moves from sample to sample.

    mean: the encoder's means, (N, ...); threshold: their variance above which a number is active.
    Returns booleans (...); raises ValueError for N < 2. Source: Burda et al. 2016, section 5.
    """
    if len(mean) < 2:
        raise ValueError(f"mean must be of at least 2 samples; got {len(mean)}")
    # Var_x(E_q(z|x)[z_i]) > threshold
    return mean.var(dim=0) > threshold


# %%
def train_digits(latents, kl_weight, steps=800):
    """A SmallVAE of the digits, trained for a second or two."""
    torch.manual_seed(0)
    network = SmallVAE(64, latents)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    source = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = pixels[torch.randint(len(pixels), (64,), generator=source)]
        noise = torch.randn(64, latents, generator=source)
        vae_training_step(optimizer, network.encode, network.decode, batch, noise, kl_weight)
        schedule.step()
    return network.requires_grad_(False)


weights = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
networks = {kl_weight: train_digits(16, kl_weight) for kl_weight in weights}

# %% [markdown]
# What the model draws by itself, codes from the prior, decoded, is judged by a Fréchet distance in the features of a
# network that reads digits: 304 drawings against the 304 unseen digits. Real ones are at a certain distance, too.

# %%
digit_reader = load_model("reader_digits")


def digit_features(x):
    """The reader's features of digits (B, 64); it reads images of 32 pixels."""
    large = F.interpolate(x.reshape(-1, 1, 8, 8), size=32, mode="bicubic")
    return extract_features(digit_reader, large)


features_of_unseen = digit_features(unseen)


def digit_distance(x):
    """The Fréchet distance of digits (304, 64) from the unseen ones."""
    return frechet_distance(features_of_unseen, digit_features(x))


between_real = digit_distance(pixels[:304])


def describe(network, kl_weight):
    """What a SmallVAE with 16 latent numbers does to unseen digits, and what it draws."""
    source = torch.Generator().manual_seed(0)
    mean, log_variance = network.encode(unseen)
    x_hat = network.decode(reparameterize(mean, log_variance, torch.randn(mean.shape, generator=source)))
    divergence = kl_to_standard_normal(mean, log_variance)
    drawn = network.decode(torch.randn(mean.shape, generator=source))
    return {
        "error": ((unseen - x_hat) ** 2).sum(dim=1).mean().item(),
        "divergence": divergence.mean().item(),
        "active": active_latents(mean).sum().item(),
        "bounds": -negative_log_likelihood(unseen, x_hat, math.sqrt(kl_weight)) - divergence,  # (304,)
        "of reconstructions": digit_distance(x_hat),
        "of samples": digit_distance(drawn),
    }


table = {kl_weight: describe(network, kl_weight) for kl_weight, network in networks.items()}
assert all(table[kl_weight]["error"] < linear_trade(kl_weight)[0] for kl_weight in weights[:-1])
assert all(table[kl_weight]["divergence"] < 1.6 * linear_trade(kl_weight)[1] for kl_weight in weights[:-1])
assert table[0.001]["active"] == 16 and table[3.0]["active"] == 0

# %% slide=["# A network dies where the linear one does", "[picture]", "Dotted: the largest variance. Above it no direction is worth its price, and every latent number is off."] tags=["draw"]
figure, axes = plt.subplots(1, 3, figsize=(13, 3.5), layout="constrained")
fine = torch.logspace(-3, 0.7, 60).tolist()
for axis, quantity, column in zip(axes, ("error", "divergence"), (0, 1)):
    axis.plot(fine, [linear_trade(beta)[column] for beta in fine], color="grey", label="best linear, (6.12)")
    axis.plot(weights, [row[quantity] for row in table.values()], "o", color=colours[0], label="network")
    axis.axvline(variances[0].item(), color=colours[1], linestyle=":")
    axis.legend()
for kl_weight, row in table.items():
    axes[0].annotate(row["active"], (kl_weight, row["error"]), (7, -8), textcoords="offset points")
for quantity, marker, colour in zip(("of reconstructions", "of samples"), "os", colours):
    distances = [row[quantity] for row in table.values()]
    axes[2].loglog(weights, distances, marker + "-", color=colour, label=quantity)
axes[2].axhline(between_real, color="black", linestyle="--", label="real against real")
axes[0].set(title="squared error", xscale="log", ylim=(0, 21))
axes[1].set(title="divergence, nats", xscale="log")
axes[2].set(title="Fréchet distance to real digits")
axes[2].legend(loc="lower right", fontsize="small")
for axis in axes:
    axis.set_xlabel("KL weight")
show(
    figure,
    "Against the KL weight: the error rises, the divergence falls to zero at the largest variance, and the "
    "samples' distance has its minimum in between.",
)

# %% [markdown]
# *Left and middle: the network beside (6.12), with the number of its active latents; dotted, the largest variance. Right:
# reconstructions (copies of the very digits that they are compared with), and what the model draws by itself.*
#
# The network makes less of an error than the best linear autoencoder, for a divergence that is much the same, and spreads
# it over more numbers. And yet it dies between the weights 1 and 3, as the linear one does at 2.8.
#
# ### Which weight does the likelihood choose?
#
# If the weight is a variance, the bound on unseen digits can choose it, with $\sigma^2$ the weight that each network was
# trained by.

# %% slide=["# The likelihood chooses the weight that the errors come out at", "? Why is neither the smallest weight nor the largest the likeliest?", "A small weight promises a precision that new digits do not keep; a large one throws away what could be told."] tags=["nbval-ignore-output"]
rows = []
for kl_weight, row in table.items():
    own_error, standard_error = row["error"] / 64, row["bounds"].std() / math.sqrt(len(unseen))
    rows.append([str(kl_weight), f"{own_error:.3f}", f"{row['bounds'].mean():.1f} ± {standard_error:.1f}"])
show_table(rows, columns=["weight", "squared error per pixel", "bound, nats (304 digits, one draw each)"])
chosen = max(weights, key=lambda kl_weight: table[kl_weight]["bounds"].mean().item())
print(f"the likelihood chooses the weight {chosen}")
assert chosen == 0.03 and table[0.03]["error"] / 64 > 0.03 and table[0.1]["error"] / 64 < 0.1

# %% [markdown]
# It chooses the weight at which the errors are about of the size that was declared: for a fixed network, the bound is
# highest where $\sigma^2$ is the mean squared error per number. Smaller weights promise a precision that the network does
# not keep on new digits; larger ones throw away what could have been told. The choice is about likelihood, not looks: a
# smaller weight copies better, and 0.3 drew better here. (It is a bound on a *density*, and pixels here have 17 values;
# chapter 01's bins, (1.31), would make it one on a probability.)
#
# ### Two latent numbers
#
# Two can be looked at, and integrated over. All unseen digits in the plane of their means, at three weights:

# %%
pairs = {kl_weight: train_digits(2, kl_weight, steps=2000) for kl_weight in (0.001, 0.3, 3.0)}

# %% slide=["# Holes, filled, collapsed", "[picture]", "Codes of digits at three weights; the circle is where the prior expects them."] tags=["draw"]
figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
ring = torch.linspace(0, 2 * math.pi, 100)
ten_colours = plt.get_cmap("tab10").colors
for axis, (kl_weight, network) in zip(axes, pairs.items()):
    means_in_plane = network.encode(unseen)[0]
    reach = 1.1 * max(means_in_plane.abs().max().item(), 3.2)
    for (across, up), digit in zip(means_in_plane.tolist(), unseen_digits["class"].tolist()):
        axis.text(across, up, digit, fontsize="small", color=ten_colours[digit], ha="center", va="center")
    axis.plot(2 * ring.cos(), 2 * ring.sin(), "--", color="black", linewidth=2)
    axis.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", title=f"KL weight {kl_weight}")
show(figure, "Three planes of digits: spread far outside a dashed circle, filling it, and all at its centre.")

# %% [markdown]
# *The circle has radius 2 and holds 86% of the prior. At a small weight the codes go far outside, with **holes** between
# them, and what is drawn inside the circle misses most of them. At 0.3 they fill it. At 3 they have **collapsed**.*

# %% slide=["# The plane of codes, decoded", "[picture]", "At a good weight, neighbouring codes are neighbouring digits; at a small one the prior reaches only some digits; at a large one, one grey mean."] tags=["draw"]
along = Normal(0.0, 1.0).icdf(torch.linspace(0.03, 0.97, 9))  # as dense as the prior
plane_of_codes = torch.cartesian_prod(along.flip(0), along).flip(1)  # (81, 2), the second number upwards
figure, axes = plt.subplots(1, 3, figsize=(13, 4.7), layout="constrained")
for axis, (kl_weight, network) in zip(axes, pairs.items()):
    decoded = network.decode(plane_of_codes).clamp(-1, 1).view(-1, 1, 8, 8)
    axis.imshow(make_grid(decoded, nrow=9, padding=1, pad_value=0.3)[0], cmap="gray")
    axis.set(title=f"KL weight {kl_weight}", xticks=[], yticks=[])
    axis.grid(False)
show(
    figure,
    "Three grids of nine by nine decoded codes: a few of the digits again and again, all of them turning into each other, one "
    "grey blot everywhere.",
)

# %% [markdown]
# *Codes at equal steps of the prior's probability, decoded. At 0.3 neighbours turn into each other by way of blurs.*
#
# And your grid says what the bound hides: how far the encoder's guess is from the posterior.

# %% tags=["nbval-ignore-output"]
sides = torch.arange(-6, 6.01, 0.06)
grid_of_codes = torch.cartesian_prod(sides, sides)  # (40401, 2)
rows = []
for kl_weight in (0.3, 3.0):
    decode, guess = pairs[kl_weight].decode, pairs[kl_weight].encode(unseen[:100])
    on_grid = bound_on_grid(unseen[:100], decode, math.sqrt(kl_weight), *guess, grid_of_codes, 0.06**2)
    gap = on_grid[0] - on_grid[1]
    rows.append(
        [
            str(kl_weight),
            *(f"{values.mean():.1f}" for values in on_grid),
            f"{gap.mean():.2f} ± {gap.std() / 10:.2f}",
        ]
    )
    assert gap.min() > -0.02
show_table(rows, columns=["weight", r"$\log p(x)$, nats", "bound", "gap (100 digits)"])

# %% [markdown]
# The collapsed encoder has no gap: where nothing is coded, the prior is the posterior. *No gap* does not mean a good model.

# %% [markdown] tags=["optional"]
# ### What the divergence pays for *(at a second reading)*
#
# The divergence in the loss is an average over pictures, $R=\mathbb E_x\,\mathrm{KL}(q(z\mid x)\,\|\,p(z))$, the
# **rate**. It holds two things of which only one is wanted. Call $q(z)=\mathbb E_x[q(z\mid x)]$ the distribution of
# *all* codes, the **aggregate posterior**. Inside the expectation, put $q(z)$ between numerator and denominator:
#
# $$R=\mathbb E_x\,\mathbb E_{q(z\mid x)}\left[\log\frac{q(z\mid x)}{q(z)}+\log\frac{q(z)}{p(z)}\right]
# =I(x;z)+\mathrm{KL}\bigl(q(z)\,\|\,p(z)\bigr) \tag{6.14}$$
#
# The first is the mutual information, what the codes know of the pictures; the second the mismatch, how far all codes
# together are from the prior. For a set of $N$ pictures a code can do no more than say *which* of the $N$ it is:
#
# $$I(x;z)=\ln N-\mathbb E_{q(z)}\bigl[H(n\mid z)\bigr]\ \le\ \ln N \tag{6.15}$$
#
# with $H(n\mid z)$ the entropy of the guess which picture it was. Both, on the line, with four codes:

# %% slide=["# What the divergence pays for: information and mismatch", "$$R=I(x;z)+\\mathrm{KL}\\bigl(q(z)\\,\\|\\,p(z)\\bigr) \\tag{6.14}$$", "? A set of $N$ pictures. How much can a code know of which one it is?", "$$I(x;z)\\ \\le\\ \\ln N \\tag{6.15}$$", "What is paid beyond that is mismatch: codes that are not where the prior expects them."]
four_means = torch.tensor([-1.5, -0.2, 0.1, 2.0], **exact)[:, None]
four_stds = torch.tensor([0.3, 0.5, 0.2, 0.8], **exact)[:, None]
log_each = Normal(four_means, four_stds).log_prob(line)  # log q(z | x_n), (4, 2001)
log_all = log_each.logsumexp(dim=0) - math.log(4)  # log q(z), (2001,)
rate_of_four = kl_to_standard_normal(four_means, 2 * four_stds.log()).mean()
information = integrate(log_each.exp() * (log_each - log_all)).mean()
mismatch = integrate(log_all.exp() * (log_all - prior.log_prob(line)))
verify("6.14", rate_of_four, information + mismatch, atol=1e-9)

# %%
log_which = log_each.log_softmax(dim=0)  # log of how likely picture n is given z
entropy = -(log_which.exp() * log_which).sum(dim=0)  # (2001,)
verify("6.15", information, math.log(4) - integrate(log_all.exp() * entropy), atol=1e-9)

# %% [markdown]
# So the mismatch is at least $R-\ln N$. For the digits:

# %%
rates = [kl_to_standard_normal(*network.encode(pixels)).mean().item() for network in networks.values()]
limit = math.log(len(pixels))
beyond = sum(rate > limit for rate in rates)
print(
    f"ln N = {limit:.1f} nats; the rate on the training set is above it at {beyond} of {len(rates)} weights"
)

# %% slide=["# Small weights pay mostly for mismatch", "[picture]", "Red: more than any set of so many pictures can use as information."] tags=["draw"]
figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
places = range(len(weights))
within = [min(rate, limit) for rate in rates]
axis.bar(places, within, color=colours[0], label="up to ln N: may be information")
excess = [max(rate - limit, 0) for rate in rates]
axis.bar(places, excess, bottom=limit, color=colours[1], label="beyond ln N: mismatch for certain")
axis.set_xticks(places, weights)
axis.set(xlabel="KL weight", ylabel="rate, nats")
axis.legend()
show(figure, "Bars of the rate by KL weight: at small weights, most of each is above the line of ln N.")

# %% [markdown]
# *The rate on the training set.* (The limit is about *these* pictures: over all that the world could make, codes can hold
# more than $\ln N$. In the linear case (6.11), with normal data, all of the rate is information, and all codes together
# are the prior. So a rate above $\ln N$ does not by itself make samples bad; that they are bad here, the Fréchet distances
# have shown.)
#
# With a small weight the pictures come back well, and the prior knows hardly anything of where the codes are. None of the
# seven weights makes both ends good here. Image models take a tiny one, for good reconstructions, and leave it to a *second*
# model to learn where the codes are.

# %% [markdown] tags=["core"]
# ## Images
#
# Now the autoencoder that chapter 07 will use. A place of its code belongs to a place of the image, so that convolutions
# can work on both, and so can a U-Net.
#
# ### Decibels
#
# The usual measure of a reconstruction is the mean squared error on a logarithmic scale, relative to the square of the
# largest possible difference, the range $r=1-(-1)=2$:
#
# $$\mathrm{PSNR}=10\,\log_{10}\frac{r^2}{\mathrm{MSE}} \tag{6.16, definition}$$
#
# the **peak signal-to-noise ratio**, in decibels. 20 dB is an error of a tenth of the range in the root mean square,
# 40 dB of a hundredth.


# %% tags=["export"]
def psnr(x, x_hat):
    """The peak signal-to-noise ratio of each image's reconstruction, in decibels.

    x, (B, C, H, W) in [-1, 1], and x_hat, like x (else ValueError) -> (B,); infinite where both are equal.
    Source: equation 6.16 of the chapter.
    """
    check_shape("x_hat", x_hat, x.shape, of="x")
    mean_squared_error = ((x - x_hat) ** 2).flatten(1).mean(dim=1)  # (B,)
    # 10 log10(range^2 / MSE); the range of [-1, 1] is 2
    return 10 * torch.log10(4 / mean_squared_error)


# %% [markdown]
# Before any decibels are believed: two spoiled versions of 128 scenes, with the *same* PSNR, image by image. One has
# noise all over; in the other a single object was replaced by one of another shape.

# %%
scenes = load("scenes", "test")
every_label = scenes.attributes(range(400))
small = (every_label["size_1"] == 0).nonzero()[:, 0][:128]  # scenes whose first object is small
small_labels = {name: values[small] for name, values in every_label.items()}
original = scenes.render(small_labels, small)
swapped = scenes.render(small_labels | {"shape_1": (small_labels["shape_1"] + 4) % 8}, small)

static = torch.randn(original.shape, generator=torch.Generator().manual_seed(0))
sizes = [(part**2).mean(dim=(1, 2, 3), keepdim=True).sqrt() for part in (swapped - original, static)]
with_static = original + static * sizes[0] / sizes[1]

# %%
scene_reader = load_model("reader_scenes64")
rows = []
for name, version in (("noise", with_static), ("another shape", swapped)):
    right = attribute_accuracy(scene_reader, version, small_labels)["all"]
    rows.append([name, f"{psnr(original, version).mean():.1f} dB", f"{right:.0%}"])
show_table(rows, columns=["spoiled by", "PSNR", "everything read right"])

# %% slide=["# Decibels say how much changed, not what", "[picture]", "Both spoiled versions have the same PSNR. In the lower one an object was exchanged for another."] tags=["draw"]
titles = [f"{decibels:.0f} dB" for decibels in psnr(original, with_static)[:6].tolist()]
versions = torch.cat([version[:6] for version in (original, with_static, swapped)])
row_titles = ["original", "noise", "another shape"]
figure = show_grid(versions, columns=6, titles=titles, row_titles=row_titles, inches_per_image=1.3)
show(figure, "Six scenes: original, with noise, and with one small object exchanged for another.")

# %% [markdown]
# *The PSNR above each column is that of both spoiled versions.* The mean squared error asks how much changed, not what. So
# the course sends each image through encoder and decoder, and asks readers as well: are shape, colour, size, background,
# and in scenes the relation, still what they were?
#
# ### The networks
#
# Chapter 02's residual block expects an embedding of the step; what remains without it is short:


# %% slide=["# An autoencoder of images keeps the form of a picture", "- $64\\times64\\times3$ to $16\\times16\\times4$: a place of the code belongs to a place of the image", "- the encoder puts out means and log-variances", "- the decoder is its mirror image, and draws nothing", "? Why no skips from the one to the other?", "What does not go through the code must not arrive."] tags=["export"]
class PlainBlock(nn.Module):
    """Chapter 02's residual block without an embedding: two convolutions around a skip.

    Args:
        channels: channels before and after.
    """

    def __init__(self, channels):
        super().__init__()
        self.branch = nn.Sequential(
            group_norm(channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            group_norm(channels),
            nn.SiLU(),
            zero_init(nn.Conv2d(channels, channels, 3, padding=1)),
        )

    def forward(self, x):
        """Map x (B, C, H, W) to (B, C, H, W)."""
        return x + self.branch(x)


# %% tags=["export"]
class Upsample(nn.Module):
    """Double the sides of a feature map: each pixel becomes four, then a convolution.

    Args:
        in_channels, out_channels: channels before and after.
    """

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, h):
        """Map h (B, in_channels, H, W) to (B, out_channels, 2 H, 2 W)."""
        return self.conv(F.interpolate(h, scale_factor=2, mode="nearest"))


# %% [markdown]
# The encoder folds 2 by 2 pixels into channels, works at 32 by 32 places, then at 16 by 16, and puts out means and
# log-variances. The decoder is its mirror image. There are no skips from the one to the other: what does not go through
# the code does not arrive.


# %% tags=["export"]
def encoder_layers(in_channels, widths, num_blocks, out_channels):
    """The layers of the way down: blocks at each width, and a convolution of stride 2 between widths.

    Args:
        in_channels: channels of what goes in.
        widths: channels at each resolution, which halves from one to the next.
        num_blocks: residual blocks at each width.
        out_channels: channels of what comes out.

    Returns:
        A list of modules, to be applied one after the other.
    """
    layers = [nn.Conv2d(in_channels, widths[0], 3, padding=1)]
    for level, width in enumerate(widths):
        if level > 0:
            layers.append(nn.Conv2d(widths[level - 1], width, 3, stride=2, padding=1))
        layers += [PlainBlock(width) for _ in range(num_blocks)]
    return [*layers, group_norm(widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], out_channels, 3, padding=1)]


# %% tags=["export"]
def decoder_layers(in_channels, widths, num_blocks, out_channels):
    """The layers of the way up, from the last of the encoder's widths to the first.

    Args:
        in_channels, widths, num_blocks, out_channels: as in encoder_layers; widths in the encoder's order.

    Returns:
        A list of modules, to be applied one after the other.
    """
    layers = [nn.Conv2d(in_channels, widths[-1], 3, padding=1)]
    for level in reversed(range(len(widths))):
        layers += [PlainBlock(widths[level]) for _ in range(num_blocks)]
        if level > 0:
            layers.append(Upsample(widths[level], widths[level - 1]))
    return [*layers, group_norm(widths[0]), nn.SiLU(), nn.Conv2d(widths[0], out_channels, 3, padding=1)]


# %% tags=["export"]
class KLVAE(nn.Module):
    """A variational autoencoder of images, whose latents are a smaller image.

    Args:
        in_channels: channels of the images.
        latent_channels: channels of the latents.
        base_channels: channels at the highest resolution.
        channel_multipliers: width of each level, in units of base_channels; the resolution halves in between.
        num_blocks: residual blocks per level, on the way down and on the way up.
        patch_size: fold this many pixels each way into channels first.

    Attributes:
        latent_channels: as given.
        factor: how many times smaller the latents' sides are than the images'.

    Raises:
        TypeError, ValueError: on sizes that make no network.

    Source: Rombach et al. 2022, section 3.1 and appendix G.
    """

    def __init__(
        self,
        in_channels=3,
        latent_channels=4,
        base_channels=32,
        channel_multipliers=(1, 2),
        num_blocks=2,
        patch_size=2,
    ):
        super().__init__()
        sizes = {
            "in_channels": in_channels,
            "latent_channels": latent_channels,
            "base_channels": base_channels,
            "num_blocks": num_blocks,
            "patch_size": patch_size,
        }
        for name, value in sizes.items():
            check_positive_int(name, value)
        levels_with_attention(channel_multipliers, ())  # refuses what is no tuple, and an empty one
        for multiplier in channel_multipliers:
            check_positive_int("channel_multipliers", multiplier)
        self.in_channels, self.latent_channels, self.patch_size = in_channels, latent_channels, patch_size
        self.factor = patch_size * 2 ** (len(channel_multipliers) - 1)
        widths = [base_channels * multiplier for multiplier in channel_multipliers]
        pixels = in_channels * patch_size**2
        self.encoder = nn.Sequential(*encoder_layers(pixels, widths, num_blocks, 2 * latent_channels))
        self.decoder = nn.Sequential(*decoder_layers(latent_channels, widths, num_blocks, pixels))


# %% [markdown]
# `encode` keeps the log-variance in $[-30,20]$, so that no early mistake makes its exponential overflow. `decode` draws
# nothing: randomness is in the code, not in the decoder.


# %% tags=["export"]
class KLVAE(KLVAE):
    def encode(self, x):
        """Map images x (B, C, H, W) to the mean and the log-variance of their latents.

        Returns:
            mean, log_variance: (B, latent_channels, H / factor, W / factor) each; log_variance in [-30, 20].

        Raises:
            ValueError: if x has another number of channels, or sides that are no multiples of the factor.
        """
        if (
            x.ndim != 4
            or x.shape[1] != self.in_channels
            or x.shape[2] % self.factor
            or x.shape[3] % self.factor
        ):
            raise ValueError(
                f"x must be of shape (B, {self.in_channels}, H, W) with sides that are multiples of "
                f"{self.factor}; got {tuple(x.shape)}"
            )
        mean, log_variance = self.encoder(patchify(x, self.patch_size)).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def decode(self, z):
        """Map latents z (B, latent_channels, h, w) to images (B, C, factor h, factor w), not clipped.

        Raises:
            ValueError: if z is not of that shape.
        """
        if z.ndim != 4 or z.shape[1] != self.latent_channels:
            raise ValueError(f"z must be of shape (B, {self.latent_channels}, h, w); got {tuple(z.shape)}")
        return unpatchify(self.decoder(z), self.patch_size)

    def forward(self, x, noise):
        """Encode x (B, C, H, W), draw latents with noise like their mean, and decode.

        Returns:
            x_hat, mean, log_variance: the reconstructions, like x, and what encode gives.

        Raises:
            ValueError: if x is no image that encode takes, or noise has another shape than the mean.
        """
        mean, log_variance = self.encode(x)
        check_shape("noise", noise, mean.shape, of="the latents")
        return self.decode(reparameterize(mean, log_variance, noise)), mean, log_variance


# %%
images = vae_recipe.load_images("train")
torch.manual_seed(0)
young = vae_recipe.build()
young_mean, young_log_variance = young.encode(eight_images)
print(
    f"an image {tuple(eight_images.shape[1:])}, its code {tuple(young_mean.shape[1:])}, twice: mean and log-variance"
)
print(f"numbers {eight_images[0].numel()} to {young_mean[0].numel()}")
print(f"parameters {sum(p.numel() for p in young.parameters())}")

# %% [markdown]
# ### Training
#
# The images are of two kinds in turn, one object (Shapes) and two (Scenes). The recipe's loss is `vae_loss` with a KL
# weight of 0.001, divided by the number of pixel values. Two hundred steps, to see it fall:

# %%
history = train(
    young,
    lambda random: vae_recipe.draw(images, random),
    vae_recipe.loss,
    steps=200,
    batch_size=16,
    learning_rate=2e-3,
    warmup_steps=20,
)

# %% slide=["# After a minute: places and colours", "[picture]", "Unseen images, and what comes back after 200 steps."]
young.eval().requires_grad_(False)
young_copies = young.decode(young.encode(eight_images)[0])
figure = show_grid(torch.cat([eight_images, young_copies]), row_titles=["images", "round trip"])
show(figure, "Eight test images, and blurred copies of them.")
print(f"loss below a tenth of the first: {sum(history.losses[-20:]) / 20 < history.losses[0] / 10}")

# %% [markdown]
# *Unseen images and what comes back after 200 steps: places and colours, with blurred outlines.*
#
# ### The long-trained model
#
# The checkpoint was trained for much longer. All numbers of its card are from images that training never showed, 1,024 of
# each kind, with codes that are drawn, not means.

# %%
card = load_card("vae_shapes64")
metrics = card["metrics"]
print(f"{card['parameters'] / 1e6:.2f} M parameters, {card['steps']} steps, {card['data']}")
print(f"PSNR {metrics['psnr']:.1f} dB, of the worst image {metrics['psnr_lowest']:.1f} dB")
rows = []
for kind in ("shapes", "scenes"):
    shares = [metrics[f"accuracy_{kind}_{label}"] for label in ("all", "original")]
    rows.append([kind, *(f"{share:.1%}" for share in shares)])
show_table(
    rows, columns=["read right: all labels at once", "after the round trip", "in the images themselves"]
)
assert metrics["psnr"] >= 30

# %% [markdown]
# A reader errs at times, too. Live, on 128 scenes, and with the bound that belongs to three choices of $\sigma^2$:

# %%
batch = scenes.batch(range(128))
scene_images = batch.pop("image")
scene_codes = trained_vae.encode(scene_images)  # mean, log-variance
noise = torch.randn(scene_codes[0].shape, generator=torch.Generator().manual_seed(0))
scene_copies = trained_vae.decode(reparameterize(*scene_codes, noise))
accuracy = attribute_accuracy(scene_reader, scene_copies, batch)
assert psnr(scene_images, scene_copies).mean() >= 30
worst = min(share for label, share in accuracy.items() if label != "all")
print(f"every label of a scene read right at least 98 of 100 times: {worst >= 0.98}")
rows = []
for variance in (0.0001, 0.001, 0.01):
    nats = negative_log_likelihood(scene_images, scene_copies, math.sqrt(variance)) + kl_to_standard_normal(
        *scene_codes
    )
    rows.append([str(variance), f"{-nats.mean() / scene_images[0].numel():.1f}"])
show_table(rows, columns=[r"$\sigma^2$", "bound, nats per number"])
print(f"mean squared error {((scene_images - scene_copies) ** 2).mean():.4f}")

# %% [markdown]
# The weight of 0.001 is a decoder noise of variance 0.001, and the errors are of that size: so the bound of this network is
# highest near the noise that it was trained with. Nothing forces it to be; here it happens to be. (What the likelihood would
# choose among networks trained with other weights, as for the digits, was not tried.)

# %% slide=["# After long training: the outlines are what is lost", "[picture]", "Below, the error five times as strong; black is none. Readers find everything still there."] tags=["draw"]
errors = (come_back - eight_images).abs() * 5 - 1
rows_of_images = torch.cat([eight_images, come_back, errors])
figure = show_grid(rows_of_images, row_titles=["images", "round trip", "error x 5"], inches_per_image=1.2)
show(
    figure, "Eight test images, their reconstructions, which look alike, and thin outlines where they differ."
)

# %% [markdown]
# *Unseen images, and what comes back. What is lost is on the outlines (below, five times as strong; black is none).*

# %% [markdown] tags=["core"]
# ## What the codes look like
#
# The four channels of the codes of some images, as grey pictures:

# %% slide=["# The code is a small picture of the picture", "[picture]", "The four channels of its means, 16 by 16 places."] tags=["draw"]
large = F.interpolate(eight_codes / 2.5, scale_factor=4, mode="nearest")
by_channel = [large[:, channel, None].expand(-1, 3, -1, -1) for channel in range(4)]
row_titles = ["images", *(f"channel {channel}" for channel in range(4))]
figure = show_grid(torch.cat([eight_images, *by_channel]), row_titles=row_titles)
show(
    figure,
    "Eight images, and under each the four channels of its code: small grey pictures with the same outlines.",
)

# %% [markdown]
# *Means of the codes, 16 by 16 places. The code is a small picture of the picture.*
#
# What it costs, in nats: the rate, estimated from 256 training images. About which of 400,000 images it is, a code can know
# no more than the logarithm of that number.

# %%
picks = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:256]
many_codes = trained_vae.encode(images.batch(picks)["image"])  # mean, log-variance, (256, 4, 16, 16) each
rate = kl_to_standard_normal(*many_codes).mean().item()
in_bytes = rate / math.log(2) / 8  # 8 bits to the byte
print(
    f"rate {round(rate, -2):.0f} nats or {round(in_bytes, -2):.0f} bytes an image; ln N = {math.log(len(images)):.1f}"
)

# %% [markdown]
# All the rest is *mismatch*, thousands of nats: codes that are not where the prior expects them. (Of all scenes that could
# be rendered, codes may know more, positions, angles and tints; how much was not measured.) So what does the model draw by
# itself?

# %% slide=["# Its own samples have no shape in them", "? A code from the prior, decoded. What will it look like?", "[picture]", "The rate is thousands of nats, the information about these images at most 13; the rest is mismatch. That the prior misses the codes, the picture shows."]
many_noises = torch.randn(many_codes[0].shape, generator=torch.Generator().manual_seed(1))
latents = reparameterize(*many_codes, many_noises)
centre, spread = latents.mean(dim=0), latents.std(dim=0)  # (4, 16, 16) each
from_prior = torch.randn(128, 4, 16, 16, generator=torch.Generator().manual_seed(2))
by_diffusion = sample(
    load_diffusion("ddpm_shapes32").respace(50),
    load_model("ddpm_shapes32"),
    (8, 3, 32, 32),
    ddim_step,
    torch.Generator().manual_seed(3),
    progress=False,
)
rows_of_images = {
    "real": eight_images,
    "VAE, prior": trained_vae.decode(from_prior[:8]),
    "VAE, fitted": trained_vae.decode(centre + spread * from_prior[:8]),
    "diffusion": F.interpolate(by_diffusion, scale_factor=2, mode="nearest"),
}
figure = show_grid(torch.cat(list(rows_of_images.values())), row_titles=list(rows_of_images))
show(
    figure,
    "Rows: real images; specks of colour from the prior, and from a fitted normal; shapes by diffusion.",
)

# %% [markdown]
# *Codes from the prior, and from a normal distribution with each number's own mean and standard deviation: neither has a
# shape in it. Below, for comparison, chapter 02's diffusion, in pixels at half the size.*

# %% slide=["# Hence a second stage", "- The autoencoder brings the size down, and the details back.", "- A diffusion learns where the codes are.", "- It needs no new theory: codes are pictures.", "Independent numbers cannot know that the outline of a star runs through many places."]
shape_reader = load_model("reader_shapes64")
shapes = load("shapes", "test", 64)
reference, others = (shapes.batch(range(start, start + 128))["image"] for start in (0, 128))
versions = {
    "other real images": others,
    "other real images, round trip": trained_vae.decode(trained_vae.encode(others)[0]),
    "codes from the prior": trained_vae.decode(from_prior),
    "codes, fitted": trained_vae.decode(centre + spread * from_prior),
}
features_of_real = extract_features(shape_reader, reference)
rows = []
for name, version in versions.items():
    distance = frechet_distance(features_of_real, extract_features(shape_reader, version))
    rows.append([name, f"{round(distance, -1):.0f}"])
show_table(rows, columns=["128 images each", "Fréchet distance to real images"])

# %% [markdown]
# In the fitted codes each number has the right mean and spread. Missing are the shape of each one's distribution, and how the
# numbers go together, which are not told apart here; but the outline of a star does run through many places. Hence the
# **second stage**, a diffusion model of the codes. The autoencoder brings the size down and the details back; the diffusion
# learns what there is.

# %% [markdown] tags=["core"]
# ## The latents' scale
#
# A schedule is made for data of about the variance 1. Are codes of that size? In the linear case they would be, at every
# weight. But with a small weight it costs little to be off, and the codes of a network may be of any size. What happens
# to a diffusion of codes with the standard deviation $\sigma_z$? Write $z_0=\sigma_zu$ with $u$ of size 1. Then
#
# $$z_t=\sqrt{\bar\alpha_t}\,\sigma_zu+\sqrt{1-\bar\alpha_t}\,\epsilon
# =\sqrt{\bar\alpha_t\sigma_z^2+1-\bar\alpha_t}\;\Bigl(\sqrt{\bar\alpha'_t}\,u+\sqrt{1-\bar\alpha'_t}\,\epsilon\Bigr),
# \qquad\bar\alpha'_t=\frac{\bar\alpha_t\sigma_z^2}{\bar\alpha_t\sigma_z^2+1-\bar\alpha_t} \tag{6.17}$$
#
# up to a factor, a diffusion of $u$ with *another schedule*. Its log signal-to-noise ratio, $\lambda_t$ of (1.9) and
# no variance, is that of the old one, shifted:
#
# $$\lambda'_t=\lambda_t+2\ln\sigma_z \tag{6.18}$$
#
# Codes that are too large stay visible until late; codes that are too small drown in the first steps. And where a
# schedule ends with some signal left, as Stable Diffusion's does with $\bar\alpha_T=0.0047$, large codes are still there
# in $z_T$, and the pure noise that sampling starts from is not what the network was trained on.

# %% slide=["# Codes of another size have another schedule", "Codes of standard deviation $\\sigma_z$ shift the log signal-to-noise ratio of each step:", "(6.18)", "Large codes stay visible until late; small ones drown in the first steps.", "? $\\sigma_z=10$: by what factor does the ratio change?"]
diffusion = Diffusion(cosine_betas(1000))
u, eps = (torch.randn(1000, 2, generator=torch.Generator().manual_seed(seed), **exact) for seed in (0, 1))
kept, sigma_z = diffusion.alpha_bar[:, None], 10.0  # (1000, 1)
total = kept * sigma_z**2 + 1 - kept
kept_of_u = kept * sigma_z**2 / total  # alpha_bar' of each step
verify("6.17", q_sample(sigma_z * u, kept, eps), total.sqrt() * q_sample(u, kept_of_u, eps), atol=1e-10)

# %%
log_snr = (diffusion.alpha_bar / (1 - diffusion.alpha_bar)).log()  # lambda_t, (1000,)
shifted = (kept_of_u / (1 - kept_of_u)).log()[:, 0]
inner = shifted.isfinite()
verify("6.18", shifted[inner], (log_snr + 2 * math.log(sigma_z))[inner], atol=1e-6)

# %% [markdown]
# The remedy is one number, $s$ (no longer the encoder's width):
#
# $$\text{diffuse }\ s\,z,\qquad\text{decode }\ z=\frac{z_\text{drawn}}s,\qquad s=\frac1{\sigma_z}
# \tag{6.19, definition}$$
#
# $\sigma_z$ is measured once, over all numbers of a batch of codes, and belongs to the autoencoder. For Stable Diffusion's,
# $s=0.18215$: its codes have a standard deviation of 5.5.
#
# #### Exercise 10: the scale
#
# *Formula, easy, 3 minutes.* Write `latent_scale`. Of which numbers is the standard deviation taken, and about what?


# %% tags=["export", "exercise"]
def latent_scale(latents):
    """The factor that gives latents the standard deviation 1: one number for all of them.

    Multiply by it before diffusion, divide by it before decoding.

    Args:
        latents: a batch of latents, (B, C, H, W).

    Returns:
        A scalar tensor, above 0, from the standard deviation with N - 1, as torch's std has it. Infinite for
        latents that are all the same.

    Source: Rombach et al. 2022, appendix G (there with N, from the first batch).
    """
    ### BEGIN SOLUTION
    # s = 1 / sigma, over samples, channels and places alike
    return 1 / latents.std()
    ### END SOLUTION


# %% slide=["# One number mends it", "$$\\text{diffuse }\\ s\\,z,\\qquad\\text{decode }\\ z_\\text{drawn}/s,\\qquad s=1/\\sigma_z \\tag{6.19}$$", "[code latent_scale]", "Stable Diffusion's is 0.18215. Whoever forgets it gets no error message."]
check("vae.latent_scale", latent_scale)

# %% [markdown]
# Ours, and what a diffusion sees of each channel: its size, the width that the encoder gives each of its codes, and the
# step of the cosine schedule at which signal and noise are equal, $\lambda_t+2\ln(s\,\sigma_c)=0$.

# %%
scale = latent_scale(latents).item()
print(f"scale {scale:.2f}, on the card {metrics['latent_scale']:.2f}")
assert abs(scale / metrics["latent_scale"] - 1) < 0.1
stds_of_channels = latents.transpose(0, 1).flatten(1).std(dim=1)  # (4,)
widths_of_codes = (many_codes[1] / 2).exp().transpose(0, 1).flatten(1).median(dim=1).values  # (4,)
log_snr_of_channels = log_snr[:, None] + 2 * (scale * stds_of_channels).log()  # (1000, 4)
equal_at = log_snr_of_channels.abs().argmin(dim=0)
rows = [
    [
        channel,
        f"{scale * stds_of_channels[channel]:.2f}",
        f"{scale * widths_of_codes[channel]:.2f}",
        f"{round(equal_at[channel].item(), -1)}",
    ]
    for channel in range(4)
]
show_table(
    rows, columns=["channel", r"$s\,\sigma_c$", "width of one code (median)", "signal = noise at step"]
)

# %% slide=["# One number scales all channels; they do not drown together", "[picture]", "Left: signal against noise by channel, scaled. Right: what a wrong size of all codes shifts."] tags=["draw"]
figure, axes = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained", sharey=True)
for channel in range(4):
    style = {"color": colours[channel], "linestyle": ("-", "--")[channel % 2]}
    axes[0].plot(log_snr_of_channels[:, channel], label=f"channel {channel}", **style)
for size, colour in ((0.1, colours[1]), (1, colours[0]), (5.5, colours[2])):
    axes[1].plot(log_snr + 2 * math.log(size), color=colour, label=f"codes of size {size:g}")
for axis, title in zip(axes, ("our channels, scaled", "all codes, not scaled")):
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(xlabel="step t", ylim=(-8, 8), title=title)
    axis.legend(fontsize="small")
axes[0].set_ylabel("log signal-to-noise ratio")
show(
    figure,
    "Falling curves of the log signal-to-noise ratio: on the left four close to each other, on the right three far apart.",
)

# %% [markdown]
# *Left: one number scales all channels, and keeps their proportions, so two of them drown more than a hundred steps before
# the others. Right: what the size of all codes shifts; 5.5 is Stable Diffusion's.* And, of our codes, what is left of a
# picture:

# %% slide=["# Without it, noise comes too early or too late", "[picture]", "The same codes and noise at three sizes: in the first row all is lost by step 200, in the last hardly anything until 800."] tags=["draw"]
times = (50, 200, 400, 600, 800, 950)
one_code = scale * eight_codes[1:2]  # of about standard deviation 1
noise_of_code = noise_like(one_code, torch.Generator().manual_seed(5))
decoded = []
for size in (0.1, 1, 5.5):
    for time in times:
        kept_here = diffusion.alpha_bar[time].float()
        z_t = q_sample(size * one_code, kept_here, noise_of_code)
        decoded.append(trained_vae.decode(z_t / (kept_here.sqrt() * size * scale)))
row_titles = ["size 0.1", "size 1: scaled", "size 5.5"]
titles = [f"t = {time}" for time in times]
figure = show_grid(torch.cat(decoded), len(times), titles, row_titles, inches_per_image=1.2)
show(
    figure,
    "Three rows of one picture at six steps: lost by step 200; lost half-way; seen until nearly the end.",
)

# %% [markdown]
# *The same noise on codes of three sizes, divided by $\sqrt{\bar\alpha_t}$ and by the scale, and decoded.* Ours, unscaled, are
# of size 0.8, near enough to 1 that to forget $s$ should change little (it was not tried).

# %% [markdown] tags=["core"]
# ## A second stage in miniature
#
# How much does that harm, and how much does a second stage help? On digits both are seconds of work. The first stage is
# the network with sixteen latent numbers and the smallest weight, which copies best. The second is chapter 01's diffusion
# of points, here of codes, times $s$ and a wrong size, divided by both before they are decoded.

# %%
first_stage = networks[0.001]
digit_means, digit_log_variances = first_stage.encode(pixels)  # (1197, 16) each
some_digit_codes = reparameterize(
    digit_means, digit_log_variances, noise_like(digit_means, torch.Generator().manual_seed(0))
)
digit_scale = latent_scale(some_digit_codes[:, :, None, None]).item()
print(f"the codes have a standard deviation of {1 / digit_scale:.1f}")


class CodeDenoiser(nn.Module):
    """A small network (B, 16), (B,) -> (B, 16): the predicted velocity of codes."""

    def __init__(self, alpha_bar, width=128):
        super().__init__()
        self.register_buffer("log_snr", (alpha_bar / (1 - alpha_bar)).log().float())
        self.layers = nn.Sequential(
            nn.Linear(16 + 8, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 16),
        )  # fmt: skip

    def forward(self, z_t, t):
        angles = self.log_snr[t][:, None] * torch.tensor([0.1, 0.25, 0.5, 1.0])  # (B, 4)
        return self.layers(torch.cat([z_t, angles.sin(), angles.cos()], dim=1))


# %%
def second_stage(size, seed, steps=1500):
    """Train a diffusion of the digits' codes at a size; return a function that draws 304 digits in `count` steps."""
    torch.manual_seed(seed)
    process = Diffusion(cosine_betas(200), prediction="v")
    denoiser = CodeDenoiser(process.alpha_bar)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    source = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        picked = torch.randint(len(digit_means), (128,), generator=source)
        mean = digit_means[picked]
        z_0 = size * digit_scale * reparameterize(mean, digit_log_variances[picked], noise_like(mean, source))
        t = torch.randint(0, 200, (128,), generator=source)
        training_step(
            optimizer, lambda *drawn: process.loss(denoiser, *drawn), z_0, t, noise_like(z_0, source)
        )
        schedule.step()
    denoiser.requires_grad_(False)

    def draw(count):
        source = torch.Generator().manual_seed(seed + 100)
        z = sample(process.respace(count), denoiser, (304, 16), ddim_step, source, progress=False)
        return first_stage.decode(z / (size * digit_scale))

    return draw


stage_sizes, seeds = (0.1, 0.3, 1.0, 3.0, 10.0), (0, 1, 2)
stages = {size: [second_stage(size, seed) for seed in seeds] for size in stage_sizes}
distances = {
    (size, count): torch.tensor([digit_distance(draw(count)) for draw in draws_of_seeds])
    for size, draws_of_seeds in stages.items()
    for count in (10, 50)
}

# %% [markdown]
# #### Exercise 11: too small or too large?
#
# *Question, easy, 3 minutes.* Codes at a tenth of the right size, and at ten times of it: which does more harm to what is
# drawn? Choose before you look on.

# %% tags=["question"]
### BEGIN SOLUTION
# at a tenth the schedule's last steps, few as they are, have to settle everything; at ten times most steps do nothing
more_harm = "a tenth"
### END SOLUTION

# %%
harm = {"a tenth": distances[0.1, 50].mean(), "ten times": distances[10.0, 50].mean()}
check_answer(
    "vae.more_harm",
    more_harm,
    max(harm, key=harm.get),
    among=tuple(harm),
    hint="In which of the two are there steps left once the signal can be seen?",
)

# %% slide=["# The right size is 1 to 3, as far as can be told", "[picture]", "Distances to real digits, three trainings each. A first stage that draws nothing by itself, and a second one of two seconds."] tags=["draw"]
figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
for count, marker, colour in ((10, "o", colours[1]), (50, "s", colours[0])):
    middle = [distances[size, count].mean() for size in stage_sizes]
    error = [distances[size, count].std() / math.sqrt(len(seeds)) for size in stage_sizes]
    axis.errorbar(
        stage_sizes, middle, error, fmt=marker + "-", capsize=3, color=colour, label=f"{count} steps"
    )
axis.axhline(table[0.001]["of samples"], color="grey", linestyle=":", label="codes from the prior")
axis.axhline(between_real, color="black", linestyle="--", label="real against real")
axis.set(
    xscale="log", yscale="log", xlabel="standard deviation of what is diffused", ylabel="Fréchet distance"
)
axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
show(
    figure,
    "Two curves shaped like a U, lowest at 1 and 3, all below the line of codes from the prior.",
)

# %% tags=["nbval-ignore-output"]
rows = []
for size in stage_sizes:
    measured = [distances[size, count] for count in (10, 50)]
    rows.append([f"{size:g}", *(f"{d.mean():.0f} ± {d.std() / math.sqrt(len(seeds)):.0f}" for d in measured)])
show_table(rows, columns=["size of the codes", "distance with 10 steps", "with 50 steps"])
for size, count in ((0.1, 10), (0.1, 50), (10.0, 10)):
    apart = distances[size, count].mean() - distances[1.0, count].mean()
    assert apart > 2 * math.sqrt((distances[size, count].var() + distances[1.0, count].var()) / len(seeds))
assert distances[1.0, 50].mean() < table[0.001]["of samples"] / 5

# %% slide=["# From blots to digits: only the codes are drawn otherwise", "[picture]", "One decoder in all rows. Codes from the prior; by a diffusion at a tenth of the right size, at the right size, at ten times."] tags=["draw"]
drawn = {"prior": first_stage.decode(torch.randn(12, 16, generator=torch.Generator().manual_seed(4)))}
drawn |= {f"size {size:g}": stages[size][0](50)[:12] for size in (0.1, 1.0, 10.0)}
drawn["real"] = unseen[:12]
figure = show_grid(torch.cat(list(drawn.values())).view(-1, 1, 8, 8), columns=12, row_titles=list(drawn))
show(
    figure,
    "Rows of twelve: blots from the prior; smeared digits; digits; digits, some of them broken; real digits.",
)

# %% [markdown]
# *Above: 304 drawn digits against 304 unseen ones, mean and standard error of three trainings; the same network, data and
# steps at each size. Here: the first twelve of one training, 50 steps, none left out. One decoder in all rows.*
#
# The first stage by itself draws nothing; with a second one it draws digits, a good deal short of real ones after two
# seconds of training. Codes that are too small do the most harm. Between the right size and three times of it there is
# nothing to choose, and at ten times more steps make good for most of it. Two causes are not told apart: the steps are in
# the wrong places, and the network sees numbers of another size.

# %% [markdown] tags=["core"]
# ## Your code runs the model
#
# Save this notebook, call `make mine` in a terminal, and run the next cell, as at the [end of chapter 01](01_ddpm.ipynb).
# Your training step teaches a VAE of digits with two latent numbers, whose bound your grid measures; and images go through
# the course's autoencoder, with your draw of the code in between.

# %% tags=["milestone", "nbval-ignore-output"]
from lecture26.kit.own_package import show_milestone

show_milestone(
    "milestone vae",
    alt="A plane of decoded codes of digits; and two rows of eight scenes: images, and below each what comes out of the decoder, hardly to be told from it.",
)

# %% [markdown] tags=["core"]
# ## What the lecture's slide says
#
# - *Operates in a compressed latent space rather than pixel space, for efficiency.* In numbers, ours is compressed by
#   12; whether that makes it cheaper by as much, [chapter 07](07_latent_diffusion.ipynb) measures.
# - *Encoder: compresses images to latent representations (e.g. using a VAE).* It is a VAE by its loss, with a KL
#   weight so small that its own samples are noise. What the small weight still does: it keeps codes from growing without
#   end, and gives each some width. Rombach et al. use a weight of about $10^{-6}$, but against absolute errors and a
#   perceptual loss, so that it cannot be compared with ours; or they quantise the codes instead (VQ).
# - *Decoder: reconstructs high-resolution images from denoised latents.* It does, but no diffusion brings back what the
#   encoder lost: the round trip is a ceiling for every sample. To look sharp, large models add a perceptual and an
#   adversarial loss to (6.10); ours, on flat shapes, does without.
# - The slide leaves out the scale between the stages, (6.19). Whoever forgets it gets no error message.

# %% [markdown] tags=["core"]
# ## Summary
#
# - The evidence is the bound (6.4) plus the divergence of the guess from the posterior (6.3).
# - A draw becomes differentiable by $z=\mu+\sigma\epsilon$ (6.8). The other way is unbiased too, but its error grows with
#   the number of latent numbers.
# - The KL weight is the variance of the errors that do not count (6.10), and a price: directions of less variance are
#   not coded (6.11). On the digits the likelihood chooses the weight that the errors come out at.
# - The rate is information plus mismatch (6.14). With a small weight the prior misses the codes, and a second model has to
#   learn them.
# - PSNR says how much changed, not what: read the reconstructions.
# - Diffuse $s\,z$, decode $z/s$, with $s=1/\sigma_z$ (6.19); otherwise the schedule is another one (6.18).
#
# [Chapter 07](07_latent_diffusion.ipynb) builds the second stage for images. What you have solved so far, in all chapters:

# %% slide=["# What to remember", "- The evidence is the bound, plus the divergence of the guess from the posterior.", "- $z=\\mu+\\sigma\\epsilon$ lets a gradient through a draw.", "- The KL weight is a price: what varies less is not coded.", "- A prior misses the codes of a small weight. A second model learns where they are.", "- Diffuse $s\\,z$, decode $z/s$."] tags=["nbval-ignore-output"]
progress()

# %% [markdown]
# [Previous: 05 Classifier-free guidance](05_classifier_free_guidance.ipynb) · [Next: 07 Latent diffusion](07_latent_diffusion.ipynb)
#
# ## References
#
# - Kingma, Welling 2014, *Auto-Encoding Variational Bayes*: section 2.2 (the bound), 2.3 and 2.4 (the estimator and
#   the reparameterisation), appendix B (the divergence), C.2 (the Gaussian decoder).
# - Rezende, Mohamed, Wierstra 2014, *Stochastic Backpropagation and Approximate Inference in Deep Generative Models*.
# - Tipping, Bishop 1999, *Probabilistic Principal Component Analysis*: section 3.2 (the best linear decoder).
# - Lucas, Tucker, Grosse, Norouzi 2019, *Don't Blame the ELBO! A Linear VAE Perspective on Posterior Collapse*.
# - Higgins et al. 2017, *beta-VAE*: section 2, equation 4 (the weight).
# - Burda, Grosse, Salakhutdinov 2016, *Importance Weighted Autoencoders*: section 5 (active units).
# - Cremer, Li, Duvenaud 2018, *Inference Suboptimality in Variational Autoencoders*: the two parts of the gap.
# - Rybkin, Daniilidis, Levine 2021, *Simple and Effective VAE Training with Calibrated Decoders*: the weight as a variance.
# - Hoffman, Johnson 2016, *ELBO Surgery: Yet Another Way to Carve Up the Variational Evidence Lower Bound*.
# - Rombach, Blattmann, Lorenz, Esser, Ommer 2022, *High-Resolution Image Synthesis with Latent Diffusion Models*:
#   section 3.1, and the appendix on autoencoders (KL weight, scale).
