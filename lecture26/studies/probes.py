"""What a linear head can read of a frozen backbone once it is solved, not trained for some steps."""

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d
from tqdm import tqdm

from lecture26.kit.image_set import ImageSet
from lecture26.kit.results import load_results
from lecture26.recipes import Trained
from lecture26.recipes.adaptation import NUM_PROMPTS, SMALL_BUDGET, Budget, build, fit, open_task
from lecture26.studies.adaptation import EVALUATION_BATCH
from lecture26.studies.ledger import Ledger, ledger_file

INVERSE_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # scikit-learn's C


def quarters(tokens: Tensor) -> Tensor:
    """The means over each quarter of a square of patches, side by side: (B, N, d) -> (B, 4 d)."""
    side = math.isqrt(tokens.shape[1])
    return adaptive_avg_pool2d(tokens.mT.unflatten(2, (side, side)), 2).flatten(1)


# What a head may read of a backbone's tokens (B, 1 + N, d), which are the class token and N patches.
READINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "class token": lambda tokens: tokens[:, 0],
    "patches": lambda tokens: tokens[:, 1:].mean(dim=1),
    "quarters": lambda tokens: quarters(tokens[:, 1:]),
}


@torch.no_grad()
def see(network: Callable[[Tensor], Tensor], images: ImageSet) -> tuple[Tensor, Tensor]:
    """What a network returns for all images of a set, (N, ...), and their classes, (N,).

    The network takes images (B, 3, H, W), on the CPU.
    """
    batches = [images.batch(indices) for indices in torch.arange(len(images)).split(EVALUATION_BATCH)]
    classes = torch.cat([batch["class"] for batch in batches])
    return torch.cat([network(batch["image"]) for batch in batches]), classes


def solved_head(
    splits: dict[str, tuple[Tensor, Tensor]], inverse_penalties: Sequence[float] = INVERSE_PENALTIES
) -> float:
    """The test accuracy of a linear head on fixed features, its loss as small as it can be.

    For fixed features the loss is convex in the head's weights, and a solver finds its minimum. Before, each
    feature is standardised, which changes nothing but what a penalty on the weights means; how large that
    is, the validation images choose.

    Args:
        splits: features (N, F) and classes (N,) of "train", "validation" and "test".
        inverse_penalties: those to choose from.

    Returns:
        A number in [0, 1].
    """
    from sklearn.linear_model import LogisticRegression  # these take a second to import
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    heads = [
        make_pipeline(StandardScaler(), LogisticRegression(C=inverse, max_iter=2_000)).fit(*splits["train"])
        for inverse in inverse_penalties
    ]
    best = max(heads, key=lambda head: head.score(*splits["validation"]))
    return float(best.score(*splits["test"]))


def solved_by_reading(vit: nn.Module, splits: dict[str, ImageSet]) -> dict[str, float]:
    """What a solved head reaches on a task's test images for each of READINGS of a frozen backbone."""
    tokens = {split: see(vit.forward_features, images) for split, images in splits.items()}
    return {
        name: solved_head({split: (reading(seen), classes) for split, (seen, classes) in tokens.items()})
        for name, reading in READINGS.items()
    }


def solved_behind(model: nn.Module, splits: dict[str, ImageSet]) -> float:
    """The test accuracy of a solved head on the features that a trained model's own head reads."""
    headless = copy.deepcopy(model)
    headless.head = nn.Identity()
    return solved_head({split: see(headless, images) for split, images in splits.items()})


def solved_behind_prompts(
    vit: nn.Module, splits: dict[str, ImageSet], learning_rate: float, budget: Budget, seed: int
) -> dict[str, float]:
    """Train deep prompts; "accuracy", what `solved_behind` says of them."""
    model = build("vpt-deep", vit, len(splits["train"].labels["class"]), NUM_PROMPTS, seed)
    fit(model, splits["train"], learning_rate, budget, seed)
    return {"accuracy": solved_behind(model.eval().cpu(), splits)}


def solved_heads(
    backbone: str,
    tasks: Sequence[str],
    budget: Budget = SMALL_BUDGET,
    seeds: Sequence[int] = (0, 1, 2),
    state: str | None = None,
) -> dict:
    """Linear heads, solved to the end, on what a backbone sees without prompts and with them.

    Args:
        backbone: a checkpoint of the family "backbone", with a class token and a square of patches.
        tasks: what `open_task` takes; the comparison of each must be stored, which knows the learning rate.
        budget: of each training of deep prompts.
        seeds: of these trainings.
        state: a name under which finished trainings are kept, until `forget_ledger`; None keeps none.

    Returns:
        "backbone", "budget", "seeds", and "runs": for each task a dict of "task" and "accuracy", lists of
        accuracies on the test images: of one for each of READINGS of the frozen backbone, and of one for each
        seed behind "vpt-deep", which reads the class token.

    Raises:
        ValueError: if a comparison is not stored.
    """
    checkpoint = Trained(backbone)
    vit, image_size = checkpoint.network, checkpoint.recipe.image_size
    settings = {"backbone": checkpoint.card["sha256"], "budget": vars(budget)}
    ledger = Ledger(None if state is None else ledger_file(state), settings)
    runs = []
    for task in tqdm(tasks, "solving", unit="task"):
        splits = open_task(task, image_size)
        compared = load_results(f"adaptation_{Path(task).name}")["runs"]
        (rate,) = (run["learning_rate"] for run in compared if run["method"] == "vpt-deep")
        prompted = [
            ledger.once(
                f"{task}, {rate:g}, {seed}", partial(solved_behind_prompts, vit, splits, rate, budget, seed)
            )
            for seed in seeds
        ]
        solved = {reading: [accuracy] for reading, accuracy in solved_by_reading(vit, splits).items()}
        solved["vpt-deep"] = [run["accuracy"] for run in prompted]
        runs.append({"task": str(task), "accuracy": solved})
    return {"backbone": backbone, "budget": vars(budget), "seeds": list(seeds), "runs": runs}
