"""The milestone of chapter 06: codes."""

from typing import TYPE_CHECKING

import torch

from lecture26.kit.data import load
from lecture26.recipes import Trained
from lecture26.recipes.vae import round_trips
from lecture26.vae import SmallVAE, bound_on_grid, latent_scale, vae_loss, vae_training_step

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENCODED = 64  # images, of which the first six are shown
SHOWN = 6
DIGIT_STEPS = 1000
DIGIT_WEIGHT = 0.3  # of the divergence, and so the variance of the digits' noise
MEASURED = 50  # digits, whose evidence and bound are found on a grid


@torch.no_grad()
def codes() -> tuple["Figure", str]:
    """A VAE of digits that is trained here, and images on their way through the course's autoencoder."""
    from matplotlib import pyplot as plt
    from torchvision.utils import make_grid

    trained = Trained("vae_shapes64")
    network, recipe = trained.network, trained.recipe
    images = load("scenes", "test", recipe.image_size)
    (trip,) = round_trips(network, images, torch.arange(ENCODED))
    x = images.batch(range(ENCODED))["image"]
    mean, log_variance = network.encode(x)
    loss = vae_loss(x, trip["x_hat"], mean, log_variance, recipe.kl_weight) / x[0].numel()
    digits, nats = trained_on_digits()
    along = torch.distributions.Normal(0.0, 1.0).icdf(torch.linspace(0.03, 0.97, 9))
    plane = torch.cartesian_prod(along.flip(0), along).flip(1)  # the second number upwards
    of_digits = digits.decode(plane).clamp(-1, 1).view(-1, 1, 8, 8)
    of_images = torch.cat([x[:SHOWN], trip["x_hat"][:SHOWN]]).clamp(-1, 1)
    titles = (
        f"two latent numbers: log evidence\n{nats[0]:.1f}, bound {nats[1]:.1f} nats a digit",
        f"images, and decoded with {trip['psnr'].mean():.0f} dB: {x[0].numel():,} numbers in "
        f"{mean[0].numel():,},\nKL {trip['kl'].mean():.0f} nats, loss {loss:.4f}, "
        f"latent scale {latent_scale(trip['latents']):.2f}",
    )
    pictures = (
        make_grid(of_digits, nrow=9, padding=1, pad_value=0.3),
        make_grid(of_images, SHOWN, pad_value=1.0),
    )
    figure, axes = plt.subplots(1, 2, figsize=(13, 4), width_ratios=[1, 2.7], layout="constrained")
    for axis, title, picture in zip(axes, titles, pictures, strict=True):
        axis.imshow((picture.permute(1, 2, 0) + 1) / 2, interpolation="nearest")
        axis.set_title(title, fontsize="medium")
        axis.axis("off")
    return figure, f"codes of digits, trained here, and {ENCODED} images of scenes through {trained.name}"


@torch.enable_grad()
def trained_on_digits() -> tuple[SmallVAE, list[float]]:
    """A VAE of digits with two latent numbers; the mean log evidence and the mean bound of unseen digits."""
    learned, unseen = (load("digits", split, 8) for split in ("train", "test"))
    pixels = learned.batch(range(len(learned)))["image"].flatten(1)
    network = SmallVAE(64, 2)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, DIGIT_STEPS)
    generator = torch.Generator().manual_seed(0)
    for _ in range(DIGIT_STEPS):
        x = pixels[torch.randint(len(pixels), (64,), generator=generator)]
        noise = torch.randn(64, 2, generator=generator)
        vae_training_step(optimizer, network.encode, network.decode, x, noise, DIGIT_WEIGHT)
        schedule.step()
    network.requires_grad_(False)
    tested = unseen.batch(range(MEASURED))["image"].flatten(1)
    side = torch.arange(-6, 6.01, 0.08)
    guess = network.encode(tested)
    nats = bound_on_grid(
        tested, network.decode, DIGIT_WEIGHT**0.5, *guess, torch.cartesian_prod(side, side), 0.08**2
    )
    return network, [values.mean().item() for values in nats]
