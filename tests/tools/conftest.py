"""One tiny run with exits for all the programs that read one."""

import pytest

from tests.tools import exit_run


@pytest.fixture(scope="session")
def exit_workdir(tmp_path_factory):
    """Workdir of a model with three exits; read it, or copy it."""
    return exit_run.make_workdir(tmp_path_factory.mktemp("exits") / "run", exit_run.exit_config())
