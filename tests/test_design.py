"""CITATION.cff and .ci/run say what is so."""

import pathlib
import re

import dyntoken

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_the_citation_is_of_this_version():
    text = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {dyntoken.__version__}\n" in text
    assert text.count("repository-code:") == text.count("- type: conference-paper") >= 3


def test_ci_leaves_out_tests_that_exist():
    """A name that is out of date would leave out nothing."""
    named = re.findall(r"^  (tests/[\w/]+\.py)::(\w+) +# \w", (ROOT / ".ci" / "run").read_text(), re.M)
    assert named
    for file, test in named:
        assert f"\ndef {test}(" in (ROOT / file).read_text(), f"{file} has no {test}"
