"""An optimizer as an argument of an exercise: what it changes is a part of what the exercise does."""

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


def weights_of(argument: object) -> tuple[Tensor, ...]:
    """The weights that an optimizer among the arguments of a call moves; none of any other argument."""
    if not isinstance(argument, torch.optim.Optimizer):
        return ()
    return tuple(weight for group in argument.param_groups for weight in group["params"])
