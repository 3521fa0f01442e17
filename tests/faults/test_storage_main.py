"""The same faults as a user of the command line meets them: exit code, one line, nothing lost."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from dyntoken.weights import files, orbax
from tests.test_main import _program
from tests.train.test_checkpoint import damage

pytestmark = pytest.mark.thorough  # whole programs
RECIPE = "--config=configs/tps_deit.py:tiny"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("elsewhere")
    assert _program(RECIPE, "--workdir=run", cwd=cwd).returncode == 0
    return cwd


def one_line(done) -> str:
    """The only thing said on stderr."""
    assert done.returncode == 1 and done.stderr.startswith("error: "), done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stderr


def test_weights_that_hold_nan(trained, tmp_path):
    trees = orbax.read(trained / "run")
    trees["params"]["backbone"]["cls_token"] = np.full_like(trees["params"]["backbone"]["cls_token"], np.nan)
    path = tmp_path / "bad.npz"
    files.write_npz(path, files.flatten(trees["params"]))
    options = ("--mode=eval", f"--config.init.path={path}")
    done = _program(RECIPE, *options, cwd=tmp_path)
    assert "not finite" in one_line(done) and "loss" in done.stderr and "NaN" not in done.stdout


def test_a_place_that_is_not_read(tmp_path):
    assert "https:// is not read" in one_line(_program(RECIPE, "--workdir=https://host/run", cwd=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_all_damaged_then_restart(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    for step in (run / "checkpoints").iterdir():
        damage(step, lambda raw: raw[: len(raw) // 2])
    record = (run / "metrics.jsonl").read_text()
    for _ in range(2):
        said = one_line(_program(RECIPE, "--workdir=run", cwd=tmp_path))
        assert "is intact" in said and "--restart" in said
        assert (run / "metrics.jsonl").read_text() == record
    done = _program(RECIPE, "--workdir=run", "--restart", cwd=tmp_path)
    assert done.returncode == 0 and "run/old/1" in done.stdout
    assert (run / "old" / "1" / "metrics.jsonl").read_text() == record
