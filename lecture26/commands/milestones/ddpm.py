"""The milestone of chapter 01: points."""

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lecture26.ddpm import (
    Diffusion,
    GaussianMixture,
    ddim_step,
    exact_denoiser,
    linear_betas,
    noise_like,
    sample,
    training_step,
)
from lecture26.kit.figures import PALETTE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIXTURE = GaussianMixture(  # that of chapter 01
    weights=[0.5, 0.3, 0.2], means=[[-0.55, -0.35], [0.6, -0.3], [0.05, 0.6]], stds=[0.12, 0.10, 0.16]
)
DIFFUSION_STEPS = 200
TRAINING_STEPS = 1500
POINTS = 1500


class PointDenoiser(nn.Module):
    """A small network (B, 2), (B,) -> (B, 2): the predicted velocity of points."""

    def __init__(self, alpha_bar: Tensor, width: int = 96):
        super().__init__()
        self.register_buffer("log_snr", (alpha_bar / (1 - alpha_bar)).log().float())
        self.layers = nn.Sequential(
            nn.Linear(2 + 8, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2),
        )  # fmt: skip

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The velocity (B, 2) of noisy points x_t (B, 2) at their steps t (B,)."""
        angles = self.log_snr[t][:, None] * torch.tensor([0.1, 0.25, 0.5, 1.0])  # (B, 4)
        return self.layers(torch.cat([x_t, angles.sin(), angles.cos()], dim=1))


def points() -> tuple["Figure", str]:
    """Points of a mixture, drawn by the exact denoiser and by a network that is trained here."""
    from matplotlib import pyplot as plt

    diffusion = Diffusion(linear_betas(DIFFUSION_STEPS), prediction="v")
    network, losses = trained_on_points(diffusion)
    draw = partial(sample, shape=(POINTS, 2), progress=False, generator=torch.Generator().manual_seed(1))
    exact = exact_denoiser(MIXTURE, diffusion)
    shown = {
        "samples of the data": MIXTURE.sample(POINTS)[0],
        f"exact denoiser, DDPM, {DIFFUSION_STEPS} steps": draw(diffusion, exact),
        "trained network, DDIM, 50 steps": draw(diffusion.respace(50), network, step=ddim_step),
    }
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.6), layout="constrained")
    for axis, (title, x), colour in zip(axes, shown.items(), ("sky", "blue", "vermilion"), strict=False):
        axis.scatter(*x.T, s=2, color=PALETTE[colour])
        axis.set(title=title, aspect="equal", xlim=(-1.2, 1.2), ylim=(-1.1, 1.3))
    smooth = torch.tensor(losses).unfold(0, 50, 10).mean(dim=1)
    axes[3].plot(range(50, len(losses) + 1, 10), smooth, color=PALETTE["vermilion"])
    axes[3].set(title="loss of the network (mean of 50)", xlabel="training step")
    return figure, f"{POINTS:,} points by two samplers, and a network after {TRAINING_STEPS:,} training steps"


def trained_on_points(diffusion: Diffusion) -> tuple[nn.Module, list[float]]:
    """A network that has learned the mixture, and the losses of its training."""
    network = PointDenoiser(diffusion.alpha_bar)
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TRAINING_STEPS)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(TRAINING_STEPS):
        x_0 = MIXTURE.sample(256, generator)[0].float()
        t = torch.randint(0, DIFFUSION_STEPS, (256,), generator=generator)
        loss = training_step(optimizer, partial(diffusion.loss, network), x_0, t, noise_like(x_0, generator))
        schedule.step()
        losses.append(loss.item())
    return network, losses
