"""What holds for every notebook: results are verified, exercises checked, unsolved ones run.

The notebooks themselves run under nbval, each as its rehearsal: `make nbval`.
"""

import ast
import functools
import importlib
import re

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import editions
from course import ROOT, SECOND_READING, Cell, module_name, notebook_sources, read_cells
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


def test_every_proof_is_tried_with_a_wrong_side():
    """The trials themselves run in the rehearsals of the notebooks."""
    wrong_sides = load_wrong_sides()
    proofs = {int(source.stem[:2]): set(sum(map(proved, read_cells(source)), [])) for source in SOURCES}
    tried = {chapter: {n for n in wrong_sides if n.startswith(f"{chapter}.")} for chapter in proofs}
    for chapter, numbers in tried.items():
        assert numbers == proofs[chapter]
    assert sum(map(len, tried.values())) == len(wrong_sides)


def heading_faults(cells):
    """What is wrong with how sections are tagged core or optional, and marked in their headings."""
    faults = []
    for cell in cells:
        lines = cell.source.splitlines() if cell.kind == "markdown" else []
        headings = [(number, line) for number, line in enumerate(lines) if re.match("##+ ", line)]
        tags = {"core", "optional"} & set(cell.tags)
        if tags and headings[:1] != [(0, lines[0])]:
            faults.append(f"the cell {lines[0]!r} is tagged {', '.join(tags)} and begins with no heading")
        for number, line in headings:
            if line.startswith("## ") and line != "## References" and (number > 0 or len(tags) != 1):
                faults.append(f"{line!r} must begin a cell tagged either core or optional")
            elif line.endswith(SECOND_READING) != (number == 0 and tags == {"optional"}):
                faults.append(f"{line!r} must end in{SECOND_READING} if it is optional, and only then")
    return faults


def markdown_cell(source, *tags):
    return Cell("notebooks/03_example.py", 1, 1, "markdown", source, tags)


@pytest.mark.parametrize(
    ("cell", "faults"),
    [
        (markdown_cell("# 03 Example\n\nA title needs no tag."), []),
        (markdown_cell("## First\n\nText", "core"), []),
        (markdown_cell("## First *(at a second reading)*", "optional"), []),
        (markdown_cell("### Part *(at a second reading)*", "optional"), []),
        (markdown_cell("### Part\n\nof a section that is tagged"), []),
        (markdown_cell("## Summary\n\n## References", "core"), []),
        (markdown_cell("## First"), ["'## First' must begin a cell tagged"]),
        (markdown_cell("## First", "core", "optional"), ["'## First' must begin a cell tagged"]),
        (markdown_cell("Text\n\n## First", "core"), ["'Text' is tagged core", "'## First' must begin"]),
        (markdown_cell("## First\n\n## Second", "core"), ["'## Second' must begin a cell"]),
        (markdown_cell("## First", "optional"), ["'## First' must end in *(at a second reading)*"]),
        (markdown_cell("## First *(at a second reading)*", "core"), ["if it is optional, and only then"]),
        (markdown_cell("### Part *(at a second reading)*"), ["if it is optional, and only then"]),
        (markdown_cell("Text", "optional"), ["'Text' is tagged optional and begins with no heading"]),
    ],
)
def test_faults_of_headings(cell, faults):
    found = heading_faults([cell])
    assert len(found) == len(faults)
    assert all(expected in fault for expected, fault in zip(faults, found, strict=True))


@every_notebook
def test_every_section_is_tagged_core_or_optional(source):
    assert heading_faults(read_cells(source)) == []


def links_to_neighbours(name):
    """The links to the chapters before and after a chapter, as they must stand at its head and its foot."""
    chapters = [source.stem for source in SOURCES]
    place = chapters.index(name)
    neighbours = {"Previous": chapters[place - 1 : place], "Next": chapters[place + 1 : place + 2]}
    for word, names in neighbours.items():
        for neighbour in names:
            title = re.search(r"^# (\d\d [^:\n]+)", texts(SOURCES[chapters.index(neighbour)], "markdown"))[1]
            yield f"[{word}: {title}]({neighbour}.ipynb)"


@every_notebook
def test_previous_and_next_chapter_are_linked_at_head_and_foot(source):
    prose = [c.source for c in read_cells(source) if c.kind == "markdown"]
    links = list(links_to_neighbours(source.stem))
    assert [link for link in links if link not in prose[0]] == []
    assert [link for link in links if link not in prose[-1]] == []


def test_links_are_those_of_the_neighbours():
    assert list(links_to_neighbours("00_start_here")) == ["[Next: 01 DDPM](01_ddpm.ipynb)"]
    assert list(links_to_neighbours("03_classifier_guidance")) == [
        "[Previous: 02 The U-Net](02_unet.ipynb)",
        "[Next: 04 CLIP guidance](04_clip_guidance.ipynb)",
    ]


START_HERE = texts(next(source for source in SOURCES if source.stem == "00_start_here"), "markdown")
CODE_ANSWERS = re.findall(r"^```python\n(.*?assert.*?)^```", START_HERE, flags=re.M | re.S)


def answer_to(question):
    """The folded answer to a question of chapter 00's self-test."""
    return re.search(rf"^\*\*{question}\. .*?</summary>(.*?)</details>", START_HERE, flags=re.M | re.S)[1]


def test_self_test_has_six_questions_each_with_a_folded_answer():
    assert re.findall(r"^\*\*(\d)\. ", START_HERE, flags=re.M) == list("123456")
    assert START_HERE.count("<details>") == 6 and all(answer_to(k).strip() for k in range(1, 7))


@pytest.mark.parametrize("code", CODE_ANSWERS, ids=["broadcasting", "autograd"])
def test_code_in_the_self_tests_answers_holds(code):
    exec(code, {"torch": torch})


def test_numbers_in_the_self_tests_answers():
    x, eps = torch.randn(2, 1_000_000, generator=torch.Generator().manual_seed(0))
    assert (0.6**0.5 * 0.5**0.5 * x + 0.4**0.5 * eps).var() == pytest.approx(0.7, abs=0.01)
    assert "=0.7$" in answer_to(1)

    x = torch.linspace(-9, 9, 10_001, dtype=torch.float64)
    posterior = (Normal(0.0, 1.0).log_prob(x) + Normal(x, 1.0).log_prob(torch.tensor(2.0))).softmax(dim=0)
    mean = (posterior * x).sum()
    assert mean == pytest.approx(1) and (posterior * (x - mean) ** 2).sum() == pytest.approx(0.5)
    assert r"$\mathcal N(1,\tfrac12)$" in answer_to(2)

    x = torch.tensor(3.0, requires_grad=True)
    (gradient,) = torch.autograd.grad(Normal(1.0, 2.0).log_prob(x), x)
    assert gradient == -0.5 and r"=-\tfrac12$" in answer_to(3)

    assert kl_divergence(Normal(1.0, 1.0), Normal(0.0, 1.0)) == 0.5
    assert r"=\tfrac12$" in answer_to(4)


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
def test_every_question_gives_its_answer_a_name_that_the_cell_below_checks(source):
    cells = read_cells(source)
    for cell, below in zip(cells, cells[1:], strict=False):
        if "question" in cell.tags:
            assert "export" not in cell.tags
            (found,) = editions.SOLUTION.finditer(cell.source)
            name = editions.answered_name(cell, found)
            call = rf'check_answer\(\s*"{module_name(source)}\.{name}",\s*{name},'
            assert re.search(call, below.source), f"the cell below {name} does not check it"
            assert all(
                not re.search(rf"\b{name}\b", other.source)
                for other in cells
                if other.kind == "code" and other not in (cell, below)
            ), f"another cell uses {name}, which a learner may leave open"


KIND = r"\*(Formula|Algorithm|Question|Question on paper), (easy|medium|hard), \d+ minutes\.\* \S"


def exercise_faults(cells):
    """What is wrong with the headings of the exercises: their numbers, kinds, and which cells have one."""
    faults, headings, above = [], [], False
    for cell in cells:
        if cell.kind == "markdown":
            above = False
            for found in re.finditer(r"^#### Exercises? .*$", cell.source, flags=re.M):
                headings.append(found[0])
                above = True
                if not re.match(KIND, cell.source[found.end() :].strip()):
                    faults.append(f"{found[0]!r} is not followed by kind, difficulty, minutes and the task")
        elif {"exercise", "question"} & set(cell.tags):
            if not above:
                faults.append(f"cell {cell.number} is an exercise without a heading right above")
            above = False
    for number, heading in enumerate(headings, start=1):
        if not heading.startswith(f"#### Exercise {number}: "):
            faults.append(f"{heading!r} must begin with '#### Exercise {number}: '")
    return faults


def to_solve(*tags):
    return Cell("notebooks/03_example.py", 2, 1, "code", "", tags)


GOOD_HEADING = markdown_cell("#### Exercise 1: noise\n\n*Formula, easy, 3 minutes.* Write it.")


@pytest.mark.parametrize(
    ("cells", "faults"),
    [
        ([GOOD_HEADING, to_solve("export", "exercise")], []),
        ([GOOD_HEADING, to_solve("question")], []),
        ([GOOD_HEADING, to_solve("exercise"), to_solve("exercise")], ["cell 2 is an exercise without"]),
        ([to_solve("question")], ["cell 2 is an exercise without a heading right above"]),
        ([GOOD_HEADING, GOOD_HEADING], ["must begin with '#### Exercise 2: '"]),
        ([markdown_cell("#### Exercise 1: noise\n\nWrite it.")], ["is not followed by kind"]),
        ([markdown_cell("#### Exercise 1: noise\n\n*Formula, easy, 3 minutes.*")], ["is not followed"]),
        ([markdown_cell("#### Exercises 1 and 2: noise\n\n*Formula, easy, 3 minutes.* Do.")], ["must begin"]),
    ],
)
def test_faults_of_exercises(cells, faults):
    found = exercise_faults(cells)
    assert len(found) == len(faults)
    assert all(expected in fault for expected, fault in zip(faults, found, strict=True))


@every_notebook
def test_every_exercise_has_a_number_a_kind_a_difficulty_and_minutes(source):
    assert exercise_faults(read_cells(source)) == []


@pytest.mark.parametrize("source", SOURCES[1:], ids=lambda source: source.stem)
def test_what_is_solved_is_shown_at_the_foot(source):
    (cell,) = [c for c in read_cells(source) if c.source == "progress()"]
    assert cell.tags == ("nbval-ignore-output",)


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
    for cell in filter(editions.is_to_solve, read_cells(source)):
        for solution in editions.SOLUTION.finditer(cell.source):
            assert solution.group(2).strip() not in shown
