"""A ledger of claims: what was said, what papers say, what stored results say, and a verdict that can fall.

A measurement is never typed: its sentence is a template whose numbers all come out of stored results, read by
their names, and each verdict stands on a condition of these numbers. A later measurement that turns it over
is an error that names the claim, and not a sentence that has quietly become wrong.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from string import Formatter

from lecture26.kit.checkpoints import load_card
from lecture26.kit.results import load_results

CARD = "card of "  # what the name of a checkpoint's card begins with, where sources are named
NOTHING_MEASURED = "nothing was measured"
COLUMNS = ("the lecture says", "papers", "measured here", "verdict", "why")


class Verdict(StrEnum):
    """What is left of a claim."""

    HOLDS = "holds"
    HERE_ONLY = "holds here only"  # under the conditions that the row names, and not beyond them
    NOT_SUPPORTED = "not supported"  # no source was found, and nothing measured here speaks for it
    WRONG = "wrong"


@dataclass(frozen=True)
class Measurement:
    """What stored results say about a claim.

    Attributes:
        sources: names of stored results, or `CARD` and the name of a checkpoint.
        read: called with their contents, in this order; returns the numbers, by name.
        sentence: with a place such as {accuracy:.0%} for each number, and no digit outside of these.
        stands: whether these numbers bear the verdict out.
    """

    sources: tuple[str, ...]
    read: Callable[..., Mapping[str, float | str]]
    sentence: str
    stands: Callable[[Mapping], bool]

    def __post_init__(self) -> None:
        typed = "".join(text for text, *_ in Formatter().parse(self.sentence))
        if any(letter.isdigit() for letter in typed):
            raise ValueError(f"sentence must have no number but those that are read; got {self.sentence!r}")

    def numbers(self) -> Mapping[str, float | str]:
        """The numbers, out of the results as they are stored now."""
        return self.read(*map(_content, self.sources))


@dataclass(frozen=True)
class Claim:
    """One statement of the lecture.

    Attributes:
        topic: which part of the lecture it belongs to.
        slide: what it says, in our words.
        papers: what papers say of it, with table or section.
        verdict: what is left of it.
        why: one sentence.
        measurement: what stored results say; None where nothing was measured.
        shown: where the course shows it without one, by a proof or a cell that runs; "" for nowhere.
    """

    topic: str
    slide: str
    papers: str
    verdict: Verdict
    why: str
    measurement: Measurement | None = None
    shown: str = ""

    def __post_init__(self) -> None:
        if self.measurement is not None and self.shown:
            raise ValueError(f"shown is for what has no measurement; got {self.shown!r} besides one")

    def measured(self) -> str:
        """What was measured, as a sentence with the numbers that are stored now; or where it is shown.

        Raises:
            ValueError: if these numbers no longer bear the verdict out, or a result is missing.
        """
        if self.measurement is None:
            return f"{NOTHING_MEASURED}; shown in {self.shown}" if self.shown else NOTHING_MEASURED
        numbers = self.measurement.numbers()
        sentence = self.measurement.sentence.format(**numbers)
        if not self.measurement.stands(numbers):
            raise ValueError(
                f"the verdict {self.verdict.value!r} on {self.slide!r} no longer stands: {sentence} "
                f"(from {', '.join(self.measurement.sources)}). Judge it anew in lecture26/studies/claims.py"
            )
        return sentence

    def row(self) -> list[str]:
        """The claim as a row under `COLUMNS`."""
        return [self.slide, self.papers, self.measured(), self.verdict.value, self.why]


def count_verdicts(claims: Sequence[Claim]) -> dict[Verdict, int]:
    """How many claims have each of the verdicts."""
    return {verdict: sum(claim.verdict == verdict for claim in claims) for verdict in Verdict}


def share_error(share: float, count: int) -> float:
    """The standard error of a share of `count` samples."""
    # sqrt(p (1 - p) / n)
    return math.sqrt(share * (1 - share) / count)


def is_above(share: float, other: float, count: int) -> bool:
    """Whether share lies above other by more than two standard errors, each being of count samples."""
    return exceeds(share - other, share_error(share, count), share_error(other, count))


def exceeds(difference: float, *errors: float) -> bool:
    """Whether a difference is above two standard errors; `errors` are those of what is subtracted."""
    return difference > 2 * math.hypot(*errors)


def _content(source: str) -> dict:
    return load_card(source.removeprefix(CARD)) if source.startswith(CARD) else load_results(source)
