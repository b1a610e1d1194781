"""The backbone's recipe, the tasks it is adapted to, the comparison of methods, and the commands `adapt` and
`classify`."""

import copy
import dataclasses
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy import ndimage
from tensors import agree, normal, perturbed, seeded
from timm.models import VisionTransformer
from typer.testing import CliRunner

from lecture26 import recipes
from lecture26.__main__ import EXIT_INTERRUPTED, EXIT_USER_ERROR, AdaptationMethod, app
from lecture26.commands import adapt
from lecture26.kit.checkpoints import load_card, save_checkpoint
from lecture26.kit.data import SPLITS, DataError, load
from lecture26.kit.downstream import COUNTS, TASKS, Coloured, FewOfEach, UpsideDown, downstream
from lecture26.kit.image_set import ImageSet
from lecture26.kit.precision import Choice
from lecture26.kit.results import load_results, save_results
from lecture26.kit.sample_draws import SampleDraws
from lecture26.kit.shapes import Shapes
from lecture26.recipes.adaptation import COMPARED, METHODS, Budget, build, load_backbone
from lecture26.recipes.backbone import accuracy
from lecture26.studies import adaptation, few_images, measurements, probes
from lecture26.studies.adaptation import Comparison
from lecture26.studies.ledger import Ledger, forget_ledger
from lecture26.visual_prompt_tuning import (
    VPT,
    adapter_tuning,
    backbone_fingerprint,
    full_fine_tune,
    load_task,
    lora_tuning,
    save_task,
)

TINY = {"patch_size": 8, "embed_dim": 8, "depth": 2, "num_heads": 2}
BUDGET = Budget(steps=2, batch_size=4, precision="fp32")
COURSE_DATA = os.environ.get("LECTURE26_DATA")


def write_images(folder, splits, classes, size=(12, 12), seed=0):
    """Random pictures in one folder per split and class."""
    generator = seeded(seed)
    for split, count in splits.items():
        for class_name in classes:
            (folder / split / class_name).mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(256, (*size, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / split / class_name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder of random pictures of 3 classes, 8 of each to train and 4 to test."""
    folder = tmp_path_factory.mktemp("photographs")
    return write_images(folder, {"train": 8, "test": 4}, ("bird", "cat", "ship"))


@pytest.fixture(scope="module", autouse=True)
def data_folder(tmp_path_factory, photographs):
    """A data folder with two hardly trained backbones, 'tiny_vit' and 'other_vit', and a reader."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LECTURE26_DATA", str(folder))
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setenv("TQDM_DISABLE", "1")
        for seed, name in enumerate(("tiny_vit", "other_vit")):
            recipe = small_recipe(photographs, 32, name=name, seed=seed, model=TINY)
            recipes.run(recipe, "a command")
        reader = recipes.find_recipe("reader_digits").settings()
        card = {"recipe": "reader", "settings": reader, "command": "", "data": "", "steps": 0, "seconds": 0}
        save_checkpoint("a_reader", {"weight": torch.zeros(1)}, card | {"metrics": {}})
        yield folder


def small_recipe(folder, image_size=12, **changes):
    """The backbone's recipe for a moment's training on a folder."""
    recipe = dataclasses.replace(
        recipes.find_recipe("vit_photos32_masked"),
        data=str(folder),
        image_size=image_size,
        **{"model": TINY | {"patch_size": 4}, "steps": 2, "batch_size": 4, "precision": "fp32"} | changes,
    )
    return recipe.fitted_to(recipe.load_images("train"))


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="python -m lecture26")


# The backbone's recipe


def test_a_sample_is_drawn_by_its_number_alone(photographs):
    recipe = small_recipe(photographs)
    images = recipe.load_images("train")
    whole = recipe.draw(images, SampleDraws(3, torch.arange(10)))
    parts = [recipe.draw(images, SampleDraws(3, n)) for n in (torch.arange(4), torch.arange(4, 10))]
    assert whole.keys() == parts[0].keys() == {"image", "class"} and whole["image"].shape == (10, 3, 12, 12)
    for name, batch in whole.items():
        agree(batch, torch.cat([part[name] for part in parts]), 1e-6)
    other = recipe.draw(images, SampleDraws(4, torch.arange(10)))
    assert not torch.isclose(other["image"], whole["image"]).flatten(1).all(dim=1).any()
    numbers = SampleDraws(3, torch.arange(10)).integers(len(images))
    assert torch.equal(whole["class"], images.batch(numbers)["class"])


@pytest.mark.parametrize("size", [12, 32])
def test_images_are_mirrored_and_moved(photographs, size):
    """Every image drawn is one of the pictures that can come out, and all kinds do."""
    recipe, shift = small_recipe(photographs, tint=0.0, erase=0.0), size // 8
    x = normal(1, 3, size, size, dtype=torch.float32).clamp(-1, 1)
    views, places = [], 2 * shift + 1
    for mirrored in (x, x.flip(3)):
        padded = F.pad(mirrored, (shift,) * 4, mode="reflect")
        views += [padded[0, :, i : i + size, j : j + size] for i in range(places) for j in range(places)]
    drawn = recipe.vary(x.expand(300, -1, -1, -1), SampleDraws(0, torch.arange(300)))
    gaps = torch.stack([(row - torch.stack(views)).abs().amax(dim=(1, 2, 3)) for row in drawn])
    nearest = gaps.argmin(dim=1)
    assert gaps.amin(dim=1).max() < 1e-5
    assert abs((nearest < places**2).double().mean() - 0.5) < 4 * math.sqrt(0.25 / 300)
    assert len((nearest % places**2 // places).unique()) == len((nearest % places).unique()) == places


def test_images_lose_squares_and_get_tints(photographs):
    x = torch.full((400, 3, 12, 12), 0.5)
    x[:, 0] = -0.5
    recipe = small_recipe(photographs, tint=0.0)
    drawn = recipe.vary(x, SampleDraws(0, torch.arange(400)))
    lost = (drawn == 0).all(dim=1).flatten(1)  # (400, 144)
    assert (torch.isclose(drawn, x).all(dim=1).flatten(1) | lost).all()
    assert 0.15 < lost.any(dim=1).double().mean() < recipe.erase + 4 * math.sqrt(0.19 / 400)
    assert lost.sum(dim=1).max() <= 49  # half the width, and a pixel for the grid
    tinted = small_recipe(photographs, erase=0.0).vary(x, SampleDraws(0, torch.arange(400)))
    assert tinted.abs().max() <= 1 and tinted.std(dim=(2, 3)).max() < 1e-5
    assert len(tinted[:, :, 0, 0].unique(dim=0)) > 390


def test_the_loss_has_smoothed_targets(photographs):
    recipe = small_recipe(photographs)
    batch = recipe.draw(recipe.load_images("train"), SampleDraws(0, torch.arange(20)))
    table = normal(3 * 12 * 12, 3, dtype=torch.float32)
    targets = (1 - recipe.smoothing) * F.one_hot(batch["class"], 3) + recipe.smoothing / 3
    log_probs = (batch["image"].flatten(1) @ table).log_softmax(dim=1)
    agree(recipe.loss(lambda x: x.flatten(1) @ table, batch), -(targets * log_probs).sum(dim=1).mean(), 1e-5)


@pytest.fixture(scope="module")
def teacher(photographs, data_folder):
    """A hardly trained teacher, 'tiny_teacher', which sees 3 by 3 places in 8 channels."""
    recipe = dataclasses.replace(
        recipes.find_recipe("convnet_photos32"),
        **{"name": "tiny_teacher", "data": str(photographs), "image_size": 12},
        **{"model": {"widths": (2, 4, 8)}, "steps": 2, "batch_size": 4},
    )
    recipes.run(recipe, "a command")
    return recipes.load_model("tiny_teacher")


def test_a_teacher_names_images_and_sees_places(photographs, teacher):
    images = small_recipe(photographs).load_images("test")
    x = images.batch(range(5))["image"]
    places = teacher.stages(x)
    assert places.shape == (5, 8, 3, 3)
    agree(teacher(x), F.linear(places.mean(dim=(2, 3)), teacher.head.weight, teacher.head.bias), 1e-5)
    assert load_card("tiny_teacher")["metrics"] == {"accuracy": pytest.approx(accuracy(teacher, images, 4))}


@torch.no_grad()
def test_a_taught_backbone_learns_what_is_seen_at_each_place(photographs, teacher):
    """The mean square between standardised vectors is 2 - 2 times their correlation."""
    alone = small_recipe(photographs, model=TINY | {"patch_size": 4, "depth": 3}, patch_drop=0.0)
    batch = alone.draw(alone.load_images("train"), SampleDraws(0, torch.arange(6)))
    vit = perturbed(alone.build(), torch.float32).eval()
    tokens = vit.patch_embed(batch["image"])
    tokens = torch.cat([vit.cls_token.expand(6, -1, -1), tokens], dim=1) + vit.pos_embed
    for block in vit.blocks[:-1]:
        tokens = block(tokens)
    seen = teacher.stages(batch["image"])
    correlations = [
        torch.corrcoef(torch.stack([seen[image, :, row, column], tokens[image, 1 + 3 * row + column]]))[0, 1]
        for image in range(6)
        for row in range(3)
        for column in range(3)
    ]
    taught = dataclasses.replace(alone, teacher="tiny_teacher", lesson=3.0)
    lesson = taught.loss(vit, batch) - alone.loss(vit, batch)
    agree(lesson, 3 * (2 - 2 * torch.stack(correlations).mean()), 1e-2)
    assert not vit.blocks[-1]._forward_pre_hooks


def test_a_teacher_must_see_as_many_places_as_there_are_patches(photographs, teacher):
    recipe = small_recipe(photographs, teacher="tiny_teacher", patch_drop=0.0, model=TINY | {"patch_size": 3})
    batch = recipe.draw(recipe.load_images("train"), SampleDraws(0, torch.arange(2)))
    message = r"teacher must see 16 places in 8 channels, as the patches are; 'tiny_teacher' sees 9 in 8"
    with pytest.raises(ValueError, match=message):
        recipe.loss(recipe.build(), batch)


def test_patches_are_left_out_in_training_alone(photographs, monkeypatch):
    recipe, lengths = small_recipe(photographs, 32, name="dropping", model=TINY), []
    vit = recipe.build()
    recipe.regularise(vit)
    vit.blocks[0].register_forward_pre_hook(lambda block, inputs: lengths.append(inputs[0].shape[1]))
    for mode in (vit.train, vit.eval):
        mode()(torch.zeros(2, 3, 32, 32))
    assert lengths == [1 + 8, 1 + 16]  # the class token, and patches

    seen = []
    monkeypatch.setattr(type(recipe), "regularise", lambda recipe, model: seen.append(model))
    recipes.run(recipe, "a command")
    assert len(seen) == 1 and isinstance(recipes.load_model("dropping").patch_drop, torch.nn.Identity)


def test_a_backbone_is_read_again_as_it_was_trained():
    card, model = recipes.load_recipe("tiny_vit"), recipes.load_model("tiny_vit")
    assert type(model) is VisionTransformer
    assert (model.num_classes, model.embed_dim, len(model.blocks)) == (3, 8, 2)
    assert model.patch_embed.img_size == (32, 32) and not model.training
    batch = card.load_images("test").batch(range(12))
    share = (model(batch["image"]).argmax(dim=1) == batch["class"]).double().mean().item()
    assert card.evaluate(model, card.load_images("test")) == {"accuracy": pytest.approx(share)}


@pytest.mark.slow
def test_a_backbone_is_trained_by_the_documented_commands(photographs):
    options = ["--data", photographs, "--steps", "1", "--batch-size", "2", "--precision", "fp32"]
    too_early = call("train", "vit_photos32", "--name", "from_a_folder", *options)
    assert too_early.exit_code != 0 and "lecture26 train vit_photos32_taught" in too_early.output
    before = ["convnet_photos32"], ["vit_photos32_masked"], ["vit_photos32_whole"], ["vit_photos32_taught"]
    for arguments in (*before, ["vit_photos32", "--name", "from_a_folder"]):
        result = call("train", *arguments, *options)
        assert result.exit_code == 0, result.output
    card, vit = load_card("from_a_folder"), recipes.load_model("from_a_folder")
    width = recipes.find_recipe("vit_photos32").model["embed_dim"]
    assert (card["recipe"], card["settings"]["num_classes"], vit.embed_dim) == ("backbone", 3, width)
    assert card["command"].startswith(
        f"python -m lecture26 train vit_photos32 --name from_a_folder --data {photographs}"
    )


def test_a_backbone_needs_classes(tmp_path):
    for number in range(20):
        Image.new("RGB", (12, 12)).save(tmp_path / f"{number}.png")
    with pytest.raises(ValueError, match="data must be images in one folder per class"):
        small_recipe(tmp_path)


# Those that the course brings


@pytest.fixture
def course_data(monkeypatch):
    """The course's own checkpoints and results."""
    if COURSE_DATA is None:
        monkeypatch.delenv("LECTURE26_DATA")
    else:
        monkeypatch.setenv("LECTURE26_DATA", COURSE_DATA)


def test_the_shipped_backbone_is_what_its_card_says(course_data, tmp_path):
    card, vit = load_card("vit_photos32"), recipes.load_model("vit_photos32")
    assert sum(parameter.numel() for parameter in vit.parameters()) == card["parameters"]
    model = VPT(vit, 10, 8, deep=True)
    x = normal(2, 3, 32, 32, dtype=torch.float32)
    agree(VPT(vit, 10, 0).forward_features(x), vit.forward_features(x), 0.0)
    save_task(tmp_path / "task", model.task_state_dict())
    assert (tmp_path / "task").stat().st_size < 100_000


@pytest.mark.slow
def test_the_shipped_backbone_names_as_many_photographs_as_its_card_says(course_data, tmp_path):
    card = load_card("vit_photos32")
    folder = Path(
        os.environ.get("LECTURE26_REAL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
    )
    archive = folder / "cifar10_jpeg.tar.xz"
    if not archive.exists():
        pytest.skip(f"no {archive}; set LECTURE26_REAL_DATA to its folder")
    with tarfile.open(archive) as files:
        for member in files:
            if member.name.startswith(("test/", "./test/")) or member.name.endswith("/0000.jpg"):
                files.extract(member, tmp_path, filter="data")
    images = Coloured(load(tmp_path, "test", 32), 500)
    share = accuracy(recipes.load_model("vit_photos32"), images, 100)
    expected = card["metrics"]["accuracy"]
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / 500)


# The tasks


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_a_function_of_split_and_index(name, split):
    images = downstream(name, split)
    assert (images.channels, images.image_size, len(images)) == (3, 32, COUNTS[split])
    whole = images.batch(range(40))
    some = downstream(name, split).batch([39, 3, 3])
    for key in ("image", "class"):
        assert torch.equal(some[key], whole[key][[39, 3, 3]])
    x = whole["image"]
    assert x.shape == (40, 3, 32, 32) and x.dtype == torch.float32 and x.abs().max() <= 1
    agree(((x + 1) * 127.5).round() / 127.5 - 1, x, 1e-6)  # eight bits for each channel
    assert len(x.flatten(1).unique(dim=0)) == 40
    for other in set(SPLITS) - {split}:
        theirs = downstream(name, other).batch(range(40))["image"]
        assert len(torch.cat([x, theirs]).flatten(1).unique(dim=0)) == 80


@pytest.mark.parametrize("name", TASKS)
def test_the_classes_of_a_task_are_about_equally_common(name):
    images = downstream(name, "train")
    counts = images.batch(range(len(images)))["class"].bincount()
    p = 1 / len(images.labels["class"])
    assert len(counts) == len(images.labels["class"])
    spread = math.sqrt(len(images) * p * (1 - p))
    assert (counts - len(images) * p).abs().max() < 4.5 * spread + len(images) * 0.02


def test_line_drawings_are_outlines_of_shapes():
    x = (downstream("line_drawings", "test").batch(range(100))["image"] + 1) / 2
    attributes = Shapes("test", 32).attributes(range(100))
    assert torch.equal(downstream("line_drawings", "test").batch(range(100))["class"], attributes["shape"])
    ink = 1 - x[:, 0]
    assert torch.equal(x[:, 0], x[:, 2])
    inside = Shapes("test", 32).coverage(attributes, torch.arange(100))[:, 0]
    assert (ink * (inside > 0.99)).max() < 0.02  # the inside is left white
    drawn, area = ink.sum(dim=(1, 2)), inside.sum(dim=(1, 2))
    assert (drawn > 20).all() and (ink.mean(dim=(1, 2)) < 0.3).all()
    assert (drawn.square() > 4 * math.pi * area * 0.5).all()  # a closed line around an area


def test_what_is_counted_can_be_counted():
    """The connected blobs are as many as the class says, but where two touch or one is hard to see."""
    images = downstream("counting", "test")
    batch = images.batch(range(200))
    x, counted = batch["image"], []
    for image in x:
        ground = image.flatten(1).mode(dim=1).values
        counted.append(ndimage.label(((image - ground[:, None, None]).abs().amax(dim=0) > 0.25).numpy())[1])
    expected = batch["class"] + 1
    counted = torch.tensor(counted)
    assert (counted <= expected).double().mean() > 0.97
    assert (counted == expected).double().mean() > 0.85
    assert [images.labels["class"][number - 1] for number in (1, 6)] == ["1", "6"]
    # the area does not tell the number: the discs' sizes overlap
    areas = torch.tensor(
        [
            (image - image.flatten(1).mode(dim=1).values[:, None, None]).abs().gt(0.1).any(0).sum()
            for image in x
        ]
    )
    assert areas[expected == 3].max() > areas[expected == 4].min()


def quarters(x):
    """The four quarters of images (B, 32, 32) in the order of CORNERS, as (B, 4, 16, 16)."""
    return x.unfold(1, 16, 16).unfold(2, 16, 16).flatten(1, 2)


def test_the_largest_disc_covers_the_most():
    images = downstream("largest", "test")
    assert images.labels["class"] == ("upper left", "upper right", "lower left", "lower right")
    batch = images.batch(range(300))
    ground = batch["image"][:, :, 15:17, 15:17].mean(dim=(2, 3), keepdim=True)  # no disc reaches the middle
    area = quarters((batch["image"] - ground).abs().amax(dim=1) > 0.25).sum(dim=(2, 3))  # (B, 4)
    assert (area > 0).double().mean() > 0.97  # but for a colour like the ground's
    assert (area.argmax(dim=1) == batch["class"]).double().mean() > 0.97
    # the largest cannot be told by its area alone, without the others
    largest = area.gather(1, batch["class"][:, None])[:, 0]
    second = area.sort(dim=1).values[:, 2]
    assert second.max() > largest.min()


def test_nodules_lie_where_their_class_says():
    images = downstream("xray", "test")
    assert images.labels["class"][0] == "no nodule"
    batch = images.batch(range(1000))
    x, target = batch["image"], batch["class"]
    assert torch.equal(x[:, 0], x[:, 2])
    healthy = x[target == 0, 0].mean(dim=0)  # (H, W)
    assert healthy[12:20, 8:12].mean() < healthy[12:20, :3].mean() - 0.2  # air lets more through
    spots = F.avg_pool2d((x[:, 0] - healthy)[:, None], 3, 1, 1)[:, 0]
    for corner in range(4):
        brighter = quarters(spots[target == corner + 1]).mean(dim=0)  # (4, 16, 16)
        assert brighter.amax(dim=(1, 2)).argmax() == corner
    found = quarters(spots).amax(dim=(2, 3)).argmax(dim=1) + 1
    assert (found == target)[target > 0].double().mean() > 0.8


def test_textures_run_the_way_their_names_say():
    images = downstream("textures", "test")
    batch = images.batch(range(400))
    grey = batch["image"].mean(dim=1)
    flat = F.avg_pool2d(grey[:, None], 3, 1)[:, 0]
    across, down = flat[:, 1:-1, 2:] - flat[:, 1:-1, :-2], flat[:, 2:, 1:-1] - flat[:, :-2, 1:-1]
    energy = [part.square().mean(dim=(1, 2)) for part in (across, down)]
    slant = (across * down).mean(dim=(1, 2)) / (energy[0] * energy[1]).sqrt()
    kinds = {name: batch["class"] == number for number, name in enumerate(images.labels["class"])}
    assert (energy[0] < energy[1])[kinds["horizontal"]].double().mean() > 0.95
    assert (energy[0] > energy[1])[kinds["vertical"]].double().mean() > 0.95
    # lines x + y = const rise to the right, where y counts downwards
    assert (slant > 0)[kinds["rising"]].double().mean() > 0.95
    assert (slant < 0)[kinds["falling"]].double().mean() > 0.95


def test_other_sets_are_coloured_cut_and_spread():
    images = downstream("digits", "train")
    assert (images.channels, images.image_size, len(images)) == (3, 32, 800)
    batch = images.batch(range(800))
    assert torch.equal(batch["image"][:, 0], batch["image"][:, 2])
    assert len(batch["class"].unique()) == 10
    whole = load("digits", "train", 32)
    assert len(Coloured(whole)) == len(whole)
    agree(images.batch([0, 799])["image"][:, :1], whole.batch([0, len(whole) - 1])["image"], 0.0)


def test_sorted_sets_lose_no_class(tmp_path):
    folder = write_images(tmp_path, {"train": 30, "test": 2}, ("a", "b", "c", "d"))
    images = Coloured(load(folder, "train", 8), 20)
    assert images.batch(range(20))["class"].bincount().tolist() == [5, 5, 5, 5]


def test_images_are_turned_upside_down():
    images = downstream("xray", "test")
    upright, turned = images.batch([3, 8]), UpsideDown(images).batch([3, 8])
    assert torch.equal(turned["image"][:, :, 0], upright["image"][:, :, -1])  # the first row is the last
    assert torch.equal(turned["class"], upright["class"]) and len(UpsideDown(images)) == len(images)


def test_a_few_images_of_each_class_are_drawn_by_the_seed():
    images = downstream("textures")
    few = FewOfEach(images, 10, seed=1)
    assert few.batch(range(len(few)))["class"].bincount().tolist() == [10] * 8
    every = {tuple(picture.flatten().tolist()) for picture in images.batch(range(len(images)))["image"]}
    drawn = [tuple(picture.flatten().tolist()) for picture in few.batch(range(len(few)))["image"]]
    assert len(set(drawn)) == 80 and set(drawn) <= every
    again, other = FewOfEach(images, 10, seed=1), FewOfEach(images, 10, seed=2)
    assert torch.equal(again.batch([5])["image"], few.batch([5])["image"])
    assert not torch.equal(other.batch(range(80))["image"], few.batch(range(80))["image"])
    with pytest.raises(ValueError, match=r"per_class must be at most .*got 500, and 'horizontal' has \d+"):
        FewOfEach(images, 500)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("nothing",), ValueError, "got 'nothing'"),
        (("counting", "held_out"), ValueError, "split must be one of .*got 'held_out'"),
        (("counting", "test", 64), ValueError, "image_size must be 32 for 'counting'.*got 64"),
        (("shapes",), ValueError, "images must have classes; their labels are shape"),
        (("./nowhere",), FileNotFoundError, "there is no folder nowhere"),
    ],
)
def test_tasks_that_are_none(arguments, error, message):
    with pytest.raises(error, match=message):
        downstream(*arguments)


# One method after another


class Plain(ImageSet):
    """Single colours; the class is which of three channels is brightest. A linear probe can learn it."""

    channels, image_size, labels = 3, 32, {"class": ("red", "green", "blue")}

    def __init__(self, count, seed):
        self._targets = torch.arange(count) % 3
        self._colours = 2 * F.one_hot(self._targets, 3) - 1 + 0.1 * normal(count, 3, seed=seed).float()

    def __len__(self):
        return len(self._targets)

    def batch(self, indices):
        indices = self._checked(indices)
        image = self._colours[indices][:, :, None, None].expand(-1, -1, 32, 32)
        return {"image": image, "class": self._targets[indices]}


SPLIT_SEEDS = {"train": 0, "validation": 1, "test": 2}


def plain_splits():
    return {split: Plain(60, seed) for split, seed in SPLIT_SEEDS.items()}


def tiny_backbone():
    """Random weights, and an old head whose answers depend on the image."""
    torch.manual_seed(0)
    vit = perturbed(VisionTransformer(img_size=32, num_classes=3, **TINY), torch.float32).eval()
    with torch.no_grad():
        vit.patch_embed.proj.weight *= 3
        vit.head.weight *= 10
        vit.head.bias.zero_()
    return vit


def test_every_method_trains_what_it_says():
    vit, L, d, K, n = tiny_backbone(), 2, 8, 5, 3
    numbers = {
        method: sum(p.numel() for p in build(method, vit, K, n, 0).parameters() if p.requires_grad)
        for method in METHODS
    }
    everything = sum(p.numel() for p in vit.parameters()) - (d + 1) * 3
    head = (d + 1) * K
    biases = sum(p.numel() for name, p in vit.named_parameters() if name.endswith("bias")) - 3
    assert numbers == {
        "linear": head,
        "vpt-shallow": n * d + head,
        "vpt-deep": L * n * d + head,
        "bias": biases + head,
        "adapter": 2 * L * (2 * 2 * d + 2 + d) + head,
        "lora": L * 2 * (d + 3 * d) + head,
        "full": everything + head,
    }


@pytest.mark.parametrize("method", METHODS)
def test_a_model_begins_by_its_seed(method):
    vit, x = tiny_backbone(), normal(2, 3, 32, 32, dtype=torch.float32)
    before = torch.get_rng_state()
    models = [build(method, vit, 5, 3, seed).eval() for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    agree(models[0](x), models[1](x), 0.0)
    assert not torch.isclose(models[0](x), models[2](x)).any()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(method):
    comparison = Comparison(tiny_backbone(), plain_splits(), Budget(steps=60, batch_size=30), seeds=(0,))
    run = comparison.run(method, 2, (0.03,))
    assert run["accuracy"][0] > 0.9 and len(run["accuracy"]) == 1


def test_the_learning_rate_is_chosen_by_the_validation_images(monkeypatch):
    """By these alone, and only by the first seed; what is measured is the test images' share."""
    asked = []

    def fit(model, images, learning_rate, budget, seed=0, **options):
        asked.append((learning_rate, seed))
        model.rate = learning_rate
        return adaptation.History([1.0], 2.0)

    shares = {("validation", 0.1): 0.5, ("validation", 0.2): 0.75, ("test", 0.1): 0.9, ("test", 0.2): 0.25}
    splits = plain_splits()

    def known_accuracy(model, images, batch_size):
        (split,) = (name for name, known in splits.items() if known is images)
        return shares[split, model.rate]

    monkeypatch.setattr(adaptation, "fit", fit)
    monkeypatch.setattr(adaptation, "accuracy", known_accuracy)
    run = Comparison(tiny_backbone(), splits, BUDGET, seeds=(4, 5, 6)).run("vpt-deep", 2, (0.1, 0.2))
    assert asked == [(0.1, 4), (0.2, 4), (0.2, 5), (0.2, 6)]
    assert run["learning_rate"] == 0.2
    assert run["validation"] == {"0.1": 0.5, "0.2": 0.75}
    assert run["at_edge"]  # said, and no other rate tried: these were asked for
    assert run["accuracy"] == [0.25] * 3 and run["tested"] == 60
    assert (run["seconds"], run["method"], run["num_prompts"]) == (2.0, "vpt-deep", 2)
    monkeypatch.setattr(adaptation, "accuracy", lambda *arguments: 0.5)
    for method, known in METHODS.items():
        asked.clear()
        run = Comparison(tiny_backbone(), splits, BUDGET, seeds=(0,)).run(method, 2)
        lower, upper = known.learning_rates
        assert [rate for rate, _ in asked] == [lower, upper, pytest.approx(3 * upper)]
        assert run["learning_rate"] == upper  # the middle one of three that do equally well


def test_shorter_runs_may_choose_the_learning_rate(monkeypatch):
    """They see the validation images alone, and none of them is measured otherwise."""
    asked, looked_at, splits = [], [], plain_splits()
    names = {id(images): split for split, images in splits.items()}

    def fit(model, images, learning_rate, budget, seed=0, **options):
        asked.append((learning_rate, seed, budget.steps))
        model.rate = learning_rate
        return adaptation.History([1.0], 2.0)

    def known_accuracy(model, images, batch_size):
        looked_at.append(names[id(images)])
        return 0.9 if model.rate == 0.1 else 0.5

    monkeypatch.setattr(adaptation, "fit", fit)
    monkeypatch.setattr(adaptation, "accuracy", known_accuracy)
    comparison = Comparison(tiny_backbone(), splits, Budget(steps=30), seeds=(4, 5), search=Budget(steps=10))
    run = comparison.run("vpt-deep", 2, (0.1, 0.2))
    assert asked == [(0.1, 4, 10), (0.2, 4, 10), (0.1, 4, 30), (0.1, 5, 30)]
    assert looked_at[:2] == ["validation"] * 2 and looked_at.count("test") == 2
    assert run["validation"] == {"0.1": 0.9, "0.2": 0.5} and run["accuracy"] == [0.9, 0.9]


@pytest.mark.parametrize(
    ("validation", "best"),
    [
        ({0.1: 0.5}, 0.1),
        ({0.3: 0.2, 0.1: 0.9, 0.2: 0.5}, 0.1),
        ({0.3: 0.5, 0.1: 0.5, 0.2: 0.5}, 0.2),
        ({0.3: 0.5, 0.1: 0.2, 0.2: 0.5}, 0.3),
    ],
)
def test_of_equally_good_rates_the_middle_one_is_best(validation, best):
    assert adaptation.best_rate(validation) == best


@pytest.mark.parametrize(
    ("optimum", "beyond", "chosen", "at_edge"),
    [
        (0.03, [0.01], 0.03, False),
        (0.1, [0.3], 0.1, False),
        (0.3, [0.3, 0.9], 0.3, False),
        (0.0033, [0.01, 0.0033, 0.0011], 0.0033, False),
        (100.0, [0.3, 0.9, 2.7, 8.1, 24.0], 24.0, True),  # seven rates are enough
    ],
)
def test_rates_are_tried_beyond_an_end_that_does_best(
    tmp_path, monkeypatch, optimum, beyond, chosen, at_edge
):
    """With an accuracy that falls on both sides of an optimum; what was tried on the way is cleared away."""
    asked = []

    def fit(model, images, learning_rate, budget, seed=0, **options):
        asked.append((learning_rate, seed))
        model.rate = learning_rate
        return adaptation.History([1.0], 2.0)

    monkeypatch.setattr(adaptation, "fit", fit)
    monkeypatch.setattr(
        adaptation, "accuracy", lambda model, *rest: 1 - abs(math.log(model.rate / optimum)) / 100
    )
    comparison = Comparison(tiny_backbone(), plain_splits(), BUDGET, seeds=(0, 1), folder=tmp_path)
    run = comparison.run("vpt-deep", 2)
    assert asked == [(rate, 0) for rate in (0.03, 0.1, *beyond)] + [(chosen, 1)]
    assert (run["learning_rate"], run["at_edge"]) == (chosen, at_edge)
    assert [float(rate) for rate in run["validation"]] == sorted([0.03, 0.1, *beyond])
    assert [file.name for file in tmp_path.iterdir()] == ["vpt-deep.safetensors"]


@pytest.mark.parametrize("best", [1e-4, 0.1, 1.0])
def test_the_weight_decay_is_chosen_at_the_learning_rate_that_was_chosen_before(tmp_path, monkeypatch, best):
    asked = []

    def fit(model, images, learning_rate, budget, seed=0, weight_decay=None, **options):
        asked.append((learning_rate, weight_decay, seed))
        model.setting = learning_rate, weight_decay
        return adaptation.History([1.0], 2.0)

    def share(model, *rest):
        rate, decay = model.setting
        return 1 - abs(math.log(rate / 0.1)) / 100 - abs(math.log(decay / best)) / 1000

    monkeypatch.setattr(adaptation, "fit", fit)
    monkeypatch.setattr(adaptation, "accuracy", share)
    comparison = Comparison(
        tiny_backbone(), plain_splits(), BUDGET, (0, 1), folder=tmp_path, weight_decays=(1e-4, 0.1, 1.0)
    )
    run = comparison.run("vpt-deep", 2)
    rates, decays = [(rate, 1e-4, 0) for rate in (0.03, 0.1, 0.3)], [(0.1, 0.1, 0), (0.1, 1.0, 0)]
    assert asked == [*rates, *decays, (0.1, best, 1)]
    assert (run["learning_rate"], run["weight_decay"]) == (0.1, best)
    assert list(run["validation_by_weight_decay"]) == ["0.0001", "0.1", "1"]
    assert [file.name for file in tmp_path.iterdir()] == ["vpt-deep.safetensors"]


def test_the_weights_of_the_best_look_at_the_validation_images_are_kept(tmp_path, monkeypatch):
    """Of several the first; a look changes nothing, and leaves the model in training."""
    at_look = {10: 0.5, 20: 0.75, 30: 0.75, 40: 0.25}
    splits = plain_splits()

    def fit(model, images, learning_rate, budget, seed=0, watch=None, **options):
        assert "state_file" not in options  # it would lack the best weights so far
        for step in range(1, 46):
            model.train()
            torch.nn.init.constant_(model.head.bias, step)
            watch(step)
            assert model.training and model.head.bias[0] == step
        return adaptation.History([1.0], 2.0)

    def share(model, images, batch_size):
        assert not model.training
        step = model.head.bias[0].item()
        return at_look[step] if images is splits["validation"] else step / 100

    monkeypatch.setattr(adaptation, "fit", fit)
    monkeypatch.setattr(adaptation, "accuracy", share)
    comparison = Comparison(
        tiny_backbone(), splits, BUDGET, (0, 1), state_file=tmp_path / "state.pt", look_every=10
    )
    for method in ("vpt-deep", "full"):
        run = comparison.run(method, 2, (0.1,))
        assert (run["accuracy"], run["accuracy_at_end"]) == ([0.2, 0.2], [0.45, 0.45])
        assert run["validation_by_step"] == 2 * [{str(step): share for step, share in at_look.items()}]


def test_a_solved_head_reads_what_was_trained_and_leaves_it_as_it_is():
    with small_tasks():
        splits = {split: downstream("textures", split) for split in SPLITS}
        vit = recipes.load_model("tiny_vit")
        for method in ("linear", "vpt-deep", "lora"):
            model = build(method, vit, 8, 2, seed=0).eval()
            head = model.head
            solved = probes.solved_behind(model, splits)
            assert model.head is head
            frozen = probes.solved_by_reading(vit.eval(), splits)["class token"]
            assert (solved == frozen) == (method != "vpt-deep")  # LoRA begins as the backbone


@pytest.mark.parametrize("fused", [False, True])
def test_prompts_cost_operations_and_other_methods_none(fused):
    """Products inside the attention are counted whichever way it computes, and it is left as it was."""
    vit, x = tiny_backbone(), plain_splits()["test"]
    for block in vit.blocks:
        block.attn.fused_attn = fused
    counts = {
        method: adaptation.operations(build(method, vit, 3, 4, 0), x)
        for method in ("linear", "bias", "full", "vpt-shallow", "vpt-deep")
    }
    assert counts["linear"] == counts["bias"] == counts["full"]
    assert counts["vpt-shallow"] == counts["vpt-deep"]
    tokens, d, L, n = 17, 8, 2, 4
    grown = [L * (12 * N * d**2 + 2 * N**2 * d) for N in (tokens, tokens + n)]
    assert counts["vpt-deep"] - counts["linear"] == 2 * (grown[1] - grown[0])
    assert all(block.attn.fused_attn == fused for block in vit.blocks)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_what_is_forgotten(method):
    """With the old head on the adapted weights: nothing by prompts, something by all that changes weights."""
    vit, upstream = tiny_backbone(), Plain(90, 7)
    before = copy.deepcopy(vit.state_dict())
    comparison = Comparison(vit, plain_splits(), Budget(steps=20, batch_size=30), (0, 1), upstream)
    run = comparison.run(method, 4, (0.03,))
    x = upstream.batch(range(90))
    share = (vit(x["image"]).argmax(dim=1) == x["class"]).double().mean().item()
    assert run["upstream_before"] == pytest.approx(share)
    if method in ("linear", "vpt-shallow", "vpt-deep"):
        assert run["upstream"] == [run["upstream_before"]] * 2
        assert len(run.get("upstream_prompted", ())) == (0 if method == "linear" else 2)
    else:
        assert run["upstream"][0] != run["upstream_before"] and len(run["upstream"]) == 2
    for name, tensor in vit.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("method", METHODS)
def test_a_backbone_that_has_changed_is_noticed(monkeypatch, method):
    vit = tiny_backbone()

    def careless_fit(*arguments, **options):
        with torch.no_grad():
            vit.blocks[0].attn.qkv.bias[0] += 1e-3
        return adaptation.History([1.0], 2.0)

    monkeypatch.setattr(adaptation, "fit", careless_fit)
    with pytest.raises(RuntimeError, match=f"'{method}' has changed the backbone"):
        Comparison(vit, plain_splits(), BUDGET, (0,)).run(method, 2, (0.03,))


def test_what_was_known_before_is_measured_before(monkeypatch):
    """The backbone is not compared with itself as it is after the training."""
    upstream, shares, seen = Plain(90, 7), iter((0.9, 0.2, 0.3)), []

    def known_accuracy(model, images, batch_size):
        seen.append(images is upstream)
        return next(shares) if images is upstream else 0.5

    def fit(*arguments, **options):
        assert seen == [True]
        return adaptation.History([1.0], 2.0)

    monkeypatch.setattr(adaptation, "accuracy", known_accuracy)
    monkeypatch.setattr(adaptation, "fit", fit)
    run = Comparison(tiny_backbone(), plain_splits(), BUDGET, (0,), upstream).run("vpt-deep", 2, (0.03,))
    assert (run["upstream_before"], run["upstream"], run["upstream_prompted"]) == (0.9, [0.2], [0.3])


def test_a_stopped_comparison_goes_on(tmp_path, monkeypatch):
    """Finished runs are not made again, and the outcome is that of a comparison that was not stopped."""
    fit, calls = adaptation.fit, []

    def counted_fit(*arguments, **options):
        calls.append(arguments[2])
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return fit(*arguments, **options)

    monkeypatch.setattr(adaptation, "fit", counted_fit)

    def compare(file):
        ledger = Ledger(file, {"study": 1})
        comparison = Comparison(tiny_backbone(), plain_splits(), BUDGET, (0, 1), None, ledger)
        runs = [comparison.run(method, 2, (0.01, 0.03)) for method in ("linear", "vpt-deep")]
        return [{key: value for key, value in run.items() if key != "seconds"} for run in runs]

    stop_at = 5
    with pytest.raises(KeyboardInterrupt):
        compare(tmp_path / "state.json")
    assert (tmp_path / "state.json").exists()
    stop_at, calls[:] = None, []
    went_on = compare(tmp_path / "state.json")
    assert len(calls) == 2  # of six, four had been made
    assert compare(tmp_path / "state.json") == went_on and len(calls) == 2
    assert went_on == compare(None)


def test_all_runs_of_a_comparison_are_in_one_precision(tmp_path, monkeypatch):
    """It is decided once, whatever would be found later, and stands in the results."""
    found = iter(["bf16", "fp32"])
    monkeypatch.setattr(
        adaptation, "choose_precision", lambda *arguments: Choice(next(found), "as a test would have it")
    )
    budgets, fit = [], adaptation.fit
    monkeypatch.setattr(
        adaptation, "fit", lambda *arguments, **o: budgets.append(arguments[3]) or fit(*arguments, **o)
    )
    for methods in (("linear", "vpt-deep"), ("full",)):
        ledger = Ledger(tmp_path / "state.json", {})
        budget = dataclasses.replace(BUDGET, precision="auto")
        comparison = Comparison(tiny_backbone(), plain_splits(), budget, (0, 1), None, ledger)
        runs = [comparison.run(method, 2, (0.01, 0.03)) for method in methods]
        assert [run["precision"] for run in runs] == ["bf16"] * len(methods)
    assert {budget.precision for budget in budgets} == {"bf16"} and len(budgets) == 9


def test_the_ledger_of_another_study_is_refused(tmp_path):
    file = tmp_path / "state.json"
    Ledger(file, {"steps": 1}).once("a run", lambda: {"accuracy": 0.5})
    assert Ledger(file, {"steps": 1}).once("a run", lambda: pytest.fail("made again")) == {"accuracy": 0.5}
    with pytest.raises(ValueError, match="state.json belongs to a study with other settings: delete it"):
        Ledger(file, {"steps": 2})
    file.write_text(file.read_text()[:-5])
    with pytest.raises(ValueError, match="state.json is damaged"):
        Ledger(file, {"steps": 1})


def test_an_unknown_method_is_refused():
    comparison = Comparison(tiny_backbone(), plain_splits(), BUDGET)
    with pytest.raises(ValueError, match="method must be one of 'linear'.*got 'prefix'"):
        comparison.run("prefix", 2)


# The stored study


@contextmanager
def small_tasks():
    """Tasks of a few dozen images."""
    with pytest.MonkeyPatch.context() as patch:
        for split, count in (("train", 60), ("validation", 30), ("test", 50)):
            patch.setitem(COUNTS, split, count)
        yield


@pytest.fixture(scope="module")
def study():
    with small_tasks():
        return adaptation.adaptation(
            ("tiny_vit", "other_vit"),
            ("digits", "counting"),
            ("linear", "vpt-deep", "full"),
            prompt_counts=(2, 3),
            budget=BUDGET,
            search=None,
            seeds=(0, 1),
            learning_rates=(0.01,),
            state="tiny_study",
        )


def test_a_study_goes_on_with_its_own_settings_alone(monkeypatch):
    fit, calls = adaptation.fit, []

    def stopped_fit(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fit(*arguments, **options)

    def compare(**changes):
        options = {"budget": BUDGET, "search": None, "seeds": (0, 1), "learning_rates": (0.01,)}
        options["state"] = "own_settings"
        with small_tasks():
            return adaptation.adaptation(("tiny_vit",), ("counting",), ("linear",), **options | changes)

    with monkeypatch.context() as patch:
        patch.setattr(adaptation, "fit", stopped_fit)
        with pytest.raises(KeyboardInterrupt):
            compare()
    with pytest.raises(ValueError, match="other settings"):
        compare(upstream=False)
    for name in ("WEIGHT_DECAY", "UPSTREAM_IMAGES"):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match="other settings"):
            patch.setattr(adaptation, name, 7)
            compare()
    assert len(compare()["runs"][0]["accuracy"]) == 2


@pytest.mark.slow
def test_a_study_has_every_backbone_task_method_and_length(study, data_folder):
    settings = [(run["backbone"], run["task"], run["method"], run["num_prompts"]) for run in study["runs"]]
    assert settings == [
        (backbone, task, method, n)
        for backbone in ("tiny_vit", "other_vit")
        for task in ("digits", "counting")
        for method, n in (("linear", 0), ("vpt-deep", 2), ("vpt-deep", 3), ("full", 0))
    ]
    for run in study["runs"]:
        assert len(run["accuracy"]) == 2 and all(0 <= share <= 1 for share in run["accuracy"])
        assert run["seconds"] > 0 and run["bytes"] == 4 * run["trained"]
        assert {"upstream", "upstream_before", "operations", "validation"} <= run.keys()
    assert study["seeds"] == [0, 1] and study["budget"]["steps"] == 2
    states = data_folder / "states"
    assert [file.name for file in states.iterdir() if "tiny_study" in file.name] == ["tiny_study.json"]
    forget_ledger("tiny_study")
    assert not (states / "tiny_study.json").exists()
    json.dumps(study)


def test_a_run_of_a_study_is_what_a_notebook_trains(study):
    """Built, trained and measured by hand as the chapter's live comparison does it."""
    with small_tasks():
        splits = {split: downstream("digits", split) for split in SPLITS}
    (run,) = (
        run
        for run in study["runs"]
        if (run["backbone"], run["task"], run["num_prompts"]) == ("tiny_vit", "digits", 2)
    )
    vit = recipes.load_model("tiny_vit")
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = VPT(vit, 10, 2, deep=True)
        adaptation.fit(model, splits["train"], 0.01, BUDGET, seed)
        model.eval()
        batch = splits["test"].batch(range(len(splits["test"])))
        share = (model(batch["image"]).argmax(dim=1) == batch["class"]).double().mean().item()
        assert run["accuracy"][seed] == pytest.approx(share)


def test_a_head_reads_a_few_features_of_many_tokens():
    """A class token of -1, then patches in four rows and columns: patch (r, c) holds 10 r + c, and 7."""
    patches = torch.tensor([[10.0 * row + column, 7.0] for row in range(4) for column in range(4)])
    tokens = torch.cat([torch.full((1, 2), -1.0), patches])[None]  # (1, 17, 2)
    expected = {
        "class token": [-1.0, -1.0],
        "patches": [16.5, 7.0],
        # of each feature the upper left quarter, the upper right one, and so on
        "quarters": [5.5, 7.5, 25.5, 27.5, 7.0, 7.0, 7.0, 7.0],
    }
    assert {name: reading(tokens)[0].tolist() for name, reading in probes.READINGS.items()} == expected


def test_a_solved_head_finds_what_steps_would_not():
    """The class is a sum of two features, of which one is ten thousand times as large as the other."""
    x, scale = normal(1200, 3, seed=1), torch.tensor([1e-2, 1e2, 1.0])
    target = (x[:, 0] + x[:, 1] > 0).long()
    splits = {"train": slice(0, 400), "validation": slice(400, 600), "test": slice(600, 1200)}
    assert (
        probes.solved_head({split: (x[part] * scale, target[part]) for split, part in splits.items()}) > 0.97
    )
    # what is no linear function of the features, it does not find
    target = (x[:, 0] * x[:, 1] > 0).long()
    share = probes.solved_head({split: (x[part] * scale, target[part]) for split, part in splits.items()})
    assert 0.4 < share < 0.6


def test_the_validation_images_choose_the_penalty():
    """One feature in 200 says which class it is; with little penalty the others would be learned by heart."""
    x = normal(860, 200, seed=2)
    target = (x[:, 0] + 0.5 * normal(860, seed=3) > 0).long()
    parts = {"train": slice(0, 60), "validation": slice(60, 460), "test": slice(460, 860)}
    splits = {split: (x[part], target[part]) for split, part in parts.items()}

    each = {inverse: probes.solved_head(splits, [inverse]) for inverse in (1e-6, 1e-2, 1e2)}
    assert len(set(each.values())) == 3
    seen = splits | {"test": splits["validation"]}
    on_validation = {inverse: probes.solved_head(seen, [inverse]) for inverse in each}
    assert probes.solved_head(splits, list(each)) == each[max(on_validation, key=on_validation.get)]


def test_solved_heads_see_the_backbone_and_the_trained_prompts(monkeypatch):
    fit, trained = adaptation.fit, []
    monkeypatch.setattr(probes, "fit", lambda *args: trained.append((args[2], args[4])) or fit(*args))
    runs = [{"method": "linear", "learning_rate": 0.5}, {"method": "vpt-deep", "learning_rate": 0.02}]
    save_results("adaptation_counting", "by hand", {"runs": runs})
    with small_tasks():
        solved = probes.solved_heads("tiny_vit", ("counting",), BUDGET, seeds=(0, 3), state="solved")
        again = probes.solved_heads("tiny_vit", ("counting",), BUDGET, seeds=(0, 3), state="solved")
        images = downstream("counting", "train")
        vit = recipes.load_model("tiny_vit").eval()
        tokens, classes = probes.see(vit.forward_features, images)
        splits = {split: downstream("counting", split) for split in SPLITS}
        by_class_token = probes.solved_head(
            {
                split: probes.see(lambda x: vit.forward_features(x)[:, 0], images)
                for split, images in splits.items()
            }
        )
    # the rate that the comparison has chosen, and the seeds, each trained once
    assert trained == [(0.02, 0), (0.02, 3)] and again == solved
    (run,) = solved["runs"]
    assert run["task"] == "counting" and run["accuracy"].keys() == {*probes.READINGS, "vpt-deep"}
    assert run["accuracy"]["class token"] == [by_class_token]
    assert len(run["accuracy"]["vpt-deep"]) == 2
    assert tokens.shape == (60, 17, 8) and torch.equal(classes, images.batch(range(60))["class"])
    with pytest.raises(ValueError, match="no results 'adaptation_xray'"), small_tasks():
        probes.solved_heads("tiny_vit", ("xray",), BUDGET)


def test_from_few_images_each_seed_learns_its_own(monkeypatch):
    learned = {}
    fit = adaptation.fit

    def watched(model, images, rate, budget, seed=0, **options):
        learned.setdefault((seed, budget.steps), images.batch(range(len(images)))["image"])
        return fit(model, images, rate, budget, seed, **options)

    monkeypatch.setattr(adaptation, "fit", watched)
    with small_tasks():
        study = few_images.adaptation_from_few(
            "tiny_vit",
            few_images.textures,
            ("vpt-deep", "full"),
            per_class=2,
            budget=BUDGET,
            search=dataclasses.replace(BUDGET, steps=1),
            seeds=(0, 1),
            prompt_counts=(1, 3),
            state="tiny_few",
        )
    assert [len(images) for images in learned.values()] == [16, 16, 16]
    assert torch.equal(learned[0, 1], learned[0, 2])  # the rate is chosen on the first seed's images
    assert not torch.equal(learned[0, 2], learned[1, 2])
    compared = [(run["method"], run["num_prompts"]) for run in study["runs"]]
    assert compared == [("vpt-deep", 1), ("vpt-deep", 3), ("full", 0)]
    assert all(len(run["accuracy"]) == len(run["solved"]) == 2 for run in study["runs"])
    assert study["solved"].keys() == probes.READINGS.keys()
    assert all(len(shares) == 2 for shares in study["solved"].values())
    assert len(study["solved_without_penalty"]) == 2
    json.dumps(study)
    forget_ledger("tiny_few")


@pytest.mark.parametrize(("half", "first", "end"), [("vpt-first-half", 0, 2), ("vpt-last-half", 2, 4)])
def test_prompts_in_half_of_the_blocks_are_deep_prompts_where_they_stand(half, first, end):
    """As if each half of the blocks were a network of its own, of which one has deep prompts."""
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=32, num_classes=3, **(TINY | {"depth": 4}))
    vit, x = perturbed(vit, torch.float64).eval(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model = few_images.HALVES[half].drawn(vit, num_classes=3, num_prompts=2, seed=0).eval()
    deep = build("vpt-deep", vit, 3, 2, seed=0).eval()
    assert torch.equal(model.prompts, deep.prompts[first:end]) and torch.equal(
        model.head.weight, deep.head.weight
    )
    tokens = vit._pos_embed(vit.patch_embed(x))
    for number, block in enumerate(vit.blocks):
        if first <= number < end:
            without = tokens if number == first else torch.cat([tokens[:, :1], tokens[:, 3:]], dim=1)
            prompts = model.prompts[number - first].expand(2, -1, -1)
            tokens = torch.cat([without[:, :1], prompts, without[:, 1:]], dim=1)
        tokens = block(tokens)
    agree(model(x), deep.head(vit.norm(tokens)[:, 0]), 1e-12)
    model(x).sum().backward()
    assert (model.prompts.grad.abs().amax(dim=(1, 2)) > 0).all()
    assert all(parameter.grad is None for parameter in vit.parameters())


def test_the_measurements_are_about_checkpoints_and_tasks_that_exist():
    of_tasks = [f"adaptation_{task}" for task in adaptation.SMALL_TASKS]
    others = ("mnist", "inside", "short", "prompts", "widths")
    for name in (*of_tasks, *(f"adaptation_{other}" for other in others)):
        options = measurements.MEASUREMENTS[name].keywords
        for backbone in options.get("backbones", ("vit_photos32",)):
            assert recipes.find_recipe(backbone).family == "backbone"
        assert set(options.get("methods", METHODS)) <= set(METHODS)
        for task in options.get("tasks", adaptation.SMALL_TASKS):
            assert task in TASKS or task in ("digits", "./mnist")
    from_few = [
        f"{name}_{task}"
        for name in ("few", "forty", "forty_where", "forty_how_many", "forty_longer")
        for task in ("photos", "textures")
    ]
    for name in (*from_few, "forty_other_kinds"):
        measurement = measurements.MEASUREMENTS[f"adaptation_{name}"]
        backbone, open_splits = measurement.args
        assert recipes.find_recipe(backbone).family == "backbone" and callable(open_splits)
        methods = measurement.keywords.get("methods", few_images.METHODS_FROM_FEW)
        assert set(methods) <= METHODS.keys() | few_images.HALVES.keys()
    backbone, tasks = measurements.MEASUREMENTS["adaptation_solved"].args
    assert recipes.find_recipe(backbone).family == "backbone"
    for task in tasks:  # solved heads go by the comparisons of the same tasks
        assert f"adaptation_{Path(task).name}" in measurements.MEASUREMENTS


# The command `adapt`


QUICK = ["--steps", "2", "--batch-size", "4", "--learning-rate", "0.01", "--precision", "fp32"]


@pytest.fixture(scope="module")
def lesions(tmp_path_factory):
    """A folder laid out like a medical data set: grey pictures by split and diagnosis, of any size."""
    folder = tmp_path_factory.mktemp("lesions")
    for split, count in (("train", 6), ("val", 3), ("test", 4)):
        for shade, diagnosis in ((60, "benign"), (200, "malignant")):
            (folder / split / diagnosis).mkdir(parents=True)
            for number in range(count):
                Image.new("L", (40, 52), shade + number).save(folder / split / diagnosis / f"{number}.jpeg")
    return folder


def test_the_methods_of_the_command_are_those_there_are():
    """They are written down twice, so that --help need not import what trains them."""
    assert [method.value for method in AdaptationMethod] == [*METHODS, "compare"]
    told = call("adapt", "--help").stdout
    assert f"compare: {', '.join(COMPARED[:-1])} and {COMPARED[-1]}." in " ".join(told.split())


def test_adapting_to_a_folder_of_medical_images(data_folder, lesions):
    result = call("adapt", "--backbone", "tiny_vit", "--data", lesions, "--name", "lesions", *QUICK)
    assert result.exit_code == 0, result.output
    assert "vpt-deep" in result.stdout and "accuracy" in result.stdout
    stored = load_results("lesions")
    assert stored["images"] == {"train": 12, "validation": 6, "test": 8}
    assert stored["command"].startswith(f"python -m lecture26 adapt --backbone tiny_vit --data {lesions}")
    assert {"machine", "versions", "backbone"} <= stored.keys()
    (run,) = stored["runs"]
    assert (run["method"], run["num_prompts"], run["trained"]) == ("vpt-deep", 8, 2 * 8 * 8 + 9 * 2)
    assert len(run["accuracy"]) == 1

    vit = recipes.load_model("tiny_vit")
    state = load_task(data_folder / "tasks" / "lesions" / "vpt-deep.safetensors")
    assert state.backbone == backbone_fingerprint(vit)
    assert (data_folder / "tasks" / "lesions" / "vpt-deep.safetensors").stat().st_size < 2000
    model = VPT(vit, 2, 8, deep=True)
    model.load_task_state_dict(state)
    batch = Coloured(load(lesions, "test", 32)).batch(range(8))
    share = (model.eval()(batch["image"]).argmax(dim=1) == batch["class"]).double().mean().item()
    assert run["accuracy"] == [pytest.approx(share)]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_leaves_what_it_has_trained(data_folder, lesions, method):
    name = f"by_{method}"
    options = [
        "--backbone",
        "tiny_vit",
        "--data",
        lesions,
        "--method",
        method,
        "--prompts",
        3,
        "--name",
        name,
    ]
    result = call("adapt", *options, *QUICK)
    assert result.exit_code == 0, result.output
    (run,) = load_results(name)["runs"]
    file = data_folder / "tasks" / name / f"{method}.safetensors"
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]
    assert run["bytes"] <= file.stat().st_size < run["bytes"] + 6000


def aircraft_folder(folder, per_variant=2):
    """Pictures in FGVC-Aircraft's layout, as torchvision reads it, with a banner at the bottom."""
    data = folder / "downloads" / "FGVCAircraft" / "fgvc-aircraft-2013b" / "data"
    (data / "images").mkdir(parents=True)
    variants = ("707-320", "A320", "DH-82")
    (data / "variants.txt").write_text("".join(f"{variant}\n" for variant in variants))
    number = 1_000_000
    for split in ("train", "val", "test"):
        lines = []
        for place, variant in enumerate(variants):
            for _ in range(per_variant):
                pixels = torch.full((60, 80, 3), 60 * (place + 1), dtype=torch.uint8)
                pixels[-20:] = 255
                Image.fromarray(pixels.numpy()).save(data / "images" / f"{number}.jpg")
                lines.append(f"{number} {variant}\n")
                number += 1
        (data / f"images_variant_{split}.txt").write_text("".join(lines))
    return folder


@pytest.fixture
def aircraft(tmp_path, monkeypatch, data_folder):
    """A data folder with FGVC-Aircraft in miniature beside the tiny backbones."""
    monkeypatch.setenv("LECTURE26_DATA", str(tmp_path))
    shutil.copytree(data_folder / "checkpoints", tmp_path / "checkpoints")
    return aircraft_folder(tmp_path)


def tiny_timm(monkeypatch):
    """timm.create_model makes everything as small as it comes; what was asked for."""
    import timm

    create, asked = timm.create_model, []

    def small(name, pretrained=False, **options):
        asked.append((name, pretrained))
        if pretrained:
            raise OSError("We couldn't connect to 'https://huggingface.co' to load the weights")
        return create(name, pretrained=False, img_size=32, embed_dim=24, depth=2, num_heads=2, **options)

    monkeypatch.setattr(timm, "create_model", small)
    return asked


def test_the_documented_comparison_on_aircraft(aircraft, monkeypatch):
    """Random weights, pictures in FGVC-Aircraft's layout; the command is otherwise the documented one."""
    asked = tiny_timm(monkeypatch)
    backbone = ["--backbone", "vit_base_patch16_224.augreg_in21k", "--random-weights"]
    result = call(
        "adapt", *backbone, "--data", "fgvc_aircraft", "--method", "compare", "--prompts", 10, *QUICK
    )
    assert result.exit_code == 0, result.output
    assert asked == [("vit_base_patch16_224.augreg_in21k", False)]
    (file,) = (aircraft / "results").glob("*.json")
    stored = json.loads(file.read_text())
    assert [run["method"] for run in stored["runs"]] == ["linear", "vpt-shallow", "vpt-deep", "full"]
    assert stored["images"] == {"train": 6, "validation": 6, "test": 6}
    head = (24 + 1) * 3
    assert [run["trained"] for run in stored["runs"]][:3] == [head, 240 + head, 2 * 240 + head]
    assert file.stem.isidentifier() and "aircraft" in file.stem.lower()


def documented_commands():
    """What chapter 08 and the README say of `adapt`, as words, each once."""
    root = Path(__file__).parents[1]
    texts = [
        re.sub(r"^# ?", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE).replace("\\\n", " ")
        for file in (root / "notebooks" / "08_visual_prompt_tuning.py", root / "README.md")
    ]
    lines = re.findall(r"^ *python -m lecture26 (adapt --[^#\n]*)", "\n".join(texts), flags=re.MULTILINE)
    return list(dict.fromkeys(tuple(shlex.split(line)) for line in lines))


@pytest.mark.parametrize("command", documented_commands(), ids=" ".join)
def test_documented_commands_run(aircraft, lesions, monkeypatch, command):
    """As they are written, but for a moment, with random weights, and on other images than ./chest."""
    tiny_timm(monkeypatch)
    words = [str(lesions) if word.startswith("./") else word for word in command]
    result = call(*words, "--random-weights", "--seeds", "1", *QUICK)
    assert result.exit_code == 0, result.output
    assert len(list((aircraft / "results").glob("*.json"))) == 1


def test_the_documented_commands_are_found():
    found = [" ".join(command) for command in documented_commands()]
    assert any("--data fgvc_aircraft" in line and "--method compare" in line for line in found)
    assert any("--data ./" in line for line in found)


@pytest.mark.parametrize(("text", "reason"), [("407 Proxy", "407 Proxy"), ("", "NetworkTrouble")])
def test_whatever_the_hub_raises_is_told_in_one_line(monkeypatch, text, reason):
    import timm

    class NetworkTrouble(Exception):
        """As those of network libraries, no OSError."""

    def fails(*_, **__):
        raise NetworkTrouble(text)

    monkeypatch.setattr(timm, "create_model", fails)
    with pytest.raises(DataError, match=f"could not be fetched: {reason} Connect .*HF_HUB_OFFLINE=1"):
        load_backbone("vit_tiny_patch16_224")


def test_without_a_network_the_error_says_what_to_do(aircraft, monkeypatch):
    tiny_timm(monkeypatch)
    options = ["--backbone", "vit_base_patch16_224.augreg_in21k", "--data", "fgvc_aircraft"]
    result = call("adapt", *options, "--method", "vpt-deep", "--prompts", "10", *QUICK)
    assert result.exit_code == EXIT_USER_ERROR
    last = result.stderr.splitlines()[-1]
    assert "the weights of 'vit_base_patch16_224.augreg_in21k' could not be fetched" in last
    assert "Connect to the network" in last
    assert not (aircraft / "results").exists() and not (aircraft / "tasks").exists()


def test_pictures_are_normalised_as_the_backbone_was_trained(lesions):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images = adapt.Normalised(load(lesions, "test", 32), mean, std)
    raw = load(lesions, "test", 32).batch(range(8))
    batch = images.batch(range(8))
    for channel in range(3):
        expected = ((raw["image"][:, 0] + 1) / 2 - mean[channel]) / std[channel]
        agree(batch["image"][:, channel], expected, 1e-5)
    assert torch.equal(batch["class"], raw["class"]) and len(images) == 8


@pytest.mark.parametrize(
    ("backbone", "expected"),
    [
        ("tiny_vit", 0.5),  # the course's own take images in [-1, 1]
        ("vit_base_patch16_224.augreg_in21k", 0.5),
        ("deit3_small_patch16_224.fb_in1k", 0.485),
    ],
)
def test_the_mean_is_the_backbones_own(aircraft, monkeypatch, backbone, expected):
    tiny_timm(monkeypatch)
    means = []
    normalised = adapt.Normalised

    def watched(images, mean, std):
        means.append(mean)
        return normalised(images, mean, std)

    monkeypatch.setattr(adapt, "Normalised", watched)
    options = ["--backbone", backbone, "--method", "linear", *QUICK]
    options += [] if backbone == "tiny_vit" else ["--random-weights"]
    result = call("adapt", "--data", "fgvc_aircraft", *options)
    assert result.exit_code == 0, result.output
    assert {round(mean[0], 3) for mean in means} == {expected}


def test_stopped_adapting_goes_on(data_folder, lesions, monkeypatch):
    arguments = ["adapt", "--backbone", "tiny_vit", "--data", lesions, "--name", "stopped", *QUICK]
    arguments += ["--learning-rate", "0.03", "--method", "compare", "--state-every", "0"]
    draws, integers = [], SampleDraws.integers

    def interrupted(self, high):
        draws.append(high)
        if len(draws) == 7:  # in the second method's second training run
            os.kill(os.getpid(), signal.SIGINT)
        return integers(self, high)

    with monkeypatch.context() as patch:
        patch.setattr(SampleDraws, "integers", interrupted)
        stopped = call(*arguments)
    assert stopped.exit_code == EXIT_INTERRUPTED, stopped.output
    assert "the same command goes on" in stopped.stderr
    states = [file.name for file in (data_folder / "states").iterdir() if file.name.startswith("stopped")]
    assert len(states) == 2

    result = call(*arguments)
    assert result.exit_code == 0, result.output
    assert not [file for file in (data_folder / "states").iterdir() if file.name.startswith("stopped")]
    whole = call(*[("whole" if part == "stopped" else part) for part in arguments])
    assert whole.exit_code == 0, whole.output
    runs = [load_results(name)["runs"] for name in ("stopped", "whole")]
    for run, other in zip(*runs, strict=True):
        assert {k: v for k, v in run.items() if k != "seconds"} == {
            k: v for k, v in other.items() if k != "seconds"
        }
    for method in ("vpt-deep", "full"):
        one, other = (
            load_file(data_folder / "tasks" / name / f"{method}.safetensors") for name in ("stopped", "whole")
        )
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("place", "error", "exit_code"),
    [
        ("lecture26.studies.adaptation.accuracy", KeyboardInterrupt, EXIT_INTERRUPTED),
        ("lecture26.commands.adapt.save_results", OSError, EXIT_USER_ERROR),
    ],
)
def test_nothing_is_lost_before_it_is_stored(data_folder, lesions, monkeypatch, place, error, exit_code):
    """Stopped while it measures, or unable to write the results, it trains nothing again."""
    name = f"kept_{error.__name__}"
    arguments = ["adapt", "--backbone", "tiny_vit", "--data", lesions, "--name", name, *QUICK]

    def fail(*arguments):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(place, fail)
        assert call(*arguments).exit_code == exit_code
    with monkeypatch.context() as patch:
        patch.setattr(SampleDraws, "integers", lambda self, high: pytest.fail("trained again"))
        result = call(*arguments)
    assert result.exit_code == 0, result.output
    assert not list((data_folder / "states").glob(f"{name}*"))


@pytest.mark.slow
def test_two_processes_adapt_as_one_does_with_the_doubled_batch(data_folder, lesions):
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch was built without gloo")
    arguments = ["--backbone", "tiny_vit", "--data", str(lesions), "--method", "full", "--steps", "3"]
    arguments += ["--learning-rate", "0.01", "--learning-rate", "0.03", "--precision", "fp32"]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two += ["-m", "lecture26", "adapt", *arguments, "--batch-size", "2", "--name", "by_two"]
    subprocess.run(two, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=1800)
    assert call("adapt", *arguments, "--batch-size", "4", "--name", "by_one").exit_code == 0
    stored = {name: load_results(name) for name in ("by_one", "by_two")}
    assert stored["by_two"]["command"].startswith("torchrun --nproc-per-node 2 -m lecture26 adapt")
    one, other = (
        load_file(data_folder / "tasks" / name / "full.safetensors") for name in ("by_one", "by_two")
    )
    for key, weight in one.items():
        agree(other[key], weight, 1e-3)  # Adam turns rounding of tiny gradients into steps; one is 0.03 long


def test_results_are_spared_unless_told_otherwise(data_folder, lesions):
    arguments = ["adapt", "--backbone", "tiny_vit", "--data", lesions, "--name", "spared", *QUICK]
    assert call(*arguments).exit_code == 0
    before = (data_folder / "results" / "spared.json").read_bytes()
    refused = call(*arguments, "--prompts", "3")
    assert refused.exit_code == EXIT_USER_ERROR and "results 'spared' exist" in refused.stderr
    assert (data_folder / "results" / "spared.json").read_bytes() == before
    result = call(*arguments, "--prompts", "3", "--replace")
    assert result.exit_code == 0, result.output
    (run,) = load_results("spared")["runs"]
    assert run["num_prompts"] == 3


def test_seeds_give_a_spread(data_folder, lesions):
    arguments = ["adapt", "--backbone", "tiny_vit", "--data", lesions, "--name", "spread", "--seeds", "3"]
    result = call(*arguments, *QUICK)
    assert result.exit_code == 0, result.output
    (run,) = load_results("spread")["runs"]
    assert len(run["accuracy"]) == 3
    assert f"accuracy {statistics.fmean(run['accuracy']):.1%}" in result.stdout


# The command `classify`


@pytest.fixture(scope="module")
def learned(data_folder, lesions):
    """The name of a task that all methods have learned to do without a mistake."""
    options = ["--backbone", "tiny_vit", "--data", lesions, "--name", "learned", "--prompts", "3"]
    for method in METHODS:
        result = call("adapt", *options, "--method", method, "--steps", "40", "--replace")
        assert result.exit_code == 0, result.output
        assert "python -m lecture26 classify --task learned PICTURE" in result.stdout
    return "learned"


def test_results_and_task_files_name_the_classes_in_their_order(data_folder, learned):
    assert load_results(learned)["classes"] == ["benign", "malignant"]
    for method in METHODS:
        about = load_task(data_folder / "tasks" / learned / f"{method}.safetensors").about
        assert about == {
            "backbone": "tiny_vit",
            "pretrained": True,
            "channels": 1,
            "method": method,
            "num_prompts": 3 if method.startswith("vpt") else 0,
            "classes": ["benign", "malignant"],
        }


def by_hand(method, state):
    """What the chapter's functions make of a task's file."""
    vit = recipes.load_model("tiny_vit")
    if method in ("linear", "vpt-shallow", "vpt-deep"):
        model = VPT(vit, 2, state["prompts"].shape[1], deep=len(state["prompts"]) > 1)
        model.load_task_state_dict(state)
    elif method in ("adapter", "lora"):
        model = {"adapter": adapter_tuning, "lora": lora_tuning}[method](vit, 2)
        model.load_state_dict(model.state_dict() | state)
    else:
        model = full_fine_tune(vit, 2)
        model.load_state_dict(vit.state_dict() | state)
    return model.eval()


@pytest.mark.parametrize("method", METHODS)
def test_pictures_are_named_by_every_method(data_folder, lesions, learned, method):
    images = load(lesions, "test", 32)
    pictures = sorted((lesions / "test").glob("*/*.jpeg"))
    result = call("classify", "--task", learned, "--method", method, *pictures)
    assert result.exit_code == 0, result.output

    model = by_hand(method, load_task(data_folder / "tasks" / learned / f"{method}.safetensors"))
    shares = model(images.batch(range(8))["image"].expand(-1, 3, -1, -1)).softmax(dim=1)
    lines = result.stdout.splitlines()
    assert len(lines) == len(pictures) == 8
    for line, picture, share in zip(lines, pictures, shares, strict=True):
        name = picture.parent.name  # the diagnosis
        place, told, probability = line.rsplit(maxsplit=2)
        assert (place, told) == (f"{picture}:", name)
        assert float(probability.rstrip("%")) == pytest.approx(
            100 * share[["benign", "malignant"].index(name)].item(), abs=0.11
        )


def test_a_coloured_picture_is_seen_as_the_training_images_were(lesions, learned, tmp_path):
    """As grey, which these were."""
    grey, colour = tmp_path / "grey.png", tmp_path / "colour.png"
    Image.new("RGB", (40, 52), (250, 30, 90)).save(colour)
    Image.open(colour).convert("L").save(grey)
    result = call("classify", "--task", learned, "--method", "full", grey, colour)
    one, other = (line.partition(": ")[2] for line in result.stdout.splitlines())
    assert one == other


def test_unreadable_pictures_are_told_and_the_others_named(lesions, learned, tmp_path):
    (tmp_path / "damaged.png").write_bytes(b"no picture")
    good = lesions / "test" / "benign" / "0.jpeg"
    pictures = [tmp_path / "damaged.png", good, tmp_path / "missing.png", tmp_path]
    result = call("classify", "--task", learned, "--method", "full", *pictures)
    assert result.exit_code == EXIT_USER_ERROR
    assert re.fullmatch(rf"{re.escape(str(good))}: benign \d+\.\d%\n", result.stdout)
    errors = result.stderr.splitlines()
    assert len(errors) == 3 and all(line.startswith("error: ") for line in errors)
    for line, picture in zip(errors, (pictures[0], *pictures[2:]), strict=True):
        assert f"{picture} is not a readable image" in line and "training" not in line


def copied_task(data_folder, name, learned_by="vpt-deep", **changes):
    """A copy of the task 'learned' that says something else of itself; None leaves that out."""
    state = load_task(data_folder / "tasks" / "learned" / f"{learned_by}.safetensors")
    about = state.about | changes
    state.about = {key: value for key, value in about.items() if value is not None}
    save_task(data_folder / "tasks" / name / f"{learned_by}.safetensors", state)


def refusal(*arguments):
    """The one line in which `classify` says why it names nothing."""
    result = call("classify", *arguments, "picture.png")
    assert result.exit_code == EXIT_USER_ERROR, result.output
    assert isinstance(result.exception, SystemExit) and result.stdout == ""
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_a_task_that_is_not_there_is_refused(learned):
    told = refusal("--task", "absent")
    assert re.search(r"there is no task 'absent' in .*tasks \(present: .*learned.*\): learn one with", told)
    assert "name must be made of letters" in refusal("--task", "../tasks/learned")
    several = refusal("--task", learned)
    assert "learned by adapter, bias, full, linear, lora, vpt-deep, vpt-shallow: choose one" in several
    assert "vpt-shallow; got --method prefix" in refusal("--task", learned, "--method", "prefix")


def test_a_task_without_its_backbone_is_refused(data_folder, learned):
    copied_task(data_folder, "homeless", backbone="no_vit")
    assert re.search(
        "backbone of the task 'homeless' is missing: .*got 'no_vit'", refusal("--task", "homeless")
    )
    for method in ("vpt-deep", "full"):
        copied_task(data_folder, f"stray_{method}", method, backbone="other_vit")
        told = refusal("--task", f"stray_{method}")
        assert "learned on other weights than those that 'other_vit' has now" in told
    copied_task(data_folder, "random", pretrained=False)
    assert "learned on random weights of 'tiny_vit', which are not kept" in refusal("--task", "random")


def test_a_task_of_before_which_has_no_names_is_refused(data_folder, learned):
    copied_task(data_folder, "nameless", classes=None)
    told = refusal("--task", "nameless")
    assert "does not say what its classes are called" in told
    assert "learn it again with `python -m lecture26 adapt ... --name nameless --replace`" in told
    folder = data_folder / "tasks" / "plain"
    folder.mkdir()
    save_file({"head.weight": torch.zeros(2, 8)}, folder / "full.safetensors")  # as `full` was kept before
    assert "format is not 'lecture26 task', or from an earlier version" in refusal("--task", "plain")


def test_a_task_that_does_not_fit_is_refused(data_folder, learned):
    copied_task(data_folder, "misfit", "full", method="bias")
    assert "state must have what the method 'bias' trains" in refusal("--task", "misfit")
    copied_task(data_folder, "unknown", method="prefix")
    assert "method must be one of" in refusal("--task", "unknown")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--data"),
        (["--data", "nothing"], "got 'nothing'"),
        (["--data", "no/such/folder"], "there is no folder no/such/folder"),
        (["--data", "~nouser/photos"], "there is no home folder for '~nouser/photos'"),
        (["--data", "shapes"], "images must have classes"),
        (["--data", "digits", "--backbone", "nothing"], "backbone must be a model of timm or a checkpoint"),
        (["--data", "digits", "--backbone", "resnet18", "--random-weights"], "cannot be prompted.*ResNet"),
        (["--data", "digits", "--backbone", "a_reader"], "the checkpoint 'a_reader' is none"),
        (["--data", "digits", "--random-weights"], "random weights are for backbones of timm; .*'tiny_vit'"),
        (["--data", "digits", "--method", "prefix"], "--method"),
        (["--data", "digits", "--prompts", "0"], "--prompts"),
        (["--data", "digits", "--steps", "0"], "--steps"),
        (["--data", "digits", "--seeds", "0"], "--seeds"),
        (["--data", "digits", "--learning-rate", "-1"], "learning_rate must be above 0; got -1"),
        (["--data", "digits", "--precision", "fp8"], "--precision"),
        (["--data", "digits", "--name", "../tiny"], "got '../tiny'"),
    ],
)
def test_wrong_input_ends_in_one_clear_line(data_folder, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    backbone = [] if "--backbone" in options else ["--backbone", "tiny_vit"]
    before = sorted(data_folder.rglob("*"))
    result = call("adapt", *backbone, "--steps", "2", *options)
    assert result.exit_code == EXIT_USER_ERROR, result.output
    assert isinstance(result.exception, SystemExit)
    last = result.stderr.splitlines()[-1]
    assert re.search(message, last), last
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []
    left = [path for path in sorted(data_folder.rglob("*")) if path not in before and path.is_file()]
    assert left == []
