"""What `sample` is to draw, and how it draws with a denoiser."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from lecture26.ddpm import Diffusion, ddim_step, sample
from lecture26.kit.sample_draws import SampleDraws
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
        seed: of all noise. Image n draws from a generator of its own, seeded with (seed, n) on the CPU, so
            that the first images are the same at any count, and on every device.
        device: where networks compute.
    """

    trained: Trained
    asked: str | None
    strength: float | None
    count: int
    steps: int
    step: Callable[..., Tensor]
    seed: int
    device: torch.device

    @cached_property
    def network(self) -> nn.Module:
        """The checkpoint's network, on the device."""
        return self.trained.network.to(self.device)

    def sample(self, diffusion: Diffusion, denoiser: Callable, shape: tuple[int, ...]) -> Tensor:
        """Draw what a denoiser draws.

        Args:
            diffusion: what the denoiser was trained for.
            denoiser: callable (x_t, t) -> output.
            shape: of each sample, such as (C, H, W).

        Returns:
            x_0, (B, *shape).
        """
        torch.empty(self.count, *shape)  # more than the memory holds is refused before it fills up
        draws = SampleDraws(self.seed, torch.arange(self.count))

        def with_own_noise(diffusion: Diffusion, denoiser: Callable, x_t: Tensor, t: Tensor, noise: Tensor):
            return self.step(diffusion, denoiser, x_t, t, draws.normal(*shape).to(x_t))

        x_T = draws.normal(*shape).to(self.device)
        step = self.step if self.step is ddim_step else with_own_noise  # DDIM as it stands takes no noise
        return sample(diffusion.respace(self.steps), denoiser, tuple(x_T.shape), step, x_T=x_T)
