# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown] slide=["# Most numbers of a picture say nothing new", "64 by 64 pixels of three colours: 12,288 numbers, and a U-Net pays for each of them at every step.", "? A code of a twelfth of the numbers. What must it be good for?", "From it, the picture must come back. And all codes together must be a distribution that one can draw from.", "# What you can do afterwards", "- derive the evidence lower bound, and say what it falls short by", "- pass a gradient through a random draw", "- predict at which weight a latent number dies", "- judge an autoencoder by more than its decibels", "- say why there is a second stage, and what scale it needs"]
# # 06 The variational autoencoder: a smaller space to diffuse in
#
# A picture of 64 by 64 pixels has 12,288 numbers, and a U-Net of chapter 02 pays for each of them, at every step of
# every sample. Most of these numbers say nothing new: a star is a star in far fewer. This chapter builds what turns
# pictures into something smaller and back, 16 by 16 places with four numbers each, a twelfth of the numbers; chapter
# 07 diffuses there.
#
# Two things are asked of such a code. From it, the picture must come back. And the codes of all pictures together
# must be a distribution that one can learn and draw from: not a cloud of isolated points. A **variational
# autoencoder** (VAE) trades the two against each other, by one number.
#
# **What you will be able to do**
#
# - derive the evidence lower bound, and say exactly what it falls short by;
# - pass a gradient through a random draw, and say why the other way to do it is worse;
# - compute the divergence from the prior, and predict at which weight of it a latent number dies;
# - build and train an autoencoder of images, and judge it by more than its decibels;
# - say why a VAE's own samples are poor, in nats, and hence why there is a second stage;
# - give the latents the scale that a diffusion expects, and say what goes wrong without it.
#
# **What it needs**: chapter 01 (normal densities, the schedule, the exact denoiser), chapter 02 (blocks, patches).
# **What it takes**: one to one and a half minutes on two cores. All data are embedded. Sections marked *(at a second
# reading)* can wait.

# %%
import matplotlib.pyplot as plt
from torch.distributions import Normal, kl_divergence

from lecture26.checks import check
from lecture26.ddpm import (
    Diffusion,
    GaussianMixture,
    cosine_betas,
    ddim_step,
    exact_denoiser,
    q_sample,
    sample,
)
from lecture26.kit.checkpoints import load_card
from lecture26.kit.data import load
from lecture26.kit.evaluation import attribute_accuracy, extract_features, frechet_distance
from lecture26.kit.figures import PALETTE, show, show_grid, use_style
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
from torch.nn import functional as F

from lecture26.kit.validation import check_positive_int, check_shape
from lecture26.unet import group_norm, levels_with_attention, patchify, unpatchify, zero_init

# %% [markdown]
# Until the first training, everything is in double precision.

# %%
torch.set_default_dtype(torch.float64)

# %% [markdown] tags=["core"]
# ## A hidden number behind each picture
#
# Imagine that data come about in two steps. First a hidden number $z$ is drawn from a standard normal distribution,
# the **prior**. Then a *decoder* turns it into a point of the plane, here on a circle, and the world adds some noise:
#
# $$z\sim\mathcal N(0,I),\qquad x=g(z)+\sigma\,\eta,\quad\eta\sim\mathcal N(0,I),
# \qquad p(x)=\int p(z)\,p(x\mid z)\,dz \tag{6.1, definition}$$
#
# $z$ is the **latent variable**, each of its components a *latent number*, and a value of it a *code*; $x$ is what we
# see, and $p(x)$ is called the **evidence**. With one latent number the integral is a sum over a fine grid, exact to
# ten digits, so that in this section everything can be known.

# %% slide=["# A hidden number behind each picture", "$$z\\sim\\mathcal N(0,I),\\qquad x=g(z)+\\sigma\\,\\eta,\\qquad p(x)=\\int p(z)\\,p(x\\mid z)\\,dz \\tag{6.1}$$", "Prior, decoder, evidence. Which $z$ lies behind a given $x$?", "$$p(z\\mid x)=\\frac{p(z)\\,p(x\\mid z)}{p(x)}$$", "With a thousand latent numbers, the integral is out of reach."]
decoder_std = 0.2
z_grid = torch.linspace(-8, 8, 2001)


def decode_point(z):
    """A point of the circle for each z, (...) -> (..., 2)."""
    return torch.stack([(1.5 * z).cos(), (1.5 * z).sin()], dim=-1)


def integrate(values):
    """The integral over z of values on z_grid, (..., 2001) -> (...)."""
    return torch.trapezoid(values, z_grid, dim=-1)


prior = Normal(torch.tensor(0.0), torch.tensor(1.0))


# %%
def log_likelihood(x, z):
    """log p(x | z) for points x, (..., 2), and latents z, (...)."""
    return Normal(decode_point(z), decoder_std).log_prob(x).sum(dim=-1)


def log_evidence(x):
    """log p(x) for points x, (..., 2) -> (...)."""
    return integrate((prior.log_prob(z_grid) + log_likelihood(x[..., None, :], z_grid)).exp()).log()


points = {"plain": torch.tensor([0.3, 1.1]), "torn": torch.tensor([-1.1, 0.05])}
for name, x in points.items():
    print(f"{name}: log p(x) = {log_evidence(x):.3f}")

# %% [markdown]
# Which $z$ lies behind a given $x$? Bayes' rule answers: $p(z\mid x)=p(z)\,p(x\mid z)/p(x)$, the **posterior**. For the
# first point it is one bump. From $z=-2.1$ to $z=2.1$ the decoder runs once around the circle, so both ends land on
# the same place. The second point lies there, and could have come from either.

# %% slide=["# Two points, and what each says of its latent number", "[picture]", "The decoder runs around a circle; at the torn point both ends meet, and its posterior has two bumps."]
side = torch.linspace(-1.8, 1.8, 60)
plane = torch.stack(torch.meshgrid(side, side, indexing="xy"), dim=-1)  # (60, 60, 2)
figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
axes[0].imshow(log_evidence(plane).exp(), extent=(-1.8, 1.8, -1.8, 1.8), origin="lower", cmap="Greys")
for (name, x), marker, colour in zip(points.items(), "os", colours):
    axes[0].plot(*x, marker, color=colour, markersize=9, label=f"{name} point")
    posterior = (prior.log_prob(z_grid) + log_likelihood(x, z_grid) - log_evidence(x)).exp()
    axes[1].plot(z_grid, posterior, color=colour, label=f"posterior, {name} point")
axes[1].plot(z_grid, prior.log_prob(z_grid).exp(), "--", color="grey", label="prior")
axes[0].set(title="evidence p(x)", xticks=[], yticks=[])
axes[0].grid(False)
axes[1].set(xlim=(-4, 4), xlabel="z", title="prior and posteriors")
for axis in axes:
    axis.legend(loc="upper right", fontsize="small")
show(
    figure,
    "A ring of density with two points on it; their posteriors over z, one with a single bump, one with two.",
)

# %% [markdown] slide=["# The evidence is a bound, plus what the guess is worth", "Any guess $q(z\\mid x)$ will do:", "(6.2)", "(6.3)", "? Raise $\\mathcal L$. Which two good things may happen?"]
# *Left: where the data are, dark; the ring is faint where the ends meet. Right: what each of the two points says
# about its latent number.*
#
# With 1,024 latent numbers there is no grid. The integral is out of reach, the posterior with it, and so is training
# the decoder by raising $\log p(x)$. Something has to stand in.

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
# A divergence is at least 0, so $\mathcal L\le\log p(x)$ for *every* $q$; and what it falls short by is known: how
# far the guess is from the true posterior. Raise $\mathcal L$, and one of two good things happens, or both: the
# evidence grows, or the guess gets better. (One may even get worse, if the other gains more.) With $p(x,z)=p(x\mid
# z)\,p(z)$ it falls into two terms, each with a meaning:
#
# $$\mathcal L(x)=\mathbb E_{q(z\mid x)}\bigl[\log p(x\mid z)\bigr]-\mathrm{KL}\bigl(q(z\mid x)\,\|\,p(z)\bigr)
# \tag{6.4}$$
#
# Draw a code from the guess, decode it, and see how likely the data are: *reconstruction*. And keep the guess near
# the prior, from which codes will be drawn when there is no $x$: *regularity*.
#
# Chapter 01 met this bound in (1.28): a diffusion is a model with latents $x_1,\dots,x_T$ and a $q$ that is fixed.
# Here $q$ is learned.
#
# ### The divergence
#
# The usual guess is a normal distribution with independent numbers,
# $q(z\mid x)=\mathcal N(\mu,\operatorname{diag} \sigma^2)$, whose means and variances a network reads off $x$: the
# **encoder**. Then the divergence needs no integral. Of one number, with $\mathbb E_q[z^2]=\mu^2+\sigma^2$,
#
# $$\mathrm{KL}=\mathbb E_q\left[-\tfrac12\log\sigma^2-\frac{(z-\mu)^2}{2\sigma^2}+\frac{z^2}2\right]
# =\tfrac12\left(-\log\sigma^2-1+\mu^2+\sigma^2\right)$$
#
# and independent numbers add up:
#
# $$\mathrm{KL}\bigl(\mathcal N(\mu,\operatorname{diag}\sigma^2)\,\|\,\mathcal N(0,I)\bigr)
# =\tfrac12\sum_i\left(\mu_i^2+\sigma_i^2-1-\log\sigma_i^2\right) \tag{6.5}$$
#
# It is 0 for $\mu=0$, $\sigma=1$ only. What does it charge? With $\mu=2$, $\sigma=0.5$:
# $\tfrac12(4+0.25-1+1.39)=2.32$ nats. A sharp guess pays for its sharpness, $-\log\sigma$, and a far one for its
# distance, $\mu^2/2$.
#
# The encoder puts out $\log\sigma^2$, not $\sigma$: any number will do, and $\sigma$ comes out positive.
#
# **Exercise 1.** Fill in `kl_to_standard_normal`.


# %% tags=["export", "exercise"]
def kl_to_standard_normal(mean, log_variance):
    """The divergence KL(N(mean, variance) || N(0, I)) of each sample's code distribution from the prior.

    Args:
        mean: of each latent number, (B, ...).
        log_variance: the logarithm of each variance, like mean.

    Returns:
        (B,), in nats: the sum over all latent numbers of a sample, at least 0.

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
mean, log_variance = (torch.randn(5, 4, 3, 3, generator=generator) for _ in range(2))
q = Normal(mean, (log_variance / 2).exp())
by_torch = kl_divergence(q, Normal(0.0, 1.0)).sum(dim=(1, 2, 3))
verify("6.5", kl_to_standard_normal(mean, log_variance), by_torch, atol=1e-12)

# %% [markdown]
# ### The reconstruction
#
# Our decoder adds normal noise of standard deviation $\sigma$ to each of $D$ numbers, so that the logarithm of its
# density is a squared error, seen through $\sigma$ (from here on $\sigma$ is the decoder's, and the encoder's are
# $\sigma_i$):
#
# $$-\log p(x\mid z)=\frac{\|x-\hat x\|^2}{2\sigma^2}+\frac D2\log(2\pi\sigma^2),\qquad\hat x=g(z) \tag{6.6}$$
#
# **Exercise 2.** Fill in `negative_log_likelihood`.


# %% tags=["export", "exercise"]
def negative_log_likelihood(x, x_hat, decoder_std):
    """-log p(x | z) of a decoder that adds Gaussian noise: p(x | z) = N(x; x_hat, decoder_std^2 I).

    Args:
        x: data, (B, ...).
        x_hat: the decoder's outputs, like x.
        decoder_std: the standard deviation of each number of x around x_hat; a number above 0.

    Returns:
        (B,), in nats, the constant included: the sum over all numbers of a sample.

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
x, x_hat = (torch.randn(5, 3, 4, 4, generator=generator) for _ in range(2))
by_torch = -Normal(x_hat, 0.3).log_prob(x).sum(dim=(1, 2, 3))
verify("6.6", negative_log_likelihood(x, x_hat, 0.3), by_torch, atol=1e-9)

# %% [markdown]
# Now the bound itself, on the circle, for five guesses at each of the two points. On the one side the definition,
# (6.2), on the other both terms from the two functions; then the gap, from the exact posterior.

# %%
guesses = {"mean": torch.tensor([0.0, 0.8, 0.8, 2.0, -2.1]), "std": torch.tensor([1.0, 0.5, 0.1, 0.4, 0.15])}
q = Normal(guesses["mean"][:, None], guesses["std"][:, None])
log_q = q.log_prob(z_grid)  # (5 guesses, 2001)
both = torch.stack(list(points.values()))[:, None, None, :]  # (2, 1, 1, 2)
log_joint = prior.log_prob(z_grid) + log_likelihood(both, z_grid)  # (2, 1, 2001)
elbo = integrate(log_q.exp() * (log_joint - log_q))  # (2 points, 5 guesses)
divergence = kl_to_standard_normal(guesses["mean"][:, None], 2 * guesses["std"].log()[:, None])  # (5,)

# %%
expected = []
for x in points.values():
    errors = negative_log_likelihood(x.expand(len(z_grid), 2), decode_point(z_grid), decoder_std)  # (2001,)
    expected.append(integrate(log_q.exp() * -errors) - divergence)
verify("6.4", elbo, torch.stack(expected), atol=1e-9)
evidence = log_evidence(torch.stack(list(points.values())))  # (2,)
log_posterior = log_joint.log_softmax(dim=-1) - (z_grid[1] - z_grid[0]).log()  # Bayes' rule on the grid
gap = integrate(log_q.exp() * (log_q - log_posterior))  # KL(q || posterior), (2, 5)
verify("6.3", evidence[:, None].expand(2, 5), elbo + gap, atol=1e-9)

# %% [markdown]
# Which guess is best? Since nothing here is random, the bound can simply be climbed.


# %%
def best_guess(x, start):
    """The normal q with the highest bound near `start`, for a point x: mean, log-variance, bound."""
    parameters = torch.tensor(start, requires_grad=True)  # mean, log-variance
    climber = torch.optim.LBFGS([parameters], max_iter=200, line_search_fn="strong_wolfe")

    def negative_bound():
        climber.zero_grad()
        log_q = Normal(parameters[0], (parameters[1] / 2).exp()).log_prob(z_grid)
        log_joint = prior.log_prob(z_grid) + log_likelihood(x, z_grid)
        loss = -integrate(log_q.exp() * (log_joint - log_q))
        loss.backward()
        return loss

    climber.step(negative_bound)
    return *parameters.detach(), -negative_bound().detach()


# %% slide=["# The best normal guess takes one bump", "[picture]", "Where the posterior has one bump hardly anything is lost; where it has two, nearly a bit."]
figure, axes = plt.subplots(1, 2, figsize=(11, 3.2), layout="constrained", sharey=True)
for axis, (name, x), start in zip(axes, points.items(), ([0.5, -1.0], [2.0, -1.0])):
    mean, log_variance, bound = best_guess(x, start)
    posterior = (prior.log_prob(z_grid) + log_likelihood(x, z_grid) - log_evidence(x)).exp()
    axis.plot(z_grid, posterior, color=colours[0], label="posterior")
    best = Normal(mean, (log_variance / 2).exp()).log_prob(z_grid).exp()
    axis.plot(z_grid, best, "--", color=colours[1], label="best normal guess")
    axis.set(title=f"{name} point", xlabel="z", xlim=(-4, 4))
    axis.legend(loc="upper left")
    print(
        f"{name}: log p(x) {log_evidence(x):.3f}, bound {bound:.3f}, gap {log_evidence(x) - bound:.3f} nats"
    )
show(
    figure,
    "For the plain point the best guess covers the posterior; for the torn one it covers one of two bumps.",
)

# %% [markdown]
# *The best normal guess. Where the posterior has one bump, hardly anything is lost. Where it has two, the guess takes
# one of them, and the gap is minus the logarithm of that bump's share of the posterior, here $-\ln0.53=0.63$ nats,
# nearly a bit.*
#
# This gap is the price of a simple *form* of guess. An encoder network adds to it, as one function has to serve all
# $x$. Training on the bound also moves the decoder, which may avoid such places.

# %% [markdown] tags=["core"]
# ## A gradient through a random draw
#
# To train, we need the gradient of $\mathcal L$. The divergence is a formula. The reconstruction is an expectation
# over $q$, and $q$ depends on what we want to differentiate by, $\mu$ and $\log\sigma^2$. One draw $z\sim q$ gives a
# number $f(z)=\log p(x\mid z)$; but how would that number change with $\mu$? A draw has no derivative.
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
# **Exercise 3.** Fill in `reparameterize`.


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
# Both ways must agree in expectation. For the plain point: the left side of (6.9) by (6.7), on the grid of $z$; the
# right side through `reparameterize`, on a grid of $\epsilon$.

# %% slide=["# Reparameterisation is a line", "[code reparameterize]", "The other way needs no slope of $f$:", "$$\\nabla\\,\\mathbb E_q[f(z)]=\\mathbb E_q\\bigl[f(z)\\,\\nabla\\log q(z)\\bigr] \\tag{6.7}$$"]
x = points["plain"]
mean, log_variance = torch.tensor(0.8, requires_grad=True), torch.tensor(-2.0, requires_grad=True)
log_q = Normal(mean, (log_variance / 2).exp()).log_prob(z_grid)
by_score = torch.autograd.grad(integrate(log_q.exp() * log_likelihood(x, z_grid)), (mean, log_variance))

eps_grid = z_grid
value = log_likelihood(x, reparameterize(mean, log_variance, eps_grid))
by_path = torch.autograd.grad(integrate(prior.log_prob(eps_grid).exp() * value), (mean, log_variance))
verify("6.9", torch.stack(by_path), torch.stack(by_score), atol=1e-9)

# %% [markdown]
# In training there is one draw for each sample, and a batch averages over a few dozen. How far are such averages from
# the truth? And what happens if 50 is added to $f$, which changes nothing in the derivative of its expectation?

# %%
noise = torch.randn(500, 64, generator=generator)  # 500 batches of 64 draws
means = torch.full((500, 64), 0.8, requires_grad=True)  # one for each draw, so that each has its own gradient
f = log_likelihood(x, reparameterize(means, log_variance.detach(), noise))
(path,) = torch.autograd.grad(f.sum(), means)
# grad log q by mu is (z - mu) / sigma^2 = eps / sigma
score = noise / (log_variance.detach() / 2).exp()
estimates = {
    "path": path.mean(dim=1),
    "score function": (f.detach() * score).mean(dim=1),
    "score function, f + 50": ((f.detach() + 50) * score).mean(dim=1),
}
print(f"exact {by_path[0]:.1f}")
for name, values in estimates.items():
    error = values.std() / math.sqrt(len(values))
    print(f"{name:23} mean {values.mean():.1f} +- {error:.1f}, standard deviation {values.std():.1f}")

# %% slide=["# Both are right on average; one is far noisier", "[picture]", "The score function uses the value of $f$, so that a constant makes it noisier; the path uses the slope."]
figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
for (name, values), colour in zip(estimates.items(), colours):
    axis.hist(
        values.numpy(), bins=50, range=(-50, 60), histtype="step", linewidth=2, color=colour, label=name
    )
axis.axvline(by_path[0].item(), color="black", linewidth=1, label="exact")
axis.set(xlabel="gradient by the mean, from 64 draws", ylabel="batches")
axis.legend()
show(figure, "Three histograms around the exact gradient: that of the path is the narrowest.")

# %% [markdown]
# *All are right on average: the means lie within two standard errors of the exact value. The score function uses the
# value of $f$, so that a constant added to $f$ makes it noisier; the path uses the slope, and does not notice.*
#
# (Where only the value is known, as for the reward in reinforcement learning, one subtracts a *baseline* from $f$ for
# this very reason.)
#
# With a thousand latent numbers the difference decides. Along the path each of them gets its own slope; the score
# function gives all of them the one same value, times noise.

# %% [markdown] tags=["core"]
# ## One number to trade by
#
# Multiply the bound by $-\sigma^2$, with (6.6):
#
# $$-\sigma^2\mathcal L(x)=\mathbb E_q\Bigl[\tfrac12\|x-\hat x\|^2\Bigr]
# +\sigma^2\,\mathrm{KL}+\tfrac12D\,\sigma^2\log(2\pi\sigma^2) \tag{6.10}$$
#
# In training, one draw stands for the expectation. With $\sigma$ fixed, the constant moves no parameter. What is
# left is half the squared error plus a **KL weight** times the divergence. So the weight is no trick: it *is* the
# variance of the decoder's noise, the size of the errors that we declare not to matter. A large weight says that the
# data are noisy; a small one that every detail counts.
#
# Both terms are *sums*, over the numbers of $x$ and over those of $z$. Averaging one and summing the other changes the
# weight by the number of terms: for images, a factor of thousands.
#
# **Exercise 4.** Fill in `vae_loss`.


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
x, x_hat = (torch.randn(6, 3, 8, 8, generator=generator) for _ in range(2))  # D = 192
mean, log_variance = (torch.randn(6, 4, 2, 2, generator=generator) for _ in range(2))
bounds = -negative_log_likelihood(x, x_hat, 0.3) - kl_to_standard_normal(mean, log_variance)  # one draw each
constant = 192 / 2 * 0.3**2 * math.log(2 * math.pi * 0.3**2)
verify(
    "6.10", -(0.3**2) * bounds.mean(), vae_loss(x, x_hat, mean, log_variance, 0.3**2) + constant, atol=1e-9
)

# %% [markdown] tags=["core"]
# ## Too much weight, too little
#
# What does the weight do? There is a case in which it can be said exactly. Let the data be one number with mean 0 and
# variance $\lambda$, and let encoder and decoder be linear: $q(z\mid x)=\mathcal N(v\,x,s^2)$ and $\hat x=w\,z$. (The
# letters are local: $\lambda$ is not the log signal-to-noise ratio, $\beta$ no step of a schedule, $v$ no prediction,
# $w$ no guidance.) With $z=v\,x+s\,\epsilon$, the loss at the KL weight $\beta=\sigma^2$, averaged over $x$ and
# $\epsilon$, is
#
# $$L(w,v,s)=\tfrac12\bigl((1-wv)^2\lambda+w^2s^2\bigr)+\tfrac\beta2\bigl(v^2\lambda+s^2-1-\log s^2\bigr)$$
#
# *The encoder, given $w$.* Set the derivatives by $v$ and by $s^2$ to zero: $-w(1-wv)+\beta v=0$ and
# $w^2+\beta-\beta/s^2=0$, so $v=w/(w^2+\beta)$ and $s^2=\beta/(w^2+\beta)$. (This is the true posterior, so there is
# no gap.)
#
# *The decoder.* Without a gap the loss is $-\beta$ times the mean log evidence, up to the constant of (6.10), and in
# the model $x\sim\mathcal N(0,w^2+\beta)$. A normal distribution fits data of variance $\lambda$ best if its own
# variance is $\lambda$. Above $\lambda$ the fit only gets worse, and $w^2+\beta$ cannot be below $\beta$. So, up to a
# common sign of $w$ and $v$,
#
# $$w^2=\max(\lambda-\beta,\,0),\qquad v=\frac{w}{w^2+\beta},\qquad s^2=\min\Bigl(\frac\beta\lambda,\,1\Bigr)
# \tag{6.11}$$
#
# Put it back in. Where $\beta<\lambda$, the code's total variance is $v^2\lambda+s^2=1$, so the divergence is
# $-\tfrac12\log s^2$; and the squared error is
# $(1-wv)^2\lambda+w^2s^2=\beta^2/\lambda+(\lambda-\beta)\beta/\lambda=\beta$. Where $\beta\ge\lambda$, nothing is
# coded:
#
# $$\mathbb E\,\mathrm{KL}=\tfrac12\log\frac\lambda\beta\ \text{ or }\ 0,\qquad
# \mathbb E\,\|x-\hat x\|^2=\min(\lambda,\beta) \tag{6.12}$$
#
# The weight is a **price**. A direction of the data whose variance is below the price is not bought: its latent
# number is switched off, $\mu=0$ and $\sigma=1$ whatever $x$ is. This is **posterior collapse**. Here it is no
# accident of training, but the optimum of the loss. (Networks can also get stuck in it.) For data of many dimensions
# the best linear autoencoder with $k$ latent numbers treats the $k$ largest principal directions around the mean like
# this, each by itself, and drops the rest (Tipping and Bishop 1999; Lucas et al. 2019).


# %% slide=["# The weight is a price", "One number of variance $\\lambda$, linear encoder and decoder, KL weight $\\beta$. At the optimum", "$$\\mathbb E\\,\\mathrm{KL}=\\max\\left(\\tfrac12\\log\\frac\\lambda\\beta,\\,0\\right),\\qquad\\mathbb E\\,\\|x-\\hat x\\|^2=\\min(\\lambda,\\beta) \\tag{6.12}$$", "A direction of less variance than the price is not bought: **posterior collapse**, the optimum and no accident."]
def linear_loss(parameters, variance, beta):
    """L(w, v, s), and its two parts: half the squared error and the divergence."""
    w, v, log_s2 = parameters
    error = ((1 - w * v) ** 2 * variance + w**2 * log_s2.exp()) / 2
    divergence = (v**2 * variance + log_s2.exp() - 1 - log_s2) / 2
    return error + beta * divergence, 2 * error, divergence


def fit_linear(variance, beta):
    """The w, v and log s^2 with the least loss, found by descent."""
    parameters = torch.tensor([0.5, 0.5, -0.5], requires_grad=True)
    descent = torch.optim.LBFGS(
        [parameters],
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

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
    derived.append(torch.tensor([w2, math.sqrt(w2) / (w2 + beta), min(beta / variance, 1.0)]))
    costs.append(torch.stack(linear_loss(fitted, variance, beta)[1:]))
    prices.append(torch.tensor([min(variance, beta), max(0.5 * math.log(variance / beta), 0.0)]))
verify("6.11", torch.stack(found), torch.stack(derived), atol=1e-4)
verify("6.12", torch.stack(costs), torch.stack(prices), atol=1e-6)

# %% [markdown]
# In this case evidence and posterior are known normals, so that (6.3) can be checked once more, for guesses of any
# kind and without a grid: the bound and the divergence from the true posterior must add up to the evidence.

# %%
w, noise_variance = 1.3, 0.4  # x = w z + noise
x = torch.tensor([-1.0, 0.4, 2.0])
m, s = (
    torch.tensor([0.1, 0.8, -0.5]),
    torch.tensor([0.3, 1.0, 0.7]),
)  # means and standard deviations of guesses
misfit = ((x - w * m) ** 2 + w**2 * s**2) / (2 * noise_variance) + math.log(2 * math.pi * noise_variance) / 2
bound = -misfit - kl_to_standard_normal(m[:, None], 2 * s.log()[:, None])
total = w**2 + noise_variance  # the variance of x
posterior = Normal(w * x / total, math.sqrt(noise_variance / total))
evidence = Normal(0.0, math.sqrt(total)).log_prob(x)
verify("6.3", evidence, bound + kl_divergence(Normal(m, s), posterior), atol=1e-12)

# %% [markdown]
# ### On handwritten digits
#
# Does that say anything about networks? Take the digits at 8 by 8 pixels. From the variances $\lambda_i$ of their 64
# principal directions follows the whole trade-off of the best linear autoencoder with 16 latent numbers: what it pays
# (the divergence, summed over directions) and what it gets.

# %%
torch.set_default_dtype(torch.float32)
digits, unseen = (load("digits", split, 8).batch(range(296)) for split in ("train", "test"))
training_set = load("digits", "train", 8)
pixels = training_set.batch(range(len(training_set)))["image"].flatten(1)  # (1197, 64)
variances = torch.linalg.eigvalsh(torch.cov(pixels.double().T, correction=0)).flip(0)  # (64,), largest first
print("variances of the first directions", [round(v, 2) for v in variances[:6].tolist()])
print(f"of all together {variances.sum():.1f}")


# %%
def linear_trade(beta, latents=16):
    """Squared error and divergence of the best linear autoencoder of the digits, by (6.12)."""
    kept, rest = variances[:latents], variances[latents:]
    error = kept.clamp(max=beta).sum() + rest.sum()
    return error.item(), (kept / beta).log().clamp(min=0).sum().item() / 2


# %% [markdown]
# And a small nonlinear network, three layers each way, at six weights.


# %%
class DigitVAE(nn.Module):
    """An autoencoder of 64 pixels, (B, 64), with so many latent numbers."""

    def __init__(self, latents, hidden=192):
        super().__init__()
        ends = [(64, 2 * latents), (latents, 64)]
        self.encoder, self.decoder = (
            nn.Sequential(
                nn.Linear(first, hidden),
                nn.SiLU(),
                nn.Linear(hidden, hidden),
                nn.SiLU(),
                nn.Linear(hidden, last),
            )
            for first, last in ends
        )

    def forward(self, x, noise):
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        return self.decoder(reparameterize(mean, log_variance, noise)), mean, log_variance


# %%
def train_digits(latents, kl_weight):
    """A DigitVAE, trained for a few seconds."""
    torch.manual_seed(0)
    network = DigitVAE(latents)

    def draw(random):
        return {"x": pixels[random.integers(len(pixels))], "noise": random.normal(latents)}

    def loss(network, batch):
        return vae_loss(batch["x"], *network(batch["x"], batch["noise"]), kl_weight)

    options = {"batch_size": 64, "learning_rate": 3e-3, "warmup_steps": 20, "progress": False}
    train(network, draw, loss, steps=800, **options)
    return network.eval().requires_grad_(False)


weights = (0.001, 0.01, 0.1, 0.3, 1.0, 3.0)
networks = {kl_weight: train_digits(16, kl_weight) for kl_weight in weights}

# %% [markdown]
# Before looking: how many latent numbers are alive? One that was switched off has the same mean for every picture. So
# a latent number is called *active* if its mean moves:
#
# $$\operatorname{Var}_x\bigl(\mathbb E_{q(z\mid x)}[z_i]\bigr)>0.01 \tag{6.13, definition}$$
#
# **Exercise 5.** Fill in `active_latents`.


# %% tags=["export", "exercise"]
def active_latents(mean, threshold=0.01):
    """Which latent numbers say anything about the data: those whose mean moves from sample to sample.

    Args:
        mean: the encoder's means for N >= 2 samples, (N, ...).
        threshold: the variance over the samples above which a number counts as active.

    Returns:
        Booleans of the shape of one sample, (...).

    Raises:
        ValueError: on fewer than two samples, which have no variance.

    Source: Burda et al. 2016, section 5 (threshold 0.01).
    """
    if len(mean) < 2:
        raise ValueError(f"mean must be of at least 2 samples; got {len(mean)}")
    ### BEGIN SOLUTION
    # Var_x(E_q(z|x)[z_i]) > threshold
    return mean.var(dim=0) > threshold
    ### END SOLUTION


# %%
check("vae.active_latents", active_latents)

# %% [markdown]
# Besides error and divergence we look at what the model draws by itself: a code from the prior, decoded. A Fréchet
# distance, in the features of a network that reads digits, says how far such drawings are from real digits; real ones
# are at a certain distance from each other, too.

# %%
reader = load_model("reader_digits")
real = unseen["image"].flatten(1)  # (296, 64), not seen in training


def features(x):
    """The reader's features of digits (B, 64); it reads images of 32 pixels."""
    large = F.interpolate(x.reshape(-1, 1, 8, 8), size=32, mode="bicubic")
    return extract_features(reader, large)


def describe(network, latents, generator):
    """What a trained DigitVAE does to unseen digits, and what it draws."""
    x_hat, mean, log_variance = network(real, torch.randn(len(real), latents, generator=generator))
    drawn = network.decoder(torch.randn(len(real), latents, generator=generator))
    return {
        "error": ((real - x_hat) ** 2).sum(dim=1).mean().item(),
        "divergence": kl_to_standard_normal(mean, log_variance).mean().item(),
        "active": active_latents(mean).sum().item(),
        "distance of reconstructions": frechet_distance(features(real), features(x_hat)),
        "distance of samples": frechet_distance(features(real), features(drawn)),
    }


# %%
generator = torch.Generator().manual_seed(0)
table = {kl_weight: describe(network, 16, generator) for kl_weight, network in networks.items()}
between_real = frechet_distance(features(real), features(digits["image"].flatten(1)))
error_at = {kl_weight: row["error"] for kl_weight, row in table.items()}
active_at = {kl_weight: row["active"] for kl_weight, row in table.items()}
lower = [error_at[kl_weight] < linear_trade(kl_weight)[0] for kl_weight in weights[:-1]]
print(f"less error than the best linear autoencoder, at weights up to 1: {all(lower)}")
print(f"active latent numbers of 16 at 0.001: {active_at[0.001]}, at 3: {active_at[3.0]}")
ratios = [table[kl_weight]["divergence"] / linear_trade(kl_weight)[1] for kl_weight in weights[:-1]]
print(f"divergence at most 1.5 times that of the linear one: {max(ratios) < 1.5}")
assert all(lower) and max(ratios) < 1.5 and active_at[0.001] == 16 and active_at[3.0] == 0

# %% slide=["# A network dies where the linear one does", "[picture]", "Dotted: the largest variance. Above it no direction is worth its price, and every latent number is off."]
figure, axes = plt.subplots(1, 3, figsize=(13, 3.5), layout="constrained")
fine = torch.logspace(-3, 0.7, 60).tolist()
for axis, quantity, column in zip(axes, ("error", "divergence"), (0, 1)):
    axis.plot(fine, [linear_trade(beta)[column] for beta in fine], color="grey", label="best linear, (6.12)")
    axis.plot(weights, [row[quantity] for row in table.values()], "o", color=colours[0], label="network")
    axis.axvline(variances[0].item(), color=colours[1], linestyle=":")
    axis.legend()
for kl_weight, count in active_at.items():
    axes[0].annotate(count, (kl_weight, error_at[kl_weight]), (7, -8), textcoords="offset points")
for quantity, marker, colour in zip(("reconstructions", "samples"), "os", colours):
    values = [row[f"distance of {quantity}"] for row in table.values()]
    axes[2].loglog(weights, values, marker + "-", color=colour, label=quantity)
axes[2].axhline(between_real, color="black", linestyle="--", label="real against real")
axes[0].set(title="squared error", xscale="log", ylim=(0, 21))
axes[1].set(title="divergence, nats", xscale="log")
axes[2].set(title="Fréchet distance to real digits")
axes[2].legend(loc="lower right")
for axis in axes:
    axis.set_xlabel("KL weight")
show(
    figure,
    "Against the KL weight: the error rises, the divergence falls to zero at the largest variance, and the "
    "samples' distance has its minimum in between.",
)

# %% [markdown]
# *Left and middle: the network beside (6.12), with the number of its active latents; the dotted line is the largest
# variance, above which no direction is worth its price. Right: reconstructions get worse with the weight, the model's
# own samples first better, then worse. (Reconstructions may lie below the dashed line: they are copies of the very
# digits that they are compared with.)*
#
# The network makes less of an error than the best linear autoencoder, for a divergence that is much the same. And yet
# it dies somewhere between the weights 1 and 3, as the linear one does at 2.8, the largest variance: at a weight of 3
# every latent number is off, and the decoder draws one grey mean for all.
#
# Two latent numbers can be looked at. The same at three weights, all unseen digits in the plane of their means:

# %%
pairs = {kl_weight: train_digits(2, kl_weight) for kl_weight in (0.001, 0.3, 3.0)}

# %% slide=["# Holes, filled, collapsed", "[picture]", "Codes of digits at three weights; the circle is where the prior expects them."]
figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
ring = torch.linspace(0, 2 * math.pi, 100)
for axis, (kl_weight, network) in zip(axes, pairs.items()):
    mean, log_variance = network.encoder(real).chunk(2, dim=1)
    reach = 1.1 * max(mean.abs().max().item(), 3.2)
    for (a, b), digit in zip(mean.tolist(), unseen["class"].tolist()):
        axis.text(a, b, digit, fontsize="small", color=colours[digit % 7], ha="center", va="center")
    axis.plot(2 * ring.cos(), 2 * ring.sin(), "--", color="black", linewidth=2)
    axis.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", title=f"KL weight {kl_weight}")
show(figure, "Three planes of digits: spread far outside a dashed circle, filling it, and all at its centre.")

# %% [markdown]
# *Each digit stands at the mean of its code; the circle has radius 2 and holds 86% of the prior. At a small weight
# the codes go far outside, with **holes** between them, and codes that are drawn inside the circle miss most of them.
# At 0.3 they fill it. At 3 they have **collapsed**.*

# %% slide=["# What the prior draws at the three weights", "[picture]", "The same ten codes, decoded: in holes, among digits, and one grey mean for all."]
codes = torch.randn(10, 2, generator=torch.Generator().manual_seed(4))
drawn = torch.cat([network.decoder(codes) for network in pairs.values()]).reshape(-1, 1, 8, 8)
figure = show_grid(drawn, columns=10, row_titles=[f"weight {kl_weight}" for kl_weight in pairs])
show(figure, "Ten drawings each: many alike, different digits, and the same grey blot ten times.")

# %% [markdown]
# *The same ten codes from the prior, decoded at the three weights.*
#
# And a walk between two digits, on a straight line in the plane of the middle network. It passes other digits on its
# way, and every stop is a digit, or nearly: that is what a well-filled code buys.

# %% slide=["# A filled code can be walked through", "[picture]", "From a 0 to a 1 on a straight line: every stop is a digit, or nearly."]
network = pairs[0.3]
ends = torch.stack([real[unseen["class"] == digit][0] for digit in (0, 1)])
first, last = network.encoder(ends).chunk(2, dim=1)[0]
walk = torch.stack([torch.lerp(first, last, share) for share in torch.linspace(0, 1, 10)])
figure = show_grid(network.decoder(walk).reshape(-1, 1, 8, 8), columns=10)
show(figure, "A row of ten small pictures that turn a zero into a one by way of other digits.")

# %% [markdown]
# *From a 0 to a 1, in ten equal steps of the code.*

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
# The first is the mutual information: what the codes know of the pictures. The second is the mismatch: how far all
# codes together are from the prior, from which we draw. And for a set of $N$ pictures the information is limited,
# because a code can do no more than say *which* of the $N$ it is:
#
# $$I(x;z)=\ln N-\mathbb E_{q(z)}\bigl[H(n\mid z)\bigr]\ \le\ \ln N \tag{6.15}$$
#
# with $H(n\mid z)$ the entropy of the guess which picture it was. Both, on the line, with four codes:

# %% slide=["# What the divergence pays for: information and mismatch", "$$R=I(x;z)+\\mathrm{KL}\\bigl(q(z)\\,\\|\\,p(z)\\bigr) \\tag{6.14}$$", "? A set of $N$ pictures. How much can a code know of which one it is?", "$$I(x;z)\\ \\le\\ \\ln N \\tag{6.15}$$", "What is paid beyond that is mismatch: codes that are not where the prior expects them."]
torch.set_default_dtype(torch.float64)
means, stds = torch.tensor([-1.5, -0.2, 0.1, 2.0])[:, None], torch.tensor([0.3, 0.5, 0.2, 0.8])[:, None]
log_each = Normal(means, stds).log_prob(z_grid)  # log q(z | x_n), (4, 2001)
log_all = log_each.logsumexp(dim=0) - math.log(4)  # log q(z), (2001,)
rate = kl_to_standard_normal(means, 2 * stds.log()).mean()
information = integrate(log_each.exp() * (log_each - log_all)).mean()
mismatch = integrate(log_all.exp() * (log_all - prior.log_prob(z_grid)))
verify("6.14", rate, information + mismatch, atol=1e-9)

# %%
log_guess = log_each.log_softmax(dim=0)  # log of how likely picture n is given z
entropy = -(log_guess.exp() * log_guess).sum(dim=0)  # (2001,)
verify("6.15", information, math.log(4) - integrate(log_all.exp() * entropy), atol=1e-9)
torch.set_default_dtype(torch.float32)

# %% [markdown]
# So the mismatch is at least $R-\ln N$. For the digits, $\ln1197=7.1$ nats. What is paid beyond that is paid for
# codes that are not where the prior expects them:

# %%
rates = []
for network in networks.values():
    _, mean, log_variance = network(pixels, torch.zeros(len(pixels), 16))
    rates.append(kl_to_standard_normal(mean, log_variance).mean().item())
limit = math.log(len(pixels))
assert sum(rate > limit for rate in rates) == 3
print(f"ln N = {limit:.1f}; more than 40 nats of mismatch at 0.001: {rates[0] - limit > 40}")

# %% slide=["# Small weights pay mostly for mismatch", "[picture]", "Red: more than any set of so many pictures can use as information."]
figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
places = range(len(weights))
axis.bar(
    places, [min(rate, limit) for rate in rates], color=colours[0], label="up to ln N: may be information"
)
excess = [max(rate - limit, 0) for rate in rates]
axis.bar(places, excess, bottom=limit, color=colours[1], label="beyond ln N: mismatch for certain")
axis.set_xticks(places, weights)
axis.set(xlabel="KL weight", ylabel="rate, nats")
axis.legend()
show(figure, "Bars of the rate by KL weight: at small weights, most of each is above the line of ln N.")

# %% [markdown]
# *The rate on the training set. For three of the six weights it is more than any set of 1,197 pictures can use.*
#
# (The bound is about *these* pictures and their codes. Over all pictures that the world could make, codes can hold
# more than $\ln N$. In the linear case (6.11), with normal data, all of the rate is information: $v^2\lambda+s^2=1$
# says that all codes together are the prior, at any weight. So a rate above $\ln N$ does not by itself make samples
# bad; that they are bad here, the right panel above has shown.)
#
# With a small weight the codes are sharp, the pictures come back well, and the prior knows hardly anything of where
# the codes are. None of the six weights makes both ends good. Image models do not look for one: they take a tiny
# weight, for good reconstructions, and leave it to a *second* model to learn where the codes are.

# %% [markdown] tags=["core"]
# ## Images
#
# Now the autoencoder that chapter 07 will use: 64 by 64 pixels and 3 colours become a small picture with 16 by 16
# places and 4 numbers each. That the code keeps the form of a picture is on purpose. A place of the code belongs to a
# place of the image, so convolutions can work on both, and so can a U-Net.
#
# ### Decibels
#
# How good is a reconstruction? The usual measure is the mean squared error on a logarithmic scale, relative to the
# square of the largest possible difference, the range $r=1-(-1)=2$:
#
# $$\mathrm{PSNR}=10\,\log_{10}\frac{r^2}{\mathrm{MSE}} \tag{6.16, definition}$$
#
# the **peak signal-to-noise ratio**, in decibels. 20 dB is an error of a tenth of the range in the root mean square,
# 40 dB of a hundredth.
#
# **Exercise 6.** Fill in `psnr`, one number for each image.


# %% tags=["export", "exercise"]
def psnr(x, x_hat):
    """The peak signal-to-noise ratio of each image's reconstruction, in decibels.

    Args:
        x: images in [-1, 1], (B, C, H, W).
        x_hat: their reconstructions, like x.

    Returns:
        (B,): 10 log10 of the squared range of the values over the mean squared error of an image; infinite
        where both are equal.

    Raises:
        ValueError: if x and x_hat are of different shapes.

    Source: equation 6.16 of the chapter.
    """
    check_shape("x_hat", x_hat, x.shape, of="x")
    ### BEGIN SOLUTION
    mean_squared_error = ((x - x_hat) ** 2).flatten(1).mean(dim=1)  # (B,)
    # 10 log10(range^2 / MSE); the range of [-1, 1] is 2
    return 10 * torch.log10(4 / mean_squared_error)
    ### END SOLUTION


# %%
check("vae.psnr", psnr)

# %% [markdown]
# Before any decibels are believed: two spoiled versions of some scenes, with the *same* PSNR, image by image. One has
# noise all over. In the other a single object was replaced by one of another shape, and everything else was left as
# it is.

# %%
scenes = load("scenes", "test")
labels = scenes.attributes(range(400))
small = (labels["size_1"] == 0).nonzero()[:, 0][:128]  # scenes whose first object is small
labels = {name: values[small] for name, values in labels.items()}
original = scenes.render(labels, small)
other_shape = labels | {"shape_1": (labels["shape_1"] + 4) % 8}
swapped = scenes.render(other_shape, small)

noise = torch.randn(original.shape, generator=torch.Generator().manual_seed(0))
size = [(part**2).mean(dim=(1, 2, 3), keepdim=True).sqrt() for part in (swapped - original, noise)]
noisy = original + noise * size[0] / size[1]

# %% slide=["# Decibels say how much changed, not what", "[picture]", "Both spoiled versions have the same PSNR. In the lower one an object was exchanged for another."]
scene_reader = load_model("reader_scenes64")
for name, version in (("noise", noisy), ("another shape", swapped)):
    right = attribute_accuracy(scene_reader, version, labels)["all"]
    print(f"{name:14} PSNR {psnr(original, version).mean():.1f} dB, everything read right: {right:.0%}")
titles = [f"{decibels:.0f} dB" for decibels in psnr(original, noisy)[:6].tolist()]
rows = torch.cat([version[:6] for version in (original, noisy, swapped)])
figure = show_grid(
    rows, columns=6, titles=titles, row_titles=["original", "noise", "another shape"], inches_per_image=1.3
)
show(figure, "Six scenes: original, with noise, and with one small object exchanged for another.")

# %% [markdown]
# *The PSNR above each column is that of both spoiled versions. In the lower row one object per scene was exchanged.*
#
# The mean squared error asks how much changed, not what. So the course sends each image around, encoder and decoder,
# and asks the readers as well: are shape, colour, size, background, and in scenes the relation, still what they were?
#
# ### The networks
#
# All parts but one are from chapter 02. Its residual block expects an embedding of the step, and there is none here;
# what remains without it is short:


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
# The encoder folds 2 by 2 pixels into channels, as the U-Net does, works at 32 by 32 places, then at 16 by 16, and
# puts out twice the latent channels: means and log-variances. The decoder is its mirror image. There are no skips
# from the one to the other: what does not go through the code does not arrive.


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
# `encode` keeps the log-variance in $[-30,20]$, so that no early mistake makes its exponential overflow; beyond
# these ends no gradient passes. `decode` takes any code, and draws nothing: randomness is in the code, not in the
# decoder.


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
recipe = find_recipe("vae_shapes64")
images = recipe.load_images("train")
torch.manual_seed(0)
young = recipe.build()
x = images.batch(range(8))["image"]  # (8, 3, 64, 64)
mean, log_variance = young.encode(x)
print(
    "image", tuple(x.shape[1:]), "mean", tuple(mean.shape[1:]), "log-variance", tuple(log_variance.shape[1:])
)
print(
    "numbers",
    x[0].numel(),
    "to",
    mean[0].numel(),
    "and parameters",
    sum(p.numel() for p in young.parameters()),
)

# %% [markdown]
# ### Training
#
# The images are of two kinds in turn, one object (Shapes) and two (Scenes). The recipe's loss is `vae_loss` with a KL
# weight of 0.001, divided by the number of pixel values so that it does not grow with the image. Some hundred steps,
# to see it fall:

# %%
history = train(
    young,
    lambda random: recipe.draw(images, random),
    recipe.loss,
    steps=200,
    batch_size=16,
    learning_rate=2e-3,
    warmup_steps=20,
)

# %% slide=["# After a minute: places and colours", "[picture]", "Unseen images, and what comes back after 200 steps."]
young.eval().requires_grad_(False)
test_images = recipe.load_images("test")
x = test_images.batch([0, 3, 4, 7, 8, 11, 12, 15])["image"]  # one object and two, in turn
x_hat = young.decode(young.encode(x)[0])
figure = show_grid(torch.cat([x, x_hat]), row_titles=["images", "round trip"])
show(figure, "Eight test images, and blurred copies of them.")
print(f"loss below a tenth of the first: {sum(history.losses[-20:]) / 20 < history.losses[0] / 10}")

# %% [markdown]
# *Unseen images and what comes back after 200 steps: places and colours, with blurred outlines.*
#
# ### The long-trained model
#
# The checkpoint was trained for much longer (its card says how long). All numbers of the card are from images that
# training never showed, with codes that are drawn, not means.

# %%
card = load_card("vae_shapes64")
metrics = card["metrics"]
print(f"{card['parameters'] / 1e6:.2f} M parameters, {card['steps']} steps, {card['data']}")
print(f"PSNR {metrics['psnr']:.1f} dB, of the worst of 1,024 images {metrics['psnr_lowest']:.1f} dB")
for kind in ("shapes", "scenes"):
    read_right = {
        k.removeprefix(f"accuracy_{kind}_"): v for k, v in metrics.items() if k.startswith(f"accuracy_{kind}")
    }
    print(kind, ", ".join(f"{label} {share:.1%}" for label, share in read_right.items()))
assert metrics["psnr"] >= 30

# %% [markdown]
# ('all' is all labels at once after the round trip, 'original' the same without it: a reader errs at times, too.) The
# KL weight of 0.001 is, by (6.10), a decoder noise of variance 0.001, which would be 36 dB. Nothing forces the errors
# to be of that size; here they happen to be. For a fixed encoder and decoder the bound is highest where $\sigma^2$ is
# the mean squared error per number, so this weight is close to the best choice of $\sigma^2$. Live, on some of them:

# %%
vae = load_model("vae_shapes64")
batch = scenes.batch(range(128))
x = batch.pop("image")
mean, log_variance = vae.encode(x)
noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
z = reparameterize(mean, log_variance, noise)
x_hat = vae.decode(z)
decibels, accuracy = psnr(x, x_hat), attribute_accuracy(scene_reader, x_hat, batch)
print(f"PSNR at least 30 dB on average: {decibels.mean() >= 30}")
worst = min(share for label, share in accuracy.items() if label != "all")
print(f"every label of a scene read right at least 98 of 100 times: {worst >= 0.98}")

# %% slide=["# After long training: the outlines are what is lost", "[picture]", "Below, the error five times as strong; black is none. Readers find everything still there."]
x = test_images.batch([0, 3, 4, 7, 8, 11, 12, 15])["image"]
x_hat = vae.decode(vae.encode(x)[0])
figure = show_grid(
    torch.cat([x, x_hat, (x_hat - x).abs() * 5 - 1]), row_titles=["images", "round trip", "error x 5"]
)
show(
    figure, "Eight test images, their reconstructions, which look alike, and thin outlines where they differ."
)

# %% [markdown]
# *Unseen images, and what comes back. What is lost is on the outlines (below, five times as strong; black is none).*

# %% [markdown] tags=["core"]
# ## What the codes look like
#
# The four channels of the codes of some images, as grey pictures:

# %% slide=["# The code is a small picture of the picture", "[picture]", "The four channels of its means, 16 by 16 places."]
mean, log_variance = vae.encode(x)
large = F.interpolate(mean / 2.5, scale_factor=4, mode="nearest")  # 2.5: most numbers then lie in [-1, 1]
channels = torch.cat([x, *(large[:, c : c + 1].expand(-1, 3, -1, -1) for c in range(4))])
figure = show_grid(channels, row_titles=["images", *(f"channel {c}" for c in range(4))])
show(
    figure,
    "Eight images, and under each the four channels of its code: small grey pictures with the same outlines.",
)

# %% [markdown]
# *Means of the codes, 16 by 16 places. The code is a small picture of the picture.*
#
# What it costs, in nats: the rate, estimated from 256 training images, and with (6.15) a lower bound of the mismatch
# of the codes of all 400,000.

# %%
picks = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:256]
mean, log_variance = vae.encode(images.batch(picks)["image"])
rate = kl_to_standard_normal(mean, log_variance).mean().item()
size = rate / math.log(2) / 8  # 8 bits to the byte
print(f"rate {round(rate, -2):.0f} nats or {round(size, -2):.0f} bytes an image")
print(f"ln N = {math.log(len(images)):.1f}")
print(f"standard deviation of a number given its image: {(log_variance / 2).exp().median():.1f} (median)")

# %% [markdown]
# The information about *which* image it is, is at most 13 nats. All the rest is mismatch, thousands of nats of it. As
# a rule of thumb (it takes $\log q(z)/p(z)$ to be near its mean for most codes), a draw from the prior looks like one
# of these codes once in $e^\mathrm{KL}$ times, and the KL is at least $R-\ln N$. (Of all scenes that could be
# rendered, codes may know more: positions, angles and tints are worth tens of nats by our estimate, not thousands.) So
# what does the model draw by itself?

# %% slide=["# Its own samples have no shape in them", "? A code from the prior, decoded. What will it look like?", "[picture]", "The rate is thousands of nats, the information at most 13: the rest is mismatch, and the prior misses all codes."]
latents = reparameterize(
    mean, log_variance, torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
)
center, spread = latents.mean(dim=0), latents.std(dim=0)  # (4, 16, 16) each
codes = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(2))
by_diffusion = sample(
    load_diffusion("ddpm_shapes32").respace(50),
    load_model("ddpm_shapes32"),
    (8, 3, 32, 32),
    ddim_step,
    torch.Generator().manual_seed(3),
    progress=False,
)
rows = {
    "real": images.batch([0, 3, 4, 7, 8, 11, 12, 15])["image"],
    "VAE, prior": vae.decode(codes),
    "VAE, fitted": vae.decode(center + spread * codes),
    "diffusion": F.interpolate(by_diffusion, scale_factor=2, mode="nearest"),
}
figure = show_grid(torch.cat(list(rows.values())), row_titles=list(rows))
show(
    figure,
    "Rows: real images; specks of colour from the prior, and from a fitted normal; shapes by diffusion.",
)

# %% [markdown]
# *The VAE's own samples: codes from the prior, and from a normal distribution with each number's own mean and
# standard deviation. Neither has a shape in it. Below, for comparison, chapter 02's diffusion, in pixels at half the
# size.*

# %% slide=["# Hence a second stage", "- The autoencoder brings the size down, and the details back.", "- A diffusion learns where the codes are.", "- It needs no new theory: codes are pictures.", "Independent numbers cannot know that the outline of a star runs through many places."]
shape_reader = load_model("reader_shapes64")
shapes = load("shapes", "test", 64)
reference, others = (shapes.batch(range(start, start + 128))["image"] for start in (0, 128))
codes = torch.randn(128, 4, 16, 16, generator=torch.Generator().manual_seed(4))
versions = {
    "other real images": others,
    "other real images, round trip": vae.decode(vae.encode(others)[0]),
    "codes from the prior": vae.decode(codes),
    "codes, fitted": vae.decode(center + spread * codes),
}
true_features = extract_features(shape_reader, reference)
for name, version in versions.items():
    distance = frechet_distance(true_features, extract_features(shape_reader, version))
    print(f"{name:30} Fréchet distance to real images {round(distance, -1):4.0f}")

# %% [markdown]
# In the fitted codes each number has the right mean and spread; what is missing, above all, is how the numbers go
# together: the outline of a star runs through many places, and independent numbers cannot know that. Hence the
# **second stage**: a diffusion model of the codes. It needs no new theory, since codes are
# pictures. The autoencoder brings the size down and the details back; the diffusion learns what there is. Chapter 07
# does it.

# %% [markdown] tags=["optional"]
# ### Between two images *(at a second reading)*
#
# On the digits, a straight line between two codes went from digit to digit. Here:

# %% slide=["# Between two codes: a cross-fade, no meaning", "[picture]", "Above codes, below pixels. A mixture of two codes is a picture of a mixture."]
ends = images.parts[0].batch([0, 5])["image"]
first, last = vae.encode(ends)[0]
shares = torch.linspace(0, 1, 8)
walk = vae.decode(torch.stack([torch.lerp(first, last, share) for share in shares]))
fade = torch.stack([torch.lerp(*ends, share) for share in shares])
figure = show_grid(torch.cat([walk, fade]), row_titles=["codes", "pixels"])
show(
    figure,
    "Two rows of eight pictures from one shape to another; in both, one fades out while the other fades in.",
)

# %% [markdown]
# *Above, eight codes on the straight line between two codes, decoded; below, a plain cross-fade of the two images.*
#
# It is a cross-fade, hardly more. The code is a small picture, so a mixture of two codes is a picture of a mixture:
# one object fades, another appears, and halfway there is no object of the data, but a hole. Smooth walks through
# *meaning*, as on the digits, need a code that is much smaller, or a second stage.

# %% [markdown] tags=["core"]
# ## The latents' scale
#
# A diffusion starts from noise of variance 1, and its schedule was made for data of about that size. Are codes of
# that size? In the linear case they would be, $v^2\lambda+s^2=1$ at every weight. But with a small weight it costs
# little to be off, and the codes of a network may be of any size. What happens to a diffusion of codes with the
# standard deviation $\sigma_z$? Write $z_0=\sigma_zu$ with $u$ of size 1. Then
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
# Codes that are too large stay visible until late; codes that are too small drown in the first steps. With
# $\sigma_z=10$ the shift is 4.6, a factor of 100 in the ratio. And where a schedule ends with some signal left, as
# Stable Diffusion's does with $\bar\alpha_T=0.0047$, large codes are still there in $z_T$, and the pure noise that
# sampling starts from is not what the network was trained on.

# %% slide=["# Codes of another size have another schedule", "Codes of standard deviation $\\sigma_z$ shift the log signal-to-noise ratio of each step:", "(6.18)", "Large codes stay visible until late; small ones drown in the first steps.", "? $\\sigma_z=10$: by what factor does the ratio change?"]
torch.set_default_dtype(torch.float64)
diffusion = Diffusion(cosine_betas(1000))
u, eps = (torch.randn(diffusion.num_steps, 2, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
kept, sigma_z = diffusion.alpha_bar[:, None], 10.0  # (1000, 1)
total = kept * sigma_z**2 + 1 - kept
other = kept * sigma_z**2 / total  # alpha_bar' of each step
verify("6.17", q_sample(sigma_z * u, kept, eps), total.sqrt() * q_sample(u, other, eps), atol=1e-10)

# %%
log_ratio = (diffusion.alpha_bar / (1 - diffusion.alpha_bar)).log()
shifted = (other / (1 - other)).log()[:, 0]
inner = shifted.isfinite()
verify("6.18", shifted[inner], (log_ratio + 2 * math.log(sigma_z))[inner], atol=1e-6)

# %%
for sigma_z in (0.1, 1.0, 10.0):
    other = (log_ratio + 2 * math.log(sigma_z)).sigmoid()
    useful = ((other > 0.01) & (other < 0.99)).double().mean()
    print(f"std {sigma_z:4}: {useful:.0%} of the steps have between 1% and 99% of signal")

# %% [markdown]
# The remedy is one number, $s$ (no longer the encoder's width). Multiply the codes by it before the diffusion, divide
# before the decoder:
#
# $$\text{diffuse }\ s\,z,\qquad\text{decode }\ z=\frac{z_\text{drawn}}s,\qquad s=\frac1{\sigma_z}
# \tag{6.19, definition}$$
#
# $\sigma_z$ is measured once, over all numbers of a batch of codes, and kept for good: it belongs to the autoencoder.
# For Stable Diffusion's, $s=0.18215$: its codes have a standard deviation of 5.5.
#
# **Exercise 7.** Fill in `latent_scale`.


# %% tags=["export", "exercise"]
def latent_scale(latents):
    """The factor that gives latents the standard deviation 1: one number for all of them.

    Multiply by it before diffusion, divide by it before decoding.

    Args:
        latents: a batch of latents, (B, C, H, W).

    Returns:
        A scalar tensor, above 0: one over the standard deviation (with N - 1, as torch's std has it) of all
        numbers of the batch together. Infinite for latents that are all the same.

    Source: Rombach et al. 2022, appendix G (there with N, from the first batch).
    """
    ### BEGIN SOLUTION
    # s = 1 / sigma, over samples, channels and places alike
    return 1 / latents.std()
    ### END SOLUTION


# %% slide=["# One number mends it", "$$\\text{diffuse }\\ s\\,z,\\qquad\\text{decode }\\ z_\\text{drawn}/s,\\qquad s=1/\\sigma_z \\tag{6.19}$$", "[code latent_scale]", "Stable Diffusion's is 0.18215. Whoever forgets it gets no error message."]
check("vae.latent_scale", latent_scale)

# %%
torch.set_default_dtype(torch.float32)
scale = latent_scale(latents)
print(f"scale {scale:.2f}, on the card {metrics['latent_scale']:.2f}")
print(
    "standard deviation by channel",
    [round(s, 1) for s in latents.transpose(0, 1).flatten(1).std(dim=1).tolist()],
)
assert abs(scale / metrics["latent_scale"] - 1) < 0.1

# %% [markdown]
# Ours came out near 1, so that here one could forget it and notice little. With another autoencoder one could not.
#
# The same noise at the same step, on codes of three sizes, and decoded:

# %% slide=["# Without it: the same step, three sizes of codes", "[picture]", "Half-way: nothing is left, it is as it should be, and nothing has happened yet."]
step, sizes = 500, (0.1, 1.0, 10.0)
kept = diffusion.alpha_bar[step].float()
codes = scale * mean[:8]  # of standard deviation 1
noise = torch.randn(codes.shape, generator=torch.Generator().manual_seed(5))
noisy = [q_sample(size * codes, kept, noise) for size in sizes]
pictures = [vae.decode(z_t / (size * kept.sqrt()) / scale) for z_t, size in zip(noisy, sizes)]
figure = show_grid(torch.cat(pictures), row_titles=[f"std {size:g}" for size in sizes])
show(
    figure,
    "Three rows of eight pictures at the same step: only noise, noisy shapes, and shapes as good as clean.",
)

# %% [markdown]
# *Half-way through the schedule. At a tenth of the right size nothing is left of the picture; at ten times, nothing
# has happened yet.*
#
# How much does it harm? On the mixture of chapter 01 the denoiser is exact, so that only the steps can be at fault.
# The data are multiplied by a size, sampled by DDIM, and divided again; the energy distance to real data says how
# wrong the result is.

# %%
torch.set_default_dtype(torch.float64)
means, stds = torch.tensor([[-0.55, -0.35], [0.6, -0.3], [0.05, 0.6]]), torch.tensor([0.12, 0.10, 0.16])
shares = torch.tensor([0.5, 0.3, 0.2])
unit = 1 / GaussianMixture(shares, means, stds).sample(20_000, torch.Generator().manual_seed(0))[0].std()
truth, _ = GaussianMixture(shares, unit * means, unit * stds).sample(2000, torch.Generator().manual_seed(1))


def energy_distance(a, b):
    """2 E|a - b| - E|a - a'| - E|b - b'| of two samples, (N, D) and (M, D).

    Unlike chapter 01's it keeps the pairs of a point with itself: never below 0, but a little too large.
    """
    return (2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()).item()


def distance_at(size, steps):
    """How wrong samples are whose diffusion worked on data of a standard deviation, with so many steps."""
    short = diffusion.respace(steps)
    denoiser = exact_denoiser(GaussianMixture(shares, size * unit * means, size * unit * stds), short)
    drawn = sample(short, denoiser, truth.shape, ddim_step, torch.Generator().manual_seed(2), progress=False)
    return energy_distance(drawn / size, truth)


# %% slide=["# A factor of two does little, a factor of ten much", "[picture]", "With an exact denoiser only the steps can be at fault; fewer of them forgive less.", "# What to remember", "- The evidence is the bound, plus the divergence of the guess from the posterior.", "- $z=\\mu+\\sigma\\epsilon$ lets a gradient through a draw.", "- The KL weight is a price: what varies less is not coded.", "- Its rate is information plus mismatch. A second model learns where codes are.", "- Diffuse $s\\,z$, decode $z/s$."]
sizes = [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50]
figure, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
for steps, marker, colour in zip((10, 50), "os", colours):
    distances = {size: distance_at(size, steps) for size in sizes}
    axis.loglog(sizes, list(distances.values()), marker + "-", color=colour, label=f"{steps} steps")
    assert distances[1] < distances[0.1] / 2 and distances[1] < distances[10] / 2
again, _ = GaussianMixture(shares, unit * means, unit * stds).sample(2000, torch.Generator().manual_seed(3))
axis.axhline(energy_distance(again, truth), color="black", linestyle="--", label="real against real")
axis.set(xlabel="standard deviation of what is diffused", ylabel="energy distance")
axis.legend()
show(figure, "Two curves shaped like a U with their lowest points near a standard deviation of 1.")

# %% [markdown]
# *With the exact denoiser, a factor of two does little, a factor of ten much, in either direction, and fewer steps
# forgive less.*
#
# A network has further reasons. It sees inputs whose size changes along the way by up to $\sigma_z$, is trained at
# steps of which half teach next to nothing (see the percentages above), and its loss weights the noise levels in a way
# chosen for data of another size. Chapter 07 never clips codes, by the way: pixels end at $-1$ and 1, codes do not.

# %% [markdown] tags=["core"]
# ## Your code runs the model
#
# Save this notebook, call `make mine` in a terminal, and run the next cell: it draws with your functions, as at the
# [end of chapter 01](01_ddpm.ipynb), and says which of them were called. Your draw of the code stands between the
# encoder and the decoder, and your functions measure what the way through both costs.

# %% tags=["milestone", "nbval-ignore-output"]
from lecture26.kit.own_package import show_milestone

show_milestone(
    "milestone vae",
    alt="Two rows of eight scenes: images, and below each what comes out of the decoder, hardly to be told from it.",
)

# %% [markdown] tags=["core"]
# ## What the lecture's slide says
#
# Three steps of a workflow, and a remark.
#
# - *Operates in a compressed latent space rather than pixel space, for efficiency.* In numbers, ours is compressed by
#   12; whether that makes it cheaper by as much, chapter 07 measures. By its rate, 400 bytes against 12,288, it is
#   compressed by 30, and most of the rate is mismatch.
# - *Encoder: compresses images to latent representations (e.g. using a VAE).* It is a VAE by its loss, with a KL
#   weight so small that its own samples are noise; it serves as an autoencoder with well-behaved codes. What the
#   small weight still does: it keeps codes from growing without end, and gives each some width. Rombach et al. use a
#   weight of about $10^{-6}$, but against absolute errors and a perceptual loss, so that it cannot be compared with
#   ours; or they quantise the codes instead (VQ).
# - *Decoder: reconstructs high-resolution images from denoised latents.* It does, but no diffusion can bring back
#   what the encoder lost: the round trip is a ceiling for every sample, and is measured by more than PSNR. To look
#   sharp, large models add a perceptual and an adversarial loss to (6.10); ours, on flat shapes, does without.
# - The slide leaves out the scale between the stages, (6.19). Whoever forgets it gets no error message.

# %% [markdown] tags=["core"]
# ## Summary
#
# - $\log p(x)$ is the bound (6.4) plus the divergence of the guess from the posterior (6.3). The divergence from the
#   prior is (6.5), summed over the numbers of a code.
# - A draw becomes differentiable by $z=\mu+\sigma\epsilon$ (6.8). The other way is unbiased too, and
#   needs no slope of $f$, but is usually much noisier.
# - The KL weight is the variance of the errors that do not count (6.10), and a price: directions of less variance are
#   not coded (6.11). Too much, and the code collapses; too little, and, with a network, the prior may lose the
#   codes (6.14).
# - The rate is information plus mismatch (6.14). On $N$ pictures the information is at most $\ln N$ (6.15). Where the
#   rate is far above what *all* pictures could tell, as with our images, the prior misses the codes, and a second
#   model has to learn them.
# - PSNR says how much changed, not what: read the reconstructions.
# - Diffuse $s\,z$, decode $z/s$, with $s=1/\sigma_z$ (6.19); otherwise the schedule is another one (6.18).
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
# - Hoffman, Johnson 2016, *ELBO Surgery: Yet Another Way to Carve Up the Variational Evidence Lower Bound*.
# - Rombach, Blattmann, Lorenz, Esser, Ommer 2022, *High-Resolution Image Synthesis with Latent Diffusion Models*:
#   section 3.1, and the appendix on autoencoders (KL weight, scale).
