"""Recipes of modules: values that can be compared, read and changed."""

import pytest

from dyntoken.nn.block import Block
from dyntoken.nn.spec import Spec
from dyntoken.reducers import METHODS


def test_a_spec_is_a_value():
    spec = Spec.of(Block, heads=2, layer=3)
    assert spec == Spec.of(Block, layer=3, heads=2) and len({spec, Spec.of(Block, layer=3, heads=2)}) == 1
    assert spec["layer"] == 3 and spec.get("width") is None and spec.get("width", 8) == 8
    with pytest.raises(KeyError):
        spec["width"]
    other = spec.with_(heads=4, width=8)
    assert (other["heads"], other["width"], other["layer"], spec["heads"]) == (4, 8, 3, 2)
    block = other(drop_path=0.1, parent=None)
    assert isinstance(block, Block) and (block.heads, block.drop_path) == (4, 0.1)


def test_a_method_makes_plain_specs_of_its_reducer():
    site = METHODS["evit"].with_(keep=7)
    assert type(site) is Spec and site["keep"] == 7 and site["fuse"] == METHODS["evit"]["fuse"]
