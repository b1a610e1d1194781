"""From a wish in words to a guided denoiser, for the command line."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from lecture26.classifier_free_guidance import classifier_free_guided
from lecture26.classifier_guidance import classifier_guided
from lecture26.clip_guidance import clip_guided
from lecture26.kit.checkpoints import CheckpointError, list_checkpoints
from lecture26.recipes import load_diffusion, load_model, load_recipe
from lecture26.recipes.classifiers import NoisyClassifierRecipe
from lecture26.recipes.clip import CLIPRecipe
from lecture26.recipes.conditional import ConditionalDDPM
from lecture26.recipes.latent import LatentDiffusionRecipe
from lecture26.recipes.recipe import Recipe


def parse_class(words: str, labels: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Read a class from words such as 'red star', one of each label, in any order.

    Args:
        words: separated by blanks or commas.
        labels: the names of each label's classes, by the label's name.

    Returns:
        For each label's name the number of its class.

    Raises:
        ValueError: a word that is no class; a label without a word, or with two.
    """
    known = {word: (name, number) for name, classes in labels.items() for number, word in enumerate(classes)}
    found: dict[str, int] = {}
    for word in words.lower().replace(",", " ").split():
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


def guided(
    guidance: str, model: str, network: nn.Module, asked: str, strength: float, count: int
) -> Callable:
    """A checkpoint's denoiser, guided towards what is asked for.

    Args:
        guidance: "classifier", "clip" or "cfg".
        model: the name of the denoiser's checkpoint.
        network: its network, on the device where it shall draw.
        asked: for "clip" any words, else the class (see `parse_class`).
        strength: the gradient's scale, or w of "cfg".
        count: the number of images drawn at once.

    Returns:
        The guided denoiser.

    Raises:
        ValueError: if there is no guide for this denoiser, or the words are not known.
    """
    if guidance == "clip":
        return guided_by_clip(model, network, asked, strength)
    by_class = {"classifier": guided_by_classifier, "cfg": guided_classifier_free}[guidance]
    return by_class(model, network, asked, strength, count)


def guided_by_classifier(model: str, network: nn.Module, wish: str, scale: float, count: int) -> Callable:
    """A checkpoint's denoiser, guided by the noisy classifier that belongs to it.

    Args:
        model: the name of an unconditional denoiser's checkpoint.
        network: its network, on the device where it shall draw.
        wish: the class, in words (see `parse_class`).
        scale: of the gradient.
        count: the number of images drawn at once.

    Returns:
        The guided denoiser.

    Raises:
        ValueError: if no checkpoint is a classifier for this denoiser, or the words name no class.
    """
    device = next(network.parameters()).device
    name = find_classifier(model)
    recipe = load_recipe(name)
    labels = recipe.load("test").labels
    classes = parse_class(wish, {label: labels[label] for label in recipe.labels})
    y = recipe.classes({label: torch.full((count,), number) for label, number in classes.items()})
    return classifier_guided(network, load_model(name).to(device), y.to(device), scale, load_diffusion(model))


def guided_by_clip(model: str, network: nn.Module, prompt: str, scale: float) -> Callable:
    """A checkpoint's denoiser, guided by the noise-aware CLIP that belongs to it.

    Args:
        model: the name of an unconditional denoiser's checkpoint.
        network: its network, on the device where it shall draw.
        prompt: what to draw, in words.
        scale: of the gradient of the cosine similarity; kappa is not included.

    Returns:
        The guided denoiser.

    Raises:
        ValueError: if no checkpoint is a noise-aware CLIP for this denoiser, or a word is unknown.
    """
    device = next(network.parameters()).device
    clip = load_model(find_clip(model)).to(device)
    with torch.no_grad():
        text_features = clip.encode_text(clip.tokenizer([prompt]).to(device))  # (1, D)
    return clip_guided(network, clip, text_features, scale, load_diffusion(model))


def guided_classifier_free(model: str, network: nn.Module, wish: str, w: float, count: int) -> Callable:
    """A conditional checkpoint's denoiser, guided by its own two answers.

    Args:
        model: the name of a conditional denoiser's checkpoint.
        network: its network, on the device where it shall draw.
        wish: the class, in words (see `parse_class`).
        w: the weight; 0 is the conditional model, -1 the unconditional one.
        count: the number of images drawn at once.

    Returns:
        The guided denoiser.

    Raises:
        ValueError: if the words name no class.
    """
    recipe = load_recipe(model)
    device = next(network.parameters()).device
    labels = recipe.load("test").labels
    classes = parse_class(wish, {label: labels[label] for label in recipe.labels})
    cond = torch.tensor([classes[label] for label in recipe.labels]).expand(count, -1)
    return classifier_free_guided(network, cond.to(device), recipe.null_conditions(count).to(device), w)


def check_guidance(guidance: str | None, model: str) -> None:
    """Raise ValueError unless a checkpoint's denoiser can be guided in this way.

    Args:
        guidance: "classifier", "clip", "cfg", "text" for a prompt by itself, or None for none.
        model: the name of the denoiser's checkpoint.
    """
    recipe = load_recipe(model)
    is_from_text = isinstance(recipe, LatentDiffusionRecipe)
    if is_from_text and guidance != "text":
        raise ValueError(f"{model!r} draws what words say: give it --prompt, and no --guidance")
    if guidance == "text" and not is_from_text:
        raise ValueError(
            f"--prompt without --guidance needs a text-to-image model; {model!r} is none. Steer it by words "
            "with --guidance clip"
        )
    is_conditional = isinstance(recipe, ConditionalDDPM)
    if is_conditional and guidance != "cfg":
        raise ValueError(
            f"{model!r} was trained with labels: it draws with --guidance cfg --class (anything with --w -1)"
        )
    if guidance == "cfg" and not is_conditional:
        raise ValueError(
            f"--guidance cfg needs a denoiser that was trained with labels; {model!r} knows none. Train one: "
            "see lecture26/recipes/conditional.py"
        )


def find_classifier(model: str) -> str:
    """The name of a noisy classifier, among the checkpoints, for the images and steps of a denoiser's.

    Raises:
        ValueError: if there is none.
    """

    def reads_all_steps(recipe: Recipe) -> bool:
        return isinstance(recipe, NoisyClassifierRecipe) and recipe.trained_steps is None

    return _find_guide(model, reads_all_steps, "classifier", "a noisy classifier", "classifiers.py")


def find_clip(model: str) -> str:
    """The name of a noise-aware CLIP, among the checkpoints, for the images and steps of a denoiser's.

    Raises:
        ValueError: if there is none.
    """

    def reads_noisy_images(recipe: Recipe) -> bool:
        return isinstance(recipe, CLIPRecipe) and recipe.noise_aware

    return _find_guide(model, reads_noisy_images, "clip", "a noise-aware CLIP", "clip.py")


def _find_guide(
    model: str, is_of_its_kind: Callable[[Recipe], bool], guidance: str, kind: str, file: str
) -> str:
    """The first checkpoint of a kind that reads what a denoiser draws."""
    denoiser = load_recipe(model)
    for name in list_checkpoints():
        try:
            recipe = load_recipe(name)
        except CheckpointError:  # of another version of the course
            continue
        if is_of_its_kind(recipe) and reads_what_it_draws(recipe, denoiser):
            return name
    raise ValueError(
        f"--guidance {guidance} needs {kind} of the images and steps of {model!r}; no checkpoint is one. "
        f"Train it: see lecture26/recipes/{file}"
    )


def reads_what_it_draws(recipe: Recipe, denoiser: Recipe) -> bool:
    """Whether a recipe's network reads the noisy images of a denoiser's: the same data, size and steps."""
    settings = ("data", "image_size", "schedule", "diffusion_steps")
    return all(getattr(recipe, setting) == getattr(denoiser, setting) for setting in settings)
