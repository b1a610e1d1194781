"""Arguments whose change is a part of what an exercise does: an optimizer, and parameters by name."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class OptimizerArgument:
    """Gradient descent with momentum on some weights, in which an earlier step has left its gradients.

    For each call a torch.optim.SGD is made from it. Another argument that is made of the same tensors, such
    as a loss, shares the optimizer's weights.

    weights: tensors that ask for gradients.
    old_gradients: what stands in their .grad when the call begins.
    rate: the learning rate.
    """

    weights: tuple[Tensor, ...]
    old_gradients: tuple[Tensor, ...]
    rate: float

    def build(self, copy: Callable[[Tensor], Tensor]) -> torch.optim.SGD:
        """The optimizer itself, on copies of the weights."""
        weights = [copy(weight) for weight in self.weights]
        for weight, gradient in zip(weights, self.old_gradients, strict=True):
            weight.grad = gradient.clone()
        # with momentum, two steps along a gradient are not one along the double
        return torch.optim.SGD(weights, lr=self.rate, momentum=0.5)

    def __str__(self) -> str:
        return f"gradient descent on {len(self.weights)} tensors"


@dataclass(frozen=True, eq=False)
class ParametersArgument:
    """A network's parameters by name, of which an exercise decides which are to train.

    For each call a dictionary is made from it.

    names, values: of the parameters.
    old_gradients: what stands in their .grad when the call begins; None where nothing does.
    asking: whether each asks for gradients when the call begins.
    """

    names: tuple[str, ...]
    values: tuple[Tensor, ...]
    old_gradients: tuple[Tensor | None, ...]
    asking: tuple[bool, ...]

    def build(self, copy: Callable[[Tensor], Tensor]) -> dict[str, torch.nn.Parameter]:
        """The dictionary itself, of copies."""
        parameters = {}
        for name, value, gradient, asks in zip(
            self.names, self.values, self.old_gradients, self.asking, strict=True
        ):
            parameters[name] = torch.nn.Parameter(copy(value), requires_grad=asks)
            parameters[name].grad = None if gradient is None else gradient.clone()
        return parameters

    def __str__(self) -> str:
        return f"{len(self.names)} parameters by name"


def weights_of(argument: object) -> tuple[Tensor, ...]:
    """What a call did to the weights of an argument, for an optimizer and for parameters by name.

    Returns:
        An optimizer's weights; or the parameters as a step of AdamW with weight decay would leave them; none
        for any other argument.
    """
    if isinstance(argument, dict):
        return tuple(map(_after_a_step, argument.values()))
    if not isinstance(argument, torch.optim.Optimizer):
        return ()
    return tuple(weight for group in argument.param_groups for weight in group["params"])


def _after_a_step(parameter: Tensor) -> Tensor:
    """A parameter after a step of AdamW, which moves all that has a gradient, if only by weight decay.

    Where it asks for gradients it gets one that no symmetry hides, else it keeps what is left over.
    """
    moved = parameter.detach().clone().requires_grad_()
    pattern = torch.arange(moved.numel(), dtype=moved.dtype).cos().view_as(moved)
    moved.grad = pattern if parameter.requires_grad else parameter.grad
    torch.optim.AdamW([moved], lr=0.1, weight_decay=0.5).step()
    return moved
