"""What every recipe has: the settings, the steps from data to checkpoint; and which recipes there are."""

import dataclasses
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from lecture26.kit.checkpoints import load_state, save_checkpoint
from lecture26.kit.data import check_images, load
from lecture26.kit.files import locked
from lecture26.kit.image_set import ImageSet
from lecture26.kit.paths import data_dir
from lecture26.kit.processes import process_state
from lecture26.kit.sample_draws import SampleDraws
from lecture26.kit.training import History, train
from lecture26.kit.validation import check_choice
from lecture26.unet import EMA

EVALUATION_SEED = 2026  # of every draw in an evaluation
LOSS_CURVE_POINTS = 100

FAMILIES: dict[str, type["Recipe"]] = {}  # by the names that cards have for them
RECIPES: dict[str, "Recipe"] = {}


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """How one model is made: on what, of what size, for how long. Subclasses say what is learned.

    Attributes:
        name: the name of the checkpoint.
        data: a data set's name or a folder of images, as `lecture26.kit.data.load` takes it.
        image_size: in pixels; None takes the images as they come.
        channels: of the images; taken from the data when training begins.
        model: keyword arguments of the network, but for those that the data decide.
        steps, batch_size, learning_rate, weight_decay, warmup_steps, decay_to, seed, precision:
            as `lecture26.kit.training.train` takes them.
        ema_decay: of the averaged weights, which become the checkpoint.
        start: the checkpoint whose weights training begins with (see `begin_with`); None for those that
            `build` gives.
    """

    family: ClassVar[str]  # the name that cards have for the class; a subclass that has one registers itself

    name: str
    data: str
    image_size: int | None = None
    channels: int = 3
    model: dict
    steps: int
    batch_size: int = 64
    learning_rate: float
    weight_decay: float = 0.0
    warmup_steps: int = 200
    decay_to: float = 0.0
    ema_decay: float = 0.999
    seed: int = 0
    precision: str = "auto"
    start: str | None = None

    def __init_subclass__(cls, **arguments):
        super().__init_subclass__(**arguments)
        if "family" in vars(cls):
            FAMILIES[cls.family] = cls

    @abstractmethod
    def build(self) -> nn.Module:
        """The untrained network."""

    def regularise(self, model: nn.Module) -> None:  # noqa: B027 - most recipes need nothing
        """Give a network, in place, what acts in training only and is no part of what `build` makes."""

    @abstractmethod
    def draw(self, images: ImageSet, random: SampleDraws) -> dict[str, Tensor]:
        """Draw a training batch; see `train`."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The mean loss over a batch; see `train`."""

    @abstractmethod
    def evaluate(self, model: nn.Module, images: ImageSet) -> dict[str, float]:
        """Measure the trained network on images it has not seen: name to number."""

    @torch.no_grad()
    def mean_loss(self, model: nn.Module, images: ImageSet, num_batches: int, seed: int) -> float:
        """The loss on images, the mean over some batches that a seed decides."""
        device = next(model.parameters()).device
        losses = []
        for n in torch.arange(num_batches * self.batch_size).split(self.batch_size):
            batch = self.draw(images, SampleDraws(seed, n))
            batch = {name: value.to(device) for name, value in batch.items()}
            losses.append(self.loss(model, batch).item())
        return sum(losses) / len(losses)

    def load_images(self, split: str) -> ImageSet:
        """A split of the recipe's data."""
        return load(self.data, split=split, image_size=self.image_size)

    def fitted_to(self, images: ImageSet) -> "Recipe":
        """The recipe with what the data decide filled in."""
        return dataclasses.replace(self, channels=images.channels, image_size=images.image_size)

    def settings(self) -> dict:
        """Every setting, as plain values; `type(recipe)(**settings)` gives the recipe back.

        `start` is among them only where there is one.
        """
        settings = dataclasses.asdict(self)
        if self.start is None:
            del settings["start"]
        return settings


def register(*recipes: Recipe) -> None:
    """Enter `recipes` among those that `find_recipe` finds by their names."""
    RECIPES.update({recipe.name: recipe for recipe in recipes})


def recipe_names() -> tuple[str, ...]:
    """The names of all recipes, in alphabetical order."""
    return tuple(sorted(RECIPES))


def find_recipe(name: str) -> Recipe:
    """The recipe of that `name`; ValueError if there is none."""
    check_choice("recipe", name, recipe_names())
    return RECIPES[name]


def count_classes(data: str, images: ImageSet, labels: tuple[str, ...]) -> tuple[int, ...]:
    """The number of classes of each of some labels.

    Args:
        data: the name of the data, for the message.
        images: of these data.
        labels: which of their labels.

    Returns:
        A number for each label, in their order.

    Raises:
        ValueError: if the images lack one of the labels.
    """
    if not set(labels) <= set(images.labels):
        raise ValueError(
            f"data must have the labels {', '.join(labels)}; {data!r} has "
            f"{', '.join(images.labels) or 'none'}"
        )
    return tuple(len(images.labels[name]) for name in labels)


def begin_with(model: nn.Module, checkpoint: str) -> None:
    """Put a checkpoint's weights into a network that may have more parameters; these stay as they are.

    Args:
        model: the network, changed in place.
        checkpoint: a checkpoint's name.

    Raises:
        CheckpointError: if there is no such checkpoint, or its file is damaged.
        ValueError: if the network has no place for one of the weights.
    """
    weights, own = load_state(checkpoint), model.state_dict()
    for name, weight in weights.items():
        if name not in own or own[name].shape != weight.shape:
            place = f"one of shape {tuple(own[name].shape)}" if name in own else "none of that name"
            raise ValueError(
                f"start must be a checkpoint whose weights all fit the network; {checkpoint!r} has {name} of "
                f"shape {tuple(weight.shape)}, and the network {place}"
            )
    model.load_state_dict(weights, strict=False)


def seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """What `build` makes on the CPU with this seed; random numbers drawn elsewhere stay what they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def state_file(name: str) -> Path:
    """Where the state of an unfinished training run is kept."""
    return data_dir() / "states" / f"{name}.pt"


@contextmanager
def sole_use(name: str) -> Iterator[None]:
    """Refuse, by an InUseError, what is under way already in another call; processes of one call are one."""
    if not process_state().is_main_process:
        yield
        return
    told = f"{name!r} is being made by another process: wait for it, or choose another name"
    with locked(state_file(name).with_suffix(".lock"), told):
        yield


def train_network(
    recipe: Recipe, images: ImageSet, watch: Callable[[int, nn.Module], None] | None = None, **state
) -> tuple[nn.Module, History]:
    """Train the network of a recipe.

    Args:
        recipe: what to train, with what the data decide filled in.
        images: what to train it on.
        watch: None, or watch(steps taken so far, averaged network), called after each step.
        state: `state_file`, `state_every` and `settings` of `lecture26.kit.training.train`.

    Returns:
        The averaged network, frozen; and the History of the losses.
    """
    model = seeded(recipe.seed, recipe.build)
    recipe.regularise(model)
    if recipe.start is not None:
        begin_with(model, recipe.start)
    average = EMA(model, recipe.ema_decay)
    history = train(
        model,
        lambda random: recipe.draw(images, random),
        recipe.loss,
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        warmup_steps=recipe.warmup_steps,
        decay_to=recipe.decay_to,
        average=average,
        seed=recipe.seed,
        precision=recipe.precision,
        watch=None if watch is None else lambda steps: watch(steps, average.model),
        **state,
    )
    return average.model, history


def run(recipe: Recipe, command: str, state_every: float = 60.0) -> dict | None:
    """Train, evaluate and save a checkpoint, going on from the state of an interrupted run.

    Args:
        recipe: what to train.
        command: the command line that does the same, for the card.
        state_every: seconds between two states written.

    Returns:
        dict: the checkpoint's card; None in all but the main one of several processes.

    Raises:
        InUseError: if another call is training it.
        DataError: if images cannot be read; and what `train` and `Recipe.load_images` raise.
    """
    with sole_use(recipe.name):
        with process_state().main_process_first():  # it may have to download
            images, unseen = recipe.load_images("train"), recipe.load_images("test")
            if process_state().is_main_process:
                check_images((images, unseen))  # damage is found now, and not in the middle of the run
        recipe = recipe.fitted_to(images)
        settings = recipe.settings()
        network, history = train_network(
            recipe,
            images,
            state_file=state_file(recipe.name),
            state_every=state_every,
            settings=settings | {"images": len(images)},  # a folder's name may come to hold others
        )
        if not process_state().is_main_process:
            return None
        card = save_checkpoint(
            recipe.name,
            network.state_dict(),
            {
                "recipe": recipe.family,
                "settings": settings | {"precision": history.precision},
                "command": command,
                "data": f"{recipe.data}, {len(images)} images of {images.image_size} pixels",
                "steps": recipe.steps,
                "processes": process_state().num_processes,
                "seconds": round(history.seconds),
                "metrics": recipe.evaluate(network, unseen),
                "loss_curve": loss_curve(history),
            },
        )
        state_file(recipe.name).unlink()
        return card


def loss_curve(history: History) -> dict[str, list]:
    """The training loss in at most LOSS_CURVE_POINTS + 1 points, each the mean of as many steps.

    Returns:
        dict: "step", the last step of each point, and "loss".
    """
    width = max(1, len(history.losses) // LOSS_CURVE_POINTS)
    ends = range(width, len(history.losses) + 1, width)
    return {
        "step": list(ends),
        "loss": [round(statistics.fmean(history.losses[end - width : end]), 6) for end in ends],
    }
