"""What the wrong answers of several chapters are made of."""

import math
from collections.abc import Callable
from inspect import signature

import torch
from torch import Tensor

from .core import Misconception


def with_arguments(reference: Callable, **changes: Callable) -> Callable:
    """The reference, called with some arguments changed; each change is a function of all, by their names."""
    names = signature(reference).parameters

    def wrong(*arguments):
        given = dict(zip(names, arguments, strict=True))
        return reference(**given | {name: change(**given) for name, change in changes.items()})

    return wrong


def with_result(reference: Callable, change: Callable[[Tensor], Tensor]) -> Callable:
    """The reference, with its result changed."""
    return lambda *arguments: change(reference(*arguments))


def schedule_mistakes(reference: Callable, *names: str) -> tuple[Misconception, ...]:
    """Two mistakes that every function with schedule arguments (B, 1, ...) of these names invites."""

    def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable:
        return lambda **given: change(given[name])

    def with_tables(change: Callable[[Tensor], Tensor]) -> Callable:
        return with_arguments(reference, **{name: changed(name, change) for name in names})

    return (
        Misconception(
            "one step for the whole batch",
            with_tables(lambda table: table[:1]),
            "The schedule at the first sample's step is used for all. Each sample has a step of its own.",
        ),
        Misconception(
            "schedule along the last axis",
            with_tables(lambda table: table.flatten()),
            "A tensor of shape (B,) broadcasts against the last axis, not against the batch: "
            "keep (B, 1, ...).",
        ),
    )


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """One value for each sample, (B,), as (B, 1, ...) with as many axes as `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))


def unit(x: Tensor) -> Tensor:
    """Each sample divided by its length."""
    return x / per_sample(x.flatten(1).norm(dim=1), x)


def scores(q: Tensor, k: Tensor) -> Tensor:
    """What the softmax of attention gets: q k^T / sqrt(d)."""
    return q @ k.mT / math.sqrt(q.shape[-1])


def patch_grid(x: Tensor, p: int) -> Tensor:
    """(B, C, H, W) to (B, C, H / p, i, W / p, j): each pixel's patch, and its place (i, j) in there."""
    return x.unflatten(3, (-1, p)).unflatten(2, (-1, p))


def gradient_of(score: Callable[[Tensor, Tensor], Tensor], create_graph: bool = False) -> Callable:
    """A function (model, x_t, t, target): the gradient of the summed score(model(x_t, t), target) at x_t."""

    def wrong(model, x_t, t, target):
        with torch.inference_mode(False), torch.enable_grad():
            x_t, t, target = x_t.detach().clone().requires_grad_(), t.clone(), target.clone()
            total = score(model(x_t, t), target).sum()
            return torch.autograd.grad(total, x_t, create_graph=create_graph)[0]

    return wrong


def gradient_of_outputs(score: Callable[[Tensor, Tensor], Tensor]) -> Callable:
    """Like gradient_of, but at the model's outputs."""

    def wrong(model, x_t, t, target):
        with torch.inference_mode(False), torch.enable_grad():
            outputs = model(x_t.detach().clone(), t.clone()).detach().requires_grad_()
            return torch.autograd.grad(score(outputs, target.clone()).sum(), outputs)[0]

    return wrong


def gradient_in_the_mode_around(score: Callable[[Tensor, Tensor], Tensor]) -> Callable:
    """Like gradient_of, but it neither switches gradients on nor leaves inference mode."""

    def wrong(model, x_t, t, target):
        x_t = x_t.detach().clone().requires_grad_()
        return torch.autograd.grad(score(model(x_t, t), target).sum(), x_t)[0]

    return wrong


# --- Training steps: callables (optimizer, compute) -> the loss, with compute() -> the loss of the batch ---


def step_mistakes(training_step: Callable[[Callable], Callable]) -> tuple[Misconception, ...]:
    """The mistakes that every training step invites in its use of the optimizer.

    training_step: of a function (optimizer, compute), the exercise's function that uses the optimizer so.
    """
    return (
        Misconception(
            "old gradients kept",
            training_step(_gradients_kept),
            "backward adds to the gradients that are there: those of the step before must be cleared.",
        ),
        Misconception(
            "no gradient at the step",
            training_step(_zeroed_before_the_step),
            "The weights have not moved: when the optimizer steps, the gradients are empty. Ask of each line "
            "whether it fills or empties them.",
        ),
        Misconception(
            "step before backward",
            training_step(_step_before_backward),
            "The optimizer steps while the gradients of the step before stand there; this loss has not been "
            "differentiated yet.",
        ),
        Misconception(
            "loss after the step",
            training_step(_loss_after_the_step),
            "The loss is computed anew after the weights have moved. Return the one that the step began "
            "with.",
        ),
        Misconception(
            "two steps",
            training_step(_two_steps),
            "The optimizer steps twice along one gradient. There is one step for each gradient.",
        ),
    )


def _gradients_kept(optimizer, compute):
    """The gradients of the step before are not taken away."""
    value = compute()
    value.backward()
    optimizer.step()
    return value.detach()


def _zeroed_before_the_step(optimizer, compute):
    """The gradients are taken away before the optimizer has seen them."""
    value = compute()
    value.backward()
    optimizer.zero_grad()
    optimizer.step()
    return value.detach()


def _step_before_backward(optimizer, compute):
    """The optimizer steps along the gradients of the step before."""
    value = compute()
    optimizer.step()
    optimizer.zero_grad()
    return value.detach()


def _loss_after_the_step(optimizer, compute):
    """The loss is told that the weights have after the step."""
    optimizer.zero_grad()
    compute().backward()
    optimizer.step()
    return compute().detach()


def _two_steps(optimizer, compute):
    """The optimizer steps twice along one gradient."""
    optimizer.zero_grad()
    value = compute()
    value.backward()
    optimizer.step()
    optimizer.step()
    return value.detach()
