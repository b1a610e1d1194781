"""What guidance costs for each image, relative to none: python benchmarks/guidance_cost.py

Writes data/results/benchmark_guidance.json. Unguided and guided sampling take turns, with the same noise.
"""

from functools import partial

import torch
from _timing import compare

from lecture26.classifier_free_guidance import classifier_free_guided
from lecture26.classifier_guidance import classifier_guided
from lecture26.clip_guidance import clip_guided
from lecture26.ddpm import ddim_step, sample
from lecture26.kit.results import save_results
from lecture26.recipes import load_diffusion, load_model

MODEL, CONDITIONAL = "small_ddpm_shapes32", "conditional_ddpm_shapes32"  # of one size
CLASSIFIER = "noisy_classifier_shapes32"
CLIPS = {"x_t": "noisy_clip_shapes32", "x_0": "clip_shapes32"}
BATCH_SIZE, STEPS, REPEATS = 64, 5, 9


def main() -> None:
    network, diffusion = load_model(MODEL), load_diffusion(MODEL)
    x_T = torch.randn(BATCH_SIZE, 3, 32, 32)
    y = torch.zeros(BATCH_SIZE, dtype=torch.long)
    guided = {"classifier": classifier_guided(network, load_model(CLASSIFIER), y, 1.0, diffusion)}
    for through, name in CLIPS.items():
        clip = load_model(name)
        with torch.no_grad():
            text_features = clip.encode_text(clip.tokenizer(["a red star"]))
        guided[f"clip, {through}"] = clip_guided(network, clip, text_features, 1.0, diffusion, through)
    conds = (torch.full((BATCH_SIZE, 2), label) for label in (0, 8))  # a class, and no label
    guided["classifier-free"] = classifier_free_guided(load_model(CONDITIONAL), *conds, 1.0)

    def draw(denoiser):
        return partial(
            sample, diffusion.respace(STEPS), denoiser, x_T.shape, ddim_step, x_T=x_T, progress=False
        )

    results = {}
    for name, denoiser in guided.items():
        results[name] = compare(draw(network), draw(denoiser), REPEATS)
        print(name, results[name], flush=True)
    save_results(
        "benchmark_guidance",
        "python benchmarks/guidance_cost.py",
        {"model": MODEL, "batch_size": BATCH_SIZE, "steps": STEPS, "guided_over_unguided": results},
    )


if __name__ == "__main__":
    main()
