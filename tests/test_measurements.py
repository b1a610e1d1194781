"""Long measurements: what is measured, what is stored, and what wrong input gives."""

import json
import math
from functools import partial

import pytest
import torch
from tensors import perturbed
from typer.testing import CliRunner

from lecture26.__main__ import EXIT_USER_ERROR, app
from lecture26.classifier_free_guidance import classifier_free_guided
from lecture26.classifier_guidance import classifier_guided
from lecture26.clip_guidance import clip_guided
from lecture26.ddpm import ddim_step, sample
from lecture26.kit.checkpoints import save_checkpoint
from lecture26.kit.data import load
from lecture26.kit.evaluation import attribute_accuracy, sample_quality
from lecture26.kit.results import load_results, save_results
from lecture26.recipes import find_recipe, load_diffusion, load_model, measurements, sweeps

NETWORK = {"base_channels": 8, "channel_multipliers": (1,), "attention_levels": (), "patch_size": 4}
CLASSIFIER = {"base_channels": 8, "channel_multipliers": (1,), "attention_levels": (), "patch_size": 4}
TOWERS = {"image": NETWORK, "text": {"width": 8, "depth": 1}}
READER = {"widths": (8, 8), "num_features": 4}
STUDY = {"step_counts": (2, 3), "num_samples": 16, "batch_size": 8}


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
    names = "through", "sampler", "scale", "split", "prompt"
    settings = [tuple(run[name] for name in names) for run in clip_sweep["runs"]]
    assert settings == [
        ("none", "ddim", 0.0, "test", "a red star"),
        ("none", "ddpm", 0.0, "test", "a red star"),
        ("x_t", "ddim", 300.0, "test", "a red star"),
        ("x_0", "ddpm", 300.0, "test", "a red star"),
        ("x_t", "ddpm", sweeps.CLIP_SCALE, "held_out", "a red star"),
        ("x_t", "ddpm", sweeps.CLIP_SCALE, "test", "whole caption"),
    ]
    distances = [run["frechet_distance"] for run in clip_sweep["runs"]]
    assert len(set(distances)) == len(distances)
    assert {"accuracy_size", "accuracy_background"} <= clip_sweep["runs"][-1].keys()
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
