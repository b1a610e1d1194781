"""Unconditional diffusion models of images, on any data set or folder (chapters 01 and 02)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from lecture26.ddpm import SCHEDULES, Diffusion, ddim_step, sample
from lecture26.kit.evaluation import sample_quality
from lecture26.kit.image_set import ImageSet
from lecture26.kit.progress import progress_bar
from lecture26.kit.sample_draws import SampleDraws
from lecture26.kit.validation import check_choice
from lecture26.recipes.readers import find_reader
from lecture26.recipes.recipe import EVALUATION_SEED, Recipe, register
from lecture26.unet import UNet

DENSITIES = ("steps", "signal")
EVALUATION_BATCHES = 16  # for the test loss
EVALUATION_SAMPLES = 512
EVALUATION_STEPS = 50  # of DDIM


@dataclass(frozen=True, kw_only=True)
class DDPM(Recipe):
    """A U-Net that denoises images.

    Attributes:
        schedule: "cosine" or "linear".
        diffusion_steps: T, the steps of the schedule.
        prediction, clip: as `lecture26.ddpm.Diffusion` takes them.
        density: what is uniform over the steps drawn in training. "steps": all steps alike, as in Ho et al.
            2020. "signal": alpha_bar is uniform on [0, 1], so that the logarithm of the signal-to-noise ratio
            alpha_bar / (1 - alpha_bar) has the logistic density, of mean 0 and standard deviation 1.8. That
            favours the middle, where it is decided what is drawn, over steps that are nearly noise or nearly
            clean, as does the normal density of Karras et al. 2022, "Elucidating the design space of
            diffusion-based generative models", section 5.
    """

    family: ClassVar[str] = "ddpm"

    schedule: str = "cosine"
    diffusion_steps: int = 1000
    prediction: str = "v"
    clip: bool = True
    density: str = "steps"

    def __post_init__(self):
        check_choice("density", self.density, DENSITIES)

    def fitted_to(self, images: ImageSet) -> "DDPM":
        levels = len(self.model["channel_multipliers"])
        smallest = self.model["patch_size"] * 2 ** (levels - 1)  # pixels that become one at the lowest level
        if images.image_size % smallest:
            raise ValueError(
                f"image_size must be a multiple of {smallest} for the network of {self.name!r}; "
                f"got {images.image_size}"
            )
        return super().fitted_to(images)

    def settings(self) -> dict:
        """As every recipe's; `density` is among them only where it is not "steps", as it always was once."""
        settings = super().settings()
        if self.density == "steps":
            del settings["density"]
        return settings

    def build(self) -> nn.Module:
        return UNet(self.channels, **self.model)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what is denoised."""
        return self.channels, self.image_size, self.image_size

    @cached_property
    def diffusion(self) -> Diffusion:
        """The diffusion that the network is trained for."""
        betas = SCHEDULES[self.schedule](self.diffusion_steps)
        return Diffusion(betas, prediction=self.prediction, clip=self.clip)

    def draw(self, images: ImageSet, random: SampleDraws) -> dict[str, Tensor]:
        x_0 = self.draw_x_0(images, random)  # (B, C, H, W)
        return {
            "x_0": x_0,
            "t": self.draw_steps(random),  # (B,)
            "noise": random.normal(*x_0.shape[1:]),  # (B, C, H, W)
        }

    def draw_x_0(self, images: ImageSet, random: SampleDraws) -> Tensor:
        """What is made noisy, (B, C, H, W): some of the images."""
        return images.batch(random.integers(len(images)))["image"]

    def draw_steps(self, random: SampleDraws) -> Tensor:
        """Steps t of the recipe's density, (B,) int64."""
        if self.density == "steps":
            return random.integers(self.diffusion_steps)
        # P(t) = alpha_bar_{t-1} - alpha_bar_t: as many steps as have more signal than a uniform number
        alpha_bar = self.diffusion.alpha_bar  # (T,), falling
        t = (alpha_bar > random.uniform()[:, None]).sum(dim=1)  # (B,)
        return t.clamp(max=self.diffusion_steps - 1)  # the last step leaves a little signal

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return self.diffusion.loss(model, batch["x_0"], batch["t"], batch["noise"])

    def evaluate(self, model: nn.Module, images: ImageSet) -> dict[str, float]:
        """The test loss; and what a reader says of samples, if the checkpoints have one for the data.

        Args:
            model: the trained network.
            images: the data's test split.

        Returns:
            "test_loss", over all steps alike, whatever the density; with a reader also "samples", how many
            were drawn, and as `sample_quality` says.
        """
        metrics = {"test_loss": self._test_loss(model, images)}
        reader = find_reader(self.data, images.image_size)
        if reader is not None:
            # As many real images again are needed twice: to compare with, and to be compared.
            count = min(EVALUATION_SAMPLES, len(images) // 2)
            metrics["samples"] = float(count)
            device = next(model.parameters()).device
            samples = self.draw_samples(lambda indices: model, count, device)
            metrics |= sample_quality(reader, samples, images)
        return metrics

    def _test_loss(self, model: nn.Module, images: ImageSet) -> float:
        return replace(self, density="steps").mean_loss(model, images, EVALUATION_BATCHES, EVALUATION_SEED)

    def draw_samples(
        self,
        denoiser_of: Callable[[Tensor], Callable],
        count: int,
        device: torch.device,
        steps: int = EVALUATION_STEPS,
    ) -> Tensor:
        """Samples by DDIM, always from the same noise: (count, *shape).

        denoiser_of(indices) -> the denoiser that draws the samples of these numbers.
        """
        diffusion = self.diffusion.respace(min(steps, self.diffusion_steps))
        generator = torch.Generator().manual_seed(EVALUATION_SEED)
        x_T = torch.randn(count, *self.shape, generator=generator)
        samples = []
        batches = torch.arange(count).split(self.batch_size)
        for indices in progress_bar(batches, "sampling"):
            denoiser, noise = denoiser_of(indices), x_T[indices].to(device)
            x_0 = sample(diffusion, denoiser, noise.shape, ddim_step, generator, noise, progress=False)
            samples.append(x_0)
        return torch.cat(samples)


IMAGES_32 = DDPM(
    name="ddpm",
    data="digits",
    image_size=32,
    # Folding 2 x 2 pixels at the input makes a step 3.5 times as fast as without.
    model={"base_channels": 32, "channel_multipliers": (1, 2, 3), "patch_size": 2},
    steps=20_000,
    learning_rate=1e-3,
)
SMALL_SHAPES_32 = replace(
    IMAGES_32,
    name="small_ddpm_shapes32",
    data="shapes",
    model={"base_channels": 32, "channel_multipliers": (1, 2, 3), "num_blocks": 1, "patch_size": 2},
    steps=22_000,
)
# It took longer than one sitting, so it is made in two parts; the second begins with the averaged weights of
# the first, and draws images and noise of its own. The rate stays the same. (At 2e-3 the loss leapt from 0.04
# to 0.7 after 4,200 steps, and stayed there.)
SHAPES_32_PART_1 = replace(
    IMAGES_32,
    name="ddpm_shapes32_part1",
    data="shapes",
    # After equal time the loss was lower with 64 channels at the highest of the three resolutions than with
    # 32, and no lower with more channels at the others, or more blocks.
    model={"base_channels": 32, "channel_multipliers": (2, 2, 3), "num_blocks": 1, "patch_size": 2},
    density="signal",
    steps=5_000,
    learning_rate=1e-3,
    decay_to=1.0,
    ema_decay=0.9995,
    seed=1,
)
SHAPES_32 = replace(SHAPES_32_PART_1, name="ddpm_shapes32", steps=20_000, seed=2, start=SHAPES_32_PART_1.name)
register(IMAGES_32, SMALL_SHAPES_32, SHAPES_32_PART_1, SHAPES_32)
