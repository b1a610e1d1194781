"""Recipes and checkpoints: how families are found, and what is read of a checkpoint, and how often."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from lecture26 import recipes
from lecture26.kit import checkpoints
from lecture26.kit.checkpoints import list_checkpoints, save_checkpoint
from lecture26.recipes.ddpm import DDPM
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


def test_no_diffusion_but_that_of_a_denoiser(lines):
    reader = dataclasses.replace(recipes.find_recipe("reader_digits"), labels={"digit": ("0", "1")})
    card = CARD | {"recipe": "reader", "settings": reader.settings()}
    save_checkpoint("a_reader", {"bias": torch.zeros(1)}, card)
    with pytest.raises(ValueError, match="model must be a denoiser; got 'a_reader', a reader"):
        recipes.load_diffusion("a_reader")
