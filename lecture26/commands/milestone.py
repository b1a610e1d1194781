"""The command `milestone`: what a chapter's functions reach together, where no other command draws it."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import typer

from lecture26.commands.milestones import (
    classifier_guidance,
    clip_guidance,
    ddpm,
    latent_diffusion,
    the_slides_checked,
    vae,
    visual_prompt_tuning,
)
from lecture26.commands.sample import check_can_be_written
from lecture26.kit.figures import use_style
from lecture26.kit.paths import expanded

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MILESTONES: dict[str, Callable[[], tuple["Figure", str]]] = {
    "ddpm": ddpm.points,
    "classifier_guidance": classifier_guidance.stars,
    "clip_guidance": clip_guidance.sentences,
    "vae": vae.codes,
    "latent_diffusion": latent_diffusion.pictures_from_words,
    "visual_prompt_tuning": visual_prompt_tuning.prompts,
    "the_slides_checked": the_slides_checked.assembled,
}


def milestone(chapter: str, out: Path) -> None:
    """Draw a chapter's milestone, save it as a picture, and say what it shows.

    Args:
        chapter: one of MILESTONES.
        out: the picture to write.

    Raises:
        ValueError, OSError: if the picture cannot be written.
    """
    from matplotlib import pyplot as plt

    out = expanded(out)
    check_can_be_written(out)
    use_style()
    torch.manual_seed(0)
    figure, told = MILESTONES[chapter]()
    figure.savefig(out)
    plt.close(figure)
    typer.echo(f"{told}: {out}")
