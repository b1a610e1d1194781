"""The milestone of chapter 09: all parts together."""

from functools import partial
from typing import TYPE_CHECKING

import torch

from lecture26.ddpm import ddpm_step
from lecture26.kit.figures import show_grid
from lecture26.recipes.latent import load_pipeline
from lecture26.the_slides_checked import draw, parts_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPTIONS = (
    "a large yellow star on a striped background",
    "a small red heart to the left of a large blue ring on a dark background",
    "a large green crescent on a checkered background",
    "a small purple cross above a large orange circle on a light background",
)
STEPS = 25


def assembled() -> tuple["Figure", str]:
    """What the trained parts draw of four captions, and again with another sampler and with more guidance."""
    pipeline = load_pipeline("text_to_image_shapes64")
    parts = parts_of(pipeline, steps=STEPS)
    rows = {
        "DDIM, $w=2$": parts,
        "DDPM, $w=2$": parts._replace(step=partial(ddpm_step, pipeline.respaced(STEPS))),
        "DDIM, $w=8$": parts_of(pipeline, w=8.0, steps=STEPS),
    }
    images = [draw(changed, CAPTIONS, torch.Generator().manual_seed(0)) for changed in rows.values()]
    figure = show_grid(torch.cat(images), len(CAPTIONS), row_titles=list(rows), inches_per_image=1.6)
    figure.set_figwidth(figure.get_figwidth() + 1.2)  # room for the names
    return figure, f"{len(CAPTIONS)} captions drawn in {len(rows)} ways by {STEPS} steps"
