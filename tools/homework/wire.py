"""What goes between the grader and a student's process: plain values and arrays. Nothing is unpickled.

A *section* is a piece of JSON with the tensors that it names by numbers, as safetensors. A student's process
gets an exercise's cases as one section, and answers with another. What it answers is a claim: `read_claims`
takes it apart, checks every field, and raises ValueError where anything is not as it must be.
"""

import json
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from lecture26.checks.core import Case, Outcome, Remains
from lecture26.checks.recording import pack_value, unpack_value

MAX_SECTION = 16 * 2**20  # bytes
MAX_OUTPUTS = 20
DTYPES = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128,
}  # fmt: skip
SIZES = struct.Struct("<QQ")


@dataclass(frozen=True)
class Claims:
    """What a student's process says that a function did.

    problem: why it could not be called, in words; then there is nothing else.
    outcomes: on each case, with seed 0; again: the same with seed 1.
    canary: of the grader's own function, called by the same process afterwards.
    value: of a question, the answer.
    """

    problem: str | None = None
    outcomes: tuple[Outcome, ...] = ()
    again: tuple[Outcome, ...] = ()
    remains: tuple[Remains, ...] = ()
    canary: tuple[Outcome, Remains] | None = None
    value: object = None


def section(plain: object, tensors: dict[str, Tensor]) -> bytes:
    """A section as bytes."""
    text, arrays = json.dumps(plain).encode(), safetensors.torch.save(tensors)
    return SIZES.pack(len(text), len(arrays)) + text + arrays


def read_section(content: bytes) -> tuple[object, dict[str, Tensor]]:
    """The JSON and the tensors of a section; ValueError where it is none."""
    text, tensors = _divided(content)
    try:
        return json.loads(text), tensors
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _divided(content: bytes) -> tuple[str, dict[str, Tensor]]:
    try:
        size, rest = SIZES.unpack_from(content)
        if SIZES.size + size + rest != len(content):
            raise ValueError("its sizes are wrong")
        text = content[SIZES.size : SIZES.size + size].decode()
        return text, safetensors.torch.load(content[SIZES.size + size :])
    except (struct.error, SafetensorError, KeyError) as error:
        raise ValueError(f"it is no section ({type(error).__name__})") from None


def pack_cases(cases: Sequence[Case], **plain: object) -> bytes:
    """Cases without their notes, and plain values besides, as a section."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[int, str] = {}
    packed = [[pack_value(case.arguments, tensors, numbers), case.mode] for case in cases]
    return section({**plain, "cases": packed}, tensors)


def unpack_cases(content: bytes) -> tuple[list[Case], dict]:
    """Cases, and the plain values besides, from a section of `pack_cases`."""
    text, tensors = _divided(content)
    plain = json.loads(text, object_hook=lambda found: unpack_value(found, tensors))
    return [Case("", tuple(arguments), mode) for arguments, mode in plain.pop("cases")], plain


def pack_observation(outcome: Outcome, remains: Remains, tensors: dict[str, Tensor]) -> dict:
    """What `observe` has found, as JSON, with its tensors moved to `tensors`."""

    def pack(value: object) -> dict:
        return _pack_output(value, tensors)

    return {
        "outputs": list(map(pack, outcome.outputs[:MAX_OUTPUTS])),
        "single": outcome.single,
        "attached": list(outcome.attached[:MAX_OUTPUTS]),
        "gradients": list(map(pack, outcome.gradients)),
        "weights": list(map(pack, outcome.weights)),
        "left": [list(map(pack, of_one)) for of_one in remains.tensors],
        "marks": [list(map(pack, of_one)) for of_one in remains.gradients],
        "error": outcome.error,
        "error_text": outcome.error_text[:400],
    }


def _pack_output(value: object, tensors: dict[str, Tensor]) -> dict:
    if value is None:
        return {"none": True}
    if value is ...:
        return {"ellipsis": True}
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        return {"type": type(value).__name__[:60]}
    if value.numel() * value.element_size() > MAX_SECTION // 4:
        return {"type": "Tensor, but too large to hand in"}
    plain = value.detach().as_subclass(Tensor)
    number = str(len(tensors))
    tensors[number] = plain.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return {"tensor": number}


def read_claims(content: bytes, number_of_cases: int, number_of_parameters: int) -> Claims:
    """What a student's process says of a function; ValueError where its answer is not what it must be."""
    plain, tensors = read_section(content)
    try:
        if "problem" in plain:
            return Claims(problem=plain_text(plain["problem"]))
        if "value" in plain:
            return Claims(value=_plain_value(plain["value"]))

        def read(found: dict) -> tuple[Outcome, Remains]:
            return _read_observation(found, tensors)

        observed = [[read(found) for found in plain[kind]] for kind in ("outcomes", "again")]
        if {len(listed) for listed in observed} != {number_of_cases}:
            raise ValueError("the number of cases is wrong")
        for outcome, remains in (pair for listed in observed for pair in listed):
            _check_lengths(outcome, remains, number_of_parameters)
        outcomes, again = ([outcome for outcome, _ in listed] for listed in observed)
        return Claims(
            outcomes=tuple(outcomes),
            again=tuple(again),
            remains=tuple(remains for _, remains in observed[0]),
            canary=read(plain["canary"]),
        )
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"a field is wrong ({type(error).__name__})") from None


def _read_observation(found: dict, tensors: dict[str, Tensor]) -> tuple[Outcome, Remains]:
    def outputs(listed: list, read: Callable = _read_output) -> tuple:
        return tuple(read(value, tensors) for value in listed)

    error = found["error"]
    outcome = Outcome(
        outputs=outputs(found["outputs"]),
        single=found["single"] is True,
        attached=tuple(attached is True for attached in found["attached"]),
        gradients=outputs(found["gradients"], _read_tensor),
        weights=outputs(found["weights"], _read_tensor),
        error=re.sub(r"\W", "", str(error))[:60] if error else None,
        error_text=plain_text(found["error_text"]),
    )
    left = tuple(outputs(of_one, _read_tensor) for of_one in found["left"])
    return outcome, Remains(left, tuple(outputs(of_one, _read_tensor) for of_one in found["marks"]))


def _check_lengths(outcome: Outcome, remains: Remains, number_of_parameters: int) -> None:
    if outcome.error:
        return
    lengths = len(outcome.gradients), len(remains.tensors), len(remains.gradients)
    if set(lengths) != {number_of_parameters} or len(outcome.attached) != len(outcome.outputs):
        raise ValueError("a list has a wrong length")
    if outcome.single and len(outcome.outputs) != 1:
        raise ValueError("one result has no single output")


def _read_output(found: dict, tensors: dict[str, Tensor]) -> object:
    if "ellipsis" in found:
        return ...
    if "none" in found or "tensor" in found:
        return _read_tensor(found, tensors)
    # of what is no tensor, its type's name is all that is told of
    name = re.sub(r"[^A-Za-z0-9_, ]", "", str(found["type"]))[:60]
    return type(name or "object", (), {})()


def _read_tensor(found: dict, tensors: dict[str, Tensor]) -> Tensor | None:
    if "none" in found:
        return None
    tensor = tensors[found["tensor"]]
    if tensor.dtype not in DTYPES:
        raise ValueError(f"the dtype {tensor.dtype} is none of those that are read")
    return tensor


def _plain_value(value: object) -> object:
    if value is None or isinstance(value, bool | int | float):
        return value
    return plain_text(value, 200)


def plain_text(value: object, length: int = 300) -> str:
    """Text of a student's process, cut to a length, without what is not printed."""
    return "".join(c for c in str(value)[:length] if c.isprintable())
