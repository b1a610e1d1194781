"""README, chapters 00 and 09 and docs/results.md show what is stored; the gallery is drawn by commands."""

import json

import pytest
from PIL import Image

import results
from course import ROOT, CourseError, notebook_sources
from lecture26.kit.figures import markdown_table
from lecture26.studies.claims import CLAIMS
from results import COLUMNS, GALLERY, Drawing, filled, out_of_date, page, readme, told_of

TABLE = """Before.

| name | size | time |
|---|---|---|
| a | 1 MB |  |
| [b](x) | 2 MB | 3 s |

After, | with | bars."""


def test_everything_agrees_with_the_stored_results():
    assert out_of_date(ROOT) == [], "run `make results`"


def test_measured_cells_are_filled_and_the_others_stay():
    text = filled(TABLE, "name", lambda row, number: {2: f"{row[0]} {number}"})
    assert text == TABLE.replace("| 1 MB |  |", "| 1 MB | a 0 |").replace("| 3 s |", "| [b](x) 1 |")


def test_a_table_in_the_comments_of_a_notebook():
    source = "# %% [markdown]\n" + "\n".join(f"# {line}" for line in TABLE.splitlines())
    assert filled(source, "name", lambda row, number: {1: "9 MB"}).count("| 9 MB |") == 2


def test_a_table_that_is_not_there():
    with pytest.raises(CourseError, match="no table whose first column is 'chapter'"):
        filled(TABLE, "chapter", lambda row, number: {})


def changed(monkeypatch, name, change):
    """Let a stored result be another one."""
    load = results.load_results

    def changed_load(asked):
        stored = json.loads(json.dumps(load(asked)))
        if asked == name:
            change(stored)
        return stored

    monkeypatch.setattr(results, "load_results", changed_load)


def test_a_new_measurement_is_noticed_in_the_readme(monkeypatch):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme(text) == text
    changed(monkeypatch, "chapters", lambda stored: stored["chapters"]["01_ddpm"].update(seconds=12345.0))
    assert "| 12345 s |" in readme(text)
    assert any("README.md" in problem for problem in out_of_date(ROOT))
    assert any("00_start_here.py" in problem for problem in out_of_date(ROOT))


def test_a_new_measurement_is_noticed_on_the_page(monkeypatch):
    before = page()
    changed(
        monkeypatch, "benchmark_guidance", lambda stored: stored["guided_over_unguided"].pop("classifier")
    )
    assert page() != before


def test_what_the_readme_says_of_its_speed_is_what_was_measured():
    """Layer for layer some five per cent slower than diffusers' in float32, and faster else."""
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert "five per cent slower than diffusers' in float32, and faster in bfloat16" in text
    for setting in results.load_results("benchmark_unet")["settings"]:
        medians = [setting[step]["ratio"]["median"] for step in ("training_step", "sampling_step")]
        if setting["patch_size"] > 1:
            assert min(medians) > 2
        elif setting["dtype"] == "float32":
            assert 0.92 < min(medians) and max(medians) < 0.98
        else:
            assert min(medians) > 1


def test_a_chapter_that_was_never_measured(monkeypatch):
    changed(monkeypatch, "chapters", lambda stored: stored["chapters"].pop("02_unet"))
    with pytest.raises(CourseError, match="chapter 02 was never measured: run `make course"):
        readme((ROOT / "README.md").read_text(encoding="utf-8"))


def test_every_chapter_is_measured():
    stored = results.load_results("chapters")["chapters"]
    assert set(stored) == {source.stem for source in notebook_sources(ROOT)}


def test_a_model_of_an_unknown_family():
    with pytest.raises(CourseError, match="METRICS must say what is told of a 'poem', as ode is"):
        told_of({"recipe": "poem", "name": "ode", "metrics": {}})


@pytest.mark.parametrize("drawing", GALLERY, ids=lambda drawing: drawing.file)
def test_the_readme_shows_the_gallery_with_its_commands(drawing):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    one_line = " ".join(text.replace("\\\n", " ").split())
    assert f"{drawing.command} --out {drawing.file}" in one_line
    assert f"![{drawing.alt}](docs/{drawing.file})" in text


def test_a_picture_of_another_checkpoint_or_without_a_note_is_out_of_date(monkeypatch, tmp_path):
    (tmp_path / "docs").mkdir()
    drawing = Drawing("a.png", "sample --count 1", ("model",), "A picture")
    monkeypatch.setattr(results, "load_card", lambda name: {"sha256": "first"})

    def draw_white(words, check, cwd):
        assert words[-2:] == ["--out", str(tmp_path / "docs" / "a.png")]
        Image.new("RGB", (4, 4), "white").save(words[-1])

    monkeypatch.setattr(results.subprocess, "run", draw_white)
    assert not drawing.is_drawn(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "docs" / "a.png")
    assert not drawing.is_drawn(tmp_path)
    drawing.draw(tmp_path)
    assert drawing.is_drawn(tmp_path)
    monkeypatch.setattr(results, "load_card", lambda name: {"sha256": "second"})
    assert not drawing.is_drawn(tmp_path)


def tables_shown(name):
    """The tables in the stored outputs of a notebook."""
    (source,) = notebook_sources(ROOT, [name])
    notebook = json.loads(source.with_suffix(".ipynb").read_text(encoding="utf-8"))
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    return ["".join(output.get("data", {}).get("text/markdown", "")) for output in outputs]


@pytest.mark.parametrize("topic", sorted({claim.topic for claim in CLAIMS}))
def test_the_ledger_is_the_same_in_chapter_09_and_on_the_page(topic):
    ledger = markdown_table([claim.row() for claim in CLAIMS if claim.topic == topic], COLUMNS)
    assert ledger in tables_shown("09_the_slides_checked"), "run `make notebooks NAMES=09_the_slides_checked`"
    assert ledger in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
