"""The check system, on exercises of its own: verdicts, their wording, recordings."""

import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lecture26.checks import (
    Case,
    Exercise,
    Misconception,
    Recording,
    callables,
    check,
    check_recorded,
    exercise,
    record,
)
from lecture26.checks.callables import CallableArgument
from lecture26.checks.core import describe
from lecture26.checks.draws import Draws
from lecture26.checks.judging import judge
from lecture26.checks.optimizers import OptimizerArgument
from lecture26.checks.recording import record_exercise


def scaled_noise(x: Tensor, variance: Tensor, gain: float) -> tuple[Tensor, Tensor]:
    return gain * variance.sqrt() * x, variance.sqrt()


def scaled_noise_cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)

    def case(note, rows, columns, dtype=torch.float64, gradient=False):
        x = torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(dtype)
        variance = 0.5 + torch.rand(rows, 1, generator=generator, dtype=torch.float64).to(dtype)
        return Case(note, (x.requires_grad_(gradient), variance, 1.5 + seed))

    return [
        case("a square", 3, 3),
        case("a table", 3, 5),
        case("a row", 1, 4),
        case("float32", 4, 2, torch.float32),
        case("gradient", 3, 2, gradient=True),
    ]


SCALED_NOISE = Exercise(
    "toy.scaled_noise",
    '"Toys", equation (0.1)',
    scaled_noise,
    scaled_noise_cases,
    (
        Misconception(
            "variance for standard deviation",
            lambda x, variance, gain: (gain * variance * x, variance.sqrt()),
            "Take the root.",
        ),
        Misconception(
            "along the last axis",
            lambda x, variance, gain: (gain * variance.flatten().sqrt() * x, variance.sqrt()),
            "Keep the shape (B, 1).",
        ),
        Misconception(
            "detached",
            lambda x, variance, gain: (gain * variance.sqrt() * x.detach(), variance.sqrt()),
            "Keep the gradient.",
        ),
        Misconception(
            "overwritten",
            lambda x, variance, gain: (gain * variance.sqrt_() * x, variance),
            "Leave the arguments alone.",
        ),
    ),
)


@pytest.fixture(scope="module")
def recording() -> Recording:
    return record_exercise(SCALED_NOISE)


def never_filled(x, variance, gain): ...


def not_implemented(x, variance, gain):
    raise NotImplementedError


def forgotten_return(x, variance, gain):
    scaled_noise(x, variance, gain)


def sometimes_nothing(x, variance, gain):
    if len(x) > 1:
        return scaled_noise(x, variance, gain)


def undefined_name(x, variance, gain):
    return gain * variance.sqrt() * noise, variance.sqrt()  # noqa: F821


def exits(x, variance, gain):
    sys.exit(3)


def changes_a_value(x, variance, gain):
    result = scaled_noise(x, variance, gain)
    variance += 1
    return result


def turns_an_argument_into_float32(x, variance, gain):
    result = scaled_noise(x, variance, gain)
    variance.data = variance.data.float()
    return result


def first_result(change):
    """The right answer with its first result changed."""

    def candidate(x, variance, gain):
        noise, std = scaled_noise(x, variance, gain)
        return change(noise), std

    return candidate


calls = []


def counts_calls(x, variance, gain):
    calls.append(x)
    noise, std = scaled_noise(x, variance, gain)
    return noise + len(calls), std


BAD_BEHAVIOUR = {
    never_filled: "not filled in yet",
    not_implemented: "not filled in yet",
    forgotten_return: "not filled in yet",
    (lambda x, variance, gain: (..., ...)): "not filled in yet",
    sometimes_nothing: "On case 3 of 5 (a row), it returns None: a path through",
    undefined_name: "raises NameError (name 'noise' is not defined) in the line `return gain *",
    exits: "it raises SystemExit (3) in the line `sys.exit(3)`.",
    (lambda x, variance, gain: 1 / 0): "it raises ZeroDivisionError (division by zero)",
    (lambda x, variance, gain: x @ x): "it returns one result, where a tuple of 2 is expected.",
    (lambda x, variance, gain: (x, x, x)): "it returns a tuple of 3, where a tuple of 2 is expected.",
    (lambda x, variance, gain: ()): "it returns a tuple of 0, where a tuple of 2 is expected.",
    (lambda x, variance, gain: "text"): "it returns one result, where a tuple of 2 is expected.",
    first_result(lambda noise: None): "result 1 of 2 is of type NoneType, where a dense Tensor is expected.",
    first_result(lambda noise: noise.tolist()): "result 1 of 2 is of type list",
    first_result(lambda noise: noise.detach().numpy()): "result 1 of 2 is of type ndarray",
    first_result(lambda noise: noise.to_sparse()): "where a dense Tensor is expected",
    first_result(lambda noise: noise[:2]): "result 1 of 2 has shape (2, 3), where (3, 3) is expected.",
    first_result(lambda noise: noise[:, :1]): "(3, 1), where (3, 3) is expected. It would broadcast silently",
    first_result(lambda noise: noise.float()): "result 1 of 2 has dtype float32, where float64 is expected.",
    first_result(lambda noise: noise.double()): "On case 4 of 5 (float32), result 1 of 2 has dtype float64",
    first_result(lambda noise: noise.to(torch.complex128)): "dtype complex128, where float64 is expected",
    first_result(lambda noise: noise.to("meta")): "result 1 of 2 is on device meta, where cpu is expected.",
    first_result(lambda noise: noise.log()): "result 1 of 2 contains NaN.",
    first_result(lambda noise: noise / 0): "result 1 of 2 contains infinite values.",
    first_result(lambda noise: noise.data): "On case 5 of 5 (gradient), result 1 of 2 has lost its gradient",
    first_result(lambda noise: noise.clone().requires_grad_()): "carries gradient, where none is expected",
    first_result(
        lambda noise: 2 * noise - noise.detach()
    ): "the values are right, but not their gradient with",
    first_result(
        lambda noise: noise + 0.5
    ): "result 1 of 2 is off by up to 0.5, where the right values reach",
    first_result(
        lambda noise: noise + torch.randn(())
    ): "Two calls with the same arguments give different results",
    counts_calls: "Two calls with the same arguments give different results",
    changes_a_value: "it changes its argument variance in place: compute a new tensor instead.",
    turns_an_argument_into_float32: "it changes its argument variance in place",
    (lambda x, variance: x): "It must take (x, variance, gain), but takes (x, variance).",
    (lambda x, variance, gain, t: x): "It must take (x, variance, gain), but takes (x, variance, gain, t).",
    (
        lambda variance, x, gain: x
    ): "It must take (x, variance, gain) in this order, but takes (variance, x, gain).",
    (lambda *, x, variance, gain: x): "It must take (x, variance, gain)",
}


def words(text: object) -> str:
    """A text without its line breaks."""
    return " ".join(str(text).split())


@pytest.mark.parametrize(("candidate", "sentence"), BAD_BEHAVIOUR.items())
def test_bad_behaviour_gets_a_clear_sentence(recording, candidate, sentence):
    result = judge(recording, candidate)
    assert sentence in words(result)
    assert not result and not result.passed
    assert "Traceback" not in repr(result)


@pytest.mark.parametrize("candidate", [None, 3, "scaled_noise", torch.ones(2)])
def test_something_that_is_no_function(recording, candidate):
    result = judge(recording, candidate)
    assert f"A function is expected, not something of type {type(candidate).__name__}." in repr(result)


def test_wrong_truth_values_are_counted():
    def above(x):
        return x > 0

    cases = [Case("numbers", (torch.tensor([-1.0, 1.0, 3.0]),))]
    exercise = Exercise("toy.above", '"Toys", equation (0.2)', above, lambda seed: cases, ())
    result = judge(record_exercise(exercise), lambda x: x > 2)
    assert "the result is wrong in 1 of 3 places." in repr(result)


class CallableObject:
    def __call__(self, x, variance, gain):
        return list(scaled_noise(x, variance, gain))


@pytest.mark.parametrize(
    "candidate",
    [
        scaled_noise,
        lambda x, variance, gain: (x * gain * variance**0.5, variance**0.5),
        lambda a, b, c: scaled_noise(a, b, c),
        lambda *arguments: scaled_noise(*arguments),
        lambda x, variance, gain=1.0, unused=None: scaled_noise(x, variance, gain),
        CallableObject(),
    ],
)
def test_output_equivalent_candidates_pass(recording, candidate):
    result = judge(recording, candidate)
    assert result and result.passed and result.misconception is None
    assert repr(result) == "toy.scaled_noise: passed, on all 5 cases."


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("wrong", SCALED_NOISE.misconceptions, ids=lambda wrong: wrong.name)
def test_a_misconception_is_named_with_its_hint(wrong, seed):
    result = judge(record_exercise(SCALED_NOISE, seed), wrong.function)
    assert not result
    assert result.misconception == wrong.name
    assert f'The mistake is known: {wrong.name}. {wrong.hint}\nSee "Toys", equation (0.1).' in result.message


# Two faults at once: the known one is named, and the other one told


def variance_for_std(x, variance, gain):
    return gain * variance * x, variance.sqrt()


def on_other(condition, second, first=variance_for_std):
    """One fault, and another one in the cases of a condition on x."""
    return lambda x, variance, gain: (second if condition(x) else first)(x, variance, gain)


def overwrites(x, variance, gain):
    result = variance_for_std(x, variance, gain)
    variance += 1
    return result


def overwrites_and_is_right_first(x, variance, gain):
    """Right but for the overwriting on the first case, a square."""
    result = (scaled_noise if x.shape == (3, 3) else variance_for_std)(x, variance, gain)
    variance += 1
    return result


def detaches(x, variance, gain):
    noise, std = variance_for_std(x, variance, gain)
    return noise.detach(), std


def halves_the_gradient(x, variance, gain):
    noise, std = variance_for_std(x, variance, gain)
    return (noise + noise.detach()) / 2, std


def needs_two_rows(x, variance, gain):
    if len(x) < 2:
        raise RuntimeError("one row is too few")
    return variance_for_std(x, variance, gain)


def returns_float64(x, variance, gain):
    noise, std = variance_for_std(x, variance, gain)
    return noise.double(), std


TWO_FAULTS = {
    overwrites: "And besides, on case 1 of 5 (a square), it changes its argument variance in place",
    overwrites_and_is_right_first: "And besides, on case 1 of 5 (a square), it changes its argument variance",
    detaches: "And besides, on case 5 of 5 (gradient), result 1 of 2 has lost its gradient",
    halves_the_gradient: "And besides, on case 5 of 5 (gradient), the gradient with respect to x is not that",
    needs_two_rows: "And besides, on case 3 of 5 (a row), it raises RuntimeError (one row is too few)",
    returns_float64: "And besides, on case 4 of 5 (float32), result 1 of 2 has dtype float64",
    on_other(
        lambda x: x.requires_grad, lambda x, variance, gain: (x, variance)
    ): "And besides, on case 5 of 5 (gradient), result 1 of 2 is off by",
    on_other(
        lambda x: x.requires_grad, SCALED_NOISE.misconceptions[1].function
    ): "And besides, on case 5 of 5 (gradient), it raises RuntimeError",
    on_other(lambda x: len(x) == 1, sometimes_nothing): "on case 3 of 5 (a row), it returns None",
    on_other(lambda x: len(x) == 1, scaled_noise): "On case 3 of 5 (a row), however, it is right, where",
}


@pytest.mark.parametrize(("candidate", "sentence"), TWO_FAULTS.items())
def test_a_known_mistake_is_named_beside_another_fault(recording, candidate, sentence, tmp_path):
    result = judge(recording, candidate)
    assert not result
    assert result.misconception == "variance for standard deviation"
    assert "The mistake is known: variance for standard deviation. Take the root." in result.message
    assert sentence in result.message
    recording.save(tmp_path / "check.safetensors")
    assert check_recorded(tmp_path / "check.safetensors", candidate) == result


def test_what_is_shown_of_two_faults_begins_with_the_known_one(recording):
    """An argument may be overwritten on the same case, and even on cases before."""
    for candidate, case in (
        (overwrites, "case 1 of 5 (a square)"),
        (overwrites_and_is_right_first, "case 2"),
    ):
        assert judge(recording, candidate).message.splitlines()[1].startswith(f"On {case}")
        assert "result 1 of 2 is off by" in judge(recording, candidate).message.splitlines()[1]


@pytest.mark.parametrize(
    "candidate",
    [
        # another fault on the first case that fails
        on_other(lambda x: x.shape == (3, 3), lambda x, variance, gain: (x, variance.sqrt())),
        on_other(lambda x: x.shape == (3, 3), lambda x, variance, gain: (x, x, x)),
        on_other(lambda x: x.shape == (3, 3), undefined_name),
        # the mistake on two cases of five
        on_other(lambda x: len(x) != 3 or x.requires_grad, scaled_noise),
        on_other(lambda x: len(x) == 4, lambda x, variance, gain: (x, variance), first=scaled_noise),
    ],
)
def test_no_mistake_is_named_that_the_failing_case_or_most_cases_do_not_show(recording, candidate):
    result = judge(recording, candidate)
    assert not result
    assert result.misconception is None
    assert "The mistake is known" not in result.message


def test_of_two_mistakes_the_one_on_more_cases_is_named():
    cases = [Case(f"{n} points", (torch.arange(1.0, n + 1),)) for n in (1, 2, 3, 4, 5)]
    long_only = Misconception("long ones", lambda x: -x if len(x) != 4 else x, "Some.")
    all_of_them = Misconception("all", lambda x: -x, "All.")
    exercise = Exercise(
        "toy.same", '"Toys"', lambda x: x.clone(), lambda seed: cases, (long_only, all_of_them)
    )
    recording = record_exercise(exercise)
    for wrong in (long_only, all_of_them):
        assert judge(recording, wrong.function).misconception == wrong.name
    # both agree on four cases: the first of the list
    tie = judge(recording, lambda x: -x if len(x) != 4 else 2 * x)
    assert tie.misconception == "long ones"
    more = judge(recording, lambda x: -x if len(x) != 5 else 2 * x)
    assert more.misconception == "all"


def test_errors_of_one_type_alone_name_no_mistake():
    """They may have other causes; unless the mistake, too, does nothing but raise."""
    cases = [Case(f"{n} x 2", (torch.ones(n, 2),)) for n in (1, 3, 4, 2)]
    wrong = Misconception("not transposed", lambda x: x @ x, "Transpose.")
    exercise = Exercise("toy.gram", '"Toys"', lambda x: x @ x.mT, lambda seed: cases, (wrong,))
    recording = record_exercise(exercise)
    assert judge(recording, wrong.function).misconception == "not transposed"
    assert judge(recording, lambda x: x.view(7)).misconception is None


def test_the_text_is_wrapped_at_words(recording):
    for candidate in (*BAD_BEHAVIOUR, *TWO_FAULTS):
        result = judge(recording, candidate)
        lines = repr(result).splitlines()
        assert all(len(line) <= 90 for line in lines)
        assert words(result) == words(f"{result.exercise}: {result.message}")
        # a line of the message begins a line of the text, and what is wrapped is indented
        begun = [line for line in lines if not line.startswith("  ")]
        assert len(begun) == len(result.message.splitlines())


ROOT = Exercise(
    "toy.root",
    '"Toys"',
    lambda x: x.sqrt(),
    lambda seed: [Case("points", (torch.rand(4).double() + 0.1,))],
    (),
)


@pytest.mark.parametrize(
    ("candidate", "relation"),
    [
        (lambda x: -x.sqrt(), "the right ones with the opposite sign"),
        (lambda x: x.clone(), "the squares of the right ones"),
        (lambda x: x**0.25, "the square roots of the right ones"),
        (lambda x: x.rsqrt(), "the reciprocals of the right ones"),
        (lambda x: 0.5 * x.log(), "the logarithms of the right ones"),
        (lambda x: x.sqrt().exp(), "the exponentials of the right ones"),
        (lambda x: 3 * x.sqrt(), "3 times the right ones"),
    ],
)
def test_an_unknown_mistake_is_described_by_its_relation_to_the_right_values(candidate, relation):
    message = judge(record_exercise(ROOT), candidate).message
    assert f"On every case its values are {relation}." in message


def test_no_relation_is_claimed_where_there_is_none():
    assert "On every case" not in judge(record_exercise(ROOT), lambda x: x.sqrt().tolist()).message
    cut = lambda x: x.sqrt().requires_grad_()  # noqa: E731
    assert "On every case" not in judge(record_exercise(ROOT), cut).message
    assert "On every case" not in judge(record_exercise(ROOT), lambda x: x + 1).message


def test_the_message_names_case_arguments_and_deviation_in_few_digits(recording):
    message = judge(recording, first_result(lambda noise: noise + 1 / 3)).message
    assert message.splitlines()[:3] == [
        "not right yet.",
        "On case 1 of 5 (a square), result 1 of 2 is off by up to 0.33, where the right values reach "
        f"{recording.expected[0].outputs[0].abs().max():.2g}.",
        "Arguments: x float64 (3, 3), variance float64 (3, 1), gain = 1.5.",
    ]


def test_the_same_candidate_gets_the_same_words_twice(recording):
    candidate = first_result(lambda noise: noise + torch.randn(()))
    assert judge(recording, candidate) == judge(recording, candidate)


def test_interrupting_a_check_works(recording):
    def interrupted(x, variance, gain):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge(recording, interrupted)


def test_a_candidate_leaves_no_trace(recording, capfd):
    def careless(x, variance, gain):
        print("x has shape", tuple(x.shape))
        print("careful", file=sys.stderr)
        torch.manual_seed(0)
        torch.set_grad_enabled(False)
        return scaled_noise(x, variance, gain)

    state = torch.get_rng_state()
    judge(recording, careless)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    # the first case's prints are let through, for learners who look for a mistake that way
    assert capfd.readouterr() == ("x has shape (3, 3)\n", "careful\n")


def test_arguments_of_the_recording_stay_as_they_are(recording):
    before = [[torch.as_tensor(argument).clone() for argument in case.arguments] for case in recording.cases]
    judge(recording, changes_a_value)
    for case, arguments in zip(recording.cases, before, strict=True):
        for argument, kept in zip(case.arguments, arguments, strict=True):
            assert torch.equal(torch.as_tensor(argument), kept)


def test_a_check_computes_on_the_cpu_whatever_is_set_around_it():
    with torch.device("meta"):
        assert check("ddpm.q_sample", exercise("ddpm.q_sample").reference)


LINE = Exercise(
    "toy.line",
    '"Toys"',
    lambda num_steps: torch.linspace(0.1 / num_steps, 20 / num_steps, num_steps, dtype=torch.float64),
    lambda seed: [Case("a line", (n,)) for n in (10, 30, 100)],
    (
        Misconception(
            "float32 result", lambda n: torch.linspace(0.1 / n, 20 / n, n, dtype=torch.float32), "In float64."
        ),
    ),
)


def test_a_check_sees_the_default_dtype_of_torch_whatever_is_set_around_it():
    def forgets_the_dtype(num_steps):
        torch.set_default_dtype(torch.float16)
        return torch.linspace(0.1 / num_steps, 20 / num_steps, num_steps, dtype=None)

    torch.set_default_dtype(torch.float64)
    try:
        result = judge(record_exercise(LINE), lambda n: torch.linspace(0.1 / n, 20 / n, n))
        judge(record_exercise(LINE), forgets_the_dtype)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert result.misconception == "float32 result"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_check_sees_gradients_whatever_the_mode_around_it(mode):
    with mode():
        recording = record_exercise(SCALED_NOISE)
        assert judge(recording, scaled_noise)
        assert judge(recording, SCALED_NOISE.misconceptions[2].function).misconception == "detached"


@pytest.mark.parametrize(
    "candidate",
    [
        scaled_noise,
        *(m.function for m in SCALED_NOISE.misconceptions),
        *(candidate for candidate in BAD_BEHAVIOUR if candidate is not counts_calls),
    ],
)
def test_a_recording_on_disk_gives_the_same_verdict(recording, candidate, tmp_path):
    recording.save(tmp_path / "check.safetensors")
    live = judge(recording, candidate)
    assert check_recorded(tmp_path / "check.safetensors", candidate) == live
    assert check_recorded(recording, candidate) == live


def test_a_recording_holds_no_code(recording, tmp_path):
    path = tmp_path / "check.safetensors"
    recording.save(path)
    assert b"lambda" not in path.read_bytes()


def test_an_exercise_whose_own_reference_raises_is_refused():
    broken = Exercise("toy.broken", '"Toys"', lambda x: x.missing, ROOT.cases, ())
    with pytest.raises(
        ValueError, match="the reference of toy.broken raises AttributeError on the case 'points'"
    ):
        record_exercise(broken)


def test_other_seeds_make_other_cases():
    one, other = record("ddpm.q_sample", 0), record("ddpm.q_sample", 1)
    assert [c.arguments[0].flatten()[0] for c in one.cases] != [
        c.arguments[0].flatten()[0] for c in other.cases
    ]
    assert judge(record_exercise(SCALED_NOISE, 1), scaled_noise)
    only_for_seed_0 = lambda x, variance, gain: scaled_noise(x, variance, 1.5)  # noqa: E731
    assert judge(record_exercise(SCALED_NOISE, 0), only_for_seed_0)
    assert not judge(record_exercise(SCALED_NOISE, 1), only_for_seed_0)


@pytest.mark.slow
def test_a_recording_needs_neither_the_chapter_nor_its_exercises(tmp_path):
    path = tmp_path / "check.safetensors"
    record("ddpm.q_sample").save(path)
    program = f"""
import sys
sys.modules["lecture26.ddpm"] = None  # importing it is an error from here on
sys.modules["lecture26.checks.chapters.ddpm"] = None
from lecture26.checks import check_recorded
right = lambda x_0, alpha_bar, noise: alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise
wrong = lambda x_0, alpha_bar, noise: alpha_bar.sqrt() * x_0 + (1 - alpha_bar) * noise
print(bool(check_recorded({str(path)!r}, right)))
print(check_recorded({str(path)!r}, wrong).misconception)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "True\nvariance for standard deviation\n"


@pytest.mark.slow
def test_importing_the_checks_imports_no_chapter():
    program = (
        "import sys, lecture26.checks; "
        "print([m for m in sys.modules if m in ('lecture26.ddpm', 'lecture26.unet', 'matplotlib', 'timm')])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_a_file_that_is_no_recording_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        Recording.load(tmp_path / "missing.safetensors")
    (tmp_path / "text.safetensors").write_text("not a recording")
    save_file({"weight": torch.ones(1)}, tmp_path / "weights.safetensors")
    for name in ("text", "weights"):
        with pytest.raises(ValueError, match=f"{name}.safetensors is not a recorded check"):
            check_recorded(tmp_path / f"{name}.safetensors", scaled_noise)


def test_an_unknown_exercise_is_refused():
    with pytest.raises(
        ValueError, match=r"exercise must begin with a chapter's name, one of .*ddpm.*; got 'core.x'"
    ):
        check("core.x", scaled_noise)
    with pytest.raises(ValueError, match=r"exercise must be one of .*ddpm.q_sample.*; got 'ddpm.q_simple'"):
        check("ddpm.q_simple", scaled_noise)
    with pytest.raises(TypeError, match="exercise must be a name such as 'ddpm.q_sample', got function"):
        exercise(scaled_noise)


# Exercises that take a function


def slope(classifier, x, t):
    """The derivative of the summed logits with respect to x."""
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        return torch.autograd.grad(classifier(x, t.clone()).sum(), x)[0]


def slope_cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)

    def case(note, dtype=torch.float64, mode="grad", weights=False):
        inward, speed, outward, x = (
            torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            for shape in ((3, 4), (4,), (4, 2), (5, 3))
        )
        tensors = tuple(tensor.requires_grad_(weights) for tensor in (inward, speed, outward))
        return Case(note, (CallableArgument("noisy_classifier", tensors), x, torch.arange(5)), mode)

    return [
        case("plain"),
        case("float32", torch.float32),
        case("learned", weights=True),
        case("sampling", mode="no_grad", weights=True),
        case("inference", mode="inference_mode", weights=True),
    ]


def slope_with_backward(classifier, x, t):
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        classifier(x, t.clone()).sum().backward()
        return x.grad


def slope_in_the_mode_around(classifier, x, t):
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(classifier(x, t).sum(), x)[0]


def slope_with_gradients_on(classifier, x, t):
    with torch.enable_grad():
        return slope_in_the_mode_around(classifier, x, t)


def other_step_in_inference_mode(classifier, x, t):
    return slope_with_gradients_on(classifier, x, t + 1)


def slope_with_backward_and_gradients_on(classifier, x, t):
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        classifier(x, t).sum().backward()
        return x.grad


def slope_that_changes_the_classifier(classifier, x, t):
    result = slope(classifier, x, t)
    with torch.no_grad():
        classifier.tensors[1].add_(1)
    return result


SLOPE = Exercise(
    "toy.slope",
    '"Toys", equation (0.2)',
    slope,
    slope_cases,
    (
        Misconception("backward", slope_with_backward, "It leaves a .grad."),
        Misconception("mode around", slope_in_the_mode_around, "Switch gradients on."),
        Misconception("still in inference mode", slope_with_gradients_on, "Leave inference mode."),
        Misconception("changed", slope_that_changes_the_classifier, "Leave the classifier alone."),
        Misconception("other step", lambda classifier, x, t: slope(classifier, x, t + 1), "Give it t."),
    ),
)


@pytest.fixture(scope="module")
def slope_recording():
    return record_exercise(SLOPE)


def descend(optimizer, loss_of, x_0, t, noise):
    optimizer.zero_grad()
    loss_of(x_0, t, noise).backward()
    optimizer.step()
    return x_0.sum()


def descend_cases(seed: int) -> list[Case]:
    draws = Draws(seed)

    def case(batch):
        weights = draws.denoiser_weights(6, gradient=True)
        old = tuple(map(torch.ones_like, weights))
        loss_of = CallableArgument("denoising_loss", weights)
        given = OptimizerArgument(weights, old, 0.1), loss_of, draws.normal(batch, 6)
        return Case(f"{batch} points", (*given, torch.arange(batch), draws.normal(batch, 6)))

    return [case(3), case(5)]


def descend_and_spoil(optimizer, loss_of, x_0, t, noise):
    result = descend(optimizer, loss_of, x_0, t, noise)
    x_0 += 1
    return result


def descend_and_leave_a_mark(optimizer, loss_of, x_0, t, noise):
    noise.requires_grad_()
    result = descend(optimizer, loss_of, x_0, t, noise)
    noise.requires_grad_(False)
    return result


@pytest.mark.parametrize(
    ("candidate", "sentence"),
    [
        (descend, "passed, on all 2 cases."),
        (lambda optimizer, loss_of, x_0, t, noise: x_0.sum(), "a weight, after the call, is off by up to"),
        (descend_and_spoil, "it changes its argument x_0 in place"),
        (descend_and_leave_a_mark, "it leaves a .grad behind in its argument noise."),
    ],
)
def test_an_optimizers_weights_are_a_result(candidate, sentence, tmp_path):
    exercise = Exercise("toy.descend", '"Toys"', descend, descend_cases, ())
    recording = record_exercise(exercise)
    before = recording.cases[0].arguments[0].weights[0].clone()
    assert sentence in judge(recording, candidate).message
    assert torch.equal(recording.cases[0].arguments[0].weights[0], before)
    recording.save(tmp_path / "descend.safetensors")
    assert check_recorded(tmp_path / "descend.safetensors", candidate) == judge(recording, candidate)


def test_a_callable_argument_is_called_with_what_follows_its_tensors():
    inward, speed, outward, x, t = slope_cases(0)[0].arguments[0].tensors + slope_cases(0)[0].arguments[1:]
    hidden = [[math.sin(x[b] @ inward[:, h] + t[b] * speed[h]) for h in range(4)] for b in range(5)]
    expected = torch.tensor(hidden, dtype=torch.float64) @ outward
    classifier = CallableArgument("noisy_classifier", (inward, speed, outward))
    torch.testing.assert_close(classifier(x, t), expected)
    torch.testing.assert_close(classifier(x.view(5, 1, 3), t), expected)


def test_a_callable_argument_is_described_in_words():
    classifier = CallableArgument("noisy_classifier", (torch.ones(3, 4), torch.ones(4)))
    assert describe("classifier", classifier) == "classifier = a noisy classifier with tensors (3, 4), (4,)"
    assert describe("skip", CallableArgument("bypass", ())) == "skip = a bypass"
    layers = (CallableArgument("bypass", ()), CallableArgument("middle", (torch.ones(2, 3),)))
    assert describe("up", layers) == "up = a bypass, a middle with tensors (2, 3)"


def test_a_callable_argument_of_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind must be one of .*noisy_classifier.*; got 'oracle'"):
        CallableArgument("oracle", ())


def test_another_kind_of_callable_argument_takes_one_function(monkeypatch, tmp_path):
    monkeypatch.setattr(callables, "_KINDS", dict(callables._KINDS))

    @callables._kind
    def scaled(factor, x):
        return factor * x

    twice = Exercise(
        "toy.twice",
        '"Toys"',
        lambda f, x: f(f(x)),
        lambda seed: [Case("points", (CallableArgument("scaled", (torch.tensor(3.0),)), torch.ones(2)))],
        (),
    )
    record_exercise(twice).save(tmp_path / "twice.safetensors")
    assert check_recorded(tmp_path / "twice.safetensors", lambda f, x: 9 * x)
    assert not check_recorded(tmp_path / "twice.safetensors", lambda f, x: f(x))


def through(layers, h):
    for layer in layers:
        h = layer(h)
    return h


def through_reversed_in_place(layers, h):
    """The right result, and the list as it should not be left."""
    result = through(layers, h)
    layers.reverse()
    return result


def through_with_changed_weights(layers, h):
    result = through(layers, h)
    layers[0].tensors[0].add_(1)
    return result


def test_an_argument_may_be_a_list_of_callables(tmp_path):
    layers = [
        CallableArgument("linear", (torch.full((2, 2), weight), torch.tensor([1.0, 2.0])))
        for weight in (1.0, 3.0)
    ]
    exercise = Exercise(
        "toy.through", '"Toys"', through, lambda seed: [Case("points", (layers, torch.ones(3, 2)))] * 2, ()
    )
    recording = record_exercise(exercise)
    recording.save(tmp_path / "through.safetensors")
    for known in (recording, Recording.load(tmp_path / "through.safetensors")):
        assert judge(known, through)
        assert not judge(known, lambda layers, h: through(layers[::-1], h))
        for wrong in (through_reversed_in_place, through_with_changed_weights):
            assert "it changes its argument layers in place" in judge(known, wrong).message


@pytest.mark.parametrize("wrong", SLOPE.misconceptions, ids=lambda wrong: wrong.name)
def test_an_exercise_with_a_callable_argument_passes_and_fails_as_others_do(slope_recording, wrong, tmp_path):
    slope_recording.save(tmp_path / "slope.safetensors")
    loaded = Recording.load(tmp_path / "slope.safetensors")
    for recording in (slope_recording, loaded):
        assert judge(recording, slope)
        assert judge(recording, wrong.function).misconception == wrong.name
    assert judge(loaded, wrong.function) == judge(slope_recording, wrong.function)


def test_a_known_mistake_is_named_beside_a_graph_that_does_not_survive_inference_mode(slope_recording):
    for candidate, name in (
        (other_step_in_inference_mode, "other step"),
        (slope_with_backward_and_gradients_on, "backward"),
    ):
        result = judge(slope_recording, candidate)
        assert result.misconception == name
        assert "And besides, on case 5 of 5 (inference), it raises RuntimeError" in result.message


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_exercise_with_a_callable_argument_is_judged_alike_in_any_mode(slope_recording, mode):
    with mode():
        recording = record_exercise(SLOPE)
        for candidate in (slope, *(wrong.function for wrong in SLOPE.misconceptions)):
            assert judge(recording, candidate) == judge(slope_recording, candidate)


@pytest.mark.parametrize(
    ("candidate", "sentence"),
    [
        (
            slope_with_backward,
            "On case 3 of 5 (learned), it leaves a .grad behind in its argument classifier.",
        ),
        (slope_in_the_mode_around, "On case 4 of 5 (sampling), it raises RuntimeError"),
        (slope_with_gradients_on, "On case 5 of 5 (inference), it raises RuntimeError"),
        (
            slope_that_changes_the_classifier,
            "it changes its argument classifier in place: compute a new tensor instead.",
        ),
        (
            lambda classifier, x, t: torch.zeros_like(x),
            "Arguments: classifier = a noisy classifier with tensors (3, 4), (4,), (4, 2), x float64 (5, 3)",
        ),
    ],
)
def test_what_happens_to_a_callable_argument_is_told(slope_recording, candidate, sentence):
    assert sentence in judge(slope_recording, candidate).message


def test_a_recorded_callable_argument_stays_as_it_is(slope_recording):
    before = [[tensor.clone() for tensor in case.arguments[0].tensors] for case in slope_recording.cases]
    for wrong in SLOPE.misconceptions:
        judge(slope_recording, wrong.function)
    for case, tensors in zip(slope_recording.cases, before, strict=True):
        for tensor, kept in zip(case.arguments[0].tensors, tensors, strict=True):
            assert torch.equal(tensor, kept) and tensor.grad is None


def test_a_case_is_called_in_its_mode():
    seen = []

    def notes(x):
        seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), x.is_inference()))
        return x

    modes = ("grad", "no_grad", "inference_mode")
    cases = lambda seed: [Case(mode, (torch.ones(2),), mode) for mode in modes]  # noqa: E731
    record_exercise(Exercise("toy.notes", '"Toys"', notes, cases, ()))
    assert seen == [(True, False, False), (False, False, False), (False, True, True)]


@pytest.mark.slow
def test_a_recording_with_a_callable_argument_needs_no_chapter(tmp_path):
    path = tmp_path / "check.safetensors"
    record("classifier_guidance.log_prob_gradient").save(path)
    program = f"""
import sys
for part in ("classifier_guidance", "unet", "ddpm"):  # importing them is an error from here on
    sys.modules[f"lecture26.{{part}}"] = sys.modules[f"lecture26.checks.chapters.{{part}}"] = None
import torch
from torch.nn.functional import cross_entropy
from lecture26.checks import check_recorded

def right(classifier, x_t, t, y, reduction="sum"):
    with torch.inference_mode(False), torch.enable_grad():
        x_t, t, y = x_t.detach().clone().requires_grad_(), t.clone(), y.clone()
        return -torch.autograd.grad(cross_entropy(classifier(x_t, t), y, reduction=reduction), x_t)[0]

print(bool(check_recorded({str(path)!r}, right)))
print(check_recorded({str(path)!r}, lambda *arguments: right(*arguments, reduction="mean")).misconception)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "True\nmean over the batch\n"
