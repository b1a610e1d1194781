"""What serving many tasks takes: python benchmarks/serving.py

Writes data/results/benchmark_serving.json. A server of chapter 09 answers the same requests, in random order,
from a PromptBank and from a network for each task, in turn.
"""

import threading
from concurrent.futures import Future
from queue import Queue

import torch
from _timing import compare
from torch import nn

from lecture26.kit.results import save_results
from lecture26.recipes import load_model
from lecture26.recipes.adaptation import NUM_PROMPTS, build
from lecture26.the_slides_checked import Request, SeparateModels, serve
from lecture26.visual_prompt_tuning import PromptBank, full_fine_tune, trainable_parameters

BACKBONE = "vit_photos32"
TASKS, NUM_CLASSES, NUM_REQUESTS, BATCH_SIZE, REPEATS = (2, 10, 50), 10, 256, 64, 5


def answered(answer, requests: list[tuple[torch.Tensor, str]]) -> list[torch.Tensor]:
    """The answers of a server to requests that all wait when it begins."""
    queue, replies = Queue(), [Future() for _ in requests]
    for (image, task), reply in zip(requests, replies, strict=True):
        queue.put(Request(image, task, reply))
    queue.put(None)
    server = threading.Thread(target=serve, args=(queue, answer, BATCH_SIZE))
    server.start()
    server.join()
    return [reply.result() for reply in replies]


def with_tasks(num_tasks: int) -> dict:
    """Requests a second, and bytes, of a bank and of separate networks with that many tasks."""
    vit = load_model(BACKBONE)
    names = [f"task {number}" for number in range(num_tasks)]
    bank = PromptBank(vit)
    for seed, name in enumerate(names):
        bank.add(name, build("vpt-deep", vit, NUM_CLASSES, NUM_PROMPTS, seed).eval())
    one_task = build("vpt-deep", vit, NUM_CLASSES, NUM_PROMPTS, 0)
    task_bytes = _bytes(trainable_parameters(one_task))
    copies = {name: full_fine_tune(vit, NUM_CLASSES).eval() for name in names}
    separate = SeparateModels(copies)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(NUM_REQUESTS, 3, 32, 32, generator=generator)
    chosen = torch.randint(num_tasks, (NUM_REQUESTS,), generator=generator).tolist()
    requests = [(image, names[number]) for image, number in zip(images, chosen, strict=True)]
    times = compare(lambda: answered(bank, requests), lambda: answered(separate, requests), REPEATS)
    return {
        "tasks": num_tasks,
        "requests_per_second": {
            "bank": NUM_REQUESTS / times["first_seconds"],
            "separate": NUM_REQUESTS / times["second_seconds"],
        },
        "separate_over_bank": times["ratio"],
        "memory_bytes": {
            "bank": _bytes(vit.parameters()) + num_tasks * task_bytes,
            "separate": sum(_bytes(copy.parameters()) for copy in copies.values()),
        },
    }


def _bytes(parameters: list[nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def main() -> None:
    runs = []
    for num_tasks in TASKS:
        runs.append(with_tasks(num_tasks))
        print(runs[-1], flush=True)
    results = {
        "backbone": BACKBONE,
        "num_prompts": NUM_PROMPTS,
        "num_requests": NUM_REQUESTS,
        "batch_size": BATCH_SIZE,
        "runs": runs,
    }
    save_results("benchmark_serving", "python benchmarks/serving.py", results)


if __name__ == "__main__":
    main()
