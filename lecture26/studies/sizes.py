"""What nobody asked for: how large are the shapes that a guidance draws, and what does it do to distances?"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from lecture26.classifier_free_guidance import classifier_free_guided
from lecture26.classifier_guidance import classifier_guided
from lecture26.ddpm import ddpm_step
from lecture26.kit.evaluation import extract_features, frechet_distance, read, recall
from lecture26.kit.readers import Reader
from lecture26.recipes import Trained
from lecture26.studies.sweeps import BATCH_SIZE, NUM_SAMPLES, STEPS, Study

SHARES = (0.02, 0.1, 0.25, 0.5, 0.75, 0.86, 0.93, 0.98)  # of large shapes among real images
NUM_WITHIN = 192  # images of one size, for the distance within it; far fewer than half of NUM_SAMPLES
# (guidance, the denoiser that is guided, strength, interval): a strength is w for "classifier-free", and the
# gradient's scale for "classifier"
WAYS = (
    ("classifier-free", "conditional", 0.0, None),
    ("classifier-free", "conditional", 1.0, None),
    ("classifier-free", "conditional", 4.0, None),
    ("classifier-free", "conditional", 4.0, (0, 699)),
    ("classifier", "unconditional", 2.0, None),
    ("classifier", "unconditional", 8.0, None),
    ("classifier", "null", 2.0, None),
    ("classifier", "null", 5.0, None),
    ("classifier", "conditional", 1.0, None),
    ("classifier", "conditional", 4.0, None),
)


def sizes_under_guidance(
    model: str,
    conditional: str,
    classifier: str,
    reader: str,
    ways: tuple[tuple, ...] = WAYS,
    num_samples: int = NUM_SAMPLES,
    num_within: int = NUM_WITHIN,
    batch_size: int = BATCH_SIZE,
    steps: int = STEPS,
) -> dict:
    """Guidance by a classifier and by two answers, with the share of large shapes, which nobody asks for.

    Args:
        model: a checkpoint of an unconditional denoiser of images with a label "size".
        conditional: one of a conditional denoiser of the same images.
        classifier: one of a noisy classifier of them.
        reader: one of a reader of them.
        ways: the settings, as in WAYS.
        num_samples, batch_size, steps: of each, as `Study` has them, by ancestral sampling.
        num_within: how many large shapes are compared with as many real ones.

    Returns:
        The four names; "real": for several shares of large shapes among real images, what `_comparison` says
        of them; "within_large_real": that of real large shapes against other ones; and "runs": for each
        setting "guidance", "denoiser", "strength" and "interval", what `Study.run` says, "share_large", and
        "within_large", None where too few shapes are large; "contrast_large" and "contrast_large_real", the
        mean standard deviation of a picture with a large shape.
    """
    studies = {name: Study(checkpoint, reader, batch_size) for name, checkpoint in (
        ("unconditional", model), ("conditional", conditional)
    )}  # fmt: skip
    told = studies["conditional"]
    recipe = told.recipe
    noisy = Trained(classifier)
    noisy_network = noisy.network.to(told.device)
    images = recipe.load_images("test")
    large = images.labels["size"].index("large")

    def guide(
        guidance: str, denoiser: str, strength: float, interval: tuple | None, wanted: dict[str, Tensor]
    ) -> tuple[Callable, Callable]:
        cond = recipe.conditions(wanted)
        null_cond = recipe.null_conditions(len(cond)).to(told.device)
        if guidance == "classifier-free":
            way = classifier_free_guided(told.network, cond, null_cond, strength, interval=interval)
            return way, ddpm_step
        network = {
            "unconditional": studies["unconditional"].network,
            "null": partial(told.network, cond=null_cond),
            "conditional": partial(told.network, cond=cond),
        }[denoiser]
        y = noisy.recipe.classes(wanted)
        return classifier_guided(network, noisy_network, y, strength, told.diffusion), ddpm_step

    first = range(num_samples)
    is_large = images.attributes(range(len(images)))["size"] == large  # of all test images
    reference = _features(told.judge, images, torch.tensor(first))
    others = torch.arange(num_samples, len(images))
    large_ones, small_ones = others[is_large[others]], others[~is_large[others]]
    reference_large = reference[is_large[first]][:num_within]

    def with_share(share: float) -> dict:
        count = round(share * num_samples)
        chosen = torch.cat([large_ones[:count], small_ones[: num_samples - count]])
        return {"share_large": share} | _comparison(reference, _features(told.judge, images, chosen))

    def sizes(samples: Tensor) -> dict:
        shown = read(told.judge, samples).predicted["size"] == large
        of_large = samples[shown][:num_within]
        enough = len(of_large) == num_within
        within = _comparison(reference_large, extract_features(told.judge, of_large)) if enough else None
        return {
            "share_large": shown.double().mean().item(),
            "within_large": within,
            "contrast_large": _contrast(samples[shown]),
        }

    runs = []
    for setting in tqdm(ways, "sampling", unit="run"):
        guidance, denoiser, strength, interval = setting
        study = studies.get(denoiser, told)
        measured = study.run(
            partial(guide, *setting), steps, num_samples, labels=recipe.labels, further=sizes
        )
        runs.append(
            {"guidance": guidance, "denoiser": denoiser, "strength": strength, "interval": interval}
            | measured
        )
    return {
        "model": model,
        "conditional": conditional,
        "classifier": classifier,
        "reader": reader,
        "real": [with_share(share) for share in SHARES],
        "within_large_real": _comparison(
            reference_large, _features(told.judge, images, large_ones[: len(reference_large)])
        ),
        "contrast_large_real": _contrast(images.batch(torch.tensor(first)[is_large[first]])["image"]),
        "runs": runs,
    }


def _features(reader: Reader, images, indices: Tensor) -> Tensor:
    """A reader's features of some images of a set."""
    return extract_features(reader, images.batch(indices)["image"])


def _comparison(real: Tensor, drawn: Tensor) -> dict[str, float]:
    """ "frechet_distance" and "recall" of features drawn (M, F) against real ones (N, F)."""
    return {"frechet_distance": frechet_distance(real, drawn), "recall": recall(real, drawn)}


def _contrast(pictures: Tensor) -> float:
    """The mean over pictures (B, C, H, W) of the standard deviation of all numbers of one."""
    return pictures.flatten(1).std(dim=1).mean().item()
