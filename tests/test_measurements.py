"""Long measurements: what is measured, what is stored, and what wrong input gives."""

import json
import math
from functools import partial

import pytest
import torch
from typer.testing import CliRunner

from lecture26.__main__ import EXIT_USER_ERROR, app
from lecture26.ddpm import ddim_step, sample
from lecture26.kit.checkpoints import save_checkpoint
from lecture26.kit.data import load
from lecture26.kit.evaluation import sample_quality
from lecture26.kit.results import load_results, save_results
from lecture26.recipes import find_recipe, load_diffusion, load_model, measurements

NETWORK = {"base_channels": 8, "channel_multipliers": (1,), "attention_levels": (), "patch_size": 4}
READER = {"widths": (8, 8), "num_features": 4}
STUDY = {"step_counts": (2, 3), "num_samples": 16, "batch_size": 8}


@pytest.fixture(scope="module", autouse=True)
def data_folder(tmp_path_factory):
    """A data folder with an untrained denoiser, 'drawer', and an untrained reader, 'judge'."""
    folder = tmp_path_factory.mktemp("data")
    images = load("shapes")
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setenv("LECTURE26_DATA", str(folder))
        for name, recipe, model in (
            ("drawer", "ddpm_shapes32", NETWORK),
            ("judge", "reader_shapes32", READER),
        ):
            recipe = find_recipe(recipe).fitted_to(images)
            settings = recipe.settings() | {"model": model}
            card = {"recipe": recipe.family, "settings": settings, "command": "", "data": "", "steps": 0}
            network = type(recipe)(**settings).build()
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
    assert "measurement must be one of 'ddpm_shapes32_steps'" in result.stderr
    assert "Traceback" not in result.output


def test_missing_and_damaged_results_say_what_to_do(data_folder):
    save_results("kept", "a command", {"value": 1})
    with pytest.raises(ValueError, match=r"no results 'absent'.*kept.*lecture26 measure absent --replace"):
        load_results("absent")
    file = data_folder / "results" / "kept.json"
    file.write_text(file.read_text()[:-9])
    with pytest.raises(ValueError, match="damaged.*lecture26 measure kept --replace"):
        load_results("kept")
