"""The command line: python -m lecture26 train | sample | milestone | adapt | classify | evaluate | ...

What a command needs is imported inside it, so that --help answers at once.
"""

import os
import sys
import warnings
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lecture26.commands.steering import STEERINGS, TEXT_MODEL, takers_of

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Train, sample and measure the models of the course.",
)

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_NOBODY_READS = 141  # as shells report a program that such a pipe has ended
LARGEST_SEED = 2**64 - 1  # that torch takes
# By what samples are steered towards what is asked for.
Guidance = StrEnum("Guidance", {way.name: way.name for way in STEERINGS if way.name is not None})


class Precision(StrEnum):
    """What networks compute in while training."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class AdaptationMethod(StrEnum):
    """What of a backbone is trained for a new task; "compare" tries the four of the lecture."""

    linear = "linear"
    vpt_shallow = "vpt-shallow"
    vpt_deep = "vpt-deep"
    bias = "bias"
    adapter = "adapter"
    lora = "lora"
    full = "full"
    compare = "compare"


class Sampler(StrEnum):
    """How a denoiser is turned into samples."""

    ddpm = "ddpm"
    ddim = "ddim"


class Milestone(StrEnum):
    """The chapters whose milestone no other command draws."""

    ddpm = "ddpm"
    classifier_guidance = "classifier_guidance"
    clip_guidance = "clip_guidance"
    vae = "vae"
    latent_diffusion = "latent_diffusion"
    visual_prompt_tuning = "visual_prompt_tuning"
    the_slides_checked = "the_slides_checked"


@contextmanager
def errors_in_one_line():
    """Report what the user can mend in one line, without a traceback; what the data warn of too.

    These are the errors whose messages speak to the user; any other one is a fault of the course.
    """
    from lecture26.kit.data import DataError
    from lecture26.kit.files import NOT_WRITABLE
    from lecture26.kit.paths import OWN_FOLDER, data_dir

    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            yield
    except BrokenPipeError:  # whoever reads the output has had enough, and is told nothing
        raise
    except (ValueError, DataError, FloatingPointError, OSError) as error:
        is_of_data = isinstance(error, OSError) and str(error.filename).startswith(str(data_dir()))
        hint = f". {OWN_FOLDER}" if is_of_data and error.errno in NOT_WRITABLE else ""
        typer.echo(f"error: {error}{hint}", err=True)
        raise typer.Exit(EXIT_USER_ERROR) from error
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        typer.echo(f"error: out of memory. Try a smaller --batch-size or --count ({error})", err=True)
        raise typer.Exit(EXIT_USER_ERROR) from error


def _is_out_of_memory(error: Exception) -> bool:
    """Whether torch or Python has found no memory; of that of the CPU torch says so in words alone."""
    from torch import OutOfMemoryError

    return isinstance(error, OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _show_warning(message, category, *place) -> None:
    """What the data warn of, in one line; other warnings as Python shows them."""
    from lecture26.kit.data import DataWarning

    if issubclass(category, DataWarning):
        typer.echo(f"note: {message}", err=True)
    else:
        typer.echo(warnings.formatwarning(message, category, *place[:2]), err=True)


@contextmanager
def quiet_when_nobody_reads():
    """End without a word when the reader of what is printed has gone, as after `| head -1`."""
    try:
        yield
    except BrokenPipeError as gone:
        # Python writes what is left at its end, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(EXIT_NOBODY_READS) from gone


@contextmanager
def stopped_in_one_line():
    """Tell whoever stops a call that keeps its state how to go on, without a traceback."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        typer.echo("stopped: the same command goes on from the last saved state", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from stopped


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="Such as ddpm_shapes32, or ddpm for your own images.")],
    name: Annotated[str | None, typer.Option(help="The checkpoint's name, if not the recipe's.")] = None,
    data: Annotated[str | None, typer.Option(help="A data set's name, or a folder of images.")] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Resize the images, in pixels.")] = None,
    steps: Annotated[int | None, typer.Option(min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Samples per step and process.")] = None,
    learning_rate: Annotated[float | None, typer.Option()] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=LARGEST_SEED)] = None,
    precision: Annotated[
        Precision | None,
        typer.Option(help="auto, the default, tries which is faster; bf16 needs a device with units for it."),
    ] = None,
    state_every: Annotated[float, typer.Option(min=0, help="Seconds between two saved states.")] = 60.0,
    replace: Annotated[bool, typer.Option("--replace", help="Write over a checkpoint of that name.")] = False,
):
    """Train a model, and save it as a checkpoint.

    Stop it whenever you like: the same command goes on from the last saved state. To use several GPUs:
    accelerate launch -m lecture26 train RECIPE.
    """
    with errors_in_one_line(), stopped_in_one_line(), quiet_when_nobody_reads():
        from lecture26.commands.train import train

        changes = {
            "name": name,
            "data": data,
            "image_size": image_size,
            "steps": steps,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "seed": seed,
            "precision": precision and precision.value,
        }
        train(recipe, changes, state_every, replace)


@app.command()
def sample(
    model: Annotated[
        str | None,
        typer.Option(help=f"A checkpoint, such as ddpm_shapes32; {TEXT_MODEL} for --prompt alone."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The picture to write, over one of that name.")] = Path(
        "samples.png"
    ),
    steps: Annotated[int, typer.Option(min=2, help="Denoising steps, at most those of the checkpoint.")] = 50,
    sampler: Annotated[Sampler, typer.Option()] = Sampler.ddim,
    eta: Annotated[float, typer.Option(min=0, max=1, help="Fresh noise of DDIM, 0 to 1.")] = 0.0,
    count: Annotated[
        int, typer.Option(min=1, help="How many images; the first are the same at any count.")
    ] = 16,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED)] = 0,
    guidance: Annotated[Guidance | None, typer.Option(help="Steer towards --class or --prompt.")] = None,
    wish: Annotated[
        str | None, typer.Option("--class", help=f"For {takers_of('--class')}, such as 'red star'.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            help=f"Such as 'a red star': for a text-to-image model, or for {takers_of('--prompt')}."
        ),
    ] = None,
    scale: Annotated[
        float | None, typer.Option(help="Of the gradient; for CLIP of the cosine similarity, without kappa.")
    ] = None,
    w: Annotated[
        float | None,
        typer.Option(
            help=f"Of {takers_of('--w')} or of text to image: 0 conditional, -1 unconditional; "
            "other libraries' scale - 1."
        ),
    ] = None,
):
    """Draw images from a trained model, and save them as one grid."""
    with errors_in_one_line(), quiet_when_nobody_reads():
        from lecture26.commands.sample import sample

        sample(
            model,
            out,
            steps=steps,
            sampler=sampler.value,
            eta=eta,
            count=count,
            seed=seed,
            guidance=guidance and guidance.value,
            asked={"--class": wish, "--prompt": prompt, "--scale": scale, "--w": w},
        )


@app.command()
def milestone(
    chapter: Annotated[Milestone, typer.Argument(help="Those of the other chapters are drawn by sample.")],
    out: Annotated[Path, typer.Option(help="The picture to write, over one of that name.")] = Path(
        "milestone.png"
    ),
):
    """Draw what the functions of a chapter reach together."""
    with errors_in_one_line(), quiet_when_nobody_reads():
        from lecture26.commands.milestone import milestone

        milestone(chapter.value, out)


@app.command()
def adapt(
    data: Annotated[str, typer.Option(help="A data set's name, or a folder of images by class.")],
    backbone: Annotated[
        str, typer.Option(help="A checkpoint, or timm's name, such as vit_base_patch16_224.augreg_in21k.")
    ] = "vit_photos32",
    method: Annotated[
        AdaptationMethod, typer.Option(help="compare: linear, vpt-shallow, vpt-deep and full.")
    ] = AdaptationMethod.vpt_deep,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts at each block that gets any.")] = 8,
    steps: Annotated[int, typer.Option(min=1)] = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per step and process.")] = 64,
    learning_rate: Annotated[
        list[float] | None,
        typer.Option(help="Several times: the validation images choose. Else the method's own are tried."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions, for the spread.")] = 1,
    precision: Annotated[Precision, typer.Option(help="auto tries which is faster.")] = Precision.auto,
    augment: Annotated[bool, typer.Option("--augment", help="Mirror and move training images.")] = False,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Fetch no weights for a backbone of timm: to try out.")
    ] = False,
    name: Annotated[str | None, typer.Option(help="Of the results; else after backbone and data.")] = None,
    state_every: Annotated[float, typer.Option(min=0, help="Seconds between two saved states.")] = 60.0,
    replace: Annotated[bool, typer.Option("--replace", help="Write over the results of that name.")] = False,
):
    """Adapt a Vision Transformer to your own images, and store what was learned and how well it does.

    Stop it whenever you like: the same command goes on. Numbers go to data/results/NAME.json, and what was
    trained to data/tasks/NAME. To use several GPUs or processes: accelerate launch -m lecture26 adapt ...
    """
    with errors_in_one_line(), stopped_in_one_line(), quiet_when_nobody_reads():
        from lecture26.commands.adapt import adapt
        from lecture26.recipes.adaptation import Budget

        adapt(
            backbone,
            data,
            method.value,
            prompts,
            Budget(steps=steps, batch_size=batch_size, precision=precision.value, augment=augment),
            learning_rates=learning_rate,
            seeds=seeds,
            random_weights=random_weights,
            name=name,
            state_every=state_every,
            replace=replace,
        )


@app.command()
def classify(
    pictures: Annotated[list[Path], typer.Argument(help="Picture files.", metavar="PICTURE")],
    task: Annotated[str, typer.Option(help="The name of the results of adapt.")],
    method: Annotated[
        str | None, typer.Option(help="If the task was learned by several: the one to name by.")
    ] = None,
):
    """Name pictures by the classes of a task that adapt has learned, each with its probability."""
    with errors_in_one_line(), quiet_when_nobody_reads():
        from lecture26.commands.classify import classify

        if not classify(task, method, pictures):
            raise typer.Exit(EXIT_USER_ERROR)


@app.command()
def evaluate(model: Annotated[str, typer.Argument(help="A checkpoint.")]):
    """Measure a checkpoint anew, and print its metrics as JSON."""
    with errors_in_one_line(), quiet_when_nobody_reads():
        from lecture26.commands.evaluate import evaluate

        evaluate(model)


@app.command()
def measure(
    name: Annotated[str, typer.Argument(help="Such as ddpm_shapes32_steps.")],
    replace: Annotated[bool, typer.Option("--replace", help="Write over the results of that name.")] = False,
):
    """Make a measurement that takes too long for a notebook, and store it in data/results."""
    with errors_in_one_line(), quiet_when_nobody_reads():
        from lecture26.commands.measure import measure

        measure(name, replace)


@app.command()
def checkpoints(
    model: Annotated[str | None, typer.Argument(help="Print its card, whole.")] = None,
):
    """List the checkpoints, or print the card of one."""
    with errors_in_one_line(), quiet_when_nobody_reads():
        from lecture26.commands.checkpoints import checkpoints

        checkpoints(model)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no text
    app(prog_name="python -m lecture26")
