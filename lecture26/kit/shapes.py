"""Pictures made by code: one coloured shape (`Shapes`), two and their relation (`Scenes`), or both kinds.

An image is a pure function of (seed, split, index). Its outlines are signed distance functions: negative
inside, positive outside, and near the outline the distance to it. A pixel is covered by the share
clamp(1/2 - distance in pixels, 0, 1), so edges are smooth without rendering at a higher resolution.
Lengths are in units of the image's width: at 64 pixels the picture is the same as at 32, only sharper.
Images have 8 bits per channel, like those of a file.
"""

import math
from abc import abstractmethod
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch

from lecture26.kit.counter_random import choice, random_bits, uniform
from lecture26.kit.image_set import ImageSet
from lecture26.kit.validation import check_choice, check_int

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "crescent")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SIZES = ("small", "large")
BACKGROUNDS = ("dark", "light", "striped", "checkered")
RELATIONS = ("left of", "right of", "above", "below")
RELATION_PHRASES = ("to the left of", "to the right of", "above", "below")
OPPOSITE_RELATIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# In 'A left of B' A is on the left, and B on the other side.
OTHER_SIDE = {a.removesuffix(" of"): b.removesuffix(" of") for a, b in OPPOSITE_RELATIONS.items()}
SIDES = tuple(OTHER_SIDE)
NO_SIDE = -100  # what torch's cross_entropy ignores
# What a caption may lose and still be true; 1 is its first object, or its only one.
LOSABLE_PARTS = ("size_1", "colour_1", "size_2", "colour_2", "background")

# (shape, colour) pairs that only the split "held_out" shows: each shape once, each colour once.
HELD_OUT_PAIRS = (
    ("circle", "green"),
    ("square", "purple"),
    ("triangle", "red"),
    ("star", "blue"),
    ("ring", "orange"),
    ("cross", "pink"),
    ("heart", "yellow"),
    ("crescent", "cyan"),
)

# Each split has its own range of 2**32 global indices, so that splits cannot overlap.
SPLIT_SIZES = {"train": 200_000, "validation": 10_000, "test": 10_000, "held_out": 10_000}
SPLIT_STARTS = {split: position * 2**32 for position, split in enumerate(SPLIT_SIZES)}

COLOUR_RGB = torch.tensor(
    [
        (0.90, 0.10, 0.12),
        (1.00, 0.52, 0.00),
        (1.00, 0.88, 0.05),
        (0.10, 0.68, 0.20),
        (0.05, 0.85, 0.90),
        (0.12, 0.30, 1.00),
        (0.60, 0.20, 0.88),
        (1.00, 0.45, 0.75),
    ],
    dtype=torch.float32,
    device="cpu",
)
# of each background, in [0, 1]
GREY_LEVEL = torch.tensor([0.10, 0.92, 0.40, 0.40], dtype=torch.float32, device="cpu")
GREY_JITTER = 0.03
TEXTURE_CONTRAST = 0.09  # the two greys of a texture differ from the level by this
TEXTURE_PERIOD = 0.25

MAX_ROTATION = math.radians(15)
MIN_BRIGHTNESS = 0.88  # the object's colour is multiplied by a number between this and 1
REACH = 1.4  # no point of a shape of radius 1 is farther than this from its centre
# small, large: 5.6 and 9 pixels of 32
SHAPE_RADII = torch.tensor([0.175, 0.28], dtype=torch.float32, device="cpu")
# small, large: 5.8 and 9.3 pixels of 64
SCENE_RADII = torch.tensor([0.09, 0.145], dtype=torch.float32, device="cpu")
MARGIN = 0.03  # between an object's reach and the border
GAP = 0.04  # between the reaches of two objects


class Objects(NamedTuple):
    """One object per image, (B,) each; x and y of its centre count from the lower left corner."""

    shape: torch.Tensor
    colour: torch.Tensor
    radius: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    angle: torch.Tensor
    brightness: torch.Tensor


class RenderedSet(ImageSet):
    """What Shapes and Scenes share: splits, the draws of each index, and painting."""

    channels = 3
    image_sizes: tuple[int, ...]

    def __init__(self, split: str = "train", image_size: int | None = None, seed: int = 0):
        """Describe a set; images are rendered when read.

        Args:
            split: "train", "validation", "test" (without HELD_OUT_PAIRS) or "held_out" (nothing else).
            image_size: height and width in pixels, one of `image_sizes`; None is the first of these.
            seed: sets of other seeds show other images.

        Raises:
            ValueError: an unknown split or size.
            TypeError: `image_size` or `seed` is not an int.
        """
        check_choice("split", split, tuple(SPLIT_SIZES))
        image_size = self.image_sizes[0] if image_size is None else image_size
        check_int("image_size", image_size)
        check_choice("image_size", image_size, self.image_sizes)
        check_int("seed", seed)
        self.split, self.image_size, self.seed = split, image_size, seed
        pairs = [(SHAPES.index(shape), COLOURS.index(colour)) for shape, colour in HELD_OUT_PAIRS]
        held_out = torch.tensor(pairs, device="cpu")
        is_held_out = torch.zeros(len(SHAPES), len(COLOURS), dtype=torch.bool, device="cpu")
        is_held_out[held_out[:, 0], held_out[:, 1]] = True
        self._pairs = (is_held_out if split == "held_out" else ~is_held_out).nonzero()  # (56 or 8, 2)

    def __len__(self) -> int:
        return SPLIT_SIZES[self.split]

    def batch(self, indices: torch.Tensor | Sequence[int]) -> dict[str, torch.Tensor]:
        attributes = self.attributes(indices)
        return {"image": self.render(attributes, indices)} | attributes

    def captions(self, indices: torch.Tensor | Sequence[int]) -> list[str]:
        """One sentence for each image of `indices`, which are those of `batch`."""
        return self.describe(self.attributes(indices))

    def attributes(self, indices: torch.Tensor | Sequence[int]) -> dict[str, torch.Tensor]:
        """The labels of `batch` at `indices` without the images: for each label's name (B,) int64."""
        return self._draw_attributes(self._bits(indices))

    def render(
        self, attributes: dict[str, torch.Tensor], indices: torch.Tensor | Sequence[int]
    ) -> torch.Tensor:
        """Render images of given attributes, with the positions, angles and tints of given indices.

        Args:
            attributes: for each label's name (B,) int64 class numbers; any combination, held out or not.
            indices: B integers in 0, ..., len - 1. At one index, two shapes of one size differ in nothing but
                their shape.

        Returns:
            (B, 3, H, W) float32 in [-1, 1], on the 256 levels of 8 bits.

        Raises:
            ValueError: a label is missing or unknown, or its values are not B class numbers.
        """
        bits = self._bits(indices)
        self._check_attributes(attributes, len(bits))
        image = _paint_background(attributes["background"], bits, self.image_size)  # (B, 1, H, W)
        for objects in self._place(attributes, bits):
            coverage = _coverage(objects, self.image_size)[:, None]  # (B, 1, H, W)
            colour = COLOUR_RGB[objects.colour] * objects.brightness[:, None]
            image = torch.lerp(image, colour[:, :, None, None], coverage)  # (B, 3, H, W)
        return image.mul_(255).round_().div_(127.5).sub_(1)

    def coverage(
        self, attributes: dict[str, torch.Tensor], indices: torch.Tensor | Sequence[int]
    ) -> torch.Tensor:
        """How much of each pixel each object of `render`'s images covers: (B, objects, H, W) in [0, 1].

        `attributes` and `indices` are those of `render`, and so is what it raises.
        """
        bits = self._bits(indices)
        self._check_attributes(attributes, len(bits))
        return torch.stack([_coverage(o, self.image_size) for o in self._place(attributes, bits)], dim=1)

    @abstractmethod
    def describe(self, attributes: dict[str, torch.Tensor]) -> list[str]:
        """The caption that belongs to each row of attributes."""

    @abstractmethod
    def _draw_attributes(self, bits: torch.Tensor) -> dict[str, torch.Tensor]:
        """Attributes from random integers (B, NUM_DRAWS)."""

    @abstractmethod
    def _place(self, attributes: dict[str, torch.Tensor], bits: torch.Tensor) -> list[Objects]:
        """The objects of each image."""

    def _bits(self, indices: torch.Tensor | Sequence[int]) -> torch.Tensor:
        return random_bits(self.seed, SPLIT_STARTS[self.split] + self._checked(indices), NUM_DRAWS)

    def _check_attributes(self, attributes: dict[str, torch.Tensor], batch_size: int) -> None:
        if set(attributes) != set(self.labels):
            raise ValueError(f"attributes must be {sorted(self.labels)}; got {sorted(attributes)}")
        for name, values in attributes.items():
            count = len(self.labels[name])
            if values.dtype != torch.int64 or values.shape != (batch_size,):
                raise ValueError(
                    f"attributes[{name!r}] must be an int64 tensor of shape ({batch_size},); "
                    f"got {values.dtype} of shape {tuple(values.shape)}"
                )
            if ((values < 0) | (values >= count)).any():
                outside = values[(values < 0) | (values >= count)][0].item()
                raise ValueError(f"attributes[{name!r}] must be in 0, ..., {count - 1}; got {outside}")


class Shapes(RenderedSet):
    """One shape on a background, at 32 or 64 pixels; labels "shape", "colour", "size" and "background".

    The attributes are independent and uniform, apart from the (shape, colour) pairs that a split leaves out.
    """

    image_sizes = (32, 64)
    labels = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "background": BACKGROUNDS}

    def describe(self, attributes: dict[str, torch.Tensor]) -> list[str]:
        """'a small red star on a striped background', for each row of attributes."""
        columns = (attributes[name].tolist() for name in ("shape", "colour", "size", "background"))
        return [
            f"{_noun_phrase(shape, colour, size)} on a {BACKGROUNDS[background]} background"
            for shape, colour, size, background in zip(*columns, strict=True)
        ]

    def _draw_attributes(self, bits: torch.Tensor) -> dict[str, torch.Tensor]:
        shape, colour = self._pairs[choice(bits[:, DRAW_PAIR_1], len(self._pairs))].unbind(dim=1)
        size = choice(bits[:, DRAW_SIZE_1], len(SIZES))
        background = choice(bits[:, DRAW_BACKGROUND], len(BACKGROUNDS))
        return {"shape": shape, "colour": colour, "size": size, "background": background}

    def _place(self, attributes: dict[str, torch.Tensor], bits: torch.Tensor) -> list[Objects]:
        radius = SHAPE_RADII[attributes["size"]]
        x, y = (_within(uniform(bits[:, draw]), radius) for draw in (DRAW_X, DRAW_Y))
        return [_objects(attributes["shape"], attributes["colour"], radius, x, y, bits, DRAW_ANGLE_1)]


class Scenes(RenderedSet):
    """Two objects and their relation, at 64 pixels.

    Labels: "shape_1", "colour_1", "size_1", "shape_2", "colour_2", "size_2", "relation" (of the first object
    to the second) and "background". The objects differ in shape or colour, and stand farther apart along the
    relation's axis than across it. In "held_out" both objects are held-out pairs; elsewhere neither is.
    """

    image_sizes = (64,)
    labels = {
        "shape_1": SHAPES,
        "colour_1": COLOURS,
        "size_1": SIZES,
        "shape_2": SHAPES,
        "colour_2": COLOURS,
        "size_2": SIZES,
        "relation": RELATIONS,
        "background": BACKGROUNDS,
    }

    def describe(self, attributes: dict[str, torch.Tensor]) -> list[str]:
        """One sentence for each row of attributes.

        Such as 'a small red star to the left of a large blue ring on a dark background'.
        """
        captions = []
        columns = (attributes[name].tolist() for name in self.labels)
        for *objects, relation, background in zip(*columns, strict=True):
            first, second = _noun_phrase(*objects[:3]), _noun_phrase(*objects[3:])
            phrase = RELATION_PHRASES[relation]
            captions.append(f"{first} {phrase} {second} on a {BACKGROUNDS[background]} background")
        return captions

    def _draw_attributes(self, bits: torch.Tensor) -> dict[str, torch.Tensor]:
        num_pairs = len(self._pairs)
        pair_1 = choice(bits[:, DRAW_PAIR_1], num_pairs)
        # A step of 1, ..., num_pairs - 1 around the list of pairs leads to any pair but the first.
        pair_2 = (pair_1 + 1 + choice(bits[:, DRAW_PAIR_2], num_pairs - 1)) % num_pairs
        attributes = {}
        for number, pair, draw_size in ((1, pair_1, DRAW_SIZE_1), (2, pair_2, DRAW_SIZE_2)):
            attributes[f"shape_{number}"], attributes[f"colour_{number}"] = self._pairs[pair].unbind(dim=1)
            attributes[f"size_{number}"] = choice(bits[:, draw_size], len(SIZES))
        attributes["relation"] = choice(bits[:, DRAW_RELATION], len(RELATIONS))
        attributes["background"] = choice(bits[:, DRAW_BACKGROUND], len(BACKGROUNDS))
        return attributes

    def _place(self, attributes: dict[str, torch.Tensor], bits: torch.Tensor) -> list[Objects]:
        radius_1, radius_2 = (SCENE_RADII[attributes[name]] for name in ("size_1", "size_2"))
        # Along the relation's axis the first object comes first; the room that is left is divided at random
        # before, between and behind the two.
        before, until = uniform(bits[:, [DRAW_X, DRAW_Y]]).sort(dim=1).values.unbind(dim=1)
        room = 1 - 2 * MARGIN - GAP - 2 * REACH * (radius_1 + radius_2)
        along_1 = MARGIN + REACH * radius_1 + room * before
        along_2 = 1 - MARGIN - REACH * radius_2 - room * (1 - until)
        # Across it, the second object is off the first one's line by less than half of their distance along.
        across_1 = _within(uniform(bits[:, DRAW_ACROSS]), radius_1)
        offset = (uniform(bits[:, DRAW_OFFSET]) - 0.5) * (along_2 - along_1)
        border_2 = MARGIN + REACH * radius_2
        across_2 = (across_1 + offset).clamp(min=border_2, max=1 - border_2)
        # x grows to the right and y upwards, so the axis is turned round for "right of" and "above".
        left, right, above = (attributes["relation"] == RELATIONS.index(r) for r in RELATIONS[:3])
        placed = []
        for number, radius, along, across, draw_angle in (
            (1, radius_1, along_1, across_1, DRAW_ANGLE_1),
            (2, radius_2, along_2, across_2, DRAW_ANGLE_2),
        ):
            along = torch.where(right | above, 1 - along, along)
            x, y = torch.where(left | right, along, across), torch.where(left | right, across, along)
            shape, colour = attributes[f"shape_{number}"], attributes[f"colour_{number}"]
            placed.append(_objects(shape, colour, radius, x, y, bits, draw_angle))
        return placed


class ShapesAndScenes(ImageSet):
    """Half of the images from Shapes, half from Scenes, in turn, at 64 pixels; captions, but no labels.

    Attributes:
        parts: the two sets; image i is image i // 2 of parts[i % 2], which knows its labels.
    """

    channels = 3
    image_size = 64
    labels: dict[str, tuple[str, ...]] = {}

    def __init__(self, split: str = "train", image_size: int | None = None, seed: int = 0):
        """Describe a set; `split`, `image_size` (64) and `seed`, and what is raised, are those of Scenes."""
        scenes = Scenes(split, image_size, seed)  # which refuses other sizes than 64
        self.parts = (Shapes(split, scenes.image_size, seed), scenes)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def batch(self, indices: torch.Tensor | Sequence[int]) -> dict[str, torch.Tensor]:
        indices = self._checked(indices)
        image = torch.empty(len(indices), self.channels, self.image_size, self.image_size, device="cpu")
        for part, of_part in self._places(indices):
            image[of_part] = part.batch(indices[of_part] // 2)["image"]
        return {"image": image}

    def captions(self, indices: torch.Tensor | Sequence[int]) -> list[str]:
        """One sentence for each image of `indices`, which are those of `batch`."""
        indices = self._checked(indices)
        captions = [""] * len(indices)
        for part, of_part in self._places(indices):
            told = part.captions(indices[of_part] // 2)
            for place, caption in zip(of_part.tolist(), told, strict=True):
                captions[place] = caption
        return captions

    def _places(self, indices: torch.Tensor) -> list[tuple[RenderedSet, torch.Tensor]]:
        """Each part with the places in `indices` that belong to it."""
        return [(part, (indices % 2 == number).nonzero()[:, 0]) for number, part in enumerate(self.parts)]


# The columns of the random numbers that belong to an index. A brightness follows each angle.
DRAW_PAIR_1, DRAW_PAIR_2, DRAW_SIZE_1, DRAW_SIZE_2, DRAW_RELATION, DRAW_BACKGROUND = range(6)
DRAW_GREY, DRAW_PHASE_X, DRAW_PHASE_Y, DRAW_X, DRAW_Y, DRAW_ACROSS, DRAW_OFFSET = range(6, 13)
DRAW_ANGLE_1, DRAW_ANGLE_2 = 13, 15
NUM_DRAWS = 17


def parts_of(caption: str) -> list[str]:
    """What each word of a caption of Shapes or Scenes is, be it whole or shortened.

    Args:
        caption: as `describe` makes it, with or without LOSABLE_PARTS.

    Returns:
        For each word "article_1", "size_1", "colour_1" or "shape_1" of the first object or the only one, the
        same with 2 of the second, "relation" or "background".
    """
    parts, number = [], 0
    for word in caption.split():
        if word == "on" or parts[-1:] == ["background"]:
            parts.append("background")
        elif word == "a":
            number += 1
            parts.append(f"article_{number}")
        else:
            parts.append(f"{KIND_OF_WORD[word]}_{number}" if word in KIND_OF_WORD else "relation")
    return parts


def leave_out(caption: str, lost: Collection[str]) -> str:
    """A `caption` without the parts that are `lost`, any of LOSABLE_PARTS; see `parts_of`."""
    words = zip(caption.split(), parts_of(caption), strict=True)
    return " ".join(word for word, part in words if part not in lost)


def noun_sides(caption: str) -> list[int]:
    """For each word of a `caption`: a noun's side as its number in SIDES, else NO_SIDE.

    In 'a star to the left of a ring' the star is on the left, and the ring on the right. The only noun of a
    caption has no side.
    """
    words, parts = caption.split(), parts_of(caption)
    sides = [NO_SIDE] * len(words)
    for word in words:
        if word in SIDES:
            sides[parts.index("shape_1")] = SIDES.index(word)
            sides[parts.index("shape_2")] = SIDES.index(OTHER_SIDE[word])
    return sides


KIND_OF_WORD = {
    word: kind for kind, words in (("size", SIZES), ("colour", COLOURS), ("shape", SHAPES)) for word in words
}


def _noun_phrase(shape: int, colour: int, size: int) -> str:
    return f"a {SIZES[size]} {COLOURS[colour]} {SHAPES[shape]}"


def _within(position: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Stretch [0, 1) over the coordinates at which an object of this radius stays inside the image."""
    border = MARGIN + REACH * radius
    return border + (1 - 2 * border) * position


def _objects(shape, colour, radius, x, y, bits, draw_angle) -> Objects:
    angle = (2 * uniform(bits[:, draw_angle]) - 1) * MAX_ROTATION
    brightness = MIN_BRIGHTNESS + (1 - MIN_BRIGHTNESS) * uniform(bits[:, draw_angle + 1])
    return Objects(shape, colour, radius, x, y, angle, brightness)


def pixel_centres(image_size: int) -> torch.Tensor:
    """Where the pixels of a row or a column lie, (image_size,), in units of the image's width."""
    return (torch.arange(image_size, dtype=torch.float32, device="cpu") + 0.5) / image_size


def _coverage(objects: Objects, image_size: int) -> torch.Tensor:
    """The share of each pixel that the object covers, (B, H, W)."""
    centres = pixel_centres(image_size)
    right = centres - objects.x[:, None]  # (B, W)
    up = centres.flip(0) - objects.y[:, None]  # (B, H), row 0 is the top
    cos, sin = ((f(objects.angle) / objects.radius)[:, None] for f in (torch.cos, torch.sin))
    coverage = right.new_empty(len(right), image_size, image_size)
    for number, signed_distance in enumerate(SIGNED_DISTANCES):
        (rows,) = (objects.shape == number).nonzero(as_tuple=True)
        if len(rows) == 0:
            continue
        # The object's own coordinates: turned back by its angle, its radius 1.
        c, s, r, u = cos[rows], sin[rows], right[rows], up[rows]
        x = (c * r)[:, None, :] + (s * u)[:, :, None]  # (rows, H, W)
        y = (c * u)[:, :, None] - (s * r)[:, None, :]
        pixels = (objects.radius[rows] * image_size)[:, None, None]
        coverage[rows] = (0.5 - signed_distance(x, y) * pixels).clamp_(0, 1)
    return coverage


def _paint_background(background: torch.Tensor, bits: torch.Tensor, image_size: int) -> torch.Tensor:
    """Greys of each background, (B, 1, H, W) in [0, 1]."""
    level = GREY_LEVEL[background] + (2 * uniform(bits[:, DRAW_GREY]) - 1) * GREY_JITTER
    image = level[:, None, None, None].repeat(1, 1, image_size, image_size)
    centres = pixel_centres(image_size)
    phase_x, phase_y = (uniform(bits[:, draw, None]) for draw in (DRAW_PHASE_X, DRAW_PHASE_Y))
    # Stripes run diagonally; the coordinate across them is (x + y) / sqrt(2), y downwards.
    rows = background == BACKGROUNDS.index("striped")
    diagonal = (centres[:, None] + centres) / math.sqrt(2)  # (H, W)
    image[rows, 0] += TEXTURE_CONTRAST * _square_wave(diagonal, phase_x[rows, :, None], image_size)
    rows = background == BACKGROUNDS.index("checkered")
    columns_wave = _square_wave(centres, phase_x[rows], image_size)[:, None, :]  # (rows, 1, W)
    rows_wave = _square_wave(centres, phase_y[rows], image_size)[:, :, None]  # (rows, H, 1)
    image[rows, 0] += TEXTURE_CONTRAST * columns_wave * rows_wave
    return image


def _square_wave(position: torch.Tensor, phase: torch.Tensor, image_size: int) -> torch.Tensor:
    """A wave of -1 and 1 along `position`, averaged over a pixel's width; `phase` in periods."""
    # The distance to the nearest edge is a triangle wave.
    fraction = (position / TEXTURE_PERIOD + phase) % 1
    distance = ((fraction - 0.5).abs() - 0.25) * (TEXTURE_PERIOD * image_size)  # in pixels
    return (2 * distance).clamp(-1, 1)


# Signed distance functions of shapes of radius 1 around the origin, y upwards. A union is the minimum of its
# parts' distances, an intersection the maximum.


def _circle(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.hypot(x, y) - 1.0


def _square(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.98


def _triangle(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    # Equilateral, point up: three half-planes at one distance from the centre.
    slanted_side = math.cos(math.pi / 6) * x.abs() + math.sin(math.pi / 6) * y
    return torch.maximum(slanted_side, -y) - 0.7


def _star(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    # Five points, the first one up. Folded along its ten axes of symmetry, the star has a single edge.
    tip, notch, half_sector = 1.38, 0.66, math.pi / 5
    angle = torch.atan2(x.abs(), y)
    angle = (angle - 2 * half_sector * torch.round(angle / (2 * half_sector))).abs()
    radius = torch.hypot(x, y)
    edge_x, edge_y = notch * math.cos(half_sector) - tip, notch * math.sin(half_sector)
    length = math.hypot(edge_x, edge_y)
    return ((radius * torch.cos(angle) - tip) * edge_y - radius * torch.sin(angle) * edge_x) / length


def _ring(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    outer, inner = 1.15, 0.6
    return (torch.hypot(x, y) - (outer + inner) / 2).abs() - (outer - inner) / 2


def _cross(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    length, half_width = 1.25, 0.42
    x, y = x.abs(), y.abs()
    long, short = torch.maximum(x, y), torch.minimum(x, y)
    return torch.maximum(long - length, short - half_width)


def _heart(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    # A square that stands on a corner, and half a disc on each of its two upper sides.
    half_side = 0.74
    x, y = x.abs(), y + 0.2
    centre = half_side / math.sqrt(2)
    square = (x + y.abs()) / math.sqrt(2) - half_side
    disc = torch.hypot(x - centre, y - centre) - half_side
    return torch.minimum(square, disc)


def _crescent(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    # A disc without a second disc, which is smaller and farther to the right.
    x = x - 0.15
    disc = torch.hypot(x, y) - 1.25
    bite = torch.hypot(x - 0.62, y) - 0.9
    return torch.maximum(disc, -bite)


SIGNED_DISTANCES = (_circle, _square, _triangle, _star, _ring, _cross, _heart, _crescent)
