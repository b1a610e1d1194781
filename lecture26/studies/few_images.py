"""Adapting from few images of each class, the case that prompt tuning was made for (chapter 08).

The design, written before the first run. Ten images of each class, drawn anew by each of five seeds, and 600
steps of 16: about a hundred epochs, as many as Jia et al. 2022 give their thousand images. Two tasks: one
near to what the backbone has learned, its ten kinds of photographs, but upside down; one far from it,
textures. The learning rate is chosen by the validation images, with the first seed. A linear head on the
frozen backbone is solved to the end, for each of three readings, on the same images. Means over the seeds are
compared; as a seed gives all methods the same images, the error of a difference is that of the mean of the
five differences. Less than two of these is a tie.

Added after the first results, as a control: the head on the class token solved with next to no penalty, since
the others' weight decay was not searched for.

Forty of each class, written before its first run, for what that left open. Photographs upside down, forty
images of each class drawn anew by each of three seeds, 800 steps of 16: 32 epochs. Deep prompts, biases,
LoRA, full fine-tuning. The learning rate is chosen as before; then, at that rate, the weight decay. After its
training each network's head is solved anew as well, with a penalty that the validation images choose, as the
heads on the frozen backbone are: so no method is ahead by its head alone. Compared as before. The paper's
claim would be seen as deep prompts ahead of full fine-tuning.
"""

import copy
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from lecture26.kit.downstream import UpsideDown
from lecture26.kit.image_set import ImageSet
from lecture26.recipes import Trained
from lecture26.recipes.adaptation import (
    NUM_PROMPTS,
    SHORT_BUDGET,
    SMALL_BUDGET,
    WEIGHT_DECAY,
    Budget,
    open_task,
)
from lecture26.recipes.recipe import state_file
from lecture26.studies.adaptation import Comparison
from lecture26.studies.ledger import Ledger, ledger_file
from lecture26.studies.probes import INVERSE_PENALTIES, READINGS, see, solved_head

METHODS_FROM_FEW = ("vpt-shallow", "vpt-deep", "lora", "full")
PER_CLASS = 10
SEEDS = (0, 1, 2, 3, 4)
NO_PENALTY = (1e3,)  # scikit-learn's C: the loss keeps a minimum, which it would not have with none at all

FORTY_OF_EACH = {  # the second design, as `adaptation_from_few` takes it
    "methods": ("vpt-deep", "bias", "lora", "full"),
    "per_class": 40,
    "budget": Budget(steps=800, batch_size=16, precision="fp32"),
    "seeds": (0, 1, 2),
    "weight_decays": (WEIGHT_DECAY, 0.1, 1.0),
}


def photographs_upside_down(image_size: int) -> dict[str, ImageSet]:
    """The three splits of the folder ./photos, upside down."""
    return {split: UpsideDown(images) for split, images in open_task("./photos", image_size).items()}


def textures(image_size: int) -> dict[str, ImageSet]:
    """The three splits of the textures."""
    return open_task("textures", image_size)


def adaptation_from_few(
    backbone: str,
    open_splits: Callable[[int], dict[str, ImageSet]],
    methods: Sequence[str] = METHODS_FROM_FEW,
    per_class: int = PER_CLASS,
    budget: Budget = SMALL_BUDGET,
    search: Budget = SHORT_BUDGET,
    seeds: Sequence[int] = SEEDS,
    weight_decays: Sequence[float] = (WEIGHT_DECAY,),
    state: str | None = None,
) -> dict:
    """Compare methods on few images of each class, and heads solved on the same images.

    Args:
        backbone: a checkpoint of the family "backbone", with a class token and a square of patches.
        open_splits: open_splits(image_size) -> the task's images by split.
        methods: of `lecture26.recipes.adaptation.METHODS`.
        per_class: how many training images of each class a seed draws.
        budget, search, seeds, weight_decays: as `lecture26.studies.adaptation.Comparison` has them.
        state: a name under which finished runs are kept, until `forget_ledger`; None keeps none.

    Returns:
        "backbone", "per_class", "budget", "search", "seeds"; "runs", for each method what `Comparison.run`
        says, with heads solved behind what was trained; "solved", by the names of READINGS, for each seed the
        test accuracy of a head solved on the frozen backbone; "solved_without_penalty", the same of the class
        token.

    Raises:
        FileNotFoundError: if the task's folder is not there.
        ValueError: if a class has too few images.
    """
    checkpoint = Trained(backbone)
    splits = open_splits(checkpoint.recipe.image_size)
    settings = {
        "budget": vars(budget),
        "search": vars(search),
        "per_class": per_class,
        "weight_decays": weight_decays,
        "backbone": checkpoint.card["sha256"],
    }
    comparison = Comparison(
        checkpoint.network,
        splits,
        budget,
        seeds,
        ledger=Ledger(None if state is None else ledger_file(state), settings),
        state_file=None if state is None else state_file(state),
        search=search,
        per_class=per_class,
        weight_decays=weight_decays,
        solve=solved_behind,
    )
    return {
        "backbone": backbone,
        "per_class": per_class,
        "budget": vars(budget),
        "search": vars(search),
        "seeds": list(seeds),
        **solved_from_few(comparison),
        "runs": [comparison.run(method, NUM_PROMPTS) for method in methods],
    }


def solved_behind(model: nn.Module, splits: dict[str, ImageSet]) -> float:
    """The test accuracy of a solved head on the features that a trained model's own head reads."""
    headless = copy.deepcopy(model)
    headless.head = nn.Identity()
    return solved_head({split: see(headless, images) for split, images in splits.items()})


def solved_from_few(comparison: Comparison) -> dict:
    """What `adaptation_from_few` says of heads solved on each seed's training images."""
    look = comparison.vit.eval().forward_features
    same = {split: see(look, comparison.splits[split]) for split in ("validation", "test")}
    of_seed = [same | {"train": see(look, comparison.training_images(seed))} for seed in comparison.seeds]

    def solved(reading: Callable[[Tensor], Tensor], inverse_penalties: Sequence[float]) -> list[float]:
        return [
            solved_head(
                {split: (reading(tokens), classes) for split, (tokens, classes) in seen.items()},
                inverse_penalties,
            )
            for seen in of_seed
        ]

    return {
        "solved": {name: solved(reading, INVERSE_PENALTIES) for name, reading in READINGS.items()},
        "solved_without_penalty": solved(READINGS["class token"], NO_PENALTY),
    }
