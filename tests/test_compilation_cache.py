"""The folder of compiled programs: whose it is, what it holds, and that a second process reads it."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from dyntoken import compilation_cache

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home of its own, and no folder named; jax is told nothing."""
    monkeypatch.delenv(compilation_cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)


def test_the_default_is_a_folder_of_the_user_and_the_machine(home, monkeypatch):
    folder = compilation_cache.use()
    assert pathlib.Path(folder).is_relative_to(home / "dyntoken" / "jax") and os.path.isdir(folder)
    assert os.environ[compilation_cache.VARIABLE] == folder == jax.config.jax_compilation_cache_dir
    assert compilation_cache.default_folder() == compilation_cache.default_folder()


def test_a_folder_of_the_users_own_stays(home, monkeypatch):
    monkeypatch.setenv(compilation_cache.VARIABLE, "/mine")
    assert compilation_cache.use() == "/mine"
    monkeypatch.setenv(compilation_cache.VARIABLE, "")
    assert compilation_cache.use() is None  # off is the user's word, too
    assert not list(home.iterdir())


def test_a_flag_goes_first(home, monkeypatch):
    monkeypatch.setenv(compilation_cache.VARIABLE, "/mine")
    assert compilation_cache.use(str(home / "given")) == str(home / "given")
    assert compilation_cache.use("gs://bucket/programs") == "gs://bucket/programs"
    assert compilation_cache.use("none") is None
    assert os.environ[compilation_cache.VARIABLE] == "" and not jax.config.jax_compilation_cache_dir
    (home / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        compilation_cache.use(str(home / "file"))


def test_a_home_that_cannot_be_written_has_none(home, monkeypatch):
    (home / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "file"))
    assert compilation_cache.use() is None and compilation_cache.VARIABLE not in os.environ
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert compilation_cache.use() is None


def test_what_was_not_read_for_longest_goes_first(tmp_path):
    for age, name in enumerate(("new", "old", "older")):
        (tmp_path / name).write_bytes(bytes(10))
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    compilation_cache.trim(tmp_path, 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]
    compilation_cache.trim(tmp_path, 20)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.thorough
def test_a_program_fills_it_and_the_next_one_reads(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != compilation_cache.VARIABLE}
    env |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    tiny = ["--set", "width=8", "--set", "depth=1", "--set", "heads=1", "--pairs=1", "--batch=1", "--profile"]
    command = [sys.executable, "-m", "dyntoken.tools.bench", "vit_mini_patch4_28", *tiny]

    def files(*more):
        done = subprocess.run([*command, *more], env=env, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return {path.name for path in tmp_path.rglob("*-cache")}

    assert not files("--compilation_cache=none")
    first = files()
    assert first and files() == first
