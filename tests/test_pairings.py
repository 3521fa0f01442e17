"""The table of methods and backbones, and its copy in the README."""

import pytest

from dyntoken import architectures, models
from dyntoken.backbones import BACKBONES
from scripts import pairings


@pytest.fixture(scope="module")
def found():
    return pairings.pairings()


def test_the_readme_shows_the_table_of_today(found):
    text = pairings.README.read_text().split(pairings.START)[1].split(pairings.END)[0]
    assert text == pairings.markdown(found)


def test_every_backbone_has_a_row(found):
    assert {architectures.parse(arch).backbone for arch in found} == set(BACKBONES)


def test_what_works_is_what_is_listed(found):
    listed = set(models.list_models())
    for arch, row in found.items():
        for method in models.pairings(arch):
            assert (f"{method}_{arch}" in listed) == (not row[method].startswith("no"))
    assert found["deit_tiny_patch16_224"]["dtps"] == "yes"
    assert "token grid can be chosen" in found["lvvit_t"]["dvt"]
