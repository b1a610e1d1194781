"""Classifiers of noisy images, whose gradients guide a denoiser (chapter 03)."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lecture26.classifier_guidance import NoisyClassifier, joint_class
from lecture26.ddpm import SCHEDULES, Diffusion
from lecture26.kit.image_set import ImageSet
from lecture26.kit.sample_draws import SampleDraws
from lecture26.recipes.recipe import EVALUATION_SEED, Recipe, count_classes, register

EVALUATION_IMAGES = 2000
EVALUATION_STEPS = (0, 200, 400, 600, 800)


@dataclass(frozen=True, kw_only=True)
class NoisyClassifierRecipe(Recipe):
    """A network that reads labels of images at every step of a diffusion.

    Attributes:
        labels: which of the data's labels it reads; their combinations are its classes.
        num_classes: of each of these labels; taken from the data when training begins.
        schedule, diffusion_steps: those of the denoiser that it shall guide.
        trained_steps: it is trained on the first so many of these steps; on all of them if None.
    """

    family: ClassVar[str] = "noisy_classifier"

    labels: tuple[str, ...]
    num_classes: tuple[int, ...] = ()
    schedule: str = "cosine"
    diffusion_steps: int = 1000
    trained_steps: int | None = None

    def fitted_to(self, images: ImageSet) -> "NoisyClassifierRecipe":
        num_classes = count_classes(self.data, images, self.labels)
        return replace(super().fitted_to(images), num_classes=num_classes)

    def build(self) -> nn.Module:
        return NoisyClassifier(self.channels, self.num_classes, **self.model)

    @cached_property
    def forward_process(self) -> Diffusion:
        """The diffusion whose noisy images it reads."""
        return Diffusion(SCHEDULES[self.schedule](self.diffusion_steps))

    def draw(self, images: ImageSet, random: SampleDraws) -> dict[str, Tensor]:
        batch = images.batch(random.integers(len(images)))
        return {
            "x_0": batch["image"],  # (B, C, H, W)
            "y": self.classes(batch),  # (B,)
            "t": random.integers(self.trained_steps or self.diffusion_steps),  # (B,)
            "noise": random.normal(*batch["image"].shape[1:]),  # (B, C, H, W)
        }

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        x_t = self.forward_process.q_sample(batch["x_0"], batch["t"], batch["noise"])
        return cross_entropy(model(x_t, batch["t"]), batch["y"])

    def classes(self, attributes: dict[str, Tensor]) -> Tensor:
        """The classes (B,) of images with these attributes, by label's name (B,) each."""
        return joint_class(torch.stack([attributes[name] for name in self.labels], dim=1), self.num_classes)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, images: ImageSet) -> dict[str, float]:
        """The share of unseen noisy images of which a label is read right.

        Args:
            model: the trained network.
            images: the data's test split.

        Returns:
            "accuracy_LABEL_STEP" for each label and each of EVALUATION_STEPS.
        """
        device = next(model.parameters()).device
        right = {}
        for indices in torch.arange(min(EVALUATION_IMAGES, len(images))).split(self.batch_size):
            batch = images.batch(indices)
            noise = SampleDraws(EVALUATION_SEED, indices).normal(*batch["image"].shape[1:])
            for step in EVALUATION_STEPS:
                t = torch.full((len(indices),), step)
                x_t = self.forward_process.q_sample(batch["image"], t, noise).to(device)
                for name, logits in zip(self.labels, model.label_logits(x_t, t.to(device)), strict=True):
                    is_right = logits.argmax(dim=1).cpu() == batch[name]
                    right.setdefault(f"accuracy_{name}_{step}", []).append(is_right)
        return {name: torch.cat(parts).double().mean().item() for name, parts in right.items()}


NOISY = NoisyClassifierRecipe(
    name="noisy_classifier_shapes32",
    data="shapes",
    image_size=32,
    labels=("shape", "colour"),
    model={"base_channels": 32, "channel_multipliers": (1, 2, 4), "attention_levels": (2,), "patch_size": 2},
    steps=8000,
    learning_rate=1e-3,
    weight_decay=1e-4,
)
# It has seen hardly any noise: chapter 03 shows why it cannot guide.
CLEAN = replace(
    NOISY,
    name="clean_classifier_shapes32",
    model=NOISY.model | {"base_channels": 16},
    trained_steps=1,
    steps=2000,
)
register(NOISY, CLEAN)
