"""What a text-to-image model draws, and what it costs: measurements of chapter 07."""

import base64
import io
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from lecture26.classifier_free_guidance import classifier_free_guided
from lecture26.ddpm import Diffusion, ddim_step, sample
from lecture26.kit.checkpoints import load_card
from lecture26.kit.evaluation import attribute_accuracy, read, sample_quality
from lecture26.kit.image_set import ImageSet
from lecture26.kit.precision import choose_precision, say
from lecture26.kit.processes import process_state
from lecture26.kit.readers import Reader, canonical
from lecture26.kit.sample_draws import SampleDraws
from lecture26.kit.shapes import SIDES
from lecture26.latent_diffusion import LatentDiffusion, TextAttention, TextDenoiser, TextEncoder
from lecture26.recipes import Trained, find_recipe, load_model
from lecture26.recipes.latent import (
    EncodedImages,
    LatentDiffusionRecipe,
    draw_captions,
    pipeline_of,
)
from lecture26.recipes.recipe import seeded, train_network
from lecture26.unet import UNet

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

EQUAL_SECONDS = 240.0  # of training for each of the models compared
EQUAL_SAMPLES = 128  # of each part
EQUAL_STEPS = 25
EQUAL_ENCODED = 10_000
EQUAL_TIMED_STEPS = 5
RENDERING_BATCH = 256
PICTURES = 8
# The network of latents, with one or two more levels in front of its own: as many as the sides are longer.
PIXEL_MODELS = {
    "pixels": {
        "base_channels": 32,
        "channel_multipliers": (1, 1, 1, 2, 4),
        "num_blocks": 1,
        "attention_levels": (2, 3, 4),
    },
    "pixels, 2 x 2 folded": {
        "base_channels": 32,
        "channel_multipliers": (1, 1, 2, 4),
        "num_blocks": 1,
        "attention_levels": (1, 2, 3),
        "patch_size": 2,
    },
}


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


class KeptImages(EncodedImages):
    """Encoded images whose pixels are kept in memory as well, once they have been asked for."""

    def batch(self, indices: Tensor | Sequence[int]) -> dict[str, Tensor]:
        return {"image": self.kept(indices)}

    @cached_property
    def _pixels(self) -> Tensor:
        """Of all images, (N, C, H, W) uint8."""
        parts = torch.arange(len(self)).split(RENDERING_BATCH)
        rendered = [self.images.batch(indices)["image"] for indices in tqdm(parts, "rendering", unit="batch")]
        return torch.cat([((image + 1) * 127.5).round().to(torch.uint8) for image in rendered])

    def kept(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Some of the images, (B, C, H, W) in [-1, 1]."""
        return self._pixels[self._checked(indices)].float() / 127.5 - 1


@dataclass(frozen=True, kw_only=True)
class PixelRecipe(LatentDiffusionRecipe):
    """The same model of pixels: nothing is encoded, and the images are kept in memory instead."""

    family: ClassVar[str] = "pixel_diffusion"

    def build(self) -> nn.Module:
        text_encoder = TextEncoder(self.tokenizer, **self.text)
        attention = partial(TextAttention, context_dim=text_encoder.width, **self.attention)
        unet = UNet(self.channels, attention=attention, **self.model)
        model = TextDenoiser(unet, text_encoder, len(SIDES))
        return model.to(memory_format=torch.channels_last)  # as the pipeline is

    def draw_x_0(self, images: KeptImages, indices: Tensor, random: SampleDraws) -> Tensor:
        return images.kept(indices)


def pixel_against_latent(
    recipe: str,
    readers: Mapping[str, str],
    seconds: float = EQUAL_SECONDS,
    num_samples: int = EQUAL_SAMPLES,
    batch_size: int = BATCH_SIZE,
    steps: int = EQUAL_STEPS,
    num_encoded: int = EQUAL_ENCODED,
    pixel_models: Mapping[str, dict] = PIXEL_MODELS,
) -> dict:
    """One text-to-image model of latents and two of pixels, trained for the same time: cost and quality.

    All draw their steps evenly, since what (7.11) says of latents need not hold for pixels.

    Args:
        recipe: of text to image.
        readers: a reader's checkpoint for "shapes" and one for "scenes".
        seconds: of training for each model; for that of latents, encoding its images is a part of it.
        num_samples: images of each part that are drawn.
        batch_size: of training and sampling.
        steps: of DDIM.
        num_encoded: how many training images there are, for all three models.
        pixel_models: the arguments of the U-Nets of pixels, by their names here.

    Returns:
        "recipe", "readers", "seconds", "w", "steps", "batch_size", "num_samples" and "num_images"; "vae":
        name, seconds of training and parameters of the VAE; and "models": for each a dict of "name",
        "precision", in which its steps are faster, "parameters", "gflops_per_step", "seconds_per_step" (the
        median of a few), "activation_bytes" that a step keeps for its backward pass, "encoding_seconds",
        "training_steps", "training_seconds", and for each part "PART_sampling_seconds_per_image", decoding
        included, "PART_NAME" for what `judged` and `sample_quality` say, and "PART_pictures", a PNG of the
        first samples in base64.
    """
    base = find_recipe(recipe)
    base = replace(base, num_encoded=num_encoded, batch_size=batch_size, words_first=False)
    images = KeptImages(base.load_images("train").images, base.vae, num_encoded)
    images.kept([0])  # renders them all, which is no part of anybody's time
    unseen = base.load_images("test")
    base = base.fitted_to(images)
    settings = base.settings()
    recipes = {"latents": base}
    recipes |= {n: PixelRecipe(**settings | {"model": model}) for n, model in pixel_models.items()}
    judges = {part: load_model(name) for part, name in readers.items()}
    models = []
    for name, each in tqdm(recipes.items(), "models"):
        started = time.monotonic()
        each.draw(images, SampleDraws(0, torch.arange(1)))  # encodes all images, for the model of latents
        encoding = time.monotonic() - started if each is base else 0.0
        each = in_faster_precision(each, images)
        cost = step_cost(each, images)
        num_steps = max(1, int((seconds - encoding) / cost["seconds_per_step"]))
        warmup_steps = min(each.warmup_steps, num_steps // 10)
        from_nothing = replace(each, start=None, steps=num_steps, warmup_steps=warmup_steps)
        model, history = train_network(from_nothing, images)
        measured = cost | {
            "precision": each.precision,
            "encoding_seconds": encoding,
            "training_steps": num_steps,
            "training_seconds": history.seconds,
        }
        draw = drawer(each, model.cpu(), steps, batch_size)
        for part, of_part in zip(PARTS, unseen.images.parts, strict=True):
            drawn, per_image = draw(of_part.captions(range(num_samples)))
            wanted = of_part.attributes(range(num_samples))
            quality = judged(judges[part], drawn, wanted) | sample_quality(judges[part], drawn, of_part)
            measured |= {f"{part}_{key}": value for key, value in quality.items()}
            measured |= {
                f"{part}_sampling_seconds_per_image": per_image,
                f"{part}_pictures": png(drawn[:PICTURES]),
            }
        models.append({"name": name} | measured)
    card = load_card(base.vae)
    return {
        "recipe": recipe,
        "readers": dict(readers),
        "seconds": seconds,
        "w": WEIGHT,
        "steps": steps,
        "batch_size": batch_size,
        "num_samples": num_samples,
        "num_images": len(images),
        "vae": {"name": base.vae, "seconds": card["seconds"], "parameters": card["parameters"]},
        "models": models,
    }


def in_faster_precision(recipe: LatentDiffusionRecipe, images: ImageSet) -> LatentDiffusionRecipe:
    """A recipe whose precision is decided: one that leaves it open gets that in which it is faster."""
    if recipe.precision != "auto":
        return recipe
    device = process_state().device
    batch = recipe.draw(images, SampleDraws(0, torch.arange(recipe.batch_size)))
    batch = {name: values.to(device) for name, values in batch.items()}
    choice = choose_precision(seeded(recipe.seed, recipe.build).to(device), batch, recipe.loss)
    say(choice)
    return replace(recipe, precision=choice.precision)


def step_cost(recipe: LatentDiffusionRecipe, images: ImageSet) -> dict:
    """What a training step costs: "parameters", "gflops_per_step", "seconds_per_step", "activation_bytes"."""
    device = process_state().device  # that of the training, whose steps these are to foretell
    model = seeded(recipe.seed, recipe.build).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}  # bytes of each storage that the backward pass needs

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def step(number: int) -> float:
        started = time.monotonic()
        batch = recipe.draw(images, SampleDraws(number, torch.arange(recipe.batch_size)))
        batch = {name: value.to(device) for name, value in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            loss = recipe.loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return time.monotonic() - started

    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
    ):
        step(0)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "gflops_per_step": counter.get_total_flops() / 1e9,
        "seconds_per_step": statistics.median(step(number) for number in range(1, 1 + EQUAL_TIMED_STEPS)),
        "activation_bytes": sum(kept.values()),
    }


def drawer(recipe: LatentDiffusionRecipe, model: TextDenoiser, steps: int, batch_size: int) -> Callable:
    """draw(captions) -> images (B, 3, H, W) and the seconds per image of the fastest batch.

    Networks compute in the precision of their training.
    """
    precision = partial(torch.autocast, "cpu", torch.bfloat16, enabled=recipe.precision == "bf16")
    if not isinstance(recipe, PixelRecipe):
        pipeline = recipe.pipeline(model)

        def draw_batch(captions: Sequence[str], generator: torch.Generator) -> Tensor:
            return pipeline.text_to_image(captions, w=WEIGHT, steps=steps, generator=generator)

    else:
        diffusion = Diffusion(recipe.diffusion.betas, recipe.prediction, clip=True).respace(steps)

        def draw_batch(captions: Sequence[str], generator: torch.Generator) -> Tensor:
            cond, null_cond = (
                model.text_encoder(recipe.tokenizer(t)) for t in (captions, [""] * len(captions))
            )
            denoiser = classifier_free_guided(model.unet, cond, null_cond, WEIGHT)
            shape = (len(captions), recipe.channels, recipe.image_size, recipe.image_size)
            return sample(diffusion, denoiser, shape, ddim_step, generator)

    @torch.no_grad()
    def draw(captions: Sequence[str]) -> tuple[Tensor, float]:
        batches, seconds = [], []
        for first in range(0, len(captions), batch_size):
            part = captions[first : first + batch_size]
            started = time.monotonic()
            with precision():
                batches.append(draw_batch(part, torch.Generator().manual_seed(first)).float())
            seconds.append((time.monotonic() - started) / len(part))
        return torch.cat(batches), min(seconds)

    return draw


def png(images: Tensor) -> str:
    """Images in a row, as a PNG in base64."""
    from torchvision.utils import save_image  # takes a second to import

    file = io.BytesIO()
    save_image(images, file, nrow=len(images), normalize=True, value_range=(-1, 1), format="png")
    return base64.b64encode(file.getvalue()).decode("ascii")
