"""The small tools of the kit: verify, argument checks, paths, show_grid, show_table."""

import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from lecture26.kit import figures, paths, progress
from lecture26.kit.proof import verify
from lecture26.kit.validation import check_choice, check_positive_int, check_shape

matplotlib.use("agg")


# verify


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (torch.ones(2, 3), torch.ones(2, 3).double()),
        (np.array([1.0, 2.0]), torch.tensor([1.0, 2.0])),
        (torch.tensor(0.5, requires_grad=True), 0.5),
        (torch.tensor(3.0) + 1e-7, 3),
        ([1.0, 2.0], [1.0, 2.0]),
    ],
)
def test_verify_prints_one_line(capsys, actual, expected):
    verify("1.5", actual, expected, atol=1e-6)
    assert capsys.readouterr().out == "(1.5) holds: both sides agree to 1e-06\n"


@pytest.mark.parametrize(
    ("actual", "expected", "message"),
    [
        (torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.1]), r"\(2.13\) fails: the sides differ by 0.1"),
        (torch.ones(3), 1.0, r"shapes \(3,\) and \(\)"),
        (torch.ones(3, 1), torch.ones(3), r"shapes \(3, 1\) and \(3,\)"),
        (torch.tensor(float("nan")), torch.tensor(float("nan")), "not finite"),
        (torch.tensor(float("inf")), torch.tensor(float("inf")), "not finite"),
        (torch.ones(0), torch.ones(0), "nothing was compared"),
    ],
)
def test_verify_fails(capsys, actual, expected, message):
    with pytest.raises(AssertionError, match=message):
        verify("2.13", actual, expected, atol=1e-3)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("equation", ["1", "1.", "eq 1.2", 1])
def test_verify_wants_an_equation_number(equation):
    with pytest.raises(ValueError, match="equation must be a number like"):
        verify(equation, 0.0, 0.0, atol=0.1)


@pytest.mark.parametrize("atol", [-1.0, float("nan")])
def test_verify_wants_a_tolerance(atol):
    with pytest.raises(ValueError, match="atol must be at least 0"):
        verify("1.5", 0.0, 0.0, atol=atol)


# Argument checks


def test_check_choice():
    check_choice("split", "train", ("train", "test"))
    with pytest.raises(ValueError, match="split must be one of 'train', 'test'; got 'foo'"):
        check_choice("split", "foo", ("train", "test"))


@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (1.0, TypeError), (True, TypeError), ("3", TypeError)]
)
def test_check_positive_int(value, error):
    check_positive_int("num_steps", 1)
    with pytest.raises(error, match=f"num_steps must be .*; got {value!r}"):
        check_positive_int("num_steps", value)


@pytest.mark.parametrize(
    "value, of, message",
    [
        (torch.zeros(2, 3), "x", r"^noise must have the shape of x, \(2, 4\); got \(2, 3\)$"),
        (torch.zeros(8), "", r"^noise must have the shape \(2, 4\); got \(8,\)$"),
        (torch.tensor(1.0), "x", r"got \(\)$"),
        (5, "x", r"got 5$"),
        (None, "", r"got None$"),
    ],
)
def test_check_shape(value, of, message):
    check_shape("noise", torch.zeros(2, 4), (2, 4), of)
    check_shape("noise", torch.zeros(2, 4), torch.zeros(2, 4).shape, of)
    with pytest.raises(ValueError, match=message):
        check_shape("noise", value, (2, 4), of)


# Paths


def test_data_folder_lies_beside_the_package(monkeypatch):
    monkeypatch.delenv("LECTURE26_DATA", raising=False)
    assert paths.data_dir() == Path(paths.__file__).parents[2] / "data"


def test_data_folder_can_be_moved(monkeypatch, tmp_path):
    monkeypatch.setenv("LECTURE26_DATA", str(tmp_path))
    folders = [paths.checkpoints_dir(), paths.results_dir(), paths.downloads_dir()]
    assert folders == [tmp_path / name for name in ("checkpoints", "results", "downloads")]


# Figures


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def shown_arrays(figure):
    return [axes.images[0].get_array() for axes in figure.axes if axes.images]


@pytest.mark.parametrize("num_channels", [1, 3])
def test_show_grid_shows_each_image(num_channels):
    images = torch.rand(5, num_channels, 4, 6) * 2 - 1
    figure = figures.show_grid(images, columns=3, titles=list("abcde"), row_titles=["first", "second"])
    arrays = shown_arrays(figure)
    assert len(arrays) == 5 and len(figure.axes) == 6
    for array, image in zip(arrays, images, strict=True):
        expected = ((image + 1) / 2).permute(1, 2, 0).numpy()
        np.testing.assert_allclose(np.asarray(array).reshape(expected.shape), expected, atol=1e-6)
    assert [axes.get_title() for axes in figure.axes] == [*"abcde", ""]
    assert [figure.axes[i].get_ylabel() for i in (0, 3)] == ["first", "second"]
    assert figure.get_size_inches()[0] == pytest.approx(3 * 0.9)


def test_show_grid_clips_and_detaches():
    images = torch.tensor([[[[-3.0, 3.0]]]], requires_grad=True)
    (array,) = shown_arrays(figures.show_grid(images))
    assert np.asarray(array).ravel().tolist() == [0.0, 1.0]


def test_titles_of_the_first_row():
    figure = figures.show_grid(torch.zeros(4, 1, 2, 2), columns=2, titles=["left", "right"])
    assert [axes.get_title() for axes in figure.axes] == ["left", "right", "", ""]


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (torch.zeros(3, 8, 8), {}, r"images must be of shape .*got \(3, 8, 8\)"),
        (torch.zeros(1, 2, 8, 8), {}, "images must be of shape"),
        (torch.zeros(0, 3, 8, 8), {}, "images must be of shape"),
        (torch.full((1, 1, 2, 2), float("nan")), {}, "got nan"),
        (torch.zeros(2, 1, 2, 2), {"columns": 0}, "columns must be at least 1; got 0"),
        (torch.zeros(4, 1, 2, 2), {"titles": ["one"]}, "titles must be 4 or 4 texts; got 1"),
        (torch.zeros(4, 1, 2, 2), {"columns": 2, "row_titles": ["one"]}, "row_titles must be 2 texts; got 1"),
    ],
)
def test_show_grid_refuses(images, options, message):
    with pytest.raises(ValueError, match=message):
        figures.show_grid(images, **options)


def test_palette_can_be_told_apart():
    rgb = torch.tensor([matplotlib.colors.to_rgb(colour) for colour in figures.PALETTE.values()])
    assert len(rgb) == 8 and torch.pdist(rgb).min() > 0.25


def test_style_uses_the_palette():
    with matplotlib.rc_context():
        figures.use_style()
        cycle = matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]
        assert cycle == list(figures.PALETTE.values())
        assert matplotlib.rcParams["figure.dpi"] == 72


def test_show_passes_the_description_on(monkeypatch):
    import IPython.display

    shown = []
    monkeypatch.setattr(IPython.display, "display", lambda figure, metadata: shown.append((figure, metadata)))
    figure = figures.show_grid(torch.zeros(1, 1, 2, 2))
    figures.show(figure, "a black square")
    assert shown == [(figure, {"image/png": {"alt": "a black square"}})]
    assert not plt.get_fignums()


# Tables


@pytest.fixture
def table_of(monkeypatch):
    """Calls show_table, and returns the Markdown that it displays."""
    import IPython.display

    def table_of(rows, columns):
        shown = []
        monkeypatch.setattr(IPython.display, "display", lambda bundle, raw: shown.append((bundle, raw)))
        figures.show_table(rows, columns)
        ((bundle, raw),) = shown
        assert raw and bundle == dict.fromkeys(("text/markdown", "text/plain"), bundle["text/plain"])
        return bundle["text/markdown"]

    return table_of


def test_table_sets_columns_of_numbers_to_the_right(table_of):
    rows = [["DDPM", 50, "-1.25", "0.30 to 0.35", "5"], ["DDIM", 1000, "+3", "0.2", "none"]]
    assert table_of(rows, ["$x_t$", "steps", "gain", "range", "best"]).splitlines() == [
        "| $x_t$ | steps | gain | range | best |",
        "| :--- | ---: | ---: | ---: | :--- |",
        "| DDPM | 50 | -1.25 | 0.30 to 0.35 | 5 |",
        "| DDIM | 1000 | +3 | 0.2 | none |",
    ]


def test_table_is_read_by_a_markdown_parser(table_of):
    from markdown_it import MarkdownIt

    html = MarkdownIt().enable("table").render(table_of([["a", 1], ["", 2]], ["name", "count"]))
    assert html.count("<tr>") == 3 and html.count("<th ") == 2 and html.count("<td ") == 4
    assert '<td style="text-align:right">2</td>' in html


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([], ValueError, "rows must be at least one"),
        ([["a", "b"], ["a"]], ValueError, r"each row must have 2 cells, like columns; got \['a'\]"),
        ([["p(x|y)", "b"]], ValueError, r"no \| and no line break; got 'p\(x\|y\)'"),
        ([["two\nlines", "b"]], ValueError, "no line break"),
        ([["a", 0.1]], TypeError, "a text or a whole number.*got 0.1"),
        ([["a", True]], TypeError, "got True"),
        ([["a", torch.tensor(1)]], TypeError, "got tensor"),
    ],
)
def test_show_table_refuses(rows, error, message):
    with pytest.raises(error, match=message):
        figures.show_table(rows, ["first", "second"])


# Progress


def test_bars_are_drawn_on_stderr_but_in_a_notebook(monkeypatch):
    """JupyterLab shows stderr in red, and a bar that is gone leaves an empty red field."""
    import IPython

    assert progress.bar_stream() is sys.stderr
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel=None))
    assert progress.bar_stream() is sys.stdout
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace())  # IPython in a terminal
    assert progress.bar_stream() is sys.stderr
