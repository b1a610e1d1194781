"""Images per second that Shapes renders: python benchmarks/shapes_rendering.py

Writes data/results/benchmark_shapes.json.
"""

import torch
from _timing import seconds, spread

from lecture26.kit.results import save_results
from lecture26.kit.shapes import Shapes

BATCH_SIZES = (64, 512)
REPEATS = 7
IMAGES_PER_REPEAT = 4096


def images_per_second(image_size: int, batch_size: int) -> dict[str, float]:
    """Median and extremes over REPEATS runs, each over IMAGES_PER_REPEAT images."""
    shapes = Shapes("train", image_size)
    batches = torch.randperm(IMAGES_PER_REPEAT).split(batch_size)
    shapes.batch(batches[0])  # the first call pays for start-up
    times = [seconds(lambda: [shapes.batch(indices) for indices in batches]) for _ in range(REPEATS)]
    return spread([IMAGES_PER_REPEAT / time for time in times])


def main() -> None:
    rates = {
        f"{image_size} pixels, batch {batch_size}": images_per_second(image_size, batch_size)
        for image_size in Shapes.image_sizes
        for batch_size in BATCH_SIZES
    }
    print(rates)
    save_results("benchmark_shapes", "python benchmarks/shapes_rendering.py", {"images_per_second": rates})


if __name__ == "__main__":
    main()
