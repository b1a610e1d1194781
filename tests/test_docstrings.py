"""Public docstrings are complete: what, every argument, what comes back, what is raised, and the source.

A docstring has one of two forms. The short one is prose that mentions every argument by name; what a class
says of an argument holds for its methods, too. The long one has headings, and then each that applies: 'Args:'
with an entry for every argument, 'Returns:' or 'Yields:' where a value comes back. In both, every exception
that the body raises is named, and in a chapter a function that computes an equation gives its 'Source:'.

A docstring does not outweigh the code: a function of few lines gets the short form. Exercises keep theirs in
full, since a learner writes from it.
"""

import ast
import io
import re
import tokenize
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from lecture26.checks import exercises

PACKAGE = Path(__file__).parents[1] / "lecture26"
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Source")
SHORT, LONG = 3, 8  # lines of code that want a short docstring, and the most lines that such a one has
RAISED_BY_CHECKS = {  # the argument checks of lecture26.kit.validation raise on their caller's behalf
    "check_choice": {"ValueError"},
    "check_int": {"TypeError"},
    "check_positive_int": {"TypeError", "ValueError"},
    "check_shape": {"ValueError"},
}


@dataclass(frozen=True)
class Public:
    """A public function, method or class of a module.

    class_docstring: of the class that a method stands in.
    inherits: whether a method of that name has a docstring in one of the package's base classes.
    """

    name: str
    node: ast.FunctionDef | ast.ClassDef
    docstring: str
    class_docstring: str
    inherits: bool
    source: str

    @property
    def sections(self):
        """The text under each heading; what stands before the first one is under ''."""
        parts = re.split(rf"^ *({'|'.join(SECTIONS)}):", self.docstring, flags=re.MULTILINE)
        return {"": parts[0]} | dict(zip(parts[1::2], parts[2::2], strict=True))


def public(source, classes):
    """All that is public in a module; `classes`: every class of the package by its name."""
    found = []

    def collect(body, prefix, class_docstring, inherited):
        for node in body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name.startswith("_"):
                continue
            docstring, segment = ast.get_docstring(node) or "", ast.get_source_segment(source, node)
            inherits = node.name in inherited
            found.append(Public(prefix + node.name, node, docstring, class_docstring, inherits, segment))
            if isinstance(node, ast.ClassDef):
                collect(node.body, f"{prefix}{node.name}.", docstring, documented_in_bases(node, classes))

    collect(ast.parse(source).body, "", "", set())
    return found


def documented_in_bases(node, classes):
    """The names of the methods that have a docstring in a base class of the package."""
    names = set()
    for base in node.bases:
        parent = classes.get(ast.unparse(base).rpartition(".")[2])
        if parent is not None:
            methods = (child for child in parent.body if isinstance(child, ast.FunctionDef))
            names |= {method.name for method in methods if ast.get_docstring(method)}
            names |= documented_in_bases(parent, classes)
    return names


def arguments(function):
    """The names of a function's arguments, but self and cls."""
    given = function.args
    every = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
    return [argument.arg for argument in every if argument and argument.arg not in ("self", "cls")]


def own_nodes(function):
    """The nodes of a function's body, without those of what is defined inside it."""
    waiting = list(function.body)
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            waiting.extend(ast.iter_child_nodes(node))


def gives_back(function):
    """The heading under which the docstring must say what comes back; None if nothing does."""
    nodes = list(own_nodes(function))
    if any(isinstance(node, ast.Yield | ast.YieldFrom) for node in nodes):
        return "Yields"
    returns = any(isinstance(node, ast.Return) and node.value is not None for node in nodes)
    return "Returns" if returns else None


def raised(function):
    """The names of the exceptions that a function raises itself or through an argument check, sorted."""
    names = set()
    for node in own_nodes(function):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            names.add(ast.unparse(node.exc.func).rpartition(".")[2])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            names |= RAISED_BY_CHECKS.get(node.func.id, set())
    return sorted(names)


def computes_an_equation(item):
    """Whether a comment inside the function states one."""
    tokens = tokenize.generate_tokens(io.StringIO(item.source).readline)
    return any(token.type == tokenize.COMMENT and " = " in token.string for token in tokens)


def outweighs_its_code(item):
    """Whether a function of few lines has a docstring of many; one without code is a promise."""
    first, *rest = item.node.body
    lines = item.source.splitlines()[first.end_lineno - item.node.lineno + 1 :]
    code = [line for line in lines if line.strip() and not line.strip().startswith("#")]
    return bool(rest) and len(code) <= SHORT and first.end_lineno - first.lineno + 1 > LONG


def mentions(text, name):
    return re.search(rf"(?<!\w){name}(?!\w)", text) is not None


def documented_function(item):
    """The function whose arguments and exceptions the docstring must name, and where it may name them."""
    if isinstance(item.node, ast.FunctionDef):
        return item.node, item
    methods = (child for child in item.node.body if isinstance(child, ast.FunctionDef))
    function = next((method for method in methods if method.name == "__init__"), None)
    own = ast.get_docstring(function) if function else None
    return function, replace(item, docstring=own) if own else item


def faults(item, is_chapter):
    """What a docstring lacks, as sentences."""
    if not item.docstring:
        return [] if item.inherits else ["has no docstring"]
    function, item = documented_function(item)
    if function is None:
        return []
    sections, found = item.sections, []
    if "Args" in sections:
        entries = "\n".join(re.findall(r"^ +([\w*, ]+):", sections["Args"], flags=re.MULTILINE))
        found += [
            f"has no entry for {n} under Args:" for n in arguments(function) if not mentions(entries, n)
        ]
    else:
        prose = f"{item.docstring} {item.class_docstring}"
        found += [f"does not mention {n}" for n in arguments(function) if not mentions(prose, n)]
    heading = gives_back(function)
    if "Args" in sections and heading and heading not in sections:
        found.append(f"has Args: but no {heading}:")
    found += [f"does not say that it raises {n}" for n in raised(function) if not mentions(item.docstring, n)]
    is_function = isinstance(item.node, ast.FunctionDef) and "." not in item.name
    if is_chapter and is_function and computes_an_equation(item) and "Source:" not in item.docstring:
        found.append("computes an equation and has no Source:")
    return found


MODULES = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts): file.read_text(encoding="utf-8")
    for file in sorted(PACKAGE.rglob("*.py"))
}
CHAPTERS = [name for name in MODULES if "." not in name and not name.startswith("_")]
KIT = [name for name in MODULES if name.startswith("kit.") and name != "kit.__init__"]
CLASSES = {
    node.name: node
    for source in MODULES.values()
    for node in ast.walk(ast.parse(source))
    if isinstance(node, ast.ClassDef)
}


@pytest.mark.parametrize("module", MODULES)
def test_everything_public_has_a_docstring(module):
    source = MODULES[module]
    assert ast.get_docstring(ast.parse(source)), f"{module} has no docstring"
    missing = [item.name for item in public(source, CLASSES) if not item.docstring and not item.inherits]
    assert missing == []


@pytest.mark.parametrize("module", [*CHAPTERS, *KIT])
def test_docstrings_are_complete(module):
    found = [
        f"{item.name} {fault}"
        for item in public(MODULES[module], CLASSES)
        for fault in faults(item, is_chapter=module in CHAPTERS)
    ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("module", MODULES)
def test_docstrings_do_not_outweigh_the_code(module):
    of_learners = set(exercises())
    functions = [item for item in public(MODULES[module], CLASSES) if isinstance(item.node, ast.FunctionDef)]
    others = [item for item in functions if item.docstring and f"{module}.{item.name}" not in of_learners]
    assert [item.name for item in others if outweighs_its_code(item)] == []


FUNCTION = '''
def half(x, y=1):
    """DOCSTRING"""
    check_int("x", x)
    # h = x / 2
    h = x / 2
    if h > y:
        raise errors.TooMuch(f"x must be at most {2 * y}; got {x}")
    return h
'''
COMPLETE = """Half of x.

    Args:
        x, y: a number, and the most it may be.

    Returns:
        A number.

    Raises:
        TypeError, TooMuch: x is no int or too large.

    Source: Euclid, book 2.
    """


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        (COMPLETE, []),
        ("Half of x, TooMuch if above y, TypeError if no int. Source: Euclid.", []),
        ("", ["has no docstring"]),
        (COMPLETE.replace("x, y:", "x:"), ["has no entry for y under Args:"]),
        (COMPLETE.replace("x, y:", "yes, x:"), ["has no entry for y under Args:"]),
        (COMPLETE.replace("Returns:", "It returns"), ["has Args: but no Returns:"]),
        (COMPLETE.replace("TooMuch", "Much"), ["does not say that it raises TooMuch"]),
        (COMPLETE.replace("TypeError, ", ""), ["does not say that it raises TypeError"]),
        (COMPLETE.replace("Source:", "See"), ["computes an equation and has no Source:"]),
        ("Half of x, TooMuch or TypeError if wrong. Source: Euclid.", ["does not mention y"]),
    ],
)
def test_the_rule_for_functions(docstring, expected):
    (item,) = public(FUNCTION.replace("DOCSTRING", docstring), {})
    assert faults(item, is_chapter=True) == expected


def test_the_rule_for_classes():
    source = '''
class Base:
    """Something.

    Args:
        size: a number.
    """
    def __init__(self, size, colour):
        if size < 0:
            raise ValueError(size)
    def area(self):
        """Its area."""

class Square(Base):
    """A square of some size."""
    def area(self):
        return self.size**2
    def side(self):
        return self.size
    def times(self, size, factor):
        """A larger one."""
    def _hidden(self):
        return 0
'''
    classes = {node.name: node for node in ast.parse(source).body}
    found = {item.name: faults(item, is_chapter=True) for item in public(source, classes)}
    assert found == {
        "Base": ["has no entry for colour under Args:", "does not say that it raises ValueError"],
        "Base.area": [],
        "Square": [],
        "Square.area": [],
        "Square.side": ["has no docstring"],
        "Square.times": ["does not mention factor"],
    }
