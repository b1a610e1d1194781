"""Small tasks for a backbone to be adapted to (chapter 08): coloured images with the label "class".

Five are made by code, each image a pure function of (split, index): drawings in line, things to count or to
compare, nodules on something like an X-ray picture, and textures. Any other data set of the course, such as
digits, is cut to the same size.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from lecture26.kit.counter_random import choice, random_bits, uniform
from lecture26.kit.data import SPLITS, load
from lecture26.kit.image_set import ImageSet
from lecture26.kit.sample_draws import SampleDraws
from lecture26.kit.shapes import COLOUR_RGB, SHAPES, SPLIT_STARTS, Shapes, pixel_centres
from lecture26.kit.validation import check_choice

IMAGE_SIZE = 32
COUNTS = {"train": 800, "validation": 400, "test": 1000}  # images at most, in each split of each task
NOISE_SEED = 8

MOST_THINGS = 6
CELLS = 3  # things to count lie in different cells of a grid of 3 x 3

CORNERS = ("upper left", "upper right", "lower left", "lower right")  # of the picture
NODULE = 0.9  # its thickness on an X-ray picture, on which the lungs have 0.35 and the rest 1.3
FILM_NOISE = 0.03

TEXTURES = ("horizontal", "vertical", "rising", "falling", "checks", "dots", "rings", "waves")


class MadeByCode(ImageSet):
    """What the tasks made by code have in common.

    Args:
        split: "train", "validation" or "test".

    Raises:
        ValueError: an unknown split.
    """

    channels = 3
    image_size = IMAGE_SIZE

    def __init__(self, split: str = "train"):
        check_choice("split", split, SPLITS)
        self.split = split

    def __len__(self) -> int:
        return COUNTS[self.split]

    def batch(self, indices: Tensor | Sequence[int]) -> dict[str, Tensor]:
        image, target = self._make(self._checked(indices))
        return {"image": image.clamp(0, 1).mul(255).round().div(127.5).sub(1), "class": target}

    @abstractmethod
    def _make(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W), of which [0, 1] can be seen, and classes (B,)."""

    def _bits(self, indices: Tensor, seed: int, num_draws: int) -> Tensor:
        return random_bits(seed, SPLIT_STARTS[self.split] + indices, num_draws)


class LineDrawings(MadeByCode):
    """The outlines of Shapes, black on white; the class is the shape."""

    labels = {"class": SHAPES}

    def _make(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        shapes = Shapes(self.split, self.image_size)
        attributes = shapes.attributes(indices)
        inside = shapes.coverage(attributes, indices)  # (B, 1, H, W)
        outline = max_pool2d(inside, kernel_size=3, stride=1, padding=1) - inside
        return (1 - outline).expand(-1, 3, -1, -1), attributes["shape"]


class Counting(MadeByCode):
    """One to six coloured discs on grey; the class is their number."""

    labels = {"class": tuple(str(count) for count in range(1, MOST_THINGS + 1))}

    def _make(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        cells = CELLS**2
        bits = self._bits(indices, seed=1, num_draws=2 + 5 * cells)
        target = choice(bits[:, 0], MOST_THINGS)  # (B,), one less than the number of discs
        rank, x, y, size, colour = bits[:, 2:].view(-1, 5, cells).unbind(dim=1)  # (B, cells) each
        is_there = rank.argsort(dim=1).argsort(dim=1) <= target[:, None]  # as many of the cells, at random
        radius = 0.05 + 0.055 * uniform(size)  # of the image's width
        cell = torch.arange(cells, device="cpu")
        column, row = cell % CELLS, cell // CELLS
        room = 1 / CELLS - 2 * radius  # where the centre may lie within its cell
        x = column / CELLS + radius + room * uniform(x)
        y = row / CELLS + radius + room * uniform(y)

        radius = torch.where(is_there, radius, -1.0)
        return _discs(_grey(bits[:, 1]), x, y, radius, choice(colour, len(COLOUR_RGB))), target


class Largest(MadeByCode):
    """Four coloured discs on grey, one in each corner; the class is the corner of the largest."""

    labels = {"class": CORNERS}

    def _make(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        corners = len(CORNERS)
        bits = self._bits(indices, seed=3, num_draws=3 + 4 * corners)
        target = choice(bits[:, 0], corners)  # (B,)
        share, x, y, colour = bits[:, 3:].view(-1, 4, corners).unbind(dim=1)  # (B, corners) each
        corner = torch.arange(corners, device="cpu")
        is_largest = corner == target[:, None]
        largest = 0.14 + 0.07 * uniform(bits[:, 1, None])  # its radius, of the image's width
        radius = torch.where(is_largest, largest, largest * (0.5 + 0.3 * uniform(share)))
        column, row = corner % 2, corner // 2
        room = 0.46 - 2 * radius  # where the centre may lie
        x = 0.25 + 0.5 * column + room * (uniform(x) - 0.5)
        y = 0.25 + 0.5 * row + room * (uniform(y) - 0.5)
        return _discs(_grey(bits[:, 2]), x, y, radius, choice(colour, len(COLOUR_RGB))), target


class XRay(MadeByCode):
    """Something like X-ray pictures of a chest; the class is where a small nodule lies, if there is one.

    What comes through a body of thickness s is exp(-s), and the film's negative shows the rest.
    """

    labels = {"class": ("no nodule", *CORNERS)}

    def _make(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        bits = self._bits(indices, seed=4, num_draws=14)
        target = choice(bits[:, 0], len(CORNERS) + 1)
        draws = uniform(bits).unbind(dim=1)  # (B,) each
        random = [draw[:, None, None] for draw in draws]  # (B, 1, 1) each
        y, x = _rows_and_columns()

        lungs = 0.0  # (B, H, W): 1 inside of them
        for side, (away, up, size) in ((-1, random[1:4]), (1, random[4:7])):
            across = (x - 0.5 - side * (0.22 + 0.03 * away)) / (0.15 + 0.03 * size)
            down = (y - 0.47 - 0.06 * up) / (0.34 + 0.06 * size)
            lungs = lungs + torch.sigmoid(8 * (1 - torch.hypot(across, down)))
        height = y - 0.6 * (1 + random[7]) * (x - 0.5) ** 2  # along a rib it stays the same
        ribs = torch.sigmoid(4 * torch.sin(2 * math.pi * ((5 + 2 * random[8]) * height + random[9])))
        heart = torch.exp(-(((x - 0.55 - 0.03 * random[10]) / 0.13) ** 2) - ((y - 0.66) / 0.15) ** 2)

        corner = (target - 1).clamp(min=0)  # (B,)
        nodule_x = 0.28 + 0.44 * (corner % 2) + 0.14 * (draws[11] - 0.5)
        nodule_y = 0.33 + 0.34 * (corner // 2) + 0.2 * (draws[12] - 0.5)
        radius = torch.where(target > 0, 0.05 + 0.025 * draws[13], -1.0)
        nodule = _covered(nodule_x, nodule_y, radius)

        thickness = 1.3 - 0.95 * lungs + 0.25 * ribs + 0.5 * heart + NODULE * nodule
        noise = SampleDraws(NOISE_SEED, SPLIT_STARTS[self.split] + indices).normal(1, IMAGE_SIZE, IMAGE_SIZE)
        film = 1 - torch.exp(-thickness)[:, None] + FILM_NOISE * noise  # (B, 1, H, W)
        return film.expand(-1, 3, -1, -1), target


class Textures(MadeByCode):
    """Patterns of two colours, of any phase and a range of widths, with noise; the class is the pattern."""

    labels = {"class": TEXTURES}

    def _make(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        bits = self._bits(indices, seed=2, num_draws=8)
        target = choice(bits[:, 0], len(TEXTURES))
        frequency = 2 * math.pi * (3 + 3 * uniform(bits[:, 1]))[:, None, None]  # per width of the image
        phase_x, phase_y = (2 * math.pi * uniform(bits[:, draw])[:, None, None] for draw in (2, 3))
        centre_x, centre_y = (uniform(bits[:, draw])[:, None, None] for draw in (4, 5))
        y, x = _rows_and_columns()
        across, down = (frequency * x + phase_x).sin(), (frequency * y + phase_y).sin()  # (B, H, W)
        patterns = {
            "horizontal": down,
            "vertical": across,
            "rising": (frequency * (x + y) / math.sqrt(2) + phase_x).sin(),
            "falling": (frequency * (x - y) / math.sqrt(2) + phase_x).sin(),
            "checks": 2 * across * down,
            "dots": 4 * across.clamp(min=0) * down.clamp(min=0) - 1,
            "rings": (frequency * torch.hypot(x - centre_x, y - centre_y) + phase_x).sin(),
            "waves": (frequency * y + phase_y + 1.5 * (4 * math.pi * x + phase_x).sin()).sin(),
        }
        pattern = torch.stack([patterns[name] for name in TEXTURES], dim=1)  # (B, 8, H, W)
        pattern = pattern[torch.arange(len(target), device="cpu"), target]
        share = torch.sigmoid(4 * pattern)[:, None]  # (B, 1, H, W)
        first = choice(bits[:, 6], len(COLOUR_RGB))
        second = (first + 1 + choice(bits[:, 7], len(COLOUR_RGB) - 1)) % len(COLOUR_RGB)
        one, other = (COLOUR_RGB[colour][:, :, None, None] for colour in (first, second))
        noise = SampleDraws(NOISE_SEED, SPLIT_STARTS[self.split] + indices).normal(3, IMAGE_SIZE, IMAGE_SIZE)
        return torch.lerp(one, other, share) + 0.15 * noise, target


def _rows_and_columns() -> tuple[Tensor, Tensor]:
    """How far down and how far across each pixel lies, (H, W) each, in widths of the image."""
    return torch.meshgrid(*[pixel_centres(IMAGE_SIZE)] * 2, indexing="ij")


def _grey(bits: Tensor) -> Tensor:
    """Grey images (B, 3, H, W), one for each of B random numbers."""
    return (0.15 + 0.7 * uniform(bits))[:, None, None, None].expand(-1, 3, IMAGE_SIZE, IMAGE_SIZE)


def _covered(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """How much of each pixel a disc covers, (B, H, W), for centres and radii (B,) in widths of the image.

    A disc of radius -1 covers nothing.
    """
    pixel = pixel_centres(IMAGE_SIZE)
    squares = (pixel - x[:, None])[:, None, :] ** 2 + (pixel - y[:, None])[:, :, None] ** 2
    return (0.5 - IMAGE_SIZE * (squares.sqrt() - radius[:, None, None])).clamp(0, 1)


def _discs(image: Tensor, x: Tensor, y: Tensor, radius: Tensor, colour: Tensor) -> Tensor:
    """Images (B, 3, H, W) with discs painted over them, whose centres, radii and colours are (B, discs)."""
    for k in range(x.shape[1]):
        covered = _covered(x[:, k], y[:, k], radius[:, k])
        image = torch.lerp(image, COLOUR_RGB[colour[:, k]][:, :, None, None], covered[:, None])
    return image


class Coloured(ImageSet):
    """The first images of a set with classes, with three channels.

    Args:
        images: the set.
        count: how many at most; None takes all.

    Raises:
        ValueError: if the images have no classes.
    """

    channels = 3

    def __init__(self, images: ImageSet, count: int | None = None):
        if "class" not in images.labels:
            raise ValueError(
                f"images must have classes; their labels are {', '.join(images.labels) or 'none'}"
            )
        self._images, self.image_size, self.labels = (
            images,
            images.image_size,
            {"class": images.labels["class"]},
        )
        self._order = torch.arange(len(images), device="cpu")
        if count is not None and count < len(images):
            # Spread over the set, which may come sorted by class.
            self._order = torch.linspace(0, len(images) - 1, count, device="cpu").round().long()

    def __len__(self) -> int:
        return len(self._order)

    def batch(self, indices: Tensor | Sequence[int]) -> dict[str, Tensor]:
        batch = self._images.batch(self._order[self._checked(indices)])
        return {"image": batch["image"].expand(-1, 3, -1, -1), "class": batch["class"]}


class UpsideDown(ImageSet):
    """Images turned upside down.

    Args:
        images: the set.
    """

    def __init__(self, images: ImageSet):
        self._images = images
        self.channels, self.image_size, self.labels = images.channels, images.image_size, images.labels

    def __len__(self) -> int:
        return len(self._images)

    def batch(self, indices: Tensor | Sequence[int]) -> dict[str, Tensor]:
        batch = self._images.batch(indices)
        return batch | {"image": batch["image"].flip(2)}


class FewOfEach(ImageSet):
    """A few images of each class of a set, drawn at random.

    Args:
        images: the set, with the label "class".
        per_class: how many of each class.
        seed: decides which.

    Raises:
        ValueError: if a class has fewer.
    """

    def __init__(self, images: ImageSet, per_class: int, seed: int = 0):
        self._images = images
        self.channels, self.image_size, self.labels = images.channels, images.image_size, images.labels
        parts = torch.arange(len(images), device="cpu").split(100)
        classes = torch.cat([images.batch(part)["class"] for part in parts])
        shuffled = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        chosen = []
        for number, name in enumerate(self.labels["class"]):
            of_class = shuffled[classes[shuffled] == number]
            if len(of_class) < per_class:
                raise ValueError(
                    f"per_class must be at most the number of images of each class; got {per_class}, and "
                    f"{name!r} has {len(of_class)}"
                )
            chosen.append(of_class[:per_class])
        self._chosen = torch.cat(chosen)

    def __len__(self) -> int:
        return len(self._chosen)

    def batch(self, indices: Tensor | Sequence[int]) -> dict[str, Tensor]:
        return self._images.batch(self._chosen[self._checked(indices)])


TASKS = {
    "line_drawings": LineDrawings,
    "counting": Counting,
    "largest": Largest,
    "xray": XRay,
    "textures": Textures,
}


def downstream(name: str | Path, split: str = "train", image_size: int = IMAGE_SIZE) -> ImageSet:
    """Open one split of a task, of at most as many images as COUNTS says.

    Args:
        name: one of TASKS; or what `lecture26.kit.data.load` takes, such as "digits", "mnist" or a folder.
        split: "train", "validation" or "test".
        image_size: in pixels; the tasks made by code have 32.

    Returns:
        Images with three channels and the label "class".

    Raises:
        ValueError: an unknown name, split or size, or images without classes.
        FileNotFoundError, DataError: as `load` does.
    """
    check_choice("split", split, SPLITS)
    if name not in TASKS:
        return Coloured(load(name, split, image_size), COUNTS[split])
    if image_size != IMAGE_SIZE:
        raise ValueError(
            f"image_size must be {IMAGE_SIZE} for {name!r}, which is made by code; got {image_size}"
        )
    return TASKS[name](split)
