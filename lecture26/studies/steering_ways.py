"""Classifier guidance at one scale: in its two forms, by both samplers, with and without the first step."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from lecture26.classifier_guidance import classifier_guided, classifier_mean_shift, log_prob_gradient
from lecture26.ddpm import Diffusion, ddpm_step
from lecture26.recipes import Trained
from lecture26.studies.ledger import Ledger, ledger_file
from lecture26.studies.sizes import NUM_WITHIN, Sizes
from lecture26.studies.sweeps import BATCH_SIZE, CLASSIFIER_SCALE, NUM_SAMPLES, SAMPLERS, STEPS, Study

# What is guided, and by which sampler. "exact shift" moves the mean, as "mean shift" does and behind the
# clipping of x_0, but by beta_t / sqrt(alpha_t) in the place of Sigma.
WAYS = (
    ("none", "ddpm"),
    ("none", "ddim"),
    ("denoiser", "ddpm"),
    ("denoiser", "ddim"),
    ("denoiser, from the second step", "ddpm"),
    ("denoiser, from the second step", "ddim"),
    ("mean shift", "ddpm"),
    ("exact shift", "ddpm"),
)


def classifier_guidance_ways(
    model: str,
    classifier: str,
    reader: str,
    scale: float = CLASSIFIER_SCALE,
    ways: Sequence[tuple[str, str]] = WAYS,
    num_samples: int = NUM_SAMPLES,
    num_within: int = NUM_WITHIN,
    batch_size: int = BATCH_SIZE,
    steps: int = STEPS,
    state: str | None = None,
) -> dict:
    """Ways of guiding by a classifier, at one scale and with the same noise, so that they can be compared.

    Args:
        model: a checkpoint of an unconditional denoiser.
        classifier: a checkpoint of a noisy classifier of the same images.
        reader: a checkpoint of a reader of them.
        scale: s, of all runs.
        ways: what is guided ("none", "denoiser", "denoiser, from the second step", "mean shift" or "exact
            shift"), and the sampler.
        num_samples, batch_size, steps: of each way, as `Study` has them.
        num_within: of the comparisons within large shapes, see `Sizes`.
        state: the name under which finished ways are kept, so that it resumes; None: nowhere.

    Returns:
        "model", "classifier", "reader", "scale", and "runs": for each way "form", "sampler", and what
        `Study.run` and `Sizes.of` say.
    """
    study = Study(model, reader, batch_size)
    checkpoint = Trained(classifier)
    network, recipe = checkpoint.network.to(study.device), checkpoint.recipe
    sizes = Sizes(study.judge, study.recipe.load_images("test"), num_samples, num_within)
    further = partial(sizes.of, group=batch_size)
    path = study.diffusion.respace(steps)

    def guide(form: str, sampler: str, wanted: dict[str, Tensor]) -> tuple[Callable, Callable]:
        y, step = recipe.classes(wanted), SAMPLERS[sampler]
        if form == "none":
            return study.network, step
        if form == "mean shift":
            return study.network, partial(ddpm_step, mean_shift=classifier_mean_shift(network, y, scale))
        if form == "exact shift":
            return study.network, partial(ddpm_step, mean_shift=exact_mean_shift(network, y, scale, path))
        guided = classifier_guided(study.network, network, y, scale, study.diffusion)
        if form == "denoiser":
            return guided, step
        return without_the_first_step(guided, study.network, path), step

    def run(form: str, sampler: str) -> dict:
        way = partial(guide, form, sampler)
        measured = study.run(way, steps, num_samples, labels=recipe.labels, further=further)
        return {"form": form, "sampler": sampler} | measured

    names = {"model": model, "classifier": classifier, "reader": reader, "scale": scale}
    settings = {**names, "samples": [num_samples, num_within], "steps": steps}
    ledger = Ledger(None if state is None else ledger_file(state), settings)
    runs = [ledger.once(repr(way), partial(run, *way)) for way in tqdm(list(ways), "sampling", unit="run")]
    return {**names, "runs": runs}


def exact_mean_shift(classifier: Callable, y: Tensor, scale: float, path: Diffusion) -> Callable:
    """For ddpm_step(..., mean_shift=...): what a guided denoiser does to the mean where nothing is clipped.

    The shift is that of (3.12), s beta_t / sqrt(alpha_t) grad log p(y | x_t), for the steps of `path`.
    """
    own = {original: index for index, original in enumerate(path.steps.tolist())}

    def mean_shift(mean: Tensor, variance: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        beta = path.at(torch.tensor([own[step] for step in t.tolist()]), x_t).beta
        return scale * beta / (1 - beta).sqrt() * log_prob_gradient(classifier, x_t, t, y)

    return mean_shift


def without_the_first_step(guided: Callable, denoiser: Callable, path: Diffusion) -> Callable:
    """A guided denoiser that is not guided at the first step of sampling, where x_t is pure noise."""
    first = path.steps[-1].item()
    return lambda x_t, t: denoiser(x_t, t) if (t == first).all() else guided(x_t, t)
