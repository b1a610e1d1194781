"""What the web site is made of, as far as it takes no Sphinx: links, downloads, publishing."""

import os
import shutil
import subprocess

import nbformat
import pytest
import yaml

import make_site
from course import ROOT, CourseError, notebook_sources
from website import pages
from website.sources import chapter_page, cloud_copy, with_site_links

REPOSITORY = "https://github.com/NAME/course"


def test_links_lead_to_pages_or_to_the_repository_or_are_text():
    text = (
        "[tool](../tools/npm.py), [page](students.md), [words](../README.md#words), [chapters](../notebooks)"
    )
    rest = ", [page](students.md), [words](../README.md#words), [chapters](../notebooks/index.md)"
    assert with_site_links(text, "docs/instructors.md", None) == "tool" + rest
    assert (
        with_site_links(text, "docs/instructors.md", REPOSITORY)
        == f"[tool]({REPOSITORY}/blob/HEAD/tools/npm.py){rest}"
    )


def test_a_picture_that_leads_to_the_site_leads_nowhere_on_it():
    text = "[![A red\nstar](docs/star.png)][site], [the site][site]\n\n[site]: web/site/publish.md\n"
    expected = "![A red star](docs/star.png), [the site][site]\n\n[site]: publish.md\n"
    assert with_site_links(text, "README.md", None) == expected


def test_a_chapter_s_page_has_its_links_and_no_open_answer():
    (source,) = notebook_sources(ROOT, ["05_classifier_free_guidance"])
    page = chapter_page(source, None)
    head = page.notebook.cells[0].source
    assert head.startswith(f"# {page.title}\n\n<ul")
    for target in (
        f"../downloads/{source.stem}.ipynb",
        "../publish.html#open-in-the-cloud",
        f"../slides/{source.stem}.html",
    ):
        assert f'href="{target}"' in head
    code = [cell.source for cell in page.notebook.cells if cell.cell_type == "code"]
    assert not any("BEGIN SOLUTION" in text for text in code)
    assert "<class-playground>" in page.notebook.cells[1].source
    assert len(page.figures) >= 10 and all(
        figure.description and figure.section for figure in page.figures[1:]
    )


def test_what_a_chapter_has_is_counted_and_its_proofs_are_known():
    (source,) = notebook_sources(ROOT, ["01_ddpm"])
    page = chapter_page(source, None)
    assert "1.4" in page.equations and "\\tag" not in page.equations["1.4"]
    assert page.proved and page.proved < set(page.equations)
    text = source.read_text(encoding="utf-8")
    assert page.num_exercises == text.count("\n# #### Exercise ") > 5
    assert pages.contents(page).startswith(
        f"{len(page.equations)} equations · {page.num_exercises} exercises"
    )
    listed = pages.equations_page([page])
    for number in page.equations:
        assert f"[({number}){' ✓' * (number in page.proved)}]{{.number}}" in listed


def test_modules_are_listed_with_what_they_are(tmp_path):
    pages.write_api_pages(ROOT, tmp_path)
    index = (tmp_path / "index.md").read_text(encoding="utf-8")
    assert (
        "[`lecture26.ddpm`](lecture26.ddpm.md)\n: DDPM: denoising diffusion probabilistic models.\n" in index
    )
    assert "\nkit.figures <lecture26.kit.figures>\n" in index


def test_the_cloud_is_linked_where_the_repository_is_known():
    (source,) = notebook_sources(ROOT, ["01_ddpm"])
    assert make_site.cloud_address("https://example.org/course", source.stem) is None
    address = make_site.cloud_address(REPOSITORY, source.stem)
    colab = "https://colab.research.google.com/github/NAME/course"
    assert address == f"{colab}/blob/site/downloads/cloud/01_ddpm.ipynb"
    assert f'<a href="{address}">Open in the cloud' in chapter_page(source, address).notebook.cells[0].source
    copy = cloud_copy(source, REPOSITORY)
    nbformat.validate(copy)
    assert f"!git clone --quiet --depth 1 {REPOSITORY} lecture26" in copy.cells[0].source
    assert copy.cells[1].source.startswith("# 01")


def test_chapters_are_described_as_in_the_readme():
    described = pages.descriptions((ROOT / "README.md").read_text(encoding="utf-8"))
    assert sorted(described) == [source.stem[:2] for source in notebook_sources(ROOT)]
    with pytest.raises(CourseError, match="no row"):
        pages.descriptions("# No table\n")


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch, tmp_path):
    monkeypatch.setattr(make_site, "NEEDED", ("no_such_package",))
    with pytest.raises(CourseError, match=r"no_such_package is not installed: .*\.\[site\]"):
        make_site.build(folder=tmp_path / "site")


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_workflow_publishes_the_folder(tmp_path):
    """Its last step, run on a folder and an empty repository, puts the folder on the branch."""
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "site.yml").read_text())
    steps = workflow["jobs"]["publish"]["steps"]
    assert any(step.get("run", "").startswith("make site") for step in steps)
    (tmp_path / "site" / "_static").mkdir(parents=True)
    (tmp_path / "site" / "_static" / "a.js").write_text("1")
    remote = tmp_path / "remote.git"
    subprocess.run(["git", "init", "--quiet", "--bare", remote], check=True)
    environment = os.environ | {"REMOTE": str(remote), "GITHUB_SHA": "abc"}
    subprocess.run(["bash", "-euc", steps[-1]["run"]], cwd=tmp_path, env=environment, check=True)
    listed = subprocess.run(
        ["git", "-C", remote, "ls-tree", "-r", "--name-only", make_site.BRANCH],
        check=True,
        capture_output=True,
        text=True,
    )
    assert listed.stdout.split() == ["_static/a.js"]
