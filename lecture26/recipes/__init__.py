"""What to train and how: one recipe per checkpoint, and the way from a checkpoint back to a model.

A family of recipes is a module with a subclass of Recipe and its RECIPES; a new one is entered in
_FAMILIES and _RECIPES below.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import shorten

from torch import nn

from lecture26.ddpm import Diffusion
from lecture26.kit.checkpoints import CheckpointError, load_card, load_state
from lecture26.kit.validation import check_choice
from lecture26.recipes import backbone, classifiers, clip, conditional, ddpm, latent, readers, vae
from lecture26.recipes.recipe import Recipe, run

__all__ = ["Recipe", "find_recipe", "load_diffusion", "load_model", "load_recipe", "recipe_names", "run"]

_FAMILIES = {
    family.family: family
    for family in (
        ddpm.DDPM,
        conditional.ConditionalDDPM,
        classifiers.NoisyClassifierRecipe,
        clip.CLIPRecipe,
        readers.ReaderRecipe,
        backbone.BackboneRecipe,
        backbone.GuideRecipe,
        vae.VAERecipe,
        latent.LatentDiffusionRecipe,
    )
}
_RECIPES = {
    recipe.name: recipe
    for module in (ddpm, conditional, classifiers, clip, readers, vae, latent, backbone)
    for recipe in module.RECIPES
}


def recipe_names() -> tuple[str, ...]:
    """The names of all recipes."""
    return tuple(_RECIPES)


def find_recipe(name: str) -> Recipe:
    """The recipe of that name; ValueError if there is none."""
    check_choice("recipe", name, recipe_names())
    return _RECIPES[name]


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turn whatever a card's settings lead to, where they do not fit the course, into a CheckpointError."""
    try:
        yield
    except (CheckpointError, OSError, MemoryError):
        raise
    except Exception as error:
        raise CheckpointError(
            f"the checkpoint {name!r} was made by another version of the course, or its card is damaged "
            f"({type(error).__name__}: {shorten(str(error), 200)}): train it anew"
        ) from error


def load_recipe(name: str) -> Recipe:
    """The recipe that a checkpoint was made by, with the settings of its card.

    Raises:
        CheckpointError: if there is no such checkpoint, or this version of the course cannot read its card.
    """
    card = load_card(name)
    with _readable(name):
        recipe = _FAMILIES[card["recipe"]](**card["settings"])
        # What else the settings make; the network is made by load_model.
        for process in ("diffusion", "forward_process"):
            getattr(recipe, process, None)
    return recipe


def load_model(name: str) -> nn.Module:
    """The trained network of a checkpoint: averaged weights, in evaluation mode, frozen, on the CPU.

    Raises:
        CheckpointError: if there is no such checkpoint, its file is not the one its card describes, or the
            card is not that of these weights.
    """
    recipe, state = load_recipe(name), load_state(name)
    with _readable(name):
        model = recipe.build()
        model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def load_diffusion(name: str) -> Diffusion:
    """The diffusion that a checkpoint's network was trained for.

    Raises:
        CheckpointError: if there is no such checkpoint.
        ValueError: if the checkpoint is no denoiser.
    """
    recipe = load_recipe(name)
    if not hasattr(recipe, "diffusion"):
        raise ValueError(f"model must be a denoiser; got {name!r}, a {recipe.family}")
    return recipe.diffusion
