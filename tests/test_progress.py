"""What is recorded as solved, and the answers to questions."""

import json
import types

import pytest
import torch

from lecture26.checks import check, check_answer, progress
from lecture26.ddpm import q_sample
from lecture26.kit import solved

EXERCISES = {"01_ddpm": ["ddpm.q_sample", "ddpm.kept"], "02_unet": ["unet.attention"]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A learner's folder with a record, in which a notebook's kernel runs."""
    monkeypatch.chdir(tmp_path)
    solved.lay_out(tmp_path, EXERCISES)
    return tmp_path


def own(x_0, alpha_bar, noise):
    return alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise


def in_notebook(function):
    """A function as it would be if a notebook's cell had defined it."""
    copy = types.FunctionType(function.__code__, function.__globals__)
    copy.__module__ = "__main__"
    return copy


def test_a_passing_function_of_the_notebook_is_recorded(folder):
    assert check("ddpm.q_sample", in_notebook(own))
    assert solved.read(folder) == {"exercises": EXERCISES, "solved": ["ddpm.q_sample"]}
    before = (folder / "progress.json").stat().st_mtime_ns
    assert check("ddpm.q_sample", in_notebook(own))
    assert (folder / "progress.json").stat().st_mtime_ns == before


def test_neither_the_finished_function_nor_a_wrong_one_is_recorded(folder):
    assert check("ddpm.q_sample", q_sample)
    assert check("ddpm.q_sample", own)  # of another module
    assert not check("ddpm.q_sample", in_notebook(lambda x_0, alpha_bar, noise: x_0))
    assert solved.read(folder)["solved"] == []


def test_without_a_record_none_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert check("ddpm.q_sample", in_notebook(own))
    assert check_answer("ddpm.kept", 1.0, 1.0)
    assert list(tmp_path.iterdir()) == []
    progress()
    assert " ".join(capsys.readouterr().out.split()) == solved.NO_RECORD


@pytest.mark.parametrize("text", ["not json", "[]", '{"format": "other"}', '{"format": 3, "solved": []}'])
def test_a_file_that_is_no_record_disturbs_no_check_and_is_named(folder, text, capsys):
    (folder / "progress.json").write_text(text)
    assert check("ddpm.q_sample", in_notebook(own))
    assert (folder / "progress.json").read_text() == text
    progress()
    assert "is no record of solved exercises" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ValueError, match="is no record of solved exercises"):
        solved.lay_out(folder, EXERCISES)


def test_the_table_over_all_chapters(folder, capsys):
    solved.note_solved("ddpm.kept")
    progress()
    assert capsys.readouterr().out.splitlines() == [
        "chapter  solved    open",
        "01_ddpm  1 of 2    q_sample",
        "02_unet  0 of 1    attention",
    ]


def test_the_table_fits_a_cell_and_names_all_that_is_open(folder, capsys):
    names = [f"ddpm.exercise_number_{number}" for number in range(20)]
    solved.lay_out(folder, {"01_ddpm": names})
    progress()
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 90 for line in lines)
    assert all(name.removeprefix("ddpm.") in " ".join(lines) for name in names)


def test_new_exercises_join_a_record_and_what_is_solved_stays(folder):
    solved.note_solved("unet.attention")
    more = EXERCISES | {"03_vae": ["vae.psnr"]}
    solved.lay_out(folder, more)
    assert solved.read(folder) == {"exercises": more, "solved": ["unet.attention"]}
    assert json.loads((folder / "progress.json").read_text())["format"] == solved.FORMAT


def test_a_right_answer_is_recorded_and_a_wrong_one_is_not(folder):
    assert not check_answer("ddpm.kept", 0.9, 0.364, within=0.05)
    assert solved.read(folder)["solved"] == []
    assert check_answer("ddpm.kept", 0.4, 0.364, within=0.05)
    assert solved.read(folder)["solved"] == ["ddpm.kept"]


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (..., "not answered yet. Write your answer in place of the `...`."),
        (None, "not answered yet."),
        (0.4, "right: you said 0.4, it is 0.364."),
        (torch.tensor(0.4), "right: you said 0.4, it is 0.364."),
        (0.42, "0.42 is too large. Add up the betas."),
        (0, "0 is too small. Add up the betas."),
        (float("nan"), "nan is not a number."),
        ("0.4", "A number is expected, not something of type str."),
        (True, "A number is expected, not something of type bool."),
        (torch.ones(2), "A number is expected, not something of type Tensor."),
    ],
)
def test_answers_that_are_numbers(answer, sentence):
    result = check_answer("ddpm.kept", answer, 0.364, within=0.05, hint="Add up the betas.")
    assert sentence in " ".join(repr(result).split())
    assert bool(result) == sentence.startswith("right")
    assert result or "0.364" not in repr(result)


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ("DDIM", "ddpm.nearest: right."),
        ("DDPM", "It is not 'DDPM'. Think of the noise."),
        ("ddim", "Choose one of 'DDPM', 'DDIM'; you wrote 'ddim'."),
        (1, "Choose one of 'DDPM', 'DDIM'; you wrote 1."),
        (..., "not answered yet."),
    ],
)
def test_answers_that_are_choices(answer, sentence):
    result = check_answer("ddpm.nearest", answer, "DDIM", among=("DDPM", "DDIM"), hint="Think of the noise.")
    assert sentence in " ".join(repr(result).split())
    assert bool(result) == (answer == "DDIM")
