"""How the benchmarks take their times: alternating runs, and ratios within one run."""

import statistics
import time
from collections.abc import Callable


def seconds(action: Callable[[], object]) -> float:
    """The wall time of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def compare(first: Callable[[], object], second: Callable[[], object], repeats: int) -> dict:
    """Time two actions in turn, so that whatever else the machine does meets both alike.

    Args:
        first, second: what to time; each is called once beforehand, since first calls pay for start-up.
        repeats: the number of pairs.

    Returns:
        dict: the median seconds of both, and of the ratio second / first the median and the extremes.
    """
    first(), second()
    pairs = [(seconds(first), seconds(second)) for _ in range(repeats)]
    ratios = [theirs / ours for ours, theirs in pairs]
    return {
        "first_seconds": round(statistics.median(ours for ours, _ in pairs), 5),
        "second_seconds": round(statistics.median(theirs for _, theirs in pairs), 5),
        "ratio": spread(ratios),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median and extremes."""
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
    }
