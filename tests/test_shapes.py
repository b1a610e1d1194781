"""Shapes and Scenes: determinism, splits, geometry, legibility, captions."""

import itertools
import math
import re
import runpy

import pytest
import torch
from matplotlib.path import Path as Polygon

from lecture26.kit import shapes as module
from lecture26.kit.counter_random import choice, random_bits, uniform
from lecture26.kit.shapes import (
    BACKGROUNDS,
    COLOUR_RGB,
    COLOURS,
    HELD_OUT_PAIRS,
    LOSABLE_PARTS,
    NO_SIDE,
    RELATIONS,
    SHAPES,
    SIDES,
    SIZES,
    SPLIT_SIZES,
    SPLIT_STARTS,
    Scenes,
    Shapes,
    leave_out,
    noun_sides,
    parts_of,
)

CAPTIONS = (
    "a small red star on a striped background",
    "a small red star to the left of a large blue ring on a dark background",
    "a large pink heart above a small cyan cross on a checkered background",
)
ALL_SETS = [(Shapes, 32), (Shapes, 64), (Scenes, 64)]
MANY = range(1000)


# Random numbers by position


def splitmix64(state, n):
    """The n-th output of the sequential generator, in Python's unbounded integers."""
    mask = 2**64 - 1
    for _ in range(n):
        state = (state + 0x9E3779B97F4A7C15) & mask
    z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_reference_generator_gives_the_published_numbers():
    # The first outputs for the seed 1234567, as in the test vectors of the generator's implementations.
    assert [splitmix64(1234567, n) for n in (1, 2)] == [6457827717110365317, 3203168211198807973]


@pytest.mark.parametrize("seed", [0, 7, -1, 2**70 + 3])
def test_random_bits_are_outputs_of_splitmix64(seed):
    counters = [0, 1, 2, 50]
    bits = random_bits(seed, torch.tensor(counters), num_draws=3)
    for (row, counter), draw in itertools.product(enumerate(counters), range(3)):
        state = splitmix64(splitmix64(seed % 2**64, 1), draw + 1)
        assert bits[row, draw] == splitmix64(state, counter + 1) >> 40


def test_random_bits_at_large_counters_and_fewer_draws():
    counters = torch.tensor([3 * 2**32 + 5])
    bits = random_bits(1, counters, 4)
    assert torch.equal(bits[:, :2], random_bits(1, counters, 2))
    assert not torch.equal(bits, random_bits(1, counters + 1, 4))


def test_uniform_and_choice_cover_their_ranges():
    extremes = torch.tensor([0, 2**24 - 1])
    assert uniform(extremes).tolist() == [0.0, 1 - 2**-24]
    assert [choice(extremes, n).tolist() for n in (2, 7, 56)] == [[0, 1], [0, 6], [0, 55]]


def test_draws_are_uniform_and_uncorrelated():
    draws = uniform(random_bits(0, torch.arange(20_000), 17)).double()
    assert (draws.mean(dim=0) - 0.5).abs().max() < 4 * math.sqrt(1 / 12 / 20_000)
    correlation = torch.corrcoef(torch.cat([draws[:-1], draws[1:]], dim=1).T) - torch.eye(34)
    assert correlation.abs().max() < 4.5 / math.sqrt(20_000)


# Determinism


@pytest.mark.parametrize(("image_set", "image_size"), ALL_SETS)
def test_an_image_depends_on_seed_and_index_alone(image_set, image_size):
    images = image_set("train", image_size)
    indices = torch.arange(100, 160)
    batch = images.batch(indices)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(123)
    shuffled = image_set("train", image_size).batch(indices[order])
    for name, values in batch.items():
        assert torch.equal(values[order], shuffled[name])
    for position in range(0, 60, 5):
        alone = images[100 + position]
        assert all(torch.equal(values[position], alone[name]) for name, values in batch.items())
    other = image_set("train", image_size, seed=1).batch(indices)
    assert not torch.equal(batch["image"], other["image"])


@pytest.mark.parametrize(("image_set", "image_size"), ALL_SETS)
def test_images_have_256_levels(image_set, image_size):
    levels = (image_set("test", image_size).batch(range(64))["image"].double() + 1) * 127.5
    assert (levels - levels.round()).abs().max() < 1e-4
    assert levels.min() >= 0 and levels.max() <= 255


@pytest.fixture
def float64_by_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("image_set", "image_size"), ALL_SETS)
def test_images_are_float32_whatever_the_default(image_set, image_size, float64_by_default):
    indices = range(100)  # every shape and background
    imported_anew = runpy.run_path(module.__file__)[image_set.__name__]
    sets = [of("train", image_size) for of in (image_set, imported_anew)]
    images = [of.batch(indices)["image"] for of in sets]
    coverages = [of.coverage(of.attributes(indices), indices) for of in sets]
    torch.set_default_dtype(torch.float32)
    expected = image_set("train", image_size).batch(indices)["image"]
    for image, coverage in zip(images, coverages, strict=True):
        assert coverage.dtype == torch.float32
        assert image.dtype == torch.float32 and torch.equal(image, expected)


def test_64_pixels_show_the_picture_of_32_pixels():
    small, large = (Shapes("train", size).batch(range(256)) for size in (32, 64))
    assert all(torch.equal(small[name], large[name]) for name in Shapes.labels)
    shrunk = torch.nn.functional.avg_pool2d(large["image"], 2)
    assert (shrunk - small["image"]).abs().mean() < 0.01  # one pixel's shift gives 0.1


# Splits and attributes


def test_splits_cannot_overlap():
    ranges = sorted((start, start + SPLIT_SIZES[split]) for split, start in SPLIT_STARTS.items())
    assert all(end <= next_start for (_, end), (next_start, _) in itertools.pairwise(ranges))
    assert len(Shapes("train")) == 200_000 and len(Scenes("held_out")) == 10_000
    images = [Shapes(split).batch(range(50))["image"] for split in SPLIT_SIZES]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(images, 2))


def test_held_out_pairs_use_each_shape_and_colour_once():
    assert sorted(shape for shape, _ in HELD_OUT_PAIRS) == sorted(SHAPES)
    assert sorted(colour for _, colour in HELD_OUT_PAIRS) == sorted(COLOURS)


def shown_pairs(image_set, split, suffix):
    images = image_set(split)
    attributes = images.attributes(range(len(images)))
    columns = (attributes[f"{name}{suffix}"].tolist() for name in ("shape", "colour"))
    return {(SHAPES[shape], COLOURS[colour]) for shape, colour in zip(*columns, strict=True)}


@pytest.mark.parametrize(("image_set", "suffix"), [(Shapes, ""), (Scenes, "_1"), (Scenes, "_2")])
def test_held_out_pairs_are_shown_in_held_out_only(image_set, suffix):
    allowed = set(itertools.product(SHAPES, COLOURS)) - set(HELD_OUT_PAIRS)
    for split in ("train", "validation", "test"):
        assert shown_pairs(image_set, split, suffix) == allowed
    assert shown_pairs(image_set, "held_out", suffix) == set(HELD_OUT_PAIRS)


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("image_set", [Shapes, Scenes])
def test_attributes_are_uniform_and_independent(image_set, split):
    images = image_set(split)
    attributes = images.attributes(range(10_000))
    assert set(attributes) == set(images.labels)
    for name, values in attributes.items():
        share = torch.bincount(values, minlength=len(images.labels[name])) / 10_000
        p = 1 / len(images.labels[name])
        assert (share - p).abs().max() < 4.5 * math.sqrt(p * (1 - p) / 10_000), name
    bound_by_pairs = {"shape", "colour", "shape_1", "colour_1", "shape_2", "colour_2"}
    for first, second in itertools.combinations(attributes, 2):
        if {first, second} <= bound_by_pairs:
            continue
        joint = attributes[first] * len(images.labels[second]) + attributes[second]
        p = 1 / (len(images.labels[first]) * len(images.labels[second]))
        share = torch.bincount(joint, minlength=round(1 / p)) / 10_000
        assert (share - p).abs().max() < 5 * math.sqrt(p / 10_000), (first, second)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_objects_of_a_scene_differ_in_shape_or_colour(split):
    a = Scenes(split).attributes(range(10_000))
    assert ((a["shape_1"] != a["shape_2"]) | (a["colour_1"] != a["colour_2"])).all()
    same_shape = (a["shape_1"] == a["shape_2"]).float().mean()
    assert same_shape == 0 if split == "held_out" else 0.05 < same_shape < 0.2


# Geometry


def inside(shape, x, y):
    """Whether points lie in the shape, from polygons and discs: (N,) float64 -> (N,) bool."""

    def disc(centre_x, centre_y, radius):
        return (x - centre_x) ** 2 + (y - centre_y) ** 2 < radius**2

    def polygon(vertices):
        return torch.from_numpy(Polygon(vertices).contains_points(torch.stack([x, y], dim=1)))

    def regular(corners, radii):
        angles = [math.pi / 2 + 2 * math.pi * k / corners for k in range(corners)]
        radii = itertools.cycle(radii)
        return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=False)]

    half, top = 0.74 / math.sqrt(2), 0.74 * math.sqrt(2)
    return {
        "circle": lambda: disc(0, 0, 1),
        "square": lambda: polygon([(-0.98, -0.98), (0.98, -0.98), (0.98, 0.98), (-0.98, 0.98)]),
        "triangle": lambda: polygon(regular(3, [1.4])),
        "star": lambda: polygon(regular(10, [1.38, 0.66])),
        "ring": lambda: disc(0, 0, 1.15) & ~disc(0, 0, 0.6),
        "cross": lambda: (
            polygon([(-1.25, -0.42), (1.25, -0.42), (1.25, 0.42), (-1.25, 0.42)])
            | polygon([(-0.42, -1.25), (0.42, -1.25), (0.42, 1.25), (-0.42, 1.25)])
        ),
        "heart": lambda: (
            polygon([(0, -top - 0.2), (top, -0.2), (0, top - 0.2), (-top, -0.2)])
            | disc(half, half - 0.2, 0.74)
            | disc(-half, half - 0.2, 0.74)
        ),
        "crescent": lambda: disc(0.15, 0, 1.25) & ~disc(0.77, 0, 0.9),
    }[shape]()


@pytest.mark.parametrize(
    ("shape", "signed_distance"), list(zip(SHAPES, module.SIGNED_DISTANCES, strict=True))
)
def test_signed_distances(shape, signed_distance):
    generator = torch.Generator().manual_seed(0)
    points = (4 * torch.rand(20_000, 2, generator=generator, dtype=torch.float64) - 2).requires_grad_()
    x, y = points.unbind(dim=1)
    distance = signed_distance(x, y)
    assert torch.equal(distance < 0, inside(shape, x.detach(), y.detach()))
    # A distance grows by 1 per unit of length, so that the smoothed edge is one pixel wide.
    (gradient,) = torch.autograd.grad(distance.sum(), points)
    assert (gradient.norm(dim=1) - 1).abs().max() < 1e-9
    assert points[distance < 0].norm(dim=1).max() <= module.REACH


@pytest.mark.parametrize(("image_set", "image_size"), ALL_SETS)
def test_coverage_agrees_with_supersampling(image_set, image_size):
    images = image_set("train", image_size)
    attributes = images.attributes(range(256))
    coverage = images.coverage(attributes, range(256))
    placed = images._place(attributes, images._bits(range(256)))
    finer = torch.stack([module._coverage(objects, 4 * image_size) for objects in placed], dim=1)
    sampled = torch.nn.functional.avg_pool2d((finer > 0.5).float(), 4)  # 4 x 4 points per pixel
    assert (coverage - sampled).abs().mean() < 0.004
    on_edges = (sampled > 0) & (sampled < 1)
    assert (coverage - sampled)[on_edges].abs().mean() < 0.06
    assert (coverage - sampled)[on_edges].mean().abs() < 0.02


@pytest.mark.parametrize(("image_set", "image_size"), ALL_SETS)
def test_objects_stay_inside_and_apart(image_set, image_size):
    coverage = image_set("train", image_size).coverage(image_set("train", image_size).attributes(MANY), MANY)
    borders = (coverage[..., 0, :], coverage[..., -1, :], coverage[..., :, 0], coverage[..., :, -1])
    assert max(border.max() for border in borders) < 0.5
    assert ((coverage > 0).sum(dim=1) <= 1).all()


@pytest.mark.parametrize(("image_set", "image_size"), ALL_SETS)
def test_small_objects_are_11_pixels_across_and_large_ones_larger(image_set, image_size):
    images = image_set("train", image_size)
    attributes = images.attributes(MANY)
    mask = images.coverage(attributes, MANY) > 0.5
    across = torch.stack([mask.any(dim=d).sum(dim=-1) for d in (-1, -2)]).amin(dim=0)  # (B, objects)
    area = mask.sum(dim=(-1, -2))
    minimum = 11 if (image_set, image_size) != (Shapes, 64) else 22
    for position, suffix in enumerate(("",) if image_set is Shapes else ("_1", "_2")):
        is_small = attributes[f"size{suffix}"] == SIZES.index("small")
        assert across[:, position].min() >= minimum
        for shape in range(len(SHAPES)):
            chosen = attributes[f"shape{suffix}"] == shape
            small, large = (area[chosen & s, position].float() for s in (is_small, ~is_small))
            assert large.min() > 1.8 * small.max()
            assert large.mean() / small.mean() == pytest.approx(1.6**2, rel=0.1)


def test_objects_stand_out_and_show_their_colour():
    images = Shapes("train", 32)
    batch = images.batch(MANY)
    coverage = images.coverage({name: batch[name] for name in images.labels}, MANY)
    picture = (batch["image"] + 1) / 2

    def mean_over(mask):  # (B, 1, H, W) -> (B, 3)
        return (picture * mask).sum(dim=(-1, -2)) / mask.sum(dim=(-1, -2))

    colour, background = mean_over(coverage == 1), mean_over(coverage == 0)
    # The nearest to the background is a dark yellow on light, or a dark green on a texture.
    assert (colour - background).norm(dim=1).min() > 0.35
    assert (background.amax(dim=1) - background.amin(dim=1)).max() < 1e-4  # grey
    # Whatever the tint, the colour is nearest to its own name's.
    nearest = torch.cdist(colour, COLOUR_RGB).argmin(dim=1)
    assert torch.equal(nearest, batch["colour"])
    assert torch.pdist(COLOUR_RGB).min() > 0.35


def test_backgrounds_differ():
    images = Shapes("train", 32)
    batch = images.batch(MANY)
    background = images.coverage({name: batch[name] for name in images.labels}, MANY)[:, 0] == 0
    grey = (batch["image"][:, 0] + 1) / 2
    level = (grey * background).sum(dim=(1, 2)) / background.sum(dim=(1, 2))
    spread = [grey[i][background[i]].std().item() for i in MANY]
    for position, name in enumerate(BACKGROUNDS):
        chosen = batch["background"] == position
        low, high = {"dark": (0.05, 0.15), "light": (0.87, 0.97)}.get(name, (0.33, 0.47))
        assert low < level[chosen].min() and level[chosen].max() < high
        textured = [spread[i] > 0.06 for i in chosen.nonzero()[:, 0]]
        assert all(textured) if name in ("striped", "checkered") else not any(textured)


def test_positions_angles_and_tints_vary_independently():
    scenes = Scenes("train")
    indices = range(4000)
    placed = scenes._place(scenes.attributes(indices), scenes._bits(indices))
    columns = [column for objects in placed for column in (objects.angle, objects.brightness)]
    for angle, brightness in (columns[:2], columns[2:]):
        assert math.radians(14.9) < angle.abs().max() <= math.radians(15) and angle.mean().abs() < 0.02
        assert 0.88 <= brightness.min() < 0.881 and 0.999 < brightness.max() <= 1
    correlation = torch.corrcoef(torch.stack(columns)) - torch.eye(4)
    assert correlation.abs().max() < 4.5 / math.sqrt(4000)
    shapes = Shapes("train")
    (objects,) = shapes._place(shapes.attributes(indices), shapes._bits(indices))
    grey = shapes.batch(indices)["image"][:, 0, 0, 0]
    for size in objects.radius.unique():
        chosen = objects.radius == size
        border = module.MARGIN + module.REACH * size
        for position in (objects.x[chosen], objects.y[chosen]):
            assert border <= position.min() < border + 0.01 and 0.99 - border < position.max() <= 1 - border
        columns = torch.stack([objects.x, objects.y, objects.angle, objects.brightness])[:, chosen]
        dark = chosen & (shapes.attributes(indices)["background"] == 0)
        tints = torch.stack([objects.x, objects.y, objects.angle, objects.brightness, grey])[:, dark]
        for values in (columns, tints):
            correlation = torch.corrcoef(values) - torch.eye(len(values))
            assert correlation.abs().max() < 4.5 / math.sqrt(values.shape[1])


# Rendering given attributes


def test_render_changes_only_what_is_asked():
    images = Shapes("train", 32)
    indices = torch.arange(40)
    attributes = images.attributes(indices)
    assert torch.equal(images.render(attributes, indices), images.batch(indices)["image"])
    attributes["background"] = torch.zeros_like(attributes["background"])
    other = attributes | {"colour": (attributes["colour"] + 1) % len(COLOURS)}
    assert torch.equal(images.coverage(attributes, indices), images.coverage(other, indices))
    outside = (images.coverage(attributes, indices) == 0).expand(-1, 3, -1, -1)
    first, second = images.render(attributes, indices), images.render(other, indices)
    assert torch.equal(first[outside], second[outside])
    assert not torch.equal(first, second)


def test_render_shows_held_out_pairs_on_request():
    shape, colour = HELD_OUT_PAIRS[0]
    one = torch.ones(1, dtype=torch.int64)
    attributes = {
        "shape": SHAPES.index(shape) * one,
        "colour": COLOURS.index(colour) * one,
        "size": one,
        "background": 0 * one,
    }
    image = Shapes("train", 32).render(attributes, [5])
    assert image.shape == (1, 3, 32, 32)
    assert Shapes("train").describe(attributes) == ["a large green circle on a dark background"]


# Scenes


def test_relations_hold_in_the_geometry_and_in_the_mask():
    scenes = Scenes("train")
    attributes = scenes.attributes(MANY)
    first, second = scenes._place(attributes, scenes._bits(MANY))
    masks = scenes.coverage(attributes, MANY) > 0.5  # (B, 2, H, W)
    for i, relation in enumerate(attributes["relation"].tolist()):
        right, up = (second.x - first.x)[i].item(), (second.y - first.y)[i].item()
        rows = [mask.any(dim=1).nonzero()[:, 0] for mask in masks[i]]
        columns = [mask.any(dim=0).nonzero()[:, 0] for mask in masks[i]]
        along, across = {
            "left of": (right, up),
            "right of": (-right, up),
            "above": (-up, right),
            "below": (up, right),
        }[RELATIONS[relation]]
        assert along > 1.2 * abs(across)
        (before, after) = {
            "left of": (columns[0], columns[1]),
            "right of": (columns[1], columns[0]),
            "above": (rows[0], rows[1]),
            "below": (rows[1], rows[0]),
        }[RELATIONS[relation]]
        assert after.min() - before.max() > 1


def test_each_object_of_a_scene_has_its_own_colour():
    scenes = Scenes("test")
    batch = scenes.batch(range(200))
    attributes = {name: batch[name] for name in scenes.labels}
    coverage = scenes.coverage(attributes, range(200))
    picture = (batch["image"] + 1) / 2
    for position, name in enumerate(("colour_1", "colour_2")):
        mask = coverage[:, position, None] == 1
        colour = (picture * mask).sum(dim=(-1, -2)) / mask.sum(dim=(-1, -2))
        assert torch.equal(torch.cdist(colour, COLOUR_RGB).argmin(dim=1), attributes[name])


# Captions


def test_captions_say_what_the_labels_say():
    images = Shapes("validation")
    attributes = images.attributes(range(100))
    for i, caption in enumerate(images.captions(range(100))):
        name = {label: classes[attributes[label][i]] for label, classes in images.labels.items()}
        expected = f"a {name['size']} {name['colour']} {name['shape']} on a {name['background']} background"
        assert caption == expected


def test_captions_of_scenes():
    names = {
        "shape_1": "star",
        "colour_1": "red",
        "size_1": "small",
        "shape_2": "ring",
        "colour_2": "blue",
        "size_2": "large",
        "background": "striped",
    }
    said = {
        "left of": "to the left of",
        "right of": "to the right of",
        "above": "above",
        "below": "below",
    }
    for relation, phrase in said.items():
        attributes = {
            label: torch.tensor([Scenes.labels[label].index(name)])
            for label, name in (names | {"relation": relation}).items()
        }
        expected = f"a small red star {phrase} a large blue ring on a striped background"
        assert Scenes("train").describe(attributes) == [expected]


def test_captions_of_scenes_follow_the_labels():
    scenes = Scenes("test")
    assert scenes.captions([3, 1]) == scenes.describe(scenes.attributes([3, 1]))


@pytest.mark.parametrize(
    ("caption", "sides"),
    [
        ("a red star", {}),
        ("", {}),
        ("a star to the left of a small blue ring on a dark background", {"star": "left", "ring": "right"}),
        ("a small star to the right of a ring", {"star": "right", "ring": "left"}),
        ("a red star above a blue star", {2: "above", 6: "below"}),
        ("a ring below a large star on a light background", {"ring": "below", "star": "above"}),
    ],
)
def test_nouns_stand_where_the_caption_says(caption, sides):
    words = caption.split()
    expected = [NO_SIDE] * len(words)
    for noun, side in sides.items():
        expected[noun if isinstance(noun, int) else words.index(noun)] = SIDES.index(side)
    assert noun_sides(caption) == expected


@pytest.mark.parametrize("caption", CAPTIONS)
@pytest.mark.parametrize("kept", list(itertools.product([True, False], repeat=5)))
def test_a_caption_lacks_what_is_lost_and_nothing_else(caption, kept):
    """Told a second way: each part replaced in the text."""
    objects, background = caption.split(" on a ")
    phrases = re.findall(r"a (\w+) (\w+) (\w+)", objects)
    for (size, colour, shape), wanted in zip(phrases, (kept[:2], kept[2:4]), strict=False):
        told = " ".join(["a", *[size] * wanted[0], *[colour] * wanted[1], shape])
        objects = objects.replace(f"a {size} {colour} {shape}", told)
    expected = f"{objects} on a {background}" if kept[4] else objects
    lost = [part for part, is_kept in zip(LOSABLE_PARTS, kept, strict=True) if not is_kept]
    assert leave_out(caption, lost) == expected


def test_a_shortened_caption_is_still_true():
    caption = "a small red star on a striped background"
    assert leave_out(caption, ()) == caption
    assert leave_out(caption, ("size_1", "background")) == "a red star"
    assert leave_out(caption, ("colour_1",)) == "a small star on a striped background"


@pytest.mark.parametrize(
    ("caption", "parts"),
    [
        ("", []),
        ("a star", ["article_1", "shape_1"]),
        (
            "a red star to the left of a large ring on a dark background",
            ["article_1", "colour_1", "shape_1", *["relation"] * 4, "article_2", "size_2", "shape_2"]
            + ["background"] * 4,
        ),
        (
            "a heart above a pink cross",
            ["article_1", "shape_1", "relation", "article_2", "colour_2", "shape_2"],
        ),
    ],
)
def test_the_parts_of_a_caption(caption, parts):
    assert parts_of(caption) == parts


# As a data set


def test_works_with_a_data_loader():
    images = Shapes("test", 32)
    loader = torch.utils.data.DataLoader(images, batch_size=4, sampler=[5, 0, 9, 9])
    (batch,) = loader
    expected = images.batch([5, 0, 9, 9])
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    assert images[0]["image"].shape == (3, 32, 32) and images[0]["shape"].shape == ()


def test_empty_batch():
    assert Shapes("test", 32).batch([])["image"].shape == (0, 3, 32, 32)
    assert Scenes("test").batch([])["image"].shape == (0, 3, 64, 64)
    assert Shapes("test").captions([]) == []


# Bad input


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Shapes("tests"), ValueError, "split must be one of 'train'.*got 'tests'"),
        (lambda: Shapes("train", 48), ValueError, "image_size must be one of 32, 64; got 48"),
        (lambda: Scenes("train", 32), ValueError, "image_size must be one of 64; got 32"),
        (lambda: Shapes("train", 32.0), TypeError, "image_size must be an int; got 32.0"),
        (lambda: Shapes("train", 32, seed=0.5), TypeError, "seed must be an int; got 0.5"),
        (lambda: Shapes("test").batch([0, 10_000]), IndexError, "0, ..., 9999; got 10000"),
        (lambda: Shapes("test")[-1], IndexError, "got -1"),
        (lambda: Shapes("test").batch([0.5]), TypeError, "indices must be a flat sequence of integers"),
        (lambda: Shapes("test").batch([[0, 1]]), TypeError, "indices must be a flat sequence of integers"),
        (lambda: Shapes("test").batch([True]), TypeError, "indices must be a flat sequence of integers"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": torch.tensor([8, 0])}, r"attributes\['shape'\] must be in 0, ..., 7; got 8"),
        ({"shape": torch.tensor([0])}, r"attributes\['shape'\] must be an int64 tensor of shape \(2,\)"),
        ({"size": torch.tensor([0.0, 1.0])}, r"attributes\['size'\] must be an int64 tensor"),
        ({"texture": torch.tensor([0, 0])}, "attributes must be .*got .*texture"),
    ],
)
def test_bad_attributes(changes, message):
    images = Shapes("train")
    with pytest.raises(ValueError, match=message):
        images.render(images.attributes([0, 1]) | changes, [0, 1])
