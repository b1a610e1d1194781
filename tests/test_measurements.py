"""Long measurements: what is measured, what is stored, and what wrong input gives."""

import base64
import io
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tensors import perturbed
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from lecture26 import recipes
from lecture26.__main__ import EXIT_USER_ERROR, app
from lecture26.classifier_free_guidance import classifier_free_guided
from lecture26.classifier_guidance import classifier_guided, exact_classifier
from lecture26.clip_guidance import clip_guided
from lecture26.ddpm import (
    Diffusion,
    GaussianMixture,
    ddim_step,
    ddpm_step,
    exact_denoiser,
    linear_betas,
    sample,
)
from lecture26.kit.checkpoints import CheckpointError, save_checkpoint
from lecture26.kit.data import load
from lecture26.kit.evaluation import (
    attribute_accuracy,
    extract_features,
    frechet_distance,
    frechet_distance_error,
    sample_quality,
)
from lecture26.kit.readers import canonical
from lecture26.kit.results import load_results, save_results
from lecture26.kit.sample_draws import SampleDraws
from lecture26.recipes import ddpm, find_recipe, latent, load_diffusion, load_model
from lecture26.studies import (
    guidances,
    latents_and_pixels,
    ledger,
    measurements,
    placing,
    scale_by_step,
    steering_ways,
    sweeps,
    text_to_image,
)
from lecture26.studies.sizes import Sizes
from lecture26.unet import UNet

NETWORK = {"base_channels": 8, "channel_multipliers": (1,), "attention_levels": (), "patch_size": 4}
CLASSIFIER = {"base_channels": 8, "channel_multipliers": (1,), "attention_levels": (), "patch_size": 4}
TOWERS = {"image": NETWORK, "text": {"width": 8, "depth": 1}}
READER = {"widths": (8, 8), "num_features": 4}
STUDY = {"num_samples": {2: 16, 3: 24}, "batch_size": 8}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def data_folder(tmp_path_factory):
    """A data folder with untrained networks: a denoiser 'drawer', its guides, and a reader 'judge'."""
    folder = tmp_path_factory.mktemp("data")
    images = load("shapes")
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setenv("LECTURE26_DATA", str(folder))
        for name, recipe, model in (
            ("told", "conditional_ddpm_shapes32", NETWORK),
            ("drawer", "ddpm_shapes32", NETWORK),
            ("guide", "noisy_classifier_shapes32", CLASSIFIER),
            ("clean_clip", "clip_shapes32", TOWERS),
            ("noisy_clip", "noisy_clip_shapes32", TOWERS),
            ("judge", "reader_shapes32", READER),
        ):
            recipe = find_recipe(recipe).fitted_to(images)
            settings = recipe.settings() | {"model": model}
            card = {"recipe": recipe.family, "settings": settings, "command": "", "data": "", "steps": 0}
            network = type(recipe)(**settings).build()
            if name == "told":
                perturbed(network, torch.float32)  # as it comes, it minds no labels
            save_checkpoint(name, network.state_dict(), card | {"seconds": 0, "metrics": {}})
        yield folder


@pytest.fixture(scope="module")
def study():
    return measurements.sampling_steps("drawer", "judge", **STUDY)


def test_every_sampler_is_run_with_every_number_of_steps(study):
    assert {(run["sampler"], run["steps"]) for run in study["runs"]} == {
        ("ddpm", 2),
        ("ddpm", 3),
        ("ddim", 2),
        ("ddim", 3),
    }
    assert all(run["seconds_per_image"] > 0 for run in study["runs"])
    assert all(math.isfinite(run["frechet_distance"]) for run in study["runs"])


def test_the_stored_runs_have_as_many_samples_as_the_command_draws():
    stored = Path(__file__).parents[1] / "data/results/ddpm_shapes32_steps.json"
    runs = json.loads(stored.read_text(encoding="utf-8"))["runs"]
    assert {run["steps"]: run["num_samples"] for run in runs} == measurements.STEPS_NUM_SAMPLES
    assert len(runs) == 2 * len(measurements.STEPS_NUM_SAMPLES)


def test_the_first_batch_is_what_a_notebook_draws_with_seed_0(study):
    """A notebook's small version and the stored measurement are about the same samples."""
    diffusion, network = load_diffusion("drawer"), load_model("drawer")
    generator = torch.Generator().manual_seed(0)
    x_0 = sample(diffusion.respace(3), network, (8, 3, 32, 32), ddim_step, generator, progress=False)
    (run,) = (run for run in study["runs"] if (run["sampler"], run["steps"]) == ("ddim", 3))
    assert run["first_batch"] == pytest.approx(
        sample_quality(load_model("judge"), x_0, load("shapes", "test"))
    )
    assert run["first_batch"]["frechet_distance"] != run["frechet_distance"]


@pytest.fixture(scope="module")
def sweep():
    return sweeps.classifier_guidance_sweep(
        "drawer", "guide", "judge", scales=(1.0, 3.0), num_samples=16, batch_size=8, steps=3
    )


def test_a_sweep_runs_all_scales_both_forms_both_samplers_and_the_held_out_classes(sweep):
    settings = [(run["form"], run["sampler"], run["scale"], run["split"]) for run in sweep["runs"]]
    assert settings == [
        ("none", "ddim", 0.0, "test"),
        ("none", "ddpm", 0.0, "test"),
        ("denoiser", "ddim", 1.0, "test"),
        ("denoiser", "ddim", 3.0, "test"),
        ("denoiser", "ddpm", 1.0, "test"),
        ("denoiser", "ddpm", 3.0, "test"),
        ("mean shift", "ddpm", sweeps.CLASSIFIER_SCALE, "test"),
        ("denoiser", "ddpm", sweeps.CLASSIFIER_SCALE, "held_out"),
    ]
    distances = [run["frechet_distance"] for run in sweep["runs"]]
    assert len(set(distances)) == len(distances)  # no setting is another one under a new name
    for run in sweep["runs"]:
        assert {"accuracy_shape", "accuracy_colour", "accuracy_all", "recall"} <= run.keys()
        assert {"accuracy_all", "frechet_distance"} <= run["first_batch"].keys()


def test_a_sweep_asks_for_what_the_images_show_that_it_compares_with(sweep):
    """The first guided batch of a sweep, drawn by hand as a notebook would."""
    images, diffusion = load("shapes", "test"), load_diffusion("drawer")
    wanted = images.attributes(range(8))
    y = 8 * wanted["shape"] + wanted["colour"]
    guided = classifier_guided(load_model("drawer"), load_model("guide"), y, 3.0, diffusion)
    generator = torch.Generator().manual_seed(0)
    x_0 = sample(diffusion.respace(3), guided, (8, 3, 32, 32), ddim_step, generator, progress=False)
    first_batch = sweep["runs"][3]["first_batch"]
    judge = load_model("judge")
    assert first_batch["frechet_distance"] == pytest.approx(
        sample_quality(judge, x_0, images)["frechet_distance"], rel=1e-4
    )
    right = attribute_accuracy(judge, x_0, {name: wanted[name] for name in ("shape", "colour")})
    assert first_batch["accuracy_all"] == pytest.approx(right["all"])


@pytest.fixture(scope="module")
def clip_sweep():
    return sweeps.clip_guidance_sweep(
        "drawer",
        {"x_t": "noisy_clip", "x_0": "clean_clip"},
        "judge",
        scales={("x_t", "ddim"): (300.0,), ("x_0", "ddpm"): (300.0,)},
        num_samples=16,
        batch_size=8,
        steps=3,
    )


def test_a_clip_sweep_runs_both_kinds_held_out_pairs_and_whole_captions(clip_sweep):
    names = "through", "sampler", "scale", "split", "prompt", "below"
    settings = [tuple(run[name] for name in names) for run in clip_sweep["runs"]]
    late, late_scale, below = sweeps.CLIP_LATE
    assert settings == [
        ("none", "ddim", 0.0, "test", "a red star", None),
        ("none", "ddpm", 0.0, "test", "a red star", None),
        ("x_t", "ddim", 300.0, "test", "a red star", None),
        ("x_0", "ddpm", 300.0, "test", "a red star", None),
        ("x_t", "ddpm", sweeps.CLIP_SCALE, "held_out", "a red star", None),
        ("x_t", "ddpm", sweeps.CLIP_SCALE, "test", "whole caption", None),
        (late, "ddpm", late_scale, "test", "a red star", below),
    ]
    distances = [run["frechet_distance"] for run in clip_sweep["runs"]]
    assert len(set(distances)) == len(distances)
    assert {"accuracy_size", "accuracy_background"} <= clip_sweep["runs"][-2].keys()
    assert "accuracy_size" not in clip_sweep["runs"][2]


def test_a_clip_sweep_prompts_by_shape_and_colour(clip_sweep):
    """The first guided batch of a sweep, drawn by hand as a notebook would."""
    images, diffusion, clip = load("shapes", "test"), load_diffusion("drawer"), load_model("noisy_clip")
    prompts = [" ".join(["a", *caption.split()[2:4]]) for caption in images.captions(range(8))]
    features = clip.encode_text(clip.tokenizer(prompts))
    guided = clip_guided(load_model("drawer"), clip, features, 300.0, diffusion)
    generator = torch.Generator().manual_seed(0)
    x_0 = sample(diffusion.respace(3), guided, (8, 3, 32, 32), ddim_step, generator, progress=False)
    first_batch = clip_sweep["runs"][2]["first_batch"]
    quality = sample_quality(load_model("judge"), x_0, images)
    assert first_batch["frechet_distance"] == pytest.approx(quality["frechet_distance"], rel=1e-4)


@pytest.fixture(scope="module")
def ways_of_steering():
    names, ways = (
        ("drawer", "guide", "judge"),
        steering_ways.WAYS[:-1],
    )  # the exact shift has a test of its own
    return steering_ways.classifier_guidance_ways(
        *names, scale=3.0, ways=ways, num_samples=24, num_within=6, batch_size=8, steps=3
    )


def test_all_ways_of_steering_are_run_and_no_two_are_one(ways_of_steering):
    runs = ways_of_steering["runs"]
    assert [(run["form"], run["sampler"]) for run in runs] == list(steering_ways.WAYS[:-1])
    distances = [run["frechet_distance"] for run in runs]
    assert len(set(distances)) == len(distances)
    assert all(run["frechet_distance_error"] > 0 and 0 <= run["share_large"] <= 1 for run in runs)


def test_the_exact_shift_of_the_mean_is_a_guided_denoiser_where_nothing_is_clipped():
    mixture = GaussianMixture([0.4, 0.6], [[-1.0, 0.0], [1.0, 0.5]], [0.4, 0.3])
    base = Diffusion(linear_betas(80))
    short, y = base.respace(9), torch.tensor([0, 1, 1, 0])
    denoiser, classifier = exact_denoiser(mixture, base), exact_classifier(mixture, base)
    x_t, noise = torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([0, 3, 6, 8])
    guided = classifier_guided(denoiser, classifier, y, 3.0, base)
    shift = steering_ways.exact_mean_shift(classifier, y, 3.0, short)
    by_mean = ddpm_step(short, denoiser, x_t, t, noise, mean_shift=shift)
    assert torch.allclose(by_mean, ddpm_step(short, guided, x_t, t, noise), atol=1e-10)
    assert not torch.allclose(by_mean, ddpm_step(short, denoiser, x_t, t, noise), atol=1e-3)


@pytest.mark.parametrize("share", [0.4, 1.0, -0.2])
def test_the_share_of_a_gradient_is_its_part_along_the_difference(monkeypatch, share):
    difference = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    across = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    along = (across * difference).flatten(1).sum(1) / difference.square().flatten(1).sum(1)
    across -= along[:, None, None, None] * difference
    asked = []

    def gradient(classifier, x_t, t, y):
        asked.append(y)
        return share * difference + across

    monkeypatch.setattr(scale_by_step, "implicit_gradient", lambda *answers: difference)
    monkeypatch.setattr(scale_by_step, "log_prob_gradient", gradient)
    told = scale_by_step.gradient_shares(recipes.Trained("told"), recipes.Trained("guide"), (300, 900), 8)
    assert told["shares"] == pytest.approx([share, share], abs=1e-5)
    assert max(told["share_errors"]) < 1e-5
    shown = load("shapes", "validation").attributes(range(8))
    assert torch.equal(asked[0], (8 * shown["shape"] + shown["colour"]).roll(1))  # of the picture before


def test_a_scale_by_step_is_the_inverse_share_of_its_step(monkeypatch):
    scales = []

    def scaled(denoiser, classifier, y, scale, diffusion):
        scales.append(scale)
        return denoiser

    shares = {"shares": [0.1, 0.5], "share_errors": [0.0, 0.0]}
    monkeypatch.setattr(scale_by_step, "gradient_shares", lambda *of: shares)
    monkeypatch.setattr(scale_by_step, "classifier_guided", scaled)
    study = scale_by_step.classifier_scale_by_step(
        *("drawer", "told", "guide", "judge"), (2.0,), (300, 700), 8, 24, 6, batch_size=8, steps=3
    )
    # steps 999, 500 and 0: beyond the ends the share is that of the end
    assert scales == pytest.approx(3 * [2 / 0.5, 2 / 0.3, 2 / 0.1], rel=0.01)  # in three batches
    (run,) = study["runs"]
    assert run["factor"] == 2.0 and {"accuracy_all", "share_large", "frechet_distance_error"} <= run.keys()
    assert study["shares"] == shares["shares"]
    json.dumps(study)


def test_guidance_from_the_second_step_spares_the_first_one_only():
    short = Diffusion(linear_betas(80)).respace(9)
    later = steering_ways.without_the_first_step(lambda x_t, t: x_t + 1, lambda x_t, t: x_t, short)
    x_t = torch.zeros(2, 3)
    assert later(x_t, short.steps[[8, 8]]).eq(0).all()
    assert all(later(x_t, short.steps[[k, k]]).eq(1).all() for k in range(8))


@pytest.fixture(scope="module")
def on_one_axis():
    return guidances.guidances_on_one_axis(
        "drawer",
        "told",
        "guide",
        "noisy_clip",
        "judge",
        ways={way: (2.0, 5.0) for way in guidances.WAYS},
        num_samples=24,
        num_within=6,
        shares=(0.25, 0.75),
        batch_size=8,
        steps=2,
    )


def test_all_guidances_are_run_on_one_axis_and_no_two_are_one(on_one_axis):
    runs = [
        (run["guidance"], run["denoiser"], run["interval"], run["strength"]) for run in on_one_axis["runs"]
    ]
    assert runs == [
        (way.guidance, way.denoiser, list(way.interval) if way.interval else None, strength)
        for way in guidances.WAYS
        for strength in (2.0, 5.0)
    ]
    distances = [run["frechet_distance"] for run in on_one_axis["runs"]]
    assert len(set(distances)) == len(distances)
    assert all(run["frechet_distance_error"] > 0 for run in on_one_axis["runs"])


def test_on_the_axis_a_strength_is_what_each_guidance_calls_by_its_own_name(on_one_axis):
    """The first batches of three ways at strength 5, drawn by hand."""
    images, diffusion, judge = load("shapes", "test"), load_diffusion("drawer"), load_model("judge")
    wanted = images.attributes(range(8))
    cond = torch.stack([wanted["shape"], wanted["colour"]], dim=1)
    told = load_model("told")
    clip, kappa = load_model("noisy_clip"), on_one_axis["kappa"]
    prompts = [" ".join(["a", *caption.split()[2:4]]) for caption in images.captions(range(8))]
    features = clip.encode_text(clip.tokenizer(prompts))
    y = 8 * wanted["shape"] + wanted["colour"]
    by_hand = {
        ("CLIP", "unconditional"): clip_guided(load_model("drawer"), clip, features, 5 * kappa, diffusion),
        ("classifier-free", "with labels"): classifier_free_guided(
            told, cond, torch.tensor([[8, 8]]).expand(8, 2), 4.0
        ),
        ("classifier", "with labels"): classifier_guided(
            partial(told, cond=cond), load_model("guide"), y, 4.0, diffusion
        ),
    }
    for (guidance, denoiser), guided in by_hand.items():
        generator = torch.Generator().manual_seed(0)
        x_0 = sample(diffusion.respace(2), guided, (8, 3, 32, 32), ddpm_step, generator, progress=False)
        (run,) = (
            run
            for run in on_one_axis["runs"]
            if (run["guidance"], run["denoiser"], run["strength"]) == (guidance, denoiser, 5.0)
            and run["interval"] is None
        )
        quality = sample_quality(judge, x_0, images)
        assert run["first_batch"]["frechet_distance"] == pytest.approx(quality["frechet_distance"], rel=1e-4)


def test_a_study_of_guidances_that_was_stopped_goes_on(data_folder, monkeypatch):
    ways = {guidances.Way("classifier", "unconditional"): (1.0, 3.0)}
    names = "drawer", "told", "guide", "noisy_clip", "judge"
    settings = {"ways": ways, "num_samples": 24, "num_within": 6, "shares": (0.5,), "batch_size": 8}
    once = partial(guidances.guidances_on_one_axis, *names, **settings, steps=2, state="stopped")
    drawn = []

    def stop_at_the_second(study, *args, run=sweeps.Study.run, **options):
        drawn.append(study)
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return run(study, *args, **options)

    (data_folder / "states").mkdir(exist_ok=True)
    monkeypatch.setattr(sweeps.Study, "run", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        once()
    assert len(once()["runs"]) == 2
    assert len(drawn) == 3  # the first was not drawn again


@pytest.fixture
def shipped_judge(monkeypatch):
    """The course's own reader, whose features know sizes."""
    monkeypatch.delenv("LECTURE26_DATA")
    return load_model("reader_shapes32")


def test_real_images_of_other_sizes_are_farther_away(shipped_judge):
    images, judge = load("shapes", "test"), shipped_judge
    sizes = Sizes(judge, images, num_samples=256, num_within=64)
    said = sizes.of_real(shares=(0.02, 0.5, 0.98))
    few, half, most = (real["frechet_distance"] for real in said["real"])
    assert half < few / 3 and half < most / 3
    assert said["within_large_real"]["recall"] > 0.8


def test_the_error_of_a_distance_is_what_drawing_anew_changes(shipped_judge):
    """The jackknife against the spread of distances of samples that do not overlap."""
    images, judge = load("shapes", "test"), shipped_judge
    reference = extract_features(judge, images.batch(torch.arange(256))["image"])
    pictures = images.batch(torch.arange(256, 1024))["image"].split(128)
    drawn = [extract_features(judge, batch) for batch in pictures]
    errors = [frechet_distance_error(reference, features, 16) for features in drawn]
    distances = torch.tensor([frechet_distance(reference, features) for features in drawn])
    spread = distances.std().item()
    assert 0.3 * spread < sum(errors) / len(errors) < 4 * spread


def test_the_figure_of_all_guidances_has_a_curve_of_each_way_asked_for(on_one_axis):
    ways = list(guidances.WAYS)[:2]
    figure = guidances.draw_guidances(on_one_axis, ways)
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert labels == [guidances.NAMES[way] for way in ways]
    assert len(figure.axes) == 3


def test_the_command_stores_the_measurement_and_how_it_was_made(data_folder, monkeypatch):
    monkeypatch.setitem(
        measurements.MEASUREMENTS, "tiny", partial(measurements.sampling_steps, "drawer", "judge", **STUDY)
    )
    result = CliRunner().invoke(app, ["measure", "tiny"])
    assert result.exit_code == 0, result.output
    stored = json.loads((data_folder / "results" / "tiny.json").read_text())
    assert load_results("tiny") == stored
    assert stored["name"] == "tiny"
    assert stored["command"] == "python -m lecture26 measure tiny"
    assert {"processor", "threads"} <= stored["machine"].keys()
    assert "torch" in stored["versions"]
    assert len(stored["runs"]) == 4

    again = CliRunner().invoke(app, ["measure", "tiny"])
    assert again.exit_code == EXIT_USER_ERROR
    assert "--replace" in again.stderr
    assert CliRunner().invoke(app, ["measure", "tiny", "--replace"]).exit_code == 0
    assert load_results("tiny")["command"].endswith("--replace")


def test_an_unknown_measurement_is_refused():
    result = CliRunner().invoke(app, ["measure", "nothing"])
    assert result.exit_code == EXIT_USER_ERROR
    assert "measurement must be one of 'ddpm_shapes32_steps', " in result.stderr
    assert "Traceback" not in result.output


def test_missing_and_damaged_results_say_what_to_do(data_folder):
    save_results("kept", "a command", {"value": 1})
    with pytest.raises(ValueError, match=r"no results 'absent'.*kept.*lecture26 measure absent --replace"):
        load_results("absent")
    file = data_folder / "results" / "kept.json"
    file.write_text(file.read_text()[:-9])
    with pytest.raises(ValueError, match="damaged.*lecture26 measure kept --replace"):
        load_results("kept")


@pytest.fixture(scope="module")
def cfg_sweep():
    weights = {"ddim": (0.0, 3.0), "ddpm": (1.0,)}
    return sweeps.classifier_free_guidance_sweep(
        "told", "judge", weights=weights, num_samples=16, batch_size=8, steps=3
    )


def test_a_classifier_free_sweep_runs_all_weights_and_every_remedy(cfg_sweep):
    names = "sampler", "w", "rescale", "interval", "negative", "split"
    settings = [tuple(run[name] for name in names) for run in cfg_sweep["runs"]]
    strong, w = sweeps.CFG_STRONG_WEIGHT, sweeps.CFG_WEIGHT
    assert settings == [
        ("ddim", 0.0, 0.0, None, None, "test"),
        ("ddim", 3.0, 0.0, None, None, "test"),
        ("ddpm", 1.0, 0.0, None, None, "test"),
        ("ddim", strong, sweeps.CFG_RESCALE, None, None, "test"),
        *(("ddim", strong, 0.0, interval, None, "test") for interval in sweeps.CFG_INTERVALS),
        ("ddim", w, 0.0, None, "shape", "test"),
        ("ddim", w, 0.0, None, "colour", "test"),
        ("ddim", w, 0.0, None, None, "held_out"),
    ]
    distances = [run["frechet_distance"] for run in cfg_sweep["runs"]]
    assert len(set(distances)) == len(distances)
    assert (cfg_sweep["strong_w"], cfg_sweep["intervals"]) == (strong, sweeps.CFG_INTERVALS)


def test_a_classifier_free_sweep_asks_for_shape_and_colour(cfg_sweep):
    """Two first batches of a sweep, drawn by hand as a notebook would."""
    images, diffusion, network = load("shapes", "test"), load_diffusion("told"), load_model("told")
    attributes = images.attributes(range(8))
    cond = torch.stack([attributes["shape"], attributes["colour"]], dim=1)
    other = cond.clone()
    other[:, 1] = (other[:, 1] + 1) % 8
    for number, null_cond, w in ((1, torch.full((8, 2), 8), 3.0), (-2, other, sweeps.CFG_WEIGHT)):
        guided = classifier_free_guided(network, cond, null_cond, w)
        generator = torch.Generator().manual_seed(0)
        x_0 = sample(diffusion.respace(3), guided, (8, 3, 32, 32), ddim_step, generator, progress=False)
        quality = sample_quality(load_model("judge"), x_0, images)
        first_batch = cfg_sweep["runs"][number]["first_batch"]
        assert first_batch["frechet_distance"] == pytest.approx(quality["frechet_distance"], rel=1e-4)


# Text to image


@pytest.fixture(scope="module")
def text_folder(data_folder):
    """The data folder with a VAE 'tiny_vae', a text-to-image model 'tiny_text', and two readers as well."""
    vae = replace(find_recipe("vae_shapes64"), model={"base_channels": 8, "num_blocks": 1})
    text = replace(
        find_recipe("text_to_image_shapes64"),
        name="tiny_text",
        vae="tiny_vae",
        model={"base_channels": 8, "channel_multipliers": (1, 2), "num_blocks": 1},
        attention={"head_dim": 4},
        text={"width": 8, "depth": 1},
        num_encoded=16,
    )
    made = [("tiny_vae", vae), ("tiny_text", text)]
    made += [
        (f"judge_{part}", replace(find_recipe(f"reader_{part}64"), model=READER))
        for part in ("shapes", "scenes")
    ]
    with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(0)
        for name, recipe in made:
            recipe = recipe.fitted_to(recipe.load_images("test"))
            card = {"recipe": recipe.family, "settings": recipe.settings(), "command": "", "data": ""}
            card |= {"steps": 0, "seconds": 12, "metrics": {"latent_scale": 1.2}}
            save_checkpoint(name, perturbed(recipe.build(), torch.float32).state_dict(), card)
        patch.setitem(recipes.recipe.RECIPES, "tiny_text", text)
        yield data_folder


JUDGES = {"shapes": "judge_shapes", "scenes": "judge_scenes"}


@pytest.fixture(scope="module")
def evaluation(text_folder):
    return text_to_image.text_to_image_evaluation(
        "tiny_text",
        JUDGES,
        weights=(0.0, text_to_image.WEIGHT),
        num_samples=16,
        batch_size=8,
        steps=2,
    )


def test_text_to_image_is_evaluated_by_weight_part_and_split(evaluation):
    settings = [
        tuple(run[name] for name in ("part", "split", "w", "num_samples")) for run in evaluation["runs"]
    ]
    w = text_to_image.WEIGHT
    assert settings == [
        ("shapes", "test", 0.0, 16),
        ("scenes", "test", 0.0, 16),
        ("shapes", "test", w, 16),
        ("scenes", "test", w, 16),
        ("shapes", "held_out", w, 16),
        ("scenes", "held_out", w, 16),
    ]
    assert (evaluation["w"], evaluation["steps"], evaluation["readers"]) == (w, 2, JUDGES)
    distances = [run["frechet_distance"] for run in evaluation["runs"]]
    assert len(set(distances)) == len(distances) and all(map(math.isfinite, distances))
    for run in evaluation["runs"]:
        assert run["seconds_per_image"] > 0
        if run["part"] == "shapes":
            assert {"accuracy_shape", "accuracy_background", "accuracy_all"} <= run.keys()
            assert "outcomes" not in run
        else:
            assert sum(run["outcomes"].values()) == run["num_samples"]
            assert run["accuracy_asked"] == run["outcomes"].get("right", 0) / run["num_samples"]
    json.dumps(evaluation)


@pytest.mark.parametrize(("number", "part", "split", "w"), [(0, 0, "test", 0.0), (5, 1, "held_out", None)])
def test_an_evaluation_asks_for_captions_and_draws_as_a_notebook_does(evaluation, number, part, split, w):
    """The images of two runs, drawn by hand: a seed for each, in the order of the data."""
    run, w = evaluation["runs"][number], text_to_image.WEIGHT if w is None else w
    pipeline, images = latent.load_pipeline("tiny_text"), load("shapes_and_scenes", split).parts[part]
    judge, count = load_model(f"judge_{run['part']}"), run["num_samples"]
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    drawn = torch.cat(
        [
            pipeline.text_to_image(
                images.captions(range(8 * n, 8 * n + 8)),
                w=w,
                steps=2,
                generator=generators[8 * n : 8 * n + 8],
            )
            for n in range(count // 8)
        ]
    )
    wanted = images.attributes(range(count))
    for name, share in attribute_accuracy(judge, drawn, wanted).items():
        assert run[f"accuracy_{name}"] == pytest.approx(share)
    first = {name: values[:8] for name, values in wanted.items()}
    for name, share in attribute_accuracy(judge, drawn[:8], first).items():
        assert run["first_batch"][f"accuracy_{name}"] == pytest.approx(share)
    for stored, samples in ((run, drawn), (run["first_batch"], drawn[:8])):
        quality = sample_quality(judge, samples, images)
        assert stored["frechet_distance"] == pytest.approx(quality["frechet_distance"], rel=1e-3)
    others = extract_features(judge, images.batch(range(16, 32))["image"])
    distance = frechet_distance(others, extract_features(judge, drawn))
    assert run["against_others"]["distance"] == pytest.approx(distance, rel=1e-3)
    assert 0 < run["against_others"]["error"] < math.inf


def test_an_evaluation_that_was_stopped_goes_on(text_folder, evaluation, monkeypatch):
    settings = {"weights": (text_to_image.WEIGHT,), "num_samples": 16, "batch_size": 8, "steps": 2}
    evaluate = partial(
        text_to_image.text_to_image_evaluation, "tiny_text", JUDGES, **settings, state="tiny_evaluation"
    )
    drawn, draw = [], text_to_image.draw_timed

    def draw_some(*of):
        drawn.append(of)
        return draw(*of)

    monkeypatch.setattr(text_to_image, "draw_timed", interrupted(draw_some, at_call=3))
    with pytest.raises(KeyboardInterrupt):
        evaluate()
    assert len(drawn) == 2
    again, others = evaluate()["runs"], evaluation["runs"][2:]
    assert len(drawn) == 4
    for run in (*again, *others):
        del run["seconds_per_image"]
    assert again == others


def test_objects_of_real_images_are_counted():
    for part, count in zip(load("shapes_and_scenes", "test").parts, (1, 2), strict=True):
        counted = text_to_image.count_objects(part.batch(range(128))["image"])
        assert counted.dtype == torch.int64
        assert (counted == count).double().mean() > 0.98


def test_objects_of_drawn_squares_are_counted():
    images = torch.full((4, 3, 24, 24), -0.2)
    images[1:, 0, 2:8, 2:8] = 1.0
    images[2:, 2, 12:18, 12:18] = 1.0
    images[3, 1, 8:12, 8:12] = 1.0  # which touches both, corner to corner
    assert text_to_image.count_objects(images).tolist() == [0, 1, 2, 1]
    assert text_to_image.count_objects(images, pixels=37).tolist() == [0, 0, 0, 1]
    assert text_to_image.count_objects(images, saturation=1.5).tolist() == [0, 0, 0, 0]


SCENES = load("scenes", "test")
WANTED = SCENES.attributes(range(200))


def changed(**changes):
    """The attributes of the scenes with some labels replaced by others' or by new values."""
    return WANTED | {name: WANTED[new] if isinstance(new, str) else new for name, new in changes.items()}


@pytest.mark.parametrize(
    ("seen", "outcome"),
    [
        (WANTED, "right"),
        (changed(size_1="size_2", size_2="size_1"), "right"),
        (changed(background=(WANTED["background"] + 1) % 4), "right"),
        (changed(relation=WANTED["relation"] ^ 1), "placed otherwise"),
        (changed(relation=(WANTED["relation"] + 2) % 4), "placed otherwise"),
        (changed(colour_1="colour_2", colour_2="colour_1"), "attributes swapped"),
        (changed(shape_1=(WANTED["shape_1"] + 3) % 8), "other"),
        (changed(colour_2=(WANTED["colour_2"] + 3) % 8), "other"),
    ],
)
def test_outcomes_of_scenes_that_were_drawn_otherwise_than_asked(monkeypatch, seen, outcome):
    """Real images of other attributes, and a reader that never errs."""
    monkeypatch.setattr(
        text_to_image, "read", lambda reader, images: SimpleNamespace(predicted=canonical(seen))
    )
    outcomes = text_to_image.scene_outcomes(None, SCENES.render(seen, range(200)), WANTED)
    # where both objects have one colour or one shape, an exchange of colours may change nothing else
    distinct = (WANTED["shape_1"] != WANTED["shape_2"]) & (WANTED["colour_1"] != WANTED["colour_2"])
    found = [name for name, counts in zip(outcomes, distinct.tolist(), strict=True) if counts]
    assert found.count(outcome) > 0.98 * len(found) > 100


def test_outcomes_of_scenes_without_two_objects(monkeypatch):
    other = changed(shape_1=(WANTED["shape_1"] + 3) % 8)
    monkeypatch.setattr(
        text_to_image, "read", lambda reader, images: SimpleNamespace(predicted=canonical(other))
    )
    one_object = load("shapes", "test", 64).batch(range(200))["image"]
    outcomes = text_to_image.scene_outcomes(None, one_object, WANTED)
    assert outcomes.count("not two objects") > 195


def interrupted(function, at_call):
    """The function, but that the call of this number is interrupted."""
    calls = []

    def stopping(*of):
        calls.append(of)
        if len(calls) == at_call:
            raise KeyboardInterrupt
        return function(*of)

    return stopping


PLACING_ARMS = {name: placing.ARMS[name] for name in ("neither", "coordinates")}


def study_of_placing(monkeypatch, state):
    """The study of placing with tiny networks, small batches and few pictures."""
    common = placing._base
    monkeypatch.setattr(placing, "_base", lambda *of: replace(common(*of), batch_size=4, precision="fp32"))
    return placing.placing(
        "tiny_text", "judge_scenes", PLACING_ARMS, 4, every=2, look=(8, 2), final=(16, 2), state=state
    )


def test_half_of_the_steps_are_even_and_half_where_words_fall_silent():
    alpha_bar = torch.linspace(0.999, 0.001, 50, dtype=torch.float64)
    near, far = torch.zeros(3, 1, 2, 2), torch.ones(3, 1, 2, 2)
    below = placing.even_and_rising(alpha_bar, [(near, far), (near, 9 * far)])
    assert below.shape == (50,) and below[-1] == 1 and (below.diff() > 0).all()
    shares = below.diff(prepend=torch.zeros(1))
    assert shares[1] == pytest.approx(0.5 / 50, rel=1e-3)  # nothing falls silent yet
    of_near, of_far = (placing.share_of_wrong_guesses(near, k * far, alpha_bar)[:, 0] for k in (1, 9))
    rising = (of_near.diff() / of_near[-1] + of_far.diff() / of_far[-1]) / 2
    assert torch.allclose(shares[1:], (1 / 50 + rising.float()) / 2, atol=1e-6)


def test_steps_by_the_rise_change_nothing_but_the_steps(text_folder):
    alike = replace(placing._base(find_recipe("tiny_text"), 4), num_encoded=16)
    images = alike.load_images("train")
    alike = alike.fitted_to(images)
    by_rise = replace(alike, by_rise=True)
    batches = [recipe.draw(images, SampleDraws(0, torch.arange(4000))) for recipe in (alike, by_rise)]
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0] if name != "t")
    t = batches[1]["t"]
    assert t.dtype == torch.int64 and 0 <= t.min() and t.max() < alike.diffusion_steps
    for step in (200, 500, 800, 900):
        share = by_rise._shares_below[step].item()
        assert abs((t <= step).double().mean() - share) < 4 * math.sqrt(share * (1 - share) / len(t))
    scenes, pipeline = load("scenes", "test"), latent.load_pipeline("tiny_text")
    pairs = [placing.one_word_apart(pipeline.encode, scenes, word) for word in placing.WORDS]
    below = placing.even_and_rising(alike.diffusion.alpha_bar, pairs)
    assert torch.allclose(by_rise._shares_below, below, atol=1e-4)
    assert all((one != other).flatten(1).any(dim=1).all() for one, other in pairs)


def test_models_with_and_without_an_aid_learn_the_same_otherwise(text_folder, monkeypatch):
    trained = {}
    train_network = ledger.train_network

    def kept(recipe, images, **options):
        network, history = train_network(recipe, images, **options)
        trained[recipe.coordinates] = network
        return network, history

    monkeypatch.setattr(ledger, "train_network", kept)
    study = study_of_placing(monkeypatch, state=None)
    for arm, name in zip(study["arms"], PLACING_ARMS, strict=True):
        assert arm["name"] == name and arm["lesson"] == 0.0
        assert [(look["step"], look["num_samples"]) for look in arm["looks"]] == [(2, 8), (4, 16)]
        told = dict(trained[arm["coordinates"]].named_parameters())
        matrices = [weight for key, weight in told.items() if key.endswith("where.weight")]
        assert matrices and all(weight.any() == arm["coordinates"] for weight in matrices)
    json.dumps(study)


def test_a_study_of_placing_goes_on_where_it_was_stopped(text_folder, monkeypatch):
    at_once = study_of_placing(monkeypatch, state=None)
    monkeypatch.undo()
    monkeypatch.setattr(placing, "drawn_by", interrupted(placing.drawn_by, at_call=3))
    with pytest.raises(KeyboardInterrupt):
        study_of_placing(monkeypatch, state="stopped_placing")
    monkeypatch.undo()
    resumed = study_of_placing(monkeypatch, state="stopped_placing")
    assert [arm["looks"] for arm in resumed["arms"]] == [arm["looks"] for arm in at_once["arms"]]


def test_order_is_told_by_colours_on_the_right_axis():
    asked = {"relation": [0, 0, 0, 0, 0], "colour_1": [1, 1, 1, 1, 3], "colour_2": [2, 2, 2, 2, 3]}
    #        as asked, exchanged, on another axis, another colour; and asked for one colour twice
    seen = {"relation": [0, 0, 2, 0, 0], "colour_1": [1, 2, 1, 1, 3], "colour_2": [2, 1, 2, 4, 3]}
    asked, seen = ({name: torch.tensor(numbers) for name, numbers in d.items()} for d in (asked, seen))
    assert placing.order_of_colours(seen, asked) == {"num_told": 2, "in_order": 0.5}
    off_axis = seen | {"relation": torch.full((5,), 2)}
    assert placing.order_of_colours(off_axis, asked) == {"num_told": 0, "in_order": None}
    real = canonical(WANTED)
    assert placing.order_of_colours(real, real)["in_order"] == 1.0
    turned = real | {"colour_1": real["colour_2"], "colour_2": real["colour_1"]}
    assert placing.order_of_colours(turned, real)["in_order"] == 0.0


SMALL_MODELS = {
    "latents": {"vae": "tiny_vae", "model": latents_and_pixels._network(1, 1)},
    "plain": {"model": latents_and_pixels._network(1, 1)},
    "folded": {"model": latents_and_pixels._network(1, 1, patch_size=4)},
}


def study_of_latents(state=None):
    """The study of latents and pixels: small networks, two steps of training, few pictures, fixed times."""
    common, measured = latents_and_pixels._recipe, latents_and_pixels.seconds_of_step

    def fixed_seconds(recipe, images):
        assert measured(recipe, images) > 0
        return 3.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latents_and_pixels, "TIMED_STEPS", 1)
        patch.setattr(latents_and_pixels, "TIMED_ROUNDS", 1)
        patch.setattr(latents_and_pixels, "TIMED_ENCODINGS", 4)
        patch.setattr(latents_and_pixels, "seconds_of_step", fixed_seconds)
        patch.setattr(
            latents_and_pixels,
            "_recipe",
            lambda **of: replace(common(**of), batch_size=4, precision="fp32"),
        )
        return latents_and_pixels.pixel_against_latent(
            "judge_shapes",
            SMALL_MODELS,
            looks=(0.05, 0.1),
            num_samples=16,
            sampling_steps=2,
            num_encoded=12,
            more_steps={"folded": 3},
            state=state,
        )


@pytest.fixture(scope="module")
def comparison(text_folder):
    return study_of_latents()


def test_pixels_and_latents_are_compared_in_cost_and_quality(comparison):
    costs = comparison["costs"]["models"]
    assert [model["name"] for model in comparison["models"]] == list(costs) == list(SMALL_MODELS)
    assert [model["vae"] for model in comparison["models"]] == ["tiny_vae", None, None]
    for model in comparison["models"]:
        assert [(look["step"], look["seconds"]) for look in model["looks"]] == [(1, 3.0), (2, 6.0)]
        assert all(look["frechet_distance"] > 0 and "recall" in look for look in model["looks"])
        assert all(look["frechet_distance_error"] > 0 for look in model["looks"])
        picture = Image.open(io.BytesIO(base64.b64decode(model["looks"][-1]["pictures"])))
        assert picture.size == (8 * 66 + 2, 66 + 2)
        assert costs[model["name"]]["sampling_seconds_per_image"] > 0
    *_, folded = comparison["models"]
    last = folded["looks"][-1]
    finer = last["with_more_steps"]
    assert finer["sampling_steps"] == 3 and finer["frechet_distance"] != last["frechet_distance"]
    assert sum(last["backgrounds"].values()) == sum(finer["backgrounds"].values()) == 16
    assert not any("with_more_steps" in model["looks"][-1] for model in comparison["models"][:-1])
    assert costs["plain"]["gflops_per_step"] > 10 * costs["folded"]["gflops_per_step"]
    assert costs["plain"]["activation_bytes"] > 10 * costs["folded"]["activation_bytes"]
    (vae,) = comparison["costs"]["vaes"].values()
    assert vae["encoding_seconds_per_image"] > 0 and vae["training_steps"] == 0
    assert comparison["reconstructed"].keys() == {"tiny_vae"}
    json.dumps(comparison)


def test_parameters_and_operations_of_a_step_are_those_of_its_network(comparison):
    """Counted a second time, on the network alone, forwards and backwards."""
    model = UNet(4, **SMALL_MODELS["latents"]["model"])
    cost = comparison["costs"]["models"]["latents"]
    assert cost["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(4, 4, 16, 16), torch.arange(4)).sum().backward()
    assert cost["gflops_per_step"] == pytest.approx(counter.get_total_flops() / 1e9, rel=0.01)


def test_models_of_latents_learn_from_scaled_latents_and_those_of_pixels_from_images(text_folder):
    images, random = load("shapes", "train", 64), SampleDraws(0, torch.arange(6))
    latents, pixels = (latents_and_pixels._recipe(**SMALL_MODELS[name]) for name in ("latents", "plain"))
    assert (latents.clip, pixels.clip) == (False, True)
    drawn = latents.draw(latents_and_pixels.seen_by(latents, images, 12), random)["x_0"]
    random = SampleDraws(0, torch.arange(6))
    x = images.batch(random.integers(12))["image"]
    mean, log_variance = load_model("tiny_vae").encode(x)
    expected = 1.2 * (mean + (log_variance / 2).exp() * random.normal(*mean.shape[1:]))
    torch.testing.assert_close(drawn, expected, atol=0.01, rtol=0.01)  # kept in half precision
    random = SampleDraws(0, torch.arange(6))
    drawn = pixels.draw(latents_and_pixels.seen_by(pixels, images, 12), random)["x_0"]
    torch.testing.assert_close(
        drawn, images.batch(SampleDraws(0, torch.arange(6)).integers(len(images)))["image"]
    )


def test_what_is_drawn_of_latents_is_decoded_at_the_decoder_s_scale(text_folder, monkeypatch):
    recipe = latents_and_pixels._recipe(**SMALL_MODELS["latents"])
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(ddpm, "sample", lambda *of, **others: latents)
    drawn = latents_and_pixels.draw_images(replace(recipe, precision="fp32"), None, 2, 2)
    torch.testing.assert_close(drawn, load_model("tiny_vae").decode(latents / 1.2))


def test_a_study_of_latents_goes_on_where_it_was_stopped(comparison, text_folder, monkeypatch):
    stopping = interrupted(latents_and_pixels.sample_quality, at_call=4)
    monkeypatch.setattr(latents_and_pixels, "sample_quality", stopping)
    with pytest.raises(KeyboardInterrupt):
        study_of_latents(state="stopped_latents")
    monkeypatch.undo()
    resumed = study_of_latents(state="stopped_latents")
    assert resumed["models"] == comparison["models"]


def test_backgrounds_are_counted(monkeypatch):
    judge = SimpleNamespace(labels={"background": ("dark", "light", "striped")})
    read = SimpleNamespace(predicted={"background": torch.tensor([1, 0, 1, 1])})
    monkeypatch.setattr(latents_and_pixels, "read", lambda reader, images: read)
    assert latents_and_pixels.count_backgrounds(judge, None) == {"dark": 1, "light": 3, "striped": 0}


def test_when_a_distance_or_a_share_is_reached():
    looks = [(100.0, 400.0, 0.1), (200.0, 100.0, 0.4), (300.0, 120.0, 0.3), (400.0, 25.0, 0.6)]
    looks = [
        {"seconds": seconds, "frechet_distance": distance, "confident_share": share}
        for seconds, distance, share in looks
    ]
    reached = partial(latents_and_pixels.seconds_to_reach, looks, "frechet_distance")
    assert [reached(distance) for distance in (500.0, 400.0, 100.0, 24.0)] == [100, 100, 200, None]
    assert reached(200.0) == pytest.approx(150.0)  # half of the way in logarithms
    assert reached(50.0) == pytest.approx(300 + 100 * math.log(120 / 50) / math.log(120 / 25))
    reached = partial(latents_and_pixels.seconds_to_reach, looks, "confident_share")
    assert [reached(share) for share in (0.05, 0.1, 0.7)] == [100, 100, None]
    assert reached(0.2) == pytest.approx(150.0)
    assert reached(0.45) == pytest.approx(300 + 100 * math.log(1.5) / math.log(2))


def test_the_first_stage_takes_training_and_encoding(comparison):
    (vae,) = comparison["costs"]["vaes"].values()
    costs = comparison["costs"] | {"vaes": {"tiny_vae": vae | {"training_steps": 10}}}
    seconds = partial(latents_and_pixels.first_stage_seconds, comparison | {"costs": costs})
    assert seconds("plain") == 0.0
    expected = 10 * vae["seconds_per_step"] + 12 * vae["encoding_seconds_per_image"]
    assert seconds("latents") == pytest.approx(expected)


def test_stored_measurements_are_of_models_that_have_a_recipe():
    model, readers = measurements.MEASUREMENTS["text_to_image_evaluation"].args
    assert {model, *readers.values()} <= set(recipes.recipe_names())
    assert {part: find_recipe(reader).data for part, reader in readers.items()} == {
        "shapes": "shapes",
        "scenes": "scenes",
    }
    vaes = {model["vae"] for model in latents_and_pixels.MODELS.values() if "vae" in model}
    assert {find_recipe(vae).build().factor for vae in vaes} == {4, 8}


def test_unknown_readers_and_models_end_before_anything_is_drawn(text_folder):
    with pytest.raises(CheckpointError, match="there is no checkpoint 'absent'"):
        text_to_image.text_to_image_evaluation("absent", JUDGES)
    with pytest.raises(CheckpointError, match="there is no checkpoint 'absent'"):
        text_to_image.text_to_image_evaluation("tiny_text", JUDGES | {"scenes": "absent"})
    with pytest.raises(ValueError, match="model must be one of text to image; got 'drawer'"):
        text_to_image.text_to_image_evaluation("drawer", JUDGES)
