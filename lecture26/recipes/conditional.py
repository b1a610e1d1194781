"""Diffusion models that are told what to draw, or nothing, for classifier-free guidance (chapter 05)."""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from lecture26.classifier_free_guidance import classifier_free_guided, labels_after_dropout
from lecture26.kit.evaluation import attribute_accuracy, sample_quality
from lecture26.kit.image_set import ImageSet
from lecture26.kit.sample_draws import SampleDraws
from lecture26.recipes.ddpm import DDPM, EVALUATION_SAMPLES
from lecture26.recipes.ddpm import SMALL_SHAPES_32 as UNCONDITIONAL
from lecture26.recipes.readers import find_reader
from lecture26.recipes.recipe import count_classes, register
from lecture26.unet import UNet, zero_init

EVALUATION_WEIGHTS = (0.0, 1.0)  # w of the evaluation's samples


@dataclass(frozen=True, kw_only=True)
class ConditionalDDPM(DDPM):
    """A U-Net that denoises images given their labels, or given none.

    Its label tables begin at zero: a label says nothing until it has been learned, and a network that starts
    with the weights of an unconditional one starts with its answers.

    Attributes:
        labels: which of the data's labels it is told.
        num_classes: of each of these labels; taken from the data when training begins. The null label of
            each is this number.
        drop: the probability with which a training sample loses its labels, all of them together.
    """

    family: ClassVar[str] = "conditional_ddpm"

    labels: tuple[str, ...]
    num_classes: tuple[int, ...] = ()
    drop: float = 0.12

    def fitted_to(self, images: ImageSet) -> "ConditionalDDPM":
        num_classes = count_classes(self.data, images, self.labels)
        return replace(super().fitted_to(images), num_classes=num_classes)

    def build(self) -> nn.Module:
        model = UNet(self.channels, num_classes=self.num_classes, **self.model)
        zero_init(model.labels)
        return model

    def conditions(self, attributes: dict[str, Tensor]) -> Tensor:
        """What the network is told (B, labels) of images with attributes, by label's name (B,) each."""
        return torch.stack([attributes[name] for name in self.labels], dim=1)

    def null_conditions(self, count: int) -> Tensor:
        """The conditions (count, labels) that say nothing."""
        return torch.tensor(self.num_classes).expand(count, -1)

    def draw(self, images: ImageSet, random: SampleDraws) -> dict[str, Tensor]:
        batch = images.batch(random.integers(len(images)))
        shape = batch["image"].shape[1:]
        null_label = torch.tensor(self.num_classes)  # (labels,)
        return {
            "x_0": batch["image"],  # (B, C, H, W)
            "cond": labels_after_dropout(self.conditions(batch), null_label, random.uniform(), self.drop),
            "t": self.draw_steps(random),  # (B,)
            "noise": random.normal(*shape),  # (B, C, H, W)
        }

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        told = partial(model, cond=batch["cond"])
        return self.diffusion.loss(told, batch["x_0"], batch["t"], batch["noise"])

    def evaluate(self, model: nn.Module, images: ImageSet) -> dict[str, float]:
        """The test losses; and what a reader says of samples, if the checkpoints have one for the data.

        Args:
            model: the trained network.
            images: the data's test split; sample i is asked for the labels of its image i.

        Returns:
            "test_loss" with all labels given, "test_loss_unconditional" with none; with a reader also
            "samples", how many were drawn for each weight w of EVALUATION_WEIGHTS, and "NAME_w_W" for each
            NAME of `sample_quality` and each "accuracy_LABEL" of `attribute_accuracy`.
        """
        metrics = {
            "test_loss": replace(self, drop=0.0)._test_loss(model, images),
            "test_loss_unconditional": replace(self, drop=1.0)._test_loss(model, images),
        }
        reader = find_reader(self.data, images.image_size)
        if reader is None:
            return metrics
        count = min(EVALUATION_SAMPLES, len(images) // 2)
        metrics["samples"] = float(count)
        device = next(model.parameters()).device
        attributes = images.batch(range(count))
        wanted = {name: attributes[name] for name in self.labels}
        cond = self.conditions(wanted)

        def guided(w: float, indices: Tensor):
            null_cond = self.null_conditions(len(indices)).to(device)
            return classifier_free_guided(model, cond[indices].to(device), null_cond, w)

        for w in EVALUATION_WEIGHTS:
            samples = self.draw_samples(partial(guided, w), count, device)
            measured = sample_quality(reader, samples, images)
            accuracy = attribute_accuracy(reader, samples, wanted)
            measured |= {f"accuracy_{name}": share for name, share in accuracy.items()}
            metrics |= {f"{name}_w_{w:g}": value for name, value in measured.items()}
        return metrics


register(
    ConditionalDDPM(
        name="conditional_ddpm_shapes32",
        data=UNCONDITIONAL.data,
        labels=("shape", "colour"),
        image_size=UNCONDITIONAL.image_size,
        model=UNCONDITIONAL.model,
        steps=12_000,
        learning_rate=UNCONDITIONAL.learning_rate,
        start=UNCONDITIONAL.name,
    )
)
