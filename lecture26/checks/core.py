"""What an exercise is, what a call of a candidate did, and how two such outcomes differ."""

import inspect
import io
import linecache
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .callables import CallableArgument
from .optimizers import OptimizerArgument, ParametersArgument, weights_of

# Two outcomes agree where |a - b| <= tolerance (1 + |b|). Rewriting a formula costs a few roundings, far less
# than this. Values are judged in float64; float32 is there to see that the dtype is kept.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-4}

MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


@dataclass(frozen=True)
class Case:
    """One set of arguments, in the order of the function's parameters; note says what is special about it.

    mode: what the arguments are made and the function is called under, one of MODES.
    """

    note: str
    arguments: tuple
    mode: str = "grad"


@dataclass(frozen=True)
class Misconception:
    """A wrong answer that learners really write.

    name: the mistake in a few words.
    function: an executable form of it, called like the reference.
    hint: which mistake it is, and what is right.
    """

    name: str
    function: Callable
    hint: str


@dataclass(frozen=True)
class Exercise:
    """A pure function of tensors and plain numbers that a learner writes.

    name: "chapter.function".
    derivation: where the notebook derives it, as '"Heading of the section", equation (1.2)'.
    reference: the finished function.
    cases: function of a seed that returns a list of cases; another seed gives other numbers and sizes.
    misconceptions: the wrong answers to tell apart.
    """

    name: str
    derivation: str
    reference: Callable
    cases: Callable[[int], list[Case]]
    misconceptions: tuple[Misconception, ...]

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the function's parameters, in order."""
        return tuple(inspect.signature(self.reference).parameters)


@dataclass(frozen=True)
class Outcome:
    """What one call did.

    Attributes:
        outputs: the tuple returned, or the one object returned (then `single`); tensors without their graph.
        attached: for each output, whether it carried gradient.
        gradients: for each argument, the derivative of a fixed linear function of the outputs, or None where
            the argument asks for no gradient or none arrived.
        changed: the positions of the arguments that the call modified.
        marked: the positions of the arguments in which the call left a .grad.
        weights: of the optimizers among the arguments, as the call left them, and of parameters by name,
            after a step of what it left; these may be changed and marked.
        error: the type of the exception raised, if any; error_text: what it says, and where.
    """

    outputs: tuple = ()
    single: bool = True
    attached: tuple[bool, ...] = ()
    gradients: tuple[Tensor | None, ...] = ()
    changed: tuple[int, ...] = ()
    marked: tuple[int, ...] = ()
    weights: tuple[Tensor, ...] = ()
    error: str | None = None
    error_text: str = ""

    @property
    def unfilled(self) -> bool:
        """Whether this is what a body of `...` gives: None, an ellipsis, or NotImplementedError."""
        if self.error:
            return self.error == "NotImplementedError"
        return bool(self.outputs) and all(output is None or output is ... for output in self.outputs)


@dataclass(frozen=True)
class Remains:
    """What a call left in its arguments.

    tensors: those that each argument is made of, as the call left them; an optimizer's weights are none.
    gradients: for each of these tensors, what stands in its .grad.
    """

    tensors: tuple[tuple[Tensor, ...], ...] = ()
    gradients: tuple[tuple[Tensor | None, ...], ...] = ()


def call(function: Callable, case: Case, seed: int = 0, silent: bool = True) -> Outcome:
    """Call a function on copies of a case's arguments and say what it did.

    Whatever the function raises (but an interrupt) is part of that. The call happens in torch's default
    state, in the case's mode; `silent` swallows what the function prints.
    """
    return with_traces(*observe(function, case, seed, silent), case.arguments)


def observe(function: Callable, case: Case, seed: int = 0, silent: bool = True) -> tuple[Outcome, Remains]:
    """What `call` finds, but for what became of the arguments: `with_traces` tells it by what is left."""
    try:
        with default_state(seed), _silence() if silent else nullcontext():
            with MODES[case.mode]():
                given = _copies(case.arguments)
                returned = function(*given)
            single = not isinstance(returned, tuple | list)
            outputs = (returned,) if single else tuple(returned)
            gradients = _gradients(outputs, given)
    except (Exception, SystemExit) as error:
        return Outcome(error=type(error).__name__, error_text=_error_text(error, function)), Remains()
    tensors = tuple(map(_tensors, given))
    outcome = Outcome(
        outputs=tuple(output.detach() if isinstance(output, Tensor) else output for output in outputs),
        single=single,
        attached=tuple(isinstance(output, Tensor) and output.requires_grad for output in outputs),
        gradients=gradients,
        weights=tuple(weight.detach() for argument in given for weight in weights_of(argument)),
    )
    return outcome, Remains(tensors, tuple(tuple(tensor.grad for tensor in of_one) for of_one in tensors))


def with_traces(outcome: Outcome, remains: Remains, arguments: tuple) -> Outcome:
    """An outcome that also says which arguments were changed and marked, by what a call with them left."""
    return replace(outcome, changed=_changed(remains, arguments), marked=_marked(remains, arguments))


@contextmanager
def default_state(seed: int = 0) -> Iterator[None]:
    """Torch as it starts, whatever is set around: gradients on, float32 on the CPU, a seeded generator."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    with (
        torch.random.fork_rng(devices=[]),
        nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"),
        torch.inference_mode(False),
        torch.enable_grad(),
        warnings.catch_warnings(action="ignore"),
    ):
        try:
            # The tensors are tiny: on a busy machine, waiting for a second thread takes longer than the work.
            torch.set_num_threads(1)
            torch.set_default_dtype(torch.float32)
            torch.default_generator.manual_seed(seed)
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_default_dtype(dtype)


@contextmanager
def _silence() -> Iterator[None]:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def difference(actual: Outcome, expected: Outcome, parameters: tuple[str, ...]) -> str | None:
    """How `actual` differs from `expected`, as a sentence about the function; None where the two agree."""
    sentence = (
        _difference_in_arguments(actual, expected, parameters)
        or difference_in_results(actual, expected)
        or _difference_in_attachment(actual, expected)
    )
    if sentence:
        return sentence
    name = wrong_gradient(actual, expected, parameters)
    if name:
        return f"the values are right, but not their gradient with respect to {name}: is it cut on the way?"
    return None


def difference_in_results(actual: Outcome, expected: Outcome) -> str | None:
    """How the results alone, or the errors raised in their place, differ."""
    if actual.error or expected.error:
        return _difference_in_errors(actual, expected)
    if actual.unfilled:
        return "it returns None: a path through the function has no `return`."
    if (actual.single, len(actual.outputs)) != (expected.single, len(expected.outputs)):
        return f"it returns {_count(actual)}, where {_count(expected)} is expected."
    for label, result, wanted in zip(_labels(actual), actual.outputs, expected.outputs, strict=True):
        sentence = difference_in_kind(result, wanted, label) or _difference_in_values(result, wanted, label)
        if sentence:
            return sentence
    for weight, wanted in zip(actual.weights, expected.weights, strict=False):
        label = "a weight, after the call,"
        sentence = difference_in_kind(weight, wanted, label) or _difference_in_values(weight, wanted, label)
        if sentence:
            return sentence
    return None


def difference_in_traces(actual: Outcome, expected: Outcome, parameters: tuple[str, ...]) -> str | None:
    """How the calls differ in what they did to the arguments, and in which results carry gradient."""
    in_arguments = _difference_in_arguments(actual, expected, parameters)
    return in_arguments or _difference_in_attachment(actual, expected)


def wrong_gradient(actual: Outcome, expected: Outcome, parameters: tuple[str, ...]) -> str | None:
    """The name of the first argument whose gradient differs, if one does."""
    # After an error there are no gradients.
    for name, gradient, wanted in zip(parameters, actual.gradients, expected.gradients, strict=False):
        if gradient is None and wanted is None:
            continue
        # An argument that no gradient arrives at has the gradient 0.
        gradient = torch.zeros_like(wanted) if gradient is None else gradient
        wanted = torch.zeros_like(gradient) if wanted is None else wanted
        if not _agree(gradient, wanted):
            return name
    return None


def _difference_in_arguments(actual: Outcome, expected: Outcome, parameters: tuple[str, ...]) -> str | None:
    if actual.changed != expected.changed:
        names = " and ".join(parameters[position] for position in actual.changed)
        return f"it changes its argument {names} in place: compute a new tensor instead."
    if actual.marked != expected.marked:
        names = " and ".join(parameters[position] for position in actual.marked)
        return f"it leaves a .grad behind in its argument {names}."
    return None


def _difference_in_attachment(actual: Outcome, expected: Outcome) -> str | None:
    for label, attached, wanted in zip(_labels(actual), actual.attached, expected.attached, strict=False):
        if wanted and not attached:
            return f"{label} has lost its gradient: no detach(), no_grad(), item() or new tensor on the way."
        if attached and not wanted:
            return f"{label} carries gradient, where none is expected: detach it."
    return None


def _difference_in_errors(actual: Outcome, expected: Outcome) -> str | None:
    if actual.error == expected.error:
        return None
    if actual.error:
        return f"it raises {actual.error}{actual.error_text}."
    return f"it returns a result, where {expected.error} is expected."


def difference_in_kind(result: object, wanted: Tensor, label: str = "the result") -> str | None:
    """How an output differs from the expected tensor in type, shape, dtype or device, if it does."""
    if not isinstance(result, Tensor) or result.layout != wanted.layout:
        return f"{label} is of type {type(result).__name__}, where a dense Tensor is expected."
    if result.shape != wanted.shape:
        warning = " It would broadcast silently: keep every axis." if _widens(result, wanted) else ""
        return f"{label} has shape {_shape(result)}, where {_shape(wanted)} is expected.{warning}"
    if result.dtype != wanted.dtype:
        return f"{label} has dtype {_dtype(result)}, where {_dtype(wanted)} is expected."
    if result.device != wanted.device:
        return f"{label} is on device {result.device}, where {wanted.device} is expected."
    return None


def _difference_in_values(result: Tensor, wanted: Tensor, label: str) -> str | None:
    if _agree(result, wanted):
        return None
    if wanted.dtype == torch.bool:
        return f"{label} is wrong in {(result != wanted).sum()} of {wanted.numel()} places."
    for what, found in (("NaN", torch.isnan), ("infinite values", torch.isinf)):
        if found(result).any() and not found(wanted).any():
            return f"{label} contains {what}."
    deviation = torch.nan_to_num(result.double() - wanted.double()).abs().max()
    return f"{label} is off by up to {deviation:.2g}, where the right values reach {wanted.abs().max():.2g}."


def _agree(actual: Tensor, expected: Tensor) -> bool:
    tolerance = TOLERANCE.get(expected.dtype, 0.0)  # whole numbers must be equal
    return torch.allclose(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def _widens(result: Tensor, wanted: Tensor) -> bool:
    try:
        return torch.broadcast_shapes(result.shape, wanted.shape) == wanted.shape
    except RuntimeError:
        return False


def _copies(arguments: tuple) -> tuple:
    """Copies of a case's arguments; a tensor that two of them are made of is copied once."""
    copies: dict[int, Tensor] = {}

    def copy_tensor(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        return copies[id(tensor)]

    def copy(argument: object) -> object:
        if isinstance(argument, CallableArgument):
            # a network, other than the data, is made before sampling begins
            with torch.inference_mode(False):
                return CallableArgument(argument.kind, tuple(map(copy_tensor, argument.tensors)))
        if isinstance(argument, OptimizerArgument | ParametersArgument):
            return argument.build(copy_tensor)
        if isinstance(argument, tuple | list):
            return type(argument)(map(copy, argument))
        return copy_tensor(argument) if isinstance(argument, Tensor) else argument

    return tuple(map(copy, arguments))


def _tensors(argument: object) -> tuple[Tensor, ...]:
    """The tensors that an argument is made of; an optimizer's weights are none of its own."""
    if isinstance(argument, CallableArgument):
        return argument.tensors
    if isinstance(argument, tuple | list):
        return tuple(tensor for part in argument for tensor in _tensors(part))
    return (argument,) if isinstance(argument, Tensor) else ()


def _changed(remains: Remains, arguments: tuple) -> tuple[int, ...]:
    """The positions of the arguments that a call has modified, apart from an optimizer's weights."""
    moved = _moved(arguments)

    def same(left: Tensor, given: Tensor) -> bool:
        return id(given) in moved or (left.dtype == given.dtype and torch.equal(left, given))

    def unchanged(left: tuple[Tensor, ...], given: tuple[Tensor, ...]) -> bool:
        return len(left) == len(given) and all(map(same, left, given))  # a list may have lost some

    pairs = enumerate(zip(remains.tensors, map(_tensors, arguments), strict=False))  # none after an error
    return tuple(i for i, (left, given) in pairs if not unchanged(left, given))


def _marked(remains: Remains, arguments: tuple) -> tuple[int, ...]:
    """The positions of the arguments in which a call has left a .grad, apart from an optimizer's weights."""
    moved = _moved(arguments)
    pairs = enumerate(zip(remains.gradients, map(_tensors, arguments), strict=False))
    return tuple(
        i
        for i, (gradients, given) in pairs
        if any(
            gradient is not None and id(tensor) not in moved
            for gradient, tensor in zip(gradients, given, strict=False)
        )
    )


def _moved(arguments: tuple) -> set[int]:
    """The ids of the weights that the optimizers among the arguments are to move."""
    optimizers = (argument for argument in arguments if isinstance(argument, OptimizerArgument))
    return {id(weight) for optimizer in optimizers for weight in optimizer.weights}


def _gradients(outputs: tuple, arguments: tuple) -> tuple[Tensor | None, ...]:
    """The gradients of sum_i cos(i) output_i, a linear function that no symmetry of the outputs cancels."""
    attached = [output for output in outputs if isinstance(output, Tensor) and output.requires_grad]
    leaves = [argument for argument in arguments if isinstance(argument, Tensor) and argument.requires_grad]
    if not attached or not leaves:
        return (None,) * len(arguments)
    weights = [torch.arange(o.numel(), dtype=o.dtype, device=o.device).cos().view(o.shape) for o in attached]
    found = iter(torch.autograd.grad(attached, leaves, weights, allow_unused=True))
    return tuple(next(found) if isinstance(a, Tensor) and a.requires_grad else None for a in arguments)


def _error_text(error: BaseException, function: Callable) -> str:
    """The first line of what the exception says, and the candidate's own line it came from, if at hand."""
    text = str(error).strip().partition("\n")[0][:200].rstrip(".")
    filename = getattr(getattr(function, "__code__", None), "co_filename", None)
    frames = traceback.walk_tb(error.__traceback__)
    lines = [number for frame, number in frames if frame.f_code.co_filename == filename]
    source = linecache.getline(filename, lines[-1]).strip() if lines else ""
    return (f" ({text})" if text else "") + (f" in the line `{source}`" if source else "")


def _count(outcome: Outcome) -> str:
    return "one result" if outcome.single else f"a tuple of {len(outcome.outputs)}"


def _labels(outcome: Outcome) -> list[str]:
    """What each output is called in a sentence."""
    count = len(outcome.outputs)
    return ["the result"] if outcome.single else [f"result {i + 1} of {count}" for i in range(count)]


def describe(name: str, value: object) -> str:
    """An argument in a few words: a tensor's dtype and shape, a callable's kind, or a number's value."""
    if isinstance(value, Tensor):
        gradient = " with gradient" if value.requires_grad else ""
        return f"{name} {_dtype(value)} {_shape(value)}{gradient}"
    if isinstance(value, tuple | list):
        return f"{name} = {', '.join(map(str, value))}"
    return f"{name} = {value:g}" if isinstance(value, float) else f"{name} = {value}"


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
