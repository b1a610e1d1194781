"""The milestone of chapter 07: pictures from words."""

from typing import TYPE_CHECKING

import torch

from lecture26.kit.data import load
from lecture26.kit.figures import show_grid
from lecture26.kit.sample_draws import SampleDraws
from lecture26.latent_diffusion import (
    LatentDiffusion,
    captioned_training_step,
    recorded_weights,
    to_latents,
    word_maps,
)
from lecture26.recipes import Trained
from lecture26.recipes.latent import pipeline_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SENTENCES = (
    "a large yellow star on a striped background",
    "a small red heart to the left of a large blue ring on a dark background",
    "a small blue heart to the left of a large red ring on a dark background",
    "a large cyan cross above a small orange circle on a checkered background",
)
SHOWN_WORDS = {4: "heart", 12: "ring", 15: "dark"}  # by their tokens in the second sentence
DRAWING_STEPS = 15
CAPTION_STEPS = 20  # of training
CAPTION_BATCH = 16


@torch.no_grad()
def pictures_from_words() -> tuple["Figure", str]:
    """Pictures from sentences, maps of words, a picture from a picture, and a half of one drawn anew."""
    pipeline = pipeline_of(Trained("text_to_image_shapes64"))

    def seeds(count: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in range(count)]

    drawn = pipeline.text_to_image(list(SENTENCES), steps=DRAWING_STEPS, generator=seeds(4), progress=False)
    with recorded_weights(pipeline.denoiser) as recorded:
        scene = pipeline.text_to_image(
            SENTENCES[1], w=0.0, steps=DRAWING_STEPS, generator=seeds(1), progress=False
        )
    layers = [word_maps(weights, 8, 8) for weights in recorded if weights.shape[2] == 64]
    maps = torch.stack(layers).mean(dim=0)[0, list(SHOWN_WORDS)]  # (3, 8, 8)
    maps = 2 * maps / maps.amax(dim=(1, 2), keepdim=True) - 1
    maps = maps.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)[:, None].expand(-1, 3, -1, -1)
    redrawn = pipeline.image_to_image(
        drawn[:1], "a large blue heart on a light background", 0.9, steps=DRAWING_STEPS, generator=seeds(1)
    )
    right_half = torch.zeros(1, 1, *drawn.shape[2:], dtype=torch.bool)
    right_half[..., drawn.shape[3] // 2 :] = True
    half = pipeline.inpaint(drawn[1:2], right_half, SENTENCES[1], steps=DRAWING_STEPS, generator=seeds(1))
    titles = [
        "star",
        "heart, ring",
        "colours exchanged",
        "cross, circle",
        "image to image",
        "right half anew",
    ]
    titles += ["scene", *(f"'{word}'" for word in SHOWN_WORDS.values())]
    figure = show_grid(torch.cat([drawn, redrawn, half, scene, maps]), 5, titles, inches_per_image=1.5)
    figure.set_figheight(figure.get_figheight() + 0.8)  # room for the titles
    first, last = losses_with_captions(pipeline)
    told = f"a small model's loss in {CAPTION_STEPS} steps with captions: from {first:.2f} to {last:.2f}"
    figure.suptitle(told, fontsize="medium")
    return figure, f"{len(SENTENCES)} sentences, drawn in {DRAWING_STEPS} steps"


def losses_with_captions(trained: LatentDiffusion) -> tuple[float, float]:
    """A small model's loss with captions, of the first and the last steps of a moment's training (means)."""
    settings = trained.settings | {
        "unet": {"base_channels": 32, "channel_multipliers": (1, 2), "num_blocks": 1},
        "text": {"width": 48},
    }
    learner = LatentDiffusion.from_settings(settings)
    images = load("shapes_and_scenes", "train", learner.image_size)
    indices = torch.arange(4 * CAPTION_BATCH)
    mean, log_variance = trained.vae.encode(images.batch(indices)["image"])
    tokenizer = learner.text_encoder.tokenizer
    captions, empty = tokenizer(images.captions(indices)), tokenizer([""])[0]
    optimizer = torch.optim.AdamW([p for p in learner.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for number in range(CAPTION_STEPS):
        random = SampleDraws(0, torch.arange(CAPTION_BATCH * number, CAPTION_BATCH * (number + 1)))
        chosen, shape = random.integers(len(indices)), mean.shape[1:]
        z_0 = to_latents(mean[chosen], log_variance[chosen], random.normal(*shape), learner.latent_scale)
        with torch.enable_grad():
            loss = captioned_training_step(
                optimizer,
                learner.diffusion.loss,
                learner.denoiser,
                learner.text_encoder,
                z_0,
                captions[chosen],
                empty,
                random.uniform(),
                0.1,
                random.integers(learner.diffusion.num_steps),
                random.normal(*shape),
            )
        losses.append(loss.item())
    return sum(losses[:5]) / 5, sum(losses[-5:]) / 5
