"""Rows that a plugin registers stay in these tests: other ones compare the tables with the README."""

import sys

import pytest

from dyntoken import architectures, data, losses
from dyntoken.backbones import BACKBONES
from dyntoken.reducers import FUSERS, METHODS, SCORERS

PLUGIN = "tests.plugins.mine"


@pytest.fixture(scope="module", autouse=True)
def as_before():
    """Forgets what a module of tests registers."""
    tables = (SCORERS, FUSERS, METHODS, BACKBONES, losses.LOSSES, data.SOURCES)
    before = [(held, held.copy()) for held in (architectures.FAMILIES, *(table._rows for table in tables))]
    loaded = sys.modules.get(PLUGIN)  # by DYNTOKEN_PLUGINS
    yield
    for held, rows in before:
        held.clear()
        held.update(rows) if isinstance(held, dict) else held.extend(rows)
    if loaded is None:
        sys.modules.pop(PLUGIN, None)
