"""Readers: the network, the canonical reading of a scene, training, and how well the shipped ones read."""

import dataclasses

import pytest
import torch

from lecture26 import recipes
from lecture26.kit.checkpoints import load_card
from lecture26.kit.data import load
from lecture26.kit.evaluation import attribute_accuracy, read
from lecture26.kit.readers import Reader, canonical
from lecture26.kit.sample_draws import SampleDraws
from lecture26.kit.shapes import COLOURS, HELD_OUT_PAIRS, RELATIONS, SHAPES, Scenes, Shapes
from lecture26.recipes import find_recipe, load_model, load_recipe
from lecture26.recipes.readers import READERS, find_reader, rewrite

SHIPPED = [recipe.name for recipe in READERS]
OF_DRAWN_IMAGES = ["reader_shapes32", "reader_shapes64", "reader_scenes64"]
LABELS = {"class": ("0", "1", "2"), "ink": ("dark", "light")}


# The network


@pytest.mark.parametrize(
    ("channels", "image_size", "options"),
    [(1, 32, {}), (3, 32, {"num_features": 5}), (3, 64, {"patch_size": 2}), (2, 12, {"widths": (8, 16)})],
)
def test_one_output_for_each_label(channels, image_size, options):
    reader = Reader(LABELS, channels, image_size, **options)
    images = torch.zeros(4, channels, image_size, image_size)
    assert reader.labels == LABELS
    assert reader.features(images).shape == (4, options.get("num_features", 48))
    assert {name: logits.shape for name, logits in reader(images).items()} == {"class": (4, 3), "ink": (4, 2)}


def test_outputs_are_computed_from_the_features():
    reader = Reader(LABELS, 1, 32)
    images = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    for name, logits in reader(images).items():
        torch.testing.assert_close(logits, reader.heads[name](reader.features(images)))


def test_an_image_is_read_the_same_whatever_comes_with_it():
    reader = Reader(LABELS, 1, 32).double().train()
    images = torch.randn(5, 1, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(reader.features(images)[2:3], reader.features(images[2:3]))


@pytest.mark.parametrize("patch_size", [1, 2])
def test_every_place_of_the_image_counts(patch_size):
    """Objects of a scene are told apart by where they are."""
    torch.manual_seed(0)
    reader = Reader(LABELS, 1, 32, patch_size=patch_size).double()
    images = torch.randn(1, 1, 32, 32, dtype=torch.float64, requires_grad=True)
    reader.features(images).sum().backward()
    assert (images.grad != 0).all()
    features = reader.features(images)
    assert not torch.allclose(features, reader.features(images.roll(8, dims=3)))
    assert not torch.allclose(features, reader.features(images.flip(2)))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (({}, 3, 32), ValueError, "labels must name at least one label"),
        ((LABELS, 0, 32), ValueError, "channels must be at least 1; got 0"),
        ((LABELS, 3, 32.0), TypeError, "image_size must be an int"),
        ((LABELS, 3, 36), ValueError, "image_size must be a multiple of 8 .*got 36"),
        ((LABELS, 3, 40, (8, 8, 8), 2), ValueError, "image_size must be a multiple of 16 .*got 40"),
        ((LABELS, 3, 32, (8,), 0), ValueError, "patch_size must be at least 1"),
        ((LABELS, 3, 32, (8,), 1, 0), ValueError, "num_features must be at least 1"),
        ((LABELS, 3, 32, (8, 12)), ValueError, r"widths must be multiples of 8; got \(8, 12\)"),
        ((LABELS, 3, 32, ()), ValueError, r"widths must be multiples of 8; got \(\)"),
    ],
)
def test_reader_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        Reader(*arguments)


@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (2, 3, 64, 64), (3, 32, 32), (2, 3, 32, 31)])
def test_images_of_another_shape_are_refused(shape):
    reader = Reader(LABELS, 3, 32)
    for function in (reader, reader.features):
        with pytest.raises(ValueError, match=r"images must be of shape \(B, 3, 32, 32\)"):
            function(torch.zeros(shape))


# The canonical reading of a scene


def scene(first, relation, second):
    """The attributes of one scene, from words such as 'small red star'."""
    words = {"relation": relation, "background": "dark"}
    for number, words_of_object in (("1", first), ("2", second)):
        for label, word in zip(("size", "colour", "shape"), words_of_object.split(), strict=True):
            words[f"{label}_{number}"] = word
    return {name: torch.tensor([Scenes.labels[name].index(word)]) for name, word in words.items()}


STAR, RING = "small red star", "large blue ring"


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ((STAR, "left of", RING), (STAR, "left of", RING)),
        ((STAR, "right of", RING), (RING, "left of", STAR)),
        ((STAR, "above", RING), (STAR, "above", RING)),
        ((STAR, "below", RING), (RING, "above", STAR)),
    ],
)
def test_canonical_reading_begins_on_the_left_or_above(told, expected):
    assert canonical(scene(*told)) == scene(*expected)


def test_canonical_object_is_on_the_left_or_above_in_the_picture():
    scenes = Scenes("test")
    indices = range(200)
    told = scenes.attributes(indices)
    read_first = canonical(told)
    coverage = scenes.coverage(told, indices)  # (B, 2, H, W) of the objects as told
    places = (torch.arange(64) + 0.5).double()
    area = coverage.double().sum(dim=(2, 3))
    columns = (coverage.double().sum(dim=2) @ places) / area  # (B, 2) the objects' centres
    rows = (coverage.double().sum(dim=3) @ places) / area
    for i in indices:
        relation = RELATIONS[read_first["relation"][i]]
        traded = relation != RELATIONS[told["relation"][i]]
        first, second = (1, 0) if traded else (0, 1)
        centres = {"left of": columns, "above": rows}[relation][i]
        assert centres[first] < centres[second]
        for label in ("shape", "colour", "size"):
            assert read_first[f"{label}_1"][i] == told[f"{label}_{first + 1}"][i]
            assert read_first[f"{label}_2"][i] == told[f"{label}_{second + 1}"][i]


def test_canonical_reading_is_its_own_and_keeps_the_rest():
    told = Scenes("test").attributes(range(100))
    once = canonical(told)
    assert set(once) == set(told)
    assert torch.equal(once["background"], told["background"])
    assert 20 < (once["relation"] != told["relation"]).sum() < 80
    twice = canonical(once)
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_other_data_have_one_reading():
    attributes = Shapes("test").attributes(range(10))
    assert all(torch.equal(values, attributes[name]) for name, values in canonical(attributes).items())
    background = {"background": torch.tensor([1, 2])}
    assert canonical(background) == background


def test_part_of_a_scene_has_a_canonical_reading_if_it_is_the_same_part_of_both_objects():
    whole = scene(STAR, "below", RING)
    part = {name: whole[name] for name in ("shape_1", "shape_2", "relation")}
    assert canonical(part) == {name: canonical(whole)[name] for name in part}
    assert canonical({"relation": whole["relation"]}) == {"relation": canonical(whole)["relation"]}


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["shape_1", "shape_2"], "without 'relation'"),
        (["shape_1", "relation"], "without 'shape_2'"),
        (["shape_1", "colour_2"], "without 'colour_1', 'relation', 'shape_2'"),
    ],
)
def test_part_of_a_scene_that_leaves_the_reading_open_is_refused(names, missing):
    whole = scene(STAR, "left of", RING)
    with pytest.raises(ValueError, match=missing):
        canonical({name: whole[name] for name in names})


# Training


def test_training_shows_every_combination_and_the_canonical_labels():
    recipe, images = find_recipe("reader_scenes64"), load("scenes")
    batch = recipe.draw(images, SampleDraws(0, torch.arange(600)))
    assert batch["image"].shape == (600, 3, 64, 64)
    shown = {RELATIONS[relation] for relation in batch["relation"]}
    assert shown == {"left of", "above"}
    held_out = {(SHAPES.index(shape), COLOURS.index(colour)) for shape, colour in HELD_OUT_PAIRS}
    assert held_out < set(zip(batch["shape_1"].tolist(), batch["colour_1"].tolist(), strict=True))


@pytest.mark.parametrize("name", ["reader_shapes32", "reader_digits"])
def test_a_training_sample_depends_on_its_number_alone(name):
    recipe = find_recipe(name)
    images = recipe.load_images("train")
    together = recipe.draw(images, SampleDraws(3, torch.arange(8)))
    alone = recipe.draw(images, SampleDraws(3, torch.tensor([5])))
    for label, values in together.items():
        torch.testing.assert_close(values[5:6], alone[label], rtol=0, atol=1e-5)


def test_images_are_spoiled_to_any_degree():
    recipe = find_recipe("reader_shapes32")
    images = Shapes("train").batch(range(400))["image"]
    spoiled = recipe.spoil(images, SampleDraws(0, torch.arange(400)))
    assert spoiled.shape == images.shape
    assert spoiled.abs().max() <= 1
    difference = (spoiled - images).abs().mean(dim=(1, 2, 3))
    # Each of four ways of spoiling spares half of the images: all of them spare one in 16.
    spared = (difference < 1e-5).sum().item()
    assert 10 < spared < 45
    assert difference.quantile(0.25) < 0.1 < 0.2 < difference.max()


@pytest.mark.parametrize("way", ["warp", "stains", "noise"])
def test_each_way_of_spoiling_can_be_left_out(way):
    images = Shapes("train").batch(range(64))["image"]
    draws = torch.arange(64)
    recipe = find_recipe("reader_shapes32")
    spoiled = recipe.spoil(images, SampleDraws(0, draws))
    without = dataclasses.replace(recipe, **{way: 0.0}).spoil(images, SampleDraws(0, draws))
    assert not torch.equal(spoiled, without)
    nothing = dataclasses.replace(recipe, warp=0.0, stains=0.0, noise=0.0).spoil(
        images, SampleDraws(0, draws)
    )
    # What is left is blur, which keeps the mean.
    torch.testing.assert_close(nothing.mean(dim=(2, 3)), images.mean(dim=(2, 3)), rtol=0, atol=0.02)


def test_handwriting_is_moved_and_comes_in_other_sizes():
    images = -torch.ones(300, 1, 32, 32)
    images[:, :, 8:24, 8:24] = 1.0
    written = rewrite(images, SampleDraws(0, torch.arange(300)))
    assert -1 <= written.min() and written.max() <= 1 + 1e-5
    ink = (written + 1).double() / 2
    area = ink.sum(dim=(1, 2, 3))
    assert area.min() < 0.5 * 256 and area.max() > 256  # of 16 x 16
    places = (torch.arange(32) + 0.5).double()
    for axis in (2, 3):
        centres = (ink.sum(dim=(1, 5 - axis)) @ places) / area
        assert centres.min() < 14 and centres.max() > 18 and abs(centres.mean() - 16) < 0.5
    # Nothing comes in from outside the image.
    full = rewrite(torch.ones(300, 1, 32, 32), SampleDraws(0, torch.arange(300)))
    assert (full == -1).any()


def test_labels_come_from_the_data_and_go_into_the_card():
    recipe = find_recipe("reader_digits")
    fitted = recipe.fitted_to(recipe.load_images("train"))
    assert fitted.labels == {"class": tuple("0123456789")}
    assert (fitted.channels, fitted.image_size) == (1, 32)
    assert type(fitted)(**fitted.settings()).build().labels == fitted.labels


@pytest.mark.slow
def test_training_a_reader(tmp_path, monkeypatch):
    monkeypatch.setenv("LECTURE26_DATA", str(tmp_path))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    recipe = dataclasses.replace(
        find_recipe("reader_digits"), model={"widths": (8, 16)}, steps=60, batch_size=32, warmup_steps=10
    )
    card = recipes.run(recipe, "a command")
    assert card["recipe"] == "reader"
    assert card["loss_curve"]["loss"][-1] < 0.9 * card["loss_curve"]["loss"][0]
    assert card["metrics"]["accuracy_class"] == card["metrics"]["accuracy_all"] > 0.2  # by chance: 0.1
    reader = load_model("reader_digits")
    batch = load("digits", "test", 32).batch(range(50))
    assert read(reader, batch["image"]).predicted["class"].shape == (50,)


def test_images_without_labels_are_refused_before_training(tmp_path):
    from PIL import Image

    for number in range(40):
        Image.new("L", (32, 32), number).save(tmp_path / f"{number}.png")
    recipe = dataclasses.replace(find_recipe("reader_digits"), data=str(tmp_path) + "/", name="unlabelled")
    with pytest.raises(ValueError, match="a reader needs labelled images"):
        recipes.run(recipe, "a command")


# The shipped readers


@pytest.mark.slow
@pytest.mark.parametrize("split", ["test", "held_out"])
@pytest.mark.parametrize("name", OF_DRAWN_IMAGES)
def test_shipped_reader_reads_every_attribute(name, split):
    images = load_recipe(name).load_images(split)
    wanted = images.batch(range(2000))
    accuracy = attribute_accuracy(load_model(name), wanted.pop("image"), wanted)
    assert accuracy.keys() == {*images.labels, "all"}
    assert all(share > 0.995 for label, share in accuracy.items() if label != "all"), accuracy


def test_shipped_reader_reads_digits():
    images = load("digits", "test", 32)
    wanted = images.batch(range(len(images)))
    accuracy = attribute_accuracy(load_model("reader_digits"), wanted.pop("image"), wanted)
    assert accuracy["class"] > 0.98


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_DRAWN_IMAGES)
def test_shipped_reader_is_as_sure_as_it_is_right(name):
    recipe, reader = load_recipe(name), load_model(name)
    images = recipe.load_images("test")
    n = torch.arange(min(2000, len(images)))
    wanted = canonical(images.batch(n))
    spoiled = recipe.spoil(wanted.pop("image"), SampleDraws(1, n))
    predicted, confidence = read(reader, spoiled)
    right = torch.stack([predicted[label] == wanted[label] for label in wanted])
    confidence = torch.stack([confidence[label] for label in wanted])
    assert right.double().mean() == pytest.approx(confidence.double().mean().item(), abs=0.02)
    doubtful = confidence < 0.9
    assert doubtful.sum() > 30
    assert right[doubtful].double().mean() < 0.85 < 0.98 < right[~doubtful].double().mean()


@pytest.mark.parametrize("name", ["reader_shapes32", "reader_shapes64"])
def test_shipped_reader_is_sure_of_clean_images_and_unsure_of_ghosts(name):
    images = load_recipe(name).load_images("test")
    attributes = images.attributes(range(400))
    other = attributes | {"shape": (attributes["shape"] + 1 + torch.arange(400) % 7) % 8}
    clean = images.render(attributes, range(400))
    ghosts = (clean + images.render(other, range(400))) / 2  # two shapes in one place, each half transparent

    def confident_share(pictures):
        return (read(load_model(name), pictures).confidence["shape"] > 0.9).double().mean()

    assert confident_share(clean) > 0.97
    assert confident_share(ghosts) < 0.65


@pytest.mark.parametrize("name", SHIPPED)
def test_card_of_a_shipped_reader(name):
    card = load_card(name)
    images = load_recipe(name).load_images("test")
    assert card["command"] == f"python -m lecture26 train {name}"
    accuracies = {f"accuracy_{label}" for label in (*images.labels, "all", "spoiled")}
    assert accuracies | {"confident_share", "confidence_spoiled"} <= card["metrics"].keys()
    if name in OF_DRAWN_IMAGES:
        assert min(card["metrics"][f"accuracy_{label}"] for label in images.labels) > 0.995
        assert card["metrics"]["accuracy_held_out"] > 0.99
    assert {label: list(names) for label, names in images.labels.items()} == card["settings"]["labels"]


def test_shipped_readers_are_small():
    assert sum(load_card(name)["bytes"] for name in SHIPPED) < 2.5 * 2**20


def test_card_tells_what_evaluation_measures():
    recipe = load_recipe("reader_digits")
    metrics = recipe.evaluate(load_model("reader_digits"), recipe.load_images("test"))
    # The card's numbers were measured before the weights went to half precision.
    assert metrics == pytest.approx(load_card("reader_digits")["metrics"], abs=5e-3)


def test_reader_of_a_data_set_is_found(tmp_path, monkeypatch):
    for name, data, image_size in (
        ("reader_shapes32", "shapes", 32),
        ("reader_shapes64", "shapes", 64),
        ("reader_scenes64", "scenes", 64),
        ("reader_digits", "digits", 32),
    ):
        images = load(data, "test", image_size)
        assert find_reader(data, image_size).labels == images.labels
        assert name in SHIPPED
    assert find_reader("cifar10", 32) is None
    assert find_reader("digits", 16) is None
    monkeypatch.setenv("LECTURE26_DATA", str(tmp_path))
    assert find_reader("shapes", 32) is None  # no checkpoints there


def test_a_reader_is_no_denoiser():
    with pytest.raises(ValueError, match="model must be a denoiser; got 'reader_shapes32', a reader"):
        recipes.load_diffusion("reader_shapes32")
