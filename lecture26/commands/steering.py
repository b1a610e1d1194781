"""The ways in which `sample` steers what it draws, each with all its rules in one place.

To add one, write a subclass of Steering here and enter it in STEERINGS: the command line takes its name, its
options and its refusals from there. What a way computes with is imported when it is used, so that --help
answers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from lecture26.commands.drawing import Drawing
    from lecture26.recipes import Recipe, Trained

OPTIONS = ("--class", "--prompt", "--scale", "--w")
WORDS = OPTIONS[:2]  # say what to draw; the others how strongly
TEXT_MODEL = "text_to_image_shapes64"


class Steering:
    """A way to steer what is drawn. This one steers nowhere, and is what the others differ from.

    Attributes:
        name: what --guidance calls it; None for a way that needs no --guidance.
        asks: the option that says what to draw; None if there is none.
        strength, default: the option that says how strongly, and what it is if it is not given.
        told: how the command says afterwards by what it steered.
        hints: for an option that it does not take, what to say beside that.
        family: of the models that draw in this way alone, as their cards call it; None for all that no other
            way claims.
        need: what to say to a model that is not of that family.
        offer: what a model of that family says to any other way.
    """

    name: ClassVar[str | None] = None
    asks: ClassVar[str | None] = None
    strength: ClassVar[str | None] = None
    default: ClassVar[float | None] = None
    told: ClassVar[str] = ""
    hints: ClassVar[dict[str, str]] = {}
    family: ClassVar[str | None] = None
    need: ClassVar[str] = ""
    offer: ClassVar[str] = ""

    @property
    def own_model(self) -> str | None:
        """The checkpoint that is drawn from where none is named; None if one must be named."""
        return None

    @property
    def called(self) -> str:
        """The options by which it is chosen, in words."""
        return f"--guidance {self.name}"

    def takes(self, option: str) -> bool:
        """Whether this way has that `option`, one of OPTIONS."""
        return option in (self.asks, self.strength)

    def is_chosen(self, guidance: str | None, given: Collection[str]) -> bool:
        """Whether options choose this way.

        Args:
            guidance: the value of --guidance, or None.
            given: those of OPTIONS that were given.
        """
        return guidance == self.name and (guidance is not None or self.asks is None or self.asks in given)

    def check_options(self, given: Collection[str], model: str | None, sampler: str, eta: float) -> None:
        """Raise ValueError unless the options of `sample` suit this way.

        Args:
            given: those of OPTIONS that were given.
            model, sampler, eta: the values of these options.
        """
        if self.asks is not None and self.asks not in given:
            raise ValueError(f"{self.called} needs {self.asks}; it is missing")
        for option in OPTIONS:
            if option in given and not self.takes(option):
                raise ValueError(self.refusal(option))
        if model is None and self.own_model is None:
            others = " and ".join(way.called for way in STEERINGS if way.own_model is not None)
            raise ValueError(f"--model is missing; only {others} has one of its own")

    def refusal(self, option: str) -> str:
        """What to say to an `option` of OPTIONS that this way does not take."""
        takers = [way for way in STEERINGS if way.takes(option)]
        if self.name is not None:
            own = self.asks if option in WORDS else self.strength
            hint = self.hints.get(option, f"{option} is for --guidance {takers_of(option)}")
            return f"{self.called} takes {own} and not {option}: {hint}"
        if all(way.name is not None for way in takers):
            alike = [o for o in OPTIONS if all(way.name is not None for way in STEERINGS if way.takes(o))]
            return f"{' and '.join(alike)} are for --guidance; it is missing"
        choices = " or ".join(way.asks if way.name is None else way.called for way in takers)
        return f"{option} is for {choices}; {'both' if len(takers) == 2 else 'all'} are missing"

    def check_model(self, trained: Trained) -> None:
        """Raise ValueError unless this way can steer the model of the checkpoint `trained`."""
        family, model = trained.recipe.family, repr(trained.name)
        for way in STEERINGS:
            if way is not self and way.family == family:
                raise ValueError(way.offer.format(model=model))
        if self.family not in (None, family):
            raise ValueError(self.need.format(model=model))

    def guided(self, drawing: Drawing) -> Callable:
        """The denoiser of a `drawing`, guided towards what it asks for.

        Raises:
            ValueError: if there is no guide for this denoiser, or the words are not known.
        """
        return drawing.network

    def draw(self, drawing: Drawing) -> Tensor:
        """The images of a `drawing`, (B, C, H, W) in [-1, 1]; what is raised is that of `guided`."""
        recipe, diffusion = drawing.trained.recipe, drawing.trained.diffusion
        return drawing.sample(
            diffusion, self.guided(drawing), (recipe.channels, recipe.image_size, recipe.image_size)
        )

    def said(self, drawing: Drawing) -> str:
        """What the command says of a finished `drawing`: what was asked for, and by what it steered."""
        return f", {drawing.asked} {self.told} {drawing.strength:g}" if self.told else ""


class GuidedByANetwork(Steering):
    """A way that needs a second network, which reads the noisy images of the denoiser.

    Attributes:
        kind: of that network, in words.
        file: where its recipes are.
    """

    kind: ClassVar[str]
    file: ClassVar[str]

    def is_guide(self, recipe: Recipe) -> bool:
        """Whether the network of a `recipe` is of that kind."""
        raise NotImplementedError

    def find(self, denoiser: Trained) -> Trained:
        """A checkpoint of that kind for the images and steps of a `denoiser`.

        Raises:
            ValueError: if there is none.
        """
        from lecture26.commands.guides import find_guide

        guide = find_guide(denoiser, self.is_guide)
        if guide is None:
            raise ValueError(
                f"{self.called} needs {self.kind} of the images and steps of {denoiser.name!r}; "
                f"no checkpoint is one. Train it: see {self.file}"
            )
        return guide


class Classifier(GuidedByANetwork):
    """Guidance by the gradient of a noisy classifier (chapter 03)."""

    name = "classifier"
    asks, strength, default = "--class", "--scale", 8.0  # near the best one of the chapter
    told = "by classifier guidance at scale"
    kind, file = "a noisy classifier", "lecture26/recipes/classifiers.py"

    def is_guide(self, recipe: Recipe) -> bool:
        return recipe.family == "noisy_classifier" and recipe.trained_steps is None

    def guided(self, drawing: Drawing) -> Callable:
        from lecture26.classifier_guidance import classifier_guided
        from lecture26.commands.guides import wanted_attributes

        guide = self.find(drawing.trained)
        y = guide.recipe.classes(wanted_attributes(guide.recipe, drawing.asked, drawing.count))  # (B,)
        classifier, y = guide.network.to(drawing.device), y.to(drawing.device)
        return classifier_guided(drawing.network, classifier, y, drawing.strength, drawing.trained.diffusion)


class Clip(GuidedByANetwork):
    """Guidance by the gradient of a noise-aware CLIP's cosine similarity (chapter 04)."""

    name = "clip"
    asks, strength, default = "--prompt", "--scale", 400.0  # near the best one of the chapter
    told = "by clip guidance at scale"
    kind, file = "a noise-aware CLIP", "lecture26/recipes/clip.py"

    def is_guide(self, recipe: Recipe) -> bool:
        return recipe.family == "clip" and recipe.noise_aware

    def guided(self, drawing: Drawing) -> Callable:
        import torch

        from lecture26.clip_guidance import clip_guided

        clip = self.find(drawing.trained).network.to(drawing.device)
        with torch.no_grad():
            text_features = clip.encode_text(clip.tokenizer([drawing.asked]).to(drawing.device))  # (1, D)
        return clip_guided(drawing.network, clip, text_features, drawing.strength, drawing.trained.diffusion)


class ClassifierFree(Steering):
    """Guidance by a conditional denoiser's own two answers (chapter 05)."""

    name = "cfg"
    asks, strength, default = "--class", "--w", 1.0  # near the best one of the chapter
    told = "by classifier-free guidance at w ="
    hints = {"--scale": "w is the scale of other libraries - 1"}
    family = "conditional_ddpm"
    need = (
        "--guidance cfg needs a denoiser that was trained with labels; {model} knows none. Train one: see "
        "lecture26/recipes/conditional.py"
    )
    offer = "{model} was trained with labels: it draws with --guidance cfg --class (anything with --w -1)"

    def guided(self, drawing: Drawing) -> Callable:
        from lecture26.classifier_free_guidance import classifier_free_guided
        from lecture26.commands.guides import wanted_attributes

        recipe = drawing.trained.recipe
        cond = recipe.conditions(wanted_attributes(recipe, drawing.asked, drawing.count))  # (B, labels)
        cond, null_cond = (told.to(drawing.device) for told in (cond, recipe.null_conditions(drawing.count)))
        return classifier_free_guided(drawing.network, cond, null_cond, drawing.strength)


class Text(Steering):
    """Classifier-free guidance of a text-to-image model by a prompt (chapter 07)."""

    asks, strength, default = "--prompt", "--w", 2.0  # near the best one of the chapter
    told = "at w ="
    family = "latent_diffusion"
    need = (
        "--prompt without --guidance needs a text-to-image model; {model} is none. Steer it by words with "
        "--guidance clip"
    )
    offer = "{model} draws what words say: give it --prompt, and no --guidance"

    @property
    def own_model(self) -> str:
        return TEXT_MODEL

    @property
    def called(self) -> str:
        return "--prompt without --guidance"

    def check_options(self, given: Collection[str], model: str | None, sampler: str, eta: float) -> None:
        super().check_options(given, model, sampler, eta)
        if sampler != "ddim" or eta:
            raise ValueError(f"{self.called} draws with --sampler ddim and --eta 0")

    def draw(self, drawing: Drawing) -> Tensor:
        from lecture26.recipes.latent import pipeline_of

        pipeline = pipeline_of(drawing.trained).to(drawing.device)
        denoiser = pipeline.guided([drawing.asked] * drawing.count, drawing.strength)
        _, *shape = pipeline.latent_shape(drawing.count)
        return pipeline.decode(drawing.sample(pipeline.diffusion, denoiser, tuple(shape)))


# Of several ways that options choose, the first one counts.
STEERINGS = (Text(), Classifier(), Clip(), ClassifierFree(), Steering())


def choose(guidance: str | None, given: Collection[str]) -> Steering:
    """The way that options choose; see `Steering.is_chosen` for `guidance` and `given`."""
    return next(way for way in STEERINGS if way.is_chosen(guidance, given))


def takers_of(option: str) -> str:
    """The names of the ways by --guidance that take an `option` of OPTIONS, such as "classifier or clip"."""
    return " or ".join(way.name for way in STEERINGS if way.name is not None and way.takes(option))
