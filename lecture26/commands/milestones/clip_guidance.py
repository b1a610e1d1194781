"""The milestone of chapter 04: sentences."""

from typing import TYPE_CHECKING

import torch

from lecture26.clip_guidance import CLIP, Tokenizer, clip_guided, contrastive_step, cosine_similarity_matrix
from lecture26.ddpm import ddpm_step, sample
from lecture26.kit.data import load
from lecture26.kit.figures import show_grid
from lecture26.recipes import load_diffusion, load_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLIP_TRAINING_STEPS = 40
PAIRS = 64  # images with their captions, in a batch and for the test
PROMPTS = (
    "a large red star on a dark background",
    "a small blue ring on a light background",
    "a large green cross on a striped background",
    "a large pink crescent on a checkered background",
    "a yellow heart",
    "a small cyan square",
)
CLIPS = {"x_t": ("noisy_clip_shapes32", 400.0), "x_0": ("clip_shapes32", 800.0)}  # with their scales


def sentences() -> tuple["Figure", str]:
    """A CLIP that is trained here, and pictures for sentences by the long-trained ones, in both ways."""
    unet, diffusion = load_model("ddpm_shapes32"), load_diffusion("ddpm_shapes32")
    drawn = []
    for through, (name, scale) in CLIPS.items():
        clip = load_model(name)
        with torch.no_grad():
            text_features = clip.encode_text(clip.tokenizer(PROMPTS))
        guided = clip_guided(unet, clip, text_features, scale, diffusion, through)
        generator, shape = torch.Generator().manual_seed(5), (len(PROMPTS), 3, 32, 32)
        drawn.append(sample(diffusion.respace(50), guided, shape, ddpm_step, generator, progress=False))
    losses, found = trained_on_captions(clip.tokenizer)
    titles = [prompt[2:].replace(" on a ", "\non a ").replace(" background", "") for prompt in PROMPTS]
    figure = show_grid(torch.cat(drawn), len(PROMPTS), titles, list(CLIPS), inches_per_image=1.6)
    figure.set_figheight(figure.get_figheight() + 0.7)  # room for the titles
    told = (
        f"a CLIP after {len(losses)} steps: loss {losses[0]:.1f} to {losses[-1]:.1f}, "
        f"{found} of {PAIRS} captions found"
    )
    figure.suptitle(f"pictures for sentences; {told}", fontsize="medium")
    return figure, f"{len(PROMPTS)} prompts in two ways; {told}"


def trained_on_captions(tokenizer: Tokenizer) -> tuple[list[float], int]:
    """The losses of a small CLIP's training, and how many of PAIRS unseen images find their caption."""
    images, unseen, clip = load("shapes"), load("shapes", "test"), CLIP(tokenizer)
    optimizer = torch.optim.AdamW(clip.parameters(), lr=1e-3)
    losses = []
    for batch in torch.arange(CLIP_TRAINING_STEPS * PAIRS).split(PAIRS):
        x, tokens = images.batch(batch)["image"], tokenizer(images.captions(batch))
        loss = contrastive_step(optimizer, clip.encode_image, clip.encode_text, x, tokens, clip.logit_scale)
        losses.append(loss.item())
    with torch.no_grad():
        texts = clip.encode_text(tokenizer(unseen.captions(range(PAIRS))))
        similarity = cosine_similarity_matrix(
            clip.encode_image(unseen.batch(range(PAIRS))["image"]), texts
        )  # (PAIRS, PAIRS)
    return losses, int((similarity.argmax(dim=1) == torch.arange(PAIRS)).sum())
