"""What the README, the other Markdown files and the pictures say agrees with the repository."""

import json
import re
import tomllib

import pytest
from PIL import Image

import pictures
from course import ROOT, notebook_sources, read_cells
from lecture26.kit.paths import checkpoints_dir
from lecture26.kit.results import load_results

TEXTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "data/README.md")]
START_HERE = ROOT / "notebooks" / "00_start_here.py"
LARGEST_PICTURE = 150_000  # bytes


def table_rows(text, first_column):
    """The rows of the Markdown table whose first column has this heading, as lists of cells."""
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith(f"| {first_column} |"):
            next(lines)  # the rule below the heading
            break
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


@pytest.fixture(scope="module")
def readme():
    return (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def chapters(readme):
    return table_rows(readme, "chapter")


def test_chapter_00_has_the_same_table_of_chapters(chapters):
    prose = "\n\n".join(cell.source for cell in read_cells(START_HERE) if cell.kind == "markdown")
    assert table_rows(prose.replace("](0", "](notebooks/0"), "chapter") == chapters


def test_table_links_the_chapters_that_exist_and_calls_the_others_planned(chapters):
    linked = {}
    for title, *_, time, _ in chapters:
        found = re.fullmatch(r"\[(\d\d) .+\]\(notebooks/(.+)\.ipynb\)", title)
        assert (time == "planned") == (found is None), title
        if found:
            linked[found[1]] = found[2]
    assert linked == {source.stem[:2]: source.stem for source in notebook_sources(ROOT)}


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_pictures_show_the_chapters_and_the_checkpoint_that_exist(name):
    _, source = pictures.PICTURES[name]
    with Image.open(ROOT / "docs" / f"{name}.png") as picture:
        assert picture.text["drawn from"] == source(), f"run `python tools/pictures.py {name}`"


def test_table_of_checkpoints_is_that_of_their_cards(readme):
    listed = {name.strip("`"): size for name, _, size, *_ in table_rows(readme, "name")}
    cards = [json.loads(file.read_text()) for file in checkpoints_dir().glob("*.json")]
    assert listed == {card["name"]: f"{card['bytes'] / 1e6:.1f} MB" for card in cards}


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: str(text.relative_to(ROOT)))
def test_links_lead_to_files(text):
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", text.read_text(encoding="utf-8"))
    missing = [t for t in targets if "://" not in t and not (text.parent / t).exists()]
    assert missing == []


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: str(text.relative_to(ROOT)))
def test_commands_exist(text):
    words = text.read_text(encoding="utf-8")
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z]+)", words, flags=re.MULTILINE)) <= targets
    tools = re.findall(r"python (tools/\w+\.py)", words)
    assert [tool for tool in tools if not (ROOT / tool).exists()] == []


def test_python_versions_are_those_of_pyproject(readme):
    oldest, newest = re.search(r"Python 3\.(\d+) to 3\.(\d+)", readme).groups()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">=3.{oldest},<3.{int(newest) + 1}"


@pytest.mark.parametrize("picture", sorted((ROOT / "docs").glob("*.png")), ids=lambda picture: picture.name)
def test_pictures_are_small(picture):
    assert picture.stat().st_size < LARGEST_PICTURE


def spread(numbers, digits, factor=1):
    """Median and extremes of a benchmark as the README shows them."""
    median, least, most = (f"{factor * numbers[key]:.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} ({least} to {most})"


def test_benchmarks_are_those_that_are_stored(readme):
    settings = load_results("benchmark_unet")["settings"]
    expected = [
        [spread(setting[step]["ratio"], 2) for step in ("training_step", "sampling_step")]
        for setting in settings
    ]
    assert [row[1:] for row in table_rows(readme, "diffusers' time over ours")] == expected
    shares = load_results("benchmark_sampler")["share_of_the_network_time"]
    expected = [spread(shares[name], 2, 100) for name in ("ddpm", "ddim")]
    expected += [spread(rate, 0) for rate in load_results("benchmark_shapes")["images_per_second"].values()]
    imports = load_results("benchmark_import")
    expected += [spread(imports[name], 2) for name in imports if name.startswith("import ")]
    assert [row[1] for row in table_rows(readme, "what")] == expected
