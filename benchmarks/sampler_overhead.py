"""The time that samplers take apart from the network: python benchmarks/sampler_overhead.py

Writes data/results/benchmark_sampler.json. The same sampler runs with a denoiser that returns its input
at once; its time is set against as many evaluations of the smallest network of shapes, in the same run.
"""

from functools import partial

import torch
from _timing import seconds, spread

from lecture26.ddpm import ddim_step, ddpm_step, sample
from lecture26.kit.results import save_results
from lecture26.recipes import load_diffusion, load_model

MODEL, BATCH_SIZE, STEPS, REPEATS = "small_ddpm_shapes32", 64, 50, 9


@torch.no_grad()
def main() -> None:
    network = load_model(MODEL)
    diffusion = load_diffusion(MODEL).respace(STEPS)
    shape = (BATCH_SIZE, 3, 32, 32)
    x_t, t = torch.randn(shape), torch.zeros(BATCH_SIZE, dtype=torch.long)
    network(x_t, t)  # the first call pays for start-up

    def evaluations():
        for _ in range(STEPS):
            network(x_t, t)

    results = {}
    for name, step in {"ddpm": ddpm_step, "ddim": ddim_step}.items():
        walk = partial(sample, diffusion, lambda x_t, t: x_t, shape, step, progress=False)
        shares = [seconds(walk) / seconds(evaluations) for _ in range(REPEATS)]
        results[name] = spread(shares)
        print(name, results[name], flush=True)
    save_results(
        "benchmark_sampler",
        "python benchmarks/sampler_overhead.py",
        {"model": MODEL, "batch_size": BATCH_SIZE, "share_of_the_network_time": results},
    )


if __name__ == "__main__":
    main()
