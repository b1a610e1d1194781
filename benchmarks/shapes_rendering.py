"""Images per second that Shapes renders, as JSON: python benchmarks/shapes_rendering.py"""

import json
import statistics
import time

import torch

from lecture26.kit.shapes import Shapes

BATCH_SIZES = (64, 512)
REPEATS = 7
IMAGES_PER_REPEAT = 4096


def images_per_second(image_size: int, batch_size: int) -> dict[str, float]:
    """Median and extremes over REPEATS runs, each over IMAGES_PER_REPEAT images."""
    shapes = Shapes("train", image_size)
    batches = torch.randperm(IMAGES_PER_REPEAT).split(batch_size)
    shapes.batch(batches[0])  # the first call pays for start-up
    rates = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for indices in batches:
            shapes.batch(indices)
        rates.append(IMAGES_PER_REPEAT / (time.perf_counter() - start))
    return {"median": round(statistics.median(rates)), "min": round(min(rates)), "max": round(max(rates))}


def main() -> None:
    rates = {
        f"{image_size} pixels, batch {batch_size}": images_per_second(image_size, batch_size)
        for image_size in Shapes.image_sizes
        for batch_size in BATCH_SIZES
    }
    print(json.dumps({"threads": torch.get_num_threads(), "images_per_second": rates}, indent=2))


if __name__ == "__main__":
    main()
