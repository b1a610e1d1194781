# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 00 Start here
#
# A diffusion model turns noise into images. This course is about making it draw what was asked for (guidance by a
# classifier, by CLIP, and without a classifier), making that cheap (latent diffusion), and adapting a large
# frozen model to a new task with a handful of new parameters (visual prompt tuning). Each chapter derives its
# equations, proves them with numbers on the spot, and builds the thing from scratch in PyTorch.
#
# **What you will be able to do after this chapter**
#
# - find your way: what builds on what, what the symbols mean, from where steps are counted;
# - load each data set of the course, and any folder of images of your own;
# - read the two kinds of check: the proof of an equation, and the verdict on an exercise with its hint;
# - work through a chapter, start in its middle, and use its code elsewhere.
#
# **What it needs**: Python, and some acquaintance with PyTorch's tensors. **What it takes**: under a minute to
# run on two cores, and no network.

# %%
import textwrap
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from matplotlib.patches import Rectangle
from torchvision.utils import save_image

from lecture26.checks import check
from lecture26.ddpm import Diffusion, linear_betas
from lecture26.kit.data import load
from lecture26.kit.figures import PALETTE, show, show_grid, use_style
from lecture26.kit.proof import verify
from lecture26.kit.shapes import HELD_OUT_PAIRS, Shapes

use_style()

# %% [markdown]
# ## The map
#
# ![Map of the course: 00, 01 and 02 in a row; 02 leads to guidance (03, then 04 and 05) and to visual prompt
# tuning (08); 02 leads to the VAE (06); 04, 05 and 06 lead to latent diffusion (07); all lead to 09](../docs/map.png)
#
# *An arrow leads to a chapter from what it builds on. Filled boxes are here today; dashed ones are planned.*
#
# What each chapter derives and builds, on which it rests, and what a run of it takes on two cores without a GPU
# (`make course` measures this anew):
#
# | chapter | what it derives and builds | builds on | time | peak memory |
# |---|---|---|---|---|
# | [00 Start here](00_start_here.ipynb) | the map, the notation, the data, how proofs, checks and hints work | | 11 s | 0.9 GB |
# | [01 DDPM](01_ddpm.ipynb) | forward process and posterior, the bound and the simple loss, noise, data or velocity as what is predicted, learned variance, DDPM and DDIM sampling with all steps or few; all of it on a Gaussian mixture, where the right answer is known exactly | 00 | 26 s | 0.9 GB |
# | [02 The U-Net](02_unet.ipynb) | time embedding, residual block, attention, U-Net, averaged weights; a DDPM trained on images | 01 | 134 s | 1.2 GB |
# | [03 Classifier guidance](03_classifier_guidance.ipynb) | Bayes' rule on scores, a classifier of noisy images, the mean-shift form and the noise form, what a scale above 1 does, why a classifier of clean images fails | 02 | 87 s | 1.0 GB |
# | [04 CLIP guidance](04_clip_guidance.ipynb) | contrastive learning, a small CLIP, zero-shot classification, guidance by the similarity of image and text | 03 | 58 s | 1.2 GB |
# | [05 Classifier-free guidance](05_classifier_free_guidance.ipynb) | the implicit classifier, label dropout, both conventions of the scale, rescaling, intervals, negative prompts; the three guidances in one table | 03 (04 to compare) | 81 s | 1.1 GB |
# | [06 VAE](06_vae.ipynb) | the evidence lower bound, reparameterisation, an autoencoder of images with a KL term, the latent scale | 01, 02 | 90 s | 1.3 GB |
# | [07 Latent diffusion](07_latent_diffusion.ipynb) | into the latent space and out of it, cross-attention, text to image, where each word is looked at from, image to image, inpainting; pixels against latents in compute, memory, time and quality | 04, 05, 06 | 79 s | 1.4 GB |
# | [08 Visual prompt tuning](08_visual_prompt_tuning.ipynb) | a vision transformer taken apart, and what is wrong with a wrapper that runs; prompts for a frozen one, shallow and deep, beside a linear probe, biases and full fine-tuning; storage, forgetting, many tasks on one backbone | 02 (attention) | 67 s | 1.4 GB |
# | 09 The slides, checked | a miniature Stable Diffusion made of the finished parts; each number of the lecture beside the papers' and our own | all | planned | |

# %% [markdown]
# ## Notation
#
# Noise is mixed into an image $x_0$ over $T$ steps. Step $t$ adds noise of variance $\beta_t$; what is left of
# the signal's variance after it is $\bar\alpha_t$:
#
# $$x_t=\sqrt{\bar\alpha_t}\,x_0+\sqrt{1-\bar\alpha_t}\;\epsilon,\qquad
#   \bar\alpha_t=\prod_{s=1}^{t}(1-\beta_s),\qquad \epsilon\sim\mathcal N(0,I) \tag{0.1, definition}$$
#
# | symbol | in code | what it is |
# |---|---|---|
# | $x_0$ | `x_0` | a clean image, or a point of the mixture; pixels lie in $[-1,1]$ |
# | $x_t$ | `x_t` | the same with the noise of step $t$; $x_T$ is nothing but noise |
# | $\epsilon$ | `eps`, `noise` | the noise that went into $x_t$; $\hat\epsilon$ is a network's guess of it |
# | $\beta_t$ | `betas` | the variance of the noise that step $t$ adds |
# | $\bar\alpha_t$ | `alpha_bar` | what is left of the signal's variance at step $t$; from nearly 1 down to nearly 0 |
# | $\lambda_t$ | `log_snr` | $\log\bigl(\bar\alpha_t/(1-\bar\alpha_t)\bigr)$, the logarithm of the signal-to-noise ratio; the lecture's $z_\lambda$ is $x_t$ at that ratio |
# | $s$ | `scale` | a gradient scale: how strongly a classifier's or CLIP's gradient pulls (chapters 03 and 04) |
# | $w$ | `w` | the weight of classifier-free guidance as its authors count it (chapter 05); other libraries' `guidance_scale` is $1+w$ |

# %% [markdown]
# ### One rule: code counts from 0
#
# Papers count the steps $t=1,\dots,T$, and $t=0$ is the clean image. Python counts from 0. A step too many or too
# few is hard to see in the pictures, so there is one rule, in every chapter and every function:
#
# $$\boxed{\;\text{code's } t \;=\; \text{papers' } t - 1\;}$$
#
# Equations, and prose about them, count as the papers do. Code counts as Python does, and so do step numbers on axes,
# in titles and wherever the text quotes them ('t = 500'). Code step 0 is the first noisy level. The clean image has no
# step of its own, only the value $\bar\alpha_0=1$, which stands in `alpha_bar_prev[0]`.

# %%
diffusion = Diffusion(linear_betas(1000))
paper_steps = torch.tensor([1, 50, 150, 300, 500, 1000])
t = paper_steps - 1  # the rule
assert diffusion.alpha_bar_prev[0] == 1
assert torch.equal(diffusion.alpha_bar_prev[t[1:]], diffusion.alpha_bar[t[1:] - 1])

# %%
star = load("shapes").batch([23])["image"]  # (1, 3, 32, 32)
noise = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
x_t = diffusion.q_sample(star.expand(6, -1, -1, -1), t, noise)  # (6, 3, 32, 32)
titles = ["$x_0$"] + [f"paper t = {step}\ncode t = {step - 1}" for step in paper_steps]
figure = show_grid(torch.cat([star, x_t]), columns=7, titles=titles, inches_per_image=1.5)
figure.set_figheight(2.0)  # room for the titles
show(
    figure, "One image at seven noise levels, from clean to pure noise, with the papers' step and the code's."
)

# %% [markdown]
# *The forward process. Every network here is told the step of the image it is given: always the code's.*

# %% [markdown]
# ## The data
#
# ### Shapes
#
# Most chapters train on images that are made by code: one of 8 shapes in one of 8 colours and 2 sizes, on one of
# 4 backgrounds. All four attributes are known, so one can *measure* whether a model drew what it was asked for.

# %%
shapes = load("shapes", split="train")
print(f"{len(shapes):,} images, {shapes.channels} channels, {shapes.image_size} pixels")
for name, classes in shapes.labels.items():
    print(f"{name}: {', '.join(classes)}")

# %%
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
    frame = Rectangle((-0.5, -0.5), 32, 32, fill=False, edgecolor=PALETTE["vermilion"], linewidth=9)
    figure.axes[8 * row + column].add_patch(frame)
figure.set_size_inches(8.3, 7.6)  # room for the titles
show(figure, "All 64 pairs of a shape and a colour; eight of them, one in each row and column, are framed.")

# %% [markdown]
# *All pairs of shape and colour. The eight framed ones are **held out**: no training image shows them. A model
# that has seen red stars and blue circles, but never a blue star, and draws a blue star when asked for one, has
# learned shape and colour as two things. One that has learned the 56 pairs by heart cannot. The split `held_out`
# shows nothing but these pairs.*

# %%
for split in ("train", "validation", "test", "held_out"):
    print(f"{split}: {len(load('shapes', split)):,} images")

seen = shapes.attributes(torch.arange(20_000))
pairs = set(zip(seen["shape"].tolist(), seen["colour"].tolist()))
print(f"pairs among the first 20,000 training images: {len(pairs)} of 64")

# %% [markdown]
# Every image has a caption, for the chapters in which text decides what is drawn:


# %%
def show_captioned(images, captions, width):
    """Show images in a row, each below its caption, broken into lines of so many letters."""
    titles = [textwrap.fill(caption, width) for caption in captions]
    figure = show_grid(images, columns=len(images), titles=titles, inches_per_image=10 / len(images))
    figure.set_figheight(figure.get_figheight() + 0.9)  # room for the titles
    return figure


indices = [23, 1, 33, 4, 26, 10]
figure = show_captioned(shapes.batch(indices)["image"], shapes.captions(indices), width=16)
show(figure, "Six images of shapes with their captions.")

# %% [markdown]
# ### Scenes
#
# Two objects and their relation, at 64 pixels. Now a caption has to be read as a sentence: 'a red star to the
# left of a blue ring' and 'a blue star to the left of a red ring' are made of the same words.

# %%
scenes = load("scenes")
indices = [0, 3, 5, 6]
figure = show_captioned(scenes.batch(indices)["image"], scenes.captions(indices), width=26)
show(figure, "Four scenes of two objects with their captions.")

# %% [markdown]
# ### Real images
#
# Handwritten digits come with scikit-learn, so they need no network. `mnist`, `fashion_mnist`, `cifar10` and
# `fgvc_aircraft` are downloaded to `data/downloads` when they are first asked for.

# %%
digits = load("digits", image_size=32)  # 8 pixels wide as they come, here enlarged
batch = digits.batch(range(20))
figure = show_grid(batch["image"], columns=10)
show(figure, "Twenty handwritten digits, blurred since they have been enlarged from 8 to 32 pixels.")

# %% [markdown]
# And any folder of images: one folder per class, or no classes at all. Here is one with 12 PNG files:

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
# Whatever the set, `batch(indices)` gives a dict: images (B, C, H, W) in $[-1,1]$, and for each label one tensor
# (B,) of class numbers. A folder that has no validation or test images of its own gives a tenth of its images to
# each, chosen by a hash of their names: a photograph added tomorrow moves none of today's from training to test.
#
# ### The same numbers tomorrow
#
# An image of shapes is a function of (seed, split, index) and of nothing else: neither of the order in which
# images are read, nor of how many processes read them.

# %%
alone = shapes.batch([5])["image"][0]
in_a_crowd = shapes.batch([3, 5, 1000])["image"][1]
other_seed = Shapes(split="train", seed=1).batch([5])["image"][0]
print("index 5, read twice, is the same:", torch.equal(alone, in_a_crowd))
print("index 5 of another seed is the same:", torch.equal(alone, other_seed))

# %% [markdown]
# All other randomness is seeded: that of data, steps and noise by generators which are handed along, that of first
# weights by `torch.manual_seed`. For a GPU too the noise is drawn on the processor and then moved. So a GPU starts from
# the very noise that a laptop starts from, and the results agree up to rounding. No chapter asks for a GPU; the command
# line takes one that is there, NVIDIA's or Apple's.

# %%
device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
x_t_there = diffusion.q_sample(star.to(device), t[:1].to(device), noise[:1].to(device))
assert torch.allclose(x_t_there.cpu(), x_t[:1], atol=1e-5)

# %% [markdown]
# ## How an equation is proved
#
# An equation with a number either defines something, or is a step of a derivation, or states a result. Each
# result has a cell that computes both of its sides in different ways and compares them. Take the log-SNR,
#
# $$\lambda_t=\log\frac{\bar\alpha_t}{1-\bar\alpha_t} \tag{0.2, definition}$$
#
# Solved for $\bar\alpha_t$, with $e^{\lambda_t}(1-\bar\alpha_t)=\bar\alpha_t$, it says
#
# $$\bar\alpha_t=\frac{1}{1+e^{-\lambda_t}} \tag{0.3}$$

# %%
alpha_bar = diffusion.alpha_bar  # (T,)
log_snr = (alpha_bar / (1 - alpha_bar)).log()
verify("0.3", alpha_bar, log_snr.sigmoid(), atol=1e-12)

# %% [markdown]
# What if somebody had written $\sqrt{\bar\alpha_t}$ on the left? Then the cell raises an error, the notebook
# stops there, and the tests of the course fail. Here the error is caught, to be looked at:

# %%
try:
    verify("0.3", alpha_bar.sqrt(), log_snr.sigmoid(), atol=1e-12)
except AssertionError as error:
    print(error)

# %% [markdown]
# One more, since the two ways of counting the weight of classifier-free guidance are easily mixed up. Let
# $\hat\epsilon_c$ be a network's guess of the noise when it is told what to draw, and $\hat\epsilon_u$ the guess
# when it is not. The lecture's form with $w$ is the other libraries' form with $1+w$:
#
# $$(1+w)\,\hat\epsilon_c-w\,\hat\epsilon_u=\hat\epsilon_u+(1+w)\,(\hat\epsilon_c-\hat\epsilon_u) \tag{0.4}$$

# %%
generator = torch.Generator().manual_seed(1)
eps_c, eps_u = torch.randn(2, 4, 3, 8, 8, dtype=torch.float64, generator=generator)
w = 3.0
guidance_scale = 1 + w
verify("0.4", (1 + w) * eps_c - w * eps_u, eps_u + guidance_scale * (eps_c - eps_u), atol=1e-12)

# %% [markdown]
# ## How exercises, checks and hints work
#
# An exercise is a small function whose body you write; the cell below it calls `check`. Chapter 01 asks for
# `q_sample`, which is equation (0.1). Before you have written anything:


# %%
def q_sample(x_0, alpha_bar, noise):
    """Draw x_t given x_0 in one step; all tensors broadcast against x_0."""
    ...  # your code instead of this line


check("ddpm.q_sample", q_sample)

# %% [markdown]
# Now a first try, wrong on purpose:


# %%
def q_sample(x_0, alpha_bar, noise):
    """Draw x_t given x_0 in one step; all tensors broadcast against x_0."""
    return alpha_bar * x_0 + (1 - alpha_bar).sqrt() * noise


check("ddpm.q_sample", q_sample)

# %% [markdown]
# The check ran the function on cases of several shapes, schedules and number types. It was wrong there, so the check
# compared its outputs with those of mistakes that are often made, and one of them gave the same numbers. Hence the
# hint, and the place in the derivation to look at. With the root:


# %%
def q_sample(x_0, alpha_bar, noise):
    """Draw x_t given x_0 in one step; all tensors broadcast against x_0."""
    # x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps
    return alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise


check("ddpm.q_sample", q_sample)

# %% [markdown]
# However you write it: what gives the right values, in the right shape and number type and with its gradient,
# passes. A mistake that is not on the list gets no name, but a sentence on what is off. Go back and try: drop the
# other root, swap the two factors, return a NumPy array, or let it crash.
#
# ## How to work
#
# `make lab` has put a copy of each notebook into `work/`. They are yours: git ignores them, and no command writes
# over one that is there. In a copy, four cells follow each other at each exercise:
#
# 1. the exercise, with `...` where your code goes;
# 2. its check;
# 3. the answer, folded (click on it);
# 4. a cell tagged `finished`, which takes the finished function from the package, so that the rest of the chapter
#    runs whatever you typed. To go on with a function of your own, skip that cell.
#
# A folded answer looks like this:
#
# <details>
# <summary>Answer</summary>
#
# ```python
#     # x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps
#     return alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise
# ```
#
# </details>
#
# The fourth cell also lets you **jump in** anywhere: click on the section you want and choose *Run → Run All
# Above Selected Cell*; what it needs is then there, whether or not you have solved the exercises. The same holds
# between chapters: each imports what it needs of the earlier ones from the package, so you may start with chapter
# 02 if you know what 01 says.
#
# ### From notebook to package
#
# Chapters make modules: the cells tagged `export`, finished exercises included, are put together into
# `lecture26/ddpm.py`, `lecture26/unet.py` and so on. What a notebook proves is therefore the very code that
# trains the models and that you can import elsewhere. A `finished` cell is no more than this:

# %%
from lecture26.ddpm import q_sample

# %%
check("ddpm.q_sample", q_sample)

# %% [markdown]
# The models are trained, sampled and measured on the command line:
#
# ```bash
# python -m lecture26 checkpoints                                            # the trained models that are there
# python -m lecture26 sample --model ddpm_shapes32 --out grid.png            # draw images
# python -m lecture26 train ddpm --data ./photos --name my_photos            # train on a folder of images
# ```
#
# Where things are kept:
#
# | folder | what is in it |
# |---|---|
# | `notebooks/` | the chapters: `.py` is the source, `.ipynb` the same with its outputs |
# | `work/` | your copies |
# | `lecture26/` | the package: a module for each chapter; `kit` (data, training loop, figures), `recipes` (what to train and how), `studies` (what is measured), `commands` and `checks` by hand |
# | `data/checkpoints/` | trained models, each with a card: how it was made, how good it is, its hash |
# | `data/results/` | long measurements, each with the command that made it |
# | `data/downloads/` | data sets that were downloaded |
#
# ## Summary
#
# - Code's $t$ is the papers' $t-1$; $w$ is the authors' weight, `guidance_scale` is $1+w$.
# - Images lie in $[-1,1]$ and come by index; those of shapes depend on seed, split and index alone.
# - `verify` stops the notebook where an equation does not hold; `check` says what is wrong with a solution.
# - Answers are folded below each check, and nothing depends on having solved an exercise.
#
# Next: [chapter 01](01_ddpm.ipynb), where a diffusion model is derived and run on a distribution about which
# everything is known.
#
# ## References
#
# - Ho, Jain, Abbeel 2020, *Denoising Diffusion Probabilistic Models*, equation 4, for (0.1).
# - Kingma, Salimans, Poole, Ho 2021, *Variational Diffusion Models*, section 3, for the log-SNR.
# - Ho, Salimans 2022, *Classifier-Free Diffusion Guidance*, equation 6, for the form with $w$ in (0.4).
