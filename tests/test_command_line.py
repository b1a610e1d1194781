"""The command line: what each command does, and what it says to wrong input."""

import dataclasses
import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensors import perturbed
from typer.testing import CliRunner

from lecture26 import recipes
from lecture26.__main__ import EXIT_INTERRUPTED, EXIT_NOBODY_READS, EXIT_USER_ERROR, LARGEST_SEED, app
from lecture26.kit.checkpoints import checkpoint_files, save_checkpoint
from lecture26.recipes import ddpm

TRAIN = ["train", "tiny_recipe", "--batch-size", "2"]


@pytest.fixture(autouse=True, scope="module")
def tiny_recipe():
    """A recipe whose training takes a moment."""
    network = {"base_channels": 8, "channel_multipliers": (1,), "attention_levels": (), "patch_size": 4}
    recipe = dataclasses.replace(
        recipes.find_recipe("ddpm"),
        name="tiny_recipe",
        data="shapes",
        model=network,
        steps=4,
        precision="fp32",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(recipes.recipe.RECIPES, recipe.name, recipe)
        yield


def call(*arguments):
    """Run a command in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="python -m lecture26")


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    """A data folder with one checkpoint, 'tiny', hardly trained."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LECTURE26_DATA", str(folder))
        result = call(*TRAIN, "--name", "tiny", "--steps", "2", "--learning-rate", "0.001")
        assert result.exit_code == 0, result.output
        yield folder


@pytest.fixture
def card(data_folder):
    return json.loads((data_folder / "checkpoints" / "tiny.json").read_text())


def test_training_makes_a_checkpoint_with_its_command(data_folder, card):
    assert sorted(file.name for file in (data_folder / "checkpoints").iterdir()) == [
        "tiny.json",
        "tiny.safetensors",
    ]
    assert list((data_folder / "states").iterdir()) == []
    assert card["command"] == (
        "python -m lecture26 train tiny_recipe --name tiny --steps 2 --batch-size 2 --learning-rate 0.001"
    )
    assert card["steps"] == 2
    assert card["settings"]["data"] == "shapes"
    assert math.isfinite(card["metrics"]["test_loss"])
    assert card["loss_curve"]["step"] == [1, 2]


def test_milestone_says_at_once_that_its_picture_cannot_be_written(tmp_path):
    refused = call("milestone", "ddpm", "--out", tmp_path / "picture.txt")
    assert refused.exit_code == EXIT_USER_ERROR
    assert "--out must end in .png" in refused.stderr


def test_training_spares_a_checkpoint_unless_told_otherwise(data_folder, card):
    refused = call(*TRAIN, "--name", "tiny", "--seed", "1")
    assert refused.exit_code == EXIT_USER_ERROR
    assert "'tiny' exists" in refused.stderr
    kept = json.loads((data_folder / "checkpoints" / "tiny.json").read_text())
    assert kept["sha256"] == card["sha256"]

    for options in (["--seed", "1"], ["--seed", "2", "--replace"]):
        result = call(*TRAIN, "--name", "other", *options)
        assert result.exit_code == 0, result.output
    assert json.loads((data_folder / "checkpoints" / "other.json").read_text())["settings"]["seed"] == 2


def test_interrupted_training_goes_on(data_folder, monkeypatch):
    arguments = [*TRAIN, "--name", "stopped"]
    draw = ddpm.DDPM.draw

    def interrupted_draw(*draw_arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return draw(*draw_arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ddpm.DDPM, "draw", interrupted_draw)
        stopped = call(*arguments)
    assert stopped.exit_code == EXIT_INTERRUPTED
    assert "the same command goes on" in stopped.stderr
    state = data_folder / "states" / "stopped.pt"
    assert state.exists()

    other_settings = call(*arguments, "--learning-rate", "0.5")
    assert other_settings.exit_code == EXIT_USER_ERROR
    assert "with other settings: learning_rate was 0.001 and is now 0.5. " in other_settings.stderr

    weights = data_folder / "checkpoints" / "stopped.safetensors"
    weights.touch()  # as if stopped between weights and card
    assert call(*arguments).exit_code == 0
    assert weights.stat().st_size and not state.exists()
    assert json.loads((data_folder / "checkpoints" / "stopped.json").read_text())["steps"] == 4


def test_training_does_not_go_on_with_other_images(data_folder, tmp_path, monkeypatch):
    for number in range(6):
        file = tmp_path / ("test" if number < 2 else "train") / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        Image.new("L", (16, 16), 40 * number).save(file)
    arguments = [*TRAIN, "--data", tmp_path, "--image-size", "16", "--name", "grown"]
    with monkeypatch.context() as patch:
        patch.setattr(ddpm.DDPM, "loss", lambda self, network, batch: network.head.weight.sum())
        patch.setattr(ddpm.DDPM, "draw", lambda *_: os.kill(os.getpid(), signal.SIGINT) or {})
        assert call(*arguments).exit_code == EXIT_INTERRUPTED
    Image.new("L", (16, 16)).save(tmp_path / "train" / "more.png")
    grown = call(*arguments)
    assert grown.exit_code == EXIT_USER_ERROR
    assert "with other settings: images was 4 and is now 5. " in grown.stderr
    (data_folder / "states" / "grown.pt").unlink()


def test_the_card_says_in_which_precision_it_was_trained(data_folder):
    result = call(*TRAIN, "--name", "open", "--precision", "auto")
    assert result.exit_code == 0, result.output
    precision = json.loads((data_folder / "checkpoints" / "open.json").read_text())["settings"]["precision"]
    assert precision in ("fp32", "bf16")
    assert f"precision: {precision} (" in result.stderr


def test_the_second_of_two_trainings_of_one_name_is_refused(data_folder):
    lock = data_folder / "states" / "twice.lock"
    hold = "import sys; from lecture26.kit.files import locked\n"
    hold += "with locked(sys.argv[1], ''): print(flush=True), input()"
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", hold, str(lock)], **options) as other:
        other.stdout.readline()
        refused = call(*TRAIN, "--name", "twice")
        other.kill()  # which leaves the file, and not the lock
    assert refused.exit_code == EXIT_USER_ERROR
    assert "'twice' is being made by another process: wait for it, or choose another name" in refused.stderr
    assert lock.exists()
    assert call(*TRAIN, "--name", "twice").exit_code == 0
    assert not lock.exists()


def test_damaged_images_are_named_before_training(data_folder, tmp_path, monkeypatch):
    noise = torch.randint(256, (60, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for split in ("train", "val", "test"):
        for number in range(4):
            file = tmp_path / split / f"{number}.png"
            file.parent.mkdir(exist_ok=True)
            Image.fromarray(noise.numpy()).save(file)
    for number in (1, 3):
        file = tmp_path / "train" / f"{number}.png"
        file.write_bytes(file.read_bytes()[:2000])
    monkeypatch.setattr(ddpm.DDPM, "draw", lambda *arguments: pytest.fail("training began"))
    arguments = [*TRAIN, "--data", tmp_path, "--image-size", "16", "--name", "damaged"]
    result = call(*arguments)
    assert result.exit_code == EXIT_USER_ERROR
    assert "2 of 4 files are not readable images: " in result.stderr
    assert "1.png" in result.stderr and "3.png" in result.stderr
    assert list((data_folder / "states").iterdir()) == []


def test_training_on_a_folder_of_images(data_folder, tmp_path):
    for split in ("train", "test"):
        for number in range(3):
            file = tmp_path / split / "a class" / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (20, 24), 80 * number).save(file)
    result = call(*TRAIN, "--data", tmp_path, "--image-size", "16", "--name", "grey")
    assert result.exit_code == 0, result.output
    settings = json.loads((data_folder / "checkpoints" / "grey.json").read_text())["settings"]
    assert (settings["channels"], settings["image_size"]) == (1, 16)

    result = call("sample", "--model", "grey", "--count", "1", "--steps", "2", "--out", tmp_path / "grid.png")
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "grid.png").size == (16, 16)


def test_folder_without_unseen_images_is_refused_before_training(data_folder, tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    Image.new("L", (16, 16)).save(tmp_path / "train" / "0.png")
    result = call(*TRAIN, "--data", tmp_path, "--image-size", "16", "--name", "unseen")
    assert result.exit_code == EXIT_USER_ERROR
    assert "no images for the split 'test'" in result.stderr
    assert not (data_folder / "states" / "unseen.pt").exists()


@pytest.mark.parametrize("options", [[], ["--eta", "0.5"], ["--sampler", "ddpm"]])
def test_samples_are_a_grid_decided_by_the_seed(data_folder, tmp_path, options):
    def grid(name, seed):
        out = tmp_path / f"{name}.png"
        arguments = ["--model", "tiny", "--steps", "2", "--count", "5", "--seed", seed, "--out", out]
        result = call("sample", *arguments, *options)
        assert result.exit_code == 0, result.output
        return Image.open(out)

    first = grid("first", 0)
    assert first.size == (3 * 34 + 2, 2 * 34 + 2)  # 3 x 2 places of 32 pixels, 2 pixels between them
    assert first.tobytes() == grid("again", 0).tobytes()
    assert first.tobytes() != grid("other", 1).tobytes()


@pytest.fixture
def tiny_classifier(data_folder, monkeypatch):
    """A noisy classifier of the images of 'tiny', hardly trained; gone after the test."""
    monkeypatch.setattr(recipes.classifiers, "EVALUATION_IMAGES", 2)
    network = {"base_channels": 8, "channel_multipliers": (1,), "attention_levels": (), "patch_size": 4}
    recipe = dataclasses.replace(
        recipes.find_recipe("noisy_classifier_shapes32"),
        name="tiny_classifier",
        model=network,
        steps=1,
        batch_size=2,
        precision="fp32",
    )
    recipes.run(recipe, "a command")
    yield
    for file in checkpoint_files("tiny_classifier"):
        file.unlink()


def test_samples_are_guided_by_the_classifier_of_their_images(data_folder, tiny_classifier, tmp_path):
    def grid(name, *options):
        out = tmp_path / f"{name}.png"
        result = call("sample", "--model", "tiny", "--steps", "3", "--count", "2", "--out", out, *options)
        assert result.exit_code == 0, result.output
        return Image.open(out).tobytes(), result.stdout

    def guided(name, wish, *options):
        return grid(name, "--guidance", "classifier", "--class", wish, *options)

    red, told = guided("red", "red star", "--scale", "50")
    assert "red star by classifier guidance at scale 50" in told
    assert red == guided("again", "Star, RED!", "--scale", "50")[0]
    assert red != guided("blue", "blue star", "--scale", "50")[0]
    assert red != grid("unguided")[0]
    assert guided("zero", "red star", "--scale", "0")[0] == grid("unguided")[0]


def test_a_checkpoint_of_another_version_is_in_nobodys_way(data_folder, tiny_classifier, tmp_path):
    for file in checkpoint_files("tiny_classifier"):
        shutil.copy(file, file.with_stem("a_stranger"))
    _, stranger = checkpoint_files("a_stranger")
    card = json.loads(stranger.read_text()) | {"name": "a_stranger"}
    try:
        for foreign in ({"settings": card["settings"] | {"unheard_of": 1}}, {"recipe": "unheard_of"}):
            stranger.write_text(json.dumps(card | foreign))
            arguments = ["--model", "tiny", "--steps", "2", "--count", "1", "--out", tmp_path / "grid.png"]
            guided = call("sample", *arguments, "--guidance", "classifier", "--class", "red star")
            assert guided.exit_code == 0, guided.output
            refused = call("evaluate", "a_stranger")
            assert refused.exit_code == EXIT_USER_ERROR
            assert "'a_stranger' was made by another version of the course" in refused.stderr
        stranger.write_text("{}")
        listed = call("checkpoints")
        assert "tiny: " in listed.stdout and f"error: {stranger} is damaged" in listed.stderr
    finally:
        for file in checkpoint_files("a_stranger"):
            file.unlink()


def cards_read(monkeypatch, *arguments):
    """The names of the checkpoints whose cards a command reads, as often as it reads them."""
    read, read_text = [], Path.read_text

    def counted(file, *arguments, **options):
        if file.suffix == ".json" and file.parent.name == "checkpoints":
            read.append(file.stem)
        return read_text(file, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", counted)
        result = call(*arguments)
    assert result.exit_code == 0, result.output
    return read


def test_a_card_is_read_once(data_folder, tiny_classifier, tiny_clip, tmp_path, monkeypatch):
    sample = ["sample", "--steps", "2", "--count", "1", "--out", tmp_path / "grid.png", "--model", "tiny"]
    assert cards_read(monkeypatch, *sample) == ["tiny"]
    for guidance, option, asked in (
        ("classifier", "--class", "red star"),
        ("clip", "--prompt", "a red star"),
    ):
        read = cards_read(monkeypatch, *sample, "--guidance", guidance, option, asked)
        assert {"tiny", f"tiny_{guidance}"} <= set(read) and len(read) == len(set(read))
    assert cards_read(monkeypatch, "evaluate", "tiny") == ["tiny"]


def test_guidance_without_a_classifier_for_the_model_is_refused(data_folder, tmp_path):
    out = tmp_path / "grid.png"
    result = call(
        "sample", "--model", "tiny", "--out", out, "--guidance", "classifier", "--class", "red star"
    )
    assert result.exit_code == EXIT_USER_ERROR
    assert "needs a noisy classifier of the images and steps of 'tiny'" in result.stderr


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ("red stra", r"known words \(shape: circle, .*colour: red, .*got 'stra'"),
        ("red", r"must name a shape \(circle, .*got 'red'"),
        ("red blue star", "must name one colour; got two in 'red blue star'"),
        ("", r"must name a shape \(circle, .*got ''"),
    ],
)
def test_a_class_that_is_none_is_refused(data_folder, tiny_classifier, tmp_path, wish, message):
    out = tmp_path / "grid.png"
    result = call("sample", "--model", "tiny", "--out", out, "--guidance", "classifier", "--class", wish)
    assert result.exit_code == EXIT_USER_ERROR
    assert re.search(message, result.stderr)
    assert not out.exists()


@pytest.fixture
def tiny_clip(data_folder, monkeypatch):
    """A noise-aware CLIP of the images of 'tiny', hardly trained; gone after the test."""
    monkeypatch.setattr(recipes.clip, "EVALUATION_STEPS", (500,))
    monkeypatch.setattr(recipes.clip, "NUM_GROUPS", 1)
    image = {"base_channels": 8, "channel_multipliers": (1,), "attention_levels": (), "patch_size": 4}
    recipe = dataclasses.replace(
        recipes.find_recipe("noisy_clip_shapes32"),
        name="tiny_clip",
        model={"image": image, "text": {"width": 8, "depth": 1}},
        steps=1,
        batch_size=2,
        precision="fp32",
    )
    recipes.run(recipe, "a command")
    yield
    for file in checkpoint_files("tiny_clip"):
        file.unlink()


def test_samples_are_guided_by_the_clip_of_their_images(data_folder, tiny_clip, tmp_path):
    def grid(name, *options):
        out = tmp_path / f"{name}.png"
        result = call("sample", "--model", "tiny", "--steps", "3", "--count", "2", "--out", out, *options)
        assert result.exit_code == 0, result.output
        return Image.open(out).tobytes(), result.stdout

    def guided(name, prompt, *options):
        return grid(name, "--guidance", "clip", "--prompt", prompt, *options)

    red, told = guided("red", "a red star", "--scale", "500")
    assert "a red star by clip guidance at scale 500" in told
    assert red != guided("blue", "a blue star", "--scale", "500")[0]
    assert guided("zero", "a red star", "--scale", "0")[0] == grid("unguided")[0]

    out = tmp_path / "none.png"
    result = call("sample", "--model", "tiny", "--out", out, "--guidance", "clip", "--prompt", "a red stra")
    assert result.exit_code == EXIT_USER_ERROR
    assert re.search(
        "unknown word 'stra' in 'a red stra'; the words are: a, background, .*star", result.stderr
    )
    assert not out.exists()


def test_guidance_without_a_clip_for_the_model_is_refused(data_folder, tmp_path):
    out = tmp_path / "grid.png"
    result = call("sample", "--model", "tiny", "--out", out, "--guidance", "clip", "--prompt", "a red star")
    assert result.exit_code == EXIT_USER_ERROR
    assert "needs a noise-aware CLIP of the images and steps of 'tiny'" in result.stderr


@pytest.fixture
def tiny_conditional(data_folder):
    """A conditional denoiser with the weights of 'tiny', hardly trained; gone after the test."""
    network = {"base_channels": 8, "channel_multipliers": (1,), "attention_levels": (), "patch_size": 4}
    recipe = dataclasses.replace(
        recipes.find_recipe("conditional_ddpm_shapes32"),
        name="tiny_conditional",
        model=network,
        start="tiny",
        steps=3,
        batch_size=4,
        learning_rate=0.1,
        precision="fp32",
    )
    recipes.run(recipe, "a command")
    yield
    for file in checkpoint_files("tiny_conditional"):
        file.unlink()


def test_samples_are_guided_without_a_classifier(data_folder, tiny_conditional, tmp_path):
    def grid(name, *options, wish="red star"):
        out = tmp_path / f"{name}.png"
        arguments = ["--model", "tiny_conditional", "--steps", "3", "--count", "2", "--out", out]
        result = call("sample", *arguments, "--guidance", "cfg", "--class", wish, *options)
        assert result.exit_code == 0, result.output
        return Image.open(out).tobytes(), result.stdout

    red, told = grid("red", "--w", "30")
    assert "red star by classifier-free guidance at w = 30" in told
    assert red == grid("again", "--w", "30", wish="star, RED")[0]
    assert red != grid("blue", "--w", "30", wish="blue star")[0]
    assert grid("nothing", "--w", "-1")[0] == grid("nothing_else", "--w", "-1", wish="blue ring")[0]
    assert "at w = 1," in grid("default")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "'tiny_conditional' was trained with labels: it draws with --guidance cfg --class"),
        (["--guidance", "classifier", "--class", "red star"], "it draws with --guidance cfg --class"),
        (["--guidance", "cfg", "--class", "red stra"], "the class must be made of known words"),
        (["--guidance", "cfg", "--class", "red"], "the class must name a shape"),
    ],
)
def test_a_conditional_denoiser_wants_a_class(data_folder, tiny_conditional, tmp_path, arguments, message):
    out = tmp_path / "grid.png"
    result = call("sample", "--model", "tiny_conditional", "--out", out, *arguments)
    assert result.exit_code == EXIT_USER_ERROR
    assert message in result.stderr
    assert not out.exists()


@pytest.fixture
def tiny_text(data_folder, monkeypatch):
    """A text-to-image model 'tiny_text' and its VAE, of random weights, in place of the course's own."""
    vae = dataclasses.replace(
        recipes.find_recipe("vae_shapes64"), model={"base_channels": 8, "num_blocks": 1}
    )
    recipe = dataclasses.replace(
        recipes.find_recipe("text_to_image_shapes64"),
        vae="tiny_vae",
        model={"base_channels": 8, "channel_multipliers": (1, 2), "num_blocks": 1},
        text={"width": 8, "depth": 1},
    )
    for name, made in (("tiny_vae", vae), ("tiny_text", recipe)):
        made = made.fitted_to(made.load_images("test"))
        card = {"recipe": made.family, "settings": made.settings(), "command": "", "data": "", "steps": 0}
        card |= {"seconds": 0, "metrics": {"latent_scale": 1.2}}
        save_checkpoint(name, perturbed(made.build(), torch.float32).state_dict(), card)
    monkeypatch.setattr("lecture26.commands.steering.TEXT_MODEL", "tiny_text")
    yield
    for name in ("tiny_vae", "tiny_text"):
        for file in checkpoint_files(name):
            file.unlink()


def test_the_cards_of_text_to_image_are_read_once(data_folder, tiny_text, tmp_path, monkeypatch):
    options = ["--steps", "2", "--count", "1", "--out", tmp_path / "grid.png"]
    assert cards_read(monkeypatch, "sample", "--prompt", "a star", *options) == ["tiny_text", "tiny_vae"]


def test_a_prompt_alone_draws_with_the_text_to_image_model(data_folder, tiny_text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def grid(prompt, *options, out="samples.png"):
        result = call("sample", "--prompt", prompt, "--steps", "3", "--count", "2", *options)
        assert result.exit_code == 0, result.output
        return Image.open(out).tobytes(), result.stdout

    star, told = grid("a large yellow star on a striped background")
    assert "2 images of tiny_text, a large yellow star on a striped background at w = 2, 3 ddim" in told
    assert Image.open("samples.png").size == (2 * 66 + 2, 66 + 2)
    assert star == grid("a large YELLOW star on a striped background", "--w", "2")[0]
    assert star == grid("A large, yellow star on a striped background.")[0]
    assert star == grid("a large yellow star on a striped background", "--model", "tiny_text")[0]
    for other in (
        grid("a large yellow ring on a striped background"),
        grid("a large yellow star on a striped background", "--w", "3"),
        grid("a large yellow star on a striped background", "--seed", "1"),
        grid("a large yellow star on a striped background", "--out", "other.png", out="other.png"),
    ):
        assert (other[0] == star) == ("other.png" in other[1])
    assert grid("a star", "--w", "-1")[0] == grid("a ring", "--w", "-1")[0]


def first_tiles(file, count, size, wanted):
    """The first images of a square grid of `count`, (wanted, C, size, size) int."""
    picture = torch.from_numpy(np.array(Image.open(file))).int()  # (H, W, C)
    columns = math.ceil(math.sqrt(count))
    corners = [(2 + n // columns * (size + 2), 2 + n % columns * (size + 2)) for n in range(wanted)]
    return torch.stack([picture[row : row + size, column : column + size] for row, column in corners])


DDPM, RANDOM_DDIM = ["--sampler", "ddpm"], ["--eta", "0.7"]
BY_CLASSIFIER = ["--model", "tiny", "--guidance", "classifier", "--class", "red star", "--scale", "20"]
BY_CLIP = ["--model", "tiny", "--guidance", "clip", "--prompt", "a red star"]
BY_ITSELF = ["--model", "tiny_conditional", "--guidance", "cfg", "--class", "red star"]


@pytest.mark.parametrize(
    "options",
    [
        ["--model", "tiny"],
        ["--model", "tiny", *DDPM],
        ["--model", "tiny", *RANDOM_DDIM],
        [*BY_CLASSIFIER, *DDPM],
        [*BY_CLIP, *RANDOM_DDIM],
        [*BY_ITSELF, *DDPM],
        ["--prompt", "a red star"],
    ],
    ids=" ".join,
)
def test_the_first_images_are_the_same_at_any_count(
    data_folder, tiny_classifier, tiny_clip, tiny_conditional, tiny_text, tmp_path, options
):
    size = 64 if options[0] == "--prompt" else 32

    def first(count, seed=3):
        out = tmp_path / f"{count}.png"
        result = call("sample", *options, "--count", count, "--steps", 4, "--seed", seed, "--out", out)
        assert result.exit_code == 0, result.output
        return first_tiles(out, count, size, wanted=2)

    few, many, other = first(2), first(6), first(2, seed=4)
    assert (few - many).abs().max() <= 2  # levels of 255: layers round otherwise in other batches
    assert (few - other).abs().max() > 50 and (few[0] - few[1]).abs().max() > 50


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (["--prompt", "a red star", "--w", "1e30"], "bring --w nearer to 2; it was 1e+30"),
        (["--prompt", "a red star", "--w", "-1e39"], "bring --w nearer to 2; it was -1e+39"),
        ([*BY_ITSELF, "--w", "1e39"], "bring --w nearer to 1; it was 1e+39"),
    ],
)
def test_what_is_not_finite_is_no_picture(
    data_folder, tiny_conditional, tiny_text, tmp_path, options, advice
):
    out = tmp_path / "grid.png"
    out.write_text("an older picture")
    result = call("sample", *options, "--steps", "4", "--count", "2", "--out", out)
    assert result.exit_code == EXIT_USER_ERROR, result.output
    assert f"2 of 2 images are not finite, so that nothing was written: {advice}" in result.stderr
    assert result.stderr.count("\n") == 1 and result.stdout == ""
    assert [file.name for file in tmp_path.iterdir()] == ["grid.png"]
    assert out.read_text() == "an older picture"


def test_one_spoilt_image_is_enough(data_folder, tmp_path, monkeypatch):
    images = torch.zeros(3, 3, 32, 32)
    images[1, 2, 3, 4] = math.nan
    monkeypatch.setattr("lecture26.commands.drawing.sample", lambda *_, **__: images)
    result = call("sample", "--model", "tiny", "--count", "3", "--out", tmp_path / "grid.png")
    assert result.exit_code == EXIT_USER_ERROR
    assert "1 of 3 images are not finite, so that nothing was written: train 'tiny' anew" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a red stra"], "unknown word 'stra' in 'a red stra'; the words are: a, above, "),
        (["--prompt", ""], "--prompt must have words; got ''"),
        (["--prompt", "?!"], "--prompt must have words; got '?!'"),
        (["--prompt", "a " * 30], "a text must have at most 18 words; got 30"),
        (["--prompt", "a star", "--steps", "1001"], "--steps must be at most 1000 for 'tiny_text'; got 1001"),
        (["--prompt", "a star", "--w", "nan"], "w must be a finite number; got nan"),
        (["--prompt", "a star", "--model", "tiny_vae"], "model must be a denoiser; got 'tiny_vae', a vae"),
        (
            ["--model", "tiny_text", "--prompt", "a star", "--guidance", "cfg", "--class", "red star"],
            "--guidance cfg takes --class and not --prompt",
        ),
        (["--model", "tiny_text"], "'tiny_text' draws what words say: give it --prompt, and no --guidance"),
        (
            ["--model", "tiny_text", "--guidance", "clip", "--prompt", "a star"],
            "give it --prompt, and no --guidance",
        ),
    ],
)
def test_a_wrong_prompt_ends_in_one_clear_line(
    data_folder, tiny_text, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    result = call("sample", *arguments)
    assert result.exit_code == EXIT_USER_ERROR, result.output
    assert message in result.stderr.splitlines()[-1]
    assert result.stdout == "" and list(tmp_path.iterdir()) == []


def test_text_to_image_of_images_without_captions_is_refused(data_folder):
    result = call("train", "text_to_image_shapes64", "--data", "digits", "--name", "speechless")
    assert result.exit_code == EXIT_USER_ERROR
    assert "data must be 'shapes_and_scenes', which has captions; got 'digits'" in result.stderr


def test_text_to_image_without_its_vae_is_refused_before_anything_else(data_folder):
    result = call("train", "text_to_image_shapes64", "--name", "bodyless")
    assert result.exit_code == EXIT_USER_ERROR
    assert "there is no checkpoint 'vae_shapes64'" in result.stderr


def test_a_start_that_does_not_fit_is_refused_in_one_line(data_folder, monkeypatch):
    recipe = dataclasses.replace(recipes.find_recipe("tiny_recipe"), name="tiny_started", start="tiny")
    monkeypatch.setitem(recipes.recipe.RECIPES, "tiny_started", recipe)
    result = call("train", "tiny_started", "--data", "digits", "--batch-size", "2")
    assert result.exit_code == EXIT_USER_ERROR
    assert "start must be a checkpoint whose weights all fit the network; 'tiny' has " in result.stderr


def test_clip_of_images_without_captions_is_refused(data_folder):
    result = call("train", "clip_shapes32", "--data", "digits", "--name", "speechless")
    assert result.exit_code == EXIT_USER_ERROR
    assert "data must be 'shapes', whose images have captions; got 'digits'" in result.stderr


def test_evaluation_agrees_with_the_card(data_folder, card):
    result = call("evaluate", "tiny")
    assert result.exit_code == 0, result.output
    # The card's numbers were measured before the weights went to half precision.
    assert json.loads(result.stdout) == pytest.approx(card["metrics"], rel=1e-3)


def test_checkpoints_are_listed_with_their_cards(data_folder, card):
    listed = call("checkpoints")
    assert listed.exit_code == 0, listed.output
    assert [line for line in listed.stdout.splitlines() if line.startswith("tiny: ")]
    whole = call("checkpoints", "tiny")
    assert whole.exit_code == 0, whole.output
    assert json.loads(whole.stdout) == card


SAMPLE = ["sample", "--model", "tiny", "--out", "grid.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nothing"], "recipe must be one of 'clean_classifier_shapes32', 'clip_shapes32', 'cond"),
        (["train", "ddpm", "--name", "../tiny"], "got '../tiny'"),
        (["train", "ddpm", "--data", "nothing"], "'nothing'"),
        (["train", "ddpm", "--data", "no/such/folder"], "no/such/folder"),
        (["train", "ddpm", "--steps", "0"], "--steps"),
        (["train", "ddpm", "--learning-rate", "-1"], "learning_rate must be above 0; got -1"),
        (["train", "ddpm", "--precision", "fp8"], "--precision"),
        (
            ["train", "ddpm", "--data", "digits", "--image-size", "30"],
            "a multiple of 8 for the network",
        ),
        (["evaluate", "nothing"], "there is no checkpoint 'nothing'"),
        (["checkpoints", "nothing"], "there is no checkpoint 'nothing'"),
        (["sample", "--out", "grid.png"], "--model is missing; only --prompt without --guidance has one"),
        ([*SAMPLE, "--model", "nothing"], "present: "),
        ([*SAMPLE, "--steps", "1001"], "--steps must be at most 1000 for 'tiny'; got 1001"),
        ([*SAMPLE, "--steps", "1"], "--steps"),
        ([*SAMPLE, "--count", "0"], "--count"),
        ([*SAMPLE, "--seed", "-1"], "--seed"),
        ([*SAMPLE, "--seed", str(2**64)], "18446744073709551615"),
        ([*TRAIN, "--seed", "-1"], "--seed"),
        ([*TRAIN, "--seed", str(2**64)], "18446744073709551615"),
        ([*TRAIN, "--data", "~nouser/photos"], "there is no home folder for '~nouser/photos'"),
        ([*SAMPLE, "--out", "~nouser/grid.png"], "there is no home folder for '~nouser/grid.png'"),
        ([*SAMPLE, "--sampler", "euler"], "--sampler"),
        ([*SAMPLE, "--eta", "1.5"], "--eta"),
        ([*SAMPLE, "--eta", "0.5", "--sampler", "ddpm"], "--eta is for --sampler ddim"),
        ([*SAMPLE, "--class", "red star"], "--class and --scale are for --guidance; it is missing"),
        ([*SAMPLE, "--scale", "2"], "--class and --scale are for --guidance; it is missing"),
        ([*SAMPLE, "--scale", "nan"], "--scale must be a finite number; got nan"),
        ([*SAMPLE, "--w", "inf"], "--w must be a finite number; got inf"),
        ([*SAMPLE, "--prompt", "a", "--class", "b"], "--class and --scale are for --guidance; it is missing"),
        ([*SAMPLE, "--prompt", "a", "--scale", "2"], "--class and --scale are for --guidance; it is missing"),
        ([*SAMPLE, "--w", "2"], "--w is for --prompt or --guidance cfg; both are missing"),
        (
            [*SAMPLE, "--prompt", "a red star"],
            "--prompt without --guidance needs a text-to-image model; 'tiny' is none",
        ),
        ([*SAMPLE, "--prompt", "a red star", "--sampler", "ddpm"], "draws with --sampler ddim and --eta 0"),
        ([*SAMPLE, "--prompt", "a red star", "--eta", "0.5"], "draws with --sampler ddim and --eta 0"),
        (
            ["sample", "--prompt", "a red star"],
            "there is no checkpoint 'text_to_image_shapes64'",
        ),
        (["sample", "--guidance", "clip", "--prompt", "a red star"], "--model is missing"),
        ([*SAMPLE, "--guidance", "cfg"], "--guidance cfg needs --class"),
        (
            [*SAMPLE, "--guidance", "cfg", "--class", "red star"],
            "needs a denoiser that was trained with labels",
        ),
        ([*SAMPLE, "--guidance", "cfg", "--class", "a", "--scale", "2"], "cfg takes --w and not --scale"),
        (
            [*SAMPLE, "--guidance", "cfg", "--class", "a", "--scale", "2"],
            "w is the scale of other libraries - 1",
        ),
        ([*SAMPLE, "--guidance", "clip", "--prompt", "a", "--w", "2"], "--w is for --guidance cfg"),
        (
            [*SAMPLE, "--guidance", "classifier", "--class", "a", "--prompt", "b"],
            "takes --class and not --prompt: --prompt is for --guidance clip",
        ),
        ([*SAMPLE, "--guidance", "classifier", "--class", "a", "--w", "2"], "takes --scale and not --w"),
        ([*SAMPLE, "--guidance", "classifier"], "--guidance classifier needs --class"),
        ([*SAMPLE, "--guidance", "clip"], "--guidance clip needs --prompt"),
        ([*SAMPLE, "--guidance", "clip", "--prompt", "..."], "--prompt must have words; got '...'"),
        ([*SAMPLE, "--guidance", "clip", "--prompt", "a", "--class", "b"], "--prompt and not --class"),
        ([*SAMPLE, "--guidance", "magic"], "--guidance"),
        ([*SAMPLE, "--out", "grid.txt"], "--out must end in .png"),
        ([*SAMPLE, "--out", "no/such/folder/grid.png"], "--out must be a file"),
    ],
)
def test_wrong_input_ends_in_one_clear_line(data_folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = call(*arguments)
    assert result.exit_code == EXIT_USER_ERROR
    assert message in result.stderr.splitlines()[-1]
    assert result.stdout == ""
    assert isinstance(result.exception, SystemExit)
    assert list(tmp_path.iterdir()) == []


def test_the_largest_seed_is_one(data_folder, tmp_path):
    seed = ["--seed", str(LARGEST_SEED)]
    assert (
        call("sample", "--model", "tiny", "--steps", "2", "--out", tmp_path / "a.png", *seed).exit_code == 0
    )
    assert call(*TRAIN, "--name", "largest_seed", *seed).exit_code == 0


def unwritable(case, folder, monkeypatch):
    """A place where no picture can be written, even by root."""
    out = folder / "grid.png"
    if case == "a folder":
        out.mkdir()
    elif case == "in a file":
        (folder / "file").touch()
        return folder / "file" / "grid.png"
    elif case.startswith("read-only"):  # whatever permissions say
        monkeypatch.setattr("lecture26.kit.files.open", read_only, raising=False)
        if case == "read-only file":
            out.touch()
    return out if case != "nowhere" else folder / "no" / "grid.png"


def read_only(*arguments, **options):
    raise OSError(errno.EROFS, "Read-only file system")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("a folder", "--out must be a file; .*grid.png is a folder"),
        ("nowhere", r"--out must be a file in a folder that exists .*grid.png \(No such file"),
        ("in a file", r"--out must be a file in a folder that exists .*grid.png \(Not a directory"),
        ("read-only place", r"and can be written to; got .*grid.png \(Read-only file system\)"),
        ("read-only file", r"and can be written to; got .*grid.png \(Read-only file system\)"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_before_it_is_drawn(
    data_folder, tmp_path, monkeypatch, case, message
):
    monkeypatch.setattr("lecture26.commands.drawing.sample", lambda *_, **__: pytest.fail("was drawn"))
    result = call(*SAMPLE, "--out", unwritable(case, tmp_path, monkeypatch))
    assert result.exit_code == EXIT_USER_ERROR, result.output
    assert re.search(message, result.stderr) and result.stderr.count("\n") == 1


def test_an_older_picture_stays_until_the_new_one_is_drawn(data_folder, tmp_path, monkeypatch):
    (tmp_path / "grid.png").write_bytes(b"an older picture")
    result = call(*SAMPLE, "--out", tmp_path / "grid.png", "--steps", "2000")
    assert result.exit_code == EXIT_USER_ERROR
    assert (tmp_path / "grid.png").read_bytes() == b"an older picture"


def test_the_home_folder_may_be_written_as_a_tilde(data_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    result = call("sample", "--model", "tiny", "--steps", "2", "--count", "1", "--out", "~/grid.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "grid.png").exists() and str(tmp_path / "grid.png") in result.stdout

    for split in ("train", "test"):
        (tmp_path / "photos" / split).mkdir(parents=True)
        Image.new("L", (16, 16)).save(tmp_path / "photos" / split / "0.png")
    result = call(*TRAIN, "--data", "~/photos", "--image-size", "16", "--name", "at_home")
    assert result.exit_code == 0, result.output
    settings = json.loads((data_folder / "checkpoints" / "at_home.json").read_text())["settings"]
    assert settings["data"] == str(tmp_path / "photos")


def test_damaged_checkpoint_is_refused(data_folder, tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for suffix in (".json", ".safetensors"):
        content = bytearray((data_folder / "checkpoints" / f"tiny{suffix}").read_bytes())
        if suffix == ".safetensors":
            content[-1] ^= 1
        (folder / f"tiny{suffix}").write_bytes(content)
    monkeypatch.setenv("LECTURE26_DATA", str(tmp_path))
    for arguments in (
        ["evaluate", "tiny"],
        ["checkpoints", "tiny"],
        [*SAMPLE, "--out", tmp_path / "grid.png"],
    ):
        result = call(*arguments)
        assert result.exit_code == EXIT_USER_ERROR
        assert "SHA-256" in result.stderr


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("settings", {"schedule": "unheard of"}),
        ("settings", {"model": {"base_channels": 16, "channel_multipliers": (1,), "patch_size": 4}}),
        ("settings", {"model": {"base_channels": "wide"}}),
        ("settings", {"channels": None}),
        ("metrics", []),
        ("seconds", None),
    ],
)
def test_a_card_with_damaged_values_ends_in_one_line_and_no_listing(data_folder, tmp_path, field, change):
    for file in checkpoint_files("tiny"):
        shutil.copy(file, file.with_stem("a_bad_one"))
    _, file = checkpoint_files("a_bad_one")
    card = json.loads(file.read_text()) | {"name": "a_bad_one"}
    file.write_text(json.dumps(card | {field: card[field] | change if isinstance(change, dict) else change}))
    picture = tmp_path / "grid.png"
    try:
        for command in (["evaluate", "a_bad_one"], [*SAMPLE, "--model", "a_bad_one", "--out", picture]):
            result = call(*command)
            assert result.exit_code == EXIT_USER_ERROR, result.exception
            assert "a_bad_one" in result.stderr and result.stderr.count("\n") == 1
        listed = call("checkpoints")
        assert listed.exit_code == 0 and "\ntiny: " in "\n" + listed.stdout
        assert ("a_bad_one: " in listed.stdout) == (field == "settings")
    finally:
        for file in checkpoint_files("a_bad_one"):
            file.unlink()


def fail_with(monkeypatch, error):
    """Have the sampler raise an error."""

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("lecture26.commands.drawing.sample", fail)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:129] data. DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
    ],
)
def test_out_of_memory_ends_in_one_line(data_folder, tmp_path, monkeypatch, error):
    fail_with(monkeypatch, error)
    result = call(*SAMPLE, "--out", tmp_path / "grid.png")
    assert result.exit_code == EXIT_USER_ERROR
    assert result.stderr.startswith("error: out of memory. Try a smaller --batch-size or --count")
    assert result.stderr.count("\n") == 1


def test_a_fault_of_the_course_is_no_error_of_the_users(data_folder, tmp_path, monkeypatch):
    fail_with(monkeypatch, RuntimeError("shapes cannot be multiplied"))
    result = call(*SAMPLE, "--out", tmp_path / "grid.png")
    assert isinstance(result.exception, RuntimeError)


def test_a_data_folder_that_cannot_be_written_to_is_told_at_the_start(data_folder, monkeypatch):
    def refuse(path, *arguments):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("lecture26.recipes.recipe.locked", refuse)
    monkeypatch.setattr(ddpm.DDPM, "draw", lambda *arguments: pytest.fail("training began"))
    result = call(*TRAIN, "--name", "nowhere")
    assert result.exit_code == EXIT_USER_ERROR
    assert "Permission denied" in result.stderr and "LECTURE26_DATA" in result.stderr


def test_a_picture_that_cannot_be_written_is_found_before_sampling(data_folder, tmp_path, monkeypatch):
    fail_with(monkeypatch, AssertionError("sampled"))
    for out in (tmp_path / f"{'long' * 100}.png", tmp_path / "link.png", "\0.png"):
        (tmp_path / "link.png").unlink(missing_ok=True)
        (tmp_path / "link.png").symlink_to(tmp_path / "no" / "folder" / "grid.png")
        result = call(*SAMPLE, "--out", out)
        assert result.exit_code == EXIT_USER_ERROR, result.exception


def test_what_the_data_warn_of_is_one_line(data_folder, tmp_path):
    for split in ("train", "test"):
        for number in range(3):
            file = tmp_path / split / "a class" / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (16, 16), 80 * number).save(file)
    (tmp_path / "train" / "a class" / "3.heic").touch()
    result = call(*TRAIN, "--data", tmp_path, "--image-size", "16", "--name", "warned")
    assert result.exit_code == 0, result.output
    notes = [line for line in result.stderr.splitlines() if line.startswith("note: ")]
    assert len(notes) == 2
    assert "left out 1 .heic" in notes[0] and "has a single class, 'a class'" in notes[1]


def test_error_as_a_user_sees_it(data_folder):
    command = [sys.executable, "-m", "lecture26", "checkpoints", "nothing"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == EXIT_USER_ERROR
    assert result.stdout == ""
    assert result.stderr.startswith("error: there is no checkpoint 'nothing'")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    [["checkpoints"], ["checkpoints", "tiny"], ["evaluate", "tiny"], [*SAMPLE, "--steps", "2"]],
    ids=" ".join,
)
def test_a_reader_who_has_gone_is_no_error(data_folder, tmp_path, command):
    program = [sys.executable, "-m", "lecture26", *command]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TQDM_DISABLE": "1"}
    process = subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path, env=environment, text=True
    )
    process.stdout.close()  # before anything is printed, since the program has first to start
    assert process.stderr.read() == ""
    assert process.wait() == EXIT_NOBODY_READS
    process.stderr.close()


@pytest.mark.parametrize(
    "command",
    [[], ["train"], ["sample"], ["adapt"], ["classify"], ["evaluate"], ["measure"], ["checkpoints"]],
)
def test_help(command):
    result = call(*command, "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith(" ".join(["Usage: python -m lecture26", *command]))


@pytest.mark.parametrize("module", ["lecture26", "lecture26.__main__"])
def test_import_is_light(module):
    heavy = [
        "accelerate",
        "diffusers",
        "matplotlib",
        "sklearn",
        "timm",
        "torch",
        "torchmetrics",
        "torchvision",
    ]
    program = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
