"""A device that no machine needs to have.

Like Apple's GPU it has no float64 and does not mix with the CPU: inside `simulated_device()`, tensors can be
moved to SIMULATED and computed with there, but an operation on tensors of both devices fails, and so does one
whose result would be float64. What the tensors hold lies on the CPU.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

SIMULATED = torch.device("meta")  # a name that torch knows and that needs no hardware

_COPIES = (torch.ops.aten._to_copy, torch.ops.aten.copy_)  # what may join tensors of two devices
_READS = (torch.ops.aten._local_scalar_dense,)  # what brings one number to the CPU: item(), if, min() <= ...


def simulated_device():
    """A context in which the simulated device works."""
    return _Mode()


def values_of(tensor):
    """The values of a tensor that must be on the simulated device, as a tensor on the CPU."""
    assert isinstance(tensor, _Simulated), f"the tensor is on {tensor.device}, not on the simulated device"
    return tensor.values


class _Simulated(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), dtype=values.dtype, device=SIMULATED
        )

    def __init__(self, values):
        self.values = values

    @classmethod
    def __torch_dispatch__(cls, operation, types, arguments=(), options=None):
        return _compute(operation, arguments, options or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        return _compute(operation, arguments, options or {})


def _compute(operation, arguments, options):
    tensors = [leaf for leaf in tree_leaves((arguments, options)) if isinstance(leaf, torch.Tensor)]
    if operation.overloadpacket not in _COPIES:
        # torch lets a number, a tensor without axes, join those of another device
        devices = {tensor.device for tensor in tensors if tensor.ndim or isinstance(tensor, _Simulated)}
        if len(devices) > 1:
            raise RuntimeError(f"{operation} with tensors on two devices: {devices}")
    device = options.get("device") or next((t.device for t in tensors if isinstance(t, _Simulated)), None)
    if options.get("device"):
        options = options | {"device": torch.device("cpu")}
    arguments, options = tree_map_only(_Simulated, lambda tensor: tensor.values, (arguments, options))
    result = operation(*arguments, **options)
    if device != SIMULATED or operation.overloadpacket in _READS:
        return result
    return tree_map_only(torch.Tensor, _moved, result)


def _moved(values):
    if values.dtype == torch.float64:
        raise TypeError("the simulated device has no float64")
    return _Simulated(values)
