"""The course's pictures and tables: one palette, one style, one way to show a grid of images."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lecture26.kit.validation import check_positive_int

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Distinguishable with any colour vision: Okabe and Ito, "Color Universal Design" (2008).
PALETTE = {
    "blue": "#0072B2",
    "vermilion": "#D55E00",
    "green": "#009E73",
    "purple": "#CC79A7",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "black": "#000000",
    "yellow": "#F0E442",
}


def use_style() -> None:
    """Draw all further figures of this session in the course's colours and sizes."""
    from matplotlib import cycler, rcParams

    rcParams.update(
        {
            "axes.prop_cycle": cycler(color=list(PALETTE.values())),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "image.cmap": "viridis",
            "legend.frameon": False,
            "figure.dpi": 72,  # keeps a stored figure near 35 kB
            "font.size": 12,
        }
    )


def show_grid(
    images: torch.Tensor,
    columns: int = 8,
    titles: Sequence[str] | None = None,
    row_titles: Sequence[str] | None = None,
    inches_per_image: float = 0.9,
) -> "Figure":
    """Show images side by side, each pixel as a sharp square.

    Args:
        images: (B, C, H, W) in [-1, 1], C = 1 (grey) or 3 (RGB); what lies outside is clipped.
        columns: images per row.
        titles: a line of text above each image (B), or above each image of the first row only (`columns`).
        row_titles: a line of text to the left of each row.
        inches_per_image: the width of an image in the figure.

    Returns:
        The figure; show it with `plt.show()` or `show(figure, alt)`.

    Raises:
        ValueError: a wrong shape, a value that is not a number, less than 1 column, or a wrong number of
            titles.
        TypeError: `columns` is not an int.
    """
    if images.ndim != 4 or images.shape[0] == 0 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be of shape (B, 1 or 3, H, W); got {tuple(images.shape)}")
    if images.isnan().any():
        raise ValueError("images must be numbers in [-1, 1]; got nan")
    check_positive_int("columns", columns)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    if titles is not None and len(titles) not in (len(images), columns):
        raise ValueError(f"titles must be {len(images)} or {columns} texts; got {len(titles)}")
    if row_titles is not None and len(row_titles) != rows:
        raise ValueError(f"row_titles must be {rows} texts; got {len(row_titles)}")

    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(
        rows,
        columns,
        squeeze=False,
        figsize=(columns * inches_per_image, rows * inches_per_image * images.shape[2] / images.shape[3]),
        layout="constrained",
    )
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0.02, hspace=0.02)
    pixels = ((images.detach().float().cpu().clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1)  # (B, H, W, C)
    for position, axes in enumerate(grid.flat):
        axes.set(xticks=[], yticks=[], frame_on=False)
        axes.grid(False)
        if position < len(pixels):
            axes.imshow(pixels[position].numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        if titles is not None and position < len(titles):
            axes.set_title(titles[position], fontsize="small")
        if row_titles is not None and position % columns == 0:
            axes.set_ylabel(row_titles[position // columns], rotation=0, ha="right", va="center")
    return figure


def show(figure: "Figure", alt: str) -> None:
    """Show a figure in a notebook together with `alt`, its description for readers who do not see it."""
    from IPython.display import display
    from matplotlib import pyplot as plt

    display(figure, metadata={"image/png": {"alt": alt}})
    plt.close(figure)


def show_table(rows: Sequence[Sequence[str | int]], columns: Sequence[str]) -> None:
    """Show rows under columns as a table in a notebook; cells may hold `$mathematics$` and links.

    A column in which every cell begins with a digit is set to the right. Cells are texts or whole numbers:
    round others yourself, to as many digits as are the same on every machine. Raises TypeError on other
    cells; ValueError if there is no row, one has another length, or a text has a line break or a `|` (in
    mathematics write \\mid).
    """
    from IPython.display import display

    table = markdown_table(rows, columns)
    display({"text/markdown": table, "text/plain": table}, raw=True)


def markdown_table(rows: Sequence[Sequence[str | int]], columns: Sequence[str]) -> str:
    """The Markdown of rows under columns, as `show_table` shows it.

    Cells are as `show_table` says. Raises TypeError on other cells; ValueError if there is no row, one has
    another length, or a text has a line break or a `|`.
    """
    if not rows:
        raise ValueError("rows must be at least one; got none")
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"each row must have {len(columns)} cells, like columns; got {row!r}")
    texts = [[_cell_text(cell) for cell in row] for row in (columns, *rows)]
    begins_with_digit = re.compile(r"[+\-\u2212]?\d").match
    rules = [
        "---:" if all(map(begins_with_digit, column)) else ":---" for column in zip(*texts[1:], strict=True)
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in (texts[0], rules, *texts[1:]))


def _cell_text(cell: str | int) -> str:
    if isinstance(cell, bool) or not isinstance(cell, str | int):
        raise TypeError(f'a cell must be a text or a whole number, such as f"{{x:.2f}}"; got {cell!r}')
    if re.search(r"[|\n]", str(cell)):
        raise ValueError(f"a cell must have no | and no line break; got {cell!r}")
    return str(cell)
