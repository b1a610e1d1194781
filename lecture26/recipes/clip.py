"""Small CLIPs of captioned shapes: one that reads clean images, one that reads noisy ones (chapter 04)."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import compress
from typing import ClassVar

import torch
from torch import Tensor, nn

from lecture26.clip_guidance import CLIP, Tokenizer, cosine_similarity_matrix, info_nce, split_words
from lecture26.ddpm import SCHEDULES, Diffusion
from lecture26.kit.image_set import ImageSet
from lecture26.kit.sample_draws import SampleDraws
from lecture26.kit.shapes import Shapes, leave_out
from lecture26.recipes.recipe import EVALUATION_SEED, Recipe, register

EVALUATION_STEPS = (0, 100, 200, 300, 400, 500, 600, 700, 800, 900)  # of the noise-aware CLIP
GROUP_SIZE = 128  # of different captions to choose among
NUM_GROUPS = 8
LOSABLE = ("size_1", "colour_1", "background")  # of LOSABLE_PARTS, those of a caption of one object


@dataclass(frozen=True, kw_only=True)
class CLIPRecipe(Recipe):
    """An image tower and a text tower that learn which caption belongs to which image.

    Two in three captions lose a word or more, so that 'a red star' can be said as well as a whole sentence.
    A batch holds images and captions as they come: a caption may well be there twice (equation 4.15).

    Attributes:
        words: of the captions; taken from the data when training begins.
        length: of a row of tokens.
        shorten: with this probability each, size, colour and background are left out of a caption.
        noise_aware: whether images are noisy, each at a step of its own.
        schedule, diffusion_steps: those of the denoiser that it shall guide.
    """

    family: ClassVar[str] = "clip"

    words: tuple[str, ...] = field(default_factory=tuple)
    length: int = 12
    shorten: float = 0.3
    noise_aware: bool = False
    schedule: str = "cosine"
    diffusion_steps: int = 1000

    def fitted_to(self, images: ImageSet) -> "CLIPRecipe":
        if not isinstance(images, Shapes):
            raise ValueError(f"data must be 'shapes', whose images have captions; got {self.data!r}")
        words = {word for caption in every_caption(images) for word in split_words(caption)}
        return replace(super().fitted_to(images), words=tuple(sorted(words)))

    def build(self) -> nn.Module:
        return CLIP(self.tokenizer, self.channels, noise_aware=self.noise_aware, **self.model)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """What turns captions into tokens."""
        return Tokenizer(self.words, self.length)

    @cached_property
    def forward_process(self) -> Diffusion:
        """The diffusion whose noisy images the noise-aware CLIP reads."""
        return Diffusion(SCHEDULES[self.schedule](self.diffusion_steps))

    def draw(self, images: ImageSet, random: SampleDraws) -> dict[str, Tensor]:
        indices = random.integers(len(images))
        attributes = images.attributes(indices)
        is_lost = torch.stack([random.uniform() < self.shorten for _ in LOSABLE], dim=1)  # (B, 3)
        lost = [list(compress(LOSABLE, row)) for row in is_lost.tolist()]
        captions = list(map(leave_out, images.describe(attributes), lost))
        batch = {"image": images.render(attributes, indices), "tokens": self.tokenizer(captions)}
        if self.noise_aware:
            batch["t"] = random.integers(self.diffusion_steps)  # (B,)
            noise = random.normal(*batch["image"].shape[1:])  # (B, C, H, W)
            batch["image"] = self.forward_process.q_sample(batch["image"], batch["t"], noise)
        return batch

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        outputs = model(batch["image"], batch["tokens"], batch.get("t"))
        # Similarities are multiplied by up to 100: bfloat16 would lose their second digit.
        with torch.autocast(batch["image"].device.type, enabled=False):
            return info_nce(*(output.float() for output in outputs))

    @torch.no_grad()
    def evaluate(self, model: nn.Module, images: ImageSet) -> dict[str, float]:
        """How often the right caption is the most similar one.

        Args:
            model: the trained CLIP.
            images: the data's test split.

        Returns:
            "retrieval": out of GROUP_SIZE different captions; "retrieval_all": out of all captions there are;
            "retrieval_held_out": the same for pairs of shape and colour that training never showed. A
            noise-aware CLIP has these at t = 0, and "retrieval_at_T" at the steps T of EVALUATION_STEPS.
        """
        groups = different_captions(images, GROUP_SIZE, NUM_GROUPS)
        step = 0 if self.noise_aware else None
        metrics = {"retrieval": mean([self.retrieval(model, images, group, step) for group in groups])}
        every = every_caption(images)
        for name, unseen in (("all", images), ("held_out", self.load_images("held_out"))):
            metrics[f"retrieval_{name}"] = self.retrieval(model, unseen, torch.arange(1024), step, every)
        for step in EVALUATION_STEPS if self.noise_aware else ():
            shares = [self.retrieval(model, images, group, step) for group in groups]
            metrics[f"retrieval_at_{step}"] = mean(shares)
        metrics["kappa"] = model.logit_scale.exp().item()
        return metrics

    @torch.no_grad()
    def retrieval(
        self,
        model: nn.Module,
        images: ImageSet,
        indices: Tensor,
        step: int | None = None,
        captions: list[str] | None = None,
    ) -> float:
        """The share of images whose own caption is the most similar one.

        Args:
            model: a CLIP.
            images: captioned images.
            indices: which of them, (N,).
            step: make them noisy at this step of the schedule; None leaves them clean.
            captions: what to choose among; None takes the images' own.

        Returns:
            A number in [0, 1].
        """
        device = model.logit_scale.device
        own = images.captions(indices)
        captions = own if captions is None else captions
        x, t = images.batch(indices)["image"], None
        if step is not None:
            t = torch.full((len(x),), step)
            x = self.forward_process.q_sample(
                x, t, SampleDraws(EVALUATION_SEED, indices).normal(*x.shape[1:])
            )
            t = t.to(device)
        similarity = cosine_similarity_matrix(
            model.encode_image(x.to(device), t), model.encode_text(model.tokenizer(captions).to(device))
        )
        found = [captions[best] for best in similarity.argmax(dim=1).tolist()]
        return mean([float(one == other) for one, other in zip(found, own, strict=True)])


def mean(values: list[float]) -> float:
    """The mean of some values."""
    return sum(values) / len(values)


def every_caption(images: Shapes) -> list[str]:
    """All captions there are, those of held-out pairs too."""
    classes = [torch.arange(len(names)) for names in images.labels.values()]
    return images.describe(dict(zip(images.labels, torch.cartesian_prod(*classes).T, strict=True)))


def different_captions(images: ImageSet, size: int, count: int) -> list[Tensor]:
    """The first images of a set, in groups without two of one caption: `count` tensors of `size` indices."""
    groups, index = [], 0
    while len(groups) < count:
        group = {}
        while len(group) < size:
            (caption,) = images.captions([index])
            group.setdefault(caption, index)
            index += 1
        groups.append(torch.tensor(list(group.values())))
    return groups


CLIP_SHAPES_32 = CLIPRecipe(
    name="clip_shapes32",
    data="shapes",
    image_size=32,
    model={
        "image": {"base_channels": 32, "channel_multipliers": (1, 2, 4)},
        "text": {"width": 64, "depth": 2},
    },
    steps=1500,
    batch_size=256,
    learning_rate=1e-3,
    weight_decay=0.01,
)
NOISY_CLIP_SHAPES_32 = replace(CLIP_SHAPES_32, name="noisy_clip_shapes32", noise_aware=True, steps=2000)
register(CLIP_SHAPES_32, NOISY_CLIP_SHAPES_32)
