"""The playground reads the course's captions as the course means them, and offers each of their words."""

import pytest
from browser_code import run_in_node

from lecture26.kit.data import load
from lecture26.kit.readers import CANONICAL_RELATIONS, canonical
from lecture26.kit.shapes import LOSABLE_PARTS, RELATIONS, leave_out

COUNT = 60
SHORTER = [(), *[(part,) for part in LOSABLE_PARTS], LOSABLE_PARTS]
ODD = ["", "a", "a red dog", "red star", "a red star on a", "a star to the left of", "a big red star"]


def cases():
    """Captions of both kinds, whole and shortened, each with what its picture must be read to show."""
    found = []
    for name in ("shapes", "scenes"):
        data = load(name, "test", 64)
        told = data.attributes(range(COUNT))
        meant = canonical(told)
        for n, caption in enumerate(data.captions(range(COUNT))):
            wanted = {label: classes[n].item() for label, classes in meant.items()}
            is_turned = "relation" in told and RELATIONS[told["relation"][n]] not in CANONICAL_RELATIONS
            for lost in SHORTER:
                missing = {label_of(part, name, is_turned) for part in lost}
                kept = {label: number for label, number in wanted.items() if label not in missing}
                found.append((leave_out(caption, lost), name, kept))
    return found


def label_of(part, name, is_turned):
    """The label of a part of a caption; a scene is read from the object on the left, or above."""
    if part == "background":
        return part
    if name == "shapes":
        return part.removesuffix("_1")
    what, side = part.split("_")
    return f"{what}_{3 - int(side) if is_turned else side}"


@pytest.fixture(scope="module")
def answers():
    return run_in_node("captions.mjs", [caption for caption, *_ in cases()] + ODD)


def test_captions_are_read_as_they_are_meant(answers):
    for (caption, reads, wanted), answer in zip(cases(), answers, strict=False):
        assert answer["read"] == {"reads": reads, "wanted": wanted}, caption


def test_every_word_of_a_caption_is_offered_and_none_behind_a_whole_one(answers):
    for (caption, *_), answer in zip(cases(), answers, strict=False):
        *before, last = answer["offered"]
        for word, offered in zip(caption.split(), before, strict=True):
            assert word in offered, (caption, word)
        assert not caption.endswith("background") or last == [], caption


def test_other_sentences_are_not_read(answers):
    assert [answer["read"] for answer in answers[-len(ODD) :]] == [None] * len(ODD)
