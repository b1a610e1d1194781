"""Readers: the classifiers by which the drawings of the other models are judged."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, avg_pool2d, cross_entropy, grid_sample, interpolate

from lecture26.kit.checkpoints import list_checkpoints
from lecture26.kit.evaluation import BATCH_SIZE, CONFIDENT, read, read_right
from lecture26.kit.image_set import ImageSet
from lecture26.kit.readers import Reader, canonical
from lecture26.kit.sample_draws import SampleDraws
from lecture26.kit.shapes import RenderedSet
from lecture26.recipes.recipe import EVALUATION_SEED, Recipe, register
from lecture26.recipes.trained import load_model


@dataclass(frozen=True, kw_only=True)
class ReaderRecipe(Recipe):
    """A network that reads the labels of images.

    What a model draws is never as clean as the data. So a reader is trained on images that are spoiled to any
    degree, up to illegible ones: warped, blurred, stained and noisy. The cross-entropy is least for the true
    probabilities, so that it learns how sure it may be of each; smoothed labels would teach it to be unsure.

    Attributes:
        labels: of the data; taken from them when training begins.
        cells: warps, blur and stains are coarse: the image has this many of their cells across.
        warp: the standard deviation of the largest shifts, in cells.
        stains, noise: the standard deviation of the strongest ones, in the units of the image.
        handwriting: whether to vary the size, place, slant and turn as well; for white strokes on black.
    """

    family: ClassVar[str] = "reader"

    labels: dict[str, tuple[str, ...]] = field(default_factory=dict)
    cells: int = 8
    warp: float = 0.4
    stains: float = 0.3
    noise: float = 0.4
    handwriting: bool = False

    def fitted_to(self, images: ImageSet) -> "ReaderRecipe":
        return replace(super().fitted_to(images), labels=dict(images.labels))

    def build(self) -> nn.Module:
        return Reader(self.labels, self.channels, self.image_size, **self.model)

    def draw(self, images: ImageSet, random: SampleDraws) -> dict[str, Tensor]:
        indices = random.integers(len(images))
        if isinstance(images, RenderedSet):
            # All combinations alike, those held out too: to a judge, rare must not mean unlikely.
            labels = {name: random.integers(len(classes)) for name, classes in images.labels.items()}
            image = images.render(labels, indices)
        else:
            labels = images.batch(indices)
            image = labels.pop("image")
        if self.handwriting:
            image = rewrite(image, random)
        return {"image": self.spoil(image, random)} | canonical(labels)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(batch["image"])
        return sum(cross_entropy(logits[name], batch[name]) for name in logits)

    def spoil(self, images: Tensor, random: SampleDraws) -> Tensor:
        """Warp, blur and stain images and add noise, each to a degree of its own, (B, C, H, W)."""
        channels, size = images.shape[1], images.shape[2:]

        def coarse(channels: int) -> Tensor:
            return interpolate(random.normal(channels, self.cells, self.cells), size, mode="bilinear")

        def degree() -> Tensor:
            # None at all for half of the images: (B, 1, 1, 1) in [0, 1).
            return (2 * random.uniform() - 1).clamp(min=0)[:, None, None, None]

        # Where each pixel is taken from; the image is 2 wide in the units of grid_sample.
        shifts = self.warp * degree() * coarse(2) * (2 / self.cells)  # (B, 2, H, W)
        identity = torch.eye(2, 3).expand(len(images), 2, 3)
        places = affine_grid(identity, images.shape, align_corners=False) + shifts.permute(0, 2, 3, 1)
        images = grid_sample(images, places, padding_mode="border", align_corners=False)

        blurred = interpolate(avg_pool2d(images, size[0] // self.cells), size, mode="bilinear")
        images = torch.lerp(images, blurred, degree())
        images = images + self.stains * degree() * coarse(channels)
        images = images + self.noise * degree() * random.normal(channels, *size)
        return images.clamp(-1, 1)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, images: ImageSet) -> dict[str, float]:
        right, confidence = assess(model, images)
        metrics = {f"accuracy_{name}": values.double().mean().item() for name, values in right.items()}
        metrics["confident_share"] = (confidence > CONFIDENT).all(dim=1).double().mean().item()
        if isinstance(images, RenderedSet):
            right, _ = assess(model, self.load_images("held_out"))
            metrics["accuracy_held_out"] = right["all"].double().mean().item()
        # Where the confidence means what it says, it is right as often as it is high.
        right, confidence = assess(
            model, images, lambda image, n: self.spoil(image, SampleDraws(EVALUATION_SEED, n))
        )
        spoiled = torch.stack([right[name] for name in self.labels])
        metrics["accuracy_spoiled"] = spoiled.double().mean().item()
        metrics["confidence_spoiled"] = confidence.mean().item()
        return metrics


def rewrite(images: Tensor, random: SampleDraws) -> Tensor:
    """Write white-on-black images anew: elsewhere, in another size, slant and turn, (B, C, H, W)."""

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * random.uniform()  # (B,)

    width, height = between(0.6, 1.3), between(0.6, 1.1)
    turn, slant = between(-0.2, 0.2), between(-0.3, 0.3)
    shift_x, shift_y = between(-0.2, 0.2), between(-0.2, 0.2)
    # Where each pixel is taken from: turned, slanted, then stretched.
    rows = [
        torch.stack([turn.cos() / width, (slant - turn.sin()) / width, shift_x], dim=1),
        torch.stack([turn.sin() / height, turn.cos() / height, shift_y], dim=1),
    ]
    places = affine_grid(torch.stack(rows, dim=1), images.shape, align_corners=False)
    return grid_sample(images + 1, places, align_corners=False) - 1  # from outside comes black


def assess(
    reader: Reader,
    images: ImageSet,
    change: Callable[[Tensor, Tensor], Tensor] = lambda image, indices: image,
) -> tuple[dict[str, Tensor], Tensor]:
    """Have a reader read a whole set.

    Args:
        reader: a reader of such images.
        images: N labelled images.
        change: change(images (B, C, H, W), indices (B,)) -> what to show the reader instead.

    Returns:
        As `read_right`, what was read right, (N,) bool by label and "all"; and the confidences, (N, labels).
    """
    right, confidence = [], []
    for indices in torch.arange(len(images)).split(BATCH_SIZE):
        wanted = images.batch(indices)
        image = change(wanted.pop("image"), indices)
        right.append(read_right(reader, image, wanted))
        confidence.append(torch.stack(list(read(reader, image).confidence.values()), dim=1))
    return {name: torch.cat([part[name] for part in right]) for name in right[0]}, torch.cat(confidence)


def find_reader(data: str, image_size: int) -> Reader | None:
    """The reader, among the checkpoints, of a data set at a size in pixels; None if there is none."""
    for recipe in READERS:
        if (recipe.data, recipe.image_size) == (data, image_size) and recipe.name in list_checkpoints():
            return load_model(recipe.name)
    return None


SHAPES_32 = ReaderRecipe(
    name="reader_shapes32",
    data="shapes",
    image_size=32,
    model={"widths": (32, 48, 64)},
    steps=4000,
    learning_rate=2e-3,
    warmup_steps=100,
    ema_decay=0.99,
)
READERS = (
    SHAPES_32,
    replace(
        SHAPES_32,
        name="reader_shapes64",
        image_size=64,
        model={"widths": (32, 48, 64), "patch_size": 2},
        steps=3000,
    ),
    replace(
        SHAPES_32,
        name="reader_scenes64",
        data="scenes",
        image_size=64,
        model={"widths": (32, 64, 96), "patch_size": 2},
        cells=16,
    ),
    replace(SHAPES_32, name="reader_digits", data="digits", handwriting=True, steps=2000),
)
register(*READERS)
