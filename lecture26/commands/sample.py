"""The command `sample`: images drawn from a trained model, as one grid."""

import math
from functools import partial
from pathlib import Path

import typer
from torch import Tensor

from lecture26.clip_guidance import split_words
from lecture26.commands.drawing import Drawing
from lecture26.commands.steering import OPTIONS, WORDS, Steering, choose
from lecture26.ddpm import ddim_step, ddpm_step
from lecture26.kit.files import check_writable
from lecture26.kit.paths import expanded
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
        OSError: if the picture could not be written.
        FloatingPointError: if what is drawn holds numbers that are not finite; nothing is written.
    """
    out = expanded(out)
    check_can_be_written(out)
    if eta and sampler != "ddim":
        raise ValueError(f"--eta is for --sampler ddim; got --sampler {sampler} --eta {eta}")
    given = {option: asked[option] for option in OPTIONS if asked[option] is not None}
    for option, value in given.items():
        if option not in WORDS and not math.isfinite(value):
            raise ValueError(f"{option} must be a finite number; got {value}")
    prompt = given.get("--prompt")
    if prompt is not None and not split_words(prompt):
        raise ValueError(f"--prompt must have words; got {prompt!r}")
    way = choose(guidance, given)
    way.check_options(given, model, sampler, eta)

    trained = Trained(model or way.own_model)
    if steps > trained.diffusion.num_steps:
        most = trained.diffusion.num_steps
        raise ValueError(f"--steps must be at most {most} for {trained.name!r}; got {steps}")
    way.check_model(trained)
    ddim = partial(ddim_step, eta=eta) if eta else ddim_step  # as it stands, it is spared all noise
    drawing = Drawing(
        trained=trained,
        asked=given.get(way.asks),
        strength=given.get(way.strength, way.default),
        count=count,
        steps=steps,
        step=ddpm_step if sampler == "ddpm" else ddim,
        seed=seed,
        device=process_state().device,
    )
    images = way.draw(drawing)
    check_finite(images, way, drawing)

    from torchvision.utils import save_image  # takes a second to import

    save_image(images, out, nrow=math.ceil(math.sqrt(count)), normalize=True, value_range=(-1, 1))
    told = f"{count} images of {trained.name}{way.said(drawing)}"
    typer.echo(f"{told}, {steps} {sampler} steps, seed {seed}: {out}")


def check_can_be_written(out: Path) -> None:
    """Raise ValueError or OSError, before anything is drawn, if the picture `out` cannot be written."""
    if out.suffix.lower() not in IMAGE_SUFFIXES:
        raise ValueError(f"--out must end in {', '.join(IMAGE_SUFFIXES)}; got {out}")
    if out.is_dir():
        raise IsADirectoryError(f"--out must be a file; {out} is a folder")
    try:
        check_writable(out)
    except OSError as error:
        place = "in a folder that exists and can be written to"
        raise OSError(f"--out must be a file {place}; got {out} ({error.strerror})") from error


def check_finite(images: Tensor, way: Steering, drawing: Drawing) -> None:
    """Raise FloatingPointError, which says what to change, unless all images of a `drawing` are finite."""
    spoilt = (~images.isfinite()).flatten(1).any(dim=1).sum().item()
    if not spoilt:
        return
    advice = f"train {drawing.trained.name!r} anew, with a smaller --learning-rate"
    if way.strength is not None:
        advice = f"bring {way.strength} nearer to {way.default:g}; it was {drawing.strength:g}"
    raise FloatingPointError(
        f"{spoilt} of {len(images)} images are not finite, so that nothing was written: {advice}"
    )
