"""What a text-to-image model draws of what it is asked for: a measurement of chapter 07."""

import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lecture26.kit.evaluation import attribute_accuracy, read, sample_quality
from lecture26.kit.processes import process_state
from lecture26.kit.readers import Reader, canonical
from lecture26.latent_diffusion import LatentDiffusion
from lecture26.recipes import Trained, load_model
from lecture26.recipes.latent import draw_captions, pipeline_of

BATCH_SIZE = 64  # also of the notebook's small version, which draws the first batch
STEPS = 50
NUM_SAMPLES = 512
WEIGHT = 2.0  # at which all NUM_SAMPLES are drawn, and held-out pairs asked for
SWEEP_WEIGHTS = (0.0, 1.0, 2.0, 4.0, 8.0)
SWEEP_SAMPLES = 64
PARTS = ("shapes", "scenes")

RIGHT = "right"
NOT_TWO = "not two objects"
SWAPPED = "attributes swapped"
MISPLACED = "placed otherwise"
OTHER = "other"


def text_to_image_evaluation(
    model: str,
    readers: Mapping[str, str],
    weights: Sequence[float] = SWEEP_WEIGHTS,
    sweep_samples: int = SWEEP_SAMPLES,
    num_samples: int = NUM_SAMPLES,
    batch_size: int = BATCH_SIZE,
    steps: int = STEPS,
) -> dict:
    """Is what a caption says drawn? By weight; at one weight also for held-out pairs, with failures counted.

    Sample i is asked for what image i of the data shows, and always starts from the same noise.

    Args:
        model: a checkpoint of text to image.
        readers: a reader's checkpoint for "shapes" and one for "scenes".
        weights: w of the sweep.
        sweep_samples: images of each part for each weight of the sweep; a multiple of the batch size.
        num_samples: images of each part and split at WEIGHT.
        batch_size: images drawn at once.
        steps: of DDIM.

    Returns:
        "model", "readers", "w" (WEIGHT), "steps", and "runs": for each setting "part" ("shapes" or "scenes"),
        "split", "w", "num_samples", "seconds_per_image" (of the fastest batch), what `sample_quality` says,
        "accuracy_LABEL" and "accuracy_all" for each label; for scenes also "accuracy_asked", of both shapes,
        both colours and the relation together, and "outcomes", how many images have each of the outcomes of
        `scene_outcomes`; "first_batch": the accuracies of the first batch alone; and "sweep": what
        `sample_quality` says of the first `sweep_samples`, so that weights can be compared.
    """
    checkpoint = Trained(model)
    recipe, pipeline = checkpoint.recipe, pipeline_of(checkpoint).to(process_state().device)
    judges = {part: load_model(name).to(process_state().device) for part, name in readers.items()}
    sets = {split: recipe.load_images(split).images.parts for split in ("test", "held_out")}
    settings = [(part, "test", w, sweep_samples) for w in weights if w != WEIGHT for part in PARTS]
    settings += [(part, split, WEIGHT, num_samples) for split in sets for part in PARTS]
    runs = []
    for part, split, w, count in tqdm(settings, "sampling", unit="run"):
        images = sets[split][PARTS.index(part)]
        captions, wanted = images.captions(range(count)), images.attributes(range(count))
        drawn, seconds = draw_timed(pipeline, captions, w, steps, batch_size)
        run = {"part": part, "split": split, "w": w, "num_samples": count}
        run |= {"seconds_per_image": seconds} | sample_quality(judges[part], drawn, images)
        run |= judged(judges[part], drawn, wanted)
        run["sweep"] = sample_quality(judges[part], drawn[:sweep_samples], images)
        first = {name: values[:batch_size] for name, values in wanted.items()}
        runs.append(run | {"first_batch": judged(judges[part], drawn[:batch_size], first)})
    return {"model": model, "readers": dict(readers), "w": WEIGHT, "steps": steps, "runs": runs}


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
