"""What `sample` draws with a given generator stays what it drew, up to rounding, however a step is written.

stored_samples.json was drawn in double precision by the code before steps looked their numbers up once.
"""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from tensors import agree, normal, seeded

from lecture26.classifier_free_guidance import classifier_free_guided, exact_conditional_denoiser
from lecture26.classifier_guidance import classifier_guided, classifier_mean_shift, exact_classifier
from lecture26.ddpm import (
    Diffusion,
    GaussianMixture,
    cosine_betas,
    ddim_step,
    ddpm_step,
    exact_denoiser,
    linear_betas,
    sample,
)

STORED = json.loads(Path(__file__).with_name("stored_samples.json").read_text(encoding="utf-8"))
MIXTURE = GaussianMixture([0.5, 0.3, 0.2], [[-0.55, -0.35], [0.6, -0.3], [0.05, 0.6]], [0.12, 0.10, 0.16])
LINEAR = Diffusion(linear_betas(200))
CLASSES, NO_CLASS = torch.tensor([0, 1, 2]), torch.tensor([3, 3, 3])

exact = exact_denoiser(MIXTURE, LINEAR)
classifier = exact_classifier(MIXTURE, LINEAR)
by_classifier = classifier_guided(exact, classifier, CLASSES, 2.0, LINEAR)
by_itself = classifier_free_guided(exact_conditional_denoiser(MIXTURE, LINEAR), CLASSES, NO_CLASS, 1.5)
shifted_step = partial(ddpm_step, mean_shift=classifier_mean_shift(classifier, CLASSES, 2.0))


def clipped(prediction, variance):
    return Diffusion(cosine_betas(200), prediction, variance, clip=True)


WAYS = {  # the diffusion, the denoiser and the step
    "ddpm": (LINEAR, exact, ddpm_step),
    "ddim": (LINEAR, exact, ddim_step),
    "ddpm, v, clipped": (clipped("v", "fixed_large"), None, ddpm_step),
    "ddim, v, clipped": (clipped("v", "fixed_large"), None, ddim_step),
    "ddim, x_0, clipped, eta 0.5": (clipped("x_0", "fixed_small"), None, partial(ddim_step, eta=0.5)),
    "classifier guidance": (LINEAR, by_classifier, ddpm_step),
    "mean shift": (LINEAR, exact, shifted_step),
    "classifier-free guidance": (LINEAR, by_itself, ddim_step),
}


@pytest.mark.parametrize("way", WAYS)
def test_samples_are_those_of_before(way):
    diffusion, denoiser, step = WAYS[way]
    denoiser = denoiser or exact_denoiser(MIXTURE, diffusion)
    x_0 = sample(
        diffusion.respace(20), denoiser, (3, 2), step, seeded(4), normal(3, 2, seed=5), progress=False
    )
    agree(x_0, torch.tensor(STORED[way], dtype=torch.float64), 1e-8)


def test_every_stored_sample_is_drawn():
    assert WAYS.keys() == STORED.keys()
