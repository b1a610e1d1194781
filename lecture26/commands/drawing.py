"""What `sample` is to draw, and how it draws with a denoiser."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from lecture26.ddpm import sample
from lecture26.recipes import Trained


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What is to be drawn.

    Attributes:
        trained: the checkpoint to draw from.
        asked: what to draw, in words; None if nothing is asked for.
        strength: of what steers towards it, a gradient's scale or w.
        count: B, the number of images.
        steps: of denoising.
        step: the step of the sampler, as `lecture26.ddpm.sample` takes it.
        generator: of all noise; on the CPU, so that a seed gives the same images on every device.
        device: where networks compute.
    """

    trained: Trained
    asked: str | None
    strength: float | None
    count: int
    steps: int
    step: Callable[..., Tensor]
    generator: torch.Generator
    device: torch.device

    @cached_property
    def network(self) -> nn.Module:
        """The checkpoint's network, on the device."""
        return self.trained.network.to(self.device)

    def sample(self, denoiser: Callable) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] of a `denoiser`."""
        recipe, diffusion = self.trained.recipe, self.trained.diffusion.respace(self.steps)
        shape = (self.count, recipe.channels, recipe.image_size, recipe.image_size)
        x_T = torch.randn(shape, generator=self.generator).to(self.device)
        return sample(diffusion, denoiser, shape, self.step, self.generator, x_T)
