"""Data flows one way: who imports whom, walked over the syntax trees."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent / "dyntoken"
# What each package or single file imports today, from the bottom up: no less, no more.
IMPORTS = {
    "architectures": set(),
    "compilation_cache": set(),
    "config": set(),
    "interrupt": set(),
    "ops": set(),
    "paths": set(),
    "progress": set(),
    "registry": set(),
    "workdirs": set(),
    "__init__": {"interrupt"},
    "checkpoints": {"paths", "workdirs"},
    "eval": {"registry"},
    "peers": {"interrupt"},
    "schedules": {"registry"},
    "schema": {"registry"},
    "data": {"paths", "registry", "schema"},
    "multihost": {"paths", "peers"},
    "types": {"schema"},
    "device_augment": {"ops", "schema", "types"},
    "losses": {"ops", "registry", "schema", "types"},
    "nn": {"ops", "registry", "types"},
    "analysis": {"nn", "ops", "types"},
    "backbones": {"architectures", "nn", "ops", "registry", "schema", "types"},
    "heads": {"nn", "ops", "types"},
    "optim": {"nn", "schedules", "schema"},
    "reducers": {"architectures", "nn", "ops", "registry", "schema", "types"},
    "features": {"ops", "types"},
    "classifier": {"backbones", "features", "heads", "nn", "registry", "schema", "types"},
    "cascade": {"backbones", "classifier", "features", "heads", "nn", "ops", "reducers", "schema", "types"},
    "multiexit": {"classifier", "features", "heads", "nn", "types"},
    "models": {
        "architectures",
        "backbones",
        "cascade",
        "classifier",
        "features",
        "heads",
        "multiexit",
        "nn",
        "ops",
        "reducers",
        "registry",
        "schema",
        "types",
    },
    "preprocessing": {"architectures", "data", "device_augment", "models"},
    "weights": {
        "architectures",
        "cascade",
        "checkpoints",
        "models",
        "nn",
        "ops",
        "paths",
        "reducers",
        "registry",
        "schedules",
        "workdirs",
    },
    "exporting": {
        "device_augment",
        "models",
        "ops",
        "paths",
        "preprocessing",
        "registry",
        "types",
        "weights",
    },
    "train": {
        "analysis",
        "checkpoints",
        "data",
        "device_augment",
        "eval",
        "interrupt",
        "losses",
        "models",
        "multihost",
        "nn",
        "optim",
        "paths",
        "progress",
        "reducers",
        "registry",
        "schedules",
        "schema",
        "weights",
        "workdirs",
    },
    "runs": {"preprocessing", "train", "weights", "workdirs"},
    "studies": {
        "analysis",
        "architectures",
        "data",
        "eval",
        "losses",
        "models",
        "reducers",
        "registry",
        "train",
        "weights",
    },
    "predictor": {
        "data",
        "device_augment",
        "eval",
        "exporting",
        "models",
        "paths",
        "preprocessing",
        "registry",
        "runs",
        "types",
        "weights",
    },
    "tools": {
        "analysis",
        "backbones",
        "compilation_cache",
        "config",
        "data",
        "device_augment",
        "eval",
        "exporting",
        "interrupt",
        "models",
        "ops",
        "paths",
        "predictor",
        "preprocessing",
        "progress",
        "reducers",
        "registry",
        "runs",
        "schema",
        "studies",
        "train",
        "weights",
        "workdirs",
    },
    "main": {
        "analysis",
        "compilation_cache",
        "config",
        "multihost",
        "paths",
        "peers",
        "schema",
        "tools",
        "train",
        "workdirs",
    },
    "__main__": {"main", "schema"},
}
TENSORFLOW = {"tensorflow", "tensorflow_datasets"}
FLAX = {"ops/sample.py"}  # of the operators: a record that passes through jit
FILES = sorted(ROOT.rglob("*.py"))


def _group(file):
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def _imports(file):
    """(paths inside dyntoken, foreign top-level modules) that a file imports anywhere."""
    ours, foreign = set(), set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            first, *rest = name.split(".")
            if first != "dyntoken":
                foreign.add(first)
            elif rest != ["__version__"]:
                ours.add(tuple(rest))
    return ours, foreign


def _file(path):
    """The file that an import path inside dyntoken ends in."""
    for end in range(len(path), 0, -1):
        module = ROOT.joinpath(*path[:end])
        for file in (module.with_suffix(".py"), module / "__init__.py"):
            if file.is_file():
                return file
    return ROOT / "__init__.py"


@pytest.mark.parametrize("group", sorted({_group(file) for file in FILES}))
def test_imports_are_those_of_the_table(group):
    found = {path[0] for file in FILES if _group(file) == group for path in _imports(file)[0]} - {group}
    assert found == IMPORTS[group]


def test_the_table_names_every_package():
    assert {_group(file) for file in FILES} == set(IMPORTS)


def test_no_packages_and_no_files_import_each_other_in_a_circle():
    graphlib.TopologicalSorter(IMPORTS).prepare()
    files = {file: {_file(path) for path in _imports(file)[0]} - {file} for file in FILES}
    graphlib.TopologicalSorter(files).prepare()  # raises CycleError, which names the files


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_foreign_imports_and_length(file):
    _, foreign = _imports(file)
    if _group(file) != "data":
        assert not foreign & TENSORFLOW, "TensorFlow lives in dyntoken/data only"
    if _group(file) == "ops":
        assert "flax" not in foreign or str(file.relative_to(ROOT)) in FLAX, "ops are pure jax.numpy"
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
