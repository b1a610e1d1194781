"""A small training run, for test_training.py to call, and to start as processes that it can kill.

As a program: training_run.py STATE_FILE OUT_FILE BATCH_SIZE DROPOUT DELAY. It prints a line for each step,
and exits with EXIT_STOPPED after Ctrl-C or SIGTERM.
"""

import sys
import time

import torch
from torch import nn

from lecture26.kit import training
from lecture26.kit.precision import Choice
from lecture26.kit.processes import process_state
from lecture26.kit.training import train
from lecture26.unet import EMA

STEPS = 20
EXIT_STOPPED = 3


def run(state_file, batch_size=4, dropout=0.5, before_step=lambda: None, precision="fp32"):
    """Train a small convolutional network; returns its weights, their average and the losses."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.SiLU(), nn.Dropout(dropout), nn.Conv2d(4, 1, 3, padding=1)
    )
    average = EMA(model, decay=0.9)

    def draw(random):
        before_step()
        return {"x": random.normal(1, 8, 8), "y": random.uniform()}

    def loss(network, batch):
        return (network(batch["x"]).mean(dim=(1, 2, 3)) - batch["y"]).square().mean()

    history = train(
        model,
        draw,
        loss,
        steps=STEPS,
        batch_size=batch_size,
        learning_rate=1e-2,
        weight_decay=0.1,
        warmup_steps=5,
        average=average,
        seed=3,
        precision=precision,
        state_file=state_file,
        state_every=0.0,
        progress=False,
    )
    return {"model": model.state_dict(), "average": average.state_dict(), "losses": history.losses}


def main(state_file, out_file, batch_size, dropout, delay):
    def before_step():
        print("step", flush=True)
        time.sleep(float(delay))

    torch.set_num_threads(1)
    is_main = process_state().is_main_process  # asked before training, as a recipe does
    by_itself = Choice("fp32" if is_main else "bf16", "as a test would have it")
    training.choose_precision = lambda *arguments: by_itself
    try:
        result = run(state_file, int(batch_size), float(dropout), before_step, "auto")
    except KeyboardInterrupt:
        sys.exit(EXIT_STOPPED)

    if is_main:
        torch.save(result, out_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
