"""A student's feedback as a page of its own: points, what is wrong with each item, what the student wrote."""

from html import escape

from .assignments import Assignment
from .collect import Submission
from .gradebook import Entered, Entry
from .verdicts import Score

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; }
body { color: #222; } h1 { font-size: 1.5rem; }
h2 { font-size: 1.15rem; margin-top: 2.2rem; border-top: 1px solid #ccc; padding-top: 1rem; }
table { border-collapse: collapse; } td, th { padding: 0.15rem 1rem 0.15rem 0; text-align: left; }
td:nth-child(2) { text-align: right; white-space: nowrap; }
pre { background: #f5f5f5; padding: 0.7rem; overflow-x: auto; font-size: 0.85rem; }
p { margin: 0.4rem 0; } .full { color: #1a6630; } .none { color: #9c1c1c; } .open { color: #7a5b00; }
.comment { border-left: 4px solid #4a6fa5; padding-left: 0.8rem; white-space: pre-wrap; }
"""


def page(assignment: Assignment, submission: Submission, scores: list[Score], entry: Entry) -> str:
    """The page as HTML; whatever the student wrote is text in it."""
    points = [entry.items[score.item.exercise].points for score in scores]
    total = sum(found for found in points if found is not None)
    head = f"{escape(assignment.title)}: {total:g} of {assignment.points:g} points"
    open_points = sum(s.item.points for s, found in zip(scores, points, strict=True) if found is None)
    notes = [f"{open_points:g} more points are to be given by hand."] if open_points else []
    if entry.late_s > 0:
        notes.append(f"Handed in {entry.late_s / 3600:.1f} hours late.")
    notes += [f"{name}.ipynb: {why}." for name, why in submission.problems.items()]
    rows = []
    for notebook in assignment.notebooks:
        rows.append(f'<tr><th colspan="3">{escape(notebook)}</th></tr>\n')
        of_notebook = (score for score in scores if score.item.notebook == notebook)
        rows += [_row(score, entry.items[score.item.exercise]) for score in of_notebook]
    sections = [_section(score, entry.items[score.item.exercise]) for score in scores]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>{escape(assignment.title)}, {escape(submission.student)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{head}</h1>
<p>{escape(submission.student)}</p>
{"".join(f"<p>{escape(note)}</p>" for note in notes)}
<table>
{"".join(rows)}</table>
{"".join(sections)}</body>
</html>
"""


def _anchor(score: Score) -> str:
    return escape(score.item.exercise, quote=True)


def _points(score: Score, entered: Entered) -> tuple[str, str]:
    """The points in words, and the class that gives their colour."""
    most = score.item.points
    if entered.points is None:
        return f"open, of {most:g}", "open"
    kind = "full" if entered.points >= most else "none" if entered.points == 0 else "open"
    return f"{entered.points:g} of {most:g}", kind


def _sentence(line: str) -> str:
    return line[:1].upper() + line[1:]


def _row(score: Score, entered: Entered) -> str:
    words, kind = _points(score, entered)
    first = score.mistake or score.lines[0]
    remark = "" if kind == "full" else _sentence(first[:100])
    return (
        f'<tr><td><a href="#{_anchor(score)}">{escape(score.item.title)}</a></td>'
        f'<td class="{kind}">{words}</td><td>{escape(remark)}</td></tr>\n'
    )


def _section(score: Score, entered: Entered) -> str:
    words, kind = _points(score, entered)
    lines = "".join(f"<p>{escape(_sentence(line))}</p>\n" for line in score.lines)
    if entered.points not in (None, score.points):
        lines += "<p>These points were given by hand.</p>\n"
    comment = f'<p class="comment">{escape(entered.comment)}</p>\n' if entered.comment else ""
    code = f"<pre>{escape(score.cell[:20_000])}</pre>\n" if score.cell else ""
    name = f"<code>{escape(score.item.function)}</code>, " if score.item.function else ""
    return (
        f'<h2 id="{_anchor(score)}">{escape(score.item.title)}</h2>\n'
        f'<p>{name}<span class="{kind}">{words}</span></p>\n{lines}{comment}{code}'
    )
