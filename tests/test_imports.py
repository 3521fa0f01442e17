"""Data flows one way: who may import whom, walked over the syntax trees."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent / "dyntoken"
BASE = {"types", "registry", "schema"}
CORE = BASE | {
    "ops",
    "nn",
    "reducers",
    "backbones",
    "heads",
    "cascade",
    "multiexit",
    "architectures",
    "models",
}
ALLOWED = {
    "__init__": {"interrupt"},
    "interrupt": set(),
    "peers": {"interrupt"},
    "types": {"schema"},
    "registry": set(),
    "schema": {"registry"},
    "config": set(),
    "paths": set(),
    "multihost": {"paths", "peers"},
    "workdirs": set(),
    "checkpoints": {"paths", "workdirs"},
    "architectures": set(),
    "ops": {"types"},
    "nn": BASE | {"ops"},
    "reducers": BASE | {"architectures", "nn", "ops"},
    "backbones": BASE | {"architectures", "nn", "ops"},
    "heads": {"nn", "ops", "types"},
    "multiexit": BASE | {"backbones", "heads", "nn", "ops"},
    "cascade": BASE | {"backbones", "heads", "nn", "ops", "reducers"},
    "models": CORE - {"models"},
    "weights": BASE | {"cascade", "checkpoints", "models", "nn", "ops", "paths", "schedules", "workdirs"},
    "losses": BASE | {"ops"},
    "mix": BASE | {"ops"},
    "schedules": {"registry"},
    "optim": BASE | {"nn", "ops", "schedules"},
    "data": {"registry", "paths", "schema"},
    "preprocessing": {"data", "mix", "models", "architectures"},
    "runs": {"preprocessing", "train", "weights", "workdirs"},
    "analysis": CORE,
    "eval": CORE | {"losses", "weights", "data", "analysis", "mix"},
    "train": {
        "analysis",
        "checkpoints",
        "data",
        "eval",
        "interrupt",
        "losses",
        "mix",
        "models",
        "multihost",
        "nn",
        "optim",
        "paths",
        "reducers",
        "registry",
        "schedules",
        "schema",
        "weights",
        "workdirs",
    },
    "tools": CORE
    | {
        "config",
        "interrupt",
        "paths",
        "losses",
        "weights",
        "data",
        "analysis",
        "mix",
        "optim",
        "schedules",
        "eval",
        "train",
        "preprocessing",
        "runs",
    },
    "main": {"multihost", "config", "interrupt", "peers", "schema", "train", "eval", "tools", "analysis"},
}
TENSORFLOW = {"tensorflow", "tensorflow_datasets"}


def _group(file):
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def _imports(file):
    """(our groups, foreign top-level modules) that a file imports anywhere."""
    ours, foreign = set(), set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts == ["dyntoken", "__version__"]:
                continue
            if parts[0] == "dyntoken":
                ours.add(parts[1])
            else:
                foreign.add(parts[0])
    return ours, foreign


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_follow_the_table(file):
    group = _group(file)
    ours, foreign = _imports(file)
    assert ours - {group} <= ALLOWED[group], (
        f"{group} may not import {sorted(ours - {group} - ALLOWED[group])}"
    )
    if group != "data":
        assert not foreign & TENSORFLOW, "TensorFlow lives in dyntoken/data only"
    if group == "ops":
        assert "flax" not in foreign or file.name in ("sample.py", "select.py"), "ops are pure jax.numpy"


def test_the_table_names_every_module():
    assert {_group(f) for f in FILES} == set(ALLOWED)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_files_stay_short(file):
    assert len(file.read_text().splitlines()) <= 500


def test_import_is_light():
    code = (
        "import sys, time; start = time.monotonic(); import dyntoken; dyntoken.create_model; dyntoken.Tokens;"
        "bad = {'tensorflow', 'tensorflow_datasets', 'orbax', 'torch', 'matplotlib'} & set(sys.modules);"
        "assert not bad, bad"
    )
    subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:dyntoken", "-c", code], check=True, cwd=ROOT.parent
    )
