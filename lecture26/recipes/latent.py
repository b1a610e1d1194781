"""Latent diffusion with text: a U-Net that draws a VAE's latents as a caption says (chapter 07)."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import compress
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lecture26.classifier_free_guidance import labels_after_dropout
from lecture26.clip_guidance import Tokenizer, split_words
from lecture26.ddpm import SCHEDULES, Diffusion
from lecture26.kit.checkpoints import load_card
from lecture26.kit.evaluation import attribute_accuracy
from lecture26.kit.image_set import ImageSet
from lecture26.kit.processes import process_state
from lecture26.kit.progress import progress_bar
from lecture26.kit.sample_draws import SampleDraws
from lecture26.kit.shapes import LOSABLE_PARTS, NO_SIDE, SIDES, ShapesAndScenes, leave_out, noun_sides
from lecture26.latent_diffusion import LatentDiffusion, TextDenoiser, to_latents
from lecture26.recipes.readers import find_reader
from lecture26.recipes.recipe import EVALUATION_SEED, Recipe, register
from lecture26.recipes.trained import Trained, load_model

EVALUATION_IMAGES = 1024  # for the test loss
EVALUATION_BATCHES = 16
EVALUATION_SAMPLES = 128  # of each kind
EVALUATION_STEPS = 50  # of DDIM
EVALUATION_WEIGHT = 2.0  # w of the evaluation's samples
ENCODING_BATCH = 64
WORDS_FROM = 4096  # captions, in which every word of the language occurs


class EncodedImages(ImageSet):
    """Captioned images whose latents are computed once, when they are first asked for, and kept in memory.

    Attributes:
        images: the captioned images.
    """

    labels: dict[str, tuple[str, ...]] = {}

    def __init__(self, images: ShapesAndScenes, vae: str, count: int):
        """Describe a set; nothing is encoded yet.

        Args:
            images: captioned images.
            vae: the checkpoint of the VAE that encodes them.
            count: how many of them, from the first on.
        """
        self.images, self._vae, self._count = images, vae, min(count, len(images))
        self.channels, self.image_size = images.channels, images.image_size

    def __len__(self) -> int:
        return self._count

    def batch(self, indices: Tensor | Sequence[int]) -> dict[str, Tensor]:
        return self.images.batch(self._checked(indices))

    def captions(self, indices: Tensor | Sequence[int]) -> list[str]:
        """One sentence for each image of `indices`, which are those of `batch`."""
        return self.images.captions(self._checked(indices))

    def moments(self, indices: Tensor | Sequence[int]) -> tuple[Tensor, Tensor]:
        """The mean and the log-variance of the latents of some images, (B, c, h, w) float32 each."""
        mean, log_variance = self._moments
        indices = self._checked(indices)
        return mean[indices].float(), log_variance[indices].float()

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        """Of all images, in half precision: 4 kB for each of 64 pixels."""
        device = process_state().device
        vae = load_model(self._vae).to(device)
        parts = []
        with torch.no_grad():
            for indices in progress_bar(torch.arange(len(self)).split(ENCODING_BATCH), "encoding"):
                moments = vae.encode(self.batch(indices)["image"].to(device))
                parts.append(tuple(values.half().cpu() for values in moments))
        mean, log_variance = map(torch.cat, zip(*parts, strict=True))
        return mean, log_variance


@dataclass(frozen=True, kw_only=True)
class LatentDiffusionRecipe(Recipe):
    """A U-Net that denoises a VAE's latents given a caption, or the empty one.

    Attributes:
        vae: the checkpoint of the VAE; it is not trained.
        latent_scale, vae_model: the scale of its latents, and its settings; taken from its card when training
            begins.
        num_encoded: how many training images there are; their latents are kept in memory.
        scenes: the share of scenes in what the network is shown; the rest are single shapes.
        words: of the captions; taken from the data when training begins.
        length: of a row of tokens.
        text, attention: keyword arguments of the text encoder and of the U-Net's TextAttention.
        shorten: with this probability each, a caption loses the size or the colour of an object, or the
            background.
        drop: the probability with which a caption is replaced by the empty one.
        lesson: weight of the cross entropy with which the text encoder learns on which side a noun stands.
        schedule, diffusion_steps, prediction: of the diffusion.
    """

    family: ClassVar[str] = "latent_diffusion"

    vae: str
    latent_scale: float | None = None
    vae_model: dict = field(default_factory=dict)
    num_encoded: int = 100_000
    scenes: float = 0.8
    words: tuple[str, ...] = ()
    length: int = 20
    text: dict
    attention: dict = field(default_factory=dict)
    shorten: float = 0.1
    drop: float = 0.1
    lesson: float = 3.0
    schedule: str = "cosine"
    diffusion_steps: int = 1000
    prediction: str = "v"

    def load_images(self, split: str) -> EncodedImages:
        images = super().load_images(split)
        if not isinstance(images, ShapesAndScenes):
            raise ValueError(f"data must be 'shapes_and_scenes', which has captions; got {self.data!r}")
        count = self.num_encoded if split == "train" else EVALUATION_IMAGES
        return EncodedImages(images, self.vae, count)

    def fitted_to(self, images: EncodedImages) -> "LatentDiffusionRecipe":
        card = load_card(self.vae)
        if "latent_scale" not in card["metrics"]:
            raise ValueError(f"vae must be a VAE, whose card has a latent_scale; {self.vae!r} has none")
        captions = images.images.captions(range(WORDS_FROM))
        return replace(
            super().fitted_to(images),
            latent_scale=card["metrics"]["latent_scale"],
            vae_model={"in_channels": card["settings"]["channels"]} | card["settings"]["model"],
            words=tuple(sorted({word for caption in captions for word in split_words(caption)})),
        )

    def build(self) -> nn.Module:
        pipeline = LatentDiffusion.from_settings(self.pipeline_settings())
        return TextDenoiser(pipeline.denoiser, pipeline.text_encoder, len(SIDES))

    def pipeline_settings(self) -> dict:
        """What `LatentDiffusion.from_settings` makes the untrained pipeline of."""
        return {
            "vae": self.vae_model,
            "unet": self.model,
            "attention": self.attention,
            "text": self.text,
            "words": list(self.words),
            "length": self.length,
            "schedule": self.schedule,
            "diffusion_steps": self.diffusion_steps,
            "prediction": self.prediction,
            "latent_scale": self.latent_scale,
            "image_size": self.image_size,
        }

    def pipeline(self, model: TextDenoiser) -> LatentDiffusion:
        """The whole, of a trained model and the checkpoint of its VAE; frozen, in evaluation mode.

        Raises:
            ValueError: if that checkpoint is not the one whose latents the model was trained on.
        """
        vae = Trained(self.vae)
        if vae.card["metrics"].get("latent_scale") != self.latent_scale:
            raise ValueError(
                f"{self.name!r} was trained with another VAE than what {self.vae!r} is now: train it anew"
            )
        with torch.device("cpu"):
            pipeline = LatentDiffusion.from_settings(self.pipeline_settings())
        pipeline.vae.load_state_dict(vae.network.state_dict())
        pipeline.denoiser.load_state_dict(model.unet.state_dict())
        pipeline.text_encoder.load_state_dict(model.text_encoder.state_dict())
        return pipeline.to(next(model.parameters()).device).eval().requires_grad_(False)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """What turns captions into tokens."""
        return Tokenizer(self.words, self.length)

    @cached_property
    def diffusion(self) -> Diffusion:
        """The diffusion that the network is trained for."""
        return Diffusion(SCHEDULES[self.schedule](self.diffusion_steps), prediction=self.prediction)

    def draw(self, images: EncodedImages, random: SampleDraws) -> dict[str, Tensor]:
        indices = self.draw_indices(images, random)
        x_0 = self.draw_x_0(images, indices, random)
        captions = self.shortened_captions(images, indices, random)
        empty, u = self.tokenizer([""])[0], random.uniform()  # (L,), (B,)
        return {
            "x_0": x_0,  # (B, c, h, w)
            "tokens": labels_after_dropout(self.tokenizer(captions), empty, u, self.drop),  # (B, L)
            "sides": labels_after_dropout(self.sides_of(captions), torch.tensor(NO_SIDE), u, self.drop),
            "t": random.integers(self.diffusion_steps),  # (B,)
            "noise": random.normal(*x_0.shape[1:]),  # (B, c, h, w)
        }

    def draw_indices(self, images: EncodedImages, random: SampleDraws) -> Tensor:
        """Numbers of images, (B,): even ones are single shapes, odd ones scenes."""
        return 2 * random.integers(len(images) // 2) + (random.uniform() < self.scenes)

    def draw_x_0(self, images: EncodedImages, indices: Tensor, random: SampleDraws) -> Tensor:
        """Scaled latents of some images, (B, c, h, w), drawn anew each time."""
        mean, log_variance = images.moments(indices)
        return to_latents(mean, log_variance, random.normal(*mean.shape[1:]), self.latent_scale)

    def shortened_captions(self, images: EncodedImages, indices: Tensor, random: SampleDraws) -> list[str]:
        """The captions of some images, parts of them left out at random."""
        is_lost = torch.stack([random.uniform() < self.shorten for _ in LOSABLE_PARTS], dim=1)  # (B, 5)
        lost = [list(compress(LOSABLE_PARTS, row)) for row in is_lost.tolist()]
        return list(map(leave_out, images.captions(indices), lost))

    def sides_of(self, captions: Sequence[str]) -> Tensor:
        """For each token of B captions the number of its side in SIDES, or NO_SIDE: (B, L) int64."""
        sides = torch.full((len(captions), self.length), NO_SIDE)
        for row, caption in zip(sides, captions, strict=True):
            of_words = noun_sides(caption)
            row[1 : 1 + len(of_words)] = torch.tensor(of_words)  # the first token is 'begin'
        return sides

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = []

        def told(x_t: Tensor, t: Tensor) -> Tensor:
            output, sides = model(x_t, t, batch["tokens"])
            logits.append(sides)
            return output

        loss = self.diffusion.loss(told, batch["x_0"], batch["t"], batch["noise"])
        # a mean over all tokens, so that several processes count each noun as one process would
        wrong = cross_entropy(logits[0], batch["sides"], ignore_index=NO_SIDE, reduction="sum")
        return loss + self.lesson * wrong / batch["sides"].numel()

    def evaluate(self, model: nn.Module, images: EncodedImages) -> dict[str, float]:
        """The test losses, and what readers say of samples, if the checkpoints have them for the data.

        Args:
            model: the trained network.
            images: the data's test split; samples are asked for what its images show.

        Returns:
            "test_loss" given captions, "test_loss_unconditional" given the empty one, both with steps and
            captions drawn as in training; with readers "samples",
            how many of each kind were drawn, "accuracy_PART_LABEL" and "accuracy_PART_all" for the parts
            shapes and scenes, and "accuracy_shapes_held_out", "accuracy_scenes_held_out".
        """
        metrics = {
            "test_loss": replace(self, drop=0.0, lesson=0.0)._test_loss(model, images),
            "test_loss_unconditional": replace(self, drop=1.0, lesson=0.0)._test_loss(model, images),
        }
        pipeline, held_out = self.pipeline(model), self.load_images("held_out").images
        for number, name in enumerate(("shapes", "scenes")):
            reader = find_reader(name, images.image_size)
            if reader is None:
                continue
            count = min(EVALUATION_SAMPLES, len(images))
            metrics["samples"] = float(count)
            of_part = {
                split: s.parts[number] for split, s in (("test", images.images), ("held_out", held_out))
            }
            for split, part in of_part.items():
                wanted = part.attributes(range(count))
                drawn = draw_captions(
                    pipeline, part.captions(range(count)), EVALUATION_WEIGHT, EVALUATION_STEPS
                )
                accuracy = attribute_accuracy(reader, drawn, wanted)
                if split == "test":
                    metrics |= {f"accuracy_{name}_{label}": share for label, share in accuracy.items()}
                else:
                    metrics[f"accuracy_{name}_held_out"] = accuracy["all"]
        return metrics

    def _test_loss(self, model: nn.Module, images: EncodedImages) -> float:
        return self.mean_loss(model, images, EVALUATION_BATCHES, EVALUATION_SEED)


def draw_captions(
    pipeline: LatentDiffusion,
    captions: Sequence[str],
    w: float,
    steps: int,
    batch_size: int = 64,
    first_seed: int = 0,
) -> Tensor:
    """An image for each caption, (B, C, H, W) on the CPU, each from noise of its own.

    Args:
        pipeline: what draws.
        captions: B texts.
        w, steps: as `LatentDiffusion.text_to_image` takes them.
        batch_size: images drawn at once.
        first_seed: the seed of the first image's noise; the next one's is one more, and so on.
    """
    images = []
    starts = range(0, len(captions), batch_size)
    for start in progress_bar(starts, "sampling"):
        part = list(captions[start : start + batch_size])
        generators = [torch.Generator().manual_seed(first_seed + start + place) for place in range(len(part))]
        drawn = pipeline.text_to_image(part, w=w, steps=steps, generator=generators, progress=False)
        images.append(drawn.cpu())
    return torch.cat(images)


def load_pipeline(name: str) -> LatentDiffusion:
    """The pipeline of a checkpoint: frozen, in evaluation mode, on the CPU.

    Raises:
        CheckpointError: if it or its VAE is missing or damaged.
        ValueError: if the checkpoint draws no images from text.
    """
    return pipeline_of(Trained(name))


def pipeline_of(trained: Trained) -> LatentDiffusion:
    """The pipeline of a checkpoint that is open already; see `load_pipeline`.

    Args:
        trained: the checkpoint.

    Raises:
        CheckpointError: if it or its VAE is missing or damaged.
        ValueError: if the checkpoint draws no images from text.
    """
    recipe = trained.recipe
    if not isinstance(recipe, LatentDiffusionRecipe):
        raise ValueError(f"model must be one of text to image; got {trained.name!r}, a {recipe.family}")
    return recipe.pipeline(trained.network)


TEXT_TO_IMAGE = LatentDiffusionRecipe(
    name="text_to_image_shapes64",
    data="shapes_and_scenes",
    image_size=64,
    vae="vae_shapes64",
    model={
        "base_channels": 32,
        "channel_multipliers": (1, 2, 4),
        "num_blocks": 1,
        "attention_levels": (0, 1, 2),
    },
    attention={"head_dim": 16, "self_attention_from": 64},
    text={"width": 96, "depth": 2},
    steps=20_000,
    learning_rate=1e-3,
)
register(TEXT_TO_IMAGE)
