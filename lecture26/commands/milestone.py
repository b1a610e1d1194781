"""The command `milestone`: what a chapter's functions reach together, where no other command draws it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import typer
from torch import Tensor, nn

from lecture26.commands.sample import check_can_be_written
from lecture26.ddpm import (
    Diffusion,
    GaussianMixture,
    ddim_step,
    ddpm_step,
    exact_denoiser,
    linear_betas,
    noise_like,
    sample,
    training_step,
)
from lecture26.kit.data import load
from lecture26.kit.figures import PALETTE, show_grid, use_style
from lecture26.kit.paths import expanded
from lecture26.recipes import Trained
from lecture26.recipes.adaptation import Budget, build, fit, open_task
from lecture26.recipes.latent import load_pipeline
from lecture26.recipes.vae import round_trips
from lecture26.the_slides_checked import draw, parts_of
from lecture26.vae import active_latents, latent_scale, negative_log_likelihood, vae_loss
from lecture26.visual_prompt_tuning import (
    VPT,
    PromptBank,
    attention_to_prompts,
    attention_weights,
    pooled,
    prompted_tokens,
    storage_ratio,
    trainable_parameters,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def milestone(chapter: str, out: Path) -> None:
    """Draw a chapter's milestone, save it as a picture, and say what it shows.

    Args:
        chapter: one of MILESTONES.
        out: the picture to write.

    Raises:
        ValueError, OSError: if the picture cannot be written.
    """
    from matplotlib import pyplot as plt

    out = expanded(out)
    check_can_be_written(out)
    use_style()
    torch.manual_seed(0)
    figure, told = MILESTONES[chapter]()
    figure.savefig(out)
    plt.close(figure)
    typer.echo(f"{told}: {out}")


# --- Chapter 01: points ---

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


# --- Chapter 06: codes ---

ENCODED = 64  # images, of which the first eight are shown


@torch.no_grad()
def codes() -> tuple["Figure", str]:
    """Images on their way through the course's autoencoder, with what that costs."""
    trained = Trained("vae_shapes64")
    network, recipe = trained.network, trained.recipe
    images = load("scenes", "test", recipe.image_size)
    (trip,) = round_trips(network, images, torch.arange(ENCODED))
    x = images.batch(range(ENCODED))["image"]
    mean, log_variance = network.encode(x)
    std = recipe.kl_weight**0.5  # of the decoder's noise whose bound the loss is
    nats = negative_log_likelihood(x, trip["x_hat"], std) + trip["kl"]
    loss = vae_loss(x, trip["x_hat"], mean, log_variance, recipe.kl_weight) / x[0].numel()
    titles = [""] * 8 + [f"{decibels:.0f} dB" for decibels in trip["psnr"][:8]]
    shown = torch.cat([x[:8], trip["x_hat"][:8]])
    figure = show_grid(shown, 8, titles, ["image", "decoded"], inches_per_image=1.3)
    figure.set_figheight(figure.get_figheight() + 0.7)  # room for the titles
    told = (
        f"{x[0].numel():,} numbers in {mean[0].numel():,}: KL {trip['kl'].mean():.0f} nats, "
        f"$-$ELBO {nats.mean():.0f} nats, loss {loss:.4f}, "
        f"{active_latents(trip['mean']).float().mean():.0%} of the latents active, "
        f"latent scale {latent_scale(trip['latents']):.2f}"
    )
    figure.suptitle(told, fontsize="medium")
    return figure, f"{ENCODED} images of scenes through {trained.name}"


# --- Chapter 08: prompts ---

TASK = "digits"
NUM_PROMPTS = 4
LEARNING_RATE = 0.1
BUDGET = Budget(steps=80, batch_size=8, precision="fp32")
TESTED = 200  # images, of which the first 24 are shown


def prompts() -> tuple["Figure", str]:
    """The course's backbone, frozen, after deep prompts have learned digits; what it names and looks at."""
    trained = Trained("vit_photos32")
    images = open_task(TASK, trained.recipe.image_size)
    classes = images["train"].labels["class"]
    model = build("vpt-deep", trained.network, len(classes), NUM_PROMPTS, seed=0)
    fit(model, images["train"], LEARNING_RATE, BUDGET, progress=False)
    bank = PromptBank(trained.network)
    bank.add(TASK, model)
    tested = images["test"].batch(range(TESTED))
    with torch.no_grad():
        named = torch.stack(bank(tested["image"], [TASK] * TESTED)).argmax(dim=1)
        shares = shares_of_class_token(model.eval(), tested["image"])
    titles = [
        classes[name] if name == true else f"{classes[name]} for {classes[true]}"
        for name, true in zip(named[:24], tested["class"], strict=False)
    ]
    figure = show_grid(tested["image"][:24], 12, titles)
    figure.set_figheight(figure.get_figheight() + 1.2)  # room for the titles
    numbers = sum(parameter.numel() for parameter in trainable_parameters(model))
    right = (named == tested["class"]).float().mean()
    told = (
        f"{right:.0%} of {TESTED} digits right after {BUDGET.steps} steps; {numbers:,} numbers stored, "
        f"{stored_less(model, len(classes)):.0f} times fewer than a copy;\n"
        "the class token's attention to prompts, by block: " + ", ".join(f"{share:.2f}" for share in shares)
    )
    figure.suptitle(told, fontsize="medium")
    return figure, f"{TESTED} digits named by {trained.name} with deep prompts"


def shares_of_class_token(model: VPT, x: Tensor) -> list[float]:
    """The share of the class token's attention that goes to the prompts, for each block."""
    shares = []

    def note(block: nn.Module, inputs: tuple[Tensor]) -> None:
        weights = attention_weights(block.attn, block.norm1(inputs[0]))
        of_tokens = attention_to_prompts(weights, model.vit.num_prefix_tokens, model.num_prompts)
        shares.append(of_tokens[:, :, 0].mean().item())

    hooks = [block.register_forward_pre_hook(note) for block in model.vit.blocks]
    pooled(model.vit, prompted_tokens(model.vit, x, model.prompts), model.num_prompts)
    for hook in hooks:
        hook.remove()
    return shares


def stored_less(model: VPT, num_classes: int) -> float:
    """How many times less than a copy of the backbone the prompts and the head of a model are."""
    backbone = sum(weight.numel() for name, weight in model.vit.named_parameters() if "head" not in name)
    depth, num_prompts, dim = model.prompts.shape
    sizes = (torch.tensor([float(size)]) for size in (backbone, depth, num_prompts, dim))
    return storage_ratio(*sizes, num_classes).item()


# --- Chapter 09: all parts together ---

CAPTIONS = (
    "a large yellow star on a striped background",
    "a small red heart to the left of a large blue ring on a dark background",
    "a large green crescent on a checkered background",
    "a small purple cross above a large orange circle on a light background",
)
STEPS = 25


def assembled() -> tuple["Figure", str]:
    """What the trained parts draw of four captions, and again with another sampler and with more guidance."""
    pipeline = load_pipeline("text_to_image_shapes64")
    parts = parts_of(pipeline, steps=STEPS)
    rows = {
        "DDIM, $w=2$": parts,
        "DDPM, $w=2$": parts._replace(step=partial(ddpm_step, pipeline.respaced(STEPS))),
        "DDIM, $w=8$": parts_of(pipeline, w=8.0, steps=STEPS),
    }
    images = [draw(changed, CAPTIONS, torch.Generator().manual_seed(0)) for changed in rows.values()]
    figure = show_grid(torch.cat(images), len(CAPTIONS), row_titles=list(rows), inches_per_image=1.6)
    figure.set_figwidth(figure.get_figwidth() + 1.2)  # room for the names
    return figure, f"{len(CAPTIONS)} captions drawn in {len(rows)} ways by {STEPS} steps"


MILESTONES: dict[str, Callable[[], tuple["Figure", str]]] = {
    "ddpm": points,
    "vae": codes,
    "visual_prompt_tuning": prompts,
    "the_slides_checked": assembled,
}
