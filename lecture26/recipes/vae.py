"""Variational autoencoders of images (chapter 06)."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from lecture26.kit.evaluation import attribute_accuracy
from lecture26.kit.image_set import ImageSet
from lecture26.kit.sample_draws import SampleDraws
from lecture26.kit.shapes import ShapesAndScenes
from lecture26.recipes.readers import find_reader
from lecture26.recipes.recipe import EVALUATION_SEED, Recipe, register
from lecture26.vae import (
    KLVAE,
    active_latents,
    kl_to_standard_normal,
    latent_scale,
    psnr,
    reparameterize,
    vae_loss,
)

EVALUATION_IMAGES = 1024  # for what the readers read, of each kind
EVALUATION_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class VAERecipe(Recipe):
    """An autoencoder of images with Gaussian latents.

    Attributes:
        kl_weight: of the divergence, as `lecture26.vae.vae_loss` takes it.
    """

    family: ClassVar[str] = "vae"

    kl_weight: float

    def fitted_to(self, images: ImageSet) -> "VAERecipe":
        factor = self.build().factor
        if images.image_size % factor:
            raise ValueError(
                f"image_size must be a multiple of {factor} for the network of {self.name!r}; "
                f"got {images.image_size}"
            )
        return super().fitted_to(images)

    def build(self) -> nn.Module:
        return KLVAE(self.channels, **self.model)

    def draw(self, images: ImageSet, random: SampleDraws) -> dict[str, Tensor]:
        x = images.batch(random.integers(len(images)))["image"]  # (B, C, H, W)
        return {"x": x, "noise": random.normal(*self.latent_shape)}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        outputs = model(batch["x"], batch["noise"])
        # Sums over thousands of numbers: bfloat16 would lose their third digit.
        x_hat, mean, log_variance = (output.float() for output in outputs)
        loss = vae_loss(batch["x"], x_hat, mean, log_variance, self.kl_weight)
        return loss / batch["x"][0].numel()  # so that it does not grow with the image

    @cached_property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image's latents."""
        model = self.build()
        side = self.image_size // model.factor
        return model.latent_channels, side, side

    @torch.no_grad()
    def evaluate(self, model: nn.Module, images: ImageSet) -> dict[str, float]:
        """How much of an image survives the round trip, and what its latents are like.

        Args:
            model: the trained network.
            images: the data's test split.

        Returns:
            "psnr", "psnr_lowest" of the reconstructions, in decibels; "kl", in nats per image;
            "latent_mean", "latent_std" of all latent numbers together, "latent_scale", one over the latter;
            "active_latents", their share. Latents are drawn, once each, and reconstructions made of these. If
            the checkpoints have a reader for the data, or for a part of them, also for each of its labels
            "accuracy_PART_LABEL" and "accuracy_PART_all", what it reads in the reconstructions, and
            "accuracy_PART_original", all labels in the images themselves.
        """
        count = min(EVALUATION_IMAGES, len(images))
        trips = list(round_trips(model, images, torch.arange(count)))
        decibels = torch.cat([trip["psnr"] for trip in trips])
        latents = torch.cat([trip["latents"] for trip in trips])
        active = active_latents(torch.cat([trip["mean"] for trip in trips]))
        metrics = {
            "psnr": decibels.mean().item(),
            "psnr_lowest": decibels.min().item(),
            "kl": torch.cat([trip["kl"] for trip in trips]).mean().item(),
            "latent_mean": latents.mean().item(),
            "latent_std": latents.std().item(),
            "latent_scale": latent_scale(latents).item(),
            "active_latents": active.float().mean().item(),
        }
        for name, part in self.parts(images).items():
            metrics |= {f"accuracy_{name}_{label}": a for label, a in read_after(model, name, part).items()}
        return metrics

    def parts(self, images: ImageSet) -> dict[str, ImageSet]:
        """The labelled sets that the images come from, by the name of the data."""
        if isinstance(images, ShapesAndScenes):
            return dict(zip(("shapes", "scenes"), images.parts, strict=True))
        return {self.data: images}


@torch.no_grad()
def round_trips(model: nn.Module, images: ImageSet, indices: Tensor) -> Iterator[dict[str, Tensor]]:
    """Send images through the autoencoder, EVALUATION_BATCH at a time, always with the same noise.

    Args:
        model: a KLVAE.
        images: what to send.
        indices: which of them, (N,).

    Yields:
        For each batch: "x_hat", what comes out (B, C, H, W); "psnr" and "kl", (B,); "mean" and "latents",
        (B, latent_channels, h, w), the latter drawn. All on the CPU.
    """
    device = next(model.parameters()).device
    for part in indices.split(EVALUATION_BATCH):
        x = images.batch(part)["image"].to(device)
        mean, log_variance = model.encode(x)
        noise = SampleDraws(EVALUATION_SEED, part).normal(*mean.shape[1:]).to(device)
        z = reparameterize(mean, log_variance, noise)
        x_hat = model.decode(z)
        trip = {
            "x_hat": x_hat,
            "psnr": psnr(x, x_hat),
            "kl": kl_to_standard_normal(mean, log_variance),
            "mean": mean,
            "latents": z,
        }
        yield {name: values.cpu() for name, values in trip.items()}


def read_after(model: nn.Module, data: str, images: ImageSet) -> dict[str, float]:
    """What a reader reads in the reconstructions of the first EVALUATION_IMAGES images.

    Args:
        model: a KLVAE.
        data: the name of the data.
        images: of these data.

    Returns:
        The share of images read right, by label, and for "all" of them; "original": all of them, in the
        images themselves. Empty if the checkpoints have no reader for the data.
    """
    reader = find_reader(data, images.image_size)
    if reader is None:
        return {}
    indices = torch.arange(min(EVALUATION_IMAGES, len(images)))
    batch = images.batch(indices)
    original = batch.pop("image")
    x_hat = torch.cat([trip["x_hat"] for trip in round_trips(model, images, indices)])
    accuracy = attribute_accuracy(reader, x_hat, batch)
    return accuracy | {"original": attribute_accuracy(reader, original, batch)["all"]}


VAE_SHAPES_64 = VAERecipe(
    name="vae_shapes64",
    data="shapes_and_scenes",
    image_size=64,
    model={"latent_channels": 4, "base_channels": 32, "channel_multipliers": (1, 2), "patch_size": 2},
    kl_weight=1e-3,
    steps=5000,
    batch_size=32,
    learning_rate=2e-3,
)
# Sides eight times smaller: 256 numbers of 12,288, a quarter of what the other one keeps.
VAE_SHAPES_64_F8 = replace(
    VAE_SHAPES_64,
    name="vae_shapes64_f8",
    model=VAE_SHAPES_64.model | {"channel_multipliers": (1, 2, 2)},
)
register(VAE_SHAPES_64, VAE_SHAPES_64_F8)
