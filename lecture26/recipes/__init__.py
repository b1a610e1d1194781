"""What to train and how: one recipe per checkpoint, and the way from a checkpoint back to a model.

A family of recipes is a module with a subclass of Recipe, which registers itself, and with recipes of that
family, which it registers. All modules of this folder are imported here, so that a new file is enough.
"""

import pkgutil
from importlib import import_module

from lecture26.recipes.recipe import Recipe, find_recipe, recipe_names, run
from lecture26.recipes.trained import Trained, load_diffusion, load_model, load_recipe

__all__ = [
    "Recipe",
    "Trained",
    "find_recipe",
    "load_diffusion",
    "load_model",
    "load_recipe",
    "recipe_names",
    "run",
]

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    import_module(_module.name)
