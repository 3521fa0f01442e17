"""The tables of methods and backbones in README and docs/pairings.md, and that of the literature."""

import pytest

from dyntoken import architectures, models
from dyntoken.backbones import BACKBONES
from scripts import literature, pairings


@pytest.fixture(scope="module")
def found():
    return pairings.pairings()


def shown(module, path):
    return path.read_text().split(module.START)[1].split(module.END)[0]


def test_the_tables_are_those_of_today(found):
    assert shown(pairings, pairings.PAGE) == pairings.markdown(found)
    assert shown(pairings, pairings.README) == pairings.short(found)


def test_the_short_table_says_what_the_long_one_does(found):
    rows = [line.strip("| ").split(" | ") for line in pairings.short(found).splitlines()]
    marks = {row[0].strip("`"): dict(zip(rows[0][2:], row[2:], strict=True)) for row in rows[2:]}
    assert set(marks) == set(pairings.prefixes())
    for names, mark in marks["evit"].items():  # by the class token's attention
        assert mark == (
            "-" if set(names.split(", ")) & {"SigLIP", "CvT", "Swin"} else "○" if names == "PVT" else "●"
        )
    assert sorted(", ".join(marks["evit"]).split(", ")) == sorted(
        ", ".join(pairings.CALLED.values()).split(", ")
    )


def test_the_literature_is_that_of_the_file():
    assert shown(literature, literature.PAGE) == literature.markdown()
    assert "| dTPS | DeiT-S | keep 0.7, blocks 3-6-9 | 2.99 | 79.67 |" in literature.markdown()


def test_every_backbone_has_a_row(found):
    assert {architectures.parse(arch).backbone for arch in found} == set(BACKBONES)


def test_what_works_is_what_is_listed(found):
    listed = set(models.list_models())
    for arch, row in found.items():
        for method in models.pairings(arch):
            assert (f"{method}_{arch}" in listed) == (not row[method].startswith("no"))
    assert found["deit_tiny_patch16_224"]["dtps"] == "yes"
    assert "token grid can be chosen" in found["lvvit_t"]["dvt"]
