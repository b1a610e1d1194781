"""The milestone of chapter 03: red stars."""

from typing import TYPE_CHECKING

import torch

from lecture26.classifier_guidance import (
    NoisyClassifier,
    classifier_guided,
    classifier_training_step,
    sample_mean_shifted,
)
from lecture26.ddpm import Diffusion, ddpm_step, noise_like, sample
from lecture26.kit.figures import PALETTE
from lecture26.recipes import Trained
from lecture26.recipes.recipe import Recipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STARS = 8
STAR_STEPS = 50
STAR_SCALE = 8.0
LESSONS = 60  # training steps of a small classifier


def stars() -> tuple["Figure", str]:
    """Red stars by both forms of classifier guidance, and the loss of a classifier that is trained here."""
    from matplotlib import pyplot as plt

    trained, guide = Trained("ddpm_shapes32"), Trained("noisy_classifier_shapes32")
    images = trained.recipe.load_images("train")
    wanted = {"shape": "star", "colour": "red"}
    attributes = {
        label: torch.full((STARS,), images.labels[label].index(name)) for label, name in wanted.items()
    }
    y, path = guide.recipe.classes(attributes), trained.diffusion.respace(STAR_STEPS)
    x_T = torch.randn(STARS, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    guided = classifier_guided(trained.network, guide.network, y, STAR_SCALE, trained.diffusion)
    generator = torch.Generator().manual_seed(14)
    shown = [sample(path, guided, x_T.shape, ddpm_step, generator, x_T, progress=False)]
    generator = torch.Generator().manual_seed(14)
    shown.append(sample_mean_shifted(path, trained.network, guide.network, y, STAR_SCALE, x_T, generator))

    figure, axes = plt.subplots(3, 1, figsize=(8, 5.5), height_ratios=[1, 1, 1.6], layout="constrained")
    for axis, pictures, title in zip(axes, shown, ("guided denoiser", "shifted mean"), strict=False):
        row = (pictures.clamp(-1, 1) + 1) / 2  # (STARS, 3, 32, 32)
        axis.imshow(row.permute(2, 0, 3, 1).flatten(1, 2), interpolation="nearest")
        axis.set(title=title, xticks=[], yticks=[])
        axis.grid(False)
    losses = classifier_lessons(guide.recipe, trained.diffusion)
    axes[2].plot(losses, color=PALETTE["vermilion"])
    axes[2].set(title="loss of a small classifier, nats", xlabel="training step")
    return figure, f"{2 * STARS} red stars asked for, and a classifier after {LESSONS} training steps"


def classifier_lessons(recipe: Recipe, diffusion: Diffusion) -> list[float]:
    """The losses of a small classifier's first steps, on the images of a recipe of noisy classifiers."""
    images = recipe.load_images("train")
    network = NoisyClassifier(recipe.channels, recipe.num_classes, base_channels=16, patch_size=2)
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(LESSONS):
        batch = images.batch(torch.randint(len(images), (64,), generator=generator))
        x_0, y = batch["image"], recipe.classes(batch)
        t = torch.randint(diffusion.num_steps, (64,), generator=generator)
        noise, alpha_bar = noise_like(x_0, generator), diffusion.at(t, x_0).alpha_bar
        losses.append(classifier_training_step(optimizer, network, x_0, y, t, noise, alpha_bar).item())
    return losses
