"""What students' code is given: the cases of the exercises, and the chapters without the exercises."""

import ast
from dataclasses import dataclass
from pathlib import Path

from course import notebook_sources
from lecture26.checks import Exercise, exercise
from lecture26.checks.core import Case, default_state
from own_code import Statement, by_name, statements
from tasks import tasks

from .assignments import Assignment, Cohort, Item
from .canary import canary_case
from .runner import Inputs
from .wire import pack_cases


@dataclass(frozen=True)
class ExerciseCases:
    """An exercise with the two seeds of its cases, and the exercises that its reference builds on.

    references: of these, (chapter, text) in the order in which they are to be executed.
    """

    exercise: Exercise
    visible_seed: int
    hidden_seed: int
    references: tuple[tuple[str, str], ...] = ()

    @property
    def canary(self) -> Case:
        """The grader's own function's arguments."""
        return canary_case(self.hidden_seed)

    def section(self, seed: int) -> bytes:
        """What a process gets for the cases of a seed."""
        with default_state():
            cases = self.exercise.cases(seed)
        return pack_cases([*cases, self.canary], references=self.references)


class Chapters:
    """The modules of an assignment's chapters: what they define, and which functions are exercises."""

    def __init__(self, course: Path, assignment: Assignment) -> None:
        sources = notebook_sources(course, list(assignment.notebooks))
        self.known: dict[str, dict[str, Statement]] = {}
        self.exercises: dict[str, set[str]] = {}
        for name, source in zip(assignment.chapters, sources, strict=True):
            text = (course / "lecture26" / f"{name}.py").read_text(encoding="utf-8")
            self.known[name] = by_name(statements(text))
            self.exercises[name] = {task.function for task in tasks(source)}

    def without_exercises(self, chapter: str) -> str:
        """The text of a chapter's module without its exercises."""
        known = self.known[chapter]
        kept = {id(known[name]): known[name] for name in known if name not in self.exercises[chapter]}
        return "\n\n".join(statement.text for statement in kept.values())

    def builds_on(self, chapter: str, function: str) -> list[tuple[str, str]]:
        """The exercises, as (chapter, function), that a function calls, itself or by what it calls."""
        seen: set[tuple[str, str]] = set()
        todo = [(chapter, function)]
        while todo:
            place = todo.pop()
            statement = self.known[place[0]].get(place[1])
            if place in seen or statement is None:
                continue
            seen.add(place)
            todo += self._read_by(place[0], statement)
        found = (place for place in seen if place[1] in self.exercises[place[0]])
        return sorted(place for place in found if place != (chapter, function))

    def _read_by(self, chapter: str, statement: Statement) -> list[tuple[str, str]]:
        """What a statement of a chapter reads, by the chapter that defines it."""
        match statement.node:
            case ast.ImportFrom(module=str(module), names=[alias]):
                other = module.removeprefix("lecture26.")
                return [(other, alias.name)] if other in self.known else []
        return [(chapter, name) for name in statement.used]

    def references(self, chapter: str, function: str) -> tuple[tuple[str, str], ...]:
        """The texts of the exercises that one builds on, as (chapter, text)."""
        places = self.builds_on(chapter, function)
        order = list(self.known)
        places.sort(key=lambda place: (order.index(place[0]), self.known[place[0]][place[1]].node.lineno))
        return tuple((chapter, self.known[chapter][name].text) for chapter, name in places)


def tests_of(cohort: Cohort, assignment: Assignment) -> dict[str, ExerciseCases]:
    """The tests of an assignment's recorded items, by the exercises' names. No reference is called for it."""
    chapters = Chapters(cohort.course, assignment)
    seeds = cohort.visible_seed(assignment.name), cohort.secret_seed(assignment.name)
    return {
        item.exercise: ExerciseCases(
            exercise(item.exercise), *seeds, chapters.references(chapter_of(assignment, item), item.function)
        )
        for item in assignment.items
        if item.recorded
    }


def inputs_of(cohort: Cohort, assignment: Assignment, tests: dict[str, ExerciseCases]) -> Inputs:
    """All that students' code is given, as bytes, and where in them each item's part stands."""
    chapters = Chapters(cohort.course, assignment)
    content = bytearray()

    def placed(part: bytes) -> tuple[int, int]:
        content.extend(part)
        return len(content) - len(part), len(part)

    own = {name: chapters.without_exercises(name) for name in assignment.chapters}
    place = placed(pack_cases([], chapters=list(own.items())))
    notebooks: dict[str, list[dict]] = {name: [] for name in assignment.notebooks}
    for item in assignment.items:
        chapter = chapter_of(assignment, item)
        plain = {
            "name": item.exercise,
            "function": item.function,
            "mark": item.solution_id,
            "kind": "function" if item.recorded else item.kind,
            "chapter": chapter,
        }
        sections, test = [], tests.get(item.exercise)
        if item.recorded:
            sections = [placed(test.section(seed)) for seed in (test.visible_seed, test.hidden_seed)]
            plain["parameters"] = test.exercise.parameters
            plain["builds_on"] = [name for _, name in chapters.builds_on(chapter, item.function)]
        elif item.kind == "question":
            sections = [placed(pack_cases([], references=[]))]
        notebooks[item.notebook].append(plain | {"sections": sections})
    return Inputs(bytes(content), place, notebooks, cohort.release(assignment.name))


def chapter_of(assignment: Assignment, item: Item) -> str:
    """The module of the chapter that an item stands in."""
    return dict(zip(assignment.notebooks, assignment.chapters, strict=True))[item.notebook]
