"""The exporter: how a module made from a notebook looks, and what each mistake in a notebook leads to."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import export
from course import ROOT, CourseError

SAMPLE = ROOT / "tests" / "sample_course"
HEADER = "# %% [markdown]\n# # 07 Title\n\n"


@pytest.fixture
def course(tmp_path):
    """Writes the text of notebooks/07_name.py into an empty course and returns the course's folder."""

    def write(*cells, tags='["export"]'):
        for folder in ("notebooks", "lecture26"):
            (tmp_path / folder).mkdir(exist_ok=True)
        shutil.copy(ROOT / "pyproject.toml", tmp_path)
        text = HEADER + "\n".join(f"# %% tags={tags}\n{cell}\n" for cell in cells)
        (tmp_path / "notebooks" / "07_name.py").write_text(text)
        return tmp_path

    return write


def exported(root):
    """The text below the docstring of the module made from notebooks/07_name.py."""
    text = export.export_notebook(root / "notebooks" / "07_name.py", root)
    return text.split('"""\n', maxsplit=1)[1].strip()


def test_sample_module_reads_as_if_written_by_hand():
    """tests/sample_course/lecture26/waves.py was read by a person; it says how each construct comes out."""
    source = SAMPLE / "notebooks" / "01_waves.py"
    assert export.export_notebook(source, SAMPLE) == (SAMPLE / "lecture26" / "waves.py").read_text()


def test_sample_module_behaves_like_the_notebook(monkeypatch):
    monkeypatch.syspath_prepend(SAMPLE / "lecture26")
    import waves

    assert waves.Wave(1.0, 0.5)([0.0]) == [1.0]
    assert str(waves.Wave(1.0, 0.5)) == "1.0 Hz\n  damped by 0.5 1/s"
    assert waves.Wave.__doc__ == "A damped wave, exp(-k t) cos(2 pi f t)."


def test_reopened_class_is_merged_in_order(course):
    root = course(
        "class A:\n    x = 1",
        "class B:\n    pass",
        "# above\nclass A(A):\n\n    # one\n    def one(self):\n        return 1\n\n    # end",
        "class A(A):\n    two = 2",
    )
    assert exported(root) == (
        "class A:\n    x = 1\n\n"
        "    # above\n    # one\n    def one(self):\n        return 1\n\n    # end\n\n"
        "    two = 2\n\n\n"
        "class B:\n    pass"
    )


def test_no_comment_is_lost(course):
    root = course(
        "# a\nx = 1  # b\n# c", "# d", "def f():\n    # e\n    return 1  # f\n    # g\n\n# h", "# i\n\n# j"
    )
    text = exported(root)
    positions = [text.index(f"# {letter}") for letter in "abcdefghij"]
    assert positions == sorted(positions)
    assert "    # g\n" in text


def test_text_in_strings_stays(course):
    root = course("class A:\n    pass", 'class A(A):\n    text = """\n one\n\n\n\n   two\n"""')
    assert '    text = """\n one\n\n\n\n   two\n"""' in exported(root)


def test_imports_are_hoisted_sorted_and_dropped_with_their_comment(course):
    root = course("x = 1", "import re\n# for pictures\nimport ast\nimport abc\n\ny = re, abc.ABC, x")
    assert exported(root) == "import abc\nimport re\n\nx = 1\n\ny = re, abc.ABC, x"


def test_spacing_of_simple_statements_is_kept(course):
    assert exported(course("x = 1\ny = 2\n\nz = 3")) == "x = 1\ny = 2\n\nz = 3"


def test_imports_from_other_chapters_stay(course):
    root = course("from lecture26.other import X\nimport torch\n\ny = X(torch)")
    assert exported(root) == "import torch\n\nfrom lecture26.other import X\n\ny = X(torch)"


def test_solution_markers_are_dropped(course):
    root = course("def f(x):\n    ### BEGIN SOLUTION\n    return x\n    ### END SOLUTION")
    assert exported(root) == "def f(x):\n    return x"


def test_headings_become_comments_once(course, tmp_path):
    root = course("x = 1")
    source = root / "notebooks" / "07_name.py"
    section = '\n# %% [markdown]\n# ## 7.1 The `score` $s_\\theta$\n\n# %% tags=["export"]\n'
    source.write_text(source.read_text() + section + 'y = 2\n\n# %% tags=["export"]\nz = 3\n')
    assert exported(root) == "x = 1\n\n\n# --- 7.1 The score s_\\theta ---\n\ny = 2\n\nz = 3"


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("# 07 · Waves", "Waves."),
        ("# Chapter 7: Waves", "Waves."),
        ("# 7. Waves.", "Waves."),
        ("# Waves in 2D", "Waves in 2D."),
        ("# 2D waves", "2D waves."),
    ],
)
def test_docstring_has_the_title_and_the_way_to_edit(course, title, expected):
    root = course("x = 1")
    source = root / "notebooks" / "07_name.py"
    source.write_text(source.read_text().replace("# 07 Title", title))
    lines = export.export_notebook(source, root).splitlines()
    assert lines[0] == f'"""{expected}'
    assert "notebooks/07_name.py" in lines[2] and "make package" in lines[2]


def test_docstring_of_a_chapter_with_a_long_name_keeps_to_the_line_length(course):
    root = course("x = 1")
    source = root / "notebooks" / f"07_{'very_' * 6}long_name.py"
    (root / "notebooks" / "07_name.py").rename(source)
    text = export.export_notebook(source, root)
    assert max(map(len, text.splitlines())) <= 110
    assert "edit there, then run `make package`." in " ".join(text.split())


def test_notebook_without_exported_cells_makes_no_module(course):
    root = course("x = 1", tags='["exercise"]')
    assert export.export(root) == []
    assert export.check(root) == []


MISTAKES = {
    "reopened, never opened": (
        ["x = 1", "class A(A):\n    pass"],
        8,
        "class A is reopened, but no exported cell",
    ),
    "reopened with another base": (
        ["class A:\n    pass", "class A(A, dict):\n    y = 1"],
        9,
        r"reopen a class by a bare `class A\(A\):`",
    ),
    "reopened with a decorator": (
        ["class A:\n    pass", "@print\nclass A(A):\n    y = 1"],
        10,
        "reopen a class by",
    ),
    "reopened with a docstring": (
        ["class A:\n    pass", 'class A(A):\n    """More."""\n    y = 1'],
        10,
        "its docstring goes where it is opened",
    ),
    "reopened on one line": (["class A:\n    pass", "class A(A): y = 1"], 9, "on lines of its own"),
    "magic": (["x = 1\n\n# %matplotlib inline"], 7, "'%matplotlib inline' is a magic"),
    "syntax": (["x = 1\ny = = 2"], 6, "not valid Python: invalid syntax"),
    "two statements": (["x = 1; y = 2"], 5, "a line of its own"),
    "undefined name": (
        ["x = 1", "def f():\n    return missing"],
        9,
        "Undefined name `missing`.*tag a cell `export`",
    ),
    "used before it is defined": (
        ["def f(x=late):\n    return x", "late = 1"],
        5,
        "defined only further down",
    ),
    "method twice": (
        ["class A:\n    def f(self):\n        pass", "class A(A):\n    def f(self):\n        pass"],
        11,
        "`f` from line .*defined twice",
    ),
    "function twice": (["def f():\n    pass", "def f():\n    pass"], 9, "defined twice"),
}


@pytest.mark.parametrize(("cells", "line", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_is_named_with_its_place(course, cells, line, message):
    root = course(*cells)
    with pytest.raises(CourseError, match=message) as caught:
        exported(root)
    assert re.match(rf"notebooks/07_name\.py:{line} \(cell \d\): ", str(caught.value))


def test_text_before_the_first_cell_is_refused(course):
    root = course("x = 1")
    source = root / "notebooks" / "07_name.py"
    source.write_text("import torch\n\n" + source.read_text())
    with pytest.raises(CourseError, match="text stands before the first cell"):
        exported(root)


def test_notebook_without_title_is_refused(course):
    root = course("x = 1")
    source = root / "notebooks" / "07_name.py"
    source.write_text(source.read_text().replace("# # 07 Title", "# no heading"))
    with pytest.raises(CourseError, match="no Markdown heading"):
        exported(root)


def test_export_writes_only_what_changed(course):
    root = course("x = 1")
    assert export.export(root) == [root / "lecture26" / "name.py"]
    assert export.export(root) == []
    assert export.export(course("x = 2"), ["name"]) == [root / "lecture26" / "name.py"]


def test_unknown_chapter_is_named(course):
    with pytest.raises(CourseError, match="no notebook is called nome; there are: 07_name"):
        export.export(course("x = 1"), ["nome"])


def test_check_finds_missing_stale_and_orphaned_modules(course):
    root = course("x = 1")
    module = root / "lecture26" / "name.py"
    assert export.check(root) == [
        "lecture26/name.py is missing; it is made from notebooks/07_name.py: run `make package`"
    ]
    assert not module.exists()
    export.export(root)
    assert export.check(root) == []
    module.write_text(module.read_text() + "y = 2\n")
    assert export.check(root) == ["lecture26/name.py differs from notebooks/07_name.py: run `make package`"]
    export.export(root)
    module.rename(root / "lecture26" / "old.py")
    assert "lecture26/old.py is generated, but no notebook makes it: remove it" in export.check(root)


@pytest.mark.slow
def test_command_line(course):
    root = course("x = 1")
    command = [sys.executable, Path(ROOT, "tools", "export.py"), "--root", root]
    check = subprocess.run([*command, "--check"], capture_output=True, text=True)
    assert check.returncode == 1 and "make package" in check.stderr
    assert "wrote lecture26/name.py" in subprocess.run(command, capture_output=True, text=True).stdout
    assert subprocess.run([*command, "--check"], capture_output=True).returncode == 0
    course("x = = 1")
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stderr.startswith(
        "notebooks/07_name.py:5 (cell 2): not valid Python"
    )
