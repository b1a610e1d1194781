"""Recipes and checkpoints: how families are found, and what is read of a checkpoint, and how often."""

import dataclasses
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from lecture26 import recipes
from lecture26.ddpm import cosine_betas
from lecture26.kit import checkpoints
from lecture26.kit.checkpoints import list_checkpoints, save_checkpoint
from lecture26.kit.data import load
from lecture26.kit.sample_draws import SampleDraws
from lecture26.recipes import find_recipe
from lecture26.recipes.ddpm import DDPM, SHAPES_32
from lecture26.recipes.recipe import FAMILIES, RECIPES, register

CARD = {"command": "", "data": "", "steps": 0, "seconds": 0, "metrics": {}}


@pytest.fixture
def lines(monkeypatch, tmp_path):
    """A family of denoisers that are lines, registered for one test, and its checkpoint 'a_line'."""
    for table, name in ((FAMILIES, "line"), (RECIPES, "a_line")):
        monkeypatch.setitem(table, name, None)  # taken out again after the test

    @dataclass(frozen=True, kw_only=True)
    class LineRecipe(DDPM):
        family: ClassVar[str] = "line"

        def build(self):
            return nn.Linear(2, 1)

    recipe = LineRecipe(name="a_line", data="digits", model={}, steps=1, learning_rate=1.0)
    register(recipe)
    monkeypatch.setenv("LECTURE26_DATA", str(tmp_path))
    state = {"weight": torch.tensor([[0.5, 2.0]]), "bias": torch.tensor([0.25])}
    save_checkpoint("a_line", state, CARD | {"recipe": "line", "settings": recipe.settings()})
    return recipe


def test_a_family_registers_itself(lines):
    assert FAMILIES["line"] is type(lines)
    assert recipes.find_recipe("a_line") is lines and "a_line" in recipes.recipe_names()
    assert recipes.load_recipe("a_line") == lines
    assert recipes.load_model("a_line")(torch.tensor([2.0, 1.0])).item() == 3.25
    with torch.device("meta"):
        model = recipes.load_model("a_line")
    assert model.weight.tolist() == [[0.5, 2.0]]  # on the CPU, whatever the default device


def test_a_subclass_without_a_family_of_its_own_takes_nobodys_place(lines):
    class Other(type(lines)):
        pass

    assert FAMILIES["line"] is type(lines) is not Other


def test_every_module_of_the_folder_is_there_without_being_named():
    modules = {file.stem for file in Path(recipes.__file__).parent.glob("[a-z]*.py")}
    assert modules <= set(vars(recipes)) and {"ddpm", "vae", "latent"} <= modules


def test_every_checkpoint_of_the_course_is_of_a_family():
    assert {recipes.Trained(name).recipe.name for name in list_checkpoints()} == set(list_checkpoints())


def test_what_is_read_of_a_checkpoint_is_read_once_and_when_it_is_needed(lines, monkeypatch):
    read, load_card = [], checkpoints.load_card
    for module in (checkpoints, recipes.trained):
        monkeypatch.setattr(module, "load_card", lambda name: read.append(name) or load_card(name))
    trained = recipes.Trained("a_line")
    assert read == []
    assert trained.network is trained.network and trained.recipe is trained.recipe
    assert trained.diffusion.num_steps == lines.diffusion_steps and trained.card["name"] == "a_line"
    assert not trained.network.training
    assert not any(parameter.requires_grad for parameter in trained.network.parameters())
    assert read == ["a_line"]


def test_a_checkpoint_of_another_version_is_told(lines):
    settings = lines.settings() | {"unheard_of": 1}
    save_checkpoint("a_line", {"bias": torch.zeros(1)}, CARD | {"recipe": "line", "settings": settings})
    with pytest.raises(checkpoints.CheckpointError, match="'a_line' was made by another version"):
        recipes.load_model("a_line")


@pytest.mark.parametrize("wrong", [{"image_size": "x"}, {"image_size": 0}, {"channels": None}])
def test_settings_that_are_no_sizes_are_told(lines, wrong):
    settings = lines.settings() | wrong
    save_checkpoint("a_line", {"bias": torch.zeros(1)}, CARD | {"recipe": "line", "settings": settings})
    with pytest.raises(checkpoints.CheckpointError, match=f"its card is damaged .*{next(iter(wrong))} must"):
        assert recipes.load_recipe("a_line") is None


def test_no_diffusion_but_that_of_a_denoiser(lines):
    reader = dataclasses.replace(recipes.find_recipe("reader_digits"), labels={"digit": ("0", "1")})
    card = CARD | {"recipe": "reader", "settings": reader.settings()}
    save_checkpoint("a_reader", {"bias": torch.zeros(1)}, card)
    with pytest.raises(ValueError, match="model must be a denoiser; got 'a_reader', a reader"):
        recipes.load_diffusion("a_reader")


# What steps a denoiser is trained at


@pytest.mark.parametrize("name", ["ddpm", "conditional_ddpm_shapes32"])
@pytest.mark.parametrize("density", ["steps", "signal"])
def test_steps_are_uniform_in_their_number_or_in_their_signal(name, density):
    """For "signal" the log SNR is compared with the logistic density, whose distribution is the sigmoid."""
    count = 20_000
    recipe = replace(find_recipe(name), density=density)
    t = recipe.draw_steps(SampleDraws(5, torch.arange(count)))
    assert t.dtype == torch.int64 and 0 <= t.min() and t.max() < 1000
    alpha_bar = (1 - cosine_betas(1000)).cumprod(0)
    for step in (30, 200, 500, 700, 900):
        log_snr = (alpha_bar[step] / (1 - alpha_bar[step])).log()
        # t <= step where the signal is no less than the step's
        expected = (step + 1) / 1000 if density == "steps" else 1 - log_snr.sigmoid().item()
        share = (t <= step).double().mean().item()
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / count)


def test_steps_of_uniform_signal_number_the_boundaries_right():
    """A uniform number u gives the first step whose alpha_bar is no longer above u."""

    class Given:
        def uniform(self):
            return torch.tensor([0.999999, 0.5, 0.0])

    recipe = replace(find_recipe("ddpm"), density="signal")
    alpha_bar = (1 - cosine_betas(1000)).cumprod(0)
    first, middle, last = recipe.draw_steps(Given()).tolist()
    assert (first, last) == (0, 999)
    assert alpha_bar[middle] <= 0.5 < alpha_bar[middle - 1]


@pytest.mark.parametrize("name", ["ddpm", "conditional_ddpm_shapes32"])
def test_batches_hold_the_steps_of_the_density(name):
    shapes = load("shapes", image_size=32)
    recipe = find_recipe(name)
    if name != "ddpm":
        recipe = recipe.fitted_to(shapes)
    near_clean = [
        (replace(recipe, density=density).draw(shapes, SampleDraws(0, torch.arange(400)))["t"] < 250).sum()
        for density in ("steps", "signal")
    ]
    assert near_clean[1] < 0.8 * near_clean[0]  # .15 and .25 are expected: three standard errors apart at .8


def test_test_losses_compare_whatever_the_density():
    shapes = load("shapes", split="test", image_size=32)
    recipe = replace(
        find_recipe("ddpm"), model={"base_channels": 8, "channel_multipliers": (1,)}, batch_size=4
    )
    losses = []
    for density in ("steps", "signal"):
        trained = replace(recipe, density=density)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            losses.append(trained._test_loss(trained.build(), shapes))
    assert losses[0] == losses[1]


def test_settings_name_the_density_only_where_it_is_not_the_old_one():
    recipe = find_recipe("ddpm")
    assert "density" not in replace(recipe, density="steps").settings()
    for density in ("steps", "signal"):
        chosen = replace(recipe, density=density)
        assert type(recipe)(**chosen.settings()) == chosen


def test_unknown_density_is_refused():
    with pytest.raises(ValueError, match="density must be one of 'steps', 'signal'; got 'middle'"):
        replace(find_recipe("ddpm"), density="middle")


# A run in parts


def test_parts_of_the_model_of_shapes_follow_each_other():
    parts, recipe = [], SHAPES_32
    while True:
        parts.insert(0, recipe)
        if recipe.start is None:
            break
        recipe = find_recipe(recipe.start)
    assert len({part.name for part in parts}) == len({part.seed for part in parts}) == len(parts) > 1
    alike = {"name": "", "start": None, "seed": 0, "steps": 1}
    assert len({str(replace(part, **alike)) for part in parts}) == 1
