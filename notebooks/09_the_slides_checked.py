# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown] slide=["# All the parts are there. What do they make?", "- a sampler (01), a U-Net (02), guidance (03 to 05)", "- a first stage (06), words and cross-attention (07)", "- a frozen backbone with prompts for each task (08)", "? And how much of the lecture was true?", "# What you can do afterwards", "- put a text-to-image model together in a dozen lines, and exchange a part by one", "- judge a claim: whose number, on what data, against which rival", "- start from a real Stable Diffusion, a real set of X-ray pictures, a server of many tasks"]
# # 09 The slides, checked: what holds, and where to go next
#
# [Previous: 08 Visual prompt tuning](08_visual_prompt_tuning.ipynb)
#
# Every part is finished. This chapter puts them together, holds each number and comparison of the lecture against papers and
# the course's own measurements, and takes up its three applications.
#
# **What you will be able to do**
#
# - assemble a text-to-image model from finished parts in a dozen lines, and exchange each part by one line;
# - read a claim as an engineer: whose number is it, on what data, against which rival, how sure;
# - run a real Stable Diffusion with this course's samplers; adapt a backbone to medical images, command by command; serve
#   many tasks from one backbone.
#
# **What it needs**: all chapters, though each section says which. **What it takes**: under two minutes to run on two cores,
# and no download. To study: an hour for the core, half an hour more for the rest. Sections marked *(at a second reading)*
# can wait. (After a restart of the kernel choose *Run All Above Selected Cell*.)

# %%
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from queue import Queue
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
from torchvision.utils import save_image

from lecture26.checks import check, check_answer, progress
from lecture26.classifier_guidance import classifier_guided
from lecture26.clip_guidance import clip_guided
from lecture26.ddpm import Diffusion, ddpm_step
from lecture26.kit.claims import COLUMNS, Verdict, count_verdicts
from lecture26.kit.data import load
from lecture26.kit.downstream import downstream
from lecture26.kit.figures import PALETTE, show, show_grid, show_table, use_style
from lecture26.kit.results import load_results
from lecture26.latent_diffusion import DiffusersDenoiser, DiffusersVAE, load_stable_diffusion
from lecture26.recipes import load_diffusion, load_model, load_recipe
from lecture26.recipes.adaptation import build
from lecture26.recipes.latent import load_pipeline
from lecture26.studies.claims import ADAPTED, CLAIMS, differences
from lecture26.studies.guidances import Way, draw_guidances
from lecture26.visual_prompt_tuning import PromptBank, full_fine_tune

use_style()
colours = list(PALETTE.values())

# %% [markdown]
# Cells like the next one become the module `lecture26.the_slides_checked`; the others stay in the notebook.

# %% tags=["export"]
from concurrent.futures import Future
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from lecture26.classifier_free_guidance import classifier_free_guided
from lecture26.ddpm import ddim_step, noise_like, reverse_chain
from lecture26.kit.validation import check_positive_int
from lecture26.latent_diffusion import checked_prompts, from_latents, initial_noise

# %% [markdown] tags=["core"]
# ## A miniature Stable Diffusion
#
# A dozen lines, each a chapter. What is loaded are trained weights; the rest is what you have built.

# %%
trained = load_pipeline("text_to_image_shapes64")
prompts = [
    "a large yellow star on a striped background",
    "a small red heart to the left of a large blue ring on a dark background",
    "a large green crescent on a checkered background",
    "a small purple cross above a large orange circle on a light background",
]

# %% slide=["# A miniature Stable Diffusion, in a dozen lines", "[code: with torch .. images]", "Words in, noise guided down to a code, a picture out. Each line is a chapter."]
text_encoder, tokenizer = trained.text_encoder, trained.text_encoder.tokenizer  # chapters 04 and 07
denoiser, vae = trained.denoiser, trained.vae  # chapters 02 with 07, and 06
few_steps = trained.diffusion.respace(25)  # chapter 01

with torch.no_grad():
    said, unsaid = text_encoder(tokenizer(prompts)), text_encoder(tokenizer([""] * len(prompts)))
    guided = classifier_free_guided(denoiser, said, unsaid, w=2.0)  # chapter 05
    z = torch.randn(len(prompts), 4, 16, 16, generator=torch.Generator().manual_seed(0))
    for step in reversed(range(25)):
        z = ddim_step(few_steps, guided, z, torch.full((len(z),), step), noise=None)
    images = vae.decode(z / trained.latent_scale)

# %% slide=["# It draws what is asked for, nearly", "[picture]", "Two objects, their colours, their places; only the cross is none. Nothing left out, nothing chosen."] tags=["draw"]
short = ["yellow star", "red heart, blue ring", "green crescent", "purple cross, orange circle"]
figure = show_grid(images, columns=4, titles=short, inches_per_image=2.1)
figure.set_figheight(2.4)
show(
    figure,
    "Four pictures: a star, a heart beside a ring and a crescent, as asked for; "
    "above a circle something like a star, where a cross was wanted.",
)

# %% [markdown]
# *The first four pictures that it draws for these captions; none is left out.* Only the cross is none: how often all is right,
# chapter 07 says (at this weight in 95 % of scenes).
#
# #### Exercise 1: put it together
#
# *Algorithm, medium, 10 minutes.* Write these lines as a function that knows none of the parts: each is handed in. Ask of
# each part what goes in and what comes out, and in which of two spaces you are. `reverse_chain` of
# [chapter 01](01_ddpm.ipynb) and `from_latents` of [chapter 07](07_latent_diffusion.ipynb) are at hand.


# %% slide=["# The same, with every part handed in", "[code words_to_images: said .. return]", "? What must the parts agree on, and what not?"] tags=["export", "exercise"]
def words_to_images(
    tokens,
    empty_tokens,
    encode_text,
    denoiser,
    guide,
    step,
    z_T,
    noise_at,
    num_steps,
    decode,
    latent_scale,
):
    """Draw images from words with a latent diffusion model, whatever its parts are.

    Args:
        tokens: of the captions, (B, L).
        empty_tokens: of as many empty captions, (B, L).
        encode_text: callable tokens -> what the denoiser is told.
        denoiser: callable (z_t, t, told) -> output.
        guide: callable (denoiser, said, unsaid) -> a denoiser (z_t, t) -> output; both conditions are as
            encode_text gives them, of the captions and of the empty ones.
        step: callable (denoiser, z_t, t, noise) -> z_{t-1}, with t (B,) integers.
        z_T: the noise to start from, on the diffusion's scale, (B, c, h, w).
        noise_at: callable (index) -> the noise of the step of that number, like z_T.
        num_steps: T; the steps are counted from T - 1 down to 0.
        decode: callable, latents on the first stage's own scale -> images (B, C, H, W).
        latent_scale: the diffusion's latents are the first stage's, times this number.

    Returns:
        Images (B, C, H, W).

    Source: Rombach et al. 2022, section 3; Ho and Salimans 2022, algorithm 2.
    """
    ### BEGIN SOLUTION
    said, unsaid = encode_text(tokens), encode_text(empty_tokens)
    guided = guide(denoiser, said, unsaid)
    z_0 = reverse_chain(partial(step, guided), z_T, num_steps, noise_at)
    return from_latents(decode, z_0, latent_scale)
    ### END SOLUTION


# %%
check("the_slides_checked.words_to_images", words_to_images)


# %% [markdown] tags=["core"]
# ## One line for each part
#
# Put the parts into a tuple, and one of them is exchanged by one line: `parts._replace(...)`.


# %% tags=["export"]
class Parts(NamedTuple):
    """What a text-to-image model is made of; each may be exchanged for another that is called alike.

    Fields as `words_to_images` takes them, and:
        tokenizer: callable, B texts -> tokens (B, L), on the device where the parts compute.
        shape: of the latents of one image, (c, h, w).
    """

    tokenizer: Any
    encode_text: Any
    denoiser: Any
    guide: Any
    step: Any
    num_steps: int
    decode: Any
    latent_scale: float
    shape: tuple[int, ...]


def parts_of(pipeline, w=2.0, steps=25):
    """The parts of a LatentDiffusion, this course's or a `load_stable_diffusion`.

    Args:
        pipeline: the LatentDiffusion, on the device where it stays.
        w: weight of classifier-free guidance.
        steps: of DDIM.

    Returns:
        A Parts, with classifier-free guidance and DDIM.

    Raises:
        TypeError: if steps is no int.
        ValueError: if steps is out of the pipeline's range.
    """
    device = pipeline.example().device
    return Parts(
        tokenizer=lambda texts: pipeline.text_encoder.tokenizer(texts).to(device),
        encode_text=pipeline.text_encoder,
        denoiser=pipeline.denoiser,
        guide=partial(classifier_free_guided, w=w),
        step=partial(ddim_step, pipeline.respaced(steps)),
        num_steps=steps,
        decode=pipeline.vae.decode,
        latent_scale=pipeline.latent_scale,
        shape=pipeline.latent_shape(1)[1:],
    )


@torch.no_grad()
def draw(parts, prompts, generator=None):
    """Draw an image for each prompt.

    Args:
        parts: a Parts.
        prompts: a str, or a list of B of them, none empty.
        generator: source of all noise.

    Returns:
        Images (B, C, H, W), in [-1, 1] but for small overshoots.

    Raises:
        TypeError: if prompts are no texts.
        ValueError: if there is none, or one is empty.
    """
    prompts = checked_prompts(prompts)
    tokens = parts.tokenizer(prompts)
    z_T = initial_noise((len(prompts), *parts.shape), generator, torch.empty(0, device=tokens.device))
    return words_to_images(
        tokens,
        parts.tokenizer([""] * len(prompts)),
        parts.encode_text,
        parts.denoiser,
        parts.guide,
        parts.step,
        z_T,
        lambda index: noise_like(z_T, generator),
        parts.num_steps,
        parts.decode,
        parts.latent_scale,
    )


# %%
def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


parts = parts_of(trained)
assert torch.allclose(draw(parts, prompts, seeded()), images, atol=1e-4)
print("the tuple draws what the dozen lines drew")

# %% [markdown]
# Guidance and sampler are exchanged freely, since they were never trained. For the decoder, take the cheapest that there is:
# one linear map from the four numbers of a place to a colour, fitted to the codes of 128 images by least squares. (Programs
# for Stable Diffusion show their previews so.) And for the text encoder, one of the same form that has learned nothing.

# %% slide=["# The cheapest decoder: one linear map", "[code: places .. weights =]", "From the four numbers of a place to one colour, by least squares. Previews are made so."]
pictures = load("shapes_and_scenes", "train", 64).batch(range(128))["image"]
places = (trained.encode(pictures) / trained.latent_scale).movedim(1, 3).reshape(-1, 4)  # (128 * 16 * 16, 4)
seen = nn.functional.avg_pool2d(pictures, 4).movedim(1, 3).reshape(-1, 3)  # the colour of each place
with_one = torch.cat([places, torch.ones(len(places), 1)], dim=1)  # for the constant
weights = torch.linalg.lstsq(with_one, seen).solution  # (5, 3)


def preview(latents):
    """Images (B, 3, 64, 64) of latents (B, 4, 16, 16): a colour for each place."""
    colour = latents.movedim(1, 3) @ weights[:4] + weights[4]  # (B, 16, 16, 3)
    return nn.functional.interpolate(colour.movedim(3, 1), scale_factor=4)


torch.manual_seed(0)
untrained = type(text_encoder)(tokenizer, text_encoder.width, depth=2).eval()

# %% slide=["# One line each", "[code: exchanged .. }]", "? Which of these pictures change in what they show, and which only in how?"]
exchanged = {
    "as it is": parts,
    "guidance": parts._replace(guide=partial(classifier_free_guided, w=8.0)),
    "sampler": parts._replace(step=partial(ddpm_step, few_steps)),
    "decoder": parts._replace(decode=preview),
    "text encoder": parts._replace(encode_text=untrained),
}
drawn = {name: draw(changed, prompts, seeded()) for name, changed in exchanged.items()}

# %% slide=["# Guidance, sampler and decoder are free; the text encoder is not", "[picture]", "With an untrained text encoder there are blurs of anything: the denoiser has learned to listen to one voice."] tags=["draw"]
figure = show_grid(torch.cat(list(drawn.values())), columns=4, row_titles=list(drawn), inches_per_image=1.35)
figure.set_size_inches(6.5, 6.8)  # room for the names
show(
    figure,
    "Five rows of four pictures: the same things in the first four rows, in the fourth in coarse squares; "
    "in the fifth the words are not minded.",
)

# %% [markdown]
# *Each row differs from the first by one line; none is left out.* More guidance, another sampler or a coarser decoder of the same
# codes, and the same things are shown (the small cross is not always a clear one). The text encoder is another matter: the
# denoiser has learned to listen to one voice, so the two are exchanged together, or not at all. And so it would be with another
# autoencoder, whose codes the denoiser has never seen.
#
# ### All of it exchanged
#
# The same function with the parts of chapters [02](02_unet.ipynb) to [05](05_classifier_free_guidance.ipynb): pixels in the
# place of latents, so that the first stage does nothing; class numbers in the place of words; and guidance by a classifier,
# by a CLIP, or by none of them.

# %%
unseen = load("shapes", "test")
labels = ("shape", "colour")
pixel_steps = load_diffusion("conditional_ddpm_shapes32").respace(50)
classifier, noisy_clip = load_model("noisy_classifier_shapes32"), load_model("noisy_clip_shapes32")
classes_of = load_recipe("noisy_classifier_shapes32").classes
STRENGTH = 5.0  # of both gradients, where 1 is Bayes' rule


def class_numbers(texts):
    """Shape and colour that each text names, (B, 2); 8 for what it does not name."""
    named = [[unseen.labels[label] for label in labels] for _ in texts]
    return torch.tensor(
        [
            [next((i for i, word in enumerate(words) if word in text.split()), 8) for words in both]
            for text, both in zip(texts, named)
        ]
    )


def by_classifier(network, said, unsaid):
    classes = classes_of(dict(zip(labels, said.T)))
    return classifier_guided(partial(network, cond=unsaid), classifier, classes, STRENGTH, pixel_steps)


def by_clip(network, said, unsaid):
    words = [[unseen.labels[label][i] for label, i in zip(labels, row)] for row in said.tolist()]
    features = noisy_clip.encode_text(
        noisy_clip.tokenizer([f"a {colour} {shape}" for shape, colour in words])
    )
    scale = STRENGTH * noisy_clip.logit_scale.exp().item()  # a similarity counts in units of its temperature
    return clip_guided(partial(network, cond=unsaid), noisy_clip, features, scale, pixel_steps)


# %%
of_pixels = Parts(
    tokenizer=class_numbers,
    encode_text=nn.Identity(),
    denoiser=load_model("conditional_ddpm_shapes32"),
    guide=partial(classifier_free_guided, w=0.5),
    step=partial(ddpm_step, pixel_steps),
    num_steps=50,
    decode=nn.Identity(),
    latent_scale=1.0,
    shape=(3, 32, 32),
)
wishes = [
    "a red star",
    "a yellow crescent",
    "a blue ring",
    "a green heart",
    "an orange cross",
    "a pink square",
]
by_guidance = {
    "classifier-free": draw(of_pixels, wishes, seeded()),
    "classifier": draw(of_pixels._replace(guide=by_classifier), wishes, seeded()),
    "CLIP": draw(of_pixels._replace(guide=by_clip), wishes, seeded()),
}

# %% slide=["# The same function, of pixels, with three guidances", "[picture]", "Chapters 02 to 05: the first stage does nothing, class numbers stand for words."] tags=["draw"]
figure = show_grid(
    torch.cat(list(by_guidance.values())), columns=6, titles=wishes, row_titles=list(by_guidance)
)
figure.set_size_inches(8.6, 3.9)
show(figure, "Three rows of six small pictures: a red star, a yellow crescent and so on, by three guidances.")

# %% [markdown]
# *Six wishes, three guidances, one line apart.* Where a gradient guides, now and then a shape is another one; the plot under
# *Guidance* in the ledger says about how often.
#
# ### With the parts of diffusers
#
# Nothing knows whose the parts are. Here is the configuration of Stable Diffusion 1.5 in the library *diffusers*, ten times
# narrower and with an eighth of the side, with random weights. What it draws is noise. But it draws the very noise that
# diffusers' own scheduler makes of its networks, guided in its way:

# %%
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

torch.manual_seed(0)
their_vae = AutoencoderKL(
    block_out_channels=(16, 32, 64, 64),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
    norm_num_groups=8,
    sample_size=64,
).eval()
their_unet = UNet2DConditionModel(
    sample_size=8,
    block_out_channels=(32, 64, 128, 128),
    cross_attention_dim=text_encoder.width,
    attention_head_dim=8,
    norm_num_groups=8,
).eval()
schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
theirs = DDIMScheduler(num_train_timesteps=20, set_alpha_to_one=True, **schedule)
their_diffusion = Diffusion(theirs.betas.double())  # 20 steps, all of them taken

# %% slide=["# The same lines, with the parts of diffusers", "[code: of_diffusers .. )]", "Their loop and ours agree: `guidance_scale` 7.5 is w = 6.5."]
of_diffusers = parts._replace(
    denoiser=DiffusersDenoiser(their_unet),
    decode=DiffusersVAE(their_vae).decode,
    step=partial(ddim_step, their_diffusion),
    num_steps=20,
    guide=partial(classifier_free_guided, w=6.5),
    latent_scale=their_vae.config.scaling_factor,
    shape=(4, 8, 8),
)
ours = draw(of_diffusers, prompts[:2], seeded())

guidance_scale = 7.5  # as their pipeline writes it: unconditional + scale * (conditional - unconditional)
theirs.set_timesteps(20)
loop = torch.randn(2, 4, 8, 8, generator=seeded())
with torch.no_grad():
    both = text_encoder(tokenizer(["", "", *prompts[:2]]))
    for t in theirs.timesteps:
        answers = their_unet(
            torch.cat([loop, loop]), t, both["context"], encoder_attention_mask=both["mask"]
        ).sample
        without, told = answers.chunk(2)
        loop = theirs.step(without + guidance_scale * (told - without), t, loop).prev_sample
    by_them = their_vae.decode(loop / their_vae.config.scaling_factor).sample
assert torch.allclose(ours, by_them, atol=1e-3)
print("their loop and our function draw the same:", torch.allclose(ours, by_them, atol=1e-3))

# %% [markdown] slide=["# Four verdicts", "- **holds**: as it was said", "- **holds here only**: under conditions that the slide leaves out", "- **not supported**: no source found, nothing measured speaks for it", "- **wrong**", "? '72.3 % against 68.1 %', 'four times less', '0.1 % of the parameters': which verdict do you expect?"] tags=["core"]
# ## The ledger
#
# Now the lecture itself. Each of its statements that is a number or a comparison has a row: what it says (in our words),
# what papers say, what this course has measured, a verdict, and why. *Measured here* is read from stored results by their
# names, and each verdict stands on a condition of these numbers: a new measurement that turns it over stops this notebook.
#
# - **holds**: as it was said;
# - **holds here only**: under the conditions that the row names, the paper's or ours, and not beyond them;
# - **not supported**: no source was found, and nothing measured speaks for it;
# - **wrong**.
#
# Two numbers are called different where they lie more than two standard errors apart; ± is two standard errors. The papers'
# numbers were held against the papers' own text, but those marked (s), which are as others quote them.
#
# #### Exercise 2: how much of it was true?
#
# *Question, medium, 5 minutes.* Of the statements on guidance, latent diffusion and prompt tuning (the lecture summary is
# one page), how large a share holds as it was said? Write a number between 0 and 1; within 0.15 will do.

# %% tags=["question"]
### BEGIN SOLUTION
# guidance mostly is as the slides say; of the numbers on efficiency nearly all hang on what they are compared with
share_that_holds = 0.4
### END SOLUTION

# %% slide=["# How much of it was true?", "? The lecture makes some twenty statements that are numbers or comparisons. Guess the share that holds as it was said.", "[table]", "Most of the rest is true somewhere: for one data set, one size, one rival."]
counted = count_verdicts(CLAIMS)
check_answer(
    "the_slides_checked.share_that_holds",
    share_that_holds,
    counted[Verdict.HOLDS] / len(CLAIMS),
    within=0.15,
    hint="Which of them would be true with another data set, another size, another rival?",
)
show_table([[verdict.value, count] for verdict, count in counted.items()], ["verdict", "statements"])


# %%
def show_ledger(topic):
    show_table([claim.row() for claim in CLAIMS if claim.topic == topic], COLUMNS)


# %% [markdown] slide=["# Guidance: mostly as said, one word wrong", "- A guiding classifier is trained separately: **holds**.", "- More strength, more obedience: **holds**, at a price.", "- 'Balances' two answers: **wrong**. For $w>0$ one of the weights is negative: it walks on beyond."]
# ### Guidance

# %%
show_ledger("guidance")

# %% [markdown]
# Where a picture decides: all three guidances at equal strengths, where strength 1 is Bayes' rule for each.

# %% slide=["# All guidances on one axis", "[picture]", "Obedience is bought; what is paid is the distribution. CLIP and classifier rise alike, some 8 points apart at most."]
stored = load_results("guidances_on_one_axis")
three = [
    Way("classifier", "unconditional"),
    Way("CLIP", "unconditional"),
    Way("classifier-free", "with labels"),
]
later = Way("classifier-free", "with labels", (0, 699))
assert {(run["num_samples"], run["steps"]) for run in stored["runs"]} == {(512, 50)}
show(
    draw_guidances(stored, [*three, later]),
    "Three plots against strength: the share as asked for rises, the distance and the share of large shapes "
    "rise too; without the noisiest steps the last two stay where real images are.",
)

# %% [markdown]
# *Bars are two standard errors; 512 samples a point, 50 ancestral steps.* CLIP and classifier rise alike: at 1 and 2 the
# classifier is 8 points ahead, at 5 and 9 they tie; at 9 the CLIP draws fewer large shapes. Two answers of one network obey
# at once; all three pay with the distribution: they draw large shapes, of which class and words are surest. For the two
# answers at $w=4$, the one case that was measured here, the price is not paid if the noisiest steps are left out, where it is
# decided how large a shape becomes ([chapter 05](05_classifier_free_guidance.ipynb)).

# %% [markdown] slide=["# Latent diffusion: four times, against whom?", "- The paper: 3.9 times on one data set, 3.5 on another, 2.7 between models of one size.", "- 'Four times less' and '75 % less' are one claim.", "- Against a pixel model that folds pixels, much less is saved."]
# ### Latent diffusion

# %%
show_ledger("latent diffusion")

# %% slide=["# What latents save depends on the rival", "[picture]", "The dashed line is the lecture's factor of four."] tags=["draw"]
of_step = load_results("pixel_against_latent")["costs"]["models"]
rivals = {name: cost for name, cost in of_step.items() if name.startswith("pixels")}
costs = {
    "operations\nof a step": "gflops_per_step",
    "time\nof a step": "seconds_per_step",
    "memory kept\nin a step": "activation_bytes",
    "time of\nsampling": "sampling_seconds_per_image",
}
figure, axis = plt.subplots(figsize=(8.6, 3.3), layout="constrained")
factors = {
    name: [cost[key] / of_step["latents, f = 4"][key] for key in costs.values()]
    for name, cost in rivals.items()
}
assert min(factors["pixels"]) > 4 and max(factors["pixels, 4 x 4 folded"]) < 1.2
assert 1.5 < min(factors["pixels, 2 x 2 folded"]) and max(factors["pixels, 2 x 2 folded"]) < 2.5
for number, (name, heights) in enumerate(reversed(factors.items())):
    bars = axis.bar(
        [place + 0.27 * number for place in range(len(costs))],
        heights,
        0.25,
        label=name,
        color=colours[number],
    )
    axis.bar_label(bars, [f"{height:.1f}" for height in heights])
axis.axhline(4, color="black", linestyle="--", label="the lecture's factor")
axis.set_xticks([place + 0.27 for place in range(len(costs))], list(costs))
axis.set(ylabel="times that of latents", ylim=(0, 8.5))
axis.grid(False, axis="x")
axis.legend(loc="upper left", ncols=3)
show(
    figure,
    "Bars of four costs of three pixel models in units of latents with f = 4: above four for plain pixels, about two "
    "for pixels folded two by two, one for four by four.",
)

# %% [markdown]
# *Batches of 64 on one core; latents with $f=4$.* Against plain pixels all four factors are above four, against pixels folded two
# by two about two; folded four by four, they cost nearly the same. What a picture costs, and not a step, is in [chapter
# 07](07_latent_diffusion.ipynb): it depends on how quality is measured.

# %% [markdown] slide=["# Prompt tuning: numbers with conditions", "- 0.1 %: shallow or short prompts, without the head. 100 to 1000 times less: these, with a small head.", "- Nothing forgotten: **holds**, with the prompts taken out.", "- 72.3 against 68.1 on aircraft: no source. The paper never used these pictures.", "- The comment 'frozen' freezes nothing: **wrong**."]
# ### Prompt tuning

# %%
show_ledger("prompt tuning")

# %% slide=["# Better than a probe trained as long, or level; behind full fine-tuning, or level", "[picture]", "Bars are two standard errors. In the paper, with a large backbone, prompts are ahead of full fine-tuning on 20 of 24 tasks, which are other ones."] tags=["draw"]
adapted = [load_results(name) for name in ADAPTED]
assert [{run["tested"] for run in result["runs"]} for result in adapted] == [{304}] + 6 * [{1000}]
assert {len(run["accuracy"]) for result in adapted for run in result["runs"]} == {3}
figure, axis = plt.subplots(figsize=(8.6, 3.6), layout="constrained")
for (other, label), colour, marker in zip(
    (("linear", "than the linear probe"), ("full", "than full fine-tuning")), colours, "os"
):
    tasks, values, errors = zip(*differences(adapted, "vpt-deep", other))
    axis.errorbar(
        [100 * value for value in values],
        [task.replace("_", " ") for task in tasks],
        xerr=[200 * error for error in errors],
        fmt=marker,
        capsize=3,
        color=colour,
        label=label,
    )
axis.axvline(0, color="black", linewidth=0.8)
axis.set(xlabel="deep prompts are more accurate by, in points")
axis.invert_yaxis()
axis.legend(loc="center left")
show(
    figure,
    "For seven tasks how much more accurate deep prompts are: a little above zero against the probe, below it against full fine-tuning.",
)

# %% [markdown]
# *Three seeds; 304 test images of the digits, 1000 of the others.* Ahead of the trained probe, or level; behind full
# fine-tuning, or level. The paper's backbone is some 45 times larger, and was trained on 14 million pictures with labels. What
# of this makes the difference is not told apart here. That tasks are far from photographs cannot be all: some of the
# paper's are, too.

# %% [markdown] tags=["core"]
# ## Text to image, for real
#
# *Built*: all of it, small ([chapters 01](01_ddpm.ipynb) to [07](07_latent_diffusion.ipynb)). *For real*: the parts of Stable
# Diffusion by name, with this course's sampler and guidance. It takes diffusers and transformers (`make lab` has installed
# both; else `pip install -e '.[stable]'` in the course's folder) and a connection, the first time for some four gigabytes; a
# GPU makes it seconds instead of minutes.
#
# ```python
# stable = load_stable_diffusion("stable-diffusion-v1-5/stable-diffusion-v1-5").to("cuda")  # without a GPU leave out .to
# stable("a photograph of an astronaut riding a horse", steps=30, w=6.5)[0].save("astronaut.png")
#
# parts = parts_of(stable, w=6.5, steps=30)
# later = parts._replace(guide=partial(classifier_free_guided, w=6.5, interval=(0, 699)))  # one line
# images = draw(later, ["a photograph of an astronaut riding a horse"], seeded())
# ```
#
# The course was made without a connection, so the pretrained weights were never run here. What is tested: random weights in
# this very configuration, scaled down, saved as diffusers and transformers save them, loaded by name, and drawn as
# diffusers' own pipeline draws them. Without connection, weights or library it says so:

# %% slide=["# The real one: five parts by name", "`stable = load_stable_diffusion('stable-diffusion-v1-5/stable-diffusion-v1-5')`", "`stable('a photograph of an astronaut', steps=30, w=6.5)`", "- our sampler and guidance, their U-Net, autoencoder and CLIP", "- tested with random weights of this configuration; the real ones were not run here"]
try:
    load_stable_diffusion("./not/here")
except (ImportError, ValueError) as error:
    is_clear = "transformers" in str(error) or "could not be read" in str(error)
    print("refused, with a word why:", is_clear)
    assert is_clear
else:
    raise AssertionError("not refused")

# %% [markdown] tags=["optional"]
# ## Medical images, command by command *(at a second reading)*
#
# *Built*: [chapter 08](08_visual_prompt_tuning.ipynb). *For real*: chest X-rays of children, with pneumonia or without, by
# Kermany, Zhang and Goldbaum 2018 (5,856 JPEG files, a folder for each class, CC BY 4.0). Fetch `ChestXRay2017.zip`, 1.2 GB, in
# a browser from DOI 10.17632/rscbjbr9sj.2 (the version with this file), and then:
#
# ```bash
# unzip ChestXRay2017.zip                        # chest_xray/train/NORMAL/*.jpeg, .../PNEUMONIA/*.jpeg, test alike
# ```
#
# Before anything is trained: **a patient belongs into one split**. Many children have several pictures. If the same child is
# in training and validation, it is recognised, and the learning rate is chosen by that. (The folder `test` holds other
# children.) The child's number stands in a file's name, but not in all copies alike: look at yours.


# %%
def patient_of(file):
    """The first number in a picture's name; whom two ways of counting call alike, stays together, too."""
    return re.search(r"\d+", file.name.removeprefix("NORMAL2-"))[0]


names_seen = ["person63_bacteria_306.jpeg", "BACTERIA-7422-0001.jpeg", "NORMAL2-IM-0329-0001.jpeg"]
print([patient_of(Path(name)) for name in names_seen])


# %% slide=["# Medical images: first of all, patients", "[code split_by_patient: patients = .. return]", "A child that is in training and in test is recognised, and not diagnosed."] tags=["export"]
def split_by_patient(files, patient_of, share):
    """Choose files for a split of their own, with all files of a patient or none.

    Args:
        files: paths or names.
        patient_of: callable, a file -> whom it shows, any value that can be compared with others.
        share: of the patients, in (0, 1); the patients are those that come first in a fixed shuffled order.

    Returns:
        The list of the files of these patients, at least one patient, and not all, in the order of files.

    Raises:
        ValueError: if share lies outside (0, 1), or there are fewer than two patients.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must lie in (0, 1); got {share}")
    patients = sorted({patient_of(file) for file in files})
    if len(patients) < 2:
        raise ValueError(f"files must show two patients at least; got {len(patients)}")
    order = torch.randperm(len(patients), generator=torch.Generator().manual_seed(0))
    count = min(max(1, round(share * len(patients))), len(patients) - 1)
    chosen = {patients[index] for index in order[:count]}
    return [file for file in files if patient_of(file) in chosen]


# %%
def set_aside(root, share):
    """Move the pictures of a share of the patients from root/train to root/validation, class by class."""
    for file in split_by_patient(sorted((root / "train").glob("*/*.*g")), patient_of, share):  # jpeg, png
        target = root / "validation" / file.parent.name / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        file.rename(target)


def rates(lines):
    """Sensitivity, specificity and accuracy, as counts, by lines such as `test/NORMAL/a.png: PNEUMONIA 98.2%`."""
    answers = [line.rpartition(": ") for line in lines]
    is_ill = torch.tensor([Path(file).parent.name != "NORMAL" for file, _, _ in answers])
    is_called_ill = torch.tensor([not answer.startswith("NORMAL") for _, _, answer in answers])
    return [
        f"{is_called_ill[is_ill].sum()} of {is_ill.sum()}",
        f"{(~is_called_ill[~is_ill]).sum()} of {(~is_ill).sum()}",
        f"{(is_called_ill == is_ill).float().mean():.0%}",
    ]


# %% [markdown]
# All of it in order, in this notebook's folder: Python in a cell, the rest in a terminal. The backbone of timm, 410 MB, is
# fetched on the way. (No `--augment`: a mirrored chest has its heart on the wrong side.)
#
# ```python
# set_aside(Path("chest_xray"), share=0.1)
# ```
#
# ```bash
# python -m lecture26 adapt --backbone vit_base_patch16_224.augreg_in21k --data ./chest_xray \
#     --method vpt-deep --prompts 10 --steps 2000 --seeds 3 --name chest
# python -m lecture26 classify --task chest chest_xray/test/*/*.jpeg > named.txt
# ```
#
# ```python
# rates(Path("named.txt").read_text().splitlines())
# ```
#
# Here all of it runs on a stand-in: films made by code, with a nodule or without, and our small backbone. Its patients are
# names, three films each that have nothing in common. It shows that the commands run and how to read what comes out; it
# shows nothing of lungs, nor of prompts on real films.

# %%
temporary = TemporaryDirectory()
root = Path(temporary.name)
for split, count in (("train", 300), ("test", 100)):
    batch = downstream("xray", split).batch(range(count))
    for index, (image, place) in enumerate(zip(batch["image"], batch["class"].tolist())):
        folder = root / "chest" / split / ("NODULE" if place else "NORMAL")
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"person{index // 3}_film_{index}.png"
        save_image(image, file, normalize=True, value_range=(-1, 1))

set_aside(root / "chest", share=0.2)
patients, counts = {}, []
for split in ("train", "validation", "test"):
    pictures_of_split = list((root / "chest" / split).rglob("*.png"))
    patients[split] = set(map(patient_of, pictures_of_split))
    counts.append([split, len(patients[split]), len(pictures_of_split)])
assert patients["train"].isdisjoint(patients["validation"])
show_table(counts, ["split", "patients", "films"])


# %%
def run(*words):
    """Run a command of the course on one thread, with a data folder of its own; what it prints."""
    there = {"LECTURE26_DATA": str(root / "data"), "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lecture26", *map(str, words)]
    done = subprocess.run(command, env=os.environ | there, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


chest = ["--data", root / "chest", "--method", "vpt-deep", "--prompts", 8, "--name", "chest"]
budget = ["--steps", 150, "--batch-size", 16, "--learning-rate", 0.03, "--precision", "fp32"]
adapted_lines = run("adapt", "--backbone", "vit_photos32", *chest, *budget)
named = run("classify", "--task", "chest", *sorted((root / "chest/test").rglob("*.png")))
temporary.cleanup()
print("adapted:", adapted_lines[0].startswith("vpt-deep"), "· named:", len(named))

# %% [markdown]
# Accuracy hides what matters where one class is rare: of the ill, how many were found (**sensitivity**), and of the healthy, how
# many were left alone (**specificity**)? As a control, a judge who calls everybody ill.

# %% slide=["# Look at sensitivity and specificity", "[table]", "Whoever calls everybody ill is right four times out of five, and has a specificity of zero."] tags=["nbval-ignore-output"]
all_ill = [line.rpartition(": ")[0] + ": NODULE" for line in named]
judges = [["adapted, 150 steps", *rates(named)], ["calls everybody ill", *rates(all_ill)]]
show_table(judges, ["judge", "sensitivity", "specificity", "accuracy"])

# %% [markdown]
# In accuracy the two are not far apart; specificity says what is still missing. And both move with the threshold, here one
# half. (Nobody should be diagnosed with any of this.)

# %% [markdown] tags=["core"]
# ## Many tasks from one backbone
#
# *Built*: `PromptBank`, [chapter 08](08_visual_prompt_tuning.ipynb). *For real*: requests arrive one by one, each an image
# and a task; a server collects what is waiting into a batch, answers it in one pass, and hands each answer back. Twenty
# lines, and they do not know whether a bank answers or a network for each task.


# %% slide=["# A server is a loop", "[code serve: is_open = True .. is_open = batch]", "Wait for one request, take what else is waiting, answer in one pass, hand back."] tags=["export"]
class Request(NamedTuple):
    """What a server is asked: an image (C, H, W), the name of its task, and where the answer goes."""

    image: torch.Tensor
    task: str
    reply: Future


def serve(requests, answer, batch_size):
    """Answer requests in batches until a None arrives; an error is handed to those whose batch it struck.

    Args:
        requests: a queue.Queue of Request, and of None to end.
        answer: callable (images (B, C, H, W), B names of tasks) -> B answers, such as a PromptBank.
        batch_size: at most so many are answered at once; fewer, where no more are waiting.

    Raises:
        TypeError: if batch_size is no int.
        ValueError: if it is below 1.
    """
    check_positive_int("batch_size", batch_size)
    is_open = True
    while is_open:
        batch = [requests.get()]  # wait for one, and take what else is there
        while batch[-1] is not None and len(batch) < batch_size and not requests.empty():
            batch.append(requests.get())
        is_open = batch[-1] is not None
        # the None is left out, and whoever waits no more
        batch = [one for one in batch if one is not None and one.reply.set_running_or_notify_cancel()]
        try:
            with torch.inference_mode():
                images = torch.stack([request.image for request in batch]) if batch else None
                answers = answer(images, [request.task for request in batch]) if batch else []
            answered = list(zip(batch, answers, strict=True))
        except Exception as error:
            for request in batch:
                request.reply.set_exception(error)
        else:
            for request, one in answered:
                request.reply.set_result(one)


class SeparateModels:
    """A network for each task, behind the interface of a PromptBank.

    Args:
        models: callables images -> logits, by the task's name.
    """

    def __init__(self, models):
        self.models = models

    def __call__(self, images, names):
        """Map images (B, C, H, W) and B names to a list of B logits; each network gets its own images."""
        answers = [None] * len(names)
        for name in dict.fromkeys(names):
            rows = [row for row, other in enumerate(names) if other == name]
            for row, logits in zip(rows, self.models[name](images[rows]), strict=True):
                answers[row] = logits
        return answers


# %%
vit = load_model("vit_photos32")
names = [f"task {number}" for number in range(10)]
bank = PromptBank(vit)
for seed, name in enumerate(names):
    bank.add(name, build("vpt-deep", vit, 10, num_prompts=8, seed=seed).eval())
copies = SeparateModels({name: full_fine_tune(vit, 10).eval() for name in names})

asked = [names[number % 10] for number in torch.randint(1000, (192,), generator=seeded()).tolist()]
photographs = torch.randn(192, 3, 32, 32, generator=seeded(1))


def served(answer):
    """Answers to all requests, and requests answered a second."""
    requests = Queue()
    server = threading.Thread(target=serve, args=(requests, answer, 64))
    begun = time.perf_counter()
    server.start()
    replies = [Future() for _ in asked]
    for image, name, reply in zip(photographs, asked, replies):
        requests.put(Request(image, name, reply))
    requests.put(None)
    answers = [reply.result(timeout=600) for reply in replies]
    server.join()
    return answers, len(asked) / (time.perf_counter() - begun)


answers, rate_of_bank = served(bank)
_, rate_of_copies = served(copies)
with torch.inference_mode():
    alone = torch.stack([bank(photographs[[i]], [asked[i]])[0] for i in (0, 7, 100)])
assert torch.allclose(alone, torch.stack([answers[i] for i in (0, 7, 100)]), atol=1e-4)
print("each request got the answer of its own task, whatever it was batched with")

# %% tags=["nbval-ignore-output"]
served_rates = [["bank", f"{rate_of_bank:.0f}"], ["a network for each task", f"{rate_of_copies:.0f}"]]
show_table(served_rates, ["ten tasks, 192 requests, one run", "requests a second, just now"])

# %% [markdown]
# #### Exercise 3: a hundred tasks
#
# *Question, medium, 5 minutes.* A server shall hold 100 tasks on a ViT-B/16 ($M=85.8$ million parameters, $d=768$, 12
# blocks): ten prompts at each block, and a head of 10 classes. By what factor is its memory smaller than that of 100
# fine-tuned networks, head included? Within 5 will do.

# %% tags=["question"]
### BEGIN SOLUTION
# a task is 12 * 10 * 768 + 769 * 10, about 0.1 million; 100 networks are 8580, backbone and tasks 85.8 + 10
times_less_memory = 90
### END SOLUTION

# %% slide=["# A hundred tasks on one backbone", "? ViT-B/16, ten prompts at each of 12 blocks, ten classes, a hundred tasks: how many times less memory than a hundred networks?", "A single task is 860 times smaller. But the backbone is kept, so a hundred tasks save at most a hundred times: about 90."]
backbone, task = 85.8e6, 12 * 10 * 768 + 769 * 10
check_answer(
    "the_slides_checked.times_less_memory",
    times_less_memory,
    100 * (backbone + 769 * 10) / (backbone + 100 * task),
    within=5,
    hint="The backbone is kept once, and belongs into the sum.",
)

# %% [markdown]
# The lecture's 100 to 1000 times is what *one more* task saves. A server keeps the backbone, so $T$ tasks save at most $T$
# times. By `benchmarks/serving.py`, on one thread, with up to 64 requests in a batch; time is the median of alternating runs,
# memory that of all parameters. Each cell says bank / networks; the last column is the median of the ratios of paired runs, which
# need not be the ratio of the medians beside it:

# %% slide=["# Memory is what a bank saves", "[table]", "Each further task is some kilobytes. Time is saved where batches would be small."]
serving = load_results("benchmark_serving")
rows = [
    [
        run["tasks"],
        f"{run['memory_bytes']['bank'] / 1e6:.0f} / {run['memory_bytes']['separate'] / 1e6:.0f}",
        f"{run['requests_per_second']['bank']:.0f} / {run['requests_per_second']['separate']:.0f}",
        f"{run['separate_over_bank']['median']:.2f}",
    ]
    for run in serving["runs"]
]
show_table(
    rows,
    ["tasks", "MB", "requests a second", "networks' time / bank's"],
)

# %% [markdown]
# With few tasks the networks are some 15 to 30 % faster: prompts are tokens that each image pays for. With fifty, each
# network sees an image or two of a batch at a time, and the bank is level or ahead. A GPU, which wants large batches, should
# widen that; it was not tried here.

# %% [markdown] tags=["optional"]
# ## Where to go next *(at a second reading)*
#
# Each of these changes one line of the miniature, and most of them need its denoiser trained anew.

# %% slide=["# Where to go next: each exchanges one part", "- **flow matching**: straight lines from noise to data", "- **solvers**: more from each step", "- **distillation**: a student takes many steps in a few", "- **transformers** in the place of the U-Net", "- **preference tuning**: what people like better", "The chapter has a paper for each."]
signposts = [
    ["flow matching", "the forward process and the target: straight lines from noise to data", "denoiser, trained anew", "Lipman et al. 2023, *Flow Matching for Generative Modeling*"],
    ["faster solvers", "more than one evaluation's worth from each step", "step", "Lu et al. 2022, *DPM-Solver*; Karras et al. 2022, *Elucidating the Design Space* (EDM)"],
    ["distillation", "a student takes the teacher's many steps in a few", "denoiser, trained by another", "Salimans and Ho 2022, *Progressive Distillation*; Song et al. 2023, *Consistency Models*"],
    ["transformers as denoisers", "patches of latents as tokens, in the place of the U-Net", "denoiser, trained anew", "Peebles and Xie 2023, *Scalable Diffusion Models with Transformers* (DiT)"],
    ["preference tuning", "what people like better, in the place of what data show", "denoiser, trained on", "Wallace et al. 2024, *Diffusion Model Alignment Using Direct Preference Optimization*"],
    ["other guidances", "a worse model of the same kind in the place of the empty caption", "guide", "Karras et al. 2024, *Guiding a Diffusion Model with a Bad Version of Itself*"],
    ["low-rank adaptation", "small matrices added to the weights, in the place of prompts", "backbone or denoiser", "Hu et al. 2022, *LoRA*"],
]  # fmt: skip
show_table(signposts, ["what", "what it changes", "which part", "begin with"])

# %% [markdown] tags=["core"]
# ## Your code runs the model
#
# Save this notebook, call `make mine` in a terminal, and run the next cell: it draws with your functions, as at the
# [end of chapter 01](01_ddpm.ipynb), and says which of them were called: the assembly of this chapter, and in it your
# sampler, your guidance and your boundaries of the latent space, if you have solved these.

# %% tags=["milestone", "nbval-ignore-output"]
from lecture26.kit.own_package import show_milestone

show_milestone(
    "milestone the_slides_checked",
    alt="Three rows of four pictures of shapes after captions: by DDIM, by DDPM, and with more guidance.",
)

# %% [markdown] tags=["core"]
# ## What the lecture's slide says
#
# The last slide names three applications. *Stable Diffusion is latent diffusion with classifier-free guidance*: so it is, and
# a text encoder that learned its words elsewhere; the first dozen lines of this chapter are its skeleton. *Medical imaging
# with VPT*: the commands are above, and so is what no command can do, the patients. *Many tasks on a single backbone*: a
# bank and a loop.

# %% [markdown] tags=["core"]
# ## Summary
#
# - A text-to-image model is tokenizer, text encoder, denoiser, guidance, sampler and first stage, which agree on shapes and
#   on one scale. Guidance and sampler are free. Text encoder and first stage go with the denoiser, which has learned their
#   vectors and their codes; only a decoder of the same codes can be exchanged.
# - A factor is no property of a method: it has a data set, a size and a rival. Ask for all three.
# - Guidance buys obedience with the distribution; for classifier-free guidance, where in the noise one guides decides what is
#   paid.
# - Prompts save storage by construction and forget nothing; how accurate they are depends on backbone and task, and on
#   whether the probe beside them was trained to its end.
# - $T$ tasks on one backbone save at most $T$ times.
# - Where no source is found, say so.
#
# What you have solved, in all chapters:

# %% slide=["# What to remember", "- Six parts that agree on shapes, on one scale, on what a code means.", "- A factor has a data set, a size and a rival.", "- Obedience is paid for with the distribution.", "- $T$ tasks on one backbone save at most $T$ times.", "- Where no source is found, say so."] tags=["nbval-ignore-output"]
progress()

# %% [markdown]
# [Previous: 08 Visual prompt tuning](08_visual_prompt_tuning.ipynb)
#
# ## References
#
# - Dhariwal, Nichol 2021, *Diffusion Models Beat GANs on Image Synthesis*: section 4, table 4 (3 in the proceedings).
# - Nichol, Dhariwal, Ramesh et al. 2022, *GLIDE*: section 2.4.
# - Ho, Salimans 2022, *Classifier-Free Diffusion Guidance*: section 3.2, tables 1 and 2.
# - Bansal, Chu, Schwarzschild et al. 2023, *Universal Guidance for Diffusion Models*: section 3.
# - Rombach, Blattmann, Lorenz, Esser, Ommer 2022, *High-Resolution Image Synthesis with Latent Diffusion Models*: section 3,
#   tables 6 and 18.
# - Jia, Tang, Chen, Cardie, Belongie, Hariharan, Lim 2022, *Visual Prompt Tuning*: sections 3 and 4, figure 4, tables 1, 2, 4
#   and 14.
# - Kermany, Goldbaum, Cai et al. 2018, *Identifying Medical Diagnoses and Treatable Diseases by Image-Based Deep
#   Learning* (the chest X-rays).
