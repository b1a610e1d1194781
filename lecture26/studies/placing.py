"""What teaches a text-to-image model which object goes where: coordinates, a lesson, both, or neither?

The design, written before the first run (chapter 07). Four models from nothing, alike in everything but two
aids: places that are told where they are, and the lesson that asks the text encoder on which side a noun
stands. The recipe is that of the shipped model, with half as many images, 6,000 steps and a constant rate of
1e-3; equal training steps, the same images, noise and first weights. On the way and at the end each draws
unseen scenes (w = 2). A reader says whether the axis is the one that was asked for, side by side or one above
the other; and where it is, and both colours are there and differ, whether they are the right way round, as
half would be by tossing a coin. Colours, not shapes, since they are learned first. One seed each; two shares
are called different where they lie more than two standard errors of counting apart.

Added afterwards: does it help to train most at the steps where words fall silent (equation 7.11)? One more
model with both aids, alike in everything but the steps t. Half of them are drawn alike, as fine details need
drawing, too; half as the four curves of chapter 07 rise, of background, relation, colour and shape, each with
the same weight. Compared with the model with both aids from before, after equally many steps.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from lecture26.kit.evaluation import read
from lecture26.kit.processes import process_state
from lecture26.kit.readers import Reader, canonical
from lecture26.kit.sample_draws import SampleDraws
from lecture26.kit.shapes import Scenes
from lecture26.latent_diffusion import TextAttention, TextDenoiser, share_of_wrong_guesses
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
BY_RISE = {"both, steps by the rise": {"coordinates": True, "lesson": 3.0, "by_rise": True}}
WORDS = ("background", "relation", "colour_1", "shape_1")  # whose silence makes the density of the steps


@dataclass(frozen=True, kw_only=True)
class PlacingRecipe(LatentDiffusionRecipe):
    """Text to image from latents, whose places may not be told where they are.

    Attributes:
        coordinates: whether they are. If not, the matrix that would tell them is zero, and stays so.
        by_rise: whether half of the steps are drawn as words fall silent; if not, all steps are drawn alike.
    """

    family: ClassVar[str] = "placing"

    coordinates: bool
    by_rise: bool = False

    def build(self) -> nn.Module:
        model = super().build()
        if not self.coordinates:
            for module in model.modules():
                if isinstance(module, TextAttention):
                    nn.init.zeros_(module.where.weight).requires_grad_(False)
        return model

    def draw(self, images: EncodedImages, random: SampleDraws) -> dict[str, Tensor]:
        batch = super().draw(images, random)
        if not self.by_rise:
            return batch
        # the step below which a share u of the density lies
        return batch | {"t": torch.searchsorted(self._shares_below, random.uniform(), right=True)}

    @cached_property
    def _shares_below(self) -> Tensor:
        """The share of the density of t at and below each step, rising to 1: (T,)."""
        vae, scenes = load_model(self.vae), self.load_images("test").images.parts[1]

        def encode(images: Tensor) -> Tensor:
            return self.latent_scale * vae.encode(images)[0]

        pairs = [one_word_apart(encode, scenes, word) for word in WORDS]
        return even_and_rising(self.diffusion.alpha_bar, pairs)


def one_word_apart(
    encode: Callable[[Tensor], Tensor], scenes: Scenes, label: str, count: int = 32
) -> tuple[Tensor, Tensor]:
    """Latents of `count` scenes, and of the same scenes with the next value of one label.

    encode: encode(images (B, C, H, W)) -> scaled latents.
    """
    attributes = scenes.attributes(range(count))
    changed = (attributes[label] + 1) % len(scenes.labels[label])
    both = (attributes, attributes | {label: changed})
    with torch.no_grad():
        one, other = (encode(scenes.render(each, range(count))) for each in both)
    return one, other


def even_and_rising(alpha_bar: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """A distribution of steps: half of it even, half as often as words fall silent.

    Args:
        alpha_bar: of T steps, (T,).
        pairs: for each word latents z_a and z_b, (B, c, h, w) each, that differ in it.

    Returns:
        The share of the steps up to each one, (T,).
    """
    silence = torch.stack([share_of_wrong_guesses(*pair, alpha_bar).mean(dim=1) for pair in pairs])  # (W, T)
    rising = (silence / silence[:, -1:]).mean(dim=0)
    even = torch.arange(1, len(alpha_bar) + 1) / len(alpha_bar)
    return (even + rising) / 2


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
        recipe: of text to image; its number of images, of steps, rate and aids are replaced.
        reader: a reader's checkpoint for scenes.
        arms: `PlacingRecipe`'s coordinates, lesson and by_rise, by name.
        training_steps: of each arm.
        every: steps from one look to the next; a divisor of `training_steps`.
        look, final: how many scenes are drawn on the way and at the end, and with how many steps of DDIM.
        state: a name under which what is finished is kept, so that it resumes; None: nowhere.

    Returns:
        "recipe", "reader", "w", and "arms": for each "name", what the arm says, "seconds" of training, and
        "looks", each with "step", "num_samples", what `judged` says ("accuracy_relation" is the
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
        "num_encoded": 50_000,
        "steps": steps,
        "learning_rate": 1e-3,
        "decay_to": 1.0,
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
