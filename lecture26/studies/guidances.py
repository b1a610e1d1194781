"""All three guidances on one axis, on which 1 is Bayes' rule; and a classifier instead of two answers."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from lecture26.classifier_free_guidance import classifier_free_guided
from lecture26.classifier_guidance import classifier_guided
from lecture26.clip_guidance import clip_guided
from lecture26.ddpm import ddpm_step
from lecture26.kit.claims import share_error
from lecture26.kit.figures import PALETTE
from lecture26.kit.shapes import leave_out
from lecture26.recipes import Trained, load_model
from lecture26.studies.ledger import Ledger, ledger_file
from lecture26.studies.sizes import NUM_WITHIN, SHARES, Sizes
from lecture26.studies.sweeps import BATCH_SIZE, NUM_SAMPLES, STEPS, Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Way(NamedTuple):
    """What guides, which denoiser, and at which steps (None: all)."""

    guidance: str  # "classifier", "CLIP" or "classifier-free"
    denoiser: str  # "unconditional", or of the conditional model the answer "with null" or "with labels"
    interval: tuple[int, int] | None = None


# At strength 1 each way is Bayes' rule. What is set is the strength itself, s, for a classifier; kappa times
# as much for a CLIP; and w, the strength less 1, for classifier-free guidance and for a classifier in the
# place of its difference of two answers.
WAYS: dict[Way, tuple[float, ...]] = {
    Way("classifier", "unconditional"): (1.0, 2.0, 5.0, 9.0),
    Way("CLIP", "unconditional"): (1.0, 2.0, 5.0, 9.0),
    Way("classifier-free", "with labels"): (1.0, 2.0, 5.0, 9.0),
    Way("classifier", "with null"): (2.0, 5.0),
    Way("classifier", "with labels"): (2.0, 5.0),
    Way("classifier-free", "with labels", (0, 699)): (5.0,),
}
NAMES = {
    Way("classifier", "unconditional"): "classifier: $s$",
    Way("CLIP", "unconditional"): r"CLIP: $s/\kappa$",
    Way("classifier-free", "with labels"): "classifier-free: $1+w$",
    Way("classifier", "with null"): "classifier on the null branch: $s$",
    Way("classifier", "with labels"): "classifier on the conditional answer: $1+s$",
    Way("classifier-free", "with labels", (0, 699)): "classifier-free, not in the noisiest steps: $1+w$",
}


def guidances_on_one_axis(
    model: str,
    conditional: str,
    classifier: str,
    clip: str,
    reader: str,
    ways: Mapping[Way, Sequence[float]] = WAYS,
    num_samples: int = NUM_SAMPLES,
    num_within: int = NUM_WITHIN,
    shares: Sequence[float] = SHARES,
    batch_size: int = BATCH_SIZE,
    steps: int = STEPS,
    state: str | None = None,
) -> dict:
    """Guidance by a classifier, by a CLIP and by two answers, at equal strengths, by ancestral sampling.

    Every sample is asked for a shape and a colour, the CLIP by a prompt such as "a red star"; nobody asks for
    a size.

    Args:
        model: a checkpoint of an unconditional denoiser.
        conditional: one of a conditional denoiser of the same images.
        classifier: one of a noisy classifier of them, by shape and colour.
        clip: one of a noise-aware CLIP of them.
        reader: one of a reader of them.
        ways: what is run, and at which strengths.
        num_samples, batch_size, steps: of each setting, as `Study` has them.
        num_within: of the comparisons within large shapes, see `Sizes`.
        shares: of large shapes, in the control with real images.
        state: the name under which finished settings are kept, so that it resumes; None: nowhere.

    Returns:
        The five names, "kappa" of the CLIP; what `Sizes.of_real` says; and "runs": for each setting
        "guidance", "denoiser", "interval" and "strength", and what `Study.run` and `Sizes.of` say.
    """
    plain, told = (Study(checkpoint, reader, batch_size) for checkpoint in (model, conditional))
    trained = Trained(classifier)
    noisy_classifier, classes = trained.network.to(plain.device), trained.recipe.classes
    noisy_clip = load_model(clip).to(plain.device)
    kappa = noisy_clip.logit_scale.exp().item()
    images = plain.recipe.load_images("test")
    sizes = Sizes(plain.judge, images, num_samples, num_within)
    further = partial(sizes.of, group=batch_size)

    def guide(way: Way, strength: float, wanted: dict[str, Tensor]) -> tuple[Callable, Callable]:
        cond = told.recipe.conditions(wanted)
        null_cond = told.recipe.null_conditions(len(cond)).to(told.device)
        if way.guidance == "classifier-free":
            w = strength - 1
            denoiser = classifier_free_guided(told.network, cond, null_cond, w, interval=way.interval)
            return denoiser, ddpm_step
        if way.guidance == "CLIP":
            prompts = [leave_out(caption, ("size_1", "background")) for caption in images.describe(wanted)]
            with torch.no_grad():
                text_features = noisy_clip.encode_text(noisy_clip.tokenizer(prompts).to(plain.device))
            scale = kappa * strength
            return clip_guided(plain.network, noisy_clip, text_features, scale, plain.diffusion), ddpm_step
        denoiser, scale = {
            "unconditional": (plain.network, strength),
            "with null": (partial(told.network, cond=null_cond), strength),
            "with labels": (partial(told.network, cond=cond), strength - 1),
        }[way.denoiser]
        return (
            classifier_guided(denoiser, noisy_classifier, classes(wanted), scale, plain.diffusion),
            ddpm_step,
        )

    def run(way: Way, strength: float) -> dict:
        study = plain if way.denoiser == "unconditional" else told
        guided = partial(guide, way, strength)
        measured = study.run(guided, steps, num_samples, labels=("shape", "colour"), further=further)
        return {**way._asdict(), "strength": strength} | measured

    names = {"model": model, "conditional": conditional, "classifier": classifier, "clip": clip}
    settings = {**names, "reader": reader, "samples": [num_samples, num_within], "steps": steps}
    ledger = Ledger(None if state is None else ledger_file(state), settings)
    wanted_runs = [(way, strength) for way, strengths in ways.items() for strength in strengths]
    runs = [
        ledger.once(repr((way, strength)), partial(run, way, strength))
        for way, strength in tqdm(wanted_runs, "sampling", unit="run")
    ]
    return {**names, "reader": reader, "kappa": kappa, **sizes.of_real(shares), "runs": runs}


def draw_guidances(stored: Mapping, ways: Sequence[Way] = tuple(WAYS)) -> "Figure":
    """Accuracy, Fréchet distance and share of large shapes against the strength, with two standard errors.

    Args:
        stored: as `guidances_on_one_axis` gives it.
        ways: which of its curves.

    Returns:
        The figure; show it with `show(figure, alt)`.
    """
    from matplotlib import pyplot as plt

    panels = {
        "accuracy_all": "shape and colour as asked for",
        "frechet_distance": "Fréchet distance",
        "share_large": "share of large shapes",
    }
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.8), layout="constrained")
    for way, colour, marker in zip(WAYS, PALETTE.values(), "os^Dv*", strict=False):
        if way not in ways:
            continue
        runs = [run for run in stored["runs"] if _way(run) == way]
        strengths = [run["strength"] for run in runs]
        style = {"color": colour, "marker": marker, "markersize": 8, "capsize": 3, "label": NAMES[way]}
        style["linestyle"] = "-" if len(WAYS[way]) > 2 else "none"  # no line through two points
        for axis, quantity in zip(axes, panels, strict=True):
            errors = [2 * standard_error(run, quantity) for run in runs]
            axis.errorbar(strengths, [run[quantity] for run in runs], errors, **style)
    real = {"accuracy_all": None, "frechet_distance": stored["runs"][0]["frechet_distance_real"]}
    for axis, (quantity, label) in zip(axes, panels.items(), strict=True):
        level = real.get(quantity, 0.5)
        if level is not None:
            axis.axhline(level, color="grey", linestyle=":", label="real images")
        axis.set(xscale="log", xlabel="strength (1: Bayes' rule)", ylabel=label)
        axis.set_xticks([1, 2, 5, 9], ["1", "2", "5", "9"], minor=False)
        axis.minorticks_off()
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def standard_error(run: Mapping, quantity: str) -> float:
    """Of a run's distance as it was measured; of a share of its samples, that of counting."""
    if quantity == "frechet_distance":
        return run["frechet_distance_error"]
    return share_error(run[quantity], run["num_samples"])


def _way(run: Mapping) -> Way:
    interval = run["interval"]
    return Way(run["guidance"], run["denoiser"], None if interval is None else tuple(interval))
