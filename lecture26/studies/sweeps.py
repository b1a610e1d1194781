"""Sweeps over the strength of a guidance: is what is asked for drawn, how well and varied, at what cost?"""

import time
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from lecture26.classifier_free_guidance import classifier_free_guided
from lecture26.classifier_guidance import classifier_guided, classifier_mean_shift
from lecture26.clip_guidance import clip_guided
from lecture26.ddpm import ddim_step, ddpm_step, sample
from lecture26.kit.evaluation import attribute_accuracy, sample_quality
from lecture26.kit.processes import process_state
from lecture26.kit.shapes import leave_out
from lecture26.recipes import Trained, load_model
from lecture26.studies.ledger import Ledger, ledger_file

BATCH_SIZE = 64  # also of the notebooks' small versions, which draw the first batch
NUM_SAMPLES = 512
STEPS = 50
SAMPLERS = {"ddim": ddim_step, "ddpm": ddpm_step}

CLASSIFIER_SCALES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
CLASSIFIER_SCALE = 8.0  # at which the two forms are compared, and the held-out classes asked for

CLIP_SCALES = {
    ("x_t", "ddpm"): (25.0, 50.0, 100.0, 200.0, 400.0, 800.0, 1600.0),
    ("x_t", "ddim"): (400.0,),
    ("x_0", "ddpm"): (50.0, 200.0, 800.0, 3200.0),
}
CLIP_SCALE = 400.0  # at which held-out pairs, and whole captions, are asked for
CLIP_LATE = ("x_0", 800.0, 800)  # a way and a scale at which guidance is also tried below a step only

CFG_WEIGHTS = {"ddim": (-1.0, 0.0, 0.5, 1.0, 2.0, 4.0, 8.0), "ddpm": (0.0, 0.5, 1.0, 2.0, 4.0)}
CFG_WEIGHT = 1.0  # at which held-out pairs are asked for, and negative conditions tried
CFG_STRONG_WEIGHT = 4.0  # at which rescaling and intervals are tried
CFG_RESCALE = 0.7
CFG_INTERVALS = ((0, 699), (300, 999), (300, 699))  # without the noisiest steps, the cleanest ones, and both


class Study:
    """A denoiser's checkpoint that is drawn from in many ways, and a reader that judges what it draws.

    Args:
        model: the name of the denoiser's checkpoint.
        reader: that of a reader of the same images.
        batch_size: samples drawn at once; batch b with a generator seeded with b.

    Attributes:
        network, diffusion, recipe: the denoiser, what it was trained for, and how.
        judge: the reader.
        device: where everything is done.
    """

    def __init__(self, model: str, reader: str, batch_size: int = BATCH_SIZE):
        checkpoint = Trained(model)
        self.device = process_state().device
        self.network = checkpoint.network.to(self.device)
        self.diffusion, self.recipe = checkpoint.diffusion, checkpoint.recipe
        self.judge = load_model(reader).to(self.device)
        self._batch_size = batch_size

    def draw(
        self,
        guide: Callable[[dict[str, Tensor]], tuple[Callable, Callable]],
        steps: int,
        num_samples: int,
        split: str = "test",
    ) -> tuple[Tensor, float]:
        """Draw samples in one way: (num_samples, C, H, W) on the CPU, and the seconds that one takes.

        The arguments are those of `run`. The seconds are those of the fastest batch.
        """
        attributes = self.recipe.load_images(split).attributes(range(num_samples))
        diffusion = self.diffusion.respace(steps)
        shape = (self._batch_size, self.recipe.channels, self.recipe.image_size, self.recipe.image_size)
        batches, seconds = [], []
        for seed, indices in enumerate(torch.arange(num_samples).split(self._batch_size)):
            generator = torch.Generator().manual_seed(seed)  # on the CPU: the same samples on every device
            x_T = torch.randn(shape, generator=generator).to(self.device)
            denoiser, step = guide({name: all_[indices].to(self.device) for name, all_ in attributes.items()})
            started = time.monotonic()
            batches.append(sample(diffusion, denoiser, shape, step, generator, x_T).cpu())
            seconds.append(time.monotonic() - started)
        return torch.cat(batches), min(seconds) / self._batch_size

    def run(
        self,
        guide: Callable[[dict[str, Tensor]], tuple[Callable, Callable]],
        steps: int,
        num_samples: int,
        split: str = "test",
        labels: Iterable[str] = (),
        further: Callable[[Tensor], dict] | None = None,
    ) -> dict:
        """Draw samples in one way, and measure them.

        Sample i is asked for what image i of the data shows, and all samples are compared with those images.

        Args:
            guide: guide(attributes of a batch) -> (denoiser, step), which draw that batch.
            steps: the number of denoising steps.
            num_samples: a multiple of the batch size.
            split: of the data that the samples are compared with.
            labels: those of which it is counted whether they were drawn as asked for.
            further: further(samples) -> what else is to be measured of all samples.

        Returns:
            "steps", "split", "num_samples", "seconds_per_image" (of the fastest batch); what `sample_quality`
            and `attribute_accuracy` ("accuracy_LABEL", "accuracy_all") say of the samples; "first_batch":
            what they say of the first batch alone; and what `further` says.
        """
        images = self.recipe.load_images(split)
        attributes = images.attributes(range(num_samples))
        drawn, seconds = self.draw(guide, steps, num_samples, split)

        def quality(samples: Tensor) -> dict:
            measured = sample_quality(self.judge, samples, images)
            if labels:
                asked_for = {name: attributes[name][: len(samples)] for name in labels}
                accuracy = attribute_accuracy(self.judge, samples, asked_for)
                measured |= {f"accuracy_{name}": share for name, share in accuracy.items()}
            return measured

        return {
            "steps": steps,
            "split": split,
            "num_samples": num_samples,
            "seconds_per_image": seconds,
            **quality(drawn),
            "first_batch": quality(drawn[: self._batch_size]),
            **(further(drawn) if further else {}),
        }


def classifier_guidance_sweep(
    model: str,
    classifier: str,
    reader: str,
    scales: tuple[float, ...] = CLASSIFIER_SCALES,
    num_samples: int = NUM_SAMPLES,
    batch_size: int = BATCH_SIZE,
    steps: int = STEPS,
) -> dict:
    """Classifier guidance by scale and sampler; at one scale also in its other form, and of held-out classes.

    Args:
        model: a checkpoint of an unconditional denoiser.
        classifier: a checkpoint of a noisy classifier of the same images.
        reader: a checkpoint of a reader of them.
        scales: those of the sweep.
        num_samples, batch_size, steps: of each setting, as `Study` has them.

    Returns:
        "model", "classifier", "reader", and "runs": for each setting "form" ("none", "denoiser" or
        "mean shift"), "sampler" and "scale", and what `Study.run` says.
    """
    study = Study(model, reader, batch_size)
    checkpoint = Trained(classifier)
    network, recipe = checkpoint.network.to(study.device), checkpoint.recipe

    def guide(form: str, sampler: str, scale: float, wanted: dict[str, Tensor]) -> tuple[Callable, Callable]:
        y = recipe.classes(wanted)
        denoiser, step = study.network, SAMPLERS[sampler]
        if form == "denoiser":
            denoiser = classifier_guided(denoiser, network, y, scale, study.diffusion)
        elif form == "mean shift":
            step = partial(ddpm_step, mean_shift=classifier_mean_shift(network, y, scale))
        return denoiser, step

    settings = [("none", sampler, 0.0, "test") for sampler in SAMPLERS]
    settings += [("denoiser", sampler, scale, "test") for sampler in SAMPLERS for scale in scales]
    settings += [
        ("mean shift", "ddpm", CLASSIFIER_SCALE, "test"),
        ("denoiser", "ddpm", CLASSIFIER_SCALE, "held_out"),
    ]
    runs = []
    for form, sampler, scale, split in tqdm(settings, "sampling", unit="run"):
        way = partial(guide, form, sampler, scale)
        measured = study.run(way, steps, num_samples, split=split, labels=recipe.labels)
        runs.append({"form": form, "sampler": sampler, "scale": scale} | measured)
    return {"model": model, "classifier": classifier, "reader": reader, "runs": runs}


def clip_guidance_sweep(
    model: str,
    clips: dict[str, str],
    reader: str,
    scales: dict[tuple[str, str], tuple[float, ...]] = CLIP_SCALES,
    num_samples: int = NUM_SAMPLES,
    batch_size: int = BATCH_SIZE,
    steps: int = STEPS,
    state: str | None = None,
) -> dict:
    """CLIP guidance by scale and sampler, through x_t and x_0-hat; also of other pairs and prompts, and late.

    Args:
        model: a checkpoint of an unconditional denoiser.
        clips: checkpoints of a noise-aware CLIP ("x_t") and of a clean one ("x_0") of the same images.
        reader: a checkpoint of a reader of them.
        scales: those of the sweep, for each ("x_t" or "x_0", sampler).
        num_samples, batch_size, steps: of each setting, as `Study` has them.
        state: the name under which finished settings are kept, so that it resumes; None: nowhere.

    Returns:
        "model", "clips", "reader", and "runs": for each setting "through" ("x_t", "x_0", or "none" without
        guidance), "sampler", "scale", "prompt" ("a red star" or "whole caption") and "below" (the step below
        which alone there is guidance, or None), and what `Study.run` says.
    """
    study = Study(model, reader, batch_size)
    networks = {through: load_model(name).to(study.device) for through, name in clips.items()}
    images = study.recipe.load_images("test")

    def guide(
        through: str, sampler: str, scale: float, whole: bool, below: int | None, wanted: dict[str, Tensor]
    ) -> tuple[Callable, Callable]:
        denoiser = study.network
        if through != "none":
            lost = () if whole else ("size_1", "background")
            captions = [leave_out(caption, lost) for caption in images.describe(wanted)]
            clip = networks[through]
            with torch.no_grad():
                text_features = clip.encode_text(clip.tokenizer(captions).to(study.device))
            denoiser = clip_guided(denoiser, clip, text_features, scale, study.diffusion, through)
        if below is not None:
            denoiser = partial(_below, below, denoiser, study.network)
        return denoiser, SAMPLERS[sampler]

    settings = [("none", sampler, 0.0, "test", False, None) for sampler in SAMPLERS]
    settings += [(*way, scale, "test", False, None) for way, several in scales.items() for scale in several]
    late, late_scale, below = CLIP_LATE
    settings += [
        ("x_t", "ddpm", CLIP_SCALE, "held_out", False, None),
        ("x_t", "ddpm", CLIP_SCALE, "test", True, None),
        (late, "ddpm", late_scale, "test", False, below),
    ]

    def run(through: str, sampler: str, scale: float, split: str, whole: bool, below: int | None) -> dict:
        way = partial(guide, through, sampler, scale, whole, below)
        labels = tuple(images.labels) if whole else ("shape", "colour")
        measured = study.run(way, steps, num_samples, split=split, labels=labels)
        prompt = "whole caption" if whole else "a red star"
        setting = {"through": through, "sampler": sampler, "scale": scale, "prompt": prompt, "below": below}
        return setting | measured

    names = {"model": model, "clips": clips, "reader": reader}
    numbers = {"num_samples": num_samples, "batch_size": batch_size, "steps": steps}
    ledger = Ledger(None if state is None else ledger_file(state), names | numbers)
    runs = [
        ledger.once(repr(setting), partial(run, *setting))
        for setting in tqdm(settings, "sampling", unit="run")
    ]
    return {**names, "runs": runs}


def _below(step: int, guided: Callable, plain: Callable, x_t: Tensor, t: Tensor) -> Tensor:
    """What one denoiser says below a step, and another from there on; a batch is at one step."""
    return guided(x_t, t) if t[0] < step else plain(x_t, t)


def classifier_free_guidance_sweep(
    model: str,
    reader: str,
    weights: dict[str, tuple[float, ...]] = CFG_WEIGHTS,
    num_samples: int = NUM_SAMPLES,
    batch_size: int = BATCH_SIZE,
    steps: int = STEPS,
) -> dict:
    """Classifier-free guidance by weight and sampler; rescaled, at intervals, negated, of held-out pairs.

    Args:
        model: a checkpoint of a conditional denoiser.
        reader: a checkpoint of a reader of the same images.
        weights: those of the sweep, for each sampler.
        num_samples, batch_size, steps: of each setting, as `Study` has them.

    Returns:
        "model", "reader", "strong_w" and "intervals" (those tried), and "runs": for each setting "sampler",
        "w", "rescale", "interval" (or None), "negative" (None, or the label in which the negative condition
        differs from the wanted one, by one class) and what `Study.run` says.
    """
    study = Study(model, reader, batch_size)
    recipe = study.recipe

    def guide(setting: dict, wanted: dict[str, Tensor]) -> tuple[Callable, Callable]:
        cond = recipe.conditions(wanted)
        null_cond = recipe.null_conditions(len(cond)).to(study.device)
        if setting["negative"] is not None:
            column = recipe.labels.index(setting["negative"])
            null_cond = cond.clone()
            null_cond[:, column] = (cond[:, column] + 1) % recipe.num_classes[column]
        options = {"rescale": setting["rescale"], "interval": setting["interval"]}
        denoiser = classifier_free_guided(study.network, cond, null_cond, setting["w"], **options)
        return denoiser, SAMPLERS[setting["sampler"]]

    plain = {"sampler": "ddim", "w": CFG_WEIGHT, "rescale": 0.0, "interval": None, "negative": None}
    strong = plain | {"w": CFG_STRONG_WEIGHT}
    settings = [plain | {"sampler": sampler, "w": w} for sampler, several in weights.items() for w in several]
    settings += [strong | {"rescale": CFG_RESCALE}]
    settings += [strong | {"interval": interval} for interval in CFG_INTERVALS]
    settings += [plain | {"negative": label} for label in recipe.labels]
    runs = []
    for setting, split in tqdm(
        [*((s, "test") for s in settings), (plain, "held_out")], "sampling", unit="run"
    ):
        measured = study.run(partial(guide, setting), steps, num_samples, split=split, labels=recipe.labels)
        runs.append(setting | measured)
    return {
        "model": model,
        "reader": reader,
        "strong_w": CFG_STRONG_WEIGHT,
        "intervals": CFG_INTERVALS,
        "runs": runs,
    }
