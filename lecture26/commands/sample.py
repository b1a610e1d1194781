"""The command `sample`: images drawn from a trained model, as one grid."""

import math
from functools import partial
from pathlib import Path

import torch
import typer

from lecture26.commands.drawing import Drawing
from lecture26.commands.steering import OPTIONS, WORDS, choose
from lecture26.ddpm import ddim_step, ddpm_step
from lecture26.kit.files import check_writable
from lecture26.kit.processes import process_state
from lecture26.recipes import Trained

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def sample(
    model: str | None,
    out: Path,
    *,
    steps: int,
    sampler: str,
    eta: float,
    count: int,
    seed: int,
    guidance: str | None,
    asked: dict[str, str | float | None],
) -> None:
    """Draw images from a trained model, save them as one grid, and say what they are.

    Args:
        model: a checkpoint; None for that of a prompt by itself.
        out: the picture to write.
        steps: of denoising.
        sampler: "ddim" or "ddpm".
        eta: the fresh noise of DDIM.
        count: how many images.
        seed: of all noise.
        guidance: a name of `lecture26.commands.steering`, or None.
        asked: a value, or None, for each of the OPTIONS there.

    Raises:
        ValueError: on options that do not go together, or do not suit the model.
    """
    if out.suffix.lower() not in IMAGE_SUFFIXES:
        raise ValueError(f"--out must end in {', '.join(IMAGE_SUFFIXES)}; got {out}")
    try:
        check_writable(out)  # before anything is drawn
    except OSError as error:
        raise ValueError(
            "--out must be a file in a folder that exists and can be written to; "
            f"got {out} ({error.strerror})"
        ) from error
    if eta and sampler != "ddim":
        raise ValueError(f"--eta is for --sampler ddim; got --sampler {sampler} --eta {eta}")
    given = {option: asked[option] for option in OPTIONS if asked[option] is not None}
    for option, value in given.items():
        if option not in WORDS and not math.isfinite(value):
            raise ValueError(f"{option} must be a finite number; got {value}")
    way = choose(guidance, given)
    way.check_options(given, model, sampler, eta)

    trained = Trained(model or way.own_model)
    if steps > trained.diffusion.num_steps:
        most = trained.diffusion.num_steps
        raise ValueError(f"--steps must be at most {most} for {trained.name!r}; got {steps}")
    way.check_model(trained)
    drawing = Drawing(
        trained=trained,
        asked=given.get(way.asks),
        strength=given.get(way.strength, way.default),
        count=count,
        steps=steps,
        step=ddpm_step if sampler == "ddpm" else partial(ddim_step, eta=eta),
        generator=torch.Generator().manual_seed(seed),
        device=process_state().device,
    )
    images = way.draw(drawing)

    from torchvision.utils import save_image  # takes a second to import

    save_image(images, out, nrow=math.ceil(math.sqrt(count)), normalize=True, value_range=(-1, 1))
    told = f"{count} images of {trained.name}{way.said(drawing)}"
    typer.echo(f"{told}, {steps} {sampler} steps, seed {seed}: {out}")
