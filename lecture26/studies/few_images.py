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

Three more, written before their first runs, when of forty textures of each class only deep prompts and biases
had been seen. All are as the one before, but for what is said.
Kinds never seen: a backbone that was trained from nothing on every other one of the ten kinds of photographs,
in the order of their names (`vit_photos32_five`), adapted to the five others, upright. The paper's claim
would be seen as before; were it seen here and not on photographs upside down, what matters would be that the
task's kinds are new.
Longer: photographs upside down, deep prompts and full fine-tuning, 2,000 steps, which is 80 epochs; every 200
steps a look at the validation images, and the weights of the best look are kept. If the lead of full
fine-tuning were one of speed, it would shrink.
Where and how many: both tasks, textures first; deep prompts of 1 and of 32 in place of 8, and 8 in the first
or the last half of the blocks alone. Each is compared with 8 in all blocks. Jia et al. 2022 find that the
first blocks matter more.

One more, written when the longer runs on photographs and the shorter ones on textures had been seen. Longer,
on the textures too, where deep prompts are furthest behind full fine-tuning, by 29 points, and may have had
too few steps. Were they slow learners, they would gain on their own 800 steps there, and full fine-tuning's
lead would shrink.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from lecture26.kit.downstream import UpsideDown
from lecture26.kit.image_set import ImageSet
from lecture26.recipes import Trained
from lecture26.recipes.adaptation import (
    METHODS,
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
from lecture26.studies.probes import INVERSE_PENALTIES, READINGS, see, solved_behind, solved_head
from lecture26.visual_prompt_tuning import VPT, prompted_blocks

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
LONGER = FORTY_OF_EACH | {
    "methods": ("vpt-deep", "full"),
    "budget": replace(FORTY_OF_EACH["budget"], steps=2_000),
    "look_every": 200,
}
HOW_MANY = FORTY_OF_EACH | {"methods": ("vpt-deep",), "prompt_counts": (1, 32)}
WHERE = FORTY_OF_EACH | {"methods": ("vpt-first-half", "vpt-last-half")}


class VPTInSomeBlocks(VPT):
    """VPT-deep with prompts for some of the blocks.

    Ahead of the first of these no prompts stand among the tokens; behind the last its own go on as tokens, as
    those of VPT-shallow do.

    Args:
        vit, num_classes, num_prompts: as `VPT` takes them.
        first, last: the shares of the blocks where the prompted ones begin and end, 0 <= first < last <= 1.

    Source: Jia et al. 2022, section 4.3, prompt depth.
    """

    def __init__(self, vit: nn.Module, num_classes: int, num_prompts: int, first: float, last: float):
        super().__init__(vit, num_classes, num_prompts, deep=True)
        self.first, end = (round(share * len(vit.blocks)) for share in (first, last))
        self.prompts = nn.Parameter(self.prompts[self.first : end].detach().clone())

    def forward_features(self, x: Tensor) -> Tensor:
        vit = self.vit
        tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(x)))  # (B, 1 + N, d)
        tokens = vit.blocks[: self.first](tokens)
        return vit.norm(
            prompted_blocks(vit.blocks[self.first :], tokens, self.prompts, vit.num_prefix_tokens)
        )


HALVES = {  # of the blocks, beside METHODS
    "vpt-first-half": replace(METHODS["vpt-deep"], build=partial(VPTInSomeBlocks, first=0, last=0.5)),
    "vpt-last-half": replace(METHODS["vpt-deep"], build=partial(VPTInSomeBlocks, first=0.5, last=1)),
}


def photographs_upside_down(image_size: int) -> dict[str, ImageSet]:
    """The three splits of the folder ./photos, upside down."""
    return {split: UpsideDown(images) for split, images in open_task("./photos", image_size).items()}


def photographs_of_other_kinds(image_size: int) -> dict[str, ImageSet]:
    """The three splits of the folder ./photos_other, whose kinds `vit_photos32_five` has never seen."""
    return open_task("./photos_other", image_size)


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
    prompt_counts: Sequence[int] = (NUM_PROMPTS,),
    look_every: int | None = None,
    state: str | None = None,
) -> dict:
    """Compare methods on few images of each class, and heads solved on the same images.

    Args:
        backbone: a checkpoint of the family "backbone", with a class token and a square of patches.
        open_splits: open_splits(image_size) -> the task's images by split.
        methods: of `lecture26.recipes.adaptation.METHODS`, or of HALVES.
        per_class: how many training images of each class a seed draws.
        budget, search, seeds, weight_decays: as `lecture26.studies.adaptation.Comparison` has them.
        prompt_counts: n, each tried with the methods that have prompts; the others run once.
        look_every: as `Comparison` has it.
        state: a name under which finished runs are kept, until `forget_ledger`; None keeps none.

    Returns:
        "backbone", "per_class", "budget", "search", "seeds"; "runs", for each method and number of prompts
        what `Comparison.run` says, with heads solved behind what was trained; "solved", by the names of
        READINGS, for each seed the test accuracy of a head solved on the frozen backbone;
        "solved_without_penalty", the same of the class token.

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
        "look_every": look_every,
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
        methods=METHODS | HALVES,
        look_every=look_every,
    )
    return {
        "backbone": backbone,
        "per_class": per_class,
        "budget": vars(budget),
        "search": vars(search),
        "seeds": list(seeds),
        **solved_from_few(comparison),
        "runs": [
            comparison.run(method, count)
            for method in methods
            for count in (prompt_counts if comparison.methods[method].has_prompts else prompt_counts[:1])
        ],
    }


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
