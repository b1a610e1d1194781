"""What adapting and serving a backbone costs: python benchmarks/adaptation.py

Writes data/results/benchmark_adaptation.json. Each method takes turns with full fine-tuning, step by step; a
PromptBank takes turns with as many fine-tuned networks, on the same mixed batches.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from _timing import compare
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy

from lecture26.kit.results import save_results
from lecture26.recipes import load_model
from lecture26.recipes.adaptation import METHODS, NUM_PROMPTS, build
from lecture26.visual_prompt_tuning import PromptBank, full_fine_tune, trainable_parameters

BACKBONE = "vit_photos32"
BATCH_SIZE, NUM_CLASSES, NUM_TASKS, REPEATS = 64, 10, 10, 9


def training_step(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    """A step of AdamW on one batch, to be timed."""
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def kept_bytes(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> int:
    """The memory of what a forward pass keeps for the backward pass, the model's own tensors not counted."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), x)}
    storages = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = cross_entropy(model(x), y)
    del loss  # until here everything kept is alive, so that no address is used twice
    return sum(storages.values())


def methods(x: torch.Tensor, y: torch.Tensor) -> dict:
    """Time and memory of a training step by each method, beside full fine-tuning."""
    vit = load_model(BACKBONE)
    models = {name: build(name, vit, NUM_CLASSES, NUM_PROMPTS, seed=0).train() for name in METHODS}
    rows = {}
    for name, model in models.items():
        trained = sum(parameter.numel() for parameter in trainable_parameters(model))
        rows[name] = {
            "full_over_method": compare(
                training_step(model, x, y), training_step(models["full"], x, y), REPEATS
            ),
            "kept_bytes": kept_bytes(model, x, y),
            "gradients_and_moments_bytes": 3 * 4 * trained,  # of AdamW, in float32
        }
        print(name, rows[name], flush=True)
    return rows


@torch.no_grad()
def bank(x: torch.Tensor) -> dict:
    """A bank against separate networks: memory, disk, and the time for a batch that mixes all tasks."""
    vit = load_model(BACKBONE)
    names = [f"task {number}" for number in range(NUM_TASKS)]
    tasks = {name: build("vpt-deep", vit, NUM_CLASSES, NUM_PROMPTS, seed) for seed, name in enumerate(names)}
    separate = {name: full_fine_tune(vit, NUM_CLASSES).eval() for name in names}
    served = PromptBank(vit)
    for name, task in tasks.items():
        served.add(name, task)
    asked = [names[image % NUM_TASKS] for image in range(len(x))]
    rows = {name: torch.tensor([i for i, other in enumerate(asked) if other == name]) for name in names}
    times = compare(
        lambda: served(x, asked), lambda: [separate[name](x[rows[name]]) for name in names], REPEATS
    )
    with tempfile.TemporaryDirectory() as folder:
        network = Path(folder) / "network.safetensors"
        save_file(vit.state_dict(), network)
        one = Path(folder) / "task.safetensors"
        served.save(names[0], one)
        network_bytes, task_bytes = network.stat().st_size, one.stat().st_size
    in_memory = {
        "bank": _bytes(vit) + NUM_TASKS * 4 * sum(p.numel() for p in trainable_parameters(tasks[names[0]])),
        "separate": sum(_bytes(model) for model in separate.values()),
    }
    return {
        "tasks": NUM_TASKS,
        "batch_size": len(x),
        "memory_bytes": in_memory,
        "disk_bytes": {
            "bank": network_bytes + NUM_TASKS * task_bytes,
            "separate": NUM_TASKS * network_bytes,
        },
        "seconds": times,
    }


def _bytes(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH_SIZE, 3, 32, 32, generator=generator)
    y = torch.randint(NUM_CLASSES, (BATCH_SIZE,), generator=generator)
    results = {
        "backbone": BACKBONE,
        "batch_size": BATCH_SIZE,
        "num_prompts": NUM_PROMPTS,
        "methods": methods(x, y),
        "bank": bank(x),
    }
    print(results["bank"])
    save_results("benchmark_adaptation", "python benchmarks/adaptation.py", results)


if __name__ == "__main__":
    main()
