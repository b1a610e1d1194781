"""Measurements too long for a notebook: each makes data/results/NAME.json, which a chapter plots."""

import time
from collections.abc import Callable
from functools import partial

import torch
from tqdm import tqdm

from lecture26.ddpm import ddim_step, ddpm_step, sample
from lecture26.kit.evaluation import sample_quality
from lecture26.kit.results import save_results
from lecture26.kit.validation import check_choice
from lecture26.recipes import load_diffusion, load_model, load_recipe

SAMPLERS = {"ddpm": ddpm_step, "ddim": ddim_step}
STEP_COUNTS = (10, 20, 50, 100, 250, 1000)
NUM_SAMPLES = 128
BATCH_SIZE = 64  # also of the notebook's small version, which draws the first batch


def sampling_steps(
    model: str,
    reader: str,
    step_counts: tuple[int, ...] = STEP_COUNTS,
    num_samples: int = NUM_SAMPLES,
    batch_size: int = BATCH_SIZE,
) -> dict:
    """Quality and time of DDPM and DDIM with few and many steps.

    Args:
        model: a checkpoint of a denoiser.
        reader: a checkpoint of a reader of the same images.
        step_counts: numbers of denoising steps.
        num_samples: per sampler and number of steps, a multiple of `batch_size`.
        batch_size: samples drawn at once; batch b from a generator seeded with b.

    Returns:
        "model", "reader", "num_samples", "batch_size", and "runs": for each sampler and number of steps a
        dict of "sampler", "steps", "seconds_per_image" (of the fastest batch), what `sample_quality` says of
        all samples, and "first_batch": what it says of the first batch alone.
    """
    from accelerate import PartialState  # takes a second to import

    device = PartialState().device
    network, judge = load_model(model).to(device), load_model(reader).to(device)
    diffusion, recipe = load_diffusion(model), load_recipe(model)
    images = recipe.load("test")
    shape = (batch_size, recipe.channels, recipe.image_size, recipe.image_size)

    runs = []
    settings = [(sampler, steps) for steps in step_counts for sampler in SAMPLERS]
    for sampler, steps in tqdm(settings, "sampling", unit="run"):
        batches, seconds = [], []
        for seed in range(num_samples // batch_size):
            generator = torch.Generator().manual_seed(seed)  # on the CPU: the same samples on every device
            x_T = torch.randn(shape, generator=generator).to(device)
            started = time.monotonic()
            x_0 = sample(diffusion.respace(steps), network, shape, SAMPLERS[sampler], generator, x_T)
            batches.append(x_0.cpu())  # waits for the device
            seconds.append(time.monotonic() - started)
        runs.append(
            {"sampler": sampler, "steps": steps, "seconds_per_image": min(seconds) / batch_size}
            | sample_quality(judge, torch.cat(batches), images)
            | {"first_batch": sample_quality(judge, batches[0], images)}
        )
    return {
        "model": model,
        "reader": reader,
        "num_samples": num_samples,
        "batch_size": batch_size,
        "runs": runs,
    }


MEASUREMENTS: dict[str, Callable[[], dict]] = {
    "ddpm_shapes32_steps": partial(sampling_steps, "ddpm_shapes32", "reader_shapes32"),
}


def measure(name: str, command: str) -> dict:
    """Make a measurement, and store it.

    Args:
        name: one of MEASUREMENTS.
        command: the command line that does the same, to be stored with it.

    Returns:
        What was stored, see `lecture26.kit.results.save_results`.

    Raises:
        ValueError: if there is no such measurement.
        CheckpointError: if a checkpoint that it needs is missing or damaged.
    """
    check_choice("measurement", name, tuple(MEASUREMENTS))
    return save_results(name, command, MEASUREMENTS[name]())
