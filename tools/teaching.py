"""The teaching text of a chapter, `teaching/NN_name.toml`: what is said, how long, where sessions end.

Each core section has an entry under the text of its heading:

    [sections."A schedule"]
    minutes = 5           # of speaking and typing
    say = "..."           # in Markdown, mathematics in plain letters
    stumble = "..."       # where people stumble
    question = "..."      # the question that always comes
    answer = "..."
    type = ["name"]       # optional: functions to be typed, besides the section's exercises
    stored = ["..."]      # optional: a text in each cell that is not run, but shows its stored output

    [sections."A schedule".predict]  # optional, where the section has no question of its own
    question = "..."
    answer = "..."
    before = "..."        # optional: a text in the cell before which it is asked

and `[[sessions.50]]`, `[[sessions.80]]` say up to which heading (`until`) each session of so many minutes
goes, what has been `seen` by then, and with which question (`next`) it ends. `teaching/measured.json` holds
how long the code of the sections runs; `python tools/live.py --measure` makes it anew.
"""

import html
import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from nbconvert.filters import markdown2html

from core_path import sections
from course import CourseError, read_cells

LENGTHS = (50, 80)  # minutes of a session
MEASURED = "measured.json"


@dataclass(frozen=True)
class Prediction:
    """A question to be answered before the result is seen."""

    question: str
    answer: str
    before: str = ""


@dataclass(frozen=True)
class Notes:
    """What a teacher wants to know of a section; `seconds` is how long its code runs, 0 if not measured."""

    minutes: float
    say: str
    stumble: str
    question: str
    answer: str
    predict: Prediction | None = None
    type: tuple[str, ...] = ()
    stored: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class Session:
    """A session: the heading of its last section, what has been seen then, and the question it ends with."""

    until: str
    seen: str
    next: str


@dataclass(frozen=True)
class Teaching:
    """The teaching text of a chapter: notes by heading, sessions by their length in minutes."""

    notes: dict[str, Notes]
    sessions: dict[int, list[Session]] = field(default_factory=dict)

    def session_ends(self, heading: str) -> list[tuple[int, int, Session]]:
        """The sessions that end with a section: length, number, session."""
        return [
            (length, number, session)
            for length, sessions in self.sessions.items()
            for number, session in enumerate(sessions, start=1)
            if session.until == heading
        ]


def read_teaching(source: Path) -> Teaching:
    """The teaching text of a chapter's source, notes in the order of its core sections.

    Raises:
        CourseError: if a section has no entry, an entry no section, or a session ends nowhere or too late.
    """
    headings = [s.heading for s in sections(read_cells(source)) if s.is_core and s.heading]
    path = source.parents[1] / "teaching" / f"{source.stem}.toml"
    if not path.exists():
        return Teaching({heading: Notes(0, "", "", "", "") for heading in headings})
    where = f"teaching/{path.name}"
    text = tomllib.loads(path.read_text(encoding="utf-8"))
    entries = text.get("sections", {})
    if odd := sorted(set(entries) ^ set(headings)):
        raise CourseError(f"{where}: core sections and entries differ in {', '.join(map(repr, odd))}")
    seconds = measured(path.parent).get(source.stem, {}).get("seconds", {})
    notes = {}
    for heading in headings:
        entry = dict(entries[heading])
        predict = Prediction(**entry.pop("predict")) if "predict" in entry else None
        choices = {name: tuple(entry.pop(name, ())) for name in ("type", "stored")}
        notes[heading] = Notes(**entry, **choices, predict=predict, seconds=seconds.get(heading, 0.0))
    sessions = {int(length): [Session(**s) for s in own] for length, own in text.get("sessions", {}).items()}
    teaching = Teaching(notes, sessions)
    for length in sessions:
        check_sessions(teaching, length, where)
    return teaching


def measured(folder: Path) -> dict:
    """How long the code of the chapters' sections runs, by chapter."""
    path = folder / MEASURED
    return json.loads(path.read_text(encoding="utf-8"))["chapters"] if path.exists() else {}


def minutes_of_sessions(teaching: Teaching, length: int) -> list[float]:
    """How long each session of a split takes: what is stated for speaking, and measured for running."""
    ends = [session.until for session in teaching.sessions[length]]
    totals = [0.0]
    for heading, notes in teaching.notes.items():
        totals[-1] += notes.minutes + notes.seconds / 60
        if heading in ends:
            totals.append(0.0)
    return totals[:-1] if totals[-1] == 0 else totals


def check_sessions(teaching: Teaching, length: int, where: str) -> None:
    """Raise CourseError if a split into sessions leaves something out, or one of them is too long."""
    headings = list(teaching.notes)
    ends = [session.until for session in teaching.sessions[length]]
    if [heading for heading in headings if heading in ends] != ends or ends[-1:] != headings[-1:]:
        raise CourseError(
            f"{where}: sessions.{length} must end with headings in order, the last one included"
        )
    for session, minutes in zip(
        teaching.sessions[length], minutes_of_sessions(teaching, length), strict=True
    ):
        if minutes > length:
            raise CourseError(
                f"{where}: the session of {length} until {session.until!r} takes {minutes:.0f} minutes"
            )


def plan(teaching: Teaching, to_type: dict[str, dict[str, str]]) -> str:
    """Minutes and seconds of each section, and where sessions end, as a Markdown table.

    Args:
        teaching: the chapter's.
        to_type: by heading, the functions whose bodies are typed there, each with its body.
    """
    lengths = list(teaching.sessions)
    head = ["section", "minutes", "code runs", "to type", *(f"sessions of {length}" for length in lengths)]
    lines = ["| " + " | ".join(head) + " |", "|---|---:|---:|---|" + "---|" * len(lengths)]
    for heading, notes in teaching.notes.items():
        ends = {
            length: f"end of {number}, {minutes_of_sessions(teaching, length)[number - 1]:.0f} min"
            for length, number, _ in teaching.session_ends(heading)
        }
        names = ", ".join(f"`{name}`" for name in to_type[heading])
        row = [heading, f"{notes.minutes:g}", f"{notes.seconds:.0f} s", names]
        lines.append("| " + " | ".join([*row, *(ends.get(length, "") for length in lengths)]) + " |")
    total = sum(notes.minutes for notes in teaching.notes.values())
    running = sum(notes.seconds for notes in teaching.notes.values())
    lines.append(f"| **all** | **{total:g}** | **{running:.0f} s** | |" + " |" * len(lengths))
    return "\n".join(lines)


PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}: notes for teaching</title>
<style>
body {{ font: 11pt/1.4 Georgia, serif; max-width: 44em; margin: 2em auto; padding: 0 1em; }}
h1, h2 {{ font-family: system-ui, sans-serif; line-height: 1.2; }}
h2 {{ border-top: 1px solid #999; padding-top: .6em; margin-top: 1.4em; break-after: avoid; }}
table {{ border-collapse: collapse; font-size: 9.5pt; }}
th, td {{ text-align: left; padding: .15em .6em; border-bottom: 1px solid #ccc; }}
pre {{ font-size: 9pt; background: #f3f3f3; padding: .6em; white-space: pre-wrap; break-inside: avoid; }}
section {{ break-inside: avoid-page; }}
.anchor-link {{ display: none; }}
.end {{ border: 2px solid #333; padding: .4em .8em; margin: 1em 0; break-inside: avoid; }}
@media print {{ body {{ margin: 0; max-width: none; }} }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def notes_page(title: str, teaching: Teaching, to_type: dict[str, dict[str, str]]) -> str:
    """The notes of a chapter as a page to print.

    Args:
        title: the chapter's.
        teaching: its teaching text.
        to_type: by heading, the functions whose bodies are typed there, each with its body.
    """
    parts = [f"# {title}", "## The plan", plan(teaching, to_type)]
    body = [markdown2html("\n\n".join(parts))]
    for heading, notes in teaching.notes.items():
        lines = [
            f"## {heading}",
            f"*{notes.minutes:g} minutes; its code runs for {notes.seconds:.0f} s.*",
            notes.say,
        ]
        if notes.predict:
            lines.append(f"**Ask before the result:** {notes.predict.question}")
            lines.append(f"*{notes.predict.answer}*")
        lines += [f"`{name}`:\n\n```python\n{body}\n```" for name, body in to_type[heading].items()]
        lines.append(f"**Where people stumble.** {notes.stumble}")
        lines.append(f"**The question that always comes.** {notes.question}")
        lines.append(notes.answer)
        body.append(f"<section>{markdown2html(chr(10).join(f'{line}{chr(10)}' for line in lines))}</section>")
        for length, number, session in teaching.session_ends(heading):
            end = f"**Session {number} of {length} minutes ends here.** {session.seen} *{session.next}*"
            body.append(f'<div class="end">{markdown2html(end)}</div>')
    return PAGE.format(title=html.escape(title), body="\n".join(body))
