"""Finding and loading recipes: `load("configs/tps_deit.py:demo")`."""

from __future__ import annotations

import importlib.util
import pathlib
import sys
import traceback
from types import ModuleType

import ml_collections

HERE = pathlib.Path(__file__).resolve().parent


class ConfigError(ValueError):
    """No such recipe, or one that cannot be read."""


def locate(path: str) -> pathlib.Path:
    """The file of a recipe.

    A relative path that does not exist from the current folder is looked for
    among the recipes that came with the package, so `configs/tps_deit.py` works
    anywhere.

    Raises:
      ConfigError: names the recipes there are.
    """
    asked = pathlib.Path(path).expanduser()
    shipped = [folder for folder in (HERE / "configs", HERE.parent / "configs") if folder.is_dir()]
    for candidate in (asked, *(folder / asked.name for folder in shipped)):
        if candidate.is_file():
            return candidate.resolve()
    files = shipped[0].glob("*.py") if shipped else ()
    names = sorted(f.name for f in files if "def get_config(" in f.read_text())
    raise ConfigError(f"no recipe {path}: choose a file, or one of configs/{{{', '.join(names)}}}")


def load(path: str) -> ml_collections.ConfigDict:
    """Runs `get_config` of `FILE[:args]`.

    Raises:
      ConfigError: no such file, one that does not run, one without `get_config`, or bad
        arguments.
    """
    name, _, arg = path.partition(":")
    module = _module(name)
    try:
        config = module.get_config(arg or None)
    except ValueError as error:
        raise ConfigError(f"{pathlib.Path(module.__file__).name}: {error}") from error
    except Exception as error:
        raise ConfigError(_blame(module.__file__, error)) from error
    if isinstance(config, dict):
        config = ml_collections.ConfigDict(config)
    if not isinstance(config, ml_collections.ConfigDict):
        raise ConfigError(f"{module.__file__}: get_config returned {config!r}: return a ConfigDict")
    return config


def arguments(path: str) -> str:
    """What a recipe says about its arguments, on one line."""
    doc = _module(path.partition(":")[0]).get_config.__doc__
    return " ".join((doc or "no arguments that it describes").split())


def _module(name: str) -> ModuleType:
    """The module of a recipe, which has a `get_config`."""
    file = locate(name)
    try:
        module = _import(f"configs.{file.stem}", file)
    except Exception as error:
        raise ConfigError(_blame(str(file), error)) from error
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{file} has no get_config(arg): it is no recipe")
    return module


def _blame(file: str, error: Exception) -> str:
    """The line of a recipe (or of what it imports) that does not run."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {error.msg}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    where = f"{file}, line {frames[-1].lineno}" if frames else file
    return f"{where}: {type(error).__name__}: {error}"


def _import(name: str, file: pathlib.Path) -> ModuleType:
    """A recipe's module, for which `from configs import common` means its own folder."""
    package = ModuleType("configs")
    package.__path__ = [str(file.parent)]
    for other in [n for n in sys.modules if n == "configs" or n.startswith("configs.")]:
        del sys.modules[other]
    sys.modules["configs"] = package
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
