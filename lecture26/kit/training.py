"""The one training loop: every model of the course is trained by `train`.

Everything random about a training sample is a function of (seed, n), where n counts the samples of
the whole run: step k of a global batch of G samples takes n = k G, ..., (k + 1) G - 1. So a run that
is stopped and started again goes on with the very samples it would have had, and a batch split over
several processes holds the very samples that one process would have drawn.
"""

import math
import os
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import TqdmWarning, tqdm

from lecture26.kit.files import replace_when_complete
from lecture26.kit.precision import PRECISIONS, Choice, autocast, choose_precision, say
from lecture26.kit.processes import own_settings, stays_on_cpu
from lecture26.kit.progress import bar_stream
from lecture26.kit.sample_draws import SampleDraws
from lecture26.kit.state_dicts import load_plain, plain_names
from lecture26.kit.validation import check_choice, check_positive_int

if TYPE_CHECKING:
    from accelerate import Accelerator

CLIP_GRADIENT_NORM = 1.0


class StateError(ValueError):
    """A state file that cannot be continued from: unreadable, or of a run with other settings."""


@dataclass
class History:
    """What a run has left behind.

    Attributes:
        losses: the loss of each step, the mean over the global batch.
        seconds: the time spent training, all interrupted parts together.
        precision: in which the network computed, "fp32" or "bf16".
    """

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    precision: str = "fp32"


def learning_rate_factor(step: int, steps: int, warmup_steps: int, decay_to: float) -> float:
    """Linear warm-up to 1, then half a cosine down to `decay_to`.

    Args:
        step: the step about to be taken, 0, ..., steps - 1.
        steps: the number of steps of the run.
        warmup_steps: the factor reaches 1 at step `warmup_steps` - 1.
        decay_to: the factor at the run's end, in [0, 1]; 1 keeps the rate constant.

    Returns:
        What to multiply the learning rate by.
    """
    warmup = min(1.0, (step + 1) / max(1, warmup_steps))
    progress = max(0, step - warmup_steps) / max(1, steps - warmup_steps)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return warmup * (decay_to + (1 - decay_to) * cosine)


def train(
    model: nn.Module,
    draw: Callable[[SampleDraws], dict[str, Tensor]],
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float = 0.0,
    warmup_steps: int = 0,
    decay_to: float = 0.0,
    average: nn.Module | None = None,
    seed: int = 0,
    precision: str = "fp32",
    state_file: str | os.PathLike | None = None,
    state_every: float = 60.0,
    settings: dict | None = None,
    watch: Callable[[int], None] | None = None,
    progress: bool = True,
) -> History:
    """Train a model with AdamW, on whatever device and however many processes Accelerate finds.

    With a state file, the run can be killed at any moment: the same call continues it, and on a CPU
    ends with bitwise the same weights as an uninterrupted one (same versions and threads). Ctrl-C and
    SIGTERM finish the step, write the state and raise KeyboardInterrupt; an error while a batch
    is drawn or its loss computed is raised on when the state is written.

    P processes of batch size B take the same steps as one process of batch size P B, but for rounding
    and for what the model itself draws (dropout).

    Args:
        model: an nn.Module; it is trained in place, moved to the device, and left there.
        draw: draw(random) -> dict of CPU tensors, batch first, made with the SampleDraws `random` only.
        loss: loss(model, batch) -> scalar, the mean over the batch.
        steps: the number of optimiser steps of the whole run.
        batch_size: samples per step and process.
        learning_rate: AdamW's rate at its highest.
        weight_decay: AdamW's weight decay.
        warmup_steps: steps over which the rate rises linearly.
        decay_to: the fraction of the rate left at the end of the cosine decay; 1 keeps it constant.
        average: None, or an nn.Module with `update(model)`, called after each step (an EMA of the weights).
        seed: a non-negative integer that decides every draw.
        precision: "fp32", "bf16" for autocast to bfloat16, or "auto" for what is faster on the device (see
            `lecture26.kit.precision`): decided before the first step and kept in the state.
        state_file: where to keep the state; None keeps none.
        state_every: seconds between two states written.
        settings: dict of plain values that name what is trained on what; a state with others is refused.
        watch: None, or watch(steps taken so far), called after each step, to measure something on the way.
            A run that goes on from its state repeats the steps, and calls, since it was written.
        progress: whether to show a progress bar (the environment variable TQDM_DISABLE hides it too).

    Returns:
        History: the loss of every step, and the time taken.

    Raises:
        ValueError, TypeError: on an argument out of range.
        ValueError: if several processes were started that Accelerate does not see.
        StateError: if the state file is unreadable or belongs to a run with other settings.
        FloatingPointError: if the loss is no longer finite.
        OSError: if the state cannot be written.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, with the state written.
    """
    check_positive_int("steps", steps)
    check_positive_int("batch_size", batch_size)
    check_choice("precision", precision, PRECISIONS)
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be above 0; got {learning_rate}")

    with warnings.catch_warnings():
        # In a notebook without ipywidgets, Accelerate's import complains that bars will be plain text.
        warnings.simplefilter("ignore", TqdmWarning)
        from accelerate import Accelerator  # takes a second to import, and only training needs it

    # Autocast is our own, below: Accelerate's would stay in the model, and fixes one precision per process.
    with own_settings():
        accelerator = Accelerator(cpu=stays_on_cpu(), mixed_precision="no")
    _check_processes(accelerator.num_processes)
    first_of_process, global_batch = (
        accelerator.process_index * batch_size,
        batch_size * accelerator.num_processes,
    )

    def drawn(step: int) -> dict[str, Tensor]:
        n = step * global_batch + first_of_process + torch.arange(batch_size)  # (B,)
        return {name: value.to(accelerator.device) for name, value in draw(SampleDraws(seed, n)).items()}

    model.to(accelerator.device)
    state = None if state_file is None else _read_state(Path(state_file))
    if precision == "auto":
        precision = _decided(state, lambda: choose_precision(model, drawn(0), loss), progress)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    if average is not None:
        average.to(accelerator.device)

    run = _Run(
        parts={"model": model, "optimizer": optimizer} | ({} if average is None else {"average": average}),
        fingerprint=(settings or {})
        | {
            "steps": steps,
            "batch_size": global_batch,  # of all processes, whose number may change from run to run
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
            "warmup_steps": warmup_steps,
            "decay_to": decay_to,
            "seed": seed,
            "precision": precision,
            "average": average is not None,
            "num_trained": sum(parameter.numel() for parameter in parameters),
        },
        # the states of several processes are the same, and one of them writes
        file=Path(state_file) if state_file is not None and accelerator.is_main_process else None,
    )
    history = History(precision=precision) if state is None else run.resume(state, Path(state_file))
    started = saved = time.monotonic()
    seconds_before = history.seconds
    model.train()

    show = progress and accelerator.is_main_process and not os.environ.get("TQDM_DISABLE")
    bar = tqdm(
        total=steps,
        initial=len(history.losses),
        disable=not show,
        unit="step",
        mininterval=0.5,
        file=bar_stream(),
    )
    # The loop seeds torch's global generators, and the caller must not notice.
    gpus = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(gpus), _stop_signals() as stop, bar:
        for step in range(len(history.losses), steps):
            with run.kept_on_error(history):
                batch = drawn(step)
                torch.manual_seed(_hash(seed, step, accelerator.process_index))  # for dropout
                batch_loss = _find_gradient(accelerator, wrapped, optimizer, loss, batch, precision)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * learning_rate_factor(step, steps, warmup_steps, decay_to)
            optimizer.step()
            if average is not None:
                average.update(model)

            mean_loss, told_to_stop = _exchange(accelerator, batch_loss, stop)
            if not math.isfinite(mean_loss):
                raise FloatingPointError(f"the loss is {mean_loss} at step {step}: try a lower learning rate")
            history.losses.append(mean_loss)
            history.seconds = seconds_before + time.monotonic() - started
            bar.update()
            bar.set_postfix(loss=f"{_smoothed(history.losses):.4f}", refresh=False)

            if watch is not None:
                watch(step + 1)
            finished = step == steps - 1
            if told_to_stop or finished or time.monotonic() - saved >= state_every:
                run.save(history)
                saved = time.monotonic()
            if told_to_stop and not finished:
                raise KeyboardInterrupt(f"training stopped after step {step}")
    return history


def _check_processes(found: int) -> None:
    """Refuse several processes that would each train a model of their own, as on an Apple chip."""
    started = int(os.environ.get("WORLD_SIZE", 1))
    if found != started:
        raise ValueError(
            f"{started} processes were started, and Accelerate found {found}: the environment "
            "variable ACCELERATE_USE_CPU=true keeps them on the CPU, where they find each other"
        )


def _decided(state: dict | None, choose: Callable[[], Choice], tell: bool) -> str:
    """The precision of a run that may choose: that of its state, else what is faster, by the main process."""
    from accelerate.utils import broadcast_object_list

    if state is not None:
        choice = Choice(state["fingerprint"].get("precision"), "as it was until now")
    else:
        (choice,) = broadcast_object_list([choose()])
    if tell:
        say(choice)
    return choice.precision


def _find_gradient(
    accelerator: "Accelerator",
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor],
    batch: dict[str, Tensor],
    precision: str,
) -> Tensor:
    """Put the clipped gradient into the parameters; returns this process' loss."""
    with autocast(accelerator.device, precision):
        batch_loss = loss(model, batch)
    optimizer.zero_grad()
    accelerator.backward(batch_loss)
    accelerator.clip_grad_norm_(model.parameters(), CLIP_GRADIENT_NORM)
    return batch_loss.detach().float()


def _exchange(accelerator: "Accelerator", batch_loss: Tensor, stop: threading.Event) -> tuple[float, bool]:
    """The mean loss over all processes, and whether any of them was told to stop."""
    told = torch.full_like(batch_loss, stop.is_set())
    mean_loss, share_told = accelerator.reduce(torch.stack([batch_loss, told]), reduction="mean").tolist()
    return mean_loss, share_told > 0


def _smoothed(losses: list[float], window: int = 100) -> float:
    """The mean of the latest losses, for the progress bar."""
    latest = losses[-window:]
    return sum(latest) / len(latest)


def _hash(*numbers: int) -> int:
    """A seed for torch from several non-negative integers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint32)[0])


def _read_state(file: Path) -> dict | None:
    """What a state file holds; None if there is none."""
    if not file.exists():
        return None
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        state["fingerprint"].get("precision")
    except Exception as error:  # torch raises half a dozen types on a broken file
        raise StateError(
            f"{file} is not a readable training state ({error}). Delete {file} to start anew."
        ) from error
    return state


@dataclass
class _Run:
    """What a state file holds: the state of every part, the history, and the settings it belongs to.

    `file` is where it is kept, None for nowhere.
    """

    parts: dict
    fingerprint: dict
    file: Path | None

    def save(self, history: History) -> None:
        """Write the state; OSError if that is not possible."""
        if self.file is None:
            return
        state = {
            "fingerprint": self.fingerprint,
            "losses": history.losses,
            "seconds": history.seconds,
            "parts": {name: _state_of(part) for name, part in self.parts.items()},
        }
        with replace_when_complete(self.file) as temporary:
            try:
                torch.save(state, temporary)
            except RuntimeError as error:  # torch's own way to say that a file cannot be written
                free = shutil.disk_usage(self.file.parent).free / 1e6
                raise OSError(
                    f"the training state {self.file} could not be written; its disk has {free:,.0f} MB free "
                    f"({str(error).splitlines()[0]})"
                ) from error

    @contextmanager
    def kept_on_error(self, history: History) -> Iterator[None]:
        """Write the state when a step fails before it has changed the weights, so that no step is lost."""
        try:
            yield
        except Exception:
            if history.losses:
                with suppress(OSError):  # the first error is the one to report
                    self.save(history)
            raise

    def resume(self, state: dict, file: Path) -> History:
        """Put the parts into the state that `file` holds, and return the history so far."""
        fingerprint = state["fingerprint"]
        differing = [
            f"{name} was {fingerprint.get(name)!r} and is now {self.fingerprint.get(name)!r}"
            for name in sorted(fingerprint.keys() | self.fingerprint.keys())
            if fingerprint.get(name) != self.fingerprint.get(name)
        ]
        if differing:
            raise StateError(
                f"{file} belongs to a run with other settings: {'; '.join(differing)}. "
                f"Delete {file} to start anew."
            )
        for name, part in self.parts.items():
            if isinstance(part, nn.Module):
                load_plain(part, state["parts"][name])
            else:
                part.load_state_dict(state["parts"][name])
        return History(state["losses"], state["seconds"], self.fingerprint["precision"])


def _state_of(part) -> dict:
    """The state of a part, under names that do not depend on what is compiled."""
    state = part.state_dict()
    return plain_names(state) if isinstance(part, nn.Module) else state


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C or SIGTERM into an event that the loop looks at; a second one acts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # Python lets only the main thread handle signals
        return

    def stop_after_this_step(number, frame):
        stop.set()
        signal.signal(number, previous[number])

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, stop_after_this_step)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
