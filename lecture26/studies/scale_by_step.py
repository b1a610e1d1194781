"""Classifier guidance whose scale makes up, step by step, for what the gradient lacks (chapter 05).

The design, written before the run. Chapter 05 finds that a classifier's gradient has some share of the exact
one, which falls from the noisiest step on, and concludes that no single scale repairs it. If that is why
obedience costs the distribution, then a scale of the inverse of that share at each step must be right more
often than a single scale at which as many shapes are large. The shares are measured on validation pictures,
each asked for the labels of another one, against the difference of the two answers of a conditional denoiser.
Below step 300 that difference is no reference, and the scale keeps its value. Half and twice as much are
tried as well. 512 samples each, with the noise of the other measurements; one seed.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lecture26.classifier_free_guidance import implicit_gradient
from lecture26.classifier_guidance import classifier_guided, log_prob_gradient
from lecture26.ddpm import ddpm_step
from lecture26.kit.processes import process_state
from lecture26.kit.sample_draws import SampleDraws
from lecture26.recipes import Trained
from lecture26.studies.ledger import Ledger, ledger_file
from lecture26.studies.sizes import NUM_WITHIN, Sizes
from lecture26.studies.sweeps import BATCH_SIZE, NUM_SAMPLES, STEPS, Study

COMPARED_AT = tuple(range(300, 951, 50))
FACTORS = (0.5, 1.0, 2.0)  # of the inverse share
NUM_COMPARED = 512
SEED = 1


def classifier_scale_by_step(
    model: str,
    conditional: str,
    classifier: str,
    reader: str,
    factors: Sequence[float] = FACTORS,
    compared_at: Sequence[int] = COMPARED_AT,
    num_compared: int = NUM_COMPARED,
    num_samples: int = NUM_SAMPLES,
    num_within: int = NUM_WITHIN,
    batch_size: int = BATCH_SIZE,
    steps: int = STEPS,
    state: str | None = None,
) -> dict:
    """Guide at each step by the inverse of the share of the exact gradient that a classifier's has there.

    Args:
        model: a checkpoint of an unconditional denoiser, which is guided.
        conditional: one of a conditional denoiser of the same images, for the reference.
        classifier: one of a noisy classifier of them.
        reader: one of a reader of them.
        factors: what the inverse share is multiplied by, one run each.
        compared_at: steps at which the share is measured, rising; in between it is interpolated.
        num_compared: pictures on which it is measured.
        num_samples, batch_size, steps: of each run, as `Study` has them.
        num_within: of the comparisons within large shapes, see `Sizes`.
        state: the name under which finished runs are kept, so that it resumes; None: nowhere.

    Returns:
        The four names; "compared_at", "shares" and "share_errors", the mean share at each of these steps and
        its standard error; and "runs": for each "factor" what `Study.run` and `Sizes.of` say.
    """
    study = Study(model, reader, batch_size)
    trained = Trained(classifier)
    network, classes = trained.network.to(study.device), trained.recipe.classes
    sizes = Sizes(study.judge, study.recipe.load_images("test"), num_samples, num_within)
    names = {"model": model, "conditional": conditional, "classifier": classifier, "reader": reader}
    settings = {**names, "compared": [list(compared_at), num_compared], "samples": [num_samples, num_within]}
    ledger = Ledger(None if state is None else ledger_file(state), settings | {"steps": steps})
    measured = ledger.once(
        "shares", lambda: gradient_shares(Trained(conditional), trained, compared_at, num_compared)
    )

    def guide(factor: float, wanted: dict[str, Tensor]) -> tuple[Callable, Callable]:
        y = classes(wanted)

        def guided(x_t: Tensor, t: Tensor) -> Tensor:
            share = float(np.interp(t[0].item(), compared_at, measured["shares"]))  # a batch is at one step
            return classifier_guided(study.network, network, y, factor / share, study.diffusion)(x_t, t)

        return guided, ddpm_step

    def run(factor: float) -> dict:
        further = partial(sizes.of, group=batch_size)
        drawn = study.run(
            partial(guide, factor), steps, num_samples, labels=("shape", "colour"), further=further
        )
        return {"factor": factor} | drawn

    runs = [
        ledger.once(f"factor {factor}", partial(run, factor))
        for factor in tqdm(factors, "sampling", unit="run")
    ]
    return {**names, "compared_at": list(compared_at), **measured, "runs": runs}


@torch.no_grad()
def gradient_shares(conditional: Trained, classifier: Trained, steps: Sequence[int], count: int) -> dict:
    """How much of the difference of a conditional denoiser's answers there is in a classifier's gradient.

    Each of `count` validation pictures is asked for the labels of the one before. The share is that of the
    gradient's part along the difference: their inner product over the square of the difference.

    Returns:
        "shares" and "share_errors": for each of the steps the mean, and its standard error.
    """
    device = process_state().device
    denoiser, reader = conditional.network.to(device), classifier.network.to(device)
    recipe, diffusion = conditional.recipe, conditional.diffusion
    batch = recipe.load_images("validation").batch(range(count))
    asked = {name: values.roll(1) for name, values in batch.items() if name != "image"}
    cond, null_cond = recipe.conditions(asked).to(device), recipe.null_conditions(count).to(device)
    y, x_0 = classifier.recipe.classes(asked).to(device), batch["image"].to(device)
    noise = SampleDraws(SEED, torch.arange(count)).normal(*x_0.shape[1:]).to(device)
    means, errors = [], []
    for step in steps:
        shares = []
        for part in torch.arange(count).split(BATCH_SIZE):
            t = torch.full((len(part),), step, device=device)
            x_t = diffusion.q_sample(x_0[part], t, noise[part])
            now = diffusion.at(t, x_t)
            eps_cond, eps_uncond = (
                diffusion.eps_from_x_0(
                    x_t,
                    t,
                    diffusion.predicted_x_0(denoiser(x_t, t, labels[part]), x_t, now.alpha_bar, clip=False),
                )
                for labels in (cond, null_cond)
            )
            difference = implicit_gradient(eps_cond, eps_uncond, now.alpha_bar).flatten(1)
            gradient = log_prob_gradient(reader, x_t, t, y[part]).flatten(1)
            shares.append((difference * gradient).sum(dim=1) / difference.square().sum(dim=1))
        of_step = torch.cat(shares)
        means.append(of_step.mean().item())
        errors.append((of_step.std() / count**0.5).item())
    return {"shares": means, "share_errors": errors}
