"""The ledger of claims: numbers come out of stored results, verdicts stand on them, tables are the same."""

import pytest

from lecture26.kit import claims as kit
from lecture26.kit.claims import (
    CARD,
    COLUMNS,
    NOTHING_MEASURED,
    Claim,
    Measurement,
    Verdict,
    count_verdicts,
    exceeds,
    is_above,
    share_error,
)
from lecture26.kit.paths import names_in
from lecture26.studies import claims
from lecture26.studies.claims import CLAIMS

STORED = {"found": {"right": 90, "asked": 100}}


def claim(verdict=Verdict.HOLDS, least=0.5, sentence="{share:.0%} of {asked}"):
    measurement = Measurement(
        ("found",),
        lambda found: {"share": found["right"] / found["asked"], "asked": found["asked"]},
        sentence,
        lambda numbers: numbers["share"] > least,
    )
    return Claim("topic", "It works", "section 1", verdict, "Why.", measurement)


@pytest.fixture
def stored(monkeypatch):
    monkeypatch.setattr(kit, "load_results", STORED.__getitem__)


def test_a_sentence_takes_its_numbers_from_what_is_stored(stored):
    assert claim().row() == ["It works", "section 1", "90% of 100", "holds", "Why."]
    assert len(claim().row()) == len(COLUMNS)


def test_a_verdict_that_no_longer_stands_is_an_error_that_says_what_was_measured(stored):
    with pytest.raises(
        ValueError, match=r"'holds' on 'It works' no longer stands: 90% of 100 \(from found\)"
    ):
        claim(least=0.95).measured()


def test_a_number_cannot_be_typed():
    with pytest.raises(ValueError, match="no number but those that are read"):
        claim(sentence="{share:.0%} of 100")


def test_where_nothing_was_measured_the_row_says_so():
    assert Claim("topic", "It works", "", Verdict.WRONG, "Why.").measured() == NOTHING_MEASURED


def test_what_is_shown_without_a_measurement_says_where(stored):
    told = Claim("topic", "It works", "", Verdict.WRONG, "Why.", shown="chapter 01, (1.1)")
    assert told.measured() == "nothing was measured; shown in chapter 01, (1.1)"
    with pytest.raises(ValueError, match=r"shown is for what has no measurement; got 'chapter 01'"):
        Claim("topic", "", "", Verdict.HOLDS, "", claim().measurement, "chapter 01")


def test_a_card_is_a_source(monkeypatch):
    monkeypatch.setattr(kit, "load_card", {"model": {"seconds": 60}}.__getitem__)
    told = Measurement((CARD + "model",), lambda card: card, "{seconds}", lambda numbers: True)
    assert Claim("topic", "", "", Verdict.HOLDS, "", told).measured() == "60"


def test_two_standard_errors_decide():
    # 2 * hypot(3, 4) = 10
    assert exceeds(10.1, 3, 4) and not exceeds(9.9, 3, 4)
    assert share_error(0.5, 100) == pytest.approx(0.05)
    # 0.1 apart, with a standard error of 0.0707 for the difference of two shares near a half
    assert not is_above(0.6, 0.5, 100)
    assert is_above(0.6, 0.5, 400)
    assert not is_above(0.5, 0.6, 400)


@pytest.mark.parametrize("of_lecture", CLAIMS, ids=lambda of_lecture: of_lecture.slide)
def test_every_verdict_stands_on_what_is_stored(of_lecture):
    assert of_lecture.measured()
    assert of_lecture.why.endswith(".") and of_lecture.papers
    assert not any("|" in cell for cell in of_lecture.row())


# Numbers that would turn a verdict over, one set for each of its reasons.
TURNED = {
    "A larger gradient scale s enforces the class more strongly": [
        {"high": 0.45},
        {"high_distance": 45.0},
        {"large": 0.5},
    ],
    "CLIP guidance works like classifier guidance": [{"gap": 0.15}, {"most": 0.6}],
    "A guiding classifier has to be trained separately": [
        {"clean": 0.97},
        {"clean": 0.6},
        {"through": 0.02},
    ],
    "Classifier-free guidance needs no classifier and simplifies the workflow": [
        {"one": 2.5},
        {"free_least": 1.4},
    ],
    "w controls how strongly the condition acts": [{"some": 0.6}, {"most": 1.0}],
    "Its weight needs careful tuning": [{"twice": 40.0}, {"kept": 30.0}],
    "It costs about four times less than diffusion of pixels": [{"plain": 2.9}, {"same": 1.6}],
    "It saves 75 % of the training costs": [
        {"distance": 0.5},
        {"finer": -0.1},
        {"legible": -0.1},
        {"finer": 0.7, "legible": 0.7},
    ],
    "What is stored for a task is 0.1 % of the parameters": [
        {"shallow": 0.01},
        {"short": 0.01},
        {"long": 0.001},
    ],
    "Many tasks need 100 to 1000 times less storage": [
        {"shallow": 900.0},
        {"short": 90.0},
        {"long": 110.0},
        {"bank": 10.5},
    ],
    "It prevents catastrophic forgetting": [{"moved": 0.001}, {"prompted": 0.78}, {"full": 0.78}],
    "It outperforms linear probing": [
        {"behind": 1},
        {"ahead": 3},
        {"solved_ahead": 5},
        {"quarters_ahead": 3},
    ],
    "It matches full fine-tuning on many tasks": [{"ahead": 1}, {"behind": 3}],
    "Prompts at every block adapt more deeply than at the first": [{"behind": 1}, {"ahead": 0}, {"ahead": 5}],
    "It works consistently for ViT-Base, Large and Huge": [{"kept": 4}],
}


def test_every_verdict_could_come_out_otherwise():
    measured = {one.slide: one.measurement for one in CLAIMS if one.measurement}
    assert set(TURNED) == set(measured)
    for slide, changes in TURNED.items():
        numbers = measured[slide].numbers()
        for change in changes:
            assert change.keys() <= numbers.keys(), slide
            assert not measured[slide].stands(numbers | change), (slide, change)


def test_sources_are_stored_results_or_cards():
    names = {source for one in CLAIMS if one.measurement for source in one.measurement.sources}
    results = {name for name in names if not name.startswith(CARD)}
    assert results <= names_in("results", ".json")
    assert {name.removeprefix(CARD) for name in names - results} <= names_in("checkpoints", ".json")


def test_statements_differ_and_verdicts_are_counted():
    assert len({one.slide for one in CLAIMS}) == len(CLAIMS)
    assert sum(count_verdicts(CLAIMS).values()) == len(CLAIMS)


def test_differences_have_the_seeds_and_the_counting_in_their_error():
    run = {"accuracy": [0.5, 0.5, 0.5], "tested": 100, "task": "./a", "method": "full"}
    other = {"accuracy": [0.4, 0.3, 0.2], "tested": 100, "task": "./a", "method": "linear"}
    value, error = claims.difference(run, other)
    # sqrt(0.05^2 + 0.0458^2 + 0.0577^2): counting, counting, seeds (0.1 / sqrt(3))
    assert value == pytest.approx(0.2) and error == pytest.approx(0.0891, abs=1e-4)
    assert claims.differences([{"runs": [run, other]}], "full", "linear") == [("a", value, error)]


def test_one_run_is_chosen():
    runs = [{"a": 1, "b": 1}, {"a": 1, "b": 2}]
    assert claims.chosen(runs, a=1, b=2) is runs[1]
    with pytest.raises(ValueError, match=r"runs must hold one with \{'a': 1\}; got 2"):
        claims.chosen(runs, a=1)
