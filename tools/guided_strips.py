"""Pictures of guidance by other networks' gradients, which a browser cannot compute: drawn at build time."""

import base64
import hashlib
import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from lecture26.classifier_guidance import classifier_guided
from lecture26.clip_guidance import clip_guided
from lecture26.commands.guides import parse_class
from lecture26.ddpm import ddim_step, sample
from lecture26.kit.checkpoints import load_card
from lecture26.kit.evaluation import read_right
from lecture26.kit.sample_draws import SampleDraws
from lecture26.kit.shapes import Shapes
from lecture26.latent_diffusion import to_pil
from lecture26.recipes import Trained, load_model

DENOISER, READER = "ddpm_shapes32", "reader_shapes32"
CLASSIFIER, CLIP = "noisy_classifier_shapes32", "noisy_clip_shapes32"
ASKED = ("red star", "blue circle", "yellow ring", "green cross", "purple heart", "cyan square")
SCALES = {"classifier": (0, 1, 2, 4, 8, 16, 32), "clip": (0, 50, 100, 200, 400, 800, 1600)}
STEPS, SEED = 25, 2


def guided_strips(cache: Path) -> dict:
    """The pictures of both ways to guide, as the page takes them.

    Args:
        cache: a file that keeps them until checkpoints or this file change; drawing takes some seconds.

    Returns:
        "steps", and for "classifier" and "clip" their "scales" and "rows": what is "asked", and for each
        scale one of "images", as the address of a PNG, and of "right", whether the reader reads what was
        asked for.
    """
    digest = _digest()
    if cache.exists():
        stored = json.loads(cache.read_text(encoding="utf-8"))
        if stored["digest"] == digest:
            return stored["strips"]
    strips = {"steps": STEPS} | {kind: _strips(kind) for kind in SCALES}
    cache.write_text(json.dumps({"digest": digest, "strips": strips}), encoding="utf-8")
    return strips


def _digest() -> str:
    """What changes when the pictures would: the checkpoints' hashes, and this file."""
    cards = [load_card(name)["sha256"] for name in (DENOISER, READER, CLASSIFIER, CLIP)]
    return hashlib.sha256("".join([*cards, Path(__file__).read_text(encoding="utf-8")]).encode()).hexdigest()


def _strips(kind: str) -> dict:
    labels = [
        parse_class(words, {name: Shapes.labels[name] for name in ("shape", "colour")}) for words in ASKED
    ]
    wanted = {
        name: torch.tensor([label[name] for label in labels]) for name in ("shape", "colour")
    }  # (B,) each
    guide = {"classifier": _by_classifier, "clip": _by_clip}[kind]
    drawn = [_draw(guide(wanted, scale)) for scale in SCALES[kind]]  # for each scale (B, C, H, W)
    right = [read_right(load_model(READER), images, wanted)["all"].tolist() for images in drawn]
    rows = [
        {
            "asked": words,
            "images": [_png_address(images[n]) for images in drawn],
            "right": [at_scale[n] for at_scale in right],
        }
        for n, words in enumerate(ASKED)
    ]
    return {"scales": SCALES[kind], "rows": rows}


def _by_classifier(wanted: dict[str, Tensor], scale: float) -> Callable:
    denoiser, classifier = Trained(DENOISER), Trained(CLASSIFIER)
    y = classifier.recipe.classes(wanted)
    return classifier_guided(denoiser.network, classifier.network, y, scale, denoiser.diffusion)


def _by_clip(wanted: dict[str, Tensor], scale: float) -> Callable:
    denoiser, clip = Trained(DENOISER), load_model(CLIP)
    with torch.no_grad():
        features = clip.encode_text(clip.tokenizer([f"a {words}" for words in ASKED]))  # (B, D)
    return clip_guided(denoiser.network, clip, features, scale, denoiser.diffusion)


def _draw(denoiser: Callable) -> Tensor:
    trained = Trained(DENOISER)
    size = trained.recipe.image_size
    shape = (trained.recipe.channels, size, size)
    noise = SampleDraws(SEED, torch.zeros(len(ASKED), dtype=torch.int64)).normal(*shape)  # the same for all
    diffusion = trained.diffusion.respace(STEPS)
    return sample(diffusion, denoiser, tuple(noise.shape), ddim_step, x_T=noise, progress=False)


def _png_address(image: Tensor) -> str:
    stream = BytesIO()
    to_pil(image[None])[0].save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
