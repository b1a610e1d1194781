"""What a text-to-image model draws of what it is asked for: a measurement of chapter 07."""

import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lecture26.kit.evaluation import (
    attribute_accuracy,
    extract_features,
    frechet_distance,
    frechet_distance_error,
    read,
    sample_quality,
)
from lecture26.kit.image_set import ImageSet
from lecture26.kit.processes import process_state
from lecture26.kit.readers import Reader, canonical
from lecture26.latent_diffusion import LatentDiffusion
from lecture26.recipes import Trained, load_model
from lecture26.recipes.latent import draw_captions, pipeline_of
from lecture26.studies.ledger import Ledger, ledger_file

BATCH_SIZE = 64  # also of the notebook's small version, which draws the first batch
STEPS = 50
NUM_SAMPLES = 512
ERROR_GROUPS = 16  # of images, each left out once, for the error of a distance
WEIGHT = 2.0  # at which held-out pairs are asked for as well
WEIGHTS = (0.0, 1.0, 2.0, 4.0, 8.0)
PARTS = ("shapes", "scenes")

RIGHT = "right"
NOT_TWO = "not two objects"
SWAPPED = "attributes swapped"
MISPLACED = "placed otherwise"
OTHER = "other"


def text_to_image_evaluation(
    model: str,
    readers: Mapping[str, str],
    weights: Sequence[float] = WEIGHTS,
    num_samples: int = NUM_SAMPLES,
    batch_size: int = BATCH_SIZE,
    steps: int = STEPS,
    state: str | None = None,
) -> dict:
    """Is what a caption says drawn? By weight; at one weight also for held-out pairs, with failures counted.

    Sample i is asked for what image i of the data shows, and always starts from the same noise.

    Args:
        model: a checkpoint of text to image.
        readers: a reader's checkpoint for "shapes" and one for "scenes".
        weights: w of the sweep.
        num_samples: images of each part, split and weight; a multiple of the batch size.
        batch_size: images drawn at once.
        steps: of DDIM.
        state: a name under which finished settings are kept, until `forget_ledger`; None keeps none.

    Returns:
        "model", "readers", "w" (WEIGHT), "steps", and "runs": for each setting "part" ("shapes" or "scenes"),
        "split", "w", "num_samples", "seconds_per_image" (of the fastest batch), what `sample_quality` and
        `judged` say; "against_others", the Fréchet "distance" to as many other images, whose captions were
        not asked for, and its "error"; and "first_batch": what `sample_quality` and `judged` say of the first
        batch alone.
    """
    checkpoint = Trained(model)
    recipe, pipeline = checkpoint.recipe, pipeline_of(checkpoint).to(process_state().device)
    judges = {part: load_model(name).to(process_state().device) for part, name in readers.items()}
    sets = {split: recipe.load_images(split).images.parts for split in ("test", "held_out")}
    about = {"model": checkpoint.card["sha256"], "num_samples": num_samples, "steps": steps}
    ledger = Ledger(None if state is None else ledger_file(state), about)

    def run(part: str, split: str, w: float) -> dict:
        images, judge = sets[split][PARTS.index(part)], judges[part]
        captions, wanted = images.captions(range(num_samples)), images.attributes(range(num_samples))
        drawn, seconds = draw_timed(pipeline, captions, w, steps, batch_size)

        def quality(count: int) -> dict:
            asked = {name: values[:count] for name, values in wanted.items()}
            return sample_quality(judge, drawn[:count], images) | judged(judge, drawn[:count], asked)

        return {
            "part": part,
            "split": split,
            "w": w,
            "num_samples": num_samples,
            "seconds_per_image": seconds,
            **quality(num_samples),
            "against_others": against_others(judge, drawn, images),
            "first_batch": quality(batch_size),
        }

    settings = [(part, "test", w) for w in weights for part in PARTS]
    settings += [(part, "held_out", WEIGHT) for part in PARTS]
    runs = [
        ledger.once(str(setting), lambda setting=setting: run(*setting))
        for setting in tqdm(settings, "sampling", unit="run")
    ]
    return {"model": model, "readers": dict(readers), "w": WEIGHT, "steps": steps, "runs": runs}


def against_others(reader: Reader, drawn: Tensor, images: ImageSet) -> dict[str, float]:
    """The Fréchet "distance" of N drawn images to the second N of a set, and its "error".

    They were asked for what the first N show; of the second N they share no caption but by chance.
    """
    indices = torch.arange(len(drawn), 2 * len(drawn))
    real = extract_features(reader, images.batch(indices)["image"])
    of_drawn = extract_features(reader, drawn)
    return {
        "distance": frechet_distance(real, of_drawn),
        "error": frechet_distance_error(real, of_drawn, len(drawn) // ERROR_GROUPS),
    }


def draw_timed(
    pipeline: LatentDiffusion, captions: Sequence[str], w: float, steps: int, batch_size: int
) -> tuple[Tensor, float]:
    """What `draw_captions` draws, batch by batch, and the seconds per image of the fastest batch."""
    batches, seconds = [], []
    for first in range(0, len(captions), batch_size):
        part = captions[first : first + batch_size]
        started = time.monotonic()
        batches.append(draw_captions(pipeline, part, w, steps, batch_size, first_seed=first))
        seconds.append((time.monotonic() - started) / len(part))
    return torch.cat(batches), min(seconds)


def judged(reader: Reader, drawn: Tensor, wanted: Mapping[str, Tensor]) -> dict:
    """What a reader says of images that were asked to show certain attributes.

    Returns:
        "accuracy_LABEL" and "accuracy_all"; for scenes also "accuracy_asked" and "outcomes".
    """
    accuracy = attribute_accuracy(reader, drawn, wanted)
    measured = {f"accuracy_{name}": share for name, share in accuracy.items()}
    if "relation" in wanted:
        outcomes = scene_outcomes(reader, drawn, wanted)
        measured["outcomes"] = {name: outcomes.count(name) for name in sorted(set(outcomes))}
        measured["accuracy_asked"] = outcomes.count(RIGHT) / len(outcomes)
    return measured


def scene_outcomes(reader: Reader, drawn: Tensor, wanted: Mapping[str, Tensor]) -> list[str]:
    """What became of each scene that was asked for, sizes and background left aside.

    Args:
        reader: of scenes.
        drawn: images, (B, 3, 64, 64).
        wanted: their attributes, by label.

    Returns:
        For each image the first that holds of: RIGHT, both shapes, both colours and the relation are as
        wanted; NOT_TWO, there are not two objects (see `count_objects`); MISPLACED, they are the two wanted,
        but stand otherwise; SWAPPED, both shapes and both colours are there, but not together as wanted;
        OTHER.
    """
    seen, asked = read(reader, drawn).predicted, canonical(wanted)
    counts = count_objects(drawn).tolist()

    def objects(attributes: Mapping[str, Tensor], image: int) -> list[tuple[int, int]]:
        return [
            (attributes[f"shape_{n}"][image].item(), attributes[f"colour_{n}"][image].item()) for n in (1, 2)
        ]

    outcomes = []
    for image, count in enumerate(counts):
        found, wished = objects(seen, image), objects(asked, image)
        if found == wished and seen["relation"][image] == asked["relation"][image]:
            outcomes.append(RIGHT)
        elif count != 2:
            outcomes.append(NOT_TWO)
        elif sorted(found) == sorted(wished):
            outcomes.append(MISPLACED)
        elif all(
            sorted(a) == sorted(b)
            for a, b in zip(zip(*found, strict=True), zip(*wished, strict=True), strict=True)
        ):
            outcomes.append(SWAPPED)
        else:
            outcomes.append(OTHER)
    return outcomes


def count_objects(images: Tensor, saturation: float = 0.4, pixels: int = 24) -> Tensor:
    """How many coloured objects there are on a grey background: connected areas of coloured pixels.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        saturation: a pixel is coloured if its largest and its smallest channel differ by more than this.
        pixels: areas of fewer pixels do not count.

    Returns:
        (B,) int64.
    """
    from scipy import ndimage  # takes half a second to import

    is_coloured = images.amax(dim=1) - images.amin(dim=1) > saturation  # (B, H, W)
    counts = []
    for mask in is_coloured.cpu().numpy():
        areas, _ = ndimage.label(mask, np.ones((3, 3)))  # neighbours across a corner belong together
        counts.append(int((np.bincount(areas.ravel())[1:] >= pixels).sum()))
    return torch.tensor(counts)
