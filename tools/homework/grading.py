"""Grades an assignment's submissions: run all, then judge all, then write scores, notebooks and pages.

What a submission's run gave is kept, so that an interrupted grading goes on where it was, and a second one
only runs what is new: other notebooks, other tests, another grader.
"""

import csv
import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

from lecture26.kit.files import replace_when_complete

from .assignments import Assignment, Cohort
from .collect import Submission, students_in, submission
from .feedback import page
from .gradebook import Book, Entry
from .inputs import inputs_of, tests_of
from .runner import Answers, Inputs, Runner, answers_in
from .verdicts import Judge, Score, unreadable

OWN_FILES = [
    Path(__file__).with_name(f"{name}.py") for name in ("worker", "wire", "extract", "tell", "canary", "jail")
]
OWN_FILES.append(Path(__file__).parents[1] / "own_code.py")


@dataclass(frozen=True)
class Report:
    """A student's result.

    cpu_s: seconds of processor time that the student's code took; trouble: why it did not come to its end.
    """

    submission: Submission
    scores: list[Score]
    entry: Entry
    cpu_s: float
    trouble: str | None

    @property
    def points(self) -> float:
        """All that has been given so far."""
        return sum(entered.points or 0.0 for entered in self.entry.items.values())

    @property
    def open(self) -> list[str]:
        """The names of the items that a person has to score."""
        return [name for name, entered in self.entry.items.items() if entered.points is None]

    @property
    def suspicious(self) -> bool:
        """Whether a person should look at the submission."""
        return any(score.suspicious for score in self.scores)


def grade(
    cohort: Cohort, assignment: Assignment, submissions: Path, jobs: int = 2, guarded: bool = True
) -> list[Report]:
    """Grade all submissions in a folder. What is printed meanwhile is for the instructor.

    Args:
        cohort: whose gradebook it is.
        assignment: what was handed out.
        submissions: a folder with a folder or zip file for each student.
        jobs: how many submissions run at once.
        guarded: whether students' code must be confined.

    Raises:
        CourseError: where the system cannot confine it, or the process that runs it has ended.
    """
    found = [submission(student, place, assignment) for student, place in students_in(submissions)]
    tests = tests_of(cohort, assignment)
    inputs = inputs_of(cohort, assignment, tests)
    runs = run_all(found, inputs, cohort.folder / "runs" / assignment.name, jobs, guarded)
    # from here on there are expected outcomes, and no process with students' code any more
    reports = []
    with Book(cohort, assignment) as book:
        judge = Judge(tests, cohort.answers(assignment.name), book.blank())
        for handed_in, answers in zip(found, runs, strict=True):
            handed_in = replace(handed_in, problems=handed_in.problems | unreadable(answers))
            scores = judge.scores(assignment.items, answers, handed_in.problems)
            entry = book.enter(handed_in, scores)
            reports.append(Report(handed_in, scores, entry, answers.cpu_s, answers.problem))
            print(_line(reports[-1], assignment), flush=True)
    write_results(cohort, assignment, reports)
    return reports


def run_all(
    submissions: list[Submission], inputs: Inputs, kept: Path, jobs: int, guarded: bool
) -> list[Answers]:
    """What came of each submission: of a kept run of the same, or of one now.

    Args:
        submissions: all of them.
        inputs: what their code is given.
        kept: the folder of kept runs.
        jobs, guarded: as `grade` has them.
    """
    kept.mkdir(parents=True, exist_ok=True, mode=0o700)
    common = hashlib.sha256(inputs.content + json.dumps([inputs.notebooks, guarded]).encode())
    for file in OWN_FILES:
        common.update(file.read_bytes())
    keys = [_key(common.copy(), handed_in) for handed_in in submissions]
    places = [kept / f"{handed_in.student}.run" for handed_in in submissions]
    runs = [_kept_run(*pair) for pair in zip(places, keys, strict=True)]
    new = [i for i, run in enumerate(runs) if run is None and submissions[i].notebooks]
    print(f"{len(submissions)} submissions, {len(new)} of them to be run", flush=True)
    if new:
        with Runner(inputs, guarded) as runner:

            def run(i: int) -> str:
                runs[i] = runner.run(submissions[i].notebooks)
                _keep_run(places[i], keys[i], runs[i])
                return submissions[i].student

            _all_at_once(run, new, jobs)
    return [run or Answers() for run in runs]


def _all_at_once(run: Callable[[int], str], numbers: list[int], jobs: int) -> None:
    """Call a function with each number, several at once; after an interrupt no more calls begin."""
    pool = ThreadPoolExecutor(jobs)
    try:
        calls = [pool.submit(run, number) for number in numbers]
        for count, call in enumerate(as_completed(calls), start=1):
            print(f"run {count} of {len(numbers)}: {call.result()}", flush=True)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _key(digest: "hashlib._Hash", handed_in: Submission) -> str:
    for name, raw in sorted(handed_in.notebooks.items()):
        digest.update(f"{name} {len(raw)} ".encode() + raw)
    return digest.hexdigest()


def _keep_run(place: Path, key: str, answers: Answers) -> None:
    about = json.dumps({"key": key, "problem": answers.problem, "cpu_s": answers.cpu_s})
    with replace_when_complete(place) as temporary:
        temporary.write_bytes(about.encode() + b"\n" + answers.raw)


def _kept_run(place: Path, key: str) -> Answers | None:
    """A kept run of the same, if there is one that came to its end: a busy machine may be why one did not."""
    if not place.is_file():
        return None
    about, _, raw = place.read_bytes().partition(b"\n")
    about = json.loads(about)
    if about["key"] != key or about["problem"]:
        return None
    answers = answers_in(raw, None, about["cpu_s"])
    slow = any("took too long" in frame.about.get("status", ()) for frame in answers.frames)
    return None if slow else answers


def write_results(cohort: Cohort, assignment: Assignment, reports: list[Report]) -> None:
    """Write the scores as CSV, and a page for each student."""
    folder = cohort.folder / "grades" / assignment.name
    folder.mkdir(parents=True, exist_ok=True)
    for report in reports:
        text = page(assignment, report.submission, report.scores, report.entry)
        (folder / f"{report.submission.student}.html").write_text(text, encoding="utf-8")
    with replace_when_complete(folder.with_suffix(".csv")) as temporary:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(rows(assignment, reports))


def rows(assignment: Assignment, reports: Iterable[Report]) -> list[list[object]]:
    """The rows of the CSV: a head, then one for each student. An item that is open has an empty field."""
    names = [item.exercise for item in assignment.items]
    head = ["student", "points", "of", *names, "open", "hours late", "look at", "problems"]
    found = [head]
    for report in reports:
        points = [report.entry.items[name].points for name in names]
        problems = [f"{name}.ipynb: {why}" for name, why in report.submission.problems.items()]
        problems += [report.trouble] if report.trouble else []
        found.append(
            [
                report.submission.student,
                f"{report.points:g}",
                f"{assignment.points:g}",
                *("" if value is None else f"{value:g}" for value in points),
                len(report.open),
                f"{report.entry.late_s / 3600:.1f}",
                "yes" if report.suspicious else "",
                "; ".join(problems),
            ]
        )
    return found


def _line(report: Report, assignment: Assignment) -> str:
    notes = [f"{name}.ipynb: {why}" for name, why in report.submission.problems.items()]
    notes += [report.trouble] if report.trouble else []
    notes += [f"{len(report.open)} to be scored by hand"] if report.open else []
    notes += ["LOOK AT THIS ONE: its processes told other things than they did"] if report.suspicious else []
    points = f"{report.points:g} of {assignment.points:g}"
    return f"{report.submission.student:24} {points:>12}  {report.cpu_s:5.1f} s  {'; '.join(notes)}"
