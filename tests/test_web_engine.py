"""The networks in the browser compute what PyTorch computes: each within 1e-4, whole pictures within 1e-3."""

from functools import partial

import pytest
import torch
from browser_code import run_in_node

from course import ROOT
from lecture26.classifier_free_guidance import classifier_free_guided
from lecture26.ddpm import Diffusion, cosine_betas, ddim_step, sample
from lecture26.kit.data import load
from lecture26.latent_diffusion import recorded_weights, word_maps
from lecture26.recipes import load_diffusion, load_model
from lecture26.recipes.latent import load_pipeline

pytestmark = pytest.mark.slow
NETWORK, PICTURE = 1e-4, 1e-3  # the largest difference of an output, and of a pixel after all steps
COUNTS = tuple(range(2, 120))
LABELS = [[3, 0], [6, 2]]  # a red star, a yellow heart
WISHES = [
    {"labels": LABELS, "ws": [1.0, 4.0], "steps": 20},
    {"labels": LABELS, "ws": [0.0, 0.0], "steps": 5},
    {"labels": LABELS, "ws": [0.0, -1.0], "steps": 5},
]
PROMPT = "a small red star to the left of a large blue ring on a dark background"
TEXTS = [PROMPT, ""]


def rows(tensor):
    """Each sample as a list of numbers."""
    return tensor.flatten(1).tolist()


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=generator)
    images = torch.stack([load("scenes", "test", 64).batch([n])["image"][0] for n in range(2)])
    unknown = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    unknown[..., 9:40, 30:55] = True  # its border lies within latents
    return {
        "x": load("shapes", "test", 32).batch(range(2))["image"] + 0.3 * normal(2, 3, 32, 32),
        "noise": normal(2, 3, 32, 32),
        "z": normal(2, 4, 16, 16),
        "images": images,
        "unknown": unknown,
    }


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline("text_to_image_shapes64")


@pytest.fixture(scope="module")
def answers(inputs, pipeline):
    """What the browser's code computes."""
    classes = {"x": rows(inputs["x"]), "noise": rows(inputs["noise"]), "labels": LABELS, "t": 500}
    text = {
        "z": rows(inputs["z"]),
        "rows": pipeline.text_encoder.tokenizer(TEXTS).tolist(),
        "t": 321,
        "images": rows(inputs["images"]),
        "image": rows(inputs["images"])[0],
        "prompt": PROMPT,
        "ws": [2.0, -1.0],
        "steps": 12,
        "strength": 0.625,  # of 12 steps, 7.5: rounded to 8
        "unknown": inputs["unknown"].flatten().int().tolist(),
    }
    job = {
        "folder": str(ROOT / "data" / "checkpoints"),
        "class": classes | {"wishes": WISHES},
        "text": text,
        "counts": COUNTS,
    }
    return run_in_node("engine.mjs", job)


def assert_same(found, wanted, atol):
    found = torch.tensor(found, dtype=torch.float32).reshape(wanted.shape)
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


def assert_reads_alike(found, reader, images):
    for name, logits in reader(images).items():
        assert_same([each[name] for each in found], logits, NETWORK)


def test_schedules(answers):
    whole = Diffusion(cosine_betas(1000))
    for count, schedule in zip(COUNTS, answers["schedules"], strict=True):
        wanted = whole.respace(count)
        assert schedule["steps"] == wanted.steps.tolist()
        found = torch.tensor(schedule["alphaBar"], dtype=torch.float64)
        torch.testing.assert_close(found, wanted.alpha_bar, rtol=1e-7, atol=0)  # at the end it is 2e-9


@pytest.mark.parametrize("kind", ["fast", "plain"])
@torch.no_grad()
def test_class_conditional_network_and_its_reader(answers, inputs, kind):
    found = answers[kind]
    assert found["isFast"] == (kind == "fast")
    wanted = load_model("conditional_ddpm_shapes32")(
        inputs["x"], torch.tensor([500, 500]), torch.tensor(LABELS)
    )
    assert_same(found["outputs"], wanted, NETWORK)
    assert_reads_alike(found["read"], load_model("reader_shapes32"), inputs["x"])


@pytest.mark.parametrize("number", range(len(WISHES)))
def test_images_of_a_class(answers, inputs, number):
    wish = WISHES[number]
    diffusion = load_diffusion("conditional_ddpm_shapes32").respace(wish["steps"])
    network, cond, null_cond = load_model("conditional_ddpm_shapes32"), torch.tensor(LABELS), [[8, 8]]
    for n, w in enumerate(wish["ws"]):  # each image has a weight of its own
        denoiser = classifier_free_guided(network, cond[n : n + 1], torch.tensor(null_cond), w)
        noise = inputs["noise"][n : n + 1]
        wanted = sample(diffusion, denoiser, noise.shape, ddim_step, x_T=noise, progress=False)
        assert_same(answers["fast"]["drawn"][number][n], wanted, PICTURE)


@torch.no_grad()
def test_text_encoder_and_the_unet_that_listens(answers, inputs, pipeline):
    found, cond = answers["text"], pipeline.condition(TEXTS)
    context = torch.tensor(found["context"]).reshape(-1, *cond["mask"].shape).permute(1, 2, 0)
    assert_same(context.tolist(), cond["context"], NETWORK)
    assert_same(found["mask"], cond["mask"].flatten().float(), 0)
    with recorded_weights(pipeline.denoiser) as recorded:
        wanted = pipeline.denoiser(inputs["z"], torch.tensor([321, 321]), cond)
    assert_same(found["outputs"], wanted, NETWORK)
    for side in (16, 8, 4):
        maps = [word_maps(w, side, side)[0] for w in recorded if w.shape[2] == side**2]
        wanted = torch.stack(maps).mean(dim=0).flatten(1).T  # (places, tokens)
        assert_same(found["maps"][str(side)], wanted.contiguous(), NETWORK)


@torch.no_grad()
def test_vae_and_readers_at_64_pixels(answers, inputs, pipeline):
    found = answers["text"]
    assert_same(found["decoded"], pipeline.decode(inputs["z"]), NETWORK)
    assert_same(found["encoded"], pipeline.encode(inputs["images"]), NETWORK)
    for kind in ("shapes", "scenes"):
        assert_reads_alike(found["read"][kind], load_model(f"reader_{kind}64"), inputs["images"])


@pytest.mark.parametrize("number", range(2))
def test_pictures_of_a_sentence(answers, inputs, pipeline, number):
    """Text to image, image to image and inpainting, at two weights."""
    found, w = answers["text"], (2.0, -1.0)[number]
    noise = inputs["z"][number : number + 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lecture26.latent_diffusion.noise_like", lambda like, generator: noise)
        options = {"w": w, "steps": 12}
        drawn = pipeline.text_to_image(PROMPT, **options, progress=False)
        image = inputs["images"][:1]
        again = pipeline.image_to_image(image, PROMPT, 0.625, **options)
        inpainted = pipeline.inpaint(image, inputs["unknown"], PROMPT, **options)
    assert_same(found["drawn"][number], drawn[0], PICTURE)
    assert_same(found["again"][number], again[0], PICTURE)
    assert_same(found["inpainted"][number], inpainted[0], PICTURE)
