"""docs/design.md, CONTRIBUTING.md and CITATION.cff say what is so."""

import ast
import pathlib
import re

import pytest

import dyntoken

ROOT = pathlib.Path(__file__).resolve().parent.parent
DESIGN = (ROOT / "docs" / "design.md").read_text()
NAMED = sorted(set(re.findall(r"((?:\w+/)*\w+\.py)\b(?::([\w.]*\w))?", DESIGN)))


def _defined(tree, dotted):
    """Whether a module defines a class, function or value, or a class such a member."""
    name, _, member = dotted.partition(".")
    for node in tree.body:
        names = [getattr(node, "name", None)]
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [getattr(target, "id", None) for target in targets]
        elif isinstance(node, ast.ImportFrom) and not member:
            names = [alias.asname or alias.name for alias in node.names]
        if name in names:
            return not member or _defined(node, member)
    return False


@pytest.mark.parametrize("file, name", NAMED)
def test_what_the_design_names_exists(file, name):
    path = next((p for p in (ROOT / "dyntoken" / file, ROOT / file) if p.is_file()), None)
    assert path is not None, f"no {file}"
    assert not name or _defined(ast.parse(path.read_text()), name), f"{file} defines no {name}"


def test_the_way_of_a_batch_is_drawn():
    drawn = re.search(r"one batch.*?```", DESIGN, re.S)[0]
    assert len(re.findall(r"\w\.py:\w", drawn)) >= 10 and len(NAMED) > 30


def test_links_lead_somewhere():
    for path in (ROOT / "docs" / "design.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"):
        for link in re.findall(r"\]\(([\w./]+)\)", path.read_text()):
            assert (path.parent / link).exists(), f"{path.name}: {link}"


def test_the_citation_is_of_this_version():
    text = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {dyntoken.__version__}\n" in text
    assert text.count("repository-code:") == text.count("- type: conference-paper") >= 3


def test_the_slow_tests_that_ci_names_exist():
    """A name that is out of date, or a file without a slow test, would run nothing."""
    named = re.findall(r"tests/[\w/]+\.py", (ROOT / ".ci" / "run").read_text())
    assert len(named) >= 4
    for file in named:
        assert (
            "@pytest.mark.slow" in (ROOT / file).read_text() or "pytestmark" in (ROOT / file).read_text()
        ), file
