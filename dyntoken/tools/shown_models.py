"""Models that `show` puts side by side, with their weights."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from pathlib import Path
from typing import Any

from dyntoken.registry import UnknownNameError, suggest
from dyntoken.tools import calibrate, cli


@dataclasses.dataclass
class Shown:
    """A reduced model.

    Attributes:
      title: what it is called.
      model: module.
      source: of its weights, unless `variables` holds them.
      trained: the workdir (or weights) that may say what it was trained on.
    """

    title: str
    model: Any
    source: Any = None
    trained: Any = None
    variables: Any = None

    def load(self) -> None:
        """Reads the weights, all arrays of the model.

        Raises:
          WeightsError: a source without some of them.
        """
        from dyntoken.weights import load_whole

        if self.variables is None:
            self.variables = load_whole(self.model, self.source)[0]

    def at(self, keep: float) -> Shown:
        """The same with another keep rate.

        Raises:
          ValueError: a model that cannot have it.
        """
        model = self.model.clone(keep=keep)
        model.validate()
        return dataclasses.replace(self, model=model)

    @functools.cached_property
    def _apply(self) -> Any:
        import jax

        return jax.jit(lambda variables, images: self.model.apply(variables, images))

    def __call__(self, images: Any) -> Any:
        """The `Output` of normalised images."""
        return self._apply(self.variables, images)


def of(args: argparse.Namespace) -> list[Shown]:
    """What NAME and --vs stand for, in this order; weights that need a model are not yet read.

    Raises:
      ValueError: a dense model, a method with parameters of its own, or options that do not go together.
    """
    names = [args.name, *args.vs]
    whole = [name for name in names if _whole(name)]
    if len(whole) == len(names) and (args.weights is not None or cli.overrides(args)):
        raise ValueError(f"{args.name} says what its model and weights are: leave the options out")
    weights = args.weights or next(iter(whole), None)
    found = [_of(name, weights, args) for name in names]
    for name, shown in zip(names, found, strict=True):
        if not shown.model.sites():
            hint = f"METHOD --weights={name}" if name in whole else f"a method, e.g. dtps_{name}"
            raise ValueError(f"{shown.title} is dense and keeps every token: name {hint}")
        if shown.model.input_shape != found[0].model.input_shape:
            shapes = [" x ".join(map(str, one.model.input_shape)) for one in (found[0], shown)]
            raise ValueError(f"{found[0].title} takes images of {shapes[0]}, {shown.title} of {shapes[1]}")
    return found


def _whole(name: str) -> bool:
    """Whether NAME is a run, or weights, not a model or a method.

    Raises:
      UnknownNameError: it is none of them; with the nearest models and methods.
    """
    from dyntoken.models import list_models, split_name
    from dyntoken.reducers import METHODS
    from dyntoken.weights import files

    method, _ = calibrate.method_of(name)
    if method in METHODS:
        return False
    if cli.is_folder(name) or Path(name).is_file():
        return True
    if Path(name).suffix in files.READERS:
        raise ValueError(f"{name}: no such file")
    try:
        split_name(name)
    except UnknownNameError as error:
        if not str(error).startswith("unknown model"):
            raise
        near = suggest(method, list_models() if "_" in method else METHODS)
        raise UnknownNameError(f"unknown model or method {method!r}: {near}") from None
    return False


def _of(name: str, weights: str | None, args: argparse.Namespace) -> Shown:
    from dyntoken.models import create_model
    from dyntoken.reducers import METHODS
    from dyntoken.runs import load_run
    from dyntoken.weights import fetch, load_pretrained, prepared, runs

    if _whole(name):
        path = Path(name).expanduser().resolve()
        if path.is_file() or fetch.in_folder(path):
            model, variables = load_pretrained(name)
        else:
            run = load_run(name)
            model, variables = run.model, run.variables
        return Shown(path.stem if path.is_file() else path.name, model, trained=name, variables=variables)
    if weights is None:
        raise cli.UsageError(f"which weights of {name}? give --weights, or a run's workdir in place of NAME")
    method, options = calibrate.method_of(name)
    changed = {**cli.overrides(args), **options}
    if method not in METHODS:
        section = runs.section_of(runs.of_workdir(weights)) or {}
        if section.pop("name", None) == name:  # the run's own model: also its keep rate and blocks
            changed = {**section, **changed}
        return Shown(name, prepared(create_model(name, **changed), weights), weights, weights)
    model, variables, report = load_pretrained(weights, method=method, return_report=True, **changed)
    if report.missing:
        raise ValueError(
            f"{method} has parameters of its own ({report.missing[0]}, ...), which {weights} does not hold: "
            "train it first"
        )
    return Shown(name, model, trained=weights, variables=variables)
