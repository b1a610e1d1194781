"""The parts of grading, each by itself: nothing here starts a worker."""

import json
import os
import re
import struct
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from homework import collect, grading, jail, runner, wire
from homework.assignments import Assignment, Item
from homework.canary import canary, canary_case, sings
from homework.extract import answer_of, cells_of, function_of, statements_of
from homework.inputs import ExerciseCases
from homework.runner import Answers, Inputs, Runner
from homework.tell import tell
from homework.verdicts import Judge, never_right
from lecture26.checks import exercise, exercises, record
from lecture26.checks.core import observe
from lecture26.checks.judging import judge_outcomes
from own_code import by_name, statements

CHAPTERS = sorted({name.partition(".")[0] for name in exercises()})
ASSIGNMENT = Assignment("waves", "Waves", ("waves",), ("01_waves",), ())


def of_exercise(name: str) -> ExerciseCases:
    return ExerciseCases(exercise(name), 0, 2026)


def item_of(name: str, points: float = 3.0) -> Item:
    function = name.partition(".")[2]
    return Item(name, function, points, f"{function}-points", "formula", "01_chapter", "Exercise 1")


def told(tests: ExerciseCases, function, hidden: bool = True) -> bytes:
    """What a process would tell of a function."""
    cases, _ = wire.unpack_cases(tests.section(tests.hidden_seed if hidden else tests.visible_seed))
    return tell(function, cases)


# ----------------------------------------------------------------------------------------------------
# The verdict
# ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_every_known_mistake_loses_its_exercise_s_points_on_hidden_tests(chapter):
    names = [name for name in exercises() if name.partition(".")[0] == chapter]
    tests = {name: of_exercise(name) for name in names}
    judge = Judge(tests, {}, {})
    for name in names:
        item = item_of(name)
        right = judge.tried(item, told(tests[name], exercise(name).reference), hidden=True)
        assert right.points == item.points, right
        for wrong in exercise(name).misconceptions:
            score = judge.tried(item, told(tests[name], wrong.function), hidden=True)
            assert score.points == 0, (name, wrong.name)
            assert score.mistake == wrong.name
            assert wrong.hint in "\n".join(score.lines)


NAME = "ddpm.q_sample"


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge({NAME: of_exercise(NAME)}, {}, {})


@pytest.fixture(scope="module")
def right() -> bytes:
    return told(of_exercise(NAME), exercise(NAME).reference)


def with_changes(payload: bytes, change) -> bytes:
    """A process's answer in which its JSON or its tensors are changed in place."""
    plain, tensors = wire.read_section(payload)
    change(plain, tensors)
    return wire.section(plain, tensors)


def test_of_hidden_cases_neither_arguments_nor_numbers_are_told(judge):
    def wrong(x_0, alpha_bar, noise):
        if x_0.ndim > 2:
            raise type("Kind271828", (Exception,), {})(f"271828 {x_0.tolist()}")
        return x_0 + 0.1 * noise

    score = judge.tried(item_of(NAME), told(of_exercise(NAME), wrong), hidden=True)
    text = "\n".join(score.lines)
    assert score.points == 0
    numbers = re.findall(r"\d+", text.replace("equation (1.6)", ""))
    assert not numbers and "case" not in text.replace("cases", "")


def test_a_recording_that_is_never_right_is_passed_by_no_answer(judge, right):
    recording = record(NAME)
    assert judge_outcomes(recording, recording.expected, lambda number: ())
    assert not judge_outcomes(never_right(recording), recording.expected, lambda number: ())


def test_an_answer_that_hides_what_became_of_its_arguments_is_found_out():
    """Whatever a process says of `changed`, it has to show the arguments."""
    tests = of_exercise(NAME)

    def overwriting(x_0, alpha_bar, noise):
        result = exercise(NAME).reference(x_0, alpha_bar, noise)
        x_0.data.add_(1)
        return result

    judge = Judge({NAME: tests}, {}, {})
    score = judge.tried(item_of(NAME), told(tests, overwriting, hidden=False), hidden=False)
    assert score.points == 0
    assert "changes its argument x_0" in "\n".join(score.lines)


@pytest.mark.parametrize("hide", ["changed", "marked", "value"])
def test_the_canary_is_compared_in_all_it_does(hide):
    case = canary_case(5)
    outcome, remains = observe(canary, case)
    assert sings((outcome, remains), case)
    if hide == "changed":
        remains = replace(remains, tensors=(remains.tensors[0], (case.arguments[1],)))
    elif hide == "marked":
        remains = replace(remains, gradients=((None,), (None,)))
    else:
        outcome = replace(outcome, outputs=(outcome.outputs[0] + 1, outcome.outputs[1]))
    assert not sings((outcome, remains), case)


def drop_a_case(plain, tensors):
    plain["outcomes"].pop()


def drop_a_gradient(plain, tensors):
    plain["outcomes"][0]["gradients"].pop()


def name_a_tensor_that_is_not_there(plain, tensors):
    plain["outcomes"][0]["outputs"] = [{"tensor": "none such"}]


def give_texts_for_lists(plain, tensors):
    plain["again"] = "all right"


@pytest.mark.parametrize(
    "change", [drop_a_case, drop_a_gradient, name_a_tensor_that_is_not_there, give_texts_for_lists]
)
def test_an_answer_of_a_wrong_form_is_refused(right, change):
    with pytest.raises(ValueError):
        wire.read_claims(with_changes(right, change), len(exercise(NAME).cases(2026)), 3)


@pytest.mark.parametrize(
    "payload", [b"", b"x" * 40, struct.pack("<QQ", 1 << 60, 0), struct.pack("<QQ", 2, 3) + b"{}abc"]
)
def test_bytes_that_are_no_section_are_refused(payload):
    with pytest.raises(ValueError):
        wire.read_claims(payload, 1, 1)


def test_a_gradient_of_another_shape_does_not_stop_the_grader(judge, right):
    def change(plain, tensors):
        for outcome in plain["outcomes"]:
            outcome["gradients"] = [{"tensor": "odd"}] * 3
        tensors["odd"] = torch.zeros(2, 9)

    frame = runner.Frame({"name": NAME, "status": ["ok", "ok"]}, (with_changes(right, change),) * 2)
    (score,) = judge.scores([item_of(NAME)], Answers((frame,)), {})
    assert score.points == 0


def test_an_answer_to_a_question_is_compared_with_the_right_one():
    judge = Judge({}, {"waves.speed": {"right": 3.0, "within": 0.5}, "waves.kind": {"right": "b"}}, {})
    speed = replace(item_of("waves.speed", 2.0), kind="question")
    kind = replace(item_of("waves.kind", 1.0), kind="question")

    def points(item, value):
        frame = runner.Frame(
            {"name": item.exercise, "status": ["ok", "not run"]}, (wire.section({"value": value}, {}), b"")
        )
        return judge.scores([item], Answers((frame,)), {})[0].points

    assert [points(speed, value) for value in (3, 3.4, 3.6, None, True, "3", float("nan"))] == [
        2,
        2,
        0,
        0,
        0,
        0,
        0,
    ]
    assert [points(kind, value) for value in ("b", "a", 3)] == [1, 0, 0]


# ----------------------------------------------------------------------------------------------------
# What is run, and what is kept
# ----------------------------------------------------------------------------------------------------


def answers(text: str = "fine", **about) -> Answers:
    """What came of a submission, as bytes and as frames."""
    raw = b""
    for plain in ({"name": text, **about}, {"end": True}):
        header = json.dumps(plain | {"sizes": []}).encode()
        raw += struct.pack("<Q", len(header)) + header
    return runner.answers_in(raw, None, 1.0)


class Pretended:
    """A runner that notes what it is given, and may be interrupted."""

    def __init__(self, log: list, interrupt_at: int | None = None, **about) -> None:
        self.log, self.interrupt_at, self.about = log, interrupt_at, about

    def __call__(self, inputs, guarded):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, notebooks):
        if len(self.log) == self.interrupt_at:
            raise KeyboardInterrupt
        self.log.append(next(iter(notebooks.values())).decode())
        return answers(self.log[-1], **self.about)


def run_all(monkeypatch, kept, submissions, inputs=b"inputs", **pretend):
    """Which submissions were run, and what came of all."""
    log = []
    monkeypatch.setattr(grading, "Runner", Pretended(log, **pretend))
    found = grading.run_all(submissions, Inputs(inputs, (0, 0), {}, Path()), kept, 1, True)
    return log, [run.frames[0].about["name"] if run.frames else None for run in found]


def submissions(*texts: str) -> list[collect.Submission]:
    return [collect.Submission(f"student{i}", {"01_waves": t.encode()}) for i, t in enumerate(texts)]


def test_an_interrupted_run_goes_on_where_it_was(monkeypatch, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_all(monkeypatch, tmp_path, submissions("a", "b", "c"), interrupt_at=2)
    assert run_all(monkeypatch, tmp_path, submissions("a", "b", "c")) == (["c"], ["a", "b", "c"])


def test_what_is_handed_in_again_runs_again_and_a_mended_test_runs_all(monkeypatch, tmp_path):
    run_all(monkeypatch, tmp_path, submissions("a", "b"))
    assert run_all(monkeypatch, tmp_path, submissions("a", "b"))[0] == []
    assert run_all(monkeypatch, tmp_path, submissions("a", "new")) == (["new"], ["a", "new"])
    assert run_all(monkeypatch, tmp_path, submissions("a", "new"), b"mended")[0] == ["a", "new"]


def test_what_took_too_long_is_tried_again(monkeypatch, tmp_path):
    run_all(monkeypatch, tmp_path, submissions("a"), status=["took too long", "not run"])
    assert run_all(monkeypatch, tmp_path, submissions("a"))[0] == ["a"]


def test_answers_that_are_cut_off_say_so():
    whole = answers().raw
    assert runner.answers_in(whole, None, 0.0).problem is None
    assert runner.answers_in(whole[:-3], None, 0.0).problem == "its process ended early"
    assert runner.answers_in(b"", None, 0.0).problem == "its process ended early"
    assert (
        runner.answers_in(whole + struct.pack("<Q", 1 << 60), None, 0.0).problem == "its process ended early"
    )


# ----------------------------------------------------------------------------------------------------
# Collecting
# ----------------------------------------------------------------------------------------------------


def collected(folder: Path) -> dict[str, collect.Submission]:
    found = collect.students_in(folder)
    return {student: collect.submission(student, place, ASSIGNMENT) for student, place in found}


def put(file: Path, text: str = "{}") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_submissions_are_found_in_many_layouts(tmp_path):
    put(tmp_path / "nbgrader" / "waves" / "01_waves.ipynb")
    put(tmp_path / "nbgrader" / "waves" / "timestamp.txt", "2026-11-20 10:00:00 UTC\n")
    put(tmp_path / "Ada Lovelace_17" / "01_waves (2).ipynb")
    put(tmp_path / "Ada Lovelace_17" / ".ipynb_checkpoints" / "01_waves.ipynb")
    with zipfile.ZipFile(tmp_path / "zipped.zip", "w") as archive:
        archive.writestr("waves/01_waves.ipynb", "{}")
    (tmp_path / "inner").mkdir()
    with zipfile.ZipFile(tmp_path / "inner" / "mine.zip", "w") as archive:
        archive.writestr("01_waves.ipynb", "{}")
    found = collected(tmp_path)
    assert set(found) == {"nbgrader", "Ada Lovelace_17", "zipped", "inner"}
    assert all(submission.notebooks == {"01_waves": b"{}"} for submission in found.values())
    assert found["nbgrader"].timestamp == "2026-11-20 10:00:00 UTC"


def test_what_is_missing_double_linked_or_large_is_said(tmp_path):
    put(tmp_path / "other" / "notes.ipynb")
    put(tmp_path / "double" / "a" / "01_waves.ipynb")
    put(tmp_path / "double" / "b" / "01_waves.ipynb")
    put(tmp_path / "secret")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "01_waves.ipynb").symlink_to(tmp_path / "secret")
    (tmp_path / "folder linked").symlink_to(tmp_path / "double")
    put(tmp_path / "broken.zip", "no zip file")
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("01_waves.ipynb", b"0" * (50 * 2**20))
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "01_waves.ipynb")
    found = collected(tmp_path)
    why = {student: submission.problems["01_waves"] for student, submission in found.items()}
    assert "among notes.ipynb" in why["other"]
    assert "several" in why["double"]
    assert "links are not followed" in why["linked"]
    assert "links are not followed" in why["folder linked"]
    assert "cannot be read" in why["broken"]
    assert "larger than 10 MB" in why["bomb"]
    assert "no plain file" in why["pipe"]


# ----------------------------------------------------------------------------------------------------
# A student's cells
# ----------------------------------------------------------------------------------------------------


def notebook(*cells: tuple[str | None, str]) -> list:
    """The cells of a notebook of these grade ids and texts."""
    plain = [
        {"cell_type": "code", "source": text, "metadata": {"nbgrader": {"grade_id": mark}} if mark else {}}
        for mark, text in cells
    ]
    return cells_of(json.dumps({"cells": plain}).encode())


def found_in(cells: list, finished: tuple[str, ...] = ()):
    known = by_name(statements("import torch\ndef chapters_own(x): return x"))
    return function_of(cells, statements_of(cells, "01_waves", {"wave"}), "wave", "wave", known, finished)


def test_the_last_cell_with_the_mark_counts_and_a_copy_without_it_does_not():
    cells = notebook(
        ("wave", "def wave(x):\n    return 1"),
        ("wave", "def wave(x):\n    return 2"),
        (None, "def wave(x):\n    return 3"),
    )
    found = found_in(cells)
    assert "return 2" in found.code and "return 3" not in found.code
    assert "2 cells have its mark" in found.notes[0]


def test_names_of_the_chapter_and_finished_exercises_are_not_taken_from_the_notebook():
    cells = notebook(
        (
            None,
            "def chapters_own(x):\n    return 0\n"
            "def other(x):\n    return 0\n"
            "def helper(x):\n    return other(x)",
        ),
        ("wave", "def wave(x):\n    return helper(chapters_own(other(x)))"),
    )
    found = found_in(cells, ("other",))
    assert "def helper" in found.code
    assert "def chapters_own" not in found.code and "def other" not in found.code
    assert "It was tried with the finished other." in found.notes


@pytest.mark.parametrize(
    "raw",
    [b"", b"[]", b'{"cells": 3}', b"\xff\xfe", b'{"cells": [' * 50_000],
    ids=["nothing", "list", "number", "bytes", "deep"],
)
def test_bytes_that_are_no_notebook_are_refused(raw):
    with pytest.raises(ValueError, match="it "):
        cells_of(raw)


def test_odd_cells_are_read_as_far_as_they_go():
    raw = {
        "cells": [
            3,
            {},
            {"source": 3, "metadata": 3},
            {"cell_type": "code", "source": ["a\x00b", 3], "metadata": {"nbgrader": 3}},
        ]
    }
    cells = cells_of(json.dumps(raw).encode())
    assert [cell.grade_id for cell in cells] == [None] * 3
    assert found_in(cells).problem == "no cell of 01_waves defines it"
    assert answer_of(cells, "wave").problem


# ----------------------------------------------------------------------------------------------------
# The jail
# ----------------------------------------------------------------------------------------------------


def verdict(machine: str, call: int, argument: int = 0, architecture: int | None = None) -> int:
    """What the filter of a machine says of a call, by going through its steps."""
    seen = {jail.NUMBER: call, jail.ARCHITECTURE: architecture, jail.ARGUMENTS: argument}
    if architecture is None:
        seen[jail.ARCHITECTURE] = jail.MACHINES[machine][1]
    steps, at, value = jail.filter_for(machine), 0, 0
    while True:
        what, if_so, if_not, number = steps[at]
        at += 1
        if what == jail.RETURN:
            return number
        if what == jail.LOAD:
            value = seen[number]
        else:
            true = {
                jail.EQUAL: value == number,
                jail.AT_LEAST: value >= number,
                jail.ANY_BIT: value & number,
            }[what]
            at += if_so if true else if_not


@pytest.mark.parametrize("machine", jail.MACHINES)
def test_the_filter_allows_what_is_listed_and_threads_alone(machine):
    column = jail.MACHINES[machine][0]
    listed = {numbers[column] for numbers in jail.ALLOWED.values()} - {None}
    for call in range(600):
        if call == jail.CLONE[column]:
            assert verdict(machine, call, 0x11) == jail.REFUSE  # a process
            assert verdict(machine, call, 0x3D0F00) == jail.ALLOW  # a thread
        elif call == jail.CLONE3:
            assert verdict(machine, call) == jail.UNKNOWN
        else:
            assert (verdict(machine, call) == jail.ALLOW) == (call in listed), call
    assert verdict(machine, 0, architecture=0x40000003) == jail.END_PROCESS
    assert verdict(machine, jail.X32 | 1) == jail.REFUSE


HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}


@pytest.mark.parametrize("machine", jail.MACHINES)
def test_the_calls_have_the_numbers_of_the_kernel_s_headers(machine):
    if not HEADERS[machine].exists():
        pytest.skip(f"there is no {HEADERS[machine]}")
    text = HEADERS[machine].read_text()
    theirs = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text))
    column = jail.MACHINES[machine][0]
    names = {"newfstatat": "fstatat"} if machine == "aarch64" else {}
    ours = {n: numbers[column] for n, numbers in jail.ALLOWED.items() if numbers[column] is not None}
    assert ours == {name: int(theirs[names.get(name, name)]) for name in ours}
    assert jail.CLONE[column] == int(theirs["clone"])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"platform": "darwin"}, "Landlock"),
        ({"machine": "riscv64"}, "x86_64 and aarch64 only"),
        ({"version": 0}, "this kernel has no Landlock"),
    ],
)
def test_where_nothing_confines_code_grading_refuses(monkeypatch, change, why):
    monkeypatch.setattr(jail.sys, "platform", change.get("platform", "linux"))
    monkeypatch.setattr(jail.platform, "machine", lambda: change.get("machine", "x86_64"))
    monkeypatch.setattr(jail, "landlock_version", lambda: change.get("version", 4))
    assert why in jail.why_not()
    with pytest.raises(Exception, match="UNGUARDED=1"):
        Runner(Inputs(b"", (0, 0), {}, Path()))
    Runner(Inputs(b"", (0, 0), {}, Path()), guarded=False)
