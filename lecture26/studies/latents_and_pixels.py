"""Do latents save time, and against which model of pixels? Costs, and quality against time of training.

The design, written before the first run (chapter 07). Five models of single shapes at 64 pixels, without
words, so that a model can learn to draw within the hour. One recipe, chapter 02's: steps drawn so that
alpha_bar is uniform, a constant rate of 1e-3, 64 images a step, bfloat16. The network at 16 by 16 places is
chapter 02's. It works on latents with f = 4, and on pixels folded 4 by 4: there the two differ by what they
are shown alone, and cost about the same. With f = 8 it lacks its first level; in front of it, pixels folded 2
by 2 have one level more, plain ones two, of 32 channels and without attention.

Time is that of a training step, measured for all models in turn on one core, times the steps: so it does not
matter what else a machine does while they are trained. To that of latents belong the encoding of their
images, and the training of their autoencoder, which is told by itself, since other models can use it as well.
Each model is trained for 25 minutes. At seven times on the way it draws 512 images from the same noise (DDIM,
25 steps). A reader's features give the Fréchet distance to 512 real ones, and the share of images of which
every label is read with confidence. No model of latents can be better than what its decoder makes of real
images, which is measured the same way. The comparison is of the minutes to the same distance: that which the
slowest model to get there reaches at the end, and 50, 100 and 200. Each is trained once: other seeds may come
out otherwise. The error of a distance is that of drawing anew.

Added when the first model had drawn once: the looks after one and two minutes, since it was near after five.
Added when the folded pixels were seen to have too few plain backgrounds: at the end the two models that fold,
and latents with f = 8, draw with 100 steps as well, to tell what of their distance is owed to the 25.
"""

import base64
import io
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from lecture26.kit.checkpoints import load_card
from lecture26.kit.data import load
from lecture26.kit.evaluation import extract_features, frechet_distance_error, read, sample_quality
from lecture26.kit.image_set import ImageSet
from lecture26.kit.precision import autocast
from lecture26.kit.processes import process_state
from lecture26.kit.readers import Reader
from lecture26.kit.sample_draws import SampleDraws
from lecture26.latent_diffusion import from_latents, to_latents
from lecture26.recipes import Trained, load_model
from lecture26.recipes.ddpm import DDPM
from lecture26.recipes.latent import EncodedImages
from lecture26.recipes.recipe import Recipe, seeded, train_network
from lecture26.recipes.vae import round_trips
from lecture26.studies.ledger import Ledger, ledger_file, train_and_look
from lecture26.unet import UNet


def _network(*channel_multipliers: int, levels_in_front: int = 0, patch_size: int = 1) -> dict:
    """Chapter 02's U-Net, after some levels of its 32 base channels; attention is as without them."""
    multipliers = (*[1] * levels_in_front, *channel_multipliers)
    return {
        "base_channels": 32,
        "channel_multipliers": multipliers,
        "num_blocks": 1,
        "attention_levels": tuple(range(levels_in_front + 1, len(multipliers))),
        "patch_size": patch_size,
    }


MODELS = {
    "latents, f = 4": {"vae": "vae_shapes64", "model": _network(2, 2, 3)},
    "latents, f = 8": {"vae": "vae_shapes64_f8", "model": _network(2, 3)},
    "pixels, 4 x 4 folded": {"model": _network(2, 2, 3, patch_size=4)},
    "pixels, 2 x 2 folded": {"model": _network(2, 2, 3, levels_in_front=1, patch_size=2)},
    "pixels": {"model": _network(2, 2, 3, levels_in_front=2)},
}
LOOKS = (1, 2, 5, 10, 15, 20, 25)  # minutes of training, the last of them the end
NUM_SAMPLES, SAMPLING_STEPS = 512, 25
NUM_ENCODED = 50_000
TIMED_ROUNDS, TIMED_STEPS, TIMED_ENCODINGS = 5, 4, 256
MORE_STEPS = {  # of sampling, for the control
    "latents, f = 8": 100,
    "pixels, 4 x 4 folded": 100,
    "pixels, 2 x 2 folded": 100,
}
ERROR_GROUPS = 8  # of the samples, each of them left out once for the error of a distance
PICTURES = 8


@dataclass(frozen=True, kw_only=True)
class LatentDDPM(DDPM):
    """A U-Net that denoises the latents of images, without words.

    Attributes:
        vae: the checkpoint of the VAE; it is not trained.
    """

    family: ClassVar[str] = "latent_ddpm"

    vae: str
    clip: bool = False

    def build(self) -> nn.Module:
        return UNet(self.shape[0], **self.model)

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image's latents."""
        return Trained(self.vae).recipe.latent_shape

    @cached_property
    def latent_scale(self) -> float:
        """One over the standard deviation of the VAE's latents."""
        return load_card(self.vae)["metrics"]["latent_scale"]

    def draw_x_0(self, images: EncodedImages, random: SampleDraws) -> Tensor:
        mean, log_variance = images.moments(random.integers(len(images)))  # (B, c, h, w) each
        return to_latents(mean, log_variance, random.normal(*mean.shape[1:]), self.latent_scale)


def pixel_against_latent(
    reader: str,
    models: Mapping[str, Mapping] = MODELS,
    looks: Sequence[float] = LOOKS,
    num_samples: int = NUM_SAMPLES,
    sampling_steps: int = SAMPLING_STEPS,
    num_encoded: int = NUM_ENCODED,
    more_steps: Mapping[str, int] = MORE_STEPS,
    state: str | None = None,
) -> dict:
    """What a step of some models costs, and how far each gets in equally much time.

    Args:
        reader: a reader's checkpoint for single shapes.
        models: `LatentDDPM`'s vae and model, or `DDPM`'s model, by name.
        looks: after how many minutes of training each of them draws, rising; the last ends it.
        num_samples, sampling_steps: how many images it draws then, with how many steps of DDIM.
        num_encoded: how many images those of latents learn from; those of pixels learn from all there are.
        more_steps: of DDIM, by the names of models that draw with so many once more at the end.
        state: a name under which what is finished is kept, so that it resumes; None: nowhere.

    Returns:
        "reader", "num_samples", "sampling_steps", "num_encoded"; "costs": what `measure_costs` says;
        "reconstructed": what `sample_quality` says of real images after the round trip, by VAE; and "models":
        for each "name", "vae" (None for pixels), and "looks", each with "step", "seconds" of training so far,
        what `sample_quality` says, and "frechet_distance_error". The last one has "pictures", the first
        images as a PNG in base64; where there is to be one with more steps, also "backgrounds", as
        `count_backgrounds` says, and the same of the images drawn with more steps as "with_more_steps".
    """
    judge = load_model(reader).to(process_state().device)
    recipes = {name: _recipe(**settings) for name, settings in models.items()}
    images, unseen = (load("shapes", split=split, image_size=64) for split in ("train", "test"))
    settings = {
        "reader": reader,
        "num_samples": num_samples,
        "sampling_steps": sampling_steps,
        "num_encoded": num_encoded,
    }
    ledger = Ledger(None if state is None else ledger_file(state), settings | {"looks": looks})
    costs = ledger.once("costs", lambda: measure_costs(recipes, images, sampling_steps))
    reference = extract_features(judge, unseen.batch(range(num_samples))["image"])

    def run(name: str) -> dict:
        recipe, seconds = recipes[name], costs["models"][name]["seconds_per_step"]
        steps = [int(60 * minutes / seconds) for minutes in looks]

        def said_of(drawn: Tensor) -> dict:
            features, group = extract_features(judge, drawn), num_samples // ERROR_GROUPS
            error = frechet_distance_error(reference, features, group)
            return sample_quality(judge, drawn, unseen) | {"frechet_distance_error": error}

        def look_at(step: int, network: nn.Module) -> dict:
            drawn = draw_images(recipe, network, num_samples, sampling_steps)
            look = {"step": step, "seconds": step * seconds} | said_of(drawn)
            if step == steps[-1]:
                look["pictures"] = png(drawn[:PICTURES])
                if name in more_steps:
                    finer = draw_images(recipe, network, num_samples, more_steps[name])
                    look["backgrounds"] = count_backgrounds(judge, drawn)
                    look["with_more_steps"] = said_of(finer) | {
                        "sampling_steps": more_steps[name],
                        "backgrounds": count_backgrounds(judge, finer),
                    }
            return look

        trained, seen = replace(recipe, steps=steps[-1]), seen_by(recipe, images, num_encoded)
        named = recipe.settings() | {"num_encoded": num_encoded}
        found, _ = train_and_look(trained, seen, look_at, steps, ledger, name, state, named)
        return {"name": name, "vae": models[name].get("vae"), "looks": found}

    runs = [ledger.once(name, lambda name=name: run(name)) for name in models]
    reconstructed = {vae: after_round_trip(vae, judge, unseen, num_samples) for vae in costs["vaes"]}
    return settings | {"costs": costs, "reconstructed": reconstructed, "models": runs}


def _recipe(model: Mapping, vae: str | None = None) -> DDPM:
    """A model of the comparison; for how many steps it is trained is decided later."""
    settings = {
        "name": "pixel_against_latent",
        "data": "shapes",
        "image_size": 64,
        "model": dict(model),
        "steps": TIMED_STEPS,
        "learning_rate": 1e-3,
        "decay_to": 1.0,
        "density": "signal",
        "precision": "bf16",
    }
    return DDPM(**settings) if vae is None else LatentDDPM(**settings, vae=vae)


def seen_by(recipe: DDPM, images: ImageSet, num_encoded: int) -> ImageSet:
    """What a model learns from: the first images, encoded, or all of them as they are."""
    return EncodedImages(images, recipe.vae, num_encoded) if isinstance(recipe, LatentDDPM) else images


def measure_costs(recipes: Mapping[str, DDPM], images: ImageSet, sampling_steps: int) -> dict:
    """Time and memory of the models' steps, and of their VAEs', measured in turn.

    Args:
        recipes: of the models, by name.
        images: what they learn from.
        sampling_steps: with how many steps an image is drawn.

    Returns:
        "models": for each name what `count_costs` says, "seconds_per_step", of training, and
        "sampling_seconds_per_image", decoding included. "vaes": for each what `count_costs` says,
        "training_steps", "seconds_per_step", of its own training, and "encoding_seconds_per_image". Times are
        medians.
    """
    vaes = {recipe.vae: Trained(recipe.vae) for recipe in recipes.values() if isinstance(recipe, LatentDDPM)}
    seen = {name: seen_by(recipe, images, TIMED_ENCODINGS) for name, recipe in recipes.items()}
    costs = {
        "models": {name: count_costs(recipe, seen[name]) for name, recipe in recipes.items()},
        "vaes": {name: {"training_steps": vae.card["steps"]} for name, vae in vaes.items()},
    }
    timed = {}  # (kind, name, what): seconds, one by one
    for name, recipe in recipes.items():
        timed["models", name, "seconds_per_step"] = partial(seconds_of_step, recipe, seen[name])
        network = recipe.build().to(process_state().device)
        draw = partial(draw_images, recipe, network, recipe.batch_size, sampling_steps)
        timed["models", name, "sampling_seconds_per_image"] = partial(seconds_of, draw, recipe.batch_size)
    for name, vae in vaes.items():
        learnt_from = vae.recipe.load_images("train")
        costs["vaes"][name] |= count_costs(vae.recipe, learnt_from)
        timed["vaes", name, "seconds_per_step"] = partial(seconds_of_step, vae.recipe, learnt_from)

        def encode(vae: str = name) -> None:
            EncodedImages(images, vae, TIMED_ENCODINGS).moments([0])  # that of one encodes all

        timed["vaes", name, "encoding_seconds_per_image"] = partial(seconds_of, encode, TIMED_ENCODINGS)
    taken = {key: [] for key in timed}
    for _ in tqdm(range(TIMED_ROUNDS), "costs", unit="round"):
        for key, measure in timed.items():
            taken[key].append(measure())
    for (kind, name, what), seconds in taken.items():
        costs[kind][name][what] = statistics.median(seconds)
    return costs


def count_costs(recipe: Recipe, images: ImageSet) -> dict:
    """Of a training step: "parameters", "gflops_per_step" and "activation_bytes", kept to go backwards."""
    device = process_state().device
    model = seeded(recipe.seed, recipe.build).to(device)
    batch = recipe.draw(images, SampleDraws(0, torch.arange(recipe.batch_size)))
    batch = {name: value.to(device) for name, value in batch.items()}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}  # bytes of each storage that the backward pass needs

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
    ):
        with autocast(device, recipe.precision):
            loss = recipe.loss(model, batch)
        loss.backward()
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "gflops_per_step": counter.get_total_flops() / 1e9,
        "activation_bytes": sum(kept.values()),
    }


def seconds_of_step(recipe: Recipe, images: ImageSet) -> float:
    """The mean time of the first training steps."""
    _, history = train_network(replace(recipe, steps=TIMED_STEPS), images, progress=False)
    return history.seconds / TIMED_STEPS


def seconds_of(do: Callable[[], object], count: int) -> float:
    """The seconds for each of the `count` things that are done."""
    started = time.monotonic()
    do()
    return (time.monotonic() - started) / count


@torch.no_grad()
def draw_images(recipe: DDPM, network: nn.Module, count: int, steps: int) -> Tensor:
    """Images by DDIM, (count, 3, H, W) on the CPU, from the same noise, in the precision of training."""
    device = process_state().device
    with autocast(device, recipe.precision):
        x_0 = recipe.draw_samples(lambda indices: network, count, device, steps)
        parts = x_0.split(recipe.batch_size)
        if isinstance(recipe, LatentDDPM):
            decoder = load_model(recipe.vae).to(device).decode
            parts = [from_latents(decoder, z, recipe.latent_scale) for z in parts]
    return torch.cat([part.float().cpu() for part in parts])


def count_backgrounds(judge: Reader, images: Tensor) -> dict[str, int]:
    """How many of some images have each background; of real ones it is one in four."""
    seen = read(judge, images).predicted["background"]  # (B,)
    counts = seen.bincount(minlength=len(judge.labels["background"])).tolist()
    return dict(zip(judge.labels["background"], counts, strict=True))


def after_round_trip(vae: str, judge: Reader, unseen: ImageSet, num_samples: int) -> dict:
    """What `sample_quality` says of real images that a VAE has encoded and decoded."""
    others = torch.arange(num_samples, 2 * num_samples)  # the first ones are what they are compared with
    trips = round_trips(load_model(vae).to(process_state().device), unseen, others)
    return sample_quality(judge, torch.cat([trip["x_hat"] for trip in trips]), unseen)


def first_stage_seconds(compared: Mapping, name: str) -> float:
    """How long a model's VAE is trained and its images are encoded; 0 for one of pixels.

    Args:
        compared: what `pixel_against_latent` returns.
        name: the model's.
    """
    (vae,) = (model["vae"] for model in compared["models"] if model["name"] == name)
    if vae is None:
        return 0.0
    cost = compared["costs"]["vaes"][vae]
    encoding = compared["num_encoded"] * cost["encoding_seconds_per_image"]
    return cost["training_steps"] * cost["seconds_per_step"] + encoding


def seconds_to_reach(looks: Sequence[Mapping], quantity: str, value: float) -> float | None:
    """When a model first has a Fréchet distance as low, or a share as high, as some value; None if never.

    Args:
        looks: of one model, as `pixel_against_latent` returns them.
        quantity: "frechet_distance", which falls in training, or "confident_share", which rises.
        value: above 0.

    Returns:
        Seconds of training. Between two looks the logarithm of the quantity is taken as linear in time; a
        model that is there at the first look may have been earlier.
    """
    # in logarithms, and turned round if it falls: the way to the value is up
    sign = -1 if quantity == "frechet_distance" else 1
    wanted = sign * math.log(value)
    points = [(look["seconds"], sign * math.log(look[quantity])) for look in looks]
    if points[0][1] >= wanted:
        return points[0][0]
    for (before, low), (after, high) in pairwise(points):
        if high >= wanted:
            return before + (wanted - low) / (high - low) * (after - before)
    return None


def png(images: Tensor) -> str:
    """Images in a row, as a PNG in base64."""
    from torchvision.utils import save_image  # takes a second to import

    file = io.BytesIO()
    save_image(images, file, nrow=len(images), normalize=True, value_range=(-1, 1), format="png")
    return base64.b64encode(file.getvalue()).decode("ascii")
