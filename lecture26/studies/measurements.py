"""Measurements too long for a notebook: each makes data/results/NAME.json, which a chapter plots."""

from collections.abc import Callable, Mapping
from functools import partial

from tqdm import tqdm

from lecture26.kit.results import save_results
from lecture26.kit.validation import check_choice
from lecture26.recipes.adaptation import INSIDE, SHORT_BUDGET
from lecture26.recipes.recipe import sole_use
from lecture26.studies.adaptation import PROMPT_COUNTS, SMALL_TASKS, adaptation
from lecture26.studies.few_images import (
    FORTY_OF_EACH,
    HOW_MANY,
    LONGER,
    WHERE,
    adaptation_from_few,
    photographs_of_other_kinds,
    photographs_upside_down,
    textures,
)
from lecture26.studies.guidances import guidances_on_one_axis
from lecture26.studies.latents_and_pixels import pixel_against_latent
from lecture26.studies.ledger import forget_ledger
from lecture26.studies.placing import BY_RISE, placing
from lecture26.studies.probes import solved_heads
from lecture26.studies.scale_by_step import classifier_scale_by_step
from lecture26.studies.steering_ways import classifier_guidance_ways
from lecture26.studies.storage import prompt_storage
from lecture26.studies.sweeps import (
    BATCH_SIZE,
    SAMPLERS,
    Study,
    classifier_free_guidance_sweep,
    classifier_guidance_sweep,
    clip_guidance_sweep,
)
from lecture26.studies.text_to_image import text_to_image_evaluation

# With how many samples each number of steps is measured: the many steps take seconds for each image.
STEPS_NUM_SAMPLES = {10: 1024, 20: 1024, 50: 1024, 100: 128, 250: 128, 1000: 128}
READERS_64 = {"shapes": "reader_shapes64", "scenes": "reader_scenes64"}


def sampling_steps(
    model: str,
    reader: str,
    num_samples: Mapping[int, int] = STEPS_NUM_SAMPLES,
    batch_size: int = BATCH_SIZE,
) -> dict:
    """Quality and time of DDPM and DDIM with few and many steps.

    Args:
        model: a checkpoint of a denoiser.
        reader: a checkpoint of a reader of the same images.
        num_samples: of each sampler, by the number of denoising steps.
        batch_size: as `Study` has it.

    Returns:
        "model", "reader", and "runs": for each sampler and number of steps a dict of "sampler" and what
        `Study.run` says.
    """
    study = Study(model, reader, batch_size)
    settings = [(sampler, steps, count) for steps, count in num_samples.items() for sampler in SAMPLERS]
    runs = []
    for sampler, steps, count in tqdm(settings, "sampling", unit="run"):
        unguided = study.network, SAMPLERS[sampler]
        runs.append({"sampler": sampler} | study.run(lambda wanted, way=unguided: way, steps, count))
    return {"model": model, "reader": reader, "runs": runs}


MEASUREMENTS: dict[str, Callable[[], dict]] = {
    "ddpm_shapes32_steps": partial(sampling_steps, "ddpm_shapes32", "reader_shapes32"),
    "classifier_guidance_sweep": partial(
        classifier_guidance_sweep, "ddpm_shapes32", "noisy_classifier_shapes32", "reader_shapes32"
    ),
    "classifier_guidance_sweep_small": partial(
        classifier_guidance_sweep, "small_ddpm_shapes32", "noisy_classifier_shapes32", "reader_shapes32"
    ),
    "classifier_guidance_ways": partial(
        classifier_guidance_ways,
        "ddpm_shapes32",
        "noisy_classifier_shapes32",
        "reader_shapes32",
        state="classifier_guidance_ways",
    ),
    "classifier_scale_by_step": partial(
        classifier_scale_by_step,
        "ddpm_shapes32",
        "conditional_ddpm_shapes32",
        "noisy_classifier_shapes32",
        "reader_shapes32",
        state="classifier_scale_by_step",
    ),
    "clip_guidance_sweep": partial(
        clip_guidance_sweep,
        "ddpm_shapes32",
        {"x_t": "noisy_clip_shapes32", "x_0": "clip_shapes32"},
        "reader_shapes32",
        state="clip_guidance_sweep",
    ),
    "classifier_free_guidance_sweep": partial(
        classifier_free_guidance_sweep, "conditional_ddpm_shapes32", "reader_shapes32"
    ),
    "guidances_on_one_axis": partial(
        guidances_on_one_axis,
        "ddpm_shapes32",
        "conditional_ddpm_shapes32",
        "noisy_classifier_shapes32",
        "noisy_clip_shapes32",
        "reader_shapes32",
        state="guidances_on_one_axis",
    ),
    "text_to_image_evaluation": partial(
        text_to_image_evaluation,
        "text_to_image_shapes64",
        READERS_64,
        state="text_to_image_evaluation",
    ),
    "placing": partial(placing, "text_to_image_shapes64", READERS_64["scenes"], state="placing"),
    "placing_by_rise": partial(
        placing, "text_to_image_shapes64", READERS_64["scenes"], BY_RISE, state="placing_by_rise"
    ),
    "pixel_against_latent": partial(pixel_against_latent, READERS_64["shapes"], state="pixel_against_latent"),
    **{
        f"adaptation_{task}": partial(adaptation, tasks=(task,), state=f"adaptation_{task}")
        for task in SMALL_TASKS
    },
    "adaptation_mnist": partial(adaptation, tasks=("./mnist",), state="adaptation_mnist"),
    "adaptation_inside": partial(
        adaptation,
        tasks=("largest",),
        methods=INSIDE,
        upstream=False,
        state="adaptation_inside",
    ),
    "adaptation_short": partial(
        adaptation,
        tasks=("digits", "./mnist"),
        budget=SHORT_BUDGET,
        search=None,
        state="adaptation_short",
    ),
    "adaptation_prompts": partial(
        adaptation,
        tasks=("counting",),
        methods=("vpt-shallow", "vpt-deep"),
        prompt_counts=PROMPT_COUNTS,
        upstream=False,
        state="adaptation_prompts",
    ),
    "adaptation_widths": partial(
        adaptation,
        backbones=("vit_photos32_64", "vit_photos32_96"),
        tasks=("counting", "xray"),
        methods=("linear", "vpt-deep", "full"),
        state="adaptation_widths",
    ),
    **{
        f"adaptation_{name}_{task}": partial(
            adaptation_from_few, "vit_photos32", open_splits, **options, state=f"adaptation_{name}_{task}"
        )
        for task, open_splits in (("photos", photographs_upside_down), ("textures", textures))
        for name, options in (
            ("few", {}),
            ("forty", FORTY_OF_EACH),
            ("forty_where", WHERE),
            ("forty_how_many", HOW_MANY),
            ("forty_longer", LONGER),
        )
    },
    "adaptation_forty_other_kinds": partial(
        adaptation_from_few,
        "vit_photos32_five",
        photographs_of_other_kinds,
        **FORTY_OF_EACH,
        state="adaptation_forty_other_kinds",
    ),
    "prompt_storage": prompt_storage,
    "adaptation_solved": partial(
        solved_heads,
        "vit_photos32",
        ("digits", "./mnist", "line_drawings", "counting", "largest", "xray", "textures"),
        state="adaptation_solved",
    ),
}


def measure(name: str, command: str) -> dict:
    """Make a measurement, and store it.

    Args:
        name: one of MEASUREMENTS.
        command: the command line that does the same, to be stored with it.

    Returns:
        What was stored, see `lecture26.kit.results.save_results`.

    Raises:
        ValueError: if there is no such measurement.
        CheckpointError: if a checkpoint that it needs is missing or damaged.
        InUseError: if another call is making it.
    """
    check_choice("measurement", name, tuple(MEASUREMENTS))
    with sole_use(name):
        stored = save_results(name, command, MEASUREMENTS[name]())
        forget_ledger(name)
    return stored
