"""What holds for every notebook: results are verified, exercises checked, unsolved ones run.

The notebooks themselves run under nbval, each as its rehearsal: `make nbval`.
"""

import ast
import functools
import importlib
import re

import pytest

import editions
from course import ROOT, module_name, notebook_sources, read_cells
from lecture26.checks import check, exercises
from wrong_sides import load_wrong_sides, proved

SOURCES = notebook_sources(ROOT)
every_notebook = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)


def equation_faults(chapter, prose, code):
    """What is wrong with the numbered equations of a chapter, given the texts of its prose and its code."""
    tags = re.findall(r"\\tag\{([^}]*)\}", prose)
    parsed = [re.fullmatch(rf"({chapter}\.\d+)(?:, (definition|step))?", tag) for tag in tags]
    faults = [
        f"\\tag{{{tag}}} must be \\tag{{{chapter}.k}}, or with ', definition' or ', step' behind the number"
        for tag, match in zip(tags, parsed, strict=True)
        if match is None
    ]
    kinds = [match.groups() for match in parsed if match]
    numbers = [number for number, _ in kinds]
    expected = [f"{chapter}.{k}" for k in range(1, len(numbers) + 1)]
    if not faults and numbers != expected:
        faults.append(f"equations must count {', '.join(expected)}; they are {', '.join(numbers)}")
    verified = set(re.findall(r'\bverify\(\s*"([^"]+)"', code))
    results = [number for number, kind in kinds if kind is None]
    faults += [f'({number}) has no verify("{number}", ...)' for number in results if number not in verified]
    faults += [f'verify("{number}", ...) has no equation' for number in sorted(verified - set(numbers))]
    return faults


TWO_EQUATIONS = r"$$a = b \tag{3.1, definition}$$ $$b = c \tag{3.2}$$"


@pytest.mark.parametrize(
    ("prose", "code", "faults"),
    [
        (TWO_EQUATIONS, 'verify("3.2", b, c, atol=0)', []),
        (TWO_EQUATIONS, 'verify(\n    "3.2", b, c, atol=0)', []),
        (TWO_EQUATIONS, "", ['(3.2) has no verify("3.2", ...)']),
        (TWO_EQUATIONS, 'verify("3.2", b, c); verify("3.3", d, e)', ['verify("3.3", ...) has no equation']),
        (r"\tag{3.1, step} \tag{3.1, step}", "", ["equations must count 3.1, 3.2; they are 3.1, 3.1"]),
        (r"\tag{3.1, step} \tag{3.3, step}", "", ["equations must count 3.1, 3.2; they are 3.1, 3.3"]),
        (r"\tag{3.1, lemma}", "", [r"\tag{3.1, lemma} must be \tag{3.k}, or with"]),
        (r"\tag{4.1}", 'verify("4.1", a, b)', [r"\tag{4.1} must be \tag{3.k}, or with", "has no equation"]),
    ],
)
def test_the_counter_of_equations(prose, code, faults):
    found = equation_faults(3, prose, code)
    assert len(found) == len(faults)
    assert all(expected in fault for expected, fault in zip(faults, found, strict=True))


@functools.cache  # every notebook's references are looked up in all of them
def texts(source, kind):
    """The text of all Markdown or all code cells of a notebook."""
    return "\n\n".join(cell.source for cell in read_cells(source) if cell.kind == kind)


@every_notebook
def test_every_numbered_result_is_verified(source):
    chapter = int(source.stem[:2])
    assert equation_faults(chapter, texts(source, "markdown"), texts(source, "code")) == []


CHAPTERS_WITH_TRIALS = (1,)  # the others get theirs in their own pass


def test_every_proof_is_tried_with_a_wrong_side():
    """The trials themselves run in the rehearsals of the notebooks."""
    wrong_sides = load_wrong_sides()
    proofs = {int(source.stem[:2]): set(sum(map(proved, read_cells(source)), [])) for source in SOURCES}
    tried = {chapter: {n for n in wrong_sides if n.startswith(f"{chapter}.")} for chapter in proofs}
    for chapter, numbers in tried.items():
        assert numbers <= proofs[chapter]
        assert numbers == proofs[chapter] or chapter not in CHAPTERS_WITH_TRIALS
    assert sum(map(len, tried.values())) == len(wrong_sides)


@every_notebook
def test_every_equation_that_is_referred_to_exists(source):
    tags = [re.findall(r"\\tag\{(\d+\.\d+)", texts(other, "markdown")) for other in SOURCES]
    chapters = "|".join(str(int(other.stem[:2])) for other in SOURCES if int(other.stem[:2]) > 0)
    comments = "\n".join(re.findall(r"#.*", source.read_text(encoding="utf-8")))  # the prose is comments too
    referred = re.findall(rf"(?<!\w)\(((?:{chapters})\.[1-9]\d*)\)", comments)
    assert sorted(set(referred) - set(sum(tags, []))) == []


def exercises_with_next(source):
    """The exercise cells of a notebook, each with the cell below it."""
    cells = read_cells(source)
    return [(cell, below) for cell, below in zip(cells, cells[1:], strict=False) if "exercise" in cell.tags]


def functions(cell):
    """The names of the functions that a cell defines."""
    return [node.name for node in ast.parse(cell.source).body if isinstance(node, ast.FunctionDef)]


@every_notebook
def test_every_exercise_is_one_exported_function_with_its_check_below(source):
    for cell, below in exercises_with_next(source):
        (name,) = functions(cell)
        assert "export" in cell.tags, f"the exercise {name} is not exported"
        call = f'check("{module_name(source)}.{name}", {name})'
        assert call in below.source, f"the cell below {name} does not call {call}"


@every_notebook
def test_exercises_of_notebook_and_checks_are_the_same(source):
    chapter = module_name(source)
    in_notebook = [f"{chapter}.{name}" for cell, _ in exercises_with_next(source) for name in functions(cell)]
    assert sorted(in_notebook) == sorted(name for name in exercises() if name.startswith(f"{chapter}."))


@every_notebook
def test_unsolved_exercise_runs_and_does_not_pass(source):
    """The finished functions below each check set all right again."""
    for cell, _ in exercises_with_next(source):
        module = importlib.import_module(f"lecture26.{module_name(source)}")
        namespace = dict(vars(module))
        exec(editions.to_fill_in(cell), namespace)
        (name,) = functions(cell)
        result = check(f"{module_name(source)}.{name}", namespace[name])
        assert not result, f"{name} passes though it is not filled in"


@every_notebook
def test_learners_copy_holds_no_solution_outside_the_folded_answers(source):
    copy = editions.learners_copy(source)
    shown = "\n".join(cell.source for cell in copy.cells if not cell.source.startswith("<details>"))
    for cell, _ in exercises_with_next(source):
        for solution in editions.SOLUTION.finditer(cell.source):
            assert solution.group(2) not in shown
