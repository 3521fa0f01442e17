"""What ends a demo can be made of every demo that has it (that each learns: tests/test_demos.py)."""

from __future__ import annotations

import pytest

from dyntoken import config as recipes
from dyntoken import train
from dyntoken.tools import demo_report
from tests.test_demos import DEMOS

CONFIGS = {recipe: recipes.load(f"configs/{recipe}.py:demo").to_dict() for recipe in DEMOS}
REDUCED = [
    recipe
    for recipe, config in CONFIGS.items()
    if config["compare"] and demo_report.split_name(config["model"]["name"])[0] not in ("dvt", "multiexit")
]


@pytest.mark.parametrize("recipe", REDUCED)
def test_what_it_compares_with_can_be_built(recipe):
    dense = train.build(demo_report.dense_of(CONFIGS[recipe]), training=False)
    drop = demo_report.dropping(CONFIGS[recipe])
    assert dense.model.method is None and drop.model.method is not None
    assert drop.settings.model["fuse"] == "drop"


def test_a_method_without_a_fuser_has_nothing_to_drop_instead():
    config = CONFIGS["tps_deit"]
    assert demo_report.dropping({**config, "model": {"name": "tome_vit_mini_patch4_28"}}) is None
