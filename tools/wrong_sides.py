"""Do the proofs have teeth? For each proved equation a plausible mistake, which its proof must notice.

tests/wrong_sides.toml holds, under the equation's number, a `mistake` in words and a `trial`: code in the
notebook's own names that calls `verify` with a wrong side. A rehearsal runs it right after the cell that
proves the equation, so that no notebook has to run a second time.
"""

import re
import textwrap
import tomllib
from collections.abc import Iterable
from pathlib import Path

from course import ROOT, Cell, CourseError

TRIAL = """\
# the mistake: {mistake}
from unittest.mock import patch
try:
{code}
except AssertionError as error:
    assert "the sides differ" in str(error), error
else:
    raise AssertionError("the proof of ({number}) does not notice: {mistake}")
"""


def load_wrong_sides(root: Path = ROOT) -> dict[str, dict[str, str]]:
    """By the equation's number, a dict of "mistake" and "trial"; none where there is no table."""
    table = root / "tests" / "wrong_sides.toml"
    return tomllib.loads(table.read_text(encoding="utf-8")) if table.exists() else {}


def proved(cell: Cell) -> list[str]:
    """The numbers of the equations that a cell proves, in their order."""
    if cell.kind != "code":
        return []
    return list(dict.fromkeys(re.findall(r'\bverify\(\s*"([^"]+)"', cell.source)))


def trials(cells: Iterable[Cell], wrong_sides: dict[str, dict[str, str]]) -> dict[int, list[str]]:
    """The code of all trials, by the number of the cell that they come after: the last that proves it.

    Raises:
        CourseError: if a trial does not call `verify` for its equation.
    """
    last = {number: cell.number for cell in cells for number in proved(cell)}
    found: dict[int, list[str]] = {}
    for number, place in last.items():
        if number in wrong_sides:
            entry = wrong_sides[number]
            if f'verify("{number}"' not in entry["trial"]:
                raise CourseError(f"tests/wrong_sides.toml: the trial of ({number}) does not call verify")
            code = textwrap.indent(entry["trial"].strip(), "    ")
            found.setdefault(place, []).append(
                TRIAL.format(mistake=entry["mistake"], code=code, number=number)
            )
    return found
