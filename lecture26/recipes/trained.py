"""The way from a checkpoint back to what was trained: its recipe, its diffusion and its network."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from textwrap import shorten

import torch
from torch import nn

from lecture26.ddpm import Diffusion
from lecture26.kit.checkpoints import CheckpointError, load_card, load_state
from lecture26.recipes.recipe import FAMILIES, Recipe


@dataclass(frozen=True)
class Trained:
    """A checkpoint whose files are read when they are needed, and then kept.

    Attributes:
        name: the checkpoint's name.

    Raises:
        CheckpointError: by all of the following, if there is no such checkpoint or it is damaged.
    """

    name: str

    @cached_property
    def card(self) -> dict:
        """The checkpoint's card."""
        return load_card(self.name)

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe that it was made by, with the settings of its card.

        Raises:
            CheckpointError: if this version of the course cannot read the card.
        """
        with self._readable():
            recipe = FAMILIES[self.card["recipe"]](**self.card["settings"])
            # What else the settings make; the network is made below.
            for process in ("diffusion", "forward_process"):
                getattr(recipe, process, None)
        return recipe

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Make a CheckpointError of whatever settings lead to that do not fit the course."""
        try:
            yield
        except (CheckpointError, OSError, MemoryError):
            raise
        except Exception as error:
            raise CheckpointError(
                f"the checkpoint {self.name!r} was made by another version of the course, or its card is "
                f"damaged ({type(error).__name__}: {shorten(str(error), 200)}): train it anew"
            ) from error

    @cached_property
    def diffusion(self) -> Diffusion:
        """The diffusion that its network was trained for.

        Raises:
            ValueError: if the checkpoint is no denoiser.
        """
        if not hasattr(self.recipe, "diffusion"):
            raise ValueError(f"model must be a denoiser; got {self.name!r}, a {self.recipe.family}")
        return self.recipe.diffusion

    @cached_property
    def network(self) -> nn.Module:
        """The network: averaged weights, in evaluation mode, frozen, on the CPU.

        Raises:
            CheckpointError: if the file is not the one that the card describes, or the card not that of its
                weights.
        """
        recipe, state = self.recipe, load_state(self.name, self.card)
        with self._readable(), torch.device("cpu"):
            network = recipe.build()
            network.load_state_dict(state)
        return network.eval().requires_grad_(False)


def load_recipe(name: str) -> Recipe:
    """The recipe that the checkpoint `name` was made by, with the settings of its card; see `Trained`."""
    return Trained(name).recipe


def load_model(name: str) -> nn.Module:
    """The trained network of the checkpoint `name`: averaged, frozen, on the CPU; see `Trained`."""
    return Trained(name).network


def load_diffusion(name: str) -> Diffusion:
    """The diffusion that the network of the checkpoint `name` was trained for; see `Trained`."""
    return Trained(name).diffusion
