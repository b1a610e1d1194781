"""A Stable Diffusion by name: random weights in its own configuration, scaled down, as its libraries save it.

Without the extra `stable`, which brings transformers, it is skipped; test_latent_diffusion.py has the rest.
"""

import json
import socket
from functools import partial

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from lecture26.classifier_free_guidance import classifier_free_guided
from lecture26.ddpm import ddpm_step
from lecture26.latent_diffusion import load_stable_diffusion
from lecture26.the_slides_checked import draw, parts_of

transformers = pytest.importorskip("transformers")

PROMPTS = ["a red star", "a ring"]
STEPS = 20  # all of the schedule's, where the two libraries' ways of leaving steps out do not matter
LENGTH = 77
SCHEDULE = {  # version 1.5's, but for the number of steps
    "num_train_timesteps": STEPS,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": True,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a StableDiffusionPipeline like version 1.5, a twentieth as wide, and the pipeline."""
    folder = tmp_path_factory.mktemp("stable")
    letters = [chr(number) for number in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=LENGTH
    )
    torch.manual_seed(0)
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32, 64, 64), cross_attention_dim=32, norm_num_groups=8
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=4,
        sample_size=64,
    )
    pipeline = StableDiffusionPipeline(
        vae, text, tokenizer, unet, DDIMScheduler(**SCHEDULE), None, None, requires_safety_checker=False
    )
    pipeline.scheduler = DDIMScheduler(**SCHEDULE)  # it has changed the first one: its steps begin at 1
    pipeline.save_pretrained(folder / "model")
    pipeline.set_progress_bar_config(disable=True)
    return folder / "model", pipeline


def test_the_parts_by_name_draw_what_diffusers_own_pipeline_draws(saved):
    folder, pipeline = saved
    ours = load_stable_diffusion(str(folder))
    assert (ours.image_size, ours.latent_scale, ours.diffusion.num_steps) == (64, 0.18215, STEPS)
    drawn = draw(parts_of(ours, w=6.5, steps=STEPS), PROMPTS, torch.Generator().manual_seed(0))
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    by_them = pipeline(
        PROMPTS, guidance_scale=7.5, num_inference_steps=STEPS, latents=noise, output_type="pt", eta=0.0
    ).images  # in [0, 1]
    assert torch.allclose((drawn.clamp(-1, 1) + 1) / 2, by_them, atol=2e-3)
    assert (drawn[0] - drawn[1]).abs().max() > 0.01


def test_guidance_is_minded(saved):
    folder, _ = saved
    ours = load_stable_diffusion(str(folder))
    weak, strong = (
        draw(parts_of(ours, w=w, steps=STEPS), PROMPTS, torch.Generator().manual_seed(0)) for w in (0.0, 50.0)
    )
    assert (weak - strong).abs().max() > 1e-3


def test_the_chapters_lines_run_on_it(saved, tmp_path):
    folder, _ = saved
    ours = load_stable_diffusion(str(folder))
    ours("a red star", steps=STEPS, w=6.5)[0].save(tmp_path / "star.png")
    parts = parts_of(ours, w=6.5, steps=STEPS)
    as_it_is = draw(parts, PROMPTS, torch.Generator().manual_seed(0))
    for changed in (
        parts._replace(guide=partial(classifier_free_guided, w=6.5, interval=(0, 9))),
        parts._replace(step=partial(ddpm_step, ours.diffusion)),
    ):
        images = draw(changed, PROMPTS, torch.Generator().manual_seed(0))
        assert images.isfinite().all() and (images - as_it_is).abs().max() > 1e-3


def test_without_a_connection_a_name_gives_a_clear_error(monkeypatch, tmp_path):
    def refused(*arguments, **keywords):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the library tries again, after some seconds
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="'nobody/nothing' could not be read .* takes a connection"):
        load_stable_diffusion("nobody/nothing")
