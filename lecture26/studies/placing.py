"""What teaches a text-to-image model which object goes where: coordinates, a lesson, both, or neither?

The design, written before the first run (chapter 07). Four models from nothing, alike in everything but two
aids: places that are told where they are, and the lesson that asks the text encoder on which side a noun
stands. The recipe is that of the shipped model, with half as many images, all steps of the diffusion drawn
alike and a constant rate of 1e-3; equal training steps, the same images, noise and first weights. On the way
and at the end each draws unseen scenes (w = 2). A reader says whether the axis is the one that was asked for,
side by side or one above the other; and where it is, and both colours are there and differ, whether they are
the right way round, as half would be by tossing a coin. Colours, not shapes, since they are learned first.
One seed each; two shares are called different where they lie more than two standard errors of counting apart.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from lecture26.kit.evaluation import read
from lecture26.kit.processes import process_state
from lecture26.kit.readers import Reader, canonical
from lecture26.latent_diffusion import TextAttention, TextDenoiser
from lecture26.recipes import find_recipe, load_model
from lecture26.recipes.latent import EncodedImages, LatentDiffusionRecipe, draw_captions
from lecture26.studies.ledger import Ledger, ledger_file, train_and_look
from lecture26.studies.text_to_image import WEIGHT, judged

ARMS = {
    "neither": {"coordinates": False, "lesson": 0.0},
    "coordinates": {"coordinates": True, "lesson": 0.0},
    "lesson": {"coordinates": False, "lesson": 3.0},
    "both": {"coordinates": True, "lesson": 3.0},
}
TRAINING_STEPS = 6_000
EVERY = 1_000  # steps from one look to the next
LOOK_SAMPLES, LOOK_STEPS = 256, 25
FINAL_SAMPLES, FINAL_STEPS = 512, 50


@dataclass(frozen=True, kw_only=True)
class PlacingRecipe(LatentDiffusionRecipe):
    """Text to image from latents, whose places may not be told where they are.

    Attributes:
        coordinates: whether they are. If not, the matrix that would tell them is zero, and stays so.
    """

    family: ClassVar[str] = "placing"

    coordinates: bool

    def build(self) -> nn.Module:
        model = super().build()
        if not self.coordinates:
            for module in model.modules():
                if isinstance(module, TextAttention):
                    nn.init.zeros_(module.where.weight).requires_grad_(False)
        return model


def placing(
    recipe: str,
    reader: str,
    arms: Mapping[str, Mapping] = ARMS,
    training_steps: int = TRAINING_STEPS,
    every: int = EVERY,
    look: tuple[int, int] = (LOOK_SAMPLES, LOOK_STEPS),
    final: tuple[int, int] = (FINAL_SAMPLES, FINAL_STEPS),
    state: str | None = None,
) -> dict:
    """Train a model with each of some aids, and count how many scenes it places as asked, on the way.

    Args:
        recipe: of text to image; its number of steps, rate, start and aids are replaced.
        reader: a reader's checkpoint for scenes.
        arms: `PlacingRecipe`'s coordinates and lesson, by name.
        training_steps: of each arm.
        every: steps from one look to the next; a divisor of `training_steps`.
        look, final: how many scenes are drawn on the way and at the end, and with how many steps of DDIM.
        state: a name under which what is finished is kept, so that it resumes; None: nowhere.

    Returns:
        "recipe", "reader", "w", and "arms": for each "name", "coordinates", "lesson", "seconds" of training,
        and "looks", each with "step", "num_samples", what `judged` says ("accuracy_relation" is the
        share with the right axis) and what `order_of_colours` says. The last one is the final one.
    """
    judge = load_model(reader).to(process_state().device)
    base = _base(find_recipe(recipe), training_steps)
    images, unseen = base.load_images("train"), base.load_images("test")
    base = base.fitted_to(images)
    settings = {"recipe": base.settings(), "reader": reader, "look": look, "final": final, "every": every}
    ledger = Ledger(None if state is None else ledger_file(state), settings)

    def run(name: str) -> dict:
        arm = replace(base, **arms[name])

        def look_at(step: int, network: TextDenoiser) -> dict:
            count, steps = final if step == training_steps else look
            return {"step": step, "num_samples": count} | drawn_by(arm, network, judge, unseen, count, steps)

        steps = range(every, training_steps + 1, every)
        named = arm.settings() | {"arm": name}
        looks, history = train_and_look(arm, images, look_at, steps, ledger, name, state, named)
        return {"name": name, **arms[name], "seconds": history.seconds, "looks": looks}

    runs = [ledger.once(name, lambda name=name: run(name)) for name in arms]
    return {"recipe": recipe, "reader": reader, "w": WEIGHT, "arms": runs}


def _base(recipe: LatentDiffusionRecipe, steps: int) -> PlacingRecipe:
    """What all arms have in common."""
    settings = recipe.settings() | {
        "start": None,
        "num_encoded": 50_000,
        "steps": steps,
        "learning_rate": 1e-3,
        "decay_to": 1.0,
        "words_first": False,
        "precision": "bf16",
    }
    return PlacingRecipe(**settings, coordinates=True)


def drawn_by(
    recipe: LatentDiffusionRecipe,
    network: TextDenoiser,
    judge: Reader,
    unseen: EncodedImages,
    count: int,
    steps: int,
) -> dict:
    """What `judged` and `order_of_colours` say of scenes that a network draws.

    Args:
        recipe: that of the network.
        network: what draws.
        judge: a reader of scenes.
        unseen: whose scenes' captions are asked for.
        count, steps: how many are drawn, with how many steps of DDIM.
    """
    scenes = unseen.images.parts[1]
    drawn = draw_captions(recipe.pipeline(network), scenes.captions(range(count)), WEIGHT, steps)
    wanted = scenes.attributes(range(count))
    return judged(judge, drawn, wanted) | order_of_colours(read(judge, drawn).predicted, canonical(wanted))


def order_of_colours(seen: Mapping[str, Tensor], asked: Mapping[str, Tensor]) -> dict:
    """Of the scenes with the right axis and the two colours asked for: how many are the right way round?

    Args:
        seen, asked: canonical descriptions (B,) by label, what was read and what was asked for. Scenes that
            were asked for two objects of one colour do not count.

    Returns:
        "num_told": of how many it can be told; "in_order": the share of these with each colour in its place,
        None if there are none.
    """
    seen_colours, colours = (torch.stack([d["colour_1"], d["colour_2"]]) for d in (seen, asked))  # (2, B)
    in_order, exchanged = ((seen_colours == order).all(dim=0) for order in (colours, colours.flip(0)))  # (B,)
    can_be_told = (seen["relation"] == asked["relation"]) & (colours[0] != colours[1])
    num_told = int((can_be_told & (in_order | exchanged)).sum())
    right = int((can_be_told & in_order).sum())
    return {"num_told": num_told, "in_order": right / num_told if num_told else None}
