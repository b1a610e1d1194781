# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown] slide=["# Three questions, one course", "- **Guidance**: how does a model draw what was asked for?", "- **Latent diffusion**: how does that become cheap?", "- **Prompt tuning**: how does a large finished model learn new tasks, with few new parameters?", "Each chapter derives, proves with numbers, and builds from scratch.", "# After this hour you can", "- say which problem a diffusion model solves, and what noise is good for", "- find your way: what builds on what, what symbols mean", "- read the proof of an equation, and the verdict on an exercise"]
# # 00 Start here
#
# [Next: 01 DDPM](01_ddpm.ipynb)
#
# A diffusion model turns noise into images. This course is about making it draw what was asked for (*guidance*), making that
# cheap (*latent diffusion*), and adapting a large finished model to new tasks with few new parameters (*visual prompt
# tuning*). Each chapter derives equations, proves them with numbers, and builds the thing from scratch in PyTorch.
#
# **What you will be able to do after this chapter**
#
# - say which problem a diffusion model solves, and what the noise is good for;
# - find your way: what builds on what, what symbols mean, from where steps are counted;
# - read the proof of an equation and the verdict on an exercise.
#
# **What it takes**: 30 to 40 minutes of study; under 20 seconds to run, on two cores without GPU. Sections marked *(at a
# second reading)* can wait; the rest is core.
#
# **A `NameError` after a restart of the kernel?** What the cells above had made is gone. Click on the cell and choose *Run →
# Run All Above Selected Cell*, in any chapter.

# %%
import textwrap
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle
from torchvision.utils import save_image

from lecture26.checks import check
from lecture26.classifier_free_guidance import classifier_free_guided
from lecture26.ddpm import Diffusion, GaussianMixture, cosine_betas, ddim_step, exact_denoiser
from lecture26.kit.data import load
from lecture26.kit.figures import PALETTE, show, show_grid, show_table, use_style
from lecture26.kit.proof import verify
from lecture26.kit.shapes import HELD_OUT_PAIRS, Shapes
from lecture26.recipes import load_diffusion, load_model

use_style()

# %% [markdown] tags=["core"]
# ## Twelve red stars
#
# A network that was trained on small pictures of shapes, and comes with the course, draws twelve new ones. It is told 'star'
# and 'red', and starts from nothing but noise:


# %% slide=["# Twelve red stars, out of nothing but noise", "[picture]", "A small network was told 'star' and 'red'. None of its drawings is left out.", "# How many lines does that take?", "[code film_of: film = .. return]", "Begin with noise, take a step, and again. A whole course is about what happens inside of one step."]
@torch.no_grad()
def film_of(diffusion, denoiser, x_T):
    """Every picture on the way from noise x_T to images: a list of tensors like x_T, the noise first."""
    film = [x_T]
    for t in reversed(range(diffusion.num_steps)):
        film.append(ddim_step(diffusion, denoiser, film[-1], torch.full((len(x_T),), t), noise=None))
    return film


shapes = load("shapes")
words = [shapes.labels["shape"].index("star"), shapes.labels["colour"].index("red")]
wanted = torch.tensor(words).expand(12, 2)  # 12 pictures, 2 class numbers for each
anything = torch.tensor([8, 8]).expand(12, 2)  # the classes are 0 to 7, and 8 means 'not told'

network = load_model("conditional_ddpm_shapes32")
denoiser = classifier_free_guided(network, wanted, anything, w=0.5)  # chapter 05
every_step = load_diffusion("conditional_ddpm_shapes32")
few_steps = every_step.respace(25)  # 25 of the 1000 steps it was trained on

x_T = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
film = film_of(few_steps, denoiser, x_T)
show(
    show_grid(film[-1], columns=6, inches_per_image=1.3),
    "Twelve small pictures of red stars, large and small, on dark, light, striped and checkered ground.",
)

# %% [markdown]
# *Twelve drawings, none left out. Ask for a blue heart: change the two words and run the cell again.*
#
# How three of them came about:

# %% slide=["# A little noise less at each step", "[picture]", "Three of the stars on their way: pure noise at the left, a red blur, and the image."] tags=["draw"]
frames = [0, 8, 13, 17, 21, 25]  # of the film's 26
steps = [few_steps.steps[24 - frame].item() for frame in frames[:-1]]  # as code counts, from 999 down
titles = [f"paper t = {step + 1}\ncode t = {step}" for step in steps] + ["paper t = 0\nthe image"]
strip = torch.stack([film[frame][:3] for frame in frames], dim=1).flatten(0, 1)  # (3 * 6, 3, 32, 32)
figure = show_grid(strip, columns=6, titles=titles, inches_per_image=1.6)
figure.set_figheight(5.3)  # room for the titles
show(
    figure,
    "Three rows of six pictures: on the left pure noise, then a red blur under noise, on the right stars.",
)

# %% [markdown]
# *From noise to image, a little noise less at each step. Papers and code count steps differently (see below).*

# %% [markdown] tags=["core"]
# ## The problem, and why noise helps
#
# Given are **samples**, say photographs, from an unknown probability distribution $q$: a law that makes some images likely
# and nearly all others, which look like static, impossible. Wanted are *new* samples.
#
# One would like to start anywhere and move to where $q$ is large. But where there are no samples, nothing shows the way.
# Here a sample is a point in the plane, and $q$ has three islands:

# %% slide=["# The problem: samples are given, new ones wanted", "An unknown law $q$ makes some images likely, and nearly all others impossible.", "? Start anywhere, and move to where $q$ is large. What goes wrong?", "Where there are no samples, nothing shows the way."]
mixture = GaussianMixture(  # q, for once known: three normal distributions; a network would get points only
    weights=[0.5, 0.3, 0.2], means=[[-0.55, -0.35], [0.6, -0.3], [0.05, 0.6]], stds=[0.12, 0.10, 0.16]
)
plane = Diffusion(cosine_betas(1000))
plane_denoiser = exact_denoiser(mixture, plane)  # guesses the noise in x_t as well as anyone can
generator = torch.Generator().manual_seed(0)
given, _ = mixture.sample(300, generator)  # x_0, (300, 2)
noise = torch.randn(2, 300, 2, dtype=given.dtype, generator=generator)
drawn = film_of(plane.respace(25), plane_denoiser, noise[1])  # new points, on their way from noise


# %% slide=["# Noise fills the gaps, so there are examples on the whole way", "[picture]", "Above, noise spreads the samples; the arrows can be learned from them. Below, new points follow the arrows back.", "# That is the whole idea", "- Noise brings samples into the gaps.", "- From them a network, the **denoiser**, learns which noise was added.", "- With enough noise every data set looks like a normal distribution.", "- Draw from that, and walk back, a little less noise at a time."]
def plot_arrows(axis, t):
    """The way back, away from the guessed noise, wherever noisy samples are likely."""
    side = torch.linspace(-2, 2, 19, dtype=torch.float64)
    places = torch.cartesian_prod(side, side)  # (361, 2)
    places = places[mixture.log_prob(places, plane.alpha_bar[t]).exp() > 0.02]
    eps = plane_denoiser(places, torch.full((len(places),), t))
    way_back = -eps / eps.norm(dim=1, keepdim=True)  # the direction alone
    axis.quiver(*places.T, *way_back.T, angles="xy", scale_units="xy", scale=5, width=0.008)


frames = [25, 22, 18, 12, 0]  # the film backwards: from points of q to noise
figure, axes = plt.subplots(2, 5, figsize=(12, 5.2), layout="constrained", sharex=True, sharey=True)
for (above, below), frame in zip(axes.T, frames, strict=True):
    if frame == 25:
        above.scatter(*given.T, s=3, color=PALETTE["sky"])
        above.set_title("paper t = 0, no noise")
    else:
        t = plane.respace(25).steps[24 - frame].item()
        x_t = plane.q_sample(given, torch.full((300,), t), noise[0])
        above.scatter(*x_t.T, s=3, color=PALETTE["sky"])
        plot_arrows(above, t)
        above.set_title(f"paper t = {t + 1}")
    below.scatter(*drawn[frame].T, s=3, color=PALETTE["vermilion"])
    above.set(xlim=(-2.3, 2.3), ylim=(-2.3, 2.3), aspect="equal")
    below.set(aspect="equal")
axes[0, 0].set_ylabel("given samples:\nadd noise →", fontsize="large")
axes[1, 0].set_ylabel("new samples:\n← take noise away", fontsize="large")
show(
    figure,
    "Above, three clusters of points that noise spreads into one cloud, with arrows back to the clusters wherever "
    "points lie; below, other points that leave the same cloud and gather in three clusters.",
)

# %% [markdown]
# *Above, from left to right: noise spreads the samples until they fill the gaps between the islands. The arrows can be
# learned from them: which noise was probably added, and so the way back. Below, from right to left: new points start as pure
# noise and follow the arrows.*
#
# That is the whole idea. Noise fills the gaps, so that there are examples on the whole way from noise to data. From them a
# network, the **denoiser**, learns to guess the noise in a noisy sample. With enough noise every data set looks like a normal
# distribution: draw from that, and walk back, a little less noise at a time.

# %% [markdown] slide=["# The map: process, guidance, a smaller space, a frozen model", "| chapters | about |\n|---|---|\n| 01, 02 | the process on points, then a network for images |\n| 03, 04, 05 | guidance: by a classifier, by words, by the model itself |\n| 06, 07 | an autoencoder, and diffusion among its codes |\n| 08 | prompts for a frozen vision transformer |", "Chapters import what they need of earlier ones: begin anywhere."] tags=["core"]
# ## The map
#
# ![Map of the course: 00, 01 and 02 in a row; 02 leads to guidance (03, then 04 and 05) and to visual prompt
# tuning (08); 02 leads to the VAE (06); 04, 05 and 06 lead to latent diffusion (07); all lead to 09](../docs/map.png)
#
# *What builds on what.*
#
# Each chapter explains the words of its row. Time and memory are those of a run on one core, the milestone included:
#
# | chapter | what it derives and builds | builds on | time | peak memory |
# |---|---|---|---|---|
# | [00 Start here](00_start_here.ipynb) | first pictures, the problem, a self-test, notation, proofs and checks, data | | 10 s | 1.0 GB |
# | [01 DDPM](01_ddpm.ipynb) | forward process, posterior, bound and simple loss; noise, data or velocity as target; learned variance; DDPM and DDIM sampling; on a Gaussian mixture, where all is known | 00 | 26 s | 1.8 GB |
# | [02 The U-Net](02_unet.ipynb) | time embedding, residual block, attention, averaged weights; a DDPM of images | 01 | 79 s | 2.1 GB |
# | [03 Classifier guidance](03_classifier_guidance.ipynb) | Bayes' rule on scores, a classifier of noisy images, mean-shift and noise form, why a clean classifier fails | 02 | 75 s | 1.9 GB |
# | [04 CLIP guidance](04_clip_guidance.ipynb) | contrastive learning, a small CLIP, zero-shot classification, guidance by similarity | 03 | 64 s | 2.1 GB |
# | [05 Classifier-free guidance](05_classifier_free_guidance.ipynb) | implicit classifier, both conventions of the scale, what samplers draw, label dropout, negative prompts, intervals, autoguidance, what a distance has measured | 03 (04 to compare) | 92 s | 2.0 GB |
# | [06 VAE](06_vae.ipynb) | evidence lower bound, reparameterisation, an autoencoder with a KL term, the latent scale | 01, 02 | 85 s | 2.3 GB |
# | [07 Latent diffusion](07_latent_diffusion.ipynb) | cross-attention, text to image, image to image, inpainting; pixels against latents in compute, memory, time and quality | 04, 05, 06 | 74 s | 2.2 GB |
# | [08 Visual prompt tuning](08_visual_prompt_tuning.ipynb) | a vision transformer; prompts for a frozen one beside linear probe, biases and full fine-tuning; storage, forgetting, many tasks | 02 (attention) | 89 s | 2.7 GB |
# | [09 The slides, checked](09_the_slides_checked.ipynb) | a miniature Stable Diffusion; the lecture's numbers beside the papers' and our own; a real Stable Diffusion, medical images, a server of many tasks | all | 45 s | 2.1 GB |
#
# Chapters import what they need of earlier ones: begin anywhere.

# %% [markdown] slide=["# Are you ready? 1: the variance of a sum", "? $x$ and $\\epsilon$ are independent, of mean 0 and variances 0.5 and 1. What is the variance of $\\sqrt{0.6}\\,x+\\sqrt{0.4}\\,\\epsilon$?", "Factors are squared, variances add up: $0.6\\cdot0.5+0.4\\cdot1=0.7$.", "# 2: Bayes on two normals", "? $x\\sim\\mathcal N(0,1)$, and $y=x+\\epsilon$ with $\\epsilon\\sim\\mathcal N(0,1)$ was seen to be 2. How is $x$ distributed now?", "$$p(x\\mid y)\\ \\propto\\ e^{-x^2/2}\\,e^{-(2-x)^2/2}\\ \\propto\\ e^{-(x-1)^2}$$", "$\\mathcal N(1,\\tfrac12)$: half-way, and surer.", "# 3: the gradient of a log-density", "? What is $\\frac{d}{dx}\\log\\mathcal N(x;\\,m,\\sigma^2)$, and for $x=3$, $m=1$, $\\sigma=2$?", "$$-\\frac{x-m}{\\sigma^2}=-\\tfrac12$$", "It points to the mean. It is called the **score**, and all guidance is about it.", "# 4: a divergence", "? $\\mathrm{KL}(q\\,\\|\\,p)=\\mathbb E_q[\\log q-\\log p]$: what is it for $\\mathcal N(1,1)$ and $\\mathcal N(0,1)$? When is it zero?", "$$\\mathbb E_q\\bigl[\\tfrac12x^2-\\tfrac12(x-1)^2\\bigr]=\\mathbb E_q[x]-\\tfrac12=\\tfrac12$$", "Zero only if $q=p$.", "# 5: broadcasting", "? `factor` has shape (B,), `x` has shape (B, 3, 32, 32). What does `factor * x` do for B = 4, and for B = 32?", "Shapes are aligned at their *last* axes: an error, and a factor for each column of pixels.", "Meant is `factor[:, None, None, None] * x`.", "# 6: automatic differentiation", "? `f` maps images (B, C, H, W) to a number each. How do you get each number's gradient, in one call?", "Of the sum: other images' numbers do not depend on this image."] tags=["core"]
# ## Are you ready? A self-test
#
# Six questions, ten minutes, pencil and paper. Five right: go on. Fewer: read up where the answers point. MML is Deisenroth,
# Faisal, Ong, *Mathematics for Machine Learning*, free at [mml-book.com](https://mml-book.com).
#
# **1. Variance of a sum.** $x$ and $\epsilon$ are independent, with mean 0 and variances 0.5 and 1. What is the variance of
# $\sqrt{0.6}\,x+\sqrt{0.4}\,\epsilon$?
#
# <details>
# <summary>Answer</summary>
#
# Factors are squared, and variances of independent numbers add up: $0.6\cdot0.5+0.4\cdot1=0.7$. (MML 6.4)
#
# </details>
#
# **2. Bayes on two normals.** $x$ is drawn from $\mathcal N(0,1)$, the normal distribution with mean 0 and variance 1. You
# see $y=x+\epsilon$ with $\epsilon\sim\mathcal N(0,1)$, and it is 2. How is $x$ distributed now?
#
# <details>
# <summary>Answer</summary>
#
# $p(x\mid y)\propto p(x)\,p(y\mid x)\propto e^{-x^2/2}\,e^{-(2-x)^2/2}\propto e^{-(x-1)^2}$, which is
# $\mathcal N(1,\tfrac12)$. (MML 6.3, 6.5)
#
# </details>
#
# **3. Gradient of a log-density.** What is $\frac{d}{dx}\log\mathcal N(x;\,m,\sigma^2)$, and for $x=3$, $m=1$, $\sigma=2$?
#
# <details>
# <summary>Answer</summary>
#
# $-(x-m)/\sigma^2=-\tfrac12$: it points to the mean. It is called the *score*; the arrows above show its direction. (MML
# 5.2, 6.5)
#
# </details>
#
# **4. Divergence.** The Kullback-Leibler divergence $\mathrm{KL}(q\,\|\,p)=\mathbb E_q[\log q(x)-\log p(x)]$, a mean
# over $x$ from $q$, tells how badly $p$ stands in for $q$. What is it for $q=\mathcal N(1,1)$ and $p=\mathcal N(0,1)$? When is
# it zero?
#
# <details>
# <summary>Answer</summary>
#
# $\mathbb E_q[\tfrac12x^2-\tfrac12(x-1)^2]=\mathbb E_q[x]-\tfrac12=\tfrac12$. It is zero only if $q=p$. (Goodfellow, Bengio,
# Courville, [*Deep Learning*](https://www.deeplearningbook.org), 3.13)
#
# </details>
#
# **5. Broadcasting.** `factor` has shape (B,), one number per image; `x` has shape (B, 3, 32, 32). What does `factor * x`
# do for B = 4, what for B = 32, and how is it meant?
#
# <details>
# <summary>Answer</summary>
#
# Shapes are aligned at their *last* axes: 4 against 32 is an error; with 32, each column of pixels gets a factor instead of
# each image. ([Broadcasting semantics](https://pytorch.org/docs/stable/notes/broadcasting.html))
#
# ```python
# factor, x = torch.arange(32.0), torch.ones(32, 3, 32, 32)
# assert (factor * x)[5, 0, 0].tolist() == factor.tolist()
# assert (factor[:, None, None, None] * x)[5].unique() == 5  # as it is meant
# ```
#
# </details>
#
# **6. Automatic differentiation.** `f` maps images (B, C, H, W) to a number each, (B,). How do you get each number's gradient
# by its image, in one call?
#
# <details>
# <summary>Answer</summary>
#
# Of the sum: the other images' numbers do not depend on this image.
# ([Introduction to torch.autograd](https://pytorch.org/tutorials/beginner/blitz/autograd_tutorial.html))
#
# ```python
# x = torch.randn(4, 3, 8, 8, requires_grad=True)
# f = lambda x: (x**2).sum(dim=(1, 2, 3))
# (gradient,) = torch.autograd.grad(f(x).sum(), x)
# assert torch.allclose(gradient, 2 * x)
# ```
#
# </details>

# %% [markdown] slide=["# The one equation to begin with", "$$x_t=\\sqrt{\\bar\\alpha_t}\\,x_0+\\sqrt{1-\\bar\\alpha_t}\\;\\epsilon,\\qquad\\bar\\alpha_t=\\prod_{i=1}^{t}(1-\\beta_i) \\tag{0.1}$$", "- $x_0$ a clean image, $x_t$ a noisy one, $\\epsilon\\sim\\mathcal N(0,I)$ the noise", "- $\\beta_t$ the variance that a step adds, after shrinking by $\\sqrt{1-\\beta_t}$", "- $\\bar\\alpha_t$ the signal's share: from nearly 1 to nearly 0", "# Letters that mean several things", "| letter | here | elsewhere |\n|---|---|---|\n| $w$ | weight of guidance | `guidance_scale` is $1+w$ |\n| $s$ | scale of a gradient | weight of guidance in most libraries |\n| $v$ | velocity, a blend of noise and image | a learned variance; attention's values |\n| $\\alpha_t$ | $1-\\beta_t$ | the DDIM paper's is $\\bar\\alpha_t$ |"] tags=["core"]
# ## Notation
#
# Noise is mixed into an image $x_0$ over $T$ steps. Step $t$ multiplies what is there by $\sqrt{1-\beta_t}$ and adds noise of
# variance $\beta_t$; so of the signal's variance the share $\bar\alpha_t$ is left after it:
#
# $$x_t=\sqrt{\bar\alpha_t}\,x_0+\sqrt{1-\bar\alpha_t}\;\epsilon,\qquad
#   \bar\alpha_t=\prod_{i=1}^{t}(1-\beta_i),\qquad \epsilon\sim\mathcal N(0,I) \tag{0.1, definition}$$
#
# | symbol | in code | what it is |
# |---|---|---|
# | $q$ | | given: the distribution of the data, unknown, and the noising (0.1), chosen |
# | $p_\theta$ | `denoiser` | learned: the model of the way back, with parameters $\theta$ |
# | $x_0$, $x_t$, $x_T$ | `x_0`, `x_t`, `x_T` | a clean image, pixels in $[-1,1]$; after $t$ noisy steps; noise alone |
# | $\epsilon$, $\hat\epsilon$ | `eps`, `noise` | the noise in $x_t$, and a guess of it; a hat always marks a guess |
# | $\beta_t$, $\bar\alpha_t$ | `betas`, `alpha_bar` | as in (0.1); $\bar\alpha_t$ falls from nearly 1 to nearly 0 |
# | $\lambda_t$ | `log_snr` | logarithm of the signal-to-noise ratio (0.2); the lecture's $z_\lambda$ is $x_t$ at that ratio |
# | $\tilde\mu_t$, $\tilde\beta_t$ | `q_posterior` | mean and variance of $x_{t-1}$ when $x_t$ *and* $x_0$ are known (chapter 01) |
# | $\sigma_t^2$ | `variance` | variance of the fresh noise that sampling adds on the way to $x_{t-1}$ |
# | $\eta$ | `eta` | how much of it in DDIM's family: $\sigma_t=\eta\sqrt{\tilde\beta_t}$; 0 is DDIM, the sampling used above, 1 is DDPM with the smaller of its variances |
# | $s$ | `scale` | how strongly a classifier's or CLIP's gradient pulls (03, 04) |
# | $w$ | `w` | weight of classifier-free guidance, as its authors count it (05) |
#
# Some letters mean several things in the field. If nothing is said, the one in the middle is meant:
#
# | letter | here | elsewhere, and what we call that |
# |---|---|---|
# | $s$ | scale of a gradient | weight of classifier-free guidance in most libraries: `guidance_scale` $=1+w$; factor on latents: `latent_scale`; a component's standard deviation: $s_k$, `stds`; score: $\nabla\log q$ |
# | $v$ | velocity, a blend of noise and image that may be predicted instead of $\epsilon$ (01) | output for a learned variance, and a component's noisy variance $v_k$: only in 01; what attention reads: its *values*; bound of the first prompts: only in 08 |
# | $w$ | weight of guidance | $1+w$: `guidance_scale`; a network's weights: $\theta$; weights in the posterior's mean, $w_t$: only in 01 |
# | $\alpha_t$ | $1-\beta_t$ | the DDIM paper's $\alpha_t$: $\bar\alpha_t$ |
# | $\sigma$ | fresh noise of a sampling step | noise relative to signal: $\sqrt{(1-\bar\alpha_t)/\bar\alpha_t}$ |
# | $z$ | latent code (06, 07) | the lecture's $z_\lambda$: $x_t$; fresh noise: only in 01 |

# %% [markdown] tags=["core"]
# ## One rule: code counts from 0
#
# Papers count the steps $t=1,\dots,T$, and $t=0$ is the clean image. Python counts from 0. A step too many is hard to see in
# pictures, so there is one rule:
#
# $$\boxed{\;\text{code's } t \;=\; \text{papers' } t - 1\;}$$
#
# Equations, and prose about them, count as papers do. Code counts as Python does; so do step numbers on axes, in titles and
# in the text ('t = 500'), unless they say 'paper'. The clean image has no step in code, only the value $\bar\alpha_0=1$ in
# `alpha_bar_prev[0]`. For the network above:

# %% slide=["# One rule: code counts from 0", "$$\\boxed{\\;\\text{code's } t \\;=\\; \\text{papers' } t - 1\\;}$$", "[table]"]
rows = [[0, "none", "1", "the image"]]
for paper_t, what in {1: "hardly any noise", 500: "half noise", 1000: "pure noise"}.items():
    t = paper_t - 1  # the rule
    rows.append([paper_t, t, f"{every_step.alpha_bar[t]:.5f}", what])
show_table(rows, ["papers' $t$", "code's $t$", r"$\bar\alpha_t$", "what $x_t$ is"])
assert every_step.alpha_bar_prev[0] == 1
assert torch.equal(every_step.alpha_bar_prev[1:], every_step.alpha_bar[:-1])

# %% [markdown] tags=["core"]
# ## How an equation is proved
#
# An equation with a number is a definition, a step of a derivation, or a result. For each result a cell computes both sides in
# different ways and compares them. Take the log-SNR,
#
# $$\lambda_t=\log\frac{\bar\alpha_t}{1-\bar\alpha_t} \tag{0.2, definition}$$
#
# Solved for $\bar\alpha_t$, with $e^{\lambda_t}(1-\bar\alpha_t)=\bar\alpha_t$, it says
#
# $$\bar\alpha_t=\frac{1}{1+e^{-\lambda_t}} \tag{0.3}$$

# %% slide=["# How an equation is proved", "(0.3)", "[code]", "Both sides, computed in different ways. Where they differ, the notebook stops."]
alpha_bar = every_step.alpha_bar  # (T,)
log_snr = (alpha_bar / (1 - alpha_bar)).log()
verify("0.3", alpha_bar, 1 / (1 + (-log_snr).exp()), atol=1e-12)

# %% [markdown]
# Where the sides differ, the cell raises an error and the notebook stops. With $\sqrt{\bar\alpha_t}$ on the left:

# %% slide=["# A proof must be able to fail", "? With $\\sqrt{\\bar\\alpha_t}$ in the place of $\\bar\\alpha_t$: will it be noticed?", "[output]"]
try:
    verify("0.3", alpha_bar.sqrt(), 1 / (1 + (-log_snr).exp()), atol=1e-12)
except AssertionError as error:
    print(error)

# %% [markdown] tags=["core"]
# ## How exercises, checks and hints work
#
# An exercise is a small function whose body you write; the cell below it calls `check`. Chapter 01 asks for `q_sample`,
# which is equation (0.1). Before you have written anything:


# %%
def q_sample(x_0, alpha_bar, noise):
    """Draw x_t given x_0 in one step; all tensors broadcast against x_0."""
    ...  # your code instead of this line


check("ddpm.q_sample", q_sample)

# %% [markdown]
# A first try, wrong on purpose:


# %% slide=["# A check knows the mistakes that people make", "A first try, wrong on purpose:", "[code: return .. return]", "? What does the check say?", "It names the mistake, and where in the derivation to look. It does not give the line away."]
def q_sample(x_0, alpha_bar, noise):
    """Draw x_t given x_0 in one step; all tensors broadcast against x_0."""
    return alpha_bar * x_0 + (1 - alpha_bar).sqrt() * noise


check("ddpm.q_sample", q_sample)

# %% [markdown]
# A known mistake gives the same numbers; hence the hint. With `alpha_bar.sqrt() * x_0`, as the finished function of the
# package has it:

# %%
from lecture26.ddpm import q_sample

check("ddpm.q_sample", q_sample)

# %% [markdown]
# Whatever gives the right values passes. Go back to the first try and mend it, or drop the other root, swap the factors,
# let it crash.

# %% [markdown] slide=["# Your copies are yours: jump in anywhere", "- `make lab` makes copies that are yours.", "- Fill in a body, run its check, compare with the folded answer.", "- The next cell takes the finished function: the rest runs whatever you typed.", "- `make mine` builds a package of what you have solved."] tags=["core"]
# ## How to work
#
# `make lab` has put copies of the notebooks into `work/`. They are yours: no command writes over them. An exercise there has
# four cells:
#
# 1. the exercise, with `...` where your code goes;
# 2. its check;
# 3. the answer, folded;
# 4. the finished function from the package, so that the rest runs whatever you typed. To go on with your own, skip it.
#
# So you can **jump in** anywhere, with *Run All Above Selected Cell*.
#
# Exercises are formulas, algorithms of some lines, and questions to be answered before the next cell is run; each says how
# hard it is and how many minutes it takes. What you have solved is kept beside your copies, and shown at a chapter's end.
# `make update` brings new versions of chapters and carries your solutions over.
#
# **Your code runs the model.** Since each exercise is followed by the finished function, you would never see your own at
# work. Save your notebooks and call `make mine` in a terminal: it checks what you have solved, and builds a copy of the
# package, `build/mine`, in which each function that passes is yours. Two things run on it:
#
# - the *milestone* at the end of each chapter, a cell that draws with your functions and says which were called;
#   `make milestones` draws them all, on one page;
# - a whole notebook with `%env LECTURE26_MINE=build/mine` in its first cell, once its kernel has been restarted. What it
#   imports from earlier chapters, and takes as 'finished' in its own exercises, is then yours wherever you have solved it.
#
# What is open or wrong stays the course's, so both run at any time. When you have solved more, call `make mine` again.
#
# Cells tagged `export` make the package: what a notebook proves is the code that trains the models, on the [command
# line](../README.md#the-command-line).

# %% [markdown] tags=["core"]
# ## The data
#
# Most chapters train on images made by code: 8 shapes in 8 colours and 2 sizes on 4 backgrounds. All this is known, so one
# can *measure* whether a model drew what it was asked for.

# %% slide=["# The data: everything about them is known", "[picture]", "Framed pairs are held out of every training: is a blue star drawn as often as a red one?"] tags=["draw"]
indices = torch.arange(64)
attributes = {
    "shape": indices // 8,
    "colour": indices % 8,
    "size": torch.ones(64, dtype=torch.int64),  # large
    "background": (indices // 8 + indices) % 4,
}
images = shapes.render(attributes, indices)  # (64, 3, 32, 32)
figure = show_grid(images, titles=shapes.labels["colour"], row_titles=shapes.labels["shape"])
for shape, colour in HELD_OUT_PAIRS:
    row, column = shapes.labels["shape"].index(shape), shapes.labels["colour"].index(colour)
    border = Rectangle((-0.5, -0.5), 32, 32, fill=False, edgecolor=PALETTE["vermilion"], linewidth=9)
    figure.axes[8 * row + column].add_patch(border)
figure.set_size_inches(8.3, 7.6)  # room for the titles
show(figure, "All 64 pairs of a shape and a colour; eight of them, one in each row and column, are framed.")

# %% [markdown]
# *The eight framed pairs are **held out**: no training image shows them. A model that draws such pairs as often as those it has
# seen has learned shape and colour as two things.*

# %% slide=["# So one can measure whether a wish was granted", "[table]", "? Photographs have no such labels. How would you measure there?", "By a network that names what it sees (a *reader*). It errs, too; here its errors can be counted."]
sizes = [[split, f"{len(load('shapes', split)):,}"] for split in ("train", "validation", "test", "held_out")]
show_table(sizes, ["split", "images"])

seen = shapes.attributes(torch.arange(20_000))
pairs = set(zip(seen["shape"].tolist(), seen["colour"].tolist()))
print(f"pairs among the first 20,000 training images: {len(pairs)} of 64")

# %% [markdown]
# Every image has a caption:


# %% slide=["# Every image has a caption", "[picture]", "Shape, colour, size and background, in a language of some thirty words."]
def show_captioned(images, captions, width):
    """Show images in a row, each below its caption, broken into lines of so many letters."""
    titles = [textwrap.fill(caption, width) for caption in captions]
    figure = show_grid(images, columns=len(images), titles=titles, inches_per_image=10 / len(images))
    figure.set_figheight(figure.get_figheight() + 0.9)  # room for the titles
    return figure


indices = [23, 1, 33, 4, 26, 10]
figure = show_captioned(shapes.batch(indices)["image"], shapes.captions(indices), width=16)
show(figure, "Six images, each below its caption, such as: a large red star on a striped background.")

# %% [markdown] tags=["optional"]
# ## More data *(at a second reading)*
#
# **Scenes** (chapter 07) show two objects and their relation. 'A red star to the left of a blue ring' and 'a blue star to
# the left of a red ring' are made of the same words.

# %% slide=["# Scenes: the same words, another picture", "[picture]", "Two objects and their relation: words alone do not say which colour belongs to which shape."]
scenes = load("scenes")
indices = [0, 3, 5, 6]
figure = show_captioned(scenes.batch(indices)["image"], scenes.captions(indices), width=26)
show(figure, "Four scenes, each below its caption, such as: a small red square below a large blue triangle.")

# %% [markdown]
# **Real images**: digits come with scikit-learn; `mnist`, `fashion_mnist`, `cifar10` and `fgvc_aircraft` are downloaded on
# demand.

# %% slide=["# Real images, and your own", "[picture]", "Digits come along, MNIST and others are downloaded on demand, and any folder of images will do."]
digits = load("digits", image_size=32)  # 8 pixels wide as they come, here enlarged
batch = digits.batch(range(20))
figure = show_grid(batch["image"], columns=10)
show(figure, "Twenty handwritten digits, blurred since they have been enlarged from 8 to 32 pixels.")

# %% [markdown]
# **Your own images**: any folder, with one subfolder per class, or none.

# %%
with TemporaryDirectory() as temporary:
    folder = Path(temporary)
    for i, name in enumerate(["one", "two", "three"] * 4):
        (folder / name).mkdir(exist_ok=True)
        save_image(batch["image"][i], folder / name / f"{i}.png", normalize=True, value_range=(-1, 1))
    photos = load(folder, split="train", image_size=48)
    print(f"{len(photos)} of 12 for training; classes {photos.labels['class']}")
    print({name: tuple(values.shape) for name, values in photos.batch([0, 1, 2]).items()})

# %% [markdown]
# `batch(indices)` of any set gives images (B, C, H, W) in $[-1,1]$, and class numbers (B,) for each label.
#
# **The same numbers tomorrow**: an image of shapes is a function of (seed, split, index) and of nothing else.

# %%
alone = shapes.batch([5])["image"][0]
in_a_crowd = shapes.batch([3, 5, 1000])["image"][1]
other_seed = Shapes(split="train", seed=1).batch([5])["image"][0]
print("index 5, read twice, is the same:", torch.equal(alone, in_a_crowd))
print("index 5 of another seed is the same:", torch.equal(alone, other_seed))

# %% [markdown] slide=["# What to remember", "- Samples of an unknown $q$ are given, new ones wanted.", "- Learn to take noise away, and begin with pure noise.", "- Code's $t$ is the papers' $t-1$; `guidance_scale` is $1+w$."] tags=["core"]
# ## Summary
#
# - Samples of an unknown $q$ are given, new ones wanted: learn to take noise away, and begin with pure noise.
# - Code's $t$ is the papers' $t-1$; `guidance_scale` is $1+w$.
#
# ## References
#
# - Ho, Jain, Abbeel 2020, *Denoising Diffusion Probabilistic Models* (DDPM), equation 4.
# - Song, Meng, Ermon 2021, *Denoising Diffusion Implicit Models* (DDIM), for $\eta$.
# - Kingma, Salimans, Poole, Ho 2021, *Variational Diffusion Models*, section 3, for $\lambda_t$.
#
# [Next: 01 DDPM](01_ddpm.ipynb), where a diffusion model is derived and run on the three islands.
