"""What guides a denoiser: a class that is given in words, and a checkpoint that fits what is drawn."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lecture26.clip_guidance import split_words
from lecture26.kit.checkpoints import CheckpointError, list_checkpoints
from lecture26.recipes import Recipe, Trained


def parse_class(words: str, labels: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Read a class from words such as 'red star', one of each label, in any order.

    Args:
        words: as prompts are written, in any case, with or without punctuation.
        labels: the names of each label's classes, by the label's name.

    Returns:
        For each label's name the number of its class.

    Raises:
        ValueError: a word that is no class; a label without a word, or with two.
    """
    known = {word: (name, number) for name, classes in labels.items() for number, word in enumerate(classes)}
    found: dict[str, int] = {}
    for word in split_words(words):
        if word not in known:
            choices = "; ".join(f"{name}: {', '.join(classes)}" for name, classes in labels.items())
            raise ValueError(f"the class must be made of known words ({choices}); got {word!r}")
        name, number = known[word]
        if name in found:
            raise ValueError(f"the class must name one {name}; got two in {words!r}")
        found[name] = number
    for name, classes in labels.items():
        if name not in found:
            raise ValueError(f"the class must name a {name} ({', '.join(classes)}); got {words!r}")
    return found


def wanted_attributes(recipe: Recipe, words: str, count: int) -> dict[str, Tensor]:
    """The attributes of count images that all show the class in words: (B,) int64 for a recipe's labels.

    Raises ValueError if the words name no class, see `parse_class`.
    """
    classes_of = recipe.load_images("test").labels
    classes = parse_class(words, {label: classes_of[label] for label in recipe.labels})
    return {label: torch.full((count,), number) for label, number in classes.items()}


def find_guide(denoiser: Trained, is_guide: Callable[[Recipe], bool]) -> Trained | None:
    """A checkpoint that reads what a denoiser draws.

    Args:
        denoiser: the checkpoint of the denoiser.
        is_guide: whether a recipe is one of the kind that is looked for.

    Returns:
        The first in alphabetical order for the denoiser's images and steps; None if there is none.
    """
    for name in list_checkpoints():
        guide = denoiser if name == denoiser.name else Trained(name)
        try:
            recipe = guide.recipe
        except CheckpointError:  # of another version of the course
            continue
        if is_guide(recipe) and reads_what_it_draws(recipe, denoiser.recipe):
            return guide
    return None


def reads_what_it_draws(recipe: Recipe, denoiser: Recipe) -> bool:
    """Whether a recipe's network reads the noisy images of a denoiser's: the same data, size and steps."""
    settings = ("data", "image_size", "schedule", "diffusion_steps")
    return all(getattr(recipe, setting) == getattr(denoiser, setting) for setting in settings)
