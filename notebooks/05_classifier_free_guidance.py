# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown] slide=["# One network, asked twice", "? What is the noise in this image, given that it shows a red star? And given nothing?", "The difference of the two answers is a classifier's gradient.", "It can be made longer: **classifier-free guidance**.", "# What you can do afterwards", "- derive the guidance from Bayes' rule", "- translate between the two ways to count its strength", "- train one network that answers with a label and without", "- wrap any conditional denoiser, for any sampler", "- say what a large weight does to pictures, and what helps"]
# # 05 Classifier-free guidance: two answers of one network
#
# Chapters 03 and 04 steered a finished model by the gradient of a second network, which had to be trained on noisy
# images and differentiated at every step. This chapter needs neither. It trains one denoiser that can be asked twice:
# what is the noise in this image, *given that it shows a red star*? And what is it, *given nothing*? The difference of
# the two answers is a classifier's gradient, and it can be made longer.
#
# **What you will be able to do**
#
# - derive the guidance from Bayes' rule, and say which scale of chapter 03 a weight $w$ is;
# - translate between the two conventions that libraries and papers use, and know which one is which;
# - train a network that answers with a label and without one, and say what it converges to;
# - wrap any conditional denoiser, so that every sampler takes it as it is, at one forward pass a step;
# - explain what a large weight does to pictures, and what rescaling, an interval, or a negative prompt does about it;
# - choose between classifier, CLIP and classifier-free guidance by what each needs, costs and gives.
#
# **What it needs**: chapter 01 (scores, both samplers, the Gaussian mixture), chapter 02 (the U-Net and its label
# tables), chapter 03 (Bayes' rule on scores), and for the comparison chapter 04. **What it takes**: one to one and a half
# minutes on two cores. All data are embedded. Sections marked *(at a second reading)* can wait.

# %%
from functools import partial

import matplotlib.pyplot as plt

from lecture26.checks import check
from lecture26.classifier_guidance import classifier_guided, exact_classifier, guided_eps, log_prob_gradient
from lecture26.clip_guidance import clip_guided
from lecture26.ddpm import (
    Diffusion,
    ddim_step,
    ddpm_step,
    linear_betas,
    sample,
)
from lecture26.kit.checkpoints import load_card
from lecture26.kit.data import load
from lecture26.kit.evaluation import attribute_accuracy, read
from lecture26.kit.figures import PALETTE, show, show_grid, use_style
from lecture26.kit.proof import verify
from lecture26.kit.results import load_results
from lecture26.kit.training import train
from lecture26.recipes import find_recipe, load_diffusion, load_model
from lecture26.recipes.recipe import begin_with

use_style()
colours = list(PALETTE.values())

# %% [markdown]
# Cells like the next one become the module `lecture26.classifier_free_guidance`; the others stay in the notebook.

# %% tags=["export"]
import torch

from lecture26.ddpm import GaussianMixture, at_least_float32, exact_denoiser

# %% [markdown]
# The first half of the chapter proves things, and computes in double precision.

# %%
torch.set_default_dtype(torch.float64)

# %% [markdown] tags=["core"]
# ## The classifier that was there already
#
# Chapter 03 began with Bayes' rule, and read it from right to left: an unconditional score and a classifier's gradient
# make a conditional score, (3.1). Suppose it is the *conditional* score that we have, and the unconditional one as
# well. Then the same line says what the classifier's gradient is:
#
# $$\nabla_{x_t}\log q(y\mid x_t)=\nabla_{x_t}\log q(x_t\mid y)-\nabla_{x_t}\log q(x_t)$$
#
# No classifier was trained; two denoisers contain one. It is called the **implicit classifier**. In terms of noise,
# with (1.18) for both scores, $\mathbb E[\epsilon\mid x_t]=-\sqrt{1-\bar\alpha_t}\,\nabla\log q(x_t)$:
#
# $$\nabla_{x_t}\log q(y\mid x_t)
# =-\frac{\mathbb E[\epsilon\mid x_t,y]-\mathbb E[\epsilon\mid x_t]}{\sqrt{1-\bar\alpha_t}} \tag{5.1}$$
#
# With numbers, at the point of chapter 03: class 2 of the mixture is the upper one, and at the origin, halfway to
# noise, its score points up, and that of all classes together hardly anywhere.

# %% slide=["# Bayes' rule, asked the other way round", "Chapter 03: an unconditional score and a classifier make a conditional score.", "$$\\nabla\\log q(x_t\\mid y)=\\nabla\\log q(x_t)+\\nabla\\log q(y\\mid x_t)$$", "? Now we have both scores, and no classifier. What do we know?", "$$\\nabla\\log q(y\\mid x_t)=\\nabla\\log q(x_t\\mid y)-\\nabla\\log q(x_t)$$"]
mixture = GaussianMixture(
    weights=[0.5, 0.3, 0.2], means=[[-0.55, -0.35], [0.6, -0.3], [0.05, 0.6]], stds=[0.12, 0.10, 0.16]
)
y = 2  # the class we want: the upper one, and the rarest
alone = GaussianMixture([1.0], mixture.means[[y]], mixture.stds[[y]])  # q(x_0 | y)
point, kept = torch.zeros(1, 2), torch.tensor(0.5)  # x_t and alpha_bar_t
noises = {
    name: -(1 - kept).sqrt() * m.score(point, kept)[0] for name, m in {"y": alone, "nothing": mixture}.items()
}
for given, eps in noises.items():
    print(f"expected noise given {given:8}", [round(e, 2) for e in eps.tolist()])

# %% [markdown] slide=["# Two denoisers contain a classifier", "A denoiser is a score in another unit: $\\mathbb E[\\epsilon\\mid x_t]=-\\sqrt{1-\\bar\\alpha_t}\\,\\nabla\\log q(x_t)$. So", "(5.1)", "Nobody trained this **implicit classifier**."]
# **Exercise 1.** Fill in `implicit_gradient`.


# %% slide=["# In code it is one line", "[code implicit_gradient]", "On the mixture it agrees with the exact classifier, differentiated by autograd."] tags=["export", "exercise"]
def implicit_gradient(eps_cond, eps_uncond, alpha_bar):
    """The gradient of the classifier that a conditional and an unconditional denoiser contain.

    Args:
        eps_cond: predicted noise given the class, (B, ...).
        eps_uncond: predicted noise given nothing, like eps_cond.
        alpha_bar: at each sample's step, broadcastable to eps_cond, in (0, 1).

    Returns:
        The gradient of log p(y | x_t) with respect to x_t, like eps_cond.

    Source: Ho and Salimans 2022, section 3.2.
    """
    ### BEGIN SOLUTION
    # grad log p(y | x_t) = -(eps_c - eps_u) / sqrt(1 - alpha_bar_t)
    return (eps_uncond - eps_cond) / (1 - alpha_bar).sqrt()
    ### END SOLUTION


# %%
check("classifier_free_guidance.implicit_gradient", implicit_gradient)

# %% [markdown]
# For the proof, a denoiser of the kind that this chapter is about: it takes $x_t$, the step, and a **condition**. On
# the mixture it can be exact. The condition is the number of a component; one number more, the **null label**, stands
# for 'nothing is said'.


# %% tags=["export"]
def exact_conditional_denoiser(mixture, diffusion):
    """The conditional denoiser that a perfectly trained network would be, for data from a Gaussian mixture.

    Args:
        mixture: a GaussianMixture of K components, which are the classes.
        diffusion: the Diffusion it is made for, with a fixed variance; respaced or not.

    Returns:
        denoiser(x_t (B, D), t (B,), cond (B,)) -> (B, D), cond being integers in [0, K]; K means no label.

    Source: Efron 2011, equation 1.4 (Tweedie's formula), for each component and for all together.
    """
    parts = [
        GaussianMixture([1.0], m[None], s[None]) for m, s in zip(mixture.means, mixture.stds, strict=True)
    ]
    denoisers = [exact_denoiser(part, diffusion) for part in [*parts, mixture]]

    def denoiser(x_t, t, cond):
        outputs = torch.stack([each(x_t, t) for each in denoisers], dim=1)  # (B, K + 1, D)
        return outputs[torch.arange(len(cond), device=cond.device), cond.long()]

    return denoiser


# %% [markdown]
# One side of (5.1) comes from its two answers, the other from chapter 03: the exact classifier, differentiated.

# %%
diffusion = Diffusion(linear_betas(200))
denoiser, classifier = exact_conditional_denoiser(mixture, diffusion), exact_classifier(mixture, diffusion)
generator = torch.Generator().manual_seed(0)
x_t, t = torch.randn(64, 2, generator=generator), torch.randint(200, (64,), generator=generator)
classes, null = torch.randint(3, (64,), generator=generator), torch.full((64,), 3)
alpha_bar = diffusion.alpha_bar[t, None]  # (64, 1)
eps_c, eps_u = denoiser(x_t, t, classes), denoiser(x_t, t, null)
gradient = log_prob_gradient(classifier, x_t, t, classes)
verify("5.1", implicit_gradient(eps_c, eps_u, alpha_bar), gradient, atol=1e-9)

# %% [markdown] tags=["core"]
# ## Longer than Bayes' rule
#
# Now steer, as in chapter 03, but by this gradient. The course's name for the result comes first:
#
# $$\tilde\epsilon=(1+w)\,\epsilon_c-w\,\epsilon_u,\qquad
# \epsilon_c=\hat\epsilon(x_t,t,y),\quad\epsilon_u=\hat\epsilon(x_t,t,\varnothing) \tag{5.2, definition}$$
#
# This is **classifier-free guidance**, with Ho and Salimans' weight $w$; the lecture's slide has the same line, with
# $z_\lambda$ for $x_t$. Read it as a walk on the straight line through both answers: $w=-1$ is the unconditional one,
# $w=0$ the conditional one, and $w>0$ goes on past it. In the example above:

# %% slide=["# Guidance walks on through both answers", "(5.2)", "- $w=-1$: the unconditional answer", "- $w=0$: the conditional answer", "- $w>0$: past it, away from the unconditional one"]
for w in (-1.0, -0.5, 0.0, 1.0, 3.0):
    mixed = (1 + w) * noises["y"] - w * noises["nothing"]
    print(f"w = {w:4}:", [round(e, 2) for e in mixed.tolist()])

# %% [markdown]
# **Exercise 2.** Fill in `cfg_combine`.


# %% slide=["# All of it, in one line", "[code cfg_combine]", "Whatever else this chapter has is about what goes in, and what comes out."] tags=["export", "exercise"]
def cfg_combine(eps_cond, eps_uncond, w):
    """Mix a conditional and an unconditional prediction: classifier-free guidance.

    Args:
        eps_cond, eps_uncond: predictions given the condition and without it, (B, ...): of noise, of x_0 or
            of v.
        w: the weight, a number: -1 is the unconditional prediction, 0 the conditional one, above 0 guided.

    Returns:
        The guided prediction, like eps_cond.

    Source: Ho and Salimans 2022, equation 6.
    """
    ### BEGIN SOLUTION
    # (1 + w) eps_c - w eps_u
    return (1 + w) * eps_cond - w * eps_uncond
    ### END SOLUTION


# %%
check("classifier_free_guidance.cfg_combine", cfg_combine)

# %% [markdown] slide=["# A weight $w$ is a scale $1+w$ of chapter 03", "Sort by the difference of the answers, and put (5.1) in:", "$$\\tilde\\epsilon=\\epsilon_u+(1+w)(\\epsilon_c-\\epsilon_u)$$", "(5.3)", "Seen from the *conditional* model the scale is $w$. The two numbers count from different ends.", "# The density behind it is sharper than the class", "$$\\begin{aligned}-\\frac{\\tilde\\epsilon}{\\sqrt{1-\\bar\\alpha_t}}&=(1+w)\\nabla\\log q(x_t\\mid y)-w\\nabla\\log q(x_t)\\\\&=\\nabla_{x_t}\\log\\bigl[q(x_t\\mid y)\\;q(y\\mid x_t)^{w}\\bigr]\\end{aligned} \\tag{5.4}$$", "A sum of scores is a product of densities. At $w=0$ it is the class itself."]
# Which scale of chapter 03 is that? Sort by the difference, $\tilde\epsilon=\epsilon_u+(1+w)(\epsilon_c-\epsilon_u)$,
# and put (5.1) in: the difference is $-\sqrt{1-\bar\alpha_t}$ times the classifier's gradient. So
#
# $$\tilde\epsilon=\epsilon_u-s\,\sqrt{1-\bar\alpha_t}\;\nabla_{x_t}\log q(y\mid x_t),\qquad s=1+w \tag{5.3}$$
#
# This is (3.4) with a scale $s=1+w$: classifier guidance of the *unconditional* model. Seen from the conditional
# model it is $\epsilon_c-w\sqrt{1-\bar\alpha_t}\,\nabla\log q(y\mid x_t)$, guidance with a scale $w$ of a model that
# knows the class already. The two numbers differ by one because they count from different ends.
#
# And in words of densities: divide (5.2) by $-\sqrt{1-\bar\alpha_t}$ to get the score that it stands for. A sum of
# scores belongs to a product of densities,
#
# $$-\frac{\tilde\epsilon}{\sqrt{1-\bar\alpha_t}}=(1+w)\nabla\log q(x_t\mid y)-w\nabla\log q(x_t)
# =\nabla_{x_t}\log\bigl[q(x_t\mid y)\;q(y\mid x_t)^{w}\bigr] \tag{5.4}$$
#
# since $q(x_t\mid y)/q(x_t)$ is $q(y\mid x_t)$ up to the constant $q(y)$.

# %%
weights = (-1.0, -0.5, 0.0, 1.0, 3.0)
mixed = torch.stack([cfg_combine(eps_c, eps_u, w) for w in weights])  # (5, 64, 2)
by_classifier = torch.stack([guided_eps(eps_u, gradient, alpha_bar, 1 + w) for w in weights])
verify("5.3", mixed, by_classifier, atol=1e-9)

# %%
points = x_t.clone().requires_grad_()
log_joint = mixture.joint_log_density(points, alpha_bar).gather(1, classes[:, None])[:, 0]  # log q(x_t, y)
log_class = log_joint - mixture.weights[classes].log()  # log q(x_t | y)
log_guess = log_joint - mixture.log_prob(points, alpha_bar)  # log q(y | x_t)
scores = [
    torch.autograd.grad((log_class + w * log_guess).sum(), points, retain_graph=True)[0] for w in weights
]
verify("5.4", -mixed / (1 - alpha_bar).sqrt(), torch.stack(scores), atol=1e-9)

# %% slide=["# All weights lie on one straight line", "[picture]", "The tips of the arrows lie on the line through the unconditional score, $w=-1$, and the conditional one, $w=0$."]
spot = torch.tensor([[0.35, 0.1]])
score_c, score_u = alone.score(spot, kept)[0], mixture.score(spot, kept)[0]
noisy, labels = mixture.sample(1500, torch.Generator().manual_seed(1))
noisy = kept.sqrt() * noisy + (1 - kept).sqrt() * torch.randn(noisy.shape, generator=generator)
figure, axis = plt.subplots(figsize=(6.5, 4.6), layout="constrained")
for k in range(3):
    axis.scatter(*noisy[labels == k].T, s=2, color=colours[1] if k == y else "lightgrey", alpha=0.5)
for w, colour in zip((-1.0, 0.0, 1.0, 3.0), (colours[0], colours[2], colours[4], colours[6])):
    arrow = ((1 + w) * score_c - w * score_u) / 2.5
    axis.annotate("", spot[0] + arrow, spot[0], arrowprops={"arrowstyle": "->", "color": colour, "lw": 2})
    axis.text(*(spot[0] + arrow + torch.tensor([0.07, 0.0])), f"w = {w:g}", color=colour, va="center")
axis.set(aspect="equal", xlim=(-1.6, 1.6), ylim=(-1.5, 1.9))
show(figure, "Four arrows from one noisy point, with their tips on a straight line: w = -1, 0, 1 and 3.")

# %% [markdown]
# *Noisy points at $\bar\alpha_t=0.5$, those of the class wanted in colour, and the guided score at one point. All
# tips lie on the line through the unconditional arrow ($w=-1$) and the conditional one ($w=0$).*

# %% [markdown] tags=["core"]
# ## Two ways to count
#
# Half of the literature writes the same line from the other end:
#
# $$\tilde\epsilon=\epsilon_u+s\,(\epsilon_c-\epsilon_u)=(1+w)\,\epsilon_c-w\,\epsilon_u\quad\text{for}\quad s=1+w \tag{5.5}$$
#
# with $s$ called the **guidance scale**. Neither is wrong, but a number without its convention says little: 'guidance
# 1' is Bayes' rule in the one, and twice the classifier in the other.
#
# | where | the number is | conditional at | unconditional at |
# |---|---|---|---|
# | Ho and Salimans 2022; the lecture; this course's `w` and `--w` | $w$ | 0 | -1 |
# | `diffusers.guiders.ClassifierFreeGuidance(use_original_formulation=True)` | $w$ | 0 | -1 |
# | GLIDE (Nichol et al. 2022, section 2.3) | $s$ | 1 | 0 |
# | Imagen (Saharia et al. 2022, equation 2), which calls it $w$ | $s$ | 1 | 0 |
# | Stable Diffusion's own code (`--scale`, `unconditional_guidance_scale`) | $s$ | 1 | 0 |
# | diffusers' pipelines (`guidance_scale`) | $s$ | 1 and all below | never |
# | `diffusers.guiders.ClassifierFreeGuidance` as it comes | $s$ | 1 | 0 |
# | Kynkäänniemi et al. 2024 (the interval, below), which call it $w$ | $s$ | 1 | 0 |
#
# So the usual 7.5 of Stable Diffusion is $w=6.5$. Mind the row of the pipelines: they ask the network a second time
# only if `guidance_scale` is above 1. Who sets it to 0, to see the unconditional model, gets the *conditional* one,
# without a word.
#
# **Exercise 3.** Fill in `combine_by_guidance_scale`, in the other convention. It is there for comparison; the course
# counts in $w$.


# %% tags=["export", "exercise"]
def combine_by_guidance_scale(eps_cond, eps_uncond, guidance_scale):
    """Mix a conditional and an unconditional prediction, in the convention of most libraries.

    Args:
        eps_cond, eps_uncond: predictions given the condition and without it, (B, ...).
        guidance_scale: s = 1 + w, a number: 0 is the unconditional prediction, 1 the conditional one.

    Returns:
        The guided prediction, like eps_cond.

    Source: Nichol et al. 2022, section 2.3; Saharia et al. 2022, equation 2.
    """
    ### BEGIN SOLUTION
    # eps_u + s (eps_c - eps_u)
    return eps_uncond + guidance_scale * (eps_cond - eps_uncond)
    ### END SOLUTION


# %% slide=["# Two ways to count the same thing", "$$\\tilde\\epsilon=\\epsilon_u+s\\,(\\epsilon_c-\\epsilon_u)=(1+w)\\,\\epsilon_c-w\\,\\epsilon_u,\\qquad s=1+w \\tag{5.5}$$", "| | number | conditional | unconditional |\n|---|---|---|---|\n| Ho and Salimans; this course | $w$ | 0 | -1 |\n| GLIDE, Imagen, Stable Diffusion | $s$ | 1 | 0 |\n| pipelines of diffusers | $s$ | 1 and below | never |", "# A number without its convention says little", "? Stable Diffusion's usual 7.5: which $w$ is that?", "$w=6.5$.", "? And `guidance_scale=0` in a pipeline of diffusers?", "The *conditional* model, without a word: the network is asked twice only above 1."]
check("classifier_free_guidance.combine_by_guidance_scale", combine_by_guidance_scale)

# %%
by_scale = torch.stack([combine_by_guidance_scale(eps_c, eps_u, 1 + w) for w in weights])
verify("5.5", by_scale, mixed, atol=1e-12)

# %% [markdown]
# The course's tests hold both functions against diffusers' guider, in both of its formulations.
#
# ### Noise, data or velocity
#
# Chapter 03 needed to know what the denoiser predicts, because a score had to be translated. Here nothing has to be.
# Given $x_t$, the predicted $x_0$ and $v$ are each of the form $a\,x_t+b\,\epsilon$ with numbers $a$ and $b$ that
# belong to the step, (1.22) and (1.44). Mix two of them:
# $(1+w)(a\,x_t+b\,\epsilon_c)-w(a\,x_t+b\,\epsilon_u)=a\,x_t+b\,\tilde\epsilon$, because the weights $1+w$ and $-w$
# add up to 1. So whatever is predicted may be mixed as it is:
#
# $$\hat x_0(\tilde\epsilon)=(1+w)\,\hat x_0(\epsilon_c)-w\,\hat x_0(\epsilon_u),\qquad
# v(\tilde\epsilon)=(1+w)\,v(\epsilon_c)-w\,v(\epsilon_u) \tag{5.6}$$
#
# That ends with the first thing that is not linear. Clipping $\hat x_0$ to $[-1,1]$ comes after the mixing, in the
# step, and a mixture of two clipped predictions would be something else. And variance channels, where a network has
# them, are no prediction of the noise: they are not mixed, and the conditional ones are kept.

# %% slide=["# Noise, data or velocity: any prediction may be mixed", "Given $x_t$, each is of the form $a\\,x_t+b\\,\\epsilon$, and $1+w$ and $-w$ add up to 1.", "$$\\begin{aligned}\\hat x_0(\\tilde\\epsilon)&=(1+w)\\,\\hat x_0(\\epsilon_c)-w\\,\\hat x_0(\\epsilon_u)\\\\v(\\tilde\\epsilon)&=(1+w)\\,v(\\epsilon_c)-w\\,v(\\epsilon_u)\\end{aligned} \\tag{5.6}$$", "Clipping is not linear: it comes after the mixing."]
w = 3.0
for_x_0, for_v = (partial(convert, x_t, t) for convert in (diffusion.x_0_from_eps, diffusion.v_from_eps))
guided = cfg_combine(eps_c, eps_u, w)
converted = torch.stack([for_x_0(guided), for_v(guided)])
mixed_there = torch.stack([cfg_combine(convert(eps_c), convert(eps_u), w) for convert in (for_x_0, for_v)])
verify("5.6", converted, mixed_there, atol=1e-8)

# %% [markdown] tags=["core"]
# ## A guided denoiser is a denoiser
#
# The wrapper does what those of chapters 03 and 04 did: in comes a denoiser, here a conditional one, and out comes a
# callable of $x_t$ and $t$ that any sampler takes. It asks for both answers in **one** forward pass, of a batch twice
# as long: $x_t$ twice, $t$ twice, the conditions followed by the null conditions. Both halves see the same $x_t$;
# fresh noise for the second one would compare answers to two different questions.
#
# A condition is a tensor, or a dict of tensors for networks that take several things (text and its mask, in
# chapter 07), the samples along the first axis. What stands for 'nothing' is the network's business, so it is passed
# in, too. `rescale` and `interval` belong to two sections below, where their functions are.


# %% tags=["export"]
def stacked_conditions(cond, null_cond, batch):
    """Put two conditions of a batch behind each other, after checking that they fit.

    Args:
        cond, null_cond: tensors, or dicts of tensors with the same keys, batch first.
        batch: B, the number of samples.

    Returns:
        A tensor, or a dict of them, whose first axis is 2 B long: cond, then null_cond.

    Raises:
        TypeError: if one of them is neither a tensor nor a dict of tensors, or they are not both the same.
        ValueError: if keys or shapes differ, or the first axis is not B long.
    """
    if isinstance(cond, dict) and isinstance(null_cond, dict):
        if cond.keys() != null_cond.keys():
            raise ValueError(f"null_cond must have the keys of cond, {sorted(cond)}; got {sorted(null_cond)}")
        return {name: stacked_conditions(cond[name], null_cond[name], batch) for name in cond}
    if not (isinstance(cond, torch.Tensor) and isinstance(null_cond, torch.Tensor)):
        raise TypeError(
            "cond and null_cond must both be tensors, or dicts of tensors; "
            f"got {type(cond).__name__} and {type(null_cond).__name__}"
        )
    if cond.shape[:1] != (batch,):
        raise ValueError(
            f"cond must hold one row for each of {batch} sample(s); got shape {tuple(cond.shape)}"
        )
    if null_cond.shape != cond.shape:
        raise ValueError(
            f"null_cond must have the shape of cond, {tuple(cond.shape)}; got {tuple(null_cond.shape)}"
        )
    return torch.cat([cond, null_cond])


# %% [markdown] slide=["# A guided denoiser is a denoiser", "[code classifier_free_guided: outputs = .. output_cond, output_null]", "- Both answers come from one forward pass, of a batch twice as long.", "- Both see the same $x_t$.", "- The sampler knows nothing of it."]
# Where nothing is to be guided, at $w=0$ or outside of the interval, the second half would be thrown away. Then the
# network is asked for the conditional answer only, which costs half as much and is exact to the last bit.


# %% tags=["export"]
def classifier_free_guided(denoiser, cond, null_cond, w, rescale=0.0, interval=None):
    """A denoiser that mixes a conditional network's answers with a condition and without it.

    Both answers come from one forward pass, of a batch twice as long.

    Args:
        denoiser: callable (x_t, t, cond) -> output, (B, C, ...), or (B, 2 C, ...) with variance channels
            last. These are not mixed: the conditional ones are kept.
        cond: the condition of each sample, a tensor or a dict of tensors, batch first.
        null_cond: what stands for no condition, like cond; for a negative prompt, what is not wanted.
        w: the weight, a number: -1 gives the unconditional prediction, 0 the conditional one.
        rescale: phi, how much of the conditional output's standard deviation is restored, in [0, 1]. It works
            in the space of the network's output, be it noise, x_0 or v.
        interval: (first, last), the steps of the original schedule at which to guide, both included; at the
            others the conditional prediction is returned. None guides at all steps.

    Returns:
        Callable (x_t, t) -> output, like denoiser's.

    Raises:
        TypeError: if cond or null_cond is neither a tensor nor a dict of tensors.
        ValueError: if rescale or interval is out of range; when called, if the conditions do not fit.

    Source: Ho and Salimans 2022, algorithm 2; Lin et al. 2024, section 3.4; Kynkaanniemi et al. 2024.
    """
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale must lie in [0, 1]; got {rescale}")
    if interval is not None and (len(interval) != 2 or interval[0] > interval[1]):
        raise ValueError(f"interval must be (first, last) with first <= last, or None; got {interval}")

    def guided(x_t, t):
        both_conds = stacked_conditions(cond, null_cond, len(x_t))
        steps = t.long()  # smaller integers would wrap the interval's ends round
        is_idle = interval is not None and not ((steps >= interval[0]) & (steps <= interval[1])).any()
        if w == 0 or is_idle:
            return denoiser(x_t, t, cond)
        outputs = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both_conds)  # (2 B, C or 2 C, ...)
        output_cond, output_null = outputs.chunk(2)
        channels = x_t.shape[1]
        # the difference is multiplied, and so would be what half precision rounds
        cond_part, null_part = (
            output[:, :channels].to(at_least_float32(output.dtype)) for output in (output_cond, output_null)
        )
        mixed = cfg_combine(cond_part, null_part, w)
        if rescale:
            mixed = rescaled(mixed, cond_part, rescale)
        if interval is not None:
            mixed = within_interval(mixed, cond_part, steps, *interval)
        return torch.cat([mixed.to(outputs.dtype), output_cond[:, channels:]], dim=1)

    return guided


# %% [markdown] slide=["# With exact networks, it is classifier guidance, path for path", "(5.7)", "For every sampler and any number of steps, from the same noise.", "? So what can be different with trained networks?", "Only their errors. And two answers of one network have their errors in common."]
# For an exact denoiser, (5.3) holds at every $x_t$. So the whole path of guided sampling is that of chapter 03, from
# the same noise, for any sampler, with any number of steps:
#
# $$x_t^{\text{classifier-free},\,w}=x_t^{\text{classifier},\,s=1+w}\quad\text{for all }t \tag{5.7}$$


# %%
def path(step, denoiser, x_T, diffusion=diffusion):
    """All x_t on the way from x_T to x_0, (T + 1, B, D)."""
    visited = [x_T]

    def recording_step(*arguments):
        visited.append(step(*arguments))
        return visited[-1]

    source = torch.Generator().manual_seed(4)
    sample(diffusion, denoiser, x_T.shape, recording_step, source, x_T, progress=False)
    return torch.stack(visited)


steps = {"DDPM": ddpm_step, "DDIM": ddim_step}
x_T = torch.randn(400, 2, generator=torch.Generator().manual_seed(5))
wanted, nothing = torch.full((400,), y), torch.full((400,), 3)

# %%
paths = {}
for name, step in steps.items():
    for w in (-1.0, 0.0, 1.0, 4.0):
        paths[name, w] = path(step, classifier_free_guided(denoiser, wanted, nothing, w), x_T)
unconditional = partial(denoiser, cond=nothing)
by_classifier = [
    path(step, classifier_guided(unconditional, classifier, wanted, 1 + w, diffusion), x_T)
    for step in steps.values()
    for w in (0.0, 1.0, 4.0)
]
classifier_free = [paths[name, w] for name in steps for w in (0.0, 1.0, 4.0)]
verify("5.7", torch.stack(classifier_free), torch.stack(by_classifier), atol=1e-6)

# %% slide=["# Above 0, samples leave the class", "[picture]", "At $w=0$ they are the upper class. Above it they move on, away from the others, and crowd."]
figure, axes = plt.subplots(1, 4, figsize=(13, 3.6), sharex=True, sharey=True, layout="constrained")
data = mixture.sample(800, torch.Generator().manual_seed(1))[0]
for axis, w in zip(axes, (-1.0, 0.0, 1.0, 4.0)):
    axis.scatter(*data.T, s=2, color="lightgrey")
    for name, colour in zip(steps, colours):
        axis.scatter(*paths[name, w][-1].T, s=4, color=colour, label=name, alpha=0.6)
    axis.set(title=f"w = {w:g}", aspect="equal", xlim=(-1.4, 1.4), ylim=(-1.2, 1.9))
axes[0].legend(loc="upper left")
show(
    figure,
    "Samples at four weights: all classes at -1, class 2 at 0, beyond it and closer together at 1 and 4.",
)

# %% [markdown]
# *400 samples of either sampler (data in grey). At $w=-1$ they are data of all classes, at $w=0$ of the upper class.
# Above 0 they move on, away from the other two classes; DDIM's farther than DDPM's, and they crowd.*

# %%
for w in (0.0, 1.0, 4.0):
    ends = {name: paths[name, w][-1] for name in steps}
    print(
        f"w = {w:g}: "
        + ", ".join(
            f"{n} height {e[:, 1].mean():.2f}, spread {e.std(dim=0).mean():.2f}" for n, e in ends.items()
        )
    )

# %% [markdown] tags=["optional"]
# ## What a weight above 0 draws *(at a second reading)*
#
# Chapter 03 has shown what a scale above 1 draws, and by (5.7) the same holds here: not the tilted density (3.13). At
# each level the guided field is the score of $q(x_t\mid y)\,q(y\mid x_t)^w$, (5.4), but these are not the noisy
# versions of one distribution; so the outcome depends on the sampler, and goes farther than the tilted density does.
#
# There is one case in which everything can be solved by hand, and it shows what a weight does to pictures. Let both
# the class and all data together be normal, of the same width: $\mathcal N(\mu_c,\sigma^2I)$ and $\mathcal
# N(\mu_u,\sigma^2I)$. Their noisy versions have the same width too, $v_t=\bar\alpha_t\sigma^2+1-\bar\alpha_t$, and
# the score of a normal is linear in its mean. So the mixture of the scores is
#
# $$(1+w)\,\frac{\sqrt{\bar\alpha_t}\,\mu_c-x_t}{v_t}-w\,\frac{\sqrt{\bar\alpha_t}\,\mu_u-x_t}{v_t}
# =\frac{\sqrt{\bar\alpha_t}\,\mu_w-x_t}{v_t},\qquad\mu_w=\mu_c+w\,(\mu_c-\mu_u) \tag{5.8}$$
#
# at every level the score of one and the same normal, $\mathcal N(\mu_w,\sigma^2I)$. Sampling draws it, whatever the
# sampler. Its mean is the class's mean, moved away from the mean of everything by $w$ times their distance. If red
# pictures are redder than the average by 0.5, then at $w=3$ they come out redder than the average by 2, in units in
# which a pixel has no more than 1. This is **over-saturation**, and it is no failure of the network.

# %% slide=["# Two normals: guidance moves the mean", "Class $\\mathcal N(\\mu_c,\\sigma^2I)$, all data $\\mathcal N(\\mu_u,\\sigma^2I)$. The mixture of scores, at every level:", "$$\\begin{aligned}&(1+w)\\,\\frac{\\sqrt{\\bar\\alpha_t}\\,\\mu_c-x_t}{v_t}-w\\,\\frac{\\sqrt{\\bar\\alpha_t}\\,\\mu_u-x_t}{v_t}=\\frac{\\sqrt{\\bar\\alpha_t}\\,\\mu_w-x_t}{v_t}\\\\&\\mu_w=\\mu_c+w\\,(\\mu_c-\\mu_u)\\end{aligned} \\tag{5.8}$$", "# Over-saturation is no failure of the network", "? Red pictures are redder than the average by 0.5. How much redder are they at $w=3$?", "By 2: $\\mu_w-\\mu_u=(1+w)(\\mu_c-\\mu_u)$.", "A pixel has no more than 1. The network is exact, and the picture is glaring."]
grid = torch.Generator().manual_seed(7)
mu_c, mu_u, sigma, w = 0.3 * torch.randn(64, generator=grid), 0.1 * torch.randn(64, generator=grid), 0.2, 3.0
normals = {"c": mu_c, "u": mu_u, "w": mu_c + w * (mu_c - mu_u)}
normals = {name: GaussianMixture([1.0], mu[None], [sigma]) for name, mu in normals.items()}
exact = {name: exact_denoiser(single, diffusion) for name, single in normals.items()}


def two_normals(x_t, t, cond):
    """The exact conditional denoiser of the two normals: cond 0 is the class, 1 is everything."""
    return torch.where(cond[:, None] == 0, exact["c"](x_t, t), exact["u"](x_t, t))


# %%
start = torch.randn(50, 64, generator=grid)
zero, one = torch.zeros(50, dtype=torch.long), torch.ones(50, dtype=torch.long)
guided_ends, normal_ends = [], []
for step in steps.values():
    guided_ends.append(path(step, classifier_free_guided(two_normals, zero, one, w), start)[-1])
    normal_ends.append(path(step, exact["w"], start)[-1])
verify("5.8", torch.stack(guided_ends), torch.stack(normal_ends), atol=1e-7)

# %% [markdown]
# Where the widths differ, or the data are a mixture, the pushes depend on where one is, and nothing that simple holds.
# The direction remains: away from the average, and closer together.

# %% [markdown] tags=["core"]
# ## One network for both answers
#
# Two networks could give the two answers. One is cheaper, and its two answers have their errors in common, which
# partly cancel in the difference. So train the conditional denoiser, and in some of the training samples take the
# label away: with probability $p$, $y$ is replaced by the **null label** $\varnothing$, a class more, with a row of
# its own in the table. What does it converge to?
#
# Let $c$ be what the network is told: $y$ with probability $1-p$, $\varnothing$ with probability $p$, by a coin that
# knows nothing of $x_0$, $\epsilon$, $t$ and $y$. The loss is
#
# $$L(f)=\mathbb E\,\|\epsilon-f(x_t,t,c)\|^2
# =(1-p)\;\mathbb E\,\|\epsilon-f(x_t,t,y)\|^2+p\;\mathbb E\,\|\epsilon-f(x_t,t,\varnothing)\|^2 \tag{5.9, step}$$
#
# In the first part only the values of $f$ at real labels occur, in the second only those at $\varnothing$: a function
# that is free to take any values can minimise each by itself, and the factors $1-p$ and $p$ do not matter. A squared
# error is smallest at the conditional expectation, (1.16); in the second part nothing is given but $x_t$. So the
# minimiser is
#
# $$f^*(x_t,t,y)=\mathbb E[\epsilon\mid x_t,y],\qquad f^*(x_t,t,\varnothing)=\mathbb E[\epsilon\mid x_t] \tag{5.10}$$
#
# for every $p$ between 0 and 1: both denoisers, exactly. (With $p=0$ the null row is never trained, and its answers are
# arbitrary.) A real network is not free to take any values, and gets $p$ of its training for the one and $1-p$ for
# the other answer: $p$ says where its errors go. Ho and Salimans tried 0.1, 0.2 and 0.5, and found 0.5 worse.
#
# For the proof, minimise (5.9). Take two overlapping classes on a line, one noise level, nine values of $x_t$. On a
# fine grid of $x_0$ the expectation is a sum with known weights, $q(x_t,x_0,y)$, and the unknown is a table, nine
# values for each of $y=0$, $y=1$ and $\varnothing$. The loss is quadratic in the table, so a single Newton step from
# anywhere lands in its minimum.

# %% slide=["# One network gives both answers", "In training, replace the label by the **null label** $\\varnothing$ with probability $p$:", "$$\\begin{aligned}L(f)&=\\mathbb E\\,\\|\\epsilon-f(x_t,t,c)\\|^2\\\\&=(1-p)\\;\\mathbb E\\,\\|\\epsilon-f(x_t,t,y)\\|^2+p\\;\\mathbb E\\,\\|\\epsilon-f(x_t,t,\\varnothing)\\|^2\\end{aligned} \\tag{5.9}$$", "Each part of the loss meets other inputs, and can be minimised by itself.", "# It converges to both denoisers, for every $p$", "A squared error is smallest at the conditional expectation:", "(5.10)", "? Then why does $p$ matter at all?", "A real network has finite capacity and time: $p$ says where its errors go. Usual: 0.1 to 0.2."]
line = GaussianMixture([0.7, 0.3], [[-0.5], [0.6]], [0.3, 0.2])
kept, spots = torch.tensor(0.5), torch.linspace(-1.5, 1.5, 9)  # alpha_bar_t, and x_t
fine = torch.linspace(-4, 4, 2001)  # x_0
noise = (spots[:, None] - kept.sqrt() * fine) / (1 - kept).sqrt()  # eps that leads from x_0 to x_t, (9, 2001)
joint = torch.exp(
    line.joint_log_density(fine[:, None]) - 0.5 * noise[:, :, None] ** 2
)  # q(x_t, x_0, y), (9, 2001, 2)
joint = joint / joint.sum()


def dropout_loss(table, p):
    """The expected loss (5.9) of a table (9, 3) of predictions, its last column for the null label."""
    given_y = (noise[:, :, None] - table[:, None, :2]) ** 2  # (9, 2001, 2)
    given_nothing = (noise[:, :, None] - table[:, None, 2:]) ** 2  # (9, 2001, 1)
    return ((1 - p) * joint * given_y).sum() + (p * joint * given_nothing).sum()


# %%
def newton_step(p):
    """The minimum of the dropout loss, from a table of zeros."""
    loss, table = partial(dropout_loss, p=p), torch.zeros(9, 3)
    slope = torch.autograd.functional.jacobian(loss, table).flatten()  # (27,)
    curvature = torch.autograd.functional.hessian(loss, table).view(27, 27)
    return (table.flatten() - torch.linalg.solve(curvature, slope)).view(9, 3)


at_level = Diffusion(1 - kept[None])  # a single step, with this alpha_bar
expected = exact_conditional_denoiser(line, at_level)
told = torch.arange(3).repeat(9)  # 0, 1, nothing, for each of the nine points
exact_table = expected(spots.repeat_interleave(3)[:, None], torch.zeros(27, dtype=torch.long), told).view(
    9, 3
)
minima = torch.stack([newton_step(p) for p in (0.1, 0.5)])
verify("5.10", minima, exact_table.expand(2, 9, 3), atol=1e-7)

# %% slide=["# The minimum is where the expectations are", "[picture]", "Dots: the table that minimises the loss. Lines: the exact expectations, one for each label and for none."]
curve_at = torch.linspace(-1.7, 1.7, 200)[:, None]
figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
for c, (name, colour) in enumerate(zip(("y = 0", "y = 1", r"$\varnothing$"), colours)):
    there = torch.zeros(200, dtype=torch.long)
    axis.plot(curve_at, expected(curve_at, there, torch.full((200,), c)), color=colour, label=name)
    axis.plot(spots, minima[0, :, c], "o", color=colour)
axis.set(xlabel="$x_t$", ylabel="predicted noise")
axis.legend()
show(
    figure,
    "Three curves of predicted noise over x_t, for both labels and for none, and dots on each of them.",
)

# %% [markdown]
# *Dots: the table that minimises the loss with label dropout, $p=0.1$. Lines: the exact expectations. The null column
# (green) goes from the one class's line to the other's, as the one or the other becomes more probable.*
#
# ### Dropping labels
#
# In code the coin is a uniform number $u$ for each sample, and the label goes where $u<p$. A sample may have several
# labels, a shape and a colour; then all of them go together, so that the null condition is one, 'nothing is said',
# and not one for each subset. (A network that shall be asked for 'anything red' would need them dropped one by one.)
# The null label of each is one more than its last class: index `num_classes`, never class 0, which is a class.
#
# **Exercise 4.** Fill in `labels_after_dropout`. It gets the draws, so that it can be checked.


# %% slide=["# Dropping labels takes two lines", "[code labels_after_dropout]", "- All labels of a sample go together.", "- The null label is a class more, never class 0.", "- In training only: a sampler that drops labels draws what nobody asked for."] tags=["export", "exercise"]
def labels_after_dropout(y, null_label, u, p):
    """Replace the labels of the samples whose draw falls below p.

    Args:
        y: labels, (B,) or (B, L) integers.
        null_label: what replaces them, a scalar tensor, or (L,) for several labels; integers.
        u: one number per sample, uniform on [0, 1), (B,).
        p: the probability with which a sample loses its labels, all of them together; in [0, 1].

    Returns:
        Like y; y itself is not changed.

    Source: Ho and Salimans 2022, algorithm 1.
    """
    ### BEGIN SOLUTION
    is_dropped = (u < p).view(-1, *[1] * (y.ndim - 1))  # (B,) or (B, 1)
    return torch.where(is_dropped, null_label, y)
    ### END SOLUTION


# %%
check("classifier_free_guidance.labels_after_dropout", labels_after_dropout)


# %% tags=["export"]
def drop_labels(y, null_label, p, generator=None):
    """Replace each sample's labels by the null label with probability p; for training only.

    Args:
        y: labels, (B,) or (B, L) integers.
        null_label: the null label, an integer; for L labels a sequence or tensor of L integers. All labels
            of a sample are dropped together.
        p: the probability, in [0, 1].
        generator: source of the draws, one per sample.

    Returns:
        Like y; y itself is not changed.

    Raises:
        TypeError: if y or null_label does not hold integers.
        ValueError: if p lies outside [0, 1], y has another shape, there are not as many null labels, or one
            is too large for y's type.

    Source: Ho and Salimans 2022, algorithm 1.
    """
    if y.is_floating_point() or y.dtype == torch.bool:
        raise TypeError(f"y must hold integers; got {y.dtype}")
    if not 0 <= p <= 1:
        raise ValueError(f"p must be a probability in [0, 1]; got {p}")
    null_label = torch.as_tensor(null_label, device=y.device)
    if null_label.is_floating_point() or null_label.dtype == torch.bool:
        raise TypeError(f"null_label must be of integers; got {null_label.tolist()}")
    if (null_label > torch.iinfo(y.dtype).max).any():
        raise ValueError(f"null_label must fit into {y.dtype}, as y does; got {null_label.tolist()}")
    if y.ndim not in (1, 2) or null_label.shape != y.shape[1:]:
        raise ValueError(
            "y must have shape (B,) with one null label, or (B, L) with L of them; "
            f"got {tuple(y.shape)} and null_label {null_label.tolist()}"
        )
    device = y.device if generator is None else generator.device
    u = torch.rand(len(y), generator=generator, device=device).to(y.device)  # (B,)
    return labels_after_dropout(y, null_label.to(y.dtype), u, p)


# %% [markdown]
# Ten samples with a shape and a colour each, 8 classes of either, and a generous $p$:

# %%
ten = torch.stack([torch.arange(10) % 8, torch.arange(10) // 2], dim=1)  # (10, 2)
print(drop_labels(ten, (8, 8), 0.3, torch.Generator().manual_seed(0)).T.tolist())
many = drop_labels(torch.zeros(100_000, dtype=torch.long), 8, 0.12, torch.Generator().manual_seed(1))
print(f"share dropped at p = 0.12: {(many == 8).double().mean():.3f}")

# %% [markdown]
# Dropping belongs to training. A sampler that drops its labels draws, now and then, something that nobody asked for.

# %% [markdown] tags=["optional"]
# ## Too much contrast *(at a second reading)*
#
# By (5.8), guidance moves the mean of what is drawn, farther than the data go. Already one prediction shows it. Let
# $c$ be the conditional prediction for one sample, all its pixels, and $d=c-u$ its difference from the unconditional
# one; the guided prediction is $c+w\,d$. The variance over the pixels of one sample is
#
# $$\operatorname{Var}[c+w\,d]=\operatorname{Var}[c]+2w\operatorname{Cov}[c,d]+w^2\operatorname{Var}[d] \tag{5.11}$$
#
# a parabola in $w$. If $c$ and $d$ are not opposed to each other, it grows from $w=0$ on, and for large $w$ the
# standard deviation grows like $w$. In the space of $x_0$ this is the contrast of the predicted picture.
#
# Lin et al. put it right by force. Compute the standard deviation over all elements of a sample, of the conditional
# prediction and of the guided one; scale the guided one so that its own becomes the conditional one's; and since this
# alone looks dull, mix the two, $\phi$ parts of the scaled one with $1-\phi$ of the other:
#
# $$\tilde\epsilon_\phi=\phi\,\frac{\operatorname{std}[\epsilon_c]}{\operatorname{std}[\tilde\epsilon]}\,\tilde\epsilon
# +(1-\phi)\,\tilde\epsilon \tag{5.12, definition}$$
#
# Their $\phi$ is 0.7. Since the result is $\tilde\epsilon$ times a positive number, its standard deviation lies
# between the two others, in proportion:
#
# $$\operatorname{std}[\tilde\epsilon_\phi]=\phi\operatorname{std}[\epsilon_c]+(1-\phi)\operatorname{std}[\tilde\epsilon] \tag{5.13}$$
#
# **Exercise 5.** Fill in `rescaled`. (Where the guided prediction has no spread at all there is nothing to scale; a
# freshly made network answers zero everywhere. Leave such a sample as it is.)


# %% tags=["export", "exercise"]
def rescaled(guided, cond, phi):
    """Take back some of the spread that guidance has added to a prediction.

    Args:
        guided: guided predictions, (B, ...).
        cond: conditional predictions, like guided.
        phi: how much of it to take back, in [0, 1].

    Returns:
        Like guided. A sample without any spread stays as it is.

    Source: Lin et al. 2024, section 3.4.
    """
    ### BEGIN SOLUTION
    # std over all elements of each sample
    axes = tuple(range(1, guided.ndim))
    std_guided = guided.std(axes, correction=0, keepdim=True)  # (B, 1, ...)
    std_cond = cond.std(axes, correction=0, keepdim=True)  # (B, 1, ...)
    # phi std_c / std_g guided + (1 - phi) guided
    factor = phi * std_cond / std_guided + 1 - phi
    return torch.where(std_guided > 0, factor, 1.0) * guided
    ### END SOLUTION


# %% slide=["# Contrast grows with the weight", "With the difference $d=c-u$, over the pixels of one sample:", "(5.11)", "A parabola in $w$. Lin et al. scale the prediction back:", "(5.12)"]
check("classifier_free_guidance.rescaled", rescaled)

# %%
x_t, t = torch.randn(32, 64, generator=grid), torch.full((32,), 120)
c, u = two_normals(x_t, t, zero[:32]), two_normals(x_t, t, one[:32])
guided, d = cfg_combine(c, u, 3.0), c - u


def spread_of(prediction):
    """The standard deviation over the elements of each sample, (B,)."""
    return prediction.std(dim=1, correction=0)


covariance = ((c - c.mean(dim=1, keepdim=True)) * d).mean(dim=1)
parabola = spread_of(c) ** 2 + 6 * covariance + 9 * spread_of(d) ** 2
verify("5.11", spread_of(guided) ** 2, parabola, atol=1e-12)
between = 0.7 * spread_of(c) + 0.3 * spread_of(guided)
verify("5.13", spread_of(rescaled(guided, c, 0.7)), between, atol=1e-12)

# %% [markdown]
# ### In which space?
#
# Mixing did not mind what is predicted, (5.6). Rescaling does: to multiply $\hat\epsilon$ by a number is something
# else than to multiply $\hat x_0$ by one. This course's wrapper rescales what the network puts out, as the libraries
# do. Three networks for the two normals of (5.8), one for each prediction type, exact all three, at $w=3$ and
# $\phi=1$:


# %% slide=["# Rescaling works in the space where it is done", "? Three exact networks, one for each prediction type, all rescaled. Which one gets its contrast back?", "[output]", "Predicted noise has standard deviation 1 whatever the picture is: there is nothing to take back."]
def contrast(prediction, w, phi):
    """The mean spread of 50 pictures drawn with a network of this prediction type."""
    typed = Diffusion(linear_betas(200), prediction)
    given = [exact_denoiser(normals[name], typed) for name in ("c", "u")]

    def network(x_t, t, cond):
        return torch.where(cond[:, None] == 0, *(one(x_t, t) for one in given))

    guided = classifier_free_guided(network, zero, one, w, rescale=phi)
    return spread_of(path(ddim_step, guided, start, typed)[-1]).mean().item()


print("prediction   w = 0   w = 3   rescaled")
contrasts = {
    kind: [contrast(kind, *way) for way in ((0.0, 0.0), (3.0, 0.0), (3.0, 1.0))]
    for kind in ("eps", "x_0", "v")
}
for kind, row in contrasts.items():
    print(f"{kind:10}" + "".join(f"{spread:8.2f}" for spread in row))

# %% [markdown]
# Without rescaling all three draw the same pictures, with four times the contrast of unguided ones. Rescaling in the
# space of $x_0$ restores the contrast: what is rescaled is the picture. In the space of the noise it does next to
# nothing, because predicted noise has a standard deviation of about 1 whatever the picture is; nearly all of it is
# noise, and there is nothing to take back. The velocity is noise at clean steps and picture at noisy ones, and lies
# in between. When a paper reports that $\phi=0.7$ is good, it matters what its network predicts: that of Lin et al.
# predicts $v$.

# %% [markdown] tags=["core"]
# ## Only where it helps
#
# At which noise levels is guidance needed? At noisy ones, $x_t$ says little about the class, and the mixture of the two
# scores pushes everything into one direction, away from the mean of all, before anything is there: that costs variety.
# At the cleanest, the class is certain, the difference of the two answers is zero, and asking twice is a
# waste. Kynkäänniemi et al. therefore guide only in an **interval** of noise levels:
#
# $$\tilde\epsilon=\begin{cases}(1+w)\,\epsilon_c-w\,\epsilon_u&\text{if first}\le t\le\text{last}\\
# \epsilon_c&\text{otherwise}\end{cases} \tag{5.14, definition}$$
#
# `interval=(first, last)` counts code's steps of the original schedule, also after respacing, and includes both. It is
# looked up for each sample by itself, since in a batch the steps may differ.
#
# **Exercise 6.** Fill in `within_interval`.


# %% tags=["export", "exercise"]
def within_interval(guided, cond, t, first, last):
    """Choose the guided prediction at the steps of an interval, and the conditional one at all others.

    Args:
        guided, cond: predictions, (B, ...).
        t: steps of the original schedule, (B,) integers.
        first, last: the interval's ends, both included.

    Returns:
        Like guided.

    Source: Kynkaanniemi et al. 2024, for noise levels; here for steps.
    """
    ### BEGIN SOLUTION
    is_inside = (t >= first) & (t <= last)  # (B,)
    return torch.where(is_inside.view(-1, *[1] * (guided.ndim - 1)), guided, cond)
    ### END SOLUTION


# %% slide=["# Guide only where it helps", "(5.14)", "- noisy steps: $x_t$ says little, and everything is pushed one way", "- clean steps: the class is certain, and asking twice is a waste", "- outside of the interval one answer is enough: it saves time"]
check("classifier_free_guidance.within_interval", within_interval)

# %% [markdown]
# What does it cost to guide everywhere? A lab for this question: points on a line, and a class that has two sorts,
# one far away from the other class and one beside it, equally frequent.

# %%
sorts = GaussianMixture([0.5, 0.5], [[-1.2], [0.0]], [0.1, 0.1])  # the class
everything = GaussianMixture([0.25, 0.25, 0.5], [[-1.2], [0.0], [0.8]], [0.1, 0.1, 0.1])
of_class, of_all = exact_denoiser(sorts, diffusion), exact_denoiser(everything, diffusion)


def two_sorts(x_t, t, cond):
    """The exact conditional denoiser: cond 0 is the class with two sorts, 1 is everything."""
    return torch.where(cond[:, None] == 0, of_class(x_t, t), of_all(x_t, t))


even = torch.distributions.Normal(0, 1).icdf((torch.arange(100) + 0.5) / 100)[:, None]  # evenly spread noise
told, untold = torch.zeros(100, dtype=torch.long), torch.ones(100, dtype=torch.long)

# %%
runs = {"w = 0": (0.0, None), "w = 3, all steps": (3.0, None)}
runs |= {f"w = 3, steps {a} to {b}": (3.0, (a, b)) for a, b in ((0, 119), (0, 79), (0, 39), (120, 199))}
lines = {}
for name, (w, interval) in runs.items():
    guided = classifier_free_guided(two_sorts, told, untold, w, interval=interval)
    lines[name] = path(ddim_step, guided, even)[..., 0]  # (201, 100)
    is_far = lines[name][-1] < -0.6
    print(
        f"{name:22} {is_far.double().mean():4.0%} of the far sort, around {lines[name][-1][is_far].mean():.2f}"
    )
assert (lines["w = 3, all steps"][-1] < -0.6).all()
assert (lines["w = 3, steps 0 to 39"][-1] >= -0.6).double().mean() > 0.3

# %% slide=["# Guided early, the less typical sort is gone", "[picture]", "One class, two sorts (dotted). Guided at all steps every path ends in the far one; guided late, both are there."]
shown = ("w = 0", "w = 3, all steps", "w = 3, steps 0 to 39")
figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), sharey=True, layout="constrained")
for axis, name in zip(axes, shown):
    axis.plot(range(200, -1, -1), lines[name][:, 2::4], color=colours[0], linewidth=0.6)
    for mean, colour in zip((-1.2, 0.0, 0.8), (colours[1], colours[1], "grey")):
        axis.axhline(mean, color=colour, linestyle=":", zorder=3)
    axis.set(title=name, xlabel="step", xlim=(200, 0), ylim=(-2.4, 2.2))
axes[0].set_ylabel("$x_t$")
show(
    figure,
    "Paths from noise to data. Unguided they end in both sorts, guided in one, guided late in both again.",
)

# %% [markdown]
# *DDIM's paths, noise at the left. Dotted: the two sorts of the class, and the other class (grey). With guidance at
# all steps every path has been pushed to the far sort while $x_t$ was still noise; with guidance at the last 40 steps
# only, both sorts are there.*
#
# From the guidance's point of view the sort beside the other class is the less typical one, and it is **gone**. That
# is the price in variety, and the table says when it is paid: before the two sorts have parted. Guided at the last 40
# steps only, four in ten samples are still of the near sort: by then nearly every sample has its sort, and guidance
# can merely move it a little. At the noisiest 80 steps the two answers differ little yet, and guidance there does no
# more harm than that, nor any good; to leave these steps out saves 80 second answers. The steps in between decide.
#
# An interval is the cheapest of all remedies: it saves time. Where to put it has to be measured, for each model; in
# the paper it is found by search.

# %% [markdown] tags=["optional"]
# ## What is not wanted *(at a second reading)*
#
# Nothing in the code asks that the second condition be the null label. Put a **negative prompt** there, a condition $n$
# of which the picture should show as little as possible. What score does the mixture stand for then?
# $(1+w)\nabla\log q(x_t\mid y)-w\nabla\log q(x_t\mid n)$; and by Bayes' rule
# $q(x_t\mid y)/q(x_t\mid n)=q(y\mid x_t)/q(n\mid x_t)$ up to a constant. So
#
# $$-\frac{(1+w)\,\epsilon_y-w\,\epsilon_n}{\sqrt{1-\bar\alpha_t}}
# =\nabla_{x_t}\log\left[q(x_t\mid y)\left(\frac{q(y\mid x_t)}{q(n\mid x_t)}\right)^{w}\right] \tag{5.15}$$
#
# The class is made likelier *against $n$*, not against everything: $w$ times the log-odds of a duel. With the null
# label in place of $y$ it asks for nothing but the absence of $n$, by $-w\,\nabla\log q(n\mid x_t)$.
#
# Is that 'not $n$'? Logic would say $q(\text{not }n\mid x_t)=1-q(n\mid x_t)$, whose gradient is
#
# $$\nabla_{x_t}\log\bigl(1-q(n\mid x_t)\bigr)=-\frac{q(n\mid x_t)}{1-q(n\mid x_t)}\,\nabla_{x_t}\log q(n\mid x_t) \tag{5.16}$$
#
# with the odds of $n$ as a factor: where $n$ is out of the question, nothing has to be done. The negative prompt has no
# such factor. It pushes wherever $x_t$ is, also where $n$ has long been ruled out.

# %% slide=["# A negative prompt takes the place of 'nothing'", "$$-\\frac{(1+w)\\,\\epsilon_y-w\\,\\epsilon_n}{\\sqrt{1-\\bar\\alpha_t}}=\\nabla_{x_t}\\log\\left[q(x_t\\mid y)\\left(\\frac{q(y\\mid x_t)}{q(n\\mid x_t)}\\right)^{w}\\right] \\tag{5.15}$$", "The picture is made likelier to be $y$ *against* $n$: a duel, $w$ times its log-odds."]
unwanted = torch.remainder(classes + 1, 3)  # another class for each of the 64 points
x_t, t = points.detach(), torch.randint(200, (64,), generator=torch.Generator().manual_seed(0))
alpha_bar = diffusion.alpha_bar[t, None]
eps_y, eps_n = denoiser(x_t, t, classes), denoiser(x_t, t, unwanted)
points = x_t.clone().requires_grad_()
log_joint = mixture.joint_log_density(points, alpha_bar)  # (64, 3)
log_y, log_n = (log_joint.gather(1, k[:, None])[:, 0] for k in (classes, unwanted))
(score,) = torch.autograd.grad((log_y + 2.0 * (log_y - log_n)).sum(), points, retain_graph=True)
verify("5.15", -cfg_combine(eps_y, eps_n, 2.0) / (1 - alpha_bar).sqrt(), score, atol=1e-9)

# %% slide=["# It is a direction, not a logical 'not'", "The exact 'not $n$' has the odds of $n$ as a factor:", "$$\\nabla\\log\\bigl(1-q(n\\mid x_t)\\bigr)=-\\frac{q(n\\mid x_t)}{1-q(n\\mid x_t)}\\,\\nabla\\log q(n\\mid x_t) \\tag{5.16}$$", "Where $n$ is out of the question, nothing has to be done. The negative prompt pushes there, too."]
chances = mixture.responsibilities(points, alpha_bar)  # (64, 3)
q_n = chances.gather(1, unwanted[:, None])  # (64, 1)
is_other = torch.arange(3) != unwanted[:, None]  # (64, 3)
(not_n,) = torch.autograd.grad((chances * is_other).sum(dim=1).log().sum(), points)
eps_0 = denoiser(x_t, t, null)
by_odds = -q_n / (1 - q_n) * implicit_gradient(eps_n, eps_0, alpha_bar)
verify("5.16", not_n, by_odds, atol=1e-8)

# %% [markdown]
# Two wishes on the mixture. 'Anything but the lower left class', which is half of the data, first by the null label
# against it, then by (5.16), guidance with the exact 'not'. And 'the upper class, not the lower left one'.

# %%
left, anything = torch.zeros(400, dtype=torch.long), nothing


def exact_not(x_t, t):
    """The unconditional denoiser, guided by the exact gradient of log(1 - q(n | x_t)) for class 0."""
    abar = diffusion.base.alpha_bar[t, None]
    q_n = mixture.responsibilities(x_t, abar)[:, :1]
    eps_0, eps_n = denoiser(x_t, t, anything), denoiser(x_t, t, left)
    return guided_eps(eps_0, -q_n / (1 - q_n) * implicit_gradient(eps_n, eps_0, abar), abar, 1.0)


wishes = {
    "nothing": unconditional,
    "not n, exact": exact_not,
    r"$\varnothing$ against n": classifier_free_guided(denoiser, anything, left, 1.0),
    r"y against $\varnothing$": classifier_free_guided(denoiser, wanted, anything, 1.0),
    "y against n": classifier_free_guided(denoiser, wanted, left, 1.0),
}
ends = {name: path(ddim_step, wish, x_T)[-1] for name, wish in wishes.items()}
for name, x_0 in ends.items():
    found = mixture.responsibilities(x_0).argmax(dim=1)
    shares = ", ".join(f"{(found == k).double().mean():4.0%}" for k in range(3))
    print(f"{name:26} classes {shares}; mean height {x_0[:, 1].mean():.2f}")

# %% slide=["# Log-odds have no end", "[picture]", "The exact 'not' removes the class. The negative prompt drives the rest beyond the data, and leaves some of $n$."]
figure, axes = plt.subplots(1, 5, figsize=(14, 3.2), sharex=True, sharey=True, layout="constrained")
for axis, (name, x_0) in zip(axes, ends.items()):
    axis.scatter(*data.T, s=2, color="lightgrey")
    axis.scatter(*x_0.T, s=4, color=colours[1], alpha=0.6)
    axis.set(title=name, aspect="equal", xlim=(-1.3, 2.0), ylim=(-1.0, 2.6))
show(
    figure,
    "Samples for five wishes: nothing, not the left class by two ways, the upper class against all or against the left.",
)

# %% [markdown]
# *400 DDIM samples for each wish at $w=1$; $n$ is the lower left class, $y$ the upper one (data in grey).*
#
# The exact 'not' does what it says: the class is gone, and the other two are as they were, in the proportion 3 to 2.
# The negative prompt fails in both directions. It drives what is *not* $n$ far beyond the data, since it knows no
# odds that would say 'enough'. And some samples in the middle of $n$ it leaves where they are: there $q(n\mid x_t)$
# is nearly 1, its gradient nearly 0, and nothing pushes, while the odds in (5.16) would push without bound. 'Upper,
# not lower left' does reach the upper class, and then goes on: to a mean height of 2.0, where the class has 0.6 and
# guidance against everything ends at 0.8. The logarithm of $q(y\mid x_t)$ has nothing left to gain once $y$ is
# certain; log-odds have no end.
#
# So a negative prompt is a direction, not a logical 'not'. It works as a fine correction between things that are close
# ('not blurred'), with a small weight, and is nothing to rely on for excluding something.

# %% [markdown] tags=["core"]
# ## A conditional U-Net
#
# Back to images, and to single precision. Chapter 02's U-Net takes labels already: `UNet(..., num_classes=(8, 8))`
# has one table for the shape and one for the colour, whose rows are added to the step's embedding, each with a row
# more for 'no label'. Nothing else is different.

# %%
torch.set_default_dtype(torch.float32)
images, diffusion = load("shapes"), load_diffusion("conditional_ddpm_shapes32")
recipe = find_recipe("conditional_ddpm_shapes32").fitted_to(images)
live = recipe.build()
print(f"null labels: {recipe.num_classes}, p = {recipe.drop}")
print({name: tuple(table.weight.shape) for name, table in zip(recipe.labels, live.labels.tables)})

# %% [markdown]
# ### Begin where chapter 02 ended
#
# An unconditional model of these images exists, so training begins with its weights. Only the tables are new, and
# they begin at **zero**: then the network's answers are those of the unconditional one, whatever it is told, and the
# null row, which is to answer just like that, is right from the first step on. A random table would throw every
# step's embedding off, and the first thing to be learned would be to undo that. (Zero is no dead end here: each row
# feels the gradient of its own samples.)

# %%
begin_with(live, recipe.start)
unconditional = load_model(recipe.start)
test_images = load("shapes", "test")
unseen = test_images.batch(range(64))
own = torch.stack([unseen[name] for name in recipe.labels], dim=1)  # (64, 2)
no_label = torch.tensor(recipe.num_classes).expand(64, 2)
t, noise = torch.full((64,), 500), torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
x_t = diffusion.q_sample(unseen["image"], t, noise)
with torch.no_grad():
    as_before = unconditional(x_t, t)
    assert torch.allclose(live.eval()(x_t, t, own), as_before, atol=1e-5)
print("at the start, every label gives the unconditional answer")

# %% [markdown]
# The training loop of the earlier chapters, with one line more, which drops the labels. Its random numbers come from
# the sample's own source, so that a run can be stopped and continued.


# %% slide=["# Training: one line more than in chapter 02", "[code draw: batch = .. cond =]", "- The network has a table for each label, with a row more for 'nothing'.", "- Training begins with the weights of the unconditional model.", "- The new rows begin at zero: at first every label gives the old answer."]
def draw(random):
    """A training batch: images, labels of which some are dropped, steps and noise."""
    batch = images.batch(random.integers(len(images)))
    y = torch.stack([batch[name] for name in recipe.labels], dim=1)  # (B, 2)
    cond = labels_after_dropout(y, torch.tensor(recipe.num_classes), random.uniform(), recipe.drop)
    return {
        "x_0": batch["image"],
        "cond": cond,
        "t": random.integers(1000),
        "noise": random.normal(3, 32, 32),
    }


def conditional_loss(network, batch):
    """The loss of chapter 02, with the network told what is in the image, or nothing."""
    told = partial(network, cond=batch["cond"])
    return diffusion.loss(told, batch["x_0"], batch["t"], batch["noise"])


# %% [markdown]
# In the half minute that there is, train only what is new, the two tables; all other weights stay as chapter 02 left
# them. (The network that the course ships was trained as a whole, and for longer.)

# %%
live.requires_grad_(False)
live.labels.requires_grad_(True)
print(
    f"trained: {sum(p.numel() for p in live.labels.parameters())} of {sum(p.numel() for p in live.parameters())}"
)
train(live, draw, conditional_loss, steps=100, batch_size=64, learning_rate=0.02, warmup_steps=20)
live = live.eval().requires_grad_(False)

# %% [markdown]
# What has it learned in these few steps? The loss itself says little, since most of it no label can lower. So
# compare, on the same 64 unseen images with the same noise, what it does when told the right labels, none, and wrong
# ones; and the same for the shipped network:

# %%
wrong = (own + 1) % 8  # another shape and another colour
trained = load_model("conditional_ddpm_shapes32")


@torch.no_grad()
def losses_when_told(network, step):
    """The loss on 64 unseen images at one step: told the right labels, none, and wrong ones."""
    t = torch.full((64,), step)
    return [
        diffusion.loss(partial(network, cond=cond), unseen["image"], t, noise).item()
        for cond in (own, no_label, wrong)
    ]


read_at = torch.arange(50, 1000, 100).tolist()
told = {
    name: torch.tensor([losses_when_told(n, step) for step in read_at])
    for name, n in {"tables, 100 steps": live, "trained long": trained}.items()
}

# %% slide=["# The network believes what it is told", "[picture]", "Right labels lower the loss, most where $x_t$ is nearly noise; wrong ones raise it."]
figure, axes = plt.subplots(1, 2, figsize=(11, 3.2), sharey=True, layout="constrained")
for axis, (name, rows) in zip(axes, told.items()):
    for column, label, style, colour in (
        (0, "right labels", "o-", colours[0]),
        (2, "wrong labels", "^:", colours[1]),
    ):
        axis.plot(read_at, 100 * (rows[:, column] / rows[:, 1] - 1), style, color=colour, label=label)
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set(title=name, xlabel="step t")
axes[0].set_yscale("symlog", linthresh=1)  # linear between -1 and 1, logarithmic outside
axes[0].set_ylabel("loss against no label, %")
axes[0].legend()
show(
    figure,
    "Against the step, by how many per cent the loss is lower with the right labels and higher with wrong ones.",
)

# %% [markdown]
# *By how much the loss on 64 unseen images changes against being told nothing, when the network is told the right
# labels or wrong ones (the scale is logarithmic beyond 1 %). What the right labels gain is what they say beyond $x_t$, the implicit
# classifier's business.*
#
# After 100 steps of the tables the labels help where the noise is strongest, by about 1 %; elsewhere the new rows are
# still in the way. In the shipped network the right labels lower the loss at every step, by 8 % where the image is
# nearly clean and 25 % where it is nearly noise, and there nothing else says what to draw. Wrong labels more than
# triple it up to $t=650$: the network believes what it is told. At the noisiest step they hardly matter.

# %%
right, nothing_said, misled = told["trained long"].T  # (10,) each
print(f"right labels lower the loss at every step: {(right < nothing_said).all().item()}")
print(f"wrong labels raise it at every step: {(misled > nothing_said).all().item()}")
assert (right < nothing_said).all() and (misled > nothing_said).all()

# %% [markdown]
# The shipped network comes from `python -m lecture26 train conditional_ddpm_shapes32`:

# %%
card = load_card("conditional_ddpm_shapes32")
print(f"{card['steps']} steps from the weights of {card['settings']['start']}")
print({name: round(value, 3) for name, value in card["metrics"].items() if name.startswith("accuracy")})

# %% [markdown] tags=["optional"]
# ### Is it a gradient? *(at a second reading)*
#
# For exact denoisers, (5.1) is the gradient of a log-probability. For a network, $\epsilon_c-\epsilon_u$ is merely
# the difference of two outputs, and nothing makes it the gradient of *any* function. One can tell: the derivative of
# a gradient field, its Jacobian $J$, is symmetric, so that $a^\top Jb=b^\top Ja$ for any two directions. Differences
# of the field along random directions measure both sides:

# %% slide=["# No classifier can be integrated from it", "A gradient field has a symmetric Jacobian: $a^\\top Jb=b^\\top Ja$.", "The difference of two network answers has not: its antisymmetric part is of the same order as the symmetric one.", "'Implicit classifier' names what the two answers approximate."]
t, told_64 = torch.full((64,), 500), own
directions = torch.randn(2, 64, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def along(direction, h=0.05):
    """The implicit gradient's change along a direction, for each of the 64 images (v-prediction turned into noise)."""
    ends = []
    for x in (x_t + h * direction, x_t - h * direction):
        answers = [diffusion.eps_from_v(x, t, trained(x, t, cond)) for cond in (told_64, no_label)]
        ends.append(implicit_gradient(*answers, diffusion.alpha_bar[t, None, None, None].float()))
    return (ends[0] - ends[1]) / (2 * h)


a, b = directions
one_way, other_way = ((p * along(q)).flatten(1).sum(dim=1) for p, q in ((a, b), (b, a)))
asymmetry = (one_way - other_way).std() / (one_way + other_way).std()
print(f"asymmetry of the Jacobian, 0 for a gradient: {asymmetry:.1f}")

# %% [markdown]
# Seen along such directions the antisymmetric part is 0.7 times as large as the symmetric one: far from a gradient. So
# 'implicit classifier' is a name for what the two answers approximate; nobody could integrate it to a probability.

# %% [markdown] tags=["core"]
# ## Red stars
#
# Eight times the same noise, the condition 'red star', fifty DDIM steps, and weights from unconditional to far too
# large:

# %% slide=["# Larger weights: larger, redder, glaring", "[picture]", "Red stars from the same noise: at $w=0$ of both sizes, above it nearly all of them large."]
star = torch.tensor([images.labels["shape"].index("star"), images.labels["colour"].index("red")]).expand(8, 2)
none_of_8 = torch.tensor(recipe.num_classes).expand(8, 2)
x_T = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(6))
short = diffusion.respace(50)


def draw_stars(w, step=ddim_step, **options):
    """Eight pictures of red stars, always from the same noise."""
    guided = classifier_free_guided(trained, star, none_of_8, w, **options)
    return sample(short, guided, x_T.shape, step, torch.Generator().manual_seed(7), x_T)


by_weight = {f"w = {w:g}": draw_stars(w) for w in (-1.0, 0.0, 1.0, 3.0, 8.0)}
figure = show_grid(torch.cat(list(by_weight.values())), row_titles=list(by_weight), inches_per_image=1.0)
show(figure, "Rows of eight pictures by weight: anything at -1, red stars from 0 on, ever more glaring ones.")

# %% [markdown]
# *Each column begins with the same noise.*
#
# At $w=-1$ anything is drawn, at $w=0$ red stars of both sizes. At $w=1$ nearly all of them are large, though nobody said
# so; at $w=3$ the red becomes deeper and light edges appear, at $w=8$ the stars are dark in the middle and glaring at the
# edge.
#
# The command line does it too:
#
# ```
# python -m lecture26 sample --model conditional_ddpm_shapes32 --guidance cfg --w 1 --class "red star" --out stars.png
# ```
#
# How much contrast is too much? At several steps, the standard deviation of the predicted picture, over the 64 unseen
# images, before anything is clipped, and beside it that of the real pictures:

# %%
real_spread = unseen["image"].flatten(1).std(dim=1).mean().item()
print("   t " + "".join(f"   w = {w:g}" for w in (0, 1, 3, 8)) + "   w = 3, rescaled")
for step in (900, 700, 500, 300):
    t = torch.full((64,), step)
    x_t = diffusion.q_sample(unseen["image"], t, noise)
    ways = [(0.0, 0.0), (1.0, 0.0), (3.0, 0.0), (8.0, 0.0), (3.0, 1.0)]
    with torch.no_grad():
        outputs = [classifier_free_guided(trained, own, no_label, w, phi)(x_t, t) for w, phi in ways]
    spreads = [diffusion.x_0_from_v(x_t, t, v).flatten(1).std(dim=1).mean() for v in outputs]
    print(f"{step:4} " + "".join(f"{spread:8.2f}" for spread in spreads))
print(f"real pictures: {real_spread:.2f}")

# %% [markdown]
# At $t=900$, where $x_t$ says little, the two answers differ most, and $w=8$ predicts pictures with four times the
# contrast of real ones, far outside of what pixels can show; clipping to $[-1,1]$ takes the worst away at each step.
# Further on the difference shrinks, and the prediction recovers. This is (5.11) and over-saturation at work. Rescaling
# brings the noisy steps back to normal and has little to do at the others, where $v$ is mostly noise.

# %% [markdown] tags=["core"]
# ## How strong?
#
# The stored measurement draws 512 images for each of several weights, each image with a shape and a colour of its
# own, and asks what chapter 03 asked: are shape and colour as asked for, how far are the images from real ones, how
# much of the variety of real images is there?

# %%
stored = load_results("classifier_free_guidance_sweep")
print(stored["command"])


def runs_of(sampler="ddim", split="test", **settings):
    """The runs of the sweep with a sampler, a split, and otherwise nothing special but what is asked for."""
    plain = {"rescale": 0.0, "interval": None, "negative": None} | settings
    return [
        r
        for r in stored["runs"]
        if (r["sampler"], r["split"]) == (sampler, split) and all(r[k] == v for k, v in plain.items())
    ]


def row(run):
    """What is printed of a run."""
    right = "shape {accuracy_shape:6.1%}  colour {accuracy_colour:6.1%}  both {accuracy_all:6.1%}"
    return (right + "  Fréchet {frechet_distance:6.1f}  recall {recall:.2f}").format(**run)


curves = {sampler: runs_of(sampler) for sampler in ("ddpm", "ddim")}
for sampler, runs in curves.items():
    for run in runs:
        print(f"{sampler.upper()}  w = {run['w']:4}  {row(run)}")
print("real against real: {frechet_distance_real:.1f}, recall {recall_real:.2f}".format(**stored["runs"][0]))

# %% slide=["# The best weight depends on what one measures", "[picture]", "Accuracy wants guidance, the distance from real images wants none, and variety shrinks."]
figure, axes = plt.subplots(1, 3, figsize=(13, 3.4), layout="constrained")
for axis, quantity in zip(axes, ("accuracy_all", "frechet_distance", "recall")):
    for (sampler, runs), marker, colour in zip(curves.items(), "os", colours):
        guided = [run for run in runs if run["w"] >= 0]
        points = [run["w"] for run in guided], [run[quantity] for run in guided]
        axis.plot(*points, marker + "-", color=colour, label=sampler.upper())
    axis.set_xlabel("weight w")
axes[0].set(title="shape and colour as asked for", ylim=(0.96, 1.002))
axes[1].set(title="Fréchet distance", ylim=(0, 270))
axes[2].set(title="recall", ylim=(0.75, 1))
axes[1].axhline(guided[0]["frechet_distance_real"], color="grey", linestyle="--", label="real against real")
axes[2].axhline(guided[0]["recall_real"], color="grey", linestyle="--")
axes[1].legend()
show(figure, "Against the weight, for both samplers: accuracy, Fréchet distance and recall.")

# %% [markdown]
# *512 samples for each weight; dashed: real images against as many others.*
#
# By accuracy the best weight is 0.5 or anything above, by the Fréchet distance it is 0, for either sampler. And at 0 the
# distance is already that of real images against real ones: this network has learned the distribution of each class,
# and there is nothing left that guidance could mend but 3 misshapen pictures in a hundred, with DDIM. Every weight above
# 0 pays for these with all the others. The recall, how much of the variety of real images is there, falls more
# slowly, from 0.97 to 0.85.
#
# A small version, live: the first 64 of the stored images, in half as many steps, at three weights, and at the largest of
# these with the two remedies of the sections above.

# %%
judge = load_model("reader_shapes32")
first = test_images.attributes(range(64))
asked_for = {name: first[name] for name in recipe.labels}
cond_64 = torch.stack(list(asked_for.values()), dim=1)  # (64, 2)
ways = {"w = 0": {"w": 0.0}, "w = 1": {"w": 1.0}, "w = 4": {"w": 4.0}}
ways |= {
    "w = 4, rescaled": {"w": 4.0, "rescale": 0.7},
    "w = 4, steps 300 to 699": {"w": 4.0, "interval": (300, 699)},
}
drawn, shorter = {}, diffusion.respace(25)
for name, options in ways.items():
    guided = classifier_free_guided(trained, cond_64, no_label, **options)
    drawn[name] = sample(shorter, guided, (64, 3, 32, 32), ddim_step, torch.Generator().manual_seed(0))

# %%
for w in (0, 1, 4):
    (run,) = (run for run in curves["ddim"] if run["w"] == w)
    both = attribute_accuracy(judge, drawn[f"w = {w}"], asked_for)["all"]
    difference = abs(both - run["first_batch"]["accuracy_all"])
    print(f"w = {w}: as stored, to 5 of 100: {difference < 0.05}")
    assert difference < 0.05

# %% [markdown] tags=["core"]
# ### What nobody asked for
#
# What moves the distance so far, while every picture shows what was asked for? Let the reader also say what was *not*
# asked for: the size of the shape, which is large in half of the data. And measure the contrast, the standard
# deviation over all numbers of a picture:

# %% tags=["nbval-ignore-output"]
real_images = test_images.batch(range(64))["image"]
large = images.labels["size"].index("large")
print("                           large   contrast")
for name, pictures in {"real images": real_images, **drawn}.items():
    share = (read(judge, pictures).predicted["size"] == large).double().mean()
    print(f"{name:24} {share:7.0%} {pictures.flatten(1).std(dim=1).mean():10.2f}")
    assert share > 0.75 if name == "w = 4" else share < 0.65 if "steps" in name else True

# %% slide=["# Guidance decides what nobody asked for", "[picture]", "Size was not asked for. A large star is more certainly a star, so guidance draws large ones; an interval spares both."]
rows = torch.cat([pictures[:8] for pictures in drawn.values()])
figure = show_grid(rows, row_titles=list(drawn), inches_per_image=1.0)
show(
    figure,
    "Rows of eight pictures: small and large shapes at w = 0 and at an interval, large ones elsewhere.",
)

# %% [markdown]
# *The same noise and the same wish in each column. Nothing was said about size.*
#
# So this is what the distance has seen. With $w=1$ five pictures in six show a large shape, with $w=4$ nearly all. Both
# sizes are equally frequent, in every class; but a large red star is more certainly a red star, at every noise level,
# so it has the higher $q(y\mid x_t)$, and guidance goes there. The less typical sort is gone, as in the lab of the two
# sorts. Contrast is the lesser part of it: rescaling brings it back from 0.40 to 0.37, and the shapes stay large.
#
# The interval helps here more than in the lab, where the steps in between took the variety. Size is decided while $x_t$
# is nearly noise; leave out the noisiest 300 steps, and both sizes are back, at the same weight.

# %% [markdown] tags=["optional"]
# ### Rescaled, at intervals, against something *(at a second reading)*
#
# The stored measurement has the remedies at a weight that is too large, where they have something to do; then a
# negative condition in place of the null label, at a weight of 1: the same colour with another shape, and the same
# shape with another colour.

# %%
strong = stored["strong_w"]
remedies = {
    f"w = {strong:g}": {"w": strong},
    "rescaled, phi = 0.7": {"w": strong, "rescale": 0.7},
    **{f"steps {a} to {b}": {"w": strong, "interval": [a, b]} for a, b in stored["intervals"]},
    "w = 0": {"w": 0.0},
    "w = 1": {"w": 1.0},
    "against another shape": {"w": 1.0, "negative": "shape"},
    "against another colour": {"w": 1.0, "negative": "colour"},
}
for name, settings in remedies.items():
    for run in runs_of(**settings):
        print(f"{name:24} {row(run)}")

# %% [markdown]
# - **Rescaling** takes back contrast, and hardly anything of the distance, since contrast was not what it was made of.
# - **The interval** is the remedy here. Without the noisiest 300 steps, a weight of 4 gives 99.2 % right, against 97.3 %
#   unguided, at the distance and nearly the recall of the unguided pictures: guidance for nothing. Leaving out the
#   cleanest 300 steps changes nothing but the time, as it should: there both answers agree. Leaving out both asks twice
#   at 20 steps of 50.
# - **A negative condition** is a weaker guide than the null label: 98.6 and 98.0 % right at $w=1$, against 100 %. It also
#   does less harm. The difference between a red star and a red circle holds nothing of size, which both have alike.

# %% [markdown] tags=["optional"]
# ### Pairs never seen *(at a second reading)*
#
# Eight pairs of shape and colour were held out of every training. The network has learned shape and colour in two
# tables, whose rows it adds; a blue star is a sum that it has never met.

# %%
for run in runs_of(split="held_out", w=1.0):
    print(f"held out  {row(run)}")
for run in runs_of(w=1.0):
    print(f"seen      {row(run)}")

# %%
held_out = load("shapes", "held_out").attributes(range(64))
pairs = torch.stack([held_out[name] for name in recipe.labels], dim=1).unique(dim=0)  # (8, 2)
guided = classifier_free_guided(trained, pairs, none_of_8, 1.0)
x_0 = sample(short, guided, x_T.shape, ddim_step, torch.Generator().manual_seed(7), x_T)
titles = [f"{images.labels['colour'][c]}\n{images.labels['shape'][s]}" for s, c in pairs.tolist()]
figure = show_grid(x_0, titles=titles, inches_per_image=1.2)
figure.set_figheight(1.8)  # room for the titles
show(figure, "The eight pairs that no training image showed, drawn with w = 1.")

# %% [markdown]
# *The eight pairs that were held out, at $w=1$.*
#
# All 512 are read right, as those of the seen pairs. Shape and colour are composed by the sum of two rows, and what
# follows treats them as two things. (The Fréchet distance is smaller only because it is taken to other images, of eight
# pairs: real against real is 11.6 there.)

# %% [markdown] tags=["core"]
# ## Three guidances side by side
#
# Unguided, by a classifier, by CLIP, classifier-free: what must be trained, how long that takes, what an image costs,
# and what one gets. All numbers are stored ones: training minutes from the checkpoints' cards (one thread), the cost
# from `benchmarks/guidance_cost.py`, the rest from the sweeps of chapters 03, 04 and this one, 512 samples each, 50
# ancestral steps. 'Best' is the setting with the lowest Fréchet distance among those within a percentage point of the
# highest accuracy. The conditional model by itself, at $w=0$, is no guidance, and gets a row of its own.


# %%
def best(runs):
    """The run with the lowest Fréchet distance among those with the highest accuracy, to one percentage point."""
    highest = max(run["accuracy_all"] for run in runs)
    return min((r for r in runs if r["accuracy_all"] >= highest - 0.01), key=lambda r: r["frechet_distance"])


def ancestral(name, **settings):
    """The runs of a stored sweep by 50 ancestral steps on seen pairs, with some further settings."""
    settings = {"sampler": "ddpm", "split": "test"} | settings
    return [r for r in load_results(name)["runs"] if all(r[key] == value for key, value in settings.items())]


(unguided,) = ancestral("classifier_guidance_sweep", form="none")
(conditional,) = (run for run in curves["ddpm"] if run["w"] == 0)
sweeps = {
    "classifier": ancestral("classifier_guidance_sweep", form="denoiser"),
    "CLIP": ancestral("clip_guidance_sweep", through="x_t", prompt="a red star"),
    "classifier-free": [run for run in curves["ddpm"] if run["w"] > 0],
}

# %%
second_network = {
    "classifier": "noisy_classifier_shapes32",
    "CLIP": "noisy_clip_shapes32",
    "classifier-free": "conditional_ddpm_shapes32",
}
cost = load_results("benchmark_guidance")["guided_over_unguided"]
cost["CLIP"] = cost["clip, x_t"]
rows = {name: (best(runs), cost[name]["ratio"]["median"]) for name, runs in sweeps.items()}
rows = {"unguided": (unguided, 1.0), **rows, "conditional": (conditional, 1.0)}
second_network["conditional"] = second_network["classifier-free"]

print("                 trained besides   minutes   cost   best at    both   Fréchet   recall")
for name, (run, times) in rows.items():
    card = load_card(second_network[name]) if name in second_network else {"parameters": 0, "seconds": 0}
    strength = f"w = {run['w']:g}" if "w" in run else f"s = {run['scale']:g}"
    print(
        f"{name:16} {card['parameters'] / 1e6:9.2f} M {card['seconds'] / 60:11.0f} {times:8.1f} {strength:>9}"
        f" {run['accuracy_all']:7.1%} {run['frechet_distance']:9.1f} {run['recall']:8.2f}"
    )

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), sharey=True, layout="constrained")
named = {"unguided": (unguided, "*"), "conditional, w = 0": (conditional, "D")}
for axis, quantity in zip(axes, ("recall", "frechet_distance")):
    for (name, runs), marker, colour in zip(sweeps.items(), "os^", colours):
        points = [run[quantity] for run in runs], [run["accuracy_all"] for run in runs]
        axis.plot(*points, marker + "-", color=colour, label=name)
        axis.plot(best(runs)[quantity], best(runs)["accuracy_all"], marker, color=colour, ms=13, mfc="none")
    for name, (run, marker) in named.items():
        axis.plot(run[quantity], run["accuracy_all"], marker, color="black", ms=9, label=name)
    axis.axvline(unguided[quantity + "_real"], color="grey", linestyle="--", label="real images")
axes[0].set(xlabel="recall", ylabel="shape and colour as asked for", ylim=(-0.03, 1.03))
axes[1].set(xlabel="Fréchet distance", xlim=(0, 270))
axes[1].legend(loc="lower right")
show(
    figure,
    "Accuracy against recall and against Fréchet distance for each guidance by strength, and unguided.",
)

# %% [markdown]
# *Each line is one guidance, its points the strengths of its sweep; the rings mark the best ones.*
#
# And pictures: the same eight wishes and the same noise, each guidance at its best strength.

# %%
eight = cond_64[:8]
titles = [f"{images.labels['colour'][c]}\n{images.labels['shape'][s]}" for s, c in eight.tolist()]
strengths = {name: best(runs).get("w", best(runs).get("scale")) for name, runs in sweeps.items()}
clip = load_model("noisy_clip_shapes32")
with torch.no_grad():
    texts = clip.encode_text(clip.tokenizer([f"a {title}".replace("\n", " ") for title in titles]))
ways = {
    "unguided": unconditional,
    "classifier": classifier_guided(
        unconditional,
        load_model("noisy_classifier_shapes32"),
        8 * eight[:, 0] + eight[:, 1],
        strengths["classifier"],
        diffusion,
    ),
    "CLIP": clip_guided(unconditional, clip, texts, strengths["CLIP"], diffusion),
    "classifier-free": classifier_free_guided(trained, eight, none_of_8, strengths["classifier-free"]),
    "conditional": partial(trained, cond=eight),
}

# %% slide=["# Three guidances and none, the same wishes", "[picture]", "Classifier and CLIP push a finished model; classifier-free guidance is trained in, and draws what is asked for.", "# What each is good for", "| | needs | a step costs | takes |\n|---|---|---|---|\n| classifier | a network of noisy images | its gradient besides | its classes |\n| CLIP | two towers, noisy images | its gradient besides | any words |\n| classifier-free | dropped labels in training | twice | what it knows |\n| conditional, $w=0$ | labels in training | once | what it knows |", "Where a world is learned completely, the conditional model alone is best. Elsewhere a weight buys what training could not.", "# What to remember", "- Two denoisers contain a classifier; mixing is guidance at scale $1+w$.", "- One network gives both answers if labels are dropped in training.", "- A number needs its convention: $w$, or $s=1+w$.", "- A weight above 0 buys accuracy with variety and contrast.", "- A negative prompt is a direction, no 'not'."]
drawn = [
    sample(short, way, x_T.shape, ddpm_step, torch.Generator().manual_seed(7), x_T) for way in ways.values()
]
figure = show_grid(torch.cat(drawn), titles=titles, row_titles=list(ways), inches_per_image=1.1)
figure.set_figheight(5.8)  # room for the titles
show(figure, "Eight wishes in columns, drawn unguided and by the three guidances.")

# %% [markdown]
# *The wish stands above each column. The unguided row cannot know it.*
#
# What each is good for:
#
# - **Unguided**, one picture in 56 would be right by chance.
# - **A classifier** steers a finished model by a small network, trained in minutes, at 1.4 times the cost. It reaches nine
#   in ten, and the pictures pay for it: the gradient of a small network on noisy images is a rough one.
# - **CLIP** needs no classes, and takes any words of its language: the only one of the three that can be asked for
#   'something on a striped background' without having been made for it. In cost and quality it is like the classifier.
# - **Classifier-free guidance** has to be trained into the denoiser, here in half an hour from the unconditional
#   weights on, and each step costs two. It draws what is asked for
#   every time, and in variety and distance from real pictures it is well ahead of both.
# - **The conditional model without guidance** is best of all here, at the cost of the unguided one. Not the guidance
#   makes the large difference in this table, but the training with labels. It is so because shapes are a small world,
#   which this network has learned completely. Where it has not, as in chapter 07 with its sentences, or in any
#   photographs, the conditional model alone is vague, and a weight above 0 buys what its training could not.

# %% [markdown] tags=["core"]
# ## Your code runs the model
#
# Save this notebook, call `make mine` in a terminal, and run the next cell: it draws with your functions, as at the
# [end of chapter 01](01_ddpm.ipynb), and says which of them were called. One network gives both answers, and your
# combination of the two steers.

# %% tags=["milestone", "nbval-ignore-output"]
from lecture26.kit.own_package import show_milestone

show_milestone(
    'sample --model conditional_ddpm_shapes32 --guidance cfg --w 0.5 --class "blue ring" --count 16',
    alt="Sixteen images, all of which show a blue ring.",
)

# %% [markdown] tags=["core"]
# ## What the lecture's slide says
#
# The slide gives
# $\tilde\epsilon_\theta(z_\lambda,c)=(1+w)\,\epsilon_\theta(z_\lambda,c)-w\,\epsilon_\theta(z_\lambda)$, calls $w$
# the guidance scale, and says three things about it. Held against this chapter:
#
# - The formula is right, for noise and, by (5.6), for any other prediction. $z_\lambda$ is $x_t$, named by its log
#   signal-to-noise ratio. But $w$ is *not* what libraries call the guidance scale: that is $s=1+w$, (5.5). Who types
#   7.5 into one of them gets a weight of 6.5.
# - *It balances conditional and unconditional outputs.* For $w>0$ it does not balance, it extrapolates: the weights
#   are $1+w$ and $-w$, and the result lies outside of what both say. A balance it is between -1 and 0 only.
# - *It eliminates the need for a separate classifier by training a single model.* True. What it needs instead is a
#   model that was trained with labels and with dropped ones, so it cannot steer a finished unconditional model
#   without further training, as the other two do. And each step asks the network twice.
# - *It simplifies the workflow, but needs careful tuning of the weight.* It does; and so do the other two. Ho and
#   Salimans, on ImageNet at 64 pixels with $p=0.1$: FID 1.80 at $w=0$, 1.55 at $w=0.1$, 12.6 at $w=1$, 26.22 at
#   $w=4$, while the Inception score rises from 53.71 to 260.2. By the one measure the best weight is 0.1, by the
#   other there is none. Here: the Fréchet distance rises from 16 at $w=0$ to 81, 140, 227 and 252 at 0.5, 1, 2 and 4, while
#   the accuracy has nothing left to gain. The trade-off is the papers' own, and the best weight is at its very end.

# %% [markdown] tags=["core"]
# ## Summary
#
# - A conditional and an unconditional denoiser contain a classifier's gradient (5.1). Mixing them with the weights
#   $1+w$ and $-w$ is classifier guidance at the scale $s=1+w$ (5.3), along the whole path (5.7).
# - Two conventions count it, $w$ and $s=1+w$ (5.5). Any prediction type may be mixed (5.6); clipping comes
#   afterwards.
# - One network gives both answers if labels are dropped in training: the minimiser is the pair of expectations, for
#   every $p$ (5.10). All labels of a sample go together, in training only.
# - A weight above 0 draws something beyond the class (5.8), with too much contrast (5.11), and drops the less typical
#   sorts of a class: at $w=4$ one picture in twenty showed a small shape, in the place of every second. Rescaling takes
#   the contrast back, in the space in which it is applied (5.13); an interval keeps the sorts, and saves time.
# - A negative prompt is a direction, (5.15), and not the logical 'not', (5.16).
#
# Chapter 07 uses it for sentences, in a latent space.
#
# ## References
#
# - Ho, Salimans 2022, *Classifier-Free Diffusion Guidance*: section 3.2 with equation 6 (and the remark that a network's
#   difference is no classifier's gradient), algorithms 1 and 2, table 1 (ImageNet at 64 pixels).
# - Dhariwal, Nichol 2021, *Diffusion Models Beat GANs on Image Synthesis*: section 4.
# - Nichol, Dhariwal, Ramesh et al. 2022, *GLIDE*: section 2.3 (the other convention).
# - Saharia, Chan, Saxena et al. 2022, *Photorealistic Text-to-Image Diffusion Models with Deep Language
#   Understanding* (Imagen): section 2.2, equation 2, and 2.3 (saturation, thresholding).
# - Lin, Liu, Li, Yang 2024, *Common Diffusion Noise Schedules and Sample Steps are Flawed*: section 3.4 (rescaling).
# - Kynkäänniemi, Aittala, Karras, Laine, Aila, Lehtinen 2024, *Applying Guidance in a Limited Interval Improves
#   Sample and Distribution Quality in Diffusion Models* (the interval).
# - Liu, Li, Du, Torralba, Tenenbaum 2022, *Compositional Visual Generation with Composable Diffusion Models* (negation
#   of a concept by a difference of scores).
# - Kynkäänniemi, Karras, Laine, Lehtinen, Aila 2019, *Improved Precision and Recall Metric for Assessing Generative
#   Models*: section 2.
# - Efron 2011, *Tweedie's Formula and Selection Bias*: equation 1.4.
