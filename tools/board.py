"""What of a chapter's prose a class sees while it is taught: headings, equations, pictures, short lines.

What is longer is what the teacher says; it stays where it is, folded.
"""

import re
from collections.abc import Iterator

SHORT = 200  # characters of a paragraph that stays
FOLDED = "<details>\n<summary>in words</summary>\n\n{}\n\n</details>"
LINKS = re.compile(r"^\[(Previous|Next): ")


def board(source: str) -> str:
    """A Markdown cell for the class: long paragraphs folded, references and links to other chapters gone."""
    shown: list[str] = []
    hidden: list[str] = []

    def fold() -> None:
        if hidden:
            shown.append(FOLDED.format("\n\n".join(hidden)))
            hidden.clear()

    stays = False  # what an exercise asks for, right after its heading; and all of a summary
    for paragraph in paragraphs(source):
        if paragraph.startswith("## References"):
            break
        if LINKS.match(paragraph):
            continue
        if stays or is_shown(paragraph):
            fold()
            shown.append(paragraph)
        else:
            hidden.append(paragraph)
        stays = bool(re.match(r"#### (Exercise|Question)|## Summary", paragraph))
    fold()
    return "\n\n".join(shown)


def is_shown(paragraph: str) -> bool:
    """Whether a paragraph is for the board."""
    kinds = ("#", "$$", "|", "![", "```", "<details>", "**Exercise", "- ", "1. ")
    is_list = paragraph.startswith(("- ", "1. "))
    if is_list:
        return all(len(item) <= SHORT for item in re.split(r"\n(?=- |\d+\. )", paragraph))
    return paragraph.startswith(kinds) or is_caption(paragraph) or len(paragraph) <= SHORT


def is_folded(text: str) -> bool:
    """Whether nothing of a text is seen before it is unfolded."""
    return all(paragraph.startswith("<details>") for paragraph in paragraphs(text))


def is_caption(paragraph: str) -> bool:
    """Whether a paragraph is set in italics as a whole, as the captions of figures are."""
    return bool(re.fullmatch(r"\*[^*].*[^*]\*", paragraph, flags=re.DOTALL))


def paragraphs(source: str) -> Iterator[str]:
    """The paragraphs of a Markdown text; a block of code, and one of details, is one."""
    lines: list[str] = []
    closing = None
    for line in [*source.splitlines(), ""]:
        if closing is None and line.startswith(("```", "<details>")):
            closing = "```" if line.startswith("```") else "</details>"
        elif closing is not None and line.startswith(closing):
            closing = None
        if line or closing:
            lines.append(line)
        elif lines:
            yield "\n".join(lines)
            lines = []
