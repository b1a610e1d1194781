"""Seconds to import the package, beside torch alone: python benchmarks/import_time.py

Writes data/results/benchmark_import.json; each import runs in a fresh process, in turn.
"""

import subprocess
import sys
from functools import partial

from _timing import seconds, spread

from lecture26.kit.results import save_results

STATEMENTS = ("import torch", "import lecture26", "import lecture26.ddpm, lecture26.unet")
REPEATS = 7


def main() -> None:
    times = {statement: [] for statement in STATEMENTS}
    for _ in range(REPEATS):
        for statement in STATEMENTS:
            times[statement].append(
                seconds(partial(subprocess.run, [sys.executable, "-c", statement], check=True))
            )
    results = {statement: spread(values) for statement, values in times.items()}
    print(results)
    save_results("benchmark_import", "python benchmarks/import_time.py", results)


if __name__ == "__main__":
    main()
