"""The command `milestone`: what a chapter's functions reach together, where no other command draws it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import typer
from torch import Tensor, nn

from lecture26.classifier_guidance import (
    NoisyClassifier,
    classifier_guided,
    classifier_training_step,
    sample_mean_shifted,
)
from lecture26.clip_guidance import (
    CLIP,
    Tokenizer,
    clip_guided,
    contrastive_step,
    cosine_similarity_matrix,
)
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
from lecture26.kit.image_set import ImageSet
from lecture26.kit.paths import expanded
from lecture26.kit.sample_draws import SampleDraws
from lecture26.latent_diffusion import (
    LatentDiffusion,
    captioned_training_step,
    recorded_weights,
    to_latents,
    word_maps,
)
from lecture26.recipes import Trained, load_diffusion, load_model
from lecture26.recipes.adaptation import Budget, build, fit, open_task
from lecture26.recipes.latent import load_pipeline, pipeline_of
from lecture26.recipes.recipe import Recipe
from lecture26.recipes.vae import round_trips
from lecture26.the_slides_checked import draw, parts_of
from lecture26.vae import SmallVAE, bound_on_grid, latent_scale, vae_loss, vae_training_step
from lecture26.visual_prompt_tuning import (
    VPT,
    PromptBank,
    attention_to_prompts,
    attention_weights,
    patches,
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


# --- Chapter 03: red stars ---

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
    x_T = torch.randn(STARS, 3, 32, 32, generator=torch.Generator().manual_seed(6))
    guided = classifier_guided(trained.network, guide.network, y, STAR_SCALE, trained.diffusion)
    generator = torch.Generator().manual_seed(16)
    shown = [sample(path, guided, x_T.shape, ddpm_step, generator, x_T, progress=False)]
    generator = torch.Generator().manual_seed(16)
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


# --- Chapter 04: sentences ---

CLIP_TRAINING_STEPS = 40
PAIRS = 64  # images with their captions, in a batch and for the test
PROMPTS = (
    "a large red star on a dark background",
    "a small blue ring on a light background",
    "a large green cross on a striped background",
    "a large pink crescent on a checkered background",
    "a yellow heart",
    "a small cyan square",
)
CLIPS = {"x_t": ("noisy_clip_shapes32", 400.0), "x_0": ("clip_shapes32", 800.0)}  # with their scales


def sentences() -> tuple["Figure", str]:
    """A CLIP that is trained here, and pictures for sentences by the long-trained ones, in both ways."""
    unet, diffusion = load_model("ddpm_shapes32"), load_diffusion("ddpm_shapes32")
    drawn = []
    for through, (name, scale) in CLIPS.items():
        clip = load_model(name)
        with torch.no_grad():
            text_features = clip.encode_text(clip.tokenizer(PROMPTS))
        guided = clip_guided(unet, clip, text_features, scale, diffusion, through)
        generator, shape = torch.Generator().manual_seed(5), (len(PROMPTS), 3, 32, 32)
        drawn.append(sample(diffusion.respace(50), guided, shape, ddpm_step, generator, progress=False))
    losses, found = trained_on_captions(clip.tokenizer)
    titles = [prompt[2:].replace(" on a ", "\non a ").replace(" background", "") for prompt in PROMPTS]
    figure = show_grid(torch.cat(drawn), len(PROMPTS), titles, list(CLIPS), inches_per_image=1.6)
    figure.set_figheight(figure.get_figheight() + 0.7)  # room for the titles
    told = (
        f"a CLIP after {len(losses)} steps: loss {losses[0]:.1f} to {losses[-1]:.1f}, "
        f"{found} of {PAIRS} captions found"
    )
    figure.suptitle(f"pictures for sentences; {told}", fontsize="medium")
    return figure, f"{len(PROMPTS)} prompts in two ways; {told}"


def trained_on_captions(tokenizer: Tokenizer) -> tuple[list[float], int]:
    """The losses of a small CLIP's training, and how many of PAIRS unseen images find their caption."""
    images, unseen, clip = load("shapes"), load("shapes", "test"), CLIP(tokenizer)
    optimizer = torch.optim.AdamW(clip.parameters(), lr=1e-3)
    losses = []
    for batch in torch.arange(CLIP_TRAINING_STEPS * PAIRS).split(PAIRS):
        x, tokens = images.batch(batch)["image"], tokenizer(images.captions(batch))
        loss = contrastive_step(optimizer, clip.encode_image, clip.encode_text, x, tokens, clip.logit_scale)
        losses.append(loss.item())
    with torch.no_grad():
        texts = clip.encode_text(tokenizer(unseen.captions(range(PAIRS))))
        similarity = cosine_similarity_matrix(
            clip.encode_image(unseen.batch(range(PAIRS))["image"]), texts
        )  # (PAIRS, PAIRS)
    return losses, int((similarity.argmax(dim=1) == torch.arange(PAIRS)).sum())


# --- Chapter 06: codes ---

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


# --- Chapter 07: pictures from words ---

SENTENCES = (
    "a large yellow star on a striped background",
    "a small red heart to the left of a large blue ring on a dark background",
    "a small blue heart to the left of a large red ring on a dark background",
    "a large cyan cross above a small orange circle on a checkered background",
)
SHOWN_WORDS = {4: "heart", 12: "ring", 15: "dark"}  # by their tokens in the second sentence
DRAWING_STEPS = 15
CAPTION_STEPS = 20  # of training
CAPTION_BATCH = 16


@torch.no_grad()
def pictures_from_words() -> tuple["Figure", str]:
    """Pictures from sentences, maps of words, a picture from a picture, and a half of one drawn anew."""
    pipeline = pipeline_of(Trained("text_to_image_shapes64"))

    def seeds(count: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in range(count)]

    drawn = pipeline.text_to_image(list(SENTENCES), steps=DRAWING_STEPS, generator=seeds(4), progress=False)
    with recorded_weights(pipeline.denoiser) as recorded:
        scene = pipeline.text_to_image(
            SENTENCES[1], w=0.0, steps=DRAWING_STEPS, generator=seeds(1), progress=False
        )
    layers = [word_maps(weights, 8, 8) for weights in recorded if weights.shape[2] == 64]
    maps = torch.stack(layers).mean(dim=0)[0, list(SHOWN_WORDS)]  # (3, 8, 8)
    maps = 2 * maps / maps.amax(dim=(1, 2), keepdim=True) - 1
    maps = maps.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)[:, None].expand(-1, 3, -1, -1)
    redrawn = pipeline.image_to_image(
        drawn[:1], "a large blue heart on a light background", 0.9, steps=DRAWING_STEPS, generator=seeds(1)
    )
    right_half = torch.zeros(1, 1, *drawn.shape[2:], dtype=torch.bool)
    right_half[..., drawn.shape[3] // 2 :] = True
    half = pipeline.inpaint(drawn[1:2], right_half, SENTENCES[1], steps=DRAWING_STEPS, generator=seeds(1))
    titles = [
        "star",
        "heart, ring",
        "colours exchanged",
        "cross, circle",
        "image to image",
        "right half anew",
    ]
    titles += ["scene", *(f"'{word}'" for word in SHOWN_WORDS.values())]
    figure = show_grid(torch.cat([drawn, redrawn, half, scene, maps]), 5, titles, inches_per_image=1.5)
    figure.set_figheight(figure.get_figheight() + 0.8)  # room for the titles
    first, last = losses_with_captions(pipeline)
    told = f"a small model's loss in {CAPTION_STEPS} steps with captions: from {first:.2f} to {last:.2f}"
    figure.suptitle(told, fontsize="medium")
    return figure, f"{len(SENTENCES)} sentences, drawn in {DRAWING_STEPS} steps"


def losses_with_captions(trained: LatentDiffusion) -> tuple[float, float]:
    """A small model's loss with captions, of the first and the last steps of a moment's training (means)."""
    settings = trained.settings | {
        "unet": {"base_channels": 32, "channel_multipliers": (1, 2), "num_blocks": 1},
        "text": {"width": 48},
    }
    learner = LatentDiffusion.from_settings(settings)
    images = load("shapes_and_scenes", "train", learner.image_size)
    indices = torch.arange(4 * CAPTION_BATCH)
    mean, log_variance = trained.vae.encode(images.batch(indices)["image"])
    tokenizer = learner.text_encoder.tokenizer
    captions, empty = tokenizer(images.captions(indices)), tokenizer([""])[0]
    optimizer = torch.optim.AdamW([p for p in learner.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for number in range(CAPTION_STEPS):
        random = SampleDraws(0, torch.arange(CAPTION_BATCH * number, CAPTION_BATCH * (number + 1)))
        chosen, shape = random.integers(len(indices)), mean.shape[1:]
        z_0 = to_latents(mean[chosen], log_variance[chosen], random.normal(*shape), learner.latent_scale)
        with torch.enable_grad():
            loss = captioned_training_step(
                optimizer,
                learner.diffusion.loss,
                learner.denoiser,
                learner.text_encoder,
                z_0,
                captions[chosen],
                empty,
                random.uniform(),
                0.1,
                random.integers(learner.diffusion.num_steps),
                random.normal(*shape),
            )
        losses.append(loss.item())
    return sum(losses[:5]) / 5, sum(losses[-5:]) / 5


# --- Chapter 08: prompts ---

TASK = "digits"
NUM_PROMPTS = 4
LEARNING_RATE = 0.1
BUDGET = Budget(steps=80, batch_size=8, precision="fp32")
LORA_RATE, LORA_BUDGET = 0.01, Budget(steps=40, batch_size=8, precision="fp32")
TESTED = 200  # images, of which the first 24 are shown


def prompts() -> tuple["Figure", str]:
    """The course's backbone, frozen, after deep prompts have learned digits; what it names and looks at.

    Besides, LoRA learns the digits, and is merged into the weights of its copy.
    """
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
    by_lora, moved_by_merging = lora_then_merged(trained.network, images["train"], tested)
    titles = [
        classes[name] if name == true else f"{classes[name]} for {classes[true]}"
        for name, true in zip(named[:24], tested["class"], strict=False)
    ]
    figure = show_grid(tested["image"][:24], 12, titles)
    figure.set_figheight(figure.get_figheight() + 1.5)  # room for the titles
    numbers = sum(parameter.numel() for parameter in trainable_parameters(model))
    right = (named == tested["class"]).float().mean()
    told = (
        f"{right:.0%} of {TESTED} digits right after {BUDGET.steps} steps; {numbers:,} numbers stored, "
        f"{stored_less(model, len(classes)):.0f} times fewer than a copy;\n"
        "the class token's attention to prompts, by block: "
        + ", ".join(f"{share:.2f}" for share in shares)
        + f";\nLoRA: {by_lora:.0%} right after {LORA_BUDGET.steps} steps; merged, its logits move by "
        f"{moved_by_merging:.0e}; patches times kernel are timm's tokens to "
        f"{deviation_of_tokens(trained.network, tested['image']):.0e}"
    )
    figure.suptitle(told, fontsize="medium")
    return figure, f"{TESTED} digits named by {trained.name} with deep prompts"


def lora_then_merged(vit: nn.Module, images: ImageSet, tested: dict[str, Tensor]) -> tuple[float, float]:
    """The share of tested images that LoRA names right, and by how much merging moves a logit at most."""
    classes = len(images.labels["class"])
    model = build("lora", vit, classes, NUM_PROMPTS, seed=0)
    fit(model, images, LORA_RATE, LORA_BUDGET, progress=False)
    with torch.no_grad():
        logits = model.eval()(tested["image"])
        for block in model.blocks:
            block.attn.qkv = block.attn.qkv.merged()
        moved = (model(tested["image"]) - logits).abs().max().item()
    return (logits.argmax(dim=1) == tested["class"]).float().mean().item(), moved


def deviation_of_tokens(vit: nn.Module, x: Tensor) -> float:
    """How far the tokens of images x, as patches times the kernel, are from timm's."""
    projection = vit.patch_embed.proj
    tokens = patches(x, vit.patch_embed.patch_size[0]) @ projection.weight.flatten(1).mT + projection.bias
    return (tokens - vit.patch_embed(x)).abs().max().item()


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
    "classifier_guidance": stars,
    "clip_guidance": sentences,
    "vae": codes,
    "latent_diffusion": pictures_from_words,
    "visual_prompt_tuning": prompts,
    "the_slides_checked": assembled,
}
