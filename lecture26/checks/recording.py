"""A check as numbers: an exercise's cases, expected outcomes, and what each misconception gives.

A recording judges a candidate without the reference and without the wrong answers' code, so it can be handed
out; with another seed the same machinery makes hidden tests. On disk it is one safetensors file: every tensor
under a running number, the rest as JSON in the file's metadata, with {"tensor": number} in a tensor's place
and {"callable": kind, "tensors": [...]} in that of an argument that can be called. A tensor that stands in
two places, as a network's and as an optimizer's weight, has one number.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lecture26.kit.tensor_files import read_tensors, write_tensors

from .callables import CallableArgument
from .core import Case, Exercise, Outcome, call, default_state
from .optimizers import OptimizerArgument, ParametersArgument

FORMAT = "lecture26.checks 3"


@dataclass(frozen=True)
class RecordedMisconception:
    """A wrong answer as numbers: its name, its hint, and its outcome on each case."""

    name: str
    hint: str
    outcomes: tuple[Outcome, ...]


@dataclass(frozen=True)
class Recording:
    """All that is needed to judge a candidate."""

    exercise: str
    derivation: str
    parameters: tuple[str, ...]
    cases: tuple[Case, ...]
    expected: tuple[Outcome, ...]
    misconceptions: tuple[RecordedMisconception, ...]

    def save(self, path: str | Path) -> None:
        """Write the recording into one safetensors file."""
        tensors: dict[str, Tensor] = {}
        header = json.dumps(pack_value(self, tensors, {}))
        write_tensors(path, tensors, {"format": FORMAT, "recording": header})

    @classmethod
    def load(cls, path: str | Path) -> "Recording":
        """Read a recording.

        Raises FileNotFoundError where there is no file, ValueError where the file is not a recording.
        """
        try:
            tensors, metadata = read_tensors(path, format=FORMAT)
            plain = json.loads(metadata["recording"], object_hook=lambda found: unpack_value(found, tensors))
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path} is not a recorded check: {error}") from error
        return cls(
            exercise=plain["exercise"],
            derivation=plain["derivation"],
            parameters=tuple(plain["parameters"]),
            cases=tuple(
                Case(case["note"], tuple(case["arguments"]), case["mode"]) for case in plain["cases"]
            ),
            expected=tuple(map(_outcome, plain["expected"])),
            misconceptions=tuple(
                RecordedMisconception(wrong["name"], wrong["hint"], tuple(map(_outcome, wrong["outcomes"])))
                for wrong in plain["misconceptions"]
            ),
        )


def record_exercise(exercise: Exercise, seed: int = 0) -> Recording:
    """Run an exercise's reference and misconceptions on the cases of a seed and keep what they do.

    Raises ValueError where the reference itself fails on a case.
    """
    with default_state():
        cases = tuple(exercise.cases(seed))

    def outcomes(function: Callable) -> tuple[Outcome, ...]:
        # An error's text may quote the line that raised it, and a recording holds no code.
        return tuple(replace(call(function, case), error_text="") for case in cases)

    expected = outcomes(exercise.reference)
    for case, outcome in zip(cases, expected, strict=True):
        if outcome.error:
            raise ValueError(
                f"the reference of {exercise.name} raises {outcome.error} on the case {case.note!r}"
            )
    return Recording(
        exercise=exercise.name,
        derivation=exercise.derivation,
        parameters=exercise.parameters,
        cases=cases,
        expected=expected,
        misconceptions=tuple(
            RecordedMisconception(wrong.name, wrong.hint, outcomes(wrong.function))
            for wrong in exercise.misconceptions
        ),
    )


def pack_value(value: object, tensors: dict[str, Tensor], numbers: dict[int, str]) -> object:
    """A nested structure as JSON knows it, its tensors moved to `tensors` under running numbers.

    numbers: those given already, by the tensor's id.
    """

    def pack(inner: object) -> object:
        return pack_value(inner, tensors, numbers)

    if isinstance(value, Tensor):
        number = numbers.setdefault(id(value), str(len(tensors)))
        tensors[number] = value.detach().clone(memory_format=torch.contiguous_format)
        return {"tensor": number, "requires_grad": value.requires_grad}
    if isinstance(value, CallableArgument):
        return {"callable": value.kind, "tensors": pack(value.tensors)}
    if isinstance(value, OptimizerArgument):
        return {"optimizer": pack(value.weights), "old": pack(value.old_gradients), "rate": value.rate}
    if isinstance(value, ParametersArgument):
        old = pack(value.old_gradients)
        return {"names": list(value.names), "values": pack(value.values), "old": old, "asking": value.asking}
    if is_dataclass(value):
        return {field.name: pack(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple) and all(isinstance(inner, str) for inner in value):
        return {"texts": list(value)}  # str.endswith takes a tuple, and no list
    if isinstance(value, list | tuple):
        return list(map(pack, value))
    return value


def unpack_value(found: dict, tensors: dict[str, Tensor]) -> object:
    """What `pack_value` has made a dictionary of, from JSON: an `object_hook` for a given `tensors`."""
    if "callable" in found:
        return CallableArgument(found["callable"], tuple(found["tensors"]))
    if "optimizer" in found:
        return OptimizerArgument(tuple(found["optimizer"]), tuple(found["old"]), found["rate"])
    if "texts" in found:
        return tuple(found["texts"])
    if "asking" in found:
        return ParametersArgument(*(tuple(found[key]) for key in ("names", "values", "old", "asking")))
    if "tensor" not in found:
        return found
    return tensors[found["tensor"]].requires_grad_(found["requires_grad"])


def _outcome(plain: dict) -> Outcome:
    """An outcome from JSON, whose lists are tuples again."""
    return Outcome(**{key: tuple(v) if isinstance(v, list) else v for key, v in plain.items()})
