"""The command line: python -m lecture26 train | sample | adapt | evaluate | measure | checkpoints.

What a command needs is imported inside it, so that --help answers at once.
"""

import json
import math
import shlex
import sys
import warnings
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Train, sample and measure the models of the course.",
)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
# near the best ones of chapters 03, 04, 05 and 07; "text" is a prompt for a text-to-image model
STRENGTHS = {"classifier": 8.0, "clip": 400.0, "cfg": 1.0, "text": 2.0}
STEERED = {
    "classifier": "by classifier guidance at scale",
    "clip": "by clip guidance at scale",
    "cfg": "by classifier-free guidance at w =",
    "text": "at w =",
}
LARGEST_SEED = 2**63 - 1  # that torch's generators take
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
TEXT_MODEL = "text_to_image_shapes64"


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
    full = "full"
    compare = "compare"


class Sampler(StrEnum):
    """How a denoiser is turned into samples."""

    ddpm = "ddpm"
    ddim = "ddim"


class Guidance(StrEnum):
    """By what the samples are steered towards what is asked for."""

    classifier = "classifier"
    clip = "clip"
    cfg = "cfg"


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
    import dataclasses

    with errors_in_one_line():
        from lecture26 import recipes
        from lecture26.kit.checkpoints import is_complete

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
        changes = {key: value for key, value in changes.items() if value is not None}
        chosen = dataclasses.replace(recipes.find_recipe(recipe), **changes)
        if is_complete(chosen.name) and not replace:
            raise ValueError(
                f"a checkpoint {chosen.name!r} exists: choose another --name, or write over it with --replace"
            )
        options = [part for key, value in changes.items() for part in (_option(key), str(value))]
        with stopped_in_one_line():
            card = recipes.run(chosen, _command("train", recipe, *options), state_every)
    if card is not None:
        typer.echo(json.dumps({"name": card["name"], "seconds": card["seconds"], "metrics": card["metrics"]}))


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
    count: Annotated[int, typer.Option(min=1, help="How many images.")] = 16,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED)] = 0,
    guidance: Annotated[Guidance | None, typer.Option(help="Steer towards --class or --prompt.")] = None,
    wish: Annotated[
        str | None, typer.Option("--class", help="For classifier and cfg, such as 'red star'.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="Such as 'a red star': for a text-to-image model, or for --guidance clip."),
    ] = None,
    scale: Annotated[
        float | None, typer.Option(help="Of the gradient; for CLIP of the cosine similarity, without kappa.")
    ] = None,
    w: Annotated[
        float | None,
        typer.Option(
            help="Of cfg and of text to image: 0 conditional, -1 unconditional; other libraries' scale - 1."
        ),
    ] = None,
):
    """Draw images from a trained model, and save them as one grid."""
    with errors_in_one_line():
        from lecture26.kit.files import check_writable

        if out.suffix.lower() not in IMAGE_SUFFIXES:
            raise ValueError(f"--out must end in {', '.join(IMAGE_SUFFIXES)}; got {out}")
        try:
            check_writable(out)
        except OSError as error:
            raise ValueError(
                "--out must be a file in a folder that exists and can be written to; "
                f"got {out} ({error.strerror})"
            ) from error
        if eta and sampler is not Sampler.ddim:
            raise ValueError(f"--eta is for --sampler ddim; got --sampler {sampler.value} --eta {eta}")
        _check_wishes(model, sampler, eta, guidance, wish, prompt, scale, w)
        by = "text" if guidance is None and prompt is not None else guidance and guidance.value
        model = model or TEXT_MODEL
        asked = prompt if wish is None else wish
        strength = next((given for given in (scale, w) if given is not None), STRENGTHS.get(by))

        import torch
        from torchvision.utils import save_image

        from lecture26 import ddpm, recipes
        from lecture26.kit.processes import process_state
        from lecture26.recipes.guidance import check_guidance, guided
        from lecture26.recipes.latent import load_pipeline

        recipe = recipes.load_recipe(model)
        diffusion = recipes.load_diffusion(model)
        if steps > diffusion.num_steps:
            raise ValueError(f"--steps must be at most {diffusion.num_steps} for {model!r}; got {steps}")
        check_guidance(by, model)
        device = process_state().device
        generator = torch.Generator().manual_seed(seed)  # on the CPU: the same images on every device
        if by == "text":
            pipeline = load_pipeline(model).to(device)
            images = pipeline.text_to_image([prompt] * count, w=strength, steps=steps, generator=generator)
        else:
            denoiser = recipes.load_model(model).to(device)
            if by is not None:
                denoiser = guided(by, model, denoiser, asked, strength, count)
            step = ddpm.ddpm_step if sampler is Sampler.ddpm else partial(ddpm.ddim_step, eta=eta)
            shape = (count, recipe.channels, recipe.image_size, recipe.image_size)
            x_T = torch.randn(shape, generator=generator).to(device)
            images = ddpm.sample(diffusion.respace(steps), denoiser, shape, step, generator, x_T)
        save_image(images, out, nrow=math.ceil(math.sqrt(count)), normalize=True, value_range=(-1, 1))
    told = "" if by is None else f", {asked} {STEERED[by]} {strength:g}"
    typer.echo(f"{count} images of {model}{told}, {steps} {sampler.value} steps, seed {seed}: {out}")


def _check_wishes(
    model: str | None,
    sampler: Sampler,
    eta: float,
    guidance: Guidance | None,
    wish: str | None,
    prompt: str | None,
    scale: float | None,
    w: float | None,
) -> None:
    """Raise ValueError unless the options of `sample` go together."""
    for option, value in (("--scale", scale), ("--w", w)):
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{option} must be a finite number; got {value}")
    asked = {"--class": wish, "--prompt": prompt}
    needed = {Guidance.clip: "--prompt"}.get(guidance, "--class") if guidance is not None else None
    from_text = guidance is None and prompt is not None
    if guidance is None and any(value is not None for value in (wish, scale)):
        raise ValueError("--class and --scale are for --guidance; it is missing")
    if guidance is None and prompt is None and w is not None:
        raise ValueError("--w is for --prompt or --guidance cfg; both are missing")
    if from_text and (sampler is not Sampler.ddim or eta):
        raise ValueError("--prompt without --guidance draws with --sampler ddim and --eta 0")
    if model is None and not from_text:
        raise ValueError("--model is missing; only --prompt without --guidance has one of its own")
    if needed is not None and asked.pop(needed) is None:
        raise ValueError(f"--guidance {guidance.value} needs {needed}; it is missing")
    if guidance is not None and any(value is not None for value in asked.values()):
        raise ValueError(f"--guidance {guidance.value} takes {needed} and not {' or '.join(asked)}")
    if guidance is Guidance.cfg and scale is not None:
        raise ValueError("--guidance cfg takes --w and not --scale: w is the scale of other libraries - 1")
    if guidance in (Guidance.classifier, Guidance.clip) and w is not None:
        raise ValueError(f"--w is for --guidance cfg; --guidance {guidance.value} takes --scale")


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
    with errors_in_one_line():
        from lecture26.kit.processes import process_state
        from lecture26.kit.results import results_file, save_results
        from lecture26.recipes import adaptation

        options = {
            "backbone": backbone,
            "data": data,
            "method": method.value,
            "prompts": prompts,
            "steps": steps,
            "batch_size": batch_size,
            "seeds": seeds,
            "precision": precision.value,
        }
        words = [part for key, value in options.items() for part in (_option(key), str(value))]
        words += [part for rate in learning_rate or [] for part in ("--learning-rate", f"{rate:g}")]
        flags = {"--augment": augment, "--random-weights": random_weights, "--replace": replace}
        words += [flag for flag, is_set in flags.items() if is_set]
        if name is None:
            name = adaptation.default_name(backbone, data, method.value)
        else:
            words += ["--name", name]
        adaptation.check_name(name)
        if results_file(name).exists() and not replace:
            raise ValueError(f"results {name!r} exist: choose another --name, or write over with --replace")
        with stopped_in_one_line():
            results = adaptation.compare_on(
                backbone,
                data,
                adaptation.COMPARED if method is AdaptationMethod.compare else (method.value,),
                prompts,
                adaptation.Budget(
                    steps=steps, batch_size=batch_size, precision=precision.value, augment=augment
                ),
                seeds=range(seeds),
                learning_rates=learning_rate,
                pretrained=not random_weights,
                name=name,
                state_every=state_every,
            )
        if not process_state().is_main_process:
            return
        save_results(name, _command("adapt", *words), results)
        adaptation.forget_progress(name)
    for run in results["runs"]:
        mean = sum(run["accuracy"]) / len(run["accuracy"])
        typer.echo(
            f"{run['method']:12} accuracy {mean:.1%}, {run['trained']:,} trained parameters, "
            f"{run['bytes'] / 1e3:,.0f} kB, learning rate {run['learning_rate']:g}"
        )
    typer.echo(f"stored: {results_file(name)} and {adaptation.tasks_dir(name)}")


@app.command()
def evaluate(model: Annotated[str, typer.Argument(help="A checkpoint.")]):
    """Measure a checkpoint anew, and print its metrics as JSON."""
    with errors_in_one_line():
        from lecture26 import recipes
        from lecture26.kit.processes import process_state

        network = recipes.load_model(model).to(process_state().device)
        recipe = recipes.load_recipe(model)
        metrics = recipe.evaluate(network, recipe.load("test"))
    typer.echo(json.dumps(metrics, indent=2))


@app.command()
def measure(
    name: Annotated[str, typer.Argument(help="Such as ddpm_shapes32_steps.")],
    replace: Annotated[bool, typer.Option("--replace", help="Write over the results of that name.")] = False,
):
    """Make a measurement that takes too long for a notebook, and store it in data/results."""
    with errors_in_one_line():
        from lecture26.kit.results import results_file
        from lecture26.recipes import measurements

        if results_file(name).exists() and not replace:
            raise ValueError(f"results {name!r} exist: write over them with --replace")
        options = ["--replace"] if replace else []
        measurements.measure(name, _command("measure", name, *options))
    typer.echo(f"stored: {results_file(name)}")


@app.command()
def checkpoints(
    model: Annotated[str | None, typer.Argument(help="Print its card, whole.")] = None,
):
    """List the checkpoints, or print the card of one."""
    with errors_in_one_line():
        from lecture26.kit.checkpoints import CheckpointError, list_checkpoints, load_card, load_state

        if model is not None:
            load_state(model)  # a card is only worth reading beside the file it describes
            typer.echo(json.dumps(load_card(model), indent=2))
            return
        for name in list_checkpoints():
            try:
                card = load_card(name)
            except CheckpointError as error:
                typer.echo(f"error: {error}", err=True)
                continue
            metrics = ", ".join(f"{name} {value:.4g}" for name, value in card["metrics"].items())
            typer.echo(
                f"{card['name']}: {card['parameters'] / 1e6:.2f} M parameters, "
                f"{card['bytes'] / 2**20:.1f} MiB, "
                f"{card['steps']} steps in {card['seconds'] / 60:.0f} min on {card['data']}; {metrics}"
            )


def _command(*words: str) -> str:
    """The command line of a call, with as many processes as there are now."""
    from lecture26.kit.processes import process_state

    count = process_state().num_processes
    start = ["python"] if count == 1 else ["torchrun", "--nproc-per-node", str(count)]
    return shlex.join([*start, "-m", "lecture26", *words])


def _option(argument: str) -> str:
    """The command-line option of a function's argument."""
    return "--" + argument.replace("_", "-")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no text
    app(prog_name="python -m lecture26")
